"""
How good a checkpoint is: what it explains of a text, how it writes, and whether it heeds what it is given.

    python bench/quality.py --checkpoint=out/stories --text=held_out.jsonl --judge=out/causal --out=out/quality

1. Likelihood: an upper bound on the text's negative log-likelihood for each block length (two passes of
self-conditioning, averaged weights, no prompt, stratified noise levels), and where along the noise context helps.
The training loss says neither.
2. Samples: perplexity under a judge, an autoregressive model of the same tokens. Alone it is fooled by dull text,
so it stands beside the entropy of a sample's own tokens (Zheng et al. 2024), distinct n-grams (Li et al. 2016),
repetition, spelling, MAUVE (Pillutla et al. 2021), and the same row for real text and for text without any context.
3. Conditioning: whether a continuation fits its own prompt better than another's, whether a filled blank fits its
text, and, of a --text, how often the last word of a document is guessed (LAMBADA, Paperno et al. 2016).
"""
import collections
import itertools
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint as ckpt
import diffusion
import fables
from configurator import UserError, in_range, run
from data import Dataset, Texts, find_dataset, first_document, get_tokenizer, read_meta
from diffusion import generator
from generate import Canvas, Sampling, Scorer, bound, generate, generators, plan
from machine import choose_device, keep_memory
from twins import cross_entropy, evaluate, load_twin

ABOUT_STORIES = ("sentences, stories: shares that the grammar of fables.txt could have written. plots: exp of their "
                 "entropy, 10 in\nthe grammar. different: share of different stories. learnt: share that stands in the "
                 "training text. broken first:\nwhat goes wrong first, and how often.")
STORY_COLUMNS = "sentences:.3f stories:.3f stories_error:.3f plots:.1f different:.3f learnt:.3f broken_first:"
AS_RUN = 256                       # windows for the bound of the sampler's own steps, each of which is a pass
TRAINING_TOKENS = 2_000_000        # of the training split, read for its words and for the floors
LISTS = {"block_length": (int, 0, 10**6), "strided": (int, 2, 10**6), "steps": (int, 1, 10**6),
         "revisions": (int, 0, 10**6), "temperatures": (float, 0.01, 100), "eta": (float, 0, 1),
         "guidance": (float, 0, 100)}


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out"          # file, or folder of a run: its newest
    text: str = ""                   # held-out text, .jsonl (key text) or .txt; "": the validation split of dataset
    dataset: str = ""                # folder of shards: its validation split; words and floors from its training split
    judge: str = ""                  # checkpoint of an autoregressive twin that judges; "": no judged figures
    masked: str = ""                 # checkpoint of a masked twin, of any order or of blocks; "": none
    causal: str = ""                 # checkpoint of an autoregressive twin to compare with; "": none
    out: str = ""                    # folder for quality.json and frontier.png; "": print only
    sequences: int = 4096            # windows for a bound; the text repeats if it is shorter
    block_length: str = "1,4,8,16,0" # tokens denoised together, a row each; 0 is the whole window
    strided: str = "8"               # the same, for blocks that are spread over the text; "": none
    samples: int = 256               # texts in a row of the sample table, of block_size tokens; 0 leaves it out
    steps: str = "8,16"              # denoising steps of a block, a row each; a single token has one
    revisions: str = "0,8"           # times a block of several tokens is read again, at most, a row each
    temperatures: str = "0.8,1.0"    # of what the context says, a row each
    eta: str = "1.0"                 # fresh noise at each step, a row each, from 0 (deterministic) to 1
    pairs: int = 128                 # held-out windows for prompts and blanks; 0 leaves both out
    guidance: str = "1,1.5,2,3,5,7"  # weights of the prompt, a row each
    blank: int = 4                   # tokens blanked in the middle of a window
    batch_size: int = 32             # texts at a time; lower it if memory runs short
    seed: int = 1                    # of all that is drawn
    device: str = "auto"             # auto, cpu, cuda

    def check(self):
        """Raise UserError for settings that cannot work."""
        in_range(self, 2, 1e9, "sequences", *[name for name in ("samples", "pairs") if getattr(self, name)])
        in_range(self, 1, 1e9, "blank", "batch_size")
        for name, (kind, low, high) in LISTS.items():
            text, missing = getattr(self, name), [] if name == "strided" else [math.nan]
            if not all(low <= number <= high for number in numbers(text, kind) or missing):
                raise UserError(f"{name}={text} is not a list of {'whole ' * (kind is int)}numbers from {low:g} to "
                                f"{high:g}; write for example {getattr(Config, name)}")
        if not self.text and not self.dataset:
            raise UserError("there is no text to measure on; give --text=FILE or --dataset=FOLDER")


def numbers(text, kind):
    """The numbers of a comma list, none of an empty one; [nan] if they are not all of this kind."""
    try:
        return [kind(part) for part in text.split(",") if text]
    except ValueError:
        return [math.nan]


# ---- what is measured, and on what ----

class Bench(NamedTuple):
    model: Any                     # the averaged network
    settings: Sampling             # as sample.py writes with it
    tokenizer: Any                 # its tiktoken.Encoding
    windows: torch.Tensor          # (N, T) held-out tokens, in the order of the text
    training: torch.Tensor         # (n,) tokens of the training split; empty without --dataset
    judge: Any                     # the twin that judges, or None
    twins: dict                    # the masked and the causal twin, if named
    stories: frozenset = frozenset()                # of the training split, if it is of fables: then the grammar judges


