"""What a run measures of itself: speed, share of the device's rate, memory, and a profile of some of its steps."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from runs import log_of, steps_of, trained_in_process, write_split

from aliblip.runtime.mistakes import UsageError
from aliblip.training import meters
from aliblip.training.flops import training_flops
from aliblip.training.meters import Meters, known_peak_tflops, peak_memory_gb
from aliblip.training.profiling import WARM_UP, check_profile
from modeling_aliblip import AliBlipForImageTextRetrieval


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder / "data", "train", 40)
    write_split(folder / "data", "validation", 8)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return ["--data_dir", folder / "data", "--tokenizer_name", folder / "tokenizer"]


def test_speed_and_share_are_those_of_the_time_that_was_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    counted = Meters(torch.device("cpu"), lambda tokens: 10**9 * tokens, peak_tflops=2.0)
    for _ in range(4):
        now[0] += 1.0
        counted.add(rows=10, tokens=70, waited=0.25)
    with counted.paused():
        now[0] += 50.0
    # 40 samples of 7 tokens, 7e9 operations each, in 4 s, of 2e12 a second.
    expected = {"samples_per_second": 80 / 4, "data_wait": 0.25, "mfu": 40 * 7e9 / (4 * 2e12)}
    assert counted.read(processes=2) == pytest.approx(expected)
    counted.restart()
    now[0] += 2.0
    assert counted.read(processes=2) == {"samples_per_second": 0.0, "data_wait": 0.0, "mfu": None}
    counted = Meters(torch.device("cpu"), lambda tokens: 1)
    now[0] += 2.0
    assert counted.read(processes=1)["mfu"] is None


@pytest.mark.parametrize(
    ("name", "precision", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "no", 67),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H20", "bf16", 148),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", 181),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("NVIDIA GeForce GTX 1080", "fp16", None),
    ],
)
def test_gpus_are_known_by_their_names(name, precision, rate):
    assert known_peak_tflops(name, precision) == rate


def test_memory_is_the_most_that_was_held():
    before = peak_memory_gb(torch.device("cpu"))
    held = torch.ones(int((before + 0.1) * 1e9 / 4))  # whatever was held before: more than that at once
    assert peak_memory_gb(torch.device("cpu")) >= held.nbytes / 1e9 > before


@pytest.fixture(scope="module")
def profiled(flags, tmp_path_factory) -> Path:
    """Two epochs of five steps, of which three are profiled: the first three of the second epoch."""
    folder = tmp_path_factory.mktemp("profiled") / "run"
    more = ["--num_train_epochs", 2, "--profile", 3, "--peak_tflops", 0.5]
    trained_in_process([*flags, *more], folder)
    return folder


def test_the_log_has_the_meters(profiled):
    entries = [entry for entry in log_of(profiled) if "loss_itc" in entry]
    config = AliBlipForImageTextRetrieval.from_pretrained(profiled / "last").config
    flops = [training_flops(config, tokens, 20) for tokens in (4, 7)]  # two to five words, [CLS] and [SEP]
    assert len(entries) == 10
    for entry in entries:
        low, high = (entry["samples_per_second"] * one / 0.5e12 for one in flops)
        assert low <= entry["mfu"] <= high
        assert 0.01 < entry["peak_memory_gb"] < 100


def test_a_profile_is_a_trace_and_a_page(profiled):
    page = (profiled / "profile" / "summary.md").read_text()
    assert page.startswith("# Where the time of 3 steps goes\n") and "samples/s of this process" in page
    parts = dict(re.findall(r"^\| ([a-z ]+) \| [\d.]+ \| ([\d.]+)% \|$", page, re.M))
    assert list(parts) == ["read data", "momentum encoders", "forward", "backward", "optimizer", "rest"]
    shares = [float(share) for share in parts.values()]
    assert all(share > 0 for share in shares) and 80 < sum(shares) < 101
    assert float(parts["forward"]) > float(parts["optimizer"])
    operators = re.findall(r"^\| `([^`]+)` \| [\d.]+ \| [\d.]+% \| [\d.e+]+ \|$", page, re.M)
    assert len(operators) == 15 and any(name.startswith("aten::") for name in operators)
    trace = json.loads(gzip.decompress((profiled / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("training step") == 3 and names.count("backward") == 3
    # Nothing of the evaluation before them.
    assert 3 * page.count("momentum encoders") == 3 and names.count("momentum encoders") == 9


def test_a_profile_changes_nothing_and_is_replaced_with_its_run(flags, profiled, tmp_path, capsys):
    folder = tmp_path / "run"
    trained_in_process([*flags, "--num_train_epochs", 2, "--evaluate_every", 0], folder)
    assert steps_of(folder) == steps_of(profiled)
    assert "mfu" not in capsys.readouterr().out  # nobody said what this CPU can do
    (folder / "profile").mkdir()
    (folder / "profile" / "summary.md").write_text("of an earlier run")
    trained_in_process([*flags, "--max_train_steps", 1, "--overwrite_output_dir"], folder)
    assert not (folder / "profile").exists()


@pytest.mark.parametrize(
    ("wanted", "total", "per_epoch", "fits"),
    [(3, 10, 5, True), (3, 5, 5, False), (2, 5, 5, True), (7, 10, 5, True), (7, 6, 2, True), (1, WARM_UP, 9, False)],
)
def test_a_profile_that_a_run_never_comes_to_is_refused(wanted, total, per_epoch, fits):
    if fits:
        check_profile(wanted, total, per_epoch)
    else:
        with pytest.raises(UsageError, match=f"--profile {wanted} does not fit into a run of {total} steps"):
            check_profile(wanted, total, per_epoch)
    check_profile(0, 1, 1)
