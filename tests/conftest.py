"""What holds for every test: no network, one thread per process, and what runs side by side."""

import os
import tempfile

# Before torch and the Hub libraries read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Code that models bring is copied there to be imported: one folder for each process that runs tests.
_modules = tempfile.TemporaryDirectory(prefix="aliblip-modules-")
os.environ["HF_MODULES_CACHE"] = _modules.name

# A worker of pytest-xdist takes whole files, in this order: those that take long must not be left to the end.
_LONGEST = ("test_survival", "test_launch", "test_train", "test_evaluation")

pytest_plugins = ["blip_stub"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))
