"""What holds for every test: no network, one thread per process, what is slow, and what runs side by side."""

import os
import tempfile

import pytest

# Before torch and the Hub libraries read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Code that models bring is copied there to be imported: one folder for each process that runs tests.
_modules = tempfile.TemporaryDirectory(prefix="aliblip-modules-")
os.environ["HF_MODULES_CACHE"] = _modules.name

import slow  # noqa: E402

# A worker of pytest-xdist takes whole files, in this order: those that take long must not be left to the end.
_LONGEST = (
    *("test_survival", "test_launch", "test_train", "test_evaluation_script", "test_evaluation_resume"),
    *("test_serve_browser", "test_serve_start", "test_serve", "test_hostile", "test_wheel", "test_gallery_build"),
)

pytest_plugins = ["blip_stub", "evaluation_fixtures"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))
    for item in items:
        if slow.is_slow(item):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def accelerate_as_before():
    """For tests that build an Accelerator in this process: the next one starts anew."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
