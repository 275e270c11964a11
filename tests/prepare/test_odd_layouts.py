"""Layouts outside of the list: Kaggle's, old speech tools', spreadsheets, and folders that mix several things."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from layouts import Choices, chat, commas, doc, lines, picture, read_back, sound, tar, write
from test_public_bugs import expect, run

from pile_app.prepare.pipeline import prepare


def test_a_label_is_no_caption(tmp_path: Path) -> None:
    """ESC-10's folders have names that read like texts."""
    names = ("001 - Dog bark", "002 - Rain")
    documents, _ = run(
        tmp_path, {f"{name}/{n}.ogg": sound(n + 10 * m, "ogg") for m, name in enumerate(names) for n in range(2)}
    )
    assert documents == expect(*(doc(sound(n + 10 * m, "ogg"), label=name) for m, name in enumerate(names) for n in range(2)))


@pytest.mark.parametrize("name", ["README.md", "license.md", "LICENSE.txt"])
def test_a_readme_is_no_data(tmp_path: Path, name: str) -> None:
    about: dict[str, str | bytes] = {name: "# A data set\n\nOf many things."}
    documents, balance = run(tmp_path / "texts", about | {"a.txt": "a text"})
    assert documents == expect(doc("a text")) and balance.unread == [name]
    with pytest.raises(ValueError, match=r"a\.xyz"):
        run(tmp_path / "unknown", about | {"a.xyz": "?"})


def test_final_newlines_of_captions_are_dropped(tmp_path: Path) -> None:
    documents, _ = run(
        tmp_path, {"a.jpg": picture(1), "a.txt": "a cat\n", "x.tar": tar([("b.jpg", picture(2)), ("b.txt", "a dog\n")])}
    )
    assert documents == expect(doc(picture(1), "a cat"), doc(picture(2), "a dog"))


# -- tables of files


def test_kaggle_names_files_without_extension(tmp_path: Path) -> None:
    """Dog Breed Identification: labels.csv with `id` and `breed`, train/<id>.jpg, test/<id>.jpg without labels."""
    breeds = ["boston_bull", "dingo"] * 3
    table = commas([("id", "breed"), *((f"{n:032x}", breed) for n, breed in enumerate(breeds))])
    files = {f"train/{n:032x}.jpg": picture(n) for n in range(6)} | {f"test/{n:032x}.jpg": picture(n) for n in (50, 51)}
    write(tmp_path, {"in/sample_submission.csv": commas([("id", *breeds[:2]), (f"{50:032x}", 0.5, 0.5)])})
    documents, balance = run(tmp_path, {"labels.csv": table} | files, label="breed")
    labelled = [doc(picture(n), label=breed) for n, breed in enumerate(breeds)]
    assert set(expect(*labelled)) <= set(documents)
    unread = [name for name in balance.unread if name.endswith("jpg")]
    assert len(documents) + len(unread) + sum(balance.rejected.values()) >= 8


def test_a_table_of_two_columns_with_bars(tmp_path: Path) -> None:
    """Piper and Coqui: metadata.csv has `id|text`, where every text may have a comma."""
    table = "".join(f"{n:03d}|Hello number {n}, you.\n" for n in range(4))
    documents, _ = run(tmp_path, {"metadata.csv": table} | {f"wav/{n:03d}.wav": sound(n) for n in range(4)})
    assert documents == expect(*(doc(sound(n), f"Hello number {n}, you.") for n in range(4)))


@pytest.mark.parametrize("several", [False, True])
def test_an_object_from_files_to_captions(tmp_path: Path, several: bool) -> None:
    captions = {f"images/{n}.jpg": [f"a caption {n}", f"another {n}"] if several else f"a caption {n}" for n in range(4)}
    documents, _ = run(
        tmp_path, {"captions.json": json.dumps(captions)} | {name: picture(n) for n, name in enumerate(captions)}
    )
    texts = [Choices(some) if isinstance(some, list) else some for some in captions.values()]
    assert documents == expect(*(doc(picture(n), text) for n, text in enumerate(texts)))


