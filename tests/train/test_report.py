import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
from fake_encoder import LABELS, FakeEncoder, make_pairs, write_pairs

import mmkd.train.eval as evaluation
import mmkd.train.report as recipe
from mmkd.data.table import Pair
from mmkd.evaluation import run as suite_run
from mmkd.files import write_json

EVIL = '<img src=https://evil.example/x onerror=alert(1)> & "quoted"'


class Page(HTMLParser):
    """Checks that tags are closed and notes what a browser would load or run."""

    VOID = ("meta", "img", "br", "link", "input", "col")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.loaded, self.handlers, self.words = [], [], [], [], []

    def handle_startendtag(self, tag, attrs):
        """Parts of a drawing, which may use others of it."""
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name == "xlink:href" and not value.startswith("#")]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parsed(html):
    found = Page()
    found.feed(html)
    assert found.open == []
    return found


def evaluate(monkeypatch, pairs, output, **settings):
    encoders = {
        "student": FakeEncoder("student", 0.4),
        "ct": FakeEncoder("ct", 0.5, blind_to=("MRI", "X-ray")),
        "mri": FakeEncoder("mri", 0.5, blind_to=("CT", "X-ray")),
        "stage1": FakeEncoder("stage1", 3.0),
        "broken": FakeEncoder("broken", nan=True),
    }
    monkeypatch.setattr(suite_run, "load_with_precision", lambda source, device, precision: encoders[source])
    settings = {"encoders": ["student", "ct", "mri", "stage1"], "replicates": 100, "quiet": True, **settings}
    evaluation.main(evaluation.EvalSettings(pairs=pairs, output=output, **settings))


def report(tmp_path, **settings):
    settings = {"results": tmp_path / "results", "pairs": tmp_path / "pairs", "quiet": True, **settings}
    recipe.main(recipe.ReportSettings(output=tmp_path / "report.html", **settings))
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_stands_alone_and_escapes_what_users_wrote(tmp_path, monkeypatch):
    pairs = [
        dataclasses.replace(p, caption=f"{p.caption} {EVIL}", modality=f"{p.modality} {EVIL}") for p in make_pairs(24)
    ]
    evaluate(monkeypatch, write_pairs(tmp_path / "pairs", pairs), tmp_path / "results", kinds=["zeroshot", "retrieval"])
    (tmp_path / "pairs/README.md").write_text(f"# Datasheet {EVIL}")
    html = report(tmp_path)
    found = parsed(html)
    assert found.loaded and all(value.startswith("data:image/jpeg;base64,") for value in found.loaded)
    assert not found.handlers and not {"iframe", "link", "object", "form"} & set(found.tags)
    assert found.tags.count("script") == 1 and "default-src &#39;none&#39;" in html
    assert "url(" not in html.replace("url(#", "") and "@import" not in html
    assert any("onerror=alert(1)" in words for words in found.words)
    assert len(html) < 3 * 1024**2


def test_the_page_says_what_it_is_and_is_not(tmp_path, monkeypatch):
    pairs = [*make_pairs(24), *make_pairs(36, "train", 24)]
    evaluate(monkeypatch, write_pairs(tmp_path / "pairs", pairs), tmp_path / "results")
    log = [
        {"step": k, "loss": 3.0 / k, "task": 2.0 / k, "feature": 1.0 / k, "learning_rate": 1e-4} for k in range(1, 30)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    (tmp_path / "settings.yaml").write_text("epochs: 3\n")
    cosines = {"same_sample_cross_teacher": {"image": 0.1, "text": None}, "image_text": {"mean": 0.4}}
    write_json(tmp_path / "align.json", {"before": cosines, "after": cosines})
    write_json(tmp_path / "screen.json", {"kept": 300, "dropped": {"too_few_teachers": 7}})
    write_json(tmp_path / "stages.json", {"curate": {"seconds": 6.5}, "distill": {"seconds": None}})
    html = report(
        tmp_path,
        stage1_log=tmp_path / "log.jsonl",
        distill_log=tmp_path / "log.jsonl",
        align_report=tmp_path / "align.json",
        screen_report=tmp_path / "screen.json",
        stages=tmp_path / "stages.json",
    )
    words = re.sub(r"\s+", " ", " ".join(parsed(html).words))
    for expected in (
        "Distillation improved on stage 1: +",
        "better than each of its 2 teachers",
        "Not a clinical result",
        "So few sources show that the pipeline works",
        "test split of ",
        "accuracy 0.",
        "Stage 2, distillation: loss",
        "same sample, two teachers: image",
        "dropped: too few teachers",
        "ensemble · all teachers together",
        "oracle · best teacher of each modality",
        "epochs: 3",
        "6.5 s",
    ):
        assert expected in words, expected
    assert html.count("<img ") == 16 + 4 * 5
    assert html == report(tmp_path, stage1_log=tmp_path / "log.jsonl", distill_log=tmp_path / "log.jsonl",
                          align_report=tmp_path / "align.json", screen_report=tmp_path / "screen.json",
                          stages=tmp_path / "stages.json", overwrite=True)  # fmt: skip


def odd(k, **fields):
    return Pair(f"p{k}", f"{k}.png", **{"caption": f"CT number {k}", "modality": "CT", "split": "test"} | fields)


@pytest.mark.parametrize(
    "pairs",
    [
        [odd(k) for k in range(6)],
        [odd(k, caption=" ", label=LABELS[k % 2], modality="") for k in range(6)],
        [odd(k, caption="word " * 5000 + str(k), label=LABELS[k], group="g") for k in range(3)],
    ],
    ids=["six images", "labels alone", "captions of 5000 words"],
)
def test_odd_folders_have_a_page(pairs, tmp_path, monkeypatch):
    evaluate(monkeypatch, write_pairs(tmp_path / "pairs", pairs), tmp_path / "results", encoders=["student"])
    html = report(tmp_path)
    parsed(html)
    assert "The student, evaluated on " in html and len(html) < 3 * 1024**2


def test_images_that_are_gone_and_a_broken_student(tmp_path, monkeypatch):
    folder = write_pairs(tmp_path / "pairs", make_pairs(12))
    evaluate(monkeypatch, folder, tmp_path / "results", encoders=["student", "ct"])
    (folder / "images/0.png").unlink()
    assert 'class="missing"' in report(tmp_path)
    evaluate(monkeypatch, folder, tmp_path / "results", encoders=["broken", "ct"])
    html = report(tmp_path, overwrite=True)
    assert "has no results on the tasks that all encoders have" in html and "that are not finite" in html


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    folder = write_pairs(tmp_path / "pairs", make_pairs(12))
    with pytest.raises(FileNotFoundError, match=r"run `mmkd eval --output"):
        report(tmp_path)
    evaluate(monkeypatch, folder, tmp_path / "results", encoders=["student"])
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"
