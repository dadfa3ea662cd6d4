"""Image and mask files → arrays: PNG, JPEG, TIFF, BMP, 16-bit, palette and single-frame DICOM.

Every image becomes 8-bit RGB as a radiologist's screen would show it; every mask becomes booleans. Whatever is wrong
with a file ends in one ``MedPLIBError`` that names it, and size limits are checked before pixels are decoded.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps

from model.data.dicom import check_scans, read_dicom
from model.data.windowing import scale_to_uint8
from model.errors import MedPLIBError

ImageSource = str | Path | bytes | BinaryIO | Image.Image | np.ndarray
Result = TypeVar("Result")

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
MERGED_GAP = 8
"""How far apart instance numbers of one merged mask may be: small instances were dropped."""


@dataclass(frozen=True)
class ReadLimits:
    """What an image file may cost; checked before its pixels are decoded."""

    max_bytes: int = 512 * 1024**2
    max_pixels: int = 80_000_000


@dataclass(frozen=True)
class ImageData:
    """One decoded image.

    Attributes:
        pixels: uint8 [H, W, 3], RGB.
        spacing_mm: (row, column) distance of pixel centres in the patient, in mm; None where the file does not say.
        kind: ``png``, ``jpeg``, ``tiff`` … the file's form, ``dicom``, ``pil`` or ``array``.
    """

    pixels: np.ndarray
    spacing_mm: tuple[float, float] | None
    kind: str

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


def read_image(source: ImageSource, limits: ReadLimits | None = None) -> ImageData:
    """Decode one image to 8-bit RGB.

    16-bit, 32-bit and float images, which carry no window of their own, are scaled linearly from their smallest to
    their largest value; transparency is laid on black; the EXIF orientation is applied. DICOM: see ``dicom.py``.

    Args:
        source: path, encoded bytes, binary file object, PIL image, or array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        limits: size limits; the defaults of ``ReadLimits`` if None.

    Raises:
        MedPLIBError: unreadable, truncated, oversized, several frames or pages, or no image at all.
    """
    limits = limits or ReadLimits()
    if isinstance(source, np.ndarray):
        _check_pixels(source.shape[:2], "the array", limits)
        return ImageData(_array_to_rgb(source), None, "array")
    if isinstance(source, Image.Image):
        _check_pixels(source.size[::-1], "the PIL image", limits)
        return ImageData(_decode("the PIL image", lambda: _pil_to_rgb(source)), None, "pil")
    name, content = _content(source, limits)
    if _is_dicom(name, content):
        pixels, spacing = read_dicom(content, name, limits.max_pixels)
        return ImageData(pixels, spacing, "dicom")
    image = _open(name, content, limits)
    kind = (image.format or "image").lower().replace("mpo", "jpeg")
    return ImageData(_decode(name, lambda: _pil_to_rgb(image)), None, kind)


def read_mask(source: ImageSource, limits: ReadLimits | None = None) -> np.ndarray:
    """Decode one mask; every pixel that is not zero (in any channel, in the palette's colours) is foreground.

    A path ``masks_merged/<image>--<class>_merged.png`` that does not exist is put together from the instance files
    beside it, see ``mask_files``.

    Returns:
        bool [H, W].

    Raises:
        MedPLIBError: as ``read_image``, and where instance files of one merged mask differ in size.
    """
    limits = limits or ReadLimits()
    if isinstance(source, str | Path):
        parts = [_read_one_mask(path, limits) for path in mask_files(source) or (Path(source),)]
        if any(part.shape != parts[0].shape for part in parts):
            raise MedPLIBError(f"the instance masks of {source} differ in size; merge them by hand")
        return np.logical_or.reduce(parts)
    return _read_one_mask(source, limits)


def read_labels(source: str | Path, limits: ReadLimits | None = None) -> np.ndarray:
    """Decode a label map: the number that each pixel holds, of a picture with a palette the number in it.

    Returns:
        int64 [H, W].

    Raises:
        MedPLIBError: as ``read_mask``, and where a pixel is a colour and no number.
    """
    limits = limits or ReadLimits()
    name, content = _content(source, limits)
    if _is_dicom(name, content):
        raise MedPLIBError(f"{name} is a DICOM file; a label map is a PNG or another plain image")
    image = _open(name, content, limits)
    values = _decode(name, lambda: np.asarray(image))
    if values.ndim == 3 and (values[..., :3] == values[..., :1]).all():  # grey saved as colour
        values = values[..., 0]
    if values.ndim != 2 or (values.dtype.kind == "f" and (values != np.rint(values)).any()):
        raise MedPLIBError(f"{name} holds colours or fractions; a label map holds one whole number for each pixel")
    return values.astype(np.int64)


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file; a name the file system refuses is not one."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def mask_files(path: str | Path) -> tuple[Path, ...]:
    """Files that make the mask ``path``: itself, or the instances of a merged mask; empty where there is none.

    The published records point to ``masks_merged/<image>--<class>_merged.png``; the public data set holds only
    ``masks/<image>--<class>_000.png``, ``_001.png`` …, whose union it is (reference §8).
    """
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


def _read_one_mask(source: ImageSource, limits: ReadLimits) -> np.ndarray:
    if isinstance(source, np.ndarray):
        return _foreground(source, "the mask array")
    if isinstance(source, Image.Image):
        return _decode("the PIL image", lambda: _foreground(_pil_values(source), "the PIL image"))
    name, content = _content(source, limits)
    if _is_dicom(name, content):
        raise MedPLIBError(f"{name} is a DICOM file; a mask is a PNG or another plain image")
    image = _open(name, content, limits)
    if "16B" in str(getattr(image, "tile", "")) and image.mode not in _WIDE_MODES:
        return _decode(name, lambda: _foreground(_decode_wide_colour(content), name))
    return _decode(name, lambda: _foreground(_pil_values(image), name))


def _decode_wide_colour(content: bytes) -> np.ndarray:
    """16-bit colour, whose low byte PIL throws away."""
    import cv2

    pixels = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    if pixels is None:
        raise OSError("16-bit colour that cannot be decoded")
    return pixels


def _content(source: str | Path | bytes | BinaryIO, limits: ReadLimits) -> tuple[str, bytes]:
    """A name for messages and the encoded bytes, at most ``limits.max_bytes`` of them."""
    if isinstance(source, str | Path):
        path, name = Path(source), str(source)
        try:
            if path.is_dir():
                raise MedPLIBError(f"{name} is a folder; give one image file")
            with path.open("rb") as stream:
                content = stream.read(limits.max_bytes + 1)
        except OSError as error:
            raise MedPLIBError(f"cannot open the image {name}: {error.strerror or 'it cannot be read'}") from error
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
            f"{name} is larger than the limit of {limits.max_bytes / 1024**2:.0f} MiB; give a smaller file"
        )
    if not content:
        raise MedPLIBError(f"{name} is empty; give an image")
    return name, content


def _is_dicom(name: str, content: bytes) -> bool:
    return content[128:132] == b"DICM" or name.lower().endswith((".dcm", ".dicom"))


def _open(name: str, content: bytes, limits: ReadLimits) -> Image.Image:
    """The image's header; pixels are decoded later."""
    if content.startswith((b"\x1f\x8b", b"PK")):
        raise MedPLIBError(f"{name} is a compressed archive, not an image; unpack it first")
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise MedPLIBError(
            f"{name} has more pixels than the limit of {limits.max_pixels:,}; shrink it first"
        ) from error
    except Exception as error:  # PIL's plugins raise whatever a broken header makes them
        raise MedPLIBError(f"{name} is not a readable image; PNG, JPEG, TIFF, BMP or DICOM was expected") from error
    _check_pixels(image.size[::-1], name, limits)
    if image.format in ("JPEG", "MPO"):
        check_scans(content, name)
    # Counting them would take minutes where a file was made for that.
    several = _decode(name, lambda: getattr(image, "is_animated", False))
    if several and image.format != "MPO":  # a camera's JPEG with its preview
        raise MedPLIBError(f"{name} holds several images in one file; extract the one to look at")
    return image


def _check_pixels(shape: tuple[int, ...], name: str, limits: ReadLimits) -> None:
    pixels = int(np.prod([int(side) for side in shape]))
    if pixels > limits.max_pixels:
        sides = " × ".join(str(side) for side in shape)
        raise MedPLIBError(f"{name} has {sides} pixels, more than the limit of {limits.max_pixels:,}; shrink it first")


def _decode(name: str, decode: Callable[[], Result]) -> Result:
    try:
        return decode()
    except MedPLIBError:
        raise
    except Exception as error:  # a broken file makes decoders raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MedPLIBError(f"{name} cannot be decoded ({reason}); the file is damaged or cut short") from error


def _pil_values(image: Image.Image) -> np.ndarray:
    """Pixels [H, W] or [H, W, 3], upright, colours resolved, transparency on black; wide grey values are kept."""
    image = ImageOps.exif_transpose(image)
    if image.mode in _WIDE_MODES or image.mode in ("L", "RGB"):
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _pil_to_rgb(image: Image.Image) -> np.ndarray:
    return _array_to_rgb(_pil_values(image))


def _array_to_rgb(values: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of an array of any real type, [H, W] or with 1, 3 or 4 channels."""
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or 0 in values.shape:
        raise MedPLIBError(f"expected image values [H, W], [H, W, 3] or [H, W, 4], got shape {list(values.shape)}")
    if values.ndim == 3 and values.shape[2] == 4:
        opaque = scale_to_uint8(values[:, :, 3]).astype(np.uint16) if values.dtype != np.uint8 else values[:, :, 3]
        colours = scale_to_uint8(values[:, :, :3])
        values = (colours * (opaque[:, :, None] / 255.0) + 0.5).astype(np.uint8)
    values = scale_to_uint8(values)
    return np.ascontiguousarray(np.repeat(values[:, :, None], 3, axis=2) if values.ndim == 2 else values)


def _foreground(values: np.ndarray, name: str) -> np.ndarray:
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise MedPLIBError(f"{name} has shape {list(values.shape)}; a mask is [H, W]")
    return values != 0 if values.ndim == 2 else (values != 0).any(axis=2)
