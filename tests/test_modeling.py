"""The model against transformers' BLIP, and against itself in every mode that must not change its numbers."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BlipConfig, BlipForImageTextRetrieval

import modeling_aliblip as modeling
from aliblip.training.building import set_checkpointed_layers
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval

CLOSE = {"rtol": 0, "atol": 1e-5}


# --- transformers' BLIP -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip_and_ours():
    torch.manual_seed(0)
    theirs = BlipForImageTextRetrieval(
        BlipConfig(
            vision_config={
                **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
                **{"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, "initializer_range": 0.3},
            },
            text_config={
                **{"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
                **{"vocab_size": 64, "max_position_embeddings": 40, "initializer_range": 0.3},
            },
            image_text_hidden_size=16,
        )
    ).eval()
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a swapped name
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = tiny.model(
        vision_config={"num_hidden_layers": 3, "intermediate_size": 64},
        text_config={"num_hidden_layers": 3},
    ).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == ["temp"] and unexpected == []
    return theirs, ours


@torch.no_grad()
def test_hidden_states_and_both_heads_equal_transformers_blip(blip_and_ours):
    theirs, ours = blip_and_ours
    batch = tiny.batch()
    with_enc = batch["input_ids"].clone()
    with_enc[:, 0] = ours.config.enc_token_id  # transformers takes the ids as they are
    images, texts = batch["pixel_values"], (batch["input_ids"], batch["attention_mask"])

    image = ours.get_image_features(images)
    torch.testing.assert_close(image.last_hidden_state, theirs.vision_model(images).last_hidden_state, **CLOSE)
    text = ours.get_text_features(*texts)
    torch.testing.assert_close(
        text.last_hidden_state, theirs.text_encoder(*texts, is_decoder=False).last_hidden_state, **CLOSE
    )
    itc = theirs(input_ids=texts[0], attention_mask=texts[1], pixel_values=images, use_itm_head=False).itm_score
    torch.testing.assert_close(image.pooler_output @ text.pooler_output.t(), itc, **CLOSE)
    itm = theirs(input_ids=with_enc, attention_mask=texts[1], pixel_values=images, use_itm_head=True).itm_score
    torch.testing.assert_close(ours(images, *texts).itm_logits, itm, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_recorded_equals_transformers_blip(blip_and_ours, attention):
    theirs, ours = blip_and_ours
    theirs.set_attn_implementation("eager")  # which alone gives attentions there
    ours.set_attn_implementation(attention)
    batch = tiny.batch()
    both = {"output_attentions": True, "output_hidden_states": True}
    images, texts = batch["pixel_values"], (batch["input_ids"], batch["attention_mask"])
    output = ours(images, *texts, **both)
    with_enc = batch["input_ids"].clone()
    with_enc[:, 0] = ours.config.enc_token_id
    image = theirs.vision_model(images, **both)
    expected = {
        "vision_model_output": image,
        "text_model_output": theirs.text_encoder(*texts, is_decoder=False, **both),
        "multimodal_model_output": theirs.text_encoder(
            with_enc, texts[1], encoder_hidden_states=image.last_hidden_state, is_decoder=False, **both
        ),
    }
    for name, passed in expected.items():
        for kind in ("hidden_states", "attentions", "cross_attentions"):
            got, wanted = getattr(output[name], kind, ()), getattr(passed, kind, None) or ()
            assert len(got) == len(wanted), (name, kind)
            for layer, (one, other) in enumerate(zip(got, wanted, strict=True)):
                torch.testing.assert_close(one, other, **CLOSE, msg=f"{kind} {layer} of {name}")
    features = ours.get_image_features(images, **both), ours.get_text_features(*texts, **both)
    for got, wanted in zip(features, (output.vision_model_output, output.text_model_output), strict=True):
        assert len(got.hidden_states) == 4 and len(got.attentions) == 3
        assert all(map(torch.equal, (*got.hidden_states, *got.attentions), (*wanted.hidden_states, *wanted.attentions)))


@torch.no_grad()
def test_other_resolutions_equal_transformers_blip(blip_and_ours):
    theirs, ours = blip_and_ours
    images = torch.randn(2, 3, 48, 48)
    expected = theirs.vision_model(images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours.encode_image(images, interpolate_pos_encoding=True), expected, **CLOSE)
    with pytest.raises(ValueError, match="48 x 48 pixels given, the model takes 32 x 32.*resize_image"):
        ours.encode_image(images)
    with pytest.raises(ValueError, match="not divisible by the patch size 8"):
        ours.encode_image(torch.randn(1, 3, 44, 44), interpolate_pos_encoding=True)


# --- equal in every mode ----------------------------------------------------------------------------------------------


def test_resize_image_survives_a_round_trip(tmp_path):
    model, images = tiny.model().eval(), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = model.encode_image(images, interpolate_pos_encoding=True)
        model.resize_image(48)
        torch.testing.assert_close(model.encode_image(images), expected)
        model.save_pretrained(tmp_path)
        again = AliBlipForImageTextRetrieval.from_pretrained(tmp_path).eval()
        assert again.config.vision_config.image_size == 48
        assert torch.equal(again.encode_image(images), model.encode_image(images))
    with pytest.raises(
        ValueError, match="50 is not divisible by the patch size 8: choose a multiple of 8, for example 48"
    ):
        model.resize_image(50)


@pytest.mark.parametrize("rows", [1, 4])
def test_match_of_one_image_equals_match_of_copies(rows):
    """The dense path (one image, many titles) against the plain one (an image per pair)."""
    model, batch = tiny.model().eval(), tiny.batch(rows)
    with torch.no_grad():
        tokens = model.encode_image(batch["pixel_values"][:1])
        dense = model.match(
            batch["input_ids"],
            batch["attention_mask"],
            model.project_image_kv(tokens),
            torch.zeros(rows, dtype=torch.long),
        )
        copies = model.project_image_kv(tokens.expand(rows + 1, -1, -1))
        plain = model.match(batch["input_ids"], batch["attention_mask"], copies, torch.arange(rows))
    torch.testing.assert_close(dense, plain, **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_first_token_alone_equals_the_first_of_all_and_has_its_gradients(attention):
    model, batch = tiny.model().eval(), tiny.batch()
    model.set_attn_implementation(attention)

    def first_tokens(**options):
        model.zero_grad()
        image_kv = model.project_image_kv(model.encode_image(batch["pixel_values"]))
        tokens = model.text_encoder(
            batch["input_ids"], batch["attention_mask"], image_kv, torch.arange(4).flip(0), **options
        ).last_hidden_state
        tokens[:, 0].square().mean(dim=0).sin().sum().backward()
        return tokens, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    every, expected = first_tokens()
    alone, got = first_tokens(first_only=True)
    assert every.shape == (4, 7, 24) and alone.shape == (4, 1, 24)
    torch.testing.assert_close(alone, every[:, :1], **CLOSE)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, **CLOSE, msg=name)


def test_first_token_is_enc_inside_the_model_alone():
    model, batch = tiny.model().eval(), tiny.batch()
    image_kv = model.project_image_kv(model.encode_image(batch["pixel_values"]))
    other, index, before = batch["input_ids"].clone(), torch.arange(4), batch["input_ids"].clone()
    other[:, 0] = 7
    first = model.match(batch["input_ids"], batch["attention_mask"], image_kv, index)
    assert torch.equal(first, model.match(other, batch["attention_mask"], image_kv, index))
    assert torch.equal(batch["input_ids"], before)  # the caller's ids stay as they are
    features = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    assert not torch.allclose(features, model.get_text_features(other, batch["attention_mask"]).pooler_output)


def test_padding_changes_nothing():
    model, batch = tiny.model().eval(), tiny.batch()
    padded = {**batch, **{k: torch.nn.functional.pad(batch[k], (0, 5)) for k in ("input_ids", "attention_mask")}}
    for first, second in zip(outputs(model, batch), outputs(model, padded), strict=True):
        torch.testing.assert_close(first, second, **CLOSE)


def outputs(model, batch):
    out = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    return out.image_embeds, out.text_embeds, out.itm_logits


def test_sdpa_equals_eager():
    model, batch = tiny.model().eval(), tiny.batch()
    assert model.config._attn_implementation == "sdpa"
    expected = outputs(model, batch)
    model.set_attn_implementation("eager")
    assert model.text_encoder.config._attn_implementation == "eager"
    for first, second in zip(expected, outputs(model, batch), strict=True):
        torch.testing.assert_close(first, second, **CLOSE)


def gradients(model, batch):
    torch.manual_seed(1)
    model.train().zero_grad()
    loss = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"], return_loss=True).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layers", [(None, None), (1, 0), (0, 1)])
def test_gradient_checkpointing_changes_no_gradient(layers):
    changes = {
        "vision_config": {"drop_path_rate": 0.3},
        "text_config": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    }
    batch = tiny.batch()
    loss, expected = gradients(tiny.model(**changes), batch)
    model = tiny.model(**changes)
    set_checkpointed_layers(model, *layers)
    on = [
        layer.gradient_checkpointing
        for layer in (*model.vision_model.encoder.layers, *model.text_encoder.encoder.layer)
    ]
    wanted = [2 if n is None else n for n in layers]
    assert on == [i >= 2 - wanted[0] for i in range(2)] + [i >= 2 - wanted[1] for i in range(2)]
    again, got = gradients(model, batch)
    assert torch.equal(loss, again)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    with pytest.raises(ValueError, match="5 vision layers to checkpoint: the model has 2"):
        set_checkpointed_layers(model, 5, 0)


@pytest.mark.parametrize(
    "enable", [set_checkpointed_layers, modeling.AliBlipForImageTextRetrieval.gradient_checkpointing_enable]
)
def test_attention_over_titles_takes_the_same_kernels_when_it_is_computed_again(enable, monkeypatch):
    """As on a GPU: without cuDNN's kernels, and without those that are switched off."""
    attend, seen = modeling.attend, []

    def watched(module, *args):
        kernels = torch.backends.cuda
        if isinstance(module, modeling.AliBlipTextSelfAttention):
            seen.append((kernels.cudnn_sdp_enabled(), kernels.flash_sdp_enabled(), kernels.math_sdp_enabled()))
        return attend(module, *args)

    any_shape = modeling.any_shape
    monkeypatch.setattr(modeling, "any_shape", lambda _: any_shape(torch.device("cuda")))
    monkeypatch.setattr(modeling, "attend", watched)
    model, kernels = tiny.model(), torch.backends.cuda
    enable(model)
    before = kernels.cudnn_sdp_enabled(), kernels.flash_sdp_enabled(), kernels.math_sdp_enabled()
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]):
        gradients(model, tiny.batch())
    assert seen and set(seen) == {(False, False, True)}
    count, plain = len(seen), tiny.model()
    with sdpa_kernel(SDPBackend.MATH):
        gradients(plain, tiny.batch())
    assert count > len(seen) - count > 0  # some of the first were computed again
    assert before == (kernels.cudnn_sdp_enabled(), kernels.flash_sdp_enabled(), kernels.math_sdp_enabled())


