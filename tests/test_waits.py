"""How often a training step makes the host wait for the device, and how many operators it dispatches: never more.

The whole loop of `train.py` runs on a pretended GPU, see `pretended`. `pytest -s` shows the waits by place.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from pretended import DEVICE, PretendedDevice, accelerator_on_it
from runs import TINY, write_split

import train
from aliblip.runtime.arguments import parse
from aliblip.runtime.interrupts import StopSignals
from aliblip.training import objective, step
from aliblip.training.progress import RunStatus
from aliblip.training.run import Run
from aliblip.training.setup import meet, set_up

STEPS = 5  # of which the first warms up, and the last writes a log line
# Waits in an optimizer step, in one with a log line, and operators of a step; of TINY, whose towers have two layers.
ONE_RANK = {"waits": 1, "waits with a log line": 2, "operators": 1001}
SEVERAL_RANKS = {"waits": 1, "waits with a log line": 3, "operators": 1077}
# How many of its photos' tokens each rank sends to which other, which the host has to know.
NEGATIVES_FROM_ALL = {"waits": 2, "waits with a log line": 4, "operators": 1129}
SEVERAL_FROM_ALL = {"waits": 1, "waits with a log line": 3, "operators": 1153}
SEVERAL_FETCHED = {"waits": 2, "waits with a log line": 4, "operators": 1176}
TWO_BATCHES = {"waits": 1, "waits with a log line": 2, "operators": 2070}


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder / "data", "train", 100)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    flags = [*TINY, "--data_dir", folder / "data", "--tokenizer_name", folder / "tokenizer", "--evaluate_every", 0]
    return [*flags, "--max_train_steps", STEPS, "--logging_steps", STEPS]


@pytest.fixture
def group_of_one(monkeypatch) -> Iterator[None]:
    """All collectives take place, as with several ranks, and the number that they tell each other goes around."""
    monkeypatch.setattr(step, "world_size", lambda: 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def walk(flags: list, output_dir: Path, monkeypatch) -> list[tuple[Counter, int]]:
    """The waits by place and the operators of each step."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--output_dir", str(output_dir)])
    *groups, _ = parse(train.GROUPS, description="")
    setup = set_up(*groups)
    accelerator = meet(setup)
    seen: list[tuple[Counter, int]] = [(Counter(), 0)]
    plain = Run.after_step

    with PretendedDevice() as device, accelerator_on_it():

        def after_step(run, *args):
            plain(run, *args)
            seen.append((device.waits.copy(), device.operators))

        monkeypatch.setattr(Run, "after_step", after_step)
        assert train.train(setup, accelerator, StopSignals(), RunStatus(output_dir / "status.json")) is None
        assert next(setup.model.parameters()).device == DEVICE
    assert len(seen) == STEPS + 1
    return [
        (waits - waits_before, operators - operators_before)
        for (waits_before, operators_before), (waits, operators) in zip(seen[:-1], seen[1:], strict=True)
    ]


def check(steps: list[tuple[Counter, int]], limits: dict[str, int]) -> None:
    _, *usual, (with_line, _) = steps
    for waits, operators in steps[2:]:
        print(
            f"{operators} operators, {waits.total()} waits:",
            *(f"{n:4} {place}" for place, n in waits.items()),
            sep="\n",
        )
    assert max(waits.total() for waits, _ in usual) <= limits["waits"]
    assert with_line.total() <= limits["waits with a log line"]
    assert max(operators for _, operators in usual) <= limits["operators"]


def test_waits_and_operators_of_a_step(flags, tmp_path, monkeypatch, accelerate_as_before):
    check(walk(flags, tmp_path, monkeypatch), ONE_RANK)


def test_waits_and_operators_of_a_step_of_two_batches(flags, tmp_path, monkeypatch, accelerate_as_before):
    flags = [*flags, "--gradient_accumulation_steps", 2]
    check(walk(flags, tmp_path, monkeypatch), TWO_BATCHES)


