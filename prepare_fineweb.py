"""Text to tokens to shards, once: FineWeb by streaming, your own text files, or a corpus that needs no network.

    python prepare_fineweb.py                                   # a billion tokens of FineWeb into data/fineweb
    python prepare_fineweb.py --source=texts/ --max_tokens=0    # .txt, .jsonl(.gz, .xz), .parquet: file, folder or glob
    python prepare_fineweb.py --source=pydoc                    # English out of Python's own documentation, offline
    python prepare_fineweb.py --part=0/4                        # the first of four processes or machines, one folder

A shard is 256 int32 (20240520, 1, number of tokens, zeros), then the tokens as uint16, little-endian: the format of
llm.c and modded-nanogpt, whose shards can be read as well. An end-of-text token stands before each document. meta.json,
written last, says what the shards are. Killed? Run the same command again: finished shards stay, the result is equal.
"""
import ast
import base64
import collections
import contextlib
import functools
import glob
import gzip
import hashlib
import heapq
import itertools
import json
import lzma
import os
import platform
import re
import sys
import sysconfig
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import describe, fail, load

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
END_OF_TEXT = "<|endoftext|>"
HUB = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
COUNTS = ("documents", "replaced", "train_tokens", "val_tokens")
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"     # GPT-2's words
OFFLINE = "python prepare_fineweb.py --source=pydoc"
NO_HUB = ("check the network and HF_TOKEN, set HF_ENDPOINT to a mirror, use text of your own with --source=FILE, "
          f"or go offline: {OFFLINE}")


@dataclass(frozen=True)
class Config:
    source: str = "fineweb"          # fineweb, fineweb-edu, pydoc, or a file, folder or glob
    tokenizer: str = ""              # gpt2, or corpus: trained on the text; "": corpus for pydoc, else gpt2
    vocab_size: int = 4096           # ids of a corpus tokenizer
    max_tokens: str = "1B"           # stop after so many training tokens, like 100M or 2B; 0: all
    part: str = "0/1"                # i/n: every n-th document, from the i-th on, and an n-th of max_tokens
    out: str = ""                    # folder; "": data/<name of the source>
    val_fraction: float = 0.005      # of the documents, chosen by a hash of their text; 0: none
    shard_tokens: int = 100_000_000  # tokens in a shard
    workers: int = 0                 # threads that tokenize; 0: one a core
    revision: str = ""               # commit of the hub's dataset; "": the newest

    def check(self):
        parse_count(self.max_tokens)
        parse_part(self.part)
        if self.tokenizer not in ("", "gpt2", "corpus"):
            raise ValueError(f"tokenizer={self.tokenizer} is not known; choose gpt2 or corpus")
        if not 257 <= self.vocab_size <= 65536:
            raise ValueError(f"vocab_size={self.vocab_size} is not between 257 (bytes, end of text) and 65536 (uint16)")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} is not in [0, 1); try 0.005")
        if not 1 <= self.shard_tokens < 2 ** 31:
            raise ValueError(f"shard_tokens={self.shard_tokens} is not in [1, 2**31); try 100_000_000")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} is negative; 0 means one a core")


def parse_count(text):
    """"100M" as 100_000_000; ValueError if it is no such number."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([kKMBG]?)", text)
    if not match:
        raise ValueError(f"max_tokens={text} is not a number of tokens; write for example 50k, 100M, 2B, or 0 for all")
    return int(float(match[1]) * {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}[match[2]])


def parse_part(text):
    """"1/4" as (1, 4); ValueError unless 0 <= i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"part={text} is not i/n with 0 <= i < n; write for example 0/4, 1/4, 2/4, 3/4")
    return int(match[1]), int(match[2])


