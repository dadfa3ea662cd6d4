"""Networks of any size with random weights, made where they run, that say what is written for them.

Time and memory do not depend on what weights say, but an answer's length and its ``<SEG>`` do. So a random network is
given a script: the last token alone decides the next one, whatever image and question came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from torch import Tensor

from model.checkpoint.building import empty_network
from model.checkpoint.loading import finish
from model.errors import MedPLIBError
from model.inference.quantise import Scheme, quantise
from model.modeling.configuration import MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn
from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from model.processing.special_tokens import SEG_TOKEN
from model.processing.tokens import build_tokenizer, tokenize

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = 2  # in every layer, as published
_SPREAD = 0.02  # standard deviation of weights
_QUIET = 1e-4  # of those that write into the residual stream: the last token stays the larger part of it


def make_network(
    size: str, device: torch.device, dtype: torch.dtype, quantisation: Scheme | None, experts: int = EXPERTS
) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """A network with random weights, made on the device in its own type, and a processor with the nano's tokenizer.

    Args:
        size: the name of a file in ``configs/model/``, or the path of such a file.
        experts: in every layer; 0 makes it dense.

    Raises:
        MedPLIBError: there is no such file, or its sizes are impossible.
    """
    tokenizer = build_tokenizer(ROOT / "assets" / "medplib-nano")
    sections = _sections(size)
    if "text_config" in sections:
        sections["text_config"] = {"vocab_size": len(tokenizer), **sections["text_config"]}
    layers = range(MedPLIBConfig(**sections).text_config.num_hidden_layers)
    config = MedPLIBConfig(
        moe={"layers": tuple(layers), "num_experts": (experts,) * len(layers)} if experts else None,
        seg_token_id=tokenizer.convert_tokens_to_ids(SEG_TOKEN),
        **sections,
    )
    model = empty_network(config)
    torch.manual_seed(0)
    state = {name: _value(name, like, device, dtype) for name, like in model.state_dict().items()}
    model = finish(model, state, device)
    if quantisation is not None:
        quantise(model, quantisation)
    return model, MedPLIBProcessor(tokenizer, ProcessorSettings.from_config(config))


def _sections(size: str) -> dict:
    path = ROOT / "configs" / "model" / f"{size}.yaml"
    path = path if path.is_file() else Path(size)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (ROOT / "configs" / "model").glob("*.yaml")))
        raise MedPLIBError(f"--random is {size!r}; give one of {known}, or a YAML file of sizes")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _value(name: str, like: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not like.is_meta:  # a buffer, whose values are known
        return like.to(device, dtype if like.is_floating_point() else like.dtype)
    value = torch.empty(like.shape, dtype=dtype, device=device)
    if like.dim() < 2:
        return value.fill_(float("norm" in name and name.endswith("weight")))
    if name.endswith("embed_tokens.weight"):
        return value.normal_()
    quiet = ".decoder." in name and name.endswith(("o_proj.weight", "down_proj.weight"))
    return value.normal_(std=_QUIET if quiet else _SPREAD)


class Script:
    """Lets a network made here give one fixed answer.

    The output row of each token of the answer is the embedding of the token before it.

    Args:
        model: from ``make_network``.
        processor: its processor.
    """

    def __init__(self, model: MedPLIBForCausalLM, processor: MedPLIBProcessor) -> None:
        self.embeddings, self.output = model.get_input_embeddings().weight, model.lm_head.weight
        self.tokenizer = processor.tokenizer
        self.opening = int(processor.encode_prompt([Turn("human", "What is it?")]).input_ids[-1])
        self._before: dict[int, Tensor] = {}

    def words(self, text: str, *, end: bool = True) -> list[int]:
        """Tokens of a text, each once, for a token has one successor."""
        ids = tokenize(self.tokenizer, text, add_bos=False).ids
        ids = [token for token in dict.fromkeys(ids) if token != self.opening]
        return [*ids, int(self.tokenizer.eos_token_id)] if end else ids

    def plain_words(self, count: int) -> list[int]:
        """So many different tokens, none of them special."""
        special = {self.opening, *self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        return [token for token in range(len(self.tokenizer)) if token not in special][-count:]

    @torch.no_grad()
    def write(self, answer: Sequence[int]) -> None:
        """Make this the answer to everything."""
        for token, row in self._before.items():
            self.output[token] = row
        self._before = {token: self.output[token].clone() for token in answer}
        for before, after in pairwise([self.opening, *answer]):
            self.output[after] = self.embeddings[before]


@contextmanager
def without_end(model: MedPLIBForCausalLM, end: int = 2) -> Iterator[None]:
    """No answer of any network ends here of itself.

    The end token's output row is the mean of all rows, whose logit is never the largest.
    """
    weight = model.lm_head.weight
    row = weight[end].clone()
    with torch.no_grad():
        weight[end] = weight.float().mean(dim=0)
    try:
        yield
    finally:
        with torch.no_grad():
            weight[end] = row
