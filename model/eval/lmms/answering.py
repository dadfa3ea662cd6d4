"""Requests of the harness → the engine → text, in the order asked, with what could not be answered told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from model.errors import MedPLIBError
from model.inference.answer import Answer
from model.inference.engine import Engine, Request
from model.inference.images import ImageSource
from model.inference.regions import Region
from model.processing.special_tokens import IMAGE_TOKEN

logger = logging.getLogger(__name__)

_TOLD = 5  # failures told one by one


@dataclass(frozen=True)
class PointedRegion:
    """A visual that stands for a ``<region></region>`` of the question: a mask file, array, box or point."""

    region: Region


@dataclass(frozen=True)
class Visuals:
    """What a question is about: its image, None for a text alone, and the regions it points at."""

    image: ImageSource | None
    regions: tuple[Region, ...] = ()


def read_visuals(found: Any) -> Visuals:
    """Sort what a task's ``doc_to_visual`` gave.

    Args:
        found: None or a list of images (PIL, paths, arrays) and ``PointedRegion``.

    Raises:
        MedPLIBError: there are several images, or something that is none.
    """
    items = [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
    regions = tuple(item.region for item in items if isinstance(item, PointedRegion))
    images = [item for item in items if not isinstance(item, PointedRegion)]
    for image in images:
        if not isinstance(image, str | bytes | Image.Image | np.ndarray):
            raise MedPLIBError(f"the task shows {type(image).__name__}; MedPLIB reads images alone")
    if len(images) > 1:
        raise MedPLIBError(f"the task shows {len(images)} images at once; MedPLIB is asked about one")
    return Visuals(images[0] if images else None, regions)


def plain_question(context: str) -> str:
    """The harness's context without image markers; the prompt puts the image in its place."""
    return context.replace(IMAGE_TOKEN, "").strip()


def answer_in_order(
    engine: Engine, makers: Sequence[Callable[[], Request]], *, shown: bool = False
) -> list[Answer | MedPLIBError]:
    """Answer requests, each made when the engine has room for it, so that their images are not all held at once.

    Args:
        engine: keeps its slots full.
        makers: make one request each.
        shown: draw a progress bar.

    Returns:
        Per maker its answer, or what was wrong with its request.
    """
    outcomes: list[Answer | MedPLIBError | None] = [None] * len(makers)
    places: list[int] = []

    with tqdm(total=len(makers), unit="answer", desc="MedPLIB", disable=None if shown else True) as bar:

        def stream() -> Iterator[Request]:
            for place, make in enumerate(makers):
                try:
                    request = make()
                except (MedPLIBError, OSError) as error:
                    outcomes[place] = _told_in_a_sentence(error)
                    bar.update()
                    continue
                places.append(place)
                yield request

        for number, outcome in engine.answer_all(stream()):
            outcomes[places[number]] = outcome
            bar.update()
    return [outcome for outcome in outcomes if outcome is not None]


def _told_in_a_sentence(error: MedPLIBError | OSError) -> MedPLIBError:
    return error if isinstance(error, MedPLIBError) else MedPLIBError(f"the image cannot be read: {error}")


def tell_failures(outcomes: Sequence[Answer | MedPLIBError], names: Sequence[str]) -> None:
    """Warn of requests without an answer, which the harness counts as wrong.

    Args:
        outcomes: of ``answer_in_order``.
        names: of the requests, for people.

    Raises:
        MedPLIBError: not one was answered, so that the task is not for this model.
    """
    failed = [
        (name, outcome) for name, outcome in zip(names, outcomes, strict=True) if isinstance(outcome, MedPLIBError)
    ]
    if not failed:
        return
    if len(failed) == len(outcomes):
        raise MedPLIBError(f"none of the {len(failed)} questions could be answered; the first: {failed[0][1]}")
    for name, error in failed[:_TOLD]:
        logger.warning("%s has no answer and counts as wrong: %s", name, error)
    logger.warning("%d of %d questions have no answer and count as wrong", len(failed), len(outcomes))


def text_with_masks(answer: Answer) -> str:
    """The text, and behind it its masks as ``<mask>{…}</mask>`` in the order of their ``<SEG>``.

    The harness hands text to the scoring of a task and nothing else. Data files write the paths of masks in the same
    place (reference §8); here stands what ``Mask.to_dict`` gives, as JSON.
    """
    masks = (json.dumps(mask.to_dict(), ensure_ascii=False).replace("</", "<\\/") for mask in answer.masks)
    return answer.text + "".join(f"<mask>{mask}</mask>" for mask in masks)
