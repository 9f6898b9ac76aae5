// What the theme leaves to the mouse: wide tables and formulas that scroll, and the button of the menu on narrow screens.
function scrollable() {
  for (const around of document.querySelectorAll(".md-typeset__scrollwrap, .formula")) {
    if (around.scrollWidth > around.clientWidth) {
      around.tabIndex = 0;
      around.setAttribute("role", "region");
      around.setAttribute("aria-label", around.matches(".formula") ? "formula" : "table");
    } else around.removeAttribute("tabindex");
  }
}
addEventListener("load", scrollable); // by then the theme has put its wrappers around the tables
addEventListener("resize", scrollable);

for (const button of document.querySelectorAll(".md-header [for=__drawer]")) {
  button.tabIndex = 0; // the theme presses a label that has the focus on Enter
  button.setAttribute("role", "button");
  button.setAttribute("aria-label", "Menu");
}
