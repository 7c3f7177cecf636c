"""The tables of `benchmarks/gpu.sh` on one page: `python benchmarks/gpu_summary.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    for name, section in (("checks", checks), ("steps", steps), ("rerank_tenth", rerank), ("rerank", rerank)):
        file = folder / f"gpu_{name}.json"
        print(f"\n## {name.replace('_', ', a ')}\n")
        print(section(json.loads(file.read_text())) if file.exists() else "no table was written")


def checks(table: dict) -> str:
    return "\n".join(f"- {name}: {one['result']}. {one['said']}" for name, one in table["checks"].items())


def steps(table: dict) -> str:
    lines = [
        f"{table['machine']['gpu']}, torch {table['versions']['torch']}, commit {table['commit']}; "
        f"a bf16 matrix product: {table['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s",
        "",
        "| precision | attention | batch | checkpointing | compiled | samples/s | MFU | memory, GB | busy | launches |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table["variants"]:
        cells = [row[name] for name in ("precision", "attention", "batch", "checkpointing", "compiled")]
        if "samples_per_second" in row:
            seen = row["profile"]
            cells += [f"{row['samples_per_second']:.1f}", f"{row['mfu']:.1%}", f"{row['peak_gb'] or 0:.1f}"]
            cells += [f"{seen['device_busy_ms'] / seen['wall_ms']:.0%}", seen["launches"]]
        else:
            cells += [row.get("failed") or row["not_run"], "", "", "", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    waits = next((row["waits"] for row in reversed(table["variants"]) if row.get("waits")), {})
    lines += ["", f"Waits for the device in one step: {sum(waits.values())}"]
    return "\n".join(lines + [f"- {place}: {count}" for place, count in waits.items()])


def rerank(table: dict) -> str:
    seconds = ", ".join(f"{stage} {took:.1f} s" for stage, took in table["seconds"].items())
    return (
        f"{table['num_images']:,} photos x {table['num_texts']:,} titles, k {table['k']}: {seconds}; "
        f"{table['pairs']:,} pairs, {table['flops_at_most'] / table['total_seconds'] / 1e12:.1f} TFLOP/s at most"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
