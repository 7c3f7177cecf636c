"""Parity with BLIP in every direction: original files, transformers' folders, ours."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import recordings
import tiny
import torch
from blip_stub import (
    CLOSE,
    HEADS,
    HOW,
    QUEUE,
    VOCABULARY,
    assert_same_numbers,
    converted,
    ours,
    spoilt,
)
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BlipProcessor,
)

from aliblip import convert
from aliblip.models.original import original_name, our_name
from aliblip.runtime.mistakes import UsageError, main_with_usage_errors
from aliblip.training.carried import MOMENTUM_FILE, check_momentum, read_momentum
from aliblip.training.momentum import MomentumState
from configuration_aliblip import AliBlipConfig
from processing_aliblip import AliBlipProcessor

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


def test_there_and_back_through_every_form(blip, blip_folder, original_file, vocabulary, tmp_path):
    told = converted(original_file, tmp_path / "ours", tokenizer_name=str(vocabulary), **HEADS)
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
    added = next(line for line in told if line.startswith("to read it back, add "))
    flags = shlex.split(added)[5:]
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


def test_a_base_checkpoint_drops_its_decoder(blip, original_state, vocabulary, tmp_path):
    state = {name: value for name, value in original_state.items() if "_queue" not in name}
    state |= {name: original_state[name] for name in ("image_queue", "text_queue")}
    state["queue_ptr"] = torch.zeros(1, dtype=torch.int64)
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(40)[None]
    state["text_decoder.cls.predictions.bias"] = torch.zeros(VOCABULARY)
    torch.save({"model": state}, tmp_path / "model_base.pth")
    options = {"tokenizer_name": str(vocabulary), **HEADS}
    told = converted(tmp_path / "model_base.pth", tmp_path / "ours", **options)
    assert "dropped: text decoder (2 tensors)" in told
    assert_same_numbers(ours(tmp_path / "ours"), blip)
    with pytest.raises(UsageError, match="queues of .*missing: idx_queue.*take --momentum encoders"):
        converted(tmp_path / "model_base.pth", tmp_path / "all", momentum="all", **options)
    assert not (tmp_path / "all").exists()
    converted(tmp_path / "model_base.pth", tmp_path / "encoders", momentum="encoders", **options)
    assert "image_queue" not in read_momentum(tmp_path / "encoders")


def test_a_blip_folder_with_another_tokenizer_keeps_its_pixels(blip_folder, vocabulary, tmp_path):
    converted(blip_folder, tmp_path / "ours", tokenizer_name=str(vocabulary), max_length=20)
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
    with pytest.raises(UsageError, match="--image_size: image size 50 is not divisible by the patch size 8"):
        converted(blip_folder, tmp_path / "no", image_size=50)


def test_a_recorded_original_model_keeps_its_numbers(tmp_path):
    recorded = recordings.COMMITTED / "one_rank"
    expected = json.loads((recorded / "expected.json").read_text())
    torch.save({"model": recordings.initial_state(recorded)}, tmp_path / "epoch_0_nccl.pth")
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


def test_momentum_encoders_and_queues_are_carried(original_file, original_state, vocabulary, tmp_path):
    options = {"tokenizer_name": str(vocabulary), "momentum": "all", **HEADS}
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


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["visual_encoder.blocks.1.attn.qkv.weight", "visual_encoder.pos_embed"])
def test_an_original_file_that_does_not_fit_is_refused_by_name(how, name, original_state, vocabulary, tmp_path):
    torch.save({"model": spoilt(original_state, how, name)}, tmp_path / "bad.pth")
    with pytest.raises(UsageError, match=HOW[how].format(name=name)):
        converted(tmp_path / "bad.pth", tmp_path / "ours", tokenizer_name=str(vocabulary), **HEADS)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("how", HOW)
def test_momentum_encoders_that_do_not_fit_are_refused_by_name(how, original_state, vocabulary, tmp_path):
    name = "text_encoder_m.encoder.layer.0.output.dense.weight"
    state = spoilt(original_state, how, name)
    if how == "unexpected":
        state["text_encoder_m.something.else"] = state.pop("something.else")
    torch.save({"model": state}, tmp_path / "bad.pth")
    expected = HOW[how].format(name=name).replace("something", "text_encoder_m.something")
    with pytest.raises(UsageError, match=expected):
        converted(tmp_path / "bad.pth", tmp_path / "o", tokenizer_name=str(vocabulary), momentum="encoders", **HEADS)


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
    with pytest.raises(UsageError, match=HOW[how].format(name=name)):
        converted(tmp_path, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told(blip_folder, original_file, original_state, vocabulary, tmp_path):
    def error(source=original_file, **options) -> str:
        with pytest.raises(UsageError) as raised:
            converted(source, tmp_path / "out", **{"tokenizer_name": str(vocabulary), **HEADS, **options})
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
        return str(raised.value)

    assert "vision tower 32 wide" in error(vision_config=None) and "--vision_config" in error(vision_config=None)
    assert "text tower 24 wide" in error(text_config=None)
    torch.save({"model": original_state, "args": Namespace(lr=1)}, tmp_path / "objects.pth")
    message = error(tmp_path / "objects.pth")
    assert "argparse.Namespace" in message and "could run code" in message and "weights_only=False" in message
    (tmp_path / "broken.pth").write_bytes(original_file.read_bytes()[:5000])
    assert "damaged" in error(tmp_path / "broken.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "not a checkpoint of the original code" in error(tmp_path / "list.pth")
    caption = {k: v for k, v in original_state.items() if k.startswith("visual_encoder.")}
    torch.save({"model": caption}, tmp_path / "caption.pth")
    message = error(tmp_path / "caption.pth")
    assert "not a retrieval or base checkpoint" in message and "text_encoder.embeddings.word_embeddings" in message
    positions = {"visual_encoder.pos_embed": torch.zeros(1, 16, 32)}
    torch.save({"model": {**original_state, **positions}}, tmp_path / "grid.pth")
    assert "visual_encoder.pos_embed (1, 16, 32): not a square" in error(tmp_path / "grid.pth")
    assert "there is no file nowhere.pth" in error("nowhere.pth")
    assert "the model brings its own" in error(blip_folder)
    words = tiny.tokenizer()
    words.add_tokens(["sofa"])
    words.save_pretrained(tmp_path / "words")
    message = error(tokenizer_name=str(tmp_path / "words"))
    assert "word embeddings for 20 tokens, the tokenizer has 21" in message
    torch.save({"model": {1: torch.zeros(1)}}, tmp_path / "numbers.pth")
    assert "not a checkpoint of the original code" in error(tmp_path / "numbers.pth")
    assert "--max_length is 2: it must be at least 3" in error(max_length=2)
    assert "--momentum is for" in error(blip_folder, momentum="all")
    assert "an original file already" in error(to="original")
    with pytest.raises(UsageError, match="exists: give a new folder"):
        converted(original_file, tmp_path, tokenizer_name=str(vocabulary), **HEADS)
    with pytest.raises(ValueError, match="is of model type 'bert'"):
        BertConfig().save_pretrained(tmp_path / "bert")
        AliBlipConfig.from_pretrained(tmp_path / "bert")


def test_files_that_cannot_be_read_are_mistakes(blip_folder, original_file, vocabulary, tmp_path):
    def error(source, **options) -> str:
        with pytest.raises(UsageError) as raised:
            converted(source, tmp_path / "out", **options)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(blip_folder, tmp_path / name))

    assert f"can't load the model {tmp_path / 'empty'}" in error((tmp_path / "empty").mkdir() or tmp_path / "empty")
    weights = copy("weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert f"can't load the model {weights.parent}" in error(weights.parent)
    configuration = copy("configuration") / "config.json"
    configuration.write_text("{")
    assert f"config.json of {configuration.parent} can't be read" in error(configuration.parent)
    settings = copy("settings") / "processor_config.json"
    settings.write_text("{")
    assert f"processor_config.json of {settings.parent} can't be read" in error(settings.parent)
    assert "no tokenizer at 'nowhere/else'" in error(blip_folder, tokenizer_name="nowhere/else")
    heads = {**HEADS, "vision_config": '{"num_attention_heads": 5}'}
    message = error(original_file, tokenizer_name=str(vocabulary), **heads)
    assert f"no model can be built from {original_file}" in message and "not divisible" in message
    (tmp_path / "a file").write_text("")
    message = error(original_file, tokenizer_name=str(vocabulary), output_dir=tmp_path / "a file" / "out", **HEADS)
    assert "could not be written" in message


def test_a_mistake_is_one_line_and_a_bug_a_traceback(blip_folder, tmp_path, monkeypatch, capsys):
    flags = ["aliblip.convert", "--model_name_or_path", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "o")]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit) as ended:
        main_with_usage_errors("aliblip.convert", convert.main)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("aliblip.convert: error: there is no folder")
    assert told.count("\n") == 1
    flags[2] = str(blip_folder)
    monkeypatch.setattr(convert, "describe", lambda model: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):  # Python shows it with its traceback, and exit code 1
        main_with_usage_errors("aliblip.convert", convert.main)


def test_foreign_code_is_refused_without_a_question(blip_folder, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    folder = Path(shutil.copytree(vocabulary, tmp_path / "tokenizer"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    foreign = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | foreign))
    (folder / "mine.py").write_text("raise SystemExit('run')")
    with pytest.raises(UsageError, match=f"{folder} asks for code that does not belong"):
        converted(blip_folder, tmp_path / "out", tokenizer_name=str(folder))