SEVERAL = ["--itm_negatives", 4, "--itm_queue_titles", 8, "--itm_listwise", 1]
# Of one rank, beside ONE_RANK: the same waits, and so many operators.
LISTS, CEILING = ["--itm_listwise_itc", "true"], ["--itm_negative_ceiling", 0.9]
LEFT_OUT = ["--patch_dropout", 0.5, "--unpad", "true"]
OPTIONS = {
    "cached": (["--cached_batch_size", 5], 2390),
    "unpad": (["--unpad", "true"], 1067),
    "patch dropout": (["--patch_dropout", 0.5], 1010),
    "patch dropout and unpad": (LEFT_OUT, 1076),
    "several negatives": (SEVERAL, 1101),
    "several negatives, lists with ITC": ([*SEVERAL, *LISTS], 1110),
    "several negatives, lists with ITC, a ceiling": ([*SEVERAL, *LISTS, *CEILING], 1116),
    "all of them": ([*SEVERAL, *LISTS, *CEILING, *LEFT_OUT, "--cached_batch_size", 5], 2745),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_waits_and_operators_of_a_step_with_an_option(option, flags, tmp_path, monkeypatch, accelerate_as_before):
    more, operators = OPTIONS[option]
    check(walk([*flags, *more], tmp_path, monkeypatch), {**ONE_RANK, "operators": operators})


def test_waits_and_operators_of_a_step_with_several_ranks(
    flags, tmp_path, monkeypatch, accelerate_as_before, group_of_one
):
    flags = [*flags, "--in_batch_itc", 0.5]
    check(walk(flags, tmp_path, monkeypatch), SEVERAL_RANKS)


def test_waits_and_operators_of_a_step_with_negatives_from_all_ranks(
    flags, tmp_path, monkeypatch, accelerate_as_before, group_of_one
):
    flags = [*flags, "--negatives_from_all_ranks", "true", "--in_batch_itc", 0.5]
    check(walk(flags, tmp_path, monkeypatch), NEGATIVES_FROM_ALL)


@pytest.mark.parametrize("ranks, limits", [(2, SEVERAL_FROM_ALL), (6, SEVERAL_FETCHED)])
def test_waits_and_operators_of_a_step_with_several_negatives_from_all_ranks(
    ranks, limits, flags, tmp_path, monkeypatch, accelerate_as_before, group_of_one
):
    """On more ranks than a row has negatives the chosen photos' tokens travel, on fewer those of all."""
    monkeypatch.setattr(objective, "world_size", lambda: ranks)
    flags = [*flags, "--negatives_from_all_ranks", "true", *SEVERAL, *LISTS, *CEILING]
    check(walk(flags, tmp_path, monkeypatch), limits)


def waits_of(act) -> int:
    with PretendedDevice() as device:
        x = torch.arange(6.0).view(2, 3).to(DEVICE)
        assert device.waits.total() == 1  # the copy
        device.waits.clear()
        act(x)
        return device.waits.total()


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 1),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),  # it will be read
        lambda x: torch.zeros(2, 3).copy_(x),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: x.unique(),
        lambda x: torch.repeat_interleave(x, torch.ones(2, dtype=torch.long).to(DEVICE, non_blocking=True), dim=0),
        lambda x: torch.equal(x, x),
        lambda x: torch.multinomial(x, 1),
        lambda x: torch.where(x > 1, torch.tensor(1.0), x),
        lambda x: x.__setitem__(x[:, 0].long() * 0, 1.0),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x[x[0, 0].long()],
    ],
)
def test_what_waits_is_counted(act):
    assert waits_of(act) == 1


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.matmul(x.t()).softmax(-1).argmax(-1),
        lambda x: x[x[:, 0].long() * 0],
        lambda x: x.masked_fill(x > 1, 0.0),
        lambda x: x[:, 0].fill_(1.0),
        lambda x: torch.zeros(2, 3).to(DEVICE, non_blocking=True),
        lambda x: torch.full((2,), 3.0, device=x.device) + torch.arange(2, device=x.device),
        lambda x: x.to(x.device).to(torch.float32),
        lambda x: x + torch.tensor(1.0),
    ],
)
def test_what_does_not_wait_is_not_counted(act):
    assert waits_of(act) == 0
