"""Rules as data: modalities, licences, panels, conditions; a misspelt key is told, not ignored."""

import json

import pytest

from mmkd.curation.rules import license_family, plain_license, read_rules
from mmkd.curation.samples import DroppedError, decode_metadata


def judged(rules, key="filelist_commercial_batch_1", **values):
    values = {"article_license": "CC BY", "image_secondary_label": ["ultrasound"], **values}
    return rules.judge(key, decode_metadata(json.dumps(values).encode(), rules.fields))


def test_twenty_six_modalities():
    paper = read_rules("paper")
    assert len(paper.modalities) == 26
    assert len({c for clusters in paper.modalities.values() for c in clusters}) == 278
    for name in paper.modalities:
        assert judged(paper, image_secondary_label=[name]) == (name, "")
    for name in ("bar plot", "electron microscopy", "immunoblot", "confocal microscopy"):
        assert judged(paper, image_secondary_label=[name]) == ("", "modality")


def test_the_first_known_label_is_the_modality():
    paper = read_rules("paper")
    assert (
        judged(paper, image_secondary_label=["plot", "Light Microscopy", "immunohistochemistry"])[0]
        == "light microscopy"
    )
    assert judged(paper, image_secondary_label=["magnetic resonance", "brain"])[0] == "magnetic resonance"
    assert judged(paper, image_secondary_label="endoscopy")[0] == "endoscopy"


def test_the_cluster_decides_where_there_are_no_labels(shared_data):
    paper = read_rules("paper")
    public = json.loads((shared_data.parent / "spec" / "biomedica_cluster_labels.json").read_text())
    for cluster, entry in public.items():
        by_label = judged(paper, image_secondary_label=entry["local_class"])
        assert judged(paper, image_secondary_label=None, image_label_id=cluster) == by_label
        assert judged(paper, image_secondary_label=[], image_label_id=int(cluster)) == by_label
    assert judged(paper, image_label_id="7", image_secondary_label=["plot"]) == ("", "modality")


@pytest.mark.parametrize(
    ("license", "family"),
    [("CC BY", "commercial"), ("CC-BY-4.0", "commercial"), ("cc0", "commercial"), ("CC0 1.0", "commercial"),
     ("CC BY-SA 3.0 Unported", "commercial"), ("CC BY-ND", "commercial"), ("CC BY-NC 4.0", "noncommercial"),
     ("CC BY-NC-ND", "noncommercial"), ("NO-CC CODE", "other"), ("all rights reserved", "other")],
)  # fmt: skip
def test_licences(license, family):
    assert license_family(license) == family
    assert (judged(read_rules("paper"), article_license=license)[1] == "license") == (family != "commercial")


def test_licences_by_name_and_by_key():
    only = read_rules("paper", licenses=["CC-BY-NC"])
    assert judged(only, article_license="CC BY-NC 4.0")[1] == ""
    assert judged(only, article_license="CC BY")[1] == "license"
    assert plain_license("CC-BY-NC 4.0") == "CC BY NC"
    paper = read_rules("paper")
    assert judged(paper, article_license=None)[1] == ""
    assert judged(paper, "filelist_noncommercial_batch_2", article_license=None)[1] == "license"
    assert judged(paper, "a key of another kind", article_license=None)[1] == "license"


def test_panels_and_conditions(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "panel_types: [single]\nmodalities: [ultrasound, endoscopy]\n"
        "keep:\n- {field: article_journal, only: [Front Physiol, PLoS One]}\n"
        "drop:\n- {name: retracted, field: article_subject, any: [Retraction]}\n"
    )
    own = read_rules(str(file))
    good = {"image_panel_type": "single", "article_journal": "front physiol"}
    assert judged(own, **good) == ("ultrasound", "")
    assert judged(own, **good | {"image_panel_type": "multiple"}) == ("", "panel_type")
    assert judged(own, **good | {"article_journal": "Other"}) == ("", "keep_rule")
    assert judged(own, image_panel_type="single") == ("", "keep_rule")
    assert judged(own, **good, article_subject=["Article", "Retraction"]) == ("", "retracted")


@pytest.mark.parametrize(
    ("text", "message"),
    [("licences: [commercial]", "licences.*allowed"), ("panel_types: [both]", "panel_types"),
     ("keep: [plots]", "keep holds"),
     ("keep:\n- {field: x}", "lists no values"), ("scrub: 1", "type bool"),
     ("near_duplicates: some", "near_duplicates is .some"), ("test_share: 0.2\nvalidation_share: 0.9", "together"),
     ("minimum_words: many", "minimum_words must be of type int"), ("a: [", "not valid YAML"),
     ("minimum_words: 9\nmaximum_words: 8", "minimum_words"), ("modalities: 7", "modalities"), ("- x", "key: value")],
)  # fmt: skip
def test_wrong_rules(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rules(str(tmp_path / "own.yaml"))


def test_no_such_preset():
    with pytest.raises(FileNotFoundError, match="neither paper, list, any nor a file"):
        read_rules("papre")


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "invalid_json"), (b"{", "invalid_json"), (b"\xff{}", "invalid_json"),
     (b'{"a": ' + b"[" * 9999, "invalid_json"), (b"null", "wrong_type"), (b'{"image_panel_type": []}', "wrong_type"),
     (b'{"image_primary_label": [1]}', "wrong_type")],
)  # fmt: skip
def test_metadata_that_cannot_be_used(data, reason):
    with pytest.raises(DroppedError) as error:
        decode_metadata(data)
    assert error.value.reason == reason


def test_metadata_as_python_writes_it():
    metadata = decode_metadata(
        b'{"image_label_id": 12, "score": NaN, "image_context": {"f": ["\\ud800"]}, "label": "None"}'
    )
    assert (metadata.text("image_label_id"), metadata.text("label")) == ("12", "")
    assert metadata.context() == {"f": ["\ud800"]}
    with pytest.raises(DroppedError, match="wrong_type"):
        decode_metadata(b'{"image_context": 3}').context()
