import json

import numpy as np
import pytest
from fake_encoder import LABELS, MODALITIES, FakeEncoder, make_pairs, write_pairs

import mmkd.train.eval as recipe
from mmkd.data.table import Pair
from mmkd.evaluation import run as suite_run
from mmkd.evaluation.embeddings.encoders import named_sources
from mmkd.files import read_json

ENCODERS = {
    "student": FakeEncoder("student", 0.3),
    "ct": FakeEncoder("ct", 0.5, blind_to=("MRI", "X-ray")),
    "mri": FakeEncoder("mri", 0.5, blind_to=("CT", "X-ray")),
    "stage1": FakeEncoder("stage1", 3.0),
    "perfect": FakeEncoder("perfect"),
    "random": FakeEncoder("random", 1e4),
    "broken": FakeEncoder("broken", nan=True),
}


FAST = ["zeroshot", "retrieval"]


@pytest.fixture(autouse=True)
def loads_fakes(monkeypatch):
    for encoder in ENCODERS.values():
        encoder.calls = 0
    monkeypatch.setattr(suite_run, "load_with_precision", lambda source, device, precision: ENCODERS[source])


def evaluate(pairs, output, encoders=("student", "ct", "mri", "stage1"), **settings):
    settings = {"replicates": 200, "quiet": True, **settings}
    recipe.main(recipe.EvalSettings(encoders=list(encoders), pairs=pairs, output=output, **settings))
    return read_json(output / "summary.json")


@pytest.fixture
def folder(tmp_path):
    pairs = [*make_pairs(48), *make_pairs(72, "train", 48), *make_pairs(36, "validation", 120)]
    return write_pairs(tmp_path / "pairs", pairs)


def primary_metric(summary, task, row):
    return summary["tasks"][task]["rows"][row]["metrics"][summary["tasks"][task]["primary_metric"]]


def test_an_oracle_is_near_one_and_noise_at_chance(folder, tmp_path):
    summary = evaluate(folder, tmp_path / "results", ("student", "perfect", "random"))
    for name, task in summary["tasks"].items():
        assert primary_metric(summary, name, "perfect")["value"] > 0.99, name
        if task["units"]["image"]["n"] < 48:
            continue
        random = primary_metric(summary, name, "random")
        assert random["low"] - 0.05 <= task["chance"][task["primary_metric"]] <= random["high"] + 0.05, name


def test_rows_differences_and_overall(folder, tmp_path, capsys):
    summary = evaluate(folder, tmp_path / "results")
    assert (
        summary["student"] == "student" and summary["teachers"] == ["ct", "mri"] and summary["baselines"] == ["stage1"]
    )
    kinds = {task["kind"] for task in summary["tasks"].values()}
    assert kinds == {"zeroshot", "retrieval", "probe"}
    task = summary["tasks"]["retrieval"]
    assert list(task["rows"]) == ["ct", "ensemble", "mri", "oracle", "stage1", "student"]
    assert task["rows"]["oracle"]["chosen"] == {
        f"{unit}:{m}": "ct" if m == "CT" else "mri" for unit in ("image", "caption") for m in ("CT", "MRI")
    } | {key: task["rows"]["oracle"]["chosen"][key] for key in ("image:X-ray", "caption:X-ray")}
    assert "oracle" not in summary["tasks"]["zeroshot-modality"]["rows"]
    found = task["differences"]["ct"]["mean_recall"]
    expected = (
        primary_metric(summary, "retrieval", "student")["value"] - primary_metric(summary, "retrieval", "ct")["value"]
    )
    assert found["difference"] == pytest.approx(expected) and found["low"] > 0 and found["p"] < 0.05
    overall = summary["overall"]
    by_kind = [
        np.mean(
            [primary_metric(summary, n, "student")["value"] for n, t in summary["tasks"].items() if t["kind"] == kind]
        )
        for kind in kinds
    ]
    assert overall["rows"]["student"]["value"] == pytest.approx(np.mean(by_kind))
    assert overall["best_teacher"] in ("ct", "mri") and set(overall["differences"]) == {
        "ct",
        "mri",
        "stage1",
        "ensemble",
    }
    splits = summary["datasets"]["pairs"]["splits"]
    assert splits["shared_groups"] == 0 and splits["counts"]["test"]["pairs"] == 48
    assert "retrieval: mean_recall, 48 samples in 24 groups, chance" in capsys.readouterr().out


