"""Scores of a predictions file: the published table as it was published, then the standard scores.

    python model/eval/cal_metric.py --pred=FILE.jsonl [--candidate_set FILE.json]

The published numbers are kept for comparison with published results; several are not what their names say
(``model/eval/metrics/published.py``). Judge a model by the standard ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: Python puts this folder on its path, not the project
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tqdm import tqdm

from model.data.records import open_records
from model.errors import MedPLIBError, escape_unprintable, shown
from model.eval.metrics.published import PublishedText, format_table
from model.eval.metrics.rows import masks_by_threshold
from model.eval.metrics.scores import Scores, score_predictions
from model.eval.predictions import Prediction, json_text, match_references, read_predictions

STANDARD_HEADING = "Standard scores (fractions of 1; 95 % intervals over images)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scores of one predictions file; returns the exit code."""
    return run_command("cal_metric", build_parser(), run, arguments)


def run_command(
    name: str,
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> int:
    """Run a command on its flags; its user's errors are one sentence and exit code 2."""
    escape_unprintable()
    options = parser.parse_args(arguments)
    try:
        work(options)
    except MedPLIBError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = shown(error.filename or "", quoted=False)
        print(f"{name}: {where}: {error.strerror or error}; name another file", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The published flags and ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pred", required=True, metavar="FILE.jsonl", help="predictions of vqa_infer")
    parser.add_argument(
        "--candidate_set",
        metavar="FILE.json",
        help="makes “open accuracy” choose among the references; as published, the file's content is not used",
    )
    parser.add_argument(
        "--references", metavar="FILE.json", help="data file that the predictions must match one to one"
    )
    parser.add_argument("--turns", choices=("all", "first"), default="all", help="questions asked of a conversation")
    parser.add_argument(
        "--thresholds",
        type=_thresholds,
        metavar="A,B",
        help="score the masks at these thresholds; those that the predictions carry when absent",
    )
    parser.add_argument("--surface", action="store_true", help="also HD95 and surface Dice (decodes every mask)")
    parser.add_argument("--tolerance_mm", type=float, default=2.0, help="of the surface Dice where spacing is known")
    parser.add_argument("--tolerance_px", type=float, default=2.0, help="of the surface Dice where it is not")
    add_output_flags(parser)
    return parser


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the intervals and of what is written."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--samples", type=_count, default=1000, help="bootstrap resamplings; 0 gives no intervals")
    parser.add_argument("--seed", type=_count, default=0, help="of the resampling")


def run(options: argparse.Namespace) -> None:
    """Read the predictions once, print both kinds of scores and write them where asked."""
    if options.candidate_set:
        path = Path(options.candidate_set)
        try:
            json.loads(path.read_bytes())
        except OSError as error:
            raise MedPLIBError(f"cannot read the candidate set {path}: {error.strerror}; give a JSON file") from error
        except ValueError as error:
            raise MedPLIBError(
                f"the candidate set {path} is not JSON ({error}); give a data file of records"
            ) from error
    published = PublishedText(choose_candidates=bool(options.candidate_set))
    rows: Iterable[Prediction] = read_with_bar(options.pred)
    if options.references:
        pairs = match_references(rows, open_records(options.references), options.turns)
        rows = (prediction for prediction, _ in pairs)
    scores = score_predictions(
        published.watch(rows),
        thresholds=options.thresholds or thresholds_in(options.pred),
        surface=options.surface,
        tolerance_mm=options.tolerance_mm,
        tolerance_px=options.tolerance_px,
        samples=options.samples,
        seed=options.seed,
    )
    table = print_published(options, published)
    print()
    print_standard(scores)
    published_values = {"table": table, "open": published.open, "closed": published.closed}
    write_json(options.json, {"predictions": options.pred, "published": published_values, "standard": scores.to_dict()})


def thresholds_in(path: str | Path) -> list[float] | None:
    """Thresholds that the masks of a predictions file are given at, ascending; None where only as written."""
    first = next((row for row in read_predictions(path) if row.masks or row.masks_at), None)
    return sorted(masks_by_threshold(first)) or None if first else None


def read_with_bar(path: str | Path) -> Iterator[Prediction]:
    """The rows of a predictions file, with a bar on a terminal.

    Raises:
        MedPLIBError: it cannot be read, or holds none.
    """
    try:
        with Path(path).open("rb") as stream:
            count = sum(1 for line in stream if line.strip())
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        raise MedPLIBError(f"cannot read the predictions {path}: {reason}; give a file of vqa_infer") from error
    if not count:
        raise MedPLIBError(f"{path} holds no predictions; give a file with at least one")
    yield from tqdm(read_predictions(path), total=count, unit="row", desc="scoring", leave=False, disable=None)


def print_published(options: argparse.Namespace, text: PublishedText) -> dict[str, float]:
    """Print what the published command printed, line for line; returns its table."""
    print(f"pred file {options.pred}\ncandidate_set {options.candidate_set}")
    if options.candidate_set:
        print(f"{text.open + text.closed}\ncandidate_set {len(text.references)}")
    print("length of candidate_words is 0\n" * text.empty, end="")
    print(f"open_cnt {text.open}\nclosed_cnt {text.closed}")
    table = text.table(bar=True)
    if options.candidate_set and text.open:
        hits = float(round(text.open * table["open accuracy"] / 100))
        print(f"{hits} {text.open} {text.open}")
    print(f"num_open {text.open} || num_close {text.closed}")
    print(format_table(table))
    return table


def print_standard(scores: Scores) -> None:
    """Print the standard scores, and the published grounding lines above them where there are masks."""
    for threshold, masks in scores.published_masks.items():
        if masks.count:
            at = "" if threshold is None else f", threshold {threshold:g}"
            print(f"Grounding as published: {masks.count} masks{at}\n{masks.format()}\n")
    print(f"{STANDARD_HEADING}\n{scores.table()}")
    for dimension in scores.dimensions:
        if dimension != "patient" and len(scores.by(dimension)) > 1:
            print(f"\nBy {dimension}\n{scores.table(dimension)}")
    errors, unscored = int(scores.total("error")), int(scores.total("unscored"))
    note = f", {errors} of them without an answer, which counts as wrong" if errors else ""
    note += f"; {unscored} grounding rows have no reference masks and are not scored" if unscored else ""
    print(f"\n{len(scores.keys)} rows{note}")


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write the numbers where asked."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json_text(result), encoding="utf-8", errors="replace")


def _thresholds(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no list of probabilities such as 0.1,0.5")
    return sorted(set(values))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no whole number from 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
