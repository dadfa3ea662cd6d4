"""Run questions of a data file through the engine of one checkpoint, in their order."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch

from model.checkpoint.directories import checkpoint_name, regular_files, resolve
from model.checkpoint.pretrained import open_checkpoint
from model.errors import MedPLIBError
from model.eval.options import InferenceOptions
from model.eval.predictions import Prediction
from model.eval.processes import read_journal
from model.eval.questions import Question, answer_id, reference_masks
from model.inference.answer import Answer
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.inference.images import PreparedImage
from model.inference.loading import load_for_inference
from model.inference.presence import PRESENCE_FILE
from model.modeling.configuration import MedPLIBConfig
from model.processing.conversation import get_template
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import REGION_MARKER

Item = TypeVar("Item")
Result = TypeVar("Result")

_BLIND_MARKER = "<region> </region>"  # its tags are read, and nothing stands between them


@dataclass(frozen=True)
class Prepared:
    """A question whose files are read."""

    question: Question  # what is asked
    request: Request | None = None  # the same for the engine; None where it cannot be asked
    gt_masks: list[dict[str, Any]] | None = None  # run lengths of the reference masks, see ``Prediction``
    error: str | None = None  # why it cannot be asked

    @property
    def image(self) -> PreparedImage | None:
        """The image it is asked about."""
        return self.request.image if self.request is not None else None


class Asker:
    """Asks an engine questions of a data file; the rows carry the checkpoint's name as ``model_id``."""

    def __init__(self, engine: Engine, options: InferenceOptions, model_id: str) -> None:
        self.engine, self.options, self.model_id = engine, options, model_id

    def answer(self, questions: Iterable[Question], settle: Callable[[Prepared, Prediction], None]) -> None:
        """Ask all of them; ``settle`` gets each with its prediction, in the order of the questions."""
        asked: dict[int, tuple[int, Prepared]] = {}  # by place in the engine's stream
        waiting: dict[int, tuple[Prepared, Prediction]] = {}  # settled ahead of their turn
        handed, turn = count(), 0

        def put(place: int, item: Prepared, prediction: Prediction) -> None:
            nonlocal turn
            waiting[place] = (item, prediction)
            while turn in waiting:
                settle(*waiting.pop(turn))
                turn += 1

        def requests() -> Iterator[Request]:
            prepared = ahead(questions, self.prepare, self.options.workers, 2 * self.options.batch_size)
            for place, item in enumerate(prepared):
                if item.request is None:
                    put(place, item, self._failed(item, item.error or "it cannot be asked"))
                else:
                    asked[next(handed)] = (place, item)
                    yield item.request

        for index, outcome in self.engine.answer_all(requests()):
            place, item = asked.pop(index)
            if isinstance(outcome, MedPLIBError):
                put(place, item, self._failed(item, str(outcome)))
            else:
                put(place, item, self._answered(item, outcome))

    def prepare(self, question: Question) -> Prepared:
        """Read a question's image and reference masks."""
        if question.error is not None or question.image is None:
            return Prepared(question, error=question.error or "the record has no image")
        try:
            image = self.engine.prepare(question.image)
            masks = reference_masks(question, image.size)
            return Prepared(question, self._request(question, image), masks)
        except MedPLIBError as error:
            return Prepared(question, error=str(error))

    def _request(self, question: Question, image: PreparedImage) -> Request:
        options, text, history = self.options, question.reference.prompt, question.history
        if self.options.regions is False:
            text = text.replace(REGION_MARKER, _BLIND_MARKER)
            history = tuple((asked.replace(REGION_MARKER, _BLIND_MARKER), answer) for asked, answer in history)
        return Request(
            image,
            text,
            regions=list(question.regions) if options.regions is not False else [],
            history=history,
            settings=GenerationSettings(
                options.max_new_tokens, options.temperature, options.top_p, seed=_own_seed(options.seed, question)
            ),
            threshold=options.thresholds[0] if options.thresholds else None,
            thresholds=options.thresholds,
            no_mask_below=options.no_mask_below,
            router_stats=options.router,
            always_mask=options.always_mask and question.masks is not None,
        )

    def _row(self, item: Prepared) -> Prediction:
        question, reference = item.question, item.question.reference
        return Prediction(
            question_id=reference.question_id,
            image_path=question.image_path,
            prompt=reference.prompt,
            gt=reference.gt,
            text="",
            answer_id=answer_id(self.model_id, reference),
            model_id=self.model_id,
            answer_type=question.answer_type,
            metadata=dict(question.metadata),
            gt_masks=item.gt_masks,
            spacing_mm=(item.image.data.spacing_mm if item.image is not None else None) or question.spacing_mm,
        )

    def _failed(self, item: Prepared, reason: str) -> Prediction:
        return replace(self._row(item), finish="error", error=" ".join(reason.split()))

    def _answered(self, item: Prepared, answer: Answer) -> Prediction:
        seconds = {name: round(value, 4) for name, value in answer.timing.items()}
        return replace(
            self._row(item),
            text=answer.text,
            masks=[mask.to_dict() for mask in answer.masks],
            finish=answer.finish,
            timing={**seconds, "new_tokens": answer.new_tokens},
            masks_at=answer.masks_at if self.options.thresholds else None,
            router=answer.router_stats and [[round(share, 4) for share in layer] for layer in answer.router_stats],
        )


def ahead(items: Iterable[Item], work: Callable[[Item], Result], workers: int, most: int) -> Iterator[Result]:
    """Results of ``work`` in order, made by threads up to ``most`` items ahead; one by one without workers."""
    if workers == 0:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="medplib-read") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _own_seed(seed: int, question: Question) -> int:
    """A question's own seed: it draws the same whatever else is asked, and not the same as its neighbours."""
    name = f"{seed}\0{question.number}\0{question.reference.turn}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


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
    if options.no_mask_below and not (opened.directory / PRESENCE_FILE).is_file():
        raise MedPLIBError(
            f"{options.model} has no {PRESENCE_FILE}, so masks cannot be judged; leave --no_mask_below out"
        )


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
    wanted: dict[str, Any] = {"template": options.template, "max_length": options.max_length}
    if changes := {name: value for name, value in wanted.items() if value is not None}:
        settings = replace(processor.settings, **changes)
        processor = MedPLIBProcessor(processor.tokenizer, settings, processor.sentencepiece_model)
    return Engine(model, processor, EngineSettings(slots=options.batch_size, max_length=options.max_length), gate)


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
