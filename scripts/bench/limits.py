"""What the hardware allows at best, and how much memory a piece of work needed: for ``infer.py``.

Bytes that must be moved are set against the measured copy bandwidth, operations against the measured rate of matrix
products; whatever takes longer is the limit.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model.inference.quantise import weight_bytes
from model.inference.quantised_linear import QuantisedLinear
from model.inference.slots import slot_bytes
from model.modeling.medplib import MedPLIBForCausalLM
from model.modeling.moe import MoEFeedForward

Work = Callable[[], object]
_MB = 2**20


class Clock:
    """Times work in rounds: medians, after a warm-up, of what a device has finished.

    Args:
        device: waited for before a time is taken.
        rounds: times that each kind of work is timed.
    """

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, work: Work) -> float:
        """Seconds of one call."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def fastest(self, work: Work) -> float:
        """Seconds of the fastest of many calls: what a device can do when nothing else delays it."""
        work()
        return min(self.once(work) for _ in range(20))

    def medians(self, *works: Work) -> list[float]:
        """Median seconds of a call of each kind of work; they take turns in every round.

        Short work is repeated within a round, so that a round lasts long enough to be timed.
        """
        repeats = []
        for work in works:
            work()
            repeats.append(max(1, min(50, round(0.05 / max(self.once(work), 1e-6)))))
        times: list[list[float]] = [[] for _ in works]
        for _ in range(self.rounds):
            for work, count, found in zip(works, repeats, times, strict=True):
                found.append(self.once(lambda work=work, count=count: [work() for _ in range(count)]) / count)
        return [statistics.median(found) for found in times]


class PeakMemory:
    """The most memory in use since ``reset``: allocated on a CUDA device, else resident in the process.

    Attributes:
        resets: False where the system does not let the peak of a process be reset; it is then the peak since the start.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.resets = True
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self.resets = False

    def read(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Hardware:
    """What was measured of a device in one floating type.

    Attributes:
        bandwidth: bytes read and written in a second by a copy between buffers larger than the caches.
        rate: operations in a second of products of square matrices.
        buffer: bytes of each of the copy's buffers.
        side: rows of the matrices.
        cache: bytes of a CPU's last cache, 0 where unknown.
    """

    bandwidth: float
    rate: float
    buffer: int
    side: int
    cache: int

    @classmethod
    def measure(cls, clock: Clock, dtype: torch.dtype) -> Hardware:
        """Measure the clock's device."""
        device = clock.device
        cache = last_cache_bytes() if device.type == "cpu" else 0
        size = max(256 * _MB, 4 * cache) if device.type == "cpu" else 1024 * _MB
        source = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
        target = torch.empty_like(source)
        copying = clock.fastest(lambda: target.copy_(source))
        side = 1024 if device.type == "cpu" else 8192
        square = torch.randn(side, side, device=device).to(dtype)
        product = torch.empty_like(square)
        multiplying = clock.fastest(lambda: torch.mm(square, square, out=product))
        return cls(2 * source.nbytes / copying, 2 * side**3 / multiplying, source.nbytes, side, cache)

    def seconds(self, num_bytes: float, operations: float) -> float:
        """The least time that so many bytes and operations take."""
        return max(num_bytes / self.bandwidth, operations / self.rate)


