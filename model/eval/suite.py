"""Suites: which data sets a model is asked, how they are scored and where they come from, in one checked YAML.

A suite names everything that its numbers depend on, so that a table can be read years later: files, split, task,
headline metrics, thresholds, version, license and source of every set. The project's own are in ``configs/suites``.
"""

from __future__ import annotations

import json
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from model import shipped
from model.data.builders.jobs import whole_file
from model.data.builders.vqa import ParquetRows, written_image
from model.data.builders.vqa_rows import image_question_answer, omnimedvqa, slake, vqa_rad, vqa_rad_split
from model.data.records import open_records
from model.errors import MedPLIBError
from model.eval.metrics.definitions import metrics_for
from model.settings import expand, nearest, read_mapping, unknown_key

SUITES = shipped("configs/suites")
"""Folder of the project's own suites."""

CURVE = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Mask thresholds of a threshold curve."""

Task = Literal["vqa", "region", "grounding", "mixed"]
Layout = Literal["medplib", "slake", "vqa_rad", "parquet", "omnimedvqa"]
Prompt = Literal["training", "published"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Known:
    """A score of this set that somebody else reported: shown beside ours, never mixed with it."""

    metric: str
    value: float
    who: str


@dataclass(frozen=True)
class DataSet:
    """One data set of a suite."""

    name: str  # in file names and tables; letters, digits, hyphens
    # data files, asked in this order; a name may hold ``*``. Relative ones start from the suite's file.
    records: tuple[Path, ...]
    images: Path  # folder that the records' paths start from
    split: str  # which part of the data set these files are
    task: Task  # what is asked of the model, ``mixed`` for several
    headlines: tuple[str, ...]  # metrics that stand for the set in the summary, best known first
    licence: str  # of the data; "see the source" where it is not one licence
    source: str  # who made it and where it is described
    version: str  # of the data
    obtain: str  # how to get the files and where to put them; shown when they are absent
    title: str = ""  # for people; the name when absent
    about: str = ""  # a sentence or two on what it measures
    otherwise: tuple[Path, ...] = ()  # data files for where the first of ``records`` is not there
    layout: Layout = "medplib"  # of the files: the project's own, or that of a public set, which is rewritten
    # probabilities above which a pixel is in a mask; the first one makes the masks that are kept.
    thresholds: tuple[float, ...] = (0.1, 0.5)
    # decode a mask for each grounding question, whether or not the answer says ``<SEG>``, as the published evaluation
    # does.
    always_mask: bool = False
    prompt: Prompt = "training"  # system text of the prompt: the training's, or the one of the published evaluation
    answer_type: str = ""  # of all answers, where the records do not say
    surface: bool = False  # also measure the distance of outlines (HD95, NSD), which takes longer
    # also means over patients, masks beside a centre blob and the targets' average places, and the mean Dice over the
    # mask threshold, for which masks are kept at all of ``CURVE``. So is a user's own data asked.
    detailed: bool = False
    max_new_tokens: int = 256  # longest answer
    # data files that image-free baselines learn from, in the project's own layout, their paths starting from the
    # folder they are in; no baseline is computed where empty.
    blind: tuple[Path, ...] = ()
    known: tuple[Known, ...] = ()  # scores that others reported

    def files(self) -> list[Path]:
        """The data files that are there: those of ``records``, else those of ``otherwise``.

        Raises:
            MedPLIBError: neither are, or the folder of images is not; it says how to get them.
        """
        found, missing = _existing(self.records)
        if missing and self.otherwise:
            found, still_missing = _existing(self.otherwise)
            missing = missing if still_missing else []
        if not missing and not self.images.is_dir():
            missing = [self.images]
        if missing:
            raise MedPLIBError(f"{self.title} needs {missing[0]}, which is not there; {self.obtain}")
        return found


@dataclass(frozen=True)
class Suite:
    """Data sets that are evaluated together."""

    name: str  # of the suite; the file's own when absent
    sets: tuple[DataSet, ...]  # in the order of the report
    title: str = ""  # for people
    about: str = ""  # what the suite is for

    def only(self, names: Iterable[str]) -> Suite:
        """The suite with the sets of these names alone; all of them where no name is given.

        Raises:
            MedPLIBError: there is no such set.
        """
        wanted = list(names)
        known = [item.name for item in self.sets]
        for name in wanted:
            if name not in known:
                raise MedPLIBError(f"the suite {self.name} has no set {name} (nearest: {nearest(name, known)})")
        return replace(self, sets=tuple(item for item in self.sets if item.name in wanted)) if wanted else self


def available_suites() -> list[str]:
    """Names of the project's own suites."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name: str | Path, *, environment: Mapping[str, str] | None = None) -> Suite:
    """Read a suite and check it.

    ``${NAME}`` and ``${NAME:-default}`` come from the environment. A path that begins with the value of a variable
    starts from the current folder, any other relative path from the folder of the suite's file.

    Args:
        name: one of ``available_suites``, or a YAML file.
        environment: variables to expand; the process's own by default.

    Raises:
        MedPLIBError: there is no such suite, or it has problems, all of which are listed.
    """
    path = _find(str(name))
    problems: list[str] = []
    values = read_mapping(path, "the suite")
    values.setdefault("name", path.stem)
    reader = _Reader(path.parent, os.environ if environment is None else environment, problems)
    suite = reader.build(Suite, values, "")
    if suite is not None and not problems:
        problems += _problems_of(suite)
    if problems or suite is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise MedPLIBError(f"the suite {path} has {count}: {'; '.join(problems)}")
    sets = tuple(replace(item, title=item.title or item.name) for item in suite.sets)
    return replace(suite, title=suite.title or suite.name, sets=sets)


