"""Several negatives of a row, titles of the queue among them, and the listwise loss, against loops over pairs."""

from __future__ import annotations

import pytest
import tiny
import torch
from helpers import ROOT, assert_succeeded, run_ranks, spawn
from runs import TINY, log_of, steps_of, trained_in_process, write_split
from torch.nn.parallel import DistributedDataParallel

from aliblip.runtime.distributed import rank
from aliblip.runtime.mistakes import UsageError
from aliblip.training.arguments import TrainingArguments
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.setup import check_negatives
from losses_aliblip import hard_negatives, itm_pairs, listwise_loss, positives
from modeling_aliblip import AliBlipForImageTextRetrieval

LENGTH = 9  # tokens of the longest title


def test_all_negatives_of_a_row_differ_and_none_is_excluded():
    product_id = torch.tensor([0, 0, 1, 2, 3, 3])
    excluded = positives(product_id, product_id)
    similarity = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) * 300  # softmax of most is 0 in fp32
    for hardest in (False, True):
        index, exists = hard_negatives(similarity, excluded, 5, hardest=hardest)
        assert exists.sum(dim=1).tolist() == [4, 4, 5, 5, 4, 4]
        for row in range(6):
            taken = index[row][exists[row]].tolist()
            assert len(set(taken)) == len(taken) and not excluded[row, taken].any()
            if hardest:
                assert taken == sorted(taken, key=lambda other: -similarity[row, other])
    assert hard_negatives(similarity, excluded, 99)[0].shape == (6, 6)  # no more than there are


def test_listwise_loss_equals_the_loop():
    torch.manual_seed(0)
    image_exists = torch.tensor([[True, True], [True, False], [False, False]])
    text_exists = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    pairs = itm_pairs(torch.zeros(3, 2).long(), image_exists, torch.zeros(3, 3).long(), text_exists)
    assert pairs.sizes == (3, 6, 9)
    # a row's negatives weigh as much as its own pair, however many there are
    assert pairs.weight.tolist() == pytest.approx(
        [1] * 3 + [0.5, 0.5, 1, 0, 0, 0] + [0.5, 0.5, 0, 0, 0, 0, 1 / 3, 1 / 3, 1 / 3]
    )
    scores = torch.randn(18, requires_grad=True)
    losses = []
    for first, exists in ((3, image_exists), (9, text_exists)):
        for row in range(3):
            count = exists.shape[1]
            negatives = [scores[first + row * count + i] for i in range(count) if exists[row, i]]
            if negatives:
                losses.append(torch.stack([scores[row], *negatives]).logsumexp(0) - scores[row])
    expected = sum(losses) / len(losses)
    loss = listwise_loss(scores, pairs)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0])
    nothing = itm_pairs(
        torch.zeros(2, 1).long(), *[torch.zeros(2, 1).bool(), torch.zeros(2, 1).long()], torch.zeros(2, 1).bool()
    )
    assert listwise_loss(torch.randn(6), nothing).item() == 0.0


# --- the objective ----------------------------------------------------------------------------------------------------


def objective_and_momentum(**options):
    """With 12 titles in a queue of 16 slots; rows of `whole` share products with two of them."""
    model = tiny.spread_model().train()
    momentum = MomentumState(model, queue_size=16, embedding_size=16, title_length=LENGTH)
    for seed in (1, 2, 3):  # by hand: `enqueue` would gather what all ranks have
        slots, before = torch.arange(4) + 4 * (seed - 1), tiny.batch(4, length=LENGTH - seed, seed=seed)
        targets = momentum.encode(before)
        momentum.image_queue[slots], momentum.text_queue[slots] = targets.image, targets.text
        momentum.queue_titles[slots], momentum.queue_lengths[slots] = targets.titles, targets.lengths
        momentum.queue_ids[slots], momentum.queue_filled[slots] = 4 * seed + torch.arange(4), True
    momentum.pointer = 12
    return RetrievalObjective(model, hardest_negatives=True, longest_title=LENGTH, **options), momentum


def whole() -> dict:
    return {**tiny.batch(6, length=LENGTH), "product_id": torch.tensor([0, 4, 0, 9, 30, 31])}


