"""
Turn text into shards of tokens, once: FineWeb by streaming, your own files, or a corpus that needs no network.

    python prepare_fineweb.py                                   # a billion tokens of FineWeb into data/fineweb
    python prepare_fineweb.py --source=texts/ --max_tokens=0    # a file, folder or glob: .txt .md .jsonl(.gz) .parquet
    python prepare_fineweb.py --source=fables                   # very short stories out of the grammar in fables.txt
    python prepare_fineweb.py --subset=default --part=0/64      # the first of 64 processes or machines

End of text stands before each document. Records with instruction, optional input, and output (or prompt and response)
are examples, and so are chats, "messages" with role and content, the last of which is the response: end of text opens
the instruction and closes the response. meta.json (meta_p000.json for part 0) is replaced after each training shard; a
killed run goes on from it, to the same result. data.py describes the shards.
"""
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
import random
import re
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import fables
from configurator import Fault, UserError, in_range, one_of, parse_json, read_file, run
from data import (COUNTS, EMBEDDED, HUB, OFFLINE, PATTERN, encode, fingerprint_shards, format_instruction,
                  get_tokenizer, lock, read_parts, write_file, write_shard)

FABLES = 100_000                         # stories of the embedded corpus, 7M tokens
RECORDS = (("instruction", "input", "output"), ("instruction", "context", "response"), ("prompt", "", "response"))
SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
LONGEST = 2**26                          # characters of a line, or of a text file, that are read at a time


@dataclass(frozen=True)
class Config:
    source: str = "fineweb"          # fineweb, fineweb-edu, fables, or a file, folder or glob
    tokenizer: str = ""              # gpt2; corpus: trained on it; a folder: its own; "": gpt2, corpus if embedded
    vocab_size: int = 4096           # ids of a corpus tokenizer
    max_tokens: str = "1B"           # training tokens at most, like 100M or 2B; 0: all
    part: str = "0/1"                # i/n: every n-th file, or document if files are few, from the i-th on
    out: str = ""                    # folder; "": data/<name of the source>
    val_fraction: float = 0.005      # of the documents, chosen by a hash of their text; 0: none
    shard_tokens: int = 100_000_000  # training tokens in a shard
    workers: int = 0                 # threads that tokenize; 0: one a core
    subset: str = "sample-10BT"      # of the hub's dataset; sample-100BT, sample-350BT, default: all of it
    revision: str = ""               # commit of the hub's dataset; "": the newest

    def check(self):
        parse_count(self.max_tokens)
        parse_part(self.part)
        if self.tokenizer and not os.path.isdir(self.tokenizer):
            one_of(self, "tokenizer", "gpt2", "corpus", "a folder of prepared text")
        in_range(self, 257, 2**16, "vocab_size")
        in_range(self, 0, 0.9, "val_fraction")
        in_range(self, 1, 2_000_000_000, "shard_tokens")
        in_range(self, 0, 1000, "workers")


def parse_count(text):
    """100_000_000 for "100M"."""
    match = re.fullmatch(r"((?:\d_?){,20}\d(?:\.\d+)?(?:e\d\d?)?)([kMB]?)", text)
    if not match:
        raise UserError(f"max_tokens={text} is not a number of tokens; write for example 50k, 100M, 2B, or 0 for all")
    return round(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[match[2]])


