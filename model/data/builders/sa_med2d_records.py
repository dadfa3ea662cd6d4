"""From the index of SA-Med2D-20M to records that training reads, and to merged masks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pyarrow as arrow

from model.data.builders.sa_med2d_masks import MaskFault, image_size, is_whole_png, usable_mask, write_mask
from model.data.builders.sa_med2d_questions import Classes, absent_record, target_record
from model.data.builders.sa_med2d_sampling import Rows, Stratum, priority, read_rows, targets
from model.data.builders.work import Output, Part
from model.data.image_io import MERGED_GAP

Merge = Literal["", "asked", "all"]
Form = Literal["jsonl", "parquet"]

_TURN = arrow.struct([("from", arrow.string()), ("value", arrow.string())])
_TEXTS = ("answer_type", "task", "kind", "modality", "dataset", "about")
RECORD_SCHEMA = arrow.schema(
    [
        ("id", arrow.string()),
        ("image", arrow.string()),
        ("conversations", arrow.list_(_TURN)),
        *((name, arrow.string()) for name in _TEXTS),
    ]
)


@dataclass(frozen=True)
class RecordContext:
    """What every piece needs.

    Attributes:
        root: the data set's folder; merged masks go to its ``masks_merged/``.
        index: Parquet file of the images.
        taken: largest priority taken of each stratum; every target if None.
        sampling_seed, seed: of the choice of targets, and of wordings and absent targets.
        absent_share: of questions for absent targets among all.
        merge: which merged masks are written.
        check: decode the masks that are asked for, and leave out what cannot be used.
        form: of the record files.
        classes: (modality, data set) → its classes.
    """

    root: Path
    index: Path
    taken: Mapping[Stratum, int] | None
    sampling_seed: int
    seed: int
    absent_share: float
    merge: Merge
    check: bool
    form: Form
    classes: Mapping[tuple[str, str], Classes]


def record_outputs(splits: tuple[str, ...], form: Form) -> tuple[Output, ...]:
    """A file for each split."""
    schema = RECORD_SCHEMA if form == "parquet" else None
    return tuple(Output(f"{split}.{form}", schema) for split in splits)


def write_records(rows: Rows, context: RecordContext, part: Part) -> None:
    """Records of some images, and their merged masks."""
    for row in read_rows(context.index, rows):
        asked = [merged for stratum, merged in targets(row) if _is_taken(stratum, row, merged, context)]
        wanted = row["merged"] if context.merge == "all" else asked
        unusable = _look_after_masks(row, wanted, context, part) if wanted else set()
        for merged in asked:
            if merged["class_id"] not in unusable:
                _ask(row, merged, context, part)


def _is_taken(stratum: Stratum, row: Mapping[str, Any], merged: Mapping[str, Any], context: RecordContext) -> bool:
    if context.taken is None:
        return True
    limit = context.taken.get(stratum)
    return limit is not None and priority(context.sampling_seed, row["path"], merged["class_id"]) <= limit


def _ask(row: Mapping[str, Any], merged: Mapping[str, Any], context: RecordContext, part: Part) -> None:
    records = [target_record(row, merged, context.seed)]
    if context.absent_share:
        classes = context.classes.get((row["modality"], row["dataset"]), {})
        absent = absent_record(row, merged, classes, context.absent_share, context.seed)
        records += [absent] if absent else []
    for record in records:
        part.write(f"{row['split']}.{context.form}", record)
        part.count("records by split", row["split"])
        part.count("records by kind", record["kind"])
        part.count(f"{row['split']} by modality", row["modality"])
        part.count(f"{row['split']} by data set", row["dataset"])
        part.count("classes asked for", record["about"])


def _look_after_masks(
    row: Mapping[str, Any], wanted: list[dict[str, Any]], context: RecordContext, part: Part
) -> set[int]:
    """Merge and check as the build asks; the classes whose mask cannot be used."""
    instances: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for mask in row["masks"]:
        instances[mask["class_id"]].append(mask)
    unusable: set[int] = set()
    size: tuple[int, int] | None = None
    for merged in wanted:
        class_id, target = merged["class_id"], context.root / merged["file"]
        try:
            if context.check or context.merge:
                size = size or image_size(context.root / row["path"])
                files = [context.root / mask["file"] for mask in instances[class_id]]
                _merge_or_check(target, files, size, bool(context.merge), part)
            if not context.merge:
                _check_reach(target, [mask["instance"] for mask in instances[class_id]])
        except MaskFault as fault:
            unusable.add(class_id)
            part.find(fault.kind, str(fault), image=row["path"], mask=merged["file"])
    return unusable


def _merge_or_check(target: Path, instances: list[Path], size: tuple[int, int], merge: bool, part: Part) -> None:
    if is_whole_png(target):
        usable_mask([target], size)
        part.count("merged masks", "there already")
        return
    mask = usable_mask(instances, size)
    if merge:
        target.parent.mkdir(exist_ok=True)
        write_mask(target, mask)
        part.count("merged masks", "written")


def _check_reach(target: Path, instances: list[int]) -> None:
    """A reader that finds no merged file looks for instances by number, and gives up after a gap.

    Raises:
        MaskFault: it would not find all.
    """
    if any(later - earlier > MERGED_GAP for earlier, later in pairwise([-1, *instances])) and not target.exists():
        raise MaskFault(
            "gap_in_instances",
            f"{target.name}: the numbers of its {len(instances)} instances leave gaps too wide for a reader; merge "
            "them with --merge asked",
        )
