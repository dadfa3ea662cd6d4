"""The page in headless Chromium, by real clicks and drawing; most of it through the real stack with the nano."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pydicom.data
import pytest

from model.inference.answer import Mask
from model.processing.masks import decode_rle
from model.serve import gradio_web_server
from model.serve.launcher import Launcher, LaunchSettings
from model.serve.server import Entrance, parse_flags
from tests.conftest import ROOT
from tests.serve.browsing import CHROMIUM, Visitor, artefacts
from tests.serve.scripted import ScriptedController, say

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on the path; install it to drive the page"),
]
NANO = ROOT / "assets" / "medplib-nano"
FUNDUS = ROOT / "data" / "sample" / "images" / "fundus_00--Phantom--seed505case000004--0000.png"  # 260 × 292
Arrive = Callable[..., Visitor]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def stack() -> Iterator[Launcher]:
    """A controller and a worker with the nano, as processes of their own."""
    settings = LaunchSettings(NANO, web=False, worker_flags=("--add_region_feature",), grace=2.0)
    with Launcher(settings, lambda _: None) as running:
        yield running


def make_page(controller: str, votes: Path, root_path: str = "") -> Any:
    flags = ["--controller", controller, "--model-list-mode", "reload", "--add_region_feature"]
    flags += ["--votes-file", str(votes), "--root-path", root_path, "--max-image-mib", "1", "--max-volume-mib", "2"]
    app = gradio_web_server.make_app(parse_flags(gradio_web_server.build_parser(), flags))
    return Entrance(app, [], root_path=root_path)


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("votes") / "votes.jsonl"


@pytest.fixture(scope="module")
def real_page(stack: Launcher, serving: Any, votes: Path) -> Iterator[str]:
    with serving(make_page(stack["controller"].address, votes)) as url:
        yield url


@pytest.fixture(scope="module")
def scripted() -> ScriptedController:
    return ScriptedController()


@pytest.fixture(scope="module")
def scripted_page(scripted: ScriptedController, serving: Any, votes: Path) -> Iterator[str]:
    """As a proxy shows it, at a sub-path."""
    with serving(scripted.app) as address, serving(make_page(address, votes, "/lab/medplib")) as url:
        yield f"{url}/lab/medplib/"


@pytest.fixture
def arrive(chromium: Any) -> Iterator[Arrive]:
    """Open a tab of a browser of one's own; at the end, none may have complained or talked to strangers."""
    visitors, contexts = [], []

    def open_tab(url: str, width: int = 1400, height: int = 900, scheme: str = "light", **options: Any) -> Visitor:
        size = {"width": width, "height": height}
        contexts.append(chromium.new_context(viewport=size, color_scheme=scheme, **options))
        visitors.append(Visitor(contexts[-1].new_page(), url))
        return visitors[-1]

    yield open_tab
    toasts = [toast for visitor in visitors for toast in visitor.toasts()]
    for context in contexts:
        context.close()
    assert [visitor.strangers for visitor in visitors] == [[] for _ in visitors]
    assert [visitor.complaints for visitor in visitors] == [[] for _ in visitors]
    assert toasts == []


# --- the three journeys -----------------------------------------------------------------------------------------------


