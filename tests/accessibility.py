"""Checks of a page for people who use a keyboard, see weakly, or read on a phone, as Chromium shows it.

Contrast is that of WCAG 2.2 (1.4.3, level AA): https://www.w3.org/TR/WCAG22/#contrast-minimum. Each check returns one
line per fault, so that a test can compare with an empty list.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # playwright is for the tests marked browser alone
    from playwright.sync_api import Page

PHONE = 360
"""Width of a small phone, in CSS pixels."""

SHARED = """
const CONTROLS = "a[href], button, input:not([type=hidden]), select, textarea, summary, audio[controls], "
  + "video[controls], [tabindex], [contenteditable=true]";
const style = (element, pseudo) => getComputedStyle(element, pseudo);
function name(element) {
  const place = element.id ? "#" + element.id : [...element.classList].slice(0, 2).map((one) => "." + one).join("");
  const text = (element.innerText ?? element.textContent ?? "").trim().replace(/\\s+/g, " ").slice(0, 40);
  return `<${element.localName}${place}> ${JSON.stringify(text)}`;
}
function seen(element) {
  const box = element.getBoundingClientRect();
  const hidden = !element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  return box.width > 1 && box.height > 1 && !hidden;
}
function reachable(element) {
  return element.matches(CONTROLS) && !element.disabled && element.tabIndex >= 0;
}
"""

CONTRAST = """() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true }), known = new Map();
  function rgba(colour) {
    if (!known.has(colour)) {
      pen.clearRect(0, 0, 1, 1);
      pen.fillStyle = colour;
      pen.fillRect(0, 0, 1, 1);
      const [red, green, blue, alpha] = pen.getImageData(0, 0, 1, 1).data;
      known.set(colour, [red, green, blue, alpha / 255]);
    }
    return known.get(colour);
  }
  const over = (front, back) => front.slice(0, 3).map((value, at) => value * front[3] + back[at] * (1 - front[3]));
  const scheme = style(document.documentElement).colorScheme;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches && /dark/.test(scheme);
  const page = dark ? [18, 18, 18] : [255, 255, 255];
  function ground(element) {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const { backgroundColor, backgroundImage } = style(at);
      if (backgroundImage !== "none") return null;
      const layer = rgba(backgroundColor);
      layers.unshift(layer);
      if (layer[3] === 1) break;
    }
    return layers.reduce((back, front) => over(front, back), page);
  }
  function luminance(colour) {
    const [red, green, blue] = colour.map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  }
  function opacity(element) {
    let product = 1;
    for (let at = element; at; at = at.parentElement) product *= Number(style(at).opacity);
    return product;
  }
  const faults = new Set();
  function check(element, pseudo, what) {
    const back = ground(element), { color, fontSize, fontWeight } = style(element, pseudo);
    if (!back) return;
    const ink = [...rgba(color)];
    ink[3] *= opacity(element) * (pseudo ? Number(style(element, pseudo).opacity) : 1);
    const [light, dim] = [luminance(over(ink, back)), luminance(back)].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dim + 0.05), size = parseFloat(fontSize);
    const least = size >= 24 || (size >= 18.66 && Number(fontWeight) >= 700) ? 3 : 4.5;
    if (ratio < least) faults.add(`${what} of ${name(element)}: contrast ${ratio.toFixed(2)}, needs ${least}`);
  }
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    const left = element.closest("script, style, [disabled], option");
    if (texts.currentNode.data.trim() && !left && seen(element)) check(element, null, "text");
  }
  const drawn = ["checkbox", "radio", "range", "file", "hidden"];
  for (const field of document.querySelectorAll("input, select, textarea")) {
    if (!seen(field) || field.disabled || drawn.includes(field.type)) continue;
    check(field, null, "value");
    if (field.placeholder) check(field, "::placeholder", "placeholder");
  }
  return [...faults];
}"""

WIDTH = """() => {
  const faults = [], wide = innerWidth, all = document.documentElement.scrollWidth;
  if (all > wide) faults.push(`the page is ${all} px wide`);
  const scrolls = (element) => /auto|scroll/.test(style(element).overflowX);
  for (const element of document.body.querySelectorAll("*")) {
    if (!seen(element)) continue;
    if (scrolls(element) && element.scrollWidth > element.clientWidth + 1) {
      const kinds = "table, pre, code, math, .formula";
      if (!element.closest(kinds) && !element.querySelector(kinds)) faults.push(`${name(element)} scrolls, no table`);
      const stops = [element, ...element.querySelectorAll(CONTROLS)];
      if (!stops.some(reachable)) faults.push(`${name(element)} cannot be scrolled by keyboard: no tabindex`);
    }
    const box = element.getBoundingClientRect();
    if (box.right <= wide + 1 || box.left >= wide || style(element).position === "fixed") continue;
    let around = element.parentElement;
    while (around && !scrolls(around)) around = around.parentElement;
    if (!around) faults.push(`${name(element)} reaches ${Math.round(box.right)} px`);
  }
  return faults;
}"""

EXPECTED_STOPS = """() => {
  const stops = [...document.querySelectorAll(CONTROLS)].filter((element) => {
    if (!reachable(element) || !seen(element) || element.closest("[inert]")) return false;
    const group = element.type === "radio" && element.name;  // the arrow keys move among radio buttons of one name
    const first = group && (document.querySelector(`input[name="${CSS.escape(group)}"]:checked`) ?? element);
    return !group || first === element;
  });
  stops.forEach((element, place) => (element.dataset.stop = place));
  return stops.map((element) => [name(element), element.tabIndex]);
}"""

FOCUSED = """() => {
  const element = document.activeElement;
  if (!element || element === document.body) return null;
  const marks = ["outline", "boxShadow", "border", "background", "color", "textDecoration", "transform", "opacity"];
  const look = (one) => JSON.stringify(marks.map((key) => style(one)[key]));
  const around = [element.parentElement, element.nextElementSibling];  // a hidden radio button is drawn by its sibling
  const parts = [element, ...around, ...(element.labels ?? [])].filter(Boolean);
  const { outlineStyle, outlineWidth } = style(element);
  let visible = outlineStyle !== "none" && parseFloat(outlineWidth) > 0;
  if (!visible) {
    const still = document.createElement("style");
    still.textContent = "* { transition: none !important }";
    document.head.append(still);
    const focused = parts.map(look);
    element.blur();
    visible = parts.map(look).some((text, place) => text !== focused[place]);
    element.focus({ preventScroll: true });
    still.remove();
  }
  const box = element.getBoundingClientRect();
  const inside = box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth;
  return { stop: element.dataset.stop ?? null, name: name(element), visible, inside };
}"""

MOUSE_ONLY = """() => [...document.body.querySelectorAll("*")].filter((element) => {
  if (!seen(element)) return false;
  const pointed = style(element).cursor === "pointer" && style(element.parentElement).cursor !== "pointer";
  return pointed || element.onclick || element.onmousedown || element.onmouseup || element.onpointerdown;
}).filter((element) => {
  const around = element.closest(CONTROLS), label = element.closest("label");
  const inner = [...element.querySelectorAll(CONTROLS)];
  return !(around && reachable(around)) && !(label?.control && reachable(label.control)) && !inner.some(reachable)
    && !element.closest("label[for]");
}).map((element) => `${name(element)} takes the mouse only`)"""


def contrast_faults(page: "Page") -> list[str]:
    """Texts, values of fields and placeholders below 4.5:1; 3:1 from 24 px, or 18.66 px in bold, on.

    Texts on a gradient or a picture are left out.
    """
    return run(page, CONTRAST)


def width_faults(page: "Page") -> list[str]:
    """What is wider than the window: allowed in tables, code and formulas that scroll, also by keyboard."""
    return run(page, WIDTH)


def keyboard_faults(page: "Page", most: int = 400) -> list[str]:
    """Controls that Tab does not reach, reaches out of order, or does not show; and what only a mouse can use.

    Args:
        page: Page, just opened: nothing has the focus.
        most: Presses of Tab before the page counts as endless.
    """
    found: list[str] = run(page, MOUSE_ONLY)
    stops = run(page, EXPECTED_STOPS)
    found += [f"{name} has tabindex {index}, before all others" for name, index in stops if index > 0]
    order: list[int] = []
    for _ in range(most):
        page.keyboard.press("Tab")
        focused = run(page, FOCUSED)
        if focused is None or (order and focused["stop"] == str(order[0])):
            break
        if not focused["visible"]:
            found.append(f"{focused['name']} looks the same with the focus")
        if not focused["inside"]:
            found.append(f"{focused['name']} has the focus out of sight")
        if focused["stop"] is not None:
            order.append(int(focused["stop"]))
    else:
        found.append(f"{most} presses of Tab did not come to an end")
    found += [f"Tab does not reach {name}" for place, (name, _) in enumerate(stops) if place not in order]
    if order != sorted(order):
        place = next(at for at, (one, other) in enumerate(pairwise(order)) if one > other)
        found.append(f"Tab goes from {stops[order[place]][0]} back to {stops[order[place + 1]][0]}")
    return found


def faults(page: "Page") -> list[str]:
    """Faults of all kinds; the page was just opened."""
    return contrast_faults(page) + width_faults(page) + keyboard_faults(page)


def run(page: "Page", script: str) -> Any:
    """Result of a function of the page that uses what the checks share."""
    return page.evaluate(f"() => {{ {SHARED} return ({script})(); }}")
