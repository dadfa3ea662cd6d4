"""Progress of a long run: a bar with a rate and an ETA on a terminal, now and then a line in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from model.data.progress import record_bar
from model.data.validate import Progress

logger = logging.getLogger(__name__)

_EVERY = 30.0  # seconds between lines


@contextmanager
def progress_shown(what: str, *, shown: bool = True) -> Iterator[Progress]:
    """Give a function that is called with (records done, records in all).

    Args:
        what: stands before the bar or in the line.
        shown: False shows nothing.
    """
    if not shown:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with record_bar(what) as progress:
            yield progress
    else:
        yield _Lines(what)


class _Lines:
    """Writes a line every half minute, and one at the end."""

    def __init__(self, what: str) -> None:
        self.what, self.begun = what, time.monotonic()
        self.told, self.done = self.begun, 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == self.done or (now - self.told < _EVERY and done < total):
            return
        self.told, self.done = now, done
        rate = done / max(now - self.begun, 1e-9)
        left = _clock((total - done) / rate) if rate else "?"
        logger.info("%s: %d of %d records, %.2f a second, %s left", self.what, done, total, rate, left)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
