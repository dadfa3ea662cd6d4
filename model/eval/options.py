"""Options of a run over a data file, checked as far as that needs no checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.checkpoint.directories import resolve
from model.errors import MedPLIBError

if TYPE_CHECKING:  # a command's --help need not wait for torch
    from model.eval.questions import Turns

PRECISIONS = ("fp32", "bf16")
FAILED_QUESTIONS = 3
"""Exit code where some questions could not be answered."""


@dataclass(frozen=True)
class InferenceOptions:
    """One run over one data file.

    Raises:
        MedPLIBError: two of them contradict each other, or one is out of its range.
    """

    model: Path  # checkpoint directory
    data: Path  # JSON, JSONL or Parquet file in the published format
    images: Path  # folder that the records' paths start from
    answers: Path  # file the predictions are written to
    # CLIP directory, for published checkpoints whose configuration lacks CLIP's sizes.
    vision_tower: Path | None = None
    sam: Path | None = None  # SAM-Med2D file, for published checkpoints that hold no SAM weights
    answer_type: str | None = None  # label of every row; the record's own where None
    template: str | None = None  # conversation template; the checkpoint's own where None
    # which questions of a conversation are asked; those before it are shown with their reference answers.
    turns: Turns = "all"
    max_new_tokens: int = 1024  # hard end of an answer
    # tokens that a prompt, its image included, and its answer may have together; None: what the network can hold.
    max_length: int | None = None
    temperature: float = 0.0  # 0 is greedy.
    top_p: float = 1.0  # nucleus, with a temperature above 0
    seed: int = 42  # of sampling; every question draws from its own
    # mask thresholds in (0, 1): the first is that of ``masks``, all of them are written as ``masks_at``. The
    # checkpoint's own where there is none.
    thresholds: tuple[float, ...] = ()
    # decode a mask for each grounding question, whether or not the answer says ``<SEG>``, as the published evaluation
    # does.
    always_mask: bool = False
    # probability of presence below which a mask is left empty; needs a checkpoint with a presence classifier.
    no_mask_below: float | None = None
    # True demands a region adapter; False asks without looking at regions, as the published VQA loop does; None looks
    # at them.
    regions: bool | None = None
    moe: bool = False  # demand a mixture-of-experts checkpoint
    sam_size: int | None = None  # side of SAM's input that the checkpoint must have, in pixels; None takes any
    router: bool = False  # write which share of the tokens each expert computed
    answer_scores: bool = False  # report the published answer scores at the end
    segmentation_scores: bool = False  # report mIoU and mDice at the end
    pictures: Path | None = None  # folder for overlays of rows with masks; None writes none
    precision: str | None = None  # ``fp32`` or ``bf16``; as stored where None, but fp32 on a CPU
    device: str = "auto"  # ``auto``, ``cpu``, ``cuda`` or ``cuda:1``
    batch_size: int = 8  # questions decoded together
    workers: int = 2  # threads that read images ahead; 0 reads in between
    num_chunks: int = 1  # the records are cut into so many runs of neighbours, and this one is asked
    chunk_index: int = 0  # which of them is asked, from 0
    limit: int | None = None  # ask only so many records, from the first on
    overwrite: bool = False  # start anew where the answers file is there already

    def __post_init__(self) -> None:
        if not self.data.is_file():
            found = "is a folder" if self.data.is_dir() else "does not exist"
            raise MedPLIBError(f"the data file {self.data} {found}; give a JSON, JSONL or Parquet file")
        for what, folder in (("checkpoint", resolve(self.model)), ("image folder", self.images)):
            if not folder.is_dir():
                raise MedPLIBError(f"the {what} {folder} is not a directory here; give one that is")
        if self.answers.is_dir():
            raise MedPLIBError(f"{self.answers} is a directory; name the file that the answers go to")
        if self.answers.resolve() == self.data.resolve():
            raise MedPLIBError(f"{self.answers} is the data file; name another file for the answers")
        least = {"max_new_tokens": 1, "max_length": 1, "batch_size": 1, "workers": 0, "num_chunks": 1, "limit": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise MedPLIBError(f"{name} is {value}; give at least {smallest}")
        if not 0 <= self.temperature < float("inf"):
            raise MedPLIBError(f"the temperature is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise MedPLIBError(f"top_p is {self.top_p}; give a number above 0 and up to 1")
        if self.top_p < 1 and self.temperature == 0:
            raise MedPLIBError(f"top_p is {self.top_p}, but greedy answers are not drawn; give a temperature above 0")
        if not 0 <= self.seed < 2**63:
            raise MedPLIBError(f"the seed is {self.seed}; give a whole number from 0 to 2^63 - 1")
        for threshold in self.thresholds:
            if not 0 < threshold < 1:
                raise MedPLIBError(f"the mask threshold is {threshold}; give numbers between 0 and 1")
        written = [f"{threshold:g}" for threshold in self.thresholds]
        if len(set(written)) < len(written):
            raise MedPLIBError(f"a mask threshold is given twice ({', '.join(written)}); give each once")
        if self.no_mask_below is not None and not 0 <= self.no_mask_below <= 1:
            raise MedPLIBError(f"no_mask_below is {self.no_mask_below}; give a probability from 0 to 1")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise MedPLIBError(f"the precision is {self.precision!r:.80}; it may be {' or '.join(PRECISIONS)}")
        if not 0 <= self.chunk_index < self.num_chunks:
            raise MedPLIBError(
                f"the chunk is number {self.chunk_index} of {self.num_chunks}; they are counted from 0 to "
                f"{self.num_chunks - 1}"
            )
