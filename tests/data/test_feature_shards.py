"""How numbers are stored: no more bytes than promised, no farther from the truth than promised."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from mmkd.data.features.index import FINGERPRINT, write_index
from mmkd.data.features.shards import TensorMap, decode, encode, header_sha256, shard_fault, write_shard


def stored_and_read(features, dtype):
    """Features (n, 2, dim) as a reader of the store gets them."""
    tensors = encode(features, dtype)
    values = tensors["features"].view(torch.uint16) if dtype == "bfloat16" else tensors["features"]
    scale = tensors["scale"].view(torch.uint16).numpy() if "scale" in tensors else None
    return decode(values.numpy(), scale, dtype).transpose(0, 1)


def test_int8_keeps_the_teachers_directions(shared_data):
    """Real features, whose few large dimensions a plain scale would round everything else to."""
    worst = {}
    for file in sorted(shared_data.glob("mmkd_clip_official/MMKDCLIP_DATA/features/*/*/clips_output.pt")):
        for name, feature in torch.load(file, weights_only=True).items():
            feature = feature.reshape(1, 1, -1).float().expand(1, 2, -1)
            read = stored_and_read(feature, "int8")
            worst[name] = min(worst.get(name, 1), cosine_similarity(feature, read, dim=-1).min().item())
            plain = (feature / feature.abs().max() * 127).round()
            worst["plain"] = min(worst.get("plain", 1), cosine_similarity(feature, plain, dim=-1).min().item())
    assert len(worst) == 17
    assert worst.pop("plain") < 0.9995
    assert min(worst.values()) >= 0.9999


@pytest.mark.parametrize("dim", [512, 768, 41, 1])
def test_int8_of_any_width_and_length(dim):
    features = (
        torch.randn(20, 2, dim, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 20)[:, None, None]
    )
    features[3] = 0
    read = stored_and_read(features, "int8")
    torch.testing.assert_close(read[3], features[3])
    kept = [k for k in range(20) if k != 3]
    assert cosine_similarity(features[kept], read[kept], dim=-1).min() >= 0.9999
    torch.testing.assert_close(read.norm(dim=-1), features.norm(dim=-1), rtol=0.01, atol=0)


@pytest.mark.parametrize(("dtype", "most"), [("float16", 2.1), ("bfloat16", 2.1), ("int8", 1.06)])
def test_bytes_a_number(tmp_path, dtype, most):
    """Everything counts: numbers, scales, headers and the index of ids as long as the published ones."""
    count, dim = 4096, 512
    features = torch.nn.functional.normalize(torch.randn(count, dim), dim=-1)
    write_shard(tmp_path / "shard.safetensors", features, features, dtype)
    write_index(tmp_path, [([f"{k:032x}" for k in range(count)], np.ones(count, FINGERPRINT))], count)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size / (2 * count * dim) <= most


def test_one_flipped_byte_anywhere_is_found(tmp_path):
    path = tmp_path / "shard.safetensors"
    write_shard(path, torch.randn(5, 8), torch.randn(5, 8), "int8", {"skipped": "{}"})
    digest = header_sha256(path)[0]
    assert shard_fault(path, 5, 8, "int8", digest) == ""
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert shard_fault(path, 5, 8, "int8", digest), position
    for size in (0, 7, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert "truncated" in shard_fault(path, 5, 8, "int8", digest)
    path.write_bytes(data + b"x")
    assert "left over" in shard_fault(path, 5, 8, "int8", digest)
    path.unlink()
    assert "missing" in shard_fault(path, 5, 8, "int8", digest)


def test_a_header_that_lies_is_refused(tmp_path):
    path = tmp_path / "shard.safetensors"
    write_shard(path, torch.randn(5, 8), torch.randn(5, 8), "float32")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"[5,2,8]", b"[9,2,8]"))
    with pytest.raises(ValueError, match="cannot be"):
        TensorMap(path)
    path.write_bytes(data.replace(b'"F32"', b'"F64"'))
    with pytest.raises(ValueError, match="F64"):
        TensorMap(path)
