"""Predict labels that you name for images: files, folders, patterns, DICOM and NIfTI among them.

The labels are sentences, so that none needs training examples. An image that cannot be read is left out, listed on
standard error with the reason, and counted; the command fails if no image could be read. The calibration that `mmkd
calibrate` has left beside the weights for the same labels is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.data.pixel_rules import Window, WindowPreset


@dataclass
class PredictSettings:
    """Predict labels that you name for images.

    Example:
        mmkd predict scans --model mmkd-clip --labels "a chest X-ray,an MRI of the brain,a fundus photograph"
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "images labels templates window",
        "model": "model mode calibration",
        "computing": "batch_size workers device quiet",
        "settings": "top format output log",
    }

    images: list[str] = setting(
        help="image files, folders or patterns such as scans/**/*.dcm", positional=True, whole=True
    )
    model: str = setting(help="folder or Hub id of a model, or the name of a teacher")
    labels: str = setting("", "a,b,c, or a file: .txt (one a line), .csv or .yaml; required unless --mode normal")
    templates: str = setting("", "modality, a sentence with {}, or a file of them, for labels without sentences")
    mode: Literal["single", "multilabel", "normal"] = setting(
        "single", "one label, independent labels, or normal against abnormal"
    )
    calibration: str = setting("auto", "folder with calibration.json; auto is that of the model, none uses none")
    top: int = setting(5, "labels shown for each image", least=1)
    format: Literal["table", "csv", "json", "parquet"] = setting("table", "form of the output")
    output: Path | None = setting(None, "file to write; by default standard output")
    log: Path | None = setting(None, "file for the provenance of the run: weights, preprocessing, versions")
    window: WindowPreset = setting("auto", "window of CT: auto, lung, soft, bone, brain, or three of them as RGB")
    batch_size: int = setting(32, "images at a time", least=1)
    workers: int = setting(0, "threads that read images; 0 takes this process' share of the cores", least=0)
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    quiet: bool = setting(False, "no progress bar")


if __name__ == "__main__":
    check_arguments(PredictSettings)  # before the imports that take seconds

import csv
import io
import json
from functools import partial
from typing import Any

from torch import Tensor

from mmkd.encoders.zoo import load_encoder
from mmkd.files import atomic_write_bytes
from mmkd.serving.calibration import read_calibration
from mmkd.serving.encoding import counted, encode_items, write_log
from mmkd.serving.images import ImageFile, find_images, read_image
from mmkd.serving.predictor import Prediction, Predictor, default_cache, read_labels, read_templates

COLUMNS = ("image", "rank", "label", "probability", "predicted", "in_set", "abstained")


def main(settings: PredictSettings) -> None:
    """Encode the images, compare them with the labels, and write.

    Raises:
        FileNotFoundError: images, labels or the model are not there.
        ValueError: settings or labels that cannot work, a calibration of something else, or no readable image.
    """
    check(settings)
    labels = read_labels(settings.labels, settings.mode) if settings.labels else []
    templates = read_templates(settings.templates) if settings.templates else []
    files = find_images(settings.images)
    encoder = load_encoder(settings.model, settings.device)
    encoder.batch_size = settings.batch_size
    predictor = Predictor(encoder, labels, templates, settings.mode, cache=default_cache())
    folder = Path(settings.model if settings.calibration == "auto" else settings.calibration)
    if settings.calibration != "none":
        predictor.calibrate(read_calibration(folder, predictor.fingerprint, predictor.key))
    found: dict[str, Prediction] = {}

    def take(items: list[ImageFile], vectors: Tensor) -> None:
        found.update(zip((item.id for item in items), predictor.predict(vectors), strict=True))

    read = partial(read_image, window=Window(settings.window))
    skipped = encode_items(encoder, files, read, take, "predicting", settings.workers, settings.quiet)
    if not found:
        raise ValueError(f"none of the {len(files)} images could be read ({counted(skipped)})")
    write(settings, found, predictor)
    if settings.log is not None:
        write_log(
            settings.log,
            "predict",
            encoder,
            settings.output,
            labels=predictor.labels,
            mode=settings.mode,
            sentences_sha256=predictor.key,
            scale=predictor.scale,
            calibrated=predictor.calibration is not None,
            images=len(found),
            skipped=skipped,
        )


def check(settings: PredictSettings) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Raises:
        ValueError: what came, what is allowed and what to do.
    """
    if not settings.labels and settings.mode != "normal":
        raise ValueError("--labels is required: a,b,c, or a file with one label on each line")
    if settings.format == "parquet" and settings.output is None:
        raise ValueError("--format parquet needs --output FILE")
    if settings.calibration not in ("auto", "none") and not Path(settings.calibration).is_dir():
        raise ValueError(f"--calibration {settings.calibration} is no folder; give one, auto or none")


def write(settings: PredictSettings, found: dict[str, Prediction], predictor: Predictor) -> None:
    """Write the predictions in the chosen form."""
    if settings.format == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        data = io.BytesIO()
        rows = list(table_rows(found, settings.top))
        pq.write_table(pa.table({name: [row[k] for row in rows] for k, name in enumerate(COLUMNS)}), data)
        content = data.getvalue()
    elif settings.format == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(["" if cell is None else cell for cell in row] for row in table_rows(found, settings.top))
        content = text.getvalue().encode()
    elif settings.format == "json":
        entries = [as_json(id, prediction, settings.top) for id, prediction in found.items()]
        content = (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode()
    else:
        content = shown(found, predictor, settings.top).encode()
    if settings.output is None:
        print(content.decode(), end="")
    else:
        atomic_write_bytes(settings.output, content)


def table_rows(found: dict[str, Prediction], top: int) -> list[tuple[Any, ...]]:
    """A row of `COLUMNS` for each of the first labels of each image; ``in_set`` is None without calibration."""
    return [
        (
            id,
            rank,
            label,
            probability,
            label in prediction.labels,
            None if prediction.conformal_set is None else label in prediction.conformal_set,
            prediction.abstained,
        )
        for id, prediction in found.items()
        for rank, (label, probability) in enumerate(list(prediction.probabilities.items())[:top], start=1)
    ]


def as_json(id: str, prediction: Prediction, top: int) -> dict[str, Any]:
    """A prediction as JSON values."""
    own = prediction.conformal_set
    return {
        "image": id,
        "probabilities": dict(list(prediction.probabilities.items())[:top]),
        "labels": list(prediction.labels),
        "conformal_set": None if own is None else list(own),
        "abstained": prediction.abstained,
    }


def shown(found: dict[str, Prediction], predictor: Predictor, top: int) -> str:
    """The predictions for people: a line for each image, the first labels with their probabilities."""
    width = max(map(len, found))
    lines = []
    for id, prediction in found.items():
        best = [f"{value:6.1%} {label}" for label, value in list(prediction.probabilities.items())[:top]]
        if predictor.mode == "multilabel":
            best.append(f"-> {', '.join(prediction.labels) or 'none'}")
        elif prediction.abstained:
            best.append("-> none of these")
        elif prediction.conformal_set is not None:
            best.append(f"-> {{{', '.join(prediction.conformal_set)}}}")
        lines.append(f"{id:<{width}}  {'  '.join(best)}\n")
    if predictor.calibration is None:
        lines.append("# not calibrated: the probabilities rank labels, they are no frequencies; see `mmkd calibrate`\n")
    return "".join(lines)


if __name__ == "__main__":
    run(PredictSettings, main)
