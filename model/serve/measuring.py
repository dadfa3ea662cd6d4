"""What servers count, for Prometheus. Each server has a registry of its own, so that several live in one process."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """A registry and how it is told."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, what: str, *labels: str) -> Counter:
        """A number that only grows."""
        return Counter(f"medplib_{name}", what, labels, registry=self.registry)

    def histogram(self, name: str, what: str, *labels: str) -> Histogram:
        """Seconds, by how many took at most so long."""
        return Histogram(f"medplib_{name}", what, labels, registry=self.registry, buckets=_SECONDS)

    def gauge(self, name: str, what: str, value: Callable[[], float] | None = None) -> Gauge:
        """A number as it is now; ``value`` is asked each time that the metrics are."""
        gauge = Gauge(f"medplib_{name}", what, registry=self.registry)
        if value is not None:
            gauge.set_function(value)
        return gauge

    def answer(self) -> Response:
        """The metrics as ``GET /metrics`` answers them."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class ControllerMetrics(Metrics):
    """What a controller counts; an answer ends in ``ok``, the name of an error code in lower case, or ``left``."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self.counter("controller_requests", "Answers, by how they ended", "outcome")
        self.tries = self.counter("controller_tries", "Requests sent to workers", "retry")
        self.worker_failures = self.counter("controller_worker_failures", "Faults of workers")
        self.first_chunk = self.histogram("controller_first_chunk_seconds", "Time to a worker's first chunk")
        self.duration = self.histogram("controller_answer_seconds", "Time of whole answers")
        self.bytes = self.counter("controller_answer_bytes", "Bytes of answers handed on")
        self.running = self.gauge("controller_running", "Answers under way")


class WorkerMetrics(Metrics):
    """What a worker counts, times from taking a request on; a request ends in its answer's ``finish``, or the name of
    an error code in lower case.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests = self.counter("worker_requests", "Requests, by how they ended", "outcome")
        self.first_token = self.histogram("worker_first_token_seconds", "Time to the first token")
        self.duration = self.histogram("worker_answer_seconds", "Time of whole answers")
        self.tokens = self.counter("worker_tokens", "Tokens generated")
        self.masks = self.counter("worker_masks", "Masks painted")

    def watch(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        """Tell how many requests wait and run, asked each time."""
        self.gauge("worker_waiting", "Requests waiting", waiting)
        self.gauge("worker_running", "Requests being answered", running)