def obvious(model, momentum, own, candidates, *, n, t, ceiling=None, with_itc=False):
    """ITM of the rows `own` of `whole` with negatives among `candidates`, pair by pair."""
    batch, ids = whole(), whole()["product_id"]
    image = model.get_image_features(batch["pixel_values"])
    text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    similarity = (image.pooler_output @ text.pooler_output.t()).detach()
    to_slot = (image.pooler_output @ momentum.text_queue.t()).detach()
    temperature = model.temp.detach()
    limit = 2.0 if ceiling is None else ceiling

    def logits(photo, title, mask):
        image_kv = model.project_image_kv(image.last_hidden_state[photo : photo + 1])
        return model.match(title[None], mask[None], image_kv, torch.tensor([0]))[0]

    def of_batch(photo, row):
        return logits(photo, batch["input_ids"][row], batch["attention_mask"][row]), similarity[photo, row]

    def of_queue(photo, slot):
        length = int(momentum.queue_lengths[slot])
        title = momentum.queue_titles[slot, :length].long()
        return logits(photo, title, torch.ones_like(title)), to_slot[photo, slot]

    def hardest(scores, allowed, count):
        return sorted((i for i in allowed if scores[i] <= limit), key=lambda i: -scores[i])[:count]

    pair_loss, weights, lists = 0.0, 0.0, []
    for row in own:
        others = [i for i in candidates if ids[i] != ids[row]]
        slots = [i for i in range(12) if momentum.queue_ids[i] != ids[row]]
        photos = [of_batch(i, row) for i in hardest(similarity[:, row], others, n)]
        titles = [of_batch(row, i) for i in hardest(similarity[row], others, n)]
        titles += [of_queue(row, i) for i in hardest(to_slot[row], slots, t)]
        right = of_batch(row, row)
        pair_loss, weights = pair_loss - right[0].log_softmax(0)[1], weights + 1
        for side in (photos, titles):
            for pair, _ in side:
                pair_loss = pair_loss - pair.log_softmax(0)[0] / len(side)
            weights += bool(side)
            scores = torch.stack([pair[1] + with_itc * itc / temperature[0] for pair, itc in (right, *side)])
            lists += [scores.logsumexp(0) - scores[0]] * bool(side)
    return pair_loss / weights, sum(lists) / len(lists)


@pytest.mark.parametrize("ceiling, with_itc", [(None, False), (0.15, True)])
def test_negatives_of_batch_and_queue_equal_the_loop(ceiling, with_itc):
    objective, momentum = objective_and_momentum(
        itm_negatives=3, itm_queue_titles=4, itm_listwise=0.7, itm_listwise_itc=with_itc, itm_negative_ceiling=ceiling
    )
    pair_loss, listwise = obvious(
        objective.model, momentum, range(6), range(6), n=3, t=4, ceiling=ceiling, with_itc=with_itc
    )
    output = objective(whole(), momentum.encode(whole()), alpha=0.3)
    expected = pair_loss + 0.7 * listwise
    assert output.parts["itm"].item() == pytest.approx(expected.item(), rel=1e-5)
    objective.in_batch_itc = 0.0
    parameters = [p for name, p in objective.model.named_parameters() if "crossattention" in name or "itm_head" in name]
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (output.loss, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def matching_of_all_ranks(n: int, t: int):
    objective, momentum = objective_and_momentum(
        negatives_from_all_ranks=True, itm_negatives=n, itm_queue_titles=t, itm_listwise=0.7
    )
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False)
    rows = slice(3 * rank(), 3 * rank() + 3)
    batch = {name: value[rows] for name, value in whole().items()}
    longest = int(batch["attention_mask"].sum(1).max())  # ranks pad differently
    batch |= {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}
    targets = momentum.encode(batch)
    output = wrapped(batch, targets, alpha=0.3)
    output.loss.backward()
    momentum.enqueue(targets, batch["product_id"])
    gradients = {name: p.grad.clone() for name, p in objective.model.named_parameters() if "crossattention" in name}
    return output.parts["itm"].item(), gradients, momentum.queue_titles, momentum.queue_lengths


@pytest.mark.parametrize("n, t", [(2, 3), (1, 2)])  # all photos of the two ranks are projected, or the chosen ones
def test_negatives_of_two_ranks_and_the_queue_equal_the_loop(n, t):
    ranks = spawn(matching_of_all_ranks, 2, n, t)
    objective, momentum = objective_and_momentum()
    model, losses = objective.model, []
    for r, (itm, *_) in enumerate(ranks):
        pair_loss, listwise = obvious(model, momentum, range(3 * r, 3 * r + 3), range(6), n=n, t=t)
        losses.append(pair_loss + 0.7 * listwise)
        assert itm == pytest.approx(losses[-1].item(), rel=1e-5)
    names = {name: p for name, p in model.named_parameters() if "crossattention" in name}
    gradients = torch.autograd.grad(sum(losses) / 2, list(names.values()))
    titles, lengths = whole()["input_ids"], whole()["attention_mask"].sum(1)
    for _, of_rank, queue_titles, queue_lengths in ranks:
        for name, gradient in zip(names, gradients, strict=True):
            torch.testing.assert_close(of_rank[name], gradient, rtol=1e-4, atol=1e-6)
        slots = [12, 13, 14, 15, 0, 1]  # the queue goes round
        assert torch.equal(queue_titles[slots], titles.int()) and torch.equal(queue_lengths[slots], lengths.int())


def test_one_negative_and_no_listwise_loss_is_the_published_step():
    """Bit by bit, draws included, whatever else there is to be switched on."""
    outputs = []
    for options in (
        {},
        {"itm_negatives": 1, "itm_listwise": 0.0, "itm_listwise_itc": True, "itm_negative_ceiling": 2.0},
    ):
        objective, momentum = objective_and_momentum(**options)
        objective.hardest_negatives = False
        torch.manual_seed(7)
        outputs.append(objective(whole(), momentum.encode(whole()), alpha=0.3))
    assert torch.equal(outputs[0].loss, outputs[1].loss)


