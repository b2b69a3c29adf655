"""Captions: encodings, markup, panels, mentions, identifiers; languages."""

import doctest
import json

import pytest

from mmkd.curation import captions
from mmkd.curation.captions import (
    caption_from_labels,
    clean_caption,
    clean_text,
    decode_caption,
    language_of,
    mention_sentences,
    scrub_identifiers,
    split_panels,
)
from mmkd.curation.samples import DroppedError


@pytest.mark.parametrize(
    ("data", "text", "guessed"),
    [("Läsion".encode(), "Läsion", False), ("Läsion".encode("cp1252"), "Läsion", True), ("x", "x", False),
     ("Läsion".encode("utf-16"), "Läsion", True), ("\ufeffmit Marke".encode(), "mit Marke", False)],
)  # fmt: skip
def test_encodings(data, text, guessed):
    assert decode_caption(data) == (text, guessed)


@pytest.mark.parametrize("data", [None, b"\x00\x01", b"\x81\x8d\xff", b"\xff\xd8\xff\xe0\x00\x10JFIF"])
def test_no_text(data):
    with pytest.raises(DroppedError):
        decode_caption(data)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  A\u00a0scan\n of \tthe  lung ", "A scan of the lung"),
        ("e\u0301tude", "étude"),
        ("p &lt; 0.05 &amp;amp; n&#x2009;=&#x2009;5", "p < 0.05 & n = 5"),
        ("Effect of <italic>T. vulgaris</italic> on H<sub>2</sub>O", "Effect of T. vulgaris on H2O"),
        ('As in Figure (<xref ref-type="fig" rid="f1">1</xref>).', "As in Figure (1)."),
        ('Seen before (<xref rid="f1"/>), and after.', "Seen before, and after."),
        ("Values with p<0.05 and x > 3 stay", "Values with p<0.05 and x > 3 stay"),
        ("(A) axial, (B) coronal view", "(A) axial, (B) coronal view"),
        (
            r"Dose of \documentclass[12pt]{minimal}\usepackage{amsmath}\begin{document}$$\mu$$\end{document}g",
            "Dose of μg",
        ),
        (r"TNF-$\alpha$ and 5 \% of cells", "TNF-α and 5 % of cells"),
        ("costs $5 or $6", "costs $5 or $6"),
    ],
)
def test_clean(raw, clean):
    assert clean_caption(raw) == clean


def test_published_captions_are_left_as_they_are(shared_data):
    for path in (shared_data / "mmkd_clip_official").rglob("meta.jsonl"):
        captions = [json.loads(line)["txt"] for line in path.read_text().splitlines()]
        assert len(captions) == 8
        assert [clean_caption(caption) for caption in captions] == [" ".join(caption.split()) for caption in captions]


@pytest.mark.parametrize(
    ("caption", "split"),
    [
        ("(A) One thing. (B) Another. (C) Third.", ["(A) One thing.", "(B) Another.", "(C) Third."]),
        ("MRI. (a) Axial; (b) coronal.", ["MRI. (a) Axial", "MRI. (b) coronal."]),
        ("CT. (A, B) Before. (C) After.", ["CT. (A, B) Before.", "CT. (C) After."]),
        ("CT. (a-c) Before. (d) After.", ["CT. (a-c) Before.", "CT. (d) After."]),
        ("A plain caption.", ["A plain caption."]),
        ("Only one (A) panel.", ["Only one (A) panel."]),
        ("Control (B) and treated (A) animal.", ["Control (B) and treated (A) animal."]),
        ("(n = 5) mice and (m) males", ["(n = 5) mice and (m) males"]),
        ("Seen in (A) and (B)", ["Seen in (A) and (B)"]),
    ],
)
def test_panels(caption, split):
    assert split_panels(caption) == split


def test_mentions():
    context = {
        "f1": ['We saw it. The lesion (<xref rid="f1">1</xref>) grew. Not this. See <xref rid="f1">1</xref>.', 7],
        "f2": "x",
    }
    assert mention_sentences(context, "f1", 1) == ["The lesion (1) grew."]
    assert mention_sentences(context, "f1", 5) == ["The lesion (1) grew.", "See 1."]
    assert mention_sentences(context, "f2", 5) == mention_sentences(context, "none", 5) == []


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("Write to a.b@clinic.org", "Write to [email]"),
        ("MRN: 00123456 seen", "[id] seen"),
        ("patient ID AB-1234, SSN 123-45-6789", "[id], [id]"),
        ("on 2019-05-03, 03/05/2019 and May 3rd, 2019", "on [date], [date] and [date]"),
        ("call (555) 123-4567 now", "call [phone] now"),
        ("Patient name: Smith, John had", "[name] had"),
        ("seen by Dr. Jane Doe today", "seen by [name] today"),
        ("see https://x.org/p?id=1 there", "see [url] there"),
    ],
)
def test_identifiers(text, scrubbed):
    assert scrub_identifiers(text)[0] == scrubbed


@pytest.mark.parametrize(
    "text",
    ["a 54-year-old man, 100x magnification, 12.5 mm", "IL-6, CD34, HER2 and p53 in 2019", "case 1 and case 2",
     "at d68 post immunization (n = 12/24)", "MR image in May may show it", "grade 3/4 toxicity, 1.5-2.0 T"],
)  # fmt: skip
def test_what_is_no_identifier_stays(text):
    assert scrub_identifiers(text) == (text, 0)


def test_examples_in_docstrings():
    assert doctest.testmod(captions).failed == 0


def test_languages():
    assert language_of("Computed tomography of the chest shows a nodule in the left lower lobe.") == "en"
    assert language_of("La tomografía abdominal muestra masas en las glándulas suprarrenales.") == "es"


def test_captions_state_the_facts_and_no_more():
    sentences = {caption_from_labels("polyp", "endoscopy", str(key)) for key in range(100)}
    assert len(sentences) >= 4
    assert all("polyp" in sentence.lower() and "endoscopy" in sentence.lower() for sentence in sentences)
    assert caption_from_labels("polyp", "endoscopy", "7") == caption_from_labels("polyp", "endoscopy", "7")
    assert "unknown" not in caption_from_labels("polyp", "unknown", "1").lower()
    assert caption_from_labels("CT", "ct", "1").lower().count("ct") == 1
    assert "OCT" in caption_from_labels("", "OCT", "1")
    assert caption_from_labels("", "unknown", "1") == caption_from_labels("", "", "1") == ""
    assert caption_from_labels("{modality}", "CT", "1").count("{modality}") == 1


def test_clean_text():
    assert clean_text(" a\n\tb \x00\x07 e\u0301 日本 \u00a0🙂 ") == "a b é 日本 🙂"
