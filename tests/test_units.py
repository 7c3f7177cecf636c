"""Work cut into units: who does which, and that none is lost."""

from __future__ import annotations

import pytest
from helpers import spawn

from aliblip.runtime.units import gather_units, own_units


def squares():
    return list(own_units(7)), gather_units("squares", [(unit, unit**2) for unit in own_units(7)], 7)


def test_every_unit_is_done_by_one_of_two_processes_and_all_get_it():
    first, second = spawn(squares, 2)
    assert first[0] == [0, 2, 4, 6] and second[0] == [1, 3, 5]
    assert first[1] == second[1] == squares()[1] == [0, 1, 4, 9, 16, 25, 36]


def test_a_lost_or_double_unit_is_noticed():
    assert gather_units("search", [(1, "b"), (0, "a")], 2) == ["a", "b"]
    for parts in ([(0, "a")], [(0, "a"), (0, "a"), (1, "b")]):
        with pytest.raises(RuntimeError, match="some are missing or double"):
            gather_units("search", parts, 2)
