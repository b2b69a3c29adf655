import json

import numpy as np
import pytest
import torch
from fake_encoder import COLOURS, load_colours
from PIL import Image

h5py = pytest.importorskip("h5py", reason="bags are HDF5 files")
pytest.importorskip("openslide", reason="slides are read by OpenSlide")
tifffile = pytest.importorskip("tifffile", reason="the tests write TIFF pyramids with it")

from mmkd.command.settings import parse  # noqa: E402
from mmkd.encoders.encoder import DualEncoder  # noqa: E402
from mmkd.evaluation.embeddings.embed import UndefinedMetricError  # noqa: E402
from mmkd.evaluation.slides import tiles  # noqa: E402
from mmkd.evaluation.slides.bags import BagFolder  # noqa: E402
from mmkd.hub import slide_heatmap  # noqa: E402
from mmkd.train import tile  # noqa: E402

SIDE = 512


def glass_with_tissue():
    """Grey glass; tissue in columns 128 to 384 and rows 0 to 256, each 64 pixels of its own colour."""
    pixels = np.full((SIDE, SIDE, 3), 235, dtype=np.uint8)
    for y in range(0, 256, 64):
        for x in range(128, 384, 64):
            pixels[y : y + 64, x : x + 64] = (200, 40 + y // 4, 60 + x // 4)
    return pixels


def write_pyramid(path, pixels, mpp=0.25, tiled=True, below=False):
    """Two levels, the second one in a page of its own or ``below`` the first one; resolution in the tags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"photometric": "rgb", "compression": "zlib", "metadata": None}
    options |= {"tile": (64, 64)} if tiled else {"rowsperstrip": 50}
    with tifffile.TiffWriter(path) as file:
        resolution = (1e4 / mpp, 1e4 / mpp)
        file.write(pixels, subifds=int(below), resolution=resolution, resolutionunit="CENTIMETER", **options)
        file.write(np.ascontiguousarray(pixels[::2, ::2]), subfiletype=1, **options)
    return path


def test_pyramids_are_read_by_region(tmp_path):
    pixels = glass_with_tissue()
    with tiles.Slide(write_pyramid(tmp_path / "s.tif", pixels)) as slide:
        assert slide.sizes == [(SIDE, SIDE), (256, 256)] and slide.mpp == pytest.approx(0.25)
        assert (np.asarray(slide.read(0, 100, 30, 150, 170)) == pixels[30:200, 100:250]).all()
        assert (np.asarray(slide.read(1, 100, 30, 50, 70)) == pixels[::2, ::2][30:100, 100:150]).all()
        beyond = np.asarray(slide.read(0, 480, 480, 64, 64))
        assert (beyond[:32, :32] == pixels[480:, 480:]).all() and (beyond[32:] == 255).all()


@pytest.mark.parametrize("options", [{"tiled": False}, {"below": True}])
def test_other_tiffs_are_read_at_their_finest_level(tmp_path, options):
    pixels = glass_with_tissue()
    with tiles.Slide(write_pyramid(tmp_path / "s.tif", pixels, **options)) as slide:
        assert slide.sizes == [(SIDE, SIDE)] and slide.mpp == pytest.approx(0.25)
        assert (np.asarray(slide.read(0, 100, 30, 150, 170)) == pixels[30:200, 100:250]).all()
        beyond = np.asarray(slide.read(0, 480, 480, 64, 64))
        assert (beyond[:32, :32] == pixels[480:, 480:]).all() and (beyond[32:] == 255).all()


def test_a_resolution_of_screens_is_not_that_of_a_microscope(tmp_path):
    with tiles.Slide(write_pyramid(tmp_path / "s.tif", glass_with_tissue(), mpp=25400 / 72)) as slide:
        assert slide.mpp is None


def test_a_thumbnail_in_blocks_is_that_of_the_whole(tmp_path, monkeypatch):
    with tiles.Slide(write_pyramid(tmp_path / "s.tif", glass_with_tissue(), below=True)) as slide:
        whole = np.asarray(slide.thumbnail(128))
        monkeypatch.setattr(tiles, "BLOCK", 100)
        assert whole.shape == (128, 128, 3) and (np.asarray(slide.thumbnail(128)) == whole).all()


def test_the_corners_are_those_of_tissue(tmp_path):
    with tiles.Slide(write_pyramid(tmp_path / "s.tif", glass_with_tissue())) as slide:
        corners = tiles.tile_corners(slide, 64.0, 0.5)
        assert sorted(map(tuple, corners.tolist())) == [(x, y) for x in range(128, 384, 64) for y in range(0, 256, 64)]
        assert len(tiles.tile_corners(slide, 1000.0, 0.5)) == 0
        image = tiles.read_tile(slide, corners[0], 64.0, 32)
        assert image.size == (32, 32) and image.getpixel((16, 16)) == (200, 40, 92)


def test_a_slide_may_be_tissue_all_over():
    y, x = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([180 + x // 8, 60 + y // 8, 90 + (x + y) // 16], axis=-1).astype(np.uint8)
    assert tiles.tissue_mask(Image.fromarray(pixels)).all()
    assert not tiles.tissue_mask(Image.new("RGB", (64, 64), (235, 232, 228))).any()


@pytest.fixture
def slides(tmp_path):
    folder = tmp_path / "slides"
    write_pyramid(folder / "a.tif", glass_with_tissue())
    Image.fromarray(glass_with_tissue()).save(folder / "b.png")
    Image.new("RGB", (SIDE, SIDE), (235, 235, 235)).save(folder / "empty.png")
    (folder / "broken.svs").write_bytes(b"no slide")
    damaged = write_pyramid(folder / "damaged.tif", glass_with_tissue())
    with tifffile.TiffFile(damaged) as file:  # one tile of tissue in the finest level
        place, size = file.pages[0].dataoffsets[10], file.pages[0].databytecounts[10]
    data = damaged.read_bytes()
    damaged.write_bytes(data[:place] + bytes(size) + data[place + size :])
    return folder


def settings(slides, output, **others):
    arguments = ["--slides", str(slides), "--output", str(output), "--encoder", "fake=nowhere", "--quiet", "true"]
    arguments += ["--size", "32", "--mpp", "0.5", "--batch_size", "5", "--dtype", "float32"]
    return parse(tile.TileSettings, arguments + [str(w) for key, v in others.items() for w in (f"--{key}", v)])


@pytest.fixture
def encoder(monkeypatch):
    COLOURS.calls = 0
    monkeypatch.setattr(tile, "load_encoder", load_colours)
    return COLOURS


def test_slides_become_bags_and_bad_ones_are_listed(slides, tmp_path, encoder):
    tile.main(settings(slides, tmp_path / "bags", slide_mpp=0.25))
    bags = BagFolder(tmp_path / "bags").open("fake")
    assert sorted(bags.files) == ["a", "b"]
    assert np.linalg.norm(bags.joint("b", encoder.dim), axis=1) == pytest.approx(np.ones(16))
    colours = [(200, 40 + y // 4, 60 + x // 4) for y in range(0, 256, 64) for x in range(128, 384, 64)]
    assert bags.features("a") == pytest.approx(np.array(colours, dtype=float))
    with h5py.File(bags.files["a"]) as file:
        assert file["coords"].shape == (16, 2) and file.attrs["encoder"] == "fake"
    skipped = json.loads((tmp_path / "bags" / "fake" / "skipped.json").read_text())
    assert set(skipped) == {"broken", "damaged", "empty"} and "no tile of 32 pixels" in skipped["empty"]
    assert "a region of level 0 cannot be read" in skipped["damaged"] and "OpenSlide" in skipped["broken"]
    before = {path: path.read_bytes() for path in bags.files.values()}
    tile.main(settings(slides, tmp_path / "two", slide_mpp=0.25, workers=2))
    assert {path.name: path.read_bytes() for path in (tmp_path / "two" / "fake").glob("*")} == {
        path.name: path.read_bytes() for path in (tmp_path / "bags" / "fake").glob("*")
    }
    bags.files["b"].unlink()
    place = before[bags.files["a"]].index(bags.features("a").tobytes())
    bags.files["a"].write_bytes(before[bags.files["a"]][:place] + b"~" + before[bags.files["a"]][place + 1 :])
    with pytest.raises(UndefinedMetricError, match="the bag of slide a cannot be read"):
        BagFolder(tmp_path / "bags").open("fake").features("a")
    calls = encoder.calls
    tile.main(settings(slides, tmp_path / "bags", slide_mpp=0.25))
    assert encoder.calls == calls + 32, "only the missing and the damaged bag are made again"
    assert {path: path.read_bytes() for path in bags.files.values()} == before
    with h5py.File(bags.files["a"], "r+") as file:
        file["features"][0, 0] += 1  # HDF5 writes its own checksum anew
    with pytest.raises(UndefinedMetricError, match="features of slide a differ from what was written"):
        BagFolder(tmp_path / "bags").open("fake").features("a")
    tile.main(settings(slides, tmp_path / "bags", slide_mpp=0.25))
    assert {path: path.read_bytes() for path in bags.files.values()} == before
    with pytest.raises(ValueError, match=r"was made with other settings .size 32 there, 64 now"):
        tile.main(settings(slides, tmp_path / "bags", slide_mpp=0.25, size=64))


def test_a_damaged_bag_stays_until_it_is_written_again_or_its_slide_cannot_be_read(slides, tmp_path):
    writer, bag = tiles.SlideWriter(tmp_path, tiles.Tiling(), 1, 1, {}), tmp_path / "broken.h5"
    bag.write_bytes(b"damaged")
    assert not writer.has("broken") and bag.is_file()
    writer.write("broken", slides / "broken.svs", None)
    assert not bag.exists() and "OpenSlide" in writer.skipped()["broken"]


def test_what_cannot_work_is_told(slides, tmp_path, encoder):
    tile.main(settings(slides, tmp_path / "unknown"))
    skipped = json.loads((tmp_path / "unknown" / "fake" / "skipped.json").read_text())
    assert "give --slide_mpp or --level 0" in skipped["b"] and "a" not in skipped
    with pytest.raises(ValueError, match="it has 1 levels, so --level 1 does not exist"):
        tiles.Tiling(level=1).corners(tiles.Slide(slides / "b.png"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.svs").write_bytes(b"no slide")
    with pytest.raises(ValueError, match="none of 1 slides could be used"):
        tile.main(settings(tmp_path / "broken", tmp_path / "bags"))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        tile.main(settings(tmp_path / "nowhere", tmp_path / "bags"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no slides"):
        tile.main(settings(tmp_path / "none", tmp_path / "bags"))
    Image.new("RGB", (64, 64)).save(slides / "a.png")
    with pytest.raises(ValueError, match=r"would both become a\.h5"):
        tile.main(settings(slides, tmp_path / "bags"))
    with pytest.raises(ValueError, match="--tissue lies between"):
        tile.main(settings(slides, tmp_path / "bags", tissue=2))
    with pytest.raises(ValueError, match="give --encoder, whose features are kept, or --preview true"):
        tile.main(settings(slides, tmp_path / "bags", encoder=""))


def test_a_preview_draws_the_tiles_and_encodes_nothing(slides, tmp_path, encoder):
    tile.main(settings(slides, tmp_path / "bags", slide_mpp=0.25, preview="true"))
    drawn = np.asarray(Image.open(tmp_path / "bags" / "preview" / "b.png"))
    changed = (drawn != glass_with_tissue()).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert encoder.calls == 0 and (rows[[0, -1]] == (0, 256)).all() and (columns[[0, -1]] == (128, 384)).all()
    assert changed[[0, 64, 128, 192, 256], 128:385].all() and not changed[32, 140:180].any()
    assert set(json.loads((tmp_path / "bags" / "preview" / "skipped.json").read_text())) >= {"broken", "empty"}


class GreenEncoder(DualEncoder):
    """A unit vector whose first number grows with the green of the tile, and texts that ask for it or for the rest."""

    def __init__(self):
        super().__init__("green", 2, {})

    def image_features(self, prepared):
        green = torch.tensor([np.asarray(image)[..., 1].mean() / 255 for image in prepared]).float()
        return torch.stack([green, torch.ones_like(green)], dim=1)

    def text_features(self, texts):
        return torch.tensor([[1.0, 0.0] if text == "green" else [0.0, 1.0] for text in texts])


@pytest.mark.parametrize("against", ["", "glass"])
def test_a_heat_map_of_a_slide_for_people_and_for_qupath(slides, tmp_path, monkeypatch, against):
    monkeypatch.setattr(slide_heatmap, "load_encoder", lambda source, device: GreenEncoder())
    output = tmp_path / "heat"
    options = ["green", "--output", str(output), "--model", "green", "--size", "32", "--batch_size", "5", "--quiet"]
    options += ["true", "--against", against]
    asked = parse(slide_heatmap.SlideHeatmapSettings, [str(slides / "a.tif"), *options])
    slide_heatmap.main(asked)
    features = json.loads(output.with_suffix(".geojson").read_text())["features"]
    assert len(features) == 16
    for feature in features:
        ring = feature["geometry"]["coordinates"][0]
        x, y = ring[0]
        assert ring == [[x, y], [x + 64, y], [x + 64, y + 64], [x, y + 64], [x, y]]
        vector = np.array([(40 + y // 4) / 255, 1]) / np.hypot((40 + y // 4) / 255, 1)
        expected = {"green - glass": vector[0] - vector[1]} if against else {"green": vector[0]}
        assert feature["properties"]["measurements"] == pytest.approx(expected, abs=1e-3)
    picture = np.asarray(Image.open(output.with_suffix(".png")).convert("L")).astype(int)
    assert (picture[300:] == 235).all() and picture[250, 200] > picture[10, 200] + 50
    with pytest.raises(FileExistsError, match=r"heat\.geojson exists"):
        slide_heatmap.main(asked)
    for name, error, reason in (
        ("empty.png", ValueError, r"empty\.png: no tile of 32 pixels"),
        ("broken.svs", ValueError, "OpenSlide"),
        ("damaged.tif", ValueError, "a region of level 0 cannot be read"),
        ("nowhere.tif", FileNotFoundError, "no such file"),
    ):
        bad = [str(slides / name), *options, "--overwrite", "true", "--slide_mpp", "0.25"]
        with pytest.raises(error, match=reason):
            slide_heatmap.main(parse(slide_heatmap.SlideHeatmapSettings, bad))
