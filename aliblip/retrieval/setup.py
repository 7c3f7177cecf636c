"""What `evaluate_retrieval.py` does before the work: checks, opens, plans. All of it before the processes meet.

    check_flags(data, options)
    setup = set_up(data, options)          # data and model opened, outputs checked, memory planned; nothing computed
    print(setup.plan)
    setup.begin(accelerator)               # from here on the processes work together

Whatever the user got wrong is a `UsageError` with one line.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from aliblip.data.collate import Collator, printable
from aliblip.data.loader import EvalLoader
from aliblip.data.products import content_id, tell_sources
from aliblip.data.sources import Source, open_source, require_usable_row
from aliblip.data.titles import look_at_titles, tell_cut_titles
from aliblip.retrieval.arguments import EvaluationArguments, EvaluationDataArguments
from aliblip.retrieval.compare import check_comparable
from aliblip.retrieval.evaluation import ALL, DEFAULT_K_RERANK, Depth, check_k_rerank, parse_k_rerank
from aliblip.retrieval.model_folder import load_folder
from aliblip.retrieval.plan import MemoryPlan, count_photos, expected_time, make_plan, size_text
from aliblip.retrieval.rankings import MATRIX
from aliblip.retrieval.results import TITLE_SLICES, check_results_of_others, split_told
from aliblip.retrieval.submission import submission_rows
from aliblip.runtime.accelerator import launched_precision
from aliblip.runtime.arguments import check_range
from aliblip.runtime.distributed import all_gather_objects, is_main, launched_rank, rank, world_size
from aliblip.runtime.files import check_place
from aliblip.runtime.mistakes import UsageError, usage_errors
from aliblip.runtime.owners import Owner, check_copies
from aliblip.runtime.parts import Parts
from aliblip.runtime.sameness import weights_of
from encoder_aliblip import fingerprint
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor


def set_up_logging() -> None:
    """Messages of ours to the terminal, from the first process alone."""
    # by the launcher's variable: the processes are not joined yet
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("aliblip").setLevel(logging.INFO if launched_rank() == 0 else logging.ERROR)


# --- what the flags say by themselves ---------------------------------------------------------------------------------


def check_flags(data: EvaluationDataArguments, options: EvaluationArguments) -> None:
    """Refuse flags that are out of range or contradict each other.

    Raises:
        UsageError: in one line, which flag, what is accepted, and what to do.
    """
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
    _check_tuning(data, options, exhaustive)
    for flag, endings in (("contact_sheet", (".png", ".jpg", ".jpeg")), ("report", (".html", ".htm"))):
        given = getattr(options, flag)
        if given and Path(given).suffix.lower() not in endings:
            raise UsageError(f"--{flag} is {given}: give a file name that ends in {' or '.join(endings[:2])}")
    rows_of(options)


def _check_tuning(data: EvaluationDataArguments, options: EvaluationArguments, exhaustive: bool) -> None:
    if not options.tuning_flags:
        return
    flag = f"--{options.tuning_flags[0]}"
    if data.gallery is not None:
        raise UsageError(f"{flag} needs right answers: tune on a table, which stores it with the model")
    if options.tuning_split == (data.split_name if data.data_files is None else data.data_files):
        raise UsageError(
            f"{flag} is {options.tuning_split}, which is measured: what is chosen on the same rows makes the result "
            "too good; name another split"
        )
    if exhaustive:
        raise UsageError(f"{flag} with --k_rerank all: tune with a number first, which stores it with the model")
    if options.tune_fusion and (options.fusion_weight is not None or options.score != "fused"):
        raise UsageError("--tune_fusion chooses the weight of the fused score: leave --fusion_weight and --score out")
    if options.score == "itc":
        raise UsageError("--score itc re-ranks nothing: leave out --tune_probability")
    if options.tune_probability not in (None, options.tuning_split):
        raise UsageError(
            f"--tune_fusion is {options.tune_fusion} and --tune_probability {options.tune_probability}: name one split "
            "for both"
        )


def rows_of(options: EvaluationArguments) -> list[int] | None:
    """The rows of --contact_sheet_rows; None without the flag."""
    if options.contact_sheet_rows is None:
        return None
    given = [number.strip() for number in options.contact_sheet_rows.split(",")]
    if not options.contact_sheet or not all(number.isdecimal() for number in given):
        raise UsageError(
            f"--contact_sheet_rows is {options.contact_sheet_rows}: give row numbers, 3,17, and --contact_sheet"
        )
    return [int(number) for number in given]


def slices_of(options: EvaluationArguments) -> tuple[str, ...]:
    """The names of --slices, each once."""
    names = [name.strip() for name in (options.slices or "").split(",")]
    return tuple(dict.fromkeys(name for name in names if name))


# --- data and model ---------------------------------------------------------------------------------------------------


def open_data(data: EvaluationDataArguments, slices: tuple[str, ...] = ()) -> tuple[Source, Source]:
    """Photos and titles: one table, the same object twice, or --gallery and --queries."""
    columns = tuple(name for name in slices if name not in TITLE_SLICES)
    if data.gallery is None:
        table = _open_table(data, split=data.split_name, data_files=data.data_files, other_columns=columns)
        return table, table
    photos = _open_side(data, data.gallery, "images")
    titles = _open_side(data, data.queries, "titles", other_columns=columns)
    return photos, titles


def names_of_photos(photos: Source) -> list[str]:
    """The names of the photos, each once where several rows name one, in the order of the data."""
    names: dict[Any, str] = {}
    for row in photos.read_range(0, photos.num_rows):
        is_file = isinstance(row.image, str)
        photo = row.image if is_file else content_id(row.image) if isinstance(row.image, bytes) else ("row", row.row)
        names.setdefault((photo, row.name), printable(row.name))
    return list(names.values())


def open_titles(data: EvaluationDataArguments) -> Source:
    """The titles alone, in the order of the data."""
    if data.queries is not None:
        return _open_side(data, data.queries, "titles")
    return _open_table(data, split=data.split_name, data_files=data.data_files, sides="titles")


def _open_table(data: EvaluationDataArguments, *, split: str, data_files: str | None, **options) -> Source:
    return open_source(
        dataset_name=data.dataset_name,
        dataset_config_name=data.dataset_config_name,
        data_dir=data.data_dir,
        data_files=data_files,
        image_dir=data.image_dir,
        fetch_photos=data.fetch_photos,
        split=split,
        image_column=data.image_column,
        caption_column=data.caption_column,
        product_id_column=data.product_id_column,
        reading=data.reading,
        **options,
    )


def _open_side(data: EvaluationDataArguments, given: str, sides: str, **options) -> Source:
    """--gallery or --queries: a folder, files, or a name on the Hub."""
    is_file = _file_of(given) is not None
    # A name on the Hub is "user/name"; anything with an ending was meant to be a file.
    if not is_file and not os.path.isdir(given) and (os.path.splitext(given)[1] or given.startswith((".", "/"))):
        raise UsageError(f"{given} does not exist: give a folder, a file, or a data set on the Hub")
    where = "data_files" if is_file else "data_dir" if os.path.isdir(given) else "dataset_name"
    places = {"dataset_name": None, "data_dir": None, "data_files": None} | {where: given}
    data = dataclasses.replace(data, **{key: places[key] for key in ("dataset_name", "data_dir")})
    return _open_table(
        data, split=data.split_name, data_files=places["data_files"], sides=sides, any_split=True, **options
    )


def _file_of(given: str | None) -> str | None:
    """What was given as data, if it is files: not a folder, nor a name on the Hub."""
    if given is None or os.path.isdir(given):
        return None
    return given if os.path.isfile(given) or "://" in given or any(sign in given for sign in "*?[") else None


def _open_tuning_data(data: EvaluationDataArguments, options: EvaluationArguments, depths, photos: Source) -> Source:
    if data.data_files is not None:
        source = _open_table(data, split=data.split_name, data_files=options.tuning_split)
    else:
        source = _open_table(data, split=options.tuning_split, data_files=None)
    check_k_rerank(depths, source.num_rows)
    require_usable_row(source)
    if source.manifest()["files"] == photos.manifest()["files"]:
        flag, split = options.tuning_flags[0], options.tuning_split
        raise UsageError(f"--{flag} {split} are the rows that are measured: name another split")
    return source


def _load(options: EvaluationArguments) -> tuple[AliBlipForImageTextRetrieval, AliBlipProcessor]:
    model, processor = load_folder(options.model_name_or_path, dtype="auto")
    if options.image_size is not None:
        with usage_errors(ValueError, told=f"--image_size {options.image_size}: {{}}"):
            model.resize_image(options.image_size)
    size = model.config.vision_config.image_size
    processor.image_processor.size = {"height": size, "width": size}
    return model, processor


def _weights(options: EvaluationArguments) -> str | None:
    folder = Path(options.model_name_or_path)
    if not folder.is_dir():
        return None
    # At another size the position embedding is another one.
    size = "" if options.image_size is None else f" at {options.image_size} pixels"
    found = weights_of(folder)
    return found and found + size


# --- outputs ----------------------------------------------------------------------------------------------------------


def _make_output_dir(options: EvaluationArguments) -> Path:
    """Check the model's name and the output folder, which is made, and return the folder."""
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


