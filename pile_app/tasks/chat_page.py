"""`pile chat --browser`: a conversation as a page, by Gradio.

The page is for this machine alone unless another host is named. Files that are sent and written lie in one folder of the
process, each under a name that cannot be guessed, and go when the process ends, or an hour after they were made; `Guard` lets
nothing else be read. No telemetry is sent, and the browser is told to fetch nothing from any other host.
"""

from __future__ import annotations

import html
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pile_app.documents import AUDIO_EXTENSIONS, IMAGE, IMAGE_EXTENSIONS, Segment
from pile_app.model.generate import Sampling
from pile_app.tasks.chat import Conversation, Limits, Notice, read_upload, shown_image

KEPT_SECONDS = 3600  # of files, and of conversations that nobody has open
SHOWN_EVERY = 0.1  # seconds between two looks at a text that is being written
POLICY = (
    # Content-Security-Policy
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
# What the page needs of what Gradio serves; its proxies, monitoring, galleries and editors are not for our users.
PATHS = ("/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json", "/login_check")
FOLDERS = ("/assets/", "/static/", "/svelte/")
API = (
    "app_id",
    "heartbeat",
    "info",
    "queue",
    "run",
    "startup-events",
    "upload",
    "upload_progress",
    "cancel",
    "reset",
    "theme.css",
)
CSS = """
.gradio-container { width: 100% !important; max-width: 1080px !important; margin: 0 auto !important; }
#chat button[aria-label="Share"], #chat button[aria-label="Clear"] { display: none; }  /* they know nothing of our session */
#notice { min-height: 1.6em; color: var(--body-text-color-subdued); font-size: 0.9em; }
#chat .minimal-audio-player { height: 56px !important; }
#chat img { border-radius: 8px; }
"""


def import_gradio() -> Any:
    """Gradio, told to phone nobody. Raises `ValueError` with the command that installs it where it is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from pile_app.prepare.options import require

    return require("gradio", "chat", "the page")


@dataclass
class Session:
    """What the server keeps of one open page: the conversation, and whether its answer is to be broken off."""

    conversation: Conversation
    stop: threading.Event = field(default_factory=threading.Event)

    def __deepcopy__(self, _: Any) -> Session:  # Gradio copies initial values; the model is not to be copied
        return self


class Guard:
    """ASGI middleware: only what the page needs; files only from `folder`, links followed; uploads only while there is room."""

    def __init__(self, app: Any, folder: str, room: int) -> None:
        self.app, self.folder, self.room = app, os.path.realpath(folder), room

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = {
                    "content-security-policy": POLICY,
                    "referrer-policy": "no-referrer",
                    "x-content-type-options": "nosniff",
                }
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in added.items())]
            await send(message)

        path: str = scope["path"]
        if not self.allows(path):
            await _refuse(send_with_policy, 403, "not served here")
        elif path.startswith("/gradio_api/upload") and scope["method"] == "POST" and self.used() > self.room:
            await _refuse(send_with_policy, 507, "too many files were sent: try again later")
        else:
            await self.app(scope, receive, send_with_policy)

    def allows(self, path: str) -> bool:
        if path in ("/", *PATHS):
            return True
        if path.startswith(FOLDERS):
            return ".." not in path
        place = path.removeprefix("/gradio_api/")
        if place == path:
            return False
        if place.startswith("file="):
            real = os.path.realpath(place.removeprefix("file="))
            return real.startswith(self.folder + os.sep) and os.path.isfile(real)
        return place.split("/", 1)[0] in API

    def used(self) -> int:
        """Bytes of all files that were sent or written."""
        return sum(file.stat().st_size for file in Path(self.folder).rglob("*") if file.is_file())


async def _refuse(send: Any, status: int, text: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text.encode()})


def serve(
    begin: Callable[[], Conversation], sampling: Sampling, name: str, host: str, port: int, users: int, block: bool = True
) -> Any:
    """Serves the page until it is interrupted.

    Args:
        begin: makes a new conversation.
        sampling: the settings that a page opens with.
        name: of the model, to show.
        host: address to bind to.
        port: to bind to.
        users: most messages that are answered or wait at a time.
        block: False returns what `stop` takes, at once.
    """
    import_gradio()
    from starlette.middleware import Middleware

    folder = Path(tempfile.mkdtemp(prefix="pile-chat-"))  # for this user alone
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    limits = begin().limits
    page, looks = make_page(begin, sampling, name, folder)
    page.queue(max_size=users, default_concurrency_limit=1, api_open=False)
    room = 4 * users * limits.uploads * limits.upload_bytes
    try:
        page.launch(
            **looks,
            server_name=host,
            server_port=port,
            max_file_size=limits.upload_bytes,
            state_session_capacity=16 * users,
            app_kwargs={"middleware": [Middleware(Guard, folder=str(folder), room=room)]},
            prevent_thread_lock=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            quiet=True,
        )
        print(f"open http://{host}:{port} (Ctrl-C ends it)", flush=True)
        if block:
            page.block_thread()
    finally:
        if block:
            stop(page)
    return page


def stop(page: Any) -> None:
    """Ends the server and removes the files of its conversations."""
    page.close(verbose=False)
    shutil.rmtree(page.pile_folder, ignore_errors=True)


def make_page(begin: Callable[[], Conversation], sampling: Sampling, name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """(the page, how it looks)"""
    gr = import_gradio()
    show = Display(begin, folder)
    modalities = begin().model.vocabulary.modalities
    kinds = [f".{one}" for one in (IMAGE_EXTENSIONS if 1 in modalities else ()) + (AUDIO_EXTENSIONS if 2 in modalities else ())]
    sources = [*(["upload"] if kinds else []), *(["microphone"] if 2 in modalities else [])]
    with gr.Blocks(title=f"Pile: {name}", analytics_enabled=False, fill_height=True, delete_cache=(600, KEPT_SECONDS)) as page:
        session = gr.State(None, time_to_live=KEPT_SECONDS)
        gr.Markdown(f"### {html.escape(name)}")
        chat = gr.Chatbot(
            elem_id="chat", show_label=False, scale=1, min_height=420, render_markdown=False, buttons=[], layout="bubble",
            placeholder="Write something, drop a picture, or record a sound.", group_consecutive_messages=True,
        )  # fmt: skip
        notice = gr.HTML("", elem_id="notice")
        message = gr.MultimodalTextbox(
            elem_id="message", show_label=False, placeholder="Write a message …", sources=sources or None,
            file_count="multiple", file_types=kinds or None, max_plain_text_length=100_000, autofocus=True,
        )  # fmt: skip
        with gr.Row():
            halt = gr.Button("Stop", elem_id="stop", size="sm")
            retry = gr.Button("Retry", elem_id="retry", size="sm")
            reset = gr.Button("New conversation", elem_id="reset", size="sm")
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            with gr.Row():
                temperature = gr.Slider(0, 2, sampling.temperature, step=0.05, label="Temperature", info="0: the most likely")
                top_p = gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="Top-p", info="share of the most likely tokens")
                guidance = gr.Slider(0, 5, sampling.guidance, step=0.1, label="Guidance", info="weight of what you said")
            with gr.Row():
                seconds = gr.Slider(0.5, 30, sampling.max_seconds, step=0.5, label="Seconds", info="longest sound of an answer")
                seed = gr.Number(sampling.seed, precision=0, label="Seed", info="of the draws")
        settings = [temperature, top_p, guidance, seconds, seed]
        shown = [chat, session, message, notice]

        def chosen(temperature: float, top_p: float, guidance: float, seconds: float, seed: float) -> Sampling:
            return replace(
                sampling, temperature=temperature, top_p=top_p, guidance=guidance, max_seconds=seconds, seed=int(seed or 0)
            )

        def ask(sent: Any, history: Any, session: Session | None, *values: float) -> Iterator[Any]:
            yield from show.ask(sent, history, session, chosen(*values))

        def again(history: Any, session: Session | None, *values: float) -> Iterator[Any]:
            yield from show.retry(history, session, chosen(*values))

        hidden: dict[str, Any] = {"api_visibility": "private"}
        message.submit(ask, [message, chat, session, *settings], shown, show_progress="hidden", **hidden)
        retry.click(again, [chat, session, *settings], shown, show_progress="hidden", **hidden)
        halt.click(show.stop, [session], None, queue=False, **hidden)
        reset.click(show.reset, [session], shown, queue=False, **hidden)
    page.pile_folder = folder
    font = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    looks = {"theme": gr.themes.Soft(primary_hue="indigo", font=font, font_mono=["ui-monospace", "monospace"]), "css": CSS}
    return page, looks


class Display:
    """Events of a conversation as messages of a page.

    Each handler yields (messages, session, what stands in the field for the next message, notice).
    """

    def __init__(self, begin: Callable[[], Conversation], folder: Path) -> None:
        self.begin, self.folder = begin, folder

    def ask(self, sent: Any, history: Any, session: Session | None, sampling: Sampling) -> Iterator[Any]:
        session = session or Session(self.begin())
        history = list(history or [])
        try:
            segments = [self._received(path, session.conversation.limits) for path in sent.get("files") or []]
            if text := (sent.get("text") or "").strip():
                segments.append(Segment(text))
            events = session.conversation.ask(segments, sampling)
            first = next(events, None)  # what is refused is refused here, and stays in the field
        except (ValueError, OSError) as error:
            yield history, session, sent, _note(str(error))
            return
        history += [self._message("user", segment) for segment in segments]
        yield from self._shown(events, first, history, session)

    def retry(self, history: Any, session: Session | None, sampling: Sampling) -> Iterator[Any]:
        session = session or Session(self.begin())
        history = list(history or [])
        try:
            events = session.conversation.retry(sampling)
            first = next(events, None)
        except ValueError as error:
            yield history, session, _EMPTY, _note(str(error))
            return
        while history and history[-1]["role"] == "assistant":
            history.pop()
        yield from self._shown(events, first, history, session)

    def stop(self, session: Session | None) -> None:
        if session is not None:
            session.stop.set()

    def reset(self, session: Session | None) -> tuple[Any, ...]:
        self.stop(session)
        return [], None, _EMPTY, ""

    def _shown(self, events: Iterator[Any], first: Any, history: list[Any], session: Session) -> Iterator[Any]:
        session.stop.clear()
        notice, text, last = "", "", 0.0
        yield history, session, _EMPTY, ""
        try:
            event = first
            while event is not None and not session.stop.is_set():
                if isinstance(event, Notice):
                    notice = _note(event.text)
                elif isinstance(event, str):
                    if not text:
                        history = [*history, {"role": "assistant", "content": ""}]
                    text += event
                    history[-1] = self._message("assistant", Segment(text))
                elif event.extension == "txt":
                    text = ""
                else:
                    history = [*history, self._message("assistant", event)]
                if not isinstance(event, str) or time.monotonic() - last > SHOWN_EVERY:
                    last = time.monotonic()
                    yield history, session, _EMPTY, notice
                event = next(events, None)
            if event is not None:
                notice = _note("Broken off.")
        finally:
            events.close()  # type: ignore[attr-defined]
        yield history, session, _EMPTY, notice

    def _received(self, path: str, limits: Limits) -> Segment:
        """A file that was sent. Gradio has put it into our folder; anything else is refused."""
        real = os.path.realpath(path)
        if not real.startswith(os.path.realpath(self.folder) + os.sep) or not os.path.isfile(real):
            raise ValueError(f"{Path(path).name} was not sent with this message")
        if os.path.getsize(real) > limits.upload_bytes:
            raise ValueError(f"{Path(path).name} has more than {limits.upload_bytes / 1e6:.1f} MB")
        return read_upload(Path(path).name, Path(real).read_bytes(), limits)

    def _message(self, role: str, segment: Segment) -> dict[str, Any]:
        if isinstance(segment.data, str):
            return {"role": role, "content": html.escape(segment.data, quote=False)}
        is_image = segment.modality == IMAGE
        path = self.folder / secrets.token_hex(16) / f"{'picture.png' if is_image else 'sound.' + segment.extension}"
        path.parent.mkdir()
        path.write_bytes(shown_image(segment) if is_image else segment.file)
        return {"role": role, "content": {"path": str(path), "alt_text": "picture" if is_image else "sound"}}


_EMPTY = {"text": "", "files": []}


def _note(text: str) -> str:
    return f"<span>{html.escape(text)}</span>"
