"""A tokenizer that is learned from the titles of a run, `--train_tokenizer`.

    tokenizer = learn_tokenizer(args, titles, f"{source.name} (train)", max_length=35, tell=print)

A run keeps it in its folder, and one that goes on takes it from there: it is not learned again, from
data that may have changed. A prepared catalogue has it beside its shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from aliblip.data.arguments import TokenizerArguments
from aliblip.data.titles import title_report
from aliblip.data.wordpiece import train_wordpiece
from aliblip.models.loading import DEFAULT_TOKENIZER
from aliblip.retrieval.model_folder import LOADING_ERRORS, load_tokenizer
from aliblip.runtime.files import NewFolder
from aliblip.runtime.mistakes import UsageError, usage_errors

__all__ = [
    "TRAINED_TOKENIZER",
    "check_trained_tokenizer",
    "learn_tokenizer",
    "load_trained_tokenizer",
    "save_trained_tokenizer",
    "tokenizer_bytes",
]

TRAINED_TOKENIZER = "trained_tokenizer"  # folder in the output folder
REPORTED_TITLES = 10_000


def check_trained_tokenizer(args: TokenizerArguments, *others: str) -> None:
    """Refuse flags that name a tokenizer beside the one that is to be learned.

    Args:
        args: with the flags that are called `others` too.
        others: flags that bring a tokenizer.

    Raises:
        UsageError: they do.
    """
    if not args.train_tokenizer:
        return
    for name in others:
        if getattr(args, name) is not None:
            raise UsageError(f"--train_tokenizer learns a tokenizer, and --{name} brings one: leave out one of the two")


def learn_tokenizer(
    args: TokenizerArguments,
    titles: Iterable[str],
    name: str,
    rows: int,
    max_length: int,
    tell: Callable[[str], object],
) -> PreTrainedTokenizerFast:
    """Learn a WordPiece from the first titles, and tell how well it fits them.

    Args:
        args: its size, and how many titles.
        titles: clean ones; they are read once.
        name: of what the titles come from.
        rows: that these are.
        max_length: tokens that are read of a title.
        tell: takes a line.

    Raises:
        UsageError: the titles can't be read, or there are none.
    """
    first: list[str] = []
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for title in islice(titles, args.tokenizer_titles):
            count += 1
            if len(first) < REPORTED_TITLES:
                first.append(title)
            yield title

    with usage_errors(OSError, told=f"the titles of {name} can't be read ({{}})"):
        tokenizer = train_wordpiece(counted(), args.tokenizer_vocab_size)
    if not count:
        raise UsageError(f"{name} has no usable title to learn a tokenizer from")
    tell(
        f"tokenizer of {len(tokenizer):,} tokens, learned from {count:,} titles of {rows:,} rows"
        + (" (--tokenizer_titles)" if count == args.tokenizer_titles < rows else "")
    )
    tell(f"  its own: {title_report(tokenizer, first, max_length).fit()}")
    tell(f"  {DEFAULT_TOKENIZER}: {_usual(first, max_length)}")
    return tokenizer


def _usual(titles: list[str], max_length: int) -> str:
    """How the usual tokenizer writes the same titles, if it is on this machine."""
    try:
        tokenizer = load_tokenizer(DEFAULT_TOKENIZER, local_files_only=True)
    except LOADING_ERRORS:
        return "not compared, it is not on this machine"
    return title_report(tokenizer, titles, max_length).fit()


def tokenizer_bytes(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """What makes a tokenizer what it is, as uint8, to compare it with others: how the last call padded and cut is left
    out."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    written = json.dumps({key: value for key, value in content.items() if key not in ("truncation", "padding")})
    return torch.tensor(list(written.encode()), dtype=torch.uint8)


def save_trained_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Keep a tokenizer for the runs that go on.

    Raises:
        UsageError: it can't be written.
    """
    told = f"can't write {folder} ({{}}): make room, or give another --output_dir"
    with usage_errors(OSError, told=told), NewFolder(folder) as beside:
        tokenizer.save_pretrained(beside)


def load_trained_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the run that goes on.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    if not folder.is_dir():
        raise UsageError(
            f"there is no {folder}, the tokenizer that the run to go on with has learned: bring it back, or leave out "
            "--train_tokenizer and name the model's own, --tokenizer_name"
        )
    with usage_errors(*LOADING_ERRORS, told=f"{folder} can't be read ({{}}): bring the tokenizer of the run back"):
        return load_tokenizer(str(folder))
