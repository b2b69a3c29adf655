"""The student as a folder: read to go on training it, written when it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from modeling_mmkd import MMKDClipModel, MMKDClipProcessor


def load_student(name: str) -> tuple[MMKDClipModel, Any]:
    """Read model and processor from a ``from_pretrained`` folder or Hub id, in fp32.

    Raises:
        FileNotFoundError: the name looks like a folder that is not there.
        OSError: neither a model folder nor a Hub id that can be reached.
    """
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(f"--model {name}: no such folder; `mmkd pretrain --output {name}` writes one")
    model = MMKDClipModel.from_pretrained(name, dtype=torch.float32)
    return model, MMKDClipProcessor.from_pretrained(name)


def save_student(folder: Path, model: MMKDClipModel, processor: Any) -> None:
    """Write what ``from_pretrained`` reads."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
