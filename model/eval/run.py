"""Run over one data file: inference, resuming, merging the parts of several processes, report."""

from __future__ import annotations

import hashlib
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
from model.eval.inference import Prepared, answer_questions, check_options, open_engine
from model.eval.metrics.published import PublishedText, format_table
from model.eval.metrics.scores import score_predictions
from model.eval.options import InferenceOptions
from model.eval.predictions import Key, Prediction, PredictionWriter, read_predictions
from model.eval.questions import Question, Reference, Turns, questions_of, references_of
from model.eval.shards import Journal, Rank, choose_device, chunk, fingerprint, journal_path, read_journal, remove
from model.inference.engine import Engine
from model.visualize import write_comparison

logger = logging.getLogger(__name__)

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
    was_finished: bool = False  # nothing was left to do


def run_inference(options: InferenceOptions, rank: Rank | None = None, opener: Opener = open_engine) -> Outcome:
    """Answer every question of a data file; resumes where an earlier run of the same settings was stopped.

    Args:
        options: what is asked and how.
        rank: of this process; what the environment says where None. Rank 0 waits for the others and merges their parts.
        opener: loads the engine, once something is left to be asked.

    Raises:
        MedPLIBError: the options do not fit the checkpoint, the data or the answers that are there.
    """
    rank = rank or Rank.from_environment()
    records = open_records(options.data)
    numbers = chunk(min(len(records), options.limit or len(records)), options.num_chunks, options.chunk_index)
    check_options(options)
    _look_ahead(records, numbers, options)
    device = choose_device(options.device, rank)
    settings = _settings(options, len(records), device, rank)
    answers, journal = options.answers, None if options.overwrite else read_journal(options.answers)
    if journal is not None and journal.finished:
        if not answers.is_file():
            raise MedPLIBError(f"{answers} is gone, but {journal_path(answers)} is there; start anew with --overwrite")
        # how many processes a finished run had does not matter any more
        journal.refuse_unless_same({**settings, "processes": journal.settings.get("processes")}, answers)
        return _outcome(answers, journal, was_finished=True)
    rank.connect()
    _check_leftovers(options, rank, journal)
    shard = numbers[rank.rank :: rank.world_size]
    outcome = _answer_shard(options, rank, records, shard, settings, device, opener)
    rank.wait()
    if rank.world_size == 1 or rank.rank:
        return outcome
    parts = rank.part_paths(answers)
    journals = [read_journal(part) for part in parts]
    for number, found in enumerate(journals):
        if found is None or not found.finished:
            raise MedPLIBError(
                f"process {number} of {rank.world_size} ended before its questions did; see its error message, and "
                "run the same command again to go on"
            )
    merge_parts(answers, parts, records, numbers, options.turns)
    return _outcome(answers, merge_journals(answers, parts, [j for j in journals if j is not None], settings))


