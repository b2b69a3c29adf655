"""Forged feature stores whose checksums match: what `mmkd features verify` accepts, `mmkd screen` can use."""

import hashlib
import json
import random
import shutil

import numpy as np
import pytest
import torch
from damage import ROUNDS, damaged_values, outcome
from fake_encoder import make_pairs, write_pairs
from safetensors.torch import save

from mmkd.data.features.index import IdIndex, digests
from mmkd.data.features.shards import NOTES, TensorMap, _checksum, read_tensors
from mmkd.data.features.store import VectorStore, meta_sha256
from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import open_pairs
from mmkd.train import features, screen

COUNT = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pairs and the features of two teachers, all sound."""
    folder = tmp_path_factory.mktemp("sealed")
    write_pairs(folder / "pairs", [*make_pairs(COUNT // 2, "train"), *make_pairs(COUNT // 2, "test", COUNT // 2)])
    pairs = open_pairs(folder / "pairs").pairs
    for number, name in enumerate(("PLIP", "BMCA")):
        rows = torch.randn(COUNT, 8, generator=torch.Generator().manual_seed(number))
        writer = FeatureWriter(folder / "features" / name, name)
        writer.add([pair.id for pair in pairs], rows, rows)
        writer.finish({"weights": "x", "license": "MIT"})
    return folder


def forged_arrays(arrays, generator):
    """One array of a shard with other content, of another type, or of another shape; or one lost, or one more."""
    changed = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    changed["features"] = changed["features"].view(torch.float16)
    changed["fingerprints"] = torch.zeros(COUNT, 2, dtype=torch.uint16)
    name = generator.choice(sorted(changed))
    tensor = changed[name]
    changes = {
        "type": lambda: tensor.to(torch.float32),
        "narrow": lambda: tensor[..., :1].contiguous() if tensor.ndim > 1 else tensor[:, None],
        "short": lambda: tensor[:-1],
        "flat": lambda: tensor.reshape(-1),
        "turned": lambda: torch.from_numpy(np.ascontiguousarray(tensor.numpy()[::-1])),
        "infinite": lambda: torch.full_like(tensor.to(torch.float16), generator.choice([torch.nan, torch.inf])),
        "high": lambda: torch.from_numpy(np.full_like(tensor.numpy(), 255)),
        "negative": lambda: -tensor.to(torch.int64),
        "none": lambda: None,
    }
    made = changes[generator.choice(sorted(changes))]()
    changed[generator.choice([name] * 5 + ["more"])] = made
    return {key: value.clone() for key, value in changed.items() if value is not None}


def seal(store, meta, arrays=None):
    """Write shard, index and ``meta.json`` with checksums that match."""
    if arrays is not None:
        shard = store / meta["shards"][0]["file"]
        digest = _checksum({name: array.view(torch.uint8) for name, array in arrays.items()})
        shard.write_bytes(save(arrays, metadata={NOTES: json.dumps({"sha256": digest})}))
        rows = len(arrays.get("id_end", range(COUNT)))
        start = hashlib.sha256(read_tensors(shard)[0]).hexdigest()
        meta["shards"][0] |= {"header_sha256": start, "bytes": shard.stat().st_size, "rows": rows}
        meta["count"] = rows
        try:
            index = IdIndex.of(digests(VectorStore([shard]).ids))
            (store / meta["ids"]["file"]).unlink()
            meta["ids"]["file"], meta["ids"]["sha256"] = index.save(store)
        except (ValueError, KeyError, TypeError, IndexError):
            pass
    meta.pop("sha256", None)
    (store / "meta.json").write_text(json.dumps(meta | {"sha256": meta_sha256(meta)}))


@pytest.mark.parametrize("part", ["arrays", "meta"])
@pytest.mark.parametrize("seed", range(ROUNDS * 2))
def test_what_verify_accepts_can_be_screened(world, tmp_path, capsys, monkeypatch, part, seed):
    generator, wrong = random.Random(f"{part} {seed}"), []
    own = json.loads((world / "features" / "PLIP" / "meta.json").read_text())
    own.pop("sha256")
    forgeries = [None] * 6 if part == "arrays" else list(damaged_values(own, generator))
    for number, changed in enumerate(forgeries):
        folder = tmp_path / str(number)
        shutil.copytree(world / "features", folder)
        store = folder / "PLIP"
        meta = changed or json.loads((store / "meta.json").read_text())
        if part == "arrays":
            arrays = TensorMap(store / meta["shards"][0]["file"]).arrays
            seal(store, meta, forged_arrays(arrays, generator))
        else:
            try:
                seal(store, meta)
            except UnicodeEncodeError:
                continue
        verified = outcome(capsys, monkeypatch, features.ACTIONS, features.main, "verify", folder, "--quiet")
        chosen = ["--pairs", world / "pairs", "--features", folder, "--minimum_teachers", 0, "--quiet"]
        screened = outcome(
            capsys,
            monkeypatch,
            screen.ScreenSettings,
            screen.main,
            *chosen,
            "--output",
            tmp_path / f"{number}.screened",
        )
        unexpected = [errors for _, errors in (verified, screened) if "not expected" in errors]
        of_other_pairs = "of other captions or images" in screened[1]  # the store is sound, and belongs elsewhere
        if unexpected or (not verified[0] and screened[0] and not of_other_pairs):
            wrong.append((number, verified, screened))
    assert not wrong, f"{len(wrong)} of {len(forgeries)}: {wrong[:4]}"
