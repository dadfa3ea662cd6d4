"""The whole network's sizes in one object: text, vision, SAM, projector, mixture, region, masks, in-context.

Nothing in ``model.modeling`` assumes a size: the 7B, the nano and a four-layer test model are the same code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PreTrainedConfig, SamConfig

IMAGE_PLACEHOLDER = -200
"""Stands in ``input_ids`` for one image; replaced by that image's projected patch features."""
REGION_PLACEHOLDER = -300
"""Stands in ``input_ids`` for one region; replaced by that region's one feature."""
IGNORE_INDEX = -100
"""Marks positions of ``labels`` that carry no supervision."""

LayerMode = Literal["first_half", "second_half", "sparse", "dense"]
Section = TypeVar("Section")


@dataclass(frozen=True)
class MoEConfig:
    """The mixture that replaces LLaMA feed-forward layers (reference §5); no layers means a dense model."""

    layers: tuple[int, ...] = ()  # decoder layers whose FFN is a mixture, ascending
    num_experts: tuple[int, ...] = ()  # experts of each of those layers, same length
    top_k: int = 1
    capacity_factor: float = 1.5
    eval_capacity_factor: float = 2.0  # counts with drop_in_evaluation; published code always reads it
    min_capacity: int = 0
    random_token_priority: bool = True  # which tokens survive a full expert in training
    drop_tokens: bool = True
    drop_in_evaluation: bool = False  # as published; off, an answer does not depend on its batch
    route_padding: bool = False  # the published code routed and counted padding tokens too
    use_residual: bool = False  # DeepSpeed's residual expert beside the mixture
    router_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "num_experts", tuple(self.num_experts))
        if len(self.layers) != len(self.num_experts):
            raise ValueError(
                f"moe.num_experts has {len(self.num_experts)} entries for {len(self.layers)} layers; give one per layer"
            )
        if self.top_k not in (1, 2):
            raise ValueError(f"moe.top_k is {self.top_k}; 1 and 2 are supported")

    @property
    def enabled(self) -> bool:
        return bool(self.layers)

    def experts_in(self, layer: int) -> int:
        """Number of experts of decoder layer ``layer``; 0 where the FFN is dense."""
        return self.num_experts[self.layers.index(layer)] if layer in self.layers else 0

    @staticmethod
    def layers_for(mode: LayerMode, num_layers: int) -> tuple[int, ...]:
        """Layer indices of a published layer choice mode (reference §5).

        Args:
            mode: ``first_half``, ``second_half``, ``sparse`` (every other layer, from 0) or ``dense`` (all).
            num_layers: decoder depth.
        """
        choices = {
            "first_half": range(0, num_layers // 2),
            "second_half": range(num_layers // 2, num_layers),
            "sparse": range(0, num_layers, 2),
            "dense": range(num_layers),
        }
        if mode not in choices:
            raise ValueError(f"unknown MoE layer mode {mode!r:.80}; known modes: {', '.join(choices)}")
        return tuple(choices[mode])


@dataclass(frozen=True)
class ProjectorConfig:
    """How CLIP patch features become decoder embeddings (reference §1)."""

    type: str = "mlp2x_gelu"  # linear | mlpNx_gelu | identity | moe_mlpNx_gelu
    num_experts: int = 2  # the rest is for the moe types alone, which never drop a token
    top_k: int = 1
    router_aux_loss_coef: float = 0.0


@dataclass(frozen=True)
class RegionConfig:
    """How a pointed-at region becomes one embedding (reference §1, §3)."""

    enabled: bool = True
    kind: Literal["mean", "geometric"] = "mean"
    max_points: int = 512
    # the geometric sampler alone:
    num_init_points: int = 512
    num_sub_points: tuple[int, ...] = (128, 32)
    num_neighbors: tuple[int, ...] = (24, 24)
    pooler: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        _check_choice("region.kind", self.kind, ("mean", "geometric"))
        _check_choice("region.pooler", self.pooler, ("max", "mean"))
        object.__setattr__(self, "num_sub_points", tuple(self.num_sub_points))
        object.__setattr__(self, "num_neighbors", tuple(self.num_neighbors))


@dataclass(frozen=True)
class MaskConfig:
    """The way from a ``<SEG>`` hidden state to a mask (reference §1, §3)."""

    adapter: bool = True  # SAM-Med2D's adapter in every image-encoder block
    adapter_mlp_ratio: float = 0.25
    geometry: Literal["exact", "legacy"] = "exact"
    threshold: float = 0.5  # default read-out threshold; published numbers use 0.1
    # Channels at strides 2, 4 and 8 of a convolutional stem that replaces SAM's patch embedding and gives the mask
    # decoder skip connections, so that masks have half the input's resolution, not a quarter; empty as published.
    stem_channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("mask.geometry", self.geometry, ("exact", "legacy"))
        object.__setattr__(self, "stem_channels", tuple(self.stem_channels))
        if len(self.stem_channels) not in (0, 3) or any(
            channels < 8 or channels % 8 for channels in self.stem_channels
        ):
            raise ValueError(
                f"mask.stem_channels is {list(self.stem_channels)}; give three multiples of 8 (strides 2, 4, 8) or none"
            )
        if not 0 < self.threshold < 1:
            raise ValueError(f"mask.threshold is {self.threshold}; give a number between 0 and 1")


@dataclass(frozen=True)
class InContextConfig:
    """Extra visual inputs of in-context prompts (reference §8)."""

    token_compressor: bool = False
    compressed_tokens: int = 256
    mask_encoder: bool = False
    mask_encoder_tokens: int = 64


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms (reference §4); the defaults are the published stage IV."""

    ce: float = 1.0
    dice: float = 0.5
    bce: float = 2.0
    focal: float = 0.0
    iou: float = 0.0


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r:.80}; known: {', '.join(known)}")


def _section(kind: type[Section], value: Section | dict[str, Any] | None) -> Section:
    if value is None:
        return kind()
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a {kind.__name__} section is a mapping, got {type(value).__name__}")
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(value) - known)
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return kind(**value)


class MedPLIBConfig(PreTrainedConfig):
    """Sizes and behaviour of a whole MedPLIB network.

    Args:
        text_config: LLaMA decoder (``LlamaConfig`` or its dict).
        vision_config: CLIP tower (``CLIPVisionConfig`` or its dict).
        sam_config: SAM-Med2D (``SamConfig`` or its dict; image size 256 in the published model).
        projector, moe, region, mask, in_context, loss: the sections above (or their dicts).
        vision_select_layer: CLIP hidden state to read, −2 in the published model.
        vision_select_feature: ``patch`` drops the class token, ``cls_patch`` keeps it.
        seg_token_id: id of ``<SEG>``.
        conversation_turns: questions of one conversation that the network was trained to answer; 1: each stands alone.

    Raises:
        ValueError: a section or value is malformed.
    """

    model_type = "medplib"
    sub_configs = {"text_config": LlamaConfig, "vision_config": CLIPVisionConfig, "sam_config": SamConfig}
    has_no_defaults_at_init = False

    def __init__(
        self,
        text_config: LlamaConfig | dict[str, Any] | None = None,
        vision_config: CLIPVisionConfig | dict[str, Any] | None = None,
        sam_config: SamConfig | dict[str, Any] | None = None,
        projector: ProjectorConfig | dict[str, Any] | None = None,
        moe: MoEConfig | dict[str, Any] | None = None,
        region: RegionConfig | dict[str, Any] | None = None,
        mask: MaskConfig | dict[str, Any] | None = None,
        in_context: InContextConfig | dict[str, Any] | None = None,
        loss: LossConfig | dict[str, Any] | None = None,
        vision_select_layer: int = -2,
        vision_select_feature: Literal["patch", "cls_patch"] = "patch",
        seg_token_id: int = 32000,
        conversation_turns: int = 1,
        **kwargs: Any,
    ) -> None:
        self.text_config = _sub_config(LlamaConfig, text_config, {"vocab_size": 32267, "pad_token_id": 0})
        self.vision_config = _sub_config(CLIPVisionConfig, vision_config, _CLIP_L_336)
        self.sam_config = _sub_config(SamConfig, _with_decoder_epsilon(sam_config), _SAM_MED2D_B)
        self.projector = _section(ProjectorConfig, projector)
        self.moe = _section(MoEConfig, moe)
        self.region = _section(RegionConfig, region)
        self.mask = _section(MaskConfig, mask)
        self.in_context = _section(InContextConfig, in_context)
        self.loss = _section(LossConfig, loss)
        self.vision_select_layer = vision_select_layer
        self.vision_select_feature = vision_select_feature
        self.seg_token_id = seg_token_id
        if type(conversation_turns) is not int or conversation_turns < 1:
            raise ValueError(f"conversation_turns is {conversation_turns!r}; give a whole number from 1 on")
        self.conversation_turns = conversation_turns
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name))
        super().__init__(**kwargs)

    @property
    def vision_grid(self) -> int:
        """Patches along one side of a CLIP input: 24 at ViT-L/14-336."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def visual_tokens(self) -> int:
        """Places that an image takes in the decoder's sequence: 576 in the published model."""
        if self.in_context.token_compressor:
            return self.in_context.compressed_tokens
        return self.vision_grid**2 + (self.vision_select_feature == "cls_patch")

    @property
    def mask_query_dim(self) -> int:
        """Width of the text prompt that SAM's prompt encoder takes: 256 in the published model."""
        return self.sam_config.prompt_encoder_config.hidden_size

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready mapping; the sections are plain mappings in it."""
        output = super().to_dict()
        for name in ("projector", "moe", "region", "mask", "in_context", "loss"):
            output[name] = asdict(getattr(self, name))
        return output


_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SAM_MED2D_B = {
    "vision_config": {"image_size": 256, "patch_size": 16},
    "prompt_encoder_config": {"image_size": 256, "patch_size": 16},
    "mask_decoder_config": {"layer_norm_eps": 1e-5},
}


def _with_decoder_epsilon(value: Any) -> Any:
    """SAM's mask decoder normalises with an epsilon of 1e-5; transformers' 1e-6 moves logits by up to 1 %."""
    if not isinstance(value, dict) or not isinstance(value.get("mask_decoder_config"), dict):
        return value
    return {**value, "mask_decoder_config": {"layer_norm_eps": 1e-5, **value["mask_decoder_config"]}}


def _sub_config(kind: type[PreTrainedConfig], value: Any, default: dict[str, Any]) -> Any:
    if isinstance(value, PreTrainedConfig):
        return value
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"a {kind.__name__} section is a mapping, got {type(value).__name__}")
    return kind(**{**default, **{k: v for k, v in (value or {}).items() if k != "model_type"}})


AutoConfig.register("medplib", MedPLIBConfig, exist_ok=True)
