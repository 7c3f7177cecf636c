"""Bytes that a batch moves between the ranks so that each can choose its hard negatives from all of them.

    traffic = negatives_traffic(config, processes=1024, rows=64, longest_title=35, element=2)
    print(traffic.total, traffic.gathering_everything)

Legend: W processes, B rows of a batch on one rank, E width of the shared space, L tokens of the longest title, P tokens
of a photo, D width of the ViT, n negatives of each row, e bytes of a number of the tokens: 2 where an engine holds the
weights in bf16, 4 otherwise, as the LayerNorm at the end of the tower gives fp32 under autocast on a GPU.

What a rank receives, forward and backward together:

    features   (W - 1) B (8 E + 16)    photos and titles in fp32, to choose by; products and photos, to leave out
    titles     (W - 1) B 4 (L + 1)     ids and length of all, as a title is small
    choices    (W - 1) B n 8           so that a rank knows what it has to send
    tokens     2 n B P D e             of the chosen photos, and gradients of its own: on average over the ranks and at
                                       most, as some choose their own. A rank whose photos many choose has more to do

The tokens, which are nearly all of it until the ranks are hundreds, do not grow with W. With all photos gathered they
would: (W - 1) B P D e forward, and the sum over ranks of all gradients backward, which takes a ring 2 (W - 1) B P D e;
3 (W - 1) B P D e in all. That is done where it is less to compute with: of several negatives on at most 1 + n ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from aliblip.retrieval.plan import tokens_per_image


@dataclass(frozen=True)
class NegativesTraffic:
    """Bytes that a rank receives for a batch, by what they are; `gathering_everything`: what the tokens would take if
    those of all photos were gathered."""

    features: int
    titles: int
    choices: int
    tokens: int
    gathering_everything: int

    @property
    def total(self) -> int:
        return self.features + self.titles + self.choices + self.tokens


def negatives_traffic(
    config, processes: int, rows: int, longest_title: int, element: int, itm_negatives: int = 1
) -> NegativesTraffic:
    """The bytes of `--negatives_from_all_ranks`.

    Args:
        config: an `AliBlipConfig`.
        processes: W.
        rows: B.
        longest_title: L, what titles are padded to.
        element: e.
        itm_negatives: n.
    """
    others = (processes - 1) * rows
    photo = tokens_per_image(config) * config.vision_config.hidden_size * element
    everything = 3 * others * photo
    gathers = processes == 1 or 1 < itm_negatives >= processes - 1
    return NegativesTraffic(
        features=others * (8 * config.image_text_hidden_size + 16),
        titles=others * 4 * (longest_title + 1),
        choices=0 if gathers else others * itm_negatives * 8,
        tokens=everything if gathers else 2 * itm_negatives * rows * photo,
        gathering_everything=everything,
    )


__all__ = ["NegativesTraffic", "negatives_traffic"]
