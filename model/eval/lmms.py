"""lmms-eval integration: MedPLIB as one of its models, phantoms as tasks for any model, and a command for both.

``python -m model.eval.lmms --tasks medplib_phantoms …``. What a document adds to the sums of a metric goes through the
harness row by row; the metric is computed from the sums of all rows at the end, on however many processes they were
answered: the same numbers as ``medplib eval`` gives.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from model.data.image_io import read_image, read_mask
from model.data.records import open_records
from model.errors import MedPLIBError, escape_unprintable
from model.eval.metrics.definitions import metrics_for
from model.eval.metrics.scores import score_predictions
from model.eval.predictions import Prediction
from model.eval.questions import Question, questions_of
from model.eval.suite import load_suite
from model.inference.answer import Answer, Mask
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.inference.images import ImageSource
from model.inference.regions import Region, place_region, region_to_mask
from model.modeling.configuration import IGNORE_INDEX
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn
from model.processing.encoding import tokenize_conversation
from model.processing.masks import bounding_box, decode_rle, encode_rle
from model.processing.special_tokens import IMAGE_TOKEN, REGION_MARKER

try:
    from lmms_eval.api.model import lmms as _Base
except ImportError:  # the class can be looked at without the harness; making one says what is missing
    _Base = object

logger = logging.getLogger(__name__)

MODEL_NAME = "medplib"
"""What ``--model`` calls it, and the key of its own settings in the tasks."""
TASKS = Path(__file__).resolve().parent / "lmms_tasks"
"""Folder of the task files, for ``--include_path``."""
SERIES = "0.7"
"""Of lmms-eval. What its numbers mean and which types it takes changes between series."""


def manifest() -> Any:
    """What the harness needs to know to load the model; the entry point ``lmms_eval.models`` names this function.

    Raises:
        MedPLIBError: lmms-eval is not installed, or is of another series.
    """
    require_lmms_eval()
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_NAME, simple_class_path="model.eval.lmms.MedPLIB")


def require_lmms_eval() -> None:
    """Raise a MedPLIBError unless the harness can be imported and is of the series that the adapter speaks."""
    remedy = f'pip install -e ".[lmms]" and pip install --no-deps "lmms-eval=={SERIES}.*" (see docs/evaluation.md)'
    if find_spec("lmms_eval") is None:
        raise MedPLIBError(f"lmms-eval is not installed; use {remedy}")
    try:
        found = version("lmms_eval")
    except PackageNotFoundError:  # run from its sources
        return
    if not f"{found}.".startswith(f"{SERIES}."):
        raise MedPLIBError(f"lmms-eval is version {found}, MedPLIB speaks {SERIES}; use {remedy}")


# --- the command ------------------------------------------------------------------------------------------------------

_USAGE = """\
usage: python -m model.eval.lmms [--data DIR] --tasks TASKS --model_args pretrained=DIR[,slots=8,…] …

Runs lmms-eval with the model medplib and the tasks of MedPLIB (medplib_phantoms and its parts).
  --data DIR    folder of `medplib data build phantom`; the sample's held-out pictures without
Everything else goes to lmms-eval; --model is medplib unless another is named. See lmms-eval --help.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 for wrong input, in one sentence, 1 if lmms-eval failed otherwise."""
    escape_unprintable()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0
    try:
        command, data = lmms_eval_arguments(given)
        registered = manifest()
    except MedPLIBError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if data is not None:
        os.environ["MEDPLIB_DATA"] = data  # where the suite looks, in whatever process
    import lmms_eval.__main__ as harness
    from lmms_eval.models import MODEL_REGISTRY_V2

    evaluate, failed = harness.cli_evaluate_single, False

    def evaluate_loudly(*values: Any, **options: Any) -> Any:
        """The harness's evaluation, whose failures it would otherwise print and end in success."""
        nonlocal failed
        try:
            return evaluate(*values, **options)
        except Exception as error:
            cause: BaseException | None = error  # ours may be wrapped: the harness tries tasks again
            while cause is not None and not isinstance(cause, MedPLIBError):
                cause = cause.__cause__
            if cause is not None:
                sys.stderr.write(f"error: {cause}\n")
                raise SystemExit(2) from error
            failed = True
            raise

    MODEL_REGISTRY_V2.register_manifest(registered, overwrite=True)
    harness.cli_evaluate_single = evaluate_loudly
    sys.argv = ["lmms-eval", *command]
    try:
        harness.cli_evaluate()
    finally:
        harness.cli_evaluate_single = evaluate
    return 1 if failed else 0


