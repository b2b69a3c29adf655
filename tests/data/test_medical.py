"""DICOM and NIfTI: values by hand or by pydicom, every form of bad file a named reason, nothing of a header kept."""

import io
import logging
import sys
import warnings
import zlib

import numpy as np
import pydicom
import pytest
from medical_files import CT, MR, changed, dicom, encoded, nifti, sample
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLosslessSV1, RLELossless

from mmkd.data.images import open_image
from mmkd.data.medical import count_frames, dicom_values
from mmkd.data.pixel_rules import (
    HOUNSFIELD_WINDOWS,
    REASONS,
    UnreadableImageError,
    Window,
    form_of,
    window_by_percentiles,
)
from mmkd.data.pixels import read_pixels

RAMP = np.arange(400, dtype=np.int16).reshape(20, 20) * 10 - 2000


def pixels(data, **window):
    image = open_image(data, minimum_side=1, window=Window(**window))
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(data, **window):
    values = pixels(data, **window)
    assert (values == values[..., :1]).all()
    return values[..., 0].astype(int)


def reason_of(data, name=None, tmp_path=None, **options):
    source = data
    if name:
        source = tmp_path / name
        source.write_bytes(data)
    with pytest.raises(UnreadableImageError) as caught:
        open_image(source, **options)
    assert caught.value.reason in REASONS
    assert "SECRET" not in str(caught.value) and str(source if name else "image") in str(caught.value)
    return caught.value.reason


def test_ct_in_hounsfield_windows_by_hand():
    data = dicom(RAMP, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=0, WindowWidth=1)
    values = RAMP * 2.0 - 100
    for preset, (center, width) in HOUNSFIELD_WINDOWS.items():
        expected = np.clip((values - center + width / 2) / width, 0, 1) * 255
        assert np.abs(grey(data, preset=preset) - expected).max() <= 0.5
    three = pixels(data, preset="three")
    for channel, preset in enumerate(("lung", "soft", "bone")):
        assert (three[..., channel] == grey(data, preset=preset)).all()


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("window", [(40, 400), ([-600, 40], [1500, 400])])
def test_auto_is_the_file_s_own_window_as_pydicom_applies_it(function, window):
    center, width = window
    values = {"WindowCenter": center, "WindowWidth": width, "VOILUTFunction": function}
    data = dicom(RAMP, RescaleSlope=1, RescaleIntercept=-24, **values)
    dataset = pydicom.dcmread(io.BytesIO(data))
    shown = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    low, high = -(2**15) - 24, 2**15 - 1 - 24
    assert np.abs(grey(data) - (shown - low) / (high - low) * 255).max() <= 0.501


def test_a_lookup_table_of_the_file_is_applied():
    dataset = pydicom.dcmread(io.BytesIO(dicom(np.arange(64, dtype=np.uint16).reshape(8, 8))))
    item = Dataset()
    item.LUTDescriptor = [64, 0, 8]
    item.LUTData = [255 - 3 * k for k in range(64)]
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    dataset.VOILUTSequence = [item]
    for values in ({}, {"RescaleSlope": 1, "RescaleIntercept": 0}):
        for element, value in values.items():
            setattr(dataset, element, value)
        assert (grey(encoded(dataset)).ravel() == 255 - 3 * np.arange(64)).all()


def test_percentiles_where_the_file_has_no_window_and_for_mr():
    stored = pydicom.dcmread(io.BytesIO(sample(MR))).pixel_array
    assert (grey(sample(MR)) == window_by_percentiles(stored)).all()  # though it states a window
    assert (grey(changed(MR, Modality="MR", WindowWidth=3), preset="bone") == window_by_percentiles(stored)).all()
    for width in (0, 1, None):
        data = dicom(RAMP, WindowCenter=0, WindowWidth=width)
        assert (grey(data) == window_by_percentiles(RAMP)).all()
    padded = RAMP.copy()
    padded[:10] = -32768
    assert (grey(dicom(padded, PixelPaddingValue=-32768))[10:] == window_by_percentiles(RAMP[10:])).all()


def test_monochrome1_is_inverted():
    for preset in ("auto", "soft"):
        plain, inverted = dicom(RAMP), dicom(RAMP, PhotometricInterpretation="MONOCHROME1")
        assert (grey(inverted, preset=preset) == 255 - grey(plain, preset=preset)).all()


