"""The demo in a headless Chromium, on a wide screen and on a phone's."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from playwright.sync_api import sync_playwright

from visiontrim.ask import answer, load
from visiontrim.zoo import held_out

SAMPLE = next(iter(held_out(1)))


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-c", "from visiontrim.cli import main; main()", "demo", "--device", "cpu"]
    process = subprocess.Popen([*program, "--port", str(port)])
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            assert process.poll() is None
            try:
                urllib.request.urlopen(url, timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "height"), [(1200, 1100), (390, 844)])
def test_two_methods_side_by_side(browser, address, tmp_path, width, height):
    picture = tmp_path / "scene.png"
    SAMPLE.image.save(picture)
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(120_000)
    page.goto(address)
    page.set_input_files("#picture input[type=file]", picture)
    page.fill("#question textarea", SAMPLE.question)
    page.click("#ask")
    page.wait_for_function("document.querySelector('#answer2 textarea')?.value.length > 0")
    alone = answer(load(device="cpu"), [SAMPLE.image], SAMPLE.question, "visiontrim", 64)
    assert page.input_value("#answer1 textarea") == alone.text
    assert "64" in page.inner_text("#numbers1")
    page.wait_for_selector("#map2 img")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing to scroll sideways"
    page.close()


def test_a_mistake_is_said(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.click("#ask")
    page.wait_for_selector("text=Give a picture first")
    page.close()
