"""The command `python -m aliblip.gallery`: one process or several, and what it says."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import gallery_case as case
import pytest
import s3_stub
import tiny
from datasets import Dataset
from gallery_case import BROKEN, COUNT, build
from helpers import assert_succeeded, launch, run_forked

from aliblip import Gallery, gallery
from aliblip.gallery import main
from aliblip.runtime.mistakes import UsageError, main_with_usage_errors

# Of readers, which are forks that never touch a table.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model in a folder."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.spread_model(vocab_size=20).save_pretrained(folder)  # as many words as the tokenizer has
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return case.photos(tmp_path_factory.mktemp("gallery") / "photos")


@pytest.fixture(scope="module")
def catalogue(paths, tmp_path_factory):
    """Lines of JSON that name the photos, with columns."""
    file = tmp_path_factory.mktemp("catalogue") / "rows.jsonl"
    rows = [{**row, "image": Path(row["image"]).name} for row in case.rows_of(paths)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(*arguments) -> list[str]:
    return [*map(str, arguments), "--unit_size", "4", "--per_device_eval_batch_size", "2"]


def run_command(*arguments, **options):
    return run_forked([sys.executable, "-m", "aliblip.gallery", *map(str, arguments)], **options)


def same_rows(one, other):
    assert one._now().dataset.to_table().equals(other._now().dataset.to_table())


def test_the_command_gives_the_same_gallery_with_any_number_of_processes(saved, paths, catalogue, tmp_path):
    given = ["--model_name_or_path", saved, "--data_files", catalogue, "--image_dir", Path(paths[0]).parent]
    given += ["--store_tokens", "--thumbnails", 24, "--index_columns", "price,category"]
    one = run_command(*command(*given, "--output_dir", tmp_path / "one"))
    assert_succeeded(one)
    printed = one.stdout.splitlines()
    assert printed[0] == f"{catalogue} (train): {COUNT} rows"
    plan = printed.index(f"{COUNT} photos; vectors: 1.34 kB; image tokens: 22.8 kB")
    assert printed[plan + 1] == (
        "columns: price (double), category (string), stock (int64), tags (list<item: string>), "
        "size (struct<width: int64, unit: string>); ids: the column id"
    )
    assert "20 rows: no index of the vectors, exact search is fast enough; indexed for filters: " in one.stdout
    assert f"  skipped row {BROKEN}, '005.png': the file is not an image of a known format" in one.stdout
    assert (
        f"Gallery of 20 photos, 16 wide, with image tokens: {tmp_path / 'one'}; rows that could not be used: 1"
        in one.stdout
    )
    assert printed[-1] == f"next: python -m aliblip.serve --model_name_or_path {saved} --gallery {tmp_path / 'one'}"
    assert "Warning" not in one.stderr
    two = launch("cpu_2_processes.yaml", "-m", ["aliblip.gallery", *command(*given, "--output_dir", tmp_path / "two")])
    assert_succeeded(two)
    assert "2 processes" in two.stdout and two.stdout.count("written: ") == 1
    made = Gallery.open(tmp_path / "one")
    same_rows(made, Gallery.open(tmp_path / "two"))
    expected = build(case.rows_of(paths), tmp_path / "python", store_tokens=True, thumbnails=24)
    for name in ("id", "price", "size", "thumbnail"):
        columns = [one._now().dataset.to_table(columns=[name]) for one in (made, expected)]
        assert columns[0].equals(columns[1]), name
    again = run_command(*command(*given, "--output_dir", tmp_path / "one"))
    assert again.returncode == 2 and again.stderr.strip().splitlines()[-1] == (
        f"aliblip.gallery: error: {tmp_path / 'one'} holds a gallery: give a new place (--output_dir), "
        "put rows into it (--upsert), or --overwrite_output_dir to replace it"
    )


def test_a_folder_of_photos_then_changes(saved, paths, catalogue, tmp_path, capsys):
    place = tmp_path / "my gallery"
    model = ["--model_name_or_path", str(saved)]
    assert main(command(*model, "--data_dir", Path(paths[0]).parent, "--output_dir", place)) == 0
    printed = capsys.readouterr().out
    assert "columns: none; ids: names of the photos" in printed
    assert f"--gallery {shlex.quote(str(place))}" in printed
    made = Gallery.open(place)
    assert case.ids_of(made) == [Path(path).name for n, path in enumerate(paths) if n != BROKEN]
    assert made.photo(made.get(["000.png"])[0]).size == (40, 30)

    rows = [{"image": "000.png", "id": "000.png"}, {"image": "001.png", "id": "new", "x": 1}]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [*model, "--data_files", tmp_path / "new.jsonl", "--image_dir", Path(paths[0]).parent, "--id_column", "id"]
    assert main(command(*given, "--output_dir", place, "--upsert")) == 0
    printed = capsys.readouterr().out
    assert f"rows of the data: 2; Gallery of 20 photos, 16 wide: {place}" in printed
    assert "rows inserted: 1; replaced: 1; columns that the gallery does not have, which are left out: x (1)" in printed
    assert "Gallery of 21 photos" in printed

    assert main(["--output_dir", str(place), "--remove_where", "id IN ('new', '001.png') OR id = 'none'"]) == 0
    assert capsys.readouterr().out == f"rows removed: 2; Gallery of 19 photos, 16 wide: {place}\n"
    assert main(["--output_dir", str(place), "--optimize"]) == 0
    assert capsys.readouterr().out == f"optimized: Gallery of 19 photos, 16 wide: {place}\n"
    assert len(made) == 19


def test_rows_of_a_data_set_keep_their_ids_and_photos_inside_it_are_told(saved, tmp_path, capsys):
    table = tmp_path / "rows.parquet"
    rows = {"image": [], "caption": tiny.titles(9), "sku": [f"sku {number}" for number in range(9)], "price": [1.5] * 9}
    for path in tiny.photos(tmp_path / "photos", 9):
        rows["image"].append({"bytes": Path(path).read_bytes(), "path": None})
    Dataset.from_dict(rows).to_parquet(table)
    given = ["--model_name_or_path", saved, "--data_files", table, "--id_column", "sku", "--columns", "price,caption"]
    for kind in ("image", "text"):
        assert main(command(*given, "--kind", kind, "--output_dir", tmp_path / kind)) == 0
        printed = capsys.readouterr().out
        assert (
            "note: the photos lie inside the data: to show them, and to re-rank by them, add --thumbnails 384"
            in (printed)
        ) == (kind == "image")
        made = Gallery.open(tmp_path / kind)
        assert case.ids_of(made) == rows["sku"] and made.kind == kind and made.columns == ["price", "caption"]
    assert made.get(["sku 3"])[0]["text"] == rows["caption"][3]
    assert re.search(r'next: pipe\("photo.jpg", gallery=".*text"\)', printed)


def test_an_index_by_name_and_none(saved, paths, catalogue, tmp_path, capsys):
    given = ["--model_name_or_path", str(saved), "--data_dir", Path(paths[0]).parent]
    assert main(command(*given, "--output_dir", tmp_path / "flat", "--index", "IVF_FLAT", "--measure_recall", 5)) == 0
    assert "20 rows: IVF_FLAT, num_partitions 4" in (printed := capsys.readouterr().out)
    assert "recall@10 1.0000 of exact search" in printed and Gallery.open(tmp_path / "flat").has_index
    given = ["--model_name_or_path", saved, "--data_files", catalogue, "--image_dir", Path(paths[0]).parent]
    columns = ["--index", "none", "--index_columns", "price"]
    assert main(command(*given, "--output_dir", tmp_path / "none", *columns)) == 0
    assert "indexed for filters: id, price" in capsys.readouterr().out
    assert not Gallery.open(tmp_path / "none").has_index
    assert main(command(*given, "--output_dir", tmp_path / "bare", "--index", "none")) == 0
    assert "indexed" not in capsys.readouterr().out


def test_a_gallery_at_an_address(saved, paths, catalogue, tmp_path, capsys):
    given = ["--model_name_or_path", saved, "--data_files", catalogue, "--image_dir", Path(paths[0]).parent]
    assert main(command(*given, "--output_dir", tmp_path / "folder")) == 0
    with s3_stub.ObjectStore() as store:
        place = ["--uri", "s3://bucket/mine", "--storage_options", json.dumps(store.storage_options)]
        assert main(command(*given, *place, "--parts_dir", tmp_path / "parts")) == 0
        assert "written: s3://bucket/mine" in capsys.readouterr().out
        made = Gallery.open("s3://bucket/mine", storage_options=store.storage_options)
        same_rows(made, Gallery.open(tmp_path / "folder"))
        assert main([*place, "--remove_where", "price < 3"]) == 0
        assert "rows removed: 2" in capsys.readouterr().out and len(made.refresh()) == COUNT - 3
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_dir": None}, "--output_dir is missing: give the folder of the gallery or its address"),
        ({"uri": "s3://bucket/x"}, "--output_dir and --uri are both given"),
        ({"output_dir": None, "uri": "folder"}, "--uri is folder, which is no address: give a folder as --output_dir"),
        ({"storage_options": '{"region": "x"}'}, "--storage_options belong to an address: give --uri"),
        ({"storage_options": "region"}, "--storage_options is not valid JSON"),
        ({"model_name_or_path": None}, "--model_name_or_path is missing"),
        ({"model_name_or_path": "nowhere"}, "nowhere"),
        ({"data_dir": "nowhere"}, "nowhere"),
        ({"product_id_column": "sku"}, "the ids of a gallery are --id_column"),
        ({"id_column": "sku"}, "no column 'sku' .--id_column."),
        ({"columns": "price, colour"}, "no column 'price'"),
        ({"index_columns": "colour"}, "--index_columns: the gallery will have no column 'colour', but none"),
        ({"index": "IVF_PQ"}, "takes 256 rows, the gallery has 21"),
        ({"index": "FAISS"}, "invalid choice: 'FAISS'"),
        ({"unit_size": 0}, "--unit_size is 0"),
        ({"thumbnails": 3}, "--thumbnails is 3: give the longest side"),
        ({"kind": "text", "store_tokens": True}, "--store_tokens: titles have no image tokens"),
        ({"upsert": True, "overwrite_output_dir": True}, "leave --overwrite_output_dir out"),
        ({"upsert": True, "thumbnails": 24}, "--upsert keeps what the gallery keeps"),
        ({"upsert": True}, "gallery does not exist: give the folder of a gallery"),
        ({"upsert": True, "remove_where": "x"}, "--upsert and --remove_where are both given"),
        ({"remove_where": "id = 3"}, "gallery does not exist"),
    ],
)
def test_mistakes_of_the_command_are_one_line(given, message, saved, paths, tmp_path):
    fine = {"model_name_or_path": saved, "data_dir": Path(paths[0]).parent, "output_dir": tmp_path / "gallery"}
    arguments = [f"--{name}={value}" for name, value in (fine | given).items() if value is not None]
    with pytest.raises(UsageError, match=message) as raised:
        main(arguments)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "gallery").exists()


def test_ids_that_come_twice_are_told_in_the_words_of_the_command(saved, paths, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"image": "000.png", "id": 7}) + "\n" + json.dumps({"image": "001.png", "id": 7})
    )
    monkeypatch.setattr(gallery, "load_pretrained", None)  # before the model is loaded
    given = [
        "--model_name_or_path",
        saved,
        "--data_files",
        tmp_path / "rows.jsonl",
        "--image_dir",
        Path(paths[0]).parent,
    ]
    with pytest.raises(UsageError) as raised:
        main(command(*given, "--output_dir", tmp_path / "g"))
    assert str(raised.value) == (
        "some ids come twice (the column 'id'): 7. Make them unique, name another column with --id_column, or "
        "keep the first of each with --duplicates first"
    )


def test_a_bug_keeps_its_traceback(saved, paths, tmp_path, monkeypatch, capsys):
    def planted(*_, **__):
        raise ValueError("planted")

    given = command("--model_name_or_path", saved, "--data_dir", Path(paths[0]).parent, "--output_dir", tmp_path / "g")
    monkeypatch.setattr(gallery.Build, "run", planted)
    with pytest.raises(ValueError, match="planted"):
        main_with_usage_errors("aliblip.gallery", lambda: main(given))
    monkeypatch.undo()
    with pytest.raises(SystemExit) as ended:
        main_with_usage_errors("aliblip.gallery", lambda: main([*given, "--unit_size", "-1"]))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "aliblip.gallery: error: --unit_size is -1: give a whole number of at least 1\n"


def test_a_disk_that_is_full_is_told_before_the_work(saved, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    given = command("--model_name_or_path", saved, "--data_dir", Path(paths[0]).parent, "--output_dir", tmp_path / "g")
    with pytest.raises(UsageError, match="the gallery takes 1.34 kB, 10 B are free in .*: give another --output_dir"):
        main(given)
