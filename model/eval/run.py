"""Run over one data file: inference, resuming, merging of several processes, report."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from model.checkpoint.directories import checkpoint_name
from model.data.builders.jobs import whole_file
from model.data.records import Records, open_records
from model.errors import MedPLIBError
from model.eval.asking import Asker, Prepared, check_options, file_digest, fingerprint, open_engine
from model.eval.metrics.published import PublishedText, format_table
from model.eval.metrics.scores import score_predictions
from model.eval.options import InferenceOptions
from model.eval.pictures import write_comparison
from model.eval.predictions import Key, Prediction, PredictionWriter, read_predictions
from model.eval.processes import (
    Journal,
    Place,
    choose_device,
    chunk,
    join_journals,
    journal_path,
    other_parts,
    part_path,
    read_journal,
    remove,
    share_cores,
    wait_for_parts,
)
from model.eval.questions import Question, Reference, Turns, questions_of, references_of
from model.inference.engine import Engine

logger = logging.getLogger(__name__)

_EVERY = 30.0  # seconds between lines of a log
_SEEN_FIRST = 8  # records looked at before anything is loaded

Opener = Callable[[InferenceOptions, torch.device], Engine]


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    answers: Path  # the file; of a process that is not the first, its part
    rows: int  # in the file
    errors: int  # of these, questions that could not be answered
    first_error: str | None  # the sentence of the first one; None where there is none
    seconds: float  # that answering took, over all sittings and, of several processes, of the slowest
    complete: bool = True  # the file holds the whole run
    was_finished: bool = False  # nothing was left to do


def run_inference(options: InferenceOptions, place: Place | None = None, opener: Opener = open_engine) -> Outcome:
    """Answer every question of a data file; goes on where an earlier run of the same settings was stopped.

    Args:
        options: what is asked and how.
        place: of this process among those of the launch; what the environment says where None.
        opener: loads the engine, once something is left to be asked.

    Raises:
        MedPLIBError: the options do not fit the checkpoint, the data or the answers that are there.
    """
    place = place or Place.from_environment()
    records = open_records(options.data)
    total = min(len(records), options.limit or len(records))
    numbers = chunk(total, options.num_chunks, options.chunk_index)
    check_options(options)
    _look_ahead(records, numbers, options)
    device = choose_device(options.device, place)
    settings = run_settings(options, len(records), device, place)
    finished = None if options.overwrite else _finished_already(options.answers, settings)
    if finished is not None:
        return finished
    share_cores(place)
    _clear_way(options, place)
    part = _Part(options, place, records, numbers[place.rank :: place.world_size], settings)
    outcome = part.work(device, opener)
    if place.world_size == 1 or not place.is_first:
        return outcome
    return _join(options, place, records, numbers, settings)


def run_settings(options: InferenceOptions, records: int, device: torch.device, place: Place) -> dict[str, Any]:
    """Everything the answers depend on, JSON-ready; a run goes on only with the same."""
    precision = options.precision or ("fp32" if device.type == "cpu" else "as stored")
    return {
        "model": {"name": checkpoint_name(options.model), "digest": fingerprint(options.model)},
        "vision_tower": fingerprint(options.vision_tower) if options.vision_tower else None,
        "sam": fingerprint(options.sam) if options.sam else None,
        "data": {"name": options.data.name, "sha256": file_digest(options.data), "records": records},
        "images": str(options.images.resolve()),
        "answer_type": options.answer_type,
        "template": options.template,
        "turns": options.turns,
        "max_new_tokens": options.max_new_tokens,
        "max_length": options.max_length,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed if options.temperature else None,
        "thresholds": list(options.thresholds),
        "always_mask": options.always_mask,
        "no_mask_below": options.no_mask_below,
        "regions": options.regions is not False,
        "router": options.router,
        "precision": precision,
        "limit": options.limit,
        "chunk": {"index": options.chunk_index, "of": options.num_chunks},
        "processes": place.world_size,
    }


def _look_ahead(records: Records, numbers: range, options: InferenceOptions) -> None:
    """Refuse what would end in nothing but error rows: in-context records, a folder without the images."""
    first = [_questions(records, number, options)[0] for number in numbers[:_SEEN_FIRST]]
    if first and first[0].error and "solved examples" in first[0].error:
        raise MedPLIBError(
            f"{options.data} holds in-context records, which show solved examples as further images, and questions are "
            "asked about one image here; give records without examples"
        )
    if len(first) == _SEEN_FIRST and all(question.error for question in first):
        raise MedPLIBError(
            f"none of the first {_SEEN_FIRST} records of {options.data} can be asked, the first because "
            f"{first[0].error}; is {options.images} the folder its paths start from?"
        )


def _questions(records: Records, number: int, options: InferenceOptions) -> list[Question]:
    try:
        record = records[number]
    except MedPLIBError as error:
        reference = Reference(number, 0, "", "")  # of the one question that stands for the record
        return [Question(number, reference, "", "", {"turn": 0}, error=str(error))]
    return questions_of(record, number, options.images, options.answer_type, options.turns)


def _finished_already(answers: Path, settings: dict[str, Any]) -> Outcome | None:
    """The outcome of a finished run of the same settings; how many processes it had does not matter any more."""
    journal = read_journal(answers)
    if journal is None or not journal.finished:
        return None
    if not answers.is_file():
        raise MedPLIBError(f"{answers} is gone, but {journal_path(answers)} is there; start anew with --overwrite")
    journal.refuse_unless_same({**settings, "processes": journal.settings.get("processes")}, answers)
    return _outcome(answers, journal, was_finished=True)


def _clear_way(options: InferenceOptions, place: Place) -> None:
    """Remove what an earlier run left, where that is asked for; otherwise refuse what is not this run's."""
    answers = options.answers
    others = other_parts(answers, place.world_size)
    if options.overwrite:
        if place.is_first:
            for path in [*others, *([answers] if place.world_size > 1 else [])]:
                remove(path)
            journal_path(answers).unlink(missing_ok=True)
        return
    if others:
        raise MedPLIBError(
            f"{others[0]} was left by a run with another number of processes; go on with as many, "
            "or start anew with --overwrite"
        )
    journal = read_journal(answers)
    if place.world_size > 1 and journal is not None:
        raise MedPLIBError(
            f"{answers} was begun by one process and is not finished; go on with one, or start anew with --overwrite"
        )


