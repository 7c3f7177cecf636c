"""What every benchmark records and how it ends: a table in JSON, and `NAME ratio=X` as its last line."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "accelerate", "datasets")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flag that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the whole table to this file")
    return made


def circumstances() -> dict:
    """Machine, versions, commit and date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform()},
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _commit() -> str | None:
    """As git describes it; a copy without git is told by ALIBLIP_COMMIT."""
    if "ALIBLIP_COMMIT" in os.environ:
        return os.environ["ALIBLIP_COMMIT"]
    command = ["git", "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(
            command, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return described.stdout.strip() or None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def finish(name: str, ratio: float, table: dict, file: Path | None) -> None:
    """Write the table and print the last line."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"name": name, "ratio": ratio, **table, **circumstances()}, indent=2) + "\n")
    print(f"{name} ratio={ratio:.4g}")
