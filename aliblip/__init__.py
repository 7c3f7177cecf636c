"""The library behind `train.py` and `evaluate_retrieval.py`: training, evaluation and search of AliBLIP.

    from aliblip import Gallery     # a stored gallery, which needs LanceDB

Importing it registers the classes of the root files with transformers, so that AutoConfig, AutoModel, AutoProcessor
and `pipeline("image-text-retrieval", ...)` take this code for AliBLIP folders, and not the copy that lies in them.
"""

from typing import Any

import aliblip.runtime.notes  # noqa: F401

# isort: split
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from configuration_aliblip import AliBlipConfig
from gallery_aliblip import MemoryGallery
from modeling_aliblip import AliBlipForImageTextRetrieval
from pipeline_aliblip import TASK, AliBlipImageTextRetrievalPipeline
from processing_aliblip import AliBlipProcessor

AutoConfig.register(AliBlipConfig.model_type, AliBlipConfig, exist_ok=True)
AutoModel.register(AliBlipConfig, AliBlipForImageTextRetrieval, exist_ok=True)
AutoModelForZeroShotImageClassification.register(AliBlipConfig, AliBlipForImageTextRetrieval, exist_ok=True)
AutoProcessor.register(AliBlipConfig, AliBlipProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=AliBlipImageTextRetrievalPipeline, pt_model=(AutoModel,), type="multimodal"
)
AliBlipConfig.has_registered_pipeline = True


def __getattr__(name: str) -> Any:
    if name == "Gallery":  # only now: LanceDB takes its time, and may not be installed
        from aliblip.retrieval.galleries import Gallery

        return Gallery
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _open_gallery(uri: Any) -> Any:
    from aliblip.retrieval.galleries import Gallery

    return Gallery.open(uri)


# What a pipeline does with `gallery="my_gallery"`: its own file, which ships with a model, knows no storage.
AliBlipImageTextRetrievalPipeline.open_gallery = staticmethod(_open_gallery)

__all__ = [
    "AliBlipConfig",
    "AliBlipForImageTextRetrieval",
    "AliBlipImageTextRetrievalPipeline",
    "AliBlipProcessor",
    "Gallery",
    "MemoryGallery",
]
