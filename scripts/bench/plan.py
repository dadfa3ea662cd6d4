"""Compare what ``medplib plan`` says with measured training steps on a CPU; one dated report.

    python scripts/bench/plan.py [--only TEXT] [--out docs/benchmarks]

Each case trains a few steps in processes of its own (``plan_run.py``), where a tally counts every tensor that lives.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from tables import table

from model.train.plan import Assumptions, Planner, records_of, resolved_for
from model.train.plan_memory import Machine, Memory, States
from model.train.plan_network import find_sizes
from model.train.recipe_io import load_recipe

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
ASSUMED = Assumptions(tokens=64, supervised=0.5, image_size=256)
AIM = 0.15
PARTS = ("weights", "optimiser", "backward adds", "update adds", "peak")


@dataclass(frozen=True)
class Case:
    """One run: a nano recipe, changed, with sizes of its own, in so many processes."""

    name: str
    size: str
    stage: int
    overrides: tuple[str, ...]
    processes: int = 1


def cases() -> list[Case]:
    """What is measured."""
    lora = ("lora.rank=8", "lora.targets=[gate,up,down,q,v]", "trainable=[mask_decoder,mask_head,lm_head]")
    four, again = "schedule.batch_size=4", "engine.gradient_checkpointing=true"
    plain = (four, "engine.kind=torch")
    zero = (four, again, "engine.kind=deepspeed")
    bf16, twice = "engine.precision=bf16", "schedule.accumulation=2"
    found = [
        Case(f"ZeRO-{stage}, 2 processes", "mid", 2, (*zero, f"engine.zero_stage={stage}"), 2) for stage in (2, 3, 1)
    ]
    found += [
        Case("torch, batch 4", "mid", 2, plain),
        Case("torch, batch 4, checkpointing", "mid", 2, (*plain, again)),
        Case("ZeRO-2, 1 process", "mid", 2, zero),
        Case("torch, mixture, LoRA, batch 4", "mid", 4, (*plain, *lora)),
        Case("torch, LoRA, batch 4, checkpointing", "mid", 3, (*plain, again, *lora)),
        Case("ZeRO-2 bf16, 2 passes, 2 processes", "mid", 2, (*zero, bf16, twice), 2),
        Case("ZeRO-2, mixture shared out, LoRA, 2 processes", "mid", 4, (*zero, *lora, "engine.expert_parallel=2"), 2),
        Case("ZeRO-2, optimiser offloaded, 1 process", "mid", 2, (*zero, "engine.offload=optimiser")),
        Case("torch bf16, batch 4", "mid", 2, (*plain, bf16)),
    ]
    for size in ("nano", "mid"):
        for batch in (1, 4, 8):
            for recomputed in ("false", "true"):
                told = (f"schedule.batch_size={batch}", f"engine.gradient_checkpointing={recomputed}")
                name = f"torch, batch {batch}{', checkpointing' * (recomputed == 'true')}"
                if size == "nano" or batch != 4:
                    found.append(Case(name, size, 2, (*told, "engine.kind=torch")))
    found += [
        Case("ZeRO-1, 1 process", "mid", 2, (*zero, "engine.zero_stage=1")),
        Case("ZeRO-3, 1 process", "mid", 2, (*zero, "engine.zero_stage=3")),
        Case("ZeRO-0, 2 processes", "mid", 2, (*zero, "engine.zero_stage=0"), 2),
        Case("torch, batch 4, 2 passes", "mid", 2, (*plain, twice)),
    ]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name or size holds it")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", metavar="DIR")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{datetime.now(UTC):%Y-%m-%d}-plan-cpu.md"
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if options.only in f"{case.size} {case.name}":
                rows.append(compare(case, Path(folder)))
                sys.stderr.write(" · ".join(rows[-1].cells()) + "\n")
                file.write_text(report(rows, time.perf_counter() - started), encoding="utf-8")
    return 0


@dataclass(frozen=True)
class Row:
    """Estimated and measured bytes of one case, by part; what the process grew by."""

    case: Case
    estimated: dict[str, float]
    measured: dict[str, float]
    resident: float

    def error(self, part: str) -> float:
        """How far the estimate is above what was measured, as a share of it."""
        return self.estimated[part] / max(self.measured[part], 1) - 1

    def cells(self) -> list[str]:
        """As the table shows it, in MiB."""
        pairs = [f"{self.estimated[part] / MIB:,.0f} / {self.measured[part] / MIB:,.0f}" for part in PARTS]
        return [self.case.size, self.case.name, *pairs, f"{self.error('peak'):+.1%}", f"{self.resident / MIB:,.0f}"]


def compare(case: Case, folder: Path) -> Row:
    """Run a case and plan it."""
    path, sizes, overrides = (
        ROOT / "configs" / "stages" / f"stage{case.stage}_nano.yaml",
        write_sizes(case.size, folder),
        prepared(case, folder),
    )
    recipe = load_recipe(path, overrides)
    machine = Machine(case.processes, device="cpu")
    recipe = resolved_for(recipe, machine)
    planner = Planner(recipe, find_sizes(recipe, path, sizes), ASSUMED, "cpu")
    told = {
        "recipe": str(path),
        "overrides": overrides,
        "sizes": str(sizes),
        "records": asdict(records_of(recipe, ASSUMED)),
    }
    measured = run(told, case.processes, folder)
    memory = planner.memory(recipe, machine)
    return Row(case, by_part(memory, States(recipe, planner.weights, machine)), adds(measured), measured["resident"])


def prepared(case: Case, folder: Path) -> list[str]:
    """The case's overrides, with buckets of DeepSpeed that are no larger than what they hold."""
    buckets = folder / "buckets.json"
    buckets.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 5_000_000}}), encoding="utf-8")
    told = ["output=unused", "engine.device=cpu", *case.overrides]
    return told + ([f"engine.deepspeed={buckets}"] if "engine.kind=deepspeed" in case.overrides else [])


