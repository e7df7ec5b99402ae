"""Text to tokens to shards, once: FineWeb by streaming, your own text files, or a corpus that needs no network.

    python prepare_fineweb.py                                   # a billion tokens of FineWeb into data/fineweb
    python prepare_fineweb.py --source=texts/ --max_tokens=0    # .txt, .jsonl(.gz, .xz), .parquet: file, folder or glob
    python prepare_fineweb.py --source=pydoc                    # English out of Python's own documentation, offline
    python prepare_fineweb.py --subset=default --part=0/64      # the first of 64 processes or machines

A shard is 256 int32 (20240520, 1, number of tokens, zeros), then the tokens as uint16, little-endian: the format of
llm.c and modded-nanogpt, whose shards can be read as well. An end-of-text token stands before each document. meta.json
(meta_p000.json for part 0) says what the shards are and which documents they hold. It is replaced after each training
shard and the validation tokens up to there, and a run that was killed goes on from it: the result is the same.

Records with instruction, optional input, and output (or prompt and response) are examples, and never cut: version 2 of the
format, 256 int32 (20240520, 2, number of tokens, number of examples, zeros), two int32 for each example, the lengths of its
instruction and its response, then the tokens. An end-of-text token opens the instruction and closes the response.
"""
import ast
import base64
import collections
import functools
import glob
import gzip
import hashlib
import heapq
import itertools
import json
import lzma
import os
import re
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import fail, load

MAGIC, HEADER_BYTES = 20240520, 1024
TEXT, EXAMPLES = 1, 2                       # versions of the format
RECORDS = (("instruction", "input", "output"), ("instruction", "context", "response"), ("prompt", "", "response"))
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"     # GPT-2's words
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
COUNTS = ("documents", "replaced", "train_tokens", "val_tokens")
HUB = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
ABOUT = {"pydoc": ("this Python's own documentation, the embedded corpus", "PSF-2.0")}
OFFLINE = "go offline: python prepare_fineweb.py --source=pydoc"


