"""What an evaluation will take, told before it starts: memory, work, and time at a stated speed."""

import contextlib
import os
import statistics
import time
from pathlib import Path

import psutil
import torch

import retrieval_aliblip as engine
from aliblip.data.sources import Source

TITLES_LOOKED_AT = 1000
# Dense bf16 rate of one GPU by its maker's data sheet, and the share of it that the times are told at: an assumption.
H200_FLOPS = 989e12
ASSUMED_SHARE = 0.4


def available_memory() -> int:
    """Bytes of host memory that one process of this machine's may fill: what is free, by the container's limit too."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit: "max"
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def title_tokens(tokenizer, titles: Source, max_length: int) -> tuple[float, int]:
    """Mean and largest number of tokens of the first titles of a source, cut at `max_length`."""
    rows = titles.read_range(0, min(TITLES_LOOKED_AT, titles.num_rows))
    texts = [row.text for row in rows if isinstance(row.text, str)]
    if not texts:
        return float(max_length), max_length
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    lengths = [len(ids) for ids in encoded]
    # Titles that were not looked at may be longer.
    return statistics.fmean(lengths), max_length if titles.num_rows > TITLES_LOOKED_AT else max(lengths)


def make_plan(
    model,
    processor,
    num_photos: int,
    titles: Source,
    depth: int,
    *,
    both_directions: bool,
    dtype: torch.dtype | None,
    rerank_batch_tokens: int | None,
    image_token_memory_gb: float | None,
) -> engine.MemoryPlan:
    """Plan for one process, on the device and with the memory that it has now.

    Args:
        depth: candidates of a query; `num_photos`: all pairs.
        dtype: of the passes.
        rerank_batch_tokens, image_token_memory_gb: None: what the memory holds.

    Raises:
        ValueError: the memory is too small for a single pair.
    """
    length, longest = title_tokens(processor.tokenizer, titles, processor.max_length)
    host = available_memory() / 2 if image_token_memory_gb is None else image_token_memory_gb * 1e9
    device = _device()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return engine.memory_plan(
        model.config,
        num_photos,
        titles.num_rows,
        depth,
        both_directions=both_directions,
        title_tokens=length,
        longest_title=longest,
        token_dtype=dtype or model.dtype,
        host_memory=host,
        # The rest is left to the weights and the allocator, and on a CPU to the image tokens.
        device_memory=free / 2 if device.type == "cuda" else free / 4,
        rerank_batch_tokens=rerank_batch_tokens,
    )


def expected_time(plan: engine.MemoryPlan) -> str:
    """Lines that say how long the work of a plan takes: on one H200 at a stated share of its peak, and on this CPU."""
    flops = plan.embed_flops + plan.search_flops + plan.rerank_flops
    here = _matmul_flops()
    return "\n".join(
        [
            f"expected time, {flops:.3g} FLOPs in all, reading and decoding photos not included:",
            f"  one H200 in bf16 at {100 * ASSUMED_SHARE:.0f} % of its {H200_FLOPS / 1e12:.0f} TFLOP/s (assumed): "
            f"{_duration(flops / (H200_FLOPS * ASSUMED_SHARE))}",
            f"  this machine's CPU at {100 * ASSUMED_SHARE:.0f} % of a large fp32 matrix product just measured, "
            f"{here / 1e9:.0f} GFLOP/s: {_duration(flops / (here * ASSUMED_SHARE))}",
        ]
    )


def _device() -> torch.device:
    """The device that this process will get from the launcher."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    if on_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _matmul_flops(size: int = 1024, times: int = 5) -> float:
    matrix = torch.rand(size, size)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


__all__ = ["available_memory", "expected_time", "make_plan", "title_tokens"]
