"""Look at everything that a training run needs, tell all that is wrong with it at once, and what the run takes.

    python -m aliblip.doctor --config recipes/demo.yaml --output_dir outputs/demo
    python -m aliblip.doctor --config_name base --data_dir my_catalogue --output_dir outputs/mine \
        --processes 8 --device_memory_gb 80 --peak_tflops 989       # for eight H100, from a machine without any
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m aliblip.doctor ...      # under a launcher

The flags are those of train.py, which does the same with --dry_run. Each line is ok, a warning, a problem with its
remedy, or skipped, since what it needs has a problem. The exit code is 2 if there is a problem, else 0. Nothing is
written, on the Hub either; data on the Hub, and what --compile tries, goes into its cache as ever.
"""

from __future__ import annotations

import aliblip  # noqa: F401  (registers the classes, so that from_pretrained takes this code for AliBLIP folders)
from aliblip.models.upload import HubArguments
from aliblip.runtime.arguments import parse
from aliblip.runtime.mistakes import main_with_usage_errors
from aliblip.training.arguments import ModelArguments, PlanArguments, TrainDataArguments, TrainingArguments
from aliblip.training.examination import examine

GROUPS = (ModelArguments, TrainDataArguments, TrainingArguments, HubArguments, PlanArguments)


def main() -> int:
    return examine(*parse(GROUPS, description=__doc__))


if __name__ == "__main__":
    main_with_usage_errors("aliblip.doctor", main)
