"""`pile app`: a page for a run, by Gradio, with a tab for everything that the run can do.

Every prompt is one field that takes text, pictures and sounds. The model is loaded once. The page is for this machine only, or
asks for a password. Files that are sent and made lie in one temporary folder of the process; no telemetry is sent, and the
browser is told to load nothing from other hosts.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from html import escape
from pathlib import Path
from typing import Any

from pile_app.documents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, MODALITIES, TEXT, Document, Segment
from pile_app.model.generate import Sampling, answer_prompts
from pile_app.model.score import choose
from pile_app.records import Turn
from pile_app.tasks.chat import Conversation, Limits, Notice, check_tokenizer, read_upload
from pile_app.tasks.media_index import show_hits, show_medium
from pile_app.training.module import PileModule

USERS = 8  # requests that are answered or wait at a time; others are refused
KEPT_SECONDS = 3600  # of files
REFUSED = "Not sent"  # title of an answer that tells why a message was refused
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
CSS = """
.gradio-container { width: 100% !important; max-width: 1080px !important; margin: 0 auto !important; }
#chat img, .cards img { image-rendering: pixelated; min-width: 112px; border-radius: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem; }
.cards .card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .6rem; overflow: hidden; }
.cards img { max-width: 100%; max-height: 12rem; display: block; margin: 0 auto .4rem; }
.cards audio { width: 100%; } .cards pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.cards small { display: block; overflow-wrap: anywhere; color: var(--body-text-color-subdued); }
"""


def import_gradio() -> Any:
    """Import Gradio without telemetry. Raises ValueError with the command that installs it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from pile_app.prepare.options import require

    return require("gradio", "chat", "the page")


