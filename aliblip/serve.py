"""Search your photos in a web page: type a title or drop a photo, see the best photos with their scores.

    python -m aliblip.serve --model_name_or_path MODEL --gallery my_gallery
    python -m aliblip.serve --model_name_or_path MODEL --gallery my_photos --gallery_dir my_gallery

`--gallery` is what `python -m aliblip.gallery` wrote (a folder, s3://..., or a Hub name); or a folder of photos (or
Parquet files, tars, an image folder with metadata), embedded at the start and kept in `--gallery_dir`, from where the
next start opens it. As a Space, the whole `app.py`, with the settings as variables of the Space,
ALIBLIP_MODEL_NAME_OR_PATH, ALIBLIP_GALLERY and so on:

    from aliblip.serve import build
    build().launch()

The page's API, from another program:

    client = gradio_client.Client("http://127.0.0.1:7860")
    client.predict("striped blue mug", 5, 64, api_name="/search_by_title")
    client.predict("striped blue mug", 5, 64, {"category": "mug", "price": {"max": 50}}, api_name="/search_by_title")
    client.predict(gradio_client.handle_file("mug.jpg"), 5, api_name="/search_by_photo")

All return a list of {"id", "score", "itc", "itm_logit", "itm_probability", "columns"}, best first: what the pipeline of
`pipeline_aliblip` finds, with the columns that the page shows and without the paths of this machine. Titles are
re-ranked by ITM; photos are compared with photos by ITC alone.

The page needs no internet and reports nothing to anybody. Visitors get thumbnails of what they found, never a file.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.util
import os
import re
import socket
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from aliblip.data.products import tell_sources
from aliblip.data.sources import ALL, open_source, require_usable_row
from aliblip.models.loading import load_pretrained
from aliblip.retrieval.galleries import Gallery
from aliblip.retrieval.page_filters import Filter
from aliblip.retrieval.page_gallery import is_gallery, kept_gallery
from aliblip.retrieval.page_layout import page
from aliblip.retrieval.page_search import MAX_RERANK, MAX_TOP_K, Searcher
from aliblip.retrieval.tables import is_address, library
from aliblip.runtime.arguments import check_range, json_mapping, option, parse
from aliblip.runtime.installation import install_hint
from aliblip.runtime.mistakes import UsageError, first_line, main_with_usage_errors, usage_errors
from pipeline_aliblip import AliBlipImageTextRetrievalPipeline


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
        "What to search (required): a gallery (a folder, s3://..., a Hub name); or a folder of photos, Parquet files "
        "or tars, embedded at the start.",
    )
    split_name: str = option("train", "Split to search, where the photos' folder has several.")
    gallery_dir: str | None = option(
        None, "Folder to keep the gallery of the embedded photos in, for the next start (default: embedded each time)."
    )
    update_gallery: bool = option(
        False, "Embed the photos that are new since --gallery_dir was built, and drop those that are gone."
    )
    store_tokens: bool = option(
        True,
        "Keep image tokens of the embedded photos, so that re-ranking is fast: 0.9 MB a photo with base at 384 px.",
    )
    id_column: str | None = option(
        None, "Column of the ids of the photos' data (default: id, else the names of files, else numbers of rows)."
    )
    fetch_photos: bool = option(
        False, "Fetch the photos that a table in the folder names by address (default: not fetched)."
    )
    storage_options: str | None = option(
        None, 'For a gallery at an address, a JSON object: {"region": "eu-central-1"} (default: the environment).'
    )
    photo_root: str | None = option(None, "Folder of the photos that a gallery names by relative paths.")
    show_columns: str | None = option(
        None,
        "Columns below each photo, separated by commas: title,price (default: the captions if there are any, else the "
        "id).",
    )
    filter_columns: str | None = option(
        None,
        "Columns to filter by, separated by commas: category,price (default: up to four with few values; none: no "
        "filters).",
    )
    top_k: int = option(12, "Results at first; the visitor may choose others.")
    rerank: int = option(64, "Candidates that ITM re-ranks at first; 0: ITC alone.")
    fusion_weight: float | None = option(
        None, "Weight of the ITC similarity beside the match logit (default: the model's, see --tune_fusion)."
    )
    max_upload_mb: int = option(20, "Largest photo that can be dropped, in MiB.")
    server_name: str | None = option(
        None,
        "Address to listen on; 0.0.0.0: everywhere (default: GRADIO_SERVER_NAME, or 127.0.0.1: this machine only).",
    )
    server_port: int | None = option(None, "Port (default: GRADIO_SERVER_PORT, or the first free one from 7860 on).")


# --- from the arguments to a searcher ---------------------------------------------------------------------------------


def check(options: ServeArguments) -> None:
    """Check what can be checked before the model is loaded.

    Raises:
        UsageError: what is missing or wrong.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError(f"the search page needs Gradio: {install_hint('serve')}")
    library()
    for name in ("model_name_or_path", "gallery"):
        given = getattr(options, name)
        if not given:
            raise UsageError(f"--{name} is missing (or the variable {_variable(name)}); see --help")
        is_name = r"[\w-][\w.-]*/[\w.-]+|\w+://.+" if name == "gallery" else r"[\w-][\w.-]*(/[\w.-]+)?"
        if not os.path.exists(given) and not re.fullmatch(is_name, given):
            raise UsageError(f"--{name}: {given} does not exist: give a folder or a Hub name")
    check_range(
        top_k=(options.top_k, 1, MAX_TOP_K),
        rerank=(options.rerank, 0, MAX_RERANK),
        fusion_weight=(options.fusion_weight, 0, None),
        server_port=(options.server_port, 1, 65535),
        max_upload_mb=(options.max_upload_mb, 1, 512),
    )
    _check_gallery(options)