def test_every_parameter_gets_a_gradient():
    _, got = gradients(tiny.model(), tiny.batch())
    assert all(gradient.abs().sum() > 0 for name, gradient in got.items() if not name.endswith("key.bias"))


def test_drop_path_drops_whole_samples_in_training_only():
    model = tiny.model(vision_config={"drop_path_rate": 0.5, "num_hidden_layers": 3})
    rates = [layer.drop_path.rate for layer in model.vision_model.encoder.layers]
    assert rates == [0.0, 0.25, 0.5]
    drop, branch = model.vision_model.encoder.layers[2].drop_path, torch.ones(400, 3, 5)
    torch.manual_seed(0)
    dropped = drop.train()(branch)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.15)
    assert torch.equal(drop.eval()(branch), branch)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_initialisation_trains_from_scratch():
    model = tiny.model(vision_config={"hidden_size": 128}, text_config={"hidden_size": 128})
    for name, parameter in model.named_parameters():
        if name == "temp":
            assert (
                parameter.dtype == torch.float32 and parameter.shape == (1,) and parameter.item() == pytest.approx(0.07)
            )
        elif parameter.dim() > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
            assert parameter.abs().max().item() < 0.11, name  # truncated
        else:
            norm_weight = "norm" in name.lower() and name.endswith("weight")
            assert (parameter == (1.0 if norm_weight else 0.0)).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_keep_every_parameter_and_buffer(tmp_path, dtype):
    model = tiny.model().to(dtype)
    model.temp.data = torch.tensor([0.0654321])  # fp32 in every case
    model.save_pretrained(tmp_path)
    again = AliBlipForImageTextRetrieval.from_pretrained(tmp_path)
    assert again.dtype == dtype
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(again, kind)())
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    batch = tiny.batch()
    for first, second in zip(outputs(model.eval(), batch), outputs(again.eval(), batch), strict=True):
        assert torch.equal(first, second)


