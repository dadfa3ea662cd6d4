"""Registry of a controller's workers: state, load, failures, and the choice of a worker for a request.

Everything runs on one event loop and nothing here waits, so there are no locks. The state is small and lost with the
process on purpose: a worker whose heartbeat is answered by ``{"exist": false}`` registers anew.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from model.errors import MedPLIBError
from model.serve.auth import CheckedAddress
from model.serve.protocol import EXPIRY_SECONDS, WorkerStatus

DispatchMethod = Literal["lottery", "shortest_queue"]
DISPATCH_METHODS: tuple[str, ...] = get_args(DispatchMethod)
_MAX_MODELS, _MAX_MODEL_NAME = 64, 200

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegistrySettings:
    """How workers are chosen and given up.

    Attributes:
        dispatch_method: ``lottery``, by speed; or ``shortest_queue``, the shortest for its speed.
        expiry: seconds of silence after which a worker is forgotten.
        max_failures: failures in a row after which a worker is left alone for a while.
        cool_down: seconds of that while; then one request tries it.
        max_workers: known at once.
        seed: of the lottery; drawn when absent.
    """

    dispatch_method: DispatchMethod = "shortest_queue"
    expiry: float = EXPIRY_SECONDS
    max_failures: int = 3
    cool_down: float = 10.0
    max_workers: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.dispatch_method not in DISPATCH_METHODS:
            methods = " or ".join(DISPATCH_METHODS)
            raise MedPLIBError(f"the dispatch method is {self.dispatch_method!r:.80}; give {methods}")


@dataclass(eq=False)
class Worker:
    """A worker as the controller sees it.

    Attributes:
        address: its name and where it is reached.
        status: what it said of itself last.
        check_heart_beat: whether silence makes it forgotten.
        seen: time of the last heartbeat.
        drained: somebody asked to send it nothing new.
        running: requests of ours that it has now.
        sent, ended: requests of ours since its last heartbeat.
        failures: in a row; ``away`` where the last was of its connection, as of one that crashed.
        closed_until: before this moment it gets nothing, and after it one request at a time, until one succeeds.
        gone: called when it is given up, to end what waits for it.
    """

    address: CheckedAddress
    status: WorkerStatus
    check_heart_beat: bool = True
    seen: float = 0.0
    drained: bool = False
    running: int = 0
    sent: int = 0
    ended: int = 0
    failures: int = 0
    away: bool = False
    closed_until: float = 0.0
    gone: set[Callable[[], None]] = field(default_factory=set)

    @property
    def draining(self) -> bool:
        """It takes nothing new, by its own word or somebody's."""
        return self.drained or self.status.draining

    @property
    def load(self) -> float:
        """Requests that it probably has, for its speed."""
        probably = self.status.queue_length + self.sent - self.ended
        return max(probably, self.running) / self.status.speed


