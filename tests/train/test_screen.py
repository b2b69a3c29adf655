import dataclasses
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from mmkd.command.settings import parse
from mmkd.data import table
from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import join_parts, open_pairs, write_manifest
from mmkd.data.table import Pair, table_schema, write_table
from mmkd.distillation import screening
from mmkd.distillation.screening import Screen, ScreeningReport, counts_of, draw, screen_runs
from mmkd.files import read_json
from mmkd.train import screen
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
    write_manifest(Path("elsewhere"), pairs)
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
    writer.add(ids, torch.nn.functional.normalize(image, dim=1), torch.nn.functional.normalize(text, dim=1))
    writer.finish({})


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
    assert (report["modalities"]["ct"]["pairs"], report["modalities"]["ct"]["kept"]) == (20, 20)
    for name in ("good", "ct", "guessing"):
        assert (
            sum(modality["available"][name] for modality in report["modalities"].values()) == report["available"][name]
        )
        similarities = report["similarities"][name]
        assert sum(similarities["own"].values()) == 40 and sum(similarities["mismatched"].values()) == 40 * 39
    own, mismatched = (report["similarities"]["good"][side] for side in ("own", "mismatched"))
    assert min(map(float, own)) > report["similarities"]["good"]["threshold"] > min(map(float, mismatched))
    assert sum(modality["pairs"] for modality in report["modalities"].values()) == 40


SENTENCES = ("a microscopy image of {}", "micrograph showing {}", "{} under the microscope")
CELLS, TUMORS = ("lymphocyte", "monocyte"), ("no tumor", "glioma", "meningioma")


