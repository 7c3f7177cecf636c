"""A source embedded in units: equal to one pass over each unit, whoever does it and in whatever order."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation_fixtures import BROKEN, ROWS, UNIT, UNTITLED

import retrieval_aliblip as engine
from aliblip.data.collate import Collator
from aliblip.data.loader import EvalLoader
from aliblip.data.sources import open_source
from aliblip.retrieval.embedding import EmbeddedUnit, TokenMemory, embedded_units, undisturbed
from aliblip.runtime.parts import Parts

UNITS = -(-ROWS // UNIT)


@pytest.fixture
def described(catalogue, processor):
    """The catalogue as a table, its photos alone and its titles alone, with descriptions."""

    def made(sides="both"):
        source = open_source(data_dir=str(catalogue), split="validation", sides=sides, other_columns=("product_id",))
        collator = Collator(processor, sides=source.sides, describe=True)
        return EvalLoader(source, collator, unit_size=UNIT, rank=0, world_size=1)

    return made


@torch.no_grad()
def test_units_equal_one_pass_over_the_rows_of_each(model, described):
    model.eval()
    loader, rows = described(), []
    for unit in embedded_units(model, loader, range(UNITS)):
        batch = loader.read_unit(unit.number)
        vectors, tokens = engine.embed_images(model, batch["pixel_values"])
        assert torch.equal(unit.image_embeds, vectors) and torch.equal(unit.image_tokens, tokens)
        titles = engine.embed_texts(model, batch["input_ids"], batch["attention_mask"])
        assert torch.equal(unit.text_embeds, titles) and unit.text_embeds.dtype == torch.float32
        assert torch.equal(unit.input_ids, batch["input_ids"]) and torch.equal(unit.rows, batch["row"])
        assert (unit.names, unit.texts) == (batch["name"], batch["text"]) and len(unit) == len(unit.names)
        assert [others["product_id"] for others in unit.others] == [str(p) for p in unit.product_id.tolist()]
        rows += unit.rows.tolist() + [entry["row"] for entry in unit.skipped]
    assert sorted(rows) == list(range(ROWS))


def test_chosen_units_come_in_their_order_and_with_equal_bits(model, described):
    model.eval()
    whole = list(embedded_units(model, described(), range(UNITS)))
    for unit in embedded_units(model, described(), [5, 2]):
        assert torch.equal(unit.image_embeds, whole[unit.number].image_embeds)
    assert [unit.number for unit in embedded_units(model, described(), [5, 2])] == [5, 2]
    assert list(embedded_units(model, described(), [])) == []


def test_photos_alone_and_titles_alone_have_no_other_side(model, described):
    model.eval()
    photos = list(embedded_units(model, described("images"), range(UNITS)))
    assert all(unit.text_embeds is None and unit.input_ids is None for unit in photos)
    assert [entry["row"] for unit in photos for entry in unit.skipped] == [BROKEN]
    titles = list(embedded_units(model, described("titles"), range(UNITS)))
    assert all(unit.image_embeds is None and unit.image_tokens is None for unit in titles)
    assert [entry["row"] for unit in titles for entry in unit.skipped] == [UNTITLED]


def test_a_unit_without_a_usable_row_is_empty_and_told(model, described, catalogue, processor):
    model.eval()
    source = open_source(data_dir=str(catalogue), split="validation")
    loader = EvalLoader(source, Collator(processor), unit_size=1, rank=0, world_size=1)
    (unit,) = embedded_units(model, loader, [BROKEN])
    assert len(unit) == 0 and unit.image_embeds is None and unit.image_tokens is None and unit.text_embeds is None
    assert [entry["row"] for entry in unit.skipped] == [BROKEN]


def test_a_unit_comes_back_from_its_part_without_the_image_tokens(model, described, tmp_path):
    model.eval()
    (unit,) = embedded_units(model, described(), [BROKEN // UNIT])
    parts = Parts(tmp_path / "parts", {"model": "m"})
    with parts.stage("embed") as stage:
        stage.add(unit.number, *unit.as_part())
    again = EmbeddedUnit.from_part(unit.number, *parts.stage("embed").load(unit.number))
    assert again.image_tokens is None
    # Paths and thumbnails are for the build of a gallery, which writes them into its table itself.
    kept = {name: value for name, value in vars(unit).items() if name not in ("image_tokens", "paths", "thumbnails")}
    for name, value in kept.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(again, name), value), name
        else:
            assert getattr(again, name) == json.loads(json.dumps(value)), name


def test_a_model_in_training_mode_is_refused_and_undisturbed_puts_it_back(model, described):
    model.eval()
    model.text_encoder.train()
    try:
        with pytest.raises(ValueError, match="in training mode"):
            next(embedded_units(model, described(), [0]))
        with undisturbed(model):
            assert len(next(embedded_units(model, described(), [0]))) == UNIT
        assert model.text_encoder.training and not model.vision_model.training
    finally:
        model.eval()


class OnDevice:
    """Tokens of 400 bytes on a device that is not here."""

    device = torch.device("cuda")

    def numel(self) -> int:
        return 100

    def element_size(self) -> int:
        return 4

    def cpu(self) -> str:
        return "in host memory"


def test_image_tokens_fill_the_device_first_and_then_the_host():
    memory, tokens = TokenMemory(host_limit=800, device_limit=900), [OnDevice() for _ in range(5)]
    none = torch.empty(0, dtype=torch.int64)
    for unit, of_unit in enumerate(tokens):
        memory.offer(EmbeddedUnit(unit, none, none, none, none, image_tokens=of_unit))
    kept = [kept and kept.tokens for kept in map(memory.take, range(5))]
    assert kept == [*tokens[:2], "in host memory", "in host memory", None]
    assert memory.take(0) is None  # no longer kept
