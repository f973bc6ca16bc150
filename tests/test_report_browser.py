"""The report in a real browser, at a phone's width and at a desk's: nothing sticks out, everything is there, nothing is loaded.

Needs Chromium or Chrome; the environment variable CHROMIUM may name it.
"""

import base64
import html
import json
import os
import re
import shutil
import struct
import subprocess

import pytest

from sparselottery import analysis, report
from sparselottery.experiments import analyses, hparams, runs

BROWSER = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here (set CHROMIUM to its path)")

WIDTHS = (390, 1280)
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
# Each page in a frame of each width (Chromium has no window narrower than 500); the probe reads what became of it.
HARNESS = """<!doctype html><meta charset="utf-8"><style>body { margin: 0 } iframe { border: 0 }</style><script>
const pages = PAGES, widths = WIDTHS, found = {};
function colours(image) {  // of a picture that was really decoded
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  canvas.width = canvas.height = 64;
  try { context.drawImage(image, 0, 0, 64, 64); } catch (error) { return 0; }
  return new Set(new Uint32Array(context.getImageData(0, 0, 64, 64).data.buffer)).size;
}
function probe(frame) {
  const page = frame.contentDocument, wide = frame.contentWindow.innerWidth, boxes = [...page.querySelectorAll(".scroll")];
  const outside = [...page.body.querySelectorAll("*")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.right > wide + 0.5 || box.left < -0.5) && !e.closest("table");
  });
  return {
    width: wide, scroll: page.documentElement.scrollWidth, outside: outside.map(e => e.outerHTML.slice(0, 80)),
    images: [...page.images].map(i => ({natural: i.naturalWidth, shown: i.clientWidth, alt: i.alt.length,
      colours: i.src.startsWith("data:") ? colours(i) : 0})),
    boxes: boxes.map(b => ({inner: b.scrollWidth, outer: b.clientWidth, how: getComputedStyle(b).overflowX})),
    small: Math.min(...[...page.querySelectorAll("td, p, pre")].map(e => parseFloat(getComputedStyle(e).fontSize))),
    loaded: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    anchors: [...page.querySelectorAll("a")].every(a => page.getElementById(a.getAttribute("href").slice(1))),
    pairs: [...page.querySelectorAll(".pair")].map(p => getComputedStyle(p).gridTemplateColumns.split(" ").length),
    sections: page.querySelectorAll("section").length, title: page.title,
  };
}
window.onload = async () => {
  for (const width of widths) {
    found[width] = {};
    for (const [name, text] of Object.entries(pages)) {
      const frame = document.createElement("iframe");
      frame.width = width;
      frame.height = 900;
      await new Promise(done => { frame.onload = done; frame.srcdoc = text; document.body.append(frame); });
      found[width][name] = probe(frame);
      frame.remove();
    }
  }
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
};
</script><body></body>"""


