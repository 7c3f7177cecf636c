"""Measure how well an AliBLIP model finds the photo of a title and the title of a photo, or search without the answers.

    python evaluate_retrieval.py --model_name_or_path outputs/demo/best --data_dir demo/catalogue

on several processes, with the same numbers:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml evaluate_retrieval.py \\
        --model_name_or_path outputs/demo/best --data_dir demo/catalogue

Photos and titles of their own, without right answers, and the competition's answer file:

    python evaluate_retrieval.py --model_name_or_path MODEL --gallery test_photos --queries test_captions.json \\
        --output_dir outputs/test --submission outputs/test/submission.json

What it does: every photo and title is embedded and searched exactly (ITC); the --k_rerank best of both directions are
then scored pair by pair (ITM; score = match logit + ITC similarity), and what was not re-ranked follows in ITC order.
Rows with the same --product_id_column are right answers to each other; without one, each title has one right photo.
A start that was killed goes on where it was: type the same command again.

What it gives: a table, and in OUTPUT_DIR results.json, the rankings of every query as Parquet, and skipped.jsonl with
the rows that could not be read. --report makes a page of it, --contact_sheet a picture, --dry_run tells the memory and
time it will take. A recipe of flags: --config recipe.yaml. All flags: --help.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from aliblip.data.collate import Collator, printable
from aliblip.data.loader import EvalLoader
from aliblip.data.products import tell_sources
from aliblip.data.sources import Source, open_source, require_usable_row
from aliblip.retrieval.arguments import EvaluationArguments, EvaluationDataArguments
from aliblip.retrieval.evaluation import (
    ALL,
    DEFAULT_K_RERANK,
    check_k_rerank,
    parse_k_rerank,
    retrieve,
    seconds_by_depth,
)
from aliblip.retrieval.pages import draw_contact_sheet, write_report
from aliblip.retrieval.plan import expected_time, make_plan
from aliblip.retrieval.rankings import Retrieval, tune_fusion
from aliblip.retrieval.results import (
    COMPARISON,
    MATRIX,
    TITLE_SLICES,
    check_comparable,
    check_results_of_others,
    compare,
    format_comparison,
    format_table,
    measure,
    write_results,
)
from aliblip.retrieval.submission import submission_rows, verify_submission, write_submission
from aliblip.runtime.accelerator import build_accelerator, end, launched_precision
from aliblip.runtime.arguments import check_range, parse
from aliblip.runtime.distributed import all_gather_objects, launched_rank
from aliblip.runtime.files import write_json
from aliblip.runtime.mistakes import UsageError, main_with_usage_errors
from aliblip.runtime.parts import Parts
from encoder_aliblip import fingerprint
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor
from retrieval_aliblip import MemoryPlan, size_text

SUBMITTED = 10


def main() -> int:
    # Mistakes first: all of this is quick and happens before the processes are joined.
    data, options = parse((EvaluationDataArguments, EvaluationArguments), description=__doc__)
    set_up_logging()
    try:
        check(options, data)
        if options.verify_submission:
            return verify(options, data)
        output_dir = check_output(options)
        depths = parse_k_rerank(options.k_rerank)
        photos, titles = open_data(data, slices_of(options))
        check_k_rerank(depths, photos.num_rows)
        for source in {id(source): source for source in (photos, titles)}.values():
            require_usable_row(source)
        tell_sources(photos, titles)
        tuned_on = open_tuning_data(data, options) if options.tune_fusion else None
        if tuned_on is not None and tuned_on.manifest()["files"] == photos.manifest()["files"]:
            raise UsageError(f"--tune_fusion {options.tune_fusion} are the rows that are measured: name another split")
        has_truth = titles is photos or None not in (photos.selected.product_id, titles.selected.product_id)
        check_wishes(options, output_dir, photos, titles, has_truth)
        model, processor = load(options)
        names = {"model_name": options.model_name_or_path, "dataset_name": photos.name, "split": photos.split}
        if titles is not photos:
            names["dataset_name"] += f" for {titles.name}"
        if not options.overwrite_output_dir:
            check_results_of_others(output_dir, *names.values())
        precision = launched_precision(options.mixed_precision)
        depends_on = {
            "model": fingerprint(model, processor),
            "type of the weights": str(model.dtype).removeprefix("torch."),
            "photo size": processor.image_size,
            "longest title": processor.max_length,
            "rows of a unit": options.per_device_eval_batch_size,
            "mixed precision": precision,
            "folder of the photos": data.image_dir and os.path.abspath(data.image_dir),
        }
        parts = Parts(output_dir / "parts", depends_on | {"photos": described(photos), "titles": described(titles)})
        if not options.overwrite_output_dir:
            parts.check()
        plan = tell_plan(model, processor, photos, titles, depths, options, output_dir)
        if options.dry_run:
            return 0
        accelerator = build_accelerator(
            mixed_precision=options.mixed_precision,
            max_grad_norm=0.0,  # nothing is trained here
            per_device_train_batch_size=options.per_device_eval_batch_size,
            timeout=timedelta(days=1),  # after a resume one process may have all the work that was left
        )
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error

    def loader(source: Source) -> EvalLoader:
        return EvalLoader(
            source,
            Collator(processor, sides=source.sides, describe=True),
            unit_size=options.per_device_eval_batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=data.dataloader_num_workers,
        )

    model.to(accelerator.device)
    if options.overwrite_output_dir and accelerator.is_main_process:
        try:
            parts.check()
        except ValueError:
            parts.remove()
    batch_tokens = options.rerank_batch_tokens
    if batch_tokens is None:
        # What is computed together has to be the same on all ranks, and in a second start with other free memory.
        batch_tokens = parts.settle("rerank_batch_tokens", min(all_gather_objects(plan.rerank_batch_tokens)))
    common = {
        "score": options.score,
        "dtype": torch.bfloat16 if accelerator.mixed_precision == "bf16" else None,
        "rerank_batch_tokens": batch_tokens,
        "image_token_memory_gb": plan.images_kept * (plan.image_tokens / plan.num_images) / 1e9,
        "progress": sys.stderr.isatty(),
    }
    weight, recall_by_weight = 1.0 if options.fusion_weight is None else options.fusion_weight, None
    if tuned_on is not None:
        tuning = Parts(parts.folder / "tuning", depends_on | {"photos": described(tuned_on)})
        if accelerator.is_main_process:
            try:
                tuning.check()
            except ValueError:
                tuning.remove()  # of an earlier start on another split
        weight, recall_by_weight = tune_fusion(
            retrieve(model, loader(tuned_on), k_rerank=depths, parts=tuning, **common)
        )
        if accelerator.is_main_process:
            print(
                f"fusion weight {weight:g}, chosen on {tuned_on.name}, {tuned_on.split}: mean recall "
                f"{100 * recall_by_weight[weight]:.2f} there, {100 * recall_by_weight[1.0]:.2f} with weight 1"
            )
    start = time.perf_counter()
    retrieval = retrieve(
        model,
        loader(photos),
        queries=loader(titles) if titles is not photos else None,
        has_truth=has_truth,
        k_rerank=depths,
        fusion_weight=weight,
        list_at_least=SUBMITTED if options.submission else 0,
        parts=parts,
        **common,
    )
    problems = 0
    if accelerator.is_main_process:
        results = measure(
            retrieval,
            **names,
            intervals=True,
            slices=slices_of(options),
            seconds_of_depth=seconds_by_depth(model.config, retrieval),
        )
        if recall_by_weight is not None:
            results["fusion_weight_tuned_on"] = {
                "dataset": tuned_on.name,
                "split": tuned_on.split,
                "mean_recall": {f"{tried:g}": recall for tried, recall in recall_by_weight.items()},
            }
        results["run"]["seconds"] = round(time.perf_counter() - start, 3)
        problems = finish(retrieval, results, photos, data, options, output_dir)
        if not problems:  # otherwise the next start has only to do what failed
            parts.remove()
    end(accelerator)
    return problems


def set_up_logging() -> None:
    # by the launcher's variable: the processes are not joined yet
    is_first = launched_rank() == 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("aliblip").setLevel(logging.INFO if is_first else logging.ERROR)
    if not is_first:
        disable_progress_bar()


# --- before the work --------------------------------------------------------------------------------------------------


def check(options: EvaluationArguments, data: EvaluationDataArguments) -> None:
    """Check what the flags say by themselves."""
    check_range(
        per_device_eval_batch_size=(options.per_device_eval_batch_size, 1, None),
        dataloader_num_workers=(data.dataloader_num_workers, 0, None),
        image_size=(options.image_size, 1, None),
        rerank_batch_tokens=(options.rerank_batch_tokens, 1, None),
        image_token_memory_gb=(options.image_token_memory_gb, 0, None),
        fusion_weight=(options.fusion_weight, 0, None),
    )
    if (data.gallery is None) != (data.queries is None):
        missing, given = ("queries", "gallery") if data.queries is None else ("gallery", "queries")
        raise UsageError(f"--{given} without --{missing}: give both, or a table of photos and titles instead")
    if data.gallery is not None and (data.dataset_name or data.data_dir or data.data_files):
        raise UsageError("--gallery and --queries take the place of --dataset_name, --data_dir and --data_files")
    exhaustive = ALL in (parse_k_rerank(options.k_rerank) or ())
    if options.score != "fused" and options.fusion_weight is not None:
        raise UsageError(f"--fusion_weight has no part in --score {options.score}: leave one of them out")
    if options.score == "itc" and exhaustive:
        raise UsageError("--score itc re-ranks nothing: leave out --k_rerank all")
    if options.tune_fusion:
        if data.gallery is not None:
            raise UsageError("--tune_fusion needs right answers: tune on a table, then give its --fusion_weight here")
        if options.tune_fusion == (data.split_name if data.data_files is None else data.data_files):
            raise UsageError(
                f"--tune_fusion is {options.tune_fusion}, which is measured: a weight chosen on the same rows makes "
                "the result too good; name another split"
            )
        if options.fusion_weight is not None or options.score != "fused":
            raise UsageError(
                "--tune_fusion chooses the weight of the fused score: leave --fusion_weight and --score out"
            )
        if exhaustive:
            raise UsageError("--tune_fusion with --k_rerank all: tune with a number, then give its --fusion_weight")
    for flag, endings in (("contact_sheet", (".png", ".jpg", ".jpeg")), ("report", (".html", ".htm"))):
        given = getattr(options, flag)
        if given and Path(given).suffix.lower() not in endings:
            raise UsageError(f"--{flag} is {given}: give a file name that ends in {' or '.join(endings[:2])}")
    rows_of(options)


def rows_of(options: EvaluationArguments) -> list[int] | None:
    if options.contact_sheet_rows is None:
        return None
    parts = [part.strip() for part in options.contact_sheet_rows.split(",")]
    if not options.contact_sheet or not all(part.isdecimal() for part in parts):
        raise UsageError(
            f"--contact_sheet_rows is {options.contact_sheet_rows}: give row numbers, 3,17, and --contact_sheet"
        )
    return [int(part) for part in parts]


def slices_of(options: EvaluationArguments) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in (options.slices or "").split(",") if part.strip()))


def check_output(options: EvaluationArguments) -> Path:
    """Check the model's name and the output folder, and return the folder."""
    if not options.model_name_or_path:
        raise UsageError("--model_name_or_path is missing: give the folder or Hub name of a model")
    is_local = os.path.isdir(options.model_name_or_path)
    if not is_local and (
        options.model_name_or_path.startswith((".", "/", "~")) or options.model_name_or_path.count("/") > 1
    ):
        raise UsageError(f"the model folder {options.model_name_or_path} does not exist: give a folder or a Hub name")
    if options.output_dir is None and not is_local:
        raise UsageError("--output_dir is missing: a model from the Hub has no folder for results.json")
    output_dir = Path(options.output_dir or Path(options.model_name_or_path) / "evaluation")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"can't write to the output folder {output_dir}: {error.strerror}") from error
    if not os.access(output_dir, os.W_OK):
        raise UsageError(f"can't write to the output folder {output_dir}: give another --output_dir")
    return output_dir


