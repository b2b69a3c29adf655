"""The encoders of an evaluation: those that lack vectors embed together and then leave memory."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmkd.command.tasks import TaskSettings, run_tasks
from mmkd.data.features.index import changes, fingerprints_of
from mmkd.data.features.shards import is_whole
from mmkd.data.features.store import FeatureStore
from mmkd.data.table import Pair
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.zoo import by_name
from mmkd.evaluation.datasets.dataset import Dataset
from mmkd.evaluation.embeddings.embed import (
    DatasetInputs,
    Embedded,
    EmbeddingShard,
    TokenSource,
    embed,
    load_and_embed,
    read_embedded,
)
from mmkd.files import fingerprint

ENSEMBLE, ORACLE = "ensemble", "oracle"
FEATURES = "features:"
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.json", "*.txt", "*.yaml")
NOT_WEIGHTS = ("settings.yaml", "report.json", "provenance.json")
TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class EncoderRecord:
    """An encoder whose vectors are cached; it need not be in memory.

    Attributes:
        name: in the results.
        source: what it was loaded from.
        fingerprint: of weights and preprocessing.
        provenance: of the encoder.
        cache: folder of its shards.
        stored: the feature store, where the vectors come from one.
        load: loads it again, for tokens, which only some tasks need.
        batch_size: images or texts at a time when it is loaded again.
    """

    name: str
    source: str
    fingerprint: str
    provenance: dict[str, Any]
    cache: Path
    stored: StoredFeatures | None = None
    load: Callable[[], DualEncoder] | None = None
    batch_size: int = 32

    def files(self, inputs: DatasetInputs) -> list[Path]:
        """Its shards of a dataset."""
        return inputs.files(self.cache / inputs.name, self.fingerprint)

    def embedded(self, inputs: DatasetInputs, dataset: Dataset) -> Embedded:
        """Its vectors of an opened dataset, memory-mapped, and what gives tokens on demand."""
        if self.stored is not None:
            return self.stored.embedded(self.name, dataset.image_pairs)
        cache = self.cache / inputs.name
        found = read_embedded(self.name, self.fingerprint, self.provenance, inputs, cache)
        if self.load is not None:
            digests = inputs.digests
            found.tokens = TokenSource(
                self.load, dataset.image, lambda pair: digests[pair.id], self.fingerprint, cache, self.batch_size
            )
        return found


def embed_everything(
    sources: dict[str, str],
    inputs: Sequence[DatasetInputs],
    load: Callable[[str], DualEncoder],
    cache: Path,
    batch_size: int,
    quiet: bool,
    tasks: TaskSettings | None = None,
    load_in_tasks: Callable[[str], DualEncoder] | None = None,
) -> list[EncoderRecord]:
    """Embed what is missing of all inputs; encoders that lack vectors are in memory together, and share the decoding.

    Args:
        sources: what each is loaded from, by name.
        inputs: what is embedded.
        load: loads a dual encoder in this process.
        cache: root of the caches; each encoder has a folder of its name.
        batch_size: images or texts at a time.
        quiet: no progress bars.
        tasks: where shards are embedded; None for this process.
        load_in_tasks: loads a dual encoder there, by default as `load`; pickled.
    """
    tasks = tasks or TaskSettings()
    known: list[EncoderRecord] = []
    loaded: dict[str, DualEncoder] = {}
    for name, source in sources.items():
        if source.startswith(FEATURES):
            stored = StoredFeatures(Path(source[len(FEATURES) :]))
            known.append(EncoderRecord(name, source, stored.fingerprint, stored.provenance, cache / name, stored))
            continue
        encoder = load(source)
        about = encoder_fingerprint(encoder, source), encoder.provenance, cache / name
        known.append(EncoderRecord(name, source, *about, load=partial(load, source), batch_size=batch_size))
        if tasks.is_here and not all(is_whole(file) for each in inputs for file in known[-1].files(each)):
            loaded[name] = encoder
    files = [({own.name: own.files(each) for own in known if own.stored is None}, each) for each in inputs]
    shards = [shard for of, each in files for shard in each.lacking(of)]
    if tasks.is_here:
        own = partial(embed, loaded)
    else:
        own = partial(load_and_embed, uuid.uuid4().hex, load_in_tasks or load, sources)
    bar = partial(tqdm, desc="embedding", unit="item", disable=quiet)
    run_tasks(partial(own, batch_size), shards, _is_embedded, tasks, cache, bar, lambda shard: len(shard.keys))
    return known


def _is_embedded(shard: EmbeddingShard) -> bool:
    return all(map(is_whole, shard.files.values()))


def named_sources(encoders: list[str]) -> dict[str, str]:
    """Sources by the name they have in the results: the part before ``=``, else the last part of the source.

    Raises:
        ValueError: none is given, two have one name, or a name is reserved.
    """
    if not encoders:
        raise ValueError("--encoders is empty; name the student first, then its teachers")
    return by_name(encoders, lambda source: Path(source.removeprefix(FEATURES)).name, "encoder", (ENSEMBLE, ORACLE))


def encoder_fingerprint(encoder: DualEncoder, source: str) -> str:
    """SHA-256 of the encoder's provenance and, if it was loaded from a folder or file, of those files."""
    path = Path(source)
    found = {file for pattern in WEIGHT_FILES for file in path.glob(pattern)} if path.is_dir() else {path}
    files = [file for file in found if file.is_file() and file.name not in NOT_WEIGHTS]
    described = json.dumps(encoder.provenance, sort_keys=True, default=str)
    return hashlib.sha256(f"{described} {encoder.dim} {fingerprint(files)}".encode()).hexdigest()


