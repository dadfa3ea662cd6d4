"""The command line, as people type it: answers, files, exit codes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file
from safetensors.torch import load_file, save_file

from model.checkpoint import export_published, load
from model.cli import main
from model.inference.engine import EngineSettings
from model.processing.masks import decode_rle
from model.serve.checks import check_checkpoint
from model.serve.model_worker import _check_model, make_parser
from model.serve.ray_app import RaySettings, make_replica_app
from model.serve.server import parse_flags
from model.serve.worker_loading import ModelChoice, describe_engine, load_engine
from tests.conftest import ROOT
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 36, 3), dtype=np.uint8)).save(tmp_path / "scan.png")
    return tmp_path / "scan.png"


@pytest.fixture
def ask(checkpoint: Path, tmp_path: Path) -> object:
    def run(*arguments: object) -> int:
        words = [str(argument) for argument in arguments]
        return main(
            ["ask", *words, "--model", str(checkpoint), "--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
        )

    return run


@pytest.fixture
def speaks_seg(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model never says ``<SEG>``, so it is made to; everything after that is real."""
    seg = json.loads((checkpoint / "config.json").read_text())["seg_token_id"]
    monkeypatch.setattr("model.inference.schedule.choose_tokens", lambda logits, _: torch.full((len(logits),), seg))


def test_ask_prints_one_json_object(ask, picture: Path, capsys: pytest.CaptureFixture) -> None:
    assert ask(picture, "What is it?", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"text", "masks", "finish", "new_tokens", "timing"}
    assert (printed["finish"], printed["new_tokens"]) == ("length", 4) or printed["finish"] == "end"
    assert printed["timing"]["total"] > printed["timing"]["encode"] > 0


def test_how_an_answer_is_drawn(ask, picture: Path, capsys: pytest.CaptureFixture) -> None:
    def text(*flags: object) -> str:
        assert ask(picture, "What is it?", "--json", *flags) == 0
        return json.loads(capsys.readouterr().out)["text"]

    greedy = text()
    assert text("--temperature", 2, "--top-k", 1) == text("--temperature", 2, "--top-p", 0.001) == greedy
    drawn = [text("--temperature", 5, "--seed", seed) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] and len({*drawn, greedy}) == 3


