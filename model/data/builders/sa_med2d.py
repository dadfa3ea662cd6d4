"""Build from SA-Med2D-20M: an index of all images and masks, splits, merged masks, and grounding records.

Two builds (see ``jobs``): names become the index, a matter of minutes for the real set, and rows of the index become
records and merged masks, which decodes masks. Between them a survey of the index draws the targets of a quota.
"""

from __future__ import annotations

import difflib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from PIL import Image
from tqdm import tqdm

from model.data.builders.cases import ZERO_SHOT, SplitPlan, draw, fraction, spread
from model.data.builders.jobs import (
    Build,
    BuildReport,
    Execution,
    Output,
    Part,
    Piece,
    finished_report,
    run_build,
    write_png,
)
from model.data.builders.published import Stretch, stretches
from model.data.builders.sa_med2d_index import (
    BYTES_A_PIECE,
    CLASS_COUNTS,
    CLASS_FILE,
    INDEX_FILE,
    INDEX_OUTPUT,
    NAMELESS,
    IndexContext,
    Source,
    index_buckets,
    index_pieces,
    list_names,
    read_class_names,
    spoken_name,
)
from model.data.image_io import MERGED_GAP, read_mask
from model.data.phantom.questions import SPOKEN_NAMES, refusal
from model.data.schema import MODALITIES
from model.errors import MedPLIBError

Merge = Literal["", "asked", "all"]
Form = Literal["jsonl", "parquet"]
Classes = Mapping[int, str]
"""Class id → name, of one data set and modality."""

IMAGES_A_PIECE = 2048
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
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
SURVEY_FILE = "priorities.jsonl"
_QUESTIONS = (
    "Segment the {name} in this {modality} image.",
    "Please give me a mask of the {name}.",
    "Can you outline the {name} here?",
    "In this {modality} image, mark the {name}.",
    "I need the {name} delineated. Please do that.",
    "Which pixels belong to the {name}?",
    "Find the {name} and segment it.",
    "Could you show the {name} as a mask?",
)
_ANSWERS = (
    "Here is the mask of the {name}: <SEG>.",
    "The {name}: <SEG>.",
    "Sure, the mask of the {name} is <SEG>.",
    "I have marked the {name}: <SEG>.",
)


class Stratum(NamedTuple):
    """Targets among which only chance decides."""

    split: str
    modality: str
    dataset: str
    class_id: int


@dataclass(frozen=True)
class Quota:
    """How many targets of a modality are wanted, over all splits."""

    every: int = 0  # of each modality that ``named`` does not name; 0 leaves them out
    named: Mapping[str, int] = field(default_factory=dict)  # modality → number

    @classmethod
    def parse(cls, text: str) -> Quota:
        """``2000``, ``ct=5000,mr=2000`` or both, ``2000,ct=5000``. Raises MedPLIBError: it is not of that form or names
        no modality."""
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
class SaMed2dSettings:
    """What is to be built.

    Attributes:
        bytes_a_piece, images_a_piece: how finely the work is cut up.
    """

    source: Path  # the unpacked data set
    out: Path  # folder of index, records and reports
    plan: SplitPlan = field(default_factory=SplitPlan)  # the splits
    quota: Quota | None = None  # targets of each modality; all if None
    absent_share: float = 0.1  # of questions for absent targets among all, 0 … 0.5
    seed: int = 0  # of the choice of targets, absent targets and wordings
    merge: Merge = ""  # which merged masks are written below ``source``: none, those asked for, all
    check: bool = True  # decode the masks asked for and leave out what training could not use
    form: Form = "jsonl"  # of the record files
    bytes_a_piece: int = BYTES_A_PIECE
    images_a_piece: int = IMAGES_A_PIECE

    def __post_init__(self) -> None:
        if not 0 <= self.absent_share <= 0.5:
            raise MedPLIBError(f"--absent-share is {self.absent_share:g}; give 0 to 0.5")


@dataclass(frozen=True)
class RowContext:
    """What every piece of the index's rows needs."""

    settings: SaMed2dSettings  # what is built
    index: Path  # Parquet file of the images
    taken: Mapping[Stratum, int] | None = None  # largest priority taken of each stratum; every target if None
    classes: Mapping[tuple[str, str], Classes] = field(default_factory=dict)  # (modality, data set) → its classes


