"""transformers' common tests of models, configurations and processors, run against ours.

    python tests/common_model_tests.py                          # fetches the source distribution, with pip
    python tests/common_model_tests.py --source_dir DIR         # one that is unpacked already, see --source_dir
    python tests/common_model_tests.py --only Retrieval.test_training

The tests are those of the source distribution of the installed transformers; nothing of them is kept here. What does
not pass stands with its reason in `common_exceptions.py`. Exit code 1, if a test fails or is skipped that is not listed
there, or if one that is listed passes: then the list is wrong.

The distribution has the common classes alone. Left out are the tests of its `generation` and `exporters` folders, which
are not in it, and PipelineTesterMixin, which downloads tiny models of transformers' own for each task.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "transformers_tests"  # the name under which the folder `tests` of the distribution is imported
ROWS, TITLE, PATCHES = 4, 7, 16  # of the batches here


def fetch(folder: Path, version: str) -> Path:
    """The unpacked source distribution of this version of transformers, fetched with pip into a folder."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, "--no-binary", "transformers", f"transformers=={version}"], check=True)
    subprocess.run([*pip, "parameterized"], check=True)  # which they import
    with tarfile.open(folder / f"transformers-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    source = folder / f"transformers-{version}"
    for wheel in folder.glob("parameterized-*.whl"):
        shutil.unpack_archive(wheel, source, "zip")
    return source


def _stand_in(name: str, **names: object) -> None:
    """A module that the distribution imports but does not hold."""
    module = ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module


def import_common(source: Path) -> dict[str, ModuleType]:
    """The modules of the common tests, from an unpacked source distribution.

    Raises:
        SystemExit: it is not there, or not of the installed version.
    """
    import transformers

    tests = source / "tests"
    if not (tests / "test_modeling_common.py").is_file():
        raise SystemExit(f"{source} has no tests/test_modeling_common.py: give an unpacked source distribution")
    about = source / "PKG-INFO"
    if about.is_file() and f"\nVersion: {transformers.__version__}\n" not in about.read_text():
        raise SystemExit(f"{source} is not of transformers {transformers.__version__}, which is installed")
    sys.path.append(str(source))  # parameterized, where it was unpacked
    if importlib.util.find_spec("parameterized") is None:
        raise SystemExit(f"the common tests need parameterized: install it, or unpack its wheel in {source}")
    package = ModuleType(PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[PACKAGE] = package
    for name in ("exporters", "generation", "utils"):
        _stand_in(f"{PACKAGE}.{name}", __path__=[])
    _stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _stand_in(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})
    _stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)
    names = ("modeling", "configuration", "processing")
    # One of them would import transformers from a checkout around it.
    with mock.patch.object(transformers.utils, "direct_transformers_import", lambda path: transformers):
        return {name: importlib.import_module(f"{PACKAGE}.test_{name}_common") for name in names}


class _Tester:
    """What the common tests ask of a model: a configuration, a batch, and their sizes."""

    batch_size, num_hidden_layers, num_attention_heads = ROWS, 2, 4
    is_training = False

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self):
        import tiny

        # [ENC] among the first ids, since a test takes the last ones away.
        return self.part(tiny.config(enc_token_id=3))

    def prepare_config_and_inputs_for_common(self):
        import tiny

        batch = tiny.batch(rows=ROWS, length=TITLE)
        return self.get_config(), {name: batch[name] for name in self.inputs}


class VisionTester(_Tester):
    seq_length, hidden_size, image_size, patch_size = PATCHES + 1, 32, 32, 8
    inputs = ("pixel_values",)

    @staticmethod
    def part(config):
        return config.vision_config


class TextTester(_Tester):
    seq_length, hidden_size, vocab_size = TITLE, 24, 64
    inputs = ("input_ids", "attention_mask")

    @staticmethod
    def part(config):
        return config.text_config


class RetrievalTester(_Tester):
    seq_length, hidden_size = TITLE, 24
    is_training = True
    inputs = ("pixel_values", "input_ids", "attention_mask")

    def __init__(self, parent: unittest.TestCase):
        super().__init__(parent)
        self.vision_model_tester, self.text_model_tester = VisionTester(parent), TextTester(parent)

    @staticmethod
    def part(config):
        return config


