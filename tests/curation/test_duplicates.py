"""Duplicates against brute force, and test sets kept out of what is trained on."""

import io
import itertools
import json
import shutil

import numpy as np
import pytest
from biomedica_form import caption, facts, key, picture, sample, write_source, write_tar
from PIL import Image

from mmkd.curation.contamination import near_test_image
from mmkd.curation.duplicates import (
    Fingerprints,
    candidates,
    caption_signature,
    first_of_equals,
    hamming,
    near_components,
    similarity,
)
from mmkd.curation.part import prepare_picture
from mmkd.curation.rules import read_rules
from mmkd.curation.stream import curate
from mmkd.data.folder import open_pairs

RNG = np.random.default_rng(0)


def signature(text):
    return np.frombuffer(caption_signature(text), "<u2")


def test_bits():
    assert hamming(np.array([0, 7], np.uint64), np.array([0]), np.array([1])).tolist() == [3]


def test_the_first_of_equals_and_of_the_lowest_rank_stays():
    keys = np.array([5, 3, 5, 3, 5, 9])
    assert first_of_equals(keys, np.zeros(6)).tolist() == [0, 1, 0, 1, 0, 5]
    assert first_of_equals(keys, np.array([2, 0, 1, 0, 1, 0])).tolist() == [2, 1, 2, 1, 2, 5]
    pairs = np.array([[1, 2], [1, 3], [1, 2]], np.uint64)
    assert first_of_equals(pairs, np.zeros(3)).tolist() == [0, 1, 0]
    assert first_of_equals(np.zeros((0, 2), np.uint64), np.zeros(0)).tolist() == []


def test_candidates_are_all_pairs_of_equal_keys():
    keys = RNG.integers(0, 20, 200).astype(np.uint64)
    found = {
        tuple(pair) for left, right in candidates(keys) for pair in zip(left.tolist(), right.tolist(), strict=True)
    }
    assert found == {(a, b) for a, b in itertools.combinations(range(200), 2) if keys[a] == keys[b]}


@pytest.mark.parametrize("mode", ["image", "caption", "both"])
@pytest.mark.parametrize("distance", [0, 3])
def test_near_components_against_all_comparisons(mode, distance):
    count = 300
    base = RNG.integers(0, 1 << 63, 60, dtype=np.uint64)
    chosen = RNG.integers(0, 60, count)
    hashes = base[chosen]
    for _ in range(3):
        flips = np.uint64(1) << RNG.integers(0, 64, count).astype(np.uint64)
        hashes = np.where(RNG.random(count) < 0.4, hashes ^ flips, hashes)
    words = [f"w{number}" for number in range(400)]
    texts = [" ".join(RNG.choice(words, 60)) for _ in range(40)]
    captions = [texts[number] + RNG.choice([" end", " stop", ""]) for number in chosen % 40]
    signatures = np.stack([signature(text) for text in captions])
    digests, none = np.zeros((count, 2), np.uint64), np.zeros(count, np.int8)
    prints = Fingerprints(np.arange(count), digests, hashes, signatures, np.arange(count), none)
    parent = list(range(count))

    def root(row):
        while parent[row] != row:
            row = parent[row]
        return row

    for a, b in itertools.combinations(range(count), 2):
        image = int(hashes[a] ^ hashes[b]).bit_count() <= distance
        text = (signatures[a] == signatures[b]).mean() >= 0.8
        if {"image": image, "caption": text, "both": image and text}[mode]:
            low, high = sorted((root(a), root(b)))
            parent[high] = low
    expected = [root(row) for row in range(count)]
    component = near_components(prints, np.arange(count), mode, distance, 0.8)
    assert first_of_equals(component, none).tolist() == expected
    assert 1 < len(set(expected)) < count
    assert len(set(near_components(prints, np.arange(count), "off", distance, 0.8))) == count


def test_signatures_estimate_the_jaccard_similarity():
    words = [f"w{number}" for number in range(2000)]
    texts = [" ".join(words[:1000]), " ".join(words[100:1100]), " ".join(words[1000:])]
    stacked = np.stack([signature(text) for text in texts])
    assert similarity(stacked, np.array([0, 0]), np.array([1, 2])) == pytest.approx([900 / 1100, 0], abs=0.15)
    assert (signature("A scan, of the LUNG.") == signature("a scan of the lung")).all()


