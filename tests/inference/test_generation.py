"""The decode loop: a prompt's answer is its own, whatever it is batched with and however long its neighbours talk."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.errors import MedPLIBError
from model.inference.generation import Generation, GenerationSettings, choose_tokens, generate
from model.modeling.configuration import IMAGE_PLACEHOLDER, REGION_PLACEHOLDER
from model.modeling.medplib import MedPLIBForCausalLM
from tests.tiny import tiny_model

PROMPTS = ([1, IMAGE_PLACEHOLDER, 5, REGION_PLACEHOLDER, 7, 8], [1, 9, 3], [1, IMAGE_PLACEHOLDER, 4, 44])
IMAGES = ((0,), (), (1,))  # of each prompt
GREEDY = GenerationSettings(max_new_tokens=10)


@pytest.fixture
def model() -> MedPLIBForCausalLM:
    network = tiny_model()
    network.config.eos_token_id = -1  # nothing ends an answer unless a test says so
    return network


def prompt(model: MedPLIBForCausalLM, *rows: int, side: str = "left") -> dict[str, Any]:
    """Some of the prompts as one batch."""
    features = model.encode_images(torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)))
    width = max(len(PROMPTS[row]) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        start = width - len(PROMPTS[row]) if side == "left" else 0
        ids[place, start : start + len(PROMPTS[row])] = torch.tensor(PROMPTS[row])
        mask[place, start : start + len(PROMPTS[row])] = 1
    regions = sum(REGION_PLACEHOLDER in PROMPTS[row] for row in rows)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "image_features": features[[image for row in rows for image in IMAGES[row]]],
        "region_masks": torch.ones(regions, 4, 4),
        "region_image": torch.zeros(regions, dtype=torch.long),
    }


def alone(model: MedPLIBForCausalLM, row: int, settings: GenerationSettings = GREEDY) -> Generation:
    return generate(model, prompt(model, row), settings)[0]


def test_an_answer_is_the_same_alone_and_in_a_batch(model: MedPLIBForCausalLM) -> None:
    model.config.seg_token_id = alone(model, 0).token_ids[2]  # so that there are states to compare
    wanted = [alone(model, row) for row in range(3)]
    found = generate(model, prompt(model, 0, 1, 2), GREEDY)
    assert [row.token_ids for row in found] == [row.token_ids for row in wanted]
    assert len(wanted[0].seg_states) == wanted[0].token_ids.count(model.config.seg_token_id) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours.seg_states) == len(theirs.seg_states)
        for one, other in zip(ours.seg_states, theirs.seg_states, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_sampled_answer_is_the_same_alone_and_in_a_batch(model: MedPLIBForCausalLM) -> None:
    settings = GenerationSettings(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=3)
    wanted = [alone(model, row, settings).token_ids for row in range(3)]
    assert wanted[0] != alone(model, 0).token_ids
    assert [row.token_ids for row in generate(model, prompt(model, 0, 1, 2), settings)] == wanted


def test_a_row_ends_at_its_own_end_token(model: MedPLIBForCausalLM) -> None:
    whole = [alone(model, row).token_ids for row in range(3)]
    end = next(token for token in whole[0][1:] if token not in whole[1])
    model.config.eos_token_id = [end]
    told: list[tuple[int, int]] = []
    found = generate(model, prompt(model, 0, 1), GREEDY, lambda row, token: told.append((row, token)))
    assert found[0].token_ids == whole[0][: whole[0].index(end)] and found[0].finished
    assert found[1].token_ids == whole[1] and not found[1].finished
    assert [token for row, token in told if row == 0] == found[0].token_ids


def test_a_state_is_the_one_that_predicts_its_seg(model: MedPLIBForCausalLM) -> None:
    model.config.seg_token_id = alone(model, 0).token_ids[3]
    found, inputs = alone(model, 0), prompt(model, 0)
    place = found.token_ids.index(model.config.seg_token_id)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([found.token_ids[:place]])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        whole = model(**inputs).last_hidden_state[0, -1]
    torch.testing.assert_close(found.seg_states[0], whole, rtol=1e-4, atol=1e-5)


def test_transformers_own_loop_says_the_same(model: MedPLIBForCausalLM) -> None:
    ours = generate(model, prompt(model, 0, 1, 2), GREEDY)
    theirs = model.generate(**prompt(model, 0, 1, 2), max_new_tokens=10, do_sample=False, eos_token_id=-1)
    assert theirs.tolist() == [row.token_ids for row in ours]


def test_padding_on_the_right_is_refused(model: MedPLIBForCausalLM) -> None:
    with pytest.raises(ValueError, match="padding_side='left'"):
        generate(model, prompt(model, 0, 1, side="right"), GREEDY)
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.generate(**prompt(model, 0, 1, side="right"), max_new_tokens=2)


def test_the_nucleus_keeps_the_likely_tokens() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, -5.0]])
    settings = GenerationSettings(temperature=1.0, top_p=0.9)
    sampler = torch.Generator().manual_seed(0)
    assert {int(choose_tokens(logits, settings, [sampler])) for _ in range(50)} == {1, 2}
    narrow = GenerationSettings(temperature=1.0, top_p=0.1)
    assert {int(choose_tokens(logits, narrow, [sampler])) for _ in range(20)} == {1}


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_wrong_settings_are_one_sentence(options: dict) -> None:
    with pytest.raises(MedPLIBError) as raised:
        GenerationSettings(**options)
    assert "\n" not in str(raised.value)
