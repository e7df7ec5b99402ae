"""
Train SunFish: pre-tokenized shards in, checkpoints and a log out.

    python train.py config/tiny.py                          # minutes on a laptop, on text that Python brings along
    python train.py config/micro.py --device=cpu            # 41.6M parameters
    torchrun --nproc_per_node=8 train.py config/full.py     # 1.4B parameters

The data order and all noise are functions of (seed, step, index of the sample in its step), so a run that stops at a
checkpoint and resumes is the run that never stopped, and nothing but the step number has to be remembered.
"""
from dataclasses import dataclass

from configurator import ModelConfig, describe, fail, load


@dataclass(frozen=True)
class Config(ModelConfig):
    # data and output
    dataset: str = "fineweb,pydoc"       # folder, or name under data/; of several the first that is prepared
    out_dir: str = "out/sunfish"         # checkpoints and log.jsonl go here
    resume: bool = False                 # continue from the newest checkpoint in out_dir
    # the optimizer step
    batch_size: int = 8                  # sequences on a device at a time
    batch_tokens: int = 65_536           # tokens in an optimizer step; gradient accumulation follows from it
    max_steps: int = 10_000              # optimizer steps
    learning_rate: float = 1e-3          # peak; cosine to zero after the warm-up
    warmup_steps: int = 200              # steps of linear warm-up
    weight_decay: float = 0.01           # on the matrices of the trunk only; 0 is off
    grad_clip: float = 1.0               # largest norm of the gradient; 0 is off
    ema_decay: float = 0.999             # averaging of the weights that sample; 0 is off
    # what is noised
    p_independent: float = 0.33          # share of sequences in which every token has a noise level of its own
    p_given: float = 0.33                # share in which a prefix, spans or single tokens are given
    self_conditioning: float = 0.5       # share that sees a first guess of x_0; 0 is off
    conditioning_dropout: float = 0.1    # share of prompts withheld, for guidance; 1 trains without prompts
    # machine
    seed: int = 1                        # of weights, data order and noise
    device: str = "auto"                 # auto, cpu, cuda, cuda:1
    dtype: str = "auto"                  # auto, float32, bfloat16: of the trunk's matrix products
    compile: str = "auto"                # auto, true, false: torch.compile
    activation_checkpointing: bool = False   # recompute the blocks in the backward pass: less memory, more time
    dry_run: bool = False                # print sizes, batch and memory, then stop
    # log
    log_interval: int = 10               # steps between log lines
    eval_interval: int = 500             # steps between evaluations; 0 is off
    eval_sequences: int = 256            # sequences for the bound at an evaluation
    save_interval: int = 500             # steps between checkpoints; the last two are kept
    keep_interval: int = 0               # steps between checkpoints kept for good; 0 is off
    guidance_scale: float = 2.0          # of the prompted sample at an evaluation
    wandb_log: bool = False              # also log to Weights & Biases
    wandb_project: str = "sunfish"       # its project

    def check(self):
        """Raise ValueError, in one line that says what to do, for settings that cannot work."""
        super().check()
        for names, low, high in (
                ("batch_size batch_tokens max_steps log_interval save_interval eval_sequences", 1, 1e18),
                ("warmup_steps weight_decay grad_clip eval_interval keep_interval", 0, 1e18),
                ("p_independent p_given self_conditioning conditioning_dropout ema_decay", 0, 1),
                ("learning_rate", 1e-12, 1e3)):
            for name in names.split():
                if not low <= getattr(self, name) <= high:
                    raise ValueError(f"{name}={getattr(self, name)} is out of range; choose {low:g} to {high:g}")
        if self.p_independent + self.p_given > 1:
            raise ValueError(f"p_independent={self.p_independent} and p_given={self.p_given} add up to more than 1; "
                             "lower one of them")
        for name, known in (("dtype", "auto float32 bfloat16"), ("compile", "auto true false")):
            if getattr(self, name) not in known.split():
                raise ValueError(f"{name}={getattr(self, name)} is unknown; use one of {known}")
        batch = self.batch_size * self.block_size
        if self.batch_tokens % batch:
            near = max(1, round(self.batch_tokens / batch)) * batch
            raise ValueError(f"batch_tokens={self.batch_tokens:,} is not a multiple of {batch:,} (batch_size * "
                             f"block_size); try {near:,}")

    @property
    def samples(self):
        """Sequences in an optimizer step."""
        return self.batch_tokens // self.block_size