def make_app(module: PileModule, context: int, name: str, index: str | None = None, limits: Limits | None = None) -> Any:
    """Make the page (a `gradio.Blocks`) of a model on its device, with the context and name of its run, and an index that this
    run made, to search. Raises ValueError if Gradio is not installed, or another model made the index."""
    page, kind = Page(module, context, limits or Limits()), type(module.objective).__name__
    tabs = {"Generate": _generate_tab, "Chat": _chat_tab, "Classify": _classify_tab, "Tag": _tag_tab, "Search": _search_tab}
    first = {"Classification": "Classify", "Tagging": "Tag", "Contrastive": "Search"}.get(kind, "Generate")
    if kind != "Tagging":
        del tabs["Tag"]
    if index is not None:
        from pile_app.tasks.embed import Embedder
        from pile_app.tasks.media_index import MediaIndex

        page.index = MediaIndex(index, Embedder.of_run(name, module, context))
    else:
        del tabs["Search"]
    try:
        check_tokenizer(module.model.tokenizer)
    except ValueError:  # it cannot write who speaks
        del tabs["Chat"]
    gr = page.gr
    with gr.Blocks(title=f"Pile: {name}", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as blocks:
        gr.Markdown(f"### {escape(name)}")
        for label, fill in sorted(tabs.items(), key=lambda tab: tab[0] != first):
            with gr.Tab(label, elem_id=f"tab-{label.lower()}"):
                fill(page)
    return blocks


class Page:
    """Everything that the tabs share: Gradio, the model, limits and the index."""

    index: Any = None

    def __init__(self, module: PileModule, context: int, limits: Limits) -> None:
        self.gr, self.module, self.model, self.context, self.limits = import_gradio(), module, module.model, context, limits
        self.names = [MODALITIES[one] for one in sorted({TEXT, *self.model.vocabulary.modalities})]

    def prompt(self, label: str, id: str) -> Any:
        """A field for text, and for the media that the model reads."""
        extensions = {"image": IMAGE_EXTENSIONS, "audio": AUDIO_EXTENSIONS}
        kinds = [kind for name in self.names for kind in extensions.get(name, ())]
        sources = ["upload"] * bool(kinds) + ["microphone"] * ("audio" in self.names)
        return self.gr.MultimodalTextbox(
            elem_id=id, show_label=False, placeholder=f"{label}: {', '.join(self.names)}",
            file_types=[f".{kind}" for kind in kinds] or None, file_count="multiple",
            sources=sources, max_plain_text_length=100_000,
        )  # fmt: skip

    def document(self, sent: Mapping[str, Any], needed: bool = True) -> Document:
        """Read what was sent: files, then the text. Gradio has made sure that the files were uploaded."""
        files = list(sent.get("files") or [])
        if len(files) > self.limits.uploads:
            raise ValueError(f"{len(files)} files; at most {self.limits.uploads} can be sent")
        segments = [read_upload(Path(file).name, Path(file).read_bytes(), self.limits) for file in files]
        segments += [Segment(sent["text"])] if (sent.get("text") or "").strip() else []
        if needed and not segments:
            raise ValueError("nothing was sent: write something, or add a picture or a sound")
        return Document(tuple(segments))

    def settings(self) -> list[Any]:
        """Sliders for the arguments of `make_sampling`."""
        slider = partial(self.gr.Slider, render=False)
        return [
            slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: the most likely token"),
            slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="probability of the tokens to draw from"),
            slider(0, 5, 1, step=0.1, label="Guidance", info="weight of the prompt"),
            slider(1, max(2, self.context), min(128, self.context), step=1, label="Tokens", info="longest text"),
            slider(0.5, 30, 2, step=0.5, label="Seconds", info="longest sound"),
            self.gr.Number(0, precision=0, label="Seed", render=False),
        ]

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Show errors as messages on the page."""

        @wraps(function)
        def call(*values: Any) -> Any:
            try:
                return function(*values)
            except (ValueError, OSError) as error:  # BadSample too
                raise self.gr.Error(str(error), print_exception=False) from error

        return call


def make_sampling(temperature: float, top_p: float, guidance: float, tokens: float, seconds: float, seed: float) -> Sampling:
    return Sampling(temperature, top_p, guidance, int(tokens), seconds, int(seed or 0))


def _generate_tab(page: Page) -> None:
    gr = page.gr
    with gr.Row():
        to = gr.Radio(page.names, value=page.names[0], label="Write")
        count = gr.Slider(1, 16, 4, step=1, label="How many")
    prompt = page.prompt("A prompt, or nothing", "generate-prompt")
    settings = page.settings()
    with gr.Accordion("Settings", open=False), gr.Row():
        for setting in settings:
            setting.render()

    def generate(sent: Any, to: str, count: float, *values: float) -> str:
        prompts = [page.document(sent, needed=False)] * int(count)
        answers = answer_prompts(page.model, prompts, MODALITIES.index(to), make_sampling(*values))
        shown = (
            f"<pre>{escape(one.data)}</pre>" if isinstance(one.data, str) else show_medium(to, one.extension, one.file)
            for one in (answer.segment for answer in answers)
        )  # fmt: skip
        return '<div class="cards">' + "".join(f'<div class="card">{one}</div>' for one in shown) + "</div>"

    prompt.submit(page.call(generate), [prompt, to, count, *settings], gr.HTML(elem_id="generated"), api_visibility="private")


def _chat_tab(page: Page) -> None:
    gr = page.gr

    def reply(sent: Any, history: Sequence[Any], *values: float) -> Iterator[Any]:
        messages: list[dict[str, Any]] = []
        text = ""  # of the unfinished segment
        try:
            conversation = Conversation(page.model, page.context, page.limits, turns_of(history))
            for event in conversation.ask(page.document(sent).segments, make_sampling(*values)):
                if isinstance(event, Notice):
                    gr.Info(event.text)
                elif isinstance(event, str):
                    text += event
                    messages[len(messages) - (text != event) :] = [{"role": "assistant", "content": text}]
                elif isinstance(event.data, str):
                    text = ""
                else:
                    path = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])) / f"answer.{event.extension}"
                    path.write_bytes(event.data)
                    messages.append({"role": "assistant", "content": {"path": str(path)}})
                yield list(messages)
        except (ValueError, OSError) as error:
            yield {"role": "assistant", "content": str(error), "metadata": {"title": REFUSED}}

    gr.ChatInterface(
        reply, multimodal=True, additional_inputs=page.settings(),
        additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
        chatbot=gr.Chatbot(elem_id="chat", show_label=False, render_markdown=False, buttons=[], height=420),
        textbox=page.prompt("A message", "message"),
        analytics_enabled=False, api_visibility="private",
    )  # fmt: skip


def turns_of(history: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Make the turns of a conversation from the messages of a page, without those that were refused."""
    turns: list[Turn] = []
    for message in history:
        if (message.get("metadata") or {}).get("title") == REFUSED:
            turns.pop()
            continue
        segments: list[Segment] = []
        for part in message["content"] if isinstance(message["content"], list) else [message["content"]]:
            file = part.get("file", part).get("path") if isinstance(part, Mapping) else None
            if file is None:
                segments.append(Segment(part if isinstance(part, str) else part["text"]))
            else:
                segments.append(read_upload(Path(file).name, Path(file).read_bytes()))
        if turns and turns[-1].role == message["role"]:
            segments = [*turns.pop().segments, *segments]
        turns.append(Turn(message["role"], tuple(segments)))
    return turns


