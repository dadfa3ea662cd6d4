"""Build the decoder's input of a request: token ids, region grids, and the prefix that questions share."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from torch import Tensor

from model.errors import MedPLIBError
from model.inference.images import PreparedImage
from model.inference.regions import place_region, region_to_mask
from model.inference.requests import Request
from model.modeling.configuration import IMAGE_PLACEHOLDER
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn
from model.processing.encoding import encode_prompt
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import IMAGE_TOKEN, REGION_MARKER
from model.processing.tokens import tokenize


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request's prompt, not yet embedded.

    Attributes:
        image: the image it asks about; None for words alone.
        input_ids: long [1, T] with placeholders.
        region_masks: float [R, g, g]; ``region_image`` long [R], all zero.
        length: tokens L once the image has taken its places.
        prefix_length: leading tokens, the image's included, that any question with the same opening shares.
        prefix_key: names that opening.
        dropped_turns: oldest questions of the history that were left out.
    """

    image: PreparedImage | None
    input_ids: Tensor
    region_masks: Tensor
    region_image: Tensor
    length: int
    prefix_length: int
    prefix_key: object
    dropped_turns: int = 0


def build_prompt(
    model: MedPLIBForCausalLM,
    processor: MedPLIBProcessor,
    image: PreparedImage | None,
    request: Request,
    max_length: int | None = None,
) -> Prompt:
    """Word and tokenise a request.

    The oldest turns of a history that does not fit are left out with their regions: of tokens, as many fit as the
    processor and ``max_length`` allow with room for an answer; of turns, as many as the model was trained on, where
    that is more than one.

    Args:
        model, processor: of the checkpoint.
        image: what is asked about; None for words alone.
        request: its ``image`` is not looked at.
        max_length: tokens of prompt and answer together; None for no limit.

    Raises:
        MedPLIBError: the question alone is too long, a region is malformed or has no image, or the checkpoint cannot
            look at regions.
    """
    if image is None and request.regions:
        raise MedPLIBError("a region is marked, and there is no image; give the image it is in")
    regions = [region_to_mask(region, image.size) for region in request.regions] if image is not None else []
    if regions and not model.config.region.enabled:
        raise MedPLIBError("this checkpoint has no region adapter; ask it about the whole image")
    history, trained = list(request.history), model.config.conversation_turns
    marked = [earlier.count(REGION_MARKER) for earlier, _ in history]  # their regions come first
    asked = place_region(request.question, max(0, len(regions) - sum(marked)))
    dropped = max(0, len(history) + 1 - trained) if trained > 1 else 0
    patches = model.config.visual_tokens if image is not None else 0
    room = inf if max_length is None else max_length - 2 - patches + (image is not None)
    answer = min(request.settings.max_new_tokens, (max_length or 0) // 4)
    while True:
        turns = _turns(history[dropped:], asked, image is not None)
        ids = encode_prompt(processor.tokenizer, turns, processor.settings.template)
        last = dropped == len(history)
        most = min(processor.settings.max_length or inf, room if last else room - answer)
        if len(ids) <= most:
            break
        if last:
            own = len(tokenize(processor.tokenizer, request.question, add_bos=False).ids)
            fit = int(len(request.question) * (1 - (len(ids) - most) / max(1, own)) * 0.95)  # characters, about
            remedy = f"shorten it to about {fit:,} characters" if fit > 0 else "give the engine a larger max_length"
            raise MedPLIBError(
                f"the question is too long: it makes a prompt of {len(ids)} tokens, and {most} fit; {remedy}"
            )
        dropped += 1
    kept = regions[sum(marked[:dropped]) :]
    pictures = [image.data.pixels] if image is not None else []
    encoded = processor.encode_prompt(turns, pictures, regions=kept, pixels=False)
    opening = ids.index(IMAGE_PLACEHOLDER) if image is not None else 0
    return Prompt(
        image,
        encoded.input_ids[None],
        encoded.region_masks,
        encoded.region_image,
        length=len(ids) + patches - (image is not None),
        prefix_length=opening + patches,
        prefix_key=(image.key if image is not None else None, tuple(ids[:opening])),
        dropped_turns=dropped,
    )


def _turns(history: list[tuple[str, str]], question: str, with_image: bool) -> list[Turn]:
    turns = [turn for earlier, answer in history for turn in (Turn("human", earlier), Turn("gpt", answer))]
    turns.append(Turn("human", question))
    if with_image:
        turns[0] = Turn("human", f"{IMAGE_TOKEN}\n{turns[0].text}")
    return turns


def embed_prompt(model: MedPLIBForCausalLM, prompt: Prompt, opened: bool = False) -> Tensor:
    """Embeddings [1, L, D] of a prompt, or of what follows its opening; encodes its image if nobody has."""
    image, features = prompt.image, None
    if image is not None:
        if image.image_features is None:
            image.image_features = model.encode_images(image.clip_input.to(model.device, model.dtype))
        features = image.image_features
    ids, tokens = prompt.input_ids, None
    if opened and features is not None:
        ids = ids[:, ids.shape[1] - (prompt.length - prompt.prefix_length) :]
        tokens = features.new_zeros(0, 1, model.config.text_config.hidden_size)
    return model.splice(
        ids.to(model.device),
        None,
        features,
        prompt.region_masks.to(model.device, model.dtype),
        prompt.region_image.to(model.device),
        image_tokens=tokens,
    ).embeds
