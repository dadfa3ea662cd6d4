"""Layout of the page, and the handler of each control."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from model.serve.web import view
from model.serve.web.chat import Parameters
from model.serve.web.handlers import Handlers, Parts
from model.serve.web.state import AWAY_SECONDS, IDLE_SECONDS, Session, Sessions

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr

_ASSETS = Path(__file__).parent / "assets"
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
TITLE = "MedPLIB"
MAX_EVENTS = 200
"""Answers and other events under way at once; the rest wait. Each takes a thread, most of which wait themselves."""
_EVERYTHING = Parts({"viewer", "talk", "masks", "notice", "buttons", "volume", "models", "shading"})
_HEAD = (
    '<div class="title"><h1>MedPLIB</h1><p><strong>Research use only.</strong> '
    "Not a medical device; not for diagnosis or treatment.</p></div>"
)
_VIEWER = """<section class="viewer" aria-label="Image">
<div class="tools" role="toolbar" aria-label="Mark a region" hidden>
<button type="button" data-tool="look">View</button><button type="button" data-tool="point">Point</button>
<button type="button" data-tool="box">Box</button><button type="button" data-tool="free">Free-hand</button>
<span class="gap"></span>
<button type="button" data-act="undo">Undo</button><button type="button" data-act="clear">Clear marks</button></div>
<div class="frame"><img alt=""><canvas tabindex="0" role="application"
aria-label="Mark regions in the image: arrow keys move, Enter marks, Escape gives up"></canvas>
<div class="nothing"><b>Drop an image here</b><small>or open one: PNG, JPEG, TIFF, DICOM, NIfTI</small></div></div>
<div class="below"><p class="hint" aria-live="polite"></p><p class="caption"></p></div></section>"""
_TALK = """<section class="talk" aria-label="Conversation"><div class="scroll" tabindex="0">
<ol role="log" aria-live="polite"></ol>
<div class="start"><p></p><div class="suggestions"></div></div></div></section>"""
_MASKS = """<section class="masks" aria-label="Masks" hidden>
<h2>Masks</h2><ul></ul><div class="files"></div></section>"""
_SOURCE = """<section class="source" aria-label="Choose an image" data-limit="LIMIT">
<input type="file" hidden tabindex="-1" aria-label="Image file">
<button type="button" class="open">Open image…</button><div class="strip"></div></section>"""
_NOTICE = """<section class="notice" role="alert" hidden><p></p></section>"""
_ALONE = "This model was trained on single questions; it answers best when each stands alone."
_SMALL = (
    "<p id=\"small\">Answers may be wrong while sounding sure; a mask's score is the model's own guess. "
    f"Images and answers stay in this server's memory, up to {AWAY_SECONDS / 60:.0f} minutes after you leave and "
    f"{IDLE_SECONDS / 60:.0f} minutes without use; the image you ask about is sent to the model's server.</p>"
)
_LOST = "The image and the conversation from before are gone: the page was started again, or you were away too long."
_TAB = re.compile(r"[0-9a-f]{32}")
_FOCUS_JS = """() => { if (!matchMedia('(pointer: coarse)').matches)  // where it would open a keyboard
    document.querySelector('#question textarea')?.focus({ preventScroll: true }); }"""


class Page:
    """Layout and wiring.

    Args:
        handlers: do what visitors ask for.
        regions: whether regions can be marked.
        reload: list the models anew whenever the page is opened.
    """

    def __init__(self, handlers: Handlers, regions: bool, reload: bool) -> None:
        self.handlers, self.regions, self.reload_models = handlers, regions, reload
        self.sessions = Sessions()
        with gr.Blocks(title=TITLE, analytics_enabled=False) as self.blocks:
            self._lay_out()
            self._wire()
        self.blocks.max_threads = MAX_EVENTS
        self.blocks.state_session_capacity = self.sessions.capacity  # what gradio remembers of each visitor
        self.blocks.queue(default_concurrency_limit=None, max_size=2 * MAX_EVENTS, api_open=False)

    # --- where everything is ------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        self.tab = gr.Textbox(visible=False)
        with gr.Row(elem_id="head"):
            gr.HTML(_HEAD, js_on_load=None, apply_default_css=False, elem_classes=["plain"])
            with gr.Row(elem_id="picker"):
                self.model = gr.Dropdown(label="Model", choices=[], allow_custom_value=True, min_width=120)
                self.reload = gr.Button("Reload", size="sm")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=6, min_width=340, elem_id="left"):
                self._lay_out_picture()
            with gr.Column(scale=5, min_width=340, elem_id="right"):
                self._lay_out_talk()

    def _lay_out_picture(self) -> None:
        template = _SOURCE.replace("LIMIT", str(self.handlers.limits.max_upload_bytes))
        shown = [{"label": example.label, "thumbnail": example.thumbnail} for example in self.handlers.examples]
        self.source = _own("source", template, shown)
        self.notice = _own("notice", _NOTICE, "")
        self.viewer = _own("viewer", _VIEWER, view.viewer(Session(), self.regions))
        with gr.Group(visible=False) as self.volume:
            self.plane = gr.Radio(label="Plane", choices=[], visible=False)
            self.slice = gr.Slider(1, 2, 1, step=1, label="Slice", visible=False, buttons=[])
            with gr.Row():
                self.centre = gr.Slider(-1, 1, 0, label="Window level", visible=False, min_width=140, buttons=[])
                self.width = gr.Slider(0, 1, 1, label="Window width", visible=False, min_width=140, buttons=[])
        self.masks = _own("masks", _MASKS, view.masks(Session()))
        with gr.Row(visible=False) as self.shading:
            self.opacity = gr.Slider(0, 1, 0.4, step=0.05, label="Mask opacity", min_width=200, scale=3, buttons=[])
            self.contour = gr.Checkbox(True, label="Outlines", min_width=110, scale=1)

    def _lay_out_talk(self) -> None:
        self.talk = _own("talk", _TALK, view.talk(Session()))
        with gr.Row(elem_id="ask-row"):
            self.question = gr.Textbox(
                label="Question",
                placeholder="Ask about the image, or name what to segment",
                lines=1,
                max_lines=5,
                elem_id="question",
            )
            self.send = gr.Button("Ask", variant="primary", elem_id="send")
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
        with gr.Row(elem_id="conversation"):
            self.remember = gr.Checkbox(
                False, label="Remember earlier questions", info=_ALONE, elem_id="remember", min_width=220
            )
            self.forget = gr.Button("Clear conversation", size="sm", elem_id="forget")
        most = self.handlers.limits.max_new_tokens
        with gr.Accordion("Parameters", open=False, elem_id="parameters"):
            self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 gives the likeliest answer.")
            self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="Only with a temperature above 0.")
            self.max_tokens = gr.Slider(1, most, min(256, most), step=1, label="Longest answer, in tokens")
            self.threshold = gr.Slider(0, 0.95, 0, step=0.05, label="Mask threshold", info=_threshold_info(None))
            self.seed = gr.Textbox(
                label="Seed", info="A whole number; left empty, every answer has a new one.", max_length=20
            )
        gr.HTML(_SMALL, js_on_load=None, apply_default_css=False, elem_classes=["plain"])

    # --- what calls what ----------------------------------------------------------------------------------------------

    def _wire(self) -> None:
        handlers = self.handlers
        arriving = {"js": asset("arrive.js"), "show_progress": "hidden", "api_visibility": "private"}
        self.blocks.load(self._arrive, self.tab, self._outputs, **arriving)
        self.blocks.unload(self._leave)
        self.model.change(self._set_memory, self.model, self.remember, show_progress="hidden", api_visibility="private")
        self._on(self.reload.click, handlers.look_for_models, self.model)
        self._on(self.model.input, handlers.choose_model, self.model)
        self._on_data(self.source.upload, handlers.open_upload)
        self._on_data(self.source.select, lambda session, data: handlers.open_example(session, data.get("index")))
        self._on_data(self.viewer.select, handlers.mark)
        self._on_data(self.viewer.undo, lambda session, _: handlers.unmark(session, False))
        self._on_data(self.viewer.clear, lambda session, _: handlers.unmark(session, True))
        for control in (self.slice, self.centre, self.width):
            self._on(control.input, handlers.turn_to, self.slice, self.centre, self.width, latest=True)
        self._on(self.plane.input, handlers.cut, self.plane)
        for shading in (self.opacity, self.contour):
            self._on(shading.input, handlers.shade, self.opacity, self.contour, latest=True)
        self._on_data(
            self.masks.select, lambda session, data: handlers.show_mask(session, data.get("id"), data.get("shown"))
        )
        self._on_data(self.talk.like, lambda session, data: handlers.vote(session, data.get("id"), data.get("vote")))
        self._on(self.stop.click, handlers.stop)
        self._on(self.forget.click, handlers.forget)
        self._wire_answers()

        def download(event: gr.EventData, request: gr.Request) -> dict[Any, Any]:
            session = self._session(request)
            parts, file = self.handlers.download(session, _data(event).get("kind"))
            return self._shown(parts, session, file)

        self._listen(self.masks.download, download, [])

    def _wire_answers(self) -> None:
        drawn = [self.temperature, self.top_p, self.max_tokens, self.threshold, self.seed, self.remember]

        def answering(begin: Callable[..., Iterator[Parts]], *typed: Any) -> tuple[Callable[..., Any], list[Any]]:
            """What shows an answer as it grows, and its inputs; ``begin`` takes session, typed texts, parameters."""

            def run(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
                session, texts = self._session(request), [text or "" for text in values[: len(typed)]]
                temperature, top_p, longest, threshold, seed, remember = values[len(typed) :]
                parameters = Parameters(temperature, top_p, int(longest), threshold, seed or "", remember)
                for parts in begin(session, *texts, parameters):
                    yield self._shown(parts, session)

            return run, [*typed, *drawn]

        def suggest(event: gr.EventData) -> dict[Any, Any]:
            return {self.question: str(_data(event).get("text", ""))[:500]}

        for asked in (self.question.submit, self.send.click):
            self._listen(asked, *answering(self.handlers.ask, self.question, self.model))
        for pressed in (self.send.click, self.stop.click, self.talk.retry):  # a button that is hidden loses the focus
            pressed(None, js=_FOCUS_JS, show_progress="hidden", api_visibility="private")
        self._listen(self.talk.retry, *answering(self.handlers.ask_again, self.model))
        self._listen(self.talk.example_select, suggest, [])

    def _on(self, event: Any, act: Callable[..., Parts], *inputs: Any, latest: bool = False) -> None:
        """Call ``act(session, *values of the inputs)`` when the event happens."""

        def run(request: gr.Request, *values: Any) -> dict[Any, Any]:
            session = self._session(request)
            return self._shown(act(session, *values), session)

        self._listen(event, run, list(inputs), latest)

    def _on_data(self, event: Any, act: Callable[..., Parts]) -> None:
        """Call ``act(session, data)`` when one of our own components sends an event."""

        def run(event: gr.EventData, request: gr.Request) -> dict[Any, Any]:
            session = self._session(request)
            return self._shown(act(session, _data(event)), session)

        self._listen(event, run, [])

    def _listen(self, event: Any, run: Callable[..., Any], inputs: list[Any], latest: bool = False) -> None:
        event(
            run,
            inputs,
            self._outputs,
            show_progress="hidden",
            trigger_mode="always_last" if latest else "multiple",
            api_visibility="private",
        )

    def _arrive(self, tab: str, request: gr.Request) -> dict[Any, Any]:
        known = tab.removesuffix("+") if _TAB.fullmatch((tab or "").removesuffix("+")) else ""
        name = request.session_hash
        session, found = self.sessions.arrive(name, known) if name else (Session(), False)
        parts = _EVERYTHING
        if self.reload_models or not self.handlers.models:
            parts |= self.handlers.look_for_models(session, session.model, refresh=False)
        if known != tab and known and not found:
            session.notice = f"{_LOST} {session.notice}".strip()
        return self._shown(parts, session)

    def _set_memory(self, model: str | None, request: gr.Request) -> Any:
        """Whether earlier questions are sent along: as the visitor last asked the model, else as it was trained."""
        turns = self.handlers.conversation_turns(model or "")
        info = _ALONE if turns == 1 else f"This model was trained on conversations of up to {turns} questions."
        return gr.update(value=self._session(request).remembers.get(model or "", turns > 1), info=info)

    def _leave(self, request: gr.Request) -> None:
        if request.session_hash:
            self.sessions.leave(request.session_hash)

    def _session(self, request: gr.Request) -> Session:
        """The visitor's; one that lasts only where the request names its page."""
        return self.sessions.of(request.session_hash) if request.session_hash else Session()

    # --- what is shown anew -------------------------------------------------------------------------------------------

    @property
    def _outputs(self) -> list[Any]:
        volume = [self.volume, self.plane, self.slice, self.centre, self.width]
        own = [self.viewer, self.talk, self.masks, self.notice]
        shading = [self.shading, self.opacity, self.contour]
        return [*own, *volume, *shading, self.question, self.send, self.stop, self.model, self.threshold]

    def _shown(self, parts: Parts, session: Session, file: dict[str, Any] | None = None) -> dict[Any, Any]:
        """New values of the parts' components."""
        with session.lock:
            shown: dict[Any, Any] = {}
            if "viewer" in parts:
                shown[self.viewer] = view.viewer(session, self.regions)
            if "talk" in parts:
                shown[self.talk] = view.talk(session, self._questions(session))
            if "masks" in parts:
                shown[self.masks] = view.masks(session, file)
                shown[self.shading] = gr.update(visible=bool(session.masks_here()))
            if "notice" in parts:
                shown[self.notice] = session.notice
            if "buttons" in parts:
                shown[self.send] = gr.update(visible=not session.busy)
                shown[self.stop] = gr.update(visible=session.busy)
            if "question" in parts:
                shown[self.question] = ""
            if "models" in parts:
                models = self.handlers.models
                chosen = session.model if session.model in models else models[0] if models else None
                shown[self.model] = gr.update(choices=models, value=chosen)
                own = self.handlers.client.mask_thresholds.get(chosen or "")
                shown[self.threshold] = gr.update(info=_threshold_info(own))
            if "shading" in parts:
                shown |= {self.opacity: session.opacity, self.contour: session.contour}
            if "volume" in parts:
                shown |= self._volume(session)
            return shown or {self.notice: session.notice}  # gradio wants something

    def _questions(self, session: Session) -> tuple[str, ...]:
        name = session.picture.volume.name if session.picture is not None else ""
        return next((one.questions for one in self.handlers.examples if one.path.name == name), ())

    def _volume(self, session: Session) -> dict[Any, Any]:
        picture = session.picture
        if picture is None:
            return {self.volume: gr.update(visible=False)}
        volume = picture.volume
        several, planes = volume.num_slices > 1, list(volume.planes)
        shown = {
            self.volume: gr.update(visible=several or volume.window is not None or len(planes) > 1),
            self.plane: gr.update(choices=planes, value=volume.plane, visible=len(planes) > 1),
            self.slice: gr.update(maximum=max(2, volume.num_slices), value=picture.index + 1, visible=several),
            self.centre: gr.update(visible=volume.window is not None),
            self.width: gr.update(visible=volume.window is not None),
        }
        if volume.window is not None:
            centre, width = picture.window or volume.window
            step = _step(width)
            reach = 2 * max(width, abs(centre))
            lowest, highest, widest = (_tidy(value) for value in (centre - reach, centre + reach, 4 * width))
            shown[self.centre] = gr.update(minimum=lowest, maximum=highest, value=centre, step=step, visible=True)
            shown[self.width] = gr.update(minimum=step, maximum=widest, value=width, step=step, visible=True)
        return shown


