"""Flags that say where the data is, shared by all commands that read it."""

from __future__ import annotations

from dataclasses import dataclass

from aliblip.data.columns import Reading
from aliblip.runtime.arguments import option
from aliblip.runtime.mistakes import UsageError

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "bar": "|", "pipe": "|"}


@dataclass
class TokenizerArguments:
    """A tokenizer that is learned from titles."""

    train_tokenizer: bool = option(False, "Learn the tokenizer, a WordPiece of any language, from the training titles.")
    tokenizer_vocab_size: int = option(30_000, "Tokens of a tokenizer that is learned, at most.")
    tokenizer_titles: int = option(1_000_000, "Titles that a tokenizer is learned from, at most, the first ones.")


@dataclass
class DataArguments:
    """The table of photos and titles."""

    dataset_name: str | None = option(None, "Data set on the Hub, read by streaming.")
    dataset_config_name: str | None = option(None, "Configuration of the Hub data set.")
    data_dir: str | None = option(None, "Local folder: Parquet files, WebDataset tars, tables, or photos.")
    image_dir: str | None = option(
        None, "Folder of the photos that a table names (default: where the table lies, or near it)."
    )
    image_column: str | None = option(None, "Column of the photo (default: image, then what people call it).")
    caption_column: str | None = option(
        None, "Column of the title (default: caption, then text, then what people call it)."
    )
    product_id_column: str | None = option(
        None, "Column of the product; equal values are positives (default: product_id, otherwise each photo is one)."
    )
    fetch_photos: bool = option(
        False, "Fetch the photos that a table names by address, each time that a row is read (default: not fetched)."
    )
    csv_delimiter: str | None = option(
        None, "Between the fields of CSV files: one character, or comma, semicolon, tab or bar (default: as found)."
    )
    csv_quotes: str | None = option(
        None,
        "A quote within a quoted field of CSV files is doubled, has a backslash before it, or quotes are text: none "
        "(default: as found).",
        choices=["doubled", "backslash", "none"],
    )
    csv_columns: str | None = option(None, "Names of the columns, with commas, of CSV files without a header.")
    encoding: str | None = option(
        None, "Encoding of tables and texts, such as cp1252 or gb18030 (default: Unicode, others as far as they tell)."
    )
    bad_lines: str = option(
        "refuse", "Lines of CSV files that are not rows: refuse the file, or skip them.", choices=["refuse", "skip"]
    )
    dataloader_num_workers: int = option(2, "Processes that read and decode, per rank; 0: in the main process.")

    @property
    def reading(self) -> Reading:
        """How tables are written, as far as the flags say.

        Raises:
            UsageError: a delimiter of several characters.
        """
        delimiter = self.csv_delimiter
        delimiter = DELIMITERS.get(delimiter, delimiter)
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise UsageError(
                f"--csv_delimiter is {self.csv_delimiter!r}: give one character, or comma, semicolon, tab or bar"
            )
        names = None if self.csv_columns is None else [name.strip() for name in self.csv_columns.split(",")]
        return Reading(delimiter, self.csv_quotes, names, self.encoding, self.bad_lines)