def is_suite(name: str) -> bool:
    """Whether a word on the command line names a suite: one of the project, or a YAML file."""
    own = "/" not in name and (SUITES / f"{name}.yaml").is_file()
    return own or Path(name).suffix.lower() in (".yaml", ".yml")


def _find(name: str) -> Path:
    own = SUITES / f"{name}.yaml"
    if "/" not in name and own.is_file():
        return own
    path = Path(name)
    if path.is_file():
        return path
    known = ", ".join(available_suites()) or "none are installed"
    raise MedPLIBError(f"there is no suite {name}; give a YAML file or one of: {known}")


def _existing(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Files that are there, names with ``*`` resolved and sorted, and names that no file has."""
    found: list[Path] = []
    missing: list[Path] = []
    for path in paths:
        matches = sorted(path.parent.glob(path.name)) if "*" in path.name else [path] if path.is_file() else []
        found += matches
        missing += [] if matches else [path]
    return found, missing


def _problems_of(suite: Suite) -> list[str]:
    problems = [] if suite.sets else ["sets is empty; give at least one"]
    names = [item.name for item in suite.sets]
    problems += [f"two sets have the name {name}" for name in sorted({n for n in names if names.count(n) > 1})]
    for item in suite.sets:
        where = f"set {item.name}"
        if not _NAME.fullmatch(item.name):
            problems.append(f"{where}: the name may hold letters, digits, '_', '.' and '-' only")
        problems += [f"{where}: {key} is empty" for key in ("records", "headlines") if not getattr(item, key)]
        problems += [f"{where}: {key} is empty; say it" for key in _TOLD if not getattr(item, key).strip()]
        if not item.thresholds or not all(0 < value < 1 for value in item.thresholds):
            problems.append(f"{where}: thresholds are {list(item.thresholds)}, expected numbers between 0 and 1")
            continue
        if item.max_new_tokens < 1:
            problems.append(f"{where}: max_new_tokens is {item.max_new_tokens}, expected at least 1")
        metrics = [metric.name for metric in metrics_for(item.thresholds, item.surface)]
        named = [*item.headlines, *(known.metric for known in item.known)]
        unknown = [name for name in named if name not in metrics]
        problems += [f"{where}: {name} is not a metric of it (nearest: {nearest(name, metrics)})" for name in unknown]
    return problems


_TOLD = ("split", "licence", "source", "version", "obtain")


@dataclass
class _Reader:
    """Plain values → frozen dataclasses; whatever does not fit goes to ``problems`` with its place."""

    folder: Path
    environment: Mapping[str, str]
    problems: list[str]

    def build(self, kind: type[Any], values: Any, place: str) -> Any:
        """An object of ``kind``, or None where a problem keeps it from being made."""
        if not isinstance(values, Mapping):
            self.problems.append(f"{place or 'the suite'} is {values!r:.60}, expected keys and values")
            return None
        hints, before = typing.get_type_hints(kind), len(self.problems)
        arguments: dict[str, Any] = {}
        for key, value in values.items():
            name = f"{place}.{key}".lstrip(".")
            if key not in hints:
                self.problems.append(unknown_key(name, (f"{place}.{known}".lstrip(".") for known in hints)))
            else:
                arguments[str(key)] = self.value(value, hints[str(key)], name)
        required = [item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING]
        absent = [name for name in required if name not in values]
        if absent:
            self.problems.append(f"{place or 'the suite'} lacks {', '.join(absent)}")
        return kind(**arguments) if len(self.problems) == before else None

    def value(self, value: Any, hint: Any, name: str) -> Any:
        """``value`` as ``hint``; None where it does not fit."""
        if typing.get_origin(hint) is tuple:
            items = [] if value is None else value if isinstance(value, list) else [value]
            inner = typing.get_args(hint)[0]
            return tuple(self.value(item, inner, f"{name}[{index}]") for index, item in enumerate(items))
        if is_dataclass(hint):
            return self.build(typing.cast("type[Any]", hint), value, name)
        try:
            return self.plain(value, hint, name)
        except ValueError as error:
            self.problems.append(f"{name} is {value!r:.60}, expected {error}")
            return None

    def plain(self, value: Any, hint: Any, name: str) -> Any:
        """A single value; raises with what was expected."""
        if typing.get_origin(hint) is Literal:
            if value not in typing.get_args(hint):
                raise ValueError(f"one of {', '.join(typing.get_args(hint))}")
            return value
        if hint in (str, Path):
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError("a path" if hint is Path else "text")
            text = self.expand(str(value), name, is_path=hint is Path)
            return Path(os.path.normpath(self.folder / Path(text).expanduser())) if hint is Path else text
        if hint is bool:
            if not isinstance(value, bool):
                raise ValueError("true or false")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("a whole number" if hint is int else "a number")
        if hint is int and value != int(value):
            raise ValueError("a whole number")
        return hint(value)

    def expand(self, text: str, name: str, *, is_path: bool = False) -> str:
        """``text`` with its variables filled in; a variable that begins a path starts from the current folder."""

        def missing(variable: str) -> None:
            self.problems.append(f"{name} needs the environment variable {variable}, which is not set")

        return expand(text, self.environment, missing, is_path=is_path)


Record = Mapping[str, Any]


def write_questions(item: DataSet, folder: Path) -> tuple[Path, Path]:
    """Write the records of a data set to ``folder/NAME.jsonl``.

    Args:
        item: the data set.
        folder: where the file goes, and a folder ``NAME`` with the images of files that hold them inside.

    Returns:
        The file, and the folder that the paths in it start from.

    Raises:
        MedPLIBError: a file of the set is missing or is not of its layout, or there is no question in them.
    """
    files = item.files()
    pictures = folder / item.name
    images = pictures if item.layout == "parquet" else item.images
    with whole_file(target := folder / f"{item.name}.jsonl") as stream:  # processes of one launch write the same
        for record in _records(item, files, pictures):
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        if not stream.tell():
            listed = ", ".join(map(str, files))
            raise MedPLIBError(f"{item.title} has no question in {listed}; check its files and layout")
    return target, images


def _records(item: DataSet, files: list[Path], pictures: Path) -> Iterator[Record]:
    """The questions of all files, each with an id where several files could give the same one."""
    for file in files:
        rows = _parquet(file, pictures) if item.layout == "parquet" else open_records(file)
        for number, row in enumerate(rows):
            try:
                record = _LAYOUTS[item.layout](row)
            except (KeyError, TypeError, ValueError) as error:
                raise MedPLIBError(
                    f"{file}, record {number}, is not of the layout {item.layout} ({type(error).__name__}: {error}); "
                    "give the file that its source publishes, or name another layout"
                ) from error
            if record is None:
                continue
            if item.answer_type and not record.get("answer_type"):
                record = {**record, "answer_type": item.answer_type}
            yield {"id": f"{file.stem}-{number}", **record} if len(files) > 1 and "id" not in record else record


_LAYOUTS: dict[Layout, Callable[[Record], Record | None]] = {
    "medplib": lambda row: row,
    "slake": lambda row: slake(row) if row["q_lang"] == "en" else None,  # the English half is what is reported
    "vqa_rad": lambda row: vqa_rad(row) if vqa_rad_split(row) == "test" else None,  # and the test half
    "parquet": image_question_answer,
    "omnimedvqa": omnimedvqa,
}


def _parquet(file: Path, pictures: Path) -> Iterator[Record]:
    """Rows of a file with the columns ``image`` (encoded bytes), ``question`` and ``answer``; images become files."""
    rows = ParquetRows(file)
    try:
        for number, row in enumerate(rows.between(0, len(rows))):
            yield {**row, "id": f"{file.stem}-{number}", "image": written_image(row["image"], pictures)}
    except (OSError, ValueError) as error:  # a row without an image, or a damaged file
        raise MedPLIBError(
            f"{file} cannot be used ({error}); give the Parquet files that its source publishes"
        ) from error