def test_a_second_run_makes_nothing_and_gives_the_same_bytes(folder, tmp_path):
    evaluate(folder, tmp_path / "results")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "results/encoders").rglob("*.*")}
    summary = (tmp_path / "results/summary.json").read_bytes()
    calls = ENCODERS["student"].calls
    evaluate(folder, tmp_path / "results")
    assert ENCODERS["student"].calls == calls > 0
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "results/encoders").rglob("*.*")}
    assert summary == (tmp_path / "results/summary.json").read_bytes()


def test_a_killed_run_goes_on_where_it_was(folder, tmp_path):
    evaluate(folder, tmp_path / "whole", kinds=FAST)
    evaluate(folder, tmp_path / "results", kinds=FAST)
    lost = tmp_path / "results/encoders/student/retrieval.json"
    expected = lost.read_bytes()
    lost.unlink()
    kept = tmp_path / "results/encoders/ct/retrieval.json"
    stamp = kept.stat().st_mtime_ns
    evaluate(folder, tmp_path / "results", kinds=FAST)
    assert lost.read_bytes() == expected and kept.stat().st_mtime_ns == stamp
    tasks = [read_json(tmp_path / name / "summary.json")["tasks"] for name in ("whole", "results")]
    assert tasks[0] == tasks[1]


def test_a_changed_image_is_embedded_again(folder, tmp_path):
    evaluate(folder, tmp_path / "results", ("student", "ct"), kinds=["zeroshot"])
    (folder / "images/0.png").write_bytes((folder / "images/1.png").read_bytes())
    before = read_json(tmp_path / "results/encoders/student/zeroshot-label.json")["key"]
    evaluate(folder, tmp_path / "results", ("student", "ct"), kinds=["zeroshot"])
    assert read_json(tmp_path / "results/encoders/student/zeroshot-label.json")["key"] != before


def test_results_do_not_depend_on_who_else_is_evaluated(folder, tmp_path):
    evaluate(folder, tmp_path / "few", ("student",), kinds=FAST)
    evaluate(folder, tmp_path / "many", ("student", "mri", "ct"), kinds=FAST)
    cells = [(tmp_path / name / "encoders/student/retrieval.json").read_bytes() for name in ("few", "many")]
    assert cells[0] == cells[1]


def test_unreadable_images_are_counted_and_the_run_goes_on(tmp_path, capsys):
    folder = write_pairs(tmp_path / "pairs", make_pairs(24), unreadable=("p3", "p7"))
    (folder / "images/9.png").unlink()
    summary = evaluate(folder, tmp_path / "results", ("student", "ct"))
    assert set(summary["unreadable"]) == {"pairs/p3", "pairs/p7", "pairs/p9"}
    assert summary["unreadable"]["pairs/p9"] == "missing"
    assert summary["tasks"]["zeroshot-modality"]["units"]["image"]["n"] == 21
    assert "3 images could not be read" in capsys.readouterr().out


def test_vectors_that_are_not_finite_give_a_reason_instead_of_a_number(folder, tmp_path):
    summary = evaluate(folder, tmp_path / "results", ("student", "broken", "ct", "mri"))
    for task in summary["tasks"].values():
        assert "not finite" in task["rows"]["broken"]["undefined"] and task["rows"]["broken"]["metrics"] == {}
        assert task["rows"]["ensemble"]["members"] == ["ct", "mri"] and "broken" not in task["differences"]
    assert "weights may be broken" in summary["encoders"]["broken"]["failures"][0]
    assert "broken" not in summary["overall"]["rows"] and summary["overall"]["tasks"]
    json.dumps(summary, allow_nan=False)


