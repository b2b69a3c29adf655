"""transformers' own test mix-ins, imported from where `fetch.py` put them; a skip with its reason where they are not.

What they import beside themselves is not in the source distribution: exporters and generation do not concern a dual
encoder, and pictures of the Hub are replaced by noise.
"""

import importlib.util
import sys
import types
import warnings

import pytest
from fetch import FOLDER
from PIL import Image

PACKAGE = "transformers_own_tests"


def load(name):
    """A module of the mix-ins.

    Args:
        name: such as ``test_modeling_common``.
    """
    if not FOLDER.is_dir():
        pytest.skip(f"{FOLDER} is not there; `python tests/conformance/fetch.py` gets it", allow_module_level=True)
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
