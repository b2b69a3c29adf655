"""A results folder of a suite, simulated: encoders of known skill on datasets of several kinds and modalities."""

import numpy as np
import safetensors.numpy

from mmkd.files import write_json

PRIMARY = {
    "zeroshot": "balanced_accuracy",
    "probe": "balanced_accuracy",
    "retrieval": "mean_recall",
    "vqa": "accuracy",
    "survival": "c_index",
    "diagnosis": "macro_auroc",
}
SKILLS = {"student": 0.72, "biomedclip": 0.66, "plip": 0.6, "stage1": 0.45, "ensemble": 0.7, "oracle": 0.71}
TIMES = [100.0 * k for k in range(21)]
KAPLAN_MEIER = {
    **{half: [[t, base ** (t / 8)] for t in TIMES] for half, base in (("high", 0.995), ("low", 0.998))},
    **{"logrank_p": 0.003, "n_high": 40, "n_low": 41},
}
SAMPLES, REPLICATES, CLASSES = 200, 100, ["benign", "malignant", "normal"]

DATASETS = [
    *((f"{m}-{k}", kind, m) for m in ("CT", "MRI", "OCT") for k in (1, 2) for kind in ("zeroshot", "probe")),
    ("CT-1", "probe", "CT", "shots"),
    ("roco", "retrieval", "CT"),
    ("vqa-rad", "vqa", "MRI"),
    ("tcga-blca", "survival", "pathology"),
    ("camelyon16", "diagnosis", "pathology"),
]  # fmt: skip

DATASET = {
    "title": "CT of one kind",
    "task": "classification",
    "modality": "CT",
    "license": "CC-BY-4.0",
    "tier": "B",
    "splits": {"counts": {"test": {"pairs": 200, "groups": 90}}, "shared_groups": 0, "shared_images": 3},
}


def write_suite(folder, asked, undefined=(), marked=None, rows=tuple(SKILLS), skills=None, **more):
    """Write ``summary.json``, cells and tasks.

    Args:
        folder: of the results.
        asked: ``(dataset, kind, modality)`` or, with a variant, four.
        undefined: ``(encoder, task)`` without numbers.
        marked: dataset -> encoder -> reason.
        rows: encoders.
        skills: probability of a right answer by encoder, where it is not the usual one.
        more: other entries of the summary.
    """
    generator, skills = np.random.default_rng(0), SKILLS | (skills or {})
    tasks = {}
    for dataset, kind, modality, *variant in asked:
        name = "-".join([kind, dataset, *variant])
        targets, ease = generator.integers(0, 3, SAMPLES), generator.normal(0, 0.08)
        draws = generator.multinomial(SAMPLES, np.ones(SAMPLES) / SAMPLES, REPLICATES)
        cells, drawn = {}, {}
        for row in rows:
            if (row, name) in undefined:
                cells[row] = {"undefined": "it has no text tower", "metrics": {}, "by_modality": {}}
                continue
            right = generator.random(SAMPLES) < np.clip(skills[row] + ease, 0.05, 0.97)
            drawn[row] = draws @ right / SAMPLES
            low, high = np.percentile(drawn[row], [2.5, 97.5])
            metric = {"value": float(right.mean()), "low": float(low), "high": float(high)}
            cells[row] = {"undefined": None, "metrics": {PRIMARY[kind]: metric}, "by_modality": {}}
            if PRIMARY[kind] == "balanced_accuracy":
                cells[row]["metrics"]["accuracy"] = metric
            if variant == ["shots"]:
                cells[row]["metrics"] |= curve_of(skills[row])
            if kind == "survival":
                cells[row]["extras"] = {"kaplan_meier": KAPLAN_MEIER}
            answers = np.where(right, targets, (targets + 1) % 3)
            tensors = {f"together.{PRIMARY[kind]}": drawn[row]}
            if kind in ("zeroshot", "probe"):
                tensors["outputs.image.scores"] = np.eye(3)[answers]
            (folder / "encoders" / row).mkdir(parents=True, exist_ok=True)
            safetensors.numpy.save_file(tensors, folder / "encoders" / row / f"{name}.safetensors")
        tasks[name] = {
            "title": f"Which class of {dataset}?",
            "kind": kind,
            "primary_metric": PRIMARY[kind],
            "units": {"image": {"n": SAMPLES, "groups": SAMPLES, "resampling": "groups"}},
            "chance": {PRIMARY[kind]: 1 / 3},
            "dataset": dataset,
            "modality": modality,
            "variant": variant[0] if variant else "",
            "rows": cells,
            "differences": {row: differences(cells, drawn, row, PRIMARY[kind]) for row in drawn
                            if row != "student" and "student" in drawn},
            "contaminated": (marked or {}).get(dataset, {}),
        }  # fmt: skip
        write_json(folder / "tasks" / f"{name}.json", {"targets": targets.tolist(), "classes": CLASSES})
    summary = {
        "student": "student",
        "teachers": [row for row in ("biomedclip", "plip") if row in rows],
        "baselines": ["stage1"] if "stage1" in rows else [],
        "tasks": tasks,
        "encoders": {row: {"source": f"runs/{row}", "fingerprint": "0a1b2c3d4e5f6789", "failures": []}
                     for row in rows if row not in ("ensemble", "oracle")},
        "skipped": {},
        "skipped_datasets": {},
        "unreadable": {},
        "versions": {"mmkd-clip": "0.1.0", "numpy": "2.0"},
        "settings": {"split": "test"},
    }  # fmt: skip
    write_json(folder / "summary.json", summary | more)
    return folder


def differences(cells, drawn, row, metric):
    """Student minus another row."""
    own = drawn["student"] - drawn[row]
    low, high = np.percentile(own, [2.5, 97.5])
    value = cells["student"]["metrics"][metric]["value"] - cells[row]["metrics"][metric]["value"]
    return {metric: {"difference": value, "low": float(low), "high": float(high), "p": 0.04}}


def curve_of(skill):
    """Metrics of a probe that learns from little."""
    amounts = ("1-shot", "2-shot", "8-shot", "32-shot", "1%", "10%", "100%")
    means = {f"balanced_accuracy@{amount}": skill - 0.3 / (k + 1) for k, amount in enumerate(amounts)}
    return {name: {"value": mean, "low": mean - 0.05, "high": mean + 0.05} for name, mean in means.items()}


def write_marked_suite(folder):
    """Every kind of task, with a row undefined, a mark of contamination, a dataset left out and one described."""
    write_suite(
        folder,
        DATASETS,
        undefined=[("stage1", "retrieval-roco")],
        marked={"CT-1": {"biomedclip": "PMC-15M holds its source"}},
        skipped_datasets={"ddi": "not there; register at its site"},
        datasets={"CT-1": DATASET},
    )
