"""A run over a data file: its rows, what stops and resumes it, what it refuses, and what it does about bad records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model.errors import MedPLIBError
from model.eval import vqa_infer
from model.eval.inference import check_config, open_engine
from model.eval.metrics.scores import score_predictions
from model.eval.options import InferenceOptions
from model.eval.predictions import Prediction, match_references, read_predictions
from model.eval.run import Outcome, run_inference
from model.eval.shards import Rank, chunk, journal_path, read_journal
from model.eval.vqa_infer import parse_flags
from model.inference.engine import Engine, Request
from model.inference.generation import GenerationSettings
from model.processing.masks import decode_rle
from tests.eval.phantom_questions import NANO, RECORDS, SAMPLE, without_timing
from tests.tiny import tiny_config

VQA, GROUNDING = RECORDS[0], next(record for record in RECORDS if "<mask>" in str(record["conversations"]))
REGION = next(record for record in RECORDS if "<region>" in str(record["conversations"]))
ABSENT = next(r for r in RECORDS if r["task"] == "grounding" and "<mask>" not in str(r["conversations"]))
MIXED = [*RECORDS[:5], REGION, *RECORDS[86:92]]


@pytest.fixture
def run(engine: Engine) -> Callable[..., Outcome]:
    """Runs with an engine that is there already."""
    return lambda chosen, place=None: run_inference(chosen, place or Rank(), opener=lambda *_: engine)


def options(folder: Path, records: list[Any], **changes: Any) -> InferenceOptions:
    data = folder / "data.json"
    data.write_text(json.dumps(records))
    given = {"model": NANO, "data": data, "images": SAMPLE, "answers": folder / "answers.jsonl", "device": "cpu"}
    return InferenceOptions(**{**given, **changes})


def two_questions(name: str | int, second: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": second}, {"from": "gpt", "value": "Yes"}]
    return {**VQA, "id": name, "conversations": [*VQA["conversations"], *turns]}


def rows_of(outcome: Outcome) -> list[Prediction]:
    return list(read_predictions(outcome.answers))


# --- rows -----------------------------------------------------------------------------------------------------------


def test_every_question_has_its_row_in_order(run: Any, tmp_path: Path):
    outcome = run(options(tmp_path, MIXED, thresholds=(0.1, 0.5), router=True))
    rows = rows_of(outcome)
    assert (outcome.rows, outcome.errors) == (len(MIXED), 0)
    assert [row.question_id for row in rows] == [record["id"] for record in MIXED]
    assert len(list(match_references(rows, MIXED))) == len(MIXED)
    for row, record in zip(rows, MIXED, strict=True):
        assert row.image_path == record["image"]
        assert row.metadata["task"] == record["task"]
        assert row.metadata["modality"] == record["modality"]
        assert row.answer_type == record["answer_type"]
        assert (row.gt_masks is None) == (record["task"] != "grounding")
        assert row.model_id == "medplib-nano"
        assert row.router is not None
        assert all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in row.router)
    assert sum(row.text == row.gt for row in rows) > len(rows) / 2
    assert not list(tmp_path.glob(".*"))


def test_masks_are_written_at_every_threshold(run: Any, tmp_path: Path):
    (row,) = rows_of(run(options(tmp_path, [GROUNDING], thresholds=(0.5, 0.1))))
    assert row.masks_at is not None
    assert list(row.masks_at) == ["0.5", "0.1"]
    strict, lenient = (decode_rle(row.masks_at[name][0]) for name in ("0.5", "0.1"))
    assert row.masks[0]["rle"] == row.masks_at["0.5"][0]
    assert lenient.sum() > strict.sum() > 0
    assert (lenient | ~strict).all()
    assert row.gt_masks is not None
    reference = decode_rle(row.gt_masks[0])
    assert (reference & strict).sum() > 0.5 * (reference | strict).sum()


def test_every_question_of_a_conversation_is_asked(run: Any, tmp_path: Path):
    asked = options(tmp_path, [two_questions(7, "Does this image show a kidney: yes or no?")])
    rows = rows_of(run(asked))
    assert [(row.question_id, row.key[1]) for row in rows] == [(7, 0), (7, 1)]
    assert [row.gt for row in rows] == ["CT", "Yes"]
    assert rows[1].prompt == "Does this image show a kidney: yes or no?"
    first = replace(asked, turns="first", answers=tmp_path / "first.jsonl")
    assert [row.text for row in rows_of(run(first))] == [rows[0].text]


def test_sampled_answers_do_not_depend_on_their_company(run: Any, tmp_path: Path):
    asked = options(tmp_path, MIXED, temperature=1.5, batch_size=3)
    run(asked)
    single = replace(asked, batch_size=1, workers=0, answers=tmp_path / "single.jsonl")
    run(single)
    assert without_timing(single.answers) == without_timing(asked.answers)
    other = replace(asked, seed=7, answers=tmp_path / "other.jsonl")
    run(other)
    assert without_timing(other.answers) != without_timing(asked.answers)


def test_pictures_are_written_for_rows_with_masks(run: Any, tmp_path: Path):
    run(options(tmp_path, [VQA, GROUNDING], pictures=tmp_path / "pictures"))
    (picture,) = (tmp_path / "pictures").iterdir()
    assert picture.name == f"000001_0_{Path(GROUNDING['image']).name}"
    width, height = Image.open(picture).size
    assert width > 2.9 * height


# --- stopping and going on ------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Stands for whatever ends a process."""


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    from model.eval.predictions import PredictionWriter

    write = PredictionWriter.write

    def stopping(self: PredictionWriter, row: Prediction) -> None:
        if self.rows == count:
            raise Stopped
        write(self, row)

    monkeypatch.setattr(PredictionWriter, "write", stopping)


