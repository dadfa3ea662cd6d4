"""Rank, shard and device of one evaluation process, and the journals that stopped runs resume from."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed

from model.checkpoint.directories import checkpoint_name, regular_files, resolve
from model.data.builders.jobs import whole_file
from model.errors import MedPLIBError


@dataclass(frozen=True)
class Rank:
    """One process of a launch; rank 0 merges the parts and reports."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine; also the number of its GPU
    local_world_size: int = 1

    @classmethod
    def from_environment(cls, local_rank: int | None = None) -> Rank:
        """What the launcher says; alone where there was none.

        Args:
            local_rank: as a launcher's ``--local_rank`` gives it, used where the environment does not say.

        Raises:
            MedPLIBError: the variables are no numbers, contradict each other or name no meeting point.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            found = {name: int(os.environ[name]) for name in names if name in os.environ}
        except ValueError as error:
            raise MedPLIBError(f"the launcher's variables {', '.join(names)} must be whole numbers; {error}") from error
        rank, world_size = found.get("RANK", 0), found.get("WORLD_SIZE", 1)
        if not 0 <= rank < world_size:
            raise MedPLIBError(f"RANK is {rank} and WORLD_SIZE {world_size}; ranks are counted from 0")
        if world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise MedPLIBError(
                f"WORLD_SIZE is {world_size}, but MASTER_ADDR and MASTER_PORT are not set; start the processes with "
                "torchrun, accelerate launch or deepspeed"
            )
        local = found.get("LOCAL_RANK", local_rank if local_rank is not None and local_rank >= 0 else 0)
        return cls(rank, world_size, local, found.get("LOCAL_WORLD_SIZE", world_size))

    def connect(self) -> None:
        """Meet the other processes of the launch, so that ``wait`` notices one that dies, and share the CPU cores."""
        if self.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.local_world_size))
        if self.world_size > 1 and "MASTER_ADDR" in os.environ and not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=timedelta(days=30))

    def wait(self) -> None:
        """Wait until all processes are here, or one of them is gone."""
        if self.world_size > 1 and distributed.is_initialized():
            try:
                distributed.barrier()
            except RuntimeError:  # a connection was closed; the journal of that part says that it is not finished
                return

    def part_path(self, answers: Path) -> Path:
        """Where one of several processes writes; the answers file itself where there is one."""
        if self.world_size == 1:
            return answers
        return answers.with_name(f"{answers.stem}.part-{self.rank}-of-{self.world_size}{answers.suffix}")

    def part_paths(self, answers: Path) -> list[Path]:
        """Where the processes of this launch write, by rank."""
        return [Rank(rank, self.world_size).part_path(answers) for rank in range(self.world_size)]

    def other_parts(self, answers: Path) -> list[Path]:
        """Parts beside an answers file that a launch with another number of processes has left."""
        pattern = f"{glob.escape(answers.stem)}.part-*-of-*{glob.escape(answers.suffix)}"
        return sorted({*answers.parent.glob(pattern)} - {*self.part_paths(answers)})


def choose_device(wanted: str, rank: Rank) -> torch.device:
    """The device of a process.

    Args:
        wanted: ``auto`` (CUDA where there is any), ``cpu``, ``cuda`` (each process its own) or one by name, ``cuda:1``.
        rank: of the process.

    Raises:
        MedPLIBError: there is no such device, or fewer GPUs than processes.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cuda":
        if wanted.startswith("cuda:") and rank.local_world_size > 1:
            raise MedPLIBError(
                f"{rank.local_world_size} processes cannot share the device {wanted}; give cuda, for each its own"
            )
        try:
            return torch.device(wanted)
        except RuntimeError as error:
            raise MedPLIBError(f"{wanted!r:.80} is no device; give auto, cpu, cuda or cuda:1") from error
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not visible:
        raise MedPLIBError("the device is cuda, but no GPU is visible here; use cpu")
    if rank.local_rank >= visible:
        raise MedPLIBError(
            f"process {rank.local_rank} has no GPU of its own, only {visible} are visible; launch fewer processes"
        )
    return torch.device("cuda", rank.local_rank)


