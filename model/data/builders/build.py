"""A source of any layout → a built folder: recognize, list, split by patient, read pixels, ask, write."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.data.builders.cases import (
    Case,
    Problem,
    ReadOptions,
    Recognize,
    Source,
    SplitPlan,
    draw,
    exact_sizes,
    file_key,
    image_files,
    named_patient,
    patient_of,
    without_suffix,
)
from model.data.builders.jobs import write_bytes
from model.data.builders.published import path_from
from model.data.builders.questions import SeenCase, SeenMask, blind_baseline, label_name, records_of
from model.data.image_io import MaskData, read_image
from model.errors import MedPLIBError, shown

FORMAT = "medplib-dataset/1"
DATASET = "dataset.json"
PROBLEMS = "problems.csv"
DEFAULT_SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}
TASKS = ("vqa", "grounding", "region")
_PARTIAL = ".partial"
_CHUNK = 32  # cases whose results are kept together for going on after a stop
_SERIAL = 128  # so many cases are read without starting processes
_FEW_PATIENTS = 1000  # up to so many, splits get exact shares
_PATH = re.compile(r"<(mask|region)>(.*?)</\1>", re.DOTALL)
_HELD_OUT = ("test", "validation", "train")  # what is in an earlier one is in no later one


@dataclass(frozen=True)
class BuildSettings:
    """What a build is asked for, beside its source."""

    options: ReadOptions = field(default_factory=ReadOptions)  # how the source is read
    kind: str = ""  # a layout's name; empty to recognize it
    # split → share of the patients; None takes the source's splits, else ``DEFAULT_SPLITS``
    splits: Mapping[str, float] | None = None
    seed: int = 0  # of splits, wordings and choices
    ask_modality: bool = False  # ask for the modality even if all images have the same


@dataclass(frozen=True)
class Listing:
    """All cases of a source with their splits, before a pixel is read."""

    source: Source  # the recognized source, whose problems include those of splitting
    cases: tuple[Case, ...]  # in the source's order, each with its patient
    split_of: Mapping[str, str]  # key of a case → its split


def layouts() -> list[tuple[str, Recognize]]:
    """Kinds of layouts and their readers, in the order in which they are asked."""
    from model.data.builders import image_layouts, table_layouts, volume_layouts

    return [
        ("sa-med2d", image_layouts.recognize_sa_med2d),
        ("conversations", table_layouts.recognize_conversations),
        ("coco", table_layouts.recognize_coco),
        ("nnunet", partial(volume_layouts.recognize_dataset_json, "nnunet")),
        ("msd", partial(volume_layouts.recognize_dataset_json, "msd")),
        ("volume_table", volume_layouts.recognize_volume_table),
        ("volumes", volume_layouts.recognize_volumes),
        ("table", table_layouts.recognize_table),
        ("masks", image_layouts.recognize_masks),
        ("classes", image_layouts.recognize_classes),
    ]


def recognize(root: Path, options: ReadOptions | None = None, kind: str = "") -> Source:
    """What lies at ``root``. Raises MedPLIBError: nothing is there, or no layout fits, or not the ``kind`` given."""
    from model.data.builders.image_layouts import is_mask

    options = options or ReadOptions()
    readers = layouts()
    kinds = sorted(name for name, _ in readers)
    if kind and kind not in kinds:
        raise MedPLIBError(f"--kind {shown(kind)} is no layout; give one of {', '.join(kinds)}")
    if not root.exists():
        raise MedPLIBError(f"{root} does not exist; give a folder or a file of your data")
    if (root / DATASET).is_file() and FORMAT in (root / DATASET).read_text(encoding="utf-8", errors="replace")[:4096]:
        raise MedPLIBError(f"{root} is a built folder already; give it to medplib finetune or medplib eval as it is")
    for name, reader in readers:
        if kind in ("", name) and (source := reader(root, options)) is not None:
            return source
    if not kind and root.is_dir() and (files := list(image_files(root, []))) and all(map(is_mask, files)):
        raise MedPLIBError(f"{root} holds masks, as in {files[0]}, but no images; give the folder that holds both")
    raise MedPLIBError(
        f"{root} is not recognized as {kind or 'any of ' + ', '.join(kinds)}; give the folder that holds images with "
        "their masks or a table of them (docs/data.md shows each layout), or force one with --kind"
    )


def list_cases(root: Path, settings: BuildSettings) -> Listing:
    """Recognize a source, list its cases and give each a split. Raises MedPLIBError: it is not recognized, has no case,
    or a pattern or share cannot be used."""
    source = recognize(root, settings.options, settings.kind)
    try:
        pattern = re.compile(settings.options.patient_pattern) if settings.options.patient_pattern else None
    except re.error as error:
        given = shown(settings.options.patient_pattern)
        raise MedPLIBError(f"--patient-pattern {given} is no regular expression ({error})") from error
    stated: set[str] = set()
    cases: dict[str, Case] = {}
    named: dict[str, str] = {}
    base = root if root.is_dir() else root.parent
    for case in source.cases():
        if case.key in cases:
            raise MedPLIBError(f"{case.origin} and {cases[case.key].origin} have the same name; rename one of them")
        origin = Path(case.origin)
        path = without_suffix((origin.relative_to(base) if origin.is_relative_to(base) else Path(case.key)).as_posix())
        known = pattern is None and case.patient is not None
        patient = case.patient or "" if known else patient_of(path, pattern)
        if known or pattern is not None:
            stated.add(case.key)
        named[case.key] = named_patient(path) or ""
        cases[case.key] = replace(case, patient=patient)
    if not cases:
        first = next((f"; first problem: {one.file}: {one.message}; {one.fix}" for one in source.problems), "")
        raise MedPLIBError(f"{root}: {source.summary}, but no case of it can be used{first}")
    if not stated and len({case.patient for case in cases.values()}) == len(cases) > 1:
        message = f"each of the {len(cases)} images counts as a patient of its own"
        source.problems.append(
            Problem("patients_in_doubt", str(root), message, "if several are of one, give --patient-pattern REGEX")
        )
    kept, split_of = _split(list(cases.values()), stated, named, settings, source)
    return Listing(source, tuple(kept), split_of)


def _split(
    cases: list[Case], stated: set[str], named: Mapping[str, str], settings: BuildSettings, source: Source
) -> tuple[list[Case], dict[str, str]]:
    """Cases that are used, and the split of each: the source's, else drawn by patient."""
    given = {case.key: case.split for case in cases if case.split} if settings.splits is None else {}
    if set(given.values()) == {"train"}:  # a source of training images alone is split like one that says nothing
        given = {}
    splits_of_patient: dict[str, set[str]] = defaultdict(set)
    by_name: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        if case.key in given:
            splits_of_patient[case.patient or ""].add(given[case.key])
            by_name[named[case.key]].add(given[case.key])
    left: set[str] = set()
    for case in cases:
        held = next((name for name in _HELD_OUT if name in splits_of_patient[case.patient or ""]), None)
        if case.key in given and case.key in stated and held != given[case.key]:
            left.add(case.key)
            message = f"{case.patient} is in {held} too: this image of {given[case.key]} is left out"
            fix = "make new splits with --splits train=0.8,validation=0.1,test=0.1 to use all"
            source.problems.append(Problem("patient_in_two_splits", case.origin, message, fix))
    for patient, splits in sorted(by_name.items()):
        if patient and len(splits) > 1 and not stated:
            message = f"by file name the patient {patient} is in {' and '.join(sorted(splits))}"
            fix = "make new splits with --splits train=0.8,validation=0.1,test=0.1"
            source.problems.append(Problem("patient_in_two_splits", source.kind, message, fix))
    kept = [case for case in cases if case.key not in left]
    free = sorted(
        {case.patient or "" for case in kept if case.key not in given and not splits_of_patient[case.patient or ""]}
    )
    shares = dict(settings.splits or DEFAULT_SPLITS)
    if given:  # what has no split goes to those that the source does not name
        shares = {name: share for name, share in shares.items() if name not in set(given.values())} or {"train": 1.0}
        shares = {name: share / sum(shares.values()) for name, share in shares.items()}
    free.sort(key=lambda patient: (draw(settings.seed, "", patient), patient))
    if len(free) > _FEW_PATIENTS:
        plan = SplitPlan(shares, settings.seed)
        drawn = {patient: plan.of("", patient) for patient in free}
    else:
        sizes = exact_sizes(shares, len(free))
        drawn = dict(zip(free, (name for name, size in sizes.items() for _ in range(size)), strict=True))
    split_of = {}
    for case in kept:
        patient = case.patient or ""
        beside = next((name for name in _HELD_OUT if name in splits_of_patient[patient]), "train")
        split_of[case.key] = given.get(case.key) or drawn.get(patient) or beside
    return kept, split_of


