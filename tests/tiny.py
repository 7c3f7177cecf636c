"""Tiny models, tokenizers and batches that several tests share."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image
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


def spread_model(**changes) -> AliBlipForImageTextRetrieval:
    """A model in evaluation mode whose scores differ: initial weights of 0.02 give scores too equal to be ranked."""
    made = model(**changes).eval()
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1 and name != "temp":
            parameter.data.mul_(6)
    return made


def photos(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Paths of photos of random boxes, in a new folder."""
    folder.mkdir(parents=True)
    generator = random.Random(seed)
    paths = [folder / f"{number:03}.png" for number in range(count)]
    for path in paths:
        image = Image.new("RGB", (40, 30), tuple(generator.randrange(256) for _ in range(3)))
        for _ in range(6):
            left, top = generator.randrange(30), generator.randrange(30)
            image.paste(tuple(generator.randrange(256) for _ in range(3)), (left, top, left + 9, top + 9))
        image.save(path)
    return [str(path) for path in paths]


def titles(count: int, seed: int = 0) -> list[str]:
    """Different titles."""
    generator, made = random.Random(seed), {}
    while len(made) < count:
        made[" ".join(generator.choice(WORDS) for _ in range(generator.randrange(2, 9)))] = None
    return list(made)


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
