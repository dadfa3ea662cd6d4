"""A data file as a PyTorch data set: records are checked on opening, pixels are read on access."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from model.data.augmentation import AugmentationConfig, augment_pictures, tells_colors, tells_places
from model.data.features import CachedFeatures
from model.data.image_io import ImageData, read_image, read_mask
from model.data.packing import LengthCheck, Packing, joined
from model.data.records import Records, open_records
from model.data.schema import Sample, parse_record
from model.data.validate import Problem, Progress, RecordFacts, inspect_all
from model.errors import MedPLIBError
from model.processing.conversation import Turn

logger = logging.getLogger(__name__)

OnBadRecord = Literal["refuse", "skip"]
Conversation = Callable[[int, np.random.Generator], list[Sample]]

CACHE_AND_AUGMENTATION = (
    "augmentation changes pictures at every step, and data.feature_cache keeps features of unchanged ones; set "
    "augmentation.preset=none or leave data.feature_cache empty"
)
_NAMING_KEYS = ("kind", "about", "structure", "target")  # keys of a record that may name sides
_LISTED = 20  # bad records named in the refusal; `medplib data check` names them all


class Encoder(Protocol):
    """The part of ``MedPLIBProcessor`` that a data set needs."""

    def encode(self, turns: Sequence[Turn], images: Sequence[np.ndarray], *args: Any, **options: Any) -> Any: ...


class UnusableRecords(MedPLIBError):
    """A data file with records that cannot be used; ``usable`` are the numbers and facts of the others."""

    def __init__(self, message: str, usable: list[tuple[int, RecordFacts]]) -> None:
        super().__init__(message)
        self.usable = usable


@dataclass(frozen=True)
class LoadedSample:
    """A sample with its pixels."""

    sample: Sample  # the record it was read from
    images: tuple[np.ndarray, ...]  # uint8 [H, W, 3] each, in placeholder order
    regions: tuple[np.ndarray, ...]  # bool [H, W] each, of the size of its image
    masks: tuple[np.ndarray, ...]  # bool [H, W] each, of the size of the segmented image
    # (row, column) pixel distance of the segmented image, None where its file does not say
    spacing_mm: tuple[float, float] | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self.sample.turns


class MedPLIBDataset(Dataset):
    """The usable records of one data file, encoded on access.

    Items are reproducible: the randomness of item ``i`` comes from (seed, epoch, record number, earlier draws of it in
    the epoch) alone, not from workers or from what was read before. Raises MedPLIBError: the file is unreadable, has
    unusable records (``refuse``), or has no usable one.

    Args:
        path: JSON list, JSON lines or Parquet file.
        images_root: folder the records' paths are relative to.
        processor: encodes a sample; anything with ``MedPLIBProcessor.encode``.
        training: passed to the processor (random sub-regions and the like).
        on_bad_record: ``refuse`` raises if any record is unusable; ``skip`` leaves such records out and counts
            them.
        seed: of the random parts of items.
        progress: called with (records checked, records in all) while opening.
        lengths: counts tokens while opening; records too long to be encoded are unusable then.
        augmentation: changes the pictures of encoded items, of a training set alone.

    Attributes:
        tokens, images: int64 [N], tokens of each item (an image counting as one; 0 uncounted) and images in it.
        marks, pictures: uint64 [N], a number for the files of each item, and for its images (``RecordFacts``).
        conversation: draws the samples that an item is put together from; None where each is its record alone.
        unreadable: bool [N], items whose files turned out unreadable since.
        shortened: bool [N], items whose answer was cut off at the processor's longest sequence.
    """

    def __init__(
        self,
        path: str | Path,
        images_root: str | Path,
        processor: Encoder,
        *,
        training: bool,
        on_bad_record: OnBadRecord = "refuse",
        seed: int = 0,
        progress: Progress | None = None,
        lengths: LengthCheck | None = None,
        augmentation: AugmentationConfig | None = None,
    ) -> None:
        self.path, self.images_root = Path(path), Path(images_root)
        self.processor, self.training, self.seed = processor, training, seed
        self.on_bad_record = on_bad_record
        self.features: CachedFeatures | None = None
        self.augmentation = augmentation if augmentation and augmentation.active and training else None
        self.records, facts, self.problems = usable_records(path, images_root, on_bad_record, progress, lengths)
        self.indices = np.asarray([number for number, _ in facts], dtype=np.int64)
        self.tasks = [fact.task for _, fact in facts]
        self.modalities = [fact.modality for _, fact in facts]
        self.tokens = np.asarray([fact.tokens for _, fact in facts], dtype=np.int64)
        self.images = np.asarray([fact.images for _, fact in facts], dtype=np.int64)
        self.marks = np.asarray([fact.mark for _, fact in facts], dtype=np.uint64)
        self.pictures = np.asarray([fact.picture for _, fact in facts], dtype=np.uint64)
        self.conversation: Conversation | None = None
        # Shared memory: loader workers see the epoch, and the main process sees what they noted.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.unreadable = torch.zeros(len(facts), dtype=torch.bool).share_memory_()
        self.shortened = torch.zeros(len(facts), dtype=torch.bool).share_memory_()

    @property
    def rejected(self) -> int:
        """Records left out on opening."""
        return len(self.records) - len(self.indices)

    @property
    def skipped(self) -> int:
        """Records left out so far: unusable ones found on opening and unreadable ones met since, in this process."""
        return self.rejected + int(self.unreadable.sum())

    @property
    def repaired(self) -> int:
        """Usable records that were mended on the way (the spelling of a path, say)."""
        usable = set(self.indices.tolist())
        return len({p.record for p in self.problems if p.severity == "repaired" and p.record in usable})

    def __len__(self) -> int:
        return len(self.indices)

    def set_epoch(self, epoch: int) -> None:
        """Choose the randomness of items from now on, also in running loader workers."""
        self._epoch.fill_(epoch)

    def sample(self, index: int) -> Sample:
        """The validated record of item ``index``, without pixels."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        number = int(self.indices[index])
        sample = parse_record(self.records[number], self.images_root)
        return sample if sample.id else replace(sample, id=str(number))

    def load(self, index: int) -> LoadedSample:
        """Item ``index`` with its pixels, at the size of their files. Raises MedPLIBError: names the record whose file
        is unreadable or whose mask is empty or not of its image's size."""
        sample = self.sample(index)
        with self._naming(index, sample):
            return load_sample(sample)

    def use_features(self, features: CachedFeatures | None) -> None:
        """Let features stand for the pixels of encoded items from now on. Raises MedPLIBError: pictures are augmented,
        so that no features are theirs."""
        if features is not None and self.augmentation is not None:
            raise MedPLIBError(CACHE_AND_AUGMENTATION)
        self.features = features

    @contextmanager
    def _naming(self, index: int, sample: Sample) -> Iterator[None]:
        try:
            yield
        except MedPLIBError as error:
            raise MedPLIBError(f"{self.path}, record {self.indices[index]} ({sample.id}): {error}") from error

    def __getitem__(self, index: int) -> Any:
        """``EncodedSample`` of item ``index``; in ``skip`` mode the next readable item stands in for a bad one."""
        return self.item(index, getattr(index, "earlier", 0))

    def item(self, index: int, earlier: int = 0) -> Any:
        """Item ``index``, drawn so many times before in this epoch; see ``__getitem__``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return self._encoded(candidate, earlier)
            except MedPLIBError as error:
                if self.on_bad_record == "refuse":
                    raise
                if not self.unreadable[candidate]:
                    self.unreadable[candidate] = True
                    logger.warning("skipped: %s", error)
        raise MedPLIBError(f"{self.path} holds no readable record any more; run `medplib data check` on it")

    def _encoded(self, index: int, earlier: int) -> Any:
        numbers = [self.seed, int(self._epoch), int(self.indices[index]), *([earlier] if earlier else [])]
        rng = np.random.default_rng(numbers)
        with self._naming(index, sample := self.sample(index)):
            try:
                encoded = self._encode([sample] if self.conversation is None else self.conversation(index, rng), rng)
            except MedPLIBError:
                if self.conversation is None or self.on_bad_record == "refuse":
                    raise
                encoded = self._encode([sample], rng)  # what is wrong with another record is noted at its own draw
        if getattr(encoded, "truncated", False):
            self.shortened[index] = True
        return encoded

    def _encode(self, parts: list[Sample], rng: np.random.Generator) -> Any:
        sample, features = joined(parts), self.features
        loaded = load_sample(sample, read_image if features is None else features.read_image)
        if self.augmentation is not None:
            loaded = augmented(loaded, parts, self.augmentation, rng)
        encoded = self.processor.encode(
            sample.turns,
            loaded.images,
            regions=loaded.regions,
            region_images=sample.region_images,
            masks=loaded.masks,
            segment_image=sample.segment_image,
            training=self.training,
            rng=rng,
            pixels=features is None or features.need_pixels,
        )
        return encoded if features is None else features.lay_over(encoded, sample)


def usable_records(
    path: str | Path,
    images_root: str | Path,
    on_bad_record: OnBadRecord,
    progress: Progress | None = None,
    lengths: LengthCheck | None = None,
) -> tuple[Records, list[tuple[int, RecordFacts]], list[Problem]]:
    """Open a data file and check its records, without decoding pixels. Returns all records, the numbers and facts of
    the usable ones, and every problem. Raises MedPLIBError: the file is unreadable, has unusable records (``refuse``:
    ``UnusableRecords``), or has no usable one."""
    if on_bad_record not in ("refuse", "skip"):
        raise MedPLIBError(f"on_bad_record is {on_bad_record!r:.80}; expected refuse or skip")
    records, root = open_records(path), Path(images_root)
    if not root.is_dir():
        raise MedPLIBError(f"the image folder {root} does not exist; give the folder of the images")
    usable: list[tuple[int, RecordFacts]] = []
    problems: list[Problem] = []
    for number, facts, found in inspect_all(records, root, progress=progress, in_context=False, lengths=lengths):
        problems += found
        if facts is not None:
            usable.append((number, facts))
    bad = len(records) - len(usable)
    if bad and on_bad_record == "refuse":
        faults = [str(problem) for problem in problems if problem.severity == "error"]
        more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise UnusableRecords(
            f"{records.path}: {bad} of {len(records)} records are unusable: {'; '.join(faults[:_LISTED])}{more}; "
            "mend them (`medplib data check` lists all) or skip them with --on-bad-record skip",
            usable,
        )
    if bad:
        logger.warning("%s: %d of %d records are unusable and skipped", path, bad, len(records))
    if not usable:
        raise MedPLIBError(f"{path} holds no usable record; run `medplib data check` on it")
    return records, usable, problems


def load_sample(sample: Sample, read: Callable[[Path], ImageData] = read_image) -> LoadedSample:
    """Read the pixels of a validated record. Raises MedPLIBError: a file cannot be read, a mask or region is empty or
    is not of its image's size."""
    images = [read(path) for path in sample.images]
    sizes = [image.size for image in images]
    regions = [
        _mask_of_size(path, sizes[image] if sizes else None)
        for path, image in zip(sample.regions, sample.region_images, strict=True)
    ]
    masks = [_mask_of_size(path, sizes[sample.segment_image]) for path in sample.masks]
    spacing = images[sample.segment_image].spacing_mm if images else None
    return LoadedSample(sample, tuple(image.pixels for image in images), tuple(regions), tuple(masks), spacing)


