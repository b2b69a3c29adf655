"""``mmkd calibrate`` and its use by ``mmkd predict``."""

import json
import shutil

import numpy as np
import pytest
from fake_encoder import FakeEncoder, make_pairs, write_pairs

from mmkd.command.settings import parse
from mmkd.data.table import Pair
from mmkd.hub import calibrate as recipe
from mmkd.hub import predict
from mmkd.serving.calibration import CALIBRATION_FILE


@pytest.fixture(autouse=True)
def encoder(tmp_path, monkeypatch):
    """A noisy encoder of the pairs of `fake_encoder`, whatever is loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = FakeEncoder("noisy", 6.0)
    own.provenance |= {"fingerprint": "weights", "logit_scale": 100.0}
    for module in (recipe, predict):
        monkeypatch.setattr(module, "load_encoder", lambda *_: own)
    return own


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.fixture
def pairs(tmp_path):
    both = make_pairs(240, "validation") + make_pairs(240, "test", start=240)
    for k in range(0, 480, 40):
        both[k] = Pair(**{**{f: getattr(both[k], f) for f in Pair.__slots__}, "label": "something else"})
    return write_pairs(tmp_path / "pairs", both, ("p3", "p250"))


def run(model, pairs, *arguments):
    settings = [str(model), "--pairs", str(pairs), "--replicates", "100", "--device", "cpu", *map(str, arguments)]
    recipe.main(parse(recipe.CalibrateSettings, settings))
    return json.loads((model / CALIBRATION_FILE).read_text())


LABELS = "nodule,cyst,effusion,healthy"


def test_calibration_improves_and_covers_and_is_used(model, pairs, encoder, capsys):
    content = run(model, pairs, "--labels", LABELS, "--alpha", "0.2")
    (entry,) = content["sets"].values()
    test = entry["report"]["test"]
    assert entry["report"]["images"] == {"validation": 233, "test": 233} and entry["images"] == 233
    assert test["ece"]["value"] < entry["report"]["uncalibrated"]["ece"]["value"]
    assert test["brier"]["value"] < entry["report"]["uncalibrated"]["brier"]["value"]
    assert test["coverage"]["high"] >= 0.8 and test["coverage"]["value"] > 0.72
    assert test["set_size"]["value"] < 4 and 0 < entry["scale"] < 100
    assert all(own["low"] <= own["value"] + 0.05 and own["value"] <= own["high"] + 0.05 for own in test.values())
    shown = capsys.readouterr()
    assert "coverage" in shown.out and "left out 1: " in shown.err
    assert str(pairs) not in (model / CALIBRATION_FILE).read_text()
    images = pairs / "images"
    command = [str(images), "--model", str(model), "--labels", "healthy,cyst,nodule,effusion", "--format", "json"]
    predict.main(parse(predict.PredictSettings, [*command, "--quiet"]))
    found = json.loads(capsys.readouterr().out)
    assert all(set(one["conformal_set"]) <= set(one["probabilities"]) for one in found)
    assert all(bool(one["labels"]) != one["abstained"] for one in found)
    assert np.mean([one["abstained"] for one in found]) < 0.15
    predict.main(parse(predict.PredictSettings, [*command, "--quiet", "--calibration", "none"]))
    assert {one["conformal_set"] for one in json.loads(capsys.readouterr().out)} == {None}
    encoder.provenance["fingerprint"] = "others"
    with pytest.raises(ValueError, match="is of other weights; run `mmkd calibrate` again"):
        predict.main(parse(predict.PredictSettings, [*command, "--quiet"]))


def test_multilabel_thresholds(model, tmp_path):
    both = make_pairs(120, "validation") + make_pairs(120, "test", start=120)
    pairs = write_pairs(tmp_path / "pairs", both)
    content = run(
        model, pairs, "--mode", "multilabel", "--thresholds", "sensitivity", "--sensitivity", "0.9", "--quiet"
    )
    (entry,) = content["sets"].values()
    assert set(entry["thresholds"]) == {"nodule", "cyst", "effusion", "healthy"}
    assert set(entry["report"]["test"]) == {"ece", "brier", "sensitivity", "specificity"}
    assert entry["report"]["test"]["sensitivity"]["value"] > 0.7
    two = run(model, pairs, "--mode", "single", "--quiet")
    assert len(two["sets"]) == 2


def test_the_labels_of_the_pairs_are_the_default_and_few_images_are_said(model, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs", make_pairs(8, "validation"))
    content = run(model, pairs, "--alpha", "0.05")
    (entry,) = content["sets"].values()
    assert entry["labels"] == ["cyst", "effusion", "nodule"] and entry["quantile"] is None
    shown = capsys.readouterr().out
    assert "too few images for sets at alpha 0.05" in shown and "nothing is reported" in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--alpha", "0"], "--alpha is 0.0; it must be above 0 and below 1"),
        (["--sensitivity", "1.5"], "--sensitivity is 1.5"),
        (["--abstain", "1"], "--abstain is 1.0"),
        (["--replicates", "10"], "--replicates is 10"),
        (["--labels", "unknown,others"], "0 readable validation images have one of the labels"),
        (["--labels", "nodule"], "needs at least 2"),
        (["--output", "nowhere"], "nowhere is no folder for calibration.json"),
    ],
)
def test_what_is_refused(model, pairs, arguments, text):
    with pytest.raises(ValueError, match=text):
        run(model, pairs, *arguments)
    assert not (model / CALIBRATION_FILE).exists()


def test_pairs_without_validation_labels(model, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", make_pairs(8, "test"))
    with pytest.raises(ValueError, match=r"no validation pair of .* has a label"):
        run(model, pairs)
    shutil.rmtree(pairs)
    with pytest.raises(FileNotFoundError, match="holds neither"):
        run(model, pairs)
