"""A model beside its teachers on pairs whose features are stored."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from served import noise

from mmkd.data.features.index import fingerprinted
from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.table import Pair
from mmkd.serving.comparison import Comparison

CAPTIONS = ["w3 w4", "w5", "w6", "w5", "w7"]  # the second and the fourth are equal
SPLITS = ["train", "test", "test", "test", "test"]


def pair(k):
    return Pair(f"p{k}", f"{k}.png", CAPTIONS[k], modality="MRI", split=SPLITS[k])


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pairs"
    path.mkdir()
    for k in range(5):
        (path / f"{k}.png").write_bytes(noise(k))
    write_manifest(path, [pair(k) for k in range(5)])
    return path


def store(path, name, pairs, image, text):
    writer = FeatureWriter(path / name, name)
    (fingerprints,) = [own for _, own in fingerprinted(pairs)]
    writer.add([own.id for own in pairs], image, text, fingerprints)
    writer.finish({})


def test_every_encoder_ranks_the_captions_of_the_test_pairs(folder, tmp_path):
    pairs = [pair(k) for k in range(5)]
    same = torch.eye(5)
    store(tmp_path / "features", "right", pairs, 3 * same, same)
    store(tmp_path / "features", "wrong", pairs, same, same.roll(1, 0))
    compared = Comparison(open_pairs(folder), TeacherFeatures.open(tmp_path / "features"))
    assert sorted(compared.captions) == ["w5", "w6", "w7"] and compared.split == "test"
    for caption, image in zip(compared.captions, compared.images, strict=True):
        assert CAPTIONS[int(image.stem)] == caption and SPLITS[int(image.stem)] == "test"
    student = np.eye(3, dtype=np.float32)
    for place, caption in enumerate(compared.captions):
        answers = compared.answers(place, "student", student[place], student)
        assert [answer.encoder for answer in answers] == ["student", "right", "wrong"]
        for answer in answers[:2]:
            assert answer.rank == 1 and answer.captions[0] == (caption, pytest.approx(1)) and len(answer.captions) == 3
    # the wrong teacher finds for image k the caption of pair k + 1: its own one is second where that is among the three
    chosen = [int(image.stem) for image in compared.images]
    ranks = [compared.answers(k, "student", student[k], student)[2].rank for k in range(3)]
    assert ranks == [2 if number + 1 in chosen else 1 for number in chosen] and 2 in ranks
    place = chosen.index(4)  # pair 5 does not exist
    assert all(value == 0 for _, value in compared.answers(place, "student", student[0], student)[2].captions)


def test_features_must_be_of_these_pairs_and_of_every_teacher(folder, tmp_path):
    pairs, same = [pair(k) for k in range(5)], torch.eye(5)
    store(tmp_path / "changed", "a", [replace(own, caption="another") for own in pairs], same, same)
    with pytest.raises(ValueError, match="other captions"):
        Comparison(open_pairs(folder), TeacherFeatures.open(tmp_path / "changed"))
    store(tmp_path / "partial", "a", pairs[:3], same[:3], same[:3])
    store(tmp_path / "partial", "b", pairs[2:], same[2:], same[2:])
    with pytest.raises(ValueError, match="no two pairs"):
        Comparison(open_pairs(folder), TeacherFeatures.open(tmp_path / "partial"))
    store(tmp_path / "one", "a", pairs[:2], same[:2], same[:2])
    assert Comparison(open_pairs(folder), TeacherFeatures.open(tmp_path / "one")).split == "all"