def test_colors():
    rng = np.random.default_rng(0)
    color = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
    assert (pixels(dicom(color)) == color).all()
    assert (pixels(dicom(color.astype(np.uint16) << 8)) == color).all()
    ybr = pydicom.dcmread(io.BytesIO(sample("SC_ybr_full_422_uncompressed.dcm")))
    assert (pixels(sample("SC_ybr_full_422_uncompressed.dcm")) == pydicom.pixels.pixel_array(ybr)).all()
    palette = pixels(sample("examples_palette.dcm"))
    assert (palette.max(axis=2) - palette.min(axis=2)).max() > 50


@pytest.mark.parametrize(
    "name", ["MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_bigendian.dcm"]
)
def test_transfer_syntaxes_give_the_same_pixels(name):
    assert (pixels(sample(name)) == pixels(sample(MR))).all()


def test_frames(tmp_path):
    stack = np.stack([np.full((12, 12), 10 * k, np.uint8) for k in range(5)])
    stack[:, 0, 0], stack[:, 0, 1] = 0, 255
    data = dicom(stack, WindowCenter=128, WindowWidth=256)
    assert count_frames(data, "x") == 5 and count_frames(sample(CT), "x") == 1
    own = [grey(data, frame=number)[5, 5] for number in range(1, 6)]
    assert own == [0, 10, 20, 30, 40] and grey(data)[5, 5] == own[2]
    assert reason_of(data, window=Window(frame=6)) == "no_frame"


def test_an_enhanced_file_has_windows_by_frame():
    dataset = pydicom.dcmread(io.BytesIO(dicom(np.stack([RAMP, RAMP]))))

    def group(**macros):
        item = Dataset()
        for macro, values in macros.items():
            inner = Dataset()
            for element, value in values.items():
                setattr(inner, element, value)
            setattr(item, macro, [inner])
        return item

    scale = {"RescaleSlope": 2, "RescaleIntercept": 5}
    dataset.SharedFunctionalGroupsSequence = [group(PixelValueTransformationSequence=scale)]
    windows = [{"WindowCenter": 0, "WindowWidth": 1000}, {"WindowCenter": 500, "WindowWidth": 300}]
    dataset.PerFrameFunctionalGroupsSequence = [group(FrameVOILUTSequence=window) for window in windows]
    for number, window in enumerate(windows, start=1):
        plain = dicom(RAMP, **scale, **window)
        assert (grey(encoded(dataset), frame=number) == grey(plain)).all()


def test_dicom_is_recognised_by_content_and_by_suffix(tmp_path):
    assert form_of(sample(CT)) == "dicom" == form_of(sample(CT)[132:], "slice.DCM")
    without_preamble = sample(CT)[132:]
    for suffix in ("dcm", "ima", "dicom"):
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(without_preamble)
        assert (np.asarray(open_image(path)) == pixels(sample(CT))).all()
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, "PNG")
    marked = buffer.getvalue()[:33].ljust(128, b"\0") + b"DICM"
    assert form_of(marked) == form_of(buffer.getvalue(), "lies.dcm") == ""


def test_dicom_that_has_no_image_or_a_broken_one(tmp_path):
    for name in ("rtstruct.dcm", "test-SR.dcm", "rtplan_truncated.dcm", "waveform_ecg.dcm"):
        assert reason_of(sample(name), name, tmp_path) == "no_pixels"
    assert reason_of(sample("MR_truncated.dcm")) == "corrupt"
    assert reason_of(sample(CT)[:3000]) in ("corrupt", "no_pixels")
    assert reason_of(sample(CT)[:200]) in ("corrupt", "no_pixels")
    assert reason_of(b"no dicom at all, but named so", "x.dcm", tmp_path) == "corrupt"
    assert reason_of(b"", "x.dcm", tmp_path) == "corrupt"
    for element in ("Rows", "BitsAllocated", "PixelRepresentation"):
        assert reason_of(changed(CT, element)) in ("corrupt", "no_pixels")


