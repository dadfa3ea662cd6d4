from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.data.dicom import scale_to_uint8
from model.data.image_io import ReadLimits, mask_files, read_image, read_labels, read_mask, read_mask_data
from model.errors import MedPLIBError

RAMP = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8) * 5


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_plain_files_give_the_same_pixels_from_every_source(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(colours))
    sources = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), Image.fromarray(colours), colours]
    for source, kind in zip(sources, ["png"] * 4 + ["pil", "array"], strict=True):
        data = read_image(source)
        assert data.pixels.dtype == np.uint8
        assert np.array_equal(data.pixels, colours)
        assert (data.size, data.spacing_mm, data.kind) == ((6, 8), None, kind)
    for form in ("tiff", "bmp", "gif"):
        grey = read_image(save(tmp_path / f"a.{form}", Image.fromarray(RAMP)))
        assert np.array_equal(grey.pixels, np.repeat(RAMP[:, :, None], 3, axis=2))
        assert grey.kind == form


def test_jpeg_is_turned_upright(tmp_path: Path) -> None:
    halves = np.zeros((16, 32), dtype=np.uint8)
    halves[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise is needed
    data = read_image(save(tmp_path / "a.jpg", Image.fromarray(halves), exif=exif, quality=95))
    assert (data.size, data.kind) == ((32, 16), "jpeg")
    assert data.pixels[:12].mean() < 5
    assert data.pixels[20:].mean() > 250


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_wide_greys_are_scaled_from_their_own_range(tmp_path: Path, dtype: Any) -> None:
    wide = (1000 + RAMP.astype(np.float64) * 40).astype(dtype)
    expected = np.floor(RAMP / RAMP.max() * 255 + 0.5)
    sources: list[Any] = [wide, save(tmp_path / "a.tiff", Image.fromarray(wide))]
    if dtype == np.uint16:
        sources.append(save(tmp_path / "a.png", Image.fromarray(wide)))
    for source in sources:
        assert np.abs(read_image(source).pixels[:, :, 1] - expected).max() <= 1
    assert read_image(np.full((3, 3), 7, dtype=dtype)).pixels.max() == 0


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize("ignoring", ["nothing", "some", "all"])
def test_many_wide_greys_are_scaled_as_few_are(dtype: Any, ignoring: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-3000 if dtype == np.int16 else 100, 30_000, (1100, 1000)).astype(dtype)
    values[0, :7] = np.iinfo(dtype).max
    ignore = {"nothing": None, "some": values > 20_000, "all": np.ones(values.shape, dtype=bool)}[ignoring]
    exact = scale_to_uint8(values.astype(np.int64), ignore)
    assert np.array_equal(scale_to_uint8(values, ignore), exact)
    assert np.array_equal(scale_to_uint8(np.full(values.shape, 7, dtype=dtype)), np.zeros(values.shape))
    colours = values[:990].reshape(330, 1000, 3).repeat(2, axis=0)
    assert np.array_equal(scale_to_uint8(colours), scale_to_uint8(colours.astype(np.int64)))


def test_values_that_are_not_numbers_do_not_spoil_the_range() -> None:
    values = np.array([[0.0, 1.0], [np.nan, np.inf]])
    assert read_image(values).pixels[:, :, 0].tolist() == [[0, 255], [0, 0]]


def test_palette_transparency_cmyk_and_one_bit(tmp_path: Path) -> None:
    colours = np.zeros((4, 4, 3), dtype=np.uint8)
    colours[:, 2:] = (200, 40, 90)
    palette = read_image(
        save(tmp_path / "p.png", Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE))
    )
    assert np.array_equal(palette.pixels, colours)
    see_through = np.dstack([colours, np.full((4, 4), 255, dtype=np.uint8)])
    see_through[0, :, 3] = 0
    composited = read_image(save(tmp_path / "t.png", Image.fromarray(see_through))).pixels
    assert composited[0].max() == 0
    assert np.array_equal(composited[1:], colours[1:])
    assert np.array_equal(read_image(see_through).pixels, composited)
    cmyk = read_image(save(tmp_path / "c.jpg", Image.fromarray(colours).convert("CMYK"), quality=100)).pixels
    assert np.abs(cmyk.astype(int) - colours).mean() < 8
    bits = read_image(save(tmp_path / "b.png", Image.fromarray(colours[:, :, 0] > 0))).pixels
    assert set(np.unique(bits)) == {0, 255}


