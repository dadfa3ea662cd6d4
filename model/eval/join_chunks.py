"""``python -m model.eval.join_chunks ANSWERS CHUNK …``: the chunks of ``infer_parallel_medplib.sh`` become one file."""

from __future__ import annotations

import argparse
import fileinput
import sys
from collections.abc import Sequence
from pathlib import Path

from model.errors import MedPLIBError, escape_unprintable
from model.eval.options import FAILED_QUESTIONS
from model.eval.run import answer_scores, merge_journals, segmentation_scores, write_lines
from model.eval.shards import Journal, journal_path, read_journal


def join_chunks(answers: Path, chunks: Sequence[Path], *, overwrite: bool = False) -> Journal:
    """Join finished chunks of one run, in their order, and remove them; the answers are written whole or not at all.

    Raises:
        MedPLIBError: a chunk is absent, unfinished or of another run, or the answers file is there already.
    """
    if answers.exists() and not overwrite:
        raise MedPLIBError(f"{answers} is there already; name another file, or start anew with --overwrite")
    journals: list[Journal] = []
    for chunk in chunks:
        journal = read_journal(chunk)
        if journal is None or not journal.finished or not chunk.is_file():
            raise MedPLIBError(f"the chunk {chunk} is not finished; ask it first")
        journals.append(journal)
    whole = {**journals[0].settings, "chunk": {"index": 0, "of": 1}}
    for index, (journal, chunk) in enumerate(zip(journals, chunks, strict=True)):
        journal.refuse_unless_same({**whole, "chunk": {"index": index, "of": len(chunks)}}, chunk)
    rows = sum(journal.rows for journal in journals)
    journal_path(answers).unlink(missing_ok=True)
    with fileinput.FileInput(chunks, mode="rb") as lines:
        written = write_lines(answers, lines)
    if written != rows:
        answers.unlink()
        raise MedPLIBError(f"the chunks hold {written} answers, their journals say {rows}; ask them anew")
    return merge_journals(answers, chunks, journals, whole)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 3 where some questions could not be answered, 2 after a user's error."""
    escape_unprintable()
    parser = argparse.ArgumentParser("python -m model.eval.join_chunks", description=__doc__)
    parser.add_argument("answers", type=Path, help="the whole run's file")
    parser.add_argument("chunks", type=Path, nargs="+", help="its chunks in their order, which go away")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--eval_vqa", action="store_true", help="print the published table of answer scores too")
    parser.add_argument("--eval_seg", action="store_true", help="print mIoU and mDice too, overall and per modality")
    options = parser.parse_args(arguments)
    try:
        journal = join_chunks(options.answers, options.chunks, overwrite=options.overwrite)
        scores = [answer_scores(options.answers)] if options.eval_vqa else []
        if options.eval_seg:
            scores += segmentation_scores(options.answers, journal.settings["thresholds"])
    except MedPLIBError as error:
        sys.stderr.write(f"join_chunks: {error}\n")
        return 2
    lines = [f"joined {journal.rows} answers of {len(options.chunks)} chunks in {options.answers}", *scores]
    if journal.errors:
        lines.append(f"{journal.errors} of them could not be given; see the rows whose finish is error")
    sys.stdout.write("\n".join(lines) + "\n")
    return FAILED_QUESTIONS if journal.errors else 0


if __name__ == "__main__":
    sys.exit(main())
