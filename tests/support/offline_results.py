"""Run the whole evaluation on the small real data, and write ``docs/results/offline.md`` and ``offline.json``.

    python tests/support/offline_results.py WORK

runs the commands below in the folder WORK, as a user would type them, and writes both documents from what they left.
Everything takes up what is there already: a killed run goes on where it was. ``shared/data`` lies beside the checkout,
or where the variable DATA says.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from known_encoders import DIM
from offline_page import page

from mmkd.evaluation.datasets.dataset import open_dataset, split_samples
from mmkd.evaluation.datasets.manifest import find_manifests
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.run import tasks_for
from mmkd.evaluation.slides.survival import RIDGE, read_cohort, standardised
from mmkd.evaluation.statistics.bootstrap import REPLICATES, SEED, difference, interval, replicate
from mmkd.evaluation.statistics.survival import Outcomes, concordance
from mmkd.evaluation.tasks.task import TaskOptions
from mmkd.files import atomic_write_text, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
STUDENT, CONTROLS = "mmkd-clip", ("random", "told")
TEACHERS = ("fundus-photography-ct", "immunohistochemistry-ultrasound", "mri")
COHORTS = ("blca",)
NEAR_ONE, CLOSED_NEAR_ONE, DRAWS = 0.95, 0.9, 40
KNOWN = ",".join(f"{name}=$TESTS/{name}.yaml" for name in CONTROLS)
COMMANDS = [
    f"mmkd quickstart --output {STUDENT}",
    "mmkd eval --suite offline --kinds zeroshot,probe,retrieval,survival --data $DATA --output results \\\n"
    f"  --baselines {','.join(CONTROLS)} --encoders \\\n"
    + ",".join([STUDENT, *(f"mmkd-clip-work/teachers/{name}" for name in TEACHERS)])
    + f",\\\n{KNOWN}",
    "mmkd eval --datasets vqa-rad --kinds vqa --data $DATA --output results-vqa --cache results/embeddings \\\n"
    f"  --baselines {','.join(CONTROLS)} --encoders {STUDENT},{KNOWN}",
    f"for cohort in {' '.join(COHORTS)}; do [ -d simulated/$cohort ] || python $TESTS/simulate_cohort.py \\\n"
    "  $DATA/tcga_survival/tcga_${cohort}_clinical.csv simulated/$cohort; done",
    "mmkd eval --kinds survival --output results-simulated --baselines noise,told --encoders \\\n"
    + ",".join(f"{name}=$TESTS/random.yaml" for name in ("hazard", "noise", "told"))
    + " \\\n  --datasets "
    + ",".join(f"simulated/{cohort}/manifest.yaml" for cohort in COHORTS),
]


def main(work: Path) -> None:
    data = os.environ.get("DATA", str(ROOT.parent / "shared" / "data"))
    tests = str(ROOT / "tests" / "support")
    environment = os.environ | {"DATA": data, "TESTS": tests, "MMKD_DATA": data, "PYTHONPATH": tests}
    work.mkdir(parents=True, exist_ok=True)
    for command in COMMANDS:
        print(command, flush=True)
        subprocess.run(["bash", "-ec", command], cwd=work, env=environment, check=True)
    os.environ["MMKD_DATA"] = data
    found = gather(work)
    write_json(ROOT / "docs" / "results" / "offline.json", found)
    atomic_write_text(ROOT / "docs" / "results" / "offline.md", page(found, COMMANDS))
    failed = [name for name, own in found["verdicts"].items() if not own["passed"]]
    print(f"{len(found['verdicts'])} verdicts, failed: {', '.join(failed) or 'none'}")


def gather(work: Path) -> dict[str, Any]:
    """All figures of both documents: tasks of all results, what scikit-survival gives, and verdicts."""
    tasks, skipped, versions = {}, {}, {}
    for folder in (work / "results", work / "results-vqa", work / "results-simulated"):
        summary = read_json(folder / "summary.json")
        skipped |= summary["skipped"] | summary["skipped_datasets"]
        versions |= read_json(folder / "repro.lock")["versions"]
        for name, task in summary["tasks"].items():
            description = read_json(folder / "tasks" / f"{name}.json")
            tasks[name] = brief(task, description)
            if task["kind"] == "vqa":
                for row, cells in tasks[name]["rows"].items():
                    cells["gain"] = looked(folder / "encoders" / row / f"{name}.safetensors", cells)
            elif name.endswith("clinical-clinical"):
                tasks[name]["scikit-survival"] = reference(description, task["dataset"])
            elif task["dataset"].startswith("simulated"):
                place = work / "simulated" / task["dataset"].removeprefix("simulated-")
                tasks[name]["true_hazard"] = ceiling(description, place)
    found = {"student": STUDENT, "teachers": list(TEACHERS), "replicates": REPLICATES, "seed": SEED}
    found |= {"tasks": rounded(tasks), "skipped": skipped, "versions": versions, "draws": DRAWS}
    found["coverage"] = {
        t["dataset"]: rounded(coverage(t["dataset"])) for t in tasks.values() if t["kind"] == "zeroshot"
    }
    return found | {"verdicts": {name: verdict(task) for name, task in found["tasks"].items()}}


def brief(task: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """What the documents say of a task."""
    known = ("kind", "primary_metric", "dataset", "variant", "chance", "pool", "train")
    stated = (
        "unanswerable",
        "shared_images",
        "questions",
        "closed",
        "covariates",
        "search",
        "takes",
        "event",
        "folds_by",
        "sites",
    )
    found = {key: task[key] for key in known if key in task} | {k: description[k] for k in stated if k in description}
    found["n"] = next(iter(task["units"].values()))["n"]
    if "event" in found:
        found["event"] = sum(found["event"])
    found["rows"] = {
        row: cell["metrics"] or {"undefined": cell["undefined"]}
        for row, cell in task["rows"].items()
        if row != "oracle"
    }
    found["differences"] = {
        row: own[task["primary_metric"]] for row, own in task["differences"].items() if row != "oracle"
    }
    return found


def looked(cell: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """How much better questions are answered with the image than without it, draw by draw."""
    draws, names = safetensors.numpy.load_file(cell), ("accuracy", "question_only_accuracy")
    points, replicates = [metrics[n]["value"] for n in names], [draws[f"replicates.{n}"] for n in names]
    own = difference(*points, *replicates)
    return {"value": own["difference"], "low": own["low"], "high": own["high"]}


def coverage(dataset: str) -> dict[str, Any]:
    """Zero-shot classification by many random encoders: their mean, and how many intervals hold chance."""
    manifest = find_manifests([dataset])[0]
    collection = open_dataset(manifest)
    samples = split_samples(collection, "test", {pair.id: pair.id for pair in collection.pairs})
    (task,), _ = tasks_for(samples, ["zeroshot"], TaskOptions())
    keys = [[pair.id for pair in samples.held_out], sorted(collection.prompts())]
    chance, values, held = task.description["chance"][task.primary_metric], [], 0
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        drawn = [generator.choice([-1.0, 1.0], (len(own), DIM)).astype(np.float32) / DIM**0.5 for own in keys]
        images, texts = (dict(zip(own, vectors, strict=True)) for own, vectors in zip(keys, drawn, strict=True))
        outputs = task.outputs(Embedded("random", "", images=images, texts=texts))
        points, replicates = replicate(partial(task.primary_metric_values, outputs), task.units, REPLICATES, SEED)
        low, high = interval(replicates[task.primary_metric])
        values.append(float(points[task.primary_metric]))
        held += low <= chance <= high
    return {"mean": float(np.mean(values)), "error": float(np.std(values, ddof=1) / DRAWS**0.5), "held": held}


def over_folds(description: dict[str, Any], risks: Any) -> float:
    """Harrell's concordance, the mean over the folds; ``risks(train, test)`` gives those of ``test``."""
    outcomes = Outcomes(np.array(description["time"]), np.array(description["event"], dtype=bool))
    folds, values = np.array(description["folds"]), []
    for fold in np.unique(folds):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        values.append(concordance(outcomes[test], risks(train, test), np.ones((1, len(test))))[0])
    return float(np.mean(values))


def ceiling(description: dict[str, Any], place: Path) -> float:
    """Concordance of the simulated hazard itself: no model can be expected to do better."""
    collection = open_dataset(find_manifests([str(place / "manifest.yaml")])[0])
    known = {pair.group: float(collection.metadata[pair.id]["risk"]) for pair in collection.pairs}
    risks = np.array([known[case] for case in description["ids"]])
    return over_folds(description, lambda train, test: risks[test])


def reference(description: dict[str, Any], dataset: str) -> float:
    """What scikit-survival's Cox model gives of the same covariates on the same folds."""
    from sksurv.linear_model import CoxPHSurvivalAnalysis

    cohort = read_cohort(open_dataset(find_manifests([dataset])[0]), None)
    outcomes = list(zip(cohort.outcomes.event, cohort.outcomes.time, strict=True))
    answers = np.array(outcomes, dtype=[("event", bool), ("time", float)])

    def risks(train: Any, test: Any) -> Any:
        features = np.nan_to_num(standardised(cohort.covariates, train))
        alpha = RIDGE * cohort.outcomes.event[train].sum()  # theirs is of the sum over deaths, ours of the mean
        model = CoxPHSurvivalAnalysis(alpha, ties="breslow").fit(features[train], answers[train])
        return model.predict(features[test])

    return over_folds(description, risks)


def verdict(task: dict[str, Any]) -> dict[str, Any]:
    """Whether the encoder that knows nothing stands at chance, and the one that was told stands near one."""
    rows, metric, measured = task["rows"], task["primary_metric"], task["primary_metric"]
    blind, told = rows.get("random", rows.get("noise")), rows["told"]
    value, chance, best, least = blind[metric], task["chance"][metric], told[metric], NEAR_ONE
    if task["kind"] == "vqa" and task["variant"] != "zeroshot":
        value, chance, measured = blind["gain"], 0.0, "accuracy less that of the question alone"
        best, least = told["closed_accuracy"], CLOSED_NEAR_ONE
    checks = {"random_at_chance": value["low"] <= chance <= value["high"], "told_near_one": best["value"] >= least}
    if task["variant"] == "clinical":  # covariates alone: of simulated deaths they tell nothing, of real ones something
        del checks["told_near_one"]
        if not task["dataset"].startswith("simulated"):
            return {"passed": True}
    told_shown = best if "told_near_one" in checks else None
    found = {"metric": measured, "chance": chance, "random": value, "told": told_shown}
    return found | checks | {"passed": all(checks.values())}


def rounded(value: Any) -> Any:
    """Floats to four digits."""
    if isinstance(value, dict):
        return {key: rounded(own) for key, own in value.items()}
    if isinstance(value, list):
        return [rounded(own) for own in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
