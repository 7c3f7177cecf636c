"""Prepare a catalogue once: from what people have to Parquet shards with photos, checked, without leaks, described.

    python -m aliblip.prepare --data_dir my_catalogue --output_dir prepared --max_side 512 \\
        --split_by product --merge_duplicates exact,near --train_tokenizer
    python train.py --config_name base --data_dir prepared --tokenizer_name prepared/tokenizer --output_dir outputs/mine

Every form of data that training reads will do: CSV and JSON with paths or addresses, image folders, tars, Parquet, and
exports of shops. Each photo is decoded once; a row that can't be used goes to rejected.parquet with its reason. Work
that was killed goes on when the same command is typed again, and its result is equal to the last byte, with any number
of --workers. See docs/preparing.md.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aliblip.data.prepare_arguments import PrepareArguments, PrepareDataArguments, names_of
from aliblip.data.products import tell_sources
from aliblip.data.sources import require_usable_row
from aliblip.data.splits import TRAIN
from aliblip.models.loading import build_processor
from aliblip.runtime.arguments import parse
from aliblip.runtime.files import read_json
from aliblip.runtime.forms import Each, check_form
from aliblip.runtime.installation import install_hint
from aliblip.runtime.mistakes import UsageError, main_with_usage_errors, usage_errors
from aliblip.training.tokenizer import check_trained_tokenizer, learn_tokenizer, save_trained_tokenizer

if TYPE_CHECKING:
    from aliblip.data.prepare_run import Preparation

# Of the extra, what the command can't do without.
NEEDED = ("datatrove", "ftfy", "threadpoolctl")
TOKENIZER = "tokenizer"  # folder in the catalogue


def check_installed() -> None:
    """Raises UsageError without the extra `prepare`."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UsageError(f"preparing needs {', '.join(missing)}: {install_hint('prepare')}")


def inputs_of(data: PrepareDataArguments) -> dict[str, dict[str, Any]]:
    """By split, the arguments of `open_source`.

    Raises:
        UsageError: no data is given.
    """
    common = {
        "dataset_name": data.dataset_name,
        "dataset_config_name": data.dataset_config_name,
        "data_dir": data.data_dir,
        "image_dir": data.image_dir,
        "image_column": data.image_column,
        "caption_column": data.caption_column,
        "product_id_column": data.product_id_column,
        "fetch_photos": data.fetch_photos,
        "reading": data.reading,
    }
    files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    given = {split: file for split, file in files.items() if file is not None}
    names = names_of(data.split_names)
    if given and names:
        raise UsageError("--split_names and files are both given: the files say which splits there are")
    if not given and not names and data.dataset_name is None and data.data_dir is None:
        raise UsageError("no data given: set --dataset_name, --data_dir or --train_file; see --help")
    if given:
        return {split: common | {"data_files": file} for split, file in given.items()}
    return {split: common | {"any_split": len(names) < 2} for split in names or ["train"]}


def main(argv: Sequence[str] | None = None) -> int:
    data, args = parse([PrepareDataArguments, PrepareArguments], argv, description=__doc__)
    args.check()
    check_installed()
    return prepare(data, args)


