"""``python -m model.inference.calibrate_presence MODEL --data FILE --images DIR``: fit a presence classifier.

Masks of present and of absent targets are decoded after a forced "The … is <SEG>.": a model that has learned to refuse
would give no example of an absent target's mask.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.checkpoint import load
from model.checkpoint.directories import resolve
from model.data.image_io import read_mask
from model.data.records import open_records
from model.data.schema import Sample, parse_record
from model.data.validate import Progress, record_bar
from model.errors import MedPLIBError, escape_unprintable, shown
from model.inference.images import PreparedImage, prepare_image
from model.inference.loading import usable_device
from model.inference.presence import FEATURES, PRESENCE_FILE, PresenceClassifier, mask_features
from model.inference.targets import mask_labels
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import REGION_MARKER, SEG_TOKEN

PROMPTS_AT_ONCE = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the classifier is written, 2 after a user's error."""
    escape_unprintable()
    parser = argparse.ArgumentParser(
        "python -m model.inference.calibrate_presence",
        description="Decode masks of targets that are and are not in the images, fit a classifier, and write "
        f"{PRESENCE_FILE} beside the checkpoint. Use records that the model was not trained on.",
    )
    parser.add_argument("model", type=Path, help="checkpoint directory, or a finished run's folder")
    parser.add_argument("--data", type=Path, required=True, help="records that ask for masks, some of absent targets")
    parser.add_argument("--images", type=Path, required=True, help="folder that the records' paths start from")
    parser.add_argument(
        "--false-mask-rate", type=float, default=0.05, help="share of absent targets that may pass (%(default)s)"
    )
    parser.add_argument(
        "--lost-mask-rate", type=float, help="share of present targets that may be withheld, in place of the other rate"
    )
    parser.add_argument("--max-records", type=int, help="read only so many records")
    parser.add_argument("--out", type=Path, help=f"file to write; {PRESENCE_FILE} in the checkpoint when absent")
    parser.add_argument("--device", default="cpu", help="where the model runs (%(default)s)")
    parser.add_argument("--vision-tower", type=Path, help="CLIP directory, for published checkpoints")
    parser.add_argument("--sam", type=Path, help="SAM-Med2D file, for published checkpoints without SAM weights")
    options = parser.parse_args(arguments)
    try:
        return _calibrate(options)
    except MedPLIBError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        where = f"{shown(error.filename, quoted=False)}: " if error.filename else ""
        sys.stderr.write(f"{where}{error.strerror or error}; name a place that can be read and written\n")
        return 2


def _calibrate(options: argparse.Namespace) -> int:
    if options.max_records is not None and options.max_records < 1:
        raise MedPLIBError(f"--max-records is {options.max_records}; give at least 1")
    for name in ("false_mask_rate", "lost_mask_rate"):
        rate = getattr(options, name)
        if rate is not None and not 0 < rate < 1:
            raise MedPLIBError(f"--{name.replace('_', '-')} is {rate}; give a number between 0 and 1")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise MedPLIBError(f"there is no folder {options.out.absolute().parent}; make it, or name another --out")
    options.model = resolve(options.model)
    records = open_records(options.data)
    device = usable_device(options.device)
    dtype = torch.float32 if device.type == "cpu" else None
    model, processor = load(
        options.model, vision_tower=options.vision_tower, sam=options.sam, device=device, dtype=dtype
    )
    with record_bar("masks") as progress:
        asked = records if options.max_records is None else records[: options.max_records]
        rows = collect_rows(model, processor, asked, options.images, progress)
    fitted = PresenceClassifier.fit(
        rows.features, rows.present, options.false_mask_rate, lost_mask_rate=options.lost_mask_rate, groups=rows.images
    )
    written = fitted.save(options.out or options.model)
    sys.stdout.write(fitted.report.table(fitted.threshold) + "\n")
    if rows.left_out:
        sys.stderr.write(f"{len(rows.left_out)} records were left out; the first: {rows.left_out[0]}\n")
    if options.lost_mask_rate is None and fitted.report.false_mask_bound > options.false_mask_rate:
        sys.stderr.write(
            f"with {fitted.report.absent} absent targets no rate below {fitted.report.false_mask_bound:.1%} can be "
            "promised; calibrate on more of them\n"
        )
    sys.stdout.write(f"wrote {written}\n")
    return 0


@dataclass(frozen=True)
class CalibrationRows:
    """What a presence classifier is fitted on.

    Attributes:
        features: float64 [n, 4], see ``mask_features``.
        present: bool [n], whether the target is in the image.
        images: [n], the image each mask lies on, for ``PresenceClassifier.fit(groups=…)``.
        names: [n], the targets.
        left_out: sentences on grounding records that could not be used.
    """

    features: NDArray[np.float64]
    present: NDArray[np.bool_]
    images: tuple[str, ...]
    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """One target of a record.

    Attributes:
        image: file of the image.
        turns: the conversation up to and including the question.
        name: of the target.
        mask: its mask file; None where it is absent.
        regions: mask files of the region markers in ``turns``.
    """

    image: Path
    turns: tuple[Turn, ...]
    name: str
    mask: Path | None
    regions: tuple[Path, ...] = ()