# ---- pixels --------------------------------------------------------------------------------------------------------


def _see(case: Case, out: Path, write: bool) -> tuple[SeenCase | None, list[Problem]]:
    problems: list[Problem] = []
    try:
        image = read_image(case.image) if isinstance(case.image, Path) else case.image()
    except MedPLIBError as error:
        return None, [Problem("unreadable_image", case.origin, str(error), "mend or remove it")]
    if isinstance(case.image, Path):
        path = path_from(out, case.image)
    else:
        path = f"images/{case.key}.png"
        if write:
            _write_png(out / path, Image.fromarray(image.pixels))
    joined: dict[str, np.ndarray] = {}
    for target in case.targets:
        try:
            read = target.read()
        except MedPLIBError as error:
            problems.append(Problem("unreadable_mask", target.origin, str(error), "mend or remove it"))
            continue
        mask = read.pixels if isinstance(read, MaskData) else read
        if isinstance(read, MaskData) and read.note:
            nameless = read.note.startswith("holds")
            fix = "add it to the table of names" if nameless else "save masks as PNG of two values"
            kind = "value_without_name" if nameless else "soft_mask"
            problems.append(Problem(kind, target.origin, read.note, fix))
        if mask.shape != image.size:
            ours, theirs = (f"{height} × {width}" for height, width in (mask.shape, image.size))
            message = f"the mask is {ours} (h × w), its image {theirs}"
            problems.append(Problem("size_mismatch", target.origin, message, "save both in one size"))
            continue
        if mask.all():
            problems.append(Problem("full_mask", target.origin, "every pixel is foreground", "look whether it is one"))
        joined[target.name] = mask | joined[target.name] if target.name in joined else mask
    masks = {}
    for name, mask in sorted(joined.items()):
        if area := int(mask.sum()):
            mask_path = f"masks/{case.key}--{file_key(name)}.png"
            half = mask.shape[1] // 2
            left = float(mask[:, :half].sum() + mask[:, half : mask.shape[1] - half].sum() / 2) / area
            overlaps = tuple(
                other for other, theirs in sorted(joined.items()) if other != name and (mask & theirs).any()
            )
            masks[name] = SeenMask(mask_path, area, round(left, 4), overlaps)
            if write:
                _write_png(out / mask_path, Image.fromarray(mask))
    absent = {*case.absent, *(name for name in joined if name not in masks)} - set(masks)
    return SeenCase(path, case.spacing_mm or image.spacing_mm, masks, tuple(sorted(absent))), problems


