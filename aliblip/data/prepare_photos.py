"""A photo on its way into a prepared catalogue: decoded once, checked, made smaller if it is larger than asked.

photo = prepare_photo(data, max_side=512)
photo.data, photo.width, photo.height, photo.digest, photo.thumb
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

from PIL import Image

from reading_aliblip import read_photo

__all__ = ["QUALITY", "THUMB_SIDE", "PreparedPhoto", "prepare_photo"]

# Of the small copy by which photos are compared; see `aliblip.data.duplicates`.
THUMB_SIDE = 48
QUALITY = 90


@dataclass(frozen=True)
class PreparedPhoto:
    """What is kept of a photo.

    Attributes:
        data: its file: as it was, byte for byte, or a smaller JPEG.
        width, height: of `data` in pixels, as a person sees it.
        size: bytes of the file as it was.
        digest: 16 bytes of BLAKE2 of the file as it was: equal for equal files.
        thumb: (`THUMB_SIDE`, `THUMB_SIDE`, 3) uint8 as bytes, the whole photo whatever its shape.
    """

    data: bytes
    width: int
    height: int
    size: int
    digest: bytes
    thumb: bytes


def prepare_photo(data: bytes, max_side: int | None = None, quality: int = QUALITY) -> PreparedPhoto:
    """Decode and check a photo, and make it smaller.

    Args:
        data: its file.
        max_side: longest side in pixels; None keeps every photo as it is.
        quality: of the JPEG that a smaller photo becomes.

    Raises:
        UnusableItem: with a plain reason.
    """
    image = read_photo(data)
    kept = data
    if max_side is not None and max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        kept = stream.getvalue()
    thumb = image.resize((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return PreparedPhoto(kept, image.width, image.height, len(data), digest, thumb.tobytes())
