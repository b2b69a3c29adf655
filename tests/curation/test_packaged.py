"""The default data: present, true to its coordinates, and held out by place."""

import importlib.util
import io
import re
from collections import Counter, defaultdict

import pytest
from PIL import Image

from mmkd.curation.packaged import description, package_file, packaged_attribution, read_packaged


@pytest.fixture(scope="module")
def packaged():
    for package in ("skimage", "nibabel", "pydicom"):
        pytest.importorskip(package)
    return [
        {"file": sample.key, "caption": sample.caption, "image": sample.read_image(), **sample.metadata}
        for sample in read_packaged()
    ]


def test_enough_of_every_class(packaged):
    assert 400 <= len(packaged) <= 600
    assert len({row["modality"] for row in packaged}) >= 6
    assert 10 <= len({row["label"] for row in packaged}) <= 20
    sides = defaultdict(set)
    for row in packaged:
        sides[row["label"]].add(row["split"])
    assert all(side == {"train", "validation", "test"} for side in sides.values())
    shares = Counter(row["split"] for row in packaged)
    assert 0.5 < shares["train"] / len(packaged) < 0.7
    assert len({row["caption"] for row in packaged}) > 0.75 * len(packaged)


def test_groups_lie_on_one_side(packaged):
    sides = defaultdict(set)
    for row in packaged:
        sides[row["group"]].add(row["split"])
    assert all(len(side) == 1 for side in sides.values())


def test_no_picture_is_on_both_sides(packaged):
    pictures = defaultdict(set)
    for row in packaged:
        with Image.open(io.BytesIO(row["image"])) as picture:
            pictures[picture.tobytes()].add(row["split"])
    assert all(len(side) == 1 for side in pictures.values())


def test_slabs_are_a_gap_apart_in_all_maps(packaged):
    positions = defaultdict(lambda: defaultdict(set))
    for row in packaged:
        if found := re.match(r"images/mni152-(\w+)-(\w+)-([+-]\d+)", row["file"]):
            positions[found[2]][row["split"]].add(int(found[3]))
            assert int(found[3]) > 0 or found[2] != "sagittal"
    assert set(positions) == {plane["name"] for plane in description()["planes"]}
    for sides in positions.values():
        held_out = sides["test"] | sides["validation"]
        assert min(abs(a - b) for a in sides["train"] for b in held_out) >= 8
        assert min(abs(a - b) for a in sides["test"] for b in sides["validation"]) >= 8


def test_captions_state_the_level(packaged):
    caption = next(row["caption"] for row in packaged if row["file"] == "images/mni152-t1-axial-+012.png").lower()
    assert "12 mm" in caption
    assert "axial" in caption
    low = [row["caption"].lower() for row in packaged if "axial--04" in row["file"]]
    assert low
    assert not any("superior" in caption or "above" in caption for caption in low)


def test_attribution_names_every_package(packaged):
    text = packaged_attribution()
    assert all(name in text for name in ("scikit-image", "nilearn", "pydicom", "CC0", "do not overlap"))


def test_missing_package_says_what_to_install(monkeypatch):
    with pytest.raises(ValueError, match="this version of pydicom has no x"):
        package_file("pydicom", "x.dcm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[demo\]"'):
        package_file("nilearn", "x")
