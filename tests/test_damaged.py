"""Files of somebody else that are damaged or made up: one line that names them, no traceback, and no gigabytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from safetensors.torch import save_file

from aliblip import convert
from aliblip.models import card
from aliblip.models.card import model_card
from aliblip.models.loading import load_pretrained
from aliblip.models.upload import check_folder
from aliblip.retrieval import writing
from aliblip.retrieval.compare import check_comparable
from aliblip.retrieval.results import check_results_of_others
from aliblip.retrieval.writing import write
from aliblip.runtime.mistakes import UsageError
from aliblip.training.building import build_config
from aliblip.training.carried import read_momentum

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
# Deep enough for what copies it, and not for what reads it.
DEEP_LIST = json.loads("[" * 900 + "]" * 900)


def put(name: str, content: str | bytes):
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def half(name: str):
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def fields_of(file: str, *place: str, **fields):
    """Fields of a file, or of something in it; None takes one out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        inside = content
        for name in place:
            inside = inside[name]
        inside.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del inside[name]
        (folder / file).write_text(json.dumps(content))

    return change


settings = partial(fields_of, "config.json")
photos_of = partial(fields_of, "processor_config.json", "image_processor")
vocabulary = partial(fields_of, "tokenizer.json", "model", "vocab")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04no pickle")


def other_than_a_file(make, name: str):
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


