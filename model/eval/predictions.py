"""Prediction rows: one answered question a line of JSON, written as answers come and read as a stream.

The first nine keys are the published ones (reference §9), in their order; masks, scores and timing follow. Rows that
lack ours, as the published evaluation writes them, are read too, and so are those of other writers without a prompt or
an image path.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.data.schema import is_number
from model.errors import MedPLIBError
from model.eval.questions import Reference, Turns, references_of

logger = logging.getLogger(__name__)

Key = tuple[str, int]
Existing = Literal["refuse", "resume", "overwrite"]

FINISHES = ("end", "length", "stop", "error")
"""Why an answer ended: by its end token, reached its longest length, met a stop string, or could not be given."""

_LARGEST_SPACING = 1e6  # mm between pixels


@dataclass(frozen=True)
class Prediction:
    """One answered question."""

    question_id: str | int  # as in the data set; the record's number, from 0, where it has no id
    image_path: str  # as in the data set; empty in a row that does not say
    prompt: str  # the question as asked, without paths and image markers; empty in a row that does not say
    gt: str  # the reference answer, without paths
    text: str  # the model's answer; empty in an error row
    answer_id: str = ""  # the same whenever the same model answers the same question
    model_id: str = ""  # name of the checkpoint, that of its run where it has one
    answer_type: str = ""  # ``open``, ``closed``, ``region`` …
    # what is known of task, kind, modality, structure, dataset and turn (from 0).
    metadata: dict[str, Any] = field(default_factory=dict)
    masks: list[dict[str, Any]] = field(default_factory=list)  # predicted masks, each as ``Mask.to_dict`` gives it
    # reference masks as COCO run lengths; empty: known to have none; None: the record does not say.
    gt_masks: list[dict[str, Any]] | None = None
    # (row, column) pixel distance in mm, where the image's file knows it.
    spacing_mm: tuple[float, float] | None = None
    finish: str = "end"  # one of ``FINISHES``
    error: str | None = None  # what was wrong, in one sentence, where ``finish`` is ``error``
    timing: dict[str, float] = field(default_factory=dict)  # seconds by part, and ``new_tokens``
    # where asked for, the run lengths of the predicted masks by threshold (``"0.1"``).
    masks_at: dict[str, list[dict[str, Any]]] | None = None
    # where asked for, the share of the tokens that each expert computed, for each mixture layer.
    router: list[list[float]] | None = None

    @property
    def key(self) -> Key:
        """The identity of a question: its record's id as text, and the turn of the conversation."""
        return str(self.question_id), int(self.metadata.get("turn", 0))

    @property
    def failed(self) -> bool:
        """Whether the question could not be answered."""
        return self.finish == "error"

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Prediction:
        """The prediction of a parsed line; keys that are not known are left out.

        Raises:
            MedPLIBError: a key that every row must have is absent, or a value is of the wrong kind.
        """
        if not isinstance(row, Mapping):
            raise MedPLIBError(f"a prediction is an object {{…}}, got {type(row).__name__}")
        values = {"prompt": "", "image_path": "", **{name: row[name] for name in _KINDS if name in row}}
        absent = [name for name in _REQUIRED if name not in values]
        if absent:
            raise MedPLIBError(f"the prediction has no {', '.join(absent)}; expected the rows of vqa_infer")
        for name, value in values.items():
            if not isinstance(value, _KINDS[name]) or isinstance(value, bool):
                expected = " or ".join(_KIND_NAMES[kind] for kind in _KINDS[name] if kind in _KIND_NAMES)
                raise MedPLIBError(f"{name} is {value!r:.60}, expected {expected}")
        if values.get("finish", "end") not in FINISHES:
            raise MedPLIBError(f"finish is {values['finish']!r:.60}; expected one of {', '.join(FINISHES)}")
        turn = values.get("metadata", {}).get("turn", 0)
        if not isinstance(turn, int) or turn < 0:
            raise MedPLIBError(f"the turn is {turn!r:.60}, expected a whole number from 0")
        if (spacing := values.get("spacing_mm")) is not None:
            if len(spacing) != 2 or not all(is_number(side) and 0 < side < _LARGEST_SPACING for side in spacing):
                raise MedPLIBError(f"spacing_mm is {spacing!r:.60}, expected [row, column] in mm")
            values["spacing_mm"] = (float(spacing[0]), float(spacing[1]))
        layers = values.get("router") or []
        if any(isinstance(layer, list) and None in layer for layer in layers):
            values["router"] = None  # shares that were not finite
        elif not all(isinstance(layer, list) and all(map(is_number, layer)) for layer in layers):
            raise MedPLIBError(f"router is {layers!r:.60}, expected a list of the experts' shares for each layer")
        for name in ("masks", "gt_masks"):
            if values.get(name):
                values[name] = [_mask_object(value, name) for value in values[name]]
        return cls(**values)

    def to_row(self) -> dict[str, Any]:
        """JSON-ready mapping, its keys in the order of the format; ``masks_at`` and ``router`` only where they are."""
        row = {column.name: getattr(self, column.name) for column in fields(self)}
        row["spacing_mm"] = list(self.spacing_mm) if self.spacing_mm else None
        return {name: value for name, value in row.items() if value is not None or name not in _OPTIONAL}


