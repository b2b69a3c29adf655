"""The file of each slide that `mmkd tile` makes: features of its tiles, or a drawing of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmkd.command.tasks import Progress, resident
from mmkd.data.images import encode
from mmkd.distributed import chosen_device
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.zoo import load_encoder
from mmkd.evaluation.slides.tiles import Slide, Tiling, drawn_tiles
from mmkd.files import atomic_write_bytes, atomic_write_text

NOTE = ".skipped"
ARRAYS = ("features", "proj", "coords")


def load(source: str, device: str) -> DualEncoder:
    """The encoder, on a device that is checked."""
    return load_encoder(source, chosen_device(device))


@dataclass(frozen=True)
class SlideWriter:
    """Writes bags, or previews.

    Attributes:
        folder: for one file of each slide; a slide that cannot be used leaves a note with the reason until the end.
        tiling: how slides are cut.
        batch_size: tiles per batch of the encoder.
        threads: that read tiles.
        made_of: what a bag depends on, stored with it; None for previews.
    """

    folder: Path
    tiling: Tiling
    batch_size: int
    threads: int
    made_of: dict[str, Any] | None = None

    def has(self, slide: str) -> bool:
        """Whether the file or note of a slide is there; a bag that is damaged is written again.

        Raises:
            ValueError: a bag was made with other settings.
        """
        import h5py

        path = self._file(slide)
        if self.made_of is None or not path.is_file():
            return path.is_file() or self._note(slide).is_file()
        try:
            with h5py.File(path, "r") as file:
                own = dict(json.loads(file.attrs.get("made_of", "{}")))
                for name in ARRAYS:
                    file[name][:]  # compares the checksum of every chunk
        except Exception:  # of damaged files, h5py raises anything from OSError to SystemError
            path.unlink()
            return False
        differing = [key for key in self.made_of if own.get(key) != self.made_of[key]]
        if differing:
            changes = ", ".join(f"{key} {own.get(key)!r} there, {self.made_of[key]!r} now" for key in differing)
            raise ValueError(f"{path} was made with other settings ({changes}); choose another --output")
        return True

    def write(self, slide: str, path: Path, encoder: DualEncoder | None) -> None:
        """Write the file of a slide, or the note."""
        try:
            with Slide(path) as opened:
                corners = self.tiling.corners(opened)
                if encoder is None or self.made_of is None:
                    content = encode(drawn_tiles(opened, corners, self.tiling.side(opened)), None)[1]
                else:
                    content = self._bag(opened, corners, encoder, self.made_of)
        except (ValueError, OSError) as error:
            atomic_write_text(self._note(slide), str(error))
            return
        atomic_write_bytes(self._file(slide), content)

    def skipped(self) -> dict[str, str]:
        """The slides that could not be used, with the reason, as their notes state, which are removed."""
        notes = sorted(self.folder.glob(f"*{NOTE}"))
        found = {note.name.removesuffix(NOTE): note.read_text(encoding="utf-8") for note in notes}
        for note in notes:
            note.unlink()
        return found

    def _file(self, slide: str) -> Path:
        return self.folder / f"{slide}.{'png' if self.made_of is None else 'h5'}"

    def _note(self, slide: str) -> Path:
        return self.folder / f"{slide}{NOTE}"

    def _bag(self, slide: Slide, corners: np.ndarray, encoder: DualEncoder, made_of: dict[str, Any]) -> bytes:
        """An HDF5 file with features, joint vectors and coordinates of a slide's tiles.

        Raises:
            ValueError: a tile cannot be read.
        """
        import h5py

        encoder.batch_size = self.batch_size
        joint: list[torch.Tensor] = []
        pooled: list[torch.Tensor] = []
        for images in self.tiling.batches(slide, corners, self.batch_size, self.threads):
            vectors, before = encoder.encode_images_and_pooled(images)
            joint.append(vectors)
            pooled.append(vectors if before is None else before)
        kind, buffer = np.dtype(made_of["dtype"]), io.BytesIO()
        arrays = *(torch.cat(own).numpy().astype(kind) for own in (pooled, joint)), corners
        with h5py.File(buffer, "w") as file:
            for name, array in zip(ARRAYS, arrays, strict=True):
                file.create_dataset(name, data=array, fletcher32=True)
            file.attrs["encoder"] = made_of["encoder"]
            file.attrs["made_of"] = json.dumps(made_of, sort_keys=True)
        return buffer.getvalue()


def write_slides(
    run: str,
    writer: SlideWriter,
    load: Callable[[], DualEncoder] | None,
    slides: Sequence[tuple[str, Path]],
    progress: Progress,
) -> None:
    """A task of `mmkd.command.tasks`; a process loads the encoder for its first slide of a run."""
    encoder = None if load is None else resident(run, load)
    for slide, path in slides:
        writer.write(slide, path, encoder)
        progress(1)
