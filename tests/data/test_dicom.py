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
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

from model.data.dicom import IDENTIFIERS, PLACE, DicomFrames, first_line, open_dicom
from model.data.image_io import ReadLimits, read_image, read_mask
from model.errors import MedPLIBError


def shipped(name: str) -> bytes:
    """One of the files in pydicom's own package."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    with open(path, "rb") as stream:  # noqa: PTH123 - pydicom gives a plain string
        return stream.read()


def frames(content: bytes, **limits: int) -> DicomFrames:
    return open_dicom(content, "scan.dcm", limits.get("max_pixels", 1_000_000), limits.get("max_frames", 100))


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
    """An enhanced MR image whose frames differ in rescaling and window, given by functional groups."""
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
        own.PixelValueTransformationSequence = [element(RescaleSlope=1 + number, RescaleIntercept=0, RescaleType="US")]
        own.FrameVOILUTSequence = [element(WindowCenter=30, WindowWidth=40 + number)]
        own.FrameContentSequence = [element(FrameComments="seen by Dr Secret")]
        data.PerFrameFunctionalGroupsSequence.append(own)
    return data


def element(**values: Any) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


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


def test_frames_use_their_functional_groups() -> None:
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


def test_one_frame_with_functional_groups_is_one_image() -> None:
    opened = frames(written(slices(1)))
    image = read_image(written(slices(1)))
    assert (image.spacing_mm, opened.window, opened.place(0) is not None) == ((0.5, 0.25), (30.0, 40.0), True)
    assert np.array_equal(image.pixels, opened.frame(0))
    own = slices(1)
    shared = own.SharedFunctionalGroupsSequence[0]
    for keyword in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
        shared[keyword] = own.PerFrameFunctionalGroupsSequence[0].pop(keyword)
    assert np.array_equal(read_image(written(own)).pixels, image.pixels)


def grey(values: np.ndarray, raw: dict[str, tuple[str, Any]] | None = None, **tags: Any) -> bytes:
    """One frame of explicit little-endian values; ``raw`` elements have a VR and bytes or a value of their own."""
    data = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.Rows, data.Columns = values.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * values.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(values.dtype.kind == "i")
    pixels = {("f", 4): "FloatPixelData", ("f", 8): "DoubleFloatPixelData"}
    setattr(data, pixels.get((values.dtype.kind, values.dtype.itemsize), "PixelData"), values.tobytes())
    for keyword, value in tags.items():
        setattr(data, keyword, value)
    for keyword, (vr, content) in (raw or {}).items():
        tag = Tag(keyword)
        if isinstance(content, bytes):
            content += b" " * (len(content) % 2)
            data[tag] = RawDataElement(tag, vr, len(content), content, 0, False, True, True)
        else:
            data.add_new(tag, vr, content)
    return written(data)


RAMP = np.tile(np.linspace(0, 1000, 32), (16, 1))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("dtype", "stored", "raw"),
    [
        ("<u2", 32767, {"PixelPaddingValue": ("US", 32767)}),
        ("<u2", 0, {"PixelPaddingValue": ("US", 0)}),
        ("<u2", 63536, {"PixelPaddingValue": ("SS", -2000)}),
        ("<i2", -2000, {"PixelPaddingValue": ("SS", -2000)}),
        ("<i2", -2000, {"PixelPaddingValue": ("US", 63536)}),
        ("<i2", -1500, {"PixelPaddingValue": ("SS", -2000), "PixelPaddingRangeLimit": ("US", 64536)}),
        ("<i2", 3000, {"PixelPaddingValue": ("SS", 3100), "PixelPaddingRangeLimit": ("SS", 2900)}),
        ("<f4", -9.5, {"FloatPixelPaddingValue": ("FL", -9.5)}),
        ("<f8", 1e9, {"DoubleFloatPixelPaddingValue": ("FD", 1e8), "DoubleFloatPixelPaddingRangeLimit": ("FD", 1e10)}),
    ],
)
def test_padding_is_black_and_left_out_of_the_range(dtype: str, stored: float, raw: Any, photometric: str) -> None:
    values = (RAMP + 100).astype(dtype)
    values[:4] = stored
    for window in ({}, {"WindowCenter": 600, "WindowWidth": 1001}):
        opened = frames(grey(values, raw, PhotometricInterpretation=photometric, **window))
        shown = opened.frame(0)[:, :, 0]
        assert shown[:4].max() == 0
        assert sorted((shown[8, 0], shown[8, -1])) == [0, 255]
        assert opened.window == (600.0, 1001.0 if window else 1000.0)


@pytest.mark.parametrize(
    ("centre", "width", "expected", "noted"),
    [
        (b"40\\600", b"400\\1600", (40, 400), False),
        (b"\\600", b"\\1600", (600, 1600), True),
        (b"40,5", b"400,0", (40.5, 400), True),
        (b"[40]", b"[400]", (40, 400), True),
        (b"[40, 600]", b"[400, 1600]", (40, 400), True),
        (b" 40 ", b" 400 ", (40, 400), False),
        (b"40\\600", b"400", (40, 400), False),
        (b"NaN\\600", b"NaN\\1600", (600, 1600), True),
        (b"40\\600", b"0\\1600", (600, 1600), True),
        (b"40", b"-5", None, True),
        (b"40", b"0", None, True),
        (b"inf", b"1", None, True),
        (b"40", b"", None, True),
        (b"wide", b"open", None, True),
        (b"", b"", None, False),
        (b"40", b"1", (40, 1), False),
        (b"40", b"0.5", (40, 0.5), False),
    ],
)
def test_windows_are_mended_or_replaced_by_the_range(
    centre: bytes, width: bytes, expected: tuple[float, float] | None, noted: bool
) -> None:
    values = (RAMP * 2).astype("<i2")
    raw = {"WindowCenter": ("DS", centre), "WindowWidth": ("DS", width)}
    data = read_image(grey(values, raw, RescaleSlope=1, RescaleIntercept=-1000))
    units = values - 1000.0
    if expected is None:
        share = (units + 1000) / 2000
    elif expected[1] > 1:
        share = (units - (expected[0] - 0.5)) / (expected[1] - 1) + 0.5
    else:
        share = units > 39.5 if expected[1] == 1 else (units - 40) / 0.5 + 0.5
    assert np.abs(data.pixels[:, :, 0] - np.clip(share, 0, 1) * 255).max() <= 1
    assert any("WindowWidth" in note for note in data.notes) == noted
    assert "wide" not in str(data.notes)


def test_other_header_fields_are_mended_and_named() -> None:
    values = RAMP.astype("<u2")
    shown = read_image(grey(values)).pixels
    for raw, field in (
        ({"RescaleSlope": ("DS", b"0"), "RescaleIntercept": ("DS", b"-5")}, "RescaleSlope"),
        ({"RescaleSlope": ("DS", b"1,5"), "RescaleIntercept": ("DS", b"x")}, "RescaleIntercept"),
        ({"PixelSpacing": ("DS", b"0\\1")}, "PixelSpacing"),
    ):
        data = read_image(grey(values, raw))
        assert np.abs(data.pixels.astype(int) - shown).max() <= 1
        assert (any(field in note for note in data.notes), data.spacing_mm) == (True, None)
    assert read_image(grey(values, {"PixelSpacing": ("DS", b"0,5\\0,25")})).spacing_mm == (0.5, 0.25)
    window = {"WindowCenter": 500, "WindowWidth": 400}
    odd = read_image(grey(values, VOILUTFunction="CUBIC", **window))
    assert np.array_equal(odd.pixels, read_image(grey(values, **window)).pixels)
    assert "VOILUTFunction" in odd.notes[0]
    assert read_image(grey(values, VOILUTFunction="linear exact", **window)).notes == ()


def table(keyword: str, descriptor: tuple[str, Any], data: Any) -> Any:
    """A look-up table sequence whose elements have the VR given."""
    item = Dataset()
    item.add_new("LUTDescriptor", *descriptor)
    item.add_new("LUTData", *data)
    return {keyword: [item]}


DOWN = np.arange(255, -1, -1, dtype=np.uint8)


@pytest.mark.parametrize(
    ("descriptor", "data", "noted"),
    [
        (("US", [256, 0, 8]), ("OW", DOWN.astype("<u2").tobytes()), False),
        (("US", [256, 0, 8]), ("OW", DOWN.tobytes()), False),  # two entries a word
        (("US", [256, 0, 8]), ("US", DOWN.view("<u2").tolist()), False),
        (("US", [256, 0, 16]), ("US", (DOWN.astype(int) * 257).tolist()), False),
        (("US", [256, 0, 8]), ("US", (DOWN.astype(int) * 257).tolist()), True),  # more bits than it says
        (("US", [0, 0, 8]), ("OW", np.pad(DOWN, (0, 65280)).astype("<u2").tobytes()), False),  # 0 means 65536
        (("US", [300, 0, 8]), ("OW", np.append(DOWN, [0, 0]).astype("<u2").tobytes()), True),  # fewer than it says
        (("US", [256, 0]), ("OW", DOWN.astype("<u2").tobytes()), None),
    ],
)
@pytest.mark.parametrize("keyword", ["VOILUTSequence", "ModalityLUTSequence"])
def test_look_up_tables_with_odd_descriptors(keyword: str, descriptor: Any, data: Any, noted: bool | None) -> None:
    values = np.tile(np.arange(256, dtype="<u2"), (2, 1))
    image = read_image(grey(values, **table(keyword, descriptor, data)))
    assert np.array_equal(image.pixels[0, :, 0], DOWN if noted is not None else values[0])
    assert any(keyword in note for note in image.notes) == (noted is not False)


def test_first_value_of_a_table_is_signed_as_the_values() -> None:
    values = np.tile(np.arange(-128, 128, dtype="<i2"), (2, 1))
    for first in (-128, 65408):
        vr = "SS" if first < 0 else "US"
        for keyword in ("VOILUTSequence", "ModalityLUTSequence"):
            content = grey(values, **table(keyword, (vr, [256, first, 8]), ("OW", DOWN.astype("<u2").tobytes())))
            assert np.array_equal(read_image(content).pixels[0, :, 0], DOWN)


def test_overlays_and_unused_bits_are_not_pixels() -> None:
    plain = (RAMP * 4).astype("<u2")
    shown = read_image(grey(plain, BitsStored=12, HighBit=11)).pixels
    burnt = plain | np.where(np.arange(32) % 3, 0, 0xF000).astype("<u2")
    group = {f"6000{element}": value for element, value in (("3000", ("OW", b"\xff" * 64)), ("0102", ("US", 0)))}
    for content in (grey(burnt, BitsStored=12, HighBit=11), grey(plain, group, BitsStored=12, HighBit=11)):
        assert np.array_equal(read_image(content).pixels, shown)
    assert np.array_equal(read_image(grey((plain << 4) | 5, BitsStored=12, HighBit=15)).pixels, shown)
    signed = (RAMP * 2 - 1000).astype("<i2")
    expected = read_image(grey(signed)).pixels
    assert np.array_equal(read_image(grey(signed << 4, BitsStored=12, HighBit=15)).pixels, expected)


def test_frames_without_a_finite_value_are_refused() -> None:
    with pytest.raises(MedPLIBError, match="NaN or infinity in every pixel"):
        read_image(grey(np.full((4, 4), np.nan, "<f4"), WindowCenter=1, WindowWidth=2))
    half = np.where(RAMP > 500, np.nan, RAMP).astype("<f4")
    assert read_image(grey(half)).pixels[0, [0, -1], 0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm"),
        ("SC_rgb_gdcm_KY.dcm", "SC_rgb_rle.dcm"),
    ],
)
def test_lossless_syntaxes_show_the_same_or_name_the_extra(
    name: str, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gdcm")
    pytest.importorskip("pylibjpeg")
    assert np.array_equal(read_image(shipped(name)).pixels, read_image(shipped(plain)).pixels)
    monkeypatch.setattr("pydicom.pixels.pixel_array", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("model.data.dicom.find_spec", lambda _: None)
    with pytest.raises(MedPLIBError, match=r"install the extra \(pip install 'medplib\[dicom\]'\)"):
        read_image(shipped(name))


def test_nothing_of_the_header_is_kept_but_what_is_named() -> None:
    private = slices()
    private.PatientBirthDate, private.InstitutionName = "19700101", "Secret Hospital"
    private.private_block(0x0011, "Secret vendor", create=True).add_new(1, "LO", "Secret note")
    for opened in (frames(written(private)), frames(shipped("CT_small.dcm"))):
        text = f"{opened._data}\n{opened.reference()}"
        for secret in ("Secret", "CompressedSamples", "19700101", "JFK IMAGING"):
            assert secret not in text
        allowed = {*IDENTIFIERS, *PLACE, "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"}
        allowed |= {"PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence"}
        assert {item.keyword for item in opened.reference().iterall()} <= allowed
    assert frames(shipped("CT_small.dcm")).reference().PatientID == "1CT1"


def lying_jpeg() -> bytes:
    """A compressed frame that is larger than the header says."""
    encoded = io.BytesIO()
    Image.new("L", (640, 480)).save(encoded, "JPEG")
    return compressed(encoded.getvalue())


LOSSLESS = b"\xff\xd8\xff\xc3\x00\x0b\x08" + struct.pack(">HH", 9000, 8000) + b"\x01\x01\x11\x00"


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
    """A compressed frame whose last scan is sent again and again."""
    encoded = io.BytesIO()
    Image.new("L", (64, 64)).save(encoded, "JPEG", progressive=True)
    jpeg = encoded.getvalue()
    scan = jpeg[jpeg.rfind(b"\xff\xda") : -2]
    return compressed(jpeg[:-2] + scan * 100 + jpeg[-2:])


def refused() -> dict[str, tuple[Callable[[], bytes], str]]:
    small = shipped("MR_small.dcm")
    return {
        "frames that are not there": (lambda: altered("MR_small.dcm", NumberOfFrames=50), "header, with 50 frames"),
        "compressed frames that are not there": (lambda: film_of(90), "has 90 frames by its header but holds 30"),
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
        "a frame larger than its header": (lying_jpeg, "480 × 640"),
        "a lossless frame larger than its header": (lambda: compressed(LOSSLESS + bytes(99)), "9000 × 8000"),
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
    assert read_image(shipped("image_dfl.dcm")).size == (512, 512)


def test_sentences_do_not_quote_what_a_damaged_header_holds() -> None:
    window = b"\x28\x00\x50\x10DS\x04\x00"
    content = shipped("MR_small.dcm")
    start = content.index(window) + len(window)
    notes = " ".join(read_image(content[:start] + b"Doe^" + content[start + 4 :]).notes)
    assert "WindowCenter" in notes
    assert "Doe" not in notes
    for read in (frames, read_image):
        with pytest.raises(MedPLIBError, match="holds no DICOM image;") as raised:
            read(altered("MR_small.dcm", Modality="MR Doe^", PixelData=None))
        assert "Doe" not in str(raised.value)


def test_long_reasons_are_cut_between_words() -> None:
    assert first_line(ValueError("The number of " + "very " * 40 + "long values 'Doe'\nis odd")).endswith("very …")


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


HOUNSFIELD = np.array([[0, 924, 1024], [1064, 1104, 3000]], dtype=np.int16)


def test_dicom_window_comes_from_the_file() -> None:
    window = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": [40, 500], "WindowWidth": [401, 2000]}
    pixels = read_image(grey(HOUNSFIELD, **window)).pixels[:, :, 0]
    values = HOUNSFIELD.astype(float) - 1024
    expected = np.clip((values - 39.5) / 400 + 0.5, 0, 1) * 255
    assert np.abs(pixels - expected).max() <= 0.5
    inverted = read_image(grey(HOUNSFIELD, **window, PhotometricInterpretation="MONOCHROME1")).pixels[:, :, 0]
    assert np.array_equal(inverted, 255 - pixels)
    exact = read_image(grey(HOUNSFIELD, **window, VOILUTFunction="LINEAR_EXACT")).pixels[:, :, 0]
    assert np.abs(exact - np.clip((values - 40) / 401 + 0.5, 0, 1) * 255).max() <= 0.5
    sigmoid = read_image(grey(HOUNSFIELD, **window, VOILUTFunction="SIGMOID")).pixels[:, :, 0]
    assert np.abs(sigmoid - 255 / (1 + np.exp(-4 * (values - 40) / 401))).max() <= 0.5


@pytest.mark.parametrize(
    ("name", "size", "spacing"),
    [
        ("CT_small.dcm", (128, 128), (0.661468, 0.661468)),
        ("MR_small_bigendian.dcm", (64, 64), (0.3125, 0.3125)),
        ("MR_small_RLE.dcm", (64, 64), (0.3125, 0.3125)),
        ("SC_rgb_rle_16bit.dcm", (100, 100), (1.0, 1.0)),
        ("SC_ybr_full_422_uncompressed.dcm", (100, 100), (1.0, 1.0)),
        ("examples_palette.dcm", (350, 800), None),
    ],
)
def test_real_dicom_files(name: str, size: tuple[int, int], spacing: tuple[float, float] | None) -> None:
    data = read_image(shipped(name))
    assert (data.size, data.spacing_mm) == (size, spacing)
    assert data.pixels.max() > 200
    assert data.pixels.std() > 10


def test_the_same_dicom_in_other_encodings_shows_the_same() -> None:
    one, other = (read_image(shipped(f"MR_small{form}.dcm")).pixels for form in ("", "_RLE"))
    assert np.array_equal(one, other)
    eight, sixteen = (read_image(shipped(f"SC_rgb_rle{form}.dcm")).pixels for form in ("", "_16bit"))
    assert np.abs(eight.astype(int) - sixteen).max() <= 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("examples_ybr_color.dcm", "holds 30 frames"),
        ("rtplan.dcm", "holds no DICOM image (modality RTPLAN)"),
        ("MR_truncated.dcm", "cut short"),
        ("JPEG-lossy.dcm", "compressed as JPEG Extended"),
    ],
)
def test_dicom_files_that_are_no_single_picture_are_refused(name: str, expected: str) -> None:
    with pytest.raises(MedPLIBError) as caught:
        read_image(shipped(name))
    assert expected in str(caught.value)


def test_dicom_limits_and_masks() -> None:
    with pytest.raises(MedPLIBError, match="more than the limit"):
        read_image(shipped("CT_small.dcm"), ReadLimits(max_pixels=1000))
    with pytest.raises(MedPLIBError, match="a mask is a PNG"):
        read_mask(shipped("CT_small.dcm"))
