"""The student beside its teachers: whose features find the caption of an image.

No teacher is loaded: the answers come from the features that `mmkd extract` stored. A store holds features of captions
and not of labels, so all encoders are compared in retrieval among the same captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.nn.functional import normalize

from mmkd.data.archives import ArchivedFile
from mmkd.data.features.lookup import TeacherFeatures, seen_pairs
from mmkd.data.folder import PairFolder
from mmkd.data.splits import spread
from mmkd.data.table import Pair, in_columns

Vectors = NDArray[np.float32]
MOST_PAIRS, MOST_LISTED = 512, 1 << 16
SHOWN_CAPTIONS = 3


@dataclass(frozen=True)
class Answer:
    """What one encoder finds for the image of a pair.

    Attributes:
        encoder: the student or a teacher.
        rank: of the pair's own caption among all, 1 is the first.
        captions: the most similar ones and their cosines, the most similar first.
    """

    encoder: str
    rank: int
    captions: list[tuple[str, float]]


class Comparison:
    """Some pairs, and what the stored features of every teacher find for their images.

    Attributes:
        captions: of the pairs, each different.
        images: places of their images.
        teachers: their names.
        split: ``test`` where that has such pairs, else ``all``.
    """

    def __init__(self, folder: PairFolder, features: TeacherFeatures) -> None:
        """Choose up to `MOST_PAIRS` of the first `MOST_LISTED` pairs of which every teacher has features.

        Modalities are taken in turn, and each caption once.

        Raises:
            ValueError: the features are of other captions or images, or there are not two such pairs.
        """
        pairs, self.split = _chosen(folder, features)
        if len(pairs) < 2:
            raise ValueError(f"{folder.path} has no two pairs of different captions with features of every teacher")
        seen_pairs(features, pairs, "--features")
        self.captions = [pair.caption for pair in pairs]
        self.images: list[Path | ArchivedFile] = [folder.image_path(pair) for pair in pairs]
        self._similarities: dict[str, Vectors] = {
            name: (normalize(found["image"], dim=1) @ normalize(found["text"], dim=1).T).numpy()
            for name, found in features.lookup([pair.id for pair in pairs]).items()
        }
        self.teachers = list(self._similarities)

    def answers(self, place: int, student: str, image: Vectors, captions: Vectors) -> list[Answer]:
        """What the student and then every teacher find for one image.

        Args:
            place: of the pair.
            student: its name.
            image: (dim,) unit vector of the student.
            captions: (n, dim) unit vectors of the student.
        """
        teachers = [(name, similarities[place]) for name, similarities in self._similarities.items()]
        return [self._answer(place, name, cosines) for name, cosines in [(student, captions @ image), *teachers]]

    def _answer(self, place: int, name: str, values: Vectors) -> Answer:
        best = np.argsort(-values, kind="stable")[:SHOWN_CAPTIONS].tolist()
        rank = 1 + int((values > values[place]).sum())
        return Answer(name, rank, [(self.captions[k], float(values[k])) for k in best])


def _chosen(folder: PairFolder, features: TeacherFeatures) -> tuple[list[Pair], Literal["test", "all"]]:
    """Pairs of different captions, modalities in turn, and the split that they are of."""
    listed: list[tuple[int, str, str, str]] = []
    rows = 0
    for ids, modalities, splits in in_columns(folder.pairs, ("id", "modality", "split")):
        complete = np.all([mask for mask, _ in features.fingerprints(ids).values()], axis=0)
        listed += [(rows + k, ids[k], modalities[k], splits[k]) for k in np.flatnonzero(complete).tolist()]
        rows += len(ids)
        if len(listed) > MOST_LISTED:
            break
    tested = [own for own in listed if own[3] == "test"]
    split: Literal["test", "all"] = "test" if len(tested) > 1 else "all"
    own = tested if split == "test" else listed
    by_caption: dict[str, Pair] = {}
    for k in spread([id for _, id, _, _ in own], [modality for _, _, modality, _ in own], len(own)):
        pair = folder.pairs[own[k][0]]
        by_caption.setdefault(pair.caption, pair)
        if len(by_caption) == MOST_PAIRS:
            break
    return list(by_caption.values()), split
