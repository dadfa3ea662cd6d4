"""The pre-training steps of a small model: what each one reads, makes and leaves on disk for the next."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from model.checkpoint import save
from model.errors import MedPLIBError, escape_unprintable
from model.modeling.configuration import MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn, render
from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from model.processing.special_tokens import SEG_TOKEN
from model.processing.tokens import MODEL_FILE, build_tokenizer, train_tokenizer
from model.train.pretrain.curriculum import (
    AlignPlan,
    LanguagePlan,
    Lessons,
    MaskHeadPlan,
    SeenPlan,
    align,
    clip_features,
    fit_mask_head,
    pretrain_language,
    train_seen,
)
from model.train.pretrain.pool import ScenePool, render_pool
from model.train.pretrain.sam import SamPlan, pretrain_sam
from model.train.pretrain.vision import VisionPlan, pretrain_vision
from model.yaml_files import read_mapping

logger = logging.getLogger(__name__)

_SEEN_PARTS = ("decoder", "lm_head", "projector", "region_adapter")
_DESCRIPTION = "Make the starting points of a small model from phantoms alone."
STEPS = ("pool", "tokenizer", "vision", "sam", "language", "seen", "base")


class Pretraining:
    """Everything that pre-training makes, in one folder.

    ``pool/`` and ``pool_held_out/`` scenes · ``tokenizer/`` · ``vision.safetensors``, ``sam.safetensors``,
    ``language.safetensors`` trained parts · ``base/`` the native checkpoint that stage I starts from ·
    ``log.jsonl`` losses and seconds.

    Args:
        config: YAML with the sizes and the length of every step.
        out: the folder.
        workers: processes that render scenes.

    Raises:
        MedPLIBError: the configuration cannot be read.
    """

    def __init__(self, config: Path, out: Path, workers: int = 1) -> None:
        self.settings, self.out, self.workers = read_mapping(config, "the settings"), out, workers
        self.sizes = read_mapping(Path(self.settings["sizes"]), "the sizes")
        self.seed = int(self.settings.get("seed", 0))
        self.log = out / "log.jsonl"

    def make(self, step: str) -> None:
        """Run one step of ``STEPS``; what it needs must be there."""
        self.out.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        getattr(self, f"_make_{step}")()
        logger.info("%s: %.0f s", step, time.monotonic() - start)

    def _make_pool(self) -> None:
        logger.info("%d scenes to learn from, %d held out", len(self.pool), len(self.held_out))

    def _make_vision(self) -> None:
        plan = self._plan(VisionPlan, "vision")
        self._keep("vision", pretrain_vision(self.pool, self._sized(), plan, self.seed, self.log))

    def _make_sam(self) -> None:
        self._keep("sam", pretrain_sam(self.pool, self._sized(), self._plan(SamPlan, "sam"), self.seed, self.log))

    @cached_property
    def pool(self) -> ScenePool:
        """The scenes to learn from, rendered if they are not there yet."""
        settings = self.settings["pool"]
        return render_pool(self.out / "pool", settings["train"], settings["train_seed"], self.workers)

    @cached_property
    def held_out(self) -> ScenePool:
        """Scenes that nothing is trained on."""
        settings = self.settings["pool"]
        return render_pool(self.out / "pool_held_out", settings["held_out"], settings["held_out_seed"], self.workers)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The trained tokenizer, with MedPLIB's tokens."""
        return build_tokenizer(self.out / "tokenizer")

    def lessons(self, pool: ScenePool) -> Lessons:
        """A pool's questions, tokenised."""
        config = self._sized()
        return Lessons(pool, self.tokenizer, config.vision_grid, config.vision_config.image_size)

    def _make_tokenizer(self) -> None:
        settings = self.settings["tokenizer"]
        asked = [question for scene in self.pool.questions[: settings["scenes"]] for question in scene]
        texts = [text for question in asked for text in (question.question, question.answer)]
        frame = render([Turn("human", ""), Turn("gpt", "")])  # its words must not be spelt out
        train_tokenizer([*texts, *[frame] * len(texts)], settings["vocab_size"], self.out / "tokenizer")

    def _make_language(self) -> None:
        torch.manual_seed(self.seed)
        model = MedPLIBForCausalLM(self._with_vocabulary())
        held_out = self.lessons(self.held_out)
        plan = self._plan(LanguagePlan, "language")
        symbols = pretrain_language(model, self.lessons(self.pool), held_out, plan, self.seed, self.log)
        parts = nn.ModuleDict({"decoder": model.model.decoder, "lm_head": model.lm_head, "symbols": symbols})
        self._keep("language", parts)

    def _make_seen(self) -> None:
        """Fit projector and region adapter to the symbolic images, then train on what the tower sees."""
        torch.manual_seed(self.seed)
        model = MedPLIBForCausalLM(self._with_vocabulary())
        language, lessons, held_out = self._kept("language"), self.lessons(self.pool), self.lessons(self.held_out)
        model.model.vision_tower.load_state_dict(_inside(self._kept("vision"), "tower."))
        model.model.decoder.load_state_dict(_inside(language, "decoder."))
        model.lm_head.load_state_dict(_inside(language, "lm_head."))
        symbols = lessons.symbolic(model)
        symbols.load_state_dict(_inside(language, "symbols."))
        features = clip_features(model, self.pool)
        align(model, symbols, lessons, features, self._plan(AlignPlan, "align"), self.seed, self.log)
        scored = (held_out, clip_features(model, self.held_out))
        train_seen(model, lessons, features, self._plan(SeenPlan, "seen"), self.seed, self.log, scored)
        self._keep("seen", nn.ModuleDict({name: _part(model, name) for name in _SEEN_PARTS}))

    def _make_base(self) -> None:
        """Put all parts together, fit the mask head, and write the checkpoint that stage I starts from."""
        torch.manual_seed(self.seed)
        model = MedPLIBForCausalLM(self._with_vocabulary())
        seen, sam = self._kept("seen"), self._kept("sam")
        for name in _SEEN_PARTS:
            _part(model, name).load_state_dict(_inside(seen, f"{name}."))
        model.model.vision_tower.load_state_dict(_inside(self._kept("vision"), "tower."))
        model.model.sam.load_state_dict(_inside(sam, "sam."))
        lessons, features = self.lessons(self.pool), clip_features(model, self.pool)
        plan = self._plan(MaskHeadPlan, "mask_head")
        fit_mask_head(model, lessons, features, sam["names.weight"], plan, self.seed, self.log)
        settings = ProcessorSettings.from_config(model.config, max_length=512)
        sentencepiece_model = (self.out / "tokenizer" / MODEL_FILE).read_bytes()
        save(model, MedPLIBProcessor(self.tokenizer, settings, sentencepiece_model), self.out / "base")

    def _sized(self) -> MedPLIBConfig:
        return MedPLIBConfig(**self.sizes)

    def _with_vocabulary(self) -> MedPLIBConfig:
        tokens = self.tokenizer
        ids = {"pad_token_id": tokens.pad_token_id, "bos_token_id": tokens.bos_token_id}
        text = {**self.sizes["text_config"], "vocab_size": len(tokens), "eos_token_id": tokens.eos_token_id, **ids}
        seg = tokens.convert_tokens_to_ids(SEG_TOKEN)
        return MedPLIBConfig(**{**self.sizes, "text_config": text, "seg_token_id": seg})

    def _plan(self, kind: type[Any], name: str) -> Any:
        try:
            return kind(**self.settings.get(name, {}))
        except TypeError as error:
            raise MedPLIBError(f"the pre-training settings of {name!r} do not fit: {error}; mend the YAML") from error

    def _keep(self, name: str, part: nn.Module) -> None:
        state = {key: value.detach().clone().contiguous() for key, value in part.state_dict().items()}
        temporary = self.out / f".{name}.part"
        save_file(state, temporary)
        temporary.replace(self.out / f"{name}.safetensors")

    def _kept(self, name: str) -> dict[str, Tensor]:
        path = self.out / f"{name}.safetensors"
        if not path.is_file():
            raise MedPLIBError(f"{path} is missing; run the pre-training step {name!r} first")
        return load_file(path)


def _inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _part(model: MedPLIBForCausalLM, name: str) -> nn.Module:
    return model.lm_head if name == "lm_head" else getattr(model.model, name)


def main(arguments: list[str] | None = None) -> int:
    """Run pre-training steps in the order given; returns the exit code."""
    escape_unprintable()
    parser = argparse.ArgumentParser(prog="python -m model.train.pretrain", description=_DESCRIPTION)
    parser.add_argument("steps", nargs="+", choices=[*STEPS, "all"], help="what to make, in this order")
    parser.add_argument("--config", type=Path, default=Path("configs/nano/pretrain.yaml"), help="sizes and lengths")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render scenes")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        made = Pretraining(options.config, options.out, options.workers)
        for step in STEPS if "all" in options.steps else options.steps:
            made.make(step)
    except MedPLIBError as error:
        logger.error("%s", error)
        return 2
    return 0
