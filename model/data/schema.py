"""One raw record of a data file → one validated ``Sample`` (reference §8).

Paths written inside the text (``<mask>…</mask>``, ``<region>…</region>``) leave it here and become ordered lists; the
markers that the processor needs (``<SEG>``, ``<region></region>``, ``<image>``) stay. Raw records are never changed.
"""

from __future__ import annotations

import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from model.data.image_io import is_file, mask_files
from model.errors import MedPLIBError, shown
from model.processing.conversation import Turn
from model.processing.special_tokens import CONTROL_TOKENS, IMAGE_TOKEN, REGION_MARKER, SEG_TOKEN, WRAPPED_IMAGE

Task = Literal["vqa", "region", "grounding", "caption"]
Severity = Literal["error", "repaired", "warning"]

TASKS: tuple[str, ...] = get_args(Task)
MODALITIES = ("ct", "mr", "x_ray", "pet", "fundus", "dermoscopy", "endoscopy", "ultrasound")

_PATH_TAG = {name: re.compile(rf"<{name}>(.*?)</{name}>", re.DOTALL) for name in ("mask", "region")}
_NUMBERED_IMAGE = re.compile(r"image(\d+)")
_SA_MED2D_NAME = re.compile(r"([a-z]+)_\d+--")

CONVERSATION_KEYS = ("conversations", "conversatons", "messages")  # published, as LLaVA-Med writes it, OpenAI's
_ROLES = {"user": "human", "assistant": "gpt"}
_LABELS = ("id", "question_id", "answer_type", "modality", "task", "kind", "about", "structure", "dataset")
_PUBLISHED_ROOT = "SAMed2D_v1"
_TOKENS = re.compile("|".join((*CONTROL_TOKENS, r"</?ref>", r"</?sr>", r"<gen_\d+>")))  # others are checked apart
_OTHER_SEG = re.compile(r"\[SEG\]|<seg>")  # LISA's spelling, and small letters
_BLANK = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one record; ``kind`` is a stable word, ``message`` a sentence for people."""

    kind: str
    message: str
    severity: Severity = "error"


@dataclass(frozen=True)
class Example:
    """A solved example shown before the question of an in-context record."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class Sample:
    """One validated record."""

    id: str  # the record's own id as text; empty where it has none
    # image files, in the order of their ``<image>`` placeholders; empty for a text-only record
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]  # the conversation, user first, without paths
    regions: tuple[Path, ...]  # mask files of the ``<region></region>`` markers, in text order
    # for each region, the index of its image: the last ``<image>`` before the marker, else the first
    region_images: tuple[int, ...]
    # mask files of the ``<SEG>`` markers, in text order; a merged mask keeps its published name, which ``read_mask``
    # resolves
    masks: tuple[Path, ...]
    segment_image: int  # index of the image that ``masks`` lie on (the last one); −1 without images
    answer_type: str | None  # ``open``, ``closed`` or None
    task: Task  # what the record trains; inferred unless the record has a ``task`` key
    modality: str | None  # the record's ``modality`` key, else from the last image's file name; None where neither says
    raw: Mapping[str, Any] = field(repr=False, compare=False)  # the record as read, in the published layout
    # the solved examples of an in-context record; their images come first in ``images``
    examples: tuple[Example, ...] = ()
    repairs: tuple[str, ...] = ()  # sentences about what was mended on the way


def parse_record(raw: Mapping[str, Any], images_root: str | Path) -> Sample:
    """Turn one raw record into a ``Sample``; the same record gives the same sample however often it is read. Raises
    MedPLIBError: anything is wrong with the record; all of it is in the one sentence."""
    sample, findings = inspect_record(raw, images_root)
    if sample is None:
        name = shown(record_id(raw), quoted=False) if isinstance(raw, Mapping) else ""
        faults = "; ".join(finding.message for finding in findings if finding.severity == "error")
        raise MedPLIBError(f"record {name or '(no id)'}: {faults}")
    return sample


