"""What an export costs and gains, side by side in one run: milliseconds, megabytes and zero-shot accuracy.

Times are medians of alternated runs on the same inputs and threads, so that another load on the machine falls on all
rows alike. Accuracy is that of the zero-shot tasks of ``mmkd eval``, with paired differences to the model.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkd.data.folder import open_pairs
from mmkd.encoders.encoder import BATCH_SIZE, DualEncoder
from mmkd.encoders.zoo import load_encoder
from mmkd.evaluation.datasets.dataset import split_samples
from mmkd.evaluation.datasets.pairs import PairsDataset
from mmkd.evaluation.embeddings.encoders import DatasetInputs, embed_everything
from mmkd.evaluation.results.store import CellFolder
from mmkd.evaluation.results.summary import task_summary
from mmkd.evaluation.suite import run_task, tasks_for
from mmkd.evaluation.tasks.task import TaskOptions
from mmkd.exporting.folder import tower_bytes
from mmkd.exporting.towers import OUTPUTS, examples, towers
from mmkd.exporting.usage import Encoder, load_tower
from mmkd.files import read_json
from modeling_mmkd import MMKDClipModel

MODEL = "model"
BATCHES = (1, 16)
TOKENS = 16
WARM_UPS = 2


class ExportedEncoder(DualEncoder):
    """An exported folder as an encoder, images and texts prepared by its own ``usage.py``."""

    def __init__(self, folder: Path, name: str) -> None:
        """Load the towers."""
        self._encoder = Encoder(folder, threads=torch.get_num_threads())
        super().__init__(name, self._encoder.facts["dim"], {"export": self._encoder.facts})

    def image_features(self, images: list[Image.Image]) -> Tensor:
        """See `DualEncoder`."""
        return torch.from_numpy(self._encoder.encode_images(images))

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        return torch.from_numpy(self._encoder.encode_texts(texts))


def measure(
    model: MMKDClipModel, model_bytes: int, exports: dict[str, Path], side: int, repeats: int
) -> dict[str, Any]:
    """Milliseconds an item, and megabytes, of the model and its exports.

    Args:
        model: in evaluation mode.
        model_bytes: size of its weights on disk.
        exports: name -> exported folder.
        side: of the images in pixels.
        repeats: timed runs of each, alternated.

    Returns:
        row -> ``megabytes``, and ``image_ms`` and ``text_ms`` by batch size, for one item of the batch.
    """
    rows: dict[str, Any] = {MODEL: {"megabytes": model_bytes / 1e6}}
    for name, folder in exports.items():
        description = read_json(folder / "export.json")
        sizes = {tower: tower_bytes(folder, description[tower]["file"]) for tower in OUTPUTS}
        rows[name] = {"megabytes": sum(sizes.values()) / 1e6}
        rows[name] |= {f"{tower}_megabytes": size / 1e6 for tower, size in sizes.items()}
    for tower, module in towers(model).items():
        sides: dict[str, Callable[[dict[str, Tensor]], Any]] = {MODEL: _inferring(module)}
        for name, folder in exports.items():
            file = folder / read_json(folder / "export.json")[tower]["file"]
            sides[name] = _on_arrays(load_tower(file, torch.get_num_threads()))
        for batch in BATCHES:
            inputs = examples(model, side, batch, TOKENS)[tower]
            for name, milliseconds in _alternated(sides, inputs, repeats).items():
                rows[name].setdefault(f"{tower}_ms", {})[str(batch)] = milliseconds / batch
    return rows


def agreement(folder: Path, model: MMKDClipModel, side: int, batch: int = 16) -> dict[str, float]:
    """Lowest cosine between an export and the model over random inputs, by tower."""
    description, lowest = read_json(folder / "export.json"), {}
    for name, tower in towers(model).items():
        inputs = examples(model, side, batch, TOKENS, seed=1)[name]
        exported = load_tower(folder / description[name]["file"])
        found = exported({key: value.numpy() for key, value in inputs.items()})
        lowest[name] = float((found * _inferring(tower)(inputs).numpy()).sum(axis=1).min())
    return lowest


def zero_shot(
    source: Path, exports: dict[str, Path], pairs: Path, split: str, replicates: int, seed: int, quiet: bool
) -> dict[str, Any]:
    """Every zero-shot task of the pairs: scores of the model and its exports with intervals, and paired differences.

    Args:
        source: the model's folder.
        exports: name -> exported folder; the last one is set against all others.
        pairs: folder of pairs.
        split: which of them.
        replicates: of the bootstrap.
        seed: likewise.
        quiet: no progress bars.

    Raises:
        ValueError: the pairs allow no zero-shot task; the message says why.
    """
    dataset, names = PairsDataset(open_pairs(pairs, split), split), {str(path): name for name, path in exports.items()}
    inputs = DatasetInputs.of("pairs", dataset, lambda: dataset, sorted(dataset.prompts()), quiet)

    def load(place: str) -> DualEncoder:
        return ExportedEncoder(Path(place), names[place]) if place in names else load_encoder(place)

    with tempfile.TemporaryDirectory(prefix="mmkd-compare-") as temporary:
        sources = {MODEL: str(source), **{name: str(path) for name, path in exports.items()}}
        known = embed_everything(sources, [inputs], load, Path(temporary) / "embeddings", BATCH_SIZE, quiet)
        embedded = [each.embedded(inputs, dataset.pairs, dataset) for each in known]
        samples = split_samples(dataset, split, inputs.digests, embedded[0].unreadable)
        tasks, skipped = tasks_for(samples, ["zeroshot"], TaskOptions())
        if not tasks:
            raise ValueError(f"--pairs {pairs} allow no zero-shot task: {'; '.join(skipped.values())}")
        cells = CellFolder(Path(temporary), samples.held_out, replicates, seed)
        return {
            task.name: task_summary(
                cells.describe(task), run_task(task, samples, embedded, [], cells), embedded[-1].name, cells
            )
            for task in tasks
        }


def _alternated(
    sides: dict[str, Callable[[dict[str, Tensor]], Any]], inputs: dict[str, Tensor], repeats: int
) -> dict[str, float]:
    """Median milliseconds of each side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(WARM_UPS + repeats):
        for name, run in sides.items():
            begin = time.perf_counter()
            run(inputs)
            if turn >= WARM_UPS:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: median(values) for name, values in times.items()}


def _inferring(module: torch.nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    def run(inputs: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return module(**inputs)

    return run


def _on_arrays(tower: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Tensor]], np.ndarray]:
    return lambda inputs: tower({name: value.numpy() for name, value in inputs.items()})
