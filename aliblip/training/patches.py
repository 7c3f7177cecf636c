"""`--patch_dropout`: the photo tower sees some patches of each training photo (FLIP, https://arxiv.org/abs/2212.00794).

    drop_patches(model, 0.5)

Half of the patches are about half of a step's work. The class token stays, which ITC reads; which patches stay is drawn
anew for each photo and step, after the positions were added, so that each is known for the place where it was. ITM
matches with the tokens of the same pass: the class token and the patches that stayed, of the own photo and of a
negative one. A second pass over the whole photo for ITM would cost what is saved.

Only training does it: a model in evaluation mode sees whole photos, and so do the momentum encoders, whose features are
targets, and keys in the queue.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def patches_kept(patches: int, rate: float) -> int:
    """Of so many patches those that stay, one at least."""
    return max(round(patches * (1.0 - rate)), 1)


def drop_patches(model: nn.Module, rate: float) -> RemovableHandle:
    """Let a model drop this share of a photo's patches, 0 to 1, while it is in training mode. Nothing of it is saved
    with the model; copies made before (the momentum encoders) are as they were."""

    def drop(embeddings: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
        """(B, P, D) -> (B, 1 + kept, D)."""
        if not embeddings.training:
            return tokens
        classes, patches = tokens[:, :1], tokens[:, 1:]
        order = torch.rand(patches.shape[:2], device=tokens.device).argsort(dim=1)
        kept = order[:, : patches_kept(patches.shape[1], rate), None].expand(-1, -1, tokens.shape[-1])
        return torch.cat([classes, patches.gather(1, kept)], dim=1)

    return model.vision_model.embeddings.register_forward_hook(drop)


__all__ = ["drop_patches", "patches_kept"]