def parse_part(text):
    """(1, 4) for "1/4"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"part={text} is not i/n with 0 <= i < n; write for example 0/4")
    return int(match[1]), int(match[2])


def main(cfg):
    prepare(cfg)


def prepare(cfg):
    """Write what is missing of the shards and the meta file of a part; returns their folder."""
    i, n = parse_part(cfg.part)
    name = re.sub(r"[^\w-]+", "_", Path(cfg.source).name.split(".")[0]).strip("_") or "text"
    path = Path(cfg.out or f"data/{name}", "meta.json" if n == 1 else f"meta_p{i:03d}.json")
    try:
        meta = open_meta(cfg, path)
        print(f"{path.parent}: {meta['label']}" + (" is already prepared" if meta["finished"] else ""))
        if not meta["finished"]:
            write_part(cfg, meta, path)
    except OSError as error:
        raise Fault(f"{error}; mend that and run the same command again to go on") from None
    replaced = f", {meta['replaced']:,} bytes that were not UTF-8 replaced" if meta["replaced"] else ""
    documents = f"{meta['documents']:,} document{'s' * (meta['documents'] != 1)}"
    print(f"{path}: {documents}, {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens, "
          f"{meta['vocab_size']:,} ids{replaced}")
    return path.parent


def open_meta(cfg, path):
    """The contents of the meta file, or of a new one; UserError if its folder holds other shards."""
    folder, parts = path.parent, read_parts(path.parent)
    recorded = next((part["settings"] for part in parts.values()), {})
    revision, documents = open_source(cfg.source, cfg.revision or recorded.get("revision"), cfg.subset)
    kind = cfg.tokenizer or ("corpus" if cfg.source == EMBEDDED else "gpt2")
    spec = None if kind == "corpus" else read_tokenizer(kind)
    of_folder = hashlib.blake2b(json.dumps(spec).encode(), digest_size=8).hexdigest()   # another path may lead there
    settings = {"source": Path(cfg.source).name, "revision": revision, "subset": cfg.subset,
                "tokenizer": kind if kind in ("corpus", "gpt2") else f"that with the hash {of_folder}",
                "vocab_size": cfg.vocab_size if kind == "corpus" else get_tokenizer(spec).n_vocab,
                "max_tokens": parse_count(cfg.max_tokens), "parts": parse_part(cfg.part)[1],
                "val_fraction": cfg.val_fraction, "shard_tokens": cfg.shard_tokens}
    other = [f"{key}={recorded.get(key)}" for key in settings if recorded.get(key) != settings[key]]
    if parts and other:
        raise UserError(f"{folder} was prepared with {', '.join(other)}; choose another --out or delete it")
    if any(not shard.name.startswith(("train_", "val_")) for shard in folder.glob("*.bin")):
        raise UserError(f"{folder} has shards of other origin; choose another --out")
    if path in parts and all((folder / shard["name"]).exists() for shard in parts[path]["shards"]):
        return parts[path]
    return new_meta(cfg, settings, spec, documents)


def read_tokenizer(kind):
    """The spec of the tokenizer of GPT-2, or of a folder of prepared text or of an exported network."""
    if kind == "gpt2":
        return {"name": "gpt2"}
    file = Path(kind, "tokenizer.json")
    try:
        if file.exists():
            return parse_json(read_file(file, 2**26))
        return next(iter(read_parts(kind).values()))["tokenizer"]
    except (ValueError, StopIteration):
        raise UserError(f"tokenizer={kind} has no meta.json or tokenizer.json; name another folder") from None


def new_meta(cfg, settings, spec, documents):
    """The contents of a new meta file; without a `spec` its tokenizer is trained on the documents."""
    first = next(documents, None)
    if first is None:
        raise UserError(f"no tokens in source={cfg.source}; give it text that is not blank")
    spec = spec or train_tokenizer(itertools.chain(first, itertools.chain.from_iterable(documents)), cfg.vocab_size)
    known = {"fables": ("very short stories out of a grammar, the embedded corpus", "MIT"),
             **{name: (f"HuggingFaceFW/{name} {cfg.subset}", "ODC-By 1.0") for name in HUB}}
    about, licence = known.get(cfg.source, ("text of your own", "yours"))
    name, revision = settings["source"], settings["revision"]
    return {"source": name, "label": f"{name}: {about} ({revision})", "revision": revision, "licence": licence,
            "kind": "text" if len(first) == 1 else "instructions", "tokenizer": spec,
            "vocab_size": get_tokenizer(spec).n_vocab, **dict.fromkeys(COUNTS, 0), "offset": 0, "shards": [],
            "settings": settings, "finished": False}


class Encoded(NamedTuple):
    tokens: np.ndarray               # (n,) uint16, of a document
    lengths: list                    # tokens in each of its texts
    position: float                  # hash of its first text, 0 to 1; below val_fraction it is for validation
    replaced: int                    # bytes that were not UTF-8


def write_part(cfg, meta, path):
    """Write what is missing of a part, unless another process is at work on it."""
    settings, lock_path = meta["settings"], path.with_suffix(".lock")
    goal = -(-settings["max_tokens"] // settings["parts"]) or sys.maxsize               # training tokens of this part
    write = write_shards if meta["kind"] == "text" else write_examples
    with lock(lock_path):
        try:
            _, documents = open_source(cfg.source, meta["revision"], cfg.subset, parse_part(cfg.part))
            documents = itertools.islice(documents, meta["documents"], None)
            with contextlib.closing(encode_all(documents, meta, cfg.workers or os.cpu_count(), goal)) as encoded:
                write(encoded, meta, path, goal)
        finally:
            lock_path.unlink()                          # by its holder only
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def write_shards(encoded, meta, path, goal):
    """Write a training shard whenever one is full, and the validation tokens up to there."""
    settings = meta["settings"]
    size = settings["shard_tokens"]
    train, val = array("H"), array("H")                 # tokens that are in no shard yet
    start = meta["offset"]                              # where the last shard ended in this document
    for document in encoded:
        split = val if document.position < settings["val_fraction"] else train
        split.frombytes(document.tokens[start:].tobytes())
        start = 0
        while len(train) > size and meta["train_tokens"] + size < goal:
            meta["offset"] = len(document.tokens) - len(train) + size
            save(path, meta, memoryview(train)[:size], val)
            del train[:size], val[:]
        meta["documents"] += 1
        meta["replaced"] += document.replaced
        if meta["train_tokens"] + len(train) >= goal:
            break
    del train[goal - meta["train_tokens"]:]
    meta.update(offset=0, finished=True)
    save(path, meta, *balance(train, val, meta))


def balance(train, val, meta):
    """Move the last training tokens to `val` if it has less than a twentieth of all tokens, and than 8192."""
    if not train and not meta["train_tokens"]:
        train, val = val, train
    total = len(train) + len(val) + meta["train_tokens"] + meta["val_tokens"]
    missing = max(1, min(total // 20, 8192)) - len(val) - meta["val_tokens"]
    keep = max(1, len(train) - max(0, missing)) if meta["settings"]["val_fraction"] else len(train)
    return memoryview(train)[:keep], val + train[keep:]


def write_examples(encoded, meta, path, goal):
    """Write the examples of a part as one shard of each split, with at least 3 % for validation."""
    settings = meta["settings"]
    val_fraction = settings["val_fraction"] and max(settings["val_fraction"], 0.03)
    train, val = [], []
    total = 0
    for example in encoded:
        total += len(example.tokens)
        if total > goal and meta["documents"]:
            break
        (val if example.position < val_fraction else train).append(example)
        meta["documents"] += 1
        meta["replaced"] += example.replaced
    if val_fraction and settings["parts"] == 1 and len(train) + len(val) > 1:           # neither stays empty
        train = train or [val.pop()]
        val = val or [train.pop()]
    meta["finished"] = True
    tokens = [np.concatenate([example.tokens for example in split] or [[]]) for split in (train, val)]
    save(path, meta, *tokens, [[example.lengths for example in split] for split in (train, val)])


def save(path, meta, train, val, lengths=((), ())):
    """Write a shard of each split that has tokens, and then `meta`."""
    number = meta["train_tokens"] // meta["settings"]["shard_tokens"]
    for split, tokens, rows in zip(("train", "val"), (train, val), lengths, strict=True):
        if len(tokens):
            name = f"{path.stem.replace('meta', split)}_{number:06d}.bin"
            meta["shards"].append(write_shard(path.with_name(name), tokens, rows))
            meta[f"{split}_tokens"] += len(tokens)
    meta["fingerprint"] = fingerprint_shards(meta["tokenizer"], meta["shards"])
    write_file(path, (json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode())


def encode_all(documents, meta, workers, goal):
    """Yield each document as Encoded, in order; threads do it, as tiktoken releases the GIL."""
    encode_one = functools.partial(encode_document, get_tokenizer(meta["tokenizer"]), meta["kind"])
    batches = iter(lambda: list(itertools.islice(documents, 16)), [])       # faster than one at a time
    total = goal if meta["source"] in HUB and goal < sys.maxsize else None        # other sources end before
    with progress(total, meta["train_tokens"]) as bar, ThreadPoolExecutor(workers) as pool:
        tasks = (pool.submit(list, map(encode_one, batch)) for batch in batches)
        waiting = collections.deque(itertools.islice(tasks, 8 * workers))
        while waiting:
            rows = waiting.popleft().result()
            waiting.extend(itertools.islice(tasks, 1))
            if bar is not None:
                bar.update(sum(len(row.tokens) for row in rows))
            yield from rows


def progress(total, done):
    """A bar that counts tokens; None inside, without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext()
    return tqdm(total=total, initial=done, unit=" tokens", unit_scale=True, mininterval=1)


