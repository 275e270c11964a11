"""`pile encode`: training on the new shards is training on the old ones, only without decoding."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import media_documents, prose_documents

from pile_app.cli import main
from pile_app.data.index import TYPES
from pile_app.data.shards import Shards, expand_shards, write_shards
from pile_app.data.tokenizers import train_tokenizer
from pile_app.documents import AUDIO, IMAGE, TEXT, Codes, Document, Segment, describe
from pile_app.tasks import encode
from pile_app.training.load import load_run
from tests.data.test_remote import serving

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from attempts import Workbench, checkpoint, documents, losses

STEPS = ("--trainer.max_steps", "8", "--trainer.val_check_interval", "4", "--checkpoint_every", "4")
TOLERANT = ("--data.max_rejected_share", "0.5")
SILENT = 4  # sounds that pass the index and cannot be used


def long_documents(count: int, split: str) -> Iterator[Document]:
    """Texts of many sentences, that are cut at them in a context of 128 tokens; some around an image."""
    for n in range(count):
        rng = np.random.default_rng(n)
        words = ["uno", "dué", "trë", "quattuor", "quinque", "sechs", "sieben"]
        sentences = (" ".join(rng.choice(words, 3 + rng.integers(9))) + rng.choice([". ", "! ", ".\n"]) for _ in range(60))
        text = Segment("".join(sentences))
        picture = Segment.from_image(rng.integers(0, 256, (8, 8), np.uint8))
        segments = (text, picture, Segment("the end")) if n % 3 == 0 else (text,)
        yield Document(segments, f"{split}-long-{n}", meta={"number": n} if n % 2 else {})


def silent_documents(count: int, split: str) -> Iterator[Document]:
    for n in range(count):
        yield Document((Segment("hush"), Segment.from_audio(np.zeros(1600), 8000)), f"{split}-silent-{n}", ordered=False)


def pile(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """Shards, a tokenizer, a run whose codecs have learned (`codecs`), and runs with them on raw shards (`raw`, `raw-bpe`)."""
    folder = tmp_path_factory.mktemp("encode")
    shards = folder / "shards"
    for split, count in (("train", 60), ("validation", 8)):
        write_shards([*media_documents(count, split), *silent_documents(SILENT, split)], shards, f"media-{split}", 60_000)
        write_shards([*prose_documents(count, split), *long_documents(6, split)], shards, f"prose-{split}")
    texts = [
        s.text for d in [*prose_documents(60, "train"), *long_documents(6, "train")] for s in d.segments if s.modality == TEXT
    ]
    train_tokenizer(texts, "bpe", 300, folder / "bpe.json")
    bench = Workbench(folder, shards)
    bench.train("codecs", "--trainer.max_steps", "4", "--ledger", "false", *TOLERANT)
    bench.train("raw", *frozen(bench), *STEPS, *TOLERANT)
    bench.train("raw-bpe", *frozen(bench), *STEPS, *TOLERANT, "--model.tokenizer", str(folder / "bpe.json"))
    return bench


def frozen(bench: Workbench) -> list[str]:
    codecs = bench.run("codecs") / "checkpoints" / "last.ckpt"
    return ["--model.codec_steps", "0", "--model.codecs_from", str(codecs)]


@pytest.fixture(scope="module")
def encoded(bench: Workbench) -> dict[str, Workbench]:
    """Benches over the encoded shards, by the raw run whose encoders made them."""
    benches = {}
    for name in ("raw", "raw-bpe"):
        folder = bench.folder / f"encoded-{name}"
        pile("encode", bench.run(name), bench.shards / "*.tar", folder / "shards")
        benches[name] = Workbench(folder, folder / "shards")
    return benches


def quarantine(run: Path) -> list[Any]:
    entries = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "detail"} for entry in entries]


@pytest.mark.parametrize("name", ["raw", "raw-bpe"])
def test_training_on_encoded_shards_is_training_on_the_raw_ones(
    bench: Workbench, encoded: dict[str, Workbench], name: str
) -> None:
    other = encoded[name]
    tokenizer = ["--model.tokenizer", str(bench.folder / "bpe.json")] if name == "raw-bpe" else []
    other.train("x", *frozen(bench), *STEPS, *TOLERANT, *tokenizer)
    raw, run = bench.run(name), other.run("x")
    assert documents(raw) == documents(run)
    assert any(start for of_step in documents(run).values() for *_, start, _ in of_step), "no document was cut"

    def comparable(values: dict[str, str]) -> dict[str, float]:
        return {key: float(value) for key, value in values.items() if not key.endswith("codec_loss")}

    one, two = losses(raw), losses(run)
    assert one.keys() == two.keys()
    for step in one:
        assert comparable(one[step]) == pytest.approx(comparable(two[step]), rel=1e-6), step
    weights, again = (checkpoint(which)["state_dict"] for which in (raw, run))
    assert all(torch.equal(weights[key], again[key]) for key in weights), "not the same to the last bit"
    assert quarantine(raw) == quarantine(run)
    assert {entry["reason"] for entry in quarantine(run)} == {"silent_audio"}
    media = [s for document in islice(Shards(str(other.shards / "media-train-000000.tar")), 16) for s in document.segments]
    assert all(s.is_encoded for s in media if s.modality != TEXT or name == "raw-bpe")


def test_a_resumed_run_on_encoded_shards_goes_on(bench: Workbench, encoded: dict[str, Workbench]) -> None:
    other = encoded["raw"]
    assert other.start("resumed", *frozen(bench), *STEPS, *TOLERANT, KILL_AT="5").wait() == -9
    other.train("resumed", *frozen(bench), *STEPS, *TOLERANT)
    one, two = checkpoint(bench.run("raw"))["state_dict"], checkpoint(other.run("resumed"))["state_dict"]
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_manifests_of_encoded_shards_are_those_of_the_raw_ones(bench: Workbench, encoded: dict[str, Workbench]) -> None:
    for other in encoded.values():
        kept, raw = Shards(str(other.shards / "*.tar")), Shards(str(bench.shards / "*.tar"))
        for shard in range(len(kept.paths)):
            for name in TYPES.keys() - {*encode.FILES}:
                assert np.array_equal(kept.index(shard).columns[name], raw.index(shard).columns[name]), name
        for one, two in zip(kept, raw, strict=True):
            assert (one.key, one.meta, one.ordered) == (two.key, two.meta, two.ordered)
            assert [s.loss for s in one.segments] == [s.loss for s in two.segments]
        assert Shards(str(other.shards / "*.tar"), again="all").fingerprint == kept.fingerprint


def test_other_codecs_and_learning_ones_are_refused_before_training(bench: Workbench, encoded: dict[str, Workbench]) -> None:
    other = encoded["raw"]
    attempt = other.start("learning", *STEPS, *TOLERANT)
    assert attempt.wait() == 2
    assert "codec is not frozen from the start: set model.codecs_from" in attempt.text
    state = checkpoint(bench.run("codecs"))
    state["state_dict"]["model.image_codec.encoder.1.bias"] += 0.1
    torch.save(state, other.folder / "changed.ckpt")
    words = ("--model.codec_steps", "0", "--model.codecs_from", str(other.folder / "changed.ckpt"))
    attempt = other.start("changed", *words, *STEPS, *TOLERANT)
    assert attempt.wait() == 2 and "the model's codec is" in attempt.text and "or encode again" in attempt.text
    shutil.copytree(other.run("x") if other.run("x").exists() else bench.run("raw"), bench.run("mixed"))
    attempt = bench.start("mixed", *words, *STEPS, *TOLERANT, "--trainer.max_steps", "12")
    assert attempt.wait() == 2 and "model.codecs_from was" in attempt.text
    attempt = encoded["raw-bpe"].start("bytes", *frozen(bench), *STEPS, *TOLERANT)
    assert attempt.wait() == 2 and "set model.tokenizer" in attempt.text


def test_samples_and_inspection_decode_what_is_encoded(bench: Workbench, encoded: dict[str, Workbench]) -> None:
    """Prompts, answers and what a step held can be looked at and listened to."""
    from PIL import Image

    other = encoded["raw-bpe"]
    config = other.config.read_text()
    sampling = "{class_path: pile_app.training.callbacks.SampleGeneration, init_args: {every_n_steps: 8, count: 2}}"
    sampling = sampling.replace("count: 2", "count: 2, sampling: {max_text: 8, max_seconds: 0.2, guidance: 2.0}")
    other.config.write_text(config.replace("attempts.Watch}]", f"attempts.Watch}}, {sampling}]"))
    tokenizer = ["--model.tokenizer", str(bench.folder / "bpe.json")]
    other.train("samples", *frozen(bench), *STEPS, *TOLERANT, *tokenizer, "--ledger", "false")
    other.config.write_text(config)
    folder = other.run("samples") / "samples" / "step-00000008"
    entries = json.loads((folder / "samples.json").read_text())
    kinds = {entry["title"] for entry in entries}
    assert {"text → text", "image → text", "audio → text"} <= kinds
    for entry in entries:
        for part in (*entry["prompt"], *entry["outputs"], *entry["references"]):
            assert "text" in part or Path(part["file"]).suffix in (".png", ".wav", ".flac")
    assert any(part["text"].startswith("validation") for entry in entries for part in entry["prompt"] if "text" in part)

    pile("inspect", other.run("samples"), "--step", "3", "--output", other.folder / "seen")
    pile("inspect", bench.run("raw-bpe"), "--step", "3", "--output", bench.folder / "seen")
    one, two = (json.loads((at / "seen" / "documents.json").read_text())["documents"] for at in (other.folder, bench.folder))
    assert [(d["key"], [s.get("text") for s in d["segments"]]) for d in one] == [
        (d["key"], [s.get("text") for s in d["segments"]]) for d in two
    ]
    for document in one:
        for segment in document["segments"]:
            if segment["modality"] == "image":
                assert Image.open(other.folder / "seen" / segment["file"]).size == (8, 8)


def packs(name: str, bench: Workbench, shards: Path, count: int = 120) -> list[Any]:
    """The packs that a run's data module gives on some shards, filled by its model: the input of the language model."""
    module, data, _ = load_run(bench.run(name))
    data.vocabulary = module.vocabulary
    for source in data.sources.values():
        source.train = source.train.replace(str(bench.shards), str(shards))
        source.validation = None
    data.setup()

    found = []
    for position in range(count):
        batch = data.train_dataset()[position]
        targets = [places.tolist() for places in batch.targets]
        filled = module.model.fill(batch), module.model.image_indices(batch), batch.document, batch.position
        found.append((*(tensor.tolist() for tensor in filled), targets, batch.documents, [r[:3] for r in batch.rejected]))
    return found


