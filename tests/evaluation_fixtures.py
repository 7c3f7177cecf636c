"""What the tests of the evaluation share: a small catalogue, a tiny model, and the script started in this process.

`conftest.py` names this file as a plugin, so that its fixtures are made once for all files.
"""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import BertTokenizer, BlipImageProcessorPil

import evaluate_retrieval as script
from aliblip.data.collate import Collator
from aliblip.data.loader import EvalLoader
from aliblip.data.sources import open_source
from aliblip.retrieval import evaluation
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

COLOURS = ["red", "green", "blue", "white", "black", "pink"]
THINGS = ["cap", "lamp", "shirt", "mug", "chair"]
ROWS = 29
BROKEN, UNTITLED = 11, 20
K = 6
UNIT = 4
TOO_MANY = "k_rerank is 1000, but the gallery has 29 items: give a number from 1 to 29, or leave it out"
NAMES = {"model_name": "m", "dataset_name": "d", "split": "validation"}


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


def retrieve(model, loader, **options):
    return evaluation.retrieve(model, loader, **{"k_rerank": K, **options})


def flags(model_folder, catalogue, output_dir, *more):
    return [
        *("--model_name_or_path", model_folder, "--data_dir", catalogue, "--output_dir", output_dir),
        *("--k_rerank", str(K), "--per_device_eval_batch_size", str(UNIT), "--dataloader_num_workers", "0"),
        *more,
    ]


def without_run(results):
    return json.dumps({key: value for key, value in results.items() if key != "run"}, indent=2)
