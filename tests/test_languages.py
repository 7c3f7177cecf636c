"""Titles of any script: a tokenizer is learned from them, and each language finds its products; and the README's script
from files to a search page, on a few hundred products with titles in each language."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from helpers import ROOT, assert_succeeded, environment, free_port, run_forked, run_ranks, start_forked
from languages import LANGUAGES, PRODUCTS, SHOP, draw, shop_title, title, write_catalogue, write_shop
from prepare_case import needs_prepare
from served import needs_gradio
from transformers import AutoTokenizer, pipeline

import train
from aliblip.runtime.arguments import parse
from aliblip.runtime.mistakes import UsageError
from aliblip.training import setup
from aliblip.training.tokenizer import tokenizer_bytes
from reading_aliblip import read_photo

TINY = [
    *("--image_size", "32", "--image_text_hidden_size", "64"),
    *("--vision_config", '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}'),
    *(
        "--text_config",
        '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}',
    ),
    *("--in_batch_itc", "1", "--learning_rate", "2e-3", "--warmup_steps", "10"),
    *("--dataloader_num_workers", "0", "--augmentation", "none", "--logging_steps", "20"),
]
SMALL = [
    *("--config_name", "base", *TINY, "--per_device_train_batch_size", "25", "--queue_size", "100"),
    *("--max_train_steps", "80", "--num_train_epochs", "40", "--evaluate_every", "0"),
    *("--checkpointing_steps", "40", "--save_total_limit", "1"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two processes on 25 products in five languages: (its folder, its flags, what it printed). It begins with
    a comparison of the tokenizers that both have learned."""
    folder = tmp_path_factory.mktemp("languages")
    write_catalogue(folder / "data", photos=2)
    flags = ["--train_tokenizer", "--data_dir", folder / "data", "--output_dir", folder / "run"]
    result = run_ranks("cpu_2_processes.yaml", ROOT / "train.py", [*SMALL, *flags])
    assert_succeeded(result)
    return folder / "run", [*SMALL, *map(str, flags)], result.stdout


def test_every_language_finds_its_products(trained):
    folder, _, printed = trained
    assert printed.count("learned from 250 titles of 250 rows") == 1 and "0.00% of the tokens unknown" in printed
    assert "bert-base-uncased: " in printed
    pipe = pipeline("image-text-retrieval", model=str(folder / "last"))
    photos = [read_photo(draw(*product, seed=5000)) for product in PRODUCTS]
    model, processor = pipe.model.eval(), pipe.processor
    with torch.no_grad():
        images = model.get_image_features(processor(images=photos, return_tensors="pt")["pixel_values"]).pooler_output
        for language in LANGUAGES:
            titles = processor(text=[title(*product, language) for product in PRODUCTS], return_tensors="pt")
            texts = model.get_text_features(**titles).pooler_output
            best = (texts @ images.T).topk(3).indices
            found = (best == torch.arange(len(PRODUCTS))[:, None]).any(dim=1).float().mean().item()
            assert found > 0.5, (language, found)  # by chance 3 of 25, 0.12
    # People type pinyin without tones, and Arabic without signs of vowels.
    words = processor.tokenizer("hongse beizi")["input_ids"]
    assert words == processor.tokenizer("Hóngsè BĒIZI")["input_ids"]
    red_cup = PRODUCTS.index(("cup", "red"))
    answer = pipe(title("cup", "red", "Russian"), gallery=photos, direction="text-to-image", top_k=5)
    assert red_cup in [found["id"] for found in answer]


def test_the_tokenizer_goes_with_the_model_and_with_the_run(trained, monkeypatch):
    folder, flags, _ = trained
    kept, saved = (AutoTokenizer.from_pretrained(folder / name) for name in ("trained_tokenizer", "last"))
    assert torch.equal(tokenizer_bytes(kept), tokenizer_bytes(saved)) and "杯" in kept.get_vocab()
    # A run that goes on takes what is there, and learns nothing.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(setup, "learn_tokenizer", None)
    groups = parse(train.GROUPS, [*flags, "--resume_from_checkpoint", "last"])[:4]
    again = setup.set_up(*groups)
    again.owner.release()
    resumed = again.processor.tokenizer
    assert torch.equal(tokenizer_bytes(resumed), tokenizer_bytes(kept))
    (folder / "trained_tokenizer").rename(folder / "elsewhere")
    with pytest.raises(UsageError, match="the tokenizer that the run to go on with has learned: bring it back, or"):
        setup.set_up(*groups)
    (folder / "elsewhere").rename(folder / "trained_tokenizer")


