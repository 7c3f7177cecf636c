"""The commands that messages name: right for a checkout, for a wheel, and for this Python."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from aliblip.runtime import installation


@pytest.fixture
def activated(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable if name == "python" else None)


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(installation, "ROOT", tmp_path)


def test_a_checkout_is_installed_in_place(activated, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert installation.install_hint("gallery") == 'pip install -e ".[gallery]"'
    assert installation.script_command("train.py") == "python train.py"


def test_from_another_folder_the_checkout_is_named(activated, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert installation.install_hint("serve") == f'pip install -e "{ROOT}[serve]"'
    assert installation.script_command("train.py") == f"python {ROOT}/train.py"


def test_a_wheel_is_named(activated, wheel):
    assert installation.install_hint("gallery") == 'pip install "aliblip[gallery]"'
    assert installation.script_command("train.py") == "aliblip-train"
    assert installation.script_command("evaluate_retrieval.py") == "aliblip-evaluate"


@pytest.mark.parametrize("found", [None, "/elsewhere/bin/python"])
def test_without_an_activated_environment_this_python_is_named(found, wheel, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: found)
    monkeypatch.setattr(sys, "executable", str(Path("/home/me/my venv/bin/python")))
    assert installation.install_hint("peft") == "'/home/me/my venv/bin/python' -m pip install \"aliblip[peft]\""
    assert installation.script_command("train.py") == "'/home/me/my venv/bin/aliblip-train'"


def test_another_name_of_the_same_python_is_activated_too(tmp_path, monkeypatch):
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "python3").symlink_to("python")
    monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path / name))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    assert installation.this_python() == "python"


def test_an_environment_in_this_folder_is_named_briefly(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(installation, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert installation.this_python() == ".venv/bin/python"
    assert installation.install_hint("serve") == '.venv/bin/python -m pip install -e ".[serve]"'
    assert installation.script_command("train.py") == ".venv/bin/python train.py"
