"""Models of the experiment: teachers, stage 1 and students, trained by the package's own loop and objectives.

With frozen towers a model is its two projections over stored outputs of the towers, trained in seconds. A student can
also be trained with its vision tower, in minutes.

The arms of the experiment, in ``arms.yaml``, are trainings that start from stage 1, each with as many steps and tuning
trials. An arm names its losses, whose features it learns from, and which data it sees. Controls have no teacher, or
teacher features without biomedical knowledge; they measure the effect of regularization alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPVisionModelOutput

from mmkd.data.features.lookup import Features, TeacherFeatures
from mmkd.files import atomic_write_bytes
from mmkd.miniature.data import World
from mmkd.miniature.tasks import Embedded
from mmkd.student.embed import PixelStatistics, normalized_pixels
from mmkd.student.towers import build_model
from mmkd.training.batches import Batches, StoredBatches
from mmkd.training.loop import fit, start
from mmkd.training.objectives import Objective
from mmkd.training.settings import LoopSettings
from modeling_mmkd.modeling_mmkd import MMKDClipProjection, vision_width

Source = Literal["none", "all", "all and own", "own", "permuted", "random", "best", "self"]
"""Whose features: no one's; all teachers'; theirs and the student's own starting towers'; the starting towers' alone;
all teachers' of other images of the same collection; random projections of the teachers' towers; the best teacher's on
validation; or an earlier student's."""
STAGE1, TASK_ALONE, NO_TEACHER = "stage 1", "task loss alone", "own starting towers"
DEFAULT = "teachers + images"
QUICK = (TASK_ALONE, f"{NO_TEACHER} + images", "teachers", DEFAULT)
WEIGHTS, EMBEDDINGS = "weights.safetensors", "embeddings.safetensors"
LOGIT_SCALE = float(np.log(1 / 0.07))
SIDE = 96  # pixels, of the images of a student whose vision tower is trained
SMALLEST_CROP = 0.6  # side of a random crop, as a share of the image's
TOWER_RATE = 0.1  # learning rate of a trained vision tower, as a factor of the projections'
TOGETHER = 64  # images encoded at once


@dataclass(frozen=True)
class Arm:
    """One training that starts from stage 1.

    Attributes:
        losses: weights.
        source: whose features it learns from.
        options: other settings of `DistillOptions`.
        screened: whether it is trained on screened pairs alone.
        shared: whether it is also trained on the teachers' pairs, with their right captions.
        images: whether the images of the teachers' groups are added, without captions.
        aligned: kind of aligner where aligned features are read.
        trials: changes that are tried on validation, of losses by name or of ``learning_rate`` as a factor.
    """

    losses: dict[str, float]
    source: Source = "none"
    options: dict[str, Any] = field(default_factory=dict)
    screened: bool = False
    shared: bool = False
    images: bool = False
    aligned: Literal["autoencoder", "procrustes", ""] = ""
    trials: Sequence[Mapping[str, float]] = ()


ARMS_FILE = Path(__file__).with_name("arms.yaml")
ARMS = {name: Arm(**own) for name, own in yaml.safe_load(ARMS_FILE.read_text(encoding="utf-8")).items()}
CONTROLS = tuple(
    name for name, arm in ARMS.items() if arm.source in ("none", "own", "permuted", "random", "self") and not arm.shared
)


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


class WithVisionTower(Projections):
    """A student whose vision tower is trained with the projections; its text tower is frozen."""

    def __init__(self, vision: str, text_width: int, hidden: int, dim: int) -> None:
        """Random projections on the starting weights `vision`."""
        model, processor = build_model(vision, "random:tiny", dim, SIDE, vision_projection_hidden=hidden)
        super().__init__(vision_width(model.vision_model), text_width, hidden, dim)
        self.vision_model = model.vision_model
        pixels = processor.image_processor
        self.statistics = PixelStatistics(tuple(pixels.image_mean), tuple(pixels.image_std))

    def forward(self, pixel_values: Tensor) -> CLIPVisionModelOutput:
        """Features `image_embeds` `(rows, dim)`, not normalized, of normalized pixels `(rows, 3, SIDE, SIDE)`."""
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        return CLIPVisionModelOutput(image_embeds=self.visual_projection(pooled))

    @torch.inference_mode()
    def embedded(self, world: World, vision: str) -> Embedded:
        """Features of the whole world; `vision` is the tower that it started from."""
        self.eval()
        images = []
        for rows in torch.arange(len(world.pairs)).split(TOGETHER):
            pixels = resized(world.pixels(rows))
            images.append(self(normalized_pixels(pixels, self.statistics)).image_embeds)
        texts = self.text_projection(world.pooled_texts)
        return Embedded(F.normalize(torch.cat(images), dim=1), F.normalize(texts, dim=1))


class PixelBatches(StoredBatches):
    """Batches of stored captions and teacher features with randomly cropped and mirrored images."""

    def __init__(self, world: World, rows: NDArray[np.int64], statistics: PixelStatistics, *arguments: Any) -> None:
        """Images of `rows` of the world; `arguments` are those of `StoredBatches`."""
        super().__init__(*arguments)
        self.world, self.rows, self.statistics = world, torch.from_numpy(rows), statistics

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """See `StoredBatches.epoch`; crops depend on seed, epoch and the number of the batch."""
        for number, batch in enumerate(super().epoch(epoch, skip), start=skip):
            seed = np.random.SeedSequence([self.sampler.seed, epoch, number]).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(seed))
            pixels = augmented(self.world.pixels(self.rows[batch["index"]]), generator)
            yield {**batch, "pixel_values": pixels, "pixel_statistics": self.statistics}


def resized(pixels: Tensor) -> Tensor:
    """Images `(rows, 3, side, side)` uint8 at the side `SIDE`."""
    return F.interpolate(pixels.float(), (SIDE, SIDE), mode="bilinear", antialias=True).round().to(torch.uint8)


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A random square of each image `(rows, 3, side, side)` uint8 at the side `SIDE`, mirrored with probability 1/2."""
    rows = len(pixels)
    scale = SMALLEST_CROP + (1 - SMALLEST_CROP) * torch.rand(rows, generator=generator)
    shift = (2 * torch.rand(rows, 2, generator=generator) - 1) * (1 - scale[:, None])
    mirror = 1 - 2 * torch.randint(2, (rows,), generator=generator)
    transform = torch.zeros(rows, 2, 3)
    transform[:, 0, 0], transform[:, 1, 1], transform[:, :, 2] = scale * mirror, scale, shift
    grid = F.affine_grid(transform, [rows, 3, SIDE, SIDE], align_corners=False)
    return F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False).round().to(torch.uint8)


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
        """Widths alone: a killed run of the experiment starts again."""
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
    model = objective.get_submodule("model")
    settings = LoopSettings(
        output=output,
        epochs=schedule.steps,
        max_steps=schedule.steps,
        learning_rate=schedule.learning_rate,
        warmup_steps=min(20, schedule.steps // 10),
        checkpoint_every=schedule.steps + 1,
        trackers=["none"],
        learning_rate_factors={"vision_model": TOWER_RATE} if isinstance(model, WithVisionTower) else {},
        overwrite=True,
        seed=schedule.seed,
        quiet=quiet,
    )

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in objective.state_dict().items()}
        atomic_write_bytes(folder / WEIGHTS, save(weights))

    fit(start(settings), objective, batches, settings, write)
