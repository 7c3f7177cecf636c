"""`--cached_batch_size`: a few rows at a time through the model, and the loss and gradients of one pass."""

from __future__ import annotations

import pytest
import tiny
import torch
from helpers import assert_succeeded, run_ranks, spawn
from runs import TINY, steps_of, write_split
from torch.nn.parallel import DistributedDataParallel

import aliblip.training.cached
from aliblip.runtime.distributed import rank
from aliblip.runtime.mistakes import UsageError
from aliblip.training.arguments import TrainingArguments
from aliblip.training.cached import match_in_chunks
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.setup import check_cached_batch_size

WITHOUT_DROPOUT = '{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, '
WITHOUT_DROPOUT += '"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}'
DROPOUT = {
    "vision_config": {"drop_path_rate": 0.3, "attention_dropout": 0.2},
    "text_config": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
}


SEVERAL = {"itm_negatives": 3, "itm_queue_titles": 2, "itm_listwise": 1.0}


def step(
    cached: int | None, rows: int = 7, *, dtype=None, processes: bool = False, seed: int = 0, several=False, **changes
):
    """Loss, report and gradients of one batch."""
    model = tiny.model(**changes)
    momentum = MomentumState(model, queue_size=14, embedding_size=16, title_length=9 if several else 0)
    options = {"negatives_from_all_ranks": processes, "longest_title": 9, **(SEVERAL if several else {})}
    if several:
        earlier = tiny.batch(rows, length=9, seed=8)
        momentum.enqueue(momentum.encode(earlier), 1000 + torch.arange(rows))
    objective = RetrievalObjective(model, in_batch_itc=0.5, cached_batch_size=cached, **options).train()
    forward = DistributedDataParallel(objective, broadcast_buffers=False) if processes else objective
    batch = tiny.batch(rows, length=9, seed=seed)
    batch["product_id"] = torch.arange(rows) // 2 * 2 + 20 * seed  # every second row has a positive beside it
    targets = momentum.encode(batch)
    torch.manual_seed(3 + seed)  # negatives are drawn, and dropout
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        output = forward(batch, targets, 0.3)
    output.loss.backward()
    after = torch.rand(1).item()  # the next draw of all is the one that it would have been
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.loss.item(), output.report, gradients, after


def assert_equal_steps(one, other, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=1e-5, atol=1e-6, msg=name)
    for name, gradient in one[2].items():
        wanted = other[2][name]
        rounding = atol * max(1.0, float(wanted.abs().max()))  # sums in another order, of numbers as large as these
        torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=rounding, msg=name)


@pytest.mark.parametrize("cached", [1, 3, 7, 20])
@pytest.mark.parametrize("several", [False, True])  # negatives a row, and titles of the queue
def test_loss_and_gradients_are_those_of_one_pass(cached, several):
    assert_equal_steps(step(cached, several=several), step(None, several=several))


@pytest.mark.parametrize(("images", "titles"), [(1, 1), (2, 3)])
def test_pairs_of_several_negatives_are_matched_in_their_order(images, titles):
    rows, sizes = 5, (5, 5 * images, 5 * titles)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(9, 3, 2, generator=generator)  # the own 5, and 4 others
    own = torch.arange(rows)
    negative = torch.randint(0, 9, (rows * images,), generator=generator)
    index = torch.cat([own, negative, own.repeat_interleave(titles)])
    ids = torch.randint(0, 50, (sum(sizes), 4), generator=generator)
    lengths, asked = list(range(sum(sizes))), []

    def match(tokens, ids, mask, index, longest):
        asked.append(len(tokens))
        image = tokens[index].flatten(1).sum(dim=1)
        return torch.stack([image, ids.sum(dim=1) + mask.sum(dim=1) + torch.tensor(longest)], dim=1)

    expected = match(tokens, ids, ids % 2, index, lengths)
    asked.clear()
    found = match_in_chunks(match, 2, tokens.requires_grad_(), ids, ids % 2, index, sizes, lengths)
    torch.testing.assert_close(found, expected)
    assert asked == [2 + 2 * images, 2 + 2 * images, 1 + images]  # the photos that a chunk needs