def test_what_is_quickly_seen_is_refused_before_a_tokenizer_is_learned(tmp_path, monkeypatch):
    write_catalogue(tmp_path / "data", photos=1)
    opened, open_source = [], setup.open_source
    monkeypatch.setattr(setup, "open_source", lambda **named: opened.append(named["split"]) or open_source(**named))
    flags = ["--train_tokenizer", "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    groups = parse(train.GROUPS, [*SMALL, *flags])[:4]
    start = setup.Start(*groups)
    told = []
    start.tell = told.append
    assert start.tokenizer is not None and start.told is not None and opened == ["train"], "it is opened once"
    assert sum("cut" in line for line in told) <= 1
    (tmp_path / "run" / "last").mkdir(parents=True)
    monkeypatch.setattr(setup, "learn_tokenizer", None)
    with pytest.raises(UsageError, match="has a folder 'last' that no run wrote"):
        setup.set_up(*groups)


@pytest.mark.parametrize("other", ["tokenizer_name", "text_model_name_or_path"])
def test_two_tokenizers_are_one_too_many(tmp_path, other):
    groups = parse(
        train.GROUPS, [*SMALL, "--train_tokenizer", f"--{other}", "somewhere", "--output_dir", str(tmp_path)]
    )
    with pytest.raises(UsageError, match=f"--train_tokenizer learns a tokenizer, and --{other} brings one"):
        setup.Start(*groups[:4]).named_tokenizer  # noqa: B018


# --- the README's script ----------------------------------------------------------------------------------------------

PATIENCE = 300
# What makes each of its commands small; the commands themselves run as they are typed.
RUN = [*TINY, "--per_device_train_batch_size", "32", "--queue_size", "256", "--max_train_steps", "160"]
RUN += ["--evaluate_every", "100", "--k_rerank", "8"]
SMALLER = {
    "aliblip.prepare": ["--split_shares", "validation=0.1,test=0.2", "--tokenizer_vocab_size", "500", "--workers", "1"],
    "aliblip.doctor": RUN,
    "train.py": RUN,
    "evaluate_retrieval.py": ["--k_rerank", "8", "--slices", "language"],
    "aliblip.gallery": ["--dataloader_num_workers", "0"],
    "aliblip.serve": [],
}


def script():
    """{program: command} of the README's section."""
    section = (ROOT / "README.md").read_text().split("## From your files to a search page", 1)[1]
    commands = re.search(r"```\n(.*?)```", section, flags=re.DOTALL).group(1)
    found = {}
    for words in map(shlex.split, commands.replace("\\\n", " ").splitlines()):
        program = words[2] if words[1] == "-m" else words[1]
        start = [sys.executable, *words[1:3]] if words[1] == "-m" else [sys.executable, ROOT / words[1]]
        found[program] = [*start, *words[len(start) :], *SMALLER[program]]
    assert list(found) == list(SMALLER)
    return found


@contextmanager
def serving(command, folder):
    """A page that answers until the end of the block."""
    log = folder / "serve.log"
    process = start_forked(command, environment(GRADIO_TEMP_DIR=str(folder / "uploads")), log, log, cwd=folder)
    try:
        until = time.monotonic() + PATIENCE
        while not log.is_file() or "Running on" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            process.wait(30)


@needs_gradio
@needs_prepare
def test_the_script_of_the_readme_leads_from_files_to_a_search_in_each_language(tmp_path):
    from gradio_client import Client

    write_shop(tmp_path / "my_catalogue")
    *commands, serve = script().items()
    printed = {}
    for program, command in commands:
        result = run_forked(command, cwd=tmp_path)
        assert_succeeded(result)
        printed[program] = result.stdout
    assert "no problems" in printed["aliblip.doctor"], printed["aliblip.doctor"]
    # What is printed as the next command is the one that is typed.
    following = printed["aliblip.prepare"].splitlines()[-1].removeprefix("next: ")
    assert following in (ROOT / "README.md").read_text()
    results = json.loads((tmp_path / "outputs/mine/best/evaluation/results.json").read_text())
    recalls = {of["value"]: of["text_to_image"]["itc"]["mean_recall"] for of in results["slices"]["language"]}
    assert sorted(recalls) == sorted(LANGUAGES) and min(recalls.values()) > 0.3, recalls  # by chance 0.1
    port = free_port()
    with serving([*serve[1], "--server_port", port], tmp_path):
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        for language in LANGUAGES:
            hits = 0
            for number in range(0, len(SHOP), 13):
                found = client.predict(shop_title(*SHOP[number], language), 20, 0, api_name="/search_by_title")
                hits += any(f"{number:03d}-" in result["id"] for result in found)
            assert hits > 6, (language, hits)  # of 24; by chance 2
