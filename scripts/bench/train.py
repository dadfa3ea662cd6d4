"""Measure training by a recipe, at several commits and settings; a dated CSV and one table.

    python scripts/bench/train.py configs/stages/stage4_nano.yaml model.base=assets/medplib-nano model.grounding= \
        --mix --arm straightforward f05ef43 plain --arm before f05ef43 --arm loader data.workers=1
    python scripts/bench/train.py configs/stages/stage2_7b.yaml --random 7b --mix --device cuda --steps 20

An arm is a name, then a commit (the work tree without one), ``plain``, and recipe values of its own. ``plain`` is the
straightforward loop: no grouping, no caches, no loader process, every image of every row encoded, logits at all
positions. Each arm is a process that trains by the package of its commit. The arms take one step each in turn, and are
stopped while another has its turn, so that a busy machine is as busy for all.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from unittest import mock

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
SAME = 1e-5  # largest difference of losses that count as the same
PLAIN = ("data.group_by_length=false", "data.feature_cache=", "data.workers=0", "logging.router_every=0")
SIZES = (352, 512)  # pixels along the pictures of --mix
DEFAULT_ARMS = (["straightforward", "plain"], ["recipe"])


@dataclass
class Arm:
    """One way of training, and what its steps took.

    Attributes:
        rows: of counted steps, as ``metrics.jsonl`` has them, with ``cpu`` (seconds of the training process) and
            ``peak`` (bytes of memory).
    """

    name: str
    commit: str = ""
    plain: bool = False
    overrides: tuple[str, ...] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    @classmethod
    def of(cls, words: Sequence[str]) -> Arm:
        name, *rest = words
        commits = [word for word in rest if word != "plain" and "=" not in word]
        own = tuple(word for word in rest if "=" in word)
        return cls(name, "".join(commits), "plain" in rest, (*own, *(PLAIN if "plain" in rest else ())))

    def start(self, options: argparse.Namespace, folder: Path, common: Sequence[str]) -> None:
        """Start the process; it is stopped once it is ready."""
        source = unpacked(self.commit, folder) if self.commit else ROOT
        recipe = options.recipe.resolve()
        recipe = source / recipe.relative_to(ROOT) if recipe.is_relative_to(ROOT) else recipe
        own = tempfile.mkdtemp(dir=folder)
        values = [*common, *options.overrides, *self.overrides, f"output={own}"]
        job = {"recipe": str(recipe), "overrides": values, "plain": self.plain}
        job |= {"random": options.random, "threads": options.threads, "steps": options.steps}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--job", json.dumps(job)],
            env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": str(options.threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        """What the process says next; then it and its loaders stand still."""
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the arm ended with exit code {self.process.wait()}")
        os.killpg(self.process.pid, signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        os.killpg(self.process.pid, signal.SIGCONT)
        return self.answer()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def rate(self) -> float:
        """Questions a second, over all steps; a sequence may hold several."""
        return sum(row["questions"] for row in self.rows) / sum(row["seconds"] for row in self.rows)

    @property
    def cpu(self) -> float:
        """Milliseconds of the training process for a question."""
        return 1e3 * sum(row["cpu"] for row in self.rows) / sum(row["questions"] for row in self.rows)


def main(arguments: Sequence[str] | None = None) -> int:
    from common import bench_parser, positive, publish  # not above: an arm's process has another commit's package

    parser = bench_parser(__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values of all arms")
    parser.add_argument("--arm", nargs="+", action="append", metavar="NAME", help="NAME [COMMIT] [plain] [key=value …]")
    parser.add_argument("--random", metavar="SIZE", help="random weights, sizes of configs/model/SIZE.yaml or a file")
    parser.add_argument("--mix", action="store_true", help="phantoms of 352 and 512 pixels, 3 : 3 : 4 by task")
    parser.add_argument("--images", type=positive, default=150, help="phantoms of each size")
    parser.add_argument("--steps", type=positive, default=20, help="optimizer steps that are counted")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of the training process")
    parser.add_argument("--name", help="of the report; the recipe's when absent")
    options = parser.parse_intermixed_args(arguments)
    if not options.recipe.is_file():
        parser.error(f"there is no recipe at {options.recipe}")
    arms = [Arm.of(words) for words in options.arm or DEFAULT_ARMS]
    with tempfile.TemporaryDirectory() as name, ExitStack() as ends:
        folder = Path(name)
        common = ["validation.samples=0", "logging.progress=false", "saving.every=1000000", "engine.kind=torch"]
        common += [f"schedule.max_steps={options.steps + 1}", f"engine.device={options.device}"]
        common += mixed_records(folder, options.images) if options.mix else []
        for arm in arms:
            ends.callback(arm.end)
            arm.start(options, folder, common)
        for number_of_round in range(options.steps + 1):
            for arm in arms:
                row = arm.step()
                arm.rows += [row] if number_of_round else []  # the first is not counted
    name = options.name or options.recipe.stem + (f"-random-{Path(options.random).stem}" if options.random else "")
    publish(options.out, f"train-{name}-{options.device}", "Training", results(arms), [description(options, arms)])
    return 0


def unpacked(commit: str, folder: Path) -> Path:
    """The package and recipes of a commit, below ``folder``."""
    target = folder / commit
    if not target.is_dir():
        command = ["git", "archive", commit, "model", "configs"]
        content = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(content)) as archive:
            archive.extractall(target)
    return target


def mixed_records(folder: Path, images: int) -> list[str]:
    """Phantoms of both sizes below ``folder``; the recipe values that train on them."""
    from model.data.phantom import build_phantoms

    files, roots = [], []
    for size in SIZES:
        build_phantoms(folder / str(size), images, size, size=size)
        files += [str(folder / str(size) / f"{task}.json") for task in ("vqa", "region", "grounding")]
        roots += [str(folder / str(size))] * 3
    shares = [0.15, 0.15, 0.2] * len(SIZES)
    return [f"data.train={json.dumps(files)}", f"data.images={json.dumps(roots)}", f"data.shares={shares}"]


def results(arms: Sequence[Arm]) -> list[dict[str, str | float]]:
    """Rows of the table; gains are beside the first arm and the one before."""
    rows: list[dict[str, str | float]] = []
    for before, arm in zip([arms[0], *arms], arms, strict=False):
        first, seconds = arms[0], sum(row["seconds"] for row in arm.rows)
        apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(arm.rows, first.rows, strict=True))
        rows.append(
            {
                "arm": arm.name,
                "at": " ".join([arm.commit or "work tree", *arm.overrides[: -len(PLAIN) if arm.plain else None]]),
                "questions a second": arm.rate,
                "× first": f"{arm.rate / first.rate:.2f}",
                "× before": f"{arm.rate / before.rate:.2f}",
                "CPU ms a question": f"{arm.cpu:.1f}",
                "CPU × first": f"{first.cpu / arm.cpu:.2f}",
                "waiting for data": f"{sum(row['data_seconds'] for row in arm.rows) / seconds:.1%}",
                "padding": f"{statistics.mean(row['padding'] for row in arm.rows):.1%}",
                "peak MB": arm.rows[-1]["peak"] / 1e6,
                "loss apart": f"{apart:.1e}" + (" (same)" if apart <= SAME else ""),
            }
        )
    return rows


def description(options: argparse.Namespace, arms: Sequence[Arm]) -> str:
    """What was measured, and how to read it."""
    return (
        f"`{options.recipe.name}`, {'random weights of `' + options.random + '`, ' if options.random else ''}"
        f"{'phantoms of 352 and 512 pixels' if options.mix else 'its own records'}, on {options.device}, threads: "
        f"{options.threads}; overrides: {', '.join(options.overrides) or 'none'}; transformers "
        f"{transformers.__version__}. Over {options.steps} steps of {len(arms)} arms, one arm's after the other's, "
        "after one that is not counted. Where the load exceeds the cores, seconds of CPU say more than those of the "
        "clock. `loss apart` is the largest difference from the first arm's loss in a step; arms that order or augment "
        "records differ."
    )


# --- in the process of an arm --------------------------------------------------------------------------------------


def run_job(job: dict[str, Any], commands: IO[str], answers: IO[str]) -> None:
    """Train one step a line; answer each with its row."""
    from model.modeling.configuration import IGNORE_INDEX
    from model.train import load_recipe
    from model.train.trainer import Trainer

    torch.set_num_threads(job["threads"])
    environment = dict(os.environ)
    if job["random"]:  # paths of weights that nothing here needs stand for themselves
        for name in re.findall(r"\$\{(\w+)", Path(job["recipe"]).read_text(encoding="utf-8")):
            environment.setdefault(name, f"{name}-is-not-needed")
    recipe = load_recipe(Path(job["recipe"]), job["overrides"], environment)
    with ExitStack() as patches:
        if job["random"]:
            patches.enter_context(mock.patch("model.train.trainer.check_start"))
            made = random_network(job["random"], torch.device(recipe.engine.device))
            patches.enter_context(mock.patch("model.train.trainer.starting_network", made))
        if job["plain"]:
            patches.enter_context(mock.patch("model.modeling.medplib.causal_ce", all_logits))
        trainer = Trainer(recipe)
        trainer.set_up()
        if job["plain"]:
            collate = trainer.processor.collate
            trainer.processor.collate = lambda samples, **_: collate(samples)  # type: ignore[method-assign]
        rows: list[dict[str, Any]] = []
        assert trainer.log is not None
        trainer.log.step = rows.append  # type: ignore[method-assign]
        questions, next_batch = [0], trainer.next_batch

        def counted() -> dict[str, Any]:
            batch = next_batch()
            answered = batch["labels"] != IGNORE_INDEX
            questions[0] += int((answered[:, 1:] & ~answered[:, :-1]).sum())
            return batch

        trainer.next_batch = counted  # type: ignore[method-assign]
        answers.write("{}\n")
        answers.flush()
        for _ in commands:
            questions[0], begun = 0, time.process_time()
            trainer.train_step()
            used = time.process_time() - begun
            cuda = recipe.engine.device == "cuda"
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            peak = torch.cuda.max_memory_allocated() if cuda else resident
            answers.write(json.dumps({**rows.pop(), "cpu": used, "peak": peak, "questions": questions[0]}) + "\n")
            answers.flush()


def random_network(size: str, device: Any) -> Any:
    """Stands for ``starting_network``: random weights that learn what the recipe says."""

    def made(recipe: Any) -> Any:
        from common import make_network

        from model.modeling.configuration import LossConfig
        from model.train.init_weights import add_lora, set_trainable

        dtype = torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
        network, processor = make_network(size, device, dtype, None, 2 if recipe.stage == 4 else 0)
        network.config.loss = LossConfig(**vars(recipe.losses))
        data = recipe.data
        processor.settings = replace(processor.settings, template=data.template, max_length=data.max_length)
        add_lora(network, recipe.lora)
        set_trainable(network, recipe.trainable)
        return network, processor

    return made


def all_logits(hidden: Any, labels: Any, lm_head: Any) -> Any:
    """The loss from logits at all positions of the sequence, padding and images too, as it is usually written."""
    from torch.nn import functional

    from model.modeling.configuration import IGNORE_INDEX
    from model.modeling.losses import TokenLosses

    flat, targets = lm_head(hidden).float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    values = functional.cross_entropy(flat, targets, ignore_index=IGNORE_INDEX, reduction="none")
    rows, places = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return TokenLosses(values.sum() / max(len(rows), 1), values.detach().view(len(labels), -1)[rows, places], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        with os.fdopen(os.dup(1), "w") as answers:
            os.dup2(2, 1)  # whatever prints does not answer
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent, standing still or not (Linux)
            run_job(json.loads(sys.argv[2]), sys.stdin, answers)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the arms and their loaders on the way out
        sys.exit(main())
