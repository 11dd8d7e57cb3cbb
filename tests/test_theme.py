"""The look: contrast computed from the palette, one source of colours, and what Chromium really paints."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ui import glyphs, theme
from ui.routes import ASSETS

PALETTES = {"light": theme.LIGHT, "dark": theme.DARK}
TEXT = ("text", "help", "run", "warn", "bad", "rest")


def test_contrast_is_computed_as_wcag_says() -> None:
    # worked values of the WCAG definition: black on white, and the grey that is known to just pass 4.5
    assert theme.contrast("#000000", "#FFFFFF") == pytest.approx(21.0)
    assert theme.contrast("#767676", "#FFFFFF") == pytest.approx(4.54, abs=0.01)
    assert theme.contrast("#FFFFFF", "#767676") == theme.contrast("#767676", "#FFFFFF")


@pytest.mark.parametrize("name", PALETTES)
@pytest.mark.parametrize("ink", TEXT)
@pytest.mark.parametrize("ground", ["bg", "surface", "sunken"])
def test_every_ink_reads_on_every_ground(name: str, ink: str, ground: str) -> None:
    assert theme.contrast(PALETTES[name][ink], PALETTES[name][ground]) >= 4.5


@pytest.mark.parametrize("name", PALETTES)
def test_inks_read_on_the_tints_they_stand_on(name: str) -> None:
    palette = PALETTES[name]
    pairs = [("text", "tint-run"), ("text", "tint-warn"), ("text", "tint-bad"), ("text", "tint-label")]
    pairs += [("warn", "tint-warn"), ("bad", "tint-bad"), ("on-run", "run"), ("on-run", "run-hover"), ("on-bad", "bad")]
    assert [pair for pair in pairs if theme.contrast(palette[pair[0]], palette[pair[1]]) < 4.5] == []


@pytest.mark.parametrize("name", PALETTES)
def test_the_border_of_a_control_and_the_focus_ring_can_be_seen(name: str) -> None:
    palette = PALETTES[name]
    for ground in ("bg", "surface"):
        assert theme.contrast(palette["control"], palette[ground]) >= 3.0
        assert theme.contrast(palette["run"], palette[ground]) >= 3.0


@pytest.mark.parametrize(
    ("palette", "ink", "ground", "figure"),
    [
        ("light", "text", "surface", 17.3), ("light", "help", "surface", 8.0), ("light", "run", "surface", 6.0),
        ("light", "warn", "surface", 5.4), ("light", "bad", "surface", 8.2), ("light", "rest", "surface", 6.4),
        ("light", "control", "surface", 3.6), ("light", "on-run", "run", 6.0),
        ("dark", "text", "surface", 14.3), ("dark", "help", "surface", 7.7), ("dark", "run", "surface", 7.8),
        ("dark", "warn", "surface", 10.4), ("dark", "bad", "surface", 7.5), ("dark", "rest", "surface", 6.9),
        ("dark", "control", "surface", 3.8), ("dark", "on-run", "run", 8.6),
    ],
)  # fmt: skip
def test_the_figures_that_the_look_was_agreed_with_still_hold(
    palette: str, ink: str, ground: str, figure: float
) -> None:
    colours = PALETTES[palette]
    assert theme.contrast(colours[ink], colours[ground]) == pytest.approx(figure, abs=0.06)


def test_both_palettes_name_the_same_colours_and_gradio_gets_each_with_its_dark_twin() -> None:
    assert set(theme.LIGHT) == set(theme.DARK)
    made = theme.theme()
    for variable, colour in theme._COLOURS.items():
        assert getattr(made, variable) == theme.LIGHT[colour]
        assert getattr(made, variable + "_dark") == theme.DARK[colour]


def test_the_style_sheets_and_scripts_name_no_colour_of_their_own() -> None:
    named = re.compile(r"#[0-9a-fA-F]{3,8}\b(?![^{;]*\{)|\brgba?\(|\bhsla?\(")
    found = {
        path.name: named.findall(re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S))
        for path in ASSETS.glob("*.css")
    }
    assert {name: colours for name, colours in found.items() if colours} == {}


def test_every_colour_used_in_a_style_sheet_exists() -> None:
    known = {f"--sb-{name}" for name in theme.LIGHT}
    for path in ASSETS.glob("*.css"):
        text = path.read_text(encoding="utf-8")
        own = set(re.findall(r"(--sb-[\w-]+)\s*:", text))
        style = (ASSETS / "style.css").read_text(encoding="utf-8")
        own |= set(re.findall(r"(--sb-[\w-]+)\s*:", style))
        assert set(re.findall(r"var\((--sb-[\w-]+)", text)) - known - own == set(), path.name


@pytest.mark.parametrize("state", glyphs.NAMES)
def test_every_state_has_a_sign_a_word_and_a_tone(state: str) -> None:
    chip = glyphs.chip(state)
    assert f'href="#g-{state}"' in chip and f'id="g-{state}"' in glyphs.SPRITE
    assert glyphs.tone(state) in ("run", "warn", "bad", "rest")
    assert state.replace("-", " ") in re.sub(r"<[^>]+>", "", chip)


def test_the_states_of_runs_all_have_signs() -> None:
    from typing import get_args

    from trainer.states import State

    assert set(get_args(State)) <= set(glyphs.NAMES)


def test_a_word_beside_a_sign_is_escaped() -> None:
    assert "<img" not in glyphs.chip("failed", "<img src=x onerror=alert(1)>")


PAINTED = """
() => {
  const probe = document.createElement("div");
  probe.className = "sb-panel";
  probe.innerHTML = '<span class="sb-help">help</span><button class="sb-button sb-primary">go</button>';
  document.querySelector(".gradio-container main").appendChild(probe);
  const style = (selector) => getComputedStyle(probe.querySelector(selector));
  return {
    help: style(".sb-help").color, ground: getComputedStyle(probe).backgroundColor,
    ink: style(".sb-primary").color, button: style(".sb-primary").backgroundColor,
    page: getComputedStyle(document.querySelector(".gradio-container")).backgroundColor,
    nav: getComputedStyle(document.querySelector(".sb-nav a:not([aria-current])")).color,
    header: getComputedStyle(document.querySelector(".sb-header")).backgroundColor,
    info: getComputedStyle(document.documentElement).getPropertyValue("--block-info-text-color"),
  };
}
"""


def as_hex(colour: str) -> str:
    """`rgb(1, 2, 3)` as `#010203`."""
    return "#" + "".join(f"{int(part):02X}" for part in re.findall(r"\d+", colour)[:3])


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_chromium_paints_has_the_contrast_that_was_promised(app_url: str, page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{app_url}/live")
    page.wait_for_selector(".sb-nav a")
    painted = {key: as_hex(value) for key, value in page.evaluate(PAINTED).items() if value.startswith("rgb")}
    palette = PALETTES[scheme]
    assert painted["page"] == palette["bg"] and painted["ground"] == palette["surface"]
    assert theme.contrast(painted["help"], painted["ground"]) >= 4.5
    assert theme.contrast(painted["nav"], painted["header"]) >= 4.5
    assert theme.contrast(painted["ink"], painted["button"]) >= 4.5


@pytest.mark.browser
def test_a_phone_gets_large_controls_and_no_sideways_scrolling(app_url: str, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844})
    phone = context.new_page()
    for path in ("", "live", "runs", "data", "models"):
        phone.goto(f"{app_url}/{path}")
        phone.wait_for_selector(".sb-nav a")
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390, path
        heights = phone.evaluate(
            "[...document.querySelectorAll('.sb-nav a, .sb-header button')].map(e => e.offsetHeight)"
        )
        assert min(heights) >= 44
    context.close()


@pytest.mark.browser
def test_focus_is_visible_on_every_thing_in_the_header(app_url: str, page: Any) -> None:
    page.goto(f"{app_url}/live")
    page.wait_for_selector(".sb-nav a")
    seen = 0
    for _ in range(9):
        page.keyboard.press("Tab")
        width = page.evaluate("document.activeElement && getComputedStyle(document.activeElement).outlineWidth")
        style = page.evaluate("document.activeElement && getComputedStyle(document.activeElement).outlineStyle")
        seen += width == "2px" and style == "solid"
    assert seen == 9
