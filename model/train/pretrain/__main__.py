"""``python -m model.train.pretrain STEP …``: make the starting points of a small model from phantoms alone."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from model.checkpoint import save
from model.errors import MedPLIBError
from model.modeling.configuration import MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn, render
from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from model.processing.special_tokens import SEG_TOKEN
from model.processing.tokens import MODEL_FILE, build_tokenizer, train_tokenizer
from model.settings import read_mapping
from model.train.pretrain import Pretraining, run_steps
from model.train.pretrain.language import Lessons, align, clip_features, fit_mask_head, pretrain_language, train_seen
from model.train.pretrain.pools import ScenePool, render_pool
from model.train.pretrain.towers import Plan, pretrain_sam_on_scenes, pretrain_vision_on_scenes

logger = logging.getLogger(__name__)

_SEEN_PARTS = ("decoder", "lm_head", "projector", "region_adapter")
_PLANS = {
    "vision": Plan(6000, 32, 1e-3),
    "sam": Plan(5000, 8, 1e-3),
    "language": Plan(3000, 4, 2e-3),
    "align": Plan(1500, 32, 2e-3),
    "seen": Plan(1500, 4, 1e-3, guide=0.5),
    "mask_head": Plan(300, 4, 2e-3),
}


class NanoPretraining(Pretraining):
    """Everything that pre-training makes, in one folder.

    ``pool/`` and ``pool_held_out/`` scenes, rendered by ``workers`` processes · ``tokenizer/`` ·
    ``vision.safetensors``, ``sam.safetensors``, ``language.safetensors`` trained parts · ``base/`` the native
    checkpoint that stage I starts from · ``log.jsonl`` losses and seconds.
    """

    steps = ("pool", "tokenizer", "vision", "sam", "language", "seen", "base")

    def __init__(self, config: Path, out: Path, workers: int = 1) -> None:
        super().__init__(config, out)
        self.workers = workers
        self.sizes = read_mapping(Path(self.settings["sizes"]), "the sizes")

    def make_pool(self) -> None:
        logger.info("%d scenes to learn from, %d held out", len(self.pool), len(self.held_out))

    def make_vision(self) -> None:
        plan, config = self._plan("vision"), MedPLIBConfig(**self.sizes)
        self.save_part("vision", pretrain_vision_on_scenes(self.pool, config, plan, self.seed, self.log))

    def make_sam(self) -> None:
        plan, config = self._plan("sam"), MedPLIBConfig(**self.sizes)
        self.save_part("sam", pretrain_sam_on_scenes(self.pool, config, plan, self.seed, self.log))

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
        config = MedPLIBConfig(**self.sizes)
        return Lessons(pool, self.tokenizer, config.vision_grid, config.vision_config.image_size)

    def make_tokenizer(self) -> None:
        settings = self.settings["tokenizer"]
        questions = [question for scene in self.pool.questions[: settings["scenes"]] for question in scene]
        texts = [text for question in questions for text in (question.question, question.answer)]
        frame = render([Turn("human", ""), Turn("gpt", "")])  # its words must not be spelt out
        train_tokenizer([*texts, *[frame] * len(texts)], settings["vocab_size"], self.out / "tokenizer")

    def make_language(self) -> None:
        torch.manual_seed(self.seed)
        model = MedPLIBForCausalLM(self._with_vocabulary())
        held_out = self.lessons(self.held_out)
        plan = self._plan("language")
        symbols = pretrain_language(model, self.lessons(self.pool), held_out, plan, self.seed, self.log)
        parts = nn.ModuleDict({"decoder": model.model.decoder, "lm_head": model.lm_head, "symbols": symbols})
        self.save_part("language", parts)

    def make_seen(self) -> None:
        """Fit projector and region adapter to the symbolic images, then train on what the tower sees."""
        torch.manual_seed(self.seed)
        model = MedPLIBForCausalLM(self._with_vocabulary())
        lessons, held_out = self.lessons(self.pool), self.lessons(self.held_out)
        model.model.vision_tower.load_state_dict(self.load_part("vision", "tower."))
        model.model.decoder.load_state_dict(self.load_part("language", "decoder."))
        model.lm_head.load_state_dict(self.load_part("language", "lm_head."))
        symbols = lessons.symbolic(model)
        symbols.load_state_dict(self.load_part("language", "symbols."))
        features = clip_features(model, self.pool)
        align(model, symbols, lessons, features, self._plan("align"), self.seed, self.log)
        scored = (held_out, clip_features(model, self.held_out))
        train_seen(model, lessons, features, self._plan("seen"), self.seed, self.log, scored)
        self.save_part("seen", nn.ModuleDict({name: _part(model, name) for name in _SEEN_PARTS}))

    def make_base(self) -> None:
        """Put all parts together, fit the mask head, and write the checkpoint that stage I starts from."""
        torch.manual_seed(self.seed)
        model = MedPLIBForCausalLM(self._with_vocabulary())
        for name in _SEEN_PARTS:
            _part(model, name).load_state_dict(self.load_part("seen", f"{name}."))
        model.model.vision_tower.load_state_dict(self.load_part("vision", "tower."))
        model.model.sam.load_state_dict(self.load_part("sam", "sam."))
        lessons, features = self.lessons(self.pool), clip_features(model, self.pool)
        plan = self._plan("mask_head")
        fit_mask_head(model, lessons, features, self.load_part("sam")["names.weight"], plan, self.seed, self.log)
        settings = ProcessorSettings.from_config(model.config, max_length=512)
        sentencepiece_model = (self.out / "tokenizer" / MODEL_FILE).read_bytes()
        save(model, MedPLIBProcessor(self.tokenizer, settings, sentencepiece_model), self.out / "base")

    def _with_vocabulary(self) -> MedPLIBConfig:
        tokens = self.tokenizer
        ids = {"pad_token_id": tokens.pad_token_id, "bos_token_id": tokens.bos_token_id}
        text = {**self.sizes["text_config"], "vocab_size": len(tokens), "eos_token_id": tokens.eos_token_id, **ids}
        seg = tokens.convert_tokens_to_ids(SEG_TOKEN)
        return MedPLIBConfig(**{**self.sizes, "text_config": text, "seg_token_id": seg})

    def _plan(self, name: str) -> Plan:
        try:
            return replace(_PLANS[name], **self.settings.get(name, {}))
        except TypeError as error:
            raise MedPLIBError(f"the pre-training settings of {name!r} do not fit: {error}; mend the YAML") from error


def _part(model: MedPLIBForCausalLM, name: str) -> nn.Module:
    return model.lm_head if name == "lm_head" else getattr(model.model, name)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m model.train.pretrain", description="Make the starting points of a small model from phantoms."
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render scenes")
    return run_steps(
        parser,
        "configs/nano/pretrain.yaml",
        NanoPretraining.steps,
        lambda options: NanoPretraining(options.config, options.out, options.workers),
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
