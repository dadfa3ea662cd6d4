"""Suites: data sets, metrics and sources in one checked YAML, or a user's own data as a suite of one set.

A suite names everything that its numbers depend on, so that a table can be read years later: files, split, task,
headline metrics, thresholds, version, license and source of every set. The project's own are in ``configs/suites``.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BeforeValidator,
    ConfigDict,
    FiniteFloat,
    Strict,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)

from model import shipped
from model.data.builders.jobs import whole_file
from model.data.builders.vqa import ParquetRows, written_image
from model.data.builders.vqa_rows import image_question_answer, omnimedvqa, slake, vqa_rad, vqa_rad_split
from model.data.records import open_records
from model.data.schema import CONVERSATION_KEYS
from model.errors import MedPLIBError
from model.eval.metrics.definitions import metrics_for
from model.eval.shards import fingerprint, journals_under, run_folder
from model.settings import expand, nearest, read_mapping, unknown_key

logger = logging.getLogger(__name__)

SUITES = shipped("configs/suites")
"""Folder of the project's own suites."""
CURVE = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Mask thresholds of a threshold curve."""

Task = Literal["vqa", "region", "grounding", "mixed"]
Layout = Literal["medplib", "slake", "vqa_rad", "parquet", "omnimedvqa"]
Prompt = Literal["training", "published"]

# --- settings -------------------------------------------------------------------------------------------------------

_CHECKS = ConfigDict(extra="forbid")
_CONTEXT = tuple[Path, Mapping[str, str]]  # folder that paths start from, and the environment


def _text(value: Any, info: ValidationInfo) -> Any:
    """Text with its variables filled in; numbers are text too."""
    if info.context is None or isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    return _expanded(str(value), info)


def _path(value: Any, info: ValidationInfo) -> Any:
    """A path from the suite's folder; one that begins with a variable starts from the current folder."""
    if info.context is None or isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    text = _expanded(str(value), info, is_path=True)
    return Path(os.path.normpath(info.context[0] / Path(text).expanduser()))


def _expanded(text: str, info: ValidationInfo, *, is_path: bool = False) -> str:
    unset: list[str] = []
    found = expand(text, info.context[1], unset.append, is_path=is_path) if info.context else text
    if unset:
        raise ValueError(unset[0])
    return found


def _items(value: Any) -> Any:
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


Item = TypeVar("Item")
Number = Annotated[FiniteFloat, Strict()]
Text = Annotated[str, BeforeValidator(_text)]
PathOf = Annotated[Path, BeforeValidator(_path)]
Many = Annotated[tuple[Item, ...], BeforeValidator(_items)]
"""A list, or one item of it."""


@dataclass(frozen=True)
class Known:
    """A score of this set that somebody else reported: shown beside ours, never mixed with it."""

    metric: Text
    value: Number
    who: Text
    __pydantic_config__: ClassVar[ConfigDict] = _CHECKS


