"""Chromium, and what it finds on a page: errors, requests, text that is hard to read, keyboard that does not work."""

import re
import shutil
from contextlib import contextmanager

from tests.helpers.shared import require

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# For each element with text of its own: the text, the colour, and the colours behind it, nearest first
TEXTS = """
() => [...document.querySelectorAll('body *')].flatMap(e => {
  const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join('');
  if (!text || !e.checkVisibility() || ['TITLE', 'DESC', 'STYLE'].includes(e.tagName.toUpperCase())) return [];
  const style = getComputedStyle(e), behind = [];
  for (let p = e; p; p = p.parentElement) behind.push(getComputedStyle(p).backgroundColor);
  return [[text.slice(0, 30), e.ownerSVGElement ? style.fill : style.color, behind]];
})
"""

FOCUSED = """
() => {
  const e = document.activeElement, style = getComputedStyle(e);
  const isVisible = style.outlineStyle != 'none' && parseFloat(style.outlineWidth) >= 2;
  return [e.tagName, e.getAttribute('aria-label') || e.textContent.trim(), isVisible];
}
"""


@contextmanager
def start_chromium():
    require(CHROMIUM is not None, "Chromium is not installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, file, scheme="light", width=1200):
    """The page of a file. No error is logged, and nothing is asked of the network."""
    page = browser.new_page(color_scheme=scheme, viewport=dict(width=width, height=800))
    faults, asked = [], []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(dialog.message) or dialog.dismiss())
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert not faults and all(url.startswith("data:") or url == file.as_uri() for url in asked)


def rgba(colour):
    """`rgb(1, 2, 3)`, `rgba(1, 2, 3, 0.5)` or `color(srgb 0.1 0.2 0.3)` -> red, green, blue, opacity, 0..1."""
    numbers = [float(n) for n in re.findall(r"[\d.]+(?:e-?\d+)?", colour)]
    if colour.startswith("rgb"):
        numbers[:3] = [n / 255 for n in numbers[:3]]
    return (*numbers, 1.0)[:4]


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """As WCAG 2 defines it, 1 to 21, for red, green, blue in 0..1."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def contrasts(page):
    """The contrast of every text of the page with what is behind it: (contrast, text), the worst first."""
    found = []
    for text, colour, behind in page.evaluate(TEXTS):
        ground = next(rgba(c) for c in behind if rgba(c)[3] == 1)
        found.append((contrast(rgba(colour), ground), text))
    return sorted(found)


def focused_by_tab(page, most=200):
    """What the tab key reaches: (tag, name, whether its focus is visible)."""
    reached = []
    for _ in range(most):
        page.keyboard.press("Tab")
        one = page.evaluate(FOCUSED)
        if one[0] == "BODY":
            break
        reached.append(tuple(one))
    return reached
