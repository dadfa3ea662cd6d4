"""Expert parallelism: each rank holds some experts of every mixture layer, and tokens are exchanged.

Routing stays the network's own (``MoEFeedForward.route``), so capacity, dropping and the load-balancing loss are the
native layer's, per rank as in DeepSpeed; only ``mixing``, what happens to tokens once they are routed, is replaced.
Experts keep their numbers: a rank's parameters are ``experts.3.up_proj.weight`` as ever, and those that lie elsewhere
leave a place without parameters. Hence LoRA, the choice of what learns and checkpoints need to know nothing.

From DeepSpeed come the process groups and what ZeRO 1 and 2 do with them: gradients of parameters marked as an
expert's are averaged over the ranks that hold that expert. Its MoE layer is not used: its gate routes padding like any
token and its weights have other names. Nor is its AutoEP, which knows neither capacity nor LoRA inside experts. And
tokens are not padded to fixed capacity slots: each rank first sends the others its number of tokens, which costs E
numbers a layer and makes the exchange exact whether tokens are dropped or not.

Import it only where DeepSpeed is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import Tensor, distributed, nn

from model.errors import MedPLIBError
from model.modeling.decoder import MedPLIBDecoderLayer
from model.modeling.moe import MoEFeedForward


class Elsewhere(nn.Module):
    """The place of an expert that another rank holds."""

    def forward(self, tokens: Tensor) -> Tensor:
        raise RuntimeError("this expert lies on another rank; tokens reach it through the layer's mixing alone")


class ExpertGroups(MoE):
    """Marks for DeepSpeed that parameters of this network are experts shared out over ``size`` ranks.

    DeepSpeed looks for its own layer to decide whether ZeRO keeps expert parameters apart. This one has no experts and
    no parameters, so nothing else in DeepSpeed (such as its files of single experts) finds anything to do.
    """

    def __init__(self, size: int) -> None:
        nn.Module.__init__(self)
        self.expert_group_name = group_name(size)
        self.num_experts = self.num_local_experts = 0

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Nothing to do: ``share_experts`` made the groups."""


class MixOverRanks:
    """Mixes outputs of experts that lie on the ``size`` ranks of a group, in order; all call it at the same time."""

    def __init__(self, group: distributed.ProcessGroup, size: int) -> None:
        self.group, self.size = group, size

    def __deepcopy__(self, memo: dict[int, Any]) -> MixOverRanks:
        return self  # process groups cannot be copied

    def __call__(self, tokens: Tensor, combine: Tensor, kept: Tensor, experts: Iterable[nn.Module]) -> Tensor:
        """As ``mix_by_index``; of the E experts, those of other ranks are reached through the group."""
        here = [expert for expert in experts if not isinstance(expert, Elsewhere)]
        expert_ids, rows = kept.t().nonzero(as_tuple=True)  # grouped by expert, and so by rank
        sending = kept.sum(dim=0).view(self.size, -1)  # [ranks, experts of each]
        coming = torch.empty_like(sending)  # [ranks, experts here]
        distributed.all_to_all_single(coming, sending, group=self.group)
        out_sizes, in_sizes = sending.sum(dim=1).tolist(), coming.sum(dim=1).tolist()
        arrived = _Exchange.apply(tokens[rows], out_sizes, in_sizes, self.group)
        # Rows come grouped by rank, then expert; in this order they are grouped by expert.
        here_ids = torch.arange(coming.shape[1], device=coming.device).repeat(coming.shape[0])
        order = here_ids.repeat_interleave(coming.flatten()).argsort(stable=True)
        loads = coming.sum(dim=0).tolist()
        parts = arrived[order].split(loads)
        outputs = torch.cat([expert(part) for expert, part in zip(here, parts, strict=True)])
        outputs = _Exchange.apply(outputs[order.argsort()], in_sizes, out_sizes, self.group)
        outputs = outputs * combine[rows, expert_ids, None].to(outputs.dtype)
        return outputs.new_zeros(len(tokens), outputs.shape[-1]).index_add(0, rows, outputs)


