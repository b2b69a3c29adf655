"""A dataset opened for evaluation: pairs, their images wherever these lie, questions, bags of slides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mmkd.data.records import Pair
from mmkd.evaluation.manifest import Manifest
from mmkd.evaluation.questions import Question


class Collection(ABC):
    """What a manifest describes, as it lies on this machine.

    Attributes:
        manifest: its description.
        pairs: one for each image (or slide); the label is a class of the manifest, several are joined by ``|``.
        questions: about the images, for visual question answering.
        root: the folder that holds bags of features of slides; None where there are none.
        facts: pair id -> further columns of its row, for slides: ``time``, ``event`` and what else the table has.
        notes: what limits an evaluation without forbidding it, such as a class without test images.
    """

    def __init__(self, manifest: Manifest, pairs: Sequence[Pair], questions: Sequence[Question] = ()) -> None:
        """Keep what was read."""
        self.manifest = manifest
        self.pairs = pairs
        self.questions = list(questions)
        self.root: Path | None = None
        self.facts: dict[str, dict[str, str]] = {}
        self.notes: list[str] = []

    @abstractmethod
    def image(self, pair: Pair) -> Image.Image:
        """The image of a pair.

        Raises:
            UnreadableImage: it is missing, broken or refused; the reason says which.
        """

    @abstractmethod
    def digest(self, pair: Pair) -> str:
        """A hash of the stored image; equal images have equal ones. ``"missing"`` where it cannot be read."""
