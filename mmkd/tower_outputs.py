"""Pooled outputs of one frozen tower on disk, found by what was encoded.

A key is the hash of an image file or of a text, so that runs on other folders, other captions or other seeds share
what they have in common. Parts are written whole under the hash of their keys: several processes may add to one folder
at a time, and a killed run loses at most the part it worked on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mmkd.files import atomic_write_bytes

KEY_BYTES = 32


class TowerOutputs:
    """The outputs of one tower by key, float32, so that what is read back is what was computed."""

    def __init__(self, folder: Path) -> None:
        """Index the parts that are there; vectors are mapped, not read."""
        self.folder = folder
        self._parts: dict[str, Tensor] = {}
        self._place: dict[bytes, tuple[str, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Find parts that other processes have written since.

        Raises:
            ValueError: a part is damaged; the message names it.
        """
        for path in sorted(self.folder.glob("part-*.safetensors")):
            if path.name in self._parts:
                continue
            try:
                part = load_file(path)
                keys, vectors = part["keys"].numpy(), part["vectors"]
            except (SafetensorError, KeyError) as error:
                raise ValueError(f"{path} is damaged ({error}); remove it, and it is made again") from error
            self._parts[path.name] = vectors
            self._place |= {key.tobytes(): (path.name, row) for row, key in enumerate(keys)}

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Positions of the first occurrence of each key that is not there."""
        first: dict[bytes, int] = {}
        for position, key in enumerate(keys):
            if key not in self._place:
                first.setdefault(key, position)
        return list(first.values())

    def add(self, keys: Sequence[bytes], vectors: Tensor) -> None:
        """Write one part.

        Args:
            keys: n hashes of 32 bytes.
            vectors: (n, width).
        """
        name = f"part-{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.safetensors"
        stored = torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES).copy())
        data = save({"keys": stored, "vectors": vectors.detach().float().cpu().contiguous()})
        atomic_write_bytes(self.folder / name, data)
        self.refresh()

    def read(self, keys: Sequence[bytes]) -> Tensor:
        """Outputs (n, width) of n keys, all of which must be there."""
        places = [self._place[key] for key in keys]
        width = next(iter(self._parts.values())).shape[1] if self._parts else 0
        found = torch.empty(len(keys), width)
        for name in {part for part, _ in places}:
            chosen = [position for position, place in enumerate(places) if place[0] == name]
            found[chosen] = self._parts[name][[places[position][1] for position in chosen]]
        return found
