"""Feature cache: outputs of frozen towers on disk, one file an image."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.data.image_io import ImageData, read_image
from model.data.schema import Sample
from model.errors import MedPLIBError
from model.processing.batching import EncodedSample
from model.processing.images import Size

_NAME, _SIDES = "features", ("height", "width")


class FeatureStore:
    """Outputs of one tower on disk, a file an image; safe for processes and threads that read and write at once.

    An image is known by its path, size and time of change, so one that was changed is a new one."""

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype

    @property
    def bytes_an_image(self) -> int:
        """Bytes of one image's features, the file's head apart."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def holds(self, image: Path) -> bool:
        """Whether an image's features are there whole; a file that a power cut left short is not."""
        try:
            return self._file_of(image).stat().st_size > self.bytes_an_image
        except (FileNotFoundError, NotADirectoryError):
            return False

    def read(self, image: Path) -> torch.Tensor:
        """An image's features. Raises MedPLIBError: they are not there, or damaged."""
        return self._read(image, lambda content: content.get_tensor(_NAME))

    def read_size(self, image: Path) -> Size:
        """(height, width) of an image's pixels; errors as in ``read``."""
        return self._read(image, lambda content: tuple(int(content.metadata()[side]) for side in _SIDES))

    def write(self, image: Path, features: torch.Tensor, size: Size) -> None:
        """Keep an image's features, under another name until they are whole. Raises MedPLIBError: the disk is full, or
        the folder cannot be written."""
        file = self._file_of(image)
        partial = file.with_name(f".{file.stem}.{os.getpid()}.{threading.get_ident()}.partial")
        metadata = {side: str(pixels) for side, pixels in zip(_SIDES, size, strict=True)}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({_NAME: features.detach().cpu().contiguous()}, partial, metadata=metadata)
            partial.replace(file)
        except (SafetensorError, OSError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            reason = getattr(error, "strerror", None) or error
            raise MedPLIBError(
                f"the feature cache {self.folder.parent} cannot be written ({reason}); make room, name another folder "
                "in data.feature_cache, or leave that empty"
            ) from error

    def _file_of(self, image: Path) -> Path:
        path, found = image.absolute(), image.stat()
        key = hashlib.blake2b(f"{path}\0{found.st_size}\0{found.st_mtime_ns}".encode(), digest_size=16).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, image: Path, take: Callable[[Any], Any]) -> Any:
        try:
            file = self._file_of(image)
        except OSError as error:
            raise MedPLIBError(f"cannot open the image {image}: {error.strerror}") from error
        if not file.is_file():
            read_image(image)  # whatever is wrong with it kept it out of the cache
            raise MedPLIBError(
                f"the feature cache {self.folder.parent} does not know {image}, which was changed since the run began; "
                "start anew or go on with --resume"
            )
        try:
            with safe_open(file, "pt") as content:
                return take(content)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise MedPLIBError(
                f"{file} of the feature cache is damaged ({error}); remove it and go on with --resume"
            ) from error


@dataclass(frozen=True)
class CachedFeatures:
    """Features that stand for the pixels of samples."""

    clip: FeatureStore  # of the CLIP tower
    sam: FeatureStore | None  # of SAM's image encoder; None where that learns, and so needs pixels

    @property
    def need_pixels(self) -> bool:
        """Whether images have to be decoded nevertheless."""
        return self.sam is None

    def read_image(self, path: Path) -> ImageData:
        """An image as ``image_io.read_image`` gives it; of one whose pixels nobody needs, the size alone."""
        if self.need_pixels:
            return read_image(path)
        blank = np.broadcast_to(np.uint8(0), (*self.clip.read_size(path), 3))  # takes no memory
        return ImageData(blank, None, "features")

    def lay_over(self, encoded: EncodedSample, sample: Sample) -> EncodedSample:
        """An encoded sample with the features of its images."""
        clip = [self.clip.read(path) for path in sample.images]
        features = torch.stack(clip) if clip else torch.zeros((0, *self.clip.shape), dtype=self.clip.dtype)
        if self.sam is None:
            return replace(encoded, image_features=features)
        if sample.masks:
            embedding = self.sam.read(sample.images[sample.segment_image])
        else:
            embedding = torch.zeros(self.sam.shape, dtype=self.sam.dtype)
        return replace(encoded, image_features=features, sam_embedding=embedding)