def encode_document(tokenizer, kind, texts):
    """Encode a document; end of text stands before the first text, and behind the second, a response."""
    if len(texts) != (1 if kind == "text" else 2):
        raise UserError("there are records of text and of instructions in one source; prepare them apart")
    texts, replaced = zip(*(re.subn("[\ud800-\udfff]", "\ufffd", text) for text in texts), strict=True)
    pieces = [encode(tokenizer, text) for text in texts]
    pieces[1:] = [np.roll(piece, -1) for piece in pieces[1:]]
    digest = hashlib.blake2b(texts[0].encode(), digest_size=8).digest()     # the same in any order and part
    position = int.from_bytes(digest, "little") / 2**64
    return Encoded(np.concatenate(pieces), [len(piece) for piece in pieces], position, sum(replaced))


def train_tokenizer(texts, vocab_size):
    """The spec of a byte-level BPE tokenizer with at most `vocab_size` ids (Sennrich et al. 2016, on bytes)."""
    import regex
    found = (match[0] for text in texts for match in regex.finditer(PATTERN, text) if len(match[0]) <= 100)
    counts = collections.Counter(itertools.islice(found, 5_000_000))
    # in a word each character stands for an id, so that str.replace merges a pair
    words = [word.encode("utf-8", "replace").decode("latin-1") for word in counts]
    repeats = list(counts.values())
    ids = {bytes([i]): chr(i) for i in range(256)}
    spelled = {char: token for token, char in ids.items()}
    pairs = collections.Counter()                       # how often a pair occurs
    words_with = collections.defaultdict(set)           # and in which words
    changed = set()

    def count(i, sign):
        for pair in map(str.__add__, words[i], words[i][1:]):
            pairs[pair] += sign * repeats[i]
            words_with[pair].add(i)
            changed.add(pair)

    for i in range(len(words)):
        count(i, 1)
    heap = sorted((-n, pair) for pair, n in pairs.items())
    while heap and len(ids) < vocab_size - 1:
        n, pair = heapq.heappop(heap)
        if not 1 < pairs[pair] == -n:                   # rare, or its count changed and is in the heap too
            continue
        token = spelled[pair[0]] + spelled[pair[1]]
        char = ids.setdefault(token, chr(len(ids)))     # the same bytes have one id, however they were merged
        spelled[char] = token
        changed.clear()
        for i in words_with.pop(pair):
            count(i, -1)
            words[i] = words[i].replace(pair, char)
            count(i, 1)
        for other in changed:
            heapq.heappush(heap, (-pairs[other], other))
    if all(len(word) == 1 for word in words):           # a closed vocabulary: tiktoken finds whole words without pieces
        kept = {spelled[word] for word in words}
        ids = [token for token in ids if len(token) == 1 or token in kept]
    return {"name": "corpus", "pattern": PATTERN, "tokens": [base64.b64encode(token).decode() for token in ids]}


