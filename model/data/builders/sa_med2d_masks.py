"""Masks of SA-Med2D-20M: the instances of a class, checked, and joined under the published name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from model.data.builders.jobs import Part, whole_file
from model.data.image_io import MERGED_GAP, read_mask
from model.errors import MedPLIBError

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


class MaskFault(Exception):
    """Why a target cannot be used: a stable word, and a sentence."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) by the file's header.

    Raises:
        MaskFault: the image cannot be read.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MaskFault("unreadable_image", f"the image {path} cannot be read ({error})") from error
    return height, width


def usable_mask(files: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
    """The union of instance masks, bool [H, W], at least one pixel set.

    Raises:
        MaskFault: one is unreadable or is not of the image's ``size``, or there is no foreground.
    """
    joined = np.zeros(size, dtype=bool)
    for file in files:
        try:
            mask = read_mask(file)
        except MedPLIBError as error:
            kind = "unreadable_mask" if file.exists() else "missing_mask"
            raise MaskFault(kind, str(error)) from error
        if mask.shape != size:
            raise MaskFault(
                "size_mismatch",
                f"the mask {file} is {mask.shape[0]} × {mask.shape[1]} (h × w), its image {size[0]} × {size[1]}",
            )
        joined |= mask
    if not joined.any():
        raise MaskFault(
            "empty_mask", f"the mask {files[0]} has no foreground pixel" + " in any instance" * (len(files) > 1)
        )
    return joined


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write a mask as PNG with values 0 and 255, whole or not at all."""
    done, buffer = cv2.imencode(".png", mask.astype(np.uint8) * 255, [cv2.IMWRITE_PNG_COMPRESSION, 4])
    if not done:
        raise OSError(f"cannot encode {path}")
    with whole_file(path) as stream:
        stream.write(buffer.tobytes())


def is_whole_png(path: Path) -> bool:
    """Whether a file begins and ends as a PNG does: one that was cut short does not."""
    try:
        with path.open("rb") as stream:
            head = stream.read(len(_PNG_START))
            stream.seek(-len(_PNG_END), 2)
            return head == _PNG_START and stream.read() == _PNG_END
    except OSError:
        return False


def merge_or_check(target: Path, instances: list[Path], size: tuple[int, int], merge: bool, part: Part) -> None:
    """Look at a merged mask, or at its instances where it is not there, and write it if ``merge``.

    Raises:
        MaskFault: the mask cannot be used.
    """
    if is_whole_png(target):
        usable_mask([target], size)
        part.count("merged masks", "there already")
        return
    mask = usable_mask(instances, size)
    if merge:
        write_mask(target, mask)
        part.count("merged masks", "written")


def check_reach(target: Path, instances: list[int]) -> None:
    """A reader that finds no merged file looks for instances by number, and gives up after a gap.

    Raises:
        MaskFault: it would not find all.
    """
    if any(later - earlier > MERGED_GAP for earlier, later in pairwise([-1, *instances])) and not target.exists():
        raise MaskFault(
            "gap_in_instances",
            f"{target.name}: the numbers of its {len(instances)} instances leave gaps too wide for a reader; merge "
            "them with --merge asked",
        )
