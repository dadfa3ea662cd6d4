"""How the page looks: a quiet theme with the reader's own fonts, and the style sheet and scripts beside it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_FIXED = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


@cache
def asset(name: str) -> str:
    """Text of a file of ``assets``."""
    return (ASSETS / name).read_text(encoding="utf-8")


def theme() -> Any:
    """The page's theme; nothing of it is fetched from anywhere."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        spacing_size=gr.themes.sizes.spacing_md,
        radius_size=gr.themes.sizes.radius_md,
        font=list(_FONTS),
        font_mono=list(_FIXED),
    ).set(
        body_background_fill="#f6f8f9",
        body_background_fill_dark="#0f1518",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#172024",
        background_fill_secondary="#f0f4f5",
        background_fill_secondary_dark="#1d282d",
        block_background_fill="#ffffff",
        block_background_fill_dark="#172024",
        border_color_primary="#dbe3e6",
        border_color_primary_dark="#2c3a40",
        block_border_width="1px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_border_width="0px",
        body_text_color="#1b2a30",
        body_text_color_dark="#e3ebee",
        body_text_color_subdued="#56676e",
        body_text_color_subdued_dark="#9db0b8",
        input_background_fill="#ffffff",
        input_background_fill_dark="#10181b",
        input_border_width="1px",
        input_border_color="#c8d3d7",
        input_border_color_dark="#36464d",
        input_border_color_focus="#0f766e",
        input_border_color_focus_dark="#2dd4bf",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover_dark="#14857c",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#e9f0f1",
        button_secondary_background_fill_dark="#1d282d",
        button_secondary_background_fill_hover_dark="#26343a",
        button_secondary_border_color="#c8d3d7",
        button_secondary_border_color_dark="#36464d",
        button_border_width="1px",
        button_medium_text_weight="500",
        button_large_text_weight="550",
        slider_color="#0f766e",
        slider_color_dark="#2dd4bf",
    )
