"""What is asked of the engine, and the ticket under which the answer comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from dataclasses import dataclass, field

from model.errors import MedPLIBError
from model.inference.answer import Answer
from model.inference.generation import GenerationSettings
from model.inference.images import ImageSource
from model.inference.regions import Region

OnText = Callable[[str], None]


class EngineFull(MedPLIBError):
    """As many requests are waiting as the engine takes; ask again later."""


class NotFinite(MedPLIBError):
    """The network computed NaN or infinite numbers for a request: the fault of weights, type or device."""

    def __init__(self) -> None:
        super().__init__(
            "the network computed NaN or infinite numbers for this question; ask again with float32 weights, or with "
            "another checkpoint"
        )


@dataclass(frozen=True, eq=False)
class Request:
    """One question about one image, or about none.

    Attributes:
        image: a path (PNG, JPEG, TIFF, single-frame DICOM), bytes, a PIL image, an array H×W(×3), what ``read_image``
            gave, or what ``Engine.prepare`` gave; None for a question in words alone.
        question: plain text; ``<region></region>`` marks where a region is meant.
        regions: mask paths, H×W arrays, ``("box", (x1, y1, x2, y2))`` or ``("point", (x, y))`` in image pixels;
            those that ``history`` marks come first.
        history: earlier (question, answer) pairs about the same image; the oldest are left out where not all fit.
        settings: how the answer is drawn.
        threshold: probability above which a pixel is in a mask, in (0, 1); the checkpoint's own when absent.
        thresholds: further thresholds, whose masks come as ``Answer.masks_at``.
        no_mask_below: a mask whose calibrated probability of presence is lower is left empty; 0..1.
            None is the threshold of the checkpoint's presence classifier, if it has one; 0 keeps every mask.
        router_stats: report the share of the tokens that each expert computed (``Answer.router_stats``).
        always_mask: where the answer has no ``<SEG>``, decode one mask all the same, from the state that the published
            evaluation takes then; its ``Mask.spoken`` is False.
        every_target: ask again for each target of a segmentation request that the answer neither masks nor refuses, and
            join the answers (``targets.JoinedAnswer``); not with ``router_stats``, ``always_mask`` or ``thresholds``.
    """

    image: ImageSource
    question: str
    regions: Sequence[Region] = ()
    history: Sequence[tuple[str, str]] = ()
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    threshold: float | None = None
    thresholds: Sequence[float] = ()
    no_mask_below: float | None = None
    router_stats: bool = False
    always_mask: bool = False
    every_target: bool = False

    def __post_init__(self) -> None:
        for threshold in (*self.thresholds, *([] if self.threshold is None else [self.threshold])):
            if not 0 < threshold < 1:
                raise MedPLIBError(f"the threshold is {threshold}; give a number between 0 and 1")
        if self.no_mask_below is not None and not 0 <= self.no_mask_below <= 1:
            raise MedPLIBError(f"no_mask_below is {self.no_mask_below}; give a probability from 0 to 1")
        for text in (self.question, *(text for pair in self.history for text in pair)):
            if not isinstance(text, str) or any("\ud800" <= sign <= "\udfff" for sign in text):
                raise MedPLIBError(f"{text!a:.60} is no text that can be read; give whole Unicode characters")
        if not self.question.strip():
            raise MedPLIBError("the question is empty; ask something")


class Ticket:
    """A request on its way. Its answer, or what went wrong, is set once; any thread may wait for it or cancel it."""

    def __init__(self, request: Request, whole: Ticket | None = None) -> None:
        self.request = request
        self._whole = whole
        self._cancelled = False
        self._outcome: Future[Answer] = Future()

    @property
    def cancelled(self) -> bool:
        """Whether the request was given up, or the one that it is a part of."""
        return self._cancelled or (self._whole is not None and self._whole.cancelled)

    def cancel(self) -> None:
        """Give the request up: its slot is free before the next step; the answer is what had been said by then."""
        self._cancelled = True

    def done(self) -> bool:
        """Whether the answer, or an error, is there."""
        return self._outcome.done()

    def when_done(self, listener: Callable[[], None]) -> None:
        """Call the listener once it is done, from whichever thread settles it; at once where it is done already."""
        self._outcome.add_done_callback(lambda _: listener())

    def result(self, timeout: float | None = None) -> Answer:
        """The answer.

        Args:
            timeout: seconds to wait at most; None waits as long as it takes.

        Raises:
            MedPLIBError: image, question or region were malformed.
            TimeoutError: the answer is not there in time.
        """
        if not wait([self._outcome], timeout).done:
            raise TimeoutError(f"no answer within {timeout} s")
        return self._outcome.result()

    def settle(self, outcome: Answer | BaseException) -> None:
        """Set the answer or the error, unless there is one; for the engine."""
        with suppress(InvalidStateError):
            if isinstance(outcome, BaseException):
                self._outcome.set_exception(outcome)
            else:
                self._outcome.set_result(outcome)
