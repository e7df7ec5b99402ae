"""
Shards of tokens, the meta files that describe them, tokenizers, and the batches of a training step.

A shard is 256 int32 (20240520, 1, number of tokens, zeros), then the tokens as uint16, little-endian: the format of
llm.c and modded-nanogpt. In a shard of examples the header is (20240520, 2, number of tokens, number of examples,
zeros), and the lengths of each instruction and response, two int32, stand before the tokens.
"""
import base64
import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import diffusion
from configurator import Fault, UserError, check_fields, parse_json, printable, read_file, replacing, shorten
from diffusion import LATER

MAGIC, HEADER_BYTES = 20240520, 1024
BELL = 0.6                                  # noise levels are sigmoid(BELL * logit(u)), u uniform (bench/LOG.md)
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
TEXT, EXAMPLES = 1, 2                       # versions of the shard format
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"     # GPT-2's words
HUB = ("fineweb", "fineweb-edu")            # data sets of HuggingFaceFW
EMBEDDED = "fables"                         # a source that needs no network
OFFLINE = "go offline: python prepare_fineweb.py --source=fables"
COUNTS = ("documents", "replaced", "train_tokens", "val_tokens")
META = {"label": str, "licence": str, "kind": str, "tokenizer": dict, "vocab_size": (int, 2, 2**16), "shards": list,
        "settings": dict, "finished": bool, **dict.fromkeys((*COUNTS, "offset"), (int, 0, 1e15))}
SHARD = {"name": str, "tokens": (int, 1, 1e15), "bytes": (int, 1, 1e15), "blake2b": str}


def write_file(path, *pieces):
    """Replace `path` by these bytes, whole or not at all; Fault if that fails."""
    try:
        with replacing(path) as file:
            file.writelines(pieces)
    except OSError as error:
        raise Fault(f"cannot write {path} ({sum(map(len, pieces)):,} bytes): {error.strerror}; "
                    "mend that and run the same command again to go on") from None


