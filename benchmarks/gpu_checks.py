"""What only a machine with a GPU can show: the same numbers as on the CPU, resuming, bf16, ZeRO-2, the pipeline.

    python benchmarks/gpu_checks.py --json checks.json            # about a minute
    python benchmarks/gpu_checks.py --only step,pipeline          # some of them

The runs of `train.py` go side by side, on a small catalogue drawn for them. Without a GPU everything runs on the CPU,
to try it. The last line is the share of the checks that held; each that did not is told with its last lines.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

import aliblip  # noqa: F401  (registers the pipeline)
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from benchmarks.common import finish, parser
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS = 6


def main(command_line: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", default=",".join(CHECKS), help="comma-separated names: " + ", ".join(CHECKS))
    arguments.add_argument("--folder", type=Path, help="where the runs are kept (default: a temporary folder)")
    args = arguments.parse_args(command_line)
    names = args.only.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        draw_catalogue(folder)
        with ThreadPoolExecutor(len(names)) as pool:
            seen = dict(zip(names, pool.map(lambda name: held(CHECKS[name], folder), names), strict=True))
    for name, one in seen.items():
        print(f"{name:<10}{one['result']:<8}{one['seconds']:7.1f} s  {one['said']}")
    ran = [one for one in seen.values() if one["result"] != "skipped"]
    share = sum(one["result"] == "held" for one in ran) / len(ran) if ran else float("nan")
    finish("gpu_checks", share, {"checks": seen, "device": DEVICE.type}, args.json)


def held(check: Callable[[Path], str], folder: Path) -> dict:
    """What a check says, and whether it held."""
    start = time.perf_counter()
    try:
        result, said = "held", check(folder)
    except Skipped as reason:
        result, said = "skipped", str(reason)
    except Exception as error:  # told, and the other checks go on
        result, said = "failed", f"{type(error).__name__}: {error}"
    return {"result": result, "said": said, "seconds": time.perf_counter() - start}


class Skipped(Exception):
    """What a check needs is not there."""


# --- in this process --------------------------------------------------------------------------------------------------


def check_step(folder: Path) -> str:
    """One step without dropout in fp32: loss and every gradient as on the CPU."""
    losses, gradients = zip(*(one_step(device) for device in (torch.device("cpu"), DEVICE)), strict=True)
    difference = abs(losses[0] - losses[1])
    worst = max(float((one - other).norm() / one.norm().clamp(min=1e-6)) for one, other in zip(*gradients, strict=True))
    assert difference < 1e-4 and worst < 1e-3, f"the losses differ by {difference:.2g}, a gradient by {worst:.2g}"
    return f"the losses differ by {difference:.2g}, the worst gradient by {worst:.2g} of its norm"


def one_step(device: torch.device) -> tuple[float, list[torch.Tensor]]:
    torch.backends.cudnn.allow_tf32 = False  # the patches are a convolution, and TF32 has 10 bits
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = AliBlipConfig(
        vision_config={**TOWER, "image_size": 64}, text_config={**TOWER, **still}, image_text_hidden_size=32
    )
    torch.manual_seed(0)
    model = AliBlipForImageTextRetrieval(config)
    momentum = MomentumState(model, queue_size=64, embedding_size=32).to(device)
    objective = RetrievalObjective(model, hardest_negatives=True).train().to(device)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 13, (8, 1), generator=generator)
    batch = {
        "pixel_values": torch.randn(8, 3, 64, 64, generator=generator),
        "input_ids": torch.randint(5, 1000, (8, 12), generator=generator),
        "attention_mask": (torch.arange(12) < lengths).long(),
        "product_id": torch.arange(8) // 2,
    }
    batch = {name: value.to(device) for name, value in batch.items()}
    output = objective(batch, momentum.encode(batch), 0.4)
    output.loss.backward()
    gradients = [one.grad.cpu() for one in model.parameters() if one.grad is not None]
    return output.loss.item(), gradients


def check_pipeline(folder: Path) -> str:
    """The pipeline's scores, and which photos it finds, as on the CPU."""
    model = folder / "fp32" / "best"
    wait_for(model / "model.safetensors", folder / "fp32.log")
    generator = np.random.default_rng(0)
    photos = [Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(24)]
    found = []
    for device in ("cpu", DEVICE):
        search = pipeline("image-text-retrieval", model=str(model), trust_remote_code=True, device=device)
        found.append(search("a red mug", gallery=photos, top_k=8, direction="text-to-image"))
    scores = [[one["score"] for one in answers] for answers in found]
    worst = max(abs(one - other) for one, other in zip(*scores, strict=True))
    assert worst < 1e-3, f"the scores differ by {worst:.2g}"
    return f"the scores differ by at most {worst:.2g}"


