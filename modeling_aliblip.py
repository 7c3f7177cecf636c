"""AliBLIP: a ViT and a BERT with cross-attention for image-text retrieval (BLIP, https://arxiv.org/abs/2201.12086).

    model = AliBlipForImageTextRetrieval.from_pretrained(folder)
    image_embeds = model.get_image_features(pixel_values).pooler_output                  # ITC: unit vectors (N, E)
    text_embeds = model.get_text_features(input_ids, attention_mask).pooler_output
    image_kv = model.project_image_kv(model.encode_image(pixel_values))                  # ITM: once per image,
    logits = model.match(input_ids, attention_mask, image_kv, image_index)               # then any number of titles

Legend: B images or titles, N images, M image-title pairs, L text tokens, P image tokens (patches and the class token),
D width of a tower, H heads, C width of a head, E width of the shared embedding.

The first token of every pass with cross-attention becomes `[ENC]` inside the model, in training and in inference alike;
the text-only pass keeps `[CLS]`. Callers never swap tokens.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, GradientCheckpointingLayer, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

try:
    from .configuration_aliblip import AliBlipConfig, AliBlipTextConfig, AliBlipVisionConfig
    from .losses_aliblip import hard_negatives, itc_loss, itm_loss, itm_pairs, listwise_loss, positives, soft_targets
except ImportError:
    if __package__:  # inside a package (the Hub cache) a failure is real
        raise
    from configuration_aliblip import AliBlipConfig, AliBlipTextConfig, AliBlipVisionConfig
    from losses_aliblip import hard_negatives, itc_loss, itm_loss, itm_pairs, listwise_loss, positives, soft_targets

# (key, value) of one cross-attention layer for N images, each (N, H, P, C); an `ImageKV` holds one pair per text layer.
ImageKV = tuple[tuple[Tensor, Tensor], ...]


class RowsByImage(NamedTuple):
    """Rows of a matrix laid out as one line of S places per image, so that an image's rows share an attention.

    `rows` (N, S): the row in each place, any row where an image has fewer than S; `places` (rows,): where in the N * S
    each row stands. All of them int64.
    """

    rows: Tensor
    places: Tensor


class PackedPairs(NamedTuple):
    """M pairs of titles with N images, the tokens of all titles one after the other, without padding: pairs of one
    length stand together.

    `sizes`: (pairs, length) of every length, in the order of the tokens; `positions` (tokens,): place of each token in
    its title; `first` (M,): the first token of each pair; `tokens_by_image` and `pairs_by_image`: where the tokens, and
    where the pairs, stand by image, None if all are of the only image.
    """

    sizes: list[tuple[int, int]]
    positions: Tensor
    first: Tensor
    tokens_by_image: RowsByImage | None
    pairs_by_image: RowsByImage | None


# The name is not free: transformers looks for it to tell whether a model can change its attention after loading.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
_ALIGNMENT = 64  # bytes, of torch's own allocations on a CPU


def _eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The plain reference of the attention interface: (B, H, L, C) in, (B, L, H, C) out."""
    weights = query @ key.transpose(-1, -2) * scaling  # (B, H, L, keys)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, with_attentions: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention by the implementation that the configuration names, or `with_attentions` by the plain one, which alone
    tells them; (B, H, L, C) -> (B, L, D) and the attentions (B, H, L, keys)."""
    name = "eager" if with_attentions else module.config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, _eager_attention)
    dropout = module.dropout if module.training else 0.0
    context, attentions = attention(
        module, query, key, value, mask, scaling=query.shape[-1] ** -0.5, dropout=dropout, is_causal=False
    )
    return context.flatten(2), attentions  # (B, L, H, C) -> (B, L, D)


def any_shape(device: torch.device) -> AbstractContextManager:
    """For attention over titles, whose numbers and lengths change from call to call: cuDNN's kernels, which torch takes
    first on some GPUs, are prepared for each shape anew, and that takes longer than the attention itself. The other
    kernels stay as they are switched; where none of them is on, cuDNN's is what was asked for."""
    if device.type != "cuda":
        return nullcontext()
    switches = (
        (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.flash_sdp_enabled()),
        (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.mem_efficient_sdp_enabled()),
        (SDPBackend.MATH, torch.backends.cuda.math_sdp_enabled()),
    )
    others = [backend for backend, is_on in switches if is_on]
    return sdpa_kernel(others) if others else nullcontext()