def test_a_question_a_region_and_a_mask(arrive: Arrive, real_page: str, votes: Path, tmp_path: Path) -> None:
    visitor = arrive(real_page)
    visitor.pick("Fundus")
    visitor.tab.click(".suggestion >> nth=0")
    visitor.tab.wait_for_function("document.querySelector('#question textarea').value !== ''")
    visitor.tab.press("#question textarea", "Enter")
    assert "fundus" in visitor.answer().inner_text().lower()

    visitor.tool("Box")
    visitor.drag((66 / 260, 81 / 292), (124 / 260, 125 / 292))
    assert "exudate" in visitor.ask("What is in the region?").inner_text().lower()

    before = visitor.tab.get_attribute(".frame img", "src")
    assert "optic disc is" in visitor.ask("Please segment the optic disc.").inner_text()
    visitor.tab.wait_for_selector(".masks li")
    row = visitor.tab.locator(".masks li").inner_text()
    assert "optic disc" in row and "score 0." in row and "px" in row
    assert visitor.tab.get_attribute(".frame img", "src") != before
    visitor.shot(artefacts(tmp_path) / "page.png")

    with visitor.tab.expect_download() as saved:
        visitor.tab.click(".files button:text-is('RLE (JSON)')")
    (mask,) = json.loads(Path(saved.value.path()).read_text())["masks"]
    inside = decode_rle(mask["rle"])
    assert inside.shape == (292, 260) and inside.sum() == mask["area_px"] > 500
    visitor.tab.uncheck(".masks input")
    visitor.tab.wait_for_function("src => document.querySelector('.frame img').src === src", arg=before)

    visitor.tab.locator(".vote[aria-label='Good answer']").last.click()
    visitor.tab.wait_for_selector(".vote[aria-pressed=true]")
    assert json.loads(votes.read_text().splitlines()[-1])["vote"] == "up"
    visitor.tab.click(".again")
    visitor.tab.wait_for_selector(".vote[aria-pressed=true]", state="detached")
    visitor.answer()
    assert visitor.tab.locator(".message.model").count() == 3
    memory = visitor.tab.locator("#remember input")  # in sight, and off for a model of single questions
    assert memory.is_visible() and not memory.is_checked()
    visitor.tab.click("#forget")
    visitor.tab.wait_for_selector(".message", state="detached")
    assert not visitor.tab.locator(".masks li").count()


def test_a_dicom_with_its_window_and_dicom_seg(arrive: Arrive, real_page: str, tmp_path: Path) -> None:
    visitor = arrive(real_page)
    visitor.open(Path(pydicom.data.get_testdata_file("CT_small.dcm")))
    assert "0.661 × 0.661 mm" in visitor.tab.locator(".caption").inner_text()
    before = visitor.tab.get_attribute(".frame img", "src")
    width = visitor.tab.locator("input[type=range][aria-label*='Window width']")
    width.press("PageDown")
    visitor.tab.wait_for_function("src => document.querySelector('.frame img').src !== src", arg=before)
    visitor.ask("Please segment the vertebra.")
    visitor.tab.wait_for_selector(".masks li")
    row = visitor.tab.locator(".masks li").inner_text()
    assert "mm²" in row or "empty" in row
    visitor.shot(artefacts(tmp_path) / "dicom.png", full=True)
    if "mm²" in row:
        with visitor.tab.expect_download() as saved:
            visitor.tab.click(".files button:text-is('DICOM-SEG')")
        assert pydicom.dcmread(saved.value.path()).Modality == "SEG"


def test_a_volume_is_turned_slice_by_slice(arrive: Arrive, real_page: str, tmp_path: Path) -> None:
    file = tmp_path / "volume.nii.gz"
    values = np.random.default_rng(0).integers(0, 900, (40, 50, 6)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 4.0, 1.0])), file)
    visitor = arrive(real_page)
    visitor.open(file)
    assert "slice 4 of 6" in visitor.tab.locator(".caption").inner_text()
    visitor.tab.locator("input[type=range][aria-label*='Slice']").press("ArrowRight")
    visitor.tab.wait_for_function("document.querySelector('.caption').textContent.includes('slice 5 of 6')")
    visitor.ask("What kind of medical image is this?")
    assert "axial 5" in visitor.tab.locator(".message.you").inner_text()
    visitor.tab.click("label:has-text('coronal')")
    visitor.tab.wait_for_function("document.querySelector('.caption').textContent.includes('of 50')")


# --- marking ----------------------------------------------------------------------------------------------------------


