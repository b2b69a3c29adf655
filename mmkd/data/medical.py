"""Decode DICOM (pydicom) and NIfTI (nibabel) to 8-bit pixels; called by `mmkd.data.images` alone.

DICOM: modality LUT or rescale, the file's VOI LUT or window (also of a frame of an enhanced file), MONOCHROME1
inverted, palettes and YBR as RGB, colour of more than 8 bits by its high bytes. Compressed files are decoded where
pydicom has a decoder. NIfTI: an axial slice of the first volume, oriented by its header and shown as DICOM slices are:
the front up, the patient's right on the left.

Of a DICOM file only the elements that describe pixels are read (`PIXEL_ELEMENTS`), so that no name or number of a
patient is in memory. Messages never quote a header, and pydicom's own warnings, which do, are silenced. Sizes are
checked by the header before anything is decoded, also those of a compressed frame, which may differ, and of compressed
files.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from mmkd.data.pixel_rules import (
    GZIP,
    MARK,
    MAX_FILE_BYTES,
    NIFTI_MARKS,
    PREAMBLE,
    UnreadableImageError,
    Window,
    check_size,
    inflated,
    is_encrypted,
    window_between,
    window_by_percentiles,
    window_hounsfield,
)

INSTALL = 'pip install -e ".[dicom]" in your clone'
DEFLATED = b"1.2.840.10008.1.2.1.99"
MAX_FRAMES = 65_536

PIXEL_ELEMENTS = (
    "SOPClassUID", "Modality", "EncryptedAttributesSequence", "SamplesPerPixel", "PhotometricInterpretation",
    "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelPaddingValue", "WindowCenter", "WindowWidth", "VOILUTFunction", "RescaleSlope",
    "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "FloatPixelData", "DoubleFloatPixelData", "PixelData",
)  # fmt: skip
STORES = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
FRAME_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


def read_dicom(data: bytes, name: str, minimum_side: int, window: Window) -> np.ndarray:
    """One frame of a DICOM file.

    Args:
        data: the bytes of the file.
        name: of the file in errors.
        minimum_side: images with a shorter side than this many pixels are refused.
        window: of CT, and which frame.

    Returns:
        (height, width) or (height, width, 3) uint8.

    Raises:
        UnreadableImageError: with one of `mmkd.data.pixel_rules.REASONS`.
    """
    with _reading(name):
        dataset = _dataset(data, name, PIXEL_ELEMENTS)
        frames = _frames(dataset, name)
        check_size((int(dataset.Columns), int(dataset.Rows)), name, minimum_side)
        frame = window.position(frames, name)
        _use_frame_groups(dataset, frame)
        return _shown(dataset, _stored(dataset, frame, frames, name), name, window)


def count_frames(data: bytes, name: str) -> int:
    """The number of frames of a DICOM file.

    Raises:
        UnreadableImageError: it has no pixels, or too many frames.
    """
    with _reading(name):
        return _frames(_dataset(data, name, PIXEL_ELEMENTS), name)


def dicom_values(data: bytes, name: str, elements: Sequence[str]) -> dict[str, str]:
    """Elements of a DICOM header as text by keyword: empty where missing, several values joined by a backslash.

    Args:
        data: the bytes of the file.
        name: of the file in errors.
        elements: keywords such as ``StudyInstanceUID``; nothing else is read.

    Raises:
        UnreadableImageError: it is no DICOM file, or broken.
    """
    with _reading(name):
        dataset = _dataset(data, name, elements, with_pixels=False)
        return {element: _text(dataset.get(element)) for element in elements}


def require_pydicom() -> None:
    """Refuse to start without pydicom.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise ValueError(f"DICOM files need pydicom: {INSTALL}") from None


def is_element(keyword: str) -> bool:
    """Whether DICOM has an element of this keyword."""
    from pydicom.datadict import tag_for_keyword

    return tag_for_keyword(keyword) is not None


