"""The only place where an Accelerator is built, and how a run leaves it.

    accelerator = build_accelerator(max_grad_norm=1.0, per_device_train_batch_size=16)
    objective, optimizer = accelerator.prepare(objective, optimizer)  # no data loader, no schedule: both are ours
    ...
    end(accelerator)

What a launcher promises and what it starts are not always the same (a CPU flag can silently make one process out of
two, or DDP out of DeepSpeed), so the built Accelerator is compared with the launcher's environment.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from aliblip.runtime.distributed import launched_world_size
from aliblip.runtime.extensions import release_left_locks
from aliblip.runtime.files import read_json
from aliblip.runtime.mistakes import UsageError, usage_errors

__all__ = [
    "STARTED_ALONE",
    "TRAINING_PRECISIONS",
    "AliBlipAccelerator",
    "Launch",
    "build_accelerator",
    "check_launch",
    "describe_machine",
    "end",
    "is_deepspeed",
    "launched_precision",
    "started_alone",
    "sum_in_order",
]

MIXED_PRECISIONS = ("no", "bf16")
TRAINING_PRECISIONS = (*MIXED_PRECISIONS, "fp16")  # whose gradients have to be scaled, and that need a GPU
STARTED_ALONE = (
    "the launcher was set up for several processes but started one: on CPU use accelerate_configs/cpu_2_processes.yaml "
    "(or unset MASTER_ADDR)"
)


class AliBlipAccelerator(Accelerator):
    """An Accelerator that refuses to prepare data loaders.

    Our loader already reads only the rows of its rank; a prepared one would split them a second time and silently
    leave out half of the data.
    """

    def prepare_data_loader(self, *args, **kwargs):
        raise RuntimeError("data loaders are not prepared: aliblip.data.loader already reads only this rank's rows")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """In which a module that is not prepared runs under autocast; None: in fp32, without."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision)


def build_accelerator(
    *,
    mixed_precision: str | None = None,
    gradient_accumulation_steps: int = 1,
    log_with: str | list[str] | None = None,
    project_dir: str | os.PathLike | None = None,
    max_grad_norm: float,
    per_device_train_batch_size: int,
    timeout: timedelta | None = None,
    precisions: Sequence[str] = MIXED_PRECISIONS,
) -> AliBlipAccelerator:
    """Build the Accelerator of this process as the launcher and the arguments say.

    Under DeepSpeed the gradient clipping, the micro-batch size and the accumulation steps are written from these
    arguments into the engine's configuration, so that they are stated in one place.

    Args:
        mixed_precision: one of `precisions`; None: as the launcher, or under DeepSpeed the DeepSpeed JSON, says.
        gradient_accumulation_steps: micro-batches per optimizer step.
        log_with: trackers of accelerate, for example `"tensorboard"`.
        project_dir: where the trackers write.
        max_grad_norm: gradients are clipped to this global norm; 0 means no clipping.
        per_device_train_batch_size: rows of one micro-batch of one process.
        timeout: how long a process waits for the others; None: torch's own limit, 10 minutes on GPUs. (A process that
            dies ends the others at once, through the launcher.)
        precisions: those that the caller can do.

    Raises:
        UsageError: before any process is contacted, for values that contradict each other or the launcher's
            configuration, and for what this machine can't do; afterwards, when the launcher started something else
            than it says.
    """
    launch = check_launch(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_grad_norm=max_grad_norm,
        per_device_train_batch_size=per_device_train_batch_size,
        precisions=precisions,
    )
    launched_as_deepspeed = launch.deepspeed is not None
    # torch 2.13 announces a successor of broadcast_buffers that does not do the same yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    # DeepSpeed still calls by the old name, in every step.
    warnings.filterwarnings("ignore", message="`torch.distributed.all_gather_into_tensor` is deprecated")
    without_gpu = not torch.cuda.is_available()
    kwargs_handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if "LOCAL_RANK" in os.environ:
        # Without a named backend, DeepSpeed on CPU leaves every rank believing that it is rank 0 of 1.
        backend = {"backend": "gloo"} if without_gpu else {}
        kwargs_handlers.append(InitProcessGroupKwargs(**backend, timeout=timeout))
    if launched_as_deepspeed and os.environ.get("LOCAL_RANK", "0") == "0":  # the others wait for what it leaves
        release_left_locks()
    # Packages and hardware that the arguments or the launcher ask for, and that are not there.
    with usage_errors(ImportError, ValueError):
        accelerator = AliBlipAccelerator(
            mixed_precision=mixed_precision,
            # cpu=True would silently turn DeepSpeed into DDP.
            cpu=without_gpu and not launched_as_deepspeed,
            deepspeed_plugin=launch.deepspeed,
            # A plugin, since the bare argument is overridden by an environment variable. Our loader is not prepared, so
            # there is no end of a data loader to react to.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=log_with,
            project_dir=project_dir,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=kwargs_handlers,
        )
    _check_launch(accelerator, launched_as_deepspeed)
    return accelerator


