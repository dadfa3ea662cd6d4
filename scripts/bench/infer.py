"""Measure the engine beside plain generation and beside the hardware's limits; one dated report.

    python scripts/bench/infer.py [--model DIR] [--threads 2] [--out docs/benchmarks]
    python scripts/bench/infer.py --random 7b --device cuda --plain-requests 8

Plain generation answers one request at a time: transformers' ``generate`` with a dynamic cache, then the masks of that
request (``plain.py``). Both sides get the same requests, in turns, in one process. Requests are those of
``data/sample``. A random network is made on the device and given fixed answers (``random_network.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from limits import Clock, Hardware
from random_network import Script, make_network
from sections import Sections
from tables import HEAD, number, positive, table
from workloads import Answers, make_workloads

from model.errors import MedPLIBError
from model.inference.engine import EngineSettings
from model.inference.loading import load_for_inference, usable_device
from model.inference.quantise import weight_bytes
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TITLES = {
    "decoding": "Decoding",
    "before": "Before the first token",
    "grounded": "One grounded answer, from file to mask",
    "requests": "Requests",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        engine_options = read_engine_options(options)
        torch.set_num_threads(options.threads)
        model, processor = make_model(options)
        gc.freeze()  # so that collecting what engines leave behind is quick
        with torch.inference_mode():
            text = measure(options, model, processor, engine_options, started)
    except MedPLIBError as error:
        parser.error(str(error))
    finally:
        gc.unfreeze()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{report_name(options, model)}.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--model", type=Path, default=ROOT / "assets" / "medplib-nano")
    network.add_argument(
        "--random",
        metavar="SIZE",
        help="random weights, sizes of configs/model/SIZE.yaml (7b, nano) or a file",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="when absent fp32 on a CPU, else as stored; of random weights bf16"
    )
    parser.add_argument("--quantisation", choices=("int8", "int4"))
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, help="decode by CUDA graphs")
    parser.add_argument("--kernels", action=argparse.BooleanOptionalAction, help="decode by Triton kernels")
    parser.add_argument("--compile", action="store_true", help="let torch compile decoding")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--requests", type=positive, default=96, help="requests of the largest workload")
    parser.add_argument("--plain-requests", type=positive, help="how many plain generation answers at most")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds, of which the median counts")
    parser.add_argument("--sections", nargs="+", choices=tuple(TITLES), default=tuple(TITLES), metavar="SECTION")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", metavar="DIR")
    return parser


def read_engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """Engine settings that were chosen by flags.

    Raises:
        MedPLIBError: this engine has no such setting.
    """
    known = {field.name for field in dataclasses.fields(EngineSettings)}
    flags = {"graphs": options.graphs, "kernels": options.kernels, "compiled": options.compile or None}
    chosen = {field: value for field, value in flags.items() if value is not None}
    for field in chosen:
        if field not in known:
            raise MedPLIBError(f"the engine has no setting {field!r} that could be chosen; leave its option away")
    return chosen


def make_model(options: argparse.Namespace) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """The network to measure, in eval mode, and its processor."""
    dtype = DTYPES.get(options.dtype)
    if options.random is None:
        model, processor, _ = load_for_inference(
            options.model, options.device, dtype=dtype, quantisation=options.quantisation
        )
        return model.eval(), processor
    return make_network(options.random, usable_device(options.device), dtype or torch.bfloat16, options.quantisation)


def measure(
    options: argparse.Namespace,
    model: MedPLIBForCausalLM,
    processor: MedPLIBProcessor,
    engine_options: dict[str, Any],
    started: float,
) -> str:
    """The whole report."""
    clock = Clock(model.device, options.rounds)
    hardware = Hardware.measure(clock, model.dtype)
    answers = Answers(model, None if options.random is None else Script(model, processor))
    workloads = make_workloads(options.requests, options.plain_requests)
    sections = Sections(model, processor, answers, hardware, clock, workloads, engine_options)
    lines: list[str] = []
    for name in options.sections:
        rows = getattr(sections, name)()
        lines += ["", f"## {TITLES[name]}", "", *table(HEAD, [row.cells() for row in rows])]
        if name == "requests":
            lines += ["", *(workload.describe() for workload in workloads)]
    seconds = time.perf_counter() - started
    head = [
        f"# Inference, {datetime.now(UTC):%d %B %Y}",
        "",
        describe_run(options, model, engine_options, seconds),
        "",
        *describe_columns(options, model, sections),
        "",
        "## Hardware",
        "",
        *describe_hardware(model, hardware, sections),
    ]
    return "\n".join([*head, *lines, "", "## Targets", "", *targets(model, sections)]) + "\n"


def describe_run(
    options: argparse.Namespace, model: MedPLIBForCausalLM, engine_options: dict[str, Any], seconds: float
) -> str:
    """What was measured where, in one paragraph."""
    cuda = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip() or "unknown"
    name = f"`{options.model.name}`" if options.random is None else f"random weights in the sizes of `{options.random}`"
    weights = f", {options.quantisation} weights" if options.quantisation else ""
    chosen = ", ".join(f"{key} {'on' if value else 'off'}" for key, value in engine_options.items())
    return (
        f"{name[0].upper()}{name[1:]} in {str(model.dtype).removeprefix('torch.')}{weights} on {device} "
        f"({platform.machine()}); engine settings: {chosen or 'the default ones'}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, commit {commit}. Medians of rounds: {options.rounds}; the whole run "
        f"took {seconds:.0f} s. "
        "Made by `scripts/bench/infer.py`; plain generation is described there."
    )


def describe_columns(options: argparse.Namespace, model: MedPLIBForCausalLM, sections: Sections) -> list[str]:
    """How the tables are to be read."""
    cuda = model.device.type == "cuda"
    peak = "allocated on the device" if cuda else "resident in the process"
    if not sections.memory.resets:
        peak += " since its start, for this system cannot reset its peak"
    lines = [
        "Limits are bytes over copy bandwidth or operations over the rate of matrix products, whichever takes longer; "
        "those of requests are what no schedule could beat, files and pixels not counted. "
        f"Peaks are memory {peak}, weights included."
    ]
    if options.random is not None:
        lines += [
            "",
            "Random networks are made to give fixed answers: a few words (mixed), a sentence with `<SEG>` (grounding), "
            "words without end (long answers).",
        ]
    return lines


def describe_hardware(model: MedPLIBForCausalLM, hardware: Hardware, sections: Sections) -> list[str]:
    """What the limits are made of."""
    whole, step = weight_bytes(model), sections.limits.step_bytes(1, 0)
    rows = [
        (f"copy bandwidth, buffers of {number(hardware.buffer / 1e6)} MB", f"{number(hardware.bandwidth / 1e9)} GB/s"),
        (f"matrix products, {hardware.side} × {hardware.side}", f"{number(hardware.rate / 1e12)} TFLOP/s"),
        ("weights of the network", f"{number(whole / 1e6)} MB"),
        ("weights read for one token", f"{number(step / 1e6)} MB"),
    ]
    lines = table(("", "measured"), rows)
    if hardware.cache > step:
        lines += [
            "",
            f"The weights of one token fit into the last cache ({number(hardware.cache / 1e6)} MB), so decoding may "
            "pass the limit, which is that of memory.",
        ]
    return lines


def targets(model: MedPLIBForCausalLM, sections: Sections) -> list[str]:
    """What was promised, and whether it held."""
    of = "7B sizes in bf16 on an H200" if model.device.type == "cuda" else "the nano on two CPU cores"
    return [f"Set for {of}.", "", *(sections.verdicts or ["- Nothing that was measured here has a target."])]


def report_name(options: argparse.Namespace, model: MedPLIBForCausalLM) -> str:
    """YYYY-MM-DD-infer-NAME-DEVICE, and what the weights are quantised to."""
    name = options.model.name if options.random is None else f"random-{Path(options.random).stem}"
    weights = f"-{options.quantisation}" if options.quantisation else ""
    return f"{datetime.now(UTC):%Y-%m-%d}-infer-{name}-{model.device.type}{weights}"


if __name__ == "__main__":
    sys.exit(main())