@dataclass(frozen=True)
class DataSet:
    """One data set of a suite."""

    name: Text  # in file names and tables; letters, digits, hyphens
    # data files, asked in this order; a name may hold ``*``. Relative ones start from the suite's file.
    records: Many[PathOf]
    images: PathOf  # folder that the records' paths start from
    split: Text  # which part of the data set these files are
    task: Task  # what is asked of the model, ``mixed`` for several
    headlines: Many[Text]  # metrics that stand for the set in the summary, best known first
    licence: Text  # of the data; "see the source" where it is not one licence
    source: Text  # who made it and where it is described
    version: Text  # of the data
    obtain: Text  # how to get the files and where to put them; shown when they are absent
    title: Text = ""  # for people; the name when absent
    about: Text = ""  # a sentence or two on what it measures
    otherwise: Many[PathOf] = ()  # data files for where the first of ``records`` is not there
    layout: Layout = "medplib"  # of the files: the project's own, or that of a public set, which is rewritten
    # probabilities above which a pixel is in a mask; the first one makes the masks that are kept.
    thresholds: Many[Number] = (0.1, 0.5)
    # decode a mask for each grounding question, whether or not the answer says ``<SEG>``, as the published evaluation
    # does.
    always_mask: StrictBool = False
    prompt: Prompt = "training"  # system text of the prompt: the training's, or the one of the published evaluation
    answer_type: Text = ""  # of all answers, where the records do not say
    surface: StrictBool = False  # also measure the distance of outlines (HD95, NSD), which takes longer
    # also means over patients, masks beside a centre blob and the targets' average places, and the mean Dice over the
    # mask threshold, for which masks are kept at all of ``CURVE``. So is a user's own data asked.
    detailed: StrictBool = False
    max_new_tokens: StrictInt = 256  # longest answer
    # data files that image-free baselines learn from, in the project's own layout, their paths starting from the
    # folder they are in; no baseline is computed where empty.
    blind: Many[PathOf] = ()
    known: Many[Known] = ()  # scores that others reported
    __pydantic_config__: ClassVar[ConfigDict] = _CHECKS

    def files(self) -> list[Path]:
        """The data files that are there: those of ``records``, else those of ``otherwise``.

        Raises:
            MedPLIBError: neither are, or the folder of images is not; it says how to get them.
        """
        missing: list[Path] = []
        for paths in (self.records, self.otherwise) if self.otherwise else (self.records,):
            # a name with * stands for all files that match it
            matches = [sorted(path.parent.glob(path.name)) if "*" in path.name else [path] for path in paths]
            there = [[path for path in found if path.is_file()] for found in matches]
            if all(there):
                missing = [] if self.images.is_dir() else [self.images]
                break
            missing = missing or [path for path, found in zip(paths, there, strict=True) if not found]
        if missing:
            raise MedPLIBError(f"{self.title} needs {missing[0]}, which is not there; {self.obtain}")
        return [path for found in there for path in found]


@dataclass(frozen=True)
class Suite:
    """Data sets that are evaluated together."""

    name: Text  # of the suite; the file's own when absent
    sets: Many[DataSet]  # in the order of the report
    title: Text = ""  # for people
    about: Text = ""  # what the suite is for
    __pydantic_config__: ClassVar[ConfigDict] = _CHECKS

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


def is_suite(name: str) -> bool:
    """Whether a word on the command line names a suite: one of the project, or a YAML file."""
    return name in available_suites() or Path(name).suffix.lower() in (".yaml", ".yml")


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
    path = SUITES / f"{name}.yaml" if str(name) in available_suites() else Path(name)
    if not path.is_file():
        known = ", ".join(available_suites()) or "none are installed"
        raise MedPLIBError(f"there is no suite {name}; give a YAML file or one of: {known}")
    values = {"name": path.stem, **read_mapping(path, "the suite")}
    try:
        context = (path.parent, os.environ if environment is None else environment)
        suite = TypeAdapter(Suite).validate_python(values, context=context)
        problems = _problems_of(suite)
    except ValidationError as error:
        problems = _sentences(error)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise MedPLIBError(f"the suite {path} has {count}: {'; '.join(problems)}")
    sets = tuple(replace(item, title=item.title or item.name) for item in suite.sets)
    return replace(suite, title=suite.title or suite.name, sets=sets)


_EXPECTED = {"int": "a whole number", "float": "a number", "finite": "a number", "bool": "true or false"}
_EXPECTED |= {"string": "text", "path": "a path", "dataclass": "keys and values"}


