"""Checks that a run makes before it starts, and that a doctor collects: the same functions for both.

    class Start:
        @part
        def model(self): ...          # made when it is first asked for; a mistake in it is raised once

    findings = Findings()
    findings.group("model")
    findings.check(lambda: start.model, lambda model: f"{model.name} is loaded")
    findings.ok("..."), findings.warning("..."), findings.problem("...")
    print(findings.summary())

A check raises `UsageError`. A run lets it pass, and ends; `Findings.check` notes it, and goes on. What can't be looked
at because of a mistake that is noted already raises `AlreadyTold`, and is told to be skipped.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from aliblip.runtime.mistakes import Mistakes, UsageError

__all__ = ["OK", "PROBLEM", "SKIPPED", "WARNING", "AlreadyTold", "Findings", "part"]

OK, WARNING, PROBLEM, SKIPPED = "ok", "warning", "problem", "skipped"
COLOURS = {OK: "\033[32m", WARNING: "\033[33m", PROBLEM: "\033[31m", SKIPPED: "\033[2m"}
WIDTH = 10  # of the words in front of the lines
LINE = 120
# What libraries and we put before a line that is a warning.
MARK = "warning: "

T = TypeVar("T")


class AlreadyTold(Exception):
    """Something is missing because of a mistake that has been raised before."""


class part(functools.cached_property):
    """A property that is made once. A mistake in making it is raised once too: afterwards it is `AlreadyTold`."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        failed = instance.__dict__.setdefault("_failed", set())
        if self.attrname in failed:
            raise AlreadyTold(self.attrname)
        try:
            return super().__get__(instance, owner)
        except (UsageError, AlreadyTold):
            failed.add(self.attrname)
            raise


class Findings:
    """What was found, in groups of lines, each of which is ok, a warning, a problem or skipped. Told as it is found.

    Args:
        tell: takes a line; None: it is printed to where standard output goes now, whatever checks do with that.
        width: characters of a line; None: as wide as the terminal, and no end where there is none.
        colours: whether the words are coloured; None: on a terminal, unless NO_COLOR is set.
    """

    def __init__(
        self, tell: Callable[[str], object] | None = None, width: int | None = None, colours: bool | None = None
    ):
        on_terminal = sys.stdout.isatty()
        if width is None and on_terminal:
            width = min(shutil.get_terminal_size().columns, LINE)
        self.tell = functools.partial(print, file=sys.stdout, flush=True) if tell is None else tell
        self.width = width
        self.colours = on_terminal and not os.environ.get("NO_COLOR") if colours is None else colours
        self.found: list[tuple[str, str, str]] = []  # (group, kind, text)
        self._group, self._told_group = "", None
        self._missing: list[str] = []  # names of what could not be looked at in this group

    def group(self, name: str) -> None:
        """The lines from now on belong together under this name."""
        self._end_group()
        self._group = name

    def _end_group(self) -> None:
        missing, self._missing = list(dict.fromkeys(self._missing)), []
        if missing:
            self.skipped(f"{', '.join(missing)}: what this needs has a problem")

    def ok(self, text: str) -> None:
        self._add(OK, text)

    def warning(self, text: str) -> None:
        self._add(WARNING, text)

    def problem(self, text: str) -> None:
        """Two parts that meet the same mistake tell it once."""
        if text not in self.of(PROBLEM):
            self._add(PROBLEM, text)

    def skipped(self, text: str) -> None:
        self._add(SKIPPED, text)

    def plain(self, text: str) -> None:
        """A line under the last one, that is neither."""
        self._print("", text)

    def line(self, text: str) -> None:
        """A line as a run prints it: a warning where it says so."""
        if text.startswith(MARK):
            self.warning(text[len(MARK) :])
        elif text.startswith(" "):
            self.plain(text.strip())
        else:
            self.ok(text)

    def check(self, call: Callable[[], T], ok: Callable[[T], str | None] | None = None, name: str = "") -> T | None:
        """Make a check. What it prints and warns of on its way becomes lines too.

        Args:
            call: the check, and what it gives.
            ok: tells about what it gave; None as a text: nothing.
            name: what is skipped if the check needs something that is missing.

        Returns:
            What the check gave; None if that is a mistake.
        """
        printed, given, mistakes = io.StringIO(), None, None
        with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", UserWarning)
            try:
                given = call()
            except Mistakes as error:
                mistakes = error.each
            except UsageError as error:
                mistakes = [str(error)]
            except AlreadyTold:
                mistakes = []
        for line in printed.getvalue().splitlines():
            if line.strip():
                self.line(line)
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                self.warning(" ".join(str(warning.message).split()))
        for mistake in mistakes or []:
            self.problem(mistake)
        if mistakes is None and ok is not None and (text := ok(given)):
            self.ok(text)
        if mistakes == [] and name:
            self._missing.append(name)
        return given

    def _add(self, kind: str, text: str) -> None:
        self.found.append((self._group, kind, text))
        self._print(kind, text)

    def _print(self, kind: str, text: str) -> None:
        if self._group != self._told_group:
            self.tell(self._group if self._told_group is None else f"\n{self._group}")
            self._told_group = self._group
        word = kind.ljust(WIDTH)
        if self.colours and kind:
            word = f"{COLOURS[kind]}{word}\033[0m"
        lines = [text] if self.width is None else textwrap.wrap(text, max(self.width - WIDTH - 2, 40)) or [""]
        self.tell(f"  {word}{lines[0]}")
        for line in lines[1:]:
            self.tell(f"  {' ' * WIDTH}{line}")

    def of(self, kind: str) -> list[str]:
        """The texts of one kind."""
        return [text for _, found, text in self.found if found == kind]

    @property
    def exit_code(self) -> int:
        """2 if there is a problem, as for a mistake of any command; else 0."""
        return 2 if self.of(PROBLEM) else 0

    def summary(self) -> str:
        """One line, after which nothing comes: how many problems and warnings."""
        self._end_group()
        counts = Counter(kind for _, kind, _ in self.found)
        problems, doubts = counts[PROBLEM], counts[WARNING]
        told = [f"{problems or 'no'} problem{'' if problems == 1 else 's'}"]
        told.append(f"{doubts or 'no'} warning{'' if doubts == 1 else 's'}")
        if counts[SKIPPED]:
            told.append(f"{counts[SKIPPED]} skipped")
        return ", ".join(told)
