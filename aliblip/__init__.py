"""The library behind `train.py` and `evaluate_retrieval.py`: training and evaluation of AliBLIP.

Importing it registers the classes of the root files with transformers, so that AutoConfig, AutoModel, AutoProcessor
and `pipeline("image-text-retrieval", ...)` take this code for AliBLIP folders, and not the copy that lies in them.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from configuration_aliblip import AliBlipConfig
from gallery_aliblip import Gallery
from modeling_aliblip import AliBlipForImageTextRetrieval
from pipeline_aliblip import TASK, AliBlipImageTextRetrievalPipeline
from processing_aliblip import AliBlipProcessor

AutoConfig.register(AliBlipConfig.model_type, AliBlipConfig, exist_ok=True)
AutoModel.register(AliBlipConfig, AliBlipForImageTextRetrieval, exist_ok=True)
AutoProcessor.register(AliBlipConfig, AliBlipProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=AliBlipImageTextRetrievalPipeline, pt_model=(AutoModel,), type="multimodal"
)
AliBlipConfig.has_registered_pipeline = True

__all__ = [
    "AliBlipConfig",
    "AliBlipForImageTextRetrieval",
    "AliBlipImageTextRetrievalPipeline",
    "AliBlipProcessor",
    "Gallery",
]
