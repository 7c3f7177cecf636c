"""Executors of datatrove for more than one machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor

from aliblip.data.prepare_arguments import PrepareArguments
from aliblip.runtime.arguments import json_mapping
from aliblip.runtime.installation import ROOT, is_checkout, this_python
from aliblip.runtime.mistakes import UsageError, usage_errors

__all__ = ["check_executor", "remote_executor"]


def check_executor(args: PrepareArguments) -> None:
    """Raises UsageError where the executor can't work here."""
    if args.executor == "local":
        if args.executor_options is not None:
            raise UsageError("--executor_options are for --executor slurm or ray: on this machine there is --workers")
        return
    json_mapping("executor_options", args.executor_options)
    if args.executor == "slurm":
        if shutil.which("sbatch") is None:
            raise UsageError("--executor slurm needs sbatch, which is not here: start it where jobs are submitted")
        if missing := {"time", "partition"} - set(json_mapping("executor_options", args.executor_options)):
            raise UsageError(
                f"--executor slurm needs {' and '.join(sorted(missing))}: --executor_options "
                '\'{"partition": "cpu", "time": "10:00:00"}\''
            )
    elif importlib.util.find_spec("ray") is None:
        raise UsageError(f"--executor ray needs Ray: {this_python()} -m pip install ray")


def remote_executor(args: PrepareArguments, pipeline: Sequence[Any], phase: str, **options: Any) -> Any:
    """The executor of a phase on Slurm or Ray.

    Args:
        phase: names the jobs.
        options: of every executor.

    Raises:
        UsageError: `--executor_options` has what the executor does not take.
    """
    given = json_mapping("executor_options", args.executor_options)
    if args.workers is not None:
        options["workers"] = args.workers
    if args.executor == "slurm":
        options["job_name"] = f"aliblip-prepare-{phase}"
        activate = Path(sys.prefix) / "bin" / "activate"
        if activate.is_file():
            options["venv_path"] = str(activate)
        if is_checkout():  # the jobs get the environment, and find the package by it
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    Executor = SlurmPipelineExecutor if args.executor == "slurm" else RayPipelineExecutor
    with usage_errors(TypeError, told=f"--executor_options: {args.executor} does not take them ({{}})"):
        return Executor(pipeline=list(pipeline), **options | given)
