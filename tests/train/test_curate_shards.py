"""The curate stage on streamed sources, through the command a user types."""

import subprocess
import sys

import pytest
from biomedica_form import picture, write_source

from mmkd.data.folder import open_pairs


def curate(*arguments, cwd):
    command = [sys.executable, "-m", "mmkd.train.curate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


@pytest.fixture
def tars(tmp_path):
    return write_source(tmp_path / "tars", shards=2)


def test_tars_follow_the_paper_unless_told_otherwise(tars, tmp_path):
    done = curate("--source", tars, "--output", "pairs", "--maximum_words", 300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pairs: 12 pairs (train 12); dropped: modality 12" in done.stdout
    again = curate("--source", tars, "--output", "pairs", "--maximum_words", 300, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    other = curate("--source", tars, "--output", "pairs", "--preset", "any", cwd=tmp_path)
    assert (other.returncode, other.stderr.count("\n")) == (1, 1)
    assert "--overwrite true" in other.stderr
    shard = curate("--source", tars, "--output", "half", "--shard", "1/2", cwd=tmp_path)
    assert "shard 1/2 is done" in shard.stdout
    assert not (tmp_path / "half").exists()


def test_a_list_is_streamed_when_asked(tmp_path):
    source = tmp_path / "list"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.jpg").write_bytes(picture(number))
    (source / "labels.csv").write_text("file,label\n0.jpg,a\n1.jpg,b\n2.jpg,c\n")
    done = curate(
        "--source", source, "--output", "pairs", "--form", "shards", "--short_side", 64, "--quiet", cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [pair.height for pair in open_pairs(tmp_path / "pairs").pairs] == [64] * 3
    refused = curate("--source", source, "--output", "other", "--scrub", cwd=tmp_path)
    assert refused.returncode == 1
    assert "--scrub is for streamed sources; add --form shards" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "3/2"], "--shard 3/2 must be i/n"),
        (["--preset", "papre"], "neither paper nor any nor a file"),
        (["--panel_types", "both"], "panel_types"),
        (["--image_distance", "20"], "image_distance"),
        (["--near_duplicates", "some"], "near_duplicates"),
        (["--exclude_manifests", "nowhere"], "no such file"),
    ],
)
def test_errors_are_one_line(tars, tmp_path, arguments, message):
    done = curate("--source", tars, "--output", "pairs", *arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tars"]
