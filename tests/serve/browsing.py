"""A visitor of the page in a real browser."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
PATIENCE = 30_000  # milliseconds after which a test fails rather than waits


def artefacts(folder: Path) -> Path:
    """Where screenshots are kept: ``$MEDPLIB_ARTEFACTS``, or the test's own folder."""
    kept = Path(os.environ.get("MEDPLIB_ARTEFACTS", folder))
    kept.mkdir(parents=True, exist_ok=True)
    return kept


class Visitor:
    """One tab, and whatever it complained of.

    Args:
        tab: playwright's page.
        url: of our page.
    """

    def __init__(self, tab: Any, url: str) -> None:
        self.tab, self.url = tab, url
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        tab.set_default_timeout(PATIENCE)
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        tab.on("request", self._note)
        tab.goto(url)
        tab.wait_for_selector(".strip button")
        tab.wait_for_function("Boolean(document.querySelector('#picker input')?.value)")

    def _note(self, request: Any) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob") and address.netloc != urlsplit(self.url).netloc:
            self.strangers.append(request.url)

    def pick(self, label: str) -> None:
        """Pick an example."""
        self.tab.click(f'.strip button[aria-label="Example: {label}"]')
        self._wait_for_picture()

    def open(self, path: Path) -> None:
        """Open a file by the button's file dialogue."""
        with self.tab.expect_file_chooser() as chooser:
            self.tab.click(".source .open")
        chooser.value.set_files(path)
        self._wait_for_picture(path.name)

    def drop(self, path: Path, onto: str) -> None:
        """Drop a file on some part of the page."""
        content = base64.b64encode(path.read_bytes()).decode()
        self.tab.evaluate(
            """([onto, content, name]) => {
                const bytes = Uint8Array.from(atob(content), (sign) => sign.charCodeAt(0)), held = new DataTransfer();
                held.items.add(new File([bytes], name));
                const kept = ['dragenter', 'dragover', 'drop'].map((kind) => document.querySelector(onto).dispatchEvent(
                    new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: held })));
                if (kept.some(Boolean)) throw new Error('the browser would open the file in place of the page'); }""",
            [onto, content, path.name],
        )
        self._wait_for_picture(path.name)

    def choose_model(self, name: str) -> None:
        """Choose a model."""
        self.tab.click("#picker input")
        self.tab.click(f"[role=option]:has-text('{name}')")

    def _wait_for_picture(self, name: str = "") -> None:
        self.tab.wait_for_function(
            "name => document.querySelector('.caption').textContent.includes(name) &&"
            "document.querySelector('.frame img').complete && document.querySelector('.frame img').naturalWidth > 0",
            arg=name,
        )

    def tool(self, name: str) -> None:
        """Choose what to mark with."""
        self.tab.click(f".tools button:text-is('{name}')")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the picture, as a share of its sides, is on the screen."""
        box = self.tab.locator(".frame canvas").bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def drag(self, *places: tuple[float, float]) -> None:
        """Press at the first place, move over the others, let go; shares of the picture's sides."""
        with self._marking():
            self.tab.mouse.move(*self.at(*places[0]))
            self.tab.mouse.down()
            for place in places[1:]:
                self.tab.mouse.move(*self.at(*place), steps=4)
            self.tab.mouse.up()

    def click(self, x: float, y: float, marks: bool = True) -> None:
        """Click a place of the picture; ``marks`` where that completes a mark."""
        with self._marking() if marks else nullcontext():
            self.tab.mouse.click(*self.at(x, y))

    @contextmanager
    def _marking(self) -> Iterator[None]:
        """Wait until the server has the mark."""
        before = self.marks()
        yield
        self.tab.wait_for_function(f"{_MARKS} === {before + 1}")

    def marks(self) -> int:
        """Regions that are marked for the next question."""
        return int(self.tab.evaluate(_MARKS))

    def ask(self, question: str) -> Any:
        """Type a question, press Enter, wait for the answer's end; gives its element."""
        self.type(question)
        return self.answer()

    def type(self, question: str) -> None:
        """Type a question and press Enter; waits until it is in the conversation."""
        asked = self.tab.locator(".message.you").count()
        self.tab.fill("#question textarea", question)
        self.tab.press("#question textarea", "Enter")
        self.tab.wait_for_function(f"document.querySelectorAll('.message.you').length === {asked + 1}")

    def answer(self) -> Any:
        """The last answer once it is complete, or has failed."""
        last = self.tab.locator(".message.model").last
        last.locator(".foot").wait_for()
        return last

    def toasts(self) -> list[str]:
        """Errors that the framework tells by itself, for the page did not."""
        return [] if self.tab.is_closed() else self.tab.locator(".toast-body").all_inner_texts()

    def shot(self, path: Path, full: bool = False) -> Path:
        """A screenshot, with nothing focused and the mouse away."""
        self.tab.mouse.move(0, 0)
        self.tab.wait_for_timeout(250)  # colours fade for a moment
        self.tab.screenshot(path=path, full_page=full)
        return path


_MARKS = "Number(document.querySelector('.viewer').dataset.marks || 0)"
