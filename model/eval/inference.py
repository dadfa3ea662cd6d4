"""Answer the questions of a data file with the engine of one checkpoint, in their order."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch

from model.checkpoint.pretrained import open_checkpoint
from model.errors import MedPLIBError
from model.eval.options import InferenceOptions
from model.eval.predictions import Prediction
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

logger = logging.getLogger(__name__)

_BLIND_MARKER = "<region> </region>"  # its tags are read, and nothing stands between them
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    """Compare what was asked for with a network's sizes and parts; a MedPLIBError says what does not fit."""
    for wanted, has, flag, lack in (
        (options.moe, config.moe.enabled, "moe_enable", "is a dense model without a mixture of experts"),
        (options.router, config.moe.enabled, "return_gating_logit", "is a dense model without routers"),
        (options.regions, config.region.enabled, "region_fea_adapter", "has no region adapter"),
    ):
        if wanted and not has:
            raise MedPLIBError(f"{options.model} {lack}; leave --{flag} out")
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
    """Load the checkpoint of a run; a MedPLIBError says that it is incomplete or does not fit."""
    model, processor, presence = load_for_inference(
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
    return Engine(model, processor, EngineSettings(slots=options.batch_size, max_length=options.max_length), presence)


@dataclass(frozen=True)
class Prepared:
    """A question whose files are read."""

    question: Question
    request: Request | None = None  # the same for the engine; None where it cannot be asked
    gt_masks: list[dict[str, Any]] | None = None  # run lengths of the reference masks, see ``Prediction``
    error: str | None = None  # why it cannot be asked

    @property
    def image(self) -> PreparedImage | None:
        """The image it is about."""
        return self.request.image if self.request is not None else None


def answer_questions(
    engine: Engine,
    options: InferenceOptions,
    model_id: str,
    questions: Iterable[Question],
    report: Callable[[Prepared, Prediction], None],
) -> None:
    """Answer all questions; ``report`` gets each with its prediction, in their order."""
    asked: dict[int, tuple[int, Prepared]] = {}  # by place in the engine's stream
    waiting: dict[int, tuple[Prepared, Prediction]] = {}  # finished ahead of their turn
    handed, turn = count(), 0

    def put(place: int, item: Prepared, outcome: Answer | MedPLIBError | str) -> None:
        nonlocal turn
        waiting[place] = (item, _prediction(item, outcome, options, model_id))
        while turn in waiting:
            report(*waiting.pop(turn))
            turn += 1

    def requests() -> Iterator[Request]:
        def prepare(question: Question) -> Prepared:
            return _prepare(engine, options, question)

        for place, item in enumerate(_read_ahead(questions, prepare, options.workers, 2 * options.batch_size)):
            if item.request is None:
                put(place, item, item.error or "it cannot be asked")
            else:
                asked[next(handed)] = (place, item)
                yield item.request

    for index, outcome in engine.answer_all(requests()):
        put(*asked.pop(index), outcome)


def _prepare(engine: Engine, options: InferenceOptions, question: Question) -> Prepared:
    """Read a question's image and reference masks."""
    if question.error is not None or question.image is None:
        return Prepared(question, error=question.error or "the record has no image")
    text, history = question.reference.prompt, question.history
    if options.regions is False:
        text = text.replace(REGION_MARKER, _BLIND_MARKER)
        history = tuple((asked.replace(REGION_MARKER, _BLIND_MARKER), answer) for asked, answer in history)
    # a question draws the same whatever else is asked, and not the same as its neighbours
    name = f"{options.seed}\0{question.number}\0{question.reference.turn}".encode()
    seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
    try:
        image = engine.prepare(question.image)
        masks = reference_masks(question, image.size)
        request = Request(
            image,
            text,
            regions=list(question.regions) if options.regions is not False else [],
            history=history,
            settings=GenerationSettings(options.max_new_tokens, options.temperature, options.top_p, seed=seed),
            threshold=options.thresholds[0] if options.thresholds else None,
            thresholds=options.thresholds,
            no_mask_below=options.no_mask_below,
            router_stats=options.router,
            always_mask=options.always_mask and question.masks is not None,
        )
        return Prepared(question, request, masks)
    except MedPLIBError as error:
        return Prepared(question, error=str(error))


def _prediction(
    item: Prepared, outcome: Answer | MedPLIBError | str, options: InferenceOptions, model_id: str
) -> Prediction:
    question, reference = item.question, item.question.reference
    row = Prediction(
        question_id=reference.question_id,
        image_path=question.image_path,
        prompt=reference.prompt,
        gt=reference.gt,
        text="",
        answer_id=answer_id(model_id, reference),
        model_id=model_id,
        answer_type=question.answer_type,
        metadata=dict(question.metadata),
        gt_masks=item.gt_masks,
        spacing_mm=(item.image.data.spacing_mm if item.image is not None else None) or question.spacing_mm,
    )
    if not isinstance(outcome, Answer):
        return replace(row, finish="error", error=" ".join(str(outcome).split()))
    seconds = {name: round(value, 4) for name, value in outcome.timing.items()}
    return replace(
        row,
        text=outcome.text,
        masks=[mask.to_dict() for mask in outcome.masks],
        finish=outcome.finish,
        timing={**seconds, "new_tokens": outcome.new_tokens},
        masks_at=outcome.masks_at if options.thresholds else None,
        router=outcome.router_stats and [[round(share, 4) for share in layer] for layer in outcome.router_stats],
    )


def _read_ahead(
    items: Iterable[Question], work: Callable[[Question], Prepared], workers: int, most: int
) -> Iterator[Prepared]:
    """Results of ``work`` in order, made by threads up to ``most`` items ahead; one by one without workers."""
    if workers == 0:
        yield from map(work, items)
        return
    waiting: deque[Future[Prepared]] = deque()
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
