"""``python -m model.inference.calibrate_gate MODEL --data FILE --images DIR``: fit a checkpoint's mask gate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from model.checkpoint import load
from model.checkpoint.directories import resolve
from model.data.progress import record_bar
from model.data.records import open_records
from model.errors import MedPLIBError, escape_unprintable, shown
from model.inference.gate_rows import collect_gate_rows
from model.inference.loading import usable_device
from model.inference.mask_gate import GATE_FILE, MaskGate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the gate is written, 2 after a user's error."""
    escape_unprintable()
    options = build_parser().parse_args(arguments)
    try:
        return _calibrate(options)
    except MedPLIBError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        where = f"{shown(error.filename, quoted=False)}: " if error.filename else ""
        sys.stderr.write(f"{where}{error.strerror or error}; name a place that can be read and written\n")
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m model.inference.calibrate_gate",
        description="Paint structures that are and are not in the images, learn to tell the two apart, and write "
        f"{GATE_FILE} beside the checkpoint. Use records that the model was not trained on.",
    )
    parser.add_argument("model", type=Path, help="checkpoint directory, or a finished run's folder")
    parser.add_argument(
        "--data", type=Path, required=True, help="records that ask for masks, some of absent structures"
    )
    parser.add_argument("--images", type=Path, required=True, help="folder that the records' paths start from")
    parser.add_argument(
        "--false-mask-rate", type=float, default=0.05, help="absent structures that may pass (%(default)s)"
    )
    parser.add_argument("--max-records", type=int, help="read only so many records")
    parser.add_argument("--out", type=Path, help=f"file to write; {GATE_FILE} in the checkpoint when absent")
    parser.add_argument("--device", default="cpu", help="where the model runs (%(default)s)")
    parser.add_argument("--vision-tower", type=Path, help="CLIP directory, for published checkpoints")
    parser.add_argument("--sam", type=Path, help="SAM-Med2D file, for published checkpoints without SAM weights")
    return parser


def _calibrate(options: argparse.Namespace) -> int:
    if options.max_records is not None and options.max_records < 1:
        raise MedPLIBError(f"--max-records is {options.max_records}; give at least 1")
    if not 0 < options.false_mask_rate < 1:
        raise MedPLIBError(f"--false-mask-rate is {options.false_mask_rate}; give a number between 0 and 1")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise MedPLIBError(f"there is no folder {options.out.absolute().parent}; make it, or name another --out")
    options.model = resolve(options.model)
    records = open_records(options.data)
    device = usable_device(options.device)
    dtype = torch.float32 if device.type == "cpu" else None
    model, processor = load(
        options.model, vision_tower=options.vision_tower, sam=options.sam, device=device, dtype=dtype
    )
    with record_bar("painting") as progress:
        asked = records if options.max_records is None else records[: options.max_records]
        rows = collect_gate_rows(model, processor, asked, options.images, progress)
    gate = MaskGate.fit(rows.features, rows.present, options.false_mask_rate, groups=rows.images)
    written = gate.save(options.out or options.model)
    sys.stdout.write(gate.report.table(gate.threshold) + "\n")
    if rows.left_out:
        sys.stderr.write(f"{len(rows.left_out)} records were left out; the first: {rows.left_out[0]}\n")
    if gate.report.false_mask_bound > options.false_mask_rate:
        sys.stderr.write(
            f"with {gate.report.absent} absent structures no rate below {gate.report.false_mask_bound:.1%} can be "
            "promised; calibrate on more of them\n"
        )
    sys.stdout.write(f"wrote {written}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
