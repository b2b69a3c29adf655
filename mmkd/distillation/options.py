"""What stage 2 may be told about its losses: weights, temperatures, which teachers count and how much.

One dataclass serves the objective and, inherited, the settings of `mmkd distill`, so that a YAML file composes losses
by name and no option is written down twice. A recipe fills in what is not given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmkd.command.settings import check_limits, nearest, setting
from mmkd.training.settings import TaskLossSettings

DISTILL_LOSSES = ("task", "affinity", "feature", "interactive", "relational", "heads")
RAW_LOSSES = ("affinity", "relational", "heads")
ALIGNED_LOSSES = ("feature", "interactive")
LOSSES_OF_IMAGES = ("feature", "relational", "heads")  # these learn from images without captions, too

RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "losses": {"task": 0.5, "affinity": 0.5, "relational": 3.0},  # chosen on validation groups, docs/log.md
        "target": "mean",
        "target_norm": "unit",
        "feature_form": "cosine",
        "interactive_scale": "learnable",
    },
    "repaired": {  # the paper's losses, mended
        "losses": {"task": 1.0, "feature": 2000.0, "interactive": 1.0},
        "target": "mean",
        "target_norm": "unit",
        "feature_form": "squared",
        "interactive_scale": "learnable",
    },
    "paper": {
        "losses": {"task": 1.0, "feature": 50.0, "interactive": 1.0},
        "target": "random",  # one available teacher, drawn anew each epoch
        "target_norm": "stored",
        "feature_form": "squared",
        "interactive_scale": "constant",  # ln(1/0.07), not exponentiated and not learned
    },
}


@dataclass(kw_only=True)
class DistillOptions(TaskLossSettings):
    """The losses of stage 2 and what they read."""

    GROUP: ClassVar[str] = "losses"

    recipe: Literal["default", "repaired", "paper"] = setting(
        "default", "sets losses, target, target_norm, feature_form and interactive_scale where they are not given"
    )
    losses: dict[str, float] = setting(
        factory=dict,
        help=f"weights of {', '.join(DISTILL_LOSSES)}; a mapping replaces the recipe's, --losses.NAME changes one",
        preset=lambda given: dict(RECIPES[given.get("recipe", "default")]["losses"]),
    )
    target: Literal["mean", "random", "leave_one_out"] | None = setting(
        None, "mean of the available teachers, one of them sampled each epoch, or a mean weighted by agreement"
    )
    target_norm: Literal["unit", "stored"] | None = setting(None, "aligned features of unit norm, or as stored")
    feature_form: Literal["cosine", "squared"] | None = setting(None, "1 - cos, or mean squared difference")
    interactive_scale: Literal["learnable", "constant"] | None = setting(
        None, "scale of the interactive loss: exp of a learned parameter, or ln(1/0.07)"
    )
    affinity_scale: Literal["shared", "own"] = setting(
        "shared", "the student's scale in the affinity loss: the task's logit_scale, or one learned for it"
    )
    teacher_temperature: Literal["fixed", "spread"] = setting(
        "fixed",
        "inverse temperatures of the teachers as given by --teacher_scale and --relational_scale, or of each teacher "
        "and loss --spread_factor over the standard deviation of its cosines",
    )
    spread_factor: float = setting(
        3.5, "inverse temperature times the standard deviation of a teacher's cosines", above=0
    )
    teacher_scale: float = setting(50.0, "inverse temperature of the teachers' image-text softmax", above=0)
    teacher_scales: dict[str, float] = setting(factory=dict, help="--teacher_scale of single teachers, by name")
    relational_scale: float = setting(
        20.0, "inverse temperature of the relational loss, of student and teachers", above=0
    )
    relational_teachers: Literal["all", "available"] = setting(
        "all",
        "teachers of the relational loss: all with features, or those that screening found available",
    )
    relational_only: list[str] = setting(
        factory=list,
        help="teachers without an image-text space, for the losses relational and heads alone",
    )
    teacher_weights: dict[str, float] = setting(
        factory=dict, help="weight of TEACHER, or of MODALITY/TEACHER for pairs of that modality; 1 where not given"
    )
    confidence: float = setting(
        0.0, "power of a teacher's own-pair probability in its weight; 0 gives equal weights", least=0
    )
    teacher_dropout: float = setting(
        0.0, "probability of dropping a teacher for a pair, sampled each epoch; one is kept", least=0, below=1
    )
    false_negatives: float | None = setting(
        None,
        "pairs whose images or captions have a mean teacher cosine above this are excluded from the negatives",
        above=0,
        most=1,
    )
    head_input: Literal["embedding", "trunk"] = setting(
        "embedding", "heads read the student's embedding, or the outputs of its towers before the projections"
    )
    head_form: Literal["standardized", "angular"] = setting(
        "standardized", "heads learn PHI-S targets, or raw directions by angle over the teacher's angular dispersion"
    )

    def __post_init__(self) -> None:
        """Take from the recipe what was not given, so that saved settings say everything, and check ranges."""
        preset = RECIPES[self.recipe]
        self.losses = checked_weights(self.losses or preset["losses"])
        self.target = self.target or preset["target"]
        self.target_norm = self.target_norm or preset["target_norm"]
        self.feature_form = self.feature_form or preset["feature_form"]
        self.interactive_scale = self.interactive_scale or preset["interactive_scale"]
        check_limits(self, vars(self))
        for name, scale in self.teacher_scales.items():
            if not 0 < scale < math.inf:
                raise ValueError(f"--teacher_scales.{name} is {scale}; it must be above 0")
        for name, weight in self.teacher_weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"--teacher_weights.{name} is {weight}; it must be at least 0")
        others = sum(weight for name, weight in self.losses.items() if name != "heads")
        if self.head_input == "trunk" and self.losses["heads"] and not others:
            raise ValueError("--head_input trunk does not train the projections; give another loss a weight, too")

    def reasons_for_raw(self) -> list[str]:
        """The settings that read raw teacher features."""
        reasons = [f"losses.{name}" for name in RAW_LOSSES if self.losses[name]]
        reasons += ["confidence"] if self.confidence else []
        return reasons + (["false_negatives"] if self.false_negatives is not None else [])

    def reasons_for_aligned(self) -> list[str]:
        """The settings that read aligned teacher features."""
        return [f"losses.{name}" for name in ALIGNED_LOSSES if self.losses[name]]

    def require_known(self, teachers: Sequence[str], modalities: Sequence[str]) -> None:
        """Refuse scales, weights and other settings of teachers or modalities that are not there.

        Raises:
            ValueError: a name that is unknown; the message has the nearest and all known ones.
        """
        for name in self.relational_only:
            _known("--relational_only: teacher", name, teachers)
        for key, mapping in (("teacher_scales", self.teacher_scales), ("teacher_weights", self.teacher_weights)):
            for name in mapping:
                modality, slash, teacher = name.rpartition("/")
                _known(f"--{key}.{name}: teacher", teacher, teachers)
                if slash and key == "teacher_weights":
                    _known(f"--{key}.{name}: modality", modality, modalities)
                elif slash:
                    raise ValueError(f"--{key}.{name}: scales belong to teachers; give --{key}.{teacher}")


def checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """A weight for each of `DISTILL_LOSSES`, zero where none is given.

    Raises:
        ValueError: an unknown loss, a negative weight, or no weight above zero.
    """
    for name, weight in weights.items():
        if name not in DISTILL_LOSSES:
            raise ValueError(
                f"unknown loss {name!r}{nearest(name, DISTILL_LOSSES)}; allowed: {', '.join(DISTILL_LOSSES)}"
            )
        if not 0 <= weight < math.inf:
            raise ValueError(f"the weight of {name} is {weight}; it must be finite and at least 0")
    if not any(weights.values()):
        raise ValueError(f"no loss has a weight above 0; give one of {', '.join(DISTILL_LOSSES)}")
    return {name: float(weights.get(name, 0.0)) for name in DISTILL_LOSSES}


def require_width(widths: Mapping[str, int], dim: int) -> None:
    """Refuse targets that the student's features cannot be compared with.

    Raises:
        ValueError: a teacher's features are not `dim` wide; the message names it.
    """
    wrong = {name: width for name, width in widths.items() if width != dim}
    if wrong:
        listed = ", ".join(f"{name} {width}" for name, width in wrong.items())
        raise ValueError(
            f"the losses {' and '.join(ALIGNED_LOSSES)} need targets as wide as the student's features ({dim}), "
            f"but these teachers are not: {listed}; align them with `mmkd align --dim {dim}`, or set both weights to 0"
        )


def _known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{what} {name!r} is unknown{nearest(name, known)}; known: {', '.join(known) or 'none'}")
