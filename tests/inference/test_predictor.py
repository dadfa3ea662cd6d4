"""The predictor over a real (tiny, untrained) checkpoint on disk: it behaves on every kind of input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import MedPLIBError, Predictor
from model.inference.engine import Request
from model.inference.generation import Draw, GenerationSettings
from model.inference.prompts import build_prompt, embed_prompt
from tests.tiny import tiny_checkpoint

SHORT = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def says_seg(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """The same predictor, made to answer with two ``<SEG>``: an untrained model would never say one."""
    seg, dot = predictor.model.config.seg_token_id, predictor.processor.tokenizer.encode("liver")[-1]
    script = [dot, seg, dot, seg, predictor.model.config.eos_token_id]

    def choose(_: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        return torch.tensor([script[draw.step] for draw in draws])

    monkeypatch.setattr("model.inference.schedule.choose_tokens", choose)
    return predictor


def test_asking_twice_gives_the_same(predictor: Predictor) -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    first = predictor.ask(image, "What is it?", settings=SHORT)
    assert first.text == predictor.ask(image, "What is it?", settings=SHORT).text
    prepared = predictor.set_image(image)
    assert first.text == predictor.ask(prepared, "What is it?", settings=SHORT).text
    assert set(first.timing) == {"wait", "encode", "generate", "masks", "total"}


def test_an_image_is_prepared_once_for_many_questions(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    image = predictor.set_image(np.random.default_rng(6).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    region = ("box", (5, 5, 30, 30))
    first = predictor.ask(image, "What is it?", region, settings=SHORT).text

    def again(*_: object) -> None:
        raise AssertionError("the image was prepared again")

    for name in ("clip_input", "sam_input"):
        monkeypatch.setattr(f"model.processing.processor.{name}", again)
    monkeypatch.setattr(predictor.model.model.vision_tower, "forward", again)
    assert predictor.ask(image, "What is it?", region, settings=SHORT).text == first


def test_a_model_without_region_adapter_says_so(tmp_path: Path) -> None:
    predictor = Predictor.from_pretrained(tiny_checkpoint(tmp_path, region={"enabled": False}))
    with pytest.raises(MedPLIBError, match="no region adapter"):
        predictor.ask(np.zeros((20, 20), np.uint8), "What is in this region?", ("point", (3, 3)))
    assert isinstance(predictor.ask(np.zeros((20, 20), np.uint8), "What is it?", settings=SHORT).text, str)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_answers_with_masks(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """The whole way in bfloat16, as on a GPU, regions and masks included."""
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("half"))
    half = Predictor.from_pretrained(checkpoint, dtype=torch.bfloat16, attention=attention)
    assert half.model.model.decoder.config._attn_implementation == attention
    seg = half.model.config.seg_token_id
    monkeypatch.setattr("model.inference.schedule.choose_tokens", lambda logits, _: torch.full((len(logits),), seg))
    image = np.random.default_rng(4).integers(0, 255, (50, 31, 3), dtype=np.uint8)
    answer = half.ask(image, "What is in this region?", ("box", (3, 3, 20, 30)), settings=SHORT)
    assert len(answer.masks) == 8
    assert answer.masks[0].to_array().shape == (50, 31)
    assert 0 <= answer.masks[0].score <= 1


def test_flash_attention_is_refused_without_cuda(tmp_path: Path) -> None:
    with pytest.raises(MedPLIBError, match="CUDA devices alone"):
        Predictor.from_pretrained(tiny_checkpoint(tmp_path), attention="flash_attention_2")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_answers_as_the_cpu_does(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    image = np.random.default_rng(5).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    answers = [
        Predictor.from_pretrained(checkpoint, device=device, dtype=torch.float32).ask(
            image, "What is in this region?", ("point", (20, 20)), settings=SHORT
        )
        for device in ("cpu", "cuda")
    ]
    assert answers[0].text == answers[1].text


def test_masks_have_the_image_size_and_come_in_order(says_seg: Predictor) -> None:
    image = np.random.default_rng(1).integers(0, 255, (50, 31), dtype=np.uint8)
    prepared = says_seg.set_image(image)
    assert prepared.sam_embedding is None
    answer = says_seg.ask(prepared, "Please segment the liver.", threshold=0.4, every_target=False)
    assert answer.text.count("<SEG>") == len(answer.masks) == 2
    assert all(mask.to_array().shape == (50, 31) for mask in answer.masks)
    assert prepared.sam_embedding is not None


def test_a_lower_threshold_paints_more(says_seg: Predictor) -> None:
    image = np.random.default_rng(2).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    areas = [says_seg.ask(image, "Segment it.", threshold=level).masks[0].area_px for level in (0.05, 0.5, 0.95)]
    assert areas[0] >= areas[1] >= areas[2] and areas[0] > areas[2]


@torch.inference_mode()
def test_a_region_changes_the_prompt(predictor: Predictor) -> None:
    """Different regions reach the model as different states."""
    image = predictor.set_image(np.random.default_rng(3).integers(0, 255, (56, 56, 3), dtype=np.uint8))
    seen = []
    for box in ((0, 0, 14, 14), (28, 28, 56, 56)):
        asked = Request(image, "What is <region></region>?", [_box(box)])
        seen.append(embed_prompt(predictor.model, build_prompt(predictor.model, predictor.processor, image, asked)))
    assert seen[0].shape == seen[1].shape and not torch.allclose(seen[0], seen[1])


def _box(box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((56, 56), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def test_several_regions_and_history(predictor: Predictor) -> None:
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    regions = [("box", (0, 0, 20, 20)), ("point", (30, 30))]
    answer = predictor.ask(image, "Compare these.", regions, history=[("What is it?", "CT")], settings=SHORT)
    assert isinstance(answer.text, str)


def test_streaming_gives_the_whole_answer(predictor: Predictor) -> None:
    said: list[str] = []
    answer = predictor.ask(np.zeros((20, 20), np.uint8), "Say it.", settings=SHORT, on_text=said.append)
    assert said and said[-1] == answer.text


def test_sampling_repeats_with_its_seed(predictor: Predictor) -> None:
    settings = GenerationSettings(max_new_tokens=12, temperature=1.5, seed=7)
    image = np.zeros((20, 20), np.uint8)
    assert predictor.ask(image, "Go.", settings=settings).text == predictor.ask(image, "Go.", settings=settings).text


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16", "1", "CMYK"])
def test_every_kind_of_picture(predictor: Predictor, tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    picture = Image.fromarray(np.arange(40 * 30, dtype=np.uint16).reshape(40, 30))
    (picture if mode == "I;16" else Image.new("L", (30, 40), 7).convert(mode)).save(file)
    assert predictor.set_image(file).size == (40, 30)


@pytest.mark.parametrize(
    ("image", "question", "options"),
    [
        ("missing.png", "What?", {}),
        (np.zeros((4, 4, 5), np.uint8), "What?", {}),
        (np.zeros((8, 8), np.uint8), "   ", {}),
        (np.zeros((8, 8), np.uint8), "What?", {"threshold": 0.0}),
        (np.zeros((8, 8), np.uint8), "What?", {"threshold": 1.5}),
        (np.zeros((8, 8), np.uint8), "What?", {"region": ("box", (0, 0, 9, 9))}),
        (np.zeros((8, 8), np.uint8), "What about <image>?", {}),
    ],
)
def test_wrong_input_is_one_sentence(predictor: Predictor, image: object, question: str, options: dict) -> None:
    with pytest.raises(MedPLIBError) as error:
        predictor.ask(image, question, **options)
    assert "\n" not in str(error.value)
