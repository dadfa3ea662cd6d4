from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from model.data.builders.vqa import CsvRows
from model.data.builders.vqa_rows import pmc_vqa, question_record
from tests.data import native_samples as native
from tests.data.built import build, findings, refused, said, trains


def built(
    name: str, source: Path, out: Path, *words: object, root: Path | None = None
) -> dict[str, list[dict[str, Any]]]:
    """The records of every file that comes out, all of them trained on."""
    assert build("vqa", "--set", name, "--source", source, "--out", out, *words) == 0
    files = sorted(path for path in out.glob("*.json") if not path.name.startswith("report_"))
    return {path.stem: trains(path, root or source) for path in files}


def test_vqa_rad_is_split_by_its_phrases(tmp_path: Path) -> None:
    made = built("vqa-rad", native.vqa_rad(tmp_path / "raw"), tmp_path / "out")
    assert set(made) == {"train", "test"}
    assert [record["answer_type"] for record in made["train"]] == ["closed", "open", "open"]
    assert [said(record)[1] for record in made["train"]] == ["Yes", "Right hemisphere", "4"]
    assert [record["answer_type"] for record in made["test"]] == ["closed", "open"]
    assert said(made["train"][0])[0] == "<image>\nAre regions infarcted?"
    first = made["train"][0]
    assert (first["id"], first["image"]) == ("vqa-rad-1", "VQA_RAD Image Folder/synpic54610.jpg")
    (lost,) = findings(tmp_path / "out", "vqa")
    assert (lost["kind"], lost["record"], lost["dropped"]) == ("missing_image", 5, True)


def test_vqa_rad_in_two_files_is_known_too(tmp_path: Path) -> None:
    source = native.vqa_rad(tmp_path / "raw")
    rows = json.loads((source / "VQA_RAD Dataset Public.json").read_text())
    (source / "VQA_RAD Dataset Public.json").unlink()
    (source / "VQA_RAD Image Folder").rename(source / "images")
    plain = [{key: value for key, value in row.items() if key != "phrase_type"} for row in rows]
    native.write_json(source / "trainset.json", plain[:2])
    native.write_json(source / "testset.json", plain[3:4])
    made = built("vqa-rad", source, tmp_path / "out")
    assert {name: len(records) for name, records in made.items()} == {"train": 2, "test": 1}
    assert made["test"][0]["image"] == "images/synpic1.jpg"


@pytest.mark.parametrize(("language", "train", "test"), [("en", 2, 1), ("zh", 1, 1), ("all", 3, 2)])
def test_slake_in_the_language_wanted(tmp_path: Path, language: str, train: int, test: int) -> None:
    source = native.slake(tmp_path / "raw")
    made = built("slake", source, tmp_path / "out", "--language", language)
    assert (len(made["train"]), len(made["test"])) == (train, test)
    assert ("validation" in made) == (language != "zh")
    if language == "en":
        assert [record["modality"] for record in made["train"]] == ["mr", "ct"]
        assert [record["answer_type"] for record in made["train"]] == ["open", "closed"]
        assert made["test"][0]["modality"] == "x_ray"


def test_path_vqa_comes_from_pickles(tmp_path: Path) -> None:
    made = built("pathvqa", native.path_vqa(tmp_path / "raw"), tmp_path / "out")
    assert set(made) == {"train", "validation", "test"}
    first, second = made["validation"]
    assert (first["image"], said(first)[1]) == ("images/val/val_0422.jpg", "in the canals of hering")
    assert (second["answer_type"], said(second)[1], second["kind"]) == ("closed", "no", "where")


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = native.path_vqa(tmp_path / "raw")

    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    (source / "qas" / "train_vqa.pkl").write_bytes(pickle.dumps([Harm()]))
    told = refused(capsys, "vqa", "--set", "pathvqa", "--source", source, "--out", tmp_path / "out")
    assert "is no pickle of plain lists and mappings (it asks for pathlib" in told
    assert not (tmp_path / "harm").exists()


def test_images_inside_parquet_become_files(tmp_path: Path) -> None:
    source, out = native.path_vqa_parquet(tmp_path / "raw", rows=5), tmp_path / "out"
    made = built("pathvqa", source, out, root=out)
    assert {name: len(records) for name, records in made.items()} == {"train": 5, "validation": 5, "test": 5}
    assert [record["answer_type"] for record in made["test"]] == ["closed", "open", "closed", "open", "closed"]
    assert [said(record)[0] for record in made["test"]] == [f"<image>\nis it {number}?" for number in range(5)]
    (picture,) = (out / "images").iterdir()
    assert {record["image"] for records in made.values() for record in records} == {f"images/{picture.name}"}


