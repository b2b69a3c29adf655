"""Cross-modal retrieval, exact and with several right answers.

The pool holds every distinct caption once. Right for an image are its caption and those of identical images; right for
a caption are all its images and their identical copies. The rank of a query is that of its best right answer, counting
wrong answers only; wrong answers that tie with it count one half each, so that an encoder that says the same of
everything gains nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import comb

import numpy as np

from mmkd.evaluation import metrics
from mmkd.evaluation.bootstrap import Metrics, frame
from mmkd.evaluation.embedding import Embedded, Vectors
from mmkd.evaluation.metrics import Floats, Integers
from mmkd.evaluation.task import Outputs, Samples, Task

RECALLS = (1, 5, 10)
SHOWN = 5
CHUNK_ELEMENTS = 1 << 25


class Retrieval(Task):
    """Find the caption of an image and the images of a caption."""

    name, kind, headline = "retrieval", "retrieval", "mean_recall"
    title = "Which caption, which image?"

    def __init__(self, samples: Samples):
        """Fix pool and right answers from the held-out pairs that have a caption."""
        self.pairs = [pair for pair in samples.held_out if pair.caption.strip()]
        first = {pair.caption: pair for pair in reversed(self.pairs)}
        self.captions = sorted(first)
        contents = [samples.digests[pair.id] for pair in self.pairs]
        self.right_captions, self.right_images = positives([p.caption for p in self.pairs], contents, self.captions)
        self.holders = {"image": self.pairs, "caption": [first[caption] for caption in self.captions]}
        self.frames = {
            name: frame([p.modality for p in own], [p.group for p in own]) for name, own in self.holders.items()
        }
        to_text = random_recalls(self.right_captions, len(self.captions))
        to_image = random_recalls(self.right_images, len(self.pairs))
        chance = {f"image_to_text_recall@{k}": to_text[k] for k in RECALLS}
        chance |= {f"text_to_image_recall@{k}": to_image[k] for k in RECALLS}
        self.description = {
            "ids": [pair.id for pair in self.pairs],
            "captions": self.captions,
            "labels": {name: [pair.label for pair in own] for name, own in self.holders.items()},
            "right_captions": [own.tolist() for own in self.right_captions],
            "right_images": [own.tolist() for own in self.right_images],
            "pool": {"images": len(self.pairs), "captions": len(self.captions)},
            "chance": chance | {"mean_recall": float(np.mean(list(chance.values())))},
        }

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.rank``, ``caption.rank`` and the first answers with their similarities, both ways."""
        images, captions = embedded.image_matrix(self.pairs), embedded.text_matrix(self.captions)
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
        """Recall at 1, 5 and 10 both ways, their mean, and both median ranks."""
        found: Metrics = {}
        for direction, key in (("image_to_text", "image"), ("text_to_image", "caption")):
            for k in RECALLS:
                found[f"{direction}_recall@{k}"] = metrics.recall_at(k, outputs[f"{key}.rank"], weights[key])
        mean = np.mean(list(found.values()), axis=0)
        ranks = {
            f"{direction}_median_rank": metrics.median_rank(outputs[f"{key}.rank"], weights[key])
            for direction, key in (("image_to_text", "image"), ("text_to_image", "caption"))
        }
        return {"mean_recall": mean, **found, **ranks}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """Mean over 1, 5 and 10 of whether the answer stands that high."""
        ranks = {key: outputs[f"{key}.rank"] for key in self.frames}
        return {key: np.mean([rank <= k for k in RECALLS], axis=0) for key, rank in ranks.items()}


def tasks(samples: Samples) -> tuple[list[Retrieval], dict[str, str]]:
    """Retrieval if there are at least two distinct captions, else the reason why not."""
    if samples.captioned:
        held_out = [pair for pair in samples.held_out if pair.source in samples.captioned]
        samples = replace(samples, held_out=held_out)
    captions = {pair.caption for pair in samples.held_out if pair.caption.strip()}
    if len(captions) < 2:
        return [], {"retrieval": f"{len(captions)} distinct caption among the held-out pairs; 2 are needed"}
    return [Retrieval(samples)], {}


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


def search(queries: Vectors, pool: Vectors, right: Sequence[Integers]) -> tuple[Floats, Integers, Vectors]:
    """Exact search in chunks: memory grows with the pool, not with its square.

    Args:
        queries: ``(n, dim)``.
        pool: ``(m, dim)``.
        right: indices into the pool of each query's right answers, at least one each.

    Returns:
        Rank of the best right answer ``(n,)`` from 1; indices and similarities of the first answers ``(n, <=5)``.
    """
    shown, chunk = min(SHOWN, len(pool)), max(1, CHUNK_ELEMENTS // len(pool))
    ranks, top = np.empty(len(queries)), np.empty((len(queries), shown), dtype=np.int64)
    top_scores = np.empty((len(queries), shown), dtype=np.float32)
    for start in range(0, len(queries), chunk):
        similarities = queries[start : start + chunk] @ pool.T
        for row, own in enumerate(similarities, start=start):
            best = own[right[row]].max()
            above, ties = (own > best).sum(), (own == best).sum() - (own[right[row]] == best).sum()
            ranks[row] = 1 + above + ties / 2 if not np.isnan(best) else np.nan
            first = np.argpartition(-own, shown - 1)[:shown]
            top[row] = first[np.lexsort((first, -own[first]))]
            top_scores[row] = own[top[row]]
    return ranks, top, top_scores


def similarity_spread(images: Vectors, captions: Vectors) -> float:
    """Standard deviation of all inner products of ``(n, dim)`` with ``(m, dim)``, without forming them; 1 if zero.

    ``E[(x.t)^2] = <X'X / n, T'T / m>`` and ``E[x.t] = mean(x).mean(t)``.
    """
    x, t = images.astype(np.float64), captions.astype(np.float64)
    square = float(((x.T @ x / len(x)) * (t.T @ t / len(t))).sum())
    variance = square - float(x.mean(axis=0) @ t.mean(axis=0)) ** 2
    return float(np.sqrt(variance)) if variance > 0 else 1.0


def random_recalls(right: Sequence[Integers], pool: int) -> dict[int, float]:
    """Expected recall of a random order, ``1 - C(pool - positives, k) / C(pool, k)`` averaged over the queries."""
    counts, times = np.unique([len(own) for own in right], return_counts=True)
    return {
        k: float(
            np.average(
                [1 - comb(pool - int(c), min(k, pool)) / comb(pool, min(k, pool)) for c in counts], weights=times
            )
        )
        for k in RECALLS
    }
