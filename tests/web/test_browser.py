"""The page in a real browser: Chromium, headless, clicks through every tab."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selfvae.data.crops import photo

pytest.importorskip("gradio", reason="the page needs gradio")
sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="browser tests need Chromium (Debian: apt install chromium)"),
]
# where screenshots go; docs/ to renew those of the documentation
SHOTS = os.environ.get("SELFVAE_SCREENSHOTS")
# milliseconds for each step; a slow machine that does something else as well is no failure
PATIENCE = 90_000


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from selfvae.web.page import served
    from selfvae.web.work import Models

    with served(Models.load()) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
                  "--disable-component-update", "--disable-sync", "--disable-quic"],
        )  # fmt: skip
        yield browser
        browser.close()


def new_page(browser: Any) -> Any:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(PATIENCE)
    return page


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page; at the end, that it asked nobody else for anything and met no error."""
    page = new_page(browser)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if "Content Security" in line.text else None)
    page.goto(address)
    page.get_by_role("heading", name="selfvae").wait_for()
    yield page
    foreign = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not foreign and not errors
    name = request.node.name.removeprefix("test_")
    if SHOTS and name in ("enhance", "compress", "generate", "interpolate"):
        page.mouse.move(0, 0)
        page.screenshot(path=f"{SHOTS}/serve-{name}.png", full_page=True)
    page.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    x = photo("coffee", 2)[:, 40:140, 60:220]
    Image.fromarray(x.transpose(1, 2, 0)).save(tmp_path / "cup.png")
    return tmp_path / "cup.png"


def shown(page: Any, tab: Any, tmp_path: Path, nth: int = 0) -> np.ndarray:
    """The pixels of an image on the page."""
    source = tab.locator("img:visible").nth(nth).get_attribute("src")
    file = tmp_path / "shown.png"
    file.write_bytes(page.request.get(source).body())
    return np.asarray(Image.open(file).convert("RGB"))


def open_tab(page: Any, name: str) -> Any:
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def upload(tab: Any, file: Path, box: int = 0) -> None:
    """Gives a file to one of the boxes of a tab, and waits until the server has it."""
    tab.locator("input[type=file]").nth(box).set_input_files(file)
    # The text "name.ending" is only on the page while the file is on its way, too short to be waited for;
    # then gradio shows name and ending in two elements, with a link.
    tab.locator(f'a[download="{file.name}"]').wait_for()


def test_enhance(page: Any, picture: Path) -> None:
    tab = open_tab(page, "Enhance")
    upload(tab, picture)
    tab.get_by_text("Degrade a clean picture").click()
    tab.get_by_role("button", name="Enhance").click()
    tab.get_by_text(re.compile(r"version 1: \d\d\.\d dB")).first.wait_for()
    assert tab.get_by_text("the picture itself").count()
    # before and after, one over the other
    tab.locator("img.preview:visible").nth(1).wait_for()
    assert tab.locator("img.preview:visible").count() == 2


def test_compress(page: Any, picture: Path, tmp_path: Path) -> None:
    tab = open_tab(page, "Compress")
    upload(tab, picture)
    tab.get_by_role("button", name="Compress").click()
    tab.get_by_text("160 x 100 pixels, every one as it was.").wait_for()
    x = np.asarray(Image.open(picture))
    # what is downloaded decodes to what was uploaded, by the command line
    with page.expect_download() as download:
        tab.locator('a[download="cup.svae"]').click()
    download.value.save_as(tmp_path / "cup.svae")
    from selfvae.cli import main

    assert main(["decompress", str(tmp_path / "cup.svae"), str(tmp_path / "back.png")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "back.png")), x)
    sizes = dict(
        re.findall(
            r"^(.*?)\t([\d,]+)\t",
            tab.locator("table", has_text="bits per sub-pixel").inner_text(),
            re.MULTILINE,
        )
    )
    sizes = {name.strip(): int(size.replace(",", "")) for name, size in sizes.items()}
    assert sizes["selfvae"] == (tmp_path / "cup.svae").stat().st_size < sizes["WebP"] < sizes["PNG"]
    # a part of the file
    tab.locator("input[type=number]:visible").first.fill("40")
    tab.locator("input[type=number]:visible").first.press("Enter")
    tab.get_by_text(re.compile(r"the rest is guessed: \d\d\.\d dB")).wait_for()


def test_open_a_file(page: Any, tmp_path: Path) -> None:
    import selfvae
    from selfvae import hub
    from selfvae.codec import Codec

    x = selfvae.generate(selfvae.load("cifar10-2m-v1"), 1, seed=1)
    (tmp_path / "a.svae").write_bytes(Codec(selfvae.load(hub.PHOTOS)).compress(x, verify=False))
    tab = open_tab(page, "Compress")
    upload(tab, tmp_path / "a.svae", -1)
    tab.get_by_role("button", name="Open").click()
    tab.get_by_text("32 x 32 pixels, every one as it was.").wait_for()


def test_generate(page: Any, tmp_path: Path) -> None:
    tab = open_tab(page, "Generate")
    tab.get_by_role("button", name="Generate").click()
    tab.locator("img:visible").first.wait_for()
    assert shown(page, tab, tmp_path).std() > 20


def test_interpolate(page: Any, picture: Path, tmp_path: Path) -> None:
    tab = open_tab(page, "Interpolate")
    upload(tab, picture)
    for nth in range(2):
        tab.get_by_role("button", name="example").nth(nth).click()
        tab.locator('a[download="drawn.png"]').nth(nth).wait_for()
    tab.locator("img:visible").nth(1).wait_for()
    tab.get_by_role("button", name="Interpolate").click()
    tab.locator("img:visible").nth(2).wait_for()
    middle = shown(page, tab, tmp_path, 2)
    for step, same in (("0", False), ("4", True)):
        tab.locator("input[type=number]:visible").first.fill(step)
        tab.locator("input[type=number]:visible").first.press("Enter")
        for _ in range(PATIENCE // 100):
            if np.array_equal(shown(page, tab, tmp_path, 2), middle) == same:
                break
            page.wait_for_timeout(100)
        else:
            raise AssertionError(f"step {step}: the slider changes nothing")


def test_stop_and_leaving_end_a_job(browser: Any, address: str, page: Any, tmp_path: Path) -> None:
    Image.effect_noise((540, 540), 60).convert("RGB").save(tmp_path / "noise.png")  # a minute of work

    def begin(page: Any) -> Any:
        tab = open_tab(page, "Compress")
        upload(tab, tmp_path / "noise.png")
        tab.get_by_role("button", name="Compress").click()
        tab.get_by_text("compressing").first.wait_for()
        return tab

    begin(page).get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").first.wait_for()
    other = new_page(browser)
    other.goto(address)
    begin(other)
    other.close()
    test_generate(page, tmp_path)  # it would wait behind the other one


def test_hostile(page: Any, tmp_path: Path) -> None:
    """A file that is no picture is refused on the page, in words, and the page goes on."""
    tab = open_tab(page, "Enhance")
    for name, data, words in (
        ("zero.png", b"", "the file is empty"),
        ("picture.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "of no known kind"),
    ):
        (tmp_path / name).write_bytes(data)
        tab.locator("input[type=file]").first.set_input_files(tmp_path / name)
        page.get_by_text(words).first.wait_for()
        tab.get_by_label("Remove").or_(tab.get_by_label("Clear")).first.click()
    tab.get_by_role("button", name="Enhance").click()
    page.get_by_text("no file yet").first.wait_for()