def _check_outputs(
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
            _check_place(flag, path)
    if options.submission and photos.random_access:  # the names are all that is read there
        submission_rows([], names_of_photos(photos), torch.empty(0))


def _check_place(flag: str, path: str) -> None:
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--{flag}: can't write to {folder}: {error.strerror}") from error
    with usage_errors(OSError, told=f"--{flag}: can't write {path} ({{}}): give another path"):
        check_place(Path(path))
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--{flag}: can't write {path}: give another path")


# --- all of it --------------------------------------------------------------------------------------------------------


@dataclass
class Setup:
    """Everything that an evaluation needs, opened and checked.

    Attributes:
        output_dir: for results and parts; it exists.
        depths: of --k_rerank; None: the default.
        photos, titles: one object twice for a table.
        tuned_on: the table on which the fusion weight or the match probability is tuned, or None.
        has_truth: whether the data has right answers.
        names: "model_name", "dataset_name" and "split" of the results.
        weights: what tells the model's weights from others, of a local folder; on the first process alone.
        parts, tuning_parts: where finished units are kept; those of `tuned_on`, or None.
        plan: memory and work.
    """

    data: EvaluationDataArguments
    options: EvaluationArguments
    output_dir: Path
    depths: list[Depth] | None
    photos: Source
    titles: Source
    tuned_on: Source | None
    has_truth: bool
    model: AliBlipForImageTextRetrieval
    processor: AliBlipProcessor
    names: dict[str, str]
    weights: str | None
    parts: Parts
    tuning_parts: Parts | None
    plan: MemoryPlan

    def told(self) -> str:
        """The plan in words; of a dry run also the expected time."""
        lines = [str(self.plan)]
        if size := _matrix_bytes(self.depths, self.plan.num_images, self.titles):
            lines.append(f"  match logits of all pairs: {size_text(size)} on disk")
        if self.options.dry_run:
            lines.append(expected_time(self.plan))
        return "\n".join(lines)

    def loader(self, source: Source) -> EvalLoader:
        """Units of a source for this process."""
        return EvalLoader(
            source,
            Collator(self.processor, sides=source.sides, describe=True),
            unit_size=self.options.per_device_eval_batch_size,
            rank=rank(),
            world_size=world_size(),
            num_workers=self.data.dataloader_num_workers,
        )

    def begin(self, accelerator: Accelerator) -> dict[str, Any]:
        """Move the model to its device, and drop unfinished work on something else if that is allowed (collective).

        Returns:
            Options of every `retrieve`, equal on all ranks.
        """
        self.model.to(accelerator.device)
        if is_main():
            if self.options.overwrite_output_dir:
                self.parts.drop_others()
            if self.tuning_parts is not None:
                self.tuning_parts.drop_others()  # of an earlier start on another split
        batch_tokens = self.options.rerank_batch_tokens
        if batch_tokens is None:
            # What is computed together has to be the same on all ranks, and in a second start with other free memory.
            smallest = min(all_gather_objects(self.plan.rerank_batch_tokens))
            batch_tokens = self.parts.settle("rerank_batch_tokens", smallest)
        one_image = self.plan.image_tokens / self.plan.num_images
        return {
            "k_rerank": self.depths,
            "score": self.options.score,
            "dtype": torch.bfloat16 if accelerator.mixed_precision == "bf16" else None,
            "rerank_batch_tokens": batch_tokens,
            "image_token_memory_gb": self.plan.images_kept * one_image / 1e9,
            "photos_by_name": bool(self.options.submission),  # which is what an answer file asks for
            "progress": sys.stderr.isatty(),
        }


def own_outputs(options: EvaluationArguments) -> Owner:
    """The main process as the owner of the output folder, which is made; a dry run owns nothing.

    Raises:
        UsageError: it can't be made or written to, somebody else writes there, or copies were started without a
            launcher.
    """
    check_copies()
    if launched_rank() or options.dry_run:
        return Owner()
    return Owner.of(_make_output_dir(options), "evaluate_retrieval.py")


def set_up(data: EvaluationDataArguments, options: EvaluationArguments) -> Setup:
    """Open data and model, and check that the outputs can be made and that memory and disk are large enough.

    Raises:
        UsageError: something that the user gave is wrong or not enough.
    """
    output_dir = _make_output_dir(options)
    depths = parse_k_rerank(options.k_rerank)
    photos, titles = open_data(data, slices_of(options))
    tell_sources(photos, titles)
    check_k_rerank(depths, photos.num_rows)
    for source in {id(source): source for source in (photos, titles)}.values():
        require_usable_row(source)
    tuned_on = _open_tuning_data(data, options, depths, photos) if options.tuning_split else None
    has_truth = titles is photos or None not in (photos.selected.product_id, titles.selected.product_id)
    _check_outputs(options, output_dir, photos, titles, has_truth)
    model, processor = _load(options)
    tell_cut_titles(titles, lambda: look_at_titles(titles, processor.tokenizer, processor.max_length))
    dataset = photos.name if titles is photos else f"{photos.name} for {titles.name}"
    split = split_told(photos.split, _file_of(data.data_files if data.gallery is None else data.gallery))
    names = {"model_name": options.model_name_or_path, "dataset_name": dataset, "split": split}
    if not options.overwrite_output_dir:
        check_results_of_others(output_dir, **names)
    made_from = _made_from(model, processor, data, options)
    parts = Parts(output_dir / "parts", made_from | {"photos": photos.described(), "titles": titles.described()})
    tuning_parts = None
    if tuned_on is not None:
        tuning_parts = Parts(parts.folder / "tuning", made_from | {"photos": tuned_on.described()})
    if not options.overwrite_output_dir:
        parts.check()
    num_photos = count_photos(photos)
    plan = _plan(model, processor, num_photos, titles, depths, options, both_directions=titles is photos)
    _check_disk(parts.folder, _matrix_bytes(depths, num_photos, titles))
    return Setup(
        data=data,
        options=options,
        output_dir=output_dir,
        depths=depths,
        photos=photos,
        titles=titles,
        tuned_on=tuned_on,
        has_truth=has_truth,
        model=model,
        processor=processor,
        names=names,
        weights=_weights(options) if launched_rank() == 0 else None,
        parts=parts,
        tuning_parts=tuning_parts,
        plan=plan,
    )


def _made_from(model, processor, data: EvaluationDataArguments, options: EvaluationArguments) -> dict[str, Any]:
    """What the embeddings depend on, beside the rows."""
    return {
        "model": fingerprint(model, processor),
        "type of the weights": str(model.dtype).removeprefix("torch."),
        "photo size": processor.image_size,
        "longest title": processor.max_length,
        "rows of a unit": options.per_device_eval_batch_size,
        "mixed precision": launched_precision(options.mixed_precision),
        "folder of the photos": data.image_dir and os.path.abspath(data.image_dir),
    }


def _plan(
    model,
    processor,
    num_photos: int,
    titles: Source,
    depths,
    options: EvaluationArguments,
    *,
    both_directions: bool,
) -> MemoryPlan:
    most = max(num_photos, titles.num_rows) if both_directions else num_photos
    asked = depths or [min(DEFAULT_K_RERANK, most)]
    depth = most if ALL in asked else max(asked)
    return make_plan(
        model,
        processor,
        num_photos,
        titles,
        0 if options.score == "itc" else depth,
        both_directions=both_directions,
        dtype=torch.bfloat16 if launched_precision(options.mixed_precision) == "bf16" else None,
        rerank_batch_tokens=options.rerank_batch_tokens,
        image_token_memory_gb=options.image_token_memory_gb,
    )


def _matrix_bytes(depths: list[Depth] | None, num_photos: int, titles: Source) -> int:
    """Size of the file of all match logits; 0 if it is not asked for."""
    return num_photos * titles.num_rows * 4 if ALL in (depths or ()) else 0


def _check_disk(folder: Path, size: int) -> None:
    there = folder / MATRIX  # from an earlier start, its space is taken already
    wanted = size - (there.stat().st_size if there.is_file() else 0)
    if (free := shutil.disk_usage(folder.parent).free) < wanted:
        raise UsageError(
            f"--k_rerank all writes {size_text(wanted)}, {size_text(free)} are free in {folder.parent}: "
            "give another --output_dir, or a number"
        )


__all__ = [
    "Setup",
    "check_flags",
    "names_of_photos",
    "open_data",
    "open_titles",
    "rows_of",
    "set_up",
    "set_up_logging",
    "slices_of",
]
