"""Search your photos in a web page: type a title or drop a photo, see the best photos with their scores.

    python -m aliblip.serve --model_name_or_path MODEL --gallery my_photos --gallery_dir my_gallery

`--gallery` is a folder of photos (or Parquet files, tars, an image folder with metadata), embedded at the start and
kept in `--gallery_dir`, from where the next start loads it; or a gallery that is there already, a folder or Hub name.
As a Space, the whole `app.py`, with the settings as variables of the Space, ALIBLIP_MODEL_NAME_OR_PATH, ALIBLIP_GALLERY
and so on:

    from aliblip.serve import build
    build().launch()

The page's API, from another program:

    client = gradio_client.Client("http://127.0.0.1:7860")
    client.predict("striped blue mug", 5, 64, api_name="/search_by_title")
    client.predict(gradio_client.handle_file("mug.jpg"), 5, api_name="/search_by_photo")

Both return a list of {"id", "score", "itc", "itm_logit", "itm_probability"}, best first: what the pipeline of
`pipeline_aliblip` finds, without the paths of this machine. Titles are re-ranked by ITM; photos are compared with
photos by ITC alone.

The page needs no internet and reports nothing to anybody. Visitors get thumbnails of what they found, never a file.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from aliblip.data.sources import open_source, require_usable_row, tell_data
from aliblip.models.loading import load_pretrained
from aliblip.retrieval.galleries import SourceItems
from aliblip.runtime.arguments import check_range, option, parse
from aliblip.runtime.mistakes import UsageError, first_line, main_with_usage_errors
from gallery_aliblip import Gallery
from pipeline_aliblip import AliBlipImageTextRetrievalPipeline
from reading_aliblip import UnusableItem, read_photo

MAX_TOP_K = 100
MAX_RERANK = 512
THUMBNAIL_SIDE = 384
SEARCHES_AT_ONCE = 4
WAITING_SEARCHES = 100
# Uploads and thumbnails in Gradio's folder of temporary files: looked at, and removed, after so many seconds.
KEPT_SECONDS = 3600
EXAMPLES = 5
EMPTY_TITLE = "Type what you are looking for, such as: striped blue mug"

_UPLOAD_SUFFIXES = ("avif", "bmp", "gif", "jp2", "jpeg", "jpg", "png", "tif", "tiff", "webp")
_COLUMNS = ("id", "score", "itc", "itm_logit", "itm_probability")


@dataclass
class ServeArguments:
    """What the search page searches, and where it listens. Each can also be given as a variable of the environment,
    such as ALIBLIP_GALLERY; flags win."""

    model_name_or_path: str | None = option(None, "Folder or Hub name of the model, or an original file (required).")
    tokenizer_name: str | None = option(
        None, "Folder, vocab.txt or Hub name (default: the model's own; for original files bert-base-uncased)."
    )
    gallery: str | None = option(
        None,
        "What to search (required): a folder of photos, of Parquet files or tars, embedded at the start; or the folder "
        "or Hub name of a gallery.",
    )
    split_name: str = option("train", "Split to search, where the photos' folder has several.")
    gallery_dir: str | None = option(
        None, "Folder to keep the embedded photos in, for the next start (default: embedded at each start)."
    )
    update_gallery: bool = option(
        False, "Embed the photos that are new since --gallery_dir was built, and drop those that are gone."
    )
    store_tokens: bool = option(
        True,
        "Keep image tokens of the embedded photos, so that re-ranking is fast: 0.9 MB a photo with base at 384 px.",
    )
    photo_root: str | None = option(None, "Folder of the photos that a gallery names by relative paths.")
    top_k: int = option(12, "Results at first; the visitor may choose others.")
    rerank: int = option(64, "Candidates that ITM re-ranks at first; 0: ITC alone.")
    fusion_weight: float = option(
        1.0, "Weight of the ITC similarity beside the match logit; evaluate_retrieval.py --tune_fusion finds one."
    )
    max_upload_mb: int = option(20, "Largest photo that can be dropped, in MiB.")
    server_name: str | None = option(
        None,
        "Address to listen on; 0.0.0.0: everywhere (default: GRADIO_SERVER_NAME, or 127.0.0.1: this machine only).",
    )
    server_port: int | None = option(None, "Port (default: GRADIO_SERVER_PORT, or the first free one from 7860 on).")


class Searcher:
    """A gallery of photos and the pipeline that searches it, usable from many threads.

    Args:
        pipe: the pipeline.
        gallery: of photos.
        photo_of: gives an item's decoded photo, or raises UnusableItem; by default it reads the item's own path.

    Raises:
        UsageError: a gallery of titles or of another model.
    """

    def __init__(
        self, pipe: AliBlipImageTextRetrievalPipeline, gallery: Gallery, photo_of: Callable[[dict], Any] | None = None
    ):
        if gallery.kind != "image":
            raise UsageError("the gallery holds titles, this page shows photos: search it with the pipeline")
        try:
            gallery.check_model(pipe.encoder.fingerprint)
        except ValueError as error:
            raise UsageError(str(error)) from error
        self.pipe, self.gallery = pipe, gallery
        self._photo_of = photo_of or (lambda item: read_photo(gallery.photo_path(item)))
        self.thumbnail = functools.lru_cache(maxsize=1000)(self._thumbnail)

    def by_title(self, title: str, top_k: int, rerank: int) -> list[dict]:
        """The pipeline's results for a title, re-ranked among the `rerank` best; 0: by ITC alone.

        Raises:
            ValueError: an empty title, a number out of its bounds.
        """
        if not isinstance(title, str) or not title.strip():
            raise ValueError(EMPTY_TITLE)
        return self.pipe(
            title,
            gallery=self.gallery,
            direction="text-to-image",
            top_k=_whole("the number of results", top_k, 1, MAX_TOP_K),
            rerank=_whole("the re-ranked candidates", rerank, 0, MAX_RERANK),
        )

    def by_photo(self, file: str | None, top_k: int) -> list[dict]:
        """The pipeline's results for the photo in a file, by ITC alone.

        Raises:
            ValueError: no photo, one that can't be read, a number out of its bounds.
        """
        if not file:
            raise ValueError("Drop a photo first")
        top_k = _whole("the number of results", top_k, 1, MAX_TOP_K)
        try:
            photo = read_photo(file)
        except UnusableItem as error:
            raise ValueError(f"This photo can't be used: {error}") from error
        return self.pipe(photo, gallery=self.gallery, direction="image-to-image", top_k=top_k, rerank=0)

    def picture(self, result: dict) -> Image.Image:
        """A thumbnail of the result's photo, or a grey one where it can't be read any more."""
        return self.thumbnail(result["id"], result.get("path"))

    def _thumbnail(self, key: str | int, path: str | None) -> Image.Image:
        try:
            image = self._photo_of({"id": key, "path": path})
        except (UnusableItem, OSError):
            return Image.new("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE), (200, 200, 200))
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        return image


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, (int, float)) or not low <= value <= high or value != int(value):
        raise ValueError(f"{name}: a whole number from {low} to {high} is accepted, not {value!r}")
    return int(value)


# --- from the arguments to a searcher ---------------------------------------------------------------------------------


def check(options: ServeArguments) -> None:
    """Check what can be checked before the model is loaded.

    Raises:
        UsageError: what is missing or wrong.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError("the search page needs Gradio: pip install aliblip[serve]")
    for name in ("model_name_or_path", "gallery"):
        given = getattr(options, name)
        if not given:
            raise UsageError(f"--{name} is missing (or the variable {_variable(name)}); see --help")
        is_name = r"[\w-][\w.-]*/[\w.-]+" if name == "gallery" else r"[\w-][\w.-]*(/[\w.-]+)?"
        if not os.path.exists(given) and not re.fullmatch(is_name, given):
            raise UsageError(f"--{name}: {given} does not exist: give a folder or a Hub name")
    check_range(
        top_k=(options.top_k, 1, MAX_TOP_K),
        rerank=(options.rerank, 0, MAX_RERANK),
        fusion_weight=(options.fusion_weight, 0, None),
        server_port=(options.server_port, 1, 65535),
        max_upload_mb=(options.max_upload_mb, 1, 512),
    )
    if os.path.isfile(options.gallery):
        raise UsageError(f"--gallery: {options.gallery} is a file: give a folder of photos or of a gallery")
    if options.photo_root is not None and not os.path.isdir(options.photo_root):
        raise UsageError(f"--photo_root: the folder {options.photo_root} does not exist")
    if options.gallery_dir is not None and is_gallery(options.gallery):
        raise UsageError(
            f"--gallery_dir: {options.gallery} is a gallery already, there is nothing to build: leave it out"
        )


