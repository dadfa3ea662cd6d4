"""Quantised weights: small, close to the original, the same by every kernel, and portable between devices and types."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from model import MedPLIBError, Predictor
from model.inference import quantise as quantisation
from model.inference import quantised_kernels
from model.inference.loading import load_for_inference
from model.inference.quantise import (
    Int4Linear,
    Int8Linear,
    QuantisedLinear,
    quantisation_of,
    quantise,
    weight_bytes,
)
from model.inference.quantised_kernels import Int4Layout, join_nibbles, split_nibbles
from model.modeling.medplib import MedPLIBForCausalLM
from model.modeling.moe import Router
from tests.bench_scripts import bench_script
from tests.tiny import tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "assets" / "medplib-nano"
PICTURE = ROOT / "data" / "sample" / "images" / "ct_00--Phantom--seed505case000000--0000.png"
SHAPES = [(64, 64), (192, 128), (128, 192), (20, 64), (7, 96)]  # the last two are no kernel's business


def weight_of(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def rows_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def layer_of(scheme: str, outputs: int, inputs: int, bias: bool = False) -> QuantisedLinear:
    weight = weight_of(outputs, inputs)
    added = nn.Parameter(torch.arange(outputs) / outputs, requires_grad=False) if bias else None
    return Int8Linear(weight, added) if scheme == "int8" else Int4Linear(weight, added, group_size=32)


def even_model(**options: object) -> MedPLIBForCausalLM:
    """A tiny model whose sizes divide into groups of 64, so that the kernels take part."""
    config = tiny_config(**options)  # type: ignore[arg-type]
    config.text_config.hidden_size, config.text_config.intermediate_size, config.text_config.head_dim = 64, 128, 32
    torch.manual_seed(0)
    model = MedPLIBForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


# --- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_int8_weights_are_within_half_a_step(outputs: int, inputs: int) -> None:
    weight = weight_of(outputs, inputs)
    layer = Int8Linear(weight)
    steps = layer.scale.float()[:, None]
    assert (layer.dequantise() - weight).abs().max() <= 0.51 * steps.max()
    assert ((layer.dequantise() - weight).abs() <= 0.8 * steps).all()  # the largest may lie just beyond the last code
    assert_close(steps[:, 0] * 127, weight.abs().amax(dim=1), rtol=2**-8, atol=0)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_weights_are_within_half_a_step_of_their_group(group_size: int) -> None:
    weight = weight_of(64, 256) + 0.01
    layer = Int4Linear(weight, group_size=group_size)
    step = layer.scale[..., 0].t().float().repeat_interleave(group_size, dim=1)  # [N, K]
    assert ((layer.dequantise() - weight).abs() <= 0.56 * step).all()
    finer = Int4Linear(weight, group_size=32)
    assert (finer.dequantise() - weight).norm() <= (layer.dequantise() - weight).norm()


def test_weights_that_are_all_the_same_survive() -> None:
    for value in (0.0, 0.5, -1e-30):
        weight = torch.full((64, 64), value)
        for layer in (Int8Linear(weight), Int4Linear(weight, group_size=64)):
            assert_close(layer.dequantise(), weight, rtol=2**-8, atol=1e-9)


def test_weights_far_from_zero_lose_no_more_than_bfloat16_would() -> None:
    weight = 3.0 + weight_of(64, 64) * 0.01
    error = (Int4Linear(weight, group_size=32).dequantise() - weight).abs().max()
    assert error <= 3.2 * 2**-8


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("count", [1, 5, 70])
def test_every_way_of_multiplying_gives_the_same_numbers(scheme: str, outputs: int, inputs: int, count: int) -> None:
    layer = layer_of(scheme, outputs, inputs)
    rows = rows_of(count, inputs)
    exact = functional.linear(rows.bfloat16().float(), layer.dequantise())
    size = float(exact.abs().max())
    assert_close(layer(rows), exact, rtol=2**-7, atol=2**-7 * size)
    assert_close(layer.multiply_plainly(rows.bfloat16()).float(), exact, rtol=2**-7, atol=2**-7 * size)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_have_the_shape_and_type_of_the_inputs(scheme: str, dtype: torch.dtype) -> None:
    layer = layer_of(scheme, 64, 64, bias=True).to(dtype)
    rows = rows_of(2, 3, 64)
    found = layer(rows.to(dtype))
    assert found.shape == (2, 3, 64)
    assert found.dtype == dtype
    assert layer.bias is not None
    expected = functional.linear(rows, layer.dequantise(), layer.bias.float())
    assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    assert layer(torch.zeros(0, 64, dtype=dtype)).shape == (0, 64)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_row_does_not_depend_on_its_company(scheme: str) -> None:
    layer = layer_of(scheme, 128, 192)
    if layer.kernel_name == "dequantised":
        pytest.skip("this processor has no kernel, and dense products sum in an order of their own")
    rows = rows_of(8, 192)
    together = layer(rows)
    assert all(torch.equal(layer(rows[place : place + 1])[0], together[place]) for place in range(8))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_other_types_and_back_change_nothing(scheme: str) -> None:
    layer = layer_of(scheme, 64, 128)
    rows = rows_of(3, 128)
    before = layer(rows)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        layer.to(dtype)
        assert layer.scale.dtype == torch.bfloat16
    assert torch.equal(layer(rows), before)
    assert torch.equal(copy.deepcopy(layer)(rows), before)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_state_dict_fits_whatever_kernel_is_there(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rows = layer_of(scheme, 128, 64), rows_of(3, 64)
    state = layer.state_dict()
    monkeypatch.setattr(quantisation, "choose_layout", lambda *_: None)
    monkeypatch.setattr(quantisation, "choose_int8_kernel", lambda *_: None)
    plain = layer_of(scheme, 128, 64)
    assert plain.kernel_name == "dequantised"
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    empty = Int8Linear(torch.zeros(128, 64)) if scheme == "int8" else Int4Linear(torch.zeros(128, 64), group_size=32)
    empty.load_state_dict(state)
    assert_close(empty(rows), layer(rows), rtol=2**-6, atol=2**-7)
    monkeypatch.undo()
    empty.to("cpu")
    assert torch.equal(empty(rows), layer(rows))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_layer_compiles_as_one_graph(scheme: str) -> None:
    layer, rows = layer_of(scheme, 64, 64), rows_of(4, 64)
    with torch.inference_mode():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(rows), layer(rows))


# --- packing of 4-bit codes -----------------------------------------------------------------------------------------


def test_two_codes_share_a_byte() -> None:
    codes = torch.randint(0, 16, (5, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pairs = join_nibbles(codes)
    assert pairs.shape == (5, 6)
    assert pairs[0, 0] == codes[0, 0] * 16 + codes[0, 1]
    assert torch.equal(split_nibbles(pairs), codes)


def as_tensor_cores_read(layout: Int4Layout, codes: Tensor) -> Tensor:
    """The order of CUDA's packing: 32 lanes with eight codes each, of two halves of a tile of 8 outputs × 16 inputs."""
    outputs, inputs = codes.shape
    tiles = codes.view(outputs // 8, 8, inputs // (16 * layout.tiles), layout.tiles // 2, 2, 16)
    lanes = torch.arange(32)
    first = (lanes % 4) * 2
    columns = torch.stack([first, first + 1, first + 8, first + 9], dim=-1)  # [32, 4] inputs of a lane within a tile
    mine = tiles[:, lanes // 4][..., None, :].expand(*tiles[:, lanes // 4].shape[:-1], 4, 16)
    picked = mine.gather(-1, columns.view(1, 32, 1, 1, 1, 4, 1).expand(*mine.shape[:-1], 1))[..., 0]
    eight = picked.flatten(-2)  # [N / 8, 32, super tiles, tiles / 2, 8]
    order = eight[..., [0, 2, 4, 6, 1, 3, 5, 7]].permute(0, 2, 1, 3, 4)
    return (order.to(torch.int64) << (4 * torch.arange(8))).sum(dim=-1).to(torch.int32)


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_any_packing_can_be_undone(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Int4Layout, "pack", as_tensor_cores_read)
    layout = Int4Layout("cuda", block=8, tiles=tiles, most_rows=64)
    codes = torch.randint(0, 16, (24, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = layout.pack(codes)
    assert packed.shape == (3, 256 // (16 * tiles), 32, tiles // 2)
    assert packed.nbytes * 2 == codes.nbytes
    quantised_kernels._places.cache_clear()
    assert torch.equal(layout.unpack(packed, 24, 256), codes)
    quantised_kernels._places.cache_clear()


def test_a_packing_that_loses_codes_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Int4Layout.pack
    monkeypatch.setattr(Int4Layout, "pack", lambda layout, codes: honest(layout, codes) & 0x7F)
    quantised_kernels._places.cache_clear()
    quantised_kernels._int4_works.cache_clear()
    layer = layer_of("int4", 64, 64)
    assert layer.kernel_name == "dequantised"
    monkeypatch.undo()
    quantised_kernels._places.cache_clear()
    quantised_kernels._int4_works.cache_clear()


# --- a whole network ------------------------------------------------------------------------------------------------


def linear_bytes(model: MedPLIBForCausalLM) -> int:
    layers = model.model.decoder.layers
    return sum(linear.weight.nbytes for linear in layers.modules() if type(linear) is nn.Linear)


@pytest.mark.parametrize(
    ("scheme", "group_size", "bits"), [("int8", None, 8.3), ("int4", 32, 5.0), ("int4", 64, 4.5), ("int4", None, 4.5)]
)
def test_memory_falls_to_the_bits_promised(scheme: str, group_size: int | None, bits: float) -> None:
    model = even_model()
    before, linear = weight_bytes(model), linear_bytes(model)
    assert quantise(model, scheme, group_size=group_size) is model  # type: ignore[arg-type]
    assert quantisation_of(model) == scheme
    saved = before - weight_bytes(model)
    assert saved >= linear * (1 - bits / 32)
    assert linear_bytes(model) == 0


def test_what_decides_or_paints_is_left_alone() -> None:
    model = even_model()
    kept = {name: value.clone() for name, value in model.named_parameters() if "decoder.layers" not in name}
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    quantise(model, "int4")
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in kept.items())
    assert {name for name, module in model.named_modules() if isinstance(module, Router)} == set(routers)
    assert not any(isinstance(module, QuantisedLinear) for module in model.model.projector.modules())
    assert type(model.lm_head) is nn.Linear


def test_the_projector_is_quantised_where_asked() -> None:
    model = even_model(projector={"type": "moe_mlp2x_gelu", "num_experts": 2})
    quantise(model, "int8", include_projector=True)
    found = [module for module in model.model.projector.modules() if isinstance(module, QuantisedLinear)]
    assert len(found) == 4
    assert all(layer.bias is not None for layer in found)
    features = rows_of(1, 16, 16)
    with torch.inference_mode():
        assert model.model.projector(features).features.shape == (1, 16, 64)


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize(("scheme", "closeness"), [("int8", 0.03), ("int4", 0.5)])
@torch.inference_mode()
def test_states_stay_close_to_the_original(experts: int, scheme: str, closeness: float) -> None:
    model = even_model(experts=experts)
    embeds = rows_of(2, 12, 64)
    before = model.model.decoder(embeds).last_hidden_state
    after = quantise(model, scheme).model.decoder(embeds).last_hidden_state  # type: ignore[arg-type]
    error = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert error.median() < closeness  # a token at a router's tie may go elsewhere
    half = model.to(torch.bfloat16).model.decoder(embeds.bfloat16()).last_hidden_state
    assert half.dtype == torch.bfloat16
    assert ((half.float() - after).norm(dim=-1) / after.norm(dim=-1)).median() < 0.05


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@torch.inference_mode()
def test_a_network_without_kernels_gives_the_same_states(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embeds = rows_of(1, 6, 64)
    found = quantise(even_model(experts=0), scheme).model.decoder(embeds).last_hidden_state  # type: ignore[arg-type]
    monkeypatch.setattr(quantisation, "choose_layout", lambda *_: None)
    monkeypatch.setattr(quantisation, "choose_int8_kernel", lambda *_: None)
    plain = quantise(even_model(experts=0), scheme).model.decoder(embeds).last_hidden_state  # type: ignore[arg-type]
    assert ((found - plain).norm() / plain.norm()) < 0.02


def test_a_network_s_state_dict_comes_back() -> None:
    one, other = quantise(even_model(), "int4"), quantise(even_model(), "int4")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        for name, buffer in other.named_buffers():
            if name.endswith("codes"):
                buffer.zero_()
    other.load_state_dict(one.state_dict())
    embeds = rows_of(1, 5, 64)
    with torch.inference_mode():
        expected = one.model.decoder(embeds).last_hidden_state
        assert torch.equal(other.model.decoder(embeds).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("scheme", "options", "says"),
    [
        ("int3", {}, "unknown quantisation 'int3'; known: int8, int4"),
        ("int8", {"group_size": 64}, "one scale per output"),
        ("int4", {"group_size": 48}, "32, 64, 128"),
        ("int4", {"group_size": 128}, "groups of 128; try group_size 32 or 64"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_the_network_alone(scheme: str, options: dict, says: str) -> None:
    model = even_model()
    before = weight_bytes(model)
    with pytest.raises(MedPLIBError, match=says):
        quantise(model, scheme, **options)  # type: ignore[arg-type]
    assert quantisation_of(model) is None
    assert weight_bytes(model) == before


def test_networks_that_are_not_ready_are_refused() -> None:
    model = tiny_model()  # its feed-forward networks are 48 wide
    with pytest.raises(MedPLIBError, match="48 inputs, which do not divide into groups of 32; try int8"):
        quantise(model, "int4", group_size=32)
    quantise(model, "int8")
    with pytest.raises(MedPLIBError, match=r"quantised already \(int8\)"):
        quantise(model, "int4")
    with torch.device("meta"):
        hollow = MedPLIBForCausalLM(tiny_config())
    with pytest.raises(MedPLIBError, match="holds no values"):
        quantise(hollow, "int8")
    damaged = even_model()
    with torch.no_grad():
        damaged.model.decoder.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(MedPLIBError, match=r"layers\.1\.self_attn\.q_proj holds weights that are not finite"):
        quantise(damaged, "int8")
    assert quantisation_of(damaged) is None


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_nano_answers_as_before(scheme: str) -> None:
    plain, small = (Predictor.from_pretrained(NANO, quantisation=one) for one in (None, scheme))
    assert weight_bytes(small.model) < 0.7 * weight_bytes(plain.model)
    image = small.set_image(PICTURE)
    for question in ("What modality is used to take this image?", "Mark the vertebra, please."):
        expected, found = plain.ask(str(PICTURE), question), small.ask(image, question)
        assert found.text == expected.text
        for mask, reference in zip(found.masks, expected.masks, strict=True):
            both = (mask.to_array() & reference.to_array()).sum()
            assert 2 * both / (mask.area_px + reference.area_px) > 0.98


def test_the_bench_tells_quality_beside_fp32() -> None:
    with bench_script("quantise") as bench:
        samples = bench.read_samples(ROOT / "data" / "sample", 6)
        kinds = [bench.Kind("fp32", torch.float32, None), bench.Kind("int4", torch.float32, "int4")]
        with torch.inference_mode():
            for kind in kinds:
                model, processor, _ = load_for_inference(NANO, dtype=kind.dtype)
                bench.shrink(model, kind, 64)
                bench.measure_size(kind, model)
                bench.measure_likelihood(kind, kinds[0], model, processor, samples)
                bench.measure_answers(kind, kinds[0], model, processor, samples[-3:])
    assert {sample.task for sample in samples} == {"vqa", "region", "grounding"}
    plain, small = (kind.row for kind in kinds)
    assert small["decoder's layers MB"] < 0.16 * plain["decoder's layers MB"]
    assert plain["most likely token as in fp32"] == "100.00%"
    losses = [float(row["cross-entropy of the references"]) for row in (plain, small)]
    assert losses[0] != losses[1]
    assert max(losses) < 0.5  # the reference answers are what the nano says, not what it cannot know


# --- GPUs -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the CUDA kernels cannot run")
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@torch.inference_mode()
def test_a_gpu_computes_and_gives_back_the_same_weights(scheme: str) -> None:
    for outputs, inputs, count in ((64, 64, 1), (4096, 4096, 1), (512, 11008, 7), (192, 512, 64), (192, 512, 300)):
        layer = layer_of(scheme, outputs, inputs)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        rows = rows_of(count, inputs)
        weights = layer.dequantise()
        expected = functional.linear(rows.bfloat16().float(), weights)
        layer.cuda()
        assert layer.kernel_name != "dequantised"
        size = float(expected.abs().max())
        assert_close(layer(rows.cuda()).cpu(), expected, rtol=2e-2, atol=2e-2 * size)
        assert_close(
            layer.multiply_plainly(rows.cuda().bfloat16()).float().cpu(), expected, rtol=2e-2, atol=2e-2 * size
        )
        assert all(torch.equal(value.cpu(), state[name]) for name, value in layer.state_dict().items())
        assert torch.equal(layer.cpu().dequantise(), weights)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="no GPU; TRITON_INTERPRET=1 runs the kernel without one, where Triton is installed",
)
@pytest.mark.parametrize(("count", "outputs", "inputs"), [(1, 64, 64), (3, 40, 48), (17, 70, 528), (100, 33, 272)])
def test_the_triton_kernel_multiplies_bytes(count: int, outputs: int, inputs: int) -> None:
    pytest.importorskip("triton")
    from model.inference.decode_kernels import multiply_int8

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16 tiles
    layer = Int8Linear(weight_of(outputs, inputs))
    rows = rows_of(count, inputs).to(device, dtype)
    found = multiply_int8(rows, layer.codes.to(device), layer.scale.to(device))
    expected = functional.linear(rows.float().cpu(), layer.dequantise())
    assert found.dtype == dtype
    assert_close(found.float().cpu(), expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))
