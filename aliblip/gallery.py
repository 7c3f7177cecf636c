"""Building a gallery with several processes: each embeds its share, the main process joins them.

    gallery = build_gallery(model, processor, items, "my_gallery", store_tokens=True)   # on every process

What is computed together never depends on the number of processes, and a build that was killed goes on with another
number of them.
"""

from collections.abc import Iterable
from pathlib import Path

from aliblip.distributed import is_main, rank, together, world_size
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
    part = "build its part of the gallery"
    together(is_main(), lambda: begin_units(model, processor, items, folder, overwrite=overwrite, **options), part)
    together(
        True,
        lambda: encode_units(model, processor, items, folder, rank=rank(), world_size=world_size(), **options),
        part,
    )
    together(is_main(), lambda: join_units(folder, measure_recall=measure_recall), part)
    return Gallery.load(folder)
