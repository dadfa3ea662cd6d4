"""Random augmentation of training images: one geometric transform of image and masks, then pixel transforms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Literal

import cv2
import numpy as np

_PRESETS: dict[str, dict[str, tuple[float, ...]]] = {
    "none": {},
    "light": {
        "horizontal_flip": (0.5,),
        "rotation": (0.5, 10.0),
        "scale": (0.5, 0.1),
        "translation": (0.5, 0.05),
        "brightness": (0.3, 0.1),
        "contrast": (0.3, 0.15),
        "gamma": (0.3, 0.15),
        "hue": (0.2, 6.0),
        "saturation": (0.2, 0.15),
        "blur": (0.1, 0.8),
        "noise": (0.1, 4.0),
    },
    "strong": {
        "horizontal_flip": (0.5,),
        "rotation": (0.7, 25.0),
        "scale": (0.7, 0.25),
        "translation": (0.7, 0.12),
        "brightness": (0.5, 0.2),
        "contrast": (0.5, 0.3),
        "gamma": (0.5, 0.3),
        "hue": (0.4, 12.0),
        "saturation": (0.4, 0.3),
        "blur": (0.2, 1.5),
        "noise": (0.2, 10.0),
    },
}
_KEPT = 0.5  # share of a mask's area that a geometric change must leave inside the picture
_STRENGTHS = (1.0, 0.5, 0.25)  # of the geometric change, tried in turn until every mask is kept; then there is none
_PLACE_DEGREES, _PLACE_SHIFT = 5.0, 0.02  # limit where the text names places
_WHOLE_SCALE, _WHOLE_SHIFT = 0.1, 0.05  # most of a picture without a mask: what it shows has to stay in it
_BLUR_SIDE = 336  # pixels of the side that the blur's strength is meant for
_COLOR_SPREAD, _COLOR_SHARE = 10, 0.02  # a color picture: so many of its pixels have channels so far apart
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_QUANTILES = np.array([NormalDist().inv_cdf((step + 0.5) / 256) for step in range(256)])

_PLACES = re.compile(
    r"(?<![a-z])(?:left\w*|right\w*|upper\w*|lower\w*|top|bottom|above|below|beneath|under|sides?|sided|half|halves"
    r"|quadrants?|corners?|place[ds]?|where|relation|locat\w*|position\w*|orient\w*|\w*lateral(?:ity|ly)?|superior\w*"
    r"|inferior\w*|anterior\w*|posterior\w*|cranial\w*|caudal\w*|dorsal\w*|ventral\w*|horizontal\w*|vertical\w*|mirror\w*"
    r"|clockwise|o.clock|[rl][ulm]l|[rl][av])(?![a-z])",
    re.IGNORECASE,
)
_COLORS = re.compile(r"(?<![a-z])(?:colou?r\w*|stain\w*|hue)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class AugmentationConfig:
    """How training pictures change at random; files on disk stay as they are.

    Each kind of change is a probability and a largest strength; an empty one takes the preset's. A picture is enlarged
    and shifted at once, which crops it; what comes in from outside is black."""

    preset: Literal["none", "light", "strong"] = "none"
    horizontal_flip: tuple[float, ...] = ()  # probability alone; never where the text names places
    vertical_flip: tuple[float, ...] = ()  # probability alone; in no preset
    rotation: tuple[float, ...] = ()  # probability, degrees
    scale: tuple[float, ...] = ()  # probability, relative: 0.2 is from 1/1.2 to 1.2
    translation: tuple[float, ...] = ()  # probability, share of the picture's side
    brightness: tuple[float, ...] = ()  # probability, share of the range of values
    contrast: tuple[float, ...] = ()  # probability, relative
    gamma: tuple[float, ...] = ()  # probability, relative, of the exponent
    hue: tuple[float, ...] = ()  # probability, degrees; of color pictures, as is saturation
    saturation: tuple[float, ...] = ()  # probability, relative
    blur: tuple[float, ...] = ()  # probability, standard deviation in pixels where the longer side has 336
    noise: tuple[float, ...] = ()  # probability, standard deviation in grey levels

    def settings(self) -> dict[str, tuple[float, float]]:
        """(probability, strength) of every kind of change, 0 where there is none."""
        preset = _PRESETS[self.preset]
        given = {name: getattr(self, name) or preset.get(name, (0.0, 0.0)) for name in _KINDS}
        return {name: (value[0], value[-1]) for name, value in given.items()}

    @property
    def active(self) -> bool:
        """Whether anything can change."""
        return any(chance for chance, _ in self.settings().values())

    def problems(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        found = []
        for name in _KINDS:
            value: tuple[float, ...] = getattr(self, name)
            wanted = 1 if name in _FLIPS else 2
            if value and (len(value) != wanted or not 0 <= value[0] <= 1 or min(value) < 0):
                form = "[probability]" if wanted == 1 else "[probability, strength]"
                found.append(
                    f"augmentation.{name} is {list(value)}, expected {form}, the probability at most 1, none negative"
                )
        return found


_KINDS = tuple(field.name for field in fields(AugmentationConfig) if field.name != "preset")
_FLIPS = ("horizontal_flip", "vertical_flip")


def tells_places(texts: Iterable[object]) -> bool:
    """Whether a conversation asks or answers with sides and places, so that a mirrored picture would make it wrong.

    Args:
        texts: its turns, and what its record says of it (kind of question, name of the target); None is passed
            over.
    """
    return any(isinstance(text, str) and _PLACES.search(text) for text in texts)


def tells_colors(texts: Iterable[object]) -> bool:
    """Whether a conversation speaks of colors; arguments as of ``tells_places``."""
    return any(isinstance(text, str) and _COLORS.search(text) for text in texts)


@dataclass(frozen=True)
class _Warp:
    """One geometric change in shares of a picture's sides, so that it fits pictures of any size."""

    flips: tuple[bool, bool] = (False, False)  # horizontal, vertical
    degrees: float = 0.0
    factor: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)  # to the right, down

    def __call__(self, pixels: np.ndarray, interpolation: int) -> np.ndarray:
        """uint8 or bool [H, W] or [H, W, 3] → the same, changed; itself where nothing changes."""
        if self == _Warp():
            return pixels
        height, width = pixels.shape[:2]
        angle = np.deg2rad(self.degrees)
        turn = self.factor * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        turn *= np.where(self.flips, -1, 1)
        center = np.array([width - 1, height - 1]) / 2
        offset = center + np.multiply(self.shift, (width, height)) - turn @ center
        values = pixels.view(np.uint8) if pixels.dtype == np.bool_ else pixels
        color = values.ndim == 3
        values = cv2.cvtColor(values, cv2.COLOR_RGB2RGBA) if color else values  # OpenCV moves four channels much faster
        moved = cv2.warpAffine(values, np.column_stack([turn, offset]), (width, height), flags=interpolation)
        return (cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB) if color else moved).view(pixels.dtype)

    def keeps(self, mask: np.ndarray, moved: np.ndarray) -> bool:
        left = int(np.count_nonzero(moved))
        return left > 0 and left >= _KEPT * self.factor**2 * int(np.count_nonzero(mask))


