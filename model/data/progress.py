"""A bar with a rate and an estimate while records are gone through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from model.data.validate import Progress


@contextmanager
def record_bar(what: str, *, shown: bool = True) -> Iterator[Progress]:
    """Give the ``progress`` that ``check_file`` and ``MedPLIBDataset`` call; it goes when they are done.

    Args:
        what: stands before the bar.
        shown: False draws nothing.
    """
    with tqdm(unit="record", desc=what, leave=False, disable=None if shown else True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
