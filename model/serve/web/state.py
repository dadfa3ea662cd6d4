"""Session of a visitor: image, marks, conversation.

Nothing here outlives the process, and nothing is shared between visitors.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import cv2
import numpy as np

from model.data.volumes import Volume
from model.errors import MedPLIBError
from model.inference.answer import Mask
from model.inference.regions import region_to_mask
from model.serve.client import AnswerStream

AWAY_SECONDS, IDLE_SECONDS = 300.0, 3600.0
"""A visitor whose tab is gone, and one who does nothing, is forgotten after so long; a phone that slept comes back."""
MAX_POINTS = 5000
"""Of one outline; a browser sends a few hundred."""
_SMALLEST_BOX = 1.0  # pixels a side
MarkKind = Literal["point", "box", "free"]


@dataclass(frozen=True)
class Mark:
    """Something that was marked in a picture.

    Attributes:
        kind: how it was drawn.
        points: (x, y) in pixels of the picture: one, two corners, or an outline.
        region: bool [H, W], what it covers.
    """

    kind: MarkKind
    points: tuple[tuple[float, float], ...]
    region: np.ndarray

    def describe(self, number: int, spent: bool = False) -> dict[str, Any]:
        """What the browser draws.

        Args:
            number: as people count, from 1.
            spent: it was asked about already.
        """
        return {"kind": self.kind, "points": [list(point) for point in self.points], "number": number, "spent": spent}


@dataclass(frozen=True)
class Picture:
    """The picture that is looked at: an image, or one slice of a volume as it is shown.

    Attributes:
        volume: the file it is from.
        pixels: uint8 [H, W, 3]; never written to.
        index: of the slice.
        window: (centre, width) it is shown with; None for the file's own.
        file: number of the opened file; no two of a visitor have the same.
    """

    volume: Volume
    pixels: np.ndarray
    index: int = 0
    window: tuple[float, float] | None = None
    file: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def same_slice(self, other: Picture) -> bool:
        """Whether a mask of one fits the other."""
        return (self.file, self.volume.plane, self.index) == (other.file, other.volume.plane, other.index)

    def same_view(self, other: Picture) -> bool:
        """Whether both show the same pixels, so that a conversation about one goes on about the other."""
        return self.same_slice(other) and self.window == other.window


@dataclass
class Exchange:
    """One question and its answer.

    Attributes:
        number: no two of a visitor have the same.
        picture: what was asked about.
        question: as typed.
        asked: with its region markers.
        marks: regions it is about.
        answer: so far; the model's own text.
        masks: of the answer.
        shown: whether each mask is.
        state: how far it is.
        error: why there is no answer, or why it broke off.
        finish: what ended it, as the model's server says; ``dropped_turns`` and ``notes`` likewise.
        model: who answered.
        seconds: it took.
        vote: 1 for, -1 against.
    """

    number: int
    picture: Picture
    question: str
    asked: str
    marks: tuple[Mark, ...] = ()
    answer: str = ""
    masks: list[Mask] = field(default_factory=list)
    shown: list[bool] = field(default_factory=list)
    state: Literal["running", "done", "stopped", "failed"] = "running"
    error: str = ""
    finish: str = ""
    dropped_turns: int = 0
    notes: tuple[str, ...] = ()
    model: str = ""
    seconds: float = 0.0
    vote: int = 0


@dataclass
class Session:
    """Everything about one visitor. ``lock`` is held while it changes."""

    picture: Picture | None = None
    marks: list[Mark] = field(default_factory=list)
    spent: list[Mark] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    opacity: float = 0.4
    contour: bool = True
    notice: str = ""
    model: str = ""  # chosen last
    remembers: dict[str, bool] = field(default_factory=dict)  # by model, the memory switch of the last question
    stream: AnswerStream | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        return bool(self.exchanges) and self.exchanges[-1].state == "running"

    @property
    def weight(self) -> int:
        """Bytes that the pictures take, about: four a voxel of the volume, and the views that were asked about."""
        if self.picture is None:
            return 0
        views = {id(exchange.picture.pixels): exchange.picture.pixels.nbytes for exchange in self.exchanges}
        return 4 * self.picture.volume.num_slices * self.picture.pixels[:, :, 0].size + sum(views.values())

    def next_number(self) -> int:
        """A number that was not given before."""
        return next(self._numbers)

    def show(self, picture: Picture) -> None:
        """Look at another picture: marks are gone, as is a conversation about another file."""
        if self.picture is None or picture.file != self.picture.file:
            self.forget()
        if self.picture is None or not picture.same_slice(self.picture):
            self.marks, self.spent = [], []
        self.picture = picture

    def masks(self) -> Iterator[tuple[int, Exchange, int]]:
        """(number from 0, exchange, place in it) of every mask of the conversation; its number says its colour."""
        places = ((exchange, place) for exchange in self.exchanges for place in range(len(exchange.masks)))
        for number, (exchange, place) in enumerate(places):
            yield number, exchange, place

    def masks_here(self) -> list[tuple[int, Exchange, int]]:
        """Those of them that fit what is looked at."""
        here = self.picture
        return [item for item in self.masks() if here is not None and item[1].picture.same_slice(here)]

    def history(self) -> list[Exchange]:
        """Answered questions about just what is looked at."""
        picture = self.picture
        return [
            exchange
            for exchange in self.exchanges
            if picture is not None
            and exchange.state in ("done", "stopped")
            and exchange.answer
            and exchange.picture.same_view(picture)
        ]

    def forget(self) -> None:
        """Begin the conversation anew; marks that were not asked about yet stay."""
        self.stop()
        self.exchanges, self.spent = [], []

    def stop(self) -> None:
        """Give up the answer that is on its way: its connection is closed."""
        stream = self.stream
        if stream is not None:
            stream.close()


class Sessions:
    """The visitors, by the name of the page that the browser shows; a page that is loaded again has a new one.

    Args:
        capacity: visitors remembered at most; the one who was silent for longest is forgotten first.
        max_bytes: of all their pictures; likewise.
        idle_seconds: after which a visitor is forgotten.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        capacity: int = 64,
        max_bytes: int = 4 * 2**30,
        idle_seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.capacity, self.max_bytes, self.idle_seconds = capacity, max_bytes, idle_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[Session, float]] = OrderedDict()
        self._names: dict[str, str] = {}  # by the browser's tab: of the page that it shows now

    def __len__(self) -> int:
        return len(self._known)

    def of(self, name: str) -> Session:
        """The visitor's session, a new one where it is not known."""
        now = self._clock()
        with self._lock:
            session, _ = self._known.pop(name, (Session(), now))
            self._known[name] = (session, now)
            forgotten = self._forget(now)
        for old in forgotten:
            old.stop()
        return session

    def arrive(self, name: str, tab: str) -> tuple[Session, bool]:
        """The session of a page that a tab has just loaded, and whether the tab had it before.

        An answer that was on its way to the page before is given up, as nobody shows it any more.

        Args:
            name: of the page.
            tab: that the browser keeps across loads; empty where it does not say.
        """
        with self._lock:
            found = self._known.pop(self._names.get(tab, ""), None)
            if found is not None:
                self._known[name] = found
            if tab:
                self._names[tab] = name
        session = self.of(name)
        if found is not None:
            session.stop()
            with session.lock:
                for exchange in session.exchanges[-1:]:
                    exchange.state = "stopped" if exchange.state == "running" else exchange.state
        return session, found is not None

    def leave(self, name: str) -> None:
        """The visitor's tab is gone: nobody waits for its answer any more. It may come back within a few minutes."""
        with self._lock:
            session, _ = self._known.get(name, (None, 0.0))
            if session is not None:
                self._known[name] = (session, self._clock() - self.idle_seconds + AWAY_SECONDS)
                self._known.move_to_end(name, last=False)
        if session is not None:
            session.stop()

    def sweep(self) -> None:
        """Drop who was silent for too long."""
        with self._lock:
            forgotten = self._forget(self._clock())
        for old in forgotten:
            old.stop()

    def _forget(self, now: float) -> list[Session]:
        """Drop who was silent for too long, and for longest until the bounds are kept; one alone may be large."""
        forgotten = []
        held = sum(session.weight for session, _ in self._known.values())
        while self._known:
            name, (session, seen) = next(iter(self._known.items()))
            crowded = len(self._known) > self.capacity or held > self.max_bytes
            if now - seen <= self.idle_seconds and not (crowded and len(self._known) > 1):
                break
            del self._known[name]
            held -= session.weight
            forgotten.append(session)
        if forgotten:
            self._names = {tab: name for tab, name in self._names.items() if name in self._known}
        return forgotten