def inspect_record(raw: Mapping[str, Any], images_root: str | Path) -> tuple[Sample | None, list[Finding]]:
    """Everything wrong with one record, found without decoding pixels, and the sample if nothing is. Returns the
    sample, or None where a finding of severity ``error`` exists; and all findings."""
    if not isinstance(raw, Mapping):
        return None, [Finding("bad_field", f"the record is {type(raw).__name__}, expected an object")]
    return _Inspection(raw, Path(images_root)).run()


def canonical(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A raw record in the published layout: itself where it is in that already, else a changed copy.

    OpenAI's ``messages`` and LLaVA-Med's ``conversatons`` become ``conversations``, ``role`` and ``content`` become
    ``from`` and ``value``, ``user`` and ``assistant`` become ``human`` and ``gpt``; of text and image parts one text is
    made, ``images`` or the parts' paths become ``image``; finite numbers become text; a leading system turn is left
    out, as templates have their own. Whatever is malformed stays as it is."""
    key, turns = _said(raw)
    images: list[Any] = []
    made = [_canonical_turn(turn, images) for turn in turns]
    if made and _is_system(turns[0]):
        del made[0]
    listed = raw.get("images")
    images = images or (listed if isinstance(listed, list) else [])
    if not turns or (key == "conversations" and made == list(turns) and (raw.get("image") or not images)):
        return raw
    whole = {name: value for name, value in raw.items() if name not in CONVERSATION_KEYS} | {"conversations": made}
    if images and not raw.get("image"):
        whole |= {"image": images[0] if len(images) == 1 else images}
    return whole


def _said(raw: Mapping[str, Any]) -> tuple[str, Sequence[Any]]:
    key = next((key for key in CONVERSATION_KEYS if raw.get(key)), "")
    turns = raw.get(key)
    return key, turns if isinstance(turns, list | tuple) else ()


def _is_system(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("from", turn.get("role")) == "system"


def _canonical_turn(turn: Any, images: list[Any]) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    made = {name: value for name, value in turn.items() if name not in ("role", "content")}
    for name, other in (("from", "role"), ("value", "content")):
        if name in turn or other in turn:
            made[name] = turn.get(name, turn.get(other))
    if isinstance(made.get("from"), str):
        made["from"] = _ROLES.get(made["from"], made["from"])
    if isinstance(made.get("value"), list):
        made["value"] = _joined_parts(made["value"], images)
    elif is_number(made.get("value")):
        made["value"] = str(made["value"])
    return made


def _joined_parts(parts: list[Any], images: list[Any]) -> Any:
    """The text of a message in parts, each on its own line; the parts where one is neither text nor image."""
    texts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            texts.append(IMAGE_TOKEN)
            source = part.get("image_url") or part.get("image") or part.get("path") or part.get("url")
            source = source.get("url", source) if isinstance(source, Mapping) else source
            images += [source.removeprefix("file://") if isinstance(source, str) else source] if source else []
        else:
            return parts
    return "\n".join(texts)


def is_number(value: Any) -> bool:
    """Whether a value is a number within the range of a float; NaN, infinities and truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def record_id(raw: Mapping[str, Any]) -> str:
    """A record's own id as text; empty where it has none, or one of a wrong type."""
    return _text(raw.get("id", raw.get("question_id")))


class _Inspection:
    """Walks one record once and collects every finding instead of stopping at the first."""

    def __init__(self, raw: Mapping[str, Any], root: Path) -> None:
        self.raw, self.root = canonical(raw), root
        self.findings: list[Finding] = []
        self._fields(raw)
        self.turns: list[Turn] = []
        self.regions: list[Path] = []
        self.region_images: list[int] = []
        self.masks: list[Path] = []
        self.images_seen = 0

    def run(self) -> tuple[Sample | None, list[Finding]]:
        examples, images = self._images()
        conversations = self.raw.get("conversations")
        target = None
        if examples:
            numbers = [int(m[1]) for key in self.raw if (m := _NUMBERED_IMAGE.fullmatch(str(key)))]
            last = f"mask{max(numbers)}" if numbers and "icl_examples" not in self.raw else "mask"
            target = self.raw.get("target_mask" if "target_mask" in self.raw else last)
        if examples and not conversations:
            before = "".join(
                f"Example {number}: {IMAGE_TOKEN}\nThe blue overlay is the reference segmentation mask.\n"
                for number in range(1, len(examples) + 1)
            )
            question = "Refer to the previous examples and segment the corresponding target in this image."
            conversations = [
                {"from": "human", "value": f"{before}Query: {IMAGE_TOKEN}\n{question}"},
                {"from": "gpt", "value": SEG_TOKEN},
            ]
        self._conversation(conversations, target)
        # In-context questions may show each example's mask as an image of its own.
        if self.turns and self.images_seen not in {len(images), len(images) + len(examples)}:
            self._report("image_count", f"the questions hold {self.images_seen} <image> for {len(images)} images")
        if (self.masks or self.regions) and not images:
            self._report("missing_image", "the text has a mask or region but the record names no image")
        if any(finding.severity == "error" for finding in self.findings):
            return None, self.findings
        return self._sample(tuple(images), tuple(examples)), self.findings

    def _sample(self, images: tuple[Path, ...], examples: tuple[Example, ...]) -> Sample:
        answer_type = _text(self.raw.get("answer_type")).strip().lower()
        named = self.raw.get("modality")  # files of other sources are seldom named after it; their records say it
        modality = named.strip() if isinstance(named, str) else ""
        return Sample(
            id=record_id(self.raw),
            images=images,
            turns=tuple(self.turns),
            regions=tuple(self.regions),
            region_images=tuple(self.region_images),
            masks=tuple(self.masks),
            segment_image=len(images) - 1,
            answer_type=answer_type or None,
            task=self._task(),
            modality=modality or (modality_of(images[-1].name) if images else None),
            raw=self.raw,
            examples=examples,
            repairs=tuple(finding.message for finding in self.findings if finding.severity == "repaired"),
        )

    def _report(self, kind: str, message: str, severity: Severity = "error") -> None:
        self.findings.append(Finding(kind, message, severity))

    def _fields(self, raw: Mapping[str, Any]) -> None:
        """Values of a wrong type, NaN and infinities, a system turn."""
        for key, value in raw.items():
            if key in _LABELS:
                if not (value is None or isinstance(value, str) or is_number(value)):
                    self._report("bad_field", f"{key} is {shown(value)}, expected text")
            elif key not in (*CONVERSATION_KEYS, "image") and _has_non_finite(value):
                self._report("bad_field", f"{shown(key)} holds NaN or an infinity, which is no JSON", "warning")
        if _is_system(next(iter(_said(raw)[1]), None)):
            message = "the system turn is left out; every conversation template has its own"
            self._report("system_turn", message, "repaired")

    # ---- images ----------------------------------------------------------------------------------------------------

    def _images(self) -> tuple[list[Example], list[Path]]:
        numbered = sorted((int(m[1]), key) for key in self.raw if (m := _NUMBERED_IMAGE.fullmatch(str(key))))
        if "icl_examples" in self.raw:
            listed, own = self.raw["icl_examples"], self.raw.get("image")
            if not isinstance(listed, Sequence) or not all(isinstance(entry, Mapping) for entry in listed):
                self._report("bad_field", "icl_examples must be a list of objects with image and mask")
                listed = []
            pairs = [(entry.get("image"), entry.get("mask")) for entry in listed]
        elif numbered:
            pairs = [(self.raw[key], self.raw.get(f"mask{number}")) for number, key in numbered[:-1]]
            own = self.raw[numbered[-1][1]]
        else:
            pairs, own = [], self.raw.get("image")
        examples = []
        for number, (image, mask) in enumerate(pairs, start=1):
            found = self._find(image, "image", f"image of example {number}")
            examples.append(Example(found, self._find(mask, "mask", f"mask of example {number}")))
        if own is None or own == "" or own == []:
            if examples:
                self._report("missing_image", "the record has examples but no query image")
            return examples, []
        names = own if isinstance(own, Sequence) and not isinstance(own, str) else [own]
        return examples, [*(one.image for one in examples), *(self._find(name, "image", "image") for name in names)]

    def _find(self, name: Any, kind: Literal["image", "mask", "region"], what: str) -> Path:
        name = name.get("path") if isinstance(name, Mapping) and not name.get("bytes") else name
        if isinstance(name, Mapping | bytes) or (isinstance(name, str) and name.startswith("data:")):
            message = f"the {what} lies inside the file as encoded bytes; write it as a file and give its path"
            self._report(f"missing_{kind}", message)
            return self.root
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            fault = f"missing_{kind}" if isinstance(name, str | None) else "bad_field"
            self._report(fault, f"the {what} is {shown(name)}, expected a path")
            return self.root
        named = shown(name, quoted=False)
        for spelling, path in enumerate(_spellings(self.root, name.strip())):
            if is_file(path) or (kind != "image" and mask_files(path)):
                if spelling == 1:
                    message = f"the {what} {named} lacks .png; {shown(path.name, quoted=False)} is used"
                    self._report("suffix_missing", message, "repaired")
                elif spelling:
                    message = f"the {what} {named} is spelled otherwise on disk (accents, slashes, folders or suffix)"
                    self._report("path_spelling", f"{message}; {shown(path, quoted=False)} is used", "repaired")
                return path
        self._report(f"missing_{kind}", f"the {what} {named} does not exist under {self.root}")
        return self.root / name.strip()

    # ---- conversation ----------------------------------------------------------------------------------------------

    def _conversation(self, conversations: Any, target: Any) -> None:
        if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
            self._report("empty_conversation", "conversations is absent or empty; expected human and gpt turns")
            return
        for number, entry in enumerate(conversations):
            expected = ("human", "gpt")[number % 2]
            if not isinstance(entry, Mapping) or "from" not in entry or "value" not in entry:
                self._report("bad_field", f"turn {number} is {shown(entry)}, expected {{from, value}}")
                continue
            if entry["from"] != expected:
                self._report("turn_order", f"turn {number} is from {shown(entry['from'])}, expected {expected!r}")
            text = entry["value"] if entry["value"] is not None else ""
            if not isinstance(text, str):
                self._report("bad_field", f"the text of turn {number} is {shown(text)}, expected text")
                continue
            if _HALF_CHARACTER.search(text):
                self._report("bad_field", f"the text of turn {number} holds half of a character pair, which is no text")
            if entry["from"] == "gpt":
                self._answer(text, number, target)
            else:
                self._question(text, number)
        if len(conversations) % 2:
            self._report("turn_order", "the conversation does not end with an answer of gpt")

    def _question(self, text: str, number: int) -> None:
        for tag in (SEG_TOKEN, "<mask>"):
            if tag in text:
                self._report("misplaced_tag", f"the question of turn {number} holds {tag}, which belongs in answers")
        pieces: list[str] = []
        end = 0
        for match in _PATH_TAG["region"].finditer(text):
            pieces.append(text[end : match.start()])
            end = match.end()
            self.images_seen += pieces[-1].count(IMAGE_TOKEN)
            self._region(match[1], number)
        pieces.append(text[end:])
        self.images_seen += pieces[-1].count(IMAGE_TOKEN)
        if any("<region>" in piece or "</region>" in piece for piece in pieces):
            self._report("broken_tag", f"the question of turn {number} holds a <region> tag without its partner")
        if _BLANK.fullmatch(text):
            self._report("empty_question", f"the question of turn {number} is empty")
        for token in sorted(set(_TOKENS.findall(text.replace(WRAPPED_IMAGE, "")))):
            self._report("special_token", f"the question of turn {number} holds the token {token}", "warning")
        self.turns.append(Turn("human", REGION_MARKER.join(pieces)))

    def _region(self, name: str, number: int) -> None:
        if not name.strip():
            self._report("broken_tag", f"the <region></region> of turn {number} holds no path")
            return
        self.regions.append(self._find(name, "region", f"region of turn {number}"))
        self.region_images.append(max(self.images_seen - 1, 0))

    def _answer(self, text: str, number: int, target: Any) -> None:
        for tag in ("<region>", IMAGE_TOKEN):
            if tag in text:
                self._report("misplaced_tag", f"the answer of turn {number} holds {tag}, which belongs in questions")
        for token in sorted(set(_TOKENS.findall(text))):
            severity: Severity = "error" if token in CONTROL_TOKENS else "warning"
            self._report("special_token", f"the answer of turn {number} holds the token {token}; remove it", severity)
        if _OTHER_SEG.search(text):
            mended = with_seg_spelled(text)
            note = f"{SEG_TOKEN} is used" if mended != text else "which is no mask's place without a <mask> for each"
            message = f"the answer of turn {number} holds {_OTHER_SEG.findall(text)[0]}, {note}"
            self._report("seg_spelling", message, "repaired" if mended != text else "warning")
            text = mended
        names = _PATH_TAG["mask"].findall(text)
        clean = _PATH_TAG["mask"].sub("", text)
        if "<mask>" in clean or "</mask>" in clean:
            self._report("broken_tag", f"the answer of turn {number} holds a <mask> tag without its partner")
        places = clean.count(SEG_TOKEN)
        if target is not None and places and not names:
            names = [target] * places
        if places > len(names):
            self._report("seg_without_mask", f"the answer of turn {number} has {places} <SEG> and {len(names)} <mask>")
        if places < len(names):
            self._report("mask_without_seg", f"the answer of turn {number} has {len(names)} <mask> and {places} <SEG>")
        if _BLANK.fullmatch(clean):
            self._report("empty_answer", f"the answer of turn {number} is empty")
        self.masks += [self._find(name, "mask", f"mask of turn {number}") for name in names]
        self.turns.append(Turn("gpt", clean))

    def _task(self) -> Task:
        named = self.raw.get("task")
        if named in TASKS:
            return named
        if self.masks:
            return "grounding"
        if self.regions:
            return "region"
        questions = [turn.text for turn in self.turns if turn.role == "human"]
        bare = all(not text.replace(IMAGE_TOKEN, "").strip() for text in questions)
        return "caption" if bare else "vqa"


def modality_of(file_name: str) -> str | None:
    """Modality that a file name of the SA-Med2D layout begins with, ``x`` read as ``x_ray``; None if it has none."""
    prefix = file_name.split("_", 1)[0].lower() if "_" in file_name else ""
    if prefix == "x":
        return "x_ray"
    if prefix in MODALITIES:
        return prefix
    other = _SA_MED2D_NAME.match(file_name)
    return other[1] if other else None


def with_seg_spelled(answer: str) -> str:
    """An answer with ``<SEG>`` for ``[SEG]`` and ``<seg>``, if that gives each of its masks one; else as it is."""
    mended = _OTHER_SEG.sub(SEG_TOKEN, answer)
    return mended if mended.count(SEG_TOKEN) == len(_PATH_TAG["mask"].findall(mended)) else answer


def _spellings(root: Path, name: str) -> Iterator[Path]:
    """Where the file ``name`` may lie: as written; with ``.png``; then the same with ``/`` for ``\\``, without what
    leads to a folder of the root's name, and with accents composed or apart, part by part.
    """
    path = root / name
    yield path
    yield Path(f"{path}.png")
    parts = Path(name.replace("\\", "/")).parts
    roots = [place for place, part in enumerate(parts[:-1]) if part in (root.resolve().name, _PUBLISHED_ROOT)]
    for start in (0, *(place + 1 for place in roots[-1:])):
        at = root
        for part in parts[start:]:
            forms = (at / part, *(at / unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
            at = next((form for form in forms if any(map(_exists, (f"{form}", f"{form}.png")))), forms[0])
        yield at
        yield Path(f"{at}.png")


_exists: Callable[[str], bool] = os.path.exists  # unlike Path.exists, false for a name that the system refuses


def _has_non_finite(value: Any) -> bool:
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, float) and not math.isfinite(found):
            return True
        waiting += found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else ()
    return False


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value) if is_number(value) else ""
