"""Measure the servers as their clients see them: real programs on loopback, real requests; one dated table and its CSV.

    python scripts/bench/serve.py [--model DIR] [--device cuda] [--workers 1] [--out docs/benchmarks] [--soak 60]

Requests are those of ``data/sample``. The clients run in this process and share the machine with the servers. Measured
are growing numbers of clients, each of whom asks again when it has its answer; the bytes of masks in each of their
forms; and the controller, by the same requests straight to a worker and through it, in turns. With ``--soak S``, 200
clients ask without a pause for S seconds and the servers' memory is watched.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import psutil
from common import ANSWER, NANO, bench_parser, publish, sample_questions
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from model.errors import MedPLIBError
from model.processing.conversation import Turn, render
from model.processing.special_tokens import IMAGE_TOKEN
from model.serve.auth import bearer
from model.serve.launcher import API_KEY, Launcher, LaunchSettings, free_ports
from model.serve.protocol import Chunk, ChunkReader, GenerateRequest, RegisterWorker, WorkerStatus
from model.serve.server import run_app

TASKS = ("vqa", "region", "grounding")
CLIENTS = (1, 2, 4, 8, 16, 32)
SOAKING = 200  # clients
SCRIPTED = "scripted"  # the model of a worker that answers at once
SPANS = ((0.2, 0.4), (0.8, 1.0))  # parts of a soak whose memory is compared
FORMS = {"run lengths": {}, "published list of pixels": {"mask_format": "pixels"}, "PNG too": {"mask_png": True}}
Row = dict[str, str | float]


def main() -> int:
    parser = bench_parser(__doc__, None)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--slots", type=int, help="answers that a worker writes at once")
    parser.add_argument("--requests", type=int, default=96, help="requests at each number of clients")
    parser.add_argument("--short", type=int, default=300, help="requests with which the controller is measured")
    parser.add_argument("--soak", type=float, metavar="S", help="ask for so long with 200 clients, and nothing else")
    parser.add_argument("--only", choices=("clients", "bytes", "controller"), help="measure one thing")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    flags = ["--slots", str(options.slots)] if options.slots else []
    devices = [options.device] * options.workers
    settings = LaunchSettings(options.model, web=False, devices=devices, worker_flags=flags)
    with Launcher(settings, lambda line: None) as stack:
        bench = Bench(stack)
        measures = {
            "clients": lambda: bench.clients(options.requests),
            "bytes": bench.bytes,
            "controller": lambda: bench.overhead(options.short),
        }
        if options.soak:
            rows = asyncio.run(bench.soak(options.soak))
        else:
            chosen = [measure for name, measure in measures.items() if options.only in (None, name)]
            rows = [row for measure in chosen for row in asyncio.run(measure())]
    name = f"{'soak' if options.soak else 'serve'}-{options.model.name}-{options.device.partition(':')[0]}"
    note = f"`{options.model.name}`, workers: {options.workers}, on {options.device}; clients on the same machine."
    publish(options.out, name, "Serving", rows, [note])
    return 0


@dataclass(frozen=True)
class Heard:
    """How one request went: seconds to the first token and to the end, tokens, bytes of the stream and of its last
    object; ``outcome`` is ``ok``, a status, or an error code."""

    whole: float
    outcome: str
    first: float | None = None
    tokens: int = 0
    bytes: int = 0
    last_bytes: int = 0


class Bench:
    """The measurements of a running stack."""

    def __init__(self, stack: Launcher) -> None:
        self.stack = stack
        self.controller = stack["controller"].address
        self.worker = stack["worker 1"].address
        self.key = stack["controller"].environment[API_KEY]
        (self.model,) = httpx.post(f"{self.controller}/list_models", trust_env=False).json()["models"]

    async def clients(self, count: int) -> list[Row]:
        """Requests of all kinds at growing numbers of clients."""
        rows = []
        async with connection() as client:
            await self.timed(client, "warm-up", sample_bodies(24, self.model), 4)
            for clients in CLIENTS:
                bodies = sample_bodies(max(count, 3 * clients), self.model)
                rows.append(await self.timed(client, f"{clients} clients", bodies, clients))
        return rows

    async def bytes(self) -> list[Row]:
        """Answers with masks, as run lengths, as the published list of pixels, and with PNGs."""
        rows = []
        async with connection() as client:
            for name, change in FORMS.items():
                bodies = sample_bodies(12, self.model, ("grounding",), **change)
                rows.append(await self.timed(client, f"masks as {name}", bodies, 4))
        return rows

    async def timed(self, client: httpx.AsyncClient, what: str, bodies: Sequence[bytes], clients: int) -> Row:
        """All requests, so many at a time."""
        begun, room = time.perf_counter(), asyncio.Semaphore(clients)

        async def one(body: bytes) -> Heard:
            async with room:
                return await ask(client, self.controller, body)

        replies = await asyncio.gather(*(one(body) for body in bodies))
        return row(what, replies, time.perf_counter() - begun)

    async def overhead(self, count: int) -> list[Row]:
        """The same requests straight to a worker and through the controller, one at a time."""
        rows = []
        with scripted_worker() as scripted:
            async with connection() as client:
                message = RegisterWorker(worker_name=scripted, check_heart_beat=False).model_dump()
                at = f"{self.controller}/register_worker"
                (await client.post(at, json=message, headers=bearer(self.key))).raise_for_status()
                small = GenerateRequest(model=SCRIPTED, prompt="x").model_dump_json().encode()
                large = GenerateRequest(model=SCRIPTED, prompt="x", images=["A" * 400_000]).model_dump_json().encode()
                for name, bodies, worker in (
                    ("scripted worker, 50 byte request", [small] * count, scripted),
                    ("scripted worker, 400 kB request", [large] * count, scripted),
                    ("model", sample_bodies(max(12, count // 5), self.model), self.worker),
                ):
                    rows += await self.in_turns(client, name, bodies, worker)
        return rows

    async def in_turns(self, client: httpx.AsyncClient, name: str, bodies: Sequence[bytes], worker: str) -> list[Row]:
        """Each request direct and through the controller; which comes first changes."""
        sides: dict[str, list[Heard]] = {worker: [], self.controller: []}
        for number, body in enumerate(bodies):
            for address in list(sides)[:: 1 if number % 2 else -1]:
                sides[address].append(await ask(client, address, body, self.key if address == worker else None))
        failed = Counter(one.outcome for replies in sides.values() for one in replies if one.outcome != "ok")
        if failed:
            raise MedPLIBError(f"requests failed while the controller was measured: {dict(failed)}")
        direct, through = (replies[len(replies) // 10 :] for replies in sides.values())  # the first warm up
        apart = (statistics.median(one.whole for one in through) - statistics.median(one.whole for one in direct)) * 1e3
        met = f"; at most 3 ms: {'met' if apart <= 3 else 'missed'}" if worker != self.worker else ""
        rows = [
            row(f"{name}, {way}", replies) for way, replies in (("direct", direct), ("through controller", through))
        ]
        rows[1]["note"] = f"controller: {apart:.2f} ms{met}"
        return rows

    async def soak(self, seconds: float) -> list[Row]:
        """Many clients without a pause; memory of the servers early, late, and at most."""
        memory: dict[str, list[float]] = {child.name: [] for child in self.stack.programs}
        replies: list[Heard] = []
        begun = time.perf_counter()
        async with connection() as client, asyncio.TaskGroup() as group:
            for number in range(SOAKING):
                group.create_task(self.keep_asking(client, begun + seconds, number, replies))
            while time.perf_counter() < begun + seconds:
                await asyncio.sleep(1)
                for child in self.stack.programs:
                    with suppress(psutil.Error):  # gone
                        memory[child.name].append(psutil.Process(child.pid).memory_info().rss / 1e6)
        outcomes = ", ".join(f"{n} {name}" for name, n in Counter(one.outcome for one in replies).most_common())
        rows = [row(f"{SOAKING} clients for {seconds:.0f} s", replies, seconds) | {"note": outcomes}]
        for name, values in memory.items():
            early, late = (values[int(start * len(values)) : int(end * len(values)) + 1] for start, end in SPANS)
            settled, last = statistics.mean(early), statistics.mean(late)
            change = f"{settled:.0f} → {last:.0f} MB ({last / settled - 1:+.1%}), at most {max(values):.0f}"
            rows.append({"what": f"memory of the {name}", "note": change})
        return rows

    async def keep_asking(self, client: httpx.AsyncClient, end: float, number: int, replies: list[Heard]) -> None:
        """One client's requests until ``end``, a second apart after a refusal."""
        bodies = sample_bodies(24, self.model)
        while time.perf_counter() < end:
            replies.append(await ask(client, self.controller, bodies[number % len(bodies)]))
            number += 1
            if replies[-1].outcome != "ok":
                await asyncio.sleep(1)


