"""Teacher features as the authors publish them: a line of ``meta.jsonl`` and two small ``.pt`` files beside each image.

``clips_output.pt`` holds the raw features and ``clips_project_output.pt`` the authors' aligned ones, dictionaries of
``<Teacher>_img`` and ``<Teacher>_txt`` -> (dim,) float32. `PublishedFeatures` reads the folder as it is, one file for
each sample and lookup: slow, but the published set needs no conversion. `import_published` makes feature stores of it,
which hold the same numbers in a memory map; `export_published` and `write_published` write the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from mmkd.data.features import FeatureKind
from mmkd.data.features.index import FINGERPRINT, fingerprints
from mmkd.data.features.store import FeatureType
from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import PairFolder, in_chunks
from mmkd.data.images import read_image_bytes
from mmkd.data.published import META_FILE, PublishedSample, is_folder_name, read_published
from mmkd.data.table import Pair
from mmkd.files import atomic_write_lines

FEATURE_FILES: dict[FeatureKind, str] = {"raw": "clips_output.pt", "aligned": "clips_project_output.pt"}
ENDINGS = (("image", "img"), ("text", "txt"))
SAMPLES_AT_ONCE = 1024

Lookup = Callable[[Sequence[str]], dict[str, dict[str, Tensor]]]


class PublishedFeatures:
    """The features of all teachers in the authors' folder.

    Attributes:
        ids: the samples of ``meta.jsonl``, in its order.
        dims: teacher name -> width of its features.
    """

    def __init__(self, folder: Path, kind: FeatureKind = "raw") -> None:
        """Read ``meta.jsonl`` and, for the dims, one feature file for each teacher.

        Args:
            folder: the folder that holds ``meta.jsonl``.
            kind: ``raw`` for the teachers' own spaces, ``aligned`` for the authors' projected targets.

        Raises:
            FileNotFoundError: ``meta.jsonl`` or a feature file is missing.
            ValueError: no sample lists a teacher, or a file cannot be read or lacks a teacher that is listed.
        """
        samples = read_published(folder)
        self._paths = {s.id: folder / "features" / s.folder / s.id / FEATURE_FILES[kind] for s in samples}
        self.ids = list(self._paths)
        known = fingerprints((s.caption for s in samples), ("" for _ in samples), (s.image for s in samples))
        self._fingerprints = dict(zip(self.ids, known, strict=True))
        first_with: dict[str, str] = {}
        for sample in samples:
            for name in sample.teachers:
                first_with.setdefault(name, sample.id)
        if not first_with:
            raise ValueError(f"{folder / META_FILE} lists no available_clips, so that there are no features to read")
        self.dims = {name: self._width(name, id) for name, id in first_with.items()}

    def lookup(self, ids: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Features of n samples by teacher.

        Returns:
            name -> ``image`` (n, dim) float32, ``text`` (n, dim) float32 and ``mask`` (n,) bool; where a sample lacks a
            teacher the mask is false and the features are zero.

        Raises:
            FileNotFoundError: a feature file is missing.
            ValueError: one cannot be read, or a teacher's features have another width than elsewhere.
        """
        found = {
            name: {
                "image": torch.zeros(len(ids), dim),
                "text": torch.zeros(len(ids), dim),
                "mask": torch.zeros(len(ids), dtype=torch.bool),
            }
            for name, dim in self.dims.items()
        }
        for row, id in enumerate(ids):
            features = self._load(id) if id in self._paths else {}
            for name, parts in found.items():
                if f"{name}_img" in features and f"{name}_txt" in features:
                    for modality, ending in ENDINGS:
                        stored = features[f"{name}_{ending}"].reshape(-1)
                        if len(stored) != self.dims[name]:
                            raise ValueError(
                                f"{self._paths[id]}: {name}_{ending} is {len(stored)} wide, elsewhere {self.dims[name]}"
                            )
                        parts[modality][row] = stored
                    parts["mask"][row] = True
        return found

    def fingerprints(self, ids: Sequence[str]) -> np.ndarray:
        """Of n samples as ``meta.jsonl`` lists them, zeros for those it does not; (n,) of `FINGERPRINT`."""
        unknown = np.zeros((), dtype=FINGERPRINT)[()]
        return np.array([self._fingerprints.get(id, unknown) for id in ids], dtype=FINGERPRINT)

    def _width(self, name: str, id: str) -> int:
        features = self._load(id)
        if f"{name}_img" not in features:
            raise ValueError(f"{self._paths[id]} lacks {name}_img, although available_clips names {name}")
        return features[f"{name}_img"].shape[-1]

    def _load(self, id: str) -> dict[str, Tensor]:
        path = self._paths[id]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the folder lists sample {id} but not its features")
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # damaged files raise anything from EOFError to the unpickler's own
            raise ValueError(f"{path} is not a file of tensors, or truncated ({type(error).__name__})") from error
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise ValueError(f"{path} must hold tensors by name")
        return loaded


