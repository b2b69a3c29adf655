"""Shards: no more bytes than promised, every flipped byte found, and rows as they were written."""

import numpy as np
import pytest
import torch

from mmkd.data.features.index import FINGERPRINT
from mmkd.data.features.shards import TensorMap, checksums_match, is_whole, read_header, write_shard
from mmkd.data.features.store import VectorStore
from mmkd.data.features.writer import FeatureWriter

IDS = ["a", "b", "肺", "", "e"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bytes_a_number(tmp_path, dtype):
    """Everything counts: numbers, headers, ids and fingerprints as long as the published ones, the index."""
    count, dim = 4096, 512
    features = torch.nn.functional.normalize(torch.randn(count, dim), dim=-1)
    writer = FeatureWriter(tmp_path, "t", dtype)
    writer.add([f"{k:032x}" for k in range(count)], features, features, np.ones(count, FINGERPRINT))
    writer.finish({})
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size / (2 * count * dim) <= 2.1


def damaged(path):
    """Whether a reader or the checksums notice."""
    try:
        return not checksums_match(path, read_header(path))
    except (FileNotFoundError, ValueError):
        return True


def test_one_flipped_byte_anywhere_is_found(tmp_path):
    path = tmp_path / "shard.safetensors"
    write_shard(path, IDS, {"x": torch.randn(5, 2, 3)}, np.ones(5, FINGERPRINT), {"skipped": {"f": "corrupt"}})
    header = read_header(path).sha256
    assert is_whole(path) and not damaged(path)
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert damaged(path) or read_header(path).sha256 != header, position
    assert not is_whole(path), "its last number differs"
    for size in (0, 7, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated"):
            read_header(path)
        assert not is_whole(path)
    path.write_bytes(data + b"x")
    with pytest.raises(ValueError, match="left over"):
        read_header(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="missing"):
        read_header(path)


def test_a_header_that_lies_is_refused(tmp_path):
    path = tmp_path / "shard.safetensors"
    write_shard(path, IDS, {"x": torch.randn(5, 2, 8)})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"[5,2,8]", b"[9,2,8]"))
    with pytest.raises(ValueError, match="impossible"):
        TensorMap(path)
    path.write_bytes(data.replace(b'"F32"', b'"F64"'))
    with pytest.raises(ValueError, match="F64"):
        TensorMap(path)


def test_rows_of_several_shards_in_any_order(tmp_path):
    values = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    bounds, files = [(0, 4), (4, 4), (4, 8), (8, 9)], []
    for k, (begin, end) in enumerate(bounds):
        arrays = {"vectors": torch.from_numpy(values[begin:end])}
        arrays |= {"pooled": 2 * arrays["vectors"]} if k in (1, 2) else {}
        files.append(tmp_path / str(k))
        write_shard(files[-1], [f"k{row}" for row in range(begin, end)], arrays)
    for keep_open in (True, False):
        store = VectorStore(files, keep_open=keep_open)
        assert len(store) == 9 and store.has("pooled") and not store.has("tokens")
        for rows in ([8, 0, 5, 5, 3], [2, 3, 4, 5], [7], [], [-1, 1]):
            expected = np.where(np.array(rows)[:, None] < 0, 0, values[rows]) if rows else values[:0]
            np.testing.assert_array_equal(store.gather("vectors", np.array(rows, dtype=np.int64)), expected)
        pooled = store.gather("pooled", np.array([8, 5, 0]))
        np.testing.assert_array_equal(pooled[1], 2 * values[5])
        assert np.isnan(pooled[[0, 2]]).all(), "shards without an array that others have"
        assert np.isnan(store.gather("pooled", np.array([0, 1]))).all()


def test_arrays_of_another_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match="x has 4 rows for 5 ids"):
        write_shard(tmp_path / "x", IDS, {"x": torch.ones(4, 2)})
    assert not list(tmp_path.iterdir())
