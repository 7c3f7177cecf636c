"""A training step against the plain way to compute it, and what each technique is worth.

    python benchmarks/bench_step.py --json benchmarks/results/step.json       # ViT-B/16 at 224 px, batch 8; ten minutes
    python benchmarks/bench_step.py --recipe recipes/products_tiny_published.yaml       # a small model, batch 32
    python benchmarks/bench_step.py --sides "with cached"                     # beside ours, this alone
    python benchmarks/bench_step.py --recipe recipes/products_tiny_published.yaml --negatives 1,4,8,16
    python benchmarks/bench_step.py --recipe recipes/products_tiny_published.yaml --growth
    python benchmarks/bench_step.py --tiny                                    # seconds, to try it

The plain way is the published one in our own words: eager attention, titles padded to 35 tokens, keys and values of a
photo projected again for every pair that it stands in, the last text layer for all tokens, a loop that draws negatives
row by row, an average that follows parameter by parameter, and an optimizer that steps parameter by parameter and asks
first whether the gradient is finite. All sides take turns in one process, with the same weights, queues and batches, in
fp32 with fixed threads; titles have 6 to 20 tokens. Before anything is measured, the losses of a few steps, without
dropout and with the hardest negatives, have to agree to 1e-4. In the table each technique is off while the others are
on; then each option of `train.py` that changes how much is computed is on beside them. The ratio is the seconds of the
plain step over those of ours, of medians; CPU time is in the table too, since other work on the machine disturbs that
less. Operations and memory no other work disturbs: the memory is the most that a step's tensors take at a time, beside
weights, averages and the optimizer's state.

`--negatives` compares nothing with the plain way: it tells what a step costs with so many negative photos of each title
and negative titles of each photo, and the listwise loss, against the published step of one. The ratio is the seconds of
the last over those of the published step.

`--growth` tells how a step's cost grows with the rows of the batch, the tokens of the titles, the side of the photos
and the slots of the queue, one at a time from the recipe's. The ratio is the CPU time of a row in the largest batch
over that in the recipe's.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import aliblip.training.objective
from aliblip.runtime.accelerator import build_accelerator, end
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.optim import parameter_groups
from aliblip.training.patches import drop_patches
from aliblip.training.step import backward_and_step, clamp_parameter
from benchmarks.common import finish, parser
from configuration_aliblip import AliBlipConfig
from losses_aliblip import hard_negatives
from modeling_aliblip import AliBlipForImageTextRetrieval
from train import TEMPERATURE_RANGE

PADDED, LENGTHS = 35, (6, 20)
VOCABULARY = 30524
AGREEMENT = 1e-4
_NARROW = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}  # at 0.02 all photos look alike
TINY = {
    "config_name": "base",
    "vision_config": {**_NARROW, "hidden_size": 32, "patch_size": 8},
    "text_config": {**_NARROW, "hidden_size": 24, "intermediate_size": 48},
    "image_size": 32,
    "per_device_train_batch_size": 6,
    "queue_size": 64,
}
BASE = {"config_name": "base", "image_size": 224, "per_device_train_batch_size": 8, "queue_size": 57600}


@dataclass(frozen=True)
class Techniques:
    """What a step does better than the plain one."""

    attention: bool = True  # torch's scaled_dot_product_attention
    lengths: bool = True  # titles as long as the longest, and pairs in groups of similar length
    shared_photos: bool = True  # keys and values once per photo
    first_token: bool = True  # the last text layer for the first token alone
    draws: bool = True  # all negatives at once
    average: bool = True  # all parameters in one call
    optimizer: bool = True  # torch's fused AdamW, which leaves out a step by itself
    cached: bool = False  # --cached_batch_size, a quarter of the batch: less memory for more time
    unpad: bool = False  # --unpad
    patch_dropout: bool = False  # --patch_dropout 0.5, whose losses are its own


OURS = Techniques()
OPTIONS = [field.name for field in fields(Techniques) if not field.default]
TECHNIQUES = [field.name for field in fields(Techniques) if field.default]
PLAIN = Techniques(**dict.fromkeys(TECHNIQUES, False))
SIDES = {"ours": OURS, "plain": PLAIN}
SIDES |= {f"without {name}": replace(OURS, **{name: False}) for name in TECHNIQUES}
SIDES |= {f"with {name}": replace(OURS, **{name: True}) for name in OPTIONS}


def main(command_line: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--recipe", type=Path, help="size, batch and queue of this recipe")
    arguments.add_argument("--negatives", type=lambda given: [int(part) for part in given.split(",")])
    arguments.add_argument("--growth", action="store_true", help="cost by batch, titles, photos and queue")
    arguments.add_argument("--tiny", action="store_true", help="a tiny model: shows that it runs, measures nothing")
    arguments.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="of the table (default: all)")
    args = arguments.parse_args(command_line)
    torch.set_num_threads(args.threads)
    recipe = BASE if args.recipe is None else yaml.safe_load(args.recipe.read_text())
    recipe = TINY if args.tiny else recipe
    accelerator = build_accelerator(max_grad_norm=1.0, per_device_train_batch_size=1)
    settings = {name: str(value) for name, value in vars(args).items() if name != "json"}
    if args.growth:
        report = measure_growth(accelerator, recipe, args.rounds)
        end(accelerator)
        finish("growth", tell_growth(report), {"growth": report, "settings": settings}, args.json)
        return
    trained = Trained(accelerator, recipe)
    if args.negatives:
        report = measure_negatives(trained, args.negatives, args.rounds)
        end(accelerator)
        finish("negatives", tell_negatives(**report), {**report, "settings": settings}, args.json)
        return
    report = measure(trained, args.rounds, {"ours", *args.sides})
    end(accelerator)
    ours = report["sides"]["ours"]
    for name, side in report["sides"].items():
        wall, processor, flops, memory = (side[key] / ours[key] for key in COSTS)
        print(
            f"{name:<22} {side['seconds']:8.3f} s, {wall:5.2f} times ours, {processor:5.2f} by CPU time, "
            f"{flops:5.2f} by FLOPs, {memory:5.2f} by memory; losses within {side['largest_difference']:.1e}"
        )
    last = args.sides[-1] if "plain" not in args.sides else "plain"
    ratio = report["sides"][last]["seconds"] / ours["seconds"]
    finish("step", ratio, {**report, "settings": settings}, args.json)


def measure(trained: Trained, rounds: int, names: set[str]) -> dict:
    """Costs and the agreement of each side. Whatever differs is refused before anything is measured."""
    losses, sides = {}, {}
    compared = {name: techniques for name, techniques in SIDES.items() if name in names}
    for name, techniques in compared.items():
        losses[name], flops = trained.losses(techniques)
        sides[name] = {"flops": flops}
    for name, of_side in losses.items():
        pairs = zip(of_side, losses["ours"], strict=True)
        difference = max(abs(one - other) / abs(other) for one, other in pairs)
        if not (difference < AGREEMENT or SIDES[name].patch_dropout):
            raise RuntimeError(f"{name}: the losses differ by {difference:.2g}: {of_side} and {losses['ours']}")
        sides[name]["largest_difference"] = difference
    steps = {name: partial(trained.step, techniques) for name, techniques in compared.items()}
    for name, measured in costs_of(steps, rounds).items():
        sides[name] |= measured
    return {"sides": sides, "rows": trained.rows, "losses": losses["ours"], "parameters": trained.parameters}


COSTS = {"seconds": "time", "cpu_seconds": "CPU time", "flops": "FLOPs", "peak_bytes": "memory"}


def costs_of(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict]:
    """Memory and seconds of steps, which take turns."""
    costs = {}
    for name, step in steps.items():
        with PeakMemory() as memory:
            step()
        costs[name] = {"peak_bytes": memory.peak, "seconds_of_rounds": [], "cpu_seconds_of_rounds": []}
    for _ in range(rounds):
        for name, step in steps.items():
            wall, processor = time.perf_counter(), time.process_time()
            step()
            costs[name]["seconds_of_rounds"].append(time.perf_counter() - wall)
            costs[name]["cpu_seconds_of_rounds"].append(time.process_time() - processor)
    for cost in costs.values():
        cost["seconds"] = statistics.median(cost["seconds_of_rounds"])
        cost["cpu_seconds"] = statistics.median(cost["cpu_seconds_of_rounds"])
    return costs


def flops_of(step: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def measure_negatives(trained: Trained, counts: list[int], rounds: int) -> dict:
    """Costs of a step with so many negatives, and of the published step."""
    if max(counts) >= trained.rows:
        raise SystemExit(f"--negatives {max(counts)}: a batch of {trained.rows} rows has {trained.rows - 1} at most")
    ways = {"published": {}, **{str(count): {"itm_negatives": count, "itm_listwise": 1.0} for count in counts}}
    steps = {name: partial(trained.step, OURS, **options) for name, options in ways.items()}
    flops = {name: flops_of(step) for name, step in steps.items()}
    sides = {name: {"flops": flops[name], **measured} for name, measured in costs_of(steps, rounds).items()}
    return {"published": sides.pop("published"), "negatives": sides, "rows": trained.rows}


def tell_negatives(published: dict, negatives: dict[str, dict], **_) -> float:
    """A line of each; the ratio of the last."""
    for count, side in negatives.items():
        told = ", ".join(f"{side[key] / published[key]:.2f} times the {name}" for key, name in COSTS.items())
        print(f"{count:>3} negatives: {side['seconds']:.3f} s, {told}")
    return side["seconds"] / published["seconds"]


def measure_growth(accelerator, recipe: dict, rounds: int) -> dict[str, dict[str, dict]]:
    """Costs of a step by what is changed of the recipe, and to which value."""
    rows, size, queue = (recipe[name] for name in ("per_device_train_batch_size", "image_size", "queue_size"))
    changes = {
        "per_device_train_batch_size": [rows // 2, rows, 2 * rows, 4 * rows],
        "title_tokens": [8, 16, 32],
        "image_size": [size, 2 * size, 3 * size],
        "queue_size": [queue, 8 * queue, 64 * queue],
    }
    report: dict[str, dict[str, dict]] = {}
    for name, values in changes.items():
        report[name] = {}
        for value in values:
            trained = Trained(accelerator, {**recipe, name: value})
            step = partial(trained.step, OURS)
            step()  # makes the optimizer's state
            flops = flops_of(step)
            report[name][str(value)] = {"flops": flops, **costs_of({"step": step}, rounds)["step"]}
            accelerator.free_memory()
    return report


def tell_growth(report: dict[str, dict[str, dict]]) -> float:
    """A line of each value; the ratio of the batches."""
    for name, values in report.items():
        for value, cost in values.items():
            print(
                f"{name:<28} {value:>6} {cost['cpu_seconds']:8.3f} s of CPU time, {cost['flops'] / 1e9:8.2f} GFLOPs, "
                f"{cost['peak_bytes'] / 1e6:8.1f} MB"
            )
    _, (own, usual), *_, (many, large) = report["per_device_train_batch_size"].items()
    return large["cpu_seconds"] / int(many) / (usual["cpu_seconds"] / int(own))


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside its `with` block; `peak` is the most at a time. What an
    operator needs for itself while it runs is not seen."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            number = storage._cdata
            if number not in given and number not in self._known:  # a view, or a result in place, is nothing new
                self._known.add(number)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._freed, number, storage.nbytes())
        return out

    def _freed(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.held -= size


def _storages(values) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Trained:
    """Model, momentum encoders, queues and optimizer, which all sides step in turn."""

    def __init__(self, accelerator, recipe: dict):
        torch.manual_seed(0)
        config = AliBlipConfig.from_size(
            recipe["config_name"],
            vision_config={**recipe.get("vision_config", {}), "image_size": recipe["image_size"]},
            text_config={**recipe.get("text_config", {}), "vocab_size": VOCABULARY},
            image_text_hidden_size=recipe.get("image_text_hidden_size", 256),
            enc_token_id=VOCABULARY - 1,
        )
        self.accelerator = accelerator
        self.model = AliBlipForImageTextRetrieval(config)
        self.plain_model = PlainModel(self.model)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        embedding_size = config.image_text_hidden_size
        self.momentum = MomentumState(self.model, queue_size=recipe["queue_size"], embedding_size=embedding_size)
        self.in_batch_itc = recipe.get("in_batch_itc", 0.0)
        optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.05), lr=1e-5, fused=True)
        self.optimizer = accelerator.prepare(optimizer)
        self.rows = recipe["per_device_train_batch_size"]
        self.batch = random_batch(self.rows, recipe["image_size"], recipe.get("title_tokens"))
        self._start = copy.deepcopy((self.model.state_dict(), self.momentum.state_dict()))

    def losses(self, techniques: Techniques, steps: int = 2) -> tuple[list[float], int]:
        """Of steps from the beginning, without dropout and with the hardest negatives; and the FLOPs of the last."""
        model, momentum = self._start
        self.model.load_state_dict(model)
        self.momentum.load_state_dict(momentum)
        self.optimizer.optimizer.state.clear()
        losses: list[float] = []
        for _ in range(steps):
            flops = flops_of(lambda: losses.append(self.step(techniques, exact=True)))
        return losses, flops

    def step(self, techniques: Techniques, exact: bool = False, **options) -> float:
        """One step of one side; its loss. `options` are further ones of the objective."""
        for part in (self.model, self.momentum.encoders):
            part.set_attn_implementation("sdpa" if techniques.attention else "eager")
        self.plain_model.techniques = techniques
        plain_pairs = not (techniques.shared_photos and techniques.first_token)
        objective = RetrievalObjective(
            self.plain_model if plain_pairs else self.model,
            hardest_negatives=exact,
            in_batch_itc=self.in_batch_itc,
            cached_batch_size=max(self.rows // 4, 1) if techniques.cached else None,
            unpad=techniques.unpad,
            **options,
        ).train(not exact)
        batch = self.batch if techniques.lengths else padded(self.batch)
        if techniques.average:
            self.momentum.update(self.model)
        else:
            follow_one_by_one(self.momentum, self.model)
        with plain_parts(techniques), left_out(self.model, techniques):
            targets = self.momentum.encode(batch)
            output = objective(batch, targets, alpha=0.2)
        if techniques.optimizer:
            with self.accelerator.accumulate(objective):
                backward_and_step(self.accelerator, objective, self.optimizer, output.loss, 1.0).read()
        else:
            step_one_by_one(self.model, self.optimizer.optimizer, output.loss)
        self.momentum.enqueue(targets, batch["product_id"])
        clamp_parameter(self.model.temp, *TEMPERATURE_RANGE)
        return output.loss.item()


def random_batch(rows: int, image_size: int, tokens: int | None = None) -> dict[str, Tensor]:
    """Photos, and titles as long as the longest of them; or all of so many tokens."""
    generator = torch.Generator().manual_seed(1)
    shortest, longest = LENGTHS if tokens is None else (tokens, tokens)
    lengths = torch.randint(shortest, longest + 1, (rows,), generator=generator)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {
        "pixel_values": torch.randn(rows, 3, image_size, image_size, generator=generator),
        "input_ids": torch.randint(1000, VOCABULARY - 2, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "product_id": torch.arange(rows),
    }


# --- the plain way ----------------------------------------------------------------------------------------------------


class PlainModel(nn.Module):
    """A model whose matching pass projects the photo of every pair by itself, or computes all tokens to the end."""

    def __init__(self, model: AliBlipForImageTextRetrieval):
        super().__init__()
        self.model = model
        self.techniques = PLAIN
        for name in ("get_image_features", "get_text_features", "temp", "config"):
            object.__setattr__(self, name, getattr(model, name))

    def project_image_kv(self, image_tokens: Tensor):
        return self.model.project_image_kv(image_tokens) if self.techniques.shared_photos else image_tokens

    def match(self, input_ids: Tensor, attention_mask: Tensor, image_kv, image_index: Tensor) -> Tensor:
        if not self.techniques.shared_photos:
            image_kv = self.model.project_image_kv(image_kv[image_index])
            image_index = torch.arange(len(image_index))
        if self.techniques.first_token:
            return self.model.match(input_ids, attention_mask, image_kv, image_index)
        input_ids = input_ids.clone()
        input_ids[:, 0] = self.config.enc_token_id
        output = self.model.text_encoder(input_ids, attention_mask, image_kv, image_index)
        return self.model.itm_head(output.pooler_output)


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    more = (0, PADDED - batch["input_ids"].shape[1])
    return batch | {name: nn.functional.pad(batch[name], more) for name in ("input_ids", "attention_mask")}


@contextmanager
def plain_parts(techniques: Techniques) -> Iterator[None]:
    objective = aliblip.training.objective
    one_pass = lambda longest, *_: [(len(longest), PADDED)]  # noqa: E731
    negatives = hard_negatives if techniques.draws else draw_one_by_one
    groups = objective.length_groups if techniques.lengths else one_pass
    with mock.patch.multiple(objective, hard_negatives=negatives, length_groups=groups):
        yield


@contextmanager
def left_out(model: AliBlipForImageTextRetrieval, techniques: Techniques) -> Iterator[None]:
    handle = drop_patches(model, 0.5) if techniques.patch_dropout else None
    if handle is not None:
        model.vision_model.embeddings.train()  # also where a step has no dropout
    yield
    if handle is not None:
        handle.remove()


def draw_one_by_one(similarity: Tensor, positive: Tensor, count: int, *, hardest: bool) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(similarity.detach(), dim=1).masked_fill(positive, 0.0)
    drawn, exists = [], []
    for row in weights:
        there = min(count, int((row > 0).sum()))
        chosen = (row.topk(there).indices if hardest else torch.multinomial(row, there)).tolist() if there else []
        drawn.append(chosen + [0] * (count - there))
        exists.append([True] * there + [False] * (count - there))
    return torch.tensor(drawn), torch.tensor(exists)


@torch.no_grad()
def follow_one_by_one(momentum: MomentumState, model: nn.Module) -> None:
    trained = dict(model.named_parameters())
    for name, average in momentum.encoders.named_parameters():
        average.copy_(average * momentum.momentum + trained[name] * (1.0 - momentum.momentum))


def step_one_by_one(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False).item()
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = False, False
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, None


if __name__ == "__main__":
    main()
