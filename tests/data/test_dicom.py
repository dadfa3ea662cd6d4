"""DICOM files of one and of several frames: what is shown, what is kept of the header, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

from model.data.dicom import IDENTIFIERS, PLACE, DicomFrames, dicom_frames, read_dicom
from model.errors import MedPLIBError


def shipped(name: str) -> bytes:
    """One of the files in pydicom's own package."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    with open(path, "rb") as stream:  # noqa: PTH123 - pydicom gives a plain string
        return stream.read()


def frames(content: bytes, **limits: int) -> DicomFrames:
    return dicom_frames(content, "scan.dcm", limits.get("max_pixels", 1_000_000), limits.get("max_frames", 100))


def altered(name: str, **values: Any) -> bytes:
    """A shipped file with other header values; None takes one out."""
    data = pydicom.dcmread(io.BytesIO(shipped(name)))
    for keyword, value in values.items():
        if value is None:
            del data[keyword]
        else:
            setattr(data, keyword, value)
    return written(data)


def written(data: Any) -> bytes:
    stream = io.BytesIO()
    data.save_as(stream)
    return stream.getvalue()


def slices(count: int = 3, side: int = 8) -> FileDataset:
    """An enhanced MR image whose frames differ in rescaling and window, told by functional groups."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = (generate_uid() for _ in range(3))
    data.PatientID, data.PatientName, data.Modality = "ID 7", "Secret^Name", "MR"
    data.Rows = data.Columns = side
    data.NumberOfFrames, data.SamplesPerPixel, data.PhotometricInterpretation = count, 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    data.PixelData = np.stack([np.arange(side * side).reshape(side, side)] * count).astype("<u2").tobytes()
    shared = Dataset()
    shared.PixelMeasuresSequence = [element(PixelSpacing=[0.5, 0.25], SliceThickness=3)]
    shared.PlaneOrientationSequence = [element(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
    shared.ReferencedImageSequence = [element(ReferencedSOPInstanceUID=generate_uid())]
    data.SharedFunctionalGroupsSequence = [shared]
    data.PerFrameFunctionalGroupsSequence = []
    for number in range(count):
        own = Dataset()
        own.PlanePositionSequence = [element(ImagePositionPatient=[10, 20, 3 * number])]
        own.PixelValueTransformationSequence = [
            element(RescaleSlope=1 + number, RescaleIntercept=0, RescaleType="US"),
        ]
        own.FrameVOILUTSequence = [element(WindowCenter=30, WindowWidth=40 + number)]
        own.FrameContentSequence = [element(FrameComments="seen by Dr Secret")]
        data.PerFrameFunctionalGroupsSequence.append(own)
    return data


def element(**values: Any) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "examples_palette.dcm"]
)
def test_one_frame_looks_as_the_image_reader_shows_it(name: str) -> None:
    content = shipped(name)
    opened = frames(content)
    expected, spacing = read_dicom(content, name, 1_000_000)
    assert opened.count == 1
    assert np.array_equal(opened.frame(0), expected)
    assert (opened.spacing_mm, opened.size) == (spacing, expected.shape[:2])


def test_every_frame_of_a_film_is_decoded_by_itself() -> None:
    content = shipped("examples_ybr_color.dcm")
    opened = frames(content)
    together = pydicom.dcmread(io.BytesIO(content)).pixel_array
    assert (opened.count, opened.window) == (30, None)
    for index in (0, 7, 29):
        assert np.array_equal(opened.frame(index), together[index])
    for index in (-1, 30):
        with pytest.raises(MedPLIBError, match="frames 0 to 29"):
            opened.frame(index)


def test_a_window_replaces_the_file_s_own() -> None:
    opened = frames(shipped("CT_small.dcm"))
    stored = pydicom.dcmread(io.BytesIO(shipped("CT_small.dcm")))
    units = stored.pixel_array * float(stored.RescaleSlope) + float(stored.RescaleIntercept)
    narrow = opened.frame(0, (0.0, 2.0))[:, :, 0]
    assert (narrow[units <= -1] == 0).all()
    assert (narrow[units >= 1] == 255).all()
    centre, width = opened.window or (0.0, 0.0)  # the file has none: its range
    assert (centre - width / 2, centre + width / 2) == (units.min(), units.max())
    with_own = frames(altered("CT_small.dcm", WindowCenter=[40, 900], WindowWidth=[400, 80]))
    assert with_own.window == (40.0, 400.0)
    assert np.array_equal(with_own.frame(0), with_own.frame(0, (40.0, 400.0)))


def test_monochrome1_is_inverted_with_any_window() -> None:
    plain = frames(shipped("MR_small.dcm"))
    inverse = frames(altered("MR_small.dcm", PhotometricInterpretation="MONOCHROME1"))
    for window in (None, (500.0, 300.0)):
        assert np.array_equal(inverse.frame(0, window), 255 - plain.frame(0, window))


def test_frames_have_the_window_rescaling_and_place_of_their_functional_groups() -> None:
    opened = frames(written(slices()))
    assert (opened.window, opened.spacing_mm) == ((30.0, 40.0), (0.5, 0.25))
    stored = np.arange(64).reshape(8, 8)
    for index in range(3):
        share = (stored * (1 + index) - 29.5) / (40 + index - 1) + 0.5
        expected = (np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)
        assert np.array_equal(opened.frame(index)[:, :, 1], expected)
        place = opened.place(index)
        assert place is not None
        assert place[0].tolist() == [10, 20, 3 * index]
        assert (place[1].tolist(), place[2]) == ([[1, 0, 0], [0, 1, 0]], 3.0)


def test_nothing_of_the_header_is_kept_but_what_is_named() -> None:
    private = slices()
    private.PatientBirthDate, private.InstitutionName = "19700101", "Secret Hospital"
    private.private_block(0x0011, "Secret vendor", create=True).add_new(1, "LO", "Secret note")
    for opened in (frames(written(private)), frames(shipped("CT_small.dcm"))):
        told = f"{opened._data}\n{opened.reference()}"
        for secret in ("Secret", "CompressedSamples", "19700101", "JFK IMAGING"):
            assert secret not in told
        allowed = {*IDENTIFIERS, *PLACE, "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"}
        allowed |= {"PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence"}
        assert {item.keyword for item in opened.reference().iterall()} <= allowed
    assert frames(shipped("CT_small.dcm")).reference().PatientID == "1CT1"


def lying_jpeg() -> bytes:
    """A compressed frame that is larger than the header tells."""
    encoded = io.BytesIO()
    Image.new("L", (640, 480)).save(encoded, "JPEG")
    return compressed(encoded.getvalue())


def film_of(count: int) -> bytes:
    data = pydicom.dcmread(io.BytesIO(shipped("examples_ybr_color.dcm")))
    data.NumberOfFrames = count
    return written(data)


def compressed(jpeg: bytes) -> bytes:
    """A header of 64 × 64 pixels around a JPEG."""
    data = pydicom.dcmread(io.BytesIO(shipped("MR_small.dcm")))
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation, data.PixelData = 7, 0, encapsulate([jpeg])
    data["PixelData"].is_undefined_length = True
    return written(data)


def deflated_bomb() -> bytes:
    data = pydicom.dcmread(io.BytesIO(shipped("image_dfl.dcm")))
    assert data.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    content = shipped("image_dfl.dcm")
    start = 144 + struct.unpack("<I", content[140:144])[0]
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = deflater.compress(bytes(2**24)) + deflater.flush(zlib.Z_FULL_FLUSH)
    return content[:start] + zeros * 17


def many_scans() -> bytes:
    """A compressed frame whose last scan is told again and again."""
    encoded = io.BytesIO()
    Image.new("L", (64, 64)).save(encoded, "JPEG", progressive=True)
    jpeg = encoded.getvalue()
    scan = jpeg[jpeg.rfind(b"\xff\xda") : -2]
    return compressed(jpeg[:-2] + scan * 100 + jpeg[-2:])


def refused() -> dict[str, tuple[Callable[[], bytes], str]]:
    small = shipped("MR_small.dcm")
    return {
        "frames that are not there": (lambda: altered("MR_small.dcm", NumberOfFrames=50), "header, with 50 frames"),
        "compressed frames that are not there": (lambda: film_of(90), "tells of 90 frames but holds 30 at most"),
        "more frames than allowed": (
            lambda: altered("MR_small.dcm", NumberOfFrames=2**31 - 1),
            "more than the limit of 100",
        ),
        "more pixels than allowed": (
            lambda: altered("MR_small.dcm", Rows=60_000, Columns=60_000),
            "more than the limit",
        ),
        "no pixels": (lambda: altered("MR_small.dcm", PixelData=None), "holds no DICOM image"),
        "cut in the header": (lambda: small[:700], ""),
        "cut in the pixels": (lambda: small[:9000], "cut short"),
        "a frame larger than told": (lying_jpeg, "480 × 640"),
        "a frame of many scans": (many_scans, "a JPEG of"),
        "a deflation bomb": (deflated_bomb, "inflates to more than 256 MiB"),
        "no image at all": (lambda: shipped("rtplan.dcm"), "holds no DICOM image"),
        "no DICOM": (lambda: b"hello" * 100, ""),
        "nothing after the mark": (lambda: b"\0" * 128 + b"DICM", ""),
    }


@pytest.mark.parametrize("case", refused())
def test_lying_damaged_and_oversized_files_end_in_one_sentence(case: str) -> None:
    make, reason = refused()[case]
    content = make()
    with pytest.raises(MedPLIBError, match=reason) as raised:
        frames(content)
    assert str(raised.value).startswith("scan.dcm ")
    assert "\n" not in str(raised.value)


def test_a_deflated_file_of_reasonable_size_is_read() -> None:
    assert frames(shipped("image_dfl.dcm")).size == (512, 512)
    assert read_dicom(shipped("image_dfl.dcm"), "scan.dcm", 1_000_000)[0].shape == (512, 512, 3)


def test_sentences_do_not_quote_what_a_damaged_header_holds() -> None:
    window = b"\x28\x00\x50\x10DS\x04\x00"
    content = shipped("MR_small.dcm")
    start = content.index(window) + len(window)
    damaged = {
        "cannot be followed": content[:start] + b"Doe^" + content[start + 4 :],
        "holds no DICOM image;": altered("MR_small.dcm", Modality="MR Doe^", PixelData=None),
    }
    for reason, content in damaged.items():
        for read in (frames, lambda content: read_dicom(content, "scan.dcm", 1_000_000)):
            with pytest.raises(MedPLIBError, match=reason) as raised:
                read(content)
            assert "Doe" not in str(raised.value)


def test_long_reasons_are_cut_between_words() -> None:
    with pytest.raises(MedPLIBError, match="The number of bytes of pixel data") as raised:
        read_dicom(shipped("MR_truncated.dcm"), "scan.dcm", 1_000_000)
    assert " …)" in str(raised.value)


def test_no_cut_makes_anything_but_a_sentence() -> None:
    content = written(slices())
    rng = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(content)
        for place in rng.integers(132, len(content), 6):
            damaged[place] = rng.integers(256)
        try:
            opened = frames(bytes(damaged[: rng.integers(200, len(content) + 1)]))
            for index in range(opened.count):
                assert opened.frame(index).dtype == np.uint8
                opened.place(index)
        except MedPLIBError as error:
            assert "\n" not in str(error)
