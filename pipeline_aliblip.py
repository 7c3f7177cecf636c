"""The transformers pipeline of AliBLIP: titles and photos in, ranked results out.

    pipe = pipeline("image-text-retrieval", model="my_model", trust_remote_code=True)
    pipe("striped blue mug", gallery="my_gallery", top_k=5)                   # text to image
    pipe(Image.open("mug.jpg"), gallery=["striped blue mug", "red lamp"])     # image to text

Two stages: ITC finds the `rerank` best of the gallery, ITM looks at each of them together with the query. A result is

    {"id": ..., "score": ..., "itc": ..., "itm_logit": ..., "itm_probability": ..., and "path" or "text" if known}

with score = itm_logit + fusion_weight x itc, a weight of 1 by default; with `rerank=0` it is the ITC similarity alone,
and the ITM fields are None.
"""

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModel, Pipeline

try:
    from .encoder_aliblip import TOKEN_TYPE, Encoder
    from .gallery_aliblip import Gallery, build_in_memory
    from .reading_aliblip import UnusableItem
    from .retrieval_aliblip import embed_images, embed_texts, fuse, rerank
except ImportError:
    if __package__:  # inside a package (the Hub cache) a failure is real
        raise
    from encoder_aliblip import TOKEN_TYPE, Encoder
    from gallery_aliblip import Gallery, build_in_memory
    from reading_aliblip import UnusableItem
    from retrieval_aliblip import embed_images, embed_texts, fuse, rerank

TASK = "image-text-retrieval"
DIRECTIONS = ("text-to-image", "image-to-text", "text-to-text", "image-to-image")

# Images whose keys and values are in memory together: 0.7 GB with a ViT-B/16 at 384 pixels in fp32.
_IMAGES_PER_PASS = 16