def split_heads(states: Tensor, heads: int) -> Tensor:
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, H, L, C)


class DropPath(nn.Module):
    """Stochastic depth (https://arxiv.org/abs/1603.09382): drops the residual branch of whole samples."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.drops = rate > 0.0

    def forward(self, branch: Tensor) -> Tensor:
        return self.dropped(branch) if self.drops and self.training else branch

    def dropped(self, branch: Tensor) -> Tensor:
        keep = 1.0 - self.rate
        kept = branch.new_empty((branch.shape[0],) + (1,) * (branch.dim() - 1)).bernoulli_(keep)
        return branch * kept / keep


class AliBlipPreTrainedModel(PreTrainedModel):
    config_class = AliBlipConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["AliBlipVisionLayer", "AliBlipTextLayer", "AliBlipVisionEmbeddings", "AliBlipTextEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated-normal initialisation as BLIP trains from scratch; also what fills a key that a checkpoint
        lacks."""
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            init.trunc_normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, AliBlipVisionEmbeddings):
            init.trunc_normal_(module.class_embedding, mean=0.0, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embedding, mean=0.0, std=self.config.initializer_range)
        elif isinstance(getattr(module, "temp", None), nn.Parameter):
            init.constant_(module.temp, self.config.temperature_init)


# --- the ViT ----------------------------------------------------------------------------------------------------------


class AliBlipVisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.grid = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1, self.grid**2 + 1, config.hidden_size))

    def interpolated_positions(self, rows: int, columns: int) -> Tensor:
        """The position embedding for a grid of rows x columns patches, bicubic, (1, rows * columns + 1, D)."""
        class_position, patches = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        patches = patches.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)  # (1, D, grid, grid)
        # In fp32: bicubic weights in half precision shift every position.
        patches = F.interpolate(patches.float(), size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([class_position, patches.to(class_position.dtype).flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        height, width = pixel_values.shape[-2:]
        rows, columns = height // self.patch_size, width // self.patch_size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"photos of {height} x {width} pixels are not divisible by the patch size {self.patch_size}"
            )
        positions = self.position_embedding
        if (rows, columns) != (self.grid, self.grid):
            if not interpolate_pos_encoding:
                expected = self.grid * self.patch_size
                raise ValueError(
                    f"photos of {height} x {width} pixels given, the model takes {expected} x {expected}: resize them, "
                    f"call resize_image() once, or pass interpolate_pos_encoding=True"
                )
            positions = self.interpolated_positions(rows, columns)
        # The engine of a mixed-precision run does not cast inputs.
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, P - 1, D)
        classes = self.class_embedding.expand(patches.shape[0], -1, -1).to(patches.dtype)
        return torch.cat([classes, patches], dim=1) + positions.to(patches.dtype)


class AliBlipVisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, with_attentions: bool) -> tuple[Tensor, Tensor | None]:
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(hidden).chunk(3, dim=-1))
        context, attentions = attend(self, query, key, value, None, with_attentions)
        return self.projection(context), attentions


class AliBlipVisionMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden)))


class AliBlipVisionLayer(GradientCheckpointingLayer):
    def __init__(self, config, drop_path_rate: float):
        super().__init__()
        self.self_attn = AliBlipVisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = AliBlipVisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, hidden: Tensor, with_attentions: bool = False) -> Tensor:
        hidden = hidden + self.drop_path(self.self_attn(self.layer_norm1(hidden), with_attentions)[0])
        return hidden + self.drop_path(self.mlp(self.layer_norm2(hidden)))


