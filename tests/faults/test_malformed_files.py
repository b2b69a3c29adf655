"""Malformed files: every command answers with one line that names the file, or accepts it; never with a traceback.

A seeded generator damages the files that commands read. ``MMKD_FAULTS=40`` runs that many rounds instead of two.
"""

import json
import random
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from damage import ROUNDS, damaged_bytes, damaged_values, outcome
from fake_encoder import make_pairs, write_pairs
from suite_results import write_suite
from tiny_model import save_tiny

from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import open_pairs
from mmkd.evaluation.settings import ReportSettings
from mmkd.serving.predictor import read_labels
from mmkd.student.folder import load_student
from mmkd.train import catalog, features, pairs, plan, report


def answered(code, errors, file):
    """Whether the command took the file, or refused it in a line with its name as an error that is expected."""
    if not errors or (file == "settings.yaml" and "--" in errors):  # a value that the recipe refused, by its own name
        return True
    return code in (1, 2) and len(errors.splitlines()) <= 2 and "not expected" not in errors and file in errors


def variants(path, generator):
    """Damaged contents of a file."""
    content = path.read_bytes()
    yield from damaged_bytes(content, generator)
    if path.suffix == ".json":
        for changed in damaged_values(json.loads(content), generator):
            with suppress(UnicodeEncodeError):
                yield json.dumps(changed).encode()
    if path.suffix == ".yaml":
        bomb = "a: &a [x, x]\n" + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijklmno")
        )
        yield bomb.encode()
        for changed in damaged_values(yaml.safe_load(content), generator):
            with suppress(UnicodeEncodeError, yaml.YAMLError):
                yield yaml.safe_dump(changed).encode()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, pairs, features, a dataset manifest and settings, all sound."""
    folder = tmp_path_factory.mktemp("faults")
    save_tiny(folder / "model")
    write_pairs(folder / "pairs", make_pairs(12))
    found = open_pairs(folder / "pairs").pairs
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    writer = FeatureWriter(folder / "features" / "PLIP", "PLIP")
    writer.add([pair.id for pair in found], rows, rows)
    writer.finish({"weights": "x"})
    manifest = {
        "id": "own",
        "title": "Own",
        "modality": "CT",
        "task": "classification",
        "classes": {"a": ["an a"], "b": ["a b"]},
    }
    (folder / "own.yaml").write_text(
        yaml.safe_dump({**manifest, "license": "CC0-1.0", "source": {"imagefolder": str(folder / "none")}})
    )
    (folder / "settings.yaml").write_text(
        yaml.safe_dump({"gpus": 2, "gpu": "h100", "pairs": 1000, "precision": "bf16"})
    )
    write_suite(folder / "results", [("one", "probe", "CT")], rows=("student", "plip"))
    return folder


def commands(folder):
    """File, settings, recipe and arguments of commands that read it."""
    model, manifest, store = folder / "model" / "config.json", folder / "pairs" / "manifest.arrow", folder / "features"
    meta, own, options = store / "PLIP" / "meta.json", folder / "own.yaml", folder / "settings.yaml"
    results = folder / "results"
    shown = ["--results", results, "--output", folder / "report.html", "--overwrite", "true", "--quiet"]
    return {
        "configuration": (model, plan.PlanSettings, plan.main, ["--model", folder / "model"]),
        "settings": (options, plan.PlanSettings, plan.main, ["--config", options, "--model", folder / "model"]),
        "stats": (manifest, pairs.ACTIONS, pairs.main, ["stats", folder / "pairs"]),
        "ls": (manifest, pairs.ACTIONS, pairs.main, ["ls", folder / "pairs"]),
        "features": (meta, features.ACTIONS, features.main, ["ls", store]),
        "verify": (meta, features.ACTIONS, features.main, ["verify", store, "--quiet"]),
        "dataset": (own, catalog.ACTIONS, catalog.main, ["show", own]),
        "check": (own, catalog.ACTIONS, catalog.main, ["check", own]),
        "results": (results / "summary.json", ReportSettings, report.main, shown),
        "task": (results / "tasks" / "probe-one.json", ReportSettings, report.main, shown),
    }


NAMES = ["configuration", "settings", "stats", "ls", "features", "verify", "dataset", "check", "results", "task"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_damaged_file_is_refused_in_one_line_that_names_it(world, capsys, monkeypatch, name, seed):
    path, settings, main, arguments = commands(world)[name]
    whole, generator, wrong = path.read_bytes(), random.Random(f"{name} {seed}"), []
    assert outcome(capsys, monkeypatch, settings, main, *arguments)[1] == ""
    count = 0
    try:
        for content in variants(path, generator):
            path.write_bytes(content)
            count += 1
            code, errors = outcome(capsys, monkeypatch, settings, main, *arguments)
            if not answered(code, errors, path.parent.name if name == "configuration" else path.name):
                wrong.append((content[:80], code, errors[-300:]))
    finally:
        path.write_bytes(whole)
    assert count >= 8
    assert not wrong, f"{len(wrong)} of {count}: {wrong[:8]}"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_damaged_part_of_a_model_is_refused_by_name(world, name, seed):
    path, wrong = world / "model" / name, []
    whole, generator = path.read_bytes(), random.Random(f"{name} {seed}")
    try:
        for content in variants(path, generator):
            path.write_bytes(content)
            try:
                load_student(str(world / "model"))
            except (ValueError, OSError) as error:
                if name not in str(error):
                    wrong.append((content[:80], error))
    finally:
        path.write_bytes(whole)
    assert not wrong, wrong[:8]


def test_wrong_offsets_of_a_manifest_are_refused(world):
    path = world / "pairs" / "manifest.arrow"
    whole = path.read_bytes()
    table = pa.ipc.open_file(pa.BufferReader(whole)).read_all()
    right = np.arange(0, 8 * 13, 8, dtype=np.int32)
    same = table.set_column(table.schema.get_field_index("label"), "label", pa.array(["abcdefgh"] * len(table)))
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(same.cast(table.schema))
        content = path.read_bytes()
        assert content.count(right.tobytes()) == 1
        path.write_bytes(content.replace(right.tobytes(), (right * 1_000_000).tobytes()))
        with pytest.raises(ValueError, match=r"manifest\.arrow is damaged"):
            open_pairs(world / "pairs")
    finally:
        path.write_bytes(whole)


def test_two_columns_of_one_name_are_refused(tmp_path):
    write_pairs(tmp_path, make_pairs(2))
    path = tmp_path / "manifest.arrow"
    table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    twice = table.append_column("id", table.column("label"))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, twice.schema) as writer:
        writer.write_table(twice)
    with pytest.raises(ValueError, match=r"manifest\.arrow is damaged \(two columns of one name\)"):
        open_pairs(tmp_path)


def test_half_a_character_in_yaml_is_refused(tmp_path):
    (tmp_path / "labels.yaml").write_text('nodule: "\\uD800"\n')
    with pytest.raises(ValueError, match=r"labels\.yaml is not valid YAML: .*surrogates not allowed"):
        read_labels(str(tmp_path / "labels.yaml"))
