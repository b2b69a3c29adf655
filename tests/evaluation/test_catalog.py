"""The catalog: what every manifest states, how a manifest may go wrong, suites, contamination, and `mmkd datasets`."""

import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mmkd.command import settings
from mmkd.data.prompts import family
from mmkd.encoders.zoo import TEACHERS
from mmkd.evaluation.datasets.manifest import (
    CATALOG,
    PRIMARY_METRICS,
    PUBLICATIONS,
    SUITES,
    TASKS,
    TRAINING,
    catalog,
    compared_with,
    contaminated,
    find_manifests,
    load_suite,
    make_manifest,
    read_manifest,
    suite_names,
)
from mmkd.train import catalog as command

GOOD = {"id": "a", "task": "classification", "modality": "OCT", "license": "MIT", "source": {"csv": "a.csv"}}
GOOD["classes"] = {"x": ["an x"], "y": []}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"clases": {}}, r"unknown key 'clases' \(did you mean 'classes'\?\)"),
        ({"task": "clasification"}, r"task is 'clasification' \(did you mean 'classification'\?\)"),
        ({"id": "A b"}, "lower-case letters, digits and hyphens"),
        ({"source": {"cvs": "a"}}, r"source must name one of .* \(did you mean 'csv'\?\)"),
        ({"source": {"csv": "a", "wds": "b"}}, "source must name one of"),
        ({"source": {"csv": "a", "lable": "b"}}, r"csv has no key 'lable' \(did you mean 'label'\?\)"),
        ({"source": {"wds": "a", "where": {}}}, "wds has no key 'where'"),
        ({"expects": {"n_tests": 3}}, r"expects has no key 'n_tests' \(did you mean 'n_test'\?\)"),
        ({"expects": {"n_test": "many"}}, "expects.n_test must be int"),
        ({"classes": ["x"]}, "needs at least two classes"),
        ({"classes": {"x|y": [], "z": []}}, "joins the findings"),
        ({"classes": {False: [], "z": []}}, "put the name in quotes"),
        ({"classes": {"x": [3], "z": []}}, "phrases must be texts"),
        ({"templates": "gibberish"}, "templates 'gibberish' are none of x-ray"),
        ({"tier": "D"}, "tier is 'D'; allowed: A, B, C"),
    ],
)
def test_manifests_that_are_wrong(changes, match):
    with pytest.raises(ValueError, match=match):
        make_manifest(GOOD | changes)


def test_files_that_are_no_manifests(tmp_path):
    path = tmp_path / "a.yaml"
    for text, match in (("a: [", "not valid YAML"), ("- a\n", "not a list"), ("id: a\n", "lacks task, modality")):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            read_manifest(path)
    with pytest.raises(FileNotFoundError, match=r"b\.yaml: no such file"):
        find_manifests(str(tmp_path / "b.yaml"))


def test_a_class_is_told_in_all_its_phrases():
    prompts = make_manifest(GOOD).prompts()
    assert list(prompts) == ["x", "y"] and any("an x" in text for text in prompts["x"])
    assert all("y" in text for text in prompts["y"])


def test_the_catalog_states_what_it_must():
    files = [path for path in CATALOG.glob("*.yaml") if path.name not in (SUITES, TRAINING, PUBLICATIONS)]
    assert len(files) > 70
    for path in files:
        manifest = read_manifest(path)
        assert manifest.id == path.stem
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 10, path
        assert manifest.license and (manifest.register.startswith("https://") or manifest.id == "modality"), path
        for name, phrases in manifest.classes.items():
            assert phrases, f"{path}: {name} has no phrase"
        for phrases in manifest.prompts().values():
            assert len(phrases) >= 3 and len(set(phrases)) == len(phrases), path
        if manifest.classes and manifest.id != "modality":
            assert family(manifest.modality), path
        assert not (manifest.tier == "C" and not manifest.register)