def test_an_answer_ends_before_a_stop_text(ask, picture: Path, capsys: pytest.CaptureFixture) -> None:
    assert ask(picture, "What is it?", "--json") == 0
    whole = json.loads(capsys.readouterr().out)["text"]
    assert ask(picture, "What is it?", "--json", "--stop", "never said", "--stop", whole[-1]) == 0
    stopped = json.loads(capsys.readouterr().out)
    assert (stopped["text"], stopped["finish"]) == (whole[: whole.index(whole[-1])].rstrip(), "stop")


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantised_model_answers(tmp_path: Path, capsys: pytest.CaptureFixture, scheme: str) -> None:
    words = ["What modality is used to take this image?", "--quantisation", scheme, "--max-new-tokens", "8", "--json"]
    image = next((ROOT / "data" / "sample" / "images").glob("ultrasound*seed505*"))
    assert main(["ask", str(image), *words, "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "Ultrasound"


@pytest.mark.usefixtures("speaks_seg")
def test_ask_writes_masks_and_overlay(ask, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert ask(picture, "Please segment the liver.", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["masks"]) == 2 and answer["masks"][0]["label"] == "liver"
    for number, mask in enumerate(answer["masks"], start=1):
        assert set(mask) == {"label", "rle", "score", "bbox", "area_px"}
        written = np.asarray(Image.open(tmp_path / "out" / f"scan_mask_{number}.png"))
        assert (decode_rle(mask["rle"]) == (written == 255)).all() and written.shape == (48, 36)
        assert set(np.unique(written)) <= {0, 255}
    overlay = Image.open(tmp_path / "out" / "scan_overlay.png")
    assert overlay.mode == "RGB" and min(overlay.size) >= 256
    assert not [
        path for path in (tmp_path / "out").iterdir() if not path.name.startswith("scan_")
    ]  # nothing half-written


def test_a_region_is_drawn_and_named(ask, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for where in (("--box", "2,2,20,20"), ("--point", "10,12"), ("--region", _region(tmp_path))):
        assert ask(picture, "What is in this region?", *where) == 0
        assert f"wrote {tmp_path / 'out' / 'scan_overlay.png'}" in capsys.readouterr().out


def _region(folder: Path) -> Path:
    mask = np.zeros((48, 36), np.uint8)
    mask[5:20, 5:20] = 255
    Image.fromarray(mask).save(folder / "region.png")
    return folder / "region.png"


@pytest.mark.usefixtures("speaks_seg")
def test_dicom_with_spacing(ask, capsys: pytest.CaptureFixture) -> None:
    file = get_testdata_file("CT_small.dcm", download=False)
    assert ask(file, "Segment it.", "--json", "--threshold", "0.01") == 0
    mask = json.loads(capsys.readouterr().out)["masks"][0]
    rows, columns = (float(value) for value in pydicom.dcmread(file).PixelSpacing)
    assert mask["rle"]["size"] == [128, 128]
    assert mask["area_mm2"] == pytest.approx(mask["area_px"] * rows * columns, abs=0.01)


@pytest.mark.parametrize(
    "arguments",
    [
        ["missing.png", "What?"],
        ["SCAN", " "],
        ["SCAN", "What?", "--threshold", "2"],
        ["SCAN", "What?", "--box", "0,0,99,99"],
        ["SCAN", "What?", "--point", "1,2,3"],
        ["SCAN", "What?", "--region", "missing.png"],
        ["SCAN", "What?", "--region", "SCAN_OF_OTHER_SIZE"],
        ["SCAN", "What?", "--temperature", "-1"],
        ["SCAN", "What?", "--top-p", "0"],
        ["SCAN", "What?", "--top-k", "-1"],
        ["SCAN", "What?", "--stop", ""],
        ["SCAN", "What?", "--no-mask-below", "2"],
        ["SCAN", "What?", "--no-mask-below", "0.5"],  # the checkpoint has no classifier
        ["SCAN", "What?", "--device", "abacus"],
        ["SCAN", "What?", "--device", "meta"],
        ["SCAN", "What?", "--attention", "flash_attention_2"],
        ["SCAN", "What?", "--temperature", "nan"],
        ["SCAN", "What?", "--seed", "99999999999999999999"],
        *([] if torch.cuda.is_available() else [["SCAN", "What?", "--device", "cuda"]]),
        ["TEXT", "What?"],
        ["SCAN", "What?", "--out", "TEXT"],
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(
    checkpoint: Path, picture: Path, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "text.png").write_text("this is no picture")
    Image.new("L", (5, 5), 255).save(tmp_path / "other.png")
    names = {"SCAN": picture, "TEXT": tmp_path / "text.png", "SCAN_OF_OTHER_SIZE": tmp_path / "other.png"}
    words = [str(names.get(word, word)) for word in arguments]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    else:
        words += ["--box", "1,1,9,9"]  # something to write
    code = main(["ask", *words, "--model", str(checkpoint), "--max-new-tokens", "2"])
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("medplib: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["nonsense"]),
        *(["ask"], ["ask", "a", "b", "--box", "x"], ["ask", "a", "b", "--no"]),
        *(["chat", "a", "--point", "x"], ["chat", "a", "b"]),
        *(["serve", "--port", "x"], ["serve", "DIR"], ["serve", "--dtype", "fp8"]),
    ],
)
def test_wrong_flags_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_a_folder_that_is_no_checkpoint(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["ask", str(picture), "What?", "--model", str(tmp_path)]) == 2
    assert main(["describe", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("medplib: ") == 2


def test_parts_that_a_checkpoint_lacks_may_be_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The published spellings of the flags, which errors name, are understood."""
    model, processor = load(checkpoint)
    export_published(model, processor, tmp_path / "published")
    weights = tmp_path / "published" / "model.safetensors"
    state = load_file(weights)
    sam = {name: value for name, value in state.items() if name.startswith("model.visual_model.")}
    save_file({name: value for name, value in state.items() if name not in sam}, weights)
    torch.save({name.removeprefix("model.visual_model."): value for name, value in sam.items()}, tmp_path / "sam.pth")
    assert main(["describe", str(tmp_path / "published")]) == 2
    assert "--vision_pretrained" in capsys.readouterr().err
    assert main(["describe", str(tmp_path / "published"), "--vision_pretrained", str(tmp_path / "sam.pth")]) == 0
    assert "complete" in capsys.readouterr().out
    native = str(tmp_path / "native")
    assert main(["export", str(tmp_path / "published"), native, "--sam", str(tmp_path / "sam.pth")]) == 0
    assert load(native)[0].model.sam.image_encoder.pos_embed.equal(model.model.sam.image_encoder.pos_embed)


@pytest.mark.parametrize("arguments", [["--help"], ["--check", "--help"]])
def test_training_has_its_own_options(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    assert ended.value.code == 0
    assert "--on-bad-record" in capsys.readouterr().out


def test_a_run_folder_is_taken_for_its_network(
    checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "liver"
    shutil.copytree(checkpoint, run / "merged")
    (run / "recipe.yaml").write_text("stage: 3\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
    short = ["--model", str(run), "--out", str(tmp_path / "out"), "--max-new-tokens", "2"]
    assert main(["ask", str(picture), "What is it?", *short]) == 0
    assert main(["chat", str(picture), *short]) == 0
    assert main(["describe", str(run)]) == 0
    assert main(["export", str(run), str(tmp_path / "native")]) == 0
    sample = Path(__file__).resolve().parents[1] / "data" / "sample"
    assert main(["data", "check", str(sample / "vqa.json"), "--images", str(sample), "--model", str(run)]) == 0
    capsys.readouterr()
    assert check_checkpoint(run) == check_checkpoint(run / "merged")
    options = parse_flags(make_parser(), ["--model-path", str(run)])
    assert _check_model(options)[0] == run / "merged"
    engine = load_engine(ModelChoice(run), EngineSettings(slots=1))
    assert describe_engine(engine, ModelChoice(run))["checkpoint"] == "liver"
    assert make_replica_app(engine, RaySettings(model=run)).state.worker.settings.model_names == ("liver",)
    shutil.rmtree(run / "merged")
    (run / "checkpoints" / "step_0000006").mkdir(parents=True)
    told = "its last checkpoint step_0000006; let it train on (--resume), or make a model of that: medplib export"
    for command in (["ask", str(picture), "What?", "--model"], ["describe"], ["serve", "--no-web", "--model"]):
        assert main([*command, str(run)]) == 2
        assert told in capsys.readouterr().err


def test_export_and_describe(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    published, native = tmp_path / "published", tmp_path / "native"
    assert main(["export", str(checkpoint), str(published), "--layout", "published", "--format", "bin"]) == 0
    assert main(["export", str(published), str(native)]) == 0
    (tmp_path / "run").mkdir()
    native = native.rename(tmp_path / "run" / "merged")
    assert main(["describe", str(tmp_path / "run")]) == 0
    assert "expert" in capsys.readouterr().out
    assert main(["export", str(checkpoint), str(native)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_export_in_half_precision(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(checkpoint), str(tmp_path / "half"), "--dtype", "float16"]) == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (checkpoint, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    assert main(["export", str(checkpoint), str(tmp_path / "x"), "--layout", "adapter", "--dtype", "float16"]) == 2
    assert "leave --dtype out" in capsys.readouterr().err


def test_data_build_and_check(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "phantoms"
    assert main(["data", "build", "phantom", "--out", str(out), "--num-images", "8", "--seed", "3"]) == 0
    for task in ("vqa", "region", "grounding"):
        assert main(["data", "check", str(out / f"{task}.json"), "--images", str(out)]) == 0
    next((out / "images").iterdir()).unlink()
    capsys.readouterr()
    assert main(["data", "check", str(out / "vqa.json"), "--images", str(out)]) == 1
    assert "image" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_one_sentence(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    out = str(tmp_path / "file" / "out")
    assert main(["data", "build", "phantom", "--out", out, "--num-images", "1"]) == 2
    assert main(["export", str(checkpoint), out]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medplib: ")]
    assert len(said) == 2 and all("Traceback" not in line for line in said)


HEAVY = ("torch", "transformers", "numpy", "pyarrow", "PIL")


@pytest.mark.parametrize("words", [[], ["--help"], ["runs", "--help"], ["data", "build", "--help"]])
def test_the_command_starts_without_anything_heavy(words: list[str]) -> None:
    script = f"""import sys
from model.cli import main
try:
    {"main(sys.argv[1:])" if words else "pass"}
except SystemExit as end:
    assert not end.code
sys.stdout.write("loaded: " + " ".join(name for name in {HEAVY} if name in sys.modules))"""
    ran = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.endswith("loaded: ")


def test_installed_command_says_how_to_use_it() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "model.cli", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert "Research use only" in printed


_ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize(
    "words",
    [
        ("model.cli", "data", "check", "d.json", "--images", "."),
        ("model.cli", "ask", "--help"),
        ("model.cli", "runs", "runs_é"),
        ("model.eval.cal_metric", "--pred=d.json"),
        ("model.eval.join_chunks", "d.json", "é.json"),
        ("model.train", "d.json", "output=é", "--check"),
    ],
)
def test_an_ascii_terminal_gets_escapes_and_no_traceback(tmp_path: Path, words: tuple[str, ...]) -> None:
    turns = [{"from": "human", "value": "<image>\n什么?"}, {"from": "gpt", "value": "x"}]
    record = {"id": "é图", "image": "missing é.png", "conversations": turns}
    (tmp_path / "d.json").write_text(json.dumps([record], ensure_ascii=False), encoding="utf-8")
    environment = {**os.environ, **_ASCII, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True)
    assert run.returncode in (0, 1, 2) and b"Traceback" not in run.stderr, run.stderr.decode()
    if "check" in words:
        assert rb"record 0 (\xe9\u56fe): missing_image" in run.stdout


def test_images_inside_a_parquet_file_do_not_flood_the_terminal(
    tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture
) -> None:
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "x"}]
    held = {"bytes": picture.read_bytes() * 20, "path": "scan.png"}
    rows = [{"id": str(number), "image": held, "conversations": turns} for number in range(8)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "hf.parquet")
    assert main(["data", "check", str(tmp_path / "hf.parquet"), "--images", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("the image lies inside the file as encoded bytes") == 8 and len(printed) < 2000


def test_data_check_counts_tokens_for_a_model(tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture) -> None:
    messages = [{"role": "user", "content": "<image>\n" + "what is it? " * 200}, {"role": "assistant", "content": "x"}]
    (tmp_path / "d.json").write_text(json.dumps([{"images": ["scan.png"], "messages": messages}]))
    words = ["data", "check", str(tmp_path / "d.json"), "--images", str(tmp_path)]
    model = ["--model", str(ROOT / "assets" / "medplib-nano")]
    assert main(words) == main([*words, *model, "--max-length", "4000"]) == 0
    assert main([*words, *model]) == 1 and "too_long" in capsys.readouterr().out
    assert main([*words, "--max-length", "9"]) == 2 and "--model DIR" in capsys.readouterr().err
