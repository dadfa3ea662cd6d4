"""Training engines with one interface: DeepSpeed, or plain PyTorch in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from model.errors import MedPLIBError
from model.train.distributed import Process
from model.train.init_weights import is_lora
from model.train.recipe import Engine, Recipe

_IMAGES = ("pixel_values", "sam_pixel_values", "region_masks", "example_masks")
_OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_TAG = "deepspeed"
_IN_ALL = 10  # a run may take so many times more bad steps in all than in a row


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    lr: float  # goes by the step's number, whatever was skipped before it
    grad_norm: float | None  # before clipping; None where nobody computes it
    skipped: bool = False  # loss or gradient was not finite on some rank, so no rank moved weights or optimizer


@dataclass
class BadSteps:
    """NaN guard: counts of steps that were not finite."""

    limit: int  # so many in a row end the run, and _IN_ALL times as many in all
    total: int = 0  # so far
    in_a_row: int = 0  # up to now

    def note(self, *, skipped: bool) -> bool:
        """Count one step; True where it is the first bad one, which is worth a sentence."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        return skipped and self.total == 1

    def check(self, step: int) -> None:
        """End a run that does not recover.

        Raises:
            MedPLIBError: with the number of bad steps and what helps.
        """
        if self.in_a_row < self.limit and self.total < _IN_ALL * self.limit:
            return
        counted = f"{self.in_a_row} in a row" if self.in_a_row >= self.limit else f"{self.total} in all"
        raise MedPLIBError(
            f"stopped at step {step}: losses or gradients were not finite in too many steps ({counted}), none of "
            "which moved the weights; begin again with a lower optimizer.lr or engine.precision=fp32, or check the data"
        )


