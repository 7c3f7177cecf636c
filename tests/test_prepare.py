"""python -m aliblip.prepare: every row arrives or is accounted for, whatever form it came in, however it is stopped."""

import gc
import io
import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import psutil
import pyarrow.parquet as pq
import pytest
from data_stub import NAMES, write_layouts
from datasets import load_dataset
from helpers import run_forked, start_forked
from PIL import Image
from prepare_case import draw, encoded, files_of, needs_prepare, picture, rejected_of, rows_of

from aliblip.data.prepare_parts import PartWriter
from aliblip.data.prepare_photos import THUMB_SIDE, PreparedPhoto
from aliblip.data.prepare_shards import write_shard
from aliblip.data.rows import decode
from aliblip.data.sources import open_source
from aliblip.prepare import check_installed, main
from aliblip.runtime.mistakes import UsageError, main_with_usage_errors

pytestmark = needs_prepare
ALONE = ("--workers", "1", "--near_duplicates", "false")


def prepare(output, *flags, languages=False):
    """The command in this process; guessing the languages of the titles takes longest."""
    with pytest.MonkeyPatch.context() as patch:
        if not languages:
            patch.setattr("aliblip.data.prepare_card._Titles.languages", lambda titles: ())
        return main([*map(str, flags), "--output_dir", str(output)])


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("catalogue"), 60)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    return write_layouts(tmp_path_factory.mktemp("layouts"), 11)


def flags_of(arguments):
    """Arguments of `open_source` as flags."""
    files = arguments.get("data_files")
    named = {key: value for key, value in arguments.items() if key != "data_files"}
    if files is not None:
        named["train_file"] = files if isinstance(files, str) else files[0]
    return [part for key, value in named.items() for part in (f"--{key}", value)]


@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_data_gives_its_rows(layouts, name, tmp_path):
    source = open_source(**layouts[name], split="train", other_columns="all")
    before = list(source.read_range(0, source.num_rows))
    prepare(tmp_path / "out", *flags_of(layouts[name]), *ALONE)
    rows = rows_of(tmp_path / "out")
    assert [row["source_row"] for row in rows] == list(range(11))
    for row, given in zip(rows, before, strict=True):
        example = decode(given)
        assert row["caption"] == example.text and row["product_id"] == example.product_id
        assert decode_bytes(row["image"]["bytes"]).tobytes() == example.image.tobytes()
        for column, value in given.others.items():
            if column not in ("product_id", source.selected.caption):
                assert row[column] == value


