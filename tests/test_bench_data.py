"""The benchmark of the SA-Med2D index runs from end to end on two small trees; what it measures is not judged."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.bench_scripts import bench_script


def test_two_trees_give_a_report_and_the_time_of_the_real_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data.py", "--files", "60", "200", "--workers", "1", "--folder", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    with bench_script("data") as script:
        assert script.main() == 0
    assert "3,772,180 images, 15,800,000 masks" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 and all(float(row["index s"]) > 0 for row in rows)
