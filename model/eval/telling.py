"""What ``vqa_infer`` says at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from model.eval.metrics import PublishedMasks, PublishedText
from model.eval.metrics.published_text import format_table
from model.eval.options import InferenceOptions
from model.eval.predictions import read_predictions
from model.eval.run import Outcome


def told(outcome: Outcome, options: InferenceOptions) -> Iterator[str]:
    """Lines about a run: how much, how fast, the scores that were asked for, and what failed."""
    if outcome.was_finished:
        yield f"{outcome.answers} is finished already: {outcome.rows} answers; --overwrite starts anew"
    else:
        rate = f", {outcome.rows / outcome.seconds:.2f} a second" if outcome.seconds else ""
        yield f"wrote {outcome.rows} answers to {outcome.answers} in {outcome.seconds:.1f} s{rate}"
    yield from score_lines(outcome.answers, answers=options.answer_scores, segmentation=options.segmentation_scores)
    if outcome.errors:
        yield f"{outcome.errors} of them could not be given, the first because {outcome.first_error}"


def score_lines(path: Path, *, answers: bool, segmentation: bool) -> Iterator[str]:
    """The published scores of an answers file; ``cal_metric`` has the standard ones.

    Args:
        path: of the predictions.
        answers: the table of answer scores.
        segmentation: mIoU and mDice, overall and per modality.
    """
    if not (answers or segmentation):
        return
    masks, text = PublishedMasks(), PublishedText()
    for prediction in read_predictions(path):
        masks.add_prediction(prediction)
        if prediction.gt_masks is None:
            text.add(prediction)
    if answers:
        yield format_table(text.table()) if text.open + text.closed else "no question is about more than masks"
    if segmentation:
        yield masks.format() if masks.count else "no record has a reference mask, so there is no mIoU"