def check_wishes(
    options: EvaluationArguments, output_dir: Path, photos: Source, titles: Source, has_truth: bool
) -> None:
    """Check what is asked for beside the results, all of which is made after the work."""
    if not has_truth and (options.compare or options.slices):
        flag = "compare" if options.compare else "slices"
        raise UsageError(f"--{flag} needs right answers: give photos and titles a --product_id_column, or leave it out")
    if options.compare:
        if Path(options.compare).resolve().parent == output_dir.resolve():
            raise UsageError(f"--compare {options.compare} would be written over: give another --output_dir")
        check_comparable(Path(options.compare))
    missing = [row for row in rows_of(options) or () if row >= titles.num_rows]
    if missing:
        raise UsageError(f"--contact_sheet_rows has {missing[0]}: the rows are 0 to {titles.num_rows - 1}")
    for flag in ("submission", "contact_sheet", "report"):
        if path := getattr(options, flag):
            folder = Path(path).parent
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"--{flag}: can't write to {folder}: {error.strerror}") from error
            if not os.access(folder, os.W_OK) or os.path.isdir(path):
                raise UsageError(f"--{flag}: can't write {path}: give another path")
    if options.submission and photos.random_access:  # the names are all that is read there
        names = [row.name for row in photos.read_range(0, photos.num_rows)]
        submission_rows([], names, torch.empty(0))


