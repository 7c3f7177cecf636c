"""Tiny models, tokenizers and batches that several tests share."""

from __future__ import annotations

import torch
from transformers import BertTokenizer, BlipImageProcessorPil

from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

WORDS = ["red", "blue", "green", "cotton", "steel", "small", "large", "cup", "shirt", "lamp", "chair", "shoe", "bag"]


def config(image_size: int = 32, vocab_size: int = 64, **changes) -> AliBlipConfig:
    return AliBlipConfig(
        vision_config={
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"image_size": image_size, "patch_size": 8},
            **changes.pop("vision_config", {}),
        },
        text_config={
            **{"vocab_size": vocab_size, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"intermediate_size": 48, "max_position_embeddings": 40},
            **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            **changes.pop("text_config", {}),
        },
        **{"image_text_hidden_size": 16, **changes},
    )


def model(seed: int = 0, **changes) -> AliBlipForImageTextRetrieval:
    torch.manual_seed(seed)
    return AliBlipForImageTextRetrieval(config(**changes))


def batch(rows: int = 4, length: int = 7, image_size: int = 32, vocab_size: int = 64, seed: int = 0) -> dict:
    """Titles of different lengths, every product once."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length)[None, :] < lengths).long()
    return {
        "pixel_values": torch.randn(rows, 3, image_size, image_size, generator=generator),
        "input_ids": torch.randint(5, vocab_size - 2, (rows, length), generator=generator) * mask,
        "attention_mask": mask,
        "product_id": torch.arange(rows),
    }


def tokenizer() -> BertTokenizer:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={token: i for i, token in enumerate([*specials, *WORDS])})


def processor(image_size: int = 32) -> AliBlipProcessor:
    return AliBlipProcessor(BlipImageProcessorPil(size={"height": image_size, "width": image_size}), tokenizer())
