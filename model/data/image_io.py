"""Image and mask files → arrays: PNG, JPEG, TIFF, BMP, GIF, WebP, PPM and single-frame DICOM; the rule of each format.

Every image becomes 8-bit RGB as a radiologist's screen would show it; every mask becomes booleans. Whatever is wrong
with a file ends in one ``MedPLIBError`` that names it, and size limits are checked before pixels are decoded.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from model.data.dicom import check_scans, open_dicom, scale_to_uint8
from model.errors import MedPLIBError

ImageSource = str | Path | bytes | BinaryIO | Image.Image | np.ndarray
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
_PNG, _JPEG, _TIFF = (b"\x89PNG",), (b"\xff\xd8\xff",), (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GZIP = b"\x1f\x8b"
_OTHER_BEGINNINGS = (  # not TIFF: a DICOM file may carry a TIFF header, so that either kind of program finds its pixels
    *(*_PNG, *_JPEG, b"GIF8", b"BM", b"RIFF"),
    *(_GZIP, b"PK", b"%PDF", b"MZ", b"\x7fELF", b"#!", b"<"),
)
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_MAX_COPIES = 64  # a slide has about ten
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
MAX_MASK_LEVELS = 16
"""A grey mask of more values has soft edges, or is no mask."""
MERGED_GAP = 8
"""How far apart instance numbers of one merged mask may be: small instances were dropped."""


@dataclass(frozen=True)
class ReadLimits:
    """What an image file may cost; checked before its pixels are decoded."""

    max_bytes: int = 512 * 1024**2
    max_pixels: int = 80_000_000


@dataclass(frozen=True)
class ImageData:
    """One decoded image."""

    pixels: np.ndarray  # uint8 [H, W, 3], RGB
    # (row, column) distance of pixel centres in the patient, in mm; None where the file does not say
    spacing_mm: tuple[float, float] | None
    kind: str  # ``png``, ``jpeg``, ``tiff`` … the file's form, ``dicom``, ``pil`` or ``array``
    notes: tuple[str, ...] = ()  # what was mended or ignored in the file's header, one sentence each

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


@dataclass(frozen=True)
class MaskData:
    """One decoded mask."""

    pixels: np.ndarray  # bool [H, W]
    # that and why values above half of the largest are foreground, to follow the file's name; empty where every value
    # but zero is
    note: str = ""


def read_image(source: ImageSource, limits: ReadLimits | None = None) -> ImageData:
    """Decode one image to 8-bit RGB.

    Images of more than 8 bits, signed and floating-point ones, which carry no window of their own, are scaled linearly
    from their smallest to their largest value; transparency is laid on black; the EXIF orientation is applied; of a
    TIFF whose white is 0 the shades are inverted. DICOM: see ``dicom.py``. Raises MedPLIBError: unreadable, truncated,
    oversized, several frames or pages, a volume, or no image at all.

    Args:
        source: path, encoded bytes, binary file object, PIL image, or array [H, W], [H, W, 1], [H, W, 3] or [H, W,
            4].
        limits: size limits; the defaults of ``ReadLimits`` if None.
    """
    limits = limits or ReadLimits()
    if isinstance(source, np.ndarray):
        _check_pixels(source.shape[:2], "the array", limits)
        return ImageData(_array_to_rgb(source), None, "array")
    if isinstance(source, Image.Image):
        _check_pixels(source.size[::-1], "the PIL image", limits)
        return ImageData(_decode("the PIL image", lambda: _array_to_rgb(_pil_values(source))), None, "pil")
    name, content = _content(source, limits)
    if file_kind(name, content) == "dicom":
        frames = open_dicom(content, name, limits.max_pixels)
        if frames.count > 1:
            raise MedPLIBError(f"{name} holds {frames.count} frames; extract the single frame to look at")
        image = ImageData(frames.frame(0), frames.spacing_mm, "dicom", tuple(frames.notes))
        for note in image.notes:
            _warn(f"{name}: {note}")
        return image
    opened = _open(name, content, limits)
    return ImageData(_decode(name, lambda: _array_to_rgb(_values_of(opened, content))), None, opened.kind)


def read_mask(source: ImageSource, limits: ReadLimits | None = None) -> np.ndarray:
    """Decode one mask, as ``read_mask_data`` does, to bool [H, W]."""
    return read_mask_data(source, limits).pixels


def read_mask_data(source: ImageSource, limits: ReadLimits | None = None) -> MaskData:
    """Decode one mask.

    In a JPEG and its like, and in a grey image with more than ``MAX_MASK_LEVELS`` values, what is above half of the
    largest value is foreground. In every other mask it is every value that is not zero: in any channel of a colour
    image, in the alpha channel where that has transparent pixels, in the indices of a palette, in an array.

    A path ``masks_merged/<image>--<class>_merged.png`` that does not exist is put together from the instance files
    beside it, see ``mask_files``. Raises MedPLIBError: as ``read_image``, and where instance files of one merged mask
    differ in size."""
    limits = limits or ReadLimits()
    if isinstance(source, str | Path):
        parts = [_read_one_mask(path, limits) for path in mask_files(source) or (Path(source),)]
        if any(part.pixels.shape != parts[0].pixels.shape for part in parts):
            raise MedPLIBError(f"the instance masks of {source} differ in size; merge them by hand")
        note = next((part.note for part in parts if part.note), "")
        return MaskData(np.logical_or.reduce([part.pixels for part in parts]), note)
    return _read_one_mask(source, limits)


def read_labels(source: str | Path, limits: ReadLimits | None = None) -> np.ndarray:
    """Decode a label map: the number that each pixel holds, of a picture with a palette the number in it. Returns int64
    [H, W]. Raises MedPLIBError: as ``read_mask``, for a JPEG, and where a pixel is a colour and no number."""
    limits = limits or ReadLimits()
    name, content = _content(source, limits)
    opened = _open_plain(name, content, limits, "a label map")
    if opened.lossy:
        raise MedPLIBError(f"{name} is {opened.lossy}, which changes the values of pixels; save label maps as PNG")
    values = _decode(name, lambda: _stored_values(opened, content))
    if opened.white_is_zero and opened.image is not None:  # PIL has turned them into shades
        values = ~values
    if opened.scale > 1:
        values = values // opened.scale
    if values.ndim == 3 and (values[..., :3] == values[..., :1]).all():  # grey saved as colour
        values = values[..., 0]
    if values.ndim != 2 or (values.dtype.kind == "f" and (values != np.rint(values)).any()):
        raise MedPLIBError(f"{name} holds colours or fractions; a label map holds one whole number for each pixel")
    return values.astype(np.int64)


def file_kind(name: str, content: bytes) -> Literal["dicom", "nifti", "picture"]:
    """What a file is by its first bytes; its name's ending helps where those do not say. Raises MedPLIBError: two
    formats at once."""
    other = content.startswith(_OTHER_BEGINNINGS)
    if content[128:132] == b"DICM":
        if other:
            raise MedPLIBError(f"{name} is a DICOM file and something else at once; export it as plain DICOM")
        return "dicom"
    lower = name.lower()
    if lower.endswith((".dcm", ".dicom")) and not other and not content.startswith(_TIFF):
        return "dicom"
    named = lower.endswith((".nii", ".nii.gz")) and (not other or content.startswith(_GZIP))
    magic = b"n" in content[4:5] + content[344:345]
    return "nifti" if named or (magic and nifti_header_size(content)) else "picture"


def nifti_header_size(content: bytes) -> int:
    """Bytes of a NIfTI-1 or NIfTI-2 header by its first number, in either byte order; 0 where there is no such one."""
    sizes = {int.from_bytes(content[:4], order) for order in ("little", "big")}  # type: ignore[arg-type]
    return next((size for size in (348, 540) if size in sizes and len(content) >= 348), 0)


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file; a name the file system refuses is not one."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def mask_files(path: str | Path) -> tuple[Path, ...]:
    """Files that make the mask ``path``: itself, or the instances of a merged mask; empty where there is none.

    The published records point to ``masks_merged/<image>--<class>_merged.png``; the public data set holds only
    ``masks/<image>--<class>_000.png``, ``_001.png`` …, whose union it is (reference §8)."""
    path = Path(path)
    if is_file(path):
        return (path,)
    if not path.stem.endswith("_merged") or path.parent.name != "masks_merged":
        return ()
    stem = path.stem.removesuffix("_merged")
    found: list[Path] = []
    number, last = 0, -1
    while number - last <= MERGED_GAP:
        instance = path.parent.parent / "masks" / f"{stem}_{number:03d}{path.suffix}"
        if is_file(instance):
            found.append(instance)
            last = number
        number += 1
    return tuple(found)


@lru_cache(maxsize=1024)
def _warn(sentence: str) -> None:
    logger.warning("%s", sentence)


def _read_one_mask(source: ImageSource, limits: ReadLimits) -> MaskData:
    if isinstance(source, np.ndarray):
        if source.ndim not in (2, 3) or 0 in source.shape:
            raise MedPLIBError(f"the mask array has shape {list(source.shape)}; a mask is [H, W]")
        return MaskData(source != 0 if source.ndim == 2 else (source != 0).any(axis=2))
    if isinstance(source, Image.Image):
        opened = _Opened(source, "pil", lossy="a JPEG" if source.format in ("JPEG", "MPO") else "")
        return _decode("the PIL image", lambda: _foreground(_stored_values(opened, b""), opened))
    name, content = _content(source, limits)
    opened = _open_plain(name, content, limits, "a mask")
    return _decode(name, lambda: _foreground(_stored_values(opened, content), opened))


def _foreground(values: np.ndarray, opened: _Opened) -> MaskData:
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0)
    if values.ndim == 3 and values.shape[2] in (2, 4):  # drawn on transparency, unless no pixel is transparent
        alpha = values[..., -1]
        values = alpha if (alpha == 0).any() else values[..., :-1]
    if values.ndim == 3 and (opened.lossy or (values == values[..., :1]).all()):
        values = values.max(axis=2)
    reason = opened.lossy
    if not reason and values.ndim == 2 and not opened.indexed and (levels := _count_levels(values)) > MAX_MASK_LEVELS:
        reason = f"{levels} grey levels"
    if reason:
        note = f"is {reason}: what is above half of its largest value is taken as foreground"
        return MaskData(values > values.max() / 2, note)
    return MaskData(values != 0 if values.ndim == 2 else (values != 0).any(axis=2))


def _count_levels(values: np.ndarray) -> int:
    if values.dtype == np.bool_ or ((values == 0) | (values == values.max())).all():
        return 2
    if values.dtype in (np.uint8, np.uint16):
        return int(np.count_nonzero(np.bincount(values.ravel())))
    return len(np.unique(values))


def _content(source: str | Path | bytes | BinaryIO, limits: ReadLimits) -> tuple[str, bytes]:
    if isinstance(source, str | Path):
        path, name = Path(source), str(source)
        try:
            with path.open("rb") as stream:
                content = stream.read(limits.max_bytes + 1)
        except OSError as error:
            reason = error.strerror or "it cannot be read"
            raise MedPLIBError(f"cannot open the image {name}: {reason}; give one image file") from error
        except ValueError as error:
            raise MedPLIBError(f"{name!r} is not a file name: {error}") from error
    elif isinstance(source, bytes):
        name, content = "the image given as bytes", source
    elif hasattr(source, "read"):
        name, content = str(getattr(source, "name", "the image stream")), source.read(limits.max_bytes + 1)
    else:
        raise MedPLIBError(f"expected an image as path, bytes, file, PIL image or array, got {type(source).__name__}")
    if len(content) > limits.max_bytes:
        raise MedPLIBError(
            f"{name} is larger than the limit of {limits.max_bytes / 1024**2:.3g} MiB; give a smaller file"
        )
    if not content:
        raise MedPLIBError(f"{name} is empty; give an image")
    return name, content


@dataclass
class _Opened:
    """A plain image whose header is known."""

    image: Image.Image | None  # of PIL; None where PIL would misread the values
    kind: str  # the format, lower case
    white_is_zero: bool = False  # values of a TIFF are the darker the larger they are
    bits: int = 8  # of a sample; PIL multiplies grey values of fewer than 8 up to 255
    lossy: str = ""  # the compression, if it is one that changes values

    @property
    def scale(self) -> int:
        return 255 // (2**self.bits - 1) if self.image is not None and self.image.mode == "L" and self.bits < 8 else 1

    @property
    def indexed(self) -> bool:
        return self.image is not None and self.image.mode in ("P", "PA")


def _open_plain(name: str, content: bytes, limits: ReadLimits, what: str) -> _Opened:
    if file_kind(name, content) == "dicom":
        raise MedPLIBError(f"{name} is a DICOM file; {what} is a PNG or another plain image")
    return _open(name, content, limits)


def _open(name: str, content: bytes, limits: ReadLimits) -> _Opened:
    if file_kind(name, content) == "nifti":
        raise MedPLIBError(
            f"{name} is a NIfTI volume; give one of its slices as PNG or TIFF, or open it on the web page"
        )
    if content.startswith((b"\x1f\x8b", b"PK")):
        raise MedPLIBError(f"{name} is a compressed archive, not an image; unpack it first")
    inverted, bits, lossy = False, 8, ""
    if content.startswith(_TIFF):
        tags = _decode(name, lambda: _tiff_tags(name, content))
        inverted, bits, channels = tags[262] == 0, max(tags[258]), tags[277]
        lossy = "a TIFF with JPEG compression" if tags[259] in (6, 7) else ""
        if (bits > 8 or not set(tags[339]) <= {1, 4}) and tags[262] in (0, 1, 2):  # PIL would lose bits or signs
            _check_pixels((tags[257], tags[256]), name, limits, channels * bits // 8)
            if channels not in (1, 3, 4) or (channels > 1 and tags[284] == 2) or (3 in tags[339] and bits < 32):
                raise MedPLIBError(
                    f"{name} is a TIFF of {channels} channels of {bits} bits in a layout that is not read; "
                    "save it with 1, 3 or 4 interleaved channels of whole numbers or 32-bit floats"
                )
            return _Opened(None, "tiff", inverted, bits, lossy)
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise MedPLIBError(
            f"{name} has more pixels than the limit of {limits.max_pixels:,}; shrink it first"
        ) from error
    except Exception as error:  # PIL's plugins raise whatever a broken header makes them
        raise MedPLIBError(f"{name} is not a readable image; PNG, JPEG, TIFF, BMP or DICOM was expected") from error
    _check_pixels(image.size[::-1], name, limits)
    kind = (image.format or "image").lower().replace("mpo", "jpeg")
    if kind == "jpeg":
        check_scans(content, name)
        lossy = "a JPEG"
    # Counting them would take minutes where a file was made for that. A TIFF's were looked at, an MPO is a photo with
    # its preview.
    elif kind != "tiff" and _decode(name, lambda: getattr(image, "is_animated", False)):
        raise MedPLIBError(_SEVERAL.format(name=name))
    if kind == "png":
        bits = content[24]
        if bits == 16 and (channels := {2: 3, 4: 2, 6: 4}.get(content[25], 0)):
            _check_pixels(image.size[::-1], name, limits, 2 * channels)
            return _Opened(None, kind)
    if kind == "webp" and b"VP8 " in content[:4096]:
        lossy = "a lossy WebP"
    return _Opened(image, kind, inverted, bits, lossy)


_SEVERAL = "{name} holds several images in one file; save the page or frame to look at as a file of its own"


def _tiff_tags(name: str, content: bytes) -> dict[int, Any]:
    """Size and layout of a TIFF's first page; further pages may be smaller copies of it, as slide scanners add. Raises
    MedPLIBError: several pages."""
    defaults = {256: 0, 257: 0, 258: (1,), 259: 1, 262: 1, 277: 1, 284: 1, 339: (1,)}
    stream = io.BytesIO(content)
    header = stream.read(16 if 43 in content[2:4] else 8)
    first = page = TiffImagePlugin.ImageFileDirectory_v2(header)
    stream.seek(page.next)
    page.load(stream)
    seen: set[int] = set()
    while page.next and page.next not in seen and page.next < len(content):
        seen.add(page.next)
        stream.seek(page.next)
        page = TiffImagePlugin.ImageFileDirectory_v2(header)
        page.load(stream)
        if not int(page.get(254, 0)) & 1 or len(seen) > _MAX_COPIES:  # not of reduced resolution
            raise MedPLIBError(_SEVERAL.format(name=name))
    return {tag: first.get(tag, default) for tag, default in defaults.items()}


def _check_pixels(shape: tuple[int, ...], name: str, limits: ReadLimits, pixel_bytes: int = 1) -> None:
    """Refuse too many pixels, and wide ones that take more memory than as many of four bytes."""
    limit = limits.max_pixels // max(1, pixel_bytes // 4)
    if int(np.prod([int(side) for side in shape])) > limit:
        sides = " × ".join(str(side) for side in shape)
        raise MedPLIBError(f"{name} has {sides} pixels, more than the limit of {limit:,}; shrink it first")


def _decode(name: str, decode: Callable[[], Result]) -> Result:
    try:
        return decode()
    except MedPLIBError as error:
        if name in str(error):
            raise
        raise MedPLIBError(f"{name}: {error}") from error
    except Exception as error:  # a broken file makes decoders raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MedPLIBError(f"{name} cannot be decoded ({reason}); the file is damaged or cut short") from error


def _values_of(opened: _Opened, content: bytes) -> np.ndarray:
    """Pixels [H, W] or [H, W, 3 or 4], upright, brighter where larger; 8-bit ones with transparency on black."""
    if opened.image is not None:
        if opened.kind == "png":
            opened.image.load()
            _check_rows(np.asarray(opened.image), content)
            return _pil_values(opened.image, opened.scale)
        return _pil_values(opened.image)
    values = _wide_values(opened, content)
    return (~values if values.dtype.kind in "iu" else -values) if opened.white_is_zero else values


def _stored_values(opened: _Opened, content: bytes) -> np.ndarray:
    """Pixels as the file stores them, upright: [H, W] of indices or grey, else with 2, 3 or 4 channels."""
    if opened.image is None:
        return _wide_values(opened, content)
    image = opened.image
    image.load()
    if opened.kind == "png" and content:
        _check_rows(np.asarray(image), content)
    image = ImageOps.exif_transpose(image)
    if image.mode not in (*_WIDE_MODES, "1", "L", "P", "RGB", "LA", "RGBA"):
        image = image.convert("RGBA" if image.mode in _ALPHA_MODES else "RGB")
    return np.asarray(image)


def _wide_values(opened: _Opened, content: bytes) -> np.ndarray:
    """Values of more than 8 bits, signed and floating-point ones, with channels in the order RGB(A)."""
    import cv2

    if opened.kind == "png":
        _check_rows(None, content)
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the error says it in one sentence
    try:
        values = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if values is None and opened.kind == "tiff":  # PIL knows more compressions
        image = Image.open(io.BytesIO(content), formats=("TIFF",))
        if image.mode in ("I;16", "I;16B", "F"):
            return np.asarray(ImageOps.exif_transpose(image))
    if values is None:
        raise OSError("its values or its compression cannot be read")
    if opened.white_is_zero and values.dtype.itemsize == 1:  # it inverts these alone
        values = np.invert(values)
    if values.ndim == 3:
        values = values[:, :, [2, 1, 0, *range(3, values.shape[2])]]
    if opened.kind == "png":
        orientation = Image.open(io.BytesIO(content), formats=("PNG",)).getexif().get(0x0112, 1)
        if orientation in (5, 6, 7, 8):  # upright, as ``ImageOps.exif_transpose`` does it
            values = np.swapaxes(values, 0, 1)
        rows, columns = (-1 if orientation in turned else 1 for turned in ((3, 4, 7, 8), (2, 3, 6, 7)))
        values = values[::rows, ::columns]
    return values


def _check_rows(values: np.ndarray | None, content: bytes) -> None:
    """A PNG whose compressed data end early leaves its last rows black without a word of the decoder.

    Args:
        values: as decoded, if they are; where their last row is not black, all rows are there.
        content: of the file.
    """
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", content[16:29])
    if not interlaced and values is not None and values[-1].any():
        return
    bits = depth * {2: 3, 4: 2, 6: 4}.get(colour, 1)
    expected = 0
    for top, left, down, across in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        rows, columns = -(-max(height - top, 0) // down), -(-max(width - left, 0) // across)
        expected += rows * (1 + -(-columns * bits // 8)) if columns else 0
    inflater, found, at = zlib.decompressobj(), 0, 8
    while found < expected and at + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        rest = content[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        while rest and found < expected and not inflater.eof:
            found += len(inflater.decompress(rest, 1 << 20))
            rest = inflater.unconsumed_tail
        at += 12 + length
    if found < expected:
        raise OSError(f"{found:,} of {expected:,} bytes of pixel rows")


def _pil_values(image: Image.Image, scale: int = 1) -> np.ndarray:
    """Pixels [H, W] or [H, W, 3], upright, colours resolved, transparency on black; wide grey values are kept.

    Args:
        image: of any mode.
        scale: what PIL has multiplied a PNG's values by, but not its transparent value.
    """
    image = ImageOps.exif_transpose(image)
    see_through = image.info.get("transparency")
    if image.mode in (*_WIDE_MODES, "L", "RGB", "1"):
        values = np.asarray(image.convert("L") if image.mode == "1" else image)
        if isinstance(see_through, int | tuple):  # one value or colour of a PNG or GIF
            hidden = values == np.multiply(see_through, 255 if image.mode == "1" else scale)
            hidden = hidden.all(axis=2) if values.ndim == 3 else hidden
            values = values.copy()
            values[hidden] = 0 if values.dtype == np.uint8 else values[~hidden].min(initial=values.max())
        return values
    if image.mode in _ALPHA_MODES or (image.mode == "P" and see_through is not None):
        image = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _array_to_rgb(values: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of an array of any real type, [H, W] or with 1, 3 or 4 channels."""
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or 0 in values.shape:
        raise MedPLIBError(f"expected image values [H, W], [H, W, 3] or [H, W, 4], got shape {list(values.shape)}")
    if values.ndim == 3 and values.shape[2] == 4:
        alpha = values[:, :, 3].astype(np.float64)
        most = float(np.iinfo(values.dtype).max) if values.dtype.kind in "iu" else max(1.0, alpha.max())
        hidden = np.repeat(alpha[:, :, None] <= 0, 3, axis=2)
        colours = scale_to_uint8(values[:, :, :3], ignore=hidden)
        values = (colours * np.clip(alpha / most, 0, 1)[:, :, None] + 0.5).astype(np.uint8)
    values = scale_to_uint8(values)
    return np.ascontiguousarray(np.repeat(values[:, :, None], 3, axis=2) if values.ndim == 2 else values)