def write_file(path, *chunks):
    """Replace `path` by the chunks of bytes in one step: after a crash there is the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            for chunk in chunks:
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        n_bytes = sum(memoryview(chunk).nbytes for chunk in chunks)
        fail(f"cannot write {path} ({n_bytes:,} bytes): {error.strerror}; make room and run the same command again", 1)


def write_shard(path, tokens):
    """Write `tokens` (n,) uint16 as one shard; returns its entry for meta.json."""
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    tokens = np.ascontiguousarray(tokens, "<u2")
    write_file(path, header, tokens)
    return {"name": path.name, "tokens": len(tokens), "bytes": HEADER_BYTES + tokens.nbytes,
            "blake2b": hashlib.blake2b(tokens, digest_size=16).hexdigest()}


def read_shard(path):
    """The tokens of a shard, a read-only memory map (n,) uint16; ValueError if the file is not exactly such a shard."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(HEADER_BYTES // 4 * 4).ljust(HEADER_BYTES, b"\0"), "<i4")
    again = "; prepare or download it again"
    if size < HEADER_BYTES:
        raise ValueError(f"{path}: expected a header of {HEADER_BYTES} bytes, found {size} bytes in all{again}")
    if (header[0], header[1]) != (MAGIC, VERSION):
        raise ValueError(f"{path}: expected magic {MAGIC}, version {VERSION}, found {header[0]}, {header[1]}{again}")
    if header[2] < 1:
        raise ValueError(f"{path}: expected at least one token, found a header that says {header[2]}{again}")
    if size != HEADER_BYTES + 2 * int(header[2]):
        raise ValueError(f"{path}: expected {HEADER_BYTES + 2 * int(header[2]):,} bytes for {header[2]:,} uint16 "
                         f"tokens, found {size:,}{again}")
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (int(header[2]),))


def find_shards(folder, split):
    """The paths of all shards of "train" or "val" in `folder`, sorted; ValueError if there are none."""
    paths = sorted(Path(folder).glob(f"*{split}*.bin"))
    if not paths:
        raise ValueError(f"no {split} shards in {folder}; make them with: python prepare_fineweb.py --out={folder}")
    return paths


def read_meta(folder):
    """What the shards in `folder` are (a dict, see `finish`); ValueError if there are none or they are not finished.

    A folder without meta.json is taken for public shards of GPT-2 tokens.
    """
    folder = Path(folder)
    if (folder / "meta.json").exists():
        try:
            return json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / 'meta.json'} is damaged ({error}); prepare the folder again") from None
    unfinished = sorted(folder.glob("progress*.json"))
    if unfinished:
        raise ValueError(f"{folder} is not finished ({unfinished[0].name} is there); run its prepare command again")
    ends = [(path.name, len(tokens), int(tokens[0]), int(tokens[-1]))
            for path in find_shards(folder, "train") for tokens in [read_shard(path)]]
    name = f"shards in {folder}"
    return {"source": name, "label": name, "tokenizer": {"name": "gpt2"}, "vocab_size": 50257,
            "train_tokens": sum(end[1] for end in ends), "fingerprint": fingerprint({"name": "gpt2"}, ends)}


def fingerprint(spec, shards):
    return hashlib.blake2b(json.dumps([spec, shards], sort_keys=True).encode(), digest_size=16).hexdigest()


def find_dataset(names, root="data"):
    """The folder of the first of `names` ("fineweb,pydoc": names under `root`, or paths) that has shards.

    If none has and "pydoc" is among them, it is prepared now (under torchrun: let rank 0 call first); otherwise the
    program ends with the command that prepares the first.
    """
    items = [name.strip() for name in names.split(",") if name.strip()] or [""]
    for item in items:
        for folder in (Path(root) / item, Path(item)):
            ours = (folder / "meta.json").exists()
            if item and (ours or any(folder.glob("*train*.bin")) and not any(folder.glob("progress*.json"))):
                return folder
    if "pydoc" in items:
        print(f"NO DATA for {names} in {root}/: preparing pydoc, Python's own documentation, instead", file=sys.stderr)
        return prepare(Config(source="pydoc", out=str(Path(root) / "pydoc")))
    fail(f"no prepared data for {names} (looked in {root}/ too); make it with: python prepare_fineweb.py"
         + (f" --source={items[0]}" if items[0] in HUB else f" --source=FILE --out={Path(root) / items[0]}")
         + f", or offline: {OFFLINE}")


def get_tokenizer(spec):
    """The tiktoken.Encoding that `spec` describes: {"name": "gpt2"}, or what `train_tokenizer` returns."""
    import requests
    import tiktoken
    if spec["name"] == "corpus":
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["tokens"])}
        return tiktoken.Encoding("corpus", pat_str=spec["pattern"], mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: len(ranks)})
    try:
        return tiktoken.get_encoding(spec["name"])
    except requests.RequestException as error:
        fail(f"cannot download GPT-2's vocab.bpe and encoder.json ({type(error).__name__}); "
             f"set TIKTOKEN_CACHE_DIR to a folder that has them, or go offline: {OFFLINE}")


