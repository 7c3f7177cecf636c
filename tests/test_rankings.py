"""Candidate pairs of both directions, each once, grouped by photo."""

import pytest
import torch

from aliblip.retrieval.rankings import candidate_pairs


def test_pairs_of_both_directions_are_grouped_by_image_once_each():
    image_ids = torch.tensor([[2, 0], [2, 1], [0, 2]])  # of titles 0, 1, 2
    text_ids = torch.tensor([[0, 2], [1, 0], [1, 2], [0, 1]])  # of images 0 to 3
    pairs = candidate_pairs(image_ids, text_ids, num_images=4, num_texts=3)
    expected = {(int(i), t) for t, row in enumerate(image_ids) for i in row}
    expected |= {(i, int(t)) for i, row in enumerate(text_ids) for t in row}
    found = list(zip(pairs.image_id.tolist(), pairs.text_id.tolist(), strict=True))
    assert found == sorted(expected) and len(pairs) == len(expected)
    for image in range(4):
        assert pairs.texts_of(image).tolist() == sorted(t for i, t in expected if i == image)
    positions = pairs.locate(image_ids, torch.arange(3)[:, None])
    assert torch.equal(pairs.image_id[positions], image_ids)
    assert torch.equal(pairs.text_id[positions], torch.arange(3)[:, None].expand(3, 2))


def test_pairs_of_one_direction_only_and_images_without_candidates():
    pairs = candidate_pairs(torch.tensor([[3], [3]]), torch.empty(0, 5, dtype=torch.int64), 5, 2)
    assert [pairs.texts_of(image).tolist() for image in range(5)] == [[], [], [], [0, 1], []]


def test_pairs_outside_the_table_or_the_galleries_are_refused():
    pairs = candidate_pairs(torch.tensor([[1]]), torch.empty(0, 1, dtype=torch.int64), 2, 1)
    with pytest.raises(KeyError):
        pairs.locate(torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="image ids from 2 to 2 given, the gallery has 0 to 1"):
        candidate_pairs(torch.tensor([[2]]), torch.empty(0, 1, dtype=torch.int64), 2, 1)
