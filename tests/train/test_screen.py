from pathlib import Path

import pytest
import torch

from mmkd.data.features import FeatureWriter
from mmkd.data.records import Pair, open_pairs, write_manifest
from mmkd.files import read_json
from mmkd.settings import parse
from mmkd.train.screen import ScreenSettings, main

SPLITS = ["train"] * 40 + ["validation"] * 6 + ["test"] * 6


@pytest.fixture
def work(tmp_path, monkeypatch):
    """52 pairs and three teachers: a good one, one that knows CT only, one that guesses."""
    monkeypatch.chdir(tmp_path)
    pairs = [
        Pair(f"p{k}", f"{k}.png", f"caption {k}", "ct" if k % 2 else "mri", split=split)
        for k, split in enumerate(SPLITS)
    ]
    write_manifest(Path("pairs"), pairs, images=Path("elsewhere/images"))
    torch.manual_seed(0)
    concept = torch.randn(52, 32)
    ct = torch.arange(52)[:, None] % 2 == 1
    noise = [0.2 * torch.randn(52, 32), torch.where(ct, 0.2, 50.0) * torch.randn(52, 32), 50 * torch.randn(52, 32)]
    for name, error in zip(("good", "ct", "guessing"), noise, strict=True):
        write_store(name, [f"p{k}" for k in range(52)], concept + error, concept)
    return tmp_path


def write_store(name, ids, image, text):
    writer = FeatureWriter(Path("features") / name, name)
    writer.write_shard(0, torch.nn.functional.normalize(image, dim=1), torch.nn.functional.normalize(text, dim=1))
    writer.finish(ids, {})


def run(output, *more):
    common = ["--pairs", "pairs", "--features", "features", "--output", output, "--quiet"]
    main(parse(ScreenSettings, [*common, *more]))
    return open_pairs(Path(output)), read_json(Path(output) / "report.json")


def test_availability_and_report_add_up(work):
    folder, report = run("screened")
    by_id = {pair.id: pair for pair in folder.pairs}
    train = [pair for pair in folder.pairs if pair.split == "train"]
    odd = [f"p{k}" for k in range(1, 40, 2)]
    assert report["minimum_teachers"] == 2
    assert all(set(by_id[id].teachers) >= {"good", "ct"} for id in odd)
    assert all(len(pair.teachers) >= 2 for pair in train)
    assert report["train"]["pairs"] == 40
    assert report["train"]["kept"] + sum(report["train"]["dropped"].values()) == 40
    assert report["train"]["kept"] == len(train) < 40
    assert sum(report["agreeing_teachers"].values()) == 40
    assert sum(n for count, n in report["agreeing_teachers"].items() if int(count) >= 2) == len(train)
    assert report["available"]["good"] == 40 and report["available"]["guessing"] < 20
    assert report["modalities"]["ct"] == {"pairs": 20, "kept": 20}
    assert sum(modality["pairs"] for modality in report["modalities"].values()) == 40


def test_held_out_pairs_stay_whatever_teachers_think(work):
    folder, report = run("screened", "--minimum_teachers", "3")
    held_out = [pair for pair in folder.pairs if pair.split != "train"]
    assert [pair.id for pair in held_out] == [f"p{k}" for k in range(40, 52)]
    assert report["held_out_kept_unscreened"] == 12
    assert all(isinstance(pair.teachers, tuple) for pair in held_out)
    assert any(len(pair.teachers) < 3 for pair in held_out)


def test_images_stay_where_they_are_and_bytes_repeat(work):
    folder, _ = run("a/screened")
    assert folder.image_root.resolve() == (work / "elsewhere/images").resolve()
    run("a/again")
    for name in ("manifest.jsonl", "pairs.json", "report.json"):
        assert (work / "a/screened" / name).read_bytes() == (work / "a/again" / name).read_bytes()


def test_pairs_without_features_are_counted(work):
    write_store("good", [f"p{k}" for k in range(2, 52)], torch.randn(50, 32), torch.randn(50, 32))
    for name in ("ct", "guessing"):
        ids = [f"p{k}" for k in range(1, 52)]
        write_store(name, ids, torch.eye(51, 32), torch.eye(51, 32))
    folder, report = run("screened", "--minimum_teachers", "1")
    assert report["train"]["dropped"]["no teacher has its features"] == 1
    assert "good" not in next(pair for pair in folder.pairs if pair.id == "p1").teachers


def test_settings_that_cannot_work_and_nothing_left(work):
    for arguments, said in (
        (["--minimum_teachers", "4"], "allowed: 1-3"),
        (["--minimum_teachers", "0"], "allowed: 1-3"),
        (["--percentile", "101"], "0 to 100"),
        (["--pool", "1"], "at least 2"),
        (["--teachers", "absent"], "no features of absent"),
    ):
        with pytest.raises(ValueError, match=said):
            run("screened", *arguments)
    with pytest.raises(ValueError, match=r"none of the 40 training pairs .*lower --minimum_teachers"):
        run("screened", "--teachers", "guessing", "--percentile", "100")
    assert not Path("screened").exists()
    run("screened")
    with pytest.raises(FileExistsError, match="screened exists"):
        run("screened")


def test_the_authors_samples_are_all_kept(shared_data, tmp_path):
    """With the paper's rule and ours, every teacher the authors kept for a sample is available for it."""
    published = shared_data / "mmkd_clip_official" / "MMKDCLIP_DATA"
    for rule in ("percentile", "paper"):
        arguments = ["--pairs", str(published), "--features", str(published), "--output", str(tmp_path / rule)]
        main(parse(ScreenSettings, [*arguments, "--rule", rule, "--minimum_teachers", "5", "--quiet"]))
        found = {pair.id: set(pair.teachers) for pair in open_pairs(tmp_path / rule).pairs}
        assert found == {pair.id: set(pair.teachers) for pair in open_pairs(published).pairs}
