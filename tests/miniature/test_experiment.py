"""The whole experiment on pictures whose class is their colour, through the function that the command calls."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmkd.data.table import Pair
from mmkd.miniature.runs import Sizes
from mmkd.miniature.training import ARMS, DEFAULT, NO_TEACHER, SIDE, WEIGHTS, PixelBatches, augmented
from mmkd.student.embed import PixelStatistics
from mmkd.train import miniature
from mmkd.training.settings import BatchSettings

COLOURS = {"red lesion": (200, 40, 40), "green lesion": (40, 200, 40)}


@pytest.fixture(scope="module")
def collections(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("collections"), np.random.default_rng(0)
    for name in ("skin", "retina", "colon"):
        (root / name).mkdir()
        rows = ["file,modality,label,caption,group"]
        for label, colour in COLOURS.items():
            for k in range(60):
                pixels = np.clip(np.array(colour) + generator.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                file = f"{label.split()[0]}{k}.png"
                Image.fromarray(pixels).save(root / name / file)
                rows.append(f"{file},photograph,{label},,g{label}{k}")
        (root / name / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def settings(collections, tmp_path, monkeypatch):
    sizes = Sizes()
    small = {
        name: replace(getattr(sizes, name), steps=steps, batch_size=16)
        for name, steps in (("teacher", 30), ("stage1", 5), ("stage2", 10))
    }
    monkeypatch.setattr(miniature, "Sizes", lambda: Sizes(**small))
    return miniature.MiniatureSettings(
        data=[collections],
        unseen=["colon"],
        work=tmp_path / "work",
        results=tmp_path / "results",
        arms=["paper", "repaired paper", "permuted teachers", "earlier student"],
        noise=[0.2, 0.4],
        draws=1,
        seeds=1,
        image_size=32,
        workers=1,
        quiet=True,
    )


def test_the_experiment_reports_every_arm_and_resumes_to_the_same_figures(settings):
    miniature.main(settings)
    path = settings.results / "claim.json"
    found = json.loads(path.read_text())
    arms = {*settings.arms, DEFAULT, NO_TEACHER}
    assert set(found["trials"]) == arms
    assert found["control"] in arms - {DEFAULT, "paper", "repaired paper"}
    assert found["collections"] == {"seen": ["retina", "skin"], "unseen": ["colon"]}
    assert found["primary"]["contrast"] == f"{DEFAULT} - {found['control']}"
    others = {row["contrast"].rpartition(" - ")[2] for row in found["rows"]}
    assert arms - {DEFAULT} < others
    assert {"stage 1", "skin", "generalist 1", "ensemble of the teachers"} < others
    for fields in found["teachers"]["1"].values():  # colours are learned from frozen towers
        assert fields["inside"] > 0.8
    assert set(found["screening"]["0.4"]) == {"right", "within", "other", "vague"}
    assert str(settings.data[0]) not in path.read_text()
    answers = sorted(settings.work.rglob("answers.safetensors"))
    assert len(answers) == (3 + 2) * len(arms) + 3 + 3  # trials, noises; stage 1 and the earlier student of each
    removed, kept = answers[-1], answers[0].stat().st_mtime_ns
    before = removed.read_bytes()
    for file in removed.parent.iterdir():
        file.unlink()
    removed.parent.rmdir()
    miniature.main(settings)
    assert removed.read_bytes() == before
    assert answers[0].stat().st_mtime_ns == kept
    again = json.loads(path.read_text())
    assert again == found


def test_unknown_names_are_refused_before_anything_is_read(collections, tmp_path):
    settings = miniature.MiniatureSettings(data=[collections], arms=["task los alone"], work=tmp_path / "work")
    with pytest.raises(ValueError, match="'task los alone' is unknown"):
        miniature.main(settings)
    with pytest.raises(ValueError, match="collections nowhere are not there; found: colon, retina, skin"):
        miniature.main(miniature.MiniatureSettings(data=[collections], unseen=["nowhere"], work=tmp_path / "work"))
    with pytest.raises(ValueError, match="--draws is 0"):
        miniature.MiniatureSettings(data=[collections], draws=0)
    assert set(ARMS) >= {DEFAULT, NO_TEACHER}


def test_students_can_be_trained_with_their_vision_tower(settings):
    settings.arms, settings.noise, settings.train_vision = [NO_TEACHER], [0.4], True
    miniature.main(settings)
    found = json.loads((settings.results / "claim.json").read_text())
    assert found["settings"]["train_vision"]
    assert {row["contrast"] for row in found["rows"]} >= {f"{DEFAULT} - {NO_TEACHER}", f"{DEFAULT} - stage 1"}
    (folder,) = settings.work.rglob("seed-1-vision")
    start, end = (load_file(folder / name / WEIGHTS) for name in ("stage1", f"{'-'.join(DEFAULT.split())}-0"))
    names = [name for name in start if name.startswith("model.vision_model.") and start[name].ndim == 4]
    assert names and all(not start[name].equal(end[name]) for name in names)
    tuning = settings.work.rglob("draw-0/*/seed-1/*/answers.safetensors")
    assert len(list(tuning)) == 6 + 1  # three trials of both arms and stage 1, with frozen towers


def test_crops_of_a_batch_do_not_depend_on_where_training_resumed():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), "uint8"))
    world = SimpleNamespace(pixels=lambda rows: images[rows])
    pairs = [Pair(id=str(k), image="", caption="", split="train", source="", group=str(k)) for k in range(8)]
    batches = PixelBatches(
        world, np.arange(8), PixelStatistics((0.5,) * 3, (0.5,) * 3), pairs, BatchSettings(batch_size=4)
    )
    whole, rest = list(batches.epoch(1)), list(batches.epoch(1, skip=1))
    assert rest[0]["pixel_values"].equal(whole[1]["pixel_values"])
    assert not whole[1]["pixel_values"].equal(list(batches.epoch(2))[1]["pixel_values"])
    assert whole[0]["pixel_values"].shape == (4, 3, SIDE, SIDE)


def test_crops_show_a_part_of_the_image_and_mirror_half_of_them():
    ramp = torch.arange(0, 240, 10, dtype=torch.uint8).expand(200, 3, 24, 24)  # darker to the left
    crops = augmented(ramp, torch.Generator().manual_seed(0)).int()
    rising = crops[:, 0, 0, -1] > crops[:, 0, 0, 0]
    assert 60 < rising.sum() < 140
    spans = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]).abs()
    assert spans.min() > 0.5 * 230 and spans.max() <= 230 and len(spans.unique()) > 20
