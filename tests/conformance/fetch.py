"""Fetch transformers' own test mix-ins, of the release that is installed, from its source distribution on PyPI.

python tests/conformance/fetch.py && pytest tests/conformance

Only Python files directly under ``tests/`` are unpacked, into the ignored folder ``.transformers-tests/VERSION``.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

FOLDER = Path(__file__).resolve().parents[2] / ".transformers-tests" / transformers.__version__


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
