"""The engine's benchmark runs from end to end on a tiny random network; what it measures is not judged."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.bench_scripts import bench_script
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def infer() -> Iterator[ModuleType]:
    with bench_script("infer") as script:
        yield script


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of the one CSV in a folder."""
    (path,) = folder.glob("*.csv")
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config().to_dict()
    text = {key: config["text_config"][key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0}
    sections = {"text_config": text, "vision_config": config["vision_config"], "sam_config": config["sam_config"]}
    path = tmp_path_factory.mktemp("sizes") / "tiny.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


SMALL = ("--rounds", "1", "--requests", "3", "--threads", "1", "--dtype", "fp32")


def test_the_whole_report_of_a_random_network(
    infer: ModuleType, sizes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer.main(["--random", str(sizes), "--out", str(tmp_path), *SMALL]) == 0
    (path,) = tmp_path.glob("*.md")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-infer-random-tiny-cpu\.md", path.name)
    report = path.read_text(encoding="utf-8")
    assert report == capsys.readouterr().out
    rows = read_rows(tmp_path)
    assert sum(line.startswith("| ") for line in report.splitlines()) == len(rows) + 2  # one table: head and rule
    counts = {"decoding": 3, "before": 5, "grounded": 2, "requests": 18}
    assert Counter(row["section"] for row in rows) == counts
    measured = ("engine", "plain", "gain", "engine peak MB", "plain peak MB")
    assert all(float(row[column]) > 0 for row in rows for column in measured)
    assert all(float(row["of the limit"]) > 0 for row in rows if row["section"] in ("decoding", "before"))
    assert {row["unit"] for row in rows} == {"ms", "a second"}
    assert all("1.00 masks each" in row["note"] for row in rows if row["section"] == "grounded")
    texts = [re.search(r"same text: (\d+) of (\d+)$", row["note"]) for row in rows if row["section"] == "requests"]
    assert all(text is not None and text[1] == text[2] for text in texts)
    assert sum(row["target"].endswith((": met", ": missed")) for row in rows) == 12


def test_quantised_weights_are_counted_and_named(
    infer: ModuleType, sizes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """int8 weights are buffers; a limit that overlooks them would be that of a smaller network."""
    read = []
    for weights in ((), ("--quantisation", "int8")):
        infer.main(["--random", str(sizes), "--out", str(tmp_path), "--sections", "before", *SMALL, *weights])
        found = re.search(r"one token reads ([\d.]+) MB", capsys.readouterr().out)
        assert found is not None
        read.append(float(found[1]) - 1067 * 32 * 4 / 1e6)  # but for lm_head
    assert any(path.name.endswith("-infer-random-tiny-cpu-int8.md") for path in tmp_path.iterdir())
    assert 0.2 < read[1] / read[0] < 0.4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--random", "8b"), "--random is '8b'; give one of 7b, nano"),
        (("--requests", "0"), "0 is too few; give at least 1"),
        (("--device", "warp"), "the device 'warp' cannot be used here"),
    ],
)
def test_mistakes_are_one_sentence(
    infer: ModuleType, arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        infer.main([*arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
