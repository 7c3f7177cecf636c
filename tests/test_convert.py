"""Parity with BLIP in every direction: original files, transformers' folders, ours; towers from a ViT and a BERT."""

from __future__ import annotations

import json
import os
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import tiny
import torch
from helpers import ROOT, assert_succeeded, run_forked
from runs import TINY, log_of, write_split
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BlipProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

import train
from aliblip.convert import ConvertArguments, convert
from aliblip.models.backbones import read_text_backbone, read_vision_backbone, start_from_backbone
from aliblip.models.original import original_name, our_name
from aliblip.runtime.mistakes import UsageError
from aliblip.training.carried import MOMENTUM_FILE, check_momentum, read_momentum
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

REFERENCE = Path(os.environ.get("ALIBLIP_REFERENCE_DIR", ROOT.parent / "shared" / "reference"))
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


@pytest.fixture(scope="module")
def blip() -> BlipForImageTextRetrieval:
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


@pytest.fixture(scope="module")
def blip_folder(blip, tmp_path_factory) -> Path:
    """As `BlipForImageTextRetrieval` and `BlipProcessor` save themselves."""
    folder = tmp_path_factory.mktemp("blip")
    blip.save_pretrained(folder)
    BlipProcessor(
        BlipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3]), tiny.tokenizer()
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original_state(blip) -> dict[str, Tensor]:
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


@pytest.fixture(scope="module")
def original_file(original_state, tmp_path_factory) -> Path:
    """As the AliProduct solution saves it: names as DDP gives them, and the optimizer beside."""
    path = tmp_path_factory.mktemp("original") / "epoch_3_nccl.pth"
    state = {f"module.{name}": value for name, value in original_state.items()}
    torch.save({"model": state, "optimizer": {"state": {}}, "config": {"vit": "base"}, "epoch": 3}, path)
    return path


def converted(source, folder: Path, **options) -> list[str]:
    return convert(ConvertArguments(model_name_or_path=str(source), output_dir=str(folder), **options))


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


# --- parity -----------------------------------------------------------------------------------------------------------


def test_a_blip_folder_loads_directly_with_its_configuration_translated(blip, blip_folder):
    model = ours(blip_folder)
    assert_same_numbers(model, blip)
    config = model.config
    assert config.model_type == "aliblip" and config.enc_token_id == VOCABULARY - 1
    # 8 heads and 1e-5 are that class's defaults
    assert config.text_config.num_attention_heads == 8 and config.vision_config.layer_norm_eps == 1e-5
    assert config.vision_config.initializer_range == 0.02
    assert config.text_config.hidden_dropout_prob == config.text_config.attention_probs_dropout_prob == 0.1
    assert model.temp.item() == pytest.approx(0.07)
    processor = AliBlipProcessor.from_pretrained(blip_folder)
    assert type(processor.image_processor) is BlipImageProcessorPil and processor.image_size == 32
    assert list(processor.image_processor.image_mean) == [0.5, 0.4, 0.3]
    assert processor.enc_token_id == config.enc_token_id and len(processor.tokenizer) == VOCABULARY


