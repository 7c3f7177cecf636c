"""Re-ranking: this engine against the cross-attention pass of transformers' BLIP, and against scoring every pair whole.

    python benchmarks/bench_retrieval.py --threads 1 --json benchmarks/results/retrieval.json     # about ten minutes
    python benchmarks/bench_retrieval.py --tiny                                                   # seconds, to try it

ViT-B/16 at 384 px, fp32 on the CPU; both sides have the same random weights and get the same image tokens. Each image
has 128 candidate titles; all numbers are pairs per second:

- titles of 6 to 20 tokens, uniformly: the last line;
- titles of 35 tokens: nothing to gain from their length;
- every pair through the whole model, photo included, against embedding, searching and re-ranking a small catalogue in
  which all titles are candidates, so that both sides give the same logits.

The other side gets the titles of an image padded to 35 tokens and the image's tokens expanded to them, `--peer_batch`
titles at a time (of 4, 8, 16, 32 and 128, small batches are the fastest on a CPU), without a mask over the image.
Sides take turns, and their logits have to agree in every round. Wall time decides; CPU time is in the table too, since
a machine with other work on it disturbs that less.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import BlipConfig, BlipForImageTextRetrieval

import retrieval_aliblip as engine
from aliblip.retrieval.plan import image_flops, image_kv_flops, match_flops, text_flops
from aliblip.retrieval.rankings import candidate_pairs
from benchmarks.common import finish, parser
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval

PADDED = 35
SHORT, LONG = (6, 20), (PADDED, PADDED)
AGREEMENT = 1e-4
TINY = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "initializer_range": 0.3,  # at 0.02, logits of so few channels are all equal
}


def main(command_line: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--images", type=int, default=1, help="images of a round")
    arguments.add_argument("--titles", type=int, default=128, help="candidate titles of an image")
    arguments.add_argument("--peer_batch", type=int, default=8, help="titles in one pass of transformers' BLIP")
    arguments.add_argument("--catalogue", type=int, nargs=2, default=(2, 8), metavar=("IMAGES", "TITLES"))
    arguments.add_argument("--tiny", action="store_true", help="a tiny model: shows that it runs, measures nothing")
    args = arguments.parse_args(command_line)
    torch.set_num_threads(args.threads)
    ours, theirs = both_models(args.tiny)
    with torch.inference_mode():
        report = measure(ours, theirs, args)
    print(f"matrix products   {report['matmul_flops'] / 1e9:6.1f} GFLOP/s")
    for name, part in report["comparisons"].items():
        one, other = part["ours"], part["theirs"]
        print(
            f"{name:<17} {one['pairs_per_second']:8.2f} pairs/s against {other['pairs_per_second']:8.3f}: "
            f"{part['ratio']:.2f} times, {part['cpu_ratio']:.2f} by CPU time, {part['arithmetic_ratio']:.2f} by FLOPs\n"
            f"{'':<17} {one['of_matmul_rate']:.0%} and {other['of_matmul_rate']:.0%} of the matrix rate; "
            f"logits within {part['largest_difference']:.1e}, they spread {part['spread']:.2g}"
        )
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    finish("retrieval", report["comparisons"]["short titles"]["ratio"], {**report, "settings": settings}, args.json)


def both_models(tiny: bool) -> tuple[AliBlipForImageTextRetrieval, BlipForImageTextRetrieval]:
    """Two models in evaluation mode with equal weights: ours as it starts training, transformers' a copy of it."""
    torch.manual_seed(0)
    vision = {**TINY, "image_size": 64} if tiny else {"image_size": 384}
    text = {**TINY, "encoder_hidden_size": 32} if tiny else {}
    config = AliBlipConfig(vision_config=vision, text_config=text, initializer_range=0.3 if tiny else 0.02)
    ours = AliBlipForImageTextRetrieval(config).eval()
    theirs = BlipForImageTextRetrieval(
        BlipConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            image_text_hidden_size=config.image_text_hidden_size,
        )
    ).eval()
    weights = ours.state_dict()
    del weights["temp"]  # theirs has none
    theirs.load_state_dict(weights)
    return ours, theirs


