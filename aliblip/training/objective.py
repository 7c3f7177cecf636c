"""The training objective: model and losses in one forward, so that DDP's and ZeRO's hooks fire once per step.

Legend: B rows of a batch on one rank, G rows of all ranks, Q queue slots, K = B + Q keys, E width of the shared space,
P image tokens, L text tokens, D width of the ViT.

Nothing here changes state: the momentum update, the queue and the temperature clamp are named calls of the loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aliblip.runtime.distributed import all_gather, all_gather_with_grad, reduce_max
from losses_aliblip import hard_negatives, itc_loss, itm_loss, itm_pairs, positives, soft_targets


@dataclass
class ObjectiveOutput:
    loss: Tensor  # fp32 scalar to differentiate: ITC + ITM
    parts: dict[str, Tensor]  # {"itc", "itm"}, detached
    report: dict[str, Tensor]  # detached scalars of this rank, see RetrievalObjective.forward


def match_by_length(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, image_kv, image_index: Tensor, buckets: int = 4
) -> Tensor:
    """`model.match` without most of the padding: the pairs in a few groups of similar length, each as long as its
    longest
    title. Titles differ much in length (half of them are padding in a typical batch), and the pairs are most of a
    step's work. The logits are those of one call, up to the order of float sums; dropout draws other masks.

    Args:
        input_ids, attention_mask: (M, L), padded on the right.
        buckets: number of groups; few, since every group is a pass of its own.
    """
    lengths = attention_mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    groups = order.tensor_split(min(buckets, len(order)))
    longest = torch.stack([lengths[group[-1]] for group in groups]).tolist()  # the one wait for the device
    logits = [
        model.match(input_ids[group, :length], attention_mask[group, :length], image_kv, image_index[group])
        for group, length in zip(groups, longest, strict=True)
    ]
    return torch.cat(logits)[order.argsort()]


class RetrievalObjective(nn.Module):
    """ITC against momentum features and queue, ITM with hard negatives (BLIP retrieval, https://arxiv.org/abs/2201.12086).

    The contrastive keys of a rank are its own batch's momentum features and the queue; other ranks' samples become keys
    through the queue, from the next step on.

    Args:
        model: has `get_image_features`, `get_text_features`, `project_image_kv`, `match` and the temperature `temp`.
        negatives_from_all_ranks: take ITM's hard negatives from every rank's batch, with gradient, and not only from
            the own one.
        hardest_negatives: take the most similar candidate instead of drawing by similarity.
        in_batch_itc: share of the ITC loss, 0 to 1, that contrasts the present features of all ranks' batches with
            each other (CLIP, https://arxiv.org/abs/2103.00020) instead of with momentum features and queue. Momentum
            features lag behind, and no gradient flows into them: from scratch and on small data a share of this loss
            learns faster. 0 is the published objective.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        negatives_from_all_ranks: bool = False,
        hardest_negatives: bool = False,
        in_batch_itc: float = 0.0,
    ):
        super().__init__()
        self.model = model
        self.negatives_from_all_ranks = negatives_from_all_ranks
        self.hardest_negatives = hardest_negatives
        self.in_batch_itc = in_batch_itc

    def forward(self, batch: dict[str, Tensor], targets, alpha: float) -> ObjectiveOutput:
        """One batch to its loss.

        Args:
            batch: pixel_values (B, 3, H, H), input_ids and attention_mask (B, L), product_id (B,); or (B, 2), products
                and photos: rows that share one of the two are positives of each other, and never negatives.
            targets: the momentum side, see `aliblip.training.momentum.Targets`.
            alpha: weight of the momentum encoders' opinion in the ITC targets.

        Returns:
            report: temperature; itm_accuracy_positive and itm_accuracy_negative, shares of pairs judged right;
            positives_per_row, keys of the own product or photo, the own one included, mean over rows;
            rows_without_negative, ITM rows left out because no candidate shows another product (texts and images both
            count).
        """
        product_id = batch["product_id"]
        image = self.model.get_image_features(batch["pixel_values"])
        text = self.model.get_text_features(batch["input_ids"], batch["attention_mask"])
        image_features, text_features = image.pooler_output.float(), text.pooler_output.float()  # (B, E)
        temperature = self.model.temp.float()
        # Autocast would do the similarities in half precision: at a temperature of 0.07 that is an error of 0.03.
        full_precision = torch.autocast(image_features.device.type, enabled=False)

        with full_precision:
            itc, positive = self._itc(image_features, text_features, product_id, targets, temperature, alpha)
            if self.in_batch_itc:
                in_batch = self._in_batch_itc(image_features, text_features, product_id, temperature)
                itc = (1.0 - self.in_batch_itc) * itc + self.in_batch_itc * in_batch
            negatives = self._negatives(product_id, image_features, text_features, temperature)
        itm, itm_report = self._itm(batch, image.last_hidden_state, *negatives)
        report = {
            "temperature": temperature.detach().squeeze(),
            "positives_per_row": positive.sum(dim=1).float().mean(),
            **itm_report,
        }
        return ObjectiveOutput(itc + itm, {"itc": itc.detach(), "itm": itm.detach()}, report)

    def _itc(self, image_features, text_features, product_id, targets, temperature, alpha) -> tuple[Tensor, Tensor]:
        image_keys = torch.cat([targets.image, targets.image_queue])  # (K, E)
        text_keys = torch.cat([targets.text, targets.text_queue])
        filled = torch.cat([targets.queue_filled.new_ones(len(product_id)), targets.queue_filled])  # (K,)
        queue_ids = targets.queue_ids
        if product_id.dim() == 2:
            queue_ids = torch.stack([queue_ids, targets.queue_photos], dim=1)
        positive = positives(product_id, torch.cat([product_id, queue_ids]), filled)  # (B, K)
        with torch.no_grad():
            to_text = soft_targets(positive, targets.image @ text_keys.t() / temperature, alpha)  # (B, K)
            to_image = soft_targets(positive, targets.text @ image_keys.t() / temperature, alpha)
        image_to_text = itc_loss(image_features @ text_keys.t() / temperature, to_text)
        text_to_image = itc_loss(text_features @ image_keys.t() / temperature, to_image)
        return (image_to_text + text_to_image) / 2, positive

    def _in_batch_itc(self, image_features, text_features, product_id, temperature) -> Tensor:
        image_keys, text_keys = all_gather_with_grad(image_features), all_gather_with_grad(text_features)  # (G, E)
        targets = soft_targets(positives(product_id, all_gather(product_id)))  # (B, G)
        image_to_text = itc_loss(image_features @ text_keys.t() / temperature, targets)
        text_to_image = itc_loss(text_features @ image_keys.t() / temperature, targets)
        return (image_to_text + text_to_image) / 2

    @torch.no_grad()
    def _negatives(self, product_id, image_features, text_features, temperature) -> tuple[Tensor, ...]:
        """A hard negative image of each text and whether it has one, and a hard negative text of each image likewise;
        the indices are into the own batch, or into the gathered one."""
        images, texts, ids = image_features, text_features, product_id
        if self.negatives_from_all_ranks:
            images, texts, ids = all_gather(images), all_gather(texts), all_gather(ids)  # (G, ...)
        positive = positives(product_id, ids)
        return (
            *hard_negatives(text_features @ images.t() / temperature, positive, hardest=self.hardest_negatives),
            *hard_negatives(image_features @ texts.t() / temperature, positive, hardest=self.hardest_negatives),
        )

    def _itm(
        self, batch, image_tokens, negative_image, image_exists, negative_text, text_exists
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, texts, masks = image_tokens, batch["input_ids"], batch["attention_mask"]
        if self.negatives_from_all_ranks:
            # Own rows first, then the chosen ones: 2 B images to project instead of the G that were gathered.
            own = torch.arange(len(texts), device=texts.device)
            images = torch.cat([images, all_gather_with_grad(image_tokens)[negative_image]])  # (2 B, P, D)
            # Ranks pad to their own longest title.
            padding = (0, reduce_max(texts.shape[1], texts.device) - texts.shape[1])
            texts, masks = F.pad(texts, padding), F.pad(masks, padding)
            texts = torch.cat([texts, all_gather(texts)[negative_text]])  # (2 B, L)
            masks = torch.cat([masks, all_gather(masks)[negative_text]])
            negative_image = negative_text = len(own) + own

        image_index, text_index, is_match = itm_pairs(negative_image, image_exists, negative_text, text_exists)
        image_kv = self.model.project_image_kv(images)  # once per image, though it stands in several pairs
        logits = match_by_length(self.model, texts[text_index], masks[text_index], image_kv, image_index)  # (M, 2)
        with torch.no_grad():
            right = (logits.argmax(dim=1).bool() == is_match).float()
            positives_right, negatives_right = right[is_match], right[~is_match]
            report = {
                "itm_accuracy_positive": positives_right.mean(),
                # A batch of one product has no negatives: 0 pairs are not 0 % right.
                "itm_accuracy_negative": negatives_right.mean()
                if len(negatives_right)
                else logits.new_ones(()).float(),
                "rows_without_negative": (~image_exists).sum() + (~text_exists).sum(),
            }
        return itm_loss(logits, is_match), report


__all__ = ["ObjectiveOutput", "RetrievalObjective", "match_by_length"]
