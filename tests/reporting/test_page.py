"""The report page: what stands first, and what a browser shows on a phone, at a desk, in the dark and on paper."""

import html.parser
import json
import os
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from PIL import Image
from test_tables import START, encoder

from hf_densefeat.evaluation.metrics import Estimate
from hf_densefeat.reporting.comparison import verdict
from hf_densefeat.reporting.page import METHOD, Section, render, render_markdown, report_sections
from hf_densefeat.reporting.plots import plot_projection

CHROMIUM = shutil.which("chromium")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
QUIET += ("--disable-background-networking", "--disable-component-update", "--hide-scrollbars")
NAMES = ("start", "MLM alone", "MLM + dense")
SHAPE = {
    "n": 1607, "d": 64, "condition_floor": 1e-10, "effective_rank": 3.0, "condition_number": 1e10,
    "condition_number_centered": 431.0, "condition_over_median_centered": 31.2, "condition_resolved_centered": 431.0,
    "resolved_rank_centered": 64,
}  # fmt: skip
SUBSPACES = {
    "k": 20,
    "subspace_distance_normalized_centered": 0.1,
    "subspace_distance_half_normalized_centered": 0.2,
    "subspace_noise_floor_normalized_centered": 0.18,
    "subspace_excess_normalized_centered": 0.02,
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The parts of a report on three encoders, with every section and picture, and the page."""
    folder = tmp_path_factory.mktemp("page")
    values = START | {"disease mrr_d_over_4": 0.15, "disease mrr_int8": 0.19, "a question <in other words> mrr": 0.4}
    differences = {key: (0.1, 0.02) for key in values}
    measured = [encoder(name, values, differences if name != "start" else None) for name in NAMES]
    for one in measured:
        one["geometry"] = one["geometry"] | SHAPE
    angles = {name: (np.linspace(0.2, 1.4, 20), np.linspace(0.1, 1.2, 20)) for name in NAMES}
    curve = {1: Estimate(0.5, 0.4, 0.6), 8: Estimate(0.6, 0.5, 0.7), "all": Estimate(0.7, 0.6, 0.8)}
    rng = np.random.default_rng(0)
    z = {name: rng.normal(size=(50, 8)) for name in NAMES}
    wards = rng.integers(0, 2, 50)
    sections = report_sections(
        measured,
        folder,
        adjacent=dict.fromkeys(NAMES, SUBSPACES),
        angles=angles,
        shots={"died": dict.fromkeys(NAMES, curve)},
        projection=plot_projection(z, wards, ["n", "s"], label="ward", path=folder / "projection.png"),
        rows=[
            ["task", "kind", "scored rows", "their patients", "other rows"],
            ["disease", "retrieval", "9", "9", "none"],
        ],
    )
    verdicts = [verdict(one, measured[0]) for one in measured[:0:-1]]
    how = {"facts": "1,607 notes.", "method": METHOD.format(bootstraps="1,000")}
    (folder / "report.html").write_text(render(verdicts, sections, **how))
    return folder, verdicts, sections, how


def test_order_and_markup(report):
    """Verdict, pictures, similarity, geometry, probes; markup is balanced, names are escaped, nothing is from outside."""
    folder, verdicts, _, _ = report
    page = (folder / "report.html").read_text()
    parts = [
        verdicts[0].advice,
        "At a glance",
        "<h2>Similarity<",
        "fewer bits",
        "<h2>Geometry<",
        "<h2>Probes<",
        "Method",
    ]
    places = [page.index(part) for part in parts]
    assert places == sorted(places)
    assert "<in other words>" not in page
    assert "http" not in page
    assert all(part.startswith('"data:image/png;base64,') for part in page.split("src=")[1:])
    stack = []

    class Balance(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                stack.append(tag)

        def handle_endtag(self, tag):
            assert stack.pop() == tag

    Balance().feed(page)
    assert not stack


def test_pictures_say_what_is_seen(report):
    """Each has a text with its numbers; each file is an image that is not blank and not wider than high by much."""
    folder, _, sections, _ = report
    pictures = [picture for section in sections for picture in section.pictures]
    assert [picture.path.stem for picture in pictures] == ["similarity", "spectrum", "angles", "shots", "projection"]
    for picture in pictures:
        assert len(re.findall(r"\d", picture.alt)) > 3
        assert all(name in picture.alt for name in NAMES)
        assert str(folder) not in picture.alt + picture.caption
        pixels = np.asarray(Image.open(picture.path).convert("L"))
        assert pixels.std() > 5
        assert pixels.shape[1] < 1.6 * pixels.shape[0]


def test_markdown_has_the_same_tables(report):
    """Without the pictures, and without sections that have nothing."""
    _, verdicts, sections, how = report
    text = render_markdown(verdicts, [*sections, Section("Nothing", [["head"]])], **how)
    assert text.startswith(f"**{verdicts[0].advice}**")
    assert text.count("\n## ") == 6 + 2
    assert "Nothing" not in text
    assert "0.200 [0.190, 0.210]" in text


SCRIPT = """<script>const shown = [...document.querySelectorAll("td, tbody th")];
const all = [...document.querySelectorAll("p, td, th, figcaption, h1, h2")];
document.title = JSON.stringify({width: innerWidth, cells: shown.length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  cut: shown.filter(c => { const r = c.getBoundingClientRect();
    return r.right > innerWidth + 0.5 || r.left < -0.5 || c.scrollWidth > c.clientWidth + 1; }).map(c => c.textContent),
  smallest: Math.min(...all.map(e => parseFloat(getComputedStyle(e).fontSize))),
  images: [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width, i.alt.length]),
  filter: getComputedStyle(document.images[0]).filter,
  ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor});
