"""Titles of any script: a tokenizer is learned from them, and each language finds its products."""

from __future__ import annotations

import pytest
import torch
from helpers import ROOT, assert_succeeded, run_ranks
from languages import LANGUAGES, PRODUCTS, draw, title, write_catalogue
from transformers import AutoTokenizer, pipeline

import train
from aliblip.runtime.arguments import parse
from aliblip.runtime.mistakes import UsageError
from aliblip.training import setup
from aliblip.training.tokenizer import tokenizer_bytes
from reading_aliblip import read_photo

SMALL = [
    *("--config_name", "base", "--image_size", "32", "--image_text_hidden_size", "64"),
    *("--vision_config", '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}'),
    *(
        "--text_config",
        '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}',
    ),
    *("--per_device_train_batch_size", "25", "--queue_size", "100", "--in_batch_itc", "1", "--learning_rate", "2e-3"),
    *("--dataloader_num_workers", "0", "--augmentation", "none", "--evaluate_every", "0", "--warmup_steps", "10"),
    *("--max_train_steps", "80", "--num_train_epochs", "40", "--logging_steps", "20"),
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
    resumed = setup.set_up(*groups).processor.tokenizer
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
