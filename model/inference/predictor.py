"""Predictor: prepare an image once, ask many questions about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.inference.answer import Answer
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.inference.images import ImageSource, PreparedImage
from model.inference.loading import load_for_inference
from model.inference.presence import PresenceClassifier
from model.inference.regions import Region
from model.inference.requests import OnText
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor

__all__ = ["ImageSource", "Predictor", "PreparedImage"]


class Predictor:
    """Ask a model about images, one question at a time; for many at once take ``Engine``.

    Example:
        >>> predictor = Predictor.from_pretrained("assets/medplib-mini")
        >>> image = predictor.set_image("scan.png")
        >>> predictor.ask(image, "What modality is used to take this image?").text
        >>> predictor.ask(image, "Please segment the liver.").masks[0].to_array()
    """

    def __init__(
        self, model: MedPLIBForCausalLM, processor: MedPLIBProcessor, presence: PresenceClassifier | None = None
    ) -> None:
        self.engine = Engine(model, processor, EngineSettings(slots=1), presence)
        self.model, self.processor = self.engine.model, processor

    @classmethod
    def from_pretrained(cls, directory: str | Path, *arguments: Any, **loading: Any) -> Predictor:
        """Load a native or published checkpoint; takes what ``load_for_inference`` takes.

        Args:
            directory: the checkpoint.
            arguments: device and vision tower, by place.
            loading: device, vision_tower, dtype, sam, attention, quantisation.

        Raises:
            MedPLIBError: the directory is missing, incomplete or does not fit.
        """
        return cls(*load_for_inference(directory, *arguments, **loading))

    def set_image(self, image: ImageSource) -> PreparedImage:
        """Read an image once, for many questions; it is encoded at the first of them.

        Args:
            image: a path (PNG, JPEG, TIFF, 16-bit and palette included, single-frame DICOM), bytes, a PIL image or an
                array H×W(×3).

        Raises:
            MedPLIBError: the image cannot be read.
        """
        return self.engine.prepare(image)

    def ask(
        self,
        image: ImageSource,
        question: str,
        region: Region | Sequence[Region] | None = None,
        threshold: float | None = None,
        *,
        history: Sequence[tuple[str, str]] = (),
        settings: GenerationSettings | None = None,
        no_mask_below: float | None = None,
        on_text: OnText | None = None,
        every_target: bool = True,
    ) -> Answer:
        """Ask one question.

        Args:
            image: anything ``set_image`` takes, or what it gave; None for a question in words alone.
            question: plain text; ``<region></region>`` marks where a region is meant, if it is given.
            region: mask path, H×W array, ``("box", (x1, y1, x2, y2))`` or ``("point", (x, y))`` in image pixels, or a
                list of these.
            threshold: probability above which a pixel is in the mask, in (0, 1); the checkpoint's own when absent.
            history: earlier (question, answer) pairs about the same image. A model that was not trained on
                conversations (``config.conversation_turns`` is 1) answers worse with them. The oldest are left out
                where not all fit.
            settings: how the answer is drawn; greedy when absent.
            no_mask_below: leave a mask empty whose calibrated probability of presence is lower; the default is the
                threshold of the checkpoint's presence classifier, if it has one. 0 keeps every mask.
            on_text: called with the answer so far as it grows.
            every_target: answer each target of "segment the liver and the spleen", in further passes where the first
                leaves some out; False gives the published single pass.

        Returns:
            The answer; its masks are in the order of the ``<SEG>`` in its text.

        Raises:
            MedPLIBError: image, question, region or threshold is malformed, or the checkpoint cannot look at regions.
        """
        regions: Any = region if isinstance(region, list) else [] if region is None else [region]
        request = Request(
            image,
            question,
            regions,
            history,
            settings or GenerationSettings(),
            threshold,
            no_mask_below=no_mask_below,
            every_target=every_target,
        )
        return self.engine.ask(request, on_text)
