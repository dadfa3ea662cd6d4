"""Chunked prefill: order of the waiting prompts, size of the next piece, reuse of cached prefixes."""

from __future__ import annotations

import logging
import time
from collections import deque

import torch
from torch import Tensor

from model.inference.images import BoundedCache
from model.inference.prompts import Prompt, embed_prompt
from model.inference.runner import Piece
from model.inference.running import Running
from model.inference.slots import Prefix, SlotCache, slot_bytes
from model.modeling.medplib import MedPLIBForCausalLM

_log = logging.getLogger(__name__)


class PromptReader:
    """The prompts that are being read, each in a slot of its own beyond those of the running requests.

    Args:
        model: the network.
        cache: the slots.
        prefixes: kept openings of prompts.
        chunk: tokens of one prompt read in one pass, at most.
        shares: whether openings are kept and used.
        splits: let a pass end where an opening ends, so that what is kept was computed as if it stood alone.
    """

    def __init__(
        self,
        model: MedPLIBForCausalLM,
        cache: SlotCache,
        prefixes: BoundedCache[Prefix],
        *,
        chunk: int,
        shares: bool,
        splits: bool,
    ) -> None:
        self.model, self.cache, self.prefixes = model, cache, prefixes
        self.chunk, self.shares, self.splits = chunk, shares, splits
        self.slots: dict[Running, int] = {}
        self._warned = False
        self._embeds: dict[Running, Tensor] = {}

    def next_pieces(self, waiting: deque[Running], running: int, budget: int) -> list[tuple[Running, Piece]]:
        """What to read in this pass: a stretch of each prompt until ``budget`` tokens are reached.

        Takes from ``waiting`` while there are slots. A prompt whose opening is being read waits for it: it will find
        it kept.
        """
        chosen: list[tuple[Running, Piece]] = []
        for row in (*self.slots, *tuple(waiting)):  # a copy in one go: other threads hand in meanwhile
            if budget <= 0:
                break
            if row not in self.slots:
                if running + len(self.slots) >= self.cache.slots:
                    break
                if self._opening_is_read(row):
                    continue
                waiting.remove(row)
                self._open(row, running)
            chosen.append((row, self._piece(row)))
            budget -= len(chosen[-1][1].embeds)
        return chosen

    def advance(self, row: Running, piece: Piece) -> bool:
        """Note that a piece was read; True where that was the whole prompt."""
        shared = self._shared_tokens(row.prompt)
        if row.read < shared <= piece.end:
            self.prefixes.put(row.prompt.prefix_key, self.cache.take_prefix(piece.slot, shared))
        row.read = piece.end
        return row.read == row.prompt.length

    def seat(self, row: Running, slot: int) -> None:
        """Move a prompt that was read into ``slot``; the prompt that is read there takes its slot."""
        place = self.slots[row]
        other = next((other for other, held in self.slots.items() if held == slot), row)
        if other is not row:
            self.cache.swap(place, slot, max(row.read, other.read))
            self.slots[other] = place
        elif place != slot:
            self.cache.move(place, slot, row.read)
        self.drop(row)  # last: while memory may still run out, it must be known to somebody

    def drop(self, row: Running) -> None:
        """Forget a prompt."""
        del self.slots[row], self._embeds[row]

    def lengths(self) -> dict[int, int]:
        """By slot, the tokens that are read: where a pass that decodes all slots may write what nobody needs."""
        return {slot: row.read for row, slot in self.slots.items()}

    def _piece(self, row: Running) -> Piece:
        shared = self._shared_tokens(row.prompt)
        end = shared if self.splits and row.read < shared else row.prompt.length
        end = min(end, row.read + self.chunk)
        return Piece(self._embeds[row][row.read - row.skipped : end - row.skipped], self.slots[row], row.read)

    def _open(self, row: Running, running: int) -> None:
        """Give a prompt a slot and embed it; its opening may be known already."""
        start = time.perf_counter()
        row.seconds["wait"] = start - row.submitted
        taken = set(self.slots.values())
        slot = next(slot for slot in range(running, self.cache.slots) if slot not in taken)
        prefix = self.prefixes.get(row.prompt.prefix_key) if self._uses_opening(row) else None
        self.slots[row], self._embeds[row] = slot, torch.empty(0)  # among the read already, should the rest fail
        self._embeds[row] = embed_prompt(self.model, row.prompt, opened=prefix is not None)[0]
        if prefix is not None:
            self.cache.put_prefix(slot, prefix)
            row.read = row.skipped = prefix.length
        row.seconds["encode"] += time.perf_counter() - start

    def _opening_is_read(self, row: Running) -> bool:
        """Whether the opening that a prompt would use is being read, and not yet kept."""
        key = row.prompt.prefix_key
        if not self._uses_opening(row) or key in self.prefixes:
            return False
        return any(
            other.prompt.prefix_key == key and other.read < self._shared_tokens(other.prompt) for other in self.slots
        )

    def _uses_opening(self, row: Running) -> bool:
        """Whether a prompt may begin behind a kept opening; not where the experts of all its tokens are to be seen."""
        return bool(self._shared_tokens(row.prompt)) and not row.ticket.request.router_stats

    def _shared_tokens(self, prompt: Prompt) -> int:
        """Leading tokens of a prompt that are worth keeping; 0 where they are not kept."""
        length = prompt.prefix_length
        size = slot_bytes(self.model.config.text_config, length, self.model.dtype)
        room = size <= self.prefixes.max_bytes
        if not room and self.prefixes.max_bytes and not self._warned:
            self._warned = True
            _log.warning(
                "every question about an image is read whole: its opening takes %d MiB, and prefix_cache_mb is %d",
                -(-size // 2**20),
                self.prefixes.max_bytes // 2**20,
            )
        return length if room and self.shares and length < prompt.length else 0
