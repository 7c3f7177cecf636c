"""Recordings of the published training code: where they lie, and how one becomes small enough to be committed.

`tests/reference/one_rank` is in every clone. `ALIBLIP_REFERENCE_DIR` (default: `shared/reference` beside the
checkout) names a folder of whole recordings, which are used too. `tests/reference/README.md` says what the files hold.

    python tests/recordings.py WHOLE_RECORDING tests/reference/one_rank
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

COMMITTED = Path(__file__).resolve().parent / "reference"
WHOLE = Path(os.environ.get("ALIBLIP_REFERENCE_DIR", COMMITTED.parents[2] / "shared" / "reference"))
SAMPLED = 256  # elements of each of the larger final tensors
_TOWERS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")


def runs() -> list[Path]:
    """The folder of each recorded run: those of the repository, then the whole ones."""
    return [file.parent for folder in (COMMITTED, WHOLE) for file in sorted(folder.glob("*/expected.json"))]


def name_of(run: Path) -> str:
    return f"{run.name}-small" if run.parent == COMMITTED else run.name


def initial_state(run: Path) -> dict[str, Tensor]:
    """The original state dict before the first step."""
    state = load_file(run / "initial.safetensors")
    for name, value in list(state.items()):
        tower, _, rest = name.partition(".")
        if tower in _TOWERS:  # the momentum encoders start as copies
            state.setdefault(f"{tower}_m.{rest}", value)
    return state


def sample(tensor: Tensor) -> Tensor:
    """What the small recording keeps of a final tensor: a vector as it is, of a matrix evenly spaced elements."""
    if tensor.dim() < 2 or tensor.numel() <= 4 * SAMPLED:
        return tensor
    return tensor.flatten()[torch.linspace(0, tensor.numel() - 1, SAMPLED, dtype=torch.float64).long()]


def like(tensor: Tensor, recorded: Tensor) -> Tensor:
    """The elements of a tensor that were recorded."""
    return tensor if tensor.shape == recorded.shape else sample(tensor)


def make_small(whole: Path, small: Path) -> None:
    """Leave out of a recording what can be restored, and most elements of the final weights."""
    small.mkdir(parents=True)
    for name in ("expected.json", "vocab.txt", "batches.safetensors", "evaluation.safetensors"):
        shutil.copyfile(whole / name, small / name)
    state = load_file(whole / "initial.safetensors")
    kept = {
        name: value
        for name, value in state.items()
        if name.partition(".")[0].removesuffix("_m") == name.partition(".")[0]
    }
    save_file(kept, small / "initial.safetensors")
    restored = initial_state(small)
    assert restored.keys() == state.keys() and all(torch.equal(restored[name], state[name]) for name in state)
    final = load_file(whole / "final.safetensors")
    save_file({name: sample(value) for name, value in final.items()}, small / "final.safetensors")


if __name__ == "__main__":
    make_small(Path(sys.argv[1]), Path(sys.argv[2]))
