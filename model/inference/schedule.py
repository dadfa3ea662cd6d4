"""Continuous-batching scheduler: chunked prefill, one decode step, release of cache slots, mask decoding.

Waiting → prefill (``reading.py``) → running → masks → ticket. Knows nothing of threads; its caller makes one step at a
time.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from model.errors import MedPLIBError
from model.inference.answer import Answer
from model.inference.decoding import Decoding, check_ways
from model.inference.generation import Draw, choose_tokens
from model.inference.images import BoundedCache, PreparedImage
from model.inference.mask_stage import paint_masks
from model.inference.presence import PresenceClassifier
from model.inference.prompts import Prompt
from model.inference.reading import PromptReader
from model.inference.requests import NotFinite, OnText, Ticket
from model.inference.runner import DecoderRunner, Piece, Rows, StepOutput
from model.inference.running import Running
from model.inference.slots import Prefix, SlotCache, slot_bytes
from model.modeling.configuration import MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor

_MOST_TOKENS = 2048  # of a slot by default: the published length of a conversation
_READ_STEP = 64  # how far the cache is read, rounded up to so many tokens
_MB = 2**20
_OPENINGS, _OPENING_TEXT = 4, 128  # kept at least, and tokens of the system text before an image (some 40) at most


@dataclass(frozen=True)
class EngineSettings:
    """Bounds of an engine.

    Attributes:
        slots: requests decoded together, ≥ 1.
        max_length: tokens of a request, image and answer included; by default the model's, at most 2048.
        prefill_chunk: prompt tokens after which no further prompt is read between two decoding steps, and the most of
            one prompt; what delays the others is less than twice as many.
        waiting: requests that may wait for a slot before ``EngineFull``.
        image_cache_mb: kept images and their encodings.
        prefix_cache_mb: kept keys and values of prompts' openings (system text and image), which spare a second
            question about an image most of its prefill; four such openings of the model when absent, at least 256.
        lookahead: begin the next step before the last one's tokens are known to the host; by default on CUDA. Costs
            one superfluous token at the end of an answer, never changes it.
        graphs: decode by CUDA graphs; by default on CUDA.
        kernels: decode by Triton kernels; by default on CUDA, where they compute what the network computes.
        compiled: decode by what torch's compiler makes of the pass; minutes to start.
        batch_invariant: decode all slots always, the free ones too, and read every prompt in passes of its own, so that
            a row's rounding does not depend on its company: in reduced precision a near tie between two tokens can
            otherwise go either way. Costs work where slots are free, and every expert computes every row.
    """

    slots: int = 8
    max_length: int | None = None
    prefill_chunk: int = 512
    waiting: int = 64
    image_cache_mb: int = 256
    prefix_cache_mb: int | None = None
    lookahead: bool | None = None
    graphs: bool | None = None
    kernels: bool | None = None
    compiled: bool = False
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "prefill_chunk", "waiting", "image_cache_mb", "prefix_cache_mb"):
            value, bound = getattr(self, name), 0 if name.endswith("_mb") else 1
            if value is not None and value < bound:
                raise MedPLIBError(f"{name} is {value}; give at least {bound}")


def prefix_cache_bytes(config: MedPLIBConfig, dtype: torch.dtype, settings: EngineSettings) -> int:
    """Most bytes of kept openings: as set, else four images' with their text at the model's sizes, or 256 MiB."""
    if settings.prefix_cache_mb is not None:
        return settings.prefix_cache_mb * _MB
    return max(256 * _MB, _OPENINGS * slot_bytes(config.text_config, config.visual_tokens + _OPENING_TEXT, dtype))


@dataclass(frozen=True)
class _Pending:
    """A pass whose tokens the host has not seen yet.

    Attributes:
        rows: whose they are.
        chosen: long [n].
        states: [n, D], which they were chosen from.
        choices: bool [mixture layers, ≥ n, E], which experts computed the tokens before them, if anyone asked.
        decoded: how many of the rows were decoded; the others' prompts were read in the same pass.
        ready: when ``chosen`` is there.
    """

    rows: list[Running]
    chosen: Tensor
    states: Tensor
    decoded: int
    choices: Tensor | None = None
    ready: Any = None


class Schedule:
    """The requests of an engine and where each of them is.

    Args:
        model: the network, in eval mode.
        processor: its processor.
        settings: bounds of slots, lengths and caches.
        presence: classifier of masks whose target is absent.
    """

    def __init__(
        self,
        model: MedPLIBForCausalLM,
        processor: MedPLIBProcessor,
        settings: EngineSettings,
        presence: PresenceClassifier | None = None,
    ) -> None:
        self.model, self.processor, self.settings, self.presence = model, processor, settings, presence
        check_ways(model.device, settings.graphs, settings.kernels, settings.compiled)
        text = model.config.text_config
        self.max_length = settings.max_length or min(text.max_position_embeddings, _MOST_TOKENS)
        if self.max_length > text.max_position_embeddings:
            raise MedPLIBError(
                f"max_length is {self.max_length}, and the model knows {text.max_position_embeddings} positions; "
                "give no more"
            )
        self.images: BoundedCache[PreparedImage] = BoundedCache(settings.image_cache_mb * _MB)
        self.prefixes: BoundedCache[Prefix] = BoundedCache(prefix_cache_bytes(model.config, model.dtype, settings))
        moe = model.config.moe
        # A capacity counts over the whole prompt, so such prompts are neither cut nor shared.
        self._drops = bool(moe.enabled and moe.drop_in_evaluation and moe.drop_tokens)
        self._chunk = self.max_length if self._drops else settings.prefill_chunk
        ends = model.config.eos_token_id
        self._end_ids = set(ends) if isinstance(ends, list | tuple) else {2 if ends is None else int(ends)}
        self._lookahead = model.device.type == "cuda" if settings.lookahead is None else settings.lookahead
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self._finished: list[Running] = []
        self._pending: deque[_Pending] = deque()
        # One pass reads and decodes, unless rounding must not depend on company.
        self._packs = not (self._drops or settings.batch_invariant)

    def add(self, ticket: Ticket, prompt: Prompt, on_text: OnText | None) -> None:
        """Let a request wait."""
        limit = min(ticket.request.settings.max_new_tokens, self.max_length - prompt.length - 1)
        self.waiting.append(Running(ticket, prompt, on_text, limit))

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.reading or self.running or self._pending or self._finished)

    @property
    def reading(self) -> list[Running]:
        """Requests whose prompts are being read."""
        return list(self.reader.slots) if "reader" in self.__dict__ else []

    @torch.inference_mode()
    def step(self) -> None:
        """Advance everything by one step. An error of the machine (out of memory) settles every ticket."""
        try:
            self._drop_cancelled()
            self._advance()
            self._collect()
            self._finish()
        except BaseException as error:
            self.abandon(error)
            raise

    def _drop_cancelled(self) -> None:
        waiting = tuple(self.waiting)  # a copy in one go: other threads hand in meanwhile
        for row in [row for row in waiting if row.ticket.cancelled]:
            self.waiting.remove(row)
            row.finish = "cancelled"
            self._finished.append(row)
        for row in [row for row in self.reading if row.ticket.cancelled]:
            self.reader.drop(row)
            row.finish = "cancelled"
            self._finished.append(row)
        for row in self.running:
            if row.ticket.cancelled and row.finish is None:
                row.finish = "cancelled"
        self._compact()

    def _advance(self) -> None:
        """Read prompts until ``prefill_chunk`` tokens are read, and decode a token of every running request."""
        pieces = self.reader.next_pieces(self.waiting, len(self.running), self._chunk)
        if pieces:
            self.images.refresh()
        if pieces and self._packs and not self.decoding.replays:
            self._pass(pieces, decode=True)
            return
        for row, piece in pieces:  # each alone, so that its states do not depend on what else is read
            self._pass([(row, replace(piece, slot=self.reader.slots[row]))], decode=False)
        self._pass([], decode=True)

    def _pass(self, reads: list[tuple[Running, Piece]], decode: bool) -> None:
        """One pass of the network: read some pieces, decode the running requests; what was read whole joins these."""
        start = time.perf_counter()
        rows = list(self.running) if decode and any(row.launched < row.limit for row in self.running) else []
        if not reads and not rows:
            return
        observe = any(row.ticket.request.router_stats for row in (*rows, *(row for row, _ in reads)))
        output = self.decoding([piece for _, piece in reads], self._rows(rows), observe)
        first, count = 0 if rows else len(self.running), len(rows)
        place, whole = count, []
        for number, (row, piece) in enumerate(reads):
            if output.choices is not None and row.ticket.request.router_stats:
                row.count_experts(output.choices[:, place : place + len(piece.embeds)])
            place += len(piece.embeds)
            if self.reader.advance(row, piece):
                whole.append((row, output.hidden[count + number]))
        for row, _ in whole:  # only now: who is still read may have to change places with it
            self.reader.seat(row, len(self.running))
            self.decoding.cache.clear(len(self.running), row.read)
            self.running.append(row)
            rows.append(row)
        if rows:
            states = torch.stack([*output.hidden[:count], *(state for _, state in whole)]) if reads else output.hidden
            self._choose(rows, count, replace(output, hidden=states), slice(first, first + len(rows)))
        seconds = time.perf_counter() - start
        for row in {*rows, *(row for row, _ in reads)}:
            row.seconds["generate"] += seconds

    def _rows(self, rows: list[Running]) -> Rows | None:
        """The running requests as a pass takes them; free slots may fill up the batch."""
        if not rows:
            return None
        lengths = [row.length for row in rows]
        held = self.reader.lengths()
        lengths += [held.get(slot, 0) for slot in range(len(rows), self.decoding.batch_for(len(rows)))]
        bucket = min(-(-(max(lengths) + 1) // _READ_STEP) * _READ_STEP, self.max_length)
        filled = torch.tensor(lengths, dtype=torch.long)
        if self.model.device.type == "cuda":
            filled = filled.pin_memory()  # so that nothing waits for the copy
        filled = filled.to(self.model.device, non_blocking=True)
        return Rows(self._tokens[: len(lengths)], filled, bucket)

    def _choose(self, rows: list[Running], decoded: int, output: StepOutput, slots: slice) -> None:
        """Choose the next tokens from the states of a pass; they stay on the device until ``_collect``."""
        logits = self.model.lm_head(output.hidden) if output.logits is None else output.logits
        logits = logits[: len(rows)]
        chosen = choose_tokens(logits, [Draw(row.ticket.request.settings, row.seed, row.launched) for row in rows])
        self._tokens[slots] = chosen.clamp(min=0)
        for row in rows:
            row.launched += 1
        ready = None
        if chosen.is_cuda:
            chosen = torch.empty_like(chosen, device="cpu", pin_memory=True).copy_(chosen, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(_Pending(rows, chosen, output.hidden, decoded, output.choices, ready))

    def _collect(self) -> None:
        """Hear the tokens of the passes that are due, and let complete answers leave their slots."""
        keep = 1 if self._lookahead and any(row.launched < row.limit for row in self.running) else 0
        while len(self._pending) > keep:
            start = time.perf_counter()
            pending = self._pending.popleft()
            if pending.ready is not None:
                pending.ready.synchronize()  # on an accelerator it is here that a pass is waited for
            tokens = pending.chosen.tolist()
            waited = time.perf_counter() - start
            for place, (row, token) in enumerate(zip(pending.rows, tokens, strict=True)):
                row.seconds["generate"] += waited
                # The superfluous token of a lookahead belongs to no answer.
                counts = row.ticket.request.router_stats and row.finish is None and place < pending.decoded
                if counts and pending.choices is not None:
                    row.count_experts(pending.choices[:, place : place + 1])
                self._hear(row, token, pending.states[place])
        self._compact()

    def _hear(self, row: Running, token: int, state: Tensor) -> None:
        if token < 0 and row.finish is None:
            self._fail(row)
        try:
            row.append_token(token, state, self._end_ids, self.model.config.seg_token_id, self.processor)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - what a caller's on_text raises, an exit too, is its trouble alone
            row.ticket.settle(error)
            row.finish = "cancelled"

    def _fail(self, row: Running) -> None:
        """End a request whose numbers are not finite, and forget what else was computed for it."""
        row.ticket.settle(NotFinite())
        row.finish = row.finish or "cancelled"
        row.seg_states.clear()
        self.prefixes.discard(row.prompt.prefix_key)
        if row.prompt.image is not None:
            row.prompt.image.image_features = row.prompt.image.sam_embedding = None

    def _compact(self) -> None:
        """Free the slots of complete answers: the last running request moves into the gap."""
        for slot in reversed(range(len(self.running))):
            row = self.running[slot]
            if row.finish is None:
                continue
            last = len(self.running) - 1
            if slot != last:
                mover = self.running[last]
                self.decoding.cache.move(last, slot, mover.length)
                self.decoding.cache.clear(slot, mover.length)
                self._tokens[slot] = self._tokens[last]
                self.running[slot] = mover
            self.running.pop()
            self._finished.append(row)

    def _finish(self) -> None:
        """Paint the masks of complete answers together and settle their tickets."""
        rows = self._finished  # they stay there until they are settled: mask decoding may fail
        if not rows:
            return
        start = time.perf_counter()
        texts = [row.final_text(self.processor) for row in rows]
        for row in rows:
            if row.finish == "cancelled":  # nobody waits for its masks
                row.seg_states.clear()
        jobs = [row.mask_job(text) for row, text in zip(rows, texts, strict=True)]
        paint_masks(self.model, jobs, self.presence)
        self.images.refresh()
        now = time.perf_counter()
        for row, text, job in zip(rows, texts, jobs, strict=True):
            assert row.finish is not None
            row.seconds["masks"] = now - start
            row.seconds["total"] = now - row.submitted
            if not all(math.isfinite(mask.score) for mask in job.masks):
                self._fail(row)
            if not row.ticket.done():
                row.ticket.settle(
                    Answer(
                        text,
                        job.masks,
                        dict(row.seconds),
                        row.finish,
                        len(row.ids),
                        job.masks_at,
                        row.router_shares(),
                        row.prompt.length,
                        row.prompt.dropped_turns,
                        row.notes(text),
                    )
                )
        self._finished = []

    def abandon(self, error: BaseException) -> None:
        """Settle everything with an error and forget it."""
        rows = [*self.running, *self._finished, *self.reading]
        for row in self.reading:
            self.reader.drop(row)
        rows += [self.waiting.popleft() for _ in range(len(self.waiting))]  # other threads hand in meanwhile
        self.running, self._finished = [], []
        self._pending.clear()
        for row in rows:
            row.finish = row.finish or "cancelled"  # a step in which a listener cancelled all has more tokens to append
            row.ticket.settle(error)

    @cached_property
    def decoding(self) -> Decoding:
        """How passes are run; slots are allocated at the first request."""
        model, settings = self.model, self.settings
        cache = SlotCache(model.config.text_config, settings.slots, self.max_length, model.dtype, model.device)
        runner = DecoderRunner(model.model.decoder, cache, self._drops, settings.batch_invariant)
        self._tokens = torch.zeros(settings.slots, dtype=torch.long, device=model.device)
        return Decoding(
            runner, model.lm_head, graphs=settings.graphs, kernels=settings.kernels, compiled=settings.compiled
        )

    @cached_property
    def reader(self) -> PromptReader:
        """The prompts that are being read."""
        cache, splits = self.decoding.cache, not self._packs
        return PromptReader(self.model, cache, self.prefixes, chunk=self._chunk, shares=not self._drops, splits=splits)
