"""Measure the engine beside plain generation and beside the hardware's limits; one dated table and its CSV.

    python scripts/bench/infer.py [--model DIR] [--threads 2] [--out docs/benchmarks]
    python scripts/bench/infer.py --random 7b --device cuda --plain-requests 8

Plain generation answers one request at a time: transformers' ``generate`` with a dynamic cache, then the masks of that
request. Both sides get the same requests of ``data/sample``, in turns, in one process. A random network is made on the
device and given fixed answers: a few words (mixed), a sentence with ``<SEG>`` (grounding), words without end (long
answers).

``limit`` is bytes over copy bandwidth or operations over the rate of matrix products, as measured, whichever takes
longer, for a pass of one part of the network. ``peak MB`` is memory allocated on the device, on a CPU resident in the
process, weights included.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import (
    ANSWER,
    NANO,
    Clock,
    Hardware,
    PeakMemory,
    Script,
    Work,
    active_products,
    bench_parser,
    make_network,
    number,
    positive,
    publish,
    sample_questions,
    without_end,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.data.image_io import read_image, read_mask
from model.errors import MedPLIBError
from model.inference.answer import Answer, Mask
from model.inference.engine import Engine, EngineSettings
from model.inference.loading import load_for_inference, usable_device
from model.inference.quantise import weight_bytes
from model.inference.requests import Request
from model.inference.slots import slot_bytes
from model.inference.targets import mask_labels
from model.modeling.medplib import MedPLIBForCausalLM
from model.modeling.moe import MoEFeedForward
from model.processing.batching import EncodedSample
from model.processing.conversation import Turn
from model.processing.masks import threshold_mask
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import IMAGE_TOKEN

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SECTIONS = ("decoding", "before", "grounded", "requests")
CONCURRENCY = (1, 8, 32)
MIXED, GROUNDING = ("vqa", "region", "grounding"), ("grounding",)
WORDS, GROUNDED = "Yes, this is a CT image.", "Sure, the tumor is <SEG>."  # what random networks say
READING, SETTLE, STEPS = 24, 4, 32  # decoding steps: at most until all prompts are read, then before timing, then timed
CHUNK = 4096  # prompt tokens read in a step before decoding is timed
LENGTH = 1024  # tokens of a slot, at most
ASKED = 8  # grounded answers timed in a round
TOGETHER = 8  # images that SAM encodes together
_MB = 2**20
Row = dict[str, str | float]
Inputs = dict[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = bench_parser(__doc__)
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--model", type=Path, default=NANO)
    sizes = "random weights, sizes of configs/model/SIZE.yaml (7b, nano) or a file"
    network.add_argument("--random", metavar="SIZE", help=sizes)
    parser.add_argument("--device", default="cpu")
    types = "when absent fp32 on a CPU, else as stored; of random weights bf16"
    parser.add_argument("--dtype", choices=tuple(DTYPES), help=types)
    parser.add_argument("--quantisation", choices=("int8", "int4"))
    parser.add_argument("--graphs", action=BooleanOptionalAction, help="decode by CUDA graphs")
    parser.add_argument("--kernels", action=BooleanOptionalAction, help="decode by Triton kernels")
    parser.add_argument("--compile", action="store_true", help="let torch compile decoding")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads")
    parser.add_argument("--requests", type=positive, default=96, help="requests of the largest workload")
    parser.add_argument("--plain-requests", type=positive, help="how many plain generation answers at most")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds, of which the median counts")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    options = parser.parse_args(arguments)
    try:
        torch.set_num_threads(options.threads)
        device, dtype = usable_device(options.device), DTYPES.get(options.dtype)
        if options.random is not None:
            model, processor = make_network(options.random, device, dtype or torch.bfloat16, options.quantisation)
        else:
            model, processor, _ = load_for_inference(
                options.model, device, dtype=dtype, quantisation=options.quantisation
            )
            model.eval()
        gc.freeze()  # so that collecting what engines leave behind is quick
        with torch.inference_mode():
            bench = Bench(model, processor, options)
            rows = [row for name in options.sections for row in getattr(bench, name)()]
    except MedPLIBError as error:
        parser.error(str(error))
    finally:
        gc.unfreeze()
    name = options.model.name if options.random is None else f"random-{Path(options.random).stem}"
    weights = f"-{options.quantisation}" if options.quantisation else ""
    publish(options.out, f"infer-{name}-{model.device.type}{weights}", "Inference", rows, [bench.describe(name)])
    return 0


# --- the least that is needed -----------------------------------------------------------------------------------------


class Limits:
    """The least seconds of each part of a network, quantised or not, on the hardware as measured."""

    def __init__(self, model: MedPLIBForCausalLM, hardware: Hardware) -> None:
        self.model, self.hardware, self.text = model, hardware, model.config.text_config
        self.layers = model.model.decoder.layers
        self.products, self.head = active_products(self.layers), model.lm_head.weight

    def encoder(self, tower: torch.nn.Module, encode: Work) -> float:
        """A pass of an image encoder."""
        with FlopCounterMode(display=False) as counter:
            encode()
        return self.hardware.seconds(weight_bytes(tower), counter.get_total_flops())

    def layer_bytes(self, tokens: int) -> float:
        """Decoder weights that a pass over some tokens reads, where chance chooses experts."""
        mixtures = [module for module in self.layers.modules() if isinstance(module, MoEFeedForward)]
        untouched = (weight_bytes(one.experts) * (1 - one.top_k / one.num_experts) ** tokens for one in mixtures)
        return weight_bytes(self.layers) - sum(untouched)

    def step_bytes(self, batch: int, context: int) -> float:
        """Weights that a decoding step of ``batch`` rows reads, and the keys and values of ``context`` tokens each."""
        return self.layer_bytes(batch) + self.head.nbytes + batch * slot_bytes(self.text, context, self.model.dtype)

    def step(self, batch: int, context: int) -> float:
        """A decoding step."""
        attention = 4 * context * self.text.hidden_size * self.text.num_hidden_layers
        operations = batch * (2 * (self.products + self.head.numel()) + attention)
        return self.hardware.seconds(self.step_bytes(batch, context), operations)

    def prefill(self, tokens: int) -> float:
        """Reading a prompt."""
        operations = 2 * tokens * self.products + 2 * tokens**2 * self.text.hidden_size * self.text.num_hidden_layers
        return self.hardware.seconds(self.layer_bytes(tokens), operations)


# --- plain generation -------------------------------------------------------------------------------------------------


class Plain:
    """Generation with one network in eval mode, one request at a time and everything anew for each."""

    def __init__(self, model: MedPLIBForCausalLM, processor: MedPLIBProcessor) -> None:
        self.model, self.processor = model, processor

    def encode(self, request: Request) -> EncodedSample:
        """A request as the processor gives it."""
        pixels = read_image(request.image).pixels
        regions = [read_mask(path) for path in request.regions]  # type: ignore[arg-type]
        turns = [Turn("human", f"{IMAGE_TOKEN}\n{request.question}")]
        return self.processor.encode_prompt(turns, [pixels], regions=regions)

    def inputs(self, encoded: Sequence[EncodedSample]) -> Inputs:
        """What ``generate`` takes, on the device, prompts padded on the left; also ``sam_pixel_values``."""
        batch = self.processor.collate(list(encoded), padding_side="left")
        names = ("input_ids", "attention_mask", "pixel_values", "region_masks", "region_image", "sam_pixel_values")
        given = {name: batch[name].to(self.model.device) for name in names if batch.get(name) is not None}
        return {name: one.to(self.model.dtype) if one.is_floating_point() else one for name, one in given.items()}

    def generate(self, inputs: Inputs, tokens: int) -> Tensor:
        """New tokens, long [B, n]."""
        given = {name: value for name, value in inputs.items() if name != "sam_pixel_values"}
        ends = {"eos_token_id": 2, "pad_token_id": 0}
        return self.model.generate(**given, max_new_tokens=tokens, do_sample=False, **ends)

    def answer(self, request: Request) -> tuple[str, list[Mask]]:
        """Text and masks of one request."""
        encoded = self.encode(request)
        inputs = self.inputs([encoded])
        states: list[Tensor] = []
        norm = self.model.model.decoder.norm
        hook = norm.register_forward_hook(lambda _module, _inputs, out: states.append(out[0, -1]))
        try:
            ids = self.generate(inputs, request.settings.max_new_tokens)[0].tolist()
        finally:
            hook.remove()
        text = self.processor.decode_text(ids)
        places = [place for place, token in enumerate(ids) if token == self.model.config.seg_token_id]
        if not places:
            return text, []
        count = len(places)
        decoded = self.model.decode_masks(
            torch.stack([states[place] for place in places]),
            self.model.encode_segmented_images(inputs["sam_pixel_values"]),
            torch.zeros(count, dtype=torch.long, device=self.model.device),
            [encoded.sam_size] * count,
            [encoded.image_size] * count,
        )
        scores = decoded.iou_predictions.float().flatten().tolist()
        masks = [threshold_mask(logits, self.model.config.mask.threshold) for logits in decoded.mask_logits]
        labels = mask_labels(text, request.question, count)
        return text, [Mask.from_array(*one) for one in zip(masks, labels, scores, strict=True)]

    def seconds_per_step(self, inputs: Inputs, steps: int) -> float:
        """Mean seconds of a decoding step of a batch of prompts, the prefill not counted; no row may end early."""
        cuda = self.model.device.type == "cuda"
        begin: list[float] = []

        def prefilled(*_: object) -> None:
            if not begin:
                if cuda:
                    torch.cuda.synchronize()
                begin.append(time.perf_counter())

        hook = self.model.lm_head.register_forward_hook(prefilled)
        try:
            ids = self.generate(inputs, steps + 1)
            if cuda:
                torch.cuda.synchronize()
            end = time.perf_counter()
        finally:
            hook.remove()
        assert ids.shape[1] == steps + 1, "an answer ended before its time"
        return (end - begin[0]) / steps


# --- measurements -----------------------------------------------------------------------------------------------------


class Bench:
    """The measurements of one network in eval mode; the engine and plain generation take turns in every round."""

    def __init__(self, model: MedPLIBForCausalLM, processor: MedPLIBProcessor, options: Namespace) -> None:
        self.model, self.processor, self.options = model, processor, options
        self.clock, self.memory = Clock(model.device, options.rounds), PeakMemory(model.device)
        self.hardware = Hardware.measure(self.clock, model.dtype)
        self.limits, self.plain = Limits(model, self.hardware), Plain(model, processor)
        self.script = None if options.random is None else Script(model, processor)
        self.max_length = min(LENGTH, model.config.text_config.max_position_embeddings)
        self.cuda = model.device.type == "cuda"

    def describe(self, name: str) -> str:
        """What was measured, and what the limits are made of."""
        options, read = self.options, self.limits.step_bytes(1, 0)
        where = torch.cuda.get_device_name(self.model.device) if self.cuda else f"CPU, threads: {options.threads}"
        chosen = {"graphs": options.graphs, "kernels": options.kernels, "compiled": options.compile or None}
        return (
            f"`{name}` in {str(self.model.dtype).removeprefix('torch.')}, {options.quantisation or 'no'} quantisation, "
            f"on {where}; settings: {({key: on for key, on in chosen.items() if on is not None}) or 'the default ones'}"
            f"; medians of rounds: {options.rounds}. Copies at {number(self.hardware.bandwidth / 1e9)} GB/s, matrix "
            f"products at {number(self.hardware.rate / 1e12)} TFLOP/s; weights {number(weight_bytes(self.model) / 1e6)}"
            f" MB, of which one token reads {number(read / 1e6)} MB. Targets are set for "
            f"{'7B sizes in bf16 on an H200' if self.cuda else 'the nano on two CPU cores'}."
        )

    @contextmanager
    def answers(self, *, tokens: int | None = None, grounded: bool = False) -> Iterator[None]:
        """Answers end at ``tokens`` alone, or are the network's own; random ones say a few words or give a mask."""
        if self.script is not None:
            words = self.script.words(GROUNDED if grounded else WORDS)
            self.script.write(words if tokens is None else self.script.plain_words(tokens))
        elif tokens is not None:
            with without_end(self.model):
                yield
            return
        yield

    def engine(self, slots: int, *, cached: bool = True, **settings: Any) -> Engine:
        """An engine whose caches hold all that the sample shows, or nothing."""
        gc.collect()  # of the last engine
        opening = slot_bytes(self.model.config.text_config, self.model.config.visual_tokens + 64, self.model.dtype)
        room = 256 + 32 * opening // _MB if cached else 0
        chosen = {"max_length": self.max_length, "image_cache_mb": room, "prefix_cache_mb": room, **settings}
        flags = {"graphs": self.options.graphs, "kernels": self.options.kernels, "compiled": self.options.compile}
        return Engine(self.model, self.processor, EngineSettings(slots=slots, **chosen, **flags))

    def peak(self, work: Work) -> int:
        """Bytes of memory that some work needs at most, weights included."""
        gc.collect()
        self.memory.reset()
        work()
        self.clock.wait()
        return self.memory.read()

    def length(self, request: Request) -> int:
        """Tokens of a request's prompt."""
        return len(self.plain.encode(request).input_ids) - 1 + self.model.config.visual_tokens

    # --- decoding: a step of 1, 8 and 32 rows, from states to chosen tokens; plain rows are padded on the left

    def decoding(self) -> list[Row]:
        rows = []
        with self.answers(tokens=READING + SETTLE + STEPS):
            for batch in CONCURRENCY:
                requests = sample_questions(batch, MIXED, READING + SETTLE + STEPS)
                inputs = self.plain.inputs([self.plain.encode(request) for request in requests])
                engine = self.engine(batch, prefill_chunk=CHUNK)
                plain_peak = self.peak(lambda inputs=inputs: self.plain.seconds_per_step(inputs, STEPS))
                peak = self.peak(lambda engine=engine, requests=requests: self._engine_step(engine, requests))
                rounds = range(self.clock.rounds)
                times = [
                    (self._engine_step(engine, requests), self.plain.seconds_per_step(inputs, STEPS)) for _ in rounds
                ]
                ours, theirs = (statistics.median(side) for side in zip(*times, strict=True))
                context = round(statistics.fmean(map(self.length, requests))) + SETTLE + STEPS // 2
                more = {"note": f"{context} tokens of context; {number(batch / ours)} tokens a second"}
                if self.cuda and batch == 1:
                    more["target"] = target("at most 4.5 ms", ours <= 0.0045)
                if self.cuda and batch == 32:
                    more["target"] = target("at least 2,500 tokens a second", batch / ours >= 2500)
                limit, what = self.limits.step(batch, context), f"a step of {batch} row{'s' * (batch > 1)}"
                rows.append(row("decoding", what, "ms", ours, theirs, limit, (peak, plain_peak), **more))
        return rows

    def _engine_step(self, engine: Engine, requests: Sequence[Request]) -> float:
        """Mean seconds of a step in which every request decodes a token."""
        tickets = [engine.submit(request) for request in requests]
        while engine.status()["waiting"]:
            engine.step()
        for _ in range(-(-sum(map(self.length, requests)) // CHUNK) + SETTLE):
            engine.step()
        seconds = self.clock.once(lambda: [engine.step() for _ in range(STEPS)]) / STEPS
        if engine.status()["running"] != len(requests):
            raise MedPLIBError("an answer ended while decoding was timed; this network cannot be timed so")
        for ticket in tickets:
            ticket.cancel()
        while engine.busy:
            engine.step()
        return seconds

    # --- before the first token: reading a prompt whose image is encoded, and encoding images

    def before(self) -> list[Row]:
        with self.answers(tokens=ANSWER):
            rows = [self._first_token(more_words) for more_words in (0, 300)]
        config, model = self.model.config, self.model
        clip_size, sam_size = config.vision_config.image_size, config.sam_config.vision_config.image_size
        clip, sam, many = (
            torch.zeros(count, 3, size, size, dtype=model.dtype, device=model.device)
            for count, size in ((1, clip_size), (1, sam_size), (TOGETHER, sam_size))
        )
        tower, encoder = model.model.vision_tower, model.model.sam.image_encoder
        alone = 0.0
        for what, part, count, work in (
            ("CLIP tower, an image", tower, 1, lambda: model.encode_images(clip)),
            ("SAM encoder, an image", encoder, 1, lambda: model.encode_segmented_images(sam)),
            (f"SAM encoder, one of {TOGETHER}", encoder, TOGETHER, lambda: model.encode_segmented_images(many)),
        ):
            peak, (seconds,), limit = self.peak(work), self.clock.medians(work), self.limits.encoder(part, work)
            alone = seconds if count == 1 else alone  # plain generation encodes one at a time
            rows.append(row("before", what, "ms", seconds / count, alone, limit / count, (peak, peak)))
        return rows

    def _first_token(self, more_words: int) -> Row:
        (request,) = sample_questions(1, GROUNDING, 1)
        more_words = max(0, min(more_words, self.max_length - self.length(request) - 16))
        pixels = read_image(request.image).pixels
        engine = self.engine(1, prefix_cache_mb=0)
        request = replace(request, question=request.question + " a" * more_words, image=engine.prepare(request.image))
        turns = [Turn("human", f"{IMAGE_TOKEN}\n{request.question}")]
        clip = self.processor.clip_input(pixels)[None].to(self.model.device, self.model.dtype)
        features = self.model.encode_images(clip)

        def plain() -> Tensor:
            inputs = self.plain.inputs([self.processor.encode_prompt(turns, [pixels], pixels=False)])
            return self.plain.generate({**inputs, "image_features": features}, 1)

        length = len(self.processor.encode_prompt(turns, [pixels], pixels=False).input_ids) - 1 + features.shape[1]
        plain_peak, peak = self.peak(plain), self.peak(lambda: engine.ask(request))
        ours, theirs = self.clock.medians(lambda: engine.ask(request), plain)
        limit, peaks = self.limits.prefill(length), (peak, plain_peak)
        what, note = f"first token after {length}", "image encoded before"
        return row("before", what, "ms", ours, theirs, limit, peaks, note=note)

    # --- one grounded answer, from the image file to text and mask

    def grounded(self) -> list[Row]:
        with self.answers(grounded=True):
            cold, warm = self.engine(1, cached=False), self.engine(1)
            with_masks = (request for request in sample_questions(4 * ASKED, GROUNDING) if cold.ask(request).masks)
            asked = list(islice(with_masks, ASKED))
            if not asked:
                raise MedPLIBError("the network gives no mask for any of the sample's questions; time another one")
            answers = [warm.ask(request) for request in asked]  # fills its caches too
            works: list[Work] = [lambda: [cold.ask(one) for one in asked], lambda: [warm.ask(one) for one in asked]]
            works.append(lambda: [self.plain.answer(request) for request in asked])
            *peaks, plain_peak = (self.peak(work) for work in works)
            *ours, theirs = (seconds / len(asked) for seconds in self.clock.medians(*works))
        tokens = statistics.fmean(one.new_tokens + (one.finish == "end") for one in answers)
        masks = statistics.fmean(len(one.masks) for one in answers)
        rows = []
        for name, seconds, peak in zip(("cold", "warm"), ours, peaks, strict=True):
            more = {"note": f"{number(tokens)} tokens and {number(masks)} masks each"}
            if self.cuda:
                more["target"] = target("at most 60 ms", seconds <= 0.06)
            what, peaks_of = f"a grounded answer, caches {name}", (peak, plain_peak)
            rows.append(row("grounded", what, "ms", seconds, theirs, None, peaks_of, **more))
        return rows

    # --- requests a second, by workload, concurrency and caches; caches are empty when a round begins

    def requests(self) -> list[Row]:
        rows = []
        count, third = self.options.requests, max(1, self.options.requests // 3)
        most = self.options.plain_requests or count
        for name, requests, alone in (
            ("mixed", sample_questions(count, MIXED), most),
            ("grounding", sample_questions(third, GROUNDING), most),
            ("long answers", sample_questions(third, MIXED), max(1, min(most, third) // 4)),
        ):
            with self.answers(tokens=ANSWER if name == "long answers" else None, grounded=name == "grounding"):
                texts: list[str] = []
                first = requests[:alone]  # what is answered one at a time
                plain_peak = self.peak(lambda texts=texts, first=first: texts.extend(self._plain_texts(first)))
                for concurrency in CONCURRENCY:
                    rows += self._serve(name, requests, first, concurrency, texts, plain_peak)
        return rows

    def _plain_texts(self, requests: Sequence[Request]) -> list[str]:
        return [self.plain.answer(request)[0] for request in requests]

    def _serve(
        self,
        name: str,
        requests: Sequence[Request],
        first: Sequence[Request],
        concurrency: int,
        texts: list[str],
        plain_peak: int,
    ) -> list[Row]:
        engine, asked = self.engine(concurrency), first if concurrency == 1 else requests
        list(engine.answer_all(asked[: 2 * concurrency]))  # warms up
        found: dict[bool, dict[int, Answer | MedPLIBError]] = {False: {}, True: {}}
        times: dict[bool, list[float]] = {False: [], True: []}
        peaks, plain_times = {False: 0, True: 0}, []
        for _ in range(self.clock.rounds):
            for cached in times:
                empty_caches(engine, cached)
                self.memory.reset()
                times[cached].append(self.clock.once(lambda to=found[cached]: to.update(engine.answer_all(asked))))
                peaks[cached] = max(peaks[cached], self.memory.read())
            plain_times.append(self.clock.once(lambda: self._plain_texts(first)))
        plain_rate, bound = len(texts) / statistics.median(plain_times), {1: 1, 8: 3}.get(concurrency)
        rows = []
        for cached, setting in ((False, "off"), (True, "on")):
            same = 0
            for place, answer in found[cached].items():
                if isinstance(answer, MedPLIBError):
                    raise answer
                same += place < len(texts) and answer.text == texts[place]
            rate = len(asked) / statistics.median(times[cached])
            images = len({request.image for request in asked})
            more = {"note": f"{len(asked)} requests, {images} images; same text: {same} of {len(texts)}"}
            if bound and not self.cuda:
                more["target"] = target(f"at least {bound} × plain", rate >= bound * plain_rate)
            what = f"{name}, concurrency {concurrency}, caches {setting}"
            rows.append(row("requests", what, "a second", rate, plain_rate, None, (peaks[cached], plain_peak), **more))
        return rows


def row(
    section: str,
    what: str,
    unit: str,
    engine: float,
    plain: float,
    limit: float | None,
    peaks: tuple[int, int],
    **more: str,
) -> Row:
    """One measurement: seconds of a piece of work, shown as ``ms``, or pieces of work ``a second``, without limit."""
    scale, gain = (1e3, plain / engine) if unit == "ms" else (1.0, engine / plain)
    times: Row = {"engine": engine * scale, "plain": plain * scale, "gain": gain}
    if limit is not None:
        times |= {"limit": limit * scale, "of the limit": limit / engine}
    memory: Row = {"engine peak MB": peaks[0] / 1e6, "plain peak MB": peaks[1] / 1e6}
    return {"section": section, "what": what, "unit": unit} | times | memory | more


def target(claim: str, met: bool) -> str:
    """Whether a target was met."""
    return f"{claim}: {'met' if met else 'missed'}"


def empty_caches(engine: Engine, cached: bool) -> None:
    """Let an engine forget all images and openings, and keep none unless ``cached``."""
    settings = engine.settings
    for cache, room in ((engine.images, settings.image_cache_mb), (engine.prefixes, settings.prefix_cache_mb)):
        cache.max_bytes = 0
        cache.refresh()
        cache.max_bytes = room * _MB if cached else 0


if __name__ == "__main__":
    sys.exit(main())