class Registry:
    """Workers by name.

    Args:
        settings: how they are chosen and given up.
        clock: seconds, of any beginning.
    """

    def __init__(self, settings: RegistrySettings | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings or RegistrySettings()
        self._clock = clock
        self._workers: dict[str, Worker] = {}
        self._random = random.Random(self.settings.seed)

    # --- workers come and go --------------------------------------------------------------------------------------

    def register(self, address: CheckedAddress, status: WorkerStatus, check_heart_beat: bool = True) -> None:
        """Take a worker in, or anew: its earlier failures and draining are forgotten.

        Raises:
            MedPLIBError: it names no model or malformed ones, or there are too many workers.
        """
        check_models(status.model_names)
        for other in [name for name, w in self._workers.items() if set(w.address.endpoints) & set(address.endpoints)]:
            if other != address.name:  # the same worker under another name; what it answers goes on
                del self._workers[other]
                _log.info("worker %s is named %s from now on", other, address.name)
        known = self._workers.get(address.name)
        if known is None and len(self._workers) >= self.settings.max_workers:
            raise MedPLIBError(f"there are {len(self._workers)} workers already, and no more are taken")
        worker = known or Worker(address, status)
        worker.address, worker.status, worker.check_heart_beat = address, status, check_heart_beat
        worker.seen, worker.drained = self._clock(), False
        worker.failures, worker.closed_until, worker.sent, worker.ended, worker.away = 0, 0.0, 0, 0, False
        self._workers[address.name] = worker
        _log.info("worker %s registered for %s", address.name, ", ".join(status.model_names))

    def heart_beat(self, name: str, queue_length: int) -> bool:
        """Note a sign of life; False where the worker is not known and has to register."""
        worker = self._workers.get(name)
        if worker is None:
            return False
        worker.seen = self._clock()
        worker.status.queue_length = queue_length
        worker.sent = worker.ended = 0
        return True

    def update(self, name: str, status: WorkerStatus) -> None:
        """Note what a worker says of itself now."""
        if worker := self._workers.get(name):
            check_models(status.model_names)
            worker.status, worker.seen, worker.sent, worker.ended = status, self._clock(), 0, 0

    def remove(self, name: str, why: str) -> None:
        """Forget a worker, and end what waits for it."""
        if worker := self._workers.pop(name, None):
            _log.warning("worker %s is given up: %s", name, why)
            for end in tuple(worker.gone):
                end()

    def expire(self) -> list[str]:
        """Forget the workers that were silent for too long; their names."""
        silent_since = self._clock() - self.settings.expiry
        silent = [w.address.name for w in self._workers.values() if w.check_heart_beat and w.seen < silent_since]
        for name in silent:
            self.remove(name, f"no heartbeat for {self.settings.expiry:g} s")
        return silent

    def drain(self, name: str, drained: bool = True) -> bool:
        """Send a worker nothing new, or requests again; False where it is not known."""
        worker = self._workers.get(name)
        if worker is not None:
            worker.drained = drained
            worker.status.draining = drained and worker.status.draining
        return worker is not None

    # --- choosing -------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Models that some worker answers for, by name."""
        return sorted({model for w in self._workers.values() if not w.draining for model in w.status.model_names})

    def conversation_turns(self, model: str) -> int:
        """Questions of a conversation that a model was trained on, as all of its workers say; 1 where none says."""
        statuses = (worker.status for worker in self._workers.values())
        return min((status.conversation_turns for status in statuses if model in status.model_names), default=1)

    def choose(self, model: str, excluded: Collection[str] = ()) -> str | None:
        """A worker for a request, by its name; None where none is fit.

        It is taken to be sent there: ``release`` has to follow, and ``report_success`` or ``report_failure`` before.

        Args:
            model: whose answer is wanted.
            excluded: workers that were tried.
        """
        now = self._clock()
        candidates = [w for w in self._workers.values() if model in w.status.model_names and w.closed_until <= now]
        fit = [w for w in candidates if not w.draining and w.address.name not in excluded]
        if not fit:
            return None
        if self.settings.dispatch_method == "lottery":
            worker = self._random.choices(fit, [w.status.speed for w in fit])[0]
        else:
            least = min(w.load for w in fit)
            worker = self._random.choice([w for w in fit if w.load == least])
        worker.sent += 1
        worker.running += 1
        if worker.closed_until:  # the one trial; the next one after another while, should no heartbeat come
            worker.closed_until = self._clock() + self.settings.cool_down
        return worker.address.name

    def get(self, name: str) -> Worker | None:
        """The worker of this name."""
        return self._workers.get(name)

    def workers(self) -> list[Worker]:
        """All workers, in the order they came."""
        return list(self._workers.values())

    def may_come_back(self, model: str) -> bool:
        """Whether a worker of the model lost its connections, as one that is being started again."""
        return any(w.away and model in w.status.model_names and not w.draining for w in self._workers.values())

    def retry_after(self, model: str) -> float:
        """Seconds after which a worker may be fit that is not now."""
        waits = [w.closed_until - self._clock() for w in self._workers.values() if model in w.status.model_names]
        return max(1.0, min((wait for wait in waits if wait > 0), default=1.0))

    # --- outcomes -------------------------------------------------------------------------------------------------

    def release(self, name: str, answered: bool = True) -> None:
        """A request that was sent there is over, whatever came of it; or, not answered, out of our sight."""
        if worker := self._workers.get(name):
            worker.running = max(0, worker.running - 1)
            worker.ended += answered

    def report_success(self, name: str) -> None:
        """A worker answered: it is trusted again."""
        if worker := self._workers.get(name):
            if worker.closed_until:
                _log.info("worker %s answers again", name)
            worker.failures, worker.closed_until, worker.away = 0, 0.0, False

    def report_failure(self, name: str, away: bool = False) -> None:
        """A worker failed by its own fault; after some failures in a row it is left alone for a while."""
        if worker := self._workers.get(name):
            worker.failures, worker.away = worker.failures + 1, away
            if worker.failures >= self.settings.max_failures:
                worker.closed_until = self._clock() + self.settings.cool_down
                _log.warning("worker %s failed %d times in a row; it rests", name, worker.failures)

    def rest(self, name: str) -> None:
        """A worker takes nothing new for now: it is left alone for a while."""
        if worker := self._workers.get(name):
            worker.closed_until = self._clock() + self.settings.cool_down

    # --- status ---------------------------------------------------------------------------------------------------

    def fit_workers(self) -> int:
        """Workers that would be sent something now."""
        now = self._clock()
        return sum(not worker.draining and worker.closed_until <= now for worker in self._workers.values())

    def status(self) -> list[dict[str, Any]]:
        """Each worker, for people and monitors."""
        now = self._clock()
        return [
            {
                "worker_name": worker.address.name,
                **worker.status.model_dump(),
                "draining": worker.draining,
                "running": worker.running,
                "failures": worker.failures,
                "resting": worker.closed_until > now,
                "silent_for": round(now - worker.seen, 1),
            }
            for worker in self._workers.values()
        ]


def check_models(names: list[str]) -> None:
    """Look at the models that a worker names.

    Raises:
        MedPLIBError: there are none, too many, or malformed ones.
    """
    proper = all(0 < len(name) <= _MAX_MODEL_NAME and name.isprintable() and name.strip() == name for name in names)
    if not 0 < len(names) <= _MAX_MODELS or not proper:
        raise MedPLIBError(
            f"a worker names 1 to {_MAX_MODELS} models of up to {_MAX_MODEL_NAME} printable characters each"
        )
