"""The benchmarks run, on tiny models and galleries, and their sides give the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from helpers import ROOT, assert_succeeded, run
from runs import trained_in_process, write_split

from benchmarks import (
    bench_full,
    bench_gallery,
    bench_loader,
    bench_prepare,
    bench_retrieval,
    bench_search,
    bench_step,
    bench_training,
)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_retrieval_against_transformers_blip(tmp_path, capsys):
    file = tmp_path / "table.json"
    bench_retrieval.main(["--tiny", "--rounds", "1", "--titles", "20", "--images", "2", "--json", str(file)])
    table = json.loads(file.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"retrieval ratio={table['ratio']:.4g}"
    assert table["commit"] and table["versions"]["torch"] == torch.__version__
    assert set(table["comparisons"]) == {"short titles", "titles of 35", "whole, all pairs"}
    for part in table["comparisons"].values():
        assert part["largest_difference"] < 1e-4 < 0.1 < part["spread"]
        assert part["ratio"] > 0 and part["ours"]["flops"] < part["theirs"]["flops"]


def test_retrieval_refuses_sides_that_differ(monkeypatch):
    plain = bench_retrieval.rerank_theirs
    monkeypatch.setattr(bench_retrieval, "rerank_theirs", lambda *args: plain(*args) + 2e-4)
    with pytest.raises(RuntimeError, match="the logits of both sides differ by 0.0002"):
        bench_retrieval.main(["--tiny", "--rounds", "1", "--titles", "9"])


def test_the_arithmetic_bounds_of_the_issue():
    config = bench_retrieval.AliBlipConfig.from_size("base")
    ones = torch.ones(128, 35, dtype=torch.int64)
    ratio = 128 * bench_retrieval.pair_flops(config) / bench_retrieval.rerank_flops(config, ones)
    assert ratio == pytest.approx(3.06 * 12 / 11, rel=0.03)  # 3.06 if the last layer computed all tokens


def test_a_run_computed_the_plain_way_is_the_same_run(tmp_path, accelerate_as_before, monkeypatch):
    widths, match = [], bench_step.PlainModel.match

    def spied(model, input_ids, *others):
        widths.append(input_ids.shape[1])
        return match(model, input_ids, *others)

    monkeypatch.setattr(bench_step.PlainModel, "match", spied)
    write_split(tmp_path / "data", "train", 40)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    text = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    flags = ["--data_dir", tmp_path / "data", "--tokenizer_name", tmp_path / "tokenizer", "--evaluate_every", 0]
    flags += ["--max_train_steps", 6, "--hardest_negatives", "true", "--text_config", json.dumps(text)]
    flags += ["--itm_negatives", 2, "--itm_queue_titles", 3, "--itm_listwise", 1, "--in_batch_itc", 0.5]
    trained_in_process([*flags, "--unpad", "true"], tmp_path / "ours")
    assert not widths
    with bench_training.plain_training():
        trained_in_process([*flags, "--attn_implementation", "eager"], tmp_path / "plain")
    ours, plain = (
        [json.loads(line) for line in (tmp_path / side / "log.jsonl").read_text().splitlines()]
        for side in ("ours", "plain")
    )
    assert len(ours) == 6
    for key in ("loss_itc", "loss_itm", "grad_norm", "temperature"):
        assert [line[key] for line in plain] == pytest.approx([line[key] for line in ours], rel=1e-4)
    assert widths == [bench_step.PADDED] * 6  # each pair by itself, in one pass


def test_training_runs_side_by_side(tmp_path, capsys, monkeypatch):
    ran = []

    def run_process(command, log):
        ran.append(command)
        output = Path(command[command.index("--output_dir") + 1])
        output.mkdir(parents=True, exist_ok=True)
        if "evaluate" in command[0]:
            better = 0.2 * ("plain" in str(output))
            recalls = {f"recall@{k}": 0.4 + better for k in (1, 5, 10)}
            direction = {"itc": recalls, "itm": {key: value + 0.1 for key, value in recalls.items()}}
            (output / "results.json").write_text(json.dumps(dict.fromkeys(bench_training.DIRECTIONS, direction)))
            return 3.0
        line = {"loss_itc": 4.0, "loss_itm": 2.0, "itm_accuracy_negative": 0.9}
        lines = [{"step": step, **line, "itm_accuracy_positive": step / 100} for step in (20, 40, 60)]
        (output / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 120.0

    monkeypatch.setattr(bench_training, "run_process", run_process)
    file = tmp_path / "table.json"
    options = ["--seeds", "1", "2", "--folder", str(tmp_path / "runs"), "--json", str(file)]
    bench_training.main(options)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == (
        "ours: R@1 ITC 40.0, 40.0, re-ranked 50.0, 50.0 (gain 10.0, 10.0); mean of the six 50.0, 50.0; head awake at "
        "step 60, 60; CPU minutes 2.0, 2.0"
    )
    assert last == "training ratio=0.7143"  # 50 / 70
    trained = [command for command in ran if "evaluate" not in command[0]]
    assert len(trained) == 4 and sum(bench_training.PLAINLY in command for command in trained) == 2
    assert [point["step"] for point in json.loads(file.read_text())["sides"]["plain way"]["2"]["curves"]] == [
        20,
        40,
        60,
    ]
    ran.clear()
    bench_training.main([*options, "--change", "itm_listwise=0"])
    trained = [command for command in ran if "evaluate" not in command[0]]
    assert [command[-2:] for command in trained] == [["--itm_listwise", "0"]] * 2  # ours is there already
    ran.clear()
    bench_training.main([*options, "--epochs", "2"])  # other runs, and no finished ones
    assert len([command for command in ran if "evaluate" not in command[0]]) == 4
    with pytest.raises(SystemExit):
        bench_training.main([*options, "--change", "itm_listwise"])
    assert "given were itm_listwise" in capsys.readouterr().err


def test_search_against_the_whole_matrix(tmp_path, capsys):
    file = tmp_path / "table.json"
    bench_search.main(["--gallery", "2000", "--queries", "10", "--k", "7", "--rounds", "1", "--json", str(file)])
    table = json.loads(file.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"search ratio={table['ratio']:.4g}"
    assert [(row["queries"], row["items"]) for row in table["sizes"]] == [
        *((10, 500), (10, 1000), (10, 2000)),
        *((20, 500), (40, 500)),
    ]


def test_gallery_in_small(tmp_path, capsys):
    file = tmp_path / "table.json"
    options = ["--rows", "3000", "--queries", "4", "--rounds", "1", "--index_rows", "1000", "--json", str(file)]
    bench_gallery.main(options)
    table = json.loads(file.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"gallery ratio={table['ratio']:.4g}"
    (size,) = table["sizes"]
    assert size["rows"] == 3000 and size["bytes"] > 3000 * 256 * 4
    assert (
        all(one["recall_at_10"] > 0.9 for one in size["settings"])
        and sum(one["default"] for one in size["settings"]) == 1
    )
    assert [one["recall_at_10"] for one in size["filters"].values()] == [1, 1, 1]  # few rows are searched exactly


def test_full_scale_in_small(tmp_path, capsys):
    file = tmp_path / "table.json"
    bench_full.main(
        ["--tiny", "--num_images", "30", "--num_texts", "20", "--k", "4", "--unit", "8", "--json", str(file)]
    )
    table = json.loads(file.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"full ratio={table['ratio']:.4g}"
    assert set(table["seconds"]) == {"embed", "search", "rerank"} and 120 <= table["pairs"] <= 200


def test_the_plan_of_the_full_scale(capsys):
    bench_full.main(["--dry_run"])
    told = capsys.readouterr().out
    assert "50,000 images x 20,000 titles, the 128 best of each re-ranked" in told
    assert "one H200 in bf16 at 40 % of its 989 TFLOP/s (assumed)" in told


def test_the_projection_of_preparing():
    quarter = bench_prepare.Run(phases={"read": 10.0, "compare": 10.0}, own=10**9)
    whole = bench_prepare.Run(phases={"read": 40.0, "compare": 160.0}, own=2 * 10**9)
    found = bench_prepare.projected(quarter, whole, 25_000, 100_000)
    assert found["own_gigabytes"] == pytest.approx(2 + 3.9e6 / 75_000)
    assert found["hours_of_phases"]["read"] * 3600 == pytest.approx(40 * 40)  # a line
    assert found["hours_of_phases"]["compare"] * 3600 == pytest.approx(160 * 40**2)  # four times the rows, 16 the time


def test_step_against_the_plain_way(tmp_path, capsys, accelerate_as_before):
    file = tmp_path / "table.json"
    bench_step.main(["--tiny", "--rounds", "1", "--threads", "1", "--json", str(file)])
    table = json.loads(file.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"step ratio={table['ratio']:.4g}"
    sides = table["sides"]
    assert set(sides) == set(bench_step.SIDES) and len(sides) == 12
    assert all(len(side["seconds_of_rounds"]) == 1 for side in sides.values())
    equal = [side["largest_difference"] for name, side in sides.items() if name != "with patch_dropout"]
    assert len(equal) == 11 and max(equal) < 1e-4
    flops = {name: side["flops"] / sides["ours"]["flops"] for name, side in sides.items()}
    assert flops["plain"] > 1.5 and all(flops[f"without {name}"] > 1.05 for name in ("lengths", "shared_photos"))
    assert flops["with cached"] > 1.05 and flops["with unpad"] < 1 and flops["with patch_dropout"] < 0.9
    assert flops["without average"] == flops["without optimizer"] == pytest.approx(1, abs=0.01)


def test_what_more_negatives_cost(tmp_path, accelerate_as_before):
    file = tmp_path / "table.json"
    bench_step.main(["--tiny", "--rounds", "1", "--threads", "1", "--negatives", "1,4", "--json", str(file)])
    table = json.loads(file.read_text())
    one, four = (table["negatives"][count] for count in "14")
    assert one["flops"] == pytest.approx(table["published"]["flops"], rel=0.1)  # the lists alone take next to nothing
    assert four["flops"] > 1.3 * one["flops"] and four["peak_bytes"] > 1.1 * one["peak_bytes"]


def test_how_a_step_grows(tmp_path, capsys, accelerate_as_before):
    file = tmp_path / "table.json"
    bench_step.main(["--tiny", "--rounds", "1", "--threads", "1", "--growth", "--json", str(file)])
    table = json.loads(file.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"growth ratio={table['ratio']:.4g}"
    for name, values in table["growth"].items():
        for cost in ("flops", "peak_bytes"):
            grown = [side[cost] for side in values.values()]
            assert grown == sorted(grown) and grown[-1] > grown[0], (name, cost)
    flops = [side["flops"] for side in table["growth"]["per_device_train_batch_size"].values()]
    assert flops[2] == pytest.approx(2 * flops[1], rel=0.15)


def test_the_memory_of_a_step_is_the_most_that_lives_at_a_time():
    size, given = 4000, torch.ones(1000)
    with bench_step.PeakMemory() as memory:
        given * 2
        assert (memory.held, memory.peak) == (0, size)
        one = given + 1
        one.view(10, 100).mul_(2)
        given.mul_(2)
        assert (memory.held, memory.peak) == (size, size)
        two = one * 3
        del one
        assert (memory.held, memory.peak) == (size, 2 * size)
        del two
        weight = given.clone().requires_grad_()
        weight.mul(2).exp().sum().backward()
        assert memory.held == 2 * size and 3 * size < memory.peak < 6 * size  # the weight and its gradient are left


def test_step_refuses_sides_that_differ(monkeypatch, accelerate_as_before):
    plain = bench_step.draw_one_by_one
    wrong = lambda *args, **options: (plain(*args, **options)[0].flip(0), plain(*args, **options)[1])  # noqa: E731
    monkeypatch.setattr(bench_step, "draw_one_by_one", wrong)
    with pytest.raises(RuntimeError, match="plain: the losses differ by "):
        bench_step.main(["--tiny", "--rounds", "1", "--threads", "1"])


SMALL = ["--count", "2", "--rounds", "1", "--image_size", "32"]


def test_the_loaders_work_for_a_photo(tmp_path, capsys, monkeypatch):
    file = tmp_path / "table.json"
    monkeypatch.setattr(bench_loader, "MEGAPIXELS", (0.05, 0.1))
    bench_loader.main([*SMALL, "--json", str(file)])
    table = json.loads(file.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"loader ratio={table['ratio']:.4g}"
    assert [size["photos"] for size in table["sizes"]] == ["0.05 megapixels", "0.1 megapixels"]
    assert table["settings"]["image_size"] == 32 and {"machine", "versions", "commit"} <= set(table)


def test_what_the_border_of_two_epochs_costs(tmp_path, capsys, monkeypatch):
    file = tmp_path / "table.json"
    monkeypatch.setattr(bench_loader, "MEGAPIXELS", (0.05, 0.1))
    borders = ["--borders", "--epochs", "3", "--batch_size", "2", "--step_seconds", "0"]
    bench_loader.main([*SMALL, *borders, "--json", str(file)])
    table = json.loads(file.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"epoch_border ratio={table['ratio']:.4g}"
    assert table["steps_per_epoch"] == 2 and [len(way["borders"]) for way in table["ways"].values()] == [2, 2]
    monkeypatch.setattr(bench_loader, "going_on", lambda loader, epochs: loader.batches(2, 2 + 2 * epochs))
    with pytest.raises(RuntimeError, match="the two ways do not give the same rows"):
        bench_loader.main([*SMALL, *borders])


def test_the_script_for_a_gpu_in_small(tmp_path):
    script = ROOT / "benchmarks" / "gpu.sh"
    result = run([script, tmp_path, "--tiny"], env={"PYTHON": sys.executable})
    assert_succeeded(result)
    tables = {name: json.loads((tmp_path / f"gpu_{name}.json").read_text()) for name in ("checks", "steps", "rerank")}
    assert {one["result"] for one in tables["checks"]["checks"].values()} == {"held"}
    assert all(row["samples_per_second"] > 0 and row["profile"]["launches"] for row in tables["steps"]["variants"])
    assert (tmp_path / "summary.md").read_text() in result.stdout
