"""The Space of the Hub and the files for containers: their commands have the settings that they give."""

import importlib.util
import json
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from mmkd.command.settings import parse
from mmkd.hub.serve import ServeSettings, check

ROOT = Path(__file__).resolve().parents[2]
SPACE, SERVING = ROOT / "hub" / "space", ROOT / "examples" / "serving"


@pytest.fixture
def app():
    spec = importlib.util.spec_from_file_location("app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_space_serves_its_model_to_everyone_in_a_frame(app):
    command, *arguments = app.arguments({"MODEL": "owner/mmkd-clip"})
    settings = parse(ServeSettings, arguments)
    check(settings)
    assert command == "serve" and (settings.model, settings.host, settings.port) == ("owner/mmkd-clip", "0.0.0.0", 7860)
    assert settings.without_key and "https://huggingface.co" in settings.frame_ancestors
    with pytest.raises(ValueError, match="MODEL"):
        app.arguments({})
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py") and len(front["short_description"]) <= 60
    assert (SPACE / "requirements.txt").read_text() == f"./mmkd_clip-{version('mmkd-clip')}-py3-none-any.whl[serve]\n"


def test_commands_of_containers_and_of_the_unit():
    docker = (SERVING / "Dockerfile").read_text()
    unit = (SERVING / "mmkd.service").read_text()
    compose = yaml.safe_load((SERVING / "compose.yaml").read_text())["services"]["mmkd"]
    commands = [
        json.loads(re.search(r"^CMD (.*)", docker, re.MULTILINE)[1]),
        compose["command"],
        re.search(r"^ExecStart=\S+ serve (.*)", unit, re.MULTILINE)[1].split(),
    ]
    for arguments in commands:
        check(parse(ServeSettings, arguments))
    assert "\nUSER mmkd" in docker and "HEALTHCHECK" in docker and compose["read_only"] and compose["user"] != "0"


def test_systemd_accepts_the_unit():
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(["systemd-analyze", "verify", SERVING / "mmkd.service"], capture_output=True, text=True)
    problems = [line for line in done.stderr.splitlines() if "not executable" not in line]
    assert not problems, problems
