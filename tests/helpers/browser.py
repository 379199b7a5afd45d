"""The app's page in a real browser: Debian's Chromium, driven by Playwright."""

import shutil
from pathlib import Path
from typing import Any

import pytest

SECONDS = 1000
# Keeps all that the line of progress says from now on.
OBSERVE = """() => {
    const line = document.querySelector('#progress');
    window.seen = [];
    window.observer?.disconnect();
    window.observer = new MutationObserver(() => window.seen.push(line.innerText.trim()));
    window.observer.observe(line, {childList: true, subtree: true, characterData: true});
}"""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str:
    """The browser's path; skips the test where there is none."""
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(CHROMIUM)} is installed")
    return found


class Page:
    """A page of the app, with the words of somebody who uses it."""

    def __init__(self, context: Any, url: str):
        self.context, self.page = context, context.new_page()
        self.errors: list[str] = []
        self.page.set_default_timeout(30 * SECONDS)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#upload")
        self.wait("() => sessionStorage.getItem('samoe')")

    def wait(self, condition: str, *arguments: Any, seconds: float = 30) -> None:
        """Waits until a condition in JavaScript holds."""
        # Asked at each frame, the browser would draw 60 a second.
        self.page.wait_for_function(condition, arg=list(arguments) or None, timeout=seconds * SECONDS, polling=50)

    def text(self, element: str) -> str:
        return self.page.locator(f"#{element}").inner_text()

    def wait_for_text(self, element: str, text: str, seconds: float = 30) -> None:
        condition = "([e, t]) => (document.querySelector('#' + e)?.innerText || '').includes(t)"
        self.wait(condition, element, text, seconds=seconds)

    def frame_source(self) -> str:
        return self.page.locator("#frame img").get_attribute("src")

    def open(self, path: Path) -> None:
        """Uploads a file and waits for the first frame."""
        self.page.set_input_files("#upload input[type=file]", str(path))
        self.page.wait_for_selector("#frame img")

    def choose(self, menu: str, option: str) -> None:
        self.page.click(f"#{menu} input")
        options = self.page.get_by_role("option", name=option, exact=True)
        options.last.click()
        options.first.wait_for(state="detached")

    def mode(self, start: str) -> None:
        """What a click means: "+", "−" or "Box"."""
        self.page.locator("#mode label", has_text=start).click()
        self.page.wait_for_timeout(300)

    def click(self, x: float, y: float) -> None:
        """Clicks on the frame, at parts of its width and height, and waits for the new picture."""
        before, box = self.frame_source(), self.page.locator("#frame img").bounding_box()
        position = {"x": round(x * box["width"]), "y": round(y * box["height"])}
        self.page.locator("#frame img").click(position=position)
        self.wait_for_change(before)

    def undo(self) -> None:
        before = self.frame_source()
        self.page.click("#undo")
        self.wait_for_change(before)

    def wait_for_change(self, before: str) -> None:
        """Waits until another frame than `before` is shown."""
        self.wait("([s]) => document.querySelector('#frame img').src !== s", before)

    def go_to(self, frame: int) -> None:
        before, field = self.frame_source(), self.page.locator("#slider input[type=number]")
        field.fill(str(frame))
        field.press("Enter")
        self.wait_for_change(before)

    def track(self, button: str = "track", seconds: float = 60) -> None:
        self.page.evaluate(OBSERVE)
        self.page.click(f"#{button}")
        self.wait("() => window.seen.includes('Tracked.') && !window.seen.at(-1).includes(':')", seconds=seconds)

    def export(self, kind: str, folder: Path) -> Path:
        """Makes a file and downloads it."""
        if not self.page.locator("#kind").is_visible():
            self.page.click("#take-away button")
        self.choose("kind", kind)
        self.page.click("#export")
        link = self.page.locator("#file a").first
        link.wait_for()
        ending = "_project.zip" if kind.startswith("Project") else ".zip"
        self.wait("([e]) => [...document.querySelectorAll('#file a')].some((a) => a.href.endsWith(e))", ending)
        with self.page.expect_download() as download:
            self.page.locator(f"#file a[href$='{ending}']").first.click()
        target = folder / download.value.suggested_filename
        download.value.save_as(target)
        return target

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()
        self.page.wait_for_timeout(500)
