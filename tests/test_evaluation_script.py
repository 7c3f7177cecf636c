"""The script of the evaluation: on one to three real processes, its mistakes, photos and titles apart, the weight."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_fixtures import BROKEN, ROWS, K, flags, retrieve, without_run
from helpers import ROOT, assert_succeeded, launch, run, run_forked
from PIL import Image

import evaluate_retrieval as script
from aliblip.data.collate import Collator
from aliblip.data.loader import EvalLoader
from aliblip.data.sources import open_source
from aliblip.runtime.mistakes import UsageError

TOO_MANY = "k_rerank is 1000, but the gallery has 29 items: give a number from 1 to 29, or leave it out"


def test_script_on_one_two_and_three_processes_gives_the_same_bytes(model_folder, catalogue, tmp_path):
    sheet = tmp_path / "pictures" / "sheet.png"
    more = ("--contact_sheet", sheet, "--contact_sheet_rows", "0,28", "--slices", "product_id,title_length")
    more += ("--report", tmp_path / "1" / "report.html", "--submission", tmp_path / "1" / "submission.json")
    alone = run([sys.executable, "evaluate_retrieval.py", *flags(model_folder, catalogue, tmp_path / "1", *more)])
    assert_succeeded(alone)
    assert "text to image  ITC" in alone.stdout and "mean of the six ITM recalls" in alone.stdout
    assert "2 unusable rows were left out" in alone.stdout
    assert sorted(file.name for file in (tmp_path / "1").iterdir()) == [
        *("rankings_image_to_text.parquet", "rankings_text_to_image.parquet", "report.html", "results.json"),
        *("skipped.jsonl", "submission.json"),
    ]
    with Image.open(sheet) as picture:
        assert picture.width > 600 and 400 < picture.height < 700, "two titles"
    page = (tmp_path / "1" / "report.html").read_text()
    assert "Worst misses" in page and "Best hits" in page and "By title_length" in page
    assert "2 titles could not be searched for" in alone.stdout
    assert "27 images x 27 titles" not in alone.stdout and "29 images x 29 titles, the 6 best" in alone.stdout
    expected = json.loads((tmp_path / "1" / "results.json").read_text())
    for processes in (2, 3):
        result = launch(
            "cpu_2_processes.yaml",
            "evaluate_retrieval.py",
            flags(
                *(model_folder, catalogue, tmp_path / str(processes)),
                *("--slices", "product_id,title_length", "--compare", tmp_path / "1" / "results.json"),
                *("--submission", tmp_path / "again.json"),
            ),
            launcher_args=("--num_processes", str(processes)),
        )
        assert_succeeded(result)
        assert result.stdout.count("mean of the six ITM recalls") == 1
        results = json.loads((tmp_path / str(processes) / "results.json").read_text())
        assert results["run"]["num_processes"] == processes
        assert without_run(results) == without_run(expected)
        for direction in ("text_to_image", "image_to_text"):
            files = [tmp_path / str(run) / f"rankings_{direction}.parquet" for run in (1, processes)]
            assert files[0].read_bytes() == files[1].read_bytes()
        assert "difference +0.0 (95 %: +0.0 to +0.0, p = 1.000)" in result.stdout
        assert (tmp_path / str(processes) / "skipped.jsonl").read_bytes() == (
            tmp_path / "1" / "skipped.jsonl"
        ).read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--k_rerank", "1000"), TOO_MANY),
        (("--k_rerank", "4,all,x"), "--k_rerank is 4,all,x: give a number of at least 1, several separated by commas"),
        (("--k_rerank", "4,1000"), TOO_MANY),
        (("--score", "best"), "invalid choice: 'best'"),
        (("--slices", "price"), "no column 'price': there are"),
        (("--report", "report.pdf"), "--report is report.pdf: give a file name that ends in .html or .htm"),
        (("--contact_sheet", "s.png", "--contact_sheet_rows", "3,x"), "--contact_sheet_rows is 3,x: give row numbers"),
        (("--tune_fusion", "validation"), "makes the result too good; name another split"),
        (("--tune_fusion", "train"), "has no split 'train'"),
        (("--score", "itm", "--fusion_weight", "2"), "--fusion_weight has no part in --score itm"),
        (("--score", "itc", "--k_rerank", "all"), "--score itc re-ranks nothing"),
        (
            ("--contact_sheet", "s.png", "--contact_sheet_rows", "29"),
            "--contact_sheet_rows has 29: the rows are 0 to 28",
        ),
        (("--submission", "/dev/null/x.json"), "--submission: can't write to /dev/null"),
        (("--compare", "nowhere/results.json"), "is not a results.json of evaluate_retrieval.py"),
        (("--gallery", "photos"), "--gallery without --queries: give both"),
        (("--gallery", "photos", "--queries", "q.txt"), "take the place of --dataset_name, --data_dir"),
        (("--rerank_batch_tokens", "0"), "--rerank_batch_tokens is 0: it must be at least 1"),
        (("--k_rerank", "0"), "--k_rerank is 0: give a number of at least 1"),
        (("--model_name_or_path", "./nowhere"), "the model folder ./nowhere does not exist"),
        (("--data_dir", "./nowhere"), "nowhere"),
        (("--split_name", "test"), "test"),
        (("--caption_column", "titel"), "caption"),
        (("--image_size", "40"), "40"),
        (("--contact_sheet", "sheet.txt"), "ends in .png or .jpg"),
        (("--dataloader_num_workers", "-1"), "--dataloader_num_workers is -1"),
        (("--k_rerang", "3"), "did you mean 'k_rerank'"),
        (("--output_dir", "/dev/null/x"), "can't write to the output folder"),
    ],
)
def test_mistakes_give_one_line_before_any_work(more, message, model_folder, catalogue, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the processes were joined before the mistake was found")

    monkeypatch.setattr(script, "build_accelerator", never)
    arguments = [str(part) for part in flags(model_folder, catalogue, tmp_path / "out", *more)]
    monkeypatch.setattr(sys, "argv", ["evaluate_retrieval.py", *arguments])
    with pytest.raises(UsageError) as caught:
        script.main()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_exit_code_two_and_one_line(model_folder, catalogue, tmp_path):
    arguments = flags(model_folder, catalogue, tmp_path / "out", "--k_rerank", "1000")
    failed = run_forked([sys.executable, ROOT / "evaluate_retrieval.py", *arguments])
    assert failed.returncode == 2
    assert failed.stderr.splitlines() == [f"evaluate_retrieval.py: error: {TOO_MANY}"]


PLANTED = """
import importlib, sys
import evaluate_retrieval
from aliblip.runtime.mistakes import main_with_usage_errors
def planted(*_, **__):
    raise ValueError("planted")
