"""Draw the pictures of README and documentation that are made from code.

python scripts/pictures.py phantoms             docs/pictures/phantoms.png
python scripts/pictures.py answer [MODEL_DIR]   assets/pictures/answer.png: three real answers of the nano
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.data.phantom.scenes import MODALITIES, Scene, render_scene
from model.inference.predictor import Predictor
from model.inference.regions import region_to_mask
from model.visualize import PALETTE, draw_overlay

ROOT = Path(__file__).resolve().parents[1]
SIDE, GAP, TITLE, LINE, COLUMNS = 256, 12, 26, 18, 4
SEED = 11
DARK, GREY = (20, 28, 38), (68, 80, 94)

STEM = "fundus_00--Phantom--seed505case000004--0000"
QUESTIONS: tuple[tuple[str, str | None], ...] = (  # question, class id of the region asked about
    ("What kind of medical image is this?", None),
    ("What is in the region?", "0019"),
    ("Please segment the optic disc.", None),
)
PANEL, WRAP = 320, 38


# ---- a contact sheet of phantoms -----------------------------------------------------------------------------------


def phantoms(seed: int = SEED) -> Image.Image:
    """One phantom of every modality, its structures outlined and named."""
    rng = np.random.default_rng(seed)
    drawn = [[render_scene(rng, modality, SIDE) for _ in range(12)] for modality in MODALITIES]
    scenes = [next((one for one in some if len(one.structures) >= 3), some[0]) for some in drawn]
    lines = max(-(-len(scene.structures) // 2) for scene in scenes)  # two names a line
    width, height = SIDE + GAP, SIDE + TITLE + lines * LINE + 2 * GAP
    sheet = Image.new("RGB", (COLUMNS * width + GAP, -(-len(scenes) // COLUMNS) * height + GAP), "white")
    for index, scene in enumerate(scenes):
        row, column = divmod(index, COLUMNS)
        _draw_scene(sheet, scene, GAP + column * width, GAP + row * height)
    return sheet


def _draw_scene(sheet: Image.Image, scene: Scene, left: int, top: int) -> None:
    canvas = ImageDraw.Draw(sheet)
    canvas.text((left, top), scene.plan.spoken, fill=DARK, font=ImageFont.load_default(size=17))
    pixels = scene.image.copy()
    names = ImageFont.load_default(size=14)
    for index, structure in enumerate(scene.structures):
        colour = PALETTE[index % len(PALETTE)]
        outlines, _ = cv2.findContours(structure.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, outlines, -1, colour, 2)
        line, half = divmod(index, 2)
        x, y = left + half * SIDE // 2, top + TITLE + SIDE + 4 + line * LINE
        canvas.rectangle((x, y + 3, x + 10, y + 13), fill=colour)
        canvas.text((x + 15, y), structure.name, fill=GREY, font=names)
    sheet.paste(Image.fromarray(pixels), (left, top + TITLE))


# ---- real answers --------------------------------------------------------------------------------------------------


def answers(model: Path) -> Image.Image:
    """What a model says to three questions about one picture it was not trained on, uncorrected."""
    predictor = Predictor.from_pretrained(model)
    sample = ROOT / "data" / "sample"
    image = predictor.set_image(sample / "images" / f"{STEM}.png")
    panels = []
    for question, marked in QUESTIONS:
        region = sample / "masks" / f"{STEM}--{marked}_000.png" if marked else None
        answer = predictor.ask(image, question, region)
        mask = region_to_mask(region, image.size) if region else None
        panels.append(_panel(draw_overlay(image.data.pixels, answer.masks, mask), question, answer.text))
    height = max(panel.height for panel in panels)
    sheet = Image.new("RGB", (len(panels) * (PANEL + GAP) + GAP, height + 2 * GAP), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (GAP + index * (PANEL + GAP), GAP))
    return sheet


def _panel(pixels: np.ndarray, question: str, answer: str) -> Image.Image:
    picture = Image.fromarray(pixels)
    picture = picture.resize((PANEL, round(PANEL * picture.height / picture.width)), Image.Resampling.LANCZOS)
    asked, said = textwrap.wrap(question, WRAP), textwrap.wrap(answer, WRAP) or ["(no answer)"]
    panel = Image.new("RGB", (PANEL, picture.height + 14 + 20 * (len(asked) + len(said))), "white")
    panel.paste(picture)
    canvas, font = ImageDraw.Draw(panel), ImageFont.load_default(size=16)
    rows: list[tuple[str, Any]] = [*((line, GREY) for line in asked), *((line, DARK) for line in said)]
    for number, (line, colour) in enumerate(rows):
        canvas.text((2, picture.height + 6 + 20 * number), line, fill=colour, font=font)
    return panel


def main() -> None:
    """Write the picture asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=("phantoms", "answer"))
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "assets" / "medplib-nano")
    options = parser.parse_args()
    folder = ROOT / ("docs" if options.picture == "phantoms" else "assets") / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{options.picture}.png"
    picture = phantoms() if options.picture == "phantoms" else answers(options.model)
    picture.quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
