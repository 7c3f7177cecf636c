"""Tables and folders as cameras, spreadsheets, Macs and `cat` leave them: read whole, or refused with the cause."""

import json
import unicodedata

import pytest
from drawing import (
    COUNT,
    NAMES,
    TITLES,
    draw,
    lines,
    open_at,
    opened,
    pairs,
    parquet,
    read,
    refused,
    told,
    whole,
)

from aliblip.data.places import Place, find_place
from aliblip.runtime.mistakes import UsageError


@pytest.mark.parametrize(("here", "there"), [(".png", ".PNG"), (".PNG", ".png"), (".Png", ".PNG")])
def test_endings_in_other_capitals_are_those_of_the_files(tmp_path, here, there):
    folder = draw(tmp_path / "own", [name.replace(".png", there) for name in [*NAMES, "extra.png"]])
    draw(tmp_path / "photos", reversed(NAMES))  # other photos of these names
    source = opened(folder, lines((name.replace(".png", here), title) for name, title in pairs()))
    whole(source)
    case = "upper" if there.isupper() else "lower"
    assert f"their endings are in {case} case, other than in the table" in told(source)
    if here != ".Png":
        assert f"left: photos that no row names: 1 (extra{there})" in told(source)
        assert "not in the folder" not in told(source)


def test_photos_beside_are_not_taken_for_those_that_are_there_in_other_capitals(tmp_path):
    """A neighbour may hold other products under the same numbers."""
    folder = draw(tmp_path / "own", [f"IMG_{name}" for name in NAMES])
    draw(tmp_path / "photos", [f"img_{name}" for name in reversed(NAMES)])
    source = opened(folder, lines((f"img_{name}", title) for name, title in pairs()))
    found, reasons = read(source)
    assert not found and len(reasons) == COUNT and "there is 'IMG_00.png', with other capitals" in reasons[0]
    assert find_place(["x.png"], Place(str(folder)), [str(tmp_path / "photos")]) == (Place(str(folder)), None)


@pytest.mark.parametrize(("of_photos", "of_texts"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
def test_texts_beside_photos_whose_letters_are_stored_otherwise(tmp_path, of_photos, of_texts):
    names = [f"café {i:02d}" for i in range(COUNT)]
    draw(tmp_path, [unicodedata.normalize(of_photos, f"{name}.png") for name in names])
    for name, title in zip(names, TITLES, strict=True):
        (tmp_path / unicodedata.normalize(of_texts, f"{name}.TXT")).write_text(title)
    whole(open_at(tmp_path))


def test_photos_of_both_forms_keep_their_own_texts(tmp_path):
    both = [unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD")]
    draw(tmp_path, [*both, "c.png"])
    for name in both:
        (tmp_path / name.replace(".png", ".txt")).write_text(str(len(name)))
    found, _ = read(open_at(tmp_path))
    assert sorted(found) == [(0, "8"), (1, "9")]


def test_a_table_in_two_encodings_is_refused_as_such(tmp_path):
    """One encoding for all would make wrong letters of the others without a word."""
    draw(tmp_path)
    text = lines(pairs()).encode().splitlines(keepends=True)
    text[3], text[5] = "02.png,crème brûlée\n".encode("cp1252"), "04.png,crème\n".encode()
    message = refused(tmp_path, b"".join(text))
    assert (
        "in several encodings: of its lines with letters beyond ASCII 1 are in UTF-8, and 1 are not (line 4" in message
    )
    assert "most likely cp1252: '" in message and "crème" in message and message.endswith("all of it in UTF-8")
    text[3] = text[4]
    assert len(read(opened(tmp_path, b"".join(text)))[0]) == COUNT


@pytest.mark.parametrize(
    "above", ["# exported 2024\n", "Products of our shop, 2024\n\n", "sep=,\nReport\n", '"A, B"\n']
)
def test_lines_above_the_columns_are_named(tmp_path, above):
    draw(tmp_path)
    message = refused(tmp_path, above + lines(pairs()))
    assert f"the columns are named on line {above.count(chr(10)) + 1}, and above stands '" in message
    whole(opened(tmp_path, above.rpartition("Report")[0] + lines(pairs()) if "sep" in above else lines(pairs())))


def test_values_that_are_called_as_columns_are_no_header(tmp_path):
    draw(tmp_path)
    rows = [(name, title, "image", "title") for name, title in pairs()]
    (tmp_path / "rows.csv").write_text(lines(rows, ("my_photo", "my_title", "a", "b")))
    whole(open_at(tmp_path, image_column="my_photo", caption_column="my_title"))


def test_files_that_were_joined_keep_their_marks_out_of_the_names(tmp_path):
    draw(tmp_path)
    text = lines(pairs()).encode("utf-8-sig").splitlines(keepends=True)
    whole(opened(tmp_path, b"".join([*text[:5], b"\xef\xbb\xbf" + text[5], *text[6:]])))


def test_values_in_the_names_of_folders_are_told(tmp_path):
    parquet(tmp_path / "color=red" / "part-0.parquet", range(6))
    parquet(tmp_path / "color=wine red" / "part-0.parquet", range(6, 12))
    source = open_at(tmp_path)
    whole(source)
    assert "'color' in the names of folders (color=red, 2 values) is not read as a column: write it into" in told(
        source
    )


def test_a_data_set_that_was_saved_to_the_disk_is_told_how_to_be_used(tmp_path):
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    with pytest.raises(UsageError, match=r"load_from_disk\(FOLDER\).to_parquet\(FILE\)"):
        open_at(tmp_path)


def test_a_column_of_splits_is_told_to_divide_nothing(tmp_path):
    """Else rows to test on are trained on without a word."""
    draw(tmp_path)
    rows = [(name, title, ("train", "test")[i % 2], "x") for i, (name, title) in enumerate(pairs())]
    source = opened(tmp_path, lines(rows, ("file_name", "caption", "data_split", "splitting")))
    whole(source)
    (note,) = (line for line in source.told if "divides nothing" in line)
    assert note.startswith("the column 'data_split' divides nothing: all rows are read as 'train' (python -m aliblip.")
    (tmp_path / "metadata.csv").unlink()
    images = [{"filename": name, "split": "train", "sentences": [{"raw": title}]} for name, title in pairs()]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    source = open_at(tmp_path)
    whole(source)
    assert "divides nothing" not in told(source) and "their key 'split'" in told(source)
