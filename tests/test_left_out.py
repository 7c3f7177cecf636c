"""What training may leave out: `--patch_dropout` some patches of a photo, `--unpad` the padding of titles."""

from __future__ import annotations

import pytest
import tiny
import torch

from aliblip.runtime.mistakes import UsageError
from aliblip.training.arguments import TrainingArguments
from aliblip.training.building import set_checkpointed_layers
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.patches import drop_patches, patches_kept
from aliblip.training.setup import check_unpad
from aliblip.training.unpadded import first_tokens, without_padding

# --- patches ----------------------------------------------------------------------------------------------------------


def test_the_class_token_and_a_share_of_the_patches_stay_each_once_and_drawn_for_each_photo():
    model = tiny.model().train()
    pixels = tiny.batch(6)["pixel_values"]
    whole = model.vision_model.embeddings(pixels)
    drop_patches(model, 0.4)
    stayed = torch.zeros(6, 17)
    for draw in range(30):
        kept = model.vision_model.embeddings(pixels)
        assert kept.shape == (6, 1 + 10, 32)  # of 16
        same = (kept[:, :, None] == whole[:, None, :]).all(dim=3)  # (photos, kept, all): positions are in them
        assert (same.sum(dim=2) == 1).all() and (same.sum(dim=1) <= 1).all()
        assert same[:, 0, 0].all()
        chosen = same.any(dim=1)
        assert draw or len(chosen.unique(dim=0)) == 6  # other places of each photo
        stayed += chosen
    assert (stayed[:, 0] == 30).all() and (stayed[:, 1:] > 5).all() and (stayed[:, 1:] < 30).all()


def test_evaluations_and_momentum_encoders_see_whole_photos():
    model = tiny.model()
    momentum = MomentumState(model, queue_size=12, embedding_size=16, dropout=True)
    batch, plain = tiny.batch(), tiny.model().eval()
    handle = drop_patches(model, 0.5)
    assert momentum.encoders.encode_image(batch["pixel_values"]).shape[1] == 17
    with torch.no_grad():
        tokens = model.eval().encode_image(batch["pixel_values"])
        assert torch.equal(tokens, plain.encode_image(batch["pixel_values"]))
    assert model.train().encode_image(batch["pixel_values"]).shape[1] == 9
    handle.remove()
    assert model.encode_image(batch["pixel_values"]).shape[1] == 17


def test_all_parameters_learn_from_what_stays():
    model = tiny.model()
    momentum, batch = MomentumState(model, queue_size=12, embedding_size=16), tiny.batch()
    drop_patches(model, 0.5)
    objective = RetrievalObjective(model, cached_batch_size=3).train()
    output = objective(batch, momentum.encode(batch), alpha=0.4)
    output.loss.backward()
    for name, parameter in objective.named_parameters():
        assert name.endswith("key.bias") or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("patches", "rate", "kept"), [(576, 0.5, 288), (16, 0.0, 16), (16, 0.99, 1), (196, 0.75, 49)])
def test_how_many_stay(patches, rate, kept):
    assert patches_kept(patches, rate) == kept


# --- padding ----------------------------------------------------------------------------------------------------------


def gradients_of(unpad: bool, attention: str, *, slack: bool = False, **options):
    model = tiny.model(text_config={"num_hidden_layers": 3})
    model.set_attn_implementation(attention)
    if options.pop("checkpointed", False):
        set_checkpointed_layers(model, 0, 2)
    momentum = MomentumState(model, queue_size=12, embedding_size=16)
    objective = RetrievalObjective(model, hardest_negatives=True, unpad=unpad, **options).train()
    batch = tiny.batch(7, length=12)
    if slack:  # the host knows a bound alone
        batch["title_lengths"] = [12] * 7
    output = objective(batch, momentum.encode(batch), alpha=0.3)
    output.loss.backward()
    return output.loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "sdpa"},
        {"attention": "eager"},
        {"attention": "sdpa", "slack": True},
        {"attention": "sdpa", "cached_batch_size": 3},
        {"attention": "sdpa", "checkpointed": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_titles_without_padding_give_the_loss_and_gradients_of_padded_ones(options):
    loss, gradients = gradients_of(True, **options)
    expected, expected_gradients = gradients_of(False, options["attention"])
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_matrix_products_see_the_tokens_and_no_padding():
    model = tiny.model()
    batch = tiny.batch(7, length=12)
    tokens = int(batch["attention_mask"].sum())
    rows = []
    for layer in model.text_encoder.encoder.layer:
        layer.intermediate.register_forward_hook(lambda _, args, out: rows.append(out.shape[:-1]))
    kv = model.project_image_kv(model.encode_image(batch["pixel_values"]))
    first_tokens(model.text_encoder, batch["input_ids"], batch["attention_mask"], tokens, kv, torch.arange(7))
    assert rows == [(tokens,), (7,)] and tokens < 7 * 12


@pytest.mark.parametrize("spare", [0, 1, 30])
def test_every_token_has_its_place(spare):
    mask = (torch.arange(5) < torch.tensor([[3], [5], [1], [4]])).long()
    titles = without_padding(mask, 13 + spare)
    tokens = torch.arange(20).view(4, 5)
    assert titles.tokens[:13].tolist() == tokens[mask.bool()].tolist()
    packed = titles.packed(tokens[..., None].float())
    assert torch.equal(titles.padded(packed)[..., 0][mask.bool()], tokens[mask.bool()].float())
    assert titles.first.tolist() == [0, 3, 8, 9]
    assert titles.tokens.max() < 20 and titles.places.max() < 13 + spare


def test_layers_that_are_compiled_are_passed_by_so_it_is_refused():
    check_unpad(TrainingArguments(unpad=True))
    check_unpad(TrainingArguments(compile=True))
    with pytest.raises(UsageError, match=r"^--unpad with --compile .*: leave one of them out$"):
        check_unpad(TrainingArguments(unpad=True, compile=True))
