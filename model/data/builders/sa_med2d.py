"""Build from SA-Med2D-20M: an index of all images and masks, splits, merged masks, and grounding records.

Three steps: names are read and sorted into buckets, buckets become the index, rows of the index become records and
merged masks. Reading names and making the index takes minutes for the real set; the last step decodes masks. The last
two are builds of their own (see ``work``).
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.data.builders.sa_med2d_index import (
    BYTES_A_PIECE,
    CLASS_COUNTS,
    INDEX_FILE,
    INDEX_OUTPUT,
    IndexContext,
    index_buckets,
    index_pieces,
    read_class_label,
)
from model.data.builders.sa_med2d_listing import list_names
from model.data.builders.sa_med2d_records import Form, Merge, RecordContext, record_outputs, write_records
from model.data.builders.sa_med2d_sampling import (
    IMAGES_A_PIECE,
    SURVEY_FILE,
    SURVEY_OUTPUT,
    Quota,
    Stratum,
    SurveyContext,
    choose,
    row_pieces,
    survey,
)
from model.data.builders.sa_med2d_source import Source, check_datasets
from model.data.builders.splits import SplitPlan
from model.data.builders.work import Build, BuildReport, Execution, finished_report, run_build, sole_use
from model.errors import MedPLIBError


@dataclass(frozen=True)
class SaMed2dSettings:
    """What is to be built.

    Attributes:
        source: the unpacked data set.
        out: folder of index, records and reports.
        plan: the splits.
        quota: targets of each modality; all if None.
        absent_share: of questions for absent targets among all, 0 … 0.5.
        seed: of the choice of targets, absent targets and wordings.
        merge: which merged masks are written below ``source``: none, those asked for, all.
        check: decode the masks asked for and leave out what training could not use.
        form: of the record files.
        bytes_a_piece, images_a_piece: how finely the work is cut up.
    """

    source: Path
    out: Path
    plan: SplitPlan = field(default_factory=SplitPlan)
    quota: Quota | None = None
    absent_share: float = 0.1
    seed: int = 0
    merge: Merge = ""
    check: bool = True
    form: Form = "jsonl"
    bytes_a_piece: int = BYTES_A_PIECE
    images_a_piece: int = IMAGES_A_PIECE

    def __post_init__(self) -> None:
        if not 0 <= self.absent_share <= 0.5:
            raise MedPLIBError(f"--absent-share is {self.absent_share:g}; give 0 to 0.5")

    @property
    def index(self) -> Path:
        return self.out / INDEX_FILE


def build_sa_med2d(settings: SaMed2dSettings, execution: Execution) -> list[BuildReport]:
    """Make the index, records and merged masks.

    Args:
        settings: what.
        execution: how.

    Returns:
        Reports of the index and of the records.

    Raises:
        MedPLIBError: the source is not SA-Med2D-20M, settings do not fit it, or a build cannot go on (see ``work``).
    """
    source = Source.open(settings.source)
    for listed in (settings.source / "images", settings.source / "masks"):
        if settings.out.resolve().is_relative_to(listed.resolve()):
            raise MedPLIBError(f"--out {settings.out} lies in {listed}, whose files are listed; name another folder")
    check_datasets(sorted(settings.plan.hold_out), source.class_names())
    index = _index(settings, source, execution)
    taken = _taken(settings, index, execution)
    return [index, _records(settings, index, taken, execution)]


def _index(settings: SaMed2dSettings, source: Source, execution: Execution) -> BuildReport:
    build = Build(settings.out, "sa-med2d-index", settings.plan.to_json(), (INDEX_OUTPUT,), source.prints)
    done = finished_report(build, same_source=execution.same_source)
    if done:
        return replace(done, did_nothing=True)
    with sole_use(replace(build, name="sa-med2d-names")):
        report = _made_index(settings, source, build, execution)
    if not report.counts.get("images"):
        raise MedPLIBError(f"no image of {settings.source} has a name of SA-Med2D-20M; see {report.findings_file}")
    return report


def _made_index(settings: SaMed2dSettings, source: Source, build: Build, execution: Execution) -> BuildReport:
    names = _names_folder(build)
    for stale in names.parent.glob("names-*"):
        if stale != names:
            shutil.rmtree(stale)
    with tqdm(unit=" names", desc="reading names", disable=None if execution.bar else True, unit_scale=True) as bar:
        list_names(source, names, bar.update)
    context = IndexContext(names, source.class_names(), settings.plan, source.has_folders, source.has_list)
    report = run_build(build, index_pieces(names, settings.bytes_a_piece), index_buckets, context, execution, unit="B")
    shutil.rmtree(names)
    return report


def _names_folder(build: Build) -> Path:
    """Where names are kept until the index is made; another for a changed source."""
    identity = blake2b(repr(sorted(build.source.items())).encode(), digest_size=6).hexdigest()
    return build.folder / f"names-{identity}"


def _taken(settings: SaMed2dSettings, index: BuildReport, execution: Execution) -> dict[Stratum, int] | None:
    """Which targets the quota takes."""
    if settings.quota is None:
        return None
    absent = sorted(set(settings.quota.named) - set(index.counts["images by modality"]))
    if absent:
        there = ", ".join(index.counts["images by modality"])
        raise MedPLIBError(f"--per-modality names {', '.join(absent)}, which has no image here; there are {there}")
    chosen = {"quota": settings.quota.to_json(), "seed": settings.seed}
    build = Build(settings.out / ".build" / "sampling", "sampling", chosen, (SURVEY_OUTPUT,), _index_identity(index))
    if finished_report(build) is None:
        context = SurveyContext(settings.index, settings.quota, settings.plan, settings.seed)
        pieces = row_pieces(settings.index, settings.images_a_piece)
        run_build(build, pieces, survey, context, replace(execution, overwrite=True), unit="image")
    return choose(build.out / SURVEY_FILE, settings.quota, settings.plan)


def _index_identity(index: BuildReport) -> dict[str, Any]:
    return {"index": f"{index.files[INDEX_FILE]['bytes']} bytes", **index.settings}


def _records(
    settings: SaMed2dSettings, index: BuildReport, taken: dict[Stratum, int] | None, execution: Execution
) -> BuildReport:
    classes: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for label in index.counts.get(CLASS_COUNTS, {}):
        modality, dataset, class_id, name = read_class_label(label)
        if name is not None:
            classes[modality, dataset][class_id] = name
    build = Build(
        settings.out,
        "sa-med2d",
        {
            "per_modality": settings.quota.to_json() if settings.quota else "all",
            "absent_share": settings.absent_share,
            "seed": settings.seed,
            "merge": settings.merge or "none",
            "check": settings.check,
            "format": settings.form,
        },
        record_outputs(settings.plan.names, settings.form),
        _index_identity(index),
    )
    context = RecordContext(
        settings.source,
        settings.index,
        taken,
        settings.seed,
        settings.seed,
        settings.absent_share,
        settings.merge,
        settings.check,
        settings.form,
        dict(classes),
    )
    pieces = row_pieces(settings.index, settings.images_a_piece)
    return run_build(build, pieces, write_records, context, execution, unit="image")
