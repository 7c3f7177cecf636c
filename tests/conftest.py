"""What holds for every test: no network, one thread per process, and what runs side by side."""

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


def pytest_itemcollected(item):
    """Side by side, the tests of a file share a process, as they share fixtures; not those marked `alone`."""
    if item.config.pluginmanager.hasplugin("xdist"):
        group = item.nodeid if item.get_closest_marker("alone") else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
