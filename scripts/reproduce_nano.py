"""Train the paper's arms and ablations on phantoms, at equal budget and several seeds, and print one table.

    python scripts/reproduce_nano.py --runs runs --seeds 0 1 2 --steps 120 --jobs 2

Every arm starts from the same network (``configs/nano/pretrain_claim.yaml``: it knows modalities and structures, and
knows nothing of places, regions and masks) and its own seed's stage I, and then takes three times ``--steps`` optimiser
steps in all:

| arm | steps |
|---|---|
| a, stage II expert | 3 on questions about images and regions |
| b, stage III expert | 1 as stage II, 2 on grounding |
| c, dense | 3 on everything mixed, one feed-forward network |
| d, mixture | 1 as stage II, 1 as stage III from there, 1 as stage IV, which up-cycles both into two experts |
| e, mixture with a mixture projector | as d, the projector up-cycled too |

Ablations repeat d's last third with other routing. ``scripts/reproduce_nano.sh`` makes that start and the data first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import fmean, stdev

from nano_report import blind_scores, read_records

ALIGNMENT_STEPS = 40
SHARES = "data.shares=[0.35, 0.2, 0.45]"  # questions about images, about regions, grounding
EXPERT = "trainable=[decoder, lm_head, projector, region_adapter]"
DENSE = "trainable=[decoder, lm_head, projector, region_adapter, mask_decoder, prompt_encoder, mask_head]"
EVERYTHING = "data.train=['${MEDPLIB_DATA}/vqa.json', '${MEDPLIB_DATA}/region.json', '${MEDPLIB_DATA}/grounding.json']"
ROUTINGS: Mapping[str, tuple[str, ...]] = {
    "mixture": (),
    "mixture_projector": (
        "mixture.projector_experts=2",
        "mixture.projector_router_aux_loss_coef=0.01",
        "trainable=[decoder, lm_head, projector, region_adapter, mask_decoder, mask_head]",
    ),
    "top2": ("mixture.top_k=2",),
    "capacity_1.0": ("mixture.capacity_factor=1.0",),
    "capacity_2.0": ("mixture.capacity_factor=2.0",),
    "no_aux": ("mixture.router_aux_loss_coef=0",),
}

ARMS: Mapping[str, str] = {
    "vqa_expert": "a: stage II expert",
    "grounding_expert": "b: stage III expert",
    "dense": "c: dense, mixed data",
    "mixture": "d: two experts (top-1, capacity 1.5, aux 0.01)",
    "mixture_projector": "e: d with a mixture projector",
}
ABLATIONS: Mapping[str, str] = {
    "top2": "d, top-2",
    "capacity_1.0": "d, capacity 1.0",
    "capacity_2.0": "d, capacity 2.0",
    "no_aux": "d, aux loss 0",
}
ROWS: Mapping[str, str] = {"align": "start: stage I, no further step", **ARMS, **ABLATIONS}
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "VQA": ("modality", "presence", "side", "relation", "list", "place", "finding"),
    "region": ("region_name", "region_check", "region_side"),
    "closed": ("presence", "side", "relation", "region_check", "region_side"),
    "mDice": ("dice@0.5",),
    "false masks": ("false_masks",),
}
"""Each column is the mean of these scores of ``nano_report``."""
KEEPS = 0.02
"""A skill is called kept where the mixture is at most so much worse than the expert of that skill, on average."""

Scores = Mapping[str, float]


# --- what is trained -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One command, skipped where the file that it makes is there; ``after``: the jobs whose results it reads."""

    name: str
    command: tuple[str, ...]
    makes: Path
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is trained: the folders, the budget and how much is asked in the end."""

    nano: Path
    claim: Path
    steps: int
    images: int

    def jobs(self, seed: int) -> Iterator[Job]:
        """Training and measuring of one seed."""
        base, steps = str(self.claim / "start" / "base"), self.steps
        vqa, grounding = self._folder("vqa", seed), self._folder("grounding", seed)
        align = str(self._folder("align", seed))
        yield self._stage(1, "align", seed, ALIGNMENT_STEPS, f"model.base={base}")
        for name, own_steps in (("vqa", steps), ("vqa_expert", 3 * steps)):
            yield self._stage(2, name, seed, own_steps, f"model.base={align}", EXPERT, after="align")
        yield self._stage(3, "grounding", seed, steps, f"model.base={vqa}", after="vqa")
        yield self._stage(3, "grounding_expert", seed, 2 * steps, f"model.base={vqa}", after="vqa")
        dense = (DENSE, EVERYTHING, SHARES, "losses.dice=0.5", "losses.bce=2.0")
        yield self._stage(2, "dense", seed, 3 * steps, f"model.base={align}", *dense, after="align")
        for name, routing in ROUTINGS.items():
            sources = (f"model.base={vqa}", f"model.grounding={grounding}")
            yield self._stage(4, name, seed, steps, *sources, SHARES, *routing, after="grounding")
        for name in ROWS:
            folder = self._folder(name, seed)
            command = (sys.executable, "scripts/nano_report.py", f"{name}={folder / 'merged'}", "--images")
            command += (str(self.images), "--data", str(self.nano / "phantoms" / "test"))
            command += ("--out", str(folder / "report.json"))
            yield Job(f"measure_{name}_{seed}", command, folder / "report.json", (f"{name}_{seed}",))

    def _stage(self, stage: int, name: str, seed: int, steps: int, *values: str, after: str = "") -> Job:
        folder = self._folder(name, seed)
        common = (
            "schedule.batch_size=16",
            "schedule.epochs=20",
            "optimizer.lr=1e-3",  # they have much to learn in few steps
            "validation.samples=0",
            "logging.progress=false",
        )
        saving = ("saving.every=100000", "saving.keep=1", f"data.feature_cache={self.claim / 'features'}")
        command = (sys.executable, "-m", "model.train", f"configs/stages/stage{stage}_nano.yaml", "--resume")
        command += (f"output={folder}", f"seed={seed}", f"schedule.max_steps={steps}", *common, *saving, *values)
        return Job(f"{name}_{seed}", command, folder / "merged" / "config.json", (f"{after}_{seed}",) if after else ())

    def _folder(self, name: str, seed: int) -> Path:
        return self.claim / f"seed{seed}" / name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="holds nano/phantoms")
    parser.add_argument("--out", type=Path, help="this experiment's folder, with start/base (default RUNS/claim)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120, help="a third of each arm's budget")
    parser.add_argument("--images", type=int, default=150, help="held-out images that are asked about")
    parser.add_argument("--jobs", type=int, default=2, help="jobs of one thread at a time")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    options = parser.parse_args()
    claim = options.out or options.runs / "claim"
    plan = Plan(options.runs / "nano", claim, options.steps, options.images)
    jobs = [job for seed in options.seeds for job in plan.jobs(seed)]
    if options.list:
        print("\n".join(" ".join(job.command) for job in jobs))
        return 0
    claim.mkdir(parents=True, exist_ok=True)
    os.environ["MEDPLIB_DATA"] = str(plan.nano / "phantoms" / "train")  # which the recipes read
    failed = run_all(jobs, options.jobs, claim / "logs")
    if failed:
        sys.stderr.write(f"{', '.join(failed)} failed; see the logs in {claim}/logs, then run this again\n")
        return 1
    print(write_table(claim, options.seeds, options.steps, plan.nano / "phantoms"))
    return 0


def run_all(jobs: Sequence[Job], at_once: int, logs: Path) -> list[str]:
    """Run jobs in an order that respects ``after``, several at a time; returns the names of those that failed.

    What depends on a failed job is not run and counts as failed.
    """
    known = {job.name: job for job in jobs}
    order = TopologicalSorter({job.name: job.after for job in jobs})
    order.prepare()
    running: dict[Future[int], str] = {}
    failed: list[str] = []
    with ThreadPoolExecutor(at_once) as pool:
        while order.is_active():
            for name in order.get_ready():
                blocked = any(before in failed for before in known[name].after)
                running[pool.submit(int, 1) if blocked else pool.submit(run_job, known[name], logs)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                failed += [name] if future.result() else []
                order.done(name)
    return failed


def run_job(job: Job, logs: Path) -> int:
    """Run one job, unless its result is there; its exit status, with a line on standard output."""
    if job.makes.is_file():
        return 0
    logs.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two jobs of one thread beat one job of two
    with (logs / f"{job.name}.log").open("a") as log:
        status = subprocess.run(job.command, stdout=log, stderr=log, env=environment, check=False).returncode
    status = status or int(not job.makes.is_file())
    seconds = time.monotonic() - start
    print(f"{job.name}: {'failed' if status else f'{seconds:.0f} s'}", flush=True)
    return status


# --- the table --------------------------------------------------------------------------------------------------------


def write_table(claim: Path, seeds: Sequence[int], steps: int, phantoms: Path) -> str:
    """Read every arm's report, write table.md and table.json into ``claim`` and return the Markdown."""
    reports = {
        name: [json.loads((claim / f"seed{seed}" / name / "report.json").read_text("utf-8")) for seed in seeds]
        for name in ROWS
    }
    found = {name: [columns_of(report["columns"][name]) for report in own] for name, own in reports.items()}
    test, train, images = phantoms / "test", phantoms / "train", reports["mixture"][0]["images"]
    records = read_records(test)
    first = {*list(dict.fromkeys(record["image"] for record in records))[:images]}
    asked = [record for record in records if record["image"] in first]
    blind = columns_of(blind_scores(read_records(train), asked, train, test))
    text = markdown(found, blind, steps) + "\n" + "\n".join(f"- {line}" for line in verdict(found)) + "\n"
    (claim / "table.md").write_text(text, encoding="utf-8")
    plain = {"steps": steps, "seeds": list(seeds), "images": images, "blind": blind, "arms": found}
    (claim / "table.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return text


def columns_of(scores: Scores) -> dict[str, float]:
    """Scores of ``nano_report`` as this table's columns."""
    return {column: fmean(scores[kind] for kind in kinds) for column, kinds in COLUMNS.items()}


def markdown(found: Mapping[str, Sequence[Scores]], blind: Scores, steps: int) -> str:
    """Means over seeds with their standard deviations, one arm a row."""
    lines = [f"| arm ({3 * steps} steps each) | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines.append(f"| blind | {' | '.join(f'{blind[column]:.3f}' for column in COLUMNS)} |")
    for name, title in ROWS.items():
        cells = [spread([scores[column] for scores in found[name]]) for column in COLUMNS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean and, of several values, their standard deviation."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def verdict(found: Mapping[str, Sequence[Scores]]) -> list[str]:
    """What the seeds say, paired by seed: does the mixture keep both skills, and does it beat one dense network?"""

    def gains(other: str, *columns: str) -> dict[str, list[float]]:
        pairs = list(zip(found["mixture"], found[other], strict=True))
        return {column: [mixture[column] - one[column] for mixture, one in pairs] for column in columns}

    def listed(gained: Mapping[str, Sequence[float]]) -> str:
        return ", ".join(f"{column} {_signed(values)}" for column, values in gained.items())

    kept = gains("vqa_expert", "VQA", "region", "closed") | gains("grounding_expert", "mDice")
    lost = [column for column, values in kept.items() if fmean(values) < -KEEPS]
    answer = f"no: it loses more than {KEEPS:.2f} in {', '.join(lost)}" if lost else "yes"
    lines = [f"Does the mixture keep both skills? {answer} (d minus the expert of each skill: {listed(kept)})."]
    for other, name in (("dense", "one dense network on mixed data"), ("mixture_projector", "a mixture projector too")):
        gained = gains(other, "VQA", "region", "mDice", "false masks")
        lines.append(f"d minus {ARMS[other][0]} ({name}): {listed(gained)}.")
    return lines


def _signed(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{fmean(values):+.3f}" + (f" ({low:+.3f} to {high:+.3f})" if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