class AliBlipVisionModel(AliBlipPreTrainedModel):
    """Pre-norm ViT (https://arxiv.org/abs/2010.11929) without a pooler: pixels (B, 3, height, width) -> tokens (B, P,
    D) as `last_hidden_state`, the class token as `pooler_output`. The last of `hidden_states` is not normalised yet."""

    config_class = AliBlipVisionConfig
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {"hidden_states": AliBlipVisionLayer, "attentions": AliBlipVisionAttention}

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = AliBlipVisionEmbeddings(config)
        depth = config.num_hidden_layers
        layers = [AliBlipVisionLayer(config, config.drop_path_rate * i / max(1, depth - 1)) for i in range(depth)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        with_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        hidden = self.embeddings(pixel_values, interpolate_pos_encoding)
        for layer in self.encoder.layers:
            hidden = layer(hidden, with_attentions)
        tokens = self.post_layernorm(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens[:, 0])


# --- the BERT ---------------------------------------------------------------------------------------------------------


class AliBlipTextEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids (B, L) -> (B, L, D), or with the positions of the ids, both of one shape, one vector each."""
        # Made here and not a buffer: a non-persistent buffer is garbage after from_pretrained. Through the module and
        # not a slice of its weight: `device_map` may keep that on disk, from where accelerate fetches it for a call.
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + self.position_embeddings(positions)))


class AliBlipTextSelfAttention(nn.Module):
    """Query, key and value of one attention; keys and values read `source_size` wide states (image tokens in
    cross-attention)."""

    def __init__(self, config, source_size: int):
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_size, config.hidden_size)
        self.value = nn.Linear(source_size, config.hidden_size)

    def project(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return split_heads(self.key(source), self.heads), split_heads(self.value(source), self.heads)

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, with_attentions: bool = False):
        return attend(self, split_heads(self.query(hidden), self.heads), key, value, mask, with_attentions)

    def attend_by_title(self, queries: Tensor, hidden: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Packed titles, hidden (tokens, D), each within itself: pairs of one length are a batch without padding.
        Queries are all tokens, or the first of each pair, (M, D)."""
        tokens = [pairs * length for pairs, length in sizes]
        asking = tokens if len(queries) == len(hidden) else [pairs for pairs, _ in sizes]
        parts = (
            self.query(queries).split(asking),
            self.key(hidden).split(tokens),
            self.value(hidden).split(tokens),
        )
        contexts = []
        for (pairs, _), *of_length in zip(sizes, *parts, strict=True):
            heads = (
                part.view(pairs, -1, self.heads, part.shape[1] // self.heads).transpose(1, 2) for part in of_length
            )
            contexts.append(attend(self, *heads, None)[0].flatten(0, 1))
        return torch.cat(contexts)

    def attend_by_image(self, queries: Tensor, key: Tensor, value: Tensor, by_image: RowsByImage | None) -> Tensor:
        """Packed rows (rows, D), each to the tokens of its image, of N (N, H, P, C)."""
        if by_image is None:
            return self(queries[None], key, value, None)[0][0]
        query = self.query(queries)[by_image.rows]  # (N, S, D)
        context, _ = attend(self, split_heads(query, self.heads), key, value, None)
        return context.flatten(0, 1)[by_image.places]


class AliBlipTextResidual(nn.Module):
    """BERT's post-norm end of a block: dense, dropout, add, LayerNorm."""

    def __init__(self, config, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, branch: Tensor, hidden: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(branch)) + hidden)


class AliBlipTextAttention(nn.Module):
    def __init__(self, config, source_size: int):
        super().__init__()
        self.self = AliBlipTextSelfAttention(config, source_size)
        self.output = AliBlipTextResidual(config, config.hidden_size)

    def attend_text(self, hidden: Tensor, mask: Tensor | None, first_only: bool, with_attentions: bool) -> Tensor:
        """hidden (M, L, D) -> (M, L, D), or (M, 1, D) of the first token, which attends to all tokens as before."""
        queries = hidden[:, :1] if first_only else hidden
        return self.output(self.self(queries, *self.self.project(hidden), mask, with_attentions)[0], queries)

    def attend_images(self, hidden: Tensor, image_kv, image_index: Tensor, with_attentions: bool) -> Tensor:
        """hidden (M, L, D) of the pairs, image_kv two of (N, H, P, C), image_index (M,): the image of each pair."""
        key, value = image_kv
        if key.shape[0] == 1 and not with_attentions:
            # All titles look at the same image: one dense attention of M * L queries, no copy of keys and values.
            context = self.self(hidden.flatten(0, 1)[None], key, value, None)[0].view_as(hidden)
        else:
            context = self.self(hidden, key[image_index], value[image_index], None, with_attentions)[0]
        return self.output(context, hidden)

    def attend_packed_text(self, hidden: Tensor, packed: PackedPairs, first_only: bool) -> Tensor:
        """As `attend_text`, hidden (tokens, D) -> (tokens, D), or (M, D) of the first tokens."""
        queries = hidden[packed.first] if first_only else hidden
        return self.output(self.self.attend_by_title(queries, hidden, packed.sizes), queries)

    def attend_packed_images(self, hidden: Tensor, image_kv, packed: PackedPairs, first_only: bool) -> Tensor:
        """As `attend_images`, hidden (tokens, D), or (M, D) of the first tokens."""
        by_image = packed.pairs_by_image if first_only else packed.tokens_by_image
        return self.output(self.self.attend_by_image(hidden, *image_kv, by_image), hidden)


class AliBlipTextIntermediate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden))


