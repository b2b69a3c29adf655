"""The miniature as stages: which commands, on which folders, in which order.

Specialists learn from clean pairs of their own collections. Generalists learn from half of all teachers' groups each,
with captions as wrong as the student's: they stand for models trained on the same kind of figures.

Folders under WORK: ``pairs/all`` (curated), ``pairs/teachers``, ``pairs/NOISE`` (the student's, with wrong captions),
``teachers/NAME``, ``features/NOISE``, ``screened/NOISE``, ``aligned/KIND/NOISE``, ``stage1/NOISE-SEED``,
``students/RIVAL-NOISE-SEED`` and ``results/NOISE``. Every stage is an ordinary command with its settings in a YAML.

Ways to go on from stage 1 that are compared: the default, its rivals, and one change of the default at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmkd.command.settings import resolved
from mmkd.command.stages import Stage
from mmkd.distillation.options import RECIPES, DistillOptions

SPECIALISTS: dict[str, list[str]] = {
    "radiology": ["medpix2"],
    "neuroradiology": ["brain_mri"],
    "chest": ["covid_cxr_notes", "vqa_rad"],
    "dermatology": ["ham10000"],
    "pathology": ["lc25000_lung"],
    "microscopy": ["dsb2018", "bccd"],
    "endoscopy": ["kvasir_seg", "fundus", "oct"],
}

GENERALISTS = {"generalist-1": "1/2", "generalist-2": "2/2"}

Settings = dict[str, Any]


@dataclass(frozen=True)
class Rival:
    """One way to go on from stage 1.

    Attributes:
        distill: settings of `mmkd distill`.
        screened: on the pairs that enough teachers agree with, or on all.
        aligner: which targets it reads.
        teachers: by default all; else the pairs are screened by these alone.
        size: key of the sizes: ``full`` or ``quarter``.
    """

    distill: Settings = field(default_factory=dict)
    screened: bool = True
    aligner: str = "procrustes"
    teachers: tuple[str, ...] = ()
    size: str = "full"

    @property
    def has_heads(self) -> bool:
        """Whether it needs standardized targets."""
        return "heads" in self.distill.get("losses", {})


@dataclass(frozen=True)
class Plan:
    """Makes stages.

    Attributes:
        work: the folder for everything.
        stages: settings by stage: ``teacher``, ``stage1``, ``quarter``, ``screen``, ``align``, ``distill``, ``eval``.
    """

    work: Path
    stages: dict[str, Settings]

    def teacher(self, name: str, noise: str, number: int, pairs: Stage) -> Stage:
        """A specialist on clean pairs of its collections, a generalist on its share of all groups with such noise."""
        values = {**self._training("teacher"), "seed": 100 + number}
        if name in SPECIALISTS:
            values |= {"pairs": self._path("pairs/teachers-clean"), "sources": SPECIALISTS[name]}
            return Stage("pretrain", f"teachers/{name}", self.work / "teachers" / name, values, [pairs.key])
        values |= {"pairs": self._path(f"pairs/teachers-{noise}"), "part": GENERALISTS[name]}
        path = f"teachers/{name}-{noise}"
        return Stage("pretrain", path, self.work / path, values, [pairs.key])

    def extract(self, noise: str, teachers: dict[str, Stage], pairs: Stage) -> Stage:
        """Features of all teachers for the student's pairs."""
        values = {
            "teacher": [f"{name}={stage.output}" for name, stage in teachers.items()],
            "pairs": self._path(f"pairs/{noise}"),
            "cache_frozen_towers": self._path("towers"),
        }
        made_from = [pairs.key, *(stage.key for stage in teachers.values())]
        return Stage("extract", f"features/{noise}", self.work / "features" / noise, values, made_from)

    def screen(self, noise: str, features: Stage, teachers: tuple[str, ...] = ()) -> Stage:
        """Which of the teachers agree with which pair."""
        name = _named("screened", noise, teachers)
        values = {"pairs": self._path(f"pairs/{noise}"), "features": str(features.output), **self.stages["screen"]}
        values |= {"teachers": list(teachers)}
        return Stage("screen", name, self.work / name, values, [features.key])

    def align(self, kind: str, noise: str, screened: Stage, teachers: tuple[str, ...] = ()) -> Stage:
        """All teachers in one space."""
        name = _named(f"aligned/{kind}", noise, teachers)
        values: Settings = {"pairs": str(screened.output), "features": self._path(f"features/{noise}"), "aligner": kind}
        values |= {"teachers": list(teachers), **self.stages["align"]}
        return Stage("align", name, self.work / name, values, [screened.key])

    def stage1(self, noise: str, seed: int, size: str, pairs: Stage) -> Stage:
        """Contrastive pretraining on the student's pairs, before any teacher."""
        name = f"stage1/{noise}-{seed}" + ("" if size == "full" else f"-{size}")
        sizes = {} if size == "full" else self.stages[size]
        values = {**self._training("stage1"), **sizes, "pairs": self._path(f"pairs/{noise}"), "seed": seed}
        return Stage("pretrain", name, self.work / name, values, [pairs.key])

    def student(self, name: str, rival: Rival, noise: str, seed: int, stage1: Stage, made_from: list[Stage]) -> Stage:
        """Stage 2 by one objective."""
        path = f"students/{name}-{noise}-{seed}"
        pairs = _named("screened", noise, rival.teachers) if rival.screened else f"pairs/{noise}"
        values = {
            "pairs": self._path(pairs),
            "features": self._path(f"features/{noise}"),
            "aligned": self._path(_named(f"aligned/{rival.aligner}", noise, rival.teachers)),
            "standardizer": self._path(f"aligned/phi-s/{noise}")
            if "heads" in rival.distill.get("losses", {})
            else None,
            "model": str(stage1.output),
            **self._training("distill"),
            **resolved(DistillOptions(**rival.distill)),  # all of them, so that a new default is another stage
            "teachers": list(rival.teachers),
            "seed": seed,
        }
        return Stage("distill", path, self.work / path, values, [stage1.key, *(stage.key for stage in made_from)])

    def evaluate(self, name: str, encoders: dict[str, Stage], baselines: list[str], values: Settings) -> Stage:
        """Encoders side by side on held-out pairs; those that are no baselines make up the ensemble."""
        values = {
            "encoders": [f"{encoder}={stage.output}" for encoder, stage in encoders.items()],
            "baselines": baselines,
            "pairs": self._path("pairs/clean"),
            "within": "source",
            "cache_frozen_towers": self._path("towers"),
            **self.stages["eval"],
            **values,
        }
        path = f"results/{name}"
        return Stage("eval", path, self.work / path, values, [stage.key for stage in encoders.values()])

    def _training(self, stage: str) -> Settings:
        return {**self.stages["training"], **self.stages[stage], "cache_frozen_towers": self._path("towers")}

    def _path(self, name: str) -> str:
        return str(self.work / name)


