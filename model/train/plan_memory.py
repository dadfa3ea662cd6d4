"""Bytes of a training step by part: what each engine keeps of weights, gradients and optimiser, and when.

A step has two moments at which memory peaks: in the backward pass, where activations are alive, and in the update,
where copies of the gradients are. What DeepSpeed keeps was read off its tensors (see ``scripts/bench/plan.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.train.engine import deepspeed_config
from model.train.plan_activations import Pass
from model.train.plan_network import Weight
from model.train.recipe import Recipe

GIB = 2**30
MASTER, MOMENTS = 4, 8
"""Bytes of a trained number's float32 master copy, and of AdamW's two moments."""

CONTEXT = 1.0 * GIB
"""Taken on a GPU by CUDA, its libraries and NCCL: an assumption, it differs by driver and card."""
FRAGMENTATION = 0.05
"""Share of what comes and goes that the allocator cannot use: an assumption."""
_QUANTISED_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Of a weight: nf4 has a byte a block of 64, and a float32 a block of 256 of those."""
_PROCESS, _LOADER = 3.0 * GIB, 0.5 * GIB
"""Host memory of a training process with its libraries, and of a loader process: assumptions."""

_BUCKET, _LIVE, _PREFETCH, _PERSISTENT, _SUB_GROUP = 5e8, 1e9, 5e7, 1e5, 1e9
"""DeepSpeed's defaults, in numbers, not bytes."""


@dataclass(frozen=True)
class Machine:
    """What a run would have.

    Attributes:
        gpus: in each node, one process each.
        nodes: how many there are.
        gpu_memory: of each GPU, in bytes.
        host_memory: of each node, in bytes.
        device: ``cuda``, or ``cpu``, where processes take the place of GPUs.
    """

    gpus: int
    nodes: int = 1
    gpu_memory: float = 24.0 * GIB
    host_memory: float = 256.0 * GIB
    device: str = "cuda"

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Part:
    """Bytes of one part on one GPU, in the backward pass and in the update."""

    name: str
    backward: float
    update: float


@dataclass(frozen=True)
class Memory:
    """Where the bytes of a run are.

    Attributes:
        parts: on each GPU.
        host: on each node, by part.
        disk: in the run folder, by part.
    """

    parts: tuple[Part, ...]
    host: Mapping[str, float] = field(default_factory=dict)
    disk: Mapping[str, float] = field(default_factory=dict)

    @property
    def backward(self) -> float:
        """Bytes on a GPU in the backward pass."""
        return sum(part.backward for part in self.parts)

    @property
    def update(self) -> float:
        """Bytes on a GPU in the optimiser's update."""
        return sum(part.update for part in self.parts)

    @property
    def peak(self) -> float:
        """Most bytes on a GPU."""
        return max(self.backward, self.update)

    @property
    def host_total(self) -> float:
        """Bytes on each node."""
        return sum(self.host.values())