def browse(folder, *options):
    quiet = (
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--hide-scrollbars",
        "--disable-background-networking",
    )
    options = [*quiet, "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *options]
    command = [BROWSER, "--headless", "--no-sandbox", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=True)


def statistic(mean):
    return {"mean": mean, "ci95": 0.01, "values": [mean - 0.01, mean + 0.01]}


def other_runs(folder):
    """Folders as other commands leave them: a result of their own shape."""
    results = {
        "early-bird": {"drawn_epoch": 4, "epochs": 20, "distances": [[0.0, 0.5], [0.5, 0.0]],
                       "test_accuracy": statistic(0.95), "cost": {"search": 4.0, "dense": 20.0}},
        "mutual-information": {"methods": {m: {"test_accuracy": statistic(0.9)} for m in ("mutual-information", "random")},
                               "overlap": {"random": 0.1}},
        "supermask": {"densities": [0.5, 0.1], "test_accuracy": statistic(0.8)},
    }  # fmt: skip
    for driver, result in results.items():
        run = folder / driver
        run.mkdir()
        (run / "result.json").write_text(json.dumps({"run": str(run), **result}))
        config = {"driver": driver, "hparams": {"data": "digits", "model": "lenet-300-100", "seeds": 2}}
        (run / "config.json").write_text(json.dumps(config))
        yield run


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """name -> report.html: a run with every analysis, one-shot, runs of other commands, and one page that is wrong."""
    folder = tmp_path_factory.mktemp("runs")
    small = {"seeds": 2, "budget": "20it", "evaluate_every": 10}
    run = runs.run_imp(
        hparams.Imp(rounds=3, rate=0.5, controls=("reinit", "random-mask", "shuffle"), **small), folder, workers=1
    )
    analyses.analyze(run.run, settings=analyses.Settings(resolution=5, examples=20))
    once = runs.run_one_shot(hparams.OneShot(densities=(0.5,), controls=(), **small), folder, workers=1)
    found = {path.name.split("-")[0]: report.write_report(path).read_text() for path in (run.run, once.run)}
    found |= {path.name: report.write_report(path).read_text() for path in other_runs(folder)}
    figures = len(list((run.run / analysis.FOLDER).glob("*.png")))
    found["wrong"] = (
        '<!doctype html><title>w</title><p style="width: 3000px; font-size: 5px">wide</p><a href="#nowhere">a</a>'
        f'<img src="data:image/png;base64,{PIXEL[:40]}"><img src="http://127.0.0.1:9/x.png"><script>console.error("heard")</script>'
    )
    assert figures == 9
    return found, figures, run.run


@pytest.fixture(scope="module")
def browsed(pages, tmp_path_factory):
    """What the browser found on every page at each width, and what it told on its console."""
    folder = tmp_path_factory.mktemp("browser")
    text = HARNESS.replace("WIDTHS", json.dumps(WIDTHS)).replace("PAGES", json.dumps(pages[0]).replace("</", "<\\/"))
    (folder / "harness.html").write_text(text)
    done = browse(
        folder,
        "--window-size=1400,900",
        "--virtual-time-budget=20000",
        "--dump-dom",
        f"file://{folder / 'harness.html'}",
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert match, f"the probe did not come to its end: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(match.group(1))), console


@pytest.fixture(params=WIDTHS)
def seen(browsed, request):
    found, console = browsed
    return request.param, found[str(request.param)], console


def good(found):
    return {name: page for name, page in found.items() if name != "wrong"}


def test_nothing_is_wider_than_the_window(seen):
    width, found, _ = seen
    assert len(good(found)) == 5
    for name, page in good(found).items():
        assert page["width"] == width, name
        assert page["scroll"] <= width and page["outside"] == [], (name, page["outside"])
        assert page["small"] >= 13, "letters of 13 pixels and more"
        assert all(box["how"] == "auto" and box["outer"] <= width for box in page["boxes"]), name
    if width == 390:
        assert any(b["inner"] > b["outer"] for b in found["imp"]["boxes"]), "wide tables scroll in their own box"


def test_every_picture_decodes_and_is_large_enough(seen, pages):
    width, found, _ = seen
    assert len(found["imp"]["images"]) == 3 + pages[1] and len(found["one"]["images"]) == 3
    for page in good(found).values():
        for image in page["images"]:
            assert image["natural"] > 0 and image["alt"] > 20 and image["colours"] > 10
            assert image["shown"] >= (0.9 * width if width == 390 else 400)


def test_tables_stand_beside_their_plots_where_there_is_room(seen):
    width, found, _ = seen
    assert set(found["imp"]["pairs"]) == {1 if width == 390 else 2}
    assert found["imp"]["sections"] == len(found["imp"]["pairs"]) + 1  # and "made by"


def test_nothing_is_loaded_and_the_console_is_silent(seen):
    _, found, console = seen
    for name, page in good(found).items():
        assert page["loaded"] == [], name
        assert page["anchors"], name
    assert [line for line in console if "heard" not in line and "127.0.0.1" not in line and "ERR_" not in line] == []


def test_the_probe_sees_what_is_wrong(seen):
    width, found, console = seen
    wrong = found["wrong"]
    assert wrong["scroll"] > width and wrong["outside"] and wrong["small"] == 5 and not wrong["anchors"]
    assert [image["colours"] for image in wrong["images"]] == [0, 0]
    assert wrong["loaded"] == ["http://127.0.0.1:9/x.png"]
    assert any("heard" in line for line in console)


def test_a_screenshot_on_a_phone_shows_the_page(pages, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "phone.png"
    page = pages[2] / "report.html"
    browse(tmp_path, "--window-size=390,3000", f"--screenshot={path}", f"file://{page}")
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (390, 3000)
    pixels = imread(path)[:, :, :3]
    dark = (pixels.max(2) < 0.5).mean()
    blue = ((pixels[:, :, 2] > 0.6) & (pixels[:, :, 0] < 0.2)).mean()  # the ticket's curve
    assert 0.01 < dark < 0.3 and blue > 1e-4
    assert base64.b64decode(PIXEL).startswith(b"\x89PNG")