def train_tokenizer(texts, vocab_size):
    """The spec of a byte-level BPE tokenizer with at most `vocab_size` ids (Sennrich et al. 2016, on bytes)."""
    import regex
    counts = collections.Counter(word for text in texts for word in regex.findall(PATTERN, text) if len(word) <= 100)
    words, repeats = [list(word.encode()) for word in counts], list(counts.values())
    ids = {bytes([i]): i for i in range(256)}
    tokens = list(ids)
    pairs, places = collections.Counter(), collections.defaultdict(set)     # how often, and in which words
    for i, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pairs[pair] += repeats[i]
            places[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]    # counts that fell since are put right when they surface
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size - 1:
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair]:
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if -n < 2:
            break
        token = tokens[pair[0]] + tokens[pair[1]]
        new = ids.setdefault(token, len(tokens))        # tiktoken knows one id per byte string, however it was merged
        tokens += [token] * (new == len(tokens))
        touched = set()
        for i in sorted(places.pop(pair)):
            merged = merge(words[i], pair, new)
            for old in itertools.pairwise(words[i]):
                pairs[old] -= repeats[i]
            for fresh in itertools.pairwise(merged):
                pairs[fresh] += repeats[i]
                places[fresh].add(i)
                touched.add(fresh)
            words[i] = merged
        for fresh in touched:
            if new in fresh:                            # only these can have become more frequent
                heapq.heappush(heap, (-pairs[fresh], fresh))
    return {"name": "corpus", "pattern": PATTERN, "tokens": [base64.b64encode(token).decode() for token in tokens]}


def merge(word, pair, new):
    """`word`, a list of ids, with each occurrence of `pair` replaced by `new`, from the left."""
    merged, i = [], 0
    while i < len(word):
        found = word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]
        merged.append(new if found else word[i])
        i += 2 if found else 1
    return merged


def encode(tokenizer, text):
    """End of text, then the tokens of `text`: (n,) uint16. Special tokens that `text` spells out are ordinary text."""
    pieces = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in cut(text)]
    return np.concatenate([[tokenizer.eot_token], *pieces]).astype(np.uint16)


def cut(text, size=50_000):
    """Pieces of at most `size` characters, cut before a space where there is one: the tokens stay those of the whole.

    tiktoken overflows its stack on a million newlines, and its time grows faster than the length of a word.
    """
    start = 0
    while len(text) - start > size:
        space = text.rfind(" ", start + 1, start + size)
        yield text[start:space if space > 0 else start + size]
        start = space if space > 0 else start + size
    yield text[start:]


def read_source(cfg, revision):
    """All documents of the source that are not blank, in their order, as (text, number of replaced bytes)."""
    if cfg.source in HUB:
        rows = read_hub(HUB[cfg.source], revision)
    elif cfg.source == "pydoc":
        rows = ((text, 0) for text in read_pydoc())
    else:
        rows = itertools.chain.from_iterable(read_file(path) for path in find_files(cfg.source))
    for text, replaced in rows:
        if not text.isascii():
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of pairs, from JSON
            text, replaced = whole, replaced + whole.count("\ufffd") - text.count("\ufffd")
        if text.strip():
            yield text, replaced


def source_revision(cfg, recorded):
    """Which version of the source: the hub's commit (the recorded one when resuming), Python's, or the files' size."""
    if cfg.source == "pydoc":
        return f"Python {platform.python_version()}"
    if cfg.source not in HUB:
        files = find_files(cfg.source)
        return f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes"
    if recorded and not cfg.revision or re.fullmatch("[0-9a-f]{40}", cfg.revision):
        return cfg.revision or recorded
    from huggingface_hub import HfApi
    try:
        return HfApi().dataset_info(HUB[cfg.source], revision=cfg.revision or None, timeout=5).sha
    except Exception as error:      # whatever the hub and the libraries below it raise
        fail(f"cannot reach {HUB[cfg.source]} on the hub ({type(error).__name__}); {NO_HUB}")


