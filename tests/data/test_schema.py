from __future__ import annotations

import copy
import json
import unicodedata
from typing import Any

import pytest

from model.data.builders.published import Vetting
from model.data.schema import Sample, inspect_record, modality_of, parse_record
from model.errors import MedPLIBError
from model.eval.questions import references_of


def texts(sample: Sample) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in sample.turns]


def kinds(raw: Any, folder: Any) -> list[str]:
    return [finding.kind for finding in inspect_record(raw, folder.root)[1]]


def test_a_question_about_an_image(folder: Any) -> None:
    sample = parse_record(folder.vqa(), folder.root)
    assert texts(sample) == [("human", "<image>\nWhich modality is this?"), ("gpt", "CT")]
    assert sample.images == (folder.root / folder.image,)
    assert (sample.task, sample.modality, sample.answer_type, sample.id) == ("vqa", "ct", "open", "r")
    assert sample.regions == sample.masks == ()


@pytest.mark.parametrize(("told", "meant"), [("CLOSED ", "closed"), (" ", None), (None, None)])
def test_an_answer_type_is_read_in_any_spelling(folder: Any, told: Any, meant: str | None) -> None:
    assert parse_record(folder.vqa(answer_type=told), folder.root).answer_type == meant


def test_paths_leave_the_text_and_keep_its_spaces(folder: Any) -> None:
    sample = parse_record(folder.grounding(), folder.root)
    assert texts(sample)[1] == ("gpt", "Sure, it is <SEG>.")
    assert sample.masks == (folder.root / folder.mask,)
    assert (sample.task, sample.segment_image) == ("grounding", 0)
    region = parse_record(folder.region(), folder.root)
    assert texts(region)[0] == ("human", "<image>\nWhat is in <region></region>?")
    assert (region.regions, region.region_images, region.task) == ((folder.root / folder.mask,), (0,), "region")


def test_reading_twice_gives_the_same_and_changes_nothing(folder: Any) -> None:
    raw = folder.grounding()
    before = copy.deepcopy(raw)
    assert parse_record(raw, folder.root) == parse_record(raw, folder.root)
    assert raw == before


def test_several_masks_regions_images_and_rounds(folder: Any) -> None:
    second = "masks/second.png"
    folder.write_mask(second)
    raw = {
        "image": [folder.image, folder.other],
        "conversations": [
            {
                "from": "human",
                "value": f"<image> with <region>{folder.mask}</region> and <region> {second} </region>, "
                f"<image> with <region>{second}</region>",
            },
            {"from": "gpt", "value": f"<SEG><mask>{folder.mask}</mask> and <SEG><mask>{second}</mask>."},
            {"from": "human", "value": f"Again <region>{folder.mask}</region>"},
            {"from": "gpt", "value": f"<SEG><mask>{second}</mask>"},
        ],
    }
    sample = parse_record(raw, folder.root)
    marker = "<region></region>"
    assert texts(sample)[0][1] == f"<image> with {marker} and {marker}, <image> with {marker}"
    assert texts(sample)[1][1] == "<SEG> and <SEG>."
    assert sample.region_images == (0, 0, 1, 1)
    assert [path.name for path in sample.regions] == [
        folder.mask.split("/")[1],
        "second.png",
        "second.png",
        folder.mask.split("/")[1],
    ]
    assert [path.name for path in sample.masks] == [folder.mask.split("/")[1], "second.png", "second.png"]
    assert (sample.segment_image, sample.modality) == (1, "x_ray")


def test_a_region_named_before_its_image_belongs_to_the_first(folder: Any) -> None:
    raw = folder.record(f"In <region>{folder.mask}</region> what is it? <image>", "A liver.")
    assert parse_record(raw, folder.root).region_images == (0,)


