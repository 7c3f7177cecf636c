"""The doctor: every problem at once, by the checks of the run itself, and nothing is written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from helpers import assert_succeeded, run, run_forked
from runs import TINY, photo, write_split

import train
from aliblip import doctor
from aliblip.data import products
from aliblip.data import rows as rows_module
from aliblip.runtime.mistakes import UsageError
from aliblip.training import examination
from aliblip.training.compiling import check_compiler
from aliblip.training.setup import CHECKS, Start

GROUPS = ["flags", "launcher", "output", "model", "training data", "validation data", "splits", "titles", "course"]
GROUPS += ["Hub", "memory", "disk", "plan"]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> list[str]:
    """Flags for 40 training and 12 validation rows; the photos of a split are its own."""
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder / "data", "train", 40)
    own = {i: {"image": {"bytes": photo(100 + i), "path": f"v{i}.png"}, "product_id": f"v{i}"} for i in range(12)}
    write_split(folder / "data", "validation", 12, own)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return ["--data_dir", str(folder / "data"), "--tokenizer_name", str(folder / "tokenizer")]


@pytest.fixture
def examined(catalogue, tmp_path, monkeypatch, capsys):
    """Runs the doctor with flags: (exit code, {group: [(kind, text)]}). It has written nothing."""

    def look(*flags, main=doctor.main) -> tuple[int, dict[str, list[tuple[str, str]]]]:
        output = ["--output_dir", str(tmp_path / "run"), "--checkpointing_steps", "3"]
        monkeypatch.setattr(sys, "argv", ["doctor", *TINY, *catalogue, *output, *map(str, flags)])
        before = tree(tmp_path)
        code = main()
        assert tree(tmp_path) == before
        return code, told(capsys.readouterr().out)

    return look


def tree(folder: Path) -> dict[str, tuple]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size if path.is_file() else None)
        for path in folder.rglob("*")
    }


def told(printed: str) -> dict[str, list[tuple[str, str]]]:
    groups: dict[str, list[tuple[str, str]]] = {}
    *lines, _, summary = printed.splitlines()
    for line in lines:
        if line and not line.startswith(" "):
            lines_of = groups.setdefault(line, [])
        elif line:
            lines_of.append((line[2:12].strip(), line[12:]))
    counts = [sum(kind == word for lines in groups.values() for kind, _ in lines) for word in ("problem", "warning")]
    assert summary.startswith(f"{counts[0] or 'no'} problem") and f", {counts[1] or 'no'} warning" in summary
    return groups


def texts(groups, kind: str) -> list[str]:
    return [text for lines in groups.values() for found, text in lines if found == kind]


def test_all_is_well_and_the_plan_says_what_it_takes(examined, catalogue, tmp_path):
    code, groups = examined("--num_train_epochs", "2", "--peak_tflops", "0.001")
    assert code == 0 and list(groups) == GROUPS
    assert not texts(groups, "problem") and not texts(groups, "warning") and not texts(groups, "skipped")
    data = groups["training data"]
    assert data[0] == ("ok", f"{catalogue[1]} (train): 40 rows")
    assert ("", "40 products by the column 'product_id', each of one row") in data
    assert ("ok", "all 40 rows decoded: 40 px") in data
    assert [text[:40] for _, text in groups["splits"]] == [
        "none of 12 products of the validation da",
        "12 photos of the validation data with 40",
    ]
    example, *titles = (text for _, text in groups["titles"])
    assert "-> [CLS] red" in example and all("0.00% of the tokens unknown" in text for text in titles)
    assert [text.partition(": ")[2][:10] for text in titles] == ["40 titles:", "12 titles:"]
    plan = [text for _, text in groups["plan"]]
    assert plan[0] == "10 steps of 8 rows, 2 epochs: 80 samples, 2 evaluations"
    assert "FLOPs" in plan[1] and "at 40% of 1 x 0.001 TFLOP/s (assumed)" in plan[2]
    assert plan[4].startswith(f"{tmp_path}/run/best, {tmp_path}/run/last: models,")
    assert plan[5].startswith(f"{tmp_path}/run/checkpoint-N: 5 on the way, 5 kept, ")  # 3, 5, 6, 9 and 10


def test_every_problem_is_told_at_once(examined, tmp_path):
    code, groups = examined(
        *("--alpha", "2", "--queue_size", "0", "--report_to", "paper", "--hub_model_id", "me/name"),
        *("--mixed_precision", "no", "--vision_config", '{"hidden_size": 33}', "--tokenizer_name", "nowhere"),
        *("--caption_column", "nope", "--resume_from_checkpoint", "nowhere", "--device_memory_gb", "0.001"),
    )
    assert code == 2
    problems = texts(groups, "problem")
    for said in (
        *("--alpha is 2.0: it must be", "--queue_size is 0: it must be", "--report_to is 'paper': give one or several"),
        *("would upload nothing: give both", "hidden_size 33 is not divisible", "no tokenizer at 'nowhere'"),
        *("has no column 'nope'", "nowhere is no checkpoint"),
    ):
        assert sum(said in problem for problem in problems) == 1, (said, problems)
    assert len(problems) == 8 and all(": " in problem for problem in problems)
    assert [kind for kind, _ in groups["memory"]] == ["skipped"]  # there is no model, and that is no second problem


def test_last_without_a_checkpoint_is_a_beginning(examined, tmp_path):
    code, groups = examined("--resume_from_checkpoint", "last")
    assert code == 0 and any("no checkpoint yet: the run starts anew" in text for _, text in groups["flags"])


MISTAKES = {
    "range": ["--alpha", "2"],
    "origin": ["--model_name_or_path", "somewhere"],
    "data": ["--data_dir", "no/such/folder"],
    "column": ["--caption_column", "title"],
    "split": ["--validation_split_name", "test"],
    "batch": ["--per_device_train_batch_size", "41"],
    "accumulation": ["--gradient_accumulation_steps", "9"],
    "candidates": ["--k_rerank", "13"],
    "photo": ["--image_size", "30"],
    "title": ["--max_length", "600"],
    "layers": ["--gradient_checkpointing", "--gradient_checkpointing_text_layers", "9"],
    "profile": ["--profile", "9", "--num_train_epochs", "1"],
    "schedule": ["--lr_scheduler_type", "cosin"],
    "delimiter": ["--csv_delimiter", "ab"],
    "resume": ["--resume_from_checkpoint", "elsewhere"],
    "output": ["--output_dir", "/dev/null/run"],
}


@pytest.mark.parametrize("flags", MISTAKES.values(), ids=MISTAKES)
def test_the_doctor_says_what_a_run_would(examined, catalogue, tmp_path, monkeypatch, flags):
    code, groups = examined(*flags)
    argv = ["train.py", *TINY, *catalogue, "--output_dir", str(tmp_path / "run"), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UsageError) as raised:
        train.main()
    assert code == 2 and texts(groups, "problem") == [str(raised.value)]


def test_the_launcher_and_deepspeed_are_asked_whether_they_agree(examined, monkeypatch, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    code, groups = examined()
    assert code == 2 and groups["launcher"][0][0] == "problem" and "ZeRO stage 3" in groups["launcher"][0][1]
    assert len(texts(groups, "problem")) == 1
    zero2 = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    (tmp_path / "ds.json").write_text(json.dumps(zero2))
    code, groups = examined("--processes", "4")
    assert code == 0 and groups["launcher"] == [("ok", "4 processes on CPU, DeepSpeed ZeRO-2, bf16 mixed precision")]
    assert groups["plan"][0][1].startswith("6 steps of 32 rows")


def test_only_the_first_process_of_a_launch_speaks(examined, monkeypatch, capsys, catalogue):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["doctor", *TINY, "--alpha", "2"])
    assert doctor.main() == 0 and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    _, groups = examined()
    assert "2 processes on CPU, DDP, fp32" in groups["launcher"][0][1]


def test_products_are_counted_once(examined, monkeypatch):
    counted, count = [], products.counted_ids
    monkeypatch.setattr(products, "counted_ids", lambda source: counted.append(source.split) or count(source))
    code, groups = examined()
    assert code == 0 and sorted(counted) == ["train", "validation"]
    assert ("ok", "none of 12 products of the validation data is in the training data") in groups["splits"]


def test_memory_is_looked_at_without_data_too(examined):
    code, groups = examined("--caption_column", "nope", "--device_memory_gb", "0.001")
    problems = texts(groups, "problem")
    assert (
        code == 2 and len(problems) == 2 and "has no column 'nope'" in problems[0] and "of 1 MB (--dev" in problems[1]
    )


def test_flags_of_the_machine_are_tried(examined, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    lookup = torch._dynamo.lookup_backend
    of_here = {"aot_eager": lookup("aot_eager"), "broken": broken}
    tried = []
    monkeypatch.setattr(examination, "check_compiler", lambda device: tried.append(device) or check(device))

    def check(device):
        check_compiler(device, of_here[backend])

    backend = "aot_eager"
    code, groups = examined("--compile", "true", "--deterministic", "true")
    assert code == 0 and [line[0] for line in groups["launcher"]] == ["ok"] * 3
    assert groups["launcher"][1][1] == "--compile: layers can be compiled on cpu"
    assert groups["launcher"][2][1].startswith("--deterministic changes nothing on a CPU")
    assert any("as without --compile" in text for _, text in groups["memory"])
    torch._dynamo.reset()
    backend = "broken"
    code, groups = examined("--compile", "true")
    assert code == 2 and "--compile can't be used here (" in groups["launcher"][1][1]
    torch._dynamo.reset()
    assert len(tried) == 2
    code, groups = examined("--compile", "true", "--deterministic", "true", "--device_memory_gb", "80")
    assert code == 0 and len(tried) == 2 and groups["launcher"][1][0] == "skipped"
    assert "a step takes longer" in groups["launcher"][2][1]


def test_photos_at_addresses_are_fetched_only_when_asked_for(examined, monkeypatch, tmp_path):
    for split, count in (("train", 40), ("validation", 12)):
        rows = [{"image": f"https://example.org/{split}{i}.png", "caption": "red cup"} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), (tmp_path / f"{split}.parquet"))
    data = ["--data_dir", tmp_path]
    fetched = []
    monkeypatch.setattr(rows_module, "read_address", lambda address, most: fetched.append(address) or photo(1))
    code, groups = examined(*data)
    assert code == 2 and not fetched and any("--fetch_photos" in problem for problem in texts(groups, "problem"))
    code, groups = examined(*data, "--fetch_photos", "true")
    assert code == 0 and fetched and not texts(groups, "problem")


# --- what a run finds out on its way ----------------------------------------------------------------------------------


def test_what_is_on_both_sides_is_named(examined, tmp_path):
    write_split(tmp_path / "data", "train", 40)
    mixed = {i: {"image": {"bytes": photo(100 + i), "path": f"v{i}.png"}} for i in range(3, 12)}
    write_split(tmp_path / "data", "validation", 12, mixed)  # all of its products, three of its photos
    code, groups = examined("--data_dir", tmp_path / "data")
    (products, photos) = groups["splits"]
    assert products[0] == "warning" and "12 of 12 products of the validation data are in the training" in products[1]
    assert "'p0', 'p1', 'p10'" in products[1] or "'p" in products[1]
    assert photos[0] == "problem" and "3 are there too, byte by byte (validation0.png, " in photos[1]
    assert code == 2
    code, groups = examined("--data_dir", tmp_path / "data", "--compared_rows", "0")
    assert code == 0 and groups["splits"][1][0] == "skipped"


def test_rows_that_would_stop_a_run_are_a_problem_and_few_are_a_warning(examined, tmp_path):
    write_split(tmp_path / "data", "train", 40, {i: {"caption": " "} for i in (3, 4, 5)})
    write_split(tmp_path / "data", "validation", 12, {2: {"caption": ""}})
    code, groups = examined("--data_dir", tmp_path / "data", "--compared_rows", "0")
    (problem,) = texts(groups, "problem")
    assert code == 2 and "3 are unusable (7.5%)" in problem and "train3.png" in problem
    assert "--max_skipped_fraction 0.05: repair them, or raise it" in problem
    assert any("1 are unusable" in text for kind, text in groups["validation data"] if kind == "warning")
    code, groups = examined("--data_dir", tmp_path / "data", "--compared_rows", "0", "--max_skipped_fraction", "0.1")
    assert code == 0 and any("3 are unusable" in text for text in texts(groups, "warning"))


@pytest.mark.parametrize(("caption", "kind"), [("красный чайник", "problem"), ("red cup чайник", "warning")])
def test_titles_that_the_tokenizer_does_not_know(examined, tmp_path, caption, kind):
    write_split(tmp_path / "data", "train", 40, {i: {"caption": caption} for i in range(40)})
    write_split(tmp_path / "data", "validation", 12)
    code, groups = examined("--data_dir", tmp_path / "data", "--compared_rows", "0")
    assert code == (2 if kind == "problem" else 0)
    line, of_validation = [line for line in groups["titles"] if "unknown" in line[1]]
    assert of_validation[0] == "ok" and line[0] == kind and "'чайник'" in line[1] and "--tokenizer_name" in line[1]


def test_where_the_tokenizer_is_from(examined, tmp_path):
    file = tmp_path / "vocab.txt"  # of which a tokenizer knows no name
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cup"]))
    _, groups = examined("--tokenizer_name", file)
    assert any(f"tokens, from {file}; titles are cut at" in text for _, text in groups["model"])


def test_titles_that_are_cut(examined):
    _, groups = examined("--max_length", "4")
    train, alike, validation = (text for kind, text in groups["titles"] if kind == "warning")
    assert "(train): 30 titles that are cut read like another one up to there" in alike
    for side, text in (("train", train), ("validation", validation)):
        assert f"({side}): " in text and "75.0% of the titles cut at 4 tokens: raise --max_length, up to 7" in text
    # A run tells of each side under its rows; here nothing is told twice.
    assert not [text for name in ("training data", "validation data") for _, text in groups[name] if "tokens" in text]


def test_memory_and_disk_that_do_not_suffice(examined, monkeypatch):
    code, groups = examined("--device_memory_gb", "0.002")
    (problem,) = texts(groups, "problem")
    fitting = re.search(r"the largest batch that fits is (\d+): --per_device_train_batch_size (\d+) or less", problem)
    assert code == 2 and fitting[1] == fitting[2] and 0 < int(fitting[1]) < 8
    code, groups = examined("--device_memory_gb", "0.002", "--per_device_train_batch_size", fitting[1])
    assert not [kind for kind, _ in groups["memory"] if kind == "problem"]
    assert "not even one row fits" in str(examined("--device_memory_gb", "0.001")[1]["memory"])
    # Room for both models and two checkpoints, one of them beside.
    _, groups = examined()
    monkeypatch.setattr(examination.shutil, "disk_usage", lambda path: SimpleNamespace(free=9_000_000))
    code, groups = examined("--num_train_epochs", "9")
    (problem,) = texts(groups, "problem")
    limit = re.search(r"--save_total_limit (\d+)$", problem)
    assert code == 2 and limit
    assert examined("--num_train_epochs", "9", "--save_total_limit", limit[1])[0] == 0
    assert examined("--num_train_epochs", "9", "--save_total_limit", int(limit[1]) + 1)[0] == 2


def test_what_is_told_to_be_written_is_what_a_run_writes(examined, catalogue, tmp_path):
    _, groups = examined()
    flags = ["--num_train_epochs", "1", "--checkpointing_steps", "3", "--output_dir", tmp_path / "run"]
    assert_succeeded(run_forked([sys.executable, "train.py", *TINY, *catalogue, *flags]))
    told_bytes = {
        text.split(": ")[0].rpartition("/")[2]: float(re.search(r"([\d.]+) (kB|MB) each", text)[1])
        * {"kB": 1e3, "MB": 1e6}[re.search(r"([\d.]+) (kB|MB) each", text)[2]]
        for _, text in groups["plan"]
        if " each" in text
    }
    size = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoint-3").iterdir())
    assert told_bytes["checkpoint-N"] == pytest.approx(size, rel=0.1)
    weights = (tmp_path / "run" / "best" / "model.safetensors").stat().st_size
    assert weights < told_bytes["last"] < weights + 3e6
    # The folder is in use now: a new run there is refused, one that goes on or replaces it is not.
    assert "holds an earlier run" in str(texts(examined()[1], "problem"))
    code, groups = examined("--resume_from_checkpoint", "last", "--num_train_epochs", "2")
    assert code == 0 and ("ok", f"goes on from {tmp_path}/run/checkpoint-5 at step 5") in groups["course"]
    assert groups["plan"][0][1].startswith("5 steps of 8 rows, 2 epochs: 40 samples")
    # What a kill left is left for the run to put in order.
    (tmp_path / "run" / "checkpoint-5").rename(tmp_path / "run" / ".checkpoint-5.old")
    code, groups = examined("--resume_from_checkpoint", "last")
    assert ("ok", f"goes on from {tmp_path}/run/checkpoint-3 at step 3") in groups["course"]


# --- the commands -----------------------------------------------------------------------------------------------------


def test_a_dry_run_is_the_doctor(examined, catalogue, tmp_path, monkeypatch):
    _, by_doctor = examined("--alpha", "2", "--k_rerank", "13")
    code, by_train = examined("--alpha", "2", "--k_rerank", "13", "--dry_run", main=train.main)
    assert (
        code == 2 and texts(by_train, "problem") == texts(by_doctor, "problem") and len(texts(by_train, "problem")) == 2
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *catalogue, "--compared_rows", "9"])
    with pytest.raises(UsageError, match="--compared_rows is for a plan: give --dry_run too"):
        train.main()


def test_the_command_ends_with_its_exit_code(catalogue, tmp_path):
    flags = [*TINY, *catalogue, "--output_dir", tmp_path / "run", "--k_rerank", "13"]
    flags = ["--samples_per_second", "1", "--checkpointing_steps", "3", *flags]
    result = run([sys.executable, "-m", "aliblip.doctor", *flags])
    assert result.returncode == 2 and result.stderr == "" and "  problem   k_rerank is 13" in result.stdout
    assert result.stdout.endswith("\n1 problem, no warnings; nothing was written\n")
    assert not (tmp_path / "run").exists()
    result = run_forked([sys.executable, "train.py", *flags[:-2], "--dry_run"])
    assert_succeeded(result)
    assert "nothing was written" in result.stdout and not (tmp_path / "run").exists()


def test_a_bug_in_a_check_keeps_its_traceback(examined, monkeypatch):
    def broken(self):
        raise ValueError("planted")

    monkeypatch.setattr(Start.batches, "func", broken)
    with pytest.raises(ValueError, match="planted") as raised:
        examined()
    assert not isinstance(raised.value, UsageError)


def test_every_check_is_of_a_group_that_is_looked_at():
    assert {check.group for check in CHECKS} <= set(GROUPS)
    assert all(hasattr(Start, check.part) for check in CHECKS)