def test_forward_of_the_model_has_the_same_losses():
    model, batch = tiny.spread_model(), whole()
    momentum = MomentumState(model, queue_size=12, embedding_size=16)
    out = model(**batch, return_loss=True)
    more = model(**batch, return_loss=True, itm_negatives=3, itm_listwise=0.7)
    one, several = (obvious(model, momentum, range(6), range(6), n=n, t=0) for n in (1, 3))
    assert (more.loss - out.loss).item() == pytest.approx((several[0] + 0.7 * several[1] - one[0]).item(), rel=1e-4)


# --- the queue of titles ----------------------------------------------------------------------------------------------


def test_titles_of_the_queue_go_with_its_features():
    _, momentum = objective_and_momentum()
    assert momentum.queue_lengths.bool().tolist() == [True] * 12 + [False] * 4
    before = {name: value.clone() for name, value in momentum.state_dict().items() if torch.is_tensor(value)}
    targets = momentum.encode(whole())
    momentum.enqueue(targets, whole()["product_id"])
    assert not torch.equal(momentum.queue_titles, before["queue_titles"])
    momentum.rewind(targets)
    assert all(torch.equal(momentum.state_dict()[name], value) for name, value in before.items())
    # a checkpoint without titles, and titles that nobody asks for
    plain = MomentumState(tiny.model(), queue_size=16, embedding_size=16)
    plain.load_state_dict(momentum.state_dict())
    momentum.load_state_dict(plain.state_dict())
    assert not momentum.queue_lengths.any() and torch.equal(momentum.queue_ids, before["queue_ids"])


FLAGS = [
    *("--itm_negatives", "3", "--itm_queue_titles", "4", "--itm_listwise", "1", "--hardest_negatives", "true"),
    *("--negatives_from_all_ranks", "true", "--evaluate_every", "0"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder / "data", "train", 64)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return ["--data_dir", folder / "data", "--tokenizer_name", folder / "tokenizer"]


def test_zero_2_trains_as_ddp_does(data, tmp_path):
    found = []
    for config in ("cpu_2_processes.yaml", "deepspeed_zero2_cpu.yaml"):
        flags = [*TINY, *data, *FLAGS, "--max_train_steps", 4, "--output_dir", tmp_path / config]
        assert_succeeded(run_ranks(config, ROOT / "train.py", flags))
        found.append(steps_of(tmp_path / config))
    assert len(found[0]) == len(found[1]) == 4
    for step, ours in found[0].items():
        assert ours == pytest.approx(found[1][step], rel=1e-4)


def test_a_run_goes_on_with_the_titles_of_its_queue(data, tmp_path):
    flags = [*data, *FLAGS, "--checkpointing_steps", 3]
    trained_in_process([*flags, "--max_train_steps", 6], tmp_path / "whole")
    trained_in_process(
        [*flags, "--max_train_steps", 6, "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-3"],
        tmp_path / "resumed",
    )
    of_both = [steps_of(tmp_path / name) for name in ("whole", "resumed")]
    assert len(of_both[1]) == 3 and all(of_both[0][step] == line for step, line in of_both[1].items())
    line = log_of(tmp_path / "whole")[-1]
    assert line["loss_itm"] == pytest.approx(line["loss_pairs"] + line["loss_lists"], rel=1e-5)
    # what was trained is what orders: each saved model has the weight of its own temperature
    for folder in ("last", "checkpoint-3"):
        model = AliBlipForImageTextRetrieval.from_pretrained(tmp_path / "whole" / folder)
        assert model.config.fusion_weight == pytest.approx(1 / model.temp.item(), abs=1e-3) != 1.0


def test_more_negatives_than_a_batch_has_rows_are_refused():
    args = TrainingArguments(per_device_train_batch_size=4, itm_negatives=3)
    check_negatives(args, processes=1)
    args.itm_negatives = 7
    with pytest.raises(UsageError, match=r"drawn from 4 rows: give at most 3, .*, or --negatives_from_all_ranks true"):
        check_negatives(args, processes=2)
    args.negatives_from_all_ranks = True
    check_negatives(args, processes=2)
    check_negatives(TrainingArguments(per_device_train_batch_size=1), processes=1)


def test_a_model_of_the_published_loss_keeps_its_weight(data, tmp_path):
    start = tiny.model(vocab_size=len(tiny.tokenizer()) + 2, fusion_weight=3.5)
    start.save_pretrained(tmp_path / "start")
    tiny.processor().save_pretrained(tmp_path / "start")
    flags = [
        "--data_dir",
        data[1],
        "--model_name_or_path",
        tmp_path / "start",
        "--evaluate_every",
        0,
        "--queue_size",
        20,
    ]
    flags += ["--max_train_steps", 1, "--per_device_train_batch_size", 8, "--dataloader_num_workers", 0]
    for listwise in (0, 1):
        folder = tmp_path / f"{listwise}"
        trained_in_process([*flags, "--itm_listwise", listwise], folder, common=[])
        model = AliBlipForImageTextRetrieval.from_pretrained(folder / "last")
        assert model.config.fusion_weight == pytest.approx([3.5, 1 / model.temp.item()][listwise], abs=1e-3)
