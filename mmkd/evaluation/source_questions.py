"""Questions about images in files: VQA-RAD's JSON beside its images, and SLAKE's folder of one JSON for each split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmkd.data.images import UnreadableImage, read_image_bytes
from mmkd.data.records import is_inside
from mmkd.data.splits import meaning_of
from mmkd.evaluation.manifest import Manifest
from mmkd.evaluation.questions import CLOSED, Question, read_questions, stated
from mmkd.evaluation.source import Files, Reading, Sample
from mmkd.files import read_json

SLAKE_FILES = {"train": ["train.json"], "validation": ["validate.json", "validation.json"], "test": ["test.json"]}
ENGLISH = "en"


def read_question_files(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """Questions and one sample for each distinct image; which form it is shows in whether the source is a folder.

    Raises:
        ValueError: the files are of neither form.
    """
    path = paths[0]
    if path.is_dir():
        return _read_slake(path, str(manifest.source.get("images", "imgs")))
    rows = read_json(path)
    questions = read_questions(path)
    names = sorted({str(row["image_name"]) for row in rows})
    images = path.parent / "images"
    samples: dict[str, Sample] = {}
    for name in names:
        digest = _digest(images / name)
        samples.setdefault(digest or name, Sample(name, group=digest))
    return Reading(list(samples.values()), Files(images), questions)


def _read_slake(folder: Path, images: str) -> Reading:
    """English questions; an image's split is that of its questions."""
    root = folder / images
    samples: dict[str, Sample] = {}
    digests: dict[str, str] = {}
    questions: list[Question] = []
    for split, files in SLAKE_FILES.items():
        file = next((name for name in files if (folder / name).is_file()), files[0])
        rows: Any = read_json(folder / file)
        keys = {"img_name", "question", "answer", "answer_type"}
        if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in rows):
            raise ValueError(f"{folder / file} must be a list of objects with {', '.join(sorted(keys))}")
        for row in rows:
            if row.get("q_lang", ENGLISH) != ENGLISH:
                continue
            name = str(row["img_name"])
            if not is_inside(name):
                raise ValueError(f"{folder / file}: image {name!r} leaves the folder; refused")
            if name not in digests:
                digests[name] = _digest(root / name)
            samples.setdefault(digests[name] or name, Sample(name, group=digests[name], split=split))
            is_closed = str(row["answer_type"]).strip().upper() == CLOSED
            text, answer = stated(row["question"], row["answer"], str(folder / file))
            questions.append(Question(digests[name], text, answer, is_closed, meaning_of(split)))
    return Reading(list(samples.values()), Files(root), [question for question in questions if question.sha256])


def _digest(path: Path) -> str:
    """SHA-256 of an image file, empty where it cannot be read."""
    try:
        return hashlib.sha256(read_image_bytes(path)).hexdigest()
    except UnreadableImage:
        return ""
