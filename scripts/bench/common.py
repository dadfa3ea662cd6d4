"""Shared by the benchmarks: reports, sample questions, clocks and memory, and networks of random weights."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from model.checkpoint.loading import finish, init_empty
from model.errors import MedPLIBError
from model.inference.generation import GenerationSettings
from model.inference.quantise import QuantisedLinear, Scheme, quantise
from model.inference.requests import Request
from model.modeling.configuration import MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.modeling.moe import MoEFeedForward
from model.processing.conversation import Turn
from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from model.processing.special_tokens import SEG_TOKEN
from model.processing.tokens import build_tokenizer, tokenize

ROOT = Path(__file__).resolve().parents[2]
REPORTS, SAMPLE, NANO = ROOT / "docs" / "benchmarks", ROOT / "data" / "sample", ROOT / "assets" / "medplib-nano"
ANSWER = 48  # tokens of an answer, at most
EXPERTS = 2  # in every layer of a random network, as published
Work = Callable[[], object]

# --- reports ----------------------------------------------------------------------------------------------------------


def bench_parser(description: str | None, out: Path | None = REPORTS) -> argparse.ArgumentParser:
    """A parser with ``--out``: the folder that the report goes to, nowhere but to the terminal when None."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="write DATE-NAME.md and .csv there")
    return parser


def positive(text: str) -> int:
    """A command-line value: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too few; give at least 1")
    return value


def publish(
    out: Path | None, name: str, title: str, rows: Sequence[dict[str, str | float]], notes: Sequence[str] = ()
) -> None:
    """Print a report, and write it as ``DATE-NAME.md`` beside its rows in ``DATE-NAME.csv``.

    Args:
        rows: cells by column; columns stand in the order in which they first appear.
        notes: paragraphs above the table, after one about the machine.
    """
    head = list(dict.fromkeys(column for row in rows for column in row))
    cells = [
        [cell if isinstance(cell := row.get(column, ""), str) else number(cell) for column in head] for row in rows
    ]
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip() or "unknown"
    machine = f"Made by `scripts/bench/{Path(sys.argv[0]).name}` on {platform.machine()}, {os.cpu_count()} cores, load "
    machine += f"{os.getloadavg()[0]:.1f} at the end; torch {torch.__version__}, commit {commit}."
    now = datetime.now(UTC)
    lines = [f"# {title}, {now:%d %B %Y}", *(f"\n{note}" for note in (machine, *notes)), "", *table(head, cells)]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{now:%Y-%m-%d}-{name}.md").write_text(text, encoding="utf-8")
        with (out / f"{now:%Y-%m-%d}-{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, head, restval="")
            writer.writeheader()
            writer.writerows(rows)


def number(value: float) -> str:
    """Three digits or all before the point; a whole number as it is."""
    places = 0 if isinstance(value, int) or value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{places}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


# --- questions --------------------------------------------------------------------------------------------------------


def sample_questions(count: int, tasks: Sequence[str], tokens: int = ANSWER) -> list[Request]:
    """Questions of the tasks in turn, spread over the sample's pictures; answers have so many tokens at most."""
    records = {task: json.loads((SAMPLE / f"{task}.json").read_text("utf-8")) for task in tasks}
    questions = []
    for place in range(count):
        of_task = records[tasks[place % len(tasks)]]
        record = of_task[place * 7 % len(of_task)]
        text = record["conversations"][0]["value"].replace("<image>", "").strip()
        regions = [SAMPLE / path for path in re.findall(r"<region>(.*?)</region>", text)]
        text = re.sub(r"<region>.*?</region>", "<region></region>", text)
        settings = GenerationSettings(max_new_tokens=tokens)
        questions.append(Request(SAMPLE / record["image"], text, regions, settings=settings))
    return questions


# --- time, memory and what the hardware can do ------------------------------------------------------------------------


class Clock:
    """Times work in rounds: medians, after a warm-up, of what a device has finished.

    Args:
        device: waited for before a time is taken.
        rounds: times that each kind of work is timed.
    """

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def wait(self) -> None:
        """Until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, work: Work) -> float:
        """Seconds of one call."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def medians(self, *works: Work) -> list[float]:
        """Median seconds of a call of each kind of work; they take turns, and short work is repeated in a round."""
        repeats = []
        for work in works:
            work()
            repeats.append(max(1, min(50, round(0.05 / max(self.once(work), 1e-6)))))
        times: list[list[float]] = [[] for _ in works]
        for _ in range(self.rounds):
            for work, count, found in zip(works, repeats, times, strict=True):
                found.append(self.once(lambda work=work, count=count: [work() for _ in range(count)]) / count)
        return [statistics.median(found) for found in times]