module, name = sys.argv.pop(1).split(":")
setattr(importlib.import_module(module), name, planted)
main_with_usage_errors("evaluate_retrieval.py", evaluate_retrieval.main)
"""


@pytest.mark.parametrize(
    "place", ["aliblip.retrieval.setup:fingerprint", "retrieval_aliblip:search", "aliblip.retrieval.pages:html_report"]
)
def test_a_bug_keeps_its_traceback_before_during_and_after_the_work(place, model_folder, catalogue, tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    arguments = flags(model_folder, catalogue, tmp_path / "out", "--report", tmp_path / "report.html")
    failed = run_forked([sys.executable, tmp_path / "planted.py", place, *arguments])
    assert failed.returncode == 1 and "evaluate_retrieval.py: error" not in failed.stderr
    assert "Traceback" in failed.stderr and failed.stderr.splitlines()[-1] == "ValueError: planted"


def test_the_traceback_of_a_mistake_is_shown_on_request(model_folder, catalogue, tmp_path):
    arguments = flags(model_folder, catalogue, tmp_path / "out", "--k_rerank", "1000")
    command = [sys.executable, ROOT / "evaluate_retrieval.py", *arguments]
    failed = run_forked(command, env={"ALIBLIP_TRACEBACK": "1"})
    assert failed.returncode == 2 and "Traceback" in failed.stderr
    assert failed.stderr.splitlines()[-1] == f"evaluate_retrieval.py: error: {TOO_MANY}"


def test_under_a_launcher_the_line_comes_once(model_folder, catalogue, tmp_path):
    arguments = flags(model_folder, catalogue, tmp_path / "out", "--k_rerank", "1000")
    launched = launch("cpu_2_processes.yaml", "evaluate_retrieval.py", arguments)
    assert launched.returncode != 0
    assert (launched.stdout + launched.stderr).count(TOO_MANY) == 1


def test_no_usable_row_is_said(model, model_folder, processor, tmp_path, monkeypatch):
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "a.png").write_bytes(b"")
    (tmp_path / "validation" / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "red cap"}\n')
    source = open_source(data_dir=str(tmp_path), split="validation")
    with pytest.raises(ValueError, match="none of the 1 rows is usable; the first: row 0, the image file is empty"):
        retrieve(model, EvalLoader(source, Collator(processor), unit_size=4, rank=0, world_size=1), k_rerank=None)
    more = flags(model_folder, tmp_path, tmp_path / "out", "--k_rerank", "1")
    monkeypatch.setattr(sys, "argv", ["evaluate_retrieval.py", *map(str, more)])
    with pytest.raises(UsageError, match="is usable"):
        script.main()


# --- searching without the answers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apart(catalogue, tmp_path_factory):
    """The catalogue's photos in a folder of their own, and its titles in every form that titles are taken in."""
    folder = tmp_path_factory.mktemp("apart")
    lines = [json.loads(line) for line in (catalogue / "validation" / "metadata.jsonl").read_text().splitlines()]
    (folder / "photos" / "more").mkdir(parents=True)
    for row, line in enumerate(lines):
        place = folder / "photos" / ("more" if row == 3 else "") / line["file_name"]
        place.write_bytes((catalogue / "validation" / line["file_name"]).read_bytes())
    (folder / "photos" / "notes.md").write_text("no photo")
    titles = [line["caption"] for line in lines]
    (folder / "titles.txt").write_text("\n".join(titles) + "\n")
    (folder / "titles.json").write_text(json.dumps(titles))
    (folder / "captions.json").write_text(json.dumps([{"caption": title} for title in titles]))
    pq.write_table(pa.table({"caption": titles, "shop": ["a", "b", "b"] * 9 + ["a", "b"]}), folder / "titles.parquet")
    return folder


