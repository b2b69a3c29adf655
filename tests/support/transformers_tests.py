"""Transformers' own test mix-ins, of the release that is installed, from its source distribution on PyPI.

python tests/support/transformers_tests.py && pytest tests/conformance

The program unpacks the Python files directly under ``tests/`` into the ignored folder ``.transformers-tests/VERSION``;
`load` imports them from there. What they import beside themselves is not in the source distribution: exporters and
generation do not concern a dual encoder, and pictures of the Hub are replaced by noise.
"""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
from pathlib import Path

import pytest
import transformers
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / ".transformers-tests" / transformers.__version__
PACKAGE = "transformers_own_tests"


def load(name):
    """A module of the mix-ins.

    Args:
        name: such as ``test_modeling_common``.
    """
    if not FOLDER.is_dir():
        pytest.skip(
            f"{FOLDER} is not there; `python tests/support/transformers_tests.py` gets it", allow_module_level=True
        )
    pytest.importorskip("parameterized", reason="transformers' mix-ins need parameterized, of the extra dev")
    if PACKAGE not in sys.modules:
        _install_package()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{PACKAGE}.{name}")


def _install_package():
    spec = importlib.util.spec_from_loader(PACKAGE, loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(FOLDER)]
    sys.modules[PACKAGE] = package
    empty = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
    for path, class_name in empty.items():
        parent, _, _ = path.partition(".")
        sys.modules[f"{PACKAGE}.{parent}"] = types.ModuleType(f"{PACKAGE}.{parent}")
        module = types.ModuleType(f"{PACKAGE}.{path}")
        setattr(module, class_name, type(class_name, (), {}))
        sys.modules[module.__name__] = module
    image = FOLDER / "image.png"
    if not image.is_file():
        Image.effect_noise((90, 70), 80).convert("RGB").save(image)
    module = types.ModuleType("fetch_hub_objects_for_ci")
    module.url_to_local_path = lambda url: str(image) if url.endswith((".png", ".jpg")) else url
    sys.modules[module.__name__] = module


def main() -> None:
    if FOLDER.is_dir():
        print(f"{FOLDER} is there")
        return
    with tempfile.TemporaryDirectory() as temporary:
        requirement = f"transformers=={transformers.__version__}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--no-build-isolation", "--dest", temporary, requirement], check=True)
        unpacked = Path(temporary) / "unpacked"
        unpacked.mkdir()
        with tarfile.open(next(Path(temporary).glob("transformers-*.tar.gz"))) as archive:
            for member in archive.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                    content = archive.extractfile(member)
                    assert content is not None
                    (unpacked / parts[2]).write_bytes(content.read())
        FOLDER.parent.mkdir(exist_ok=True)
        shutil.move(unpacked, FOLDER)
    print(f"{len(list(FOLDER.iterdir()))} files in {FOLDER}")


if __name__ == "__main__":
    main()
