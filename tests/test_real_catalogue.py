"""Real photos and titles seen as a folder, a list with its photos, spreadsheets of paths and of addresses, and tars are
the same rows; and no product stands in two of their splits."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from http_stub import FileServer
from real_products import PRODUCTS, needs_products

from aliblip.data.inspection import leakage
from aliblip.data.rows import stored_photo
from aliblip.data.sources import open_source

pytestmark = needs_products
COLUMNS = ("product_id", "source", "category", "group_id")


def records(split: str) -> list[dict]:
    lines = (PRODUCTS / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def rows_of(split: str = "train", **named):
    """Of each row the digest of its photo, its title, its product and further columns."""
    source = open_source(split=split, product_id_column="product_id", other_columns=COLUMNS, **named)
    rows = []
    for row in source.read_range(0, source.num_rows):
        digest = hashlib.blake2b(stored_photo(row), digest_size=8).hexdigest()
        rows.append((digest, row.text, row.product_id, *(row.others[column] for column in COLUMNS)))
    return rows


def write_csv(path: Path, rows: list[dict], photo: str) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "title", *COLUMNS])
        writer.writerows([photo.format(row["file_name"]), row["caption"], *map(row.get, COLUMNS)] for row in rows)
    return str(path)


def write_tars(folder: Path, split: str, rows: list[dict]) -> None:
    size = len(rows) // 3 + 1
    for number in range(3):
        with tarfile.open(folder / f"{split}-{number:06d}.tar", "w") as tar:
            for row in rows[number * size : (number + 1) * size]:
                photo = (PRODUCTS / split / row["file_name"]).read_bytes()
                for name, data in ((row["file_name"], photo), (Path(row["file_name"]).stem + ".json", json.dumps(row))):
                    data = data if isinstance(data, bytes) else data.encode()
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def wanted() -> dict[str, list]:
    return {split: rows_of(split, data_dir=str(PRODUCTS)) for split in ("train", "validation")}


def test_the_folder_has_all_rows(wanted):
    for split, rows in wanted.items():
        assert [row[1] for row in rows] == [record["caption"] for record in records(split)]
        assert [row[3] for row in rows] == [record["product_id"] for record in records(split)]


def test_a_json_list_with_its_photos(wanted, tmp_path):
    for split, rows in wanted.items():
        named = [{"product": r.pop("file_name"), **r} for r in records(split)]
        (tmp_path / f"{split}.json").write_text(json.dumps(named))
        found = rows_of(split, data_files=str(tmp_path / f"{split}.json"), image_dir=str(PRODUCTS / split))
        assert found == rows


def test_a_spreadsheet_of_paths(wanted, tmp_path):
    for split, rows in wanted.items():
        file = write_csv(tmp_path / f"{split}.csv", records(split), f"{split}/{{}}")
        assert rows_of(split, data_files=file, image_dir=str(PRODUCTS)) == rows


def test_a_spreadsheet_of_addresses(wanted, tmp_path):
    some = slice(None, None, 5)
    with FileServer(PRODUCTS) as server:
        file = write_csv(tmp_path / "validation.csv", records("validation")[some], f"{server.url}/validation/{{}}")
        assert rows_of("validation", data_files=file, fetch_photos=True) == wanted["validation"][some]
        assert len(server.requests) == len(wanted["validation"][some])


def test_tars(wanted, tmp_path):
    for split in wanted:
        write_tars(tmp_path, split, records(split))
    for split, rows in wanted.items():
        assert rows_of(split, data_dir=str(tmp_path)) == rows


def test_no_product_and_no_photo_stands_in_two_splits():
    named = {"data_dir": str(PRODUCTS), "product_id_column": "group_id"}
    train, validation = (open_source(**named, split=split) for split in ("train", "validation"))
    found = leakage(train, validation)
    assert found.is_all and found.products == 0 and found.photos == 0 and found.compared == validation.num_rows
