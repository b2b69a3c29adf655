"""Samples of a source, the store that their images are read from, and how a manifest names columns, rows and labels.

Questions about images are read in the forms of VQA-RAD and of SLAKE.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from mmkd.command.settings import nearest
from mmkd.data.images import finish_image, open_header, read_image_bytes
from mmkd.data.pixel_rules import DEFAULT_WINDOW, UnreadableImageError, Window
from mmkd.data.splits import meaning_of
from mmkd.data.table import SPLITS
from mmkd.evaluation.datasets.manifest import ASSIGNED, HELD_OUT, OF_CLASSES, Manifest
from mmkd.files import is_inside, leads_inside, read_json

CLOSED, ENGLISH = "CLOSED", "en"
SLAKE_FILES = {"train": ["train.json"], "validation": ["validate.json", "validation.json"], "test": ["test.json"]}
Questions = tuple[list["Question"], dict[str, str], dict[str, str]]
MISSING = "missing"
IN_BRACES = re.compile(r"\{([^{}]+)\}")
TRUE, FALSE = ("1", "1.0", "true", "yes"), ("", "0", "0.0", "false", "no")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image.

    Attributes:
        sha256: of the image file.
        closed: answered by yes or no, or by one of the things it names.
        split: train, validation or test as its publisher states; empty where that is not stated.
    """

    sha256: str
    text: str
    answer: str
    closed: bool
    split: str = ""


