"""A whole MedPLIB of a few thousand parameters, for tests that need the real thing small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.checkpoint import save
from model.modeling.configuration import MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from model.processing.special_tokens import SEG_TOKEN
from model.processing.tokens import build_tokenizer, train_tokenizer

TEXTS = (
    "What modality is used to take this image? CT MR X-ray PET ultrasound",
    "Please segment the liver in this image. Sure, the liver is",
    "There is no tumour in this image. Is there a kidney in the region? yes no left right",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: ASSISTANT:",
)
"""Enough text to train a small tokenizer on."""


def tiny_config(vocab_size: int = 400, seg_token_id: int = 130, experts: int = 2, **sections: Any) -> MedPLIBConfig:
    """Two decoder layers of width 32 (mixtures unless ``experts`` is 0), CLIP at 28 px, SAM at 64 px."""
    moe = {"layers": (0, 1), "num_experts": (experts, experts)} if experts else {}
    return MedPLIBConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "projection_dim": 16,
        },
        sam_config={
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 16,
                "output_channels": 16,
                "num_pos_feats": 8,
                "window_size": 3,
                "global_attn_indexes": [1],
                "mlp_dim": 32,
            },
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 16},
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 32,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        },
        seg_token_id=seg_token_id,
        **{"moe": moe, **sections},
    )


def tiny_model(seed: int = 0, **options: Any) -> MedPLIBForCausalLM:
    """A network with repeatable random weights, in eval mode."""
    torch.manual_seed(seed)
    model = MedPLIBForCausalLM(tiny_config(**options))
    with torch.no_grad():
        for parameter in model.parameters():  # the usual tiny initial values make every answer the same
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def tiny_checkpoint(directory: Path, **options: Any) -> Path:
    """Write a tiny checkpoint with its tokenizer and processor; returns its directory."""
    tokenizer = build_tokenizer(train_tokenizer(TEXTS * 20, 340, directory / "tokenizer"))
    seg = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    model = tiny_model(vocab_size=len(tokenizer), seg_token_id=seg, **options)
    processor = MedPLIBProcessor(tokenizer, ProcessorSettings.from_config(model.config))
    save(model, processor, directory / "checkpoint")
    return directory / "checkpoint"
