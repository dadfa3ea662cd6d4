"""Resolve a checkpoint: a directory, a run folder or the local Hugging Face cache; read its config.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from model import shipped
from model.errors import MedPLIBError, shown

ADAPTER_CONFIG = "adapter_config.json"
MERGED = "merged"
"""Folder of a run that holds its exported network."""
SHIPPED_MODEL = shipped("assets/medplib-mini")
"""What is asked, served and fine-tuned where no other checkpoint is named."""
_HUB_ID = re.compile(r"([\w.-]+)/([\w.-]+)(?:@([\w./-]+))?")
_SNAPSHOTS, _REPOSITORY = "snapshots", "models--"
# How a network is run is the caller's choice, never that of a file (an attention kernel may come from the network).
_CHOICES_OF_THE_CALLER = {
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal", "per_layer_config"),
    *("auto_map", "trust_remote_code", "quantization_config", "gradient_checkpointing", "torchscript"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "chunk_size_feed_forward"),
}


def default_model() -> Path:
    """The checkpoint that ``MEDPLIB_MODEL`` names, else the one that ships with the project.

    Raises:
        MedPLIBError: it is not there, as after installing without the project's folder.
    """
    directory = resolve(os.environ.get("MEDPLIB_MODEL") or SHIPPED_MODEL)
    if not (directory / "config.json").is_file():
        raise MedPLIBError(f"no checkpoint at {directory}; name one with --model DIR or set MEDPLIB_MODEL")
    return directory


def resolve(path: str | Path) -> Path:
    """The directory or file that a path means; one that is found nowhere comes back as it is.

    Args:
        path: a directory or file; a run folder, which means the ``merged`` inside it; or, where nothing lies at the
            path, a Hugging Face name ``org/name`` or ``org/name@revision``, which means its snapshot in the local
            cache (``HF_HUB_CACHE``, ``TRANSFORMERS_CACHE``, ``HF_HOME``). Nothing is downloaded.
    """
    path = Path(path)
    try:
        if (path / "config.json").is_file():
            return path
        if (path / MERGED / "config.json").is_file():
            return path / MERGED
        if (path / _SNAPSHOTS).is_dir():
            return _snapshot(path, None) or path
        if path.exists() or (named := _HUB_ID.fullmatch(str(path))) is None:
            return path
        folders = (cache / f"{_REPOSITORY}{named[1]}--{named[2]}" for cache in _caches())
        return next((found for folder in folders if (found := _snapshot(folder, named[3])) is not None), path)
    except (OSError, ValueError):  # a folder that may not be entered, a name no file can have
        return path


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds a LoRA rather than a whole network."""
    return (Path(directory) / ADAPTER_CONFIG).is_file()


def base_of(directory: str | Path, base: str | Path | None = None) -> Path:
    """The whole network of a directory: its own, or for a LoRA ``base``, or else what its configuration names.

    Raises:
        MedPLIBError: there is a base too many, or the LoRA's is not here.
    """
    if not is_adapter(directory):
        if base is not None:
            raise MedPLIBError(f"{directory} is no LoRA ({ADAPTER_CONFIG} is missing); leave its base out")
        return resolve(directory)
    named: Any = base
    if base is None:
        try:
            named = json.loads((Path(directory) / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError) as error:
            raise MedPLIBError(f"{Path(directory) / ADAPTER_CONFIG} cannot be read; copy it again") from error
    if not named or not resolve(str(named)).is_dir():
        where = f"of {shown(str(named))}, which is not here" if named else "of a checkpoint that it does not name"
        raise MedPLIBError(f"{directory} is a LoRA {where}; name that with --base DIR (--model-base when serving)")
    return resolve(str(named))


def checkpoint_name(path: str | Path) -> str:
    """What a checkpoint is called where nobody names it: its run, its Hugging Face name without the organization, or
    its directory; ``checkpoint-7`` and ``step_7`` come with the run they are of.
    """
    whole = resolve(path).resolve()
    if whole.name == MERGED:
        return whole.parent.name
    if whole.parent.name == _SNAPSHOTS:
        return whole.parent.parent.name.rpartition("--")[2]
    if whole.name.startswith("checkpoint"):
        return f"{whole.parent.name}_{whole.name}"
    return f"{whole.parents[1].name}_{whole.name}" if whole.parent.name == "checkpoints" else whole.name


def regular_files(directory: Path, pattern: str) -> tuple[list[Path], list[str]]:
    """Files of a pattern in the order of their names; and the names of what is none, which is never opened: folders,
    pipes, devices, links to nothing. Hidden files (``._*`` of a Mac, downloads under way) count as neither.
    """
    named = [path for path in sorted(directory.glob(pattern)) if not path.name.startswith(".")]
    return [path for path in named if path.is_file()], [path.name for path in named if not path.is_file()]


def read_settings(directory: Path) -> dict[str, Any]:
    """config.json of a directory, in UTF-8 or with a byte order mark; without nulls, which mean the default, and
    without settings that are the caller's (attention, experts, code to load).

    Raises:
        MedPLIBError: there is no such directory or file, or it is no JSON mapping of finite numbers.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        known = " and in no local Hugging Face cache" if _HUB_ID.fullmatch(str(directory)) else ""
        raise MedPLIBError(f"{directory} is no directory{known}; give the directory of a checkpoint")
    if not path.is_file():
        raise MedPLIBError(f"{directory} holds no config.json; {_instead_of(directory)}")
    try:
        settings = _without_choices(json.loads(path.read_bytes(), parse_constant=_refuse_constant))
    except (ValueError, RecursionError) as error:
        raise MedPLIBError(f"{path} is not JSON ({error}); fetch it again") from error
    except OSError as error:
        raise MedPLIBError(f"{path} cannot be read ({error.strerror}); change its permissions") from error
    if not isinstance(settings, dict):
        raise MedPLIBError(f"{path} holds a {type(settings).__name__}; expected a mapping")
    return settings


def _snapshot(repository: Path, revision: str | None) -> Path | None:
    """A snapshot of a cached repository: by branch, tag or commit; ``main`` where None, or the only one there is."""
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    held = sorted(path for path in (repository / _SNAPSHOTS).glob("*") if path.is_dir())
    if commit is None:
        return held[0] if len(held) == 1 else None
    return next((path for path in held if path.name.startswith(commit)), None)


def _caches() -> Iterator[Path]:
    """Where Hugging Face libraries keep repositories, as their environment variables say."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        if value := os.environ.get(variable):
            yield Path(value).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    yield Path(home).expanduser() / "hub"


def _instead_of(directory: Path) -> str:
    """What to give instead of a directory that is no checkpoint, or none that can be loaded."""
    if (directory / "trainable.safetensors").is_file():
        return f"it is what a run saved on the way, so make a model of it first: medplib export {directory} DIR"
    if (directory / "recipe.yaml").is_file() or (directory / "checkpoints").is_dir():
        saved = [path.name for path in (directory / "checkpoints").glob("step_*") if path.suffix != ".partial"]
        if not saved:
            return "it is a run that has saved no weights yet; let it train on (medplib train RECIPE --resume)"
        return (
            f"it is a run that is not finished, its last checkpoint {max(saved)}; let it train on (--resume), or make "
            f"a model of that: medplib export {directory} DIR"
        )
    return "give the directory of a checkpoint"


def _without_choices(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        name: _without_choices(inner)
        for name, inner in value.items()
        if inner is not None and name not in _CHOICES_OF_THE_CALLER
    }


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
