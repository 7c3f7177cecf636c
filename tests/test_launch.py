"""Each launcher configuration starts what it says, and every way to train gives the same numbers."""

import json
import math
import os
import subprocess
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import accelerator_probe as probe
import psutil
import pytest
import torch
import yaml
from helpers import CONFIGS, ROOT, assert_succeeded, launch

from aliblip.runtime import accelerator as ours
from aliblip.runtime.mistakes import UsageError

PROBE = ROOT / "tests" / "accelerator_probe.py"
DEEPSPEED = [name for name in sorted(os.listdir(CONFIGS)) if name.startswith("deepspeed")]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Reports of all ranks of a configuration; each is started once for this module."""

    @cache
    def start(config: str) -> list[dict]:
        output = tmp_path_factory.mktemp(Path(config).stem)
        assert_succeeded(launch(config, PROBE, [output]))
        return [json.loads(file.read_text()) for file in sorted(output.glob("rank*.json"))]

    return start


def reference() -> dict:
    """The slow obvious version: plain torch, one process, the whole batch."""
    model = probe.Tiny()
    optimizer = probe.make_optimizer(model)
    losses, norms = [], []
    for step in range(probe.STEPS):
        total = 0.0
        for micro_step in range(probe.ACCUMULATION):
            loss = model(*probe.micro_batch(step, micro_step)) / probe.ACCUMULATION
            loss.backward()
            total += loss.item()
        losses.append(total)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), probe.MAX_GRAD_NORM).item()
        if step == probe.BROKEN_STEP:
            norm = math.inf
        else:
            optimizer.step()
        optimizer.zero_grad()
        norms.append(norm)
        model.temp.data.clamp_(*probe.TEMPERATURE)
    return {
        "losses": losses,
        "norms": norms,
        "temp": model.temp.item(),
        "weights": torch.cat([weight.detach().flatten() for weight in model.parameters()]).tolist(),
    }


@pytest.mark.parametrize(
    "config, kind, world, wrapper",
    [
        ("cpu.yaml", "NO", 1, "Tiny"),
        ("cpu_2_processes.yaml", "MULTI_CPU", 2, "DistributedDataParallel"),
        ("deepspeed_zero2_cpu.yaml", "DEEPSPEED", 2, "DeepSpeedEngine"),
        ("deepspeed_zero2_cpu_bf16.yaml", "DEEPSPEED", 2, "DeepSpeedEngine"),
    ],
)
def test_starts_what_it_says(started, config, kind, world, wrapper):
    reports = started(config)
    assert len(reports) == world
    for rank, report in enumerate(reports):
        assert report["num_processes"] == report["world_size"] == world
        assert report["process_index"] == report["rank"] == rank
        assert report["is_main_process"] is (rank == 0)
        assert report["backend"] == ("gloo" if world > 1 else None)
        assert report["device"] == "cpu"
        assert report["distributed_type"] == kind
        assert report["wrapper"] == wrapper
        assert report["mixed_precision"] == ("bf16" if "bf16" in config else "no")
        assert not report["prepares_loaders"]


@pytest.mark.parametrize("config", ["cpu.yaml", "cpu_2_processes.yaml", "deepspeed_zero2_cpu.yaml"])
def test_same_numbers_as_one_process_of_plain_torch(started, config):
    expected = reference()
    assert max(n for n in expected["norms"] if n < math.inf) > probe.MAX_GRAD_NORM, "clipping must be at work"
    for report in started(config):
        assert report["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert report["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert report["weights"] == pytest.approx(expected["weights"], rel=1e-4, abs=1e-5)
        assert report["broken_step_changed_weights"] is False


@pytest.mark.parametrize("config", ["deepspeed_zero2_cpu.yaml", "deepspeed_zero2_cpu_bf16.yaml"])
def test_the_arguments_reach_the_engine(started, config):
    for report in started(config):
        assert report["engine"] == {
            "stage": 2,
            "gradient_clipping": probe.MAX_GRAD_NORM,
            "micro_batch": 4,
            "accumulation": probe.ACCUMULATION,
            "train_batch_size": 4 * probe.ACCUMULATION * 2,
            "optimizer": "torch.optim.adamw",
        }


def test_bf16_engine_keeps_fp32_masters(started):
    expected = reference()
    for report in started("deepspeed_zero2_cpu_bf16.yaml"):
        assert report["dtypes"] == ["torch.bfloat16"]
        assert report["masters_are_finer"] and report["saved_equals_masters"]
        # merely close: the forward runs in bfloat16
        assert report["losses"] == pytest.approx(expected["losses"], rel=0.05)
        assert report["norms"][probe.BROKEN_STEP] == math.inf
        assert report["broken_step_changed_weights"] is False


@pytest.mark.parametrize(
    "config", ["cpu.yaml", "cpu_2_processes.yaml", "deepspeed_zero2_cpu.yaml", "deepspeed_zero2_cpu_bf16.yaml"]
)
def test_the_clamp_holds_in_the_master_and_in_the_module(started, config):
    low, high = probe.TEMPERATURE
    edge = torch.tensor([low, high]).tolist()  # as float32
    for report in started(config):
        assert report["temp"] in edge, "the learning rate is chosen so that the clamp is at work"
        assert report["temp_in_module"] == pytest.approx(report["temp"], rel=2**-8)


def test_deepspeed_that_use_cpu_would_switch_off_is_an_error(tmp_path):
    result = launch("deepspeed_zero2_cpu.yaml", PROBE, [tmp_path], env={"ACCELERATE_USE_CPU": "true"})
    assert result.returncode != 0
    assert "remove use_cpu from its configuration" in result.stderr
    assert not list(tmp_path.iterdir())


def test_one_process_where_two_were_asked_for_is_noticed(tmp_path):
    result = launch("cpu.yaml", PROBE, [tmp_path], launcher_args=["--num_processes", "2"])
    assert_succeeded(result)
    assert len(list(tmp_path.iterdir())) == 1
    assert "use accelerate_configs/cpu_2_processes.yaml" in " ".join(result.stderr.split())


def test_the_helper_leaves_no_process_behind(tmp_path):
    script = tmp_path / "wait.py"
    script.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    for timeout in (15, 60, 240):  # a busy machine may not have started both in a short time
        with pytest.raises(subprocess.TimeoutExpired):
            launch("cpu_2_processes.yaml", script, timeout=timeout)
        if all((tmp_path / rank).exists() for rank in "01"):
            break
    workers = [int((tmp_path / rank).read_text()) for rank in "01"]
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)], timeout=60)
    assert not alive


def test_a_count_of_processes_that_differs_from_the_launcher_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    lonely = SimpleNamespace(num_processes=1)
    with pytest.raises(UsageError, match="started 2 processes, the process group has 1 and accelerate counts 1"):
        ours._check_launch(lonely, False)


def test_the_time_that_a_process_waits_for_the_others_is_given_on(monkeypatch):
    seen = []

    class Stop(Exception):
        pass

    def accelerator(**options):
        seen.extend(handler for handler in options["kwargs_handlers"] if hasattr(handler, "timeout"))
        raise Stop

    monkeypatch.setattr(ours, "AliBlipAccelerator", accelerator)
    monkeypatch.setenv("LOCAL_RANK", "0")
    for gpu, backend in ((False, "gloo"), (True, "nccl")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with pytest.raises(Stop):
            build(timeout=timedelta(days=1))
        assert (seen[-1].backend, seen[-1].timeout) == (backend, timedelta(days=1))


@pytest.mark.parametrize(
    "config, environment, argument, expected",
    [
        (None, {}, None, "no"),
        (None, {"MIXED_PRECISION": "bf16"}, None, "bf16"),
        (None, {"MIXED_PRECISION": "bf16"}, "no", "no"),
        ({"bf16": {"enabled": True}}, {"MIXED_PRECISION": "no"}, None, "bf16"),
        ({"bf16": {"enabled": False}}, {}, None, "no"),
        ({"bf16": {"enabled": "auto"}}, {}, "bf16", "bf16"),
    ],
)
def test_the_precision_is_known_beforehand(monkeypatch, tmp_path, config, environment, argument, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if config is not None:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | config))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    for key, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_{key}", value)
    assert ours.launched_precision(argument) == expected


def build(**arguments):
    return ours.build_accelerator(**{"max_grad_norm": 1.0, "per_device_train_batch_size": 4} | arguments)


@pytest.mark.parametrize(
    "config, environment, arguments, message",
    [
        ({"bf16": {"enabled": True}}, {}, {"mixed_precision": "no"}, "no contradicts .*ds.json, which says bf16"),
        ({"bf16": {"enabled": False}}, {}, {"mixed_precision": "bf16"}, "bf16 contradicts .*ds.json, which says no"),
        ({"bf16": {"enabled": False}}, {"MIXED_PRECISION": "bf16"}, {}, "bf16 contradicts"),
        ({"fp16": {"enabled": True}}, {}, {}, "enables fp16"),
        ({"gradient_clipping": 0.5}, {}, {}, "sets gradient_clipping to 0.5 and the arguments to 1.0"),
        ({"train_micro_batch_size_per_gpu": 16}, {}, {}, "sets train_micro_batch_size_per_gpu to 16"),
        ({"gradient_accumulation_steps": 3}, {}, {"gradient_accumulation_steps": 2}, "accumulation_steps to 3"),
        ({"zero_optimization": {"stage": 3}}, {}, {}, "stage 3"),
        ({"zero_optimization": {"stage": 0}}, {}, {}, "stage 0; accepted are 1 and 2"),
        ({}, {"GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "launcher sets 4 gradient accumulation steps"),
        ({}, {"MIXED_PRECISION": "fp8"}, {}, "launcher's mixed_precision is 'fp8'"),
        ({}, {}, {"mixed_precision": "fp16"}, "--mixed_precision is 'fp16'; accepted are no, bf16"),
        (None, {}, {}, "cannot read the DeepSpeed configuration"),
    ],
)
def test_contradictions_are_one_line_errors_before_anything_starts(
    monkeypatch, tmp_path, config, environment, arguments, message
):
    file = tmp_path / "ds.json"
    if config is not None:
        file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | config))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    for key, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_{key}", value)
    with pytest.raises(UsageError, match=message) as error:
        build(**arguments)
    assert "\n" not in str(error.value)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("in_file", ["auto", 0.25, None])
def test_settings_that_agree_or_are_open_are_filled_in(monkeypatch, tmp_path, in_file):
    file = tmp_path / "ds.json"
    clipping = {} if in_file is None else {"gradient_clipping": in_file}
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": "auto"} | clipping))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    settings = {
        "gradient_clipping": 0.25,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
    }
    plugin = ours._deepspeed_plugin("bf16", **settings)
    assert settings.items() <= plugin.deepspeed_config.items()
    assert "train_batch_size" not in plugin.deepspeed_config
    assert plugin.deepspeed_config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    # the fields of an accelerate YAML instead of a JSON file
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    assert settings.items() <= ours._deepspeed_plugin(None, **settings).deepspeed_config.items()


@pytest.mark.parametrize("name", sorted(os.listdir(CONFIGS)))
def test_configuration_files(name):
    text = (CONFIGS / name).read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert f"accelerate launch --config_file accelerate_configs/{name}" in header
    config = yaml.safe_load(text)
    assert config["compute_environment"] == "LOCAL_MACHINE"
    expected = {
        "cpu.yaml": ("NO", 1, 1, "no"),
        "cpu_2_processes.yaml": ("MULTI_GPU", 1, 2, "no"),
        "single_gpu.yaml": ("NO", 1, 1, "bf16"),
        "multi_gpu.yaml": ("MULTI_GPU", 1, 8, "bf16"),
        "multi_node.yaml": ("MULTI_GPU", 2, 16, "bf16"),
        "deepspeed_zero2.yaml": ("DEEPSPEED", 1, 8, None),
        "deepspeed_zero2_cpu.yaml": ("DEEPSPEED", 1, 2, None),
        "deepspeed_zero2_cpu_bf16.yaml": ("DEEPSPEED", 1, 2, None),
    }[name]
    found = tuple(config.get(key) for key in ("distributed_type", "num_machines", "num_processes", "mixed_precision"))
    assert found == expected
    assert config.get("use_cpu", False) is (name == "cpu.yaml")
    if config["num_machines"] > 1:
        assert config["main_process_ip"] and config["main_process_port"]


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_files(name):
    fields = yaml.safe_load((CONFIGS / name).read_text())["deepspeed_config"]
    # accelerate refuses a JSON file beside fields that could stand in it
    assert set(fields) == {"deepspeed_config_file", "zero3_init_flag"}
    config = json.loads((ROOT / fields["deepspeed_config_file"]).read_text())
    assert "auto" not in json.dumps(config)
    assert config["zero_optimization"]["stage"] == 2
    assert config["bf16"]["enabled"] is (name != "deepspeed_zero2_cpu.yaml")
    # what train.py's arguments say must not stand here a second time; the optimizer is torch's AdamW
    owned = {"gradient_clipping", "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"}
    assert not (owned | {"optimizer", "scheduler"}) & set(config)