class States:
    """Weights, gradients and optimiser of one rank.

    Args:
        recipe: its engine resolved: no ``auto``.
        weights: of the whole network.
        machine: where it would run.
    """

    def __init__(self, recipe: Recipe, weights: Sequence[Weight], machine: Machine) -> None:
        self.recipe, self.machine, self.engine = recipe, machine, recipe.engine
        self.deepspeed = recipe.engine.kind == "deepspeed"
        self.stage = recipe.engine.zero_stage if self.deepspeed else 0
        self.bf16 = self.deepspeed and recipe.engine.precision == "bf16"
        self.size = 2 if self.bf16 else 4
        self.zero: Mapping[str, Any] = deepspeed_config(recipe)["zero_optimization"] if self.deepspeed else {}
        self.offloads = "offload_optimizer" in self.zero
        self.offloads_weights = "offload_param" in self.zero
        self.weights = weights
        self.ranks = machine.ranks
        self.experts = recipe.engine.expert_parallel
        self.trained = self._count(weight for weight in weights if weight.trained)
        self.largest = max((weight.numel for weight in weights if weight.trained), default=0)
        self.shared = self._shared(weight for weight in weights if weight.trained)
        self.group = self._largest_group()

    def _count(self, weights: Iterable[Weight]) -> float:
        """Numbers that a rank holds, experts of other ranks left out."""
        return sum(weight.numel / (self.experts if weight.expert else 1) for weight in weights)

    def _shared(self, weights: Iterable[Weight]) -> float:
        """Trained numbers whose optimiser state a rank keeps: under ZeRO its share, of an expert too, which as many
        ranks fewer hold as there are experts more."""
        return sum(weight.numel for weight in weights) / (self.ranks if self.stage else 1)

    def _largest_group(self) -> float:
        """Trained numbers of a rank's share of the optimiser's largest group; groups are updated one by one."""
        groups: dict[tuple[bool, bool], list[Weight]] = {}
        for weight in self.weights:
            if weight.trained:
                groups.setdefault((weight.lora, weight.expert and self.experts > 1), []).append(weight)
        return max((self._shared(group) for group in groups.values()), default=0.0)

    # --- on a GPU ---------------------------------------------------------------------------------------------------

    def frozen_bytes(self) -> float:
        """Weights that do not learn, quantised where the recipe says so."""
        total = 0.0
        for weight in self.weights:
            if not weight.trained:
                total += self._stored(weight) / (self.experts if weight.expert else 1)
        return total / (self.ranks if self.stage == 3 else 1)

    def _stored(self, weight: Weight) -> float:
        scheme = self.recipe.lora.quantise
        if scheme == "none" or not weight.quantised:
            return weight.numel * self.size
        return weight.numel * _QUANTISED_BYTES[scheme] + (4 * weight.rows if scheme == "int8" else 0)

    def trained_bytes(self) -> float:
        """Weights that learn, in the type they are computed in."""
        return self.trained * self.size / (self.ranks if self.stage == 3 else 1)

    def optimiser_bytes(self) -> float:
        """Master copies and moments, wherever they lie."""
        has_master = self.deepspeed and (self.stage > 0 or self.bf16)
        return self.shared * (MASTER * has_master + MOMENTS)

    def gradient_bytes(self, late: float) -> float:
        """Gradients that are there when activations are at their most.

        Args:
            late: trained numbers whose gradients come before those of the decoder: the backward pass starts with them.
        """
        accumulates = self.recipe.schedule.accumulation > 1
        if self.stage == 0:
            return (self.trained if accumulates else late) * self.size
        share = self.shared * self.size
        if self.stage == 3:  # a buffer of its own, always there
            return 0.0 if self.offloads else share
        if self.stage == 1 and accumulates:
            return self.trained * self.size
        return 0.0 if self.offloads else share

    def late_gradient_bytes(self) -> float:
        """Gradients at the end of the backward pass, where activations are gone."""
        accumulates = self.recipe.schedule.accumulation > 1
        whole, share = self.trained * self.size, self.shared * self.size
        if self.stage == 0:
            return whole
        if self.stage == 3:
            return 0.0 if self.offloads else share
        held = 0.0 if self.offloads else share
        if self.stage == 1 and (accumulates or not self.zero.get("overlap_comm")):
            return whole + held * accumulates
        return held * (1 + accumulates)

    def buffer_bytes(self) -> tuple[float, float]:
        """DeepSpeed's buckets and gathered weights: in the backward pass, and those that stay."""
        if not self.deepspeed:
            return 0.0, 0.0
        bucket = float(self.zero.get("reduce_bucket_size", _BUCKET)) * self.size
        if self.stage == 0:
            return min(self.trained * self.size, _BUCKET * self.size), 0.0
        if self.stage == 3:
            return self._gathered() + bucket, bucket
        contiguous = self.zero.get("contiguous_gradients", True)
        moving = (bucket if contiguous else 0) * (2 if self.zero.get("overlap_comm") else 1)
        kept = self.largest * self.size if self.offloads else 0
        return moving + kept, float(kept)

    def _gathered(self) -> float:
        """Weights that ZeRO-3 holds whole for the layers at hand, read ahead, or too small to share out."""
        total = self._count(self.weights)
        live = min(total, float(self.zero.get("stage3_max_live_parameters", _LIVE)))
        ahead = min(total, 2 * float(self.zero.get("stage3_prefetch_bucket_size", _PREFETCH)))
        threshold = float(self.zero.get("stage3_param_persistence_threshold", _PERSISTENT))
        small = sum(weight.numel for weight in self.weights if weight.numel < threshold) * (1 - 1 / self.ranks)
        return (live + ahead + min(small, total - live)) * self.size

    def update_bytes(self) -> float:
        """Most that the update adds to weights, optimiser and buffers: gradients and their copies."""
        on_cpu = self.machine.device == "cpu"
        gradients = (self.shared if self.stage else self.trained) * self.size
        if self.offloads:
            return 0.0
        if self.stage == 0:
            whole = self.trained * (self.size + (MASTER if self.bf16 else 0))
            return whole + (MOMENTS * self.largest if on_cpu else 0)
        group = min(self.group, float(self.zero.get("sub_group_size", _SUB_GROUP))) if self.stage == 3 else self.group
        if self.stage == 3:
            return gradients + MASTER * group + (MOMENTS * group if on_cpu else 0)
        flattened = gradients + group * (self.size + (MASTER if self.bf16 else 0))
        stepping = gradients - group * self.size + MASTER * group + MOMENTS * group
        return max(flattened, stepping) if on_cpu else flattened

    def autocast_bytes(self, checkpointing: bool) -> float:
        """bf16 copies of float32 weights that the torch engine's backward pass needs: all, or one layer's."""
        if self.deepspeed or self.recipe.engine.precision != "bf16":
            return 0.0
        decoder = [weight for weight in self.weights if ".decoder.layers." in weight.name and weight.rows > 1]
        depth = len({weight.name.split(".layers.")[1].split(".")[0] for weight in decoder})
        inside = sum(weight.numel for weight in decoder)
        kept = sum(weight.numel for weight in decoder if weight.trained)
        head = sum(weight.numel for weight in self.weights if weight.name.startswith("lm_head."))
        return 2 * (head + (max(kept, inside / max(depth, 1)) if checkpointing else inside))

    def dequantised_bytes(self) -> float:
        """The largest quantised weight in the type it is computed in."""
        if self.recipe.lora.quantise == "none":
            return 0.0
        return 2.0 * max((weight.numel for weight in self.weights if weight.quantised), default=0)

    def offloaded_bytes(self) -> float:
        """What a rank keeps in the host's memory: optimiser, float32 gradients, and copies on their way."""
        if not self.offloads:
            return 0.0
        copies = self.size  # weights on their way back, or gradients on their way there
        if self.stage < 3:
            copies += self.size * (2 if self.recipe.schedule.accumulation > 1 else 1)
        return self.shared * (MASTER + MOMENTS + MASTER + copies)

    # --- elsewhere --------------------------------------------------------------------------------------------------

    def host(self) -> dict[str, float]:
        """Bytes on each node."""
        loaded = sum(weight.numel for weight in self.weights) * self.size
        workers = self.recipe.data.workers * self.machine.gpus
        parts = {
            "processes": _PROCESS * self.machine.gpus,
            "loader workers": _LOADER * workers,
            "network while it loads": loaded * self.machine.gpus,
        }
        if self.offloads:
            parts["optimiser and gradients"] = self.offloaded_bytes() * self.machine.gpus
        if self.offloads_weights:
            parts["weights"] = (self.frozen_bytes() + self.trained_bytes()) * self.machine.gpus
        if self.offloads:  # they come when the network has gone to the GPUs
            parts["network while it loads"] = max(
                0.0,
                parts["network while it loads"]
                - sum(parts.get(name, 0.0) for name in ("optimiser and gradients", "weights")),
            )
        return parts

    def disk(self) -> dict[str, float]:
        """Bytes in the run folder: checkpoints that stay, the one being written, and the result."""
        trained = sum(weight.numel for weight in self.weights if weight.trained)
        plain = sum(weight.numel for weight in self.weights if not weight.lora)
        has_master = self.deepspeed and (self.stage > 0 or self.bf16)
        one = trained * (2 * self.size + (MASTER if has_master else 0) + MOMENTS)
        exports = 2 if self.recipe.saving.published else 1
        return {
            "one checkpoint": one,
            "checkpoints": one * (self.recipe.saving.keep + 1),
            "result": plain * self.size * exports,
        }


