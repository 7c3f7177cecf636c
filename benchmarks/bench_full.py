"""The whole retrieval at full scale: 50,000 photos x 20,000 titles, both directions, the 128 best of each re-ranked.

    python benchmarks/bench_full.py --dry_run                                              # memory, work and time
    python benchmarks/bench_full.py --json benchmarks/results/full.json                    # on one large GPU, minutes
    python benchmarks/bench_full.py --tiny --num_images 60 --num_texts 40 --k 8            # seconds on a CPU, to try it

Random weights of ViT-L/16 at 384 px in bf16 on a GPU (fp32 on a CPU), random photos and titles of 6 to 20 tokens; the
photos are made on the device, so that the image tower is measured and no disk. The stages are those of
`aliblip.retrieval.evaluation` on one process: embed, search both ways, re-rank. The other side is the
goal, 5 minutes for the full size, in proportion to the floating-point operations for another one: the last line is the
goal over the time taken, and more than 1 means that it is met.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import retrieval_aliblip as engine
from aliblip.retrieval.embedding import EmbeddedUnit, TokenMemory
from aliblip.retrieval.plan import MemoryPlan, available_memory, expected_time, free_for_tokens, memory_plan
from aliblip.retrieval.rankings import candidate_pairs
from benchmarks.common import finish, parser
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval

GOAL_SECONDS = 300.0
SHORTEST, LONGEST = 6, 20
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def main(command_line: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--num_images", type=int, default=50_000)
    arguments.add_argument("--num_texts", type=int, default=20_000)
    arguments.add_argument("--k", type=int, default=128)
    arguments.add_argument("--image_size", type=int, default=384)
    arguments.add_argument("--unit", type=int, default=64, help="photos encoded at a time")
    arguments.add_argument("--tiny", action="store_true", help="towers of two layers, 32 px")
    arguments.add_argument("--dry_run", action="store_true", help="only print memory, work and expected time")
    args = arguments.parse_args(command_line)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" or args.dry_run else torch.float32
    full = AliBlipConfig.from_size("large", vision_config={"image_size": 384})
    goal = plan_of(full, 50_000, 20_000, 128, dtype)
    config = full
    if args.tiny:
        config = AliBlipConfig(vision_config={**TINY, "image_size": 32}, text_config=TINY, image_text_hidden_size=16)
    elif args.image_size != 384:
        config = AliBlipConfig.from_size("large", vision_config={"image_size": args.image_size})
    plan = plan_of(config, args.num_images, args.num_texts, args.k, dtype)
    print(plan)
    print(expected_time(plan))
    if args.dry_run:
        return
    torch.manual_seed(0)
    model = AliBlipForImageTextRetrieval(config).eval().to(device, dtype)
    with torch.inference_mode():
        run(model, args, plan, unit=1, count=args.unit)  # what is set up at the first call is not measured
        seconds, pairs = run(model, args, plan, unit=args.unit, count=args.num_images)
    total = sum(seconds.values())
    flops = plan.embed_flops + plan.search_flops + plan.rerank_flops
    allowed = GOAL_SECONDS * flops / (goal.embed_flops + goal.search_flops + goal.rerank_flops)
    for stage, took in seconds.items():
        print(f"{stage:<8}{took:10.1f} s")
    print(f"total   {total:10.1f} s for {pairs:,} pairs, {flops / total / 1e12:.1f} TFLOP/s at most")
    table = {
        "num_images": args.num_images,
        "num_texts": args.num_texts,
        "k": args.k,
        "pairs": pairs,
        "seconds": seconds,
        "total_seconds": total,
        "goal_seconds": allowed,
        "flops_at_most": flops,
        "plan": str(plan).splitlines(),
    }
    finish("full", allowed / total, table, args.json)


def plan_of(config: AliBlipConfig, num_images: int, num_texts: int, k: int, dtype: torch.dtype) -> MemoryPlan:
    return memory_plan(
        config,
        num_images,
        num_texts,
        min(k, num_images, num_texts),
        title_tokens=(SHORTEST + LONGEST) / 2,
        longest_title=LONGEST,
        token_dtype=dtype,
        host_memory=available_memory() / 2,
        **_of_device(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    )


def _of_device(device: torch.device) -> dict[str, float]:
    """What a re-ranking pass may fill, in bytes, and the text tokens that suit the device."""
    if device.type != "cuda":
        return {}
    memory = {"device_memory": torch.cuda.mem_get_info(device)[0] / 2, "token_device_memory": free_for_tokens(device)}
    return {**memory, "most_batch_tokens": engine.default_batch_tokens(device)}


def run(model, args, plan: MemoryPlan, unit: int, count: int) -> tuple[dict[str, float], int]:
    """Seconds of every stage, and the number of pairs, with `count` photos."""
    config, device = model.config, next(model.parameters()).device
    size, dtype = config.vision_config.image_size, model.dtype
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (args.num_texts,), generator=generator)
    input_ids = torch.randint(5, config.text_config.vocab_size - 2, (args.num_texts, LONGEST), generator=generator)
    attention_mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    starts = range(0, count, unit)

    def photos(start: int) -> torch.Tensor:
        seeded = torch.Generator(device).manual_seed(start)
        number = min(unit, count - start)
        return torch.randn(number, 3, size, size, generator=seeded, device=device, dtype=dtype)

    clock = _Clock(device)
    memory = TokenMemory(plan.images_kept * plan.image_tokens / plan.num_images, free_for_tokens(device))
    images = []
    for start in starts:
        embeds, tokens = engine.embed_images(model, photos(start))
        images.append(embeds)
        rows = torch.arange(start, start + len(tokens))  # of which each has a photo of its own
        memory.offer(EmbeddedUnit(start, rows, rows, rows, rows - start, image_tokens=tokens))
    titles = [
        engine.embed_texts(model, input_ids[start : start + 512], attention_mask[start : start + 512])
        for start in range(0, args.num_texts, 512)
    ]
    images, titles = torch.cat(images), torch.cat(titles)
    clock.stop("embed")
    k = min(args.k, count, args.num_texts)
    _, image_ids = engine.search(titles, images, k)
    _, text_ids = engine.search(images, titles, k)
    pairs = candidate_pairs(image_ids, text_ids, count, args.num_texts)
    clock.stop("search")
    reranker = engine.Reranker(model, input_ids, attention_mask, plan.rerank_batch_tokens)
    logits = []
    for start in starts:
        kept = memory.take(start)
        tokens = engine.embed_images(model, photos(start))[1] if kept is None else kept.tokens
        chosen = [pairs.texts_of(image) for image in range(start, min(start + unit, count))]
        logits.append(reranker(tokens, chosen)[:, 1])
    torch.cat(logits).cpu()
    clock.stop("rerank")
    return clock.seconds, len(pairs)


class _Clock:
    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        self.start = time.perf_counter()

    def stop(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - self.start
        self.start = time.perf_counter()


if __name__ == "__main__":
    main()