def read_hub(name, revision):
    import datasets
    try:
        rows = datasets.load_dataset(name, "sample-10BT", split="train", streaming=True, revision=revision)
        for row in rows.select_columns(["text"]):
            yield row["text"], 0
    except Exception as error:      # as above
        fail(f"reading {name} stopped ({type(error).__name__}: {error}); run the same command to go on; {NO_HUB}", 1)


def find_files(source):
    """The files that `source` (file, folder or glob) stands for, sorted."""
    paths = sorted(Path(source).rglob("*")) if os.path.isdir(source) else [Path(source)]
    if not os.path.exists(source):
        paths = sorted(map(Path, glob.glob(source, recursive=True)))
    if not paths:
        fail(f"source={source} is no file, folder or glob with files; or choose from {', '.join(HUB)}, pydoc")
    files = [path for path in paths if path.is_file()]
    known = [path for path in files if path.name.lower().endswith(SUFFIXES)]
    if not known or len(known) < len(files) and not os.path.isdir(source):
        other = next((path for path in files if path not in known), source)
        fail(f"{other}: not a kind of file that can be read; give {' '.join(SUFFIXES)}")
    if len(known) < len(files):
        print(f"{source}: {len(files) - len(known)} files that are not {' '.join(SUFFIXES)} ignored", file=sys.stderr)
    return known


def read_file(path):
    """The documents of one file as (text, number of bytes that were not UTF-8 and are replaced)."""
    name = path.name.lower()
    openers = {".gz": gzip.open, ".xz": lzma.open}
    try:
        if name.endswith(".txt"):
            yield decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        elif name.endswith(".parquet"):
            yield from read_parquet(path)
        else:
            with openers.get(path.suffix.lower(), open)(path, "rb") as lines:
                yield from read_lines(path, lines)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:    # what cut or damaged archives raise
        fail(f"{path}: cannot be read: {error}; repair or remove it")


def read_lines(path, lines):
    for number, line in enumerate(lines, 1):
        text, replaced = decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            fail(f"{path}:{number}: not JSON: {error}; repair or remove the line")
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            fail(f'{path}:{number}: no string under the key "text"; every line must be like {{"text": "..."}}')
        yield row["text"], replaced