def is_gallery(name: str) -> bool:
    """Whether it is a gallery (or the beginning of one) rather than photos; what is no folder is one of the Hub."""
    return not os.path.isdir(name) or any((Path(name) / file).exists() for file in ("gallery.json", "gallery.build"))


def open_searcher(options: ServeArguments) -> Searcher:
    """Load the model, and load or build the gallery.

    Raises:
        UsageError: what is wrong, in one line.
    """
    check(options)
    try:
        source = None
        if is_gallery(options.gallery):
            gallery = Gallery.load(options.gallery, photo_root=options.photo_root)
        else:
            source = open_source(data_dir=options.gallery, split=options.split_name, any_split=True, sides="images")
            tell_data(source)
            require_usable_row(source)
        model, processor, _ = load_pretrained(options.model_name_or_path, tokenizer_name=options.tokenizer_name)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pipe = AliBlipImageTextRetrievalPipeline(
            model=model.to(device), processor=processor, device=device, fusion_weight=options.fusion_weight
        )
        if source is None:
            return Searcher(pipe, gallery)
        items = SourceItems(source)
        return Searcher(pipe, load_or_build(pipe, items, options), items.photo_of)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(first_line(error)) from error


def load_or_build(pipe: AliBlipImageTextRetrievalPipeline, items: SourceItems, options: ServeArguments) -> Gallery:
    """The gallery in --gallery_dir, or one of the items, which is then kept there. A killed start goes on.

    Raises:
        ValueError: the folder holds something else, or a gallery of other photos.
    """
    folder = options.gallery_dir
    if folder is None or not (Path(folder) / "gallery.json").exists():
        return Gallery.build(pipe.model, pipe.processor, items, folder, store_tokens=options.store_tokens)
    gallery = Gallery.load(folder)
    kept, here = {*gallery.ids, *(entry["id"] for entry in gallery.skipped)}, set(items.positions)
    if kept == here:
        return gallery
    new, gone = sorted(here - kept, key=str), sorted(kept - here, key=str)
    change = f"{len(new)} photos are new, {len(gone)} are gone"
    if not options.update_gallery:
        raise UsageError(
            f"--gallery_dir: {folder} was built of other photos than {options.gallery} holds now ({change}): "
            "--update_gallery embeds the new ones and drops the others; or remove it, or give a new folder"
        )
    print(f"updating {folder}: {change}", flush=True)
    if new:
        gallery.add(pipe.model, pipe.processor, [items[items.positions[value]] for value in new])
    gallery.skipped = [entry for entry in gallery.skipped if entry["id"] in here]
    if gone := set(gone) & set(gallery.ids):
        gallery.remove(gone)
    gallery.save(folder)
    return gallery


