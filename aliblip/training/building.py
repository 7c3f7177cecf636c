"""What is trained, as the arguments ask for it: processor, model, and the state around the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import BertTokenizer, PreTrainedTokenizerFast

from aliblip.data.augment import TrainAugmentation
from aliblip.models.backbones import (
    Backbone,
    check_backbone_vocabulary,
    read_text_backbone,
    read_vision_backbone,
    start_from_backbone,
    starting_report,
)
from aliblip.models.loading import DEFAULT_TOKENIZER, build_processor, load_pretrained
from aliblip.retrieval.calibration import forget_fit
from aliblip.retrieval.model_folder import DEFAULT_MAX_LENGTH, LOADING_ERRORS, check_settings, check_tokenizer
from aliblip.runtime.accelerator import AliBlipAccelerator
from aliblip.runtime.arguments import json_mapping
from aliblip.runtime.distributed import launched_rank
from aliblip.runtime.mistakes import usage_errors
from aliblip.training.arguments import ModelArguments, TrainDataArguments, TrainingArguments
from aliblip.training.carried import MOMENTUM_FILE, check_momentum, read_momentum
from aliblip.training.compiling import CompiledTowers
from aliblip.training.fp8 import Float8Towers
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.optim import parameter_groups, rate_scales
from aliblip.training.patches import drop_patches
from configuration_aliblip import SIZES, AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

# --- before the processes meet ----------------------------------------------------------------------------------------


@dataclass
class Beginning:
    """A model as it is known before any weights are drawn: what the data has to fit."""

    processor: AliBlipProcessor
    config: AliBlipConfig
    image_size: int
    model: AliBlipForImageTextRetrieval | None  # a trained one; a new one is drawn by `build_model`
    backbones: list[Backbone]  # trained towers of a new one
    leaves_momentum_behind: bool = False  # of an original file


def begin(
    args: ModelArguments, backbones: list[Backbone], tokenizer: PreTrainedTokenizerFast | None = None
) -> Beginning:
    """Read what the model is made from.

    Args:
        backbones: of `read_backbones`.
        tokenizer: one that was learned for a new model; None: as the arguments say.

    Raises:
        UsageError: what can't be read or does not fit together.
    """
    if args.model_name_or_path is None:
        processor = new_processor(args, backbones, tokenizer)
        config = build_config(args, processor, backbones)
        beginning = Beginning(processor, config, args.image_size or config.vision_config.image_size, None, backbones)
    else:
        # from_pretrained makes every parameter trainable; --freeze comes later.
        model, processor, original = load_pretrained(
            args.model_name_or_path,
            tokenizer_name=args.tokenizer_name,
            max_length=args.max_length,
            vision_config=json_mapping("vision_config", args.vision_config),
            text_config=json_mapping("text_config", args.text_config),
            attn_implementation=args.attn_implementation,
        )
        image_size = args.image_size or model.config.vision_config.image_size
        resize(model, image_size)
        left_behind = original is not None and bool(original.momentum)
        beginning = Beginning(processor, model.config, image_size, model, [], left_behind)
    processor.image_processor.size = {"height": beginning.image_size, "width": beginning.image_size}
    forget_fit(beginning.config)
    return beginning


def read_backbones(args: ModelArguments) -> list[Backbone]:
    """The trained towers that a new model starts from."""
    backbones = []
    if args.vision_model_name_or_path is not None:
        backbones.append(read_vision_backbone(args.vision_model_name_or_path))
    if args.text_model_name_or_path is not None:
        backbones.append(read_text_backbone(args.text_model_name_or_path))
    return backbones


def check_shape(args: ModelArguments, backbones: list[Backbone]) -> None:
    """Look at the configuration of a new model, whatever its tokenizer will be.

    Raises:
        UsageError: there is none of this name, or its fields contradict each other.
    """
    if args.model_name_or_path is None:
        any_tokenizer = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
        config = build_config(args, AliBlipProcessor(tokenizer=any_tokenizer), backbones)
        if args.image_size is not None:
            with usage_errors(ValueError):  # a size that is no multiple of the patches
                type(config.vision_config)(**{**config.vision_config.to_dict(), "image_size": args.image_size})


def new_processor(
    args: ModelArguments, backbones: list[Backbone], tokenizer: PreTrainedTokenizerFast | None = None
) -> AliBlipProcessor:
    """The processor of a new model: around the tokenizer asked for, with what its towers were trained with."""
    if tokenizer is not None:
        processor = AliBlipProcessor(tokenizer=tokenizer, max_length=args.max_length or DEFAULT_MAX_LENGTH)
        check_tokenizer("--train_tokenizer", processor)
    else:
        tokenizer_name = args.tokenizer_name or args.text_model_name_or_path or DEFAULT_TOKENIZER
        processor = build_processor(tokenizer_name, args.max_length)
    for backbone in backbones:
        if backbone.tower == "text_encoder":
            check_backbone_vocabulary(backbone, processor)
        for name, value in backbone.pixel_statistics.items():
            setattr(processor.image_processor, name, value)
    return processor


def build_config(args: ModelArguments, processor: AliBlipProcessor, backbones: list[Backbone]) -> AliBlipConfig:
    """The configuration of a model to train from scratch; a trained ViT has its own photo size at first.

    Raises:
        UsageError: there is no such configuration, or its fields contradict each other.
    """
    towers = {backbone.tower: backbone.config for backbone in backbones}
    vision = towers.get("vision_model", {}) | json_mapping("vision_config", args.vision_config)
    text = towers.get("text_encoder", {}) | json_mapping("text_config", args.text_config)
    if args.image_size is not None and "vision_model" not in towers:
        vision["image_size"] = args.image_size
    text |= {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
    fields = {"enc_token_id": processor.enc_token_id}
    for name in ("image_text_hidden_size", "temperature_init"):
        if getattr(args, name) is not None:
            fields[name] = getattr(args, name)
    size = args.config_name or "base"  # two trained towers need no name
    if size not in SIZES:
        missing = (
            f"no configuration {args.config_name!r} ({{}}): give --config_name {' or '.join(SIZES)}, or a folder with "
            "a config.json"
        )
        check_settings(args.config_name)
        with usage_errors(*LOADING_ERRORS, told=missing):
            base = AliBlipConfig.from_pretrained(args.config_name, trust_remote_code=False).to_dict()
        vision, text = base["vision_config"] | vision, base["text_config"] | text
        fields = base | fields
    with usage_errors(ValueError, TypeError):  # of the fields that --vision_config and --text_config set
        if size in SIZES:
            return AliBlipConfig.from_size(size, vision_config=vision, text_config=text, **fields)
        return AliBlipConfig(**fields | {"vision_config": vision, "text_config": text})


def build_model(args: ModelArguments, beginning: Beginning) -> AliBlipForImageTextRetrieval:
    """The model of a beginning; a new one with weights of the global random state and those of trained towers. Always
    fp32: mixed precision casts later."""
    if beginning.model is not None:
        return beginning.model
    model = AliBlipForImageTextRetrieval(beginning.config)
    if args.attn_implementation is not None:
        wrong = f"--attn_implementation {args.attn_implementation}: {{}}"
        with usage_errors(ImportError, ValueError, told=wrong):
            model.set_attn_implementation(args.attn_implementation)
    copied = [name for backbone in beginning.backbones for name in start_from_backbone(model, backbone)]
    if args.image_size is not None:
        resize(model, args.image_size)
    if beginning.backbones and launched_rank() == 0:
        print(starting_report(model, beginning.backbones, copied))
    return model


def resize(model: AliBlipForImageTextRetrieval, image_size: int) -> None:
    with usage_errors(ValueError):  # a size that is no multiple of the patches
        model.resize_image(image_size)


def carried_momentum(
    name: str, beginning: Beginning, model: AliBlipForImageTextRetrieval, queue_size: int
) -> dict[str, Tensor] | None:
    """Momentum encoders and queues that came with a trained model.

    Raises:
        UsageError: they do not belong to it, or are not as long as --queue_size says.
    """
    tensors = read_momentum(name)
    if tensors is not None:
        check_momentum(tensors, model, queue_size)
    elif beginning.leaves_momentum_behind and launched_rank() == 0:
        print(
            f"{name} also holds momentum encoders, which are not taken over: convert it first, python -m "
            "aliblip.convert --momentum encoders"
        )
    return tensors


def build_augmentation(args: TrainDataArguments, image_size: int) -> TrainAugmentation | None:
    if args.augmentation == "none":
        return None
    return TrainAugmentation(
        image_size,
        scale=(args.min_crop_scale, 1.0),
        flip=args.horizontal_flip,
        randaugment=(2, 5) if args.augmentation == "blip" else None,
    )


# --- once they have met -----------------------------------------------------------------------------------------------


def build_momentum(
    model: AliBlipForImageTextRetrieval,
    args: TrainingArguments,
    accelerator: AliBlipAccelerator,
    carried: dict[str, Tensor] | None,
    longest_title: int,
) -> MomentumState:
    """Momentum encoders and queues, on the device; begun anew, or with what came with the model. Titles of
    `longest_title` tokens at most stay in the queue where the objective draws negatives from it."""
    momentum = MomentumState(
        model,
        queue_size=args.queue_size,
        embedding_size=model.config.image_text_hidden_size,
        momentum=args.momentum,
        warmup=args.momentum_warmup,
        dropout=args.momentum_dropout,
        autocast_dtype=accelerator.autocast_dtype,
        seed=args.seed,
        title_length=longest_title if args.itm_queue_titles else 0,
    ).to(accelerator.device)
    if carried is not None:
        momentum.start_from(carried)
        queues = "and queues" if "queue_ids" in carried else "without queues"
        accelerator.print(f"starting from the momentum encoders {queues} in {MOMENTUM_FILE} beside the model")
    return momentum


def build_optimizer(model: AliBlipForImageTextRetrieval, args: TrainingArguments) -> torch.optim.Optimizer:
    towers = (model.vision_model.encoder.layers, model.text_encoder.encoder.layer)
    scales = rate_scales(args, *map(len, towers))
    return torch.optim.AdamW(
        parameter_groups(model, args.weight_decay, args.decay_everything, scales),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )


ChangedTowers = Float8Towers | CompiledTowers


def change_towers(args: TrainingArguments, *models: torch.nn.Module) -> list[ChangedTowers]:
    """Let the towers compute as the arguments ask for, in place, until each of what is returned is paused."""
    changed: list[ChangedTowers] = []
    if args.fp8:
        changed.append(Float8Towers(*models))
    if args.compile:  # also what multiplies in 8 bits
        changed.append(CompiledTowers(*models))
    return changed


def set_checkpointed_layers(
    model: AliBlipForImageTextRetrieval, vision: int | None = None, text: int | None = None
) -> None:
    """Recompute the activations of the last `vision` ViT layers and the last `text` BERT layers in the backward pass;
    None: all, 0: none. Finer than transformers' all-or-nothing switch, which works too.

    Raises:
        ValueError: more layers than the tower has.
    """
    towers = (("vision", model.vision_model.encoder.layers, vision), ("text", model.text_encoder.encoder.layer, text))
    for name, layers, wanted in towers:
        wanted = len(layers) if wanted is None else wanted
        if not 0 <= wanted <= len(layers):
            raise ValueError(f"{wanted} {name} layers to checkpoint: the model has {len(layers)}")
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number >= len(layers) - wanted
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def build_objective(
    model: AliBlipForImageTextRetrieval, args: TrainingArguments, longest_title: int | None = None
) -> RetrievalObjective:
    """Around the model, whose momentum encoders have to be made before: they see whole photos."""
    if args.patch_dropout:
        drop_patches(model, args.patch_dropout)
    return RetrievalObjective(
        model,
        negatives_from_all_ranks=args.negatives_from_all_ranks,
        hardest_negatives=args.hardest_negatives,
        itm_negatives=args.itm_negatives,
        itm_queue_titles=args.itm_queue_titles,
        itm_negative_ceiling=args.itm_negative_ceiling,
        itm_listwise=args.itm_listwise,
        itm_listwise_itc=args.itm_listwise_itc,
        in_batch_itc=args.in_batch_itc,
        longest_title=longest_title,
        cached_batch_size=args.cached_batch_size,
        unpad=args.unpad,
    ).train()


__all__ = [
    "Beginning",
    "begin",
    "build_augmentation",
    "build_config",
    "build_model",
    "build_momentum",
    "build_objective",
    "build_optimizer",
    "carried_momentum",
    "change_towers",
    "check_shape",
    "new_processor",
    "read_backbones",
]