def read_vqa_rad(path: Path) -> Questions:
    """A JSON list of objects with ``image_name``, ``question``, ``answer``, ``answer_type``.

    A ``split`` is kept; VQA-RAD itself states it in ``phrase_type``, where it begins with ``test``.

    Args:
        path: of the JSON; images lie beside it, in ``images/``.

    Returns:
        Questions about the images that can be read, image name -> SHA-256 of the file (empty where it cannot be read),
        and nothing, as the split belongs to the question and not to the image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of this form, a split is unknown, a question has no answer, or a name leaves the folder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--questions {path}: no such file")
    rows = _rows(path, "image_name")
    digests = {name: _digest(path.parent / "images", name) for name in sorted({row["image_name"] for row in rows})}
    return _questions(rows, "image_name", digests, str(path)), digests, {}


def read_slake(folder: Path, images: Path) -> Questions:
    """English questions of SLAKE's folder; an image's split is that of its questions.

    Returns:
        As `read_vqa_rad`, with image name -> split.

    Raises:
        ValueError: a file is not of this form, a question has no answer, or a name leaves the folder.
    """
    questions: list[Question] = []
    digests: dict[str, str] = {}
    splits: dict[str, str] = {}
    for split, files in SLAKE_FILES.items():
        file = next((folder / name for name in files if (folder / name).is_file()), folder / files[0])
        rows = [row for row in _rows(file, "img_name") if row.get("q_lang", ENGLISH) == ENGLISH]
        for name in dict.fromkeys(row["img_name"] for row in rows):
            digests[name] = digests.get(name) or _digest(images, name)
            splits.setdefault(name, split)
        rows = [row | {"split": split} for row in rows]
        questions += _questions(rows, "img_name", digests, str(file))
    return questions, digests, splits


def _rows(path: Path, image: str) -> list[dict[str, Any]]:
    """The objects of a JSON list of questions, whose images lie inside their folder."""
    rows, keys = read_json(path), (image, "question", "answer", "answer_type")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(keys) <= row.keys() for row in rows):
        raise ValueError(f"{path} must be a list of objects with {', '.join(keys)}")
    rows = [row | {image: str(row[image])} for row in rows]
    outside = next((row[image] for row in rows if not is_inside(row[image])), None)
    if outside is not None:
        raise ValueError(f"{path}: image {outside!r} leaves the folder; refused")
    return rows


def _questions(rows: Sequence[dict[str, Any]], image: str, digests: dict[str, str], place: str) -> list[Question]:
    """The questions whose image can be read."""
    found = [(row, *stated(row["question"], row["answer"], place)) for row in rows]
    return [
        Question(
            digests[row[image]], text, answer, str(row["answer_type"]).strip().upper() == CLOSED, stated_split(row)
        )
        for row, text, answer in found
        if digests[row[image]]
    ]


def _digest(folder: Path, name: str) -> str:
    """SHA-256 of an image file, empty where it cannot be read or is a link out of the folder."""
    found = files_under(folder).digest(name)
    return "" if found == MISSING else found


def stated(question: Any, answer: Any, place: str) -> tuple[str, str]:
    """A question and its answer as texts, the answer as `normalise` gives it.

    Raises:
        ValueError: either is empty or missing, which would count as an answer of its own.
    """
    text = "" if question is None else " ".join(str(question).split())
    answered = "" if answer is None or answer != answer else normalise(str(answer))
    if not text or not answered:
        lacking = "answer" if text else "text"
        raise ValueError(f"{place}: question {text!r} has no {lacking}; remove it, or keep it in another file")
    return text, answered


def stated_split(row: dict[str, Any]) -> str:
    """The split that a question states: ``split``, or VQA-RAD's ``phrase_type``; empty where it states none.

    Raises:
        ValueError: ``split`` is no name of a split.
    """
    if row.get("split"):
        split = meaning_of(str(row["split"]))
        if not split:
            raise ValueError(f"question {row.get('question')!r}: split {row['split']!r}; allowed: {', '.join(SPLITS)}")
        return split
    if row.get("phrase_type"):
        return "test" if str(row["phrase_type"]).startswith("test") else "train"
    return ""


def normalise(answer: str) -> str:
    """An answer without capitals, outer punctuation and superfluous white space, so that "Yes." is "yes"."""
    return " ".join(answer.lower().split()).strip(" .,;")


@dataclass(slots=True)
class Sample:
    """An image, caption or slide as its publisher describes it.

    Attributes:
        name: of the image in its store.
        labels: classes; several where it has several.
        caption: a sentence about it.
        group: patient, case or slide.
        split: name that the publisher uses; empty where none is given.
        metadata: further columns, of slides.
    """

    name: str
    labels: Sequence[str] = ()
    caption: str = ""
    group: str = ""
    split: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


class Store:
    """Images by name.

    Attributes:
        window: of DICOM and NIfTI.
    """

    def __init__(self, read: Callable[[str], bytes]) -> None:
        """Keep what gives the bytes stored under a name, or raises `UnreadableImageError`."""
        self.data = read
        self.window: Window = DEFAULT_WINDOW

    def image(self, name: str) -> Image.Image:
        """The image as upright 8-bit RGB.

        Raises:
            UnreadableImageError: with the reason.
        """
        return finish_image(open_header(self.data(name), name, window=self.window), name)

    def digest(self, name: str) -> str:
        """SHA-256 of what is stored, and of a window that is not the default; ``"missing"`` if it cannot be read."""
        window = b"" if self.window == DEFAULT_WINDOW else str(self.window).encode()
        try:
            return hashlib.sha256(self.data(name) + window).hexdigest()
        except UnreadableImageError:
            return MISSING


def files_under(folder: Path) -> Store:
    """Images in files under a folder; a name or link that leaves it is refused."""
    root = folder.resolve()

    def read(name: str) -> bytes:
        path = root / name
        if not is_inside(name) or not leads_inside(root, path):
            raise UnreadableImageError("missing", f"{name} lies outside {root}; refused")
        return read_image_bytes(path)

    return Store(read)


@dataclass
class Reading:
    """What was read of a source.

    Attributes:
        samples: one for each image, caption or slide.
        store: of the images.
        questions: about the images.
        notes: what a reader of the results should know of it.
    """

    samples: list[Sample]
    store: Store
    questions: list[Question] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def images_folder(manifest: Manifest, folder: Path) -> Path:
    """The folder of the images: that of the table, or the one that ``images`` names relative to it.

    Raises:
        ValueError: it is not there.
    """
    name = str(manifest.source.get("images", ""))
    if not (folder / name).is_dir():
        raise ValueError(
            f"source: images {name!r} is no folder in {folder}; name it relative to the folder of the table"
        )
    return folder / name


def chosen(manifest: Manifest, key: str, columns: Iterable[str], needed: bool) -> str:
    """The column that the source, or by default the usual name, gives for a field; empty where there is none.

    Raises:
        ValueError: it is named or needed and the table lacks it.
    """
    columns = list(columns)
    named = getattr(manifest, key) if key in ("group", "split") else manifest.source.get(key)
    name = str(named or key)
    if name in columns:
        return name
    if named or needed:
        raise ValueError(f"no column {name!r} for {key}{nearest(name, columns)}; the table has {', '.join(columns)}")
    return ""


def row_condition(manifest: Manifest, columns: Sequence[str]) -> Callable[[dict[str, Any]], bool]:
    """Whether a row has one of the values that ``where`` names for each of its columns.

    Raises:
        ValueError: the conditions are no mapping or name a column that is not there.
    """
    where = manifest.source.get("where") or {}
    if not isinstance(where, dict):
        raise ValueError(f"source: where must be a mapping such as {{modality: X-ray}}, not {where!r}")
    unknown = next((column for column in where if column not in columns), None)
    if unknown is not None:
        near = nearest(str(unknown), columns)
        raise ValueError(f"source: where names a column {unknown!r}{near} that the table lacks: {', '.join(columns)}")
    wanted = {column: set(map(str, own if isinstance(own, list) else [own])) for column, own in where.items()}
    return lambda row: all(str(row.get(column)) in own for column, own in wanted.items())


def split_labels(manifest: Manifest, text: str) -> list[str]:
    """The labels that a text holds: one, or for multi-label data those between separators."""
    if manifest.task != "multilabel":
        return [text.strip()] if text.strip() else []
    return [part.strip() for part in text.split(str(manifest.source.get("separator", "|"))) if part.strip()]


def group_of(manifest: Manifest, name: str, given: str) -> str:
    """The group of an image: that of its row, or what ``group_pattern`` finds in its name.

    Raises:
        ValueError: the pattern is wrong, or finds nothing in a name.
    """
    pattern = manifest.source.get("group_pattern")
    if not pattern:
        return given
    try:
        found = re.search(str(pattern), name)
    except re.error as error:
        raise ValueError(f"source: group_pattern {pattern!r} is no regular expression: {error}") from None
    if found is None:
        raise ValueError(f"source: group_pattern {pattern!r} finds no group in {name!r}")
    return found[1] if found.groups() else found[0]


def table_fields(manifest: Manifest, columns: Sequence[str], image: str) -> dict[str, Any]:
    """The column of each field of a table with images; ``label`` may be several, one for each class.

    Raises:
        ValueError: one that is named or needed is not there.
    """
    label = manifest.source.get("label")
    if isinstance(label, list):
        absent = next((name for name in label if name not in columns), None)
        if absent is not None:
            raise ValueError(f"source: no column {absent!r} for label; the table has {', '.join(columns)}")
    else:
        label = chosen(manifest, "label", columns, manifest.task in OF_CLASSES)
    return {
        image: _file_field(manifest, image, columns),
        "label": label,
        "caption": chosen(manifest, "caption", columns, manifest.task == "retrieval"),
        "group": chosen(manifest, "group", columns, False),
        "split": split_column(manifest, columns),
    }


def split_column(manifest: Manifest, columns: Sequence[str]) -> str:
    """The column of the split; empty where none is to be read."""
    return "" if manifest.split in (HELD_OUT, ASSIGNED) else chosen(manifest, "split", columns, False)


def row_sample(manifest: Manifest, row: dict[str, Any], fields: dict[str, Any], name: str) -> Sample:
    """A row as a sample; empty cells are empty texts."""
    label = fields["label"]
    if isinstance(label, list):
        labels = [column for column in label if _is_set(row[column], column, name)]
    elif label and isinstance(row[label], (list, tuple)):
        labels = [str(value) for value in row[label]]
    else:
        labels = split_labels(manifest, _text(row[label])) if label else []
    texts = {key: _text(row[fields[key]]) if fields[key] else "" for key in ("caption", "group", "split")}
    return Sample(name, labels, " ".join(texts["caption"].split()), texts["group"], texts["split"])


def _file_field(manifest: Manifest, image: str, columns: Sequence[str]) -> str:
    """The column of the image, or a pattern of columns in braces such as ``{class}/{name}.jpg``."""
    pattern = str(manifest.source.get(image) or "")
    used = IN_BRACES.findall(pattern)
    absent = next((name for name in used if name not in columns), None)
    if absent is not None:
        near = nearest(absent, columns)
        raise ValueError(f"source: {image} names a column {absent!r}{near}; the table has {', '.join(columns)}")
    return pattern if used else chosen(manifest, image, columns, True)


def file_name(row: dict[str, str], field: str) -> str:
    """The file of a row; an ending that a pattern adds is not doubled where the column has it."""
    if "{" not in field:
        return row[field]
    name = IN_BRACES.sub(lambda found: row[found[1]], field)
    ending = PurePosixPath(field).suffix
    return name.removesuffix(ending) if ending and name.lower().endswith(2 * ending.lower()) else name


def _is_set(value: Any, column: str, name: str) -> bool:
    """Whether a cell of a column of zeros and ones is 1; an empty cell counts as 0.

    Raises:
        ValueError: it holds something else, such as -1 for an uncertain finding.
    """
    text = _text(value).strip().lower()
    if text not in (*TRUE, *FALSE):
        raise ValueError(f"{name}: {column!r} holds {value!r}, neither 0 nor 1; leave such rows out with `where`")
    return text in TRUE


def _text(value: Any) -> str:
    return "" if value is None else str(value)
