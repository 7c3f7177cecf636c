"""Flags of `train.py`."""

from __future__ import annotations

from dataclasses import dataclass

from aliblip.data.arguments import DataArguments, TokenizerArguments
from aliblip.runtime.arguments import option


@dataclass
class ModelArguments(TokenizerArguments):
    """Where the model comes from: either a trained one, or a configuration and a tokenizer to train from scratch, with
    trained towers or without."""

    model_name_or_path: str | None = option(
        None, "Model to start from: folder or Hub name of AliBLIP or of transformers' BLIP, or an original .pth file."
    )
    config_name: str | None = option(
        None, "To train from scratch: base (ViT-B/16), large (ViT-L/16), or a folder with a config.json."
    )
    vision_model_name_or_path: str | None = option(
        None, "A trained ViT (model type vit, as google/vit-*) for the photo tower; the rest is as --config_name says."
    )
    text_model_name_or_path: str | None = option(
        None, "A trained BERT (model type bert) for the title tower; the rest is as --config_name says."
    )
    vision_config: str | None = option(
        None, 'Fields of the ViT to change, as JSON or a recipe\'s mapping: {"hidden_size": 192}.'
    )
    text_config: str | None = option(None, "Fields of the BERT to change, as JSON or a recipe's mapping.")
    image_text_hidden_size: int | None = option(None, "Width of the shared embedding space (256 from scratch).")
    temperature_init: float | None = option(None, "Initial ITC temperature (0.07 from scratch).")
    tokenizer_name: str | None = option(
        None,
        "Tokenizer: folder, vocab.txt or Hub name (default: that of the model or of --text_model_name_or_path, else "
        "bert-base-uncased).",
    )
    image_size: int | None = option(
        None, "Side of the photos in pixels; a trained model's position embedding is interpolated to it."
    )
    max_length: int | None = option(None, "Longest title in tokens, [CLS] and [SEP] included (35 from scratch).")
    attn_implementation: str | None = option(None, "sdpa (default), eager or flash_attention_2.")


@dataclass
class TrainDataArguments(DataArguments):
    train_split_name: str = option("train", "Split to train on.")
    validation_split_name: str = option("validation", "Split to evaluate on.")
    train_file: str | None = option(
        None,
        'Instead of a data set: a file or glob to train on; a JSON list of {"product": file, "caption": text} too.',
    )
    validation_file: str | None = option(None, "The same for the evaluation.")
    shuffle_window: int | None = option(
        None,
        "Rows that are permuted among themselves, undecoded, of all processes together; more mixes better (default: "
        "4096, or 16 global batches if that is more).",
    )
    data_partitions: int | None = option(
        None,
        "Parts of the data that are read side by side, a divisor of the global batch; a run goes on with any number of "
        "processes that divides it (default: the largest up to 64 that the processes share).",
    )
    augmentation: str = option(
        "blip", "blip (crop, flip, RandAugment), crop_flip, or none.", choices=["blip", "crop_flip", "none"]
    )
    min_crop_scale: float = option(0.5, "Smallest area of the random resized crop, as a share of the photo.")
    horizontal_flip: bool = option(True, "Mirror every second photo (not for catalogues where text or side matters).")
    max_skipped_fraction: float = option(0.05, "Stop the run when more than this share of the rows is unusable.")


@dataclass
class MeterArguments:
    """What is measured of a run."""

    peak_tflops: float | None = option(
        None,
        "Rate of one device in the precision of the run, by its maker, in TFLOP/s: the log tells the share of it that "
        "is reached (MFU), and the plan the time at 40 %% of it (default: that of a GPU that is known by its name).",
    )
    profile: int = option(
        0, "Profile so many steps: a trace, and a page that says where the time goes, in profile/ of the output folder."
    )


@dataclass
class TowerArguments:
    """What of the model is trained, and how fast."""

    freeze: str | None = option(
        None,
        "Parts that keep their weights, with commas: vision, text (what makes the features of a title), "
        "cross_attention (what ITM sees photos with), projections, itm_head, temperature.",
    )
    vision_learning_rate: float | None = option(None, "Peak learning rate of the ViT (default: as the rest).")
    text_learning_rate: float | None = option(
        None, "Peak learning rate of the BERT, cross-attention included (default: as the rest)."
    )
    layer_decay: float = option(
        1.0, "Learning rate of a layer of both towers as a share of that of the layer above it; 1: all have the same."
    )
    lora_rank: int | None = option(
        None, "Train LoRA adapters of this rank in all attention and heads, and nothing else (extra peft)."
    )
    lora_alpha: float | None = option(
        None, "What the adapters are multiplied with, times the rank (default: twice it)."
    )


@dataclass
class EvaluationTimes:
    """When a run is evaluated, and when that ends it."""

    evaluate_every: int = option(
        1, "Evaluate every so many epochs, and after the last; 0: never, or only as --eval_steps says."
    )
    eval_steps: int | None = option(None, "Evaluate every so many optimizer steps too, and keep the best of them.")
    early_stopping_patience: int | None = option(
        None, "End the run after so many evaluations in a row without a better mean recall."
    )

    @property
    def evaluates(self) -> bool:
        return self.evaluate_every > 0 or self.eval_steps is not None


@dataclass
class TrackerArguments:
    """Where a run is watched."""

    report_to: str = option(
        "none", "Trackers of accelerate, with commas: tensorboard,wandb; or all that are installed."
    )
    project_name: str = option("aliblip", "Project of the trackers; of TensorBoard the folder in logs/.")
    run_name: str | None = option(
        None, "What the trackers call the run (default: the name of the output folder); TensorBoard shows its folder."
    )


