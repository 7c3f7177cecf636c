"""`train.py` as a user runs it: real processes, every launcher, resuming, broken rows, mistakes."""

from __future__ import annotations

import io
import json
import shlex
import sys
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import ROOT, assert_succeeded, launch, run, run_forked, run_ranks
from runs import TINY, log_of, photo, steps_of, trained_in_process, write_split
from safetensors.torch import load_file

import train
from aliblip.data import loader
from aliblip.data.readers import Readers
from aliblip.retrieval.arguments import EvaluationArguments, EvaluationDataArguments
from aliblip.runtime.arguments import parse
from aliblip.runtime.mistakes import UsageError
from aliblip.training.arguments import TrainDataArguments, TrainingArguments
from aliblip.training.progress import ITM_PRIOR_LOSS, Log, MatchingHead, Unfailing
from aliblip.training.run import evaluation_command
from aliblip.training.setup import lone_rows
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> list[str]:
    """Flags for 40 training and 12 validation rows; one photo is corrupt and one title blank."""
    folder = tmp_path_factory.mktemp("catalogue")
    broken = {17: {"image": {"bytes": photo(17)[:60], "path": "train17.png"}}, 30: {"caption": "  "}}
    write_split(folder / "data", "train", 40, broken)
    write_split(folder / "data", "validation", 12)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return ["--data_dir", str(folder / "data"), "--tokenizer_name", str(folder / "tokenizer")]


