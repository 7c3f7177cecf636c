"""The search page in Gradio: its parts, and what happens when a visitor asks.

    page(searcher, top_k=12, rerank=64, max_upload_mb=20).launch()

The page needs no internet and reports nothing to anybody.
"""

from __future__ import annotations

import functools
import io
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from aliblip.retrieval.page_filters import VisitorMistake
from aliblip.retrieval.page_search import MAX_RERANK, MAX_TOP_K, Found, Searcher
from aliblip.retrieval.page_tiles import CSS, examples_html, mistake_html, table_html, tiles_html
from aliblip.retrieval.page_uploads import NamelessUploads, OwnFilesOnly, uploaded

SEARCHES_AT_ONCE = 4
WAITING_SEARCHES = 100
# Uploads in Gradio's folder of temporary files: looked at, and removed, after so many seconds.
KEPT_SECONDS = 3600
FAILED = "The search failed. Whoever runs this page finds the reason in its log"

_HELP = (
    "ITC: cosine similarity of photo and query. Match: what ITM says, which looks at photo and title together, as a "
    "logit and as a probability. Photos are compared with photos by ITC alone."
)
# A click on an example is told to the server with its number. (By delegation: the buttons may be drawn again.)
_TELL_EXAMPLE = """element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-example]');
  if (button) trigger('click', {example: Number(button.dataset.example)});
});"""
# Wide windows have room for the filters; on a phone they would push the results out of sight.
_OPEN_WHERE_WIDE = "() => ({__type__: 'update', open: window.innerWidth >= 1000})"
_LAYOUT_CSS = """
.gradio-container { max-width: 1800px !important; }
#found { min-height: 40px; }
.html-container { padding: 0 !important; }
"""

logger = logging.getLogger(__name__)


