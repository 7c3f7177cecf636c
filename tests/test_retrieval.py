"""The engine against full sorts and one-pair-at-a-time passes."""

import functools

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import retrieval_aliblip as engine
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval


class StubModel(nn.Module):
    """The model's contract in few lines: a pair's logit depends on its image, on all its title's tokens and on nothing
    else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        self.projected = 0
        self.called_with = []

    def project_image_kv(self, tokens):
        assert len(tokens) == 1
        self.projected += 1
        return ((tokens, tokens),)

    def match(self, input_ids, attention_mask, image_kv, image_index):
        self.called_with.append(tuple(input_ids.shape))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        image = image_kv[0][0].sum(dim=(1, 2))[image_index]
        title = (input_ids * mask).sum(dim=1) * mask.sum(dim=1)
        return torch.stack([torch.zeros_like(image), torch.sin(image * 3 + title)], dim=1)


@functools.cache
def tiny_model():
    torch.manual_seed(0)
    config = AliBlipConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        text_config={
            "vocab_size": 60,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 40,
        },
        image_text_hidden_size=16,
        enc_token_id=59,
    )
    model = AliBlipForImageTextRetrieval(config).eval()
    for parameter in model.parameters():  # initial weights of 0.02 give logits too equal to tell apart
        parameter.data.mul_(4)
    return model


def titles(count, shortest, longest, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    attention_mask = (torch.arange(longest) < lengths[:, None]).long()
    input_ids = torch.randint(5, 59, (count, longest), generator=generator) * attention_mask
    return input_ids, attention_mask


def slow_search(queries, gallery, k):
    scores = queries.float() @ gallery.float().t()
    ids = [sorted(range(len(row)), key=lambda item: (-row[item], item))[:k] for row in scores.tolist()]
    ids = torch.tensor(ids)
    return scores.gather(1, ids), ids


# --- search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 5, 16, 45, 46, 47, 1000])
@pytest.mark.parametrize("k", [1, 9, 46])
def test_chunked_search_equals_a_full_sort_with_ties(dtype, chunk, k):
    generator = torch.Generator().manual_seed(1)
    # small whole numbers: products are exact in every type and chunk, and most scores are tied
    queries = torch.randint(-2, 3, (17, 3), generator=generator).to(dtype)
    gallery = torch.randint(-2, 3, (46, 3), generator=generator).to(dtype)
    scores, ids = engine.search(queries, gallery, k, chunk_size=chunk)
    expected_scores, expected_ids = slow_search(queries, gallery, k)
    assert scores.dtype == torch.float32 and ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    assert torch.equal(scores, expected_scores)


def test_every_item_equal_gives_the_lowest_ids():
    scores, ids = engine.search(torch.ones(3, 4), torch.ones(100, 4), 7, chunk_size=30)
    assert ids.tolist() == [list(range(7))] * 3
    assert torch.equal(scores, torch.full((3, 7), 4.0))


def test_query_blocks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    queries = torch.randint(-2, 3, (23, 5), generator=generator).float()
    gallery = torch.randint(-2, 3, (31, 5), generator=generator).float()
    whole = engine.search(queries, gallery, 6)
    monkeypatch.setattr(engine, "QUERY_BLOCK", 4)
    for got, expected in zip(engine.search(queries, gallery, 6, chunk_size=8), whole, strict=True):
        assert torch.equal(got, expected)


def test_chunk_sizes_agree_on_real_valued_embeddings():
    generator = torch.Generator().manual_seed(3)
    queries = nn.functional.normalize(torch.randn(50, 64, generator=generator), dim=1)
    gallery = nn.functional.normalize(torch.randn(301, 64, generator=generator), dim=1)
    scores, ids = engine.search(queries, gallery, 20, chunk_size=1000)
    for chunk in (1, 7, 100, 300):
        other_scores, other_ids = engine.search(queries, gallery, 20, chunk_size=chunk)
        torch.testing.assert_close(other_scores, scores, atol=1e-5, rtol=0)
        swapped = (other_ids != ids).nonzero()
        for query, place in swapped.tolist():  # only neighbours closer than the rounding may change places
            assert (scores[query, place] - queries[query] @ gallery[other_ids[query, place]]).abs() < 1e-5


@pytest.mark.parametrize("k", [0, 11])
def test_search_refuses_a_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k is {k}, but the gallery has 10 items"):
        engine.search(torch.ones(2, 3), torch.ones(10, 3), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_search_refuses_what_has_no_order(value, dtype):
    fine, broken = torch.ones(10, 3, dtype=dtype), torch.ones(10, 3, dtype=dtype)
    broken[4, 1] = value
    with pytest.raises(ValueError, match="the gallery hold values that are not finite"):
        engine.search(fine, broken, 2)
    with pytest.raises(ValueError, match="the queries hold values that are not finite"):
        engine.search(broken, fine, 2)


def test_search_refuses_widths_that_differ_and_takes_no_queries():
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(10, 4\)"):
        engine.search(torch.ones(2, 3), torch.ones(10, 4), 2)
    scores, ids = engine.search(torch.ones(0, 3), torch.ones(10, 3), 2)
    assert scores.shape == ids.shape == (0, 2)


# --- candidate pairs --------------------------------------------------------------------------------------------------


def test_pairs_of_both_directions_are_grouped_by_image_once_each():
    image_ids = torch.tensor([[2, 0], [2, 1], [0, 2]])  # of titles 0, 1, 2
    text_ids = torch.tensor([[0, 2], [1, 0], [1, 2], [0, 1]])  # of images 0 to 3
    pairs = engine.candidate_pairs(image_ids, text_ids, num_images=4, num_texts=3)
    expected = {(int(i), t) for t, row in enumerate(image_ids) for i in row}
    expected |= {(i, int(t)) for i, row in enumerate(text_ids) for t in row}
    found = list(zip(pairs.image_id.tolist(), pairs.text_id.tolist(), strict=True))
    assert found == sorted(expected) and len(pairs) == len(expected)
    for image in range(4):
        assert pairs.texts_of(image).tolist() == sorted(t for i, t in expected if i == image)
    positions = pairs.locate(image_ids, torch.arange(3)[:, None])
    assert torch.equal(pairs.image_id[positions], image_ids)
    assert torch.equal(pairs.text_id[positions], torch.arange(3)[:, None].expand(3, 2))


def test_pairs_of_one_direction_only_and_images_without_candidates():
    pairs = engine.candidate_pairs(torch.tensor([[3], [3]]), torch.empty(0, 5, dtype=torch.int64), 5, 2)
    assert [pairs.texts_of(image).tolist() for image in range(5)] == [[], [], [], [0, 1], []]


def test_pairs_outside_the_table_or_the_galleries_are_refused():
    pairs = engine.candidate_pairs(torch.tensor([[1]]), torch.empty(0, 1, dtype=torch.int64), 2, 1)
    with pytest.raises(KeyError):
        pairs.locate(torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="image ids from 2 to 2 given, the gallery has 0 to 1"):
        engine.candidate_pairs(torch.tensor([[2]]), torch.empty(0, 1, dtype=torch.int64), 2, 1)


# --- rerank -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 30, 100, 10_000])
def test_rerank_equals_one_pair_at_a_time(batch_tokens):
    model = StubModel()
    input_ids, attention_mask = titles(60, 2, 20)
    tokens = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    text_ids = [torch.randperm(60, generator=generator)[:m] for m in (60, 0, 1, 25)]
    got = engine.rerank(model, tokens, text_ids, input_ids, attention_mask, batch_tokens)
    assert model.projected == 3, "each image with candidates is projected once"
    for count, length in model.called_with:
        assert count * length <= batch_tokens or count == 1

    slow = StubModel()
    expected = []
    for image, ids in zip(tokens, text_ids, strict=True):
        for title in ids.tolist():
            length = int(attention_mask[title].sum())
            kv = slow.project_image_kv(image[None])
            logits = slow.match(input_ids[title : title + 1, :length], None, kv, torch.zeros(1, dtype=torch.int64))
            expected.append(float(logits[0, 1]))
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_tokens", [40, 10_000])
@torch.no_grad()
def test_rerank_of_the_real_model_equals_its_plain_pair_forward(batch_tokens):
    model = tiny_model()
    input_ids, attention_mask = titles(40, 4, 35)
    pixel_values = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    _, tokens = engine.embed_images(model, pixel_values)
    text_ids = [torch.arange(40), torch.tensor([39, 3, 5]), torch.arange(7, 20)]
    got = engine.rerank(model, tokens, text_ids, input_ids, attention_mask, batch_tokens).split([40, 3, 13])
    for image, ids in enumerate(text_ids):
        for place, title in enumerate(ids.tolist()):
            # all 35 positions, padding and mask: what is cut away may not matter
            output = model(pixel_values[image, None], input_ids[title, None], attention_mask[title, None])
            assert abs(float(output.itm_logits[0, 1]) - float(got[image][place])) < 1e-4
    assert float(got[0].std()) > 1e-3  # the logits do differ


@torch.no_grad()
def test_both_stages_rank_as_the_plain_forward_of_every_pair():
    model, images, texts, k = tiny_model(), 6, 30, 11
    input_ids, attention_mask = titles(texts, 4, 20, seed=5)
    pixel_values = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    plain = torch.stack(
        [
            model(pixel_values[i, None].expand(texts, -1, -1, -1), input_ids, attention_mask).itm_logits[:, 1]
            for i in range(images)
        ]
    )  # (images, texts)
    image_embeds, tokens = engine.embed_images(model, pixel_values)
    text_embeds = engine.embed_texts(model, input_ids, attention_mask)
    itc = image_embeds @ text_embeds.t()
    text_scores, text_ids = engine.search(image_embeds, text_embeds, k, chunk_size=7)
    image_scores, image_ids = engine.search(text_embeds, image_embeds, 3, chunk_size=4)
    pairs = engine.candidate_pairs(image_ids, text_ids, images, texts)
    logits = engine.rerank(model, tokens, [pairs.texts_of(i) for i in range(images)], input_ids, attention_mask, 100)
    of_images, of_texts = torch.arange(images)[:, None], torch.arange(texts)[:, None]
    for found, stage_1, expected in (
        (
            engine.order_by_score(engine.fuse(text_scores, logits[pairs.locate(of_images, text_ids)]), text_ids),
            slow_search(image_embeds, text_embeds, k)[1],
            plain + itc,
        ),
        (
            engine.order_by_score(engine.fuse(image_scores, logits[pairs.locate(image_ids, of_texts)]), image_ids),
            slow_search(text_embeds, image_embeds, 3)[1],
            (plain + itc).t(),
        ),
    ):
        scores, ids = found
        assert torch.equal(ids.sort(dim=1)[0], stage_1.sort(dim=1)[0])
        torch.testing.assert_close(scores, expected.gather(1, ids), atol=1e-4, rtol=0)
        best = expected.gather(1, stage_1).sort(dim=1, descending=True)
        wanted, gap = stage_1.gather(1, best.indices), best.values[:, :-1] - best.values[:, 1:]
        apart = torch.nn.functional.pad(gap, (1, 1), value=1.0) > 1e-4
        settled = apart[:, :-1] & apart[:, 1:]  # further than rounding from both neighbours
        assert settled.float().mean() > 0.9
        assert torch.equal(ids[settled], wanted[settled])


@torch.no_grad()
def test_rerank_in_half_precision_stays_near():
    model = tiny_model()
    input_ids, attention_mask = titles(12, 4, 20)
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    text_ids = [torch.arange(12), torch.arange(5)]
    features, tokens = engine.embed_images(model, pixel_values)
    full = engine.rerank(model, tokens, text_ids, input_ids, attention_mask)
    half_features, half_tokens = engine.embed_images(model, pixel_values, torch.bfloat16)
    half = engine.rerank(model, half_tokens, text_ids, input_ids, attention_mask, dtype=torch.bfloat16)
    assert half.dtype == half_features.dtype == torch.float32
    torch.testing.assert_close(half_features, features, atol=0.03, rtol=0)
    torch.testing.assert_close(half, full, atol=0.1, rtol=0.1)


def test_rerank_refuses_titles_padded_on_the_left():
    with pytest.raises(ValueError, match="padded on the right"):
        engine.rerank(
            StubModel(), torch.rand(1, 3, 2), [torch.tensor([0])], torch.ones(1, 3), torch.tensor([[0, 1, 1]])
        )


def test_buckets_are_few_and_cover_everything():
    lengths = torch.arange(128) % 15 + 6  # 6 to 20 tokens
    order, bounds = engine._buckets(lengths, 8192)
    assert sorted(order.tolist()) == list(range(128))
    assert [start for start, _ in bounds] == [0] + [stop for _, stop in bounds[:-1]] and bounds[-1][1] == 128
    padded = sum((stop - start) * int(lengths[order[start]]) for start, stop in bounds)
    assert 2 <= len(bounds) <= 6
    assert padded < 1.15 * int(lengths.sum())
    assert len(engine._buckets(torch.full((128,), 35), 8192)[1]) == 1
    assert len(engine._buckets(torch.tensor([9]), 1)[1]) == 1


def test_fused_order_is_the_sum_with_ties_to_the_lower_id():
    itc = torch.tensor([[0.75, 0.5, 0.5, 0.25]])
    ids = torch.tensor([[8, 2, 6, 1]])
    itm = torch.tensor([[0.0, 0.25, 0.25, 1.0]])
    scores, order = engine.order_by_score(engine.fuse(itc, itm), ids)
    assert order.tolist() == [[1, 2, 6, 8]]
    assert scores.tolist() == [[1.25, 0.75, 0.75, 0.75]]
    assert engine.fuse(itc, itm, 2.0).tolist() == [[1.5, 1.25, 1.25, 1.5]]


# --- memory and work --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_counted_operations_are_those_of_the_model():
    model = tiny_model()
    config, ids = model.config, torch.randint(5, 59, (1, 11))
    pixel_values = torch.randn(1, 3, 32, 32)
    image_kv = model.project_image_kv(model.encode_image(pixel_values))
    model.set_attn_implementation("eager")  # the counter doesn't see into the fused one of the CPU
    try:
        for expected, work in (
            (engine.image_flops(config), lambda: model.get_image_features(pixel_values)),
            (engine.text_flops(config, 11), lambda: model.get_text_features(ids)),
            (engine.image_kv_flops(config), lambda: model.project_image_kv(model.encode_image(pixel_values))),
            (engine.match_flops(config, 11), lambda: model.match(ids, None, image_kv, torch.zeros(1).long())),
        ):
            with FlopCounterMode(display=False) as counter:
                work()
            counted = counter.get_total_flops()
            if expected == engine.image_kv_flops(config):  # the tower ran too, without its projection
                counted -= engine.image_flops(config) - 2 * 32 * 16
            assert counted == expected
    finally:
        model.set_attn_implementation("sdpa")


def test_memory_plan_of_a_million():
    plan = engine.memory_plan(AliBlipConfig.from_size("base"), 10**6, 10**6, 128, token_dtype=torch.bfloat16)
    assert plan.image_tokens == 10**6 * 577 * 768 * 2
    assert plan.images_kept == int(4e9) // (577 * 768 * 2)
    assert plan.embeddings == 2 * 10**6 * 256 * 4
    assert plan.image_kv == 12 * 2 * 577 * 768 * 2
    assert plan.max_pairs == 2 * 10**6 * 128 and plan.candidates == plan.max_pairs * 12
    assert plan.rerank_batch_tokens == engine.RERANK_BATCH_TOKENS and plan.pairs_per_pass == 8192 // 35
    assert plan.search_flops == 2 * (2 * 10**12 * 256)
    text = str(plan)
    assert "image tokens: 886 GB in bfloat16, 886 kB an image; 4,513 images' are kept in host memory" in text
    assert "21.3 MB of keys and values" in text and "re-rank 256,000,000 pairs" in text


def test_memory_plan_of_a_small_catalogue():
    config = tiny_model().config
    plan = engine.memory_plan(config, 20, 30, 128, longest_title=20)
    assert plan.images_kept == 20 and "all are kept" in str(plan)
    assert plan.max_pairs == 20 * 30, "every pair once, however many candidates were asked for"
    assert plan.search_block == 30 * 30 * 4
    given = engine.memory_plan(config, 20, 30, 5, longest_title=20, rerank_batch_tokens=100)
    assert given.rerank_batch_tokens == 100 and given.pairs_per_pass == 5 and given.max_pairs == 30 * 5 + 20 * 5


def test_memory_plan_chooses_the_size_of_a_pass_by_the_memory():
    config = tiny_model().config
    per_token = (2 * 64 + 9 * 32) * 4
    image_kv = 2 * 2 * 5 * 32 * 4
    plan = engine.memory_plan(config, 9, 9, 3, longest_title=20, device_memory=image_kv + 50 * per_token)
    assert plan.image_kv == image_kv
    assert plan.rerank_batch_tokens == 50 and plan.rerank_pass == 50 * per_token
    with pytest.raises(ValueError, match="one title of 20 tokens takes 35.8 kB: give at least that"):
        engine.memory_plan(config, 9, 9, 3, longest_title=20, device_memory=image_kv + 19 * per_token)
    with pytest.raises(ValueError, match="0 images, 9 titles and k = 3 given"):
        engine.memory_plan(config, 0, 9, 3)
    alone, both = (engine.memory_plan(config, 9, 30, 3, both_directions=both) for both in (False, True))
    assert (alone.max_pairs, both.max_pairs) == (90, 90 + 27) and alone.search_flops * 2 == both.search_flops
    nothing = engine.memory_plan(config, 9, 30, 0)
    assert nothing.rerank_flops == 0 and "none re-ranked" in str(nothing)
    assert "every pair scored" in str(engine.memory_plan(config, 9, 30, 9))