def test_a_missing_suffix_is_mended_and_reported(folder: Any) -> None:
    raw = folder.grounding(image=folder.image.removesuffix(".png"))
    raw["conversations"][1]["value"] = f"<SEG><mask>{folder.mask.removesuffix('.png')}</mask>"
    sample, findings = inspect_record(raw, folder.root)
    assert [(finding.kind, finding.severity) for finding in findings] == [("suffix_missing", "repaired")] * 2
    assert sample is not None
    assert (sample.images, sample.masks) == ((folder.root / folder.image,), (folder.root / folder.mask,))
    assert len(sample.repairs) == 2


def test_a_merged_mask_may_be_put_together_from_its_instances(folder: Any) -> None:
    merged = "masks_merged/ct_00--Set--case_1--x_0001--0003_merged.png"
    raw = folder.record("<image>\nSegment the liver.", f"<SEG><mask>{merged}</mask>")
    assert parse_record(raw, folder.root).masks == (folder.root / merged,)
    (folder.root / folder.mask).unlink()
    assert kinds(raw, folder) == ["missing_mask"]


def test_text_only_numbers_and_captions_are_legal(folder: Any) -> None:
    text_only = folder.record("What is a CT?", "A scan.", image=None)
    sample = parse_record(text_only, folder.root)
    assert (sample.images, sample.segment_image, sample.modality, sample.task) == ((), -1, None, "vqa")
    assert texts(parse_record(folder.record("<image>\nHow many?", 3), folder.root))[1] == ("gpt", "3")
    assert parse_record(folder.record("<image>", "A CT of the abdomen."), folder.root).task == "caption"
    assert parse_record(folder.vqa(task="grounding", unknown_key=1), folder.root).task == "grounding"


def test_llava_med_s_spelling_is_understood(folder: Any) -> None:
    record = folder.record("<image>", "A CT of the abdomen.")
    record["conversatons"] = record.pop("conversations")
    assert parse_record(record, folder.root).turns[1].text == "A CT of the abdomen."


NAN = float("nan")
IMAGE = "images/ct_00--Set--case_1--x_0001.png"
MASK = "masks/ct_00--Set--case_1--x_0001--0003_000.png"