def _sentences(error: ValidationError) -> list[str]:
    """What is wrong, a sentence for each value; what a section lacks in one."""
    problems: list[str] = []
    lacking: dict[str, list[str]] = defaultdict(list)
    for found in error.errors(include_url=False):
        *above, key = found["loc"]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in above).lstrip(".")
        name = f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key}".lstrip(".")
        kind = {"sets": DataSet, "known": Known}.get(next((p for p in above[::-1] if isinstance(p, str)), ""), Suite)
        wanted = _EXPECTED.get(found["type"].split("_")[0], found["msg"])
        if found["type"] == "missing":
            lacking[place or "the suite"].append(str(key))
        elif found["type"] == "unexpected_keyword_argument":
            problems.append(unknown_key(name, (f"{place}.{item.name}".lstrip(".") for item in fields(kind))))
        elif found["type"] == "value_error":
            problems.append(f"{name} needs the environment variable {found['ctx']['error']}, which is not set")
        elif found["type"] == "literal_error":
            options = {"task": Task, "layout": Layout, "prompt": Prompt}[str(key)]
            problems.append(f"{name} is {found['input']!r:.60}, expected one of {', '.join(get_args(options))}")
        else:
            problems.append(f"{name} is {found['input']!r:.60}, expected {wanted}")
    return [*problems, *(f"{place} lacks {', '.join(names)}" for place, names in lacking.items())]


def _problems_of(suite: Suite) -> list[str]:
    problems = [] if suite.sets else ["sets is empty; give at least one"]
    names = [item.name for item in suite.sets]
    problems += [f"two sets have the name {name}" for name in sorted({n for n in names if names.count(n) > 1})]
    for item in suite.sets:
        where = f"set {item.name}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", item.name):
            problems.append(f"{where}: the name may hold letters, digits, '_', '.' and '-' only")
        problems += [f"{where}: {key} is empty" for key in ("records", "headlines") if not getattr(item, key)]
        stated = ("split", "licence", "source", "version", "obtain")
        problems += [f"{where}: {key} is empty; say it" for key in stated if not getattr(item, key).strip()]
        if not item.thresholds or not all(0 < value < 1 for value in item.thresholds):
            problems.append(f"{where}: thresholds are {list(item.thresholds)}, expected numbers between 0 and 1")
            continue
        if item.max_new_tokens < 1:
            problems.append(f"{where}: max_new_tokens is {item.max_new_tokens}, expected at least 1")
        metrics = [metric.name for metric in metrics_for(item.thresholds, item.surface)]
        for name in (*item.headlines, *(known.metric for known in item.known)):
            if name not in metrics:
                problems.append(f"{where}: {name} is not a metric of it (nearest: {nearest(name, metrics)})")
    return problems


# --- a user's own data ----------------------------------------------------------------------------------------------

DATASET_FILE = "dataset.json"
THRESHOLD = 0.5
"""At which own data's masks are cut, as everywhere that nobody names another."""
HEADLINES = (
    *(f"{name}@{THRESHOLD:g}" for name in ("mDice", "mIoU", "false_mask_rate")),
    *("refused_rate", "closed_accuracy", "open_exact_match"),
    *(f"{name}_{unit}@{THRESHOLD:g}" for unit in ("mm", "px") for name in ("HD95", "NSD")),
)
_RECORD_SUFFIXES = (".json", ".jsonl", ".parquet")


def own_suite(data: Path, *, split: str, images: Path | None, cache: Path, may_build: bool = True) -> Suite:
    """A suite of one set from a user's own data.

    Args:
        data: a record file of the project's format, a folder of ``medplib data build``, or a source of any layout.
        split: of a built folder; a record file is asked whole.
        images: folder that the paths of a record file start from; the file's own where None.
        cache: folder that a source is built into.
        may_build: False refuses a source, as one of several processes must.

    Raises:
        MedPLIBError: there is nothing, the source has no known layout, or the folder has no such split.
    """
    if not data.exists():
        raise MedPLIBError(
            f"there is no suite or data {data}; give one of: {', '.join(available_suites())}, a suite's YAML file, "
            "a record file, a folder of medplib data build, or a source that it can build"
        )
    if is_record_file(data):
        about = {"source": str(data.resolve()), "version": f"{datetime.fromtimestamp(data.stat().st_mtime, UTC):%F}"}
        return _suite(data_name(data), [data], images or data.parent, "all records", (), **about)
    found = find_dataset(data) if data.is_dir() else None
    if found is None:
        if not may_build:
            raise MedPLIBError(
                f"{data} is not built yet, which several processes cannot do together; run "
                f"medplib data build {data} --out DIR first and evaluate DIR"
            )
        found, data = find_dataset(build_source(data, cache)), cache
        if found is None:
            raise MedPLIBError(f"{cache} holds no finished {DATASET_FILE}; remove the folder and try again")
    files = {name: [data / file for file in listed] for name, listed in found["splits"].items()}
    if not files.get(split):
        known = ", ".join(name for name, listed in files.items() if listed) or "none"
        raise MedPLIBError(f"{data} has no split {split} (it has: {known}); name one with --split")
    train = files.get("train", []) if split != "train" else []
    about = {
        "about": str(found.get("summary") or ""),
        "source": str(found.get("source") or data),
        "version": str(found.get("fingerprint") or "")[:12] or "not stated",
        "licence": " ".join(str(found.get("terms") or "").split())[:300] or "not stated",
    }
    images = data / str(found.get("images_root") or ".")
    return _suite(str(found.get("name") or data_name(data)), files[split], images, split, train, **about)