def write_classes(wrong=0.0):
    """240 cells and 240 brains, their labels in several words, and three teachers: one recognizes every class without
    error, one nothing but the modality, one guesses.

    Args:
        wrong: share of the captions that name another label of the modality; they stay beside the right label.
    """
    generator = torch.Generator().manual_seed(0)
    pairs, classes, captioned = [], [], []
    for k in range(480):
        own = CELLS if k % 2 else TUMORS
        number = k // 2 % len(own)
        other = (number + 1) % len(own) if torch.rand((), generator=generator) < wrong else number
        caption = SENTENCES[k // 7 % 3].format(own[other])
        pairs.append(Pair(f"c{k}", f"{k}.png", caption, "microscopy" if k % 2 else "MRI", own[number]))
        classes.append(number + 3 * (k % 2))
        captioned.append(other + 3 * (k % 2))
    write_manifest(Path("elsewhere"), pairs)
    write_manifest(Path("classes"), pairs, images=Path("elsewhere/images"))
    ids, shown, named = [pair.id for pair in pairs], torch.tensor(classes), torch.tensor(captioned)
    perfect, modality = torch.eye(6), torch.eye(6)[torch.tensor([0, 0, 0, 1, 1, 1])]
    guesses = torch.randn(2, 480, 32, generator=generator)
    for name, image, text in (
        ("perfect", perfect[shown], perfect[named]),
        ("modality", modality[shown] + 0.2 * guesses[0, :, :6], modality[named]),
        ("guessing", guesses[0], guesses[1]),
    ):
        writer = FeatureWriter(Path("class-features") / name, name)
        writer.add(ids, torch.nn.functional.normalize(image, dim=1), torch.nn.functional.normalize(text, dim=1))
        writer.finish({})
    return pairs


def screen_classes(output, *more):
    common = ["--pairs", "classes", "--features", "class-features", "--output", output, "--quiet"]
    main(parse(ScreenSettings, [*common, *more]))
    return open_pairs(Path(output)), read_json(Path(output) / "report.json")


@pytest.mark.parametrize("rule", ["percentile", "rank"])
def test_a_teacher_of_classes_is_available_for_all_its_pairs_and_one_that_guesses_is_not(work, rule):
    write_classes()
    folder, report = screen_classes("screened", "--rule", rule, "--minimum_teachers", "1")
    assert report["available"]["perfect"] == 480 == len(folder.pairs)
    assert report["available"]["guessing"] < (0.3 if rule == "percentile" else 0.1) * 480
    assert report["available"]["modality"] < 0.3 * 480


def test_wrong_labels_within_a_modality_are_dropped_where_thresholds_are_its_own(work):
    right = {pair.id for pair in write_classes(wrong=0.3) if pair.label in pair.caption}
    kept = {}
    for name, more in (("own", []), ("one", ["--modality_pairs", "null"])):
        folder, report = screen_classes(name, "--teachers", "perfect,modality", "--minimum_teachers", "1", *more)
        kept[name] = {pair.id for pair in folder.pairs}
        assert right <= kept[name] and set(report["similarities"]["perfect"]["thresholds"]) == (
            {"MRI", "microscopy"} if name == "own" else set()
        )
    assert len(kept["own"] - right) < 0.3 * (480 - len(right))
    assert len(kept["one"] - right) > 0.4 * (480 - len(right))


def test_kept_shares_of_classes_are_reported_and_a_depleted_one_is_warned_of(work, caplog):
    write_classes()
    features = Path("class-features/perfect")
    ids, rows = [f"c{k}" for k in range(480)], torch.arange(480) // 2 % 3 + 3 * (torch.arange(480) % 2)
    lymphocytes = (torch.arange(480) % 2 == 1) & (torch.arange(480) // 2 % 2 == 0)
    rows = torch.where(torch.arange(480) % 2 == 1, 3 + torch.arange(480) // 2 % 2, rows)
    image = torch.eye(6)[rows]
    image[lymphocytes] = torch.eye(6)[5]  # this teacher takes them for something else
    writer = FeatureWriter(features.with_name("skewed"), "skewed")
    writer.add(ids, image, torch.eye(6)[rows])
    writer.finish({})
    _, report = screen_classes("screened", "--teachers", "skewed")
    shares = {own["label"]: own["kept"] / own["pairs"] for own in report["classes"]}
    assert shares == {"lymphocyte": 0.0, "monocyte": 1.0, "no tumor": 1.0, "glioma": 1.0, "meningioma": 1.0}
    assert [own["label"] for own in report["depleted_classes"]] == ["lymphocyte"]
    assert "Of lymphocyte (microscopy), 0 of 120 training pairs are kept (0%" in caplog.text
    assert "Of lymphocyte" in Path("screened/report.html").read_text()


def test_held_out_pairs_stay_whatever_teachers_think(work):
    folder, report = run("screened", "--minimum_teachers", "3")
    held_out = [pair for pair in folder.pairs if pair.split != "train"]
    assert [pair.id for pair in held_out] == [f"p{k}" for k in range(40, 52)]
    assert report["held_out_kept_unscreened"] == 12
    assert all(isinstance(pair.teachers, tuple) for pair in held_out)
    assert any(len(pair.teachers) < 3 for pair in held_out)


def test_modalities_and_rules_by_setting(work):
    folder, report = run("ct-only", "--modalities", "CT", "--minimum_teachers", "0")
    assert [pair.id for pair in folder.pairs if pair.split == "train"] == [f"p{k}" for k in range(1, 40, 2)]
    assert report["train"]["dropped"] == dict.fromkeys(report["train"]["dropped"], 0) | {"other modality": 20}
    everything, report = run("everything", "--rule", "all", "--minimum_teachers", "0")
    assert len(everything.pairs) == 52 and report["available"] == {"ct": 40, "good": 40, "guessing": 40}
    assert report["similarities"]["good"]["threshold"] is None
    counts = [run(f"top-{k}", "--rule", "rank", "--top", str(k))[1]["available"]["guessing"] for k in (1, 20, 40)]
    assert counts[0] < counts[1] < counts[2] == 40


def test_the_page_shows_every_teacher(work):
    write_store("<b>&", [f"p{k}" for k in range(52)], torch.randn(52, 8), torch.randn(52, 8))
    run("screened")
    html = Path("screened/report.html").read_text()
    captions = re.findall("<figcaption>(.*?)</figcaption>", html)
    assert len(captions) == html.count("<svg") == 4 and "<b>&" not in html
    assert any(own.startswith("&lt;b&gt;&amp;: ") for own in captions)
    assert any(own.startswith("good: 40 of") for own in captions)


def test_memory_does_not_grow_with_the_pairs(work, monkeypatch):
    """Every look-up is of a chunk; a table of pairs is read in slices and written as it comes."""
    import tracemalloc

    monkeypatch.setattr(screening, "CHUNK", 500)
    monkeypatch.setattr(table, "ROWS_IN_MEMORY", 500)
    peaks = []
    for count in (1_000, 8_000):
        write_manifest(Path("pairs"), [Pair(f"p{k}", f"{k}.png", f"caption {k}") for k in range(count)])
        image = torch.nn.functional.normalize(torch.randn(count, 16), dim=1)
        write_store("good", [f"p{k}" for k in range(count)], image, image)
        folder, features = open_pairs(Path("pairs")), TeacherFeatures.open(Path("features"), ["good"])
        tracemalloc.start()
        drawn, _ = draw(folder.pairs, features, 64, 42, 50)
        rule = Screen(folder, features, drawn, 50, "percentile", 80.0, 1)
        runs = {Path(f"{k}.arrow"): range(k, k + 1_000) for k in range(0, count, 1_000)}
        screen_runs(partial(lambda own: own, rule), 1, set(), list(runs.items()), lambda pairs: None)
        Path("chosen").mkdir(exist_ok=True)
        join_parts(Path("chosen"), list(runs), folder.image_root)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        report = ScreeningReport(features.names)
        for file in runs:
            report.add_json(counts_of(file))
        summary = report.summary(1, rule.about_pools())
        assert summary["train"]["pairs"] == count and summary["train"]["kept"] == len(open_pairs(Path("chosen")).pairs)
    assert peaks[1] < 1.5 * peaks[0]


def test_a_table_gives_a_table_with_all_its_columns(work):
    pa = pytest.importorskip("pyarrow")
    pairs = list(open_pairs(Path("pairs")).pairs)
    columns = {f.name: [getattr(p, f.name) for p in pairs] for f in dataclasses.fields(Pair)}
    columns["image"] = [f"shards/0.tar@{k}+5" for k in range(len(pairs))]
    columns["teachers"] = pa.array([None] * len(pairs), pa.list_(pa.string()))
    whole = pa.table({**columns, "mesh": [f"term {k}" for k in range(len(pairs))]})
    Path("table").mkdir()
    write_table(Path("table/manifest.arrow"), table_schema({"mesh": pa.string()}, "images"), [whole])
    expected, _ = run("screened", "--minimum_teachers", "3")
    folder, _ = run("screened-table", "--pairs", "table", "--minimum_teachers", "3")
    assert [(p.id, p.teachers) for p in folder.pairs] == [(p.id, p.teachers) for p in expected.pairs]
    written = pa.ipc.open_file("screened-table/manifest.arrow").read_all()
    assert written.column("mesh").to_pylist() == [f"term {p.id[1:]}" for p in folder.pairs]
    assert folder.image_root.resolve() == (work / "table/images").resolve()


@pytest.mark.parametrize("more", [(), ("--workers", "2", "--tasks", "3"), ("killed",)])
def test_images_stay_where_they_are_and_bytes_are_the_same_however_tasks_are_divided(work, monkeypatch, more):
    monkeypatch.setattr(screen, "RUN", 15)
    folder, _ = run("a/screened")
    assert folder.image_root.resolve() == (work / "elsewhere/images").resolve()
    if more == ("killed",):
        with monkeypatch.context() as killed, pytest.raises(SystemExit):
            killed.setattr(screen, "join_parts", lambda *_: sys.exit(9))
            run("a/again")
        more = ()
        monkeypatch.setattr(Screen, "availability", None)  # all runs of pairs are done
    run("a/again", *more)
    for name in ("manifest.arrow", "report.json", "report.html"):
        assert (work / "a/screened" / name).read_bytes() == (work / "a/again" / name).read_bytes()
    assert sorted(path.name for path in Path("a").iterdir()) == ["again", "screened"]


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
        (["--minimum_teachers", "4"], "allowed: 0-3"),
        (["--minimum_teachers", "-1"], "allowed: 0-3"),
        (["--top", "0"], "at least 1"),
        (["--modalities", "ct,mry"], "did you mean 'mri'"),
        (["--percentile", "101"], "at least 0 and at most 100"),
        (["--pool", "1"], "at least 2"),
        (["--modality_pairs", "1"], "at least 2, or null"),
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
    """By either rule, every teacher the authors kept for a sample is available for it."""
    published = shared_data / "mmkd_clip_official" / "MMKDCLIP_DATA"
    for rule in ("percentile", "rank"):
        arguments = ["--pairs", str(published), "--features", str(published), "--output", str(tmp_path / rule)]
        main(parse(ScreenSettings, [*arguments, "--rule", rule, "--minimum_teachers", "5", "--quiet"]))
        found = {pair.id: set(pair.teachers) for pair in open_pairs(tmp_path / rule).pairs}
        assert found == {pair.id: set(pair.teachers) for pair in open_pairs(published).pairs}
