"""What transformers' users expect of any model: towers that load what they saved, tuples, export of any batch."""

from __future__ import annotations

import pytest
import tiny
import torch


@pytest.mark.parametrize("tower", ["vision_model", "text_encoder"])
def test_a_tower_loads_what_it_has_saved(tmp_path, tower):
    saved = getattr(tiny.model().eval(), tower)
    saved.save_pretrained(tmp_path)
    again = type(saved).from_pretrained(tmp_path)
    assert type(again.config) is type(saved.config)
    for name, value in saved.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    batch = tiny.batch()
    given = batch["pixel_values"] if tower == "vision_model" else batch["input_ids"]
    assert torch.equal(again(given).last_hidden_state, saved(given).last_hidden_state)


def inputs(**changes) -> dict:
    batch = tiny.batch(**changes)
    del batch["product_id"]
    return batch


def test_return_dict_gives_a_tuple_of_the_same():
    model = tiny.model().eval()
    output = model(**inputs())
    plain = model(**inputs(), return_dict=False)
    assert type(plain) is tuple and len(plain) == len(output.to_tuple())
    assert all(torch.equal(one, other) for one, other in zip(plain, output.to_tuple(), strict=True))


def test_an_exported_model_takes_batches_of_any_size():
    model, rows = tiny.model().eval(), torch.export.Dim("rows", min=2, max=64)
    shapes = dict.fromkeys(inputs(), {0: rows})
    exported = torch.export.export(model, (), inputs(rows=4), dynamic_shapes=shapes, strict=False).module()
    for count in (2, 4, 7):
        batch = inputs(rows=count)
        expected, output = model(**batch), exported(**batch)
        for name, value in expected.items():
            torch.testing.assert_close(output[name], value, rtol=0, atol=1e-6)
