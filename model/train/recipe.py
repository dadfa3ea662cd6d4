"""One stage's whole configuration, typed: what a run is, from its starting weights to how often it saves.

Reading one from YAML, ``key=value`` overrides and the environment is in ``recipe_io``; the published settings of each
stage are in ``stages``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from model.checkpoint.directories import MERGED
from model.data.augmentation import AugmentationConfig


@dataclass(frozen=True)
class ModelSource:
    """Where the network's starting weights lie; an empty path means "not needed at this stage"."""

    base: str = ""  # LLaMA or LLaVA directory, native or published checkpoint, or a run folder
    grounding: str = ""  # stage IV: the merged grounding model that expert 0 and the mask branch come from
    vision_tower: str = ""  # CLIP directory, where base does not hold one
    sam: str = ""  # SAM-Med2D file, where base does not hold one
    projector: str = ""  # run folder, checkpoint or mm_projector.bin whose projector is laid over base's
    sizes: str = ""  # YAML of MedPLIBConfig values (configs/model) for what the starting files lack


@dataclass(frozen=True)
class Data:
    """Which records are learnt from, and how they become sequences."""

    train: tuple[str, ...] = ()  # record files: JSON, JSONL or Parquet
    images: tuple[str, ...] = ()  # folder that the records' image and mask paths start from: of all files, or of each
    validation: tuple[str, ...] = ()  # record files that are never trained on
    validation_images: tuple[str, ...] = ()  # folder of theirs, or of each; empty means the same as images
    shares: tuple[float, ...] = ()  # share of the draws of each train file; empty means in proportion to their sizes
    task_shares: dict[str, float] = field(default_factory=dict)  # share of the draws of each task; empty: by size
    modality_shares: dict[str, float] = field(default_factory=dict)  # the same by modality; other: all not named
    group_by_length: bool = False  # put records of like length, in tokens, into the same batch
    feature_cache: str = ""  # folder that keeps what frozen towers make of images; empty computes it at every step
    template: Literal["llava_v1", "v1", "plain"] = "llava_v1"  # conversation template
    max_length: int = 2048  # longest sequence in tokens, an image counting as one
    conversation_turns: int = 1  # most questions of one sequence: further records of the same images, drawn at random
    on_bad_record: Literal["refuse", "skip"] = "refuse"  # skip reports how many were left out
    workers: int = 4  # loader processes per rank; 0 loads in the training process


@dataclass(frozen=True)
class Schedule:
    """How much is trained."""

    epochs: int = 1
    batch_size: int = 16  # records per device and forward pass
    accumulation: int = 1  # forward passes per optimiser step
    max_steps: int = 0  # optimiser steps, whatever epochs says; 0 means all epochs


