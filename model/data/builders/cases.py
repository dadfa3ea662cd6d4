"""Common form of all layouts of a user's own data: one case an image or slice, with its targets and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.data.image_io import ImageData, MaskData


@dataclass(frozen=True)
class Target:
    """One named structure of a case.

    Attributes:
        name: what it is called in questions ("optic disc").
        read: gives its mask, bool [H, W] of the image's size; picklable. An empty mask says that it is absent. A
            ``MaskData`` instead brings a note on how it was read.
        origin: the file (and value, color or annotation) that it comes from, for messages.
    """

    name: str
    read: Callable[[], NDArray[np.bool_] | MaskData]
    origin: str


@dataclass(frozen=True)
class Case:
    """One image, or one slice of a volume.

    Attributes:
        key: unique in the source and good as a file name without suffix.
        image: a readable picture that records may point to as it lies, or a picklable function that gives its pixels,
            which are then written to ``OUT/images/KEY.png``.
        targets: the structures with masks.
        absent: names that the source states are not in this image.
        foreign: targets of other kinds of images, which such an image cannot show.
        labels: classes of the whole image, name → value ("diagnosis" → "melanoma").
        questions: (question, answer) pairs that the source brings; ``<mask>`` and ``<region>`` tags name files by
            absolute paths.
        conversation: whether ``questions`` are the turns of one conversation, instead of a record each.
        patient: what no two splits may share; None where the source does not say.
        split: ``train``, ``validation`` or ``test`` where the source says; None leaves it to the build.
        modality: one of ``schema.MODALITIES``; None where unknown.
        spacing_mm: (row, column) distance of pixels.
        volume: name of the volume that the slice is of; None for a picture.
        plane: ``axial``, ``coronal`` or ``sagittal`` of a slice.
        slice_index: which slice of the volume, from 0.
        terms: what the source says on the use of this image.
        origin: the file that the image comes from, for messages.
    """

    key: str
    image: Path | Callable[[], ImageData]
    targets: tuple[Target, ...] = ()
    absent: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    questions: tuple[tuple[str, str], ...] = ()
    conversation: bool = False
    patient: str | None = None
    split: str | None = None
    modality: str | None = None
    spacing_mm: tuple[float, float] | None = None
    volume: str | None = None
    plane: str | None = None
    slice_index: int | None = None
    terms: str = ""
    origin: str = ""


@dataclass(frozen=True)
class Problem:
    """Something of the source that is left out or in doubt: ``kind`` is a stable word, ``fix`` says what would help."""

    kind: str
    file: str
    message: str
    fix: str


@dataclass
class Source:
    """A recognised source.

    Attributes:
        kind: the layout's name, as ``--kind`` takes it.
        summary: one sentence on what was recognised ("nnU-Net: 20 CT volumes, labels liver and tumor").
        cases: gives the cases in a fixed order without decoding pixels; each call starts anew.
        problems: filled while the cases are listed.
        terms: what the source says on the use of the whole set.
    """

    kind: str
    summary: str
    cases: Callable[[], Iterator[Case]]
    problems: list[Problem] = field(default_factory=list)
    terms: str = ""


@dataclass(frozen=True)
class ReadOptions:
    """What a user may state about a source, from the command line.

    Attributes:
        modality: of all images; empty leaves it to the source.
        target: name of the structure where masks bear none; empty leaves it to the source.
        plane: of slices; ``acquired`` is the plane of the thickest spacing.
        window: (lower, upper) value of slices, or None for the modality's own.
        every: take each N-th slice of a volume.
        names: CSV of class values or mask names and what they are called; None without one.
        patient_pattern: regular expression whose first group (or match) in a path is the patient; empty without one.
    """

    modality: str = ""
    target: str = ""
    plane: str = "acquired"
    window: tuple[float, float] | None = None
    every: int = 1
    names: Path | None = None
    patient_pattern: str = ""


class Layout(Protocol):
    """A reader of one layout."""

    kind: str

    def recognize(self, root: Path, options: ReadOptions) -> Source | None:
        """The source at ``root`` (a folder or one file), or None if it has another layout; cheap, no pixels."""