def read_nifti(data: bytes, name: str, minimum_side: int, window: Window) -> np.ndarray:
    """An axial slice of a NIfTI file, of the first volume where it has several.

    Args:
        data: the bytes of the file, which may be compressed by gzip.
        name: of the file in errors.
        minimum_side: slices with a shorter side than this many voxels are refused.
        window: presets take the values for Hounsfield units, since the file states no modality; and which slice,
            counted from the feet.

    Returns:
        (height, width) or (height, width, 3) uint8.

    Raises:
        UnreadableImageError: with one of `mmkd.data.pixel_rules.REASONS`.
    """
    try:
        import nibabel
    except ImportError:
        raise UnreadableImageError("no_decoder", f"{name} is NIfTI, which needs nibabel: {INSTALL}") from None
    with _reading(name):
        data = inflated(data, MAX_FILE_BYTES + 1) if data.startswith(GZIP) else data
        if len(data) > MAX_FILE_BYTES:
            raise UnreadableImageError("too_large", f"{name} has more than {MAX_FILE_BYTES} bytes when decompressed")
        form = nibabel.Nifti1Image if data[344:348] == NIFTI_MARKS[0][1] else nibabel.Nifti2Image
        image = form.from_bytes(data)
        shape = tuple(image.shape)
        axes = nibabel.io_orientation(image.affine)
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if not 2 <= len(shape) <= 4 or not all(shape):
            raise UnreadableImageError("unsupported", f"{name} has {len(shape)} dimensions; allowed: 2 to 4")
        shape = (*shape, 1)[:3]
        if np.isnan(axes).any() or sorted(axes[:, 0]) != [0, 1, 2]:
            axes = np.array([[0, 1], [1, 1], [2, 1]])  # the header states no direction
        right, front, up = (int(np.flatnonzero(axes[:, 0] == axis)[0]) for axis in range(3))
        check_size((shape[right], shape[front]), name, minimum_side)
        position = window.position(shape[up], name)
        position = position if axes[up, 1] > 0 else shape[up] - 1 - position
        values = _slice(image.dataobj, up, position)
    values = values if right < front else values.swapaxes(0, 1)  # right, front
    values = values[:: -1 if axes[right, 1] > 0 else 1, :: -1 if axes[front, 1] > 0 else 1].swapaxes(0, 1)
    return _nifti_shown(np.ascontiguousarray(values), name, window)


def _slice(values: Any, axis: int, position: int) -> np.ndarray:
    """Voxels (a, b) of the first volume, without reading the others."""
    at: list[Any] = [slice(None)] * min(3, len(values.shape))
    if axis < len(at):
        at[axis] = position
    first_volume = tuple(at + [0] * (len(values.shape) - len(at)))
    return np.asarray(values[first_volume])


def _nifti_shown(values: np.ndarray, name: str, window: Window) -> np.ndarray:
    if values.dtype.names:
        if set("RGB") <= set(values.dtype.names):
            return np.stack([values[channel] for channel in "RGB"], axis=2)
        raise UnreadableImageError("unsupported", f"{name} holds records; allowed: numbers and RGB")
    if values.dtype.kind not in "biuf":
        raise UnreadableImageError("unsupported", f"{name} holds {values.dtype}; allowed: integers and real numbers")
    if not np.isfinite(values).any():
        raise UnreadableImageError("corrupt", f"{name} has no finite value in the slice that is shown")
    if window.preset == "auto":
        return window_by_percentiles(values)
    return window_hounsfield(np.nan_to_num(values.astype(np.float64), nan=-np.inf), window.preset)


def _dataset(data: bytes, name: str, elements: Sequence[str], with_pixels: bool = True) -> Any:
    """A DICOM file with these elements alone.

    Raises:
        UnreadableImageError: pydicom is missing, or the file is encrypted or too large when decompressed.
    """
    try:
        from pydicom import dcmread
    except ImportError:
        raise UnreadableImageError("no_decoder", f"{name} is DICOM, which needs pydicom: {INSTALL}") from None
    if is_encrypted(data):
        raise UnreadableImageError("encrypted", f"{name} is an encrypted file; decrypt it first")
    _refuse_large_deflated(data, name)
    dataset = dcmread(
        io.BytesIO(data), stop_before_pixels=not with_pixels, force=True, specific_tags=[*elements, "SOPClassUID"]
    )
    if data[PREAMBLE : PREAMBLE + len(MARK)] != MARK and "SOPClassUID" not in dataset and "Rows" not in dataset:
        raise UnreadableImageError("corrupt", f"{name} is not DICOM, though its name says so")
    return dataset


