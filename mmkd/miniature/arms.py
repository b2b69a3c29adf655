"""The arms of the experiment: trainings that start from stage 1, each with as many steps and tuning trials.

An arm names its losses, whose features it learns from, and which data it sees. Controls have no
teacher, or teacher features without biomedical knowledge; they measure the effect of regularization alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Source = Literal["none", "all", "all and own", "own", "permuted", "random", "best", "self"]
"""Whose features: no one's; all teachers'; theirs and the student's own starting towers'; the starting towers' alone;
all teachers' of other images of the same collection; random projections of the teachers' towers; the best teacher's on
validation; or an earlier student's."""


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
    trials: tuple[Mapping[str, float], ...] = ()


RATES = ({"learning_rate": 1.0}, {"learning_rate": 0.3}, {"learning_rate": 3.0})
RELATIONS = ({"relational": 3.0}, {"relational": 1.0}, {"relational": 10.0})
SHARES = (
    {"task": 0.5, "affinity": 0.5, "relational": 3.0},
    {"task": 0.1, "affinity": 0.9, "relational": 3.0},
    {"task": 0.5, "affinity": 0.5, "relational": 10.0},
)
TASK = {"task": 1.0}
TASK_AND_RELATIONS = {"task": 1.0, "relational": 3.0}
ALL_THREE = {"task": 0.5, "affinity": 0.5, "relational": 3.0}
SPREAD = {"teacher_temperature": "spread"}

STAGE1, TASK_ALONE, NO_TEACHER = "stage 1", "task loss alone", "own starting towers"
DEFAULT = "teachers + images"

ARMS: dict[str, Arm] = {
    TASK_ALONE: Arm(TASK, trials=RATES),
    "task loss on the teachers' pairs too": Arm(TASK, shared=True, trials=RATES),
    NO_TEACHER: Arm(TASK_AND_RELATIONS, "own", SPREAD, trials=RELATIONS),
    f"{NO_TEACHER} + images": Arm(TASK_AND_RELATIONS, "own", SPREAD, images=True, trials=RELATIONS),
    "earlier student": Arm(ALL_THREE, "self", SPREAD, trials=SHARES),
    "earlier student + images": Arm(ALL_THREE, "self", SPREAD, images=True, trials=SHARES),
    "permuted teachers": Arm(TASK_AND_RELATIONS, "permuted", SPREAD, trials=RELATIONS),
    "random projections + images": Arm(TASK_AND_RELATIONS, "random", SPREAD, images=True, trials=RELATIONS),
    "best teacher alone": Arm(ALL_THREE, "best", SPREAD, screened=True, trials=SHARES),
    "paper": Arm(
        {},
        "all",
        {"recipe": "paper"},
        True,
        aligned="autoencoder",
        trials=tuple({"task": 1.0, "interactive": 1.0, "feature": weight} for weight in (50.0, 10.0, 250.0)),
    ),
    "repaired paper": Arm(
        {},
        "all",
        {"recipe": "repaired"},
        True,
        aligned="procrustes",
        trials=tuple({"task": 1.0, "interactive": 1.0, "feature": weight} for weight in (2000.0, 400.0, 10000.0)),
    ),
    "teachers' relations": Arm(TASK_AND_RELATIONS, "all", SPREAD, trials=RELATIONS),
    "teachers at fixed temperatures": Arm(ALL_THREE, "all", {}, True, trials=SHARES),
    "teachers": Arm(ALL_THREE, "all", SPREAD, True, trials=SHARES),
    "teachers' relations + images": Arm(TASK_AND_RELATIONS, "all", SPREAD, images=True, trials=RELATIONS),
    DEFAULT: Arm(ALL_THREE, "all", SPREAD, True, images=True, trials=SHARES),
    f"teachers, {NO_TEACHER} + images": Arm(ALL_THREE, "all and own", SPREAD, True, images=True, trials=SHARES),
}

CONTROLS = tuple(
    name for name, arm in ARMS.items() if arm.source in ("none", "own", "permuted", "random", "self") and not arm.shared
)
QUICK = (TASK_ALONE, f"{NO_TEACHER} + images", "teachers", DEFAULT)
