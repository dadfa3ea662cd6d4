"""NIfTI files: read within limits, whatever their header tells, and written in the same geometry."""

from __future__ import annotations

import gzip
import io
import tracemalloc
from typing import Any

import nibabel
import numpy as np
import pytest

from model.data.image_io import file_kind
from model.data.voxels import MAX_VOLUME_BYTES, read_nifti, write_nifti
from model.errors import MedPLIBError

RNG = np.random.default_rng(0)
OBLIQUE = np.array([[0.0, 0.1, -3.0, 11], [-0.9, 0.05, 0.2, -7], [0.02, 1.1, 0.1, 5], [0, 0, 0, 1]])


def image(values: np.ndarray, affine: np.ndarray = OBLIQUE, kind: Any = nibabel.Nifti1Image) -> Any:
    return kind(values, affine)


def changed(content: bytes, field: str, value: Any, kind: Any = nibabel.Nifti1Header) -> bytes:
    """The same file with another header field."""
    size = kind.sizeof_hdr
    header = kind(content[:size])
    header[field] = value
    return header.binaryblock + content[size:]


def opened(content: bytes) -> Any:
    return read_nifti(content, "scan.nii", 1_000_000)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_values_are_those_of_nibabel(dtype: Any, kind: Any) -> None:
    values = (RNG.random((5, 4, 3)) * 100).astype(dtype)
    plain = kind(values, OBLIQUE, dtype=dtype).to_bytes()
    for content in (plain, gzip.compress(plain)):
        read = opened(content)
        assert np.array_equal(read.scaled(read.values), values)
        assert (read.shape, read.volumes) == ((5, 4, 3), 1)
        assert np.allclose(read.affine, OBLIQUE, atol=1e-6)
    assert file_kind("upload", plain) == "nifti"


def test_big_endian_scaled_and_flat_files_are_read() -> None:
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    scaled = nibabel.Nifti1Image(np.linspace(-1, 1, 60).reshape(5, 4, 3), OBLIQUE, header)
    content = scaled.to_bytes()
    assert content[:4] == (348).to_bytes(4, "big")
    assert file_kind("upload", content) == "nifti"
    read = opened(content)
    assert np.allclose(read.scaled(read.values), scaled.get_fdata(), atol=1e-4)
    flat = opened(image(np.arange(20, dtype=np.uint8).reshape(5, 4)).to_bytes())
    assert (flat.shape, flat.values.shape) == ((5, 4), (5, 4, 1))


def test_only_the_first_volume_is_decompressed() -> None:
    values = RNG.integers(0, 100, (6, 5, 4, 9)).astype(np.int16)
    content = gzip.compress(image(values).to_bytes())
    read = opened(content)
    assert (read.shape, read.volumes) == ((6, 5, 4), 9)
    assert np.array_equal(read.values, values[..., 0])
    cut = gzip.compress(image(values).to_bytes()[: 352 + 6 * 5 * 4 * 2 + 100])
    assert np.array_equal(opened(cut).values, values[..., 0])


def refused() -> dict[str, tuple[bytes, str]]:
    values = np.zeros((5, 4, 3), dtype=np.int16)
    plain = image(values).to_bytes()
    packed = gzip.compress(image(RNG.integers(0, 999, (20, 20, 20)).astype(np.int16)).to_bytes())
    flipped = bytearray(packed)
    flipped[-6] ^= 0xFF  # the checksum
    return {
        "cut": (plain[:-1], "cut short"),
        "cut in the header": (plain[:200], "no NIfTI"),
        "cut while compressed": (packed[:-500], "damaged"),
        "another checksum": (bytes(flipped), "damaged"),
        "compressed nonsense": (gzip.compress(b"hello" * 100), "no NIfTI"),
        "broken compression": (b"\x1f\x8b\x08\x00" + b"\xff" * 60, "damaged|no NIfTI"),
        "huge": (changed(plain, "dim", [3, 30_000, 30_000, 30_000, 1, 1, 1, 1]), "more than the limit"),
        "negative": (changed(plain, "dim", [3, -5, 4, 3, 1, 1, 1, 1]), "was expected"),
        "empty": (changed(plain, "dim", [3, 0, 4, 3, 1, 1, 1, 1]), "was expected"),
        "one value": (changed(plain, "dim", [3, 1, 1, 1, 1, 1, 1, 1]), "no picture"),
        "far offset": (changed(plain, "vox_offset", 3e9), "once it is decompressed"),
        "complex": (image(values.astype(np.complex64)).to_bytes(), "type complex64"),
        "unknown type": (changed(plain, "datatype", 999), "cannot be followed"),
        "half of a pair": (changed(plain, "magic", b"ni1"), "pair"),
        "no orientation": (changed(plain, "srow_z", [0, 0, 0, 0]), "orientation"),
    }