def row(what: str, replies: Sequence[Heard], seconds: float | None = None) -> Row:
    """One measurement, in ms and bytes; rates where the requests took so many ``seconds`` together."""
    good = [one for one in replies if one.outcome == "ok"]
    first, whole = sorted(one.first for one in good if one.first is not None), sorted(one.whole for one in good)
    rates: Row = {}
    if seconds:
        rates = {"requests a second": len(good) / seconds, "tokens a second": sum(o.tokens for o in good) / seconds}
    times = {"first token": first, "answer": whole}
    return {
        "what": what,
        **rates,
        **{f"{name} p{q} ms": share(of, q / 100) * 1e3 for name, of in times.items() for q in (50, 95)},
        "longest ms": share(whole, 1) * 1e3,
        "stream bytes": statistics.mean(one.bytes for one in good) if good else math.nan,
        "last object bytes": statistics.mean(one.last_bytes for one in good) if good else math.nan,
        "failed": len(replies) - len(good),
    }


def share(values: Sequence[float], quantile: float) -> float:
    """A quantile of sorted values; NaN where there are none."""
    return values[min(len(values) - 1, int(quantile * len(values)))] if values else math.nan


# --- requests ---------------------------------------------------------------------------------------------------------


def connection() -> httpx.AsyncClient:
    """A client for any number of requests at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=4.0)
    return httpx.AsyncClient(timeout=httpx.Timeout(300, pool=None), limits=limits, trust_env=False)


async def ask(client: httpx.AsyncClient, address: str, body: bytes, key: str | None = None) -> Heard:
    """Send a request and read its answer to the end."""
    headers = {**bearer(key), "Content-Type": "application/json"}
    begun, first, received, reader, last = time.perf_counter(), None, 0, ChunkReader(), Chunk(text="")
    try:
        async with client.stream(
            "POST", f"{address}/worker_generate_stream", content=body, headers=headers
        ) as response:
            if response.status_code != 200:
                return Heard(time.perf_counter() - begun, str(response.status_code))
            async for data in response.aiter_raw():
                received += len(data)
                for last in reader.feed(data):
                    if first is None and last.error_code == 0 and last.answer:
                        first = time.perf_counter() - begun
    except (httpx.HTTPError, ValueError) as error:
        return Heard(time.perf_counter() - begun, type(error).__name__, first, bytes=received)
    outcome = f"error {last.error_code}" if last.error_code else "ok" if received else "empty"
    tokens = (last.usage or {}).get("completion_tokens", 0)
    return Heard(time.perf_counter() - begun, outcome, first, tokens, received, len(last.encode()))


@cache
def sample_bodies(count: int, model: str, tasks: tuple[str, ...] = TASKS, **change: object) -> tuple[bytes, ...]:
    """Questions of the tasks in turn, as they go over the wire."""
    bodies = []
    for question in sample_questions(count, tasks):
        request = GenerateRequest(
            model=model,
            prompt=render([Turn("human", f"{IMAGE_TOKEN}\n{question.question}")]),
            images=[encoded(question.image)],
            region_masks=[encoded(region) for region in question.regions],
            max_new_tokens=ANSWER,
            **change,
        )
        bodies.append(request.model_dump_json(exclude_unset=True).encode())
    return tuple(bodies)


@cache
def encoded(path: Path) -> str:
    """A file in base64."""
    return base64.b64encode(path.read_bytes()).decode()


# --- servers ----------------------------------------------------------------------------------------------------------


def run_scripted(port: int) -> None:
    """Serve a worker that answers at once, so that what is left of a request's time is the controller's."""
    app = FastAPI()

    @app.post("/worker_get_status")
    async def status() -> WorkerStatus:
        return WorkerStatus(model_names=[SCRIPTED])

    @app.post("/worker_generate_stream")
    async def generate(request: Request) -> StreamingResponse:
        await request.body()
        chunk = Chunk(text="x", answer="x").encode()
        return StreamingResponse(iter([chunk]), media_type="application/octet-stream")

    run_app(app, "127.0.0.1", port)


@contextmanager
def scripted_worker() -> Iterator[str]:
    """Run the scripted worker in a process of its own; gives its address."""
    (port,) = free_ports("127.0.0.1", 1)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    process = multiprocessing.get_context("spawn").Process(target=run_scripted, args=(port,), daemon=True)
    process.start()
    try:
        up = False
        while not up:
            if not process.is_alive() or time.monotonic() > end:
                raise MedPLIBError("the scripted worker does not start; the lines above say why")
            time.sleep(0.05)
            with suppress(httpx.HTTPError):
                up = httpx.post(f"{address}/worker_get_status", trust_env=False).status_code == 200
        yield address
    finally:
        process.terminate()
        process.join()


if __name__ == "__main__":
    sys.exit(main())
