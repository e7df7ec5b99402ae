"""prepare_fineweb.py: nothing lost between text and shards, and every fault ends in one line."""
import base64
import collections
import contextlib
import dataclasses
import fcntl
import gzip
import io
import itertools
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import types
from array import array
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import fables
import prepare_fineweb as pf
from configurator import Fault, UserError, load
from data import (PATTERN, cut_at_eot, encode, find_dataset, find_shards, format_instruction, get_tokenizer, lock,
                  read_examples, read_meta, read_shard, write_shard)

ROOT = Path(__file__).resolve().parent.parent
ODD = ["", " ", "plain words, and more of them", "<|endoftext|>", "a<|endoftext|>b <|endoftext|>", "null \0 byte",
       "naïve Größe 中文 👩‍👩‍👧 ｆ", "\ufeffmark", "line\r\nbreaks\r\n\r\n", "\t \n  tabs", "don't we'll I'm",
       "1234567890 3.14", "\u202eleft", "e\u0301\u0327", "\ud7ff\ue000\U0010ffff", "".join(map(chr, range(1, 300)))]
SMALL = ("--tokenizer=corpus", "--vocab_size=300", "--workers=1", "--max_tokens=0")


COMMAND = [sys.executable, str(ROOT / "prepare_fineweb.py")]


def run_in(cwd, *args, code=0, **kwargs):
    """Run the script in a folder; returns its output, or the one line with which it refused."""
    result = subprocess.run([*COMMAND, *args], cwd=cwd, capture_output=True, text=True, **kwargs)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (result.returncode, len(lines)) == (code, code > 0) and "Traceback" not in result.stderr, result.stderr
    return lines[0] if code else result.stdout


def prepare_in(cwd, *args):
    """As `run_in`, but inside this process, which saves the seconds of importing torch."""
    out = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out):
        pf.main(load(pf.Config, args))
    return out.getvalue()


def prepare(source, out, **settings):
    """Run `prepare` in this process, with a small tokenizer trained on the text; returns the folder of shards."""
    return pf.prepare(pf.Config(str(source), out=str(out), **{"tokenizer": "corpus", "vocab_size": 300, **settings}))


def refused(function, *args, error=UserError, **settings):
    """The one line with which the program would end."""
    with pytest.raises(error) as raised:
        function(*args, **settings)
    return str(raised.value)


def sentences(n, seed=0):
    rng = random.Random(seed)
    return [f"{i}: " + " ".join(rng.choices("the a cat dog sees hears near under old new tree house".split(), k=30))
            for i in range(n)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tokens_in(folder, split):
    return np.concatenate([read_shard(path) for path in find_shards(folder, split)])


def documents(folder, split):
    """The texts in the shards of a split, in order."""
    tokenizer, ids = pf.get_tokenizer(read_meta(folder)["tokenizer"]), tokens_in(folder, split)
    starts = np.flatnonzero(ids == tokenizer.eot_token)
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(ids, starts)[1:]]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def naive_train(texts, n_merges):
    """Count all pairs afresh before each merge: slow, and plainly right."""
    import regex
    words = [[bytes([b]) for b in word.encode()] for text in texts for word in regex.findall(PATTERN, text)]
    ids = {bytes([i]): i for i in range(256)}
    while len(ids) < 256 + n_merges:
        pairs = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        ids.setdefault(best[0] + best[1], len(ids))
        for word in words:
            for i in range(len(word)):
                if tuple(word[i:i + 2]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
    return list(ids)


@pytest.mark.parametrize("texts", [["low lower lowest newest widest aaaa aaa aaaaaaa abab"], [*sentences(5), "unheard"],
                                   ODD])
def test_trainer_equals_the_naive_one(texts):
    spec = pf.train_tokenizer(texts, 256 + 80 + 1)
    assert [base64.b64decode(token) for token in spec["tokens"]] == naive_train(texts, 80)
    tokenizer = get_tokenizer(json.loads(json.dumps(spec)))
    assert tokenizer.n_vocab == len(spec["tokens"]) + 1 <= 337 and tokenizer.eot_token == tokenizer.n_vocab - 1


def test_of_a_closed_vocabulary_each_word_is_a_token_and_nothing_else_is():
    spec = pf.train_tokenizer(sentences(5), 400)
    words = {word.encode() for text in sentences(5) for word in re.findall(r" ?[a-z]+| ?\d+|:", text)}
    tokens = {base64.b64decode(token) for token in spec["tokens"]}
    assert tokens == words | {bytes([i]) for i in range(256)} and len(spec["tokens"]) == len(tokens)
    tokenizer = get_tokenizer(spec)
    for text in (*sentences(20), *ODD, "unheard words and the cat"):
        assert tokenizer.decode(encode(tokenizer, text)[1:].tolist()) == text
    assert len(encode(tokenizer, " the old house sees a cat")) == 7


@pytest.mark.parametrize("name", ["corpus", "gpt2"])
def test_any_text_comes_back(name):
    try:
        tokenizer = get_tokenizer({"name": "gpt2"} if name == "gpt2" else pf.train_tokenizer(sentences(50), 400))
    except UserError:
        pytest.skip("GPT-2's vocabulary is neither cached nor can it be downloaded")
    rng = random.Random(1)
    noise = ["".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xd800), rng.randrange(0xe000, 0x110000)]))
                     for _ in range(300)) for _ in range(20)]
    for text in [*ODD, *noise, "\n".join(sentences(1000)), ("word" + " " * 9 + "\n 'tis") * 10_000]:
        ids = encode(tokenizer, text)                                # the long ones are encoded in pieces
        assert ids.dtype == np.uint16 and ids[0] == tokenizer.eot_token not in ids[1:]
        assert tokenizer.decode(ids[1:].tolist()) == text
        assert ids[1:].tolist() == tokenizer.encode_ordinary(text)