@pytest.mark.parametrize("case", refused())
def test_damaged_lying_and_strange_files_end_in_one_sentence(case: str) -> None:
    content, reason = refused()[case]
    with pytest.raises(MedPLIBError, match=reason) as raised:
        opened(content)
    assert str(raised.value).startswith("scan.nii ")
    assert "\n" not in str(raised.value)


def test_a_bomb_is_not_decompressed() -> None:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((100, 100, 90))
    header["magic"], header["vox_offset"] = b"n+1", 352
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as stream:
        stream.write(header.binaryblock + bytes(4))
        for _ in range(64):
            stream.write(bytes(2**20))
    tracemalloc.start()
    assert opened(packed.getvalue()).values.shape == (100, 100, 90)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()
    header.set_data_shape((1000, 1000, 1000))
    with pytest.raises(MedPLIBError, match="once it is decompressed"):
        read_nifti(gzip.compress(header.binaryblock + bytes(4)), "scan.nii", 2 * MAX_VOLUME_BYTES)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_written_labels_have_the_geometry_of_the_source(kind: Any) -> None:
    source = kind(RNG.random((5, 4, 3)).astype(np.float32), OBLIQUE)
    source.set_sform(OBLIQUE, code=2)
    source.set_qform(OBLIQUE, code=1)
    source.header["descrip"], source.header["xyzt_units"] = b"Secret^Name", 10
    labels = np.zeros((5, 4, 3), dtype=np.uint8)
    labels[1, 2, 0] = 3
    written = gzip.decompress(write_nifti(labels, np.eye(4), opened(source.to_bytes()), "MedPLIB: 3 Leber für"))
    back = kind.from_bytes(written)
    assert np.array_equal(np.asarray(back.dataobj), labels)
    assert back.get_data_dtype() == np.uint8
    again = kind.from_bytes(source.to_bytes())
    for form in ("get_sform", "get_qform"):
        (expected, code), (got, own) = (getattr(file, form)(coded=True) for file in (again, back))
        assert np.array_equal(expected, got)
        assert code == own
    assert np.array_equal(again.affine, back.affine)
    assert again.header.get_xyzt_units() == back.header.get_xyzt_units()
    assert again.header.get_zooms() == back.header.get_zooms()
    assert b"Secret" not in written
    assert b"MedPLIB" in written


def test_labels_too_long_for_nifti_1_become_nifti_2() -> None:
    for length, kind in ((32_767, nibabel.Nifti1Image), (32_768, nibabel.Nifti2Image)):
        labels = np.ones((length, 2, 1), dtype=np.uint8)
        back = kind.from_bytes(gzip.decompress(write_nifti(labels, np.diag([0.5, 2.0, 1.0, 1.0]))))
        assert np.array_equal(np.asarray(back.dataobj), labels)
        assert back.header.get_zooms() == (0.5, 2.0, 1.0)


def test_header_damage_ends_in_a_volume_or_a_sentence() -> None:
    plain = image(np.arange(60, dtype=np.int16).reshape(5, 4, 3)).to_bytes()
    rng = np.random.default_rng(1)
    for _ in range(300):
        damaged = bytearray(plain)
        for place in rng.integers(0, 352, 3):
            damaged[place] = rng.integers(256)
        try:
            read = opened(bytes(damaged))
            assert read.values.ndim == 3
            assert np.isfinite(read.affine).all()
        except MedPLIBError as error:
            assert "\n" not in str(error)