if __name__ == "__main__":
    CFG = load(Config)      # before torch is imported, so that --help and a wrong setting answer at once

import copy                 # noqa: E402
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

import diffusion
from diffusion import generator, mix
from model import SunFish, choose_device, find_checkpoint, flops_per_token, has_bf16, keep_memory, peak_flops
from prepare_fineweb import find_dataset, find_shards, get_tokenizer, read_meta, read_shard

SCHEDULE_RATE = 3e-3        # learning rate of the fitted schedule's three scalars


# ---- data: every batch is a function of (seed, step, index of the sample) ----

def permute(i, n, key):
    """The place of i in a random order of 0 .. n - 1, without storing the order: a Feistel network, walked into range."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = i >> half, i & ((1 << half) - 1)
        for turn in range(4):
            left, right = right, left ^ (mix(key, turn, right) & ((1 << half) - 1))
        i = left << half | right
        if i < n:
            return i


class Windows:
    """Windows of block_size tokens over the shards of one split, each with the tokens that stand before it."""

    def __init__(self, folder, split, cfg, vocab_size):
        self.paths = find_shards(folder, split)
        self.shards = [read_shard(path) for path in self.paths]
        self.cfg, self.vocab_size = cfg, vocab_size
        self.ends = np.cumsum([len(shard) // cfg.block_size for shard in self.shards])
        if self.ends[-1] == 0:
            raise ValueError(f"{folder}: no {split} shard holds a window of block_size={cfg.block_size} tokens; "
                             "prepare more text or lower block_size")

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        """Window i as (ids (block_size,), the ids before it (at most prompt_size,)), both int64."""
        k = int(np.searchsorted(self.ends, i, side="right"))
        start = (i - (int(self.ends[k - 1]) if k else 0)) * self.cfg.block_size
        before = max(0, start - self.cfg.prompt_size)
        ids = self.shards[k][before:start + self.cfg.block_size].astype(np.int64)
        if ids.max() >= self.vocab_size:
            at = int((ids >= self.vocab_size).argmax())
            fail(f"{self.paths[k]}: id {ids[at]} at token {before + at} is not below the vocabulary of "
                 f"{self.vocab_size}; these shards were made with another tokenizer, prepare them again")
        ids = torch.from_numpy(ids)
        return ids[start - before:], ids[:start - before]

    def unigram(self, tokens=20_000_000):
        """log frequency of every id among the first tokens of each shard: (vocab_size,) float32."""
        some = (shard[:tokens // len(self.shards)] for shard in self.shards)
        count = 0.5 + sum(np.bincount(ids, minlength=self.vocab_size)[:self.vocab_size] for ids in some)
        return torch.from_numpy(np.log(count / count.sum())).float()


def open_data(cfg):
    """What a checkpoint keeps of the dataset, and its training and validation windows."""
    try:
        folder = find_dataset(cfg.dataset)
        meta = read_meta(folder)
        splits = (Windows(folder, split, cfg, meta["vocab_size"]) for split in ("train", "val"))
        return {key: meta[key] for key in ("label", "fingerprint", "tokenizer", "vocab_size")}, *splits
    except ValueError as error:
        fail(error)


class Batch(NamedTuple):
    idx: torch.Tensor              # (B, T) int64 tokens
    t: torch.Tensor                # (B, T) int64 diffusion index of each, 0 where it is given
    eps: torch.Tensor              # (B, T, C) noise
    prompt: torch.Tensor           # (B, P) int64 tokens before the window, at the right end
    prompt_mask: torch.Tensor      # (B, P) True where the network may see them
    common: torch.Tensor           # (B,) True where all tokens share one noise level: these fit the schedule
    guesses: int                   # the first so many sequences get a first guess of x_0 (self-conditioning)


def choose_given(T, rng):
    """Which of T tokens are given: a prefix, all but some spans, or single tokens, of any number: (T,) bool."""
    kind, share = torch.rand(2, generator=rng).tolist()
    if kind < 1 / 3:
        return torch.arange(T) < int(share * T)
    if kind < 2 / 3:
        spans = int(torch.randint(1, 9, (), generator=rng))
        holes = torch.randint(T, (spans,), generator=rng)[:, None]
        length = (torch.rand(spans, 1, generator=rng) * 2 * share * T / spans).long() + 1
        place = torch.arange(T)
        return ~((place >= holes) & (place < holes + length)).any(0)
    given = torch.rand(T, generator=rng) < share
    given[torch.randint(T, (), generator=rng)] = False           # one at least is left to guess
    return given


def noise_levels(cfg, step, i, rng):
    """The diffusion index of each token of sample i: (T,) int64, 0 where given; and whether all share one level.

    The common level is stratified over the samples of a step: each takes its own n-th part of 0 .. 1, in random order.
    """
    T, n = cfg.block_size, cfg.samples
    common = (permute(i, n, mix(cfg.seed, step)) + mix(cfg.seed, step, "offset") / 2 ** 64) / n
    kind, own = torch.rand((), generator=rng).item(), torch.rand(T, generator=rng, dtype=torch.float64)
    u = own if kind < cfg.p_independent else torch.full((T,), common, dtype=torch.float64)
    t = 1 + (u * cfg.timesteps).long().clamp(max=cfg.timesteps - 1)
    if cfg.p_independent <= kind < cfg.p_independent + cfg.p_given:
        t = torch.where(choose_given(T, rng), 0, t)
    return t, kind >= cfg.p_independent + cfg.p_given


def make_sample(cfg, windows, step, i, device):
    """Sample i of an optimizer step: idx, t, eps, prompt, prompt_mask and common of a Batch, without the leading B."""
    T, P = cfg.block_size, cfg.prompt_size
    epoch, place = divmod(step * cfg.samples + i, len(windows))
    idx, before = windows[permute(place, len(windows), mix(cfg.seed, epoch))]
    rng = generator("cpu", cfg.seed, step, i)
    t, common = noise_levels(cfg, step, i, rng)
    drop, share = torch.rand(2, generator=rng).tolist()
    visible = 0 if drop < cfg.conditioning_dropout else min(len(before), 1 + int(share * P))
    prompt = F.pad(before, (P - len(before), 0))
    eps = torch.randn(T, cfg.token_dim, generator=generator(device, cfg.seed, step, i, "eps"), device=device)
    return idx, t, eps, prompt, torch.arange(P) >= P - visible, torch.tensor(common)


def make_batch(cfg, windows, step, samples, device):
    """Samples (indices within the step) as one Batch on the device, those with a first guess in front."""
    guess = {i for i in samples if int((i + 1) * cfg.self_conditioning) > int(i * cfg.self_conditioning)}
    made = [make_sample(cfg, windows, step, i, device) for i in sorted(samples, key=lambda i: (i not in guess, i))]
    fields = (torch.stack(field).to(device, non_blocking=True) for field in zip(*made, strict=True))
    return Batch(*fields, len(guess))


# ---- the loss ----

class DenoisingLoss(nn.Module):
    """Batch -> loss of every token (B, T) and distance of every sequence from the fitted schedule (B,).

    One module around all that touches the weights, so that compilation and distribution wrap a single call.
    """

    def __init__(self, net, cfg):
        super().__init__()
        self.net, self.cfg = net, cfg

    def forward(self, batch):
        net, cfg = self.net, self.cfg
        table = net.embedding()                                                           # (V, C)
        x_0 = table[batch.idx].detach() if cfg.objective == "eps" else table[batch.idx]   # (B, T, C)
        alpha_bar = diffusion.make_schedule(cfg, net.schedule.detach())
        x_t = diffusion.add_noise(x_0, batch.t, alpha_bar, batch.eps)
        log_snr = diffusion.log_snr(batch.t, alpha_bar)                                   # (B, T)
        x_prev = self.first_guess(x_t, log_snr, batch, table)
        output = net(x_t, log_snr, x_prev, batch.prompt, batch.prompt_mask)
        loss = diffusion.eps_loss(output, batch.eps) if cfg.objective == "eps" else diffusion.ce_loss(output, batch.idx)
        if cfg.schedule != "gumbel" or cfg.objective == "eps":
            return loss, torch.zeros_like(loss[:, 0])
        mu, log_beta, log_height = net.schedule
        level = torch.where(batch.common, log_snr[:, 0], 0)        # a given token's is infinite
        fit = diffusion.schedule_loss(loss.detach().mean(1), level, mu, log_beta.exp(), log_height.exp(),
                                      math.sqrt(cfg.token_dim))
        return loss, torch.where(batch.common, fit, 0)

    @torch.no_grad()
    def first_guess(self, x_t, log_snr, batch, table):
        """x_0_hat of a first pass for the first batch.guesses sequences, zeros for the others; with objective eps for
        all, as in the origin design, whose guess of x_0 grows without limit at high noise."""
        n, x_prev = batch.guesses, torch.zeros_like(x_t)
        if n and self.cfg.objective == "ce":
            inputs = x_t[:n], log_snr[:n]
            output = self.net(*inputs, x_prev[:n], batch.prompt[:n], batch.prompt_mask[:n])
            x_prev[:n] = diffusion.make_read(self.cfg, table, self.net.vocab_size)(output, *inputs)[0]
        return x_prev


def make_optimizer(model, cfg):
    """AdamW in three groups, to be set by set_learning_rate: matrices, the rest, the schedule's scalars."""
    named = dict(model.named_parameters())
    matrix = {n for n, p in named.items() if n.endswith(".weight") and p.ndim == 2}
    groups = [dict(params=[p for n, p in named.items() if n in matrix]),
              dict(params=[p for n, p in named.items() if n not in matrix and n != "schedule"]),
              dict(params=[model.schedule])]
    assert sum(len(g["params"]) for g in groups) == len(named), f"groups do not cover all of {list(named)}"
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.99), fused=True)


