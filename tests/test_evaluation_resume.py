"""An evaluation that was killed, or ran out of disk, goes on and gives the same; other work is refused."""

from __future__ import annotations

import errno
import json
import shutil
import sys

import pytest
import torch
from evaluation_fixtures import BROKEN, ROWS, UNIT, K, flags, retrieve, without_run
from helpers import run
from safetensors.torch import load_file, save_file

from aliblip.retrieval import evaluation, reranking
from aliblip.runtime import parts as parts_module
from aliblip.runtime.mistakes import UsageError
from aliblip.runtime.parts import Parts

# A whole run of the script in a process that kills itself: after so many units of the second stage.
KILLED = """
import os, signal, sys
import retrieval_aliblip as engine
from aliblip.runtime import parts
parts.SECONDS = 0.0
rerank, calls = engine.Reranker.__call__, []
def counted(*arguments):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return rerank(*arguments)
engine.Reranker.__call__ = counted
import evaluate_retrieval
sys.argv = ["evaluate_retrieval.py", *sys.argv[1:]]
evaluate_retrieval.main()
"""


def counted(calls, name, work):
    def call(*arguments):
        calls.append(name)
        return work(*arguments)

    return call


@pytest.mark.parametrize("depth", [str(K), "all"])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(depth, model_folder, catalogue, tmp_path, run_script):
    arguments = [str(part) for part in flags(model_folder, catalogue, tmp_path / "out", "--k_rerank", depth)]
    killed = run([sys.executable, "-c", KILLED, *arguments])
    assert killed.returncode == -9 and not (tmp_path / "out" / "results.json").exists()
    if depth == "all":
        with pytest.raises(UsageError, match=r"unfinished work on something else \(longest title was 35, is 9"):
            shorter = tmp_path / "shorter"
            shutil.copytree(model_folder, shorter)
            settings = json.loads((shorter / "processor_config.json").read_text()) | {"max_length": 9}
            (shorter / "processor_config.json").write_text(json.dumps(settings))
            run_script(*arguments, "--model_name_or_path", shorter)
    calls = []
    with pytest.MonkeyPatch.context() as patched:
        for owner, name in ((evaluation.engine.Reranker, "__call__"), (evaluation.engine, "embed_texts")):
            patched.setattr(owner, name, counted(calls, name, getattr(owner, name)))
        assert run_script(*arguments)[0] == 0
    units = -(-ROWS // UNIT)
    assert calls.count("embed_texts") == 0 and calls.count("__call__") == units - 3
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
            patched.setattr(evaluation.engine.Reranker, "__call__", None)
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
    with pytest.raises(UsageError, match=r"unfinished work on something else \(model was x, is [0-9a-f]{32};"):
        run_script(*arguments)
    assert run_script(*arguments, "--overwrite_output_dir")[0] == 0
    assert not (tmp_path / "out" / "parts").exists()
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(UsageError, match="holds other results .model was .*model0, is .*other"):
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


def test_one_flipped_bit_in_a_part_is_noticed_and_it_is_made_again(model, loader, tmp_path, caplog):
    parts = Parts(tmp_path / "parts", {"model": "m"})
    expected = retrieve(model, loader, parts=parts)
    for stage in ("embed", "rerank"):
        (file,) = (tmp_path / "parts").glob(f"{stage}-*.safetensors")
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        caplog.clear()
        found = retrieve(model, loader, parts=parts)
        assert f"{file} is damaged (its checksum is another) and is made again" in caplog.text
        assert found.resumed_units == -(-ROWS // UNIT), "those of the other stage"
        assert torch.equal(found.text_to_image.rankings.scores, expected.text_to_image.rankings.scores)
        assert retrieve(model, loader, parts=parts).resumed_units == 2 * -(-ROWS // UNIT), "it is whole again"


def test_one_flipped_bit_among_the_logits_of_all_pairs_is_noticed(model, loader, tmp_path, caplog):
    parts = Parts(tmp_path / "parts", {"model": "m"})
    expected = retrieve(model, loader, k_rerank="all", parts=parts)
    file, units = tmp_path / "parts" / "itm_logits.npy", -(-ROWS // UNIT)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    found = retrieve(model, loader, k_rerank="all", parts=parts)
    assert "a block of itm_logits.npy is damaged (its checksum is another) and is made again" in caplog.text
    assert found.resumed_units == 2 * units - 1
    assert torch.equal(found.text_to_image.rankings.scores, expected.text_to_image.rankings.scores)
    again = retrieve(model, loader, k_rerank="all", parts=parts)
    assert again.resumed_units == 2 * units