def pair(k, **fields):
    return Pair(
        f"p{k}",
        f"{k}.png",
        **{"caption": f"CT number {k}", "modality": "CT", "label": "cyst", "split": "test"} | fields,
    )


EDGES = {
    "six images, one class, one modality": ([pair(k) for k in range(6)], {"retrieval"}),
    "labels but no captions": ([pair(k, caption=" ", label=LABELS[k % 2]) for k in range(6)], {"zeroshot-label"}),
    "identical captions": ([pair(k, caption="x", modality=MODALITIES[k % 2]) for k in range(6)], {"zeroshot-modality"}),
    "all of one group": ([pair(k, group="g", label=LABELS[k % 2]) for k in range(6)], {"zeroshot-label", "retrieval"}),
    "a class of one image": ([pair(k, label=LABELS[k // 5]) for k in range(6)], {"zeroshot-label", "retrieval"}),
    "labels that look like markup": (
        [pair(k, label=f"<b>{k % 2}</b>", modality="a/b") for k in range(6)],
        {"zeroshot-label", "retrieval"},
    ),
    "no modality": ([pair(k, modality="", label=LABELS[k % 2]) for k in range(6)], {"zeroshot-label", "retrieval"}),
    "a class that is not trained on": (
        [pair(k, split="train", label=LABELS[k % 2]) for k in range(20)]
        + [pair(k, label=LABELS[k % 3]) for k in range(20, 32)],
        {"zeroshot-label", "retrieval", "probe-label"},
    ),
}


@pytest.mark.parametrize("case", EDGES)
def test_small_and_odd_folders(case, tmp_path):
    pairs, expected = EDGES[case]
    summary = evaluate(write_pairs(tmp_path / "pairs", pairs), tmp_path / "results")
    assert set(summary["tasks"]) == expected
    assert all(cell["undefined"] is None for task in summary["tasks"].values() for cell in task["rows"].values())
    json.dumps(summary, allow_nan=False)


def test_nothing_to_evaluate_is_a_clear_error(tmp_path):
    folder = write_pairs(tmp_path / "train", make_pairs(6, "train"))
    with pytest.raises(ValueError, match="6 pairs, none of them in split 'test'"):
        evaluate(folder, tmp_path / "results")
    folder = write_pairs(tmp_path / "same", [pair(k, caption="x") for k in range(6)])
    with pytest.raises(ValueError, match=r"nothing to evaluate\. zeroshot-modality"):
        evaluate(folder, tmp_path / "results")
    folder = write_pairs(tmp_path / "bad", make_pairs(4), unreadable=("p0", "p1", "p2", "p3"))
    with pytest.raises(ValueError, match="on its 0 readable test samples"):
        evaluate(folder, tmp_path / "results")


@pytest.mark.parametrize(
    ("encoders", "settings", "message"),
    [
        (["student"], {"kinds": ["zeroshut"]}, "did you mean 'zeroshot'"),
        (["a=student", "A=ct"], {}, "two encoders are called 'A'"),
        (["ensemble=student"], {}, "other than ensemble"),
        ([], {}, "encoders is empty"),
        (["student"], {"baselines": ["stage2"]}, "baseline 'stage2'"),
        (["student"], {"replicates": 1}, "at least 100"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(folder, tmp_path, encoders, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(folder, tmp_path / "results", encoders, **settings)
    assert not (tmp_path / "results").exists()


def test_names_come_from_sources():
    named = named_sources(["student=out/mmkd-clip", "work/teachers/ct/", "open_clip:ViT-B-32/laion2b"])
    assert named == {"student": "out/mmkd-clip", "ct": "work/teachers/ct/", "laion2b": "open_clip:ViT-B-32/laion2b"}
