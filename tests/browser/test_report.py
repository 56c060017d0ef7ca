"""report.html in headless Chromium: errors, requests, sorting, hover, width and contrast."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from test_report_page import HOSTILE, full, search_record
from test_reporting import config_of, write_run

from clrun.reporting import refresh

pytestmark = pytest.mark.slow
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
WIDTHS, SCHEMES = (390, 820, 1400), ("light", "dark")
# Contrast (WCAG 2) of every visible text with what lies behind it; cells of heat maps have their colours as ground.
CONTRAST = """
const rgb = (text) => { const n = (text.match(/[\\d.]+/g) || []).map(Number); return n.length < 4 ? [...n, 1] : n; };
const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const ground = (node) => {
  for (let e = node; e; e = e.parentElement) {
    const color = rgb(getComputedStyle(e).backgroundColor);
    if (color[3] === 1) return color;
  }
  return [255, 255, 255];
};
const poor = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !node.getClientRects().length) continue;
  if (node.closest("script, style, .heat")) continue;
  const style = getComputedStyle(node);
  const ink = rgb(node.namespaceURI.endsWith("svg") ? style.fill : style.color);
  const [a, b] = [light(ink), light(ground(node))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) poor.push([node.tagName, node.className.baseVal ?? node.className, walker.currentNode.data, ratio]);
}
return poor;
"""


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[browser]'")
    service = shutil.which("chromedriver")
    if BROWSER is None or service is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    full(folder)
    write_run(folder / "er-0-1", config=config_of(seed=1), status="failed", error=HOSTILE)
    for seed in (0, 1):
        choices = {"method": HOSTILE, "backbone": "small_cnn", "dataset": "digits"}
        config = config_of("long", seed)
        write_run(
            folder / f"long-{seed}", config=config, choices=choices, settings=("cil", "til"), task_names=[HOSTILE] * 4
        )
    write_run(folder / "closed", config=config_of("simplecil"), logme={"all": -0.25})
    search_record(folder / "search", trials=9)
    refresh(folder)
    return (folder / "report.html").as_uri()


def show(driver, page, width=1400, scheme="light"):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(page)


def test_no_error_and_no_request(driver, page):
    driver.get_log("performance")
    show(driver, page)
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if url != page and not url.startswith("data:")] == []
    assert driver.get_log("browser") == []


def columns(driver, column):
    rows = "document.querySelector('table.sortable').tBodies[0].rows"
    return driver.execute_script(f"return [...{rows}].map(row => row.cells[arguments[0]].innerText)", column)


def test_columns_sort_both_ways(driver, page):
    show(driver, page)
    heads = driver.find_elements("css selector", "table.sortable thead button")
    names = [head.text.split("\n")[0].strip() for head in heads]
    heads[names.index("AOPD")].click()
    down = columns(driver, names.index("AOPD"))
    heads[names.index("AOPD")].click()
    up = columns(driver, names.index("AOPD"))
    numbers = [float(value) for value in down if value != "–"]
    assert len(numbers) >= 2 and numbers == sorted(numbers, reverse=True)
    assert [float(value) for value in up if value != "–"] == numbers[::-1]
    assert [value for value in down if value == "–"] == down[len(numbers) :] and up[-1] == down[-1]
    heads[0].click()
    assert columns(driver, 0) == sorted(columns(driver, 0), key=str.lower)


def test_marks_and_cells_say_their_numbers(driver, page):
    from selenium.webdriver import ActionChains

    show(driver, page)
    tip = driver.find_element("id", "tip")
    assert not tip.is_displayed()
    heat = driver.find_element("css selector", ".in-cil .method .heat")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", heat)
    side = heat.size["width"]
    corner = ActionChains(driver).move_to_element_with_offset(heat, -int(side * 0.4), -int(side * 0.4))
    corner.perform()
    assert tip.is_displayed() and "after learning" in tip.text and tip.text[0].isdigit()
    dot = driver.find_element("css selector", ".in-cil .method circle.dot")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", dot)
    ActionChains(driver).move_to_element(dot).perform()
    assert "mean" in tip.text


def test_settings_switch(driver, page):
    show(driver, page)
    assert not driver.find_element("css selector", ".in-til").is_displayed()
    driver.find_element("css selector", "[data-to=til]").click()
    assert driver.find_element("css selector", ".in-til").is_displayed()
    assert not driver.find_element("css selector", ".in-cil").is_displayed()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_its_width_and_reads_well(driver, page, width, scheme):
    show(driver, page, width, scheme)
    driver.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.execute_script(CONTRAST) == []
    sizes = "return [...document.querySelectorAll('main *')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(driver.execute_script(sizes)) >= 10


def test_nothing_of_a_run_is_executed(driver, page):
    show(driver, page)
    assert driver.execute_script("return document.querySelectorAll('main script, main img').length") == 0


def test_print_has_ink_on_white(driver, page):
    show(driver, page, scheme="dark")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert driver.execute_script(CONTRAST) == []
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
