"""Open the checkpoint of a run: see that what was asked for fits it, before its weights are read."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.checkpoint.directories import checkpoint_name, regular_files, resolve
from model.checkpoint.opening import open_checkpoint
from model.errors import MedPLIBError
from model.eval.journal import read_journal
from model.eval.options import InferenceOptions
from model.inference.engine import Engine, EngineSettings
from model.inference.loading import load_for_inference
from model.inference.mask_gate import GATE_FILE
from model.modeling.configuration import MedPLIBConfig
from model.processing.conversation import get_template
from model.processing.processor import MedPLIBProcessor

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16  # of each weight file: reading all of 14 GB would take longer than loading it


def check_options(options: InferenceOptions) -> None:
    """Compare what was asked for with the checkpoint, whose weights are not read for it.

    Raises:
        MedPLIBError: the directory is no checkpoint, or something that was asked for does not fit it.
    """
    opened = open_checkpoint(options.model, vision_tower=options.vision_tower, sam=options.sam)
    for note in opened.notes:
        logger.info("%s", note)
    check_config(options, opened.config)
    if options.no_mask_below is not None and not (opened.directory / GATE_FILE).is_file():
        raise MedPLIBError(f"{options.model} has no {GATE_FILE}, so masks cannot be judged; leave --no_mask_below out")


def check_config(options: InferenceOptions, config: MedPLIBConfig) -> None:
    """Compare what was asked for with a network's sizes and parts.

    Raises:
        MedPLIBError: something does not fit.
    """
    if options.moe and not config.moe.enabled:
        raise MedPLIBError(f"{options.model} is a dense model without a mixture of experts; leave --moe_enable out")
    if options.router and not config.moe.enabled:
        raise MedPLIBError(f"{options.model} is a dense model without routers; leave --return_gating_logit out")
    if options.regions and not config.region.enabled:
        raise MedPLIBError(f"{options.model} has no region adapter; leave --region_fea_adapter out")
    sam_size = config.sam_config.vision_config.image_size
    if options.sam_size not in (None, sam_size):
        raise MedPLIBError(
            f"--sam_img_size is {options.sam_size}, but the SAM encoder of {options.model} takes {sam_size} pixels; "
            "give that or leave it out"
        )
    positions = config.text_config.max_position_embeddings
    if options.max_length is not None and options.max_length > positions:
        raise MedPLIBError(
            f"--model_max_length is {options.max_length}, but {options.model} knows {positions} positions; give no more"
        )
    if options.template is not None:
        get_template(options.template)


def open_engine(options: InferenceOptions, device: torch.device) -> Engine:
    """Load the checkpoint of a run.

    Raises:
        MedPLIBError: it is incomplete or does not fit.
    """
    model, processor, gate = load_for_inference(
        options.model,
        device=device,
        vision_tower=options.vision_tower,
        sam=options.sam,
        dtype=_DTYPES[options.precision] if options.precision else None,
    )
    settings = EngineSettings(slots=options.batch_size, max_length=options.max_length)
    return Engine(model, _with_options(processor, options), settings, gate)


def _with_options(processor: MedPLIBProcessor, options: InferenceOptions) -> MedPLIBProcessor:
    wanted: dict[str, Any] = {"template": options.template, "max_length": options.max_length}
    changes = {name: value for name, value in wanted.items() if value is not None}
    if not changes:
        return processor
    return MedPLIBProcessor(processor.tokenizer, replace(processor.settings, **changes), processor.sentencepiece_model)


def run_folder(kind: str, model: Path) -> Path:
    """``runs/KIND/NAME`` of a checkpoint; ``NAME-DIGEST`` where that holds answers of another one of the same name.

    Args:
        kind: of the run, ``eval`` or ``infer``.
        model: the checkpoint.
    """
    model = resolve(model)
    folder = Path("runs") / kind / checkpoint_name(model)
    digest = fingerprint(model) if model.is_dir() else ""
    for path in sorted(folder.rglob("*.run.json")):
        journal = read_journal(path.with_name(path.name.replace(".run.json", ".jsonl")))
        if journal is not None and dict(journal.settings.get("model", {})).get("digest") != digest:
            return folder.with_name(f"{folder.name}-{digest[:8]}")
    return folder


def fingerprint(path: Path) -> str:
    """Digest of a checkpoint directory or weight file: names and content of its files, of weights samples alone."""
    digest = hashlib.blake2b(digest_size=16)
    path = resolve(path)
    files = [path] if path.is_file() else regular_files(path, "*")[0]
    for file in files:
        if file.suffix in (*_WEIGHTS, ".json", ".model"):
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            _add_content(digest, file)
    return digest.hexdigest()


def _add_content(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if file.suffix not in _WEIGHTS or size <= _SAMPLES * _SAMPLE_BYTES:
            while block := stream.read(1 << 20):
                digest.update(block)
            return
        for sample in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
