"""Ways to go on from stage 1 that are compared: the default, its rivals, and one change of the default at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmkd.distill_options import RECIPES
from mmkd.miniature.plan import GENERALISTS, SPECIALISTS, Rival

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