_OPTIONAL = ("masks_at", "router")
_REQUIRED = ("question_id", "gt", "text")
_KIND_NAMES = {str: "text", int: "a whole number", dict: "an object", list: "a list", type(None): "null"}


def _json_kinds(hint: Any) -> tuple[type, ...]:
    """The types that a value of a field may have in JSON, where a tuple is a list."""
    kinds = [get_origin(part) or part for part in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
    return tuple(kind for part in kinds for kind in ((list, tuple) if part is tuple else (part,)))


_KINDS = {name: _json_kinds(hint) for name, hint in get_type_hints(Prediction).items()}


def read_predictions(path: str | Path) -> Iterator[Prediction]:
    """The predictions of a file, one at a time; blank lines are passed over.

    Raises:
        MedPLIBError: the file cannot be read, or a line is no prediction; with its number.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _parse_line(line, f"{path}, line {number}")
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        raise MedPLIBError(f"cannot read the predictions {path}: {reason}; give a file of vqa_infer") from error


def _parse_line(line: bytes, place: str) -> Prediction:
    try:
        return Prediction.from_row(json.loads(line))
    except MedPLIBError as error:
        raise MedPLIBError(f"{place}: {error}") from error
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            raise MedPLIBError(f"{place}: the last line is torn; run vqa_infer again to finish the file") from error
        raise MedPLIBError(f"{place}: not valid JSON; give one object a line, as vqa_infer writes them") from error


class PredictionWriter:
    """Appends predictions to a file; each is there, whole, once ``write`` returns.

    Args:
        path: the file; its folder is made.
        existing: what becomes of a file that is there: ``refuse``, ``resume`` (a torn last line is cut off, the rest is
            kept) or ``overwrite``.

    Attributes:
        rows: whole rows in the file.

    Raises:
        MedPLIBError: the file is there and is to be refused, is being written by another process, or cannot be written.
    """

    def __init__(self, path: str | Path, existing: Existing = "refuse") -> None:
        self.path = Path(path)
        if existing == "refuse" and self.path.exists():
            raise MedPLIBError(f"{self.path} is there already; resume it, overwrite it or name another file")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("ab+")
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
            if existing == "overwrite":
                self._stream.truncate(0)
            self._stream.seek(0)
            self.rows, size = 0, 0
            for line in self._stream:
                if line.endswith(b"\n"):
                    size += len(line)
                    self.rows += bool(line.strip())
            self._stream.truncate(size)  # a killed process leaves a torn last line
        except BlockingIOError as error:
            self._stream.close()
            raise MedPLIBError(f"another process is writing {self.path}; wait for it, or name another file") from error
        except OSError as error:
            reason = error.strerror or "it cannot be written"
            raise MedPLIBError(f"cannot write {self.path}: {reason}; name a file that can be written") from error

    def write(self, prediction: Prediction) -> None:
        """Append one row."""
        self._stream.write(encode_row(prediction.to_row()))
        self._stream.flush()
        self.rows += 1

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line of JSON, UTF-8, with its newline; numbers that are not finite are null, and their names are kept."""
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half of a character pair, which JSON can name and UTF-8 cannot
        return (json.dumps(row, allow_nan=False) + "\n").encode("ascii")
    except ValueError:
        names: list[str] = []
        finite = _finite(row, "", names)
        return encode_row({**finite, "metadata": {**finite.get("metadata", {}), "not_finite": names}})


def json_text(content: Mapping[str, Any]) -> str:
    """Indented JSON; numbers that are not finite are null, and their names stand under ``not_finite``."""
    names: list[str] = []
    finite = _finite(content, "", names)
    return json.dumps({**finite, "not_finite": names} if names else finite, indent=1, ensure_ascii=False) + "\n"


def _finite(value: Any, name: str, names: list[str]) -> Any:
    """The value with None for numbers that are not finite; their names (``masks.0.score``) are added to the list."""
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{name}.{key}".lstrip("."), names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{name}.{place}", names) for place, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        names.append(name)
        return None
    return value


