"""A number for the files that a record names, by which a changed data set is noticed without reading pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path

from model.data.image_io import mask_files
from model.data.schema import Sample


def files_mark(sample: Sample, root: Path) -> int:
    """64 bits that change with the name or the size of any image, region or mask file of a record.

    Sizes, not times: a data set that was copied is still the same. A file whose size stayed is taken as unchanged.

    Args:
        sample: a usable record.
        root: folder its paths start from, which is left out of the names.
    """
    start = len(str(root))
    digest = hashlib.blake2b(digest_size=8)
    for path in (*sample.images, *sample.regions, *sample.masks):
        digest.update(f"{str(path)[start:]}\0{_size(path)}\0".encode(errors="surrogateescape"))
    return int.from_bytes(digest.digest(), "little")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a merged mask that lies as instances
        return sum(part.stat().st_size for part in mask_files(path))
