"""Zero-shot prediction: the labels a user names, as sentences, and their probabilities for images.

A label is the unit mean of its sentences. With cosines ``c`` and the factor ``s`` of the model (its trained logit
scale, or the calibrated one), the probabilities are

- ``single``: ``softmax_k(s c_k)`` over the labels, of which one applies;
- ``multilabel``: ``sigmoid(s (c_k - c'_k))`` for each label by itself, with ``c'`` of sentences that negate it;
- ``normal``: ``single`` of two labels, normal and abnormal.

They are no frequencies unless `mmkd calibrate` has set ``s`` on labelled images.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from mmkd.command.settings import nearest
from mmkd.data.features.shards import TensorMap, is_whole, shard_file, write_shard
from mmkd.data.prompts import (
    ABNORMAL,
    ANY_MODALITY,
    FAMILIES,
    NORMAL,
    class_vector,
    family,
    fill,
    fill_absence,
    templates_of,
)
from mmkd.data.readers import read_csv
from mmkd.files import read_yaml
from mmkd.serving.calibration import Calibration

Mode = Literal["single", "multilabel", "normal"]
Probabilities = NDArray[np.float64]

COLUMNS = ("label", "prompt", "negative_prompt", "modality")
LABEL_FILES = (".txt", ".csv", ".tsv", ".yaml", ".yml")
MOST_LABEL_BYTES = 16 << 20
MOST_LABELS = 100_000
DEFAULT_SCALE = 100.0  # CLIP's own limit, for weights that state no logit scale
DEFAULT_THRESHOLD = 0.5
CACHED_LABEL_SETS = 64
CACHE_VARIABLE = "XDG_CACHE_HOME"


class Encoder(Protocol):
    """What heat maps need of an encoder: arrays, or tensors that are read as arrays.

    Attributes:
        batch_size: images that are best given at once.
    """

    batch_size: int

    def encode_images(self, images: Sequence[Image.Image]) -> ArrayLike:
        """Images of any size and mode to unit vectors, (n, dim)."""

    def encode_texts(self, texts: Sequence[str]) -> ArrayLike:
        """Texts to unit vectors, (n, dim)."""


class ServedEncoder(Encoder, Protocol):
    """What prediction and the service need: an encoder whose images several threads prepare.

    `DualEncoder` satisfies both protocols, and so does an exported folder without torch (`mmkd.exporting.served`).

    Attributes:
        dim: width of its vectors.
        provenance: JSON values that describe it.
    """

    dim: int
    provenance: dict[str, Any]

    def prepare_any(self, image: Image.Image) -> Any:
        """Preprocess one image."""

    def encode_prepared(self, prepared: Sequence[Any]) -> ArrayLike:
        """Images that `prepare_any` has prepared to unit vectors, (n, dim)."""


@dataclass(frozen=True)
class Label:
    """A label and the sentences that describe it.

    Attributes:
        name: as it is shown.
        prompts: sentences that state it; empty to fill in templates.
        negative_prompts: sentences that negate it, for ``multilabel``; empty to fill in templates.
        modality: of the images, which chooses the templates; empty for the predictor's own.
    """

    name: str
    prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    modality: str = ""


@dataclass(frozen=True)
class Prediction:
    """What is predicted for one image.

    Attributes:
        probabilities: of all labels, the highest first.
        labels: the answer: one label (``single``, ``normal``), all above their thresholds (``multilabel``); none where
            the prediction abstains.
        conformal_set: the labels that contain the true one at the calibrated rate; None without calibration.
        abstained: the image is less similar to every label than calibration allows: none of these.
    """

    probabilities: dict[str, float]
    labels: tuple[str, ...]
    conformal_set: tuple[str, ...] | None = None
    abstained: bool = False


class Predictor:
    """Labels as vectors of one encoder.

    Attributes:
        labels: their names, in the order given.
        mode: how probabilities are made.
        scale: factor of the cosines in use.
        model_scale: that of the model itself.
        calibration: None where there is none for these labels.
        key: hash of mode and sentences, by which a calibration is found.
    """

    def __init__(
        self,
        encoder: ServedEncoder,
        labels: Sequence[Label],
        templates: Sequence[str] = (),
        mode: Mode = "single",
        cache: Path | None = None,
    ) -> None:
        """Encode the sentences of all labels, once.

        Args:
            encoder: of images and sentences.
            labels: at least two for ``single``, one for ``multilabel``; for ``normal`` none, or normal and abnormal.
            templates: sentences with ``{}`` for labels without sentences or modality; by default those of any modality.
            mode: see the module.
            cache: folder that keeps the vectors of the last label sets.

        Raises:
            ValueError: an unknown mode, too few labels, or a label twice.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}{nearest(mode, get_args(Mode))}; allowed: {', '.join(get_args(Mode))}")
        labels = list(labels) or (normal_labels(templates) if mode == "normal" else [])
        _check_labels(labels, mode)
        self.labels = [label.name for label in labels]
        self.mode: Mode = mode
        sentences, negated = {}, {}
        for label in labels:
            own = templates_of(label.modality) if label.modality else templates or ANY_MODALITY
            sentences[label.name] = list(label.prompts) or fill(own, label.name)
            if mode == "multilabel":
                negated[label.name] = list(label.negative_prompts) or fill_absence(own, label.name)
        self.key = label_key(mode, sentences, negated)
        self.fingerprint = str(encoder.provenance.get("fingerprint", ""))
        self.model_scale = float(encoder.provenance.get("logit_scale") or DEFAULT_SCALE)
        self.scale = self.model_scale
        self.calibration: Calibration | None = None
        vectors = _class_vectors(encoder, [*sentences.values(), *negated.values()], cache)
        self._positive = vectors[: len(labels)]
        self._negative = vectors[len(labels) :] if negated else None

    def calibrate(self, calibration: Calibration | None) -> None:
        """Take a calibration, if there is one.

        Raises:
            ValueError: it is of other weights, labels, sentences or another mode.
        """
        if calibration is not None:
            calibration.require(self.fingerprint, self.key)
            self.calibration, self.scale = calibration, calibration.scale

    def similarities(self, image_features: ArrayLike) -> Probabilities:
        """Cosines with the labels, ``(n, labels)``; those with what negates them are subtracted in ``multilabel``.

        Args:
            image_features: ``(n, dim)``, unit length.

        Raises:
            ValueError: another width.
        """
        images = np.asarray(image_features, np.float64)
        if images.ndim != 2 or images.shape[1] != self._positive.shape[1]:
            raise ValueError(f"image features are {images.shape}, expected (n, {self._positive.shape[1]})")
        found: Probabilities = images @ self._positive.T.astype(np.float64)
        return found if self._negative is None else found - images @ self._negative.T.astype(np.float64)

    def probabilities(self, image_features: ArrayLike) -> Probabilities:
        """Probabilities ``(n, labels)`` of images ``(n, dim)``, unit length; in the order of `labels`."""
        return self._probabilities(self.similarities(image_features))

    def predict(self, image_features: ArrayLike) -> list[Prediction]:
        """Predictions of images ``(n, dim)``, unit length."""
        similarities = self.similarities(image_features)
        return [
            self._prediction(row, float(best))
            for row, best in zip(self._probabilities(similarities), similarities.max(axis=1), strict=True)
        ]

    def _probabilities(self, similarities: Probabilities) -> Probabilities:
        scaled = self.scale * similarities
        multilabel = self.mode == "multilabel"
        total = np.logaddexp(0, scaled) if multilabel else np.logaddexp.reduce(scaled, axis=1, keepdims=True)
        found: Probabilities = np.exp(scaled - total)
        return found

    def _prediction(self, row: Probabilities, best: float) -> Prediction:
        order = np.argsort(-row, kind="stable")
        shown = {self.labels[k]: float(row[k]) for k in order}
        calibration = self.calibration
        if self.mode == "multilabel":
            thresholds = calibration.thresholds if calibration else {}
            above = [name for name, value in shown.items() if value >= thresholds.get(name, DEFAULT_THRESHOLD)]
            return Prediction(shown, tuple(above))
        if calibration is None:
            return Prediction(shown, (self.labels[order[0]],))
        abstained = calibration.abstains(best)
        chosen = calibration.conformal_set(row)
        return Prediction(
            shown,
            () if abstained else (self.labels[order[0]],),
            tuple(self.labels[k] for k in order if chosen[k]),
            abstained,
        )


