"""Labels from files, and probabilities against their formulas."""

import math

import numpy as np
import pytest
import torch
from fake_encoder import FakeEncoder

from mmkd.data.prompts import class_vector, label_prompts
from mmkd.encoders.encoder import DualEncoder
from mmkd.serving import predictor as module
from mmkd.serving.calibration import Calibration
from mmkd.serving.predictor import Label, Predictor, read_labels, read_templates


class Angles(DualEncoder):
    """Texts are vectors in a plane: ``text at 30`` has an angle of 30 degrees."""

    def __init__(self, fingerprint="weights"):
        super().__init__("angles", 2, {"fingerprint": fingerprint, "logit_scale": 10.0})
        self.calls = 0

    def image_features(self, prepared):
        raise AssertionError("no image is encoded here")

    def text_features(self, texts):
        self.calls += len(texts)
        return at(*(float(text.split()[-1]) for text in texts)) * 3


def at(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float32) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


THREE = [Label("a", ("x at 0",)), Label("b", ("x at 60", "y at 120")), Label("c", ("x at 180",))]


def test_single_is_the_softmax_of_scaled_cosines():
    found = Predictor(Angles(), THREE)
    cosines = np.cos(np.deg2rad([[20, 70, 160], [100, 10, 80]]))
    expected = np.exp(10 * cosines)
    expected /= expected.sum(axis=1, keepdims=True)
    assert found.probabilities(at(20, 100)) == pytest.approx(expected, abs=1e-5)
    first, second = found.predict(at(20, 100))
    assert list(first.probabilities) == ["a", "b", "c"] and first.labels == ("a",)
    assert list(second.probabilities) == ["b", "c", "a"] and second.labels == ("b",)
    assert first.conformal_set is None and not first.abstained


def test_multilabel_is_the_sigmoid_of_with_minus_without():
    labels = [Label("a", ("x at 0",), ("no x at 90",)), Label("b", ("y at 90",), ("no y at 0",))]
    found = Predictor(Angles(), labels, mode="multilabel")
    margins = np.array([np.cos(np.deg2rad(30)) - np.cos(np.deg2rad(60))])
    expected = 1 / (1 + np.exp(-10 * np.concatenate([margins, -margins])))
    assert found.probabilities(at(30))[0] == pytest.approx(expected, abs=1e-5)
    assert found.predict(at(30))[0].labels == ("a",)
    thresholds = Calibration("weights", found.key, "multilabel", ["a", "b"], 10.0, {"a": 0.99, "b": 0.01})
    found.calibrate(thresholds)
    assert found.predict(at(30))[0].labels == ("b",)


def test_labels_without_sentences_use_templates_and_equal_the_evaluation():
    encoder = FakeEncoder("known", 0.1)
    found = Predictor(encoder, [Label("nodule", modality="CT"), Label("cyst")], ["the {} of an MRI"])
    images = torch.nn.functional.normalize(torch.randn(4, encoder.dim), dim=1)
    own = [
        class_vector(encoder.encode_texts(label_prompts("nodule", "CT")).numpy()),
        class_vector(encoder.encode_texts(["the cyst of an MRI"]).numpy()),
    ]
    assert found.similarities(images) == pytest.approx(images.numpy() @ np.stack(own).T, abs=1e-6)


def test_normal_has_labels_of_its_own():
    found = Predictor(FakeEncoder("known", 0.1), [], mode="normal")
    assert found.labels == ["normal", "abnormal"]
    assert found.probabilities(torch.eye(41)[:3]).sum(axis=1) == pytest.approx([1, 1, 1])
    with pytest.raises(ValueError, match="takes none, or two"):
        Predictor(FakeEncoder("known", 0.1), THREE, mode="normal")


def test_calibration_sets_scale_sets_and_abstention():
    found = Predictor(Angles(), THREE)
    calibration = Calibration("weights", found.key, "single", ["a", "b", "c"], 2.0, quantile=0.7, abstain_below=0.9)
    found.calibrate(calibration)
    near, between = found.predict(at(0, 45))
    values = np.exp(2 * np.cos(np.deg2rad([0, 90, 180])))
    assert near.probabilities["a"] == pytest.approx(values[0] / values.sum(), abs=1e-5)
    assert near.labels == ("a",) and near.conformal_set == ("a",) and not near.abstained
    assert between.labels == () and between.abstained and between.conformal_set == ("a", "b")
    with pytest.raises(ValueError, match="other weights"):
        Predictor(Angles("others"), THREE).calibrate(calibration)
    with pytest.raises(ValueError, match="other labels"):
        Predictor(Angles(), THREE[:2]).calibrate(calibration)
    reordered = Predictor(Angles(), THREE[::-1])  # order does not matter
    reordered.calibrate(calibration)
    assert reordered.scale == 2.0


