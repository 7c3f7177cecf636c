"""The library behind `train.py` and `evaluate_retrieval.py`: training and evaluation of AliBLIP.

Importing it registers the classes of the root files with transformers, so that AutoConfig, AutoModel and AutoProcessor
take this code for AliBLIP folders, and not the copy that lies in them.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

AutoConfig.register(AliBlipConfig.model_type, AliBlipConfig, exist_ok=True)
AutoModel.register(AliBlipConfig, AliBlipForImageTextRetrieval, exist_ok=True)
AutoProcessor.register(AliBlipConfig, AliBlipProcessor, exist_ok=True)

__all__ = ["AliBlipConfig", "AliBlipForImageTextRetrieval", "AliBlipProcessor"]