def broken_sources(tmp_path: Path) -> dict[str, Any]:
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(good, "PNG")
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    save(tmp_path / "pages.tiff", frames[0], save_all=True, append_images=frames[1:])
    contents = {
        "text.png": b"hello",
        "empty.png": b"",
        "cut.png": good.getvalue()[:3000],
        "page.html": b"<html>404</html>",
        "packed.png.gz": b"\x1f\x8b\x08\x00",
        "scan.nii.gz": b"\x1f\x8b\x08\x00",
        "nonsense.dcm": b"hello",
        "head.dcm": b"\0" * 128 + b"DICM" + b"\xff" * 40,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = {name: tmp_path / name for name in [*contents, "pages.tiff", "absent.png"]}
    return {**paths, tmp_path.name: tmp_path}


def test_every_malformed_file_is_named_in_one_sentence(tmp_path: Path) -> None:
    sources = broken_sources(tmp_path)
    for read in (read_image, read_mask):
        for name, source in sources.items():
            with pytest.raises(MedPLIBError) as caught:
                read(source)
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)
    with pytest.raises(MedPLIBError, match="holds several images"):
        read_image(sources["pages.tiff"])
    with pytest.raises(MedPLIBError, match="cut short"):
        read_image(sources["cut.png"])
    with pytest.raises(MedPLIBError, match=r"^cannot open the image .*; give one image file$"):
        read_image(tmp_path)
    for wrong in (np.zeros((2, 2, 2)), np.zeros(4), np.zeros((0, 3)), np.array([["a"]]), 7, b"junk"):
        with pytest.raises(MedPLIBError):
            read_image(wrong)  # type: ignore[arg-type]


def test_limits_hold_before_decoding(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("L", (300, 200)))
    with pytest.raises(MedPLIBError, match="200 × 300 pixels, more than the limit of 50,000"):
        read_image(path, ReadLimits(max_pixels=50_000))
    with pytest.raises(MedPLIBError, match="larger than the limit"):
        read_image(path, ReadLimits(max_bytes=10))
    with pytest.raises(MedPLIBError, match="more than the limit"):
        read_image(np.zeros((300, 200), dtype=np.uint8), ReadLimits(max_pixels=50_000))
    wide = np.zeros((20, 30), dtype=np.float64)  # takes twice the memory
    with pytest.raises(MedPLIBError, match="20 × 30 pixels, more than the limit of 500"):
        read_image(tiff(wide + 1), ReadLimits(max_pixels=1000))
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = path.read_bytes()[:12] + header + struct.pack(">I", zlib.crc32(header)) + path.read_bytes()[33:]
    with pytest.raises(MedPLIBError, match="pixels"):
        read_image(bomb)


def test_a_jpeg_of_endless_scans_is_refused_undecoded(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.fromarray(np.tile(RAMP, (9, 9))), progressive=True)
    content = path.read_bytes()
    assert read_image(content).size == (54, 72)
    scan = content[content.rfind(b"\xff\xda") : -2]
    with pytest.raises(MedPLIBError, match=r"JPEG of 1,0\d\d scans"):
        read_image(content[:-2] + scan * 1000 + content[-2:])