def _see_chunk(cases: Sequence[Case], out: Path, partial: Path | None) -> list[Any]:
    """What was seen of a chunk of cases as plain values; kept in the file ``partial``, or read from it."""
    if partial is not None and partial.is_file():
        return json.loads(partial.read_text(encoding="utf-8"))
    plain = json.dumps(
        [_see(case, out, partial is not None) for case in cases], default=lambda problem: problem.__dict__
    )
    if partial is not None:
        write_bytes(partial, plain.encode())
    return json.loads(plain)


def _see_all(
    cases: Sequence[Case], out: Path, write: bool, workers: int, progress: Callable[[int], object]
) -> Iterator[tuple[SeenCase | None, list[Problem]]]:
    chunks = [cases[start : start + _CHUNK] for start in range(0, len(cases), _CHUNK)]
    files = [out / _PARTIAL / f"{number:06d}.json" if write else None for number in range(len(chunks))]
    many = workers > 1 and len(cases) > _SERIAL
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if many else nullcontext() as pool:
        for chunk in (pool.map if pool else map)(_see_chunk, chunks, [out] * len(chunks), files):
            for seen, problems in chunk:
                yield SeenCase.of(seen) if seen else None, [Problem(**problem) for problem in problems]
            progress(len(chunk))


# ---- the whole -----------------------------------------------------------------------------------------------------


