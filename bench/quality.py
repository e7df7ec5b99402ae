"""
How good a checkpoint is: what it explains of a text, how it writes, and whether it heeds what it is given.

    python bench/quality.py --checkpoint=out/stories --text=held_out.jsonl --judge=out/causal --out=out/quality

1. Likelihood: an upper bound on the text's negative log-likelihood (two passes of self-conditioning, averaged weights, no prompt,
stratified noise levels), and where along the noise context helps. The training loss says neither.
2. Samples: perplexity under a judge, an autoregressive model of the same tokens. Alone it is fooled by dull text, so it stands
beside the entropy of a sample's own tokens (Zheng et al. 2024), distinct n-grams (Li et al. 2016), repetition, spelling, MAUVE
(Pillutla et al. 2021), and the same row for real text and for text without any context.
3. Conditioning: whether a continuation fits its own prompt better than another's, and whether a filled blank fits its text.
"""
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import fail, load        # noqa: E402


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out"          # file, or folder of a run: its newest
    text: str = ""                   # held-out text, .jsonl (key text) or .txt; "": the validation split of dataset
    dataset: str = ""                # folder of shards: its validation split, and words and floors from its training split
    judge: str = ""                  # checkpoint of an autoregressive twin that judges; "": no judged figures
    masked: str = ""                 # checkpoint of a masked twin to compare with; "": none
    causal: str = ""                 # checkpoint of an autoregressive twin to compare with; "": none
    out: str = ""                    # folder for quality.json and frontier.png; "": print only
    sequences: int = 4096            # windows for the bound, each turn at one noise level; the text repeats if it is shorter
    samples: int = 256               # texts in a row of the sample table, of block_size tokens; 0 leaves it out
    steps: str = "8,16,32,64,128,256"        # denoising steps, a row each
    spans: str = "1,2,4,8,0"         # tokens written together, a row each where there are steps enough; 0 is all at once
    streams: str = "2,4,8,16"        # parts of a text written side by side, a row each, one step a turn; "": none
    temperatures: str = "0.7,0.8,0.9,1.0"    # of the scores, a row each
    eta: str = "1.0"                 # fresh noise at each step, a row each, from 0 (deterministic) to 1
    pairs: int = 128                 # held-out windows for prompts and blanks; 0 leaves both out
    guidance: str = "1,1.5,2,3,5,7"  # weights of the prompt, a row each
    blank: int = 4                   # tokens blanked in the middle of a window
    condition_steps: int = 0         # denoising steps of continuations; 0 as sample.py
    batch_size: int = 32             # texts at a time; lower it if memory runs short
    seed: int = 1                    # of all that is drawn
    device: str = "auto"             # auto, cpu, cuda

    def check(self):
        """Raise ValueError, in one line that says what to do, for settings that cannot work."""
        for name, low in (("sequences", 2), ("samples", 2), ("pairs", 2), ("blank", 1), ("condition_steps", 0), ("batch_size", 1)):
            value, off = getattr(self, name), name in ("samples", "pairs")
            if value < low and not (off and value == 0):
                raise ValueError(f"{name}={value} is less than {low}" + "; 0 leaves it out" * off)
        for name, kind, low, high in (("steps", int, 1, 10**6), ("spans", int, 0, 10**6), ("streams", int, 1, 10**6),
                                      ("temperatures", float, 0.01, 100), ("eta", float, 0, 1), ("guidance", float, 0, 100)):
            if name == "streams" and not self.streams:
                continue
            if not all(low <= number <= high for number in numbers(getattr(self, name), kind) or [math.nan]):
                raise ValueError(f"{name}={getattr(self, name)} is not a list of {'whole ' * (kind is int)}numbers from {low:g} "
                                 f"to {high:g}; write for example {getattr(Config, name)}")
        if not self.text and not self.dataset:
            raise ValueError("there is no text to measure on; give --text=FILE or --dataset=FOLDER")
        for name in ("checkpoint", "text", "judge", "masked", "causal"):
            if not Path(getattr(self, name)).exists():
                raise ValueError(f"{name}={getattr(self, name)} is not there; name a file{' or a run' * (name != 'text')}")


