"""What surviving costs: a training step of the demo recipe with and without what makes a run survive.

    python benchmarks/bench_overhead.py --json benchmarks/results/overhead.json
    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml benchmarks/bench_overhead.py

Both sides take the same steps in turn, on random photos and titles. A step that survives also keeps the random states
from before it, makes a non-finite loss known to all ranks, can put the queues back, and asks all ranks whether one was
told to stop. Those additions are timed by themselves too, since they are less than what a step varies by. The ratio is
(step + additions + a checkpoint every 250 steps) / step, of medians.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from accelerate.utils import set_seed
from transformers import BertTokenizer

from aliblip.runtime.accelerator import build_accelerator, end
from aliblip.runtime.interrupts import StopSignals
from aliblip.training.checkpoint import Progress, Training, random_states, save_checkpoint
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.optim import parameter_groups
from aliblip.training.step import Outcome, backward_and_step, clamp_parameter
from benchmarks.common import finish, parser
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor
from train import TEMPERATURE_RANGE

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.yaml"
VOCABULARY, TITLE_TOKENS = 600, 16
STEPS_PER_CHECKPOINT = 250


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=30, help="measured steps of each side")
    args = arguments.parse_args()
    recipe = yaml.safe_load(RECIPE.read_text())
    rows = recipe["per_device_train_batch_size"]
    accelerator = build_accelerator(max_grad_norm=recipe["max_grad_norm"], per_device_train_batch_size=rows)
    report = measure(accelerator, recipe, args.steps)
    if accelerator.is_main_process:
        step, additions, checkpoint = (report[name] for name in ("plain_step", "additions", "checkpoint"))
        ratio = (step + additions + checkpoint / STEPS_PER_CHECKPOINT) / step
        print(f"plain step            {1000 * step:9.2f} ms (median of {args.steps})")
        print(f"step that survives    {1000 * report['surviving_step']:9.2f} ms (median of {args.steps})")
        print(f"its additions         {1000 * additions:9.3f} ms = {additions / step:.3%} of a step")
        per_step = checkpoint / STEPS_PER_CHECKPOINT / step
        print(f"a checkpoint          {1000 * checkpoint:9.2f} ms, every {STEPS_PER_CHECKPOINT} steps: {per_step:.3%}")
        table = {"seconds": report, "steps": args.steps, "processes": accelerator.num_processes, "rows": rows}
        finish("survival_overhead", ratio, table, args.json)
    end(accelerator)


def measure(accelerator, recipe: dict, steps: int) -> dict[str, float]:
    set_seed(recipe["seed"])
    config = AliBlipConfig.from_size(
        recipe["config_name"],
        vision_config={**recipe["vision_config"], "image_size": recipe["image_size"]},
        text_config={**recipe["text_config"], "vocab_size": VOCABULARY},
        image_text_hidden_size=recipe["image_text_hidden_size"],
        enc_token_id=VOCABULARY - 1,
    )
    model = AliBlipForImageTextRetrieval(config)
    momentum = MomentumState(model, queue_size=recipe["queue_size"], embedding_size=recipe["image_text_hidden_size"])
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe["weight_decay"]), lr=1e-5, fused=True)
    objective = RetrievalObjective(
        model, negatives_from_all_ranks=recipe["negatives_from_all_ranks"], in_batch_itc=recipe["in_batch_itc"]
    ).train()
    objective, optimizer = accelerator.prepare(objective, optimizer)
    training = Training(model, optimizer, momentum, accelerator.device)
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    processor = AliBlipProcessor(None, BertTokenizer(vocab=words))
    rows, size, norm = recipe["per_device_train_batch_size"], recipe["image_size"], recipe["max_grad_norm"]
    generator = torch.Generator().manual_seed(accelerator.process_index)
    batch = {
        "pixel_values": torch.randn(rows, 3, size, size, generator=generator),
        "input_ids": torch.randint(5, VOCABULARY - 2, (rows, TITLE_TOKENS), generator=generator),
        "attention_mask": torch.ones(rows, TITLE_TOKENS, dtype=torch.int64),
        "product_id": torch.arange(rows) + rows * accelerator.process_index,
    }

    def step(signals: StopSignals | None) -> float:
        accelerator.wait_for_everyone()
        start = time.perf_counter()
        momentum.update(model)
        if signals is not None:
            before = dataclasses.replace(Progress()), random_states(accelerator.device)
        with accelerator.accumulate(objective):
            targets = momentum.encode(batch)
            output = objective(batch, targets, 0.2)
            if signals is not None:
                outcome = backward_and_step(accelerator, objective, optimizer, output.loss, norm, signals.number)
            else:
                accelerator.backward(output.loss)
                grad_norm = float(accelerator.clip_grad_norm_(objective.parameters(), norm))
                optimizer.step()
                optimizer.zero_grad()
        momentum.enqueue(targets, batch["product_id"])
        clamp_parameter(model.temp, *TEMPERATURE_RANGE)
        if signals is not None:
            grad_norm, number = outcome.read()
            if not math.isfinite(grad_norm):
                raise RuntimeError(f"the benchmark's own gradients are not finite after {before}")
            signals.known_to_all(number)
        return time.perf_counter() - start

    def additions(signals: StopSignals) -> float:
        accelerator.wait_for_everyone()
        loss = torch.zeros((), requires_grad=True)
        start = time.perf_counter()
        dataclasses.replace(Progress()), random_states(accelerator.device)
        (loss * (0.0 * loss.detach() + 1.0)).backward()
        _, number = Outcome(loss.detach(), signals.number).read()
        signals.known_to_all(number)
        return time.perf_counter() - start

    with StopSignals() as signals, tempfile.TemporaryDirectory() as folder:
        sides = {"plain_step": lambda: step(None), "surviving_step": lambda: step(signals)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(steps + 3):
            for name, side in sides.items():
                took = side()
                if number >= 3:
                    seconds[name].append(took)
        seconds["additions"] = [additions(signals) for _ in range(200)]
        seconds["checkpoint"] = []
        for number in range(5):
            start = time.perf_counter()
            problem = save_checkpoint(
                training,
                processor,
                Path(folder),
                {**dataclasses.asdict(Progress(step=number)), "order": {}, "manifest": {}},
                of_rank={},
                random=random_states(accelerator.device),
                limit=1,
            )
            if problem is not None:
                raise RuntimeError(problem)
            seconds["checkpoint"].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
