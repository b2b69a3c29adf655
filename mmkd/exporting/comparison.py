"""Compare an export with its model in one run: milliseconds, megabytes, cosine similarity, zero-shot accuracy.

Times are medians of alternated runs on the same inputs and threads, so that other load on the machine affects all rows
alike. Accuracy is that of the zero-shot tasks of ``mmkd eval``, with paired differences to the model.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmkd.data.folder import open_pairs
from mmkd.encoders.encoder import BATCH_SIZE, DualEncoder
from mmkd.encoders.zoo import load_encoder
from mmkd.evaluation.datasets.dataset import split_samples
from mmkd.evaluation.datasets.pairs import PairsDataset
from mmkd.evaluation.embeddings.encoders import embed_everything
from mmkd.evaluation.results.store import ResultStore
from mmkd.evaluation.results.summary import task_summary
from mmkd.evaluation.run import inputs_of, run_task, tasks_for
from mmkd.evaluation.tasks.task import TaskOptions
from mmkd.exporting.folder import compare_towers, examples, towers
from mmkd.exporting.usage import DESCRIPTION, Encoder, Tower, load_tower
from mmkd.files import read_json
from modeling_mmkd import MMKDClipModel

MODEL = "model"
BATCHES = (1, 16)
COMPARED, TOKENS = 16, 16
WARM_UPS = 1
ENOUGH_SECONDS = 10.0  # of one row of alternated runs, after which a large model gets no more of them


class ExportedEncoder(DualEncoder):
    """An exported folder as an encoder; its own ``usage.py`` prepares images and texts."""

    def __init__(self, folder: Path, name: str) -> None:
        """Load the towers.

        Args:
            folder: that ``mmkd export`` has written.
            name: of the encoder.
        """
        self._encoder = Encoder(folder, threads=torch.get_num_threads())
        metadata = self._encoder.metadata
        super().__init__(name, metadata["dim"], {"export": metadata})

    def prepare(self, image: Image.Image) -> NDArray[np.float32]:
        """See `DualEncoder`; (3, side, side)."""
        return self._encoder.pixels(image)

    def image_features(self, prepared: list[NDArray[np.float32]]) -> Tensor:
        """See `DualEncoder`."""
        return torch.from_numpy(self._encoder.encode_pixels(prepared))

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        return torch.from_numpy(self._encoder.encode_texts(texts))


def measure(
    model: MMKDClipModel, model_bytes: int, exports: dict[str, Path], side: int, repeats: int
) -> dict[str, Any]:
    """Milliseconds per item and megabytes of the model and its exports.

    Args:
        model: in evaluation mode.
        model_bytes: size of its weights on disk.
        exports: name -> exported folder.
        side: of the images in pixels.
        repeats: maximum number of timed runs of each, alternated; fewer where they take more than ten seconds.

    Returns:
        row -> ``megabytes``, and ``image_ms`` and ``text_ms`` by batch size, for one item of the batch.
    """
    files = {name: tower_files(folder) for name, folder in exports.items()}
    rows: dict[str, Any] = {MODEL: {"megabytes": model_bytes / 1e6}}
    for name, folder in exports.items():
        sizes = {  # with weights beside the graph
            tower: sum(path.stat().st_size for path in folder.glob(f"{file}*")) / 1e6
            for tower, file in files[name].items()
        }
        rows[name] = {"megabytes": sum(sizes.values()), **{f"{tower}_megabytes": size for tower, size in sizes.items()}}
    for tower, module in towers(model).items():
        runs: dict[str, Tower] = {MODEL: _on_arrays(module)}
        for name, folder in exports.items():
            runs[name] = load_tower(folder / files[name][tower], torch.get_num_threads())
        for batch in BATCHES:
            inputs = {key: value.numpy() for key, value in examples(model, side, batch, TOKENS)[tower].items()}
            for name, milliseconds in _alternated(runs, inputs, repeats).items():
                rows[name].setdefault(f"{tower}_ms", {})[str(batch)] = milliseconds / batch
    return rows


def lowest_cosines(folder: Path, model: MMKDClipModel, side: int) -> dict[str, float]:
    """Lowest cosine similarity between an export and the model on random inputs, by tower."""
    found = compare_towers(folder, tower_files(folder), model, side, [(COMPARED, TOKENS)])
    return {tower: cosine for tower, (_, cosine) in found.items()}


def tower_files(folder: Path) -> dict[str, str]:
    """Names of the towers' files in an exported folder."""
    description = read_json(folder / DESCRIPTION)
    return {tower: description[tower]["file"] for tower in ("image", "text")}


def zero_shot(
    source: Path, exports: dict[str, Path], pairs: Path, split: str, replicates: int, seed: int, quiet: bool
) -> dict[str, Any]:
    """Every zero-shot task of the pairs: scores of the model and its exports with intervals, and paired differences.

    Args:
        source: the model's folder.
        exports: name -> exported folder; the last one is compared with all others.
        pairs: folder of pairs.
        split: which of them.
        replicates: of the bootstrap.
        seed: of the bootstrap.
        quiet: no progress bars.

    Raises:
        ValueError: the pairs allow no zero-shot task; the message holds the reasons.
    """
    dataset, names = PairsDataset(open_pairs(pairs, split), split), {str(path): name for name, path in exports.items()}
    inputs = inputs_of(dataset, lambda: dataset, ["zeroshot"], split, TaskOptions(), quiet)

    def load(place: str) -> DualEncoder:
        return ExportedEncoder(Path(place), names[place]) if place in names else load_encoder(place)

    with tempfile.TemporaryDirectory(prefix="mmkd-compare-") as temporary:
        sources = {MODEL: str(source), **{name: str(path) for name, path in exports.items()}}
        known = embed_everything(sources, [inputs], load, Path(temporary) / "embeddings", BATCH_SIZE, quiet)
        embedded = [each.embedded(inputs, dataset) for each in known]
        samples = split_samples(dataset, split, inputs.digests, embedded[0].unreadable)
        tasks, skipped = tasks_for(samples, ["zeroshot"], TaskOptions())
        if not tasks:
            raise ValueError(f"--pairs {pairs} allow no zero-shot task: {'; '.join(skipped.values())}")
        results = ResultStore(Path(temporary), samples.held_out, replicates, seed)
        return {
            task.name: task_summary(
                results.describe(task), run_task(task, samples, embedded, [], results), embedded[-1].name, results
            )
            for task in tasks
        }


def _alternated(runs: dict[str, Tower], inputs: dict[str, NDArray[Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each run."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for turn in range(WARM_UPS + repeats):
        if turn > WARM_UPS and time.perf_counter() - began > ENOUGH_SECONDS:
            break
        for name, run in runs.items():
            begin = time.perf_counter()
            run(inputs)
            if turn >= WARM_UPS:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: median(values) for name, values in times.items()}


def _on_arrays(module: torch.nn.Module) -> Tower:
    def run(inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return module(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()

    return run
