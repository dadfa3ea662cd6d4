"""Mixture of experts: router, capacity, dispatch, load-balancing loss (reference §5).

The semantics are those of DeepSpeed's MoE layer, with which the published weights were trained; the code needs no
process group. A router turns tokens into a small [T, E] matrix of shares; each expert then sees its own tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils.generic import maybe_autocast

SYNC_FREE_TOKENS = 64
"""On an accelerator, so few tokens (decoding) pass through every expert rather than waiting for the host."""


@dataclass(frozen=True)
class RouterStats:
    """What a router decided for T tokens, E experts and k choices a token. Detached from the graph.

    Attributes:
        combine: float32 [T, E], the share of each expert in each token's output; 0 where the token was not sent.
        kept: bool [T, E], which tokens each expert took.
        choices: bool [k, T, E], one-hot choices before dropping; all false at padding.
        capacity: float32 scalar, tokens an expert takes at most; infinite where nothing is dropped.
        probabilities: float32 [T, E], the router's softmax, padding included.
    """

    combine: Tensor
    kept: Tensor
    choices: Tensor
    capacity: Tensor
    probabilities: Tensor

    # Derived on demand: in decoding, where nobody asks, every small operation a layer saves is felt.

    @property
    def expert_counts(self) -> Tensor:
        """Tokens whose first choice an expert is, before dropping, long [E]."""
        return self.choices[0].sum(dim=0)

    @property
    def dropped(self) -> Tensor:
        """Choices that found their expert full, long scalar."""
        return self.choices.sum() - self.kept.sum()


@dataclass(frozen=True)
class MoEOutput:
    """A mixture's output.

    Attributes:
        hidden: [..., D'], zero for tokens that no expert took.
        aux_loss: float32 scalar, the load-balancing loss; 1 where experts are used evenly, E where one is used alone.
        router: what the router decided.
    """

    hidden: Tensor
    aux_loss: Tensor
    router: RouterStats


class Router(nn.Linear):
    """Bias-free gate whose arithmetic is float32 whatever the model runs in: near ties decide who computes a token."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, float32 [T, E], of tokens [T, D]."""
        with maybe_autocast(tokens.device.type, enabled=False):
            return functional.linear(tokens.float(), self.weight.float())


class MoEFeedForward(nn.Module):
    """A mixture in the place of one feed-forward network.

    Args:
        experts: E modules that map [n, D] to [n, D'], n = 0 included.
        hidden_size: width D of the tokens.
        top_k: experts per token, 1 or 2.
        capacity_factor: room of an expert in training, as a multiple of an even share of the choices.
        eval_capacity_factor: the same in evaluation, where ``drop_in_evaluation`` lets it count.
        min_capacity: an expert takes at least so many tokens.
        random_token_priority: in top-1 training, chance rather than position decides who a full expert takes.
        drop_tokens: False gives every expert room for all.
        drop_in_evaluation: as published; off, an answer does not depend on what it is batched with. (With the published
            factor of 2 and two experts there is no difference.)
        renormalise: a token's shares sum to one in value also for top-1, while gradients still reach the router.
        residual_expert: DeepSpeed's residual expert [n, D] → [n, D'], mixed in by a learnt coefficient.

    Attributes:
        mixing: how expert outputs are mixed, where that is not what suits the device: experts that lie on other ranks.

    Raises:
        ValueError: the choices are not 1 or 2, or more than there are experts.
    """

    def __init__(
        self,
        experts: Iterable[nn.Module],
        hidden_size: int,
        *,
        top_k: int = 1,
        capacity_factor: float = 1.5,
        eval_capacity_factor: float = 2.0,
        min_capacity: int = 0,
        random_token_priority: bool = True,
        drop_tokens: bool = True,
        drop_in_evaluation: bool = False,
        renormalise: bool = False,
        residual_expert: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.num_experts = len(self.experts)
        if top_k not in (1, 2) or top_k > self.num_experts:
            raise ValueError(
                f"top_k is {top_k} with {self.num_experts} experts; it must be 1 or 2 and no more than those"
            )
        self.router = Router(hidden_size, self.num_experts)
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.random_token_priority = random_token_priority
        self.drop_tokens = drop_tokens
        self.drop_in_evaluation = drop_in_evaluation
        self.renormalise = renormalise
        self.mixing: Mixing | None = None
        if residual_expert is not None:
            self.residual_expert = residual_expert
            self.residual_coefficient = nn.Linear(hidden_size, 2)

    def forward(
        self,
        hidden: Tensor,
        *,
        token_mask: Tensor | None = None,
        priority: Tensor | None = None,
        kept: Tensor | None = None,
        needed: Tensor | None = None,
    ) -> MoEOutput:
        """Send every token to its experts and mix what they answer.

        Args:
            hidden: [..., D].
            token_mask: [...] nonzero at real tokens; padding is neither routed nor counted. All are real when absent.
            priority: [T, E], replaces this pass's random numbers: the uniform priority of tokens for top-1, the Gumbel
                noise on second choices for top-2. For replaying a recorded pass.
            kept: bool [T, E], replaces the capacity's decision who is kept. For replaying a recorded pass.
            needed: bool [...], tokens whose output anyone reads; the others are routed and counted, but no expert
                computes them. All when absent.
        """
        tokens = hidden.reshape(-1, hidden.shape[-1])  # [T, D]
        real = None if token_mask is None else token_mask.reshape(-1, 1).bool()  # [T, 1]
        combine, aux_loss, stats = self.route(tokens, real, priority, kept)
        computed = stats.kept if needed is None else stats.kept & needed.reshape(-1, 1)
        mixed = (self.mixing or mixing_for(tokens))(tokens, combine, computed, self.experts)  # [T, D']
        if hasattr(self, "residual_expert"):
            mixed = self._with_residual(tokens, mixed)
        return MoEOutput(mixed.view(*hidden.shape[:-1], mixed.shape[-1]), aux_loss, stats)

    def infer(self, tokens: Tensor, mixing: Mixing | None = None) -> tuple[Tensor, Tensor]:
        """The mixture alone, for inference: no loss, no statistics, and nothing is dropped.

        Args:
            tokens: [T, D], all real.
            mixing: how expert outputs are mixed; what suits the device and the number of tokens when absent.

        Returns:
            Outputs [T, D'], and bool [T, E], which experts each token went to.
        """
        logits = self.router(tokens)  # [T, E]
        chosen = self._choose(logits, None).any(dim=0)  # [T, E]
        combine = self._shares(logits.softmax(dim=-1) * chosen)
        mixed = (mixing or self.mixing or mixing_for(tokens))(tokens, combine, chosen, self.experts)
        if hasattr(self, "residual_expert"):
            mixed = self._with_residual(tokens, mixed)
        return mixed, chosen

    def route(
        self, tokens: Tensor, real: Tensor | None, priority: Tensor | None, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, RouterStats]:
        """Shares [T, E] with their graph, the load-balancing loss, and the decision they stand for."""
        logits = self.router(tokens)  # [T, E]
        probabilities = logits.softmax(dim=-1)
        choices = self._choose(logits, priority)  # [k, T, E]
        if real is not None:
            choices = choices & real
        capacity = self._capacity(tokens, real)
        if kept is None:
            survivors = (choices & (self._queue(choices, priority) < capacity)).any(dim=0)  # [T, E]
        else:
            survivors = choices.any(dim=0) & kept
        combine = self._shares(probabilities * survivors)
        aux_loss = load_balancing_loss(probabilities, choices[0], real)
        stats = RouterStats(combine.detach(), survivors, choices, capacity, probabilities.detach())
        return combine, aux_loss, stats

    def _choose(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """First and, for top-2, second choices, one-hot bool [k, T, E]."""
        first = _one_hot(logits.argmax(dim=-1), self.num_experts)
        if self.top_k == 1:
            return first[None]
        if noise is None and self.training:  # sampled second choices explore; evaluation takes the second best
            noise = -torch.empty_like(logits).exponential_().log()
        noisy = logits.detach() if noise is None else logits.detach() + noise
        second = noisy.masked_fill(first, -torch.inf).argmax(dim=-1)
        return torch.stack([first, _one_hot(second, self.num_experts)])

    def _capacity(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        """Tokens an expert takes at most; a tensor, so that no host waits for the number of real tokens."""
        if not self.drop_tokens or not (self.training or self.drop_in_evaluation):
            return torch.full((), torch.inf, device=tokens.device)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        count = torch.full((), float(len(tokens)), device=tokens.device) if real is None else real.sum().float()
        return (count / self.num_experts * (factor * self.top_k)).ceil().clamp(min=self.min_capacity)

    def _queue(self, choices: Tensor, priority: Tensor | None) -> Tensor:
        """Each choice's place in its expert's queue, long [k, T, E], 0 served first; second choices queue last."""
        if self.top_k == 1:
            if priority is None and self.training and self.random_token_priority and self.drop_tokens:
                priority = torch.rand(choices.shape[1:], device=choices.device)
            if priority is not None:
                waiting = priority.masked_fill(~choices, -torch.inf)  # [1, T, E]
                return waiting.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        arrivals = choices.flatten(0, 1).cumsum(dim=0) - 1  # all first choices, then all second ones
        return arrivals.view_as(choices)

    def _shares(self, weights: Tensor) -> Tensor:
        """Shares of the kept experts, from probabilities [T, E] that are 0 elsewhere.

        Top-1 leaves the probability as it is, top-2 makes the kept ones sum to one, as DeepSpeed does. A renormalised
        top-1 share is p / p with the divisor held constant: one in value, with the gradient of log p.
        """
        if self.top_k == 1 and not self.renormalise:
            return weights
        total = weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
        return weights / (total.detach() if self.top_k == 1 else total)

    def _with_residual(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        shares = self.residual_coefficient(tokens).softmax(dim=-1)  # [T, 2]
        return mixed * shares[:, :1] + self.residual_expert(tokens) * shares[:, 1:]


def load_balancing_loss(probabilities: Tensor, first_choice: Tensor, real: Tensor | None = None) -> Tensor:
    """E · Σ_e mean(probability of e) · mean(first choice is e), over real tokens (reference §5).

    Args:
        probabilities: float32 [T, E].
        first_choice: one-hot bool [T, E], zero at padding.
        real: bool [T, 1]; all tokens are real when absent.
    """
    if real is not None:
        probabilities = probabilities * real
    count = max(len(probabilities), 1) if real is None else real.sum().clamp(min=1)
    shares = probabilities.sum(dim=0) / count
    loads = first_choice.sum(dim=0) / count
    return (shares * loads).sum() * probabilities.shape[-1]


Mixing = Callable[[Tensor, Tensor, Tensor, Iterable[nn.Module]], Tensor]


def mixing_for(tokens: Tensor) -> Mixing:
    """How to mix these tokens [T, D] here: without waiting for the host where an accelerator decodes a few of them."""
    if torch.is_grad_enabled():
        return mix_by_index
    if tokens.device.type == "cpu":
        return mix_of_one if len(tokens) == 1 else mix_by_index
    return mix_by_scan if len(tokens) <= SYNC_FREE_TOKENS else mix_by_index


def mix_by_index(tokens: Tensor, combine: Tensor, kept: Tensor, experts: Iterable[nn.Module]) -> Tensor:
    """Mix expert outputs [T, D'], each expert computing its own tokens alone.

    Every expert is called, in order, also with no token at all: under ZeRO all ranks must run the same modules, or
    gradients are silently averaged wrongly.

    Args:
        tokens: [T, D].
        combine: float32 [T, E], shares.
        kept: bool [T, E], who computes what.
        experts: E modules.
    """
    expert_ids, rows = kept.t().nonzero(as_tuple=True)  # grouped by expert
    groups = tokens.index_select(0, rows).split(kept.sum(dim=0).tolist())  # E × [n_e, D]
    outputs = torch.cat([expert(group) for expert, group in zip(experts, groups, strict=True)])  # [Σ n_e, D']
    outputs = outputs * combine[rows, expert_ids, None].to(outputs.dtype)
    return outputs.new_zeros(len(tokens), outputs.shape[-1]).index_add(0, rows, outputs)


def mix_of_one(tokens: Tensor, combine: Tensor, kept: Tensor, experts: Iterable[nn.Module]) -> Tensor:
    """The same mix of a single token, without sorting it to its experts; only those it was sent to are called."""
    mixed = None
    for place, (expert, takes) in enumerate(zip(experts, kept[0].tolist(), strict=True)):
        if takes:
            output = expert(tokens)  # [1, D']
            output = output * combine[:, place, None].to(output.dtype)
            mixed = output if mixed is None else mixed + output
    return mix_by_index(tokens, combine, kept, experts) if mixed is None else mixed


def mix_by_scan(tokens: Tensor, combine: Tensor, kept: Tensor, experts: Iterable[nn.Module]) -> Tensor:
    """The same mix with every expert computing every token: no host–device traffic, fixed shapes, for few tokens."""
    del kept  # the shares are 0 where an expert did not take a token
    outputs = torch.stack([expert(tokens) for expert in experts], dim=1)  # [T, E, D']
    return (outputs * combine[:, :, None].to(outputs.dtype)).sum(dim=1)


def _one_hot(index: Tensor, size: int) -> Tensor:
    return index[:, None] == torch.arange(size, device=index.device)
