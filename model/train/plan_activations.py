"""The memory of a forward and a backward pass, found by running the very network on tensors without storage.

Every operation of the real code is run on the meta device, where it costs nothing, while a tally follows the tensors
that live. Only what depends on values is replaced: where words, images and masks stand, how a mixture's tokens spread
(evenly), and the fused attention kernel, which the meta device does not have.

Parameters and their gradients are not counted here; ``plan_memory`` does.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from model.checkpoint.building import choose_attention
from model.modeling.configuration import MedPLIBConfig
from model.modeling.losses import mask_losses
from model.modeling.medplib import MedPLIBForCausalLM
from model.modeling.moe import MoEFeedForward
from model.train.plan_network import planned_network
from model.train.plan_tally import TensorTally, meta_tensor
from model.train.recipe import Recipe

_DEPTHS = (2, 4)
"""Decoder depths that are run; deeper decoders are extrapolated from these, exactly, since layers are alike."""


@dataclass(frozen=True)
class Records:
    """What the records of a batch are like.

    Attributes:
        tokens: text tokens of the longest, the image counting as one.
        supervised: tokens of each that carry a loss.
        images, regions, masks: of each.
        image_size: side of its image on disk, in pixels.
    """

    tokens: int
    supervised: int
    images: int = 1
    regions: int = 1
    masks: int = 0
    image_size: int = 512


@dataclass(frozen=True)
class Pass:
    """Bytes of one forward and backward pass beside parameters and gradients.

    Attributes:
        peak: most bytes alive at a time.
        tail: most bytes alive once the backward pass has left the decoder, when most gradients are there.
    """

    peak: float
    tail: float


class ActivationModel:
    """Activation memory of a recipe's network for any batch size.

    Args:
        recipe: stage, LoRA, what learns, attention, checkpointing.
        config: the network's sizes.
        records: what a batch is made of.
        device: ``cuda`` or ``cpu``, whose attention kernels differ.
    """

    def __init__(self, recipe: Recipe, config: MedPLIBConfig, records: Records, device: str) -> None:
        self.recipe, self.config, self.records, self.device = recipe, config, records, device
        self._run = lru_cache(maxsize=None)(self._run_once)

    def measure(self, batch: int, checkpointing: bool, attention: str, dtype: torch.dtype) -> Pass:
        """Bytes of a batch; of more than 3 records on the line through 2 and 3."""
        if batch <= 3:
            return self._run(batch, checkpointing, attention, dtype)
        two, three = (self._run(few, checkpointing, attention, dtype) for few in (2, 3))
        return _line(two, three, batch - 2)

    def _run_once(self, batch: int, checkpointing: bool, attention: str, dtype: torch.dtype) -> Pass:
        depth = self.config.text_config.num_hidden_layers
        uniform = self.recipe.stage != 4 or (not self.recipe.mixture.layers and self.recipe.mixture.mode == "dense")
        uniform = uniform and len(self.config.moe.layers) in (0, depth)
        run = partial(self._at_depth, batch=batch, checkpointing=checkpointing, attention=attention, dtype=dtype)
        if depth <= _DEPTHS[1] or not uniform:
            towers, whole = run(depth)
        else:
            (towers, low), (_, high) = run(_DEPTHS[0]), run(_DEPTHS[1])
            whole = _line(low, high, (depth - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0]))
        return Pass(max(towers, whole.peak), whole.tail)

    def _at_depth(
        self, depth: int, batch: int, checkpointing: bool, attention: str, dtype: torch.dtype
    ) -> tuple[int, Pass]:
        """Peak bytes of the towers, and the bytes of all that follows, with a decoder of ``depth`` layers."""
        config = _with_depth(self.config, depth)
        mixture = self.recipe.mixture
        if self.recipe.stage == 4 and len(mixture.num_experts) > depth:
            mixture = replace(mixture, num_experts=mixture.num_experts[:depth])
        network = planned_network(replace(self.recipe, mixture=mixture), config)
        network.to(dtype=dtype).train()  # type: ignore[call-arg]
        _prepare(network, checkpointing, attention, FusedAttention(self.device, needs_mask(batch, attention)))
        return PassOnMeta(network, self.records, batch, attention, self.device).run()


class PassOnMeta:
    """One forward and backward pass of a network without storage, tallied.

    Args:
        network: on the meta device, in training mode.
        records: what the batch is made of.
        batch: records in it.
        attention: of the decoder.
        device: whose attention kernels are meant.
    """

    def __init__(self, network: MedPLIBForCausalLM, records: Records, batch: int, attention: str, device: str) -> None:
        self.network, self.records, self.batch = network, records, batch
        self.attention, self.device = attention, device
        self.config = network.config
        self.dtype = network.lm_head.weight.dtype
        self.padded = needs_mask(batch, attention)

    def run(self) -> tuple[int, Pass]:
        """Peak bytes of the towers, and the bytes of all that follows."""
        tally = TensorTally("meta")
        for parameter in self.network.parameters():
            if parameter.requires_grad:  # gradients are counted elsewhere, so they are here from the start
                parameter.grad = torch.empty_like(parameter)
        known = [*self.network.parameters(), *self.network.buffers()]
        tally.count([*known, *(parameter.grad for parameter in known if parameter.grad is not None)])
        start = tally.mark()
        with FusedAttention(self.device, self.padded), tally:
            batch = self._batch()
            features = self.network.encode_images(batch["pixels"])
            towers = tally.mark() - start
            inside: list[int] = []
            loss = self._loss(features, batch, lambda _: inside.append(tally.mark()))
            torch.autograd.backward(loss)
        return towers, Pass(max([*inside, tally.peak]) - start, (tally.peak if inside else tally.now) - start)

    def _batch(self) -> dict[str, Any]:
        records, size = self.records, self.config.sam_config.vision_config.image_size
        side, grid = self.config.vision_config.image_size, self.config.vision_grid
        image = (records.image_size, records.image_size)
        masks = self.batch * records.masks
        return {
            "ids": meta_tensor(self.batch, records.tokens, dtype=torch.long),
            "pixels": meta_tensor(self.batch * records.images, 3, side, side, dtype=self.dtype),
            "regions": meta_tensor(self.batch * records.regions, grid, grid, dtype=self.dtype),
            "sam": meta_tensor(self.batch, 3, size, size, dtype=self.dtype),
            "targets": [meta_tensor(*image) for _ in range(masks)],
            "resized": [(size, size)] * masks,
            "originals": [image] * masks,
        }

    def _loss(self, features: Tensor, batch: dict[str, Any], left_decoder: Callable[[Tensor], None]) -> Tensor:
        """What ``MedPLIBForCausalLM.forward`` computes, its parts in the same order."""
        network = self.network
        embeds, projector_aux = self._spliced(features, batch)
        if embeds.requires_grad:
            embeds.register_hook(left_decoder)
        length = embeds.shape[1]
        decoded = network.model.decoder(embeds, attention_mask=self._padding_mask(length), use_cache=False)
        hidden = decoded.last_hidden_state
        supervised = _places(self.batch * self.records.supervised)
        logits = network.lm_head(hidden[:, :-1].flatten(0, 1)[supervised]).float()
        ce = functional.cross_entropy(logits, _places(len(supervised)), reduction="sum")
        del logits
        masks = self._masks(hidden, batch)
        parts = mask_losses(masks.mask_logits, batch["targets"], masks.iou_predictions)
        anchor = masks.low_res_masks[:0].sum() + masks.iou_predictions[:0].sum()
        loss: Tensor = ce + decoded.aux_loss + projector_aux + sum(parts.values()) + anchor
        return loss

    def _spliced(self, features: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, D] with images and regions in place, as ``splice`` builds them."""
        network, ids = self.network, batch["ids"]
        tokens, aux, _ = network.project_images(features)
        regions = len(batch["regions"])
        region = network.model.region_adapter(features[_places(regions)], batch["regions"]) if regions else None
        text = network.get_input_embeddings()(ids.clamp(min=0))
        words, width = text.shape[0] * (text.shape[1] - self.records.images), text.shape[2]
        length = text.shape[1] + self.records.images * (tokens.shape[1] - 1)
        flat = network.get_input_embeddings().weight[0].expand(self.batch * length, width)
        flat = flat.index_copy(0, _places(words), text.flatten(0, 1)[_places(words)])
        if region is not None:
            flat = flat.index_copy(0, _places(regions), region)
        flat = flat.index_copy(0, _places(tokens.shape[0] * tokens.shape[1]), torch.cat(tuple(tokens)))
        return flat.view(self.batch, length, width) + tokens[:0].sum(), aux

    def _padding_mask(self, length: int) -> Tensor:
        """A ready-made causal mask of records of unlike lengths; where none is needed it takes no memory."""
        if self.attention == "eager":
            return meta_tensor(self.batch, 1, length, length, dtype=self.dtype)
        if self.padded:
            return meta_tensor(self.batch, 1, length, length, dtype=torch.bool)
        return meta_tensor(1, 1, 1, 1, dtype=torch.bool).expand(self.batch, 1, length, length)

    def _masks(self, hidden: Tensor, batch: dict[str, Any]) -> Any:
        masks = self.batch * self.records.masks
        pixels = batch["sam"] if masks else batch["sam"][:0]
        embeddings = self.network.encode_segmented_images(pixels)
        states = hidden[_places(masks), _places(masks)]
        return self.network.decode_masks(states, embeddings, _places(masks), batch["resized"], batch["originals"])