def test_a_stopped_run_goes_on(engine: Engine, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = options(tmp_path, MIXED)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 5)
        run_inference(asked, Rank(), opener=open_engine)  # an engine of its own, for it is left in the middle
    torn = asked.answers.read_bytes() + b'{"question_id": "phan'
    asked.answers.write_bytes(torn)
    outcome = run(asked)
    assert outcome.rows == len(MIXED)
    whole = replace(asked, answers=tmp_path / "whole.jsonl")
    run(whole)
    assert without_timing(asked.answers) == without_timing(whole.answers)


def test_a_finished_run_is_not_asked_again(tmp_path: Path, run: Any):
    asked = options(tmp_path, MIXED[:2])
    run(asked)
    before = asked.answers.read_bytes()

    def fail(*_: Any) -> Engine:
        raise AssertionError("nothing is left to be asked")

    again = run_inference(asked, Rank(), opener=fail)
    assert (again.was_finished, again.rows) == (True, 2)
    assert asked.answers.read_bytes() == before
    assert not run(replace(asked, overwrite=True)).was_finished
    assert len(list(read_predictions(asked.answers))) == 2


def test_another_run_is_not_gone_on_with(run: Any, tmp_path: Path):
    asked = options(tmp_path, MIXED[:2])
    run(asked)
    for change, told in (
        ({"temperature": 0.5}, "temperature was 0.0, now 0.5"),
        ({"thresholds": (0.1,)}, r"thresholds was \[\], now \[0.1\]"),
        ({"limit": 1}, "limit was None, now 1"),
        ({"regions": False}, "regions was True, now False"),
    ):
        with pytest.raises(MedPLIBError, match=told):
            run(replace(asked, **change))
    with pytest.raises(MedPLIBError, match=r"data.sha256 was .*, now "):
        run(options(tmp_path, MIXED[:3]))
    journal_path(asked.answers).unlink()
    with pytest.raises(MedPLIBError, match="no run's journal beside it"):
        run(options(tmp_path, MIXED[:2]))


