"""SAM-Med2D: SAM with an adapter in every image-encoder block and a text vector as one more prompt.

The layers are transformers' SAM layers; what is ours is the adapter, the text prompt, and decoding many masks of many
images in one batch. All sizes come from ``SamConfig``: ViT-B, L and H, the nano, any image size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import SamConfig
from transformers.models.sam.modeling_sam import (
    SamFeedForward,
    SamLayerNorm,
    SamMaskDecoder,
    SamPatchEmbeddings,
    SamPromptEncoder,
    SamVisionLayer,
    SamVisionNeck,
)

from model.modeling.configuration import MaskConfig


class SamAdapter(nn.Module):
    """SAM-Med2D's adapter: gated channels through a stride-2 convolution and its transpose, beside a shortcut.

    Args:
        width: channels C of the image encoder.
        mlp_ratio: hidden width of the channel gate as a fraction of C; 0.25 as published.
    """

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm = nn.LayerNorm(width)
        self.channel = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False), nn.Sigmoid()
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, kernel_size=4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map features [N, h, w, C] to features of the same shape; h and w must be even."""
        features = hidden.permute(0, 3, 1, 2)  # [N, C, h, w]
        gate = self.channel(features.mean(dim=(2, 3)))  # [N, C]
        features = features + self.spatial(features * gate[:, :, None, None])
        return self.norm(features.permute(0, 2, 3, 1))  # [N, h, w, C]


class SamMed2DLayer(SamVisionLayer):
    """An image-encoder block whose feed-forward half may have the adapter in parallel with its MLP."""

    def __init__(self, config: Any, window_size: int, mask: MaskConfig) -> None:
        super().__init__(config, window_size)
        self.adapter = SamAdapter(config.hidden_size, mask.adapter_mlp_ratio) if mask.adapter else None

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """Map features [N, h, w, C] to features of the same shape."""
        hidden = hidden + self._attend(self.layer_norm1(hidden))
        normed = self.layer_norm2(hidden)
        hidden = hidden + self.mlp(normed)
        return hidden if self.adapter is None else hidden + self.adapter(normed)

    def _attend(self, normed: Tensor) -> Tensor:
        if self.window_size == 0:  # global attention
            return self.attn(normed)[0]
        _, height, width, _ = normed.shape
        windows, padded = self.window_partition(normed, self.window_size)
        return self.window_unpartition(self.attn(windows)[0], self.window_size, padded, (height, width))


class ResidualConvBlock(nn.Module):
    """Two 3 × 3 convolutions with group normalization beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [N, c, h, w] to features of the same shape."""
        hidden = functional.relu(self.norm1(self.conv1(features)))
        return functional.relu(features + self.norm2(self.conv2(hidden)))


