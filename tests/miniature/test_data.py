"""Who sees which images, and how captions become wrong."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mmkd.data.table import Pair
from mmkd.miniature.data import SHARES, assign, find_collections, near_unseen, read_collection, with_noise


def pairs(collections=("a", "b"), labels=("x", "y"), each=200, images_of_a_group=2):
    return [
        Pair(
            id=f"{name}/{label}{k}",
            image=f"{label}{k}.png",
            caption=f"{name} {label} {k % 7}",
            label=label,
            group=f"{name}/{label}{k // images_of_a_group}",
            source=name,
        )
        for name in collections
        for label in labels
        for k in range(each)
    ]


def test_groups_stay_whole_and_every_label_has_its_shares():
    rows = pairs()
    parts = assign(rows, 1)
    of_group = {}
    for pair, part in zip(rows, parts, strict=True):
        assert of_group.setdefault(pair.group, part) == part
    for name in "ab":
        for label in "xy":
            counts = Counter(
                p for pair, p in zip(rows, parts, strict=True) if (pair.source, pair.label) == (name, label)
            )
            shares = [counts[part] / 200 for part in ("teachers", "student", "validation", "test")]
            np.testing.assert_allclose(shares, SHARES, atol=0.011)
    assert (parts == assign(rows, 1)).all()
    assert (parts != assign(rows, 2)).any()


def test_wrong_captions_are_of_another_label_or_collection_and_a_larger_share_keeps_a_smaller_one():
    rows = pairs(each=50, images_of_a_group=1)
    noise, more = with_noise(rows, 0.2, 3), with_noise(rows, 0.4, 3)
    assert Counter(noise.kind.tolist()) == {"right": 160, "within": 20, "other": 10, "vague": 10}
    of_caption = {pair.caption: (pair.source, pair.label) for pair in rows}
    for pair, changed, kind in zip(rows, noise.pairs, noise.kind, strict=True):
        source, label = of_caption.get(changed.caption, ("", ""))
        assert {
            "right": changed == pair,
            "within": source == pair.source and label != pair.label,
            "other": source not in ("", pair.source),
            "vague": source == "",
        }[kind]
        assert replace(changed, caption=pair.caption) == pair
    replaced = noise.kind != "right"
    assert [more.pairs[k] for k in np.flatnonzero(replaced)] == [noise.pairs[k] for k in np.flatnonzero(replaced)]


def test_a_collection_with_one_label_gets_vague_captions_instead():
    assert set(with_noise(pairs(labels=("x",), each=40), 0.5, 0).kind.tolist()) == {"right", "other", "vague"}


def write_collection(folder, rows, header="file,modality,label,caption,group"):
    folder.mkdir(parents=True)
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def test_lists_are_read_with_captions_of_their_own_or_of_the_label(tmp_path):
    write_collection(tmp_path / "mr", ["1.png,MRI,glioma,,p1", "2.png,MRI,glioma,Two  words,p1", "3.png,MRI,n/a,,"])
    read = {pair.image: pair for pair in read_collection(tmp_path / "mr", 10, 0)}
    assert "glioma" in read["1.png"].caption.lower()
    assert read["2.png"].caption == "Two words"
    assert read["3.png"].label == read["3.png"].caption == ""
    assert read["1.png"].group == read["2.png"].group != read["3.png"].group
    assert len(read_collection(tmp_path / "mr", 2, 0)) <= 2
    write_collection(tmp_path / "odd", ["1.png"], "image")
    with pytest.raises(ValueError, match="it needs file"):
        read_collection(tmp_path / "odd", 10, 0)


def test_too_few_collections_are_refused(tmp_path):
    write_collection(tmp_path / "a", ["1.png,MRI,x,,"])
    with pytest.raises(FileNotFoundError, match="3 are needed"):
        find_collections([tmp_path])


def test_images_that_are_nearly_equal_to_an_unseen_one_are_found():
    generator = np.random.default_rng(0)
    smooth = np.kron(generator.integers(0, 255, (3, 8, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    brighter = np.clip(smooth[:1].astype(int) + 4, 0, 255).astype(np.uint8)
    images = np.concatenate([smooth, brighter])
    assert near_unseen(images, np.array([False, False, False, True])).tolist() == [True, False, False, False]
