"""A wheel, installed where no checkout is: it holds all that the library needs to train, evaluate and search."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny
from helpers import ROOT, assert_succeeded, run
from runs import TINY, write_split

SCRIPTS = ("evaluate_retrieval.py", "train.py")
# With nothing of the checkout in reach everything imports, a photo is found, and this is where it comes from.
USE = """
import importlib, json, pkgutil, sys
import aliblip
from aliblip.runtime.installation import install_hint, script_command
from PIL import Image
from transformers import pipeline

modules = [f"aliblip.{found.name.partition('.')[2]}" for found in pkgutil.walk_packages(aliblip.__path__, "aliblip.")]
for module in modules:
    importlib.import_module(module)
pipe = pipeline("image-text-retrieval", model=sys.argv[1], top_k=2)
found = pipe("red cup", gallery=sys.argv[2:], direction="text-to-image")
gallery = aliblip.Gallery.build(sys.argv[2:], "gallery", model=pipe.model, processor=pipe.processor)
kept = pipe("red cup", gallery=gallery, direction="text-to-image")
embedded = pipe.model.get_image_features(**pipe.processor(images=[Image.open(sys.argv[2])], return_tensors="pt"))
files = [module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)]
print(json.dumps({
    "modules": modules,
    "ours": [file for file in files if "aliblip" in file],
    "path": sys.path,
    "found": [result["itc"] for result in found],
    "kept": [result["itc"] for result in kept],
    "embedded": list(embedded.pooler_output.shape),
    "install_hint": install_hint("gallery"),
    "script_command": script_command("train.py"),
}))
"""


def own_modules() -> set[str]:
    """The files of ours that a wheel has to hold."""
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "aliblip").rglob("*.py")}
    return package | {path.name for path in ROOT.glob("*_aliblip.py")} | set(SCRIPTS)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves a `build/` behind, and takes from it what has been deleted since."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", *(path.name for path in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "aliblip", source / "aliblip", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    assert_succeeded(run([sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, source]))
    (built,) = folder.glob("aliblip-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` folder of an environment of its own with the wheel in it. What it requires is shared with the
    environment of the tests, by path: an editable checkout there is not followed, as only `.pth` files lead to it."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    assert_succeeded(run([sys.executable, "-m", "venv", folder]))
    python = folder / "bin" / "python"
    # -I: the checkout's own aliblip.egg-info, in the working directory, would count as an installed aliblip.
    pip = (python, "-I", "-m", "pip")
    assert_succeeded(run([*pip, "install", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", wheel]))
    # An old setuptools, which Python before 3.12 puts there, would hide the one that torch asks for.
    assert_succeeded(run([*pip, "uninstall", "--yes", "--quiet", "setuptools"]))
    (packages,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in (*site.getsitepackages(), site.getusersitepackages()) if Path(path).is_dir()]
    (packages / "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    return folder / "bin"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder to work in, with a `train.py` of the user's own in it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "train.py").write_text("raise SystemExit('this is not the train.py that was asked for')\n")
    write_split(folder / "data", "train", 16)
    write_split(folder / "data", "validation", 8)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    tiny.photos(folder / "photos", 4)
    return folder


@pytest.fixture(scope="module")
def trained(installed, elsewhere) -> Path:
    data = ("--data_dir", "data", "--tokenizer_name", "tokenizer", "--output_dir", "run", "--num_train_epochs", "1")
    result = in_wheel(installed, elsewhere, "aliblip-train", *TINY, *data)
    assert_succeeded(result)
    return elsewhere / "run" / "best"


def in_wheel(installed: Path, cwd: Path, command: str, *args: object) -> subprocess.CompletedProcess:
    """Run a command of the environment as somebody who has activated it, in `cwd` and with it on PYTHONPATH."""
    path = os.pathsep.join([str(installed), os.environ["PATH"]])
    return run([installed / command, *args], cwd=cwd, env={"PYTHONPATH": str(cwd), "PATH": path})


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == own_modules()


def test_the_extras_are_those_that_messages_name():
    extras = set(importlib.metadata.metadata("aliblip").get_all("Provides-Extra"))
    named = set()
    for path in own_modules():
        text = (ROOT / path).read_text()
        named |= {part.split('"')[1] for part in text.split("install_hint(")[1:] if part.startswith('"')}
    assert named <= extras


def test_a_model_is_trained_evaluated_and_searched_with(installed, elsewhere, trained):
    assert (trained / "modeling_aliblip.py").is_file()
    result = in_wheel(
        installed, elsewhere, "aliblip-evaluate", "--model_name_or_path", trained, "--data_dir", "data", "--k_rerank", 4
    )
    assert_succeeded(result)
    measured = json.loads((trained / "evaluation" / "results.json").read_text())
    assert measured["num_images"] == 8

    photos = sorted((elsewhere / "photos").iterdir())
    result = in_wheel(installed, elsewhere, "python", "-c", USE, trained, *photos)
    assert_succeeded(result)
    told = json.loads(result.stdout.splitlines()[-1])
    assert len(told["found"]) == 2 and told["embedded"] == [1, 16]
    assert told["kept"] == pytest.approx(told["found"], abs=1e-5)
    assert {"aliblip.serve", "aliblip.retrieval.metrics"} <= set(told["modules"])
    packages = installed.parent / "lib"
    assert told["ours"] and all(packages in Path(file).parents for file in told["ours"])
    assert str(ROOT) not in told["path"]
    assert told["script_command"] == "aliblip-train"

    # The command that messages name for an extra is one that pip takes here: nothing is missing, as all is shared.
    command = shlex.split(told["install_hint"])
    assert command == ["pip", "install", "aliblip[gallery]"]
    result = in_wheel(installed, elsewhere, *command, "--dry-run", "--no-index", "--disable-pip-version-check")
    assert_succeeded(result)
    assert "already satisfied: lancedb" in result.stdout