def test_flickr_token_file(tmp_path: Path) -> None:
    table = "".join(f"{n}.jpg#{k}\tA dog {n} , {k} .\n" for n in range(3) for k in range(2))
    files = {f"Flicker8k_Dataset/{n}.jpg": picture(n) for n in range(3)}
    documents, _ = run(tmp_path, {"Flickr8k.token.txt": table} | files)
    assert documents == expect(*(doc(picture(n), Choices([f"A dog {n} , {k} ." for k in range(2)])) for n in range(3)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252"])
def test_a_spreadsheet_with_semicolons(tmp_path: Path, encoding: str) -> None:
    table = "Datei;Text;Länge\r\n" + "".join(f"bild{n}.jpg;Ein Hund, groß {n};3,5\r\n" for n in range(3))
    files: dict[str, str | bytes] = {f"bild{n}.jpg": picture(n) for n in range(3)}
    options = {"encoding": "cp1252"} if encoding == "cp1252" else {}
    documents, balance = run(tmp_path, {"daten.csv": table.encode(encoding)} | files, **options)
    assert documents == expect(*(doc(picture(n), f"Ein Hund, groß {n}") for n in range(3)))
    assert balance.unused == {"Länge": 3}


def test_a_table_of_a_few_files_does_not_hide_the_others(tmp_path: Path) -> None:
    """ImageNet's LOC_val_solution.csv names the pictures of val/ only."""
    files: dict[str, str | bytes] = {f"train/n0144/{n}.JPEG": picture(n) for n in range(3)}
    files |= {f"train/n0155/{n}.JPEG": picture(10 + n) for n in range(3)} | {
        f"val/v{n}.JPEG": picture(20 + n) for n in range(2)
    }
    files["val_solution.csv"] = commas([("ImageId", "label"), *((f"v{n}", "n0144") for n in range(2))])
    documents, _ = run(tmp_path, files)
    assert sum(line.startswith("<") for line in documents) == 8


def test_a_file_is_counted_once(tmp_path: Path) -> None:
    """A picture that no line names is one unread file."""
    files: dict[str, str | bytes] = {f"{n}.JPEG": picture(n) for n in range(5)}
    _, balance = run(tmp_path, files | {"a.jsonl": lines([{"image": f"{n}.JPEG", "caption": f"cat {n}"} for n in range(3)])})
    assert balance.unread == ["3.JPEG", "4.JPEG"]


# -- splits and messages


@pytest.mark.parametrize("folder", ["", "pictures/"])
def test_a_chat_beside_its_picture_may_name_it(tmp_path: Path, folder: str) -> None:
    files: dict[str, str | bytes] = {}
    for n in range(3):
        parts = [{"type": "image", "path": f"{folder}{n}.jpg"}, {"type": "text", "text": f"Q{n}"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"A{n}"}]
        files |= {f"x/{folder}{n}.jpg": picture(n), f"x/{folder}{n}.json": json.dumps({"messages": messages})}
    documents, _ = run(tmp_path, files)
    assert documents == expect(*(chat("user", picture(n), f"Q{n}", "assistant", f"A{n}") for n in range(3)))


def test_a_chat_whose_metadata_names_its_picture_keeps_it(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    about = json.dumps({"file_name": "0.jpg", "messages": messages})
    documents, _ = run(tmp_path, {"x/0.jpg": picture(0), "x/0.json": about})
    assert documents == expect(chat("user", picture(0), "Q", "assistant", "A"))


def test_a_picture_that_a_table_of_chats_names_late(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": f"A{n}"}]} for n in range(110)]
    rows[105]["messages"][0]["content"] = [{"type": "image", "path": "late.jpg"}, {"type": "text", "text": "Q"}]  # type: ignore[call-overload]
    documents, balance = run(tmp_path, {"x/chats.jsonl": lines(rows), "x/late.jpg": picture(1)})
    assert len(documents) == 110 and not balance.rejected
    assert set(expect(chat("user", picture(1), "Q", "assistant", "A105"))) <= set(documents)


def test_messages_name_real_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, {f"data0/train-0000{n}-of-00002.jsonl": lines([{"text": f"text {n}"}]) for n in range(2)})
    assert "data0/train-00000-of-00002.jsonl" in capfd.readouterr().err


def test_pointers_of_git_lfs_are_explained(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    with pytest.raises(ValueError, match="git lfs pull"):
        run(tmp_path, {f"data/{split}-00000-of-00001.parquet": pointer for split in ("train", "test")})


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_whose_medium_is_empty_is_rejected(tmp_path: Path, packed: bool) -> None:
    files: dict[str, str | bytes] = {"a.jpg": picture(1), "a.txt": "a cat", "b.jpg": b"", "b.txt": "a dog"}
    documents, balance = run(tmp_path, {"x.tar": tar(files.items())} if packed else files)
    assert documents == expect(doc(picture(1), "a cat"))
    assert sum(balance.rejected.values()) == 1


def test_numbered_captions_are_alternatives(tmp_path: Path) -> None:
    """Clotho: caption_1 to caption_5 of one sound."""
    rows = [(f"Distorted {n}.wav", *(f"A machine {n} hums, {k}." for k in range(5))) for n in range(3)]
    table = commas([("file_name", *(f"caption_{k}" for k in range(1, 6))), *rows])
    documents, _ = run(tmp_path, {"captions.csv": table} | {f"development/{row[0]}": sound(n) for n, row in enumerate(rows)})
    assert documents == expect(*(doc(sound(n), Choices(row[1:])) for n, row in enumerate(rows)))


def test_numbers_are_no_captions(tmp_path: Path) -> None:
    """CelebA: two tables of numbers for the same pictures."""
    files: dict[str, str | bytes] = {f"img_align_celeba/{n:06d}.jpg": picture(n) for n in range(1, 4)}
    files["list_attr_celeba.txt"] = "3\nBald Young\n" + "".join(f"{n:06d}.jpg -1  1\n" for n in range(1, 4))
    files["list_eval_partition.txt"] = "".join(f"{n:06d}.jpg {n - 1}\n" for n in range(1, 4))
    documents, _ = run(tmp_path, files)
    assert documents == expect(*(doc(picture(n)) for n in range(1, 4)))


def test_durations_are_no_labels(tmp_path: Path) -> None:
    """CSS10: transcript.txt has `file|raw|normalized|seconds`."""
    table = "".join(f"ach/a_{n}.wav|Roh {n}, ja.|Text {n}, ja.|{n}.25\n" for n in range(3))
    documents, _ = run(tmp_path, {"transcript.txt": table} | {f"ach/a_{n}.wav": sound(n) for n in range(3)})
    assert documents == expect(*(doc(sound(n), f"Text {n}, ja.") for n in range(3)))


def test_a_header_may_repeat_a_name(tmp_path: Path) -> None:
    documents, _ = run(tmp_path, {"a.csv": "text,text,label\na b,c d,x\ne f,g h,y\n"})
    assert len(documents) == 2
    assert [line.rpartition("label=")[2] for line in documents] == ["'x'", "'y'"]


def test_names_of_classes_are_no_document(tmp_path: Path) -> None:
    """webdataset's own layout for CLIP benchmarks: shards, and classnames.txt."""
    files = {f"{n:06d}.{kind}": data for n in range(4) for kind, data in (("png", picture(n, "png")), ("cls", str(n % 2)))}
    documents, balance = run(tmp_path, {"0.tar": tar(files.items()), "classnames.txt": "cat\ndog\n"})
    assert len(documents) == 4
    assert balance.unread in (["classnames.txt"], [])


def test_files_of_no_split_are_for_training_where_others_are_for_evaluation(tmp_path: Path) -> None:
    """Multilingual C4: c4-de and c4-de-validation."""
    files = {
        f"c4-de{split}.00000.jsonl": lines({"text": f"Text{split} {n}."} for n in range(3)) for split in ("", "-validation")
    }
    write(tmp_path / "in", files)
    summary = prepare(tmp_path / "in", tmp_path / "out", processes=1)
    assert {split: tally.documents for split, tally in summary.sources["in"].items()} == {"train": 3, "validation": 3}


def test_texts_are_not_taken_from_lines_that_name_files(tmp_path: Path) -> None:
    """Lhotse: names of files and texts lie deep in each line. They are joined, or the user is told."""
    cut = {
        "id": "u1",
        "supervisions": [{"text": "hello you"}],
        "recording": {"sources": [{"type": "file", "source": "wav/1.wav"}]},
    }
    try:
        documents, balance = run(tmp_path, {"cuts.jsonl": lines([cut]), "wav/1.wav": sound(1)})
    except ValueError as error:
        assert "cuts.jsonl" in str(error)
        return
    assert documents == expect(doc(sound(1), "hello you")) or "cuts.jsonl" in balance.unread or sum(balance.rejected.values())


def test_kind_chat_rejects_other_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no_conversation"):
        run(tmp_path, {"a.jsonl": lines([{"text": "not a chat"}])}, kind="chat")


def test_preferences_keep_the_question(tmp_path: Path) -> None:
    """DPO in strings: the rejected answer is never learned."""
    records = [
        {"prompt": f"Question {n} is it?", "chosen": f"good answer {n}", "rejected": f"bad answer {n}"} for n in range(3)
    ]
    documents, balance = run(tmp_path, {"a.jsonl": lines(records)})
    assert all("good" in line and "Question" in line and "bad" not in line for line in documents)
    assert balance.unused == {"rejected": 3}


SPLIT_NAMES = {
    "train": "train/a.txt train-clean-100/84/a.txt train_clean_360/a.txt TRAIN/DR1/a.txt trainset/a.txt mini_train.jsonl "
    "tr_TR/a.txt train.clean.100-00000-of-00014.jsonl cv-valid-train/a.txt my-test-project/train/a.txt protest.jsonl "
    "latest/a.txt wnut17train.jsonl train_v2.1.jsonl pretraining.jsonl trains/x.txt contest/x.txt wikipedia.jsonl",
    "validation": "val/a.txt val2017/a.txt dev-other/a.txt validation_matched.jsonl valid.jsonl valset/a.txt dev-v2.0.jsonl "
    "newsdev2016.jsonl cv-valid-dev/a.txt Validation/a.txt x-val-000.jsonl captions_val2014.jsonl",
    "test": "test/a.txt test-clean/61/a.txt test2017/a.txt testset/a.txt newstest2014.jsonl devtest.jsonl "
    "test_mismatched.jsonl cv-valid-test/a.txt eval/a.txt x_test.jsonl public_test/a.txt testing/a.txt",
}


def test_names_of_splits(tmp_path: Path) -> None:
    files = {name: f"{split} {name}" for split, names in SPLIT_NAMES.items() for name in names.split()}
    texts = {name: lines([{"text": text}]) if name.endswith("jsonl") else text for name, text in files.items()}
    prepare(write(tmp_path / "in", texts), tmp_path / "out", processes=1, fields="txt|text")
    found = {document.segments[0].text: split for split, some in read_back(tmp_path / "out").items() for document in some}
    assert found == {text: text.split()[0] for text in files.values()}


def test_the_splits_of_conll(tmp_path: Path) -> None:
    """CoNLL-2003 as its organizers ship it: testa is for development."""
    files = {name: f"{name} NNP B-NP B-PER\n\n" for name in ("eng.train", "eng.testa", "eng.testb")}
    write(tmp_path / "in", files)
    prepare(tmp_path / "in", tmp_path / "out", processes=1, kind="entities")
    texts = {split: [document.segments[0].text for document in some] for split, some in read_back(tmp_path / "out").items()}
    assert texts == {"train": ["eng.train"], "validation": ["eng.testa"], "test": ["eng.testb"]}


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_links_in_archives_are_refused(tmp_path: Path, kind: str) -> None:
    """Extracting them let files be written outside (CVE-2025-4517), even through tarfile's data filter."""
    (tmp_path / "secret.txt").write_text("the secret")
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            link = zipfile.ZipInfo("link.txt")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, str(tmp_path / "secret.txt"))
            archive.writestr("good.txt", "a good text")
    else:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, type, target in (("link.txt", tarfile.SYMTYPE, "good.txt"), ("hard.txt", tarfile.LNKTYPE, "good.txt")):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = type, target
                archive.addfile(member)
            member = tarfile.TarInfo("good.txt")
            member.size = 11
            archive.addfile(member, io.BytesIO(b"a good text"))
    documents, balance = run(tmp_path, {f"a.{kind}": file.getvalue()})
    assert documents == expect(doc("a good text"))
    assert set(balance.unread) == {"link.txt"} | ({"hard.txt"} if kind == "tar.gz" else set())


def test_lists_of_pictures_are_no_documents(tmp_path: Path) -> None:
    """CUB-200 and Pascal VOC: text files in other folders than the pictures list their numbers."""
    cub: dict[str, str | bytes] = {f"images/00{n % 2}.Bird/x_{n}.jpg": picture(n) for n in range(4)}
    cub["images.txt"] = "".join(f"{n + 1} 00{n % 2}.Bird/x_{n}.jpg\n" for n in range(4))
    cub["image_class_labels.txt"] = cub["train_test_split.txt"] = "".join(f"{n + 1} {n % 2}\n" for n in range(4))
    voc: dict[str, str | bytes] = {f"JPEGImages/2007_{n:06d}.jpg": picture(n) for n in range(4)}
    voc |= {f"Annotations/2007_{n:06d}.xml": "<annotation/>" for n in range(4)}
    voc |= {f"ImageSets/Main/{name}.txt": f"2007_{n:06d}\n" for n, name in enumerate(("train", "val"))}
    for name, files in (("cub", cub), ("voc", voc)):
        documents, _ = run(tmp_path / name, files)
        assert len(documents) == 4 and all(line.startswith("<jpg") for line in documents), name


@pytest.mark.parametrize(
    ("named", "stored"),
    [
        ("é{}.jpg", "images/e\u0301{}.jpg"),  # macOS decomposes letters in names of files
        ("{}.JPG", "images/{}.jpg"),
        ("images\\{}.jpg", "images/{}.jpg"),
        ("/home/alice/data/images/{}.jpg", "images/{}.jpg"),
        ("./images/{}.jpg", "images/{}.jpg"),
    ],
    ids=["unicode", "case", "backslash", "other machine", "dot"],
)
def test_names_in_tables_as_people_write_them(tmp_path: Path, named: str, stored: str) -> None:
    table = commas([("filename", "caption"), *((named.format(n), f"caption {n}") for n in range(3))])
    documents, _ = run(tmp_path, {"meta.csv": table} | {stored.format(n): picture(n) for n in range(3)})
    assert documents == expect(*(doc(picture(n), f"caption {n}") for n in range(3)))


def test_a_row_may_name_several_pictures(tmp_path: Path) -> None:
    records = [{"images": [f"{2 * n}.jpg", f"{2 * n + 1}.jpg"], "text": f"two pictures {n}"} for n in range(2)]
    documents, _ = run(tmp_path, {"a.jsonl": lines(records)} | {f"{n}.jpg": picture(n) for n in range(4)})
    assert documents == expect(*(doc(picture(2 * n), picture(2 * n + 1), f"two pictures {n}") for n in range(2)))


# -- data sets of OpenSLR, Kaggle and the hub that were tried as a new user would


def test_two_tables_that_say_the_same_are_read_once(tmp_path: Path) -> None:
    """M-AILABS: metadata.csv and metadata_mls.json hold the same transcripts."""
    table = "".join(f"a_{n}|Dr. {n}, ja.|Doktor {n}, ja.\n" for n in range(3))
    about = {f"a_{n}.wav": {"clean": f"Doktor {n}, ja.", "original": f"Dr. {n}, ja."} for n in range(3)}
    tables: dict[str, str | bytes] = {"k/metadata.csv": table, "k/metadata_mls.json": json.dumps(about), "info.txt": "Eva K."}
    documents, balance = run(tmp_path, tables | {f"k/wavs/a_{n}.wav": sound(n) for n in range(3)})
    assert documents == expect(*(doc(sound(n), f"Doktor {n}, ja.") for n in range(3)))
    assert balance.rejected == {"duplicate": 3} and balance.unread == ["info.txt"]


def test_tables_about_speakers_and_classes_are_no_texts(tmp_path: Path) -> None:
    """Multilingual LibriSpeech: transcripts.txt a split, speakers are groups; metainfo and segments are no texts."""
    files: dict[str, str | bytes] = {"metainfo.txt": "SPEAKER | BOOK\n48 | X\n", "words.txt": "n01\tgoldfish, carp\nn02\tcat\n"}
    for n, split in enumerate(("train", "dev", "test")):
        stems = [f"{n}8_103_{k:06d}" for k in range(2)]
        files[f"{split}/transcripts.txt"] = "".join(f"{stem}\tes war einmal {stem[-1]}\n" for stem in stems)
        files[f"{split}/segments.txt"] = "".join(f"{stem}\thttp://x.org/a.mp3\t0.0\t1.0\n" for stem in stems)
        files |= {f"{split}/audio/{n}8/103/{stem}.flac": sound(2 * n + k, "flac") for k, stem in enumerate(stems)}
    documents, balance = run(tmp_path, files)
    said = [doc(sound(2 * n + k, "flac"), f"es war einmal {k}", group=f"{n}8") for n in range(3) for k in range(2)]
    assert documents == expect(*said) and not balance.rejected and not balance.unused
    assert balance.unread == ["metainfo.txt", "segments.txt", "segments.txt", "segments.txt", "words.txt"]


@pytest.mark.parametrize("with_json", [True, False])
def test_lists_of_files_by_class_are_labels_and_splits(tmp_path: Path, with_json: bool) -> None:
    """Food-101: meta/train.txt and meta/train.json; each list of a class became one document of all its pictures."""
    names = {split: {kind: [f"{kind}/{n}" for n in numbers] for kind in ("pie", "soup")}
             for split, numbers in (("train", (1, 2, 3)), ("test", (4,)))}  # fmt: skip
    files: dict[str, str | bytes] = {f"images/{kind}/{n}.jpg": picture(n + 10 * (kind == "pie")) for kind in ("pie", "soup")
                                     for n in range(1, 5)}  # fmt: skip
    for split, classes in names.items():
        files[f"meta/{split}.txt"] = "".join(f"{name}\n" for some in classes.values() for name in some)
        files |= {f"meta/{split}.json": json.dumps(classes)} if with_json else {}
    write(tmp_path / "in", files)
    prepare(tmp_path / "in", tmp_path / "out", processes=1, validation_fraction=0)
    found = {split: sorted(document.meta["label"] for document in some) for split, some in read_back(tmp_path / "out").items()}
    assert found == {"train": ["pie"] * 3 + ["soup"] * 3, "test": ["pie", "soup"]}


def test_lists_of_files_by_split_are_no_labels(tmp_path: Path) -> None:
    names = {"train": [f"images/{n}.jpg" for n in range(3)], "val": ["images/3.jpg"]}
    write(tmp_path / "in", {"splits.json": json.dumps(names)} | {f"images/{n}.jpg": picture(n) for n in range(4)})
    prepare(tmp_path / "in", tmp_path / "out", processes=1)
    found = {split: [document.meta.get("label") for document in some] for split, some in read_back(tmp_path / "out").items()}
    assert found == {"train": [None] * 3, "validation": [None]}


def test_a_header_with_empty_columns_is_no_row(tmp_path: Path) -> None:
    """SMS Spam Collection of Kaggle: `v1,v2,,,` in Latin-1."""
    table = 'v1,v2,,,\r\nham,"Go on, then.. £5",,,\r\nspam,Free entry £100 a week,,,\r\n'
    documents, balance = run(tmp_path, {"spam.csv": table.encode("latin-1")}, encoding="latin-1", label="v1")
    assert documents == expect(doc("Go on, then.. £5", label="ham"), doc("Free entry £100 a week", label="spam"))
    assert balance.unused == {f"column_{n}": 2 for n in (2, 3, 4)}


def test_parse_trees_are_no_texts_and_a_dash_is_no_label(tmp_path: Path) -> None:
    """SNLI: `gold_label` is "-" where the annotators did not agree."""
    records = [{"gold_label": label, "sentence1": f"A man {n}.", "sentence1_parse": "(ROOT (NP a))", "sentence2": f"So {n} is."}
               for n, label in enumerate(("-", "neutral"))]  # fmt: skip
    documents, balance = run(tmp_path, {"snli_1.0_train.jsonl": lines(records)})
    assert documents == expect(doc("A man 0.", "So 0 is."), doc("A man 1.", "So 1 is.", label="neutral"))
    assert balance.unused == {"sentence1_parse": 2}


def test_ids_of_classes_are_labels_and_no_captions(tmp_path: Path) -> None:
    """Tiny ImageNet: val_annotations.txt has picture, class and a box, without header."""
    table = "".join(f"val_{n}.JPEG\tn0162981{n % 2}\t{n}\t32\t44\t62\n" for n in range(6))
    documents, _ = run(tmp_path, {"val/annotations.txt": table} | {f"val/images/val_{n}.JPEG": picture(n) for n in range(6)})
    assert documents == expect(*(doc(picture(n), label=f"n0162981{n % 2}") for n in range(6)))
