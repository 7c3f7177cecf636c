"""The whole evaluation: against every pair scored one by one, on one to three real processes, through the script."""

import errno
import functools
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import ROOT, assert_succeeded, launch, run
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer, BlipImageProcessorPil

import evaluate_retrieval as script
from aliblip.data.collate import Collator
from aliblip.data.loader import EvalLoader
from aliblip.data.sources import open_source
from aliblip.retrieval import evaluation, reranking
from aliblip.retrieval import results as numbers
from aliblip.retrieval.report import Hit, SheetRow, contact_sheet
from aliblip.runtime import parts as parts_module
from aliblip.runtime.mistakes import UsageError, main_with_usage_errors
from aliblip.runtime.parts import Parts
from aliblip.runtime.units import gather_units
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

COLOURS = ["red", "green", "blue", "white", "black", "pink"]
THINGS = ["cap", "lamp", "shirt", "mug", "chair"]
ROWS = 29
BROKEN, UNTITLED = 11, 20
K = 6
UNIT = 4
RECALLS = ("recall@1", "recall@5", "recall@10")
TOO_MANY = "k_rerank is 1000, but the gallery has 29 items: give a number from 1 to 29, or leave it out"


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory):
    """29 rows in an image folder; some products have several rows; one photo is damaged and one title empty."""
    folder = tmp_path_factory.mktemp("catalogue")
    (folder / "validation").mkdir()
    generator = random.Random(0)
    lines = []
    for row in range(ROWS):
        image = Image.new("RGB", (40, 30), tuple(generator.randrange(256) for _ in range(3)))
        for _ in range(6):
            box = [generator.randrange(30) for _ in range(2)]
            image.paste(tuple(generator.randrange(256) for _ in range(3)), (*box, box[0] + 9, box[1] + 9))
        name = f"{row:02}.png"
        image.save(folder / "validation" / name)
        # unlike titles: equal ones would be ties that the last bit of a padded batch decides
        words = [generator.choice(COLOURS + THINGS) for _ in range(generator.randrange(3, 12))]
        lines.append({"file_name": name, "caption": " ".join(words), "product_id": row % 23})
    assert len({line["caption"] for line in lines}) == ROWS
    (folder / "validation" / f"{BROKEN:02}.png").write_bytes(b"not a picture")
    lines[UNTITLED]["caption"] = " "
    (folder / "validation" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLOURS, *THINGS]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    image_processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = AliBlipProcessor(image_processor, tokenizer)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AliBlipConfig(
        vision_config={**small, "image_size": 32, "patch_size": 16},
        text_config={**small, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 40},
        image_text_hidden_size=16,
        enc_token_id=processor.enc_token_id,
    )
    torch.manual_seed(0)
    model = AliBlipForImageTextRetrieval(config)
    for name, parameter in model.named_parameters():  # initial weights of 0.02 give scores too equal to be ranked
        if parameter.dim() > 1 and name != "temp":
            parameter.data.mul_(5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(model_folder):
    return AliBlipForImageTextRetrieval.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def processor(model_folder):
    return AliBlipProcessor.from_pretrained(model_folder)


@pytest.fixture
def loader(catalogue, processor):
    source = open_source(data_dir=str(catalogue), split="validation")
    return EvalLoader(source, Collator(processor), unit_size=UNIT, rank=0, world_size=1)


NAMES = {"model_name": "m", "dataset_name": "d", "split": "validation"}


def retrieve(model, loader, **options):
    return evaluation.retrieve(model, loader, **{"k_rerank": K, **options})


def without_run(results):
    return json.dumps({key: value for key, value in results.items() if key != "run"}, indent=2)


@torch.no_grad()
def slow_results(model, processor, catalogue, k=K):
    """Every pair through the plain forward, full sorts, counting by hand."""
    lines = [json.loads(line) for line in (catalogue / "validation" / "metadata.jsonl").read_text().splitlines()]
    lines = [line for row, line in enumerate(lines) if row not in (BROKEN, UNTITLED)]
    photos = [Image.open(catalogue / "validation" / line["file_name"]).convert("RGB") for line in lines]
    pixels = processor(images=photos, return_tensors="pt")["pixel_values"]
    products = [line["product_id"] for line in lines]
    itc, itm = np.zeros((2, len(lines), len(lines)))
    model.eval()
    for t, line in enumerate(lines):
        title = processor(text=[line["caption"]], return_tensors="pt")
        for i in range(len(lines)):
            output = model(pixels[i : i + 1], title["input_ids"], title["attention_mask"])
            itc[t, i] = float(output.image_embeds[0] @ output.text_embeds[0])
            itm[t, i] = itc[t, i] + float(output.itm_logits[0, 1])

    def measured(rankings):
        ranks = []
        for query, ranking in enumerate(rankings):
            ranks.append(next(place for place, item in enumerate(ranking, 1) if products[item] == products[query]))
        result = {f"recall@{at}": sum(rank <= at for rank in ranks) / len(ranks) for at in (1, 5, 10)}
        return {**result, "mean_recall": sum(result.values()) / 3, "median_rank": float(np.median(ranks))}, ranks

    expected, all_rankings = {}, {}
    for direction, first, second in (("text_to_image", itc, itm), ("image_to_text", itc.T, itm.T)):
        rankings = [sorted(range(len(row)), key=lambda item: (-row[item], item)) for row in first]
        final = []
        for query, ranking in enumerate(rankings):
            final.append(sorted(ranking[:k], key=lambda item: (-second[query, item], item)) + ranking[k:])
        itc_numbers, ranks = measured(rankings)
        expected[direction] = {
            "itc": itc_numbers,
            "itm": measured(final)[0],
            "itc_recall@k_rerank": sum(rank <= k for rank in ranks) / len(ranks),
        }
        all_rankings[direction] = [ranking[:k] for ranking in final]
    return expected, all_rankings


def test_results_equal_every_pair_scored_one_by_one(model, processor, catalogue, loader):
    expected, rankings = slow_results(model, processor, catalogue)
    found = retrieve(model, loader, k_rerank=(3, K))
    results = numbers.measure(found, **NAMES)
    assert list(results) == [
        *("model", "dataset", "split", "num_images", "num_texts", "k_rerank", "score", "fusion_weight"),
        *("text_to_image", "image_to_text", "mean_recall", "run"),
    ]
    assert (results["num_images"], results["num_texts"], results["k_rerank"]) == (ROWS - 2, ROWS - 2, K)
    less, _ = slow_results(model, processor, catalogue, k=3)
    for direction in ("text_to_image", "image_to_text"):
        of_direction = getattr(found, direction)
        assert of_direction.rankings.ids.tolist() == rankings[direction]
        for stage in ("itc", "itm"):
            assert results[direction][stage] == pytest.approx(expected[direction][stage])
            assert list(results[direction][stage]) == [*RECALLS, "mean_recall", "median_rank"]
        assert results[direction]["itc_recall@k_rerank"] == pytest.approx(expected[direction]["itc_recall@k_rerank"])
        for row, of_depth in zip(results[direction]["by_k"], (less, expected), strict=True):
            slow = of_depth[direction]
            assert {key: row[key] for key in RECALLS} == pytest.approx({key: slow["itm"][key] for key in RECALLS})
            assert row["ceiling"] == pytest.approx(slow["itc_recall@k_rerank"])
            assert row["gain"] == pytest.approx(slow["itm"]["mean_recall"] - slow["itc"]["mean_recall"])
        assert (results[direction]["num_queries"], results[direction]["num_queries_without_positive"]) == (ROWS - 2, 0)
        # the example can tell the stages apart
        assert not torch.equal(of_direction.rankings.ids, of_direction.candidates.ids)
    assert less != expected, "the example can tell the depths apart"
    assert results["text_to_image"] != results["image_to_text"]
    six = [expected[d]["itm"][f"recall@{k}"] for d in expected for k in (1, 5, 10)]
    assert results["mean_recall"] == pytest.approx(sum(six) / 6)
    assert set(results["run"]) == {"num_processes", "seconds", "seconds_by_stage", "versions"}
    assert results["run"]["num_processes"] == 1 and results["run"]["seconds"] > 0
    assert set(reranking.seconds_by_depth(model.config, found)) == {3, K}


def test_all_pairs_equal_every_pair_scored_one_by_one(model, processor, catalogue, loader, tmp_path):
    everything = ROWS - 2
    expected, rankings = slow_results(model, processor, catalogue, k=everything)
    parts = Parts(tmp_path / "parts", {"model": "m"})
    found = retrieve(model, loader, k_rerank=(K, "all"), parts=parts, gallery_chunk=10)
    assert found.depths == [K, everything]
    results = numbers.measure(found, **NAMES)
    six, _ = slow_results(model, processor, catalogue)
    for direction in ("text_to_image", "image_to_text"):
        order = getattr(found, direction).rankings
        assert order.ids.tolist() == rankings[direction]
        assert results[direction]["itm"] == pytest.approx(expected[direction]["itm"])
        assert results[direction]["by_k"][0]["mean_recall"] == pytest.approx(six[direction]["itm"]["mean_recall"])
        torch.testing.assert_close(order.scores, order.itc + order.itm_logits)
    # the same by candidates, and the file holds every logit
    by_candidates = retrieve(model, loader, k_rerank=everything)
    assert by_candidates.text_to_image.rankings.ids.tolist() == rankings["text_to_image"]
    paths = numbers.write_results(tmp_path / "out", found, results)
    assert [path.name for path in paths if path.suffix == ".npy"] == ["itm_logits.npy"]
    logits = torch.from_numpy(np.load(tmp_path / "out" / "itm_logits.npy"))
    assert logits.shape == (everything, everything)
    order = by_candidates.text_to_image.rankings
    expected_logits = torch.empty_like(logits).scatter_(0, order.ids.T, order.itm_logits.T)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)


