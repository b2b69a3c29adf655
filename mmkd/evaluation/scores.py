"""How well each sample was answered, as Parquet, for whoever wants to test or plot it elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from mmkd.evaluation.task import Outputs, Task
from mmkd.files import atomic_write_bytes


def write_scores(path: Path, task: Task, outputs: Outputs) -> None:
    """Write ``frame, id, score, target, prediction`` of each sample, or take away what stood there.

    Args:
        path: of the file.
        task: what was asked.
        outputs: per-sample outputs of an encoder; none where it cannot answer.
    """
    if not outputs or not all(np.isfinite(array).all() for array in outputs.values()):
        path.unlink(missing_ok=True)
        return
    import pyarrow
    import pyarrow.parquet

    def named(names: list[str] | None, count: int) -> pyarrow.Array:
        return pyarrow.nulls(count, pyarrow.string()) if names is None else pyarrow.array(names, pyarrow.string())

    answers = task.sample_answers(outputs)
    parts = []
    for frame, scores in task.sample_scores(outputs).items():
        targets, predictions = answers.get(frame, (None, None))
        columns = {
            "frame": pyarrow.array([frame] * len(scores)).dictionary_encode(),
            "id": pyarrow.array([pair.id for pair in task.holders[frame]]),
            "score": pyarrow.array(np.asarray(scores, dtype=np.float64)),
            "target": named(targets, len(scores)),
            "prediction": named(predictions, len(scores)),
        }
        parts.append(pyarrow.table(columns))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.concat_tables(parts, promote_options="default").unify_dictionaries(), buffer)
    atomic_write_bytes(path, buffer.getvalue())