# --- the page ---------------------------------------------------------------------------------------------------------


def build(**options: Any):
    """The page as Gradio `Blocks`; `launch()` starts it.

    Args:
        options: the fields of `ServeArguments`. What is not given is read from variables of the environment, such as
            ALIBLIP_GALLERY for `gallery`.

    Raises:
        UsageError: what is wrong, in one line.
    """
    options = from_environment(ServeArguments(**options))
    return page(open_searcher(options), options)


def _variable(name: str) -> str:
    return f"ALIBLIP_{name.upper()}"


def from_environment(options: ServeArguments) -> ServeArguments:
    """The options, and from the environment's variables those that have no other value than the default."""
    found = {}
    for field in dataclasses.fields(options):
        value = os.environ.get(_variable(field.name))
        if value and getattr(options, field.name) == field.default:
            found[field.name] = value
    (parsed,) = parse([ServeArguments], [f"--{name}={value}" for name, value in found.items()])
    return dataclasses.replace(options, **{name: getattr(parsed, name) for name in found})


def page(searcher: Searcher, options: ServeArguments):
    """The page of a searcher."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr
    from starlette.middleware import Middleware

    async def no_address(file: Any) -> str:
        if "://" in str(file):
            raise gr.Error("Send the photo itself, not its address", print_exception=False)
        return file  # Gradio has made sure that it is an upload

    def show(search: Callable, *given) -> tuple[str, list, list]:
        """What the page shows for a search: a message, and pictures and table, or none after a mistake."""
        try:
            results = search(*given)
        except ValueError as error:
            return f"### {error}", [], []
        return "", *shown(searcher, results)

    def answer(search: Callable, *given) -> list[dict]:
        """What a program gets. The paths of photos stay here."""
        try:
            return [{name: result[name] for name in _COLUMNS} for result in search(*given)]
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def search_by_title(title, top_k, rerank):
        """Photos of the gallery for a title, best first, re-ranked among the `rerank` most similar (0: not at all)."""
        return answer(searcher.by_title, title, top_k, rerank)

    def search_by_photo(photo, top_k):
        """The most similar photos of the gallery, best first."""
        return answer(searcher.by_photo, photo, top_k)

    with gr.Blocks(title="Photo search", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as blocks:
        gr.Markdown(f"# Photo search\nType a title or drop a photo to search {len(searcher.gallery):,} photos.")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                with gr.Tab("By title"):
                    title = gr.Textbox(label="Title", placeholder="striped blue mug", max_length=10_000, autofocus=True)
                    title_button = gr.Button("Search", variant="primary")
                    if found := example_titles(searcher.gallery):
                        gr.Examples(found, title, label="Examples", api_visibility="private")
                with gr.Tab("By photo"):
                    photo = gr.Image(
                        label="Photo", type="filepath", sources=["upload", "clipboard"], height=280, buttons=[]
                    )
                    # Gradio would open the file, or fetch one, without limits and with tracebacks. (Not by a class of
                    # our own: Gradio writes a .pyi file beside the code of each.)
                    photo.preprocess = lambda upload: upload and upload.path
                    photo.async_move_resource_to_block_cache = no_address
                    photo_button = gr.Button("Search", variant="primary")
                with gr.Accordion("Settings", open=False):
                    top_k = gr.Slider(1, MAX_TOP_K, options.top_k, step=1, label="Results")
                    rerank = gr.Slider(
                        0,
                        MAX_RERANK,
                        options.rerank,
                        step=1,
                        label="Re-ranked candidates",
                        info="ITM looks at so many of the most similar photos together with the title. 0: ITC alone.",
                    )
            with gr.Column(scale=3):
                message = gr.Markdown()
                pictures = gr.Gallery(
                    label="Photos",
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    format="jpeg",
                    buttons=["fullscreen"],
                )
                table = gr.Dataframe(
                    headers=["rank", "photo", "ITC similarity", "ITM logit", "match probability", "score"],
                    datatype=["number", "str", "number", "number", "number", "number"],
                    label="Scores",
                    interactive=False,
                    wrap=True,
                )
                gr.Markdown(
                    "ITC: cosine similarity of photo and query. Match: the probability, by ITM, that photo and title "
                    "belong together. Photos are ordered by ITM logit + ITC, or by ITC where nothing is re-ranked."
                )
        to_page = {"outputs": [message, pictures, table], "api_visibility": "private"}
        by_title, by_photo = functools.partial(show, searcher.by_title), functools.partial(show, searcher.by_photo)
        gr.on([title.submit, title_button.click], by_title, [title, top_k, rerank], **to_page)
        gr.on([photo.upload, photo_button.click], by_photo, [photo, top_k], **to_page)
        # The same searches for programs, hidden in the page.
        call, answered = gr.Button(visible=False), gr.JSON(visible=False)
        call.click(search_by_title, [title, top_k, rerank], answered, api_name="search_by_title")
        call.click(search_by_photo, [photo, top_k], answered, api_name="search_by_photo")

    blocks.queue(max_size=WAITING_SEARCHES, default_concurrency_limit=SEARCHES_AT_ONCE)
    system_fonts = ["system-ui", "sans-serif"]  # Gradio's own come from a server
    blocks.launch = functools.partial(
        blocks.launch,
        share=False,
        max_file_size=options.max_upload_mb * 2**20,
        theme=gr.themes.Default(font=system_fonts, font_mono=["ui-monospace", "monospace"]),
        css=".caption-label { max-width: 100% !important; white-space: normal !important; }",  # whole captions
        footer_links=["api"],
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(NamelessUploads)]},
    )
    return blocks


def shown(searcher: Searcher, results: list[dict]) -> tuple[list, list]:
    """Results as the page's pictures with captions, and as the rows of its table."""
    pictures, rows = [], []
    for rank, result in enumerate(results, 1):
        caption = f"{rank}. {result['id']}  ITC {result['itc']:.2f}"
        if result["itm_probability"] is not None:
            caption += f"  match {100 * result['itm_probability']:.0f} %"
        pictures.append((searcher.picture(result), caption))
        numbers = [result[name] for name in ("itc", "itm_logit", "itm_probability", "score")]
        rows.append([rank, str(result["id"]), *(None if number is None else round(number, 4) for number in numbers)])
    return pictures, rows