def test_every_way_of_marking_reaches_the_model(
    arrive: Arrive, scripted_page: str, scripted: ScriptedController, tmp_path: Path
) -> None:
    scripted.script = say("Several things.")
    visitor = arrive(scripted_page)
    visitor.pick("Fundus")  # 260 × 292
    visitor.tool("Point")
    visitor.click(0.5, 0.5)
    visitor.tool("Box")
    visitor.click(0.1, 0.1, marks=False)
    visitor.click(0.3, 0.3)
    visitor.tool("Free-hand")
    visitor.drag((0.6, 0.6), (0.9, 0.6), (0.9, 0.9), (0.6, 0.9))
    visitor.tool("Box")
    visitor.tab.focus(".frame canvas")
    visitor.tab.keyboard.press("ArrowLeft")
    visitor.tab.keyboard.press("Enter")
    for key in ("Shift+ArrowUp", "Shift+ArrowLeft"):
        visitor.tab.keyboard.press(key)
    visitor.tab.keyboard.press("Enter")
    visitor.tab.wait_for_function("document.querySelector('.viewer').dataset.marks === '4'")
    visitor.drag((0.01, 0.01), (0.05, 0.05))
    visitor.tab.click(".tools button:text-is('Undo')")
    visitor.tab.wait_for_function("document.querySelector('.viewer').dataset.marks === '4'")
    visitor.shot(artefacts(tmp_path) / "marks.png")
    visitor.ask("What is in the regions?")
    point, box, outline, keyed = [decode_rle(mask) for mask in scripted.requests[-1].region_masks]
    assert point[146, 130] and point.sum() < 400
    rows, columns = np.nonzero(box)
    corners = [rows.min() / 292, columns.min() / 260, rows.max() / 292, columns.max() / 260]
    assert corners == pytest.approx([0.1, 0.1, 0.3, 0.3], abs=0.02)
    assert outline[int(0.7 * 292), int(0.8 * 260)] and not outline[: int(0.5 * 292)].any()
    assert keyed.sum() == pytest.approx((0.1 * 292) ** 2, rel=0.15)
    assert visitor.tab.locator(".about").inner_text() == "4 regions" and visitor.marks() == 0


# --- what a model writes, stopping, leaving ---------------------------------------------------------------------------


def test_what_a_model_writes_is_text_and_nothing_else(
    arrive: Arrive, scripted_page: str, scripted: ScriptedController
) -> None:
    text = (
        '<img src="http://stranger.invalid/a.png" onerror="document.title=1"> <script>document.title=2</script> '
        "![x](http://stranger.invalid/b.png) [y](javascript:1) **bold** ${document.title=3} {{this}} &lt;b&gt; $x^2$"
    )
    scripted.script = say(text)
    visitor = arrive(scripted_page)
    visitor.pick("CT")
    answer = visitor.ask(f"Say {text}")
    assert answer.locator(".text").text_content() == text
    assert visitor.tab.locator(".message.you .text").text_content() == f"Say {text}"
    assert not visitor.tab.locator(".talk img, .talk a, .talk script, .talk strong").count()
    assert visitor.tab.title() == "MedPLIB"


def test_stop_and_leaving_end_the_answer_at_the_controller(
    arrive: Arrive, scripted_page: str, scripted: ScriptedController, wait_until: Any
) -> None:
    scripted.script = say("on and on " * 1000, pause=0.1)  # a page on a busy machine keeps up with it
    visitor = arrive(scripted_page)
    visitor.pick("MR")
    visitor.type("What is it?")
    visitor.tab.wait_for_selector(".message.model .text")
    left = scripted.left
    visitor.tab.click("#stop")
    visitor.tab.wait_for_selector(".note:text-is('Stopped.')")
    wait_until(lambda: scripted.left == left + 1, what="the controller to notice")
    visitor.type("And now?")
    visitor.tab.locator(".message.model .text").nth(1).wait_for()
    visitor.tab.close()
    wait_until(lambda: scripted.left == left + 2, seconds=30, what="the controller to notice")


