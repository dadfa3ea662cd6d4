"""Image cache: each image is read and encoded once and kept by its content, within a bound."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image

from model.data.image_io import ImageData, is_file, read_image
from model.errors import MedPLIBError
from model.processing.processor import MedPLIBProcessor

ImageSource = Any
"""A path, bytes, a file object, a PIL image, an array H×W(×3), or what ``read_image`` gave."""


class Sized(Protocol):
    """Something that knows its size."""

    @property
    def num_bytes(self) -> int:
        """Bytes it holds."""
        ...


Value = TypeVar("Value", bound=Sized)


@dataclass(eq=False)
class PreparedImage:
    """An image whose encodings are computed once.

    Attributes:
        key: digest of the content.
        data: the pixels and what the file knew about them.
        clip_input: CLIP input [1, 3, s, s].
        sam_input: SAM input [1, 3, S, S]; ``sam_size`` its (height, width) before padding.
        image_features: CLIP patch features [1, P, Dv], computed at the first question.
        sam_embedding: SAM embedding [1, C, s, s], computed at the first ``<SEG>``.
    """

    key: str
    data: ImageData
    clip_input: torch.Tensor
    sam_input: torch.Tensor
    sam_size: tuple[int, int]
    image_features: torch.Tensor | None = None
    sam_embedding: torch.Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the original."""
        return self.data.pixels.shape[:2]

    @property
    def num_bytes(self) -> int:
        """Bytes of pixels, inputs and encodings, those to come included as far as they are known."""
        tensors = (self.clip_input, self.sam_input, self.image_features, self.sam_embedding)
        return self.data.pixels.nbytes + sum(tensor.nbytes for tensor in tensors if tensor is not None)


def prepare_image(source: ImageSource, processor: MedPLIBProcessor) -> PreparedImage:
    """Read an image and make the inputs of both towers.

    Raises:
        MedPLIBError: the image cannot be read.
    """
    source = reusable(source)
    key = content_key(source)
    data = source if isinstance(source, ImageData) else read_image(source)
    clip, sam, sam_size = processor.image_inputs(data.pixels)
    return PreparedImage(key, data, clip[None], sam[None], sam_size)


def content_key(source: ImageSource) -> str:
    """Digest of an image's content; two files with the same bytes have the same one, wherever they lie.

    What cannot be read has some key too: it is for the reader to complain.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, ImageData):
        digest.update(f"read {source.spacing_mm}".encode())
        source = source.pixels
    if isinstance(source, str | Path):
        with contextlib.suppress(OSError):
            if is_file(Path(source)):
                with Path(source).open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
    elif isinstance(source, bytes):
        digest.update(source)
    elif isinstance(source, Image.Image):
        digest.update(f"{source.mode} {source.size}".encode())
        with contextlib.suppress(Exception):  # a broken file makes decoders raise nearly anything
            digest.update(f" {source.getexif().get(ExifTags.Base.Orientation)}".encode())
            digest.update((source.convert("RGBA") if source.mode in ("P", "PA") else source).tobytes())
    elif isinstance(source, np.ndarray):
        digest.update(f"{source.dtype.str} {source.shape}".encode())
        digest.update(np.ascontiguousarray(source).tobytes())
    return digest.hexdigest()


def reusable(source: ImageSource) -> ImageSource:
    """A file object's bytes, for it can be read only once; anything else as it is.

    Raises:
        MedPLIBError: the file object cannot be read, or gives text.
    """
    if not hasattr(source, "read"):
        return source
    try:
        content = source.read()
    except (OSError, ValueError) as error:
        raise MedPLIBError(f"the image stream cannot be read ({error}); give an open file") from error
    if not isinstance(content, bytes):
        raise MedPLIBError(f"the image stream gives {type(content).__name__}; open the file in binary mode")
    return content


class BoundedCache(Generic[Value]):
    """The values used last, as many as fit a number of bytes; safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._values: OrderedDict[object, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object) -> Value | None:
        """The value kept under ``key``, which counts as used."""
        with self._lock:
            value = self._values.get(key)
            if value is None:
                self.misses += 1
                return None
            self.hits += 1
            self._values.move_to_end(key)
            return value

    def put(self, key: object, value: Value) -> None:
        """Keep a value; what was not used for longest makes room. A value larger than the bound is not kept."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            self._shrink()

    def keep(self, key: object, value: Value) -> Value:
        """The value that is kept under ``key`` already; else this one, kept from now on."""
        with self._lock:
            value = self._values.setdefault(key, value)
            self._values.move_to_end(key)
            self._shrink()
            return value

    def discard(self, key: object) -> None:
        """Forget the value kept under ``key``, if there is one."""
        with self._lock:
            self._values.pop(key, None)

    def refresh(self) -> None:
        """Make room again after kept values have grown."""
        with self._lock:
            self._shrink()

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        with self._lock:
            return sum(value.num_bytes for value in self._values.values())

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        """Whether a value is kept under ``key``; it does not count as used."""
        return key in self._values

    def _shrink(self) -> None:
        total = sum(value.num_bytes for value in self._values.values())
        while self._values and total > self.max_bytes:
            _, value = self._values.popitem(last=False)
            total -= value.num_bytes
