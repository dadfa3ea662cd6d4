"""The benchmark of training runs from end to end on a tiny random network; what it measures is not judged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.bench_scripts import bench_script
from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "scripts" / "bench"
RECIPE = str(ROOT / "configs" / "stages" / "stage2_nano.yaml")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with bench_script("train") as script:
        yield script


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config().to_dict()
    text = {key: config["text_config"][key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0}
    sections = {"text_config": text, "vision_config": config["vision_config"], "sam_config": config["sam_config"]}
    path = tmp_path_factory.mktemp("sizes") / "tiny.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def here(job: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process, which has everything imported already."""

    def measure(arm: str, recipe: object, options: object, device: object) -> object:
        return job.run_arm(arm, recipe, options.random, str(device), options.steps, 1)  # type: ignore[attr-defined]

    monkeypatch.setattr(job, "measure", measure)


def test_the_whole_report_of_a_random_network(
    bench: ModuleType,
    sizes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here(bench, monkeypatch)
    chosen = ["data.group_by_length=true", f"data.feature_cache={tmp_path / 'cache'}", "trainable=[lm_head, decoder]"]
    arguments = ["--random", str(sizes), "--mix", "--steps", "3", "--out", str(tmp_path / "out")]
    assert bench.main([RECIPE, *chosen, *arguments]) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-train-stage2_nano-random-tiny-cpu\.md", path.name)
    report = path.read_text(encoding="utf-8")
    assert report == capsys.readouterr().out
    assert "; they agree within 0.0001" in report
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line[:2] == "| "]
    found = {row[0]: row[1:] for row in rows}
    for what in ("samples a second", "tokens a second, padding not counted", "peak memory, MB resident"):
        assert all(float(cell.replace(",", "")) > 0 for cell in found[what]), what
    padding = [float(cell.rstrip("%")) for cell in found["padding, share of all tokens"]]
    assert padding[0] < padding[1]
    for batch in ("4", "8", "16", "32"):  # images only, 10 % and 50 % text only: random order, and grouped
        random, grouped = found[batch][::2], found[batch][1::2]
        assert all(float(cell.rstrip("%")) < 5 for cell in grouped)
        assert all(float(cell.rstrip("%")) > 7 for cell in random)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((RECIPE, "--random", "8b", "--mix"), "--random is '8b'; give one of 7b, nano"),
        ((RECIPE, "--steps", "0"), "0 is too few; give at least 1"),
        ((RECIPE, "model.base=nowhere"), "model.base is nowhere, which does not exist"),
        (("nowhere.yaml",), "there is no recipe at nowhere.yaml"),
        ((RECIPE, "--device", "warp"), "the device 'warp' cannot be used here"),
    ],
)
def test_mistakes_are_one_sentence(
    bench: ModuleType, arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main([*arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
