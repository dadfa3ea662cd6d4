"""MedPLIB as a model of lmms-eval: the harness's arguments and requests in, answers and likelihoods out."""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from model.errors import MedPLIBError
from model.eval.lmms import require_lmms_eval
from model.eval.lmms.phantoms import PointedRegion, text_with_masks
from model.inference.answer import Answer
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.inference.images import ImageSource
from model.inference.regions import Region, place_region, region_to_mask
from model.modeling.configuration import IGNORE_INDEX
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn
from model.processing.encoding import tokenize_conversation
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import IMAGE_TOKEN

try:
    from lmms_eval.api.model import lmms as _Base
except ImportError:  # the class can be looked at without the harness; making one says what is missing
    _Base = object

logger = logging.getLogger(__name__)


class MedPLIB(_Base):
    """MedPLIB under the name ``medplib``.

    The harness gives every process its share of the documents; each process loads the model for itself.

    Args:
        values: see ``ModelArguments``; the harness adds ``batch_size``, ``max_batch_size`` and ``device``.

    Raises:
        MedPLIBError: lmms-eval is not installed or too new, an argument is wrong, or the checkpoint does not load.
    """

    is_simple = True  # takes the harness's plain requests: text and images apart, no chat messages

    def __init__(self, **values: Any) -> None:
        require_lmms_eval()
        super().__init__()
        self.arguments = given = read_model_arguments(values)
        self.engine = Engine.from_pretrained(given.pretrained, given.engine, **dict(given.loading))
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        self._warned: set[str] = set()

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
        """Asked for by ``--apply_chat_template``; always a MedPLIBError, for prompts are made from plain questions."""
        raise MedPLIBError("MedPLIB words its prompts itself; leave --apply_chat_template out")

    def clean(self) -> None:
        """Free the model once everything is answered."""
        self.engine.close()
        del self.engine
        super().clean()

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
        warn_of_failures(outcomes, names)
        results = [GenerationResult("") for _ in requests]
        for place, generation, outcome in zip(real, generations, outcomes, strict=True):
            if not isinstance(outcome, MedPLIBError):
                text = text_with_masks(outcome) if generation.masks else outcome.text
                results[place] = GenerationResult(text, TokenCounts(output_tokens=outcome.new_tokens))
        return results

    def _generation(self, values: Any) -> Generation:
        generation = read_generation(values or {}, self.arguments)
        for name in set(generation.ignored) - self._warned:
            self._warned.add(name)
            logger.warning("the generation setting %s means nothing to MedPLIB and is left aside", name)
        return generation

    def _request(self, arguments: tuple[Any, ...], generation: Generation, name: str) -> Request:
        context, _, doc_to_visual, *place = arguments
        visuals = read_visuals(doc_to_visual(self._document(place)))
        if visuals.image is None:
            raise MedPLIBError("the task shows no image; MedPLIB answers questions about one")
        settings = replace(generation.settings, seed=own_seed(generation.settings.seed or 0, name))
        given = self.arguments
        return Request(
            visuals.image,
            plain_question(context),
            visuals.regions,
            settings=settings,
            threshold=given.threshold,
            no_mask_below=given.no_mask_below,
        )

    def _document(self, place: Sequence[Any]) -> Any:
        number, task, split = place
        return self.task_dict[task][split][number]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Refused by a MedPLIBError: the rounds of such tasks bring images of their own."""
        raise MedPLIBError("MedPLIB is asked one question about one image; choose tasks of the type generate_until")

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
                sign = -1 if isinstance(requests[place].args[1], str) else 1
                found[place] = (sign * likelihood.log_probability, likelihood.greedy)
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


# --- arguments: nothing is dropped in silence -------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelArguments:
    """The model's part of a harness run (``--model_args``).

    Attributes:
        pretrained: checkpoint directory.
        loading: keywords of ``Engine.from_pretrained``: device, dtype, vision_tower, sam, attention, quantisation.
        engine: bounds of the engine.
        max_new_tokens: hard end of an answer where the task names none.
        threshold: probability above which a pixel is in a mask; the checkpoint's own where None.
        no_mask_below: probability of presence below which a mask is left empty; needs a presence classifier.
        seed: of sampling, where a task asks for it.
    """

    pretrained: str
    loading: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineSettings = field(default_factory=EngineSettings)
    max_new_tokens: int = 256
    threshold: float | None = None
    no_mask_below: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Generation:
    """How one request is answered: ``settings`` with the run's seed; ``masks``: whether the answer's masks follow its
    text, see ``phantoms.text_with_masks``; ``ignored``: settings of the task that mean nothing here."""

    settings: GenerationSettings
    masks: bool = False
    ignored: tuple[str, ...] = ()


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, bool) or not abs(number) < float("inf"):
        raise MedPLIBError(f"{name} is {value!r:.40}; give a number")
    return number


def _whole(value: Any, name: str) -> int:
    number = _number(value, name)
    if number != int(number):
        raise MedPLIBError(f"{name} is {value!r:.40}; give a whole number")
    return int(number)


_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
_LOADING = ("device", "vision_tower", "sam", "attention", "quantisation")
_NUMBERS = {"max_new_tokens": _whole, "threshold": _number, "no_mask_below": _number, "seed": _whole}
_ARGUMENTS = ("pretrained", *_LOADING, "dtype", "slots", "max_length", "batch_size", "max_batch_size", *_NUMBERS)
_SLOTS = 8


def read_model_arguments(values: Mapping[str, Any]) -> ModelArguments:
    """Check what the harness passes to the model.

    Args:
        values: ``--model_args`` with ``batch_size``, ``max_batch_size`` and ``device`` of the command line.

    Raises:
        MedPLIBError: an argument is unknown, missing, or cannot apply.
    """
    given = {name: value for name, value in values.items() if value is not None}
    unknown = [name for name in given if name not in _ARGUMENTS]
    if unknown:
        raise MedPLIBError(f"the model has no argument {', '.join(unknown)}; known: {', '.join(_ARGUMENTS)}")
    if not given.get("pretrained"):
        raise MedPLIBError("no checkpoint is named; give --model_args pretrained=DIR")
    loading: dict[str, Any] = {name: str(given[name]) for name in _LOADING if name in given}
    loading["device"] = own_device(loading.get("device"))
    if "dtype" in given:
        if str(given["dtype"]) not in _DTYPES:
            raise MedPLIBError(f"dtype is {given['dtype']!r:.80}; give fp32 or bf16")
        loading["dtype"] = _DTYPES[str(given["dtype"])]
    longest = _whole(given["max_length"], "max_length") if "max_length" in given else None
    numbers: dict[str, Any] = {name: read(given[name], name) for name, read in _NUMBERS.items() if name in given}
    engine = EngineSettings(slots=_slots(given), max_length=longest)
    return ModelArguments(str(given["pretrained"]), loading, engine, **numbers)


def own_device(name: str | None) -> str:
    """The device of this process: with several processes on one machine, each has the GPU of its place.

    Args:
        name: as given; CUDA where there is one, else the CPU, when absent.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    place = os.environ.get("LOCAL_RANK")
    return f"cuda:{place}" if name == "cuda" and place is not None else name


