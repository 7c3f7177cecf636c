"""Publish a model on the Hub: its files and a model card, in one commit.

    python -m aliblip.publish --model_name_or_path outputs/mine/best --hub_model_id me/name     # a finished folder
    python -m aliblip.publish --model_name_or_path outputs/mine/best                            # only write its card
    python train.py ... --push_to_hub --hub_model_id me/name                                    # while it trains

What goes up is what `from_pretrained` needs and the card: configuration, weights, processor, tokenizer, the Hub files.
Checkpoints, evaluations, logs and lists of rows stay here.

The token is that of `--hub_token`, of the variable HF_TOKEN, or of `hf auth login`; it is written nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aliblip.models.card import CARD, write_card
from aliblip.models.upload import HubArguments, check_folder, connect, upload
from aliblip.runtime.arguments import option, parse
from aliblip.runtime.mistakes import UsageError, first_line, main_with_usage_errors, usage_errors
from aliblip.runtime.retries import WAITS, retried, trouble_of


@dataclass
class PublishArguments:
    """What to publish."""

    model_name_or_path: str | None = option(None, "Folder of a trained model, such as outputs/mine/best (required).")


def publish(args: PublishArguments, hub_args: HubArguments) -> list[str]:
    """Do what the arguments ask for. Returns lines that tell what was done.

    Raises:
        UsageError: nothing is uploaded then.
    """
    if args.model_name_or_path is None:
        raise UsageError("--model_name_or_path is missing: give a trained model, such as outputs/mine/best")
    folder = Path(args.model_name_or_path)
    check_folder(folder)
    api = None
    name = str(folder)
    if hub_args.hub_model_id is not None:
        api, name = connect(hub_args)
    with usage_errors(OSError, told=f"the card of {folder} can't be written: {{}}"):
        is_ours = write_card(folder, name, hub_args.hub_license)
    told = [f"{'written' if is_ours else 'left as you edited it'}: {folder / CARD}"]
    if api is None:
        return [*told, "to upload it, give --hub_model_id too"]
    try:
        address = retried(lambda: upload(api, name, folder, "Publish"), WAITS, what=f"the upload to {name}")
    except Exception as error:  # the Hub's client has many kinds
        if trouble_of(error).reason is None:  # neither the Hub nor the connection: a bug
            raise
        raise UsageError(
            f"{folder} could not be uploaded to {name} ({type(error).__name__}: {first_line(error)}): try again later"
        ) from error
    return [*told, f"published: {address}"]


def main() -> int:
    args, hub_args = parse([PublishArguments, HubArguments], description=__doc__)
    print("\n".join(publish(args, hub_args)))
    return 0


if __name__ == "__main__":
    main_with_usage_errors("aliblip.publish", main)
