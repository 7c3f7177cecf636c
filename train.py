"""Train AliBLIP, from scratch, from trained towers or from a trained model, on a streamed table of photos and titles.

    python train.py --config recipes/demo.yaml --output_dir outputs/demo                  # one process
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 train.py \
        --config_name base --data_dir my_catalogue --output_dir outputs/mine               # four GPUs of this machine
    accelerate launch --config_file accelerate_configs/deepspeed_zero2.yaml train.py \
        --config recipes/aliproducts_large.yaml --train_file train.json --image_dir photos --output_dir outputs/large
    python train.py --model_name_or_path Salesforce/blip-itm-base-coco --image_size 224 --data_dir my_catalogue \
        --output_dir outputs/finetuned                                                     # from BLIP

The data (`--data_dir`, `--dataset_name` or `--train_file`) has a photo column, a title column and, where one product
has several rows, a product column. Everything can stand in a recipe (`--config`), which flags override; see `--help`.

What a run leaves in `--output_dir`: `best/` and `last/` (models for `from_pretrained`, each with its `results.json`),
`log.jsonl` (every log line), `skipped.jsonl` (rows that could not be used), `arguments.json`, `manifest.json` (of the
data), `machine.json`, `status.json` (how it stands, or how it ended), and with `--checkpointing_steps` checkpoints,
from which `--resume_from_checkpoint last` goes on. SIGTERM, SIGUSR1 or Ctrl-C write one more and end the run.
With `--profile N` there is `profile/` too: a trace of N steps, and a page that says where their time goes.
`--dry_run` looks at everything that can be wrong, tells it all with what the run takes, and writes nothing.
`--push_to_hub --hub_model_id me/name` uploads the best model so far with a card, in the background.
"""

from __future__ import annotations

import sys
from signal import Signals

from accelerate.utils import set_seed

import aliblip  # noqa: F401  (registers the classes, so that from_pretrained takes this code for AliBLIP folders)
from aliblip.models.upload import SECONDS_AFTER_A_STOP, SECONDS_AT_THE_END, HubArguments
from aliblip.runtime.accelerator import AliBlipAccelerator, end
from aliblip.runtime.arguments import parse
from aliblip.runtime.interrupts import StopSignals
from aliblip.runtime.mistakes import main_with_usage_errors
from aliblip.runtime.pulse import Pulse
from aliblip.training.arguments import DryRunArguments, ModelArguments, TrainDataArguments, TrainingArguments
from aliblip.training.building import build_momentum, build_objective, build_optimizer, change_towers
from aliblip.training.checkpoint import Training
from aliblip.training.examination import check_dry_run, examine
from aliblip.training.optim import set_learning_rate
from aliblip.training.progress import RunStatus, Unfailing
from aliblip.training.run import Run
from aliblip.training.setup import Setup, meet, set_up
from aliblip.training.step import backward_and_step, clamp_parameter, keep_frozen

TEMPERATURE_RANGE = (0.001, 0.5)  # of the published code
GROUPS = (ModelArguments, TrainDataArguments, TrainingArguments, HubArguments, DryRunArguments)


def main() -> int:
    """The exit code: 0, or 128 and the number of the signal that stopped the run; of a dry run 2 with a problem."""
    *groups, dry_run_args = parse(GROUPS, description=__doc__)
    if check_dry_run(dry_run_args):
        return examine(*groups, dry_run_args)
    setup = set_up(*groups)
    with setup.owner:
        return run(setup)


def run(setup: Setup) -> int:
    """The exit code of a run of which all has been looked at."""
    accelerator = meet(setup)
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
    seconds_to_publish = SECONDS_AFTER_A_STOP
    try:
        status, signals = RunStatus(setup.output_dir / "status.json", setup.checkpoint is None), StopSignals()
        with status, signals, Pulse(lambda line: status.failed(RuntimeError(line))):
            stopped_by = train(setup, accelerator, signals, status)
        end(accelerator)
        if not stopped_by:
            seconds_to_publish = SECONDS_AT_THE_END
    finally:  # nobody waits for this process any more
        if setup.publisher is not None:
            setup.publisher.finish(seconds_to_publish)
    return 128 + stopped_by if stopped_by else 0


def train(setup: Setup, accelerator: AliBlipAccelerator, signals: StopSignals, status: RunStatus) -> Signals | None:
    """The run itself; what happens around a step stands in `aliblip.training.run`.

    Returns:
        The signal that stopped it, on all ranks, or None when it is done.
    """
    args = setup.args
    model = setup.model.to(accelerator.device)
    keep_frozen(model)
    # The momentum state and the loaders are not prepared: DDP would broadcast the queues at every forward.
    longest_title = setup.processor.max_length
    momentum = build_momentum(model, args, accelerator, setup.momentum_start, longest_title)
    changed = change_towers(args, model, momentum.encoders)  # --fp8, --compile
    objective, optimizer = accelerator.prepare(
        build_objective(model, args, longest_title), build_optimizer(model, args)
    )
    set_seed(args.seed + accelerator.process_index)  # dropout and hard negatives differ from rank to rank
    training = Training(model, optimizer, momentum, accelerator.device, accelerator.scaler)
    with Run(setup, accelerator, training, signals, status, changed) as run:
        for epoch in run.epochs():
            for step in run.steps(epoch):
                if step.average_is_due:
                    momentum.update(model)
                set_learning_rate(optimizer, step.learning_rate)
                for batch, alpha in run.batches(step):
                    with accelerator.accumulate(objective):
                        targets = momentum.encode(batch)
                        output = objective(batch, targets, alpha)
                        outcome = backward_and_step(
                            accelerator, objective, optimizer, output.loss, args.max_grad_norm, signals.number
                        )
                    momentum.enqueue(targets, batch["product_id"])
                    run.after_batch(step, batch, targets, output)
                clamp_parameter(model.temp, *TEMPERATURE_RANGE)
                run.after_step(step, output, outcome)  # a step that is not finite is undone; log, checkpoint, signal
            if run.stopped_by:
                return run.stop()
            run.after_epoch(epoch)  # evaluation, models, publishing
        run.finish()
    return None


if __name__ == "__main__":
    main_with_usage_errors("train.py", main)