def lmms_eval_arguments(given: Sequence[str]) -> tuple[list[str], str | None]:
    """The harness's arguments, ours taken out, model and task folder put in; and the folder of ``--data``.

    Raises:
        MedPLIBError: ``--data`` is no folder, or ``--include_path`` is given.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--data")
    try:
        options, rest = parser.parse_known_args(given)
    except argparse.ArgumentError as error:
        raise MedPLIBError("--data has no value; give a folder behind it") from error
    if options.data is not None and not Path(options.data).is_dir():
        raise MedPLIBError(f"the folder {options.data} is not there; give one of medplib data build phantom")
    names = {argument.split("=")[0] for argument in rest}
    if "--include_path" in names:
        raise MedPLIBError("--include_path is MedPLIB's own task folder here; call lmms-eval itself to use another")
    named = [] if "--model" in names else ["--model", MODEL_NAME]
    return [*rest, *named, "--include_path", str(TASKS)], options.data


# --- the model --------------------------------------------------------------------------------------------------------


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
        """Answer requests (context, generation settings, ``doc_to_visual``, document number, task, split) in order.

        The text comes with the number of its tokens; it is empty where a request could not be answered. Raises a
        MedPLIBError where none could, or a task asks for what MedPLIB cannot do.
        """
        from lmms_eval.api.instance import GenerationResult, TokenCounts

        real = [place for place, request in enumerate(requests) if not _is_padding(request)]
        generations = {place: self._generation(requests[place].args[1]) for place in real}
        asked_before: Counter[str] = Counter()
        errors: dict[int, MedPLIBError] = {}
        places: list[int] = []
        results = [GenerationResult("") for _ in requests]
        with tqdm(total=len(real), unit="answer", desc="MedPLIB", disable=True if self._rank else None) as bar:

            def stream() -> Iterator[Request]:
                """Each request is made when the engine has room for it, so that images are not all held at once."""
                for place in real:
                    name = _name(requests[place].args[3:])
                    asked_before[name] += 1
                    try:
                        request = self._request(
                            requests[place].args, generations[place], f"{name} {asked_before[name] - 1}"
                        )
                    except MedPLIBError as error:
                        errors[place] = error
                    except OSError as error:
                        errors[place] = MedPLIBError(f"the image cannot be read: {error}")
                    else:
                        places.append(place)
                        yield request
                        continue
                    bar.update()

            for number, outcome in self.engine.answer_all(stream()):
                bar.update()
                place = places[number]
                if isinstance(outcome, MedPLIBError):
                    errors[place] = outcome
                    continue
                text = text_with_masks(outcome) if generations[place].masks else outcome.text
                results[place] = GenerationResult(text, TokenCounts(output_tokens=outcome.new_tokens))
        failed = [(_name(requests[place].args[3:]), error) for place, error in sorted(errors.items())]
        if failed and len(failed) == len(real):  # the task is not for this model
            raise MedPLIBError(f"none of the {len(failed)} questions could be answered; the first: {failed[0][1]}")
        for name, error in failed[:5]:
            logger.warning("%s has no answer and counts as wrong: %s", name, error)
        if failed:
            logger.warning("%d of %d questions have no answer and count as wrong", len(failed), len(real))
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
        """Score given answers; requests are (context, answer or function that gives it, ``doc_to_visual``, document
        number, task, split), or (context, answer) alone.

        The harness (0.7) means two things by the number. Of a choice, which comes as text, it wants the loss and takes
        the choice with the smallest. Of a target, which comes as a function of the document, it wants the
        log-probability, whose mean makes the perplexity. Both are sums over the answer's tokens.

        It also turns whatever is not a ``GenerationResult`` into text, pairs of numbers included, so they come in one.

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
    """The model's part of a harness run (``--model_args``)."""

    pretrained: str  # checkpoint directory
    loading: Mapping[str, Any] = field(default_factory=dict)  # keywords of ``Engine.from_pretrained``
    engine: EngineSettings = field(default_factory=EngineSettings)
    max_new_tokens: int = 256  # hard end of an answer where the task names none
    threshold: float | None = None  # probability above which a pixel is in a mask; the checkpoint's own where None
    no_mask_below: float | None = None  # probability of presence below which a mask is left empty
    seed: int = 0  # of sampling, where a task asks for it


