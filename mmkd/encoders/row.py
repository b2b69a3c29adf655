"""What has to be said of a teacher to load it: one row, in `zoo` for the nine or in a YAML for anybody's own."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from mmkd.command.settings import parse
from mmkd.data.licenses import is_open
from mmkd.distributed import rank
from mmkd.files import fingerprint

logger = logging.getLogger(__name__)

Form = Literal["openclip", "hfclip", "ours", "unimed", "pmcclip", "medclip", "python"]
UNDECLARED = "not declared"
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_announced: set[str] = set()


@dataclass(frozen=True)
class TeacherRow:
    """One teacher.

    Attributes:
        name: as it is called in feature stores.
        form: how its weights are written, and so which loader reads them.
        weights: Hub id, folder, or (openclip, unimed) a file; for python ``module.function``.
        files: names of the weight files; for one-file forms the first that exists is taken.
        architecture: name of an open_clip architecture, where the weights bring no ``open_clip_config.json``.
        text_model: Hub id whose configuration and tokenizer the text tower uses.
        vision_model: Hub id whose configuration the image tower uses.
        dim: width of the features; 0 to take what the weights have.
        context: most tokens of a text; 0 to take what the weights say.
        mean: of the image channels, where the weights do not say.
        std: likewise.
        heads: of PMC-CLIP's attention pool.
        license: of the weights.
        gated: access has to be asked for on the Hub.
        repo_type: on the Hub, ``model`` or ``dataset``.
        revision: commit, tag or branch on the Hub; the commit that was read is recorded either way.
        trust_remote_code: (hfclip) run the model code that the weights bring along.
        note: what is inferred or unknown.
    """

    name: str
    form: Form
    weights: str
    files: list[str] = field(default_factory=list)
    architecture: str = ""
    text_model: str = ""
    vision_model: str = ""
    dim: int = 0
    context: int = 0
    mean: list[float] = field(default_factory=lambda: list(OPENAI_MEAN))
    std: list[float] = field(default_factory=lambda: list(OPENAI_STD))
    heads: int = 32
    license: str = UNDECLARED
    gated: bool = False
    repo_type: str = "model"
    revision: str | None = None
    trust_remote_code: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        """Check what can be checked without the weights.

        Raises:
            ValueError: the name is not fit for a folder, or there are no weights.
        """
        if not self.name or Path(self.name).name != self.name or not self.weights:
            raise ValueError(f"a teacher needs a name without slashes and weights, not {self.name!r}, {self.weights!r}")


def read_row(path: Path) -> TeacherRow:
    """A teacher of one's own from YAML; a weights path in it may be relative to the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, an unknown or missing key, or a value of the wrong type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should be the YAML row of a teacher")
    try:
        row = parse(TeacherRow, ["--config", str(path)])
    except ValueError as error:
        raise ValueError(f"teacher row {path}: {str(error).removeprefix(f'{path}: ')}") from error
    beside = path.parent / row.weights
    return dataclasses.replace(row, weights=str(beside)) if row.form != "python" and beside.exists() else row


def describe(row: TeacherRow, weight_files: list[Path], packages: list[str], **facts: Any) -> dict[str, Any]:
    """The provenance of a teacher: the row's facts, the weights' fingerprint, the loader's own facts, versions.

    Folder names of this machine are left out, so that equal weights give equal stores anywhere.
    """
    source = row.weights if not Path(row.weights).exists() else Path(row.weights).resolve().name
    return {
        "teacher": row.name,
        "form": row.form,
        "weights": source,
        "revision": _commit(weight_files) or row.revision,
        "files": sorted(file.name for file in weight_files),
        "fingerprint": fingerprint(weight_files),
        **facts,
        "license": row.license,
        "note": row.note,
        "versions": {package: _version(package) for package in ["torch", "transformers", *packages]},
    }


def announce(provenance: dict[str, Any]) -> None:
    """Say once what a teacher does with its input, and loudly when its license restricts or says nothing."""
    name, license = provenance["teacher"], provenance["license"]
    if name in _announced or rank() > 0:
        return
    _announced.add(name)
    for fact in ("preprocessing", "tokenizer", "context", "pooling"):
        logger.info("%s: %s %s", name, fact, provenance.get(fact))
    if not is_open(license):
        logger.warning(
            "LICENSE of teacher %s: %s. Features made with it, and students taught by them, may be bound by that. "
            "It is recorded beside the features.",
            name,
            license,
        )


def _commit(files: list[Path]) -> str:
    """The commit that files in the Hub's cache belong to, nothing for files elsewhere."""
    folder = files[0].parent if files else Path()
    return folder.name if folder.parent.name == "snapshots" else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