def augmented(
    loaded: LoadedSample, parts: Sequence[Sample], config: AugmentationConfig, rng: np.random.Generator
) -> LoadedSample:
    """A sample with its pictures, regions and masks changed at random, all by one geometric change.

    Args:
        parts: the samples that it is put together from; sides named by one of them count for all.
    """
    texts = [text for part in parts for text in (*(turn.text for turn in part.turns), *map(part.raw.get, _NAMING_KEYS))]
    images, moved = augment_pictures(
        loaded.images,
        (*loaded.regions, *loaded.masks),
        rng,
        config,
        flip_allowed=not tells_places(texts),
        recolor_allowed=not tells_colors(texts),
    )
    regions = len(loaded.regions)
    return replace(loaded, images=tuple(images), regions=tuple(moved[:regions]), masks=tuple(moved[regions:]))


def _mask_of_size(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    mask = read_mask(path)
    if not mask.any():
        raise MedPLIBError(f"the mask {path} has no foreground pixel")
    if size is not None and mask.shape != size:
        raise MedPLIBError(
            f"the mask {path} is {mask.shape[0]} × {mask.shape[1]} pixels, its image {size[0]} × {size[1]}; "
            "they must have the same size"
        )
    return mask


class MixedDataset(Dataset):
    """Several data sets in one row, each with a share of the draws.

    Args:
        datasets: their items follow each other in this order.
        shares: relative share of draws of each data set; by default in proportion to their sizes. Shares act
            through ``weights``, which the sampler takes.
    """

    def __init__(self, datasets: Sequence[MedPLIBDataset], shares: Sequence[float] | None = None) -> None:
        if not datasets:
            raise MedPLIBError("a mixture needs at least one data set")
        if shares is not None and (len(shares) != len(datasets) or min(shares) < 0 or sum(shares) <= 0):
            raise MedPLIBError(f"got shares {list(shares)} for {len(datasets)} data sets; give one each, none negative")
        self.datasets = list(datasets)
        self.shares = None if shares is None else [float(share) for share in shares]
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets])
        self.tasks = [task for dataset in self.datasets for task in dataset.tasks]
        self.modalities = [modality for dataset in self.datasets for modality in dataset.modalities]
        self.tokens = np.concatenate([dataset.tokens for dataset in self.datasets])
        self.images = np.concatenate([dataset.images for dataset in self.datasets])

    @property
    def weights(self) -> np.ndarray | None:
        """float64 [N] chance of each item for ``ResumableSampler``; None where every item is seen once an epoch."""
        if self.shares is None:
            return None
        parts = [np.full(len(d), share / len(d)) for d, share in zip(self.datasets, self.shares, strict=True)]
        return np.concatenate(parts) / sum(self.shares)

    @property
    def rejected(self) -> int:
        """Records left out on opening, over all data sets."""
        return sum(dataset.rejected for dataset in self.datasets)

    @property
    def repaired(self) -> int:
        """Usable records that were mended on the way, over all data sets."""
        return sum(dataset.repaired for dataset in self.datasets)

    @property
    def unreadable(self) -> torch.Tensor:
        """Bool [N]: items whose files turned out unreadable, as far as this process knows."""
        return torch.cat([dataset.unreadable for dataset in self.datasets])

    @property
    def shortened(self) -> torch.Tensor:
        """Bool [N]: items whose answer was cut off at the longest sequence, as far as this process knows."""
        return torch.cat([dataset.shortened for dataset in self.datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def set_epoch(self, epoch: int) -> None:
        """Choose the randomness of items from now on, also in running loader workers."""
        for dataset in self.datasets:
            dataset.set_epoch(epoch)

    def pack(self, turns: int, weights: np.ndarray | None, max_length: int | None, shared: int) -> None:
        """Let encoded items be conversations of up to ``turns`` questions, of all data sets, about the same pictures.

        Args:
            weights, max_length, shared: see ``Packing``.
        """
        pictures = np.concatenate([dataset.pictures for dataset in self.datasets])
        self._packing = Packing(pictures, self.tokens, weights, turns, max_length, shared)
        for dataset, end in zip(self.datasets, self._ends.tolist(), strict=True):
            dataset.conversation = partial(self._conversation, end - len(dataset)) if turns > 1 else None

    def _conversation(self, start: int, index: int, rng: np.random.Generator) -> list[Sample]:
        return self._packing.draw(start + index, self.sample, rng)

    def use_features(self, features: CachedFeatures | None) -> None:
        """Let features stand for the pixels of encoded items from now on."""
        for dataset in self.datasets:
            dataset.use_features(features)

    def sample(self, index: int) -> Sample:
        """The validated record of item ``index``, without pixels."""
        dataset, inner = self._locate(index)
        return dataset.sample(inner)

    def load(self, index: int) -> LoadedSample:
        """Item ``index`` with its pixels; see ``MedPLIBDataset.load``."""
        dataset, inner = self._locate(index)
        return dataset.load(inner)

    def __getitem__(self, index: int) -> Any:
        dataset, inner = self._locate(index)
        return dataset.item(inner, getattr(index, "earlier", 0))

    def _locate(self, index: int) -> tuple[MedPLIBDataset, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.datasets[which], index - int(self._ends[which - 1] if which else 0)
