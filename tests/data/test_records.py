"""Manifests: what is written is read, and nothing leaves the image root."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.table import Pair, in_columns, table_schema, take_rows
from mmkd.files import is_inside

PAIRS = [
    Pair("a", "x/1.png", "eine Aufnahme „März“", modality="CT", split="test", width=3, teachers=("plip", "bmca")),
    Pair("b", "2.png", "b", teachers=()),
    Pair("c", "3.png", "c"),
]


def test_round_trip(tmp_path):
    write_manifest(tmp_path, PAIRS)
    assert list(open_pairs(tmp_path).pairs) == PAIRS
    assert list(open_pairs(tmp_path, "test").pairs) == PAIRS[:1]
    before = (tmp_path / "manifest.arrow").read_bytes()
    write_manifest(tmp_path, PAIRS)
    assert (tmp_path / "manifest.arrow").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.arrow"]


@pytest.mark.parametrize("spread", [1, 7, -3])
def test_rows_are_read_in_any_order_without_a_copy_of_whole_columns(tmp_path, spread):
    count = 20_000
    write_manifest(tmp_path, (Pair(f"p{k}", f"{k}.png", f"{k:01000}") for k in range(count)))
    table, rows = open_pairs(tmp_path).pairs, (5 + spread * np.arange(1000)) % count
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        ((ids, captions),) = in_columns(take_rows(table, rows), ("id", "caption"))
    finally:
        pa.set_memory_pool(before)
    assert ids == [f"p{row}" for row in rows] and captions == [f"{row:01000}" for row in rows]
    assert 0 < pool.max_memory() < 5_000_000  # of 20


def test_images_may_lie_in_the_folder_of_another_stage(tmp_path):
    write_manifest(tmp_path / "pairs", PAIRS)
    write_manifest(tmp_path / "screened", PAIRS, images=tmp_path / "pairs" / "images")
    folder = open_pairs(tmp_path / "screened")
    assert folder.image_path(PAIRS[1]) == (tmp_path / "pairs" / "images" / "2.png").resolve()


@pytest.mark.parametrize("path", ["../x.png", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", "", "a\0b"])
def test_paths_that_leave(path, tmp_path):
    assert not is_inside(path)
    write_manifest(tmp_path, [Pair("a", path, "c")])
    with pytest.raises(ValueError, match="leaves the root of the images"):
        open_pairs(tmp_path)


@pytest.mark.parametrize("id", ["../../x", "/etc/x", "a/../../x", ""])
def test_ids_that_leave(id, tmp_path):
    """Exports name files after them."""
    write_manifest(tmp_path, [Pair(id, "1.png", "c")])
    with pytest.raises(ValueError, match="is no name of a file below a folder"):
        open_pairs(tmp_path)


def test_links_that_leave(tmp_path):
    (tmp_path / "pairs" / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "pairs" / "images" / "2.png").symlink_to(tmp_path / "secret.png")
    write_manifest(tmp_path / "pairs", PAIRS)
    with pytest.raises(ValueError, match="outside"):
        open_pairs(tmp_path / "pairs").image_path(PAIRS[1])


def test_errors_say_where(tmp_path):
    with pytest.raises(FileNotFoundError, match="mmkd curate"):
        open_pairs(tmp_path)
    write_manifest(tmp_path, PAIRS)
    with pytest.raises(ValueError, match="allowed: train, validation, test"):
        open_pairs(tmp_path, "dev")
    with pytest.raises(ValueError, match="no pairs in split 'validation'"):
        open_pairs(tmp_path, "validation")
    write_manifest(tmp_path, [PAIRS[1], dataclasses.replace(PAIRS[2], id="b")])
    with pytest.raises(ValueError, match="twice"):
        open_pairs(tmp_path)
    write_manifest(tmp_path, PAIRS)
    schema, content = table_schema({}, "images"), (tmp_path / "manifest.arrow").read_bytes()
    table = pa.ipc.open_file(pa.BufferReader(content)).read_all()  # the file is written below
    for column, values, message in (
        ("id", pa.array([1, 2, 3]), "column id is int64"),
        ("caption", pa.array(["a", None, "c"]), "column caption is string with 1 empty cells"),
        ("split", pa.array(["train", "dev", "test"]), "row 1: split 'dev' is none of"),
        ("teachers", pa.array([1, 2, 3]), "teachers"),
    ):
        place = table.column_names.index(column)
        write_file(tmp_path / "manifest.arrow", table.set_column(place, column, values), schema.metadata)
        with pytest.raises(ValueError, match=message):
            open_pairs(tmp_path)
    write_file(tmp_path / "manifest.arrow", table, {})
    with pytest.raises(ValueError, match="not of version 2; curate again"):
        open_pairs(tmp_path)


def write_file(path, table, metadata):
    """An Arrow file as somebody else might write it."""
    table = table.replace_schema_metadata(metadata)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def test_published_folder(shared_data):
    folder = open_pairs(shared_data / "mmkd_clip_official" / "MMKDCLIP_DATA")
    assert len(folder.pairs) == 8
    assert folder.pairs[0].teachers == ("BMCA", "BiomedCLIP", "UniMedCLIP", "QuiltNet", "GenMedClip")
    assert all(folder.image_path(pair).is_file() for pair in folder.pairs)