@dataclass(frozen=True)
class Launch:
    """What the launcher and the arguments will start.

    Attributes:
        processes: of all machines.
        precision: "no", "bf16" or "fp16".
        on_gpu: whether it computes on a GPU.
        deepspeed: its plugin, or None.
        zero_stage: of DeepSpeed, or 0.
        offloads: whether DeepSpeed keeps the optimizer's state in the host's memory.
    """

    processes: int
    precision: str
    on_gpu: bool
    deepspeed: DeepSpeedPlugin | None = None
    zero_stage: int = 0
    offloads: bool = False

    def __str__(self) -> str:
        of = "process" if self.processes == 1 else "processes"
        kind = f", DeepSpeed ZeRO-{self.zero_stage}" if self.zero_stage else ", DDP" if self.processes > 1 else ""
        precision = "fp32" if self.precision == "no" else f"{self.precision} mixed precision"
        return f"{self.processes} {of} on {'GPU' if self.on_gpu else 'CPU'}{kind}, {precision}"


def check_launch(
    *,
    mixed_precision: str | None,
    gradient_accumulation_steps: int,
    max_grad_norm: float,
    per_device_train_batch_size: int,
    precisions: Sequence[str] = MIXED_PRECISIONS,
    elsewhere: bool = False,
) -> Launch:
    """What `build_accelerator` will start with these arguments, without starting or contacting anything.

    Args:
        elsewhere: on another machine, which has the GPUs that this one may lack.

    Raises:
        UsageError: values that contradict each other or the launcher's configuration, and what this machine can't do.
    """
    requested = _requested_precision(mixed_precision, precisions)
    on_gpu = torch.cuda.is_available()
    if requested == "fp16" and not on_gpu and not elsewhere:
        raise UsageError("mixed precision fp16 needs a GPU, and there is none: take bf16, or no")
    accumulation_of_launcher = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if accumulation_of_launcher not in ("auto", str(gradient_accumulation_steps)):
        raise UsageError(
            f"the launcher sets {accumulation_of_launcher} gradient accumulation steps and the arguments "
            f"{gradient_accumulation_steps}: leave it out of the launcher's configuration"
        )
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if on_gpu and 0 < gpus < here:
        raise UsageError(
            f"the launcher starts {here} processes on this machine, which has {gpus} GPU{'s' if gpus > 1 else ''}: one "
            f"process a GPU, accelerate launch --num_processes {gpus}"
        )
    processes = launched_world_size()
    if not _launched_as_deepspeed():
        return Launch(processes, requested or "no", on_gpu)
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    plugin = _deepspeed_plugin(
        requested,
        gradient_clipping=float(max_grad_norm),
        train_micro_batch_size_per_gpu=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    config = plugin.deepspeed_config
    zero = config["zero_optimization"]
    offloads = zero.get("offload_optimizer", {}).get("device", "none") not in ("none", None)
    return Launch(processes, _precision_of(config) or "no", on_gpu, plugin, zero["stage"], offloads)


def sum_in_order() -> None:
    """Let a GPU add in the same order each time, so that equal runs give equal bits. Many kernels add in whatever order
    their threads come in; torch takes slower ones then, and raises where there is none. Before a GPU is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def launched_precision(mixed_precision: str | None, precisions: Sequence[str] = MIXED_PRECISIONS) -> str:
    """One of these, what `build_accelerator` will run in, without building anything.

    Raises:
        UsageError: as `build_accelerator` does.
    """
    requested = _requested_precision(mixed_precision, precisions)
    if _launched_as_deepspeed():
        config, path = _deepspeed_config()
        requested = _agreed_precision(requested, config, path)
    return requested or "no"


def describe_machine(accelerator: Accelerator) -> dict[str, Any]:
    """What a run runs on, for the model card: {"hardware", "launcher", "precision", "versions"}."""
    processes = accelerator.num_processes
    if accelerator.device.type == "cuda":
        hardware = f"{processes} x {torch.cuda.get_device_name(accelerator.device)}"
    else:
        hardware = f"CPU ({platform.machine()}), {processes} process{'es' if processes > 1 else ''}"
        hardware += f" of {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return {
        "hardware": hardware,
        "launcher": accelerator.distributed_type.value,
        "precision": "fp32" if accelerator.autocast_dtype is None else f"{accelerator.mixed_precision} mixed precision",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        },
    }


def end(accelerator: Accelerator) -> None:
    """Finish the trackers and leave the process group: the last call of a run.

    The caller has dropped the prepared module by now, by leaving the function that held it. A DDP module that outlives
    the process group is its last owner: it would wait for gloo's threads while it holds the interpreter's lock, which
    they may need to let go of the last gathered tensor. That deadlock was seen in one run of twenty.
    """
    accelerator.free_memory()
    gc.collect()  # DDP stands in reference cycles
    accelerator.end_training()


def _requested_precision(mixed_precision: str | None, precisions: Sequence[str]) -> str | None:
    """What the flag or else the launcher asks for; None when neither says anything."""
    if mixed_precision is not None:
        given, where = mixed_precision, "--mixed_precision"
    else:
        # The launcher writes "no" also when nobody asked for anything.
        given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        where = "the launcher's mixed_precision"
        if given == "no":
            return None
    if given not in precisions:
        raise UsageError(f"{where} is {given!r}; accepted are {', '.join(precisions)}: use bf16")
    return given


def _launched_as_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _deepspeed_config() -> tuple[dict[str, Any], str]:
    """The launcher's DeepSpeed configuration, and what it is called in messages."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":  # configured by the fields of the accelerate YAML
        with usage_errors(ImportError, ValueError, told="the launcher's deepspeed_config can't be used ({})"):
            return DeepSpeedPlugin().deepspeed_config, "the launcher's deepspeed_config"
    try:
        return read_json(path), path
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read the DeepSpeed configuration {path} ({error}): the path is taken from the folder in "
            "which the launcher was started"
        ) from error