def example_titles(gallery: Gallery) -> list[str]:
    """Titles to try, of photos whose names are words: "striped_blue_mug.jpg"; none where names are numbers."""
    titles = {}
    for position in range(min(len(gallery), 200)):
        stem = os.path.splitext(os.path.basename(str(gallery.item(position)["id"])))[0]
        words = re.findall(r"[^\W_]+", stem)
        if len(words) > 1 and all(word.isalpha() for word in words):
            titles[" ".join(words)] = None
    return list(titles)[:EXAMPLES]


class NamelessUploads:
    """ASGI middleware: an upload is called photo.jpg (or as it ends), whatever its sender calls it, before Gradio gives
    its temporary file that name. Every file of a request, and without holding any of them in memory."""

    def __init__(self, app: Callable):
        self._app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload"):
            kind = dict(scope["headers"]).get(b"content-type", b"")
            if (boundary := re.search(rb'(?i)boundary="?([^";]+)', kind)) is not None:
                receive = self._renamed(receive, b"--" + boundary[1].strip())
        await self._app(scope, receive, send)

    @staticmethod
    def _renamed(receive: Callable, boundary: bytes) -> Callable:
        held, is_head = b"", False  # what can't be judged yet, and whether it belongs to the headers of a part

        async def wrapped() -> dict:
            nonlocal held, is_head
            message = await receive()
            if message["type"] != "http.request":
                return message
            held, ready = held + message.get("body", b""), []
            while True:
                mark = b"\r\n\r\n" if is_head else boundary
                end = held.find(mark)
                size = end + len(mark) if end >= 0 else len(held)
                if end < 0 and message.get("more_body"):
                    # Nothing of a head passes before its end, and of a file not what may be a boundary's beginning.
                    size = 0 if is_head else max(0, len(held) - len(mark) + 1)
                piece, held = held[:size], held[size:]
                ready.append(_FILE_NAME.sub(_nameless, piece) if is_head else piece)
                if end < 0:
                    break
                is_head = not is_head
            if len(held) > MAX_HEAD_BYTES:
                held = b""  # no head of a browser or client: what is left of it is refused by the parser
            return {**message, "body": b"".join(ready)}

        return wrapped


# More than the headers of any file of a form.
MAX_HEAD_BYTES = 2**16
_FILE_NAME = re.compile(rb'filename\*?=("(?:[^"\\]|\\.)*"?|[^;\r\n]*)')


def _nameless(match: re.Match) -> bytes:
    suffix = match[1].rstrip(b'"').rpartition(b".")[2].lower().decode("latin-1")
    return f'filename="photo{"." + suffix if suffix in _UPLOAD_SUFFIXES else ""}"'.encode()


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> int:
    (options,) = parse([ServeArguments], description=__doc__)
    options = from_environment(options)
    searcher = open_searcher(options)
    print(f"{searcher.gallery!r}; {len(searcher.gallery.skipped)} photos could not be read", flush=True)
    try:
        page(searcher, options).launch(server_name=options.server_name, server_port=options.server_port)
    except OSError as error:  # a port that is taken, a name that is not ours
        raise UsageError(
            f"can't start the server ({first_line(error).split('. ')[0]}): give another --server_port or --server_name"
        ) from error
    return 0


__all__ = ["Searcher", "build", "open_searcher", "page"]

if __name__ == "__main__":
    main_with_usage_errors("aliblip.serve", main)
