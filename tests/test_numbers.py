"""Which columns of files that hold texts alone are numbers: the same in a gallery and in a prepared catalogue."""

import random

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from prepare_case import files_of, needs_prepare, picture, rows_of

from aliblip.data.cell_types import Likeness, like_texts, number_in, types_of_texts
from aliblip.data.columns import ALL
from aliblip.data.sources import open_source
from aliblip.prepare import main
from aliblip.retrieval.table_columns import kept_columns

# Texts of a column, and its type.
COLUMNS = {
    "price": (["12.50", "7", "", "-0.5"], "double"),
    "stock": (["3", " 12 ", None, "0"], "int64"),
    "views": (["5", "4006381333931", "12", "1"], "int64"),  # long, but not all of them
    "size": (["0100", "200", "300", "400"], "string"),
    "contact": (["4915112345678", "4915112345679", "", "15551234567"], "string"),
    "article": (["4006381333931", "4006381333948", "96385074000", ""], "string"),
    "intl": (["+49151", "12", "13", "14"], "string"),
    "serial": (["1234567890123456", "1", "2", "3"], "string"),  # a fraction beside it could not be kept
    "kosten": (["12,50", "1.234,56", "7", "8"], "string"),
    "cost": (["1,234.56", "7", "8", "9.5"], "string"),
    "note": (["1", "n/a", "2", "3"], "string"),
    "empty": (["", None, " ", ""], "string"),
    "digits": (["\N{ARABIC-INDIC DIGIT FIVE}", "1", "2", "3"], "string"),
    "exponent": (["1e5", "1", "2", "3"], "string"),
}


def test_a_column_is_numbers_where_all_of_its_texts_are():
    for seed in range(5):
        likeness = {}
        for name, (texts, _) in COLUMNS.items():
            texts = random.Random(seed).sample(texts, len(texts))
            likeness[name] = like_texts(like_texts(Likeness.BLANK, texts[:1]), texts[1:])
        types, told = types_of_texts(likeness)
        assert {name: str(kind) for name, kind in types.items()} == {name: kind for name, (_, kind) in COLUMNS.items()}
        assert told == [
            "numbers, since all of their texts are: price, stock, views",
            "texts, since ids and codes are no numbers: contact, article",
            "texts, since their numbers have commas or gaps: kosten, cost (write 1234.56 to compare them with numbers)",
        ]
    for name, kind in types.items():
        if str(kind) != "string":
            pa.array([number_in(text) for text in COLUMNS[name][0]], kind)


@pytest.mark.parametrize(
    "name", ["id", "productId", "PRODUCT_ID", "EAN", "ean13", "article number", "Phone 2", "zip", "my"]
)
def test_ids_and_codes_stay_texts_whatever_they_look_like(name):
    likeness = {name: Likeness.WHOLE}
    types, told = types_of_texts(likeness, ids=["my"])
    assert types == {name: pa.string()} and told == [f"texts, since ids and codes are no numbers: {name}"]
    assert types_of_texts({name: Likeness.TEXT}, ids=["my"]) == ({name: pa.string()}, [])


@pytest.mark.parametrize("name", ["number", "paid", "grid", "idle", "decoded", "codes_count", "Preis", "no"])
def test_other_names_are_no_codes(name):
    assert types_of_texts({name: Likeness.WHOLE})[0] == {name: pa.int64()}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Twelve rows, of which the last ones say what the first ones do not; one has no photo."""
    folder = tmp_path_factory.mktemp("numbers")
    lines = ["image,title,item,price,stock,ean,code,late,lost"]
    for number in range(12):
        picture(number).save(folder / f"{number}.jpg")
        late = "n/a" if number == 11 else number
        lost = "unknown" if number == 4 else number
        price = "" if number == 3 else number * 10 if number < 6 else f"{number}.25"
        lines.append(
            f"{number}.jpg,title {number},{number // 2},{price},{number},40063813339{number:02d},{number},{late},{lost}"
        )
    (folder / "4.jpg").write_bytes(b"no photo")
    (folder / "rows.csv").write_text("\n".join(lines))
    return folder / "rows.csv"


@needs_prepare
def test_a_prepared_table_has_the_types_of_its_gallery_however_it_was_cut(table, tmp_path, capsys):
    source = open_source(data_files=str(table), split="train", product_id_column="item", other_columns=ALL)
    kept = kept_columns(source, columns=None, id_column=None, flag=str, kind="image")
    wanted = {"price": "double", "stock": "int64", **dict.fromkeys(("item", "ean", "code", "late", "lost"), "string")}
    assert {name: str(kept.types[name]) for name in wanted} == wanted
    flags = ["--train_file", table, "--product_id_column", "item", "--near_duplicates", "false", "--for_ranks", "1"]
    made = {}
    for rows_per_task, workers in ((2, 1), (2, 2), (5, 1), (100, 1)):
        out = tmp_path / f"{rows_per_task}-{workers}" / "out"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("aliblip.data.prepare_card._Titles.languages", lambda titles: ())
            main(list(map(str, [*flags, "--rows_per_task", rows_per_task, "--workers", workers, "--output_dir", out])))
        told = capsys.readouterr().out
        assert "numbers, since all of their texts are: price, stock\n" in told
        assert "texts, since ids and codes are no numbers: item, ean, code\n" in told
        prepared = open_source(data_dir=str(out), split="train", other_columns=ALL).schema_of_others()
        assert {name: str(prepared.field(name).type) for name in wanted} == wanted
        made[rows_per_task, workers] = files_of(out)
        rows = rows_of(out)
        assert [row["price"] for row in rows] == [0, 10, 20, None, 50, 6.25, 7.25, 8.25, 9.25, 10.25, 11.25]
        assert rows[1]["ean"] == "4006381333901" and [row["late"] for row in rows[-2:]] == ["10", "n/a"]
        assert pc.sum(pc.less(pa.array([row["price"] for row in rows]), 20)).as_py() == 8
    assert made[2, 1] == made[2, 2]