class _Part:
    """This process's share of a run: its file, what is in it already, and the rest of its questions."""

    def __init__(
        self, options: InferenceOptions, place: Place, records: Records, numbers: range, settings: dict[str, Any]
    ) -> None:
        self.options, self.place, self.records, self.numbers, self.settings = options, place, records, numbers, settings
        self.path = part_path(options.answers, place)
        self.errors = self.rows = 0
        self.first_error: str | None = None
        self.seconds_before = 0.0

    def work(self, device: torch.device, opener: Opener) -> Outcome:
        """Answer what is not answered yet."""
        begun = time.monotonic()
        with self._open() as writer:
            journal = self._journal(device)
            journal.write(self.path)
            begin, skipped = self._check_rows()
            if writer.rows:
                logger.info("%s: going on after %d answers", self.path, writer.rows)
            if begin < len(self.numbers):
                self._ask(writer, begin, skipped, device, opener)
            seconds = round(self.seconds_before + time.monotonic() - begun, 3)
            finished = replace(journal, state="finished", rows=self.rows, errors=self.errors, seconds=seconds)
            finished.write(self.path)
        complete = self.place.world_size == 1
        return Outcome(self.path, self.rows, self.errors, self.first_error, seconds, complete)

    def _open(self) -> PredictionWriter:
        """The writer of this part; an earlier run's rows are kept if they are of the same settings."""
        if self.options.overwrite:
            writer = PredictionWriter(self.path, "overwrite")
            journal_path(self.path).unlink(missing_ok=True)
            return writer
        journal = read_journal(self.path)
        if journal is not None:
            journal.refuse_unless_same(self.settings, self.path)
            self.seconds_before = journal.seconds
        elif self.path.exists() and self.path.stat().st_size:
            raise MedPLIBError(
                f"{self.path} is there already and no run's journal beside it; name another file, "
                "or start anew with --overwrite"
            )
        return PredictionWriter(self.path, "resume")

    def _journal(self, device: torch.device) -> Journal:
        about = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "batch_size": self.options.batch_size,
        }
        return Journal(self.settings, about=about, launch=self.place.launch, seconds=self.seconds_before)

    def _check_rows(self) -> tuple[int, int]:
        """Hold the rows that are there against the questions.

        Returns:
            Place among this part's records where to go on, and how many questions of that record are answered.
        """
        rows = read_predictions(self.path)
        for at, number in enumerate(self.numbers):
            for turn, key in enumerate(rows_of(self.records, number, self.options.turns)):
                row = next(rows, None)
                if row is None:
                    return at, turn
                if row.key != key:
                    raise MedPLIBError(
                        f"{self.path} answers {row.key[0]} where {key[0]} is asked; it is of another run: name "
                        "another file, or start anew with --overwrite"
                    )
                self._count(row)
        if next(rows, None) is not None:
            raise MedPLIBError(f"{self.path} holds more answers than there are questions; start anew with --overwrite")
        return len(self.numbers), 0

    def _count(self, row: Prediction) -> None:
        self.rows += 1
        if row.failed:
            self.errors += 1
            self.first_error = self.first_error or row.error

    def _ask(self, writer: PredictionWriter, begin: int, skipped: int, device: torch.device, opener: Opener) -> None:
        left = self.numbers[begin:]

        def questions() -> Iterator[Question]:
            for number in left:
                found = _questions(self.records, number, self.options)
                yield from found[skipped if number == left[0] else 0 :]

        what = "answering" if self.place.world_size == 1 else f"answering (1 of {self.place.world_size})"
        engine = opener(self.options, device)
        often, first = sys.stderr.isatty(), self.place.is_first  # a log takes a line every half minute
        every = 0.1 if often else 30.0
        bar = tqdm(total=len(left), unit="record", desc=what, mininterval=every, leave=not often, disable=not first)
        with bar:

            def settle(item: Prepared, row: Prediction) -> None:
                writer.write(row)
                self._count(row)
                if self.options.pictures is not None and item.image is not None:
                    write_comparison(self.options.pictures, item.question.number, item.image.data.pixels, row)
                bar.update((item.question.number - left[0]) // left.step + 1 - bar.n)

            Asker(engine, self.options, checkpoint_name(self.options.model)).answer(questions(), settle)


def _join(
    options: InferenceOptions, place: Place, records: Records, numbers: range, settings: dict[str, Any]
) -> Outcome:
    """Wait for the other processes, then make one file of all parts in the order of the data file."""
    journals = wait_for_parts(options.answers, place)
    parts = [part_path(options.answers, replace(place, rank=rank)) for rank in range(place.world_size)]
    join_parts(options.answers, parts, records, numbers, options.turns)
    whole = join_journals(options.answers, parts, journals, settings)
    return _outcome(options.answers, whole)


def _outcome(answers: Path, journal: Journal, *, was_finished: bool = False) -> Outcome:
    failed = (row.error for row in read_predictions(answers) if row.failed)
    first_error = next(failed, None) if journal.errors else None
    return Outcome(answers, journal.rows, journal.errors, first_error, journal.seconds, was_finished=was_finished)


# --- merging ----------------------------------------------------------------------------------------------------------


def rows_of(records: Records, number: int, turns: Turns) -> list[Key]:
    """Keys of the rows of one record, in their order; one row stands for a record that cannot be parsed."""
    try:
        return [reference.key for reference in references_of(records[number], number, turns)]
    except MedPLIBError:
        return [(str(number), 0)]


def join_parts(answers: Path, parts: Sequence[Path], records: Records, numbers: range, turns: Turns) -> None:
    """Join the parts of processes that took every ``len(parts)``-th record each.

    Args:
        answers: written whole or not at all.
        parts: by rank.
        records: the data file.
        numbers: records that were asked.
        turns: which of their questions.

    Raises:
        MedPLIBError: a part holds more or fewer rows than its questions.
    """

    def lines() -> Iterator[bytes]:
        with ExitStack() as stack:
            streams = [stack.enter_context(part.open("rb")) for part in parts]
            for at, number in enumerate(numbers):
                stream = streams[at % len(parts)]
                for _ in rows_of(records, number, turns):
                    line = stream.readline()
                    if not line.endswith(b"\n"):
                        raise MedPLIBError(f"{stream.name} ends before its questions do; run the same command again")
                    yield line
            for stream in streams:
                if stream.read(1):
                    raise MedPLIBError(f"{stream.name} holds more answers than questions; start anew with --overwrite")

    write_lines(answers, lines())


def write_lines(target: Path, lines: Iterable[bytes]) -> int:
    """Write a file that is there whole or not at all; returns the number of lines."""
    with whole_file(target, empty=True) as stream:
        return sum(stream.write(line) > 0 for line in lines)


# --- reporting --------------------------------------------------------------------------------------------------------


def summary_lines(outcome: Outcome, options: InferenceOptions) -> Iterator[str]:
    """Lines about a run: how much, how fast, the scores that were asked for, and what failed."""
    if outcome.was_finished:
        yield f"{outcome.answers} is finished already: {outcome.rows} answers; --overwrite starts anew"
    else:
        rate = f", {outcome.rows / outcome.seconds:.2f} a second" if outcome.seconds else ""
        yield f"wrote {outcome.rows} answers to {outcome.answers} in {outcome.seconds:.1f} s{rate}"
    if options.answer_scores:
        yield from answer_scores(outcome.answers)
    if options.segmentation_scores:
        yield from segmentation_scores(outcome.answers, options.thresholds)
    if outcome.errors:
        yield f"{outcome.errors} of them could not be given, the first because {outcome.first_error}"


def answer_scores(answers: Path) -> Iterator[str]:
    """The published table of answer scores; ``cal_metric`` has the standard ones."""
    text = PublishedText()
    for prediction in read_predictions(answers):
        if prediction.gt_masks is None:
            text.add(prediction)
    yield format_table(text.table()) if text.open + text.closed else "no question asks for more than masks"


def segmentation_scores(answers: Path, thresholds: Sequence[float] = ()) -> Iterator[str]:
    """The published mIoU and mDice, overall and per modality, at every threshold that the rows have masks at."""
    scores = score_predictions(read_predictions(answers), thresholds=thresholds or None, samples=0)
    for threshold, masks in scores.published_masks.items():
        if not masks.count:
            yield "no record has a reference mask, so there is no mIoU"
            return
        if threshold is not None:
            yield f"masks at {threshold:g}:"
        yield masks.format()
    targets, silent = scores.total("target"), scores.total("target") - scores.total("seg")
    if silent:
        yield f"{silent:.0f} of {targets:.0f} answers say no <SEG>; without --always_mask their masks are empty"
