"""The promises of `pile chat`: turns and answers, dropped turns with a notice, refusals."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TinyRun, train

from pile_app.cli import main
from pile_app.data.tokenizers import ByteTokenizer, load_tokenizer, train_tokenizer
from pile_app.documents import AUDIO, IMAGE, TEXT, Document, Segment
from pile_app.model.backbones import LSTM
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling
from pile_app.records import MARKERS, Turn, conversation_prompt
from pile_app.tasks import chat
from pile_app.tasks.chat import Conversation, Limits, Notice, Terminal, check_tokenizer, prompt_length, read_upload
from pile_app.vocabulary import Vocabulary

MakeModel = Callable[..., FusedLanguageModel]
MakeSegment = Callable[..., Segment]
SAMPLING = Sampling(max_text=8, max_seconds=0.2)


@pytest.fixture
def talker(tiny_model: MakeModel) -> FusedLanguageModel:
    """A model that answers with letters, pictures and sounds, and now and then gives the word back."""
    model = tiny_model()
    bias = torch.zeros(Vocabulary.SPECIALS + 256)
    bias[[Vocabulary.SPECIALS + ord(letter) for letter in "abcdefgh"]] = 7.0
    bias[list(Vocabulary.OPENERS)] = 6.0
    bias[Vocabulary.SPECIALS + 2] = 5.5
    logits = model.logits
    model.logits = lambda hidden, modality: logits(hidden, modality) + (bias if modality == TEXT else 0)  # type: ignore
    return model


def test_an_answer_comes_in_pieces_and_segments_and_becomes_a_turn(talker: FusedLanguageModel, image: MakeSegment) -> None:
    seen = set()
    for seed in range(8):
        conversation = Conversation(talker, context=400)
        text, segments = "", []
        for event in conversation.ask([image(0), Segment("What is this?")], Sampling(max_text=8, max_seconds=0.2, seed=seed)):
            if isinstance(event, str):
                text += event
            elif isinstance(event, Segment):
                segments.append(event)
                seen.add(event.modality)
        assert text == "".join(segment.text for segment in segments if segment.modality == TEXT)
        assert not any(marker in text for marker in MARKERS)
        assert conversation.turns[0] == Turn("user", (image(0), Segment("What is this?")))
        assert conversation.turns[1:] == ([Turn("assistant", tuple(segments))] if segments else [])
    assert seen == {TEXT, IMAGE, AUDIO}


def test_old_turns_are_dropped_whole_and_that_is_said(talker: FusedLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(talker, context=100)  # 75 positions for the question
    prompts: list[Document] = []
    made = chat.generate_document
    monkeypatch.setattr(
        chat,
        "generate_document",
        lambda model, prompt, *rest, **named: prompts.append(prompt) or made(model, prompt, *rest, **named),
    )
    for number in range(6):
        before = list(conversation.turns)
        events = list(conversation.ask([Segment(f"message {number}")], SAMPLING))
        notices = [event.text for event in events if isinstance(event, Notice) and "sees" in event.text]
        turns = [*before, Turn("user", (Segment(f"message {number}"),))]
        assert prompt_length(talker, prompts[-1]) <= 75
        kept = [first for first in range(len(turns)) if conversation_prompt(turns[first:]) == prompts[-1]]
        assert kept and turns[kept[0]].role == "user", "whole turns, from a question on"
        assert bool(notices) == bool(kept[0])
        if notices:
            assert f"first {kept[0]} of {len(turns)} turns" in notices[0]
            assert prompt_length(talker, conversation_prompt(turns[max(0, kept[0] - 2) :])) > 75, "no more than needed"
    assert notices


def test_a_message_beyond_the_context_is_refused_and_leaves_all_as_it_was(talker: FusedLanguageModel) -> None:
    conversation = Conversation(talker, context=60)
    list(conversation.ask([Segment("hello")], SAMPLING))
    before = list(conversation.turns)
    with pytest.raises(ValueError, match="60 at a time"):
        next(conversation.ask([Segment("x" * 50)], SAMPLING))
    assert conversation.turns == before


def test_messages_over_the_limits_are_refused(talker: FusedLanguageModel, image: MakeSegment, sound: MakeSegment) -> None:
    conversation = Conversation(talker, 400, Limits(characters=5, uploads=1))
    for segments, reason in (
        ([Segment("longer")], "6 characters"),
        ([image(0), image(1)], "2 files"),
        ([], "empty"),
        ([Segment("\x03\x02")], "empty"),
    ):
        with pytest.raises(ValueError, match=reason):
            next(conversation.ask(segments, SAMPLING))
    torch.manual_seed(0)
    reader = Conversation(FusedLanguageModel(LSTM(width=16, layers=1), ByteTokenizer()), 100)
    with pytest.raises(ValueError, match="no image codec"):
        next(reader.ask([image(0)], SAMPLING))


def test_uploads_over_the_limits_or_damaged_are_refused(image: MakeSegment, sound: MakeSegment) -> None:
    limits = Limits(upload_bytes=20_000, image_pixels=100, audio_seconds=0.2)
    assert read_upload("a.PNG", image(0).file, limits).modality == IMAGE
    assert read_upload("a.flac", sound(0).file, limits).modality == AUDIO
    large = Segment.from_image(np.zeros((11, 10), np.uint8)).file
    for name, data, reason in (
        ("a.png", b"\0" * 20_001, "MB can be sent"),
        ("a.png", large, "10 x 11 pixels"),
        ("a.flac", sound(0, 2000).file, "has 0.25 s; at most 0.2 s"),
        ("a.png", sound(0).file, "undecodable_image"),
        ("a.png", image(0).file[:40], "undecodable_image"),
        ("a.svg", b"<svg onload=alert(1)>", "kind that cannot be read"),
        ("passwd", b"root", "kind that cannot be read"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_upload(name, data, limits)


def test_retry_answers_anew_and_breaking_off_keeps_what_came(talker: FusedLanguageModel) -> None:
    conversation = Conversation(talker, 400)
    with pytest.raises(ValueError, match="nothing was asked"):
        next(conversation.retry(SAMPLING))
    sampling = Sampling(max_text=30, max_seconds=0.2)
    answers = set()
    list(conversation.ask([Segment("hello")], sampling))
    for _ in range(4):
        answers.add(tuple(conversation.turns[1:]))
        list(conversation.retry(sampling))
        assert len(conversation.turns) <= 2 and conversation.turns[0].role == "user"
    assert len(answers) > 1
    for seed in range(20):
        conversation = Conversation(talker, 400)
        events = conversation.ask([Segment("hello")], Sampling(max_text=30, max_seconds=0.2, seed=seed))
        piece = next(events)
        if isinstance(piece, str):
            events.close()  # type: ignore[attr-defined]
            assert conversation.turns[1:] == [Turn("assistant", (Segment(piece),))]
            return
    raise AssertionError("no answer began with a text")


def test_the_terminal_talks_attaches_retries_and_changes_settings(
    talker: FusedLanguageModel, image: MakeSegment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.png").write_bytes(image(0).file)
    terminal = Terminal(Conversation(talker, 400), SAMPLING, tmp_path / "out")
    terminal.take(f"/image {tmp_path / 'one.png'}")
    terminal.take("What is this?")
    terminal.take("/retry")
    assert [turn.role for turn in terminal.conversation.turns][:1] == ["user"]
    assert terminal.conversation.turns[0].segments == (image(0), Segment("What is this?"))
    terminal.take("/settings temperature 0.25")
    assert terminal.sampling.temperature == 0.25 and "temperature 0.25" in capsys.readouterr().out
    for line, reason in (
        ("/nix", "no /nix"),
        ("/settings x 1", "no setting"),
        ("/image", "name a file"),
        ("/settings top_p 2", "top_p"),
    ):
        with pytest.raises(ValueError, match=reason):
            terminal.take(line)
    for number in range(8):
        terminal.take(f"again {number}")
    written = list((tmp_path / "out").iterdir())
    assert written and str(max(written)) in capsys.readouterr().out
    terminal.take("/reset")
    assert terminal.conversation.turns == []


def test_a_run_learns_from_conversations_and_talks_in_the_terminal(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From files as they are found to an answer, by the commands of `conf/tasks/chat.yaml`."""
    chats = tmp_path / "chats"
    chats.mkdir()
    records = ({"instruction": f"Say {number}", "output": f"{number} it is"} for number in range(40))
    (chats / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    main(
        ["prepare", str(chats), str(tmp_path / "shards"), "--kind", "chat", "--validation-fraction", "0.2", "--processes", "1"]
    )
    sources = {"chats": {split: f"{tmp_path}/shards/chats-{split}-*.tar" for split in ("train", "validation")} | {"weight": 1}}
    train(
        "--config", tiny_run.folder / "config.yaml", "--config", REPOSITORY / "conf" / "tasks" / "chat.yaml", "--name", "chat",
        "--model.start_from", tiny_run.folder, "--runs", tmp_path / "runs", "--wandb", "null", "--trainer.max_steps", "4",
        "--trainer.val_check_interval", "4", "--data.sources", json.dumps(sources), cwd=tmp_path,
    )  # fmt: skip
    capsys.readouterr()
    monkeypatch.setattr(
        "sys.stdin",
        io.StringIO(
            "/settings max_text 6\n/settings max_seconds 0.2\nSay 3\n/retry\n/nix\n/settings seed 5\n/quit\nnever read\n"
        ),
    )
    main(["chat", str(tmp_path / "runs" / "chat")])
    told = capsys.readouterr().out
    assert "(there is no /nix; /help lists the commands)" in told and "seed 5" in told and told.count("\n") >= 4


def test_tokenizers_that_cannot_write_markers_are_refused(tmp_path: Path) -> None:
    check_tokenizer(ByteTokenizer())
    for kind, fits in (("bpe", True), ("words", False)):
        train_tokenizer(["one two three"] * 3, kind, 300, tmp_path / kind)  # type: ignore[arg-type]
        tokenizer = load_tokenizer(str(tmp_path / kind))
        if fits:
            check_tokenizer(tokenizer)
            assert [len(tokenizer.encode(marker)) for marker in MARKERS] == [1, 1, 1]
        else:
            with pytest.raises(ValueError, match="byte-level"):
                check_tokenizer(tokenizer)
