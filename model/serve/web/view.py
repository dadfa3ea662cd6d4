"""State of the page for the browser: the image with its masks and marks, the list of masks, the conversation."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from model import shipped
from model.processing.special_tokens import IMAGE_TOKEN
from model.serve.web.chat import messages
from model.serve.web.downloads import kinds
from model.serve.web.pictures import colour, overlay
from model.serve.web.state import Picture, Session

SAMPLE = shipped("data/sample")
GENERAL_QUESTIONS = ("What kind of medical image is this?", "List the structures that you can see.")
REGION_QUESTION = "What is in the region?"
_NAMES = {"ct": "CT", "mr": "MR", "pet": "PET", "x_ray": "X-ray"}
_THUMBNAIL = 112  # pixels, longer side
_SHORTEST, _LONGEST = 960, 1600  # pixels of the longer side as shown: small pictures are enlarged, so contours are fine
_STRETCH = 20.0  # times longer than wide, a pixel is shown as at most
_LOSSLESS_PIXELS = 1_200_000
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Example:
    """A picture to try.

    Attributes:
        path: its file.
        label: what kind of picture it is.
        thumbnail: a small one as a data URI.
        questions: that can be asked about it.
    """

    path: Path
    label: str
    thumbnail: str
    questions: tuple[str, ...] = field(default=GENERAL_QUESTIONS)


def find_examples(folder: Path = SAMPLE) -> list[Example]:
    """One picture of each modality; none where the folder is not there, as in an installed package."""
    file = folder / "held_out.json"
    if not file.is_file():
        return []
    records: dict[str, list[dict[str, Any]]] = {}
    for record in json.loads(file.read_text(encoding="utf-8")):
        records.setdefault(record["image"], []).append(record)
    found: dict[str, Example] = {}
    for image, about in records.items():
        modality = about[0]["modality"]
        pixels = cv2.imread(str(folder / image))
        if modality not in found and pixels is not None:
            label = _NAMES.get(modality, modality.replace("_", " ").capitalize())
            scale = _THUMBNAIL / max(pixels.shape[:2])
            small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            found[modality] = Example(folder / image, label, _data_uri("jpeg", small), _questions(about))
    return list(found.values())


def _questions(records: list[dict[str, Any]]) -> tuple[str, ...]:
    asked = [GENERAL_QUESTIONS[0]]
    for kind in ("grounding", "presence", "list"):
        record = next((record for record in records if record.get("kind") == kind), None)
        if record is not None:
            asked.append(record["conversations"][0]["value"].replace(IMAGE_TOKEN, "").strip())
    return tuple(dict.fromkeys(asked))


def viewer(session: Session, tools: bool) -> dict[str, Any]:
    """The picture with its masks laid over, and the marks that the browser draws itself.

    Args:
        session: the visitor's.
        tools: whether regions can be marked.
    """
    picture = session.picture
    if picture is None:
        return {"picture": None, "marks": [], "tools": tools}
    height, width = picture.size
    marks = [mark.describe(number) for number, mark in enumerate(session.marks, start=1)]
    if not marks:
        marks = [mark.describe(number, True) for number, mark in enumerate(session.spent, start=1)]
    pixels = _composed(session, picture)[:, :, ::-1]
    if pixels.shape[0] * pixels.shape[1] <= _LOSSLESS_PIXELS:
        source = _data_uri("png", pixels, cv2.IMWRITE_PNG_COMPRESSION, 2)
    else:
        source = _data_uri("jpeg", pixels, cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY)
    shown = {"src": source, "width": width, "height": height}
    rows, columns = picture.volume.spacing_mm or (1.0, 1.0)  # pixels need not be square, least of all across slices
    shown["ratio"] = width / height * min(max(columns / rows, 1 / _STRETCH), _STRETCH)
    return {"picture": shown | {"label": describe(picture)}, "marks": marks, "tools": tools}


def describe(picture: Picture) -> str:
    """The picture in a few words."""
    height, width = picture.size
    parts = [picture.volume.name, f"{width} × {height} px"]
    if picture.volume.num_slices > 1:
        parts.append(f"slice {picture.index + 1} of {picture.volume.num_slices}")
    if picture.volume.spacing_mm is not None:
        rows, columns = picture.volume.spacing_mm
        parts.append(f"{columns:.3g} × {rows:.3g} mm per pixel")
    return " · ".join([*parts, *picture.volume.notes])


def masks(session: Session, download: dict[str, Any] | None = None) -> dict[str, Any]:
    """The masks that fit what is looked at, and a file to be saved by the browser where one was asked for."""
    rows = []
    for number, exchange, place in session.masks_here():
        mask = exchange.masks[place]
        red, green, blue = colour(number)
        rows.append(
            {
                "id": [exchange.number, place],
                "number": number + 1,
                "colour": f"rgb({red},{green},{blue})",
                "label": mask.label or f"mask {number + 1}",
                "score": f"{mask.score:.2f}",
                "area": _area(mask.area_px, mask.area_mm2),
                "warning": mask.warning,
                "shown": exchange.shown[place],
            }
        )
    offered = list(kinds(session.picture.volume)) if session.picture is not None else []
    return {"rows": rows, "kinds": offered, "download": download}


def talk(session: Session, questions: tuple[str, ...] = ()) -> dict[str, Any]:
    """The conversation; while there is none, questions to begin with."""
    suggestions: tuple[str, ...] = ()
    if session.picture is not None and not session.exchanges:
        suggestions = (REGION_QUESTION,) if session.marks else questions or GENERAL_QUESTIONS
    return {
        "messages": messages(session),
        "busy": session.busy,
        "suggestions": list(suggestions),
        "picture": session.picture is not None,
    }


def _area(pixels: int, mm2: float | None) -> str:
    if not pixels:
        return "empty"
    return f"{pixels:,} px" if mm2 is None else f"{pixels:,} px · {mm2:,.1f} mm²"


def _composed(session: Session, picture: Picture) -> np.ndarray:
    """Pixels with masks over them, at the size they are shown in."""
    height, width = picture.size
    scale = min(max(1.0, min(_SHORTEST / max(height, width), 8.0)), _LONGEST / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    smooth = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    pixels = picture.pixels if scale == 1 else cv2.resize(picture.pixels, size, interpolation=smooth)
    here = {number for number, _, _ in session.masks_here()}
    laid: list[np.ndarray] = []
    shown: list[bool] = []
    for number, exchange, place in session.masks():  # all of them: their place in the list is their colour
        drawn = number in here and exchange.shown[place]
        shown.append(drawn)
        mask = exchange.masks[place].to_array() if drawn else np.zeros((1, 1), dtype=bool)
        if drawn:  # edges that are smooth rather than stairs
            mask = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) >= 0.5
        laid.append(mask)
    return overlay(pixels, laid, shown, session.opacity, session.contour)


def _data_uri(kind: str, pixels: np.ndarray, *options: int) -> str:
    encoded = cv2.imencode(f".{kind}", pixels, options)[1]
    return f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode('ascii')}"
