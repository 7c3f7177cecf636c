"""A folder of real product photos with titles, which belong to others and are no part of the project: tests that use
them read them where `ALIBLIP_PRODUCTS_DIR` says, and skip without it.

`train` and `validation` hold photos and a `metadata.jsonl` each, as `load_dataset("imagefolder", ...)` reads them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PRODUCTS = Path(os.environ.get("ALIBLIP_PRODUCTS_DIR", Path(__file__).resolve().parents[2] / "shared" / "products"))
needs_products = pytest.mark.skipif(
    not PRODUCTS.is_dir(), reason=f"no product photos at {PRODUCTS} (ALIBLIP_PRODUCTS_DIR)"
)