def test_giant_words_and_gaps_come_back_soon():
    tokenizer, start = get_tokenizer(pf.train_tokenizer(sentences(50), 400)), time.monotonic()
    for text in ("x" * 200_000, " " * 1_000_000, "\n" * 1_000_000 + "x", "word " * 50_000, "é" * 100_001):
        assert tokenizer.decode(encode(tokenizer, text)[1:].tolist()) == text
    assert time.monotonic() - start < 20


def test_a_shard_is_what_the_format_says(tmp_path):
    tokens = np.array([0, 1, 50256, 65535], np.uint16)
    write_shard(tmp_path / "train_000000.bin", tokens)
    header = np.array([20240520, 1, 4] + [0] * 253, "<i4").tobytes()
    assert (tmp_path / "train_000000.bin").read_bytes() == header + b"\x00\x00\x01\x00\x50\xc4\xff\xff"
    read = read_shard(tmp_path / "train_000000.bin")
    assert isinstance(read, np.memmap) and not read.flags.writeable and read.tolist() == tokens.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.bin"]


@pytest.mark.parametrize("change, found", [
    (lambda d: d[:-2], "20240520, 1, 4 and 1,030;"), (lambda d: d + b"\0", "20240520, 1, 4 and 1,033;"),
    (lambda d: d[:100], "20240520, 1, 4 and 100;"), (lambda d: b"", "0, 0, 0 and 0;"),
    (lambda d: b"\0" + d[1:], "20240384, 1, 4 and 1,032;"), (lambda d: d[:4] + b"\3" + d[5:], "20240520, 3, 4"),
    (lambda d: d[:8] + b"\0" * 4 + d[12:], ", 0 and"), (lambda d: d[:8] + b"\xff" * 4 + d[12:], ", -1 and")])
def test_a_damaged_shard_is_refused(tmp_path, change, found):
    path = tmp_path / "val_000000.bin"
    write_shard(path, np.arange(4))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path}: expected magic 20240520, version 1 or 2.*found.*{found}"):
        read_shard(path)


def test_public_shards_are_read(tmp_path):
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        write_shard(tmp_path / name, np.arange(10))
    meta = read_meta(tmp_path)
    assert meta["tokenizer"] == {"name": "gpt2"} and meta["vocab_size"] == 50257 and meta["train_tokens"] == 10
    assert [path.name for path in find_shards(tmp_path, "val")] == ["fineweb_val_000000.bin"]
    write_shard(tmp_path / "fineweb_train_000001.bin", np.arange(1, 11))
    assert read_meta(tmp_path)["fingerprint"] != meta["fingerprint"]
    with pytest.raises(UserError, match="python prepare_fineweb.py"):
        find_shards(tmp_path / "nowhere", "train")
    (tmp_path / "t.txt").write_text("text")                             # ours are not mixed into these
    assert "other origin" in refused(prepare_in, tmp_path, "--source=t.txt", "--tokenizer=corpus", "--out=.")
    assert len(list(tmp_path.iterdir())) == 3


def test_find_dataset_takes_the_first_there_is(tmp_path):
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "train_000000.bin", np.arange(10))
    assert find_dataset("a, c,b", tmp_path) == tmp_path / "c"
    assert find_dataset(str(tmp_path / "b")) == tmp_path / "b"
    assert "prepare_fineweb.py --source=fineweb," in refused(find_dataset, "fineweb", tmp_path)
    assert "--source=FILE --out=" in refused(find_dataset, "a", tmp_path)
    assert find_dataset("fineweb,fables", tmp_path) is None             # the caller prepares it


