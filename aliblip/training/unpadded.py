"""`--unpad`: titles without their padding, all tokens of a batch one after the other.

    features = text_features_without_padding(model, input_ids, attention_mask, sum(lengths))
    logits = match_without_padding(model, input_ids, attention_mask, image_kv, image_index, sum(lengths))

What is done token by token (all matrix products with weights, norms, dropout) is done for the tokens that there are.
Attention alone, a small part of the work for short titles, lays queries, keys and values out with padding, and so takes
every implementation of attention with its masks, on a CPU and on a GPU; `flash_attention_2` leaves the padding out
itself. The values are those of the padded pass.

The host has to know how many tokens there are, or a bound of it, since it is the shape. Where titles were drawn on a
GPU it knows the bound alone: places beyond the tokens are computed for nothing.

Legend: M titles, L tokens of the longest, T places, D width of the BERT, H heads, P tokens of a photo, C width of a
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling_aliblip import any_shape, attend, split_heads


class Titles(NamedTuple):
    """Where tokens are. `tokens` (T,): where among the M x L of the padded titles that of each place is; `places`
    (M, L): in which place each of the M x L is, any place for padding; `first` (M,): the places of the first tokens."""

    tokens: Tensor
    places: Tensor
    first: Tensor

    def padded(self, rows: Tensor) -> Tensor:
        """(T, D) -> (M, L, D)."""
        return rows.index_select(0, self.places.flatten()).view(*self.places.shape, -1)

    def packed(self, rows: Tensor) -> Tensor:
        """(M, L, D) -> (T, D)."""
        return rows.flatten(0, 1).index_select(0, self.tokens)


def without_padding(attention_mask: Tensor, tokens: int) -> Titles:
    """The places of titles with this mask (M, L), padded on the right; `tokens`: T, as many as there are, or more."""
    titles, longest = attention_mask.shape
    lengths = attention_mask.sum(dim=1)
    ends = lengths.cumsum(dim=0)
    first = ends - lengths
    place = torch.arange(tokens, device=ends.device)
    title = torch.searchsorted(ends, place, right=True).clamp(max=titles - 1)  # the last one's, of places beyond
    position = (place - first[title]).clamp(max=longest - 1)
    places = first[:, None] + torch.arange(longest, device=ends.device)
    return Titles(title * longest + position, places.clamp(max=tokens - 1), first)


def first_tokens(
    text_encoder: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    tokens: int,
    image_kv=None,
    image_index: Tensor | None = None,
) -> Tensor:
    """The first tokens of `text_encoder(input_ids, attention_mask, image_kv, image_index)`, (M, D).

    Args:
        text_encoder: an `AliBlipTextModel`.
        input_ids, attention_mask: (M, L), padded on the right.
        tokens: how many of them are no padding, or more.
        image_kv, image_index: the photos of the titles, as for `match`.
    """
    titles = without_padding(attention_mask, tokens)
    ids = input_ids.flatten().index_select(0, titles.tokens)
    hidden = text_encoder.embeddings(ids, titles.tokens % attention_mask.shape[1])  # (T, D)
    mask = text_encoder.mask_of(attention_mask, hidden)
    layers = text_encoder.encoder.layer
    for number, layer in enumerate(layers):
        kv = None if image_kv is None else image_kv[number]
        args = (layer, hidden, mask, titles, kv, image_index, number == len(layers) - 1)
        if layer.gradient_checkpointing and layer.training:
            hidden = checkpoint(_layer, *args, use_reentrant=False)
        else:
            hidden = _layer(*args)
    return hidden


def text_features_without_padding(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, tokens: int) -> Tensor:
    """`model.get_text_features(input_ids, attention_mask).pooler_output`, fp32."""
    first = first_tokens(model.text_encoder, input_ids, attention_mask, tokens)
    return F.normalize(model.text_proj(first).float(), dim=-1)


def match_without_padding(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, image_kv, image_index: Tensor, tokens: int
) -> Tensor:
    """`model.match(input_ids, attention_mask, image_kv, image_index)`."""
    input_ids = torch.cat([torch.full_like(input_ids[:, :1], model.config.enc_token_id), input_ids[:, 1:]], dim=1)
    return model.itm_head(first_tokens(model.text_encoder, input_ids, attention_mask, tokens, image_kv, image_index))


def _layer(layer, hidden: Tensor, mask, titles: Titles, image_kv, image_index, first_only: bool) -> Tensor:
    """A layer, (T, D) -> (T, D), or (M, D) of the first tokens."""
    with any_shape(hidden.device):
        queries = hidden.index_select(0, titles.first) if first_only else hidden
        itself = layer.attention.self
        key, value = (split_heads(titles.padded(part(hidden)), itself.heads) for part in (itself.key, itself.value))
        context = _attended(itself, queries, key, value, mask, titles, first_only)
        hidden = layer.attention.output(context, queries)
        if image_kv is not None:
            key, value = (part[image_index] for part in image_kv)  # (M, H, P, C)
            context = _attended(layer.crossattention.self, hidden, key, value, None, titles, first_only)
            hidden = layer.crossattention.output(context, hidden)
    return layer.output(layer.intermediate(hidden), hidden)


def _attended(attention, queries: Tensor, key: Tensor, value: Tensor, mask, titles: Titles, first_only: bool) -> Tensor:
    query = attention.query(queries)
    query = query[:, None] if first_only else titles.padded(query)
    context, _ = attend(attention, split_heads(query, attention.heads), key, value, mask)  # (M, L, D), or (M, 1, D)
    return context[:, 0] if first_only else titles.packed(context)


def title_lengths(batch: dict) -> Sequence[int]:
    """Tokens of a batch's titles as the host knows them, or the most that they can be."""
    if "title_lengths" in batch:
        return batch["title_lengths"]
    mask = batch["attention_mask"]
    return mask.sum(dim=1).tolist() if mask.device.type == "cpu" else [mask.shape[1]] * len(mask)


__all__ = [
    "Titles",
    "first_tokens",
    "match_without_padding",
    "text_features_without_padding",
    "title_lengths",
    "without_padding",
]