def test_scores_by_itm_alone_and_by_itc_alone(model, loader):
    fused, itm, itc = (retrieve(model, loader, score=score) for score in ("fused", "itm", "itc"))
    candidates = fused.text_to_image.candidates
    order = itm.text_to_image.rankings
    assert torch.equal(order.scores, candidates.itm_logits.sort(dim=1, descending=True).values)
    assert torch.equal(itc.text_to_image.rankings.ids, candidates.ids)
    assert itc.text_to_image.rankings.itm_logits is None and "rerank" not in itc.seconds
    results = numbers.measure(itc, **NAMES)
    assert "itm" not in results["text_to_image"] and "mean of the six ITC recalls" in numbers.format_table(results)
    weighed = retrieve(model, loader, fusion_weight=3.0).text_to_image.rankings
    torch.testing.assert_close(weighed.scores, weighed.itm_logits + 3 * weighed.itc)


def test_more_items_are_listed_than_are_reranked(model, loader, tmp_path):
    found, usual = retrieve(model, loader, list_at_least=10), retrieve(model, loader)
    order, candidates = found.text_to_image.rankings, found.text_to_image.candidates
    assert torch.equal(order.ids[:, :K], usual.text_to_image.rankings.ids)
    assert torch.equal(order.ids[:, K:], candidates.ids[:, K:]) and order.ids.shape[1] == 10
    numbers.write_results(tmp_path, found, numbers.measure(found, **NAMES))
    row = pq.read_table(tmp_path / "rankings_text_to_image.parquet").to_pylist()[0]
    assert row["score"][K:] == row["itm_logit"][K:] == [None] * 4 and None not in row["itc"] + row["score"][:K]
    assert order.itm_logits[:, K:].isnan().all() and not order.itm_logits[:, :K].isnan().any()
    assert torch.equal(order.ranks, usual.text_to_image.rankings.ranks)