def test_rows_of_other_questions_are_noticed(run: Any, tmp_path: Path):
    asked = options(tmp_path, MIXED[:3])
    run(asked)
    journal = read_journal(asked.answers)
    assert journal is not None
    replace(journal, state="running").write(asked.answers)
    lines = asked.answers.read_text().splitlines(keepends=True)
    asked.answers.write_text("".join([lines[1], lines[0]]))
    with pytest.raises(MedPLIBError, match=r"answers .*-vqa-01 where .*-vqa-00 is asked"):
        run(asked)
    asked.answers.write_text("".join([*lines, lines[0]]))
    with pytest.raises(MedPLIBError, match="more answers than there are questions"):
        run(asked)


# --- several processes ----------------------------------------------------------------------------------------------


def test_parts_are_joined_in_order(run: Any, tmp_path: Path):
    asked = options(tmp_path, [*MIXED[:2], two_questions("two", "Does this image show a kidney?"), *MIXED[2:6]])
    places = [Rank(rank, 3, rank, 3) for rank in range(3)]
    for place in (places[1], places[2]):
        part = run(asked, place)
        assert part.answers == place.part_path(asked.answers)
    outcome = run(asked, places[0])
    single = replace(asked, answers=tmp_path / "single.jsonl")
    run(single)
    assert (outcome.rows, outcome.answers) == (8, asked.answers)
    assert without_timing(asked.answers) == without_timing(single.answers)
    assert not list(tmp_path.glob("*part*"))
    assert run(asked).was_finished  # by how many processes does not matter any more


def test_parts_of_another_number_of_processes_are_refused(run: Any, tmp_path: Path):
    asked = options(tmp_path, MIXED[:3])
    run(asked, Rank(1, 2, 1, 2))
    with pytest.raises(MedPLIBError, match="another number of processes"):
        run(asked)
    assert run(replace(asked, overwrite=True)).rows == 3
    assert not list(tmp_path.glob("*part*"))


def test_a_process_that_is_gone_is_not_waited_for(run: Any, tmp_path: Path):
    asked = options(tmp_path, MIXED[:3])
    run(asked, Rank(1, 2, 1, 2))
    part = Rank(1, 2).part_path(asked.answers)
    journal = read_journal(part)
    assert journal is not None
    replace(journal, state="running").write(part)
    with pytest.raises(MedPLIBError, match="process 1 of 2 ended before its questions did"):
        run(asked, Rank(0, 2, 0, 2))


