"""The requests that ``infer.py`` lets both sides answer: those of ``data/sample``, and what is forced on answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from random_network import Script, without_end

from model.inference.generation import GenerationSettings
from model.inference.requests import Request
from model.modeling.medplib import MedPLIBForCausalLM

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
ANSWER = 48  # tokens at most, and of a long answer exactly
MIXED, GROUNDING = ("vqa", "region", "grounding"), ("grounding",)
WORDS, GROUNDED = "Yes, this is a CT image.", "Sure, the tumor is <SEG>."  # what random networks say


@dataclass(frozen=True)
class Workload:
    """Requests of one kind.

    Attributes:
        name: for people.
        requests: in their order.
        endless: no answer ends before ``ANSWER`` tokens.
        plain_count: plain generation answers the first so many of them, and so does the engine one at a time.
    """

    name: str
    requests: Sequence[Request]
    plain_count: int
    endless: bool = False

    @property
    def plain_requests(self) -> Sequence[Request]:
        """What is answered one at a time."""
        return self.requests[: self.plain_count]

    def describe(self) -> str:
        """One sentence of a report."""
        count, images = len(self.requests), len({request.image for request in self.requests})
        fewer = len(self.plain_requests) < len(self.requests)
        some = f"; one at a time the first {len(self.plain_requests)}" if fewer else ""
        length = f"{ANSWER} tokens each, without end" if self.endless else f"at most {ANSWER} tokens each"
        return f"- {self.name}: requests {count}, distinct images {images}; {length}{some}."


def make_workloads(count: int, plain_count: int | None = None) -> list[Workload]:
    """Short answers to questions of all kinds, masks only (a third as many requests), and long answers (a third).

    Args:
        count: requests of the first.
        plain_count: requests that plain generation answers at most, of long answers a quarter; all when absent.
    """
    mixed = sample_requests(count, MIXED)
    grounding = sample_requests(max(1, count // 3), GROUNDING)
    long = sample_requests(max(1, count // 3), MIXED)
    most = count if plain_count is None else plain_count
    return [
        Workload("mixed", mixed, min(most, len(mixed))),
        Workload("grounding", grounding, min(most, len(grounding))),
        Workload("long answers", long, max(1, min(most, len(long)) // 4), endless=True),
    ]


def sample_requests(count: int, tasks: Sequence[str]) -> list[Request]:
    """Questions of the tasks in turn, spread over the sample's pictures."""
    kinds = [json.loads((SAMPLE / f"{task}.json").read_text("utf-8")) for task in tasks]
    requests = []
    for number in range(count):
        records = kinds[number % len(kinds)]
        record = records[number * 7 % len(records)]
        question = record["conversations"][0]["value"].replace("<image>", "").strip()
        paths = re.findall(r"<region>(.*?)</region>", question)
        question = re.sub(r"<region>.*?</region>", "<region></region>", question)
        settings = GenerationSettings(max_new_tokens=ANSWER)
        regions = [SAMPLE / path for path in paths]
        requests.append(Request(SAMPLE / record["image"], question, regions, settings=settings))
    return requests


def of_length(request: Request, tokens: int) -> Request:
    """The same request with another bound of its answer."""
    return replace(request, settings=GenerationSettings(max_new_tokens=tokens))


@dataclass
class Answers:
    """What answers are made to be.

    Attributes:
        model: the network.
        script: of a random network; None for one that has learnt what to say.
    """

    model: MedPLIBForCausalLM
    script: Script | None

    @contextmanager
    def endless(self, tokens: int) -> Iterator[None]:
        """No answer ends before so many tokens."""
        if self.script is None:
            with without_end(self.model):
                yield
        else:
            self.script.write(self.script.plain_words(tokens))
            yield

    @contextmanager
    def short(self, *, grounded: bool) -> Iterator[None]:
        """The network's own answers; random ones say a few words, or that a mask is here."""
        if self.script is not None:
            self.script.write(self.script.words(GROUNDED if grounded else WORDS))
        yield
