"""Draw the pictures of the documentation that are made from code: python scripts/pictures.py."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.data.builders.phantom_scenes import MODALITIES, Scene, render_scene
from model.inference.overlay import PALETTE

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
SIDE, GAP, TITLE, LINE, COLUMNS = 256, 12, 26, 18, 4
SEED = 11


def phantoms(seed: int = SEED) -> Image.Image:
    """A contact sheet: one phantom of every modality, its structures outlined and named."""
    rng = np.random.default_rng(seed)
    scenes = [_rich_scene(rng, modality) for modality in MODALITIES]
    lines = max(-(-len(scene.structures) // 2) for scene in scenes)  # two names a line
    width, height = SIDE + GAP, SIDE + TITLE + lines * LINE + 2 * GAP
    sheet = Image.new("RGB", (COLUMNS * width + GAP, -(-len(scenes) // COLUMNS) * height + GAP), "white")
    for index, scene in enumerate(scenes):
        row, column = divmod(index, COLUMNS)
        _draw(sheet, scene, GAP + column * width, GAP + row * height)
    return sheet


def _rich_scene(rng: np.random.Generator, modality: str) -> Scene:
    """The first of a few scenes that shows at least three structures."""
    scenes = [render_scene(rng, modality, SIDE) for _ in range(12)]
    return next((scene for scene in scenes if len(scene.structures) >= 3), scenes[0])


def _draw(sheet: Image.Image, scene: Scene, left: int, top: int) -> None:
    canvas = ImageDraw.Draw(sheet)
    canvas.text((left, top), scene.plan.spoken, fill=(20, 28, 38), font=ImageFont.load_default(size=17))
    pixels = scene.image.copy()
    names = ImageFont.load_default(size=14)
    for index, structure in enumerate(scene.structures):
        colour = PALETTE[index % len(PALETTE)]
        outlines, _ = cv2.findContours(structure.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, outlines, -1, colour, 2)
        line, half = divmod(index, 2)
        x, y = left + half * SIDE // 2, top + TITLE + SIDE + 4 + line * LINE
        canvas.rectangle((x, y + 3, x + 10, y + 13), fill=colour)
        canvas.text((x + 15, y), structure.name, fill=(68, 80, 94), font=names)
    sheet.paste(Image.fromarray(pixels), (left, top + TITLE))


def main() -> None:
    """Write every picture."""
    path = PICTURES / "phantoms.png"
    phantoms().quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote {path.name}, {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