def test_sentences_are_encoded_once_for_each_model(tmp_path, monkeypatch):
    encoder = Angles()
    first = Predictor(encoder, THREE, cache=tmp_path).probabilities(at(33))
    calls = encoder.calls
    assert Predictor(encoder, THREE, cache=tmp_path).probabilities(at(33)).tolist() == first.tolist()
    assert encoder.calls == calls
    Predictor(Angles("others"), THREE, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert not any(b"x at 60" in file.read_bytes() for file in tmp_path.iterdir())
    monkeypatch.setattr(module, "CACHED_LABEL_SETS", 2)
    Predictor(encoder, THREE[:2], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    damaged = max(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime)
    damaged.write_bytes(damaged.read_bytes()[:-3])
    Predictor(encoder, THREE[:2], cache=tmp_path)
    (tmp_path / "file").write_text("")
    Predictor(encoder, THREE, cache=tmp_path / "file")  # a cache that cannot be written is none


@pytest.mark.parametrize(
    ("labels", "mode", "text"),
    [
        (THREE[:1], "single", "needs at least 2.*--mode multilabel"),
        ([], "multilabel", "needs at least 1"),
        ([*THREE, Label(" A")], "single", "' A' occurs twice"),
        (THREE, "both", "allowed: single, multilabel, normal"),
    ],
)
def test_labels_that_cannot_work(labels, mode, text):
    with pytest.raises(ValueError, match=text):
        Predictor(Angles(), labels, mode=mode)


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\), expected \(n, 2\)"):
        Predictor(Angles(), THREE).probabilities(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("l.txt", b"\xef\xbb\xbfpneumonia\r\n\r\n  no finding \n", [Label("pneumonia"), Label("no finding")]),
        ("l.txt", "Übelkeit\n肺炎".encode(), [Label("Übelkeit"), Label("肺炎")]),
        (
            "l.csv",
            b'label,prompt,negative_prompt,modality\n"a, b",an a,no a,\nc,,,CT\n',
            [Label("a, b", ("an a",), ("no a",)), Label("c", modality="CT")],
        ),
        ("l.csv", "\ufefflabel;prompt\nä;ein ä\n".encode(), [Label("ä", ("ein ä",))]),
        (
            "l.yaml",
            b"- a\n- {label: b, prompt: [x, y], modality: CT}\n",
            [Label("a"), Label("b", ("x", "y"), (), "CT")],
        ),
        ("l.yml", b"a: an a\nb: [b1, b2]\nc: {negative_prompt: no c}\n", None),
    ],
)
def test_labels_from_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    expected = expected or [Label("a", ("an a",)), Label("b", ("b1", "b2")), Label("c", (), ("no c",))]
    assert read_labels(str(tmp_path / name)) == expected


def test_labels_from_the_command_line():
    assert read_labels("a, b c ,d,") == [Label("a"), Label("b c"), Label("d")]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (
            "l.txt",
            "Müdigkeit\nÜbelkeit".encode("latin-1"),
            r"not UTF-8 \(byte 0xfc on line 1\).*Latin-1.*save it as UTF-8",
        ),
        ("l.txt", "a\nb".encode("utf-16"), "encoded in UTF-16; save it as UTF-8"),
        ("l.csv", "label\nä".encode("cp1252"), "not UTF-8"),
        ("l.txt", "a\nb".encode("utf-16-le"), "holds zero bytes"),
        ("l.txt", b"", "holds no label"),
        ("l.csv", b"label\n", "holds no label"),
        ("l.yaml", b"", "holds no label"),
        ("l.txt", b"a\nb\nA \n", "'A' occurs twice"),
        ("l.csv", b"name\na\n", "has the columns name; it needs label"),
        ("l.csv", b"label,promt\na,b\n", "has the columns label, promt"),
        ("l.csv", b"label,prompt\na,b, c\n", "line 2: more cells than columns"),
        ("l.csv", b"label,prompt\n,b\n", "line 2: no label"),
        ("l.csv", b'label\n"a\n', "never closed"),
        ("l.yaml", b"a: [b\n", "not valid YAML"),
        ("l.yaml", b"- no\n- yes\n", "a label is False; it must be text"),
        ("l.yaml", b"- {label: a, promt: b}\n", "unknown key 'promt' .did you mean 'prompt'"),
        ("l.yaml", b"a: {prompt: 3}\n", "'a' has 3 where a sentence"),
        ("l.yaml", b"text", "must hold a list or a mapping"),
    ],
)
def test_label_files_that_are_refused(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=text):
        read_labels(str(tmp_path / name))


def test_label_sources_that_are_no_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_labels("nowhere.txt")
    with pytest.raises(ValueError, match="is not a file"):
        read_labels(str(tmp_path))
    with pytest.raises(ValueError, match="holds no label"):
        read_labels(" , ")
    monkeypatch.setattr(module, "MOST_LABEL_BYTES", 10)
    (tmp_path / "l.txt").write_text("a long text\nfile")
    with pytest.raises(ValueError, match="is larger than"):
        read_labels(str(tmp_path / "l.txt"))


def test_templates(tmp_path):
    (tmp_path / "t.txt").write_text("a {} here\n\nsee {}\n")
    assert read_templates(str(tmp_path / "t.txt")) == ["a {} here", "see {}"]
    assert read_templates("one {}, two") == ["one {}, two"]
    assert "CT slice, {}" in read_templates("CT")
    for source, error, text in (
        ("t2.txt", FileNotFoundError, "no such file"),
        ("endscopy", ValueError, "did you mean 'endoscopy'"),
    ):
        with pytest.raises(error, match=text):
            read_templates(source)
    (tmp_path / "t.txt").write_text("without\n")
    with pytest.raises(ValueError, match="the line 'without' has none"):
        read_templates(str(tmp_path / "t.txt"))
