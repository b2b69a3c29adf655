"""Reading what curation writes: columns instead of objects, every image by offset, epochs that resume in the middle."""

import copy
import json
import multiprocessing
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from biomedica_form import write_source
from processes import mmkd

from mmkd.command import settings
from mmkd.curation.rules import read_rules
from mmkd.curation.stream import curate
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.images import open_image
from mmkd.data.table import PairTable
from mmkd.training.batches import PairBatches
from mmkd.training.dataset import GlobalBatchSampler, PairDataset


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("reading")
    rules = read_rules("paper", validation_share=0.3)
    curate(str(write_source(root / "s", shards=4)), root / "pairs", rules, quiet=True)
    return root / "pairs"


def test_a_table_is_a_sequence_of_pairs(pairs):
    table = open_pairs(pairs).pairs
    listed = list(table)
    assert len(table) == len(listed) == 24
    assert [table[row] for row in range(24)] == listed
    assert (table[-1], table[np.int64(3)]) == (listed[-1], listed[3])
    assert list(table[5:9]) == listed[5:9]
    assert list(copy.deepcopy(table)) == listed
    assert listed[7] in table
    with pytest.raises(IndexError):
        table[24]
    train = open_pairs(pairs, "train").pairs
    assert list(train) == [pair for pair in listed if pair.split == "train"]
    assert 0 < len(train) < 24
    assert list(train.take(np.array([3, 1]))) == [train[3], train[1]]


def test_a_choice_of_pairs_points_at_the_same_images(pairs, tmp_path):
    folder = open_pairs(pairs)
    write_manifest(tmp_path / "screened", folder.pairs[2:5], images=folder.image_root)
    chosen = open_pairs(tmp_path / "screened")
    assert list(chosen.pairs) == list(folder.pairs[2:5])
    assert chosen.image_path(chosen.pairs[0]).read_bytes() == folder.image_path(folder.pairs[2]).read_bytes()


class Stacked:
    """A batch of what a model would see of images, and their captions."""

    def __call__(self, items):
        return {
            "pixels": torch.stack([item["pixel_values"] for item in items]),
            "captions": [item["caption"] for item in items],
            "index": [item["index"] for item in items],
        }


def batches(pairs, rank=0, world=1, workers=0, epoch=1, skip=0):
    folder = open_pairs(pairs)
    dataset = PairDataset(folder, 32, "random", seed=3)
    loader = PairBatches(dataset, GlobalBatchSampler(len(dataset), 8, rank, world, seed=3), Stacked(), workers)
    return list(loader.epoch(epoch, skip))