def read_labels(source: str, mode: Mode = "multilabel") -> list[Label]:
    """The labels of a file, or of a text ``a,b,c``.

    A text file holds a label on each line; a CSV file the column ``label`` and optionally ``prompt``,
    ``negative_prompt`` and ``modality``; a YAML file a list of labels or of mappings with these keys (``prompt`` and
    ``negative_prompt`` may be lists), or a mapping from label to such a mapping, a sentence or a list of sentences.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, too large, of another form, without labels or with too few for the mode, or a
            label occurs twice.
    """
    path = Path(source)
    is_file = len(source) < 4096 and "\n" not in source and path.exists()
    if is_file:
        labels = _labels_of_file(path)
    elif path.suffix.lower() in LABEL_FILES:
        raise FileNotFoundError(f"--labels {source}: no such file")
    else:
        labels = [Label(name.strip()) for name in source.split(",") if name.strip()]
    if not labels:
        raise ValueError(
            f"--labels {source or repr(source)} holds no label; give a file with one on each line, or a,b,c"
        )
    if len(labels) > MOST_LABELS:
        raise ValueError(f"--labels {source} holds {len(labels)} labels; at most {MOST_LABELS} are allowed")
    try:
        _check_labels(labels, mode)
    except ValueError as error:
        raise ValueError(f"--labels {source}: {error}" if is_file else str(error)) from None
    return labels