def test_perceptual_hashes_of_the_same_picture_are_near(shared_data):
    for path in sorted((shared_data / "mmkd_clip_official").rglob("*.jpg"))[:6]:
        first = prepare_picture(path.read_bytes())
        image = Image.open(path).convert("RGB")
        buffer = io.BytesIO()
        image.resize((image.width * 2 // 3, image.height * 2 // 3)).save(buffer, "JPEG", quality=70)
        second = prepare_picture(buffer.getvalue())
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        third = prepare_picture(buffer.getvalue())
        assert (first.perceptual_hash ^ second.perceptual_hash).bit_count() <= 4
        assert (first.perceptual_hash ^ third.perceptual_hash).bit_count() <= 4


def test_nearest_test_image():
    tests = RNG.integers(0, 1 << 63, 50, dtype=np.uint64)
    hashes = np.concatenate([tests[:10] ^ np.uint64(0b1011), tests[10:20] ^ np.uint64(0b1111), tests[20:30]])
    found = near_test_image(hashes, tests, 3)
    assert found.tolist() == [*range(10), *[-1] * 10, *range(20, 30)]
    assert near_test_image(hashes, tests[:0], 3).tolist() == [-1] * 30


def smaller(jpeg):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).resize((150, 112)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def test_duplicates_across_shards(tmp_path):
    again = [(f"{key(100)}.jpg", picture(0)), *sample(100)[1:]]
    near = [
        (f"{key(104)}.jpg", smaller(picture(4))),
        (f"{key(104)}.txt", caption(4) + b" ."),
        (f"{key(104)}.json", facts(104)),
    ]
    other_words = [(f"{key(108)}.jpg", smaller(picture(8))), *sample(108)[1:]]
    key_again = [(name.replace(key(112), key(4)), data) for name, data in sample(112)]
    write_tar(tmp_path / "s" / "0.tar", [m for number in (0, 4, 8) for m in sample(number)])
    write_tar(tmp_path / "s" / "1.tar", [*again, *near, *other_words, *key_again, *sample(16)])
    rules = read_rules("paper")
    report = curate(str(tmp_path / "s"), tmp_path / "pairs", rules, quiet=True)
    assert report["dropped"] == {"duplicate": 1, "duplicate_key": 1, "near_duplicate": 1}
    kept = [pair.caption for pair in open_pairs(tmp_path / "pairs").pairs]
    assert kept == [caption(number).decode() for number in (0, 4, 8, 108, 16)]
    rules = read_rules("paper", near_duplicates="image")
    report = curate(str(tmp_path / "s"), tmp_path / "by-image", rules, quiet=True)
    assert report["dropped"] == {"duplicate": 1, "duplicate_key": 1, "near_duplicate": 2}


@pytest.fixture(scope="module")
def test_set(tmp_path_factory):
    """A folder of pairs with three test images and one that is trained on: 0 as it is, 4 smaller, 8 elsewhere."""
    folder = tmp_path_factory.mktemp("evaluation")
    source = folder / "source"
    source.mkdir()
    files = {"a.jpg": picture(0), "b.jpg": smaller(picture(4)), "c.jpg": picture(900), "d.jpg": picture(12)}
    for name, data in files.items():
        (source / name).write_bytes(data)
    rows = ["a.jpg,x,g1,test", "b.jpg,x,g2,test", "c.jpg,x,PMC1005,validation", "d.jpg,x,g4,train"]
    (source / "labels.csv").write_text("\n".join(["file,label,group,split", *rows]) + "\n")
    curate(str(source), folder / "catalog" / "pairs", read_rules("list", validation_share=0.0), quiet=True)
    return folder


@pytest.mark.parametrize("form", ["pairs", "labels", "yaml", "folder of sets"])
def test_test_sets_are_kept_out(test_set, tmp_path, form, monkeypatch):
    monkeypatch.setenv("MMKD_DATA", str(test_set))
    source = write_source(tmp_path / "s", shards=2)
    catalog = tmp_path / "catalog"
    catalog.mkdir()
    (catalog / "there.yaml").write_text("id: x\nsource: {csv: '${DATA}/source'}\n")
    (catalog / "absent.yaml").write_text("id: y\nsource: {imagefolder: '${DATA}/nothing'}\n")
    shutil.copytree(test_set / "catalog" / "pairs", catalog / "pairs")
    named = {
        "pairs": [test_set / "catalog" / "pairs"],
        "labels": [test_set / "source"],
        "yaml": [catalog / "there.yaml", catalog / "absent.yaml"],
        "folder of sets": [catalog],
    }[form]
    rules = read_rules("paper")
    report = curate(str(source), tmp_path / "pairs", rules, exclude=named, quiet=True)
    assert report["dropped"] == {
        "in_test_set_article": 1, "in_test_set_image": 1, "in_test_set_near_image": 1, "modality": 12,
    }  # fmt: skip
    assert report["kept"] == 9
    assert ("skipped" in str(report["test_sets"])) == (form in ("yaml", "folder of sets"))

    rows = [json.loads(line) for line in (tmp_path / "pairs" / "dropped.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "test_set" in row]
    assert [(row["key"], row["reason"]) for row in rows] == [
        (key(0), "in_test_set_image"), (key(4), "in_test_set_near_image"), (key(16), "in_test_set_article"),
    ]  # fmt: skip
    assert all(row["row"].endswith(f":{row['key']}") for row in rows)


def test_lists_of_articles_and_what_does_not_exist(tmp_path):
    source = write_source(tmp_path / "s", shards=1)
    (tmp_path / "articles.txt").write_text("PMC1000\nPMC1002 and nothing else\n")
    rules = read_rules("paper")
    report = curate(str(source), tmp_path / "pairs", rules, exclude=[tmp_path / "articles.txt"], quiet=True)
    assert report["dropped"] == {"in_test_set_article": 4, "modality": 6}
    with pytest.raises(FileNotFoundError, match="exclude_manifests"):
        curate(str(source), tmp_path / "other", rules, exclude=[tmp_path / "none"], quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no folders of pairs"):
        curate(str(source), tmp_path / "other", rules, exclude=[tmp_path / "empty"], quiet=True)
