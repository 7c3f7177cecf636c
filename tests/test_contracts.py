"""What transformers' users expect of any model: towers that load what they saved, tuples, export of any batch."""

from __future__ import annotations

import pytest
import tiny
import torch

from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from encoder_aliblip import Encoder, fingerprint
from modeling_aliblip import PackedPairs


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


PASSES = ("vision_model_output", "text_model_output", "multimodal_model_output")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("asked", [("hidden_states",), ("attentions",), ("hidden_states", "attentions")])
def test_only_what_is_asked_for_is_recorded_by_the_call_or_by_the_configuration(attention, asked):
    model = tiny.model().eval()
    model.set_attn_implementation(attention)
    plain = model(**inputs())
    assert not {*plain} & {*PASSES}
    by_call = model(**inputs(), **{f"output_{name}": True for name in asked})
    model.set_attn_implementation("eager")  # a configuration that asks for attentions refuses others
    for name in asked:
        setattr(model.config, f"output_{name}", True)
    by_config = model(**inputs())
    assert not {*model(**inputs(), output_hidden_states=False, output_attentions=False)} & {*PASSES}
    for output in (by_call, by_config):
        assert {*output} == {*plain, *PASSES}
        for name, value in plain.items():
            torch.testing.assert_close(output[name], value, rtol=0, atol=1e-5)  # logits up to 14
        for name, length, cross in zip(PASSES, (17, 7, 7), (False, False, True), strict=True):
            recorded = output[name]
            states, attentions = recorded.hidden_states or (), recorded.attentions or ()
            assert len(states) == 3 * ("hidden_states" in asked) and len(attentions) == 2 * ("attentions" in asked)
            assert {state.shape for state in states} <= {recorded.last_hidden_state.shape}
            assert {tuple(one.shape) for one in attentions} <= {(4, 4, length, length)}
            crosses = recorded.get("cross_attentions") or ()
            assert [tuple(one.shape) for one in crosses] == [(4, 4, 7, 17)] * (len(attentions) * cross)
            for one in (*attentions, *crosses):
                torch.testing.assert_close(one.sum(dim=-1), torch.ones(one.shape[:-1]))


def test_hidden_states_alone_leave_the_results_as_they_are():
    model = tiny.model().eval()
    plain = model(**inputs())
    recorded = model(**inputs(), output_hidden_states=True)
    for name in ("logits_per_image", "image_embeds", "text_embeds"):
        assert torch.equal(recorded[name], plain[name])
    torch.testing.assert_close(recorded.itm_logits, plain.itm_logits, rtol=0, atol=1e-6)  # of all tokens, not the first


def test_one_photo_for_all_titles_and_the_pairs_of_the_loss_are_recorded():
    model = tiny.model().eval()
    batch = tiny.batch()
    output = model(**batch, return_loss=True, output_attentions=True)
    plain = model(**batch, return_loss=True)
    torch.testing.assert_close(output.loss, plain.loss, rtol=0, atol=1e-6)
    assert output.multimodal_model_output.cross_attentions[1].shape == (12, 4, 7, 17)
    kv = model.project_image_kv(model.encode_image(batch["pixel_values"][:1]))
    titles = batch["input_ids"], batch["attention_mask"], kv, torch.zeros(4, dtype=torch.int64)
    alone = model.text_encoder(*titles, output_attentions=True)
    assert alone.cross_attentions[0].shape == (4, 4, 7, 17)
    torch.testing.assert_close(
        alone.last_hidden_state, model.text_encoder(*titles).last_hidden_state, rtol=0, atol=1e-6
    )


def test_packed_titles_have_no_attentions():
    ids, none = torch.tensor([5, 6]), None
    packed = PackedPairs([(1, 2)], torch.arange(2), torch.tensor([0]), none, none)
    with pytest.raises(ValueError, match="packed titles have no attentions"):
        tiny.model().eval().text_encoder(ids, packed=packed, output_attentions=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_recorded_has_gradients_where_layers_are_computed_again(reentrant):
    model = tiny.model().train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    output = model(**inputs(), output_hidden_states=True)
    states = [output[name].hidden_states[1] for name in PASSES]
    for state in states:
        state.retain_grad()
    (output.itm_logits.sum() + output.logits_per_image.sum()).backward()
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in states)


def test_tuples_have_tuples_in_them():
    model = tiny.model().eval()
    both = {"output_hidden_states": True, "output_attentions": True}
    output, plain = model(**inputs(), **both), model(**inputs(), **both, return_dict=False)
    assert len(plain) == 8 and all(type(part) is tuple for part in plain[5:])
    for name, part in zip(PASSES, plain[5:], strict=True):
        assert torch.equal(part[2][1], output[name].hidden_states[1])
    for features in (
        model.get_image_features(inputs()["pixel_values"], return_dict=False, **both),
        model.get_text_features(inputs()["input_ids"], return_dict=False, **both),
    ):
        assert type(features) is tuple and [len(part) for part in features[2:4]] == [3, 2]


def test_a_configuration_without_return_dict_changes_nothing_inside():
    model, processor = tiny.model(vocab_size=20).eval(), tiny.processor()
    expected = fingerprint(model, processor), Encoder(model, processor).embed_titles(["red cup"])
    for config in (model.config, model.config.vision_config, model.config.text_config):
        config.return_dict = False
    got = fingerprint(model, processor), Encoder(model, processor).embed_titles(["red cup"])
    assert got[0] == expected[0] and torch.equal(got[1], expected[1])
    batch = tiny.batch(vocab_size=20)
    assert type(model(**batch)) is tuple
    targets = MomentumState(model, queue_size=4, embedding_size=16).encode(batch)
    assert RetrievalObjective(model)(batch, targets, 0.0).loss.isfinite()


def test_an_exported_model_takes_batches_of_any_size():
    model, rows = tiny.model().eval(), torch.export.Dim("rows", min=2, max=64)
    shapes = dict.fromkeys(inputs(), {0: rows})
    exported = torch.export.export(model, (), inputs(rows=4), dynamic_shapes=shapes, strict=False).module()
    for count in (2, 4, 7):
        batch = inputs(rows=count)
        expected, output = model(**batch), exported(**batch)
        for name, value in expected.items():
            torch.testing.assert_close(output[name], value, rtol=0, atol=1e-6)
