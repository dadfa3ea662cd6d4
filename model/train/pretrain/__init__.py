"""Pre-training of a small model: the loop, resuming and the files that its steps share."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from model.errors import MedPLIBError, escape_unprintable
from model.settings import read_mapping

logger = logging.getLogger(__name__)

Losses = dict[str, Tensor]


class Pretraining:
    """Steps that each leave their result in one folder, ``NAME.safetensors`` and ``log.jsonl``.

    A subclass has a method ``make_STEP`` for each of its ``steps``.

    Args:
        config: YAML with the settings of every step, see ``settings``.
        out: the folder.

    Raises:
        MedPLIBError: the configuration cannot be read.
    """

    steps: ClassVar[tuple[str, ...]]

    def __init__(self, config: Path, out: Path) -> None:
        self.settings, self.out = read_mapping(config, "the settings"), out
        self.seed = int(self.settings.get("seed", 0))
        self.log = out / "log.jsonl"

    def make(self, step: str) -> None:
        """Run one of ``steps``; what it needs must be there."""
        self.out.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        getattr(self, f"make_{step}")()
        logger.info("%s: %.0f s", step, time.monotonic() - start)

    def save_part(self, name: str, part: nn.Module) -> None:
        """Write a part's weights."""
        state = {key: value.detach().clone().contiguous() for key, value in part.state_dict().items()}
        temporary = self.out / f".{name}.part"
        save_file(state, temporary)
        temporary.replace(self.out / f"{name}.safetensors")

    def load_part(self, name: str, prefix: str = "") -> dict[str, Tensor]:
        """Weights of a part whose names begin with ``prefix``, without it.

        Raises:
            MedPLIBError: its step was not run yet.
        """
        path = self.out / f"{name}.safetensors"
        if not path.is_file():
            raise MedPLIBError(f"{path} is missing; run the pre-training step {name!r} first")
        return {key.removeprefix(prefix): value for key, value in load_file(path).items() if key.startswith(prefix)}


def run_steps(
    parser: argparse.ArgumentParser,
    config: str,
    steps: Sequence[str],
    make: Callable[[argparse.Namespace], Pretraining],
    arguments: list[str] | None,
) -> int:
    """A command that runs pre-training steps in the order given; returns the exit code."""
    escape_unprintable()
    parser.add_argument("steps", nargs="+", choices=[*steps, "all"], help="what to make, in this order")
    parser.add_argument("--config", type=Path, default=Path(config), help="settings of the steps")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is made")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        pretraining = make(options)
        for step in steps if "all" in options.steps else options.steps:
            pretraining.make(step)
    except MedPLIBError as error:
        logger.error("%s", error)
        return 2
    return 0


def train_steps(
    name: str,
    parameters: Iterable[nn.Parameter],
    step: Callable[[int], Losses],
    num_steps: int,
    lr: float,
    log: Path | None = None,
    *,
    warmup: int = 100,
    weight_decay: float = 0.01,
    floor: float = 0.02,
    every: int = 50,
    on_log: Callable[[int], None] | None = None,
    resume: Resume | None = None,
) -> None:
    """Minimise the sum of what ``step(number)`` returns by AdamW; the rate rises linearly, then falls as a cosine.

    Args:
        name: on the progress bar and in the log.
        log: JSONL file that mean losses are appended to every ``every`` steps.
        floor: share of ``lr`` that is left at the end.
        on_log: called with the step number after each log line.
        resume: goes on after the step that its file holds, and writes one now and then.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    sums: dict[str, float] = {}
    start = time.monotonic()
    done = 0 if resume is None else resume.load(optimizer)
    bar = tqdm(range(done, num_steps), desc=name, unit="step", mininterval=5.0, initial=done, total=num_steps)
    for number in bar:
        rise = min(1.0, (number + 1) / max(warmup, 1))
        fall = 0.5 * (1 + math.cos(math.pi * number / max(num_steps, 1)))
        for group in optimizer.param_groups:
            group["lr"] = lr * (rise * (floor + (1 - floor) * fall))
        losses = step(number)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        if (number + 1) % every == 0:
            means = {key: round(total / every, 4) for key, total in sums.items()}
            append_log(log, {"name": name, "step": number + 1, "seconds": round(time.monotonic() - start, 1), **means})
            bar.set_postfix(means, refresh=False)
            sums = {}
            if on_log is not None:
                on_log(number + 1)
        if resume is not None and (number + 1) % resume.every == 0 and number + 1 < num_steps:
            resume.save(number + 1, optimizer)


@dataclass
class Resume:
    """Where a long pre-training goes on after an interruption, exactly as if there had been none."""

    file: Path  # holds the step, the weights, the optimizer's state and the random generators
    module: nn.Module  # what is trained
    generators: Sequence[np.random.Generator]  # all that the steps draw from
    every: ClassVar[int] = 250  # steps between two writings

    def save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Write the state after ``step`` steps; the file is replaced at once."""
        drawn = json.dumps([generator.bit_generator.state for generator in self.generators])
        state = {"step": step, "module": self.module.state_dict(), "optimizer": optimizer.state_dict(), "drawn": drawn}
        temporary = self.file.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(self.file)

    def load(self, optimizer: torch.optim.Optimizer) -> int:
        """Load the state on disk; the number of steps done, 0 without a file."""
        if not self.file.exists():
            return 0
        state = torch.load(self.file, weights_only=True)
        self.module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        for generator, drawn in zip(self.generators, json.loads(state["drawn"]), strict=True):
            generator.bit_generator.state = drawn
        return int(state["step"])


def append_log(log: Path | None, record: dict[str, object]) -> None:
    """Add a line of JSON to the log, if there is one."""
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
