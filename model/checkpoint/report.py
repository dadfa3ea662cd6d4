"""Report of a checkpoint's loading: missing, unexpected and mis-shaped tensors, as text or as an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from model.errors import MedPLIBError

Shape = tuple[int, ...]
_SHOWN = 6  # families listed per kind of mismatch; the rest is counted


@dataclass(frozen=True)
class LoadReport:
    """How the tensors of a checkpoint fit the network.

    Attributes:
        source: the directory or file.
        loaded: number of tensors taken over.
        missing: our names that the checkpoint lacks.
        unexpected: the checkpoint's names that the network has no place for.
        misshaped: our name → (shape found, shape expected).
        ignored: number of buffers left out because they follow from the sizes.
        notes: sentences about choices made on the way (which files, contradictions in config.json, …).
    """

    source: str
    loaded: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    ignored: int = 0
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Nothing is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.loaded} tensors fit"]
        if self.ignored:
            lines[0] += f", {self.ignored} buffers without content left out"
        lines += _listing("missing", self.missing)
        lines += _listing("unexpected", self.unexpected)
        misfits = [
            f"{key} is {list(found)}, expected {list(wanted)}" for key, (found, wanted) in self.misshaped.items()
        ]
        lines += _listing("of another shape", misfits)
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def raise_unless_fits(self) -> None:
        """Raise a ``MedPLIBError`` that lists every mismatch, if there is one."""
        if self.fits:
            return
        counts = {
            "missing": len(self.missing),
            "unexpected": len(self.unexpected),
            "of another shape": len(self.misshaped),
        }
        found = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
        advice = "use the config.json that belongs to these weights"
        if any(key.startswith("model.vision_tower.") for key in (*self.missing, *self.misshaped)):
            advice = "give the CLIP directory it was trained with (vision_tower=, --vision_tower)"
        elif any(key.startswith("model.sam.") for key in self.missing):
            advice = "give the SAM-Med2D file (sam=, --vision_pretrained)"
        elif self.missing and not self.unexpected:
            advice = "the download may be incomplete: check that all weight files are there"
        sentence = f"the weights in {self.source} do not fit the network that its config describes ({found}); {advice}"
        raise MedPLIBError("\n".join([sentence, *str(self).splitlines()[1:]]))


def compare(
    source: str,
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    *,
    unexpected: Iterable[str] = (),
    ignored: int = 0,
    notes: Iterable[str] = (),
) -> LoadReport:
    """Compare the shapes found in a checkpoint, under our names, with the network's."""
    misshaped = {
        key: (tuple(shape), tuple(expected[key]))
        for key, shape in found.items()
        if key in expected and tuple(shape) != tuple(expected[key])
    }
    return LoadReport(
        source=source,
        loaded=sum(key in expected and key not in misshaped for key in found),
        missing=tuple(key for key in expected if key not in found),
        unexpected=(*unexpected, *(key for key in found if key not in expected)),
        misshaped=misshaped,
        ignored=ignored,
        notes=tuple(notes),
    )


def is_finite(value: Tensor) -> bool:
    """Whether a tensor holds floating numbers alone, neither NaN nor infinite; reads it once, without a copy."""
    if not value.is_floating_point():
        return False
    if not value.numel() or value.dtype.itemsize == 1:  # no kernel reads eight-bit floats; they are converted first
        return True
    low, high = value.aminmax()  # NaN comes through
    return bool(low.isfinite() & high.isfinite())


def refuse_faulty(names: Sequence[str], source: str) -> None:
    """Raise a ``MedPLIBError`` that names tensors whose values are no finite numbers, if there are any."""
    if names:
        shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
        raise MedPLIBError(
            f"{source} hold NaN, infinite or whole numbers in {len(names)} tensors ({shown}), expected finite ones; "
            "fetch them again, or take an earlier checkpoint of the run"
        )


@contextmanager
def understanding(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever the values of somebody's file trip inside into one sentence.

    Args:
        what: the file or section, as the sentence calls it.
        remedy: what to do about it.

    Raises:
        MedPLIBError: anything was raised inside; a ``MedPLIBError`` passes through.
    """
    try:
        yield
    except MedPLIBError:
        raise
    except Exception as error:  # a number that is a word fails in as many ways as there are libraries that read it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MedPLIBError(f"{what} is not understood ({reason}); {remedy}") from error


def _listing(kind: str, entries: Sequence[str]) -> list[str]:
    """One line per family of names (layer numbers folded), most of them left out when there are many."""
    if not entries:
        return []
    families: dict[str, list[str]] = {}
    for entry in entries:
        families.setdefault(re.sub(r"\.\d+\.", ".N.", entry), []).append(entry)
    lines = [f"  {kind} ({len(entries)}):"]
    for members in list(families.values())[:_SHOWN]:
        others = f"  (and {len(members) - 1} more like it)" if len(members) > 1 else ""
        lines.append(f"    {members[0]}{others}")
    if len(families) > _SHOWN:
        lines.append(f"    … and {sum(map(len, list(families.values())[_SHOWN:]))} more")
    return lines
