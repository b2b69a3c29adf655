"""A dataset opened for evaluation: pairs, their images wherever these lie, questions, bags of slides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

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
    """

    def __init__(self, manifest: Manifest, pairs: Sequence[Pair], questions: Sequence[Question] = ()) -> None:
        """Keep what was read."""
        self.manifest = manifest
        self.pairs = pairs
        self.questions = list(questions)

    @abstractmethod
    def image(self, pair: Pair) -> Image.Image:
        """The image of a pair.

        Raises:
            UnreadableImage: it is missing, broken or refused; the reason says which.
        """

    @abstractmethod
    def digest(self, pair: Pair) -> str:
        """A hash of the stored image; equal images have equal ones. ``"missing"`` where it cannot be read."""