def collect_rows(
    model: MedPLIBForCausalLM,
    processor: MedPLIBProcessor,
    records: Sequence[Mapping[str, Any]],
    images: str | Path,
    progress: Progress | None = None,
) -> CalibrationRows:
    """Decode a mask of every target that grounding records ask for, after the forced answer "The … is <SEG>.".

    A target is absent where a record of the task ``grounding`` asks for it and its answer holds no mask, or an empty
    one; it is named by the record's key ``about`` or by the question. Records of other tasks are passed over.

    Args:
        model: the network, in eval mode.
        processor: its processor.
        records: of the published layout; those of one image side by side save encoding it again.
        images: folder that the records' paths start from.
        progress: called with (records done, records in all).

    Raises:
        MedPLIBError: none of the records can be used.
    """
    left_out: list[str] = []
    features: list[NDArray[np.float64]] = []
    used: list[Target] = []
    present: list[bool] = []
    for path, group in groupby(_targets(records, Path(images), left_out, progress), key=lambda target: target.image):
        targets = list(group)
        try:
            image = prepare_image(path, processor)
            found = _decode(model, processor, image, targets)
            there = [target.mask is not None and bool(read_mask(target.mask).any()) for target in targets]
        except MedPLIBError as error:
            left_out.append(str(error))
            continue
        features += found
        present += there
        used += targets
    if not used:
        reason = f" (the first: {left_out[0]})" if left_out else ""
        raise MedPLIBError(
            f"none of the {len(records)} records asks for a mask that could be decoded{reason}; "
            "give grounding records, of present and of absent targets"
        )
    return CalibrationRows(
        np.stack(features).reshape(-1, len(FEATURES)),
        np.array(present, dtype=bool),
        tuple(str(target.image) for target in used),
        tuple(target.name for target in used),
        tuple(left_out),
    )


def record_targets(sample: Sample) -> list[Target]:
    """Targets that a grounding sample asks for, turn by turn; those without a name are left out."""
    targets: list[Target] = []
    masks = iter(sample.masks)
    for number, (question, answer) in enumerate(zip(sample.turns[::2], sample.turns[1::2], strict=False)):
        turns = sample.turns[: 2 * number + 1]
        regions = sample.regions[: sum(turn.text.count(REGION_MARKER) for turn in turns)]
        count = answer.text.count(SEG_TOKEN)
        names = mask_labels(answer.text, question.text, count)
        files: list[Path | None] = [next(masks) for _ in range(count)]
        if not count and sample.task == "grounding":
            about = sample.raw.get("about")
            asked = mask_labels(SEG_TOKEN, question.text, 1)[0]
            names, files = [about if isinstance(about, str) and about else asked], [None]
        for name, file in zip(names, files, strict=True):
            if name:
                targets.append(Target(sample.images[0], turns, name, file, regions))
    return targets


def _targets(
    records: Sequence[Mapping[str, Any]], images: Path, left_out: list[str], progress: Progress | None
) -> Iterator[Target]:
    """Targets of all usable grounding records in order; what is wrong with the others is added to ``left_out``."""
    for number, raw in enumerate(records, 1):
        if progress is not None:
            progress(number, len(records))
        try:
            sample = parse_record(raw, images)
        except MedPLIBError as error:
            left_out.append(str(error))
            continue
        if sample.task != "grounding" and not sample.masks:
            continue
        if len(sample.images) != 1:
            left_out.append(f"record {sample.id or '(no id)'} has {len(sample.images)} images; one is expected")
            continue
        yield from record_targets(sample)


@torch.inference_mode()
def _decode(
    model: MedPLIBForCausalLM, processor: MedPLIBProcessor, image: PreparedImage, targets: Sequence[Target]
) -> list[NDArray[np.float64]]:
    """Features [4] of the mask of each forced answer about one image."""
    patches = model.encode_images(image.clip_input.to(model.device, model.dtype))  # [1, P, Dv]
    embedding = model.encode_segmented_images(image.sam_input.to(model.device, model.dtype))  # [1, C, s, s]
    nothing = np.zeros(image.size, dtype=bool)
    features = []
    for begin in range(0, len(targets), PROMPTS_AT_ONCE):
        some = targets[begin : begin + PROMPTS_AT_ONCE]
        encoded = []
        for target in some:
            turns = [*target.turns, Turn("gpt", f"The {target.name} is {SEG_TOKEN}.")]
            said = sum(turn.text.count(SEG_TOKEN) for turn in turns if turn.role == "gpt")
            regions = [read_mask(path) for path in target.regions]
            encoded.append(processor.encode(turns, [image.data.pixels], regions, masks=[nothing] * said))
        batch, count = processor.collate(encoded), len(some)
        ids, attention = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        spliced = model.splice(
            ids,
            attention,
            patches.expand(count, -1, -1),
            batch["region_masks"].to(model.device, model.dtype),
            batch["region_image"].to(model.device),
        )
        plan = spliced.plan
        hidden = model.model.decoder(
            spliced.embeds, attention_mask=plan.attention_mask, position_ids=plan.position_ids
        ).last_hidden_state
        rows = torch.arange(count, device=model.device)
        counted = torch.arange(1, ids.shape[1] + 1, device=model.device)
        last = ((ids == model.config.seg_token_id) * counted).argmax(dim=1)  # the forced one comes after any earlier
        masks = model.decode_masks(
            hidden[rows, plan.starts[rows, last] - 1],  # the states that predict it
            embedding,
            torch.zeros(count, dtype=torch.long, device=model.device),
            [image.sam_size] * count,
            [image.size] * count,
        )
        scores = masks.iou_predictions.float().flatten().tolist()
        features += [mask_features(one, score) for one, score in zip(masks.mask_logits, scores, strict=True)]
    return features


if __name__ == "__main__":
    sys.exit(main())