def test_meta_files_that_are_damaged_or_not_true_are_refused(tmp_path):
    folder = prepare(write_jsonl(tmp_path / "t.jsonl", sentences(50)), tmp_path / "o")
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"finished": False}))
    assert "not finished" in refused(read_meta, folder) and "no data" in refused(find_dataset, str(folder))
    path.write_text(json.dumps(meta | {"shards": [*meta["shards"], {**meta["shards"][0], "name": "train_000001.bin"}]}))
    assert "train_000001.bin is missing" in refused(read_meta, folder)
    names = ("", "..", "../train_000000.bin", "/", "\0.bin")
    odd = [{"shards": [meta["shards"][0] | {"name": name}]} for name in names] + [{"shards": [3]}]
    wrong = [json.dumps(meta | change) for change in ({"vocab_size": "300"}, {"tokenizer": None}, *odd)]
    for text in ("{}", "[]", "{", "5", "", "\xff", 100_000 * "[", *wrong):
        path.write_text(text, encoding="latin-1")
        for function in (read_meta, find_dataset):
            assert f"{path} is damaged" in refused(function, str(folder))


def test_tokenizers_that_are_damaged_or_not_ours_are_refused():
    spec = pf.train_tokenizer(sentences(5), 300)
    assert get_tokenizer(spec).n_vocab <= 300
    tokens = spec["tokens"]
    bad_tokens = [5, None, ["not base64!"], tokens[1:], tokens[:99], [*tokens, tokens[-1]], [3, *tokens[1:]]]
    bad = [*({"tokens": other} for other in bad_tokens), {"pattern": "("}, {"pattern": "(a|a)*"}, {"name": "r50k_base"}]
    for other in ({}, [], {"name": "../../etc/passwd"}, {"name": None}, *(spec | change for change in bad)):
        assert "not one of ours" in refused(get_tokenizer, other)


def test_ids_are_cut_at_the_end_of_text():
    assert [cut_at_eot(ids, 9) for ids in ([1, 2, 9, 3, 9], [9], [1, 2], [])] == [[1, 2], [], [1, 2], []]


def test_the_fables_are_prepared_with_a_token_for_each_word(tmp_path, monkeypatch):
    monkeypatch.setattr(pf, "FABLES", 2000)
    folder = prepare("fables", tmp_path / "fables", tokenizer="", vocab_size=4096)
    meta, tokenizer = read_meta(folder), get_tokenizer(read_meta(folder)["tokenizer"])
    assert "embedded corpus" in meta["label"] and (meta["licence"], meta["documents"]) == ("MIT", 2000)
    told = sorted(text for split in ("train", "val") for text in documents(folder, split))
    rng = random.Random(1)
    drawn = sorted(fables.draw(rng)[0] for _ in range(2000))
    assert len({*drawn} - {*told}) <= 2                             # one is cut where the validation split begins
    for text in drawn:
        assert len(encode(tokenizer, text)) == 1 + len(re.findall(r" ?[A-Za-z]+| ?[^\sA-Za-z]+", text))


def test_all_kinds_of_files_give_their_documents(tmp_path):
    texts, source = sentences(50), tmp_path / "größe und so"
    (source / "sub").mkdir(parents=True)
    lines = [json.dumps({"text": text, "id": 1}).encode() + b"\r\n" for text in texts]
    (source / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines[:10]))
    (source / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[10:20])))
    (source / "c.jsonl.xz").write_bytes(lzma.compress(b"".join(lines[20:30]).rstrip()))
    table = pyarrow.table({"id": range(10), "text": texts[30:40]})
    parquet.write_table(table, source / "d.parquet", row_group_size=3)
    (source / "sub" / "e.txt").write_text(texts[40] + "\n<|endoftext|>\n")
    (source / "f.doc").write_text("ignored")
    prepare_in(tmp_path, f"--source={source}", "--out=o ü", "--val_fraction=0", *SMALL)
    assert documents(tmp_path / "o ü", "train") == [*texts[:40], texts[40] + "\n<|endoftext|>\n"]
    prepare_in(tmp_path, f"--source={source}/d.*", "--val_fraction=0", *SMALL)
    assert documents(tmp_path / "data" / "d", "train") == texts[30:40]


def test_markdown_is_read_what_is_skipped_is_named_and_a_pipe_is_passed_over(tmp_path, capsys):
    source = tmp_path / "t"
    source.mkdir()
    (source / "a.md").write_text("# one")
    for name in ("b.doc", "c.pdf", "d.epub", "e", "f.rtf"):
        (source / name).write_text("skipped")
    os.mkfifo(source / "z.txt")
    pf.prepare(pf.Config(str(source), "corpus", 300, val_fraction=0, out=str(tmp_path / "o")))
    assert documents(tmp_path / "o", "train") == ["# one"]
    err = capsys.readouterr().err
    assert all(name in err for name in ("b.doc", "c.pdf", "d.epub")) and "and 2 more" in err and "f.rtf" not in err


def test_chats_are_instructions_and_their_last_message_the_response(tmp_path):
    chat = [dict(role="system", content="Be kind."), dict(role="user", content="Hi?")]
    chat.append(dict(role="assistant", content="Ho."))
    assert pf.read_record({"messages": chat}) == ("Be kind.\nHi?\n\nAnswer:", " Ho.")
    again = [*chat, dict(role="user", content="Why?"), dict(role="assistant", content="So.")]
    assert pf.read_record({"messages": again, "text": 3}) == ("Be kind.\nHi?\nHo.\nWhy?\n\nAnswer:", " So.")