def test_imageclef_of_several_years_comes_together(tmp_path: Path) -> None:
    made = built("imageclef", native.imageclef(tmp_path / "raw"), tmp_path / "out")
    assert {name: len(records) for name, records in made.items()} == {"train": 3, "validation": 2, "test": 2}
    modality, weighting, organs = made["train"]
    assert modality["image"] == "ImageClef-2019-VQA-Med-Training/Train_images/synpic41148.jpg"
    assert (said(weighting)[0], weighting["answer_type"]) == ("<image>\nis this a t1 weighted image?", "closed")
    assert said(organs)[1] == "lung, mediastinum, pleura"
    assert organs["answers"] == ["lung, mediastinum, pleura", "spine and contents"]
    assert sorted(said(record)[1] for record in made["test"]) == ["Yes", "skull and contents"]
    assert {row["kind"] for row in findings(tmp_path / "out", "vqa")} == {"bad_row", "missing_image"}
    assert len({record["id"] for records in made.values() for record in records}) == 7


def test_pmc_vqa_shows_its_choices(tmp_path: Path) -> None:
    made = built("pmc-vqa", native.pmc_vqa(tmp_path / "raw"), tmp_path / "out")
    assert set(made) == {"train", "test_2"}
    first, second = made["train"]
    options = "Diffuse uptake pattern; Focal uptake pattern; No uptake pattern; Cannot determine"
    question = "What is the uptake pattern in the breast?"
    assert said(first) == (f"<image>\n{question} Answer with one of these: {options}.", "Focal uptake pattern")
    assert said(second)[0] == '<image>\nWhich, "if any",\nlobe? Answer with one of these: Left; Right.'
    (third,) = made["test_2"]
    assert (third["image"], said(third)[1]) == ("figures/PMC8253797_Fig4_41.jpg", "Blue")
    assert [row["kind"] for row in findings(tmp_path / "out", "vqa")] == ["bad_row", "bad_row"]


def test_omnimedvqa_questions_are_those_of_evaluation(tmp_path: Path) -> None:
    source = native.omnimedvqa(tmp_path / "raw")
    made = built("omnimedvqa", source, tmp_path / "out")
    assert set(made) == {"open_access"}  # of the other half no image is there
    first, second = made["open_access"]
    assert said(first)[0].endswith("Answer with one of these: PET scan; CT scan; Blood test; Fundus imaging.")
    assert (first["modality"], second["modality"]) == ("fundus", "x_ray")
    assert first["image"] == "OmniMedVQA/Images/ACRIMA/Im553_g_ACRIMA.png"
    assert {record["answer_type"] for record in made["open_access"]} == {"closed"}


def test_paths_can_start_from_the_folder_of_another_set(tmp_path: Path) -> None:
    source, root = native.vqa_rad(tmp_path / "raw"), tmp_path / "SAMed2D_v1"
    root.mkdir()
    made = built("vqa-rad", source, tmp_path / "out", "--images-root", root, root=root)
    assert made["train"][0]["image"] == "../raw/VQA_RAD Image Folder/synpic54610.jpg"


def test_a_folder_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slake = native.slake(tmp_path / "slake")
    out = tmp_path / "out"
    told = refused(capsys, "vqa", "--set", "vqa-rad", "--source", slake / "imgs", "--out", out)
    assert 'does not look like vqa-rad; expected "VQA_RAD Dataset Public.json"' in told
    told = refused(capsys, "vqa", "--set", "slake", "--source", tmp_path / "none", "--out", out)
    assert "is no folder; give the folder of slake" in told
    rows = json.loads((slake / "train.json").read_text())
    native.write_json(slake / "train.json", [{"caption": row["question"]} for row in rows])
    told = refused(capsys, "vqa", "--set", "slake", "--source", slake, "--out", out)
    assert "train.json is not of the form that slake has (it has no qid)" in told
    assert not out.exists()


def test_rows_of_a_csv_are_found_from_the_middle(tmp_path: Path) -> None:
    lines = "".join(f'{number},"a\n""{number}"""\r\n' for number in range(2500))
    (tmp_path / "rows.csv").write_text(f"\ufeffnumber,text\r\n{lines}\n", newline="")
    rows = CsvRows(tmp_path / "rows.csv")
    assert len(rows) == 2500
    found = list(rows.between(1998, 2003))
    assert [row["number"] for row in found] == ["1998", "1999", "2000", "2001", "2002"]
    assert found[0]["text"] == 'a\n"1998"'


