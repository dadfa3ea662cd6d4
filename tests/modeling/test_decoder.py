"""The decoder: same as transformers' LLaMA where dense, stable under padding, caching and checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaModel
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from model.modeling.configuration import MoEConfig
from model.modeling.decoder import MedPLIBDecoder, RMSNorm
from model.modeling.moe import MoEFeedForward

TWO_MIXTURES = MoEConfig(layers=(0, 2), num_experts=(2, 2))


def config(**changes: Any) -> LlamaConfig:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return LlamaConfig(**{**sizes, "num_attention_heads": 2, "pad_token_id": 0, "initializer_range": 0.3, **changes})


def decoder(moe: MoEConfig | None = TWO_MIXTURES, **changes: Any) -> MedPLIBDecoder:
    torch.manual_seed(0)
    return MedPLIBDecoder(config(**changes), moe).eval()


def embeds(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(1))


def test_dense_decoder_equals_transformers_llama() -> None:
    ours = decoder(moe=None)
    theirs = LlamaModel(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    got = ours(embeds(), attention_mask=mask).last_hidden_state
    want = theirs(inputs_embeds=embeds(), attention_mask=mask).last_hidden_state
    assert_close(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.bfloat16().float(),
        lambda model: model.to(device="cpu", dtype=torch.float16),
        lambda model: nn.Sequential(model).to(torch.bfloat16)[0],
    ],
)
@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_rotary_frequencies_stay_float32(cast: Any, rope: str) -> None:
    parameters = {"rope_type": rope, "rope_theta": 1e4, **({"factor": 2.0} if rope == "dynamic" else {})}
    model, exact = (decoder(max_position_embeddings=64, rope_parameters=parameters) for _ in range(2))
    cast(model)
    positions = torch.arange(96)[None]
    for name, value in exact.rotary_emb.named_buffers():
        assert model.rotary_emb.get_buffer(name).dtype == torch.float32
        assert_close(model.rotary_emb.get_buffer(name), value, rtol=0, atol=0)
    like = torch.empty(0)
    assert_close(model.rotary_emb(like, positions)[0], exact.rotary_emb(like, positions)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mode", "mixtures"),
    [("first_half", [0, 1]), ("second_half", [2, 3]), ("sparse", [0, 2]), ("dense", [0, 1, 2, 3])],
)
def test_layer_modes_choose_the_mixtures(mode: Any, mixtures: list[int]) -> None:
    layers = MoEConfig.layers_for(mode, 4)
    model = decoder(MoEConfig(layers=layers, num_experts=(2,) * len(layers)), num_hidden_layers=4)
    assert [i for i, layer in enumerate(model.layers) if isinstance(layer.mlp, MoEFeedForward)] == mixtures


def test_expert_counts_may_differ_by_layer() -> None:
    model = decoder(MoEConfig(layers=(0, 2), num_experts=(2, 4), use_residual=True))
    assert [len(model.layers[index].mlp.experts) for index in (0, 2)] == [2, 4]
    assert "layers.2.mlp.experts.3.up_proj.weight" in model.state_dict()
    assert "layers.0.mlp.residual_expert.gate_proj.weight" in model.state_dict()
    assert len(model(embeds()).router_stats) == 2


def test_a_mixture_beyond_the_last_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="layers 0 to 2"):
        decoder(MoEConfig(layers=(3,), num_experts=(2,)))


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(left: bool) -> None:
    model = decoder()
    short = embeds(1, 4)
    padding = torch.randn(1, 3, 16)
    row = torch.cat([padding, short] if left else [short, padding], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 4 if left else [1] * 4 + [0] * 3, [1] * 7])
    batch = torch.cat([row, embeds(1, 7)])
    together = model(batch, attention_mask=mask)
    assert_close(together.last_hidden_state[0][mask[0].bool()], model(short).last_hidden_state[0])
    assert int(together.router_stats[0].expert_counts.sum()) == 11


def test_padding_is_routed_on_request() -> None:
    model = decoder()
    model.route_padding = True
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    assert int(model(embeds(), attention_mask=mask).router_stats[0].expert_counts.sum()) == 14


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("left_padding", [0, 2])
def test_decoding_with_a_cache_equals_one_pass(kind: str, left_padding: int) -> None:
    model = decoder()
    tokens = embeds()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :left_padding] = 0
    whole = model(tokens, attention_mask=mask).last_hidden_state
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=12)
    steps = []
    for start, end in [(0, 4), (4, 5), (5, 7)]:
        output = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        steps.append(output.last_hidden_state)
    got = torch.cat(steps, dim=1)
    assert_close(got[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_decoding_step_never_waits_for_the_host() -> None:
    """The meta device stands for an accelerator: it has no values, so asking for one is an error."""
    model = decoder().to("meta")
    cache = DynamicCache(config=model.config)
    for step in range(3):
        token, place = torch.empty(2, 1, 16, device="meta"), torch.full((2, 1), step, device="meta")
        output = model(token, position_ids=place, past_key_values=cache)
    assert output.last_hidden_state.shape == (2, 1, 16)
    assert cache.get_seq_length() == 3


def test_a_cache_is_made_on_request_only() -> None:
    model = decoder()
    assert model(embeds()).past_key_values is None
    assert model(embeds(), use_cache=True).past_key_values.get_seq_length() == 7


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    moe = MoEConfig(layers=(0, 2), num_experts=(2, 2), capacity_factor=0.8)  # drops at random: replay must repeat it

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = decoder(moe).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.layers[0].gradient_checkpointing
        torch.manual_seed(3)
        output = model(embeds().requires_grad_())
        assert sum(int(stats.dropped) for stats in output.router_stats) > 0
        (output.last_hidden_state.square().sum() + output.aux_loss).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_aux_loss_is_the_sum_over_layers_and_zero_when_dense() -> None:
    output = decoder()(embeds())
    assert 2 * 0.9 < float(output.aux_loss.detach()) <= 2 * 2
    assert float(decoder(moe=None)(embeds()).aux_loss) == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation: str) -> None:
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
    want = decoder()(embeds(), attention_mask=mask).last_hidden_state
    got = decoder(attn_implementation=implementation)(embeds(), attention_mask=mask).last_hidden_state
    assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-5)


def test_lora_reaches_every_expert_and_the_router_trains_whole() -> None:
    lora = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], modules_to_save=["router"])
    model = get_peft_model(decoder().train(), lora)
    output = model.base_model.model(embeds())
    (output.last_hidden_state.square().sum() + output.aux_loss).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {expert for expert in (0, 1) for name in trained if f"layers.2.mlp.experts.{expert}." in name} == {0, 1}
    assert sum("router" in name for name in trained) == 2
    assert all(model.get_parameter(name).grad is not None for name in trained)


@pytest.mark.parametrize("experts", [0, 2])
def test_states_that_nobody_reads_change_no_gradient(experts: int) -> None:
    moe = MoEConfig(layers=(1, 2), num_experts=(2, 2), drop_tokens=False) if experts else None
    mask, read = torch.tensor([[1] * 7, [1] * 4 + [0] * 3]), torch.zeros(2, 7, dtype=torch.bool)
    read[0, 3:6] = read[1, 2] = True

    def gradients(needed: torch.Tensor | None, training: bool) -> dict[str, torch.Tensor]:
        model = decoder(moe).train(training)
        output = model(embeds(), attention_mask=mask, needed=needed)
        (output.last_hidden_state[read].square().sum() + output.aux_loss).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    whole, some = gradients(None, False), gradients(read, True)
    assert whole.keys() == some.keys()
    for name, gradient in whole.items():
        assert_close(some[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_norm_has_the_gradients_of_llamas() -> None:
    torch.manual_seed(0)
    states, way = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    found = []
    for kind in (RMSNorm, LlamaRMSNorm):
        norm, hidden = kind(16, eps=1e-5), states.clone().requires_grad_()
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, 16))
        (norm(hidden) * way).sum().backward()
        found.append((norm(hidden), hidden.grad, norm.weight.grad))
    assert_close(*found)