@pytest.fixture(scope="module")
def whole_run(catalogue, tmp_path_factory) -> tuple[Path, str]:
    """Two epochs in one process, a checkpoint in the middle of each."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    flags = ["--output_dir", folder, "--num_train_epochs", "2", "--checkpointing_steps", "3"]
    flags += ["--max_skipped_fraction", "0.2", "--report_to", "tensorboard", "--momentum_warmup", "true"]
    result = launch("cpu.yaml", "train.py", [*TINY, *catalogue, *flags])
    assert_succeeded(result)
    return folder, result.stdout + result.stderr


def test_a_run_leaves_models_that_load_and_says_what_happened(whole_run):
    folder, printed = whole_run
    for name in ("best", "last"):
        model = AliBlipForImageTextRetrieval.from_pretrained(folder / name)
        processor = AliBlipProcessor.from_pretrained(folder / name)
        assert model.config.vision_config.image_size == processor.image_size == 32
        assert model.config.enc_token_id == processor.enc_token_id == len(processor.tokenizer) - 1
        results = json.loads((folder / name / "results.json").read_text())
        assert results["num_images"] == results["num_texts"] == 12 and results["k_rerank"] == 4
    entries = [entry for entry in log_of(folder) if "loss_itc" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, 11))
    for entry in entries:
        assert {
            *("loss_itc", "loss_itm", "learning_rate", "temperature", "itm_accuracy_positive", "itm_accuracy_negative"),
            *("queue_fill", "grad_norm", "samples_per_second", "data_wait"),
        } <= entry.keys()
        assert 0 <= entry["data_wait"] <= 1 and entry["grad_norm"] > 0
    assert entries[0]["queue_fill"] == pytest.approx(8 / 20) and entries[-1]["queue_fill"] == 1.0
    evaluations = [entry["evaluation"] for entry in log_of(folder) if "evaluation" in entry]
    assert len(evaluations) == 2
    best = json.loads((folder / "best" / "results.json").read_text())
    assert best["mean_recall"] == max(evaluation["mean_recall"] for evaluation in evaluations)
    assert "training 0.1 M parameters for 10 steps (2 epochs) of 8 rows x 1 process" in printed
    assert "step 10 epoch 2.00 loss_itc" in printed and "mean of the six ITM recalls" in printed
    assert list((folder / "logs").rglob("events.out.tfevents*"))


def test_a_run_that_goes_well_says_nothing_else(whole_run):
    """Nothing of other libraries, no bar where no terminal is, no empty line between log lines."""
    _, printed = whole_run
    assert "warning" not in printed.lower() and "\r" not in printed and "it/s" not in printed
    lines = printed.splitlines()
    steps = [number for number, line in enumerate(lines) if line.startswith("step ")]
    assert len(steps) == 10
    assert all(lines[number - 1] and lines[number + 1] for number in steps)


def test_broken_rows_are_listed_by_name(whole_run):
    folder, printed = whole_run
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [row["row"] for row in skipped] == [17, 30]
    assert "train17.png" in skipped[0]["name"] and skipped[0]["reason"] and skipped[1]["reason"]
    assert "2 rows could not be used (train17.png, " in printed


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_repeats_the_uninterrupted_one(whole_run, catalogue, tmp_path, step):
    whole, _ = whole_run
    flags = ["--output_dir", tmp_path / "run", "--num_train_epochs", "2", "--max_skipped_fraction", "0.2"]
    flags += ["--resume_from_checkpoint", whole / f"checkpoint-{step}", "--momentum_warmup", "true"]
    assert_succeeded(run_forked([sys.executable, "train.py", *TINY, *catalogue, *flags]))
    resumed, uninterrupted = steps_of(tmp_path / "run"), steps_of(whole)
    assert resumed == {number: values for number, values in uninterrupted.items() if number > step}
    first, second = (AliBlipForImageTextRetrieval.from_pretrained(f / "last") for f in (whole, tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_readers_of_a_run_last_over_its_epochs(catalogue, tmp_path, monkeypatch):
    started = []

    class Counted(Readers):
        def __init__(self, works, *args):
            super().__init__(works, *args)
            started.extend([(type(works[0]).__name__, len(works))] if works else [])

    monkeypatch.setattr(loader, "Readers", Counted)
    flags = [*catalogue, "--num_train_epochs", 3, "--dataloader_num_workers", 2, "--max_skipped_fraction", 0.2]
    trained_in_process(flags, tmp_path / "run")
    assert started == [("_TrainReader", 2), *[("_EvalReader", 2)] * 3]
    assert not active_children()
    assert max(steps_of(tmp_path / "run")) == 15


def test_resuming_with_another_order_of_rows_is_refused(whole_run, mistakes):
    folder, _ = whole_run
    message = mistakes("--resume_from_checkpoint", folder / "checkpoint-3", "--seed", "7", "--shuffle_window", "16")
    assert "in another order" in message and "seed was 42, is 7" in message
    assert message.endswith("resume with --shuffle_window 4096 --seed 42")


class Terminal(io.StringIO):
    """What a terminal shows, line by line."""

    def isatty(self) -> bool:
        return True

    def shown(self) -> list[str]:
        lines = []
        for written in self.getvalue().split("\n"):
            line = ""
            for part in written.split("\r"):
                line = part + line[len(part) :]
            lines.append(line.rstrip())
        return lines


def test_on_a_terminal_the_bar_makes_way_for_every_line(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", Unfailing(terminal))
    log = Log(SimpleNamespace(is_main_process=True), tmp_path, total_steps=3, warmup_steps=0, first_step=0)
    for step in range(2):
        log.end_step(left_out=False)
        log.tell(f"line {step}")
    assert terminal.shown()[:2] == ["line 0", "line 1"]
    assert terminal.shown()[2].startswith("train:") and "2/3" in terminal.shown()[2]
    log.close()
    print("an error", file=sys.stderr)
    assert terminal.shown() == ["line 0", "line 1", "an error", ""]  # and nothing of the bar
    # Another process tells nothing.
    Log(SimpleNamespace(is_main_process=False), tmp_path, total_steps=3, warmup_steps=0, first_step=0).tell("line 2")
    assert len(terminal.shown()) == 4


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_process_runs(tmp_path_factory) -> dict[str, Path]:
    """The demo recipe for four steps under each launcher."""
    folder = tmp_path_factory.mktemp("two_processes")
    small = ["--output_dir", folder / "catalogue", "--num_train", "120", "--num_validation", "8"]
    assert_succeeded(run([sys.executable, ROOT / "demo" / "make_catalogue.py", *small]))
    runs = {}
    for name in ("cpu_2_processes", "deepspeed_zero2_cpu", "deepspeed_zero2_cpu_bf16"):
        runs[name] = folder / name
        flags = ["--config", "recipes/demo.yaml", "--data_dir", folder / "catalogue"]
        flags += ["--tokenizer_name", folder / "catalogue" / "tokenizer", "--output_dir", runs[name]]
        flags += ["--per_device_train_batch_size", "6", "--queue_size", "30", "--max_train_steps", "4"]
        flags += ["--warmup_steps", "1", "--logging_steps", "1", "--checkpointing_steps", "2", "--k_rerank", "4"]
        # ends by comparing the momentum encoders and queues of both ranks bit by bit
        start = launch if "bf16" in name else run_ranks  # the others are launched in test_survival.py
        assert_succeeded(start(f"{name}.yaml", "train.py", flags, timeout=400))
    return runs


def momentum_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "momentum.safetensors")


def test_zero2_in_fp32_reaches_the_losses_of_ddp(two_process_runs):
    ddp, zero = (steps_of(two_process_runs[name]) for name in ("cpu_2_processes", "deepspeed_zero2_cpu"))
    assert ddp.keys() == zero.keys() == {1, 2, 3, 4}
    for step, values in ddp.items():
        assert zero[step] == pytest.approx(values, rel=1e-4), step
    for name, value in momentum_at(two_process_runs["cpu_2_processes"], 4).items():
        other = momentum_at(two_process_runs["deepspeed_zero2_cpu"], 4)[name]
        torch.testing.assert_close(other, value, rtol=0, atol=2e-4, msg=name)


def test_the_momentum_encoders_move_under_zero2_in_bf16(two_process_runs):
    folder = two_process_runs["deepspeed_zero2_cpu_bf16"]
    early, late = momentum_at(folder, 2), momentum_at(folder, 4)
    assert all(value.dtype == torch.float32 for name, value in early.items() if name.startswith("encoders."))
    # Matrices: the average follows the engine's bf16 copies, and bf16 has no number within two steps' reach of the 1.0
    # at which a LayerNorm begins. Of the embedding tables a step touches only the rows of its words.
    weights = [name for name in early if early[name].dim() > 1 and "embeddings" not in name]
    weights = [name for name in weights if name.startswith("encoders.")]
    assert len(weights) >= 30  # of the demo's two towers
    for name in weights:
        moved = (late[name] != early[name]).float().mean().item()
        assert moved > 0.5, (name, moved)
    ddp, zero = steps_of(two_process_runs["cpu_2_processes"]), steps_of(folder)
    for step, values in ddp.items():
        assert zero[step][:2] == pytest.approx(values[:2], rel=0.05), step
    model = AliBlipForImageTextRetrieval.from_pretrained(folder / "last")
    assert model.dtype == torch.float32
    # full-precision weights, not the engine's bf16 copies
    weight = model.vision_model.encoder.layers[0].mlp.fc1.weight
    assert not torch.equal(weight, weight.bfloat16().float())


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mistakes(catalogue, tmp_path, monkeypatch):
    def error(*flags, without: tuple[str, ...] = ()) -> str:
        base = [*TINY, *catalogue, "--output_dir", str(tmp_path / "run"), "--max_skipped_fraction", "0.2"]
        for name in without:
            at = base.index(name)
            del base[at : at + 2]
        monkeypatch.setattr(sys, "argv", ["train.py", *base, *map(str, flags)])
        with pytest.raises(UsageError) as raised:
            train.main()
        assert not torch.distributed.is_initialized()
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return error


def test_mistakes_are_told_before_anything_starts(mistakes, tmp_path):
    assert "no/such/folder" in mistakes("--data_dir", "no/such/folder")
    assert "there are 'image', 'caption', 'product_id'" in mistakes("--caption_column", "title")
    assert "validation" in mistakes("--train_split_name", "training")
    message = mistakes("--per_device_train_batch_size", "41")
    assert "41" in message and "40" in message
    assert "k_rerank is 13, but the gallery has 12 items" in mistakes("--k_rerank", "13")
    assert "image size 30 is not divisible by the patch size 8" in mistakes("--image_size", "30")
    assert "no tokenizer at 'nowhere'" in mistakes("--tokenizer_name", "nowhere")
    assert "--output_dir is missing" in mistakes(without=("--output_dir",))
    assert "give either --config_name" in mistakes(without=("--config_name",))
    assert "no configuration 'nano'" in mistakes("--config_name", "nano")
    assert "no lr_scheduler_type 'cosin'" in mistakes("--lr_scheduler_type", "cosin")
    assert "no checkpoint (it has no state.json)" in mistakes("--resume_from_checkpoint", tmp_path / "nowhere")
    assert "fewer than --gradient_accumulation_steps 9" in mistakes("--gradient_accumulation_steps", "9")
    assert "--alpha is 2.0" in mistakes("--alpha", "2")
    assert "--max_length is 600: the model takes at most 512" in mistakes("--max_length", "600")
    layers = ["--gradient_checkpointing", "true", "--gradient_checkpointing_vision_layers", "9"]
    assert "9 vision layers to checkpoint: the model has 2" in mistakes(*layers)
    assert "--adam_beta1 is 1.0" in mistakes("--adam_beta1", "1")
    (tmp_path / "recipe.yaml").write_text("learning_rates: 1\n")
    assert "unknown key 'learning_rates'" in mistakes("--config", tmp_path / "recipe.yaml")


def test_no_usable_row_is_told_before_anything_starts(mistakes, tmp_path):
    write_split(tmp_path / "data", "train", 12, {i: {"caption": ""} for i in range(12)})
    write_split(tmp_path / "data", "validation", 12)
    assert "usable" in mistakes("--data_dir", tmp_path / "data")
    write_split(tmp_path / "none", "train", 0)
    write_split(tmp_path / "none", "validation", 12)
    assert mistakes("--data_dir", tmp_path / "none")


def test_too_many_broken_rows_stop_the_run_with_the_list(mistakes):
    # The flags come last, so these override the fixture's allowance.
    message = mistakes("--max_skipped_fraction", "0.01", "--evaluate_every", "0")
    assert "of" in message and "--max_skipped_fraction 0.01" in message
    assert "train17.png" in message or "train30.png" in message or "row 30" in message


def test_a_second_run_does_not_touch_the_first(whole_run, mistakes):
    folder, _ = whole_run
    before = (folder / "log.jsonl").read_text()
    assert "holds an earlier run" in mistakes("--output_dir", folder)
    assert (folder / "log.jsonl").read_text() == before


def told_at(losses: list[float], accuracy: float, *, every: int, total_steps: int, warmup_steps: int = 0) -> list[int]:
    """The steps at which log lines with these losses make the warning appear."""
    head = MatchingHead(total_steps, warmup_steps)
    steps = range(every, every * len(losses) + 1, every)
    return [step for step, loss in zip(steps, losses, strict=True) if head.looks_dead(step, loss, accuracy)]


def test_a_dead_matching_head_is_told_once():
    at_prior = [ITM_PRIOR_LOSS + 0.001 * (-1) ** i for i in range(40)]
    assert told_at(at_prior, 0.0, every=50, total_steps=2000) == [750]  # the fifth line after the first quarter
    assert told_at(at_prior, 0.0, every=50, total_steps=2000, warmup_steps=800) == [1050]
    # One that came back to life is dead again later.
    later = [*at_prior[:20], 0.60, *at_prior[:10]]
    assert told_at(later, 0.02, every=50, total_steps=1550) == [600, 1300]


def test_it_is_told_once_when_the_matching_head_wakes_up():
    head = MatchingHead(1000, 0)
    accuracies = [(1.0, 0.0), (0.6, 0.4), (0.0, 1.0), (0.49, 0.9), (0.9, None), (0.52, 0.8), (0.3, 0.9), (0.9, 0.9)]
    assert [step for step, values in enumerate(accuracies) if head.wakes_up(step, *values)] == [5]
    assert head.awake_at == 5


def test_a_young_matching_head_is_left_alone():
    # The demo's losses at every 50th of its 624 steps: it answers "no match" for 250 of them, and learns all the while.
    demo = [0.6396, 0.6371, 0.6345, 0.6315, 0.6292, 0.6126, 0.5772, 0.5366, 0.4702, 0.4066, 0.3649, 0.3077]
    assert told_at(demo, 0.0, every=50, total_steps=624) == []
    # A short run is over before anything can be told.
    assert told_at([ITM_PRIOR_LOSS] * 18, 0.0, every=1, total_steps=18) == []
    assert told_at([ITM_PRIOR_LOSS] * 200, 0.0, every=1, total_steps=200) == []
    # At the prior's loss, but with answers of both kinds; or far above it: both are no dead head.
    assert told_at([ITM_PRIOR_LOSS] * 40, 0.3, every=50, total_steps=2000) == []
    assert told_at([0.69] * 40, 0.0, every=50, total_steps=2000) == []


def test_the_warning_stands_in_the_log_and_its_count_in_the_checkpoint(tmp_path):
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1, log=lambda *args, **kwargs: None)
    written = []

    def lines(log: Log, steps: range) -> None:
        log.bar = SimpleNamespace(write=written.append)
        for step in steps:
            sums = torch.tensor([1.0, ITM_PRIOR_LOSS, 0.0, 1.0, 1.0, 0.0])
            log.sums, log.batches = torch.stack([sums, torch.ones(6)]), 1
            on_device = {"temperature": torch.tensor(0.07), "queue_fill": torch.tensor(1.0)}
            log.line(step, 1.0, on_device, learning_rate=0.1, grad_norm=1.0)

    options = {"total_steps": 800, "warmup_steps": 0}
    first = Log(accelerator, tmp_path, **options, first_step=0)
    lines(first, range(150, 251, 10))  # the young ones, and four that count: 210 to 240, and 250
    (warning,) = [line for line in written if line.startswith("warning")]
    assert "0.6365" in warning and '"no match"' in warning
    written.clear()
    stopped = Log(accelerator, tmp_path, **options, first_step=0)
    lines(stopped, range(210, 241, 10))
    resumed = Log(accelerator, tmp_path, **options, first_step=240)
    resumed.load_state(stopped.state())
    assert not [line for line in written if line.startswith("warning")]
    lines(resumed, range(250, 251, 10))
    assert [line for line in written if line.startswith("warning")] == [warning]


def test_a_trained_model_at_a_size_that_does_not_fit_is_told(whole_run, mistakes):
    folder, _ = whole_run
    scratch = ("--config_name", "--vision_config", "--text_config", "--image_text_hidden_size", "--tokenizer_name")
    go_on = ["--model_name_or_path", folder / "last", "--image_size", "30"]
    assert "image size 30 is not divisible by the patch size 8" in mistakes(*go_on, without=(*scratch, "--image_size"))
    go_on[1] = folder
    assert "config.json" in mistakes(*go_on, without=(*scratch, "--image_size"))


def test_mistakes_end_with_exit_code_2_and_one_line(catalogue, tmp_path):
    result = run([sys.executable, "train.py", *TINY, *catalogue, "--output_dir", tmp_path, "--k_rerank", "99"])
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    assert lines == [
        "train.py: error: k_rerank is 99, but the gallery has 12 items: give a number from 1 to 12, or leave it out"
    ]
    result = launch(
        "cpu_2_processes.yaml", "train.py", [*TINY, *catalogue, "--output_dir", tmp_path, "--k_rerank", "99"]
    )
    assert result.returncode != 0
    assert (result.stdout + result.stderr).count("train.py: error: k_rerank is 99") == 1


PLANTED = """
import sys

