"""Fine-tuning with what users of transformers have: `Trainer` on the loss of `forward`, and LoRA of PEFT."""

from __future__ import annotations

import importlib.util

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments, set_seed

import aliblip
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective

VOCABULARY = 20  # of tiny.processor()
INPUTS = {"pixel_values", "input_ids", "attention_mask", "product_id"}
ATTENTION = ["qkv", "projection", "query", "key", "value"]

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="PEFT is not installed (the extra peft)"
)


def collate(rows: list[dict]) -> dict:
    # `name` is no argument of forward: Trainer has taken it out, and product_id has stayed.
    assert rows[0].keys() == INPUTS
    return {**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}, "return_loss": True}


def pairs(rows: int = 14) -> Dataset:
    """Two rows of each product, so that a loss without `product_id` would be another one."""
    batch = tiny.batch(rows, vocab_size=VOCABULARY) | {"product_id": torch.arange(rows) // 2}
    columns = {name: value.tolist() for name, value in batch.items()} | {"name": [f"row {i}" for i in range(rows)]}
    return Dataset.from_dict(columns).with_format("torch")


def trainer(folder, model, learning_rate: float, **options) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=8,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,  # 14 rows: the last batch is short
        learning_rate=learning_rate,
        logging_steps=2,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    data = pairs()
    return Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        processing_class=tiny.processor(),
    )


def history(done: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in done.state.log_history if name in entry]


@torch.no_grad()
def outputs(model):
    batch = tiny.batch(6, vocab_size=VOCABULARY)
    output = model.eval()(**batch)
    return output.logits_per_image, output.itm_logits


def test_the_loss_of_forward_is_the_objectives_without_momentum_and_queue():
    model, batch = tiny.model().train(), tiny.batch(6) | {"product_id": torch.tensor([0, 0, 1, 2, 3, 3])}
    objective = RetrievalObjective(model, in_batch_itc=1.0)
    targets = MomentumState(model, queue_size=12, embedding_size=16).encode(batch)
    losses, gradients = [], []
    for loss_of in (
        lambda: model(**batch, return_loss=True).loss,
        lambda: objective(batch, targets, alpha=0.4).loss,
    ):
        torch.manual_seed(0)  # of the draw of hard negatives
        model.zero_grad()
        losses.append(loss_of())
        losses[-1].backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_an_evaluation_draws_nothing():
    model, batch = tiny.model(), tiny.batch(8) | {"product_id": torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])}
    drawn = [model.train()(**batch, return_loss=True).loss.item() for _ in range(4)]
    assert len(set(drawn)) > 1, "the example can tell"
    torch.manual_seed(0)
    state = torch.get_rng_state()
    losses = {model.eval()(**batch, return_loss=True).loss.item() for _ in range(3)}
    assert len(losses) == 1 and torch.equal(torch.get_rng_state(), state)


def test_products_of_another_number_are_refused():
    batch = tiny.batch() | {"product_id": torch.arange(3)}
    with pytest.raises(ValueError, match=r"product_id has the shape \(3,\): the loss of 4 pairs needs \(4,\)"):
        tiny.model()(**batch, return_loss=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same fine-tuning without and with gradient checkpointing."""
    runs = {}
    for checkpointing in (False, True):
        set_seed(0)
        done = trainer(
            tmp_path_factory.mktemp("trainer"),
            tiny.model(vocab_size=VOCABULARY),
            learning_rate=2e-3,
            gradient_checkpointing=checkpointing,
        )
        done.train()
        runs[checkpointing] = done
    return runs


def test_trainer_fine_tunes_and_evaluates(trained):
    losses, eval_losses = history(trained[False], "loss"), history(trained[False], "eval_loss")
    assert len(losses) == len(eval_losses) == 8
    assert losses[-1] < 0.8 * losses[0]
    assert eval_losses[-1] < 0.8 * eval_losses[0]


def test_trainer_evaluates_the_same_weights_to_the_same_loss(trained):
    done = trained[False]
    losses = {done.predict(done.eval_dataset).metrics["test_loss"] for _ in range(3)}
    assert losses == {history(done, "eval_loss")[-1]}


def test_trainer_with_gradient_checkpointing_has_the_same_losses(trained):
    model = trained[True].model
    layers = (*model.vision_model.encoder.layers, *model.text_encoder.encoder.layer)
    assert all(layer.gradient_checkpointing for layer in layers)
    assert not trained[False].model.vision_model.encoder.layers[0].gradient_checkpointing
    for name in ("loss", "eval_loss"):
        assert history(trained[True], name) == pytest.approx(history(trained[False], name), rel=1e-4)


def test_trainer_predicts_embeddings(trained):
    """What `compute_metrics` gets: every output but the loss, in the order of the output class."""
    predicted = trained[False].predict(pairs()).predictions
    with torch.no_grad():
        expected = trained[False].model(**{name: pairs()[:][name] for name in INPUTS})
    torch.testing.assert_close(torch.from_numpy(predicted[2]), expected.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(predicted[3]), expected.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(predicted[4]), expected.itm_logits, rtol=0, atol=1e-5)


def test_trainer_saves_a_folder_that_loads(trained, tmp_path):
    trained[False].save_model(str(tmp_path))
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is aliblip.AliBlipForImageTextRetrieval
    assert all(torch.equal(*both) for both in zip(outputs(again), outputs(trained[False].model), strict=True))
    assert AutoProcessor.from_pretrained(tmp_path).enc_token_id == tiny.processor().enc_token_id


@needs_peft
@pytest.mark.parametrize("heads", [[], ["vision_proj", "text_proj", "itm_head"]])
def test_lora_trains_its_adapters_alone_and_they_load(tmp_path, heads):
    from peft import LoraConfig, PeftModel, get_peft_model

    base_folder, adapter_folder = tmp_path / "base", tmp_path / "adapter"
    tiny.model(vocab_size=VOCABULARY).save_pretrained(base_folder)
    set_seed(0)
    base = AutoModel.from_pretrained(base_folder)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=heads or None))
    # 2 ViT layers of two projections, 2 BERT layers of three in self-attention and three in cross-attention.
    assert len(model.targeted_module_names) == 2 * 2 + 2 * 6
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = trainer(tmp_path / "run", model, learning_rate=1e-2, gradient_checkpointing=True)
    done.train()

    losses, eval_losses = history(done, "loss"), history(done, "eval_loss")
    assert losses[-1] < 0.8 * losses[0] and eval_losses[-1] < 0.8 * eval_losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    adapters = {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert moved == adapters and len(adapters) == 2 * 16 + 2 * len(heads)

    done.save_model(str(adapter_folder))
    expected = outputs(model)
    for loaded in (
        PeftModel.from_pretrained(AutoModel.from_pretrained(base_folder), adapter_folder),
        AutoModel.from_pretrained(adapter_folder),  # finds the base by the name it was loaded from
        model.merge_and_unload(),
    ):
        # Products as narrow as the rank are summed in an order that depends on where a tensor lies in memory.
        for value, wanted in zip(outputs(loaded), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(outputs(AutoModel.from_pretrained(base_folder))[0], expected[0], atol=1e-2)
