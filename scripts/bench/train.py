"""Measure training by a recipe beside straightforward training on the same records; one dated report.

    python scripts/bench/train.py configs/stages/stage4_nano.yaml model.base=assets/medplib-nano model.grounding= --mix
    python scripts/bench/train.py configs/stages/stage2_7b.yaml --random 7b --mix --device cuda --steps 20

Both arms (``training_arms.py``) run in turn, each in a process of its own, through plain PyTorch on one device. What a
recipe names and the benchmark does not need (paths, with ``--random`` and ``--mix``) may be left unset.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from mix import SAMPLE, count_padding, write_records
from tables import number, positive, table
from training_arms import ARMS, Measured, run_arm

from model.checkpoint.directories import resolve
from model.errors import MedPLIBError
from model.inference.loading import usable_device
from model.processing.tokens import build_tokenizer
from model.train import Recipe, load_recipe
from model.train.starting import check_paths

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 0.01  # relative, of losses in fp32 a hundredth of that
_COUNTED = 100_000  # drawn records
_RANKS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        try:
            device = usable_device(options.device)
            recipe = read_recipe(options, Path(folder), device)
            check_sizes(options)
            measured = {arm: measure(arm, recipe, options, device) for arm in ARMS}
        except MedPLIBError as error:
            parser.error(str(error))
    text = report(options, recipe, device, measured)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{report_name(options, device)}.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values")
    parser.add_argument("--random", metavar="SIZE", help="random weights, sizes of configs/model/SIZE.yaml or a file")
    parser.add_argument("--mix", action="store_true", help="records of MeCoVQA-like lengths instead of the recipe's")
    parser.add_argument("--steps", type=positive, default=20, help="optimiser steps that are counted")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads")
    parser.add_argument("--name", help="of the report; the recipe's when absent")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", metavar="DIR")
    return parser


def read_recipe(options: argparse.Namespace, folder: Path, device: torch.device) -> Recipe:
    """The recipe, run by plain PyTorch on the device; variables that nothing here needs stand for themselves.

    Raises:
        MedPLIBError: it cannot be used.
    """
    environment = dict(os.environ)
    if options.random and options.mix and options.recipe.is_file():
        for name in re.findall(r"\$\{(\w+)", options.recipe.read_text(encoding="utf-8")):
            environment.setdefault(name, f"{name}-is-not-needed")
    recipe = load_recipe(options.recipe, options.overrides, environment)
    data = replace(recipe.data, validation=(), validation_images=())
    if options.mix:
        at = ROOT / "assets" / "medplib-nano" if options.random else resolve(recipe.model.base)
        count = (options.steps + 1) * recipe.schedule.batch_size * recipe.schedule.accumulation
        train = write_records(folder, count, build_tokenizer(at))
        data = replace(data, train=(str(train),), images=(str(SAMPLE),), shares=(), task_shares={}, modality_shares={})
    engine = replace(recipe.engine, kind="torch", device=device.type, deepspeed="")
    logged = replace(recipe.logging, progress=False)
    recipe = replace(recipe, data=data, engine=engine, logging=logged)
    if not options.random:
        check_paths(recipe)
    return recipe


def check_sizes(options: argparse.Namespace) -> None:
    """Refuse an unknown ``--random`` before a process is started for it."""
    known = {path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")}
    if options.random and options.random not in known and not Path(options.random).is_file():
        raise MedPLIBError(f"--random is {options.random!r}; give one of {', '.join(sorted(known))}, or a YAML file")


def measure(arm: str, recipe: Recipe, options: argparse.Namespace, device: torch.device) -> Measured:
    """One arm in a fresh process, so that its memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        job = pool.submit(run_arm, arm, recipe, options.random, str(device), options.steps, options.threads)
        return job.result()