def _slots(given: Mapping[str, Any]) -> int:
    """Requests decoded together: ``slots``, or ``--batch_size`` where that was set (the harness always sends 1)."""
    batch = given.get("batch_size", 1)
    automatic = isinstance(batch, str) and batch.startswith("auto")
    size = 1 if automatic else _whole(batch, "batch_size")
    if "max_batch_size" in given and not automatic:
        raise MedPLIBError("max_batch_size bounds an automatic batch size; give --batch_size auto with it, or leave it")
    if "slots" in given:
        slots = _whole(given["slots"], "slots")
        if size not in (1, slots):
            raise MedPLIBError(f"slots is {slots} and batch_size {size}, which mean the same; give one of them")
        return slots
    bound = _whole(given.get("max_batch_size", _SLOTS), "max_batch_size")
    return bound if automatic else _SLOTS if size == 1 else size


_ONE_WAY = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}
"""Settings that would change the answer and that the engine has one value for."""
_READ = ("until", "max_new_tokens", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed", "masks")


def read_generation(values: Mapping[str, Any], arguments: ModelArguments) -> Generation:
    """Check a task's ``generation_kwargs``.

    ``do_sample: false`` means greedy whatever the temperature is, ``do_sample: true`` alone a temperature of 1, and
    a temperature alone says both.

    Args:
        values: of the task, with what ``--gen_kwargs`` changed in it.
        arguments: of the model, for what the task does not say.

    Raises:
        MedPLIBError: a value is malformed, or asks for what the engine cannot do.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for name, only in _ONE_WAY.items():
        if given.get(name, only) != only:
            raise MedPLIBError(f"{name} is {given[name]}, MedPLIB answers with {only}; give --gen_kwargs {name}={only}")
    if given.get("masks", "rle") != "rle":
        raise MedPLIBError(f"masks is {given['masks']!r:.80}; the masks of an answer are written as rle")
    until = given.get("until", ())
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, list | tuple) or not all(isinstance(text, str) for text in stops):
        raise MedPLIBError(f"until is {until!r:.60}; give a text or a list of texts")
    longest = given.get("max_new_tokens", given.get("max_gen_toks", arguments.max_new_tokens))
    drawn = given.get("do_sample")
    temperature = _number(given.get("temperature", 1.0 if drawn else 0.0), "temperature") if drawn is not False else 0.0
    sampling = given if temperature else {}  # a greedy answer is not sampled
    settings = GenerationSettings(
        max_new_tokens=_whole(longest, "max_new_tokens"),
        temperature=temperature,
        top_p=_number(sampling.get("top_p", 1.0), "top_p"),
        top_k=_whole(sampling.get("top_k", 0), "top_k"),
        seed=_whole(given.get("seed", arguments.seed), "seed"),
        stop=tuple(text for text in stops if text),
    )
    ignored = tuple(name for name in given if name not in _READ and name not in _ONE_WAY)
    return Generation(settings, "masks" in given, ignored)


def own_seed(seed: int, request: str) -> int:
    """The seed of one request, so that equal questions asked several times are drawn independently, yet repeatably."""
    return crc32(f"{seed} {request}".encode())


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visuals:
    """What a question is about: its image, None for a text alone, and the regions it points at."""

    image: ImageSource | None
    regions: tuple[Region, ...] = ()


def read_visuals(found: Any) -> Visuals:
    """Sort what a task's ``doc_to_visual`` gave: None or a list of images (PIL, paths, arrays) and ``PointedRegion``.

    Raises:
        MedPLIBError: there are several images, or something that is none.
    """
    items = [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
    regions = tuple(item.region for item in items if isinstance(item, PointedRegion))
    images = [item for item in items if not isinstance(item, PointedRegion)]
    for image in images:
        if not isinstance(image, str | bytes | Image.Image | np.ndarray):
            raise MedPLIBError(f"the task shows {type(image).__name__}; MedPLIB reads images alone")
    if len(images) > 1:
        raise MedPLIBError(f"the task shows {len(images)} images at once; MedPLIB is asked about one")
    return Visuals(images[0] if images else None, regions)


def plain_question(context: str) -> str:
    """The harness's context without image markers; the prompt puts the image in its place."""
    return context.replace(IMAGE_TOKEN, "").strip()


def answer_in_order(
    engine: Engine, makers: Sequence[Callable[[], Request]], *, shown: bool = False
) -> list[Answer | MedPLIBError]:
    """Answer requests, each made when the engine has room for it, so that their images are not all held at once.

    Args:
        engine: keeps its slots full.
        makers: make one request each.
        shown: draw a progress bar.

    Returns:
        Per maker its answer, or what was wrong with its request.
    """
    outcomes: dict[int, Answer | MedPLIBError] = {}
    places: list[int] = []
    with tqdm(total=len(makers), unit="answer", desc="MedPLIB", disable=None if shown else True) as bar:

        def stream() -> Iterator[Request]:
            for place, make in enumerate(makers):
                try:
                    request = make()
                except (MedPLIBError, OSError) as error:
                    unread = MedPLIBError(f"the image cannot be read: {error}")
                    outcomes[place] = error if isinstance(error, MedPLIBError) else unread
                    bar.update()
                    continue
                places.append(place)
                yield request

        for number, outcome in engine.answer_all(stream()):
            outcomes[places[number]] = outcome
            bar.update()
    return [outcomes[place] for place in sorted(outcomes)]


def warn_of_failures(outcomes: Sequence[Answer | MedPLIBError], names: Sequence[str]) -> None:
    """Warn of requests without an answer, which the harness counts as wrong: the first five one by one.

    Raises:
        MedPLIBError: there are requests and not one was answered, so that the task is not for this model.
    """
    failed = [pair for pair in zip(names, outcomes, strict=True) if isinstance(pair[1], MedPLIBError)]
    if failed and len(failed) == len(outcomes):
        raise MedPLIBError(f"none of the {len(failed)} questions could be answered; the first: {failed[0][1]}")
    for name, error in failed[:5]:
        logger.warning("%s has no answer and counts as wrong: %s", name, error)
    if failed:
        logger.warning("%d of %d questions have no answer and count as wrong", len(failed), len(outcomes))


# --- likelihoods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation: its natural logarithm summed over its tokens, ≤ 0, the end token not counted; whether greedy
    decoding would begin the answer with it; the number of its tokens."""

    log_probability: float
    greedy: bool
    tokens: int


@torch.inference_mode()
def score_continuations(
    engine: Engine, visuals: Visuals, context: str, continuations: Sequence[str]
) -> list[Likelihood]:
    """Score continuations of one question; its image and prompt are read once for all of them.

    Args:
        engine: whose network, processor and image cache are used.
        visuals: image and regions of the question; no image for a text alone.
        context: the question.
        continuations: answers to it; the space that stands before an answer in the prompt is not part of them.

    Raises:
        MedPLIBError: image or regions are malformed, or prompt and answer are too long.
    """
    model = engine.model
    turn, inputs = _question(engine, visuals, context)
    encoded = [_encode(engine.processor, turn, text) for text in continuations]
    opening, rows = _split(encoded)
    spliced = model.splice(torch.tensor([opening], device=model.device), None, **inputs)
    whole = spliced.embeds.shape[1] + max(len(ids) for ids, _ in rows)
    if whole > engine.max_length:
        raise MedPLIBError(
            f"prompt and answer have {whole} tokens and a request may hold {engine.max_length}; "
            "ask shorter, or give a larger max_length"
        )
    cache = DynamicCache(config=model.config.text_config)
    positions = spliced.plan.position_ids
    decoded = model.model.decoder(spliced.embeds, position_ids=positions, past_key_values=cache, use_cache=True)
    last = decoded.last_hidden_state[:, -1:]  # [1, 1, D], predicts the first token behind the opening
    # where experts leave tokens out of full passes, an answer is read alone and token by token, as if generated
    moe = model.config.moe
    drops = bool(moe.enabled and moe.drop_in_evaluation and moe.drop_tokens)
    together = 1 if drops else engine.settings.slots
    found: list[Likelihood] = []
    for start in range(0, len(rows), together):
        found += _score(model, copy.deepcopy(cache), last, rows[start : start + together], drops)
    return found


def _question(engine: Engine, visuals: Visuals, context: str) -> tuple[Turn, dict[str, Tensor | None]]:
    """The question as a turn, and what ``splice`` needs to put its image and regions in place."""
    model = engine.model
    if visuals.image is None:
        if visuals.regions:
            raise MedPLIBError("the question points at a region of no image; give its image")
        return Turn("human", context), {}
    prepared = engine.prepare(visuals.image)
    if prepared.image_features is None:
        prepared.image_features = model.encode_images(prepared.clip_input.to(model.device, model.dtype))
    regions = [region_to_mask(region, prepared.size) for region in visuals.regions]
    if regions and not model.config.region.enabled:
        raise MedPLIBError("this checkpoint has no region adapter; ask it about the whole image")
    asked = place_region(context, len(regions)) if regions else context
    turn = Turn("human", f"{IMAGE_TOKEN}\n{asked}")
    encoded = engine.processor.encode_prompt([turn], [prepared.data.pixels], regions=regions, pixels=False)
    return turn, {
        "image_features": prepared.image_features,
        "region_masks": encoded.region_masks.to(model.device, model.dtype),
        "region_image": encoded.region_image.to(model.device),
    }


def _encode(processor: MedPLIBProcessor, turn: Turn, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of the conversation, and the places of the continuation's tokens in it; its end token is cut off."""
    answer = Turn("gpt", continuation.lstrip())
    ids, labels = tokenize_conversation(processor.tokenizer, [turn, answer], processor.settings.template)
    supervised = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
    return ids[: supervised[-1]], supervised[:-1]


def _split(encoded: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
    """The ids that all conversations begin with, up to the first continuation; of each, the ids that follow [S], and
    which of them are the continuation's, bool [S]."""
    shared = min(places[0] if places else len(ids) for ids, places in encoded)
    first = encoded[0][0]
    while any(ids[:shared] != first[:shared] for ids, _ in encoded):  # tokens may differ where texts only touch
        shared -= 1
    rows = []
    for ids, places in encoded:
        counted = torch.zeros(len(ids), dtype=torch.bool)
        counted[places] = True
        rows.append((torch.tensor(ids[shared:], dtype=torch.long), counted[shared:]))
    return first[:shared], rows


def _score(
    model: MedPLIBForCausalLM, cache: DynamicCache, last: Tensor, rows: Sequence[tuple[Tensor, Tensor]], by_token: bool
) -> list[Likelihood]:
    """Likelihoods of rows that continue the opening in ``cache``, which is used up; read whole, or token by token."""
    length = cache.get_seq_length()
    cache.batch_repeat_interleave(len(rows))
    ids = torch.nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True).to(model.device)  # [n, S]
    if not ids.shape[1]:
        return [Likelihood(0.0, True, 0) for _ in rows]
    lengths = torch.tensor([len(row) for row, _ in rows], device=model.device)
    real = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]  # [n, S]
    states = [last.expand(len(rows), -1, -1)]
    step = 1 if by_token else ids.shape[1]
    for begin in range(0, ids.shape[1], step):
        end = begin + step
        seen = torch.cat([real.new_ones(len(rows), length), real[:, :end]], dim=1)
        places = torch.arange(length + begin, length + end, device=model.device).expand(len(rows), -1)
        decoded = model.model.decoder(
            model.get_input_embeddings()(ids[:, begin:end]),
            attention_mask=None if bool(seen.all()) else seen,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
        states.append(decoded.last_hidden_state)
    hidden = torch.cat(states, dim=1)[:, :-1]  # [n, S, D], each predicts the token of its place
    found = []
    for (row, counted), one, asked in zip(rows, hidden, ids, strict=True):
        counted = counted.to(model.device)
        logits = model.lm_head(one[: len(row)][counted]).float()  # [continuation, V]
        tokens = asked[: len(row)][counted]
        chosen = logits.log_softmax(dim=-1).gather(-1, tokens[:, None]).double().sum()
        found.append(Likelihood(float(chosen), bool((logits.argmax(dim=-1) == tokens).all()), len(tokens)))
    return found