def turns(*values: tuple[str, Any]) -> dict[str, Any]:
    return {"image": IMAGE, "conversations": [{"from": role, "value": value} for role, value in values]}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (turns(("human", "<image>?"), ("gpt", "<SEG>")), ["seg_without_mask"]),
        (turns(("human", "<image>?"), ("gpt", f"it<mask>{MASK}</mask>")), ["mask_without_seg"]),
        (turns(("human", "<image>?"), ("gpt", f"<SEG><SEG><mask>{MASK}</mask>")), ["seg_without_mask"]),
        (turns(("human", "<image>?"), ("gpt", "<SEG><mask>masks/none.png</mask>")), ["missing_mask"]),
        (turns(("human", "<image>?"), ("gpt", f"<SEG><mask>{MASK}")), ["broken_tag", "seg_without_mask"]),
        (turns(("human", "<image><region>masks/none.png</region>?"), ("gpt", "x")), ["missing_region"]),
        (turns(("human", "<image><region></region>?"), ("gpt", "x")), ["broken_tag"]),
        (turns(("human", f"<image><region>{MASK}?"), ("gpt", "x")), ["broken_tag"]),
        (turns(("human", "<image> <SEG>?"), ("gpt", "x")), ["misplaced_tag"]),
        (turns(("human", "<image>?"), ("gpt", f"<region>{MASK}</region>")), ["misplaced_tag"]),
        (turns(("gpt", "Hi"), ("human", "<image>?"), ("gpt", "x")), ["turn_order"]),
        (turns(("human", "<image>?")), ["turn_order"]),
        (turns(("human", "<image>?"), ("robot", "x")), ["turn_order"]),
        (turns(("human", "<image>?"), ("gpt", " ")), ["empty_answer"]),
        (turns(("human", "<image>?"), ("gpt", None)), ["empty_answer"]),
        (turns(("human", "<image>?"), ("gpt", "x"), ("human", ""), ("gpt", "x")), ["empty_question"]),
        (turns(("human", "what?"), ("gpt", "x")), ["image_count"]),
        ({**turns(("human", f"<region>{MASK}</region>?"), ("gpt", "x")), "image": None}, ["missing_image"]),
        (turns(("human", "<image><image>?"), ("gpt", "x")), ["image_count"]),
        (turns(), ["empty_conversation"]),
        ({"image": IMAGE}, ["empty_conversation"]),
        ({**turns(("human", "<image>?"), ("gpt", "x")), "image": "images/none.png"}, ["missing_image"]),
        ({**turns(("human", "<image>?"), ("gpt", "x")), "image": 7}, ["bad_field"]),
        ({**turns(("human", "<image>?"), ("gpt", "x")), "image": "i" * 400}, ["missing_image"]),
        ({"image": IMAGE, "conversations": ["hello", 3]}, ["bad_field"]),
        ([1, 2], ["bad_field"]),
        *(
            (turns(("human", "<image>?"), ("gpt", value)), ["bad_field"])
            for value in (NAN, 1e999, 10**400, True, ["x"], {"a": 1})
        ),
        (turns(("human", ["<image>?"]), ("gpt", "x")), ["bad_field", "image_count"]),
        (turns(("human", "<image>?"), ("gpt", "half \ud800")), ["bad_field"]),
        *(
            ({**turns(("human", "<image>?"), ("gpt", "x")), "image": name}, ["missing_image"])
            for name in ("/", "..", "\0")
        ),
        *(({**turns(("human", "<image>?"), ("gpt", "x")), key: NAN}, ["bad_field"]) for key in ("id", "image", "task")),
        ({**turns(("human", "<image>?"), ("gpt", "x")), "answer_type": ["open"]}, ["bad_field"]),
        (
            {**turns(("human", "<image>?"), ("gpt", "x")), "image": [IMAGE, {"bytes": b"x"}]},
            ["missing_image", "image_count"],
        ),
        (turns(("human", "<image>?"), ("gpt", "a</s> b")), ["special_token"]),
        (turns(("human", "<image>?"), ("gpt", "<unk> and <s>")), ["special_token"]),
        (turns(("human", "<image>?"), ("gpt", "an <image>")), ["misplaced_tag"]),
        (turns(("human", "<image>?"), ("gpt", "\u200b")), ["empty_answer"]),
    ],
)
def test_each_fault_is_named(folder: Any, raw: Any, expected: list[str]) -> None:
    assert set(kinds(raw, folder)) == set(expected)
    with pytest.raises(MedPLIBError):
        parse_record(raw, folder.root)


def test_all_faults_of_a_record_come_in_one_sentence(folder: Any) -> None:
    raw = {"id": 5, **turns(("human", "what?"), ("gpt", "<SEG>")), "image": "images/none.png"}
    with pytest.raises(MedPLIBError) as caught:
        parse_record(raw, folder.root)
    assert str(caught.value).startswith("record 5: ")
    for part in ("images/none.png does not exist", "1 <SEG> and 0 <mask>", "0 <image> for 1 images"):
        assert part in str(caught.value)


