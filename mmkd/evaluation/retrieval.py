"""Cross-modal retrieval, exact and with several right answers.

The pool holds every distinct caption once. Right for an image are its caption and those of identical images; right for
a caption are all its images and their identical copies. The rank of a query is that of its best right answer, counting
wrong answers only; wrong answers that tie with it count one half each, so that an encoder that says the same of
everything gains nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluation import metrics
from mmkd.evaluation.bootstrap import Metrics, frame, subframe
from mmkd.evaluation.dataset_classes import name_after
from mmkd.evaluation.embedding import Embedded, Vectors
from mmkd.evaluation.manifest import Manifest
from mmkd.evaluation.metrics import Floats, Integers
from mmkd.evaluation.ranks import search
from mmkd.evaluation.task import Outputs, Samples, Task

RECALLS = (1, 5, 10)
DATASET_RECALLS = (1, 5, 10, 50, 200)
DIRECTIONS = (("image_to_text", "image"), ("text_to_image", "caption"))
COMPACT = 1 << 16  # rows from which on vectors are kept in half precision


class Retrieval(Task):
    """Find the caption of an image and the images of a caption."""

    name, kind, headline = "retrieval", "retrieval", "mean_recall"
    title = "Which caption, which image?"

    def __init__(self, samples: Samples, recalls: Sequence[int] = RECALLS):
        """Fix pool and right answers from the held-out pairs that have a caption.

        Args:
            samples: the pairs.
            recalls: ranks that recall is taken at, beside the 1, 5 and 10 whose mean is the headline.
        """
        self.recalls = sorted({*RECALLS, *recalls})
        self.pairs = [pair for pair in samples.held_out if pair.caption.strip()]
        first = {pair.caption: pair for pair in reversed(self.pairs)}
        self.captions = sorted(first)
        contents = [samples.digests[pair.id] for pair in self.pairs]
        self.right_captions, self.right_images = positives([p.caption for p in self.pairs], contents, self.captions)
        self.holders = {"image": self.pairs, "caption": [first[caption] for caption in self.captions]}
        whole = frame([pair.modality for pair in self.pairs], [pair.group for pair in self.pairs])
        position = {pair.id: number for number, pair in enumerate(self.pairs)}
        # A caption is drawn with its image: the two directions err together, and so must their replicates.
        captioned = subframe(whole, [position[pair.id] for pair in self.holders["caption"]])
        self.frames = {"image": whole, "caption": captioned}
        to_text = random_recalls(self.right_captions, len(self.captions), self.recalls)
        to_image = random_recalls(self.right_images, len(self.pairs), self.recalls)
        chance = {f"image_to_text_recall@{k}": to_text[k] for k in self.recalls}
        chance |= {f"text_to_image_recall@{k}": to_image[k] for k in self.recalls}
        self.description = {
            "ids": [pair.id for pair in self.pairs],
            "captions": self.captions,
            "labels": {name: [pair.label for pair in own] for name, own in self.holders.items()},
            "right_captions": [own.tolist() for own in self.right_captions],
            "right_images": [own.tolist() for own in self.right_images],
            "pool": {"images": len(self.pairs), "captions": len(self.captions)},
            "chance": chance
            | {"mean_recall": float(np.mean([*map(to_text.get, RECALLS), *map(to_image.get, RECALLS)]))},
        }

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.rank``, ``caption.rank`` and the first answers with their similarities, both ways."""
        images = compact(embedded.image_matrix, self.pairs)
        captions = compact(embedded.text_matrix, self.captions)
        found: Outputs = {}
        for key, queries, pool, right in (
            ("image", images, captions, self.right_captions),
            ("caption", captions, images, self.right_images),
        ):
            ranks, top, scores = search(queries, pool, right)
            found |= {f"{key}.rank": ranks, f"{key}.top": top, f"{key}.top_scores": scores}
        return found

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Mean of the members' similarities, each divided by its standard deviation over all image-caption pairs.

        That mean is itself an inner product, of the members' vectors laid end to end.
        """
        together = Embedded("ensemble", "")
        images = [m.image_matrix(self.pairs) for m in members]
        captions = [m.text_matrix(self.captions) for m in members]
        weights = [1 / (len(members) * similarity_spread(x, t)) for x, t in zip(images, captions, strict=True)]
        joined_images = np.concatenate([w * x for w, x in zip(weights, images, strict=True)], axis=1)
        joined_captions = np.concatenate(captions, axis=1)
        ids = [pair.id for pair in self.pairs]
        together = replace(together, images=dict(zip(ids, joined_images, strict=True)))
        return self.outputs(replace(together, texts=dict(zip(self.captions, joined_captions, strict=True))))

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Recalls both ways, the mean of those at 1, 5 and 10, and both median ranks."""
        found: Metrics = {}
        for direction, key in DIRECTIONS:
            for k in self.recalls:
                found[f"{direction}_recall@{k}"] = metrics.recall_at(k, outputs[f"{key}.rank"], weights[key])
        mean = np.mean([found[f"{direction}_recall@{k}"] for direction, _ in DIRECTIONS for k in RECALLS], axis=0)
        ranks = {
            f"{direction}_median_rank": metrics.median_rank(outputs[f"{key}.rank"], weights[key])
            for direction, key in DIRECTIONS
        }
        return {"mean_recall": mean, **found, **ranks}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """Mean over 1, 5 and 10 of whether the answer stands that high."""
        ranks = {key: outputs[f"{key}.rank"] for key in self.frames}
        return {key: np.mean([rank <= k for k in RECALLS], axis=0) for key, rank in ranks.items()}