def cases(common: Mapping[str, ModuleType]) -> list[type[unittest.TestCase]]:
    """The test cases, made of their common classes and of our models."""
    import tiny
    import torch

    from configuration_aliblip import AliBlipConfig, AliBlipTextConfig, AliBlipVisionConfig
    from modeling_aliblip import AliBlipForImageTextRetrieval, AliBlipTextModel, AliBlipVisionModel
    from processing_aliblip import AliBlipProcessor

    class Model(common["modeling"].ModelTesterMixin):
        made_of: type[_Tester]
        test_can_init_all_missing_weights_before_2023 = True  # as which files without a copyright count

        def setUp(self):
            torch.manual_seed(0)
            self.model_tester = self.made_of(self)

    class Vision(Model, unittest.TestCase):
        all_model_classes, made_of = (AliBlipVisionModel,), VisionTester
        test_resize_embeddings = False  # it has patches, and no vocabulary

    class Text(Model, unittest.TestCase):
        all_model_classes, made_of = (AliBlipTextModel,), TextTester

    class Retrieval(Model, unittest.TestCase):
        all_model_classes, made_of = (AliBlipForImageTextRetrieval,), RetrievalTester
        additional_model_inputs = ["input_ids", "attention_mask"]
        _is_composite = True

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
            return inputs | ({"return_loss": True} if return_labels else {})

    class Configuration(unittest.TestCase):
        def check(self, made_of, config_class, **options):
            self.model_tester = made_of(self)
            common["configuration"].ConfigTester(self, config_class=config_class, **options).run_common_tests()

        def test_vision(self):
            sizes = {"hidden_size": 32, "num_attention_heads": 4}
            self.check(VisionTester, AliBlipVisionConfig, has_text_modality=False, **sizes)

        def test_text(self):
            self.check(TextTester, AliBlipTextConfig, hidden_size=24, num_attention_heads=4)

        def test_retrieval(self):
            self.check(RetrievalTester, AliBlipConfig, has_text_modality=False, image_text_hidden_size=16)

    class Processor(common["processing"].ProcessorTesterMixin, unittest.TestCase):
        processor_class = AliBlipProcessor

        @classmethod
        def _setup_from_components(cls):
            return tiny.processor()

    return [Vision, Text, Retrieval, Configuration, Processor]


class Outcomes(unittest.TestResult):
    """What became of each test: "passed", "skipped: why", or "failed: the last line of what was raised"."""

    def __init__(self):
        super().__init__()
        self.of: dict[str, str] = {}
        self.traces: dict[str, str] = {}

    @staticmethod
    def name(test) -> str:
        test = getattr(test, "test_case", test)  # of a subtest
        return ".".join(test.id().split(".")[-2:])

    def stopTest(self, test):  # noqa: N802
        self.of.setdefault(self.name(test), "passed")
        super().stopTest(test)

    def _failed(self, test, error) -> None:
        told = f"{error[0].__name__}: {error[1]}".strip().splitlines()
        self.of[self.name(test)] = "failed: " + " ".join(told)[:300]
        self.traces[self.name(test)] = self._exc_info_to_string(error, getattr(test, "test_case", test))

    def addError(self, test, err):  # noqa: N802
        self._failed(test, err)

    def addFailure(self, test, err):  # noqa: N802
        self._failed(test, err)

    def addSubTest(self, test, subtest, err):  # noqa: N802
        if err is not None:
            self._failed(test, err)

    def addSkip(self, test, reason):  # noqa: N802
        if not self.of.get(self.name(test), "").startswith("failed"):
            self.of[self.name(test)] = f"skipped: {' '.join(reason.split())}"


def run(found: list[type[unittest.TestCase]], only: str = "") -> Outcomes:
    """Run the tests of some cases, or those whose name begins with `only`."""
    suite = unittest.TestSuite()
    for case in found:
        names = unittest.defaultTestLoader.getTestCaseNames(case)
        suite.addTests(case(name) for name in names if f"{case.__name__}.{name}".startswith(only))
    outcomes = Outcomes()
    suite.run(outcomes)
    return outcomes


def problems(
    outcomes: Mapping[str, str], fails: Mapping[str, str], skips: Mapping[str, str], needs: Mapping[str, str]
) -> Iterator[str]:
    """What differs from the lists of `common_exceptions.py`, in one line each."""
    for name, outcome in outcomes.items():
        if outcome.startswith("failed") and not any(fnmatchcase(name, pattern) for pattern in fails):
            yield f"{name} {outcome}"
        if outcome.startswith("skipped") and not any(fnmatchcase(outcome[9:], told) for told in (*skips, *needs)):
            yield f"{name} {outcome}: this is no reason that is listed"
    for pattern in fails:
        matched = {name: outcome for name, outcome in outcomes.items() if fnmatchcase(name, pattern)}
        if not matched:
            yield f"{pattern} is listed, but there is no such test"
        yield from (f"{name} is listed, but it {outcome}" for name, outcome in matched.items() if outcome[0] != "f")
    for told in skips:
        if not any(fnmatchcase(outcome, f"skipped: {told}") for outcome in outcomes.values()):
            yield f"no test is skipped with {told!r}, which is listed"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--source_dir", type=Path, help="unpacked source distribution of the installed transformers")
    made.add_argument("--only", default="", help="run the tests whose name begins so, and tell how they fail")
    return made


def main() -> int:
    args = parser().parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import transformers
    from common_exceptions import FAILS, NEEDS, SKIPS

    with tempfile.TemporaryDirectory() as folder:
        source = args.source_dir or fetch(Path(folder), transformers.__version__)
        outcomes = run(cases(import_common(source)), args.only)
    if args.only:
        for name, outcome in outcomes.of.items():
            print(f"{name} {outcome}", outcomes.traces.get(name, ""), sep="\n")
        return 0
    for kind in ("passed", "skipped", "failed"):
        print(f"{sum(outcome.startswith(kind) for outcome in outcomes.of.values())} {kind}", end=", ")
    wrong = list(problems(outcomes.of, FAILS, SKIPS, NEEDS))
    print(f"{len(wrong)} not as listed", *wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
