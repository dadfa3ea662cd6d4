"""Check a data file in one pass: all problems with record numbers."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from model.data.image_io import ReadLimits, mask_files, read_image, read_mask_data
from model.data.records import Records, open_records
from model.data.schema import Finding, Sample, Severity, inspect_record, record_id
from model.errors import MedPLIBError, shown

if TYPE_CHECKING:  # it imports torch, which few checks need
    from model.data.packing import LengthCheck

Progress = Callable[[int, int], None]

_CHUNK = 512  # records in flight: bounds memory whatever the file's length


@dataclass(frozen=True)
class Problem:
    """One problem of one record."""

    record: int  # number of the record in the file, from 0 (blank lines of JSON lines are not counted)
    kind: str  # stable word, ``missing_image`` say
    message: str  # what is wrong, for people
    id: str = ""  # the record's own id, empty where it has none or cannot be parsed
    # ``error`` keeps the record out of training, ``repaired`` was mended on the way, ``warning`` is all
    severity: Severity = "error"

    def __str__(self) -> str:
        name = f" ({self.id})" if self.id else ""
        note = "" if self.severity == "error" else f" [{self.severity}]"
        return f"record {self.record}{name}: {self.kind}: {self.message}{note}"


@dataclass(frozen=True)
class RecordFacts:
    """What a data set keeps in memory about one usable record."""

    id: str
    task: str
    modality: str | None
    answer_type: str | None
    mark: int  # 64 bits that change with the name or the size of any file that it names
    images: int = 0
    tokens: int = 0  # an image counting as one; 0 where they were not counted
    picture: int = 0  # 64 bits that are the same for records of the same image files; 0 for a text alone


@dataclass
class DataReport:
    """Outcome of ``check_file``: all problems in record order, and counts of what is in the file."""

    path: Path
    images_root: Path
    total: int
    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Some record, and no problem but warnings: a repaired record is still one to mend."""
        return self.total > 0 and all(problem.severity == "warning" for problem in self.problems)

    @property
    def bad_records(self) -> tuple[int, ...]:
        """Numbers of the records that training cannot use, ascending."""
        return tuple(sorted({problem.record for problem in self.problems if problem.severity == "error"}))

    def format(self) -> str:
        """The report as text: problems one a line, their counts, and what the file holds."""
        lines = [str(problem) for problem in self.problems]
        if self.problems:
            kinds = Counter(problem.kind for problem in self.problems)
            lines += ["", "problems: " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())]
        for name, values in self.counts.items():
            lines.append(f"{name}: " + ", ".join(f"{value} {count}" for value, count in values.items()))
        verdict = "no problems" if not self.problems else f"{len(self.problems)} problems"
        unusable = len(self.bad_records)
        lines.append(
            f"{self.path}: {self.total} records, {verdict}" + (f", {unusable} records unusable" if unusable else "")
        )
        return "\n".join(lines)


def check_file(
    path: str | Path,
    images_root: str | Path,
    *,
    progress: Progress | None = None,
    check_pixels: bool = True,
    workers: int | None = None,
    lengths: LengthCheck | None = None,
) -> DataReport:
    """Check every record of a data file and report all problems at once.

    The kinds of problem are listed in docs/data.md; keys that the format does not know are none. Raises MedPLIBError:
    the file itself cannot be read as a list of records, or ``images_root`` is no folder.

    Args:
        path: JSON list, JSON lines or Parquet file.
        images_root: folder the records' paths are relative to.
        progress: called with (records done, records in all) now and then.
        check_pixels: decode every image and mask once; without it only their existence is checked.
        workers: threads; by default as many as processors, at most 16.
        lengths: also counts tokens: ``too_long``, ``answer_cut`` (warning), ``region_not_asked``.
    """
    records, root = open_records(path), Path(images_root)
    if not root.is_dir():
        raise MedPLIBError(
            f"the image folder {root} does not exist; give the folder that the records' paths start from"
        )
    report = DataReport(Path(path), root, total=len(records))
    pixels = PixelCheck(ReadLimits()) if check_pixels else None
    tallies: dict[str, Counter[str]] = {name: Counter() for name in ("tasks", "modalities", "answer types")}
    seen: dict[str, int] = {}
    for number, facts, problems in inspect_all(records, root, pixels, workers, progress, lengths=lengths):
        report.problems += problems
        if facts is None:
            continue
        tallies["tasks"][facts.task] += 1
        tallies["modalities"][shown(facts.modality or "unknown", quoted=False)] += 1
        tallies["answer types"][shown(facts.answer_type or "unknown", quoted=False)] += 1
        if facts.id and seen.setdefault(facts.id, number) != number:
            message = f"record {seen[facts.id]} has the same id"
            report.problems.append(Problem(number, "duplicate_id", message, facts.id, "warning"))
    report.counts = {name: dict(sorted(tally.items())) for name, tally in tallies.items() if tally}
    return report