def build_sa_med2d(settings: SaMed2dSettings, execution: Execution) -> list[BuildReport]:
    """Make the index, records and merged masks. Returns reports of the index and of the records. Raises MedPLIBError:
    the source is not SA-Med2D-20M, settings do not fit it, or a build cannot go on (see ``jobs``)."""
    source = Source.open(settings.source)
    for listed in (settings.source / "images", settings.source / "masks"):
        if settings.out.resolve().is_relative_to(listed.resolve()):
            raise MedPLIBError(f"--out {settings.out} lies in {listed}, whose files are listed; name another folder")
    classes = read_class_names(source.root / CLASS_FILE)
    for name in sorted(settings.plan.hold_out - classes.keys()):
        near = difflib.get_close_matches(name, list(classes), 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(classes)[:20])} …"
        raise MedPLIBError(f"--hold-out {name}: {CLASS_FILE} knows no such data set; {hint}")
    build = Build(settings.out, "sa-med2d-index", settings.plan.to_json(), (INDEX_OUTPUT,), source.prints, "B")

    def prepare() -> tuple[list[Piece], IndexContext]:
        identity = blake2b(repr(sorted(build.source.items())).encode(), digest_size=6).hexdigest()
        names = build.folder / f"names-{identity}"
        with tqdm(unit=" names", desc="reading names", disable=None, unit_scale=True) as bar:
            list_names(source, names, bar.update)
        return index_pieces(names, settings.bytes_a_piece), IndexContext(names, source, classes, settings.plan)

    index = finished_report(build, same_source=execution.same_source)  # of other records too, even to be overwritten
    index = index or run_build(build, prepare, index_buckets, execution)
    if not index.counts.get("images"):
        raise MedPLIBError(f"no image of {settings.source} has a name of SA-Med2D-20M; see {index.findings_file}")
    return [index, _build_records(settings, index, execution)]


def _build_records(settings: SaMed2dSettings, index: BuildReport, execution: Execution) -> BuildReport:
    quota, index_file = settings.quota, settings.out / INDEX_FILE
    modalities = index.counts["images by modality"]
    if quota is not None and (absent := sorted(set(quota.named) - set(modalities))):
        raise MedPLIBError(
            f"--per-modality names {', '.join(absent)}, which has no image here; there are {', '.join(modalities)}"
        )
    chosen = {
        "per_modality": quota.to_json() if quota else "all",
        "absent_share": settings.absent_share,
        "seed": settings.seed,
        "merge": settings.merge or "none",
        "check": settings.check,
        "format": settings.form,
    }
    schema = RECORD_SCHEMA if settings.form == "parquet" else None
    outputs = tuple(Output(f"{split}.{settings.form}", schema) for split in settings.plan.names)
    identity = {"index": f"{index.files[INDEX_FILE]['bytes']} bytes", **index.settings}
    build = Build(settings.out, "sa-med2d", chosen, outputs, identity, "image")

    def prepare() -> tuple[list[Piece], RowContext]:
        with parquet.ParquetFile(index_file) as file:  # the file of a stretch is a row group
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        pieces, taken = stretches(sizes, settings.images_a_piece), None
        if quota is not None:
            drawn = {"quota": quota.to_json(), "seed": settings.seed}
            sampling = Build(build.folder, "sampling", drawn, (Output(SURVEY_FILE),), identity, "image")
            if finished_report(sampling) is None:
                context = RowContext(settings, index_file)
                run_build(sampling, lambda: (pieces, context), survey, replace(execution, overwrite=True))
            taken = choose(build.folder / SURVEY_FILE, quota, settings.plan)
        classes: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
        for label in index.counts.get(CLASS_COUNTS, {}):
            modality, dataset, class_id, name = label.split(" / ", 3)
            if name != NAMELESS:
                classes[modality, dataset][int(class_id)] = name
        return pieces, RowContext(settings, index_file, taken, dict(classes))

    return run_build(build, prepare, write_records, execution)