def _settings(options: InferenceOptions, records: int, device: torch.device, rank: Rank) -> dict[str, Any]:
    """Everything the answers depend on, JSON-ready; a run goes on only with the same."""
    with options.data.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    plain = ("answer_type", "template", "turns", "max_new_tokens", "max_length", "temperature", "top_p")
    return {
        "model": {"name": checkpoint_name(options.model), "digest": fingerprint(options.model)},
        "vision_tower": fingerprint(options.vision_tower) if options.vision_tower else None,
        "sam": fingerprint(options.sam) if options.sam else None,
        "data": {"name": options.data.name, "sha256": digest, "records": records},
        "images": str(options.images.resolve()),
        **{name: getattr(options, name) for name in plain},
        "seed": options.seed if options.temperature else None,
        "thresholds": list(options.thresholds),
        "always_mask": options.always_mask,
        "no_mask_below": options.no_mask_below,
        "regions": options.regions is not False,
        "router": options.router,
        "precision": options.precision or ("fp32" if device.type == "cpu" else "as stored"),
        "limit": options.limit,
        "chunk": {"index": options.chunk_index, "of": options.num_chunks},
        "processes": rank.world_size,
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


def _check_leftovers(options: InferenceOptions, rank: Rank, journal: Journal | None) -> None:
    """Remove what an earlier run left, where that is asked for; otherwise refuse what is not this run's."""
    others = rank.other_parts(options.answers)
    if options.overwrite:
        for path in [*others, *([options.answers] if rank.world_size > 1 else [])] if rank.rank == 0 else ():
            remove(path)
    elif others:
        raise MedPLIBError(
            f"{others[0]} was left by a run with another number of processes; go on with as many, "
            "or start anew with --overwrite"
        )
    elif rank.world_size > 1 and journal is not None:
        raise MedPLIBError(
            f"{options.answers} was begun by one process and is not finished; go on with one, or start anew with "
            "--overwrite"
        )


def _answer_shard(
    options: InferenceOptions,
    rank: Rank,
    records: Records,
    shard: range,
    settings: dict[str, Any],
    device: torch.device,
    opener: Opener,
) -> Outcome:
    """Answer what is not answered yet of this process's share of the records."""
    begun, path = time.monotonic(), rank.part_path(options.answers)
    earlier = None if options.overwrite else read_journal(path)
    if options.overwrite:
        journal_path(path).unlink(missing_ok=True)
    if earlier is not None:
        earlier.refuse_unless_same(settings, path)
    elif not options.overwrite and path.exists() and path.stat().st_size:
        raise MedPLIBError(
            f"{path} is there already and no run's journal beside it; name another file, or start anew with --overwrite"
        )
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "batch_size": options.batch_size,
    }
    journal = Journal(settings, about=about, seconds=earlier.seconds if earlier else 0.0)
    errors: list[str] = []

    def note(row: Prediction) -> None:
        if row.failed:
            errors.append(row.error or "")

    with PredictionWriter(path, "overwrite" if options.overwrite else "resume") as writer:
        journal.write(path)
        begin, skipped = _check_rows(path, records, shard, options.turns, note)
        if writer.rows:
            logger.info("%s: going on after %d answers", path, writer.rows)
        left = shard[begin:]
        if left:
            what = "answering" if rank.world_size == 1 else f"answering (1 of {rank.world_size})"
            often = sys.stderr.isatty()  # a log takes a line every half minute
            every, hidden = 0.1 if often else 30.0, rank.rank > 0
            engine = opener(options, device)
            bar = tqdm(total=len(left), unit="record", desc=what, mininterval=every, leave=not often, disable=hidden)

            def questions() -> Iterator[Question]:
                for number in left:
                    yield from _questions(records, number, options)[skipped if number == left[0] else 0 :]

            def report(item: Prepared, row: Prediction) -> None:
                writer.write(row)
                note(row)
                if options.pictures is not None and item.image is not None:
                    write_comparison(options.pictures, item.question.number, item.image.data.pixels, row)
                bar.update((item.question.number - left[0]) // left.step + 1 - bar.n)

            with bar:
                answer_questions(engine, options, checkpoint_name(options.model), questions(), report)
        seconds = round(journal.seconds + time.monotonic() - begun, 3)
        replace(journal, state="finished", rows=writer.rows, errors=len(errors), seconds=seconds).write(path)
    return Outcome(path, writer.rows, len(errors), errors[0] if errors else None, seconds)


def _check_rows(
    path: Path, records: Records, shard: range, turns: Turns, note: Callable[[Prediction], None]
) -> tuple[int, int]:
    """Check the rows that are there against the questions; ``note`` gets each.

    Returns:
        Place in the shard where to go on, and how many questions of that record are answered.
    """
    rows = read_predictions(path)
    for at, number in enumerate(shard):
        for turn, key in enumerate(_keys(records, number, turns)):
            row = next(rows, None)
            if row is None:
                return at, turn
            if row.key != key:
                raise MedPLIBError(
                    f"{path} answers {row.key[0]} where {key[0]} is asked; it is of another run: name "
                    "another file, or start anew with --overwrite"
                )
            note(row)
    if next(rows, None) is not None:
        raise MedPLIBError(f"{path} holds more answers than there are questions; start anew with --overwrite")
    return len(shard), 0


def _keys(records: Records, number: int, turns: Turns) -> list[Key]:
    """Keys of the rows of one record, in their order; one row stands for a record that cannot be parsed."""
    try:
        return [reference.key for reference in references_of(records[number], number, turns)]
    except MedPLIBError:
        return [(str(number), 0)]


def _outcome(answers: Path, journal: Journal, *, was_finished: bool = False) -> Outcome:
    failed = (row.error for row in read_predictions(answers) if row.failed)
    first_error = next(failed, None) if journal.errors else None
    return Outcome(answers, journal.rows, journal.errors, first_error, journal.seconds, was_finished=was_finished)


# --- merging ----------------------------------------------------------------------------------------------------------


def merge_parts(answers: Path, parts: Sequence[Path], records: Records, numbers: range, turns: Turns) -> None:
    """Merge the parts, by rank, of processes that took every ``len(parts)``-th record each; whole or not at all.

    Raises:
        MedPLIBError: a part holds more or fewer rows than its questions.
    """

    def lines() -> Iterator[bytes]:
        with ExitStack() as stack:
            streams = [stack.enter_context(part.open("rb")) for part in parts]
            for at, number in enumerate(numbers):
                stream = streams[at % len(parts)]
                for _ in _keys(records, number, turns):
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


def merge_journals(
    answers: Path, parts: Sequence[Path], journals: Sequence[Journal], settings: dict[str, Any]
) -> Journal:
    """Write the journal of answers that were merged from parts, and remove the parts."""
    rows, errors = (sum(getattr(journal, name) for journal in journals) for name in ("rows", "errors"))
    seconds = max(journal.seconds for journal in journals)
    whole = replace(journals[0], settings=settings, rows=rows, errors=errors, seconds=seconds)
    whole.write(answers)
    for part in parts:
        remove(part)
    return whole


# --- reporting --------------------------------------------------------------------------------------------------------


def summary_lines(outcome: Outcome, options: InferenceOptions) -> Iterator[str]:
    """Lines about a run: how much, how fast, the scores that were asked for, and what failed."""
    if outcome.was_finished:
        yield f"{outcome.answers} is finished already: {outcome.rows} answers; --overwrite starts anew"
    else:
        rate = f", {outcome.rows / outcome.seconds:.2f} a second" if outcome.seconds else ""
        yield f"wrote {outcome.rows} answers to {outcome.answers} in {outcome.seconds:.1f} s{rate}"
    if options.answer_scores:
        yield answer_scores(outcome.answers)
    if options.segmentation_scores:
        yield from segmentation_scores(outcome.answers, options.thresholds)
    if outcome.errors:
        yield f"{outcome.errors} of them could not be given, the first because {outcome.first_error}"


def answer_scores(answers: Path) -> str:
    """The published table of answer scores; ``cal_metric`` has the standard ones."""
    text = PublishedText()
    for prediction in read_predictions(answers):
        if prediction.gt_masks is None:
            text.add(prediction)
    return format_table(text.table()) if text.open + text.closed else "no question asks for more than masks"


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
