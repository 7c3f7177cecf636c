"""Training steps on a GPU: samples a second, share of the device's matrix-product rate (MFU), memory, waits, profile.

    python benchmarks/gpu_steps.py --json steps.json                    # ViT-L/16 at 384 px, random weights
    python benchmarks/gpu_steps.py --tiny --json steps.json             # towers of two layers, to try it on a CPU

The step is that of `train.py` (momentum targets, objective, backward and step, queue, clamp, average) on one process,
with photos that are on the device already and titles of 6 to 20 tokens. MFU counts `training_flops` against a bf16
matrix product of 8192 rows and columns, measured first; "fp8" is bf16 with `--fp8`, which needs torchao, and its MFU
counts against bf16 too. Each variant is written to the file as soon as it is there. The
last line is the best variant's samples a second over those of the plain way: fp32, eager attention.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from aliblip.runtime.accelerator import build_accelerator
from aliblip.training.compiling import CompiledTowers
from aliblip.training.flops import training_flops
from aliblip.training.fp8 import Float8Towers
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.step import backward_and_step, clamp_parameter
from benchmarks.common import circumstances, finish, parser
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval

SHORTEST, LONGEST = 6, 20
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
NAMES = ("precision", "attention", "batch", "checkpointing", "compiled")
PLAIN = ("no", "eager", 16, False, False)
VARIANTS = [
    PLAIN,
    ("bf16", "eager", 32, False, False),
    ("bf16", "sdpa", 16, False, False),
    ("bf16", "sdpa", 32, False, False),
    ("bf16", "sdpa", 64, False, False),
    ("bf16", "sdpa", 96, False, False),
    ("bf16", "sdpa", 96, False, True),
    ("bf16", "sdpa", 64, True, False),
    ("fp8", "sdpa", 96, False, True),
    ("fp8", "sdpa", 96, False, False),
]


def main(command_line: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tiny", action="store_true", help="towers of two layers, 32 px, batches of 4")
    arguments.add_argument("--steps", type=int, default=6, help="measured steps of a variant, after three others")
    arguments.add_argument("--seconds", type=float, default=1e9, help="begin no variant after so many seconds")
    arguments.add_argument("--only", default="", help="numbers of the variants, such as 0,3")
    args = arguments.parse_args(command_line)
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate(device, 256 if args.tiny else 8192)
    print(f"a bf16 matrix product: {rate / 1e12:.4g} TFLOP/s", flush=True)
    table = {"matmul_flops_per_second": rate, "variants": []}
    chosen = [int(number) for number in args.only.split(",")] if args.only else range(len(VARIANTS))
    for variant in (VARIANTS[number] for number in chosen):
        if time.perf_counter() - began > args.seconds:
            row = {"not_run": f"after {args.seconds:.0f} s"}
        else:
            row = measured(variant, args, device, rate)
        table["variants"].append(dict(zip(NAMES, variant, strict=True)) | row)
        print(json.dumps({key: value for key, value in table["variants"][-1].items() if key != "profile"}), flush=True)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({**table, **circumstances()}, indent=2) + "\n")
    speeds = [row.get("samples_per_second", 0.0) for row in table["variants"]]
    finish("gpu_steps", max(speeds) / speeds[0] if speeds[0] else float("nan"), table, args.json)


def matmul_rate(device: torch.device, size: int) -> float:
    """Floating-point operations a second of a square bf16 matrix product; median of ten."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for number in range(13):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        if number >= 3:
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def measured(variant: tuple, args, device: torch.device, rate: float) -> dict:
    """One variant's numbers; where it fails, why."""
    try:
        return Steps(variant, args.tiny, device).measure(args.steps, rate)
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError):
            traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class Steps:
    """What `train.py` sets up for its loop, with random weights and batches."""

    def __init__(self, variant: tuple, tiny: bool, device: torch.device):
        precision, attention, batch, checkpointing, compiled = variant
        self.device, self.batch_size = device, 4 if tiny else batch
        self.queue_size = 64 if tiny else 57_600
        if tiny:
            config = AliBlipConfig(
                vision_config={**TINY, "image_size": 32}, text_config=TINY, image_text_hidden_size=16
            )
        else:
            config = AliBlipConfig.from_size("large", vision_config={"image_size": 384})
        torch.manual_seed(0)
        AcceleratorState._reset_state(True)  # of the variant before, in another precision
        in_8_bits = precision == "fp8"
        self.accelerator = build_accelerator(
            mixed_precision="bf16" if in_8_bits else precision,
            max_grad_norm=1.0,
            per_device_train_batch_size=self.batch_size,
        )
        self.model = AliBlipForImageTextRetrieval(config).to(device)
        self.model.set_attn_implementation(attention)
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        self.momentum = MomentumState(
            self.model,
            queue_size=self.queue_size,
            embedding_size=config.image_text_hidden_size,
            autocast_dtype=self.accelerator.autocast_dtype,
        ).to(device)
        if in_8_bits:
            Float8Towers.emulate = device.type == "cpu"
            Float8Towers(self.model, self.momentum.encoders)
        self.compiled = CompiledTowers(self.model, self.momentum.encoders) if compiled else None
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)
        objective = RetrievalObjective(self.model, longest_title=LONGEST).train()
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.batches = [self._batch(number) for number in range(4)]

    def _batch(self, number: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(number)
        rows, size = self.batch_size, self.model.config.vision_config.image_size
        lengths = torch.randint(SHORTEST, LONGEST + 1, (rows,), generator=generator)
        vocabulary = self.model.config.text_config.vocab_size
        return {
            "pixel_values": torch.randn(rows, 3, size, size, generator=generator).to(self.device),
            "input_ids": torch.randint(5, vocabulary - 2, (rows, LONGEST), generator=generator).to(self.device),
            "attention_mask": (torch.arange(LONGEST) < lengths[:, None]).long().to(self.device),
            "product_id": (torch.arange(rows) + number * rows).to(self.device),
            "title_lengths": lengths.tolist(),
        }

    def step(self, number: int) -> None:
        batch = self.batches[number % len(self.batches)]
        self.momentum.update(self.model)
        with self.accelerator.accumulate(self.objective):
            targets = self.momentum.encode(batch)
            output = self.objective(batch, targets, 0.4)
            outcome = backward_and_step(self.accelerator, self.objective, self.optimizer, output.loss, 1.0)
        self.momentum.enqueue(targets, batch["product_id"])
        clamp_parameter(self.model.temp, 0.001, 0.5)
        outcome.read()

    def measure(self, steps: int, rate: float) -> dict:
        seconds = []
        began = time.perf_counter()
        for number in range(3 + steps):
            synchronize(self.device)
            start = time.perf_counter()
            self.step(number)
            synchronize(self.device)
            if number == 2:
                set_up = time.perf_counter() - began
            if number >= 3:
                seconds.append(time.perf_counter() - start)
        per_step = statistics.median(seconds)
        flops = self.batch_size * training_flops(self.model.config, (SHORTEST + LONGEST) / 2, self.queue_size)
        return {
            "batch": self.batch_size,
            "seconds_per_step": per_step,
            "spread": max(seconds) / min(seconds),
            "samples_per_second": self.batch_size / per_step,
            "mfu": flops / per_step / rate,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None,
            "seconds_of_three_first_steps": set_up,
            "compiled_graphs": self.compiled.graphs if self.compiled is not None else 0,
            "waits": self.waits(),
            "profile": self.profiled(),
        }

    def waits(self) -> dict[str, int]:
        """Where the host waits for the device in one step, and how often."""
        if self.device.type != "cuda":
            return {}
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.step(0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        root = Path(__file__).resolve().parent.parent
        places = Counter()
        for one in heard:
            if "synchronizing CUDA operation" in str(one.message):
                file = Path(one.filename)
                places[f"{file.relative_to(root) if file.is_relative_to(root) else file.name}:{one.lineno}"] += 1
        return dict(places.most_common())

    def profiled(self) -> dict:
        """The kernels that take the most time in one step, how many are launched, and how long the device works."""
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as seen:
            start = time.perf_counter()
            self.step(1)
            synchronize(self.device)
            wall = time.perf_counter() - start
        averages = seen.key_averages()
        spent = (lambda one: one.self_device_time_total) if on_gpu else (lambda one: one.self_cpu_time_total)
        kernels = [one for one in averages if str(one.device_type).endswith("CUDA")] if on_gpu else list(averages)
        kernels.sort(key=spent, reverse=True)
        return {
            "wall_ms": wall * 1e3,
            "device_busy_ms": sum(map(spent, kernels)) / 1e3,
            "launches": sum(one.count for one in kernels),
            "operators": sum(one.count for one in averages if one.key.startswith("aten::")),
            "kernels": [{"name": one.key[:90], "ms": spent(one) / 1e3, "count": one.count} for one in kernels[:25]],
        }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