def read_rows(index: Path, rows: Stretch, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of the index as plain values, some at a time."""
    with parquet.ParquetFile(index) as file:
        table = file.read_row_group(rows.file, columns=columns, use_threads=False)
    table = table.slice(rows.start, rows.stop - rows.start)
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def targets(row: Mapping[str, Any]) -> Iterator[tuple[Stratum, dict[str, Any]]]:
    """Classes of an image that can be asked for by name."""
    for merged in row["merged"]:
        if merged["class_name"] is not None and spoken_name(merged["class_name"]) is not None:
            yield Stratum(row["split"], row["modality"], row["dataset"], merged["class_id"]), merged


# --- the targets of a quota ------------------------------------------------------------------------------------------


def _priority(row: Mapping[str, Any], merged: Mapping[str, Any], context: RowContext) -> int:
    """A target's place in the queue, 64 bits; the smallest are taken."""
    return draw(context.settings.seed, row["path"], str(merged["class_id"]))


def survey(rows: Stretch, context: RowContext, part: Part) -> None:
    """The smallest priorities of each stratum, no more than could be taken."""
    found: dict[Stratum, list[int]] = defaultdict(list)
    for row in read_rows(context.index, rows, ["path", "modality", "dataset", "split", "merged"]):
        for stratum, merged in targets(row):
            found[stratum].append(_priority(row, merged, context))
    quota = context.settings.quota or Quota()
    for stratum, values in sorted(found.items()):
        if wanted := quota.of(stratum.modality, stratum.split, context.settings.plan):
            part.write(SURVEY_FILE, {**stratum._asdict(), "priorities": sorted(values)[:wanted]})


def choose(survey_file: Path, quota: Quota, plan: SplitPlan) -> dict[Stratum, int]:
    """The largest priority that is taken, of each stratum that anything is taken of.

    In every split and modality the quota is spread evenly over data sets, and a data set's part evenly over its
    classes, as far as they have so many targets."""
    queues: dict[Stratum, np.ndarray] = {}
    for line in survey_file.read_bytes().splitlines() if survey_file.exists() else ():  # else nothing can be asked for
        row = json.loads(line)
        values = np.asarray(row.pop("priorities"), dtype=np.uint64)
        stratum = Stratum(**row)
        joined = np.concatenate([queues.get(stratum, values[:0]), values])
        wanted = quota.of(stratum.modality, stratum.split, plan)
        queues[stratum] = np.partition(joined, wanted - 1)[:wanted] if len(joined) > wanted else joined
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


# --- records ---------------------------------------------------------------------------------------------------------


def write_records(rows: Stretch, context: RowContext, part: Part) -> None:
    """Records of some images, and their merged masks."""
    settings = context.settings
    for row in read_rows(context.index, rows):
        asked = [
            merged
            for stratum, merged in targets(row)
            if context.taken is None or _priority(row, merged, context) <= context.taken.get(stratum, -1)
        ]
        wanted = row["merged"] if settings.merge == "all" else asked
        unusable = _unusable(row, wanted, settings, part) if wanted else set()
        classes = context.classes.get((row["modality"], row["dataset"]), {})
        for merged in asked:
            if merged["class_id"] in unusable:
                continue
            absent = absent_record(row, merged, classes, settings.absent_share, settings.seed)
            for record in (target_record(row, merged, settings.seed), *([absent] if absent else [])):
                part.write(f"{row['split']}.{settings.form}", record)
                part.count("records by split", row["split"])
                part.count("records by kind", record["kind"])
                part.count(f"{row['split']} by modality", row["modality"])
                part.count(f"{row['split']} by data set", row["dataset"])
                part.count("classes asked for", record["about"])


def target_record(row: Mapping[str, Any], merged: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A question for one class that the image holds."""
    name = spoken_name(merged["class_name"]) or ""
    chance = draw(seed, "wording", row["path"], name)
    answer = _ANSWERS[chance // 64 % len(_ANSWERS)].format(name=name)
    answer += f"<mask>{merged['file']}</mask>"
    return _record(row, f"{merged['class_id']:04d}", _question(row, name, chance), answer, "grounding", name)


def absent_record(
    row: Mapping[str, Any], merged: Mapping[str, Any], classes: Classes, share: float, seed: int
) -> dict[str, Any] | None:
    """A question for a class that the image does not hold, beside the question for ``merged``; None mostly.

    ``classes`` are all of its data set in its modality, ``share`` is that of such questions among all, 0 … 0.5."""
    about = f"{merged['class_id']:04d}"
    if fraction(seed, "absent", row["path"], about) >= share / (1 - share):
        return None
    names = absent_names([entry["class_name"] for entry in row["merged"]], classes)
    if not names:
        return None
    chance = draw(seed, "absent name", row["path"], about)
    name = names[chance % len(names)]
    answer = refusal(name, np.random.default_rng(chance))
    return _record(row, f"{about}-absent", _question(row, name, chance // 4096), answer, "grounding_absent", name)


def absent_names(present: Sequence[str | None], classes: Classes) -> list[str]:
    """Classes that are surely not in an image with the classes ``present``, as questions call them.

    A name that contains a present one, or is contained in one, may mean the same thing or a part of it: with a "left
    lung" there is a "lung" too."""
    words = [frozenset(name.removeprefix("union_").split("_")) for name in present if name]
    names = []
    for class_name in classes.values():
        spoken, own = spoken_name(class_name), frozenset(class_name.split("_"))
        if spoken and not any(own <= other or other <= own for other in words):
            names.append(spoken)
    return sorted(set(names))


def _question(row: Mapping[str, Any], name: str, chance: int) -> str:
    modality = SPOKEN_NAMES.get(row["modality"], row["modality"])
    return _QUESTIONS[chance % len(_QUESTIONS)].format(name=name, modality=modality)


def _record(row: Mapping[str, Any], suffix: str, question: str, answer: str, kind: str, about: str) -> dict[str, Any]:
    stem = row["path"].removeprefix("images/").removesuffix(".png")
    return {
        "id": f"{stem}--{suffix}",
        "image": row["path"],
        "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
        "answer_type": "open",
        "task": "grounding",
        "kind": kind,
        "modality": row["modality"],
        "dataset": row["dataset"],
        "about": about,
    }


# --- masks -----------------------------------------------------------------------------------------------------------


class MaskFault(Exception):
    """Why a target cannot be used: a stable word, and a sentence."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _unusable(row: Mapping[str, Any], wanted: list[dict[str, Any]], settings: SaMed2dSettings, part: Part) -> set[int]:
    """Merge and check masks as the build asks; the classes whose mask cannot be used."""
    instances: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for mask in row["masks"]:
        instances[mask["class_id"]].append(mask)
    unusable: set[int] = set()
    size: tuple[int, int] | None = None
    for merged in wanted:
        own, target = instances[merged["class_id"]], settings.source / merged["file"]
        try:
            if settings.check or settings.merge:
                size = size or _image_size(settings.source / row["path"])
                if _is_whole_png(target):
                    _usable_mask([target], size)
                    part.count("merged masks", "there already")
                else:
                    joined = _usable_mask([settings.source / mask["file"] for mask in own], size)
                    if settings.merge:
                        write_png(target, joined.astype(np.uint8) * 255)
                        part.count("merged masks", "written")
            # A reader that finds no merged file looks for instances by number, and gives up after a gap.
            gaps = pairwise([-1, *(mask["instance"] for mask in own)])
            if not settings.merge and any(b - a > MERGED_GAP for a, b in gaps) and not target.exists():
                raise MaskFault(
                    "gap_in_instances",
                    f"{target.name}: the numbers of its {len(own)} instances leave gaps too wide for a reader; merge "
                    "them with --merge asked",
                )
        except MaskFault as fault:
            unusable.add(merged["class_id"])
            part.find(fault.kind, str(fault), image=row["path"], mask=merged["file"])
    return unusable


def _image_size(path: Path) -> tuple[int, int]:
    """(height, width) by the file's header."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MaskFault("unreadable_image", f"the image {path} cannot be read ({error})") from error
    return height, width


def _usable_mask(files: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
    """The union of instance masks, bool [H, W], at least one pixel set."""
    joined = np.zeros(size, dtype=bool)
    for file in files:
        try:
            mask = read_mask(file)
        except MedPLIBError as error:
            raise MaskFault("unreadable_mask" if file.exists() else "missing_mask", str(error)) from error
        if mask.shape != size:
            ours, theirs = (f"{height} × {width}" for height, width in (mask.shape, size))
            raise MaskFault("size_mismatch", f"the mask {file} is {ours} (h × w), its image {theirs}")
        joined |= mask
    if not joined.any():
        several = " in any instance" * (len(files) > 1)
        raise MaskFault("empty_mask", f"the mask {files[0]} has no foreground pixel{several}")
    return joined


def _is_whole_png(path: Path) -> bool:
    """Whether a file begins and ends as a PNG does: one that was cut short does not."""
    try:
        with path.open("rb") as stream:
            head = stream.read(len(_PNG_START))
            stream.seek(-len(_PNG_END), 2)
            return head == _PNG_START and stream.read() == _PNG_END
    except OSError:
        return False
