"""Build a phantom data set on disk: pictures, masks and questions in the published layout and file names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from model.data.builders.jobs import write_json, write_png
from model.data.phantom.questions import Question, ask_all
from model.data.phantom.scenes import CLASS_IDS, CLASS_NAMES, MODALITIES, Scene, render_scene
from model.errors import MedPLIBError

TASKS = ("vqa", "region", "grounding")
_ODD_SHAPES = 0.1
_ODD_SIDES = (0.875, 1.25)


@dataclass(frozen=True)
class PhantomReport:
    """What ``build_phantoms`` wrote: numbers of pictures, masks and records by task."""

    out: Path
    images: int
    masks: int
    records: dict[str, int]


class PhantomStream:
    """Endless scenes with their questions, in memory, for pre-training.

    Item ``i`` depends on ``seed`` and ``i`` alone: it is the picture that ``build_phantoms`` writes as case ``i`` if
    ``odd_shapes`` is true. Without odd shapes all pictures are square, ``size`` pixels a side.
    """

    def __init__(self, seed: int, start: int = 0, *, size: int = 256, odd_shapes: bool = False) -> None:
        self.seed, self.start, self.size, self.odd_shapes = seed, start, size, odd_shapes

    def item(self, index: int) -> tuple[Scene, list[Question]]:
        """Scene number ``index`` and its questions."""
        rng = np.random.default_rng([self.seed, index])
        modality = MODALITIES[index % len(MODALITIES)]
        scene = render_scene(rng, modality, _shape(rng, self.size) if self.odd_shapes else self.size)
        return scene, ask_all(scene, rng)

    def __iter__(self) -> Iterator[tuple[Scene, list[Question]]]:
        index = self.start
        while True:
            yield self.item(index)
            index += 1


def build_phantoms(
    out: Path,
    num_images: int,
    seed: int,
    *,
    size: int = 256,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> PhantomReport:
    """Write ``num_images`` phantom cases below ``out``.

    Makes ``images/``, ``masks/``, ``vqa.json``, ``region.json``, ``grounding.json`` and the two SA-Med2D-20M style
    indices ``SAMed2D_phantom.json`` (image → masks) and ``SAMed2D_phantom_class_mapping_id.json``. The same seed gives
    the same files whatever the number of ``workers``; different seeds give different case names. A tenth of the
    pictures is not square. ``progress(1)`` is called after every picture, as a progress bar's
    ``update`` wants it.
    """
    if seed < 0:
        raise MedPLIBError(f"The phantom seed is {seed}; give 0 or more.")
    if num_images < 1:
        raise MedPLIBError(f"The number of phantom images is {num_images}; give at least 1.")
    if not 64 <= size <= 2048:
        raise MedPLIBError(f"The phantom image size is {size} pixels; give 64 to 2048.")
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    records: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
    index: dict[str, list[str]] = {}
    for case in _cases(out, num_images, seed, size, workers):
        index[case.image] = case.masks
        for task in TASKS:
            records[task] += case.records[task]
        if progress is not None:
            progress(1)
    for task in TASKS:
        write_json(out / f"{task}.json", records[task])
    write_json(out / "SAMed2D_phantom.json", index)
    write_json(out / "SAMed2D_phantom_class_mapping_id.json", {"Phantom": dict(enumerate(CLASS_NAMES))})
    counts = {task: len(found) for task, found in records.items()}
    return PhantomReport(out, num_images, sum(map(len, index.values())), counts)


@dataclass(frozen=True)
class _Case:
    image: str
    masks: list[str]
    records: dict[str, list[dict[str, Any]]]


def _cases(out: Path, num_images: int, seed: int, size: int, workers: int) -> Iterable[_Case]:
    jobs = [(out, seed, index, size) for index in range(num_images)]
    if workers <= 1:
        yield from map(_build_case, jobs)
        return
    with render_workers(workers) as pool:
        yield from pool.map(_build_case, jobs, chunksize=16)


def render_workers(workers: int) -> ProcessPoolExecutor:
    """Processes for rendering, one thread each.

    They start fresh: forked from a process whose libraries already run threads, one can inherit a held lock and hang.
    """
    fresh = get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=fresh, initializer=cv2.setNumThreads, initargs=(1,))


def _build_case(job: tuple[Path, int, int, int]) -> _Case:
    out, seed, index, size = job
    scene, questions = PhantomStream(seed, size=size, odd_shapes=True).item(index)
    stem = f"{scene.modality}_00--Phantom--seed{seed}case{index:06d}--0000"
    image = f"images/{stem}.png"
    grey = bool((scene.image == scene.image[..., :1]).all())
    write_png(out / image, scene.image[..., 0] if grey else scene.image[..., ::-1])
    paths = {}
    for structure in scene.structures:
        paths[structure.name] = f"masks/{stem}--{CLASS_IDS[structure.name]:04d}_000.png"
        write_png(out / paths[structure.name], structure.mask.astype(np.uint8) * 255)
    records: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
    for question in questions:
        number = len(records[question.task])
        name = f"phantom-{seed}-{index:06d}-{question.task}-{number:02d}"
        records[question.task].append(record_of(question, name, image, scene.modality, paths.__getitem__))
    return _Case(image, list(paths.values()), records)


def record_of(
    question: Question, name: str, image: str, modality: str, path_of: Callable[[str], str]
) -> dict[str, Any]:
    """One question as a published record (reference §8), plus ``task``, ``kind``, ``modality``, ``about``."""
    asked, answered = question.published(path_of)
    return {
        "id": name,
        "image": image,
        "conversations": [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answered}],
        "answer_type": question.answer_type,
        "task": question.task,
        "kind": question.kind,
        "modality": modality,
        "about": question.about,
    }


def _shape(rng: np.random.Generator, size: int) -> tuple[int, int]:
    if rng.random() >= _ODD_SHAPES:
        return size, size
    height, width = (round(size * side) for side in rng.uniform(*_ODD_SIDES, 2))
    return height, width
