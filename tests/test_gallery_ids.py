"""What rows of any kind become in a gallery: numbers of files that have texts alone, ids of all sorts."""

from pathlib import Path

import gallery_case as case
import pytest
from gallery_case import build

from aliblip.data.columns import ALL
from aliblip.data.sources import open_source


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return case.photos(tmp_path_factory.mktemp("gallery") / "photos")


def test_numbers_of_a_csv_file_are_numbers(paths, tmp_path, caplog):
    """A CSV file has texts alone, and a filter by price needs a number."""
    lines = [
        "image;id;price;stock;code;note",
        f"{paths[0]};7;12.50;3;0100;",
        f"{paths[1]};8;9;;200;1",
        f"{paths[2]};9;-1.5; ;300;x",
    ]
    (tmp_path / "rows.csv").write_text("\n".join(lines))

    def opened(name: str):
        folder = str(Path(paths[0]).parent)
        return open_source(
            data_files=str(tmp_path / name), image_dir=folder, split="train", sides="images", other_columns=ALL
        )

    gallery = build(opened("rows.csv"), tmp_path / "g")
    kinds = {name: str(gallery.schema.field(name).type) for name in ("id", "price", "stock", "code", "note")}
    assert kinds == {"id": "string", "price": "double", "stock": "int64", "code": "string", "note": "string"}
    told = [gallery.get(["7", "8", "9"])[n][name] for name in ("price", "stock", "code") for n in range(3)]
    assert told == [12.5, 9.0, -1.5, 3, None, None, "0100", "200", "300"]
    assert "columns whose texts are all numbers are numbers in the gallery: price, stock" in caplog.text
    assert gallery.count("price < :most AND stock = 3", {"most": 20}) == 1
    # Rows of another file are put in with numbers too, and what is none is told; a gallery of numbered ids takes them.
    (tmp_path / "more.csv").write_text(f"image,id,price,stock,code\n{paths[3]},0010,7,1.5,1\n")
    model, processor = case.model_and_processor()
    report = gallery.upsert(opened("more.csv"), model=model, processor=processor)
    assert str(report) == (
        "rows inserted: 1; replaced: 0; values of another type than their column, which are left out: stock (1)"
    )
    assert gallery.get(["0010"])[0] | {"position": 0} == {
        **{"id": "0010", "position": 0, "price": 7.0, "stock": None, "code": "1", "note": None, "path": paths[3]}
    }
    numbered = build([{"image": paths[0], "id": 10, "price": 1}], tmp_path / "numbered")
    (tmp_path / "more.csv").write_text(f"image,id,price\n{paths[3]},10,7\n")
    assert numbered.upsert(opened("more.csv"), model=model, processor=processor).updated == 1
    assert numbered.get([10])[0]["price"] == 7