@pytest.mark.parametrize("queries", ["titles.txt", "titles.json", "captions.json", "titles.parquet"])
def test_photos_and_titles_apart_give_the_rankings_of_the_table(
    queries, model, loader, apart, model_folder, tmp_path, run_script
):
    out = tmp_path / "out"
    code, printed = run_script(
        *("--model_name_or_path", model_folder, "--gallery", apart / "photos", "--queries", apart / queries),
        *("--output_dir", out, "--k_rerank", K, "--dataloader_num_workers", 0, "--report", out / "report.html"),
        *("--submission", out / "submission.json", "--contact_sheet", out / "sheet.png"),
    )
    assert code == 0 and "no right answers are known" in printed.out
    results = json.loads((out / "results.json").read_text())
    assert (results["num_images"], results["num_texts"]) == (ROWS - 1, ROWS - 1) and "mean_recall" not in results
    table = pq.read_table(out / "rankings_text_to_image.parquet").to_pylist()
    assert not (out / "rankings_image_to_text.parquet").exists()
    # photos in the order of their names, not of the folder: 03.png lies in more/, after the others
    names = [f"{row:02}.png" for row in range(ROWS) if row != 3] + ["more/03.png"]
    whole = retrieve(model, loader, k_rerank=ROWS - 2)
    rows, order = whole.images.rows.tolist(), whole.text_to_image.rankings
    known = {
        (rows[title], rows[photo]): (itc, logit)
        for title in range(len(rows))
        for photo, itc, logit in zip(
            *(values[title].tolist() for values in (order.ids, order.itc, order.itm_logits)), strict=True
        )
    }
    compared = 0
    for row in table:
        assert len(row["ids"]) == 10 and [names[photo] for photo in row["ids"]] == row["names"]
        for name, itc, logit in list(zip(row["names"], row["itc"], row["itm_logit"], strict=True))[:K]:
            pair = (row["query"], int(Path(name).stem))
            if pair in known:  # the table has no title 11, whose photo is damaged
                assert (itc, logit) == pytest.approx(known[pair], abs=1e-4)
                compared += 1
    assert compared == K * (ROWS - 2)
    names.remove(f"{BROKEN:02}.png")
    entries = json.loads((out / "submission.json").read_text())
    assert [len(entry["top10"]) for entry in entries] == [10] * ROWS
    by_query = {row["query"]: row["names"] for row in table}
    for query, entry in enumerate(entries):
        expected = by_query.get(query, names[:10])
        assert entry["top10"] == expected and entry["top5"] == expected[:5]
    common = ("--gallery", apart / "photos", "--queries", apart / queries)
    code, printed = run_script(*common, "--verify_submission", out / "submission.json")
    assert code == 0 and f"is right: {ROWS} titles, {ROWS} photos" in printed.out
    entries[0]["top5"][0] = "nowhere.png"
    (out / "submission.json").write_text(json.dumps(entries))
    code, printed = run_script(*common, "--verify_submission", out / "submission.json")
    assert code == 1 and "nowhere.png" in printed.out and "is not right" in printed.out


