"""The look in one place: the palette, light and dark, as CSS variables and as Gradio's theme.

`ui/server.py` mounts `theme()`; `ui/routes.py` serves `css_variables()` in front of `assets/style.css`, so
that every page (Gradio's and our own) takes its colours from this file and from nowhere else. Contrast is
asserted in the tests.
"""

from __future__ import annotations

import gradio as gr

LIGHT = {
    "bg": "#F5F7FA",
    "surface": "#FFFFFF",
    "sunken": "#EBEEF3",
    "line": "#D3D9E2",
    "control": "#7C8798",
    "text": "#161B22",
    "help": "#475160",
    "run": "#1D5FC4",
    "run-hover": "#174EA3",
    "warn": "#9C5A00",
    "bad": "#9B0F45",
    "rest": "#566070",
    "tint-run": "#E6EFFC",
    "tint-warn": "#FFF1D9",
    "tint-bad": "#FCE8EE",
    "tint-label": "#CFE0FA",
    "on-run": "#FFFFFF",
    "on-bad": "#FFFFFF",
    "series-1": "#1D5FC4",
    "series-2": "#B85300",
    "series-3": "#0F7A4D",
    "series-4": "#332762",
    "series-5": "#966181",
}
DARK = {
    "bg": "#0E1116",
    "surface": "#161B22",
    "sunken": "#0A0D11",
    "line": "#2B333E",
    "control": "#6B7686",
    "text": "#E6EAF0",
    "help": "#A3AEBD",
    "run": "#7DB0FF",
    "run-hover": "#9DC4FF",
    "warn": "#F5C15C",
    "bad": "#FF8A75",
    "rest": "#9AA5B4",
    "tint-run": "#14274A",
    "tint-warn": "#33260D",
    "tint-bad": "#3A1813",
    "tint-label": "#1C3866",
    "on-run": "#0E1116",
    "on-bad": "#0E1116",
    "series-1": "#7DB0FF",
    "series-2": "#F2A65A",
    "series-3": "#66FFC1",
    "series-4": "#F3F0A0",
    "series-5": "#968161",
}
UI_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")