def read_templates(source: str) -> list[str]:
    """Templates: a sentence with ``{}``, a text file with one on each line, or the name of a modality.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line lacks ``{}``, or the modality is unknown.
    """
    if "{}" in source:
        return [source]
    path = Path(source)
    if path.is_file():
        lines = [line.strip() for line in read_utf8(path).splitlines() if line.strip()]
        lacking = [line for line in lines if "{}" not in line]
        if lacking or not lines:
            wrong = f"the line {lacking[0]!r} has none" if lacking else "it is empty"
            raise ValueError(f"{source}: each line must be a sentence with {{}} for the label; {wrong}")
        return lines
    if path.suffix:
        raise FileNotFoundError(f"--templates {source}: no such file")
    if family(source) is None:
        raise ValueError(
            f"--templates {source!r} is no file, has no {{}} and names no known modality{nearest(source, FAMILIES)}; "
            f"known: {', '.join(FAMILIES)}"
        )
    return list(templates_of(source))


def read_utf8(path: Path) -> str:
    """A text file in UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: it is larger than 16 MiB, a folder, or in another encoding, which the message names.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.stat().st_size > MOST_LABEL_BYTES:
        raise ValueError(f"{path} is larger than {MOST_LABEL_BYTES >> 20} MiB; it should be a text file")
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is encoded in UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        byte = f"byte 0x{data[error.start]:02x} on line {line}"
        raise ValueError(
            f"{path} is not UTF-8 ({byte}); it may be Windows-1252 or Latin-1, or no text file: save it as UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} holds zero bytes: it is UTF-16 without a byte-order mark, or no text file")
    return text


def normal_labels(templates: Sequence[str] = ()) -> list[Label]:
    """The labels ``normal`` and ``abnormal``, described in these templates."""
    own = templates or ANY_MODALITY
    return [
        Label(name, tuple(text for phrase in phrases for text in fill(own, phrase)))
        for name, phrases in (("normal", NORMAL), ("abnormal", ABNORMAL))
    ]


def label_key(mode: str, prompts: Mapping[str, Sequence[str]], negative: Mapping[str, Sequence[str]]) -> str:
    """Hash of a mode and the sentences of its labels, whatever their order."""
    content = [mode, sorted((name, list(texts), list(negative.get(name, ()))) for name, texts in prompts.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def default_cache() -> Path:
    """The user's folder for vectors of labels: ``$XDG_CACHE_HOME/mmkd``, by default ``~/.cache/mmkd``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path("~/.cache").expanduser()) / "mmkd"


