"""Cross-modal retrieval, exact and with several right answers.

The pools hold every distinct caption and every distinct image once, however many captions an image has. Right for an
image are all captions of it and of its identical copies, right for a caption all its images. The rank of a query is
that of its best right answer, counting wrong answers only; wrong answers that tie with it count one half each, so that
an encoder with the same vector for everything gains nothing. The search of a pool of any size is exact, in blocks of
bounded memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import comb
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Samples
from mmkd.evaluation.datasets.source import MISSING
from mmkd.evaluation.embeddings.embed import Embedded, Vectors
from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import Metrics, resampling_units, subset_units
from mmkd.evaluation.statistics.metrics import Floats, Integers
from mmkd.evaluation.tasks.task import Outputs, Task, TaskOptions, task_name

SHOWN = 5
BLOCK_ELEMENTS = 1 << 26  # similarities held at once, 256 MB
WHOLE_ELEMENTS = 1 << 28  # similarities of all pairs that are held for both ways, 1 GB
TILE_ROWS = 1 << 15
Found = tuple[Floats, Integers, Vectors]
RECALLS, MEAN_OF = (1, 5, 10, 50, 200), (1, 5, 10)
DIRECTIONS = (("image_to_text", "image"), ("text_to_image", "caption"))
WHOLE = 1 << 16  # up to as many rows, vectors are read once, and more of them in parts


class Answers:
    """Right answers of each query, laid end to end: millions of small arrays would take more room than vectors do.

    Attributes:
        counts: how many each query has, ``(n,)``.
        values: those of the first, of the second ...
        starts: where those of each query begin, and where the last ones end, ``(n + 1,)``.
    """

    def __init__(self, counts: Integers, values: Integers) -> None:
        """Take counts and values."""
        self.counts, self.values = counts, values
        self.starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, part: slice) -> Answers:
        first, last, _ = part.indices(len(self.counts))
        return Answers(self.counts[first:last], self.values[self.starts[first] : self.starts[last]])

    def tolist(self) -> list[list[int]]:
        """A list for each query."""
        values = self.values.tolist()
        return [values[start:stop] for start, stop in pairwise(self.starts.tolist())]


def search_both(images: Any, captions: Any, right_captions: Answers, right_images: Answers) -> tuple[Found, Found]:
    """`search` of every image among the captions and of every caption among the images.

    Where the similarities of all pairs fit into a gigabyte they are computed once for both.
    """
    if len(images) * len(captions) > WHOLE_ELEMENTS:
        return search(images, captions, right_captions), search(captions, images, right_images)
    whole = torch.empty(len(images), len(captions))
    _similarities(images[:], captions, whole)
    return _ranked(whole, right_captions), _ranked(whole.T, right_images)


def search(queries: Any, pool: Any, right: Answers) -> Found:
    """Rank the best right answer of every query.

    Args:
        queries: ``(n, dim)``, any floating type; parts of them are read as they are needed, as of the pool.
        pool: ``(m, dim)``.
        right: indices into the pool of each query's right answers, at least one each.

    Returns:
        Rank of the best right answer ``(n,)`` from 1, wrong answers that tie with it counting one half, NaN where its
        similarity is; indices and similarities of the first answers ``(n, <=5)``.
    """
    parts = _parts(len(queries), len(pool))
    room = torch.empty(parts[0].stop, len(pool))
    found = []
    for part in parts:
        block = room[: part.stop - part.start]
        _similarities(queries[part], pool, block)
        found.append(_answered(block, right[part]))
    return _joined(found)


def _ranked(similarities: torch.Tensor, right: Answers) -> Found:
    """`search` where similarities ``(n, m)`` are known."""
    parts = _parts(*similarities.shape)
    return _joined([_answered(similarities[part].contiguous(), right[part]) for part in parts])


def _parts(queries: int, pool: int) -> list[slice]:
    """Parts of the queries whose similarities are held at once."""
    rows = max(1, min(queries, BLOCK_ELEMENTS // pool))
    return [slice(start, min(start + rows, queries)) for start in range(0, queries, rows)]


def _answered(block: torch.Tensor, right: Answers) -> Found:
    return _ranks(block, right), *_first(block, min(SHOWN, block.shape[1]))


def _joined(found: Sequence[Found]) -> Found:
    ranks, top, scores = (np.concatenate(column) for column in zip(*found, strict=True))
    return ranks, top, scores


def _similarities(queries: NDArray[Any], pool: Any, block: torch.Tensor) -> None:
    """Inner products of ``(rows, dim)`` with ``(m, dim)`` into ``(rows, m)``."""
    wide = _widened(queries)
    for start in range(0, len(pool), TILE_ROWS):
        tile = _widened(pool[start : start + TILE_ROWS])
        torch.mm(wide, tile.T, out=block[:, start : start + len(tile)])


def _ranks(block: torch.Tensor, right: Answers) -> Floats:
    """Ranks ``(rows,)`` from similarities ``(rows, m)``."""
    query = torch.from_numpy(np.repeat(np.arange(len(right)), right.counts))
    own = block[query, torch.from_numpy(right.values)]
    best = torch.full((len(right),), -torch.inf).scatter_reduce(0, query, own, "amax")
    level = -torch.bincount(query[own == best[query]], minlength=len(right)).numpy()
    scores, bar = block.numpy(), best[:, None].numpy()
    above = np.count_nonzero(scores > bar, axis=1)  # several times as fast as torch's sum of booleans
    level += np.count_nonzero(scores == bar, axis=1)
    return np.where(np.isnan(bar[:, 0]), np.nan, 1 + above + level / 2)


def _first(block: torch.Tensor, shown: int) -> tuple[Integers, Vectors]:
    """Indices and similarities of the highest, in order; the lower index first where two are equal."""
    scores, places = torch.topk(block, shown, dim=1)
    places, order = places.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return places.gather(1, order).numpy(), scores.numpy()


def _widened(rows: NDArray[Any]) -> torch.Tensor:
    """A copy in single precision, also of memory that is mapped read-only."""
    return torch.from_numpy(np.array(rows)).float()


class Retrieval(Task):
    """Find the caption of an image and the images of a caption."""

    kind = "retrieval"

    def __init__(self, samples: Samples) -> None:
        """Fix pool and right answers from the held-out pairs that have a caption."""
        super().__init__(samples.manifest, "Image-text retrieval")
        captioned, contents = captioned_pairs(samples)
        first: dict[str, Pair] = {}
        for pair, content in zip(captioned, contents, strict=True):
            first.setdefault(content, pair)
        self.pairs = list(first.values())
        self.captions = sorted({pair.caption for pair in captioned})
        self.right_captions, self.right_images = positives([p.caption for p in captioned], contents, self.captions)
        first_images = self.right_images.values[self.right_images.starts[:-1]].tolist()
        self.sample_pairs = {"image": self.pairs, "caption": [self.pairs[k] for k in first_images]}
        whole = resampling_units([pair.modality for pair in self.pairs], [pair.group for pair in self.pairs])
        # A caption is drawn with its image: the two directions err together, and so must their replicates.
        self.units = {"image": whole, "caption": subset_units(whole, first_images)}
        to_text = random_recalls(self.right_captions, len(self.captions))
        to_image = random_recalls(self.right_images, len(self.pairs))
        chance = {f"image_to_text_recall@{k}": to_text[k] for k in RECALLS}
        chance |= {f"text_to_image_recall@{k}": to_image[k] for k in RECALLS}
        chance["mean_recall"] = float(np.mean([*map(to_text.get, MEAN_OF), *map(to_image.get, MEAN_OF)]))
        self.describe(
            {
                "ids": [pair.id for pair in self.pairs],
                "captions": self.captions,
                "labels": {name: [pair.label for pair in own] for name, own in self.sample_pairs.items()},
                "right_captions": self.right_captions.tolist(),
                "right_images": self.right_images.tolist(),
                "pool": {"images": len(self.pairs), "captions": len(self.captions)},
                "chance": chance,
            }
        )

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.rank``, ``caption.rank`` and the first answers with their similarities, both ways."""
        return self._found(embedded.image_rows(self.pairs), embedded.text_rows(self.captions))

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Mean of the members' similarities, each divided by its standard deviation over all image-caption pairs.

        That mean is itself an inner product, of the members' vectors laid end to end.
        """
        images = [member.image_rows(self.pairs) for member in members]
        captions = [member.text_rows(self.captions) for member in members]
        weights = [1 / (len(members) * similarity_spread(x, t)) for x, t in zip(images, captions, strict=True)]
        return self._found(EndToEnd(images, weights), EndToEnd(captions, [1.0] * len(members)))

    def _found(self, images: Any, captions: Any) -> Outputs:
        images, captions = (rows[:] if len(rows) <= WHOLE else rows for rows in (images, captions))
        both = search_both(images, captions, self.right_captions, self.right_images)
        found: Outputs = {}
        for key, (ranks, top, scores) in zip(("image", "caption"), both, strict=True):
            found |= {f"{key}.rank": ranks, f"{key}.top": top, f"{key}.top_scores": scores}
        return found

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Recalls both ways, the mean of those at 1, 5 and 10, and both median ranks."""
        ranks = {
            f"{direction}_median_rank": metrics.median_rank(outputs[f"{key}.rank"], weights[key])
            for direction, key in DIRECTIONS
        }
        return {**self._recalls(outputs, weights, RECALLS), **ranks}

    def primary_metric_values(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """The mean recall alone, without the sorting that medians need."""
        return {self.primary_metric: self._recalls(outputs, weights, MEAN_OF)[self.primary_metric]}

    def _recalls(self, outputs: Outputs, weights: dict[str, Floats], recalls: Sequence[int]) -> Metrics:
        found = {
            f"{direction}_recall@{k}": metrics.recall_at(k, outputs[f"{key}.rank"], weights[key])
            for direction, key in DIRECTIONS
            for k in recalls
        }
        mean = np.mean([found[f"{direction}_recall@{k}"] for direction, _ in DIRECTIONS for k in MEAN_OF], axis=0)
        return {"mean_recall": mean, **found}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """Mean over 1, 5 and 10 of whether a correct answer is among the first."""
        ranks = {key: outputs[f"{key}.rank"] for key in self.units}
        return {key: np.mean([rank <= k for k in MEAN_OF], axis=0) for key, rank in ranks.items()}


def tasks(samples: Samples, options: TaskOptions) -> tuple[list[Retrieval], dict[str, str]]:
    """Retrieval if there are at least two distinct captions and images, else the reason why not."""
    captioned, contents = captioned_pairs(samples)
    found = {"caption": {pair.caption for pair in captioned}, "image with a caption": set(contents)}
    for what, own in found.items():
        if len(own) < 2:
            reason = f"{len(own)} distinct {what} among the held-out pairs; 2 are needed"
            return [], {task_name("retrieval", samples.manifest): reason}
    return [Retrieval(samples)], {}


def captioned_pairs(samples: Samples) -> tuple[list[Pair], list[str]]:
    """Held-out pairs with a caption, and what identifies their images: the hash, or the id where there is none."""
    captioned = [pair for pair in samples.held_out if pair.caption.strip()]
    digests = [samples.digests[pair.id] for pair in captioned]
    return captioned, [pair.id if own == MISSING else own for pair, own in zip(captioned, digests, strict=True)]


class EndToEnd:
    """Vectors of several encoders laid end to end, each times its weight, read in parts."""

    def __init__(self, parts: Sequence[Any], weights: Sequence[float]) -> None:
        """Take rows ``(n, dim)`` of each encoder, and as many weights."""
        self._parts, self._weights = parts, weights

    def __len__(self) -> int:
        return len(self._parts[0])

    def __getitem__(self, part: slice) -> Vectors:
        return np.concatenate([w * rows[part] for w, rows in zip(self._weights, self._parts, strict=True)], axis=1)


def positives(captions: Sequence[str], contents: Sequence[str], pool: Sequence[str]) -> tuple[Answers, Answers]:
    """Right answers both ways.

    Args:
        captions: caption of each pair.
        contents: hash of each one's image; identical images are one, which has all their captions.
        pool: the distinct captions.

    Returns:
        For each distinct image, in the order of first appearance, the indices of right captions; for each caption of
        the pool the indices of right images.
    """
    index = {caption: position for position, caption in enumerate(pool)}
    caption = np.fromiter(map(index.__getitem__, captions), np.int64, len(captions))
    known = {content: k for k, content in enumerate(dict.fromkeys(contents))}
    content = np.fromiter(map(known.__getitem__, contents), np.int64, len(contents))
    image, answer = np.divmod(np.unique(content * len(pool) + caption), len(pool))
    order = np.lexsort((image, answer))
    of_images = Answers(np.bincount(image, minlength=len(known)), answer)
    return of_images, Answers(np.bincount(answer, minlength=len(pool)), image[order])


def similarity_spread(images: Any, captions: Any) -> float:
    """Standard deviation of all inner products of ``(n, dim)`` with ``(m, dim)``, without forming them; 1 if zero.

    ``E[(x.t)^2] = <X'X / n, T'T / m>`` and ``E[x.t] = mean(x).mean(t)``.
    """
    (x_square, x_mean), (t_square, t_mean) = _moments(images), _moments(captions)
    square = float((x_square * t_square).sum())
    variance = square - float(x_mean @ t_mean) ** 2
    return float(np.sqrt(variance)) if variance > 0 else 1.0


def _moments(rows: Any) -> tuple[Floats, Floats]:
    """Mean outer product ``(dim, dim)`` and mean ``(dim,)`` of ``(n, dim)``, read in parts."""
    parts = (rows[start : start + WHOLE].astype(np.float64) for start in range(0, len(rows), WHOLE))
    sums = [(part.T @ part, part.sum(axis=0)) for part in parts]
    return sum(square for square, _ in sums) / len(rows), sum(total for _, total in sums) / len(rows)


def random_recalls(right: Answers, pool: int) -> dict[int, float]:
    """Expected recall of a random order, ``1 - C(pool - positives, k) / C(pool, k)`` averaged over the queries."""
    counts, times = np.unique(right.counts, return_counts=True)
    return {
        k: float(
            np.average(
                [1 - comb(pool - int(c), min(k, pool)) / comb(pool, min(k, pool)) for c in counts], weights=times
            )
        )
        for k in RECALLS
    }
