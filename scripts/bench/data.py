"""Measure the index build of SA-Med2D-20M on synthetic trees of several sizes; one dated report.

    python scripts/bench/data.py [--files 50000 200000] [--workers N] [--folder DIR] [--out docs/benchmarks]

A tree has the names, folders and lists of the real set: eight modalities, cases of 30 slices, 4.2 masks an image. Its
pictures are one tiny PNG, as the index reads names only. Every size is indexed by ``medplib data build sa-med2d
--prepare`` in processes of their own, whose memory is watched; then its records are written without looking at pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from tables import number, table

from model.data.builders.sa_med2d_source import CLASS_FILE, LIST_FILE
from model.errors import MedPLIBError

ROOT = Path(__file__).resolve().parents[2]
REAL_IMAGES, REAL_MASKS = 3_772_180, 15_800_000
MASKS_AN_IMAGE = (2, 3, 3, 4, 4, 4, 5, 5, 6, 6)  # 4.2 in the mean, as in the real set
TAGS = ("ct_00", "mr_t1", "x_ray", "pet_00", "fundus_photography", "dermoscopy_00", "endoscopy_00", "ultrasound_00")
CLASSES = 12
SLICES = 30
_EVERY = 0.05  # seconds between two looks at the memory


@dataclass(frozen=True)
class Measured:
    """One size of tree.

    Attributes:
        images, masks: files in it.
        seconds, cpu, peak: of the index build: wall clock, processor time and bytes of all its processes together.
        name_seconds: the part of it before the buckets were worked on: starting and reading names.
        record_seconds, record_cpu, record_peak: of the records after that.
        records: that came of it.
        index_bytes: of the index.
    """

    images: int
    masks: int
    seconds: float
    cpu: float
    peak: int
    name_seconds: float
    record_seconds: float
    record_cpu: float
    record_peak: int
    records: int
    index_bytes: int

    @property
    def files(self) -> int:
        return self.images + self.masks


def main() -> int:
    options = build_parser().parse_args()
    try:
        measured = [measure(size, options.workers, options.folder) for size in sorted(options.files)]
    except MedPLIBError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    text = report(measured, options.workers)
    sys.stdout.write(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{datetime.now(UTC):%Y-%m-%d}-data-index.md").write_text(text, encoding="utf-8")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[50_000, 200_000], help="images and masks of each tree")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where trees are made for the while; the usual one when absent")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the report")
    return parser


# --- trees ----------------------------------------------------------------------------------------------------------


def make_tree(root: Path, files: int) -> tuple[int, int]:
    """A tree of about so many files; numbers of images and masks in it."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[4:9, 4:9] = 255
    Image.fromarray(pixels).save(root / "pixel.png")
    content = (root / "pixel.png").read_bytes()
    images = masks = 0
    with (root / LIST_FILE).open("w", encoding="utf-8") as listed:
        for stem, tails in names():
            if images + masks >= files:
                break
            paths = [f"images/{stem}.png", *(f"masks/{stem}--{tail}.png" for tail in tails)]
            for path in paths:
                with (root / path).open("wb", buffering=0) as stream:
                    stream.write(content)
            listed.write(("," if images else "{") + f'\n  "{paths[0]}": {json.dumps(paths[1:])}')
            images, masks = images + 1, masks + len(tails)
        listed.write("\n}\n")
    names_of_classes = {f"structure_{chr(97 + number)}": number for number in range(CLASSES)}
    (root / CLASS_FILE).write_text(json.dumps({f"Set{number:03d}": names_of_classes for number in range(40)}))
    return images, masks


def names() -> Iterator[tuple[str, list[str]]]:
    """Image stems without end, each with the ends of its masks' names."""
    rng = np.random.default_rng(1)
    image = 0
    while True:
        case, place = divmod(image, SLICES)
        dataset = case % 40
        drawn = rng.choice(CLASSES, MASKS_AN_IMAGE[image % len(MASKS_AN_IMAGE)] - 1, replace=False)
        tails = [f"{number:04d}_000" for number in sorted(drawn)]
        tails.append(f"{min(drawn):04d}_001")  # a second instance
        yield f"{TAGS[dataset % len(TAGS)]}--Set{dataset:03d}--Case_{case:06d}--x_{place:04d}", tails
        image += 1


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(files: int, workers: int, folder: Path | None) -> Measured:
    """Make a tree, index it, write its records, and remove it all.

    Raises:
        MedPLIBError: a build failed.
    """
    place = Path(tempfile.mkdtemp(prefix="medplib-bench-", dir=folder))
    try:
        source, out = place / "SAMed2Dv1", place / "out"
        sys.stderr.write(f"making a tree of {files:,} files in {place}\n")
        images, masks = make_tree(source, files)
        command = ["data", "build", "sa-med2d", "--source", str(source), "--out", str(out), "--workers", str(workers)]
        seconds, cpu, peak = watched([*command, "--no-pixels", "--prepare"])
        index = json.loads((out / "report_sa-med2d-index.json").read_text(encoding="utf-8"))
        if index["counts"]["masks"]["all"] != masks or index["findings"]:
            raise MedPLIBError(f"the index of {source} is wrong; see {out}/report_sa-med2d-index.json")
        record_seconds, record_cpu, record_peak = watched([*command, "--no-pixels"])
        records = json.loads((out / "report_sa-med2d.json").read_text(encoding="utf-8"))
        return Measured(
            images,
            masks,
            seconds,
            cpu,
            peak,
            seconds - index["seconds"],
            record_seconds,
            record_cpu,
            record_peak,
            sum(records["counts"]["records by split"].values()),
            index["files"]["index.parquet"]["bytes"],
        )
    finally:
        shutil.rmtree(place)


