"""Encoder, text prompt, decoder and legacy read-out reproduce the published arrays."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint.names import sam_config_from_state_dict, state_to_native
from model.modeling.configuration import IMAGE_PLACEHOLDER, MaskConfig
from model.modeling.mask_head import MaskHead, restore_masks
from model.modeling.sam_med2d import SamMed2D

SAM_PREFIX, HEAD_PREFIX = "model.visual_model.", "model.text_hidden_fcs.0."
GENERATED = [
    *(f"llava_v1/{name}" for name in ("train0", "train2", "train3", "train4", "new_vqa", "new_ground", "multi_turn")),
    *(f"v1/{name}" for name in ("train0", "train2")),
]
FORWARD = [
    *(f"lisa__{batch}__train" for batch in ("ground", "mixed", "mixed2")),
    *(f"moe_top1__{batch}__eval" for batch in ("ground", "mixed", "mixed2")),
    *(f"moe_top1_nodrop__{batch}__train" for batch in ("ground", "mixed")),
    "moe_top2__mixed__train",
]

Tensors = dict[str, torch.Tensor]


def under(state: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value.float() for key, value in state.items() if key.startswith(prefix)}


def build_sam(state: Tensors) -> SamMed2D:
    sam = SamMed2D(*sam_config_from_state_dict(state))
    sam.load_state_dict(state_to_native(state))
    return sam.eval()


def build_branch(*files: Path) -> tuple[SamMed2D, MaskHead]:
    weights = {key: value for file in files for key, value in load_file(file).items()}  # later files win
    query = under(weights, HEAD_PREFIX)
    head = MaskHead(query["0.weight"].shape[1], query["2.weight"].shape[0])
    head.query.load_state_dict(query)
    return build_sam(under(weights, SAM_PREFIX)), head.eval()


def assert_near(found: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Equal up to ``tolerance`` of the largest reference value: logits near zero carry the rounding of their sums."""
    reference = torch.from_numpy(expected).reshape(found.shape).to(found.dtype)
    torch.testing.assert_close(found, reference, rtol=tolerance, atol=tolerance * float(reference.abs().max()))


@pytest.fixture(scope="module")
def generated_branch(golden: Path) -> tuple[SamMed2D, MaskHead]:
    return build_branch(golden / "4_generate" / "hf_checkpoint" / "model_bf16exact.safetensors")


@pytest.fixture(scope="module")
def forward_branches(golden: Path) -> dict[str, tuple[SamMed2D, MaskHead]]:
    dense, delta = (golden / "models" / f"{name}.safetensors" for name in ("lisa_stage2", "moe_delta_over_lisa_stage2"))
    return {"lisa": build_branch(dense), "moe": build_branch(dense, delta)}


@torch.no_grad()
@pytest.mark.parametrize("case", GENERATED)
def test_masks_of_generated_answers(golden: Path, generated_branch: tuple[SamMed2D, MaskHead], case: str) -> None:
    sam, head = generated_branch
    arrays = np.load(golden / "4_generate" / "generate.npz")
    facts = json.loads((golden / "4_generate" / "generate.json").read_text())["cases"][case]
    inputs = np.load(golden / "1_preprocess" / "images.npz")
    stem = Path(facts["image"]).stem
    pixels = torch.from_numpy(inputs[f"{stem}/sam"])[None]
    hidden = torch.from_numpy(arrays[f"{case}/seg_hidden"]).flatten(0, -2)
    low_res, iou = sam.decode(sam.encode_image(pixels), head(hidden), torch.tensor([0]))
    assert_near(low_res[..., ::4, ::4], arrays[f"{case}/low_res_stride4"])
    assert_near(iou, arrays[f"{case}/iou_pred"])
    expected = arrays[f"{case}/pred_mask"]
    resized = inputs[f"{stem}/sam_resized_uint8"].shape[:2]
    (mask,) = restore_masks(low_res, [resized], [expected.shape[-2:]], pixels.shape[-1], "legacy")
    assert_near(mask, expected)


def test_the_generated_cases_are_all_of_them(golden: Path) -> None:
    arrays = np.load(golden / "4_generate" / "generate.npz")
    found = {key.removesuffix("/low_res_stride4") for key in arrays if key.endswith("/low_res_stride4")}
    assert found == set(GENERATED)


def seg_states(arrays: dict[str, np.ndarray], seg_token: int, patches: int) -> tuple[torch.Tensor, list[int]]:
    """Final hidden states at the positions that predict ``<SEG>``, with the batch row of each."""
    states, rows = [], []
    for row, ids in enumerate(arrays["input_ids"]):
        for place in np.flatnonzero(ids == seg_token):
            images = int((ids[:place] == IMAGE_PLACEHOLDER).sum())
            position = place - 1 + images * (patches - 1)  # each image placeholder became its patches
            column = int(np.flatnonzero(arrays["hidden_positions"][row] == position)[0])
            states.append(torch.from_numpy(arrays["final_hidden_at_positions"][row, column]))
            rows.append(row)
    return torch.stack(states), rows


