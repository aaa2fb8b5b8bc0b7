"""The report in a real browser, opened from disk."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait


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


@pytest.fixture
def page(chrome: Chrome) -> Iterator[Chrome]:
    """The browser; afterwards: nothing on the console, no request but to files."""
    yield chrome
    assert chrome.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert requests and {url.split(":")[0] for url in requests} <= {"file", "data"}


def wait(page: Chrome, condition: str) -> None:
    WebDriverWait(page, 20).until(lambda driver: driver.execute_script(f"return {condition}"))


def cards(page: Chrome) -> list[int]:
    return page.execute_script("return [...document.querySelectorAll('.card')].map((card) => Number(card.id.slice(5)))")


def described_layer(site: Path) -> Path:
    return next(path.parent for path in site.glob("layers/*/*/units.js") if "zebra" in path.read_text())


def test_index_search_finds_a_unit_and_leads_to_its_card(page: Chrome, site: Path) -> None:
    page.get((site / "index.html").as_uri())
    page.find_element(By.ID, "search").send_keys("ZEBRA str")
    wait(page, "document.querySelectorAll('#results li').length === 1")
    result = page.find_element(By.CSS_SELECTOR, "#results a")
    assert "zebra stripes" in result.text and "unit 71" in result.text
    assert page.find_element(By.ID, "status").text == "1 unit found"
    result.click()
    wait(page, "document.querySelector('.card:target h2')")
    assert page.find_element(By.CSS_SELECTOR, ".card:target h2").text.startswith("zebra stripes")
    wait(page, "document.querySelector('.card:target img').naturalWidth === 20")


def test_index_search_takes_a_plural_for_its_singular(page: Chrome, site: Path) -> None:
    page.get((site / "index.html").as_uri())
    page.find_element(By.ID, "search").send_keys("stripes zebras")
    wait(page, "document.querySelector('#status').textContent === '1 unit found'")
    page.find_element(By.ID, "search").send_keys("x")  # no such plural, and no word that begins so
    wait(page, "document.querySelector('#status').textContent === '0 units found'")


def test_index_search_filters_by_layer_and_shows_more(page: Chrome, site: Path) -> None:
    page.get((site / "index.html").as_uri())
    Select(page.find_element(By.ID, "layer")).select_by_visible_text("Conv1")
    wait(page, "document.querySelector('#status').textContent === '91 units found'")
    page.find_element(By.CSS_SELECTOR, "#results button").click()
    wait(page, "document.querySelectorAll('#results li').length === 91")
    assert "unit 17 · score −11" in page.find_element(By.CSS_SELECTOR, "#results li").text


def test_index_search_shows_hostile_text_as_text(page: Chrome, site: Path, hostile: str) -> None:
    page.get((site / "index.html").as_uri())
    page.find_element(By.ID, "search").send_keys("<script>document")
    wait(page, "document.querySelectorAll('#results li').length === 1")
    assert hostile in page.find_element(By.CSS_SELECTOR, "#results li").text
    assert page.title == "What every unit responds to"


def test_layer_sort_reorders_across_pages(page: Chrome, site: Path) -> None:
    page.get((described_layer(site) / "2.html").as_uri())
    assert cards(page)[:3] == [40, 41, 42]
    order = sorted(range(89), key=lambda unit: -((unit * 37) % 90))
    Select(page.find_element(By.ID, "sort")).select_by_value("score-down")
    wait(page, "document.querySelectorAll('.card').length >= 20")
    assert cards(page)[:20] == order[:20]
    page.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    wait(page, "document.querySelectorAll('.card').length >= 40")
    assert cards(page)[:40] == order[:40]
    Select(page.find_element(By.ID, "sort")).select_by_value("activation-up")
    wait(page, "document.querySelector('.card')?.id === 'unit-0'")


def test_layer_scrolling_brings_the_later_pages(page: Chrome, site: Path) -> None:
    page.get((described_layer(site) / "index.html").as_uri())
    assert cards(page) == list(range(40))
    for _ in range(20):
        page.execute_script("window.scrollTo(0, document.body.scrollHeight)")
        wait(page, "window.scrollY > 0")
        if len(cards(page)) == 91:
            break
    wait(page, "(scrollTo(0, document.body.scrollHeight), document.querySelectorAll('.card').length === 91)")
    assert cards(page) == list(range(91))


def test_layer_filter_shows_matching_cards_with_hostile_text_as_text(page: Chrome, site: Path, hostile: str) -> None:
    page.get((described_layer(site) / "index.html").as_uri())
    title = page.title
    page.find_element(By.ID, "words").send_keys("quoted")
    wait(page, "document.querySelectorAll('.card').length === 1")
    assert page.find_element(By.ID, "status").text == "1 of 91 units"
    card = page.find_element(By.CSS_SELECTOR, ".card")
    assert card.find_element(By.CLASS_NAME, "description").text == hostile
    assert card.find_element(By.CSS_SELECTOR, ".annotations li").text == hostile
    card.find_element(By.TAG_NAME, "summary").click()
    assert "runner-up" in card.text
    assert page.title == title


def test_layer_mask_switch_shows_plain_images(page: Chrome, site: Path) -> None:
    page.get((described_layer(site) / "index.html").as_uri())
    veil = page.find_element(By.CSS_SELECTOR, "#unit-5 .mask")
    wait(page, "document.querySelector('#unit-5 .mask').naturalHeight === 720")
    assert veil.is_displayed()
    page.find_element(By.ID, "masks").click()
    assert not veil.is_displayed()


def test_layer_second_mask_covers_what_its_bits_say(page: Chrome, site: Path) -> None:
    page.get((described_layer(site) / "index.html").as_uri())
    wait(page, "[...document.querySelectorAll('#unit-9 img')].slice(0, 4).every((i) => i.complete && i.naturalWidth)")
    picture = page.find_elements(By.CSS_SELECTOR, "#unit-9 .picture")[1]
    shown = Image.open(io.BytesIO(picture.screenshot_as_png)).convert("RGB")
    side = shown.width / 20
    for y in range(20):
        for x in range(20):
            red = shown.getpixel((int((x + 0.5) * side), int((y + 0.5) * side)))[0]
            assert abs(red - (200 if y >= 1 and x <= 9 else 50)) <= 8, (x, y)


def test_layer_without_javascript_reads_all_the_same(tmp_path: Path, site: Path) -> None:
    chrome = start(tmp_path, **{"profile.managed_default_content_settings.javascript": 2})
    try:
        chrome.get((described_layer(site) / "index.html").as_uri())
        chrome.find_element(By.LINK_TEXT, "40–79").click()
        names = [name.text for name in chrome.find_elements(By.CSS_SELECTOR, ".card h2")]
        assert len(names) == 40 and any(name.startswith("zebra stripes") for name in names)
        assert not chrome.find_element(By.ID, "sort").is_displayed()  # nothing offered that would not work
        chrome.find_element(By.ID, "masks").click()
        assert not chrome.find_element(By.CSS_SELECTOR, ".mask").is_displayed()
    finally:
        chrome.quit()
