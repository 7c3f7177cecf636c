"""Every recipe can be read, and the published one holds the published settings and trains."""

from __future__ import annotations

import json
import re
import sys

import pytest
import tiny
import yaml
from helpers import ROOT, assert_succeeded, run_forked
from PIL import Image

from aliblip.runtime.arguments import parse
from aliblip.training.arguments import ModelArguments, TrainDataArguments, TrainingArguments
from modeling_aliblip import AliBlipForImageTextRetrieval

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_are_read_and_say_what_they_cost(recipe):
    parse([ModelArguments, TrainDataArguments, TrainingArguments], ["--config", str(recipe)])
    header = recipe.read_text().split("\n\n")[0]
    for entry in ("command:", "hardware:"):
        assert entry in header
    assert re.search(r"(measured|number): +\S", header) and not re.search(r"[A-Z]{4,}_[A-Z]{4,}", header)


def test_the_published_settings():
    model, data, training = parse(
        [ModelArguments, TrainDataArguments, TrainingArguments],
        ["--config", str(ROOT / "recipes" / "aliproducts_large.yaml")],
    )
    assert (model.config_name, model.image_size, model.max_length) == ("large", 384, 35)
    assert (training.per_device_train_batch_size, training.num_train_epochs) == (16, 6)
    assert (training.learning_rate, training.weight_decay, training.decay_everything) == (5e-6, 0.05, True)
    assert (training.lr_scheduler_type, training.warmup_steps, training.max_grad_norm) == ("cosine_per_epoch", 0, 0)
    assert (training.queue_size, training.alpha, training.momentum) == (57600, 0.4, 0.995)
    assert training.momentum_dropout and not training.momentum_warmup and training.in_batch_itc == 0
    assert training.gradient_checkpointing and training.gradient_checkpointing_vision_layers == 10
    assert training.gradient_checkpointing_text_layers == 0
    assert not training.negatives_from_all_ranks and not training.hardest_negatives
    assert (data.augmentation, data.min_crop_scale, data.horizontal_flip) == ("blip", 0.5, True)


def test_the_published_recipe_trains_at_reduced_depth(tmp_path):
    """One step on the competition layout; only depth, batch, queue and vocabulary are smaller than in the recipe."""
    for name in ("train", "val"):
        rows = [{"product": f"{name}{i}.jpg", "caption": f"{tiny.WORDS[i]} {tiny.WORDS[-i]}"} for i in range(3)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        (tmp_path / "images").mkdir(exist_ok=True)
        for i, row in enumerate(rows):
            Image.new("RGB", (50, 40), (80 * i, 100, 200)).save(tmp_path / "images" / row["product"])
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    output = tmp_path / "run"
    command = [
        *(sys.executable, "train.py", "--config", "recipes/aliproducts_large.yaml", "--output_dir", output),
        *("--train_file", tmp_path / "train.json", "--validation_file", tmp_path / "val.json"),
        *("--image_dir", tmp_path / "images", "--tokenizer_name", tmp_path / "tokenizer"),
        *("--vision_config", '{"num_hidden_layers": 2}', "--text_config", '{"num_hidden_layers": 1}'),
        *("--gradient_checkpointing_vision_layers", "1", "--per_device_train_batch_size", "2", "--queue_size", "16"),
        *("--max_train_steps", "1", "--logging_steps", "1", "--dataloader_num_workers", "0"),
    ]
    assert_succeeded(run_forked(command))
    entry = json.loads((output / "log.jsonl").read_text().splitlines()[0])
    assert entry["learning_rate"] == 5e-6 and entry["queue_fill"] == 2 / 16
    resolved = json.loads((output / "arguments.json").read_text())
    recipe = yaml.safe_load((ROOT / "recipes" / "aliproducts_large.yaml").read_text())
    changed = {"tokenizer_name", "gradient_checkpointing_vision_layers", "per_device_train_batch_size", "queue_size"}
    for key, value in recipe.items():
        assert key in changed or resolved[key] == value, key
    config = AliBlipForImageTextRetrieval.from_pretrained(output / "last").config
    assert (config.vision_config.hidden_size, config.vision_config.drop_path_rate) == (1024, 0.1)
    assert (config.vision_config.image_size, config.text_config.hidden_size) == (384, 768)