def test_unusable_rows_are_left_out_and_listed(model, loader, tmp_path):
    found = retrieve(model, loader)
    results = numbers.measure(found, **NAMES)
    assert [row["row"] for row in found.skipped] == [BROKEN, UNTITLED]
    assert found.images.rows.tolist() == [row for row in range(ROWS) if row not in (BROKEN, UNTITLED)]
    path, *_ = numbers.write_results(tmp_path / "new", found, results)
    assert json.loads(path.read_text()) == results
    listed = [json.loads(line) for line in (tmp_path / "new" / "skipped.jsonl").read_text().splitlines()]
    assert listed == found.skipped and listed[0]["name"] == f"{BROKEN:02}.png"
    found.images.skipped.clear()
    numbers.write_results(tmp_path / "new", found, results)
    assert not (tmp_path / "new" / "skipped.jsonl").exists()


@pytest.mark.parametrize("memory_gb", [0.0, 3e-6])
def test_image_tokens_encoded_again_change_nothing(model, loader, memory_gb, caplog):
    with caplog.at_level("INFO", logger="aliblip"):
        evaluated = retrieve(model, loader, image_token_memory_gb=memory_gb)
    assert "encoded again" in caplog.text
    expected = retrieve(model, loader)
    for direction in ("text_to_image", "image_to_text"):
        got, wanted = getattr(evaluated, direction).rankings, getattr(expected, direction).rankings
        assert torch.equal(got.ids, wanted.ids) and torch.equal(got.scores, wanted.scores)


