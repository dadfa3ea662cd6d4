"""Random mixes of requests, tiny models that talk, and what a plain loop over the network answers to one request."""

from __future__ import annotations

import io
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.inference.answer import Answer, Finish, Mask
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import Draw, GenerationSettings, choose_tokens, seed_of
from model.inference.images import PreparedImage
from model.inference.regions import place_region, region_to_mask
from model.inference.targets import mask_labels
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn
from model.processing.masks import decode_rle, encode_rle
from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from model.processing.special_tokens import SEG_TOKEN
from model.processing.tokens import build_tokenizer, train_tokenizer
from tests.tiny import TEXTS, tiny_config

KINDS: dict[str, dict[str, Any]] = {
    "one of two experts": {},
    "two of three experts": {"moe": {"layers": (0, 1), "num_experts": (3, 3), "top_k": 2}},
    "a residual expert": {"moe": {"layers": (1,), "num_experts": (3,), "use_residual": True}},
    "dense": {"experts": 0},
    "shared heads": {"text": {"num_attention_heads": 4, "num_key_value_heads": 2}},
    "a capacity in evaluation": {
        "moe": {"layers": (0, 1), "num_experts": (3, 3), "drop_in_evaluation": True, "eval_capacity_factor": 0.9}
    },
    "compressed images": {"in_context": {"token_compressor": True, "compressed_tokens": 5}},
}
"""Networks that the engine treats differently somewhere."""


@cache
def tokenizer() -> Any:
    with TemporaryDirectory() as folder:
        return build_tokenizer(train_tokenizer(TEXTS * 20, 340, folder))


def talker(kind: str = "one of two experts", seed: int = 0) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """An untrained network of one of the ``KINDS`` that says words, ``<SEG>`` and ``</s>``, and its processor."""
    options = dict(KINDS[kind])
    text = options.pop("text", {})
    seg = tokenizer().convert_tokens_to_ids(SEG_TOKEN)
    config = tiny_config(vocab_size=len(tokenizer()), seg_token_id=seg, **options)
    for name, value in text.items():
        setattr(config.text_config, name, value)
    config.text_config.head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    torch.manual_seed(seed)
    model = MedPLIBForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        scale = torch.ones(len(tokenizer()), 1)  # the longer a row, the more often its token is said
        scale[:259] = 0.1  # unknown, beginning, and the bytes
        scale[list(tokenizer().get_added_vocab().values())] = 0.1
        scale[2], scale[seg] = 1.3, 1.7
        model.lm_head.weight *= scale
    return model, MedPLIBProcessor(tokenizer(), ProcessorSettings.from_config(config))


def engine_of(
    model: MedPLIBForCausalLM, processor: MedPLIBProcessor, settings: EngineSettings | None = None, **options: Any
) -> Engine:
    """An engine of three slots, unless told otherwise."""
    return Engine(model, processor, settings or EngineSettings(**{"slots": 3, **options}))


# --- requests -------------------------------------------------------------------------------------------------------

QUESTIONS = (
    "What modality is used to take this image?",
    "Is there a kidney in the image?",
    "Describe this image and whatever can be seen in it on the left and on the right, as a helpful assistant would.",
    "Please segment the liver in this image.",
    "Segment the tumour and the kidney.",
)
REGION_QUESTIONS = ("What is in the region?", "Is there a tumour in <region></region>?", "Which is it?")


def pictures(seed: int = 0, count: int = 4) -> list[np.ndarray]:
    """Noise of several shapes."""
    rng = np.random.default_rng(seed)
    sizes = [(40, 56), (31, 50), (64, 64), (28, 90)]
    return [rng.integers(0, 255, (*sizes[index % 4], 3), dtype=np.uint8) for index in range(count)]


def png(pixels: np.ndarray) -> bytes:
    """A picture as the bytes of a file."""
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def random_requests(seed: int, count: int, **fixed: Any) -> list[Request]:
    """Questions, region questions and grounding about a few images, with all kinds of settings.

    Args:
        seed: the same gives the same.
        count: how many.
        fixed: fields of ``GenerationSettings`` that all have.
    """
    rng = np.random.default_rng(seed)
    images: list[Any] = pictures(seed)
    images[1] = png(images[1])
    return [_random_request(rng, images, fixed) for _ in range(count)]


def _random_request(rng: np.random.Generator, images: list[Any], fixed: dict[str, Any]) -> Request:
    image = images[rng.integers(len(images))]
    regions: list[Any] = []
    question = QUESTIONS[rng.integers(len(QUESTIONS))]
    if rng.random() < 0.35:
        question = REGION_QUESTIONS[rng.integers(len(REGION_QUESTIONS))]
        few = 1 if "<region>" in question else rng.integers(1, 3)
        regions = [_random_region(rng) for _ in range(few)]
    sampling: dict[str, Any] = {}
    if rng.random() < 0.3:
        sampling = {"temperature": 1.2, "top_k": int(rng.integers(0, 40)), "top_p": 0.95, "seed": int(rng.integers(99))}
    settings = {"max_new_tokens": int(rng.integers(1, 15)), **sampling, **fixed}
    return Request(
        image,
        question,
        regions=regions,
        history=[("What is it?", "A kidney."), ("Sure?", "Yes.")][: rng.choice([0, 0, 0, 1, 2])],
        settings=GenerationSettings(**settings),
        threshold=None if rng.random() < 0.6 else 0.3,
        thresholds=(0.2, 0.6) if rng.random() < 0.3 else (),
        router_stats=bool(rng.random() < 0.3),
    )