def check_address(options: ServeArguments) -> None:
    """Whether the page can listen where it is to, before a model is loaded for it.

    Raises:
        UsageError: the port is taken, or the name is not one of this machine.
    """
    name = options.server_name or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    told = f"can't start the server on {name} ({{}}): give another --server_port or --server_name"
    with usage_errors(OSError, told=told):
        family, kind, _, _, address = socket.getaddrinfo(name, options.server_port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)


def _check_gallery(options: ServeArguments) -> None:
    """Flags that do not belong to what --gallery is."""
    if os.path.isfile(options.gallery):
        raise UsageError(f"--gallery: {options.gallery} is a file: give a folder of photos or of a gallery")
    if options.photo_root is not None and not os.path.isdir(options.photo_root):
        raise UsageError(f"--photo_root: the folder {options.photo_root} does not exist")
    json_mapping("storage_options", options.storage_options)
    if options.storage_options is not None and not is_address(options.gallery):
        raise UsageError("--storage_options belong to a gallery at an address, such as s3://...: leave them out")
    if is_gallery(options.gallery):
        for name in ("gallery_dir", "id_column", "update_gallery", "fetch_photos"):
            if getattr(options, name):
                raise UsageError(
                    f"--{name}: {options.gallery} is a gallery already, there is nothing to build: leave it out"
                )
        return
    if options.photo_root is not None:
        raise UsageError(f"--photo_root is for a gallery, and {options.gallery} holds photos: leave it out")
    if options.update_gallery and options.gallery_dir is None:
        raise UsageError("--update_gallery updates the gallery in --gallery_dir: give that folder too")
    if options.gallery_dir is not None and is_address(options.gallery_dir):
        raise UsageError(
            f"--gallery_dir is the address {options.gallery_dir}: give a folder, or build the gallery there with "
            "python -m aliblip.gallery --uri and give it as --gallery"
        )


