"""Datasets from manifests, judged one after another: means, marks, per-sample scores, resume, several processes."""

import json
from pathlib import Path

import fake_suite
import numpy as np
import pyarrow.parquet
import pytest
import torch
from fake_suite import ENCODERS, evaluate, write_datasets

from mmkd.data.features.writer import FeatureWriter
from mmkd.evaluation import run as suite_run
from mmkd.files import read_json


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def loads_fakes(monkeypatch):
    for encoder in ENCODERS.values():
        encoder.calls = 0
    monkeypatch.setattr(suite_run, "load_with_precision", fake_suite.load)


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("first") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite_run, "load_with_precision", fake_suite.load)
        return output, evaluate(data, output)


def primary_metric(summary, task, row):
    return summary["tasks"][task]["rows"][row]["metrics"][summary["tasks"][task]["primary_metric"]]["value"]


def test_tasks_rows_and_reasons(first):
    _, summary = first
    kinds = {task["kind"] for task in summary["tasks"].values()}
    assert {"zeroshot-lungs", "probe-lungs", "retrieval-notes"} <= set(summary["tasks"])
    assert kinds == {"zeroshot", "probe", "retrieval"}
    task = summary["tasks"]["zeroshot-lungs"]
    assert (task["dataset"], task["modality"], task["units"]["image"]["n"]) == ("lungs", "CT", 47)
    assert "example.org/gone" in summary["skipped_datasets"]["gone"]
    assert list(summary["unreadable"]) == ["lungs/lungs:images/3.png"]
    assert primary_metric(summary, "zeroshot-lungs", "student") > primary_metric(summary, "zeroshot-lungs", "weak")
    assert summary["datasets"]["lungs"]["splits"]["counts"]["train"]["pairs"] == 48


def test_means_are_over_what_every_encoder_has(first):
    _, summary = first
    main = {name: task for name, task in summary["tasks"].items() if not task["variant"]}
    overall = summary["means"]["all"]["overall"]
    assert set(overall["tasks"]) == set(main) and overall["n"] == len(main)
    kinds = [
        np.mean([primary_metric(summary, n, "student") for n, t in main.items() if t["kind"] == kind])
        for kind in ("zeroshot", "probe", "retrieval")
    ]
    assert overall["rows"]["student"]["value"] == pytest.approx(np.mean(kinds))
    found = overall["differences"]["weak"]
    expected = overall["rows"]["student"]["value"] - overall["rows"]["weak"]["value"]
    assert found["difference"] == pytest.approx(expected) and found["low"] > 0
    by_modality = summary["means"]["all"]["by_modality"]
    assert set(by_modality) == {"CT", "MRI"} and by_modality["MRI"]["tasks"] == ["retrieval-notes"]
    assert summary["best_teachers"]["CT"]["row"] == "good"
    probe = next(task for name, task in main.items() if task["kind"] == "probe")
    assert 1e-6 <= probe["rows"]["student"]["fitted"]["c"][0] <= 1e6 and "fitted" not in probe["rows"]["oracle"]
    counts = summary["win_tie_loss"]["weak"]
    assert counts["win"] >= 1 and counts["win"] + counts["tie"] + counts["loss"] == counts["tasks"] == len(main)


def test_the_report_tells_the_means_of_the_summary(first):
    output, summary = first
    page, text = ((output / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    own = summary["means"]["all"]["overall"]["rows"]["student"]
    stated = f"{own['value']:.2f} ({own['low']:.2f} to {own['high']:.2f})"
    assert stated in text and f"{own['value']:.2f}" in page.partition("<table")[2]
    assert "example.org/gone" in page and "content_sha256" in page and "gone" in text


def test_a_dataset_without_a_requested_task_is_not_embedded(data, tmp_path):
    summary = evaluate(data, tmp_path / "results", kinds=["zeroshot"])
    assert "it is evaluated by retrieval, not by zeroshot" in summary["skipped_datasets"]["notes"]
    assert not list((tmp_path / "results").rglob("*notes*"))


def test_tasks_embed_what_they_need_and_reuse_what_is_there(data, tmp_path, capsys):
    student, both = ENCODERS["student"], {"names": ("lungs",), "encoders": ("student",)}
    evaluate(data, tmp_path / "results", kinds=["zeroshot"], **both)
    description = read_json(tmp_path / "results/tasks/zeroshot-lungs.json")
    sentences = {text for own in description["prompts"].values() for text in own}
    assert student.calls == 47 + len(sentences)
    evaluate(data, tmp_path / "results", kinds=["zeroshot", "probe"], **both)
    assert student.calls == 47 + len(sentences) + 48 + 24
    assert f"report: {tmp_path / 'results/report.html'}" in capsys.readouterr().out


def test_scores_of_samples(first):
    output, summary = first
    table = pyarrow.parquet.read_table(output / "scores/student/zeroshot-lungs.parquet").to_pydict()
    assert len(table["id"]) == 47 and set(table["unit"]) == {"image"}
    right = [target == prediction for target, prediction in zip(table["target"], table["prediction"], strict=True)]
    assert table["score"] == [float(own) for own in right]
    accuracy = summary["tasks"]["zeroshot-lungs"]["rows"]["student"]["metrics"]["accuracy"]["value"]
    assert np.mean(right) == pytest.approx(accuracy)
    ranks = pyarrow.parquet.read_table(output / "scores/student/retrieval-notes.parquet").to_pydict()
    assert set(ranks["unit"]) == {"image", "caption"} and set(ranks["target"]) == {None}


def test_the_lock_names_all_a_result_depends_on(first):
    output, summary = first
    lock = read_json(output / "repro.lock")
    assert set(lock["datasets"]) == {"lungs", "notes"} and set(lock["encoders"]) == set(ENCODERS)
    assert lock["encoders"]["good"]["fingerprint"] == summary["encoders"]["good"]["fingerprint"]
    assert all(len(own["manifest_sha256"]) == len(own["content_sha256"]) == 64 for own in lock["datasets"].values())


def test_a_second_run_embeds_nothing_and_gives_the_same_bytes(data, first, tmp_path):
    output, _ = first
    files = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in output.rglob("encoders/**/*.*")}
    summary = (output / "summary.json").read_bytes()
    evaluate(data, output)
    assert all(encoder.calls == 0 for encoder in ENCODERS.values())
    assert files == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in output.rglob("encoders/**/*.*")}
    assert summary == (output / "summary.json").read_bytes()
    broken = next((output / "embeddings/student/notes").glob("images-*"))
    broken.write_bytes(broken.read_bytes()[:100])
    evaluate(data, output)
    assert ENCODERS["student"].calls == 24 and ENCODERS["good"].calls == 0
    assert summary == (output / "summary.json").read_bytes()


