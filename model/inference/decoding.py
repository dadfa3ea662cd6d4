"""Execution of decoder passes: eager, fused Triton kernels, ``torch.compile``, or CUDA graphs.

A graph is one launch for a whole pass, so the host is never what a token waits for. It fixes shapes: passes are
captured for pairs of batch and length, lazily, and every pass takes the smallest pair that holds it. What changes from
token to token goes through buffers that the graphs read.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.errors import MedPLIBError
from model.inference.runner import DecoderRunner, Piece, Rows, StepOutput
from model.inference.slots import buckets
from model.modeling.moe import MoEFeedForward, mix_by_scan

if TYPE_CHECKING:  # it imports Triton
    from model.inference.fused_pass import FusedPass

SHORTEST = 256
"""Cached tokens that the shortest graphs read; longer ones are powers of two."""
MOST_GRAPHS = 128
"""Graphs kept; passes that would need another run without one."""
_AGREEMENT = 0.05  # relative difference between a pass by kernels and the plain one that rounding can explain
_ROWS_COMPARED = 8  # at least, of every number of rows

_log = logging.getLogger(__name__)

Pass = Callable[[Tensor, Tensor, int], Tensor]
"""Final states [n, D] of last tokens long [n], lengths long [n] and a bucket."""
Replay = Callable[[], None]


@dataclass(frozen=True)
class _Recorded:
    """A recorded pass: ``replay`` computes it anew into ``hidden`` [b, D] and ``logits`` [b, V]."""

    replay: Replay
    hidden: Tensor
    logits: Tensor


class Decoding:
    """Decodes one token of every running request, in the fastest way that is allowed.

    The network must stay where it is and as it is: graphs and kernels keep the addresses of its weights.

    Args:
        runner: the plain passes.
        lm_head: states to logits.
        graphs: capture CUDA graphs; by default on CUDA.
        kernels: run the pass by Triton kernels; by default on CUDA where Triton is installed. Left off, with a warning,
            where they do not compute what the plain pass computes.
        compiled: let torch compile the plain pass instead; slow to start.

    Raises:
        MedPLIBError: graphs or kernels are demanded where there is no CUDA device, or kernels beside compilation.
    """

    def __init__(
        self,
        runner: DecoderRunner,
        lm_head: nn.Module,
        *,
        graphs: bool | None = None,
        kernels: bool | None = None,
        compiled: bool = False,
    ) -> None:
        cache = runner.cache
        cuda = cache.keys.is_cuda
        check_ways(cache.keys.device, graphs, kernels, compiled)
        self.runner, self.lm_head, self.cache = runner, lm_head, cache
        self.captures = cuda if graphs is None else graphs
        self.compiled = compiled
        if cuda or compiled:  # the other mixing waits for the host
            runner.mixing = mix_by_scan
        self.fused = None if kernels is False or compiled else _trusted_kernels(runner, demanded=bool(kernels))
        self._pass: Pass = self.fused or self._plain
        if compiled:
            self._pass = torch.compile(self._plain, dynamic=False, fullgraph=True)
        self._batches, self._lengths = buckets(cache.slots), buckets(cache.max_length, SHORTEST)
        self._token_buffer, self._length_buffer = (
            torch.zeros(cache.slots, dtype=torch.long, device=cache.keys.device) for _ in range(2)
        )
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._pool: Any = None

    @property
    def replays(self) -> bool:
        """Whether passes that only decode are run in a faster way."""
        return self.captures or self.compiled or self.fused is not None

    def batch_for(self, count: int) -> int:
        """Rows that a pass for ``count`` requests takes; those that fill it up write into slots that are free."""
        if self.runner.batch_invariant:
            return self.cache.slots
        return next(size for size in self._batches if size >= count) if self.captures or self.compiled else count

    def __call__(self, pieces: Sequence[Piece], rows: Rows | None, observe: bool = False) -> StepOutput:
        """As ``DecoderRunner.run``, which does what cannot be done faster. ``logits`` last until the next pass.

        Whoever is observed has a plain pass besides: the states, and what is kept of them, are those of the fast one,
        so that no request notices what another one observes.
        """
        if pieces or rows is None or not self.replays:
            return self.runner.run(pieces, rows, observe)
        choices = self.runner.run((), rows, True).choices if observe else None
        if self.fused is not None and not self.captures:
            return StepOutput(self.fused(rows.tokens, rows.lengths, rows.bucket), choices)
        batch = len(rows.tokens)
        length = next(size for size in self._lengths if size >= rows.bucket)
        self._token_buffer[:batch] = rows.tokens
        self._length_buffer[:batch] = rows.lengths
        recorded = self._recorded_for(batch, length) if self.captures else None
        if recorded is None:
            hidden, logits = self._run(batch, length)
        else:
            recorded.replay()
            hidden, logits = recorded.hidden.clone(), recorded.logits  # the host may look at states many passes later
        return StepOutput(hidden, choices, logits)

    def _plain(self, tokens: Tensor, lengths: Tensor, bucket: int) -> Tensor:
        return self.runner.decode(tokens, lengths, bucket).hidden

    def _run(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """States and logits of what the buffers hold."""
        tokens, lengths = self._token_buffer[:batch], self._length_buffer[:batch]
        if not self.compiled:
            hidden = self._pass(tokens, lengths, length)
        else:  # torch compiles a function for few shapes unless more are announced
            limit = len(self._batches) * len(self._lengths) + 8
            with torch._dynamo.config.patch(recompile_limit=limit):
                hidden = self._pass(tokens, lengths, length)
        return hidden, self.lm_head(hidden)

    def _recorded_for(self, batch: int, length: int) -> _Recorded | None:
        """The graph of a pair, captured at its first use; None where there is none."""
        key = (batch, length)
        if key not in self._recorded:
            if len(self._recorded) >= MOST_GRAPHS:
                return None
            try:
                recorded = self._capture(lambda: self._run(batch, length))
            except RuntimeError as error:  # out of memory, or something a graph cannot hold
                self._without_graphs(str(error))
                return None
            wanted = self._run(batch, length)[0]
            recorded.replay()
            if (difference := _apart(recorded.hidden, wanted)) > _AGREEMENT:
                self._without_graphs(f"a graph's states differ from the pass it records by {difference:.2g}")
                return None
            self._recorded[key] = recorded
        return self._recorded[key]

    def _without_graphs(self, reason: str) -> None:
        _log.warning("decoding goes on without CUDA graphs: %s", reason)
        self.captures = False

    def _capture(self, run: Callable[[], tuple[Tensor, Tensor]]) -> _Recorded:
        """Run a few times aside, so that everything is loaded and compiled, then record.

        Running it more than once does no harm: each time the same keys and values are written to the same places.
        """
        here = torch.cuda.current_stream()
        aside = torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(3):
                run()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may prepare images meanwhile; what they do on the device is not this graph's business.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden, logits = run()
        self._pool = graph.pool()  # one pool for all graphs: they never run at the same time
        return _Recorded(graph.replay, hidden, logits)


def check_ways(device: torch.device, graphs: bool | None, kernels: bool | None, compiled: bool) -> None:
    """Raise ``MedPLIBError`` where a way of decoding is demanded that a device does not have."""
    if device.type != "cuda" and (graphs or kernels):
        raise MedPLIBError(
            f"{'graphs' if graphs else 'kernels'} need a CUDA device, and the model is on {device}; "
            "leave the setting off"
        )
    if kernels and compiled:
        raise MedPLIBError("kernels and compile are two ways to run the same pass; give one of them")


def _trusted_kernels(runner: DecoderRunner, demanded: bool) -> FusedPass | None:
    """The pass by kernels, if this machine can build them and they compute what the plain pass computes.

    Raises:
        MedPLIBError: they are demanded, and cannot be had.
    """
    reason = "they need CUDA, Triton and a head width that is a power of two"
    width = runner.cache.keys.shape[-1]
    if runner.cache.keys.is_cuda and importlib.util.find_spec("triton") is not None and width & (width - 1) == 0:
        try:
            from model.inference.fused_pass import FusedPass

            fused = FusedPass(runner.decoder, runner.cache, runner.cos, runner.sin, runner.batch_invariant)
            difference = _difference(runner, fused)
        except Exception as error:  # noqa: BLE001 - no compiler, an unknown GPU: plain passes answer all the same
            reason = f"they cannot be built here: {type(error).__name__}: {error}"
        else:
            if difference <= _AGREEMENT:
                return fused
            reason = f"they differ from the plain pass by {difference:.2g}"
        _log.warning("decoding goes on without kernels: %s", reason)
    if demanded:
        raise MedPLIBError(f"the decoding kernels cannot be used: {' '.join(reason.split())}; leave the setting off")
    return None


@torch.inference_mode()
def _difference(runner: DecoderRunner, fused: FusedPass) -> float:
    """How far the states after one layer are apart, a dense layer and a mixture, from one row to all slots: the worst
    of the medians over some rows each, as rounding may send a row to another expert.
    """
    cache = runner.cache
    plain, by_kernels = copy.copy(runner), copy.copy(fused)
    mixtures = [isinstance(layer.mlp, MoEFeedForward) for layer in runner.layers]
    device = cache.keys.device
    generator = torch.Generator(device).manual_seed(0)
    for store in (cache.keys, cache.values):
        store[:1].normal_(generator=generator)
    worst = 0.0
    for at in sorted({mixtures.index(kind) for kind in mixtures}):
        plain.layers, by_kernels.layers = runner.layers[at : at + 1], fused.layers[at : at + 1]
        for count in sorted({min(rows, cache.slots) for rows in (1, 2, 4, cache.slots)}):
            found, wanted = [], []
            for _ in range(-(-_ROWS_COMPARED // count)):
                vocabulary = runner.decoder.embed_tokens.num_embeddings
                tokens = torch.randint(vocabulary, (count,), generator=generator, device=device)
                lengths = torch.randint(cache.max_length, (count,), generator=generator, device=device)
                wanted.append(plain.decode(tokens, lengths, cache.max_length).hidden)
                found.append(by_kernels(tokens, lengths, cache.max_length))
            worst = max(worst, _apart(torch.cat(found), torch.cat(wanted)))
    for store in (cache.keys, cache.values):
        store[:1].zero_()
    return worst


def _apart(found: Tensor, wanted: Tensor) -> float:
    """Relative difference of states [n, D], the median over rows."""
    apart = (found.float() - wanted.float()).norm(dim=1) / wanted.float().norm(dim=1)
    return float(apart.median().nan_to_num(torch.inf))
