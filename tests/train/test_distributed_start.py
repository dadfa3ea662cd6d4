"""What a rank holds while a distributed engine is being made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.train import recipe_from, save_recipe
from tests.train.launching import launch

pytest.importorskip("deepspeed", reason="the train extra (deepspeed) is not installed")


@pytest.mark.slow
def test_zero3_never_needs_room_for_the_whole_network(values: Any, tmp_path: Path) -> None:
    """DeepSpeed moves a network that it gets whole to each GPU whole; one that is shared out already stays so."""
    chosen = values(2)
    chosen["engine"] |= {"kind": "deepspeed", "zero_stage": 3}
    given = save_recipe(recipe_from(chosen), tmp_path / "given")
    ended = launch(["tests/train/rank_sharing.py", str(given)], processes=2)
    assert ended.returncode == 0, ended.stderr
    told = [line.split()[1:] for line in ended.stdout.splitlines() if line.startswith("held ")]
    assert len(told) == 2
    for whole, shares, numbers in (map(int, line) for line in told):
        assert whole == 0
        assert shares == pytest.approx(numbers / 2, rel=0.01)