def needs_mask(batch: int, attention: str) -> bool:
    """Whether a mask is made: one record alone has no padding, and flash-attn takes lengths instead."""
    return batch > 1 and attention != "flash_attention_2"


class FusedAttention(TorchFunctionMode):
    """In the place of torch's attention: a kernel that keeps what the fused ones of a device keep.

    Args:
        device: whose kernels are meant.
        padded: whether masks of padding count.
    """

    def __init__(self, device: str, padded: bool) -> None:
        super().__init__()
        self.device, self.padded = device, padded

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if attn_mask is not None and attn_mask.requires_grad and self.device == "cpu":  # no fused kernel does it there
            return functional.scaled_dot_product_attention(query, key, value, attn_mask)
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # the decoder's; kernels turn it into numbers
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype) if self.padded else None
        return _FusedAttention.apply(query, key, value, attn_mask)


class _FusedAttention(torch.autograd.Function):
    """Shapes of a fused attention: inputs, output and a number per query are kept; its backward gives gradients."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:  # type: ignore[override]
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, out, sums, mask)
        return out

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, _, _, mask = context.saved_tensors
        for_mask = torch.empty_like(mask) if context.needs_input_grad[3] else None
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), for_mask


def mix_evenly(tokens: Tensor, combine: Tensor, kept: Tensor, experts: Iterable[nn.Module], top_k: int) -> Tensor:
    """``mix_by_index`` where every expert gets the same number of tokens and nothing is dropped."""
    experts = list(experts)
    rows = _places(len(tokens) * top_k)
    sizes = [
        len(rows) * (index + 1) // len(experts) - len(rows) * index // len(experts) for index in range(len(experts))
    ]
    groups = tokens[rows].split(sizes)
    outputs = torch.cat([expert(group) for expert, group in zip(experts, groups, strict=True)])
    outputs = outputs * combine[rows, rows, None].to(outputs.dtype)
    return outputs.new_zeros(len(tokens), outputs.shape[-1]).index_add(0, rows, outputs)


def _prepare(network: MedPLIBForCausalLM, checkpointing: bool, attention: str, kernel: FusedAttention) -> None:
    """Attention, checkpointing and mixing as the training loop sets them."""
    if attention == "eager":  # flash-attn keeps what the fused kernels keep
        choose_attention(network, "eager", kernel.device)
    for module in network.modules():
        if isinstance(module, MoEFeedForward):
            module.mixing = partial(mix_evenly, top_k=module.top_k)
    if checkpointing:
        # transformers 5.23 renamed it
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        enable(
            {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), kernel)}
        )  # what is recomputed runs outside the mode of the first pass


def _with_depth(config: MedPLIBConfig, depth: int) -> MedPLIBConfig:
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = depth
    kept = [place for place, layer in enumerate(config.moe.layers) if layer < depth]
    experts = tuple(config.moe.num_experts[place] for place in kept)
    config.moe = replace(config.moe, layers=tuple(config.moe.layers[place] for place in kept), num_experts=experts)
    return config


def _line(first: Pass, second: Pass, steps: float) -> Pass:
    """So many steps from ``first`` in the direction of ``second``."""
    return Pass(first.peak + steps * (second.peak - first.peak), first.tail + steps * (second.tail - first.tail))


def _places(count: int) -> Tensor:
    """So many indices."""
    return meta_tensor(count, dtype=torch.long)