def test_no_line_and_no_file_is_taken_into_memory_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(pf, "LONGEST", 1000)
    (tmp_path / "a.txt").write_text("word " * 500)
    assert [len(row["text"]) for row in pf.read_rows(tmp_path / "a.txt", ".txt")] == [1000, 1000, 500]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"x" * 2000 + b'"}'))
    with pytest.raises(ValueError, match="a line of more than 1,000 characters"):
        list(pf.read_rows(tmp_path / "a.jsonl.gz", ".gz"))


def test_damaged_bytes_are_replaced_and_counted(tmp_path):
    good, source = "caf\u00e9 \ufffd \0 \r\n", tmp_path / "t"
    source.mkdir()
    (source / "a.txt").write_bytes(b"\xef\xbb\xbf" + good.encode() + b"a\xffb\xc3" + b"x" * 300_000)
    (source / "b.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00 whole"}\n{"text": "half \\ud83d of one, \xff"}\n')
    out = prepare_in(tmp_path, "--source=t", "--val_fraction=0", *SMALL)
    assert documents(tmp_path / "data" / "t", "train") == [
        good + "a\ufffdb\ufffd" + "x" * 300_000, "😀 whole", "half \ufffd of one, \ufffd"]
    assert "4 bytes that were not UTF-8 replaced" in out and read_meta(tmp_path / "data" / "t")["replaced"] == 4


@pytest.mark.parametrize("name, data, says", [
    ("a.jsonl", b'{"text": "fine"}\n{"text": ', "a.jsonl:2: cannot be read: Expecting value"),
    ("a.jsonl", b'\n{"t": "x"}', "a.jsonl:2: cannot be read: no string"), ("a.jsonl", b'["text"]', "a.jsonl:1: "),
    ("a.jsonl", b'{"text": 3}', "a.jsonl:1: cannot be read: no string"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 9, mtime=0)[:-9], "a.jsonl.gz:"),
    ("a.jsonl.xz", lzma.compress(b'{"text": "fine"}\n' * 9)[:-9], "a.jsonl.xz:"),
    ("a.jsonl.xz", b"no archive at all", "a.jsonl.xz:1: cannot be read"),
    ("a.parquet", b"PAR1 and no more", "a.parquet:1: cannot be read"),
    ("a.txt", "It was a dark night. ".encode("utf-16"), "a.txt:1: cannot be read: no text in UTF-8"),
    ("a.md", bytes(range(256)) * 99, "a.md:1: cannot be read: no text in UTF-8"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}', "should end with one of role assistant"),
    ("a.jsonl", b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "hi"}]}', "a.jsonl:1: cannot"),
    ("a.pdf", b"%PDF", "source=a.* is no file"), ("a.txt", b"", "no tokens"), ("a.txt", b" \n\t\r\n", "no tokens"),
    ("a.jsonl", b"", "no tokens"), ("b.txt", b"x", "source=a.* is no file")])
def test_bad_sources_are_refused_and_leave_nothing(tmp_path, monkeypatch, name, data, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(data)
    assert says in refused(pf.prepare, pf.Config(source="a.*", tokenizer="corpus", vocab_size=300))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_parquet_without_text_is_refused(tmp_path):
    for column, values, row in (("words", ["x"], 1), ("text", ["x", None], 2)):
        parquet.write_table(pyarrow.table({column: values}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=f'a.parquet:{row}: .*no string under the key "text"'):
            list(pf.read_documents(tmp_path / "a.parquet"))


def test_fineweb_is_streamed(tmp_path, monkeypatch):
    """With a hub that is made up: what is asked of it, and that the recorded commit serves the rerun."""
    asked, commit, texts = [], "0123456789" * 4, [text * 200 for text in sentences(600)]

    class Rows(list):
        num_shards = 1

        def select_columns(self, columns):
            yield from ({column: row for column in columns} for row in self)
            if len(self) == 590:
                raise RuntimeError("gone")

        def shard(self, n, i, contiguous):
            self.num_shards = 1
            return Rows(self[i::n])

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Rows(texts if len(asked) > 2 else texts[:590])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    cfg = pf.Config(shard_tokens=900_000, val_fraction=0, out=str(tmp_path / "o"), revision=commit, max_tokens="0")
    byte = pf.train_tokenizer([], 257)
    monkeypatch.setattr(pf, "get_tokenizer", lambda spec, make=pf.get_tokenizer: make(byte))
    error = refused(pf.prepare, cfg, error=Fault)
    assert "RuntimeError: gone" in error and "--source=FILE" in error
    assert (tmp_path / "o" / "train_000000.bin").exists()
    pf.prepare(dataclasses.replace(cfg, revision=""))
    expected = ("HuggingFaceFW/fineweb", "sample-10BT"), {"split": "train", "streaming": True, "revision": commit}
    assert asked == [expected] * len(asked) and documents(tmp_path / "o", "train") == texts
    meta = read_meta(tmp_path / "o")
    assert (meta["revision"], meta["licence"], meta["documents"]) == (commit, "ODC-By 1.0", 600)
    for Rows.num_shards in (1, 4):                  # every fourth document, or every fourth of the hub's files
        assert list(pf.read_hub("x/y", commit, "default", (1, 4))) == [commit, *((text,) for text in texts[1::4])]


@pytest.mark.slow
def test_no_network_is_said_in_one_line(tmp_path):
    nowhere = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
               "HTTPS_PROXY": "http://127.0.0.1:9", "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")}
    start = time.monotonic()
    line = run_in(tmp_path, code=1, env=nowhere)
    assert all(word in line for word in ("HF_TOKEN", "HF_ENDPOINT", "--source=FILE", "--source=fables"))
    (tmp_path / "t.txt").write_text("some text")
    line = run_in(tmp_path, "--source=t.txt", code=2, env=nowhere)
    assert all(word in line for word in ("vocab.bpe", "encoder.json", "TIKTOKEN_CACHE_DIR", "--tokenizer=corpus"))
    assert time.monotonic() - start < 20 and not (tmp_path / "data").exists()