class StoredFeatures:
    """One teacher's feature store (`mmkd extract`) as an encoder of the images and captions of its pairs alone."""

    def __init__(self, folder: Path) -> None:
        """Open the store.

        Raises:
            FileNotFoundError: there is no store; the message names those below the folder, if there are any.
        """
        if not (folder / "meta.json").is_file():
            below = sorted(path.parent.name for path in folder.glob("*/meta.json"))
            hint = f"; give one of {', '.join(f'features:{folder / name}' for name in below)}" if below else ""
            raise FileNotFoundError(f"features:{folder} holds no meta.json, as every store of `mmkd extract`{hint}")
        self.store = FeatureStore(folder)
        self.fingerprint = hashlib.sha256(f"store {self.store.checksum}".encode()).hexdigest()
        self.provenance = {"features": self.store.name, "dim": self.store.dim, **self.store.provenance}

    def embedded(self, name: str, pairs: Sequence[Pair]) -> Embedded:
        """The vectors of those pairs that the store holds; of pairs that have changed since, none.

        Args:
            name: how the encoder is called in the results.
            pairs: whose images and captions are looked up.
        """
        rows = self.store.rows([pair.id for pair in pairs])
        present = np.flatnonzero(rows >= 0)
        found = [pairs[k] for k in present.tolist()]
        before, now = self.store.fingerprints(rows[present]), fingerprints_of(found)
        changed = np.logical_or.reduce(list(changes(before, now).values())) if found else np.zeros(0, dtype=bool)
        kept = [pair for pair, gone in zip(found, changed.tolist(), strict=True) if not gone]
        image, text, _ = self.store.read(rows[present[~changed]])
        count = int(changed.sum())
        failures = [f"{count} pairs have changed since these features were made; they count as missing"] * (count > 0)
        captions = {pair.caption: row for row, pair in enumerate(kept) if pair.caption.strip()}
        return Embedded(
            name,
            self.fingerprint,
            self.provenance,
            dict(zip((pair.id for pair in kept), _unit(image.numpy()), strict=True)),
            {},
            dict(zip(captions, _unit(text.numpy()[list(captions.values())]), strict=True)),
            failures=failures,
        )


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows (n, dim) at unit length."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), TINY)