def numbers(text, kind):
    """The numbers of a comma list, or None if they are not all of this kind."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        return None


if __name__ == "__main__":
    CFG = load(Config)

import json        # noqa: E402
import re
import time
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

import prepare_fineweb
import sample
import train
from diffusion import FAR, generator
from model import choose_device, find_checkpoint, keep_memory, load_model

TRAINING_TOKENS = 2_000_000        # of the training split, read for its words and for the floors


# ---- what is measured, and on what ----

class Bench(NamedTuple):
    model: Any                     # the averaged network
    encoding: Any                  # its tiktoken.Encoding
    windows: torch.Tensor          # (N, T) held-out tokens, in the order of the text
    training: torch.Tensor         # (n,) tokens of the training split; empty without --dataset
    judge: Any                     # the twin that judges, or None
    twins: dict                    # the masked and the causal twin, if named
    device: torch.device


def read_windows(path, encoding, block_size):
    """The text, each document behind an end-of-text, cut to windows (N, block_size), the rest dropped."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        documents = [json.loads(line)["text"] for line in text.splitlines()] if path.endswith("l") else [text]
        ids = [i for document in documents for i in (encoding.eot_token, *encoding.encode_ordinary(document))]
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"cannot read text={path} ({error}); name a .jsonl file with a text in each line, or a .txt file")
    if len(ids) < block_size:
        fail(f"{path} has {len(ids)} tokens, less than a window of {block_size}; give it more text")
    return torch.tensor(ids[:len(ids) // block_size * block_size]).view(-1, block_size)


def read_dataset(cfg, data, model_cfg):
    """The validation windows of the shards (N, block_size) and training tokens (n,), the first of each shard."""
    try:
        folder = prepare_fineweb.find_dataset(cfg.dataset)
        if prepare_fineweb.read_meta(folder)["tokenizer"] != data["tokenizer"]:
            fail(f"dataset={cfg.dataset} has another tokenizer than the checkpoint; name the one it was trained on")
        paths = prepare_fineweb.find_shards(folder, "train")
        shards = [prepare_fineweb.read_shard(path)[:TRAINING_TOKENS // len(paths)].astype("int64") for path in paths]
        held_out = train.Windows(folder, "val", model_cfg, data["vocab_size"])
    except ValueError as error:
        fail(error)
    return torch.stack([held_out[i][0] for i in range(len(held_out))]), torch.from_numpy(np.concatenate(shards))


def open_val(dataset, checkpoint, cfg, kind=train.Windows):
    """The validation windows, or examples, of shards in the tokens of a checkpoint's content; ends the program if they are not."""
    try:
        folder = prepare_fineweb.find_dataset(dataset)
        if prepare_fineweb.read_meta(folder)["tokenizer"] != checkpoint["data"]["tokenizer"]:
            fail(f"dataset={dataset} has another tokenizer than the checkpoint; name one in its tokens")
        return kind(folder, "val", cfg, checkpoint["data"]["vocab_size"])
    except ValueError as error:
        fail(error)


def open_network(place):
    """The content of a checkpoint; ends the program if there is none."""
    return sample.open_checkpoint(sample.Config(checkpoint=place))[1]


def open_twin(name, place, checkpoint, device):
    """The twin of a checkpoint, None for no place; ends the program if it was made for other tokens or shorter windows."""
    if not place:
        return None
    from twins import load_twin
    try:
        twin, content = load_twin(place, device=device)
    except ValueError as error:
        fail(error)
    if (content["kind"] == "masked") != (name == "masked"):
        fail(f"{name}={place} is a twin of kind={content['kind']}; name the {'masked' if name == 'masked' else 'autoregressive'} one")
    if content["data"]["tokenizer"] != checkpoint["data"]["tokenizer"]:
        fail(f"{name}={place} has another tokenizer than the checkpoint; train both on the same dataset")
    size, needed = content["config"]["block_size"], checkpoint["config"]["block_size"]
    if size < needed:
        fail(f"{name}={place} has windows of {size} tokens, shorter than the checkpoint's {needed}; train it with those")
    return twin


def open_bench(cfg):
    """The Bench that the settings name, and the checkpoint's path and content; ends the program if something does not fit."""
    try:
        found, device = find_checkpoint(cfg.checkpoint), choose_device(cfg.device)
    except ValueError as error:
        fail(error)
    path, checkpoint = found or fail(f"no checkpoint at {cfg.checkpoint}; train one, or name another with --checkpoint")
    model, encoding = load_model(checkpoint, device), prepare_fineweb.get_tokenizer(checkpoint["data"]["tokenizer"])
    T = model.cfg.block_size
    try:                                        # before anything is computed: one step in all, or one for each span
        for steps, span in [(each, 0) for each in numbers(cfg.steps, int)] + [(cfg.condition_steps, -1)]:
            sample.plan(sample.Config(steps=steps, span_size=span), model.cfg, torch.zeros(T, dtype=torch.bool))
    except ValueError as error:
        fail(error)
    if T < max(4, cfg.blank + 2):
        fail(f"blank={cfg.blank} and 4-grams do not fit into the windows of this checkpoint, {T} tokens; choose another")
    windows, training = None, torch.empty(0, dtype=torch.int64)
    if cfg.dataset:
        windows, training = read_dataset(cfg, checkpoint["data"], model.cfg)
    if cfg.text:
        windows = read_windows(cfg.text, encoding, T)
    for name, needed in (("samples", 2 * cfg.samples), ("pairs", cfg.pairs)):
        if len(windows) < needed:
            fail(f"{name}={getattr(cfg, name)} needs {needed} held-out windows and there are {len(windows)}; lower it")
    judge, *twins = (open_twin(name, getattr(cfg, name), checkpoint, device) for name in ("judge", "masked", "causal"))
    twins = {name: twin for name, twin in zip(("masked", "causal"), twins, strict=True) if twin}
    return Bench(model, encoding, windows, training, judge, twins, device), path, checkpoint


def shuffled(windows, seed):
    """The windows in random order, so that neighbours are of different documents."""
    return windows[torch.randperm(len(windows), generator=generator("cpu", seed, "order of the windows"))]


@torch.no_grad()
def in_batches(f, batch_size, device, *inputs):
    """f(*inputs) for inputs (N, ...), so many rows at a time, on the CPU."""
    parts = zip(*(x.split(batch_size) for x in inputs), strict=True)
    return torch.cat([f(*(x.to(device) for x in part)).cpu() for part in parts])


def mean(name, x):
    """The mean of independent values (N,) and its standard error, under this name."""
    x = x.double()
    return {name: x.mean().item(), f"{name}_error": (x.std() / len(x) ** 0.5).item()}


def timed(labels, make):
    """make(), and a line of progress with the seconds that it took."""
    started = time.perf_counter()
    made = make()
    what = ", ".join(value if isinstance(value, str) else f"{name} {value:g}" for name, value in labels.items())
    sample.say(f"{what}: {time.perf_counter() - started:.1f} s")
    return made


def show(rows, columns):
    """Print rows aligned; columns are "name:format" with blanks between, an error is titled +-, what is not known is a -."""
    columns = [column.split(":") for column in columns.split()]
    lines = [["+-" if name.endswith("_error") else name.replace("_", " ") for name, _ in columns]]
    lines += [["-" if row.get(name) is None else format(row[name], form) for name, form in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]), flush=True)


# ---- writing ----

def write(model, idx, known, prompts, steps, seed, batch_size, **settings):
    """Texts (N, T) that keep idx (N, T) where known (T,) and follow the prompts (N, P); row i's noise is of (seed, i)."""
    cfg, made = sample.Config(seed=seed, steps=steps, **settings), []
    for rows in torch.arange(len(idx)).split(batch_size):
        made.append(sample.sample(model, cfg, (idx[rows], known, prompts[rows]), rows.tolist()).cpu())
    return torch.cat(made)


def draw(model, n, steps, span, temperature, eta, seed, batch_size=32, streams=1):
    """Unconditional samples: (n, block_size)."""
    idx = torch.zeros(n, model.cfg.block_size, dtype=torch.int64)
    return write(model, idx, idx[0].bool(), idx[:, :0], steps, seed, batch_size, span_size=span, streams=streams,
                 temperature=temperature, eta=eta)


def continue_prompts(model, prompts, inside, steps, guidance, seed, batch_size=32):
    """One continuation of each prompt (N, P), at sample.py's temperature, to fill a window: (N, block_size - P). The last
    `inside` tokens of the prompt stand in the window, those before them are seen by cross-attention."""
    N, P = prompts.shape
    idx = torch.zeros(N, model.cfg.block_size - P + inside, dtype=torch.int64)
    idx[:, :inside] = prompts[:, P - inside:]
    known = torch.arange(idx.size(1)) < inside
    made = write(model, idx, known, prompts[:, :P - inside], steps, seed, batch_size, guidance_scale=guidance)
    return made[:, inside:]


def fill(model, idx, known, steps, seed, batch_size=32, eta=1.0):
    """idx (N, T) with what is not known (T,) filled in at sample.py's temperature: (N, T)."""
    return write(model, idx, known, idx[:, :0], steps, seed, batch_size, mode="infill", eta=eta)


def draw_twin(twin, n, length, steps, temperature, seed, batch_size, streams=0):
    """Samples of a twin (n, length), all of one generator."""
    rng = generator("cpu", seed, "twin", steps, temperature)
    parts = torch.arange(n).split(batch_size)
    return torch.cat([twin.sample(len(part), length, steps, temperature, rng, streams).cpu() for part in parts])


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
    """Entropy in nats of the tokens of each text (N, T), from their frequencies in that text alone: (N,), at most log T."""
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


def words(tokens, encoding):
    """The words of tokens (T,), in lower case; an end-of-text is none."""
    text = encoding.decode(tokens.tolist()).replace(encoding.decode([encoding.eot_token]), "\n")
    return re.findall(r"[A-Za-z']+", text.lower())


def share_of_words(tokens, encoding, dictionary):
    """Share of the words of texts (N, T) that are in a set; None if the set is empty or there is no word."""
    found = [word in dictionary for row in tokens for word in words(row, encoding)] if dictionary else []
    return sum(found) / len(found) if found else None


def mauve(features, reference):
    """MAUVE of two sets of features (N, n_embd): 1 if they are alike, towards 0 if not."""
    from mauve import compute_mauve
    pair = dict(p_features=reference.float().numpy(), q_features=features.float().numpy())
    return float(compute_mauve(**pair, num_buckets=max(2, len(features) // 10), verbose=False).mauve)


def score(tokens, judge=None, encoding=None, dictionary=None, reference=None, batch_size=32, device="cpu"):
    """The columns of the sample table for texts (N, T); `reference` (N, n_embd) is the judge's features of real text."""
    row = {"entropy": entropy(tokens).mean().item(), **{f"distinct-{n}": distinct(tokens, n) for n in (1, 2, 4)},
           "repeated": repetition(tokens), "words": share_of_words(tokens, encoding, dictionary)}
    if judge:
        row |= mean("nats", in_batches(judge.nll, batch_size, device, tokens).mean(1))
        row["perplexity"] = math.exp(row["nats"])
    if reference is not None:
        row["MAUVE"] = mauve(in_batches(judge.features, batch_size, device, tokens), reference)
    return row


# ---- the sections: each prints its table and returns its numbers ----

def likelihood(cfg, bench):
    windows, model, eot = bench.windows, bench.model, bench.encoding.eot_token
    idx = windows[torch.arange(cfg.sequences) * len(windows) // cfg.sequences]
    text = sum(len(bench.encoding.decode_bytes([i for i in row if i != eot])) for row in windows.tolist())
    row = {"unigram": -model.log_unigram.cpu()[windows].mean().item(), "windows": len(windows), "pairs": cfg.sequences,
           "bytes_per_token": text / windows.numel(),
           **train.measure(model, idx.to(bench.device), cfg.batch_size, bands=16, curve=256), "by_span": []}
    for size, n in [(size, 1) for size in numbers(cfg.spans, int)] + [(1, n) for n in numbers(cfg.streams, int) or []]:
        found = timed({"what": "bound", "span": size, "streams": n}, lambda size=size, n=n: train.measure(
            model, idx.to(bench.device), cfg.batch_size, size, streams=n, bands=0))
        if size == 1 and "masked" in bench.twins:
            nll = in_batches(partial(bench.twins["masked"].nll_in_streams, n=n), cfg.batch_size, bench.device, idx)
            found |= mean("masked_twin", nll.mean(1))
        row["by_span"].append({"span": size, "streams": n, **found})
    row["bits_per_byte"] = row["bound"] / math.log(2) / row["bytes_per_token"]
    row["perplexity"], row["unigram_perplexity"] = math.exp(row["bound"]), math.exp(row["unigram"])
    print("1. LIKELIHOOD: the bound is at least the text's cross-entropy; unigram is that of token frequencies alone.\n"
          "bound {bound:.3f} +- {bound_error:.3f} nats a token = reconstruction {reconstruction:.4f} + diffusion {diffusion:.3f} "
          "+ prior {prior:.4f}\nperplexity {perplexity:.2f}, {bits_per_byte:.4f} bits a byte; unigram cross-entropy "
          "{unigram:.3f}, perplexity {unigram_perplexity:.2f}".format(**row))
    for name, twin in bench.twins.items():
        from twins import evaluate
        row[f"{name}_twin"] = evaluate(twin, idx.to(bench.device), cfg)
        print("{} twin {:.3f} +- {:.3f} nats a token, {}".format(name, *row[f"{name}_twin"], "a bound" if name == "masked" else "exact"))
    print("\nThe bound of writing so many tokens together, from left to right (0: all at once), in all timesteps, a single token in "
          "one step.\nSo many streams: as many parts of the text side by side, a token of each in a step. The one above is of sample.py's way.")
    show(row["by_span"], "span:d streams:d bound:.3f bound_error:.3f masked_twin:.3f masked_twin_error:.3f")
    print("\nCross-entropy in nats a token by noise, of index t: the network's, and the best without context.")
    curve = [dict(zip(("t", "network", "without_context"), values, strict=True)) for values in row["ce_by_noise"]]
    show(curve, "t:d network:.3f without_context:.3f")
    return row


def systems(cfg, bench, real):
    """All that the sample table has a row for: (its labels, a function that returns texts (samples, T))."""
    n, T = real.shape
    tokens, temperatures = bench.training if len(bench.training) else bench.windows.flatten(), numbers(cfg.temperatures, float)
    same = cfg.judge and cfg.causal and Path(cfg.judge).resolve() == Path(cfg.causal).resolve()
    yield {"text": "held-out text"}, lambda: real
    yield {"text": "unigram floor"}, partial(draw_unigram, tokens, n, T, cfg.seed)
    yield {"text": "bigram floor"}, partial(draw_bigram, tokens, n, T, cfg.seed)
    grid = [{"steps": steps, "temperature": temperature} for steps in numbers(cfg.steps, int) for temperature in temperatures]
    ours = [{**labels, "span": span, "eta": eta} for span in numbers(cfg.spans, int) for eta in numbers(cfg.eta, float)
            for labels in grid if -(-T // (span or T)) <= labels["steps"]]
    ours += [{"steps": max(FAR, -(-T // n)), "temperature": temperature, "span": 1, "streams": n, "eta": 1.0} for n in numbers(cfg.streams, int) or []
             for temperature in temperatures]
    for labels in ours:
        yield {"text": "SunFish", **labels}, partial(draw, bench.model, n, seed=cfg.seed, batch_size=cfg.batch_size, **labels)
    for name, twin in bench.twins.items():
        streams = [{key: labels[key] for key in ("steps", "temperature", "streams")} for labels in ours if "streams" in labels]
        for labels in grid + streams if name == "masked" else [{"steps": T, "temperature": each} for each in temperatures]:
            make = partial(draw_twin, twin, n, T, seed=cfg.seed, batch_size=cfg.batch_size, **labels)
            yield {"text": f"{name} twin" + ", the judge" * bool(same and name == "causal"), **labels}, make


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
    return in_batches(bench.judge.features, cfg.batch_size, bench.device, windows)


def samples(cfg, bench):
    print(f"\n2. SAMPLES: {cfg.samples} texts a row, each of {bench.windows.size(1)} tokens, without a prompt.\n"
          "perplexity: exp of the judge's mean nats a token. entropy: of the tokens within a text, in nats, mean over texts.\n"
          "distinct-n: different n-grams / all n-grams of the row. repeated: share of 4-grams that stood before in the text.\n"
          "words: share of words that occur in the training text. MAUVE: likeness to other held-out text, at most 1.")
    windows, rows = shuffled(bench.windows, cfg.seed), []
    dictionary = set(words(bench.training, bench.encoding))
    reference = reference_features(cfg, bench, windows[cfg.samples:2 * cfg.samples])
    for labels, make in systems(cfg, bench, windows[:cfg.samples]):
        scores = score(timed(labels, make), bench.judge, bench.encoding, dictionary, reference, cfg.batch_size, bench.device)
        rows.append({**labels, **scores})
    show(rows, "text: steps:d span:d streams:d temperature:g eta:g perplexity:,.1f entropy:.3f distinct-1:.3f distinct-2:.3f distinct-4:.3f "
               "repeated:.3f words:.3f MAUVE:.3f")
    return rows


def adherence(judge, prompts, continuations, batch_size=32, device="cpu"):
    """The judge's nats a token of continuations (N, T) after their prompts (N, P), after another's, and the difference."""
    def nats(prompts):
        both = torch.cat((prompts, continuations), 1)
        return in_batches(judge.nll, batch_size, device, both)[:, prompts.size(1):].mean(1)
    own, other = nats(prompts), nats(prompts.roll(1, 0))
    return {**mean("own", own), "other": other.mean().item(), **mean("adherence", other - own)}


def prompting(cfg, bench):
    model, windows, usual = bench.model, shuffled(bench.windows, cfg.seed)[:cfg.pairs], sample.Config
    P = max(1, min(model.cfg.prompt_size, model.cfg.block_size) // 2)
    prompts, rest = windows[:, :P], (cfg.seed, cfg.batch_size)
    free = partial(draw, model, cfg.pairs, cfg.condition_steps, -1, usual.temperature, usual.eta, *rest)
    makers = {"held-out text": lambda: windows[:, P:], "SunFish, no prompt": lambda: free()[:, :-P]}
    for place, inside in (("in the window", P), ("half before it", P - P // 2), ("before it", 0)):
        for scale in numbers(cfg.guidance, float):
            makers[f"{place}, guidance {scale:g}"] = partial(continue_prompts, model, prompts, inside, cfg.condition_steps, scale, *rest)
    rows = []
    for name, make in makers.items():
        made = timed({"continuation": name}, make)
        rows.append({"continuation": name, **adherence(bench.judge, prompts, made, cfg.batch_size, bench.device),
                     "entropy": entropy(made).mean().item()})
    print(f"\n3. PROMPTS: {cfg.pairs} held-out prompts of {P} tokens, continued by {made.size(1)}.\n"
          "own, other: the judge's nats a token of the continuation after its own prompt, and after another text's.\n"
          "adherence: the difference, paired, and its standard error; 0 is chance. entropy: within a continuation, in nats.\n"
          "A prompt stands in the window that is written, or before it, where only cross-attention sees it.")
    show(rows, "continuation: own:.3f own_error:.3f other:.3f adherence:.3f adherence_error:.3f entropy:.3f")
    return rows


def blanks(cfg, bench):
    idx, start = shuffled(bench.windows, cfg.seed)[:cfg.pairs], (bench.windows.size(1) - cfg.blank) // 2
    place = torch.arange(idx.size(1))
    known = (place < start) | (place >= start + cfg.blank)
    make = partial(fill, bench.model, idx, known, 0, cfg.seed, cfg.batch_size)
    texts = {"true span": idx, "SunFish's span": timed({"what": "blanks"}, make),
             "another text's span": torch.where(known, idx, idx.roll(1, 0))}
    nats = {name: in_batches(bench.judge.nll, cfg.batch_size, bench.device, text).mean(1) for name, text in texts.items()}
    rows = [{"window_with": name, **mean("nats", x), **mean("worse", x - nats["true span"])} for name, x in nats.items()]
    print(f"\n4. BLANKS: {cfg.blank} tokens in the middle of {cfg.pairs} held-out windows.\n"
          "nats: the judge's, a token of the whole window. worse: than with the true span, paired, and its standard error.")
    show(rows, "window_with: nats:.4f nats_error:.4f worse:.4f worse_error:.4f")
    return rows


def single_tokens(cfg, bench):
    idx, place = shuffled(bench.windows, cfg.seed)[:cfg.pairs], torch.arange(bench.windows.size(1))
    rows = torch.arange(len(idx)).chunk(16)                     # those of a chunk have their blank in one place
    blank = torch.randint(1, len(place) - 1, (len(rows),), generator=generator("cpu", cfg.seed, "blanked token"))
    hidden = torch.cat([(place == at).expand(len(part), -1) for at, part in zip(blank, rows, strict=True)])
    guesses = {"commonest token": torch.full_like(idx, bench.model.log_unigram.argmax().item())}
    for name, steps in (("SunFish, 1 step", 1), ("SunFish, a sample", 0)):
        guesses[name] = timed({"what": "single tokens", "steps": steps}, lambda steps=steps: torch.cat([
            fill(bench.model, idx[part], place != at, steps, cfg.seed, cfg.batch_size, eta=0.0 if steps == 1 else 1.0)
            for at, part in zip(blank, rows, strict=True)]))
    for name, twin in bench.twins.items():
        guess = partial(lambda twin, *inputs: twin.predict(*inputs).argmax(-1), twin)
        guesses[f"{name} twin"] = in_batches(guess, cfg.batch_size, bench.device, idx, hidden)
    rows = [{"guessed_by": name, **mean("recovered", (guess == idx)[hidden])} for name, guess in guesses.items()]
    print(f"\n5. SINGLE TOKENS: one blanked in each of {cfg.pairs} held-out windows; the share that is guessed.\n"
          "One step and the twins give the likeliest token, more steps a sample; the causal twin sees what stands before.")
    show(rows, "guessed_by: recovered:.3f recovered_error:.3f")
    return rows


def picture(rows, path):
    """Perplexity under the judge against entropy: a line through the temperatures of each system, as a PNG."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        return sample.say(f"no picture, because matplotlib is not there ({error}): pip install matplotlib")
    lines = {}
    for row in rows:
        name = row["text"] + "".join(f", {key} {row[key]:g}" for key in ("steps", "span", "streams", "eta") if key in row)
        lines.setdefault((row["text"], name), []).append((row["entropy"], row["perplexity"]))
    figure, axes = pyplot.subplots(figsize=(9, 6))
    axes.set_prop_cycle(color=pyplot.cm.tab20.colors)
    for (text, name), points in lines.items():
        style = {"held-out text": "k*", "unigram floor": "kx", "bigram floor": "rx", "masked twin": "s--", "causal twin": "kd:"}
        axes.plot(*zip(*points, strict=True), style.get(text.removesuffix(", the judge"), "o-"), label=name)
    axes.set(yscale="log", xlabel="entropy of the tokens within a text, nats", ylabel="perplexity under the judge")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def main(cfg):
    keep_memory()
    bench, path, checkpoint = open_bench(cfg)
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"out={cfg.out} cannot be a folder ({error.strerror}); name another")
    print(f"{path}, step {checkpoint['step']:,}, on {len(bench.windows):,} windows of {bench.windows.size(1)} tokens of "
          f"{cfg.text or f'the validation split of {cfg.dataset}'}\n")
    result = {"checkpoint": str(path), "step": checkpoint["step"], "settings": asdict(cfg)}
    sections = [likelihood, *[samples] * bool(cfg.samples), *[prompting, blanks] * bool(cfg.pairs and bench.judge),
                *[single_tokens] * bool(cfg.pairs)]
    for section in sections:
        result[section.__name__] = section(cfg, bench)
        if cfg.out:                                             # after each, so that a run that is stopped leaves what it had
            (Path(cfg.out) / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    if cfg.pairs and not bench.judge:
        print("\nThere is no --judge, so prompts (3) and blanks (4) are left out.")
    if cfg.out and cfg.samples and bench.judge:
        picture(result["samples"], Path(cfg.out) / "frontier.png")


if __name__ == "__main__":
    main(CFG)
