import json

import pytest
import torch

from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import PairFolder
from mmkd.data.provenance import teachers_of
from mmkd.data.table import Pair
from mmkd.student.folder import (
    MOST_VALUES,
    describe_pairs,
    read_provenance,
    starting_weights,
    training_provenance,
    write_provenance,
)


def store(folder, name, provenance):
    writer = FeatureWriter(folder / name, name)
    writer.add(["a", "b"], torch.ones(2, 3), torch.ones(2, 3))
    writer.finish(provenance)


def test_teachers_are_named_once_with_their_licenses(tmp_path):
    store(tmp_path / "raw", "PLIP", {"license": "not declared", "weights": "vinid/plip", "pooling": "eos"})
    raw = {"teacher": "UniMedCLIP", "license": "CC BY-NC 4.0"}
    store(tmp_path / "aligned", "UniMedCLIP", {"aligner": "procrustes", "width_before": 3, "raw": raw})
    store(tmp_path / "aligned", "PLIP", {"aligner": "procrustes", "width_before": 3, "raw": {}})
    found = teachers_of([tmp_path / "raw", None, tmp_path / "aligned"])
    assert found == [{"teacher": "PLIP", "license": "not declared", "weights": "vinid/plip"}, raw]
    assert [row["teacher"] for row in teachers_of([tmp_path / "aligned"], ["PLIP"])] == ["PLIP"]
    assert teachers_of([tmp_path / "aligned" / "PLIP"])[0]["license"] == "not stated"


def test_the_published_features_name_teachers_that_are_known(tmp_path):
    line = {"id": "1", "folderid": "f", "imgpath": "1.png", "txt": "t", "available_clips": ["MedCLIP", "Other"]}
    (tmp_path / "meta.jsonl").write_text(json.dumps(line))
    medclip, other = teachers_of([tmp_path])
    assert medclip["license"] == "BSD (the code's)"
    assert other == {"teacher": "Other", "license": "not stated"}


def test_pairs_are_counted_and_nothing_of_a_single_one_is_told(tmp_path):
    pairs = [
        Pair(f"secret-{k}", f"{k}.png", "a caption", "MRI", group="patient-7", source=f"source {k}", license="CC0")
        for k in range(MOST_VALUES + 3)
    ]
    described = describe_pairs(PairFolder(tmp_path, tmp_path, pairs))
    assert described["licenses"] == {"CC0": MOST_VALUES + 3}
    assert described["groups"] == 1
    assert described["sources"]["others"] == 3
    assert not any(word in json.dumps(described) for word in ("secret", "patient", "caption", str(tmp_path)))


def test_a_chain_of_folders_is_kept_without_their_places(tmp_path):
    pairs = PairFolder(tmp_path, tmp_path, [Pair("a", "a.png", "caption")])
    first, second = tmp_path / "stage1", tmp_path / "plain"
    first.mkdir(), second.mkdir()
    write_provenance(first, training_provenance("pretrain", pairs, ["packaged:all-minilm-l6-v2"]))
    told = training_provenance("distill", pairs, [str(first), str(second), "owner/model"])
    assert [start["weights"] for start in told["started_from"]] == ["stage1", "plain", "owner/model"]
    assert told["started_from"][0]["provenance"]["started_from"][0]["license"].startswith("Apache-2.0")
    assert "provenance" not in told["started_from"][1]
    assert str(tmp_path) not in json.dumps(told)
    assert starting_weights("owner/model")["license"] == "not stated"


def test_a_broken_provenance_is_named(tmp_path):
    assert read_provenance(tmp_path) == {}
    (tmp_path / "provenance.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, not a list"):
        read_provenance(tmp_path)