def _refuse_large_deflated(data: bytes, name: str) -> None:
    """Refuse a file whose header is compressed and would fill the memory."""
    if DEFLATED not in data[:1024]:
        return
    length = int.from_bytes(data[140:144], "little")  # of the file's own group, which its first element states
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    size, rest = 0, data[144 + length :]
    while rest and size <= MAX_FILE_BYTES:
        size += len(inflater.decompress(rest, 1 << 24))
        rest = inflater.unconsumed_tail
    if size > MAX_FILE_BYTES:
        raise UnreadableImageError("too_large", f"{name} has more than {MAX_FILE_BYTES} bytes when decompressed")


def _frames(dataset: Any, name: str) -> int:
    """The number of frames; refuses a file without pixels."""
    stored = any(element in dataset for element in STORES)
    complete = all(dataset.get(element) for element in ("Rows", "Columns"))
    frames = int(dataset.get("NumberOfFrames") or 1)
    if not stored and "EncryptedAttributesSequence" in dataset:
        raise UnreadableImageError("encrypted", f"{name} holds encrypted elements and no pixels; decrypt it first")
    if not (stored and complete):
        raise UnreadableImageError("no_pixels", f"{name} is a DICOM file without an image, such as a report or a plan")
    if not 1 <= frames <= MAX_FRAMES:
        raise UnreadableImageError("too_large", f"{name} states {frames} frames; allowed: 1 to {MAX_FRAMES}")
    return frames