def _random_region(rng: np.random.Generator) -> Any:
    left, top = rng.integers(0, 10, 2).tolist()
    if rng.random() < 0.4:
        return ("point", (left, top))
    return ("box", (left, top, left + int(rng.integers(5, 18)), top + int(rng.integers(5, 18))))


# --- the same by a plain loop ---------------------------------------------------------------------------------------


@torch.inference_mode()
def plain_answer(model: MedPLIBForCausalLM, processor: MedPLIBProcessor, request: Request) -> Answer:
    """What the network answers to one request: one forward pass a token, transformers' cache, a mask at a time."""
    image = Engine(model, processor).prepare(request.image)
    inputs = prompt_inputs(processor, image, request)
    settings, seed = request.settings, seed_of(request.settings)
    output = model(**inputs, use_cache=True)
    ids: list[int] = []
    states: list[Tensor] = []
    passes = [output.router_stats]
    text, finish = "", "length"
    while len(ids) < settings.max_new_tokens:
        state = output.last_hidden_state[:, -1]
        token = int(choose_tokens(model.lm_head(state), [Draw(settings, seed, len(ids))]))
        if token == 2:
            finish = "end"
            break
        ids.append(token)
        if token == model.config.seg_token_id:
            states.append(state)
        text = processor.decode_text(ids)
        stops = [text.index(stop) for stop in settings.stop if stop in text]
        if stops:
            text, finish = text[: min(stops)].rstrip(), "stop"
            break
        if len(ids) < settings.max_new_tokens:
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            passes.append(output.router_stats)
    states = states[: text.count(SEG_TOKEN)]
    logits = [_paint(model, image, state) for state in states]
    return _as_answer(model, request, image, text, finish, len(ids), logits, passes)  # type: ignore[arg-type]


def prompt_inputs(processor: MedPLIBProcessor, image: PreparedImage, request: Request) -> dict[str, Any]:
    """A request's prompt as arguments of the network."""
    regions = [region_to_mask(region, image.size) for region in request.regions]
    asked = place_region(request.question, len(regions)) if regions else request.question
    turns = [Turn(*turn) for pair in request.history for turn in zip(("human", "gpt"), pair, strict=True)]
    turns.append(Turn("human", asked))
    turns[0] = Turn("human", f"<image>\n{turns[0].text}")
    batch = processor.collate([processor.encode_prompt(turns, [image.data.pixels], regions=regions)])
    names = ("input_ids", "attention_mask", "pixel_values", "region_masks", "region_image")
    return {name: batch[name] for name in names if batch.get(name) is not None}


def _paint(model: MedPLIBForCausalLM, image: PreparedImage, state: Tensor) -> tuple[Tensor, float]:
    embedding = model.encode_segmented_images(image.sam_input)
    decoded = model.decode_masks(state, embedding, torch.tensor([0]), [image.sam_size], [image.size])
    return decoded.mask_logits[0].sigmoid(), float(decoded.iou_predictions)


def _as_answer(
    model: MedPLIBForCausalLM,
    request: Request,
    image: PreparedImage,
    text: str,
    finish: Finish,
    new_tokens: int,
    painted: list[tuple[Tensor, float]],
    passes: list[Any],
) -> Answer:
    labels = mask_labels(text, request.question, len(painted))
    threshold = model.config.mask.threshold if request.threshold is None else request.threshold
    masks = [
        Mask.from_array((probability > threshold).numpy(), label, score)
        for (probability, score), label in zip(painted, labels, strict=True)
    ]
    masks_at = {
        f"{one:g}": [encode_rle((probability > one).numpy()) for probability, _ in painted]
        for one in request.thresholds
    }
    shares = None
    if request.router_stats and model.config.moe.enabled:
        kept = [torch.cat([one[layer].kept for one in passes]).float() for layer in range(len(passes[0]))]
        shares = [(layer.sum(0) / layer.sum()).tolist() for layer in kept]
    return Answer(text, masks, {}, finish, new_tokens, masks_at, shares)


def assert_same(found: Answer, wanted: Answer) -> None:
    """Equal text, end and names; masks, scores and shares to rounding."""
    assert (found.text, found.finish, found.new_tokens) == (wanted.text, wanted.finish, wanted.new_tokens)
    assert [mask.label for mask in found.masks] == [mask.label for mask in wanted.masks]
    for ours, theirs in zip(found.masks, wanted.masks, strict=True):
        assert abs(ours.score - theirs.score) < 1e-3
        assert_same_pixels(ours.to_array(), theirs.to_array())
    assert list(found.masks_at) == list(wanted.masks_at)
    for name, ours_at in found.masks_at.items():
        for one, other in zip(ours_at, wanted.masks_at[name], strict=True):
            assert_same_pixels(decode_rle(one), decode_rle(other))
    if wanted.router_stats is None:
        assert found.router_stats is None
    else:
        np.testing.assert_allclose(np.array(found.router_stats), np.array(wanted.router_stats), atol=1e-6)


def assert_same_pixels(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal but for pixels on the very threshold."""
    assert ours.shape == theirs.shape and int((ours != theirs).sum()) <= 2
