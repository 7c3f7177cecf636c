"""Hard negatives from all ranks: only the chosen photos' tokens travel, and nothing else is different for it."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.distributed as dist
from helpers import spawn
from torch.nn.parallel import DistributedDataParallel

from aliblip.runtime.distributed import ChosenRows, all_gather, all_gather_with_grad, rank, world_size
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.traffic import negatives_traffic
from configuration_aliblip import AliBlipConfig

ROWS, LENGTH = 4, 9

# --- the exchange -----------------------------------------------------------------------------------------------------


def fetched_and_gathered(choices: list[list[int]]) -> list[tuple[torch.Tensor, ...]]:
    """Values, and gradients of a loss in which every row counts differently, of both ways."""
    own = torch.randn(ROWS, 2, 3, generator=torch.Generator().manual_seed(rank()))
    choice = torch.tensor(choices[rank()])
    weight = torch.randn(len(choice), 2, 3, generator=torch.Generator().manual_seed(9 + rank()))
    results = []
    for way in (ChosenRows(choice, ROWS).fetch, lambda rows: all_gather_with_grad(rows)[choice]):
        rows = own.clone().requires_grad_()
        chosen = way(rows)
        (chosen.square() * weight).sum().backward()
        results.append((chosen.detach(), rows.grad))
    return results


@pytest.mark.parametrize(
    "choices",
    [
        [[4, 11, 0, 7, 2], [3, 3, 9, 5, 1], [8, 0, 6, 6, 11]],
        [[8, 9, 8, 8], [10, 11, 8, 9], [8, 8, 8, 8]],  # all of one rank, and two ranks send nothing
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],  # nothing travels
    ],
)
def test_chosen_rows_are_those_of_a_gather_and_so_are_their_gradients(choices):
    for (values, gradients), (expected_values, expected_gradients) in spawn(fetched_and_gathered, 3, choices):
        assert torch.equal(values, expected_values)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-6, atol=1e-6)


def test_without_a_process_group_rows_are_chosen_from_the_own_ones():
    rows = torch.randn(ROWS, 3, requires_grad=True)
    chosen = ChosenRows(torch.tensor([2, 0, 2]), ROWS).fetch(rows)
    assert torch.equal(chosen, rows[[2, 0, 2]])
    chosen.sum().backward()
    assert rows.grad[:, 0].tolist() == [1, 0, 2, 0]


# --- the objective ----------------------------------------------------------------------------------------------------


class GatherEverything(RetrievalObjective):
    """The slow obvious version: everything of all ranks, and then the chosen rows of it."""

    def _images_to_match(self, image_tokens, negative, chosen):
        rows = len(image_tokens)
        images = torch.cat([image_tokens, all_gather_with_grad(image_tokens)[negative.flatten()]])
        return images, torch.arange(rows, len(images)).view_as(negative)

    def _titles_to_match(self, batch, negatives, targets):
        texts, masks, drawn = batch["input_ids"], batch["attention_mask"], negatives.text.flatten()
        padding = (0, self._longest_title(texts.shape[1]) - texts.shape[1])
        texts, masks = torch.nn.functional.pad(texts, padding), torch.nn.functional.pad(masks, padding)
        negative = torch.arange(len(texts), len(texts) + len(drawn)).view_as(negatives.text)
        texts, masks = torch.cat([texts, all_gather(texts)[drawn]]), torch.cat([masks, all_gather(masks)[drawn]])
        return texts, masks, negative, negatives.text_exists


class Counted:
    """What this rank receives from the others, in bytes, by the kind of collective; and rows asked of them."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.bytes = {"all_gather": 0, "all_to_all_single": 0, "all_reduce": 0}
        for name in self.bytes:
            patch.setattr(dist, name, getattr(self, name)(getattr(dist, name)))

    def all_gather(self, plain):
        def counting(parts, tensor):
            self.bytes["all_gather"] += (world_size() - 1) * tensor.nbytes
            plain(parts, tensor)

        return counting

    def all_to_all_single(self, plain):
        def counting(arrived, tensor, received, sent):
            self.bytes["all_to_all_single"] += (len(arrived) - received[rank()]) * arrived[:1].nbytes
            plain(arrived, tensor, received, sent)

        return counting

    def all_reduce(self, plain):
        def counting(tensor, *args, **kwargs):  # a ring's
            self.bytes["all_reduce"] += 2 * (world_size() - 1) * tensor.nbytes // world_size()
            plain(tensor, *args, **kwargs)

        return counting


def steps_of_both_ways(itm_negatives: int) -> list[tuple]:
    results = []
    for kind in (RetrievalObjective, GatherEverything):
        torch.manual_seed(0)
        model = tiny.model()
        momentum = MomentumState(model, queue_size=12, embedding_size=16)
        options = {"itm_negatives": itm_negatives, "itm_listwise": 0.5, "longest_title": LENGTH}
        objective = kind(model, negatives_from_all_ranks=True, **options)
        wrapped = DistributedDataParallel(objective, broadcast_buffers=False)
        longest = LENGTH if rank() == 0 else LENGTH - 2  # ranks pad differently
        batch = tiny.batch(ROWS, length=longest, seed=rank())
        batch["product_id"] = torch.tensor([[0, 70], [1, 71], [2, 72], [3, 73]]) + 2 * rank()  # some are positives
        targets = momentum.encode(batch)
        torch.manual_seed(5 + rank())  # negatives are drawn
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch)
            output = wrapped(batch, targets, alpha=0.3)
            output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in objective.named_parameters()}
        results.append((output.loss.item(), output.report, gradients, counted.bytes))
    return results


@pytest.mark.parametrize("itm_negatives", [1, 3])
def test_only_chosen_photos_travel_and_loss_and_gradients_are_those_of_gathering_everything(itm_negatives):
    ranks = spawn(steps_of_both_ways, 3, itm_negatives)
    config = tiny.config()
    told = negatives_traffic(config, 3, ROWS, LENGTH, element=4, itm_negatives=itm_negatives)
    photo = 17 * 32 * 4  # tokens, width, bytes
    travelled = 0
    for (loss, report, gradients, moved), (expected, expected_report, expected_gradients, all_moved) in ranks:
        assert loss == pytest.approx(expected, rel=1e-6)
        for name, value in report.items():
            torch.testing.assert_close(value, expected_report[name], rtol=1e-6, atol=1e-6, msg=name)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)
        titles = 2 * (3 - 1) * ROWS * LENGTH * 8
        all_photos = all_moved["all_gather"] + all_moved["all_reduce"] - told.features - told.choices - titles
        assert all_photos == told.gathering_everything
        if itm_negatives == 1:
            assert moved["all_gather"] == told.features + told.titles + told.choices
            assert moved["all_reduce"] == 0
            assert moved["all_to_all_single"] % photo == 0
            travelled += moved["all_to_all_single"]
        else:  # of three ranks' photos each would fetch as many as there are
            assert moved["all_to_all_single"] == 0 and sum(moved.values()) == told.total
    assert travelled <= 3 * told.tokens and (travelled > 0) == (itm_negatives == 1)


def test_bytes_of_the_tokens_do_not_grow_with_the_ranks():
    large = AliBlipConfig.from_size("large", vision_config={"image_size": 384})
    at = {processes: negatives_traffic(large, processes, 64, 35, element=2) for processes in (1, 2, 8, 64, 1024)}
    assert at[1].total == 0
    assert {traffic.tokens for processes, traffic in at.items() if processes > 1} == {2 * 64 * 577 * 1024 * 2}
    assert at[1024].total < 2 * at[1024].tokens < at[1024].gathering_everything / 500
    assert at[2].total < at[2].gathering_everything
