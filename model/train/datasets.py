"""A recipe's records: opening them, the cache of frozen towers' features, fingerprints of the data, batches."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from model.data.dataset import MedPLIBDataset, MixedDataset
from model.data.features import CachedFeatures, FeatureStore
from model.data.image_io import read_image
from model.data.packing import LengthCheck
from model.data.validate import record_bar
from model.errors import MedPLIBError
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.images import Size
from model.processing.processor import MedPLIBProcessor
from model.train.distributed import Process
from model.train.recipe import Recipe

logger = logging.getLogger(__name__)

MARKS_FILE = "data_marks.npz"
"""File of a run folder with the mark of every record, by which the ones that changed are named."""

Fingerprint = dict[str, dict[str, Any]]
"""By record file: ``bytes`` and ``sha256`` of it, usable ``records``, and ``files``, a checksum of what they name."""
_SHARED = Path("/dev/shm")
_NO_SHARED_MEMORY = re.compile(r"unable to (mmap|resize|allocate|open|write).*(/torch_|shared)|Bus error|shared memory")

_FORMAT = 1  # of what is kept; another one makes another folder
_IMAGES_AT_ONCE = 32  # that a GPU encodes; on a CPU one, whose result does not depend on company
_WRITERS = 4  # threads
_CLIP_SETTINGS = ("clip_size", "patch_size", "clip_mean", "clip_std", "clip_pad_colour")
_SAM_SETTINGS = ("sam_size", "sam_mean", "sam_std")


def open_dataset(recipe: Recipe, processor: MedPLIBProcessor, *, training: bool, shown: bool = False) -> MixedDataset:
    """The training files, or the validation files, as one data set; ``shown`` draws a bar while they are checked.

    Raises:
        MedPLIBError: a file is unreadable, or has unusable records and the recipe does not skip them.
    """
    datasets = []
    for path, images in data_files(recipe, training=training):
        with record_bar(f"checking {path}", shown=shown) as progress:
            dataset = MedPLIBDataset(
                path,
                images,
                processor,
                training=training,
                on_bad_record=recipe.data.on_bad_record,
                seed=recipe.seed,
                progress=progress,
                lengths=LengthCheck.of(processor),
                augmentation=recipe.augmentation,
            )
        datasets.append(dataset)
    return MixedDataset(datasets, (recipe.data.shares or None) if training else None)


def data_files(recipe: Recipe, *, training: bool) -> list[tuple[str, str]]:
    """Record files, each with the folder of its images."""
    data = recipe.data
    files, roots = (data.train, data.images) if training else (data.validation, data.validation_images or data.images)
    if not training and not recipe.validation.samples:
        return []
    each = roots if len(roots) > 1 else (roots or ("",)) * len(files)
    return list(zip(files, each, strict=False))  # as many, see recipe_io


# --- whether the data changed -----------------------------------------------------------------------------------------


def fingerprint(datasets: Sequence[MedPLIBDataset]) -> Fingerprint:
    """Of the record files, by their contents, and of all that their usable records name, by names and sizes."""
    return {str(dataset.path): _facts(dataset) for dataset in datasets}


def _facts(dataset: MedPLIBDataset) -> dict[str, Any]:
    with dataset.path.open("rb") as stream:
        contents = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "bytes": dataset.path.stat().st_size,
        "sha256": contents,
        "records": len(dataset),
        "files": hashlib.sha256(dataset.marks.tobytes()).hexdigest(),
    }


def save_marks(datasets: Sequence[MedPLIBDataset], folder: Path) -> None:
    """Keep the mark of every record in the run folder."""
    partial = folder / f".{MARKS_FILE}"
    with partial.open("wb") as stream:
        np.savez(stream, **{str(number): dataset.marks for number, dataset in enumerate(datasets)})  # type: ignore[arg-type]
    partial.replace(folder / MARKS_FILE)


def check_unchanged(saved: Mapping[str, Any], datasets: Sequence[MedPLIBDataset], folder: Path) -> None:
    """Refuse data other than a checkpoint was trained on, by its fingerprint and the marks in the run folder.

    Files that the fingerprint does not know are let through.

    Raises:
        MedPLIBError: naming what changed.
    """
    changed = []
    for number, dataset in enumerate(datasets):
        before, now = saved.get(str(dataset.path)), _facts(dataset)
        if before is not None and before != now:
            marks = np.zeros(0)
            with suppress(OSError, KeyError, ValueError), np.load(folder / MARKS_FILE) as kept:
                marks = kept[str(number)]
            changed.append(_difference(before, now, dataset, marks))
    if changed:
        raise MedPLIBError(
            f"the data set changed since the checkpoint was written: {'; '.join(changed)}; put it back as it was, "
            "or go on with it all the same by --allow-changed-data"
        )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], dataset: MedPLIBDataset, marks: np.ndarray) -> str:
    name = str(dataset.path)
    if before["records"] != now["records"]:
        return f"{name} had {before['records']} usable records and has {now['records']}"
    if before["sha256"] != now["sha256"]:
        return f"the records in {name} are others"
    other = np.flatnonzero(marks != dataset.marks) if marks.shape == dataset.marks.shape else marks[:0]
    if not len(other):
        return f"files that {name} names have other sizes"
    first = dataset.sample(int(other[0]))
    named = next((str(path) for path in (*first.images, *first.masks)), "no file")
    return f"{len(other)} records of {name} name files of another size, the first is {first.id} ({named})"


# --- batches ----------------------------------------------------------------------------------------------------------


def taken_from(batches: Iterator[dict[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    """The next batch, None after the last one; and what a record is refused for.

    A sentence instead of an exception: that would hold the loader, whose processes could then not be ended.
    """
    try:
        return next(batches, None), ""
    except MedPLIBError as error:  # from a loader process it comes wrapped in that process's traceback
        name = f"{MedPLIBError.__module__}.{MedPLIBError.__name__}: "
        return None, str(error).strip().splitlines()[-1].removeprefix(name)
    except RuntimeError as error:
        fault = short_of_shared_memory(error)
        if not fault:
            raise
        return None, fault


def short_of_shared_memory(error: BaseException) -> str:
    """The sentence about an error that comes of a too small /dev/shm; empty about any other."""
    if not (isinstance(error, RuntimeError) and _NO_SHARED_MEMORY.search(str(error))):
        return ""
    free = shutil.disk_usage(_SHARED).free / 2**20 if _SHARED.is_dir() else 0.0
    return (
        f"shared memory is full: loader processes pass batches through {_SHARED}, which has {free:.1f} MiB free; "
        "enlarge it (docker run --shm-size=8g, or --ipc=host), or load in the training process by data.workers=0"
    )


def in_shared_memory(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """A batch that a loader process put into shared memory itself.

    Left to the queue between the processes, a failure would be printed by a thread of the loader and the training would
    wait for the batch for ever; raised here, it reaches the training.
    """
    batch = collate(samples)
    if get_worker_info() is not None:
        _share(batch)
    return batch


def _share(value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value.share_memory_()
    elif isinstance(value, Mapping):
        _share(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            _share(item)


# --- the feature cache: every image through the frozen towers once, sharded over ranks --------------------------------


@dataclass(frozen=True)
class _Tower:
    """One frozen tower, and where its outputs go."""

    encode: Callable[[Tensor], Tensor]
    store: FeatureStore


def cached_features(
    recipe: Recipe, network: MedPLIBForCausalLM, processor: MedPLIBProcessor, dataset: MixedDataset, process: Process
) -> CachedFeatures | None:
    """The features of all of a data set's images, on disk when this returns; None where the recipe keeps none.

    Only images of masks go through SAM's encoder, and none where that learns. The towers run as they would in training
    and on its device. Called by every rank, before the engine takes the network over.

    Raises:
        MedPLIBError: the CLIP tower is trained, there is too little room, an image cannot be read, or another rank
            met one of these.
    """
    if not recipe.data.feature_cache:
        return None
    if _learns(network.model.vision_tower):
        raise MedPLIBError(
            "data.feature_cache keeps what the CLIP tower makes of images, but the recipe trains the tower; leave "
            "data.feature_cache empty or take vision_tower out of trainable"
        )
    encoders = [network.model.vision_tower, network.model.sam.image_encoder]
    homes = [next(encoder.parameters()).device for encoder in encoders]
    for encoder in encoders:
        encoder.to(process.device)
    try:
        towers = _towers(recipe, network, processor, process)
        images = _images_of(dataset, recipe, process)
        stores = {name: tower.store for name, tower in towers.items()}
        _together(process, lambda: _check_space(images, stores, process))
        _together(process, lambda: _fill(images, towers, processor, recipe, process))
    finally:
        for encoder, home in zip(encoders, homes, strict=True):
            encoder.to(home)
    return CachedFeatures(stores["clip"], stores.get("sam"))


def _towers(
    recipe: Recipe, network: MedPLIBForCausalLM, processor: MedPLIBProcessor, process: Process
) -> dict[str, _Tower]:
    folder, settings, tower = Path(recipe.data.feature_cache), asdict(processor.settings), network.model.vision_tower
    halved = recipe.engine.kind == "torch" and recipe.engine.precision == "bf16"  # as TrainingEngine computes

    def make(name: str, module: nn.Module, encode: Callable[[Tensor], Tensor], facts: Mapping[str, Any]) -> _Tower:
        @torch.no_grad()
        def run(pixels: Tensor) -> Tensor:
            dtype = next(module.parameters()).dtype
            with torch.autocast(process.device.type, torch.bfloat16, enabled=halved):
                return encode(pixels.to(process.device, dtype))

        side = settings[f"{name}_size"]
        example = run(torch.zeros(1, 3, side, side))[0]
        facts = {**facts, "format": _FORMAT, "dtype": str(example.dtype), "device": process.device.type}
        place = folder / f"{name}-{_tower_key(module, facts)}"
        return _Tower(run, FeatureStore(place, tuple(example.shape), example.dtype))

    clip_settings = {name: settings[name] for name in _CLIP_SETTINGS}
    clip_settings |= {"layers": tower.layers_to_run, "class token": tower.keeps_class_token}
    towers = {"clip": make("clip", tower, network.encode_images, clip_settings)}
    if not _learns(network.model.sam.image_encoder):
        facts = {name: settings[name] for name in _SAM_SETTINGS}
        towers["sam"] = make("sam", network.model.sam.image_encoder, network.encode_segmented_images, facts)
    return towers


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _tower_key(module: nn.Module, facts: Mapping[str, Any]) -> str:
    """What features depend on besides the image: the weights, and how pixels are prepared."""
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _images_of(dataset: MixedDataset, recipe: Recipe, process: Process) -> list[tuple[Path, bool]]:
    """Distinct images, and whether any mask lies on each."""
    found: dict[Path, bool] = {}
    with record_bar("finding images", shown=process.is_first and recipe.logging.progress) as progress:
        for index in range(len(dataset)):
            sample = dataset.sample(index)
            for number, path in enumerate(sample.images):
                segmented = bool(sample.masks) and number == sample.segment_image % len(sample.images)
                found[path] = found.get(path, False) or segmented
            progress(index + 1, len(dataset))
    return list(found.items())


def _wanted(path: Path, segmented: bool, stores: Mapping[str, FeatureStore]) -> list[str]:
    """Towers that have not seen an image yet."""
    return [name for name, store in stores.items() if (name == "clip" or segmented) and not store.holds(path)]


def _check_space(images: Sequence[tuple[Path, bool]], stores: Mapping[str, FeatureStore], process: Process) -> None:
    """Log how much room the cache takes; refuse to begin without it."""
    missing = sum(stores[name].bytes_an_image for image in images for name in _wanted(*image, stores))
    masked = sum(segmented for _, segmented in images)
    whole = sum(store.bytes_an_image * (len(images) if name == "clip" else masked) for name, store in stores.items())
    folder = stores["clip"].folder.parent
    if process.is_first:
        logger.info(
            "the feature cache %s will take about %s for %d images; %s of that are still to be made",
            *(folder, _size(whole), len(images), _size(missing)),
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise MedPLIBError(
            f"data.feature_cache {folder} cannot be made ({error.strerror}); name another folder"
        ) from error
    if missing > free:
        raise MedPLIBError(
            f"the feature cache {folder} needs {_size(missing)} more, but {_size(free)} are free there; make room, "
            "name another folder in data.feature_cache, or leave that empty"
        )


def _size(count: int) -> str:
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB") if count >= 1e6 else (1e3, "kB")
    return f"{count / unit:.1f} {name}"


class _Pixels(Dataset):
    """Images as the towers take them that have not seen them; None where all have, a text where one is unreadable."""

    def __init__(
        self, images: Sequence[tuple[Path, bool]], stores: Mapping[str, FeatureStore], processor: MedPLIBProcessor
    ) -> None:
        self.images, self.stores, self.processor = images, stores, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Path, Size, dict[str, Tensor]] | str | None:
        path, segmented = self.images[index]
        try:
            names = _wanted(path, segmented, self.stores)
            if not names:
                return None
            image = read_image(path)
        except (MedPLIBError, OSError) as error:
            return str(error)
        pixels, processor = image.pixels, self.processor
        inputs = {n: processor.clip_input(pixels) if n == "clip" else processor.sam_input(pixels)[0] for n in names}
        return path, image.size, inputs


def _fill(
    images: Sequence[tuple[Path, bool]],
    towers: Mapping[str, _Tower],
    processor: MedPLIBProcessor,
    recipe: Recipe,
    process: Process,
) -> None:
    """Make what is missing. Each rank begins elsewhere and goes round, past what others have made meanwhile.

    So it ends with everything in the folder that a rank sees, whether ranks share one or not.
    """
    begin = len(images) * process.rank // process.world_size
    shown = process.is_first and recipe.logging.progress
    stores = {name: tower.store for name, tower in towers.items()}
    loader: DataLoader = DataLoader(
        _Pixels([*images[begin:], *images[:begin]], stores, processor),
        batch_size=_IMAGES_AT_ONCE if process.device.type == "cuda" else 1,
        num_workers=recipe.data.workers,
        collate_fn=list,
        generator=torch.Generator(),  # the loader's own draws must not move the global random numbers
    )
    done = 0
    with record_bar("encoding images", shown=shown) as progress, ThreadPoolExecutor(_WRITERS) as pool:
        for batch in loader:
            unreadable = [item for item in batch if isinstance(item, str)]
            if unreadable and recipe.data.on_bad_record == "refuse":
                raise MedPLIBError(unreadable[0])
            given = [item for item in batch if item is not None and not isinstance(item, str)]
            for name, tower in towers.items():
                chosen = [(path, size, inputs[name]) for path, size, inputs in given if name in inputs]
                if chosen:
                    features = tower.encode(torch.stack([pixels for *_, pixels in chosen])).cpu()
                    paths, sizes = [path for path, *_ in chosen], [size for _, size, _ in chosen]
                    list(pool.map(tower.store.write, paths, features, sizes))
            done += len(batch)
            progress(done, len(images))


def _together(process: Process, work: Callable[[], None]) -> None:
    """Do something on every rank, and end on every rank if it went wrong on one."""
    failure: MedPLIBError | None = None
    try:
        work()
    except MedPLIBError as error:
        failure = error
    if process.sum(torch.tensor(float(failure is not None))) > 0:
        raise failure or MedPLIBError(
            "another process could not fill the feature cache; its own message has the reason"
        )
