"""Teacher features as the authors publish them: a line of ``meta.jsonl`` and two small ``.pt`` files beside each image.

``clips_output.pt`` holds the raw features and ``clips_project_output.pt`` the authors' aligned ones, dictionaries of
``<Teacher>_img`` and ``<Teacher>_txt`` -> (dim,) float32. `PublishedFeatures` reads the folder as it is, one file for
each sample and lookup: slow, but the published set needs no conversion. `mmkd.data.features.conversion` makes feature
stores of it, and writes such a folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmkd.data.features import FeatureKind
from mmkd.data.features.index import FINGERPRINT, fingerprints
from mmkd.data.folder import META_FILE, read_published

FEATURE_FILES: dict[FeatureKind, str] = {"raw": "clips_output.pt", "aligned": "clips_project_output.pt"}
ENDINGS = (("image", "img"), ("text", "txt"))


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
