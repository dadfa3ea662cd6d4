"""Measure what quantised weights cost and save: bytes, time of a token, and quality on held-out phantoms; one table.

    python scripts/bench/quantise.py MODEL --data DIR [--threads 1 2] [--records 200]

DIR holds records with images and masks: ``data/sample`` (its ``held_out.json`` is taken) or a folder of
``medplib data build phantom``. Everything is compared with the same network in fp32. Quantised networks keep the rest
of their numbers in fp32 on a CPU and in bf16 on CUDA.

Quality is given three ways: cross-entropy and most likely token at every place of the reference answers, given what
comes before (no decoding); greedy answers, compared with those of fp32 and with the references; and mDice of the masks
of those answers, 0 where there is none. Widths of other models are timed by ``infer.py --random --quantisation``.
"""

from __future__ import annotations

import gc
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from common import ANSWER, Clock, bench_parser, positive, publish
from torch import Tensor
from torch.nn import functional

from model.data.image_io import read_image, read_mask
from model.data.records import open_records
from model.data.schema import Sample, parse_record
from model.errors import MedPLIBError
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.inference.loading import load_for_inference, usable_device
from model.inference.quantise import DEFAULT_GROUP_SIZE, GROUP_SIZES, QuantisedLinear, quantise, weight_bytes
from model.inference.runner import DecoderRunner
from model.inference.slots import SlotCache
from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import IMAGE_TOKEN

BATCHES = (1, 8)
CONTEXT = 160  # tokens a slot holds while a token is timed
TASKS = ("vqa", "region", "grounding")


@dataclass
class Kind:
    """One kind of weights: its row of the table, and what later kinds are compared with."""

    name: str
    dtype: torch.dtype
    scheme: str | None
    row: dict[str, str | float] = field(default_factory=dict)
    likeliest: list[Tensor] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def main() -> int:
    parser = bench_parser(__doc__, None)
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("--data", type=Path, required=True, help="folder of records, images and masks")
    parser.add_argument("--records", type=positive, default=200, help="records that quality is measured on")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=DEFAULT_GROUP_SIZE, help="of int4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2], help="CPU threads to time with")
    parser.add_argument("--rounds", type=positive, default=5, help="timed rounds, of which the median counts")
    options = parser.parse_args()
    try:
        kinds = run(options)
    except MedPLIBError as error:
        parser.error(str(error))
    note = f"`{options.model.name}` on {options.device}, records: {options.records} of `{options.data}`."
    rows = [{"weights": kind.name} | kind.row for kind in kinds]
    publish(options.out, f"quantise-{options.model.name}-{options.device}", "Quantised weights", rows, [note])
    return 0


def run(options: Namespace) -> list[Kind]:
    """Measure every kind of weights."""
    device = usable_device(options.device)
    rest = torch.float32 if device.type == "cpu" else torch.bfloat16
    kinds = [
        Kind("fp32", torch.float32, None),
        Kind("bf16", torch.bfloat16, None),
        Kind("int8", rest, "int8"),
        Kind(f"int4, groups of {options.group_size}", rest, "int4"),
    ]
    threads = options.threads if device.type == "cpu" else [torch.get_num_threads()]
    samples, clock = read_samples(options.data, options.records), Clock(device, options.rounds)
    for kind in kinds:
        model, processor, _ = load_for_inference(options.model, device, dtype=kind.dtype)
        shrink(model, kind, options.group_size)
        with torch.inference_mode():
            measure_size(kind, model)
            measure_steps(kind, model, clock, threads)
            measure_likelihood(kind, kinds[0], model, processor, samples)
            measure_answers(kind, kinds[0], model, processor, samples)
        del model, processor
        gc.collect()
    return kinds


def shrink(model: MedPLIBForCausalLM, kind: Kind, group_size: int) -> None:
    """Quantise a network if the kind is a quantised one."""
    if kind.scheme is not None:
        quantise(model, kind.scheme, **({"group_size": group_size} if kind.scheme == "int4" else {}))


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


def measure_size(kind: Kind, model: MedPLIBForCausalLM) -> None:
    """Bytes of the weights, and which kernel multiplies them."""
    kernels = {one.kernel_name for one in model.modules() if isinstance(one, QuantisedLinear)}
    kind.row["whole network MB"] = weight_bytes(model) / 1e6
    kind.row["decoder's layers MB"] = weight_bytes(model.model.decoder.layers) / 1e6
    kind.row["kernel"] = ", ".join(sorted(kernels)) or "torch"