def build_dataset(
    root: Path,
    out: Path | None,
    settings: BuildSettings | None = None,
    *,
    workers: int = 1,
    dry_run: bool = False,
    overwrite: bool = False,
    report: Callable[[str], object] = lambda line: None,
    progress: Callable[[int], object] = lambda cases: None,
) -> dict[str, Any]:
    """Build ``out`` from the source ``root``; what a stopped build left is used again. Returns the content of
    ``out/dataset.json``. Raises MedPLIBError: the source cannot be used, or ``out`` holds something else.

    Args:
        root: a folder or file of any layout.
        out: folder of the results; see docs/data.md ("A built folder"). May be None with ``dry_run``.
        settings: what is asked for.
        workers: processes that read pixels.
        dry_run: read and report everything, and write nothing.
        overwrite: replace a build of other settings or another source.
        report: takes lines on what is recognized, split, left out and written.
        progress: takes the number of cases that were just read.
    """
    settings = settings or BuildSettings()
    if out is None:
        out, dry_run = root / "never-written", True
    elif root.is_dir() and out.resolve().is_relative_to(root.resolve()):
        raise MedPLIBError(f"--out {out} lies inside the source {root}; give a folder outside of it")
    listing = list_cases(root, settings)
    report(f"{root}: {listing.source.summary} (--kind {listing.source.kind})")
    fingerprint = _fingerprint(root, listing, settings)
    if not dry_run and (done := _prepare(out, fingerprint, overwrite)):
        report(f"{out} holds this build already")
        return done
    pairs: dict[str, list[tuple[Case, SeenCase]]] = {name: [] for name in (*DEFAULT_SPLITS, *(settings.splits or {}))}
    problems = list(listing.source.problems)
    for case, (seen, found) in zip(
        listing.cases, _see_all(listing.cases, out, not dry_run, workers, progress), strict=True
    ):
        problems += found
        if seen is not None:
            if case.questions:
                case = replace(case, questions=tuple((_relative(out, q), _relative(out, a)) for q, a in case.questions))
            pairs[listing.split_of[case.key]].append((case, seen))
    problems = list(dict.fromkeys(problems))
    dataset, records = _described(root, listing, pairs, settings)
    dataset |= {"fingerprint": fingerprint, "problems": dict(Counter(problem.kind for problem in problems))}
    for line in _table(dataset, problems):
        report(line)
    if not records:
        first = next((f"; first problem: {one.file}: {one.message}; {one.fix}" for one in problems), "")
        raise MedPLIBError(f"{root}: no question can be asked about its {len(listing.cases)} images{first}")
    if dry_run:
        report("nothing is written (--dry-run)")
        return dataset
    for file, made in records.items():
        write_bytes(out / file, json.dumps(made, ensure_ascii=False, indent=1).encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("kind", "file", "message", "fix"))
    writer.writerows((one.kind, one.file, one.message, one.fix) for one in problems)
    write_bytes(out / PROBLEMS, text.getvalue().encode())
    write_bytes(out / DATASET, json.dumps(dataset, ensure_ascii=False, indent=1).encode())
    shutil.rmtree(out / _PARTIAL, ignore_errors=True)
    report(f"wrote {len(records)} files of {sum(map(len, records.values()))} records to {out}, where their paths start")
    return dataset