def open_data(data: EvaluationDataArguments, slices: tuple[str, ...] = ()) -> tuple[Source, Source]:
    """Photos and titles: one table, the same object twice, or --gallery and --queries."""
    columns = tuple(name for name in slices if name not in TITLE_SLICES)
    if data.gallery is None:
        table = open_table(data, split=data.split_name, data_files=data.data_files, other_columns=columns)
        return table, table
    photos = open_side(data, data.gallery, "images")
    titles = open_side(data, data.queries, "titles", other_columns=columns)
    return photos, titles


def open_table(data: EvaluationDataArguments, *, split: str, data_files: str | None, **options) -> Source:
    return open_source(
        dataset_name=data.dataset_name,
        dataset_config_name=data.dataset_config_name,
        data_dir=data.data_dir,
        data_files=data_files,
        image_dir=data.image_dir,
        split=split,
        image_column=data.image_column,
        caption_column=data.caption_column,
        product_id_column=data.product_id_column,
        reading=data.reading,
        **options,
    )


def open_side(data: EvaluationDataArguments, given: str, sides: str, **options) -> Source:
    """--gallery or --queries: a folder, files, or a name on the Hub."""
    is_file = os.path.isfile(given) or "://" in given or any(sign in given for sign in "*?[")
    # A name on the Hub is "user/name"; anything with an ending was meant to be a file.
    if not is_file and not os.path.isdir(given) and (os.path.splitext(given)[1] or given.startswith((".", "/"))):
        raise UsageError(f"{given} does not exist: give a folder, a file, or a data set on the Hub")
    where = "data_files" if is_file else "data_dir" if os.path.isdir(given) else "dataset_name"
    places = {"dataset_name": None, "data_dir": None, "data_files": None} | {where: given}
    data = dataclasses.replace(data, **{key: places[key] for key in ("dataset_name", "data_dir")})
    return open_table(
        data, split=data.split_name, data_files=places["data_files"], sides=sides, any_split=True, **options
    )


