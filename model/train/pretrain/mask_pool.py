"""Grounding records of built folders as arrays: pictures of 256 pixels with named masks and absent names."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from model.data.image_io import read_image, read_mask
from model.errors import MedPLIBError
from model.processing.images import SAM_MEAN, centre_offset, resized_size

SIDE = 256
_MASK = re.compile(r"<mask>(.*?)</mask>")


class MaskPool:
    """Pictures with named masks.

    Attributes:
        images: uint8 [N, 256, 256, 3], scaled to 256 on the longest side and padded centred (reference §3).
        datasets, modalities: name of each image's.
        names: of all targets, sorted.
        targets: per image, (row of ``masks`` or −1 where the target is absent, index into ``names``).
    """

    def __init__(self, folder: Path) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self._masks = np.load(folder / "masks.npy", mmap_mode="r")  # bits
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.datasets: list[str] = index["datasets"]
        self.modalities: list[str] = index["modalities"]
        self.names: list[str] = index["names"]
        self.targets: list[list[tuple[int, int]]] = [[(row, name) for row, name in image] for image in index["targets"]]

    def mask(self, row: int) -> NDArray[np.uint8]:
        """Mask [256, 256] in {0, 1}; zeros for row −1."""
        if row < 0:
            return np.zeros((SIDE, SIDE), np.uint8)
        return np.unpackbits(self._masks[row]).reshape(SIDE, SIDE)

    def subset(self, places: Sequence[int]) -> MaskPool:
        """The images at ``places`` as a pool of their own, with the same names."""
        part = copy(self)
        part.images = self.images[list(places)]
        part.datasets = [self.datasets[place] for place in places]
        part.modalities = [self.modalities[place] for place in places]
        part.targets = [self.targets[place] for place in places]
        return part

    def groups(self) -> dict[tuple[str, str], list[int]]:
        """Images of each data set and modality."""
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        for image, key in enumerate(zip(self.datasets, self.modalities, strict=True)):
            found[key].append(image)
        return dict(found)


def build_mask_pool(
    folder: Path,
    sources: Sequence[tuple[str, Path, Path]],
    progress: Callable[[], object] = lambda: None,
    names: Sequence[str] = (),
) -> MaskPool:
    """Read the grounding records of several folders, or open the pool that is there.

    Args:
        folder: of the pool.
        sources: (name of the data set, record file, folder that its paths start from).
        progress: called after each picture.
        names: of another pool, to number targets alike; those not among them are left out.

    Raises:
        MedPLIBError: a record names no target, or a file cannot be read.
    """
    if (folder / "index.json").exists():
        return MaskPool(folder)
    found = grounding_targets(sources)
    names = list(names) or sorted({name for _, _, targets in found for name, _ in targets})
    folder.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (len(found), SIDE, SIDE, 3))
    masks: list[NDArray[np.uint8]] = []
    table = []
    for place, (_, _, targets) in enumerate(found):
        images[place] = fit_square(read_image(found[place][0]).pixels)
        rows = []
        for name, path in (target for target in targets if target[0] in names):
            rows.append((len(masks) if path else -1, names.index(name)))
            if path:
                masks.append(np.packbits(fit_square(read_mask(path).astype(np.uint8) * 255)[..., 0] > 127))
        table.append(rows)
        progress()
    images.flush()
    np.save(folder / "masks.npy", np.stack(masks))
    index = {
        "names": names,
        "datasets": [dataset for _, (dataset, _), _ in found],
        "modalities": [modality for _, (_, modality), _ in found],
        "targets": table,
    }
    temporary = folder / "index.json.part"
    temporary.write_text(json.dumps(index), encoding="utf-8")
    temporary.replace(folder / "index.json")
    return MaskPool(folder)


Listed = tuple[Path, tuple[str, str], list[tuple[str, Path | None]]]
"""(image, (data set, modality), [(name, mask or None where absent)])."""


def grounding_targets(sources: Sequence[tuple[str, Path, Path]]) -> list[Listed]:
    """What each picture with grounding records shows; arguments as of ``build_mask_pool``."""
    found: dict[Path, Listed] = {}
    for dataset, file, root in sources:
        for record in json.loads(file.read_text(encoding="utf-8")):
            if record.get("kind") not in ("grounding", "grounding_absent"):
                continue  # of two structures at once, which come alone as well
            if not record.get("about"):
                raise MedPLIBError(f"record {record.get('id')} of {file} has no 'about', the name of its target")
            image = root / record["image"]
            paths = _MASK.findall(record["conversations"][1]["value"])
            entry = found.setdefault(image, (image, (dataset, record.get("modality", "")), []))
            target = (record["about"], root / paths[0] if paths else None)
            if target not in entry[2]:
                entry[2].append(target)
    return list(found.values())


def fit_square(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] or a mask [H, W] in {0, 255} → [256, 256, 3 or 1], longest side 256, padded centred."""
    size = resized_size((pixels.shape[0], pixels.shape[1]), SIDE)
    shrinks = max(pixels.shape[:2]) > SIDE
    resized = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    resized = resized.reshape(*size, -1)
    square = np.zeros((SIDE, SIDE, resized.shape[2]), np.uint8)
    if resized.shape[2] == 3:
        square[:] = np.rint(SAM_MEAN).astype(np.uint8)
    top, left = centre_offset(size, SIDE)
    square[top : top + size[0], left : left + size[1]] = resized
    return square
