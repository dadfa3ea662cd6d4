"""The plain training loop that all pre-training shares: AdamW, warm-up, decay, clipping, a log line now and then."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

Losses = dict[str, Tensor]


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
    """Minimise the sum of what ``step(number)`` returns; the learning rate rises linearly, then falls as a cosine.

    Args:
        name: shown on the progress bar and in the log.
        log: JSONL file that mean losses are appended to every ``every`` steps.
        floor: share of ``lr`` that is left at the end.
        on_log: called with the step number after each log line.
        resume: goes on after the step that its file holds, and writes one now and then.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    sums: dict[str, float] = {}
    start = time.monotonic()
    done = 0 if resume is None else resume.load(optimiser)
    bar = tqdm(range(done, num_steps), desc=name, unit="step", mininterval=5.0, initial=done, total=num_steps)
    for number in bar:
        for group in optimiser.param_groups:
            group["lr"] = lr * _share(number, num_steps, warmup, floor)
        losses = step(number)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
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
            resume.save(number + 1, optimiser)


@dataclass
class Resume:
    """Where a long pre-training goes on after an interruption, exactly as if there had been none.

    Attributes:
        file: holds the step, the weights, the optimizer's state and the random generators.
        module: what is trained.
        generators: all that the steps draw from.
        every: steps between two writings.
    """

    file: Path
    module: nn.Module
    generators: Sequence[np.random.Generator]
    every: ClassVar[int] = 250

    def save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Write the state after ``step`` steps; the file is replaced at once."""
        drawn = json.dumps([generator.bit_generator.state for generator in self.generators])
        state = {"step": step, "module": self.module.state_dict(), "optimizer": optimizer.state_dict(), "drawn": drawn}
        temporary = self.file.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(self.file)

    def load(self, optimizer: torch.optim.Optimizer) -> int:
        """Take up the state on disk; the number of steps done, 0 without a file."""
        if not self.file.exists():
            return 0
        state = torch.load(self.file, weights_only=True)
        self.module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        for generator, drawn in zip(self.generators, json.loads(state["drawn"]), strict=True):
            generator.bit_generator.state = drawn
        return int(state["step"])


def _share(number: int, num_steps: int, warmup: int, floor: float) -> float:
    rise = min(1.0, (number + 1) / max(warmup, 1))
    fall = 0.5 * (1 + math.cos(math.pi * number / max(num_steps, 1)))
    return rise * (floor + (1 - floor) * fall)


def append_log(log: Path | None, record: dict[str, object]) -> None:
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
