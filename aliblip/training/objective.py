"""The training objective: model and losses in one forward, so that DDP's and ZeRO's hooks fire once per step.

Legend: B rows of a batch on one rank, G rows of all ranks, Q queue slots, K = B + Q keys, E width of the shared space,
P image tokens, L text tokens, D width of the ViT, n negatives of a row, t of them titles of the queue, M pairs.

Nothing here changes state: the momentum update, the queue and the temperature clamp are named calls of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aliblip.runtime.distributed import ChosenRows, all_gather, all_gather_with_grad, rank, world_size
from aliblip.training.cached import in_chunks, match_in_chunks
from aliblip.training.profiling import FORWARD, record_function
from aliblip.training.unpadded import match_without_padding, text_features_without_padding, title_lengths
from losses_aliblip import hard_negatives, itc_loss, itm_loss, itm_pairs, listwise_loss, positives, soft_targets

# What a pass over a group of titles costs beside its tokens, in tokens: on a GPU the launches of its kernels.
TOKENS_PER_PASS = {"cpu": 0, "cuda": 4096}


@dataclass
class Negatives:
    """The hard negatives of a batch; indices are into the own batch, or into the gathered one."""

    image: Tensor  # (B, n) int64, images that go with each text
    image_exists: Tensor  # (B, n) bool
    text: Tensor  # (B, n) int64, texts that go with each image
    text_exists: Tensor  # (B, n) bool
    slot: Tensor | None = None  # (B, t) int64, slots of the queue whose titles go with each image
    slot_exists: Tensor | None = None  # (B, t) bool
    itc: Tensor | None = None  # (B + B n + B (n + t),) similarity over the temperature of the pairs, in their order


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
            the own one. Features and titles of all ranks are gathered; of the photos' tokens only those that were
            chosen travel, where that is less, see `aliblip.training.traffic`.
        hardest_negatives: take the most similar candidates instead of drawing by similarity.
        itm_negatives: how many hard negative images each text has, and how many negative texts each image. Keys and
            values of an image are computed once, however many pairs it stands in.
        itm_queue_titles: further negative titles of each image, out of the queue, where `targets` has its titles.
        itm_negative_ceiling: cosine similarity of photo and title above which nothing is drawn: in a catalogue the most
            similar "negative" is often the same thing once more. None: no ceiling.
        itm_listwise: weight of the listwise matching loss beside the pair loss. 0 is the published objective.
        itm_listwise_itc: the listwise loss scores a pair as re-ranking does, match logit + similarity / temperature, of
            which only the match logit is trained by it; without, by the match logit alone.
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
        itm_negatives: int = 1,
        itm_queue_titles: int = 0,
        itm_negative_ceiling: float | None = None,
        itm_listwise: float = 0.0,
        itm_listwise_itc: bool = False,
        in_batch_itc: float = 0.0,
        longest_title: int | None = None,
        cached_batch_size: int | None = None,
        unpad: bool = False,
    ):
        super().__init__()
        self.model = model
        self.negatives_from_all_ranks = negatives_from_all_ranks
        self.hardest_negatives = hardest_negatives
        self.itm_negatives = itm_negatives
        self.itm_queue_titles = itm_queue_titles
        self.itm_negative_ceiling = itm_negative_ceiling
        self.itm_listwise = itm_listwise
        self.itm_listwise_itc = itm_listwise_itc
        self.in_batch_itc = in_batch_itc
        self.longest_title = longest_title
        self.cached_batch_size = cached_batch_size
        self.unpad = unpad

    @record_function(FORWARD)
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
            and images both count); with a listwise loss loss_pairs and loss_lists, of which ITM's loss is made.
        """
        product_id = batch["product_id"]
        image_tokens, image_features, text_features = self._encode(batch)  # (B, P, D), (B, E), (B, E)
        temperature = self.model.temp.float()
        # Autocast would do the similarities in half precision: at a temperature of 0.07 that is an error of 0.03.
        full_precision = torch.autocast(image_features.device.type, enabled=False)

        with full_precision:
            positive = self._positives(product_id, targets)
            negatives = self._negatives(product_id, image_features, text_features, temperature, targets, positive)
            # First of all: what has to be known of the choice is on its way while the device does the rest.
            chosen = ChosenRows(negatives.image.flatten(), len(product_id)) if self._fetches_images() else None
            itc = self._itc(image_features, text_features, positive, targets, temperature, alpha)
            if self.in_batch_itc:
                in_batch = self._in_batch_itc(image_features, text_features, product_id, temperature)
                itc = (1.0 - self.in_batch_itc) * itc + self.in_batch_itc * in_batch
        itm, itm_report = self._itm(batch, image_tokens, negatives, chosen, targets)
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
        image = self.model.get_image_features(pixel_values, return_dict=True)
        if lengths is None:
            text = self.model.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output.float()
        else:
            text = text_features_without_padding(self.model, input_ids, attention_mask, int(lengths.sum()))
        return image.last_hidden_state, image.pooler_output.float(), text

    def _positives(self, product_id, targets) -> Tensor:
        """(B, K) bool: which keys of ITC, those of the own batch and then those of the queue, are of each row's own."""
        filled = torch.cat([targets.queue_filled.new_ones(len(product_id)), targets.queue_filled])  # (K,)
        queue_ids = targets.queue_ids
        if product_id.dim() == 2:
            queue_ids = torch.stack([queue_ids, targets.queue_photos], dim=1)
        return positives(product_id, torch.cat([product_id, queue_ids]), filled)

    def _itc(self, image_features, text_features, positive, targets, temperature, alpha) -> Tensor:
        image_keys = torch.cat([targets.image, targets.image_queue])  # (K, E)
        text_keys = torch.cat([targets.text, targets.text_queue])
        with torch.no_grad():
            to_text = soft_targets(positive, targets.image @ text_keys.t() / temperature, alpha)  # (B, K)
            to_image = soft_targets(positive, targets.text @ image_keys.t() / temperature, alpha)
        image_to_text = itc_loss(image_features @ text_keys.t() / temperature, to_text)
        text_to_image = itc_loss(text_features @ image_keys.t() / temperature, to_image)
        return (image_to_text + text_to_image) / 2

    def _in_batch_itc(self, image_features, text_features, product_id, temperature) -> Tensor:
        image_keys, text_keys = all_gather_with_grad(image_features), all_gather_with_grad(text_features)  # (G, E)
        targets = soft_targets(positives(product_id, all_gather(product_id)))  # (B, G)
        image_to_text = itc_loss(image_features @ text_keys.t() / temperature, targets)
        text_to_image = itc_loss(text_features @ image_keys.t() / temperature, targets)
        return (image_to_text + text_to_image) / 2

    # --- the negatives of ITM -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _negatives(self, product_id, image_features, text_features, temperature, targets, positive) -> Negatives:
        """Draw them.

        Args:
            positive: of `_positives`.
        """
        images, texts, ids = image_features, text_features, product_id
        if self.negatives_from_all_ranks:
            images, texts, ids = all_gather(images), all_gather(texts), all_gather(ids)  # (G, ...)
        same = positives(product_id, ids)
        to_image, to_text = text_features @ images.t(), image_features @ texts.t()  # (B, G)
        negatives = Negatives(
            *self._draw(to_image, temperature, same, self.itm_negatives),
            *self._draw(to_text, temperature, same, self.itm_negatives),
        )
        drawn = (
            [to_image.gather(1, negatives.image), to_text.gather(1, negatives.text)] if self.itm_listwise_itc else []
        )
        if self.itm_queue_titles:
            to_slot = image_features @ targets.text_queue.t()  # (B, Q)
            # A slot not yet filled, or of a checkpoint that has no titles, is nobody's.
            excluded = positive[:, len(product_id) :] | (targets.queue_lengths == 0)
            slots = self._draw(to_slot, temperature, excluded, self.itm_queue_titles)
            negatives.slot, negatives.slot_exists = slots
            if drawn:
                drawn[1] = torch.cat([drawn[1], to_slot.gather(1, negatives.slot)], dim=1)
        if drawn:
            own = (image_features * text_features).sum(dim=1)
            negatives.itc = torch.cat([own, *(side.flatten() for side in drawn)]) / temperature
        return negatives

    def _draw(self, similarity, temperature, excluded, count) -> tuple[Tensor, Tensor]:
        if self.itm_negative_ceiling is not None:
            excluded = excluded | (similarity > self.itm_negative_ceiling)
        return hard_negatives(similarity / temperature, excluded, count, hardest=self.hardest_negatives)

    def _fetches_images(self) -> bool:
        """Whether the chosen images' tokens travel. Otherwise each rank takes those of its own, or, where it would
        fetch at least as many as there are, all."""
        return self.negatives_from_all_ranks and (self.itm_negatives == 1 or world_size() > 1 + self.itm_negatives)

    def _images_to_match(self, image_tokens: Tensor, negative: Tensor, chosen: ChosenRows | None) -> tuple[Tensor, ...]:
        """The images to project for the pairs, the own B first, and where among them the negative ones (B, n) are."""
        rows = len(negative)
        if chosen is not None:
            images = torch.cat([image_tokens, chosen.fetch(image_tokens)])  # (1 + n) B of the G of all ranks
            return images, torch.arange(rows, len(images), device=negative.device).view_as(negative)
        if self.negatives_from_all_ranks:
            first, images = rank() * rows, all_gather_with_grad(image_tokens)
            return images.roll(-first, 0), (negative - first) % len(images)
        return image_tokens, negative

    def _titles_to_match(self, batch, negatives: Negatives, targets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The titles for the pairs with their masks, the own B first; where among them the negative ones (B, n + t)
        are, and which of these exist."""
        texts, masks = batch["input_ids"], batch["attention_mask"]
        negative, exists = negatives.text, negatives.text_exists
        rows, own_length = texts.shape
        if self.negatives_from_all_ranks or self.itm_queue_titles:
            # Ranks pad to their own longest title. Which of them is the longest would have to be waited for.
            padding = (0, self._longest_title(own_length) - own_length)
            texts, masks = F.pad(texts, padding), F.pad(masks, padding)
        if self.negatives_from_all_ranks:
            # As numbers of 4 bytes, and their count in place of the mask.
            gathered = all_gather(torch.cat([texts, masks.sum(dim=1, keepdim=True)], dim=1).int())  # (G, L + 1)
            drawn, lengths = gathered[negative.flatten()].to(texts.dtype).split([texts.shape[1], 1], dim=1)
            negative = torch.arange(rows, rows + len(drawn), device=texts.device).view_as(negative)
            in_title = torch.arange(texts.shape[1], device=texts.device) < lengths
            texts = torch.cat([texts, drawn])  # (B + B n, L)
            masks = torch.cat([masks, in_title.to(masks.dtype)])
        if self.itm_queue_titles:
            slots = negatives.slot.flatten()
            places = torch.arange(len(texts), len(texts) + len(slots), device=texts.device)
            negative = torch.cat([negative, places.view_as(negatives.slot)], dim=1)
            exists = torch.cat([exists, negatives.slot_exists], dim=1)
            lengths = targets.queue_lengths[slots].clamp(min=1)  # attention to nothing at all is NaN
            in_title = torch.arange(texts.shape[1], device=texts.device) < lengths[:, None]
            texts = torch.cat([texts, targets.queue_titles[slots].to(texts.dtype)])
            masks = torch.cat([masks, in_title.to(masks.dtype)])
        return texts, masks, negative, exists

    def _itm(
        self, batch, image_tokens, negatives: Negatives, chosen: ChosenRows | None, targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = len(batch["input_ids"])
        images, negative_image = self._images_to_match(image_tokens, negatives.image, chosen)
        texts, masks, negative_text, text_exists = self._titles_to_match(batch, negatives, targets)
        pairs = itm_pairs(negative_image, negatives.image_exists, negative_text, text_exists)
        masks = masks[pairs.text_index]  # (M, L)
        if masks.device.type == "cpu":
            longest = masks.sum(dim=1).tolist()  # a look at the host's own memory waits for nothing
        else:
            own_lengths = list(title_lengths(batch))
            of_images = [length for length in own_lengths for _ in range(negative_image.shape[1])]
            # Which texts were drawn is not known here.
            longest = [*own_lengths, *of_images, *[masks.shape[1]] * pairs.sizes[2]]
        inputs = (images, texts[pairs.text_index], masks, pairs.image_index)
        if self.cached_batch_size is None:
            logits = self._match(*inputs, longest)  # (M, 2)
        else:
            logits = match_in_chunks(self._match, self.cached_batch_size, *inputs, pairs.sizes, longest)
        with torch.no_grad():
            right = (logits.argmax(dim=1).bool() == pairs.is_match).float()
            negative = pairs.weight[rows:].sum()  # texts and images that have any
            report = {
                "itm_accuracy_positive": right[:rows].mean(),
                "itm_accuracy_negative": (right * pairs.weight)[rows:].sum() / negative,
                "rows_without_negative": 2 * rows - negative,
            }
        loss = itm_loss(logits, pairs.is_match, pairs.weight)
        if self.itm_listwise:
            scores = logits[:, 1].float()
            lists = listwise_loss(scores if negatives.itc is None else scores + negatives.itc, pairs)
            report |= {"loss_pairs": loss.detach(), "loss_lists": lists.detach()}
            loss = loss + self.itm_listwise * lists
        return loss, report

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


__all__ = ["Negatives", "ObjectiveOutput", "RetrievalObjective", "length_groups", "match_by_length"]
