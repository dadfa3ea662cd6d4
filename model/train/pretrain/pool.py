"""A pool of rendered phantom scenes on disk, as arrays that every pre-training step reads again and again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from model.data.phantom import PhantomStream, render_workers
from model.data.phantom.questions import Question
from model.data.phantom.scenes import MODALITIES

SIDE = 256
_PADDING = (123, 116, 104)  # SAM's mean colour, rounded: zero after its normalisation, and CLIP's padding within 1


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
