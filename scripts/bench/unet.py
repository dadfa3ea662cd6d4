"""Train MONAI's BasicUNet on each real set alone and score its test split: the yardstick of MedPLIB-mini's masks.

    pip install monai
    python scripts/bench/unet.py --data runs/mini/data --out runs/mini/unet [--minutes 20] [--only busi ...]

``--data`` holds folders of ``medplib data build``. Every set and modality gets a network of its own: 160 pixels, the
augmentation of the mini's towers, stopped by the Dice of the validation split (a fifth of the patients of the training
split where there is none). One channel a target; Dice at the size of the test image. Writes ``unet.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.data.image_io import read_image, read_mask
from model.modeling.mask_head import restore_masks
from model.processing.images import resized_size
from model.train.pretrain.pools import SIDE, MaskPool, build_mask_pool, fit_square, grounding_targets
from model.train.pretrain.towers import PoolSampler, TowerPlan, sam_pixels

INPUT = 160
_PATIENCE = 8  # validations without a better Dice


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of built folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=20, help="most processor time of one network's training")
    parser.add_argument("--only", nargs="*", default=[], help="names of the sets to train")
    options = parser.parse_args()
    if importlib.util.find_spec("monai") is None:
        parser.error("MONAI is not installed; pip install monai")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "unet.json"
    for folder in sorted(path.parent for path in options.data.glob("*/dataset.json")):
        if options.only and folder.name not in options.only:
            continue
        for modality in json.loads((folder / "dataset.json").read_text())["modalities"]:
            key = f"{folder.name}/{modality}"
            if key not in _read(file):
                found = bench(folder, modality, options.out / "pools", options.minutes)
                # Read again: another process may have added the networks of other sets meanwhile.
                file.write_text(json.dumps({**_read(file), key: found}, indent=1) + "\n", encoding="utf-8")
                sys.stdout.write(f"{key}: {found}\n")
                sys.stdout.flush()
    return 0


def _read(report: Path) -> dict[str, Any]:
    return json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}


def bench(folder: Path, modality: str, pools: Path, minutes: float) -> dict[str, Any]:
    """Train on one modality of a built folder; mean Dice of each target on its test split, steps and minutes."""
    from monai.networks.nets import BasicUNet

    torch.manual_seed(0)
    pool = _of_modality(
        build_mask_pool(pools / folder.name, [(folder.name, folder / "train/grounding.json", folder)]), modality
    )
    held_out = folder / "validation/grounding.json"
    if held_out.exists():
        validation = _of_modality(
            build_mask_pool(pools / f"{folder.name}_validation", [(folder.name, held_out, folder)], names=pool.names),
            modality,
        )
    else:
        pool, validation = _halved(pool)
    network = BasicUNet(spatial_dims=2, in_channels=3, out_channels=len(pool.names))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-4)
    sampler = PoolSampler(pool, TowerPlan(batch_size=12), seed=0)
    begun, steps, best, waited, kept = time.process_time(), 0, -1.0, 0, network.state_dict()
    while time.process_time() - begun < 60 * minutes and waited < _PATIENCE:
        network.train()
        for _ in range(50):
            drawn = sampler.draw()
            logits = network(_inputs(drawn.images))[drawn.index, drawn.names]  # [M, 160, 160]
            loss = _loss(logits, torch.from_numpy(drawn.masks).float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        dice = _validate(network.eval(), validation)
        best, waited, kept = (dice, 0, _copy(network)) if dice > best else (best, waited + 1, kept)
    network.load_state_dict(kept)
    return {
        "test": _test(network.eval(), folder, modality, pool.names),
        "validation": round(best, 4),
        "steps": steps,
        "minutes": round((time.process_time() - begun) / 60, 1),
    }


def _inputs(images: np.ndarray) -> Tensor:
    return functional.interpolate(sam_pixels(images), (INPUT, INPUT), mode="area")


def _loss(logits: Tensor, truth: Tensor) -> Tensor:
    target = functional.interpolate(truth[:, None], (INPUT, INPUT), mode="area")[:, 0]
    probability = logits.sigmoid()
    overlap, total = (probability * target).sum((1, 2)), probability.sum((1, 2)) + target.sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return functional.binary_cross_entropy_with_logits(logits, target) + dice.mean()


@torch.no_grad()
def _validate(network: nn.Module, pool: MaskPool) -> float:
    found = []
    for place in range(len(pool.images)):
        targets = [(row, name) for row, name in pool.targets[place] if row >= 0]
        if targets:
            logits = network(_inputs(pool.images[place : place + 1]))
            full = functional.interpolate(logits, (SIDE, SIDE), mode="bilinear")[0].numpy() > 0
            found += [_dice(full[name], pool.mask(row).astype(bool)) for row, name in targets]
    return float(np.mean(found))


@torch.no_grad()
def _test(network: nn.Module, folder: Path, modality: str, names: list[str]) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for image, (_, kind), targets in grounding_targets([(folder.name, folder / "test/grounding.json", folder)]):
        if kind != modality:
            continue
        pixels = read_image(image).pixels
        size = pixels.shape[:2]
        logits = network(_inputs(fit_square(pixels)[None]))
        for name, path in targets:
            if path is not None and name in names:
                low = logits[:, [names.index(name)]]
                mask = restore_masks(low, [resized_size(size, SIDE)], [size], SIDE)[0].numpy() > 0
                found[name].append(_dice(mask, read_mask(path)))
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def _dice(mask: np.ndarray, truth: np.ndarray) -> float:
    return 2 * int((mask & truth).sum()) / max(int(mask.sum()) + int(truth.sum()), 1)


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def _of_modality(pool: MaskPool, modality: str) -> MaskPool:
    return pool.subset([place for place, kind in enumerate(pool.modalities) if kind == modality])


def _halved(pool: MaskPool) -> tuple[MaskPool, MaskPool]:
    """Four fifths of a pool and the rest; images lie patient by patient."""
    cut = len(pool.images) * 4 // 5
    return pool.subset(range(cut)), pool.subset(range(cut, len(pool.images)))


if __name__ == "__main__":
    sys.exit(main())
