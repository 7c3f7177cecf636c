"""Trackers: several at once, named, with all arguments, and the run of a tracker goes on with its run."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny
from accelerate import tracking
from accelerate.utils import LoggerType
from runs import trained_in_process, write_split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aliblip.runtime.mistakes import UsageError
from aliblip.training.trackers import IDS, check_trackers, continued, named_trackers, new_ones, settings


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder / "data", "train", 16)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    flags = ["--data_dir", folder / "data", "--tokenizer_name", folder / "tokenizer", "--evaluate_every", 0]
    return [*flags, "--num_train_epochs", 2, "--checkpointing_steps", 1]


class Wandb(ModuleType):
    """A package that remembers what it was told."""

    def __init__(self):
        super().__init__("wandb")
        self.begun: list[dict] = []
        self.logged: dict[str, list] = defaultdict(list)
        self.config = SimpleNamespace(update=self._update)
        self.settings: dict = {}

    def _update(self, values: dict, allow_val_change: bool) -> None:
        self.settings = values

    def init(self, **told):
        self.begun.append(told)
        log = self.logged[told["id"]]
        return SimpleNamespace(log=lambda values, step, **_: log.append(step), finish=lambda: None)


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    made = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", made)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    return made


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_several_trackers_are_told_everything_and_their_runs_go_on(flags, tmp_path, wandb, capsys):
    folder = tmp_path / "mugs"
    both = ["--report_to", "tensorboard,wandb", "--project_name", "shop", "--peak_tflops", 1]
    trained_in_process([*flags, *both], folder)
    (first,) = wandb.begun
    assert (first["project"], first["name"], first["resume"]) == ("shop", "mugs", "allow")
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": first["id"]}
    arguments = json.loads((folder / "arguments.json").read_text())
    assert wandb.settings.keys() == arguments.keys()
    assert wandb.settings["queue_size"] == 20 and wandb.settings["data_dir"] == str(flags[1])
    assert wandb.settings["max_train_steps"] == "None"
    assert wandb.logged == {first["id"]: [1, 2, 3, 4]}
    losses = scalars(folder / "logs" / "shop", "loss_itc")
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    for meter in ("peak_memory_gb", "samples_per_second", "data_wait", "mfu"):
        assert len(scalars(folder / "logs" / "shop", meter)) == 4

    # It goes on from step 2: the same run of both, and what is trained again stands there once.
    trained_in_process([*flags, *both, "--resume_from_checkpoint", folder / "checkpoint-2"], folder)
    assert wandb.begun[1] == first and wandb.logged == {first["id"]: [1, 2, 3, 4, 3, 4]}
    assert scalars(folder / "logs" / "shop", "loss_itc") == losses
    assert "trackers that begin a new run" not in capsys.readouterr().out

    # Another run in this folder, and one that goes on in another folder, are others.
    trained_in_process([*flags, *both, "--overwrite_output_dir", "--run_name", "second"], folder)
    third = wandb.begun[2]
    assert third["id"] != first["id"] and third["name"] == "second"
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": third["id"]}
    more = ["--resume_from_checkpoint", folder / "checkpoint-2"]
    trained_in_process([*flags, *both, *more], tmp_path / "elsewhere")
    assert wandb.begun[3]["id"] not in (first["id"], third["id"]) and wandb.begun[3]["name"] == "elsewhere"


def test_what_each_tracker_is_told(tmp_path):
    names = ["tensorboard", "wandb", "trackio", "mlflow", "swanlab", "aim"]
    told = continued(names, tmp_path / "mugs", None, None)
    assert told["tensorboard"] == told["aim"] == {} and told["mlflow"] == {"run_name": "mugs"}
    assert told["trackio"] == {"name": "mugs", "resume": "allow"}
    assert told["swanlab"].keys() == {"experiment_name", "id", "resume"} and len(told["swanlab"]["id"]) == 21
    (tmp_path / "mugs").mkdir()
    (tmp_path / "mugs" / "trackers.json").write_text('{"wandb": "abc", "mlflow": "123"}')
    told = continued(names, tmp_path / "mugs", "my run", 30)
    assert told["wandb"] == {"name": "my run", "id": "abc", "resume": "allow"}
    assert told["mlflow"] == {"run_name": "my run", "run_id": "123"}
    assert told["tensorboard"] == {"purge_step": 31}
    assert new_ones(names) == ["aim"]
    (tmp_path / "mugs" / "trackers.json").write_text('{"wandb": "ab')  # cut off
    assert len(continued(names, tmp_path / "mugs", None, 30)["wandb"]["id"]) == 21


def test_lists_of_trackers(wandb):
    assert named_trackers("none") == [] and named_trackers("all") == ["tensorboard", "wandb"]
    assert named_trackers("wandb, tensorboard,wandb") == ["wandb", "tensorboard"]
    check_trackers("tensorboard,wandb", "shop")
    for given, message in {
        "tensorboard,paper": "--report_to is 'tensorboard,paper': give one or several of ",
        "none,wandb": "--report_to is 'none,wandb': give one or several of ",
        "wandb,all": "--report_to is 'wandb,all': give one or several of ",
        ",": "--report_to is ',': give one or several of ",
        "wandb,aim": "--report_to aim is not installed: pip install aim",
    }.items():
        with pytest.raises(UsageError, match=message):
            check_trackers(given, "shop")
    for name in ("a/b", "..", ""):
        with pytest.raises(UsageError, match="--project_name is"):
            check_trackers("none", name)


def test_settings_are_numbers_and_words():
    given = {"a": 1, "b": True, "c": None, "d": [1, 2], "e": 0.5, "f": "x"}
    assert settings(given) == {"a": 1, "b": True, "c": "None", "d": "[1, 2]", "e": 0.5, "f": "x"}


@pytest.mark.parametrize("content", ['{"wandb": "ab', "[" * 100_000, "[1]"])
def test_ids_that_are_damaged_are_told(tmp_path, capsys, content):
    (tmp_path / IDS).write_text(content)
    told = continued(["wandb"], tmp_path, None, step=5)
    assert len(told["wandb"]["id"]) == 21
    line = capsys.readouterr().err
    assert "trackers.json can't be read" in line and "begin new runs" in line and line.count("\n") == 1
    (tmp_path / IDS).unlink()  # a run of before has none
    continued(["wandb"], tmp_path, None, step=5)
    assert not capsys.readouterr().err
