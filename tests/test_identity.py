"""A model is the same model compiled, rounded and quantised, and travels with its gallery to other processes."""

from __future__ import annotations

import pickle
import sys

import pytest
import tiny
import torch
from helpers import assert_succeeded, run_forked
from torch import nn

from aliblip import Gallery
from encoder_aliblip import Encoder, fingerprint
from gallery_aliblip import MemoryGallery
from modeling_aliblip import AliBlipForImageTextRetrieval
from pipeline_aliblip import AliBlipImageTextRetrievalPipeline

WORDS = len(tiny.tokenizer()) + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.spread_model(vocab_size=WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("photos") / "them", 6)


def loaded(folder, **options):
    return AliBlipForImageTextRetrieval.from_pretrained(folder, **options).eval()


class Int8(torch.Tensor):
    """A weight in 8 bits, rows scaled by themselves, as torchao keeps them: a tensor of a class of its own."""

    @staticmethod
    def __new__(cls, weight):
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        made.scale = weight.abs().amax(dim=1, keepdim=True) / 127
        made.steps = (weight / made.scale).round().to(torch.int8)
        return made

    def dequantize(self):
        return self.steps * self.scale

    def detach(self):
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        plain = [one.dequantize() if isinstance(one, cls) else one for one in arguments]
        return function(*plain, **(options or {}))


def quantised(model):
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8(module.weight.detach()), requires_grad=False)
    return model


def compiled_inside(model):
    model.vision_model = torch.compile(model.vision_model, backend="eager")
    return model


COPIES = {
    "compiled": lambda folder: torch.compile(loaded(folder), backend="eager"),
    "compiled in place": lambda folder: compiled_inside(loaded(folder)),
    "bf16": lambda folder: loaded(folder, dtype=torch.bfloat16),
    "fp16": lambda folder: loaded(folder, dtype=torch.float16),
    "fp16 by hand": lambda folder: loaded(folder).half(),
    "fp16, compiled": lambda folder: torch.compile(loaded(folder).half(), backend="eager"),
    "int8": lambda folder: quantised(loaded(folder)),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_gallery_takes_the_queries_of_every_copy(name, folder, photos, tmp_path):
    processor = tiny.processor()
    model = loaded(folder)
    pipe = AliBlipImageTextRetrievalPipeline(model=model, processor=processor)
    gallery = MemoryGallery.build(pipe.encoder, photos, store_tokens=True)
    stored = Gallery.build(photos, str(tmp_path / "gallery"), model=model, processor=processor, store_tokens=True)
    copy = COPIES[name](folder)
    assert fingerprint(copy, processor) == gallery.model == stored.model
    theirs = AliBlipImageTextRetrievalPipeline(model=copy, processor=processor)
    expected = {hit["id"]: hit["itm_logit"] for hit in pipe("red cup", gallery=gallery, top_k=6)}
    for place in (gallery, stored):
        found = {hit["id"]: hit["itm_logit"] for hit in theirs("red cup", gallery=place, top_k=6)}
        assert found == pytest.approx(expected, abs=0.3)


def test_other_weights_are_others_in_every_type(folder):
    processor, model = tiny.processor(), loaded(folder)
    own = fingerprint(model, processor)
    for change in ("float", "bfloat16", "half"):
        other = loaded(folder)
        with torch.no_grad():
            other.vision_proj.weight[3, 3] += 0.02
        assert fingerprint(getattr(other, change)(), processor) != own
    other = loaded(folder)
    with torch.no_grad():
        other.vision_proj.weight[3, 3] += 0.02 * other.vision_proj.weight[3].abs().max()
    assert fingerprint(quantised(other), processor) != own
    # without the files that it came from a rounded copy can't be told
    made = tiny.spread_model(vocab_size=WORDS)
    assert fingerprint(made, processor) == own != fingerprint(made.half(), processor)


SEARCH = """
import pickle, sys
pipe, galleries, expected = pickle.load(open(sys.argv[1], "rb"))
for gallery in galleries:
    assert [hit["id"] for hit in pipe("red cup", gallery=gallery)] == expected
assert pipe.encoder.tokenize(["red cup"])[0].shape == (1, 4)
print("the same")
"""


def test_gallery_and_used_pipeline_travel_to_another_process(folder, photos, tmp_path):
    processor = tiny.processor()
    pipe = AliBlipImageTextRetrievalPipeline(model=loaded(folder), processor=processor)
    stored = Gallery.build(photos, str(tmp_path / "gallery"), model=pipe.model, processor=processor)
    galleries = [MemoryGallery.build(pipe.encoder, photos), stored]
    expected = [hit["id"] for hit in pipe("red cup", gallery=stored)]  # now both are used
    (tmp_path / "them").write_bytes(pickle.dumps((pipe, galleries, expected)))
    (tmp_path / "search.py").write_text(SEARCH)
    result = run_forked([sys.executable, tmp_path / "search.py", tmp_path / "them"])
    assert_succeeded(result)
    assert "the same" in result.stdout
    again = pickle.loads(pickle.dumps(Encoder(pipe.model, processor)))
    assert again.fingerprint == pipe.encoder.fingerprint
