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

import time
from datetime import timedelta

from aliblip.retrieval.arguments import EvaluationArguments, EvaluationDataArguments
from aliblip.retrieval.evaluation import retrieve
from aliblip.retrieval.reranking import seconds_by_depth
from aliblip.retrieval.results import measure
from aliblip.retrieval.setup import Setup, check_flags, own_outputs, set_up, set_up_logging, slices_of
from aliblip.retrieval.submission import LONGEST_LIST
from aliblip.retrieval.tuning import tune
from aliblip.retrieval.writing import verify, write
from aliblip.runtime.accelerator import AliBlipAccelerator, build_accelerator, end
from aliblip.runtime.arguments import parse
from aliblip.runtime.distributed import is_main, launched_rank
from aliblip.runtime.mistakes import main_with_usage_errors
from aliblip.runtime.pulse import Pulse


def main() -> int:
    # Plan. Mistakes first: all of this is quick and happens before the processes are joined.
    data, options = parse((EvaluationDataArguments, EvaluationArguments), description=__doc__)
    set_up_logging()
    check_flags(data, options)
    if options.verify_submission:
        return verify(data, options)
    with own_outputs(options):
        return evaluate(data, options)


def evaluate(data: EvaluationDataArguments, options: EvaluationArguments) -> int:
    setup = set_up(data, options)
    if launched_rank() == 0:
        print(setup.told())
    if options.dry_run:
        return 0
    accelerator = build_accelerator(
        mixed_precision=options.mixed_precision,
        max_grad_norm=0.0,  # nothing is trained here
        per_device_train_batch_size=options.per_device_eval_batch_size,
        timeout=timedelta(days=1),  # after a resume one process may have all the work that was left
    )
    with Pulse():
        code = find_and_write(setup, accelerator)
    end(accelerator)
    return code


def find_and_write(setup: Setup, accelerator: AliBlipAccelerator) -> int:
    options = setup.options
    work = setup.begin(accelerator)

    # Retrieve: every process does its units, and every process gets what all have found.
    chosen, tuned = tune(setup, work)
    start = time.perf_counter()
    retrieval = retrieve(
        setup.model,
        setup.loader(setup.photos),
        queries=None if setup.titles is setup.photos else setup.loader(setup.titles),
        has_truth=setup.has_truth,
        list_at_least=LONGEST_LIST if options.submission else 0,
        parts=setup.parts,
        **work,
        **chosen,
    )

    # Measure and write.
    code = 0
    if is_main():
        results = measure(
            retrieval,
            **setup.names,
            intervals=True,
            slices=slices_of(options),
            seconds_of_depth=seconds_by_depth(setup.model.config, retrieval),
        )
        results |= tuned
        if setup.weights is not None:
            results["weights"] = setup.weights
        results["run"]["seconds"] = round(time.perf_counter() - start, 3)
        code = write(retrieval, results, setup)
        if code == 0:  # otherwise the next start has only to do what failed
            setup.parts.remove()
    return code


if __name__ == "__main__":
    main_with_usage_errors("evaluate_retrieval.py", main)