class _Exchange(torch.autograd.Function):
    """Rows to other ranks and rows from them; gradients travel back the same way."""

    @staticmethod
    def forward(  # type: ignore[override]
        context: Any, rows: Tensor, out_sizes: list[int], in_sizes: list[int], group: distributed.ProcessGroup
    ) -> Tensor:
        context.sizes, context.group = (out_sizes, in_sizes), group
        arrived = rows.new_empty(sum(in_sizes), rows.shape[1])
        distributed.all_to_all_single(arrived, rows.contiguous(), in_sizes, out_sizes, group=group)
        return arrived

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        out_sizes, in_sizes = context.sizes
        back = gradient.new_empty(sum(out_sizes), gradient.shape[1])
        distributed.all_to_all_single(back, gradient.contiguous(), out_sizes, in_sizes, group=context.group)
        return back, None, None, None


def group_name(size: int) -> str:
    """DeepSpeed's name for the groups of ``size`` ranks."""
    return f"ep_size_{size}"


def share_experts(network: nn.Module, size: int) -> None:
    """Keep this rank's experts of every mixture layer of the decoder, and exchange tokens with the others; in place.

    A mixture in the projector stays whole: it is small, and ranks have images of their own number. Called by every
    rank, after LoRA was added and before the engine is made.

    Raises:
        MedPLIBError: there is no mixture, or one whose experts cannot be divided by ``size``.
    """
    layers = dict(mixture_layers(network))
    if not layers:
        raise MedPLIBError(f"engine.expert_parallel is {size}, but the network has no mixture layer; leave it at 1")
    uneven = [f"{name} has {layer.num_experts}" for name, layer in layers.items() if layer.num_experts % size]
    if uneven:
        raise MedPLIBError(f"engine.expert_parallel is {size}, which does not divide the experts: {uneven[0]}")
    name = group_name(size)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size)
    group, rank = groups._get_expert_parallel_group(name), groups._get_expert_parallel_rank(name)
    for layer in layers.values():
        for index in range(layer.num_experts):
            if owner_of(layer, index, size) != rank:
                layer.experts[index] = Elsewhere()
        layer.mixing = MixOverRanks(group, size)
        for parameter in layer.experts.parameters():
            parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]
            parameter.ranks_of_experts = size  # type: ignore[attr-defined]
    if any(parameter.requires_grad for layer in layers.values() for parameter in layer.experts.parameters()):
        network.expert_groups = ExpertGroups(size)  # type: ignore[assignment]


def mixture_layers(network: nn.Module) -> Iterator[tuple[str, MoEFeedForward]]:
    """The decoder's mixtures by name."""
    for name, module in network.named_modules():
        if isinstance(module, MedPLIBDecoderLayer) and isinstance(module.mlp, MoEFeedForward):
            yield f"{name}.mlp", module.mlp


def owner_of(layer: MoEFeedForward, expert: int, size: int) -> int:
    """Which of ``size`` ranks holds an expert: neighbours lie together, as in DeepSpeed."""
    return expert * size // layer.num_experts


def expert_groups_of(parameters: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimiser groups with expert parameters in groups of their own, marked as ZeRO expects; none is empty."""
    named = [{**group, "name": f"dense_{index}"} for index, group in enumerate(parameters)]
    return [group for group in split_params_into_different_moe_groups_for_optimizer(named) if group["params"]]


def experts_elsewhere(network: nn.Module, trainable_only: bool) -> dict[str, Tensor]:
    """Parameters of the experts that rank 0 does not hold, by name, on the CPU of rank 0; others get an empty mapping.

    Called by every rank; the first group's ranks send theirs.
    """
    found: dict[str, Tensor] = {}
    rank = distributed.get_rank()
    for name, layer in mixture_layers(network):
        mixing = layer.mixing
        if not isinstance(mixing, MixOverRanks) or rank >= mixing.size:
            continue
        alike = next(expert for expert in layer.experts if not isinstance(expert, Elsewhere))
        for index, expert in enumerate(layer.experts):
            owner = owner_of(layer, index, mixing.size)
            if owner == 0 or rank not in (0, owner):
                continue
            for below, parameter in (expert if rank else alike).named_parameters():
                if trainable_only and not parameter.requires_grad:
                    continue
                if rank:
                    distributed.send(parameter.detach().contiguous(), 0)
                else:
                    arrived = torch.empty_like(parameter, requires_grad=False)
                    distributed.recv(arrived, owner)
                    found[f"{name}.experts.{index}.{below}"] = arrived.cpu()
    return found