def open_tuning_data(data: EvaluationDataArguments, options: EvaluationArguments) -> Source:
    if data.data_files is not None:
        source = open_table(data, split=data.split_name, data_files=options.tune_fusion)
    else:
        source = open_table(data, split=options.tune_fusion, data_files=None)
    check_k_rerank(parse_k_rerank(options.k_rerank), source.num_rows)
    require_usable_row(source)
    return source


def load(options: EvaluationArguments) -> tuple[AliBlipForImageTextRetrieval, AliBlipProcessor]:
    try:
        model = AliBlipForImageTextRetrieval.from_pretrained(options.model_name_or_path)
        processor = AliBlipProcessor.from_pretrained(options.model_name_or_path)
    except OSError as error:  # what transformers raises for a missing file or Hub name, over several lines
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"can't load the model {options.model_name_or_path}: {reason}") from error
    if options.image_size is not None:
        model.resize_image(options.image_size)
    size = model.config.vision_config.image_size
    processor.image_processor.size = {"height": size, "width": size}
    return model, processor


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def described(source: Source) -> str:
    """What the rows of a source are, columns for slices included: they are kept with the embeddings."""
    content = json.dumps([source.manifest(), source.selected.others], sort_keys=True)
    return f"{source.name}, {source.split} ({source.num_rows} rows, {digest(content)})"


