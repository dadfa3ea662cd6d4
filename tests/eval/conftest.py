"""The shipped nano, loaded once for all tests of evaluation, and the sample's held-out questions."""

from __future__ import annotations

import pytest
import torch

from model.eval.questions import Question
from model.inference.engine import Engine
from tests.eval.phantom_questions import NANO, held_out_questions

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine.from_pretrained(NANO, device="cpu")


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    return held_out_questions()