def augment_pictures(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    rng: np.random.Generator,
    config: AugmentationConfig,
    *,
    flip_allowed: bool,
    recolor_allowed: bool = True,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The pictures of one conversation with all their masks, changed alike.

    One geometric change is drawn for all of them. Where it would cut off more than half of a mask it is drawn again,
    weaker, and left out after three tries.

    Args:
        images: uint8 [H, W, 3] each; neither they nor the masks are changed in place.
        masks: bool or uint8 [H, W] each; may be none. They come back in their order and types.
        rng: all randomness comes from it.
        flip_allowed: False where sides matter (``tells_places``). Without flips, rotations stay below 5° and shifts
            below 2 %, so that places stay true.
        recolor_allowed: False where colors matter.
    """
    settings = config.settings()
    warp, moved = _Warp(), list(masks)
    for strength in _STRENGTHS:
        tried = _draw_warp(rng, settings, strength, flip_allowed=flip_allowed, whole=not masks)
        shifted = [tried(mask, cv2.INTER_NEAREST) for mask in masks]
        if all(tried.keeps(mask, new) for mask, new in zip(masks, shifted, strict=True)):
            warp, moved = tried, shifted
            break
    return [_repaint(warp(image, cv2.INTER_LINEAR), rng, settings, recolor_allowed) for image in images], moved


def _draw(rng: np.random.Generator, setting: tuple[float, float], most: float = np.inf) -> float:
    """With the setting's probability a value between − and + its strength, at most ``most``; else 0."""
    chance, strength = setting
    strength = min(strength, most)
    return float(rng.uniform(-strength, strength)) if rng.random() < chance else 0.0


def _draw_warp(
    rng: np.random.Generator,
    settings: dict[str, tuple[float, float]],
    strength: float,
    *,
    flip_allowed: bool,
    whole: bool,
) -> _Warp:
    flips = tuple(bool(rng.random() < settings[name][0]) and flip_allowed for name in _FLIPS)
    scale = strength * _draw(rng, settings["scale"], _WHOLE_SCALE if whole else np.inf)
    shift_most = min(_WHOLE_SHIFT if whole else np.inf, np.inf if flip_allowed else _PLACE_SHIFT)
    return _Warp(
        flips=(flips[0], flips[1]),
        degrees=strength * _draw(rng, settings["rotation"], np.inf if flip_allowed else _PLACE_DEGREES),
        factor=(1 + abs(scale)) ** np.sign(scale),
        shift=(
            strength * _draw(rng, settings["translation"], shift_most),
            strength * _draw(rng, settings["translation"], shift_most),
        ),
    )


def _repaint(
    image: np.ndarray, rng: np.random.Generator, settings: dict[str, tuple[float, float]], recolor: bool
) -> np.ndarray:
    """Brightness, contrast and gamma; hue and saturation of a color picture; blur; noise: uint8 [H, W, 3]."""
    brightness, contrast, gamma, hue, saturation, blur, noise = (
        _draw(rng, settings[name]) for name in ("brightness", "contrast", "gamma", "hue", "saturation", "blur", "noise")
    )
    if brightness or contrast or gamma:
        curve = np.linspace(0, 1, 256) ** ((1 + abs(gamma)) ** np.sign(gamma))
        curve = (curve - 0.5) * (1 + contrast) + 0.5 + brightness
        image = cv2.LUT(image, np.rint(np.clip(curve, 0, 1) * 255).astype(np.uint8))
    in_color = False
    if hue or saturation or noise:
        few = image[::8, ::8].astype(np.int16)
        in_color = float((few.max(axis=2) - few.min(axis=2) > _COLOR_SPREAD).mean()) > _COLOR_SHARE
    if recolor and in_color and (hue or saturation):
        angle, factor = np.deg2rad(hue), max(0.0, 1 + saturation)
        turn = np.eye(3)
        turn[1:, 1:] = factor * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        image = cv2.transform(image, np.linalg.inv(_YIQ) @ turn @ _YIQ)
    if blur:
        sigma = max(abs(blur) * max(image.shape) / _BLUR_SIDE, 0.1)
        image = cv2.GaussianBlur(image, (2 * int(np.ceil(2 * sigma)) + 1,) * 2, sigma)
    if noise:
        table = np.rint(abs(noise) * _QUANTILES).astype(np.int16)
        shape = image.shape if in_color else image.shape[:2]
        count = int(np.prod(shape))
        places = rng.integers(0, 1 << 64, -(-count // 8), dtype=np.uint64).view(np.uint8)[:count].reshape(shape)
        drawn = cv2.LUT(places, table)
        image = cv2.add(image, drawn if in_color else cv2.merge([drawn] * 3), dtype=cv2.CV_8U)
    return image