def test_rows_computed_again_have_the_dropout_of_the_first_time(monkeypatch):
    whole = step(7, **DROPOUT)
    assert_equal_steps(whole, step(None, **DROPOUT))  # all rows at a time draw what one pass draws
    assert whole[3] == step(None, **DROPOUT)[3]
    chunks = step(3, **DROPOUT)
    assert chunks[0] != whole[0]
    # The same chunks, with all that they computed kept.
    monkeypatch.setattr(aliblip.training.cached, "checkpoint", lambda function, *args, **_: function(*args))
    kept = step(3, **DROPOUT)
    assert_equal_steps(chunks, kept)
    assert chunks[3] == kept[3]


def test_in_bf16_gradients_are_no_worse_than_those_of_one_pass():
    exact, one, cached = (
        torch.cat([gradient.flatten() for gradient in step(size, dtype=dtype)[2].values()])
        for size, dtype in ((None, None), (None, torch.bfloat16), (3, torch.bfloat16))
    )
    assert (one - exact).norm() < 0.1 * exact.norm()
    assert (cached - exact).norm() < 1.5 * (one - exact).norm()


def steps_of_rank() -> list[tuple]:
    return [step(cached, rows=4, processes=True, seed=rank()) for cached in (3, None)]


def test_with_several_processes_too():
    for cached, one in spawn(steps_of_rank, 2):
        assert_equal_steps(cached, one)


def test_what_autograd_keeps_is_of_a_chunk():
    """All tensors that the forward pass leaves for the backward pass."""

    def kept(cached: int | None) -> int:
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        model = tiny.model(vision_config={"num_hidden_layers": 6})
        momentum = MomentumState(model, queue_size=12, embedding_size=16)
        batch = tiny.batch(12)
        targets = momentum.encode(batch)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            RetrievalObjective(model, cached_batch_size=cached).train()(batch, targets, 0.3)
        return sum(size for size, _ in sizes.values())

    assert kept(3) < kept(None) / 10


def test_runs_of_both_engines_train_and_resume_as_one_pass_does(tmp_path):
    write_split(tmp_path / "data", "train", 48)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = [*TINY, "--data_dir", tmp_path / "data", "--tokenizer_name", tmp_path / "tokenizer", "--evaluate_every", 0]
    flags += ["--text_config", WITHOUT_DROPOUT, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2]
    flags += ["--max_train_steps", 4, "--checkpointing_steps", 2, "--negatives_from_all_ranks", "true"]
    flags += ["--hardest_negatives", "true", "--in_batch_itc", 0.5]

    def start(name: str, config: str, *more) -> dict[int, tuple]:
        assert_succeeded(run_ranks(config, "train.py", [*flags, "--output_dir", tmp_path / name, *more]))
        return steps_of(tmp_path / name)

    expected = start("one_pass", "cpu_2_processes.yaml")
    assert sorted(expected) == [1, 2, 3, 4]
    cached = start("zero2", "deepspeed_zero2_cpu.yaml", "--cached_batch_size", 3)
    on_the_way = ["--resume_from_checkpoint", tmp_path / "one_pass" / "checkpoint-2", "--cached_batch_size", 2]
    for steps in (cached, start("resumed", "cpu_2_processes.yaml", *on_the_way)):
        for step, values in steps.items():
            assert values == pytest.approx(expected[step], rel=2e-4), step
    assert sorted(cached) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            {"cached_batch_size": 16},
            "^--cached_batch_size 16 is not below --per_device_train_batch_size 16, .* lower it",
        ),
        (
            {"cached_batch_size": 4, "gradient_checkpointing": True},
            "^--cached_batch_size with --gradient_checkpointing",
        ),
    ],
)
def test_what_it_does_not_go_with_is_told(flags, told):
    with pytest.raises(UsageError, match=told) as caught:
        check_cached_batch_size(TrainingArguments(**flags))
    assert "\n" not in str(caught.value)
    check_cached_batch_size(TrainingArguments(cached_batch_size=4))
    check_cached_batch_size(TrainingArguments(gradient_checkpointing=True))
