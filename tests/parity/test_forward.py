"""The whole network reproduces the published training forward: logits, states, every loss, gradients, masks.

Ours runs in float64 here. The recorded arrays are float32, and the untrained SAM weights amplify its rounding: through
the mask branch they are up to 2e-4 (masks) and 5e-3 (gradients) from exact arithmetic, which sets those tolerances.
A gradient that comes from the text alone (the region adapter's) is held to 1e-4.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import load
from model.checkpoint.names import published_to_native
from model.modeling.configuration import IGNORE_INDEX, LossConfig
from model.modeling.medplib import MedPLIBForCausalLM, MedPLIBOutput

WEIGHTS = LossConfig(ce=1.0, dice=0.5, bce=2.0, iou=1.25, focal=0.75)  # of the reference run
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
CASES = [
    *(f"lisa__{batch}__train" for batch in ("vqa", "region", "ground", "mixed", "mixed2", "invalid_region")),
    *(f"moe_top1__{batch}__train" for batch in ("vqa", "region", "ground", "mixed", "mixed2", "invalid_region")),
    *(f"moe_top1__{batch}__eval" for batch in ("vqa", "region", "ground", "mixed", "mixed2", "invalid_region")),
    *(f"moe_top1_aux__{batch}__{mode}" for batch in ("mixed", "vqa") for mode in ("train", "eval")),
    *(f"moe_top1_nodrop__{batch}__train" for batch in ("ground", "mixed")),
    *(f"moe_top1_drop__vqa__{mode}" for mode in ("train", "eval")),
    *(f"moe_top2__{batch}__train" for batch in ("mixed", "vqa")),
    "moe_top2_drop__mixed__train",
]


@pytest.fixture(scope="module")
def build(golden: Path, published_directories: dict[str, Path]) -> Any:
    """Loads a model once per set of router settings."""
    made: dict[str, MedPLIBForCausalLM] = {}

    def of(case: dict[str, Any]) -> MedPLIBForCausalLM:
        name = case["model"]
        if name not in made:
            model, _ = load(
                published_directories[name.split("_")[0]], vision_tower=golden / "models" / "clip-vit-tiny-patch14-336"
            )
            model.config.loss = WEIGHTS
            if model.config.moe.enabled:
                set_router(model, case)
            made[name] = model.double()
        model = made[name].train(case["mode"] == "train")
        model.zero_grad()
        return model

    return of


def set_router(model: MedPLIBForCausalLM, case: dict[str, Any]) -> None:
    """Give every mixture the case's router, padding routed as in the published code."""
    model.config.moe = replace(model.config.moe, router_aux_loss_coef=case["router_aux_loss_coef"])
    model.model.decoder.route_padding = True
    for layer in model.model.decoder.layers:
        layer.mlp.top_k = case["top_k"]
        layer.mlp.capacity_factor = case["capacity_factor"]
        layer.mlp.eval_capacity_factor = case["eval_capacity_factor"]
        layer.mlp.drop_in_evaluation = True


