"""Small models of BLIP as others save them, for the tests of what is read: transformers' folder, the original code's
file, a ViT and a BERT."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BlipProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from aliblip.convert import ConvertArguments, convert
from modeling_aliblip import AliBlipForImageTextRetrieval

CLOSE = {"rtol": 0, "atol": 1e-5}
VOCABULARY = len(tiny.processor().tokenizer)  # 20: [DEC] 18, [ENC] 19
HEADS = {
    "vision_config": '{"num_attention_heads": 4, "layer_norm_eps": 1e-5}',
    "text_config": '{"num_attention_heads": 8}',
}
QUEUE = 12


def shaken(model):
    """Random biases and norms too: they start as zeros and ones, which would hide a swapped name."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def make_blip() -> BlipForImageTextRetrieval:
    torch.manual_seed(0)
    return shaken(
        BlipForImageTextRetrieval(
            BlipConfig(
                vision_config={
                    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
                    **{"image_size": 32, "patch_size": 8},
                },
                text_config={
                    **{"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2},
                    **{"vocab_size": VOCABULARY, "max_position_embeddings": 40},
                },
                image_text_hidden_size=16,
            )
        )
    )


def save_blip(blip: BlipForImageTextRetrieval, folder: Path) -> Path:
    """As `BlipForImageTextRetrieval` and `BlipProcessor` save themselves."""
    blip.save_pretrained(folder)
    BlipProcessor(
        BlipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3]), tiny.tokenizer()
    ).save_pretrained(folder)
    return folder


def original_state_of(blip: BlipForImageTextRetrieval) -> dict[str, Tensor]:
    """What the original code saves of a retrieval model with these weights, written down here by hand."""
    state = {"temp": torch.tensor(0.05)}
    for name, value in blip.state_dict().items():
        name = name.replace("vision_model.", "visual_encoder.")
        for ours, theirs in (
            ("embeddings.class_embedding", "cls_token"),
            ("visual_encoder.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("embeddings.patch_embedding", "patch_embed.proj"),
            ("post_layernorm", "norm"),
            ("encoder.layers.", "blocks."),
            ("layer_norm", "norm"),
            ("self_attn.qkv", "attn.qkv"),
            ("self_attn.projection", "attn.proj"),
        ):
            if name.startswith("visual_encoder."):
                name = name.replace(ours, theirs)
        state[name] = value
        tower, _, rest = name.partition(".")
        if tower != "itm_head":
            state[f"{tower}_m.{rest}"] = value + 0.01
    state["text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state["text_encoder_m.embeddings.position_ids"] = torch.arange(40)[None]
    generator = torch.Generator().manual_seed(2)
    state["image_queue"] = torch.nn.functional.normalize(torch.randn(16, QUEUE, generator=generator), dim=0)
    state["text_queue"] = torch.nn.functional.normalize(torch.randn(16, QUEUE, generator=generator), dim=0)
    state["idx_queue"] = torch.tensor([[7, 8, 9, *[-100] * 7, 5, 6]])
    state["ptr_queue"] = torch.tensor([3])
    return state


def save_original(original_state: dict[str, Tensor], folder: Path) -> Path:
    """As the AliProduct solution saves it: names as DDP gives them, and the optimizer beside."""
    path = folder / "epoch_3_nccl.pth"
    state = {f"module.{name}": value for name, value in original_state.items()}
    torch.save({"model": state, "optimizer": {"state": {}}, "config": {"vit": "base"}, "epoch": 3}, path)
    return path


def save_vit(folder: Path) -> Path:
    """With a classifier, at 16 px, as google/vit-* with its own pixel statistics."""
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config.image_size, config.patch_size = 16, 8
    torch.manual_seed(3)
    shaken(ViTForImageClassification(config)).save_pretrained(folder)
    ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    """With a language-model head and its tokenizer, which has neither [DEC] nor [ENC]."""
    config = BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
    config.vocab_size, config.max_position_embeddings = VOCABULARY - 2, 40
    torch.manual_seed(4)
    shaken(BertForMaskedLM(config)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def converted(source, folder: Path, **options) -> list[str]:
    options = {"output_dir": str(folder), **options}
    return convert(ConvertArguments(model_name_or_path=str(source), **options))


def ours(folder) -> AliBlipForImageTextRetrieval:
    return AliBlipForImageTextRetrieval.from_pretrained(folder).eval()


@torch.no_grad()
def assert_same_numbers(model: AliBlipForImageTextRetrieval, blip: BlipForImageTextRetrieval) -> None:
    batch = tiny.batch(vocab_size=VOCABULARY)
    images, ids, mask = batch["pixel_values"], batch["input_ids"], batch["attention_mask"]
    with_enc = ids.clone()
    with_enc[:, 0] = blip.config.text_config.vocab_size - 1
    output = model(images, ids, mask)
    tokens = blip.vision_model(images).last_hidden_state
    image = torch.nn.functional.normalize(blip.vision_proj(tokens[:, 0]), dim=-1)
    torch.testing.assert_close(output.image_embeds, image, **CLOSE)
    text = blip.text_encoder(ids, mask, is_decoder=False).last_hidden_state
    text = torch.nn.functional.normalize(blip.text_proj(text[:, 0]), dim=-1)
    torch.testing.assert_close(output.text_embeds, text, **CLOSE)
    itc = blip(input_ids=ids, attention_mask=mask, pixel_values=images, use_itm_head=False).itm_score
    torch.testing.assert_close(output.logits_per_image * model.temp, itc, **CLOSE)
    itm = blip(input_ids=with_enc, attention_mask=mask, pixel_values=images).itm_score
    torch.testing.assert_close(output.itm_logits, itm, **CLOSE)
    assert itm.std() > 1e-3  # else everything would be equal to everything


def spoilt(state: dict[str, Tensor], how: str, name: str) -> dict[str, Tensor]:
    state = dict(state)
    if how == "missing":
        del state[name]
    elif how == "unexpected":
        state["something.else"] = torch.zeros(2)
    else:
        state[name] = torch.zeros(3, 5)
    return state


HOW = {"missing": "missing: {name}", "unexpected": "unexpected: something.else", "of another shape": r"{name} \(3, 5\)"}

# --- fixtures; `conftest.py` names this file as a plugin, so that they are made once for all files --------------------


@pytest.fixture(scope="session")
def blip() -> BlipForImageTextRetrieval:
    return make_blip()


@pytest.fixture(scope="session")
def blip_folder(blip, tmp_path_factory) -> Path:
    return save_blip(blip, tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> Path:
    """A folder with the tokenizer of these models."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def original_state(blip) -> dict[str, Tensor]:
    return original_state_of(blip)


@pytest.fixture(scope="session")
def original_file(original_state, tmp_path_factory) -> Path:
    return save_original(original_state, tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))
