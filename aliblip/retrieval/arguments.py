"""Flags of `evaluate_retrieval.py`."""

from __future__ import annotations

from dataclasses import dataclass

from aliblip.data.arguments import DataArguments
from aliblip.runtime.arguments import option


@dataclass
class EvaluationDataArguments(DataArguments):
    split_name: str = option("validation", "Split to evaluate.")
    data_files: str | None = option(None, "Instead of a data set: a file or glob, a JSON list of pairs too.")
    gallery: str | None = option(
        None, "Photos to search, without titles: a folder of photos, a file or glob as --data_files, or a Hub data set."
    )
    queries: str | None = option(
        None, "Titles to search for in --gallery: a text file (one a line), JSON, CSV, Parquet, or a Hub data set."
    )


@dataclass
class EvaluationArguments:
    """How to evaluate."""

    model_name_or_path: str | None = option(None, "Folder or Hub name of the model (required).")
    output_dir: str | None = option(None, "Folder for the results (default: evaluation/ in that of a local model).")
    overwrite_output_dir: bool = option(
        False, "Replace results of another model or data set in the output folder, and drop unfinished work there."
    )
    image_size: int | None = option(None, "Side of the photos in pixels (default: the model's).")
    k_rerank: str | None = option(
        None,
        "Candidates that ITM re-ranks (default: 128, or the gallery where smaller). Several, 16,32,64: each is "
        "measured. all: every pair is scored, its match logits go to itm_logits.npy.",
    )
    score: str = option(
        "fused",
        "What orders the candidates: fused (match logit + weight x ITC similarity), itm, or itc (no re-ranking).",
        choices=["fused", "itm", "itc"],
    )
    fusion_weight: float | None = option(
        None, "Weight of the ITC similarity in the fused score (default: the model's, 1 if it was never tuned)."
    )
    tune_fusion: str | None = option(
        None,
        "Choose the weight on this split (with --data_files: this file) first, and store it with the model; not on the "
        "one that is measured.",
    )
    tune_probability: str | None = option(
        None,
        "Fit the match probability to the re-ranked candidates of this split (with --data_files: this file) first, and "
        "store that with the model; not to those of the one that is measured.",
    )
    per_device_eval_batch_size: int = option(32, "Rows encoded at a time.")
    rerank_batch_tokens: int | None = option(
        None, "Text tokens of one re-ranking pass (default: what the memory holds, at most 8192, on a GPU 65536)."
    )
    image_token_memory_gb: float | None = option(
        None, "Host memory of a process for image tokens; others are encoded twice (default: half of what is free)."
    )
    mixed_precision: str | None = option(None, "no or bf16 (default: as the launcher says).", choices=["no", "bf16"])
    slices: str | None = option(
        None, "Also split the results by these columns, separated by commas; title_length and script are always there."
    )
    compare: str | None = option(
        None, "results.json of another run on the same data: is the difference more than chance?"
    )
    contact_sheet: str | None = option(None, "Draw queries with their best photos into this PNG or JPEG file.")
    contact_sheet_rows: str | None = option(
        None, "Rows of the titles to draw, separated by commas (default: chosen at random)."
    )
    report: str | None = option(None, "Write one HTML page with the results, recall curves, misses and hits here.")
    submission: str | None = option(None, "Write the competition's answer file, the best photos of each title, here.")
    submission_stringified: bool = option(False, "Write its lists as text, as the published solution did.")
    verify_submission: str | None = option(
        None, "Only check this answer file against the titles and photos of the data; no model is needed."
    )
    dry_run: bool = option(False, "Only print memory, work and expected time.")
    seed: int = option(0, "Seed of the choice of queries for the contact sheet.")

    @property
    def tuning_flags(self) -> list[str]:
        """Which of the flags that name another split to tune on were given."""
        return [flag for flag in ("tune_fusion", "tune_probability") if getattr(self, flag)]

    @property
    def tuning_split(self) -> str | None:
        return self.tune_fusion or self.tune_probability
