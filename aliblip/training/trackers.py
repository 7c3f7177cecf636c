"""Trackers of a run: which, under what name, and how a run that goes on continues theirs.

names = named_trackers("tensorboard,wandb")
init_kwargs = continued(names, output_dir, run_name=None, step=600)
accelerator.init_trackers("aliblip", config=settings(arguments), init_kwargs=init_kwargs)
remember(accelerator, names, output_dir)
"""

from __future__ import annotations

import secrets
import string
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from aliblip.runtime.distributed import is_main
from aliblip.runtime.files import read_json, write_json
from aliblip.runtime.installation import install_hint
from aliblip.runtime.mistakes import UsageError, one_line

IDS = "trackers.json"  # of the output folder: tracker -> the id of its run
# What a tracker calls the name of a run, and its id; the id is ours, except that of mlflow, which tells it.
NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}
OWN_IDS = {"wandb": "id", "swanlab": "id"}
GIVEN_IDS = {"mlflow": "run_id"}
RESUMING = ("wandb", "trackio", "swanlab")  # they take resume="allow": go on with that run if there is one
CONTINUED = ("tensorboard", *NAMES)
_ID_LETTERS = string.ascii_lowercase + string.digits


def named_trackers(report_to: str) -> list[str]:
    """The trackers of `--report_to`, each once; none for "none", and all that are installed for "all"."""
    names = list(dict.fromkeys(name.strip() for name in report_to.split(",") if name.strip()))
    if names == ["none"]:
        return []
    return [str(kind) for kind in get_available_trackers()] if names == ["all"] else names


def check_trackers(report_to: str, project_name: str) -> None:
    """Refuse trackers that are not there, and names of projects that are no names.

    Raises:
        UsageError: which, and what to do.
    """
    if not project_name or any(letter in project_name for letter in "/\\") or project_name.startswith("."):
        raise UsageError(f"--project_name is {project_name!r}: give a name without slashes, such as aliblip")
    names = named_trackers(report_to)
    if report_to.strip() in ("none", "all"):
        return
    known = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    for name in names or [report_to]:
        if name not in known:
            raise UsageError(
                f"--report_to is {report_to!r}: give one or several of {', '.join(known)}, with commas, or all or none "
                "alone"
            )
        if name not in [str(kind) for kind in get_available_trackers()]:
            install = install_hint("tensorboard") if name == "tensorboard" else f"pip install {name}"
            raise UsageError(f"--report_to {name} is not installed: {install}, or --report_to none")


def settings(arguments: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """All arguments of a run, as every tracker takes them."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in arguments.items()
    }


def continued(names: list[str], output_dir: Path, run_name: str | None, step: int | None) -> dict[str, dict[str, Any]]:
    """What each tracker is told about its run, for `init_trackers`. The main process keeps the ids in the folder.

    Args:
        names: of the trackers.
        output_dir: of the run. Its name is that of the run, where there is no other.
        run_name: of the run; None: none was given.
        step: at which the run of this folder goes on; None: it begins.
    """
    ids = _ids(output_dir) if step is not None else {}
    told: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        if name in NAMES:
            told[name][NAMES[name]] = run_name or output_dir.resolve().name
        if name in OWN_IDS:
            told[name][OWN_IDS[name]] = ids.get(name) or "".join(secrets.choice(_ID_LETTERS) for _ in range(21))
        if name in RESUMING:
            told[name]["resume"] = "allow"
        if name in GIVEN_IDS and name in ids:
            told[name][GIVEN_IDS[name]] = ids[name]
    if "tensorboard" in names and step is not None:
        told["tensorboard"]["purge_step"] = step + 1  # what came after, and is trained again, is not shown
    return told


def remember(accelerator: Accelerator, told: dict[str, dict[str, Any]], output_dir: Path) -> None:
    """Keep the ids of the runs that have begun. Main process only."""
    ids = {name: values[OWN_IDS[name]] for name, values in told.items() if name in OWN_IDS}
    if "mlflow" in told:
        ids["mlflow"] = accelerator.get_tracker("mlflow").active_run.info.run_id
    if ids:
        write_json(output_dir / IDS, ids)


def new_ones(names: list[str]) -> list[str]:
    """Trackers of which a run that goes on begins a new run."""
    return [name for name in names if name not in CONTINUED]


def _ids(output_dir: Path) -> dict[str, str]:
    file = output_dir / IDS
    try:
        ids = read_json(file)
    except FileNotFoundError:  # of a run without one of these trackers
        return {}
    except (OSError, ValueError) as error:
        if is_main():
            print(f"warning: {file} can't be read ({one_line(error)}): the trackers begin new runs", file=sys.stderr)
        return {}
    return {name: value for name, value in ids.items() if isinstance(value, str)}


__all__ = ["IDS", "check_trackers", "continued", "named_trackers", "new_ones", "remember", "settings"]