def test_epochs_are_shuffled_shared_out_and_resumed_exactly(pairs):
    whole = batches(pairs)
    assert [len(batch["index"]) for batch in whole] == [8, 8, 8]
    order = [index for batch in whole for index in batch["index"]]
    assert sorted(order) == list(range(24)) != order
    assert order != [index for batch in batches(pairs, epoch=2) for index in batch["index"]]
    for skip in (1, 2):
        for resumed, expected in zip(batches(pairs, skip=skip), whole[skip:], strict=True):
            assert resumed["index"] == expected["index"]
            assert torch.equal(resumed["pixels"], expected["pixels"])
            assert resumed["captions"] == expected["captions"]
    halves = [batches(pairs, rank, 2, skip=1) for rank in range(2)]
    for first, second, both in zip(*halves, whole[1:], strict=True):
        assert not set(first["index"]) & set(second["index"])
        assert torch.equal(torch.cat([first["pixels"], second["pixels"]]), both["pixels"])
    if "fork" in multiprocessing.get_all_start_methods():
        for worked, expected in zip(batches(pairs, workers=2), whole, strict=True):
            assert torch.equal(worked["pixels"], expected["pixels"])


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mmkd.train.pairs", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_the_pairs_command(pairs, tmp_path, capsys, monkeypatch):
    from mmkd.train import pairs as command

    def told(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmkd pairs", *map(str, arguments)])
        settings.run(command.ACTIONS, command.main)
        return capsys.readouterr().out

    first = open_pairs(pairs).pairs[0]
    assert len(told("ls", pairs, "--number", 5).splitlines()) == 5
    assert told("ls", pairs, "--search", first.caption[:40]).startswith(first.id)
    assert json.loads(told("show", pairs, "--id", first.id, "--image", tmp_path / "a.jpg"))["caption"] == first.caption
    assert (tmp_path / "a.jpg").read_bytes() == open_pairs(pairs).image_path(first).read_bytes()
    counts = json.loads(told("stats", pairs, "--json"))
    assert (counts["pairs"], counts["license"]) == (24, {"CC BY": 24})
    assert "24 images open and have their size, 24 are the original files" in told("verify", pairs, "--quiet", "false")
    told("export", "webdataset", "--pairs", pairs, "--output", tmp_path / "tars", "--shard_pairs", 10, "--quiet")
    assert sorted(path.name for path in (tmp_path / "tars").iterdir()) == ["000000.tar", "000001.tar", "000002.tar"]
    again = curate(str(tmp_path / "tars"), tmp_path / "again", read_rules("any"), quiet=True)
    assert again["kept"] == 24
    assert [p.sha256 for p in open_pairs(tmp_path / "again").pairs] == [p.sha256 for p in open_pairs(pairs).pairs]
    told("export", "manifest", "--pairs", pairs, "--output", tmp_path / "rows.parquet", "--quiet")
    rows = pq.read_table(tmp_path / "rows.parquet")
    assert rows.num_rows == 24
    assert "image" not in rows.column_names
    assert rows["sha256"].to_pylist() == [pair.sha256 for pair in open_pairs(pairs).pairs]


def test_views_are_pairs_whose_crops_depend_on_the_seed_and_the_pair_alone(pairs, tmp_path):
    from mmkd.train import pairs as command

    def views(source, name, **more):
        command.main(command.ViewsSettings(source, tmp_path / name, number=2, side=24, quiet=True, **more))
        return open_pairs(tmp_path / name)

    before, made = open_pairs(pairs), views(pairs, "views", shard_pairs=7)
    train = [pair for pair in before.pairs if pair.split == "train"]
    crops = [pair for pair in made.pairs if pair.split == "train"]
    assert [pair.id for pair in crops] == [f"{pair.id}.{k}" for pair in train for k in (1, 2)]
    assert {pair.group for pair in crops} == {pair.group or pair.id for pair in train}
    assert [pair.caption for pair in crops[::2]] == [pair.caption for pair in train]
    pixels = [open_image(made.image_path(pair)).tobytes() for pair in crops]
    assert len(set(pixels)) == len(crops) and {(pair.width, pair.height) for pair in crops} == {(24, 24)}
    for pair in (p for p in before.pairs if p.split != "train"):
        same = next(own for own in made.pairs if own.id == pair.id)
        assert made.image_path(same).read_bytes() == before.image_path(pair).read_bytes()
    write_manifest(tmp_path / "fewer", train[3:5], images=before.image_root)
    fewer, other = views(tmp_path / "fewer", "two", workers=1), views(tmp_path / "fewer", "seed", seed=1)
    hashes = [pair.sha256 for pair in fewer.pairs]
    assert hashes == [pair.sha256 for pair in crops[6:10]] and not {pair.sha256 for pair in other.pairs} & {*hashes}
    done = mmkd("pairs", "views", pairs, "--output", tmp_path / "none", "--crop_area", "1.5")
    assert done.returncode == 2 and "--crop_area is 1.5; it must be above 0 and at most 1" in done.stderr


def test_a_contact_sheet_is_one_escaped_page(pairs, tmp_path):
    from mmkd.train import pairs as command

    folder, output = open_pairs(pairs), tmp_path / "preview.html"
    changed = [replace(pair, caption=f"<script>{k}</script>") for k, pair in enumerate(folder.pairs)]
    changed[0] = replace(changed[0], image="shards/none.tar@0+9")
    write_manifest(tmp_path / "pairs", changed, images=folder.image_root)
    command.main(command.PreviewSettings(tmp_path / "pairs", output, number=99))
    page = output.read_text()
    assert page.count("data:image/jpeg;base64,") == 23 and page.count("cannot be read") == 1
    assert all(f"&lt;script&gt;{k}&lt;/script&gt;" in page for k in range(24)) and page.count("<script>") == 1
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    with pytest.raises(FileExistsError, match="--overwrite"):
        command.main(command.PreviewSettings(tmp_path / "pairs", output))
    with pytest.raises(ValueError, match=r"must end in \.html"):
        command.main(command.PreviewSettings(tmp_path / "pairs", tmp_path / "preview.png"))


def test_verify_finds_damage(pairs, tmp_path):
    import shutil

    shutil.copytree(pairs, tmp_path / "pairs")
    tar = tmp_path / "pairs" / "shards" / "000001.tar"
    first = next(pair for pair in open_pairs(pairs).pairs if pair.image.startswith("shards/000001"))
    place = open_pairs(pairs).image_path(first)
    data = bytearray(tar.read_bytes())
    data[place.offset : place.offset + 100] = bytes(100)
    tar.write_bytes(data)
    done = run("verify", tmp_path / "pairs", "--quiet")
    assert done.returncode == 1
    assert f"1 faults in {tmp_path / 'pairs'}:\n       {first.id}: its image is unsupported" in done.stderr


def test_a_table_of_another_version(pairs, tmp_path):
    import pyarrow as pa

    with pa.OSFile(str(tmp_path / "manifest.arrow"), "wb") as file:
        table = pa.table({"id": ["a"]})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ValueError, match="lacks the columns"):
        PairTable(tmp_path / "manifest.arrow")