def read_documents(path):
    """The documents of a .jsonl file, one in each line under the key "text", or of a .txt file, which is one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = [line for line in text.split("\n") if line.strip()]         # U+2028 is no end of a line
        documents = [json.loads(line)["text"] for line in lines] if path.endswith("l") else [text]
        return list(map("".join, documents))                    # TypeError for what is no string
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"cannot read text={path} ({error}); name a .jsonl file with a text in each line, or a .txt "
                        "file") from None


def read_windows(path, tokenizer, block_size):
    """The text, each document behind an end-of-text, cut to windows (N, block_size), the rest dropped."""
    ids = [i for document in read_documents(path) for i in (tokenizer.eot_token, *tokenizer.encode_ordinary(document))]
    if len(ids) < block_size:
        raise UserError(f"{path} has {len(ids)} tokens, less than a window of {block_size}; give it more text")
    return torch.tensor(ids[:len(ids) // block_size * block_size]).view(-1, block_size)


def read_last_words(path, tokenizer, block_size):
    """Of each document the tokens up to the end of its last word, as many as a window holds, (1, T), and how many of
    them are that word's (Paperno et al. 2016). A document has at least ten words before it; UserError if none has."""
    found = []
    for document in read_documents(path):
        words = re.findall(r"\s*\S+", document.rstrip())
        word = re.match(r"\s*\W*[\w'.,-]*\w|", words[-1] if words else "")[0]    # without what is behind it
        before, ids = "".join(words[:-1]), tokenizer.encode_ordinary(word)
        if word and len(words) > 10 and len(ids) < block_size:
            idx = [tokenizer.eot_token, *tokenizer.encode_ordinary(before), *ids]
            found.append((torch.tensor([idx[-block_size:]]), len(ids)))
    if not found:
        raise UserError(f"text={path} has no document of more than ten words; give it more, or --pairs=0")
    return found


def open_data(dataset, content, cfg, split="val"):
    """The windows, or examples, of prepared text in the tokens of a checkpoint's content; UserError if it has
    others."""
    folder = find_dataset(dataset)
    if folder is None or read_meta(folder)["tokenizer"] != content["data"]["tokenizer"]:
        raise UserError(f"dataset={dataset} has another tokenizer than the checkpoint; name one in its tokens")
    align = math.ceil(content["data"].get("align", 0))          # as the network saw them
    return Dataset(folder, split, cfg, content["data"]["vocab_size"], align)


def open_twin(name, place, content, device="cpu"):
    """The twin of a checkpoint's content, None for no place; UserError if it was made for other tokens or shorter
    windows."""
    if not place:
        return None
    twin, found = load_twin(place, device=device)
    if (found["kind"] == "autoregressive") == (name == "masked"):
        wanted = "a masked" if name == "masked" else "the autoregressive"
        raise UserError(f"{name}={place} is a twin of kind={found['kind']}; name {wanted} one")
    if found["data"]["tokenizer"] != content["data"]["tokenizer"]:
        raise UserError(f"{name}={place} has another tokenizer than the checkpoint; train both on the same dataset")
    size, needed = found["config"]["block_size"], content["config"]["block_size"]
    if size < needed:
        raise UserError(f"{name}={place} has windows of {size} tokens, shorter than the checkpoint's {needed}; train "
                        "it with those")
    return twin


