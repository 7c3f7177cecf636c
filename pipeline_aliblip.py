"""The transformers pipeline of AliBLIP: titles and photos in, ranked results out.

    pipe = pipeline("image-text-retrieval", model="my_model", trust_remote_code=True)
    pipe(["mug", "lamp"], gallery=["a.jpg", "b.jpg"], direction="text-to-image")        # a list, embedded in the call
    pipe(Image.open("mug.jpg"), gallery=["striped blue mug", "red lamp"])               # image to text
    pipe("striped blue mug", gallery="my_gallery", top_k=5, where={"price": ("<", 50)})  # stored, see the package

Two stages: ITC finds the `rerank` best of the gallery, ITM looks at each of them together with the query. A result is

    {"id": ..., "score": ..., "itc": ..., "itm_logit": ..., "itm_probability": ..., and what the gallery knows of it}

such as its "path", its "text" or the columns of a stored gallery, with score = itm_logit + fusion_weight x itc, by
default with the weight that the model's configuration has; with `rerank=0` it is the ITC similarity alone, and the ITM
fields are None. The probability is as trained, or tempered by the configuration: true of re-ranked candidates.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import AutoModel, Pipeline

try:
    from .encoder_aliblip import TOKEN_TYPE, Encoder, finite
    from .gallery_aliblip import MemoryGallery
    from .reading_aliblip import UnusableItem
    from .retrieval_aliblip import embed_images, embed_texts, fuse, rerank
except ImportError:
    if __package__:  # inside a package (the Hub cache) a failure is real
        raise
    from encoder_aliblip import TOKEN_TYPE, Encoder, finite
    from gallery_aliblip import MemoryGallery
    from reading_aliblip import UnusableItem
    from retrieval_aliblip import embed_images, embed_texts, fuse, rerank

TASK = "image-text-retrieval"
DIRECTIONS = ("text-to-image", "image-to-text", "text-to-text", "image-to-image")

# Images whose keys and values are in memory together, at most: 0.7 GB with a ViT-B/16 at 384 pixels in fp32.
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

    # Opens a stored gallery by its folder, address or Hub name: set by the package that stores them.
    open_gallery: Callable[[Any], Any] | None = None

    def __init__(self, model, processor=None, **kwargs):
        if processor is None:
            raise ValueError("the pipeline needs a processor: give processor=AliBlipProcessor.from_pretrained(...)")
        model.eval()
        super().__init__(model=model, processor=processor, **kwargs)

    @cached_property
    def encoder(self) -> Encoder:
        """Model and processor as galleries take them."""
        return Encoder(self.model, self.processor)

    def __call__(self, queries: Any, **kwargs) -> Any:
        """Search.

        Args:
            queries: titles or photos (paths, addresses, PIL images, bytes), one or a list; or a `datasets` column, a
                data set (with `query_column`) or a generator, for which an iterator of results is returned. A str is a
                title if the gallery holds photos, and the path or http(s) address of a photo if it holds titles; files
                are never guessed at. `direction` says it otherwise.
            gallery: a list of photos or titles, which is embedded in this call; a `MemoryGallery`, to search it more
                than once; a stored gallery of the `aliblip` package, or its folder, address or Hub name. In a list, str
                are titles, unless `direction` says that they are paths or addresses of photos.
            direction: "text-to-image", "image-to-text", or by ITC alone "text-to-text", "image-to-image".
            top_k: results of a query, 5 by default, or as many as the gallery has.
            rerank: candidates that ITM looks at, 64 by default, and at least `top_k`; 0: ITC alone.
            fusion_weight: of the ITC similarity in the score, by default that of the model's configuration, which
                `evaluate_retrieval.py --tune_fusion` finds and stores.
            approximate: find the candidates with the stored gallery's index, or exactly; by default with the index,
                where there is one.
            where, values: which items of a stored gallery are searched among: SQL text with `:name` for values, or a
                mapping from columns to values; see `Gallery.search`.
            query_column: the column to search for, if queries are rows.
            batch_size, num_workers: as in all pipelines.

        Returns:
            A list of results, best first, of equal scores in the order of the gallery; for a list of queries, a list of
            such lists.

        Raises:
            ValueError: no gallery, another model's gallery, a query or filter that can't be used, options out of range.
        """
        if isinstance(queries, tuple):
            queries = list(queries)
        if isinstance(queries, list) and not queries:
            return []
        if not isinstance(queries, (str, bytes, bytearray, memoryview, dict, os.PathLike, list, Dataset)):
            if hasattr(queries, "__len__") and hasattr(queries, "__getitem__"):
                queries = Subset(queries, range(len(queries)))  # a column of `datasets`: as pipelines stream
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
        where: str | Mapping[str, Any] | None = None,
        values: Mapping[str, Any] | None = None,
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
            forward["gallery"] = gallery
        for name, value, least in (("top_k", top_k, 1), ("rerank", rerank, 0)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")
        if top_k is not None:
            forward["top_k"] = postprocess["top_k"] = top_k
        if rerank is not None:
            preprocess["rerank"] = forward["rerank"] = rerank
        if fusion_weight is not None:
            is_number = isinstance(fusion_weight, (int, float)) and not isinstance(fusion_weight, bool)
            if not is_number or not 0 <= fusion_weight < float("inf"):
                raise ValueError(f"fusion_weight is {fusion_weight!r}: give a number of at least 0")
            postprocess["fusion_weight"] = float(fusion_weight)
        filters = {"approximate": approximate, "where": where, "values": values}
        forward |= {name: value for name, value in filters.items() if value is not None}
        if query_column is not None:
            preprocess["query_column"] = query_column
        return preprocess, forward, postprocess

    def _open(self, gallery: Any, direction: str | None) -> Any:
        if isinstance(gallery, (str, os.PathLike)):
            if self.open_gallery is None:
                raise ValueError(
                    f"gallery is {os.fspath(gallery)!r}, and stored galleries are opened by the package aliblip: "
                    'install it (pip install "aliblip[gallery]") and import it first, or give a list'
                )
            return self.open_gallery(gallery)
        if hasattr(gallery, "check_model"):  # by what it can do: code from the Hub has its own copy of the class
            return gallery
        if not isinstance(gallery, Iterable):
            raise ValueError(f"gallery is a {type(gallery).__name__}: give a gallery, its folder, or a list of items")
        # A data set or a column of one is read by the build, undecoded: there a damaged photo is one item less.
        is_of_datasets = hasattr(gallery, "features")
        items = gallery if is_of_datasets else list(gallery)
        if direction is not None:
            kind = direction.split("-")[-1]
        elif is_of_datasets:
            kind = "text" if getattr(gallery.features, "dtype", None) == "string" else "image"
        else:
            kind = "text" if all(isinstance(item, str) for item in items) else "image"
        # Only files and addresses can be read again.
        is_kept = is_of_datasets or not all(isinstance(item, (str, os.PathLike)) for item in items)
        return MemoryGallery.build(self.encoder, items, kind=kind, store_tokens=kind == "image" and is_kept)

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
            raise ValueError(f"direction is {direction!r}, but the gallery holds {kind}s")
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
        gallery: Any = None,
        top_k: int = 5,
        rerank: int = 64,
        **filters: Any,
    ) -> dict[str, list]:
        """A batch of queries to what is `found` for each: its hits, and, re-ranked, their match logits (k, 2)."""
        tokens = None
        if "pixel_values" in model_inputs:
            vectors, tokens = embed_images(self.model, model_inputs["pixel_values"])
        else:
            vectors = embed_texts(self.model, model_inputs["input_ids"], model_inputs["attention_mask"])
        hits = gallery.search(finite(vectors, "vectors of the queries", self.model), max(top_k, rerank), **filters)
        logits = [None] * len(hits)
        if rerank and tokens is None:
            logits = self._match_photos(gallery, hits, **model_inputs)
        elif rerank:
            logits = self._match_titles(hits, tokens)
        return {"found": list(zip(hits, logits, strict=True))}

    def _match_photos(self, gallery: Any, hits: list[list[dict]], input_ids: Tensor, attention_mask: Tensor) -> list:
        """Match logits of titles (Q, L) with the photos of each one's hits. Each photo is projected once."""
        photo_of, photos = _each_once(hits)
        numbers = torch.tensor(list(chain(*photo_of)), dtype=torch.int64)
        title_of = torch.arange(len(hits)).repeat_interleave(torch.tensor([len(found) for found in hits]))
        order = numbers.argsort(stable=True)  # pairs by photo
        titles_of = title_of[order].split(numbers.bincount(minlength=len(photos)).tolist()) if photos else ()

        def tokens_of(chosen: list[int]) -> Tensor:
            return self._rounded(gallery.image_tokens([photos[number] for number in chosen], self.encoder))

        logits = torch.empty(len(order), 2)
        logits[order] = rerank(
            self.model, tokens_of, titles_of, input_ids.cpu(), attention_mask.cpu(), images_per_pass=_IMAGES_PER_PASS
        )
        return list(finite(logits, "match logits", self.model).split([len(found) for found in hits]))

    def _match_titles(self, hits: list[list[dict]], tokens: Tensor) -> list:
        """Match logits of photos, tokens (Q, P, D), with the titles of each one's hits."""
        titles_of, titles = _each_once(hits)
        if not titles:
            return [torch.empty(0, 2)] * len(hits)
        input_ids, attention_mask = self.encoder.tokenize([hit["text"] for hit in titles])
        numbers = [torch.tensor(found, dtype=torch.int64) for found in titles_of]
        logits = rerank(
            self.model, self._rounded(tokens), numbers, input_ids, attention_mask, images_per_pass=_IMAGES_PER_PASS
        )
        return list(finite(logits, "match logits", self.model).split([len(found) for found in hits]))

    def _rounded(self, tokens: Tensor) -> Tensor:
        """Image tokens as a gallery stores them, so that a pair has the same logit wherever its photo comes from."""
        return tokens.to(self.device, TOKEN_TYPE).to(self.model.dtype)

    def postprocess(
        self, model_outputs: dict[str, Any], top_k: int = 5, fusion_weight: float | None = None
    ) -> list[dict[str, Any]]:
        found = model_outputs["found"]
        hits, itm = found[0] if isinstance(found, list) else found  # the pipeline has unpacked it, if there was a batch
        scores = torch.tensor([hit["itc"] for hit in hits])
        logits = probabilities = [None] * len(hits)
        if itm is not None:
            config = self.model.config
            scores = fuse(scores, itm[:, 1], config.fusion_weight if fusion_weight is None else fusion_weight)
            tempered = config.itm_slope * itm + itm.new_tensor([0.0, config.itm_offset])
            logits, probabilities = itm[:, 1].tolist(), tempered.softmax(dim=1)[:, 1].tolist()
        scores = scores.tolist()
        best = sorted(range(len(hits)), key=lambda i: (-scores[i], hits[i]["position"]))[:top_k]
        return [
            {**hits[i], "score": scores[i], "itm_logit": logits[i], "itm_probability": probabilities[i]} for i in best
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


def _each_once(hits: list[list[dict]]) -> tuple[list[list[int]], list[dict]]:
    """The items of all queries, each once, by position; and for each query the numbers of its items among them."""
    items = {hit["position"]: hit for found in hits for hit in found}
    number = {position: place for place, position in enumerate(sorted(items))}
    return [[number[hit["position"]] for hit in found] for found in hits], [items[position] for position in number]


__all__ = ["AliBlipImageTextRetrievalPipeline"]