@torch.no_grad()
@pytest.mark.parametrize("case", FORWARD)
def test_masks_of_a_training_batch(
    golden: Path, forward_branches: dict[str, tuple[SamMed2D, MaskHead]], case: str
) -> None:
    """Looser: these random weights amplify rounding, so that even in double precision 3e-4 remains of the logits.

    Scores differ as much between processors. A wrong normalisation epsilon, the smallest mistake there is,
    shows as 1e-3 to 1e-2.
    """
    sam, head = forward_branches[case.split("_")[0]]
    folder = golden / "3_forward"
    arrays, facts = dict(np.load(folder / f"{case}.npz")), json.loads((folder / f"{case}.json").read_text())
    inputs = np.load(folder / "image_tensors.npz")
    seg_token = json.loads((golden / "4_generate" / "generate.json").read_text())["seg_token_idx"]
    hidden, rows = seg_states(arrays, seg_token, patches=24 * 24)
    pixels = torch.stack([torch.from_numpy(inputs[f"{Path(path).stem}/sam"]) for path in facts["image_paths"]])
    low_res, iou = sam.decode(sam.encode_image(pixels), head(hidden), torch.tensor(rows))
    sizes = [tuple(size) for size in facts["resize_list"]]
    masks = restore_masks(low_res, sizes, [tuple(size) for size in facts["label_shapes"]], 256, "legacy")
    for index, mask in enumerate(masks):
        assert_near(low_res[index : index + 1, :, ::4, ::4], arrays[f"low_res_{index}_stride4"], 5e-4)
        assert_near(iou[index : index + 1], arrays[f"iou_pred_{index}"], 5e-4)
        assert_near(mask, arrays[f"pred_mask_{index}"], 5e-4)


def test_a_published_file_loads_whole(golden: Path) -> None:
    weights = torch.load(golden / "start" / "sam-med2d_tiny.pth", weights_only=True)["model"]
    sam = build_sam(weights)
    assert all(torch.equal(sam.state_dict()[key], value) for key, value in state_to_native(weights).items())
    assert sam.encode_image(torch.zeros(1, 3, 256, 256)).isfinite().all()


def import_segment_anything() -> ModuleType:
    """Meta's package imports torchvision, of which there is no CPU build that works beside a CPU torch."""
    try:
        import segment_anything.modeling as package
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"segment-anything cannot be imported here ({error}); it needs torchvision, which has no CPU build")
    return package


@torch.no_grad()
def test_agrees_with_the_segment_anything_package() -> None:
    package = import_segment_anything()
    torch.manual_seed(0)
    width, grid, side = 32, 8, 128
    original = package.Sam(
        image_encoder=package.ImageEncoderViT(
            img_size=side,
            embed_dim=24,
            depth=3,
            num_heads=2,
            out_chans=width,
            norm_layer=lambda size: torch.nn.LayerNorm(size, eps=1e-6),
            use_rel_pos=True,
            window_size=5,
            global_attn_indexes=(1,),
        ),
        prompt_encoder=package.PromptEncoder(width, (grid, grid), (side, side), mask_in_chans=16),
        mask_decoder=package.MaskDecoder(
            transformer_dim=width,
            transformer=package.TwoWayTransformer(depth=2, embedding_dim=width, num_heads=8, mlp_dim=64),
            iou_head_hidden_dim=width,
        ),
    ).eval()
    for parameter in original.parameters():  # position tables start at zero, which would hide mistakes
        parameter.normal_(std=0.2)
    _, mask = sam_config_from_state_dict(original.state_dict())
    assert mask == MaskConfig(adapter=False)
    sam = build_sam(original.state_dict())

    pixels = torch.randn(2, 3, side, side)
    embeddings = original.image_encoder(pixels)
    torch.testing.assert_close(sam.encode_image(pixels), embeddings, rtol=1e-4, atol=1e-4)
    boxes = torch.tensor([[10.0, 20, 90, 70], [5, 5, 60, 120]])
    points, labels = torch.tensor([[[30.0, 40]], [[70, 9]]]), torch.tensor([[1], [0]])
    for prompts in ({"boxes": boxes}, {"points": points, "point_labels": labels}):
        low_res, iou = sam.decode(embeddings, None, torch.tensor([0, 1]), **prompts)
        for row in range(2):  # the package is wrong for more than one image at a time
            pair = (points[row : row + 1], labels[row : row + 1]) if "points" in prompts else None
            box = boxes[row : row + 1] if "boxes" in prompts else None
            sparse, dense = original.prompt_encoder(pair, box, None)
            expected, score = original.mask_decoder(
                embeddings[row : row + 1], original.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False
            )
            torch.testing.assert_close(low_res[row : row + 1], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(iou[row : row + 1], score, rtol=1e-4, atol=1e-4)