def test_a_hub_repository_of_older_files_loads_too(blip, blip_folder, tmp_path):
    """Salesforce's: `pytorch_model.bin` with the position numbers, `preprocessor_config.json`; the configuration leaves
    out what is its default."""
    numbers = {"text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    torch.save({**blip.state_dict(), **numbers}, tmp_path / "pytorch_model.bin")
    config = json.loads((blip_folder / "config.json").read_text())
    for part, names in (("vision_config", ("layer_norm_eps",)), ("text_config", ("num_attention_heads",))):
        for name in names:
            del config[part][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny.tokenizer().save_pretrained(tmp_path)
    settings = {"image_processor_type": "BlipImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert_same_numbers(ours(tmp_path), blip)
    assert AliBlipProcessor.from_pretrained(tmp_path).image_size == 32


def test_there_and_back_through_every_form(blip, blip_folder, original_file, tokenizer, tmp_path):
    told = converted(original_file, tmp_path / "ours", tokenizer_name=str(tokenizer), **HEADS)
    model = ours(tmp_path / "ours")
    assert_same_numbers(model, blip)
    assert model.temp.item() == pytest.approx(0.05) and model.config.text_config.hidden_dropout_prob == 0.1
    assert "dropped: position_ids (2 tensors)" in told
    assert any(line.startswith("not carried over: momentum encoders") for line in told)
    assert not (tmp_path / "ours" / MOMENTUM_FILE).exists()

    told = converted(tmp_path / "ours", tmp_path / "theirs", to="transformers")
    assert "lost: the temperature, 0.0500 (transformers' BLIP has none)" in told
    assert not [file for file in (tmp_path / "theirs").glob("*.json") if "aliblip" in file.read_text().lower()]
    theirs, info = BlipForImageTextRetrieval.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    assert_same_numbers(model, theirs.eval())
    batch = BlipProcessor.from_pretrained(tmp_path / "theirs")(text="red cup", return_tensors="pt")
    assert (
        batch["input_ids"].tolist()
        == AliBlipProcessor.from_pretrained(tmp_path / "ours")(text=["red cup"], return_tensors="pt")[
            "input_ids"
        ].tolist()
    )

    converted(tmp_path / "theirs", tmp_path / "again")
    told = converted(tmp_path / "again", tmp_path / "original", to="original")
    assert "differs there: the ViT's LayerNorm epsilon is 1e-06, here 1e-05" in told
    assert "differs there: the BERT's heads are 64 wide, here there are 8" in told
    # As it says, and with the tokenizer that lies beside it.
    added = next(line for line in told if line.startswith("whoever reads it here has to add "))
    flags = shlex.split(added)[7:]
    options = {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    assert options.keys() == {"vision_config", "text_config"}
    converted(tmp_path / "original" / "model.pth", tmp_path / "last", **options)
    for folder in ("again", "last"):
        again = ours(tmp_path / folder)
        for name, value in model.state_dict().items():
            assert name == "temp" or torch.equal(again.state_dict()[name], value), name
        before, after = model.config.to_dict(), again.config.to_dict()
        assert {k for k in before if before[k] != after[k]} == {"_name_or_path"}, folder


def test_names_of_the_original_code_go_both_ways():
    names = list(tiny.model().state_dict())
    assert [our_name(original_name(name)) for name in names] == names
    assert sum(original_name(name) != name for name in names) == sum(n.startswith("vision_model.") for n in names)


def test_a_base_checkpoint_drops_its_decoder(blip, original_state, tokenizer, tmp_path):
    state = {name: value for name, value in original_state.items() if "_queue" not in name}
    state |= {name: original_state[name] for name in ("image_queue", "text_queue")}
    state["queue_ptr"] = torch.zeros(1, dtype=torch.int64)
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(40)[None]
    state["text_decoder.cls.predictions.bias"] = torch.zeros(VOCABULARY)
    torch.save({"model": state}, tmp_path / "model_base.pth")
    options = {"tokenizer_name": str(tokenizer), **HEADS}
    told = converted(tmp_path / "model_base.pth", tmp_path / "ours", **options)
    assert "dropped: text decoder (2 tensors)" in told
    assert_same_numbers(ours(tmp_path / "ours"), blip)
    with pytest.raises(UsageError, match="queues of .*missing: idx_queue.*take --momentum encoders"):
        converted(tmp_path / "model_base.pth", tmp_path / "all", momentum="all", **options)
    assert not (tmp_path / "all").exists()
    converted(tmp_path / "model_base.pth", tmp_path / "encoders", momentum="encoders", **options)
    assert "image_queue" not in read_momentum(tmp_path / "encoders")


def test_a_blip_folder_with_another_tokenizer_keeps_its_pixels(blip_folder, tokenizer, tmp_path):
    converted(blip_folder, tmp_path / "ours", tokenizer_name=str(tokenizer), max_length=20)
    processor = AliBlipProcessor.from_pretrained(tmp_path / "ours")
    assert list(processor.image_processor.image_mean) == [0.5, 0.4, 0.3]
    assert processor.max_length == 20 and processor.image_size == 32


def test_another_resolution(blip, blip_folder, tmp_path):
    told = converted(blip_folder, tmp_path / "ours", image_size=48)
    assert "position embedding interpolated from 32 to 48 px" in told
    model, images = ours(tmp_path / "ours"), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = blip.vision_model(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(model.encode_image(images), expected, **CLOSE)
    assert AliBlipProcessor.from_pretrained(tmp_path / "ours").image_size == 48
    with pytest.raises(ValueError, match="image size 50 is not divisible by the patch size 8"):
        converted(blip_folder, tmp_path / "no", image_size=50)


@pytest.mark.skipif(not (REFERENCE / "one_rank").is_dir(), reason=f"no recordings in {REFERENCE}")
def test_a_recorded_original_model_keeps_its_numbers(tmp_path):
    recorded = REFERENCE / "one_rank"
    expected = json.loads((recorded / "expected.json").read_text())
    torch.save({"model": load_file(recorded / "initial.safetensors")}, tmp_path / "epoch_0_nccl.pth")
    heads = {
        f"{tower}_config": json.dumps({"num_attention_heads": expected[tower]["num_attention_heads"]})
        for tower in ("vision", "text")
    }
    options = {"tokenizer_name": str(recorded / "vocab.txt"), "momentum": "all", **heads}
    converted(tmp_path / "epoch_0_nccl.pth", tmp_path / "ours", **options)
    model, data = ours(tmp_path / "ours"), load_file(recorded / "evaluation.safetensors")
    assert model.config.enc_token_id == expected["enc_token_id"]
    with torch.no_grad():
        image = model.get_image_features(data["images"])
        text = model.get_text_features(data["input_ids"], data["attention_mask"])
        torch.testing.assert_close(image.pooler_output, data["image_embeds"], **CLOSE)
        torch.testing.assert_close(text.pooler_output, data["text_embeds"], **CLOSE)
        image_kv, count = model.project_image_kv(image.last_hidden_state), len(data["images"])
        own = torch.arange(count)
        itm = model.match(data["input_ids"], data["attention_mask"], image_kv, own)
        torch.testing.assert_close(itm, data["itm_logits"][own, own], **CLOSE)
    assert len(read_momentum(tmp_path / "ours")["queue_ids"]) == expected["queue_size"]


# --- momentum ---------------------------------------------------------------------------------------------------------


def test_momentum_encoders_and_queues_are_carried(original_file, original_state, tokenizer, tmp_path):
    options = {"tokenizer_name": str(tokenizer), "momentum": "all", **HEADS}
    told = converted(original_file, tmp_path / "ours", **options)
    assert any(f"{QUEUE} queue slots, 5 of them filled: train with --queue_size {QUEUE}" in line for line in told)
    model, tensors = ours(tmp_path / "ours"), read_momentum(tmp_path / "ours")
    state = MomentumState(model, queue_size=QUEUE, embedding_size=16)
    state.start_from(tensors)
    for name, value in state.encoders.state_dict().items():
        if name != "temp":
            tower, _, rest = original_name(name).partition(".")
            assert torch.equal(value, original_state[f"{tower}_m.{rest}"]), name
    # The slot that the original would write next (3) is our first; the filled ones come last.
    check_momentum(tensors, model, QUEUE)
    for how, expected in (
        ("missing", f"{(bias := 'encoders.vision_proj.bias')} is missing"),
        ("unexpected", "something.else is unexpected"),
        ("of another shape", rf"{bias} is \(3, 5\) for \(16,\)"),
    ):
        with pytest.raises(ValueError, match=expected):
            check_momentum(spoilt(tensors, how, bias), model, QUEUE)
    assert state.pointer == 0
    assert state.queue_filled.tolist() == [False] * 7 + [True] * 5
    assert state.queue_ids[7:].tolist() == [5, 6, 7, 8, 9]
    assert torch.equal(state.image_queue[0], original_state["image_queue"][:, 3])
    assert torch.equal(state.text_queue[-1], original_state["text_queue"][:, 2])

    converted(tmp_path / "ours", tmp_path / "back", to="original")
    back = torch.load(tmp_path / "back" / "model.pth", weights_only=True)["model"]
    numbers = {name for name in original_state if name.endswith("position_ids")}
    assert set(back) == set(original_state) - numbers
    for name, value in back.items():
        if "_queue" in name:
            columns = torch.arange(QUEUE).roll(-3)
            expected = original_state[name] if name == "ptr_queue" else original_state[name][:, columns]
            assert name == "ptr_queue" or torch.equal(value, expected), name
        elif "_m." not in name or "crossattention" not in name:
            assert torch.equal(value, original_state[name]), name
    assert int(back["ptr_queue"]) == 0 and back["temp"].shape == ()

    converted(original_file, tmp_path / "larger", image_size=48, **options)
    MomentumState(ours(tmp_path / "larger"), queue_size=QUEUE, embedding_size=16).start_from(
        read_momentum(tmp_path / "larger")
    )


# --- what does not fit ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["visual_encoder.blocks.1.attn.qkv.weight", "visual_encoder.pos_embed"])
def test_an_original_file_that_does_not_fit_is_refused_by_name(how, name, original_state, tokenizer, tmp_path):
    torch.save({"model": spoilt(original_state, how, name)}, tmp_path / "bad.pth")
    with pytest.raises(UsageError, match=HOW[how].format(name=name)):
        converted(tmp_path / "bad.pth", tmp_path / "ours", tokenizer_name=str(tokenizer), **HEADS)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("how", HOW)
def test_momentum_encoders_that_do_not_fit_are_refused_by_name(how, original_state, tokenizer, tmp_path):
    name = "text_encoder_m.encoder.layer.0.output.dense.weight"
    state = spoilt(original_state, how, name)
    if how == "unexpected":
        state["text_encoder_m.something.else"] = state.pop("something.else")
    torch.save({"model": state}, tmp_path / "bad.pth")
    expected = HOW[how].format(name=name).replace("something", "text_encoder_m.something")
    with pytest.raises(UsageError, match=expected):
        converted(tmp_path / "bad.pth", tmp_path / "o", tokenizer_name=str(tokenizer), momentum="encoders", **HEADS)


@pytest.mark.parametrize("to", ["aliblip", "transformers", "original"])
@pytest.mark.parametrize("how", HOW)
def test_a_folder_that_does_not_fit_is_refused_by_name(how, to, blip_folder, tmp_path):
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    for file in blip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(
        spoilt(load_file(blip_folder / "model.safetensors"), how, name),
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=HOW[how].format(name=name)):
        converted(tmp_path, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told(blip_folder, original_file, original_state, tokenizer, tmp_path):
    def error(source=original_file, **options) -> str:
        with pytest.raises((UsageError, ValueError)) as raised:
            converted(source, tmp_path / "out", **{"tokenizer_name": str(tokenizer), **HEADS, **options})
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
        return str(raised.value)

    assert "vision tower 32 wide" in error(vision_config=None) and "--vision_config" in error(vision_config=None)
    assert "text tower 24 wide" in error(text_config=None)
    torch.save({"model": original_state, "args": Namespace(lr=1)}, tmp_path / "objects.pth")
    message = error(tmp_path / "objects.pth")
    assert "argparse.Namespace" in message and "can run code" in message and "weights_only=False" in message
    (tmp_path / "broken.pth").write_bytes(original_file.read_bytes()[:5000])
    assert "damaged" in error(tmp_path / "broken.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "no checkpoint of the original code" in error(tmp_path / "list.pth")
    caption = {k: v for k, v in original_state.items() if k.startswith("visual_encoder.")}
    torch.save({"model": caption}, tmp_path / "caption.pth")
    message = error(tmp_path / "caption.pth")
    assert "no retrieval or base checkpoint" in message and "text_encoder.embeddings.word_embeddings" in message
    positions = {"visual_encoder.pos_embed": torch.zeros(1, 16, 32)}
    torch.save({"model": {**original_state, **positions}}, tmp_path / "grid.pth")
    assert "visual_encoder.pos_embed (1, 16, 32): no square" in error(tmp_path / "grid.pth")
    assert "there is no file nowhere.pth" in error("nowhere.pth")
    assert "the model brings its own" in error(blip_folder)
    words = tiny.tokenizer()
    words.add_tokens(["sofa"])
    words.save_pretrained(tmp_path / "words")
    message = error(tokenizer_name=str(tmp_path / "words"))
    assert "word embeddings for 20 tokens, the tokenizer has 21" in message
    torch.save({"model": {1: torch.zeros(1)}}, tmp_path / "numbers.pth")
    assert "no checkpoint of the original code" in error(tmp_path / "numbers.pth")
    assert "--max_length is 2: it must be at least 3" in error(max_length=2)
    assert "--momentum is for" in error(blip_folder, momentum="all")
    assert "an original file already" in error(to="original")
    with pytest.raises(UsageError, match="exists: give a new folder"):
        converted(original_file, tmp_path, tokenizer_name=str(tokenizer), **HEADS)
    with pytest.raises(ValueError, match="is of model type 'bert'"):
        BertConfig().save_pretrained(tmp_path / "bert")
        AliBlipConfig.from_pretrained(tmp_path / "bert")


# --- towers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """With a classifier, at 16 px, as google/vit-* with its own pixel statistics."""
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config.image_size, config.patch_size = 16, 8
    torch.manual_seed(3)
    shaken(ViTForImageClassification(config)).save_pretrained(folder)
    ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """With a language-model head and its tokenizer, which has neither [DEC] nor [ENC]."""
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
    config.vocab_size, config.max_position_embeddings = VOCABULARY - 2, 40
    torch.manual_seed(4)
    shaken(BertForMaskedLM(config)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def test_towers_compute_what_their_backbones_compute(vit, bert):
    vision, text = read_vision_backbone(str(vit)), read_text_backbone(str(bert))
    assert vision.dropped == ["classifier.bias", "classifier.weight"]
    assert vision.pixel_statistics == {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert "embeddings.token_type_embeddings.weight[1]" in text.dropped
    assert any(name.startswith("cls.predictions") for name in text.dropped)
    torch.manual_seed(0)
    model = AliBlipForImageTextRetrieval(
        AliBlipConfig(vision_config=vision.config, text_config={**text.config, "vocab_size": VOCABULARY})
    ).eval()
    fresh = model.text_encoder.embeddings.word_embeddings.weight[-2:].clone()
    copied = start_from_backbone(model, vision) + start_from_backbone(model, text)
    assert (
        len(copied)
        == len(set(copied))
        == sum(
            name.startswith(("vision_model.", "text_encoder.")) and "crossattention" not in name
            for name in model.state_dict()
        )
    )
    batch = tiny.batch(image_size=16, vocab_size=VOCABULARY)
    expected = ViTModel.from_pretrained(vit, add_pooling_layer=False).eval()(batch["pixel_values"]).last_hidden_state
    torch.testing.assert_close(model.encode_image(batch["pixel_values"]), expected, **CLOSE)
    titles = batch["input_ids"], batch["attention_mask"]
    expected = BertModel.from_pretrained(bert, add_pooling_layer=False).eval()(*titles).last_hidden_state
    tokens = model.get_text_features(*titles).last_hidden_state
    torch.testing.assert_close(tokens * titles[1][..., None], expected * titles[1][..., None], **CLOSE)
    assert torch.equal(model.text_encoder.embeddings.word_embeddings.weight[-2:], fresh)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("tower", ["vit", "bert"])
def test_a_backbone_that_does_not_fit_is_refused_by_name(how, tower, vit, bert, tmp_path):
    folder, read = (vit, read_vision_backbone) if tower == "vit" else (bert, read_text_backbone)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "layer.1" in name and "query.weight" in name)
    save_file(spoilt(state, how, name), tmp_path / "model.safetensors", {"format": "pt"})
    # transformers tells its module's own name, which differs in prefix and from version to version
    named = {"missing": "missing: .*1.*q", "unexpected": "something.else", "of another shape": r"1.*q.*\(3, 5\)"}[how]
    with pytest.raises(UsageError, match=named):
        read(str(tmp_path))
    other = read_text_backbone if tower == "vit" else read_vision_backbone
    with pytest.raises(UsageError, match=f"is of model type '{tower}'"):
        other(str(tmp_path))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder, "train", 16)
    write_split(folder, "validation", 8)
    return folder


RUN = TINY[TINY.index("--queue_size") :]  # without what describes a model from scratch


def set_up(*flags) -> train.Setup:
    groups = [train.ModelArguments, train.TrainDataArguments, train.TrainingArguments, train.HubArguments]
    return train.set_up(*train.parse(groups, [*RUN, *map(str, flags)]))


def assert_everything_trains(setup: train.Setup) -> None:
    """One batch through the objective, as the loop of `train.py` does it."""
    momentum = MomentumState(setup.model, queue_size=QUEUE, embedding_size=setup.model.config.image_text_hidden_size)
    batch = next(setup.loader.epoch(0))
    output = RetrievalObjective(setup.model).train()(batch, momentum.encode(batch), 0.4)
    output.loss.backward()
    untouched = [name for name, p in setup.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not untouched, untouched


def test_training_sets_up_from_every_form(blip, blip_folder, original_file, tokenizer, catalogue, tmp_path, capsys):
    data = ["--data_dir", catalogue, "--output_dir", tmp_path / "run"]
    setup = set_up("--model_name_or_path", blip_folder, *data)
    assert_same_numbers(setup.model.eval(), blip)
    assert setup.processor.image_size == 32 and setup.momentum_start is None
    assert_everything_trains(setup)
    of_file = ["--model_name_or_path", original_file, "--tokenizer_name", tokenizer]
    of_file += ["--vision_config", HEADS["vision_config"], "--text_config", HEADS["text_config"]]
    setup = set_up(*of_file, *data)
    assert f"{original_file} also holds momentum encoders, which are not taken over" in capsys.readouterr().out
    assert_same_numbers(setup.model.eval(), blip)
    assert setup.model.temp.item() == pytest.approx(0.05)
    setup = set_up(*of_file, *data, "--image_size", "48")
    assert setup.model.config.vision_config.image_size == setup.processor.image_size == 48

    converted(original_file, tmp_path / "ours", tokenizer_name=str(tokenizer), momentum="all", **HEADS)
    of_folder = ["--model_name_or_path", tmp_path / "ours", *data]
    with pytest.raises(ValueError, match=f"queues of {QUEUE} slots, --queue_size is 20: give --queue_size {QUEUE}"):
        set_up(*of_folder)
    of_folder += ["--queue_size", QUEUE]
    setup = set_up(*of_folder)
    assert_same_numbers(setup.model.eval(), blip)
    assert setup.momentum_start["queue_ids"].shape == (QUEUE,)
    with pytest.raises(ValueError, match="position_embedding is .*convert again"):
        set_up(*of_folder, "--image_size", "48")
    with pytest.raises(UsageError, match="--vision_config is for training from scratch"):
        set_up(*of_folder, "--vision_config", "{}")
    with pytest.raises(UsageError, match="give either --config_name"):
        set_up(*of_folder, "--vision_model_name_or_path", "vit")


def test_training_sets_up_from_two_towers(vit, bert, tokenizer, catalogue, tmp_path, capsys):
    data = ["--data_dir", catalogue, "--output_dir", tmp_path / "run"]
    towers = ["--vision_model_name_or_path", vit, "--text_model_name_or_path", bert]
    setup = set_up(*towers, "--image_size", "32", *data)
    printed = capsys.readouterr().out
    assert f"copied from {vit}; dropped: classifier.bias, classifier.weight" in printed
    assert f"copied from {bert} (word embeddings: 18 rows copied, 2 fresh); dropped: cls.predictions." in printed
    assert "(itm_head, temp, text_encoder.encoder.layer.*.crossattention, text_proj, vision_proj)" in printed
    assert setup.model.config.vision_config.image_size == setup.processor.image_size == 32
    assert list(setup.processor.image_processor.image_mean) == [0.5] * 3
    images = torch.randn(2, 3, 32, 32)
    theirs = ViTModel.from_pretrained(vit, add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(setup.model.eval().encode_image(images), expected, **CLOSE)
    assert_everything_trains(setup)

    small = '{"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}'
    setup = set_up(*towers[:2], "--tokenizer_name", tokenizer, "--text_config", small, *data)
    assert setup.model.config.vision_config.image_size == 16  # the ViT's own
    assert setup.model.config.text_config.num_hidden_layers == 1
    assert "text_encoder, text_proj, vision_proj)" in capsys.readouterr().out
    words = tiny.tokenizer()
    words.add_tokens(["sofa"])
    words.save_pretrained(tmp_path / "words")
    with pytest.raises(UsageError, match="word embeddings for 18 tokens, the tokenizer has 19"):
        set_up(*towers, "--tokenizer_name", tmp_path / "words", *data)


def test_the_command_converts_and_the_run_starts_where_the_original_left(
    original_file, original_state, blip, tokenizer, catalogue, tmp_path
):
    """Two processes: the command, then the script, which takes up momentum encoders and queues."""
    command = [sys.executable, "-m", "aliblip.convert", "--model_name_or_path", original_file, "--momentum", "all"]
    command += ["--output_dir", tmp_path / "ours", "--tokenizer_name", tokenizer]
    result = run_forked([*command, "--vision_config", HEADS["vision_config"], "--text_config", HEADS["text_config"]])
    assert_succeeded(result)
    assert "0.0 M parameters: ViT 2 x 32 (4 heads), 32 px in patches of 8; BERT 2 x 24 (8 heads)" in result.stdout
    assert f"written: {tmp_path / 'ours'}" in result.stdout
    assert_same_numbers(ours(tmp_path / "ours"), blip)

    flags = ["--model_name_or_path", tmp_path / "ours", "--data_dir", catalogue, "--output_dir", tmp_path / "run"]
    flags += ["--queue_size", QUEUE, "--max_train_steps", "2", "--checkpointing_steps", "1", "--momentum", "1"]
    result = run_forked([sys.executable, "train.py", *RUN, *flags])
    assert_succeeded(result)
    assert "starting from the momentum encoders and queues in momentum.safetensors" in result.stdout + result.stderr
    # 8 rows of the first step are written from the first slot on: the last four are still the file's
    before = read_momentum(tmp_path / "ours")
    after = load_file(tmp_path / "run" / "checkpoint-1" / "momentum.safetensors")
    assert [entry["queue_fill"] for entry in log_of(tmp_path / "run") if "queue_fill" in entry] == [1.0, 1.0]
    assert torch.equal(after["queue_ids"][8:], before["queue_ids"][8:])
    assert torch.equal(after["image_queue"][8:], before["image_queue"][8:])
    # with --momentum 1 the average stays what it was
    bias = "encoders.vision_proj.bias"
    assert torch.equal(after[bias], before[bias]) and torch.equal(after[bias], original_state["vision_proj_m.bias"])
    start, end = ours(tmp_path / "ours").state_dict(), ours(tmp_path / "run" / "last").state_dict()
    still = [name for name in start if torch.equal(start[name], end[name])]
    assert not still, still
