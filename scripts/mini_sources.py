"""Unpack the real sets that MedPLIB-mini learns from, and write one table of them all.

    python scripts/mini_sources.py --out runs/mini/sources

Reads the tars of MEDPLIB_REAL (default ../shared/real). ``SET/`` is each set as it comes, without rows that state no
licence; ``all/meta.csv`` has the rows of every set, so that regions and refusals are asked about across sets.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import sys
from pathlib import Path

SETS = (
    *("polypgen", "cxr_lungs", "covid_cxr_seg", "lgg_mri", "ct_liver", "busi", "hc18", "ph2", "chase_db1"),
    *("drishti_gs", "ibsi_sts"),
)
# What no image of a set can show: targets of other images of its modality, and of other modalities.
FOREIGN = {
    "polypgen": ("lungs", "optic disc", "fetal head", "skin lesion", "liver", "glioma"),
    "cxr_lungs": ("glioma", "polyp", "retinal vessels", "skin lesion", "fetal head", "breast lesion", "optic disc"),
    "covid_cxr_seg": ("glioma", "polyp", "retinal vessels", "skin lesion", "fetal head", "breast lesion", "optic cup"),
    "lgg_mri": ("sarcoma", "liver", "lungs", "polyp", "fetal head", "optic disc", "skin lesion", "kidney"),
    "ct_liver": ("sarcoma", "optic disc", "fetal head", "skin lesion", "glioma", "polyp", "retinal vessels"),
    "busi": ("fetal head", "gallstone", "lungs", "optic disc", "polyp", "glioma", "liver", "skin lesion"),
    "hc18": ("breast lesion", "gallstone", "lungs", "optic cup", "polyp", "glioma", "liver", "skin lesion"),
    "ph2": ("lungs", "polyp", "optic disc", "fetal head", "liver", "breast lesion", "retinal vessels"),
    "chase_db1": ("lungs", "polyp", "skin lesion", "fetal head", "liver", "breast lesion", "glioma"),
    "drishti_gs": ("lungs", "polyp", "skin lesion", "fetal head", "liver", "breast lesion", "glioma"),
    "ibsi_sts": ("liver", "kidney", "glioma", "lungs", "polyp", "optic disc", "fetal head", "skin lesion"),
}
_RENAMED = {"label": "breast finding", "video_or_patient": "patient", "dup_group": "group"}
_KEPT = (
    *("image", "mask", "target", "modality", "patient", "group", "split", "spacing", "area"),
    *("tuberculosis", "diagnosis"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to unpack into")
    options = parser.parse_args()
    source = Path(os.environ.get("MEDPLIB_REAL", "../shared/real"))
    missing = [name for name in SETS if not (source / f"{name}.tar").is_file()]
    if missing:
        parser.error(f"{source} lacks {', '.join(missing)} (.tar); name the folder of the real sets by MEDPLIB_REAL")
    rows = []
    for name in SETS:
        shutil.unpack_archive(source / f"{name}.tar", options.out)
        rows += [{**row, "foreign": ";".join(FOREIGN[name])} for row in licensed_rows(options.out / name)]
    (options.out / "all").mkdir(exist_ok=True)
    write_rows(options.out / "all" / "meta.csv", rows)
    sys.stdout.write(f"{options.out / 'all' / 'meta.csv'}: {len(rows)} masks of {len(SETS)} sets\n")
    return 0


def licensed_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a set for the table of all; rows without a stated licence leave the set's own table, too."""
    table = folder / "meta.csv"
    with table.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    stated = [row for row in rows if not row.get("redistributable", "").startswith("unknown")]
    if len(stated) < len(rows):
        write_rows(table, stated)
    renamed = [{_RENAMED.get(key, key): value for key, value in row.items()} for row in stated]
    result = []
    for row in renamed:
        paths = {key: f"../{folder.name}/{row[key]}" for key in ("image", "mask")}
        owner = {key: f"{folder.name} {row[key]}" if row.get(key) else "" for key in ("patient", "group")}
        result.append({key: row.get(key, "") for key in (*_KEPT, "breast finding")} | paths | owner)
    return result


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """A CSV of rows that have the same keys."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