def test_suites():
    assert set(suite_names()) == {"offline", "medmnist", "paper58"}
    medmnist = load_suite("medmnist")
    assert len(medmnist) == 12 and all("medmnist" in manifest.source for manifest in medmnist)
    paper = load_suite("paper58")
    assert len(paper) == len({manifest.id for manifest in paper}) == 58
    kinds = Counter(manifest.task for manifest in paper)
    kinds["classification"] += kinds.pop("multilabel") + kinds.pop("ordinal")
    assert kinds == {"classification": 36, "retrieval": 5, "vqa": 3, "survival": 6, "diagnosis": 8}
    classified = Counter(m.modality for m in paper if m.task in ("classification", "multilabel", "ordinal"))
    assert set(classified.values()) == {4} and len(classified) == 9
    with pytest.raises(ValueError, match=r"no suite 'papre58' \(did you mean 'paper58'\?\)"):
        load_suite("papre58")


def test_finding_manifests(tmp_path, monkeypatch):
    monkeypatch.setenv("MMKD_CATALOG", str(tmp_path))
    own = tmp_path / "own.yaml"
    own.write_text("id: own\ntask: retrieval\nmodality: CT\nsource: {csv: a.csv}\nlicense: mine\n")
    assert [manifest.id for manifest in find_manifests("busi, own")] == ["busi", "own"]
    assert len(find_manifests(["medmnist", "breastmnist"])) == 12
    with pytest.raises(ValueError, match=r"no dataset or suite 'bussi' \(did you mean 'busi'\?\)"):
        find_manifests("bussi")
    own.write_text(own.read_text().replace("id: own", "id: busi"))
    with pytest.raises(ValueError, match="id 'busi' is taken"):
        catalog()
    monkeypatch.setenv("MMKD_CATALOG", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="another manifest with the id 'busi'"):
        find_manifests(["busi", str(own)])


def test_the_58_state_all_that_is_asked_of_them():
    for manifest in load_suite("paper58"):
        told = (manifest.source, manifest.license, manifest.register, manifest.citation, manifest.measure)
        assert all(told) and manifest.tier in "ABC", manifest.id
        for name, phrases in manifest.classes.items():
            assert len({phrase.casefold() for phrase in phrases}) >= 2, f"{manifest.id}: {name} has one wording"
        spoken = [phrase for phrases in manifest.classes.values() for phrase in phrases]
        assert len(set(spoken)) == len(spoken), f"{manifest.id}: one wording stands for two classes"
    assert all(manifest.citation for manifest in catalog().values())


def test_counts_are_confirmed_and_agree():
    for manifest in load_suite("paper58"):
        counts = manifest.expects
        assert not counts or compared_with(manifest.id), f"{manifest.id} expects counts of no named source"
        whole = counts.get("n", counts.get("n_questions", 10**9))
        parts = [counts.get(key, 0) for key in ("n_train", "n_validation", "n_test", "n_test_questions")]
        assert sum(parts) <= whole and counts.get("n_cases", 0) <= whole, manifest.id
    expects = {manifest.id: manifest.expects for manifest in catalog().values()}
    splits = ("n_train", "n_validation", "n_test")
    for made, source in (("breastmnist", "busi"), ("pathmnist", "nct-crc-he")):
        assert sum(expects[made][split] for split in splits) == expects[source]["n"]
    listed = set(re.findall(r"^([\w-]+):", (CATALOG / PUBLICATIONS).read_text(encoding="utf-8"), re.MULTILINE))
    assert listed <= set(expects)


def test_the_primary_metric_is_that_of_the_task_unless_a_manifest_names_another():
    assert set(PRIMARY_METRICS) == set(TASKS)
    known = catalog()
    assert known["busi"].measure == "balanced_accuracy" and known["panda"].measure == "quadratic_kappa"
    assert known["retinamnist"].measure == "quadratic_kappa" and known["tcga-kirc"].measure == "c_index"


def test_findings_are_negated_in_plain_words():
    asked = catalog()["chestmnist"]
    negatives = asked.negative_prompts()
    assert "radiograph without lung nodule" in negatives["nodule"]
    assert "an X-ray image showing no enlarged heart" in negatives["cardiomegaly"]
    for name, sentences in asked.prompts().items():
        assert len(negatives[name]) == len(sentences) and not set(negatives[name]) & set(sentences)
        for sentence in negatives[name]:
            assert re.search(r"\b(no|without) (?!an? |the )", sentence), sentence