def open_source(source, revision="", subset="", part=(0, 1)):
    """(revision, documents of part (i, n)): of every n-th file, or every n-th if files are few. A document is (text,)
    or (instruction, response), in which a byte that is not UTF-8 is a lone surrogate."""
    i, n = part
    if source == "fables":
        rng = random.Random(1)
        revision, documents = f"{FABLES:,} stories", ((fables.draw(rng)[0],) for _ in range(FABLES))
    elif source in HUB:
        documents = read_hub(f"HuggingFaceFW/{source}", revision, subset, part)
        revision = next(documents)
        i, n = 0, 1
    else:
        files = find_files(source)
        size = sum(path.stat().st_size for path in files)
        revision = f"{len(files)} file{'s' * (len(files) > 1)}, {size:,} bytes"
        if len(files) >= n:
            files = files[i::n]
            i, n = 0, 1
        documents = itertools.chain.from_iterable(map(read_documents, files))
    not_blank = (texts for texts in documents if all(map(str.strip, texts)))
    return revision, itertools.islice(not_blank, i, None, n)


def read_hub(repo, revision, subset, part):
    """Yield the commit, the newest unless one is given, then the documents of a part."""
    i, n = part
    try:
        import datasets
        from huggingface_hub import HfApi
        revision = revision or HfApi().dataset_info(repo, timeout=5).sha
        yield revision
        rows = datasets.load_dataset(repo, subset, split="train", streaming=True, revision=revision)
        if rows.num_shards >= n:
            rows = rows.shard(n, i, contiguous=False)
            i, n = 0, 1
        for row in itertools.islice(rows.select_columns(["text"]), i, None, n):
            yield (row["text"],)
    except Exception as error:                          # whatever the hub and the libraries below it raise
        raise Fault(f"cannot read {repo} ({type(error).__name__}: {error}); check the network and HF_TOKEN, set "
                    f"HF_ENDPOINT to a mirror, take --source=FILE or {OFFLINE}") from None