class AliBlipTextLayer(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.attention = AliBlipTextAttention(config, config.hidden_size)
        self.crossattention = AliBlipTextAttention(config, config.encoder_hidden_size)
        self.intermediate = AliBlipTextIntermediate(config)
        self.output = AliBlipTextResidual(config, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        key: Tensor | None = None,  # not as a tuple, in which reentrant checkpointing would not find them
        value: Tensor | None = None,
        image_index: Tensor | None = None,
        first_only: bool = False,
        packed: PackedPairs | None = None,
        with_attentions: bool = False,
    ) -> Tensor:
        with any_shape(hidden.device):  # in the layer, so that a pass that recomputes it takes the same kernels
            if packed is not None:
                hidden = self.attention.attend_packed_text(hidden, packed, first_only)
                hidden = self.crossattention.attend_packed_images(hidden, (key, value), packed, first_only)
            else:
                hidden = self.attention.attend_text(hidden, mask, first_only, with_attentions)
                if key is not None:
                    hidden = self.crossattention.attend_images(hidden, (key, value), image_index, with_attentions)
        return self.output(self.intermediate(hidden), hidden)


class AliBlipTextModel(AliBlipPreTrainedModel):
    """Post-norm BERT (https://arxiv.org/abs/1810.04805) without token types and pooler: ids (B, L) -> tokens (B, L, D).

    With `image_kv` every layer also attends to the image tokens of its pair; without, it is a text-only encoder. The
    first token of each title is the `pooler_output`.
    """

    config_class = AliBlipTextConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _input_embed_layer = "word_embeddings"
    _can_record_outputs = {
        "hidden_states": AliBlipTextLayer,
        "attentions": OutputRecorder(AliBlipTextSelfAttention, index=1, layer_name="attention"),
        "cross_attentions": OutputRecorder(AliBlipTextSelfAttention, index=1, layer_name="crossattention"),
    }

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = AliBlipTextEmbeddings(config)
        layers = [AliBlipTextLayer(config) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.post_init()

    def mask_of(self, attention_mask: Tensor | None, hidden: Tensor, with_attentions: bool = False) -> Tensor | None:
        """(B, L) of ones and zeros in the form that the attention implementation reads."""
        if attention_mask is None or ("flash" in (self.config._attn_implementation or "") and not with_attentions):
            return attention_mask
        # Under autocast the attention runs in the autocast type, whatever the weights are.
        autocast = torch.is_autocast_enabled(hidden.device.type)
        dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
        blocked = attention_mask[:, None, None, :] == 0  # (B, 1, 1, L)
        return torch.zeros_like(blocked, dtype=dtype).masked_fill(blocked, torch.finfo(dtype).min)

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_kv: ImageKV | None = None,
        image_index: Tensor | None = None,
        first_only: bool = False,
        packed: PackedPairs | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """ids (B, L) -> tokens (B, L, D), or with `first_only` the first one alone, (B, 1, D), at less work; with
        `packed` ids (tokens,) -> (tokens, D), or (M, D)."""
        longest = self.embeddings.position_embeddings.num_embeddings
        given = input_ids.shape[1] if packed is None else max(length for _, length in packed.sizes)
        if given > longest:
            raise ValueError(f"titles of {given} tokens given, the model takes at most {longest}")
        # Only where a look at the mask costs nothing: on a GPU the host would wait for it.
        may_look = attention_mask is not None and attention_mask.device.type == "cpu"
        if may_look and not torch.compiler.is_compiling() and not attention_mask[:, 0].all():
            raise ValueError("titles are padded on the left, where the model reads their first token: pad on the right")
        if packed is not None and output_attentions:
            raise ValueError("packed titles have no attentions, since no matrix holds them: give titles with padding")
        with_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        hidden = self.embeddings(input_ids, None if packed is None else packed.positions)
        mask = None if packed is not None else self.mask_of(attention_mask, hidden, with_attentions)
        last = len(self.encoder.layer) - 1
        for i, layer in enumerate(self.encoder.layer):
            kv = (None, None) if image_kv is None else image_kv[i]
            # Tokens meet in self-attention alone: of the last layer's other outputs nothing reaches the first token's.
            hidden = layer(hidden, mask, *kv, image_index, first_only and i == last, packed, with_attentions)
        if packed is None:
            return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=hidden[:, 0])
        first = hidden if first_only else hidden[packed.first]
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=first)


