"""What test_launch.py starts under each launcher: a tiny contrastive model, trained for a few steps.

Every rank writes what it saw to OUTPUT/rank<R>.json. The gather with gradient stands in the forward, one step is made
non-finite on one rank, and the temperature is clamped after every step, as in the training loop.

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml tests/accelerator_probe.py OUTPUT
"""

import argparse
import json
from pathlib import Path

import torch

STEPS, ACCUMULATION, ROWS, WIDTH = 5, 2, 8, 16  # ROWS of a micro-batch over all ranks together
BROKEN_STEP = 2
MAX_GRAD_NORM = 0.5
LEARNING_RATE = 1e-2
TEMPERATURE = (0.068, 0.072)


class Tiny(torch.nn.Module):
    """Two linear towers; the loss of the own rows of the first against all rows of the second."""

    def __init__(self, gather=lambda features: features, rank: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.left, self.right = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(2))
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / WIDTH**0.5)
        self.temp = torch.nn.Parameter(torch.tensor([0.07]))
        self.gather, self.rank = gather, rank

    def forward(self, images, titles):
        dtype = self.left.weight.dtype
        left = torch.nn.functional.normalize(self.left(images.to(dtype)).float(), dim=-1)
        right = torch.nn.functional.normalize(self.right(titles.to(dtype)).float(), dim=-1)
        logits = left @ self.gather(right).t() / self.temp.float()
        labels = torch.arange(len(left), device=logits.device) + self.rank * len(left)
        return torch.nn.functional.cross_entropy(logits, labels)


def micro_batch(step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of all ranks, `(ROWS, WIDTH)` each."""
    generator = torch.Generator().manual_seed(1000 + step * ACCUMULATION + micro_step)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Two groups, since ZeRO partitions each group by itself."""
    return torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        fused=True,
    )


def main() -> None:
    from aliblip.runtime import distributed
    from aliblip.runtime.accelerator import build_accelerator, end
    from aliblip.training.step import backward_and_step, clamp_parameter, fp32_state_dict, fp32_value

    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--mixed_precision")
    args = parser.parse_args()

    accelerator = build_accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=MAX_GRAD_NORM,
        per_device_train_batch_size=4,
    )
    rank, size = distributed.rank(), distributed.world_size()
    model = Tiny(gather=distributed.all_gather_with_grad, rank=rank)
    prepared, optimizer = accelerator.prepare(model, make_optimizer(model))
    report = {
        "num_processes": accelerator.num_processes,
        "process_index": accelerator.process_index,
        "is_main_process": accelerator.is_main_process,
        "world_size": size,
        "rank": rank,
        "backend": torch.distributed.get_backend() if size > 1 else None,
        "device": accelerator.device.type,
        "distributed_type": str(accelerator.distributed_type.value),
        "mixed_precision": accelerator.mixed_precision,
        "wrapper": type(prepared).__name__,
        "losses": [],
        "norms": [],
        "broken_step_changed_weights": None,
        "prepares_loaders": True,
    }
    if hasattr(prepared, "zero_optimization_stage"):
        report["engine"] = {
            "stage": prepared.zero_optimization_stage(),
            "gradient_clipping": prepared.gradient_clipping(),
            "micro_batch": prepared.train_micro_batch_size_per_gpu(),
            "accumulation": prepared.gradient_accumulation_steps(),
            "train_batch_size": prepared.train_batch_size(),
            "optimizer": type(prepared.optimizer.optimizer).__module__,
        }
    try:
        accelerator.prepare(torch.utils.data.DataLoader([1, 2]))
    except RuntimeError:
        report["prepares_loaders"] = False

    def weights() -> list[torch.Tensor]:
        return [fp32_value(parameter) for parameter in model.parameters()]

    rows = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    for step in range(STEPS):
        losses, norms = [], []
        before = distributed.checksum(weights())
        for micro_step in range(ACCUMULATION):
            images, titles = (part[rows].to(accelerator.device) for part in micro_batch(step, micro_step))
            with accelerator.accumulate(prepared):
                loss = prepared(images, titles)
                losses.append(distributed.reduce_sum(loss.detach()).item() / size)
                if step == BROKEN_STEP and rank == size - 1:
                    loss = loss * float("inf")
                outcome = backward_and_step(accelerator, prepared, optimizer, loss, MAX_GRAD_NORM, number=rank)
                norms.append(None if outcome is None else outcome.read()[0])
                assert outcome is None or outcome.read()[1] == size - 1  # the largest of all ranks
        assert norms[:-1] == [None] * (ACCUMULATION - 1)
        if step == BROKEN_STEP:
            report["broken_step_changed_weights"] = distributed.checksum(weights()) != before
        clamp_parameter(model.temp, *TEMPERATURE)
        report["losses"].append(sum(losses) / ACCUMULATION)
        report["norms"].append(norms[-1])
    distributed.assert_equal_on_ranks("working copies", dict(model.named_parameters()))
    report["temp"] = fp32_value(model.temp).item()
    report["temp_in_module"] = model.temp.item()
    report["weights"] = torch.cat([weight.flatten() for weight in weights()]).tolist()
    saved = fp32_state_dict(model)
    report["saved_equals_masters"] = list(saved) == list(model.state_dict()) and all(
        saved[name].equal(fp32_value(parameter).cpu()) for name, parameter in model.named_parameters()
    )
    report["dtypes"] = sorted({str(parameter.dtype) for parameter in model.parameters()})
    report["masters_are_finer"] = any(
        not fp32_value(parameter).equal(parameter.detach().float()) for parameter in model.parameters()
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"rank{rank}.json").write_text(json.dumps(report))
    del prepared
    end(accelerator)


if __name__ == "__main__":
    main()