def saved_without(tmp_path, *missing, **extra):
    from safetensors.torch import load_file, save_file

    tiny.model().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {name: value for name, value in state.items() if name not in missing} | extra
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_missing_unexpected_and_misshaped_weights_are_named(tmp_path):
    load = AliBlipForImageTextRetrieval.from_pretrained
    with pytest.raises(ValueError, match=r"missing: itm_head.bias, vision_proj.weight"):
        load(saved_without(tmp_path / "a", "itm_head.bias", "vision_proj.weight"))
    with pytest.raises(ValueError, match=r"unexpected: stray"):
        load(saved_without(tmp_path / "b", stray=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"of another shape: itm_head.bias \(3,\) for \(2,\)"):
        load(saved_without(tmp_path / "c", **{"itm_head.bias": torch.zeros(3)}))
    assert load(saved_without(tmp_path / "d", "temp")).temp.item() == pytest.approx(0.07)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_named_sizes():
    base, large = AliBlipConfig.from_size("base"), AliBlipConfig.from_size("large")
    assert (base.vision_config.hidden_size, base.vision_config.num_hidden_layers) == (768, 12)
    assert (large.vision_config.hidden_size, large.vision_config.num_hidden_layers) == (1024, 24)
    assert large.vision_config.drop_path_rate == 0.1 and large.vision_config.num_attention_heads == 16
    assert large.text_config.encoder_hidden_size == 1024 and large.text_config.hidden_size == 768
    assert (
        base.image_text_hidden_size == 256 and base.enc_token_id == 30523 and base.text_config.num_attention_heads == 12
    )
    with pytest.raises(ValueError, match="no size 'huge': choose one of base, large"):
        AliBlipConfig.from_size("huge")
    again = AliBlipConfig.from_dict(large.to_dict())
    assert again.to_dict() == large.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": {"image_size": 100}}, "image size 100 is not divisible by the patch size 8"),
        ({"vision_config": {"num_attention_heads": 5}}, "not divisible by num_attention_heads 5"),
        ({"vision_config": {"drop_path_rate": 1.0}}, "drop_path_rate is 1.0"),
        ({"text_config": {"hidden_size": 0}}, "hidden_size is 0"),
        ({"text_config": {"hidden_dropout_prob": -0.1}}, "hidden_dropout_prob is -0.1"),
        ({"text_config": {"pad_token_id": 64}}, "pad_token_id is 64: it must be a token of the vocabulary: 0 to 63"),
        ({"text_config": {"pad_token_id": None}}, "pad_token_id is None"),
        ({"text_config": {"pad_token_id": "7"}}, "pad_token_id is '7'"),
        ({"text_config": {"hidden_act": "nope"}}, "text_config.hidden_act is 'nope': it must be one of gelu, "),
        ({"vision_config": {"layer_norm_eps": float("inf")}}, "vision_config.layer_norm_eps is inf"),
        ({"enc_token_id": 64}, "enc_token_id is 64"),
        ({"temperature_init": 0}, "temperature_init is 0"),
        ({"image_text_hidden_size": "wide"}, "image_text_hidden_size is 'wide'"),
    ],
)
def test_wrong_configurations_are_refused_when_constructed(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**change)


# --- loss in forward --------------------------------------------------------------------------------------------------


def test_loss_needs_pairs_and_respects_products():
    model, batch = tiny.model().eval(), tiny.batch()
    out = model(batch["pixel_values"][:2], batch["input_ids"], batch["attention_mask"])
    assert out.logits_per_image.shape == (2, 4) and out.itm_logits is None and out.loss is None
    with pytest.raises(ValueError, match="2 images and 4 titles"):
        model(batch["pixel_values"][:2], batch["input_ids"], batch["attention_mask"], return_loss=True)
    one_product = torch.zeros(
        4, dtype=torch.long
    )  # no negatives: ITC against equal shares, ITM on the four pairs alone
    out = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"], one_product, return_loss=True)
    shares = torch.full((4, 4), 0.25)
    cross_entropy = torch.nn.functional.cross_entropy
    itc = (cross_entropy(out.logits_per_image, shares) + cross_entropy(out.logits_per_text, shares)) / 2
    itm = cross_entropy(out.itm_logits, torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(out.loss, itc + itm)
