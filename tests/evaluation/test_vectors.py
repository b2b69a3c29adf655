"""Cached vectors: what is written is what is read, row by row, before and behind the projection."""

import numpy as np
import pytest
import torch
from fake_dataset import FakeDataset
from PIL import Image

from mmkd.data.features.store import VectorStore
from mmkd.data.images import UnreadableImageError
from mmkd.data.table import Pair
from mmkd.encoders import extraction
from mmkd.encoders.encoder import DualEncoder
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.embeddings import embed as embed_module
from mmkd.evaluation.embeddings.embed import (
    DatasetInputs,
    StoredVectors,
    UndefinedMetricError,
    embed,
    read_embedded,
    rows_of,
    write_vectors,
)

KEYS = [f"k{number}" for number in range(10)]


def test_rows_in_any_order_over_several_shards(tmp_path):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, 3, generator=generator).half() for rows in (4, 0, 5, 1)]
    files = [tmp_path / str(k) for k in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        write_vectors(file, [str(k) for k in range(len(part))], {"vectors": part}, {}, [])
    vectors, whole = StoredVectors(KEYS, VectorStore(files), "vectors"), torch.cat(parts).float().numpy()
    np.testing.assert_array_equal(rows_of(vectors, KEYS, "images")[:], whole)
    for rows in ([9, 0, 5, 5, 3], [2, 3, 4, 5], [7], []):
        np.testing.assert_array_equal(rows_of(vectors, [KEYS[row] for row in rows], "images")[:], whole[rows])
    np.testing.assert_array_equal(rows_of(vectors, KEYS, "images")[3:6], whole[3:6])
    np.testing.assert_array_equal(vectors["k4"], whole[4])
    assert list(vectors) == KEYS and len(vectors) == 10 and "k10" not in vectors
    with pytest.raises(UndefinedMetricError, match="no vectors of 2 of 3 images"):
        rows_of(vectors, ["k1", "x", "y"], "images")
    with pytest.raises(ValueError, match="9 keys for 10 vectors"):
        StoredVectors(KEYS[:9], VectorStore(files), "vectors")


def test_numbers_beyond_half_precision_are_kept(tmp_path):
    vectors, files = torch.ones(2, 3), [tmp_path / "first", tmp_path / "second"]
    write_vectors(files[0], ["a", "b"], {"vectors": vectors, "pooled": vectors * 1e6}, {}, [])
    write_vectors(files[1], ["c", "d"], {"vectors": 2 * vectors}, {}, [])
    store = VectorStore(files)
    assert store.gather("vectors", np.arange(4)).dtype == np.float16
    assert store.gather("pooled", np.arange(2)).dtype == np.float32
    vectors, pooled = (rows_of(StoredVectors("abcd", store, name), "abcd", "images") for name in ("vectors", "pooled"))
    np.testing.assert_array_equal(vectors[1:3], [[1, 1, 1], [2, 2, 2]])
    np.testing.assert_array_equal(pooled[:2], np.full((2, 3), 1e6))
    assert vectors[:].shape == pooled[:].shape == (4, 3) and np.isnan(pooled[3:]).all()


class Wide(DualEncoder):
    """Its joint vector is the first half of the pooled one; some images it refuses."""

    def image_and_pooled(self, prepared):
        pooled = torch.tensor([[float(image.getpixel((0, 0))[0]), 2.0, 3.0, 4.0] for image in prepared])
        return (pooled * float("nan") if any(image.getpixel((0, 0))[0] == 99 for image in prepared) else pooled)[
            :, :2
        ], pooled

    def image_features(self, prepared):
        return self.image_and_pooled(prepared)[0]

    def text_features(self, texts):
        raise NotImplementedError


class Source(FakeDataset):
    def __init__(self, numbers):
        manifest = Manifest("toy", "retrieval", "CT", {}, "CC0-1.0")
        super().__init__(manifest, [Pair(f"p{number}", "", "") for number in numbers])

    def image(self, pair):
        if pair.id == "p5":
            raise UnreadableImageError("corrupt", "broken")
        return Image.new("RGB", (8, 8), (int(pair.id[1:]), 0, 0))

    def digest(self, pair):
        return pair.id


def test_pooled_vectors_stand_beside_joint_ones(tmp_path):
    source = Source([1, 2, 5, 7, 99, 3])
    inputs = DatasetInputs.of(source, lambda: source, [source.pairs], [], quiet=True)
    embed({"wide": Wide("wide", 2, {})}, 2, inputs.lacking({"wide": inputs.files(tmp_path, "f")}))
    found = read_embedded("wide", "f", {}, inputs, tmp_path)
    assert found.unreadable == {"p5": "corrupt"} and len(found.pooled) == 5
    kept = [pair for pair in source.pairs if pair.id in ("p1", "p2", "p7")]
    np.testing.assert_array_equal(found.pooled_matrix(kept)[:, 0], [1, 2, 7])
    np.testing.assert_allclose(np.linalg.norm(found.image_matrix(kept), axis=1), 1, atol=1e-3)
    refused = [source.pairs[4], source.pairs[5]]
    assert np.isnan(found.image_matrix(refused)).all() and np.isnan(found.pooled_matrix(refused)).all()
    assert "not finite" in found.failures[0]
    with pytest.raises(UndefinedMetricError, match="1 of 1 images"):
        found.image_matrix([source.pairs[2]])


def test_an_image_is_decoded_once_for_all_encoders(tmp_path):
    source = Source([1, 2, 7])
    read, source.image = [], lambda pair: read.append(pair.id) or Source.image(source, pair)
    inputs = DatasetInputs.of(source, lambda: source, [source.pairs[:1], source.pairs[1:]], [], quiet=True)
    files = {name: inputs.files(tmp_path / name, name) for name in ("one", "other")}
    embed({name: Wide(name, 2, {}) for name in files}, 32, inputs.lacking(files))
    assert sorted(read) == ["p1", "p2", "p7"]
    found = [read_embedded(name, name, {}, inputs, tmp_path / name) for name in ("one", "other")]
    np.testing.assert_array_equal(*(own.pooled_matrix(source.pairs)[:, 0] for own in found))
    np.testing.assert_array_equal(found[1].pooled_matrix(source.pairs)[:, 0], [1, 2, 7])


def test_a_killed_run_resumes_at_the_shard_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "SHARD_SIZE", 2)
    source = Source([1, 2, 5, 7, 9, 3, 4])
    inputs = DatasetInputs.of(source, lambda: source, [source.pairs], [], quiet=True)

    def run(folder, workers):
        monkeypatch.setattr(extraction, "share_of_cores", lambda: workers)
        embed({"wide": Wide("wide", 2, {})}, 2, inputs.lacking({"wide": inputs.files(folder, "f")}))

    run(tmp_path / "whole", 1)
    read, source.image = [], lambda pair: read.append(pair.id) or Source.image(source, pair)
    written = []

    def killed(file, *values):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file)
        write_vectors(file, *values)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(embed_module, "write_vectors", killed)
        run(tmp_path / "resumed", 3)
    read.clear()
    run(tmp_path / "resumed", 3)
    assert sorted(read) == ["p3", "p4", "p9"]
    names = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name: path.read_bytes() for path in (tmp_path / "resumed").iterdir()} and len(names) == 4
    files = {"wide": inputs.files(tmp_path / "two", "f")}
    embed({"wide": Wide("wide", 2, {})}, 2, inputs.lacking(files)[1::2])
    assert [shard.files["wide"] for shard in inputs.lacking(files)] == files["wide"][::2]
    run(tmp_path / "two", 2)
    assert names == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
