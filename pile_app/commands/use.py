"""Commands that use a trained run: generate, chat, app, classify, tag, index-media, search."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from pile_app.documents import BadSample, Document, Segment
    from pile_app.model.generate import Answer
    from pile_app.tasks.embed import Embedder
    from pile_app.training.module import PileModule

DOCUMENTS_AT_ONCE = 512
Prompt = Sequence[tuple[str, str]]  # (modality, text or path)


def generate(
    run: Path, *, to: Literal["text", "image", "audio", "any"], prompt: Prompt = (), count: int = 1, temperature: float = 1.0,
    top_p: float = 1.0, guidance: float = 1.0, seed: int = 0, stop: Sequence[str] = (), choices: Sequence[str] = (),
    logprobs: bool = False, max_text: int = 256, max_seconds: float = 10.0, checkpoint: str = "auto",
    device: str = "auto", output: Path | None = None,
) -> None:  # fmt: skip
    """Let a trained model write text, images or sound.

    The prompt is one document: every --text, --image and --audio, in the order given. Without a prompt the model starts on its
    own. A text at the end of the prompt is continued by --to text. A single text is shown while it is written.

    Args:
        to: what to write; any: as many segments of any kind as the model wants
        count: number of answers
        stop: a text ends before the first of these
        choices: texts to choose the answer from
        logprobs: also write every token's log-probability, to NNN.json
        output: folder for the results (default: RUN/generated)
    """
    from dataclasses import replace

    from pile_app.documents import MODALITIES, TEXT, Segment
    from pile_app.model.generate import Sampling, answer_prompts, generate_document, stream
    from pile_app.model.score import choose
    from pile_app.training.load import load_on

    check_count(count)
    if choices and to != "text":
        raise ValueError(f"--choices are texts: they go with --to text, not --to {to}")
    if to == "any" and logprobs:
        raise ValueError("--logprobs goes with --to text, image or audio")
    sampling = Sampling(temperature, top_p, guidance, max_text, max_seconds, seed, tuple(stop))
    document = read_prompt(prompt)
    model = load_on(run, checkpoint, device)[0].model

    def write() -> Iterator[tuple[str, Segment, dict[str, Any]]]:
        """(file name without extension, segment, what NNN.json says of it); texts are printed."""
        if choices:
            for number, choice in enumerate(choose(model, [document] * count, choices, sampling)):
                text = choices[choice.index]
                print(text)
                scores = dict(zip(choices, choice.log_probabilities.tolist(), strict=True))
                yield f"{number:03d}", Segment(text), {"text": text, "log_probabilities": scores}
        elif to == "any":
            for number in range(count):
                written = generate_document(model, document, replace(sampling, seed=seed + number))
                yield from ((f"{number:03d}-{part}", one.segment, {}) for part, one in enumerate(print_texts(written)))
        else:
            is_streamed = to == "text" and count == 1
            answers = answer_prompts(model, [document] * count, MODALITIES.index(to), sampling) if not is_streamed else ()
            for number, one in enumerate(print_texts(stream(model, document, sampling)) if is_streamed else answers):
                if one.segment.modality == TEXT and count > 1:
                    print(one.segment.text)
                yield f"{number:03d}", one.segment, describe_tokens(model, one) if logprobs else {}

    folder = output or run / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for name, segment, details in write():
        path = folder / f"{name}.{segment.extension}"
        path.write_bytes(segment.data.encode() if isinstance(segment.data, str) else segment.data)
        print(path)
        if details and logprobs:
            path.with_suffix(".json").write_text(json.dumps(details, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"--count must be at least 1, not {count}")


def print_texts(pieces: Iterable[str | Answer]) -> Iterator[Answer]:
    """Yield the answers; print texts while they are written."""
    from pile_app.documents import TEXT

    for piece in pieces:
        if isinstance(piece, str):
            print(piece, end="", flush=True)
            continue
        if piece.segment.modality == TEXT:
            print()
        yield piece


def describe_tokens(model: Any, answer: Answer) -> dict[str, Any]:
    """Describe an answer for JSON: its tokens with their log-probabilities in nats; the codes of media are integers."""
    from pile_app.documents import MODALITIES, TEXT
    from pile_app.vocabulary import Vocabulary

    specials = {Vocabulary.END: "<end>"} | dict(zip(Vocabulary.OPENERS, [f"<{name}>" for name in MODALITIES], strict=True))
    tokens: list[str | int] = answer.codes.tolist()
    if answer.segment.modality == TEXT:
        tokens = [specials.get(code) or model.tokenizer.decode([code - Vocabulary.SPECIALS]) for code in answer.codes.tolist()]
    scores = answer.log_probabilities.tolist()
    each = [{"token": token, "log_probability": score} for token, score in zip(tokens, scores, strict=True)]
    return {"ended_by": answer.ended_by, "log_probability": sum(scores), "tokens": each}


def read_prompt(parts: Prompt) -> Document:
    """Make a document of (modality, text or path) parts. Raises ValueError or OSError for a file that cannot be used."""
    from pile_app.documents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, Document, Segment
    from pile_app.tasks.chat import read_upload

    def read(name: str, value: str) -> Segment:
        if name == "text":
            return Segment(value)
        known = IMAGE_EXTENSIONS if name == "image" else AUDIO_EXTENSIONS
        if Path(value).suffix[1:].lower() not in known:
            raise ValueError(f"--{name} {value!r}: its name has to end in .{', .'.join(known)}")
        return read_upload(value, Path(value).read_bytes())

    return Document(tuple(read(*part) for part in parts))


def chat(run: Path, *, checkpoint: str = "auto", device: str = "auto", output: Path | None = None) -> None:
    """Talk with a trained model in the terminal, in text, pictures and sound; `pile app` serves a page instead.

    The model should have been trained on conversations: --config chat. /help lists the commands, /settings the settings.

    Args:
        output: folder for the pictures and sounds of answers (default: RUN/chat)
    """
    from pile_app.model.generate import Sampling
    from pile_app.tasks.chat import Conversation, Terminal
    from pile_app.training.load import load_on

    module, data, _ = load_on(run, checkpoint, device)
    sampling = Sampling(temperature=0.7, top_p=0.9, max_text=512, max_seconds=5.0)
    Terminal(Conversation(module.model, data.context), sampling, output or run / "chat").talk()


def app(
    run: Path, *, index: str | None = None, host: str = "127.0.0.1", port: int = 7860, password: str | None = None,
    checkpoint: str = "auto", device: str = "auto",
) -> None:  # fmt: skip
    """Serve a page for a run, with a tab for everything that the run can do: generate, chat, search, classify, tag.

    The page is for this machine only, unless --host says otherwise; then it asks for a password. Needs the extra `chat`.

    Args:
        index: folder or URL of an index of `pile index-media`, to search (default: RUN/index if it exists)
        host: address to listen on; 0.0.0.0: every machine that can reach this one
        port: port to listen on
        password: of the user `pile` (default: PILE_PASSWORD; else, if --host is not this machine, it is made and printed)
    """
    from pile_app.tasks.app import import_gradio, make_app, serve
    from pile_app.training.load import load_on

    import_gradio()
    module, data, _ = load_on(run, checkpoint, device)
    name, found = run.resolve().name, index or (str(run / "index") if (run / "index").is_dir() else None)
    serve(lambda: make_app(module, data.context, name, found), host, port, password)


def classify(
    run: Path, *, prompt: Prompt = (), file: Path | None = None, on: Sequence[str] = (), checkpoint: str = "auto",
    device: str = "auto", output: Path | None = None,
) -> None:  # fmt: skip
    """Label texts, images and sounds with a trained classifier; the answers are JSON lines.

    One document of every --text, --image and --audio in the order given; or the texts of --file; or the labelled documents of
    --on, which measures the classifier: accuracy, precision, recall, F1, `confusion.png` and `predictions.jsonl`.

    Args:
        file: texts: one for each line, or a table or JSON lines (csv, tsv, jsonl, parquet)
        on: SHARDS or NAME=SHARDS: labelled shards (quoted patterns or URLs) to measure the classifier on
        output: folder for the results of --on (default: RUN/classified)
    """
    import torch

    from pile_app.commands.data import open_shards, parse_sources, read_texts
    from pile_app.documents import TEXT
    from pile_app.tasks.classification import Classification, split_label
    from pile_app.training.load import load_on

    if sum(map(bool, (prompt, file, on))) != 1:
        raise ValueError("what to classify? Give --text, --image and --audio, or --file, or --on")
    asked, given = read_prompt(prompt), parse_sources(on)
    module, _, _ = load_on(run, checkpoint, device)
    objective = module.objective
    if not isinstance(objective, Classification):
        raise ValueError(f"{str(run)!r} is no classifier: train one with --config classification")
    for _, document, row in predict(module, read_texts(file) if file else [("", asked)] if prompt else [], Counter()):
        order = row.argsort(descending=True).tolist()
        text = {"text": "\n".join(one.text for one in document.segments if one.modality == TEXT)} if file else {}
        chances = {objective.labels[number]: round(float(row[number]), 4) for number in order}
        print(json.dumps({**text, "label": objective.labels[order[0]], "probabilities": chances}, ensure_ascii=False))
    for name, pattern in given.items():
        folder = (output or run / "classified") / (name if len(given) > 1 else "")
        folder.mkdir(parents=True, exist_ok=True)
        count, rejected = 0, Counter[str]()
        with open(folder / "predictions.jsonl", "w", encoding="utf-8") as lines:
            for key, document, row in predict(module, read_shards(open_shards(pattern)), rejected, True):
                label, guess = split_label(document, objective.labels)[1], int(row.argmax())
                said = {"key": key, "true": objective.labels[label], "label": objective.labels[guess]}
                lines.write(json.dumps(said | {"probability": round(float(row[guess]), 4)}, ensure_ascii=False) + "\n")
                objective.metrics.update(row[None].to(module.device), torch.tensor([label], device=module.device))
                count += 1
        if not count:
            raise ValueError(f"{pattern!r} holds no document that can be read")
        values = {key: float(value) for key, value in objective.compute().items()}
        counts = {"documents": count, "rejected": dict(rejected)}
        (folder / "classification.json").write_text(json.dumps(counts | values | objective.report(folder), indent=2) + "\n")
        print(json.dumps(counts | {key: round(value, 4) for key, value in values.items()}))
        print(folder / "confusion.png")


def predict(
    module: PileModule, found: Iterable[tuple[str, Document | BadSample]], rejected: Counter[str], labelled: bool = False
) -> Iterator[tuple[str, Document, Tensor]]:
    """Yield (where, document, probabilities of the labels); name what cannot be read on stderr, and count it in `rejected`."""
    from dataclasses import replace

    from pile_app.documents import BadSample, Document
    from pile_app.tasks.classification import split_label

    def ask(documents: Sequence[Document]) -> list[Tensor | BadSample]:
        asked = [split_label(one, objective.labels)[0] if labelled else replace(one, meta={}) for one in documents]
        try:
            return list(objective.predict(module.model, asked))
        except BadSample as error:
            return [error] if len(documents) == 1 else [row for one in documents for row in ask([one])]

    objective: Any = module.objective
    for some in batched(found):
        usable = [(where, one) for where, one in some if isinstance(one, Document)]
        bad = [(where, one) for where, one in some if isinstance(one, BadSample)]
        for (where, document), row in zip(usable, ask([one for _, one in usable]) if usable else (), strict=True):
            if isinstance(row, BadSample):
                bad.append((where, row))
            else:
                yield where, document, row
        for where, error in bad:
            print(f"{where} is skipped, {error}", file=sys.stderr)
            rejected[error.reason] += 1


def batched(found: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(found)
    while some := list(islice(iterator, DOCUMENTS_AT_ONCE)):
        yield some


def read_shards(shards: Any) -> Iterator[tuple[str, Document | BadSample]]:
    """Yield (key, document or the error) of all documents of shards."""
    from pile_app.documents import BadSample

    for number in range(len(shards)):
        try:
            yield shards.key(number), shards.document(number)
        except BadSample as error:
            yield shards.key(number), error


def tag(
    run: Path, file: Path | None = None, *, text: Sequence[str] = (), format: Literal["inline", "json"] = "inline",
    checkpoint: str = "auto", device: str = "auto",
) -> None:  # fmt: skip
    """Find the named entities of texts, with a run that was trained to tag, and print them.

    Args:
        file: lines of text, which are read separately; or CoNLL, tagged JSON lines or Parquet, whose words are tagged
        text: texts
        format: inline: [Paris|location]; json: a line for each text, start and end in characters
    """
    from pile_app.commands.data import read_texts
    from pile_app.documents import BadSample, Document, Segment
    from pile_app.tasks.tagging import as_inline, as_record, tag_documents
    from pile_app.training.load import load_on

    documents = [Document((Segment(one),)) for one in text if one]
    for where, document in read_texts(file) if file is not None else ():
        if isinstance(document, BadSample):
            print(f"{where} is skipped, {document}", file=sys.stderr)
        elif document.segments[0].text.strip():
            documents.append(document)
    if not documents:
        raise ValueError("there is nothing to tag: give a FILE, or --text")
    module, data, _ = load_on(run, checkpoint, device)
    for one in tag_documents(module, documents, data.context):
        print(as_inline(one) if format == "inline" else json.dumps(as_record(one), ensure_ascii=False))


def open_embedder(run: Path, checkpoint: str, device: str) -> Embedder:
    from pile_app.tasks.embed import Embedder
    from pile_app.training.load import load_on

    module, data, _ = load_on(run, checkpoint, device)
    return Embedder.of_run(run, module, data.context)


def index_media(
    run: Path, on: Sequence[str], *, checkpoint: str = "auto", device: str = "auto", output: str | None = None
) -> None:
    """Embed documents of any modality into an index, which `pile search` and `pile app` search.

    Run it again to add to an index. A document of the same shard or file and the same key replaces the earlier one.

    Args:
        run: folder of a run that was trained to embed: --config retrieval
        on: shards (quoted patterns), folders of shards, or folders of files that `pile prepare` reads
        output: folder or URL (s3://...) of the index: new, or made by the same model (default: RUN/index)
    """
    from pile_app.tasks.media_index import MediaIndex

    uri = output or str(run / "index")
    index = MediaIndex(uri, open_embedder(run, checkpoint, device), is_new=True)
    documents, rows, replaced, left = 0, 0, 0, Counter[str]()
    for some in batched(chain.from_iterable(map(read_documents, on))):
        usable = [one for one in some if not isinstance(one, str)]
        left.update(one for one in some if isinstance(one, str))
        added, went, bad = index.add(usable)
        documents, rows, replaced = documents + len(usable), rows + added, replaced + went
        left.update(one.reason for one in bad)
        print(f"{documents:,} documents, {rows:,} segments", flush=True)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in left.most_common()) or "nothing"
    print(f"{uri}: {len(index):,} segments, {replaced:,} replaced; skipped: {reasons}")
    recall = index.finish()
    if recall is not None:
        print(f"searches are approximate: they find {100 * recall:.1f} % of the ten nearest")


def read_documents(path: str) -> Iterator[tuple[Document, str] | str]:
    """Read shards or a folder of files; yield (document, its shard or file), or the reason why a document is skipped."""
    from dataclasses import replace

    from pile_app.commands.data import open_shards
    from pile_app.documents import BadSample
    from pile_app.prepare import readers

    folder = Path(path).resolve()
    if folder.is_dir() and not any(folder.glob("*.tar")):
        for file, document in readers.read_documents(folder):
            if isinstance(document, BadSample):
                yield document.reason
            else:
                yield replace(document, key=file), str(folder / file)
        return
    shards = open_shards(str(folder / "*.tar") if folder.is_dir() else path)
    yield from shards.balance()["rejected"].elements()
    for number, (_, document) in enumerate(read_shards(shards)):
        shard = shards.paths[shards.place(number)[0]]
        yield document.reason if isinstance(document, BadSample) else (document, shard)


def search(
    index: str, query: str | None = None, *, to: Literal["text", "image", "audio"] | None = None, count: int = 10,
    exact: bool = False, run: Path | None = None, checkpoint: str = "auto", device: str = "auto",
) -> None:  # fmt: skip
    """Find the texts, pictures and sounds of an index that are nearest to a text, a picture or a sound.

    Without a query, the model is loaded once and queries are read from the terminal, one a line. `pile app` has a page for it.

    Args:
        index: folder or URL that `pile index-media` wrote
        query: a text in quotes, or an image or sound file
        to: find only these
        count: how many
        exact: compare all, even if a large index has a faster way
        run: folder of the run that made the index (default: where it was then)
    """
    from pile_app.tasks.media_index import MediaIndex, format_hits, open_table, read_query

    check_count(count)
    first = [query] if query is not None else (line.strip() for line in sys.stdin if line.strip())
    if query is not None:
        read_query(query)  # refused before the model is loaded
    made_by = run or Path(open_table(index)[1]["run"])
    opened = MediaIndex(index, open_embedder(made_by, checkpoint, device))
    for words in first:
        print(format_hits(opened.find(read_query(words), count, to, exact)), flush=True)