class ConvStem(nn.Module):
    """Strided convolutions in place of the patch embedding; their maps are also the mask decoder's skip features.

    A mask of 1/4 of the input's resolution loses vessels that are two pixels wide. The skip features carry the input's
    detail around the transformer, as in a U-Net.

    Args:
        channels: of the maps at strides 2, 4 and 8.
        width: channels at stride 16, of the transformer.
        skips: channels of the skip features at strides 2, 4 and 8.
    """

    def __init__(self, channels: tuple[int, ...], width: int, skips: tuple[int, ...]) -> None:
        super().__init__()
        steps = zip((3, *channels), (*channels, width), strict=True)
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False), nn.GroupNorm(8, after)
            )
            for before, after in steps
        )
        # None at stride 2: a block there would cost as much as all others.
        self.blocks = nn.ModuleList(ResidualConvBlock(channels) for channels in (*channels[1:], width))
        self.skips = nn.ModuleList(nn.Conv2d(c, s, kernel_size=1) for c, s in zip(channels, skips, strict=True))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map images [N, 3, S, S] to [N, width, S/16, S/16] and skip features at strides 2, 4 and 8."""
        hidden = functional.relu(self.down[0](pixel_values))
        skips = [self.skips[0](hidden)]
        for level, block in enumerate(self.blocks, start=1):
            hidden = block(functional.relu(self.down[level](hidden)))
            if level < len(self.skips):
                skips.append(self.skips[level](hidden))
        return hidden, skips


class SamMed2DImageEncoder(nn.Module):
    """SAM's image encoder: patches or a convolutional stem, blocks with windowed or global attention, neck."""

    def __init__(self, config: Any, mask: MaskConfig) -> None:
        super().__init__()
        grid = config.image_size // config.patch_size
        self.skip_channels = skip_channels(mask)
        if mask.stem_channels:
            self.stem = ConvStem(mask.stem_channels, config.hidden_size, self.skip_channels)
        else:
            self.patch_embed = SamPatchEmbeddings(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, config.hidden_size))
        self.layers = nn.ModuleList(
            SamMed2DLayer(config, 0 if index in config.global_attn_indexes else config.window_size, mask)
            for index in range(config.num_hidden_layers)
        )
        self.neck = SamVisionNeck(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map normalised, padded images [N, 3, S, S] to embeddings [N, C', S/patch, S/patch].

        C' is C as published. With a stem the skip features follow, the pixels of each cell as further channels, so that
        an image's embedding is one tensor in either case.
        """
        skips: list[Tensor] = []
        if self.skip_channels:
            hidden, skips = self.stem(pixel_values)
            hidden = hidden.permute(0, 2, 3, 1)
        else:
            hidden = self.patch_embed(pixel_values)  # [N, h, w, width]
        hidden = hidden + self.pos_embed
        for layer in self.layers:
            hidden = layer(hidden)
        folded = [functional.pixel_unshuffle(skip, 8 >> level) for level, skip in enumerate(skips)]
        return torch.cat([self.neck(hidden), *folded], dim=1)  # [N, C', h, w]


class FourierPositions(nn.Module):
    """SAM's random Fourier features of positions, computed in float32 whatever the weights' type.

    In bfloat16 the phase would be off by some hundredths of a radian. The matrix is a fixed draw from a unit normal
    distribution and, as in the original SAM, a buffer: it is never trained.
    """

    positional_embedding: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("positional_embedding", torch.randn(2, num_features))

    def forward(self, input_coords: Tensor, input_shape: tuple[int, int] | None = None) -> Tensor:
        """Encode (x, y) positions [..., 2] as features [..., 2F].

        Args:
            input_coords: positions in pixels of an image of ``input_shape`` (height, width), or in [0, 1] without it.
        """
        coordinates = input_coords.float()
        if input_shape is not None:
            coordinates = coordinates / coordinates.new_tensor([input_shape[1], input_shape[0]])
        x, y = (2 * coordinates - 1).unsqueeze(-1).unbind(-2)
        weight_x, weight_y = self.positional_embedding.float()
        phase = 2 * math.pi * (x * weight_x + y * weight_y)  # not a matrix product: autocast leaves it in float32
        return torch.cat([phase.sin(), phase.cos()], dim=-1).to(self.positional_embedding.dtype)


class SamMed2DPromptEncoder(SamPromptEncoder):
    """SAM's prompt encoder with one more kind of prompt: a vector made from text."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__(config)
        features = _section(config.vision_config).num_pos_feats
        self.shared_embedding = FourierPositions(features)  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        queries: Tensor | None,
        boxes: Tensor | None = None,
        points: Tensor | None = None,
        point_labels: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the prompts of M masks; see `SamMed2D.decode` for the arguments.

        Returns:
            Sparse embeddings [M, 1, T, C], points before boxes before text; dense embeddings, of no mask [1, C, h, w]
            or of the earlier masks [M, C, h, w]; positional embeddings of the image grid [1, C, h, w].
        """
        sparse, dense = super().forward(
            input_points=None if points is None else points[:, None],  # type: ignore[arg-type]
            input_labels=None if point_labels is None else point_labels[:, None],
            input_boxes=None if boxes is None else boxes[:, None],
            input_masks=masks,  # type: ignore[arg-type]
        )
        parts = [part for part in (sparse, None if queries is None else queries[:, None, None]) if part is not None]
        if not parts:
            raise ValueError("a mask needs a prompt: give queries, boxes or points")
        embeddings = torch.cat([part.to(dense.dtype) for part in parts], dim=2)  # [M, 1, T, C]
        return embeddings, dense[:1] if masks is None else dense, self._grid_positions()

    def _grid_positions(self) -> Tensor:
        height, width = self.image_embedding_size
        device = self.shared_embedding.positional_embedding.device
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # [h, w, 2]
        return self.shared_embedding(centres).permute(2, 0, 1)[None]


class SkipMaskDecoder(SamMaskDecoder):
    """SAM's mask decoder with skip features in its up-sampling, and one more step of it: masks at stride 2.

    Args:
        config: of SAM's mask decoder.
        skips: channels at strides 2, 4 and 8.
    """

    def __init__(self, config: Any, skips: tuple[int, ...]) -> None:
        super().__init__(config)
        fine, middle, coarse = skips
        self.upscale_conv1 = nn.ConvTranspose2d(self.hidden_size, coarse, kernel_size=2, stride=2)
        self.upscale_conv2 = nn.ConvTranspose2d(coarse, middle, kernel_size=2, stride=2)
        self.upscale_conv3 = nn.ConvTranspose2d(middle, fine, kernel_size=2, stride=2)
        self.upscale_layer_norm = SamLayerNorm(coarse, data_format="channels_first")
        self.refine = nn.ModuleList(nn.Conv2d(c, c, kernel_size=3, padding=1) for c in reversed(skips))
        self.fine_head = SamFeedForward(self.hidden_size, self.hidden_size, fine, 3)
        del self.output_hypernetworks_mlps

    def forward(  # type: ignore[override]
        self,
        image_embeddings: Tensor,
        image_positional_embeddings: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        skips: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Decode one mask per prompt.

        Args:
            image_embeddings: [M, C, h, w]; positional embeddings likewise.
            sparse_prompt_embeddings: [M, 1, T, C].
            dense_prompt_embeddings: [1 or M, C, h, w].
            skips: features [M, c, 16h/s, 16w/s] of strides s = 2, 4, 8.

        Returns:
            Logits [M, 1, 8h, 8w] and predicted IoU [M, 1].
        """
        count, channels, height, width = image_embeddings.shape
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # [1 + masks, C]
        tokens = torch.cat([output_tokens.expand(count, 1, -1, -1), sparse_prompt_embeddings], dim=2)
        tokens, features = self.transformer(
            point_embeddings=tokens,
            image_embeddings=image_embeddings + dense_prompt_embeddings,
            image_positional_embeddings=image_positional_embeddings,
            attention_similarity=None,
        )  # [M, 1, T', C], [M, 1, h·w, C]
        hidden = features.transpose(2, 3).reshape(count, channels, height, width)
        steps = (self.upscale_conv1, self.upscale_conv2, self.upscale_conv3)
        for step, skip, refine in zip(steps, reversed(skips), self.refine, strict=True):
            hidden = step(hidden)
            if step is self.upscale_conv1:
                hidden = self.upscale_layer_norm(hidden)
            hidden = self.activation(hidden + skip)
            hidden = hidden + self.activation(refine(hidden))  # [M, c, 16h/s, 16w/s]
        weights = self.fine_head(tokens[:, 0, 1])  # [M, c]
        masks = torch.einsum("mc,mchw->mhw", weights, hidden)
        return masks[:, None], self.iou_prediction_head(tokens[:, 0, 0])[:, :1]


def skip_channels(mask: MaskConfig) -> tuple[int, ...]:
    """Channels of the skip features and of the mask decoder's up-sampling at strides 2, 4 and 8; () without a stem."""
    return tuple(channels // 2 for channels in mask.stem_channels)


class SamMed2D(nn.Module):
    """Image encoder, prompt encoder and mask decoder (reference §1); one mask per prompt.

    Args:
        sam: sizes; ``vision_config.image_size`` is the side S of the square input, 256 as published.
        mask: whether and how wide the adapter is.
    """

    def __init__(self, sam: SamConfig, mask: MaskConfig) -> None:
        super().__init__()
        sam = copy.deepcopy(sam)
        vision, decoder = _section(sam.vision_config), _section(sam.mask_decoder_config)
        _check_sizes(vision, _section(sam.prompt_encoder_config), decoder, mask)
        for config in (vision, decoder):  # the parent's choice may be one that SAM's biased attention lacks
            config._attn_implementation = "sdpa"
        self.image_encoder = SamMed2DImageEncoder(vision, mask)
        self.prompt_encoder = SamMed2DPromptEncoder(sam)
        self.skip_channels = skip_channels(mask)
        self.mask_decoder = (
            SkipMaskDecoder(decoder, self.skip_channels) if self.skip_channels else SamMaskDecoder(decoder)
        )
        grid = vision.image_size // vision.patch_size
        # Channels: the neck's, then those of the skip features at each of a cell's 8 × 8, 4 × 4 and 2 × 2 places.
        self.embedding_channels = (
            vision.output_channels,
            *(c * 4 ** (3 - i) for i, c in enumerate(self.skip_channels)),
        )
        self.embedding_shape = (sum(self.embedding_channels), grid, grid)
        # True makes a frozen encoder run for no image too: ranks that share its weights (ZeRO-3) need it.
        self.always_encode = False

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Encode images once for any number of masks; without gradients where the whole encoder is frozen.

        Args:
            pixel_values: [N, 3, S, S], normalised and padded (reference §3); N may be 0.

        Returns:
            Image embeddings [N, *embedding_shape] with h = w = S / patch size.
        """
        num_images = len(pixel_values)
        pixel_values = pixel_values.to(self.image_encoder.pos_embed.dtype)
        trained = any(parameter.requires_grad for parameter in self.image_encoder.parameters())
        if num_images == 0 and not (trained or self.always_encode):
            return pixel_values.new_zeros((0, *self.embedding_shape))
        if num_images == 0:  # a trained encoder stays in the graph, as the decoder does
            pixel_values = _placeholder_row(pixel_values)
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.image_encoder(pixel_values)[:num_images]

    def decode(
        self,
        image_embeddings: Tensor,
        queries: Tensor | None,
        image_index: Tensor,
        *,
        boxes: Tensor | None = None,
        points: Tensor | None = None,
        point_labels: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode M masks, each of its own image; at least one kind of prompt is given.

        With M = 0 the decoder still runs, on a placeholder that is cut off again, so that every parameter takes part in
        the graph (with a zero gradient) and distributed ranks with and without masks stay in step.

        Args:
            image_embeddings: [N, *embedding_shape] of `encode_image`.
            queries: text prompts [M, C] of the mask head.
            image_index: [M] long, the image of each mask.
            boxes: [M, 4] as (x1, y1, x2, y2) in pixels of the S × S input.
            points: [M, P, 2] as (x, y) in the same pixels.
            point_labels: [M, P] 1 inside, 0 outside, −1 "not a point", −10 ignored; ones if not given.
            masks: [M, 1, 4h, 4w] logits of an earlier mask, which a sparse prompt corrects.

        Returns:
            Low-resolution logits [M, 1, 4h, 4w], or [M, 1, 8h, 8w] with a convolutional stem, and predicted IoU [M, 1].
        """
        num_masks = len(image_index)
        if points is not None and point_labels is None:
            point_labels = torch.ones(points.shape[:2], dtype=torch.long, device=points.device)
        prompts = [queries, boxes, points, point_labels, masks]
        if num_masks == 0:
            prompts = [None if prompt is None else _placeholder_row(prompt) for prompt in prompts]
            image_index = image_index.new_zeros(1)
            image_embeddings = image_embeddings if len(image_embeddings) else _placeholder_row(image_embeddings)
        sparse, dense, positions = self.prompt_encoder(*prompts)
        images = image_embeddings.index_select(0, image_index).to(dense.dtype)  # [M, C', h, w]
        images, *folded = images.split(self.embedding_channels, dim=1)
        if self.skip_channels:
            skips = [functional.pixel_shuffle(skip, 8 >> level) for level, skip in enumerate(folded)]
            low_res, iou = self.mask_decoder(images, positions.expand_as(images), sparse, dense, skips)
            return low_res[:num_masks], iou[:num_masks]
        low_res, iou = self.mask_decoder(
            image_embeddings=images,
            image_positional_embeddings=positions.expand_as(images),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )  # [M, 1, 1, 4h, 4w], [M, 1, 1]
        return low_res[:num_masks, 0], iou[:num_masks, 0]


def _placeholder_row(tensor: Tensor) -> Tensor:
    """Append one row of zeros to [0, ...], keeping the (empty) tensor in the graph."""
    return functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, 1))


def _section(config: Any) -> Any:
    """A sub-config as the object it is at run time; `SamConfig` annotates it as maybe a mapping."""
    return config


def _check_sizes(vision: Any, prompt: Any, decoder: Any, mask: MaskConfig) -> None:
    """Refuse sizes that do not fit together, each with its names, before torch complains about shapes."""
    found = {
        "vision_config.output_channels": vision.output_channels,
        "2 · vision_config.num_pos_feats": 2 * vision.num_pos_feats,
        "mask_decoder_config.hidden_size": decoder.hidden_size,
    }
    wrong = [f"{name} is {value}" for name, value in found.items() if value != prompt.hidden_size]
    if wrong:
        raise ValueError(f"SAM's prompts are {prompt.hidden_size} wide but {', '.join(wrong)}; make them equal")
    if (vision.image_size, vision.patch_size) != (prompt.image_size, prompt.patch_size):
        raise ValueError(
            f"SAM's vision_config has image and patch size {vision.image_size} and {vision.patch_size} but "
            f"prompt_encoder_config has {prompt.image_size} and {prompt.patch_size}; make them equal"
        )
    if mask.stem_channels and (vision.patch_size != 16 or vision.hidden_size % 8):
        raise ValueError(
            f"a convolutional stem has stride 16 and a width that is a multiple of 8, but patch_size is "
            f"{vision.patch_size} and hidden_size {vision.hidden_size}"
        )
    if mask.adapter and vision.image_size // vision.patch_size % 2:
        raise ValueError(
            f"SAM-Med2D's adapter halves the grid, but image size {vision.image_size} over patch size "
            f"{vision.patch_size} is odd; choose an even grid"
        )