def last_cache_bytes() -> int:
    """Size of the largest cache of the first core; 0 where the system does not tell."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding="ascii").strip()
            sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
    return max(sizes)


@dataclass(frozen=True)
class Demand:
    """What a set of requests needs at least: how often each part must run.

    Attributes:
        requests: answers.
        images: passes of the CLIP tower.
        segmented: passes of the SAM encoder.
        prompt_tokens: tokens read.
        context: tokens that a slot holds in the middle of an answer.
        steps: tokens decoded one at a time, of all answers together.
        batch: rows decoded together.
    """

    requests: int
    images: int
    segmented: int
    prompt_tokens: int
    context: int
    steps: int
    batch: int = 1


class Limits:
    """The least time of each part of the network on the hardware as measured; a bound, not a promise.

    Args:
        model: the network, quantised or not.
        hardware: what its device can do.
    """

    def __init__(self, model: MedPLIBForCausalLM, hardware: Hardware) -> None:
        self.model, self.hardware = model, hardware
        config = model.config
        sam_size, clip_size = config.sam_config.vision_config.image_size, config.vision_config.image_size
        self.clip_operations = self._operations(model.encode_images, clip_size)
        self.sam_operations = self._operations(model.encode_segmented_images, sam_size)
        self.clip_bytes = weight_bytes(model.model.vision_tower)
        self.sam_bytes = weight_bytes(model.model.sam.image_encoder)
        self.products = active_products(model.model.decoder.layers)
        self.head = model.lm_head.weight.numel()

    def _operations(self, encode: Callable[[torch.Tensor], object], size: int) -> int:
        pixels = torch.zeros(1, 3, size, size, dtype=self.model.dtype, device=self.model.device)
        with FlopCounterMode(display=False) as counter:
            encode(pixels)
        return int(counter.get_total_flops())

    def step_bytes(self, batch: int, context: int) -> float:
        """Weights that a decoding step of ``batch`` rows reads, and the keys and values of ``context`` tokens each."""
        kept = slot_bytes(self.model.config.text_config, context, self.model.dtype)
        layers = active_bytes(self.model.model.decoder.layers, batch)
        return layers + self.model.lm_head.weight.nbytes + batch * kept

    def step(self, batch: int, context: int) -> float:
        """Seconds of a decoding step."""
        text = self.model.config.text_config
        attention = 4 * context * text.hidden_size * text.num_hidden_layers
        operations = batch * (2 * (self.products + self.head) + attention)
        return self.hardware.seconds(self.step_bytes(batch, context), operations)

    def prefill(self, tokens: int, *, alone: bool = True) -> float:
        """Seconds of reading a prompt; ``alone`` reads the weights for it, else they are read for many at once."""
        text = self.model.config.text_config
        operations = 2 * tokens * self.products + 2 * tokens**2 * text.hidden_size * text.num_hidden_layers
        num_bytes = active_bytes(self.model.model.decoder.layers, tokens) if alone else 0
        return self.hardware.seconds(num_bytes, operations)

    def clip(self, *, alone: bool = True) -> float:
        """Seconds of encoding an image for the decoder."""
        return self.hardware.seconds(self.clip_bytes if alone else 0, self.clip_operations)

    def sam(self, *, alone: bool = True) -> float:
        """Seconds of encoding an image for its masks."""
        return self.hardware.seconds(self.sam_bytes if alone else 0, self.sam_operations)

    def answers(self, demand: Demand) -> float:
        """Seconds of a set of requests: its encodings, prompts and decoding steps, one after the other."""
        alone = demand.batch == 1
        reading = demand.requests * self.prefill(demand.prompt_tokens // demand.requests, alone=alone)
        return (
            demand.images * self.clip(alone=alone)
            + demand.segmented * self.sam(alone=alone)
            + reading
            + demand.steps / demand.batch * self.step(demand.batch, demand.context)
        )


def active_products(layers: nn.Module) -> int:
    """Weights of linear layers that one token is multiplied with; of a mixture, those of the experts it is sent to."""
    shares = {
        part: mixture.top_k / mixture.num_experts
        for mixture in layers.modules()
        if isinstance(mixture, MoEFeedForward)
        for part in mixture.experts.modules()
    }
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear | QuantisedLinear)]
    return round(sum(shares.get(module, 1.0) * module.in_features * module.out_features for module in linears))


def active_bytes(layers: nn.Module, tokens: int) -> float:
    """Bytes of decoder weights, quantised or not, that a pass over some tokens reads, where chance chooses experts."""
    total = float(weight_bytes(layers))
    for module in layers.modules():
        if isinstance(module, MoEFeedForward):
            untouched = (1 - module.top_k / module.num_experts) ** tokens
            total -= weight_bytes(module.experts) * untouched
    return total