@dataclass(frozen=True)
class Generation:
    """How one request is answered."""

    settings: GenerationSettings  # with the run's seed
    masks: bool = False  # whether the answer's masks follow its text, see ``text_with_masks``
    ignored: tuple[str, ...] = ()  # settings of the task that mean nothing here


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
    """Check ``--model_args`` with ``batch_size``, ``max_batch_size`` and ``device`` of the command line.

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
    """The device of this process, CUDA where there is one unless named; each of several processes has its own GPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    place = os.environ.get("LOCAL_RANK")
    return f"cuda:{place}" if name == "cuda" and place is not None else name


def _slots(given: Mapping[str, Any]) -> int:
    """Requests decoded together: ``slots``, or ``--batch_size`` where that was set (the harness always sends 1)."""
    automatic = str(given.get("batch_size", 1)).startswith("auto")
    size = 1 if automatic else _whole(given.get("batch_size", 1), "batch_size")
    if "max_batch_size" in given and not automatic:
        raise MedPLIBError("max_batch_size bounds an automatic batch size; give --batch_size auto with it, or leave it")
    if "slots" not in given:
        return _whole(given.get("max_batch_size", _SLOTS), "max_batch_size") if automatic or size == 1 else size
    slots = _whole(given["slots"], "slots")
    if size not in (1, slots):
        raise MedPLIBError(f"slots is {slots} and batch_size {size}, which mean the same; give one of them")
    return slots