def inspect_all(
    records: Records,
    root: Path,
    pixels: PixelCheck | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    in_context: bool = True,
    lengths: LengthCheck | None = None,
) -> Iterator[tuple[int, RecordFacts | None, list[Problem]]]:
    """(number, facts or None where the record is unusable, problems) of all records, in order.

    Without ``in_context``, records that carry solved examples are unusable: their reader shows the examples' masks."""

    def one(number: int) -> tuple[int, RecordFacts | None, list[Problem]]:
        try:
            raw = records[number]
        except MedPLIBError as error:
            return number, None, [Problem(number, "invalid_json", str(error))]
        sample, findings = inspect_record(raw, root)
        name, tokens = shown(record_id(raw), quoted=False), 0
        if sample is not None:
            if sample.examples and not in_context:
                message = "the record shows solved examples, which this data set does not read"
                findings.append(Finding("in_context", message))
            findings += pixels(sample) if pixels is not None else []
            tokens, found = lengths(sample) if lengths is not None else (0, [])
            findings += found
        problems = [Problem(number, finding.kind, finding.message, name, finding.severity) for finding in findings]
        if sample is None or any(problem.severity == "error" for problem in problems):
            return number, None, problems
        labels = sample.task, sample.modality, sample.answer_type
        mark, picture = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
        for path in (*sample.images, *sample.regions, *sample.masks):
            try:  # sizes, not times: a data set that was copied is still the same
                size = path.stat().st_size
            except OSError:  # a merged mask that lies as instances
                size = sum(part.stat().st_size for part in mask_files(path))
            mark.update(f"{str(path)[len(str(root)) :]}\0{size}\0".encode(errors="surrogateescape"))
        names = "\0".join(os.path.normpath(path.absolute()) for path in sample.images)
        picture.update(names.encode(errors="surrogateescape"))
        numbers = [int.from_bytes(digest.digest(), "little") for digest in (mark, picture)]
        return (
            number,
            RecordFacts(
                name, *labels, numbers[0], len(sample.images), tokens, (numbers[1] or 1) if sample.images else 0
            ),
            problems,
        )

    count, threads = len(records), workers or min(os.cpu_count() or 1, 16)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for start in range(0, count, _CHUNK):
            chunk = range(start, min(start + _CHUNK, count))
            yield from pool.map(one, chunk) if threads > 1 else map(one, chunk)
            if progress:
                progress(chunk.stop, count)


@contextmanager
def record_bar(what: str, *, shown: bool = True) -> Iterator[Progress]:
    """Give the ``progress`` that ``check_file`` and ``MedPLIBDataset`` call; it goes when they are done."""
    with tqdm(unit="record", desc=what, leave=False, disable=None if shown else True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


@dataclass(frozen=True)
class _Pixels:
    """What is remembered of one decoded file: records share images, and each is decoded once."""

    size: tuple[int, int] | None  # None where the file is unreadable
    empty: bool = False
    fault: str = ""
    warnings: tuple[tuple[str, str], ...] = ()  # kind without region or mask, and what follows the file's name


class PixelCheck:
    """Decodes the images, regions and masks of a sample and compares them."""

    def __init__(self, limits: ReadLimits) -> None:
        self._limits = limits
        self._known: dict[tuple[str, Path], _Pixels] = {}

    def __call__(self, sample: Sample) -> list[Finding]:
        findings: list[Finding] = []
        sizes = [self._image(path, findings) for path in sample.images]
        for path, image in zip(sample.regions, sample.region_images, strict=True):
            self._mask(path, sizes[image] if image < len(sizes) else None, "region", findings)
        for path in sample.masks:
            self._mask(path, sizes[sample.segment_image], "mask", findings)
        for number, example in enumerate(sample.examples):
            self._mask(example.mask, sizes[number], "mask", findings)
        return findings

    def _image(self, path: Path, findings: list[Finding]) -> tuple[int, int] | None:
        pixels = self._remember("image", path)
        if pixels.size is None:
            findings.append(Finding("unreadable_image", pixels.fault))
        findings += [Finding(kind, f"{path.name}: {note}", "warning") for kind, note in pixels.warnings]
        return pixels.size

    def _mask(self, path: Path, image: tuple[int, int] | None, what: str, findings: list[Finding]) -> None:
        pixels = self._remember("mask", path)
        if pixels.size is None:
            findings.append(Finding("unreadable_mask", pixels.fault))
            return
        if pixels.empty:
            findings.append(Finding(f"empty_{what}", f"the {what} {path.name} has no foreground pixel"))
        for kind, note in pixels.warnings:
            findings.append(Finding(f"{kind}_{what}", f"the {what} {path.name} {note}", "warning"))
        if image is not None and pixels.size != image:
            ours, theirs = (f"{height} × {width}" for height, width in (pixels.size, image))
            findings.append(Finding("size_mismatch", f"the {what} {path.name} is {ours} (h × w), its image {theirs}"))

    def _remember(self, kind: str, path: Path) -> _Pixels:
        if (kind, path) not in self._known:  # two threads may decode the same file: harmless
            try:
                self._known[kind, path] = self._decode(kind, path)
            except MedPLIBError as error:
                self._known[kind, path] = _Pixels(None, fault=str(error))
        return self._known[kind, path]

    def _decode(self, kind: str, path: Path) -> _Pixels:
        if kind == "image":
            image = read_image(path, self._limits)
            return _Pixels(image.size, warnings=tuple(("odd_header", note) for note in image.notes))
        data = read_mask_data(path, self._limits)
        mask, warnings = data.pixels, [("soft", data.note)] if data.note else []
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        if mask.all():
            warnings.append(("full", "is foreground everywhere"))
        elif mask.mean() > 0.5 and border.mean() > 0.9:
            warnings.append(("inverted", "looks inverted: most of it and of its border is foreground"))
        return _Pixels((mask.shape[0], mask.shape[1]), not mask.any(), warnings=tuple(warnings))
