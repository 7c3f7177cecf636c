"""Folders of `save_pretrained` carry the code that loads them: everything the Hub needs, and nothing to remember.

One child process without our package and without network loads every kind of folder; this process is the one with the
package.
"""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import tiny
import torch
from helpers import ROOT, assert_succeeded, run
from remote_code_probe import classified, scores, searched
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
from transformers.pipelines import clean_custom_task

import aliblip
from aliblip.training.checkpoint import save_model
from configuration_aliblip import CUSTOM_PIPELINES, AliBlipConfig

HUB_FILES = sorted(path.name for path in ROOT.glob("*_aliblip.py"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ("saved", "pipeline", "copied")  # by save_pretrained, by the pipeline's, and with root files copied by hand
TASK = "image-text-retrieval"


def tiny_pair(dtype: torch.dtype = torch.float32):
    processor = tiny.processor()
    model = tiny.model(vocab_size=len(processor.tokenizer), itm_slope=0.25, itm_offset=-1.5).to(dtype)
    model.temp.data = torch.tensor([0.0654321])  # fp32 in every case
    return model, processor


def save(folder, dtype: torch.dtype = torch.float32, **options):
    model, processor = tiny_pair(dtype)
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    return folder


def pipeline_of(model, processor):
    return pipeline(TASK, model=model, processor=processor, device="cpu")


def copied_by_hand(folder, saved, without: str = ""):
    """Weights and settings as saved, and the root files of the checkout beside them."""
    shutil.copytree(saved, folder, ignore=shutil.ignore_patterns("*.py"))
    for name in HUB_FILES:
        if name != without:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    folders = {}
    for name, dtype in DTYPES.items():
        folders[f"saved {name}"] = save(root / f"saved-{name}", dtype)
        folders[f"copied {name}"] = copied_by_hand(root / f"copied.{name}", folders[f"saved {name}"])
        folders[f"pipeline {name}"] = root / f"pipeline-{name}"
        pipeline_of(*tiny_pair(dtype)).save_pretrained(folders[f"pipeline {name}"])
    folders["sharded"] = save(root / "sharded", max_shard_size="30KB")
    folders["trained"] = root / "best"
    assert save_model(*tiny_pair(), folders["trained"]) is None
    folders["incomplete"] = copied_by_hand(root / "incomplete", folders["saved fp32"], without="losses_aliblip.py")
    folders["no auto_map"] = copied_by_hand(root / "no-auto-map", folders["saved fp32"])
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        settings = json.loads((folders["no auto_map"] / name).read_text())
        del settings["auto_map"]
        (folders["no auto_map"] / name).write_text(json.dumps(settings))
    return folders


@pytest.fixture(scope="module")
def expected():
    """Scores of the model, and what the pipeline finds with it."""
    return {name: scores(*tiny_pair(dtype)) for name, dtype in DTYPES.items()} | {
        f"searched {name}": searched(pipeline_of(*tiny_pair(dtype))) for name, dtype in DTYPES.items()
    }


def into_hub_cache(home, name: str, saved) -> None:
    """As if `saved` had been downloaded from the repository `name`: other code of the loader than for a folder."""
    repository, commit = home / "hub" / f"models--{name.replace('/', '--')}", "1" * 40
    shutil.copytree(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.fixture(scope="module")
def child(folders, tmp_path_factory):
    """What a process without the package found, and the folders it saved again."""
    work = tmp_path_factory.mktemp("child")
    matrix = [f"{kind} {dtype}" for kind in KINDS for dtype in DTYPES]
    load = {name: (str(folders[name]), {}) for name in (*matrix, "sharded", "trained")}
    fp32 = str(folders["saved fp32"])
    load |= {
        "eager": (fp32, {"attn_implementation": "eager"}),
        "sdpa": (fp32, {"attn_implementation": "sdpa"}),
        "cast": (fp32, {"dtype": "bfloat16"}),
        "device_map": (str(folders["sharded"]), {"device_map": "auto"}),
        "on disk": (
            str(folders["sharded"]),
            {"device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": str(work / "offload")},
        ),
    }
    load["hub"] = ("aliblip/tiny", {"local_files_only": True})
    into_hub_cache(work / "cache", "aliblip/tiny", folders["saved fp32"])
    plan = {
        "load": load,
        "search": {name: str(folders[name]) for name in matrix},
        "refuse": {"not trusted": fp32, "incomplete": str(folders["incomplete"])},
        "save_again": [
            (fp32, str(work / "again"), {}),
            ("aliblip/tiny", str(work / "hub again"), {"local_files_only": True}),
        ],
        "import_from": str(folders["no auto_map"]),
        "classify": fp32,
    }
    (work / "plan.json").write_text(json.dumps(plan))
    result = run(
        [sys.executable, "-I", ROOT / "tests" / "remote_code_probe.py", work / "plan.json", work / "found.pt"],
        env={
            **{"HF_HOME": str(work / "cache"), "HF_HUB_CACHE": str(work / "cache" / "hub")},
            **{"HF_MODULES_CACHE": str(work / "cache" / "modules"), "HF_HUB_OFFLINE": "0"},
        },
        cwd=work,
    )
    assert_succeeded(result)
    return torch.load(work / "found.pt", weights_only=True) | {name: work / name for name in ("again", "hub again")}


def assert_equal_scores(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def assert_complete(folder):
    assert sorted(path.name for path in folder.glob("*.py")) == HUB_FILES
    for file in HUB_FILES:
        assert (folder / file).read_bytes() == (ROOT / file).read_bytes()
    settings = json.loads((folder / "config.json").read_text())
    assert settings["auto_map"] == {
        "AutoConfig": "configuration_aliblip.AliBlipConfig",
        "AutoModel": "modeling_aliblip.AliBlipForImageTextRetrieval",
        "AutoModelForZeroShotImageClassification": "modeling_aliblip.AliBlipForImageTextRetrieval",
    }
    assert settings["custom_pipelines"] == CUSTOM_PIPELINES
    settings = json.loads((folder / "processor_config.json").read_text())
    assert settings["auto_map"] == {"AutoProcessor": "processing_aliblip.AliBlipProcessor"}
    assert (folder / "tokenizer.json").is_file()


def test_a_saved_folder_is_complete(folders):
    for name in ("saved fp32", "pipeline fp32", "sharded", "trained"):
        assert_complete(folders[name])
    assert (folders["saved fp32"] / "model.safetensors").is_file()
    assert len(list(folders["sharded"].glob("*.safetensors"))) > 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_package_the_code_of_the_folder_gives_equal_scores(child, expected, kind, dtype):
    loaded = child["loaded"][f"{kind} {dtype}"]
    assert all(module.startswith("transformers_modules.") for module in loaded["modules"])
    assert loaded["dtype"] == str(DTYPES[dtype]).removeprefix("torch.")
    assert loaded["temperature_dtype"] == "float32"
    assert_equal_scores(loaded["scores"], expected[dtype])
    found = child["searched"][f"{kind} {dtype}"]
    assert found.pop("module").startswith("transformers_modules.")
    assert_equal_scores(found, expected[f"searched {dtype}"])


@pytest.mark.parametrize("trust", [None, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_package_its_classes_win_and_give_equal_scores(folders, expected, kind, dtype, trust):
    folder = folders[f"{kind} {dtype}"]
    model = AutoModel.from_pretrained(folder, trust_remote_code=trust)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
    assert type(model) is aliblip.AliBlipForImageTextRetrieval and model.dtype == DTYPES[dtype]
    assert type(processor) is aliblip.AliBlipProcessor
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is aliblip.AliBlipConfig
    assert_equal_scores(scores(model, processor), expected[dtype])
    pipe = pipeline(TASK, model=str(folder), trust_remote_code=trust, device="cpu")
    assert type(pipe) is aliblip.AliBlipImageTextRetrievalPipeline
    assert_equal_scores(searched(pipe), expected[f"searched {dtype}"])


@pytest.mark.parametrize(
    ("name", "attention", "devices"),
    [
        ("sharded", "sdpa", ["cpu"]),
        ("trained", "sdpa", ["cpu"]),
        ("hub", "sdpa", ["cpu"]),
        ("eager", "eager", ["cpu"]),
        ("sdpa", "sdpa", ["cpu"]),
        ("device_map", "sdpa", ["cpu"]),
        ("on disk", "sdpa", ["cpu", "disk"]),
    ],
)
def test_options_of_from_pretrained(child, expected, name, attention, devices):
    loaded = child["loaded"][name]
    assert all(module.startswith("transformers_modules.") for module in loaded["modules"])
    assert (loaded["attention"], loaded["devices"], loaded["dtype"]) == (attention, devices, "float32")
    if attention == "eager":  # other operations, other last bits
        for key, value in expected["fp32"].items():
            torch.testing.assert_close(loaded["scores"][key], value, rtol=0, atol=1e-5)
    else:
        assert_equal_scores(loaded["scores"], expected["fp32"])


def test_weights_cast_while_loading(child, expected):
    assert child["loaded"]["cast"]["dtype"] == "bfloat16"
    assert child["loaded"]["cast"]["temperature_dtype"] == "float32"
    assert_equal_scores(child["loaded"]["cast"]["scores"], expected["bf16"])


def test_the_task_of_the_cards_tag_works_with_and_without_the_package(child, folders, expected):
    """transformers' own pipeline, which calls the tokenizer itself: no token types, which the model refuses."""
    wanted = expected["fp32"]["itc"][0].softmax(dim=-1).tolist()
    assert child["classified"] == pytest.approx(wanted, abs=1e-6)
    assert classified(folders["pipeline fp32"]) == pytest.approx(wanted, abs=1e-6)


def test_the_parts_of_a_processor_load_without_any_code_of_ours(child):
    assert child["parts"] == ["BlipImageProcessorPil", "BertTokenizer"]


def test_the_config_classes_differ_and_nothing_minds(child):
    """The reason for the rule against isinstance: were they one class, the rule could go."""
    assert not child["loaded"]["saved fp32"]["same_config_class"]


def test_code_that_is_not_trusted_or_not_there_is_not_run(child):
    assert "trust_remote_code=True" in child["refused"]["not trusted"]
    assert "losses_aliblip.py" in child["refused"]["incomplete"]


@pytest.mark.parametrize("name", ["again", "hub again"])
def test_a_model_that_came_with_its_code_saves_a_complete_folder(child, expected, name):
    assert_complete(child[name])
    model, processor = (auto.from_pretrained(child[name]) for auto in (AutoModel, AutoProcessor))
    assert_equal_scores(scores(model, processor), expected["fp32"])


def test_root_files_import_from_a_folder_without_auto_map(child, folders, expected):
    assert child["imported"]["file"] == str(folders["no auto_map"] / "modeling_aliblip.py")
    assert_equal_scores(child["imported"]["scores"], expected["fp32"])


def test_nothing_asked_for_the_network(child):
    assert child["attempts"] == []


def saved_pipelines(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["custom_pipelines"]


def test_a_configuration_that_a_pipeline_has_read_can_be_saved(tmp_path, monkeypatch):
    """As where the package is not there, and `pipeline` reads the entry of the configuration."""
    monkeypatch.setattr(AliBlipConfig, "has_registered_pipeline", False)
    config = tiny.config()
    clean_custom_task(config.custom_pipelines[TASK])
    config.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.glob("*.py")}
    assert {"configuration_aliblip.py", "pipeline_aliblip.py", "retrieval_aliblip.py", "reading_aliblip.py"} <= files
    assert saved_pipelines(tmp_path) == CUSTOM_PIPELINES
    assert AliBlipConfig.from_pretrained(tmp_path).custom_pipelines == CUSTOM_PIPELINES


def test_pipelines_of_others_stay_in_the_configuration(tmp_path):
    other = {"other-task": {"impl": "other.OtherPipeline", "pt": ["AutoModel"]}}
    tiny.config(custom_pipelines=other).save_pretrained(tmp_path)
    assert saved_pipelines(tmp_path) == {**other, **CUSTOM_PIPELINES}
    assert AliBlipConfig.from_pretrained(tmp_path).custom_pipelines == other  # ours is registered