@cache
def asset(name: str) -> str:
    """Text of a file of ``assets``."""
    return (_ASSETS / name).read_text(encoding="utf-8")


def _own(name: str, template: str, value: Any) -> gr.HTML:
    """One of our own parts: fixed markup, and a script that shows its value."""
    return gr.HTML(
        value,
        html_template=template,
        js_on_load=asset(f"{name}.js"),
        apply_default_css=False,
        elem_id=name,
        elem_classes=["plain"],
    )


def _data(event: gr.EventData) -> dict[str, Any]:
    data = event._data
    return data if isinstance(data, dict) else {}


def _threshold_info(own: float | None) -> str:
    return f"0 is the model's own{f' ({own:g})' if own else ''}; a higher one makes masks smaller."


def _step(width: float) -> float:
    """A step that a slider of this width is moved by: a power of ten, about a five-hundredth."""
    step = 1.0
    while step > width / 200:
        step = _tidy(step / 10)
    return step


def _tidy(value: float) -> float:
    """Without what binary fractions leave behind, so that it can be read beside a slider."""
    return float(f"{value:.9g}")


def mounted(page: Page, app: Any, root_path: str = "") -> Any:
    """The page at the root of an ASGI application, which a proxy may show at a sub-path, without gradio's extras."""
    sizes, colors = gr.themes.sizes, gr.themes.colors
    theme = gr.themes.Base(  # nothing of it is fetched from anywhere
        primary_hue=colors.teal,
        neutral_hue=colors.slate,
        spacing_size=sizes.spacing_md,
        radius_size=sizes.radius_md,
        font=_FONTS,
        font_mono=_MONO,
    )
    return gr.mount_gradio_app(
        app,
        page.blocks,
        path="",
        root_path=root_path or None,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme.set(**json.loads(asset("theme.json"))),
        css=asset("style.css"),
    )