def test_the_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    source = native.path_vqa(tmp_path / "raw")
    for workers in (1, 2):
        out = tmp_path / str(workers)
        assert build("vqa", "--set", "pathvqa", "--source", source, "--out", out, "--workers", workers) == 0
    for name in ("train.json", "validation.json", "test.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_mac_leaves_its_files_everywhere(tmp_path: Path) -> None:
    clef, omni = native.imageclef(tmp_path / "clef"), native.omnimedvqa(tmp_path / "omni")
    for source, pattern in ((clef, "*.txt"), (clef, "*.jpg"), (omni, "*.json")):
        for path in sorted(source.rglob(pattern)):
            for left in (path, source / "__MACOSX" / path.relative_to(source)):
                left.parent.mkdir(parents=True, exist_ok=True)
                left.with_name(f"._{left.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + bytes(20))
    made = built("imageclef", clef, tmp_path / "o1")
    assert {name: len(records) for name, records in made.items()} == {"train": 3, "validation": 2, "test": 2}
    assert len(built("omnimedvqa", omni, tmp_path / "o2")["open_access"]) == 2


def test_an_empty_cell_is_no_answer_none(tmp_path: Path) -> None:
    source = native.slake(tmp_path / "raw")
    row = json.loads((source / "train.json").read_text())[0]
    odd = [{"answer": None}, {"answer": float("nan")}, {"answer": " "}, {"question": None}, {"question": "  "}]
    rows = [row, *({**row, **change, "qid": 100 + number} for number, change in enumerate(odd))]
    (source / "train.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    made = built("slake", source, tmp_path / "out")
    assert [record["id"] for record in made["train"]] == ["slake-0"]
    kinds = [row["kind"] for row in findings(tmp_path / "out", "vqa")]
    assert kinds == ["empty_answer"] * 3 + ["bad_row"] * 2


@pytest.mark.parametrize("answer", ["Yes", "no.", "YES!", "No,", " yes ; "])
def test_yes_and_no_are_closed_however_written(answer: str) -> None:
    assert question_record(1, "a.png", "Is it?", answer)["answer_type"] == "closed"
    assert question_record(1, "a.png", "Is it?", f"{answer} nodule")["answer_type"] == "open"


def test_images_may_lie_in_one_more_folder(tmp_path: Path) -> None:
    def wrap(folder: Path, name: str) -> None:
        folder.rename(folder.with_name("moved"))
        folder.mkdir()
        folder.with_name("moved").rename(folder / name)

    rad, slake, pmc = native.vqa_rad(tmp_path / "1"), native.slake(tmp_path / "2"), native.pmc_vqa(tmp_path / "3")
    path_vqa = native.path_vqa(tmp_path / "4")
    wrap(rad / "VQA_RAD Image Folder", "VQA_RAD Image Folder")
    wrap(slake / "imgs", "imgs")
    wrap(pmc / "images", "images")
    (pmc / "figures").rename(tmp_path / "figures")
    (pmc / "images_2").mkdir()
    (tmp_path / "figures").rename(pmc / "images_2" / "figures")
    wrap(path_vqa / "images" / "train", "train")
    for picture in path_vqa.rglob("val_*.jpg"):
        picture.rename(picture.with_suffix(".JPEG"))
    sizes = {
        name: [len(records) for records in built(name, source, tmp_path / name).values()]
        for name, source in (("vqa-rad", rad), ("slake", slake), ("pmc-vqa", pmc), ("pathvqa", path_vqa))
    }
    assert sizes == {"vqa-rad": [2, 3], "slake": [1, 2, 1], "pmc-vqa": [1, 2], "pathvqa": [2, 2, 2]}


def test_the_answer_of_pmc_vqa_may_be_the_text_of_a_choice() -> None:
    row = {"Figure_path": "a.jpg ", "Question": "Which view?", "Answer": "Axial"}
    row |= {"Choice A": " A:Coronal ", "Choice B": " B:Axial ", "Choice C": "", "Choice D": ""}
    record = pmc_vqa(row)
    assert (said(record)[1], record["image"]) == ("Axial", "a.jpg")
    assert said(pmc_vqa({**row, "Answer": " a: "}))[1] == "Coronal"
    with pytest.raises(ValueError, match="'Both' is not one of the choices"):
        pmc_vqa({**row, "Answer": "Both"})


def test_question_files_are_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = native.slake(tmp_path / "raw")
    before = (source / "train.json").read_bytes()
    for more in ((), ("--overwrite",)):
        told = refused(capsys, "vqa", "--set", "slake", "--source", source, "--out", source, *more)
        assert "holds the files to be built from" in told
    assert (source / "train.json").read_bytes() == before
    assert sorted(path.name for path in source.iterdir()) == ["imgs", "test.json", "train.json", "validate.json"]