class AliBlipImageTextRetrievalPipeline(Pipeline):
    """Search a gallery of photos by title, or of titles by photo.

    All options of a call may also be given to `pipeline(...)`, as defaults. Calls are safe from many threads.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model, processor=None, **kwargs):
        if processor is None:
            raise ValueError("the pipeline needs a processor: give processor=AliBlipProcessor.from_pretrained(...)")
        model.eval()
        super().__init__(model=model, processor=processor, **kwargs)

    @cached_property
    def encoder(self) -> Encoder:
        """Model and processor as `Gallery` takes them."""
        return Encoder(self.model, self.processor)

    def __call__(self, queries: Any, **kwargs) -> Any:
        """Search.

        Args:
            queries: titles or photos (paths, addresses, PIL images, bytes), one or a list; or a `datasets` column, a
                data set (with `query_column`) or a generator, for which an iterator of results is returned. A str is a
                title if the gallery holds photos, and the path or http(s) address of a photo if it holds titles; files
                are never guessed at. `direction` says it otherwise.
            gallery: a `Gallery`, its folder or Hub name, or a list of photos or titles, which is embedded in this call
                (build a `Gallery` to search it more than once). In a list, str are titles, unless `direction` says that
                they are paths or addresses of photos.
            direction: "text-to-image", "image-to-text", or by ITC alone "text-to-text", "image-to-image".
            top_k: results of a query, 5 by default, or as many as the gallery has.
            rerank: candidates that ITM looks at, 64 by default, and at least `top_k`; 0: ITC alone.
            fusion_weight: of the ITC similarity in the score, 1 by default; `evaluate_retrieval.py --tune_fusion` finds
                a good one.
            approximate: find the candidates with the gallery's FAISS index.
            query_column: the column to search for, if queries are rows.
            batch_size, num_workers: as in all pipelines.

        Returns:
            A list of results, best first, of equal scores in the order of the gallery; for a list of queries, a list of
            such lists.

        Raises:
            ValueError: no gallery, another model's gallery, a query that can't be read, options out of range.
        """
        if isinstance(queries, tuple):
            queries = list(queries)
        if isinstance(queries, list) and not queries:
            return []
        if not isinstance(queries, (str, bytes, bytearray, memoryview, dict, os.PathLike, list, Dataset)):
            if hasattr(queries, "__len__") and hasattr(queries, "__getitem__"):
                queries = _Queries(queries)
            elif hasattr(queries, "__iter__"):
                queries = (query for query in queries)
        gallery = kwargs.get("gallery")
        if gallery is None:
            gallery = self._forward_params.get("gallery")
        if hasattr(gallery, "snapshot"):
            kwargs["gallery"] = gallery.snapshot()  # positions mean the same from the search to the results
        return super().__call__(queries, **kwargs)

    def _sanitize_parameters(
        self,
        gallery: Any = None,
        direction: str | None = None,
        top_k: int | None = None,
        rerank: int | None = None,
        fusion_weight: float | None = None,
        approximate: bool | None = None,
        query_column: str | None = None,
    ) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = {}, {}, {}
        if direction is not None:
            if direction not in DIRECTIONS:
                raise ValueError(f"direction is {direction!r}: choose one of {', '.join(DIRECTIONS)}")
            preprocess["direction"] = direction
        if gallery is not None:
            gallery = self._open(gallery, direction)
            gallery.check_model(self.encoder.fingerprint)
            preprocess["kind"] = gallery.kind
            forward["gallery"] = postprocess["gallery"] = gallery
        for name, value, least in (("top_k", top_k, 1), ("rerank", rerank, 0)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")
        if top_k is not None:
            forward["top_k"] = postprocess["top_k"] = top_k
        if rerank is not None:
            preprocess["rerank"] = forward["rerank"] = rerank
        if fusion_weight is not None:
            if isinstance(fusion_weight, bool) or not isinstance(fusion_weight, (int, float)) or fusion_weight < 0:
                raise ValueError(f"fusion_weight is {fusion_weight!r}: give a number of at least 0")
            postprocess["fusion_weight"] = float(fusion_weight)
        if approximate is not None:
            forward["approximate"] = approximate
        if query_column is not None:
            preprocess["query_column"] = query_column
        return preprocess, forward, postprocess

    def _open(self, gallery: Any, direction: str | None) -> Gallery:
        if isinstance(gallery, (str, os.PathLike)):
            return Gallery.load(gallery)
        if hasattr(gallery, "check_model"):  # by what it can do: code from the Hub has its own copy of the class
            return gallery
        if not isinstance(gallery, Iterable):
            raise ValueError(f"gallery is a {type(gallery).__name__}: give a Gallery, a folder, or a list of items")
        # A data set or a column of one is read by the build, undecoded: there a damaged photo is one item less.
        is_of_datasets = hasattr(gallery, "features")
        items = gallery if is_of_datasets else list(gallery)
        if direction is not None:
            kind = direction.split("-")[-1]
        elif is_of_datasets:
            kind = "text" if getattr(gallery.features, "dtype", None) == "string" else "image"
        else:
            kind = "text" if all(isinstance(item, str) for item in items) else "image"
        # Only files and addresses can be read again. An item that comes twice in a list is no mistake.
        is_kept = is_of_datasets or not all(isinstance(item, (str, os.PathLike)) for item in items)
        options = {"store_tokens": kind == "image" and is_kept, "duplicates": "first", "progress": False}
        return build_in_memory(self.encoder, items, kind=kind, **options)

    def preprocess(
        self,
        query: Any,
        kind: str | None = None,
        direction: str | None = None,
        rerank: int = 64,
        query_column: str | None = None,
    ) -> dict[str, Tensor]:
        if kind is None:
            raise ValueError("there is nothing to search in: give gallery= a Gallery, its folder, or a list of items")
        if direction is not None and not direction.endswith(kind):
            raise ValueError(f"direction is {direction!r}, but the gallery holds {kind} items")
        if query_column is not None:
            query = query[query_column]
        if query is None or isinstance(query, (bool, int, float)):
            raise ValueError(f"the query is {query!r}: give a title or a photo")
        is_title = isinstance(query, str) and kind == "image"
        if direction is not None:
            is_title = direction.startswith("text")
        if rerank and is_title == (kind == "text"):
            what = "titles with titles" if is_title else "photos with photos"
            raise ValueError(f"{what} can be compared by ITC only: search with rerank=0")
        try:
            if is_title:
                input_ids, attention_mask = self.encoder.tokenize([query])
                return {"input_ids": input_ids, "attention_mask": attention_mask}
            return {"pixel_values": self.encoder.pixels(query)[None]}
        except UnusableItem as error:
            hint = ""
            if isinstance(query, str) and not is_title and direction is None:
                hint = (
                    " (a str is a path or an address here, because the gallery holds titles; if they are paths of "
                    "photos, say direction='text-to-image')"
                )
            told = f" {os.fspath(query)!r}" if isinstance(query, (str, os.PathLike)) else ""
            raise ValueError(f"the query{told} can't be used: {error}{hint}") from error

    def _forward(
        self,
        model_inputs: dict[str, Tensor],
        gallery: Gallery | None = None,
        top_k: int = 5,
        rerank: int = 64,
        approximate: bool = False,
    ) -> dict[str, Tensor]:
        """A batch of queries to `positions`, `itc` (Q, k) and, re-ranked, `itm` (Q, k, 2)."""
        tokens = None
        if "pixel_values" in model_inputs:
            vectors, tokens = embed_images(self.model, model_inputs["pixel_values"])
        else:
            vectors = embed_texts(self.model, model_inputs["input_ids"], model_inputs["attention_mask"])
        k = min(max(top_k, rerank), len(gallery))
        itc, positions = gallery.search(vectors, k, approximate)
        found = {"positions": positions, "itc": itc}
        if rerank and tokens is None:
            found["itm"] = self._match_photos(gallery, positions, **model_inputs)
        elif rerank:
            found["itm"] = self._match_titles(gallery, positions, tokens)
        return found

    def _match_photos(self, gallery: Gallery, positions: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Match logits (Q, k, 2) of titles (Q, L) with the photos at positions (Q, k). Each photo is projected once."""
        photos, photo_of, counts = positions.unique(return_inverse=True, return_counts=True)
        order = photo_of.flatten().argsort(stable=True)  # pairs by photo
        titles_of = (order // positions.shape[1]).split(counts.tolist())

        def tokens_of(numbers: list[int]) -> Tensor:
            return self._rounded(gallery.image_tokens(photos[numbers].tolist(), self.encoder))

        logits = torch.empty(len(order), 2)
        logits[order] = rerank(
            self.model, tokens_of, titles_of, input_ids.cpu(), attention_mask.cpu(), images_per_pass=_IMAGES_PER_PASS
        )
        return logits.view(*positions.shape, 2)

    def _match_titles(self, gallery: Gallery, positions: Tensor, tokens: Tensor) -> Tensor:
        """Match logits (Q, k, 2) of photos, tokens (Q, P, D), with the titles at positions (Q, k)."""
        titles, titles_of = positions.unique(return_inverse=True)
        input_ids, attention_mask = self.encoder.tokenize([gallery.item(title)["text"] for title in titles.tolist()])
        logits = rerank(self.model, self._rounded(tokens), list(titles_of), input_ids, attention_mask)
        return logits.view(*positions.shape, 2)

    def _rounded(self, tokens: Tensor) -> Tensor:
        """Image tokens as a gallery stores them, so that a pair has the same logit wherever its photo comes from."""
        return tokens.to(self.device, TOKEN_TYPE).to(self.model.dtype)

    def postprocess(
        self,
        model_outputs: dict[str, Tensor],
        gallery: Gallery | None = None,
        top_k: int = 5,
        fusion_weight: float = 1.0,
    ) -> list[dict[str, Any]]:
        positions, itc = (model_outputs[name][0] for name in ("positions", "itc"))
        logits = probabilities = [None] * len(positions)
        scores = itc
        if "itm" in model_outputs:
            itm = model_outputs["itm"][0]
            scores = fuse(itc, itm[:, 1], fusion_weight)
            logits, probabilities = itm[:, 1].tolist(), itm.softmax(dim=1)[:, 1].tolist()
        scores, positions, itc = scores.tolist(), positions.tolist(), itc.tolist()
        best = sorted(range(len(positions)), key=lambda i: (-scores[i], positions[i]))[:top_k]
        return [
            {
                **gallery.item(positions[i]),
                "score": scores[i],
                "itc": itc[i],
                "itm_logit": logits[i],
                "itm_probability": probabilities[i],
            }
            for i in best
        ]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Model, processor and code in a folder that `pipeline(model=folder, trust_remote_code=True)` opens."""
        pipelines = self.model.config.custom_pipelines
        super().save_pretrained(save_directory, **kwargs)
        self.model.config.custom_pipelines = pipelines  # of which the base class makes what it has just saved
        self.processor.save_pretrained(save_directory, **kwargs)  # which the base class leaves out


# What makes `save_pretrained` name the pipeline in the configuration, with and without `aliblip`.
AliBlipImageTextRetrievalPipeline._registered_impl = {
    TASK: {"impl": AliBlipImageTextRetrievalPipeline, "pt": (AutoModel,), "type": "multimodal"}
}


class _Queries(Dataset):
    """A sequence that is no list, such as a column of `datasets`, in the form that pipelines stream."""

    def __init__(self, queries: Sequence):
        self._queries = queries

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, position: int) -> Any:
        return self._queries[position]


__all__ = ["AliBlipImageTextRetrievalPipeline"]