def watched(arguments: Sequence[str]) -> tuple[float, float, int]:
    """Seconds that a ``medplib`` command takes, of the clock and of processors, and the most bytes held in its time.

    Pages that processes share are counted for each, so that the real number is somewhat smaller.
    """
    start, busy, peak = time.perf_counter(), processor_seconds(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "model.cli", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while process.poll() is None:
        peak = max(peak, sum(resident(member) for member in family(process.pid)))
        time.sleep(_EVERY)
    if process.returncode:
        told = process.stderr.read().decode() if process.stderr else ""
        raise MedPLIBError(f"medplib {' '.join(arguments)} ended with {process.returncode}: {told[-400:]}")
    return time.perf_counter() - start, processor_seconds() - busy, peak


def processor_seconds() -> float:
    """Of all processes that this one started and that have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *chain.from_iterable(family(int(child)) for child in children)]


def resident(pid: int) -> int:
    """Bytes of a process in memory; 0 once it has gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


# --- telling --------------------------------------------------------------------------------------------------------


def report(measured: Sequence[Measured], workers: int) -> str:
    """The dated report."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip() or "unknown"
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[1]
    lines = [
        f"# Index of SA-Med2D-20M, {datetime.now(UTC):%-d %B %Y}",
        "",
        f"Synthetic trees with the names of the real set, {workers} processes on {platform.machine()} with {cores} "
        f"cores, commit {commit}; the machine's load was {load:.1f} over the last five minutes. Made by "
        f"`scripts/bench/data.py --workers {workers}`; what the rows mean is described there.",
        "",
        *table(["", *(f"{one.files:,} files" for one in measured)], rows(measured)),
        "",
        *implied(measured),
    ]
    if load > cores / 2:
        lines += [
            "",
            "Other work ran on the same cores at the same time: times here are longer than on a free machine.",
        ]
    return "\n".join(lines) + "\n"


def rows(measured: Sequence[Measured]) -> list[list[str]]:
    """One row a quantity."""
    cells = {
        "images": [f"{one.images:,}" for one in measured],
        "masks": [f"{one.masks:,}" for one in measured],
        "index, s": [number(one.seconds) for one in measured],
        "processor time of all its processes, s": [number(one.cpu) for one in measured],
        "of the time starting and reading names, s": [number(one.name_seconds) for one in measured],
        "images a second": [number(one.images / one.seconds) for one in measured],
        "files a second": [number(one.files / one.seconds) for one in measured],
        "peak memory of all processes, MB": [number(one.peak / 1e6) for one in measured],
        "index file, bytes an image": [number(one.index_bytes / one.images) for one in measured],
        "records of all targets, s": [number(one.record_seconds) for one in measured],
        "processor time there, s": [number(one.record_cpu) for one in measured],
        "records a second": [number(one.records / one.record_seconds) for one in measured],
        "peak memory of all processes there, MB": [number(one.record_peak / 1e6) for one in measured],
    }
    return [[title, *values] for title, values in cells.items()]


def implied(measured: Sequence[Measured]) -> list[str]:
    """What the trees say about the real set, and what memory does as they grow.

    Times of the real set go by what more files took more: starting is paid once.
    """
    smallest, largest = measured[0], measured[-1]
    lines = []
    if largest.files > smallest.files:
        scale = (REAL_IMAGES + REAL_MASKS) / (largest.files - smallest.files)
        clock, cpu, records, records_cpu = (
            (getattr(largest, name) - getattr(smallest, name)) * scale / 60
            for name in ("seconds", "cpu", "record_seconds", "record_cpu")
        )
        lines.append(
            f"- The real set has {REAL_IMAGES:,} images and {REAL_MASKS / 1e6:.1f} M masks. At the rate at which the "
            f"larger tree took longer, its index takes {number(clock)} minutes here ({number(cpu)} of processor time, "
            f"over all processes) and {largest.index_bytes / largest.images * REAL_IMAGES / 1e9:.2f} GB; records of "
            f"all targets, without decoding masks, {number(records)} ({number(records_cpu)})."
        )
    for one, other in pairwise(measured):
        lines.append(
            f"- From {one.files:,} to {other.files:,} files ({other.files / one.files:.1f} times as many) the index "
            f"build's peak memory went from {number(one.peak / 1e6)} to {number(other.peak / 1e6)} MB."
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
