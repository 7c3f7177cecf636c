"""Floating-point operations of a training step, for the share of a device's rate that a run reaches (MFU)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from aliblip.retrieval.plan import image_flops, image_kv_flops, match_flops, text_flops, tokens_per_image
from aliblip.training.arguments import TrainingArguments
from aliblip.training.freezing import frozen_parts
from aliblip.training.patches import patches_kept

__all__ = ["pairs_of_a_row", "sample_flops", "training_flops"]


def pairs_of_a_row(itm_negatives: int, itm_queue_titles: int) -> int:
    """Pairs of ITM for each row: the own one, negative photos and titles, titles of the queue."""
    return 1 + 2 * itm_negatives + itm_queue_titles


def sample_flops(config, args: TrainingArguments, title_tokens: float) -> int:
    """`training_flops` of a run with these arguments."""
    return training_flops(
        config,
        title_tokens,
        args.queue_size,
        pairs_of_a_row(args.itm_negatives, args.itm_queue_titles),
        frozen=frozen_parts(args.freeze),
        adapters=args.lora_rank is not None,
        patch_dropout=args.patch_dropout,
    )


def training_flops(
    config,
    title_tokens: float,
    queue_size: int,
    pairs: int = 3,
    *,
    frozen: Iterable[str] = (),
    adapters: bool = False,
    patch_dropout: float = 0.0,
) -> int:
    """Operations of the matrix products that one sample of a step needs, whatever way they are computed.

    Forward: `image + text + image_kv + pairs * match + 4 * 2 K E`, with the pairs of ITM (the own one, negative photos,
    negative titles) and the similarities of ITC against K queue slots in E dimensions. The backward pass takes twice as
    much for what is trained: once for the gradient of the weights, once for that of what comes in. A frozen part has
    none for its weights, and none at all if nothing below it is trained. The momentum encoders go forward only:
    `image + text`. What is computed a second time (gradient checkpointing) and what pads a batch is work without a use
    and is left out, as MFU asks for (https://arxiv.org/abs/2204.02311, appendix B). Two operations a multiply-add.

    Args:
        config: an `AliBlipConfig`.
        title_tokens: mean length of a title in tokens.
        queue_size: slots of the queue.
        pairs: of ITM, of each row.
        frozen: parts that are not trained, see `aliblip.training.freezing`.
        patch_dropout: share of the patches that the trained tower leaves out.
        adapters: small matrices beside those of the model are trained instead. They count as nothing, but gradients
            pass through everything above the first of them, which is nearly all.
    """
    length, frozen = round(title_tokens), set(frozen)
    tokens = 1 + patches_kept(tokens_per_image(config) - 1, patch_dropout)
    image, text = image_flops(config, tokens), text_flops(config, length)
    image_kv, match = image_kv_flops(config, tokens), match_flops(config, length, tokens)
    similarities = 2 * queue_size * config.image_text_hidden_size
    momentum = image_flops(config) + text
    forward = image + text + momentum + image_kv + pairs * match + 4 * similarities
    if adapters:
        return forward + image + text + image_kv + pairs * match + 4 * similarities
    if not frozen:
        return forward + 2 * (image + text + image_kv + pairs * match + 2 * similarities)
    backward = 2 * image * ("vision" not in frozen) + 2 * text * ("text" not in frozen)
    backward += image_kv * (("cross_attention" not in frozen) + ("vision" not in frozen))
    backward += pairs * sum(
        _match_layer_backward(config, length, tokens, layer, frozen) for layer in range(_depth(config))
    )
    if not {"vision", "text", "projections"} <= frozen:
        backward += 4 * similarities
    return forward + backward


@dataclass(frozen=True)
class _Needs:
    """What of a layer of ITM needs a gradient: its weights, and what they are applied to."""

    text: bool  # weights of the BERT
    cross: bool  # weights of the cross-attention
    image: bool  # the photo's tokens
    below: bool  # what comes into the layer

    @property
    def after_titles(self) -> bool:
        return self.text or self.below

    @property
    def after_photos(self) -> bool:
        return self.after_titles or self.cross or self.image


def _match_layer_backward(config, length: int, tokens: int, layer: int, frozen: set[str]) -> float:
    """The backward pass of one layer for one pair."""
    text, P, L = config.text_config, tokens, length
    D, F = text.hidden_size, text.intermediate_size
    trained = {part: part not in frozen for part in ("text", "cross_attention", "vision")}
    needs = _Needs(
        trained["text"],
        trained["cross_attention"],
        trained["vision"],
        # Into the first layer comes the embedding; into the others what has seen the photos.
        trained["text"] or (layer > 0 and (trained["cross_attention"] or trained["vision"])),
    )
    queries = 1 if layer == _depth(config) - 1 else L  # of the last layer only the first token is computed

    def linear(rows: int, size: int, weights: bool, comes_in: bool) -> float:
        return 2 * rows * size * (weights + comes_in)

    def attention(keys: int, of_queries: bool, of_keys: bool) -> float:
        product = 2 * queries * keys * D  # of scores, and of values
        return product * (2 * of_keys + of_queries + (of_queries or of_keys))

    titles = linear(L, 2 * D * D, needs.text, needs.below) + linear(queries, D * D, needs.text, needs.below)
    titles += attention(L, needs.after_titles, needs.after_titles)
    titles += linear(queries, D * D, needs.text, needs.after_titles)
    photos = linear(queries, D * D, needs.cross, needs.after_titles)
    photos += attention(P, needs.after_titles or needs.cross, needs.cross or needs.image)
    photos += linear(queries, D * D, needs.cross, needs.after_photos)
    return titles + photos + linear(queries, 2 * D * F, needs.text, needs.after_photos)


def _depth(config) -> int:
    return config.text_config.num_hidden_layers
