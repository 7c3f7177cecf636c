"""Finished parts in a folder: those of other work are refused or dropped, never taken."""

from __future__ import annotations

import pytest
import torch

from aliblip.runtime.mistakes import UsageError
from aliblip.runtime.parts import Parts, stage_of

HERE = {"model": "a", "rows": 3}


def kept(folder, made_from=HERE):
    parts = Parts(folder / "parts", made_from)
    with parts.stage("embed") as stage:
        stage.add(0, {"rows": torch.arange(3)}, {"skipped": []})
    return parts


def test_parts_of_the_same_work_are_taken_and_stay(tmp_path):
    kept(tmp_path)
    again = Parts(tmp_path / "parts", dict(HERE))
    again.check()
    again.drop_others()
    stage = again.stage("embed")
    assert 0 in stage and 1 not in stage
    tensors, info = stage.load(0)
    assert tensors["rows"].tolist() == [0, 1, 2] and info == {"skipped": []}


def test_parts_of_other_work_are_refused_with_all_that_differs_and_dropped_on_request(tmp_path):
    folder = kept(tmp_path).folder
    other = Parts(folder, {"model": "b", "rows": 4})
    with pytest.raises(UsageError, match=r"something else \(model was a, is b; rows was 3, is 4\): go on"):
        other.check()
    other.drop_others()
    assert not folder.exists()
    other.check()


def test_a_list_of_facts_that_is_damaged_is_a_mistake_to_tell(tmp_path):
    parts = kept(tmp_path)
    for damaged in ("{", "[1]"):
        (parts.folder / "made_from.json").write_text(damaged)
        with pytest.raises(UsageError, match="can't be read: remove the folder"):
            parts.check()
    parts.drop_others()
    assert not parts.folder.exists()


def test_without_parts_nothing_is_kept_and_nothing_is_found():
    with stage_of(None, "embed") as stage:
        stage.add(0, {"rows": torch.arange(3)})
        assert 0 not in stage
