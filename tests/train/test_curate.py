"""The curate stage through the command a user types."""

import resource
import subprocess
import sys

import numpy as np
import pytest
from biomedica_form import write_source
from PIL import Image

from mmkd.data.folder import open_pairs


def curate(*arguments, **options):
    command = [sys.executable, "-m", "mmkd.train.curate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    rows = [f"{number}.png,patient {number % 2}" for number in range(6)]
    (folder / "labels.csv").write_text("\n".join(["file,label", *rows]) + "\n")
    return folder


def test_six_images(source, tmp_path):
    done = curate("--source", source, "--output", tmp_path / "pairs")
    assert done.returncode == 0, done.stderr
    assert "6 pairs (train 3, validation 1, test 2); dropped: none" in done.stdout
    assert len(open_pairs(tmp_path / "pairs").pairs) == 6
    again = curate("--source", source, "--output", tmp_path / "pairs")
    assert (again.returncode, again.stdout) == (0, done.stdout)
    other = curate("--source", source, "--output", tmp_path / "pairs", "--max_pairs", 4)
    assert (other.returncode, other.stderr.count("\n")) == (1, 1)
    assert "--overwrite true" in other.stderr
    replaced = curate("--source", source, "--output", tmp_path / "pairs", "--overwrite", "--max_pairs", 4, "--quiet")
    assert (replaced.returncode, replaced.stdout, replaced.stderr) == (0, "", "")
    assert len(open_pairs(tmp_path / "pairs").pairs) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "nowhere"], "no such folder"),
        (["--source", "source", "--max_pair", "3"], "did you mean 'max_pairs'"),
        (["--source", "source", "--minimum_side", "0"], "minimum_side"),
        (["--source", "source", "--mentions", "2"], "--mentions"),
    ],
)
def test_errors_are_one_line(source, tmp_path, arguments, message):
    done = curate("--output", "pairs", *arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert ": error: " in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "pairs").exists()


def test_a_disk_that_takes_no_more_leaves_no_output(source, tmp_path):
    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = curate("--source", source, "--output", tmp_path / "pairs", "--quiet", preexec_fn=small_files_only)
    assert done.returncode == 1
    assert ": error: " in done.stderr
    assert "File too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.parts", "source"]


def test_output_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = curate("--source", source, "--output", tmp_path / "file" / "pairs", "--quiet")
    assert done.returncode == 1
    assert ": error: " in done.stderr
    assert done.stderr.count("\n") == 1


def test_packaged(tmp_path):
    pytest.importorskip("nilearn")
    done = curate("--source", "packaged", "--output", tmp_path / "pairs", "--quiet")
    assert done.returncode == 0, done.stderr
    assert len(open_pairs(tmp_path / "pairs").pairs) > 400
    assert (tmp_path / "pairs" / "ATTRIBUTION.md").is_file()


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--resources.mem_gb", "4"], "allotted by slurm and ray"),
        (["--preset", "papre"], "neither paper, list, any nor a file"),
        (["--panel_types", "both"], "panel_types"),
        (["--image_distance", "20"], "image_distance"),
        (["--near_duplicates", "some"], "near_duplicates"),
        (["--exclude_manifests", "nowhere"], "no such file"),
    ],
)
def test_wrong_rules_are_one_line(tars, tmp_path, arguments, message):
    done = curate("--source", tars, "--output", "pairs", *arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tars"]
