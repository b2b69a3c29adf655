"""Snippets of the model's page, in order, on a tiny folder; every page's commands against the settings they have."""

import dataclasses
import importlib
import re
import shlex
import typing
from pathlib import Path

import pytest
from PIL import Image
from tiny_model import save_tiny

from mmkd.command import cli
from mmkd.command.settings import parse

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "model.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21 with transformers 5.23
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # Trainer on a machine without an accelerator
def test_every_snippet_of_the_models_page_runs(tmp_path):
    for needed in ("accelerate", "peft", "sentence_transformers"):
        pytest.importorskip(needed, reason=f"the page shows {needed}")
    folder = save_tiny(tmp_path / "folder")
    names = {
        "folder": str(folder),
        "output": str(tmp_path / "output"),
        "image": Image.effect_noise((60, 44), 90).convert("RGB"),
    }
    assert len(SNIPPETS) >= 9
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"{PAGE.name}, snippet {number}", "exec"), names)
    assert names["output"] and (tmp_path / "output" / "adapter_model.safetensors").is_file()


def commands():
    """Every ``mmkd NAME ...`` of README and pages: the page, and its words."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for command in re.split(r"&&|;", line.partition(" #")[0]):
                    words = shlex.split(command)
                    if words[:1] == ["mmkd"]:
                        yield page.name, words[1:]


def test_every_command_of_the_pages_has_the_settings_that_it_gives(monkeypatch):
    monkeypatch.chdir(ROOT)
    tried = set()
    for page, (name, *arguments) in commands():
        assert name in cli.RECIPES, f"{page}: {name}"
        module = importlib.import_module(cli.RECIPES[name][0])
        settings = [
            value
            for key, value in vars(module).items()
            if key.endswith("Settings") and dataclasses.is_dataclass(value) and value.__module__ == module.__name__
        ]
        settings = settings or [typing.get_type_hints(module.main)["settings"]]
        if len(settings) > 1:  # a command of commands
            continue
        try:
            parse(settings[0], cli.split_launcher_options(arguments)[1])
        except (ValueError, FileNotFoundError) as error:
            pytest.fail(f"{page}: mmkd {name} {shlex.join(arguments)}: {error}")
        tried.add(name)
    assert {"finetune", "push", "export", "distill"} <= tried
