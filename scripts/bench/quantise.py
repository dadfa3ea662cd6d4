"""Measure what quantised weights cost and save: bytes, time of a token, and quality on held-out phantoms; one table.

    python scripts/bench/quantise.py MODEL --data DIR [--threads 1 2] [--records 200] [--layer 4096 11008]

DIR holds records with images and masks: ``data/sample`` (its ``held_out.json`` is taken) or a folder of
``medplib data build phantom``. Everything is compared with the same network in fp32. Quantised networks keep the rest
of their numbers in fp32 on a CPU and in bf16 on CUDA.

Quality is told three ways: cross-entropy and most likely token at every place of the reference answers, given what
comes before (no decoding); greedy answers, compared with those of fp32 and with the references; and the masks of those
answers.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig

from model.data.image_io import read_image, read_mask
from model.data.records import open_records
from model.data.schema import Sample, parse_record
from model.errors import MedPLIBError
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.inference.loading import load_for_inference, usable_device
from model.inference.quantise import DEFAULT_GROUP_SIZE, GROUP_SIZES, quantise, weight_bytes
from model.inference.quantised_linear import Int4Linear, Int8Linear, QuantisedLinear
from model.inference.runner import DecoderRunner
from model.inference.slots import SlotCache
from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER
from model.modeling.decoder import MedPLIBDecoder
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import IMAGE_TOKEN

BATCHES = (1, 8)
CONTEXT = 160  # tokens a slot holds while a token is timed
ANSWER = 48  # tokens of an answer, at most
TASKS = ("vqa", "region", "grounding")


@dataclass
class Column:
    """One kind of weights and what was measured: cells by row title, and what later columns are compared with."""

    name: str
    dtype: torch.dtype
    scheme: str | None
    cells: dict[str, str] = field(default_factory=dict)
    likeliest: list[torch.Tensor] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def main() -> int:
    options = build_parser().parse_args()
    try:
        columns = run(options)
    except MedPLIBError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(table(columns) + "\n")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("--data", type=Path, required=True, help="folder of records, images and masks")
    parser.add_argument("--records", type=int, default=200, help="records that quality is measured on")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=DEFAULT_GROUP_SIZE, help="of int4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads to time with")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, of which the median counts")
    parser.add_argument(
        "--layer", type=int, nargs=2, metavar=("D", "F"), help="time one random dense layer of these widths too"
    )
    return parser


def run(options: argparse.Namespace) -> list[Column]:
    """Measure every column."""
    check(options)
    device = usable_device(options.device)
    rest = torch.float32 if device.type == "cpu" else torch.bfloat16
    columns = [
        Column("fp32", torch.float32, None),
        Column("bf16", torch.bfloat16, None),
        Column("int8", rest, "int8"),
        Column(f"int4, groups of {options.group_size}", rest, "int4"),
    ]
    threads = options.threads if device.type == "cpu" else [torch.get_num_threads()]
    samples = read_samples(options.data, options.records)
    timer = Timer(threads, options.rounds, device)
    for column in columns:
        model, processor, _ = load_for_inference(options.model, device, dtype=column.dtype)
        shrink(model, column, options.group_size)
        with torch.inference_mode():
            measure_size(column, model)
            timer.decoding(column, model.model.decoder, model.lm_head, "a token of the model")
            measure_likelihood(column, columns[0], model, processor, samples)
            measure_answers(column, columns[0], model, processor, samples)
        del model, processor
        gc.collect()
        if options.layer:
            with torch.inference_mode():
                decoder = one_layer(*options.layer, column, device, options.group_size)
                timer.decoding(column, decoder, None, f"a token through one layer, {options.layer[0]} wide")
                del decoder
            gc.collect()
    return columns


def check(options: argparse.Namespace) -> None:
    """Refuse what would fail after minutes."""
    for name in ("records", "rounds"):
        if getattr(options, name) < 1:
            raise MedPLIBError(f"--{name} is {getattr(options, name)}; give at least 1")
    if min(options.threads) < 1:
        raise MedPLIBError(f"--threads is {options.threads}; give numbers of at least 1")
    if options.layer and any(width < 1 or width % 128 for width in options.layer):
        raise MedPLIBError(f"--layer is {options.layer}; give two multiples of 128")


def shrink(model: MedPLIBForCausalLM, column: Column, group_size: int) -> None:
    """Quantise a network if the column says so."""
    if column.scheme == "int8":
        quantise(model, "int8")
    elif column.scheme == "int4":
        quantise(model, "int4", group_size=group_size)


def read_samples(folder: Path, count: int) -> list[Sample]:
    """So many records, the same number of every data file, evenly spaced in it."""
    files = [folder / "held_out.json"]
    if not files[0].is_file():
        files = [path for task in TASKS if (path := folder / f"{task}.json").is_file()]
    if not files:
        raise MedPLIBError(
            f"{folder} holds no held_out.json, vqa.json, region.json or grounding.json; name another folder"
        )
    samples = []
    for number, path in enumerate(files):
        records = open_records(path)
        share = min(len(range(number, count, len(files))), len(records))
        samples += [parse_record(records[place * len(records) // share], folder) for place in range(share)]
    return samples


# --- size and time --------------------------------------------------------------------------------------------------


def measure_size(column: Column, model: MedPLIBForCausalLM) -> None:
    """Bytes of the weights, and which kernel multiplies them."""
    column.cells["whole network, MB"] = f"{weight_bytes(model) / 1e6:.2f}"
    column.cells["decoder's layers, MB"] = f"{weight_bytes(model.model.decoder.layers) / 1e6:.2f}"
    kernels = {one.kernel_name for one in model.modules() if isinstance(one, QuantisedLinear)}
    column.cells["kernel"] = ", ".join(sorted(kernels)) or "torch"


class Timer:
    """Times decoding steps; medians of rounds after a warm-up."""

    def __init__(self, threads: Sequence[int], rounds: int, device: torch.device) -> None:
        self.threads, self.rounds, self.device = threads, rounds, device

    def decoding(self, column: Column, decoder: MedPLIBDecoder, head: torch.nn.Module | None, what: str) -> None:
        """Milliseconds of a step over slots, each holding ``CONTEXT`` tokens, by batch and threads."""
        dtype = decoder.embed_tokens.weight.dtype
        for batch in BATCHES:
            cache = SlotCache(decoder.config, batch, 2 * CONTEXT, dtype, self.device)
            runner = DecoderRunner(decoder, cache)
            tokens = torch.arange(5, 5 + batch, device=self.device)
            lengths = torch.full_like(tokens, CONTEXT)
            for threads in self.threads:
                torch.set_num_threads(threads)
                seconds = self._seconds(partial(step, runner, head, tokens, lengths))
                company = f", {threads} thread{'s' * (threads > 1)}" if self.device.type == "cpu" else ""
                column.cells[f"{what}, batch {batch}{company}, ms"] = f"{seconds * 1e3:.2f}"

    def _seconds(self, work: Callable[[], object]) -> float:
        work()
        start = time.perf_counter()
        work()
        repeats = max(1, min(50, round(0.1 / (time.perf_counter() - start))))
        times = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            times.append((time.perf_counter() - start) / repeats)
        return statistics.median(times)


def step(
    runner: DecoderRunner, head: torch.nn.Module | None, tokens: torch.Tensor, lengths: torch.Tensor
) -> list[float]:
    """One greedy decoding step, waited for."""
    hidden = runner.decode(tokens, lengths, -(-(CONTEXT + 1) // 64) * 64).hidden
    return (hidden if head is None else head(hidden)).argmax(dim=-1).tolist()


def one_layer(width: int, inner: int, column: Column, device: torch.device, group_size: int) -> MedPLIBDecoder:
    """A dense decoder of one layer with random weights, its heads 128 wide."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=width // 128,
        pad_token_id=0,
    )
    decoder = MedPLIBDecoder(config).to(device, column.dtype).eval()
    kinds = {"int8": Int8Linear, "int4": partial(Int4Linear, group_size=group_size)}
    for name, module in list(decoder.layers.named_modules()):
        if column.scheme and type(module) is torch.nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(decoder.layers.get_submodule(parent), child, kinds[column.scheme](module.weight))
    return decoder


