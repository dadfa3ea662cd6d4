"""MedPLIB: image in, text out, and a mask where the text has ``<SEG>`` (arXiv 2412.09278)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from model.modeling.configuration import IGNORE_INDEX, MedPLIBConfig
from model.modeling.decoder import DecoderOutput, MedPLIBDecoder
from model.modeling.in_context import MaskTokenEncoder, TokenCompressor
from model.modeling.losses import MASK_LOSSES, causal_ce, each_mask_loss, mean_mask_losses
from model.modeling.mask_head import MaskHead, restore_masks
from model.modeling.moe import RouterStats
from model.modeling.outputs import MaskOutput, MedPLIBOutput, RowLosses, SplicedInputs
from model.modeling.projector import build_projector
from model.modeling.region import RegionAdapter
from model.modeling.sam_med2d import SamMed2D
from model.modeling.splice import plan_splice, splice_embeddings, splice_labels
from model.modeling.vision_tower import VisionTower


class MedPLIBModel(nn.Module):
    """The parts of the network, under the names that checkpoints use."""

    def __init__(self, config: MedPLIBConfig) -> None:
        super().__init__()
        text_dim, vision_dim = config.text_config.hidden_size, config.vision_config.hidden_size
        self.vision_tower = VisionTower(config.vision_config, config.vision_select_layer, config.vision_select_feature)
        self.projector = build_projector(config.projector, vision_dim, text_dim)
        if config.region.enabled:
            self.region_adapter = RegionAdapter(config.region, vision_dim, text_dim, config.vision_grid)
        if config.in_context.token_compressor:
            self.token_compressor = TokenCompressor(text_dim, config.in_context.compressed_tokens)
        if config.in_context.mask_encoder:
            self.mask_encoder = MaskTokenEncoder(text_dim, config.in_context.mask_encoder_tokens)
        self.decoder = MedPLIBDecoder(config.text_config, config.moe)
        self.mask_head = MaskHead(text_dim, config.mask_query_dim)
        self.sam = SamMed2D(config.sam_config, config.mask)


class MedPLIBForCausalLM(PreTrainedModel, GenerationMixin):
    """A LLaVA-style LLaMA with a region adapter, a mixture of experts and a SAM-Med2D mask branch."""

    config_class = MedPLIBConfig
    config: MedPLIBConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MedPLIBDecoderLayer", "CLIPEncoderLayer", "SamMed2DLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _can_compile_fullgraph = False
    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}  # where tie_word_embeddings says so

    def __init__(self, config: MedPLIBConfig) -> None:
        super().__init__(config)
        self.model = MedPLIBModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.decoder.embed_tokens = value

    # --- images and regions into the sequence ------------------------------------------------------------------

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """CLIP patch features [I, P, Dv] of CLIP inputs [I, 3, H, W]; they depend on the image alone, so cache them."""
        return self.model.vision_tower(pixel_values)

    def encode_segmented_images(self, sam_pixel_values: torch.Tensor) -> torch.Tensor:
        """SAM embeddings [N, C, s, s] of SAM inputs [N, 3, S, S]; they depend on the image alone, so cache them."""
        return self.model.sam.encode_image(sam_pixel_values)

    def project_images(self, image_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, RouterStats | None]:
        """Visual tokens [I, P, D] of CLIP features [I, P', Dv], the projector's auxiliary loss, what its router did."""
        projected = self.model.projector(image_features)
        tokens = projected.features
        if self.config.in_context.token_compressor:
            tokens = self.model.token_compressor(tokens)  # [I, fewer P, D]
        aux = tokens.new_zeros(()) if projected.aux_loss is None else projected.aux_loss
        return tokens, aux, projected.router

    def splice(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        region_masks: torch.Tensor | None = None,
        region_image: torch.Tensor | None = None,
        example_masks: torch.Tensor | None = None,
        visual_kinds: list[str] | None = None,
        image_tokens: torch.Tensor | None = None,
    ) -> SplicedInputs:
        """Embed a batch and put its images and regions in place.

        Args:
            input_ids: long [B, T] with image and region placeholders.
            attention_mask: [B, T]; all ones when absent.
            image_features: [I, P, Dv] from ``encode_images``, one per image placeholder in reading order.
            region_masks: [R, g, g] in {0, 1}, one per region placeholder in reading order.
            region_image: long [R], the image each region lies on; required with ``region_masks``.
            example_masks: [K, 1, H, W] masks that enter through the mask encoder (in-context prompts).
            visual_kinds: per image placeholder ``image`` or ``mask``; all images when absent.
            image_tokens: [I, P, D] that ``project_images`` made of the features; made here when absent. The features
                may then be of more images, which regions lie on and no placeholder shows.

        Raises:
            ValueError: placeholders and images, regions or masks do not match in number.
        """
        embed = self.get_input_embeddings()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if image_features is None:
            size = self.config.vision_config.image_size
            image_features = self.encode_images(embed.weight.new_zeros(0, 3, size, size))  # [0, P, Dv]
        aux, stats = embed.weight.new_zeros(()), None
        if image_tokens is None:
            image_tokens, aux, stats = self.project_images(image_features)
        masks = self._mask_tokens(example_masks, embed.weight)  # [K, Pm, D]
        visual = _visual_tokens(image_tokens, masks, visual_kinds)
        plan = plan_splice(input_ids, attention_mask, [len(tokens) for tokens in visual])
        regions = self._region_features(image_features, region_masks, region_image, embed.weight)  # [R, D]
        text = embed(input_ids.clamp(min=0))  # [B, T, D]
        padding = embed.weight[self.config.pad_token_id or 0]
        embeds = splice_embeddings(plan, input_ids, text, visual, regions, padding)  # [B, L, D]
        # Empty sums tie every part in, used or not: all ranks of a distributed run must have the same graph.
        embeds = embeds + image_tokens[:0].sum() + masks[:0].sum()
        return SplicedInputs(embeds, plan, aux, stats)

    def _mask_tokens(self, example_masks: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Tokens [K, Pm, D] of in-context masks [K, 1, H, W]; K is 0 without any."""
        if not self.config.in_context.mask_encoder:
            if example_masks is not None and len(example_masks):
                raise ValueError("the prompt has example masks, but this model was built without a mask encoder")
            return like.new_zeros(0, 1, like.shape[1])
        if example_masks is None:
            size = self.config.vision_config.image_size
            example_masks = like.new_zeros(0, 1, size, size)
        return self.model.mask_encoder(example_masks)

    def _region_features(
        self,
        image_features: torch.Tensor,
        region_masks: torch.Tensor | None,
        region_image: torch.Tensor | None,
        like: torch.Tensor,
    ) -> torch.Tensor:
        """Region embeddings [R, D]; an empty batch passes through the adapter too (the same graph on every rank)."""
        if not self.config.region.enabled:
            if region_masks is not None and len(region_masks):
                raise ValueError("the batch points at regions, but this model was built without a region adapter")
            return like.new_zeros(0, like.shape[1])
        if region_masks is None or region_image is None:
            grid = self.config.vision_grid
            region_masks, region_image = like.new_zeros(0, grid, grid), torch.zeros(0, dtype=torch.long)
        patches = image_features[region_image.to(image_features.device)]  # [R, P, Dv]
        return self.model.region_adapter(patches, region_masks)

    # --- masks --------------------------------------------------------------------------------------------------

    def decode_masks(
        self,
        seg_hidden: torch.Tensor,
        image_embeddings: torch.Tensor,
        image_index: torch.Tensor,
        resized: list[tuple[int, int]],
        originals: list[tuple[int, int]],
    ) -> MaskOutput:
        """Paint one mask per ``<SEG>``.

        Args:
            seg_hidden: [M, D], decoder states at the positions that predict ``<SEG>``.
            image_embeddings: [N, C, s, s] from ``encode_segmented_images``.
            image_index: long [M], the image of each mask.
            resized: per mask (height, width) of the SAM input before its padding.
            originals: per mask (height, width) of the image.
        """
        queries = self.model.mask_head(seg_hidden)  # [M, C]
        low_res, iou = self.model.sam.decode(image_embeddings, queries, image_index)  # [M, 1, l, l], [M, 1]
        size = self.config.sam_config.vision_config.image_size
        masks = restore_masks(low_res, resized, originals, size, self.config.mask.geometry)
        return MaskOutput(masks, low_res, iou)

    def _decode_batch_masks(
        self,
        hidden: torch.Tensor,
        seg_rows: torch.Tensor,
        seg_places: torch.Tensor,
        sam_pixel_values: torch.Tensor | None,
        sam_embeddings: torch.Tensor | None,
        sam_sizes: list[tuple[int, int]] | None,
        image_sizes: list[tuple[int, int]] | None,
        sam_index: torch.Tensor | None,
    ) -> MaskOutput:
        """Masks of all ``<SEG>`` in a batch; only images that are asked for a mask are encoded."""
        images = seg_rows if sam_index is None else sam_index[seg_rows]  # [M]
        rows, image_index = images.unique(return_inverse=True)
        if len(rows) and (sam_sizes is None or image_sizes is None):
            raise ValueError("masks are asked for, but sam_sizes or image_sizes is missing")
        if sam_embeddings is not None:
            embeddings = sam_embeddings[rows]
        elif sam_pixel_values is not None:
            embeddings = self.encode_segmented_images(sam_pixel_values[rows])
        elif len(rows):
            raise ValueError("masks are asked for, but neither sam_pixel_values nor sam_embeddings is given")
        else:
            size = self.config.sam_config.vision_config.image_size
            embeddings = self.encode_segmented_images(hidden.new_zeros(0, 3, size, size))
        states = hidden[seg_rows, seg_places - 1]  # [M, D], the state that predicts <SEG>
        row_list = seg_rows.tolist()
        resized = [sam_sizes[row] for row in row_list] if sam_sizes else []
        originals = [image_sizes[row] for row in row_list] if image_sizes else []
        return self.decode_masks(states, embeddings, image_index, resized, originals)

    # --- the whole pass -------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        region_masks: torch.Tensor | None = None,
        region_image: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        sam_sizes: list[tuple[int, int]] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        mask_targets: list[torch.Tensor] | None = None,
        example_masks: torch.Tensor | None = None,
        visual_kinds: list[str] | None = None,
        image_features: torch.Tensor | None = None,
        sam_embeddings: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        sam_index: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> MedPLIBOutput:
        """Run the network.

        Args:
            input_ids: long [B, T] with placeholders (or ``inputs_embeds`` [B, L, D], already spliced).
            attention_mask: [B, T], nonzero at real tokens.
            labels: long [B, T], ``IGNORE_INDEX`` where unsupervised; gives ``loss``.
            pixel_values: float [I, 3, H, W], CLIP input per image placeholder.
            region_masks, region_image: see ``splice``.
            sam_pixel_values: float [B, 3, S, S], SAM input of each row's segmented image.
            sam_sizes, image_sizes: per row (height, width) of that input before padding, and of the original.
            mask_targets: per row float [n, H, W] in {0, 1}, one per ``<SEG>`` of its labels.
            example_masks, visual_kinds: in-context inputs, see ``splice``.
            image_features, sam_embeddings: cached tower outputs, instead of the pixels.
            image_index: long [I], the image (of ``pixel_values`` or ``image_features``) that each placeholder shows;
                its own when absent. So an image that stands in several rows is encoded once.
            sam_index: long [B], the image (of ``sam_pixel_values`` or ``sam_embeddings``) that each row segments.
            logits_to_keep: only the last so many positions get logits; 0 keeps all.
            return_logits: logits in training too (by default the loss computes only those it needs).

        Raises:
            ValueError: inputs do not match in number, or labels come with ``inputs_embeds``.
        """
        if labels is not None and inputs_embeds is not None:
            raise ValueError("labels go with input_ids, whose places they share; inputs_embeds has none")
        visual = pixel_values is not None or image_features is not None
        if inputs_embeds is not None or (past_key_values is not None and not visual and labels is None):
            return self._decode_step(
                input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep
            )
        if input_ids is None:
            raise ValueError("forward needs input_ids or inputs_embeds")
        if image_features is None and pixel_values is not None:
            image_features = self.encode_images(pixel_values)  # [I, P, Dv]
        if image_index is not None and image_features is not None:
            image_features = image_features[image_index]  # [I, P, Dv]
        spliced = self.splice(
            input_ids, attention_mask, image_features, region_masks, region_image, example_masks, visual_kinds
        )
        plan = spliced.plan
        grown = None if labels is None else splice_labels(plan, labels)  # [B, L]
        needed = None
        if grown is not None and self.training and not return_logits:  # states that predict something supervised
            needed = functional.pad(grown[:, 1:] != IGNORE_INDEX, (0, 1))
        decoded = self.model.decoder(
            spliced.embeds,
            attention_mask=plan.attention_mask,
            position_ids=plan.position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            needed=needed,
        )
        hidden = decoded.last_hidden_state  # [B, L, D]
        output = MedPLIBOutput(
            last_hidden_state=hidden,
            past_key_values=decoded.past_key_values,
            router_stats=decoded.router_stats,
            projector_stats=spliced.projector_stats,
            plan=plan,
        )
        if labels is None or return_logits:
            output.logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        if labels is not None and grown is not None:
            seg_rows, seg_tokens = (plan.valid & (labels == self.config.seg_token_id)).nonzero(as_tuple=True)
            seg_places = plan.starts[seg_rows, seg_tokens]
            masks = self._decode_batch_masks(
                hidden, seg_rows, seg_places, sam_pixel_values, sam_embeddings, sam_sizes, image_sizes, sam_index
            )
            output.mask_logits, output.low_res_masks = masks.mask_logits, masks.low_res_masks
            output.iou_predictions, output.mask_rows = masks.iou_predictions, seg_rows
            self._add_losses(output, masks, decoded, spliced, grown, mask_targets)
        return output

    def _decode_step(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Any,
        use_cache: bool | None,
        logits_to_keep: int,
    ) -> MedPLIBOutput:
        """A pass over embeddings or plain tokens, as ``generate`` makes them after the prompt."""
        embeds = inputs_embeds if inputs_embeds is not None else self.get_input_embeddings()(input_ids)
        decoded = self.model.decoder(
            embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        hidden = decoded.last_hidden_state
        kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        return MedPLIBOutput(
            logits=self.lm_head(kept),
            last_hidden_state=hidden,
            past_key_values=decoded.past_key_values,
            router_stats=decoded.router_stats,
        )

    def _add_losses(
        self,
        output: MedPLIBOutput,
        masks: MaskOutput,
        decoded: DecoderOutput,
        spliced: SplicedInputs,
        labels: torch.Tensor,
        mask_targets: list[torch.Tensor] | None,
    ) -> None:
        """Fill ``loss`` and its parts (reference §4)."""
        weights = self.config.loss
        tokens = causal_ce(decoded.last_hidden_state, labels, self.lm_head)
        ce = tokens.mean
        router_aux = (
            self.config.moe.router_aux_loss_coef * decoded.aux_loss
            + self.config.projector.router_aux_loss_coef * spliced.projector_aux_loss
        )
        targets = [mask for row in mask_targets or [] for mask in row]
        if len(targets) != len(masks.mask_logits):
            raise ValueError(f"the labels hold {len(masks.mask_logits)} <SEG> for {len(targets)} target masks")
        learnt = [name for name in MASK_LOSSES if getattr(weights, name)]
        each = each_mask_loss(masks.mask_logits, targets, masks.iou_predictions, learnt)
        parts = mean_mask_losses(each, masks.iou_predictions)
        # Without a mask in the batch the mask branch still belongs to the graph (the same on every rank).
        anchor = masks.low_res_masks[:0].sum() + masks.iou_predictions[:0].sum()
        output.losses = {"ce": ce, "router_aux": router_aux, **parts}
        per_mask = {name: values.detach() for name, values in each.items()}
        output.row_losses = RowLosses(*tokens.by_row(len(labels)), per_mask)
        output.loss = (
            weights.ce * (ce + router_aux)
            + weights.bce * parts["bce"]
            + weights.dice * parts["dice"]
            + weights.focal * parts["focal"]
            + weights.iou * parts["iou"]
            + anchor
        )

    # --- generation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """transformers' ``generate`` over a prompt with images and regions; returns the new tokens alone.

        Takes the prompt inputs of ``forward`` (``input_ids``, ``attention_mask``, ``pixel_values`` or
        ``image_features``, ``region_masks``, ``region_image``, ``example_masks``, ``visual_kinds``) and any
        generation argument; prompts of a batch are padded on the left. For answers with masks use ``model.inference``.

        Raises:
            ValueError: a prompt is padded on the right.
        """
        if input_ids is None:
            return super().generate(**kwargs)  # type: ignore[misc]
        pixel_values = kwargs.pop("pixel_values", None)
        image_features = kwargs.pop("image_features", None)
        if image_features is None and pixel_values is not None:
            image_features = self.encode_images(pixel_values)
        names = ("region_masks", "region_image", "example_masks", "visual_kinds")
        spliced = self.splice(
            input_ids, kwargs.pop("attention_mask", None), image_features, *(kwargs.pop(name, None) for name in names)
        )
        mask = spliced.plan.attention_mask.long()
        if not bool(mask[:, -1].all()):
            raise ValueError("prompts to be continued are padded on the right; collate them with padding_side='left'")
        return super().generate(inputs_embeds=spliced.embeds, attention_mask=mask, **kwargs)  # type: ignore[misc]


def _visual_tokens(images: torch.Tensor, masks: torch.Tensor, visual_kinds: list[str] | None) -> list[torch.Tensor]:
    """Tokens of each image placeholder, in reading order."""
    kinds = visual_kinds or ["image"] * len(images)
    if kinds.count("image") != len(images) or kinds.count("mask") != len(masks):
        raise ValueError(f"the prompt has {len(images)} images and {len(masks)} masks for {kinds}")
    sources = {"image": iter(images), "mask": iter(masks)}
    return [next(sources[kind]) for kind in kinds]


AutoModelForCausalLM.register(MedPLIBConfig, MedPLIBForCausalLM, exist_ok=True)
