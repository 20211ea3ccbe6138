"""The report in a real browser: its figures, no requests, nothing cut off or on top of anything else."""

from __future__ import annotations

import pytest

import fastprune as fp
from browser import chromium, open_page
from compression import OPTIONS, task

pytestmark = [
    pytest.mark.usefixtures("one_thread", "sparse_is_faster"),
    pytest.mark.filterwarnings("ignore:fastprune"),
    pytest.mark.skipif(
        chromium() is None, reason="no Chromium in $FASTPRUNE_CHROMIUM or on the PATH (Debian: chromium)"
    ),
]

FIGURES = """
var keys = ["accuracy", "sparsity", "loss", "parameters", "flops", "bytes", "layer_sparsity"];
Object.fromEntries(keys.map(key =>
  [key, [...document.querySelectorAll(`data[data-key=${key}]`)].map(e => [Number(e.value), e.innerText])]))
"""
OVERLAPS = """
[...document.querySelectorAll("svg")].flatMap(svg => {
  const texts = [...svg.querySelectorAll("text")].map(e => [e.textContent, e.getBoundingClientRect()]);
  const pairs = texts.flatMap((a, i) => texts.slice(i + 1).map(b => [a, b]));
  return pairs.filter(([[, a], [, b]]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2).map(([a, b]) => `${a[0]} | ${b[0]}`); })
"""
OUTSIDE = """
[...document.querySelectorAll("svg text, h1, h2, p, .tiles li, figcaption, img")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width === 0 || box.left < -0.5 || box.right > innerWidth + 0.5;
  }).map(e => e.outerHTML.slice(0, 80))
"""
CONTRASTS = """
var all = "h1, h2, p, th, td, caption, code, small, strong, li span, svg text";
[...document.querySelectorAll(all)].map(e => {
  const light = colour => { const [r, g, b] = colour.match(/[0-9.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126*r + 0.7152*g + 0.0722*b; };
  const style = getComputedStyle(e);
  const ink = light(e instanceof SVGElement ? style.fill : style.color);
  const page = light(getComputedStyle(document.body).backgroundColor);
  return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05); })
"""


@pytest.fixture(scope="module")
def page():
    with open_page(chromium()) as opened:
        yield opened


@pytest.fixture
def report(tmp_path):
    model, train, val = task()
    result = fp.compress(model, train, val, **{**OPTIONS, "rounds": 6, "sparsity": 0.9})
    result.report(tmp_path / "report.html", title="A report with a title that is rather long for a phone")
    return result, tmp_path / "report.html"


def test_a_browser_shows_the_figures_of_the_history(page, report):
    result, path = report
    page.load(path, 1280)
    shown = page.evaluate(FIGURES)
    last = result.history[-1]
    for key in ("accuracy", "loss", "parameters", "flops", "bytes"):
        expected = [result.dense[key], last[key], *(entry[key] for entry in result.history)]
        assert [value for value, _ in shown[key]] == expected
        for value, text in shown[key]:
            digits = float(text.replace(",", "").removesuffix(" %")) / (100 if text.endswith("%") else 1)
            assert digits == pytest.approx(value, abs=6e-5)
    assert [value for value, _ in shown["sparsity"]] == [
        last["sparsity"],
        *(e["sparsity"] for e in result.history),
    ]
    assert [value for value, _ in shown["layer_sparsity"]] == list(last["layers"].values())
    sizes = "[...document.images].map(e => [e.complete, e.naturalHeight, e.naturalWidth])"
    shapes = [list(mask.shape) for mask in result.masks.values() for _ in range(2)]
    assert page.evaluate(sizes) == [[True, *shape] for shape in shapes]


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_or_covered_or_pale(page, report, width, scheme):
    page.load(report[1], width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelectorAll('svg').length") == 2
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(OUTSIDE) == []
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert min(contrasts) >= 4.5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(251, 251, 249)"
    assert dark == (scheme == "dark")


def test_a_printed_page_is_as_wide_as_the_paper_and_light(page, report):
    page.load(report[1], 718, "dark")  # A4 without margins of 1 cm
    page.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert page.evaluate("document.documentElement.scrollWidth") <= 718
        assert page.evaluate(OUTSIDE) == []
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    finally:
        page.send("Emulation.setEmulatedMedia", media="")


def test_the_page_asks_for_nothing_and_reports_no_error(page, report):
    page.requests.clear()
    page.errors.clear()
    page.load(report[1], 1280)
    page.evaluate("document.images.length")
    assert [url for url in page.requests if not url.startswith("data:")] == [report[1].resolve().as_uri()]
    assert page.errors == []