@dataclass(frozen=True)
class Optimiser:
    """AdamW and its learning rate (reference §6)."""

    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # of all that learns: norms, biases and LoRA too
    clip: float = 1.0  # largest gradient norm; 0 turns clipping off
    warmup: float = 0.01  # share of one epoch's steps over which lr rises linearly
    decay: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up, to the last step
    max_bad_steps: int = 10  # steps in a row with NaN or infinite gradients that end the run; ten times as many in all


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters inside decoder layers; rank 0 means none."""

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ()  # of q, k, v, o, gate, up, down; the last three inside experts too
    quantise: Literal["none", "int8", "nf4"] = "none"  # of the frozen weights below it (QLoRA); needs bitsandbytes


@dataclass(frozen=True)
class Mixture:
    """The mixture that stage IV up-cycles; no other stage reads it (reference §5)."""

    mode: Literal["dense", "first_half", "second_half", "sparse"] = "dense"  # which layers become mixtures
    layers: tuple[int, ...] = ()  # explicit layer list, used instead of mode when not empty
    num_experts: tuple[int, ...] = (2,)  # one number for all layers, or one per layer
    top_k: int = 1
    capacity_factor: float = 1.5
    eval_capacity_factor: float = 2.0
    min_capacity: int = 0
    random_token_priority: bool = True  # which tokens a full expert keeps in training
    drop_tokens: bool = True
    use_residual: bool = False  # DeepSpeed's residual expert beside the mixture
    router_aux_loss_coef: float = 0.0
    projector_experts: int = 0  # up-cycle the projector into this many experts; 0 keeps it dense
    projector_top_k: int = 1
    projector_router_aux_loss_coef: float = 0.0


@dataclass(frozen=True)
class Losses:
    """Weights of the loss terms (reference §4)."""

    ce: float = 1.0
    dice: float = 0.0
    bce: float = 0.0
    focal: float = 0.0
    iou: float = 0.0


@dataclass(frozen=True)
class Engine:
    """What runs the steps."""

    kind: Literal["deepspeed", "torch", "auto"] = "deepspeed"  # torch: one process; auto: torch there, else deepspeed
    zero_stage: int = 2  # DeepSpeed ZeRO 0 to 3
    offload: Literal["none", "optimiser", "all"] = "none"  # to the host's memory; all: ZeRO-3's weights too
    expert_parallel: int = 1  # ranks that share the experts of a mixture layer out among them; needs ZeRO 1 or 2
    deepspeed: str = ""  # JSON of further DeepSpeed settings (configs/deepspeed)
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = True  # recompute activations in the backward pass: slower, far less memory
    attention: Literal["sdpa", "eager", "flash_attention_2"] = (
        "sdpa"  # of the decoder; the last needs flash-attn and CUDA
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Validation:
    """Scores on held-out records while training."""

    every: int = 0  # optimiser steps between two validations, the end apart; 0 means once an epoch
    samples: int = 200  # records drawn, as many of each file as it has, the same ones every time; 0 turns it off
    batch_size: int = 4  # records per device
    max_new_tokens: int = 128  # hard end of a generated answer
    thresholds: tuple[float, ...] = (0.1, 0.5)  # mask read-out thresholds, published and plain
    patience: int = 0  # validations without a better saving.best after which the run ends; 0: never


@dataclass(frozen=True)
class Saving:
    """What a run leaves on disk beside its merged result."""

    every: int = 0  # optimiser steps between two checkpoints to resume from, the end apart; 0 means once an epoch
    keep: int = 2  # newest checkpoints that stay
    best: str = ""  # score whose best checkpoint stays besides and becomes merged/, such as mDice; empty: the last step
    published: bool = False  # also export the merged result in the published layout


@dataclass(frozen=True)
class Logging:
    """What is shown while training; metrics.jsonl is always written."""

    progress: bool = True  # bar with rate and time left on rank 0
    tensorboard: bool = True
    every: int = 10  # steps between two lines of a log, where the bar has no terminal
    router_every: int = 50  # steps that a row of router statistics, and of losses by modality, covers; 0: none


@dataclass(frozen=True)
class Recipe:
    """One training run of one stage."""

    stage: int = 1  # 1 alignment, 2 VQA expert, 3 grounding expert, 4 mixture
    output: str = ""  # run folder
    seed: int = 0
    model: ModelSource = field(default_factory=ModelSource)
    data: Data = field(default_factory=Data)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    schedule: Schedule = field(default_factory=Schedule)
    optimiser: Optimiser = field(default_factory=Optimiser)
    lora: Lora = field(default_factory=Lora)
    trainable: tuple[str, ...] = ()  # parts trained in full, by the names in trainable.PARTS
    mixture: Mixture = field(default_factory=Mixture)
    losses: Losses = field(default_factory=Losses)
    engine: Engine = field(default_factory=Engine)
    validation: Validation = field(default_factory=Validation)
    saving: Saving = field(default_factory=Saving)
    logging: Logging = field(default_factory=Logging)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output)

    @property
    def merged(self) -> Path:
        """The merged native checkpoint that the run ends with."""
        return self.folder / MERGED