@dataclass(frozen=True)
class Config:
    source: str = "fineweb"          # fineweb, fineweb-edu, pydoc, or a file, folder or glob
    tokenizer: str = ""              # gpt2; corpus: trained on the text; a folder: that of its shards or export; "": corpus for pydoc, else gpt2
    vocab_size: int = 4096           # ids of a corpus tokenizer
    max_tokens: str = "1B"           # stop after so many training tokens, like 100M or 2B; 0: all
    part: str = "0/1"                # i/n: every n-th file (document, if files are few) from the i-th on, an n-th of max_tokens
    out: str = ""                    # folder; "": data/<name of the source>
    val_fraction: float = 0.005      # of the documents, chosen by a hash of their text; 0: none
    shard_tokens: int = 100_000_000  # training tokens in a shard
    workers: int = 0                 # threads that tokenize; 0: one a core
    subset: str = "sample-10BT"      # of the hub's dataset; sample-100BT, sample-350BT, default: all of it
    revision: str = ""               # commit of the hub's dataset; "": the newest

    def check(self):
        """Raise ValueError, in one line that says what to do, for settings that cannot work."""
        parse_count(self.max_tokens)
        i, _, n = self.part.partition("/")
        if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
            raise ValueError(f"part={self.part} is not i/n with 0 <= i < n; write for example 0/4, 1/4, 2/4, 3/4")
        if self.tokenizer not in ("", "gpt2", "corpus") and not os.path.isdir(self.tokenizer):
            raise ValueError(f"tokenizer={self.tokenizer} is not known; choose gpt2, corpus, or a folder of prepared text")
        for name, low, high in (("vocab_size", 257, 2**16), ("val_fraction", 0, 0.9), ("shard_tokens", 1, 2**31 - 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is out of range; choose {low} to {high}")


def parse_count(text):
    """"100M" as 100_000_000; ValueError if it is no such number."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([kMB]?)", text)
    if not match:
        raise ValueError(f"max_tokens={text} is not a number of tokens; write for example 50k, 100M, 2B, or 0 for all")
    return round(float(match[1]) * {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}[match[2]])


def write_file(path, *pieces):
    """Replace `path` by the bytes in one step: after a crash there is the old file or the new one; OSError names it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({sum(map(len, pieces)):,} bytes): {error.strerror}") from None


def write_shard(path, tokens, lengths=()):
    """Write `tokens` (n,) as one shard, of examples if they have `lengths` (m, 2); returns its entry for meta.json. OSError if
    that fails."""
    header = np.array([MAGIC, EXAMPLES if len(lengths) else TEXT, len(tokens), len(lengths)], "<i4").tobytes().ljust(HEADER_BYTES, b"\0")
    pieces = np.asarray(lengths, "<i4").tobytes(), np.asarray(tokens, "<u2").data.cast("B")    # a view: a shard of the usual size is 200 MB
    write_file(path, header, *pieces)
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return {"name": path.name, "tokens": len(tokens), "bytes": HEADER_BYTES + sum(map(len, pieces)), "blake2b": digest.hexdigest()}


def read_shard(path):
    """The tokens of a shard, a read-only memory map (n,) uint16; ValueError if the file is not exactly such a shard."""
    return read_examples(path)[0]


def read_examples(path):
    """The tokens (n,) of a shard and the lengths (m, 2) of instruction and response of its examples; of a text there are none."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        magic, version, n, m = np.frombuffer(file.read(16).ljust(16, b"\0"), "<i4").tolist()
        start = HEADER_BYTES + 8 * m * (version == EXAMPLES)
        if magic != MAGIC or version not in (TEXT, EXAMPLES) or n < 1 or m < 0 or size != start + 2 * n:
            raise ValueError(f"{path}: expected magic {MAGIC}, version {TEXT}, n tokens and {HEADER_BYTES} + 2 n bytes, or version "
                             f"{EXAMPLES} and 8 more an example, found {magic}, {version}, {n:,} and {size:,}; prepare or download it again")
        file.seek(HEADER_BYTES)
        lengths = np.frombuffer(file.read(start - HEADER_BYTES), "<i4").reshape(-1, 2).astype(np.int64)
    if version == EXAMPLES and (m < 1 or lengths.min() < 1 or lengths.sum() != n):
        raise ValueError(f"{path}: its {m:,} examples should be {n:,} tokens, but are {lengths.sum():,}; prepare it again")
    return np.memmap(path, "<u2", "r", start, (n,)), lengths


def find_shards(folder, split):
    """The paths of all shards of "train" or "val" in `folder`, sorted; ValueError if there are none."""
    paths = sorted(Path(folder).glob(f"*{split}*.bin"))
    if not paths and split == "val" and any(Path(folder).glob("*train*.bin")):
        raise ValueError(f"no val shards in {folder}, whose text is too little or was prepared with --val_fraction=0; prepare more in another folder")
    if not paths:
        raise ValueError(f"no {split} shards in {folder}; make them with: python prepare_fineweb.py --out={folder}")
    return paths


def read_parts(folder):
    """{path: contents} of meta.json, or of the meta files of all parts that are in `folder`."""
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("meta*.json"))}


def read_meta(folder):
    """What the shards in `folder` are: a dict like meta.json, of all parts that are there; public shards need none.

    ValueError if there are no shards or a part is not finished.
    """
    parts = read_parts(folder)
    unfinished = [str(path) for path, part in parts.items() if not part["finished"]]
    if unfinished:
        raise ValueError(f"{unfinished[0]} says that it is not finished; run its prepare command again")
    if not parts:
        shards = [(path.name, len(tokens), int(tokens[0]), int(tokens[-1]))
                  for path in find_shards(folder, "train") for tokens in [read_shard(path)]]
        return {"source": str(folder), "label": f"shards in {folder}", "tokenizer": {"name": "gpt2"},
                "vocab_size": 50257, "train_tokens": sum(shard[1] for shard in shards),
                "fingerprint": fingerprint({"name": "gpt2"}, shards)}
    meta, *others = parts.values()
    for other in others:
        meta["shards"] += other["shards"]
        for key in COUNTS:
            meta[key] += other[key]
    return meta | {"fingerprint": fingerprint(meta["tokenizer"], meta["shards"])}


def fingerprint(tokenizer, shards):
    return hashlib.blake2b(json.dumps([tokenizer, shards], sort_keys=True).encode(), digest_size=16).hexdigest()


def find_dataset(names, root="data"):
    """The folder of the first of `names` ("fineweb,pydoc": under `root`, or paths) that has finished shards.

    If none has, pydoc is prepared now if it is among them (under torchrun: by rank 0, first), or the program ends.
    """
    items = [name.strip() for name in names.split(",")]
    for folder in (folder for item in items for folder in (Path(root, item), Path(item))):
        if any(folder.glob("*train*.bin")) and all(part["finished"] for part in read_parts(folder).values()):
            return folder
    if "pydoc" in items:
        print(f"NO DATA for {names} in {root}/: preparing pydoc, Python's own documentation, instead", file=sys.stderr)
        return prepare(Config(source="pydoc", out=str(Path(root, "pydoc"))))
    source = items[0] if items[0] in HUB else f"FILE --out={Path(root, items[0])}"
    fail(f"no data for {names} in {root}/; make it with: python prepare_fineweb.py --source={source}, or {OFFLINE}")


def get_tokenizer(spec):
    """The tiktoken.Encoding of {"name": "gpt2"} or of what `train_tokenizer` returns; ends the program if it cannot."""
    import tiktoken
    if spec["name"] == "corpus":
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["tokens"])}
        return tiktoken.Encoding("corpus", pat_str=spec["pattern"], mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(ranks)})
    try:
        return tiktoken.get_encoding(spec["name"])
    except OSError as error:                            # as all that requests raises
        fail(f"cannot download GPT-2's vocab.bpe and encoder.json ({type(error).__name__}); "
             f"set TIKTOKEN_CACHE_DIR to a folder that has them, or {OFFLINE}")


def train_tokenizer(texts, vocab_size):
    """The spec of a byte-level BPE tokenizer with at most `vocab_size` ids (Sennrich et al. 2016, on bytes)."""
    import regex
    found = (match[0] for text in texts for match in regex.finditer(PATTERN, text) if len(match[0]) <= 100)
    counts = collections.Counter(itertools.islice(found, 5_000_000))
    # a character stands for an id, so that str.replace merges a pair in a word
    words, repeats = [word.encode("utf-8", "replace").decode("latin-1") for word in counts], list(counts.values())
    ids = {bytes([i]): chr(i) for i in range(256)}
    spelled = {char: token for token, char in ids.items()}
    pairs, places, changed = collections.Counter(), collections.defaultdict(set), set()     # how often, in which words

    def count(i, sign):
        for pair in map(str.__add__, words[i], words[i][1:]):
            pairs[pair] += sign * repeats[i]
            places[pair].add(i)
            changed.add(pair)

    for i in range(len(words)):
        count(i, 1)
    heap = sorted((-n, pair) for pair, n in pairs.items())
    while heap and len(ids) < vocab_size - 1:
        n, pair = heapq.heappop(heap)
        if not 1 < pairs[pair] == -n:                   # rare, or it changed and is there again
            continue
        token = spelled[pair[0]] + spelled[pair[1]]
        new = ids.setdefault(token, chr(len(ids)))      # tiktoken knows one id per byte string, however it was merged
        spelled[new] = token
        changed.clear()
        for i in places.pop(pair):
            count(i, -1)
            words[i] = words[i].replace(pair, new)
            count(i, 1)
        for fresh in changed:
            heapq.heappush(heap, (-pairs[fresh], fresh))
    return {"name": "corpus", "pattern": PATTERN, "tokens": [base64.b64encode(token).decode() for token in ids]}


def encode(tokenizer, text):
    """End of text, then the tokens of `text`: (n,) uint16. Special tokens that `text` spells out are ordinary text."""
    # cut before a word, which leaves the tokens alone: tiktoken overflows its stack on a million newlines at once
    pieces = re.findall(r"(?s).{1,50000}(?= \S|\Z)|.{1,50000}", text)
    tokens = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([[tokenizer.eot_token], *tokens], dtype=np.uint16, casting="unsafe")


def ask(instruction, context=""):
    """An instruction, and the text that it is about, as they stand before the response."""
    return "\n".join(part.strip() for part in (instruction, context) if part.strip()) + "\n\nAnswer:"


def parts_of(document):
    """The texts of a document: itself, or of an example (instruction, response)."""
    return (document,) if isinstance(document, str) else document


def open_source(source, revision="", subset="", part=(0, 1)):
    """(revision, the documents of part (i, n) that are not blank, in order): every n-th file's, or every n-th document if
    there are fewer files. A byte that is not UTF-8 is a lone surrogate in them. An example is a pair of texts."""
    i, n = part
    if source == "pydoc":
        revision, texts = f"Python {sys.version.split()[0]}", read_pydoc()
    elif source in HUB:
        texts, (i, n) = read_hub(HUB[source], revision, subset, part), (0, 1)
        revision = next(texts)
    else:
        files = find_files(source)
        revision = f"{len(files)} file{'s'[:len(files) - 1]}, {sum(path.stat().st_size for path in files):,} bytes"
        files, (i, n) = (files[i::n], (0, 1)) if len(files) >= n else (files, part)
        texts = (text for path in files for text in read_file(path))
    filled = (text for text in texts if all(part.strip() for part in parts_of(text)))
    return revision, itertools.islice(of_one_kind(filled), i, None, n)


def of_one_kind(documents):
    """The documents; ValueError if some are texts and some are examples."""
    kind = None
    for document in documents:
        kind = kind or type(document)
        if type(document) is not kind:
            raise ValueError("there are records of text and of instructions in one source; prepare them apart")
        yield document


def read_hub(repo, revision, subset, part):
    """First the commit that is read, the newest if no revision is given; then the documents of a part."""
    import datasets
    from huggingface_hub import HfApi
    i, n = part
    try:
        revision = revision or HfApi().dataset_info(repo, timeout=5).sha
        yield revision
        rows = datasets.load_dataset(repo, subset, split="train", streaming=True, revision=revision)
        rows, (i, n) = (rows.shard(n, i, contiguous=False), (0, 1)) if rows.num_shards >= n else (rows, part)
        yield from (row["text"] for row in itertools.islice(rows.select_columns(["text"]), i, None, n))
    except Exception as error:                          # whatever the hub and the libraries below it raise
        raise ConnectionError(f"cannot read {repo} ({type(error).__name__}: {error}); check the network and HF_TOKEN, "
                              f"set HF_ENDPOINT to a mirror, take --source=FILE or {OFFLINE}") from None


def find_files(source):
    """The files that `source` (file, folder or glob) stands for, sorted; ValueError if none of them can be read."""
    pattern = os.path.join(glob.escape(source), "**") if os.path.isdir(source) else source
    paths = [source] if os.path.isfile(source) else glob.glob(pattern, recursive=True)
    files = sorted(Path(path) for path in paths if path.lower().endswith(SUFFIXES) and os.path.isfile(path))
    if not files:
        raise ValueError(f"source={source} is no file, folder or glob with {' '.join(SUFFIXES)}; give one, or pydoc")
    return files


def read_file(path):
    """The documents of one file; ValueError with its name and the line or row that cannot be read."""
    number = 1
    try:
        for row in read_rows(path, path.suffix.lower()):
            yield read_record(row)
            number += 1
    except Exception as error:                          # json, gzip, lzma, zlib and pyarrow raise a dozen kinds
        raise ValueError(f"{path}:{number}: cannot be read: {error}; repair or remove it") from None


def read_record(row):
    """The text of a row, or its example (instruction, response); ValueError if it has neither."""
    strings = {key: value for key, value in row.items() if isinstance(value, str)} if isinstance(row, dict) else {}
    for asked, context, answer in RECORDS:
        if asked in strings and answer in strings:
            return ask(strings[asked], strings.get(context, "")), " " * bool(strings[answer].strip()) + strings[answer].strip()
    if "text" in strings:
        return strings["text"]
    raise ValueError('no string under the key "text", nor under "instruction" and "output", nor "prompt" and "response"')


def read_rows(path, suffix):
    if suffix == ".parquet":
        import pyarrow.parquet
        file = pyarrow.parquet.ParquetFile(path)
        wanted = {"text", *itertools.chain(*RECORDS)}
        for batch in file.iter_batches(1000, columns=[name for name in file.schema_arrow.names if name in wanted]):
            yield from batch.to_pylist()
        return
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(suffix, open)
    with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for text in [file.read()] if suffix == ".txt" else file:
            yield json.loads(text) if suffix != ".txt" and text.strip() else {"text": text}


@functools.cache
def read_pydoc():
    """The embedded corpus: a list of documents, one for each topic and module of this Python's documentation."""
    from pydoc_data.topics import topics
    stdlib, skipped = Path(os.__file__).parent, {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = [path for path in sorted(stdlib.rglob("*.py")) if not skipped & set(path.relative_to(stdlib).parts)]
    documents, seen = [], set()
    for text in [topics[name] for name in sorted(topics)] + [docstrings(path) for path in paths]:
        blocks = [block for block in re.split(r"\n\s*\n", text) if is_prose(block)]
        paragraphs = dict.fromkeys(" ".join(block.split()) for block in blocks)
        documents.append("\n\n".join(paragraph for paragraph in paragraphs if paragraph not in seen))
        seen.update(paragraphs)
    return documents


def docstrings(path):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ast.walk(ast.parse(path.read_bytes()))
    return "\n\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))


def is_prose(block):
    """Sentences, not tables, signatures, lists, doctests or underlined titles."""
    if re.search(r">>>|\.\.\. |\S {3,}\S|::=|->|[=_*#|~-]{3}|[{}\\<>|@]|^\s*[-*+:|\d]|\w+ -- ", block, re.M):
        return False
    words = block.split()
    plain = sum(bool(re.fullmatch(r"[\"'(]?[A-Za-z][a-z'-]*[)\"']?[.,;:?!)]*", word)) for word in words)
    return len(words) >= 8 and plain >= 0.75 * len(words) and bool(re.match(r"[A-Z].*[.?!:]$", " ".join(words)))


def prepare(cfg):
    """Write the shards and the meta file of `cfg`; returns their folder. A mistake or a fault ends the program."""
    i, n = map(int, cfg.part.split("/"))
    name = re.sub(r"[^\w-]+", "_", Path(cfg.source).name.split(".")[0]).strip("_") or "text"
    path = Path(cfg.out or f"data/{name}", "meta.json" if n == 1 else f"meta_p{i:03d}.json")
    try:
        meta = open_meta(cfg, path)
        print(f"{path.parent}: {meta['label']}" + (" is already prepared" if meta["finished"] else ""))
        if not meta["finished"]:
            with lock(path.with_suffix(".lock")):
                (write_examples if meta.get("kind") == "instructions" else write_shards)(cfg, meta, path)
    except BlockingIOError:
        fail(f"another prepare_fineweb.py is at work in {path.parent}; wait for it")
    except ValueError as error:
        path.with_suffix(".lock").unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
        fail(error)
    except OSError as error:
        fail(f"{error}; mend that and run the same command again to go on", 1)
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to go on", 130)
    print(f"{path}: {meta['documents']:,} documents, {meta['train_tokens']:,} training and {meta['val_tokens']:,} "
          f"validation tokens, {meta['vocab_size']:,} ids, {meta['replaced']:,} bytes that were not UTF-8 replaced")
    return path.parent


def lock(path):
    """The file `path`, open to read and to append, locked until it is closed; BlockingIOError if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")
    if os.name == "posix":                              # elsewhere nothing guards the folder
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def open_meta(cfg, path):
    """The meta file of a part, or what a new one begins with; ValueError if the folder has other shards."""
    parts, folder, name = read_parts(path.parent), path.parent, Path(cfg.source).name
    recorded = next(iter(parts.values()), {}).get("settings", {})
    revision, texts = open_source(cfg.source, cfg.revision or recorded.get("revision"), cfg.subset)
    kind = cfg.tokenizer or ("corpus" if name == "pydoc" else "gpt2")
    spec = {"name": "gpt2"} if kind in ("gpt2", "corpus") else read_tokenizer(kind)
    vocab_size = cfg.vocab_size if kind == "corpus" else len(spec.get("tokens", range(50256))) + 1
    settings = {"source": name, "revision": revision, "subset": cfg.subset, "tokenizer": kind,
                "vocab_size": vocab_size, "max_tokens": parse_count(cfg.max_tokens),
                "parts": int(cfg.part.split("/")[1]), "val_fraction": cfg.val_fraction,
                "shard_tokens": cfg.shard_tokens}
    if parts and settings != recorded:
        other = ", ".join(f"{key}={recorded.get(key)}" for key in settings if recorded.get(key) != settings[key])
        raise ValueError(f"{folder} was prepared with {other}; choose another --out or delete it")
    if any(not shard.name.startswith(("train_", "val_")) for shard in folder.glob("*.bin")):
        raise ValueError(f"{folder} has shards of other origin; choose another --out")
    if path in parts and all((folder / shard["name"]).exists() for shard in parts[path]["shards"]):
        return parts[path]
    first = next(texts, None)
    if not first:
        raise ValueError(f"no tokens in source={cfg.source}, nothing written; give it text that is not blank")
    if kind == "corpus":
        spec = train_tokenizer((part for text in itertools.chain([first], texts) for part in parts_of(text)), cfg.vocab_size)
    about, licence = ABOUT.get(cfg.source, ("text of your own", "yours"))
    if cfg.source in HUB:
        about, licence = f"{HUB[cfg.source]} {cfg.subset}", "ODC-By 1.0"
    document = "text" if isinstance(first, str) else "instructions"
    if any(part.get("kind", "text") != document for part in parts.values()):
        raise ValueError(f"{cfg.source} has text in some parts and instructions in others; prepare them apart")
    return {"source": name, "label": f"{name}: {about} ({revision})", "revision": revision, "licence": licence, "kind": document, "tokenizer": spec,
            "vocab_size": get_tokenizer(spec).n_vocab, **dict.fromkeys(COUNTS, 0), "offset": 0, "shards": [], "settings": settings, "finished": False}


def write_shards(cfg, meta, path):
    """Read on where `meta` ends, and write the shards of a part to its end, with `meta` to `path` after each."""
    (i, n), size = map(int, cfg.part.split("/")), cfg.shard_tokens
    goal = -(-parse_count(cfg.max_tokens) // n) or sys.maxsize         # training tokens of this part
    _, texts = open_source(cfg.source, meta["revision"], cfg.subset, (i, n))
    texts = itertools.islice(texts, meta["documents"], None)
    train, val = array("H"), array("H")                 # tokens that no shard has yet
    start = meta["offset"]                              # in the first document: the last shard ends there
    for tokens, place, replaced, _ in encode_all(texts, cfg, meta, goal):
        (val if place < cfg.val_fraction else train).frombytes(tokens[start:].tobytes())
        start = 0
        while len(train) > size and meta["train_tokens"] + size < goal:
            meta["offset"] = len(tokens) - len(train) + size
            save(path, meta, memoryview(train)[:size], val)
            del train[:size], val[:]
        meta["documents"] += 1
        meta["replaced"] += replaced
        if meta["train_tokens"] + len(train) >= goal:
            break
    del train[goal - meta["train_tokens"]:]
    meta.update(offset=0, finished=True)
    save(path, meta, *balance(train, val, meta))
    path.with_suffix(".lock").unlink()


def read_tokenizer(folder):
    """The spec of the tokenizer of prepared text, or of an exported network, in `folder`; ValueError if there is none."""
    file = Path(folder, "tokenizer.json")
    specs = [json.loads(file.read_text(encoding="utf-8"))] if file.exists() else [part.get("tokenizer") for part in read_parts(folder).values()]
    if not specs or not isinstance(specs[0], dict) or "name" not in specs[0]:
        raise ValueError(f"tokenizer={folder} has no meta.json or tokenizer.json of ours; name a folder of prepared text, or choose gpt2 or corpus")
    return specs[0]


def write_examples(cfg, meta, path):
    """Write the examples of a part and `meta` to `path`, at once: a shard of each split, for they are few. Those for validation
    are val_fraction of them, or 3 %; one instruction is on one side only, unless there is no other."""
    i, n = map(int, cfg.part.split("/"))
    goal = -(-parse_count(cfg.max_tokens) // n) or sys.maxsize
    _, examples = open_source(cfg.source, meta["revision"], cfg.subset, (i, n))
    rows, read, share = [], 0, max(cfg.val_fraction, 0.03 * bool(cfg.val_fraction))
    for tokens, place, replaced, lengths in encode_all(examples, cfg, meta, goal):
        read += len(tokens)
        if rows and read > goal:
            break
        rows.append((place, tokens, lengths))
        meta["documents"] += 1
        meta["replaced"] += replaced
    train, val = ([row[1:] for row in rows if (row[0] < share) == is_val] for is_val in (False, True))
    for full, empty in ((train, val), (val, train)):
        if share and n == 1 and not empty and len(full) > 1:
            empty.append(full.pop())
    splits, meta["finished"] = [list(zip(*side, strict=True)) or ((), ()) for side in (train, val)], True
    save(path, meta, *(np.concatenate(tokens) if tokens else () for tokens, _ in splits), lengths=[lengths for _, lengths in splits])
    path.with_suffix(".lock").unlink()


def balance(train, val, meta):
    """A small source has hardly a document for validation: then its last tokens make 8192, or a twentieth of all."""
    if not train and not meta["train_tokens"]:
        train, val = val, train
    total = len(train) + len(val) + meta["train_tokens"] + meta["val_tokens"]
    missing = max(1, min(total // 20, 8192)) - len(val) - meta["val_tokens"]
    keep = max(1, len(train) - max(0, missing)) if meta["settings"]["val_fraction"] else len(train)
    return memoryview(train)[:keep], val + train[keep:]


def encode_all(texts, cfg, meta, goal):
    """(tokens, place in 0 .. 1, bytes replaced, lengths of the parts) of each document in order, by threads: tiktoken releases the
    GIL. The place is a hash of its first part; up to val_fraction it is for validation."""
    from tqdm import tqdm
    tokenizer, workers = get_tokenizer(meta["tokenizer"]), cfg.workers or os.cpu_count()

    def encode_one(document):
        found = []
        for text in parts_of(document):
            data, replaced = re.subn(b"\xed[\xa0-\xbf].", "\ufffd".encode(), text.encode("utf-8", "surrogatepass"))
            text = data.decode() if replaced else text      # U+FFFD for each lone surrogate; a str is slower to search
            digest = hashlib.blake2b(data, digest_size=8).digest()              # the same in any order and part
            found.append((encode(tokenizer, text), int.from_bytes(digest, "little") / 2**64, replaced))
        (first, place, _), *rest = found
        tokens = np.concatenate([first, *(np.roll(tokens, -1) for tokens, _, _ in rest)]) if rest else first
        return tokens, place, sum(row[2] for row in found), [len(row[0]) for row in found]

    with (ThreadPoolExecutor(workers) as pool,
          tqdm(total=goal if goal < sys.maxsize else None, initial=meta["train_tokens"], unit=" tokens",
               unit_scale=True, mininterval=0.2 if sys.stderr.isatty() else 10) as bar):
        batches = iter(lambda: list(itertools.islice(texts, 16)), [])       # one at a time costs the threads more
        tasks = (pool.submit(list, map(encode_one, batch)) for batch in batches)
        waiting = collections.deque(itertools.islice(tasks, 8 * workers))
        while waiting:
            rows = waiting.popleft().result()
            waiting.extend(itertools.islice(tasks, 1))
            bar.update(sum(len(row[0]) for row in rows))
            yield from rows


def save(path, meta, train, val, lengths=((), ())):
    """Write a training shard, the validation tokens met on the way to its end, and then `meta`."""
    number = meta["train_tokens"] // meta["settings"]["shard_tokens"]
    for split, tokens, rows in zip(("train", "val"), (train, val), lengths, strict=True):
        if len(tokens):
            name = f"{path.stem.replace('meta', split)}_{number:06d}.bin"
            meta["shards"].append(write_shard(path.with_name(name), tokens, rows))
            meta[f"{split}_tokens"] += len(tokens)
    meta.update(fingerprint=fingerprint(meta["tokenizer"], meta["shards"]))
    write_file(path, (json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    prepare(load(Config))