def test_a_page_that_is_loaded_again_goes_on(
    arrive: Arrive, serving: Any, port: int, scripted: ScriptedController, votes: Path, tmp_path: Path
) -> None:
    """Dropped image, question by the button, reload; then the page's process is another one."""
    disc = Mask.from_array(np.ones((292, 260), dtype=bool), "disc", 0.9).to_dict()
    scripted.script, scripted.models = say("The disc is <SEG>.", (disc,)), ["alpha", "nano"]
    with serving(scripted.app) as controller:
        with serving(make_page(controller, votes), port) as url:
            visitor = arrive(url, width=1400)
            tab = visitor.tab
            visitor.shot(artefacts(tmp_path) / "empty.png")
            width = "document.querySelector('#columns').getBoundingClientRect().width"
            empty = tab.evaluate(width)
            visitor.drop(FUNDUS, ".talk")  # anywhere
            assert tab.evaluate(width) == empty > 1200
            tab.fill("#question textarea", "Where is the disc?")
            tab.check("#remember input")
            tab.click("#send")
            visitor.answer()
            focused = "document.activeElement === document.querySelector('#question textarea')"
            assert tab.evaluate(focused)
            visitor.drag((0.2, 0.2), (0.4, 0.4))
            visitor.choose_model("nano")
            tab.click("#picker button")  # keeps the choice
            tab.wait_for_timeout(1000)
            shown = [tab.get_attribute(".frame img", "src"), tab.locator(".masks").inner_text()]
            tab.reload()
            tab.wait_for_selector(".masks li")
            tab.wait_for_function("document.querySelector('.viewer').dataset.marks === '1'")
            assert [tab.get_attribute(".frame img", "src"), tab.locator(".masks").inner_text()] == shown
            assert "The disc is" in visitor.answer().inner_text() and tab.locator(".message").count() == 2
            assert tab.input_value("#picker input") == "nano"
            visitor.shot(artefacts(tmp_path) / "reloaded.png")
            assert not tab.is_checked("#remember input")
            visitor.choose_model("alpha")  # which was asked with the switch on
            tab.wait_for_function("document.querySelector('#remember input').checked")
            tab.focus(".frame canvas")
            tab.keyboard.press("Control+z")
            tab.wait_for_function("document.querySelector('.viewer').dataset.marks === '0'")
        visitor.complaints.clear()  # of the connection that broke
        with serving(make_page(controller, votes), port):
            tab.reload()
            tab.wait_for_selector(".notice:has-text('the page was started again')")
            assert not tab.locator(".message").count()
            visitor.shot(artefacts(tmp_path) / "restarted.png")
            tab.reload()  # once is enough
            tab.wait_for_function("Boolean(document.querySelector('#picker input')?.value)")
            assert not tab.locator(".notice").is_visible()
            tab.close()
    scripted.models = ["nano"]


# --- two at once, faults ----------------------------------------------------------------------------------------------


def test_two_visitors_do_not_meet(arrive: Arrive, real_page: str) -> None:
    first, second = arrive(real_page), arrive(real_page)
    first.pick("Fundus")
    second.pick("X-ray")
    for visitor in (first, second):
        visitor.type("What kind of medical image is this?")
    assert "fundus" in first.answer().inner_text().lower()
    assert "x-ray" in second.answer().inner_text().lower()
    first.tool("Box")
    first.drag((0.2, 0.2), (0.5, 0.5))
    assert first.marks() == 1 and second.marks() == 0
    assert [visitor.tab.locator(".message.you").count() for visitor in (first, second)] == [1, 1]


def test_faults_are_sentences(arrive: Arrive, real_page: str, tmp_path: Path) -> None:
    visitor = arrive(real_page)
    visitor.tab.click("#send")
    visitor.tab.wait_for_selector(".notice:has-text('There is no image yet')")
    for name, content, sentence in [
        ("notes.txt", b"hello", "notes.txt is not a readable image"),
        ("cut.png", (ROOT / "assets/pictures/answer.png").read_bytes()[:2000], "cut.png cannot be decoded"),
        ("long.png", b"\0" * (2**20 + 1), "long.png is larger than the limit of 1 MiB"),
        ("long.dcm", b"\0" * (2 * 2**20 + 1), "long.dcm is larger than the limit of 2 MiB"),
    ]:
        (tmp_path / name).write_bytes(content)
        visitor.tab.set_input_files(".source input", tmp_path / name)
        visitor.tab.wait_for_selector(f".notice:has-text('{sentence}')")
    visitor.pick("CT")
    visitor.tab.wait_for_selector(".notice", state="hidden")
    visitor.tab.fill("#question textarea", "why " * 3000)  # not a part of it, unnoticed
    visitor.tab.press("#question textarea", "Enter")
    visitor.tab.wait_for_selector(".notice:has-text('it has 11,999 characters')")


# --- how it looks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(
    scheme: str, arrive: Arrive, scripted_page: str, scripted: ScriptedController, tmp_path: Path
) -> None:
    scripted.script = say("This is a fundus photograph.")
    visitor = arrive(scripted_page, width=390, height=844, scheme=scheme, has_touch=True, is_mobile=True)
    visitor.pick("Fundus")
    visitor.ask("What kind of medical image is this?")
    assert visitor.tab.evaluate("document.documentElement.scrollWidth") == 390
    assert visitor.tab.get_attribute(".tools button[data-tool=look]", "aria-pressed") == "true"  # a finger scrolls
    visitor.tool("Box")
    visitor.tab.touchscreen.tap(*visitor.at(0.2, 0.2))
    visitor.tab.touchscreen.tap(*visitor.at(0.6, 0.5))
    visitor.tab.wait_for_function("document.querySelector('.viewer').dataset.marks === '1'")
    red = visitor.tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert (int(red) < 60) is (scheme == "dark")
    visitor.shot(artefacts(tmp_path) / f"phone-{scheme}.png", full=True)


