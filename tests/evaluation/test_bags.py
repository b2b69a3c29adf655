import random
from contextlib import suppress

import numpy as np
import pytest
from damage import ROUNDS, damaged_bytes

h5py = pytest.importorskip("h5py", reason="bags are HDF5 files")

from simulated_slides import write_bag  # noqa: E402

from mmkd.evaluation.embeddings.embed import UndefinedMetricError  # noqa: E402
from mmkd.evaluation.slides.bags import BagFolder, slide_name  # noqa: E402


def store(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def test_the_forms_of_other_programs_are_read(tmp_path):
    tiles = np.arange(12, dtype=np.float32).reshape(4, 3)
    store(tmp_path / "features_trident" / "s.h5", features=tiles, coords=np.zeros((4, 2)))
    store(tmp_path / "clam" / "h5_files" / "s.h5", features=tiles[None], coords=np.zeros((4, 2)))
    store(tmp_path / "stamp" / "s.h5", feats=tiles.astype(np.float16), coords=np.zeros((4, 2)))
    store(tmp_path / "newer" / "s.h5", patch_embeddings=tiles)
    folder = BagFolder(tmp_path)
    for encoder in ("trident", "clam", "stamp", "newer"):
        assert folder.open(encoder).features("s.svs").tolist() == tiles.tolist()
    assert folder.slides() == {"s"}


def test_bags_right_in_the_folder_belong_to_one_encoder(tmp_path):
    write_bag(tmp_path / "uni" / "s.h5", np.ones((2, 3)))
    assert BagFolder(tmp_path / "uni").open("uni").features("s").shape == (2, 3)
    with pytest.raises(UndefinedMetricError, match=r"no bags of plip in .* bags of uni"):
        BagFolder(tmp_path / "uni").open("plip")
    with pytest.raises(FileNotFoundError, match="mmkd tile"):
        BagFolder(tmp_path / "nowhere")


def test_unsound_bags_name_their_slides(tmp_path):
    write_bag(tmp_path / "e" / "good.h5", np.ones((2, 3)))
    write_bag(tmp_path / "e" / "empty.h5", np.ones((0, 3)))
    write_bag(tmp_path / "e" / "wide.h5", np.ones((2, 4)))
    write_bag(tmp_path / "e" / "nan.h5", np.array([[1.0, np.nan], [1.0, 1.0]]))
    (tmp_path / "e" / "broken.h5").write_bytes(b"not HDF5")
    store(tmp_path / "e" / "other.h5", something=np.ones((2, 2)))
    store(tmp_path / "e" / "cut.h5", features=np.ones((1, 5, 3)), coords=np.zeros((4, 2)))
    store(tmp_path / "e" / "mixed.h5", features=np.ones((5, 3)), proj=np.ones((4, 2)))
    store(tmp_path / "e" / "words.h5", features=np.array([[b"a", b"b"]]))
    bags = BagFolder(tmp_path).open("e")
    with pytest.raises(UndefinedMetricError, match="2 bags of e hold no tile: empty"):
        bags.width(["good", "empty"])
    with pytest.raises(UndefinedMetricError, match="differ in width: 3 in good, 4 in wide"):
        bags.width(["good", "wide"])
    with pytest.raises(UndefinedMetricError, match="1 of 2 slides have no bag of e: gone"):
        bags.width(["good", "gone"])
    for slide, message in {
        "empty": "slide empty is empty",
        "nan": "1 of 2 tiles of slide nan",
        "broken": "slide broken cannot be read",
        "other": "holds .'something'., none of",
        "cut": "slide cut holds features of 5 tiles, coords of 4 tiles",
        "mixed": "slide mixed holds features of 5 tiles, proj of 4 tiles",
        "words": "features of slide words are .S1, not numbers",
    }.items():
        with pytest.raises(UndefinedMetricError, match=message):
            bags.features(slide)


def test_more_numbers_than_a_file_can_hold_are_not_read(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.create_dataset("features", (10**9, 1024), "f2", chunks=(64, 64))
    with pytest.raises(UndefinedMetricError, match="too much for its file"):
        BagFolder(tmp_path).open(tmp_path.name).features("s")


@pytest.mark.parametrize("seed", range(ROUNDS * 30))
def test_damaged_bags_are_read_or_refused(tmp_path, seed):
    generator = random.Random(seed)
    write_bag(tmp_path / "s.h5", np.ones((40, 8), dtype=np.float16), proj=np.ones((40, 4)))
    (tmp_path / "s.h5").write_bytes(generator.choice(damaged_bytes((tmp_path / "s.h5").read_bytes(), generator)))
    folder = BagFolder(tmp_path)
    bags = folder.open(folder.encoders()[0])
    for read in (bags.features, lambda slide: bags.joint(slide, 4), lambda slide: bags.width([slide])):
        with suppress(UndefinedMetricError):
            read("s")


def test_joint_vectors_are_unit_or_refused(tmp_path):
    write_bag(tmp_path / "e" / "a.h5", np.ones((2, 5)), proj=np.full((2, 3), 2.0))
    write_bag(tmp_path / "e" / "b.h5", np.full((2, 3), 4.0))
    bags = BagFolder(tmp_path).open("e")
    for slide in "ab":
        assert np.linalg.norm(bags.joint(slide, 3), axis=1) == pytest.approx([1, 1])
    with pytest.raises(UndefinedMetricError, match=r"no joint vectors of width 7 for slide a .found 3."):
        bags.joint("a", 7)


def test_fingerprints_follow_the_files_and_memory_is_bounded(tmp_path):
    write_bag(tmp_path / "e" / "a.h5", np.ones((2, 5)))
    write_bag(tmp_path / "e" / "b.h5", np.ones((3, 5)))
    bags = BagFolder(tmp_path).open("e")
    before = bags.fingerprint(["a", "b"])
    assert bags.fingerprint(["b", "a"]) == before != bags.fingerprint(["a"])
    bags._memory = 2 * 5 * 4
    assert bags.features("a") is bags.features("a")
    bags.features("b")
    assert bags._held == 40
    write_bag(tmp_path / "e" / "a.h5", np.zeros((4, 5)))
    assert bags.fingerprint(["a", "b"]) != before


def test_names_of_slides_lose_known_endings_only():
    assert slide_name("x/TCGA-2F.195576CF.svs") == slide_name("TCGA-2F.195576CF.h5") == "TCGA-2F.195576CF"
    assert slide_name("TCGA-2F.195576CF") == "TCGA-2F.195576CF"


@pytest.mark.parametrize("kind", ["link", "soft", "storage", "virtual"])
def test_values_in_other_files_are_not_read(tmp_path, kind):
    with h5py.File(tmp_path / "private.h5", "w") as file:
        file["features"] = np.ones((4, 3), dtype=np.float32)
    (tmp_path / "private.bin").write_bytes(np.ones((4, 3), dtype=np.float32).tobytes())
    (tmp_path / "bags").mkdir()
    with h5py.File(tmp_path / "bags" / "a.h5", "w") as file:
        if kind == "link":
            file["features"] = h5py.ExternalLink(str(tmp_path / "private.h5"), "features")
        elif kind == "soft":
            file["features"] = h5py.SoftLink("/elsewhere")
        elif kind == "storage":
            place = [(str(tmp_path / "private.bin"), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("features", (4, 3), np.float32, external=place)
        else:
            layout = h5py.VirtualLayout((4, 3), np.float32)
            layout[:] = h5py.VirtualSource(str(tmp_path / "private.h5"), "features", (4, 3))
            file.create_virtual_dataset("features", layout)
    with pytest.raises(UndefinedMetricError, match="lies in another file"):
        BagFolder(tmp_path / "bags").open("bags").features("a")