def test_a_launch_that_contradicts_itself_is_refused(monkeypatch: pytest.MonkeyPatch):
    for name in ("MASTER_ADDR", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for rank, size, expected in (("2", "2", "ranks are counted from 0"), ("x", "2", "must be whole numbers")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(MedPLIBError, match=expected):
            Rank.from_environment()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(MedPLIBError, match="MASTER_ADDR and MASTER_PORT are not set"):
        Rank.from_environment()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert Rank.from_environment(local_rank=1) == Rank(1, 2, 1, 2)


def test_chunks_are_neighbours(run: Any, tmp_path: Path):
    assert [len(chunk(10, 4, index)) for index in range(4)] == [3, 3, 3, 1]
    assert [len(chunk(5, 4, index)) for index in range(4)] == [2, 2, 1, 0]
    asked = options(tmp_path, MIXED[:3], num_chunks=2, chunk_index=1)
    assert [row.question_id for row in rows_of(run(asked))] == [MIXED[2]["id"]]
    bare = [{name: value for name, value in MIXED[0].items() if name != "id"}] * 3
    asked = options(tmp_path, bare, num_chunks=2, chunk_index=1, answers=tmp_path / "bare.jsonl")
    assert [row.question_id for row in rows_of(run(asked))] == [2]


# --- records that cannot be asked -----------------------------------------------------------------------------------


def test_bad_records_become_rows_and_are_counted(run: Any, tmp_path: Path):
    folder = tmp_path / "images"
    shutil.copytree(SAMPLE, folder)
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "small.png").write_bytes((SAMPLE / MIXED[0]["image"]).read_bytes()[:200])
    mask = GROUNDING["conversations"][1]["value"]
    Image.new("L", (5, 5), 255).save(folder / "tiny_mask.png")
    wrong_size = mask[: mask.index("<mask>")] + "<mask>tiny_mask.png</mask>"
    bad = [
        {**VQA, "image": "images/absent.png"},
        {**VQA, "image": "broken.png"},
        {**VQA, "image": "small.png"},
        {**GROUNDING, "conversations": [GROUNDING["conversations"][0], {"from": "gpt", "value": wrong_size}]},
        {**VQA, "image": [VQA["image"], VQA["image"]]},
        {"id": "empty"},
        {**VQA, "conversations": [{"from": "human", "value": "<image>"}, VQA["conversations"][1]]},
    ]
    outcome = run(options(tmp_path, [MIXED[0], *bad, MIXED[1]], images=folder))
    rows = rows_of(outcome)
    assert [row.failed for row in rows] == [False, *[True] * len(bad), False]
    assert outcome.errors == len(bad)
    assert outcome.first_error == rows[1].error
    for row, told in zip(
        rows[1:-1],
        (
            "absent.png does not exist",
            "broken.png",
            "small.png",
            "tiny_mask.png is 5 × 5",
            "2 ",
            "conversations",
            "empty",
        ),
        strict=True,
    ):
        assert told in str(row.error)
        assert (row.text, row.masks, row.finish) == ("", [], "error")


def test_a_record_that_is_no_json_becomes_a_row(run: Any, tmp_path: Path):
    asked = options(tmp_path, [], answer_type="open")
    lines = [json.dumps(MIXED[0]), '{"id": broken}', json.dumps(MIXED[1])]
    asked.data.write_text("\n".join(lines) + "\n")
    rows = rows_of(run(asked))
    assert [row.failed for row in rows] == [False, True, False]
    assert (rows[1].question_id, "line 2" in str(rows[1].error)) == (1, True)
    assert [rows[0].answer_type, rows[2].answer_type, rows[2].question_id] == ["open", "open", MIXED[1]["id"]]


def test_reference_masks_may_be_empty_or_absent(run: Any, tmp_path: Path):
    folder = tmp_path / "images"
    shutil.copytree(SAMPLE, folder)
    Image.new("L", Image.open(SAMPLE / GROUNDING["image"]).size, 0).save(folder / "none.png")
    answer = {"from": "gpt", "value": "It is <SEG>.<mask>none.png</mask>"}
    empty = {**GROUNDING, "conversations": [GROUNDING["conversations"][0], answer]}
    rows = rows_of(run(options(tmp_path, [empty, ABSENT], images=folder)))
    assert not decode_rle((rows[0].gt_masks or [])[0]).any()
    assert rows[1].gt_masks == []


# --- a mask for each grounding question -----------------------------------------------------------------------------


def test_always_mask_decodes_grounding_questions_alone(run: Any, tmp_path: Path):
    asked = options(tmp_path, [VQA, REGION, GROUNDING, ABSENT], thresholds=(0.5,))
    plain = rows_of(run(asked))
    with pytest.raises(MedPLIBError, match="always_mask was False, now True"):
        run(replace(asked, always_mask=True))
    always = rows_of(run(replace(asked, always_mask=True, overwrite=True)))
    assert [row.text for row in always] == [row.text for row in plain]
    assert [len(row.masks) for row in plain] == [0, 0, 1, 0]
    assert [len(row.masks) for row in always] == [0, 0, 1, 1]
    assert plain[2].masks == always[2].masks
    (mask,) = always[3].masks
    assert (mask["spoken"], mask["label"] in always[3].prompt.lower()) == (False, True)
    assert always[3].masks_at == {"0.5": [mask["rle"]]}
    scores = score_predictions(always, samples=0)
    assert scores.overall["false_SEG_rate"].value == 0  # the answer has no <SEG>
    assert scores.overall["false_mask_rate"].value == float(mask["area_px"] > 0)


def request(**more: Any) -> Request:
    question = GROUNDING["conversations"][0]["value"].removeprefix("<image>\n")
    return Request(SAMPLE / GROUNDING["image"], question, **more)


def test_no_mask_is_decoded_for_a_cancelled_request(engine: Engine):
    texts: list[str] = []
    ticket = engine.submit(request(always_mask=True), texts.append)
    while not texts:
        engine.step()
    ticket.cancel()
    while engine.step():
        pass
    answer = ticket.result(0)
    assert (answer.finish, answer.masks) == ("cancelled", [])


def test_a_mask_whose_place_is_cut_off_counts_as_not_asked(engine: Engine):
    (whole,) = engine.ask(request()).masks
    stop = GenerationSettings(stop=("<SEG>",))
    assert engine.ask(request(settings=stop)).masks == []
    (mask,) = engine.ask(request(settings=stop, always_mask=True)).masks
    assert (mask.spoken, mask.label) == (False, whole.label)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_the_wrong_image_folder_is_noticed_at_once(run: Any, tmp_path: Path):
    with pytest.raises(MedPLIBError, match=r"none of the first 8 records .* is .* the folder its paths start from"):
        run(options(tmp_path, RECORDS[:9], images=tmp_path))


def test_in_context_records_are_refused(run: Any, tmp_path: Path):
    image, mask = GROUNDING["image"], next((SAMPLE / "masks").iterdir()).relative_to(SAMPLE)
    record = {"icl_examples": [{"image": image, "mask": str(mask)}], "image": image, "target_mask": str(mask)}
    with pytest.raises(MedPLIBError, match=r"in-context records.*questions are asked about one image"):
        run(options(tmp_path, [record]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": Path("absent.json")}, "the data file absent.json does not exist"),
        ({"model": Path("absent")}, "the checkpoint absent is not a directory"),
        ({"images": Path("absent")}, "the image folder absent is not a directory"),
        ({"thresholds": (0.0,)}, "the mask threshold is 0.0"),
        ({"thresholds": (0.5, 0.5)}, "given twice"),
        ({"top_p": 0.9}, "greedy answers are not drawn"),
        ({"temperature": float("nan")}, "the temperature is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_chunks": 2, "chunk_index": 2}, "the chunk is number 2 of 2"),
        ({"limit": 0}, "limit is 0"),
        ({"no_mask_below": 2.0}, "no_mask_below is 2.0"),
        ({"answers": SAMPLE}, "is a directory"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], told: str):
    with pytest.raises(MedPLIBError, match=told):
        options(tmp_path, MIXED, **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sam_size": 1024}, "--sam_img_size is 1024, but the SAM encoder of .* takes 256"),
        ({"max_length": 4096}, "knows 1024 positions"),
        ({"template": "v9"}, "no conversation template 'v9'"),
        ({"device": "tpu"}, "'tpu' is no device"),
    ],
)
def test_options_that_do_not_fit_the_checkpoint_are_refused(
    run: Any, tmp_path: Path, changes: dict[str, Any], told: str
):
    with pytest.raises(MedPLIBError, match=told):
        run(options(tmp_path, MIXED, **changes))
    assert not (tmp_path / "answers.jsonl").exists()


