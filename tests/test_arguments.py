"""Flags, recipes, and what a user reads when something is wrong."""

from __future__ import annotations

import sys

import pytest
from helpers import run_forked

from aliblip.runtime.arguments import OutOfRange, check_range, json_mapping, parse
from aliblip.runtime.mistakes import UsageError
from aliblip.training.arguments import ModelArguments, TrainDataArguments, TrainingArguments

GROUPS = (ModelArguments, TrainDataArguments, TrainingArguments)


def recipe(tmp_path, text: str) -> list[str]:
    (tmp_path / "recipe.yaml").write_text(text)
    return ["--config", str(tmp_path / "recipe.yaml")]


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    argv = recipe(
        tmp_path,
        "learning_rate: 3e-4\nqueue_size: 1024\nhorizontal_flip: false\nvision_config: {hidden_size: 192}\n"
        "gradient_checkpointing: true\nmixed_precision: null\n",
    )
    model, data, training = parse(GROUPS, [*argv, "--queue_size", "7"])
    assert (training.learning_rate, training.queue_size, training.weight_decay) == (3e-4, 7, 0.05)
    assert training.gradient_checkpointing is True and data.horizontal_flip is False
    assert training.mixed_precision is None
    assert json_mapping("vision_config", model.vision_config) == {"hidden_size": 192}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], "unknown argument --learning_rat: did you mean 'learning_rate'"),
        (["--learning-rat", "1"], "did you mean 'learning_rate'"),
        (["--save_steps", "9"], "unknown argument --save_steps: that is 'checkpointing_steps' here"),
        (["--fp16"], "that is 'mixed_precision fp16' here"),
        (["--eval-strategy", "steps"], "that is 'evaluate_every' here"),
        (["--freeze_steps", "9"], "unknown argument --freeze_steps: accepted are "),  # and no other steps
        (["--eval_step", "9"], "did you mean 'eval_steps'"),
        (["--weight_decays", "9"], "did you mean 'weight_decay'"),
        (["--queue_size", "many"], "invalid int value: 'many'"),
        (["--augmentation", "strong"], "choose from"),
        (["--config", "no/such.yaml"], "can't read the recipe no/such.yaml"),
        (["--config"], "--config needs the path of a recipe"),
    ],
)
def test_wrong_flags(argv, message):
    with pytest.raises(UsageError, match=message) as error:
        parse(GROUPS, argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1\n", "unknown key 'learnig_rate' in the recipe .*: did you mean 'learning_rate'"),
        ("- a\n", "holds a list: it must be a mapping"),
        ("a: [\n", "is not valid YAML"),
        ("queue_size: soon\n", "invalid int value: 'soon'"),
    ],
)
def test_wrong_recipes(tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as error:
        parse(GROUPS, recipe(tmp_path, text))
    assert "\n" not in str(error.value)


def test_ranges_and_mappings():
    check_range(alpha=(0.4, 0, 1), steps=(None, 1, None))
    with pytest.raises(UsageError, match="--alpha is 1.5: it must be from 0 to 1"):
        check_range(alpha=(1.5, 0, 1))
    with pytest.raises(UsageError, match="--batch is 0: it must be at least 1"):
        check_range(batch=(0, 1, None))
    with pytest.raises(OutOfRange) as told:
        check_range(alpha=(float("nan"), 0, 1), batch=(0, 1, None))
    assert set(told.value.names) == {"alpha", "batch"}
    with pytest.raises(UsageError, match="not valid JSON"):
        json_mapping("vision_config", "{hidden")
    with pytest.raises(UsageError, match="is a list"):
        json_mapping("vision_config", "[1]")


SCRIPT = """
import sys
from aliblip.runtime import mistakes
mistakes.SECONDS_FOR_THE_FIRST_PROCESS = 0.5
def main():
    raise mistakes.UsageError("wrong")
mistakes.main_with_usage_errors("script", main)
"""


def test_a_mistake_ends_a_script_with_exit_code_2_and_one_line(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    result = run_forked([sys.executable, tmp_path / "script.py"])
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "script: error: wrong\n")