def tell_plan(
    model, processor, photos: Source, titles: Source, depths, options: EvaluationArguments, output_dir: Path
) -> MemoryPlan:
    """Print memory and work, and check that the disk has room for what is asked for."""
    asked = depths or [min(DEFAULT_K_RERANK, photos.num_rows)]
    depth = photos.num_rows if ALL in asked else max(asked)
    plan = make_plan(
        model,
        processor,
        photos.num_rows,
        titles,
        0 if options.score == "itc" else depth,
        both_directions=titles is photos,
        dtype=torch.bfloat16 if launched_precision(options.mixed_precision) == "bf16" else None,
        rerank_batch_tokens=options.rerank_batch_tokens,
        image_token_memory_gb=options.image_token_memory_gb,
    )
    size = photos.num_rows * titles.num_rows * 4 if ALL in asked else 0
    there = output_dir / "parts" / MATRIX  # from an earlier start, its space is taken already
    wanted = size - (there.stat().st_size if there.is_file() else 0)
    if (free := shutil.disk_usage(output_dir).free) < wanted:
        raise UsageError(
            f"--k_rerank all writes {size_text(wanted)}, {size_text(free)} are free in {output_dir}: "
            "give another --output_dir, or a number"
        )
    if launched_rank() == 0:
        print(plan)
        if size:
            print(f"  match logits of all pairs: {size_text(size)} on disk")
        if options.dry_run:
            print(expected_time(plan))
    return plan


# --- after the work ---------------------------------------------------------------------------------------------------


def finish(
    retrieval: Retrieval,
    results: dict,
    photos: Source,
    data: EvaluationDataArguments,
    options: EvaluationArguments,
    output_dir: Path,
) -> int:
    """Print and write everything that was asked for; the exit code. The results come first: whatever fails later, they
    are there."""
    print(format_table(results))
    print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in retrieval.seconds.items()))
    if retrieval.skipped:
        print(f"{len(retrieval.skipped)} unusable rows were left out: {output_dir / 'skipped.jsonl'}")
    heading = f"{Path(options.model_name_or_path).name} on {results['dataset']}, {results['split']}"
    written = write_results(output_dir, retrieval, results)
    print(f"written: {written[0]}" + "".join(f", {path.name}" for path in written[1:]))
    failed = []
    for flag, write in (
        ("submission", lambda path: submit(path, retrieval, data, options)),
        (
            "contact_sheet",
            lambda path: draw_contact_sheet(path, retrieval, photos, heading, rows_of(options), options.seed),
        ),
        ("report", lambda path: write_report(path, retrieval, photos, results, heading)),
        ("compare", lambda path: write_comparison(written[0], path)),
    ):
        if path := getattr(options, flag):
            try:
                print(f"written: {write(Path(path))}")
            except (OSError, ValueError) as error:
                failed.append(f"--{flag} {path}: {error}")
    for message in failed:
        print(f"evaluate_retrieval.py: error: {message}", file=sys.stderr)
    return 1 if failed else 0


def write_comparison(here: Path, other: Path) -> Path:
    compared = compare(here, other)
    print(format_comparison(compared))
    write_json(here.with_name(COMPARISON), compared)
    return here.with_name(COMPARISON)


def captions_of(data: EvaluationDataArguments) -> list[str]:
    """All titles as the data has them, unusable ones too."""
    if data.queries is not None:
        source = open_side(data, data.queries, "titles")
    else:
        source = open_table(data, split=data.split_name, data_files=data.data_files, sides="titles")
    return [row.text if isinstance(row.text, str) else "" for row in source.read_range(0, source.num_rows)]


def submit(path: Path, retrieval: Retrieval, data: EvaluationDataArguments, options: EvaluationArguments) -> Path:
    captions, titles = captions_of(data), retrieval.titles
    found = retrieval.text_to_image.rankings.ids[:, :SUBMITTED]
    # Some titles can't be searched for, but the file has an entry for every title.
    ids = torch.arange(found.shape[1]).repeat(len(captions), 1)
    ids[titles.rows] = found
    if len(titles) < len(captions):
        missing = len(captions) - len(titles)
        print(
            f"{missing} titles could not be searched for (they or, in a table, their photo can't be used): the first "
            f"{found.shape[1]} photos stand for them"
        )
    return write_submission(
        path, submission_rows(captions, retrieval.images.names, ids), options.submission_stringified
    )


def verify(options: EvaluationArguments, data: EvaluationDataArguments) -> int:
    """Check an answer file against the data; exit code 1 if something is wrong."""
    photos, _ = open_data(data)
    names = [printable(row.name) for row in photos.read_range(0, photos.num_rows)]
    captions = captions_of(data)
    problems = verify_submission(options.verify_submission, captions, names)
    if launched_rank() == 0:
        for problem in problems:
            print(problem)
        verdict = "is not right" if problems else f"is right: {len(captions)} titles, {len(names)} photos"
        print(f"{options.verify_submission} {verdict}")
    return 1 if problems else 0


if __name__ == "__main__":
    main_with_usage_errors("evaluate_retrieval.py", main)
