"""Results of one encoder on one task, stored so that a second run computes only what is missing.

A result is two files under ``encoders/ENCODER/``: ``TASK.safetensors`` with per-sample outputs and bootstrap
replicates, and, written last, ``TASK.json`` with point values and intervals; ``scores/ENCODER/TASK.parquet`` holds the
scores of each sample. A result's key is the hash of all that it depends on; one with another key, or one that is not as
it was written, is computed again.

Replicates are drawn twice: stratified by the task's own classes for the task's intervals, and from one draw of all
held-out groups, stratified by modality, for means over tasks, which share images and therefore errors.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from mmkd.data.table import Pair
from mmkd.evaluation.embeddings.embed import UndefinedMetricError
from mmkd.evaluation.statistics.bootstrap import (
    Metrics,
    ResamplingUnits,
    replicate,
    resampling_units,
    subset_units,
    with_interval,
)
from mmkd.evaluation.statistics.metrics import Floats
from mmkd.evaluation.tasks.task import Outputs, Task
from mmkd.files import atomic_write_bytes, fingerprint, read_json, write_json

FORMAT = 3
CHECKSUM = "sha256"
FOLDER = "encoders"  # of the results
Result = dict[str, Any]


class ResultStore:
    """Results of one evaluation, and how their intervals are computed."""

    def __init__(self, path: Path, held_out: list[Pair], replicates: int, seed: int) -> None:
        """Name the folder of the results and the pairs that are resampled; nothing is written yet."""
        self.path = path
        self.replicates = replicates
        self.seed = seed
        self._held_out = held_out
        self._position = {pair.id: position for position, pair in enumerate(held_out)}

    @cached_property
    def _whole(self) -> ResamplingUnits:
        """Of all held-out pairs."""
        return resampling_units([pair.modality for pair in self._held_out], [pair.group for pair in self._held_out])

    def describe(self, task: Task) -> dict[str, Any]:
        """Write the task's description to ``tasks/TASK.json`` and return it."""
        description = {
            "name": task.name,
            "title": task.title,
            "kind": task.kind,
            "primary_metric": task.primary_metric,
            "units": {
                name: {
                    "n": len(own.units),
                    "groups": own.groups,
                    "resampling": own.resampling,
                    **({"pooled": list(own.pooled)} if own.pooled else {}),
                }
                for name, own in task.units.items()
            },
            "modalities": task.modalities,
            **task.description,
            "dataset": task.manifest.dataset,
            "modality": task.manifest.modality,
            "variant": task.variant,
        }
        write_json(self.path / "tasks" / f"{task.name}.json", description)
        return description

    def result(
        self, task: Task, encoder: str, made_from: list[Any], compute: Callable[[], tuple[Outputs, Result]]
    ) -> tuple[Result, Outputs]:
        """Read a result, or compute it.

        Args:
            task: what is evaluated.
            encoder: name of the encoder.
            made_from: fingerprints of the weights, images and questions it depends on, plain JSON values.
            compute: gives the per-sample outputs and further entries of the result.

        Returns:
            The result as in its JSON file, and the per-sample outputs.
        """
        key = fingerprint_of([FORMAT, self.replicates, self.seed, encoder, made_from])
        if (result := self._finished(encoder, task.name, key)) is not None:
            return result, self.outputs(encoder, task.name)
        try:
            outputs, extra = compute()
            result, replicates, together = self._evaluate(task, outputs)
        except UndefinedMetricError as reason:
            outputs, extra, replicates, together = {}, {}, {}, {}
            result = {"undefined": str(reason), "metrics": {}, "by_modality": {}}
        result |= {"encoder": encoder, "task": task.name, "key": key, **extra}
        tensors = {f"outputs.{name}": np.ascontiguousarray(array) for name, array in outputs.items()}
        tensors |= {f"replicates.{name}": np.ascontiguousarray(values) for name, values in replicates.items()}
        tensors |= {f"together.{name}": np.ascontiguousarray(values) for name, values in together.items()}
        atomic_write_bytes(self._file(encoder, task.name, "safetensors"), safetensors.numpy.save(tensors))
        write_scores(self._scores(encoder, task.name), task, outputs)
        stated = result | {CHECKSUM: self._checksum(encoder, task.name, json.loads(json.dumps(result)))}
        write_json(self._file(encoder, task.name, "json"), stated)
        return result, outputs

    def _finished(self, encoder: str, task: str, key: str) -> Result | None:
        """A result of this key, unless it was not written before or is not as it was written."""
        try:
            result = read_json(self._file(encoder, task, "json"))
            if isinstance(result, dict) and result.get("key") == key:
                stated = result.pop(CHECKSUM, None)
                return result if stated == self._checksum(encoder, task, result) else None
        except (OSError, ValueError):
            pass
        return None

    def _checksum(self, encoder: str, task: str, result: Result) -> str:
        files = [self._file(encoder, task, "safetensors"), self._scores(encoder, task)]
        return fingerprint_of([result, fingerprint(path for path in files if path.is_file())])

    def outputs(self, encoder: str, task: str) -> Outputs:
        """Per-sample outputs of a result."""
        return self._tensors(encoder, task, "outputs.")

    def replicate_values(self, encoder: str, task: str) -> Metrics:
        """Bootstrap replicates of a result, ``{metric: (replicates,)}``."""
        return self._tensors(encoder, task, "replicates.")

    def together(self, encoder: str, task: str) -> Floats:
        """The primary metric's replicates ``(replicates,)`` under the draws that all tasks share."""
        (values,) = self._tensors(encoder, task, "together.").values()
        return values

    def _evaluate(self, task: Task, outputs: Outputs) -> tuple[Result, Metrics, Metrics]:
        unsound = [name for name, array in outputs.items() if not np.isfinite(array).all()]
        if unsound:
            count = int(max((~np.isfinite(outputs[name])).any(axis=-1).sum() for name in unsound))
            reason = (
                f"the encoder gave vectors that are not finite; {count} outputs ({', '.join(unsound)}) are undefined"
            )
            return {"undefined": reason, "metrics": {}, "by_modality": {}}, {}, {}
        points, replicates = replicate(partial(task.metrics, outputs), task.units, self.replicates, self.seed)
        shared = self._shared(task)
        if all(shared[name].same_draws(own) for name, own in task.units.items()):
            together = {task.primary_metric: replicates[task.primary_metric]}
        else:
            _, together = replicate(partial(task.primary_metric_values, outputs), shared, self.replicates, self.seed)
        metrics = {name: with_interval(value, replicates[name]) for name, value in points.items()}
        result = {"undefined": None, "metrics": metrics, "by_modality": _by_modality(task, outputs)}
        if fitted := {name: array.tolist() for name, array in outputs.items() if "." not in name}:
            result["fitted"] = fitted
        if extras := task.extras(outputs):
            result["extras"] = extras
        return result, replicates, together

    def _shared(self, task: Task) -> dict[str, ResamplingUnits]:
        """Units on the draws of all held-out groups; the task's own where it has other samples than these."""
        if any(pair.id not in self._position for pairs in task.sample_pairs.values() for pair in pairs):
            return task.units
        return {
            name: subset_units(self._whole, [self._position[pair.id] for pair in pairs])
            for name, pairs in task.sample_pairs.items()
        }

    def _file(self, encoder: str, task: str, ending: str) -> Path:
        return self.path / FOLDER / encoder / f"{task}.{ending}"

    def _scores(self, encoder: str, task: str) -> Path:
        return self.path / "scores" / encoder / f"{task}.parquet"

    def _tensors(self, encoder: str, task: str, prefix: str) -> dict[str, Any]:
        with safetensors.safe_open(self._file(encoder, task, "safetensors"), framework="np") as stored:
            names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name[len(prefix) :]: stored.get_tensor(name) for name in names}


