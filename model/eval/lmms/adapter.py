"""MedPLIB as a model of lmms-eval, and nothing else: the harness's requests in, its results out."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from model.errors import MedPLIBError
from model.eval.lmms import require_lmms_eval
from model.eval.lmms.answering import answer_in_order, plain_question, read_visuals, tell_failures, text_with_masks
from model.eval.lmms.arguments import Generation, own_seed, read_generation, read_model_arguments
from model.eval.lmms.likelihood import Likelihood, score_continuations
from model.inference.engine import Engine, Request

try:
    from lmms_eval.api.model import lmms as _Base
except ImportError:  # the class can be looked at without the harness; making one says what is missing
    _Base = object

logger = logging.getLogger(__name__)


class MedPLIB(_Base):
    """MedPLIB under the name ``medplib``.

    The harness gives every process its share of the documents; each process loads the model for itself.

    Args:
        values: see ``arguments.ModelArguments``; the harness adds ``batch_size``, ``max_batch_size`` and ``device``.

    Raises:
        MedPLIBError: lmms-eval is not installed or too new, an argument is wrong, or the checkpoint does not load.
    """

    is_simple = True  # takes the harness's plain requests: text and images apart, no chat messages

    def __init__(self, **values: Any) -> None:
        require_lmms_eval()
        super().__init__()
        self.arguments = read_model_arguments(values)
        self.engine = Engine.from_pretrained(
            self.arguments.pretrained, self.arguments.engine, **dict(self.arguments.loading)
        )
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        self._told: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where the model runs; the harness makes the tensors there that its processes exchange."""
        return self.engine.model.device

    @property
    def batch_size(self) -> int:
        """Requests decoded together."""
        return self.engine.settings.slots

    @property
    def chat_template(self) -> str:
        """Asked for by ``--apply_chat_template``.

        Raises:
            MedPLIBError: always; MedPLIB's prompts are made from plain questions.
        """
        raise MedPLIBError("MedPLIB words its prompts itself; leave --apply_chat_template out")

    def clean(self) -> None:
        """Free the model once everything is answered."""
        self.engine.close()
        del self.engine
        super().clean()

    # --- answers ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests.

        Args:
            requests: instances with (context, generation settings, ``doc_to_visual``, document number, task, split).

        Returns:
            In their order, text with the number of its tokens; empty where a request could not be answered.

        Raises:
            MedPLIBError: none could, or a task asks for what MedPLIB cannot do.
        """
        from lmms_eval.api.instance import GenerationResult, TokenCounts

        real = [place for place, request in enumerate(requests) if not _is_padding(request)]
        generations = [self._generation(requests[place].args[1]) for place in real]
        names = [_name(requests[place].args[3:]) for place in real]
        asked_before: Counter[str] = Counter()
        makers: list[Callable[[], Request]] = []
        for place, generation, name in zip(real, generations, names, strict=True):
            makers.append(partial(self._request, requests[place].args, generation, f"{name} {asked_before[name]}"))
            asked_before[name] += 1
        outcomes = answer_in_order(self.engine, makers, shown=self._rank == 0)
        if outcomes:
            tell_failures(outcomes, names)
        results = [GenerationResult("") for _ in requests]
        for place, generation, outcome in zip(real, generations, outcomes, strict=True):
            if not isinstance(outcome, MedPLIBError):
                text = text_with_masks(outcome) if generation.masks else outcome.text
                results[place] = GenerationResult(text, TokenCounts(output_tokens=outcome.new_tokens))
        return results

    def _generation(self, values: Any) -> Generation:
        generation = read_generation(values or {}, self.arguments)
        for name in set(generation.ignored) - self._told:
            self._told.add(name)
            logger.warning("the generation setting %s means nothing to MedPLIB and is left aside", name)
        return generation

    def _request(self, arguments: tuple[Any, ...], generation: Generation, name: str) -> Request:
        context, _, doc_to_visual, *place = arguments
        visuals = read_visuals(doc_to_visual(self._document(place)))
        if visuals.image is None:
            raise MedPLIBError("the task shows no image; MedPLIB answers questions about one")
        settings = generation.settings
        return Request(
            visuals.image,
            plain_question(context),
            visuals.regions,
            settings=replace(settings, seed=own_seed(settings.seed or 0, name)),
            threshold=self.arguments.threshold,
            no_mask_below=self.arguments.no_mask_below,
        )

    def _document(self, place: Sequence[Any]) -> Any:
        number, task, split = place
        return self.task_dict[task][split][number]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Refused: the rounds of such tasks bring images of their own.

        Raises:
            MedPLIBError: always.
        """
        raise MedPLIBError("MedPLIB is asked one question about one image; choose tasks of the type generate_until")

    # --- likelihoods --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Score given answers.

        The harness (0.7) means two things by the number. Of a choice, which comes as text, it wants the loss and takes
        the choice with the smallest. Of a target, which comes as a function of the document, it wants the
        log-probability, whose mean makes the perplexity. Both are sums over the answer's tokens.

        It also turns whatever is not a ``GenerationResult`` into text, pairs of numbers included, so they come in one.

        Args:
            requests: instances with (context, answer or function that gives it, ``doc_to_visual``, document number,
                task, split), or (context, answer) alone.

        Returns:
            In their order the pair of this number and whether greedy decoding would begin with this answer.

        Raises:
            MedPLIBError: one of them cannot be scored; without a number, the harness would count the first choice.
        """
        from lmms_eval.api.instance import GenerationResult

        questions: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            if not _is_padding(request):
                questions[(request.args[0], *request.args[3:])].append(place)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for places in questions.values():
            for place, likelihood in zip(places, self._likelihoods([requests[p].args for p in places]), strict=True):
                is_choice = isinstance(requests[place].args[1], str)
                value = likelihood.log_probability
                found[place] = (-value if is_choice else value, likelihood.greedy)
        return [GenerationResult(pair) for pair in found]

    def _likelihoods(self, asked: Sequence[tuple[Any, ...]]) -> list[Likelihood]:
        """Likelihoods of answers to one question."""
        context, _, *rest = asked[0]
        document = self._document(rest[1:]) if rest else None
        answers = [answer if isinstance(answer, str) else str(answer(document)) for _, answer, *_ in asked]
        visuals = read_visuals(rest[0](document) if rest else None)
        try:
            return score_continuations(self.engine, visuals, plain_question(context), answers)
        except MedPLIBError as error:
            raise MedPLIBError(f"{_name(rest[1:])} cannot be scored: {error}") from error


def _is_padding(request: Any) -> bool:
    """Whether a request only evens out the numbers of processes; its result is not looked at."""
    return bool((request.metadata or {}).get("__padding_only__"))


def _name(place: Sequence[Any]) -> str:
    """A request's name: task, split and document number; empty for a text alone."""
    return "" if not place else "{1} {2} {0}".format(*place)