def test_in_context_records_in_both_layouts(folder: Any) -> None:
    listed = {
        "image": folder.other,
        "target_mask": folder.mask,
        "icl_examples": [{"image": folder.image, "mask": folder.mask}],
        "conversations": [],
    }
    flat = {"image1": folder.image, "mask1": folder.mask, "image2": folder.other, "mask2": folder.mask}
    for raw in (listed, flat):
        sample = parse_record(raw, folder.root)
        assert [path.name for path in sample.images] == [name.split("/")[1] for name in (folder.image, folder.other)]
        assert [example.mask for example in sample.examples] == [folder.root / folder.mask]
        assert sample.masks == (folder.root / folder.mask,)
        assert (sample.segment_image, sample.task, sample.modality) == (1, "grounding", "x_ray")
        assert texts(sample)[0][1].count("<image>") == 2
    own_words = {**listed, "conversations": turns(("human", "Ref <image> then <image>"), ("gpt", "Sure <SEG>"))}
    own_words["conversations"] = own_words["conversations"]["conversations"]
    assert texts(parse_record(own_words, folder.root))[1] == ("gpt", "Sure <SEG>")
    assert "missing_mask" in kinds({**listed, "icl_examples": [{"image": folder.image}]}, folder)
    assert kinds({**listed, "icl_examples": 3}, folder)[0] == "bad_field"


def test_a_record_may_name_its_modality(folder: Any) -> None:
    assert parse_record(folder.vqa(modality="oct"), folder.root).modality == "oct"
    assert parse_record(folder.vqa(modality=" "), folder.root).modality == "ct"


def test_modality_comes_from_the_file_name() -> None:
    names = [
        "ct_00--A--b--x.png",
        "x_ray--A--b--2d.png",
        "mr_t1--A.png",
        "synpic52901.jpg",
        "img_001.png",
        "oct_01--A.png",
    ]
    assert [modality_of(name) for name in names] == ["ct", "x_ray", "mr", None, None, "oct"]


def test_published_records_parse_to_the_published_text(folder: Any, golden: Any) -> None:
    """The conversations of the reference runs: same text behind the image tag, same numbers of masks and regions."""
    import json

    cases = json.loads((golden / "2_tokenize" / "tokenize.json").read_text())["cases"]
    folder.write_image("images/ct_00--tall--a.png")
    folder.write_mask("masks/ct_00--tall--a.png")
    compared = 0
    for name, case in cases.items():
        raw = {"image": "images/ct_00--tall--a.png", "conversations": case["conversations_in"]}
        sample, findings = inspect_record(raw, folder.root)
        if sample is None:
            assert name in {
                "vqa_leading_gpt",
                "answer_contains_bos",
                "answer_contains_eos",
                "answer_contains_unk",
                "answer_empty",
                "no_image_token_but_image_key",
                "two_image_tokens",
            }, (name, findings)
            continue
        compared += 1
        assert (len(sample.masks), len(sample.regions)) == (case["n_masks"], case["n_region_masks"]), name
        answers = [turn.text for turn in sample.turns if turn.role == "gpt"]
        assert all(answer in case["prompt"] for answer in answers), name
    assert compared == 24


WORDED = [("human", "<image>\nWhich?"), ("gpt", "A CT.")]
PARTS = [{"type": "image_url", "image_url": {"url": f"file://{IMAGE}"}}, {"type": "text", "text": "Which?"}]