_ONE_WAY = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}
"""Settings that would change the answer and that the engine has one value for."""
_READ = ("until", "max_new_tokens", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed", "masks")


def read_generation(values: Mapping[str, Any], arguments: ModelArguments) -> Generation:
    """Check a task's ``generation_kwargs``, with what ``--gen_kwargs`` changed in them.

    ``do_sample: false`` means greedy whatever the temperature is, ``do_sample: true`` alone a temperature of 1, and
    a temperature alone says both.

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
    """Score continuations of one question, read without the space before them; image and prompt are read once for all.

    Raises:
        MedPLIBError: image or regions are malformed, or prompt and answer are too long.
    """
    model = engine.model
    turn, inputs = _question(engine, visuals, context)
    opening, rows = _tokenized(engine, turn, continuations)
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


def _tokenized(
    engine: Engine, turn: Turn, continuations: Sequence[str]
) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
    """The ids that all conversations begin with, up to the first continuation; of each, the ids that follow [S], and
    which of them are the continuation's, bool [S]; its end token is cut off."""
    tokenizer, template = engine.processor.tokenizer, engine.processor.settings.template
    encoded = []
    for text in continuations:
        ids, labels = tokenize_conversation(tokenizer, [turn, Turn("gpt", text.lstrip())], template)
        supervised = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
        encoded.append((ids[: supervised[-1]], supervised[:-1]))
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


# --- phantoms as tasks ------------------------------------------------------------------------------------------------

Document = dict[str, Any]
Item = dict[str, Any]

TEXT_METRICS = ("closed_accuracy", "open_exact_match", "token_recall", "token_F1", "BLEU-1", "BLEU-4", "ROUGE-L")
MASK_METRICS = (
    *("mDice", "mIoU", "micro_Dice", "mDice_matched", "gIoU", "cIoU"),
    *("SEG_emission_rate", "extra_mask_rate", "false_mask_rate"),
)
BOX_METRIC = "box_mIoU"
"""mIoU of the masks' bounding boxes: what a model that can only name boxes is fairly compared by."""
_ABOUT = ("task", "kind", "modality", "structure", "dataset")


# --- process_docs -----------------------------------------------------------------------------------------------------


def vqa_documents(sources: Any) -> Any:
    """Questions about a whole image; ``process_docs`` of a task.

    From a ``datasets.Dataset`` whose rows name suites, ``{"suite": name or YAML file}``, to one with a row for each
    question, see ``document_of``.

    Raises:
        MedPLIBError: a suite or its files are not there, a record cannot be asked, or there is no such question.
    """
    return _dataset(_documents(sources, "vqa"))


def region_documents(sources: Any) -> Any:
    """Questions that point at a region of the image; see ``vqa_documents``."""
    return _dataset(_documents(sources, "region"))


def grounding_documents(sources: Any) -> Any:
    """Questions for masks, absent targets included; see ``vqa_documents``."""
    return _dataset(_documents(sources, "grounding"))


def choice_documents(sources: Any) -> Any:
    """Closed questions about a whole image with ``choices`` and ``gold``, the place of the right one.

    The choices are the reference answers of all questions of the kind, sorted; a kind with one answer has no choice.
    See ``vqa_documents``.
    """
    closed = [document for document in _documents(sources, "vqa") if document["answer_type"] == "closed"]
    answers: dict[str, set[str]] = defaultdict(set)
    for document in closed:
        answers[document["kind"]].add(document["answer"])
    choices = {kind: sorted(found) for kind, found in answers.items() if len(found) > 1}
    return _dataset(
        {**document, "choices": choices[kind], "gold": choices[kind].index(document["answer"])}
        for document in closed
        if (kind := document["kind"]) in choices
    )


def _dataset(documents: Iterable[Document]) -> Any:
    from datasets import Dataset

    rows = list(documents)
    if not rows:
        raise MedPLIBError("the data has no question of this task; give data that has, or leave the task out")
    return Dataset.from_list(rows)


def _documents(sources: Iterable[Mapping[str, Any]], task: str) -> Iterator[Document]:
    for item in (item for source in sources for item in load_suite(source["suite"]).sets):
        if item.layout != "medplib":
            raise MedPLIBError(
                f"{item.title} is in the layout {item.layout}; tasks are made of sets in MedPLIB's own layout"
            )
        for file in item.files():
            for number, record in enumerate(open_records(file)):
                for question in questions_of(record, number, item.images, item.answer_type or None):
                    if question.metadata.get("task") == task:
                        yield document_of(question, file)


def document_of(question: Question, file: Path) -> Document:
    """One question of a file as a flat row.

    Raises:
        MedPLIBError: it cannot be asked, or continues a conversation, which the harness's single question cannot hold.
    """
    reference = question.reference
    error = question.error or ("it is a later turn of a conversation" if question.history else None)
    if error:
        raise MedPLIBError(f"{file}, record {question.number} ({reference.question_id}), cannot be asked: {error}")
    return {
        "question_id": str(reference.question_id),
        "image": str(question.image),
        "image_path": question.image_path,
        "question": reference.prompt,
        "answer": reference.gt,
        "answer_type": question.answer_type,
        **{name: str(question.metadata.get(name, "")) for name in _ABOUT},
        "regions": [str(path) for path in question.regions],
        "masks": [str(path) for path in question.masks or ()],
    }


# --- doc_to_visual, doc_to_text: as they are to MedPLIB (``native``), drawn to any other model ------------------------


@dataclass(frozen=True)
class PointedRegion:
    """A visual that stands for a ``<region></region>`` of the question: a mask file, array, box or point."""

    region: Region


def visuals(document: Document, lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> list[Any]:
    """What the model sees: file and region masks where its settings say ``native``, else a picture with outlines."""
    if (lmms_eval_specific_kwargs or {}).get("native"):
        return [document["image"], *(PointedRegion(path) for path in document["regions"])]
    pixels = read_image(document["image"]).pixels.copy()
    for path in document["regions"]:
        region = read_mask(path).astype(np.uint8)
        outlines, _ = cv2.findContours(region, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, outlines, -1, (0, 255, 0), max(1, min(pixels.shape[:2]) // 128))
    return [Image.fromarray(pixels)]


def asked(document: Document, lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """The question, between the task's ``pre_prompt`` and ``post_prompt``.

    Where it is not ``native``, a region is what is outlined, and ``{width}`` and ``{height}`` of the post-prompt are
    those of the image in pixels.
    """
    chosen = lmms_eval_specific_kwargs or {}
    before, after = chosen.get("pre_prompt", ""), chosen.get("post_prompt", "")
    question = document["question"]
    if not chosen.get("native"):
        question = question.replace(REGION_MARKER, "outlined in green")
    if "{width}" in after:
        height, width = read_image(document["image"]).size
        after = after.replace("{width}", str(width)).replace("{height}", str(height))
    return f"{before}{question}{after}"


# --- process_results, aggregation -------------------------------------------------------------------------------------

_METRICS = {metric.name: metric for metric in metrics_for()}


def score_text(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Item]:
    """What an answer in words adds to each metric; ``process_results`` of a task."""
    return _items(prediction_of(document, results[0]), TEXT_METRICS)


def score_masks(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Item]:
    """What an answer with masks or boxes adds to each metric; see ``score_text``."""
    prediction = prediction_of(document, results[0])
    masks = [{**mask, "rle": _boxed(mask["rle"])} for mask in prediction.masks]
    in_boxes = replace(prediction, masks=masks, gt_masks=[_boxed(rle) for rle in prediction.gt_masks or ()])
    boxed = _items(in_boxes, ("mIoU",))
    return _items(prediction, MASK_METRICS) | ({BOX_METRIC: boxed["mIoU"]} if boxed else {})


def total(items: Sequence[Item]) -> float:
    """A metric over all rows; ``aggregation`` of every metric of the tasks."""
    metric = _METRICS[items[0]["metric"]]
    return float(metric.compute(lambda column: np.asarray(sum(item["sums"].get(column, 0.0) for item in items))))


def _items(prediction: Prediction, names: Sequence[str]) -> dict[str, Item]:
    """Per metric the columns it reads and, for the harness's standard errors, its value for this row alone."""
    scores = score_predictions([prediction], samples=0)
    items: dict[str, Item] = {}
    for metric in scores.metrics:
        if metric.name in names and scores.total(metric.count):
            columns: dict[str, float] = {}

            def read(name: str, columns: dict[str, float] = columns) -> np.ndarray:
                columns[name] = scores.total(name)
                return np.asarray(columns[name])

            value = float(metric.compute(read))
            items[metric.name] = {"metric": metric.name, "sums": columns}
            if not math.isnan(value):
                items[metric.name]["score"] = value
    return items


# --- answers ----------------------------------------------------------------------------------------------------------

_MASK = re.compile(r"<mask>(.*?)</mask>", re.DOTALL)
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"[\[(]{','.join([_NUMBER] * 4)}[\])]")


def text_with_masks(answer: Answer) -> str:
    """The text, and behind it its masks as ``<mask>{…}</mask>`` in the order of their ``<SEG>``.

    The harness hands text to the scoring of a task and nothing else. Data files write the paths of masks in the same
    place (reference §8); here stands what ``Mask.to_dict`` gives, as JSON.
    """
    masks = (json.dumps(mask.to_dict(), ensure_ascii=False).replace("</", "<\\/") for mask in answer.masks)
    return answer.text + "".join(f"<mask>{mask}</mask>" for mask in masks)


def prediction_of(document: Mapping[str, Any], answer: str) -> Prediction:
    """The row that ``vqa_infer`` would have written of an answer of any model.

    Masks stand in the text as ``text_with_masks`` writes them; what stands there and is no mask of the image is none.
    In an answer without any, ``[x1, y1, x2, y2]`` in pixels is a box, whose filled rectangle is taken for the mask.
    """
    grounding = document["task"] == "grounding"
    text = _MASK.sub("", answer).strip()
    written, boxes = _MASK.findall(answer), _BOX.findall(text) if grounding else []
    masks: list[dict[str, Any]] = []
    if written or boxes:
        size = read_image(document["image"]).size
        masks = [mask for one in written if (mask := _mask(one, size))]
        masks = masks or [_box_mask(numbers, size).to_dict() for numbers in boxes]
    about = {name: document[name] for name in _ABOUT if document[name]}
    return Prediction(
        question_id=document["question_id"],
        image_path=document["image_path"],
        prompt=document["question"],
        gt=document["answer"],
        text=text,
        answer_type=document["answer_type"],
        metadata={**about, "turn": 0},
        masks=masks,
        gt_masks=[encode_rle(read_mask(path)) for path in document["masks"]] if grounding else None,
    )


def _mask(text: str, size: tuple[int, int]) -> dict[str, Any] | None:
    """A mask as ``Mask.to_dict`` writes it; None for anything else that a model put between the tags."""
    try:
        mask = json.loads(text)
        pixels = decode_rle(mask["rle"])
    except (ValueError, TypeError, KeyError):  # MedPLIBError is a ValueError
        return None
    return {**mask, "rle": encode_rle(pixels)} if pixels.shape == size else None


def _box_mask(numbers: Sequence[str], size: tuple[int, int]) -> Mask:
    x1, y1, x2, y2 = (float(number) for number in numbers)
    mask = np.zeros(size, dtype=bool)
    mask[max(0, math.floor(y1)) : max(0, math.ceil(y2)), max(0, math.floor(x1)) : max(0, math.ceil(x2))] = True
    return Mask.from_array(mask, "", 1.0)


def _boxed(rle: dict[str, Any]) -> dict[str, Any]:
    """A mask's bounding box, filled."""
    mask = decode_rle(rle)
    x1, y1, x2, y2 = (int(side) for side in bounding_box(mask))
    filled = np.zeros_like(mask)
    filled[y1:y2, x1:x2] = True
    return encode_rle(filled)


if __name__ == "__main__":
    sys.exit(main())
