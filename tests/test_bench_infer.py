"""The engine's benchmark runs from end to end on a tiny random network; what it measures is not judged."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from model.errors import MedPLIBError
from tests.bench_scripts import bench_script
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def infer() -> Iterator[ModuleType]:
    with bench_script("infer") as script:
        yield script


def tables(report: str) -> dict[str, list[list[str]]]:
    """Rows of every section's table, the head first."""
    parts = re.split(r"^## (.*)$", report, flags=re.MULTILINE)[1:]
    rows = {}
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        lines = [line for line in body.splitlines() if line.startswith("|") and not line.startswith("|---")]
        rows[title] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return rows


def positive(cell: str) -> bool:
    """A share of a limit may round to nothing on a busy machine."""
    value = float(cell.replace(",", "").rstrip("%"))
    return value > 0 or (value == 0 and cell.endswith("%"))


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
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-infer-random-tiny-cpu\.md", path.name)
    report = path.read_text(encoding="utf-8")
    assert report == capsys.readouterr().out
    found = tables(report)
    grounded = "One grounded answer, from file to mask"
    counts = {"Decoding": 6, "Before the first token": 5, grounded: 2, "Requests": 18}
    assert {title: len(found[title]) - 1 for title in counts} == counts
    assert len({tuple(found[title][0]) for title in counts}) == 1  # one head for all
    for title in counts:
        for row in found[title][1:]:
            assert row[1] in ("ms", "a second")
            assert all(map(positive, row[2:9])), row
    assert all("1.00 masks each" in row[-1] for row in found[grounded][1:])
    texts = [re.search(r"same text: (\d+) of (\d+)$", row[-1]) for row in found["Requests"][1:]]
    assert all(text is not None and text[1] == text[2] for text in texts)
    assert len(re.findall(r"^- .*: requests \d+, distinct images \d+;", report, re.MULTILINE)) == 3
    assert len(re.findall(r"^- .*: [\d.,]+, (?:met|missed)\.$", report, re.MULTILINE)) == 12


def test_quantised_weights_are_counted_and_named(
    infer: ModuleType, sizes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """int8 weights are buffers; a limit that overlooks them would be that of a smaller network."""
    read = []
    for weights in ((), ("--quantisation", "int8")):
        infer.main(["--random", str(sizes), "--out", str(tmp_path), "--sections", "before", *SMALL, *weights])
        found = tables(capsys.readouterr().out)
        assert list(found) == ["Hardware", "Before the first token", "Targets"]
        hardware = dict(found["Hardware"][1:])
        read.append(float(hardware["weights read for one token"].split()[0]) - 1067 * 32 * 4 / 1e6)  # but for lm_head
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


def test_settings_that_the_engine_lacks_are_refused(infer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.make_dataclass("EngineSettings", [("graphs", bool)])
    monkeypatch.setattr(infer, "EngineSettings", settings)
    parse = infer.build_parser().parse_args
    assert infer.read_engine_options(parse([])) == {}
    assert infer.read_engine_options(parse(["--no-graphs"])) == {"graphs": False}
    with pytest.raises(MedPLIBError, match="no setting 'kernels'"):
        infer.read_engine_options(parse(["--kernels"]))
