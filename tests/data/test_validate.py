from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.data.validate import check_file
from model.errors import MedPLIBError


def found(report: Any) -> list[tuple[int, str]]:
    return sorted((problem.record, problem.kind) for problem in report.problems)


def test_a_sound_file_has_no_problem_and_counts_what_it_holds(folder: Any) -> None:
    records = [folder.vqa(id=1), folder.region(id=2, extra="key"), folder.grounding(id=3), folder.vqa(id=4)]
    report = check_file(folder.write_records(records), folder.root)
    assert report.ok
    assert (report.problems, report.total, report.bad_records) == ([], 4, ())
    assert report.counts["tasks"] == {"grounding": 1, "region": 1, "vqa": 2}
    assert report.counts["modalities"] == {"ct": 4}
    assert "4 records, no problems" in report.format()


def test_masks_that_are_soft_full_or_inverted_are_warned_about(folder: Any) -> None:
    soft = np.zeros((12, 16), np.uint8)
    soft[3:8, 4:12] = np.arange(40).reshape(5, 8) * 6
    images = {"full": np.full((12, 16), 255, np.uint8), "soft": soft, "inverted": np.where(soft > 100, 0, 1)}
    images["sound"] = np.where(soft > 100, 1, 0)
    for name, values in images.items():
        Image.fromarray(values.astype(np.uint8)).save(folder.root / f"masks/{name}.png")
    Image.fromarray(images["sound"].astype(np.uint8) * 255).save(folder.root / "masks/smeared.jpg")
    names = [*(f"{name}.png" for name in images), "smeared.jpg"]
    records = [folder.record("<image>\nSegment it.", f"<SEG><mask>masks/{name}</mask>", id=name) for name in names]
    records.append(folder.record("<image>\n<region>masks/full.png</region>?", "a liver", id="region"))
    report = check_file(folder.write_records(records), folder.root)
    assert report.ok
    expected = ["full_mask", "soft_mask", "inverted_mask", "soft_mask", "full_region"]
    assert [problem.kind for problem in report.problems] == expected
    assert "smeared.jpg is a JPEG: what is above half" in report.problems[3].message


def test_all_problems_come_at_once_with_record_numbers(folder: Any) -> None:
    folder.write_mask("masks/small.png", size=(4, 5), box=(0, 0, 2, 2))
    folder.write_mask("masks/empty.png", box=(0, 0, 0, 0))
    (folder.root / "masks/broken.png").write_bytes(b"\x89PNG\r\n broken")
    (folder.root / "images/broken.png").write_bytes(b"not an image")
    segment = "<image>\nSegment it."
    records = [
        folder.vqa(image="images/none.png"),
        folder.vqa(image=folder.image.removesuffix(".png")),
        folder.vqa(image="images/broken.png"),
        folder.record(segment, "<SEG><mask>masks/none.png</mask>"),
        folder.record(segment, "<SEG>"),
        folder.record(segment, f"it<mask>{folder.mask}</mask>"),
        folder.record(segment, "<SEG><mask>masks/small.png</mask>"),
        folder.record(segment, "<SEG><mask>masks/empty.png</mask>"),
        folder.record(segment, "<SEG><mask>masks/broken.png</mask>"),
        folder.record("<image>\n<region>masks/empty.png</region>?", "a liver"),
        {"id": "r", "image": folder.image, "conversations": [{"from": "gpt", "value": "Hi"}]},
        {"id": "r", "image": folder.image, "conversations": []},
        folder.record("no image tag", ""),
        folder.vqa(),
    ]
    for number, record in enumerate(records):
        record["id"] = f"id-{number}"
    report = check_file(folder.write_records(records), folder.root, workers=3)
    assert found(report) == [
        (0, "missing_image"),
        (1, "suffix_missing"),
        (2, "unreadable_image"),
        (3, "missing_mask"),
        (4, "seg_without_mask"),
        (5, "mask_without_seg"),
        (6, "size_mismatch"),
        (7, "empty_mask"),
        (8, "unreadable_mask"),
        (9, "empty_region"),
        (10, "image_count"),
        (10, "turn_order"),
        (10, "turn_order"),
        (11, "empty_conversation"),
        (12, "empty_answer"),
        (12, "image_count"),
    ]
    assert not report.ok
    assert report.bad_records == (0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    text = report.format()
    for number in range(13):
        assert f"record {number} (id-{number}): " in text
    assert "4 × 5" in text
    assert "12 records unusable" in text
    schema_only = check_file(report.path, folder.root, check_pixels=False)
    assert not {"unreadable_image", "size_mismatch", "empty_mask"} & {problem.kind for problem in schema_only.problems}


def test_a_repaired_record_fails_the_check_a_repeated_id_not(folder: Any) -> None:
    repeated = check_file(folder.write_records([folder.vqa(), folder.vqa()]), folder.root)
    assert [(problem.record, problem.kind, problem.severity) for problem in repeated.problems] == [
        (1, "duplicate_id", "warning")
    ]
    assert repeated.ok
    repaired = check_file(folder.write_records([folder.vqa(image=folder.image[:-4])]), folder.root)
    assert not repaired.ok
    assert repaired.bad_records == ()


def test_a_broken_line_is_one_problem_among_others(folder: Any) -> None:
    path = folder.root / "data.jsonl"
    path.write_text(json.dumps(folder.vqa(id="a")) + "\n{oops}\n" + json.dumps(folder.vqa(id="b", image="x")) + "\n")
    report = check_file(path, folder.root)
    assert found(report) == [(1, "invalid_json"), (2, "missing_image")]


def test_long_files_stream_in_order_with_progress(folder: Any) -> None:
    records = [folder.vqa(id=number, image=folder.image if number % 100 else "gone.png") for number in range(1200)]
    calls: list[tuple[int, int]] = []
    report = check_file(
        folder.write_records(records), folder.root, workers=4, progress=lambda done, total: calls.append((done, total))
    )
    assert [problem.record for problem in report.problems] == list(range(0, 1200, 100))
    assert calls[-1] == (1200, 1200)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert "1200 records, 12 problems" in report.format()


def test_what_is_no_data_file_is_refused(folder: Any) -> None:
    with pytest.raises(MedPLIBError, match="does not exist"):
        check_file(folder.write_records([]), folder.root / "nowhere")
    (folder.root / "bad.json").write_text('[{"a": 1},]')
    with pytest.raises(MedPLIBError, match="comma"):
        check_file(folder.root / "bad.json", folder.root)


def test_a_file_without_records_is_not_sound(folder: Any) -> None:
    report = check_file(folder.write_records([]), folder.root)
    assert not report.ok and "0 records" in report.format()