def open_bench(cfg):
    """The Bench that the settings name, and the checkpoint's path and content; UserError if something does not fit."""
    (path, content), device = ckpt.find_network(cfg.checkpoint), choose_device(cfg.device)
    model, tokenizer = ckpt.load_model(content, device), get_tokenizer(content["data"]["tokenizer"])
    T = model.cfg.block_size
    for steps in numbers(cfg.steps, int):           # before anything is computed
        plan(Sampling(steps=steps), model.cfg, torch.zeros(T, dtype=torch.bool))
    if T < max(4, cfg.blank + 2):
        raise UserError(f"blank={cfg.blank} and 4-grams do not fit into this checkpoint's windows of {T} tokens")
    training, told = torch.empty(0, dtype=torch.int64), []
    if cfg.dataset:
        shards = open_data(cfg.dataset, content, model.cfg, "train").shards
        parts = [shard[:TRAINING_TOKENS // len(shards)] for shard in shards]
        training = torch.from_numpy(np.concatenate(parts).astype("int64"))
        if content["data"]["label"].startswith("fables"):
            told = [tokenizer.decode(part.tolist()) for shard in shards for part in cut_documents(shard, tokenizer)]
    if cfg.text:
        windows = read_windows(cfg.text, tokenizer, T)
    else:
        held_out = open_data(cfg.dataset, content, model.cfg)
        windows = held_out.spread(len(held_out)).idx
    for name, needed in (("samples", 2 * cfg.samples), ("pairs", cfg.pairs)):
        if len(windows) < needed:
            raise UserError(f"{name}={getattr(cfg, name)} needs {needed} held-out windows and there are "
                            f"{len(windows)}; lower it")
    judge, *twins = (open_twin(name, getattr(cfg, name), content, device) for name in ("judge", "masked", "causal"))
    twins = {name: twin for name, twin in zip(("masked", "causal"), twins, strict=True) if twin}
    bench = Bench(model, Sampling(**ckpt.usual(content)), tokenizer, windows, training, judge, twins, frozenset(told))
    return bench, path, content


def shuffled(windows, seed):
    """The windows in random order, so that neighbours are of different documents."""
    return windows[torch.randperm(len(windows), generator=generator("cpu", seed, "order of the windows"))]


def plain(idx):
    """Windows idx (N, T) as Texts of which every token counts, without a prompt."""
    everything = torch.ones_like(idx, dtype=torch.bool)
    return Texts(idx, idx[:, :0], everything[:, :0], everything)


@torch.no_grad()
def in_batches(f, batch_size, *inputs, device="cpu"):
    """f(*inputs) for inputs (N, ...), a batch of rows at a time, on the CPU."""
    parts = zip(*(x.split(batch_size) for x in inputs), strict=True)
    return torch.cat([f(*(x.to(device) for x in part)).cpu() for part in parts])


def ask(twin, f, batch_size, *inputs):
    """As in_batches, of a method of a twin, on its device."""
    return in_batches(getattr(twin, f), batch_size, *inputs, device=twin.blank.device)


def mean(name, x):
    """The mean of independent values (N,) and its standard error, under this name."""
    x = x.double()
    return {name: x.mean().item(), f"{name}_error": (x.std() / len(x) ** 0.5).item()}


def timed(labels, make):
    """make(), and a line of progress with the seconds that it took."""
    started = time.perf_counter()
    made = make()
    what = ", ".join(value if isinstance(value, str) else f"{name} {value:g}" for name, value in labels.items())
    print(f"{what}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return made


def show(rows, columns):
    """Print rows aligned; columns are "name:format" with blanks between, an error is titled +-, what is not known
    is a -."""
    columns = [column.split(":") for column in columns.split()]
    lines = [["+-" if name.endswith("_error") else name.replace("_", " ") for name, _ in columns]]
    lines += [["-" if row.get(name) is None else format(row[name], form) for name, form in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]))


# ---- writing ----

def write(model, settings, canvas, seed, batch_size):
    """Texts (N, T) that keep the canvas's idx (N, T) where known (T,) and follow its prompts (N, P); row i's noise
    is of (seed, i)."""
    made = []
    for rows in torch.arange(len(canvas.idx)).split(batch_size):
        part = Canvas(canvas.idx[rows], canvas.known, canvas.prompt[rows])
        made.append(generate(model, part, settings, generators(model.wte.device, seed, rows.tolist())).cpu())
    return torch.cat(made)


def draw(model, settings, n, seed, batch_size=32):
    """Unconditional samples: (n, block_size)."""
    idx = torch.zeros(n, model.cfg.block_size, dtype=torch.int64)
    return write(model, settings, Canvas(idx, idx[0].bool(), idx[:, :0]), seed, batch_size)


def continue_prompts(model, settings, prompts, inside, seed, batch_size=32):
    """One continuation of each prompt (N, P), to fill a window: (N, block_size - P). The last `inside` tokens of
    the prompt stand in the window, those before them are seen by cross-attention."""
    N, P = prompts.shape
    idx = torch.zeros(N, model.cfg.block_size - P + inside, dtype=torch.int64)
    idx[:, :inside] = prompts[:, P - inside:]
    known = torch.arange(idx.size(1)) < inside
    return write(model, settings, Canvas(idx, known, prompts[:, :P - inside]), seed, batch_size)[:, inside:]


def fill(model, settings, idx, known, seed, batch_size=32):
    """idx (N, T) with what is not known (T,) filled in: (N, T)."""
    return write(model, replace(settings, guidance_scale=1.0), Canvas(idx, known, idx[:, :0]), seed, batch_size)


def draw_twin(twin, how, shape, temperature, seed, batch_size):
    """Samples of a twin, of a shape (n, T), all of one generator; `how` is (block_length, steps, revisions)."""
    (n, T), (length, steps, revisions) = shape, how
    rng = generator("cpu", seed, "twin", length, steps, temperature)
    parts = torch.arange(n).split(batch_size)
    return torch.cat([twin.sample(len(part), T, steps, temperature, rng, length, revisions).cpu() for part in parts])


def ways(cfg, lengths):
    """(block_length, steps of a block, revisions) of samples; a single token has one step, and is not read again."""
    for length in lengths:
        yield from [(1, 1, 0)] if length == 1 else itertools.product([length], numbers(cfg.steps, int),
                                                                     numbers(cfg.revisions, int))


def most_calls(length, steps, revisions, T):
    """Network calls for a text of T tokens, at most: each revision of a block reads it once."""
    return -(-T // (length or T)) * (steps + revisions * (1 + steps))


def twin_ways(twin, cfg, T):
    """The `ways` in which a twin writes T tokens: one after the other, in any order, or in blocks."""
    if twin.kind == "autoregressive":
        return [(1, 1, 0)]
    if twin.kind == "masked":
        return [(0, n, 0) for n in dict.fromkeys((*numbers(cfg.steps, int), T))]
    return list(ways(cfg, numbers(cfg.block_length, int)))


def draw_unigram(tokens, n, length, seed):
    """Texts (n, length) of tokens drawn each by itself from `tokens` (N,)."""
    return tokens[torch.randint(len(tokens), (n, length), generator=generator("cpu", seed, "unigram"))]


def draw_bigram(tokens, n, length, seed):
    """Texts (n, length) in which each token follows the one before as often as in `tokens` (N,), read as a ring."""
    rng, after = generator("cpu", seed, "bigram"), tokens.roll(-1)[tokens.argsort(stable=True)]
    count = torch.bincount(tokens)
    first = count.cumsum(0) - count                             # where the successors of an id begin in `after`
    made = [tokens[torch.randint(len(tokens), (n,), generator=rng)]]
    for _ in range(length - 1):
        u = torch.rand(n, generator=rng, dtype=torch.float64)
        made.append(after[first[made[-1]] + (u * count[made[-1]]).long()])
    return torch.stack(made, 1)


# ---- scores of samples ----

def entropy(tokens):
    """Entropy in nats of the tokens of each text (N, T), from their frequencies in that text alone: (N,), at most
    log T."""
    shares = [row.unique(return_counts=True)[1].double() / len(row) for row in tokens]
    return torch.stack([-(share * share.log()).sum() for share in shares])


def ngrams(tokens, n):
    """A number for every n-gram of the texts (N, T), the same for the same: (N, T - n + 1)."""
    grams = tokens.unfold(1, n, 1)
    return grams.flatten(0, 1).unique(dim=0, return_inverse=True)[1].view(grams.shape[:2])


def distinct(tokens, n):
    """Share of different n-grams among all of the texts (N, T)."""
    grams = ngrams(tokens, n)
    return len(grams.unique()) / grams.numel()


def repetition(tokens, n=4):
    """Share of n-grams that have been before in the same text, the mean over texts (N, T)."""
    grams = ngrams(tokens, n)
    return 1 - sum(len(row.unique()) for row in grams) / grams.numel()


def words(tokens, tokenizer):
    """The words of tokens (T,), in lower case; an end-of-text is none."""
    text = tokenizer.decode(tokens.tolist()).replace(tokenizer.decode([tokenizer.eot_token]), "\n")
    return re.findall(r"[A-Za-z']+", text.lower())


def share_of_words(tokens, tokenizer, dictionary):
    """Share of the words of texts (N, T) that are in a set; None if the set is empty or there is no word."""
    found = [word in dictionary for row in tokens for word in words(row, tokenizer)] if dictionary else []
    return sum(found) / len(found) if found else None


def mauve(features, reference):
    """MAUVE of two sets of features (N, n_embd): 1 if they are alike, towards 0 if not."""
    from mauve import compute_mauve
    pair = dict(p_features=reference.float().numpy(), q_features=features.float().numpy())
    return float(compute_mauve(**pair, num_buckets=max(2, len(features) // 10), verbose=False).mauve)


def cut_documents(tokens, tokenizer):
    """The documents in tokens (n,), each without the end-of-text before it."""
    return [part[1:] for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_token)) if len(part) > 1]


def stories(idx, tokenizer):
    """The first story in each window (N, T), a list of (text, whether it ends there)."""
    eot = tokenizer.eot_token
    return [(tokenizer.decode(first_document(row, eot)), eot in row[1:]) for row in idx.tolist()]


def judge_stories(idx, bench):
    """The grammar's columns for windows (N, T): the shares of sentences and of whole stories that are right, exp of the
    entropy of their plots, the shares of different ones and of those in the training text, what is wrong first."""
    told = stories(idx, bench.tokenizer)
    verdicts = [fables.judge(text) for text, _ in told]
    right = [verdict.consistent and ends for verdict, (_, ends) in zip(verdicts, told, strict=True)]
    broken = collections.Counter(verdict.broken for verdict in verdicts if verdict.broken)
    plots = collections.Counter(fables.plot_of(text) for text, _ in told)
    del plots[None]
    shares = torch.tensor([n / plots.total() for n in plots.values()])
    return {"sentences": sum(v.right for v in verdicts) / sum(v.sentences for v in verdicts),
            **mean("stories", torch.tensor(right)), "different": len(set(told)) / len(told),
            "plots": torch.special.entr(shares).sum().exp().item(),
            "learnt": sum(text in bench.stories for text, _ in told) / len(told),
            "broken_first": ", ".join(f"{name} {n / len(told):.0%}" for name, n in broken.most_common(3))}


def score(tokens, judge=None, tokenizer=None, dictionary=None, reference=None, batch_size=32):
    """The columns of the sample table for texts (N, T); `reference` (N, n_embd) is the judge's features of real
    text."""
    row = {"entropy": entropy(tokens).mean().item(), **{f"distinct-{n}": distinct(tokens, n) for n in (1, 2, 4)},
           "repeated": repetition(tokens), "words": share_of_words(tokens, tokenizer, dictionary)}
    if judge:
        row |= mean("nats", ask(judge, "nll", batch_size, tokens).mean(1))
        row["perplexity"] = math.exp(row["nats"])
    if reference is not None:
        row["MAUVE"] = mauve(ask(judge, "features", batch_size, tokens), reference)
    return row


# ---- the sections: each prints its table and returns its numbers ----

def dial(lengths, strided):
    """(block_length, "neighbours" or "strided") of two comma lists, the window last."""
    lengths = sorted(set(numbers(lengths, int)), key=lambda n: n or 10**7)
    return [(n, "neighbours") for n in lengths] + [(n, "strided") for n in numbers(strided, int)]


@torch.no_grad()
def losses_at(model, idx, t, block_length, rng):
    """-log p of idx (B, T) where all blocks stand at noise of index t: the network's, of a second pass, and that of the
    best guess without any context: two of (B, T), in nats."""
    scorer, index, alpha_bar = Scorer(model, plain(idx), block_length), torch.full_like(idx, t), model.alpha_bar()
    x_0 = scorer.E[idx]
    x_t = diffusion.add_noise(x_0, index, alpha_bar, diffusion.randn(x_0, rng))
    log_snr = diffusion.log_snr(index, alpha_bar)
    _, logits = scorer.predict(slice(None), True, x_t, log_snr)
    free = F.linear(model.evidence(x_t, log_snr), scorer.E, model.log_unigram)
    return cross_entropy(logits, idx), cross_entropy(free, idx)


def ce_by_noise(model, idx, block_length, batch_size, levels=16):
    """Cross-entropy of idx (N, T) in nats a token at fixed noise: of the network, and of the best guess without any
    context. The gap is what the network has learnt about context; a training loss, over all levels, hides it."""
    rows = []
    for t in (1 + (model.cfg.timesteps - 1) * torch.arange(levels) // (levels - 1)).tolist():
        total = torch.zeros(2, device=idx.device)
        for i, part in enumerate(idx.split(batch_size)):
            losses = losses_at(model, part, t, block_length, generator(idx.device, "noise", t, i))
            total += torch.stack([loss.sum() for loss in losses])
        network, without = (total / idx.numel()).tolist()
        rows.append({"t": t, "network": network, "without_context": without})
    return rows


@torch.no_grad()
def bound_as_run(model, idx, block_length, strided, steps, rng):
    """Nats of each token of idx (B, T), at most: the bound of the sampler's own steps, its guess carried from one to
    the next (eta 1, temperature 1). The noise falls as q(x_s | x_t, x_0) says: reverse_step with the true x_0."""
    indices, alpha_bar, E = diffusion.step_indices(model.cfg.timesteps, steps), model.alpha_bar(), model.embedding()
    texts = plain(idx)
    order = diffusion.block_order(texts.loss_mask, block_length, strided)
    order = order if order.max() else None                          # one block
    prompt, x_0, guess = model.encode_prompt(texts.prompt, texts.prompt_mask, E), E[idx], None
    snr = alpha_bar / (1 - alpha_bar)
    x_t = diffusion.add_noise(x_0, torch.full_like(idx, indices[0]), alpha_bar, diffusion.randn(x_0, rng))
    nats = diffusion.prior_kl(x_0, alpha_bar[-1])
    for t, s in zip(indices[:-1], indices[1:], strict=True):
        level = diffusion.log_snr(torch.full_like(idx, t), alpha_bar)
        h = model.denoise(x_0, x_t, level, order, prompt, E, guess)
        guess, logits = model.predict(h, x_t, level, E)
        if s:
            nats += 0.5 * (snr[s] - snr[t]) * (x_0 - guess).double().square().sum(-1)
            x_t = diffusion.reverse_step(x_t, x_0, t, s, alpha_bar, 1.0, diffusion.randn(x_0, rng))
    return nats + cross_entropy(logits, idx)


def as_run(model, idx, batch_size, block_length, strided, steps):
    """bound_as_run of the first AS_RUN windows of idx (N, T), on the CPU: the mean of each."""
    draw = partial(bound_as_run, model, block_length=block_length, strided=strided, steps=steps,
                   rng=generator(model.wte.device, "as run", block_length, steps))
    return in_batches(draw, batch_size, idx[:AS_RUN], device=model.wte.device).mean(1)


def bound_row(cfg, bench, idx, length, blocks):
    """A row of the likelihood table: the bounds of writing idx (N, T) in blocks of this length."""
    strided, texts = blocks == "strided", plain(idx)
    row = {"block_length": length, "blocks": blocks, **bound(bench.model, texts, cfg.batch_size, length, strided)}
    if length != 1:
        row["independent"] = bound(bench.model, texts, cfg.batch_size, length, strided, steps=1)["bound"]
        for steps in numbers(cfg.steps, int):
            nats = as_run(bench.model, idx, cfg.batch_size, length, strided, steps)
            row |= mean(f"in_{steps}_steps", nats)
    if "masked" in bench.twins:
        draw_bound = partial(bench.twins["masked"].nll_in_blocks, block_length=length, strided=strided,
                             rng=generator("cpu", "masked", length))
        row |= mean("masked_twin", in_batches(draw_bound, cfg.batch_size, idx, device=idx.device).mean(1))
    return row


def bytes_per_token(windows, tokenizer):
    """Bytes of text for each token of windows (N, T); an end-of-text has none."""
    rows = [[i for i in row if i != tokenizer.eot_token] for row in windows.tolist()]
    return sum(len(tokenizer.decode_bytes(row)) for row in rows) / windows.numel()


def likelihood(cfg, bench):
    windows, model = bench.windows, bench.model
    own = bench.settings.block_length
    idx = windows[torch.arange(cfg.sequences) * len(windows) // cfg.sequences].to(model.wte.device)
    rows = []
    for length, blocks in dial(f"{own},{cfg.block_length}", cfg.strided):
        labels = {"what": "bound", "block_length": length, "blocks": blocks}
        rows.append(timed(labels, partial(bound_row, cfg, bench, idx, length, blocks)))
    row = {**next(row for row in rows if row["block_length"] == own), "by_block_length": rows, "windows": len(windows),
           "sequences": cfg.sequences, "unigram": -model.log_unigram.cpu()[windows].mean().item(),
           "bytes_per_token": bytes_per_token(windows, bench.tokenizer)}
    row["perplexity"] = math.exp(row["bound"])
    row["bits_per_byte"] = row["bound"] / math.log(2) / row["bytes_per_token"]
    print("1. LIKELIHOOD: the bound is at least the text's cross-entropy; unigram: that of frequencies alone.\n"
          "bound {bound:.3f} +- {bound_error:.3f} nats a token = reconstruction {reconstruction:.4f} + diffusion "
          "{diffusion:.3f} + prior {prior:.4f}\nperplexity {perplexity:.2f}, {bits_per_byte:.4f} bits a byte, in "
          "blocks of {block_length} (0: the window), as sample.py writes; unigram {unigram:.3f}".format(**row))
    for name, twin in bench.twins.items():
        row[f"{name}_twin"] = evaluate(twin, idx, cfg.batch_size)
        kind = "a bound, in any order" if name == "masked" else "exact"
        print("{} twin {:.3f} +- {:.3f} nats a token, {}".format(name, *row[f"{name}_twin"], kind))
    print("\nblock_length: tokens denoised together, over all noise levels (0: the window; 1: one, in one step).\n"
          "blocks: of neighbours, from left to right, or strided, spread over the text.\n"
          "independent: the same blocks in one step from pure noise, each token by itself; joint denoising gains\n"
          "what it is above the bound. in n steps: the bound of the sampler's own n steps a block, on up to "
          f"{AS_RUN} windows.\nmasked twin: its bound, in those blocks.")
    own_steps = " ".join(f"in_{steps}_steps:.3f" for steps in numbers(cfg.steps, int))
    show(rows, "block_length:d blocks: bound:.3f bound_error:.3f independent:.3f "
               f"{own_steps} masked_twin:.3f masked_twin_error:.3f")
    row["ce_by_noise"] = ce_by_noise(model, idx[::-(-len(idx) // 256)], own, cfg.batch_size)
    print("\nCross-entropy in nats a token at noise of index t: the network's, and the best context-free one.")
    show(row["ce_by_noise"], "t:d network:.3f without_context:.3f")
    return row


def grid(cfg, T):
    """The labels of SunFish's rows of the sample table."""
    rows, rest = [], (numbers(cfg.eta, float), numbers(cfg.temperatures, float))
    for length, blocks in dial(cfg.block_length, cfg.strided):
        for (_, steps, revisions), eta, temperature in itertools.product(ways(cfg, [length]), *rest):
            rows.append({"block_length": length, "blocks": blocks, "steps": steps, "revisions": revisions, "eta": eta,
                         "calls": most_calls(length, steps, revisions, T), "temperature": temperature})
    return rows


def systems(cfg, bench, real):
    """The rows of the sample table: (labels, a function that returns texts (samples, T))."""
    n, T = real.shape
    tokens, rest = bench.training if len(bench.training) else bench.windows.flatten(), (cfg.seed, cfg.batch_size)
    same = bool(cfg.judge and cfg.causal) and Path(cfg.judge).resolve() == Path(cfg.causal).resolve()
    yield {"text": "held-out text"}, lambda: real
    yield {"text": "unigram floor"}, partial(draw_unigram, tokens, n, T, cfg.seed)
    yield {"text": "bigram floor"}, partial(draw_bigram, tokens, n, T, cfg.seed)
    for labels in grid(cfg, T):
        chosen = {name: labels[name] for name in ("block_length", "steps", "revisions", "eta", "temperature")}
        settings = Sampling(strided=labels["blocks"] == "strided", **chosen)
        yield {"text": "SunFish", **labels}, partial(draw, bench.model, settings, n, *rest)
    for name, twin in bench.twins.items():
        for how, temperature in itertools.product(twin_ways(twin, cfg, T), numbers(cfg.temperatures, float)):
            labels = {"text": f"{name} twin" + ", the judge" * (same and name == "causal"),
                      **dict(zip(("block_length", "steps", "revisions"), how, strict=True)),
                      "calls": most_calls(*how, T), "temperature": temperature}
            yield labels, partial(draw_twin, twin, how, (n, T), temperature, *rest)


def reference_features(cfg, bench, windows):
    """The judge's features of real windows (N, T): (N, n_embd), or None and a line that says why there is no MAUVE."""
    if not bench.judge:
        print("There is no --judge, so perplexity and MAUVE are -.")
        return None
    try:
        import mauve        # noqa: F401
    except ImportError as error:
        print(f"MAUVE is -, because its package is not there ({error}): pip install mauve-text")
        return None
    return ask(bench.judge, "features", cfg.batch_size, windows)


def samples(cfg, bench):
    print(f"\n2. SAMPLES: {cfg.samples} texts a row, each of {bench.windows.size(1)} tokens, without a prompt.\n"
          "steps: denoising steps of a block. revisions: times it is read again, and what does not hold is rewritten.\n"
          "calls: of the network for a text, at most.\n"
          "perplexity: how surprised the judge is, exp of its mean nats; low for likely text, and for dull text.\n"
          "entropy: of the tokens within a text, in nats, mean over texts; much below real text's is dull.\n"
          "distinct-n: different n-grams / all of the row. repeated: share of 4-grams that are repeats in their text.\n"
          "words: share of words that occur in the training text. MAUVE: likeness to other held-out text, at most 1.")
    windows, rows = shuffled(bench.windows, cfg.seed), []
    dictionary = set(words(bench.training, bench.tokenizer))
    reference = reference_features(cfg, bench, windows[cfg.samples:2 * cfg.samples])
    for labels, make in systems(cfg, bench, windows[:cfg.samples]):
        made = timed(labels, make)
        scores = score(made, bench.judge, bench.tokenizer, dictionary, reference, cfg.batch_size)
        rows.append({**labels, **scores, **(judge_stories(made, bench) if bench.stories else {})})
    if bench.stories:
        print(ABOUT_STORIES)
        show(rows, f"text: block_length:d blocks: steps:d revisions:d temperature:g {STORY_COLUMNS}")
    show(rows, "text: block_length:d blocks: steps:d revisions:d calls:d temperature:g eta:g perplexity:,.1f "
               "entropy:.3f distinct-1:.3f distinct-2:.3f distinct-4:.3f repeated:.3f words:.3f MAUVE:.3f")
    return rows


def adherence(judge, prompts, continuations, batch_size=32):
    """The judge's nats a token of continuations (N, T) after their prompts (N, P), after another's, and the
    difference."""
    def nats(prompts):
        both = torch.cat((prompts, continuations), 1)
        return ask(judge, "nll", batch_size, both)[:, prompts.size(1):].mean(1)
    own, other = nats(prompts), nats(prompts.roll(1, 0))
    return {**mean("own", own), "other": other.mean().item(), **mean("adherence", other - own)}


def prompting(cfg, bench):
    windows, rest = shuffled(bench.windows, cfg.seed)[:cfg.pairs], (cfg.seed, cfg.batch_size)
    model = bench.model
    P = max(1, min(model.cfg.prompt_size, model.cfg.block_size) // 2)
    prompts = windows[:, :P]
    makers = {"held-out text": lambda: windows[:, P:],
              "SunFish, no prompt": lambda: draw(model, bench.settings, cfg.pairs, *rest)[:, :-P]}
    for place, inside in (("in the window", P), ("half before it", P - P // 2), ("before it", 0)):
        for scale in numbers(cfg.guidance, float):
            settings = replace(bench.settings, guidance_scale=scale)
            makers[f"{place}, guidance {scale:g}"] = partial(continue_prompts, model, settings, prompts, inside, *rest)
    rows = []
    for name, make in makers.items():
        made = timed({"continuation": name}, make)
        found = adherence(bench.judge, prompts, made, cfg.batch_size)
        rows.append({"continuation": name, **found, "entropy": entropy(made).mean().item()})
    print(f"\n3. PROMPTS: {cfg.pairs} held-out prompts of {P} tokens, continued by {made.size(1)} as sample.py does.\n"
          "own, other: the judge's nats a token of the continuation after its own prompt, and after another text's.\n"
          "adherence: the difference, paired, and its standard error; 0 is chance. entropy: within a continuation.\n"
          "A prompt stands in the window that is written, or before it, where only cross-attention sees it.")
    show(rows, "continuation: own:.3f own_error:.3f other:.3f adherence:.3f adherence_error:.3f entropy:.3f")
    return rows


def blanks(cfg, bench):
    idx, start = shuffled(bench.windows, cfg.seed)[:cfg.pairs], (bench.windows.size(1) - cfg.blank) // 2
    place = torch.arange(idx.size(1))
    known = (place < start) | (place >= start + cfg.blank)
    make = partial(fill, bench.model, bench.settings, idx, known, cfg.seed, cfg.batch_size)
    texts = {"true tokens": idx, "SunFish's tokens": timed({"what": "blanks"}, make),
             "another text's tokens": torch.where(known, idx, idx.roll(1, 0))}
    nats = {name: ask(bench.judge, "nll", cfg.batch_size, text).mean(1) for name, text in texts.items()}
    true = nats["true tokens"]
    rows = [{"window_with": name, **mean("nats", x), **mean("worse", x - true)} for name, x in nats.items()]
    print(f"\n4. BLANKS: {cfg.blank} tokens in the middle of {cfg.pairs} held-out windows.\n"
          "nats: the judge's, a token of the whole window. worse: than with the true tokens, paired, and its error.")
    show(rows, "window_with: nats:.4f nats_error:.4f worse:.4f worse_error:.4f")
    return rows


def single_tokens(cfg, bench):
    idx, place = shuffled(bench.windows, cfg.seed)[:cfg.pairs], torch.arange(bench.windows.size(1))
    rows = torch.arange(len(idx)).chunk(16)                     # those of a chunk have their blank in one place
    blank = torch.randint(1, len(place) - 1, (len(rows),), generator=generator("cpu", cfg.seed, "blanked token"))
    hidden = torch.cat([(place == at).expand(len(part), -1) for at, part in zip(blank, rows, strict=True)])

    def guess(settings):
        made = [fill(bench.model, settings, idx[part], place != at, cfg.seed, cfg.batch_size)
                for at, part in zip(blank, rows, strict=True)]
        return torch.cat(made)
    guesses = {"commonest token": torch.full_like(idx, bench.model.log_unigram.argmax().item())}
    ways = {"SunFish, likeliest": replace(bench.settings, block_length=1, eta=0.0), "SunFish, a sample": bench.settings}
    for name, settings in ways.items():
        guesses[name] = timed({"what": "single tokens", "guess": name}, partial(guess, settings))
    for name, twin in bench.twins.items():
        likeliest = partial(lambda twin, *inputs: twin.predict(*inputs).argmax(-1), twin)
        guesses[f"{name} twin"] = in_batches(likeliest, cfg.batch_size, idx, hidden, device=twin.blank.device)
    table = [{"guessed_by": name, **mean("recovered", (made == idx)[hidden])} for name, made in guesses.items()]
    print(f"\n5. SINGLE TOKENS: one blanked in each of {cfg.pairs} held-out windows; the share that is guessed.\n"
          "The twins give the likeliest token, too; the causal twin sees only what stands before.")
    show(table, "guessed_by: recovered:.3f recovered_error:.3f")
    return table


def likeliest_of_twin(twin, idx, known):
    """The tokens (1, T) that a twin takes for the likeliest, on the CPU."""
    return in_batches(lambda *inputs: twin.predict(*inputs).argmax(-1), 1, idx, ~known[None], device=twin.blank.device)


def last_words(cfg, bench):
    passages = read_last_words(cfg.text, bench.tokenizer, bench.windows.size(1))[:cfg.pairs]
    commonest = bench.model.log_unigram.argmax().item()
    guesses = {"commonest token": lambda idx, known: torch.full_like(idx, commonest)}
    for name, length in (("SunFish, token by token", 1), ("SunFish, the word at once", 0)):
        settings = replace(bench.settings, block_length=length, eta=0.0)
        guesses[name] = partial(fill, bench.model, settings, seed=cfg.seed)
    for name, twin in bench.twins.items():
        guesses[f"{name} twin"] = partial(likeliest_of_twin, twin)
    table = []
    for name, guess in guesses.items():
        right = []
        for idx, n in passages:
            known = torch.arange(idx.size(1)) < idx.size(1) - n
            right.append(bool((guess(idx=idx, known=known) == idx)[:, ~known].all()))
        table.append({"guessed_by": name, **mean("right", torch.tensor(right))})
    print(f"\n6. LAST WORDS of {len(passages)} documents, after what stands before them in a window; the share that is "
          "guessed in full,\ngiven the number of its tokens.")
    show(table, "guessed_by: right:.3f right_error:.3f")
    return table


def picture(rows, path):
    """Perplexity under the judge against entropy: a line through the temperatures of each system, as a PNG."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        print(f"no picture, because matplotlib is not there ({error}): pip install matplotlib", file=sys.stderr)
        return
    lines = {}
    for row in rows:
        labels = [f"{key} {row[key]}" for key in ("block_length", "blocks", "steps", "eta") if key in row]
        name = ", ".join([row["text"], *labels])
        lines.setdefault((row["text"], name), []).append((row["entropy"], row["perplexity"]))
    figure, axes = pyplot.subplots(figsize=(9, 6))
    axes.set_prop_cycle(color=pyplot.cm.tab20.colors)
    style = {"held-out text": "k*", "unigram floor": "kx", "bigram floor": "rx", "masked twin": "s--",
             "causal twin": "kd:"}
    for (text, name), points in lines.items():
        axes.plot(*zip(*points, strict=True), style.get(text.removesuffix(", the judge"), "o-"), label=name)
    axes.set(yscale="log", xlabel="entropy of the tokens within a text, nats", ylabel="perplexity under the judge")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def main(cfg):
    keep_memory()
    bench, path, content = open_bench(cfg)
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={cfg.out} cannot be a folder ({error.strerror}); name another") from None
    print(f"{path}, step {content['step']:,}, on {len(bench.windows):,} windows of {bench.windows.size(1)} tokens of "
          f"{cfg.text or f'the validation split of {cfg.dataset}'}\n")
    result = {"checkpoint": str(path), "step": content["step"], "settings": asdict(cfg)}
    sections = [likelihood, *[samples] * bool(cfg.samples), *[prompting, blanks] * bool(cfg.pairs and bench.judge),
                *[single_tokens] * bool(cfg.pairs), *[last_words] * bool(cfg.pairs and cfg.text)]
    for section in sections:
        result[section.__name__] = section(cfg, bench)
        if cfg.out:                             # after each, so that a run that is stopped leaves what it had
            (Path(cfg.out) / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    if cfg.pairs and not bench.judge:
        print("\nThere is no --judge, so prompts (3) and blanks (4) are left out.")
    if cfg.out and cfg.samples and bench.judge:
        picture(result["samples"], Path(cfg.out) / "frontier.png")


if __name__ == "__main__":
    run(main, Config)
