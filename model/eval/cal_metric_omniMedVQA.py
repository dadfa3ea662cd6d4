"""Accuracy on OmniMedVQA by imaging modality: as it was published, then the standard scores.

    python model/eval/cal_metric_omniMedVQA.py --pred=FILE.jsonl --root DIR

``DIR`` is OmniMedVQA's folder, whose question files (``QA_information/**/*.json``, or JSON files anywhere in ``DIR``)
say which modality an image has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

if not __package__:  # run as a file: Python puts this folder on its path, not the project
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from model.errors import MedPLIBError
from model.eval.cal_metric import add_output_flags, print_standard, read_with_bar, run_command, write_json
from model.eval.metrics.published import published_words
from model.eval.metrics.rows import is_closed
from model.eval.metrics.scores import score_predictions
from model.eval.predictions import Prediction, named


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scores of one predictions file; returns the exit code."""
    return run_command("cal_metric_omniMedVQA", build_parser(), run, arguments)


def build_parser() -> argparse.ArgumentParser:
    """The published flags, the folder that was written into the published script, and ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pred", required=True, metavar="FILE.jsonl", help="predictions of vqa_infer")
    parser.add_argument("--root", required=True, type=Path, metavar="DIR", help="OmniMedVQA's folder")
    add_output_flags(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Read the predictions once, print both kinds of scores and write them where asked."""
    modalities = read_modalities(options.root)
    hits: dict[str, list[bool]] = defaultdict(list)  # closed questions answered with exactly the reference's words
    number = {"open": 0, "closed": 0}

    def watched() -> Iterator[Prediction]:
        for row in with_modality(read_with_bar(options.pred), modalities):
            number["closed" if is_closed(row) else "open"] += 1
            if is_closed(row):
                hits[row.metadata["modality"]].append(published_words(row.text) == published_words(row.gt))
            yield row

    scores = score_predictions(watched(), samples=options.samples, seed=options.seed)
    by_modality = {name: round(100 * sum(found) / len(found), 2) for name, found in hits.items()}
    # the paper's overall score (reference §11); the recorded run does not separate it from the accuracy of all
    # questions, since its modalities are equally large
    mean = sum(sum(found) / len(found) for found in hits.values()) / len(hits) if hits else 0.0
    print(f"pred file {options.pred}\ncandidate_set None")
    print(f"open_cnt {number['open']}\nclosed_cnt {number['closed']}")
    print(f"{by_modality}\nmean acc {mean}\nNone\n")
    print_standard(scores)
    published = {"modality": by_modality, "mean acc": mean}
    write_json(options.json, {"predictions": options.pred, "published": published, "standard": scores.to_dict()})


def read_modalities(root: Path) -> dict[str, str]:
    """Image path, as OmniMedVQA's question files name it, → modality.

    Raises:
        MedPLIBError: there are no such files, or one is not readable.
    """
    folder = root / "QA_information" if (root / "QA_information").is_dir() else root
    found: dict[str, str] = {}
    for file in sorted(folder.rglob("*.json")):
        try:
            found |= {str(entry["image_path"]): str(entry["modality_type"]) for entry in json.loads(file.read_bytes())}
        except (ValueError, KeyError, TypeError) as error:
            raise MedPLIBError(
                f"{file} is no question file of OmniMedVQA ({error!r:.80}); "
                "expected a list of objects with image_path and modality_type"
            ) from error
    if not found:
        raise MedPLIBError(f"{folder} holds no question files (*.json); give OmniMedVQA's folder with --root")
    return found


def with_modality(rows: Iterable[Prediction], modalities: dict[str, str]) -> Iterator[Prediction]:
    """The rows with their images' modalities; paths are matched from their ends, wherever the data set lay.

    Raises:
        MedPLIBError: images that no question file names; the first are listed.
    """
    unknown: list[str] = []
    for row in rows:
        parts = PurePosixPath(row.image_path).parts
        endings = ("/".join(parts[start:]) for start in range(len(parts)))
        modality = next((modalities[ending] for ending in endings if ending in modalities), None)
        if modality is None:
            unknown.append(row.image_path or f"none for question {row.question_id}")
        else:
            yield replace(row, metadata={**row.metadata, "modality": modality})
    if unknown:
        raise MedPLIBError(
            f"no question file names the image of {len(unknown)} predictions ({named(unknown)}); check --root"
        )


if __name__ == "__main__":
    sys.exit(main())