def memory_of(recipe: Recipe, weights: Sequence[Weight], machine: Machine, activations: Pass) -> Memory:
    """Bytes of one rank by part.

    Args:
        recipe: its engine resolved.
        weights: of the planned network.
        machine: where it would run.
        activations: of a pass, from ``ActivationModel``.
    """
    states = States(recipe, weights, machine)
    first = ("lm_head.", "model.mask_head.", "model.sam.")  # the backward pass begins with these
    late = sum(weight.numel for weight in weights if weight.trained and weight.name.startswith(first))
    copies = states.autocast_bytes(recipe.engine.gradient_checkpointing) + states.dequantised_bytes()
    moments = (
        (activations.peak + copies, states.gradient_bytes(late)),
        (activations.tail, states.late_gradient_bytes()),
    )
    alive, gradients = max(moments, key=sum)
    moving, staying = states.buffer_bytes()
    optimiser = 0.0 if states.offloads else states.optimiser_bytes()
    frozen, trained = (0.0, 0.0) if states.offloads_weights else (states.frozen_bytes(), states.trained_bytes())
    parts = [
        Part("weights, frozen", frozen, frozen),
        Part("weights, trained", trained, trained),
        Part("optimiser", optimiser, optimiser),
        Part("gradients", gradients, states.update_bytes()),
        Part("activations", alive, 0.0),
        Part("buffers", moving, staying),
    ]
    if machine.device == "cuda":
        spare = [FRAGMENTATION * sum(getattr(part, moment) for part in parts[3:]) for moment in ("backward", "update")]
        parts += [Part("fragmentation", *spare), Part("CUDA context", CONTEXT, CONTEXT)]
    return Memory(tuple(part for part in parts if part.backward or part.update), states.host(), states.disk())
