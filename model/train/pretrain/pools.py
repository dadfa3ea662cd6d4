"""Pools that pre-training reads again and again: phantom scenes, pictures with named masks, simulated prompts."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.image_io import read_image, read_mask
from model.data.phantom import PhantomStream, render_workers
from model.data.phantom.questions import Question
from model.data.phantom.scenes import MODALITIES
from model.errors import MedPLIBError
from model.processing.images import SAM_MEAN, centre_offset, resized_size

SIDE = 256
_PADDING = (123, 116, 104)  # SAM's mean colour, rounded: zero after its normalisation, and CLIP's padding within 1
_MASK = re.compile(r"<mask>(.*?)</mask>")


class ScenePool:
    """Scenes rendered once: pictures, label maps and questions.

    Attributes:
        images: uint8 [N, 256, 256, 3], scaled to 256 on the longest side and padded centred (reference §3).
        labels: uint8 [N, 256, 256], class id of every pixel, 0 is background and padding.
        modalities: uint8 [N], index into ``MODALITIES``.
        questions: per scene, its questions.
    """

    def __init__(self, folder: Path) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy", mmap_mode="r")
        with (folder / "questions.jsonl").open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        self.modalities = np.array([record["modality"] for record in records], np.uint8)
        self.questions = [
            [Question(**{**item, **{name: tuple(item[name]) for name in ("regions", "targets")}}) for item in asked]
            for asked in (record["questions"] for record in records)
        ]

    def __len__(self) -> int:
        return len(self.images)


def render_pool(folder: Path, num_scenes: int, seed: int, workers: int = 1) -> ScenePool:
    """Render ``num_scenes`` scenes into ``folder``, or open the pool that is already there.

    A tenth of the scenes is not square, as in the data sets that ``build_phantoms`` writes.
    """
    if not (folder / "questions.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (num_scenes, SIDE, SIDE, 3))
        labels = np.lib.format.open_memmap(folder / "labels.npy", "w+", np.uint8, (num_scenes, SIDE, SIDE))
        lines = []
        with render_workers(workers) as executor:
            jobs = ((seed, index) for index in range(num_scenes))
            for index, (image, label, line) in enumerate(executor.map(_render, jobs, chunksize=32)):
                images[index], labels[index] = image, label
                lines.append(line)
        images.flush()
        labels.flush()
        temporary = folder / "questions.jsonl.tmp"
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(folder / "questions.jsonl")
    return ScenePool(folder)


def clip_pictures(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Shrink pool pictures uint8 [N, 256, 256, 3] to CLIP's input side, antialiased."""
    return np.stack([cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images])


def _render(job: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], str]:
    seed, index = job
    scene, questions = PhantomStream(seed, size=SIDE, odd_shapes=True).item(index)
    record = {"modality": MODALITIES.index(scene.modality), "questions": [asdict(question) for question in questions]}
    image = _padded(scene.image, cv2.INTER_AREA, _PADDING)
    label = _padded(scene.label_map(), cv2.INTER_NEAREST, (0, 0, 0))
    return image, label, json.dumps(record)


def _padded(picture: NDArray[np.uint8], interpolation: int, padding: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Longest side to 256, then centred padding; the odd pixel goes to the right and the bottom."""
    height, width = picture.shape[:2]
    scale = SIDE / max(height, width)
    height, width = int(height * scale + 0.5), int(width * scale + 0.5)
    if picture.shape[:2] != (height, width):
        picture = np.asarray(cv2.resize(picture, (width, height), interpolation=interpolation), np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    bottom, right = SIDE - height - top, SIDE - width - left
    padded = cv2.copyMakeBorder(picture, top, bottom, left, right, cv2.BORDER_CONSTANT, value=padding)
    return np.asarray(padded, np.uint8)


# --- pictures with named masks ----------------------------------------------------------------------------------------


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


# --- simulated prompts ------------------------------------------------------------------------------------------------


def draw_boxes(targets: NDArray[np.bool_], rng: np.random.Generator, jitter: float = 0.08) -> Tensor:
    """Bounding boxes (x1, y1, x2, y2) in pixels, float32 [M, 4], of masks [M, S, S] that are not empty.

    ``jitter`` is the standard deviation of a box's corners, as a share of its sides.
    """
    boxes = np.zeros((len(targets), 4), np.float32)
    for box, target in zip(boxes, targets, strict=True):
        left, top, width, height = cv2.boundingRect(target.astype(np.uint8))
        corners = np.array([left, top, left + width, top + height])
        box[:] = np.clip(corners + rng.normal(0, jitter, 4) * ([width, height] * 2), 0, len(target))
    return torch.from_numpy(boxes)


def draw_clicks(
    targets: NDArray[np.bool_], masks: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """One click per mask, where a user would correct it: inside the largest region that is wrong.

    ``targets`` [M, S, S] are wanted, ``masks`` are there (all False for a first click). Returns points float32 [M, 1,
    2] as (x, y) in pixels and labels long [M, 1], 1 to add and 0 to take away.
    """
    points, labels = np.zeros((len(targets), 1, 2), np.float32), np.ones((len(targets), 1), np.int64)
    for row, (target, mask) in enumerate(zip(targets, masks, strict=True)):
        wrong = target ^ mask
        if not wrong.any():
            wrong = target
        count, parts, stats, _ = cv2.connectedComponentsWithStats(wrong.astype(np.uint8), connectivity=4)
        largest = parts == 1 + int(np.argmax(stats[1:count, cv2.CC_STAT_AREA]))
        # A border of zeros: the picture's edge is an edge of the region, too.
        depth = cv2.distanceTransform(np.pad(largest.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
        candidates = np.argwhere(depth >= rng.uniform(0.3, 1) * depth.max())
        y, x = candidates[rng.integers(len(candidates))]
        points[row, 0], labels[row, 0] = (x, y), int(target[y, x])
    return torch.from_numpy(points), torch.from_numpy(labels)
