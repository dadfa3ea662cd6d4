"""Weight files of a directory: which ones belong together, reading them lazily, writing them in shards.

What exists decides, not the index: the released weights hold safetensors shards beside an index that names ``.bin``
files (reference §7).
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint.directories import regular_files
from model.checkpoint.report import Shape
from model.errors import MedPLIBError

WeightFormat = Literal["safetensors", "bin"]
MAX_SHARD = 5_000_000_000  # bytes
_STEMS: dict[WeightFormat, str] = {"safetensors": "model", "bin": "pytorch_model"}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)")
# Other things that lie beside weights under the same suffixes.
_NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|rng_state.*|mm_projector|non_lora_trainables|adapter_model|scaler)"
)


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one directory.

    Attributes:
        files: in order of their names; no tensor lies in two of them.
        notes: what was decided where the directory is not clear.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor, without reading values where the format allows it."""
        return {name: shape for path in self.files for name, shape in _shapes(path).items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor on the CPU, memory-mapped where the format allows it, one file after the other."""
        for path in self.files:
            yield from read_tensors(path)


def find_weights(directory: Path) -> WeightFiles:
    """Find the weights of a directory: safetensors or ``.bin``, one file or shards, whatever an index says.

    Raises:
        MedPLIBError: there are none, a shard is missing, two sets of the same format lie side by side, or an index
            names files elsewhere.
    """
    notes: list[str] = []
    problems: list[str] = []
    found: tuple[Path, ...] = ()
    for suffix in (".safetensors", ".bin"):
        regular, others = regular_files(directory, f"*{suffix}")
        files = [path for path in regular if not _NOT_WEIGHTS.fullmatch(path.stem)]
        notes += [f"{name} was left unread: it is a folder, a pipe, a device or a link to nothing" for name in others]
        absent = _absent_shards(files)
        if not files:
            continue
        if absent:
            problems.append(f"{', '.join(absent[:4])}{' …' if len(absent) > 4 else ''} of {directory}")
        elif found:
            notes.append(f"{len(files)} {suffix} file(s) left unread: the directory holds safetensors too")
        else:
            found = tuple(files)
    if not found and problems:
        raise MedPLIBError(f"weight files are missing: {'; '.join(problems)}; download them again")
    if not found:
        seen = f" ({'; '.join(notes)})" if notes else ""
        raise MedPLIBError(f"{directory} holds no weights{seen}; expected *.safetensors or pytorch_model*.bin there")
    notes += [f"incomplete set of weights left unread, without {problem}" for problem in problems]
    notes += _index_notes(directory, found)
    holder: dict[str, Path] = {}
    for path in found if len(found) > 1 else ():
        for name in _shapes(path):
            if name in holder:
                raise MedPLIBError(
                    f"{name} lies both in {holder[name].name} and {path.name} of {directory}: "
                    "two sets of weights side by side; remove one of them"
                )
            holder[name] = path
    return WeightFiles(found, tuple(notes))


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one ``.safetensors`` or pickled (``.bin``, ``.pth``) state dict, by name.

    Raises:
        MedPLIBError: the file is not readable as weights, or is pickled and holds more than tensors.
    """
    if not path.is_file():  # a pipe would be waited for
        raise _unreadable(path)
    if path.suffix != ".safetensors":
        yield from read_pickled(path).items()
        return
    try:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path) from error


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The state dict in a torch file, bare or under ``model`` / ``state_dict``; never runs code from it.

    Raises:
        MedPLIBError: not readable, or no state dict.
    """
    if not path.is_file():
        raise _unreadable(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except MedPLIBError:
        raise
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise _unreadable(path) from error
    for name in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise MedPLIBError(f"{path} holds no state dict (a mapping from names to tensors); give a file of weights")
    return dict(content)


def write_shards(
    state: Mapping[str, Tensor],
    directory: Path,
    weight_format: WeightFormat = "safetensors",
    max_shard: int = MAX_SHARD,
) -> None:
    """Write a state dict as one file, or as numbered shards with an index where it is larger than ``max_shard``.

    Every tensor is written in its own dtype, and whole where two names share memory.
    """
    stem, suffix = _STEMS[weight_format], weight_format
    split = split_torch_state_dict_into_shards(
        dict(state), filename_pattern=f"{stem}{{suffix}}.{suffix}", max_shard_size=max_shard
    )
    for name, keys in split.filename_to_tensors.items():
        part: dict[str, Tensor] = {}
        seen: set[int] = set()
        for key in keys:
            value = state[key].detach().cpu().contiguous()
            part[key] = value.clone() if value.data_ptr() in seen else value  # safetensors refuses shared memory
            seen.add(value.data_ptr())
        if weight_format == "safetensors":
            save_file(part, directory / name, metadata={"format": "pt"})
            (directory / name).chmod(0o644)  # safetensors makes files that only their owner can read
        else:
            # clone: a view would drag the whole storage it lies in into the pickle
            torch.save({key: value.clone() for key, value in part.items()}, directory / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shapes(path: Path) -> dict[str, Shape]:
    if path.suffix != ".safetensors":
        return {name: tuple(value.shape) for name, value in read_pickled(path).items()}
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path) from error


def _absent_shards(files: list[Path]) -> list[str]:
    """Names of numbered shards that should lie beside the ones there are."""
    names = {path.name for path in files}
    absent = set()
    for path in files:
        if match := _SHARD.fullmatch(path.stem):
            width = len(match["number"])
            expected = {
                f"{match['stem']}-{number:0{width}}-of-{match['count']}{path.suffix}"
                for number in range(1, int(match["count"]) + 1)
            }
            absent |= expected - names
    return sorted(absent)


def _index_notes(directory: Path, found: tuple[Path, ...]) -> list[str]:
    names = {path.name for path in found}
    notes = []
    for path in regular_files(directory, "*.index.json")[0]:
        try:
            named = set(map(str, json.loads(path.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError):
            notes.append(f"{path.name} is not a readable index; the files that exist were used")
            continue
        if outside := sorted(name for name in named if Path(name).name != name):
            raise MedPLIBError(f"{path} names weights elsewhere ({outside[0]}); it may name files beside it alone")
        if not named <= names:
            notes.append(f"{path.name} names files that are not there or not used; the files that exist were used")
    return notes


def _is_zip(path: Path) -> bool:
    """Whether a torch file has the zip layout (torch ≥ 1.6), the only one that can be memory-mapped.

    Raises:
        MedPLIBError: an entry is compressed: torch never writes such a file, and it may inflate without bound.
    """
    with path.open("rb") as opened:
        if opened.read(2) != b"PK":
            return False
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise MedPLIBError(f"{path} is a compressed archive, which torch never writes; fetch the weights again")
    return True


def _unreadable(path: Path) -> MedPLIBError:
    if not path.exists():
        return MedPLIBError(f"{path} does not exist; give the path of a file of weights")
    if not path.is_file():
        return MedPLIBError(f"{path} is no file but a folder, a pipe or a device; give the path of a file of weights")
    if not os.access(path, os.R_OK):
        return MedPLIBError(f"{path} may not be read; change its permissions")
    if path.stat().st_size < 1024 and b"git-lfs" in path.read_bytes():
        return MedPLIBError(f"{path} is a Git LFS pointer, not weights; fetch the file itself (git lfs pull)")
    return MedPLIBError(f"{path} cannot be read as weights (damaged, incomplete, or not tensors only); fetch it again")