def stored_array(results: Path, encoder: str, task: str, name: str) -> NDArray[Any] | None:
    """One array of a result: ``outputs.NAME``, ``replicates.METRIC`` or ``together.METRIC``; None if it is missing."""
    try:
        with safetensors.safe_open(results / FOLDER / encoder / f"{task}.safetensors", "np") as stored:
            return stored.get_tensor(name) if name in stored.keys() else None  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return None


def fingerprint_of(values: Any) -> str:
    """SHA-256 of plain JSON values, read piece by piece: a million answers as one text take gigabytes."""
    digest = hashlib.sha256()
    for piece in json.JSONEncoder(sort_keys=True).iterencode(values):
        digest.update(piece.encode())
    return digest.hexdigest()


def _by_modality(task: Task, outputs: Outputs) -> dict[str, dict[str, float]]:
    """Mean score and number of the images of each modality."""
    scores, modalities = task.sample_scores(outputs)["image"], np.array(task.modalities["image"])
    return {
        str(modality): {"score": float(scores[modalities == modality].mean()), "n": int((modalities == modality).sum())}
        for modality in np.unique(modalities)
        if modality
    }


def write_scores(path: Path, task: Task, outputs: Outputs) -> None:
    """Write ``unit, id, score, target, prediction`` and the task's own columns of each sample, or remove the file.

    Args:
        path: of the file.
        task: that was evaluated.
        outputs: per-sample outputs of an encoder; empty where the result is undefined.
    """
    if not outputs or not all(np.isfinite(array).all() for array in outputs.values()):
        path.unlink(missing_ok=True)
        return
    import pyarrow
    import pyarrow.parquet

    def named(names: list[str] | None, count: int) -> pyarrow.Array:
        return pyarrow.nulls(count, pyarrow.string()) if names is None else pyarrow.array(names, pyarrow.string())

    answers, further = task.sample_answers(outputs), task.sample_columns(outputs)
    parts = []
    for unit, scores in task.sample_scores(outputs).items():
        targets, predictions = answers.get(unit, (None, None))
        columns = {
            "unit": pyarrow.array([unit] * len(scores)).dictionary_encode(),
            "id": pyarrow.array([pair.id for pair in task.sample_pairs[unit]]),
            "score": pyarrow.array(np.asarray(scores, dtype=np.float64)),
            "target": named(targets, len(scores)),
            "prediction": named(predictions, len(scores)),
            **{name: pyarrow.array(values) for name, values in further.get(unit, {}).items()},
        }
        parts.append(pyarrow.table(columns))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.concat_tables(parts, promote_options="default").unify_dictionaries(), buffer)
    atomic_write_bytes(path, buffer.getvalue())