def _use_frame_groups(dataset: Any, frame: int) -> None:
    """Give an enhanced file the rescale and window of one frame."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
    own = (dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for group in (*shared, *own):
        for macro in FRAME_GROUPS:
            for item in (group.get(macro) or [])[:1]:
                dataset.update(item)


def _stored(dataset: Any, frame: int, frames: int, name: str) -> np.ndarray:
    """The stored values of a frame, (rows, columns) or (rows, columns, 3), with YBR as RGB."""
    from pydicom.pixels import get_decoder, pixel_array
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UnreadableImageError("no_decoder", f"{name} has a transfer syntax that pydicom does not decode") from None
    if not decoder.is_available:
        raise UnreadableImageError(
            "no_decoder",
            f"{name} is compressed as {syntax.name}, for which no decoder is installed: {INSTALL}; JPEG Lossless needs "
            "python-gdcm or pylibjpeg-libjpeg as well",
        )
    try:
        if syntax.is_encapsulated:
            _check_frame(dataset, frame, frames, name)
        # pylibjpeg-rle 2.2 panics on damaged files, past every `except Exception`
        return pixel_array(dataset, index=frame, decoding_plugin="pydicom" if syntax == RLELossless else "")
    except UnreadableImageError:
        raise
    except Exception:
        if syntax.name.startswith("JPEG Extended") and int(dataset.BitsStored) > 8:
            raise UnreadableImageError("no_decoder", f"{name} is JPEG of 12 bits; python-gdcm decodes it") from None
        raise


def _check_frame(dataset: Any, frame: int, frames: int, name: str) -> None:
    """Refuse a compressed frame of another size than the header's."""
    from pydicom.encaps import get_frame

    tables = (dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths"))
    offsets = tables if all(tables) else None
    coded = get_frame(dataset.PixelData, frame, number_of_frames=frames, extended_offsets=offsets)
    size = _coded_size(coded)
    if size is not None and size != (int(dataset.Columns), int(dataset.Rows)):
        raise UnreadableImageError("corrupt", f"{name} states another size than its compressed pixels have")


def _coded_size(coded: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a JPEG, JPEG-LS or JPEG 2000 stream; None for all others."""
    start = coded.find(b"\xff\x4f\xff\x51", 0, 256)
    if start >= 0:  # size and offset of the image on the reference grid
        x, y, left, top = (int.from_bytes(coded[start + at : start + at + 4], "big") for at in (8, 12, 16, 20))
        return x - left, y - top
    position = 2 if coded.startswith(b"\xff\xd8") else len(coded)
    while position + 9 <= len(coded) and coded[position] == 0xFF:
        marker = coded[position + 1]
        if marker == 0xFF:  # fill
            position += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = (int.from_bytes(coded[position + at : position + at + 2], "big") for at in (5, 7))
            return width, height
        else:
            position += 2 + int.from_bytes(coded[position + 2 : position + 4], "big")
    return None


def _shown(dataset: Any, stored: np.ndarray, name: str, window: Window) -> np.ndarray:
    """Stored values as uint8."""
    from pydicom.pixels import apply_color_lut

    photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2").strip()
    if photometric == "PALETTE COLOR":
        colors = apply_color_lut(stored, dataset)
        return _high_bytes(colors, 8 * colors.itemsize)[..., :3]
    if stored.ndim == 3 and stored.shape[2] == 3:
        return _high_bytes(stored, int(dataset.BitsStored))
    if stored.ndim != 2:
        raise UnreadableImageError("unsupported", f"{name} has {stored.shape[-1]} samples a pixel; allowed: 1 and 3")
    grey = _grey(dataset, stored, window)
    return 255 - grey if photometric == "MONOCHROME1" else grey


def _high_bytes(colors: np.ndarray, bits: int) -> np.ndarray:
    return (colors >> max(0, bits - 8)).astype(np.uint8)


def _grey(dataset: Any, stored: np.ndarray, window: Window) -> np.ndarray:
    """Grey values in a window of CT, in the file's own, or by percentiles, which leave padding out."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(stored, dataset)
    modality = dataset.get("Modality")
    if modality == "CT" and window.preset != "auto":
        return window_hounsfield(values, window.preset)
    if modality != "MR":
        if dataset.get("VOILUTSequence"):
            depth = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
            return window_between(apply_voi(np.rint(values).astype(np.int64), dataset), 0, 2**depth - 1)
        center, width = (_first_number(dataset.get(element)) for element in ("WindowCenter", "WindowWidth"))
        function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
        if math.isfinite(center) and width > (1 if function == "LINEAR" else 0):
            return _window(values, center, width, function)
    padding = dataset.get("PixelPaddingValue")
    if isinstance(padding, int) and (stored != padding).any():
        values = np.where(stored == padding, np.nan, values)
    return window_by_percentiles(values)


def _window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """The functions of DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, from 0 to 255."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return (255 / (1 + np.exp(-4 * (values.astype(np.float64) - center) / width))).round().astype(np.uint8)
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return window_between(values, center - width / 2, center + width / 2)


def _first_number(value: Any) -> float:
    """The first of one or several numbers; NaN if there is none."""
    first = value if isinstance(value, (int, float)) or not value else value[0]
    return float(first) if isinstance(first, (int, float)) else math.nan


def _text(value: Any) -> str:
    several = isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue"
    parts = value if several else [value]
    return "\\".join("" if part is None else str(part).strip() for part in parts)


_READING = ContextVar("reading DICOM", default=False)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn errors of the libraries into one without their message, and silence their warnings: they quote headers.

    Broken files raise anything from `EOFError` to `RecursionError`, when they are opened and when a value is read.

    Raises:
        UnreadableImageError: ``corrupt``.
    """
    for library in ("pydicom", "nibabel.global"):
        logger = logging.getLogger(library)
        if _not_reading not in logger.filters:
            logger.addFilter(_not_reading)
    token = _READING.set(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnreadableImageError:
        raise
    except Exception as error:
        raise UnreadableImageError("corrupt", f"{name} cannot be decoded ({type(error).__name__})") from None
    finally:
        _READING.reset(token)


def _not_reading(record: logging.LogRecord) -> bool:
    return not _READING.get()
