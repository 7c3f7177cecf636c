"""Which tests `make check` leaves out."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import helpers
import pytest
import runs
import slow
import tiny


def starts():
    return helpers.run([sys.executable, "-c", ""])


def starts_in_a_function_of_its_own():
    return [start() for start in (lambda: starts(),)]


def starts_without_a_helper():
    subprocess.run([sys.executable, "-c", ""], check=True)


def starts_in_the_background():
    return runs.BackgroundRun("cpu.yaml", None, [])


def searches_in_a_browser(api):
    return api.sync_playwright()


def computes():
    return tiny.model(), helpers.free_port()


def item(test, *fixtures, name="test_something"):
    found = {fixture.__name__: [SimpleNamespace(func=fixture)] for fixture in fixtures}
    return SimpleNamespace(
        function=test,
        originalname=name,
        path=slow.TESTS / "test_demo.py",
        _fixtureinfo=SimpleNamespace(name2fixturedefs=found),
    )


@pytest.mark.parametrize(
    "test",
    [
        starts,
        starts_in_a_function_of_its_own,
        starts_without_a_helper,
        starts_in_the_background,
        searches_in_a_browser,
    ],
)
def test_what_starts_a_process_is_slow(test):
    assert slow.is_slow(item(test)) and slow.is_slow(item(computes, test))


def test_what_computes_here_is_not_slow_unless_it_is_listed():
    assert not slow.is_slow(item(computes))
    assert slow.is_slow(item(computes, name="test_the_loader_reads_it"))


def test_what_is_listed_exists():
    files = "".join(file.read_text() for file in slow.TESTS.glob("test_*.py"))
    assert set(re.findall(r"^def (test_\w+)", files, flags=re.MULTILINE)) >= slow.SLOW_HERE
