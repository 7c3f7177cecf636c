"""A training starts from every form of a model: original files, transformers' folders, ours, single towers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch
from blip_stub import (
    CLOSE,
    HEADS,
    QUEUE,
    assert_same_numbers,
    converted,
    ours,
)
from helpers import assert_succeeded, run_forked
from runs import TINY, log_of, write_split
from safetensors.torch import load_file
from transformers import ViTModel

import train
from aliblip.models.upload import HubArguments
from aliblip.runtime.arguments import parse
from aliblip.runtime.mistakes import UsageError
from aliblip.training.arguments import ModelArguments, TrainDataArguments, TrainingArguments
from aliblip.training.carried import read_momentum
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder, "train", 16)
    write_split(folder, "validation", 8)
    return folder


RUN = TINY[TINY.index("--queue_size") :]  # without what describes a model from scratch


def set_up(*flags) -> train.Setup:
    groups = [ModelArguments, TrainDataArguments, TrainingArguments, HubArguments]
    made = train.set_up(*parse(groups, [*RUN, *map(str, flags)]))
    made.owner.release()  # as a run does at its end
    return made


def assert_everything_trains(setup: train.Setup) -> None:
    """One batch through the objective, as the loop of `train.py` does it."""
    momentum = MomentumState(setup.model, queue_size=QUEUE, embedding_size=setup.model.config.image_text_hidden_size)
    batch = next(setup.loader.epoch(0))
    output = RetrievalObjective(setup.model).train()(batch, momentum.encode(batch), 0.4)
    output.loss.backward()
    untouched = [name for name, p in setup.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not untouched, untouched


def test_training_sets_up_from_every_form(blip, blip_folder, original_file, vocabulary, catalogue, tmp_path, capsys):
    data = ["--data_dir", catalogue, "--output_dir", tmp_path / "run"]
    setup = set_up("--model_name_or_path", blip_folder, *data)
    assert_same_numbers(setup.model.eval(), blip)
    assert setup.processor.image_size == 32 and setup.momentum_start is None
    assert_everything_trains(setup)
    of_file = ["--model_name_or_path", original_file, "--tokenizer_name", vocabulary]
    of_file += ["--vision_config", HEADS["vision_config"], "--text_config", HEADS["text_config"]]
    setup = set_up(*of_file, *data)
    assert f"{original_file} also holds momentum encoders, which are not taken over" in capsys.readouterr().out
    assert_same_numbers(setup.model.eval(), blip)
    assert setup.model.temp.item() == pytest.approx(0.05)
    setup = set_up(*of_file, *data, "--image_size", "48")
    assert setup.model.config.vision_config.image_size == setup.processor.image_size == 48

    converted(original_file, tmp_path / "ours", tokenizer_name=str(vocabulary), momentum="all", **HEADS)
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


def test_training_sets_up_from_two_towers(vit, bert, vocabulary, catalogue, tmp_path, capsys):
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
    setup = set_up(*towers[:2], "--tokenizer_name", vocabulary, "--text_config", small, *data)
    assert setup.model.config.vision_config.image_size == 16  # the ViT's own
    assert setup.model.config.text_config.num_hidden_layers == 1
    assert "text_encoder, text_proj, vision_proj)" in capsys.readouterr().out
    words = tiny.tokenizer()
    words.add_tokens(["sofa"])
    words.save_pretrained(tmp_path / "words")
    with pytest.raises(UsageError, match="word embeddings for 18 tokens, the tokenizer has 19"):
        set_up(*towers, "--tokenizer_name", tmp_path / "words", *data)


def test_the_command_converts_and_the_run_starts_where_the_original_left(
    original_file, original_state, blip, vocabulary, catalogue, tmp_path
):
    """Two processes: the command, then the script, which takes up momentum encoders and queues."""
    command = [sys.executable, "-m", "aliblip.convert", "--model_name_or_path", original_file, "--momentum", "all"]
    command += ["--output_dir", tmp_path / "ours", "--tokenizer_name", vocabulary]
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