def _named(name: str, noise: str, teachers: tuple[str, ...]) -> str:
    return f"{name}/{noise}" + (f"-{'+'.join(teachers)}" if teachers else "")


DEFAULT, TASK, PAPER = "default", "task loss alone", "paper"

ENSEMBLE, ORACLE, STAGE1 = "teachers' ensemble", "best teacher of each modality (oracle)", "stage 1"

TEACHER, UNCHANGED = "teacher: ", "screening: on"


def only(**weights: float) -> dict[str, Any]:
    """Settings of a distillation with these losses and no other."""
    return {"losses": weights}


def changed(**weights: float) -> dict[str, Any]:
    """Settings of the default with other weights of some losses."""
    return {"losses": {**RECIPES["default"]["losses"], **weights}}


RIVALS: dict[str, Rival] = {
    DEFAULT: Rival(),
    TASK: Rival(only(task=1.0), screened=False),
    PAPER: Rival({"recipe": "paper"}, aligner="autoencoder"),
    "task loss alone, screened pairs": Rival(only(task=1.0)),
    "task + aligned mean": Rival(only(task=1.0, feature=1.0)),
    "task + relational": Rival(only(task=1.0, relational=1.0)),
    "task + affinity": Rival(only(task=0.1, affinity=0.9)),
    "repaired paper": Rival({"recipe": "repaired"}),
    "task + heads": Rival(only(task=1.0, heads=1.0)),
}

QUICK = (DEFAULT, TASK, PAPER)

QUARTER: dict[str, Rival] = {
    f"{DEFAULT}, quarter": Rival(size="quarter"),
    f"{TASK}, quarter": Rival(only(task=1.0), screened=False, size="quarter"),
}

FOUR = ("radiology", "dermatology", *GENERALISTS)

ABLATIONS: dict[str, dict[str, Rival]] = {
    "teachers": {
        "1 (a generalist)": Rival(teachers=("generalist-1",)),
        "2 (the generalists)": Rival(teachers=tuple(GENERALISTS)),
        "4 (generalists, radiology, dermatology)": Rival(teachers=FOUR),
        f"all {len(SPECIALISTS) + len(GENERALISTS)}": Rival(),
    },
    "aligned mean target": {
        "one teacher at random": Rival({**only(task=1.0, feature=1.0), "target": "random"}),
        "all teachers": Rival(only(task=1.0, feature=1.0)),
        "each as far as it agrees": Rival({**only(task=1.0, feature=1.0), "target": "leave_one_out"}),
    },
    "each loss alone": {
        "task": Rival(only(task=1.0)),
        "affinity": Rival(only(affinity=1.0)),
        "feature": Rival(only(feature=1.0)),
        "interactive": Rival(only(interactive=1.0)),
        "relational": Rival(only(relational=1.0)),
        "heads": Rival(only(heads=1.0)),
    },
    "alignment of the feature target": {
        "rotation": Rival(only(task=1.0, feature=1.0)),
        "autoencoder": Rival(only(task=1.0, feature=1.0), aligner="autoencoder"),
    },
    "share of affinity, the rest task": {
        f"{share:g}": Rival(only(task=1 - share, affinity=share)) for share in (0.0, 0.5, 0.9, 1.0)
    },
    "scale of the teachers' softmax": {
        f"{scale:g}": Rival({**only(task=0.1, affinity=0.9), "teacher_scale": scale}) for scale in (20.0, 50.0, 100.0)
    },
    "scale of the relations": {f"{scale:g}": Rival({"relational_scale": scale}) for scale in (10.0, 20.0, 40.0)},
    "screening": {"on": Rival(), "off": replace(Rival(), screened=False)},
}