def set_learning_rate(optimizer, cfg, step):
    """Linear warm-up, then a cosine to zero, and the weight decay, which a resumed run may change; returns the rate."""
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    factor = (step + 1) / cfg.warmup_steps if step < cfg.warmup_steps else 0.5 * (1 + math.cos(math.pi * done))
    settings = (cfg.learning_rate, cfg.weight_decay), (cfg.learning_rate, 0.0), (SCHEDULE_RATE, 0.0)
    for group, (peak, weight_decay) in zip(optimizer.param_groups, settings, strict=True):
        group.update(lr=peak * factor, weight_decay=weight_decay)
    return cfg.learning_rate * factor


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay * ema + (1 - decay) * model, with a shorter memory in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---- evaluation ----

def eval_windows(windows, n):
    """n windows spread evenly over the split, with repetition if it is smaller: (n, T)."""
    return torch.stack([windows[i * len(windows) // n][0] for i in range(n)])


@torch.no_grad()
def measure(model, idx, batch_size, bands=8, curve=32):
    """The bound of a network on sequences idx (N, T), and its cross-entropy by noise on `curve` of them, as a dict."""
    table, alpha_bar = model.embedding(), diffusion.make_schedule(model.cfg, model.schedule)
    predict = diffusion.two_pass(model, diffusion.make_read(model.cfg, table, model.vocab_size))
    free = partial(model.likelihood, E=table)
    some = idx[::-(-len(idx) // curve)]
    return {**diffusion.estimate_bound(predict, table, idx, alpha_bar, batch_size),
            "ce_by_noise": diffusion.ce_by_noise(predict, free, table, some, alpha_bar, batch_size, bands)}


@torch.no_grad()
def show_text(model, cfg, encoding, window):
    """A free sample, one prompted by the tokens before a validation window, and that window with a hole: (name, text)s."""
    idx, before = (part.to(model.table.device) for part in window)
    T = min(cfg.block_size, 64)
    idx, prompt = idx[:T].expand(3, T), before[-cfg.prompt_size:].expand(3, -1)
    known = torch.zeros(3, T, dtype=torch.bool, device=idx.device)
    known[2] = True
    known[2, T // 2:T // 2 + T // 8] = False
    mask = torch.zeros(prompt.shape, dtype=torch.bool, device=idx.device)
    mask[1] = True
    prompted = partial(model, prompt=prompt, prompt_mask=mask)
    rng = [generator(idx.device, "text", i) for i in range(3)]
    table, alpha_bar = model.embedding(), diffusion.make_schedule(cfg, model.schedule)
    read = diffusion.make_read(cfg, table, model.vocab_size, temperature=0.9)
    network = diffusion.guided(prompted, model, cfg.guidance_scale)
    tokens = diffusion.generate(network, read, table, alpha_bar, idx, known, steps=min(32, cfg.timesteps), rng=rng)

    def decode(ids):
        return " ".join(encoding.decode(ids.tolist()).split())
    hole = ~known[2]
    return [("sample", decode(tokens[0])),
            ("prompt", f"{decode(prompt[1])} >>> {decode(tokens[1])}"),
            ("infill", f"{decode(idx[2, :T // 2])} [{decode(tokens[2][hole])}] {decode(idx[2, T // 2 + T // 8:])}"
                       f" (truth: [{decode(idx[2][hole])}])")]


def evaluate(model, cfg, windows, encoding, device):
    """Print bound, cross-entropy by noise and text; return the numbers as a row for the log."""
    idx = eval_windows(windows, cfg.eval_sequences).to(device)
    row = measure(model, idx, cfg.batch_size)
    print("  bound {bound:.3f} +- {bound_error:.3f} nats a token (reconstruction {reconstruction:.3f}, diffusion "
          "{diffusion:.3f}, prior {prior:.3f})".format(**row))
    print("  t: network / context-free, nats: " + "  ".join(f"{t}: {a:.2f}/{b:.2f}" for t, a, b in row["ce_by_noise"]))
    row["text"] = show_text(model, cfg, encoding, windows[len(windows) // 2])
    for name, text in row["text"]:
        print(f"  {name}: {text}")
    return row


# ---- checkpoints ----

def save_checkpoint(cfg, step, data, model, ema, optimizer, wandb_id):
    """Write out_dir/ckpt_STEP.pt: plain types and tensors, complete or not at all; drop all but the last two."""
    path = Path(cfg.out_dir) / f"ckpt_{step:08d}.pt"
    content = dict(format=1, step=step, config=dataclasses.asdict(cfg), data=data, wandb_id=wandb_id,
                   model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:        # a full disk is a RuntimeError of torch.save
        temporary.unlink(missing_ok=True)
        size = sum(p.numel() for p in model.parameters()) * 16 / 1e9
        fail(f"could not write {path} ({error}); it needs about {size:.2f} GB, free some space and resume", code=1)
    for old in sorted(path.parent.glob("ckpt_*.pt"))[:-2]:
        if not cfg.keep_interval or int(old.stem[5:]) % cfg.keep_interval:
            old.unlink()
    return path


def check_resumable(cfg, data, checkpoint):
    """Refuse another network or other data than the checkpoint's; print what else differs."""
    before = checkpoint["config"]
    fixed = {f.name for f in dataclasses.fields(ModelConfig)} | {"seed", "batch_tokens"}     # network and data order
    changed = [name for name in before if name != "resume" and before[name] != getattr(cfg, name, before[name])]
    wrong = [f"{name}={getattr(cfg, name)} is {before[name]}" for name in changed if name in fixed]
    if wrong:
        fail(f"{', '.join(wrong)} in the checkpoint of {cfg.out_dir}; resume with that, or choose another --out_dir")
    for name in changed:
        print(f"resuming with {name}={getattr(cfg, name)}, was {before[name]}")
    if data["fingerprint"] != checkpoint["data"]["fingerprint"]:
        fail(f"the data is {data['label']} ({data['fingerprint']}), but the checkpoint in {cfg.out_dir} was trained on "
             f"{checkpoint['data']['label']} ({checkpoint['data']['fingerprint']}); resume with that --dataset")


# ---- machine ----

def choose_machine(cfg):
    """device, autocast dtype and whether to compile, each with the reason in the line that is printed."""
    try:
        device = choose_device(cfg.device)
    except ValueError as error:
        fail(error)
    on_gpu = device.type == "cuda"
    fast = has_bf16(device)
    if cfg.dtype == "bfloat16" and on_gpu and not fast:
        fail(f"dtype=bfloat16, but {torch.cuda.get_device_name(device)} has none; use --dtype=float32")
    dtype = (torch.bfloat16 if fast else torch.float32) if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    compiler = shutil.which(os.environ.get("CC", "gcc") if on_gpu else os.environ.get("CXX", "g++"))
    compiled = on_gpu and bool(compiler) if cfg.compile == "auto" else cfg.compile == "true"
    if compiled and not compiler:
        fail("compile=true, but there is no C++ compiler (gcc, g++); install one or use --compile=false")
    why_device = "asked for" if cfg.device != "auto" else "found" if on_gpu else "no CUDA device"
    why_dtype = "asked for" if cfg.dtype != "auto" else "the hardware has it" if fast else "no fast bfloat16 here"
    why_compile = "asked for" if cfg.compile != "auto" else "CUDA" if compiled else "no compiler" if on_gpu else \
        "true takes a minute, then is faster"
    print(f"device {device} ({why_device}), dtype {str(dtype)[6:]} ({why_dtype}), compile {compiled} ({why_compile})")
    return device, dtype, compiled


def dry_run(cfg, vocab_size=50_257):
    """Print what a run with GPT-2's vocabulary would be, from a model without memory."""
    with torch.device("meta"):
        model = SunFish(cfg, vocab_size)
    n, table = sum(p.numel() for p in model.parameters()), model.table.numel() + model.bias.numel()
    tokens = cfg.batch_size * cfg.block_size
    layers = 1 if cfg.activation_checkpointing else cfg.n_layer
    wide = 2 if cfg.dtype != "float32" else 4
    activations = tokens * (layers * 34 * cfg.n_embd * wide + cfg.n_layer * cfg.n_embd * 4)
    logits = tokens * model.table.size(0) * 4 * 3
    print(f"model: {cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}, token vectors {cfg.token_dim}, "
          f"vocabulary {vocab_size:,} (GPT-2), table {model.table.size(0):,} rows")
    print(f"parameters: {n:,} ({n / 1e6:.1f}M), {n - table:,} without the table")
    print(f"step: {describe_batch(cfg)}; {cfg.max_steps:,} steps, {cfg.max_steps * cfg.batch_tokens / 1e9:.2f}B tokens")
    print(f"memory, estimated: weights, gradients, AdamW and average {n * 20 / 1e9:.2f} GB, activations "
          f"{activations / 1e9:.2f} GB, logits {logits / 1e9:.2f} GB, in all "
          f"{(n * 20 + activations + logits) / 1e9:.2f} GB; a checkpoint {n * 16 / 1e9:.2f} GB")


def describe_batch(cfg):
    return (f"{cfg.batch_tokens:,} tokens = {cfg.batch_size} sequences x {cfg.block_size} tokens x "
            f"{cfg.samples // cfg.batch_size} accumulated")


# ---- the loop ----

class Log:
    """Rows to out_dir/log.jsonl, less those after step `start`, and, if asked, to Weights & Biases."""

    def __init__(self, cfg, start, wandb_id):
        path = Path(cfg.out_dir) / "log.jsonl"
        rows = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= start))
        self.file, self.run = open(path, "a", buffering=1), None
        if cfg.wandb_log:
            import wandb
            try:
                self.run = wandb.init(project=cfg.wandb_project, name=Path(cfg.out_dir).name, id=wandb_id,
                                      config=dataclasses.asdict(cfg), resume="allow")
            except wandb.errors.UsageError as error:
                fail(f"wandb_log=True, but {error}; run `wandb login` or set WANDB_MODE=offline")
        self.wandb_id = self.run.id if self.run else wandb_id

    def write(self, **row):
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:
            fail(f"cannot write {self.file.name} ({error.strerror}); free some space and resume", code=1)
        if self.run:
            import wandb
            numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
            text = {"text": wandb.Table(["kind", "text"], row["text"])} if "text" in row else {}
            self.run.log({**numbers, **text}, step=row["step"])


def train_step(model, cfg, windows, step, device, autocast):
    """Gradients of one optimizer step, accumulated; returns the mean loss of the noised tokens."""
    total = torch.zeros(2, device=device)
    for first in range(0, cfg.samples, cfg.batch_size):
        batch = make_batch(cfg, windows, step, range(first, first + cfg.batch_size), device)
        with autocast():
            loss, fit = model(batch)
        noised = batch.t > 0
        loss = torch.where(noised, loss, 0).sum()
        (loss / cfg.batch_tokens + fit.sum() / cfg.samples).backward()
        total += torch.stack((loss.detach(), noised.sum()))
    return (total[0] / total[1]).item()


def catch_signals():
    """A list that receives the first SIGINT or SIGTERM; the loop then saves and leaves. A second one leaves at once."""
    caught = []

    def note(number, frame):
        signal.signal(number, signal.SIG_DFL)
        caught.append(number)
        print(f"{signal.Signals(number).name}: finishing the step, then saving; again to leave at once", file=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


def main(cfg):
    if cfg.dry_run:
        return dry_run(cfg)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        fail(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but training on several processes is not there yet; start one, "
             "without torchrun")
    stopped = catch_signals()
    keep_memory()
    device, dtype, compiled = choose_machine(cfg)
    data, train_windows, val_windows = open_data(cfg)
    encoding, vocab_size = get_tokenizer(data["tokenizer"]), data["vocab_size"]

    checkpoint = open_out_dir(cfg)
    if checkpoint:
        check_resumable(cfg, data, checkpoint)
    start = checkpoint["step"] if checkpoint else 0
    log = Log(cfg, start, checkpoint and checkpoint["wandb_id"])

    torch.manual_seed(mix(cfg.seed, "weights"))     # hashed, or noise drawn with a plain seed would repeat them
    raw_model = SunFish(cfg, vocab_size, train_windows.unigram()).to(device)
    ema = copy.deepcopy(raw_model).requires_grad_(False)
    optimizer = make_optimizer(raw_model, cfg)
    if checkpoint:
        raw_model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    if cfg.activation_checkpointing:
        for block in raw_model.blocks:
            block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    loss_fn = DenoisingLoss(raw_model, cfg)
    model = torch.compile(loss_fn) if compiled else loss_fn
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    print(f"settings: {describe(cfg)}")
    print(f"data: {data['label']}: {len(train_windows):,} windows of {cfg.block_size} tokens, "
          f"tokenizer {data['tokenizer']['name']}, {vocab_size:,} ids")
    print(f"model: {sum(p.numel() for p in raw_model.parameters()) / 1e6:.2f}M parameters; a step is "
          f"{describe_batch(cfg)}; {'resuming at' if start else 'from'} step {start:,} of {cfg.max_steps:,}")
    clipped = [p for p in raw_model.parameters() if p is not raw_model.schedule]
    peak, flops = peak_flops(device), flops_per_token(raw_model, cfg.self_conditioning)
    clock, clock_step, saved = time.perf_counter(), start, start
    for step in range(start, cfg.max_steps):
        lr = set_learning_rate(optimizer, cfg, step)
        try:
            loss = train_step(model, cfg, train_windows, step, device, autocast)
        except torch.OutOfMemoryError:
            fail(f"out of memory with {cfg.batch_size} sequences of {cfg.block_size} tokens, peak "
                 f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB; halve batch_size, accumulation keeps the step the "
                 "same", code=1)
        grad_norm = nn.utils.clip_grad_norm_(clipped, cfg.grad_clip or math.inf).item()
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step + 1}: loss {loss}, gradient norm {grad_norm} at lr {lr:.2e}; nothing was updated; resume "
                 f"from step {saved:,} with a lower learning_rate or grad_clip", code=1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, raw_model, cfg.ema_decay, step)

        done, leaving = step + 1, stopped[:]        # a signal from here on waits for the next step
        last = leaving or done == cfg.max_steps
        if done % cfg.log_interval == 0 or last or done == start + 1:
            now = time.perf_counter()
            rate = (done - clock_step) * cfg.batch_tokens / (now - clock)
            left = (cfg.max_steps - done) * cfg.batch_tokens / rate
            mfu = f" mfu {rate * flops / peak:.1%}" if peak else ""
            print(f"step {done}/{cfg.max_steps} loss {loss:.3f} lr {lr:.2e} grad {grad_norm:.2f} "
                  f"{rate:,.0f} tokens/s{mfu} left {format_time(left)}", flush=True)
            log.write(step=done, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_second=rate,
                      tokens=done * cfg.batch_tokens, schedule=raw_model.schedule.tolist())
            clock, clock_step = now, done
        if done % cfg.save_interval == 0 or last:
            path = save_checkpoint(cfg, done, data, raw_model, ema, optimizer, log.wandb_id)
            saved, clock, clock_step = done, time.perf_counter(), done
        if cfg.eval_interval and done % cfg.eval_interval == 0 or last and not leaving:
            log.write(step=done, **evaluate(ema, cfg, val_windows, encoding, device))
            clock, clock_step = time.perf_counter(), done
        if leaving:
            print(f"saved {path}; the same command with --resume=True goes on")
            raise SystemExit(128 + leaving[0])
    print(f"done: step {cfg.max_steps:,}; python sample.py --checkpoint={cfg.out_dir}")


def format_time(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def open_out_dir(cfg):
    """The checkpoint to resume, or None; a folder that holds a run is never overwritten without being asked."""
    folder = Path(cfg.out_dir)
    if any(folder.glob("ckpt_*.pt")) and not cfg.resume:
        fail(f"{folder} already holds a run; continue it with --resume=True, or choose another --out_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stump in folder.glob("ckpt_*.tmp"):
            stump.unlink()
        (folder / "log.jsonl").touch()
    except OSError as error:
        fail(f"cannot write to out_dir={folder} ({error.strerror}); choose another --out_dir")
    if not any(folder.glob("ckpt_*.pt")):
        if cfg.resume:
            print(f"nothing to resume in {folder}: starting at step 0")
        return None
    try:
        return find_checkpoint(folder)[1]
    except ValueError as error:
        fail(f"{error}; start again in another --out_dir", code=1)


if __name__ == "__main__":
    main(CFG)