# --- marks as the browser draws them ------------------------------------------------------------------------------


def read_mark(drawn: Any, size: tuple[int, int]) -> Mark:
    """What a browser says was drawn.

    Args:
        drawn: ``{"kind": "point" | "box" | "free", "points": [[x, y], …]}`` in pixels of the picture.
        size: (height, width) of the picture.

    Raises:
        MedPLIBError: it is malformed, or covers nothing of the picture.
    """
    if not isinstance(drawn, Mapping) or drawn.get("kind") not in get_args(MarkKind):
        raise MedPLIBError("what was drawn cannot be read; mark a point, a box or an outline")
    kind: MarkKind = drawn["kind"]
    points = _points(drawn.get("points"))
    wanted = {"point": 1, "box": 2}.get(kind)
    if wanted is not None and len(points) != wanted:
        raise MedPLIBError(f"a {kind} was drawn with {len(points)} corners, expected {wanted}; draw it again")
    if kind == "point":
        return Mark(kind, tuple(points), region_to_mask(("point", points[0]), size))
    return Mark(kind, tuple(points), (_box if kind == "box" else _outline)(points, size))


def _points(values: Any) -> list[tuple[float, float]]:
    if not isinstance(values, Sequence) or not 1 <= len(values) <= MAX_POINTS:
        raise MedPLIBError(f"an outline has 1 to {MAX_POINTS} points; draw it again")
    try:
        points = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise MedPLIBError("the points that were drawn are not x and y in pixels; draw again")
    return [(float(x), float(y)) for x, y in points]


def _box(points: list[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    """A box between two corners; what hangs over the picture's edge is cut off."""
    (first_x, first_y), (second_x, second_y) = points
    left, right = (min(max(x, 0.0), float(size[1])) for x in sorted((first_x, second_x)))
    top, bottom = (min(max(y, 0.0), float(size[0])) for y in sorted((first_y, second_y)))
    if right - left < _SMALLEST_BOX or bottom - top < _SMALLEST_BOX:
        raise MedPLIBError("the box lies outside the image or is smaller than a pixel; draw it over what is meant")
    return region_to_mask(("box", (left, top, right, bottom)), size)


def _outline(points: list[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    """The inside of a closed outline and the outline itself, so that a mere stroke is a region too."""
    corners = np.clip(np.floor(np.asarray(points)), -(2**14), 2**15).astype(np.int32)
    canvas = np.zeros(size, dtype=np.uint8)
    cv2.fillPoly(canvas, [corners], 1)
    cv2.polylines(canvas, [corners], isClosed=False, color=1, thickness=max(1, round(max(size) / 200)))
    if not canvas.any():
        raise MedPLIBError("the outline lies outside the image; draw it over what is meant")
    return canvas.astype(bool)
