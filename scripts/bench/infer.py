"""Measure the engine beside plain generation and beside the hardware's limits; one dated report.

    python scripts/bench/infer.py [--model DIR] [--device cuda] [--threads 2] [--dtype bf16] [--out docs/benchmarks]

Plain generation answers one request at a time: transformers' ``generate`` with a dynamic cache, then the masks of that
request. Both sides get the same requests, in turns, in one process. Requests are those of ``data/sample``.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import transformers

from model.data.readers import read_image, read_mask
from model.inference.answer import Mask, mask_labels
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.inference.loading import load_for_inference
from model.inference.runner import DecoderRunner
from model.inference.slots import SlotCache
from model.modeling.medplib import MedPLIBForCausalLM
from model.modeling.moe import MoEFeedForward
from model.processing.conversation import Turn
from model.processing.masks import threshold_mask
from model.processing.processor import MedPLIBProcessor
from model.processing.tokens import IMAGE_TOKEN

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data" / "sample"
BATCHES = (1, 8, 32)
CONTEXT = 160  # tokens a slot holds while decoding is timed
ANSWER = 48  # tokens at most
Rows = list[tuple[str, ...]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "medplib-nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="fp32 on a CPU, else as stored, when absent")
    parser.add_argument("--quantisation", choices=("int8", "int4"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--requests", type=int, default=96, help="requests a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", metavar="DIR")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[options.dtype]
    model, processor, _ = load_for_inference(
        options.model, options.device, dtype=dtype, quantisation=options.quantisation
    )
    bench = Bench(model.eval(), processor, options.rounds)
    requests = sample_requests(options.requests)
    with torch.inference_mode():
        parts = [
            ("Limits", ("", "measured"), bench.limits()),
            ("One token", ("batch", "engine ms", "tokens/s", "limit ms", "times limit"), bench.decoding()),
            ("Before the first token", ("", "ms", "a second"), bench.before()),
            ("Requests", HEAD, bench.serving(requests)),
        ]
    text = report(options, model, parts)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{datetime.now(UTC):%Y-%m-%d}-infer-{options.model.name}-{model.device.type}.md"
    (options.out / name).write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


HEAD = ("requests", "concurrency", "caches", "engine a second", "plain a second", "times plain", "same text")


class Bench:
    """The measurements of one loaded model; each is a median of rounds after a warm-up."""

    def __init__(self, model: MedPLIBForCausalLM, processor: MedPLIBProcessor, rounds: int) -> None:
        self.model, self.processor, self.rounds = model, processor, rounds
        self.bandwidth = self.rate = 0.0

    def seconds(self, work: Callable[[], object], repeats: int = 1) -> float:
        """Median seconds of one call."""
        work()
        times = []
        for _ in range(self.rounds):
            self.wait()
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            self.wait()
            times.append((time.perf_counter() - start) / repeats)
        return statistics.median(times)

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def limits(self) -> Rows:
        """Copy bandwidth (read and written bytes) and the rate of matrix products, in the model's own type."""
        device, dtype = self.model.device, self.model.dtype
        source = torch.ones(64 * 2**20, dtype=dtype, device=device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.nbytes / self.seconds(lambda: target.copy_(source), 4)
        side = 1024 if device.type == "cpu" else 8192
        square = torch.ones(side, side, dtype=dtype, device=device)
        self.rate = 2 * side**3 / self.seconds(lambda: square @ square, 4)
        return [
            ("copy bandwidth", f"{self.bandwidth / 1e9:.1f} GB/s"),
            (f"matrix products ({side} × {side})", f"{self.rate / 1e12:.2f} TFLOP/s"),
            ("weights read for one token", f"{self.active_bytes(1) / 1e6:.2f} MB"),
        ]

    def active_bytes(self, batch: int) -> int:
        """Bytes of decoder and output weights that a step of ``batch`` tokens must read."""
        decoder = self.model.model.decoder
        total = sum(value.nbytes for value in decoder.layers.parameters()) + self.model.lm_head.weight.nbytes
        if batch == 1:  # of a mixture, one token needs as many experts as it is sent to
            for layer in decoder.layers.modules():
                if isinstance(layer, MoEFeedForward):
                    experts = sum(value.nbytes for value in layer.experts.parameters())
                    total -= round(experts * (1 - layer.top_k / layer.num_experts))
        return total

    def decoding(self) -> Rows:
        """A decoding step over slots, output layer and arg-max included; the limit is reading the weights."""
        rows: Rows = []
        for batch in BATCHES:
            cache = SlotCache(self.model.config.text_config, batch, 2 * CONTEXT, self.model.dtype, self.model.device)
            runner = DecoderRunner(self.model.model.decoder, cache)
            tokens = torch.arange(5, 5 + batch, device=self.model.device)
            lengths = torch.full_like(tokens, CONTEXT)
            seconds = self.seconds(partial(self.step, runner, tokens, lengths), 20)
            limit = max(
                self.active_bytes(batch) / self.bandwidth * 2,  # a copy moves each byte twice
                self.operations(batch) / self.rate,
            )
            cells = (f"{seconds * 1e3:.2f}", f"{batch / seconds:.0f}", f"{limit * 1e3:.2f}", f"{seconds / limit:.1f}")
            rows.append((str(batch), *cells))
        return rows

    def step(self, runner: DecoderRunner, tokens: torch.Tensor, lengths: torch.Tensor) -> list[int]:
        """One greedy decoding step."""
        hidden = runner.decode(tokens, lengths, -(-(CONTEXT + 1) // 64) * 64).hidden
        return self.model.lm_head(hidden).argmax(dim=-1).tolist()

    def operations(self, batch: int) -> float:
        """Floating point operations of a step: two for each weight at work and token."""
        return 2.0 * batch * self.active_bytes(1) / self.model.dtype.itemsize

    def before(self) -> Rows:
        """Encoding an image and reading a prompt."""
        config, device, dtype = self.model.config, self.model.device, self.model.dtype
        clip = torch.zeros(1, 3, config.vision_config.image_size, config.vision_config.image_size)
        sam = torch.zeros(1, 3, config.sam_config.vision_config.image_size, config.sam_config.vision_config.image_size)
        clip, sam = clip.to(device, dtype), sam.to(device, dtype)
        runner = DecoderRunner(self.model.model.decoder, SlotCache(config.text_config, 1, 1024, dtype, device))
        embeds = torch.zeros(1, 512, config.text_config.hidden_size, device=device, dtype=dtype)
        rows: Rows = []
        for name, work, units in (
            ("CLIP tower, images", lambda: self.model.encode_images(clip), 1),
            ("SAM encoder, images", lambda: self.model.encode_segmented_images(sam), 1),
            ("prefill of 512 tokens, tokens", lambda: runner.prefill(embeds, 0), 512),
        ):
            seconds = self.seconds(work, 3)
            rows.append((name, f"{seconds * 1e3:.2f}", f"{units / seconds:.0f}"))
        return rows

    def serving(self, requests: Sequence[Request]) -> Rows:
        """Requests answered in a second, engine and plain in turns."""
        grounding = [request for request in requests if is_grounding(request)]
        rows: Rows = []
        for what, some in (("mixed", requests), ("grounding", grounding)):
            for concurrency in (1, 8, 32):
                for cached in (False, True):
                    rows.append(self.serve(what, some, concurrency, cached))
        return rows

    def serve(self, what: str, requests: Sequence[Request], concurrency: int, cached: bool) -> tuple[str, ...]:
        """One row; without caches every request reads, encodes and prefills its image anew, as plain does."""
        room = 256 if cached else 0
        times: dict[str, list[float]] = {"engine": [], "plain": []}
        agree = 0
        for number in range(self.rounds + 1):  # the first warms up
            engine = Engine(
                self.model,
                self.processor,
                EngineSettings(slots=concurrency, image_cache_mb=room, prefix_cache_mb=room, max_length=512),
            )
            start = time.perf_counter()
            answers = dict(engine.answer_all(requests))
            self.wait()
            middle = time.perf_counter()
            texts = [plain_answer(self.model, self.processor, request)[0] for request in requests]
            self.wait()
            if number:
                times["engine"].append(middle - start)
                times["plain"].append(time.perf_counter() - middle)
            agree = sum(getattr(answers[place], "text", None) == text for place, text in enumerate(texts))
        ours, plain = (len(requests) / statistics.median(times[side]) for side in ("engine", "plain"))
        same = f"{agree} of {len(requests)}"
        return (
            what,
            str(concurrency),
            "on" if cached else "off",
            f"{ours:.1f}",
            f"{plain:.1f}",
            f"{ours / plain:.2f}",
            same,
        )


def plain_answer(model: MedPLIBForCausalLM, processor: MedPLIBProcessor, request: Request) -> tuple[str, list[Mask]]:
    """One request by transformers' ``generate`` and, where ``<SEG>`` was said, its masks."""
    data = read_image(request.image)
    pixels = data.pixels
    regions = [read_mask(path) for path in request.regions]  # type: ignore[arg-type]
    turns = [Turn("human", f"{IMAGE_TOKEN}\n{request.question}")]
    encoded = processor.encode_prompt(turns, [pixels], regions=regions)
    batch = processor.collate([encoded], padding_side="left")
    names = ("input_ids", "attention_mask", "pixel_values", "region_masks", "region_image")
    inputs = {name: on_device(batch[name], model) for name in names if batch.get(name) is not None}
    states: list[torch.Tensor] = []
    hook = model.model.decoder.norm.register_forward_hook(lambda _module, _inputs, out: states.append(out[0, -1]))
    try:
        ids = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False, eos_token_id=2, pad_token_id=0)[
            0
        ].tolist()
    finally:
        hook.remove()
    text = processor.decode_text(ids)
    places = [place for place, token in enumerate(ids) if token == model.config.seg_token_id]
    if not places:
        return text, []
    embedding = model.encode_segmented_images(on_device(batch["sam_pixel_values"], model))
    count = len(places)
    decoded = model.decode_masks(
        torch.stack([states[place] for place in places]),
        embedding,
        torch.zeros(count, dtype=torch.long, device=model.device),
        [encoded.sam_size] * count,
        [encoded.image_size] * count,
    )
    labels = mask_labels(text, request.question, count)
    scores = decoded.iou_predictions.float().flatten().tolist()
    threshold = model.config.mask.threshold
    arrays = [threshold_mask(logits, threshold) for logits in decoded.mask_logits]
    return text, [Mask.from_array(*item) for item in zip(arrays, labels, scores, strict=True)]


def on_device(value: torch.Tensor, model: MedPLIBForCausalLM) -> torch.Tensor:
    """A tensor where the model is, floats in its type."""
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


def sample_requests(count: int) -> list[Request]:
    """Questions about images, regions and for masks in turn, spread over the sample's pictures."""
    kinds = [json.loads((SAMPLE / f"{task}.json").read_text("utf-8")) for task in ("vqa", "region", "grounding")]
    requests = []
    for number in range(count):
        records = kinds[number % 3]
        record = records[number * 7 % len(records)]
        question = record["conversations"][0]["value"].replace("<image>", "").strip()
        paths = re.findall(r"<region>(.*?)</region>", question)
        question = re.sub(r"<region>.*?</region>", "<region></region>", question)
        requests.append(
            Request(
                SAMPLE / record["image"],
                question,
                [SAMPLE / path for path in paths],
                settings=GenerationSettings(max_new_tokens=ANSWER),
            )
        )
    return requests


def is_grounding(request: Request) -> bool:
    """Whether it asks for a mask."""
    return bool(re.search(r"segment|mask|outline|show me|mark the", request.question, re.IGNORECASE))


def report(
    options: argparse.Namespace, model: MedPLIBForCausalLM, parts: Sequence[tuple[str, tuple[str, ...], Rows]]
) -> str:
    """The whole page."""
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else f"CPU, {options.threads} threads"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    lines = [
        f"# Inference, {datetime.now(UTC):%d %B %Y}",
        "",
        f"`{options.model.name}` in {str(model.dtype).removeprefix('torch.')}"
        f"{f', {options.quantisation} weights' if options.quantisation else ''} on {device} ({platform.machine()}); "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"commit {commit.stdout.strip() or 'unknown'}. "
        f"Medians of {options.rounds} rounds of {options.requests} requests. Made by `scripts/bench/infer.py`; plain "
        "generation is described there.",
    ]
    for title, head, rows in parts:
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *targets(parts[-1][2])]
    return "\n".join(lines) + "\n"


def targets(rows: Rows) -> list[str]:
    """What was promised of the mixed requests without caches, and whether it held."""
    ratio = {row[1]: float(row[5]) for row in rows if row[0] == "mixed" and row[2] == "off"}
    verdict = {True: "met", False: "missed"}
    return [
        f"- At concurrency 8 at least 3 × plain generation: {ratio['8']:.2f}, {verdict[ratio['8'] >= 3]}.",
        f"- At concurrency 1 no slower than plain generation: {ratio['1']:.2f}, {verdict[ratio['1'] >= 1]}.",
    ]


if __name__ == "__main__":
    sys.exit(main())