def chunk(total: int, num_chunks: int, index: int) -> range:
    """Record numbers of one of ``num_chunks`` runs of neighbours, cut as published: all but the last equally long."""
    size = -(-total // num_chunks)
    return range(min(index * size, total), min((index + 1) * size, total))


# --- journals -------------------------------------------------------------------------------------------------------

_FORMAT = 1
_LISTED = 4  # differing settings named in a refusal


@dataclass(frozen=True)
class Journal:
    """The entry beside an answers file: how it was made and whether it is finished."""

    settings: Mapping[str, Any]  # everything the answers depend on; JSON-ready
    state: Literal["running", "finished"] = "running"
    rows: int = 0  # written when it finished
    errors: int = 0  # of these, questions that could not be answered
    seconds: float = 0.0  # spent in all sittings together, as far as they ended by themselves
    about: Mapping[str, Any] = field(default_factory=dict)  # versions and device, which change no answer
    format: int = _FORMAT

    @property
    def finished(self) -> bool:
        """Whether every question has its row."""
        return self.state == "finished"

    def of_model(self, digest: str) -> bool:
        """Whether the answers are those of the checkpoint with this ``fingerprint``."""
        return dict(self.settings.get("model", {})).get("digest") == digest

    def write(self, answers: Path) -> None:
        """Put it beside an answers file; it is there whole or not at all."""
        with whole_file(journal_path(answers)) as stream:
            stream.write((json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode())

    def refuse_unless_same(self, settings: Mapping[str, Any], answers: Path) -> None:
        """Raise a MedPLIBError that names the first differences to the settings of a run that wants to resume."""
        ours, theirs = _flat(settings), _flat(self.settings)
        names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
        if names:
            changes = [f"{name} was {theirs.get(name)!r:.60}, now {ours.get(name)!r:.60}" for name in names[:_LISTED]]
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            raise MedPLIBError(
                f"{answers} belongs to a run with other settings: {'; '.join(changes)}{more}; "
                "run it with those, name another file, or start anew with --overwrite"
            )


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
        return Journal(**{item.name: entry[item.name] for item in fields(Journal) if item.name in entry})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MedPLIBError(
            f"{path} is no journal of a run ({error}); remove it, or start anew with --overwrite"
        ) from error


def journals_under(folder: Path) -> list[Journal]:
    """All journals of a folder and those in it."""
    answers = (path.with_name(path.name.replace(".run.json", ".jsonl")) for path in sorted(folder.rglob("*.run.json")))
    return [journal for journal in map(read_journal, answers) if journal is not None]


def remove(answers: Path) -> None:
    """Delete an answers file and its journal."""
    answers.unlink(missing_ok=True)
    journal_path(answers).unlink(missing_ok=True)


# --- identity of checkpoints ----------------------------------------------------------------------------------------

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16  # of each weight file: reading all of 14 GB would take longer than loading it


def run_folder(kind: str, model: Path) -> Path:
    """``runs/KIND/NAME`` of a checkpoint; ``NAME-DIGEST`` where that holds answers of another one of the same name."""
    model = resolve(model)
    folder = Path("runs") / kind / checkpoint_name(model)
    digest = fingerprint(model) if model.is_dir() else ""
    same = all(journal.of_model(digest) for journal in journals_under(folder))
    return folder if same else folder.with_name(f"{folder.name}-{digest[:8]}")


def fingerprint(path: Path) -> str:
    """Digest of a checkpoint directory or weight file: names and content of its files, of weights samples alone."""
    digest = hashlib.blake2b(digest_size=16)
    path = resolve(path)
    for file in [path] if path.is_file() else regular_files(path, "*")[0]:
        if file.suffix not in (*_WEIGHTS, ".json", ".model"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            if file.suffix not in _WEIGHTS or size <= _SAMPLES * _SAMPLE_BYTES:
                while block := stream.read(1 << 20):
                    digest.update(block)
                continue
            for sample in range(_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