def replay_drops(model: MedPLIBForCausalLM, arrays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the recorded tokens through where the published router dropped at random."""
    for index, layer in enumerate(model.model.decoder.layers):
        if f"moe_kept_L{index}" in arrays.files:
            kept = torch.from_numpy(arrays[f"moe_kept_L{index}"])
            monkeypatch.setattr(layer.mlp, "forward", partial(layer.mlp.forward, kept=kept))


def inputs(case: dict[str, Any], arrays: Any, golden: Path) -> dict[str, Any]:
    """The reference batch as our forward takes it."""
    images = np.load(golden / "3_forward" / "image_tensors.npz")
    stems = [Path(path).stem for path in case["image_paths"]]
    regions = [drop_placeholder(arrays[name]) for name in sorted(arrays.files) if name.startswith("region_mask_")]
    with_region = [row for row, valid in enumerate(case["valid_region_masks_bool"]) if any(valid)]
    counts = [len(valid) for valid in case["valid_mask_bool"]] or [0] * len(stems)
    per_mask = iter(zip(case["resize_list"], case["label_shapes"], strict=True))
    sizes = [[next(per_mask) for _ in range(count)] for count in counts]
    batch = {
        "input_ids": torch.from_numpy(arrays["input_ids"]),
        "labels": torch.from_numpy(arrays["labels"]),
        "attention_mask": torch.from_numpy(arrays["attention_mask"]),
        "pixel_values": torch.stack([torch.from_numpy(images[f"{stem}/clip"]) for stem in stems]),
        "sam_pixel_values": torch.stack([torch.from_numpy(images[f"{stem}/sam"]) for stem in stems]),
        "region_masks": torch.from_numpy(np.concatenate(regions)) if regions else None,
        "region_image": torch.tensor(with_region) if regions else None,
        "sam_sizes": [tuple(row[0][0]) if row else (0, 0) for row in sizes],
        "image_sizes": [tuple(row[0][1]) if row else (0, 0) for row in sizes],
        "mask_targets": [
            [torch.from_numpy(images[f"{name}/gt_mask_{i}"]) for i in range(count)]
            for name, count in zip(case["rows"], counts, strict=True)
        ],
    }
    return {name: value.double() if is_float(value) else value for name, value in batch.items()}


def is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def close(found: torch.Tensor, wanted: Any, **tolerance: float) -> None:
    wanted = wanted if torch.is_tensor(wanted) else torch.as_tensor(wanted)
    torch.testing.assert_close(found.detach().float(), wanted.float(), **(tolerance or TOLERANCE))


def drop_placeholder(region: np.ndarray) -> np.ndarray:
    """The published code puts a 336×336 random region where the real one is empty; ours stays empty."""
    return region if region.shape[1] == 24 else np.zeros((1, 24, 24), dtype=np.float32)


def check_logits(output: MedPLIBOutput, arrays: Any, rows: list[int]) -> None:
    recorded = {name: torch.from_numpy(arrays[name])[rows] for name in arrays.files if "positions" in name}
    every = torch.tensor(rows)[:, None]
    logits = output.logits[every, recorded["logit_positions"]]
    close(logits[..., ::8], recorded["logits_at_positions_vocab_stride8"])
    close(logits.logsumexp(-1), recorded["logits_at_positions_logsumexp"])
    assert (logits.argmax(-1) == recorded["logits_at_positions_argmax"]).all()
    close(output.last_hidden_state[every, recorded["hidden_positions"]], recorded["final_hidden_at_positions"])


def check_losses(output: MedPLIBOutput, losses: dict[str, float]) -> None:
    parts = output.losses
    close(parts["ce"] + parts["router_aux"], losses["ce_loss"])
    for part in ("bce", "dice", "focal", "iou"):
        close(parts[part], losses[f"unscale_mask_{part}_loss"])
    close(output.loss, losses["loss"])


def check_masks(output: MedPLIBOutput, arrays: Any) -> None:
    count = sum(name.startswith("pred_mask_") for name in arrays.files)
    assert len(output.mask_logits) == count
    for index in range(count):
        check_mask(output.low_res_masks[index, 0, ::4, ::4], arrays[f"low_res_{index}_stride4"][0, 0])
        check_mask(output.mask_logits[index], arrays[f"pred_mask_{index}"][0, 0])
        close(output.iou_predictions[index], arrays[f"iou_pred_{index}"][0], rtol=1e-4, atol=5e-5)


def check_mask(found: torch.Tensor, wanted: np.ndarray) -> None:
    close(found, wanted, rtol=0, atol=5e-4 * float(np.abs(wanted).max()))


def check_gradients(model: MedPLIBForCausalLM, case: dict[str, Any], arrays: Any) -> None:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in (n for n in arrays.files if n.startswith("grad/")):
        wanted = torch.from_numpy(arrays[name])
        found = gradients[published_to_native(name.removeprefix("grad/"))].float()
        tolerance = 1e-4 if "region" in name else 6e-3
        assert (found - wanted).norm() <= tolerance * wanted.norm(), name
    for name, norm in case["grad_norms"].items():
        assert gradients[published_to_native(name)].norm().item() == pytest.approx(norm, rel=6e-3, abs=1e-5), name


@pytest.mark.parametrize("name", CASES)
def test_forward_matches_the_published_network(
    name: str, golden: Path, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = golden / "3_forward"
    case, arrays = json.loads((folder / f"{name}.json").read_text()), np.load(folder / f"{name}.npz")
    case.setdefault("mode", name.rsplit("__", 1)[1])
    case.setdefault("model", name.split("__")[0])
    model = build(case)
    if case["model"] != "lisa":
        replay_drops(model, arrays, monkeypatch)
    batch = inputs(case, arrays, golden)
    output = model(**batch, return_logits=True)
    invalid = "invalid_region" in name  # row 0 has no region to look at: only row 1 can agree
    check_logits(output, arrays, rows=[1] if invalid else list(range(len(batch["input_ids"]))))
    check_losses(output, case["losses"])
    check_masks(output, arrays)
    if "moe" in case and not invalid:
        counts = [stats.expert_counts.tolist() for stats in output.router_stats]
        assert counts == [layer["exp_counts"] for layer in case["moe"]]
    if any(key.startswith("grad/") for key in arrays.files):
        output.loss.backward()
        check_gradients(model, case, arrays)


def test_a_batch_without_supervision_has_a_finite_loss(golden: Path, build: Any) -> None:
    """The published code gives NaN here."""
    folder = golden / "3_forward"
    case = json.loads((folder / "lisa__vqa__train.json").read_text()) | {"mode": "train", "model": "lisa"}
    batch = inputs(case, np.load(folder / "lisa__vqa__train.npz"), golden)
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    output = build(case)(**batch)
    output.loss.backward()
    assert output.loss.item() == 0