</script></body>"""


def browse(tmp_path, *options):
    """Run Chromium; None where there is none, unless it must be there."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("The report is to be opened in a browser, but there is no chromium: apt-get install chromium.")
        warnings.warn("No chromium on this machine: the report was not opened in a browser.", stacklevel=2)
        return None
    command = [CHROMIUM, *QUIET, "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_all_of_it(report, tmp_path, width, scheme):
    """No value is cut off or off the screen, letters are legible, pictures fit, ink stands off the paper."""
    page = (report[0] / "report.html").read_text()
    (tmp_path / "page.html").write_text(page.replace("</body>", SCRIPT))
    outer = tmp_path / "outer.html"
    # A narrow window cannot be asked for in headless mode, a narrow frame can.
    outer.write_text(
        f"<body><iframe id=f src=page.html width={width} height=900></iframe><script>onload = () => "
        "document.body.dataset.found = f.contentDocument.title</script>"
    )
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    found = browse(tmp_path, *dark, "--window-size=1400,1000", "--dump-dom", outer.as_uri())
    if found is None:
        return
    seen = json.loads(html.unescape(found.split('data-found="')[1].split('"')[0]))
    assert seen["width"] == width
    assert seen["overflow"] <= 0
    assert seen["cells"] > 100
    assert seen["cut"] == []
    assert seen["smallest"] >= 12
    assert len(seen["images"]) == 5
    assert all(natural > 500 and shown <= width and alt > 60 for natural, shown, alt in seen["images"])
    assert ("invert" in seen["filter"]) == (scheme == "dark")
    ink, paper = (sum(map(int, seen[name].strip("rgb()").split(","))) for name in ("ink", "paper"))
    assert (paper - ink if scheme == "light" else ink - paper) > 400


@pytest.mark.slow
def test_it_prints(report, tmp_path):
    """A PDF of some pages, also where the screen is dark."""
    target = tmp_path / "report.pdf"
    page = (report[0] / "report.html").as_uri()
    if browse(tmp_path, "--blink-settings=preferredColorScheme=0", f"--print-to-pdf={target}", page) is not None:
        data = target.read_bytes()
        assert data.startswith(b"%PDF")
        assert 2 <= len(re.findall(rb"/Type /Page\b", data)) <= 10
