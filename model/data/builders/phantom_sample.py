"""The small data set that travels with the project: training pictures and held-out ones in one folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from model.data.builders.phantom import TASKS, build_phantoms, write_json

TRAINING_SEED, HELD_OUT_SEED = 61, 505
TRAINING_IMAGES, HELD_OUT_IMAGES = 16, 8


def build_sample(out: Path) -> None:
    """Write the sample: 16 pictures with ``{vqa,region,grounding}.json`` and 8 others with ``held_out.json``.

    Both parts cover all eight modalities, and together every structure; ``held_out.json`` holds questions of all three
    kinds.
    """
    build_phantoms(out, TRAINING_IMAGES, TRAINING_SEED)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        other = Path(folder)
        build_phantoms(other, HELD_OUT_IMAGES, HELD_OUT_SEED)
        held_out = [record for task in TASKS for record in json.loads((other / f"{task}.json").read_text("utf-8"))]
        for kind in ("images", "masks"):
            for path in sorted((other / kind).iterdir()):
                path.replace(out / kind / path.name)
        index_name = "SAMed2D_phantom.json"
        index = json.loads((out / index_name).read_text("utf-8")) | json.loads((other / index_name).read_text("utf-8"))
    write_json(out / "held_out.json", held_out)
    write_json(out / index_name, index)
