"""Picture of a digit in, word and spoken answer out: `pile chat --browser` in a real, headless browser.

    python benchmarks/chat_end_to_end.py runs/digits-chat [--pictures 50] [--output chat-pictures] [options of `pile chat`]

For each held-out picture a new conversation is begun on the page, the picture is sent through the field for messages, and the
answer is read off the page: the word from its text, and the sound from what the player of the page has fetched, which the judge
of the demo's evaluation (an SVM on log-mel, trained on real clips) calls a digit. Screenshots of some conversations are kept.
Counted, too: requests of the page to any other host, and errors in the browser's console.

Needs Playwright and a Chromium: `pip install playwright`, and `apt-get install chromium` or `playwright install chromium`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Page, sync_playwright  # type: ignore[import-not-found]

from pile_app.data.shards import Shards
from pile_app.documents import AUDIO, IMAGE
from pile_app.media import decode_audio
from pile_app.tasks.judges import Judge, Labelled, audio_features

RATE = 8000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def labelled(pattern: str, modality: int) -> list[tuple[bytes, str]]:
    """(file, name) of each image or sound that is followed by its name."""
    pairs = (document.segments for document in Shards(pattern))
    return [(medium.file, name.text) for medium, name in pairs if medium.modality == modality]


def make_judge(pattern: str) -> Judge:
    pairs = labelled(pattern, AUDIO)
    arrays = [decode_audio(file, RATE) for file, _ in pairs]
    return Judge(audio_features(RATE), Labelled(arrays=arrays, labels=[name for _, name in pairs]))


class Browser:
    """The page of a running `pile chat --browser`, used as a person uses it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.sounds: list[str] = []  # addresses that the players of the page have fetched since the last message
        page.on("request", lambda request: self.sounds.append(request.url) if "/sound." in request.url else None)

    def reset(self) -> None:
        self.page.click("#reset")
        self.page.wait_for_function("document.querySelectorAll('#chat .message-row').length === 0")
        self.page.wait_for_timeout(400)  # the field is emptied, too

    def send(self, text: str = "", file: Path | None = None) -> None:
        if file is not None:
            self.page.set_input_files("#message input[type=file]", str(file))
            self.page.wait_for_selector("#message .thumbnail-item, #message .thumbnail-image", timeout=20_000)
        if text:
            self.page.fill("#message textarea", text)
        self.sounds.clear()
        self.page.click("#message .submit-button")

    def wait(self, seconds: float = 60) -> None:
        """Until the answer stands still for half a second."""
        self.page.wait_for_selector("#chat .bot-row", timeout=1000 * seconds)
        last, since = "", time.monotonic()
        while time.monotonic() - since < 0.5:
            self.page.wait_for_timeout(100)
            now = self.page.inner_html("#chat")
            if now != last:
                last, since = now, time.monotonic()

    def words(self) -> str:
        return " ".join(self.page.locator("#chat .bot-row .message-content").all_inner_texts())


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"pile chat ended with {process.returncode}")
        try:
            opener.open(address, timeout=2).read()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the page did not come")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--pictures", type=int, default=50, help="held-out pictures that are shown")
    parser.add_argument("--labelled", default="data/digits_chat/shards/labelled-{}-*.tar", help="pattern; {}: train, heldout")
    parser.add_argument("--output", type=Path, default=Path("chat-pictures"), help="folder for screenshots and figures.json")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--port", type=int, default=17860)
    parser.add_argument("--temperature", type=float, default=0.5)
    options, more = parser.parse_known_args()
    options.output.mkdir(parents=True, exist_ok=True)
    judge = make_judge(options.labelled.format("train"))
    pictures = labelled(options.labelled.format("heldout"), IMAGE)
    pictures = pictures[:: max(1, len(pictures) // options.pictures)][: options.pictures]
    address = f"http://127.0.0.1:{options.port}"
    command = [sys.executable, "-m", "pile_app.cli", "chat", str(options.run), "--browser", "--port", str(options.port)]
    server = subprocess.Popen([*command, "--temperature", str(options.temperature), "--max-seconds", "1.5", *more])
    try:
        wait_for(address, server)
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
            page = chromium.new_page(viewport={"width": 1100, "height": 900})
            others: Counter[str] = Counter()
            errors: list[str] = []
            page.on("request", lambda request: others.update({urlsplit(request.url).netloc: 1}))
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            start = time.monotonic()
            page.goto(address, wait_until="load")
            page.wait_for_selector("#message textarea")
            opened = time.monotonic() - start
            page.screenshot(path=options.output / "empty.png")
            figures = use(Browser(page), pictures, judge, options.output)
            local = {urlsplit(address).netloc, ""}
            figures |= {
                "seconds_until_the_page_is_there": round(opened, 2),
                "requests_to_other_hosts": {host: count for host, count in others.items() if host not in local},
                "console_errors": sorted(set(errors)),
            }
            chromium.close()
    finally:
        server.terminate()
        server.wait()
    (options.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def use(browser: Browser, pictures: list[tuple[bytes, str]], judge: Judge, folder: Path) -> dict[str, object]:
    """Shows every picture in a conversation of its own; then one longer conversation, for the eyes."""
    words = sounds = both = 0
    waited: list[float] = []
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for number, (file, name) in enumerate(pictures):
        if number:
            browser.reset()
        picture = folder / f"shown-{number:03d}.png"
        picture.write_bytes(file)
        start = time.monotonic()
        browser.send("What is this?" if number % 2 else "", picture)
        browser.wait()
        waited.append(time.monotonic() - start)
        text, players = browser.words(), sorted(set(browser.sounds))
        said = [digit for digit in DIGITS if digit in text.lower()] == [name]
        heard = False
        if len(players) == 1:
            waveform = decode_audio(opener.open(players[0]).read(), RATE)
            heard = judge.best([waveform], 1)[0] == [name]
        words, sounds, both = words + said, sounds + heard, both + (said and heard)
        if number < 4 or not (said and heard):
            print(f"{number}: {name}, {text!r}, {players}, {heard}", file=sys.stderr, flush=True)
            browser.page.screenshot(path=folder / f"{number:03d}-{name}-{'right' if said and heard else 'wrong'}.png")
    browser.reset()
    for text, file in (("Hi!", None), ("", pictures[0][0]), ("Draw another one.", None), ("What comes next?", None)):
        browser.send(text, folder / "shown-000.png" if file is not None else None)
        browser.wait()
        browser.page.wait_for_timeout(500)
    browser.page.screenshot(path=folder / "conversation.png")
    browser.page.click("#retry")
    browser.wait()
    browser.page.click("#settings button")
    browser.page.wait_for_timeout(700)
    browser.page.screenshot(path=folder / "settings.png", full_page=True)
    total = len(pictures)
    return {
        "pictures": total,
        "word_accuracy": words / total,
        "sound_accuracy": sounds / total,
        "both": both / total,
        "median_seconds_to_the_whole_answer": round(sorted(waited)[total // 2], 2),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)),
    }


if __name__ == "__main__":
    main()