def test_encrypted_files(tmp_path):
    secured = b"\x30\x82\x10\x00\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x03" + bytes(100)
    assert reason_of(secured, "x.dcm", tmp_path) == "encrypted"
    item = Dataset()
    item.EncryptedContentTransferSyntaxUID, item.EncryptedContent = "1.2.840.10008.1.2", b"1234"
    assert reason_of(changed(CT, "PixelData", EncryptedAttributesSequence=[item])) == "encrypted"
    assert grey(changed(CT, EncryptedAttributesSequence=[item])).any()  # de-identified, its pixels are plain


def test_a_syntax_without_decoder_and_missing_libraries(monkeypatch):
    assert reason_of(sample("SC_rgb_jpeg_gdcm.dcm")) == "no_decoder"
    dataset = pydicom.dcmread(io.BytesIO(sample(CT)))
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
    dataset.PixelData = encapsulate([b"\0" * 64])
    assert reason_of(encoded(dataset)) == "no_decoder"
    assert JPEGLosslessSV1 == pydicom.dcmread(io.BytesIO(sample("SC_rgb_jpeg_gdcm.dcm"))).file_meta.TransferSyntaxUID
    ct, volume_file = sample(CT), nifti(volume())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    for data in (ct, volume_file):
        with pytest.raises(UnreadableImageError, match=r'pip install -e "\.\[dicom\]"') as caught:
            open_image(data)
        assert caught.value.reason == "no_decoder"


def test_bombs_are_refused_before_they_are_decoded():
    small = np.zeros((20, 20), np.uint8)
    assert reason_of(dicom(small, Rows=60_000, Columns=60_000)) == "too_large"
    assert reason_of(dicom(small, Rows=8, Columns=4_000)) == "too_narrow"
    assert reason_of(dicom(small, NumberOfFrames=2_000_000_000)) == "too_large"
    assert reason_of(dicom(small, NumberOfFrames=60_000)) == "corrupt"
    coded = pydicom.dcmread(io.BytesIO(sample("MR_small_jp2klossless.dcm")))
    frame = bytearray(pydicom.encaps.get_frame(coded.PixelData, 0, number_of_frames=1))
    start = frame.find(b"\xff\x4f\xff\x51")
    frame[start + 8 : start + 16] = (60_000).to_bytes(4, "big") * 2
    coded.PixelData = encapsulate([bytes(frame)])
    assert coded.file_meta.TransferSyntaxUID == JPEG2000Lossless
    assert reason_of(encoded(coded)) == "corrupt"
    picture = io.BytesIO()
    Image.new("L", (5000, 5000)).save(picture, "JPEG")
    jpeg = pydicom.dcmread(io.BytesIO(sample("SC_rgb_jpeg_dcmtk.dcm")))
    jpeg.PixelData = encapsulate([picture.getvalue()])
    assert reason_of(encoded(jpeg)) == "corrupt"


def test_a_header_that_fills_the_memory_is_refused(monkeypatch):
    dataset = pydicom.dcmread(io.BytesIO(sample("image_dfl.dcm")))
    assert dataset.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    assert pixels(sample("image_dfl.dcm")).any()
    monkeypatch.setattr("mmkd.data.medical.MAX_FILE_BYTES", 100_000)
    assert reason_of(sample("image_dfl.dcm")) == "too_large"
    assert reason_of(nifti(np.zeros((60, 60, 60), np.int16), compressed=True)) == "too_large"


def test_nothing_of_a_header_is_read_logged_or_quoted(caplog, capsys):
    values = {"PatientName": "SECRET^NAME", "AccessionNumber": "SECRET-8", "RescaleSlope": 1, "RescaleIntercept": 0}
    data = dicom(RAMP, **values)
    wrong = data.replace(b"1.2.826.0.7", b"1.2.SECRET7")
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grey(wrong)
        assert dicom_values(wrong, "x", ("StudyInstanceUID", "Modality", "PatientComments")) == {
            "StudyInstanceUID": "1.2.SECRET7", "Modality": "CT", "PatientComments": ""
        }  # fmt: skip
        reason_of(wrong.replace(b"MONOCHROME2", b"SECRET COLO"))
        reason_of(dicom(RAMP, NumberOfFrames=7))
    out = capsys.readouterr()
    assert not caught
    assert "SECRET" not in caplog.text + out.out + out.err
    logging.getLogger("pydicom").warning("of others")
    assert "of others" in caplog.text


