"""The specification of a teacher, from ``teachers.yaml`` or a user's YAML file, and the provenance of its features."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mmkd.command.settings import parse
from mmkd.data.licenses import is_open
from mmkd.data.provenance import installed_versions
from mmkd.distributed import rank
from mmkd.files import fingerprint

logger = logging.getLogger(__name__)

Form = Literal["openclip", "hfclip", "ours", "unimed", "pmcclip", "medclip", "python", "towers"]
UNDECLARED = "not declared"
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_announced: set[str] = set()


@dataclass(frozen=True)
class TeacherSpec:
    """One teacher.

    Attributes:
        name: its name in feature stores.
        form: the published form of its weights, which decides the loader.
        weights: Hub id, folder, or (openclip, unimed) a file; for python ``module.function``.
        files: names of the weight files; for one-file forms the first that exists is taken.
        architecture: name of an open_clip architecture, where the weights have no ``open_clip_config.json``.
        text_model: Hub id of the text tower's configuration and tokenizer.
        vision_model: Hub id of the image tower's configuration.
        dim: width of the features; 0 to take that of the weights.
        context: maximum number of tokens of a text; 0 to take that of the weights.
        mean: of the image channels, where the weights do not state it.
        std: likewise.
        heads: of PMC-CLIP's attention pool.
        license: of the weights.
        gated: the Hub grants access on request only.
        repo_type: on the Hub, ``model`` or ``dataset``.
        revision: commit, tag or branch on the Hub; the commit that was read is recorded either way.
        trust_remote_code: (hfclip) run the model code in the weights' repository.
        note: what is inferred, unconfirmed or unknown.
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
        """Check the name and the weights.

        Raises:
            ValueError: the name is not fit for a folder, or there are no weights.
        """
        if not self.name or Path(self.name).name != self.name or not self.weights:
            raise ValueError(f"a teacher needs a name without slashes and weights, not {self.name!r}, {self.weights!r}")


def read_spec(path: Path) -> TeacherSpec:
    """Read a user's teacher from YAML; the path of its weights may be relative to the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, an unknown or missing key, or a value of the wrong type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should be the YAML file of a teacher")
    try:
        spec = parse(TeacherSpec, ["--config", str(path)])
    except ValueError as error:
        raise ValueError(f"teacher {path}: {str(error).removeprefix(f'{path}: ')}") from error
    beside = path.parent / spec.weights
    return dataclasses.replace(spec, weights=str(beside)) if spec.form != "python" and beside.exists() else spec


def describe(
    spec: TeacherSpec,
    weight_files: Sequence[Path],
    packages: Sequence[str] = (),
    *,
    preprocessing: str,
    tokenizer: str,
    context: int,
    pooling: str,
    logit_scale: Tensor | None,
) -> dict[str, Any]:
    """The provenance of a teacher as JSON values: the specification, the weights' fingerprint, the loader, versions.

    Folder names of this machine are left out, so that equal weights give equal stores anywhere.

    Args:
        spec: the teacher.
        weight_files: the files that were read.
        packages: whose versions matter beside torch and transformers.
        preprocessing: of images.
        tokenizer: its name.
        context: maximum number of tokens of a text.
        pooling: of the text tower.
        logit_scale: the trained natural logarithm of the factor of the cosine similarities, one element; None where the
            weights have none. The factor itself, the inverse of the teacher's temperature, is recorded.
    """
    path = Path(spec.weights)
    return {
        "teacher": spec.name,
        "form": spec.form,
        "weights": path.resolve().name if path.exists() else spec.weights,
        "revision": _commit(weight_files) or spec.revision,
        "files": sorted(file.name for file in weight_files),
        "fingerprint": fingerprint(weight_files),
        "preprocessing": preprocessing,
        "tokenizer": tokenizer,
        "context": context,
        "pooling": pooling,
        "logit_scale": None if logit_scale is None else round(math.exp(float(logit_scale.detach())), 4),
        "license": spec.license,
        "note": spec.note,
        "versions": installed_versions(["torch", "transformers", *packages]),
    }


def announce(provenance: dict[str, Any]) -> None:
    """Log the preprocessing of a teacher once, and warn if its licence is restrictive or not declared."""
    name, license = provenance["teacher"], provenance["license"]
    if name in _announced or rank() > 0:
        return
    _announced.add(name)
    for key in ("preprocessing", "tokenizer", "context", "pooling"):
        logger.info("%s: %s %s", name, key, provenance.get(key))
    if not is_open(license):
        logger.warning(
            "LICENSE of teacher %s: %s. It may bind features made with it, and students distilled from them. "
            "It is recorded beside the features.",
            name,
            license,
        )


def _commit(files: Sequence[Path]) -> str:
    """The commit of files in the Hub's cache; empty for other files."""
    folder = files[0].parent if files else Path()
    return folder.name if folder.parent.name == "snapshots" else ""