def test_parts_of_a_native_checkpoint_are_noted(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "merged").symlink_to(NANO)
    parts = {"vision_tower": Path("openai/clip-vit-large-patch14-336"), "sam": Path("absent.pth")}
    with caplog.at_level("INFO"):
        outcome = run(options(tmp_path, [VQA], model=tmp_path / "run", **parts))
    assert (outcome.rows, outcome.errors) == (1, 0)
    assert all(f"{part} was not read: a native checkpoint is whole" in caplog.text for part in parts.values())


def test_what_a_network_lacks_is_refused(tmp_path: Path):
    plain = tiny_config(experts=0, region={"enabled": False})
    for changes, told in (
        ({"moe": True}, "leave --moe_enable out"),
        ({"router": True}, "leave --return_gating_logit out"),
        ({"regions": True}, "leave --region_fea_adapter out"),
    ):
        with pytest.raises(MedPLIBError, match=told):
            check_config(options(tmp_path, MIXED, **changes), plain)
    check_config(options(tmp_path, MIXED), plain)
    check_config(options(tmp_path, MIXED, moe=True, router=True, regions=True), tiny_config())


# --- the command ----------------------------------------------------------------------------------------------------


def command(folder: Path, *more: str) -> list[str]:
    (folder / "data.json").write_text(json.dumps(MIXED))
    return [
        f"--version={NANO}",
        f"--val_data_path={folder / 'data.json'}",
        f"--image_folder={SAMPLE}",
        f"--answers-file={folder / 'answers.jsonl'}",
        *more,
    ]


