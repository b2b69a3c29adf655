"""What every reader of pixels keeps to: forms of files, reasons of refusal, limits of size, deep values as 8 bits.

There is one rule for grey values of more than 8 bits: they are windowed from their 0.5th to their 99.5th percentile
(from minimum to maximum where these coincide), ignoring values that are not finite. DICOM and NIfTI state more: CT is
shown in a display window of Hounsfield units if one is chosen (`Window`), and DICOM in its own window by default.
"""

from __future__ import annotations

import gzip
import io
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Form = Literal["dicom", "nifti", ""]
Reason = Literal[
    "missing", "unreadable", "unsupported", "corrupt", "too_small", "too_large", "too_narrow", "no_pixels", "no_frame",
    "no_decoder", "encrypted",
]  # fmt: skip

REASONS: tuple[str, ...] = get_args(Reason)
MAX_PIXELS = 89_478_485
MAX_FILE_BYTES = 1024**3
MAX_ASPECT = 100
MINIMUM_SIDE = 8
WINDOW_PERCENTILES = (0.5, 99.5)
WindowPreset = Literal["auto", "lung", "soft", "bone", "brain", "three"]
HOUNSFIELD_WINDOWS = {"lung": (-600, 1500), "soft": (40, 400), "bone": (400, 1800), "brain": (40, 80)}
CHANNELS_OF_THREE = ("lung", "soft", "bone")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
OTHER_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8")  # a picture that has DICOM's mark by chance or by intent
PREAMBLE, MARK = 128, b"DICM"
ENVELOPE = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07"  # of a file that is encrypted as a whole (CMS)
NIFTI_MARKS = ((344, b"n+1\0"), (4, b"n+2\0"))
NIFTI_START = 352
GZIP = b"\x1f\x8b"


class UnreadableImageError(ValueError):
    """An image that cannot be used; ``reason`` is one of `REASONS`."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{message} ({reason})")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Window:
    """How a DICOM or NIfTI file becomes an 8-bit image; other files are not affected.

    Attributes:
        preset: auto is the file's own display window, percentiles where it has none and for MR; lung, soft, bone and
            brain are windows of CT in Hounsfield units; three has lung, soft and bone as red, green and blue. DICOM
            files that are not CT are read by auto.
        frame: of a DICOM file with several frames, or axial slice of a NIfTI volume, from 1; 0 for the middle one.
    """

    preset: WindowPreset = "auto"
    frame: int = 0

    def __post_init__(self) -> None:
        """Refuse unknown presets and negative numbers."""
        if self.preset not in get_args(WindowPreset):
            raise ValueError(f"window is {self.preset!r}; allowed: {', '.join(get_args(WindowPreset))}")
        if self.frame < 0:
            raise ValueError(f"frame is {self.frame}; allowed: numbers from 1, or 0 for the middle one")

    def position(self, count: int, name: str) -> int:
        """The index of the frame among ``count``, from 0.

        Raises:
            UnreadableImageError: there are fewer frames.
        """
        if self.frame > count:
            raise UnreadableImageError("no_frame", f"{name} has {count} frames, not {self.frame}")
        return self.frame - 1 if self.frame else count // 2


DEFAULT_WINDOW = Window()


def check_size(size: tuple[int, int], name: str, minimum_side: int) -> None:
    """Refuse (width, height) that must not be decoded.

    Raises:
        UnreadableImageError: too many pixels, too few, or sides beyond 1:100.
    """
    short, long = sorted(size)
    if short * long > MAX_PIXELS:
        raise UnreadableImageError("too_large", f"{name} has {size[0]} x {size[1]} pixels, more than {MAX_PIXELS}")
    if short < minimum_side:
        raise UnreadableImageError("too_small", f"{name} has {size[0]} x {size[1]} pixels, a side under {minimum_side}")
    if long > MAX_ASPECT * short:
        raise UnreadableImageError(
            "too_narrow", f"{name} has {size[0]} x {size[1]} pixels, sides beyond 1:{MAX_ASPECT}"
        )


def window_by_percentiles(values: np.ndarray) -> np.ndarray:
    """Grey values of any depth (height, width) as uint8; values that are not finite count as the nearest end."""
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.zeros(values.shape, dtype=np.uint8)
    low, high = np.percentile(finite, WINDOW_PERCENTILES)
    if high <= low:
        low, high = finite.min(), finite.max()
    return window_between(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)


def window_between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Finite grey values (height, width) as uint8: 0 at ``low``, 255 at ``high``, linear between and clipped."""
    scaled = values - np.float64(low)
    scaled /= max(high - low, np.finfo(float).tiny)
    np.clip(scaled, 0, 1, out=scaled)  # in place: most of the time is memory
    scaled *= 255
    return np.rint(scaled, out=scaled).astype(np.uint8)


def window_hounsfield(values: np.ndarray, preset: str) -> np.ndarray:
    """Hounsfield units (height, width) in a window of CT as uint8, (height, width), or (height, width, 3) for three."""
    if preset == "three":
        return np.stack([window_hounsfield(values, channel) for channel in CHANNELS_OF_THREE], axis=2)
    center, width = HOUNSFIELD_WINDOWS[preset]
    return window_between(values, center - width / 2, center + width / 2)


def form_of(data: bytes, name: str = "") -> Form:
    """Whether a file is DICOM or NIfTI, by its content, or DICOM by its suffix; empty for all others."""
    if data[PREAMBLE : PREAMBLE + len(MARK)] == MARK and not data.startswith(OTHER_STARTS):
        return "dicom"
    if is_encrypted(data) or (name.lower().endswith(DICOM_SUFFIXES) and not data.startswith(OTHER_STARTS)):
        return "dicom"
    start = inflated(data, NIFTI_START) if data.startswith(GZIP) else data
    return "nifti" if any(start[at : at + len(mark)] == mark for at, mark in NIFTI_MARKS) else ""


def is_encrypted(data: bytes) -> bool:
    """Whether a file is an envelope that only its recipient opens."""
    return data.startswith(b"\x30") and ENVELOPE in data[:64]


def inflated(data: bytes, most: int) -> bytes:
    """At most this many bytes of a gzip file; those before the damage of a broken one."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return file.read(most)
    except (OSError, EOFError, zlib.error):
        return b""