def page(searcher: Searcher, *, top_k: int = 12, rerank: int = 64, max_upload_mb: int = 20):
    """The page of a searcher as Gradio `Blocks`; `launch()` starts it.

    Args:
        top_k, rerank: where the sliders stand at first.
        max_upload_mb: the largest photo, in MiB.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    with gr.Blocks(title="Photo search", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as blocks:
        _Page(gr, searcher, top_k, rerank).draw(blocks)
    return _served(gr, blocks, max_upload_mb)


def _served(gr: Any, blocks: Any, max_upload_mb: int) -> Any:
    """The blocks with the limits of the page in their `launch`."""
    from starlette.middleware import Middleware

    blocks.queue(max_size=WAITING_SEARCHES, default_concurrency_limit=SEARCHES_AT_ONCE)
    system_fonts = ["system-ui", "sans-serif"]  # Gradio's own come from a server
    blocks.launch = functools.partial(
        blocks.launch,
        share=False,
        max_file_size=max_upload_mb * 2**20,
        theme=gr.themes.Default(font=system_fonts, font_mono=["ui-monospace", "monospace"]),
        css=CSS + _LAYOUT_CSS,
        footer_links=["api"],
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(NamelessUploads), Middleware(OwnFilesOnly, folder=blocks.GRADIO_CACHE)]},
    )
    return blocks


class _Page:
    """The parts of the page, and the functions that Gradio calls."""

    def __init__(self, gr: Any, searcher: Searcher, top_k: int, rerank: int):
        self._gr, self._searcher = gr, searcher
        self._examples = searcher.examples()
        self._top_k, self._rerank = top_k, rerank

    def draw(self, blocks: Any) -> None:
        gr, private = self._gr, {"api_visibility": "private"}
        heading = gr.Markdown(self._heading())
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                with gr.Tabs() as tabs:
                    with gr.Tab("By title", id="title"):
                        title = gr.Textbox(
                            label="Title", placeholder="striped blue mug", max_length=10_000, autofocus=True
                        )
                        title_button = gr.Button("Search", variant="primary")
                    with gr.Tab("By photo", id="photo"):
                        photo = self._photo_input()
                        photo_button = gr.Button("Search", variant="primary")
                filters, filter_box = self._filter_inputs()
                with gr.Accordion("Settings", open=False):
                    top_k = gr.Slider(1, MAX_TOP_K, self._top_k, step=1, label="Results")
                    rerank = gr.Slider(
                        0,
                        MAX_RERANK,
                        self._rerank,
                        step=1,
                        label="Re-ranked candidates",
                        info="ITM looks at so many of the most similar photos together with the title. 0: ITC alone.",
                    )
            with gr.Column(scale=3, min_width=480):
                found = gr.HTML(elem_id="found", apply_default_css=False)
                with gr.Accordion("All scores", open=False, visible=False) as scores_box:
                    scores = gr.HTML(apply_default_css=False)
                    gr.Markdown(_HELP)
                examples = gr.HTML(
                    examples_html(self._examples) if self._examples else "",
                    visible=bool(self._examples),
                    js_on_load=_TELL_EXAMPLE,
                    apply_default_css=False,
                )
        asked = gr.State()  # what the results on the page are of: "title", "photo", or nothing yet
        outputs = [found, scores, scores_box, asked]
        by_title, by_photo = [title, top_k, rerank, *filters], [photo, top_k, *filters]
        to_page = {"outputs": outputs, **private}
        gr.on([title.submit, title_button.click], self._show_by_title, by_title, **to_page)
        gr.on([photo.upload, photo_button.click], self._show_by_photo, by_photo, **to_page)
        changes = [part.input if isinstance(part, gr.Dropdown) else part.submit for part in filters]
        if changes:
            again = [asked, title, photo, top_k, rerank, *filters]
            gr.on(changes, self._show_again, again, trigger_mode="always_last", **to_page)

        def show_example(event, top_k, rerank, *filters):
            return self._show_example(event, top_k, rerank, *filters)

        show_example.__annotations__["event"] = gr.EventData  # by which Gradio knows what to give
        examples.click(show_example, [top_k, rerank, *filters], outputs=[tabs, title, photo, *outputs], **private)
        choices = [part for part in filters if isinstance(part, gr.Dropdown)]
        blocks.load(self._refresh, outputs=[heading, *choices], **private)
        if filter_box is not None:
            blocks.load(None, outputs=[filter_box], js=_OPEN_WHERE_WIDE, **private)
        self._draw_api(title, photo, top_k, rerank)

    def _photo_input(self) -> Any:
        gr = self._gr
        photo = gr.Image(label="Photo", type="filepath", sources=["upload", "clipboard"], height=200, buttons=[])
        folder = photo.GRADIO_CACHE

        def path_of(upload: Any) -> str | None:
            try:
                return uploaded(upload and upload.path, folder)
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from None

        async def kept(file: Any) -> str:
            if "://" in str(file):
                raise gr.Error("Send the photo itself, not its address", print_exception=False)
            photo.temp_files.add(str(file))
            return file

        # Gradio would open the file, or fetch one, without limits and with tracebacks. (Not by a class of our own:
        # Gradio writes a .pyi file beside the code of each.)
        photo.preprocess = path_of
        photo.async_move_resource_to_block_cache = kept
        return photo

    def _filter_inputs(self) -> tuple[list, Any]:
        """The inputs in the order of the searcher's filters, two for bounds; and the box around them."""
        gr, filters = self._gr, self._searcher.filters
        if not filters:
            return [], None
        parts = []
        with gr.Accordion(f"Filters: {', '.join(one.column for one in filters)}", open=False) as box:
            for one in filters:
                if one.choices is not None:
                    parts.append(gr.Dropdown(list(one.choices), multiselect=True, label=one.column, value=[]))
                    continue
                with gr.Row():  # of texts: Gradio's numbers can't be empty
                    for word in ("from", "to"):
                        parts.append(gr.Textbox(label=f"{one.column} {word}", placeholder="any", min_width=100))
        return parts, box

    def _draw_api(self, title: Any, photo: Any, top_k: Any, rerank: Any) -> None:
        """The same searches for programs, hidden in the page."""
        gr = self._gr
        call, answered, filters = gr.Button(visible=False), gr.JSON(visible=False), gr.JSON(visible=False)
        call.click(self.search_by_title, [title, top_k, rerank, filters], answered, api_name="search_by_title")
        call.click(self.search_by_photo, [photo, top_k, filters], answered, api_name="search_by_photo")

    # for programs

    def search_by_title(self, title, top_k, rerank, filters=None):
        """Photos of the gallery for a title, best first, re-ranked among the `rerank` most similar (0: not at all).
        `filters`: by column a value, a list of values or {"min": ..., "max": ...}."""
        return self._answer(self._searcher.by_title, title, top_k, rerank, filters)

    def search_by_photo(self, photo, top_k, filters=None):
        """The most similar photos of the gallery, best first. `filters` as for titles."""
        return self._answer(self._searcher.by_photo, photo, top_k, filters)

    def _answer(self, search: Callable[..., Found], *given: Any) -> list[dict]:
        try:
            return self._searcher.answer(search(*given))
        except VisitorMistake as error:
            message = str(error)
        except Exception:
            logger.exception("a search failed")
            message = FAILED
        raise self._gr.Error(message, print_exception=False)

    # for the page

    def _show_by_title(self, title, top_k, rerank, *filters) -> list:
        return [*self._show(self._searcher.by_title, title, top_k, rerank, self._chosen(filters)), "title"]

    def _show_by_photo(self, photo, top_k, *filters) -> list:
        return [*self._show(self._searcher.by_photo, photo, top_k, self._chosen(filters)), "photo"]

    def _show_again(self, asked, title, photo, top_k, rerank, *filters) -> list:
        """The last search with other filters."""
        if asked == "title":
            return self._show_by_title(title, top_k, rerank, *filters)
        return self._show_by_photo(photo, top_k, *filters) if asked == "photo" else [self._gr.skip()] * 4

    def _show_example(self, event, top_k, rerank, *filters) -> list:
        example = self._example(event)
        if example is None:
            return [self._gr.skip()] * 7
        if isinstance(example, str):
            shown = self._show_by_title(example, top_k, rerank, *filters)
            return [self._gr.Tabs(selected="title"), example, self._gr.skip(), *shown]
        picture = Image.open(io.BytesIO(example))
        shown = self._show_by_photo(picture, top_k, *filters)
        return [self._gr.Tabs(selected="photo"), self._gr.skip(), picture, *shown]

    def _example(self, event: Any) -> str | bytes | None:
        """The example that was clicked; None: a click elsewhere, or a number that a visitor made up."""
        number = getattr(event, "_data", None) or {}
        number = number.get("example") if isinstance(number, dict) else None
        is_one = isinstance(number, int) and 0 <= number < len(self._examples)
        return self._examples[number] if is_one else None

    def _show(self, search: Callable[..., Found], *given: Any) -> list:
        """What the page shows for a search: tiles, a table and its box; or what went wrong, in words."""
        gr, searcher = self._gr, self._searcher
        try:
            found = search(*given)
            shown = tiles_html(searcher.heading(found), searcher.tiles(found))
            return [shown, table_html(*searcher.table(found)), gr.Accordion(visible=bool(found.results))]
        except VisitorMistake as error:
            message = str(error)
        except Exception:
            logger.exception("a search failed")
            message = FAILED
        return [mistake_html(message), "", gr.Accordion(visible=False)]

    def _chosen(self, given: Sequence[Any]) -> dict[str, Any]:
        """What the filters' inputs hold, by column."""
        left = iter(given)
        return {
            one.column: next(left) if one.choices is not None else (next(left), next(left))
            for one in self._searcher.filters
        }

    def _heading(self) -> str:
        return f"# Photo search\nSearch {len(self._searcher.current()):,} photos by title or by photo."

    def _refresh(self) -> list:
        """What a page that is opened now tells of the gallery, which others may have changed."""
        return [self._heading(), *(self._gr.Dropdown(choices=list(found)) for found in self._searcher.choices())]


__all__ = ["page"]
