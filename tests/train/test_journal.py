"""A run's files of rows, also after they were damaged."""

from __future__ import annotations

import json
from pathlib import Path

from model.train.journal import METRICS_FILE, ROUTER_FILE, Journal, read_rows
from model.train.recipe import Logging


def test_rows_that_a_kill_or_a_crash_damaged_do_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    rows = [{"step": step, "kinds": {"text": {"tokens": step}}} for step in (1, 2, 3)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    half = json.dumps({"step": 4, "kinds": {"text": {}}})[:-2]  # ends in a brace, as whole rows do
    for name in (METRICS_FILE, ROUTER_FILE):
        (tmp_path / name).write_bytes(whole.encode() + b"\0\0\0{}\n7\n\xff\n" + half.encode())
    Journal(tmp_path, Logging(progress=False, tensorboard=False), 9, first_step=2, writes=True).close()
    for name in (METRICS_FILE, ROUTER_FILE):
        assert read_rows(tmp_path / name) == rows[:2]
        assert len((tmp_path / name).read_text().splitlines()) == 2
