"""The report in a real browser, opened from disk."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

UNNAMED = """
  const named = (one) => one.labels?.length || one.ariaLabel || one.textContent.trim();
  const controls = [...document.querySelectorAll("input, select, button, a[href]")];
  return controls.filter((one) => one.checkVisibility() && !named(one)).map((one) => one.outerHTML);
"""

LEVELS = """
  const headings = [...document.querySelectorAll("h1, h2, h3")].filter((one) => one.checkVisibility());
  return headings.map((one) => Number(one.tagName[1]));
"""

CONTRAST = """
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const exempt = ":disabled, [aria-disabled=true], option, noscript, .skip";
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const poor = new Set();
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !one.checkVisibility() || one.matches(exempt)) continue;
    const [a, b] = [light(rgb(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.add(`${one.tagName}.${one.className}: ${ratio.toFixed(2)}`);
  }
  return [...poor];
"""


def start(profile: Path, **preferences: int) -> Chrome:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = browser
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1400,1000"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.add_experimental_option("prefs", preferences)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return Chrome(options=options, service=Service(driver))


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chrome = start(tmp_path_factory.mktemp("chromium"))
    chrome.get("about:blank")  # away from the browser's own start page
    chrome.get_log("performance")
    yield chrome
    chrome.quit()


def requests(page: Chrome) -> list[str]:
    """What the browser asked for since this was last asked."""
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.fixture
def page(chrome: Chrome) -> Iterator[Chrome]:
    """The browser; afterwards: nothing on the console, no request but to files."""
    requests(chrome)
    yield chrome
    assert chrome.get_log("browser") == []
    found = requests(chrome)
    assert found and {url.split(":")[0] for url in found} <= {"file", "data", "about"}


def wait(page: Chrome, condition: str) -> None:
    WebDriverWait(page, 20).until(lambda driver: driver.execute_script(f"return {condition}"))


def status(page: Chrome, text: str) -> None:
    """Waits until the page says so."""
    wait(page, f"document.querySelector('#status').textContent === {json.dumps(text)}")


def cards(page: Chrome) -> list[int]:
    return page.execute_script(
        "return [...document.querySelectorAll('.cards .card')].map((card) => Number(card.ariaLabel.slice(5)))"
    )


def pixel(image: Image.Image, x: float, y: float) -> tuple[int, ...]:
    """The colour at a place."""
    found = image.getpixel((int(x), int(y)))
    assert isinstance(found, tuple)
    return found


def choose(page: Chrome, name: str, value: str) -> None:
    Select(page.find_element(By.NAME, name)).select_by_value(value)


def described(site: Path) -> str:
    """The page of the layer that has descriptions."""
    return next(
        p.with_name("index.html") for p in site.glob("layers/*/*/units.js") if "zebra" in p.read_text()
    ).as_uri()


def fresh(page: Chrome, address: str) -> None:
    """Opens a page as if for the first time: another fragment alone would not load it anew."""
    page.get("about:blank")
    page.get(address)


def test_overview_search_finds_a_unit_and_leads_to_its_page(page: Chrome, site: Path) -> None:
    fresh(page, (site / "index.html").as_uri())
    page.find_element(By.NAME, "words").send_keys("ZEBRA str")
    status(page, "1 unit found")
    result = page.find_element(By.CSS_SELECTOR, "#results a")
    assert "zebra stripes" in result.text and "unit 71" in result.text
    result.click()
    wait(page, "document.querySelector('#unit h2')")
    assert page.find_element(By.CSS_SELECTOR, "#unit h2").text.startswith("zebra stripes")
    wait(page, "document.querySelector('#unit img').naturalWidth === 20")
    page.back()
    status(page, "1 unit found")  # the search is part of the address
    assert page.find_element(By.NAME, "words").get_attribute("value") == "ZEBRA str"


def test_overview_search_takes_a_plural_for_its_singular(page: Chrome, site: Path) -> None:
    fresh(page, (site / "index.html").as_uri())
    page.find_element(By.NAME, "words").send_keys("stripes zebras")
    status(page, "1 unit found")
    page.find_element(By.NAME, "words").send_keys("x")  # no such plural, and no word that begins so
    status(page, "0 units found")


def test_overview_search_filters_by_layer_sorts_and_pages(page: Chrome, site: Path) -> None:
    fresh(page, (site / "index.html").as_uri())
    Select(page.find_element(By.NAME, "layer")).select_by_visible_text("Conv1")
    status(page, "91 units found")
    choose(page, "sort", "score milan")
    wait(page, "document.querySelector('#results li').textContent.includes('unit 17 · milan: score −11')")
    assert len(page.find_elements(By.CSS_SELECTOR, "#results li")) == 40
    page.find_element(By.CSS_SELECTOR, "#results .pager button:last-child").click()
    wait(page, "document.querySelector('#results .pager input').value === '2'")
    page.find_element(By.CSS_SELECTOR, "#results .pager button:last-child").click()
    wait(page, "document.querySelectorAll('#results li').length === 11")
    page.back()
    wait(page, "document.querySelectorAll('#results li').length === 40")
    page.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
    wait(page, "document.querySelector('#results').hidden")


def test_overview_search_shows_hostile_text_as_text(page: Chrome, site: Path, hostile: str) -> None:
    fresh(page, (site / "index.html").as_uri())
    page.find_element(By.NAME, "words").send_keys("<script>document")
    status(page, "1 unit found")
    shown = page.execute_script("return document.querySelector('#results li span:last-child').firstChild.textContent")
    assert shown == hostile
    assert page.title == "What every unit responds to"


def test_layer_shows_pages_of_cards(page: Chrome, site: Path) -> None:
    fresh(page, described(site))
    status(page, "91 units")
    assert cards(page) == list(range(40))
    read = {Path(urlsplit(url).path).name for url in requests(page) if "/cards/" in url}
    assert read == {"0.js"}  # what is not looked at is not read
    number = page.find_element(By.CSS_SELECTOR, ".pager input")
    number.clear()
    number.send_keys("9", Keys.ENTER)  # more than there are
    wait(page, "document.querySelectorAll('.cards .card').length === 11")
    assert cards(page) == list(range(80, 91)) and page.current_url.endswith("#page=3")
    assert "No exemplars" in page.find_elements(By.CSS_SELECTOR, ".card")[-1].text
    page.find_element(By.CSS_SELECTOR, ".pager [data-step='-1']").click()
    wait(page, "document.querySelectorAll('.cards .card').length === 40")
    assert cards(page) == list(range(40, 80))


def test_layer_sorts_by_any_figure_over_all_pages(page: Chrome, site: Path) -> None:
    fresh(page, described(site))
    order = sorted(range(89), key=lambda unit: -((unit * 37) % 90))
    choose(page, "sort", "score milan")
    wait(page, f"document.querySelector('.card').ariaLabel === 'unit {order[0]}'")
    assert cards(page) == order[:40]
    choose(page, "sort", "judge milan simulation")
    wait(page, "document.querySelector('.card').ariaLabel === 'unit 88'")
    assert "milan: simulation (judge) 0.88" in re.sub(r"\s+", " ", page.find_element(By.CSS_SELECTOR, ".card").text)
    choose(page, "order", "up")
    wait(page, "document.querySelector('.card').ariaLabel === 'unit 0'")
    page.find_element(By.CSS_SELECTOR, ".pager input").send_keys(Keys.BACKSPACE, "3", Keys.ENTER)
    wait(page, "document.querySelectorAll('.cards .card').length === 11")
    assert cards(page)[-3:] == [5, 89, 90]  # those without the figure come last


def test_layer_filters_by_words_labeler_and_score(page: Chrome, site: Path) -> None:
    fresh(page, described(site))
    page.find_element(By.NAME, "words").send_keys("red")
    status(page, "30 of 91 units")
    choose(page, "column", "judge milan simulation")
    page.find_element(By.NAME, "low").send_keys("0.5")
    page.find_element(By.NAME, "high").send_keys("0.6")
    status(page, "4 of 91 units")
    assert cards(page) == [51, 54, 57, 60]
    assert "simulation" in page.find_element(By.CSS_SELECTOR, "[name=column] option:checked").text
    choose(page, "by", "milan-pdE")
    wait(page, "document.querySelector('.card .other .who').textContent === 'milan'")
    address = page.current_url
    fresh(page, address)  # whoever opens the address sees the same
    status(page, "4 of 91 units")
    assert page.find_element(By.NAME, "high").get_attribute("value") == "0.6"


def test_layer_filters_and_sorts_by_verdict(page: Chrome, site: Path) -> None:
    fresh(page, described(site))
    choose(page, "verdict", "3 judge milan verdict")
    status(page, "23 of 91 units")
    assert cards(page)[:3] == [0, 4, 8]
    facts = page.find_element(By.CSS_SELECTOR, ".card .facts").text.replace("\n", " ")
    assert "verdict (judge) supported" in facts
    choose(page, "verdict", "0 judge milan verdict")
    status(page, "22 of 91 units")
    fresh(page, page.current_url)  # whoever opens the address sees the same
    status(page, "22 of 91 units")
    choose(page, "verdict", "")
    choose(page, "sort", "judge milan verdict")
    wait(page, "document.querySelectorAll('.cards .card').length === 40")
    assert cards(page)[:2] == [0, 4] and cards(page)[23] == 1  # partly supported ones follow


def test_unit_page_shows_verdicts_with_their_reason(page: Chrome, site: Path) -> None:
    fresh(page, f"{described(site)}#unit-9")
    wait(page, "document.querySelectorAll('#unit .name').length === 3")
    rows = [row.text for row in page.find_elements(By.CSS_SELECTOR, "#unit tr")]
    assert "partly milan judge 0.09 0.81 supported unsupported" in rows
    assert "milan, judge: by hand." in page.find_element(By.ID, "unit").text


def test_layer_filter_shows_hostile_text_as_text(page: Chrome, site: Path, hostile: str) -> None:
    fresh(page, described(site))
    title = page.title
    page.find_element(By.NAME, "words").send_keys("quoted")
    status(page, "1 of 91 units")
    text = "return document.querySelector(arguments[0]).textContent"
    assert page.execute_script(text, ".card .description") == hostile
    assert page.execute_script(text, ".card .annotations li") == hostile
    assert page.title == title


def test_masks_darken_outline_or_go(page: Chrome, site: Path) -> None:
    fresh(page, described(site))
    wait(page, "document.querySelector('.card .mask')?.naturalHeight === 720")
    picture = page.find_elements(By.CSS_SELECTOR, ".card:nth-child(10) .picture")[1]  # rank 1: the top row is outside
    wait(page, "[...document.querySelectorAll('.card:nth-child(10) img')].slice(0, 4).every((i) => i.naturalWidth)")

    def reds() -> tuple[Image.Image, set[bool]]:
        shown = Image.open(io.BytesIO(picture.screenshot_as_png)).convert("RGB")
        side = shown.width / 20
        inside = {
            abs(pixel(shown, (x + 0.5) * side, (y + 0.5) * side)[0] - (200 if y >= 1 and x <= 9 else 50)) <= 8
            for y in range(20)
            for x in range(20)
        }
        return shown, inside

    assert reds()[1] == {True}
    page.find_element(By.CSS_SELECTOR, "[value=outline]").click()
    shown, darkened = reds()
    colours = [pixel(shown, x, shown.height // 2) for x in range(shown.width)]
    yellow = [x for x, colour in enumerate(colours) if colour[0] > 220 and colour[1] > 200 and colour[2] < 90]
    edge = shown.width / 2  # ten of twenty columns are inside
    assert darkened != {True} and yellow and all(edge - 4 <= x <= edge for x in yellow)
    assert abs(colours[-5][0] - 200) <= 8 and abs(colours[5][0] - 200) <= 8  # the image itself, on both sides
    page.find_element(By.CSS_SELECTOR, "[value=plain]").click()
    shown, _ = reds()
    assert all(abs(pixel(shown, x, shown.height // 2)[0] - 200) <= 8 for x in range(4, shown.width - 4))
    page.get((site / "index.html").as_uri())
    assert page.find_element(By.CSS_SELECTOR, "[value=plain]").is_selected()  # the choice holds for the next page
    page.find_element(By.CSS_SELECTOR, "[value=darken]").click()


def test_unit_page_shows_all_that_is_known(page: Chrome, site: Path, hostile: str) -> None:
    fresh(page, f"{described(site)}#unit-7")
    wait(page, "document.querySelectorAll('#unit .name').length === 3")
    text = page.execute_script("return document.querySelector('#unit').textContent")
    assert text.count(hostile) >= 6  # headline, labelers, candidates, annotation, classes of images
    assert page.find_element(By.CSS_SELECTOR, "#unit .facts").text.replace("\n", " ").startswith("wPMI −")
    rows = [row.text for row in page.find_elements(By.CSS_SELECTOR, "#unit tr")]
    assert "labeler description its own score" in rows and "runner-up −1 −5 −20" in rows
    assert "simulation milan judge 0.07 −0.25 – 1,000" in rows and "clarity exemplars judge 0.5 – – –" in rows
    assert "wPMI, λ = 0.2" in text
    near = [link.text for link in page.find_elements(By.CSS_SELECTOR, "#unit .units a")]
    assert "unit 6 · cosine 0.9976" in near[0] or "unit 8 · cosine 0.9976" in near[0]
    assert page.title.startswith("unit 7 · ") and not page.find_element(By.CSS_SELECTOR, "#list").is_displayed()
    assert page.execute_script("return document.activeElement.tagName") == "H2"


def test_unit_page_turns_in_the_order_of_the_list_and_goes_back(page: Chrome, site: Path) -> None:
    fresh(page, described(site))
    page.find_element(By.NAME, "words").send_keys("green")
    choose(page, "sort", "activation")
    wait(page, "document.querySelector('.card')?.ariaLabel === 'unit 88'")
    page.find_element(By.CSS_SELECTOR, ".card h2 a").click()
    wait(page, "document.querySelector('#unit h2')?.textContent.includes('unit 88')")
    assert "1 of 29 units" in page.find_element(By.CSS_SELECTOR, ".turn").text
    body = page.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.ARROW_RIGHT)
    wait(page, "document.querySelector('#unit h2').textContent.includes('unit 85')")
    body.send_keys(Keys.ARROW_LEFT)
    wait(page, "document.querySelector('#unit h2').textContent.includes('unit 88')")
    page.back()  # turning leaves no trail
    wait(page, "document.querySelector('#unit').hidden")
    assert cards(page)[:2] == [88, 85] and page.find_element(By.NAME, "words").get_attribute("value") == "green"
    page.find_element(By.CSS_SELECTOR, ".card h2 a").click()
    wait(page, "!document.querySelector('#unit').hidden")
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    wait(page, "document.querySelector('#unit').hidden")
    assert "green" in page.current_url


def test_unit_page_of_a_dead_or_unknown_unit_says_so(page: Chrome, site: Path) -> None:
    fresh(page, f"{described(site)}#unit-90")
    wait(page, "document.querySelector('#unit').textContent.includes('no finite activation')")
    page.get(f"{described(site)}#unit-1000")
    wait(page, "document.querySelector('#unit').textContent.includes('no unit 1000')")


def test_unit_page_finds_units_that_say_the_same(page: Chrome, site: Path) -> None:
    fresh(page, f"{described(site)}#unit-10")
    wait(page, "document.querySelectorAll('#unit section:last-child .units a').length === 8")
    said = [link.text for link in page.find_elements(By.CSS_SELECTOR, "#unit section:last-child .units a")]
    assert len(said) == 8 and all("green thing" in one and "cosine 1" in one for one in said)
    assert "unit 10 " not in " ".join(said)


def test_difference_shows_both_sides_with_their_exemplars(page: Chrome, site: Path, hostile: str) -> None:
    fresh(page, next(site.glob("differences/*/index.html")).as_uri())
    status(page, "25 units")
    assert len(page.find_elements(By.CSS_SELECTOR, ".pairs > li")) == 20
    first = page.find_element(By.CSS_SELECTOR, ".pairs > li")
    assert len(first.find_elements(By.CSS_SELECTOR, ".side")) == 2
    assert page.execute_script("return arguments[0].querySelector('.description').textContent", first) == hostile
    assert [mark.text for mark in first.find_elements(By.CSS_SELECTOR, ".side mark.gained")] == ["striped", "dogs"]
    page.find_element(By.NAME, "words").send_keys("zebra")
    status(page, "1 of 25 units")
    page.find_element(By.CSS_SELECTOR, ".pairs .description").click()
    wait(page, "document.querySelector('#unit h2')?.textContent.includes('unit 71')")


def test_pages_read_well_with_a_keyboard_and_a_screen_reader(page: Chrome, site: Path) -> None:
    model = next(site.glob("layers/*/index.html")).as_uri()
    for address in ((site / "index.html").as_uri(), model, described(site), f"{described(site)}#unit-9"):
        fresh(page, address)
        wait(page, "document.querySelector('#unit h2, .card, .units li')")
        unnamed = page.execute_script(UNNAMED)
        assert unnamed == []
        assert page.execute_script("return [...document.images].every((image) => image.hasAttribute('alt'))")
        assert page.execute_script("return document.documentElement.lang") == "en"
        levels = page.execute_script(LEVELS)
        assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))
        assert not page.execute_script("return document.documentElement.scrollWidth > innerWidth")
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    wait(page, "document.querySelector('#unit').hidden")
    page.find_element(By.TAG_NAME, "body").send_keys("/")
    assert page.switch_to.active_element.get_attribute("name") == "words"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(page: Chrome, site: Path, scheme: str) -> None:
    """4.5 : 1 for all text, against the nearest background that is drawn."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    difference = next(site.glob("differences/*/index.html")).as_uri()
    for address in ((site / "index.html").as_uri(), described(site), f"{described(site)}#unit-9", difference):
        fresh(page, address)
        wait(page, "document.querySelector('#unit h2, .card, .units li')")
        assert page.execute_script(CONTRAST) == []
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_report_without_javascript_shows_the_overview_and_says_what_is_missing(tmp_path: Path, site: Path) -> None:
    chrome = start(tmp_path, **{"profile.managed_default_content_settings.javascript": 2})
    try:
        chrome.get((site / "index.html").as_uri())
        assert "need JavaScript" in chrome.find_element(By.TAG_NAME, "body").text
        veil = chrome.find_element(By.CSS_SELECTOR, ".mask")
        assert veil.is_displayed()
        chrome.find_element(By.CSS_SELECTOR, "[value=plain]").click()
        assert not veil.is_displayed()
        chrome.find_element(By.LINK_TEXT, "Conv1").click()
        assert "need JavaScript" in chrome.find_element(By.TAG_NAME, "body").text
    finally:
        chrome.quit()
