"""A user's mistake becomes one line; a bug of ours keeps its traceback.

    raise UsageError("--k_rerank is 0: give a number of at least 1")

Only a `UsageError` is a mistake. What a library raises for a wrong path or name becomes one where it is called, with
`usage_errors`; any other exception is ours and ends the process as Python shows it. ALIBLIP_TRACEBACK=1 shows the
traceback of a mistake too.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from aliblip.runtime.caches import cache_hint
from aliblip.runtime.distributed import launched_rank
from aliblip.runtime.quiet import quiet_libraries
from aliblip.runtime.refusals import refusal

SECONDS_FOR_THE_FIRST_PROCESS = 30
TRACEBACK_VARIABLE = "ALIBLIP_TRACEBACK"


class UsageError(ValueError):
    """A mistake in what the user gave; the message is the one line to show."""


class Mistakes(UsageError):
    """Several mistakes of the same kind at once; `each` is a list of their messages."""

    def __init__(self, each: Sequence[str]):
        super().__init__("; ".join(each))
        self.each = list(each)


def first_line(error: BaseException) -> str:
    """What an error of a library says first, for a `UsageError`; with its kind where it says nothing else, and of a
    cache that can't be used what to do about it."""
    if hint := cache_hint(error):
        return hint
    told, kind = str(error).strip(), type(error).__name__
    if not told:
        return kind
    says_nothing = isinstance(error, (LookupError, TypeError, AttributeError))  # "'name'" or so
    return f"{kind}: {told.splitlines()[0]}" if says_nothing else told.splitlines()[0]


def shortened(text: str, length: int = 300) -> str:
    """Text for a message, which stays a line whatever was given."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def one_line(error: BaseException, most: int = 300) -> str:
    """All that an error says, on one line of at most so many characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__


@contextmanager
def usage_errors(*kinds: type[Exception], told: str = "{}") -> Iterator[None]:
    """Make a `UsageError` of what a library raises for something that the user named.

    Put it around that one call, so that no error of ours hides in it. A `UsageError` passes as it is.

    Args:
        kinds: of the library's errors.
        told: the message, `{}` for the first line of the library's own.
    """
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        raise UsageError(told.replace("{}", first_line(error))) from error


def main_with_usage_errors(name: str, main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its code; a UsageError ends it with exit code 2 and one line, printed by the
    first process. Libraries are kept from printing what is not the user's concern, and from asking on standard input:
    nobody may be there, and a stranger's folder shall not put questions. (With ALIBLIP_TRACEBACK=1 it stays open, for a
    debugger.)

    The other processes of a launch meet the same mistake. They wait: a launcher ends all processes as soon as one has
    failed, so one that left first would cut the line off. Whoever is still there after that met a mistake of its own.
    """
    quiet_libraries()
    try:
        with nullcontext() if _shows_tracebacks() else _no_questions():
            sys.exit(main())
    except (OSError, RuntimeError) as error:  # wherever a library met it
        if not (hint := cache_hint(error) or refusal(error)):
            raise
        _end(name, UsageError(hint))
    except UsageError as error:
        _end(name, error)


def _end(name: str, error: UsageError) -> None:
    """Tell a mistake, and end with exit code 2."""
    if launched_rank() != 0:
        time.sleep(SECONDS_FOR_THE_FIRST_PROCESS)
    if _shows_tracebacks():
        traceback.print_exc()
    print(f"{name}: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextmanager
def _no_questions() -> Iterator[None]:
    """Standard input is at its end for whatever library reads it."""
    before = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


def _shows_tracebacks() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")


__all__ = ["Mistakes", "UsageError", "first_line", "main_with_usage_errors", "one_line", "shortened", "usage_errors"]
