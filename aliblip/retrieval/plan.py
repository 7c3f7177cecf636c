"""What a retrieval will take, told before it starts: memory, work, and time at a stated speed.

    plan = make_plan(model, processor, num_photos, titles, k, ...)        # on the memory that this process has now
    print(plan)
    print(expected_time(plan))
    print(memory_plan(model.config, 10**6, 10**6, k=128))                 # for any machine: arithmetic alone

Legend: P image tokens, D width, F width of a layer's MLP, E embedding, L text tokens of a title.
"""

import contextlib
import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

import retrieval_aliblip as engine
from aliblip.data.sources import Source
from aliblip.runtime.mistakes import UsageError

TITLES_LOOKED_AT = 1000
ROWS_LOOKED_AT = 200_000
# Dense bf16 rate of one GPU by its maker's data sheet, and the share of it that the times are told at: an assumption.
H200_FLOPS = 989e12
ASSUMED_SHARE = 0.4


# --- memory and work of any retrieval ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """What a two-stage retrieval needs of memory (bytes) and of work (FLOPs, in matrix products); `str` makes it
    readable.

    `image_tokens`: of all images; `images_on_device`, `images_kept`: how many images' tokens stay on the device, and
    how many of the others in host memory; `embeddings`: of both galleries, fp32; `candidates`: ids and three scores of
    both directions; `search_block`: the scores of one block of queries with one chunk of the gallery; `image_kv`: keys
    and values of one image; `images_per_pass`: whose keys and values are there together; `rerank_pass`: one call of the
    model, beside them; `pairs_per_pass`: in such a call, at the longest title; `max_pairs`: re-ranked if no pair is a
    candidate of both directions.
    """

    num_images: int
    num_texts: int
    k: int
    token_dtype: torch.dtype
    image_tokens: int
    images_on_device: int
    images_kept: int
    embeddings: int
    candidates: int
    search_block: int
    image_kv: int
    images_per_pass: int
    rerank_batch_tokens: int
    rerank_pass: int
    pairs_per_pass: int
    max_pairs: int
    embed_flops: int
    search_flops: int
    rerank_flops: int

    def __str__(self) -> str:
        one_image = self.image_tokens // self.num_images
        dtype = str(self.token_dtype).removeprefix("torch.")
        places = {"on the device": self.images_on_device, "in host memory": self.images_kept}
        if self.num_images in places.values():
            kept = f"all are kept {next(place for place, count in places.items() if count == self.num_images)}"
        else:
            counted = [f"{count:,} images' are kept {place}" for place, count in places.items() if count]
            if sum(places.values()) < self.num_images:
                counted.append(
                    "the others are encoded again to re-rank" if counted else "all are encoded again to re-rank"
                )
            kept = ", ".join(counted)
        if self.max_pairs == self.num_images * self.num_texts:
            reranked = "every pair scored"
        else:
            reranked = f"the {self.k} best of each re-ranked" if self.k else "none re-ranked"
        lines = [
            f"{self.num_images:,} images x {self.num_texts:,} titles, {reranked}",
            f"  image tokens: {size_text(self.image_tokens)} in {dtype}, {size_text(one_image)} an image; {kept}",
            f"  embeddings: {size_text(self.embeddings)}; candidates: {size_text(self.candidates)}",
            f"  search: {size_text(self.search_block)} of scores at a time",
            f"  re-ranking: {size_text(self.image_kv)} of keys and values an image, at most {self.images_per_pass} at "
            f"a time; "
            f"{size_text(self.rerank_pass)} for a pass of {self.rerank_batch_tokens:,} text tokens, "
            f"{self.pairs_per_pass:,} of the longest titles",
            f"  work: {self.embed_flops:.3g} FLOPs to embed, {self.search_flops:.3g} to search, at most "
            f"{self.rerank_flops:.3g} to re-rank {self.max_pairs:,} pairs",
        ]
        return "\n".join(lines)


def memory_plan(
    config,
    num_images: int,
    num_texts: int,
    k: int,
    *,
    both_directions: bool = True,
    title_tokens: float = 13,
    longest_title: int = 35,
    token_dtype: torch.dtype = torch.float32,
    host_memory: float = 4e9,
    device_memory: float = 2e9,
    token_device_memory: float = 0.0,
    rerank_batch_tokens: int | None = None,
    most_batch_tokens: int = engine.RERANK_BATCH_TOKENS,
    chunk_size: int = engine.GALLERY_CHUNK,
) -> MemoryPlan:
    """Memory and work of a retrieval, known before any of it is done.

    Args:
        config: the model's, with `vision_config` and `text_config`.
        num_images, num_texts: sizes of the galleries.
        k: candidates of a query; 0: no second stage; as many as the gallery: all pairs.
        both_directions: photos for titles and titles for photos, or the first alone.
        title_tokens, longest_title: mean and largest length of the titles.
        token_dtype: type in which the image tokens are kept and the passes run.
        host_memory: bytes that image tokens may fill there, beside those on the device.
        device_memory: bytes that keys, values and one re-ranking pass may fill, beside the weights.
        token_device_memory: bytes of the device that image tokens may fill, beside `device_memory`.
        rerank_batch_tokens: text tokens of a pass; None: as many as `device_memory` holds, up to `most_batch_tokens`.
        most_batch_tokens: beyond which a pass is not faster, see `engine.default_batch_tokens`.
        chunk_size: of the search.

    Raises:
        ValueError: an empty gallery, or a `k` below 0.
        UsageError: a `device_memory` too small for one image and one title.
    """
    if min(num_images, num_texts) < 1 or k < 0:
        raise ValueError(
            f"{num_images} images, {num_texts} titles and k = {k} given: at least 1 image and 1 title, k of at least 0"
        )
    vision = config.vision_config
    element, P, E = token_dtype.itemsize, tokens_per_image(config), config.image_text_hidden_size
    one_image = P * vision.hidden_size * element
    image_kv, per_token = _rerank_bytes(config, element)
    if rerank_batch_tokens is None:
        rerank_batch_tokens = fitting_batch_tokens(config, token_dtype, device_memory, longest_title, most_batch_tokens)
    pairs_per_pass = max(1, rerank_batch_tokens // longest_title)
    text_k, image_k = min(k, num_images), min(k, num_texts)  # candidates of a title, of an image
    candidates = num_texts * text_k + (num_images * image_k if both_directions else 0)
    max_pairs = min(candidates, num_images * num_texts)
    length = math.ceil(title_tokens)
    on_device = min(num_images, int(token_device_memory // one_image))
    return MemoryPlan(
        num_images=num_images,
        num_texts=num_texts,
        k=k,
        token_dtype=token_dtype,
        image_tokens=num_images * one_image,
        images_on_device=on_device,
        images_kept=min(num_images - on_device, int(host_memory // one_image)),
        embeddings=(num_images + num_texts) * E * 4,
        candidates=candidates * (8 + 3 * 4),
        search_block=min(engine.QUERY_BLOCK, max(num_images, num_texts))
        * min(chunk_size, max(num_images, num_texts))
        * 4,
        image_kv=image_kv,
        images_per_pass=engine.most_images(rerank_batch_tokens),
        rerank_batch_tokens=rerank_batch_tokens,
        rerank_pass=max(rerank_batch_tokens, longest_title) * per_token,
        pairs_per_pass=pairs_per_pass,
        max_pairs=max_pairs,
        embed_flops=num_images * image_flops(config) + num_texts * text_flops(config, length),
        search_flops=(2 if both_directions else 1) * 2 * num_images * num_texts * E,
        rerank_flops=min(num_images, max_pairs) * image_kv_flops(config) + max_pairs * match_flops(config, length),
    )


def free_for_tokens(device: torch.device) -> float:
    """Bytes of the device that image tokens may fill between the stages: 0 where it is the host itself. Beside them
    there has to be room for a re-ranking pass, which may take half of what is free."""
    return 0.4 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0.0


def fitting_batch_tokens(config, dtype: torch.dtype, device_memory: float, longest_title: int, most: int) -> int:
    """Text tokens of a re-ranking pass that so many bytes hold together with the keys and values of its images, at most
    `most`.

    Raises:
        UsageError: the memory is too small for one image and one title.
    """
    image_kv, per_token = _rerank_bytes(config, dtype.itemsize)
    fitting = int(device_memory - image_kv) // per_token  # beside those of one image
    if fitting < longest_title:
        raise UsageError(
            f"{size_text(device_memory)} of device memory given, re-ranking one title of {longest_title} tokens "
            f"takes {size_text(image_kv + longest_title * per_token)}: give at least that"
        )
    fitting = min(fitting, most)
    return max(  # by the number of images, whose keys and values leave the less for tokens the more there are
        min(fitting, (images + 1) * engine.TOKENS_PER_IMAGE - 1, int(device_memory - images * image_kv) // per_token)
        for images in range(1, engine.most_images(fitting) + 1)
    )


def batch_tokens_now(model, longest_title: int, dtype: torch.dtype | None) -> int:
    """Text tokens of a re-ranking pass for a model where it is: what suits the device and its free memory.

    Raises:
        UsageError: the memory is too small for one image and one title.
    """
    device = next(model.parameters()).device
    most = engine.default_batch_tokens(device)
    if device.type != "cuda":
        return most
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept for what comes next
    free = torch.cuda.mem_get_info(device)[0] + unused
    return fitting_batch_tokens(model.config, dtype or model.dtype, free / 2, longest_title, most)


def _rerank_bytes(config, element: int) -> tuple[int, int]:
    """Of the keys and values of one image, and of one text token in a re-ranking pass."""
    text = config.text_config
    image_kv = text.num_hidden_layers * 2 * tokens_per_image(config) * text.hidden_size * element
    # Alive at the widest point of a layer: both sides of the activation function, and in D-wide states up to eight
    # (measured in fp32 and under bf16 autocast), here one more. Fused attention keeps no scores.
    return image_kv, (2 * text.intermediate_size + 9 * text.hidden_size) * element


# --- of this process --------------------------------------------------------------------------------------------------


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


def count_photos(photos: Source) -> int:
    """How many photos a source has, as far as that can be told without reading them: rows that name the same file are
    one, copies are not noticed, and of large or packed data every row counts."""
    if not photos.random_access or photos.num_rows > ROWS_LOOKED_AT:
        return photos.num_rows
    if any(isinstance(row.image, bytes) for row in photos.read_range(0, 1)):  # which would all be read
        return photos.num_rows
    rows = photos.read_range(0, photos.num_rows)
    return len({row.image if isinstance(row.image, str) else ("row", row.row) for row in rows})


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
) -> MemoryPlan:
    """Plan for one process, on the device and with the memory that it has now.

    Args:
        depth: candidates of a query; `num_photos`: all pairs.
        dtype: of the passes.
        rerank_batch_tokens, image_token_memory_gb: None: what the memory holds.

    Raises:
        UsageError: the memory is too small for a single pair.
    """
    length, longest = title_tokens(processor.tokenizer, titles, processor.max_length)
    host = available_memory() / 2 if image_token_memory_gb is None else image_token_memory_gb * 1e9
    device = launched_device()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return memory_plan(
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
        token_device_memory=free_for_tokens(device),
        rerank_batch_tokens=rerank_batch_tokens,
        most_batch_tokens=engine.default_batch_tokens(device),
    )


def expected_time(plan: MemoryPlan) -> str:
    """Lines that say how long the work of a plan takes: on one H200 at a stated share of its peak, and on this CPU."""
    flops = plan.embed_flops + plan.search_flops + plan.rerank_flops
    here = measured_matmul_flops()
    return "\n".join(
        [
            f"expected time, {flops:.3g} FLOPs in all, reading and decoding photos not included:",
            f"  one H200 in bf16 at {100 * ASSUMED_SHARE:.0f} % of its {H200_FLOPS / 1e12:.0f} TFLOP/s (assumed): "
            f"{duration_text(flops / (H200_FLOPS * ASSUMED_SHARE))}",
            f"  this machine's CPU at {100 * ASSUMED_SHARE:.0f} % of a large fp32 matrix product just measured, "
            f"{here / 1e9:.0f} GFLOP/s: {duration_text(flops / (here * ASSUMED_SHARE))}",
        ]
    )


# --- operations of the model's passes ---------------------------------------------------------------------------------


def image_flops(config, tokens: int | None = None) -> int:
    """Floating-point operations of the matrix products of one photo's pass through the image tower, projection
    included. `tokens`: those that go through the layers; None: all."""
    vision = config.vision_config
    P, D, F = tokens or tokens_per_image(config), vision.hidden_size, vision.intermediate_size
    patches = 2 * (tokens_per_image(config) - 1) * 3 * vision.patch_size**2 * D
    layer = 2 * P * D * (4 * D + 2 * F) + 4 * P**2 * D  # query, key, value, output, MLP; attention
    return patches + vision.num_hidden_layers * layer + 2 * D * config.image_text_hidden_size


def text_flops(config, length: int) -> int:
    """The same for a title of `length` tokens, which sees no image."""
    text = config.text_config
    L, D, F = length, text.hidden_size, text.intermediate_size
    layer = 2 * L * D * (4 * D + 2 * F) + 4 * L**2 * D
    return text.num_hidden_layers * layer + 2 * D * config.image_text_hidden_size


def image_kv_flops(config, tokens: int | None = None) -> int:
    """The same for `project_image_kv` of one image."""
    text = config.text_config
    return (
        text.num_hidden_layers
        * 2
        * (tokens or tokens_per_image(config))
        * text.encoder_hidden_size
        * 2
        * text.hidden_size
    )


def match_flops(config, length: int, tokens: int | None = None) -> int:
    """The same for `match` of one title of `length` tokens with an image whose keys and values are there."""
    text = config.text_config
    P, L, D, F = tokens or tokens_per_image(config), length, text.hidden_size, text.intermediate_size
    layer = 2 * L * D * (6 * D + 2 * F) + 4 * L**2 * D + 4 * L * P * D
    # Of the last layer only the first token is computed, from keys and values of all.
    last = 2 * L * D * 2 * D + 2 * D * (4 * D + 2 * F) + 4 * L * D + 4 * P * D
    return (text.num_hidden_layers - 1) * layer + last + 2 * D * 2


def tokens_per_image(config) -> int:
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1


def size_text(count: float) -> str:
    """12.3 GB, in three digits and powers of 1000."""
    power = min(max(int(math.log10(max(count, 1))) // 3, 0), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def launched_device() -> torch.device:
    """The device that this process will get from the launcher."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    if on_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def measured_matmul_flops(size: int = 1024, times: int = 5) -> float:
    """Operations a second of a large fp32 matrix product on this CPU, just measured."""
    matrix = torch.rand(size, size)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def duration_text(seconds: float) -> str:
    """12.3 hours, in the largest unit of which there are two."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


__all__ = [
    "ASSUMED_SHARE",
    "MemoryPlan",
    "available_memory",
    "batch_tokens_now",
    "count_photos",
    "duration_text",
    "expected_time",
    "free_for_tokens",
    "fitting_batch_tokens",
    "image_flops",
    "image_kv_flops",
    "launched_device",
    "make_plan",
    "match_flops",
    "measured_matmul_flops",
    "memory_plan",
    "size_text",
    "text_flops",
    "title_tokens",
    "tokens_per_image",
]