def _classify_tab(page: Page) -> None:
    gr, objective = page.gr, page.module.objective
    is_classifier = type(objective).__name__ == "Classification"
    labels = gr.Textbox(label="Labels", placeholder="positive, negative", visible=not is_classifier, elem_id="labels")
    prompt = page.prompt("What to label", "classify-prompt")

    def classify(sent: Any, labels: str) -> dict[str, float]:
        document = page.document(sent)
        if is_classifier:
            return dict(zip(objective.labels, objective.predict(page.model, [document])[0].tolist(), strict=True))  # type: ignore
        names = [label.strip() for label in labels.split(",") if label.strip()]
        scores = choose(page.model, [document], names)[0].log_probabilities
        return dict(zip(names, scores.softmax(-1).tolist(), strict=True))

    found = gr.Label(label="Label", elem_id="label")
    prompt.submit(page.call(classify), [prompt, labels], found, api_visibility="private")


def _tag_tab(page: Page) -> None:
    from pile_app.tasks.tagging import split_parts, tag_documents

    text = page.gr.Textbox(label="Text", lines=4, elem_id="tag-text")

    def tag(text: str) -> list[tuple[str, str | None]]:
        parts = list(split_parts(tag_documents(page.module, [page.document({"text": text})], page.context)[0]))
        if not any(label for _, label in parts):
            page.gr.Info("no names were found")
        return parts

    button = page.gr.Button("Find the names", variant="primary", elem_id="tag")
    found = page.gr.HighlightedText(label="Entities", elem_id="entities", show_legend=True)
    button.click(page.call(tag), [text], found, api_visibility="private")


def _search_tab(page: Page) -> None:
    gr = page.gr
    with gr.Row():
        to = gr.Radio(["all", *page.names], value="all", label="Find")
        count = gr.Slider(1, 50, 12, step=1, label="How many")
    prompt = page.prompt(f"Search {len(page.index):,} entries by", "search-prompt")

    def search(sent: Any, to: str, count: float) -> str:
        hits = page.index.find(page.document(sent), int(count), None if to == "all" else to)
        return f'<div class="cards">{show_hits(hits)}</div>'

    prompt.submit(page.call(search), [prompt, to, count], gr.HTML(elem_id="found"), api_visibility="private")


class Policy:
    """ASGI middleware: tell the browser to load nothing from other hosts."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = {b"content-security-policy": POLICY.encode(), b"referrer-policy": b"no-referrer"}
                message["headers"] = [*message["headers"], *headers.items()]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(make: Callable[[], Any], host: str, port: int, password: str | None = None, block: bool = True) -> Callable[[], None]:
    """Serve a page until it is interrupted; return a function that ends it, at once if not `block`. `make` makes the page. If
    the host is not this machine, a password is asked for: the given one, PILE_PASSWORD, or a random one that is printed."""
    gr = import_gradio()
    from starlette.middleware import Middleware

    folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="pile-app-")  # for this user only
    page = make()
    password = password or os.environ.get("PILE_PASSWORD")
    if password is None and not is_this_machine(host):
        password = secrets.token_urlsafe(9)
        print(f"log in as 'pile' with the password '{password}'")
    font = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]

    def stop() -> None:
        page.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)

    page.queue(max_size=USERS, default_concurrency_limit=1, api_open=False)
    try:
        page.launch(
            server_name=host, server_port=port, auth=("pile", password) if password else None,
            max_file_size=Limits.upload_bytes, css=CSS, app_kwargs={"middleware": [Middleware(Policy)]},
            theme=gr.themes.Soft(primary_hue="indigo", font=font, font_mono=["ui-monospace", "monospace"]),
            state_session_capacity=16 * USERS, prevent_thread_lock=True, share=False, ssr_mode=False, run_history=False,
            enable_monitoring=False, footer_links=[], quiet=True,
        )  # fmt: skip
        print(f"open http://{host}:{port} (Ctrl-C ends it)", flush=True)
        if block:
            page.block_thread()
    finally:
        if block:
            stop()
    return stop
