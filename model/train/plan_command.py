"""``medplib plan``: will a recipe fit, which part is largest, and what would make it fit."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import MedPLIBError

if TYPE_CHECKING:
    from model.train.plan import Plan
    from model.train.plan_advice import Change

GIB = 2**30
DOES_NOT_FIT = 1
"""Exit code of a plan that does not fit; 0 fits, 2 is wrong input."""


def add_plan_command(commands: argparse._SubParsersAction) -> None:
    """``medplib plan RECIPE [key=value …] --gpus N --gpu-mem GIB``."""
    plan = commands.add_parser(
        "plan",
        help="say whether a training recipe fits into memory",
        description="Estimate the memory of a training run; neither weights nor data nor a GPU are needed. "
        "Exit code 0 if it fits, 1 if it does not, 2 after wrong input.",
    )
    plan.add_argument("recipe", help="YAML file; the project's own are in configs/stages")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, as for medplib train")
    plan.add_argument("--gpus", type=_count, required=True, metavar="N", help="GPUs of each node")
    plan.add_argument("--nodes", type=_count, default=1, metavar="M", help="nodes (default 1)")
    plan.add_argument("--gpu-mem", type=_size, default=24.0, metavar="GIB", help="memory of each GPU (default 24)")
    plan.add_argument("--host-mem", type=_size, default=256.0, metavar="GIB", help="memory of each node (default 256)")
    plan.add_argument(
        "--sizes",
        type=Path,
        metavar="WHAT",
        help="7b, nano, a YAML file like configs/model's, or a checkpoint's folder",
    )
    plan.add_argument("--length", type=_count, metavar="TOKENS", help="longest record; data.max_length when absent")
    plan.add_argument(
        "--supervised", type=_share, default=0.5, metavar="SHARE", help="tokens that carry a loss (default 0.5)"
    )
    plan.add_argument(
        "--image-size", type=_count, default=512, metavar="PX", help="side of images on disk (default 512)"
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object, bytes in all of it")
    plan.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> int:
    """``medplib plan``: exit 1 when it does not fit."""
    from model.train.plan import Assumptions, make_plan
    from model.train.plan_advice import advise, gpus_needed, smallest
    from model.train.plan_memory import Machine

    strange = [text for text in options.overrides if "=" not in text]
    if strange:
        raise MedPLIBError(f"{strange[0]!r:.80} is not of the form key=value")
    machine = Machine(options.gpus, options.nodes, options.gpu_mem * GIB, options.host_mem * GIB)
    assumed = Assumptions(options.length, options.supervised, options.image_size)
    plan = make_plan(options.recipe, options.overrides, machine, assumed, options.sizes)
    changes = [] if plan.fits else advise(plan)
    more = None if plan.fits or changes else gpus_needed(plan)
    least = None if plan.fits or changes else smallest(plan)
    if options.json:
        sys.stdout.write(json.dumps(as_json(plan, changes, more), indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(as_text(plan, changes, more, least)) + "\n")
    return 0 if plan.fits else DOES_NOT_FIT


def as_json(plan: Plan, changes: list[Change], more: tuple[Any, Change | None] | None) -> dict[str, Any]:
    """A plan as plain values; sizes in bytes."""
    memory, data = plan.memory, plan.data
    return {
        "fits": plan.fits,
        "peak": round(memory.peak),
        "gpu_memory": round(plan.machine.gpu_memory),
        "largest": _largest(plan).name,
        "parts": [
            {key: value if key == "name" else round(value) for key, value in asdict(p).items()} for p in memory.parts
        ],
        "host": {name: round(value) for name, value in memory.host.items()},
        "disk": {name: round(value) for name, value in memory.disk.items()},
        "records_per_step": plan.global_batch,
        "steps": None if data is None else data.steps(plan.recipe, plan.machine.ranks),
        "sizes": plan.planner.sizes.origin,
        "records": asdict(plan.planner.records),
        "unset": list(plan.placeholders),
        "changes": [_change_values(change) for change in changes],
        "fits_on": None
        if more is None
        else {"gpus": more[0].gpus, "nodes": more[0].nodes, "change": more[1] and _change_values(more[1])},
    }


def as_text(
    plan: Plan, changes: list[Change], more: tuple[Any, Change | None] | None, least: Change | None
) -> list[str]:
    """A plan on one screen."""
    memory, machine = plan.memory, plan.machine
    lines = [
        *_head(plan),
        "",
        f"{'GiB on each ' + ('GPU' if machine.device == 'cuda' else 'process'):<22}backward   update",
    ]
    lines += [f"  {part.name:<20}{part.backward / GIB:>8.2f} {part.update / GIB:>8.2f}" for part in memory.parts]
    lines += [f"  {'together':<20}{memory.backward / GIB:>8.2f} {memory.update / GIB:>8.2f}", ""]
    lines += [
        f"host of each node   {_gib(memory.host_total)} of {_gib(machine.host_memory)} GiB: {_listed(memory.host)}"
    ]
    stays = {name: size for name, size in memory.disk.items() if name != "one checkpoint"}
    lines += [f"disk                {_gib(sum(stays.values()))} GiB: {_listed(stays)}", *_data_lines(plan), ""]
    lines += _verdict(plan)
    if plan.fits:
        return lines
    if changes:
        lines += ["", "It fits with (slow-downs are rules of thumb):"]
        lines += [f"  {_told(change)}" for change in changes]
        return lines
    if least is not None:
        lines += [f"The least that changes of the recipe leave is {_told(least)}."]
    if more is None:
        return [*lines, "It fits on no number of GPUs up to 64 at this global batch."]
    bigger, change = more
    how = f"with {_told(change)}" if change else "as it is, at the same global batch"
    return [*lines, f"It fits on {bigger.ranks} GPUs ({bigger.nodes} × {bigger.gpus}) {how}."]


def _head(plan: Plan) -> list[str]:
    recipe, records, machine = plan.recipe, plan.planner.records, plan.machine
    weights = plan.planner.weights
    total, trained = sum(w.numel for w in weights), sum(w.numel for w in weights if w.trained)
    engine = recipe.engine
    kind = f"ZeRO-{engine.zero_stage}" if engine.kind == "deepspeed" else "torch"
    traits = [kind, engine.precision, f"offload {engine.offload}", f"quantise {recipe.lora.quantise}", engine.attention]
    traits += [f"experts over {engine.expert_parallel}"] if engine.expert_parallel > 1 else []
    traits += ["gradient checkpointing"] if engine.gradient_checkpointing else ["no gradient checkpointing"]
    batch = f"{recipe.schedule.batch_size} × {recipe.schedule.accumulation} × {machine.ranks}"
    lines = [
        f"stage {recipe.stage}, sizes of {plan.planner.sizes.origin}: "
        f"{total / 1e6:,.1f} M weights, {trained / 1e6:,.1f} M trained",
        f"{', '.join(traits)}; {machine.nodes} × {machine.gpus} × {_gib(machine.gpu_memory)} GiB",
        f"{batch} = {plan.global_batch} records a step, each at most {records.tokens} text tokens "
        f"({records.supervised} supervised), {records.images} image, {records.masks} masks of {records.image_size} px",
    ]
    return lines + ([f"not set, and not needed here: {', '.join(plan.placeholders)}"] if plan.placeholders else [])


def _data_lines(plan: Plan) -> list[str]:
    data = plan.data
    if data is None:
        return ["data                not here, so steps are not known"]
    steps = data.steps(plan.recipe, plan.machine.ranks)
    how = "counted on a sample" if data.counted else "guessed from letters"
    return [
        f"data                {data.records:,} records, "
        f"{round(data.steps_per_epoch(plan.recipe, plan.machine.ranks), 1):,.10g} steps an epoch, {steps:,} in all; "
        f"{data.length * plan.global_batch:,.0f} tokens a step ({how}; longest text {data.longest}, see --length)"
    ]


def _verdict(plan: Plan) -> list[str]:
    memory, machine, largest = plan.memory, plan.machine, _largest(plan)
    spare = machine.gpu_memory - memory.peak
    moment = "backward" if memory.backward >= memory.update else "update"
    part = f"the largest part is {largest.name} ({_gib(getattr(largest, moment))} GiB)"
    if memory.peak > machine.gpu_memory:
        return [f"DOES NOT FIT: {_gib(memory.peak)} GiB, {_gib(-spare)} more than there is; {part}."]
    if memory.host_total > machine.host_memory:
        return [f"DOES NOT FIT into the host's memory: {_gib(memory.host_total)} GiB a node; on the GPU {part}."]
    tight = ", tight: estimates may be 10 % off" if spare < 0.1 * machine.gpu_memory else ""
    return [f"FITS: {_gib(memory.peak)} GiB, {_gib(spare)} to spare ({spare / machine.gpu_memory:.0%}{tight}); {part}."]


def _largest(plan: Plan) -> Any:
    moment = "backward" if plan.memory.backward >= plan.memory.update else "update"
    return max(plan.memory.parts, key=lambda part: getattr(part, moment))


def _told(change: Change) -> str:
    return f"{' '.join(change.overrides)}  → {_gib(change.memory.peak)} GiB, about {change.slower:.2f} × the time"


def _change_values(change: Change) -> dict[str, Any]:
    return {"overrides": list(change.overrides), "peak": round(change.memory.peak), "slower": round(change.slower, 2)}


def _listed(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size >= 0.05 * GIB) or "little"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r:.80}")
    return value


def _size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of GiB above 0, got {text!r:.80}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r:.80}")
    return value
