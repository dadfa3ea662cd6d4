"""What ``infer.py`` measures, one table each: decoding, before the first token, a grounded answer, many requests."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from limits import Clock, Demand, Hardware, Limits, PeakMemory
from plain import Plain
from tables import Row, number, verdict
from workloads import ANSWER, GROUNDING, MIXED, Answers, Workload, of_length, sample_requests

from model.data.image_io import read_image
from model.errors import MedPLIBError
from model.inference.answer import Answer
from model.inference.engine import Engine, EngineSettings
from model.inference.images import BoundedCache
from model.inference.prompts import visual_tokens
from model.inference.requests import Request
from model.inference.slots import slot_bytes
from model.modeling.configuration import IMAGE_PLACEHOLDER
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import IMAGE_TOKEN

CONCURRENCY = (1, 8, 32)
STEPS = 32  # decoding steps timed in a round
SETTLE = 4  # steps before them, once all prompts are read
READING = 24  # steps at most until then
CHUNK = 4096  # prompt tokens read in a step before decoding is timed
LENGTH = 1024  # tokens of a slot, at most
ASKED = 8  # grounded answers timed in a round
TOGETHER = 8  # images that SAM encodes together
_MB = 2**20


class Sections:
    """The measurements of one network; the engine and plain generation take turns in every round.

    Args:
        model: the network, in eval mode.
        processor: its processor.
        answers: what its answers are made to be.
        hardware: what its device can do.
        clock: takes the times.
        workloads: requests for both sides.
        options: further settings of every engine.
    """

    def __init__(
        self,
        model: MedPLIBForCausalLM,
        processor: MedPLIBProcessor,
        answers: Answers,
        hardware: Hardware,
        clock: Clock,
        workloads: Sequence[Workload],
        options: dict[str, Any],
    ) -> None:
        self.model, self.processor, self.answers, self.clock, self.options = model, processor, answers, clock, options
        self.plain = Plain(model, processor)
        self.limits, self.memory = Limits(model, hardware), PeakMemory(model.device)
        self.workloads = workloads
        self._lengths: dict[Request, tuple[int, int]] = {}
        self.max_length = min(LENGTH, model.config.text_config.max_position_embeddings)
        self.verdicts: list[str] = []
        self.cuda = model.device.type == "cuda"

    # --- shared by the tables -------------------------------------------------------------------------------------

    def engine(self, slots: int, *, cached: bool = True, **settings: Any) -> Engine:
        """An engine whose caches hold all that the sample shows, or nothing."""
        gc.collect()  # of the last engine
        text, dtype = self.model.config.text_config, self.model.dtype
        opening = slot_bytes(text, visual_tokens(self.model) + 64, dtype)
        room = 256 + 32 * opening // _MB if cached else 0
        chosen = {"max_length": self.max_length, "image_cache_mb": room, "prefix_cache_mb": room, **settings}
        return Engine(self.model, self.processor, EngineSettings(slots=slots, **{**chosen, **self.options}))

    def peak(self, work: Callable[[], object]) -> int:
        """Bytes of memory that some work needs at most, weights included."""
        gc.collect()
        self.memory.reset()
        work()
        self.clock.wait()
        return self.memory.read()

    def lengths(self, request: Request) -> tuple[int, int]:
        """Tokens of a request's prompt, and how many of them open any prompt about its image."""
        if request not in self._lengths:
            ids = self.plain.encode(request).input_ids
            patches = visual_tokens(self.model)
            opening = int((ids == IMAGE_PLACEHOLDER).nonzero()[0])
            self._lengths[request] = len(ids) - 1 + patches, opening + patches
        return self._lengths[request]

    # --- decoding -------------------------------------------------------------------------------------------------

    def decoding(self) -> list[Row]:
        """A step of 1, 8 and 32 rows, everything from states to chosen tokens included; plain rows padded left."""
        rows: list[Row] = []
        with self.answers.endless(READING + SETTLE + STEPS):
            for batch in CONCURRENCY:
                rows += self._decoding(batch)
        return rows

    def _decoding(self, batch: int) -> list[Row]:
        requests = [of_length(request, READING + SETTLE + STEPS) for request in sample_requests(batch, MIXED)]
        inputs = self.plain.inputs([self.plain.encode(request) for request in requests])
        plain_peak = self.peak(lambda: self.plain.seconds_per_step(inputs, STEPS))
        engine = self.engine(batch, prefill_chunk=CHUNK)
        engine_peak = self.peak(lambda: self._engine_step(engine, requests))
        times = [
            (self._engine_step(engine, requests), self.plain.seconds_per_step(inputs, STEPS))
            for _ in range(self.clock.rounds)
        ]
        ours, theirs = (statistics.median(side) for side in zip(*times, strict=True))
        context = round(statistics.fmean(self.lengths(request)[0] for request in requests)) + SETTLE + STEPS // 2
        limit = self.limits.step(batch, context)
        peaks, note = (engine_peak, plain_peak), f"{context} tokens of context"
        if self.cuda and batch == 1:
            self.verdicts.append(verdict("One row: at most 4.5 ms a token", ours * 1e3, 4.5, at_most=True))
        if self.cuda and batch == 32:
            self.verdicts.append(verdict("32 rows: at least 2,500 tokens a second", batch / ours, 2500))
        what = f"{batch} row{'s' * (batch > 1)}"
        return [
            Row(f"a step of {what}", "ms", ours * 1e3, theirs * 1e3, limit * 1e3, *peaks, note),
            Row(f"tokens of {what}", "a second", batch / ours, batch / theirs, batch / limit, *peaks, note),
        ]

    def _engine_step(self, engine: Engine, requests: Sequence[Request]) -> float:
        """Mean seconds of a step in which every request decodes a token."""
        tickets = [engine.submit(request) for request in requests]
        while engine.status()["waiting"]:
            engine.step()
        reading = -(-sum(self.lengths(request)[0] for request in requests) // CHUNK)
        for _ in range(reading + SETTLE):
            engine.step()
        seconds = self.clock.once(lambda: [engine.step() for _ in range(STEPS)]) / STEPS
        if engine.status()["running"] != len(requests):
            raise MedPLIBError("an answer ended while decoding was timed; this network cannot be timed so")
        for ticket in tickets:
            ticket.cancel()
        while engine.busy:
            engine.step()
        return seconds

    # --- before the first token -----------------------------------------------------------------------------------

    def before(self) -> list[Row]:
        """Reading a prompt whose image is encoded, to the first token; and encoding images."""
        rows = []
        with self.answers.endless(ANSWER):
            for more_words in (0, 300):
                rows.append(self._first_token(more_words))
        return [*rows, *self._encoders()]

    def _first_token(self, more_words: int) -> Row:
        request = of_length(sample_requests(1, GROUNDING)[0], 1)
        length, _ = self.lengths(request)
        more_words = max(0, min(more_words, self.max_length - length - 16))
        request = replace(request, question=request.question + " a" * more_words)
        engine = self.engine(1, prefix_cache_mb=0)
        request = replace(request, image=engine.prepare(request.image))
        pixels = read_image(sample_requests(1, GROUNDING)[0].image).pixels
        turns = [Turn("human", f"{IMAGE_TOKEN}\n{request.question}")]
        clip = self.processor.clip_input(pixels)[None].to(self.model.device, self.model.dtype)
        features = self.model.encode_images(clip)

        def plain() -> object:
            inputs = self.plain.inputs([self.processor.encode_prompt(turns, [pixels], pixels=False)])
            return self.plain.generate({**inputs, "image_features": features}, 1)

        length = len(self.processor.encode_prompt(turns, [pixels], pixels=False).input_ids) - 1 + features.shape[1]
        plain_peak, engine_peak = self.peak(plain), self.peak(lambda: engine.ask(request))
        ours, theirs = self.clock.medians(lambda: engine.ask(request), plain)
        limit = self.limits.prefill(length)
        what = f"first token after {length}"
        return Row(what, "ms", ours * 1e3, theirs * 1e3, limit * 1e3, engine_peak, plain_peak, "image encoded before")

    def _encoders(self) -> list[Row]:
        config = self.model.config
        sizes = config.vision_config.image_size, config.sam_config.vision_config.image_size
        clip, sam, many = (
            torch.zeros(count, 3, size, size, dtype=self.model.dtype, device=self.model.device)
            for count, size in ((1, sizes[0]), (1, sizes[1]), (TOGETHER, sizes[1]))
        )
        works = (
            lambda: self.model.encode_images(clip),
            lambda: self.model.encode_segmented_images(sam),
            lambda: self.model.encode_segmented_images(many),
        )
        peaks = [self.peak(work) for work in works]
        clip_ms, sam_ms, many_ms = (1e3 * seconds for seconds in self.clock.medians(*works))
        clip_limit, sam_limit = 1e3 * self.limits.clip(), 1e3 * self.limits.sam()
        many_limit = 1e3 * max(self.limits.sam(alone=False), self.limits.sam() / TOGETHER)
        many_ms /= TOGETHER
        same = "one pass, the same on both sides"
        together = "the engine encodes finished answers' images together"
        return [
            Row("CLIP tower, an image", "ms", clip_ms, clip_ms, clip_limit, peaks[0], peaks[0], same),
            Row("SAM encoder, an image", "ms", sam_ms, sam_ms, sam_limit, peaks[1], peaks[1], same),
            Row(f"SAM encoder, one of {TOGETHER}", "ms", many_ms, sam_ms, many_limit, peaks[2], peaks[1], together),
        ]

    # --- one grounded answer --------------------------------------------------------------------------------------

    def grounded(self) -> list[Row]:
        """From the image file to text and mask, one request at a time."""
        with self.answers.short(grounded=True):
            cold, warm = self.engine(1, cached=False), self.engine(1)
            painted = (request for request in sample_requests(4 * ASKED, GROUNDING) if cold.ask(request).masks)
            asked = list(islice(painted, ASKED))
            if not asked:
                raise MedPLIBError("the network paints no mask for any of the sample's questions; time another one")

            def plain() -> object:
                return [self.plain.answer(request) for request in asked]

            answers = [warm.ask(request) for request in asked]  # fills its caches too
            works = tuple(lambda engine=engine: [engine.ask(request) for request in asked] for engine in (cold, warm))
            plain_peak, *peaks = (self.peak(work) for work in (plain, *works))
            *ours, theirs = (seconds / len(asked) for seconds in self.clock.medians(*works, plain))
        tokens = statistics.fmean(map(spoken, answers))
        note = f"{number(tokens)} tokens and {number(statistics.fmean(len(one.masks) for one in answers))} masks each"
        rows = []
        for name, cached, seconds, peak in zip(("cold", "warm"), (False, True), ours, peaks, strict=True):
            limit = self.limits.answers(self.demand(asked, answers, cached, 1, known=cached)) / len(asked)
            what = f"a grounded answer, caches {name}"
            rows.append(Row(what, "ms", seconds * 1e3, theirs * 1e3, limit * 1e3, peak, plain_peak, note))
            if self.cuda:
                claim = f"A grounded answer of {number(tokens)} tokens, caches {name}: at most 60 ms"
                self.verdicts.append(verdict(claim, seconds * 1e3, 60, at_most=True))
        return rows

    def demand(
        self, requests: Sequence[Request], answers: Sequence[Answer], cached: bool, batch: int, *, known: bool = False
    ) -> Demand:
        """What these answers need at least; ``known``: all their images and openings are in the caches."""
        lengths = [self.lengths(request) for request in requests]
        painted = [request.image for request, answer in zip(requests, answers, strict=True) if answer.masks]
        images = [request.image for request in requests]
        if cached:
            painted, images = sorted(set(painted)), sorted(set(images))
        openings = sum(opening for _, opening in lengths)
        spared = openings * (1 if known else 1 - len(images) / len(requests)) if cached else 0
        return Demand(
            requests=len(requests),
            images=0 if known else len(images),
            segmented=0 if known else len(painted),
            prompt_tokens=round(sum(length for length, _ in lengths) - spared),
            context=round(statistics.fmean(length for length, _ in lengths)),
            steps=sum(map(spoken, answers)) - len(answers),  # the prompt's pass gives the first token
            batch=batch,
        )

    # --- many requests --------------------------------------------------------------------------------------------

    def requests(self) -> list[Row]:
        """Requests answered in a second, by workload, concurrency and caches; caches are empty when a round begins."""
        rows: list[Row] = []
        for workload in self.workloads:
            grounded = workload.name == "grounding"
            forced = self.answers.endless(ANSWER) if workload.endless else self.answers.short(grounded=grounded)
            with forced:
                texts: list[str] = []
                plain_peak = self.peak(lambda texts=texts, some=workload: texts.extend(self._plain_texts(some)))
                for concurrency in CONCURRENCY:
                    rows += self._serve(workload, concurrency, texts, plain_peak)
        return rows

    def _plain_texts(self, workload: Workload) -> list[str]:
        return [self.plain.answer(request)[0] for request in workload.plain_requests]

    def _serve(self, workload: Workload, concurrency: int, texts: list[str], plain_peak: int) -> list[Row]:
        engine = self.engine(concurrency)
        asked = workload.plain_requests if concurrency == 1 else workload.requests
        list(engine.answer_all(asked[: 2 * concurrency]))  # warms up
        found: dict[bool, dict[int, Answer | MedPLIBError]] = {False: {}, True: {}}
        times: dict[bool, list[float]] = {False: [], True: []}
        peaks = {False: 0, True: 0}
        plain_times: list[float] = []
        for _ in range(self.clock.rounds):
            for cached in times:
                empty_caches(engine, cached)
                self.memory.reset()
                times[cached].append(self.clock.once(lambda to=found[cached]: to.update(engine.answer_all(asked))))
                peaks[cached] = max(peaks[cached], self.memory.read())
                if not cached:
                    plain_times.append(self.clock.once(lambda: self._plain_texts(workload)))
        plain_rate = len(texts) / statistics.median(plain_times)
        rows = []
        for cached, setting in ((False, "off"), (True, "on")):
            answers = [whole(found[cached][place]) for place in range(len(asked))]
            same = sum(answer.text == text for answer, text in zip(answers, texts, strict=False))
            rate = len(asked) / statistics.median(times[cached])
            limit = len(asked) / self.limits.answers(self.demand(asked, answers, cached, concurrency))
            what = f"{workload.name}, concurrency {concurrency}, caches {setting}"
            note = f"same text: {same} of {len(texts)}"
            rows.append(Row(what, "a second", rate, plain_rate, limit, peaks[cached], plain_peak, note))
            bound = {1: 1, 8: 3}.get(concurrency)
            if bound and not self.cuda:
                self.verdicts.append(verdict(f"{what}: at least {bound} × plain", rows[-1].gain, bound))
        return rows


def empty_caches(engine: Engine, cached: bool) -> None:
    """Let an engine forget all images and openings, and keep none unless ``cached``."""
    settings = engine.settings
    caches: list[tuple[BoundedCache, int]] = [
        (engine.images, settings.image_cache_mb),
        (engine.prefixes, settings.prefix_cache_mb),
    ]
    for cache, room in caches:
        cache.max_bytes = 0
        cache.refresh()
        cache.max_bytes = room * _MB if cached else 0


def spoken(answer: Answer) -> int:
    """Tokens of an answer, its end included."""
    return answer.new_tokens + (answer.finish == "end")


def whole(answer: Answer | MedPLIBError) -> Answer:
    """An answer that must not have failed."""
    if isinstance(answer, MedPLIBError):
        raise answer
    return answer