def tiff(values: np.ndarray, photometric: int = 1) -> bytes:
    """A TIFF of one strip, as PIL cannot write it."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape[:2]
    channels, data = values.size // (height * width), values.tobytes()
    bits = struct.pack("<3H", *[values.dtype.itemsize * 8] * 3)
    tags = [(256, width), (257, height), (258, 8 * values.dtype.itemsize), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, channels), (278, height), (279, len(data)), (339, kind)]
    content = b"II*\0" + struct.pack("<I", 8 + len(data) + 6) + data + bits + struct.pack("<H", len(tags))
    for tag, value in tags:
        count, value = (3, 8 + len(data)) if (tag, channels) == (258, 3) else (1, value)
        content += struct.pack("<HHII", tag, 3 if tag in (258, 262, 277, 339) else 4, count, value)
    return content + bytes(4)


def png(values: np.ndarray, colour: int, extra: bytes = b"", rows: Any = None, bits: int = 0, width: int = 0) -> bytes:
    """A PNG with a further chunk, or with fewer rows than its header says; ``values`` may be packed bits."""
    height, width = len(values), width or values.shape[1]
    depth = bits or 8 * values.dtype.itemsize
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in values[:rows]))
    pieces = [b"IHDR" + header, extra, b"IDAT" + body, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(piece) - 4) + piece + struct.pack(">I", zlib.crc32(piece)) for piece in pieces if piece
    )


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<f8"])
def test_tiffs_of_any_type_show_their_whole_range(dtype: str, photometric: int) -> None:
    low, high = {"u": (0, 200), "i": (-100, 100), "f": (-1000, 3000)}[np.dtype(dtype).kind]
    if dtype == "<u4":
        low, high = 0, 4_000_000_000
    values = np.linspace(low, high, 48).astype(dtype).reshape(6, 8)
    exact = values.astype(float)
    expected = exact if dtype == "u1" else (exact - low) / (high - low) * 255
    shown = read_image(tiff(values, photometric)).pixels[:, :, 0]
    assert np.abs(shown - (expected if photometric else 255 - expected)).max() <= 1
    if np.dtype(dtype).kind == "f":
        values[0, 0], values[0, 1] = np.nan, np.inf
        assert read_image(tiff(values)).pixels[0, :2].max() == 0
        with pytest.raises(MedPLIBError, match="every pixel is NaN"):
            read_image(tiff(values * np.nan))


def test_colours_of_16_bits_are_scaled_and_turned_whole() -> None:
    colours = np.random.default_rng(0).integers(0, 4096, (5, 7, 3)).astype(np.uint16)
    colours[0, 0], colours[0, 1] = 0, 4095
    expected = colours / 4095 * 255
    for content in (png(colours, 2), tiff(colours, 2)):
        assert np.abs(read_image(content).pixels - expected).max() <= 0.5
    opaque = np.dstack([colours, np.full((5, 7), 65535, np.uint16)])
    for source in (png(opaque, 6), opaque):
        assert np.abs(read_image(source).pixels - expected).max() <= 1
    for number in range(1, 9):
        exif = b"eXIfII*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([number]) + bytes(7)
        eight = read_image(png(read_image(colours).pixels, 2, exif)).pixels
        assert np.array_equal(read_image(png(colours, 2, exif)).pixels, eight)
    with pytest.raises(MedPLIBError, match="layout that is not read"):
        read_image(tiff(colours.astype(np.float16), 2))


@pytest.mark.parametrize(("dtype", "colour"), [(np.uint8, 0), (np.uint16, 0), (np.uint8, 2), (np.uint16, 2)])
def test_the_transparent_value_of_a_png_is_black(dtype: Any, colour: int) -> None:
    values = (np.arange(20).reshape(4, 5) * 12 + 9).astype(dtype)
    values = np.dstack([values] * 3) if colour else values
    hidden = struct.pack(">H", 9 + 12 * 19) * (3 if colour else 1)
    plain, laid = (read_image(png(values, colour, extra)).pixels for extra in (b"", b"tRNS" + hidden))
    assert (plain[-1, -1].min(), laid[-1, -1].max()) == (values.max() if dtype == np.uint8 else 255, 0)
    assert (laid[2, 2] > 0).all()


@pytest.mark.parametrize("read", [read_image, read_mask, read_labels])
@pytest.mark.parametrize(("shape", "dtype", "colour"), [((100, 4), np.uint8, 0), ((100, 4, 3), np.uint16, 2)])
def test_a_png_whose_rows_end_early_is_refused(tmp_path: Path, read: Any, shape: Any, dtype: Any, colour: int) -> None:
    values = np.full(shape, 7, dtype=dtype)
    (tmp_path / "short.png").write_bytes(png(values, colour, rows=10))
    with pytest.raises(MedPLIBError, match=r"short.png cannot be decoded .* bytes of pixel rows"):
        read(tmp_path / "short.png")
    values[-1] = 0  # black, but there
    assert read_mask(png(values, colour)).sum() == 99 * 4


INSIDE = np.zeros((40, 40), dtype=bool)
INSIDE[8:16, 8:24] = True


def masks() -> dict[str, Image.Image | np.ndarray]:
    one = INSIDE.astype(np.uint8)
    clear = np.zeros((40, 40, 4), dtype=np.uint8)
    clear[INSIDE, 3] = 255
    red = np.zeros((40, 40, 3), dtype=np.uint8)
    red[INSIDE, 0] = 1
    soft = np.where(INSIDE, 200, np.tile(np.arange(40) * 2, (40, 1))).astype(np.uint8)
    palettes = [Image.fromarray(one).convert("P") for _ in range(2)]
    palettes[0].putpalette([255, 255, 255, 255, 0, 0])
    palettes[1].putpalette([0] * 6)
    sheet = np.dstack([red * 255, np.full((40, 40), 255, np.uint8)])
    nan = np.where(INSIDE, 0.3, np.nan).astype(np.float32)
    few = np.where(INSIDE, np.arange(40) % 15 + 1, 0).astype(np.uint8)
    images = {
        "one": one,
        "bits": INSIDE,
        "wide": one.astype(np.uint16),
        "whole": one.astype(np.int32),
        "red": red,
        "opaque": sheet,
        "painted black": clear,
        "painted white": clear | np.array([255, 255, 255, 0], np.uint8),
        "not a number": nan,
        "15 labels": few,
        "soft": soft,
        "soft colour": np.dstack([soft] * 3),
        "soft paint": np.dstack([red, soft * (soft > 2)]),
        "soft float": soft.astype(np.float32) / 255,
    }
    arrays = {name: Image.fromarray(values) for name, values in images.items()}
    return {**arrays, "white background": palettes[0], "black palette": palettes[1]}


@pytest.mark.parametrize("name", masks())
def test_foreground_is_nonzero_or_above_half_if_soft(tmp_path: Path, name: str) -> None:
    image = masks()[name]
    path = save(tmp_path / f"a.{'tiff' if image.mode in 'IF' else 'png'}", image)
    data = read_mask_data(path)
    assert data.pixels.dtype == np.bool_
    assert np.array_equal(data.pixels, INSIDE)
    assert ("half of its largest value" in data.note) == name.startswith("soft")


def test_masks_of_other_forms_and_turned_ones(tmp_path: Path) -> None:
    colours = np.zeros((40, 40, 3), np.uint16)
    colours[INSIDE, 1] = 3  # less than 8 bits would keep
    assert np.array_equal(read_mask(png(colours, 2)), INSIDE)
    assert np.array_equal(read_mask(INSIDE.astype(np.uint8)), INSIDE)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(tmp_path / "t.png", Image.fromarray(INSIDE), exif=exif)
    assert np.array_equal(read_mask(turned), np.rot90(INSIDE, -1))
    assert np.array_equal(read_labels(turned), np.rot90(INSIDE, -1))


def test_label_maps_keep_their_numbers(tmp_path: Path) -> None:
    labels = np.arange(48).reshape(6, 8)
    palette = Image.fromarray(labels.astype(np.uint8)).convert("P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    files = {"p.png": palette, "g.png": Image.fromarray(labels.astype(np.uint16))}
    for name, image in files.items():
        assert np.array_equal(read_labels(save(tmp_path / name, image)), labels)
    for dtype in ("u1", "i1", "<u2", "<i4", "<f4"):
        for photometric in (0, 1):
            (tmp_path / "a.tif").write_bytes(tiff(labels.astype(dtype), photometric))
            assert np.array_equal(read_labels(tmp_path / "a.tif"), labels)
    four = np.packbits(np.unpackbits((labels % 16).astype(np.uint8)[..., None], axis=2)[..., 4:].reshape(6, 32), axis=1)
    (tmp_path / "four.png").write_bytes(png(four, 0, bits=4, width=8))
    assert np.array_equal(read_labels(tmp_path / "four.png"), labels % 16)
    for form, options in (("jpg", {}), ("webp", {}), ("tif", {"compression": "jpeg"})):
        path = save(tmp_path / f"lossy.{form}", Image.fromarray(INSIDE.astype(np.uint8) * 90), **options)
        with pytest.raises(MedPLIBError, match=r"is a .*(JPEG|WebP).* changes the values"):
            read_labels(path)
        data = read_mask_data(path)
        assert data.note
        assert (data.pixels != INSIDE).sum() < 10


def test_a_merged_mask_is_the_union_of_its_instances(folder: Any) -> None:
    stem = "ct_00--Set--case_1--x_0001--0003"
    folder.write_mask(f"masks/{stem}_004.png", box=(8, 10, 11, 15))
    merged = folder.root / "masks_merged" / f"{stem}_merged.png"
    assert [path.name for path in mask_files(merged)] == [f"{stem}_000.png", f"{stem}_004.png"]
    mask = read_mask(merged)
    assert mask.sum() == 5 * 6 + 3 * 5
    folder.write_mask(f"masks_merged/{stem}_merged.png", box=(0, 0, 1, 1))
    assert read_mask(merged).sum() == 1
    assert mask_files(folder.root / "masks" / "none_merged.png") == ()
    merged.unlink()
    folder.write_mask(f"masks/{stem}_001.png", size=(4, 4))
    with pytest.raises(MedPLIBError, match="differ in size"):
        read_mask(merged)