@pytest.mark.parametrize("setting, says", [
    ("max_tokens=many", "write for example 50k, 100M"), ("part=2/2", "0 <= i < n"), ("part=1", "0 <= i < n"),
    ("tokenizer=bert", "gpt2, corpus, a folder"), ("vocab_size=256", "choose 257 to 65536"),
    ("vocab_size=65537", "65536"),
    ("val_fraction=1", "val_fraction=1.0"), ("shard_tokens=0", "shard_tokens=0"), ("workers=-1", "workers=-1")])
def test_bad_settings_are_refused(setting, says):
    assert says in refused(load, pf.Config, [f"--{setting}"])
    assert [pf.parse_count(text) for text in ("0", "50k", "1.5M", "2B", "1_000")] == [0, 50_000, 1_500_000, 2e9, 1000]


def test_validation_is_chosen_by_the_text_alone(tmp_path):
    texts = sentences(600)
    for name, order in (("a", texts), ("b", texts[::-1])):
        write_jsonl(tmp_path / f"{name}.jsonl", order)
        prepare_in(tmp_path, f"--source={name}.jsonl", "--val_fraction=0.1", *SMALL)
    a, b = ({split: documents(tmp_path / "data" / name, split) for split in ("train", "val")} for name in "ab")
    assert set(a["val"]) == set(b["val"]) and 20 < len(a["val"]) < 120
    assert sorted(a["train"] + a["val"]) == sorted(texts) and [t for t in texts if t in set(a["train"])] == a["train"]


