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


def _is_activated() -> bool:
    """Whether `python` is this Python, so that what is beside it is found by its name too."""
    found, ours = shutil.which("python"), Path(sys.executable).absolute()
    # An environment's `python3` is its `python`.
    return (
        found is not None and Path(found).absolute().parent == ours.parent and Path(found).resolve() == ours.resolve()
    )


def _typed(path: Path) -> str:
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def this_python() -> str:
    """How this Python is typed: `python` in an activated environment, else its path."""
    return "python" if _is_activated() else _typed(Path(sys.executable).absolute())


def install_hint(extra: str) -> str:
    """The command that installs what an extra of ours needs, such as "gallery", "heic" or "deepspeed".

    A checkout is installed in place; a wheel is named, and pip adds the extra to what is there. A bare `pip` may belong
    to another Python, so it is named only where `python` is this one.
    """
    pip = "pip" if _is_activated() else f"{this_python()} -m pip"
    if not is_checkout():
        return f'{pip} install "aliblip[{extra}]"'
    checkout = "." if Path.cwd() == ROOT else ROOT
    return f'{pip} install -e "{checkout}[{extra}]"'


def script_command(script: str) -> str:
    """How "train.py" or "evaluate_retrieval.py" is typed here: `python train.py`, or `aliblip-train` of a wheel."""
    if not is_checkout():
        name = _INSTALLED_NAMES[script]
        return name if _is_activated() else _typed(Path(sys.executable).absolute().with_name(name))
    return f"{this_python()} {_typed(ROOT / script)}"


def _run(script: str) -> None:
    runpy.run_path(str(ROOT / script), run_name="__main__")


def train() -> None:
    """The command `aliblip-train`."""
    _run("train.py")


def evaluate() -> None:
    """The command `aliblip-evaluate`."""
    _run("evaluate_retrieval.py")


__all__ = ["ROOT", "evaluate", "install_hint", "is_checkout", "script_command", "this_python", "train"]