def open_searcher(options: ServeArguments) -> Searcher:
    """Load the model, and open or build the gallery.

    Raises:
        UsageError: what is wrong, in one line.
    """
    check(options)
    source = gallery = None
    if is_gallery(options.gallery):
        storage = json_mapping("storage_options", options.storage_options) or None
        gallery = Gallery.open(options.gallery, photo_root=options.photo_root, storage_options=storage)
    else:
        source = open_source(
            data_dir=options.gallery,
            split=options.split_name,
            any_split=True,
            sides="images",
            other_columns=ALL,
            fetch_photos=options.fetch_photos,
        )
        tell_sources(source, products=False)
        require_usable_row(source)
    model, processor, _ = load_pretrained(options.model_name_or_path, tokenizer_name=options.tokenizer_name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = AliBlipImageTextRetrievalPipeline(model=model.to(device), processor=processor, device=device)
    if gallery is None:
        gallery = kept_gallery(
            source,
            options.gallery_dir or _folder_until_the_end(),
            model=pipe.model,
            processor=processor,
            id_column=options.id_column,
            store_tokens=options.store_tokens,
            update=options.update_gallery,
        )
    searcher = Searcher(
        pipe,
        gallery,
        show_columns=listed(options.show_columns),
        filter_columns=listed(options.filter_columns),
        fusion_weight=options.fusion_weight,
    )
    tell(searcher, options)
    return searcher


def listed(text: str | None) -> list[str] | None:
    """Names separated by commas; "none": no name; None: not given."""
    if text is None:
        return None
    return [] if text.strip() == "none" else [name.strip() for name in text.split(",") if name.strip()]


def _folder_until_the_end() -> str:
    """A folder that goes when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="aliblip-page-")
    atexit.register(folder.cleanup)
    return folder.name


def tell(searcher: Searcher, options: ServeArguments) -> None:
    """Say what will be searched, shown and filtered by, and what will be missing."""
    gallery = searcher.gallery
    skipped = len(gallery.skipped)
    print(f"{gallery!r}" + (f"; unusable photos, left out: {skipped:,}" if skipped else ""))
    filters = ", ".join(f"{one.column} ({_choices_told(one)})" for one in searcher.filters)
    print(f"below the photos: {', '.join(searcher.show_columns) or 'the id'}; filters: {filters or 'none'}")
    reason = searcher.unreadable()
    if reason is not None:
        or_folder = "" if "neither" in reason else ", or give the folder of its photos as --photo_root"
        no_match = "" if gallery.has_tokens or not options.rerank else " Nor can titles be re-ranked without them."
        print(
            f"note: the photos of this gallery can't be shown: {reason}. Build it with thumbnails (python -m "
            f"aliblip.gallery --thumbnails 384, thumbnails=True in Python){or_folder}.{no_match}"
        )
    print(end="", flush=True)


def _choices_told(one: Filter) -> str:
    return "from, to" if one.choices is None else f"{len(one.choices)} values"


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
    return drawn(open_searcher(options), options)


def drawn(searcher: Searcher, options: ServeArguments):
    """The page of a searcher, with the settings of the arguments."""
    return page(searcher, top_k=options.top_k, rerank=options.rerank, max_upload_mb=options.max_upload_mb)


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


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> int:
    (options,) = parse([ServeArguments], description=__doc__)
    options = from_environment(options)
    check(options)
    check_address(options)
    searcher = open_searcher(options)
    blocks = drawn(searcher, options)
    try:
        # Gradio's own lines propose what is no flag here.
        blocks.launch(
            server_name=options.server_name, server_port=options.server_port, quiet=True, prevent_thread_lock=True
        )
    except OSError as error:  # a port that is taken, a name that is not ours; then Gradio tells of its own settings
        told = first_line(error).split(". ")[0]
        raise UsageError(f"can't start the server ({told}): give another --server_port or --server_name") from error
    print(f"Running on {blocks.local_url} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()
    return 0


__all__ = ["ServeArguments", "build", "open_searcher"]

if __name__ == "__main__":
    main_with_usage_errors("aliblip.serve", main)