def test_skin_without_a_dermatoscope_is_not_called_dermatoscopic():
    for id in ("pad-ufes-20", "ddi"):
        assert not any("dermato" in text for texts in catalog()[id].prompts().values() for text in texts)
    assert any("dermatoscopic" in text for texts in catalog()["isic-2019"].prompts().values() for text in texts)


def test_contamination_as_publications_state_it():
    articles = {"rocov2", "roco", "pmc-oa", "quilt-1m"}
    marks = {
        **dict.fromkeys(("BMCA", "BiomedCLIP", "PMCCLIP", "GenMedClip"), articles),
        "UniMedCLIP": articles
        | {"chexpert-5x200", "rsna-pneumonia", "chestmnist", "slake-en", "odir200x3", "deepeyenet"},
        "QuiltNet": {"quilt-1m"},
        "PUBMEDCLIP": {"roco", "rocov2"},
        "MedCLIP": {"chexpert-5x200"},
        "PLIP": set(),
    }
    assert set(marks) == set(TEACHERS)
    for teacher, expected in marks.items():
        found = {manifest.id for manifest in load_suite("paper58") if contaminated(teacher.lower(), manifest)}
        assert found == expected, teacher
    names = set(re.findall(r"^(\w+):", (CATALOG / TRAINING).read_text(encoding="utf-8"), re.MULTILINE))
    assert names == set(TEACHERS)


def run(capsys, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mmkd datasets", *map(str, arguments)])
        settings.run(command.ACTIONS, command.main)
    return capsys.readouterr().out


def test_datasets_are_listed_and_shown(capsys, tmp_path):
    shown = run(capsys, "ls", "--suite", "paper58", "--modality", "oct", "--data", tmp_path)
    assert "4 datasets, 0 on this machine" in shown and "octdl" in shown
    shown = run(capsys, "show", "busi", "--data", tmp_path)
    assert "primary metric: balanced_accuracy" in shown and "doi:10.1016/j.dib.2019.104863" in shown
    assert "an ultrasound image showing normal breast tissue" in shown
    assert f"absent: not at {tmp_path}/busi; download it from https" in shown
    with pytest.raises(SystemExit):
        run(capsys, "ls", "--modality", "OCTT")
    assert "did you mean 'OCT'" in capsys.readouterr().err


def test_the_pages_table_is_the_catalogs(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MMKD_CATALOG", str(tmp_path))
    table = run(capsys, "ls", "--suite", "paper58", "--markdown", "true").strip()
    page = Path(__file__).resolve().parents[2] / "docs" / "datasets.md"
    assert table in page.read_text(encoding="utf-8") and len(table.splitlines()) == 60
    assert f"{len(catalog())} datasets" in (page.parents[1] / "README.md").read_text(encoding="utf-8")


def test_a_dataset_is_checked_and_added(capsys, tmp_path):
    folder = tmp_path / "data" / "ours"
    for number in range(12):
        path = folder / ("x", "y")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (0, 0, 7)).save(path)
    (folder / "x" / "broken.png").write_bytes(b"no image")
    own = tmp_path / "ours.yaml"
    own.write_text(
        'id: ours\ntask: classification\nmodality: CT\nsource: {imagefolder: "${DATA}/ours"}\n'
        "license: mine\nclasses: [x, y]\n"
    )
    places = ("--data", tmp_path / "data", "--catalog", tmp_path / "catalog")
    assert "finds it now" in run(capsys, "add", own, *places[2:])
    for again in (own, CATALOG / "busi.yaml"):
        with pytest.raises(SystemExit):
            run(capsys, "add", again, *places[2:])
        assert "is taken" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(capsys, "check", "ours,busi", *places, "--all", "true", "--quiet", "true")
    out, err = capsys.readouterr()
    assert "x: " in out and "busi: SKIPPED, not at" in out and "images are in several splits" in out
    assert "1 fault:" in err and "broken.png" in err
    (folder / "x" / "broken.png").unlink()
    assert "ours: " in run(capsys, "check", "ours", *places, "--quiet", "true")
