"""Measure how well an AliBLIP model finds the photo of a title and the title of a photo.

    python evaluate_retrieval.py --model_name_or_path outputs/demo/best --data_dir demo/catalogue

on several processes, with the same numbers:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml evaluate_retrieval.py \\
        --model_name_or_path outputs/demo/best --data_dir demo/catalogue

The competition's own layout, a JSON list of {"product": file name, "caption": text}:

    python evaluate_retrieval.py --model_name_or_path MODEL --data_files valid.json --image_dir valid_images

What it does: every photo and title is embedded and searched exactly (ITC); the --k_rerank best of both directions are
then scored pair by pair (ITM; score = match logit + ITC similarity), and what was not re-ranked follows in ITC order.
Rows with the same --product_id_column are right answers to each other; without one, each title has one right photo.

What it gives: a table, OUTPUT_DIR/results.json, skipped.jsonl with the rows that could not be read, and with
--contact_sheet sheet.png a picture of some queries with their three best photos. A recipe of flags: --config
recipe.yaml. All flags: --help.
"""

import logging
import os
import random
import sys
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from aliblip.accelerator import build_accelerator, end
from aliblip.arguments import (
    EvaluationArguments,
    EvaluationDataArguments,
    UsageError,
    check_range,
    main_with_usage_errors,
    parse,
)
from aliblip.data.collate import Collator
from aliblip.data.loader import EvalLoader
from aliblip.data.sources import Source, decode, open_source, require_usable_row
from aliblip.evaluation import Evaluation, check_k_rerank, format_table, run_evaluation, write_results
from aliblip.report import Hit, SheetRow, contact_sheet
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

SHEET_QUERIES = 8
SHEET_PHOTOS = 3


def main() -> None:
    # Mistakes first: all of this is quick and happens before the processes are joined.
    data, options = parse((EvaluationDataArguments, EvaluationArguments), description=__doc__)
    set_up_logging()
    try:
        output_dir = check(options, data)
        source = open_data(data)
        check_k_rerank(options.k_rerank, source.num_rows)
        require_usable_row(source)
        model, processor = load(options)
        accelerator = build_accelerator(
            mixed_precision=options.mixed_precision,
            max_grad_norm=0.0,  # nothing is trained here
            per_device_train_batch_size=options.per_device_eval_batch_size,
        )
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error

    loader = EvalLoader(
        source,
        Collator(processor),
        unit_size=options.per_device_eval_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=data.dataloader_num_workers,
    )
    evaluation = run_evaluation(
        model.to(accelerator.device),
        loader,
        model_name=options.model_name_or_path,
        dataset_name=source.name,
        split=source.split,
        k_rerank=options.k_rerank,
        dtype=torch.bfloat16 if accelerator.mixed_precision == "bf16" else None,
        progress=sys.stderr.isatty(),
    )
    if accelerator.is_main_process:
        print(format_table(evaluation.results))
        print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in evaluation.seconds.items()))
        path = write_results(evaluation, output_dir)
        if evaluation.skipped:
            print(f"{len(evaluation.skipped)} unusable rows were left out: {path.with_name('skipped.jsonl')}")
        print(f"written: {path}")
        if options.contact_sheet:
            print(f"written: {draw(evaluation, source, options)}")
    end(accelerator)


def set_up_logging() -> None:
    # by the launcher's variable: the processes are not joined yet
    is_first = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("aliblip").setLevel(logging.INFO if is_first else logging.ERROR)
    if not is_first:
        disable_progress_bar()


def check(options: EvaluationArguments, data: EvaluationDataArguments) -> Path:
    """Check the flags and return the output folder."""
    if not options.model_name_or_path:
        raise UsageError("--model_name_or_path is missing: give the folder or Hub name of a model")
    check_range(
        per_device_eval_batch_size=(options.per_device_eval_batch_size, 1, None),
        k_rerank=(options.k_rerank, 1, None),
        dataloader_num_workers=(data.dataloader_num_workers, 0, None),
        image_size=(options.image_size, 1, None),
    )
    is_local = os.path.isdir(options.model_name_or_path)
    if not is_local and (
        options.model_name_or_path.startswith((".", "/", "~")) or options.model_name_or_path.count("/") > 1
    ):
        raise UsageError(f"the model folder {options.model_name_or_path} does not exist: give a folder or a Hub name")
    if options.output_dir is None and not is_local:
        raise UsageError("--output_dir is missing: a model from the Hub has no folder for results.json")
    output_dir = Path(options.output_dir or options.model_name_or_path)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"can't write to the output folder {output_dir}: {error.strerror}") from error
    if not os.access(output_dir, os.W_OK):
        raise UsageError(f"can't write to the output folder {output_dir}: give another --output_dir")
    if options.contact_sheet and Path(options.contact_sheet).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UsageError(f"--contact_sheet is {options.contact_sheet}: give a file name that ends in .png or .jpg")
    return output_dir


def open_data(data: EvaluationDataArguments) -> Source:
    return open_source(
        dataset_name=data.dataset_name,
        dataset_config_name=data.dataset_config_name,
        data_dir=data.data_dir,
        data_files=data.data_files,
        image_dir=data.image_dir,
        split=data.split_name,
        image_column=data.image_column,
        caption_column=data.caption_column,
        product_id_column=data.product_id_column,
    )


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


def draw(evaluation: Evaluation, source: Source, options: EvaluationArguments) -> Path:
    """The contact sheet: randomly chosen titles with their best photos."""
    found = evaluation.text_to_image

    def example(index: int):
        row = int(evaluation.rows[index])
        return decode(next(iter(source.read_range(row, row + 1))))

    rows = []
    chosen = random.Random(options.seed).sample(range(len(evaluation.rows)), min(SHEET_QUERIES, len(evaluation.rows)))
    for query in chosen:
        hits = []
        for place in range(min(SHEET_PHOTOS, found.ids.shape[1])):
            photo = int(found.ids[query, place])
            right = bool(evaluation.product_id[photo] == evaluation.product_id[query])
            hits.append(Hit(example(photo).image, float(found.scores[query, place]), right))
        rows.append(SheetRow(example(query).text, hits, rank=int(found.ranks[query])))
    heading = f"{Path(options.model_name_or_path).name} on {source.name}, {source.split}"
    return contact_sheet(rows, options.contact_sheet, heading=heading)


if __name__ == "__main__":
    main_with_usage_errors("evaluate_retrieval.py", main)