@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_a_damaged_result_is_computed_anew(data, tmp_path, ending):
    output = tmp_path / "results"
    evaluate(data, output)
    files = {p: p.read_bytes() for p in output.rglob("encoders/**/*.*")}
    damaged = sorted(p for p in files if p.suffix == f".{ending}")
    for number, path in enumerate(damaged):
        content = bytearray(files[path])
        content[len(content) * (number + 1) // (len(damaged) + 2)] ^= 1
        path.write_bytes(bytes(content) if number else b"")
    evaluate(data, output)
    assert files == {p: p.read_bytes() for p in output.rglob("encoders/**/*.*")}


def test_marks_of_contamination_and_means_without(data, tmp_path, monkeypatch):
    monkeypatch.setattr(suite_run, "contaminated", lambda name, manifest: (name, manifest.id) == ("weak", "lungs"))
    summary = evaluate(data, tmp_path / "results", kinds=["zeroshot", "retrieval"])
    marks = {name: task["contaminated"] for name, task in summary["tasks"].items()}
    assert set(marks["zeroshot-lungs"]) == {"weak"} and marks["retrieval-notes"] == {}
    assert summary["means"]["clean"]["overall"]["tasks"] == ["retrieval-notes"]
    assert summary["means"]["all"]["overall"]["n"] == 2


def test_a_store_of_features_answers_what_it_can(data, tmp_path):
    from mmkd.evaluation.datasets.dataset import open_dataset
    from mmkd.evaluation.datasets.manifest import read_manifest

    pairs = [
        pair
        for name in ("lungs", "notes")
        for pair in open_dataset(read_manifest(data / f"{name}.yaml"), data).pairs
        if pair.id != "lungs:images/3.png"
    ]
    writer = FeatureWriter(tmp_path / "store", "good", "float32")
    vectors = torch.randn(len(pairs), 8, generator=torch.Generator().manual_seed(0))
    writer.add([pair.id for pair in pairs], vectors, vectors + 0.01)
    writer.finish({"teacher": "good"})
    sources = ("student", f"kept=features:{tmp_path / 'store'}")
    summary = evaluate(data, tmp_path / "results", sources, kinds=["zeroshot", "probe", "retrieval"])
    rows = {name: task["rows"]["kept"] for name, task in summary["tasks"].items()}
    assert "no vectors of" in rows["zeroshot-lungs"]["undefined"] and "sentences" in rows["zeroshot-lungs"]["undefined"]
    assert rows["probe-lungs"]["undefined"] is None
    assert rows["retrieval-notes"]["metrics"]["mean_recall"]["value"] == 1.0
    assert "zeroshot-lungs" not in summary["means"]["all"]["overall"]["tasks"]
    assert not (tmp_path / "results/scores/kept/zeroshot-lungs.parquet").exists()
    with pytest.raises(FileNotFoundError, match=r"features:.*store"):
        evaluate(data, tmp_path / "other", (f"kept=features:{tmp_path}",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": Path("pairs")}, "pairs and datasets given"),
        ({"questions": Path("q.json")}, "--questions belongs to --pairs"),
        ({"names": ("gone",)}, "none of the 1 datasets can be evaluated"),
    ],
)
def test_wrong_settings(data, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(data, tmp_path / "results", **settings)


def test_two_workers_give_the_bytes_of_one_process(data, first, tmp_path):
    whole, _ = first
    fake_suite.DEVICES.clear()
    evaluate(data, tmp_path / "results", workers=2, tasks=3)
    assert set(fake_suite.DEVICES) == {"cpu"}  # of this process: GPUs are those of the workers
    for kind in ("encoders", "scores", "embeddings", "tasks"):
        ours = {p.relative_to(whole): p.read_bytes() for p in (whole / kind).rglob("*.*")}
        theirs = {
            p.relative_to(tmp_path / "results"): p.read_bytes() for p in (tmp_path / "results" / kind).rglob("*.*")
        }
        assert ours == theirs and ours, kind
    summaries = [read_json(folder / "summary.json") for folder in (whole, tmp_path / "results")]
    for summary in summaries:
        summary.pop("settings")
    assert json.dumps(summaries[0]) == json.dumps(summaries[1])
