"""Models of the experiment: teachers, stage 1 and students, trained by the package's own loop and objectives.

Every tower is frozen: a model is its two projections over stored outputs of the towers, trained in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from mmkd.data.features.lookup import Features, TeacherFeatures
from mmkd.files import atomic_write_bytes
from mmkd.miniature.tasks import Embedded
from mmkd.miniature.world import World
from mmkd.training.batches import Batches
from mmkd.training.loop import fit, start
from mmkd.training.objectives import Objective
from mmkd.training.settings import LoopSettings
from modeling_mmkd.modeling_mmkd import MMKDClipProjection

WEIGHTS, EMBEDDINGS = "weights.safetensors", "embeddings.safetensors"
LOGIT_SCALE = float(np.log(1 / 0.07))


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model is trained.

    Attributes:
        steps: optimizer steps.
        learning_rate: peak.
        batch_size: pairs of a batch.
        seed: of weights and order.
    """

    steps: int
    learning_rate: float
    batch_size: int
    seed: int


class Projections(nn.Module):
    """A model over outputs of frozen towers: what `mmkd.student.embed.embed` needs of it."""

    def __init__(self, image_width: int, text_width: int, hidden: int, dim: int) -> None:
        """Random weights."""
        super().__init__()
        self.visual_projection = MMKDClipProjection(image_width, hidden, dim)
        self.text_projection = MMKDClipProjection(text_width, hidden, dim)
        self.logit_scale = nn.Parameter(torch.tensor([LOGIT_SCALE]))

    @torch.inference_mode()
    def embedded(self, world: World, vision: str) -> Embedded:
        """Features of the whole world."""
        images, texts = self.visual_projection(world.pooled_images(vision)), self.text_projection(world.pooled_texts)
        return Embedded(F.normalize(images, dim=1), F.normalize(texts, dim=1))


class ArrayFeatures(TeacherFeatures):
    """Teacher features in memory, one row for each of some pairs."""

    def __init__(self, ids: Sequence[str], arrays: Features) -> None:
        """Hold per teacher ``image``, ``text`` `(n, width)` and ``mask`` `(n,)`, rows as `ids`."""
        self.names = list(arrays)
        self.dims = {name: arrays[name]["image"].shape[1] for name in arrays}
        self._row = {id: row for row, id in enumerate(ids)}
        self._arrays = arrays

    @property
    def identity(self) -> dict[str, str]:
        """Widths alone: a killed run of the experiment begins anew."""
        return {name: f"{dim} wide" for name, dim in self.dims.items()}

    def lookup(self, ids: Sequence[str]) -> Features:
        """See `TeacherFeatures.lookup`."""
        rows = torch.tensor([self._row[id] for id in ids], dtype=torch.long)
        return {name: {key: value[rows] for key, value in own.items()} for name, own in self._arrays.items()}

    def seen(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """See `TeacherFeatures.seen`."""
        return np.array([id in self._row for id in ids])


def teacher_arrays(
    world: World, teachers: Mapping[str, Embedded], rows: NDArray[np.int64], captions: Sequence[str] | None
) -> Features:
    """Features of some rows with their captions; of images alone the text is zero."""
    found: Features = {}
    for name, teacher in teachers.items():
        image, mask = teacher.image[rows], torch.ones(len(rows), dtype=torch.bool)
        if captions is None:
            text = torch.zeros(len(rows), teacher.text.shape[1])
        else:
            text = teacher.text[world.text_rows(captions)]
        found[name] = {"image": image, "text": text, "mask": mask}
    return found


def train(objective: Objective, batches: Batches, schedule: Schedule, output: Path, quiet: bool = True) -> None:
    """Run the package's loop; the folder `output` appears when the weights are written, in place of an old one."""
    settings = LoopSettings(
        output=output,
        epochs=schedule.steps,
        max_steps=schedule.steps,
        learning_rate=schedule.learning_rate,
        warmup_steps=min(20, schedule.steps // 10),
        checkpoint_every=schedule.steps + 1,
        trackers=["none"],
        overwrite=True,
        seed=schedule.seed,
        quiet=quiet,
    )

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in objective.state_dict().items()}
        atomic_write_bytes(folder / WEIGHTS, save(weights))

    fit(start(settings), objective, batches, settings, write)
