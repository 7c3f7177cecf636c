"""What libraries would print into a run that goes well."""

from __future__ import annotations

import os

import datasets
import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils.logging import disable_progress_bar

from aliblip.runtime.distributed import launched_rank


def quiet_libraries() -> None:
    """Show no bars of libraries for what takes seconds, and no warning that there is no GPU.

    Downloads from the Hub take minutes: the first process keeps their bars.
    """
    downloads = launched_rank() == 0 and not are_progress_bars_disabled()
    disable_progress_bar()  # of transformers, and with it those of the Hub
    if downloads:
        enable_progress_bars()
    datasets.disable_progress_bars()
    if not torch.accelerator.is_available():
        # DeepSpeed, which transformers imports where it is installed, warns unless it is told.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


__all__ = ["quiet_libraries"]
