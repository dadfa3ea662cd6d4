"""Write MedPLIB-nano's checkpoint in half precision, with its model card.

python scripts/nano_pack.py CHECKPOINT REPORT.json OUT [--minutes N] [--notes NOTES.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from nano_report import table

from model.checkpoint import load, save

CARD = """---
license: apache-2.0
tags: [medical, multimodal, segmentation, synthetic, research]
---
# MedPLIB-nano

The whole MedPLIB network in {millions:.1f} million parameters, for trying the software on a laptop: a CLIP tower
(140 px, 10 × 10 patches), a LLaMA decoder (192 wide, 6 layers, two experts in every layer), a SAM-Med2D branch (256 px)
and everything between them.

**It has never seen a patient.** It was trained from random weights on *phantoms*: stylised, synthetic pictures of
eight modalities with {structures} named structures, drawn by `medplib data build phantom`. On real images its answers
and masks mean nothing. It is no medical device; do not use it for diagnosis, treatment or anything else in medicine.

- Made by `bash scripts/train_nano.sh`: phantoms, tokenizer, CLIP and SAM towers, language model, then the four stages
  of MedPLIB through the ordinary recipes `configs/stages/stage*_nano.yaml`; {minutes}.
- Weights: half precision (run in fp32 on a CPU), {size:.1f} MB. `medplib ask IMAGE "QUESTION"` uses it by default,
  `Predictor.from_pretrained("assets/medplib-nano")` in Python.

## Measured

On {images} held-out phantoms ({questions} questions), greedy answers through the ordinary generation path, every text
answer compared exactly (case and punctuation aside). A present target that got no mask counts as Dice 0. *blind* is the
best predictor that does not look at the picture (for masks: each structure's average place).

{table}

{notes}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="native checkpoint, the merged result of stage IV")
    parser.add_argument("report", type=Path, help="JSON of scripts/nano_report.py")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--time", default="under two hours on two CPU cores", help="how long the training took")
    parser.add_argument("--notes", type=Path, help="Markdown for the end of the card")
    options = parser.parse_args()
    model, processor = load(options.checkpoint, dtype=torch.float16)
    save(model, processor, options.out)
    report = json.loads(options.report.read_text(encoding="utf-8"))
    weights = sum(path.stat().st_size for path in options.out.iterdir())
    from model.data.phantom.scenes import CLASS_NAMES

    card = CARD.format(
        millions=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        structures=len(CLASS_NAMES) - 1,
        minutes=options.time,
        size=weights / 1e6,
        images=report["images"],
        questions=report["questions"],
        table=table(report),
        notes=options.notes.read_text(encoding="utf-8").strip() if options.notes else "",
    )
    (options.out / "README.md").write_text(card.rstrip() + "\n", encoding="utf-8")
    print(f"{options.out}: {weights / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
