"""The plan of a retrieval: counted operations against torch's own counter, memory against arithmetic by hand."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

import retrieval_aliblip as engine
from aliblip.retrieval.plan import (
    batch_tokens_now,
    image_flops,
    image_kv_flops,
    match_flops,
    memory_plan,
    text_flops,
)
from aliblip.runtime.mistakes import UsageError
from configuration_aliblip import AliBlipConfig

SMALL = {"vision_config": {"patch_size": 16}, "text_config": {"hidden_size": 32, "intermediate_size": 64}}


@torch.no_grad()
def test_counted_operations_are_those_of_the_model():
    model = tiny.model(**SMALL).eval()
    config, ids = model.config, torch.randint(5, 59, (1, 11))
    pixel_values = torch.randn(1, 3, 32, 32)
    image_kv = model.project_image_kv(model.encode_image(pixel_values))
    model.set_attn_implementation("eager")  # the counter doesn't see into the fused one of the CPU
    try:
        for expected, work in (
            (image_flops(config), lambda: model.get_image_features(pixel_values)),
            (text_flops(config, 11), lambda: model.get_text_features(ids)),
            (image_kv_flops(config), lambda: model.project_image_kv(model.encode_image(pixel_values))),
            (match_flops(config, 11), lambda: model.match(ids, None, image_kv, torch.zeros(1).long())),
        ):
            with FlopCounterMode(display=False) as counter:
                work()
            counted = counter.get_total_flops()
            if expected == image_kv_flops(config):  # the tower ran too, without its projection
                counted -= image_flops(config) - 2 * 32 * 16
            assert counted == expected
    finally:
        model.set_attn_implementation("sdpa")


def test_memory_plan_of_a_million():
    plan = memory_plan(AliBlipConfig.from_size("base"), 10**6, 10**6, 128, token_dtype=torch.bfloat16)
    assert plan.image_tokens == 10**6 * 577 * 768 * 2
    assert plan.images_kept == int(4e9) // (577 * 768 * 2)
    assert plan.embeddings == 2 * 10**6 * 256 * 4
    assert plan.image_kv == 12 * 2 * 577 * 768 * 2
    assert plan.max_pairs == 2 * 10**6 * 128 and plan.candidates == plan.max_pairs * 20
    assert plan.rerank_batch_tokens == engine.RERANK_BATCH_TOKENS and plan.pairs_per_pass == 8192 // 35
    assert plan.search_flops == 2 * (2 * 10**12 * 256)
    text = str(plan)
    assert "image tokens: 886 GB in bfloat16, 886 kB an image; 4,513 images' are kept in host memory" in text
    assert "21.3 MB of keys and values" in text and "re-rank 256,000,000 pairs" in text


def test_memory_plan_of_a_small_catalogue():
    config = tiny.config(**SMALL)
    plan = memory_plan(config, 20, 30, 128, longest_title=20)
    assert plan.images_kept == 20 and "all are kept" in str(plan)
    assert plan.max_pairs == 20 * 30, "every pair once, however many candidates were asked for"
    assert plan.search_block == 30 * 30 * 4
    given = memory_plan(config, 20, 30, 5, longest_title=20, rerank_batch_tokens=100)
    assert given.rerank_batch_tokens == 100 and given.pairs_per_pass == 5 and given.max_pairs == 30 * 5 + 20 * 5


def test_memory_plan_chooses_the_size_of_a_pass_by_the_memory():
    config = tiny.config(**SMALL)
    per_token = (2 * 64 + 9 * 32) * 4
    image_kv = 2 * 2 * 5 * 32 * 4
    plan = memory_plan(config, 9, 9, 3, longest_title=20, device_memory=image_kv + 50 * per_token)
    assert plan.image_kv == image_kv
    assert plan.rerank_batch_tokens == 50 and plan.rerank_pass == 50 * per_token and plan.images_per_pass == 1
    many = {"longest_title": 20, "most_batch_tokens": 65_536}
    for images, tokens in ((1, 1500), (1, 2047), (2, 2048), (3, 3500), (64, 65_536)):
        memory = images * image_kv + tokens * per_token
        plan = memory_plan(config, 9, 9, 3, device_memory=memory, **many)
        assert (plan.images_per_pass, plan.rerank_batch_tokens) == (images, tokens)
        assert f"at most {images} at a time" in str(plan)
    # Too small for another image beside the tokens that would allow it: one image less, and tokens up to its bound.
    plan = memory_plan(config, 9, 9, 3, device_memory=2 * image_kv + 2048 * per_token - 1, **many)
    assert (plan.images_per_pass, plan.rerank_batch_tokens) == (1, 2047)
    assert memory_plan(config, 9, 9, 3, device_memory=1e12, **many).rerank_batch_tokens == 65_536
    with pytest.raises(UsageError, match="one title of 20 tokens takes 35.8 kB: give at least that"):
        memory_plan(config, 9, 9, 3, longest_title=20, device_memory=image_kv + 19 * per_token)
    with pytest.raises(ValueError, match="0 images, 9 titles and k = 3 given"):
        memory_plan(config, 0, 9, 3)
    alone, both = (memory_plan(config, 9, 30, 3, both_directions=both) for both in (False, True))
    assert (alone.max_pairs, both.max_pairs) == (90, 90 + 27) and alone.search_flops * 2 == both.search_flops
    nothing = memory_plan(config, 9, 30, 0)
    assert nothing.rerank_flops == 0 and "none re-ranked" in str(nothing)
    assert "every pair scored" in str(memory_plan(config, 9, 30, 9))


def test_image_tokens_are_kept_on_the_device_first():
    config = AliBlipConfig.from_size("base")
    one = 577 * 768 * 2
    shared = {"k": 128, "token_dtype": torch.bfloat16, "device_memory": 2e9}

    def kept(images: int, on_device: int, in_host: int) -> str:
        memory = {"token_device_memory": on_device * one, "host_memory": in_host * one}
        plan = memory_plan(config, images, 100, **shared, **memory)
        return next(line for line in str(plan).splitlines() if "image tokens" in line).partition("an image; ")[2]

    assert kept(50, 60, 60) == "all are kept on the device"
    assert kept(50, 0, 60) == "all are kept in host memory"
    assert kept(50, 30, 60) == "30 images' are kept on the device, 20 images' are kept in host memory"
    assert kept(50, 30, 5).endswith("5 images' are kept in host memory, the others are encoded again to re-rank")
    assert kept(50, 0, 0) == "all are encoded again to re-rank"


def test_a_pass_on_a_gpu_follows_from_what_is_free_and_what_torch_keeps_unused(monkeypatch):
    config = AliBlipConfig.from_size("base")
    model = SimpleNamespace(
        config=config,
        dtype=torch.float32,
        parameters=lambda: iter([SimpleNamespace(device=torch.device(kind))]),
    )
    for name, value in (("mem_get_info", (0, 0)), ("memory_reserved", 40e9), ("memory_allocated", 10e9)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    kind = "cpu"
    assert batch_tokens_now(model, 35, None) == engine.RERANK_BATCH_TOKENS
    kind = "cuda"
    assert batch_tokens_now(model, 35, torch.bfloat16) == engine.RERANK_BATCH_TOKENS_OF_A_GPU
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (-28e9, 0))
    few = batch_tokens_now(model, 35, torch.bfloat16)
    assert (
        few
        == memory_plan(
            config, 9, 9, 3, token_dtype=torch.bfloat16, device_memory=1e9, most_batch_tokens=10**6
        ).rerank_batch_tokens
    )
    assert batch_tokens_now(model, 35, None) < few < engine.RERANK_BATCH_TOKENS_OF_A_GPU
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (-30e9, 0))
    with pytest.raises(UsageError, match="re-ranking one title of 35 tokens takes"):
        batch_tokens_now(model, 35, None)