def volume():
    """Voxels whose value names their place: right by 1, front by 100, up by 10,000."""
    right, front, up = np.meshgrid(np.arange(12), np.arange(10), np.arange(9), indexing="ij")
    return (right + 100 * front + 10_000 * up).astype(np.float32)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_nifti_slice_in_every_orientation_is_the_same(compressed, tmp_path):
    import nibabel

    values = volume()
    middle = values[:, :, 4].T[::-1, ::-1]  # the front up, the patient's right on the left
    for axes in (np.eye(3), -np.eye(3), np.eye(3)[[2, 0, 1]], np.eye(3)[[1, 0, 2]] * [1, -1, 1]):
        affine = np.eye(4)
        affine[:3, :3] = axes
        image = nibabel.Nifti1Image(values, np.eye(4))
        turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(np.eye(4)), nibabel.io_orientation(affine))
        data = nifti(np.asarray(image.as_reoriented(turn).dataobj), image.as_reoriented(turn).affine, compressed)
        assert (grey(data) == window_by_percentiles(middle)).all()
    path = tmp_path / ("brain.nii.gz" if compressed else "brain.nii")
    path.write_bytes(nifti(values, compressed=compressed))
    assert (np.asarray(open_image(path)) == np.asarray(read_pixels(path).permute(1, 2, 0))).all()
    assert (
        np.asarray(open_image(path, window=Window(frame=2)))[..., 0]
        == window_by_percentiles(values[:, :, 1].T[::-1, ::-1])
    ).all()
    hounsfield = np.clip((values[:, :, 4].T[::-1, ::-1] - 40 + 200) / 400, 0, 1) * 255
    assert np.abs(grey(nifti(values), preset="soft") - hounsfield).max() <= 0.5
    assert pixels(nifti(values), preset="three").shape == (10, 12, 3)


def test_bad_nifti():
    values = volume()
    assert reason_of(nifti(np.zeros((9, 9, 9, 1, 3), np.float32))) == "unsupported"
    assert grey(nifti(values[..., None])).shape == (10, 12)
    assert (grey(nifti(np.stack([values, 0 * values], 3))) == grey(nifti(values))).all()
    assert grey(nifti(values[:, :, 0])).shape == (10, 12)
    assert reason_of(nifti(values.astype(np.complex64))) == "unsupported"
    assert reason_of(nifti(np.full_like(values, np.nan))) == "corrupt"
    some = values.copy()
    some[0, 0] = np.nan
    assert grey(nifti(some)).max() == 255
    assert pixels(nifti(some), preset="lung").dtype == np.uint8
    assert reason_of(nifti(values)[:2000]) == "corrupt"
    assert reason_of(nifti(values, compressed=True)[:-60]) in ("corrupt", "unsupported")
    assert reason_of(nifti(values), window=Window(frame=10)) == "no_frame"
    assert reason_of(nifti(np.zeros((4, 20, 3), np.float32))) == "too_small"
    broken = bytearray(nifti(values))
    broken[70:72] = b"\x99\x99"  # a type of voxels that there is not
    assert reason_of(bytes(broken)) == "corrupt"
    assert form_of(zlib.compress(b"x" * 999)) == form_of(b"\x1f\x8b garbage") == ""


def test_windows_that_do_not_exist():
    with pytest.raises(ValueError, match="window is 'liver'; allowed: auto, lung"):
        Window("liver")
    with pytest.raises(ValueError, match="frame is -1"):
        Window(frame=-1)


def test_rle_with_several_frames():
    assert pydicom.dcmread(io.BytesIO(sample("SC_rgb_rle_2frame.dcm"))).file_meta.TransferSyntaxUID == RLELossless
    first, second = (pixels(sample("SC_rgb_rle_2frame.dcm"), frame=number) for number in (1, 2))
    assert (first != second).any()


@pytest.mark.parametrize(
    "name",
    [CT, "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_dcmtk.dcm"],
)
def test_damaged_bytes_anywhere_give_an_image_or_a_reason(name):
    data, rng = sample(name), np.random.default_rng(0)
    for number in range(60):
        damaged = bytearray(data)
        for place in rng.integers(len(data) if number % 2 else 2000, size=4).tolist():
            damaged[place] = int(rng.integers(256))
        try:
            assert open_image(bytes(damaged)).mode == "RGB"
        except UnreadableImageError as error:
            assert error.reason in REASONS
