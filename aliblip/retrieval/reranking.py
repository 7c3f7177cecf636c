"""The second stage of an evaluation: match logits (ITM) of candidates or of all pairs, on all processes.

    work = Reranking(model, loader, images, titles, memory, dtype, batch_tokens, progress)
    resumed = work.candidates([text_to_image, image_to_text], depth=128, parts=parts)
    resumed = work.all_pairs([text_to_image, image_to_text], parts)       # into a file of its own

Pairs of both directions are grouped by photo. A unit of photos is re-ranked whole by the rank that embedded it, which
may still have its image tokens, and photos share a pass only within their unit: the results depend neither on the
number of processes nor on an earlier start.

The functions are collectives: every rank calls them, and every rank gets the results.
"""

import contextlib
import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import retrieval_aliblip as engine
from aliblip.retrieval.embedding import TokenMemory, encode_photos
from aliblip.retrieval.plan import image_kv_flops, match_flops
from aliblip.retrieval.rankings import MATRIX, Candidates, Retrieval, Side, candidate_pairs
from aliblip.runtime.distributed import is_main, together
from aliblip.runtime.mistakes import UsageError
from aliblip.runtime.parts import Parts, stage_of
from aliblip.runtime.units import gather_units, own_units, unit_bar
from encoder_aliblip import cause_of, is_finite

_MATRIX_STAGE = "all-pairs"

logger = logging.getLogger(__name__)


