"""Building a gallery with several processes: each embeds its share, the main process joins them.

    gallery = build_gallery(model, processor, items, "my_gallery", store_tokens=True)   # on every process

What is computed together never depends on the number of processes, and a build that was killed goes on with another
number of them.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from aliblip.distributed import all_gather_objects, is_main, rank, world_size
from gallery_aliblip import Gallery, begin_units, encode_units, join_units

__all__ = ["build_gallery"]


def build_gallery(
    model,
    processor,
    items: Iterable,
    folder: str | Path,
    *,
    measure_recall: int = 0,
    overwrite: bool = False,
    **options,
) -> Gallery:
    """`Gallery.build` as a collective: every rank calls it with the same arguments, and gets the gallery.

    Args:
        model: the plain model (unwrapped), with the weights of every rank equal.
        items: as in `Gallery.build`; a generator is read by every rank.
        folder: one that all processes see.

    Raises:
        ValueError, OSError: as in `Gallery.build`.
        RuntimeError: another rank has failed; the message says which and why.
    """
    options.setdefault("progress", is_main())
    _together(is_main(), lambda: begin_units(model, processor, items, folder, overwrite=overwrite, **options))
    _together(
        True,
        lambda: encode_units(model, processor, items, folder, rank=rank(), world_size=world_size(), **options),
    )
    _together(is_main(), lambda: join_units(folder, measure_recall=measure_recall))
    return Gallery.load(folder)


def _together(takes_part: bool, step: Callable[[], None]) -> None:
    """Do a step on the ranks that take part. If it fails on any, all of them raise, so that none waits for ever."""
    error = None
    if takes_part:
        try:
            step()
        except Exception as raised:
            error = raised
    # As text, since not every exception can be sent.
    messages = all_gather_objects(None if error is None else f"{type(error).__name__}: {error}")  # collective
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"rank {number} could not build its part of the gallery: {message}")
