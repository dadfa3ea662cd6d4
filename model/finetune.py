"""``medplib finetune DATA --out RUN``: recipe, rehearsal, training and a before/after page in one command."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import shlex
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from model.checkpoint.directories import resolve
from model.checkpoint.loading import read_processor
from model.checkpoint.pretrained import open_checkpoint
from model.data.phantom import TASKS, build_phantoms
from model.data.records import open_records
from model.errors import MedPLIBError
from model.eval import report as sections
from model.eval.compare import SetComparison, compare_runs, comparison_section, open_run
from model.eval.pages import Markup, curves, element, joined, page
from model.eval.report import Pictures, write_text
from model.eval.results import SuiteResult
from model.eval.shards import fingerprint, read_journal
from model.eval.suite import (
    DATASET_FILE,
    DataSet,
    Suite,
    build_source,
    find_dataset,
    is_record_file,
    own_suite,
)
from model.eval.suite_run import PREDICTIONS, SuiteOptions, run_suite
from model.serve.checks import free_memory
from model.settings import apply_override, modernized, read_mapping
from model.train import run
from model.train.plan import GIB, Machine, Planner, advise, find_sizes, records_of
from model.train.preemption import RunStopped
from model.train.preflight import start_problems
from model.train.recipe import OLD_KEYS, RECIPE_FILE, Recipe, load_recipe, recipe_from, recipe_text
from model.train.runs import METRICS_FILE, SCORES, VALIDATION_FILE, read_record, read_rows

logger = logging.getLogger(__name__)

PAGE, PLAN, BEFORE, AFTER = "index.html", "finetune.yaml", "before", "after"
_PHANTOMS = {"train": 400, "validation": 16, "test": 40}  # images; cases of each are its own
_KNOWN = 0.5  # mDice on phantoms below which a base has nothing there to forget
_FORGOTTEN = 0.05  # a loss of more than this, and of more than chance, is called forgetting
_LISTED = ("mDice@0.5", "false_mask_rate@0.5", "closed_accuracy", "open_exact_match")
_RATE, _WARMUP = 6e-4, 20  # docs/training.md has the rates that were tried; steps
_MASKED = 2 / 3  # least part of the own draws that ask for masks, where records do; docs/training.md has what it gives
_PATIENCE, _BATCH, _FEWEST, _MOST, _DRAWS = 5, 16, 300, 2000, 10
_FULL_MOST = 1e9  # weights; larger networks learn through LoRA
_METHODS: Mapping[str, Mapping[str, Any]] = {
    "full": {
        "trainable": [
            *("decoder", "lm_head", "projector", "region_adapter", "mask_decoder", "prompt_encoder", "mask_head"),
            *("sam_image_encoder", "vision_tower"),
        ],
        "lora": {"rank": 0, "targets": []},
    },
    "lora": {
        "trainable": ["lm_head", "embed_tokens", "projector", "region_adapter", "mask_decoder", "mask_head"],
        "lora": {"rank": 16, "alpha": 32, "targets": ["q", "k", "v", "o", "gate", "up", "down"]},
    },
}


@dataclass(frozen=True)
class Built:
    """A built folder: what ``dataset.json`` says, with whole paths.

    Attributes:
        folder: where it lies.
        name: of the data set.
        images: folder that the records' paths start from.
        splits: record files of ``train``, ``validation`` and ``test``; those without records are absent.
        terms: licence of the data as its source words it; empty where it says nothing.
    """

    folder: Path
    name: str
    images: Path
    splits: Mapping[str, tuple[Path, ...]]
    terms: str = ""

    @property
    def held_out(self) -> str:
        """The split that a finished model is measured on."""
        return "test" if self.splits.get("test") else "validation"


@dataclass(frozen=True)
class Plan:
    """A run before its first step: its recipe, and why it is so.

    Attributes:
        recipe: of the training.
        base: checkpoint that is fine-tuned.
        own: the user's data.
        rehearsal: mixed into the training; None where nothing is.
        old: what the base knew, measured before and after; None where that is not known.
        reasons: of the choices, a sentence each.
    """

    recipe: Recipe
    base: Path
    own: Built
    rehearsal: Built | None
    old: Built | None
    reasons: tuple[str, ...]


def finetune(options: argparse.Namespace) -> int:
    """Prepare, measure, train, measure again and write the page; exit code 0, or that of a stopped run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MedPLIBError("finetune runs in one process; for more, train what --print-recipe prints by medplib train")
    logging.getLogger("model").setLevel(logging.WARNING if options.print_recipe else logging.INFO)
    plan = prepare(options)
    if options.print_recipe:
        sys.stdout.write("".join(f"# {reason}\n" for reason in plan.reasons) + recipe_text(plan.recipe))
        return 0
    for reason in plan.reasons:
        logger.info("%s", reason)
    before = _measure(plan.base, plan, BEFORE)
    if not _is_trained(plan.recipe):
        try:
            run(plan.recipe, options.resume)
        except RunStopped as stopped:
            sys.stderr.write(f"{stopped.message}\n")
            return int(str(stopped.code))
    verdicts = write_page(plan, _measure(plan.recipe.merged, plan, AFTER), before.model)
    sys.stdout.write("\n".join([*verdicts, f"wrote {options.out / PAGE} and {plan.recipe.merged}", ""]))
    return 0


