"""The training objective: model and losses in one forward, so that DDP's and ZeRO's hooks fire once per step.

Legend: B rows of a batch on one rank, G rows of all ranks, Q queue slots, K = B + Q keys, E width of the shared space,
P image tokens, L text tokens, D width of the ViT.

Nothing here changes state: the momentum update, the queue and the temperature clamp are named calls of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aliblip.runtime.distributed import ChosenRows, all_gather, all_gather_with_grad
from aliblip.training.cached import in_chunks, match_in_chunks
from aliblip.training.unpadded import match_without_padding, text_features_without_padding, title_lengths
from losses_aliblip import hard_negatives, itc_loss, itm_loss, itm_pairs, positives, soft_targets

# What a pass over a group of titles costs beside its tokens, in tokens: on a GPU the launches of its kernels.
TOKENS_PER_PASS = {"cpu": 0, "cuda": 4096}


@dataclass
class ObjectiveOutput:
    loss: Tensor  # fp32 scalar to differentiate: ITC + ITM
    parts: dict[str, Tensor]  # {"itc", "itm"}, detached
    report: dict[str, Tensor]  # detached scalars of this rank, see RetrievalObjective.forward


def length_groups(longest: Sequence[int], tokens_per_pass: int, groups: int = 4) -> list[tuple[int, int]]:
    """Cut titles, sorted by length, into equally many per group; neighbours stay together where a pass of their own
    would cost more than the padding that it saves.

    Args:
        longest: length of each title, in any order, or what it is at most.
        tokens_per_pass: how many tokens a pass costs before its first.
        groups: at most so many; few, since every group is a pass of its own.

    Returns:
        (titles, longest) of each group, from short to long.
    """
    lengths = sorted(longest)
    size, more = divmod(len(lengths), min(groups, len(lengths)))
    cuts = [part * size + min(part, more) for part in range(1, min(groups, len(lengths)))]
    ways = []
    for kept in range(len(cuts), -1, -1):
        for chosen in combinations(cuts, kept):
            ways.append([(end - start, lengths[end - 1]) for start, end in pairwise([0, *chosen, len(lengths)])])
    return min(ways, key=lambda way: sum(titles * length + tokens_per_pass for titles, length in way))


def match_by_length(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    image_kv,
    image_index: Tensor,
    longest: Sequence[int],
    tokens_per_pass: int = 0,
) -> Tensor:
    """`model.match` without most of the padding: the pairs in a few groups of similar length, each as long as its
    longest title. Titles differ much in length (half of them are padding in a typical batch), and the pairs are most of
    a step's work. The logits are those of one call, up to the order of float sums; dropout draws other masks.

    Args:
        input_ids, attention_mask: (M, L), padded on the right.
        longest: M numbers on the host: as many tokens as each title has, or more.
        tokens_per_pass: see `length_groups`.
    """
    groups = length_groups(longest, tokens_per_pass)
    if len(groups) == 1:
        ((_, length),) = groups
        return model.match(input_ids[:, :length], attention_mask[:, :length], image_kv, image_index)
    # The device sorts by the lengths themselves: the longest of the first so many is never above what the host thinks.
    order = attention_mask.sum(dim=1).argsort(stable=True)
    logits = [
        model.match(input_ids[group, :length], attention_mask[group, :length], image_kv, image_index[group])
        for group, (_, length) in zip(order.split([size for size, _ in groups]), groups, strict=True)
    ]
    return torch.cat(logits)[order.argsort()]


class RetrievalObjective(nn.Module):
    """ITC against momentum features and queue, ITM with hard negatives (BLIP retrieval, https://arxiv.org/abs/2201.12086).

    The contrastive keys of a rank are its own batch's momentum features and the queue; other ranks' samples become keys
    through the queue, from the next step on.

    Args:
        model: has `get_image_features`, `get_text_features`, `project_image_kv`, `match` and the temperature `temp`.
        negatives_from_all_ranks: take ITM's hard negatives from every rank's batch, with gradient, and not only from
            the own one. Features and titles of all ranks are gathered, but only the tokens of the photos that were
            chosen travel, see `aliblip.training.traffic`.
        hardest_negatives: take the most similar candidate instead of drawing by similarity.
        in_batch_itc: share of the ITC loss, 0 to 1, that contrasts the present features of all ranks' batches with
            each other (CLIP, https://arxiv.org/abs/2103.00020) instead of with momentum features and queue. Momentum
            features lag behind, and no gradient flows into them: from scratch and on small data a share of this loss
            learns faster. 0 is the published objective.
        longest_title: tokens of the longest title that any rank may have, to which `negatives_from_all_ranks` pads;
            None: what the model takes at most.
        cached_batch_size: rows that go through the model at a time, see `aliblip.training.cached`; the losses and the
            negatives are those of the whole batch. None: all of them.
        unpad: titles without their padding, see `aliblip.training.unpadded`, and in no groups.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        negatives_from_all_ranks: bool = False,
        hardest_negatives: bool = False,
        in_batch_itc: float = 0.0,
        longest_title: int | None = None,
        cached_batch_size: int | None = None,
        unpad: bool = False,
    ):
        super().__init__()
        self.model = model
        self.negatives_from_all_ranks = negatives_from_all_ranks
        self.hardest_negatives = hardest_negatives
        self.in_batch_itc = in_batch_itc
        self.longest_title = longest_title
        self.cached_batch_size = cached_batch_size
        self.unpad = unpad

    def forward(self, batch: dict[str, Tensor], targets, alpha: float) -> ObjectiveOutput:
        """One batch to its loss.

        Args:
            batch: pixel_values (B, 3, H, H), input_ids and attention_mask (B, L), product_id (B,); or (B, 2), products
                and photos: rows that share one of the two are positives of each other, and never negatives. On a GPU
                also title_lengths, B numbers on the host (without them no padding is saved).
            targets: the momentum side, see `aliblip.training.momentum.Targets`.
            alpha: weight of the momentum encoders' opinion in the ITC targets.

        Returns:
            report: temperature; itm_accuracy_positive and itm_accuracy_negative, shares of pairs judged right, the
            latter NaN where there is none; positives_per_row, keys of the own product or photo, the own one included,
            mean over rows; rows_without_negative, ITM rows left out because no candidate shows another product (texts
            and images both count).
        """
        product_id = batch["product_id"]
        image_tokens, image_features, text_features = self._encode(batch)  # (B, P, D), (B, E), (B, E)
        temperature = self.model.temp.float()
        # Autocast would do the similarities in half precision: at a temperature of 0.07 that is an error of 0.03.
        full_precision = torch.autocast(image_features.device.type, enabled=False)

        with full_precision:
            negatives = self._negatives(product_id, image_features, text_features, temperature)
            # First of all: what has to be known of the choice is on its way while the device does the rest.
            chosen = ChosenRows(negatives[0], len(product_id)) if self.negatives_from_all_ranks else None
            itc, positive = self._itc(image_features, text_features, product_id, targets, temperature, alpha)
            if self.in_batch_itc:
                in_batch = self._in_batch_itc(image_features, text_features, product_id, temperature)
                itc = (1.0 - self.in_batch_itc) * itc + self.in_batch_itc * in_batch
        itm, itm_report = self._itm(batch, image_tokens, *negatives, chosen)
        report = {
            "temperature": temperature.detach().squeeze(),
            "positives_per_row": positive.sum(dim=1).float().mean(),
            **itm_report,
        }
        return ObjectiveOutput(itc + itm, {"itc": itc.detach(), "itm": itm.detach()}, report)

    def _encode(self, batch) -> tuple[Tensor, ...]:
        inputs = [batch["pixel_values"], batch["input_ids"], batch["attention_mask"]]
        if self.unpad:
            inputs.append(torch.tensor(title_lengths(batch)))  # on the host
        if self.cached_batch_size is None:
            return self._towers(*inputs)
        return in_chunks(self._towers, self.cached_batch_size, *inputs)

    def _towers(self, pixel_values, input_ids, attention_mask, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
        image = self.model.get_image_features(pixel_values)
        if lengths is None:
            text = self.model.get_text_features(input_ids, attention_mask).pooler_output.float()
        else:
            text = text_features_without_padding(self.model, input_ids, attention_mask, int(lengths.sum()))
        return image.last_hidden_state, image.pooler_output.float(), text

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

    def _from_all_ranks(self, chosen: ChosenRows, images, texts, masks, negative_text) -> tuple[Tensor, ...]:
        """Images and titles of which the second half are the negatives: the own rows come first, then the chosen ones.
        2 B images to project instead of the G of all ranks.

        Returns:
            images (2 B, P, D); texts and masks (2 B, L), padded to the longest title that any rank may have, as which
            of them is the longest would have to be waited for.
        """
        padding = (0, self._longest_title(texts.shape[1]) - texts.shape[1])
        texts, masks = F.pad(texts, padding), F.pad(masks, padding)
        # As numbers of 4 bytes, and their count in place of the mask.
        gathered = all_gather(torch.cat([texts, masks.sum(dim=1, keepdim=True)], dim=1).int())  # (G, L + 1)
        drawn, lengths = gathered[negative_text].long().split([texts.shape[1], 1], dim=1)
        drawn_mask = torch.arange(texts.shape[1], device=texts.device) < lengths
        return (
            torch.cat([images, chosen.fetch(images)]),
            torch.cat([texts, drawn]),
            torch.cat([masks, drawn_mask.to(masks.dtype)]),
        )

    def _itm(
        self, batch, image_tokens, negative_image, image_exists, negative_text, text_exists, chosen: ChosenRows | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, texts, masks = image_tokens, batch["input_ids"], batch["attention_mask"]
        rows, own_length = texts.shape
        if chosen is not None:
            images, texts, masks = self._from_all_ranks(chosen, images, texts, masks, negative_text)
            negative_image = negative_text = rows + torch.arange(rows, device=texts.device)

        image_index, text_index, is_match, weight = itm_pairs(negative_image, image_exists, negative_text, text_exists)
        masks = masks[text_index]  # (3 B, L)
        if masks.device.type == "cpu":
            longest = masks.sum(dim=1).tolist()  # a look at the host's own memory waits for nothing
        else:
            own_lengths = list(title_lengths(batch))
            longest = [*own_lengths, *own_lengths, *[masks.shape[1]] * rows]  # which texts were drawn is not known here
        pairs = (images, texts[text_index], masks, image_index)
        if self.cached_batch_size is None:
            logits = self._match(*pairs, longest)  # (3 B, 2)
        else:
            logits = match_in_chunks(self._match, self.cached_batch_size, *pairs, (rows, rows, rows), longest)
        with torch.no_grad():
            right = (logits.argmax(dim=1).bool() == is_match).float()
            negatives = weight[rows:].sum()
            report = {
                "itm_accuracy_positive": right[:rows].mean(),
                "itm_accuracy_negative": (right * weight)[rows:].sum() / negatives,
                "rows_without_negative": 2 * rows - negatives,
            }
        return itm_loss(logits, is_match, weight), report

    def _match(self, images, input_ids, attention_mask, image_index, longest) -> Tensor:
        image_kv = self.model.project_image_kv(images)  # once per image, though it stands in several pairs
        if self.unpad:
            return match_without_padding(self.model, input_ids, attention_mask, image_kv, image_index, sum(longest))
        tokens_per_pass = TOKENS_PER_PASS.get(input_ids.device.type, TOKENS_PER_PASS["cuda"])
        return match_by_length(self.model, input_ids, attention_mask, image_kv, image_index, longest, tokens_per_pass)

    def _longest_title(self, own: int) -> int:
        longest = self.longest_title or self.model.config.text_config.max_position_embeddings
        if own > longest:
            raise ValueError(f"titles of {own} tokens given, where longest_title is {longest}")
        return longest


__all__ = ["ObjectiveOutput", "RetrievalObjective", "length_groups", "match_by_length"]
