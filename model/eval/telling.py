"""What ``vqa_infer`` says at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.eval.metrics import PublishedText, score_predictions
from model.eval.metrics.published_text import format_table
from model.eval.options import InferenceOptions
from model.eval.predictions import read_predictions

if TYPE_CHECKING:
    from model.eval.run import Outcome


def told(outcome: Outcome, options: InferenceOptions) -> Iterator[str]:
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
