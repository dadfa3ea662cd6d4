"""Mask losses against the published ones, on every recorded forward pass that paints masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch.testing import assert_close

from model.modeling.losses import mask_losses


def test_mask_losses_are_reproduced(golden: Path) -> None:
    folder = golden / "3_forward"
    painted = 0
    with np.load(folder / "image_tensors.npz") as stored:
        targets = {name: torch.from_numpy(stored[name]) for name in stored.files if "gt_mask" in name}
    for file in sorted(folder.glob("*__*.npz")):
        record = json.loads(file.with_suffix(".json").read_text())
        with np.load(file) as stored:
            count = sum(name.startswith("pred_mask_") for name in stored.files)
            logits = [torch.from_numpy(stored[f"pred_mask_{index}"])[0, 0] for index in range(count)]
            ious = [torch.from_numpy(stored[f"iou_pred_{index}"]) for index in range(count)]
        if not count:
            continue
        painted += 1
        wanted = [
            targets[f"{row}/gt_mask_{i}"] for row in record["rows"] for i in (0, 1) if f"{row}/gt_mask_{i}" in targets
        ]
        for name, loss in mask_losses(logits, wanted, torch.cat(ious)).items():
            published = torch.tensor(record["losses"][f"unscale_mask_{name}_loss"])
            assert_close(
                loss, published, rtol=1e-5, atol=1e-6, msg=lambda text, f=file.stem, n=name: f"{f}, {n}: {text}"
            )
    assert painted >= 10
