"""The collectives, with two real gloo processes, against one process that sees everything."""

import pytest
import torch
from helpers import spawn

from aliblip.runtime import distributed

WORLD = 2
ROWS, WIDTH = 3, 5


def global_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(WORLD * ROWS, WIDTH, generator=generator)
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    return inputs, weight


def contrastive(own: torch.Tensor, everybody: torch.Tensor, first: int) -> torch.Tensor:
    """Mean loss of `own` rows against all rows; a row's partner is the next row of the whole batch."""
    labels = (torch.arange(len(own)) + first + 1) % len(everybody)
    return torch.nn.functional.cross_entropy(own @ everybody.t(), labels)


def whole_gradient() -> torch.Tensor:
    """The slow obvious version: one process, the whole batch."""
    inputs, weight = global_batch()
    weight.requires_grad_()
    features = torch.tanh(inputs @ weight)
    contrastive(features, features, 0).backward()
    return weight.grad


def gradient_of_rank(everywhere: bool) -> torch.Tensor:
    """Gradient after the mean over ranks that DDP takes; each rank computes the whole loss or that of its rows."""
    inputs, weight = global_batch()
    weight.requires_grad_()
    first = distributed.rank() * ROWS
    features = torch.tanh(inputs[first : first + ROWS] @ weight)
    gathered = distributed.all_gather_with_grad(features)
    loss = contrastive(gathered, gathered, 0) if everywhere else contrastive(features, gathered, first)
    loss.backward()
    return distributed.reduce_sum(weight.grad) / distributed.world_size()


@pytest.mark.parametrize("everywhere", [True, False], ids=["whole loss", "own rows"])
def test_gradients_equal_one_process_on_the_whole_batch(everywhere):
    expected = whole_gradient()
    for gradient in spawn(gradient_of_rank, WORLD, everywhere):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def collectives() -> dict:
    rank = distributed.rank()
    own = torch.arange(4).reshape(2, 2) + 10 * rank
    summed = torch.tensor([1.0 + rank])
    results = {
        "rank": rank,
        "world_size": distributed.world_size(),
        "is_main": distributed.is_main(),
        "slice": distributed.all_gather_with_grad(own.float()).chunk(WORLD)[rank].equal(own.float()),
        "objects": distributed.all_gather_objects({"rank": rank}),
        "sum": distributed.reduce_sum(summed).item(),
        "own": summed.item(),
        "broadcast": [distributed.broadcast_object(f"from {rank}", src=src) for src in range(WORLD)],
    }
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool):
        # a transposed view: not contiguous
        results[str(dtype)] = distributed.all_gather((own % 3).to(dtype).t())
    results["empty"] = distributed.all_gather(torch.empty(0, 7)).shape
    results["requires_grad"] = distributed.all_gather(torch.ones(1, requires_grad=True)).requires_grad
    distributed.barrier()
    return results


def test_collectives_on_two_ranks():
    results = spawn(collectives, WORLD)
    parts = [(torch.arange(4).reshape(2, 2) + 10 * rank) % 3 for rank in range(WORLD)]
    for rank, result in enumerate(results):
        assert result["rank"] == rank
        assert result["world_size"] == WORLD
        assert result["is_main"] is (rank == 0)
        assert result["slice"]
        assert result["objects"] == [{"rank": 0}, {"rank": 1}]
        assert result["sum"] == 3.0
        assert result["own"] == 1.0 + rank, "the argument must stay as it is"
        assert result["broadcast"] == ["from 0", "from 1"]
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool):
            expected = torch.cat([part.to(dtype).t() for part in parts])
            assert result[str(dtype)].dtype == dtype
            assert result[str(dtype)].equal(expected)
        assert result["empty"] == (0, 7)
        assert not result["requires_grad"]


def compare(differ: bool) -> list[str]:
    """The message of every form of the comparison, empty where it found nothing."""
    weight, bias = torch.ones(3), torch.zeros(2)
    if differ and distributed.rank() == 1:
        bias[1] = torch.finfo(torch.float32).tiny  # one bit pattern, far below any tolerance
    messages = []
    for tensors in ({"weight": weight, "bias": bias}, [weight, bias], bias):
        try:
            distributed.assert_equal_on_ranks("queue", tensors)
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def test_a_difference_is_reported_on_every_rank():
    assert spawn(compare, WORLD, False) == [["", "", ""]] * WORLD
    for mapping, sequence, single in spawn(compare, WORLD, True):
        assert "queue.bias (rank 1)" in mapping and "weight" not in mapping
        assert "queue[1] (rank 1)" in sequence and "queue[0]" not in sequence
        assert "queue (rank 1)" in single


def test_checksum():
    tensors = [torch.arange(6.0).reshape(2, 3), torch.tensor(7), torch.ones(3, dtype=torch.bfloat16)]
    reference = distributed.checksum(tensors)
    assert reference == distributed.checksum([tensor.clone() for tensor in tensors])
    assert 0 <= reference < 2**63
    variants = [
        tensors[::-1],
        tensors[:2],
        [tensors[0].reshape(3, 2), *tensors[1:]],
        [tensors[0], tensors[1].to(torch.int32), tensors[2]],
        [tensors[0], tensors[1], tensors[2].half()],
        [-tensors[0], *tensors[1:]],
        [],
    ]
    sums = [reference, *(distributed.checksum(variant) for variant in variants)]
    assert len(set(sums)) == len(sums)
    # the sign of zero is a bit, the order of memory is not part of the value
    assert distributed.checksum(torch.tensor([0.0])) != distributed.checksum(torch.tensor([-0.0]))
    assert distributed.checksum(tensors[0].t().contiguous()) == distributed.checksum(tensors[0].t())
    assert distributed.checksum(tensors[:1]) == distributed.checksum(tensors[0])


def test_without_a_process_group_everything_is_the_identity():
    assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    distributed.barrier()
    tensor = torch.ones(2, 3, requires_grad=True)
    assert distributed.all_gather(tensor).equal(tensor) and not distributed.all_gather(tensor).requires_grad
    assert distributed.all_gather_with_grad(tensor) is tensor
    assert distributed.reduce_sum(tensor).equal(tensor) and not distributed.reduce_sum(tensor).requires_grad
    assert distributed.all_gather_objects("a") == ["a"]
    assert distributed.broadcast_object("a") == "a"
    distributed.assert_equal_on_ranks("anything", {"tensor": tensor})
    with pytest.raises(ValueError, match="0-dimensional"):
        distributed.all_gather(torch.tensor(1.0))
