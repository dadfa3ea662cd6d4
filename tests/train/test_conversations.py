"""Runs whose sequences are conversations of several records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.data.dataset import MedPLIBDataset, MixedDataset
from model.data.packing import LengthCheck
from model.modeling.configuration import IGNORE_INDEX
from model.processing.conversation import Turn
from model.train import recipe_from
from model.train.init_weights import starting_network


def test_the_loss_is_that_of_a_conversation_made_by_hand(values: Any, phantoms: Path) -> None:
    network, processor = starting_network(recipe_from(values(3)))
    network.eval()
    check = LengthCheck.of(processor)
    parts = [
        MedPLIBDataset(phantoms / f"{name}.json", phantoms, processor, training=False, lengths=check)
        for name in ("vqa", "grounding", "region")
    ]
    data = MixedDataset(parts)
    data.pack(4, None, 1024, check.shared)
    for index in range(len(data)):  # the first conversation of three turns with a mask and a region
        drawn = data._packing.draw(index, data.sample, np.random.default_rng([0, 0, int(index)]))
        if len(drawn) > 2 and {"grounding", "region"} <= {one.task for one in drawn}:
            break
    else:
        pytest.fail("no conversation of three turns with a mask and a region")
    rows = [json.loads(json.dumps(one.raw))["conversations"] for one in drawn]
    turns = []
    for number, (question, answer) in enumerate(rows):
        text = question["value"] if number == 0 else question["value"].replace("<image>\n", "")
        opened, _, rest = text.partition("<region>")
        text = f"{opened}<region></region>{rest.partition('</region>')[2]}" if rest else text
        turns += [Turn("human", text), Turn("gpt", answer["value"].partition("<mask>")[0])]
    loaded = [data.load([data.sample(n).id for n in range(len(data))].index(one.id)) for one in drawn]
    regions, masks = ([pixels for one in loaded for pixels in getattr(one, name)] for name in ("regions", "masks"))
    by_hand = processor.encode(turns, loaded[0].images[:1], regions, [0] * len(regions), masks)
    by_rule = data.datasets[0]._encode(drawn, np.random.default_rng(0))
    for name in ("input_ids", "labels", "pixel_values", "region_masks", "region_image", "mask_targets"):
        assert torch.equal(getattr(by_rule, name), getattr(by_hand, name)), name
    assert len(by_rule) <= 1024 and not by_rule.truncated

    def losses(labels: torch.Tensor, targets: torch.Tensor) -> tuple[float, int, list[float]]:
        batch = processor.collate([by_rule]) | {"labels": labels[None], "mask_targets": [targets]}
        with torch.no_grad():
            row = network(**batch).row_losses
        return float(row.ce.sum()), int(row.tokens.sum()), row.masks["dice"].tolist()

    labels, count = by_rule.labels, 0
    learnt = labels != IGNORE_INDEX
    begins = torch.nonzero(learnt & ~torch.cat([torch.zeros(1, dtype=torch.bool), learnt[:-1]])).flatten().tolist()
    assert len(begins) == len(drawn)  # every answer is supervised
    whole, single = losses(labels, by_rule.mask_targets), []
    for number, begin in enumerate(begins):
        end = begins[number + 1] if number + 1 < len(begins) else len(labels)
        own = torch.full_like(labels, IGNORE_INDEX)
        own[begin:end] = labels[begin:end]
        here = len(loaded[number].masks)
        single.append(losses(own, by_rule.mask_targets[count : count + here]))
        count += here
    assert whole[0] == pytest.approx(sum(one[0] for one in single), rel=1e-4)
    assert whole[1] == sum(one[1] for one in single) == int(learnt.sum())
    assert whole[2] == pytest.approx([dice for one in single for dice in one[2]], rel=1e-3)