def match_references(
    predictions: Iterable[Prediction], records: Iterable[Mapping[str, Any]], turns: Turns = "all"
) -> Iterator[tuple[Prediction, Reference]]:
    """Pair each prediction with the question of a data file that it answers.

    Pairs come before the end is known, so what is computed from them counts only once the iterator ends without an
    error.

    Raises:
        MedPLIBError: a question has no prediction or two, a prediction has no question, or they disagree about the
            reference answer; the first of each are named.
    """
    asked = [reference for number, record in enumerate(records) for reference in references_of(record, number, turns)]
    waiting: dict[Key, deque[Reference]] = {reference.key: deque() for reference in asked}
    for reference in asked:
        waiting[reference.key].append(reference)
    unknown: list[str] = []
    differing: list[str] = []
    moved: list[str] = []
    for place, prediction in enumerate(predictions):
        key = _key_text(prediction.key)
        if place < len(asked) and asked[place].key != prediction.key:
            moved.append(key)
        if not waiting.get(prediction.key):
            unknown.append(key)
        elif (reference := waiting[prediction.key].popleft()).gt != prediction.gt:
            differing.append(f"{key} has {prediction.gt!r:.40}, the data file {reference.gt!r:.40}")
        else:
            yield prediction, reference
    kinds = {
        "without a prediction": [_key_text(key) for key, left in waiting.items() for _ in left],
        "predicted but not asked, or twice": unknown,
        "with another reference answer": differing,
    }
    if unmatched := [f"{len(found)} {kind} ({named(found)})" for kind, found in kinds.items() if found]:
        raise MedPLIBError(
            f"the predictions do not match the data file one to one: {'; '.join(unmatched)}; "
            "give the file that the predictions were made from, and all of its predictions"
        )
    if moved:
        order = "%d predictions stand in another order than the data file, the first is %s; they are matched by id"
        logger.warning(order, len(moved), moved[0])


def named(found: Sequence[str], most: int = 5) -> str:
    """The first of several names, and dots where there are more."""
    return ", ".join(found[:most]) + (", …" if len(found) > most else "")


def _key_text(key: Key) -> str:
    return f"{key[0]} turn {key[1]}" if key[1] else key[0]


def _mask_object(value: Any, name: str) -> dict[str, Any]:
    """A predicted mask with its ``rle``, a reference one as run lengths alone; either form is read for both."""
    if not isinstance(value, dict) or not ("rle" in value or "counts" in value):
        kind = "a polygon or another list" if isinstance(value, list) else f"{value!r:.60}"
        raise MedPLIBError(f"{name} holds {kind}; expected COCO's run lengths {{'size': [h, w], 'counts': …}}")
    if name == "masks":
        return value if "rle" in value else {"rle": value}
    return value.get("rle", value)