import train
from aliblip.runtime.mistakes import main_with_usage_errors
from {module} import {owner}


def broken(*args, **kwargs):
    raise ValueError("planted\\non two lines")


{owner}.{name} = broken
main_with_usage_errors("train.py", train.main)
"""


@pytest.mark.parametrize(
    "place",
    [
        {"module": "aliblip.data.loader", "owner": "TrainLoader", "name": "__init__"},  # while it is set up
        {"module": "aliblip.training.objective", "owner": "RetrievalObjective", "name": "forward"},  # in the loop
    ],
    ids=["set-up", "loop"],
)
def test_a_bug_of_ours_keeps_its_traceback(catalogue, tmp_path, place):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.format(**place))
    flags = [*TINY, *catalogue, "--output_dir", tmp_path / "run", "--max_skipped_fraction", "0.2"]
    result = run_forked([sys.executable, script, *flags])
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr and "planted.py" in result.stderr
    assert result.stderr.endswith("ValueError: planted\non two lines\n")
    assert "train.py: error" not in result.stderr


@pytest.mark.parametrize("shown", [{}, {"ALIBLIP_TRACEBACK": "0"}, {"ALIBLIP_TRACEBACK": "1"}])
def test_a_mistake_is_one_line_and_a_traceback_if_asked_for(catalogue, tmp_path, shown):
    flags = [*TINY, *catalogue, "--output_dir", tmp_path / "run", "--alpha", "2"]
    result = run_forked([sys.executable, "train.py", *flags], env=shown)
    assert result.returncode == 2
    line = "train.py: error: --alpha is 2.0: it must be from 0 to 1\n"
    if shown.get("ALIBLIP_TRACEBACK") == "1":
        assert result.stderr.endswith(line) and "Traceback (most recent call last)" in result.stderr
    else:
        assert result.stderr == line


def test_mistakes_of_the_loop_are_one_line_too(catalogue, tmp_path):
    flags = [*TINY, *catalogue, "--output_dir", tmp_path / "run", "--max_skipped_fraction", "0.01"]
    result = run_forked([sys.executable, "train.py", *flags, "--evaluate_every", "0"])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith("train.py: error: ") and "more than --max_skipped_fraction 0.01" in line


def test_settings_with_which_a_run_can_not_learn_are_told(catalogue, tmp_path, capsys):
    flags = [*catalogue, "--max_skipped_fraction", "0.2", "--evaluate_every", 0, "--max_train_steps", 1]
    told = "warning: --warmup_steps 2 is not below the 1 steps of the run: the learning rate never reaches its peak"
    trained_in_process([*flags, "--warmup_steps", 2, "--per_device_train_batch_size", 1], tmp_path / "long")
    printed = capsys.readouterr().out
    assert told in printed and "warning: --per_device_train_batch_size 1 leaves no row that a photo" in printed
    trained_in_process(flags, tmp_path / "none")
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "processes", "is_told"),
    [
        ({}, 1, True),
        ({}, 4, True),
        ({"negatives_from_all_ranks": True}, 1, True),
        ({"negatives_from_all_ranks": True}, 4, False),
        ({"itm_queue_titles": 1}, 1, False),
        ({"per_device_train_batch_size": 2}, 1, False),
    ],
)
def test_a_batch_of_one_row_has_no_negative(changes, processes, is_told):
    args = replace(TrainingArguments(), **{"per_device_train_batch_size": 1, **changes})
    assert (lone_rows(args, processes) is not None) == is_told


def test_trackers_are_looked_for_at_once(mistakes):
    assert mistakes("--report_to", "paper").startswith("--report_to is 'paper': give one or several of ")
    assert mistakes("--report_to", "aim") == "--report_to aim is not installed: pip install aim, or --report_to none"


@pytest.mark.parametrize(
    ("given", "evaluated"),
    [
        ({"data_dir": "my photos"}, {"data_dir": "my photos"}),
        (
            {"dataset_name": "me/mugs", "validation_split_name": "test", "dataloader_num_workers": 7},
            {"dataset_name": "me/mugs", "split_name": "test"},
        ),
        (
            {"train_file": "train.json", "validation_file": "val-*.json", "image_dir": "photos", "caption_column": "t"},
            {"data_files": "val-*.json", "image_dir": "photos", "caption_column": "t"},
        ),
    ],
)
def test_the_next_command_evaluates_on_the_same_data(given, evaluated):
    command = evaluation_command(Path("outputs/best"), TrainDataArguments(**given))
    words = shlex.split(command)
    place = next(index for index, word in enumerate(words) if word.endswith("evaluate_retrieval.py")) + 1
    data, options = parse([EvaluationDataArguments, EvaluationArguments], words[place:])
    assert options == EvaluationArguments(model_name_or_path="outputs/best")
    assert data == EvaluationDataArguments(**evaluated)
