"""Questions go through the engine and come back as predictions, in their own order, as a stream."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeVar

from model.errors import MedPLIBError
from model.eval.options import InferenceOptions
from model.eval.predictions import Prediction
from model.eval.questions import Question, answer_id, reference_masks
from model.inference.answer import Answer
from model.inference.engine import Engine, Request
from model.inference.generation import GenerationSettings
from model.inference.images import PreparedImage
from model.processing.special_tokens import REGION_MARKER

Item = TypeVar("Item")
Result = TypeVar("Result")

_BLIND_MARKER = "<region> </region>"  # its tags are read, and nothing stands between them


@dataclass(frozen=True)
class Prepared:
    """A question whose files are read.

    Attributes:
        question: what is asked.
        request: the same for the engine; None where it cannot be asked.
        gt_masks: run lengths of the reference masks, see ``Prediction``.
        error: why it cannot be asked.
    """

    question: Question
    request: Request | None = None
    gt_masks: list[dict[str, Any]] | None = None
    error: str | None = None

    @property
    def image(self) -> PreparedImage | None:
        """The image it is asked about."""
        return self.request.image if self.request is not None else None


class Asker:
    """Asks an engine questions of a data file.

    Args:
        engine: answers.
        options: how they are asked.
        model_id: name of the checkpoint, for the rows.
    """

    def __init__(self, engine: Engine, options: InferenceOptions, model_id: str) -> None:
        self.engine, self.options, self.model_id = engine, options, model_id

    def answer(self, questions: Iterable[Question], settle: Callable[[Prepared, Prediction], None]) -> None:
        """Ask all of them; ``settle`` gets each with its prediction, in the order of the questions."""
        ordered = _InOrder(settle)
        asked: dict[int, tuple[int, Prepared]] = {}  # by place in the engine's stream
        handed = count()

        def requests() -> Iterator[Request]:
            prepared = ahead(questions, self.prepare, self.options.workers, 2 * self.options.batch_size)
            for place, item in enumerate(prepared):
                if item.request is None:
                    ordered.put(place, item, self._failed(item, item.error or "it cannot be asked"))
                else:
                    asked[next(handed)] = (place, item)
                    yield item.request

        for index, outcome in self.engine.answer_all(requests()):
            place, item = asked.pop(index)
            if isinstance(outcome, MedPLIBError):
                ordered.put(place, item, self._failed(item, str(outcome)))
            else:
                ordered.put(place, item, self._answered(item, outcome))

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
            spacing_mm=item.image.data.spacing_mm if item.image is not None else None,
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
            router=_rounded(answer.router_stats),
        )


class _InOrder:
    """Gives settled questions on in their order; what is ahead of its turn waits here."""

    def __init__(self, settle: Callable[[Prepared, Prediction], None]) -> None:
        self._settle, self._next = settle, 0
        self._waiting: dict[int, tuple[Prepared, Prediction]] = {}

    def put(self, place: int, item: Prepared, prediction: Prediction) -> None:
        """Settle the question at a place."""
        self._waiting[place] = (item, prediction)
        while self._next in self._waiting:
            self._settle(*self._waiting.pop(self._next))
            self._next += 1


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


def _rounded(shares: list[list[float]] | None) -> list[list[float]] | None:
    return None if shares is None else [[round(share, 4) for share in layer] for layer in shares]
