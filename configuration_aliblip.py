"""Configuration of AliBLIP: a ViT, a BERT with cross-attention in every layer, and what BLIP retrieval adds to them.

    config = AliBlipConfig.from_size("base")                       # ViT-B/16 at 384 px, BERT-base
    config = AliBlipConfig.from_size("large", vision_config={"image_size": 224})
    config = AliBlipConfig(vision_config={...}, text_config={...}, image_text_hidden_size=256)

Field names are those of transformers' BLIP, and `AliBlipConfig.from_pretrained` takes a folder or Hub name of model
type `blip` too. Every value is checked when the configuration is constructed: a wrong one raises ValueError with what
was given and what is accepted.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import BlipConfig, PreTrainedConfig
from transformers.activations import ACT2FN

if TYPE_CHECKING:
    # Never run. transformers follows the relative imports that it reads in a file, and so takes the pipeline's file
    # along wherever it saves this one or caches it: a saved folder is complete, also one saved by a model that came
    # with its own code.
    from .pipeline_aliblip import AliBlipImageTextRetrievalPipeline  # noqa: F401

# What `transformers.pipeline` reads in config.json: the class of each task that is not its own.
CUSTOM_PIPELINES: dict[str, dict[str, Any]] = {
    "image-text-retrieval": {
        "impl": "pipeline_aliblip.AliBlipImageTextRetrievalPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}
# For the pipeline of transformers of this task, which takes no AutoModel; the code is the same.
ZERO_SHOT = "AutoModelForZeroShotImageClassification"

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    # ViT-B/16 and ViT-L/16 as BLIP trains them; the text side is BERT-base in both.
    "base": {"vision_config": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}},
    "large": {
        "vision_config": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "drop_path_rate": 0.1,
        }
    },
}

_INF = float("inf")
_ABOVE_0 = "a number above 0", lambda value: 0 < value < _INF
# So that a configuration from somebody else can't ask for more than any machine has.
_MOST = {"num_hidden_layers": 1000, "image_size": 2**14, "hidden_size": 2**16, "image_text_hidden_size": 2**16}


def _wrong(config: PreTrainedConfig, name: str, accepted: str) -> ValueError:
    return ValueError(
        f"{config.base_config_key or 'config'}.{name} is {getattr(config, name)!r}: it must be {accepted}"
    )


def _check_positive_ints(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        value, most = getattr(config, name), _MOST.get(name, 2**24)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise _wrong(config, name, f"a whole number from 1 to {most}")


def _check_numbers(config: PreTrainedConfig, accepted: str, is_accepted: Callable[[float], bool], *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_accepted(value):
            raise _wrong(config, name, accepted)


def _check_tower(config: PreTrainedConfig, *rates: str) -> None:
    """What the configurations of both towers have in common."""
    heads = config.num_attention_heads
    _check_positive_ints(config, "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if config.hidden_size % heads:
        raise ValueError(
            f"{config.base_config_key}.hidden_size {config.hidden_size} is not divisible by num_attention_heads "
            f"{heads}: choose a number of heads that divides it"
        )
    _check_numbers(config, "a number from 0 up to, not including, 1", lambda value: 0 <= value < 1, *rates)
    _check_numbers(config, *_ABOVE_0, "layer_norm_eps", "initializer_range")
    if not isinstance(config.hidden_act, str) or config.hidden_act not in ACT2FN:
        raise _wrong(config, "hidden_act", f"one of {', '.join(sorted(ACT2FN))}")


class AliBlipVisionConfig(PreTrainedConfig):
    """The ViT. `image_size` and `patch_size` are in pixels of a square; `drop_path_rate` is the stochastic-depth rate
    of the last layer (it rises linearly from 0)."""

    model_type = "aliblip_vision_model"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        image_size: int = 384,
        patch_size: int = 16,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.drop_path_rate = drop_path_rate
        self.initializer_range = initializer_range
        _check_positive_ints(self, "hidden_size", "image_size", "patch_size")
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        _check_tower(self, "attention_dropout", "drop_path_rate")
        if image_size % patch_size:
            nearest = max(1, round(image_size / patch_size)) * patch_size
            raise ValueError(
                f"image size {image_size} is not divisible by the patch size {patch_size}: "
                f"choose a multiple of {patch_size}, for example {nearest}"
            )
        super().__init__(**kwargs)


class AliBlipTextConfig(PreTrainedConfig):
    """The BERT with cross-attention in every layer. `encoder_hidden_size` is the width of the image tokens; within an
    `AliBlipConfig` it always follows `vision_config.hidden_size`."""

    model_type = "aliblip_text_model"
    base_config_key = "text_config"

    def __init__(
        self,
        vocab_size: int = 30524,
        hidden_size: int = 768,
        encoder_hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        max_position_embeddings: int = 512,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-12,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        initializer_range: float = 0.02,
        pad_token_id: int = 0,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.encoder_hidden_size = encoder_hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.initializer_range = initializer_range
        self.pad_token_id = pad_token_id
        _check_positive_ints(self, "vocab_size", "hidden_size", "encoder_hidden_size", "max_position_embeddings")
        _check_tower(self, "hidden_dropout_prob", "attention_probs_dropout_prob")
        if not isinstance(pad_token_id, int) or not 0 <= pad_token_id < vocab_size:
            raise _wrong(self, "pad_token_id", f"a token of the vocabulary: 0 to {vocab_size - 1}")
        super().__init__(**kwargs)


class AliBlipConfig(PreTrainedConfig):
    """Image-text retrieval with ITC and ITM (BLIP, https://arxiv.org/abs/2201.12086).

    Args:
        vision_config, text_config: a dictionary of fields, a configuration object, or None for the ViT-B/16 + BERT-base
            defaults.
        image_text_hidden_size: width of the shared embedding space (ITC).
        temperature_init: initial ITC temperature, the value of the `temp` parameter.
        enc_token_id: id of `[ENC]`, the token that opens every cross-attention pass; None: the last id of the
            vocabulary, where `AliBlipProcessor` puts it.
        fusion_weight: of the ITC similarity beside the match logit, where results are ordered by both: 1, as BLIP does;
            1 / temperature for a model of `train.py --itm_listwise`; or what `evaluate_retrieval.py --tune_fusion`
            found best for these weights.
        itm_slope, itm_offset: of the pipeline's `itm_probability` = sigmoid(slope x (match - no match logit) + offset):
            1 and 0, as trained; or what `evaluate_retrieval.py --tune_probability` found true for these weights.

    Raises:
        ValueError: a value that no model can be built from, with what is accepted.
    """

    # Set by the package `aliblip`, which registers the pipeline: transformers runs a task that the configuration names
    # with the code of the model's folder, even where the task is registered. A saved configuration always names it.
    has_registered_pipeline = False

    model_type = "aliblip"
    sub_configs = {"vision_config": AliBlipVisionConfig, "text_config": AliBlipTextConfig}

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        image_text_hidden_size: int = 256,
        temperature_init: float = 0.07,
        enc_token_id: int | None = None,
        initializer_range: float = 0.02,
        fusion_weight: float = 1.0,
        itm_slope: float = 1.0,
        itm_offset: float = 0.0,
        **kwargs,
    ):
        self.vision_config = _sub_config("vision_config", AliBlipVisionConfig, vision_config)
        self.text_config = _sub_config("text_config", AliBlipTextConfig, text_config)
        # One truth: cross-attention reads the image tokens as wide as the ViT makes them.
        self.text_config.encoder_hidden_size = self.vision_config.hidden_size
        self.image_text_hidden_size = image_text_hidden_size
        self.temperature_init = temperature_init
        self.initializer_range = initializer_range
        self.fusion_weight, self.itm_slope, self.itm_offset = fusion_weight, itm_slope, itm_offset
        _check_positive_ints(self, "image_text_hidden_size")
        _check_numbers(self, *_ABOVE_0, "temperature_init", "initializer_range")
        for name, least in {"fusion_weight": 0, "itm_slope": 0, "itm_offset": -(10**9)}.items():
            _check_numbers(self, f"a number of at least {least}", lambda value, at=least: at <= value < _INF, name)
            setattr(self, name, float(getattr(self, name)))
        vocab_size = self.text_config.vocab_size
        enc_token_id = vocab_size - 1 if enc_token_id is None else enc_token_id
        if isinstance(enc_token_id, bool) or not isinstance(enc_token_id, int) or not 0 <= enc_token_id < vocab_size:
            raise ValueError(
                f"enc_token_id is {enc_token_id!r}: it must be the id of [ENC] in the vocabulary of {vocab_size} tokens"
            )
        self.enc_token_id = enc_token_id
        # Nothing is tied here (BERT's word embedding has no output twin without a language-model head).
        kwargs["tie_word_embeddings"] = False
        pipelines = _with_our_pipelines(kwargs.get("custom_pipelines"))
        if self.has_registered_pipeline:
            pipelines = {task: entry for task, entry in pipelines.items() if task not in CUSTOM_PIPELINES}
        kwargs["custom_pipelines"] = pipelines
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        # `transformers.pipeline` puts classes into the entry that it reads here, and those can't be saved.
        written = {**super().to_dict(), "custom_pipelines": _with_our_pipelines(self.custom_pipelines)}
        classes = written.get("auto_map") or {}
        if code := classes.get("AutoModel") or classes.get(ZERO_SHOT):
            written["auto_map"] = {**classes, "AutoModel": code, ZERO_SHOT: code}
        return written

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, but a `blip` configuration comes back as ours. Raises ValueError for any other model
        type, OSError where there is none."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config:  # transformers would go on with the defaults
            raise OSError(f"{pretrained_model_name_or_path} has no config.json: give the folder of a model")
        model_type = config.get("model_type", cls.model_type)
        if model_type == "blip":
            config = _from_blip(config)
        elif model_type != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is of model type {model_type!r}: AliBLIP starts from 'aliblip' or "
                "from 'blip' (BlipForImageTextRetrieval)"
            )
        return config, kwargs

    @classmethod
    def from_size(cls, size: str, *, vision_config: dict | None = None, text_config: dict | None = None, **kwargs):
        """The configuration of a named size (`base`: ViT-B/16, `large`: ViT-L/16 with drop-path 0.1), with single
        fields replaced by `vision_config` / `text_config`. Raises ValueError for a name that does not exist."""
        if size not in SIZES:
            raise ValueError(f"there is no size {size!r}: choose one of {', '.join(SIZES)}")
        return cls(
            vision_config={**SIZES[size].get("vision_config", {}), **(vision_config or {})},
            text_config={**SIZES[size].get("text_config", {}), **(text_config or {})},
            **kwargs,
        )


def _with_our_pipelines(given: dict | None) -> dict[str, dict[str, Any]]:
    return {**(given or {}), **copy.deepcopy(CUSTOM_PIPELINES)}


def training_defaults(hidden_size: int, num_hidden_layers: int) -> dict[str, Any]:
    """Settings of the named size of this width and depth that its weights don't tell (drop-path); empty for others."""
    for size in SIZES.values():
        vision = size["vision_config"]
        if (vision["hidden_size"], vision["num_hidden_layers"]) == (hidden_size, num_hidden_layers):
            return {name: vision[name] for name in ("drop_path_rate",) if name in vision}
    return {}


def _from_blip(config: dict[str, Any]) -> dict[str, Any]:
    """A `blip` configuration translated: what changes the model's numbers is taken (head counts and LayerNorm epsilons
    too, which have other defaults there), what would spoil its training is not (a vision `initializer_range` of 1e-10,
    no dropout)."""
    blip = BlipConfig.from_dict(config)  # what the file leaves out is a default of that class
    vision, text = blip.vision_config, blip.text_config
    both = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    of_vision = (*both, "layer_norm_eps", "image_size", "patch_size", "attention_dropout")
    of_text = (*both, "layer_norm_eps", "vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id")
    taken = {
        "vision_config": {
            **training_defaults(vision.hidden_size, vision.num_hidden_layers),
            **{name: getattr(vision, name) for name in of_vision},
        },
        "text_config": {
            **{name: getattr(text, name) for name in of_text},
            "hidden_dropout_prob": text.hidden_dropout_prob or 0.1,
            "attention_probs_dropout_prob": text.attention_probs_dropout_prob or 0.1,
        },
        "image_text_hidden_size": blip.image_text_hidden_size,
    }
    # Folders that AliBLIP wrote have an "enc_token_id". The others have [ENC] at the end, 30523 with BERT's vocabulary.
    kept = ("enc_token_id", "dtype", "torch_dtype", "_commit_hash")
    return taken | {"model_type": AliBlipConfig.model_type} | {k: config[k] for k in kept if k in config}


def _sub_config(name: str, config_class, value):
    if value is None:
        return config_class()
    if isinstance(value, dict):
        value = dict(value)
        given = value.pop("model_type", config_class.model_type)
        if given != config_class.model_type:
            raise ValueError(f"{name} is of model type {given!r}: expected {config_class.model_type!r}")
        return config_class(**value)
    # By attribute, not isinstance: code loaded from the Hub has its own copy of the classes.
    if getattr(value, "model_type", None) == config_class.model_type:
        return value
    raise ValueError(f"{name} is a {type(value).__name__}: give a dictionary or a {config_class.__name__}")


AliBlipConfig.register_for_auto_class()

__all__ = [
    "CUSTOM_PIPELINES",
    "SIZES",
    "AliBlipConfig",
    "AliBlipTextConfig",
    "AliBlipVisionConfig",
    "training_defaults",
]
