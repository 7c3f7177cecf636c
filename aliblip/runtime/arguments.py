"""Command-line arguments of both scripts, and recipes.

    python train.py --config recipes/demo.yaml --learning_rate 1e-4

A recipe is a YAML mapping of flag names to values: it sets defaults, flags override. Every mistake raises `UsageError`
with one line: what was given, what is accepted, what to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field

import yaml
from transformers import HfArgumentParser

from aliblip.runtime.files import read_bytes
from aliblip.runtime.mistakes import Mistakes, UsageError, one_line
from aliblip.runtime.refusals import remember_given

SECONDS_FOR_THE_FIRST_PROCESS = 30
# Of a recipe.
MOST_BYTES, MOST_VALUES = 2**20, 10_000
# Flags of transformers' Trainer and of open_clip that have another name here; each counts where that is a flag.
ELSEWHERE = {
    "batch_size": "per_device_train_batch_size",
    "bf16": "mixed_precision bf16",
    "dataloader_workers": "dataloader_num_workers",
    "epochs": "num_train_epochs",
    "eval_every": "evaluate_every",
    "eval_strategy": "evaluate_every",
    "evaluation_strategy": "evaluate_every",
    "fp16": "mixed_precision fp16",
    "lock_image": "freeze vision",
    "lock_text": "freeze text",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_steps": "max_train_steps",
    "precision": "mixed_precision",
    "resume": "resume_from_checkpoint",
    "save_steps": "checkpointing_steps",
    "torch_compile": "compile",
    "warmup": "warmup_steps",
    "workers": "dataloader_num_workers",
}


class OutOfRange(Mistakes):
    """Numbers out of their ranges; `names` are those of their flags."""

    def __init__(self, mistakes: Mapping[str, str]):
        super().__init__(list(mistakes.values()))
        self.names = list(mistakes)


def option(default, text: str, **kwargs):
    return field(default=default, metadata={"help": text, **kwargs})


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message}; see --help")


def parse(dataclass_types: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None) -> tuple:
    """Parse flags and the recipe that `--config` names into one instance per dataclass.

    Raises:
        UsageError: an unknown flag or key, a value of the wrong type, a recipe that can't be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        dataclass_types,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="Recipe: a YAML mapping of these flags' names to values; flags override it.")
    names = {f.name: f for dataclass_type in dataclass_types for f in dataclasses.fields(dataclass_type)}
    recipe = _config_value(argv)
    if recipe is not None:
        # As flags before the given ones: argparse converts and checks both alike, and the later one wins.
        argv = [*_recipe_flags(recipe, names), *argv]
    remember_given(value for argument in argv for value in (argument, argument.partition("=")[2]))
    parsed = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if parsed[-1]:
        flag = parsed[-1][0]
        raise UsageError(f"unknown argument {flag}: {_suggest(flag.lstrip('-').split('=')[0], names)}; see --help")
    return tuple(parsed[: len(dataclass_types)])


def _config_value(argv: list[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    try:
        return finder.parse_known_args(argv)[0].config
    except SystemExit as error:
        raise UsageError("--config needs the path of a recipe") from error


class _RecipeLoader(yaml.SafeLoader):
    """YAML whose aliases do not stand for very much more than is written: ten lines of them can mean gigabytes."""

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(
                f"its aliases (*name) stand for more than {MOST_VALUES:,} values: write out what is meant"
            )
        return node


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """Values that a node stands for, aliases written out; infinitely many where one stands for what it stands in."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
        known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


def _recipe_flags(path: str, names: dict) -> list[str]:
    try:
        text = read_bytes(path, MOST_BYTES).decode("utf-8")
        recipe = yaml.load(text, _RecipeLoader)
    except OSError as error:
        raise UsageError(f"can't read the recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"the recipe {path} is not valid YAML: {one_line(error)}") from error
    except RecursionError:
        raise UsageError(f"the recipe {path} is nested too deeply: give flags and their values") from None
    except ValueError as error:
        raise UsageError(f"the recipe {path} can't be read ({one_line(error)}): give a file of flags") from error
    if not isinstance(recipe, dict):
        raise UsageError(
            f"the recipe {path} holds a {type(recipe).__name__}: it must be a mapping of flag names to values"
        )
    flags = []
    for key, value in recipe.items():
        if key not in names:
            raise UsageError(f"unknown key {key!r} in the recipe {path}: {_suggest(str(key), names)}")
        if value is None:
            continue
        flags += [f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}"]
    return flags


def _suggest(name: str, names) -> str:
    """What was meant, if that is clear: a hint that misleads is worse than none."""
    known = ELSEWHERE.get(name.replace("-", "_"))
    if known is not None and known.partition(" ")[0] in names:
        return f"that is {known!r} here"
    close = [other for other in difflib.get_close_matches(name, names, cutoff=0.8) if _is_a_slip(name, other)]
    return f"did you mean {close[0]!r}?" if close else f"accepted are {', '.join(sorted(names))}"


def _is_a_slip(name: str, other: str) -> bool:
    """Whether two names differ by letters alone, word by word: save_steps is no slip of warmup_steps."""
    words, others = re.split("[_-]", name), re.split("[_-]", other)
    if len(words) != len(others):  # a word too many or too few, or one that was split
        return True
    return all(difflib.SequenceMatcher(None, *pair).ratio() > 0.6 for pair in zip(words, others, strict=True))


def json_mapping(name: str, text: str | None) -> dict:
    """A flag that holds a JSON object, as a dictionary; empty without the flag.

    Raises:
        UsageError: something else than a JSON object.
    """
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f'--{name} is not valid JSON ({error}): give an object such as {{"hidden_size": 192}}'
        ) from error
    if not isinstance(value, dict):
        raise UsageError(f'--{name} is a {type(value).__name__}: give a JSON object such as {{"hidden_size": 192}}')
    return value


def check_range(**ranges) -> None:
    """`name=(value, low, high)`; None as a bound: open; None as a value: not given.

    Raises:
        OutOfRange: the values out of their ranges, all of them.
    """
    mistakes = {}
    for name, (value, low, high) in ranges.items():
        if isinstance(value, float) and not math.isfinite(value):  # NaN would pass every comparison
            mistakes[name] = f"--{name} is {value}: it must be a finite number"
        elif value is not None and ((low is not None and value < low) or (high is not None and value > high)):
            accepted = f"at least {low}" if high is None else f"from {low} to {high}"
            mistakes[name] = f"--{name} is {value}: it must be {accepted}"
    if mistakes:
        raise OutOfRange(mistakes)


__all__ = ["OutOfRange", "UsageError", "check_range", "json_mapping", "parse"]