# --- retrieval --------------------------------------------------------------------------------------------------------


@dataclass
class AliBlipRetrievalOutput(ModelOutput):
    """
    Args:
        loss: scalar fp32, in-batch ITC + ITM; only with `return_loss=True`.
        logits_per_image: (images, titles), cosine similarities over the temperature.
        logits_per_text: (titles, images), its transpose.
        image_embeds: (images, E), unit vectors.
        text_embeds: (titles, E), unit vectors.
        itm_logits: (B, 2) of image i with title i, column 1 = match; None unless there are as many images as titles.
        vision_model_output, text_model_output, multimodal_model_output: the passes of photos, titles and pairs (of the
            loss: the B own ones come first) with the `hidden_states`, `attentions` (B, H, L, L) and `cross_attentions`
            (B, H, L, P) of every layer that were asked for; None if none were.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    itm_logits: Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPoolingAndCrossAttentions | None = None
    multimodal_model_output: BaseModelOutputWithPoolingAndCrossAttentions | None = None

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class AliBlipForImageTextRetrieval(AliBlipPreTrainedModel):
    """The retrieval model: two towers with a shared embedding space (ITC) and a matching head on the text tower that
    looks at the image (ITM)."""

    # A temperature near 0.07 has a spacing of 0.0005 in bf16: it could not be trained or compared.
    _keep_in_fp32_modules_strict = ["temp"]
    # transformers' BLIP has none; it starts at the configuration's `temperature_init`.
    _keys_to_ignore_on_load_missing = [r"^temp$"]
    # Older BLIP checkpoints keep the numbers 0, 1, 2, ... as a buffer.
    _keys_to_ignore_on_load_unexpected = [r"^text_encoder\.embeddings\.position_ids$"]

    def __init__(self, config: AliBlipConfig):
        super().__init__(config)
        self.vision_model = AliBlipVisionModel(config.vision_config)
        self.text_encoder = AliBlipTextModel(config.text_config)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.image_text_hidden_size)
        self.text_proj = nn.Linear(config.text_config.hidden_size, config.image_text_hidden_size)
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)
        # One element and not a scalar: DeepSpeed can't broadcast a parameter without dimensions.
        self.temp = nn.Parameter(torch.empty(1, dtype=torch.float32))
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """As in transformers, from an AliBLIP or a `blip` folder or Hub name, but nothing is left to chance: raises
        ValueError naming every weight that the checkpoint lacks, has too many, has in another shape or holds values in
        that are not finite. The temperature alone may be missing (transformers' BLIP has none)."""
        # Without the flag transformers raises first, and its message doesn't say which weights.
        shapes_may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        misshaped = [] if shapes_may_differ else info["mismatched_keys"]
        wrong = {
            "missing": sorted(info["missing_keys"]),
            "unexpected": sorted(info["unexpected_keys"]),
            "of another shape": sorted(f"{name} {tuple(given)} for {tuple(own)}" for name, given, own in misshaped),
        }
        if any(wrong.values()):
            problems = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in wrong.items() if keys)
            raise ValueError(f"the weights of {pretrained_model_name_or_path} do not fit this model ({problems})")
        if broken := weights_not_finite(model):
            raise ValueError(
                f"weights of {pretrained_model_name_or_path} are not finite: {broken}; the file is damaged, or the "
                "training that wrote it had diverged"
            )
        # Loaded weights lie as the file has them, or not, by the way they were read; matrix products on a CPU depend on
        # it in the last digit. Equal processes shall give equal bits.
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
                tensor.data = tensor.data.clone()
        return (model, info) if output_loading_info else model

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights. Not that of the first parameter: that is the temperature, always fp32."""
        return self.itm_head.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_encoder.embeddings.word_embeddings = value

    def resize_image(self, image_size: int) -> None:
        """Make the model take photos of `image_size` pixels: interpolates the position embedding, in place, once.

        Raises:
            ValueError: a size that the patch size does not divide.
        """
        vision, embeddings = self.config.vision_config, self.vision_model.embeddings
        if image_size == vision.image_size:
            return
        # Constructing the configuration again checks the new size by the one rule there is.
        type(vision)(**{**vision.to_dict(), "image_size": image_size})
        grid = image_size // vision.patch_size
        with torch.no_grad():
            positions = embeddings.interpolated_positions(grid, grid)
        embeddings.position_embedding = nn.Parameter(
            positions.clone(), requires_grad=embeddings.position_embedding.requires_grad
        )
        embeddings.grid = grid
        vision.image_size = image_size

    def _asked(self, recorded: dict[str, bool | None]) -> dict[str, bool]:
        """Arguments of a tower: what the call asks for, or else this configuration; without both it is the tower's."""
        names = ("output_attentions", "output_hidden_states")
        always = {name: getattr(self.config, name) for name in names if getattr(self.config, name)}
        return always | {name: value for name, value in recorded.items() if value is not None} | {"return_dict": True}

    # ITC

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **recorded: bool | None
    ) -> BaseModelOutputWithPooling:
        """Photos (B, 3, height, width) -> `last_hidden_state` tokens (B, P, D), `pooler_output` unit features (B, E);
        with `output_hidden_states` and `output_attentions` also those of every layer."""
        output = self.vision_model(pixel_values, interpolate_pos_encoding, **self._asked(recorded))
        output.pooler_output = F.normalize(self.vision_proj(output.pooler_output).float(), dim=-1)
        return output

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **recorded: bool | None
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Titles (B, L) -> `last_hidden_state` tokens (B, L, D), `pooler_output` unit features (B, E); no image is
        seen. Also `output_hidden_states` and `output_attentions`."""
        output = self.text_encoder(input_ids, attention_mask, **self._asked(recorded))
        output.pooler_output = F.normalize(self.text_proj(output.pooler_output).float(), dim=-1)
        return output

    # ITM

    def encode_image(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Photos (N, 3, height, width) -> image tokens (N, P, D)."""
        return self.vision_model(pixel_values, interpolate_pos_encoding, return_dict=True).last_hidden_state

    def project_image_kv(self, image_tokens: Tensor) -> ImageKV:
        """Image tokens (N, P, D) -> keys and values of every cross-attention layer, each (N, H, P, C). Do it once per
        image: in a pair of one title and one image it is most of the work."""
        return tuple(layer.crossattention.self.project(image_tokens) for layer in self.text_encoder.encoder.layer)

    def match(self, input_ids: Tensor, attention_mask: Tensor | None, image_kv: ImageKV, image_index: Tensor) -> Tensor:
        """Match logits of M pairs: title m (row m of input_ids (M, L)) with image image_index[m] of the N in
        `image_kv`.

        Returns:
            (M, 2), column 1 = match. With N = 1 all titles share one dense attention over the image.
        """
        return self.itm_head(self._look(input_ids, attention_mask, image_kv, image_index).pooler_output)

    def _look(self, input_ids, attention_mask, image_kv, image_index, **recorded):
        """The pass of `match`, whose last layer works on the first token alone unless all of it is recorded."""
        input_ids = input_ids.clone()
        input_ids[:, 0] = self.config.enc_token_id
        asked = self._asked(recorded)
        first_only = not (asked.get("output_attentions") or asked.get("output_hidden_states"))
        return self.text_encoder(input_ids, attention_mask, image_kv, image_index, first_only, **asked)

    def match_packed(self, input_ids: Tensor, packed: PackedPairs, image_kv: ImageKV) -> Tensor:
        """As `match`, for any titles of any of the images in one call: nothing is padded, and no keys and values are
        copied. What a call costs the host is shared by all its pairs, and it never waits for the device.

        Args:
            input_ids: (tokens,) int64, the titles of all pairs one after the other, as `packed` describes them.
            image_kv: of the N images.

        Returns:
            (M, 2), column 1 = match.
        """
        input_ids = input_ids.index_fill(0, packed.first, self.config.enc_token_id)
        output = self.text_encoder(input_ids, image_kv=image_kv, first_only=True, packed=packed, return_dict=True)
        return self.itm_head(output.pooler_output)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        product_id: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        itm_negatives: int = 1,
        itm_listwise: float = 0.0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> AliBlipRetrievalOutput:
        """Photos and titles to similarities and, for pairs, match logits.

        Fine-tuning with `transformers.Trainer`: the collator adds `"return_loss": True` to every batch, then training
        and evaluation have a loss (of the batch of one process).

        Args:
            pixel_values: (images, 3, height, width).
            input_ids, attention_mask: (titles, L).
            product_id: (B,) int64; rows of equal id are positives of each other. None: every row has its own.
            return_loss: also the in-batch loss, ITC + ITM with hard negatives on both sides: drawn by similarity in
                training mode, the most similar ones in evaluation mode, where nothing is drawn. It has no momentum
                encoders and no queue: for full training use `train.py`.
            itm_negatives: hard negative images of each title, and titles of each image, in that loss.
            itm_listwise: weight in it of the listwise matching loss, see `losses_aliblip.listwise_loss`.
            output_attentions, output_hidden_states: also what the layers of the three passes saw and gave, by default
                as the configuration says. Attentions are computed by the plain implementation, whose results differ in
                the last digits.

        Raises:
            ValueError: `return_loss` with unequal numbers of images, titles and product ids.
        """
        recorded = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        image = self.get_image_features(pixel_values, interpolate_pos_encoding, return_dict=True, **recorded)
        text = self.get_text_features(input_ids, attention_mask, return_dict=True, **recorded)
        image_embeds, text_embeds = image.pooler_output, text.pooler_output
        device = image_embeds.device  # a `device_map` may have put projections, temperature and inputs elsewhere
        with torch.autocast(device.type, enabled=False):
            similarity = image_embeds @ text_embeds.t().to(device)  # (images, titles)
            logits_per_image = similarity / self.temp.float().to(device)
        paired = image_embeds.shape[0] == text_embeds.shape[0]
        if return_loss and not paired:
            raise ValueError(
                f"{image_embeds.shape[0]} images and {text_embeds.shape[0]} titles: the loss needs as many of both"
            )
        itm_logits = loss = pair = None
        if paired:
            own = torch.arange(image_embeds.shape[0], device=device)  # a len() would make an exported batch a constant
            image_index, text_index, pairs = own, own, None
            if return_loss:
                product_id = own if product_id is None else product_id.to(device)
                if product_id.shape != own.shape:
                    raise ValueError(
                        f"product_id has the shape {tuple(product_id.shape)}: the loss of {len(own)} pairs needs "
                        f"({len(own)},)"
                    )
                positive = positives(product_id, product_id)
                targets = soft_targets(positive)
                itc = (itc_loss(logits_per_image, targets) + itc_loss(logits_per_image.t(), targets)) / 2
                # Drawn while training; an evaluation shall give the same loss every time, and takes the hardest.
                options = {"count": itm_negatives, "hardest": not self.training}
                pairs = itm_pairs(
                    *hard_negatives(logits_per_image.t(), positive, **options),
                    *hard_negatives(logits_per_image, positive, **options),
                )
                image_index, text_index = pairs.image_index, pairs.text_index
            text_index = text_index.to(input_ids.device)
            mask = None if attention_mask is None else attention_mask[text_index]
            image_kv = self.project_image_kv(image.last_hidden_state)
            pair = self._look(input_ids[text_index], mask, image_kv, image_index, **recorded)
            pair_logits = self.itm_head(pair.pooler_output)
            itm_logits = pair_logits[: own.shape[0]]
            if return_loss:
                pair_logits = pair_logits.to(device)
                loss = itc + itm_loss(pair_logits, pairs.is_match, pairs.weight)
                if itm_listwise:
                    loss = loss + itm_listwise * listwise_loss(pair_logits[:, 1], pairs)
        return AliBlipRetrievalOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.t(),
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            itm_logits=itm_logits,
            vision_model_output=_if_recorded(image),
            text_model_output=_if_recorded(text),
            multimodal_model_output=_if_recorded(pair),
        )


def _if_recorded(output: ModelOutput | None) -> ModelOutput | None:
    return output if output is not None and (output.hidden_states or output.attentions) else None


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # By the extremes, through which NaN comes too: isfinite of everything would make a copy of it.
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def weights_not_finite(model: nn.Module, most: int = 3) -> str:
    """The names of the weights that hold NaN or infinite values, at most so many and a count of the rest; "" if none
    does. Those that lie on disk or are quantised are not looked at."""
    names = [
        name
        for name, value in model.state_dict().items()
        if type(value) is Tensor and value.is_floating_point() and not value.is_meta and not is_finite(value)
    ]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


AliBlipForImageTextRetrieval.register_for_auto_class("AutoModel")

__all__ = ["AliBlipForImageTextRetrieval", "AliBlipPreTrainedModel", "AliBlipRetrievalOutput", "weights_not_finite"]
