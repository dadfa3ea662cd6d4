"""Which targets of SA-Med2D-20M are asked for: so many of each modality, spread over data sets and classes.

A target is one class in one image: one merged mask, one question. The choice depends on the index and the seed alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet

from model.data.builders.sa_med2d_source import spoken_name
from model.data.builders.splits import ZERO_SHOT, SplitPlan, draw, spread
from model.data.builders.work import Output, Part, Piece
from model.data.schema import MODALITIES
from model.errors import MedPLIBError

IMAGES_A_PIECE = 2048
SURVEY_FILE = "priorities.parquet"
SURVEY_SCHEMA = arrow.schema(
    [
        ("split", arrow.string()),
        ("modality", arrow.string()),
        ("dataset", arrow.string()),
        ("class_id", arrow.int32()),
        ("priorities", arrow.list_(arrow.uint64())),
    ]
)
SURVEY_OUTPUT = Output(SURVEY_FILE, SURVEY_SCHEMA)


class Stratum(NamedTuple):
    """Targets among which only chance decides."""

    split: str
    modality: str
    dataset: str
    class_id: int


class Rows(NamedTuple):
    """Some neighbouring rows of a Parquet file."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Quota:
    """How many targets of a modality are wanted, over all splits.

    Attributes:
        every: of each modality that ``named`` does not name; 0 leaves them out.
        named: modality → number.
    """

    every: int = 0
    named: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Quota:
        """``2000``, ``ct=5000,mr=2000`` or both, ``2000,ct=5000``.

        Raises:
            MedPLIBError: it is not of that form or names no modality.
        """
        every, named = 0, {}
        for entry in text.split(","):
            name, sign, number = (word.strip() for word in entry.rpartition("="))
            if not number.isdecimal() or (sign and name not in MODALITIES):
                raise MedPLIBError(
                    f"--per-modality holds {entry!r:.80}; give a number as 2000, or ct=5000,mr=2000 with modalities "
                    f"of {', '.join(MODALITIES)}"
                )
            if sign:
                named[name] = int(number)
            else:
                every = int(number)
        return cls(every, named)

    def of(self, modality: str, split: str, plan: SplitPlan) -> int:
        """How many of a modality are wanted in a split; held-out data sets count as one more test split."""
        share = plan.shares.get("test", min(plan.shares.values())) if split == ZERO_SHOT else plan.shares[split]
        return round(self.named.get(modality, self.every) * share)

    def to_json(self) -> dict[str, Any]:
        return {"every": self.every, "named": dict(self.named)}


@dataclass(frozen=True)
class SurveyContext:
    """What every piece of the survey needs."""

    index: Path
    quota: Quota
    plan: SplitPlan
    seed: int


def row_pieces(index: Path, images_a_piece: int = IMAGES_A_PIECE) -> list[Piece]:
    """The index in pieces."""
    with parquet.ParquetFile(index) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return [
        Piece(Rows(group, start, min(start + images_a_piece, size)), min(images_a_piece, size - start))
        for group, size in enumerate(sizes)
        for start in range(0, size, images_a_piece)
    ]


def read_rows(index: Path, rows: Rows, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of the index as plain values, some at a time."""
    with parquet.ParquetFile(index) as file:
        table = file.read_row_group(rows.group, columns=columns, use_threads=False)
    table = table.slice(rows.start, rows.stop - rows.start)
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def targets(row: Mapping[str, Any]) -> Iterator[tuple[Stratum, dict[str, Any]]]:
    """Classes of an image that can be asked for by name."""
    for merged in row["merged"]:
        if merged["class_name"] is not None and spoken_name(merged["class_name"]) is not None:
            yield Stratum(row["split"], row["modality"], row["dataset"], merged["class_id"]), merged


def priority(seed: int, path: str, class_id: int) -> int:
    """A target's place in the queue, 64 bits; the smallest are taken."""
    return draw(seed, path, str(class_id))


def survey(rows: Rows, context: SurveyContext, part: Part) -> None:
    """The smallest priorities of each stratum, no more than could be taken."""
    found: dict[Stratum, list[int]] = defaultdict(list)
    columns = ["path", "modality", "dataset", "split", "merged"]
    for row in read_rows(context.index, rows, columns):
        for stratum, merged in targets(row):
            found[stratum].append(priority(context.seed, row["path"], merged["class_id"]))
    for stratum, values in sorted(found.items()):
        wanted = context.quota.of(stratum.modality, stratum.split, context.plan)
        if wanted:
            part.write(SURVEY_FILE, {**stratum._asdict(), "priorities": sorted(values)[:wanted]})


def choose(survey_file: Path, quota: Quota, plan: SplitPlan) -> dict[Stratum, int]:
    """The largest priority that is taken, of each stratum that anything is taken of.

    In every split and modality the quota is spread evenly over data sets, and a data set's part evenly over its
    classes, as far as they have so many targets.
    """
    queues = _queues(survey_file, quota, plan)
    groups: dict[tuple[str, str], dict[str, list[Stratum]]] = defaultdict(lambda: defaultdict(list))
    for stratum in sorted(queues):
        groups[stratum.split, stratum.modality][stratum.dataset].append(stratum)
    taken: dict[Stratum, int] = {}
    for (split, modality), datasets in sorted(groups.items()):
        sizes = [sum(len(queues[stratum]) for stratum in strata) for strata in datasets.values()]
        shares = spread(quota.of(modality, split, plan), sizes)
        for strata, share in zip(datasets.values(), shares, strict=True):
            for stratum, number in zip(strata, spread(share, [len(queues[one]) for one in strata]), strict=True):
                if number:
                    taken[stratum] = int(np.sort(queues[stratum])[number - 1])
    return taken


def _queues(survey_file: Path, quota: Quota, plan: SplitPlan) -> dict[Stratum, np.ndarray]:
    """Smallest priorities of each stratum over all pieces, uint64."""
    queues: dict[Stratum, np.ndarray] = {}
    with parquet.ParquetFile(survey_file) as file:
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                values = np.asarray(row.pop("priorities"), dtype=np.uint64)
                stratum = Stratum(**row)
                joined = np.concatenate([queues.get(stratum, values[:0]), values])
                wanted = quota.of(stratum.modality, stratum.split, plan)
                queues[stratum] = np.partition(joined, wanted - 1)[:wanted] if len(joined) > wanted else joined
    return queues
