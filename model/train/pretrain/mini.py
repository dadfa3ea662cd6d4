"""``python -m model.train.pretrain.mini STEP``: MedPLIB-mini's towers from built folders, and its starting point."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from model.checkpoint import load, save
from model.data.dataset import MedPLIBDataset, MixedDataset
from model.errors import MedPLIBError, escape_unprintable
from model.modeling.configuration import MaskConfig, MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.train.pretrain.mask_pool import MaskPool, build_mask_pool
from model.train.pretrain.steps import Losses, train_steps
from model.train.pretrain.towers import TowerPlan, pretrain_sam, pretrain_vision
from model.yaml_files import read_mapping

logger = logging.getLogger(__name__)

STEPS = ("pool", "sam", "vision", "base")


class MiniPretraining:
    """The steps before MedPLIB-mini's joint training, each leaving its result in one folder.

    ``pool/``, ``pool_validation/`` pictures and masks · ``sam.safetensors``, ``vision.safetensors`` trained towers ·
    ``base/`` the native checkpoint that joint training starts from · ``log.jsonl`` losses, scores and seconds.

    Args:
        settings: YAML: ``start`` (checkpoint with tokenizer, decoder and CLIP tower), ``mask`` (its changed values),
            ``sam``, ``vision`` (``TowerPlan``), ``mask_head`` (steps, batch_size, lr), ``seed``.
        data: folder of built folders; a phantom folder has ``grounding.json`` itself.
        out: folder of the results.
    """

    def __init__(self, settings: Path, data: Path, out: Path) -> None:
        self.settings, self.data, self.out = read_mapping(settings, "the settings"), data, out
        self.seed = int(self.settings.get("seed", 0))

    def run(self, step: str) -> None:
        """Run one of ``STEPS``; what it needs must be there."""
        self.out.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        getattr(self, f"make_{step}")()
        logger.info("%s: %.0f s", step, time.monotonic() - begun)

    def make_pool(self) -> None:
        logger.info("%d pictures to learn from, %d held out", len(self.pool.images), len(self.held_out.images))

    def make_sam(self) -> None:
        start = self.start[0].model.sam.state_dict()
        plan = TowerPlan(**self.settings["sam"])
        trainer = pretrain_sam(self.pool, self.config, plan, self.seed, self.out / "log.jsonl", self.held_out, start)
        self._keep("sam", trainer)

    def make_vision(self) -> None:
        tower = self.start[0].model.vision_tower.state_dict()
        plan = TowerPlan(**self.settings["vision"])
        self._keep("vision", pretrain_vision(self.pool, self.config, plan, self.seed, self.out / "log.jsonl", tower))

    def make_base(self) -> None:
        """The start's network with the trained towers, and a mask head that gives the SAM branch's queries of names."""
        torch.manual_seed(self.seed)
        source, processor = self.start
        state = {name: value for name, value in source.state_dict().items() if not name.startswith("model.sam.")}
        towers = {"model.sam.": ("sam", "sam."), "model.vision_tower.": ("vision", "tower.")}
        for prefix, (file, inside) in towers.items():
            for name, value in self._kept(file).items():
                if name.startswith(inside):
                    state[prefix + name.removeprefix(inside)] = value
        model = MedPLIBForCausalLM(self.config)
        model.load_state_dict(state)
        names = dict(zip(self.pool.names, self._kept("sam")["names.weight"], strict=True))
        records = [MedPLIBDataset(path, root, processor, training=True) for _, path, root in self._files("train")]
        plan = self.settings["mask_head"]
        fit_mask_head(model, processor, MixedDataset(records), names, plan, self.seed, self.out)
        save(model, processor, self.out / "base")

    @cached_property
    def start(self) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
        """The network and processor that the mini begins with."""
        return load(Path(self.settings["start"]), dtype=torch.float32)

    @property
    def config(self) -> MedPLIBConfig:
        """The start's configuration with the mini's mask branch."""
        values = self.start[0].config.to_dict()
        mask = MaskConfig(**{**asdict(self.start[0].config.mask), **self.settings["mask"]})
        turns = self.settings.get("conversation_turns", 1)
        return MedPLIBConfig(**{**values, "mask": asdict(mask), "conversation_turns": turns})

    @cached_property
    def pool(self) -> MaskPool:
        """Pictures to learn from."""
        return self._pool("pool", "train")

    @cached_property
    def held_out(self) -> MaskPool:
        """Pictures of the validation splits, named as the others are."""
        return self._pool("pool_validation", "validation", self.pool.names)

    def _pool(self, name: str, split: str, names: Sequence[str] = ()) -> MaskPool:
        with tqdm(desc=name, unit="image", disable=(self.out / name / "index.json").exists()) as bar:
            return build_mask_pool(self.out / name, self._files(split), bar.update, names)

    def _files(self, split: str) -> list[tuple[str, Path, Path]]:
        """(data set, grounding records, folder that their paths start from) of every built folder with the split."""
        files = [(path.parent.parent, path) for path in sorted(self.data.glob(f"*/{split}/grounding.json"))]
        if not files:
            raise MedPLIBError(
                f"{self.data} has no */{split}/grounding.json; build its folders with medplib data build"
            )
        return [
            (folder.name, path, folder if (folder / "dataset.json").exists() else path.parent) for folder, path in files
        ]

    def _keep(self, name: str, module: nn.Module) -> None:
        state = {key: value.detach().clone().contiguous() for key, value in module.state_dict().items()}
        save_file(state, self.out / f".{name}.part")
        (self.out / f".{name}.part").replace(self.out / f"{name}.safetensors")

    def _kept(self, name: str) -> dict[str, Tensor]:
        path = self.out / f"{name}.safetensors"
        if not path.is_file():
            raise MedPLIBError(f"{path} is missing; run the step {name!r} first")
        return load_file(path)


def fit_mask_head(
    model: MedPLIBForCausalLM,
    processor: MedPLIBProcessor,
    records: MixedDataset,
    names: dict[str, Tensor],
    plan: dict[str, Any],
    seed: int,
    out: Path,
) -> None:
    """Fit the mask head, so that a ``<SEG>`` state gives the SAM branch's query of the name that it stands for.

    Args:
        records: grounding records; those whose target has no query are passed over.
        names: name → query [C].
        plan: ``steps``, ``batch_size``, ``lr``.
    """
    rng = np.random.default_rng(seed)
    seg = model.config.seg_token_id

    def draw() -> tuple[list[Any], Tensor]:
        """Encoded records with one ``<SEG>`` each, and the queries [B, C] of their targets."""
        items: list[Any] = []
        queries: list[Tensor] = []
        while len(items) < plan["batch_size"]:
            place = int(rng.integers(len(records)))
            sample = records.sample(place)
            if len(sample.masks) == 1 and sample.raw.get("about") in names:
                items.append(records[place])
                queries.append(names[sample.raw["about"]])
        return items, torch.stack(queries)

    def step(number: int) -> Losses:
        items, queries = draw()
        batch = processor.collate(items)
        labels = batch["labels"]
        inputs = ("input_ids", "attention_mask", "pixel_values", "region_masks", "region_image")
        with torch.no_grad():
            output = model(**{name: batch[name] for name in inputs})
        assert output.plan is not None and output.last_hidden_state is not None
        rows, tokens = (output.plan.valid & (labels == seg)).nonzero(as_tuple=True)
        states = output.last_hidden_state[rows, output.plan.starts[rows, tokens] - 1]
        return {"query": functional.mse_loss(model.model.mask_head(states), queries)}

    parameters = model.model.mask_head.parameters()
    train_steps("mask head", parameters, step, plan["steps"], plan["lr"], out / "log.jsonl", weight_decay=0.0)


def main(arguments: list[str] | None = None) -> int:
    """Run steps in the order given; returns the exit code."""
    escape_unprintable()
    parser = argparse.ArgumentParser(prog="python -m model.train.pretrain.mini", description=__doc__)
    parser.add_argument("steps", nargs="+", choices=STEPS, help="what to make, in this order")
    parser.add_argument("--config", type=Path, default=Path("configs/mini/pretrain.yaml"), help="settings")
    parser.add_argument("--data", type=Path, required=True, help="folder of built folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is made")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        pretraining = MiniPretraining(options.config, options.data, options.out)
        for step in options.steps:
            pretraining.run(step)
    except MedPLIBError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
