"""The walls of the house, each a test: who may import whom, what stays lazy, what the wheel holds."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from mmkd.command import cli

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("modeling_mmkd", "mmkd", "train", "hub")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
HEAVY = {"open_clip", "timm", "sklearn", "h5py", "matplotlib", "jinja2", "skimage", "nilearn", "nibabel", "pydicom"}
HEAVY |= {"torchvision", "pyarrow", "pandas", "scipy", "msgspec", "imagehash", "datasketch", "py3langid", "pylatexenc"}
HEAVY |= {"datasets", "tifffile", "openslide", "torchsurv", "sksurv", "onnx", "onnxruntime", "onnxscript", "peft"}
HEAVY |= {"usearch"}
BOTTOM = {"files", "distributed", "command", "pages"}  # what every room may import
BELOW = {  # room -> rooms that it may import, with all that these may import
    "files": set(),
    "distributed": set(),
    "command": {"files", "distributed"},
    "pages": {"files", "command"},
    "data": set(),
    "curation": {"data"},
    "encoders": {"data", "modeling_mmkd"},
    "student": {"encoders", "modeling_mmkd"},
    "training": {"student", "data"},
    "alignment": {"training", "data"},
    "distillation": {"alignment", "training"},
    "evaluation": {"training", "student", "encoders", "data"},  # training: its checkpoints, for --watch
    "serving": {"student", "encoders", "data"},
    "publishing": {"evaluation", "distillation", "curation"},
    "exporting": {"evaluation", "student"},
    "miniature": {"evaluation", "distillation", "curation"},
    "modeling_mmkd": set(),
}
PARTS = {"serving": "mmkd.evaluation.statistics"}  # room -> part of a room above that it may import, which is below it


def name_of(path: Path) -> str:
    """Import name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("mmkd", *parts) if parts[0] in ("train", "hub") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a source file."""
    return ast.parse(path.read_text())


@cache
def imports(path: Path, top_level_only: bool = False) -> list[str]:
    """Absolute names a file imports; siblings keep their dot."""
    tree = tree_of(path)
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
    assert len(files) >= 3
    for path in files:
        assert path.parent == ROOT / "modeling_mmkd", f"{path}: the model folder is flat"
        for name in imports(path):
            if name.startswith("."):
                assert not name.startswith("..") and name.count(".") <= 2, f"{path}: {name}"
            else:
                assert name.split(".")[0] in {*sys.stdlib_module_names, "torch", "transformers"}, f"{path}: {name}"
        assert "from . import" not in path.read_text(), f"{path}: `from . import x` is not copied with remote code"


def room_of(name: str) -> str:
    """The room of an import name: `data` of `mmkd.data.folder`, `files` of `mmkd.files`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "mmkd" and len(parts) > 1 else parts[0]


def allowed_rooms(room: str) -> set[str]:
    """All rooms below one."""
    direct = BELOW[room] if room in BOTTOM else BELOW[room] | BOTTOM
    return direct.union(*map(allowed_rooms, direct)) if direct else set()


def module_graph() -> dict[str, set[str]]:
    """Every module of ours with the modules of ours that it imports, at its top or inside a function."""
    known = {name_of(path) for path in SOURCES}
    return {name_of(path): {n for n in imports(path) if n in known and n != name_of(path)} for path in SOURCES}


def test_rooms_import_downwards():
    wrong = []
    for module, imported in module_graph().items():
        room = room_of(module)
        if module == "mmkd":
            continue
        for name in imported - {"mmkd"}:
            other = room_of(name)
            is_recipe = other in ("train", "hub")
            is_part = f"{name}.".startswith(f"{PARTS.get(room)}.")
            free = other == room or is_part or room in ("train", "hub")
            if is_recipe or not (free or other in allowed_rooms(room)):
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(sorted(wrong))


def test_parts_below_a_room_import_what_it_may():
    for room, part in PARTS.items():
        own = {module: names for module, names in module_graph().items() if f"{module}.".startswith(f"{part}.")}
        assert own
        for module, imported in own.items():
            others = {name for name in imported - {"mmkd"} if not f"{name}.".startswith(f"{part}.")}
            assert {room_of(name) for name in others} <= allowed_rooms(room), module


def test_the_package_imports_by_absolute_names():
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] != "modeling_mmkd":
            assert not [name for name in imports(path) if name.startswith(".")], path


def test_no_circles():
    graph = module_graph()
    assert list(TopologicalSorter(graph).static_order())
    rooms: dict[str, set[str]] = {}
    for module, imported in graph.items():
        rooms.setdefault(room_of(module), set()).update(map(room_of, imported))
    assert list(TopologicalSorter({room: found - {room, "mmkd"} for room, found in rooms.items()}).static_order())


def test_the_root_is_nearly_empty():
    assert {path.name for path in (ROOT / "mmkd").glob("*.py")} <= {"__init__.py", "files.py", "distributed.py"}
    rooms = {path.name for path in (ROOT / "mmkd").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(BELOW), f"add {rooms - set(BELOW)} to the table of rooms"


def test_distribution_and_accelerate_have_one_home():
    for path in SOURCES:
        relative = path.relative_to(ROOT).as_posix()
        if relative != "mmkd/distributed.py":
            assert not any(n.startswith("torch.distributed") for n in imports(path)), relative
            assert "torch.distributed" not in path.read_text(), relative
        if not relative.startswith(("mmkd/training/", "mmkd/command/")):
            assert not any(n.split(".")[0] == "accelerate" for n in imports(path)), relative


def test_heavy_libraries_are_imported_where_they_are_used():
    for path in SOURCES:
        heavy = {n.split(".")[0] for n in imports(path, top_level_only=True)} & HEAVY
        assert not heavy, f"{path} imports {heavy} at the top"


PRIVATE = {  # module -> library attributes with a leading underscore, and the versions they were tried on
    "modeling_mmkd.modeling_mmkd": {"_parameters", "_model_mapping"},  # torch 2.10-2.14, transformers 5.14-5.24
}


def test_private_names_of_libraries_are_read_in_listed_modules():
    own = {"_asdict", "_replace", "_fields", "_make", "_exit"}  # public names of namedtuple and of os
    trees = {path: tree_of(path) for path in SOURCES}
    attributes = {path: [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)] for path, tree in trees.items()}
    for path, tree in trees.items():
        own |= {node.attr for node in attributes[path] if isinstance(node.ctx, ast.Store)}
        own |= {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        }
    for path in SOURCES:
        names = {node.attr for node in attributes[path] if node.attr.startswith("_") and not node.attr.startswith("__")}
        found = names - own
        assert found <= PRIVATE.get(name_of(path), set()), f"{path} reads {found}"


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
        assert path.stem not in {"utils", "helpers", "common"}, path
        assert not {"pickle", "dill", "joblib", "shelve"} & {n.split(".")[0] for n in imports(path)}, path
        for node in ast.walk(tree_of(path)):
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
    aliases = {
        "PIL": "pillow",
        "yaml": "pyyaml",
        "open_clip": "open_clip_torch",
        "sklearn": "scikit_learn",
        "markupsafe": "jinja2",
    }
    aliases |= {"skimage": "scikit_image", "openslide": "openslide_python", "markupsafe": "jinja2"}
    third_party = {aliases.get(n, n) for n in imported - sys.stdlib_module_names - {"mmkd", "modeling_mmkd"}}
    assert third_party <= declared, third_party - declared
