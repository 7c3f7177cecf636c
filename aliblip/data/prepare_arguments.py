"""Flags of `python -m aliblip.prepare`."""

from __future__ import annotations

from dataclasses import dataclass

from aliblip.data.arguments import DataArguments, TokenizerArguments
from aliblip.data.wordpiece import SMALLEST_VOCABULARY
from aliblip.runtime.arguments import check_range, option
from aliblip.runtime.mistakes import UsageError

__all__ = ["MERGED", "PrepareArguments", "PrepareDataArguments", "names_of", "shares_of"]

# What `--merge_duplicates` takes.
MERGED = ("exact", "near", "titles")


@dataclass
class PrepareDataArguments(DataArguments):
    split_names: str | None = option(
        None, "Splits of the data to read, separated by commas (default: train; or those of the files that are given)."
    )
    train_file: str | None = option(None, "Instead of a data set: a file or glob of the split train.")
    validation_file: str | None = option(None, "The same of the split validation.")
    test_file: str | None = option(None, "The same of the split test.")


@dataclass
class PrepareArguments(TokenizerArguments):
    """What is made of the data."""

    output_dir: str | None = option(None, "Folder of the prepared catalogue (required).")
    overwrite_output_dir: bool = option(False, "Replace a prepared catalogue, or the beginning of another one.")
    max_side: int | None = option(None, "Make photos smaller that have a longer side in pixels, such as 512.")
    quality: int = option(90, "JPEG quality of photos that are made smaller.")
    clean_titles: bool = option(
        False, "Take HTML, entities, zero-width characters and broken encodings (mojibake) out of the titles."
    )
    near_duplicates: bool = option(True, "Look for photos that are nearly the same, and not only for equal files.")
    duplicate_similarity: float = option(
        0.9, "From which similarity on two photos are near duplicates: 1 is the same picture."
    )
    merge_duplicates: str | None = option(
        None,
        "Make one product of what is equal: exact (equal photo files), near (near duplicates, too), titles (equal "
        "titles); several with commas (default: nothing is merged).",
    )
    split_by: str = option(
        "files",
        "files: as the data is split. product: drawn, by product. column: as a column says. time: the newest products "
        "are held out. No product and no duplicate stands on two sides.",
        choices=["files", "product", "column", "time"],
    )
    split_column: str | None = option(None, "Column of the split's name, or of the time.")
    split_shares: str = option(
        "validation=0.05,test=0.05", "Shares of the rows that product and time hold out, separated by commas."
    )
    leaks: str = option(
        "reject",
        "Where the data's own splits share a product or a duplicate: reject the rows that would leak into an earlier "
        "split (test stays whole), or move all to train.",
        choices=["reject", "train"],
    )
    seed: int = option(0, "Of the draw of splits.")
    for_ranks: int = option(8, "Processes that will read the shards; the number of shards is a multiple of it.")
    for_workers: int = option(2, "Reading workers of each of them, likewise.")
    shard_mb: int = option(256, "About how many megabytes of photos a shard has.")
    fetch_rate: float = option(10.0, "Photos fetched each second, of all workers together.")
    fetch_seconds: float = option(30.0, "Seconds until a photo must be there, from first to last.")
    fetch_mb: float = option(20.0, "Megabytes that a fetched photo may have.")
    fetch_private: bool = option(False, "Fetch from addresses of this machine and of private networks, too.")
    tokenizer_name: str | None = option(
        None, "Tokenizer of the data card's title lengths: folder, vocab.txt or Hub name (default: words are counted)."
    )
    max_length: int = option(35, "Tokens after which titles are cut off, for what is told of them.")
    workers: int | None = option(None, "Processes that prepare (default: one for each core).")
    rows_per_task: int = option(1000, "Rows of a task, which begins anew where the work was killed.")
    executor: str = option(
        "local",
        "Where the tasks run: on this machine, on Slurm, or on Ray; see docs/preparing.md.",
        choices=["local", "slurm", "ray"],
    )
    executor_options: str | None = option(
        None, 'Options of datatrove\'s executor as a JSON object: {"partition": "cpu", "time": "10:00:00"}.'
    )

    def check(self) -> None:
        """Raises UsageError for what can be seen without opening anything."""
        if self.output_dir is None:
            raise UsageError("--output_dir is missing: give the folder of the prepared catalogue; see --help")
        check_range(
            max_side=(self.max_side, 16, None),
            quality=(self.quality, 1, 100),
            duplicate_similarity=(self.duplicate_similarity, 0.5, 1.0),
            for_ranks=(self.for_ranks, 1, None),
            for_workers=(self.for_workers, 1, None),
            shard_mb=(self.shard_mb, 1, None),
            fetch_rate=(self.fetch_rate, 0.001, None),
            fetch_seconds=(self.fetch_seconds, 0.001, None),
            fetch_mb=(self.fetch_mb, 0.001, None),
            max_length=(self.max_length, 3, None),
            tokenizer_vocab_size=(self.tokenizer_vocab_size, SMALLEST_VOCABULARY, None),
            tokenizer_titles=(self.tokenizer_titles, 1, None),
            workers=(self.workers, 1, None),
            rows_per_task=(self.rows_per_task, 1, None),
        )
        if unknown := [name for name in self.merged if name not in MERGED]:
            raise UsageError(f"--merge_duplicates is '{unknown[0]}': accepted are {', '.join(MERGED)}")
        if "near" in self.merged and not self.near_duplicates:
            raise UsageError("--merge_duplicates near needs near duplicates: leave --near_duplicates as it is")
        if self.split_by in ("column", "time") and self.split_column is None:
            raise UsageError(f"--split_by {self.split_by} needs a column: name it with --split_column")
        if self.split_by in ("product", "time"):
            shares_of(self.split_shares)

    @property
    def merged(self) -> tuple[str, ...]:
        """What is merged."""
        return tuple(names_of(self.merge_duplicates))


def names_of(text: str | None) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def shares_of(text: str) -> dict[str, float]:
    """The shares of the splits that are held out.

    Raises:
        UsageError: it is not written as `validation=0.05,test=0.05`, or no rows are left for train.
    """
    shares: dict[str, float] = {}
    for part in names_of(text):
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError:
            raise UsageError(f"--split_shares is '{text}': write it as validation=0.05,test=0.05") from None
    if not shares or "train" in shares or any(not 0 < share < 1 for share in shares.values()):
        raise UsageError(f"--split_shares is '{text}': give shares between 0 and 1 of the splits that are held out")
    if sum(shares.values()) >= 1:
        raise UsageError(f"--split_shares is '{text}': together they leave nothing for train")
    return shares