@pytest.mark.parametrize(
    "raw",
    [
        {"image": IMAGE, "conversations": [("user", "<image>\nWhich?"), ("assistant", "A CT.")]},
        {"images": [IMAGE], "messages": [("user", "<image>\nWhich?"), ("assistant", "A CT.")]},
        {"messages": [("user", PARTS), ("assistant", [{"type": "text", "text": "A CT."}])]},
        {"image": IMAGE, "messages": [("user", [{"type": "image"}, PARTS[1]]), ("assistant", "A CT.")]},
        {"image": {"path": IMAGE, "bytes": None}, "conversatons": WORDED},
        {"image": IMAGE, "messages": [("system", "Be brief."), *WORDED]},
    ],
)
@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
def test_layouts_of_other_programs_are_read(folder: Any, raw: dict[str, Any], names: tuple[str, str]) -> None:
    raw = {
        key: [dict(zip(names, turn, strict=True)) for turn in value] if isinstance(value[0], tuple) else value
        for key, value in ((key, value) for key, value in raw.items() if isinstance(value, list))
    } | {key: value for key, value in raw.items() if not isinstance(value, list)}
    before = copy.deepcopy(raw)
    sample, findings = inspect_record(raw, folder.root)
    assert sample is not None and texts(sample) == WORDED and sample.images == (folder.root / IMAGE,)
    assert [finding.kind for finding in findings] == ["system_turn"] * (
        len(str(raw)) != len(str(raw).replace("system", ""))
    )
    assert raw == before
    asked = list(references_of(raw, 0))
    assert [(reference.prompt, reference.gt) for reference in asked] == [("Which?", "A CT.")]
    written = Vetting(folder.root, check_pixels=False).mended(raw, sample)
    assert texts(parse_record(written, folder.root)) == WORDED and "messages" not in written
    json.dumps(written)


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name.replace("/", "\\"),
        lambda name: unicodedata.normalize("NFD", name),
        lambda name: f"SAMed2D_v1/{name}",
        lambda name: f"C:\\data\\SAMed2D_v1\\{name}".replace("/", "\\"),
        lambda name: f"/elsewhere/SAMed2D_v1/{unicodedata.normalize('NFD', name)[:-4]}",
    ],
)
def test_paths_spelled_otherwise_are_found_and_mended(folder: Any, spell: Any) -> None:
    image, region = "images/Rückenmark_é.png", "masks/Rückenmark_é.png"
    folder.write_image(image)
    folder.write_mask(region)
    raw = folder.record(
        f"<image>\nIs it in <region>{spell(region)}</region>?",
        f"It is [SEG].<mask>{spell(region)}</mask>",
        spell(image),
    )
    sample, findings = inspect_record(raw, folder.root)
    kinds_ = [finding.kind for finding in findings if finding.severity == "repaired"]
    assert len(findings) == 4 and sorted(set(kinds_)) == ["path_spelling", "seg_spelling"]
    assert sample is not None and sample.images == (folder.root / image,)
    assert sample.masks == sample.regions == (folder.root / region,)
    written = Vetting(folder.root, check_pixels=False).mended(raw, sample)
    again, left = inspect_record(written, folder.root)
    assert left == [] and again is not None and again.turns == sample.turns and written["image"] == image


def test_a_bare_name_is_not_searched_for_elsewhere(folder: Any) -> None:
    folder.write_image("a.png")
    assert kinds(folder.vqa(image="patient1/a.png"), folder) == ["missing_image"]
    assert kinds(folder.vqa(image="/elsewhere/a.png"), folder) == ["missing_image"]


def test_tokens_that_do_no_harm_are_warned_about(folder: Any) -> None:
    raw = folder.record("<im_start><image><im_end>\nsize <s> 3 <unk>?", "<ref>CT</ref> [SEG]", age=NAN)
    sample, findings = inspect_record(raw, folder.root)
    assert sample is not None and {finding.severity for finding in findings} == {"warning"}
    assert sorted(finding.kind for finding in findings) == ["bad_field", "seg_spelling", *["special_token"] * 4]


def test_no_finding_is_longer_than_a_few_lines(folder: Any) -> None:
    long = "x" * 100_000
    for raw in (
        folder.vqa(id=long, image=long),
        folder.vqa(image={"bytes": long.encode(), "path": None}),
        folder.vqa(image=f"data:image/png;base64,{long}", answer_type=[long], kind={long: long}),
        folder.record(f"<image><region>{long}</region>", f"<SEG><mask>{long}</mask>", modality=NAN, **{long: NAN}),
        folder.vqa(conversations=[{"from": long, "value": {long: long}}, long]),
    ):
        sample, findings = inspect_record(raw, folder.root)
        assert sample is None and all(len(finding.message) < 400 for finding in findings)
        with pytest.raises(MedPLIBError) as caught:
            parse_record(raw, folder.root)
        assert len(str(caught.value)) < 2000
    assert "lies inside the file" in inspect_record(folder.vqa(image={"bytes": b"x"}), folder.root)[1][0].message