def _is_trained(recipe: Recipe) -> bool:
    """Whether the run in the recipe's folder is finished and of this recipe, but for what a machine resolves."""
    if read_record(recipe.folder).get("status") != "finished" or not (recipe.merged / "config.json").is_file():
        return False
    return replace(load_recipe(recipe.folder / RECIPE_FILE), engine=recipe.engine) == recipe


# --- data -----------------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> Plan:
    """Everything a run needs on disk, and its recipe; what is there already is used again.

    Raises:
        MedPLIBError: data, base model or recipe values cannot be used, or the network fits no memory here.
    """
    out, base = options.out, resolve(options.model)
    if not 0 < options.share <= 1:
        raise MedPLIBError(f"--share is {options.share:g}; give the own data's share of the draws, above 0, at most 1")
    own = _with_validation(_open_data(options.data, out / "data"), out / "data_split")
    if not own.splits.get("train") or not own.splits.get("validation"):
        raise MedPLIBError(
            f"{options.data} has too few patients to train on and to hold out; give data of several, or say which "
            "images are of one patient by `medplib data build --patient-pattern`"
        )
    if options.terms:
        own = replace(own, terms=options.terms)
    if not options.resume:  # errors come before anything is rendered
        _recipe(options, base, own, None)
    old = rehearsal = None
    reasons = []
    if options.rehearse is not None:
        old = rehearsal = _with_validation(_open_data(options.rehearse, out / "rehearsal"), out / "rehearsal_split")
    elif _knows(base, phantoms := _phantoms(out / "rehearsal"), out):
        old, rehearsal = phantoms, None if options.no_rehearse else phantoms
    else:
        reasons.append("rehearsal: none, as the model does not know phantoms; --rehearse FILE keeps other skills")
    if rehearsal is not None:
        reasons.append(f"rehearsal: {rehearsal.name}, {1 - options.share:.0%} of the draws")
    elif old is not None:
        reasons.append("rehearsal: none, as asked; what the model knew fades, and the page says how far")
    recipe, why = _recipe(options, base, own, rehearsal)
    records = sum(len(open_records(file)) for file in own.splits["train"])
    draws = recipe.schedule.max_steps * recipe.schedule.batch_size * recipe.schedule.accumulation
    each = draws * (options.share if rehearsal is not None else 1) / records
    reasons += [
        f"{recipe.schedule.max_steps} steps draw each of {records:,} own records about {each:.1f} times",
        f"every {recipe.validation.every} steps generated answers are scored; the best {recipe.saving.best} is kept, "
        f"and {recipe.validation.patience} validations without a better one end the run",
        *([f"changed by hand: {' '.join(options.overrides)}"] if options.overrides else []),
    ]
    if own.held_out == "validation":
        reasons.append(
            "there is no test split: own data are measured on what the checkpoint is chosen by, so flattered"
        )
    return Plan(recipe, base, own, rehearsal, old, (why, *reasons))