class Reranking:
    """The second stage of a retrieval.

    Args:
        model: the plain model (unwrapped), in evaluation mode.
        loader: the `EvalLoader` of the photos, from which those are read again whose image tokens were not kept.
        images, titles: the embedded sides.
        memory: the image tokens that are there.
        dtype: type of the autocast of the passes; None: the type of the weights.
        batch_tokens: bound on the text tokens of one pass.
        progress: show a progress bar on the main process.
    """

    def __init__(
        self,
        model,
        loader,
        images: Side,
        titles: Side,
        memory: TokenMemory,
        *,
        dtype: torch.dtype | None,
        batch_tokens: int,
        progress: bool,
    ):
        self.model, self.loader, self.images, self.titles = model, loader, images, titles
        self.memory, self.dtype, self.batch_tokens, self.progress = memory, dtype, batch_tokens, progress
        self._reranker = engine.Reranker(model, titles.input_ids, titles.attention_mask, batch_tokens, dtype)

    def candidates(self, found: list[Candidates], depth: int, parts: Parts | None) -> int:
        """Give the first `depth` candidates of one direction or both their match logits and margins, on all ranks.

        Args:
            found: photos of the titles and, in a table, titles of the photos.
            parts: where finished units are kept and found; None: nowhere.

        Returns:
            The units of this rank that an earlier start had finished.

        Raises:
            RuntimeError: a unit was lost or done twice, or the data changed during the run.
        """
        images, titles = len(self.images), len(self.titles)
        none = torch.empty(0, 1, dtype=torch.int64)
        image_ids = found[0].ids[:, :depth]
        text_ids = found[1].ids[:, :depth] if len(found) > 1 else none
        pairs = candidate_pairs(image_ids, text_ids, images, titles)
        # Parts of other candidates (another k) have other names, and so had those without the logits of no match.
        digest = hashlib.blake2b(f"{self.batch_tokens} both logits".encode(), digest_size=8)
        digest.update(pairs.image_id.numpy().tobytes() + pairs.text_id.numpy().tobytes())
        own = own_units(self.loader.num_units)
        with stage_of(parts, f"rerank-{digest.hexdigest()}") as stage:  # collective
            done = [unit for unit in own if unit in stage]
            results = [(unit, stage.load(unit)[0]["logits"].numpy()) for unit in done]
            todo = [unit for unit in own if unit not in stage]
            for unit, logits in self._units(unit_bar(todo, len(todo), "re-ranking", self.progress), pairs.texts_of):
                stage.add(unit, {"logits": logits})
                results.append((unit, logits.numpy()))
        logits = torch.from_numpy(np.concatenate(gather_units("re-ranking", results, self.loader.num_units)))
        if len(logits) != len(pairs):
            raise RuntimeError(f"re-ranking gave {len(logits)} logits for {len(pairs)} pairs")
        no_match, match = logits.unbind(1)
        margins = match - no_match
        sides = [(image_ids, torch.arange(titles)[:, None]), (torch.arange(images)[:, None], text_ids)]
        for candidates, pair in zip(found, sides, strict=False):
            place = pairs.locate(*pair)
            follow = candidates.ids.shape[1] - place.shape[1]
            candidates.itm_logits, candidates.margins = (
                F.pad(values[place], (0, follow), value=float("nan")) for values in (match, margins)
            )
        return len(done)

    def all_pairs(self, found: list[Candidates], parts: Parts) -> int:
        """Write the match logits of all pairs, (images, titles) fp32, and give the candidates theirs, without margins,
        which the file does not hold. Returns what `candidates` does.

        Every unit of photos is a block of rows of the file, which all processes write into; the parts of this stage
        say which blocks are done, and their checksums.

        Raises:
            OSError: the disk has no room for the file.
            RuntimeError: as `candidates`.
        """
        num_images, num_titles = len(self.images), len(self.titles)
        name = f"{_MATRIX_STAGE}-{self.batch_tokens}"
        together(is_main(), lambda: _make_matrix(parts, (num_images, num_titles), name), "make the file")  # collective
        matrix = np.load(parts.folder / MATRIX, mmap_mode="r+")
        every_title = torch.arange(num_titles)
        own = own_units(self.loader.num_units)
        with parts.stage(name, before_write=matrix.flush, needed=True) as stage:  # collective
            for unit in [unit for unit in own if unit in stage]:
                if stage.load(unit)[1] != zlib.crc32(self._block(matrix, unit).tobytes()):
                    logger.warning("a block of %s is damaged (its checksum is another) and is made again", MATRIX)
                    stage.discard(unit)
            todo = [unit for unit in own if unit not in stage]
            bar = unit_bar(todo, len(todo), "scoring all pairs", self.progress)
            for unit, logits in self._units(bar, lambda _: every_title):
                block = self._block(matrix, unit)
                block[:] = logits[:, 1].reshape(-1, num_titles).numpy()
                stage.add(unit, {}, zlib.crc32(block.tobytes()))
        gather_units("scoring all pairs", [(unit, None) for unit in own], self.loader.num_units)  # collective
        places = [(found[0].ids.numpy(), np.arange(num_titles)[:, None])]
        places += [(np.arange(num_images)[:, None], candidates.ids.numpy()) for candidates in found[1:]]
        for candidates, place in zip(found, places, strict=True):
            candidates.itm_logits = torch.from_numpy(matrix[place])
        return len(own) - len(todo)

    def _block(self, matrix: np.ndarray, unit: int) -> np.ndarray:
        return matrix[self.images.first[unit] : self.images.first[unit + 1]]

    def _units(self, units: Iterable[int], texts_of: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Each unit and the logits (M, 2; column 1: match) of its photos with their titles, photo by photo, on the CPU.

        An accelerator gets the next unit's work before anybody waits for the logits of the last.

        Raises:
            UsageError: logits that are not finite.
        """

        def arrived(unit: int, logits: Callable[[], Tensor]) -> tuple[int, Tensor]:
            values = logits()
            if not is_finite(values):
                self._refuse(values, unit, texts_of)
            return unit, values

        waiting = None
        for unit in units:
            logits = _on_the_way(self._unit(unit, texts_of))
            if waiting is not None:
                yield arrived(*waiting)
            waiting = unit, logits
            if self._reranker.device.type == "cpu":
                yield arrived(*waiting)
                waiting = None
        if waiting is not None:
            yield arrived(*waiting)

    def _unit(self, unit: int, texts_of: Callable[[int], Tensor]) -> Tensor:
        """Logits (M, 2) of a unit's photos with their titles, photo by photo, on the model's device."""
        images = range(self.images.first[unit], self.images.first[unit + 1])
        text_ids = [texts_of(image) for image in images]
        if not sum(map(len, text_ids)):
            return torch.empty(0, 2)
        tokens = self.memory.take(unit)
        if tokens is None:
            batch = self.loader.read_unit(unit)
            tokens = encode_photos(self.model, batch, self.dtype)[1] if len(batch["row"]) else None
        if tokens is not None:
            own = slice(images.start, images.stop)
            tokens = tokens.of_photos(self.images.rows[own], self.images.photo_id[own])
        if tokens is None:
            raise RuntimeError(f"unit {unit} gave other rows when it was read again: the data changed during the run")
        return self._reranker(tokens, text_ids)

    def _refuse(self, logits: Tensor, unit: int, texts_of: Callable[[int], Tensor]) -> None:
        """Say which pair has no order."""
        images = range(self.images.first[unit], self.images.first[unit + 1])
        text_ids = [texts_of(image) for image in images]
        image_of = torch.tensor(images).repeat_interleave(torch.tensor([len(ids) for ids in text_ids]))
        place = int((~logits.isfinite()).nonzero()[0, 0])
        photo, title = self.images.rows[image_of[place]], self.titles.rows[torch.cat(text_ids)[place]]
        raise UsageError(
            f"the match logit of the photo of row {photo} with the title of row {title} is not finite: "
            f"{cause_of(self.model)}"
        )


def _on_the_way(values: Tensor) -> Callable[[], Tensor]:
    """Start to copy values to the CPU; the function waits for them."""
    if values.device.type != "cuda":
        return values.cpu
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        arrived.synchronize()
        return copy.clone()  # pinned memory is for what is on its way

    return wait


def _make_matrix(parts: Parts, shape: tuple[int, int], stage: str) -> None:
    """The file for all match logits, all of its space taken at once; kept if it is there from an earlier start."""
    file = parts.folder / MATRIX
    parts.folder.mkdir(parents=True, exist_ok=True)
    parts.forget(_MATRIX_STAGE, keep=stage)  # their blocks will be written over
    with contextlib.suppress(OSError, ValueError):
        if np.load(file, mmap_mode="r").shape == shape:
            return
    parts.forget(_MATRIX_STAGE, keep="")  # blocks of a file that is gone
    partial = file.with_name(f".{file.name}.partial")
    np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape).flush()
    if hasattr(os, "posix_fallocate"):  # writing to a hole of a mapped file on a full disk would end the process
        with open(partial, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, partial.stat().st_size)
    partial.replace(file)


def seconds_by_depth(config, retrieval: Retrieval) -> dict[int, float]:
    """How long a run takes at each depth: the largest was measured; of the others the re-ranking is taken in proportion
    to its floating-point operations."""
    if "rerank" not in retrieval.seconds:
        return {}
    length = round(float(retrieval.titles.attention_mask.sum(dim=1).double().mean()))
    work = {depth: _rerank_flops(config, retrieval, depth, length) for depth in retrieval.depths}
    before = retrieval.seconds["embed"] + retrieval.seconds["search"]
    rerank = retrieval.seconds["rerank"] + retrieval.seconds.get("order", 0.0)
    return {depth: before + rerank * work[depth] / work[retrieval.depths[-1]] for depth in work}


def _rerank_flops(config, retrieval: Retrieval, depth: int, length: int) -> int:
    images, titles = len(retrieval.images), len(retrieval.titles)
    if depth >= images:
        used, num_pairs = images, images * titles
    else:
        ids = [direction.candidates.ids[:, :depth] for _, direction, _, _ in retrieval.directions()]
        text_ids = ids[1] if len(ids) > 1 else torch.empty(0, 1, dtype=torch.int64)
        pairs = candidate_pairs(ids[0], text_ids, images, titles)
        used, num_pairs = int((pairs.first[1:] > pairs.first[:-1]).sum()), len(pairs)
    return used * image_kv_flops(config) + num_pairs * match_flops(config, length)


__all__ = ["Reranking", "seconds_by_depth"]
