"""DICOM in curation: patient and study as salted hashes, modality by name, images with burned-in text left out.

A header is read for the six elements of `HEADER` and one to join reports by; none of their values is kept. Patient and
study become keyed hashes (HMAC-SHA-256). The key is a file that stays secret, so that nobody can hash all record
numbers of a hospital and compare; by default the source's first file, which is not part of the pairs.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmkd.data.medical import dicom_values

HEADER = ("PatientID", "StudyInstanceUID", "Modality", "BurnedInAnnotation", "ImageType", "SOPClassUID")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SCREEN = "SCREEN SAVE"
DIGITS = 24
SALT_BYTES = 1 << 20
HashKind = Literal["patient", "study", "join", "file"]

MODALITIES = {
    "CT": "CT", "MR": "MRI", "CR": "X-ray", "DX": "X-ray", "IO": "intraoral X-ray", "PX": "panoramic X-ray",
    "MG": "mammography", "RF": "fluoroscopy", "XA": "X-ray angiography", "US": "ultrasound", "IVUS": "ultrasound",
    "PT": "PET", "NM": "nuclear medicine", "OP": "ophthalmic photography", "OPT": "optical coherence tomography",
    "IVOCT": "optical coherence tomography", "ES": "endoscopy", "GM": "microscopy", "SM": "slide microscopy",
    "XC": "photography", "DMS": "dermoscopy", "BMD": "bone densitometry",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """What curation keeps of a DICOM header.

    Attributes:
        patient: hash of the patient, of the study where the file names no patient, else empty.
        study: hash of the study; empty where the file names none.
        modality: one of the names in `MODALITIES`; empty for all other codes.
        burned_in: the file states that its pixels show text about the patient.
        secondary_capture: a screenshot, scan or photograph of a document instead of an acquired image.
        joined: hash of the value that reports are joined by.
    """

    patient: str
    study: str
    modality: str
    burned_in: bool
    secondary_capture: bool
    joined: str


def read_header(data: bytes, name: str, salt: bytes, join: str = "") -> Header:
    """What curation uses of a DICOM header.

    Args:
        data: the bytes of the file.
        name: of the file in errors.
        salt: key of the hashes.
        join: keyword of the element that reports are joined by; empty for none.

    Raises:
        UnreadableImageError: it is no DICOM file, or broken.
    """
    values = dicom_values(data, name, (*HEADER, join) if join else HEADER)
    kind = values["SOPClassUID"]
    study = keyed_hash(salt, "study", values["StudyInstanceUID"])
    return Header(
        keyed_hash(salt, "patient", values["PatientID"]) or study,
        study,
        MODALITIES.get(values["Modality"].upper(), ""),
        values["BurnedInAnnotation"].upper() == "YES",
        kind == SECONDARY_CAPTURE or kind.startswith(f"{SECONDARY_CAPTURE}.") or SCREEN in values["ImageType"].upper(),
        keyed_hash(salt, "join", values[join]) if join else "",
    )


def read_salt(path: Path) -> bytes:
    """The key that the first mebibyte of a file gives; another than its SHA-256, which a manifest may hold.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.sha256(b"key of hashes of patients\0" + file.read(SALT_BYTES)).digest()


def keyed_hash(salt: bytes, kind: HashKind, value: str) -> str:
    """What stands for a patient, a study, a value that reports are joined by or the name of a file; empty for none."""
    if not value:
        return ""
    return hmac.new(salt, f"{kind}\0{value}".encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:DIGITS]