def write_shard(path, tokens, lengths=()):
    """Write tokens (n,), of examples with `lengths` (m, 2) if any, as a shard; returns its entry for meta.json."""
    version = EXAMPLES if len(lengths) else TEXT
    header = np.array([MAGIC, version, len(tokens), len(lengths)], "<i4").tobytes().ljust(HEADER_BYTES, b"\0")
    table = np.asarray(lengths, "<i4").tobytes()
    body = np.asarray(tokens, "<u2").data.cast("B")     # a view: a shard of the usual size is 200 MB
    write_file(path, header, table, body)
    digest = hashlib.blake2b(table, digest_size=16)
    digest.update(body)
    return {"name": path.name, "tokens": len(tokens), "bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def read_shard(path):
    """The tokens (n,) of a shard, a read-only memory map of uint16."""
    return read_examples(path)[0]


def read_examples(path):
    """The tokens (n,) of a shard, and the lengths (m, 2) int64 of its instructions and responses, m = 0 for text;
    UserError if the file is damaged."""
    if not path.is_file():                              # a pipe would be waited for
        raise UserError(f"{path} is no regular file; prepare it again")
    size, header = os.path.getsize(path), np.fromfile(path, "<i4", 4)
    magic, version, n, m = np.pad(header, (0, 4 - len(header))).tolist()
    start = HEADER_BYTES + 8 * m * (version == EXAMPLES)
    if magic != MAGIC or version not in (TEXT, EXAMPLES) or n < 1 or m < 0 or size != start + 2 * n:
        raise UserError(f"{path}: expected magic {MAGIC}, version 1 or 2, n tokens and {start:,} + 2 n bytes, found "
                        f"{magic}, {version}, {n:,} and {size:,}; prepare it again")
    lengths = np.fromfile(path, "<i4", (start - HEADER_BYTES) // 4, offset=HEADER_BYTES).reshape(-1, 2).astype(np.int64)
    if version == EXAMPLES and (m < 1 or lengths.min() < 1 or lengths.sum() != n):
        raise UserError(f"{path}: its examples should have {n:,} tokens, but have {lengths.sum():,}; prepare it again")
    return np.memmap(path, "<u2", "r", start, (n,)), lengths


def find_shards(folder, split):
    """The sorted paths of the shards of a split, "train" or "val"; UserError if there are none."""
    paths = sorted(Path(folder).glob(f"*{split}*.bin"))
    if not paths:
        raise UserError(f"no {split} shards in {folder}; prepare text without --val_fraction=0, in a new folder: "
                        "python prepare_fineweb.py --out=FOLDER")
    return paths


def read_parts(folder):
    """{path: contents} of the meta files in `folder`; UserError if one is damaged."""
    parts = {}
    for path in sorted(Path(folder).glob("meta*.json")):
        try:
            part = parse_json(read_file(path, 2**26))
            check_fields(path, part, **META)
            for shard in part["shards"]:
                check_fields(f"{path}, shards", shard, **SHARD)
                if not re.fullmatch(r"[\w-]+\.bin", shard["name"]):              # of this folder
                    raise UserError(f"{shorten(shard['name'])} is no name of a shard")
        except (UserError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {folder} and prepare it again") from None
        parts[path] = part | {name: printable(part[name]) for name in ("label", "licence")}
    return parts


def read_meta(folder):
    """The meta files of all parts as one, with a fingerprint; UserError if a shard or a part is missing."""
    parts = read_parts(folder)
    for path, part in parts.items():
        missing = [shard["name"] for shard in part["shards"] if not path.with_name(shard["name"]).exists()]
        if missing or not part["finished"]:
            fault = f"{missing[0]} is missing" if missing else "it is not finished"
            raise UserError(f"{path}: {fault}; run its prepare command again")
    meta, *others = parts.values() or [describe_public_shards(folder)]
    for other in others:
        for key in ("shards", *COUNTS):
            meta[key] += other[key]
    return {**meta, "fingerprint": fingerprint_shards(meta["tokenizer"], meta["shards"])}


def describe_public_shards(folder):
    """The meta of shards that others made with GPT-2's tokenizer; a few of their tokens tell them apart."""
    shards = []
    for path in find_shards(folder, "train"):
        tokens = read_shard(path)
        shards.append((path.name, len(tokens), int(tokens[0]), int(tokens[-1])))
    return {"source": str(folder), "label": f"shards in {folder}", "licence": "unknown", "kind": "text",
            "tokenizer": {"name": "gpt2"}, "vocab_size": 50257, "train_tokens": sum(shard[1] for shard in shards),
            "shards": shards}


def fingerprint_shards(tokenizer, shards):
    """A hash of a tokenizer and of the entries of shards, 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps([tokenizer, shards], sort_keys=True).encode(), digest_size=16).hexdigest()


def find_dataset(names, root="data"):
    """The first folder of `names` ("fineweb,fables": in `root`, or paths) with finished shards. If there is none: None
    if the embedded corpus, which the caller may prepare, is among the names, else UserError."""
    items = [item.strip() for item in names.split(",")]
    for item in items:
        for folder in (Path(root, item), Path(item)):
            if any(folder.glob("*train*.bin")) and all(part["finished"] for part in read_parts(folder).values()):
                return folder
    if EMBEDDED in items:
        return None
    source = items[0] if items[0] in HUB else f"FILE --out={Path(root, items[0])}"
    raise UserError(f"no data for {names} in {root}/; run python prepare_fineweb.py --source={source}, or {OFFLINE}")


def get_tokenizer(spec):
    """The tiktoken.Encoding of {"name": "gpt2"} or of what `train_tokenizer` returns; UserError if there is none."""
    import tiktoken
    try:
        if spec["name"] == "gpt2":
            return tiktoken.get_encoding("gpt2")
        ranks = {base64.b64decode(token, validate=True): rank for rank, token in enumerate(spec["tokens"])}
        is_ours = spec["name"] == "corpus" and spec["pattern"] == PATTERN and len(ranks) == len(spec["tokens"]) < 2**16
        if not is_ours or list(ranks)[:256] != [bytes([i]) for i in range(256)]:        # tiktoken panics on any other
            raise ValueError
    except OSError as error:                            # requests raises no other
        raise UserError(f"cannot download GPT-2's vocab.bpe and encoder.json ({type(error).__name__}); set "
                        "TIKTOKEN_CACHE_DIR to a folder that has them, or prepare with --tokenizer=corpus") from None
    except (KeyError, TypeError, ValueError):
        raise UserError("the tokenizer is damaged or not one of ours; prepare its text again") from None
    return tiktoken.Encoding("corpus", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def encode(tokenizer, text):
    """End of text, then the tokens of `text`, in which special tokens are ordinary text: (n,) uint16."""
    # cut before a word, as no token crosses it: tiktoken overflows its stack on a million newlines at once
    pieces = re.findall(r"(?s).{1,50000}(?= \S|\Z)|.{1,50000}", text)
    tokens = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([[tokenizer.eot_token], *tokens], dtype=np.uint16, casting="unsafe")


def format_instruction(instruction, context=""):
    """An instruction, with the text it is about, as it stands before a response."""
    return "\n".join(part.strip() for part in (instruction, context) if part.strip()) + "\n\nAnswer:"


def cut_at_eot(ids, eot):
    """Token ids up to the first `eot`."""
    return ids[:ids.index(eot)] if eot in ids else ids


def first_document(ids, eot):
    """Token ids of the first document, without the `eot` before and behind it."""
    return cut_at_eot(ids[ids[:1] == [eot]:], eot)


def lock(path):
    """The file `path`, open to append and locked until it is closed; UserError if another process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no regular file; remove it, or choose another folder")
        file = open(path, "a+", encoding="utf-8")
        if os.name == "posix":                          # there are no locks elsewhere
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:    # its owner removed it after we had opened it
                raise BlockingIOError
    except BlockingIOError:
        raise UserError(f"another process is at work in {path.parent}; wait or choose another folder") from None
    except OSError as error:
        why = "its file system has no locks" if error.errno in NO_LOCKS else error.strerror
        raise UserError(f"cannot write to {path.parent} ({why}); choose another folder") from None
    return file


# ---- windows and examples ----

class Texts(NamedTuple):
    idx: torch.Tensor              # (B, T) int64 token ids
    prompt: torch.Tensor           # (B, P) int64 token ids before the text, at the right end
    prompt_mask: torch.Tensor      # (B, P) True where there is a prompt
    loss_mask: torch.Tensor        # (B, T) True where a token has a loss: not of an instruction, nor of padding


class Dataset:
    """The windows of T tokens in the shards of a split, each with the P tokens before it; or the examples in shards of
    instructions: at most T / 2 tokens of the instruction, the rest of it before the window, then the response, cut at
    T. Instructions of more than T / 2 + P tokens are left out; UserError if nothing is left.

    A share `align` of the windows is moved on to where the next document begins, with no tokens before it.
    """

    def __init__(self, folder, split, cfg, vocab_size, align=0.0):
        self.paths, self.vocab_size = find_shards(folder, split), vocab_size
        self.T, self.P = cfg.block_size, cfg.prompt_size
        self.align = align
        self.shards, lengths = zip(*map(read_examples, self.paths), strict=True)
        self.is_examples = any(map(len, lengths))
        rows = [self.place(part) for part in lengths]
        self.rows = np.concatenate(rows)                    # of examples
        counts = map(len, rows) if self.is_examples else (len(shard) // self.T for shard in self.shards)
        self.ends = np.cumsum(list(counts))
        self.begins = [np.flatnonzero(shard[:len(shard) - self.T + 1] == vocab_size - 1) if align else []
                       for shard in self.shards]            # of documents, at their end of text
        if self.ends[-1] == 0:
            raise UserError(f"{folder}: no {split} shard holds a window of block_size={self.T} tokens, or an example "
                            f"with up to {self.T // 2 + self.P} tokens of instruction; prepare more, or change "
                            "block_size or prompt_size")

    def __len__(self):
        return int(self.ends[-1])

    def place(self, lengths):
        """Of examples of these lengths (n, 2) those that fit, in four columns: where the example and where its window
        begins, and how many tokens of the window are given and exist."""
        start = lengths.sum(1).cumsum() - lengths.sum(1)
        given = np.minimum(lengths[:, 0], self.T // 2)
        end = np.minimum(given + lengths[:, 1], self.T)
        rows = np.column_stack((start, start + lengths[:, 0] - given, given, end))
        return rows[lengths[:, 0] <= self.T // 2 + self.P]

    def locate(self, i):
        """The shards of windows or examples i (n,), and the columns of `place`: five of (n,)."""
        shard = np.searchsorted(self.ends, i, side="right")
        if self.is_examples:
            return shard, *self.rows[i].T
        window, start = (i - np.append(0, self.ends)[shard]) * self.T, 0 * i
        aligned = scramble(i.astype(np.uint64)) < self.align * 2.0 ** 64
        for k in np.unique(shard[aligned]):
            rows, begins = aligned & (shard == k), self.begins[k]
            if len(begins):
                start[rows] = window[rows] = begins[np.searchsorted(begins, window[rows]).clip(max=len(begins) - 1)]
        return shard, start, window, 0 * i, 0 * i + self.T

    def read(self, i):
        """The Texts of windows or examples i (n,), and how many of their first tokens are given (n,)."""
        shard, start, window, given, end = self.locate(np.asarray(i))
        pos = np.arange(-self.P, self.T)
        places = window[:, None] + pos
        exists = (places >= start[:, None]) & (pos < end[:, None])
        ids = np.zeros(places.shape, np.int64)
        for k in np.unique(shard):
            rows = shard == k
            ids[rows] = np.where(exists[rows], self.shards[k].take(places[rows], mode="clip"), 0)
        if ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            raise UserError(f"{self.paths[shard[row]]}: id {ids[row, column]} at token {places[row, column]} is not "
                            f"below the vocabulary of {self.vocab_size}; prepare these shards again")
        counts = exists[:, self.P:] & (pos[self.P:] >= given[:, None])
        texts = ids[:, self.P:], ids[:, :self.P], exists[:, :self.P], counts
        return Texts(*map(torch.from_numpy, texts)), torch.from_numpy(given)

    def spread(self, n):
        """The Texts of n windows or examples spread evenly over the split, repeated if it has fewer."""
        return self.read(np.arange(n) * len(self) // n)[0]

    def log_unigram(self, tokens=20_000_000):
        """Log frequency of every id in the first tokens of each shard: (vocab_size,) float32."""
        count = np.full(self.vocab_size, 0.5)
        for shard in self.shards:
            ids = shard[:tokens // len(self.shards)]
            count += np.bincount(ids, minlength=self.vocab_size)[:self.vocab_size]
        return torch.from_numpy(np.log(count / count.sum())).float()


# ---- batches: random numbers are drawn for a whole optimizer step at once, from (seed, step, purpose) ----

class Batch(NamedTuple):
    idx: torch.Tensor              # (B, T) int64 token ids
    order: torch.Tensor | None     # (B, T) number of the block of each; -1 given; None: one block
    t: torch.Tensor                # (B, T) int64 diffusion index of each, one for the tokens of a block
    eps: torch.Tensor              # (B, T, C) noise
    prompt: torch.Tensor           # (B, P) int64 token ids before the text, at the right end
    prompt_mask: torch.Tensor      # (B, P) True where the network may see them
    loss_mask: torch.Tensor        # (B, T) True where a token has a loss
    guess: bool                    # whether the network reads its own first guess of x_0 (self-conditioning)
    step_tokens: int               # tokens with a loss in the whole optimizer step


def scramble(x):
    """A hash of each uint64 in x (...): the finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(i, n, key):
    """The places of i (m,) in random orders of 0 .. n - 1, one for each key (m,): a Feistel network over the next power
    of four, repeated for what falls out of range (Black & Rogaway 2002)."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    i = np.asarray(i, np.uint64)
    left, right = i >> half, i & low
    for turn in range(4):
        mixed = scramble(right ^ scramble(key + np.uint64(turn)))
        left, right = right, left ^ (mixed & low)
    i = left << half | right
    out = i >= n
    if out.any():
        i[out] = permute(i[out], n, key[out])
    return i.astype(np.int64)


def window_numbers(cfg, n, step):
    """The windows (S,) of a step, out of n: each epoch visits all once, in an order of its own."""
    epoch, place = np.divmod(step * cfg.step_sequences + np.arange(cfg.step_sequences), n)
    key = scramble(epoch.astype(np.uint64) + np.uint64(diffusion.hash64(cfg.seed, "epoch")))
    return permute(place, n, key)


def stratified_uniform(n, rng):
    """Uniform numbers, one in each n-th part of 0 .. 1, in random order: (n, 1)."""
    return ((torch.randperm(n, generator=rng) + torch.rand(n, generator=rng)) / n)[:, None]


def choose_given(S, T, rng):
    """Which tokens are given (S, T): a prefix, all but up to eight spans, or single tokens; any number, never all."""
    kind, share = torch.rand(S, 1, generator=rng), torch.rand(S, 1, generator=rng)
    place = torch.arange(T)
    prefix = place < (share * T).long()
    count = torch.randint(1, 9, (S, 1), generator=rng)
    hole = torch.randint(T, (S, 8), generator=rng)[..., None]
    length = (torch.rand(S, 8, generator=rng) * 2 * share * T / count).long()[..., None] + 1
    used = (torch.arange(8) < count)[..., None]
    but_spans = ~(used & (place >= hole) & (place < hole + length)).any(1)
    single = torch.rand(S, T, generator=rng) < share
    single.scatter_(1, torch.randint(T, (S, 1), generator=rng), False)
    return torch.where(kind < 1 / 3, prefix, torch.where(kind < 2 / 3, but_spans, single))


def choose_blocks(cfg, free, rng):
    """(order (S, T), block_length (S, 1)) of sequences that are written where free (S, T): a share p_single token by
    token, p_window at once, the others in blocks of 2, 4 ... max_block_length, p_strided of these strided. A share
    p_given of all has given tokens."""
    S, T = free.shape
    powers = 2 ** torch.arange(1, max(2, cfg.max_block_length.bit_length()))
    kind, size = stratified_uniform(S, rng), torch.randint(len(powers), (S, 1), generator=rng)
    length = torch.where(kind < cfg.p_single, 1, torch.where(kind < cfg.p_single + cfg.p_window, 0, powers[size]))
    strided = torch.rand(S, 1, generator=rng) < cfg.p_strided
    has_given = stratified_uniform(S, rng) < cfg.p_given
    free = free & ~(has_given & choose_given(S, T, rng))
    return diffusion.block_order(free, length, strided & (length > 1)), length


def noise_levels(cfg, order, length, rng):
    """The diffusion index of each token, one for a block, stratified over the sequences: (S, T) in 1 .. timesteps.

    Levels in the middle, where tokens are decided, come more often, and a token in a block of one gets the highest. For
    objective eps all are equally frequent.
    """
    single = (length == 1) & (order >= 0)                   # given tokens are denoised together, before all others
    u = diffusion.golden_offset(stratified_uniform(len(order), rng).double(), order)
    u = torch.sigmoid(BELL * torch.logit(u)) if cfg.objective == "ce" else u
    t = 1 + (u * cfg.timesteps).long().clamp(max=cfg.timesteps - 1)
    return torch.where(single, cfg.timesteps, t) if cfg.objective == "ce" else t


def choose_prompts(cfg, prompt_mask, is_examples, rng):
    """(tokens of the prompts that are seen (S, P): a random number of the last ones, or a whole instruction; prompts
    that are withheld (S, 1): a share conditioning_dropout)."""
    S, P = prompt_mask.shape
    withheld = torch.rand(S, 1, generator=rng) < cfg.conditioning_dropout
    seen = 1 + (torch.rand(S, 1, generator=rng) * P).long()
    last = torch.arange(P) >= P - (P if is_examples else seen)
    return prompt_mask & last & ~withheld, withheld


def step_batches(cfg, data, step, micro_batches, device):
    """Yield the Batches of one optimizer step, one for each range of sequence numbers in micro_batches. Sequence i of a
    step is the same for any number of processes and any batch size."""
    def rng(purpose, device="cpu"):
        return diffusion.generator(device, cfg.seed, step, purpose)
    texts, given = data.read(window_numbers(cfg, len(data), step))
    begun = torch.arange(cfg.block_size) < given[:, None]
    order, length = choose_blocks(cfg, texts.loss_mask, rng("blocks"))
    t = noise_levels(cfg, order, length, rng("levels"))
    prompt_mask, withheld = choose_prompts(cfg, texts.prompt_mask, data.is_examples, rng("prompts"))
    order = torch.where(~texts.loss_mask & ~begun | begun & withheld, LATER, order)
    if cfg.p_window == 1 and cfg.p_given == 0 and not data.is_examples:
        order = None
    eps = torch.randn(*texts.idx.shape, cfg.token_dim, generator=rng("noise", device), device=device)
    guess = diffusion.hash64(cfg.seed, step, "guess") < cfg.self_conditioning * 2 ** 64
    whole = Batch(texts.idx, order, t, eps, texts.prompt, prompt_mask, texts.loss_mask, guess,
                  int(texts.loss_mask.sum()))
    if torch.device(device).type == "cuda":                 # pinned memory is copied while the device computes
        whole = Batch(*(x.pin_memory() if torch.is_tensor(x) and not x.is_cuda else x for x in whole))
    for numbers in micro_batches:
        rows = slice(numbers[0], numbers[-1] + 1)           # a view: nothing is copied on the same device
        yield Batch(*(x[rows].to(device, non_blocking=True) if torch.is_tensor(x) else x for x in whole))


def make_batch(cfg, data, step, rows, device):
    """The Batch of a range of sequences (numbers within the step)."""
    return next(step_batches(cfg, data, step, [rows], device))
