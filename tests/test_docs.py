"""Python blocks of README and pages run; in notebooks too, commands have the settings that they give and links hold."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import typing
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tiny_model import save_tiny

from mmkd.command import cli
from mmkd.command.settings import parse
from mmkd.data.features.writer import FeatureWriter
from mmkd.distillation.heads import TeacherHeads
from mmkd.encoders.zoo import load_encoder
from mmkd.evaluation.datasets.manifest import make_manifest
from mmkd.evaluation.embeddings.encoders import named_sources
from mmkd.evaluation.settings import check as check_evaluation
from mmkd.serving.index import SearchIndex

ROOT = Path(__file__).resolve().parents[1]
MODEL_PAGE = ROOT / "docs" / "model.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.md"))
TEXTS = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "llms.txt")), *NOTEBOOKS, *PAGES]
ELSEWHERE = ("http://127.0.0.1", "mmkd-clip-onnx")  # a running service, an export: tests/hub runs both
NUMBER = re.compile(r"[*~<]*[+-]?\.?\d")
WRITTEN_BY = re.compile(r"<!-- (written by|by hand, \d{4}-\d\d-\d\d|sizes): (mmkd|python) .+ -->")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def run_blocks(page: Path, names: dict[str, object]) -> None:
    for number, code in enumerate(blocks(page, "python")):
        compiled = compile(code, f"{page.name}, block {number}", "exec")
        if not any(mark in code for mark in ELSEWHERE):
            exec(compiled, names)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21 with transformers 5.23
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # Trainer on a machine without an accelerator
def test_every_snippet_of_the_models_page_runs(tmp_path):
    for needed in ("accelerate", "peft", "sentence_transformers"):
        pytest.importorskip(needed, reason=f"the page shows {needed}")
    names = {
        "folder": str(save_tiny(tmp_path / "folder")),
        "output": str(tmp_path / "output"),
        "image": Image.effect_noise((60, 44), 90).convert("RGB"),
    }
    assert len(blocks(MODEL_PAGE, "python")) >= 9
    run_blocks(MODEL_PAGE, names)
    assert names["output"] and (tmp_path / "output" / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The folders and files that the pages name: a model with heads, pictures, an index, features."""
    folder = tmp_path_factory.mktemp("pages")
    model = save_tiny(folder / "mmkd-clip")
    TeacherHeads({"image": 16, "text": 16}, {"PLIP": 8}).save(model)
    for name in ("picture.png", "scan.png", "xray.png"):
        Image.effect_noise((60, 44), 90).convert("RGB").save(folder / name)
    encoder = load_encoder(str(model), "cpu")
    index = SearchIndex.create(folder / "scans.index", encoder.provenance, encoder.dim)
    index.add(["a.png", "b.png"], encoder.encode_texts(["an MRI", "a CT"]))
    writer = FeatureWriter(folder / "features" / "PLIP", "PLIP")
    writer.add(["pair-4", "pair-17"], torch.ones(2, 512), torch.ones(2, 512))
    writer.finish({"license": "not declared", "weights": "vinid/plip", "pooling": "cls"})
    return folder


@pytest.mark.parametrize(
    "page", [page for page in (TEXTS[0], *PAGES) if page != MODEL_PAGE and blocks(page, "python")], ids=name_of
)
def test_python_blocks_run(page, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    run_blocks(page, {"image_embeds": torch.ones(1, 16)})


def test_yaml_blocks_are_mappings_and_their_manifests_are_accepted():
    manifests = 0
    for page in TEXTS:
        for block in blocks(page, "yaml"):
            values = yaml.safe_load(block)
            assert isinstance(values, dict), (page, block)
            if "id" in values and "task" in values:
                make_manifest(values)
                manifests += 1
    assert manifests >= 3


def test_bash_blocks_parse():
    script = "\n".join(block for page in TEXTS for block in blocks(page, "bash"))
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert not done.stderr, done.stderr


def commands():
    """Every ``mmkd NAME ...`` of README, pages and notebooks: the page, and its words."""
    for page in TEXTS:
        if page.name == "offline.md":  # variables of a shell
            continue
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for command in re.split(r"&&|;|\|", line.partition(" #")[0]):
                    words = shlex.split(command)
                    if words[:1] == ["mmkd"]:
                        yield name_of(page), words[1:]


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
            given = parse(settings[0], cli.split_launcher_options(arguments)[1])
            if name == "eval":
                check_evaluation(given, named_sources(given.encoders))
        except (ValueError, FileNotFoundError) as error:
            pytest.fail(f"{page}: mmkd {name} {shlex.join(arguments)}: {error}")
        tried.add(name)
    assert {"finetune", "push", "export", "distill"} <= tried


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert page not in PAGES or target.is_relative_to(ROOT / "docs"), f"{link} leaves the site"
        assert not anchor or anchor in slugs(target), link


@pytest.mark.parametrize("page", [page for page in TEXTS if page.name != "log.md"], ids=name_of)
def test_named_files_of_the_repository_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/])(?:mmkd|train|hub|tests|examples|modeling_mmkd)/[\w/.-]+\.\w+", text)
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_page_is_in_the_navigation_of_the_site():
    named = re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(named) == [str(page.relative_to(ROOT / "docs")) for page in PAGES]


def tables_of_figures(page: Path) -> "typing.Iterator[tuple[str, str]]":
    """The tables whose cells, the first column apart, are mostly numbers: header, and the comments above it."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if not re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", line):
            continue
        rest = "\n".join(lines[number + 1 :]).partition("\n\n")[0].splitlines()
        cells = [cell.strip() for row in rest if row.startswith("|") for cell in row.strip("|").split("|")[1:]]
        cells = [cell for cell in cells if cell]
        above = number - 1
        while above and lines[above - 1].startswith("<!--"):
            above -= 1
        if sum(bool(NUMBER.match(cell)) and len(cell) < 40 for cell in cells) * 2 > len(cells):
            yield lines[number - 1], "\n".join(lines[above : number - 1])


def test_tables_of_figures_name_the_command_that_wrote_them():
    found = 0
    for page in TEXTS:
        if page.name == "log.md":  # its entries have dates and commands
            continue
        of_page = page.read_text(encoding="utf-8")[:200]
        for header, comments in tables_of_figures(page):
            assert WRITTEN_BY.search(comments) or WRITTEN_BY.search(of_page), (
                f"{name_of(page)}: put <!-- written by: COMMAND --> or <!-- by hand, DATE: COMMAND --> above {header}"
            )
            found += 1
    assert found >= 15


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900