def prepare(data: PrepareDataArguments, args: PrepareArguments) -> int:
    """Do what the flags say. Returns the exit code.

    Raises:
        UsageError: something that the user gave is wrong.
    """
    from aliblip.data.prepare_executors import check_executor
    from aliblip.data.prepare_run import PREPARED, Preparation
    from aliblip.data.prepare_tasks import Inputs
    from aliblip.retrieval.data_card import write_data_card

    check_executor(args)
    check_trained_tokenizer(args, "tokenizer_name")
    inputs = Inputs(inputs_of(data))
    named = None if args.tokenizer_name is None else build_processor(args.tokenizer_name).tokenizer

    def add(work: Preparation, folder: Path) -> None:
        tokenizer = learned(work, folder / TOKENIZER) if args.train_tokenizer else named
        write_data_card(work, folder, None if tokenizer is None else partial(tokens_of, tokenizer))

    work = Preparation(inputs, args, add)
    if not work.is_done():
        work.check()
        tell_sources(*inputs.sources())
        for name, source in zip(inputs.names(), inputs.sources(), strict=True):
            if source.split != name:
                print(
                    f"{source.name} has one split, '{source.split}': it is prepared as '{name}' "
                    f"(--split_names {source.split} keeps its name)"
                )
        if not data.fetch_photos:
            for source in inputs.sources():
                require_usable_row(source)
        if not work.run():
            print(f"tasks were submitted: type the same command again when they have ended (logs: {work.work}/logs)")
            return 0
        for line in work.decided.told if work.decided is not None else ():
            print(line)
    else:
        print(f"{work.output_dir} is prepared already, from this data and with these flags")
    print("\n".join(summary(counts_of(Path(work.output_dir) / PREPARED))))
    print(f"written: {work.output_dir}")
    tokenizer = work.output_dir / TOKENIZER if args.train_tokenizer else args.tokenizer_name
    print(f"next: {next_command(work.output_dir, tokenizer)}")
    return 0


# Of `Preparation.counts`, as prepared.json keeps them.
COUNTS = {
    **{"rows": Each(int), "products": Each(int), "rejected": int, "exact_duplicates": int, "near_duplicates": int},
    **{"bytes_before": int, "bytes_after": int},
}


def counts_of(file: Path) -> dict[str, Any]:
    """The counts in a prepared.json.

    Raises:
        UsageError: it is damaged, or not what prepare writes.
    """
    told = f"{file} is not what prepare writes ({{}}): give another --output_dir"
    with usage_errors(OSError, ValueError, told=told):
        prepared = read_json(file)
    check_form(prepared, {"counts": COUNTS}, told)
    return prepared["counts"]


def learned(work: Preparation, folder: Path) -> Any:
    """Learn a tokenizer from the titles that are prepared to train on, and keep it in a folder.

    Raises:
        UsageError: there are none, or it can't be written.
    """
    from aliblip.data.prepare_card import captions

    sides, args = work.decided.sides, work.args
    # Without a split of that name all are.
    chosen = sides.side == sides.names.index(TRAIN) if TRAIN in sides.names else sides.side >= 0
    titles = (title for texts, _ in captions(work, chosen) for title in texts)
    tokenizer = learn_tokenizer(args, titles, str(work.output_dir), int(chosen.sum()), args.max_length, print)
    save_trained_tokenizer(tokenizer, folder)
    return tokenizer


def tokens_of(tokenizer: Any, titles: list[str]) -> list[list[int]]:
    """The token ids of titles, uncut."""
    return tokenizer(titles, truncation=False, verbose=False)["input_ids"]


def next_command(prepared: Path, tokenizer: Path | str | None) -> str:
    """What trains on the catalogue."""
    named = "" if tokenizer is None else f" --tokenizer_name {shlex.quote(str(tokenizer))}"
    data = shlex.quote(str(prepared))
    return f"python train.py --config_name base --data_dir {data}{named} --output_dir outputs/mine"


def summary(counts: dict[str, Any]) -> list[str]:
    """What came of it, a line each."""
    lines = [
        f"{split}: {rows:,} rows, {counts['products'].get(split, 0):,} products"
        for split, rows in counts["rows"].items()
    ]
    lines.append(f"rejected: {counts['rejected']:,} rows (rejected.parquet)")
    near, exact = counts["near_duplicates"], counts["exact_duplicates"]
    lines.append(f"duplicates: {exact:,} photos equal to an earlier one, {near:,} pairs nearly equal")
    before, after = counts["bytes_before"], counts["bytes_after"]
    saved = f", {1 - after / before:.0%} saved" if after < before else ""
    lines.append(f"photos: {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after{saved}")
    return lines


if __name__ == "__main__":
    main_with_usage_errors("aliblip.prepare", main)