def test_apart_with_product_ids_there_is_a_recall(catalogue, model_folder, tmp_path, run_script):
    lines = [json.loads(line) for line in (catalogue / "validation" / "metadata.jsonl").read_text().splitlines()]
    wanted = [{"caption": line["caption"], "product_id": line["product_id"]} for line in lines[:8]]
    wanted[2]["product_id"] = 999
    (tmp_path / "titles.json").write_text(json.dumps(wanted))
    # one photo stands twice in the gallery: it is one photo
    photos = [{"product": line["file_name"], "product_id": line["product_id"]} for line in [*lines[:10], lines[0]]]
    (tmp_path / "photos.json").write_text(json.dumps(photos))
    out = tmp_path / "out"
    arguments = (
        *("--model_name_or_path", model_folder, "--gallery", tmp_path / "photos.json", "--output_dir", out),
        *("--queries", tmp_path / "titles.json", "--image_dir", catalogue / "validation", "--k_rerank", 3),
        *("--dataloader_num_workers", 0),
    )
    code, printed = run_script(*arguments, "--submission", out / "submission.json")
    assert code == 0 and (out / "submission.json").exists()
    results = json.loads((out / "results.json").read_text())
    assert results["num_images"] == 10
    measured = results["text_to_image"]
    assert (measured["num_queries"], measured["num_queries_without_positive"]) == (7, 1)
    assert "without a right answer in the gallery, left out: 1" in printed.out and "image_to_text" not in results
    table = pq.read_table(out / "rankings_text_to_image.parquet").to_pylist()
    assert [row["rank"] for row in table].count(0) == 1 and table[2]["rank"] == 0
    ranks = [row["rank"] for row in table if row["rank"]]
    assert measured["itm"]["recall@5"] == pytest.approx(sum(rank <= 5 for rank in ranks) / 7)
    assert results["mean_recall"] == pytest.approx(measured["itm"]["mean_recall"])
    # ids that never meet: no recall instead of one of nothing
    (tmp_path / "titles.json").write_text(json.dumps([{"caption": "red cap", "product_id": None}] * 3))
    code, printed = run_script(*arguments, "--overwrite_output_dir")
    assert code == 0 and "mean_recall" not in json.loads((out / "results.json").read_text())
    with pytest.raises(UsageError, match="--slices needs right answers"):
        (tmp_path / "bare.txt").write_text("red cap\n")
        run_script(*arguments, "--queries", tmp_path / "bare.txt", "--slices", "script")


# --- the plan --------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_and_does_nothing(model_folder, catalogue, tmp_path, run_script):
    code, printed = run_script(*flags(model_folder, catalogue, tmp_path / "out", "--k_rerank", "all", "--dry_run"))
    assert code == 0 and list((tmp_path / "out").iterdir()) == []
    for told in ("29 images x 29 titles, every pair scored", "match logits of all pairs", "expected time", "one H200"):
        assert told in printed.out


def test_the_manual_is_the_first_screen():
    head = (ROOT / "evaluate_retrieval.py").read_text().splitlines()[:12]
    assert head[0].startswith('"""') and any("accelerate launch" in line for line in head)