def _labels_of_file(path: Path) -> list[Label]:
    text = read_utf8(path)
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        content = read_yaml(path)
        try:
            return _labels_of_yaml(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if suffix in (".csv", ".tsv"):
        return _labels_of_csv(path)
    return [Label(line.strip()) for line in text.splitlines() if line.strip()]


def _labels_of_csv(path: Path) -> list[Label]:
    table = read_csv(path)
    unknown = [name for name in table.columns if name not in COLUMNS]
    if "label" not in table.columns or unknown:
        found = ", ".join(table.columns) or "none"
        raise ValueError(f"{path} has the columns {found}; it needs label, and may have {', '.join(COLUMNS[1:])}")
    labels = []
    for row in table.rows:
        cells = {name: row.cells.get(name, "") for name in COLUMNS}
        if row.extra or (any(cells.values()) and not cells["label"]):
            wrong = "more cells than columns: quote cells with commas" if row.extra else "no label"
            raise ValueError(f"{path}, line {row.line}: {wrong}")
        if cells["label"]:
            labels.append(_label(cells["label"], cells))
    return labels


def _labels_of_yaml(loaded: Any) -> list[Label]:
    if isinstance(loaded, dict):
        loaded = [
            {**own, "label": name} if isinstance(own, dict) else {"label": name, "prompt": own}
            for name, own in loaded.items()
        ]
    if loaded is not None and not isinstance(loaded, list):
        raise ValueError(f"it must hold a list or a mapping of labels, not a {type(loaded).__name__}")
    labels = []
    for entry in loaded or []:
        own = entry if isinstance(entry, dict) else {"label": entry}
        unknown = [str(key) for key in own if key not in COLUMNS]
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}{nearest(unknown[0], COLUMNS)}; allowed: {', '.join(COLUMNS)}")
        name = own.get("label")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a label is {name!r}; it must be text (quote words such as no and numbers)")
        labels.append(_label(name.strip(), own))
    return labels


def _label(name: str, own: Mapping[str, Any]) -> Label:
    return Label(
        name,
        _sentences(name, own.get("prompt")),
        _sentences(name, own.get("negative_prompt")),
        "".join(_sentences(name, own.get("modality"))),
    )


def _sentences(name: str, value: Any) -> tuple[str, ...]:
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise ValueError(f"the label {name!r} has {value!r} where a sentence or a list of sentences is expected")
    return tuple(text.strip() for text in values if text.strip())


def _check_labels(labels: Sequence[Label], mode: Mode) -> None:
    needed = 1 if mode == "multilabel" else 2
    if len(labels) < needed:
        hint = "; one finding alone is a matter of --mode multilabel" if mode == "single" else ""
        raise ValueError(f"{len(labels)} label is given; --mode {mode} needs at least {needed}{hint}")
    if mode == "normal" and len(labels) != 2:
        raise ValueError(f"{len(labels)} labels are given; --mode normal takes none, or two: normal and abnormal")
    _refuse_repeated(labels)


def _refuse_repeated(labels: Iterable[Label]) -> None:
    seen: dict[str, str] = {}
    for label in labels:
        same = " ".join(label.name.casefold().split())
        if same in seen:
            raise ValueError(f"the label {label.name!r} occurs twice (as {seen[same]!r}); labels must differ")
        seen[same] = label.name


def _class_vectors(
    encoder: ServedEncoder, sentences: Sequence[Sequence[str]], cache: Path | None
) -> NDArray[np.float32]:
    """The vector of each set of sentences, ``(sets, dim)``, from the cache where it is there."""
    provenance = encoder.provenance
    identity = [provenance.get(key) for key in ("fingerprint", "tokenizer", "context", "pooling", "precision")]
    file = shard_file(cache, identity, [list(texts) for texts in sentences], kind="labels") if cache else None
    if file is not None and identity[0] and is_whole(file):
        os.utime(file)
        return np.array(TensorMap(file).arrays["vectors"])
    distinct = list(dict.fromkeys(text for texts in sentences for text in texts))
    encoded = np.asarray(encoder.encode_texts(distinct))
    place = {text: row for row, text in enumerate(distinct)}
    vectors = np.stack([class_vector(encoded[[place[text] for text in texts]]) for texts in sentences])
    if file is not None and identity[0]:
        _keep(file, vectors)
    return vectors


def _keep(file: Path, vectors: NDArray[np.float32]) -> None:
    """Write vectors into the cache, which loses the set that was used longest ago; a cache that cannot be is none."""
    try:
        write_shard(file, [str(row) for row in range(len(vectors))], {"vectors": vectors})
        kept = sorted(file.parent.glob("labels-*.safetensors"), key=lambda own: own.stat().st_mtime)
        for old in kept[:-CACHED_LABEL_SETS]:
            old.unlink(missing_ok=True)
    except OSError:
        return
