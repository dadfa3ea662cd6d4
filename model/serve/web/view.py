"""What the browser is told to show: the picture with its masks and marks, the list of masks, the conversation."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np

from model.serve.web import drawing
from model.serve.web.chat import messages
from model.serve.web.downloads import kinds
from model.serve.web.examples import GENERAL_QUESTIONS, REGION_QUESTION
from model.serve.web.pictures import colour, overlay
from model.serve.web.state import Picture, Session

_SHORTEST, _LONGEST = 960, 1600  # pixels of the longer side as shown: small pictures are enlarged, so contours are fine
_STRETCH = 20.0  # times longer than wide, a pixel is shown as at most
_LOSSLESS_PIXELS = 1_200_000
_JPEG_QUALITY = 92


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
    marks = [drawing.describe(mark, number) for number, mark in enumerate(session.marks, start=1)]
    if not marks:
        marks = [drawing.describe(mark, number, True) for number, mark in enumerate(session.spent, start=1)]
    shown = {"src": _data_uri(_composed(session, picture)), "width": width, "height": height}
    shown["ratio"] = _ratio(picture)
    return {"picture": shown | {"label": describe(picture)}, "marks": marks, "tools": tools}


def _ratio(picture: Picture) -> float:
    """Width by height as the patient has them: pixels need not be square, least of all across slices."""
    height, width = picture.size
    rows, columns = picture.volume.spacing_mm or (1.0, 1.0)
    return width / height * min(max(columns / rows, 1 / _STRETCH), _STRETCH)


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
        laid.append(_enlarged(exchange.masks[place].to_array(), size) if drawn else np.zeros((1, 1), dtype=bool))
    return overlay(pixels, laid, shown, session.opacity, session.contour)


def _enlarged(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another size (width, height), with edges that are smooth rather than stairs."""
    scaled = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    return scaled >= 0.5


def _data_uri(pixels: np.ndarray) -> str:
    if pixels.shape[0] * pixels.shape[1] <= _LOSSLESS_PIXELS:
        kind, encoded = "png", cv2.imencode(".png", pixels[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 2])[1]
    else:
        quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
        kind, encoded = "jpeg", cv2.imencode(".jpg", pixels[:, :, ::-1], quality)[1]
    return f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode('ascii')}"
