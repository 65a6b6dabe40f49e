"""The page of `fastbegan explore` in headless Chromium: every control does what it says, and nothing is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from fastbegan.commands.explore import Explore
from fastbegan.runs.folder import RunFolder
from fastbegan.runs.sheets import generated_band
from tests.test_explore import pixels, samples, trained

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


class _Browser:
    """Headless Chromium with a page of ours."""

    def __init__(self, folder: Path) -> None:
        program, driver = shutil.which("chromium"), shutil.which("chromedriver")
        assert program and driver, "this test needs Debian's packages chromium and chromium-driver"
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in (*FLAGS.split(), f"--user-data-dir={folder / 'profile'}", "--window-size=1100,900"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))

    def open(self, path: Path) -> None:
        self.driver.get(path.as_uri())
        # a canvas is 300 pixels wide before it is drawn
        self.wait("[...document.querySelectorAll('#way, #square')].every((canvas) => canvas.width !== 300)")

    def js(self, code: str, *arguments: object) -> Any:
        return self.driver.execute_script(code, *arguments)

    def element(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def set(self, name: str, value: float) -> None:
        """What dragging a slider does."""
        code = "const s = find(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('input'))"
        self.js(code, name, value)

    def shown(self, selector: str) -> np.ndarray:
        """Pixels of a canvas."""
        return pixels(self.js("return document.querySelector(arguments[0]).toDataURL('image/png')", selector))

    def wait(self, code: str) -> None:
        WebDriverWait(self.driver, 30, 0.05).until(lambda _: self.js(f"return {code}"))

    def press(self, selector: str, *keys: str) -> None:
        self.element(selector).send_keys(*(getattr(Keys, key) for key in keys))


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    full, bare = tmp_path / "full & <odd> #1.html", tmp_path / "bare.html"
    assert Explore(run, out=full).run() == 0
    copy = Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("samples", "metrics.jsonl")))
    assert Explore(copy, out=bare).run() == 0
    names = ("convergence", "loss_real", "loss_fake", "k")
    rows = [{"step": at, "images": 1_000_000 * at, **dict.fromkeys(names, 0.1 * at)} for at in (1, 2, 3)]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Explore(copy, out=tmp_path / "long.html").run() == 0
    images, browser = samples(run, 12), _Browser(tmp_path)
    try:
        browser.open(full)
        _check_ways(browser, images)
        _check_square(browser, images)
        _check_training(browser, run)
        picture = tmp_path / "page.png"
        assert browser.driver.save_screenshot(str(picture))
        with Image.open(picture) as screenshot:
            assert len(np.unique(np.asarray(screenshot.convert("RGB")).reshape(-1, 3), axis=0)) > 500
        _check_looks(browser)
        for path in (full, bare):
            browser.open(path)
            assert browser.driver.get_log("browser") == []
            resources = browser.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
            assert [name for name in resources if not name.startswith("data:")] == []
        assert browser.js("return find('sheets').hidden && find('curves').hidden")
        browser.open(tmp_path / "long.html")
        browser.wait("find('chart').childElementCount")
        labels = browser.js("return [...document.querySelectorAll('#chart text')].map((one) => one.textContent)")
        assert {"1", "2", "3", "million images seen"} <= set(labels)
        browser.open(bare)
        ask = "const done = arguments[0]; fetch('data:,x').then(() => done('loaded'), () => done('refused'))"
        assert browser.driver.execute_async_script(ask) == "refused"
    finally:
        browser.driver.quit()


def _check_ways(browser: _Browser, images: np.ndarray) -> None:
    assert np.abs(browser.shown("#way") - images[0]).max() <= 1
    browser.set("way-at", 24)
    assert np.abs(browser.shown("#way") - images[1]).max() <= 1
    assert browser.element("#way-out").text == "100 % of the way"
    browser.press("#way-at", "ARROW_LEFT")
    assert browser.element("#way-out").text == "96 % of the way"
    assert not np.array_equal(browser.shown("#way"), images[1])
    browser.element("#from label:nth-child(6)").click()  # from a higher to a lower one
    browser.set("way-at", 0)
    assert np.abs(browser.shown("#way") - images[5]).max() <= 1
    browser.press("#to input:checked", "ARROW_RIGHT")
    browser.press("#way-at", "END")
    assert np.abs(browser.shown("#way") - images[2]).max() <= 1
    browser.element("#to label:nth-child(6)").click()  # where the way begins: turned round
    assert np.abs(browser.shown("#way") - images[5]).max() <= 1
    assert browser.js("return [...document.querySelectorAll('.thumbs input:checked')].map((one) => one.value)") == [
        "2",
        "5",
    ]
    for number in range(8):
        assert np.abs(browser.shown(f"#to label:nth-child({number + 1}) canvas") - images[number]).max() <= 1
    browser.element("#strip").click()  # its middle
    assert browser.element("#way-at").get_attribute("value") == "12"
    before = browser.shown("#way")
    browser.element("#way-play").click()
    assert browser.element("#way-play").text == "Pause"
    browser.wait("find('way-at').value > 15")
    browser.wait("find('way-at').value < 10")  # and back
    browser.element("#way-play").click()
    assert browser.element("#way-play").text == "Play"
    at = browser.element("#way-at").get_attribute("value")
    assert np.array_equal(browser.shown("#way"), before) == (at == "12")
    browser.driver.execute_async_script("setTimeout(arguments[0], 300)")
    assert browser.element("#way-at").get_attribute("value") == at


def _check_square(browser: _Browser, images: np.ndarray) -> None:
    for number, (down, across) in zip(range(8, 12), ((0, 0), (0, 12), (12, 0), (12, 12)), strict=True):
        browser.set("square-x", across)
        browser.set("square-y", down)
        assert np.abs(browser.shown("#square") - images[number]).max() <= 1
    for slider in ("#square-x", "#square-y"):
        before = browser.shown("#square")
        browser.press(slider, "ARROW_LEFT")
        assert browser.element(f"{slider}-out").text == "92 %"
        assert not np.array_equal(browser.shown("#square"), before)
    browser.element("#map").click()
    assert [browser.element(f"#square-{axis}").get_attribute("value") for axis in "xy"] == ["6", "6"]


def _check_training(browser: _Browser, run: Path) -> None:
    mark = "document.querySelector('#chart .sheet').getAttribute('x1')"
    newest, place = browser.shown(".bands .main canvas"), float(browser.js(f"return {mark}"))
    assert newest.shape == (64, 320, 3) and browser.element("#sheet-out").text == "step 40"
    with Image.open(RunFolder(run).sheet_file(40)) as sheet:
        wanted = np.asarray(generated_band(sheet.convert("RGB")))[::2, ::2].astype(int)
    assert np.abs(newest - wanted).mean() < 2
    browser.set("sheet-at", 0)
    first = browser.shown(".bands .main canvas")
    assert browser.element("#sheet-out").text == "step 10" and not np.array_equal(first, newest)
    assert float(browser.js(f"return {mark}")) < place
    assert "step 10, 80 images seen" in browser.element("#where").text
    browser.press("#sheet-at", "ARROW_RIGHT")
    assert browser.element("#sheet-out").text == "step 20"
    assert not np.array_equal(browser.shown(".bands .main canvas"), first)
    browser.element("#sheet-play").click()
    browser.wait(
        "find('sheet-out').textContent === 'step 40' && find('sheet-play').textContent === 'Play'"
    )  # ends there
    again = "find('sheet-play').click(); return find('sheet-out').textContent"
    assert browser.js(again) == "step 10"  # from the beginning
    browser.wait("find('sheet-play').textContent === 'Play'")

    row = RunFolder(run).read_metrics()[1]
    chart = browser.element("#chart")
    browser.js("arguments[0].scrollIntoView({ block: 'center' })", chart)
    ActionChains(browser.driver).move_to_element(chart).perform()
    assert "step 20, 160 images seen" in browser.element("#where").text
    values = [float(one.text) for one in browser.driver.find_elements("css selector", "#keys output")]
    wanted = [row[name] for name in ("convergence", "loss_real", "loss_fake", "k", "sharpness", "variety")]
    assert values == pytest.approx(wanted, rel=0.006)
    assert len(browser.driver.find_elements("css selector", "#chart .dot")) == 6
    chart.click()
    assert browser.element("#sheet-out").text == "step 20"
    browser.press("#chart", "ARROW_RIGHT")
    assert "step 30" in browser.element("#where").text and "step 30" in (chart.get_attribute("aria-valuetext") or "")
    path = "document.querySelector('#chart .curve').getAttribute('d')"
    before = browser.js(f"return {path}")
    browser.element("#log").click()
    assert browser.js(f"return {path}") != before


def _check_looks(browser: _Browser) -> None:
    """Narrow and dark."""
    fits = "return document.documentElement.scrollWidth <= innerWidth"
    paper = "return getComputedStyle(document.documentElement).backgroundColor"
    light = browser.js(paper)
    browser.element("#pixels").click()
    assert browser.js("return getComputedStyle(find('way')).imageRendering") == "pixelated"
    for width in (1400, 800, 360):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.wait(f"innerWidth === {width} && find('chart').viewBox.baseVal.width === find('chart').clientWidth")
        assert browser.js(fits), width
    assert browser.shown(".bands .main canvas").shape == (128, 160, 3)  # tiles large enough to see
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert browser.js(paper) != light
