"""The engine against full sorts and one-pair-at-a-time passes."""

import functools

import pytest
import torch
import torch.nn as nn

import retrieval_aliblip as engine
from aliblip.retrieval.rankings import candidate_pairs
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
        self.projected += len(tokens)
        return ((tokens, tokens),)

    def match(self, input_ids, image):
        """A title (L,) with an image (P, D): (2,)."""
        matched = torch.sin(image.sum() * 3 + input_ids.sum() * len(input_ids))
        return torch.stack([torch.zeros_like(matched), matched])

    def match_packed(self, input_ids, packed, image_kv):
        images = image_kv[0][0]
        lengths = [length for pairs, length in packed.sizes for _ in range(pairs)]
        self.called_with.append((len(images), lengths))
        assert all(0 < pairs <= engine._MOST_PAIRS for pairs, _ in packed.sizes)
        assert packed.first.tolist() == [sum(lengths[:pair]) for pair in range(len(lengths))]
        assert packed.positions.tolist() == [place for length in lengths for place in range(length)]
        of_pairs = [0] * len(lengths)
        if len(images) > 1:
            rows, places = packed.tokens_by_image
            assert rows.flatten()[places].tolist() == list(range(len(input_ids)))
            of_tokens = (places // rows.shape[1]).tolist()
            of_pairs = (packed.pairs_by_image.places // packed.pairs_by_image.rows.shape[1]).tolist()
            assert of_tokens == [image for image, length in zip(of_pairs, lengths, strict=True) for _ in range(length)]
            assert packed.pairs_by_image.rows.flatten()[packed.pairs_by_image.places].tolist() == list(
                range(len(lengths))
            )
        titles = input_ids.split(lengths)
        return torch.stack([self.match(ids, images[image]) for ids, image in zip(titles, of_pairs, strict=True)])


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


# --- rerank -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images_per_pass", [1, 3, None])
@pytest.mark.parametrize("batch_tokens", [1, 30, 100, 1500, 10_000])
def test_rerank_equals_one_pair_at_a_time(batch_tokens, images_per_pass, monkeypatch):
    monkeypatch.setattr(engine, "_MOST_PAIRS", 3)
    monkeypatch.setattr(engine, "_SHARED_TOKENS_OF_A_CPU", 10_000)
    model = StubModel()
    input_ids, attention_mask = titles(60, 2, 20)
    tokens = torch.rand(6, 3, 2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    text_ids = [torch.randperm(60, generator=generator)[:m] for m in (60, 0, 1, 25, 2, 27)]
    options = {"images_per_pass": images_per_pass, "rerank_batch_tokens": batch_tokens}
    got = engine.rerank(model, tokens, text_ids, input_ids, attention_mask, **options)[:, 1]
    assert model.projected == 5, "each image with candidates is projected once"
    for images, lengths in model.called_with:
        assert images <= (images_per_pass or max(1, batch_tokens // 1024))
        assert sum(lengths) <= batch_tokens or len(lengths) == 1
        assert lengths == sorted(lengths, reverse=True)
    assert sum(len(lengths) for _, lengths in model.called_with) == 115

    expected = []
    for image, ids in zip(tokens, text_ids, strict=True):
        for title in ids.tolist():
            length = int(attention_mask[title].sum())
            expected.append(float(model.match(input_ids[title, :length], image)[1]))
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_tokens", [25, 8192])
@pytest.mark.parametrize("images_per_pass", [2, 4, 16])
@torch.no_grad()
def test_rerank_of_several_images_a_pass_equals_one_pair_at_a_time(images_per_pass, batch_tokens, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(engine, "_SHARED_TOKENS_OF_A_CPU", 900)
    input_ids, attention_mask = titles(30, 2, 20)
    _, tokens = engine.embed_images(model, torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
    generator = torch.Generator().manual_seed(1)
    text_ids = [torch.randperm(30, generator=generator)[:m] for m in (3, 0, 1, 12, 2, 0, 5, 1, 30)]
    asked, calls, match = [], [], model.match_packed

    def tokens_of(images):
        asked.append(images)
        return tokens[images]

    def counted(input_ids, packed, image_kv):
        calls.append((len(image_kv[0][0]), len(input_ids), len(packed.first)))
        return match(input_ids, packed, image_kv)

    monkeypatch.setattr(model, "match_packed", counted)
    options = {"images_per_pass": images_per_pass, "rerank_batch_tokens": batch_tokens}
    got = engine.rerank(model, tokens_of, text_ids, input_ids, attention_mask, **options)
    monkeypatch.undo()
    wanted = [0, 2, 3, 4, 6, 7, 8]  # the others have no titles
    assert sorted(sum(asked, [])) == wanted and all(len(images) <= images_per_pass for images in asked)
    if batch_tokens == 8192:  # images of many titles come together, those of few too, whatever stands between them
        by_tokens = sorted(wanted, key=lambda image: -int(attention_mask[text_ids[image]].sum()))
        expected = {
            2: [by_tokens[:2], by_tokens[2:4], by_tokens[4:6], by_tokens[6:]],
            4: [by_tokens[:2], by_tokens[2:6], by_tokens[6:]],
            16: [by_tokens[:2], by_tokens[2:]],
        }
        assert asked == expected[images_per_pass]
    assert all(count <= batch_tokens or pairs == 1 for _, count, pairs in calls)
    expected = []
    for image, ids in enumerate(text_ids):
        kv = model.project_image_kv(tokens[image, None])
        zero = torch.zeros(1, dtype=torch.int64)
        expected += [model.match(input_ids[t, None], attention_mask[t, None], kv, zero)[0] for t in ids.tolist()]
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-4, rtol=0)
    assert float(got.std(dim=0).min()) > 1e-3  # the logits do differ


def test_rerank_of_nothing_is_empty_and_lists_without_images_are_refused():
    model, (input_ids, attention_mask) = StubModel(), titles(3, 2, 5)
    tokens, none = torch.rand(2, 3, 2), torch.empty(0, dtype=torch.int64)
    assert engine.rerank(model, tokens, [none, none], input_ids, attention_mask).shape == (0, 2)
    with pytest.raises(ValueError, match="2 images and 1 lists of titles given"):
        engine.rerank(model, tokens, [none], input_ids, attention_mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_tokens", [40, 10_000])
@torch.no_grad()
def test_rerank_of_the_real_model_equals_its_plain_pair_forward(batch_tokens, attention, monkeypatch):
    monkeypatch.setattr(engine, "_SHARED_TOKENS_OF_A_CPU", 10_000)
    model = tiny_model()
    input_ids, attention_mask = titles(40, 4, 35)
    pixel_values = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    _, tokens = engine.embed_images(model, pixel_values)
    text_ids = [torch.arange(40), torch.tensor([39, 3, 5]), torch.arange(7, 20)]
    model.set_attn_implementation(attention)
    try:
        got = engine.rerank(model, tokens, text_ids, input_ids, attention_mask, batch_tokens)[:, 1].split([40, 3, 13])
    finally:
        model.set_attn_implementation("sdpa")
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
    pairs = candidate_pairs(image_ids, text_ids, images, texts)
    logits = engine.rerank(model, tokens, [pairs.texts_of(i) for i in range(images)], input_ids, attention_mask, 100)[
        :, 1
    ]
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
    with pytest.raises(ValueError, match="titles of at least one token"):
        engine.Reranker(StubModel(), torch.ones(2, 2), torch.tensor([[1, 1], [0, 0]]))


def test_fused_order_is_the_sum_with_ties_to_the_lower_id():
    itc = torch.tensor([[0.75, 0.5, 0.5, 0.25]])
    ids = torch.tensor([[8, 2, 6, 1]])
    itm = torch.tensor([[0.0, 0.25, 0.25, 1.0]])
    scores, order = engine.order_by_score(engine.fuse(itc, itm), ids)
    assert order.tolist() == [[1, 2, 6, 8]]
    assert scores.tolist() == [[1.25, 0.75, 0.75, 0.75]]
    assert engine.fuse(itc, itm, 2.0).tolist() == [[1.5, 1.25, 1.25, 1.5]]
