"""The student as a folder: read to go on training it, written when it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmkd.provenance import write_provenance
from mmkd.teachers.hfclip import CONFIG_FILES
from mmkd.teachers.weights import fetch, load_transformers, quiet_transformers
from modeling_mmkd import MMKDClipModel, MMKDClipProcessor


def load_student(name: str) -> tuple[MMKDClipModel, Any]:
    """Read model and processor from a ``from_pretrained`` folder or Hub id, in fp32.

    Raises:
        FileNotFoundError: there is no such folder, or no Hub id that can be reached.
        ValueError: weights that are damaged or not those of the model; the message lists the keys.
    """
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(f"--model {name}: no such folder; `mmkd pretrain --output {name}` writes one")
    folder = fetch(name, [*CONFIG_FILES, "*.safetensors", "*.safetensors.index.json"])
    return load_transformers(MMKDClipModel, name, folder), MMKDClipProcessor.from_pretrained(folder)


def save_student(folder: Path, model: MMKDClipModel, processor: Any, provenance: dict[str, Any] | None = None) -> None:
    """Write what ``from_pretrained`` reads and, where it is known, what the student was made from."""
    with quiet_transformers():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    if provenance is not None:
        write_provenance(folder, provenance)
