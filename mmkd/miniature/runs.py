"""Runs: a teacher, a student after stage 1, a student by one arm. Each writes one folder.

A run is finished when the last file of its folder is there, which appears whole; one that was killed starts again.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from mmkd.alignment.autoencoder import AlignObjective, AutoencoderAligner
from mmkd.alignment.covariances import Covariances
from mmkd.alignment.procrustes import ProcrustesAligner
from mmkd.command.tasks import Progress, TaskSettings, resident, run_tasks
from mmkd.data.folder import PairFolder
from mmkd.data.table import Pair
from mmkd.distillation.objective import DistillObjective
from mmkd.distillation.options import DistillOptions
from mmkd.distillation.screening import Screen, ScreeningReport, draw
from mmkd.distillation.weighting import spread_scales
from mmkd.evaluation.tasks.zeroshot import standardise
from mmkd.files import atomic_write_bytes
from mmkd.miniature.data import Noise, World, WorldSettings, with_noise
from mmkd.miniature.tasks import Draw, Embedded, Question, answers, judge, scores
from mmkd.miniature.training import (
    ARMS,
    EMBEDDINGS,
    TASK_ALONE,
    WEIGHTS,
    Arm,
    ArrayFeatures,
    PixelBatches,
    Projections,
    Schedule,
    WithVisionTower,
    teacher_arrays,
    train,
)
from mmkd.training.batches import Batches, JoinedBatches, StoredBatches, batches_from
from mmkd.training.contrastive import ContrastiveObjective
from mmkd.training.settings import BatchSettings

ANSWERS = "answers.safetensors"
ENSEMBLE, ORACLE = "ensemble of the teachers", "best teacher of each question (oracle)"
COMBINATIONS = (ENSEMBLE, ORACLE)
OWN = "own starting towers"
STUDENT_VISION = "packaged:efficientnet-lite0"
TEACHER_VISIONS = ("packaged:efficientnet-lite2", "packaged:efficientnet-lite1")
DIM, HIDDEN = 128, 256
VISION_BATCH = 64  # largest batch of a student whose vision tower is trained
ALIGNING_STEPS = 300  # of the paper's autoencoder
POOL, PERCENTILE, FEWEST, MINIMUM = 1024, 80.0, 50, 1


@dataclass(frozen=True)
class Sizes:
    """Steps, rates and batches of the three kinds of training."""

    teacher: Schedule = Schedule(400, 1e-3, 128, 0)
    stage1: Schedule = Schedule(100, 1e-3, 128, 0)
    stage2: Schedule = Schedule(200, 1e-3, 128, 0)


@dataclass(frozen=True)
class Run:
    """What identifies a student.

    Attributes:
        draw: number of the assignment of groups.
        noise: share of wrong captions.
        seed: of weights and order.
        arm: name; empty for stage 1.
        trial: number of the arm's tuning trial.
        vision: whether the vision tower is trained too.
    """

    draw: int
    noise: float
    seed: int
    arm: str = ""
    trial: int = 0
    vision: bool = False

    @property
    def start(self) -> Run:
        """The stage-1 student that it starts from."""
        return replace(self, arm="", trial=0)

    @property
    def earlier(self) -> Run:
        """The student that the arms of an earlier student learn from."""
        return replace(self, arm=TASK_ALONE, trial=0)

    @property
    def folder(self) -> str:
        """Where its output lies in the work folder."""
        name = "stage1" if not self.arm else f"{'-'.join(self.arm.replace(',', '').split())}-{self.trial}"
        seed = f"seed-{self.seed}{'-vision' if self.vision else ''}"
        return f"draw-{self.draw}/noise-{round(100 * self.noise)}/{seed}/{name}"


class Runner:
    """Trains and judges the models of a world; made once in every process."""

    def __init__(self, settings: WorldSettings, work: Path, sizes: Sizes, workers: int = 1) -> None:
        """Read the world; `run_all` has this number of processes."""
        torch.set_num_threads(1)
        self.workers, self.id = workers, uuid.uuid4().hex
        self.world, self.folder, self.sizes = World(settings), work, sizes
        key = hashlib.sha256(f"{self.world.key} {sizes}".encode()).hexdigest()[:12]
        self.work = work / f"runs-{key}"  # other collections or sizes are other models
        self.draw = lru_cache(lambda number: Draw(self.world, number))
        self.teachers = lru_cache(self._teachers)

    @cached_property
    def specialists(self) -> dict[str, list[str]]:
        """Name of each teacher and the collections that it is trained on: one each, and two of all."""
        own = {name: [name] for name in self.world.seen}
        return {**own, "generalist 1": self.world.seen, "generalist 2": self.world.seen}

    def run_all(self, what: str, method: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
        """Call a method with each of the arguments, in any order, unless it has finished before.

        Raises:
            Exception: what a call raised; no further one begins.
        """
        resident(self.id, lambda: self)  # for what is run in this process
        work = partial(_call, self.id, partial(Runner, self.world.settings, self.folder, self.sizes), method.__name__)
        bar = partial(tqdm, desc=what, unit="run", smoothing=0, disable=self.world.settings.quiet)
        run_tasks(
            work, arguments, self._is_done, TaskSettings(workers=self.workers, tasks=len(arguments)), self.work, bar
        )

    def _is_done(self, arguments: tuple[Any, ...]) -> bool:
        run = arguments[0]
        is_student = isinstance(run, Run)
        file = f"{run.folder}/{ANSWERS}" if is_student else f"{_teacher_folder(*arguments)}/{EMBEDDINGS}"
        return (self.work / file).is_file()

    def teacher(self, number: int, name: str) -> None:
        """Train a teacher on the pairs of its collections; a generalist on every second group of all."""
        output = self.work / _teacher_folder(number, name)
        draw, place = self.draw(number), list(self.specialists).index(name)
        rows = draw.rows("teachers", self.specialists[name])
        if name.startswith("generalist"):
            groups = {group: k for k, group in enumerate(sorted({self.world.pairs[row].group for row in rows}))}
            rows = rows[[groups[self.world.pairs[row].group] % 2 == place % 2 for row in rows]]
        captions = [self.world.pairs[row].caption for row in rows]
        vision = TEACHER_VISIONS[place % len(TEACHER_VISIONS)]
        schedule = replace(self.sizes.teacher, seed=1000 * number + place)
        torch.manual_seed(schedule.seed)
        model = self._projections(vision)
        batches = self._batches(model, rows, captions, schedule, vision=vision)
        train(ContrastiveObjective(model), batches, schedule, output)
        self._keep(output, model.embedded(self.world, vision))

    def stage1(self, run: Run) -> None:
        """Train a student on its own pairs, of which a share has wrong captions."""
        output = self.work / run.folder
        rows, noise = self.student_pairs(run)
        schedule = replace(self.sizes.stage1, seed=run.seed)
        torch.manual_seed(run.seed)
        model = self._student(run)
        captions = [pair.caption for pair in noise.pairs]
        train(ContrastiveObjective(model), self._batches(model, rows, captions, schedule), schedule, output)
        self._answer(output, run, model.embedded(self.world, STUDENT_VISION))

    def student(self, run: Run, best_teacher: str) -> None:
        """Go on from stage 1 by an arm."""
        output = self.work / run.folder
        arm, world, draw = ARMS[run.arm], self.world, self.draw(run.draw)
        change = dict(arm.trials[run.trial])
        schedule = replace(self.sizes.stage2, seed=run.seed)
        schedule = replace(schedule, learning_rate=schedule.learning_rate * change.pop("learning_rate", 1.0))
        rows, noise = self.student_pairs(run)
        pairs = noise.pairs
        if arm.shared:
            more = draw.rows("teachers")
            rows, pairs = np.concatenate([rows, more]), pairs + [world.pairs[row] for row in more]
        sources = self._sources(arm, run, best_teacher)
        captions = [pair.caption for pair in pairs]
        arrays = teacher_arrays(world, sources, rows, captions)
        if arm.screened:
            kept = self.screened(pairs, {name: own for name, own in arrays.items() if name != OWN})
            chosen = [k for k, pair in enumerate(kept) if len(pair.teachers or ()) >= MINIMUM]
            unscreened = (OWN,) if OWN in arrays else ()
            rows = rows[chosen]
            pairs = [replace(kept[k], teachers=(*(kept[k].teachers or ()), *unscreened)) for k in chosen]
            captions = [pair.caption for pair in pairs]
            arrays = {name: {key: value[chosen] for key, value in own.items()} for name, own in arrays.items()}
        stores = {"teachers": arrays} if arrays and not arm.aligned else {}
        if arm.aligned:
            stores["aligned"] = self._aligned(arm, arrays, pairs, run.seed)
        torch.manual_seed(run.seed)
        model = self._student(run)
        weights = load_file(self.work / run.start.folder / WEIGHTS)
        model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
        options = DistillOptions(
            losses={**arm.losses, **change},
            relational_only=list(sources) if arm.source in ("permuted", "random") else [n for n in sources if n == OWN],
            **arm.options,
        )
        scales = spread_scales(arrays, options.spread_factor) if options.teacher_temperature == "spread" else {}
        objective = DistillObjective(model, options, seed=run.seed, scales=scales)
        batches: Batches = self._batches(model, rows, captions, schedule, stores, pairs)
        if arm.images:
            images = draw.rows("teachers")
            own = {"teachers": teacher_arrays(world, sources, images, None)}
            joined = self._batches(model, images, None, schedule, own)
            batches = JoinedBatches(batches, joined, len(world.pairs))
        train(objective, batches, schedule, output)
        self._answer(output, run, model.embedded(world, STUDENT_VISION))

    def student_pairs(self, run: Run) -> tuple[NDArray[np.int64], Noise]:
        """Rows of the student's pairs and the pairs with their captions, some of them wrong; the same for all arms."""
        rows = self.draw(run.draw).rows("student")
        return rows, with_noise([self.world.pairs[row] for row in rows], run.noise, run.draw)

    def screened(self, pairs: Sequence[Pair], arrays: Any) -> list[Pair]:
        """The pairs with the teachers that the shipped rule leaves available for each; labels are hidden from it."""
        hidden = [replace(pair, label="", split="train") for pair in pairs]
        features = ArrayFeatures([pair.id for pair in hidden], arrays)
        drawn, _ = draw(hidden, features, POOL, 0, FEWEST)
        screen = Screen(PairFolder(self.work, self.work, hidden), features, drawn, FEWEST, "percentile", PERCENTILE, 1)
        passed, _ = screen.availability(hidden, ScreeningReport(list(arrays)))
        return [
            replace(pair, teachers=tuple(name for name in arrays if passed[name][k])) for k, pair in enumerate(pairs)
        ]

    def prepare(self) -> None:
        """Run the frozen towers, so that every process finds their outputs."""
        for vision in (STUDENT_VISION, *TEACHER_VISIONS):
            self.world.pooled_images(vision)
        assert len(self.world.pooled_texts)

    def answers_of(self, run: Run) -> dict[str, NDArray[np.bool_]]:
        """Right answers of a finished student by question."""
        return {name: answer.numpy() for name, answer in load_file(self.work / run.folder / ANSWERS).items()}

    def validation_score(self, run: Run) -> float:
        """Mean balanced accuracy of a finished student on the validation questions."""
        return self._score(self.answers_of(run), self.draw(run.draw).validation(), "validation/")

    def best_teacher(self, number: int) -> str:
        """The teacher with the best validation score in a draw."""
        questions, found = self.draw(number).validation(), {}
        for name, teacher in self.teachers(number).items():
            right = {q.name: answers(q, self.world, teacher) for q in questions}
            found[name] = self._score(right, questions)
        return max(found, key=lambda name: found[name])

    def teacher_answers(self, number: int) -> dict[str, dict[str, NDArray[np.bool_]]]:
        """Right answers of every teacher, of their ensemble and of the best teacher of each question, by question."""
        found: dict[str, dict[str, NDArray[np.bool_]]] = defaultdict(dict)
        for question in self.draw(number).test:
            every = {name: scores(question, self.world, own) for name, own in self.teachers(number).items()}
            every[ENSEMBLE] = np.mean([standardise(own) for own in every.values()], axis=0)
            right = {name: judge(question, self.world, own) for name, own in every.items()}
            right[ORACLE] = right[max(self.specialists, key=lambda name: self._balanced(right[name], question))]
            for name, own in right.items():
                found[name][question.name] = own
        return found

    def teacher_fields(self, number: int) -> dict[str, dict[str, float]]:
        """Balanced accuracy of each teacher inside its field and outside, on the test groups of seen collections."""
        right = self.teacher_answers(number)
        questions = [q for q in self.draw(number).test if q.endpoint == "seen"]
        found = {}
        for name, field in self.specialists.items():
            inside = [q for q in questions if q.name.rpartition(" ")[0] in field]
            outside = [q for q in questions if q not in inside]
            found[name] = {"inside": self._score(right[name], inside)}
            if outside:
                found[name]["outside"] = self._score(right[name], outside)
        return found

    def screening(self, run: Run) -> dict[str, float]:
        """Share of the student's pairs that screening keeps, by what their caption is."""
        rows, noise = self.student_pairs(run)
        captions = [pair.caption for pair in noise.pairs]
        kept = self.screened(noise.pairs, teacher_arrays(self.world, self.teachers(run.draw), rows, captions))
        passed = np.array([len(pair.teachers or ()) >= MINIMUM for pair in kept])
        return {kind: float(passed[noise.kind == kind].mean()) for kind in np.unique(noise.kind).tolist()}

    def _score(self, right: Mapping[str, NDArray[np.bool_]], questions: Sequence[Question], prefix: str = "") -> float:
        return float(np.mean([self._balanced(right[prefix + q.name], q) for q in questions]))

    def _balanced(self, right: NDArray[np.bool_], question: Question) -> float:
        return float(np.mean([right[question.classes == k].mean() for k in np.unique(question.classes)]))

    def judged(self, embedded: Embedded, draw: int) -> dict[str, Tensor]:
        """Right answers of a model by question; those on validation are named ``validation/...``."""
        drawn = self.draw(draw)
        asked: dict[str, Question] = {f"validation/{q.name}": q for q in drawn.validation()}
        asked |= {question.name: question for question in drawn.test}
        return {name: torch.from_numpy(answers(q, self.world, embedded)) for name, q in asked.items()}

    def _teachers(self, number: int) -> dict[str, Embedded]:
        return {name: self._kept(_teacher_folder(number, name)) for name in self.specialists}

    def _sources(self, arm: Arm, run: Run, best_teacher: str) -> Mapping[str, Embedded]:
        """Features of the whole world that an arm learns from."""
        world = self.world
        if arm.source == "none":
            return {}
        images, texts = world.pooled_images(STUDENT_VISION), world.pooled_texts
        own = {OWN: Embedded(F.normalize(images, dim=1), F.normalize(texts, dim=1))}
        if arm.source == "own":
            return own
        if arm.source == "self":
            return {"self": self._kept(run.earlier.folder)}
        if arm.source == "random":
            generator, found = torch.Generator().manual_seed(run.draw), {}
            for k, name in enumerate(self.specialists):
                images = world.pooled_images(TEACHER_VISIONS[k % len(TEACHER_VISIONS)])
                maps = [torch.randn(part.shape[1], DIM, generator=generator) for part in (images, texts)]
                found[name] = Embedded(F.normalize(images @ maps[0], dim=1), F.normalize(texts @ maps[1], dim=1))
            return found
        teachers = self.teachers(run.draw)
        if arm.source == "best":
            return {best_teacher: teachers[best_teacher]}
        if arm.source == "permuted":
            shuffle = np.random.default_rng(run.draw).permutation
            sources = np.array([pair.source for pair in world.pairs])
            order = np.arange(len(sources))
            for name in np.unique(sources):
                order[sources == name] = shuffle(order[sources == name])
            shuffled = torch.from_numpy(shuffle(len(world.texts)))
            return {name: Embedded(own.image[order], own.text[shuffled]) for name, own in teachers.items()}
        return {**teachers, **own} if arm.source == "all and own" else teachers

    def _aligned(self, arm: Arm, arrays: Any, pairs: Sequence[Pair], seed: int) -> Any:
        """All teachers in the student's width, fitted on the training pairs."""
        widths = {name: own["image"].shape[1] for name, own in arrays.items()}
        if arm.aligned == "procrustes":
            aligner: Any = ProcrustesAligner.fit(Covariances.stream([arrays], widths, cross=True), DIM)
        else:
            torch.manual_seed(seed)
            aligner = AutoencoderAligner(widths, DIM)
            objective, optimizer = AlignObjective(aligner), torch.optim.Adam(aligner.parameters(), lr=1e-3)
            features = {"teachers": ArrayFeatures([pair.id for pair in pairs], arrays)}
            settings = BatchSettings(batch_size=self.sizes.stage2.batch_size, seed=seed)
            for batch in batches_from(StoredBatches(pairs, settings, features=features), 0, ALIGNING_STEPS):
                optimizer.zero_grad()
                objective(batch)["loss"].backward()
                optimizer.step()
            aligner.eval()
        return {
            name: {
                "image": aligner.transform(name, own["image"], "image"),
                "text": aligner.transform(name, own["text"], "text"),
                "mask": own["mask"],
            }
            for name, own in arrays.items()
        }

    def _projections(self, vision: str) -> Projections:
        images, texts = self.world.pooled_images(vision), self.world.pooled_texts
        return Projections(images.shape[1], texts.shape[1], HIDDEN, DIM)

    def _student(self, run: Run) -> Projections:
        """A student with random projections, its vision tower trained with them or frozen."""
        if run.vision:
            return WithVisionTower(STUDENT_VISION, self.world.pooled_texts.shape[1], HIDDEN, DIM)
        return self._projections(STUDENT_VISION)

    def _batches(
        self,
        model: Projections,
        rows: NDArray[np.int64],
        captions: Sequence[str] | None,
        schedule: Schedule,
        stores: Mapping[str, Any] | None = None,
        pairs: Sequence[Pair] | None = None,
        vision: str = STUDENT_VISION,
    ) -> StoredBatches:
        """Batches of rows of the world for a model; of images alone where there are no captions."""
        texts = self.world.pooled_texts
        tensors = {
            "pooled_texts": texts.new_zeros(len(rows), texts.shape[1])
            if captions is None
            else texts[self.world.text_rows(captions)],
        }
        pairs = pairs or [self.world.pairs[row] for row in rows]
        ids = [pair.id for pair in pairs]
        features = {key: ArrayFeatures(ids, arrays) for key, arrays in (stores or {}).items()}
        if isinstance(model, WithVisionTower):
            settings = BatchSettings(batch_size=min(schedule.batch_size, VISION_BATCH), seed=schedule.seed)
            return PixelBatches(self.world, rows, model.statistics, pairs, settings, tensors, features)
        tensors["pooled_images"] = self.world.pooled_images(vision)[rows]
        settings = BatchSettings(batch_size=schedule.batch_size, seed=schedule.seed)
        return StoredBatches(pairs, settings, tensors, features)

    def _answer(self, output: Path, run: Run, embedded: Embedded) -> None:
        if run == run.earlier:
            self._keep(output, embedded)
        atomic_write_bytes(output / ANSWERS, save(self.judged(embedded, run.draw)))

    def _keep(self, output: Path, embedded: Embedded) -> None:
        tensors = {"image": embedded.image.half(), "text": embedded.text.half()}
        atomic_write_bytes(output / EMBEDDINGS, save(tensors))

    def _kept(self, folder: str) -> Embedded:
        tensors = load_file(self.work / folder / EMBEDDINGS)
        return Embedded(F.normalize(tensors["image"].float(), dim=1), F.normalize(tensors["text"].float(), dim=1))


def _teacher_folder(number: int, name: str) -> str:
    return f"draw-{number}/teachers/{name.replace(' ', '-')}"


def _call(
    run: str, make: Callable[[], Runner], method: str, arguments: Sequence[tuple[Any, ...]], progress: Progress
) -> None:
    """A task of `mmkd.command.tasks`; a process reads the world for its first call."""
    os.environ.pop("LOCAL_RANK", None)  # every training is one of its own, and no part of a distributed one
    runner = resident(run, make)
    for own in arguments:
        getattr(runner, method)(*own)
        progress(1)
