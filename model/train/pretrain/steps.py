"""The plain training loop that all pre-training shares: AdamW, warm-up, decay, clipping, a log line now and then."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

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
) -> None:
    """Minimise the sum of what ``step(number)`` returns; the learning rate rises linearly, then falls as a cosine.

    Args:
        name: shown on the progress bar and in the log.
        log: JSONL file that mean losses are appended to every ``every`` steps.
        floor: share of ``lr`` that is left at the end.
        on_log: called with the step number after each log line.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    sums: dict[str, float] = {}
    start = time.monotonic()
    bar = tqdm(range(num_steps), desc=name, unit="step", mininterval=5.0)
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


def _share(number: int, num_steps: int, warmup: int, floor: float) -> float:
    rise = min(1.0, (number + 1) / max(warmup, 1))
    fall = 0.5 * (1 + math.cos(math.pi * number / max(num_steps, 1)))
    return rise * (floor + (1 - floor) * fall)


def append_log(log: Path | None, record: dict[str, object]) -> None:
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
