"""What the tests of galleries share: a model, photos, rows with columns, and tables of vectors without a model."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import tiny
import torch

from aliblip import Gallery

COUNT, BROKEN = 21, 5
UNITS = {"unit_size": 4, "batch_size": 2, "num_workers": 0}
WIDTH = 16


@functools.cache
def model_and_processor(seed: int = 0):
    return tiny.spread_model(seed=seed), tiny.processor()


def photos(folder: Path) -> list[str]:
    """Paths of photos, of which one is none."""
    made = tiny.photos(folder, COUNT)
    Path(made[BROKEN]).write_bytes(b"not a picture")
    return made


def rows_of(paths: list[str]) -> list[dict]:
    """Rows with columns of many types."""
    return [
        {
            "id": f"sku-{number}",
            "image": path,
            "price": number * 1.5,
            "category": ("mug", "cup", "lamp")[number % 3],
            "stock": number if number % 4 else None,
            "tags": ["a", str(number)],
            "size": {"width": number, "unit": "cm"},
        }
        for number, path in enumerate(paths)
    ]


def build(rows, place, seed: int = 0, **options) -> Gallery:
    model, processor = model_and_processor(seed)
    return Gallery.build(rows, place, model=model, processor=processor, **{**UNITS, **options})


def unit_vectors(count: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def vector_table(vectors: torch.Tensor, ids=None, **columns) -> pa.Table:
    """Rows that are embedded already."""
    flat = pa.array(vectors.float().numpy().reshape(-1))
    vector = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    ids = [f"item {number}" for number in range(len(vectors))] if ids is None else ids
    return pa.table({"id": ids, **columns, "vector": vector})


def all_vectors(gallery: Gallery) -> dict:
    """Vector by id, in the order of the table."""
    table = gallery._now().dataset.to_table(columns=["id", "vector"])
    return dict(zip(table["id"].to_pylist(), np.array(table["vector"].to_pylist(), dtype=np.float32), strict=True))


def ids_of(gallery: Gallery) -> list:
    return list(all_vectors(gallery))


def by_hand(vectors: dict, positions: dict, query: np.ndarray, k: int) -> list:
    """The slow, obvious search: ids by falling score, then by position."""
    scores = {key: float(np.dot(vector.astype(np.float64), query)) for key, vector in vectors.items()}
    return sorted(scores, key=lambda key: (-round(scores[key], 6), positions[key]))[:k]


def sys_executable() -> str:
    return sys.executable
