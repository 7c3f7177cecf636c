"""BLIP checkpoints to AliBLIP folders, and back.

    python -m aliblip.convert --model_name_or_path model_base_retrieval_coco.pth --output_dir models/blip
    python -m aliblip.convert --model_name_or_path Salesforce/blip-itm-base-coco --output_dir models/blip
    python -m aliblip.convert --model_name_or_path models/blip --to transformers --output_dir models/for_transformers
    python -m aliblip.convert --model_name_or_path models/blip --to original --output_dir models/for_original

What is read:

- **Original files**: `{"model": state dict}` of the BLIP code or of the published AliProduct-BLIP (`epoch_N_nccl.pth`,
  with or without `module.` before the names). Retrieval checkpoints and the base ones (`model_base.pth`, ...) fit:
  both have the two encoders, both projections, the matching head and the temperature. The text decoder of base
  checkpoints is dropped, since retrieval generates no text. Captioning and VQA checkpoints lack the matching head and
  are refused. Sizes are read off the tensors; heads are 64 wide, as in all of BLIP, unless `--vision_config` /
  `--text_config` give another number.
- **transformers' `BlipForImageTextRetrieval`**, folder or Hub name (model type `blip`). It has no temperature: ours
  starts at 0.07. Its ViT has a LayerNorm epsilon of 1e-5 where the original code has 1e-6; each is kept.
  `AliBlipForImageTextRetrieval.from_pretrained` takes these directly too.
- **AliBLIP folders**, for the way back or another `--image_size`, and adapters (`train.py --lora_rank`), which are
  merged into the model that they name.

A weight that is missing, unexpected or of another shape is refused by its name. `--momentum encoders` writes the
momentum encoders of an original file into `momentum.safetensors` beside the weights, `--momentum all` its queues too;
`train.py` starts from that file where it finds it, with a `--queue_size` of as many slots. The queues hold product ids:
carry them only to go on with the same data under the same ids, since an equal id makes a photo of the queue a positive.

`[ENC]` or `[CLS]`? BLIP's text encoder reads `[CLS]` first when it sees text alone (ITC), and `[ENC]` in its place when
it looks at a photo (ITM). AliBLIP, like the original code, does that inside the model: ids stay as the tokenizer gives
them. transformers' BLIP takes ids as they are. For the same ITM logits there:

    input_ids[:, 0] = tokenizer.convert_tokens_to_ids("[ENC]")  # = config.enc_token_id
    logits = blip(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values).itm_score

and the ids as they were for ITC, `use_itm_head=False`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aliblip.models.loading import load_pretrained
from aliblip.models.original import ORIGINAL_FILE, Original, is_original, plain_copy, to_original, to_transformers
from aliblip.runtime.arguments import check_range, json_mapping, option, parse
from aliblip.runtime.files import NewFolder, write_tensors
from aliblip.runtime.mistakes import UsageError, main_with_usage_errors, usage_errors
from aliblip.training.carried import MOMENTUM_FILE, check_momentum, momentum_of_original, read_momentum
from aliblip.training.checkpoint import save_model
from configuration_aliblip import AliBlipConfig, AliBlipVisionConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor


@dataclass
class ConvertArguments:
    """What to convert to what."""

    model_name_or_path: str | None = option(
        None, "An original .pth file, or folder or Hub name of transformers' BLIP or of AliBLIP (required)."
    )
    output_dir: str | None = option(None, "New folder for the result (required).")
    to: str = option(
        "aliblip",
        "aliblip; transformers (a folder for BlipForImageTextRetrieval); original (a model.pth for the original code).",
        choices=["aliblip", "transformers", "original"],
    )
    tokenizer_name: str | None = option(
        None, "Folder, vocab.txt or Hub name (default: the folder's own; for .pth files bert-base-uncased)."
    )
    max_length: int | None = option(None, "Longest title in tokens (default: the folder's own, or 35).")
    image_size: int | None = option(None, "Interpolate the position embedding to photos of this side in pixels.")
    momentum: str = option(
        "none",
        "Training state of a .pth file to carry: none, encoders, or all (queues too: for the same data and ids).",
        choices=["none", "encoders", "all"],
    )
    vision_config: str | None = option(
        None, 'Fields that the tensors of a .pth file don\'t tell, as JSON: {"num_attention_heads": 6}.'
    )
    text_config: str | None = option(None, "The same for the BERT.")


def check_arguments(args: ConvertArguments) -> None:
    """Check what can be checked without reading the model.

    Raises:
        UsageError: a flag is missing, out of its range, or does not go with the others.
    """
    for name in ("model_name_or_path", "output_dir"):
        if getattr(args, name) is None:
            raise UsageError(f"--{name} is missing; see --help")
    check_range(image_size=(args.image_size, 1, None), max_length=(args.max_length, 3, None))
    output_dir = Path(args.output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UsageError(f"{output_dir} exists: give a new folder as --output_dir")
    if args.to == "original" and is_original(args.model_name_or_path):
        raise UsageError(f"{args.model_name_or_path} is an original file already: give another --to")
    if args.momentum != "none" and (args.to != "aliblip" or not is_original(args.model_name_or_path)):
        raise UsageError("--momentum is for the way from an original file to an AliBLIP folder: leave it out")


def convert(args: ConvertArguments) -> list[str]:
    """Do what the arguments ask for. Returns lines that tell what was taken, dropped and lost.

    Raises:
        UsageError: nothing is written then.
    """
    check_arguments(args)
    model, processor, original = load_pretrained(
        args.model_name_or_path,
        tokenizer_name=args.tokenizer_name,
        max_length=args.max_length,
        vision_config=json_mapping("vision_config", args.vision_config),
        text_config=json_mapping("text_config", args.text_config),
    )
    before = model.config.vision_config.image_size
    image_size = args.image_size or before
    with usage_errors(ValueError, told="--image_size: {}"):
        AliBlipVisionConfig(**{**model.config.vision_config.to_dict(), "image_size": image_size})
    momentum = None
    if args.momentum != "none":
        momentum = momentum_of_original(original, model, image_size, with_queues=args.momentum == "all")
    model.resize_image(image_size)
    processor.image_processor.size = {"height": image_size, "width": image_size}
    told = [describe(model)]
    if before != image_size:
        told.append(f"position embedding interpolated from {before} to {image_size} px")
    if original is not None:
        told += _not_carried_over(original, args.momentum)
    output_dir = Path(args.output_dir)
    with usage_errors(OSError, told=f"{output_dir} could not be written: {{}}"):
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with NewFolder(output_dir) as beside:
            if args.to == "aliblip":
                told += _write_aliblip(beside, model, processor, momentum)
            elif args.to == "transformers":
                told += _write_transformers(beside, model, processor)
            else:
                told += _write_original(beside, model, processor, read_momentum(args.model_name_or_path))
    return [*told, f"written: {output_dir}"]


def _not_carried_over(original: Original, momentum: str) -> list[str]:
    told = [f"dropped: {kind} ({count} tensors)" for kind, count in original.dropped.items()]
    if original.momentum and momentum == "none":
        told.append("not carried over: momentum encoders (see --momentum)")
    if original.queues and momentum != "all":
        told.append("not carried over: queues (see --momentum)")
    return told


# Each writes one form into an empty folder, and returns lines that tell what was written and lost.


def _write_aliblip(
    folder: Path,
    model: AliBlipForImageTextRetrieval,
    processor: AliBlipProcessor,
    momentum: dict[str, Tensor] | None,
) -> list[str]:
    if (problem := save_model(model, processor, folder)) is not None:
        raise OSError(problem)
    if momentum is None:
        return []
    write_tensors(folder / MOMENTUM_FILE, momentum)
    return [f"{MOMENTUM_FILE}: momentum encoders{_queues_told(momentum)}"]


def _write_transformers(folder: Path, model: AliBlipForImageTextRetrieval, processor: AliBlipProcessor) -> list[str]:
    theirs, their_processor = to_transformers(model, processor)
    theirs.save_pretrained(folder)
    their_processor.save_pretrained(folder)
    return [
        f"lost: the temperature, {model.temp.item():.4f} (transformers' BLIP has none)",
        f"for the same ITM logits set input_ids[:, 0] = {model.config.enc_token_id} ([ENC]) yourself, for ITC leave "
        "them as they are",
    ]


def _write_original(
    folder: Path,
    model: AliBlipForImageTextRetrieval,
    processor: AliBlipProcessor,
    carried: dict[str, Tensor] | None,
) -> list[str]:
    if carried is not None:
        check_momentum(carried, model)
    content = to_original(model, carried)
    # Of a full disk torch makes a RuntimeError.
    with usage_errors(
        RuntimeError, told=f"{ORIGINAL_FILE} can't be written ({{}}): make room, or another --output_dir"
    ):
        torch.save(content, folder / ORIGINAL_FILE)
    plain_copy(processor.tokenizer).save_pretrained(folder)
    source = f"of {MOMENTUM_FILE}" if carried else "copies of the encoders"
    return [f"{ORIGINAL_FILE} with momentum encoders ({source})", *_not_in_original(model.config)]


def _not_in_original(config: AliBlipConfig) -> list[str]:
    """Where the original code computes something else with these weights, since it has fixed values that this model
    does not have; and the flags to read such a file back with, since the tensors don't tell these values."""
    told, flags = [], []
    towers = (("vision", "ViT", config.vision_config, 1e-6), ("text", "BERT", config.text_config, 1e-12))
    for tower, name, own, epsilon in towers:
        untold = {}
        if own.layer_norm_eps != epsilon:
            untold["layer_norm_eps"] = own.layer_norm_eps
            told.append(f"differs there: the {name}'s LayerNorm epsilon is {epsilon}, here {own.layer_norm_eps}")
        if own.num_attention_heads * 64 != own.hidden_size:
            untold["num_attention_heads"] = own.num_attention_heads
            told.append(f"differs there: the {name}'s heads are 64 wide, here there are {own.num_attention_heads}")
        if untold:
            flags.append(f"--{tower}_config '{json.dumps(untold)}'")
    return [*told, f"to read it back, add {' '.join(flags)}"] if flags else []


def _queues_told(momentum: dict[str, Tensor]) -> str:
    if "queue_ids" not in momentum:
        return ""
    slots, filled = len(momentum["queue_ids"]), int(momentum["queue_filled"].sum())
    return f" and {slots} queue slots, {filled} of them filled: train with --queue_size {slots}"


def describe(model: AliBlipForImageTextRetrieval) -> str:
    """One line: parameters, towers, temperature."""
    vision, text = model.config.vision_config, model.config.text_config
    return (
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters: ViT {vision.num_hidden_layers} x "
        f"{vision.hidden_size} ({vision.num_attention_heads} heads), {vision.image_size} px in patches of "
        f"{vision.patch_size}; BERT {text.num_hidden_layers} x {text.hidden_size} ({text.num_attention_heads} heads), "
        f"{text.vocab_size} tokens; temperature {model.temp.item():.4f}"
    )


def main() -> int:
    (args,) = parse([ConvertArguments], description=__doc__)
    print("\n".join(convert(args)))
    return 0


if __name__ == "__main__":
    main_with_usage_errors("aliblip.convert", main)
