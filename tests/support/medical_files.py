"""DICOM and NIfTI files for tests: those that pydicom brings, and small ones made here."""

import io
from pathlib import Path

import numpy as np
import pydicom
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from mmkd.curation.rules import read_rules
from mmkd.curation.stream import curate
from mmkd.data.table import map_table

CT, MR = "CT_small.dcm", "MR_small.dcm"
SECRETS = (b"SECRET", b"1.2.826.0.7", b"DOE", b"CompressedSamples")  # of headers and names of files
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"


def sample(name):
    """The bytes of a file that comes with pydicom."""
    return Path(get_testdata_file(name, download=False)).read_bytes()


def changed(name, *removed, **values):
    """The bytes of one of pydicom's files with other elements."""
    dataset = pydicom.dcmread(io.BytesIO(sample(name)))
    for element in removed:
        delattr(dataset, element)
    for element, value in values.items():
        setattr(dataset, element, value)
    return encoded(dataset)


def encoded(dataset):
    """A dataset as a file."""
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dicom(pixels, **values):
    """A DICOM file of grey or RGB values: (rows, columns), (frames, rows, columns) or (rows, columns, 3)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = CT_IMAGE, "1.2.3.4"
    color = pixels.ndim == 3 and pixels.shape[-1] == 3
    dataset.SamplesPerPixel = 3 if color else 1
    dataset.PhotometricInterpretation = "RGB" if color else "MONOCHROME2"
    if color:
        dataset.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.Rows, dataset.Columns = pixels.shape[:2] if color else pixels.shape[-2:]
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.Modality, dataset.PatientID, dataset.StudyInstanceUID = "CT", "SECRET-7", "1.2.826.0.7"
    dataset.PixelData = pixels.tobytes()
    for element, value in values.items():
        setattr(dataset, element, value)
    return encoded(dataset)


def nifti(values, affine=None, compressed=False):
    """A NIfTI file of voxels (right, front, up) unless the affine turns them."""
    import gzip

    import nibabel

    data = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine).to_bytes()
    return gzip.compress(data) if compressed else data


def write(folder, files):
    """Write files by name below a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def run(source, output, preset="list", **options):
    """Curate; the report and the rows of the manifest."""
    more = {name: options.pop(name) for name in ("table", "salt", "tasks", "columns") if name in options}
    report = curate(str(source), output, read_rules(preset, **options), quiet=True, **more)
    rows = map_table(output / "manifest.arrow").to_pylist()
    return report, rows
