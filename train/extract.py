"""Extract the features of every image and caption of a folder of pairs with one or more teachers, once.

Teachers named together share the decoding of images, and the preprocessing where theirs is the same; both run in
threads beside the encoding. Tasks of any executor (``--executor slurm --workers 16``) write the shards, and each
process loads the teachers once; a run that is killed resumes at the shard. If pairs have been added since, only these
are extracted. A pair whose image or caption cannot be read is left out, counted, and listed in the store's
``skipped.jsonl``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mmkd.command.settings import check_arguments, run
from mmkd.encoders.settings import ExtractSettings

if __name__ == "__main__":
    check_arguments(ExtractSettings)  # before the imports that take seconds

import uuid
from collections.abc import Callable

from tqdm import tqdm

from mmkd.command.settings import nearest
from mmkd.command.tasks import run_tasks
from mmkd.data.features.writer import SKIPPED_FILE
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.frozen import FrozenEncoder
from mmkd.encoders.teacher_features import FeatureTask, OpenExtraction, extract_shards, group_tasks
from mmkd.encoders.zoo import named_sources


def main(settings: ExtractSettings) -> None:
    """Extract the shards that are missing, and finish the stores.

    Raises:
        FileNotFoundError: pairs or weights are not there.
        ValueError: an unknown teacher, weights that do not fit, a store of other weights, or no readable image.
        OSError: processes were killed again and again, or the disk is full; shards that are whole stay.
    """
    check(settings)
    opened = OpenExtraction(settings, settings.device if settings.is_here else "cpu")
    tasks = list(opened.tasks.values())
    if not settings.quiet:
        print("\n".join(map(described, (task.encoder for task in tasks))))
    work = opened.extract if settings.is_here else partial(extract_shards, uuid.uuid4().hex, settings)
    cached = [task for task in tasks if isinstance(task.encoder, FrozenEncoder)]
    for group in [*([task] for task in cached), *group_tasks([task for task in tasks if task not in cached])]:
        extract(group, work, settings)
    for task in tasks:
        skipped = task.extraction.close()
        if skipped is not None and not settings.quiet:
            count = len(opened.folder.pairs)
            print(f"{task.extraction.path}: {count - len(skipped)} of {count} pairs{reasons(skipped)}")


def extract(group: Sequence[FeatureTask], work: Callable[..., None], settings: ExtractSettings) -> None:
    """Write the missing shards of teachers that share the decoding."""
    stores = [task.extraction for task in group]
    names = [store.name for store in stores]
    run_tasks(
        partial(work, names),
        range(len(stores[0])),
        lambda shard: all(store.has(shard) for store in stores),
        settings,
        settings.output,
        partial(tqdm, desc=", ".join(names), unit="pair", disable=settings.quiet),
        lambda shard: len(stores[0].positions(shard)),
    )


def check(settings: ExtractSettings) -> None:
    """Raise on settings that cannot work before anything is loaded."""
    sources = named_sources(settings.teacher)
    for name in settings.weights:
        if name not in sources:
            raise ValueError(f"--weights.{name}{nearest(name, sources)}: no such teacher here; {', '.join(sources)}")
    settings.check_tasks()
    if settings.cache_frozen_towers and (settings.precision != "float32" or settings.resize == "fast"):
        raise ValueError(
            "--cache_frozen_towers keeps exact outputs: leave out --precision and --resize fast, or the cache"
        )


def described(encoder: DualEncoder) -> str:
    """One line about a teacher."""
    shown = ("preprocessing", "tokenizer", "context", "pooling", "license")
    return f"{encoder.name}: {encoder.dim} wide; " + "; ".join(f"{key} {encoder.provenance[key]}" for key in shown)


def held(settings: ExtractSettings) -> list[Path]:
    """The feature stores of this run; others of the folder may be written meanwhile."""
    return [settings.output / name for name in named_sources(settings.teacher)]


def reasons(skipped: dict[str, str]) -> str:
    """What was left out, by reason."""
    if not skipped:
        return ""
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(Counter(skipped.values()).items()))
    return f"; left out: {counts}, see {SKIPPED_FILE}"


if __name__ == "__main__":
    run(ExtractSettings, main, held)