def tasks(samples: Samples) -> tuple[list[Retrieval], dict[str, str]]:
    """Retrieval if there are at least two distinct captions, else the reason why not.

    Where tasks follow a manifest there is one if that asks for retrieval, ``retrieval-ID``.
    """
    if samples.manifest is not None:
        return _dataset_tasks(samples, samples.manifest)
    if samples.captioned:
        held_out = [pair for pair in samples.held_out if pair.source in samples.captioned]
        samples = replace(samples, held_out=held_out)
    captions = {pair.caption for pair in samples.held_out if pair.caption.strip()}
    if len(captions) < 2:
        return [], {"retrieval": f"{len(captions)} distinct caption among the held-out pairs; 2 are needed"}
    return [Retrieval(samples)], {}


def _dataset_tasks(samples: Samples, manifest: Manifest) -> tuple[list[Retrieval], dict[str, str]]:
    if manifest.task != "retrieval":
        return [], {}
    name = f"retrieval-{manifest.id}"
    captions = {pair.caption for pair in samples.held_out if pair.caption.strip()}
    if len(captions) < 2:
        return [], {name: f"{len(captions)} distinct caption among the held-out pairs; 2 are needed"}
    task = Retrieval(samples, DATASET_RECALLS)
    name_after(task, manifest)
    task.title = f"Which caption, which image, in {manifest.title or manifest.id}?"
    return [task], {}


def compact(read: Callable[[Any], NDArray[Any]], keys: Sequence[Any]) -> NDArray[Any]:
    """Vectors ``(n, dim)`` of many keys in half precision, read in parts, if that changes none of them.

    Args:
        read: vectors ``(part, dim)`` of some keys.
        keys: of which vectors are wanted.
    """
    if len(keys) <= COMPACT:
        return read(keys)
    half = np.empty((len(keys), read(keys[:1]).shape[1]), dtype=np.float16)
    for start in range(0, len(keys), COMPACT):
        part, kept = read(keys[start : start + COMPACT]), half[start : start + COMPACT]
        with np.errstate(over="ignore"):
            kept[:] = part
        if not np.array_equal(kept.astype(part.dtype), part, equal_nan=True):
            return read(keys)
    return half


def positives(
    captions: Sequence[str], contents: Sequence[str], pool: Sequence[str]
) -> tuple[list[Integers], list[Integers]]:
    """Right answers both ways.

    Args:
        captions: caption of each image.
        contents: hash of each image; identical images share all their captions.
        pool: the distinct captions.

    Returns:
        For each image the indices of right captions, for each caption of the pool the indices of right images.
    """
    index = {caption: position for position, caption in enumerate(pool)}
    said: dict[str, set[int]] = defaultdict(set)
    copies: dict[str, list[int]] = defaultdict(list)
    for position, (caption, content) in enumerate(zip(captions, contents, strict=True)):
        said[content].add(index[caption])
        copies[content].append(position)
    images_of: dict[int, list[int]] = defaultdict(list)
    for content, right in said.items():
        for caption_index in right:
            images_of[caption_index] += copies[content]
    to_captions = [np.array(sorted(said[content]), dtype=np.int64) for content in contents]
    return to_captions, [np.array(sorted(images_of[k]), dtype=np.int64) for k in range(len(pool))]


def similarity_spread(images: Vectors, captions: Vectors) -> float:
    """Standard deviation of all inner products of ``(n, dim)`` with ``(m, dim)``, without forming them; 1 if zero.

    ``E[(x.t)^2] = <X'X / n, T'T / m>`` and ``E[x.t] = mean(x).mean(t)``.
    """
    x, t = images.astype(np.float64), captions.astype(np.float64)
    square = float(((x.T @ x / len(x)) * (t.T @ t / len(t))).sum())
    variance = square - float(x.mean(axis=0) @ t.mean(axis=0)) ** 2
    return float(np.sqrt(variance)) if variance > 0 else 1.0


def random_recalls(right: Sequence[Integers], pool: int, recalls: Sequence[int] = RECALLS) -> dict[int, float]:
    """Expected recall of a random order, ``1 - C(pool - positives, k) / C(pool, k)`` averaged over the queries."""
    counts, times = np.unique([len(own) for own in right], return_counts=True)
    return {
        k: float(
            np.average(
                [1 - comb(pool - int(c), min(k, pool)) / comb(pool, min(k, pool)) for c in counts], weights=times
            )
        )
        for k in recalls
    }
