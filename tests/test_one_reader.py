"""One reader of pixels: every way into the project shows the same pixels of the same file."""

import csv
import importlib
import json
import sys

import numpy as np
import pytest
from authors_form import tokenizer
from medical_files import CT, MR, sample
from PIL import Image
from transformers import CLIPImageProcessorPil

from mmkd.curation.rules import read_rules
from mmkd.curation.stream import curate
from mmkd.data.folder import PairFolder, open_pairs, write_manifest
from mmkd.data.images import open_image
from mmkd.data.pixel_rules import Window
from mmkd.data.pixels import read_pixels
from mmkd.data.table import Pair
from mmkd.encoders.teacher_features import read_image
from mmkd.evaluation.datasets.dataset import open_dataset
from mmkd.evaluation.datasets.manifest import make_manifest
from mmkd.evaluation.datasets.pairs import PairsDataset
from mmkd.exporting.folder import write_usage
from modeling_mmkd import MMKDClipProcessor

FILES = ("plain.png", "deep.png", "ct.dcm", "mr.dcm", "float.tif")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An 8-bit and a 16-bit PNG, a CT, an MR and a TIFF of real numbers, listed in a table."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 48, 3), dtype=np.uint8)).save(folder / "plain.png")
    Image.fromarray(rng.normal(1200, 300, (64, 48)).astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray(rng.normal(0, 1, (64, 48)).astype(np.float32)).save(folder / "float.tif")
    (folder / "ct.dcm").write_bytes(sample(CT))
    (folder / "mr.dcm").write_bytes(sample(MR))
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "caption", "split"])
        writer.writerows([name, name, f"the picture {name}", "test"] for name in FILES)
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The modules that an exported folder brings, imported as a user does."""
    folder = tmp_path_factory.mktemp("export")
    write_usage(folder)
    assert not [path for path in folder.rglob("*.py") if "from mmkd" in path.read_text()]
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    usage = importlib.import_module("usage")
    yield usage
    sys.path[:] = before
    for name in [name for name in sys.modules if name == "usage" or name.split(".")[0] == "pixel_reader"]:
        del sys.modules[name]


def expected(files, name):
    return np.asarray(open_image(files / name))


def channels_last(image):
    return np.asarray(image.permute(1, 2, 0)) if hasattr(image, "permute") else np.asarray(image)


def test_no_file_is_clipped_to_black_or_white(files):
    for name in FILES:
        pixels = expected(files, name)
        assert pixels.std() > 20 and max((pixels == 0).mean(), (pixels == 255).mean()) < 0.5


def test_training_pixels(files):
    for name in FILES:
        assert (channels_last(read_pixels(files / name)) == expected(files, name)).all()


def test_curation_of_a_list_and_evaluation_of_its_pairs(files, tmp_path):
    curate(str(files), tmp_path / "pairs", read_rules("list"), quiet=True)
    folder = open_pairs(tmp_path / "pairs")
    assert sorted(pair.label for pair in folder.pairs) == sorted(FILES)
    dataset = PairsDataset(folder, "test")
    for pair in folder.pairs:
        assert (np.asarray(dataset.image(pair)) == expected(files, pair.label)).all()
        assert (channels_last(read_image(folder, pair)) == expected(files, pair.label)).all()


def test_extraction_and_evaluation_of_pairs_that_name_raw_files(files, tmp_path):
    pairs = [Pair(name, name, "a picture", split="test") for name in FILES]
    write_manifest(files, pairs, files)
    write_manifest(tmp_path, pairs, files)
    folder = open_pairs(tmp_path)
    assert isinstance(folder, PairFolder)
    for pair in folder.pairs:
        assert (channels_last(read_image(folder, pair)) == expected(files, pair.id)).all()
        assert (np.asarray(PairsDataset(folder, "test").image(pair)) == expected(files, pair.id)).all()


def test_evaluation_of_a_table(files):
    values = {"id": "own", "task": "classification", "modality": "CT", "license": "CC0-1.0"}
    classes = {name: [f"a {name}"] for name in FILES}
    source = {"csv": str(files / "labels.csv")}
    dataset = open_dataset(make_manifest(values | {"classes": classes, "source": source}))
    for pair in dataset.pairs:
        assert (np.asarray(dataset.image(pair)) == expected(files, pair.label)).all()
    other = open_dataset(make_manifest(values | {"classes": classes, "source": source | {"window": "bone"}}))
    for pair in other.pairs:
        assert (
            np.asarray(other.image(pair)) == np.asarray(open_image(files / pair.label, window=Window("bone")))
        ).all()
        assert (other.digest(pair) == dataset.digest(pair)) is False  # or vectors of another window would be reused


def test_the_processor_and_exported_folders(files, reader):
    processor = MMKDClipProcessor(CLIPImageProcessorPil(), tokenizer(60, model_max_length=32))
    encoder = object.__new__(reader.Encoder)
    encoder.metadata = {"image": describe(processor.image_processor)}
    for name in FILES:
        assert (np.asarray(reader.open_image(files / name)) == expected(files, name)).all()
        known = processor(images=Image.fromarray(expected(files, name)), return_tensors="np").pixel_values[0]
        given = [reader.open_image(files / name)]
        given += [Image.open(files / name)] if not name.endswith(".dcm") else []
        for image in given:
            assert (processor(images=image, return_tensors="np").pixel_values[0] == known).all()
            assert (processor(images=[image], return_tensors="np").pixel_values[0] == known).all()
            np.testing.assert_allclose(encoder.pixels(image), known, atol=1e-6)
    assert json.dumps(encoder.metadata)


def describe(pixels):
    return {
        "size": pixels.size["shortest_edge"], "side": pixels.crop_size["height"], "resample": int(pixels.resample),
        "mean": list(pixels.image_mean), "std": list(pixels.image_std),
    }  # fmt: skip
