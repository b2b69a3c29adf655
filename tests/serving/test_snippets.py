"""The snippets of the page about the service, run against one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from served import noise, serve_apart
from tiny_model import save_tiny

SECTION = (
    (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8").split("## The service")[1]
)
PLACE = "http://127.0.0.1:8000"


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", SECTION, flags=re.DOTALL)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("served") / "tiny")
    with serve_apart(folder, "--page", "false") as (_, address):
        yield address


def run(command, folder, **options):
    (folder / "picture.png").write_bytes(noise())
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl(address, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    lines = [line for block in snippets("bash") for line in block.splitlines() if line.startswith("curl")]
    assert len(lines) == 3
    for line in lines:
        output = run(["bash", "-c", line.replace(PLACE, address)], tmp_path)
        assert '"embedding"' in output or '"probabilities"' in output, output


def test_python(address, tmp_path):
    (snippet,) = snippets("python")
    assert -1 <= float(run([sys.executable, "-c", snippet.replace(PLACE, address)], tmp_path)) <= 1


def test_javascript(address, tmp_path):
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    (snippet,) = snippets("js")
    output = run(["node", "--input-type=module", "-e", snippet.replace(PLACE, address)], tmp_path)
    assert "chest X-ray" in output
