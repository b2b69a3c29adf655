"""Teacher features as the authors publish them: two small ``.pt`` files beside each image, read when asked for.

``clips_output.pt`` holds the raw features and ``clips_project_output.pt`` the authors' aligned ones, dictionaries of
``<Teacher>_img`` and ``<Teacher>_txt`` -> (dim,) float32. One file is opened for each sample and lookup: slow, but the
published set needs no conversion. `mmkd.data.features.lookup.FeatureStore` holds the same numbers in a memory map.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mmkd.data.features.index import FINGERPRINT, fingerprints
from mmkd.data.published import META_FILE, PublishedSample, read_published
from mmkd.files import atomic_write_text

FeatureKind = Literal["raw", "aligned"]
FEATURE_FILES: dict[FeatureKind, str] = {"raw": "clips_output.pt", "aligned": "clips_project_output.pt"}
SAMPLES_AT_ONCE = 1024


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

    def lookup(self, ids: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
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
                    for modality, ending in (("image", "img"), ("text", "txt")):
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

    def _load(self, id: str) -> dict[str, torch.Tensor]:
        path = self._paths[id]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the folder lists sample {id} but not its features")
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # damaged files raise anything from EOFError to the unpickler's own
            raise ValueError(f"{path} is no file of tensors, or cut off ({type(error).__name__})") from error
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise ValueError(f"{path} must hold tensors by name")
        return loaded


def write_published(
    folder: Path,
    samples: Sequence[PublishedSample],
    kind: FeatureKind,
    features: Callable[[Sequence[str]], dict[str, dict[str, torch.Tensor]]],
) -> None:
    """Write features in the authors' layout: one file of tensors beside each sample, ``meta.jsonl`` last.

    Args:
        folder: where; nothing of it is read.
        samples: what to write; ids and folders must be names of folders.
        kind: which file of the layout.
        features: from ids to what `PublishedFeatures.lookup` returns.
    """
    lines = []
    for begin in range(0, len(samples), SAMPLES_AT_ONCE):
        part = samples[begin : begin + SAMPLES_AT_ONCE]
        found = features([sample.id for sample in part])
        for row, sample in enumerate(part):
            known = [name for name, teacher in found.items() if teacher["mask"][row]]
            tensors = {
                f"{name}_{ending}": found[name][modality][row].float().cpu().clone()
                for name in known
                for modality, ending in (("image", "img"), ("text", "txt"))
            }
            path = folder / "features" / sample.folder / sample.id / FEATURE_FILES[kind]
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(tensors, path)
            record = {"folderid": sample.folder, "id": sample.id, "imgpath": sample.image, "txt": sample.caption}
            lines.append(json.dumps(record | {"available_clips": known}, ensure_ascii=False) + "\n")
    atomic_write_text(folder / META_FILE, "".join(lines))
