"""Loads model folders with the code that lies in them: started by test_remote_code.py with `python -I`, in another
folder, where our package can't be imported and every socket raises. Writes what it found for the test to judge.

    python -I remote_code_probe.py PLAN.json OUTPUT.pt
"""

from __future__ import annotations

import json
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

OURS = {"aliblip", *(path.stem for path in Path(__file__).resolve().parent.parent.glob("*_aliblip.py"))}
TITLES = ["red cotton shirt", "small blue steel lamp", "green cup"]


def photos() -> list:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (len(TITLES), 40, 30, 3), dtype=np.uint8)
    return [Image.fromarray(photo) for photo in pixels]


def scores(model, processor) -> dict:
    """ITC and ITM scores of three fixed photos with three fixed titles."""
    import torch

    batch = processor(images=photos(), text=TITLES, return_tensors="pt")
    with torch.no_grad():
        output = model.eval()(**batch)
    return {"itc": output.logits_per_image, "itm": output.itm_logits}


def searched(pipe) -> dict:
    """What the pipeline finds among the photos for each title."""
    import torch

    found = [result for results in pipe(TITLES, gallery=photos(), top_k=len(TITLES)) for result in results]
    names = ("id", "score", "itc", "itm_logit", "itm_probability")
    return {name: torch.tensor([result[name] for result in found]) for name in names}


def classified(folder) -> list[float]:
    """What the pipeline of the card's tag, of transformers itself, says of a photo, for each title."""
    from transformers import pipeline

    pipe = pipeline("zero-shot-image-classification", model=str(folder), trust_remote_code=True, device="cpu")
    found = pipe(photos()[0], candidate_labels=TITLES, hypothesis_template="{}")
    return [next(one["score"] for one in found if one["label"] == title) for title in TITLES]


class NotInstalled:
    """First in `sys.meta_path`: hides our package, however it is installed. Modules in the cache of the Hub are called
    `transformers_modules....modeling_aliblip` and stay visible."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"No module named {name!r}")


attempts: list[str] = []


class NoSocket(socket.socket):
    def __init__(self, *args, **kwargs):
        attempts.append(repr(args))
        raise OSError("this process has no network")


def no_addresses(*args, **kwargs):
    attempts.append(repr(args))
    raise OSError("this process has no network")


@contextmanager
def offline(wanted: bool):
    """As HF_HUB_OFFLINE: with `local_files_only` alone transformers still asks the Hub for adapters."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = wanted
    yield
    constants.HF_HUB_OFFLINE = False


def error_of(call, *args, **kwargs) -> str:
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(plan: dict) -> dict:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

    def load(folder, **options) -> dict:
        common = {"trust_remote_code": True, "local_files_only": options.pop("local_files_only", False)}
        processor = AutoProcessor.from_pretrained(folder, **common)
        model = AutoModel.from_pretrained(folder, **common, **options)
        config = AutoConfig.from_pretrained(folder, **common)
        return {
            "modules": [type(part).__module__ for part in (config, model, processor)],
            "same_config_class": type(config) is type(model).config_class,
            "dtype": str(model.dtype).removeprefix("torch."),
            "temperature_dtype": str(model.temp.dtype).removeprefix("torch."),
            "attention": model.text_encoder.config._attn_implementation,
            "devices": sorted({str(device) for device in getattr(model, "hf_device_map", {"": model.device}).values()}),
            "scores": scores(model, processor),
        }

    found = {"loaded": {}, "searched": {}, "refused": {}}
    for name, (folder, options) in plan["load"].items():
        with offline(options.get("local_files_only", False)):
            found["loaded"][name] = load(folder, **options)
    for name, folder in plan["search"].items():
        pipe = pipeline("image-text-retrieval", model=folder, trust_remote_code=True, device="cpu")
        found["searched"][name] = {"module": type(pipe).__module__, **searched(pipe)}
    found["classified"] = classified(plan["classify"])
    parts = (auto.from_pretrained(plan["classify"]) for auto in (AutoImageProcessor, AutoTokenizer))
    found["parts"] = [type(part).__name__ for part in parts]
    for name, folder in plan["refuse"].items():
        found["refused"][name] = error_of(AutoModel.from_pretrained, folder, trust_remote_code=name != "not trusted")

    for source, target, options in plan["save_again"]:
        with offline(options.get("local_files_only", False)):
            for auto in (AutoModel, AutoProcessor):
                auto.from_pretrained(source, trust_remote_code=True, **options).save_pretrained(target)

    # The root files as plain modules, beside a config.json that does not name them.
    sys.meta_path.remove(NotInstalled)
    sys.path.insert(0, plan["import_from"])
    from modeling_aliblip import AliBlipForImageTextRetrieval
    from processing_aliblip import AliBlipProcessor

    found["imported"] = {
        "file": sys.modules["modeling_aliblip"].__file__,
        "scores": scores(
            AliBlipForImageTextRetrieval.from_pretrained(plan["import_from"]),
            AliBlipProcessor.from_pretrained(plan["import_from"]),
        ),
    }
    found["attempts"] = attempts
    return found


if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled)
    socket.socket, socket.getaddrinfo = NoSocket, no_addresses
    import torch

    torch.save(main(json.loads(Path(sys.argv[1]).read_text())), sys.argv[2])