# Gradio's theme variable -> our colour; set() gets each with its *_dark twin
_COLOURS = {
    "body_background_fill": "bg",
    "body_text_color": "text",
    "body_text_color_subdued": "help",
    "background_fill_primary": "surface",
    "background_fill_secondary": "sunken",
    "border_color_primary": "line",
    "border_color_accent": "run",
    "border_color_accent_subdued": "line",
    "color_accent_soft": "tint-run",
    "link_text_color": "run",
    "link_text_color_active": "run",
    "link_text_color_hover": "run",
    "link_text_color_visited": "run",
    "code_background_fill": "sunken",
    "block_background_fill": "surface",
    "block_border_color": "line",
    "block_info_text_color": "help",
    "block_label_background_fill": "surface",
    "block_label_border_color": "line",
    "block_label_text_color": "text",
    "block_title_background_fill": "surface",
    "block_title_text_color": "text",
    "panel_background_fill": "surface",
    "panel_border_color": "line",
    "accordion_text_color": "text",
    "table_text_color": "text",
    "table_border_color": "line",
    "table_even_background_fill": "surface",
    "table_odd_background_fill": "surface",
    "table_row_focus": "tint-run",
    "checkbox_background_color": "surface",
    "checkbox_background_color_focus": "surface",
    "checkbox_background_color_hover": "surface",
    "checkbox_background_color_selected": "run",
    "checkbox_border_color": "control",
    "checkbox_border_color_focus": "run",
    "checkbox_border_color_hover": "run",
    "checkbox_border_color_selected": "run",
    "checkbox_label_background_fill": "surface",
    "checkbox_label_background_fill_hover": "sunken",
    "checkbox_label_background_fill_selected": "tint-run",
    "checkbox_label_border_color": "control",
    "checkbox_label_border_color_hover": "run",
    "checkbox_label_border_color_selected": "run",
    "checkbox_label_text_color": "text",
    "checkbox_label_text_color_selected": "text",
    "error_background_fill": "tint-bad",
    "error_border_color": "bad",
    "error_text_color": "bad",
    "error_icon_color": "bad",
    "input_background_fill": "surface",
    "input_background_fill_focus": "surface",
    "input_background_fill_hover": "surface",
    "input_border_color": "control",
    "input_border_color_focus": "run",
    "input_border_color_hover": "control",
    "input_placeholder_color": "help",
    "loader_color": "run",
    "slider_color": "run",
    "stat_background_fill": "run",
    "button_primary_background_fill": "run",
    "button_primary_background_fill_hover": "run-hover",
    "button_primary_border_color": "run",
    "button_primary_border_color_hover": "run-hover",
    "button_primary_text_color": "on-run",
    "button_primary_text_color_hover": "on-run",
    "button_secondary_background_fill": "surface",
    "button_secondary_background_fill_hover": "sunken",
    "button_secondary_border_color": "control",
    "button_secondary_border_color_hover": "control",
    "button_secondary_text_color": "text",
    "button_secondary_text_color_hover": "text",
    "button_cancel_background_fill": "surface",
    "button_cancel_background_fill_hover": "tint-bad",
    "button_cancel_border_color": "bad",
    "button_cancel_border_color_hover": "bad",
    "button_cancel_text_color": "bad",
    "button_cancel_text_color_hover": "bad",
}
_NO_SHADOW = (
    "shadow_drop", "shadow_drop_lg", "shadow_inset", "block_label_shadow", "checkbox_shadow",
    "button_primary_shadow", "button_primary_shadow_hover", "button_primary_shadow_active",
    "button_secondary_shadow", "button_secondary_shadow_hover", "button_secondary_shadow_active",
    "button_cancel_shadow", "button_cancel_shadow_hover", "button_cancel_shadow_active",
)  # fmt: skip
_NO_SHADOW_TWINS = (
    "block_shadow", "input_shadow", "input_shadow_focus", "checkbox_label_shadow",
    "checkbox_label_shadow_hover", "checkbox_label_shadow_active",
)  # fmt: skip
_SIZES = {
    "body_text_size": "14px",
    "body_text_weight": "400",
    "prose_text_size": "14px",
    "prose_header_text_weight": "600",
    "section_header_text_size": "16px",
    "section_header_text_weight": "600",
    "block_title_text_size": "14px",
    "block_title_text_weight": "400",
    "block_label_text_size": "14px",
    "block_label_text_weight": "400",
    "block_info_text_size": "12px",
    "block_info_text_weight": "400",
    "block_padding": "0px",
    "block_radius": "6px",
    "block_border_width": "0px",
    "block_label_border_width": "0px",
    "block_label_radius": "6px",
    "block_title_border_width": "0px",
    "block_title_padding": "0px",
    "panel_border_width": "1px",
    "container_radius": "6px",
    "embed_radius": "6px",
    "layout_gap": "16px",
    "form_gap_width": "16px",
    "input_border_width": "1px",
    "input_padding": "7px 10px",
    "input_radius": "6px",
    "input_text_size": "14px",
    "input_text_weight": "400",
    "table_radius": "6px",
    "checkbox_border_width": "1px",
    "checkbox_border_radius": "4px",
    "checkbox_label_border_width": "1px",
    "checkbox_label_padding": "7px 12px",
    "checkbox_label_text_size": "14px",
    "checkbox_label_text_weight": "400",
    "checkbox_label_gap": "8px",
    "button_border_width": "1px",
    "button_transition": "none",
    "button_transform_hover": "none",
    "button_transform_active": "none",
    "shadow_spread": "0px",
    "error_border_width": "1px",
}


def theme() -> gr.themes.Base:
    """Gradio's theme in our colours and sizes, each colour with its dark twin; no web fonts, no shadows."""
    values: dict[str, str] = dict(_SIZES)
    for name, colour in _COLOURS.items():
        values[name] = LIGHT[colour]
        values[name + "_dark"] = DARK[colour]
    for name in _NO_SHADOW:
        values[name] = "none"
    for name in _NO_SHADOW_TWINS:
        values[name] = values[name + "_dark"] = "none"
    for size in ("large", "medium", "small"):
        values[f"button_{size}_padding"] = "7px 14px"
        values[f"button_{size}_radius"] = "6px"
        values[f"button_{size}_text_size"] = "14px"
        values[f"button_{size}_text_weight"] = "600"
    made = gr.themes.Base(font=UI_FONTS, font_mono=MONO_FONTS)
    return made.set(color_accent=LIGHT["run"], **values)


def css_variables() -> str:
    """The palette as CSS properties `--sb-…`: light by default, dark under `.dark`, which Gradio sets."""

    def block(selector: str, palette: dict[str, str]) -> str:
        lines = "".join(f"  --sb-{name}: {value};\n" for name, value in palette.items())
        return f"{selector} {{\n{lines}}}\n"

    return block(":root, .light", LIGHT) + block(".dark", DARK)


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio (1 to 21) of two `#RRGGBB` colours."""

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
