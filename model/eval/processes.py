"""Rank, shard, device and progress of one evaluation process, and the run files it resumes from."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from model.data.builders.jobs import whole_file
from model.errors import MedPLIBError


@dataclass(frozen=True)
class Place:
    """One process of a launch."""

    rank: int = 0  # its number among all, from 0; 0 joins the parts and reports
    world_size: int = 1  # number of processes
    local_rank: int = 0  # its number on this machine, which is also its GPU's
    local_world_size: int = 1  # number of processes on this machine
    launch: str = "alone"  # the same in all processes of one launch, another in the next

    @property
    def is_first(self) -> bool:
        """Whether this process joins the parts and reports."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, local_rank: int | None = None) -> Place:
        """What the launcher says; alone where there was none.

        Args:
            local_rank: as a launcher's ``--local_rank`` gives it, used where the environment does not say.

        Raises:
            MedPLIBError: the variables are no numbers, or contradict each other.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            found = {name: int(os.environ[name]) for name in names if name in os.environ}
        except ValueError as error:
            raise MedPLIBError(f"the launcher's variables {', '.join(names)} must be whole numbers; {error}") from error
        rank, world_size = found.get("RANK", 0), found.get("WORLD_SIZE", 1)
        if not 0 <= rank < world_size:
            raise MedPLIBError(f"RANK is {rank} and WORLD_SIZE {world_size}; ranks are counted from 0")
        local = found.get("LOCAL_RANK", local_rank if local_rank is not None and local_rank >= 0 else 0)
        local_size = found.get("LOCAL_WORLD_SIZE", world_size)
        return cls(rank, world_size, local, local_size, _launch(local_size == world_size))


def _launch(one_machine: bool) -> str:
    """Names the launch: processes of one have the same master, run and, on one machine, the same parent."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    parts = [os.environ.get(name, "") for name in names]
    if one_machine:
        parts += [str(os.getppid()), started(os.getppid())]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def started(process: int) -> str:
    """When a process of this machine began, in the kernel's clock ticks; empty where that is unknown."""
    try:
        return Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def choose_device(wanted: str, place: Place) -> torch.device:
    """The device of this process.

    Args:
        wanted: ``auto`` (CUDA where there is any), ``cpu``, ``cuda`` (each process its own) or one by name, ``cuda:1``.
        place: of this process.

    Raises:
        MedPLIBError: there is no such device, or fewer GPUs than processes.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cuda":
        if wanted.startswith("cuda:") and place.local_world_size > 1:
            raise MedPLIBError(
                f"{place.local_world_size} processes cannot share the device {wanted}; give cuda, for each its own"
            )
        try:
            return torch.device(wanted)
        except RuntimeError as error:
            raise MedPLIBError(f"{wanted!r:.80} is no device; give auto, cpu, cuda or cuda:1") from error
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not visible:
        raise MedPLIBError("the device is cuda, but no GPU is visible here; use cpu")
    if place.local_rank >= visible:
        raise MedPLIBError(
            f"process {place.local_rank} has no GPU of its own, only {visible} are visible; launch fewer processes"
        )
    return torch.device("cuda", place.local_rank)


def share_cores(place: Place) -> None:
    """Give each process of this machine its share of the CPU cores, unless the user has said how many threads."""
    if place.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))


def chunk(total: int, num_chunks: int, index: int) -> range:
    """Record numbers of one of ``num_chunks`` runs of neighbours, cut as published: all but the last equally long."""
    size = -(-total // num_chunks)
    return range(min(index * size, total), min((index + 1) * size, total))


_FORMAT = 1
_LISTED = 4  # differing settings named in a refusal

State = Literal["running", "finished"]


@dataclass(frozen=True)
class Journal:
    """One run's, or one part's, entry."""

    settings: Mapping[str, Any]  # everything the answers depend on; JSON-ready
    state: State = "running"  # ``finished`` once every question has its row
    rows: int = 0  # written when it finished
    errors: int = 0  # of these, questions that could not be answered
    seconds: float = 0.0  # spent in all sittings together, as far as they ended by themselves
    # what is good to know and changes no answer (versions, device).
    about: Mapping[str, Any] = field(default_factory=dict)
    launch: str = ""  # who works on it, with the three after it
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
        with whole_file(journal_path(answers)) as stream:
            stream.write((json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode())

    def refuse_unless_same(self, settings: Mapping[str, Any], answers: Path) -> None:
        """Compare with the settings of a run that wants to go on.

        Raises:
            MedPLIBError: they differ; the first differences are named.
        """
        ours, theirs = _flat(settings), _flat(self.settings)
        names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
        if names:
            changes = [f"{name} was {theirs.get(name)!r:.60}, now {ours.get(name)!r:.60}" for name in names[:_LISTED]]
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            raise MedPLIBError(
                f"{answers} belongs to a run with other settings: {'; '.join(changes)}{more}; "
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


def join_journals(
    answers: Path, parts: Sequence[Path], journals: Sequence[Journal], settings: Mapping[str, Any]
) -> Journal:
    """Write the journal of answers that were joined from parts, and take the parts away."""
    rows, errors = (sum(getattr(journal, name) for journal in journals) for name in ("rows", "errors"))
    seconds = max(journal.seconds for journal in journals)
    whole = replace(journals[0], settings=settings, rows=rows, errors=errors, seconds=seconds)
    whole.write(answers)
    for part in parts:
        remove(part)
    return whole
