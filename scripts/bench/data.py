"""Measure the index build of SA-Med2D-20M on synthetic trees of several sizes; one dated table and its CSV.

    python scripts/bench/data.py [--files 50000 200000] [--workers N] [--folder DIR] [--out docs/benchmarks]

A tree has the names, folders and lists of the real set: eight modalities, cases of 30 slices, 4.2 masks an image. Its
pictures are one tiny PNG, as the index reads names only. ``medplib data build sa-med2d --no-pixels`` indexes every
size and writes its records; its processes' memory is watched (pages that they share are counted for each), times are
those of its reports. Times of the real set go by what more files took more.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from common import ROOT, bench_parser, number, positive, publish
from PIL import Image

from model.data.builders.sa_med2d_index import CLASS_FILE, LIST_FILE
from model.errors import MedPLIBError

REAL_IMAGES, REAL_MASKS = 3_772_180, 15_800_000
MASKS_AN_IMAGE = (2, 3, 3, 4, 4, 4, 5, 5, 6, 6)  # 4.2 in the mean, as in the real set
TAGS = ("ct_00", "mr_t1", "x_ray", "pet_00", "fundus_photography", "dermoscopy_00", "endoscopy_00", "ultrasound_00")
CLASSES, SLICES, DATASETS = 12, 30, 40
_EVERY = 0.05  # seconds between two looks at the memory
Row = dict[str, float]


def main() -> int:
    parser = bench_parser(__doc__)
    parser.add_argument("--files", type=positive, nargs="+", default=[50_000, 200_000], help="of each tree")
    parser.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where trees are made for the while; the usual one when absent")
    options = parser.parse_args()
    try:
        rows = [measure(size, options.workers, options.folder) for size in sorted(options.files)]
    except MedPLIBError as error:
        parser.error(str(error))
    publish(
        options.out, "data-index", "Index of SA-Med2D-20M", rows, [f"Processes: {options.workers}.", *implied(rows)]
    )
    return 0


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
    classes = {f"structure_{chr(97 + place)}": place for place in range(CLASSES)}
    (root / CLASS_FILE).write_text(json.dumps({f"Set{place:03d}": classes for place in range(DATASETS)}))
    return images, masks


def names() -> Iterator[tuple[str, list[str]]]:
    """Image stems without end, each with the ends of its masks' names."""
    rng = np.random.default_rng(1)
    image = 0
    while True:
        case, place = divmod(image, SLICES)
        dataset = case % DATASETS
        drawn = rng.choice(CLASSES, MASKS_AN_IMAGE[image % len(MASKS_AN_IMAGE)] - 1, replace=False)
        tails = [f"{one:04d}_000" for one in sorted(drawn)]
        tails.append(f"{min(drawn):04d}_001")  # a second instance
        yield f"{TAGS[dataset % len(TAGS)]}--Set{dataset:03d}--Case_{case:06d}--x_{place:04d}", tails
        image += 1


def measure(files: int, workers: int, folder: Path | None) -> Row:
    """Make a tree, index it, write its records, and remove it all; one row.

    Raises:
        MedPLIBError: a build failed.
    """
    place = Path(tempfile.mkdtemp(prefix="medplib-bench-", dir=folder))
    try:
        source, out = place / "SAMed2Dv1", place / "out"
        sys.stderr.write(f"making a tree of {files:,} files in {place}\n")
        images, masks = make_tree(source, files)
        command = ["data", "build", "sa-med2d", "--source", str(source), "--out", str(out), "--no-pixels"]
        seconds, peak = watched([*command, "--workers", str(workers)])
        index, records = (
            json.loads((out / f"report_{name}.json").read_text(encoding="utf-8"))
            for name in ("sa-med2d-index", "sa-med2d")
        )
        if index["counts"]["masks"]["all"] != masks or index["findings"]:
            raise MedPLIBError(f"the index of {source} is wrong; see {out}/report_sa-med2d-index.json")
        written = sum(records["counts"]["records by split"].values())
    finally:
        shutil.rmtree(place)
    return {
        "images": images,
        "masks": masks,
        "whole command s": seconds,
        "index s": index["seconds"],
        "files a second": (images + masks) / index["seconds"],
        "index bytes an image": index["files"]["index.parquet"]["bytes"] / images,
        "records s": records["seconds"],
        "records a second": written / records["seconds"],
        "peak MB": peak / 1e6,
    }


def watched(arguments: Sequence[str]) -> tuple[float, int]:
    """Seconds that a ``medplib`` command takes, and the most bytes that its processes held together."""
    start, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "model.cli", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.Error):
            peak = max(peak, sum(one.memory_info().rss for one in (parent, *parent.children(recursive=True))))
        time.sleep(_EVERY)
    if process.returncode:
        message = process.stderr.read().decode() if process.stderr else ""
        raise MedPLIBError(f"medplib {' '.join(arguments)} ended with {process.returncode}: {message[-400:]}")
    return time.perf_counter() - start, peak


def implied(rows: Sequence[Row]) -> list[str]:
    """What the trees say about the real set."""
    small, large = rows[0], rows[-1]
    more = large["images"] + large["masks"] - small["images"] - small["masks"]
    if more <= 0:
        return []
    scale = (REAL_IMAGES + REAL_MASKS) / more / 60
    index, records = (number((large[name] - small[name]) * scale) for name in ("index s", "records s"))
    size = large["index bytes an image"] * REAL_IMAGES / 1e9
    return [
        f"At the rate at which the larger tree took longer, the real set ({REAL_IMAGES:,} images, {REAL_MASKS:,} "
        f"masks) takes {index} minutes and {size:.2f} GB to index, and {records} for records of all targets without "
        "decoding masks."
    ]


if __name__ == "__main__":
    sys.exit(main())
