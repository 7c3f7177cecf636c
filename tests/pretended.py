"""A GPU that is only pretended, to count how often a step makes the host wait for it, and how many operators it takes.

    with PretendedDevice() as device:
        model.to("cuda:0")
        ...a step...
    device.waits, device.operators

Tensors on it say that they are on "cuda:0" and compute on the CPU. A wait is what makes the host stand still on a GPU
until the device has done all its work: a value that is read, a shape that depends on values, a copy that is not
asynchronous. Copies from the host count only where they block.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parent.parent
TESTS = Path(__file__).resolve().parent
DEVICE = torch.device("cuda:0")
_UNDERNEATH = "meta"  # what torch itself believes: the one device that needs no driver

# They read a value, or return as many elements as the values say.
_READING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "unique_dim"),
    *("_unique", "_unique2", "unique_consecutive", "unique_dim_consecutive", "argwhere", "multinomial"),
}
# They copy an operand that is a number on the host, and wait for the copy; others take it as an argument.
_COPIES_NUMBERS = {"where", "index_put_", "index_put", "_index_put_impl_", "cat", "stack"}


class Pretended(torch.Tensor):
    """A tensor on the pretended device; `inner` holds its values on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=_UNDERNEATH,
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self, **_) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor on the pretended device after its end")


def _is_there(device) -> bool:
    return device is not None and torch.device(device).type in (DEVICE.type, _UNDERNEATH)


class PretendedDevice(TorchDispatchMode):
    """Counts, inside its `with` block.

    Attributes:
        waits: Counter of "file:function operator" of the innermost line of the product that made the host wait.
        operators: operators dispatched to the device, views left out. A GPU has fewer: it fuses dropout and attention.
    """

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operators = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PretendedDevice:
        for name, replacement in {
            # Without a driver torch would refuse; with one it has to be begun, or it never would be.
            "_lazy_init": torch.cuda._lazy_init if torch.cuda.is_available() else lambda: None,
            "get_device_name": lambda *_: "a pretended GPU",
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *_: None,
            "Stream": _Nothing,
            "Event": _Nothing,
            "current_stream": _Nothing,
            "stream": lambda *_: contextlib.nullcontext(),
        }.items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        for name in ("tensor", "as_tensor"):  # they look past dispatch modes
            made = functools.partial(_made, getattr(torch, name))
            self._stack.enter_context(mock.patch.object(torch, name, made))

        # A list of these is asked whether all are plain tensors; on a GPU they are.
        kinds = [*_foreach_utils._foreach_supported_types, Pretended]
        self._stack.enter_context(mock.patch.object(_foreach_utils, "_foreach_supported_types", kinds))
        devices = [*_foreach_utils._get_foreach_kernels_supported_devices(), _UNDERNEATH]
        name = "_get_foreach_kernels_supported_devices"
        self._stack.enter_context(mock.patch.object(_foreach_utils, name, lambda: devices))
        self._stack.enter_context(mock.patch.object(Pretended, "record_stream", lambda *_: None, create=True))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        there = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Pretended)]
        is_there = bool(there)
        plain = {key: tree_map(_inner, value) for key, value in kwargs.items()}
        if (device := kwargs.get("device")) is not None:
            is_there, plain["device"] = _is_there(device), "cpu"
        if name == "_to_copy" and there and is_there and kwargs.get("dtype", there[0].dtype) == there[0].dtype:
            return args[0]  # it is there already
        self._look(func, name, args, kwargs, there, is_there)
        out = func(*tree_map(_inner, args), **plain)
        if not is_there:
            return out
        out = tree_map(lambda value: Pretended(value) if isinstance(value, torch.Tensor) else value, out)
        return return_and_correct_aliasing(func, args, kwargs, out)

    def _look(self, func, name: str, args, kwargs, there: list[Pretended], is_there: bool) -> None:
        if not (there or is_there):
            return
        if not _is_view(func):
            self.operators += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = [leaf for leaf in tensors if not isinstance(leaf, Pretended)]
        if name == "_to_copy":
            # To the host it is read sooner or later, asynchronous or not; from the host the copy alone has to block.
            waits = bool(there) != is_there and not (is_there and kwargs.get("non_blocking"))
        elif name == "copy_":
            blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            from_there, to_there = isinstance(args[1], Pretended), isinstance(args[0], Pretended)
            waits = from_there and not to_there or (blocks and to_there and not from_there and args[1].dim() > 0)
        else:
            by_mask = name in ("index", "index_put_", "index_put", "_index_put_impl_") and any(
                leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1]) if leaf is not None
            )
            # How often to repeat is a tensor, and the length of the result its sum.
            repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
            copies = name in _COPIES_NUMBERS and (bool(here) or _is_number(args, name))
            waits = name in _READING or by_mask or repeats or copies
        if waits:
            self.waits[f"{_place()} {name}"] += 1


def _inner(value):
    return value.inner if isinstance(value, Pretended) else value


def _is_number(args, name: str) -> bool:
    """Whether a number is put into places: torch's binding makes it a tensor on the host first."""
    return "index_put" in name and args[2].dim() == 0


def _is_view(func) -> bool:
    returned = [value.alias_info for value in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def _place() -> str:
    """The innermost function of the product on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        inside = ROOT in file.parents and TESTS not in file.parents and ".venv" not in file.parts
        if inside and "site-packages" not in file.parts:
            return f"{file.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


def _made(make, data, *args, device=None, **kwargs) -> torch.Tensor:
    """A tensor of numbers: made on the host, and copied by a copy that blocks."""
    made = make(data, *args, **kwargs)
    return made.to(DEVICE) if _is_there(device) else made


class _Nothing:
    """In place of streams and events: everything is done at once."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def accelerator_on_it() -> Iterator[None]:
    """Let accelerate believe that the pretended device is the machine's."""
    from aliblip.runtime.accelerator import AliBlipAccelerator

    with mock.patch.object(AliBlipAccelerator, "device", property(lambda self: DEVICE)):
        yield
