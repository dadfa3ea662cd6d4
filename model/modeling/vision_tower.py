"""The CLIP tower: pixels in, patch features out (reference §1)."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel


class VisionTower(nn.Module):
    """CLIP's hidden states of one chosen layer, without the class token.

    Only the layers below the chosen one are run; the rest exist because checkpoints hold them. Without a trainable
    parameter no graph is recorded.

    Args:
        config: sizes of the tower.
        select_layer: hidden state to read; 0 is the embedding, −1 the last layer's output, −2 as published.
        select_feature: ``patch`` drops the class token, ``cls_patch`` keeps it.

    Raises:
        ValueError: the tower has no such hidden state, or the feature choice is unknown.
    """

    def __init__(
        self,
        config: CLIPVisionConfig,
        select_layer: int = -2,
        select_feature: Literal["patch", "cls_patch"] = "patch",
    ) -> None:
        super().__init__()
        states = config.num_hidden_layers + 1
        if not -states <= select_layer < states:
            raise ValueError(
                f"vision_select_layer is {select_layer}; a tower of {states - 1} layers has {states} states"
            )
        if select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"unknown vision_select_feature {select_feature!r:.80}; known: patch, cls_patch")
        self.clip = CLIPVisionModel(config)
        self.layers_to_run = select_layer % states
        self.keeps_class_token = select_feature == "cls_patch"
        # True makes a frozen tower run for no image too: ranks that share its weights (ZeRO-3) need it.
        self.always_encode = False

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features [N, P, Dv] of CLIP inputs [N, 3, H, W]; N may be 0. A kept class token is one of the P."""
        embeddings, count = self.clip.embeddings, len(pixel_values)
        if count == 0 and (self._is_trainable() or self.always_encode):
            # A tower in training stays in every rank's graph; CLIP's reshapes need a row, which is cut off again. The
            # module is not called anew for it: with ZeRO-3 ranks must call the same modules equally often.
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        elif count == 0:
            tokens = embeddings.num_patches + self.keeps_class_token
            return pixel_values.new_zeros(0, tokens, embeddings.embed_dim)
        with contextlib.nullcontext() if self._is_trainable() else torch.no_grad():
            hidden = self.clip.pre_layrnorm(embeddings(pixel_values.to(embeddings.patch_embedding.weight.dtype)))
            for layer in self.clip.encoder.layers[: self.layers_to_run]:
                hidden = layer(hidden, attention_mask=None)  # [N, 1 + P, Dv]
        return (hidden if self.keeps_class_token else hidden[:, 1:])[:count]

    def _is_trainable(self) -> bool:
        return any(parameter.requires_grad for parameter in self.clip.parameters())
