"""Large batches in little memory: the model sees a few rows at a time, the losses see all of them.

    tokens, image_features, text_features = in_chunks(encode, 16, pixel_values, input_ids, attention_mask)
    logits = match_in_chunks(match, 16, images, input_ids, attention_mask, image_index, sizes, longest)

GradCache (https://arxiv.org/abs/2101.06983): what the model gives for a few rows is kept, and the way there is not; the
loss is that of the whole batch; its gradient with respect to what was kept goes back through the model, which computes
the same rows again for it, with the dropout of the first time. So loss and gradients are those of one pass, whatever
the loss does with the rows. Here torch's checkpoint does the second part, inside the one backward pass: to DDP, ZeRO
and accumulation nothing is different.

Legend: N rows of a batch, C rows of a chunk, M pairs, P tokens of a photo, D width of the ViT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(function: Callable[..., tuple[Tensor, ...]], size: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """`function(*rows)`, of so many rows at a time, each of which it computes by itself.

    Args:
        function: takes tensors of any number of rows, and returns tensors of as many.
        size: C.
        rows: (N, ...) each.
    """
    chunks = zip(*(tensor.split(size) for tensor in rows), strict=True)
    parts = [checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def match_in_chunks(
    match: Callable[..., Tensor],
    size: int,
    images: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    image_index: Tensor,
    sizes: Sequence[int],
    longest: Sequence[int],
) -> Tensor:
    """`match(images, input_ids, attention_mask, image_index, longest)`, of the pairs of so many rows at a time. Keys
    and values of a photo are computed for its own row, and once more for each row whose negative it is.

    Args:
        size: C.
        images: tokens of the photos, those of the N rows first, (N or more, P, D).
        input_ids, attention_mask: (M, L), the titles of the pairs.
        image_index: (M,), the photos of the pairs: of the N rows with their own photos, then with negative ones, then
            of negative titles with the own photos; each kind row by row.
        sizes: how many pairs of each kind, multiples of N.
        longest: M numbers on the host, see `match_by_length`.

    Returns:
        (M, 2).
    """
    rows, each = sizes[0], [kind // sizes[0] for kind in sizes]  # pairs of each kind that a row has
    own = images[:rows].split(size)
    negative = images[image_index.split(list(sizes))[1]].split(size * each[1])
    ids, masks = (_by_chunk(tensor.split(list(sizes)), size, each) for tensor in (input_ids, attention_mask))
    starts = [sum(sizes[:kind]) for kind in range(len(sizes))]
    parts: list[Sequence[Tensor]] = []
    for number, (own_images, negative_images) in enumerate(zip(own, negative, strict=True)):
        first, last = number * size, number * size + len(own_images)
        lengths = [
            length
            for start, times in zip(starts, each, strict=True)
            for length in longest[start + first * times : start + last * times]
        ]
        place = torch.arange(len(own_images) + len(negative_images), device=images.device)
        of_row = place[: len(own_images)]
        index = torch.cat([place, of_row if each[2] == 1 else of_row.repeat_interleave(each[2])])
        logits = checkpoint(
            _match_of_rows, match, own_images, negative_images, ids[number], masks[number], index, lengths,
            use_reentrant=False,
        )  # fmt: skip
        parts.append(logits.split([len(own_images) * times for times in each]))
    return torch.cat([torch.cat(kind) for kind in zip(*parts, strict=True)])


def _by_chunk(kinds: Sequence[Tensor], size: int, each: Sequence[int]) -> list[Tensor]:
    """Of each chunk of rows its pairs, kind after kind."""
    split = (kind.split(size * times) for kind, times in zip(kinds, each, strict=True))
    return [torch.cat(parts) for parts in zip(*split, strict=True)]


def _match_of_rows(match, own_images, negative_images, input_ids, attention_mask, image_index, longest) -> Tensor:
    images = torch.cat([own_images, negative_images])
    return match(images, input_ids, attention_mask, image_index, longest)


__all__ = ["in_chunks", "match_in_chunks"]
