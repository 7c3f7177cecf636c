"""What libraries print while models are saved and loaded: nothing that is not ours."""

from __future__ import annotations

import sys

import pytest
import tiny
from helpers import assert_succeeded, run, run_forked

# Loading and saving show a bar, and saving imports DeepSpeed where it is installed, which warns that there is no GPU.
SAVE_AND_LOAD = """
import sys
from aliblip import AliBlipForImageTextRetrieval
from aliblip.runtime.mistakes import main_with_usage_errors

def main():
    AliBlipForImageTextRetrieval.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
    from huggingface_hub.utils import are_progress_bars_disabled
    print(f"bars of downloads: {not are_progress_bars_disabled()}")

main_with_usage_errors("test", main)
"""


@pytest.fixture
def command(tmp_path) -> list:
    tiny.model().save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SAVE_AND_LOAD)
    return [sys.executable, tmp_path / "script.py", tmp_path / "model", tmp_path / "saved"]


def test_a_command_shows_no_bars_and_warnings_of_libraries(command, tmp_path):
    result = run(command)
    assert_succeeded(result)
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert (result.stdout, result.stderr) == ("bars of downloads: True\n", "")


def test_only_the_first_process_shows_downloads(command):
    result = run_forked(command, env={"RANK": "1"})
    assert_succeeded(result)
    assert (result.stdout, result.stderr) == ("bars of downloads: False\n", "")
