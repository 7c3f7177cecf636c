"""Flags that say where the data is, shared by all commands that read it."""

from __future__ import annotations

from dataclasses import dataclass

from aliblip.runtime.arguments import option


@dataclass
class DataArguments:
    """The table of photos and titles."""

    dataset_name: str | None = option(None, "Data set on the Hub, read by streaming.")
    dataset_config_name: str | None = option(None, "Configuration of the Hub data set.")
    data_dir: str | None = option(None, "Local folder: Parquet files, WebDataset tars or an image folder.")
    image_dir: str | None = option(
        None, "Folder of the photos that a JSON list or a column names (default: that of the list)."
    )
    image_column: str | None = option(None, "Column of the photo (default: image).")
    caption_column: str | None = option(None, "Column of the title (default: caption, then text).")
    product_id_column: str | None = option(
        None, "Column of the product; equal values are positives (default: product_id, otherwise each photo is one)."
    )
    dataloader_num_workers: int = option(2, "Processes that read and decode, per rank; 0: in the main process.")