@pytest.mark.parametrize("name", ["raw", "raw-bpe"])
def test_a_sample_that_decayed_stays_at_its_place_masked_and_counted(bench: Workbench, tmp_path: Path, name: str) -> None:
    raw, new = tmp_path / "raw", tmp_path / "new"
    shutil.copytree(bench.shards, raw)
    for kind, key in (("media", 10), ("prose", 62)):
        path = raw / f"{kind}-train-000000.tar"
        offset = int(Shards(str(path)).index(0).offset[key])
        data = bytearray(path.read_bytes())
        data[offset + 600] ^= 1
        path.write_bytes(data)
    pile("encode", bench.run(name), raw / "*.tar", new)
    left = [json.loads((new / "encoded.json").read_text())[f"{kind}-train-000000.tar"]["left"] for kind in ("media", "prose")]
    assert [one["checksum"] for one in left] == [1, 1]
    one, two = packs(name, bench, raw), packs(name, bench, new)
    assert one == two
    rejected = {(key, reason) for *_, of_pack in two for _, key, reason in of_pack}
    assert {reason for _, reason in rejected} >= {"checksum"} and any("long" in key for key, _ in rejected)


def test_interrupted_encoding_continues(
    bench: Workbench, encoded: dict[str, Workbench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ("encode", bench.run("raw"), bench.shards / "*-train-*.tar", tmp_path / "new")
    whole = encode._encode_shard
    made: list[str] = []

    def until_killed(shards: Shards, shard: int, path: Path, *rest: Any) -> Any:
        if shard == 1 and not made:
            made.append("killed")
            monkeypatch.setattr(encode, "_sample", lambda document: 1 / 0)
        return whole(shards, shard, path, *rest)

    monkeypatch.setattr(encode, "_encode_shard", until_killed)
    with pytest.raises(ZeroDivisionError):
        pile(*arguments)
    names = [Path(path).name for path in expand_shards(str(bench.shards / "*-train-*.tar"))]
    assert [path.name for path in (tmp_path / "new").glob("*.tar*")] == names[:1]
    monkeypatch.undo()
    before = (tmp_path / "new" / names[0]).stat().st_mtime_ns
    capsys.readouterr()
    pile(*arguments)
    assert capsys.readouterr().out.count("there already") == 1
    assert (tmp_path / "new" / names[0]).stat().st_mtime_ns == before
    for name in names:
        assert (tmp_path / "new" / name).read_bytes() == (encoded["raw"].shards / name).read_bytes()
    pile(*arguments)
    assert capsys.readouterr().out.count("there already") == len(names)
    with pytest.raises(SystemExit):
        pile("encode", bench.run("raw-bpe"), bench.shards / "*-train-*.tar", tmp_path / "new")
    assert "--overwrite" in capsys.readouterr().err
    pile("encode", bench.run("raw-bpe"), bench.shards / "*-train-*.tar", tmp_path / "new", "--overwrite")
    with pytest.raises(SystemExit):
        pile("encode", bench.run("raw"), bench.shards / "*.tar", bench.shards)
    assert "folder of the shards themselves" in capsys.readouterr().err


def test_shards_of_a_server_are_encoded_as_those_of_a_folder(
    bench: Workbench, encoded: dict[str, Workbench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PILE_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    served = tmp_path / "served"
    shutil.copytree(bench.shards, served)
    (served / "prose-train.manifest.safetensors").unlink()  # then it is made from the fetched shard
    with serving(functools.partial(SimpleHTTPRequestHandler, directory=str(served))) as port:
        names = [path.name for path in sorted(served.glob("*.tar"))]
        urls = [f"http://127.0.0.1:{port}/{name}" for name in names]
        pile("encode", bench.run("raw"), *urls, tmp_path / "new")
        for name in names:
            assert (tmp_path / "new" / name).read_bytes() == (encoded["raw"].shards / name).read_bytes()
        capsys.readouterr()
        pile("encode", bench.run("raw"), *urls, tmp_path / "new")
        assert capsys.readouterr().out.count("there already") == len(names)
    assert {path.name for path in (tmp_path / "cache" / "shards").rglob("*.tar")} == set(names)


def test_text_alone_needs_no_run(bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pile("encode", "--tokenizer", bench.folder / "bpe.json", bench.shards / "prose-*.tar", tmp_path)
    counts = json.loads((tmp_path / "encoded.json").read_text())["prose-train-000000.tar"]
    assert counts["encoded"] == {"text": 60 + 6 + 2} and counts["documents"] == 66
    document = Shards(str(tmp_path / "prose-train-000000.tar")).document(0)
    assert document.segments[0].extension == "textids" and "textids" in describe(document)
    assert (tmp_path / "prose-train-000000.tar").stat().st_size > 0
    with pytest.raises(SystemExit):
        pile("encode", "--tokenizer", "bytes", bench.shards / "prose-*.tar", tmp_path / "other")
    assert "nothing to encode" in capsys.readouterr().err


def test_codecs_that_still_learn_do_not_encode(bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(bench.run("codecs"), copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("codec_steps: 3", "codec_steps: 5"))
    with pytest.raises(SystemExit):
        pile("encode", copy, bench.shards / "*.tar", tmp_path / "new")
    assert "still change" in capsys.readouterr().err


def test_codes_keep_what_they_are_given() -> None:
    for values in ([], [0, 65535], [65536]):
        breaks = np.array([[3, 9], [1, 2]])
        codes = Codes("ab" * 16, 1 << 33, 48_000, np.array(values, np.int64), breaks, is_lost=True)
        again = Codes.from_bytes(codes.to_bytes())
        assert again.values.tolist() == values and again.breaks.tolist() == breaks.tolist()
        assert (again.encoder, again.size, again.sample_rate, again.is_lost) == ("ab" * 16, 1 << 33, 48_000, True)
    assert {Segment(b"x", extension).modality for extension in ("textids", "imagecodes", "audiocodes")} == {TEXT, IMAGE, AUDIO}
