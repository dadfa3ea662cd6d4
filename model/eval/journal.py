"""What stands beside an answers file: which run it belongs to, and how far that is.

``answers.jsonl`` has ``answers.run.json`` beside it. A run that goes on compares its settings with those; a run of
several processes has one such pair for each part, so that no process writes what another reads half.
"""

from __future__ import annotations

import glob
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.errors import MedPLIBError
from model.eval.places import Place, started

_FORMAT = 1
_TOLD = 4  # differing settings named in a refusal

State = Literal["running", "finished"]


@dataclass(frozen=True)
class Journal:
    """One run's, or one part's, entry.

    Attributes:
        settings: everything the answers depend on; JSON-ready.
        state: ``finished`` once every question has its row.
        rows: written when it finished.
        errors: of these, questions that could not be answered.
        seconds: spent in all sittings together, as far as they ended by themselves.
        about: what is good to know and changes no answer (versions, device).
        launch, host, process, begun: who works on it.
    """

    settings: Mapping[str, Any]
    state: State = "running"
    rows: int = 0
    errors: int = 0
    seconds: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)
    launch: str = ""
    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    begun: str = field(default_factory=lambda: started(os.getpid()))
    format: int = _FORMAT

    @property
    def finished(self) -> bool:
        """Whether every question has its row."""
        return self.state == "finished"

    def write(self, answers: Path) -> None:
        """Put it beside an answers file; it is there whole or not at all."""
        target = journal_path(answers)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(target)

    def refuse_unless_same(self, settings: Mapping[str, Any], answers: Path) -> None:
        """Compare with the settings of a run that wants to go on.

        Raises:
            MedPLIBError: they differ; the first differences are named.
        """
        ours, theirs = _flat(settings), _flat(self.settings)
        names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
        if names:
            told = [f"{name} was {theirs.get(name)!r:.60}, now {ours.get(name)!r:.60}" for name in names[:_TOLD]]
            more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
            raise MedPLIBError(
                f"{answers} belongs to a run with other settings: {'; '.join(told)}{more}; "
                "run it with those, name another file, or start anew with --overwrite"
            )

    def abandoned(self) -> bool:
        """Whether the process that worked on it is known to be gone."""
        if self.finished or self.host != socket.gethostname():
            return False
        return not _alive(self.process, self.begun)


def _alive(process: int, begun: str) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return started(process) == begun


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested names joined with dots; as JSON would give the values back."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        flat.update(_flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value})
    return flat


def journal_path(answers: Path) -> Path:
    """``answers.run.json`` of ``answers.jsonl``."""
    return answers.with_name(f"{answers.stem}.run.json")


def read_journal(answers: Path) -> Journal | None:
    """What stands beside an answers file; None where there is nothing.

    Raises:
        MedPLIBError: it cannot be understood.
    """
    path = journal_path(answers)
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["format"] != _FORMAT:
            raise ValueError(f"format {entry['format']}")
        return Journal(**entry)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MedPLIBError(
            f"{path} is no journal of a run ({error}); remove it, or start anew with --overwrite"
        ) from error


def part_path(answers: Path, place: Place) -> Path:
    """Where one of several processes writes; the answers file itself where there is one."""
    if place.world_size == 1:
        return answers
    return answers.with_name(f"{answers.stem}.part-{place.rank}-of-{place.world_size}{answers.suffix}")


def other_parts(answers: Path, world_size: int) -> list[Path]:
    """Parts beside an answers file that a launch with another number of processes has left."""
    own = {part_path(answers, Place(rank, world_size)) for rank in range(world_size)}
    pattern = f"{glob.escape(answers.stem)}.part-*-of-*{glob.escape(answers.suffix)}"
    return sorted(path for path in answers.parent.glob(pattern) if path not in own)


def remove(answers: Path) -> None:
    """Take an answers file and its journal away."""
    answers.unlink(missing_ok=True)
    journal_path(answers).unlink(missing_ok=True)


def wait_for_parts(answers: Path, place: Place, poll: float = 0.2) -> list[Journal]:
    """Wait until every process of this launch has finished its part.

    Returns:
        The journals of the parts, by rank.

    Raises:
        MedPLIBError: a process ended without finishing.
    """
    journals = []
    for rank in range(place.world_size):
        part = part_path(answers, Place(rank, place.world_size))
        journal = read_journal(part)
        while journal is None or not journal.finished or journal.launch != place.launch:
            if journal is not None and journal.launch == place.launch and journal.abandoned():
                raise MedPLIBError(
                    f"process {rank} of {place.world_size} ended before its questions did; "
                    "see what it said, and run the same command again to go on"
                )
            time.sleep(poll)
            journal = read_journal(part)
        journals.append(journal)
    return journals