class TrainingEngine:
    """Forward, backward and update of one network by plain PyTorch in one process: float32 weights, autocast for bf16.

    Args:
        network: the network with its trainable parameters marked.
        recipe: optimizer, precision and accumulation.
        process: this rank.
        factor: what the peak learning rate is multiplied by at each step.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, process: Process, factor: Callable[[int], float]) -> None:
        self.network, self.recipe, self.process, self.factor = network, recipe, process, factor
        self._set_up()

    def _set_up(self) -> None:
        self.network.to(self.process.device)
        self.optimizer = make_optimizer(self.network, self.recipe)
        self.schedule = LambdaLR(self.optimizer, self.factor)

    def forward(self, batch: Mapping[str, Any], **options: Any) -> Any:
        """The network's output for a collated batch (moved to the device first)."""
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.recipe.engine.precision == "bf16"):
            return self.network(**self.move(batch), **options)

    def accumulate(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; returns ``loss`` and its parts, detached scalars."""
        output = self.forward(batch)
        # A loss that is not finite gets gradients that are not, which no engine overlooks.
        self._backward(output.loss * torch.where(output.loss.detach().isfinite(), 1.0, math.nan).to(output.loss.dtype))
        return {"loss": output.loss.detach(), **{name: value.detach() for name, value in output.losses.items()}}

    def _backward(self, loss: Tensor) -> None:
        (loss / self.recipe.schedule.accumulation).backward()

    def step(self) -> StepResult:
        """Update the weights from what was accumulated, or drop it on all ranks where it is not finite on one."""
        clip = self.recipe.optimizer.clip or float("inf")
        norm = torch.as_tensor(nn.utils.clip_grad_norm_(trainable_parameters(self.network), clip)).item()
        lr = float(self.schedule.get_last_lr()[0])
        self.optimizer.overflow = not math.isfinite(norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(lr, norm, self.optimizer.overflow)

    def save(self, folder: Path) -> None:
        """Write what ``load`` needs; called by every rank."""
        weights = _state(self.network, trainable_only=True)
        state = {"optimiser": self.optimizer.state_dict(), "step": self.schedule.last_epoch, "weights": weights}
        torch.save(state, folder / "torch.pt")

    def load(self, folder: Path) -> None:
        """Take up weights, optimiser and learning rate of ``save``; called by every rank."""
        path = folder / "torch.pt"
        if not path.is_file():
            raise MedPLIBError(
                f"{folder} was not written by engine.kind=torch; resume with the engine of the first run"
            )
        state = torch.load(path, map_location=self.process.device, weights_only=True)
        self.network.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimiser"])
        self.schedule.last_epoch = state["step"]
        _set_rate(self.schedule, self.factor)

    def gather(self, trainable_only: bool) -> dict[str, Tensor]:
        """Whole weights by name, on rank 0 (others get an empty mapping); called by every rank."""
        return _state(self.network, trainable_only)

    def move(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch on this device, its images in the type of the weights."""
        dtype = next(self.network.parameters()).dtype
        moved = {name: _to(value, self.process.device) for name, value in batch.items()}
        for name in _IMAGES:
            if isinstance(moved.get(name), Tensor):
                moved[name] = moved[name].to(dtype)
        return moved


class DeepSpeedEngine(TrainingEngine):
    """DeepSpeed with ZeRO 0 to 3, on CUDA (nccl) or CPU (gloo); ``process.join`` comes first."""

    def _set_up(self) -> None:
        import deepspeed

        network, recipe, process = self.network, self.recipe, self.process
        if recipe.engine.zero_stage == 3:  # its weights are gathered by all ranks together, so all run the towers
            for module in network.modules():
                if hasattr(module, "always_encode"):
                    module.always_encode = True  # type: ignore[assignment]
        self._shares_experts = recipe.engine.expert_parallel > 1
        if self._shares_experts:
            from model.train.expert_parallel import share_experts

            share_experts(network, recipe.engine.expert_parallel)
        config = deepspeed_config(recipe)
        if recipe.engine.zero_stage == 3:
            # DeepSpeed by itself would first move the whole network, and ZeRO-3 is chosen because that does not fit.
            # This leaves each rank its share of every weight, one weight at a time; buffers stay whole.
            deepspeed.zero.Init(module=network, config_dict_or_path=config)
            for buffer in network.buffers():
                buffer.data = buffer.to(process.device)
        else:
            network.to(process.device)
        self.engine, *_ = deepspeed.initialize(
            model=network,
            model_parameters=trainable_parameters(network),
            optimizer=(optimizer := make_optimizer(network, recipe)),
            lr_scheduler=lambda optimizer: LambdaLR(optimizer, self.factor),
            config=config,
            dist_init_required=False,
        )
        self._between = False  # a micro-batch was accumulated and DeepSpeed has not stepped yet
        # ZeRO-0 in fp32 is the one way in which DeepSpeed does not look for gradients that are not finite.
        self._unguarded = optimizer if not recipe.engine.zero_stage and recipe.engine.precision == "fp32" else None

    def forward(self, batch: Mapping[str, Any], **options: Any) -> Any:
        return self.engine(**self.move(batch), **options)

    def accumulate(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if self._between:
            self.engine.step()  # DeepSpeed counts micro-batches by its own step()
        return super().accumulate(batch)

    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self._between = True

    def step(self) -> StepResult:
        lr = self.engine.get_lr()[0]
        if self._unguarded is not None:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            bad = torch.tensor(float(not nn.utils.get_total_norm(gradients).isfinite()))
            self._unguarded.overflow = bool(self.process.sum(bad) > 0)
        self.engine.step()
        self._between = False
        skipped = not self.engine.was_step_applied()
        if skipped:
            self.engine.lr_scheduler.step()  # DeepSpeed left it behind
        norm = self.engine.get_global_grad_norm()
        return StepResult(lr, None if norm is None else float(norm), skipped)

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        if not (folder / _TAG).is_dir():
            raise MedPLIBError(f"{folder} was not written by DeepSpeed; resume with the engine of the first run")
        self.engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
        _set_rate(self.engine.lr_scheduler, self.factor)
        if self._shares_experts:  # DeepSpeed's file of weights is rank 0's; the optimiser's are every rank's own
            self.engine.optimizer.update_lp_params()
        if self.recipe.engine.zero_stage == 3:
            # Loading leaves small weights whole. DeepSpeed notes that a module reads a weight of another (SAM's mask
            # decoder does) when it finds it partitioned. That must be in the first pass: gather(), at the next save,
            # would partition it when the order of use is already fixed.
            self.engine.optimizer.checkpoint_event_prologue()

    def gather(self, trainable_only: bool) -> dict[str, Tensor]:
        if self.recipe.engine.zero_stage < 3:
            mine = _state(self.network, trainable_only) if self.process.is_first else {}
            if self._shares_experts:
                from model.train.expert_parallel import experts_elsewhere

                mine |= experts_elsewhere(self.network, trainable_only)
            return mine
        import deepspeed

        whole: dict[str, Tensor] = {}
        for name, parameter in self.network.named_parameters():
            if trainable_only and not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.process.is_first:
                    whole[name] = parameter.detach().cpu().clone()
        if self.process.is_first and not trainable_only:
            kept = self.network.state_dict().keys()
            whole |= {name: value.cpu() for name, value in self.network.named_buffers() if name in kept}
        return whole


def make_engine(network: nn.Module, recipe: Recipe, process: Process, factor: Callable[[int], float]) -> TrainingEngine:
    """The engine that the recipe names, around a network whose trainable parameters are marked."""
    kind = DeepSpeedEngine if recipe.engine.kind == "deepspeed" else TrainingEngine
    return kind(network, recipe, process, factor)


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's configuration: the recipe's settings over those of its JSON file.

    Raises:
        MedPLIBError: the file is not JSON, or sets what the recipe sets.
    """
    extra: dict[str, Any] = {}
    path = recipe.engine.deepspeed
    if path:
        try:
            extra = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise MedPLIBError(f"engine.deepspeed {path} cannot be read as JSON: {error}") from None
        if not isinstance(extra, dict) or not isinstance(extra.get("zero_optimization", {}), dict):
            raise MedPLIBError(f"engine.deepspeed {path} holds no DeepSpeed settings; expected an object {{…}}")
        taken = [name for name in (*_OWNED, "optimizer", "scheduler", "bf16", "fp16") if name in extra]
        zero = extra.get("zero_optimization", {})
        taken += [f"zero_optimization.{name}" for name in ("stage", *_offloading(recipe.engine)) if name in zero]
        if taken:
            what = ", ".join(taken)
            raise MedPLIBError(f"engine.deepspeed {path} sets {what}, which the recipe sets; take it out")
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        **extra,
        "train_micro_batch_size_per_gpu": recipe.schedule.batch_size,
        "gradient_accumulation_steps": recipe.schedule.accumulation,
        "gradient_clipping": recipe.optimizer.clip,
        "bf16": {"enabled": recipe.engine.precision == "bf16", "check_grad_overflow": True},
        "zero_optimization": {
            **extra.get("zero_optimization", {}),
            **_offloading(recipe.engine),
            "stage": recipe.engine.zero_stage,
        },
    }


def _offloading(engine: Engine) -> dict[str, Any]:
    """What DeepSpeed keeps in the host's memory."""
    parts = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}[engine.offload]
    host = {"device": "cpu", "pin_memory": engine.device != "cpu" and torch.cuda.is_available()}
    return {f"offload_{part}": host for part in parts}


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that does nothing while ``overflow`` is set, the name that DeepSpeed looks for."""

    overflow = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return None if self.overflow else super().step(closure)


def make_optimizer(network: nn.Module, recipe: Recipe) -> SkippingAdamW:
    """AdamW over the trainable parameters, LoRA matrices in a group of their own."""
    lora: list[nn.Parameter] = []
    full: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (lora if is_lora(name) else full).append(parameter)
    settings = recipe.optimizer
    groups: list[dict[str, Any]] = [{"params": group} for group in (full, lora) if group]
    if recipe.engine.expert_parallel > 1:
        from model.train.expert_parallel import expert_groups_of

        groups = expert_groups_of(groups)
    return SkippingAdamW(
        groups,
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,  # one pass over weights, gradients and moments, on a CPU too
    )


def _set_rate(schedule: LambdaLR, factor: Callable[[int], float]) -> None:
    """Let the next step have the learning rate of this schedule; it may be longer than when it was saved."""
    rates = [base * factor(schedule.last_epoch) for base in schedule.base_lrs]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Parameters that learn, in the network's order."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _state(network: nn.Module, trainable_only: bool) -> dict[str, Tensor]:
    if not trainable_only:
        return network.state_dict()
    return {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (list, tuple)):
        return type(value)(_to(item, device) for item in value)
    return value
