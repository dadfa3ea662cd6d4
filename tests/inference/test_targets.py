"""Every named target is answered, other names are warned about, and long conversations lose their start."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from model import MedPLIBError, Predictor
from model.cli import main
from model.inference.answer import Answer, Mask
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.inference.targets import JoinedAnswer, mask_labels, requested_targets, same_target
from tests.conftest import ROOT

NANO = ROOT / "assets" / "medplib-nano"
FUNDUS = ROOT / "data" / "sample" / "images" / "fundus_00--Phantom--seed505case000004--0000.png"
SHORT = GenerationSettings(max_new_tokens=6)
LONG = "Is there an exudate, a hemorrhage or a macula in this picture of the eye? " * 6


@cache
def nano() -> Predictor:
    return Predictor.from_pretrained(NANO)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("Please segment the optic disc and the macula in this fundus image.", ["optic disc", "macula"]),
        ("Segment the liver, spleen, and left kidney.", ["liver", "spleen", "left kidney"]),
        ("Outline both the A, the B, the C, the D as well as the E, please", ["a", "b", "c", "d", "e"]),
        ("Show me the macula and also the optic disc in this picture.", ["macula", "optic disc"]),
        ("Segment the left and the right lung", ["left lung", "right lung"]),
        ("Where is the head of the pancreas? Give me a mask.", ["head of the pancreas"]),
        ("What is it? Segment the tumor and describe it.", ["tumor"]),
        ("segment liver & spleen", ["liver", "spleen"]),
        ("Where is the lung, left or right?", []),
        ("Segment both.", []),
        ("What modality is it?", []),
    ],
)
def test_names_in_a_request(question: str, names: list[str]) -> None:
    assert [target.name for target in requested_targets(question)] == names


def test_a_target_is_asked_for_alone_in_the_words_of_the_question() -> None:
    first, second = requested_targets("segment liver and a Left kidney in this CT slice, please")
    assert first.question == "Please segment the liver in this CT slice."
    assert second.question == "Please segment a Left kidney in this CT slice."


@pytest.mark.parametrize(
    ("asked", "named", "same"),
    [
        ("lungs", "lung", True),
        ("left lung", "lungs", True),
        ("left lung", "right lung", False),
        ("the tumour", "liver tumor", True),
        ("haemorrhages", "hemorrhage", True),
        ("bleeding", "hemorrhage", True),
        ("optic disk", "optic disc", True),
        ("optic nerve head", "optic disc", True),
        ("abnormality", "exudate", True),
        ("opacities", "lung opacity", True),
        ("dragon", "macula", False),
        ("liver", "spleen", False),
    ],
)
def test_names_of_one_thing(asked: str, named: str, same: bool) -> None:
    assert same_target(asked, named) == same


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The optic disc, the optic disc is <SEG>", "optic disc"),
        ("The the the the liver is <SEG>", "liver"),
        ("the macula and the macula <SEG>", "macula"),
        ("Sure, the head and neck tumour is <SEG>", "head and neck tumour"),
    ],
)
def test_labels_of_degenerate_answers(text: str, label: str) -> None:
    assert mask_labels(text, "Segment it.", 1) == [label]


def test_a_label_has_an_end() -> None:
    (label,) = mask_labels(" ".join(f"word{place}" for place in range(200)) + " <SEG>", "Segment it.", 1)
    assert len(label) <= 61 and label.endswith("…")


# --- joined answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("optic disc", "macula"),
        ("macula", "optic disc"),
        ("exudate", "optic disc", "macula"),
        ("macula", "hemorrhage", "exudate", "optic disc"),
        ("liver", "exudate", "optic disc", "macula", "hemorrhage"),
    ],
)
def test_every_named_target_is_answered(names: tuple[str, ...]) -> None:
    listed = ", ".join(f"the {name}" for name in names[:-1]) + f" and the {names[-1]}"
    seen: list[str] = []
    answer = nano().ask(FUNDUS, f"Please segment {listed} in this fundus image.", on_text=seen.append)
    assert sorted(mask.label for mask in answer.masks) == sorted(set(names) - {"liver"})
    assert answer.text.count("<SEG>") == len(answer.masks) and not any(mask.warning for mask in answer.masks)
    assert ("liver" in answer.text) == ("liver" in names) and not answer.notes
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen)) and seen[-1] == answer.text
    for mask in answer.masks:
        (alone,) = nano().ask(FUNDUS, f"Please segment the {mask.label}.").masks
        both = mask.to_array() & alone.to_array()
        assert both.sum() > 0.9 * max(mask.area_px, alone.area_px)


def test_the_published_single_pass_is_kept_on_request() -> None:
    question = "Please segment the optic disc and the macula in this fundus image."
    alone = nano().ask(FUNDUS, question, every_target=False)
    assert alone.text == nano().engine.ask(Request(FUNDUS, question)).text == alone.text
    assert [mask.label for mask in alone.masks] == ["macula", "macula"]


def test_a_name_that_was_not_asked_for_is_warned_about(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", str(FUNDUS), "Segment the dragon.", "--json", "--out", str(tmp_path)]) == 0
    (mask,) = json.loads(capsys.readouterr().out)["masks"]
    assert mask["label"] == "macula" and mask["warning"] == "asked for dragon, the answer names macula"
    assert main(["ask", str(FUNDUS), "Segment the dragon.", "--out", str(tmp_path)]) == 0
    assert "(warning: asked for dragon" in capsys.readouterr().out


def _mask(label: str, *corner: int) -> Mask:
    array = np.zeros((20, 20), dtype=bool)
    array[corner[0] : corner[0] + 6, corner[1] : corner[1] + 6] = True
    return Mask.from_array(array, label, 0.5)


def test_masks_of_one_name_are_dropped_only_where_they_show_one_thing() -> None:
    for second, kept in (((1, 0), 1), ((12, 12), 2)):
        joined = JoinedAnswer(Request(None, "Segment the nodule."))
        masks = [_mask("nodule", 0, 0), _mask("nodule", *second)]
        joined.add(Answer("The nodule is <SEG> and the nodule is <SEG>.", masks))
        assert joined.following() is None
        assert len(joined.answer().masks) == joined.answer().text.count("<SEG>") == kept


def test_passes_end_with_the_tokens_of_the_answer() -> None:
    request = Request(None, "Segment the liver and the spleen.", settings=GenerationSettings(max_new_tokens=10))
    joined = JoinedAnswer(request)
    joined.add(Answer("The liver is <SEG>.", [_mask("liver", 0, 0)], new_tokens=4))
    assert joined.following().settings.max_new_tokens == 6
    joined.add(Answer("Some words", new_tokens=6, finish="length"))
    assert joined.following() is None
    assert joined.answer().notes == ("no mask and no refusal for spleen",) and joined.answer().new_tokens == 10


def test_giving_up_ends_all_passes() -> None:
    engine = nano().engine
    ticket = engine.submit(Request(FUNDUS, "Segment the macula and the optic disc.", every_target=True))
    ticket.cancel()
    while not ticket.done():
        engine.step()
    assert ticket.result().finish == "cancelled" and not engine.busy


# --- conversations --------------------------------------------------------------------------------------------------


def test_a_question_without_an_image() -> None:
    answer = nano().ask(None, "What is a CT?", settings=SHORT)
    assert answer.prompt_tokens < nano().ask(FUNDUS, "What is a CT?", settings=SHORT).prompt_tokens - 90
    pointing = nano().ask(None, "Please segment the macula.")
    assert pointing.masks == [] and (("no image" in " ".join(pointing.notes)) == ("<SEG>" in pointing.text))
    with pytest.raises(MedPLIBError, match="there is no image"):
        nano().ask(None, "What is in the region?", ("point", (3, 3)))


def test_a_pointing_answer_without_an_image_has_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    seg = nano().model.config.seg_token_id
    monkeypatch.setattr("model.inference.schedule.choose_tokens", lambda logits, _: torch.full((len(logits),), seg))
    answer = nano().ask(None, "Where?", settings=SHORT)
    assert answer.masks == [] and "<SEG>" in answer.text and "there is no image" in answer.notes[0]


def test_the_oldest_turns_are_left_out_with_their_regions() -> None:
    box, point = ("box", (60, 60, 120, 120)), ("point", (150, 150))
    history = [(f"What is <region></region>? {LONG}", "Exudate"), (f"And <region></region>? {LONG}", "Macula")] * 2
    regions = [box, point, point, box, box]
    question = "What is in the region <region></region>?"
    found = nano().ask(FUNDUS, question, regions, history=history, settings=SHORT)
    assert 0 < found.dropped_turns < 4
    kept = found.dropped_turns
    short = nano().ask(FUNDUS, question, regions[kept:], history=history[kept:], settings=SHORT)
    assert (short.dropped_turns, short.text, short.prompt_tokens) == (0, found.text, found.prompt_tokens)


def test_a_tight_slot_leaves_room_for_the_answer() -> None:
    engine = Engine(nano().model, nano().processor, EngineSettings(slots=1, max_length=260))
    answer = engine.ask(Request(FUNDUS, "What modality is it?", history=[("Is it a CT or a fundus?", "Fundus")] * 9))
    assert answer.dropped_turns > 0 and answer.prompt_tokens <= 260 * 3 // 4 and answer.finish == "end"


def test_turns_beyond_those_trained_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano().model.config, "conversation_turns", 3)
    history = [("Is it a CT?", "No")] * 4
    assert nano().ask(FUNDUS, "Is it a CT?", history=history, settings=SHORT).dropped_turns == 2
    assert nano().ask(FUNDUS, "Is it a CT?", history=history[:2], settings=SHORT).dropped_turns == 0


@pytest.mark.parametrize("words", ["word of it ", "眼底 "])
def test_a_question_that_is_too_long_names_a_length_that_fits(words: str) -> None:
    question = words * 800
    with pytest.raises(MedPLIBError, match=r"too long: it makes a prompt of .* tokens, and 512 fit") as raised:
        nano().ask(FUNDUS, question, history=[("Is it a CT?", "No")], settings=SHORT)
    fits = int(re.search(r"about ([\d,]+) characters", str(raised.value))[1].replace(",", ""))
    assert isinstance(nano().ask(FUNDUS, question[:fits], settings=SHORT).text, str)
    with pytest.raises(MedPLIBError, match="too long"):
        nano().ask(FUNDUS, question[: fits * 5 // 4], settings=SHORT)
