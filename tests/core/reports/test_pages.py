"""Pages are whole in themselves, show every text as text, run no script but their own, and never lie half written."""

import base64
from pathlib import Path
from xml.etree import ElementTree

import pytest
from jinja2 import ChoiceLoader, DictLoader, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

import latentreward.core.reports.page as pages
from latentreward.core.reports.drawing import figure_uri, picture_uri
from latentreward.core.reports.page import render_page, write_page

TEMPLATES = Path(pages.__file__).parent / "templates"
HOSTILE = (
    "</title><script>document.body.dataset.hacked = 1</script>",
    '"><img src=x onerror="document.body.dataset.hacked = 1">',
    "' autofocus onfocus='document.body.dataset.hacked = 1",
    "{{ 7 * 7 }} {% raw %} <!-- ]]> &amp; &lt;b&gt;",
    "javascript:document.body.dataset.hacked = 1",
    "\u202eright to left\u202c \u0000 \ud800 🎨 " + "x" * 300,
    "<style>body { display: none }</style><base href='https://example.org/'>",
)
EXAMPLE = """{% extends "base.html.j2" %}
{% block style %}.hidden { display: none }{% endblock %}
{% block content %}<h1>{{ title }}</h1>
<p id="counter" data-start="{{ start }}">0</p>
{% for text in texts %}
<figure class="card" title="{{ text }}" data-text='{{ text }}'><figcaption>{{ text }}</figcaption></figure>
{% endfor %}
{% for picture in pictures %}<img class="plot" src="{{ picture }}" alt="{{ title }}">{% endfor %}
{{ markup }}
{% endblock %}
{% block script %}<script>
const counter = document.getElementById("counter");
counter.textContent = Number(counter.dataset.start) + 1;
</script>{% endblock %}
"""


@pytest.fixture(autouse=True)
def _example_template(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = ChoiceLoader([DictLoader({"example.html.j2": EXAMPLE}), PackageLoader("latentreward.core.reports")])
    monkeypatch.setattr(pages, "_environment", pages.environment(loader))


def values(**changes):
    return {"title": "A page", "start": 41, "texts": HOSTILE, "pictures": [], "markup": ""} | changes


def plot() -> Figure:
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([0, 1], [1, 0], label="<script>alert(1)</script>")
    figure.legend()
    return figure


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_becomes_markup(hostile: str) -> None:
    plain = render_page("example", **values(title="t", texts=["t"]))
    html = render_page("example", **values(title=hostile, texts=[hostile]))
    for sign in ("<script", "<img", "<style", "<base", "<!--", "</title"):
        assert html.count(sign) == plain.count(sign)


def test_scripts_and_pictures_from_elsewhere_are_forbidden() -> None:
    html = render_page("example", **values(markup=Markup("<script>1</script>")))
    policy = html.split('content="')[1].split('"')[0]
    assert policy.startswith("default-src 'none'") and policy.count("sha256-") == 1
    assert "img-src data:;" in policy


@pytest.mark.parametrize("template", sorted(TEMPLATES.glob("*.j2")), ids=lambda path: path.name.partition(".")[0])
def test_scripts_of_the_shipped_templates_take_no_values(template: Path) -> None:
    for script in pages.SCRIPT.findall(template.read_text()):
        assert "{{" not in script and "{%" not in script
    assert "<script src" not in template.read_text() and "https://" not in template.read_text()


def test_a_figure_is_the_same_svg_each_time_and_its_texts_stay_texts() -> None:
    uri = figure_uri(plot())
    assert uri == figure_uri(plot())
    svg = ElementTree.fromstring(base64.b64decode(uri.split(",", 1)[1]))
    assert svg.tag.endswith("}svg") and not list(svg.iter("{http://www.w3.org/2000/svg}script"))


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_a_page_shows_texts_and_pictures_and_runs_its_script(browser_page, tmp_path, width, dark) -> None:
    pictures = [picture_uri(Image.new("RGB", (40, 30), "teal")), figure_uri(plot())]
    path = tmp_path / "a page #1.html"
    write_page(path, "example", **values(title=HOSTILE[0], pictures=pictures))
    page = browser_page(path, width=width, dark=dark)
    assert page.locator("h1").inner_text() == page.title() == HOSTILE[0]
    shown = page.locator("figcaption").all_inner_texts()
    assert shown == [text.replace("\0", "").replace("\ud800", "?") for text in HOSTILE]
    assert page.locator("figcaption *").count() == 0 and page.evaluate("document.body.dataset.hacked") is None
    assert page.locator("#counter").inner_text() == "42"
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(21, 25, 29)" if dark else "rgb(255, 255, 255)"
    )


@pytest.mark.browser
@pytest.mark.parametrize(
    "markup",
    [
        "<script>document.body.dataset.hacked = 1</script>",
        '<img src="data:," onerror="document.body.dataset.hacked = 1">',
        '<iframe srcdoc="<script>parent.document.body.dataset.hacked = 1</script>"></iframe>',
        '<script src="data:text/javascript,document.body.dataset.hacked = 1"></script>',
    ],
)
def test_a_script_that_got_into_the_markup_does_not_run(browser_page, tmp_path, markup) -> None:
    write_page(tmp_path / "page.html", "example", **values(texts=[], markup=Markup(markup)))
    page = browser_page(tmp_path / "page.html")
    browser_page.settle()
    assert page.locator("#counter").inner_text() == "42" and page.evaluate("document.body.dataset.hacked") is None
    refused = [problem for problem in browser_page.problems if "Content Security Policy" in problem]
    assert refused, browser_page.problems
    browser_page.problems.clear()
