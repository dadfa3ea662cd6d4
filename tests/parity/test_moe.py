"""Our mixture against DeepSpeed's MoE layer, case by case: outputs, losses, who was kept, gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from model.modeling.moe import MoEFeedForward

WIDTH, HIDDEN = 16, 24
GROUPS = [(experts, top_k, train) for experts in (2, 4) for top_k in (1, 2) for train in (True, False)]


def llama_experts(number: int) -> list[nn.Module]:
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=HIDDEN, num_attention_heads=1)
    return [LlamaMLP(config) for _ in range(number)]


class Reference:
    """The recorded cases and the weights they share."""

    def __init__(self, folder: Path) -> None:
        self.cases: dict[str, dict[str, Any]] = json.loads((folder / "meta.json").read_text())
        with np.load(folder / "moe.npz") as arrays:
            self.arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    def mixture(self, case: dict[str, Any]) -> MoEFeedForward:
        mixture = MoEFeedForward(
            llama_experts(case["E"]),
            WIDTH,
            top_k=case["k"],
            capacity_factor=case["capacity_factor"],
            eval_capacity_factor=case["eval_capacity_factor"],
            drop_in_evaluation=True,
            min_capacity=case["min_capacity"],
            random_token_priority=bool(case["use_rts"]),
        )
        prefix = f"weights_E{case['E']}/"
        weights = {name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)}
        state = {"router.weight": weights.pop("wg")}
        for name, array in weights.items():  # e0.gate_proj
            expert, projection = name[1:].split(".")
            state[f"experts.{expert}.{projection}.weight"] = array
        mixture.load_state_dict(state)
        return mixture.train(case["train"])

    def recorded(self, name: str) -> dict[str, torch.Tensor]:
        return {key.rsplit("/")[-1]: array for key, array in self.arrays.items() if key.startswith(f"{name}/")}


@pytest.fixture(scope="module")
def reference(golden: Path) -> Reference:
    return Reference(golden / "5_moe")


def test_the_groups_below_cover_every_recorded_case(reference: Reference) -> None:
    grouped = [case for case in reference.cases.values() if (case["E"], case["k"], case["train"]) in GROUPS]
    assert len(grouped) == len(reference.cases) == 210


@pytest.mark.parametrize(("experts", "top_k", "train"), GROUPS)
def test_every_case_is_reproduced(reference: Reference, experts: int, top_k: int, train: bool) -> None:
    for name, case in reference.cases.items():
        if (case["E"], case["k"], case["train"]) != (experts, top_k, train) or "exception" in case:
            continue
        want = reference.recorded(name)
        mixture = reference.mixture(case)
        hidden = reference.arrays[f"x/{case['x']}"].clone().requires_grad_()
        # Without random priority DeepSpeed keeps whatever topk returns among equals: only there is the choice injected.
        tie = case["use_rts"] is False and case["tokens_fully_dropped"] > 0
        output = mixture(
            hidden, priority=want.get("uniform_TE", want.get("gumbel_TE")), kept=want["kept_TE"] if tie else None
        )
        (output.hidden.sum() + output.aux_loss).backward()

        def check(what: str, got: torch.Tensor, name: str = name, want: dict[str, torch.Tensor] = want) -> None:
            assert_close(got, want[what], rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}, {what}: {text}")

        assert torch.equal(output.router.kept, want["kept_TE"]), name
        assert torch.equal(output.router.expert_counts, want["exp_counts"]), name
        assert int(output.router.capacity) == int(want["capacity"]) == case["capacity"], name
        check("y", output.hidden)
        check("l_aux", output.aux_loss)
        check("combine_TE", output.router.combine)
        check("grad_x", hidden.grad)
        check("grad_wg", mixture.router.weight.grad)


def test_cases_on_which_the_published_gate_fails_drop_nothing(reference: Reference) -> None:
    failing = {name: case for name, case in reference.cases.items() if "exception" in case}
    assert len(failing) == 16
    for name, case in failing.items():
        output = reference.mixture(case)(reference.arrays[f"x/{case['x']}"])
        assert output.hidden.isfinite().all(), name
        assert int(output.router.dropped) == 0, name


def test_residual_expert_is_reproduced(golden: Path) -> None:
    arrays = load_file(golden / "5_moe" / "use_residual.safetensors")
    mixture = MoEFeedForward(llama_experts(2), WIDTH, eval_capacity_factor=2.0, residual_expert=llama_experts(1)[0])
    renames = {
        "param.deepspeed_moe.gate.wg.": "router.",
        "param.deepspeed_moe.experts.deepspeed_experts.": "experts.",
        "param.mlp.": "residual_expert.",
        "param.coefficient.": "residual_coefficient.",
    }
    state = {}
    for old, new in renames.items():
        state |= {new + key.removeprefix(old): array.float() for key, array in arrays.items() if key.startswith(old)}
    mixture.load_state_dict(state)
    output = mixture.eval()(arrays["x"].float())
    assert_close(output.hidden, arrays["y"], rtol=1e-5, atol=1e-6)
    assert_close(output.aux_loss, arrays["l_aux"].squeeze(), rtol=1e-5, atol=1e-6)