def _agreed_precision(requested: str | None, config: dict[str, Any], path: str) -> str | None:
    """What flag, launcher and DeepSpeed configuration say together; None where none says anything."""
    precision = _precision_of(config)
    if requested == "fp16":
        raise UsageError(
            f"mixed precision fp16 is not done under DeepSpeed; accepted are {', '.join(MIXED_PRECISIONS)}: use bf16, "
            "or DDP (accelerate_configs/multi_gpu.yaml)"
        )
    if precision == "fp16":
        raise UsageError(f"{path} enables fp16; accepted are {', '.join(MIXED_PRECISIONS)}: enable bf16 instead")
    if requested is not None and precision is not None and requested != precision:
        # accelerate takes the JSON's value without a word
        raise UsageError(
            f"mixed precision {requested} contradicts {path}, which says {precision}: leave out --mixed_precision or "
            "take another DeepSpeed configuration"
        )
    return precision or requested


def _deepspeed_plugin(requested: str | None, **settings: float | int) -> DeepSpeedPlugin:
    """The plugin for the DeepSpeed configuration of the launcher, with our settings in it."""
    config, path = _deepspeed_config()
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2):
        raise UsageError(f"{path} asks for ZeRO stage {stage}; accepted are 1 and 2: set zero_optimization.stage to 2")
    precision = _agreed_precision(requested, config, path)

    for key, value in settings.items():
        in_file = config.get(key, "auto")
        # 1 is what accelerate fills in for accumulation steps that nobody set
        if in_file not in ("auto", value) and not (key == "gradient_accumulation_steps" and in_file == 1):
            raise UsageError(
                f"{path} sets {key} to {in_file} and the arguments to {value}: leave it out of the DeepSpeed file"
            )
        config[key] = value
    config.pop("train_batch_size", None)  # the product of the above and the number of processes
    if precision == "bf16":
        # A step with a non-finite gradient is left out, as without DeepSpeed.
        config["bf16"] = {**config.get("bf16", {}), "enabled": True, "check_grad_overflow": True}
    with usage_errors(ImportError, ValueError, told=f"{path} can't be used ({{}})"):
        return DeepSpeedPlugin(
            hf_ds_config=config,
            gradient_accumulation_steps=settings["gradient_accumulation_steps"],
            gradient_clipping=settings["gradient_clipping"],
        )


def _precision_of(config: dict[str, Any]) -> str | None:
    """The precision that a DeepSpeed configuration states; None when it leaves it open."""
    enabled = {dtype: config.get(dtype, {}).get("enabled", "auto") for dtype in ("bf16", "fp16")}
    for dtype, value in enabled.items():
        if value is True:
            return dtype
    return "no" if enabled["bf16"] is False else None


def _check_launch(accelerator: Accelerator, launched_as_deepspeed: bool) -> None:
    """Compare what runs with what the launcher says it started."""
    promised = launched_world_size()
    grouped = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if not accelerator.num_processes == grouped == promised:
        raise UsageError(
            f"the launcher started {promised} processes, the process group has {grouped} and accelerate counts "
            f"{accelerator.num_processes}: use one of the files in accelerate_configs/"
        )
    if launched_as_deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise UsageError(
            f"the launcher asks for DeepSpeed but accelerate runs {accelerator.distributed_type.value}: remove "
            "use_cpu from its configuration"
        )
    if accelerator.device.type == "cpu" and started_alone():
        warnings.warn(STARTED_ALONE, stacklevel=3)


def started_alone() -> bool:
    """Whether this is what `accelerate launch --cpu --num_processes 2` leaves behind: one process instead of two."""
    return launched_world_size() == 1 and "MASTER_ADDR" in os.environ and "RANK" not in os.environ


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED
