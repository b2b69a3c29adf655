"""Adjusted p-values, average ranks, scores relative to chance, both definitions of AUROC, folds that keep sites."""

from itertools import product

import numpy as np
import pyarrow.parquet
import pytest
from scipy.stats import false_discovery_control, rankdata
from sklearn.metrics import roc_auc_score

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.manifest import Manifest, make_manifest
from mmkd.evaluation.datasets.readers import read_bags
from mmkd.evaluation.report.leaderboard import task_notes
from mmkd.evaluation.results.store import ResultStore, write_scores
from mmkd.evaluation.results.summary import dataset_ranks, mean_block, task_summary
from mmkd.evaluation.slides.survival import site_folds
from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import average_ranks, holm, paired_differences, resampling_units
from mmkd.evaluation.tasks.zeroshot import ZeroShot


def test_holm_multiplies_by_the_hypotheses_that_are_left_and_never_falls():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "undefined": float("nan"), "d": 0.6})
    assert found["a"] == pytest.approx(4 * 0.01) and found["c"] == pytest.approx(3 * 0.03)
    assert found["b"] == pytest.approx(3 * 0.03), "2 x .04 is below the adjusted p before it"
    assert found["d"] == pytest.approx(0.6) and np.isnan(found["undefined"])
    assert holm({}) == {} and holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    generator = np.random.default_rng(0)
    drawn = {str(k): float(p) for k, p in enumerate(generator.uniform(size=12) ** 3)}
    adjusted = holm(drawn)
    assert all(adjusted[name] >= own for name, own in drawn.items())
    looser = false_discovery_control(list(drawn.values()))  # Benjamini and Hochberg control less
    assert all(adjusted[name] >= own - 1e-12 for name, own in zip(drawn, looser, strict=True))


def test_differences_carry_the_p_of_all_comparisons():
    generator = np.random.default_rng(0)
    drawn = {name: generator.normal(mean, 0.02, 999) for name, mean in (("ours", 0.7), ("near", 0.68), ("far", 0.5))}
    found = paired_differences("ours", {name: own.mean() for name, own in drawn.items()}, drawn)
    assert set(found) == {"near", "far"} and found["far"]["p"] == pytest.approx(0.002)
    assert found["far"]["p_holm"] == pytest.approx(0.004) and found["near"]["p_holm"] == found["near"]["p"]


def signed_rank_p(differences):
    """Exact two-sided p by counting all assignments of signs."""
    ranks = rankdata(np.abs(differences))
    observed = ranks[differences > 0].sum()
    middle = ranks.sum() / 2
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in product((0, 1), repeat=len(ranks))
    ]
    return np.mean([abs(own - middle) >= abs(observed - middle) - 1e-9 for own in sums])


def test_average_ranks_and_signed_rank_tests_are_those_of_the_definition():
    scores = {
        "student": np.array([0.9, 0.8, 0.7, 0.6, 0.55, 0.81, 0.4]),
        "a": np.array([0.8, 0.7, 0.72, 0.5, 0.5, 0.7, 0.25]),
        "b": np.array([0.9, 0.9, 0.6, 0.61, 0.6, 0.83, 0.41]),
    }
    found = average_ranks("student", scores)
    assert found["student"] == {"rank": pytest.approx(np.mean([1.5, 2, 2, 2, 2, 2, 2]))}
    assert found["a"]["rank"] == pytest.approx(np.mean([3, 3, 1, 3, 3, 3, 3]))
    assert found["b"]["rank"] == pytest.approx(np.mean([1.5, 1, 3, 1, 1, 1, 1]))
    expected = {}
    for name in ("a", "b"):
        apart = scores["student"] - scores[name]
        expected[name] = signed_rank_p(apart[apart != 0])
        assert found[name]["p"] == pytest.approx(expected[name])
        assert found[name]["median_difference"] == pytest.approx(np.median(apart))
    adjusted = holm(expected)
    assert {name: found[name]["p_holm"] for name in adjusted} == pytest.approx(adjusted)
    few = average_ranks("student", {name: own[:5] for name, own in scores.items()})
    assert few["a"]["p"] is None and few["a"]["p_holm"] is None and few["a"]["rank"] > few["b"]["rank"]


def summaries(values, chances):
    """Tasks ``{task: {row: value}}`` of datasets named as the task, with chance."""
    return {
        name: {
            "kind": "probe",
            "dataset": name.partition("/")[0],
            "primary_metric": "accuracy",
            "chance": {"accuracy": chances[name]},
            "rows": {row: {"metrics": {"accuracy": {"value": value}}} for row, value in rows.items()},
        }
        for name, rows in values.items()
    }


def test_means_relative_to_chance_are_those_of_the_formula():
    values = {
        "two": {"student": 0.75, "a": 0.5},
        "ten": {"student": 0.28, "a": 0.55},
        "sure": {"student": 1.0, "a": 0.9},
    }
    tasks = summaries(values, {"two": 0.5, "ten": 0.1, "sure": 1.0})
    block = mean_block(tasks, "student", lambda row, task: np.array([values[task][row], values[task][row] + 0.01]))
    assert block["rows"]["student"]["value"] == pytest.approx(np.mean([0.75, 0.28, 1.0]))
    own = block["above_chance"]
    assert own["student"]["value"] == pytest.approx(np.mean([0.25 / 0.5, 0.18 / 0.9])), "chance 1 leaves nothing to win"
    assert own["a"]["value"] == pytest.approx(np.mean([0.0, 0.5]))
    shifted = np.mean([0.26 / 0.5, 0.19 / 0.9])
    assert own["student"]["high"] == pytest.approx(np.percentile([own["student"]["value"], shifted], 97.5))
    assert block["differences"]["a"]["p_holm"] == block["differences"]["a"]["p"]


def test_ranks_are_over_datasets_and_leave_out_the_oracle():
    rows = {"student": 0.7, "a": 0.6, "oracle": 0.9}
    values = {"x/1": rows, "x/2": rows | {"a": 0.65}, "y": rows | {"a": 0.8}}
    found = dataset_ranks(summaries(values, dict.fromkeys(values, 0.1)), "student")
    assert found["datasets"] == ["x", "y"] and set(found["rows"]) == {"student", "a"}
    assert found["rows"]["student"]["rank"] == 1.5 == found["rows"]["a"]["rank"]
    alone = {name: own for name, own in values.items() if name != "y"}
    assert dataset_ranks(summaries(alone, dict.fromkeys(alone, 0.1)), "student")["rows"] == {}


def classification(counts, groups=None):
    """A zero-shot task on as many images of each class, and scores of an encoder that knows something."""
    names = [name for name, count in counts.items() for _ in range(count)]
    own = groups or [f"g{k}" for k in range(len(names))]
    pairs = [Pair(f"p{k}", f"{k}.png", "", "CT", name, own[k], "test") for k, name in enumerate(names)]
    manifest = Manifest("toy", "classification", "CT", {"imagefolder": "x"}, "CC0-1.0", classes={n: [] for n in counts})
    task = ZeroShot(manifest, pairs)
    generator = np.random.default_rng(0)
    scores = 2 * generator.normal(size=(len(names), len(counts))) + 2 * np.eye(len(counts))[task.targets]
    return task, {"image.scores": scores}


COUNTS = {"benign": 60, "malignant": 25, "normal": 15}


def test_both_definitions_of_auroc_are_those_of_scikit_learn():
    task, outputs = classification(COUNTS)
    found = {name: own[0] for name, own in task.metrics(outputs, {"image": np.ones((1, 100))}).items()}
    probabilities = np.exp(outputs["image.scores"])
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    for name, average in (("macro_auroc", "macro"), ("weighted_auroc", "weighted")):
        expected = roc_auc_score(task.targets, probabilities, multi_class="ovr", average=average)
        assert found[name] == pytest.approx(expected, abs=1e-12)
    assert found["macro_auroc"] != pytest.approx(found["weighted_auroc"], abs=1e-3)
    assert task.description["chance"]["weighted_auroc"] == 0.5
    two, of_two = classification({"benign": 30, "malignant": 20})
    assert "weighted_auroc" not in two.metrics(of_two, {"image": np.ones((1, 50))})


def test_a_weighted_auroc_follows_the_draws():
    task, outputs = classification(COUNTS)
    counts = np.random.default_rng(1).integers(0, 3, (1, len(task.targets)))
    copies = np.repeat(np.arange(len(task.targets)), counts[0])
    margins = metrics.margins(outputs["image.scores"])[copies]
    targets = task.targets[copies]
    areas = [roc_auc_score(targets == k, margins[:, k]) for k in range(3)]
    found = task.metrics(outputs, {"image": counts.astype(float)})["weighted_auroc"][0]
    assert found == pytest.approx(np.average(areas, weights=np.bincount(targets)))


def test_the_table_of_scores_gives_the_aurocs(tmp_path):
    task, outputs = classification(COUNTS)
    write_scores(tmp_path / "scores.parquet", task, outputs)
    table = pyarrow.parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    target = np.array(table["target"])
    areas = [roc_auc_score(target == name, table[f"score: {name}"]) for name in COUNTS]
    found = task.metrics(outputs, {"image": np.ones((1, len(target)))})
    assert found["macro_auroc"][0] == pytest.approx(np.mean(areas))
    named = np.array([table[f"score: {name}"] for name in COUNTS])
    assert [list(COUNTS)[k] for k in named.argmax(axis=0)] == table["prediction"]


def test_classes_with_a_single_group_are_named_and_reported(tmp_path):
    groups = [f"g{k}" for k in range(8)] + ["m", "m", "m", "n"]
    task, _ = classification({"benign": 8, "malignant": 3, "normal": 1}, groups)
    assert task.units["image"].pooled == ("malignant", "normal")
    described = ResultStore(tmp_path, task.pairs, 100, 0).describe(task)
    assert described["units"]["image"]["pooled"] == ["malignant", "normal"]
    (note,) = [own for own in task_notes(described) if "resampled together" in own]
    assert "malignant, normal" in note
    assert resampling_units(["a", "b", "b", "b"], ["1", "2", "3", "4"]).pooled == ("a", "b")
    assert resampling_units(["a", "a", "b", "b"], ["1", "2", "3", "4"]).pooled == ()


def test_summaries_of_a_task_adjust_over_its_encoders(tmp_path):
    task, outputs = classification(COUNTS)
    store = ResultStore(tmp_path, task.pairs, 200, 0)
    noise = {"image.scores": np.random.default_rng(3).normal(size=outputs["image.scores"].shape)}
    shown = {"student": outputs, "same": outputs, "noise": noise}
    cells = {name: store.result(task, name, [name], lambda own=own: (own, {}))[0] for name, own in shown.items()}
    found = task_summary(store.describe(task), cells, "student", store)["differences"]
    far = found["noise"]["balanced_accuracy"]
    assert far["p_holm"] == pytest.approx(2 * far["p"]) and found["same"]["balanced_accuracy"]["p_holm"] == 1.0


def test_folds_keep_sites_whole_and_spread_deaths():
    generator = np.random.default_rng(0)
    sites = [f"s{k}" for k in generator.integers(0, 20, 300)]
    event = generator.uniform(size=300) < 0.4
    folds = site_folds(event, sites, 5, 0)
    assert all(len(set(folds[np.array(sites) == site])) == 1 for site in set(sites))
    deaths = np.bincount(folds, weights=event, minlength=5)
    assert deaths.min() > 0.5 * deaths.mean() and deaths.sum() == event.sum()
    assert site_folds(event, [f"s{k % 4}" for k in range(300)], 5, 0) is None, "fewer sites than folds"
    assert site_folds(event, [], 5, 0) is None and site_folds(np.ones(300, bool), sites, 5, 0) is not None


def test_the_site_of_slides_is_read_and_keeps_hospitals_in_one_split(tmp_path):
    from mmkd.evaluation.datasets.dataset import open_dataset

    rows = [f"s{k},c{k // 2},{'ab'[k % 2]},h{k // 8}" for k in range(160)]
    (tmp_path / "labels.csv").write_text("\n".join(["slide,case,label,hospital", *rows]))
    values = {
        "id": "toy",
        "task": "diagnosis",
        "modality": "pathology",
        "source": {"bags": str(tmp_path), "site": "hospital"},
        "license": "CC0-1.0",
        "classes": ["a", "b"],
    }
    manifest = make_manifest(values)
    assert {own.metadata["site"] for own in read_bags(manifest, [tmp_path]).samples} == {f"h{k}" for k in range(20)}
    dataset = open_dataset(manifest)
    homes = {}
    for pair in dataset.pairs:
        homes.setdefault(dataset.metadata[pair.id]["site"], set()).add(pair.split)
    assert all(len(own) == 1 for own in homes.values()) and {s for own in homes.values() for s in own} == {
        "train",
        "validation",
        "test",
    }