def test_published_flags_mean_what_they_did(tmp_path: Path):
    chosen, local_rank = parse_flags(
        command(
            tmp_path,
            *("--answer_type=open", "--eval_seg", "--eval_vqa", "--moe_enable", "--region_fea_adapter", "--vis_mask"),
            *("--num-chunks=4", "--chunk-idx=2", "--precision=bf16", "--sam_img_size=256", "--model_max_length=1024"),
            *("--temperature=0.2", "--top_p=0.9", "--num_beams=1", "--return_gating_logit", "--local_rank=1"),
        )
    )
    assert local_rank == 1
    assert chosen == options(
        tmp_path,
        MIXED,
        device="auto",
        answer_type="open",
        answer_scores=True,
        segmentation_scores=True,
        moe=True,
        regions=True,
        pictures=tmp_path / "answers.pictures",
        num_chunks=4,
        chunk_index=2,
        precision="bf16",
        sam_size=256,
        max_length=1024,
        temperature=0.2,
        top_p=0.9,
        router=True,
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--num_beams=4"], "--num_beams is 4"),
        (["--icl_enable"], "in-context records, which show solved examples as further images"),
        (["--icl_mask_mode=overlay"], "in-context records"),
        (["--precision=fp16"], "fp16 is not offered"),
        (["--vis_save_path=x"], "give --vis_mask too"),
        (["--cpu_only", "--device=cuda"], "contradict each other"),
    ],
)
def test_flags_that_cannot_apply_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
):
    assert vqa_infer.main(command(tmp_path, *flags)) == 2
    assert told in capsys.readouterr().err


def test_the_command_tells_scores_and_failures(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("model.eval.run.run_inference.__defaults__", (None, lambda *_: engine))
    flags = command(tmp_path, "--eval_seg", "--eval_vqa", "--cpu_only")
    assert vqa_infer.main(flags) == 0
    said = capsys.readouterr().out
    assert f"wrote {len(MIXED)} answers" in said
    assert "yes/no accuracy" in said
    assert "miou: 0." in said
    records = [*MIXED[:2], {**VQA, "image": "images/absent.png"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    assert vqa_infer.main([*flags, "--overwrite"]) == 3
    said = capsys.readouterr().out
    assert "1 of them could not be given, the first because" in said
    assert "absent.png does not exist" in said
    assert vqa_infer.main(flags) == 3  # finished, and still not whole
    assert "finished already" in capsys.readouterr().out


def test_chunks_have_files_of_their_own_by_default(tmp_path: Path):
    assert [parse_flags(command(tmp_path, *more))[0].always_mask for more in ((), ("--always_mask",))] == [False, True]
    flags = [flag for flag in command(tmp_path) if not flag.startswith("--answers-file")]
    assert parse_flags(flags)[0].answers == Path("runs/infer/medplib-nano/data.jsonl")
    chunked, _ = parse_flags([*flags, "--num-chunks=3", "--chunk-idx=1"])
    assert chunked.answers == Path("runs/infer/medplib-nano/data.chunk-1-of-3.jsonl")