def read_parquet(path):
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                fail(f'{path}: no column "text", only {", ".join(table.schema_arrow.names)}; rename the right one')
            for batch in table.iter_batches(1000, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        fail(f'{path}: the column "text" holds {text!r:.40}, which is not a string; drop such rows')
                    yield text, 0
    except pyarrow.ArrowException as error:
        fail(f"{path}: cannot be read as parquet: {error}; repair or remove it")


def decode(data):
    """Bytes as (text, replaced): what is not UTF-8 becomes the replacement character, and is counted."""
    text = data.decode("utf-8", "replace")
    return text, text.count("\ufffd") - data.count("\ufffd".encode())


@functools.cache
def read_pydoc():
    """The embedded corpus: a list of documents, one for each topic and module of this Python's documentation."""
    from pydoc_data.topics import topics
    stdlib, seen = Path(sysconfig.get_path("stdlib")), set()
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = [path for path in sorted(stdlib.rglob("*.py")) if not skipped & set(path.relative_to(stdlib).parts)]
    documents = [prose([topics[name]], seen) for name in sorted(topics)] + [prose(docstrings(p), seen) for p in paths]
    return [document for document in documents if document]


def docstrings(path):
    """All docstrings of a source file, which is parsed, not run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # invalid escapes in old modules
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):           # templates and samples that are not Python
            return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]


def prose(texts, seen):
    """One document of the paragraphs that read like English and are not in `seen` yet."""
    kept = []
    for block in itertools.chain.from_iterable(re.split(r"\n\s*\n", text) for text in texts):
        paragraph = " ".join(block.split())
        if is_prose(block, paragraph) and paragraph not in seen:
            seen.add(paragraph)
            kept.append(paragraph)
    return "\n\n".join(kept)


def is_prose(block, paragraph):
    """Sentences, not tables, signatures, lists, doctests or underlined titles."""
    if re.search(r">>>|\.\.\. |\S {3,}\S|::=|->|[=_*#|~-]{3}|[{}\\<>|@]|^\s*[-*+:|\d]|\w+ -- ", block, re.M):
        return False
    words = paragraph.split()
    plain = sum(bool(re.fullmatch(r"[\"'(]?[A-Za-z][a-z'-]*[)\"']?[.,;:?!)]*", word)) for word in words)
    return len(words) >= 8 and plain >= 0.75 * len(words) and bool(re.match(r"[A-Z].*[.?!:]$", paragraph))


class ShardWriter:
    """Collects tokens and writes a shard of `size` once more than that are there, so that the last is never empty.

    Calls `save` before each shard, so that no shard is ever in a folder without a word about its origin.
    """

    def __init__(self, path, size, save, shards=()):
        self.path, self.size, self.save, self.shards = str(path), size, save, list(shards)
        self.pending, self.n_pending, self.total = [], 0, sum(shard["tokens"] for shard in shards)

    def add(self, tokens):
        self.pending.append(tokens)
        self.n_pending += len(tokens)
        self.total += len(tokens)
        while self.n_pending > self.size:
            self.write(self.take(self.n_pending), self.size)

    def take(self, n):
        """Remove and return the last n tokens that no shard has yet."""
        tokens = np.concatenate([np.zeros(0, np.uint16), *self.pending])
        keep = len(tokens) - n
        self.pending, self.n_pending, self.total = [tokens[:keep]], keep, self.total - n
        return tokens[keep:]

    def write(self, tokens, n):
        self.save()
        self.shards.append(write_shard(Path(f"{self.path}_{len(self.shards):06d}.bin"), tokens[:n]))
        self.pending, self.n_pending, self.total = [tokens[n:]], len(tokens) - n, self.total + len(tokens)

    def flush(self):
        if self.n_pending:
            self.write(self.take(self.n_pending), self.size)


def prepare(cfg):
    """Write the shards and meta.json of `cfg`; returns their folder. A user's mistake ends the program."""
    out = Path(cfg.out or Path("data") / (cfg.source if cfg.source in (*HUB, "pydoc") else source_name(cfg.source)))
    i, n = parse_part(cfg.part)
    suffix = f"_p{i:03d}" if n > 1 else ""
    with lock(out, suffix):
        if not prepare_part(cfg, out, suffix):
            print(f"{out} is already prepared: {summary(read_meta(out))}")
        elif finish(out, n):
            print(f"{out}: {summary(read_meta(out))}")
        else:
            print(f"{out}: part {cfg.part} is done; meta.json is written with the last part")
    return out


def prepare_part(cfg, out, suffix):
    """Write the shards and progress.json of one part of the documents; False if meta.json was there already."""
    path = out / f"progress{suffix}.json"
    state = recorded_state(cfg, out, path)
    if state.get("finished"):
        return path.exists()
    if "tokenizer" not in state:
        state["tokenizer"] = make_tokenizer(cfg, state["settings"]["revision"])
    save = functools.partial(write_json, path, state)
    train = ShardWriter(out / f"train{suffix}", cfg.shard_tokens, save, state.get("shards", ()))
    val = ShardWriter(out / f"val{suffix}", cfg.shard_tokens, save)
    print(f"{describe(cfg)}; {state['settings']['revision']}", file=sys.stderr)
    if train.shards:
        print(f"resuming after {train.shards[-1]['name']}", file=sys.stderr)
    documents, replaced = write_documents(cfg, state, train, val, save)
    if not train.total + val.total:
        fail(f"no tokens in source={cfg.source}, nothing written; give it text that is not blank")
    if cfg.val_fraction:
        balance(train, val)
    train.flush()
    val.flush()
    state.update(finished=True, documents=documents, replaced=replaced, train_tokens=train.total,
                 val_tokens=val.total, shards=train.shards + val.shards)
    save()
    return True


def write_documents(cfg, state, train, val, save):
    """Encode all documents of a part into the two writers; returns how many there were, and the bytes replaced."""
    (i, n), source = parse_part(cfg.part), read_source(cfg, state["settings"]["revision"])
    goal, tokenizer = -(-parse_count(cfg.max_tokens) // n), get_tokenizer(state["tokenizer"])
    first, skip = state.get("next", (0, 0))             # in which document, and where, the last finished shard ends
    n_documents = n_replaced = 0
    progress = Progress(goal, train.total)
    for replaced, is_val, tokens in encode_all(itertools.islice(source, i, None, n), tokenizer, cfg, first):
        if is_val:
            val.add(tokens)
        elif n_documents >= first:
            start, n_shards = skip if n_documents == first else 0, len(train.shards)
            tokens = tokens[start:][:goal - train.total if goal else None]
            train.add(tokens)
            if len(train.shards) > n_shards:            # what is pending now is the end of this document
                state.update(shards=train.shards, next=(n_documents, start + len(tokens) - train.n_pending))
                save()
        n_documents, n_replaced = n_documents + 1, n_replaced + replaced
        progress.show(train.total + val.total)
        if goal and train.total >= goal:
            break
    progress.show(train.total + val.total, last=True)
    return n_documents, n_replaced


def recorded_state(cfg, out, path):
    """What is known of this part: its settings and what an earlier run did; ends the program on other settings."""
    files = [file for file in (out / "meta.json", path, *out.glob("progress*.json")) if file.exists()]
    old = json.loads(files[0].read_text(encoding="utf-8")) if files else {}
    was = old.get("settings", {})
    settings = settings_of(cfg, was.get("revision") if was.get("source") == cfg.source else None)
    if files and was != settings:
        differs = [f"{key} {was.get(key)} there, {new} now" for key, new in settings.items() if was.get(key) != new]
        fail(f"{out} was prepared with other settings: {'; '.join(differs)}; choose another --out or delete it")
    if not files and any(out.glob("*.bin")):
        fail(f"{out} has shards of other origin; choose another --out, or delete them")
    if files and files[0] not in (path, out / "meta.json"):
        return {"settings": settings, "tokenizer": old["tokenizer"]}        # another part was here before
    whole = all(shard_is_whole(out, shard) for shard in old.get("shards", ()))
    return old if files and whole else {"settings": settings}


def settings_of(cfg, recorded):
    """All that decides what the shards hold; a folder keeps to one of these."""
    kind = tokenizer_name(cfg)
    return {"source": cfg.source if cfg.source in (*HUB, "pydoc") else os.path.basename(os.path.normpath(cfg.source)),
            "revision": source_revision(cfg, recorded), "tokenizer": kind,
            "vocab_size": cfg.vocab_size if kind == "corpus" else 50257,
            "max_tokens": parse_count(cfg.max_tokens), "parts": parse_part(cfg.part)[1],
            "val_fraction": cfg.val_fraction, "shard_tokens": cfg.shard_tokens}


def tokenizer_name(cfg):
    return cfg.tokenizer or ("corpus" if cfg.source == "pydoc" else "gpt2")


def shard_is_whole(out, shard):
    path = out / shard["name"]
    return path.exists() and path.stat().st_size == shard["bytes"]


def make_tokenizer(cfg, revision):
    """The spec of the tokenizer `cfg` asks for; a corpus tokenizer sees the first 20 million characters."""
    if tokenizer_name(cfg) == "gpt2":
        return {"name": "gpt2"}
    texts, left = [], 20_000_000
    for text, _ in read_source(cfg, revision):
        texts.append(text[:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    spec = train_tokenizer(texts, cfg.vocab_size)
    if texts and len(spec["tokens"]) + 1 < cfg.vocab_size:
        print(f"the text is too small for vocab_size={cfg.vocab_size}: {len(spec['tokens']) + 1} ids", file=sys.stderr)
    return spec


def encode_all(documents, tokenizer, cfg, first):
    """(replaced bytes, is it for validation, tokens) of each document in order, encoded by threads.

    Training documents before the first are already in shards and come without tokens. Threads suffice because
    tiktoken releases the interpreter's lock; the queue is short, so memory stays flat.
    """
    def work(batch):
        return [encode_one(*row, tokenizer, cfg.val_fraction, is_done=index < first) for index, row in batch]

    queue, workers = collections.deque(), cfg.workers or os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        for batch in batches(enumerate(documents)):
            queue.append(pool.submit(work, batch))
            if len(queue) > 2 * workers:
                yield from queue.popleft().result()
        while queue:
            yield from queue.popleft().result()


def encode_one(text, replaced, tokenizer, val_fraction, is_done):
    # by a hash, the same text is on the same side whatever the order or the part
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    is_val = int.from_bytes(digest, "little") < val_fraction * 2 ** 64
    return replaced, is_val, None if is_done and not is_val else encode(tokenizer, text)


def batches(rows, size=200_000):
    """Lists of rows (index, (text, replaced)) with about `size` characters of text each."""
    batch, n = [], 0
    for row in rows:
        batch.append(row)
        n += len(row[1][0])
        if n >= size:
            yield batch
            batch, n = [], 0
    yield batch


def balance(train, val):
    """A small source has no or hardly any validation documents: then the last training tokens become validation.

    8192 tokens or a twentieth of all, whichever is less, are the least that is useful.
    """
    if not train.total:
        train.add(val.take(val.n_pending))
    wanted = max(1, min((train.total + val.total) // 20, 8192))
    short = min(wanted - val.total, train.n_pending - (len(train.shards) == 0))
    if short > 0:
        val.add(train.take(short))


def finish(out, n):
    """Write meta.json (and tokenizer.json) once all n parts are done; True if they are."""
    paths = sorted(out.glob("progress*.json"))
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if len(parts) < n or not all(part.get("finished") for part in parts):
        return False
    settings, spec = parts[0]["settings"], parts[0]["tokenizer"]
    source, revision = settings["source"], settings["revision"]
    known = {name: (f"{name}: {repo} sample-10BT ({revision[:10]})", "ODC-By 1.0") for name, repo in HUB.items()}
    known["pydoc"] = f"pydoc: this Python's own documentation (embedded corpus, {revision})", "PSF-2.0"
    label, licence = known.get(source, (f"{source} ({revision})", "yours"))
    shards = [shard for part in parts for shard in part["shards"]]
    meta = {"source": source, "label": label, "revision": revision, "licence": licence, "tokenizer": spec,
            "vocab_size": get_tokenizer(spec).n_vocab,
            **{key: sum(part[key] for part in parts) for key in COUNTS},
            "shards": shards, "fingerprint": fingerprint(spec, shards), "settings": settings, "finished": True}
    if spec["name"] == "corpus":
        write_json(out / "tokenizer.json", spec)
    write_json(out / "meta.json", meta)
    for path in paths:
        path.unlink(missing_ok=True)
    return True


def write_json(path, value):
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def lock(folder, suffix):
    """Hold the lock of a folder that is made if need be; ends the program if another process holds it."""
    import fcntl                                        # not on Windows, where shards can still be read
    path, is_new = folder / f"prepare{suffix}.lock", not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(path, "w")
    except OSError as error:
        fail(f"cannot write in {folder}: {error.strerror}; choose another --out")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another prepare_fineweb.py is at work in {folder}; wait for it or choose another --out")
        for leftover in folder.glob("*.tmp"):           # of a run that was killed
            if suffix in leftover.name:
                leftover.unlink()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):      # not empty: the usual case
                    os.removedirs(folder)


class Progress:
    """One line on stderr: tokens, speed, time left; redrawn on a terminal, else a new line every ten seconds."""

    def __init__(self, goal, before):
        self.goal, self.before, self.start = goal, before, time.monotonic()
        self.shown, self.every = self.start, 0.2 if sys.stderr.isatty() else 10

    def show(self, tokens, last=False):
        now = time.monotonic()
        if now - self.shown < self.every and not (last and self.every < 1):
            return
        self.shown, speed = now, (tokens - self.before) / max(now - self.start, 1e-3)
        left = f", {max(self.goal - tokens, 0) / max(speed, 1) / 60:.1f} min left" if self.goal else ""
        start, end = ("\r", "\n" if last else "") if self.every < 1 else ("", "\n")
        print(f"{start}{tokens:,} tokens, {speed:,.0f} tokens/s{left}   ", end=end, file=sys.stderr, flush=True)


def source_name(source):
    """A folder name out of a path or glob: texts/a b.jsonl.gz gives a_b."""
    name = os.path.basename(os.path.normpath(source)).split(".")[0]
    return re.sub(r"[^\w-]+", "_", name).strip("_") or "text"


def summary(meta):
    replaced = f", {meta['replaced']:,} bytes that were not UTF-8 replaced" if meta["replaced"] else ""
    return (f"{meta['label']}: {meta['documents']:,} documents, {meta['train_tokens']:,} training and "
            f"{meta['val_tokens']:,} validation tokens in {len(meta['shards'])} shards, "
            f"{meta['vocab_size']:,} ids{replaced}")


def main():
    cfg = load(Config)
    try:
        prepare(cfg)
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to go on", 130)


if __name__ == "__main__":
    main()
