"""Bags: features of all tiles of a slide, one HDF5 file a slide, as TRIDENT, CLAM, STAMP and `mmkd tile` write them.

``root/ENCODER/SLIDE.h5`` holds ``features`` (N, D), the vectors before the projection; ``coords`` (N, 2), where each
tile lies, which no task here needs, but which must be of as many tiles where it is there; and, where `mmkd tile` wrote
it, ``proj`` (N, P), the tiles in the joint space of images and texts. Other names that are read: ``feats`` (STAMP),
``patch_embeddings`` and ``embeddings``; (1, N, D) is taken as (N, D).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Dataset
from mmkd.evaluation.embeddings.embed import Embedded, UndefinedMetricError, Vectors
from mmkd.evaluation.tasks.task import Task

FEATURE_NAMES = ("features", "feats", "patch_embeddings", "embeddings")
JOINT_NAMES = ("proj", "projected")
SUFFIXES = (".h5", ".hdf5")
SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".vms", ".png", ".jpg")
CHECKSUM = "sha256"  # attribute of an array
MEMORY = 2 * 1024**3  # most bytes of features that are kept for another reading
DENSEST = 1032  # bytes that deflate, the densest filter of HDF5, makes of one
NAMED = 5


class EncoderBags:
    """The bags of one encoder; files are opened when a slide is read, and the last ones are kept in memory."""

    def __init__(self, encoder: str, files: dict[str, Path]) -> None:
        """Keep where each slide's file lies.

        Args:
            encoder: whose features these are.
            files: by slide.
        """
        self.encoder, self.files = encoder, files
        self._memory, self._held = MEMORY, 0
        self._kept: OrderedDict[tuple[str, str], Vectors] = OrderedDict()

    def __contains__(self, slide: str) -> bool:
        return slide_name(slide) in self.files

    def require(self, slides: Sequence[str]) -> None:
        """Raise unless every one of these slides has a bag.

        Raises:
            UndefinedMetricError: some are not there; the first of them are named.
        """
        if missing := [slide for slide in slides if slide not in self]:
            raise UndefinedMetricError(
                f"{len(missing)} of {len(slides)} slides have no bag of {self.encoder}: {listed(missing)}"
            )

    def features(self, slide: str) -> Vectors:
        """Tiles before the projection, ``(N, D)`` float32.

        Raises:
            UndefinedMetricError: no file, no tile, values that are not finite numbers, no features in the file, or
                coordinates of other tiles than these.
        """
        return self._read(slide, FEATURE_NAMES)

    def joint(self, slide: str, width: int) -> Vectors:
        """Unit vectors of the tiles in the joint space, ``(N, width)``; of features where ``proj`` is missing.

        Raises:
            UndefinedMetricError: as `features`, or the file holds no vectors of that width.
        """
        stored = self._shapes(slide)
        names = next((names for names in (JOINT_NAMES, FEATURE_NAMES) if _first(stored, names)), JOINT_NAMES)
        vectors = self._read(slide, names)
        if vectors.shape[1] != width:
            raise UndefinedMetricError(
                f"{self.encoder} has no joint vectors of width {width} for slide {slide} (found {vectors.shape[1]}); "
                "make bags that hold `proj` with `mmkd tile`"
            )
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def width(self, slides: Sequence[str]) -> int:
        """Width of the features of all these slides, read from the headers.

        Raises:
            UndefinedMetricError: bags are missing or empty, or widths differ; the slides are named.
        """
        self.require(slides)
        widths: dict[int, str] = {}
        empty = []
        for slide in slides:
            shapes = self._shapes(slide)
            name = _first(shapes, FEATURE_NAMES)
            if name is None or 0 in shapes[name] or len(shapes[name]) < 2:
                empty.append(slide)
            else:
                widths.setdefault(shapes[name][-1], slide)
        if empty:
            raise UndefinedMetricError(
                f"{len(empty)} of {len(slides)} bags of {self.encoder} hold no tile: {listed(empty)}"
            )
        if len(widths) > 1:
            shown = ", ".join(f"{width} in {slide}" for width, slide in widths.items())
            raise UndefinedMetricError(
                f"bags of {self.encoder} differ in width: {shown}; they come from more than one encoder"
            )
        return next(iter(widths))

    def fingerprint(self, slides: Sequence[str]) -> str:
        """Changes when a bag of these slides does: a hash over names, sizes and times of their files."""
        digest = hashlib.sha256()
        for slide in sorted(slides):
            path = self.files.get(slide_name(slide))
            found = path.stat() if path else None
            digest.update(f"{slide} {found.st_size} {found.st_mtime_ns}\n".encode() if found else f"{slide}\n".encode())
        return digest.hexdigest()

    def _read(self, slide: str, names: Sequence[str]) -> Vectors:
        key = (slide, names[0])
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        with self._open(slide) as file:
            name = _first(file, names)
            if name is None:
                raise UndefinedMetricError(
                    f"{self.encoder}: the bag of slide {slide} holds {sorted(file)}, none of {names}"
                )
            stored = file[name]
            self._check_rows(slide, file)
            if stored.dtype.kind not in "fiu":
                raise UndefinedMetricError(f"{self.encoder}: {name} of slide {slide} are {stored.dtype}, not numbers")
            if len(stored.shape) != 2 and not (len(stored.shape) == 3 and stored.shape[0] == 1):
                raise UndefinedMetricError(
                    f"{self.encoder}: slide {slide} has {name} of shape {stored.shape}, expected (N, D)"
                )
            if stored.nbytes > DENSEST * self.files[slide_name(slide)].stat().st_size:
                raise UndefinedMetricError(
                    f"{self.encoder}: {name} of slide {slide} states shape {stored.shape}, too much for its file"
                )
            values = stored[()]
            if CHECKSUM in stored.attrs and stored.attrs[CHECKSUM] != values_sha256(values):
                raise UndefinedMetricError(f"{self.encoder}: {name} of slide {slide} differ from what was written")
            vectors = np.asarray(values, dtype=np.float32).reshape(-1, values.shape[-1])
        if not vectors.size:
            raise UndefinedMetricError(f"{self.encoder}: the bag of slide {slide} is empty")
        if not np.isfinite(vectors).all():
            count = int((~np.isfinite(vectors)).any(axis=1).sum())
            raise UndefinedMetricError(
                f"{self.encoder}: {count} of {len(vectors)} tiles of slide {slide} are not finite"
            )
        self._keep(key, vectors)
        return vectors

    def _check_rows(self, slide: str, file: Any) -> None:
        """Raise where what a file holds of each tile is not of as many tiles: it was cut off, or mixed up."""
        known = (*FEATURE_NAMES, *JOINT_NAMES, "coords")
        rows = {name: file[name].shape[-2] for name in known if len(getattr(file.get(name), "shape", ())) > 1}
        if len(set(rows.values())) > 1:
            counts = ", ".join(f"{name} of {count} tiles" for name, count in rows.items())
            raise UndefinedMetricError(f"{self.encoder}: the bag of slide {slide} holds {counts}; make it again")

    def _keep(self, key: tuple[str, str], vectors: Vectors) -> None:
        if vectors.nbytes > self._memory:
            return
        self._kept[key] = vectors
        self._held += vectors.nbytes
        while self._held > self._memory:
            self._held -= self._kept.popitem(last=False)[1].nbytes

    def _shapes(self, slide: str) -> dict[str, tuple[int, ...]]:
        with self._open(slide) as file:
            return {name: file[name].shape for name in file if hasattr(file[name], "shape")}

    @contextmanager
    def _open(self, slide: str) -> Iterator[Any]:
        import h5py

        self.require([slide])
        try:
            with h5py.File(self.files[slide_name(slide)], "r") as file:
                outside = next((name for name in file if _lies_elsewhere(file, name)), None)
                if outside is not None:
                    raise UndefinedMetricError(
                        f"{self.encoder}: {outside!r} of slide {slide} lies in another file; copy it into the bag"
                    )
                yield file
        except UndefinedMetricError:
            raise
        except Exception as error:  # of damaged files, h5py raises anything from OSError to SystemError
            reason = str(error).partition("\n")[0]
            raise UndefinedMetricError(f"{self.encoder}: the bag of slide {slide} cannot be read ({reason})") from None


def values_sha256(values: np.ndarray) -> str:
    """SHA-256 of an array as HDF5 decodes it: its own checksums do not cover how numbers are to be read."""
    return hashlib.sha256(f"{values.dtype.str} {values.shape}".encode() + values.tobytes()).hexdigest()


def _lies_elsewhere(file: Any, name: str) -> bool:
    """Whether an entry of an HDF5 file is a link, or its values are in other files, which anyone could have named."""
    import h5py

    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        return True
    entry = file[name]
    return isinstance(entry, h5py.Dataset) and (bool(entry.external) or entry.is_virtual)


class BagFolder:
    """Bags of several encoders, one folder each, or of one encoder in the folder itself."""

    def __init__(self, root: Path) -> None:
        """Name the folder; nothing is read yet.

        Raises:
            FileNotFoundError: it does not exist.
        """
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is no folder of bags; make it with `mmkd tile --output {root}`")
        self.root = root
        self._last: EncoderBags | None = None

    def encoders(self) -> list[str]:
        """Names of the folders that hold bags; that of the root itself where it holds bags."""
        inside = [path.name for path in sorted(self.root.iterdir()) if path.is_dir() and bag_files(path)]
        return inside or ([_owner(self.root)] if bag_files(self.root) else [])

    def open(self, encoder: str) -> EncoderBags:
        """The bags of an encoder.

        Raises:
            UndefinedMetricError: there are none; the message names the encoders that have some.
        """
        if self._last is not None and self._last.encoder == encoder:
            return self._last
        folders = [self.root / name for name in (encoder, f"features_{encoder}")]
        files: dict[str, Path] = next((found for folder in folders if (found := bag_files(folder))), {})
        if not files and encoder == _owner(self.root):
            files = bag_files(self.root)
        if not files:
            known = ", ".join(self.encoders()) or "no encoder"
            raise UndefinedMetricError(
                f"no bags of {encoder} in {self.root} (there are bags of {known}); `mmkd tile` makes them"
            )
        self._last = EncoderBags(encoder, files)
        return self._last

    def slides(self) -> set[str]:
        """Slides of which any encoder has a bag."""
        folders = [path for path in self.root.iterdir() if path.is_dir()]
        return {slide for folder in [self.root, *folders] for slide in bag_files(folder)}


class BagTask(Task):
    """A task over bags.

    Attributes:
        bags: of all encoders.
        slides: those whose bags are read.
    """

    bags: BagFolder
    slides: list[str]

    def extra_fingerprint(self, embedded: Embedded) -> list[str]:
        """A fingerprint of the bags that are read."""
        return [self.bags.open(embedded.name).fingerprint(self.slides)]

    def opened(self, embedded: Embedded) -> EncoderBags:
        """The bags of an encoder, all there and of one width."""
        bags = self.bags.open(embedded.name)
        bags.width(self.slides)
        return bags


def bag_files(folder: Path) -> dict[str, Path]:
    """HDF5 files by slide, in the folder or (CLAM) in ``h5_files`` inside it."""
    for place in (folder, folder / "h5_files"):
        if place.is_dir():
            found = {slide_name(p.name): p for p in sorted(place.iterdir()) if p.suffix.lower() in SUFFIXES}
            if found:
                return found
    return {}


def slide_name(name: str) -> str:
    """A slide as files are called: without folder and the ending of its image or bag."""
    name = Path(name).name
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in (*SUFFIXES, *SLIDE_SUFFIXES) else name


def slide_of(pair: Pair) -> str:
    """The slide behind a pair."""
    return slide_name(pair.image or pair.id)


def bags_of(dataset: Dataset) -> BagFolder | None:
    """The bags of a dataset of slides; None for any other."""
    return BagFolder(dataset.root) if dataset.root is not None else None


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def _owner(folder: Path) -> str:
    """The encoder of the bags in a folder: from their attribute, else the folder's name."""
    import h5py

    files = bag_files(folder)
    try:
        with h5py.File(next(iter(files.values())), "r") as file:
            name = file.attrs.get("encoder")
    except Exception:  # no file, or a damaged one, which is reported when it is read
        name = None
    return str(name) if name else folder.name.removeprefix("features_")


def _first(stored: Any, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in stored), None)
