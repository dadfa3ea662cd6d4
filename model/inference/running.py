"""State of one running request: its tokens and text, its end, and the time of each part."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.inference.answer import Finish
from model.inference.generation import seed_of
from model.inference.mask_stage import MaskJob
from model.inference.prompts import Prompt
from model.inference.requests import OnText, Ticket
from model.inference.targets import mask_labels
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import SEG_TOKEN


@dataclass(eq=False)
class Running:
    """State of one request.

    Attributes:
        limit: tokens it may say.
        read: tokens of the prompt that its slot holds; ``skipped`` of them were kept from another prompt.
        launched: tokens whose computation was begun; those in ``ids`` are known already.
        finish: set when the answer is complete.
        seg_states: what each ``<SEG>`` was chosen from.
        last_states: what the last two tokens were chosen from, kept where a mask is decoded in any case.
        text: so far, kept where it is streamed or may be stopped; ``streamed`` is what was sent of it.
        expert_counts: long [mixture layers, E], tokens per expert so far, if asked for.
    """

    ticket: Ticket
    prompt: Prompt
    on_text: OnText | None
    limit: int
    launched: int = 0
    read: int = 0
    skipped: int = 0
    ids: list[int] = field(default_factory=list)
    seg_states: list[Tensor] = field(default_factory=list)
    last_states: tuple[Tensor, ...] = ()
    finish: Finish | None = None
    text: str = ""
    streamed: str = ""
    expert_counts: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    submitted: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.seed = seed_of(self.ticket.request.settings)

    @property
    def length(self) -> int:
        """Tokens in its slot once everything that was begun is done, but for the last one said."""
        return self.prompt.length + self.launched - 1

    def count_experts(self, choices: Tensor) -> None:
        """Add expert choices, bool [mixture layers, T, E]."""
        counts = choices.sum(dim=1)
        self.expert_counts = counts if self.expert_counts is None else self.expert_counts + counts

    def append_token(
        self, token: int, state: Tensor, end_ids: set[int], seg_id: int, processor: MedPLIBProcessor
    ) -> None:
        """Take a token that was chosen from the state [D]; may complete the answer."""
        if self.finish is not None or self.ticket.cancelled:
            return
        if self.ticket.request.always_mask:
            self.last_states = (*self.last_states[-1:], state)
        settings = self.ticket.request.settings
        if token in end_ids:
            self.finish = "end"
        else:
            self.ids.append(token)
            if token == seg_id:
                self.seg_states.append(state)
            if self.on_text is not None or settings.stop:
                self.text = processor.decode_text(self.ids)
                self._stop_at(settings.stop)
            if self.finish is None and len(self.ids) >= self.limit:
                self.finish = "length"
        if self.on_text is not None:
            self._tell(self.on_text)

    def _stop_at(self, stops: tuple[str, ...]) -> None:
        places = [place for place in (self.text.find(stop) for stop in stops) if place >= 0]
        if places:
            self.text, self.finish = self.text[: min(places)].rstrip(), "stop"
            del self.seg_states[self.text.count(SEG_TOKEN) :]

    def _tell(self, on_text: OnText) -> None:
        """Stream the text, but for an end that may yet become a stop text and go.

        Nor is a text sent that is shorter than the last one: while the bytes of a rare character are incomplete, those
        before it cannot be read either.
        """
        text = self.text
        if self.finish is None:
            stops = self.ticket.request.settings.stop
            beginnings = [stop[:length] for stop in stops for length in range(1, len(stop))]
            held_back = max((len(one) for one in beginnings if text.endswith(one)), default=0)
            text = text[: len(text) - held_back].rstrip()
        if text != self.streamed and (self.finish is not None or text.startswith(self.streamed)):
            self.streamed = text
            on_text(text)

    def final_text(self, processor: MedPLIBProcessor) -> str:
        """The whole answer's text."""
        return self.text if self.finish == "stop" else processor.decode_text(self.ids)

    def mask_job(self, text: str) -> MaskJob:
        """The masks to decode."""
        request = self.ticket.request
        unspoken = () if self.seg_states or self.finish == "cancelled" else self.last_states[:1]
        states = (unspoken or self.seg_states) if self.prompt.image is not None else ()
        labels = mask_labels("" if unspoken else text, request.question, len(states))
        image: Any = self.prompt.image  # without one, there are no states
        return MaskJob(request, image, states, labels, spoken=not unspoken)

    def notes(self, text: str) -> tuple[str, ...]:
        """What a reader of the answer should know besides."""
        pointless = self.prompt.image is None and SEG_TOKEN in text
        return ("the answer points at something, but there is no image: no mask",) if pointless else ()

    def router_shares(self) -> list[list[float]] | None:
        """Per mixture layer, the share of this request's tokens that each expert computed."""
        if self.expert_counts is None:
            return None
        counts = self.expert_counts.to("cpu", torch.float32)
        return (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
