"""Every collective that AliBLIP owns.

Each function is a collective: all ranks have to call it, in the same order, and none may stand inside a branch that
only one rank takes. Without a process group (a single process, or before one is started) every function is the
identity, so callers need no second code path.

Shapes: `W` processes, `N` rows of one rank.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from aliblip.runtime.arrival import Arrival

__all__ = [
    "ChosenRows",
    "all_gather",
    "all_gather_objects",
    "all_gather_with_grad",
    "assert_equal_on_ranks",
    "barrier",
    "broadcast_object",
    "checksum",
    "is_main",
    "launched_rank",
    "launched_world_size",
    "rank",
    "reduce_max",
    "reduce_sum",
    "sum_numbers",
    "together",
    "world_size",
]


def _is_active() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if _is_active() else 1


def rank() -> int:
    """Number of this process, 0 to `world_size() - 1`."""
    return dist.get_rank() if _is_active() else 0


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def launched_rank() -> int:
    """This process's number by the launcher's word, which holds before the process group has started as well."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """The number of processes by the launcher's word. `build_accelerator` compares it with what was started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def barrier() -> None:
    """Wait until every process is here."""
    if _is_active():
        dist.barrier()


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate a tensor of every rank along dimension 0, in rank order, without gradient.

    Args:
        tensor: `(N, ...)`, the same shape and dtype on every rank.

    Returns:
        `(W * N, ...)`, detached and equal on all ranks.

    Raises:
        ValueError: for a 0-dimensional tensor, which has no dimension to concatenate along.
    """
    if tensor.dim() == 0:
        raise ValueError("all_gather got a 0-dimensional tensor; it needs at least one dimension: pass tensor[None]")
    tensor = tensor.detach()
    if not _is_active():
        return tensor
    gathered = tensor.new_empty((world_size(), *tensor.shape))
    # The list form: the one-tensor form was renamed between the torch versions that we accept.
    dist.all_gather(list(gathered.unbind(0)), tensor.contiguous())
    return gathered.flatten(0, 1)


class _GatherWithGrad(torch.autograd.Function):
    """Gather in the forward; sum over ranks and take the own slice in the backward."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.rows = tensor.shape[0]
        return all_gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = reduce_sum(grad)
        return grad.narrow(0, rank() * ctx.rows, ctx.rows)


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate a tensor of every rank along dimension 0 so that gradients flow back to the rank that owns a row.

    Every rank may use every row, so the gradient of a row is the sum over ranks. With the mean over ranks that DDP and
    ZeRO take afterwards this gives the gradient of the mean of all ranks' losses, whether each rank computes the whole
    loss or the loss of its own rows. All ranks have to use the result in their loss: the backward is a collective.

    Args:
        tensor: `(N, ...)`, the same shape and dtype on every rank.

    Returns:
        `(W * N, ...)`.

    Raises:
        ValueError: for a 0-dimensional tensor.
    """
    if not _is_active():
        return tensor
    return _GatherWithGrad.apply(tensor)


class _Exchange(torch.autograd.Function):
    """Rows to the ranks that asked for them; in the backward their gradients on the way back."""

    @staticmethod
    def forward(ctx, rows, sent, received):
        ctx.sent, ctx.received = sent, received
        return _exchange(rows, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _exchange(grad, ctx.received, ctx.sent), None, None


def _exchange(rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    """Send the first so many rows to rank 0, the next to rank 1, and so on; what they sent, in rank order."""
    arrived = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows.detach().contiguous(), received, sent)
    return arrived


class ChosenRows:
    """Rows of all ranks' tensors that each rank has chosen for itself: these alone travel, from the rank that owns them
    to the one that wants them, and their gradients back.

        chosen = ChosenRows(choice, rows)
        ...what else there is for the device to do...
        tokens = chosen.fetch(tokens)

    Equal to `all_gather_with_grad(tensor)[choice]`, at no more than N rows to receive however many ranks there are.
    How many rows go where is known on the device alone at first. The host has to know it before they can be sent: its
    copy begins at once, and `fetch` waits for it, and for nothing that the device was given since.

    Making it is a collective, and so is each `fetch`, forward and backward.

    Args:
        choice: (N,) int64, as many on every rank: numbers of rows as `all_gather` would lay them out, so row r of
            rank k is `k * rows + r`. The same one may be chosen several times.
        rows: rows of one rank, the same number on every rank.
    """

    def __init__(self, choice: torch.Tensor, rows: int):
        self._choice, self._known = choice, None
        if not _is_active():
            return
        owner, ranks = choice // rows, torch.arange(world_size(), device=choice.device)
        self._places = owner.argsort(stable=True).argsort()  # where each row is among those that arrive
        everybody = all_gather(choice)  # (W * N,)
        is_own = everybody // rows == rank()
        order = is_own.logical_not().to(torch.uint8).argsort(stable=True)  # what is sent comes first, in rank order
        self._rows = (everybody % rows)[order]
        received = (owner[None, :] == ranks[:, None]).sum(dim=1)  # (W,)
        self._counts = Arrival(torch.cat([is_own.view(len(ranks), -1).sum(dim=1), received]))

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """The chosen rows, with gradient.

        Args:
            tensor: `(rows, ...)`, the same shape and dtype on every rank.

        Returns:
            `(N, ...)`.
        """
        if not _is_active():
            return tensor[self._choice]
        self._known = self._known or self._counts.read()
        sent, received = self._known[: world_size()], self._known[world_size() :]
        return _Exchange.apply(tensor[self._rows[: sum(sent)]], sent, received)[self._places]


def all_gather_objects(obj: Any) -> list[Any]:
    """Collect a picklable object of every rank in a list, in rank order, on all ranks."""
    if not _is_active():
        return [obj]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def together(takes_part: bool, step: Callable[[], Any], what: str) -> Any:
    """Do a step on the ranks that take part (collective). If it fails on any, all of them raise: otherwise the others
    would wait for that rank in the next collective, for ever.

    Args:
        takes_part: whether this rank does the step.
        step: what may fail.
        what: the same in words, for the message: "write the file".

    Returns:
        What the step gave on the first rank that took part, on all ranks.

    Raises:
        RuntimeError: the step failed on another rank; the message says on which and why. On that rank itself its own
            error is raised.
    """
    outcome, error = None, None
    if takes_part:
        try:
            outcome = (step(),)
        except Exception as raised:
            error = raised
    # As text, since not every exception can be sent.
    outcomes = all_gather_objects((outcome, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for number, (_, message) in enumerate(outcomes):
        if message is not None:
            raise RuntimeError(f"rank {number} could not {what}: {message}")
    return next((value[0] for value, _ in outcomes if value is not None), None)


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over ranks, element by element, without gradient. The argument stays as it is."""
    if not _is_active():
        return tensor.detach()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """The largest of all ranks, element by element, without gradient. The argument stays as it is."""
    if not _is_active():
        return tensor.detach()
    largest = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def sum_numbers(numbers: Sequence[int], device: torch.device | str = "cpu") -> list[int]:
    """The sums over ranks of whole numbers, read at once. `device`: where the backend reduces (the GPU under NCCL); a
    single process has nothing to wait for there."""
    if not _is_active():
        return list(numbers)
    return Arrival(reduce_sum(torch.tensor(numbers).to(device, non_blocking=True))).read()


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Return the picklable object of rank `src` on all ranks."""
    if not _is_active():
        return obj
    holder = [obj if rank() == src else None]
    dist.broadcast_object_list(holder, src=src)
    return holder[0]


def checksum(tensors: torch.Tensor | Iterable[torch.Tensor]) -> int:
    """Sum up tensors in one number that changes with any bit, shape, dtype or the order of the tensors.

    It does not depend on the device, so that runs on different machines can be compared.

    Returns:
        A 63-bit number (it fits into an int64 tensor).
    """
    digest = hashlib.blake2b(digest_size=8)
    for tensor in [tensors] if isinstance(tensors, torch.Tensor) else tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        # uint8 view: numpy has no bfloat16. reshape first, since a 0-dimensional tensor has no byte view.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return int.from_bytes(digest.digest(), "big") >> 1


def assert_equal_on_ranks(
    name: str, tensors: torch.Tensor | Mapping[str, torch.Tensor] | Iterable[torch.Tensor]
) -> None:
    """Compare tensors bit by bit over ranks.

    Args:
        name: what is compared, for the message.
        tensors: a tensor, several in a fixed order, or tensors by name.

    Raises:
        RuntimeError: on every rank, naming what differs and on which ranks, as soon as one rank differs from rank 0.
    """
    if isinstance(tensors, torch.Tensor):
        own = {name: checksum(tensors)}
    elif isinstance(tensors, Mapping):
        own = {f"{name}.{key}": checksum(tensor) for key, tensor in tensors.items()}
    else:
        own = {f"{name}[{index}]": checksum(tensor) for index, tensor in enumerate(tensors)}
    on_ranks = all_gather_objects(own)
    first = on_ranks[0]
    differing = {
        key: [r for r, other in enumerate(on_ranks) if other.get(key) != first.get(key)]
        for key in dict.fromkeys(key for sums in on_ranks for key in sums)
    }
    differing = {key: ranks for key, ranks in differing.items() if ranks}
    if differing:
        listed = ", ".join(f"{key} (rank {', '.join(map(str, ranks))})" for key, ranks in list(differing.items())[:8])
        more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise RuntimeError(f"{name} must be equal on all ranks but differs from rank 0: {listed}{more}")