# --- quality --------------------------------------------------------------------------------------------------------


def measure_likelihood(
    column: Column,
    reference: Column,
    model: MedPLIBForCausalLM,
    processor: MedPLIBProcessor,
    samples: Sequence[Sample],
) -> None:
    """Cross-entropy and most likely tokens over the supervised places of the reference answers."""
    loss, places, same = 0.0, 0, 0
    for number, sample in enumerate(samples):
        logits, labels = reference_logits(model, processor, sample)
        loss += float(functional.cross_entropy(logits.float(), labels, reduction="sum"))
        likeliest = logits.argmax(dim=-1).cpu()
        column.likeliest.append(likeliest)
        same += int((likeliest == reference.likeliest[number]).sum())
        places += len(labels)
    column.cells["cross-entropy of the reference answers"] = f"{loss / places:.4f}"
    column.cells["most likely token as in fp32"] = f"{same / places:.2%}"


def reference_logits(
    model: MedPLIBForCausalLM, processor: MedPLIBProcessor, sample: Sample
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, V] and labels [n] at the supervised places of one sample."""
    pixels = [read_image(path).pixels for path in sample.images]
    masks, regions = ([read_mask(path) for path in paths] for paths in (sample.masks, sample.regions))
    encoded = processor.encode(sample.turns, pixels, regions, sample.region_images, masks, sample.segment_image)
    batch = processor.collate([encoded])
    ids = batch["input_ids"].to(model.device)
    features = model.encode_images(batch["pixel_values"].to(model.device, model.dtype))
    spliced = model.splice(
        ids,
        None,
        features,
        batch["region_masks"].to(model.device, model.dtype),
        batch["region_image"].to(model.device),
    )
    hidden = model.model.decoder(spliced.embeds).last_hidden_state[0]
    after = int((ids[0] == IMAGE_PLACEHOLDER).nonzero()[-1]) + 1 if len(pixels) else 1
    labels = batch["labels"][0, after:].to(model.device)  # what follows the last image lies at the sequence's end
    supervised = labels != IGNORE_INDEX
    return model.lm_head(hidden[-len(labels) - 1 : -1][supervised]), labels[supervised]


def measure_answers(
    column: Column,
    reference: Column,
    model: MedPLIBForCausalLM,
    processor: MedPLIBProcessor,
    samples: Sequence[Sample],
) -> None:
    """Greedy answers to the first question of every sample with one image, and their masks."""
    engine = Engine(model, processor, EngineSettings(slots=8))
    asked = [sample for sample in samples if len(sample.images) == 1 and not sample.examples]
    answers = dict(engine.answer_all(request_of(sample) for sample in asked))
    dices = []
    right = 0
    for place, sample in enumerate(asked):
        answer = answers[place]
        if isinstance(answer, MedPLIBError):
            raise answer
        column.texts.append(answer.text)
        right += answer.text == sample.turns[1].text.strip()
        for number, path in enumerate(sample.masks if len(sample.turns) == 2 else ()):
            truth = read_mask(path)
            found = answer.masks[number].to_array() if number < len(answer.masks) else truth & False
            dices.append(2 * float((found & truth).sum()) / max(float(found.sum() + truth.sum()), 1.0))
    same = sum(mine == theirs for mine, theirs in zip(column.texts, reference.texts, strict=True))
    column.cells["answers as in fp32"] = f"{same} of {len(asked)}"
    column.cells["answers as the reference"] = f"{right} of {len(asked)}"
    if dices:
        column.cells["mDice of their masks (0 where none was painted)"] = f"{statistics.fmean(dices):.4f}"


def request_of(sample: Sample) -> Request:
    """The first question of a sample."""
    question = sample.turns[0].text.replace(IMAGE_TOKEN, "").strip()
    regions = sample.regions if len(sample.turns) == 2 else ()
    return Request(sample.images[0], question, regions, settings=GenerationSettings(max_new_tokens=ANSWER))


def table(columns: Sequence[Column]) -> str:
    """One Markdown table: a column for each kind of weights."""
    titles = list(dict.fromkeys(title for column in columns for title in column.cells))
    lines = [f"| | {' | '.join(column.name for column in columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(column.cells.get(title, '–') for column in columns)} |" for title in titles]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
