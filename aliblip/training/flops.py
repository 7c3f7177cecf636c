"""Floating-point operations of a training step, for the share of a device's rate that a run reaches (MFU)."""

from __future__ import annotations

from aliblip.retrieval.plan import image_flops, image_kv_flops, match_flops, text_flops


def training_flops(config, title_tokens: float, queue_size: int, pairs: int = 3) -> int:
    """Operations of the matrix products that one sample of a step needs, whatever way they are computed.

    Forward: `image + text + image_kv + pairs * match + 4 * 2 K E`, with the pairs of ITM (the own one, negative photos,
    negative titles) and the similarities of ITC against K queue slots in E dimensions. The backward pass takes twice as
    much for what is trained. The momentum encoders go forward only: `image + text`. What is computed a second time
    (gradient checkpointing) and what pads a batch is work without a use and is left out, as MFU asks for
    (https://arxiv.org/abs/2204.02311, appendix B). Two operations a multiply-add.

    Args:
        config: an `AliBlipConfig`.
        title_tokens: mean length of a title in tokens.
        queue_size: slots of the queue.
        pairs: of ITM, of each row.
    """
    length = round(title_tokens)
    towers = image_flops(config) + text_flops(config, length)
    similarities = 2 * queue_size * config.image_text_hidden_size
    trained = towers + image_kv_flops(config) + pairs * match_flops(config, length) + 2 * similarities
    return 3 * trained + towers + 2 * similarities


__all__ = ["training_flops"]
