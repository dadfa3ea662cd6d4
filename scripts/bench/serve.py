"""Measure the servers as their clients see them: real programs on loopback, real requests; one dated report.

    python scripts/bench/serve.py [--model DIR] [--device cuda] [--workers 1] [--out docs/benchmarks] [--soak 60]

Requests are those of ``data/sample``. The clients run in this process and share the machine with the servers. With
``--soak S``, 200 clients ask without a pause for S seconds and the servers' memory is watched.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
from scripted_worker import MODEL as SCRIPTED

from model.errors import MedPLIBError
from model.processing.conversation import Turn, render
from model.processing.special_tokens import IMAGE_TOKEN
from model.serve.access import bearer
from model.serve.children import Child
from model.serve.protocol import Chunk, ChunkReader, GenerateRequest, RegisterWorker
from model.serve.stack import API_KEY, Stack, StackSettings, free_ports

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data" / "sample"
CLIENTS = (1, 2, 4, 8, 16, 32)
ANSWER = 48  # tokens at most
SOAKING = 200  # clients
STREAM = "/worker_generate_stream"
Rows = list[tuple[str, ...]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "medplib-nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--slots", type=int, help="answers that a worker writes at once")
    parser.add_argument("--requests", type=int, default=96, help="requests at each number of clients")
    parser.add_argument("--short", type=int, default=300, help="requests with which the controller is measured")
    parser.add_argument("--soak", type=float, metavar="S", help="ask for so long with 200 clients, and nothing else")
    parser.add_argument("--only", choices=("clients", "bytes", "controller"), help="measure one thing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the report there too, as docs/benchmarks")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    settings = StackSettings(
        options.model,
        web=False,
        devices=[options.device] * options.workers,
        worker_flags=["--slots", str(options.slots)] if options.slots else [],
    )
    with Stack(settings, lambda line: None) as stack:
        bench = Bench(stack)
        if options.soak:
            parts = [("Soak", ("", "measured"), asyncio.run(bench.soak(options.soak)))]
        else:
            tables: dict[str, tuple[str, tuple[str, ...], Callable[[], Coroutine[Any, Any, Rows]]]] = {
                "clients": ("Clients", CLIENTS_HEAD, lambda: bench.load(options.requests)),
                "bytes": ("Bytes of an answer with masks", BYTES_HEAD, bench.sizes),
                "controller": ("Controller", OVERHEAD_HEAD, lambda: bench.overhead(options.short)),
            }
            chosen = [table for name, table in tables.items() if options.only in (None, name)]
            parts = [(title, head, asyncio.run(measure())) for title, head, measure in chosen]
    text = report(options, parts)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        kind = "soak" if options.soak else "serve"
        name = f"{datetime.now(UTC):%Y-%m-%d}-{kind}-{options.model.name}-{options.device.partition(':')[0]}.md"
        (options.out / name).write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


CLIENTS_HEAD = (
    *("clients", "requests a second", "tokens a second", "first token p50 ms", "p95 ms"),
    *("answer p50 ms", "p95 ms", "failed"),
)
BYTES_HEAD = ("masks as", "last object", "whole stream", "times run lengths")
OVERHEAD_HEAD = ("worker", "what", "direct p50 ms", "through the controller p50 ms", "difference ms")


@dataclass(frozen=True)
class Heard:
    """How one request went.

    Attributes:
        first: seconds to the first token; None without one.
        whole: seconds to the end.
        tokens: of the answer.
        bytes, last_bytes: of the stream and of its last object.
        outcome: ``ok``, a status, or an error code.
    """

    first: float | None
    whole: float
    tokens: int
    bytes: int
    last_bytes: int
    outcome: str


class Bench:
    """The measurements of a running stack."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.controller = stack["controller"].program.address
        self.worker = stack["worker 1"].program.address
        self.key = stack["controller"].program.environment[API_KEY]
        (self.model,) = httpx.post(f"{self.controller}/list_models", trust_env=False).json()["models"]

    # --- load -----------------------------------------------------------------------------------------------------

    async def load(self, count: int) -> Rows:
        """Requests of all kinds at growing numbers of clients, each of whom asks again when it has its answer."""
        rows: Rows = []
        async with connection() as client:
            await ask_all(client, self.controller, sample_bodies(24, self.model), 4)  # warm
            for clients in CLIENTS:
                bodies = sample_bodies(max(count, 3 * clients), self.model)
                begun = time.perf_counter()
                heard = await ask_all(client, self.controller, bodies, clients)
                seconds = time.perf_counter() - begun
                rows.append(load_row(clients, heard, seconds))
        return rows

    # --- bytes ----------------------------------------------------------------------------------------------------

    async def sizes(self) -> Rows:
        """Answers with masks, as run lengths, as the published list of pixels, and with PNGs."""
        requests = [one for one in sample_requests(36, self.model) if is_grounding(one)]
        found: dict[str, list[Heard]] = {}
        async with connection() as client:
            for name, change in (
                ("run lengths", {}),
                ("published list of pixels", {"mask_format": "pixels"}),
                ("run lengths and PNG", {"mask_png": True}),
            ):
                bodies = [one.model_copy(update=change).model_dump_json().encode() for one in requests]
                heard = await ask_all(client, self.controller, bodies, 4)
                found[name] = [one for one in heard if one.outcome == "ok"]
        base = statistics.mean(one.bytes for one in found["run lengths"])
        return [
            (
                name,
                f"{statistics.mean(one.last_bytes for one in heard):,.0f}",
                f"{statistics.mean(one.bytes for one in heard):,.0f}",
                f"{statistics.mean(one.bytes for one in heard) / base:.2f}",
            )
            for name, heard in found.items()
        ]

    # --- the controller -------------------------------------------------------------------------------------------

    async def overhead(self, count: int) -> Rows:
        """The same requests straight to a worker and through the controller, in turns, one at a time."""
        rows: Rows = []
        with scripted_worker(1) as scripted:
            async with connection() as client:
                await self.register(client, scripted)
                small = GenerateRequest(model=SCRIPTED, prompt="x").model_dump_json().encode()
                large = GenerateRequest(model=SCRIPTED, prompt="x", images=["A" * 400_000]).model_dump_json().encode()
                for name, bodies, worker in (
                    ("scripted, 50 byte request", [small] * count, scripted),
                    ("scripted, 400 kB request", [large] * count, scripted),
                    ("model", sample_bodies(max(12, count // 5), self.model), self.worker),
                ):
                    rows += overhead_rows(name, *await self.in_turns(client, bodies, worker))
        return rows

    async def register(self, client: httpx.AsyncClient, worker: str) -> None:
        """Make a worker known that sends no heartbeats."""
        message = RegisterWorker(worker_name=worker, check_heart_beat=False)
        answer = await client.post(
            f"{self.controller}/register_worker", json=message.model_dump(), headers=bearer(self.key)
        )
        answer.raise_for_status()

    async def in_turns(
        self, client: httpx.AsyncClient, bodies: Sequence[bytes], worker: str
    ) -> tuple[list[Heard], list[Heard]]:
        """Each request direct and through the controller; which comes first changes."""
        direct, through = [], []
        for number, body in enumerate(bodies):
            sides = [(direct, worker), (through, self.controller)]
            for heard, address in sides[:: 1 if number % 2 else -1]:
                heard.append(await ask(client, address, body, self.key if heard is direct else None))
        failed = Counter(one.outcome for one in (*direct, *through) if one.outcome != "ok")
        if failed:
            raise MedPLIBError(f"requests failed while the controller was measured: {dict(failed)}")
        return direct[len(direct) // 10 :], through[len(through) // 10 :]  # the first warm up

    # --- soak -----------------------------------------------------------------------------------------------------

    async def soak(self, seconds: float) -> Rows:
        """Many clients without a pause; memory of the servers early, late, and at most."""
        memory: dict[str, list[float]] = {child.program.name: [] for child in self.stack.children}
        heard: list[Heard] = []
        begun = time.perf_counter()
        async with connection() as client, asyncio.TaskGroup() as group:
            for number in range(SOAKING):
                group.create_task(self.keep_asking(client, begun + seconds, number, heard))
            while time.perf_counter() < begun + seconds:
                await asyncio.sleep(1)
                for child in self.stack.children:
                    memory[child.program.name].append(resident_mb(child))
        outcomes = Counter(one.outcome for one in heard)
        good = [one for one in heard if one.outcome == "ok"]
        whole = sorted(one.whole for one in good)
        rows = [
            ("clients", str(SOAKING)),
            ("seconds", f"{time.perf_counter() - begun:.0f}"),
            ("requests", f"{len(heard)}, of which " + ", ".join(f"{n} {name}" for name, n in outcomes.most_common())),
            ("answers a second", f"{len(good) / seconds:.1f}"),
            ("answer p50, p95 and longest", " / ".join(f"{share(whole, q):.2f} s" for q in (0.5, 0.95, 1.0))),
        ]
        for name, values in memory.items():
            settled, last = mean_of(values, 0.2, 0.4), mean_of(values, 0.8, 1.0)
            change = (last / settled - 1) * 100
            rows.append(
                (f"memory of the {name}", f"{settled:.0f} → {last:.0f} MB ({change:+.1f} %), at most {max(values):.0f}")
            )
        return rows

    async def keep_asking(self, client: httpx.AsyncClient, end: float, number: int, heard: list[Heard]) -> None:
        """One client's requests until ``end``; after a refusal it waits as long as it was told to."""
        bodies = sample_bodies(24, self.model)
        while time.perf_counter() < end:
            one = await ask(client, self.controller, bodies[number % len(bodies)])
            heard.append(one)
            number += 1
            if one.outcome != "ok":
                await asyncio.sleep(1)


# --- one request ------------------------------------------------------------------------------------------------------


def connection() -> httpx.AsyncClient:
    """A client for any number of requests at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=4.0)
    return httpx.AsyncClient(timeout=httpx.Timeout(300, pool=None), limits=limits, trust_env=False)


async def ask(client: httpx.AsyncClient, address: str, body: bytes, key: str | None = None) -> Heard:
    """Send a request and read its answer to the end."""
    headers = {**bearer(key), "Content-Type": "application/json"}
    begun, first, received, reader = time.perf_counter(), None, 0, ChunkReader()
    last, last_bytes = Chunk(text=""), 0
    try:
        async with client.stream("POST", address + STREAM, content=body, headers=headers) as response:
            if response.status_code != 200:
                return Heard(None, time.perf_counter() - begun, 0, 0, 0, str(response.status_code))
            async for data in response.aiter_raw():
                received += len(data)
                for chunk in reader.feed(data):
                    last = chunk
                    if first is None and chunk.error_code == 0 and chunk.answer:
                        first = time.perf_counter() - begun
    except (httpx.HTTPError, ValueError) as error:
        return Heard(first, time.perf_counter() - begun, 0, received, 0, type(error).__name__)
    last_bytes = len(last.encode())
    outcome = f"error {last.error_code}" if last.error_code else "ok" if received else "empty"
    tokens = (last.usage or {}).get("completion_tokens", 0)
    return Heard(first, time.perf_counter() - begun, tokens, received, last_bytes, outcome)


async def ask_all(client: httpx.AsyncClient, address: str, bodies: Sequence[bytes], clients: int) -> list[Heard]:
    """All requests, so many at a time."""
    room = asyncio.Semaphore(clients)

    async def one(body: bytes) -> Heard:
        async with room:
            return await ask(client, address, body)

    return list(await asyncio.gather(*(one(body) for body in bodies)))


# --- what is asked ----------------------------------------------------------------------------------------------------


@cache
def sample_requests(count: int, model: str) -> tuple[GenerateRequest, ...]:
    """Questions about images, regions and for masks in turn, spread over the sample's pictures."""
    kinds = [json.loads((SAMPLE / f"{task}.json").read_text("utf-8")) for task in ("vqa", "region", "grounding")]
    requests = []
    for number in range(count):
        records = kinds[number % 3]
        record = records[number * 7 % len(records)]
        question = record["conversations"][0]["value"].replace(IMAGE_TOKEN, "").strip()
        regions = re.findall(r"<region>(.*?)</region>", question)
        question = re.sub(r"<region>.*?</region>", "<region></region>", question)
        requests.append(
            GenerateRequest(
                model=model,
                prompt=render([Turn("human", f"{IMAGE_TOKEN}\n{question}")]),
                images=[encoded(record["image"])],
                region_masks=[encoded(region) for region in regions],
                max_new_tokens=ANSWER,
            )
        )
    return tuple(requests)


@cache
def sample_bodies(count: int, model: str) -> tuple[bytes, ...]:
    """The same as they go over the wire."""
    return tuple(request.model_dump_json(exclude_unset=True).encode() for request in sample_requests(count, model))


@cache
def encoded(name: str) -> str:
    """A file of the sample in base64."""
    return base64.b64encode((SAMPLE / name).read_bytes()).decode()


def is_grounding(request: GenerateRequest) -> bool:
    """Whether it asks for a mask."""
    return bool(re.search(r"segment|mask|outline|show me|mark the", request.prompt.rpartition("USER:")[2], re.I))


# --- servers ----------------------------------------------------------------------------------------------------------


@contextmanager
def scripted_worker(chunks: int) -> Iterator[str]:
    """Run the scripted worker; gives its address."""
    (port,) = free_ports("127.0.0.1", 1)
    address = f"http://127.0.0.1:{port}"
    script = Path(__file__).with_name("scripted_worker.py")
    process = subprocess.Popen([sys.executable, str(script), str(port), str(chunks)], cwd=ROOT)
    try:
        end = time.monotonic() + 60
        while not answers(address):
            if process.poll() is not None or time.monotonic() > end:
                raise MedPLIBError("the scripted worker does not start; run it by hand to see why")
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait()


def answers(address: str) -> bool:
    """Whether a worker is there."""
    try:
        return httpx.post(f"{address}/worker_get_status", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def resident_mb(child: Child) -> float:
    """Memory of a program, in MB; 0 where it is gone."""
    try:
        return psutil.Process(child.pid).memory_info().rss / 1e6
    except psutil.Error:
        return 0.0


# --- rows -------------------------------------------------------------------------------------------------------------


def share(values: Sequence[float], quantile: float) -> float:
    """A quantile of sorted values; NaN where there are none."""
    return values[min(len(values) - 1, int(quantile * len(values)))] if values else math.nan


def mean_of(values: Sequence[float], start: float, end: float) -> float:
    """Mean of the part of the values between two shares of their number."""
    part = values[int(start * len(values)) : max(int(end * len(values)), int(start * len(values)) + 1)]
    return statistics.mean(part) if part else math.nan


def load_row(clients: int, heard: Sequence[Heard], seconds: float) -> tuple[str, ...]:
    """One number of clients."""
    good = [one for one in heard if one.outcome == "ok"]
    first = sorted(one.first for one in good if one.first is not None)
    whole = sorted(one.whole for one in good)
    times = (share(first, 0.5), share(first, 0.95), share(whole, 0.5), share(whole, 0.95))
    return (
        str(clients),
        f"{len(good) / seconds:.1f}",
        f"{sum(one.tokens for one in good) / seconds:.0f}",
        *(f"{value * 1e3:.0f}" for value in times),
        str(len(heard) - len(good)),
    )


def overhead_rows(name: str, direct: Sequence[Heard], through: Sequence[Heard]) -> Rows:
    """Medians of both sides; the difference is the controller's."""
    rows: Rows = []
    for what, of in (("first token", lambda one: one.first), ("whole answer", lambda one: one.whole)):
        sides = [[value for one in side if (value := of(one)) is not None] for side in (direct, through)]
        if all(sides):
            ours, theirs = (statistics.median(side) * 1e3 for side in sides)
            rows.append((name, what, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs - ours:.2f}"))
    return rows


def report(options: argparse.Namespace, parts: Sequence[tuple[str, tuple[str, ...], Rows]]) -> str:
    """The whole page."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    lines = [
        f"# Serving, {datetime.now(UTC):%d %B %Y}",
        "",
        f"`{options.model.name}`, {options.workers} worker{'s' if options.workers > 1 else ''} on {options.device} "
        f"({platform.machine()}, {os.cpu_count()} cores, clients on the same), "
        f"commit {commit.stdout.strip() or 'unknown'}; the machine's load was "
        f"{os.getloadavg()[0]:.1f} at the end. Made by `scripts/bench/serve.py`.",
    ]
    for title, head, rows in parts:
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    short = [rows for title, _, rows in parts if title == "Controller"]
    overhead = [row for rows in short for row in rows if row[0].startswith("scripted")]
    if overhead:
        worst = max(float(row[4]) for row in overhead)
        lines += ["", f"- Controller at most 3 ms in the median: {worst:.2f} ms, {'met' if worst <= 3 else 'missed'}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
