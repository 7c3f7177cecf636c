"""The last words of the demo: what came out, what it cost, and the command that searches with it.

python demo/what_next.py --started 1700000000 --python .venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path


def megabytes(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.0f} MB"


def last_words(demo: Path, seconds: float, python: str) -> list[str]:
    """The lines that end the demo.

    Args:
        demo: the folder that holds `catalogue` and `output`.
        seconds: that it took.
        python: how Python is typed.
    """
    catalogue, output = demo / "catalogue", demo / "output"
    results = json.loads((output / "evaluation" / "results.json").read_text())
    itc, itm = (f"{100 * results['text_to_image'][stage]['recall@1']:.1f} %" for stage in ("itc", "itm"))
    return [
        f"done in {seconds / 60:.0f} minutes; {catalogue} takes {megabytes(catalogue)}, {output} {megabytes(output)}",
        f"of {results['num_texts']} titles {itm} find their photo first ({itc} without re-ranking)",
        f"to look at: {output / 'contact_sheet.png'}, {output / 'report.html'}",
        "next, a page to search these photos with:",
        f"{python} -m aliblip.serve --model_name_or_path {output / 'best'} --gallery {catalogue} "
        f"--split_name {results['split']}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--started", type=float, required=True, help="when the demo began, in seconds since 1970")
    parser.add_argument("--python", default="python", help="how Python is typed (default: python)")
    args = parser.parse_args(argv)
    print(*last_words(Path("demo"), time.time() - args.started, args.python), sep="\n")


if __name__ == "__main__":
    main()
