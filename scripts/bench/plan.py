"""Peak memory of training steps on a CPU beside what ``medplib plan`` says; one dated report.

    python scripts/bench/plan.py [--only TEXT] [--out docs/benchmarks]

Each case trains two steps on made-up records in processes of its own, the first of which counts every tensor alive.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
import yaml
from common import ROOT, bench_parser, publish
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, REGION_PLACEHOLDER
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.batching import EncodedSample, collate
from model.train.distributed import join, launched_processes, leave
from model.train.engine import make_engine
from model.train.init_weights import add_lora, mixture_config, set_trainable
from model.train.plan import Machine, Planner, find_sizes, records_of
from model.train.recipe import load_recipe

MID = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048}
FOUR, AGAIN, DEEP = "schedule.batch_size=4", "engine.gradient_checkpointing=true", "engine.kind=deepspeed"
BOTH: tuple[tuple[str, ...], ...] = ((), (AGAIN,))
LORA = ("lora.rank=8", "lora.targets=[gate,up,down,q,v]", "trainable=[mask_decoder,mask_head,lm_head]")
CASES: list[tuple[str, int, int, tuple[str, ...]]] = [  # sizes, stage, processes, overrides
    *((size, 2, 1, (f"schedule.batch_size={n}", *how)) for size in ("nano", "mid") for n in (1, 4, 8) for how in BOTH),
    *(("mid", 2, n, (FOUR, AGAIN, DEEP, f"engine.zero_stage={zero}")) for n in (1, 2) for zero in (0, 1, 2, 3)),
    ("mid", 2, 1, (FOUR, AGAIN, DEEP, "engine.offload=optimizer")),
    ("mid", 2, 2, (FOUR, AGAIN, DEEP, "engine.precision=bf16", "schedule.accumulation=2")),
    ("mid", 2, 1, (FOUR, "engine.precision=bf16")),
    ("mid", 2, 1, (FOUR, "schedule.accumulation=2")),
    ("mid", 3, 1, (FOUR, AGAIN, *LORA)),
    ("mid", 4, 1, (FOUR, *LORA)),
    ("mid", 4, 2, (FOUR, AGAIN, DEEP, *LORA, "engine.expert_parallel=2")),
]  # fmt: skip


class Tally(TorchDispatchMode):
    """Bytes of the CPU storages that operations inside ``with`` leave behind, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, dict[int, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.sizes:
                    weakref.finalize(storage, self.freed, key)
                self.now += size - self.sizes.get(key, 0)
                self.sizes[key] = size
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def measure(stage: int, sizes: str, overrides: list[str], result: str) -> None:
    """Train two steps with random weights and write peak and estimate, in bytes."""
    torch.manual_seed(0)
    path = ROOT / "configs" / "stages" / f"stage{stage}_nano.yaml"
    recipe = load_recipe(path, overrides)
    config, records = find_sizes(recipe, path, Path(sizes))[0], records_of(recipe, 64, 0.5, 256)
    machine = Machine(int(os.environ.get("WORLD_SIZE", 1)), device="cpu")
    memory = Planner(recipe, config, records).memory(recipe.resolved(machine.ranks), machine)
    held = sum(size for name, size in memory.host.items() if name in ("optimiser and gradients", "weights"))
    if stage == 4:
        config.moe = mixture_config(recipe.mixture, config.text_config.num_hidden_layers)
    recipe = recipe.resolved(launched_processes())
    process, tally, size = join(recipe.engine), Tally(), (256, 256)
    with tally:
        network = MedPLIBForCausalLM(config)
        if recipe.engine.kind == "deepspeed" and recipe.engine.precision == "bf16":
            network = network.to(torch.bfloat16)
        add_lora(network, recipe.lora)
        set_trainable(network, recipe.trainable)
        if recipe.engine.gradient_checkpointing:
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        engine = make_engine(network.train(), recipe, process, lambda step: 1.0)
        rows = []
        for row in range(recipe.schedule.batch_size):  # all but the first are a token shorter
            ids = torch.randint(10, config.seg_token_id, (records.tokens - (row > 0),))
            ids[1], ids[2] = IMAGE_PLACEHOLDER, REGION_PLACEHOLDER
            labels = ids.clone()
            labels[: len(ids) - records.supervised] = IGNORE_INDEX
            if records.masks:
                ids[-2] = labels[-2] = config.seg_token_id
            image = torch.rand(1, 3, *[config.vision_config.image_size] * 2)
            region = torch.ones(1, config.vision_grid, config.vision_grid), torch.zeros(1, dtype=torch.long)
            masks = torch.ones(records.masks, *size)
            rows.append(EncodedSample(ids, labels, image, *region, torch.rand(3, *size), size, size, masks))
        for _ in range(2):
            for _ in range(recipe.schedule.accumulation):
                engine.accumulate(collate(rows, 0))
            engine.step()
    if process.is_first:
        Path(result).write_text(json.dumps([tally.peak, max(memory.moments) + held]), encoding="utf-8")
    leave()


def main() -> int:
    parser = bench_parser(__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose description holds it")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        measure(int(options.case[0]), options.case[1], options.case[3:], options.case[2])
        return 0
    rows, errors = [], []
    with tempfile.TemporaryDirectory() as folder:
        (buckets := Path(folder, "buckets.json")).write_text('{"zero_optimization": {"reduce_bucket_size": 5000000}}')
        for size, stage, processes, overrides in CASES:
            name = f"stage {stage}, {processes} process{'es' * (processes > 1)}: {' '.join(overrides)}"
            if options.only not in f"{size} {name}":
                continue
            values = yaml.safe_load((ROOT / "configs" / "model" / "nano.yaml").read_text(encoding="utf-8"))
            values["text_config"] |= {"vocab_size": 1067, **(MID if size == "mid" else {})}
            (sizes := Path(folder, f"{size}.yaml")).write_text(yaml.safe_dump({**values, "seg_token_id": 800}))
            given = ["output=unused", "engine.device=cpu", *overrides]
            given.append(f"engine.deepspeed={buckets}" if DEEP in overrides else "engine.kind=torch")
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            case = ["--case", str(stage), str(sizes), str(result := Path(folder, "result.json")), *given]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            subprocess.run([sys.executable, *launch * (processes > 1), __file__, *case], env=environment, check=True)
            measured, planned = json.loads(result.read_text())
            errors.append(planned / measured - 1)
            row = {"sizes": size, "run": name, "planned MiB": planned / 2**20, "measured MiB": measured / 2**20}
            rows.append(row | {"error": f"{errors[-1]:+.1%}"})
            sys.stderr.write(" · ".join(map(str, rows[-1].values())) + "\n")
    mean, within = sum(map(abs, errors)) / len(errors), sum(abs(error) <= 0.15 for error in errors)
    notes = [
        "Two steps with random weights on a CPU, records of 64 text tokens and an image, half of them supervised; "
        "`nano` as `configs/model/nano.yaml`, `mid` with a decoder of 12 layers, 768 wide; DeepSpeed with buckets of 5 "
        "million numbers. Tensors alive in the first process.",
        f"{within} of {len(rows)} within 15 %; mean error {mean:.1%}, largest {max(errors, key=abs):+.1%}.",
    ]
    publish(options.out, "plan-cpu", "Planned and measured peaks", rows, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
