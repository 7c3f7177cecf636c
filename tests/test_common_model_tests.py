"""transformers' common tests pass but for a list: here the list itself, and where their source is, the tests too."""

from __future__ import annotations

import os
import sys
import unittest
from pathlib import Path

import pytest
from common_exceptions import FAILS, NEEDS, SKIPS
from common_model_tests import import_common, problems
from common_model_tests import run as run_cases
from helpers import ROOT, assert_succeeded, run

SOURCE = os.environ.get("ALIBLIP_TRANSFORMERS_SOURCE", "")
LISTED = {"A.test_a_*": "is so"}, {"no x": "has no x"}, {"test requires *": "a GPU"}
RIGHT = {"A.test_a_1": "failed: E", "A.test_a_2": "failed: E", "A.test_b": "passed", "A.test_c": "skipped: no x"}


@pytest.mark.skipif(not SOURCE, reason="no source distribution of transformers (set ALIBLIP_TRANSFORMERS_SOURCE)")
def test_the_common_tests_of_transformers_pass_but_for_the_list():
    script = ROOT / "tests" / "common_model_tests.py"
    assert_succeeded(run([sys.executable, script, "--source_dir", SOURCE]))


def test_what_is_as_listed_is_no_problem():
    assert list(problems(RIGHT, *LISTED)) == []
    assert list(problems(RIGHT | {"A.test_d": "skipped: test requires a GPU"}, *LISTED)) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"A.test_b": "failed: ValueError: no"}, "A.test_b failed: ValueError: no"),
        ({"A.test_b": "skipped: no y"}, "A.test_b skipped: no y: this is no reason that is listed"),
        ({"A.test_a_2": "passed"}, "A.test_a_2 is listed, but it passed"),
        ({"A.test_a_2": "skipped: no x"}, "A.test_a_2 is listed, but it skipped: no x"),
        ({"A.test_c": "passed"}, "no test is skipped with 'no x', which is listed"),
        ({"A.test_a_1": None, "A.test_a_2": None}, "A.test_a_* is listed, but there is no such test"),
    ],
)
def test_whatever_differs_from_the_list_is_told(changes, told):
    outcomes = {name: outcome for name, outcome in (RIGHT | changes).items() if outcome is not None}
    assert list(problems(outcomes, *LISTED)) == [told]


def test_every_exception_has_a_reason():
    for listed in (FAILS, SKIPS, NEEDS):
        assert listed and all(len(reason.split()) > 2 for reason in listed.values())


def test_outcomes_of_tests_and_subtests():
    class Some(unittest.TestCase):
        def test_passes(self):
            pass

        def test_skips(self):
            self.skipTest("no\n x")

        def test_fails(self):
            self.fail("not so")

        def test_raises(self):
            raise KeyError("missing")

        def test_one_part_fails(self):
            for part in range(3):
                with self.subTest(part):
                    self.assertNotEqual(part, 1)

        def test_one_part_skips(self):
            with self.subTest("skipped"):
                self.skipTest("no x")
            with self.subTest("failed"):
                self.fail("not so")

    outcomes = run_cases([Some])
    assert outcomes.of == {
        "Some.test_passes": "passed",
        "Some.test_skips": "skipped: no x",
        "Some.test_fails": "failed: AssertionError: not so",
        "Some.test_raises": "failed: KeyError: 'missing'",
        "Some.test_one_part_fails": "failed: AssertionError: 1 == 1",
        "Some.test_one_part_skips": "failed: AssertionError: not so",
    }
    assert "self.assertNotEqual(part, 1)" in outcomes.traces["Some.test_one_part_fails"]
    assert run_cases([Some], "Some.test_s").of == {"Some.test_skips": "skipped: no x"}


def test_a_folder_without_the_tests_or_of_another_version_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"no tests/test_modeling_common\.py: give an unpacked source distribution"):
        import_common(tmp_path)
    (tmp_path / "tests").mkdir()
    Path(tmp_path, "tests", "test_modeling_common.py").touch()
    (tmp_path / "PKG-INFO").write_text("Name: transformers\nVersion: 4.0.0\n\n")
    with pytest.raises(SystemExit, match="is not of transformers .*, which is installed"):
        import_common(tmp_path)
