"""What re-ranking costs the host: few operators for each image, and no wait for the device.

A GPU is pretended: tensors on torch's device "meta" have no values, so that whatever reads one on the host fails, and
the engine takes them for those of an accelerator.
"""

from __future__ import annotations

import collections

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import retrieval_aliblip as engine
from aliblip.retrieval import reranking

IMAGES, TITLES = 32, 128
# Image by image, with a pass for each group of titles of like length, there were 3,880.
MOST_OPERATORS = 100
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select", "item")


class Counted(TorchDispatchMode):
    """Operators by name, and those of them that make the host wait for the pretended device."""

    def __init__(self):
        super().__init__()
        self.operators, self.waits, self.copies = collections.Counter(), [], 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        self.operators[name] += 1
        on_device = [value.is_meta for value in tree_leaves((arguments, options)) if isinstance(value, torch.Tensor)]
        result = function(*arguments, **(options or {}))
        if any(on_device) and (name.lstrip("_") in WAITS or "_local_scalar_dense" in name or "unique" in name):
            self.waits.append(name)
        if name in ("_to_copy", "copy_") and result.is_meta != all(on_device):
            self.copies += 1
        return result


@pytest.fixture(scope="module")
def case():
    """A model of 12 text layers, 32 images' tokens, and 128 of 300 titles of 6 to 20 tokens for each."""
    model = tiny.spread_model(text_config={"num_hidden_layers": 12}, vocab_size=64)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 21, (300, 1), generator=generator)
    attention_mask = (torch.arange(20) < lengths).long()
    input_ids = torch.randint(5, 62, (300, 20), generator=generator) * attention_mask
    with torch.no_grad():
        tokens = model.encode_image(torch.randn(IMAGES, 3, 32, 32, generator=generator))
    text_ids = [torch.randperm(300, generator=generator)[:TITLES] for _ in range(IMAGES)]
    return model, tokens, text_ids, (input_ids, attention_mask)


@torch.no_grad()
def test_operators_of_an_image_stay_few(case, monkeypatch):
    model, tokens, text_ids, titles = case
    gpu_tokens = engine.default_batch_tokens(torch.device("cuda"))
    monkeypatch.setattr(engine, "_SHARED_TOKENS_OF_A_CPU", gpu_tokens)
    with Counted() as counted:
        logits = engine.rerank(model, tokens, text_ids, *titles, gpu_tokens)
    assert sum(counted.operators.values()) / IMAGES <= MOST_OPERATORS
    monkeypatch.undo()
    alone = engine.rerank(model, tokens, text_ids, *titles)
    torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)
    assert float(alone[:, 1].std()) > 0.1


@pytest.mark.parametrize("kept_on", ["cpu", "meta"])
@torch.no_grad()
def test_no_pass_waits_for_the_device(case, kept_on):
    _, tokens, text_ids, titles = case
    model = tiny.model(vocab_size=64).eval().to("meta")
    text_ids = [ids[: TITLES // (1 + image % 3)] for image, ids in enumerate(text_ids)]
    reranker = engine.Reranker(model, *titles, rerank_batch_tokens=8192)
    passes, match = [], model.match_packed
    model.match_packed = lambda *arguments: (passes.append(1), match(*arguments))[1]
    tokens = tokens.to(kept_on)
    with Counted() as counted:
        logits = reranker(tokens, text_ids)
    assert logits.is_meta and logits.shape == (sum(map(len, text_ids)), 2)
    assert len(passes) >= 3 and counted.waits == []
    # The layout of a pass, and its image tokens or, if these are there already, the numbers of its images.
    assert counted.copies == 2 * len(passes)


def test_the_pretended_device_shows_a_wait():
    values = torch.zeros(3, device="meta")
    with Counted() as counted, pytest.raises((RuntimeError, NotImplementedError)):
        values.nonzero()
    with pytest.raises((RuntimeError, NotImplementedError)), counted:
        values.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)), counted:
        values.cpu()


@pytest.mark.parametrize(
    "device, expected",
    [
        ("cpu", "start 0, get 0, start 1, get 1, start 2, get 2"),
        ("meta", "start 0, start 1, get 0, start 2, get 1, get 2"),
    ],
)
def test_a_device_gets_the_next_unit_before_the_last_one_is_waited_for(case, device, expected, monkeypatch):
    told = []
    work = reranking.Reranking.__new__(reranking.Reranking)
    work._reranker = engine.Reranker(torch.nn.Linear(1, 1, device=device), *case[3])

    def start(unit, texts_of):
        told.append(f"start {unit}")
        return torch.tensor([unit])

    def on_the_way(values):
        return lambda: (told.append(f"get {int(values)}"), values)[1]

    monkeypatch.setattr(work, "_unit", start)
    monkeypatch.setattr(reranking, "_on_the_way", on_the_way)
    assert [(unit, int(logits)) for unit, logits in work._units([0, 1, 2], None)] == [(0, 0), (1, 1), (2, 2)]
    assert ", ".join(told) == expected