class PeakMemory:
    """The most memory in use since ``reset``: allocated on a CUDA device, else resident in the process.

    Where the system lets no process reset its peak, it is the peak since the start.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def read(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
            if found:
                return int(found[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Hardware:
    """Bytes that a device reads and writes in a second, and operations a second of products of square matrices."""

    bandwidth: float
    rate: float

    @classmethod
    def measure(cls, clock: Clock, dtype: torch.dtype) -> Hardware:
        """The fastest of 20 copies between buffers larger than the caches, and of 20 products, in one type."""
        cpu = clock.device.type == "cpu"
        source = torch.ones((256 if cpu else 1024) * 2**20 // dtype.itemsize, dtype=dtype, device=clock.device)
        target, side = torch.empty_like(source), 1024 if cpu else 8192
        square = torch.randn(side, side, device=clock.device).to(dtype)
        product = torch.empty_like(square)
        copying = min(clock.once(lambda: target.copy_(source)) for _ in range(20))
        multiplying = min(clock.once(lambda: torch.mm(square, square, out=product)) for _ in range(20))
        return cls(2 * source.nbytes / copying, 2 * side**3 / multiplying)

    def seconds(self, num_bytes: float, operations: float) -> float:
        """The least time that so many bytes and operations take."""
        return max(num_bytes / self.bandwidth, operations / self.rate)


def active_products(layers: nn.Module) -> int:
    """Weights of linear layers that one token is multiplied with; of a mixture, those of the experts it is sent to."""
    shares = {
        part: mixture.top_k / mixture.num_experts
        for mixture in layers.modules()
        if isinstance(mixture, MoEFeedForward)
        for part in mixture.experts.modules()
    }
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear | QuantisedLinear)]
    return round(sum(shares.get(module, 1.0) * module.in_features * module.out_features for module in linears))


# --- networks of random weights ---------------------------------------------------------------------------------------


def make_network(
    size: str, device: torch.device, dtype: torch.dtype, quantisation: Scheme | None, experts: int = EXPERTS
) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """A network with random weights, made on the device in its own type, and a processor with the nano's tokenizer.

    Args:
        size: the name of a file in ``configs/model/``, or the path of such a file.
        experts: in every layer; 0 makes it dense.

    Raises:
        MedPLIBError: there is no such file, or its sizes are impossible.
    """
    files = {file.stem: file for file in sorted((ROOT / "configs" / "model").glob("*.yaml"))}
    path = files.get(size, Path(size))
    if not path.is_file():
        raise MedPLIBError(f"--random is {size!r}; give one of {', '.join(files)}, or a YAML file of sizes")
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    tokenizer = build_tokenizer(NANO)
    if "text_config" in sections:
        sections["text_config"] = {"vocab_size": len(tokenizer), **sections["text_config"]}
    layers = range(MedPLIBConfig(**sections).text_config.num_hidden_layers)
    config = MedPLIBConfig(
        moe={"layers": tuple(layers), "num_experts": (experts,) * len(layers)} if experts else None,
        seg_token_id=tokenizer.convert_tokens_to_ids(SEG_TOKEN),
        **sections,
    )
    model = init_empty(config)
    torch.manual_seed(0)
    state = {name: _value(name, like, device, dtype) for name, like in model.state_dict().items()}
    model = finish(model, state, device)
    if quantisation is not None:
        quantise(model, quantisation)
    return model, MedPLIBProcessor(tokenizer, ProcessorSettings.from_config(config))


def _value(name: str, like: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not like.is_meta:  # a buffer, whose values are known
        return like.to(device, dtype if like.is_floating_point() else like.dtype)
    value = torch.empty(like.shape, dtype=dtype, device=device)
    if like.dim() < 2:
        return value.fill_(float("norm" in name and name.endswith("weight")))
    if name.endswith("embed_tokens.weight"):
        return value.normal_()
    # what writes into the residual stream is small, so that the last token stays the larger part of it
    quiet = ".decoder." in name and name.endswith(("o_proj.weight", "down_proj.weight"))
    return value.normal_(std=1e-4 if quiet else 0.02)


class Script:
    """Makes a network from ``make_network`` give one fixed answer, whatever image and question came before.

    Time and memory do not depend on the weights, but an answer's length and its ``<SEG>`` do. The output row of each
    token of the answer is the embedding of the token before it.
    """

    def __init__(self, model: MedPLIBForCausalLM, processor: MedPLIBProcessor) -> None:
        self.embeddings, self.output = model.get_input_embeddings().weight, model.lm_head.weight
        self.tokenizer = processor.tokenizer
        self.opening = int(processor.encode_prompt([Turn("human", "What is it?")]).input_ids[-1])
        self._before: dict[int, Tensor] = {}

    def words(self, text: str) -> list[int]:
        """Tokens of a text, each once, for a token has one successor; then the end."""
        ids = dict.fromkeys(tokenize(self.tokenizer, text, add_bos=False).ids)
        return [*(token for token in ids if token != self.opening), int(self.tokenizer.eos_token_id)]

    def plain_words(self, count: int) -> list[int]:
        """So many different tokens, none of them special."""
        special = {self.opening, *self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        return [token for token in range(len(self.tokenizer)) if token not in special][-count:]

    @torch.no_grad()
    def write(self, answer: Sequence[int]) -> None:
        """Make this the answer to everything."""
        for token, row in self._before.items():
            self.output[token] = row
        self._before = {token: self.output[token].clone() for token in answer}
        for before, after in pairwise([self.opening, *answer]):
            self.output[after] = self.embeddings[before]


@contextlib.contextmanager
def without_end(model: MedPLIBForCausalLM, end: int = 2) -> Iterator[None]:
    """No answer ends of itself: the end token's output row is the mean of all, whose logit is never the largest."""
    weight = model.lm_head.weight
    row = weight[end].clone()
    with torch.no_grad():
        weight[end] = weight.float().mean(dim=0)
    try:
        yield
    finally:
        with torch.no_grad():
            weight[end] = row
