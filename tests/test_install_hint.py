"""The command that a message names for an extra: right for a checkout, for a wheel, and for this Python."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from aliblip.runtime import mistakes


@pytest.fixture
def activated(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable if name == "python" else None)


def test_a_checkout_is_installed_in_place(activated, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert mistakes.install_hint("gallery") == 'pip install -e ".[gallery]"'


def test_from_another_folder_the_checkout_is_named(activated, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert mistakes.install_hint("serve") == f'pip install -e "{ROOT}[serve]"'


def test_a_wheel_is_named(activated, monkeypatch, tmp_path):
    monkeypatch.setattr(mistakes, "ROOT", tmp_path)
    assert mistakes.install_hint("gallery") == 'pip install "aliblip[gallery]"'


@pytest.mark.parametrize("found", [None, "/elsewhere/bin/python"])
def test_without_an_activated_environment_this_python_is_named(found, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: found)
    monkeypatch.setattr(sys, "executable", "/home/me/my venv/bin/python")
    monkeypatch.setattr(mistakes, "ROOT", Path("/nowhere"))
    assert mistakes.install_hint("peft") == "'/home/me/my venv/bin/python' -m pip install \"aliblip[peft]\""
