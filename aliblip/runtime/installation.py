"""Where the package runs, a checkout or an installed wheel, and the commands that are right there.

A wheel holds `train.py` and `evaluate_retrieval.py` too, and starts them by the names `aliblip-train` and
`aliblip-evaluate`. They are found by their path: a `train.py` of the user's own is never taken for ours.
"""

from __future__ import annotations

import runpy
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout, or the site-packages that a wheel went to
_INSTALLED_NAMES = {"train.py": "aliblip-train", "evaluate_retrieval.py": "aliblip-evaluate"}


def is_checkout() -> bool:
    return (ROOT / "pyproject.toml").is_file()


def install_hint(extra: str) -> str:
    """The command that installs what an extra of ours needs: "gallery", "serve", "peft", "deepspeed", "tensorboard".

    A checkout is installed in place; a wheel is named, and pip adds the extra to what is there. A bare `pip` may belong
    to another Python, so it is named only where `python` is this one.
    """
    found = shutil.which("python")
    ours = found is not None and Path(found).absolute() == Path(sys.executable).absolute()
    pip = "pip" if ours else f"{shlex.quote(sys.executable)} -m pip"
    if not is_checkout():
        return f'{pip} install "aliblip[{extra}]"'
    checkout = "." if Path.cwd() == ROOT else ROOT
    return f'{pip} install -e "{checkout}[{extra}]"'


def script_command(script: str) -> str:
    """How "train.py" or "evaluate_retrieval.py" is typed here: `python train.py`, or `aliblip-train` of a wheel."""
    if not is_checkout():
        return _INSTALLED_NAMES[script]
    return f"python {script if Path.cwd() == ROOT else ROOT / script}"


def _run(script: str) -> None:
    runpy.run_path(str(ROOT / script), run_name="__main__")


def train() -> None:
    """The command `aliblip-train`."""
    _run("train.py")


def evaluate() -> None:
    """The command `aliblip-evaluate`."""
    _run("evaluate_retrieval.py")


__all__ = ["ROOT", "evaluate", "install_hint", "is_checkout", "script_command", "train"]
