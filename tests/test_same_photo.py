"""In training, other titles of the same photo are never negatives, whatever their product is called."""

from __future__ import annotations

import pytest
import tiny
import torch
from data_stub import StubProcessor, encoded, photo
from runs import log_of, trained_in_process, write_split

import losses_aliblip
from aliblip.data.collate import Collator
from aliblip.data.rows import Row
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from losses_aliblip import positives


def test_equal_files_are_one_photo_and_pixels_are_one_photo(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(photo(0)))
    (tmp_path / "b.png").write_bytes(encoded(photo(0)))
    (tmp_path / "c.png").write_bytes(encoded(photo(1)))
    images = [*(str(tmp_path / f"{name}.png") for name in "abca"), encoded(photo(0)), photo(0), photo(0), photo(1)]
    rows = [Row(number, image, "cap", number, f"{number}") for number, image in enumerate(images)]
    ids = Collator(StubProcessor())(rows)["photo_id"].tolist()
    a, b, c, again, data, *pictures = ids
    assert a == b == again == data != c
    assert pictures[0] == pictures[1] != pictures[2]
    rows[1].image = b"damaged"  # its place is taken by the next row
    assert Collator(StubProcessor())(rows)["photo_id"].tolist() == [a, c, c, *ids[3:]]


def test_rows_are_positives_by_product_or_by_photo():
    rows, keys = torch.tensor([[1, 7], [2, 7], [3, 8]]), torch.tensor([[1, 9], [4, 8], [7, 1]])
    assert positives(rows, keys).tolist() == [[True, False, False], [False, False, False], [False, True, False]]
    assert positives(rows, rows).tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert torch.equal(positives(rows[:, 0], keys), positives(rows[:, 0], keys[:, 0]))


@pytest.mark.parametrize("from_all_ranks", [False, True])
def test_the_objective_takes_no_title_of_the_same_photo_for_a_negative(from_all_ranks, monkeypatch):
    drawn = []
    original = losses_aliblip.hard_negatives

    def kept(similarity, positive, *args, **options):
        drawn.append((original(similarity, positive, *args, **options), positive))
        return drawn[-1][0]

    monkeypatch.setattr("aliblip.training.objective.hard_negatives", kept)
    objective = RetrievalObjective(tiny.model(), negatives_from_all_ranks=from_all_ranks, in_batch_itc=0.5)
    momentum = MomentumState(tiny.model(), queue_size=12, embedding_size=16)
    batch = tiny.batch()
    batch["product_id"] = torch.tensor([[0, 70], [1, 70], [2, 71], [2, 72]])
    same = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    targets = momentum.encode(batch)
    momentum.enqueue(targets, torch.tensor([[9, 71], [1, 99], [0, 70], [5, 5]]))
    report = objective(batch, momentum.encode(batch), alpha=0.4).report
    # of the queue: row 0 has the slot of its product and photo, row 1 that too by its photo and one by its product,
    # row 2 one by its photo
    assert report["positives_per_row"].item() == pytest.approx((2 + 1 + 2 + 2 + 2 + 1 + 2) / 4)
    assert len(drawn) == 2
    for (index, exists), positive in drawn:
        assert torch.equal(positive, same) and exists.all()
        assert not positive.gather(1, index).any()


def test_a_step_that_is_left_out_puts_the_photos_back_and_old_checkpoints_have_none():
    momentum = MomentumState(tiny.model(), queue_size=12, embedding_size=16)
    targets = momentum.encode(tiny.batch())
    momentum.enqueue(targets, torch.tensor([[1, 5], [2, 6], [3, 7], [4, 8]]))
    assert momentum.queue_photos[:4].tolist() == [5, 6, 7, 8]
    state = {name: value for name, value in momentum.state_dict().items() if name != "queue_photos"}
    again = MomentumState(tiny.model(seed=2), queue_size=12, embedding_size=16)
    again.load_state_dict(state)
    assert again.queue_ids[:4].tolist() == [1, 2, 3, 4] and not again.queue_photos.any()
    momentum.rewind(targets)
    assert not momentum.queue_photos.any()


def test_a_run_learns_that_titles_of_one_photo_belong_together(tmp_path, monkeypatch):
    broken = {row: {"image": {"bytes": encoded(photo(row // 4)), "path": f"{row}.png"}} for row in range(16)}
    write_split(tmp_path / "data", "train", 16, broken)
    seen, forward = [], RetrievalObjective.forward

    def kept(self, batch, targets, alpha):
        seen.append(batch["product_id"])
        return forward(self, batch, targets, alpha)

    monkeypatch.setattr(RetrievalObjective, "forward", kept)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = ["--data_dir", tmp_path / "data", "--tokenizer_name", tmp_path / "tokenizer", "--evaluate_every", 0]
    trained_in_process([*flags, "--max_train_steps", 2], tmp_path / "out")
    assert [tuple(ids.shape) for ids in seen] == [(8, 2)] * 2
    assert len(torch.cat(seen)[:, 0].unique()) == 16 and len(torch.cat(seen)[:, 1].unique()) == 4
    assert log_of(tmp_path / "out")[0]["positives_per_row"] > 1