def find_files(source):
    """The sorted files of a file, folder or glob; UserError if there are none to read."""
    pattern = os.path.join(glob.escape(source), "**") if os.path.isdir(source) else source
    paths = [source] if os.path.isfile(source) else glob.glob(pattern, recursive=True)
    paths = sorted(Path(path) for path in paths if os.path.isfile(path))
    files = [path for path in paths if path.name.lower().endswith(SUFFIXES)]
    if not files:
        raise UserError(f"source={source} is no file, folder or glob with {' '.join(SUFFIXES)}; give one, or fables")
    skipped = sorted({*paths} - {*files})
    if skipped:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        print(f"skipped, as neither of {' '.join(SUFFIXES)}: {', '.join(map(str, skipped[:3]))}{more}", file=sys.stderr)
    return files


def read_documents(path):
    """Yield the documents of a file; UserError names the line or row that cannot be read."""
    number = 1
    try:
        for row in read_rows(path, path.suffix.lower()):
            yield read_record(row)
            number += 1
    except Exception as error:                          # json, gzip, lzma, zlib and pyarrow raise a dozen kinds
        raise UserError(f"{path}:{number}: cannot be read: {error}; repair or remove it") from None


def read_record(row):
    """The document in a row; ValueError without one."""
    if type(row) is not dict:
        raise ValueError("no record of names and values")
    if isinstance(row.get("messages"), list):
        *question, answer = row["messages"]
        if not question or answer.get("role") not in ("assistant", "gpt"):
            raise ValueError("its messages should end with one of role assistant, after one of role user")
        question = "\n".join(message["content"] for message in question)
        return format_instruction(question), " " + answer["content"].strip()
    strings = {key: value for key, value in row.items() if isinstance(value, str)}
    for instruction, context, response in RECORDS:
        if instruction in strings and response in strings:
            question = format_instruction(strings[instruction], strings.get(context, ""))
            return question, " " + strings[response].strip()
    if "text" in strings:
        return (strings["text"],)
    raise ValueError('no string under the key "text", nor "instruction" and "output", nor "prompt" and "response", nor '
                     '"messages"')


def read_rows(path, suffix):
    """Yield the rows of a file as dicts: a text file is one, or several if it is huge; a blank line is a blank text."""
    if suffix == ".parquet":
        from pyarrow.parquet import ParquetFile
        for batch in ParquetFile(path).iter_batches(1000, columns={"text", "messages", *itertools.chain(*RECORDS)}):
            yield from batch.to_pylist()
        return
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(suffix, open)
    with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        while suffix in (".txt", ".md") and (text := file.read(LONGEST)):
            if len(re.findall("[\0\ufffd\udc80-\udcff]", text)) > len(text) / 100:
                raise ValueError("no text in UTF-8, but in UTF-16 or another encoding, or no text at all")
            yield {"text": text}
        while line := file.readline(LONGEST):           # none is left of a text file
            if len(line) == LONGEST:
                raise ValueError(f"a line of more than {LONGEST:,} characters")
            yield parse_json(line) if line.strip() else {"text": line}


def program():
    run(main, Config)


if __name__ == "__main__":
    program()