DAMAGE = {
    "config.json is a pipe": (other_than_a_file(os.mkfifo, "config.json"), "config.json of .* is a folder, a pipe"),
    "tokenizer.json is a folder": (other_than_a_file(Path.mkdir, "tokenizer.json"), "tokenizer.json of .* is a folder"),
    "tokenizer_config.json is a device": (
        other_than_a_file(lambda path: path.symlink_to("/dev/zero"), "tokenizer_config.json"),
        "tokenizer_config.json of .* is a folder, a pipe or a device",
    ),
    "tokenizer.json of a terabyte": (other_than_a_file(sparse, "tokenizer.json"), "has 1,099,511,627,776 bytes"),
    "half the weights": (half("model.safetensors"), "can't load the model"),
    "no bytes of weights": (put("model.safetensors", b""), "can't load the model"),
    "a header of a terabyte": (put("model.safetensors", (2**40).to_bytes(8, "little") + b"{}"), "can't load the model"),
    "no pickle": (pickled, "can't load the model"),
    "config.json without end": (put("config.json", DEEP), "config.json of .* nested too deeply"),
    "config.json nested in one place": (settings(more=DEEP_LIST), "can't load the model"),
    "config.json is a list": (put("config.json", "[1]"), "config.json of .* holds a list"),
    "config.json is no text": (put("config.json", b"\xff\xfe\0"), "config.json of .* can't be read"),
    "tokenizer.json without end": (put("tokenizer.json", DEEP), "can't load the processor"),
    "half of tokenizer.json": (half("tokenizer.json"), "can't load the processor"),
    "tokenizer.json is empty": (put("tokenizer.json", "{}"), "can't load the processor"),
    "tokenizer.json is a list": (put("tokenizer.json", "[]"), "can't load the processor"),
    "tokenizer_config.json without end": (put("tokenizer_config.json", DEEP), "tokenizer_config.json of .* too deeply"),
    "numbers for names": (
        put("processor_config.json", '{"max_length": "x", "image_processor": 7}'),
        "can't load the processor",
    ),
    "pixels without end": (photos_of(rescale_factor=1e308), "makes values of a photo that are not finite"),
    "pixels divided by 0": (photos_of(image_std=[0, 0, 0]), "makes values of a photo that are not finite"),
    "an id without end": (vocabulary(red=2**31), "the id of one: ids must be counted from 0"),
    "no unknown word": (vocabulary(**{"[UNK]": None}), r"can't write a title \(.*UNK.* take another"),
    "titles of a million tokens": (
        fields_of("processor_config.json", max_length=1_000_000),
        "max_length of .* is 1000000",
    ),
    "a tower that is a word": (settings(vision_config="x"), "vision_config is a str"),
    "an unknown activation": (
        settings("vision_config", hidden_act="nope"),
        "vision_config.hidden_act is 'nope': it must be one of",
    ),
    "a list for an activation": (
        settings("text_config", hidden_act=["x"]),
        r"text_config.hidden_act is \['x'\]: it must",
    ),
    "labels without end": (settings("text_config", num_labels=10**12), "names 1,000,000,000,000 labels"),
    "an unknown type": (settings(dtype="nope"), "no attribute 'nope'"),
    "ten million layers": (settings("vision_config", num_hidden_layers=10**7), "from 1 to 1000"),
    "ten million layers of text": (settings("text_config", num_hidden_layers=10**7), "from 1 to 1000"),
    "16 million pixels": (settings("vision_config", image_size=16_000_000), "image_size is 16000000"),
    "ten billion words": (settings("text_config", vocab_size=10**10), "vocab_size is 10000000000"),
    "a width of ten billion": (settings(image_text_hidden_size=10**10), "image_text_hidden_size is 10000000000"),
    "within all bounds, and 12 billion parameters": (
        settings("vision_config", num_hidden_layers=60, hidden_size=4096, intermediate_size=16_384),
        r"describes a model of 12,\d\d\d,\d\d\d,\d\d\d parameters, its weights have",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "whole"
    processor = tiny.processor()
    tiny.model(vocab_size=len(processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_model_is_told_in_one_line(whole, tmp_path, case):
    damage, message = DAMAGE[case]
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    damage(folder)
    with pytest.raises(UsageError, match=message) as told:
        load_pretrained(str(folder))
    assert "\n" not in str(told.value) and str(folder) in str(told.value)


def test_an_original_file_that_finds_no_room_is_told_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 28928 vs 28880\nmore")

    processor = tiny.processor()
    model = tiny.model(vocab_size=len(processor.tokenizer))
    monkeypatch.setattr(convert.torch, "save", full)
    with pytest.raises(UsageError, match=r"model.pth can't be written .*unexpected pos.*: make room") as told:
        convert._write_original(tmp_path, model, processor, None)
    assert "\n" not in str(told.value)


def test_half_a_tokenizer_is_not_published(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    check_folder(folder)
    half("tokenizer.json")(folder)
    with pytest.raises(UsageError, match=r"tokenizer.json can't be read .*: save the model again") as told:
        check_folder(folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", {"rows": "x", "files": 3}),
        ("manifest.json", {"rows": 3}),
        ("machine.json", {"launcher": ["x"]}),
        ("model/results.json", {"mean_recall": "x"}),
        ("model/results.json", {"mean_recall": 0.5, "dataset": ["x"], "split": 7, "text_to_image": 7}),
        ("model/config.json", {"vision_config": {}, "text_config": {}}),
        ("model/processor_config.json", {"max_length": {}}),
    ],
)
def test_records_of_a_run_that_are_made_up_are_told_in_one_line(whole, tmp_path, name, content):
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (tmp_path / "arguments.json").write_text('{"learning_rate": 1}')
    assert model_card(folder, "name")
    (tmp_path / name).write_text(json.dumps(content))
    try:
        model_card(folder, "name")
    except UsageError as error:
        assert "\n" not in str(error) and "is not what a run writes" in str(error)
        return
    assert name == "model/processor_config.json"  # whose value is only shown


def test_a_fault_of_our_own_is_not_taken_for_one_of_the_files(whole, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(whole, tmp_path / "model"))

    def fails(*args):
        raise KeyError("planted")

    monkeypatch.setattr(card, "_limits", fails)
    with pytest.raises(KeyError, match="planted"):
        model_card(folder, "name")


def test_photos_have_the_size_of_the_model_whatever_the_processor_says(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    side = {"height": 10**8, "width": 10**8}
    photos_of(size=side, do_center_crop=True, crop_size=side, do_pad=True, pad_size=side)(folder)
    assert load_pretrained(str(folder))[1].image_size == 32


def test_a_configuration_to_train_from_is_read_with_the_same_care(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    names = ("vision_config", "text_config", "image_size", "image_text_hidden_size", "temperature_init")
    args = SimpleNamespace(config_name=str(folder), **dict.fromkeys(names))
    for damage in (
        put("config.json", DEEP),
        settings(more=DEEP_LIST),
        settings("text_config", num_hidden_layers=10**7),
    ):
        shutil.copy(whole / "config.json", folder)
        damage(folder)
        with pytest.raises(UsageError) as told:
            build_config(args, tiny.processor(), [])
        assert "\n" not in str(told.value)


def test_half_the_momentum_is_told_in_one_line(tmp_path):
    save_file(tiny.model().state_dict(), tmp_path / "momentum.safetensors")
    half("momentum.safetensors")(tmp_path)
    with pytest.raises(UsageError, match="momentum.safetensors is no safetensors file") as told:
        read_momentum(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", [DEEP, "[1]", "{", "7"])
def test_results_and_configurations_that_are_none_are_told_in_one_line(whole, tmp_path, content):
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    for name in ("results.json", "config.json"):
        (folder / name).write_text(content)
    for read in (
        lambda: check_comparable(folder / "results.json"),
        lambda: check_results_of_others(folder, "model", "data", "test"),
        lambda: check_folder(folder),
    ):
        with pytest.raises(UsageError) as told:
            read()
        assert "\n" not in str(told.value) and str(folder) in str(told.value)


def test_results_that_find_no_room_are_told_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "write_results", full)
    monkeypatch.setattr(writing, "format_table", lambda results: "")
    setup = SimpleNamespace(options=None, output_dir=tmp_path)
    with pytest.raises(UsageError, match=f"can't be written into {tmp_path} .*No space left.*: make room"):
        write(SimpleNamespace(seconds={}, skipped=[]), {}, setup)