def test_chunks_and_token_budgets_change_scores_by_rounding_only(model, loader):
    expected = retrieve(model, loader)
    for options in ({"gallery_chunk": 5}, {"rerank_batch_tokens": 12}):
        evaluated = retrieve(model, loader, **options)
        for direction in ("text_to_image", "image_to_text"):
            got, wanted = getattr(evaluated, direction).rankings, getattr(expected, direction).rankings
            torch.testing.assert_close(got.scores, wanted.scores, atol=1e-4, rtol=0)
            torch.testing.assert_close(got.itc, wanted.itc, atol=1e-5, rtol=0)


def test_bf16_stays_near(model, loader):
    full, half = retrieve(model, loader), retrieve(model, loader, dtype=torch.bfloat16)
    half, full = half.text_to_image, full.text_to_image
    assert half.rankings.scores.dtype == torch.float32
    torch.testing.assert_close(half.candidates.itc, full.candidates.itc, atol=0.03, rtol=0)


def test_the_default_k_is_capped_to_the_gallery_and_said(model, loader, caplog):
    with caplog.at_level("INFO", logger="aliblip"):
        results = evaluation.evaluate_retrieval(
            model, loader, model_name="m", dataset_name="d", split="validation", k_rerank=None
        )
    assert results["k_rerank"] == ROWS - 2
    assert "k_rerank is the whole gallery, 27, instead of 128" in caplog.text
    assert results["text_to_image"]["itc_recall@k_rerank"] == 1.0


def test_training_state_is_left_alone(model, loader):
    model.train()
    model.vision_model.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    retrieve(model, loader)
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_a_lost_or_double_unit_is_noticed():
    assert gather_units("search", [(1, "b"), (0, "a")], 2) == ["a", "b"]
    for parts in ([(0, "a")], [(0, "a"), (0, "a"), (1, "b")]):
        with pytest.raises(RuntimeError, match="some are missing or double"):
            gather_units("search", parts, 2)


# --- the script -------------------------------------------------------------------------------------------------------


def flags(model_folder, catalogue, output_dir, *more):
    return [
        *("--model_name_or_path", model_folder, "--data_dir", catalogue, "--output_dir", output_dir),
        *("--k_rerank", str(K), "--per_device_eval_batch_size", str(UNIT), "--dataloader_num_workers", "0"),
        *more,
    ]


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
        (("--compare", "nowhere/results.json"), "is no results.json of evaluate_retrieval.py"),
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