def measure_steps(kind: Kind, model: MedPLIBForCausalLM, clock: Clock, threads: Sequence[int]) -> None:
    """Milliseconds of a greedy step over slots, each holding ``CONTEXT`` tokens, by batch and threads."""
    decoder = model.model.decoder

    def step(runner: DecoderRunner, tokens: Tensor) -> list[int]:
        hidden = runner.decode(tokens, torch.full_like(tokens, CONTEXT), -(-(CONTEXT + 1) // 64) * 64).hidden
        return model.lm_head(hidden).argmax(dim=-1).tolist()

    for batch in BATCHES:
        cache = SlotCache(decoder.config, batch, 2 * CONTEXT, decoder.embed_tokens.weight.dtype, clock.device)
        runner, tokens = DecoderRunner(decoder, cache), torch.arange(5, 5 + batch, device=clock.device)
        for count in threads:
            torch.set_num_threads(count)
            (seconds,) = clock.medians(partial(step, runner, tokens))
            company = f", {count} thread{'s' * (count > 1)}" if clock.device.type == "cpu" else ""
            kind.row[f"a token, batch {batch}{company}, ms"] = seconds * 1e3


# --- quality --------------------------------------------------------------------------------------------------------


def measure_likelihood(
    kind: Kind, reference: Kind, model: MedPLIBForCausalLM, processor: MedPLIBProcessor, samples: Sequence[Sample]
) -> None:
    """Cross-entropy and most likely tokens over the supervised places of the reference answers."""
    loss, places, same = 0.0, 0, 0
    for number, sample in enumerate(samples):
        logits, labels = reference_logits(model, processor, sample)
        loss += float(functional.cross_entropy(logits.float(), labels, reduction="sum"))
        kind.likeliest.append(logits.argmax(dim=-1).cpu())
        same += int((kind.likeliest[-1] == reference.likeliest[number]).sum())
        places += len(labels)
    kind.row["cross-entropy of the references"] = f"{loss / places:.4f}"
    kind.row["most likely token as in fp32"] = f"{same / places:.2%}"


def reference_logits(model: MedPLIBForCausalLM, processor: MedPLIBProcessor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Logits [n, V] and labels [n] at the supervised places of one sample."""
    pixels = [read_image(path).pixels for path in sample.images]
    masks, regions = ([read_mask(path) for path in paths] for paths in (sample.masks, sample.regions))
    encoded = processor.encode(sample.turns, pixels, regions, sample.region_images, masks, sample.segment_image)
    batch = processor.collate([encoded])
    ids = batch["input_ids"].to(model.device)
    features = model.encode_images(batch["pixel_values"].to(model.device, model.dtype))
    regions_of = batch["region_masks"].to(model.device, model.dtype), batch["region_image"].to(model.device)
    hidden = model.model.decoder(model.splice(ids, None, features, *regions_of).embeds).last_hidden_state[0]
    after = int((ids[0] == IMAGE_PLACEHOLDER).nonzero()[-1]) + 1 if len(pixels) else 1
    labels = batch["labels"][0, after:].to(model.device)  # what follows the last image lies at the sequence's end
    supervised = labels != IGNORE_INDEX
    return model.lm_head(hidden[-len(labels) - 1 : -1][supervised]), labels[supervised]


def measure_answers(
    kind: Kind, reference: Kind, model: MedPLIBForCausalLM, processor: MedPLIBProcessor, samples: Sequence[Sample]
) -> None:
    """Greedy answers to the first question of every sample with one image, and their masks."""
    engine = Engine(model, processor, EngineSettings(slots=8))
    asked = [sample for sample in samples if len(sample.images) == 1 and not sample.examples]
    answers = dict(engine.answer_all(request_of(sample) for sample in asked))
    dices = []
    for place, sample in enumerate(asked):
        answer = answers[place]
        if isinstance(answer, MedPLIBError):
            raise answer
        kind.texts.append(answer.text)
        for number, path in enumerate(sample.masks if len(sample.turns) == 2 else ()):
            truth = read_mask(path)
            found = answer.masks[number].to_array() if number < len(answer.masks) else truth & False
            dices.append(2 * float((found & truth).sum()) / max(float(found.sum() + truth.sum()), 1.0))
    references = [sample.turns[1].text.strip() for sample in asked]
    for what, others in (("in fp32", reference.texts), ("the reference", references)):
        same = sum(mine == other for mine, other in zip(kind.texts, others, strict=True))
        kind.row[f"answers as {what}"] = f"{same} of {len(asked)}"
    if dices:
        kind.row["mDice"] = f"{statistics.fmean(dices):.4f}"


def request_of(sample: Sample) -> Request:
    """The first question of a sample."""
    question = sample.turns[0].text.replace(IMAGE_TOKEN, "").strip()
    regions = sample.regions if len(sample.turns) == 2 else ()
    return Request(sample.images[0], question, regions, settings=GenerationSettings(max_new_tokens=ANSWER))


if __name__ == "__main__":
    sys.exit(main())