def random_titles(config, count: int, lengths: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (T, 35), special tokens included; the first one is what the matching pass wants."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(lengths[0], lengths[1] + 1, (count,), generator=generator)
    attention_mask = (torch.arange(PADDED) < length[:, None]).long()
    input_ids = torch.randint(1000, 30000, (count, PADDED), generator=generator) * attention_mask
    input_ids[:, 0] = config.enc_token_id
    return input_ids, attention_mask


def rerank_theirs(theirs, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor, batch: int) -> Tensor:
    """Match logits of all images (N, P, D) with all titles (T, 35): (N x T,)."""
    logits = []
    for tokens in image_tokens:
        for ids, mask in zip(input_ids.split(batch), attention_mask.split(batch), strict=True):
            hidden = theirs.text_encoder(ids, mask, encoder_hidden_states=tokens.expand(len(ids), -1, -1))
            logits.append(theirs.itm_head(hidden.last_hidden_state[:, 0])[:, 1])
    return torch.cat(logits)


def rerank_ours(ours, tokens: Tensor, text_ids: list[Tensor], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Match logits of the pairs, image after image: column 1."""
    return engine.rerank(ours, tokens, text_ids, input_ids, attention_mask)[:, 1]


def retrieve_ours(ours, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Photos and titles to the logits of all pairs, by both stages: every title is a candidate of every image."""
    images, titles = len(pixel_values), len(input_ids)
    image_embeds, tokens = engine.embed_images(ours, pixel_values)
    text_embeds = engine.embed_texts(ours, input_ids, attention_mask)
    _, text_ids = engine.search(image_embeds, text_embeds, titles)
    _, image_ids = engine.search(text_embeds, image_embeds, images)
    pairs = candidate_pairs(image_ids, text_ids, images, titles)
    return rerank_ours(ours, tokens, [pairs.texts_of(i) for i in range(images)], input_ids, attention_mask)


def score_theirs(theirs, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, batch: int) -> Tensor:
    """Every pair through the whole model."""
    logits = []
    for pixels in pixel_values:
        for ids, mask in zip(input_ids.split(batch), attention_mask.split(batch), strict=True):
            output = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels.expand(len(ids), -1, -1, -1))
            logits.append(output.itm_score[:, 1])
    return torch.cat(logits)


def measure(ours, theirs, args) -> dict:
    config = ours.config
    size = config.vision_config.image_size
    pixel_values = torch.randn(
        max(args.images, args.catalogue[0]), 3, size, size, generator=torch.Generator().manual_seed(0)
    )
    tokens = ours.encode_image(pixel_values[: args.images])  # (N, P, D), for both sides
    catalogue = pixel_values[: args.catalogue[0]], *random_titles(config, args.catalogue[1], SHORT, seed=3)
    sides: dict[str, tuple[Callable, Callable]] = {}
    flops: dict[str, tuple[int, int]] = {}
    for name, lengths, seed in (("short titles", SHORT, 1), ("titles of 35", LONG, 2)):
        titles = random_titles(config, args.titles, lengths, seed)
        sides[name] = (
            lambda titles=titles: rerank_ours(ours, tokens, [torch.arange(args.titles)] * args.images, *titles),
            lambda titles=titles: rerank_theirs(theirs, tokens, *titles, args.peer_batch),
        )
        one_image = rerank_flops(config, titles[1]), args.titles * pair_flops(config)
        flops[name] = args.images * one_image[0], args.images * one_image[1]
    sides["whole, all pairs"] = (
        lambda: retrieve_ours(ours, *catalogue),
        lambda: score_theirs(theirs, *catalogue, args.peer_batch),
    )
    images, count = args.catalogue
    embedding = images * image_flops(config) + count * text_flops(config, PADDED)
    flops["whole, all pairs"] = (
        embedding + images * rerank_flops(config, catalogue[2]),
        images * count * (image_flops(config) + pair_flops(config)),
    )

    retrieve_ours(ours, *(part[:1] for part in catalogue))  # what is set up at the first call is not measured
    score_theirs(theirs, *(part[:1] for part in catalogue), 1)
    seconds: dict[str, tuple[list, list]] = {name: ([], []) for name in sides}
    matmul_rates, differences, spreads = [], dict.fromkeys(sides, 0.0), {}
    for _ in range(args.rounds):
        matmul_rates.append(matmul_rate())
        for name, pair in sides.items():
            outputs = []
            for side, times in zip(pair, seconds[name], strict=True):
                wall, processor = time.perf_counter(), time.process_time()
                outputs.append(side())
                times.append((time.perf_counter() - wall, time.process_time() - processor))
            difference = float((outputs[0] - outputs[1]).abs().max())
            if not difference < AGREEMENT:
                raise RuntimeError(f"{name}: the logits of both sides differ by {difference}")
            differences[name] = max(differences[name], difference)
            spreads[name] = float(outputs[0].std())
    rate = statistics.median(matmul_rates)
    comparisons = {}
    for name in sides:
        pairs = args.catalogue[0] * args.catalogue[1] if name == "whole, all pairs" else args.images * args.titles
        parts = []
        for times, work in zip(seconds[name], flops[name], strict=True):
            wall, processor = (statistics.median(column) for column in zip(*times, strict=True))
            parts.append(
                {
                    "pairs_per_second": pairs / wall,
                    "seconds": [round(value, 3) for value, _ in times],
                    "cpu_seconds": [round(value, 3) for _, value in times],
                    "median_cpu_seconds": processor,
                    "flops": work,
                    "flops_per_second": work / wall,
                    "of_matmul_rate": work / wall / rate,
                }
            )
        comparisons[name] = {
            "ratio": parts[0]["pairs_per_second"] / parts[1]["pairs_per_second"],
            "cpu_ratio": parts[1]["median_cpu_seconds"] / parts[0]["median_cpu_seconds"],
            "arithmetic_ratio": flops[name][1] / flops[name][0],
            "pairs_per_round": pairs,
            "largest_difference": differences[name],
            "spread": spreads[name],
            "ours": parts[0],
            "theirs": parts[1],
        }
    return {"matmul_flops": rate, "matmul_flops_of_rounds": matmul_rates, "comparisons": comparisons}


def rerank_flops(config, attention_mask: Tensor) -> int:
    """Of the engine, for one image and all these titles, which it does not pad."""
    return image_kv_flops(config) + sum(match_flops(config, length) for length in attention_mask.sum(dim=1).tolist())


def pair_flops(config) -> int:
    """Of transformers' BLIP for one pair: keys and values again, all tokens to the end, padded to 35."""
    text = config.text_config
    L, D, F = PADDED, text.hidden_size, text.intermediate_size
    P = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1
    layer = 2 * L * D * (6 * D + 2 * F) + 4 * L**2 * D + 4 * L * P * D
    return image_kv_flops(config) + text.num_hidden_layers * layer + 2 * D * 2


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of a large square product, the best of three."""
    first, second = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        first @ second
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