@dataclass
class TrainingArguments(TowerArguments, EvaluationTimes, TrackerArguments, MeterArguments):
    """How to train."""

    output_dir: str | None = option(None, "Folder for models, checkpoints and logs (required).")
    overwrite_output_dir: bool = option(False, "Train into a folder that holds an earlier run, and replace it.")
    per_device_train_batch_size: int = option(16, "Rows per step and process.")
    per_device_eval_batch_size: int = option(32, "Rows encoded at a time in the evaluation.")
    num_train_epochs: float = option(6, "Epochs to train.")
    max_train_steps: int | None = option(None, "Optimizer steps to train, instead of epochs.")
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.")
    learning_rate: float = option(1e-5, "Peak learning rate of AdamW.")
    temperature_learning_rate: float | None = option(
        None, "Peak learning rate of the ITC temperature (default: as the rest). A small one keeps it from collapsing."
    )
    lr_scheduler_type: str = option(
        "cosine", "Schedule of transformers by name (per step), or cosine_per_epoch as in the published code."
    )
    warmup_steps: int = option(0, "Optimizer steps of linear warm-up.")
    weight_decay: float = option(0.05, "Weight decay of AdamW.")
    decay_everything: bool = option(False, "Decay biases, LayerNorms and the temperature too, as the published code.")
    adam_beta1: float = option(0.9, "First beta of AdamW.")
    adam_beta2: float = option(0.999, "Second beta of AdamW.")
    adam_epsilon: float = option(1e-8, "Epsilon of AdamW.")
    max_grad_norm: float = option(1.0, "Clip gradients to this norm; 0: don't.")
    queue_size: int = option(57600, "Features kept as extra contrastive keys.")
    momentum: float = option(0.995, "Share of the momentum encoders that stays at each step.")
    momentum_warmup: bool = option(False, "Let the momentum encoders follow quickly at first.")
    momentum_dropout: bool = option(False, "Keep dropout on in the momentum encoders, as the published code does.")
    alpha: float = option(0.4, "Weight of the momentum encoders' opinion in the ITC targets, from the second epoch on.")
    in_batch_itc: float = option(
        0.0, "Share of the ITC loss between present features of the batch, 0 to 1; 0: the published objective."
    )
    cached_batch_size: int | None = option(
        None,
        "Rows that go through the model at a time (GradCache): losses of the whole batch in the memory of so few, for "
        "twice the forward pass.",
    )
    patch_dropout: float = option(
        0.0, "Share of a photo's patches that training leaves out (FLIP), below 1: faster, at a cost in recall."
    )
    unpad: bool = option(False, "Compute titles without their padding.")
    negatives_from_all_ranks: bool = option(False, "Choose ITM's hard negatives among all processes' batches.")
    hardest_negatives: bool = option(False, "Take the most similar candidates as hard negatives instead of drawing.")
    itm_negatives: int = option(
        1, "Hard negative photos of each title in ITM, and hard negative titles of each photo; 1 as the published code."
    )
    itm_queue_titles: int = option(0, "Further hard negative titles of each photo, out of the queue.")
    itm_negative_ceiling: float | None = option(
        None, "Draw no negative whose cosine similarity (ITC) is above this: it may be the same thing once more."
    )
    itm_listwise: float = option(
        0.0, "Weight of the listwise matching loss beside the pair loss; 0: the published objective."
    )
    itm_listwise_itc: bool = option(
        False, "In the listwise loss, score pairs by match logit + ITC / temperature instead of the match logit alone."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: slower, less memory.")
    gradient_checkpointing_vision_layers: int | None = option(None, "Only the last so many ViT layers (default: all).")
    gradient_checkpointing_text_layers: int | None = option(None, "Only the last so many BERT layers (default: all).")
    compile: bool = option(False, "Run the layers of both towers through torch.compile: a slow start, then faster.")
    fp8: bool = option(
        False,
        "Multiply in 8 bits in the linear layers of both towers, in a run in bf16 on a GPU that can: Ada, Hopper or "
        "newer (extra fp8).",
    )
    mixed_precision: str | None = option(
        None,
        "no, bf16, or fp16 with loss scaling, for GPUs without bf16 (default: as the launcher says).",
        choices=["no", "bf16", "fp16"],
    )
    deterministic: bool = option(False, "On a GPU: equal runs give equal bits, and resumed ones too; slower.")
    seed: int = option(42, "Seed of weights, order, augmentation, dropout and negatives.")
    k_rerank: int | None = option(None, "Candidates that ITM re-ranks in the evaluation (default: 128 or the gallery).")
    logging_steps: int = option(50, "Optimizer steps between log lines.")
    checkpointing_steps: int | None = option(
        None, "Optimizer steps between checkpoints to resume from; one is written at each epoch's end too."
    )
    save_total_limit: int | None = option(None, "Checkpoints to keep, the newest ones (default: all).")
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, or last.")
    push_to_hub: bool = option(False, "Upload the best model with its card to --hub_model_id at each save.")
    max_non_finite_steps: int = option(
        10, "Give up after so many steps in a row with a loss or gradient that is not finite; each changes nothing."
    )


@dataclass
class PlanArguments:
    """What a run would take, and where; for `python -m aliblip.doctor` and `train.py --dry_run`."""

    samples_per_second: float | None = option(
        None, "Rate of the whole run, measured (samples/s of a log line): tells the time."
    )
    device_memory_gb: float | None = option(
        None, "Plan for GPUs of so much memory, in GB, instead of for this machine's devices."
    )
    processes: int | None = option(None, "Plan for so many processes (default: as the launcher says).")
    compared_rows: int = option(20_000, "Rows of each split whose photos are compared by their bytes; 0: none.")


@dataclass
class DryRunArguments(PlanArguments):
    dry_run: bool = option(
        False, "Look at everything that can be wrong, tell it all with the plan, and stop; nothing is written."
    )
