"""The walls of the house, each a test: who may import whom, what stays lazy, what the wheel holds."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from mmkd.command import cli

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("modeling_mmkd", "mmkd", "train", "hub")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
LAZY = {"open_clip", "timm", "sklearn", "h5py", "matplotlib", "skimage", "nilearn", "nibabel", "pydicom", "torchvision"}
LAZY |= {"pyarrow", "msgspec", "imagehash", "datasketch", "py3langid", "pylatexenc", "datasets"}
LAZY |= {"tifffile", "openslide", "torchsurv", "sksurv"}


def name_of(path: Path) -> str:
    """Import name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("mmkd", *parts) if parts[0] in ("train", "hub") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    """Absolute names a file imports; siblings keep their dot."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def test_the_model_stands_alone():
    files = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == "modeling_mmkd"]
    assert len(files) >= 4
    for path in files:
        assert path.parent == ROOT / "modeling_mmkd", f"{path}: the model folder is flat"
        for name in imports(path):
            if name.startswith("."):
                assert not name.startswith("..") and name.count(".") <= 2, f"{path}: {name}"
            else:
                assert name.split(".")[0] in {*sys.stdlib_module_names, "torch", "transformers"}, f"{path}: {name}"
        assert "from . import" not in path.read_text(), f"{path}: `from . import x` is not copied with remote code"


def test_arrows_point_down():
    for path in SOURCES:
        room = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            upward = f"{name}.".startswith(("mmkd.train.", "mmkd.hub.", "train.", "hub."))
            assert not upward, f"{path} imports the recipe {name}"
            assert room == "modeling_mmkd" or not name.startswith("."), f"{path}: {name} is relative"


def test_no_circles():
    known = {name_of(path) for path in SOURCES}
    graph = {
        name_of(path): {n for n in imports(path, top_level_only=True) if n in known and n != name_of(path)}
        for path in SOURCES
    }
    assert list(TopologicalSorter(graph).static_order())


def test_distribution_and_accelerate_have_one_home():
    for path in SOURCES:
        relative = path.relative_to(ROOT).as_posix()
        if relative != "mmkd/distributed.py":
            assert not any(n.startswith("torch.distributed") for n in imports(path)), relative
            assert "torch.distributed" not in path.read_text(), relative
        if relative not in ("mmkd/training/loop.py", "mmkd/command/cli.py"):
            assert not any(n.split(".")[0] == "accelerate" for n in imports(path)), relative


def test_heavy_libraries_are_imported_where_they_are_used():
    for path in SOURCES:
        heavy = {n.split(".")[0] for n in imports(path, top_level_only=True)} & LAZY
        assert not heavy, f"{path} imports {heavy} at the top"


def test_no_recipe_shadows_a_package():
    taken = sys.stdlib_module_names | set(importlib.metadata.packages_distributions())
    for room in ("train", "hub"):
        for path in (ROOT / room).glob("*.py"):
            assert path.stem == "__init__" or path.stem not in taken, f"{path} shadows an installed package"


def test_every_recipe_has_a_console_name():
    recipes = {name_of(path) for room in ("train", "hub") for path in (ROOT / room).glob("[a-z]*.py")}
    assert recipes == {module for module, _ in cli.RECIPES.values()}
    for preset in cli.PIPELINES.values():
        assert (ROOT / "train" / "configs" / preset).is_file()


def test_safe_reading_and_plain_style():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert path.stem not in {"utils", "helpers", "common"}, path
        assert path.read_text().count("\n") < 300, f"{path} has 300 lines or more"
        assert not {"pickle", "dill", "joblib", "shelve"} & {n.split(".")[0] for n in imports(path)}, path
        for node in ast.walk(tree):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{where} bare except"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "yaml.load"), f"{where} {called}"
                if called == "torch.load":
                    safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
                    assert safe, f"{where} torch.load without weights_only=True"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder, tree = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("tree")
    for room in ROOMS:
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree / file)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(tree)], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_rooms_and_nothing_else(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"modeling_mmkd", "mmkd"}
    for path in SOURCES:
        assert name_of(path).replace(".", "/") in {n.removesuffix(".py").removesuffix("/__init__") for n in names}, path
    for config in (ROOT / "train" / "configs").glob("*.yaml"):
        assert f"mmkd/train/configs/{config.name}" in names
    assert {"modeling_mmkd/py.typed", "mmkd/py.typed"} <= set(names)


def test_declared_packages_are_used(wheel):
    """Every third-party import is declared, in the wheel as it is built now."""
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = [line for line in wheel.read(metadata).decode().splitlines() if line.startswith("Requires-Dist: ")]
    required = [line.removeprefix("Requires-Dist: ") for line in lines if 'extra == "dev"' not in line]
    declared = {re.split(r"[<>=\[; ]", line)[0].replace("-", "_").lower() for line in required}
    imported = {n.split(".")[0] for path in SOURCES for n in imports(path) if not n.startswith(".")}
    aliases = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch", "sklearn": "scikit_learn"}
    aliases |= {"skimage": "scikit_image", "nibabel": "nilearn", "openslide": "openslide_python"}
    third_party = {aliases.get(n, n) for n in imported - sys.stdlib_module_names - {"mmkd", "modeling_mmkd"}}
    assert third_party <= declared, third_party - declared
