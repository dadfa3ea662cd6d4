"""In which order records are seen: shuffled, weighted, grouped by length, the same for every way of splitting the work.

The order of an epoch is a pure function of (seed, epoch, record count) and, where like lengths go together, of lengths
and global batch (``batch_size × world_size``): rank and world size only cut it. With the same global batch every step
therefore sees the same records on 1 GPU and on 8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from model.errors import MedPLIBError

_MEGABATCH = 100  # global batches sorted by length together: enough for like lengths, few enough to stay shuffled


class Draw(int):
    """A record's number with how often the record was drawn before in the same epoch."""

    earlier: int = 0

    @classmethod
    def of(cls, record: int, earlier: int) -> int:
        draw = cls(record)
        draw.earlier = earlier
        return draw


class ResumableSampler:
    """Batches of record numbers for one rank; pass it to ``DataLoader(batch_sampler=…)``.

    A loader's workers run ahead of training, so the sampler does not count what it hands out: the training loop calls
    ``advance()`` after each batch it has used, and ``state_dict()`` then says exactly where to go on. The last global
    batch of an epoch is filled up with the first records of its order (``padded`` of them).

    Args:
        lengths: one length a record, see ``packing.py``; only how many there are counts unless ``group_by_length``.
        seed: of every shuffle.
        rank, world_size: which share of each global batch is ours.
        batch_size: records a batch on this rank.
        weights: relative chance of each record. An epoch then still has as many draws as there are records; each
            record is drawn its expected number of times, rounded up or down, from the second time on as a ``Draw``.
        group_by_length: put records of like length into the same global batch, so that little of it is padding and
            no rank waits for another one's longer batch. Batches stay shuffled.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] | np.ndarray | None = None,
        group_by_length: bool = False,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise MedPLIBError(
                f"batch size {batch_size}, rank {rank} of {world_size}: expected ≥ 1 and rank < world size"
            )
        self.lengths = np.asarray(lengths)
        self.seed, self.rank, self.world_size, self.batch_size = seed, rank, world_size, batch_size
        self.weights = None if weights is None else _checked_weights(weights, len(self.lengths))
        self.group_by_length = group_by_length
        self.epoch = 0
        self.consumed = 0  # records of this epoch used so far, over all ranks
        if not len(self.lengths):
            raise MedPLIBError("there are no records to draw from; name a data file that holds some")

    @property
    def global_batch(self) -> int:
        """Records of one step over all ranks."""
        return self.batch_size * self.world_size

    @property
    def padded(self) -> int:
        """Records seen twice in an epoch to fill its last batch."""
        return -len(self.lengths) % self.global_batch

    def __len__(self) -> int:
        """Batches of a whole epoch on each rank."""
        return (len(self.lengths) + self.padded) // self.global_batch

    def __iter__(self) -> Iterator[list[int]]:
        """What is left of the current epoch."""
        order, size = self.epoch_order(self.epoch), self.global_batch
        earlier = np.zeros_like(order) if self.weights is None else _times_before(order)
        rest = np.arange(self.consumed, len(order))
        rest = np.concatenate([rest, np.resize(np.arange(len(order)), -len(rest) % size)])
        for start in range(0, len(rest) - size + 1, size):
            own = rest[start + self.rank : start + size : self.world_size]
            draws = zip(order[own].tolist(), earlier[own].tolist(), strict=True)
            yield [Draw.of(record, before) if before else record for record, before in draws]

    def advance(self) -> None:
        """Note that one batch was used; the last one of an epoch begins the next epoch."""
        self.consumed += self.global_batch
        self._begin_next_epoch_if_done()

    def _begin_next_epoch_if_done(self) -> None:
        if self.consumed >= len(self.lengths):
            self.epoch, self.consumed = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, in plain numbers."""
        state = {"seed": self.seed, "epoch": self.epoch, "consumed": self.consumed, "records": len(self.lengths)}
        return state | {"global_batch": self.global_batch} if self.group_by_length else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; the world size may differ. Raises MedPLIBError: the state is of another
        seed or another number of records, or, in the midst of an epoch that is grouped by length, of another global
        batch."""
        expected = {"seed": self.seed, "records": len(self.lengths)}
        if state["consumed"] and self.group_by_length:
            expected["global_batch"] = self.global_batch
        for name, own in expected.items():
            if state.get(name) != own:
                found = state.get(name, "unknown")
                raise MedPLIBError(f"the saved data order has {name} {found}, this run {own}; resume the same run")
        self.epoch, self.consumed = int(state["epoch"]), int(state["consumed"])
        self._begin_next_epoch_if_done()

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Record numbers of one epoch over all ranks, int64 [records]."""
        rng = np.random.default_rng([self.seed, epoch])
        order = self._draw(rng)
        return self._group(order, rng) if self.group_by_length else order

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        count = len(self.lengths)
        order = rng.permutation(count)
        if self.weights is None:
            return order
        # Systematic draws: one pointer every 1/N of the total weight, so each record gets its share rounded up or down.
        # Equal weights side by side: so does each group of records that were given one weight together.
        order = order[np.argsort(self.weights[order], kind="stable")]
        ends = np.cumsum(self.weights[order])
        pointers = (rng.random() + np.arange(count)) / count * ends[-1]
        drawn = order[np.minimum(np.searchsorted(ends, pointers, side="right"), count - 1)]
        return rng.permutation(drawn)

    def _group(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        size = self.global_batch
        whole = len(order) // size * size
        batches = []
        for start in range(0, whole, size * _MEGABATCH):
            mega = order[start : min(start + size * _MEGABATCH, whole)]
            mega = mega[np.argsort(-self.lengths[mega], kind="stable")]
            batches.append(mega.reshape(-1, size))
        grouped = [rng.permutation(np.concatenate(batches), axis=0).ravel()] if batches else []
        return np.concatenate([*grouped, order[whole:]])


def _times_before(order: np.ndarray) -> np.ndarray:
    """How often the number at each place stands before it: int64 [N]."""
    places = np.argsort(order, kind="stable")
    count = np.arange(len(order))
    begins = np.append(True, np.diff(order[places]) != 0)
    before = np.empty_like(count)
    before[places] = count - np.maximum.accumulate(np.where(begins, count, 0))
    return before


def balanced_weights(labels: Sequence[str | None], shares: Mapping[str, float] | None = None) -> np.ndarray:
    """Weights that give every label (task or modality, say) its share of the draws, however many records it has.
    Returns float64 [N], summing to 1. Raises MedPLIBError: a share names a label that no record has, or no record is
    left with a chance.

    Args:
        labels: one label a record; None counts as the label ``unknown``.
        shares: relative share of each label; equal shares if None. A label it does not name gets none.
    """
    names = [label or "unknown" for label in labels]
    sizes = Counter(names)
    wanted = dict.fromkeys(sizes, 1.0) if shares is None else dict(shares)
    absent = sorted(set(wanted) - set(sizes))
    if absent:
        raise MedPLIBError(f"no record is labelled {', '.join(absent)}; labels here: {', '.join(sorted(sizes))}")
    weights = np.asarray([wanted.get(name, 0.0) / sizes[name] for name in names], dtype=np.float64)
    return _checked_weights(weights, len(names)) / weights.sum()


def _checked_weights(weights: Sequence[float] | np.ndarray, count: int) -> np.ndarray:
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (count,):
        raise MedPLIBError(f"got {values.size} weights for {count} records; give one a record")
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise MedPLIBError("sampling weights must be finite, not negative, and not all zero")
    return values