def read_built(folder: Path) -> Built:
    """A folder of ``medplib data build``.

    Raises:
        MedPLIBError: its ``dataset.json`` is damaged.
    """
    try:
        content: dict[str, Any] = json.loads((folder / DATASET_FILE).read_text(encoding="utf-8"))
        images = folder / str(content.get("images_root") or ".")
        splits = {str(s): tuple(folder / name for name in names) for s, names in content["splits"].items() if names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MedPLIBError(f"{folder / DATASET_FILE} cannot be read ({error}); build the folder again") from None
    return Built(folder, str(content.get("name") or folder.name), images, splits, str(content.get("terms") or ""))


def _open_data(data: Path, out: Path) -> Built:
    """A built folder, a record file whose paths start from its folder, or a source, which is built into ``out``."""
    if not data.exists():
        raise MedPLIBError(f"there is nothing at {data}; give a folder of `medplib data build`, or its source")
    if is_record_file(data):
        return Built(data, data.stem, data.parent, {"train": (data,)})
    if data.is_dir() and find_dataset(data) is not None:
        return read_built(data)
    try:
        return read_built(build_source(data, out))
    except MedPLIBError as error:  # it may ask for a flag of the build
        raise MedPLIBError(f"{error}: build it by medplib data build {data} --out DIR, and give DIR") from error


def _with_validation(data: Built, out: Path) -> Built:
    """The data set itself; one without validation records, with a tenth of its patients as such, in ``out``."""
    if data.splits.get("validation") or not data.splits.get("train"):
        return data
    splits: dict[str, list[str]] = {
        name: [str(file.resolve()) for file in files] for name, files in data.splits.items()
    }
    splits |= {"train": [], "validation": []}
    files = {file: list(open_records(file)) for file in data.splits["train"]}
    cases = sorted({_case(row) for rows in files.values() for row in rows}, key=_shuffled)
    held_out_cases = set(cases[: math.ceil(len(cases) / 10)]) if len(cases) > 1 else set()
    for file, records in files.items():
        rows: dict[bool, list[Mapping[str, Any]]] = {True: [], False: []}
        for row in records:
            rows[_case(row) in held_out_cases].append(row)
        for split, held_out in (("train", False), ("validation", True)):
            if rows[held_out]:
                splits[split].append(f"{split}/{len(splits[split])}_{file.stem}.json")
                (out / split).mkdir(parents=True, exist_ok=True)
                write_text(out / splits[split][-1], json.dumps(rows[held_out], ensure_ascii=False))
    content = {"name": data.name, "images_root": str(data.images.resolve()), "splits": splits, "terms": data.terms}
    write_text(out / DATASET_FILE, json.dumps(content))
    return read_built(out)


def _case(record: Mapping[str, Any]) -> str:
    return str(record.get("patient") or record.get("image") or record.get("id"))


def _shuffled(case: str) -> tuple[int, str]:
    """A sort key that mixes cases the same way everywhere, whatever their names' order."""
    return zlib.crc32(case.encode("utf-8", "surrogatepass")), case


def _phantoms(folder: Path) -> Built:
    """Phantoms to rehearse and phantoms to measure on, as a built folder; rendered once."""
    if not (folder / DATASET_FILE).is_file():
        logger.info("rendering %d phantoms into %s", sum(_PHANTOMS.values()), folder)
        splits: dict[str, list[str]] = {}
        for seed, (split, images) in enumerate(_PHANTOMS.items(), 901):
            build_phantoms(folder / split, images, seed)
            splits[split] = [f"{split}/{task}.json" for task in TASKS]
            for name in splits[split]:  # paths shall start from the folder above both
                rows = (folder / name).read_text(encoding="utf-8")
                write_text(folder / name, re.sub(r'(": "|<mask>|<region>)(images|masks)/', rf"\1{split}/\2/", rows))
        content = {"name": "phantoms", "images_root": ".", "terms": "drawn by this software"}
        write_text(folder / DATASET_FILE, json.dumps({**content, "splits": splits}))
    return read_built(folder)


def _knows(base: Path, phantoms: Built, out: Path) -> bool:
    """Whether a model segments held-out phantoms, by two dozen questions; a finished answer is not asked again."""
    item = _data_set(phantoms)
    found = _run_suite(base, [replace(item, records=item.records[-1:])], out / "eval" / "knows", limit=24)
    return found.sets[0].scores.overall["mDice@0.5"].value > _KNOWN


# --- the recipe -----------------------------------------------------------------------------------------------------


def _recipe(options: argparse.Namespace, base: Path, own: Built, rehearsal: Built | None) -> tuple[Recipe, str]:
    """The recipe of a run, checked, and why it trains as it does; ``RUN/finetune.yaml`` has it without overrides."""
    opened = open_checkpoint(base)
    settings = read_processor(opened).settings
    sizes = [len(open_records(file)) for file in own.splits["train"]]
    share = options.share if rehearsal is not None else 1.0
    steps = min(_MOST, max(_FEWEST, math.ceil(_DRAWS * sum(sizes) / (share * _BATCH))))
    every = max(25, steps // 15)
    parts = [own, *([rehearsal] if rehearsal is not None else [])]
    files = {split: [file for part in parts for file in part.splits[split]] for split in ("train", "validation")}
    roots = {split: [str(part.images) for part in parts for _ in part.splits[split]] for split in files}
    old = len(files["train"]) - len(sizes)
    epoch = sum(len(open_records(file)) for file in files["train"]) / _BATCH
    shares = [share * part for part in _parts(own.splits["train"], sizes)] + [(1 - share) / max(old, 1)] * old
    values: dict[str, Any] = {
        "stage": 4 if opened.config.moe.enabled else 3,
        "output": str(options.out),
        "model": {"base": str(base)},
        "data": {
            "train": [str(path) for path in files["train"]],
            "images": roots["train"],
            "shares": [round(one, 4) for one in shares] if len(shares) > 1 else [],
            "validation": [str(path) for path in files["validation"]],
            "validation_images": roots["validation"],
            "template": settings.template,
            "max_length": settings.max_length or 1024,
            "workers": 2 if (os.cpu_count() or 1) > 4 else 0,
        },
        "schedule": {"max_steps": steps, "batch_size": _BATCH, "accumulation": 1},
        "optimizer": {"lr": _RATE, "warmup": round(min(1.0, _WARMUP / epoch), 6), "decay": "cosine"},
        "augmentation": {"preset": "light"},
        "losses": {"ce": 1.0, "dice": 5.0, "bce": 1.0, "focal": 1.0},
        "validation": {"every": every, "samples": 240, "batch_size": 8, "thresholds": [0.5], "patience": _PATIENCE},
        "saving": {"every": every, "keep": 1, "best": _best_score(own)},
    }
    path = options.out / PLAN
    if options.method == "auto" and path.is_file() and (options.out / RECIPE_FILE).is_file():
        former = modernized(
            read_mapping(path, "the plan"), OLD_KEYS
        )  # less memory may be free now, and a run goes on as it was begun
        values |= {key: former[key] for key in (*_METHODS["full"], "engine", "schedule", "optimizer")}
        reason = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    else:
        weights = sum(math.prod(shape) for shape in opened.shapes.values())
        values, reason = _with_method(options.method, values, weights)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(path, f"# {reason}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}")
    also = None if options.print_recipe else lambda recipe: start_problems(recipe, resume=options.resume)
    return load_recipe(path, options.overrides, also=also), reason


def _parts(files: Sequence[Path], sizes: Sequence[int]) -> list[float]:
    """Shares of record files by size, those with masks in their answers raised to ``_MASKED`` together."""
    masked = [any(map(_has_mask, open_records(file))) for file in files]
    with_masks = sum(size for size, has in zip(sizes, masked, strict=True) if has)
    without = sum(sizes) - with_masks
    if not with_masks or not without:
        return [size / sum(sizes) for size in sizes]
    part = max(_MASKED, with_masks / sum(sizes))
    scale = {True: part / with_masks, False: (1 - part) / without}
    return [size * scale[has] for size, has in zip(sizes, masked, strict=True)]


def _has_mask(row: Mapping[str, Any]) -> bool:
    return "<mask>" in str(row.get("conversations", row.get("messages", "")))


def _best_score(own: Built) -> str:
    """The score that the checkpoint is chosen by: of masks where held-out records have any."""
    rows = [row for file in own.splits["validation"] for row in open_records(file)]
    if any(map(_has_mask, rows)):
        return "mDice"
    return "closed" if any(str(row.get("answer_type", "")).lower() == "closed" for row in rows) else "open"


def _with_method(wanted: str, values: dict[str, Any], weights: int) -> tuple[dict[str, Any], str]:
    """The values with what learns, fitted to this machine, and why: full training of a small network, else LoRA.

    Raises:
        MedPLIBError: nothing fits, with no setting that saves memory.
    """
    gpu = torch.cuda.is_available()
    free, host = float(torch.cuda.mem_get_info()[0] if gpu else 0), float(free_memory() or math.inf)
    machine = Machine(1, 1, free, host, "cuda") if gpu else Machine(1, 1, host, math.inf, "cpu")
    place = f"{machine.gpu_memory / GIB:.1f} GiB free {'on the GPU' if gpu else 'here'}"
    needs = []
    for method in ("full", "lora")[weights > _FULL_MOST :] if wanted == "auto" else (wanted,):
        engine = {
            "kind": "torch",
            "precision": "bf16" if gpu else "fp32",
            "gradient_checkpointing": weights > _FULL_MOST,
        }
        chosen = {**values, **_METHODS[method], "engine": engine}
        recipe = recipe_from(chosen)
        planner = Planner(recipe, find_sizes(recipe, Path(PLAN))[0], records_of(recipe))
        needs.append(f"{method} {max(planner.memory(recipe, machine).moments) / GIB:.1f} GiB")
        reason = f"{method} training of {weights / 1e6:,.1f} M weights: {needs[-1]} by estimate, {place}"
        if planner.memory(recipe, machine).fits(machine):
            return chosen, reason
        chosen["engine"] = {**engine, "kind": "deepspeed" if gpu else "torch"}
        for change in advise(planner, recipe_from(chosen), machine, 1):
            chosen = json.loads(json.dumps(chosen))  # nested values of its own
            for text in change.overrides:
                apply_override(chosen, text, [])
            return chosen, f"{reason}; it fits with {' '.join(change.overrides)}"
    raise MedPLIBError(
        f"the model needs {', '.join(needs)}, and there are {place}; take a smaller --model or more memory"
    )


# --- before and after -----------------------------------------------------------------------------------------------


def _measure(model: Path, plan: Plan, name: str) -> SuiteResult:
    """Answers and scores of a model on own and old held-out records, in ``RUN/eval/NAME``."""
    sets = [_data_set(data) for data in (plan.own, plan.old) if data is not None]
    sets = [sets[0], *(replace(item, surface=False, detailed=False, blind=()) for item in sets[1:])]
    sets = [replace(item, max_new_tokens=plan.recipe.validation.max_new_tokens) for item in sets]
    logger.info("measuring the model %s fine-tuning on %s", name, " and ".join(item.title for item in sets))
    return _run_suite(model, sets, plan.recipe.folder / "eval" / name)


def _data_set(data: Built) -> DataSet:
    return own_suite(data.folder, split=data.held_out, images=None, cache=data.folder).sets[0]


def _run_suite(model: Path, sets: Sequence[DataSet], out: Path, limit: int | None = None) -> SuiteResult:
    """Ask and score; goes on where it was stopped, and begins anew where another model answered before."""
    digest = fingerprint(model)
    journals = [read_journal(out / PREDICTIONS / f"{item.name}.jsonl") for item in sets]
    other = any(not journal.of_model(digest) for journal in journals if journal is not None)
    suite = Suite(out.name, tuple(sets), title=f"{out.name.capitalize()} fine-tuning")
    result = run_suite(SuiteOptions(model, suite, suite.name, out, limit=limit, overwrite=other)).result
    assert result is not None  # this is the only process
    return result


def verdicts_of(part: SetComparison, *, own: bool) -> list[str]:
    """What became of the scores of a data set, a sentence each; a loss of old skills is called FORGOTTEN.

    Args:
        part: before and after.
        own: the set is the user's, where a loss is no forgetting.
    """
    verdicts = []
    metrics = {metric.name: metric for metric in part.found.metrics}
    for name in _LISTED:
        found = part.found.overall.get(name)
        if found is None or not found.count:
            continue
        sign = 1 if metrics[name].higher_is_better else -1
        by_chance = not found.difference or found.low <= 0 <= found.high
        if by_chance or sign * found.difference > 0:
            word = "no change beyond chance" if by_chance else "better"
        elif sign * found.difference < -_FORGOTTEN:
            word = "WORSE" if own else "FORGOTTEN"
        else:
            word = "slightly worse"
        ends = "" if math.isnan(found.low) else f", 95 % interval {found.low:+.2f} to {found.high:+.2f}"
        change = f"{found.first:.2f} → {found.second:.2f}: {word} ({found.difference:+.2f}{ends})"
        verdicts.append(f"{part.title} {name} {change}")
    return verdicts


# --- the page and the card ------------------------------------------------------------------------------------------


def write_page(plan: Plan, after: SuiteResult, base: str) -> list[str]:
    """Write ``index.html`` and the model's card.

    Args:
        plan: of the finished run, whose ``eval/before`` and ``eval/after`` are there.
        after: what the fine-tuned model scored.
        base: name of the model it came from.

    Returns:
        Sentences on what changed.
    """
    out = plan.recipe.folder
    found = compare_runs(open_run(out / "eval" / BEFORE), open_run(out / "eval" / AFTER))
    lines = [text for part in found for text in verdicts_of(part, own=part.title == plan.own.name)]
    forgotten = sum("FORGOTTEN" in line for line in lines)
    lead = f"Forgetting: {forgotten} scores of {plan.old.name} fell" if plan.old is not None and forgotten else ""
    if plan.old is None:
        lead = "No old skill was measured; --rehearse names records of what the model must keep"
    lead = lead or f"Nothing of {plan.old.name} is forgotten beyond {_FORGOTTEN:g} in a score" if plan.old else lead
    asked = next((name for name in after.sets[0].scores.by("structure") if re.fullmatch(r"\w[\w ]*", name)), "TARGET")
    commands = [
        shlex.join(["medplib", "serve", "--model", str(out)]),
        shlex.join(["medplib", "ask", "IMAGE.png", f"Please segment the {asked} in this image.", "--model", str(out)]),
        shlex.join(["medplib", "eval", str(out), str(plan.own.folder), "--split", plan.own.held_out]),
        shlex.join(["tensorboard", "--logdir", str(out)]),
    ]
    shown = [replace(part, pictured={k: v for k, v in part.pictured.items() if k == "worst"}) for part in after.sets]
    pictures = [Pictures(part.images, part.regions, 16) for part in shown]
    worst = (
        joined([element("h3", part.item.title), sections.gallery(part, maker), sections.failures(part, maker)])
        for part, maker in zip(shown, pictures, strict=True)
    )
    why = element("ul", *(element("li", reason) for reason in plan.reasons))
    body = joined(
        [
            element(
                "header",
                element("p", "MedPLIB fine-tuning", class_="eyebrow"),
                element("h1", f"{plan.own.name}: before and after"),
                element("p", f"{lead}.", class_="warning" if forgotten else "lead"),
                element("ul", *(element("li", line) for line in lines)),
                sections.facts({"Base": base, "Result": plan.recipe.merged}),
                sections.folded("How it was trained", why),
            ),
            element("h2", "While it trained"),
            _curves(out),
            element("p", "First is before, second after fine-tuning.", class_="about"),
            *(comparison_section(part, f"set-{index}", len(found)) for index, part in enumerate(found)),
            element("h2", "Worst cases after fine-tuning"),
            *worst,
            element("h2", "Use it"),
            *(element("p", element("code", command)) for command in commands),
            element(
                "p", *(element("a", f"The whole report {n}. ", href=f"eval/{n}/report.html") for n in (BEFORE, AFTER))
            ),
            element("p", "For research. Nothing here was validated for diagnosis or treatment."),
        ]
    )
    write_text(out / PAGE, page(f"Fine-tuning on {plan.own.name}", body))
    write_text(plan.recipe.merged / "README.md", _card(plan, base, lines, commands[:3]))
    return [*lines, f"{lead}."]


def _curves(folder: Path) -> Markup:
    """Training loss as means over sixtieths of the run, and scores of every validation."""
    rows = [row for row in read_rows(folder / METRICS_FILE) if isinstance(row.get("loss"), int | float)]
    width = max(1, len(rows) // 60)
    losses = [np.mean([row["loss"] for row in rows[at : at + width]]) for at in range(0, len(rows), width)]
    last, most = max(1, len(rows)), max([1e-9, *losses])
    held_out = read_rows(folder / VALIDATION_FILE)
    scores = {name: [math.nan if row.get(name) is None else row[name] for row in held_out] for name in SCORES}
    scores = {name: values for name, values in scores.items() if np.isfinite(values).any()}
    ends = [min(1.0, (at + 1) * width / last) for at in range(len(losses))]
    across = f"share of {last} steps"
    charts = [curves(ends, {"loss": [loss / most for loss in losses]}, across, f"training loss, of {most:.2f}")]
    charts += [curves([row["step"] / last for row in held_out], scores, across, "validation")] if scores else []
    key = [element("span", name, class_=f"series-{index % 6 + 1}") for index, name in enumerate(scores)]
    return joined([element("div", *key, class_="key"), element("div", *charts, class_="charts")])


def _card(plan: Plan, base: str, lines: Sequence[str], commands: Sequence[str]) -> str:
    """README.md of the merged checkpoint: base, data sets and their terms, recipe, figures."""
    card, recipe = plan.base / "README.md", plan.recipe
    head = card.read_text(encoding="utf-8", errors="replace")[:2000] if card.is_file() else ""
    licence = re.search(r"^license: *(.+)$", head, re.MULTILINE)
    sets = [plan.own, *([plan.rehearsal] if plan.rehearsal is not None else [])]
    listed = [
        f"Base: {base}; licence: {licence[1] if licence else 'not stated beside its weights'}",
        *(f"Trained on: {data.name}; terms: {data.terms or 'not stated by the source'}" for data in sets),
        *plan.reasons,
        f"Learning rate {recipe.optimizer.lr:g}, seed {recipe.seed}; every setting is in `recipe.yaml` of the run",
    ]
    text = f"# {recipe.folder.name}\n\n{base}, fine-tuned by `medplib finetune`. For research; not validated for "
    text += "diagnosis or treatment.\n\n" + "\n".join(f"- {line}" for line in listed)
    text += f"\n\n## Measured, before → after\n\nGreedy answers; {plan.own.held_out} split of {plan.own.name}.\n\n"
    return text + "\n".join([*(f"- {line}" for line in lines), "", "```bash", *commands, "```", ""])