def report(options: argparse.Namespace, recipe: Recipe, device: torch.device, measured: dict[str, Measured]) -> str:
    """The whole report."""
    names = ["recipe", "plain"]
    rows = [(what, *(show(measured[name]) for name in names)) for what, show in _rows(device)]
    gain = measured["plain"].seconds / measured["recipe"].seconds
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"CPU, threads: {options.threads}"
    load = os.getloadavg()[0]
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip() or "unknown"
    weights = f"random weights in the sizes of `{options.random}`" if options.random else f"`{recipe.model.base}`"
    lines = [
        f"# Training, {datetime.now(UTC):%d %B %Y}",
        "",
        f"`{options.recipe.name}` from {weights} on {'MeCoVQA-like records' if options.mix else 'its own records'}, in "
        f"{recipe.engine.precision} on {where} ({platform.machine()}); overrides: "
        f"{', '.join(options.overrides) or 'none'}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, commit {commit}. Optimiser steps counted: "
        f"{options.steps}, after one that is not, of {recipe.schedule.batch_size} × {recipe.schedule.accumulation} "
        "records. Load of the machine at the end: "
        f"{load:.1f} processes for {os.cpu_count()} cores; where it exceeds the threads, times are those of a busy "
        "machine. Made by `scripts/bench/train.py`.",
        "",
        "`recipe` trains as the recipe says. `plain` takes the same records in random order, pads to the longest of a "
        "batch, encodes every image of every row at every step, and computes logits at all positions.",
        "",
        *table(("", *names), rows),
        "",
        f"The recipe's steps are {gain:.2f} times as fast as the plain ones.",
        "",
        *_agreement(recipe, measured),
    ]
    if cuda:
        lines += [
            "",
            "MFU is (4·P + 2·P_t)·tokens + 6·layers·width·Σ length² over seconds and over the rate of matrix products "
            f"as measured here ({number(measured['recipe'].rate / 1e12)} TFLOP/s in bf16). P: weights of the decoder's "
            "linear layers that a token passes; P_t: those that learn; tokens and lengths without padding. Towers, "
            "logits and what gradient checkpointing computes again are not counted.",
        ]
    return "\n".join([*lines, "", *_counted()]) + "\n"


def _rows(device: torch.device) -> list[tuple[str, object]]:
    rows = [
        ("samples a second", lambda m: number(m.samples / m.seconds)),
        ("tokens a second, padding not counted", lambda m: number(m.tokens / m.seconds)),
        ("padding, share of all tokens", lambda m: f"{1 - m.tokens / m.places:.1%}"),
        (f"peak memory, MB{'' if device.type == 'cuda' else ' resident'}", lambda m: number(m.peak / 1e6)),
        ("waiting for data, share of the time", lambda m: f"{m.waited / m.seconds:.1%}"),
        ("making the feature cache before, s", lambda m: number(m.prepared) if m.prepared else "no cache"),
    ]
    if device.type == "cuda":
        rows.append(("MFU", lambda m: f"{m.operations / m.seconds / m.rate:.1%}"))
    return rows


def _agreement(recipe: Recipe, measured: dict[str, Measured]) -> list[str]:
    """Whether both arms have the same loss on the batch that both see first."""
    bound = TOLERANCE if recipe.engine.precision == "bf16" else TOLERANCE / 100
    ours, plain = (measured[name].losses["loss"] for name in ("recipe", "plain"))
    apart = abs(ours - plain) / max(abs(plain), 1e-12)
    verdict = "they agree" if apart <= bound else "THEY DIFFER"
    return [
        f"Loss on the batch that both see first: {ours:.6f} and {plain:.6f}; {verdict} within {bound:g} (relative)."
    ]


def _counted() -> list[str]:
    """Padding of whole epochs at the 7B's 576 tokens an image; counted, not timed."""
    rows = []
    for batch in (4, 8, 16, 32):
        cells = [
            f"{count_padding(_COUNTED, 576, text_only, batch, _RANKS, grouped):.1%}"
            for text_only in (0.0, 0.1, 0.5)
            for grouped in (False, True)
        ]
        rows.append((str(batch), *cells))
    head = ["records a rank", *(f"{share}, {order}" for share in _TEXTS for order in ("random", "grouped"))]
    return [
        "## Padding at 576 tokens an image, counted",
        "",
        f"One epoch of {_COUNTED:,} drawn lengths on {_RANKS} ranks, in random order and with "
        "`data.group_by_length`; how lengths are drawn is an assumption that `scripts/bench/mix.py` states.",
        "",
        *table(head, rows),
    ]


_TEXTS = ("images only", "10 % text only", "50 % text only")


def report_name(options: argparse.Namespace, device: torch.device) -> str:
    """YYYY-MM-DD-train-NAME-DEVICE."""
    name = options.name or options.recipe.stem + (f"-random-{Path(options.random).stem}" if options.random else "")
    return f"{datetime.now(UTC):%Y-%m-%d}-train-{name}-{device.type}"


if __name__ == "__main__":
    sys.exit(main())