def build_source(source: Path, out: Path) -> Path:
    """Build a source of any layout into a folder with ``dataset.json``; goes on where an earlier build stopped.

    Raises:
        MedPLIBError: the layout is not known.
    """
    from model.data.builders.build import build_dataset  # heavy

    build_dataset(source, out, report=logger.info)
    return out


def data_name(data: Path) -> str:
    """What own data is called in tables and folders: its file's or folder's name, as far as a name may hold it."""
    path = data.resolve()
    return _as_name(path.name if path.is_dir() else path.stem)


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "data"


def own_run_folder(model: Path, name: str, *, overwrite: bool = False) -> Path:
    """``runs/eval/MODEL/NAME-DATE``; the newest unfinished one of the same checkpoint where a run was stopped."""
    folder, digest = run_folder("eval", model), fingerprint(model)
    for earlier in sorted(folder.glob(f"{name}-[0-9]*"), reverse=True) if not overwrite else ():
        mine = any(journal.of_model(digest) for journal in journals_under(earlier / "predictions"))
        if mine and not (earlier / "report.html").is_file():
            return earlier
    return folder / f"{name}-{datetime.now(UTC):%Y-%m-%d}"


def is_record_file(path: Path) -> bool:
    """Whether a file's first record has a conversation; COCO files and tables of questions are sources."""
    if not path.is_file() or path.suffix.lower() not in _RECORD_SUFFIXES:
        return False
    with suppress(MedPLIBError):
        first = open_records(path)[0]
        return isinstance(first, dict) and any(isinstance(first.get(key), list) for key in CONVERSATION_KEYS)
    return False


def find_dataset(folder: Path) -> dict[str, Any] | None:
    """A built folder's ``dataset.json``; None where there is none, or another program's (nnU-Net has one too)."""
    try:
        found = json.loads((folder / DATASET_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise MedPLIBError(f"{folder / DATASET_FILE} cannot be read ({error}); build the folder again") from error
    return found if isinstance(found, dict) and isinstance(found.get("splits"), dict) else None


def _suite(name: str, files: Iterable[Path], images: Path, split: str, train: Iterable[Path], **about: str) -> Suite:
    item = DataSet(
        name=_as_name(name),
        title=name,
        records=tuple(files),
        images=images,
        split=split,
        task="mixed",
        headlines=HEADLINES,
        thresholds=(THRESHOLD,),
        surface=True,
        detailed=True,
        blind=tuple(train),
        obtain="build it again with medplib data build",
        **{"licence": "not stated", **about},  # type: ignore[arg-type]
    )
    return Suite(item.name, (item,), name, about.get("about", ""))


# --- questions ------------------------------------------------------------------------------------------------------

Record = Mapping[str, Any]


def write_questions(item: DataSet, folder: Path) -> tuple[Path, Path]:
    """Write the records of a data set to ``folder/NAME.jsonl``, and images that its files hold to ``folder/NAME``.

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
