"""`pile evaluate`: the figures of a run on any shards."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TinyRun
from torchmetrics.functional.image import peak_signal_noise_ratio

from pile_app.cli import main
from pile_app.data.shards import Shards, write_shards
from pile_app.documents import TEXT, Document, Segment
from pile_app.media import decode_image
from pile_app.model.score import score_answers
from pile_app.training.load import find_checkpoint, load_run

TEXTS = {"short": ["a text", "another, with ümläut"], "long": ["lorem ipsum " * 9]}  # none is cut


@pytest.fixture(scope="module")
def evaluated(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, dict]:  # type: ignore[type-arg]
    """A copy of the run, evaluated on texts made here; its evaluation.json."""
    base = tmp_path_factory.mktemp("evaluate")
    run = base / "run"
    shutil.copytree(tiny_run.folder, run)
    for name, texts in TEXTS.items():
        write_shards([Document((Segment(text),), f"{name}-{n}") for n, text in enumerate(texts)], base, name)
    main(["evaluate", str(run), "--on", f"short={base}/short-*.tar", "--on", f"long={base}/long-*.tar"])
    return TinyRun(run, tiny_run.config, base), json.loads((run / "evaluation.json").read_text())


def test_bits_per_byte_are_those_of_each_document(evaluated: tuple[TinyRun, dict]) -> None:  # type: ignore[type-arg]
    run, result = evaluated
    model = load_run(run.folder)[0].model
    assert (result["step"], result["context"]) == (6, 128)
    everything = [0.0, 0]
    for name, texts in TEXTS.items():
        # In a document of one text all tokens but opener and <end> write bytes.
        nats = 0.0
        for text in texts:
            nats += score_answers(model, [Document(())], [Segment(text)])[0].nats
            ids = torch.as_tensor(model.tokenizer.encode(text)).long() + model.vocabulary.SPECIALS
            row = torch.cat([torch.tensor([model.vocabulary.BEGIN, model.vocabulary.OPENERS[TEXT]]), ids])[None]
            with torch.no_grad():
                hidden = model.hidden(row, torch.zeros_like(row), torch.zeros_like(row), torch.arange(row.size(1))[None])
                logs = model.logits(hidden[0, [0, -1]], TEXT).log_softmax(-1)
            nats += float(logs[0, model.vocabulary.OPENERS[TEXT]] + logs[1, model.vocabulary.END])
        size = sum(len(text.encode()) for text in texts)
        found = result["sources"][name]
        assert found["documents"] == len(texts) and found["rejected"] == {}
        assert found["text"]["bytes"] == size and found["text"]["targets"] == size + 2 * len(texts)
        assert found["text"]["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=0.01)  # bf16 where there is
        everything[0] += found["text"]["bits_per_byte"] * size
        everything[1] += size
    assert result["all"]["text"]["bits_per_byte"] == pytest.approx(everything[0] / everything[1])
    assert "weighted" not in result  # the run knows no weights of these


def test_own_sources_have_codecs_measured_and_weights(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "evaluation.json"
    main(["evaluate", str(tiny_run.folder), "--output", str(output.parent), "--checkpoint", "best"])
    result, shown = json.loads(output.read_text()), capsys.readouterr().out
    summary = json.loads((tiny_run.folder / "summary.json").read_text())
    media, prose = result["sources"]["media"], result["sources"]["prose"]
    assert media["documents"] == prose["documents"] == 8
    # The best checkpoint of six steps is the last; its last validation measured the same.
    assert result["all"]["text"]["bits_per_byte"] == pytest.approx(summary["text_bits_per_byte"], rel=1e-4)
    assert prose["text"]["bits_per_byte"] == pytest.approx(summary["prose_bits_per_byte"], rel=1e-4)
    weighted = (media["text"]["bits_per_byte"] + prose["text"]["bits_per_byte"]) / 2
    assert result["weighted"] == {"shares": {"media": 0.5, "prose": 0.5}, "bits_per_byte": pytest.approx(weighted)}
    model = load_run(tiny_run.folder)[0].model
    shards = Shards(str(tiny_run.shards / "media-validation-*.tar"))
    segments = [s for n in range(8) for s in shards.document(n).segments if s.extension == "png"]
    images = torch.stack([torch.from_numpy(decode_image(s.file, 1, 8, 8)).clone() for s in segments])
    assert model.image_codec is not None
    again = model.image_codec.decode(model.image_codec.encode(images))
    psnr = peak_signal_noise_ratio(again.float(), images.float(), data_range=255.0)
    assert media["image"]["psnr"] == pytest.approx(float(psnr), rel=1e-4) and "image" not in prose
    assert 0 < media["audio"]["log_mel_distance"] < 10 and media["audio"]["code_bits_per_second"] > 0
    for heading in ("bits per byte", "psnr", "log mel distance", "weighted", "media", "prose"):
        assert heading in " ".join(shown.split()), shown


def test_documents_that_cannot_be_used_are_named(evaluated: tuple[TinyRun, dict], capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[type-arg]
    run, _ = evaluated
    shard = run.shards / "damaged-000000.tar"
    shutil.copyfile(run.shards / "short-000000.tar", shard)
    Shards(str(shard))
    content = bytearray(shard.read_bytes())
    content[content.index(b"another")] ^= 1
    shard.write_bytes(content)
    main(["evaluate", str(run.folder), "--on", f"damaged={shard}", "--output", str(run.shards)])
    assert "documents that could not be used: {'damaged': {'checksum': 1}}" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_evaluated_is_refused(evaluated: tuple[TinyRun, dict], capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[type-arg]
    run, _ = evaluated
    for arguments, told in (
        (["--on", "a="], "names no shards"),
        (["--on", "a=x.tar", "--on", "a=y.tar"], "'a' twice"),
        (["--on", f"a={run.shards}/none-*.tar"], "none-*.tar"),
        (["--checkpoint", "other.ckpt"], "no checkpoint"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", str(run.folder), *arguments])
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(("objective", "chosen"), [("null", "last"), ("{class_path: Classification}", "best")])
def test_the_default_checkpoint_is_the_one_that_the_summary_is_about(tmp_path: Path, objective: str, chosen: str) -> None:
    (tmp_path / "config.yaml").write_text(f"model: {{objective: {objective}}}\ndata: {{}}\n")
    (tmp_path / "checkpoints" / "last.ckpt").mkdir(parents=True)
    assert find_checkpoint(tmp_path, "auto").stem == "last"  # there is no other yet
    (tmp_path / "checkpoints" / "best.ckpt").mkdir()
    assert find_checkpoint(tmp_path, "auto").stem == chosen
