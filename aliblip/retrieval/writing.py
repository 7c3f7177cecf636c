"""What `evaluate_retrieval.py` prints and writes after the work, and its check of an answer file.

    code = write(retrieval, results, setup)        # main process only
    code = verify(data, options)

The results come first. What is asked for beside them (--submission, --contact_sheet, --report, --compare) may fail for
a reason that the user can change; the others are written all the same.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from aliblip.retrieval.arguments import EvaluationArguments, EvaluationDataArguments
from aliblip.retrieval.compare import compare, format_comparison
from aliblip.retrieval.model_folder import CHECKPOINT_STATE
from aliblip.retrieval.pages import draw_contact_sheet, write_report
from aliblip.retrieval.rankings import Retrieval
from aliblip.retrieval.results import COMPARISON, EVALUATIONS, format_table, write_results
from aliblip.retrieval.setup import Setup, names_of_photos, open_data, open_titles, rows_of
from aliblip.retrieval.submission import LONGEST_LIST, submission_rows, verify_submission, write_submission
from aliblip.runtime.distributed import launched_rank
from aliblip.runtime.files import read_json, write_json
from aliblip.runtime.mistakes import UsageError, usage_errors


def write(retrieval: Retrieval, results: dict, setup: Setup) -> int:
    """Print and write everything that was asked for. Main process only.

    Returns:
        The exit code: 1 if something beside the results could not be written, which is told.
    """
    options, output_dir = setup.options, setup.output_dir
    print(format_table(results))
    print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in retrieval.seconds.items()))
    if retrieval.skipped:
        print(f"{len(retrieval.skipped)} unusable rows were left out: {output_dir / 'skipped.jsonl'}")
    told = (
        f"the results can't be written into {output_dir} ({{}}): make room, and type the same command again; it goes on"
    )
    with usage_errors(OSError, told=told):
        written = write_results(output_dir, retrieval, results)
    print(f"written: {written[0]}" + "".join(f", {path.name}" for path in written[1:]))
    if setup.weights is not None and "mean_recall" in results:
        _keep_beside_the_model(results, output_dir, Path(options.model_name_or_path))
    heading = f"{Path(options.model_name_or_path).name} on {results['dataset']}, {results['split']}"
    rows = rows_of(options)
    # Of --compare the path is that of the other run.
    writers: dict[str, Callable[[Path], Path]] = {
        "submission": lambda path: _write_submission(path, retrieval, setup),
        "contact_sheet": lambda path: draw_contact_sheet(path, retrieval, setup.photos, heading, rows, options.seed),
        "report": lambda path: write_report(path, retrieval, setup.photos, results, heading),
        "compare": lambda other: _write_comparison(written[0], other),
    }
    failed = []
    for flag, writer in writers.items():
        if path := getattr(options, flag):
            try:
                print(f"written: {writer(Path(path))}")
            except (OSError, UsageError) as error:
                failed.append(f"--{flag} {path}: {error}")
    for message in failed:
        print(f"evaluate_retrieval.py: error: {message}", file=sys.stderr)
    return 1 if failed else 0


def _keep_beside_the_model(results: dict, output_dir: Path, folder: Path) -> None:
    """The numbers go where the model goes: its card is made from them."""
    if output_dir.resolve() in (folder.resolve(), (folder / "evaluation").resolve()):
        return
    digest = hashlib.blake2b(f"{results['dataset']}\n{results['split']}".encode(), digest_size=6).hexdigest()
    copy = folder / EVALUATIONS / f"{digest}.json"
    try:
        copy.parent.mkdir(exist_ok=True)
        write_json(copy, results)
        print(f"written: {copy}, for the model's card")
    except OSError as error:
        print(f"the results can't be kept beside the model for its card ({error.strerror})")


def store_with_the_model(what: str, values: dict[str, float], otherwise: str, options: EvaluationArguments) -> None:
    """Make tuned numbers those of the model, for the pipeline, the page and later evaluations; what comes of it is
    printed.

    Args:
        what: the numbers in a word, for messages.
        values: fields of the configuration.
        otherwise: what to do where they can't be stored.
    """
    config = Path(options.model_name_or_path) / "config.json"
    why = None
    if not config.is_file():
        why = "a model from the Hub"
    elif options.image_size is not None:
        why = "at another --image_size"
    elif config.with_name(CHECKPOINT_STATE).exists():
        why = "a checkpoint, whose files have checksums for the run that goes on from it"
    if why is not None:
        print(f"{what} is not stored with the model ({why}): {otherwise}")
        return
    try:
        write_json(config, {**read_json(config), **values})
        print(f"stored as the model's {' and '.join(values)} in {config}")
    except OSError as error:
        print(f"{what} can't be stored in {config} ({error.strerror}): {otherwise}")


def _write_comparison(here: Path, other: Path) -> Path:
    compared = compare(here, other)
    print(format_comparison(compared))
    write_json(here.with_name(COMPARISON), compared)
    return here.with_name(COMPARISON)


def _write_submission(path: Path, retrieval: Retrieval, setup: Setup) -> Path:
    captions, titles = _captions(setup.data), retrieval.titles
    found = retrieval.text_to_image.rankings.ids[:, :LONGEST_LIST]
    # Some titles can't be searched for, but the file has an entry for every title.
    ids = torch.arange(found.shape[1]).repeat(len(captions), 1)
    ids[titles.rows] = found
    if len(titles) < len(captions):
        missing = len(captions) - len(titles)
        print(
            f"{missing} titles could not be searched for (they or, in a table, their photo can't be used): the first "
            f"{found.shape[1]} photos stand for them"
        )
    rows = submission_rows(captions, retrieval.images.names, ids)
    return write_submission(path, rows, setup.options.submission_stringified)


def _captions(data: EvaluationDataArguments) -> list[str]:
    """All titles as the data has them, unusable ones too."""
    source = open_titles(data)
    return [row.text if isinstance(row.text, str) else "" for row in source.read_range(0, source.num_rows)]


def verify(data: EvaluationDataArguments, options: EvaluationArguments) -> int:
    """Check an answer file against the data, and say what is wrong with it.

    Returns:
        The exit code: 1 if something is wrong.
    """
    photos, _ = open_data(data)
    names = names_of_photos(photos)
    captions = _captions(data)
    problems = verify_submission(options.verify_submission, captions, names)
    if launched_rank() == 0:
        for problem in problems:
            print(problem)
        verdict = "is not right" if problems else f"is right: {len(captions)} titles, {len(names)} photos"
        print(f"{options.verify_submission} {verdict}")
    return 1 if problems else 0


__all__ = ["store_with_the_model", "verify", "write"]