@pytest.mark.parametrize("texts", [["one document, and no more than this one"], sentences(3), sentences(100)])
@pytest.mark.parametrize("fraction", [0.005, 0.9])
def test_a_small_source_has_validation_too(tmp_path, texts, fraction):
    prepare(write_jsonl(tmp_path / "t.jsonl", texts), tmp_path / "o", val_fraction=fraction)
    n_train, n_val = (len(tokens_in(tmp_path / "o", split)) for split in ("train", "val"))
    tokenizer = get_tokenizer(read_meta(tmp_path / "o")["tokenizer"])
    total = sum(len(encode(tokenizer, text)) for text in texts)
    assert n_train + n_val == total and n_train > 0 and n_val >= max(1, total // 20)


def test_shards_budget_meta_and_rerun(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", sentences(400))
    args = ("--source=t.jsonl", "--shard_tokens=2000", "--val_fraction=0.1", "--max_tokens=7k", *SMALL[:3])
    out, folder = prepare_in(tmp_path, *args), tmp_path / "data" / "t"
    meta, before = read_meta(folder), contents(folder)
    sizes = [len(read_shard(path)) for path in find_shards(folder, "train")]
    assert sizes == [2000, 2000, 2000, 1000] and meta["train_tokens"] == 7000 and "7,000 training" in out
    assert len(tokens_in(folder, "val")) == meta["val_tokens"] and meta == json.loads(before["meta.json"])
    assert (meta["source"], meta["vocab_size"], meta["licence"]) == ("t.jsonl", 300, "yours")
    assert set(before) == {"meta.json", *(shard["name"] for shard in meta["shards"])}
    assert "already prepared" in prepare_in(tmp_path, *args) and contents(folder) == before
    assert "prepared with vocab_size=300;" in refused(prepare_in, tmp_path, *args, "--vocab_size=301")
    assert contents(folder) == before
    write_jsonl(tmp_path / "t.jsonl", sentences(401))
    assert "revision=1 file" in refused(prepare_in, tmp_path, *args)


def test_without_a_progress_bar_the_shards_are_the_same(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "t.jsonl", sentences(60))
    prepare(tmp_path / "t.jsonl", tmp_path / "with")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    prepare(tmp_path / "t.jsonl", tmp_path / "without")
    assert contents(tmp_path / "with") == contents(tmp_path / "without")


def test_killed_and_run_again_gives_the_same_bytes(tmp_path):
    texts = sentences(10_000)
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    args = (f"--source={source}", "--shard_tokens=20_000", "--val_fraction=0.05", *SMALL)
    prepare_in(tmp_path, *args, "--out=whole")
    process = subprocess.Popen([*COMMAND, *args, "--out=killed"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "train_000003.bin").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert "not finished" in refused(read_meta, tmp_path / "killed")
    first = tmp_path / "killed" / "train_000000.bin"
    (tmp_path / "killed" / "train_000004.bin.tmp").write_bytes(b"half a shard")
    inode = first.stat().st_ino
    prepare_in(tmp_path, *args, "--out=killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert first.stat().st_ino == inode                                 # kept, not written again
    first.unlink()
    prepare_in(tmp_path, *args, "--out=killed")                                # a shard is gone: made again
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(documents(tmp_path / "killed", "train") + documents(tmp_path / "killed", "val")) == sorted(texts)


def test_memory_does_not_grow_with_the_source(tmp_path):
    """A shard is written without a copy, and few documents are read ahead of those that are encoded."""
    tokens = array("H", bytes(8_000_000))
    tracemalloc.start()
    write_shard(tmp_path / "train_000000.bin", memoryview(tokens)[:3_000_000])
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    texts = ((str(i),) for i in itertools.count())
    meta = {"tokenizer": pf.train_tokenizer([], 257), "source": "text", "kind": "text", "train_tokens": 0}
    rows = pf.encode_all(texts, meta, 2, sys.maxsize)
    assert [len(row.tokens) for row in itertools.islice(rows, 1000)] == [1 + len(str(i)) for i in range(1000)]
    rows.close()
    assert int(next(texts)[0]) < 1300


def test_a_document_longer_than_shards_is_resumed_inside(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "t.jsonl", [" ".join(sentences(100)), *sentences(20), " ".join(sentences(99))])
    cfg = pf.Config(source=str(source), tokenizer="corpus", vocab_size=300, max_tokens="0", shard_tokens=333)
    whole = contents(pf.prepare(dataclasses.replace(cfg, out=str(tmp_path / "whole"))))
    cfg, write, stops = dataclasses.replace(cfg, out=str(tmp_path / "stopped")), write_shard, iter(range(99))

    def write_and_stop(*args):
        if next(stops) % 3 == 2:
            raise OSError("stopped")
        return write(*args)

    monkeypatch.setattr(pf, "write_shard", write_and_stop)
    for _ in range(9):
        assert refused(pf.prepare, cfg, error=Fault).startswith("stopped; mend that")
    monkeypatch.undo()
    (tmp_path / "stopped" / "meta.lock").touch()                        # a lock file nobody holds is no lock
    assert contents(pf.prepare(cfg)) == whole and len(whole) > 19


PAIRS = [("Say it again.", f"the cat {i}", f"the cat {i}") for i in range(80)]


def write_pairs(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples_in(path):
    """[(instruction, response)] of a shard, in tokens."""
    tokens, lengths = read_examples(path)
    parts = np.split(tokens, lengths.cumsum())[:-1]
    return list(zip(parts[::2], parts[1::2], strict=True))


def test_instruction_records_become_whole_examples(tmp_path):
    """Each comes back as it was, in three spellings of the keys, between two end-of-text tokens."""
    rows = []
    for question, context, answer in PAIRS:
        rows += [dict(instruction=question, input=context, output=answer)]
        rows += [dict(instruction=question, context=context, response=answer)]
        rows += [dict(prompt=f"{question}\n{context}", response=answer)]
    folder = prepare(write_pairs(tmp_path / "t.jsonl", rows), tmp_path / "out")
    meta, found = read_meta(folder), []
    tokenizer = get_tokenizer(meta["tokenizer"])
    for split, least in (("train", 200), ("val", 1)):
        path, = find_shards(folder, split)
        examples = examples_in(path)
        assert len(examples) >= least
        assert path.stat().st_size == 1024 + 8 * len(examples) + 2 * len(read_shard(path))
        for instruction, response in examples:
            assert instruction[0] == response[-1] == tokenizer.eot_token
            found.append((tokenizer.decode(instruction[1:].tolist()), tokenizer.decode(response[:-1].tolist())))
    assert sorted(found) == sorted((format_instruction(q, c), f" {a}") for q, c, a in PAIRS for _ in range(3))
    assert meta["kind"] == "instructions"
    assert format_instruction("Say it again.", "the cat") == "Say it again.\nthe cat\n\nAnswer:"


def test_one_instruction_is_on_one_side_whatever_the_part(tmp_path):
    rows = [dict(prompt=f"Say {i % 150}.", response=f"it {i}") for i in range(300)]
    source, sides = write_pairs(tmp_path / "t.jsonl", rows), {"train": set(), "val": set()}
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    spec = pf.train_tokenizer([row["prompt"] + row["response"] for row in rows], 300)
    (vocabulary / "tokenizer.json").write_text(json.dumps(spec))
    for i in range(3):
        prepare(source, tmp_path / "out", tokenizer=str(vocabulary), part=f"{i}/3")
    for split, found in sides.items():
        for path in find_shards(tmp_path / "out", split):
            found.update(instruction.tobytes() for instruction, _ in examples_in(path))
    assert not sides["train"] & sides["val"] and len(sides["train"] | sides["val"]) == 150
    assert 1 <= len(sides["val"]) < 15


def test_few_examples(tmp_path):
    """Validation has one of them even if all have one instruction; a part may have none at all."""
    rows = [dict(prompt="Say it.", response=f"it {i}") for i in range(9)] + [dict(prompt="Say it.", response=" ")]
    same = write_pairs(tmp_path / "same.jsonl", rows)                   # the last one is blank
    folder = prepare(same, tmp_path / "same")
    counts = [len(examples_in(find_shards(folder, split)[0])) for split in ("train", "val")]
    assert counts in ([8, 1], [1, 8])
    assert [path.name for path in prepare(same, tmp_path / "few", part="10/11").iterdir()] == ["meta_p010.json"]


def test_records_may_have_more_keys_and_files_blank_lines(tmp_path):
    """As the public Alpaca has: a text made of all of it, which is not what is wanted; in jsonl and in parquet."""
    rows = [dict(instruction="Say it.", input="", output=f"it {i}", text=f"Say it. it {i}", note=3) for i in range(40)]
    write_pairs(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "\n\n")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        _, documents = pf.open_source(str(tmp_path / name))
        assert list(documents) == [(format_instruction("Say it."), f" it {i}") for i in range(40)]


def test_a_tokenizer_is_known_by_what_it_is_and_not_by_where_it_lies(tmp_path):
    """The path of a folder, which may be private, is not in the meta file."""
    (tmp_path / "a.txt").write_text("the dog and the sea " * 300)
    first = prepare(tmp_path / "a.txt", tmp_path / "first")
    shutil.copytree(first, tmp_path / "copy")
    for folder in (first, tmp_path / "copy"):
        made = prepare(tmp_path / "a.txt", tmp_path / "made", tokenizer=str(folder))
    assert str(tmp_path) not in (made / "meta.json").read_text()
    other = prepare(tmp_path / "a.txt", tmp_path / "other", vocab_size=259)
    with pytest.raises(UserError, match="was prepared with tokenizer=that with the hash"):
        prepare(tmp_path / "a.txt", tmp_path / "made", tokenizer=str(other))
    os.mkfifo(tmp_path / "copy" / "tokenizer.json")
    with pytest.raises(UserError, match="is no regular file"):
        prepare(tmp_path / "a.txt", tmp_path / "new", tokenizer=str(tmp_path / "copy"))


def test_examples_take_the_tokenizer_of_a_folder_and_mistakes_in_them_are_named(tmp_path):
    text = prepare(write_jsonl(tmp_path / "text.jsonl", sentences(50)), tmp_path / "text")
    source = write_pairs(tmp_path / "t.jsonl", [dict(prompt="Say it.", response=f"it {i}") for i in range(30)])
    folder = prepare(source, tmp_path / "pairs", tokenizer=str(text))
    assert read_meta(folder)["tokenizer"] == read_meta(text)["tokenizer"]
    path, = find_shards(folder, "train")
    content = path.read_bytes()
    path.write_bytes(content[:1024] + b"\1\1" + content[1026:])
    with pytest.raises(UserError, match="its examples should have"):
        read_examples(path)
    mixed = write_pairs(tmp_path / "mixed.jsonl", [dict(prompt="Say it.", response="it"), dict(text="it")])
    rows = [dict(instruction="Say it.", output="it")] * 30 + [dict(instruction="Say it.", input="it")]
    half = write_pairs(tmp_path / "half.jsonl", rows)
    for name, content in (("empty", None), ("foreign", "{}"), ("broken", "{")):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "tokenizer.json").write_text(content)
    for source, tokenizer, words in ((mixed, "corpus", "prepare them apart"), (half, "corpus", 'nor "instruction"'),
                                     (mixed, str(tmp_path / "empty"), "no meta.json or tokenizer.json"),
                                     (mixed, str(tmp_path / "broken"), "no meta.json or tokenizer.json"),
                                     (mixed, str(tmp_path / "foreign"), "of ours")):
        assert words in refused(prepare, source, tmp_path / "no", tokenizer=tokenizer)
        assert not (tmp_path / "no").exists()


def test_a_part_of_another_kind_than_the_first_is_refused(tmp_path):
    """Where each part is a file of its own, such as text and then instructions."""
    (tmp_path / "t").mkdir()
    write_jsonl(tmp_path / "t" / "a.jsonl", sentences(20))
    write_pairs(tmp_path / "t" / "b.jsonl", [dict(prompt="Say it.", response=f"it {i}") for i in range(20)])
    settings = {"tokenizer": str(prepare(tmp_path / "t" / "a.jsonl", tmp_path / "text"))}
    prepare(tmp_path / "t", tmp_path / "o", part="0/2", **settings)
    assert "prepare them apart" in refused(prepare, tmp_path / "t", tmp_path / "o", part="1/2", **settings)
    assert not list((tmp_path / "o").glob("*_p001*"))


def test_parts_are_disjoint_and_complete(tmp_path):
    texts = sentences(301)
    write_jsonl(tmp_path / "t.jsonl", texts)
    args = ("--source=t.jsonl", "--shard_tokens=1500", "--val_fraction=0", *SMALL)
    prepare_in(tmp_path, *args, "--part=1/2")
    assert "parts=2" in refused(prepare_in, tmp_path, *args, "--part=0/3")
    folder = tmp_path / "data" / "t"
    assert documents(folder, "train") == texts[1::2]
    alone = read_meta(folder)
    prepare_in(tmp_path, *args, "--part=0/2")
    assert documents(folder, "train") == texts[0::2] + texts[1::2]
    meta = read_meta(folder)
    assert meta["documents"] == 301 and meta["fingerprint"] != alone["fingerprint"]
    assert meta["train_tokens"] == len(tokens_in(folder, "train")) > alone["train_tokens"]
    assert "already prepared" in prepare_in(tmp_path, *args, "--part=1/2")


def test_parts_take_whole_files_where_there_are_enough(tmp_path, monkeypatch):
    """So that no part reads, or downloads, what is another's."""
    texts = [sentences(40)[k::3] for k in range(3)]
    (tmp_path / "t").mkdir()
    for k in range(3):
        write_jsonl(tmp_path / "t" / f"{k}.jsonl", texts[k])
    args = ("--source=t", "--shard_tokens=300", "--val_fraction=0", *SMALL)
    for i in range(2):
        prepare_in(tmp_path, *args, f"--part={i}/2")
    found = documents(tmp_path / "data" / "t", "train")
    assert found == texts[0] + texts[2] + texts[1]
    read = []
    monkeypatch.setattr(pf, "read_documents", lambda path: read.append(path.name) or [])
    list(pf.open_source(str(tmp_path / "t"), part=(1, 2))[1])
    assert read == ["1.jsonl"]


def test_a_full_disk_ends_in_one_line_and_the_rerun_resumes(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", sentences(2000))
    args = ("--source=t.jsonl", "--shard_tokens=20_000", "--val_fraction=0", *SMALL)
    limit = (resource.RLIMIT_FSIZE, (20_000, 20_000))
    line = run_in(tmp_path, *args, code=1, preexec_fn=lambda: resource.setrlimit(*limit))
    assert "train_000000.bin (41,024 bytes)" in line and "File too large" in line
    assert not list((tmp_path / "data" / "t").glob("*.bin*"))
    prepare_in(tmp_path, *args)
    assert documents(tmp_path / "data" / "t", "train") == sentences(2000)


def test_two_prepares_in_one_folder(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", sentences(10))
    with lock(tmp_path / "o" / "meta.lock"):
        line = run_in(tmp_path, "--source=t.jsonl", "--out=o", *SMALL, code=2)
        assert "another process is at work in o;" in line
    prepare_in(tmp_path, "--source=t.jsonl", "--out=o", *SMALL)         # a lock file nobody holds is no lock
    assert "Not a directory" in refused(prepare_in, tmp_path, "--source=t.jsonl", "--out=t.jsonl/o", *SMALL)


def test_only_the_holder_of_the_lock_removes_it(tmp_path, monkeypatch):
    """Not a prepare with a mistake beside it, nor one that waited for a lock file which is gone."""
    write_jsonl(tmp_path / "t.jsonl", sentences(10))
    (tmp_path / "blank.txt").write_text(" ")
    path = tmp_path / "o" / "meta.lock"
    with lock(path):
        for source, says in (("typo.jsonl", "is no file"), ("blank.txt", "no tokens"), ("t.jsonl", "at work")):
            assert says in refused(prepare, tmp_path / source, path.parent)
            assert path.exists() and "at work" in refused(lock, path)
    flock = fcntl.flock

    def flock_too_late(file, flags):
        flock(file, flags)
        path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock_too_late)
    assert "at work" in refused(lock, path)
    monkeypatch.undo()
    files = prepare(tmp_path / "t.jsonl", path.parent).iterdir()
    assert sorted(file.name for file in files) == ["meta.json", "train_000000.bin", "val_000000.bin"]
