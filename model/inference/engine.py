"""The engine: many requests at once, each joining and leaving between steps, each answered as it would be alone.

One step reads a bounded piece of the next prompt, decodes one token of every running request, and decodes the masks of
the answers that became complete (``schedule.py``); this is the face: handing in, waiting, streaming, threads.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from model.errors import MedPLIBError
from model.inference.answer import Answer
from model.inference.images import ImageSource, PreparedImage, content_key, prepare_image, reusable
from model.inference.loading import load_for_inference
from model.inference.presence import PresenceClassifier
from model.inference.prompts import Prompt, build_prompt
from model.inference.requests import EngineFull, NotFinite, OnText, Request, Ticket
from model.inference.schedule import EngineSettings, Schedule
from model.inference.slots import slot_bytes
from model.inference.targets import JoinedAnswer, requested_targets
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor

__all__ = ["Engine", "EngineFull", "EngineSettings", "Request", "Ticket"]

_SOFT = 1  # omp_pause_soft: helpers end, settings stay

_log = logging.getLogger(__name__)


class Engine:
    """Answers requests in any number, order and mixture.

    Greedy text is the same alone and in any company, and masks are to float tolerance. Drive it with ``answer_all``,
    with ``submit`` and ``step``, or in a thread of its own: ``with Engine(…) as engine: engine.submit(…).result()``.

    Args:
        model: the network; put into eval mode.
        processor: its processor.
        settings: bounds of slots, lengths and caches.
        presence: classifier of masks whose target is absent, for ``Request.no_mask_below``.
    """

    def __init__(
        self,
        model: MedPLIBForCausalLM,
        processor: MedPLIBProcessor,
        settings: EngineSettings | None = None,
        presence: PresenceClassifier | None = None,
    ) -> None:
        self.model, self.processor, self.presence = model.eval(), processor, presence
        self.settings = settings or EngineSettings()
        self._schedule = Schedule(self.model, processor, self.settings, presence)
        self.max_length = self._schedule.max_length
        self.images, self.prefixes = self._schedule.images, self._schedule.prefixes
        self._stepping = threading.RLock()
        self._stepper: int | None = None
        self._preparing = lone_thread("medplib-prepare")  # a tokenizer serves one caller at a time
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    @classmethod
    def from_pretrained(cls, directory: str | Path, settings: EngineSettings | None = None, **loading: Any) -> Engine:
        """Load a checkpoint; takes what ``load_for_inference`` takes (device, dtype, vision_tower, sam, …).

        Raises:
            MedPLIBError: the directory is missing, incomplete or does not fit.
        """
        model, processor, presence = load_for_inference(directory, **loading)
        return cls(model, processor, settings, presence)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that the slots take, whatever is asked."""
        one = slot_bytes(self.model.config.text_config, self.max_length, self.model.dtype)
        return one * self.settings.slots

    def status(self) -> dict[str, int]:
        """Requests waiting and running, and what the caches hold."""
        return {
            "waiting": len(self._schedule.waiting),
            "running": len(self._schedule.running) + len(self._schedule.reading),
            "slots": self.settings.slots,
            "images": len(self.images),
            "image_hits": self.images.hits,
            "prefix_hits": self.prefixes.hits,
        }

    # --- asking ---------------------------------------------------------------------------------------------------

    def prepare(self, image: ImageSource) -> PreparedImage:
        """Read an image once, for many questions; an image of the same content is not read again.

        Raises:
            MedPLIBError: the image cannot be read.
        """
        if isinstance(image, PreparedImage):
            return image
        image = reusable(image)
        key = content_key(image)
        kept = self.images.get(key)
        if kept is None:
            kept = self.images.keep(key, prepare_image(image, self.processor))
        return kept

    def submit(self, request: Request, on_text: OnText | None = None) -> Ticket:
        """Hand in a request; an error in its image or region is raised by the ticket.

        Args:
            request: what to ask.
            on_text: called with the answer so far as it grows, from whichever thread steps the engine.

        Raises:
            EngineFull: as many requests are waiting as ``settings.waiting``.
        """
        self._check_open()
        self._check_room()
        ticket = Ticket(request)
        single = request.always_mask or request.router_stats or request.thresholds or not request.every_target
        joined = None if single or not requested_targets(request.question) else JoinedAnswer(request, on_text)
        first = request if joined is None else joined.first()
        try:
            prompt = self._prepared(first).result()
        except MedPLIBError as error:
            ticket.settle(error)
            return ticket
        with self._news:
            self._check_room()  # again: others handed in meanwhile
            if joined is None:
                self._enqueue(ticket, prompt, on_text)
            else:
                self._enqueue_pass(ticket, joined, first, prompt)
        return ticket

    def _enqueue_pass(self, ticket: Ticket, joined: JoinedAnswer, request: Request, prompt: Prompt) -> None:
        part = Ticket(request, ticket)
        self._enqueue(part, prompt, joined.update)
        part.when_done(lambda: self._pass_done(ticket, joined, part))

    def _pass_done(self, ticket: Ticket, joined: JoinedAnswer, part: Ticket) -> None:
        """Ask for the next target, or settle the whole; in the thread that steps."""
        try:
            joined.add(part.result(0))
            request = None if ticket.cancelled or self._closed else joined.following()
            if request is None:
                ticket.settle(joined.answer())
                return
            prepared = self._prepared(request)
        except BaseException as error:  # noqa: BLE001 - the machine's, or what a caller's on_text raises: its trouble alone
            ticket.settle(error)
            return

        def go_on(prepared: Future[Prompt]) -> None:
            try:
                self._enqueue_pass(ticket, joined, request, prepared.result())
            except MedPLIBError:  # closed meanwhile, or the request does not fit
                ticket.settle(joined.answer())
            except BaseException as error:  # noqa: BLE001 - nobody else would learn of it
                ticket.settle(error)

        prepared.add_done_callback(go_on)

    def ask(self, request: Request, on_text: OnText | None = None) -> Answer:
        """Ask and wait.

        Raises:
            MedPLIBError: image, question or region were malformed, or it is asked from an ``on_text``.
        """
        self._check_not_listening()
        ticket = self.submit(request, on_text)
        while self._thread is None and not ticket.done():
            self.step()
        return ticket.result()

    def answer_all(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer | MedPLIBError]]:
        """Answer a stream of requests, giving (place in the stream, answer or what was wrong) as they complete.

        Requests are drawn as slots become free and prepared ahead in another thread; nothing is held for long.
        """
        preparing: deque[tuple[int, Request, Future[Prompt]]] = deque()
        open_tickets: dict[Ticket, int] = {}
        source, more = enumerate(requests), True
        try:
            while True:
                while more and len(preparing) < 2 * self.settings.slots:
                    item = next(source, None)
                    more = item is not None
                    if item is not None:
                        preparing.append((*item, self._prepared(item[1])))
                # One at least is handed in, however many others wait: the queue is fair, staying out of it is not.
                while preparing and (len(self._schedule.waiting) < self.settings.slots or not open_tickets):
                    if not preparing[0][2].done() and open_tickets:
                        break
                    place, request, prepared = preparing.popleft()
                    try:
                        prompt = prepared.result()
                    except MedPLIBError as error:
                        yield place, error
                        continue
                    ticket = Ticket(request)
                    open_tickets[ticket] = place
                    self._enqueue(ticket, prompt, None)
                if not open_tickets and not preparing and not more:
                    return
                self.step()
                for ticket in [ticket for ticket in open_tickets if ticket.done()]:
                    place = open_tickets.pop(ticket)
                    try:
                        outcome: Answer | MedPLIBError = ticket.result()
                    except NotFinite as error:
                        outcome = error
                    yield place, outcome
        finally:  # a caller that stops iterating waits for no more answers
            for *_, prepared in preparing:
                prepared.cancel()
            for ticket in open_tickets:
                ticket.cancel()

    def _prepared(self, request: Request) -> Future[Prompt]:
        try:
            return self._preparing.submit(self._prompt, request)
        except RuntimeError:  # the executor takes nothing more
            self._check_open()
            raise

    def _prompt(self, request: Request) -> Prompt:
        if request.no_mask_below and self.presence is None:
            raise MedPLIBError(
                "no_mask_below needs a presence classifier, and the checkpoint has no presence.json; "
                "make one with python -m model.inference.calibrate_presence"
            )
        image = None if request.image is None else self.prepare(request.image)
        return build_prompt(self.model, self.processor, image, request, self.max_length)

    def _enqueue(self, ticket: Ticket, prompt: Prompt, on_text: OnText | None) -> None:
        with self._news:
            self._check_open()
            self._schedule.add(ticket, prompt, on_text)
            self._news.notify()

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self._schedule.busy

    def step(self) -> bool:
        """Advance everything by one step; True while there is more to do.

        An error of the machine (out of memory) is raised here and settles every ticket.
        """
        self._check_not_listening()
        with self._stepping:
            self._stepper = threading.get_ident()
            try:
                self._schedule.step()
            finally:
                self._stepper = None
            return self.busy

    # --- a thread of its own --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Step in a background thread until ``close``."""
        self._check_open()
        if self._thread is None:
            release_helpers()  # the caller's; from now on it is the background thread that computes
            self._thread = threading.Thread(target=self._work, name="medplib-engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Answer nothing more; what is still waiting or running is cancelled."""
        with self._news:
            self._closed = True
            self._news.notify()
        if self._thread is not None and self._thread is not threading.current_thread():  # as when a listener closes
            self._thread.join()
        self._thread = None
        self._preparing.shutdown(wait=False)
        with self._stepping:
            self._schedule.abandon(MedPLIBError("the engine was closed before the answer was there"))

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closed or self.busy)
                if self._closed:
                    return
            try:
                self.step()
            except Exception:  # noqa: BLE001 - its tickets have the error; the next step may succeed
                _log.exception("a step failed, and the requests in it were given up")

    def _check_room(self) -> None:
        if len(self._schedule.waiting) >= self.settings.waiting:
            raise EngineFull(f"{self.settings.waiting} requests are waiting already; ask again later")

    def _check_not_listening(self) -> None:
        if self._stepper == threading.get_ident():  # the others' tokens would be appended in another order, or never
            raise MedPLIBError("an on_text may submit requests, but not wait for them; wait for the ticket elsewhere")

    def _check_open(self) -> None:
        if self._closed:
            raise MedPLIBError("the engine is closed; make another one")


# --- OpenMP on a CPU --------------------------------------------------------------------------------------------------
#
# GNU OpenMP gives every thread that computes helpers of its own. As soon as there are more of them than cores, idle or
# not, it lets none of them wait actively any more, and each of the thousands of small operations of a pass pays for
# waking them (1.5 times the time on two cores). So the thread that steps an engine keeps its helpers; no other has any.


def lone_thread(name: str) -> ThreadPoolExecutor:
    """An executor of one thread whose torch operations run without helpers."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    count = torch.get_num_threads()
    if count > 1:
        executor.submit(torch.get_num_threads).result()  # a thread's first question sets its number: before it is set
        executor.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(count)  # for threads that begin later: the last caller's number is theirs
    return executor


def release_helpers() -> None:
    """End the helpers of the calling thread; they come back with its next operation that is large enough."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        pause = getattr(ctypes.CDLL(str(library)), "omp_pause_resource_all", None)
        if pause is not None:
            pause(_SOFT)
