"""Whole curations of tars: the same bytes from any number of processes, machines and interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from biomedica_form import caption, key, picture, sample, write_source, write_tar

from mmkd.command.tasks import TaskSettings
from mmkd.curation import stream as engine
from mmkd.curation.part import PartWriter
from mmkd.curation.rules import read_rules
from mmkd.curation.samples import Fragment
from mmkd.curation.stream import curate
from mmkd.data.folder import open_pairs
from mmkd.data.images import open_image, read_image_bytes


def rules(**changes):
    return read_rules("paper", **changes)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def adds_up(report):
    return report["read"] + report["added_by_splitting"] == report["kept"] + sum(report["dropped"].values())


class StoppedError(Exception):
    pass


def some_units(source, output, monkeypatch, numbers):
    """A curation that is stopped when the units of these numbers are done."""

    def stopped(work, units, is_done, *_):
        left = {unit.number: unit for unit in units if not is_done(unit)}
        work([left[number] for number in numbers if number in left], lambda items: None)
        raise StoppedError

    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        patched.setattr(engine, "run_tasks", stopped)
        curate(str(source), output, rules(), quiet=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"), shards=5)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "pairs"
    report = curate(str(source), output, rules(), quiet=True)
    assert adds_up(report)
    return output


def test_pairs_in_the_order_of_the_source(undisturbed):
    folder = open_pairs(undisturbed)
    kept = [number for number in range(60) if number % 4 in (0, 2)]
    assert [pair.caption for pair in folder.pairs] == [caption(number).decode() for number in kept]
    assert [pair.group for pair in folder.pairs] == [f"PMC{1000 + number // 3}" for number in kept]
    assert {pair.modality for pair in folder.pairs} == {"computerized tomography", "light microscopy"}
    assert {pair.license for pair in folder.pairs} == {"CC BY"}
    for number, pair in zip(kept, folder.pairs, strict=True):
        assert read_image_bytes(folder.image_path(pair)) == picture(number)
        assert open_image(folder.image_path(pair)).size == (pair.width, pair.height) == (160, 120)
    report = json.loads((undisturbed / "report.json").read_text())
    assert (report["read"], report["kept"], report["dropped"]) == (60, 30, {"modality": 30})
    assert not list(undisturbed.parent.glob("*.parts"))


def test_two_processes_write_the_same_bytes(source, undisturbed, tmp_path):
    curate(str(source), tmp_path / "pairs", rules(), tasks=TaskSettings(workers=2), quiet=True)
    assert contents(tmp_path / "pairs") == contents(undisturbed)


def test_units_may_be_processed_in_any_order_and_twice(source, undisturbed, tmp_path, monkeypatch):
    for numbers in ([4, 2], [2, 0]):
        some_units(source, tmp_path / "pairs", monkeypatch, numbers)
    assert not (tmp_path / "pairs").exists()
    curate(str(source), tmp_path / "pairs", rules(), quiet=True)
    assert contents(tmp_path / "pairs") == contents(undisturbed)


def test_again_does_nothing_and_other_settings_are_refused(source, tmp_path, monkeypatch):
    output = tmp_path / "pairs"
    first = curate(str(source), output, rules(), quiet=True)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    monkeypatch.setattr(engine, "run_tasks", None)
    assert curate(str(source), output, rules(), quiet=True) == first
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    with pytest.raises(FileExistsError, match="overwrite"):
        curate(str(source), output, rules(seed=1), quiet=True)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:999] + b"~" + data[1000:]])
@pytest.mark.parametrize("suffix", [".tar", ".arrow", ".json"])
def test_a_part_that_is_not_as_it_was_written_is_made_anew(source, undisturbed, tmp_path, monkeypatch, suffix, damage):
    some_units(source, tmp_path / "pairs", monkeypatch, [0, 1, 3, 4])
    part = (tmp_path / "pairs.parts" / "000001").with_suffix(suffix)
    part.write_bytes(damage(part.read_bytes()))
    curate(str(source), tmp_path / "pairs", rules(), quiet=True)
    assert contents(tmp_path / "pairs") == contents(undisturbed)


def test_parts_of_other_settings_are_not_mixed_in(source, tmp_path, monkeypatch):
    some_units(source, tmp_path / "pairs", monkeypatch, [0, 2, 4])
    with pytest.raises(FileExistsError, match="other settings"):
        curate(str(source), tmp_path / "pairs", rules(seed=1), quiet=True)
    report = curate(str(source), tmp_path / "pairs", rules(seed=1), quiet=True, overwrite=True)
    assert report["kept"] == 30


@pytest.mark.parametrize("moment", ["curate", "write"])
def test_killed_at_any_moment(source, undisturbed, tmp_path, moment):
    """A run killed by kill -9 in the middle of its third shard, then started again."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mmkd.curation import part, stream as engine\n"
        "from mmkd.curation.rules import read_rules\n"
        f"module, name = (part, 'write_rows') if {moment!r} == 'curate' else (engine, 'write_shard')\n"
        "own, calls = getattr(module, name), []\n"
        "def slow(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        Path(sys.argv[3]).touch()\n"
        "        time.sleep(60)\n"
        "    return own(*arguments)\n"
        "setattr(module, name, slow)\n"
        "engine.curate(sys.argv[1], Path(sys.argv[2]), read_rules('paper'), quiet=True)\n"
    )
    mark = tmp_path / "mark"
    run = subprocess.Popen(
        [sys.executable, script, source, tmp_path / "pairs", mark], env=os.environ | {"PYTHONPATH": "."}
    )
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "pairs").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "pairs.parts").glob("00000?.json")}
    assert len(done) == (2 if moment == "curate" else 6)
    seen = []
    own = engine._curate_units

    def counted(parts, rules, units, progress):
        seen.extend(unit.number for unit in units)
        own(parts, rules, units, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_curate_units", counted)
        curate(str(source), tmp_path / "pairs", rules(), quiet=True)
    assert seen == ([2, 3, 4] if moment == "curate" else [])
    assert contents(tmp_path / "pairs") == contents(undisturbed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mark", "pairs", "run.py"]


def test_samples_cut_in_two_by_a_shard_and_in_any_order(tmp_path):
    whole = [member for number in (0, 4, 8) for member in sample(number)]
    write_tar(tmp_path / "s" / "0.tar", [*whole[:3], whole[3], whole[8], whole[6]])
    write_tar(tmp_path / "s" / "1.tar", [whole[7], whole[5], whole[4], sample(12)[0]])
    report = curate(str(tmp_path / "s"), tmp_path / "pairs", rules(), quiet=True)
    assert (report["kept"], report["joined_across_shards"], report["dropped"]) == (3, 2, {"no_caption": 1})
    assert adds_up(report)
    folder = open_pairs(tmp_path / "pairs")
    assert {read_image_bytes(folder.image_path(pair)) for pair in folder.pairs} == {picture(n) for n in (0, 4, 8)}


def test_tars_without_json(tmp_path):
    members = [member for number in range(4) for member in sample(number)[:2]]
    write_tar(tmp_path / "s" / "0.tar", members)
    report = curate(str(tmp_path / "s"), tmp_path / "pairs", read_rules("any"), quiet=True)
    assert report["kept"] == 4


def test_held_out_articles_stay_whole(source, tmp_path):
    chosen = rules(validation_share=0.2, test_share=0.2)
    report = curate(str(source), tmp_path / "pairs", chosen, quiet=True)
    assert set(report["contents"]["split"]) == {"train", "validation", "test"}
    splits = {}
    for pair in open_pairs(tmp_path / "pairs").pairs:
        assert splits.setdefault(pair.group, pair.split) == pair.split


def test_settings_of_captions_and_sizes(source, tmp_path):
    members = [*sample(0), (f"{key(2)}.jpg", picture(2, 400, 300)), sample(2)[2]]
    members.append((f"{key(2)}.txt", b"Two views of Mr. Smith. (A) From the left. (B) From the right."))
    write_tar(tmp_path / "s" / "0.tar", members)
    chosen = rules(split_panels=True, scrub=True, short_side=64)
    report = curate(str(tmp_path / "s"), tmp_path / "pairs", chosen, quiet=True)
    assert (report["read"], report["added_by_splitting"], report["kept"]) == (2, 1, 3)
    assert report["fixed"] == {"captions_split": 1, "identifiers_replaced": 2}
    folder = open_pairs(tmp_path / "pairs")
    assert [pair.caption for pair in folder.pairs[1:]] == [
        "Two views of [name]. (A) From the left.",
        "Two views of [name]. (B) From the right.",
    ]
    assert [open_image(folder.image_path(pair)).size for pair in folder.pairs] == [(85, 64)] * 3
    assert (tmp_path / "pairs" / "dropped.jsonl").read_text() == ""


def test_nothing_left_and_no_source(tmp_path):
    write_tar(tmp_path / "s" / "0.tar", sample(1))
    with pytest.raises(ValueError, match=r"nothing is left of the 1 samples of s; dropped: .*modality"):
        curate(str(tmp_path / "s"), tmp_path / "pairs", rules(), quiet=True)
    assert not (tmp_path / "pairs").exists()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        curate(str(tmp_path / "none"), tmp_path / "pairs", rules(), quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no tars"):
        curate(str(tmp_path / "empty"), tmp_path / "pairs", rules(), quiet=True)
    for wrong in ({"image_distance": 9}, {"test_share": 1.0}, {"caption_similarity": 0.1}, {"mentions": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
            rules(**wrong)


def test_published_samples_all_stay(shared_data, tmp_path):
    """The authors' eight samples, packed as the tar they came from, pass the paper's rules with their captions."""
    root = shared_data / "mmkd_clip_official" / "MMKDCLIP_DATA"
    pairs = open_pairs(root)
    members = []
    for pair in pairs.pairs:
        path = root / pair.image
        base = Path(pair.image).stem
        members += [(f"{base}.jpg", path.read_bytes()), (f"{base}.json", path.with_suffix(".json").read_bytes())]
        members.append((f"{base}.txt", pair.caption.encode()))
    write_tar(tmp_path / "s" / "0.tar", members)
    report = curate(str(tmp_path / "s"), tmp_path / "pairs", rules(mentions=0), quiet=True)
    assert (report["kept"], report["dropped"]) == (8, {})
    kept = open_pairs(tmp_path / "pairs").pairs
    assert [pair.caption for pair in kept] == [pair.caption for pair in pairs.pairs]
    assert {pair.modality for pair in kept} >= {"computerized tomography", "endoscopy", "light microscopy"}


def test_the_shards_are_webdatasets(undisturbed):
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    found = []
    for path in sorted((undisturbed / "shards").glob("*.tar")):
        with path.open("rb") as file:
            found += group_by_keys({"__url__": path.name, **entry} for entry in tar_file_iterator(file))
    pairs = open_pairs(undisturbed).pairs
    told = [(e["__key__"], e["txt"].decode(), json.loads(e["json"])["modality"]) for e in found]
    assert told == [(pair.id, pair.caption, pair.modality) for pair in pairs]
    assert [e["jpg"] for e in found] == [picture(number) for number in range(60) if number % 4 in (0, 2)]


def test_a_fragment_keeps_a_suffix_of_two_parts(tmp_path):
    first = Fragment("key", "place", {"image": ("nii.gz", b"pixels"), "caption": ("txt", b"a scan")})
    second = Fragment("key", "elsewhere", {"metadata": ("json", b"{}")})
    for number, fragment in enumerate((first, second)):
        PartWriter(tmp_path, number, rules()).write(iter([fragment]))
    (whole,) = engine.joined_samples(tmp_path, 2)
    assert (whole.place, whole.image_suffix, whole.read_image()) == ("place", "nii.gz", b"pixels")
    assert (whole.caption, whole.metadata) == (b"a scan", b"{}")
