"""``python -m model.train.pretrain.mini STEP``: MedPLIB-mini's towers from built folders, and its starting point."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from model.checkpoint import load, save
from model.data.dataset import MedPLIBDataset, MixedDataset
from model.errors import MedPLIBError
from model.modeling.configuration import MaskConfig, MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.train.pretrain import Losses, Pretraining, run_steps, train_steps
from model.train.pretrain.pools import MaskPool, build_mask_pool
from model.train.pretrain.towers import TowerPlan, pretrain_sam, pretrain_vision

logger = logging.getLogger(__name__)


class MiniPretraining(Pretraining):
    """The steps before MedPLIB-mini's joint training, each leaving its result in one folder.

    ``pool/``, ``pool_validation/`` pictures and masks · ``sam.safetensors``, ``vision.safetensors`` trained towers ·
    ``base/`` the native checkpoint that joint training starts from · ``log.jsonl`` losses, scores and seconds.

    Args:
        settings: YAML: ``start`` (checkpoint with tokenizer, decoder and CLIP tower), ``mask`` (its changed values),
            ``sam``, ``vision`` (``TowerPlan``), ``mask_head`` (steps, batch_size, lr), ``seed``.
        data: folder of built folders; a phantom folder has ``grounding.json`` itself.
        out: folder of the results.
    """

    steps = ("pool", "sam", "vision", "base")

    def __init__(self, settings: Path, data: Path, out: Path) -> None:
        super().__init__(settings, out)
        self.data = data

    def make_pool(self) -> None:
        logger.info("%d pictures to learn from, %d held out", len(self.pool.images), len(self.held_out.images))

    def make_sam(self) -> None:
        start = self.start[0].model.sam.state_dict()
        plan = TowerPlan(**self.settings["sam"])
        trainer = pretrain_sam(self.pool, self.config, plan, self.seed, self.log, self.held_out, start)
        self.save_part("sam", trainer)

    def make_vision(self) -> None:
        tower = self.start[0].model.vision_tower.state_dict()
        plan = TowerPlan(**self.settings["vision"])
        self.save_part("vision", pretrain_vision(self.pool, self.config, plan, self.seed, self.log, tower))

    def make_base(self) -> None:
        """The start's network with the trained towers, and a mask head that gives the SAM branch's queries of names."""
        torch.manual_seed(self.seed)
        source, processor = self.start
        state = {name: value for name, value in source.state_dict().items() if not name.startswith("model.sam.")}
        towers = {"model.sam.": ("sam", "sam."), "model.vision_tower.": ("vision", "tower.")}
        for prefix, (file, inside) in towers.items():
            state |= {prefix + name: value for name, value in self.load_part(file, inside).items()}
        model = MedPLIBForCausalLM(self.config)
        model.load_state_dict(state)
        names = dict(zip(self.pool.names, self.load_part("sam")["names.weight"], strict=True))
        records = [MedPLIBDataset(path, root, processor, training=True) for _, path, root in self._files("train")]
        plan = self.settings["mask_head"]
        fit_mask_head(model, processor, MixedDataset(records), names, plan, self.seed, self.log)
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


def fit_mask_head(
    model: MedPLIBForCausalLM,
    processor: MedPLIBProcessor,
    records: MixedDataset,
    names: dict[str, Tensor],
    plan: dict[str, Any],
    seed: int,
    log: Path,
) -> None:
    """Fit the mask head, so that a ``<SEG>`` state gives the query [C] of its name in ``names``.

    Records whose target has no query are passed over; ``plan`` has ``steps``, ``batch_size`` and ``lr``.
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
    train_steps("mask head", parameters, step, plan["steps"], plan["lr"], log, weight_decay=0.0)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model.train.pretrain.mini", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of built folders")
    return run_steps(
        parser,
        "configs/mini/pretrain.yaml",
        MiniPretraining.steps,
        lambda options: MiniPretraining(options.config, options.data, options.out),
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
