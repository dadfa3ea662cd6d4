"""The benchmark of training runs from end to end on a tiny random network; what it measures is not judged."""

from __future__ import annotations

import csv
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


def test_arms_take_turns_and_have_the_same_loss(
    bench: ModuleType, sizes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["trainable=[lm_head, decoder]", "schedule.batch_size=4", "--random", str(sizes), "--mix", "--images", "2"]
    arms = ["--arm", "straightforward", "plain", "--arm", "grouped", "data.group_by_length=true", "--arm", "recipe"]
    assert bench.main([RECIPE, *chosen, "--steps", "2", *arms, "--out", str(tmp_path / "out")]) == 0
    text, content = sorted((tmp_path / "out").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-train-stage2_nano-random-tiny-cpu\.md", text.name)
    assert text.read_text(encoding="utf-8") == capsys.readouterr().out
    plain, grouped, recipe = csv.DictReader(content.open(encoding="utf-8"))
    assert [row["arm"] for row in (plain, grouped, recipe)] == ["straightforward", "grouped", "recipe"]
    for row in (plain, grouped, recipe):
        assert float(row["questions a second"].replace(",", "")) > 0 and float(row["CPU ms a question"]) > 0
    assert recipe["loss apart"].endswith("(same)") and not grouped["loss apart"].endswith("(same)")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((RECIPE, "--steps", "0"), "0 is too few; give at least 1"),
        (("nowhere.yaml",), "there is no recipe at nowhere.yaml"),
        ((RECIPE, "--device", "warp"), "invalid choice: 'warp'"),
    ],
)
def test_mistakes_are_one_sentence(
    bench: ModuleType, arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main([*arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