def test_exit_code_two_and_one_line(model_folder, catalogue, tmp_path, monkeypatch, capsys):
    arguments = flags(model_folder, catalogue, tmp_path / "out", "--k_rerank", "1000")
    monkeypatch.setattr(sys, "argv", ["evaluate_retrieval.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main_with_usage_errors("evaluate_retrieval.py", script.main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == [f"evaluate_retrieval.py: error: {TOO_MANY}"]


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


@pytest.fixture
def run_script(monkeypatch, capsys):
    def start(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate_retrieval.py", *map(str, flags)])
        try:
            code = script.main()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return code, capsys.readouterr()

    return start


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
    # one photo stands twice in the gallery: both are right answers, but an answer file can't tell them apart
    photos = [{"product": line["file_name"], "product_id": line["product_id"]} for line in [*lines[:10], lines[0]]]
    (tmp_path / "photos.json").write_text(json.dumps(photos))
    out = tmp_path / "out"
    arguments = (
        *("--model_name_or_path", model_folder, "--gallery", tmp_path / "photos.json", "--output_dir", out),
        *("--queries", tmp_path / "titles.json", "--image_dir", catalogue / "validation", "--k_rerank", 3),
        *("--dataloader_num_workers", 0),
    )
    with pytest.raises(UsageError, match=r"00\.png.*give every photo a name of its own"):
        run_script(*arguments, "--submission", out / "submission.json")
    code, printed = run_script(*arguments)
    assert code == 0 and not (out / "submission.json").exists()
    results = json.loads((out / "results.json").read_text())
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


# --- going on after a crash -------------------------------------------------------------------------------------------

# A whole run of the script in a process that kills itself: after so many units of the second stage.
KILLED = """
import os, signal, sys
import retrieval_aliblip as engine
from aliblip.runtime import parts
parts.SECONDS = 0.0
rerank, calls = engine.rerank, []
def counted(*arguments):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return rerank(*arguments)
engine.rerank = counted
import evaluate_retrieval
sys.argv = ["evaluate_retrieval.py", *sys.argv[1:]]
evaluate_retrieval.main()
"""


@pytest.mark.parametrize("depth", [str(K), "all"])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(depth, model_folder, catalogue, tmp_path, run_script):
    arguments = [str(part) for part in flags(model_folder, catalogue, tmp_path / "out", "--k_rerank", depth)]
    killed = run([sys.executable, "-c", KILLED, *arguments])
    assert killed.returncode == -9 and not (tmp_path / "out" / "results.json").exists()
    if depth == "all":
        with pytest.raises(UsageError, match=r"unfinished work on something else \(longest title was 35, here it is 9"):
            shorter = tmp_path / "shorter"
            shutil.copytree(model_folder, shorter)
            settings = json.loads((shorter / "processor_config.json").read_text()) | {"max_length": 9}
            (shorter / "processor_config.json").write_text(json.dumps(settings))
            run_script(*arguments, "--model_name_or_path", shorter)
    calls = []
    with pytest.MonkeyPatch.context() as patched:
        for name in ("rerank", "embed_texts"):
            work = getattr(evaluation.engine, name)
            counted = functools.partial(lambda name, work, *a: (calls.append(name), work(*a))[1], name, work)
            patched.setattr(evaluation.engine, name, counted)
        assert run_script(*arguments)[0] == 0
    units = -(-ROWS // UNIT)
    assert calls.count("embed_texts") == 0 and calls.count("rerank") == units - 3
    assert run_script(*arguments, "--output_dir", tmp_path / "whole")[0] == 0
    went_on, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "whole"))
    assert went_on["run"]["units_from_an_earlier_start"] == units + 3
    assert without_run(went_on) == without_run(whole)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files and "parts" not in files
    for name in files:
        if name != "results.json":
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_fails_after_the_work_is_made_up_for_without_doing_it_again(
    model_folder, catalogue, tmp_path, run_script, monkeypatch
):
    out = tmp_path / "out"
    for depth in (str(K), "all"):
        arguments = flags(model_folder, catalogue, out, "--k_rerank", depth, "--contact_sheet", out / "sheet.png")
        code, printed = run_script(*arguments, "--contact_sheet_rows", BROKEN)
        assert code == 1 and f"title {BROKEN} is not among the 27 usable ones" in printed.err
        assert (out / "results.json").exists() and (out / "parts").is_dir()
        with monkeypatch.context() as patched:
            patched.setattr(evaluation.engine, "embed_texts", None)  # calling it would fail
            patched.setattr(evaluation.engine, "rerank", None)
            code, printed = run_script(*arguments, "--contact_sheet_rows", BROKEN + 1)
        assert code == 0 and not (out / "parts").exists()
        assert (out / "itm_logits.npy").exists() == (depth == "all")
    # a run that scores fewer pairs leaves no file of all of them beside its results
    assert run_script(*flags(model_folder, catalogue, out))[0] == 0
    assert not (out / "itm_logits.npy").exists()


def test_a_second_start_with_other_slices_is_refused(model_folder, catalogue, tmp_path, run_script):
    sheet = ("--contact_sheet", tmp_path / "out" / "sheet.png", "--contact_sheet_rows", BROKEN)
    assert run_script(*flags(model_folder, catalogue, tmp_path / "out", *sheet))[0] == 1  # leaves its parts
    with pytest.raises(UsageError, match="unfinished work on something else .*photos was"):
        run_script(*flags(model_folder, catalogue, tmp_path / "out", "--slices", "product_id"))
    dry = flags(model_folder, catalogue, tmp_path / "out", "--overwrite_output_dir", "--dry_run")
    assert run_script(*dry)[0] == 0 and (tmp_path / "out" / "parts" / "made_from.json").exists()
    again = flags(model_folder, catalogue, tmp_path / "out", "--slices", "product_id", "--overwrite_output_dir")
    assert run_script(*again)[0] == 0
    values = json.loads((tmp_path / "out" / "results.json").read_text())["slices"]["product_id"]
    assert sum(row["text_to_image"]["num_queries"] for row in values) == ROWS - 2
    assert "None" not in [row["value"] for row in values]
    with pytest.raises(UsageError, match=r"--compare .*results\.json would be written over"):
        run_script(*again, "--compare", tmp_path / "out" / "results.json")


def test_the_budget_of_the_first_start_is_kept(tmp_path):
    parts = Parts(tmp_path / "parts", {"model": "m"})
    assert [parts.settle("rerank_batch_tokens", value) for value in (4096, 8192)] == [4096, 4096]


def test_a_half_made_file_of_all_pairs_is_made_again(model, loader, tmp_path, monkeypatch):
    parts = Parts(tmp_path / "parts", {"model": "m"})
    expected = retrieve(model, loader, k_rerank="all", parts=parts)
    parts.remove()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(reranking.os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            retrieve(model, loader, k_rerank="all", parts=parts)
    assert not (tmp_path / "parts" / "itm_logits.npy").exists()
    # blocks of another budget are not taken for those of this one
    found = [retrieve(model, loader, k_rerank="all", parts=parts, rerank_batch_tokens=n) for n in (8192, 12, 8192)]
    assert found[-1].resumed_units == -(-ROWS // UNIT), "the embeddings, and no block"
    assert torch.equal(found[-1].text_to_image.rankings.scores, expected.text_to_image.rankings.scores)


def test_another_model_is_refused_until_it_may_replace_what_is_there(
    model, model_folder, catalogue, tmp_path, run_script
):
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["itm_head.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    arguments = flags(model_folder, catalogue, tmp_path / "out")
    Parts(tmp_path / "out" / "parts", {"model": "x", "photos": "y"}).stage("rows")
    with pytest.raises(UsageError, match=r"unfinished work on something else \(model was x, here it is [0-9a-f]{32};"):
        run_script(*arguments)
    assert run_script(*arguments, "--overwrite_output_dir")[0] == 0
    assert not (tmp_path / "out" / "parts").exists()
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(UsageError, match="holds the results of .*model0 on"):
        run_script(*arguments, "--model_name_or_path", other)
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert run_script(*arguments, "--model_name_or_path", other, "--overwrite_output_dir")[0] == 0
    assert (tmp_path / "out" / "results.json").read_bytes() != before


def test_parts_on_a_full_disk_are_told_once_and_the_work_goes_on(model, loader, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = retrieve(model, loader)
    monkeypatch.setattr(parts_module, "write_bytes", full)
    monkeypatch.setattr(parts_module, "SECONDS", 0.0)
    found = retrieve(model, loader, parts=Parts(tmp_path / "parts", {"model": "m"}))
    assert torch.equal(found.text_to_image.rankings.scores, expected.text_to_image.rankings.scores)
    assert caplog.text.count("finished parts can't be kept") == 2, "once in each stage"
    with pytest.raises(OSError, match="No space left"):
        retrieve(model, loader, k_rerank="all", parts=Parts(tmp_path / "parts", {"model": "m"}))


def test_a_damaged_part_is_made_again(model, loader, tmp_path, caplog):
    parts = Parts(tmp_path / "parts", {"model": "m"})
    expected = retrieve(model, loader, parts=parts)
    for file in (tmp_path / "parts").glob("embed-*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    found = retrieve(model, loader, parts=parts)
    assert "can't be read and is made again" in caplog.text
    assert torch.equal(found.text_to_image.rankings.scores, expected.text_to_image.rankings.scores)
    assert found.resumed_units == -(-ROWS // UNIT), "those of the second stage"


# --- the fusion weight and the plan -----------------------------------------------------------------------------------


def test_the_weight_is_tuned_on_another_split_and_used(model_folder, catalogue, tmp_path, run_script):
    both = tmp_path / "both"
    shutil.copytree(catalogue, both)
    shutil.copytree(both / "validation", both / "tuning")
    arguments = flags(model_folder, both, tmp_path / "out", "--data_files", both / "validation" / "metadata.jsonl")
    arguments[arguments.index("--data_dir") : arguments.index("--data_dir") + 2] = ["--seed", "0"]
    with pytest.raises(UsageError, match="are the rows that are measured"):  # a copy is no other split
        run_script(*arguments, "--tune_fusion", both / "tuning" / "metadata.jsonl")
    lines = (both / "tuning" / "metadata.jsonl").read_text().splitlines(keepends=True)
    (both / "tuning" / "metadata.jsonl").write_text("".join(reversed(lines)))
    code, printed = run_script(*arguments, "--tune_fusion", both / "tuning" / "metadata.jsonl")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    tuned = results["fusion_weight_tuned_on"]["mean_recall"]
    assert code == 0 and f"fusion weight {results['fusion_weight']:g}, chosen on" in printed.out
    # the same pairs in another order: their best mean recall is that of the measured split with this weight
    assert results["mean_recall"] == pytest.approx(max(tuned.values()))
    again = [*arguments, "--fusion_weight", results["fusion_weight"], "--output_dir", tmp_path / "again"]
    assert run_script(*again)[0] == 0
    results_again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert results_again["mean_recall"] == results["mean_recall"]


def test_a_dry_run_tells_and_does_nothing(model_folder, catalogue, tmp_path, run_script):
    code, printed = run_script(*flags(model_folder, catalogue, tmp_path / "out", "--k_rerank", "all", "--dry_run"))
    assert code == 0 and list((tmp_path / "out").iterdir()) == []
    for told in ("29 images x 29 titles, every pair scored", "match logits of all pairs", "expected time", "one H200"):
        assert told in printed.out


# --- the picture ------------------------------------------------------------------------------------------------------


def test_contact_sheet_frames_the_right_photo_and_wraps_titles(tmp_path):
    grey = Image.new("RGB", (300, 200), (128, 128, 128))
    rows = [
        SheetRow("red cap", [Hit(grey, 3.0, False), Hit(grey, 2.0, True), Hit(grey, -1.0, False)], rank=2),
        SheetRow("a very long title " * 30 + "W" * 200, [Hit(grey.convert("L"), 1.0, False)], rank=99),
    ]
    path = contact_sheet(rows, tmp_path / "new" / "sheet.png", heading="heading " * 40)
    with Image.open(path) as sheet:
        green = (np.asarray(sheet) == (0x14, 0x92, 0x4A)).all(axis=2)
    columns = np.flatnonzero(green.sum(axis=0) > 100)
    assert columns.min() >= 340 + 194 and columns.max() < 340 + 2 * 194, "the frame is around the second photo"
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]


def test_contact_sheet_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(ValueError, match="at least one query"):
        contact_sheet([], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="not a picture file name"):
        contact_sheet([SheetRow("red cap")], tmp_path / "sheet.txt")


def test_the_manual_is_the_first_screen():
    head = (ROOT / "evaluate_retrieval.py").read_text().splitlines()[:12]
    assert head[0].startswith('"""') and any("accelerate launch" in line for line in head)