def import_published(
    folder: Path, output: Path, kind: FeatureKind, dtype: FeatureType, progress: Callable[[int], object]
) -> dict[str, int]:
    """One feature store for each teacher from the authors' folder.

    Args:
        folder: with ``meta.jsonl`` and ``features/``.
        output: gets ``output/TEACHER``.
        kind: the raw features, or the authors' aligned ones.
        dtype: how numbers are stored.
        progress: called with the number of samples read.

    Returns:
        teacher -> pairs.

    Raises:
        FileNotFoundError: a file of features is missing.
        ValueError: one is damaged.
    """
    published = PublishedFeatures(folder, kind)
    writers = {name: FeatureWriter(output / name, name, dtype) for name in published.dims}
    counts = dict.fromkeys(writers, 0)
    for start in range(0, len(published.ids), SAMPLES_AT_ONCE):
        ids = published.ids[start : start + SAMPLES_AT_ONCE]
        for name, found in published.lookup(ids).items():
            mask = found["mask"]
            own = [id for id, present in zip(ids, mask.tolist(), strict=True) if present]
            writers[name].add(own, found["image"][mask], found["text"][mask], published.fingerprints(own))
            counts[name] += len(own)
        progress(len(ids))
    for name, writer in writers.items():
        about = {"teacher": name, "weights": f"the authors' published features ({FEATURE_FILES[kind]})"}
        unknown = dict.fromkeys(("fingerprint", "preprocessing", "tokenizer", "context", "pooling"), "as published")
        writer.finish({**about, **unknown, "license": "not declared"})
    return counts


def export_published(
    pairs: PairFolder,
    output: Path,
    features: dict[FeatureKind, Lookup],
    images: bool,
    progress: Callable[[int], object],
) -> tuple[int, int]:
    """Write pairs and features as the authors publish them, which their code and `PublishedFeatures` read.

    Args:
        pairs: what is exported; a pair's screened teachers become its ``available_clips``.
        output: an empty folder.
        features: raw ones, aligned ones or both, looked up by ids; teachers that all of them have are written.
        images: whether images are copied; else ``imgpath`` names what is not there.
        progress: called with the number of pairs written.

    Returns:
        pairs written, and pairs left out because no teacher has features for them.

    Raises:
        ValueError: an id is not the name of a folder.
        UnreadableImageError: an image is missing.
    """
    counts = [0, 0]

    def lines() -> Iterator[str]:
        for _, chunk in in_chunks(pairs.pairs):
            for start in range(0, len(chunk), SAMPLES_AT_ONCE):
                some = chunk[start : start + SAMPLES_AT_ONCE]
                found = {kind: lookup([pair.id for pair in some]) for kind, lookup in features.items()}
                for row, pair in enumerate(some):
                    sample = _sample(pair, _teachers(found, row, pair.teachers))
                    counts[not sample.teachers] += 1
                    if not sample.teachers:
                        continue
                    yield _write_sample(output, sample, found, row)
                    if images:
                        (output / sample.image).write_bytes(read_image_bytes(pairs.image_path(pair)))
                progress(len(some))

    atomic_write_lines(output / META_FILE, lines())
    return counts[0], counts[1]


def write_published(folder: Path, samples: Sequence[PublishedSample], kind: FeatureKind, lookup: Lookup) -> None:
    """Write features of samples in the authors' layout: one file of tensors beside each sample, ``meta.jsonl`` last.

    Args:
        folder: where; nothing of it is read.
        samples: what to write; ids and folders must be names of folders.
        kind: which file of the layout.
        lookup: from ids to what `PublishedFeatures.lookup` returns.
    """

    def lines() -> Iterator[str]:
        for begin in range(0, len(samples), SAMPLES_AT_ONCE):
            part = samples[begin : begin + SAMPLES_AT_ONCE]
            found: dict[FeatureKind, dict[str, dict[str, Tensor]]] = {kind: lookup([sample.id for sample in part])}
            for row, sample in enumerate(part):
                yield _write_sample(folder, replace(sample, teachers=_teachers(found, row, None)), found, row)

    atomic_write_lines(folder / META_FILE, lines())


def _teachers(
    found: dict[FeatureKind, dict[str, dict[str, Tensor]]], row: int, allowed: Sequence[str] | None
) -> tuple[str, ...]:
    """Teachers that have every kind of features of a sample and that screening left it, None for all."""
    kinds = list(found.values())
    return tuple(
        name
        for name in kinds[0]
        if all(name in teachers and teachers[name]["mask"][row] for teachers in kinds)
        and (allowed is None or name in allowed)
    )


def _sample(pair: Pair, teachers: tuple[str, ...]) -> PublishedSample:
    """A pair as a sample of the authors' folder, its image beside its features."""
    if not is_folder_name(pair.id):
        raise ValueError(f"pair id {pair.id!r} is not the name of a folder, which the authors' form needs")
    image = PurePosixPath("features", pair.split, pair.id, PurePosixPath(pair.image.replace("@", "/")).name)
    return PublishedSample(pair.id, pair.split, str(image), pair.caption, teachers)


def _write_sample(
    folder: Path, sample: PublishedSample, found: dict[FeatureKind, dict[str, dict[str, Tensor]]], row: int
) -> str:
    """Write a sample's files and return its line of ``meta.jsonl``."""
    for kind, teachers in found.items():
        path = folder / "features" / sample.folder / sample.id / FEATURE_FILES[kind]
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{name}_{ending}": teachers[name][modality][row].float().cpu().clone()
            for name in sample.teachers
            for modality, ending in ENDINGS
        }
        torch.save(tensors, path)
    record = {"folderid": sample.folder, "id": sample.id, "imgpath": sample.image, "txt": sample.caption}
    return json.dumps(record | {"available_clips": sample.teachers}, ensure_ascii=False) + "\n"