def _described(
    root: Path, listing: Listing, pairs: Mapping[str, Sequence[tuple[Case, SeenCase]]], settings: BuildSettings
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    name = root.resolve().stem if root.is_file() else root.resolve().name
    names: dict[str | None, set[str]] = defaultdict(set)
    values: dict[str, set[str]] = defaultdict(set)
    targets: dict[str, dict[str, int]] = defaultdict(Counter)
    absent: dict[str, dict[str, int]] = defaultdict(Counter)
    modalities: set[str] = set()
    for split, group in pairs.items():
        for case, seen in group:
            names[case.modality] |= set(seen.masks)
            modalities |= {case.modality} if case.modality else set()
            for label, value in case.labels.items():
                values[label].add(value)
            for table, found in ((targets, seen.masks), (absent, seen.absent)):
                for target in found:
                    table[target][split] += 1
    listed = {label: sorted(found) for label, found in sorted(values.items())}
    known = {modality: sorted(found) for modality, found in names.items()}
    files: dict[str, list[dict[str, Any]]] = {}
    splits, counts, blind = {}, {}, {}
    by_split = {
        split: records_of(group, known, listed, name, seed=settings.seed, ask_modality=settings.ask_modality)
        for split, group in pairs.items()
    }
    for split, records in by_split.items():
        if not records:
            continue
        made = {task: [record for record in records if record["task"] == task] for task in TASKS}
        splits[split] = [f"{split}/{task}.json" for task in TASKS if made[task]]
        files |= {f"{split}/{task}.json": made[task] for task in TASKS if made[task]}
        counts[split] = {
            "cases": len({case.patient for case, _ in pairs[split]}),
            "images": len(pairs[split]),
            "targets": sum(len(seen.masks) for _, seen in pairs[split]),
            "records": {task: len(made[task]) for task in TASKS},
        }
        guessed = blind_baseline(by_split.get("train") or records, records)
        blind[split] = {kind: round(share, 3) for kind, share in guessed.items()}
    dataset = {
        "format": FORMAT,
        "name": name,
        "kind": listing.source.kind,
        "source": str(root.resolve()),
        "summary": listing.source.summary,
        "settings": _plain_settings(settings),
        "images_root": ".",
        "splits": splits,
        "counts": counts,
        "targets": {target: dict(found) for target, found in sorted(targets.items())},
        "absent": {target: dict(found) for target, found in sorted(absent.items())},
        "modalities": sorted(modalities),
        "labels": {label_name(label): found for label, found in listed.items()},
        "blind": blind,
        "terms": listing.source.terms or None,
    }
    return dataset, files


def _table(dataset: Mapping[str, Any], problems: Sequence[Problem]) -> Iterator[str]:
    yield f"{'split':<12}{'cases':>8}{'images':>8}{'targets':>9}{'vqa':>8}{'grounding':>11}{'region':>8}  blind"
    for split, count in dataset["counts"].items():
        row = f"{split:<12}{count['cases']:>8}{count['images']:>8}{count['targets']:>9}"
        row += "".join(f"{count['records'][task]:>{width}}" for task, width in zip(TASKS, (8, 11, 8), strict=True))
        yield row + "  " + ", ".join(f"{kind} {share:.2f}" for kind, share in dataset["blind"][split].items())
    for split in DEFAULT_SPLITS:
        if split not in dataset["counts"]:
            yield f"no {split} split: no usable case is in it"
    for name, key in (("targets", "targets"), ("stated absent", "absent")):
        if dataset[key]:
            yield f"{name}: " + ", ".join(f"{target} {sum(found.values())}" for target, found in dataset[key].items())
    if dataset["labels"]:
        yield "labels: " + "; ".join(f"{label} ({' | '.join(found)})" for label, found in dataset["labels"].items())
    yield "modalities: " + (", ".join(dataset["modalities"]) or "not stated; give --modality")
    counted = Counter(problem.kind for problem in problems)
    for kind, count in sorted(counted.items()):
        first = next(problem for problem in problems if problem.kind == kind)
        yield f"{kind}: {count}, such as {first.file}: {first.message} → {first.fix}"


def _plain_settings(settings: BuildSettings) -> dict[str, Any]:
    plain = asdict(settings)
    plain["options"]["names"] = str(settings.options.names.resolve()) if settings.options.names else None
    return plain


def _fingerprint(root: Path, listing: Listing, settings: BuildSettings) -> str:
    digest = blake2b(json.dumps([str(root.resolve()), _plain_settings(settings)]).encode(), digest_size=16)
    if settings.options.names:
        digest.update(settings.options.names.read_bytes())
    for case in listing.cases:
        plain: list[Any] = [
            case.key,
            case.patient,
            listing.split_of[case.key],
            case.modality,
            sorted(case.labels.items()),
        ]
        plain += [case.questions, case.absent, case.foreign, [(target.name, target.origin) for target in case.targets]]
        for file in (case.origin, *(target.origin for target in case.targets)):
            try:
                state = Path(file).stat()
                plain.append((file, state.st_size, state.st_mtime_ns))
            except OSError:
                plain.append(file)
        digest.update(json.dumps(plain, default=str).encode())
    return digest.hexdigest()


def _prepare(out: Path, fingerprint: str, overwrite: bool) -> dict[str, Any] | None:
    """Make ``out`` ready; what it holds if this very build is finished there. Raises MedPLIBError: it holds another
    build and ``overwrite`` is not given, or anything else."""
    mark, done = out / _PARTIAL / "fingerprint", {}
    if (out / DATASET).is_file():
        with suppress(ValueError):
            done = json.loads((out / DATASET).read_text(encoding="utf-8"))
        if not isinstance(done, dict) or done.get("format") != FORMAT:
            raise MedPLIBError(f"{out} holds a {DATASET} that no build wrote; give --out a folder of its own")
        if done.get("fingerprint") == fingerprint:
            shutil.rmtree(out / _PARTIAL, ignore_errors=True)
            return done
    elif not mark.is_file() and out.is_dir() and any(out.iterdir()):
        raise MedPLIBError(f"--out {out} is not empty and holds no build; give a folder of its own")
    if done or (mark.is_file() and mark.read_text(encoding="utf-8") != fingerprint):
        if not overwrite:
            raise MedPLIBError(f"{out} holds a build of another source or settings; add --overwrite to replace it")
        (out / DATASET).unlink(missing_ok=True)
        for folder in ("masks", "images", _PARTIAL, *done.get("splits", DEFAULT_SPLITS)):
            shutil.rmtree(out / folder, ignore_errors=True)
    write_bytes(mark, fingerprint.encode())
    return None


def _relative(root: Path, text: str) -> str:
    return _PATH.sub(lambda match: f"<{match[1]}>{path_from(root, Path(match[2]))}</{match[1]}>", text)


def _write_png(path: Path, image: Image.Image) -> None:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    write_bytes(path, stream.getvalue())