def test_pixels_that_are_not_square_are_marked_where_they_are(
    arrive: Arrive, scripted_page: str, scripted: ScriptedController, tmp_path: Path
) -> None:
    scripted.script = say("Something.")
    file = tmp_path / "volume.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((100, 50, 3), dtype=np.int16), np.diag([1.0, 4.0, 9.0, 1.0])), file)
    visitor = arrive(scripted_page)
    visitor.open(file)
    frame = visitor.tab.locator(".frame").bounding_box()
    assert frame["width"] / frame["height"] == pytest.approx(0.5, rel=0.02)
    visitor.tool("Box")
    visitor.drag((0.2, 0.5), (0.6, 0.9))
    inked = visitor.tab.evaluate(
        """() => { const canvas = document.querySelector('.frame canvas'), { width, height } = canvas;
            const ink = canvas.getContext('2d').getImageData(0, 0, width, height).data; let low = height, high = 0;
            for (let place = 3; place < ink.length; place += 4) if (ink[place]) {
                const row = Math.floor(place / 4 / width); low = Math.min(low, row); high = Math.max(high, row); }
            return [low / height, high / height]; }"""
    )
    assert inked == pytest.approx([0.5, 0.9], abs=0.03)
    visitor.ask("What is in the region?")
    rows, columns = np.nonzero(decode_rle(scripted.requests[-1].region_masks[0]))
    corners = [rows.min() / 50, columns.min() / 100, rows.max() / 50, columns.max() / 100]
    assert corners == pytest.approx([0.5, 0.2, 0.9, 0.6], abs=0.03)


def test_what_can_be_typed_into_has_an_edge(arrive: Arrive, scripted_page: str) -> None:
    visitor = arrive(scripted_page)
    visitor.tab.click("#parameters button")
    visitor.tab.wait_for_selector("#parameters textarea, #parameters input[type=text]")
    edges = visitor.tab.evaluate(
        """() => [...document.querySelectorAll('#question textarea, #parameters textarea')].map((field) =>
            getComputedStyle(field).borderTopWidth)"""
    )
    assert edges == ["1px", "1px"]


def test_every_control_has_a_name(arrive: Arrive, scripted_page: str) -> None:
    visitor = arrive(scripted_page)
    visitor.pick("Fundus")
    visitor.tab.click("#parameters button")
    visitor.tab.wait_for_selector("#parameters input[type=range]")
    nameless = visitor.tab.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, canvas')].filter((control) =>
            control.offsetParent && !(control.getAttribute('aria-label') || control.textContent.trim()
            || control.title || control.labels?.length && control.labels[0].textContent.trim())
        ).map((control) => control.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    assert "Research use only" in visitor.tab.locator("#head").inner_text()
    assert not visitor.tab.locator("footer").count()


# --- last, for it kills what the others need --------------------------------------------------------------------------


def test_a_worker_killed_while_it_answers(
    arrive: Arrive, real_page: str, stack: Launcher, wait_until: Any, tmp_path: Path
) -> None:
    visitor = arrive(real_page)
    visitor.pick("Fundus")
    worker = stack["worker 1"]
    os.kill(worker.pid, signal.SIGSTOP)  # so that the answer is certainly under way
    visitor.type("Please segment the optic disc.")
    visitor.tab.wait_for_selector(".wait")
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: not worker.running(), what="the end")
    last = visitor.tab.locator(".message.model").last
    # it either had the request, or the request waits for the next one
    wait_until(lambda: stack.restart_dead() or worker.ready(), seconds=60, what="another worker")
    last.locator(".foot").wait_for()
    if last.locator(".error").count():
        error = last.locator(".error").inner_text()
        assert error[0].isupper() and "worker" in error and error.endswith(".") and "Traceback" not in error
        visitor.shot(artefacts(tmp_path) / "killed.png")
        visitor.tab.click(".again")
    visitor.tab.wait_for_selector(".masks li")