# --- runs of train.py -------------------------------------------------------------------------------------------------


def draw_catalogue(folder: Path) -> None:
    command = [sys.executable, ROOT / "demo" / "make_catalogue.py", "--output_dir", folder / "catalogue"]
    subprocess.run([*command, "--num_train", "240", "--num_validation", "24"], check=True, capture_output=True)


def train(folder: Path, name: str, config: str, *flags: str) -> Path:
    """One run through `accelerate launch`; its output folder."""
    if DEVICE.type == "cpu":
        config = {"single_gpu": "cpu", "deepspeed_zero2": "deepspeed_zero2_cpu"}[config]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", ROOT / "accelerate_configs" / f"{config}.yaml", "--num_processes", "1"),
        *("--main_process_port", "0", ROOT / "train.py", "--config", ROOT / "recipes" / "demo.yaml"),
        *("--data_dir", folder / "catalogue", "--tokenizer_name", folder / "catalogue" / "tokenizer"),
        *("--output_dir", folder / name, "--per_device_train_batch_size", "16", "--queue_size", "64"),
        *("--max_train_steps", str(STEPS), "--warmup_steps", "1", "--logging_steps", "1", "--k_rerank", "4"),
        *("--checkpointing_steps", "3", *flags),
    ]
    with (folder / f"{name}.log").open("a") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=400, check=False).returncode
    assert code == 0, f"exit code {code}: {last_lines(folder / f'{name}.log')}"
    return folder / name


def losses(run: Path) -> np.ndarray:
    """ITC and ITM of each step, together."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    seen = np.array([line["loss_itc"] + line["loss_itm"] for line in lines if "loss_itc" in line])
    assert len(seen) == STEPS and np.isfinite(seen).all(), f"losses {seen}"
    return seen


def beside_fp32(run: Path, folder: Path) -> str:
    """The losses of a run in bf16 against those in fp32, whose weights and rows are the same."""
    wait_for(folder / "fp32" / "last" / "model.safetensors", folder / "fp32.log")
    worst = np.abs(losses(run) / losses(folder / "fp32") - 1).max()
    assert worst < 0.03, f"the losses differ by {worst:.1%} from those in fp32"
    return f"the losses of {STEPS} steps differ by at most {worst:.2%} from those in fp32"


def check_fp32(folder: Path) -> str:
    seen = losses(train(folder, "fp32", "single_gpu", "--mixed_precision", "no", "--deterministic", "true"))
    return f"the loss went from {seen[0]:.4f} to {seen[-1]:.4f} in {STEPS} steps"


def check_bf16(folder: Path) -> str:
    return beside_fp32(train(folder, "bf16", "single_gpu", "--mixed_precision", "bf16"), folder)


def check_resume(folder: Path) -> str:
    """From the checkpoint in the middle of a run: the weights at its end."""
    whole, log = folder / "fp32", folder / "fp32.log"
    checkpoint = whole / f"checkpoint-{STEPS // 2}"
    wait_for(checkpoint, log)
    flags = ("--mixed_precision", "no", "--deterministic", "true", "--resume_from_checkpoint", str(checkpoint))
    resumed = train(folder, "resumed", "single_gpu", *flags)
    wait_for(whole / "last" / "model.safetensors", log)
    one, other = (load_file(run / "last" / "model.safetensors") for run in (whole, resumed))
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    worst = max((float((one[name] - other[name]).abs().max()) for name in differing), default=0.0)
    assert not differing, f"{len(differing)} of {len(one)} tensors differ, by at most {worst:.2g}"
    return f"all {len(one)} tensors are bit-equal to those of the run in one go"


def check_zero2(folder: Path) -> str:
    if importlib.util.find_spec("deepspeed") is None:
        raise Skipped("DeepSpeed is not installed")
    return beside_fp32(train(folder, "zero2", "deepspeed_zero2"), folder)


def wait_for(file: Path, log: Path, seconds: float = 300) -> None:
    """Another check makes this file."""
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end, f"{file} is not there: {last_lines(log)}"
        time.sleep(0.5)


def last_lines(log: Path, count: int = 4) -> str:
    return " | ".join(log.read_text().splitlines()[-count:]) if log.exists() else "nothing was printed"


CHECKS = {
    "step": check_step,
    "fp32": check_fp32,
    "resume": check_resume,
    "bf16": check_bf16,
    "zero2": check_zero2,
    "pipeline": check_pipeline,
}

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