def write_sizes(size: str, folder: Path) -> Path:
    """The nano's sizes, or those with a decoder of 12 layers, 768 wide."""
    values = yaml.safe_load((ROOT / "configs" / "model" / "nano.yaml").read_text(encoding="utf-8"))
    values["text_config"]["vocab_size"] = 1067
    values["seg_token_id"] = 800
    if size == "mid":
        values["text_config"] |= {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 2048,
        }
    path = folder / f"{size}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def run(case: dict[str, Any], processes: int, folder: Path) -> dict[str, float]:
    """Measure a case in processes of its own.

    Raises:
        RuntimeError: it failed.
    """
    given, result = folder / "case.json", folder / "result.json"
    given.write_text(json.dumps(case), encoding="utf-8")
    result.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "bench" / "plan_run.py"), str(given), str(result)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if not result.is_file():
        raise RuntimeError(f"{case['overrides']} failed: {done.stderr[-3000:]}")
    values: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
    return values


def by_part(memory: Memory, states: States) -> dict[str, float]:
    """An estimate in the parts that are measured; what is offloaded lies in the same memory on a CPU."""
    weights = sum(part.backward for part in memory.parts if part.name.startswith("weights"))
    optimiser = states.optimiser_bytes()
    host = states.offloaded_bytes() - optimiser if states.offloads else 0.0
    standing = weights + optimiser + host
    seen = sum(part.backward for part in memory.parts if part.name == "optimiser")
    backward, update = memory.backward - weights - seen, memory.update - weights - seen
    return {
        "weights": weights,
        "optimiser": optimiser,
        "backward adds": backward,
        "update adds": update,
        "peak": standing + max(backward, update),
    }


def adds(measured: dict[str, float]) -> dict[str, float]:
    """Measured bytes in the parts of an estimate: what a step adds to what stands between steps."""
    standing = measured["weights"] + measured["optimiser"]
    return {
        "weights": measured["weights"],
        "optimiser": measured["optimiser"],
        "backward adds": measured["backward"] - standing,
        "update adds": measured["update"] - standing,
        "peak": max(measured["backward"], measured["update"]),
    }


def report(rows: Sequence[Row], seconds: float) -> str:
    """The whole report."""
    errors = [row.error("peak") for row in rows]
    worst = max(errors, key=abs)
    within = sum(abs(error) <= AIM for error in errors)
    lines = [
        f"# Planned and measured memory, {datetime.now(UTC):%d %B %Y}",
        "",
        f"Made by `scripts/bench/plan.py` on a CPU ({platform.machine()}), torch {torch.__version__}; "
        f"{len(rows)} runs of two steps, {seconds / 60:.0f} minutes. Random weights: `nano` has the sizes of "
        "`configs/model/nano.yaml`, `mid` a decoder of 12 layers, 768 wide, beside the same towers. "
        f"Records of {ASSUMED.tokens} text tokens and an image, half of them supervised. Full training (stage II's "
        "recipe) in fp32 where nothing else is said; DeepSpeed with buckets of 5 million numbers.",
        "",
        "Each cell is estimate / measurement in MiB, of tensors alive in the first process, counted operation by "
        "operation. *Backward adds* is what forward and backward pass take beside weights and optimiser (activations, "
        "gradients, buckets), *update adds* the same in the optimiser's step; *resident* is what the process grew by "
        "from before the network was made, allocator and libraries included, which nothing estimates.",
        "",
        *table(["sizes", "run", *PARTS, "peak's error", "resident"], [row.cells() for row in rows]),
        "",
        "## Verdict",
        "",
        f"- {within} of {len(rows)} peaks within {AIM:.0%}; the largest error is {worst:+.1%}, the mean of the sizes "
        f"of errors {sum(map(abs, errors)) / len(errors):.1%}.",
        *(f"- {told}" for told in verdicts(rows)),
    ]
    return "\n".join(lines) + "\n"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Over- and underestimates by part."""
    told = []
    for part in PARTS[:-1]:
        errors = [row.error(part) for row in rows]
        told.append(f"{part}: between {min(errors):+.1%} and {max(errors):+.1%}")
    return told


if __name__ == "__main__":
    sys.exit(main())