def decode_bytes(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_rows_are_kept_or_rejected_with_a_reason(catalogue, tmp_path):
    prepare(tmp_path / "out", *catalogue, *ALONE)
    rows, rejected = rows_of(tmp_path / "out"), rejected_of(tmp_path / "out")
    broken = [i for i in range(60) if i % 7 == 3]
    assert sorted(rejected) == broken
    assert set(rejected.values()) == {"the file is not an image of a known format"}
    assert [row["source_row"] for row in rows] == [i for i in range(60) if i not in broken]
    # Bytes are as they were, and every column is there under its name or the name that was told.
    assert rows[1]["image"] == {"bytes": encoded(picture(1)), "path": "0001.jpg"}
    assert set(rows[1]) == {"image", "caption", "product_id", "product_id_given", "price", "source_row"}
    assert (rows[1]["price"], rows[1]["product_id_given"]) == (0.5, "P0")


def test_datasets_and_training_read_it(catalogue, tmp_path):
    prepare(tmp_path / "out", *catalogue, *ALONE, "--split_by", "product", "--split_shares", "validation=0.3")
    opened = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert set(opened) == {"train", "validation"}
    assert opened["train"][0]["image"].size == (96, 80)
    for split in opened:
        source = open_source(data_dir=str(tmp_path / "out"), split=split)
        assert [decode(row).text for row in source.read_range(0, source.num_rows)] == opened[split]["caption"]
        assert source.selected.product_id == "product_id"


def test_large_photos_become_smaller_and_the_others_stay(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    sizes = {"a.jpg": (400, 200), "b.jpg": (100, 128), "c.png": (50, 300)}
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, size in sizes.items():
        picture(1, size).save(photos / name, exif=turned)
    lines = ["file_name,caption", *(f"{name},thing {name}" for name in sizes)]
    (photos / "metadata.csv").write_text("\n".join(lines))
    prepare(tmp_path / "out", "--data_dir", photos, "--max_side", 128, *ALONE)
    rows = {row["image"]["path"]: row["image"]["bytes"] for row in rows_of(tmp_path / "out")}
    assert rows["b.jpg"] == (photos / "b.jpg").read_bytes()
    # As a person sees them: the exif turns width and height.
    assert Image.open(io.BytesIO(rows["a.jpg"])).size == (64, 128)
    assert Image.open(io.BytesIO(rows["c.png"])).size == (128, 21)
    small = decode(next(open_source(data_dir=str(tmp_path / "out"), split="train").read_range(0, 1))).image
    assert small.size == (64, 128)


def test_shards_are_a_multiple_of_their_readers_and_cut_by_their_content(catalogue, tmp_path, monkeypatch):
    written = []

    def writer(*given, **options):
        written.append(options)
        return pq.ParquetWriter(*given, **options)

    monkeypatch.setattr("aliblip.data.prepare_shards.pq", SimpleNamespace(**{**vars(pq), "ParquetWriter": writer}))
    flags = ["--for_ranks", "3", "--for_workers", "2", "--split_by", "product", "--split_shares", "test=0.2"]
    prepare(tmp_path / "out", *catalogue, *ALONE, *flags)
    names = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert names == ["test-00000-of-00001.parquet", *(f"train-{i:05d}-of-00006.parquet" for i in range(6))]
    sizes = [len(rows_of(tmp_path / "out", f"train-{i:05d}")) for i in range(6)]
    assert max(sizes) - min(sizes) <= 1
    assert len(written) == 7 and all(options["use_content_defined_chunking"] for options in written)
    with pq.ParquetFile(tmp_path / "out/data" / names[1]) as shard:
        assert shard.metadata.row_group(0).column(0).has_offset_index


def test_items_of_one_group_of_a_merchant_feed_are_one_product(tmp_path):
    header = ["id", "title", "link", "image link", "item group id"]
    lines = [[f"S{i}", f"Mug {i}", "https://x.example", f"https://x.example/{i}.jpg", f"G{i // 2}"] for i in range(6)]
    (tmp_path / "feed.tsv").write_text("\n".join("\t".join(line) for line in [header, *lines]))
    source = open_source(data_files=str(tmp_path / "feed.tsv"), split="train", fetch_photos=True)
    rows = list(source.read_range(0, 6))
    assert [row.stored_id for row in rows] == ["G0", "G0", "G1", "G1", "G2", "G2"]
    assert [row.image for row in rows] == [line[3] for line in lines]
    assert any("Google Merchant" in line for line in source.told)


# --- stopping and going on --------------------------------------------------------------------------------------------

FLAGS = ("--rows_per_task", "7", "--max_side", "64", "--split_by", "product", "--split_shares", "validation=0.2")
FLAGS += ("--train_tokenizer", "--tokenizer_vocab_size", "120")
# A command whose tasks take their time, so that it can be killed in each of its phases.
SLOW = """
import sys, time
from aliblip import prepare
from aliblip.data import prepare_parts, prepare_run, prepare_shards, prepare_steps
from aliblip.data.duplicates import Index

def slowed(function, seconds):
    def slow(*given, **named):
        time.sleep(seconds)
        return function(*given, **named)
    return slow

prepare_steps.BLOCK = prepare_run.BLOCK = 16
phase = sys.argv.pop(1)
if phase == "read":
    prepare_steps.prepare_photo = slowed(prepare_steps.prepare_photo, 0.05)
elif phase == "compare":
    Index.pairs = slowed(Index.pairs, 0.5)
elif phase == "write":
    prepare_steps.write_shard = slowed(prepare_steps.write_shard, 0.3)
elif phase == "place":
    prepare_run._remove = slowed(prepare_run._remove, 0.5)
sys.exit(prepare.main())
"""
# When each phase has begun, and is not yet at its end.
BEGUN = {
    "read": lambda out: len(list((out / "work/parts").glob("facts-*"))) >= 2,
    "compare": lambda out: len(list((out / "work/index").glob("pairs-*"))) >= 1,
    "write": lambda out: len(list((out / "work/data").glob("*.parquet"))) >= 2,
    "place": lambda out: (out / "data").is_dir(),
}


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("script") / "slow.py"
    file.write_text(SLOW)
    return file


@pytest.fixture(scope="module")
def undisturbed(catalogue, script, tmp_path_factory):
    """The files of a run with one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "prepared"
    result = run_forked([sys.executable, script, "-", *catalogue, *FLAGS, "--output_dir", out, "--workers", "1"])
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return files_of(out)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_result_does_not_depend_on_the_number_of_workers(catalogue, script, undisturbed, workers, tmp_path):
    out = tmp_path / "prepared"
    result = run_forked([sys.executable, script, "-", *catalogue, *FLAGS, "--output_dir", out, "--workers", workers])
    assert result.returncode == 0, result.stderr
    assert files_of(out) == undisturbed


def test_killed_in_every_phase_the_same_command_goes_on(catalogue, script, undisturbed, tmp_path):
    out = tmp_path / "prepared"
    given = [*catalogue, *FLAGS, "--output_dir", out, "--workers", "2"]
    noted = []
    for phase, has_begun in BEGUN.items():
        process = start_forked([sys.executable, script, phase, *given], {}, tmp_path / "out", tmp_path / "err")
        while not has_begun(out):
            assert process.poll() is None, (phase, (tmp_path / "err").read_text())
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        # Nobody works on for a command that is gone, and so the next one is alone.
        assert not psutil.wait_procs(workers, timeout=30)[1]
        noted.append(len(list((out / "work/logs").rglob("completions/*"))))
        assert (out / "prepared.json").is_file() is False
    assert noted == sorted(noted) and noted[0] >= 1, "finished tasks stay finished"
    result = run_forked([sys.executable, script, "-", *given])
    assert result.returncode == 0, result.stderr
    assert files_of(out) == undisturbed


def test_an_unfinished_task_leaves_nothing_that_counts(catalogue, undisturbed, tmp_path, monkeypatch):
    """A note without its output, as a disk that lost power leaves it, and half a file."""
    out = tmp_path / "prepared"

    def killed(work):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("aliblip.data.prepare_run.Preparation._prepare", killed)
        prepare(out, *catalogue, *FLAGS, "--workers", "1")
    (out / "work/logs/read/completions").mkdir(parents=True)
    (out / "work/logs/read/completions/00001").touch()
    (out / "work/parts").mkdir()
    (out / "work/parts/.facts-000001.parquet.1.partial").write_bytes(b"half")
    prepare(out, *catalogue, *FLAGS, "--workers", "1", languages=True)
    assert files_of(out) == undisturbed


def test_a_second_start_refuses_other_work_and_does_nothing_twice(catalogue, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(out, *catalogue, *ALONE)
    before = {name: (out / name).stat().st_mtime_ns for name in files_of(out)}
    capsys.readouterr()
    prepare(out, *catalogue, *ALONE)
    assert f"{out} is prepared already" in capsys.readouterr().out
    assert {name: (out / name).stat().st_mtime_ns for name in files_of(out)} == before
    with pytest.raises(UsageError, match=r"holds another prepared catalogue \(max_side was none, is 50\)"):
        prepare(out, *catalogue, *ALONE, "--max_side", 50)
    prepare(out, *catalogue, *ALONE, "--max_side", 50, "--overwrite_output_dir", "true")
    assert max(decode_bytes(row["image"]["bytes"]).width for row in rows_of(out)) == 50


def test_the_data_is_the_same_when_it_goes_on(catalogue, tmp_path):
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    (out / "work/made_from.json").write_text('{"data": ["other"]}')
    with pytest.raises(UsageError, match="holds unfinished work on something else"):
        prepare(out, *catalogue, *ALONE)


def test_two_commands_do_not_prepare_in_one_folder(catalogue, tmp_path):
    out = tmp_path / "out"
    prepare_slowly = "import sys, time; from pathlib import Path; from aliblip.runtime.owners import Owner\n"
    prepare_slowly += "Owner.of(Path(sys.argv[1]), 'python -m aliblip.prepare'); print('held')"
    (out / "work").mkdir(parents=True)
    (tmp_path / "hold.py").write_text(f"{prepare_slowly}; sys.stdout.flush(); time.sleep(600)")
    held = start_forked([sys.executable, tmp_path / "hold.py", out / "work"], {}, tmp_path / "o", tmp_path / "e")
    try:
        while "held" not in (tmp_path / "o").read_text() if (tmp_path / "o").exists() else True:
            time.sleep(0.01)
        with pytest.raises(UsageError, match="work is in use by python -m aliblip.prepare .process "):
            prepare(out, *catalogue, *ALONE)
    finally:
        os.kill(held.pid, signal.SIGKILL)
        held.wait(30)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_other_files_is_left_alone(catalogue, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        prepare(tmp_path, *catalogue, *ALONE)
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_a_folder_with_a_folder_called_work_is_left_alone(catalogue, tmp_path, overwrite):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        prepare(tmp_path, *catalogue, *ALONE, "--overwrite_output_dir", overwrite)
    assert (tmp_path / "work" / "thesis.txt").read_text() == (tmp_path / "README.md").read_text() == "mine"


def test_the_data_is_not_replaced_by_what_is_made_of_it(tmp_path):
    (tmp_path / "data").mkdir()
    flags = draw(tmp_path / "data", 6, broken=0)
    with pytest.raises(UsageError, match="holds other files"):
        prepare(tmp_path, *flags, *ALONE, "--overwrite_output_dir", "true")
    prepare(tmp_path / "first", *flags, *ALONE)
    (tmp_path / "first" / "mine").mkdir()
    within = draw(tmp_path / "first" / "mine", 6, broken=0)
    with pytest.raises(UsageError, match=r"the data, .*mine.*, lies in --output_dir"):
        prepare(tmp_path / "first", *within, *ALONE, "--overwrite_output_dir", "true")
    prepare(tmp_path / "out", *flags, *ALONE)
    (tmp_path / "out" / "card.html").unlink()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    prepare(tmp_path / "out", *flags, *ALONE, "--max_side", 50, "--overwrite_output_dir", "true")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine" and (tmp_path / "out" / "card.html").exists()


def test_other_ways_of_reading_make_another_catalogue(tmp_path):
    draw(tmp_path, 4, broken=0)
    lines = ["image;caption", *(f"{number}.jpg;caf\u00e9 {number}" for number in range(4))]
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.jpg")
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="cp1252")
    flags = ["--train_file", tmp_path / "t.csv", *ALONE]
    prepare(tmp_path / "out", *flags, "--encoding", "cp1252", "--csv_delimiter", ";")
    with pytest.raises(UsageError, match="holds another prepared catalogue"):
        prepare(tmp_path / "out", *flags, "--encoding", "cp1251", "--csv_delimiter", ";")


@pytest.mark.parametrize("rows_per_task", [2, 6, 100])
def test_values_stay_what_they_are_in_tasks_of_any_size(tmp_path, rows_per_task, capsys):
    rows = []
    for number in range(12):
        picture(number).save(tmp_path / f"{number}.jpg")
        long = 2**53 + 1 + number if number < 6 else 1.5
        price = number if number % 2 else "n/a"
        rows.append({"image": f"{number}.jpg", "caption": f"title {number}", "long": long, "price": price})
    (tmp_path / "t.json").write_text(json.dumps(rows))
    flags = ["--train_file", tmp_path / "t.json", "--rows_per_task", rows_per_task]
    prepare(tmp_path / "out", *flags, *ALONE)
    made = rows_of(tmp_path / "out")
    assert [row["long"] for row in made] == [str(row["long"]) for row in rows]
    assert [row["price"] for row in made] == [str(row["price"]) for row in rows]
    told = capsys.readouterr().out
    assert "'long'" in told and "'price'" in told and told.count("kept as text") == 2


def test_a_folder_within_the_data_is_refused(layouts):
    folder = layouts["folder"]["data_dir"]
    with pytest.raises(UsageError, match="lies in the data"):
        prepare(f"{folder}/out", "--data_dir", folder, *ALONE)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "no data given"),
        (["--max_side", "0"], "--max_side is 0"),
        (["--merge_duplicates", "nearly"], "--merge_duplicates is 'nearly': accepted are exact, near, titles"),
        (["--split_by", "time"], "--split_by time needs a column"),
        (["--split_by", "product", "--split_shares", "test"], "--split_shares is 'test'"),
        (["--executor_options", "{}"], "--executor_options are for --executor slurm or ray"),
        (["--train_tokenizer", "--tokenizer_name", "x"], "--train_tokenizer learns a tokenizer, and --tokenizer_name"),
        (["--tokenizer_vocab_size", "99"], "--tokenizer_vocab_size is 99"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, flags, told):
    with pytest.raises(UsageError, match=told.replace("(", r"\(")):
        prepare(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_bug_of_ours_keeps_its_traceback(catalogue, tmp_path, monkeypatch, capsys):
    def broken(*given):
        raise ValueError("a bug")

    monkeypatch.setattr("aliblip.data.prepare_steps.prepare_photo", broken)
    with pytest.raises(ValueError, match="a bug"):
        main_with_usage_errors("aliblip.prepare", lambda: prepare(tmp_path / "out", *catalogue, *ALONE))


def test_forks_share_what_was_there_before_them(catalogue, tmp_path, monkeypatch):
    """A full collection in a fork would write to every object, and copy the pages of all."""
    frozen = []

    def writing(*given):
        frozen.append(gc.get_freeze_count())
        return write_shard(*given)

    monkeypatch.setattr("aliblip.data.prepare_steps.write_shard", writing)
    prepare(tmp_path / "out", *catalogue, *ALONE)
    assert min(frozen) > 10_000 and gc.get_freeze_count() == 0


def test_a_disk_that_is_full_is_one_line(catalogue, tmp_path, monkeypatch, capsys):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aliblip.data.prepare_parts.pq.write_table", full)
    with pytest.raises(SystemExit) as ended:
        main_with_usage_errors("aliblip.prepare", lambda: prepare(tmp_path / "out", *catalogue, *ALONE))
    told = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(told) == 1
    assert "No space left on device" in told[0] and "the same command goes on" in told[0]


def test_a_part_that_finds_no_room_at_its_end_leaves_no_open_file(tmp_path, monkeypatch):
    """Its file was closed by chance later, and its trouble told a second time, with a traceback."""

    def full(*given):
        raise OSError(27, "File too large")

    photo = PreparedPhoto(b"photo", 1, 1, 5, b"0" * 16, bytes(THUMB_SIDE**2 * 3))
    with pytest.raises(UsageError, match="can't be written .*File too large"), PartWriter(tmp_path, 0) as writer:
        monkeypatch.setattr(writer._writer, "write_table", full)
        writer.add({"row": 0}, photo, {})
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_which_command_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"preparing needs datatrove, ftfy, threadpoolctl: .*\[prepare\]"):
        check_installed()


def test_the_package_does_not_need_the_extra(tmp_path):
    script = tmp_path / "imports.py"
    script.write_text(
        "import sys, aliblip, train, aliblip.prepare\n"
        "assert not {'datatrove', 'ftfy', 'lingua', 'threadpoolctl'} & set(sys.modules)\n"
    )
    result = run_forked([sys.executable, script])
    assert result.returncode == 0, result.stderr
