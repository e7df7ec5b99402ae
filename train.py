"""
Train SunFish: pre-tokenized shards in, checkpoints and a log out.

    python train.py config/tiny.py                          # minutes on a laptop, on text that Python brings along
    python train.py config/micro.py --device=cpu            # 41.6M parameters and the output head's 25.8M
    torchrun --nproc_per_node=8 train.py config/full.py     # 1.4B parameters

The data order and all noise are functions of the settings and of (seed, step, index of the sample in its step), so a run that
stops at a checkpoint and resumes is the run that never stopped, on any number of processes, and nothing but the step number
has to be remembered. The network and its loss know nothing of processes: `distribute` wraps them, and a step sums its numbers.
"""
import os
import signal
from dataclasses import dataclass

from configurator import ModelConfig, describe, fail, load


@dataclass(frozen=True)
class Config(ModelConfig):
    # data and output
    dataset: str = "fineweb,pydoc"       # folder, or name under data/; of several the first that is prepared
    init_from: str = ""                  # begin with the averaged network of this checkpoint (file, folder, hf:user/name); "": a new one
    prompt_file: str = ""                # for prompt_table=gpt2: a model.safetensors with wte.weight; "": fetched from the hub, once
    out_dir: str = "out/sunfish"         # checkpoints and log.jsonl go here
    resume: bool = False                 # continue from the newest checkpoint in out_dir
    # the optimizer step
    batch_size: int = 8                  # sequences on a device at a time, at most
    batch_tokens: int = 65_536           # tokens in an optimizer step; gradient accumulation follows from it
    max_steps: int = 10_000              # optimizer steps
    learning_rate: float = 1e-3          # peak; cosine to zero after the warm-up
    warmup_steps: int = 200              # steps of linear warm-up
    weight_decay: float = 0.01           # on the matrices of trunk and head; 0 is off
    grad_clip: float = 1.0               # largest norm of the gradient; 0 is off
    ema_decay: float = 0.999             # averaging of the weights that sample; 0 is off
    lora_rank: int = 0                   # train adapters of this rank in the blocks, beside the weights of init_from; 0 trains all
    lora_alpha: float = 16.0             # weight of the adapters, times their rank
    # what is noised
    p_given: float = 0.15                # share of sequences in which a prefix, spans or single tokens are given
    p_whole: float = 0.05                # share that is denoised as a whole
    streams: int = 8                     # most parts of a text that are written side by side, a token of each in a turn
    p_spans: float = 0.1                 # share of the others that is denoised in spans of 2 tokens and more, not in streams of one
    span_warmup: float = 0.4             # share of the steps, the first, with streams only: they teach the spans
    self_conditioning: float = 0.5       # share that sees a first guess of x_0, where there is more than one step; 0 is off
    conditioning_dropout: float = 0.1    # share of prompts withheld, for guidance; 1 trains without prompts
    # machine
    seed: int = 1                        # of weights, data order and noise
    device: str = "auto"                 # auto, cpu, cuda, cuda:1
    parallel: str = "auto"               # auto, ddp, fsdp: of torchrun's processes; auto shards if the GPU is too small
    dtype: str = "auto"                  # auto, float32, bfloat16: of the matrix products, and the scores they make
    compile: str = "auto"                # auto, true, false: torch.compile
    activation_checkpointing: bool = False   # recompute the blocks in the backward pass: less memory, more time
    dry_run: bool = False                # print sizes, batch and bytes that are kept, then stop
    # log
    log_interval: int = 10               # steps between log lines
    eval_interval: int = 500             # steps between evaluations; 0 is off
    eval_sequences: int = 256            # sequences for the bound at an evaluation
    save_interval: int = 500             # steps between checkpoints
    keep_last: int = 2                   # so many of the newest checkpoints are kept
    keep_interval: int = 0               # steps between checkpoints kept for good; 0 is off
    guidance_scale: float = 2.0          # of the prompted sample at an evaluation
    wandb_log: bool = False              # also log to Weights & Biases
    wandb_project: str = "sunfish"       # its project

    def check(self):
        """Raise ValueError, in one line that says what to do, for settings that cannot work."""
        super().check()
        if self.lora_rank and not self.init_from:
            raise ValueError(f"lora_rank={self.lora_rank} adapts a trained network; name it with --init_from=CHECKPOINT")
        for names, low, high in (
                ("batch_size batch_tokens max_steps streams log_interval save_interval keep_last", 1, 1e18), ("eval_sequences", 2, 1e18),
                ("warmup_steps weight_decay grad_clip eval_interval keep_interval lora_rank", 0, 1e18),
                ("p_given p_whole p_spans span_warmup self_conditioning conditioning_dropout ema_decay", 0, 1),
                ("learning_rate lora_alpha", 1e-12, 1e3)):
            for name in names.split():
                if not low <= getattr(self, name) <= high:
                    raise ValueError(f"{name}={getattr(self, name)} is out of range; choose {low:g} to {high:g}")
        if self.p_given + self.p_whole > 1:
            raise ValueError(f"p_given={self.p_given} and p_whole={self.p_whole} add up to more than 1; lower one of them")
        if self.span_size and self.p_whole == 1:
            raise ValueError(f"p_whole=1 leaves nothing to write in spans of up to span_size={self.span_size}; use --span_size=0")
        for name, known in (("dtype", "auto float32 bfloat16"), ("compile", "auto true false"), ("parallel", "auto ddp fsdp")):
            if getattr(self, name) not in known.split():
                raise ValueError(f"{name}={getattr(self, name)} is unknown; use one of {known}")
        if not self.init_from:                              # whose network is not known yet
            self.check_sizes()

    def check_sizes(self):
        """As `check`, of what has to fit the network."""
        if self.lora_rank > self.n_embd:
            raise ValueError(f"lora_rank={self.lora_rank} is more than n_embd={self.n_embd}; 8 is usual")
        n, rest = divmod(self.batch_tokens, self.block_size)
        fits = [i for i in range(1, min(n, 4096) + 1) if n % i == 0 and n // i % min(self.batch_size, n // i) == 0 and not rest]
        if world_size() not in fits:
            what, batch = "batch_size * block_size", self.batch_size * self.block_size * world_size()
            what += f" * world_size={world_size()}" if world_size() > 1 else ""
            others = f", or {', '.join(map(str, fits))} processes" if fits and world_size() > 1 else ""
            raise ValueError(f"batch_tokens={self.batch_tokens:,} is not a multiple of {batch:,} ({what}); try "
                             f"{max(1, round(self.batch_tokens / batch)) * batch:,}{others}")

    @property
    def in_turns(self):
        """Whether any token is read clean by others that are written later."""
        return bool(self.span_size or self.p_given)

    @property
    def samples(self):
        """Sequences in an optimizer step, of all processes."""
        return self.batch_tokens // self.block_size

    @property
    def sequences(self):
        """Sequences on a device at a time."""
        return min(self.batch_size, self.samples // world_size())


def rank():
    """The number of this process among all that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def world_size():
    return int(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # until there is something to save
    CFG = load(Config)      # before torch is imported, so that --help and a wrong setting answer at once

import contextlib                 # noqa: E402
import dataclasses
import inspect
import json
import math
import re
import shutil
import sys
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import diffusion
from diffusion import generator, mix
from model import (KERNEL, LATER, SCORES, SunFish, add_lora, choose_device, find_checkpoint, fingerprint, flops_per_token, gpt2_vectors,
                   has_bf16, in_chunks, keep_memory, loss_in_chunks, model_config, peak_flops, peak_gb, write_checkpoint)
from prepare_fineweb import find_dataset, find_shards, get_tokenizer, lock, read_examples, read_meta, read_shard
from sample import Config as SampleConfig, sample, until

DISK = 1e9                  # bytes a second that a disk is taken to write, for the estimate of a dry run
SCHEDULE_RATE = 3e-3        # learning rate of the fitted schedule's three scalars


RESIZED = ("block_size", "prompt_size", "span_size")       # settings of a network that may change when it is trained on


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


class Item(NamedTuple):
    idx: torch.Tensor              # (T,) int64 tokens
    before: torch.Tensor           # (at most P,) int64 those that stand before them
    begun: int                     # the first so many are an instruction: given
    end: int                       # what stands from here on is padding


class Windows:
    """Windows of block_size tokens over the shards of one split, each with the tokens that stand before it."""
    what = "windows"

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
        """As `read`, but a damaged window ends the program."""
        try:
            return self.read(i)
        except ValueError as error:
            fail(error)

    def find(self, i):
        """(shard, place in it) of number i."""
        k = int(np.searchsorted(self.ends, i, side="right"))
        return k, i - (int(self.ends[k - 1]) if k else 0)

    def read(self, i):
        """Window i as an Item; ValueError if it is damaged."""
        k, place = self.find(i)
        start = place * self.cfg.block_size
        before = max(0, start - self.cfg.prompt_size)
        ids = self.tokens(k, before, start + self.cfg.block_size)
        return Item(ids[start - before:], ids[:start - before], 0, self.cfg.block_size)

    def tokens(self, k, start, stop):
        """Tokens of shard k as int64; ValueError if one is out of the vocabulary."""
        ids = self.shards[k][start:stop].astype(np.int64)
        if ids.max() >= self.vocab_size:
            at = int((ids >= self.vocab_size).argmax())
            raise ValueError(f"{self.paths[k]}: id {ids[at]} at token {start + at} is not below the vocabulary of "
                             f"{self.vocab_size}; these shards were made with another tokenizer, prepare them again")
        return torch.from_numpy(ids)

    def unigram(self, tokens=20_000_000):
        """log frequency of every id among the first tokens of each shard: (vocab_size,) float32."""
        each = tokens // len(self.shards)
        some = (shard[i:min(i + 2 ** 20, each)] for shard in self.shards for i in range(0, min(each, len(shard)), 2 ** 20))
        count = 0.5 + sum(np.bincount(ids, minlength=self.vocab_size)[:self.vocab_size] for ids in some)
        return torch.from_numpy(np.log(count / count.sum())).float()


class Examples(Windows):
    """Instructions with their responses: a window begins with the instruction, up to half of it, as sample.py does with a prompt;
    what does not fit stands before it. One that fits in neither place is left out, and a response that is too long is cut."""
    what = "examples"

    def __init__(self, folder, split, cfg, vocab_size):
        self.paths = find_shards(folder, split)
        self.shards, lengths = zip(*map(read_examples, self.paths), strict=True)
        self.cfg, self.vocab_size = cfg, vocab_size
        fits = [rows[:, 0] <= cfg.block_size // 2 + cfg.prompt_size for rows in lengths]
        self.rows = [np.column_stack((rows.sum(1).cumsum() - rows.sum(1), rows))[fit] for rows, fit in zip(lengths, fits, strict=True)]
        self.ends = np.cumsum([len(rows) for rows in self.rows])
        rows = np.concatenate(self.rows)
        cut = np.minimum(rows[:, 1], cfg.block_size // 2) + rows[:, 2] > cfg.block_size
        print(f"{split}: {len(rows):,} examples, {sum(map(len, lengths)) - len(rows):,} left out, whose instruction is longer than "
              f"{cfg.block_size // 2 + cfg.prompt_size} tokens, {cut.sum():,} responses cut")
        if self.ends[-1] == 0:
            raise ValueError(f"{folder}: no {split} example has an instruction of up to {cfg.block_size // 2 + cfg.prompt_size} "
                             "tokens; raise block_size or prompt_size")

    def texts(self, i):
        """Instruction and response of example i, each (n,) int64."""
        k, place = self.find(i)
        start, n, m = self.rows[k][place].tolist()
        return self.tokens(k, start, start + n + m).split((n, m))

    def read(self, i):
        return place_example(self.cfg, *self.texts(i))


def place_example(cfg, instruction, response):
    """The Item of an instruction (n,) and a response (m,)."""
    n = min(len(instruction), cfg.block_size // 2)
    before, begun = instruction[-cfg.prompt_size - n:].split((max(0, min(len(instruction) - n, cfg.prompt_size)), n))
    idx = torch.cat((begun, response))[:cfg.block_size]
    return Item(F.pad(idx, (0, cfg.block_size - len(idx))), before, n, len(idx))


def open_data(cfg):
    """What a checkpoint keeps of the dataset, and its training and validation windows, or examples."""
    try:
        folder = find_dataset(cfg.dataset)
        meta = {"kind": "text", "licence": "unknown", **read_meta(folder)}
        if meta["kind"] == "instructions" and not cfg.in_turns:
            fail("span_size=0 and p_given=0 is a network that reads nothing that is given, such as instructions; use --p_given=0.1")
        kind = Windows if meta["kind"] == "text" else Examples
        splits = (kind(folder, split, cfg, meta["vocab_size"]) for split in ("train", "val"))
        return {key: meta[key] for key in ("label", "licence", "kind", "fingerprint", "tokenizer", "vocab_size")}, *splits
    except ValueError as error:
        fail(error)


class Batch(NamedTuple):
    idx: torch.Tensor              # (B, T) int64 tokens
    group: torch.Tensor            # (B, T) int64 turn in which each is written, after those of smaller ones
    t: torch.Tensor                # (B, T) int64 diffusion index of each, one for the tokens of a turn
    eps: torch.Tensor              # (B, T, C) noise
    prompt: torch.Tensor           # (B, P) int64 tokens before the window, at the right end
    prompt_mask: torch.Tensor      # (B, P) True where the network may see them
    counts: torch.Tensor           # (B, T) True where there is a loss: not for an instruction, nor for padding
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


def choose_turns(cfg, step, free, rng):
    """The turn in which each token of a sample is written where free (T,): (T,) int64. All at once; in spans from left to right,
    of 2, 4 ... span_size tokens; or, most of all, in 1, 2, 4 ... streams. Where tokens are given, they come first, and spans or
    streams fill the rest. In the first steps (span_warmup) there are streams only."""
    def draw(least, most):
        sizes = [*(2 ** k for k in range(most.bit_length()) if least <= 2 ** k < most), most]
        return sizes[int(torch.randint(len(sizes), (), generator=rng))]
    T, (kind, span) = cfg.block_size, torch.rand(2, generator=rng).tolist()
    free = free & ~choose_given(T, rng) if kind < cfg.p_given else free
    warm_up = step < cfg.span_warmup * cfg.max_steps
    if not cfg.span_size or cfg.p_given <= kind < cfg.p_given + cfg.p_whole and not warm_up:
        group = diffusion.spans(T, T)
    elif warm_up or span >= cfg.p_spans:
        group = diffusion.streams(free, draw(1, cfg.streams))
    else:
        group = diffusion.spans(T, draw(2, cfg.span_size))
    return group if free.all() else torch.where(free, 1 + group, 0)


def apart(group):
    """Which of the tokens in the turns group (T,) are of a turn none of whose tokens are neighbours, to the convolution: (T,)."""
    around = F.pad(group, (KERNEL // 2, KERNEL // 2), value=-1).unfold(0, KERNEL, 1)
    return ~torch.isin(group, group[(around == group[:, None]).sum(1) > 1])


def noise_levels(cfg, step, i, group):
    """The diffusion index of each token of sample i, written in the turns group (T,): (T,) int64.

    The level of turn 0 is stratified over the samples of a step: each takes its own n-th part of 0 .. 1, in random order. A
    token that is written alone, or far from others, gets the highest level, at which sample.py decides it and nothing but its
    context can help; for eps_hat, all levels count.
    """
    u = (permute(i, cfg.samples, mix(cfg.seed, step)) + mix(cfg.seed, step, "offset") / 2 ** 64) / cfg.samples
    t = 1 + (diffusion.by_turn(u, group.double()) * cfg.timesteps).long().clamp(max=cfg.timesteps - 1)
    return torch.where(apart(group), cfg.timesteps, t) if cfg.objective == "ce" else t


def make_sample(cfg, windows, step, i, device):
    """Sample i of an optimizer step: the tensors of a Batch, without the leading B."""
    T, P = cfg.block_size, cfg.prompt_size
    epoch, place = divmod(step * cfg.samples + i, len(windows))
    idx, before, begun, end = windows.read(permute(place, len(windows), mix(cfg.seed, epoch)))
    rng, places = generator("cpu", cfg.seed, step, i), torch.arange(T)
    counts = (places >= begun) & (places < end)
    group = torch.where(places < begun, -1, torch.where(places < end, choose_turns(cfg, step, counts, rng), LATER))
    drop, share = torch.rand(2, generator=rng).tolist()
    visible = min(len(before), 1 + int(share * P)) if not begun else len(before)
    if drop < cfg.conditioning_dropout:
        group, visible = torch.where(places < begun, LATER, group), 0
    prompt, mask = prompt_of(cfg, before, visible)
    eps = torch.randn(T, cfg.token_dim, generator=generator(device, cfg.seed, step, i, "eps"), device=device)
    return idx, group, noise_levels(cfg, step, i, group), eps, prompt, mask, counts


def prompt_of(cfg, before, visible):
    """The tokens before a window, padded to (prompt_size,), and a mask of the last `visible` of them."""
    P = cfg.prompt_size
    return F.pad(before, (P - len(before), 0)), torch.arange(P) >= P - visible


def make_batch(cfg, windows, step, samples, device):
    """Samples (indices within the step) as one Batch on the device. In front are those with a first guess: of a fixed share
    those that need it, filled up to a quarter, a half or all of the share, so that a compiled step meets four sizes only."""
    made = {i: make_sample(cfg, windows, step, i, device) for i in samples}
    chosen = [i for i in samples if int((i + 1) * cfg.self_conditioning) > int(i * cfg.self_conditioning)]
    useful = [i for i in chosen if ((made[i][2] < cfg.timesteps) & made[i][-1]).any()]
    guesses = next(n for n in (0, len(chosen) // 4, len(chosen) // 2, len(chosen)) if n >= len(useful))
    rows = [made[i] for i in sorted(samples, key=lambda i: (i not in useful, i not in chosen, i))]
    fields = (torch.stack(field).to(device, non_blocking=True) for field in zip(*rows, strict=True))
    return Batch(*fields, guesses)


# ---- the loss ----

class DenoisingLoss(nn.Module):
    """Batch -> the loss of its tokens and their distance from the schedule, two sums.

    One module around all that touches the weights, so that distribution wraps a single call.
    """

    def __init__(self, net, cfg, lockstep=False):
        super().__init__()
        self.net, self.cfg, self.lockstep = net, cfg, lockstep      # lockstep: sharded processes call the network equally often

    def forward(self, batch):
        net, cfg = self.net, self.cfg
        table = net.embedding()                                                           # (V, C)
        x_0 = table[batch.idx]                                                            # (B, T, C)
        alpha_bar = diffusion.make_schedule(cfg, net.schedule.detach())
        x_t = diffusion.add_noise(x_0, batch.t, alpha_bar, batch.eps)
        log_snr = diffusion.log_snr(batch.t, alpha_bar)                                   # (B, T)
        past = None
        if cfg.in_turns:
            past = net.look_back(net.remember(batch.idx, batch.group, batch.prompt, batch.prompt_mask, table), batch.group)
        mean, readout = net.posterior_mean(x_t, log_snr, table), net.readout(table)
        x_prev = self.first_guess(x_t, mean, log_snr, batch, past, table, readout)
        hidden = net.hidden(mean, log_snr, x_prev, batch.prompt, batch.prompt_mask, past, table)
        features = net.features(hidden, x_t, log_snr)
        if cfg.objective == "eps":
            loss = (diffusion.eps_loss(net.answer(features, *readout), batch.eps) * batch.counts).sum()
            return loss, torch.zeros_like(loss)
        tokens = (x.flatten(0, 1) for x in (features, batch.idx, batch.counts))
        loss, ce = loss_in_chunks(self.losses, len(table), readout, *tokens)
        if cfg.schedule != "gumbel":
            return loss, torch.zeros_like(loss)
        mu, log_beta, log_height = net.schedule
        fit = diffusion.schedule_loss(ce.view_as(batch.t), log_snr, mu, log_beta.exp(), log_height.exp(), math.sqrt(cfg.token_dim))
        return loss, (fit * (batch.t < cfg.timesteps) * batch.counts).sum()             # of tokens that run through the levels

    def losses(self, weight, bias, features, idx, counts):
        """The cross-entropy of tokens idx (M,) in nats, 0 for those that do not count: (M,)."""
        logits = self.net.answer(features, weight, bias)
        with torch.autocast(idx.device.type, enabled=False):
            return diffusion.ce_loss(logits, idx) * counts

    @torch.no_grad()
    def first_guess(self, x_t, mean, log_snr, batch, past, table, readout):
        """x_0_hat of a first pass for the first batch.guesses sequences, and zeros for the others and where a sampler begins, at
        the highest level; with objective eps for all, as in the origin design, whose guess of x_0 grows without limit there."""
        x_prev, n = torch.zeros_like(x_t), max(batch.guesses, int(self.lockstep))
        if not n or not self.cfg.self_conditioning or self.cfg.objective == "eps":
            return x_prev
        past = tree_map(lambda x: x[:n] if isinstance(x, torch.Tensor) else x, past)
        hidden = self.net.hidden(mean[:n], log_snr[:n], x_prev[:n], batch.prompt[:n], batch.prompt_mask[:n], past, table)
        read, features = diffusion.read_logits(table), self.net.features(hidden, x_t[:n], log_snr[:n])
        guess = in_chunks(lambda x: read(self.net.answer(x, *readout), None, None)[0], len(table), features)
        x_prev[:batch.guesses] = torch.where(batch.t[:n, :, None] < self.cfg.timesteps, guess, 0)[:batch.guesses]
        return x_prev


def recompute_blocks(net, cfg):
    """The network, whose blocks, if asked, keep their input only and run again in the backward pass."""
    for block in net.blocks if cfg.activation_checkpointing else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return net


def compile_parts(loss_fn, backend="inductor"):
    """Compile the blocks and the scores of a DenoisingLoss, not the whole: what is compiled for one block serves for all."""
    torch._dynamo.config.recompile_limit = 32           # with prompt or not; clean, noisy or the last; the sizes of a first guess
    torch._dynamo.config.optimize_ddp = False           # which would cut each block in two: gradients go out block by block anyway
    for module, name in (*((block, "forward") for block in loss_fn.net.blocks), (loss_fn, "losses")):
        setattr(module, name, torch.compile(getattr(module, name), backend=backend, dynamic=False))


def make_optimizer(model, cfg):
    """AdamW in up to three groups, to be set by set_learning_rate: matrices, or adapters, the rest, the schedule's scalars."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrix = {n for n, p in named.items() if (n.endswith(".weight") or ".lora_" in n) and p.ndim == 2}
    groups = [dict(params=[p for n, p in named.items() if n in matrix]),
              dict(params=[p for n, p in named.items() if n not in matrix and n != "schedule"]),
              dict(params=[p for n, p in named.items() if n == "schedule"])]
    assert sum(len(g["params"]) for g in groups) == len(named), f"groups do not cover all of {list(named)}"
    groups = [group for group in groups if group["params"]]             # of frozen networks only the first
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.99), fused=True)


def set_learning_rate(optimizer, cfg, step):
    """Linear warm-up, then a cosine to zero, and the weight decay, which a resumed run may change; returns the rate."""
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    factor = (step + 1) / cfg.warmup_steps if step < cfg.warmup_steps else 0.5 * (1 + math.cos(math.pi * done))
    settings = (cfg.learning_rate, cfg.weight_decay), (cfg.learning_rate, 0.0), (SCHEDULE_RATE, 0.0)
    for group, (peak, weight_decay) in zip(optimizer.param_groups, settings, strict=False):
        group.update(lr=peak * factor, weight_decay=weight_decay)
    return cfg.learning_rate * factor


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay * ema + (1 - decay) * model, where this is trained, with a shorter memory in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    trained = [pair for pair in zip(ema.parameters(), model.parameters(), strict=True) if pair[1].requires_grad]
    torch._foreach_lerp_(*map(list, zip(*trained, strict=True)), 1 - decay)


# ---- evaluation ----

def eval_windows(windows, n):
    """n windows spread evenly over the split, with repetition if it is smaller: (n, T)."""
    return torch.stack([windows[i * len(windows) // n][0] for i in range(n)])


def eval_examples(windows, n):
    """n examples spread evenly over the split: (n, T), and as `measure` takes them what is given and what counts."""
    return stack_examples(windows.cfg, [windows[i * len(windows) // n] for i in range(n)])


def stack_examples(cfg, items):
    """Items as (n, T) tokens and the rest that `measure` takes: prompt, prompt_mask, counts."""
    places = torch.arange(cfg.block_size)
    prompts, masks = zip(*(prompt_of(cfg, item.before, len(item.before)) for item in items), strict=True)
    counts = [(places >= item.begun) & (places < item.end) for item in items]
    return torch.stack([item.idx for item in items]), dict(prompt=torch.stack(prompts), prompt_mask=torch.stack(masks), counts=torch.stack(counts))


@torch.no_grad()
def measure(model, idx, batch_size, span=None, steps=0, streams=1, bands=8, curve=32, prompt=None, prompt_mask=None, counts=None):
    """The bound of a network on sequences idx (N, T), and its cross-entropy by noise on `curve` of them, as a dict: of all tokens,
    or of those that counts (N, T), given those before them, and a prompt (N, P) that is visible where prompt_mask (N, P).

    `span` tokens are written together (0: all, None: one if the network was trained so), single ones in so many `streams`, and
    each turn in so many steps (0: single tokens in one, as sample.py does, without a second pass; more tokens in all timesteps).
    """
    table, alpha_bar = model.embedding(), diffusion.make_schedule(model.cfg, model.schedule)
    span = min(1, model.cfg.span_size) if span is None else span
    steps = steps or (1 if span == 1 and model.cfg.objective == "ce" else len(alpha_bar) - 1)
    counts = torch.ones_like(idx, dtype=torch.bool) if counts is None else counts
    turns = [diffusion.streams(row, streams) if span == 1 else diffusion.spans(len(row), span) for row in counts.cpu()]
    group = torch.where(counts, torch.stack(turns).to(idx.device), torch.where(counts.cumsum(1) == 0, -1, LATER))
    batch_size = max(1, min(batch_size, SCORES // (idx.size(1) * len(table))))
    read, free = diffusion.make_read(model.cfg, table, model.vocab_size), partial(model.likelihood, E=table)

    def predict_for(rows):
        turns, given = group[rows], {} if prompt is None else dict(prompt=prompt[rows], prompt_mask=prompt_mask[rows])
        past = model.look_back(model.remember(idx[rows], turns, **given, E=table), turns) if (group != group[0, 0]).any() else None
        network = partial(model, **given, past=past, E=table)
        return diffusion.two_pass(network, read) if steps != 1 else lambda x_t, level: read(
            network(x_t, level, torch.zeros_like(x_t)), x_t, level)
    some = torch.arange(0, len(idx), -(-len(idx) // curve))
    return {**diffusion.estimate_bound(predict_for, table, idx, counts, group, diffusion.coarser(alpha_bar, steps), batch_size),
            "ce_by_noise": diffusion.ce_by_noise(predict_for, free, table, idx, counts, alpha_bar, batch_size, some, bands)}


def show_answers(model, cfg, encoding, windows, n=3):
    """Responses to instructions of the validation examples: (name, text)s."""
    texts, n = [], min(n, len(windows))
    for i in range(n):
        k = (2 * i + 1) * len(windows) // (2 * n)
        item, (instruction, response) = windows[k], windows.texts(k)
        canvas = item.idx, torch.arange(cfg.block_size) < item.begun, item.before
        made, = sample(model, SampleConfig(guidance_scale=cfg.guidance_scale), canvas, [i], end=encoding.eot_token)
        answer = until(made[item.begun:].tolist(), encoding.eot_token)
        asked, answer, truth = (decode(encoding, ids) for ids in (instruction[1:], answer, response[:-1]))
        texts.append(("answer", f"{asked} {answer} (truth: {truth})"))
    return texts


def decode(encoding, ids):
    """Token ids, a list or a tensor, as one line of text."""
    return " ".join(encoding.decode(torch.as_tensor(ids).tolist()).split())


def show_text(model, cfg, encoding, windows):
    """A free sample, one prompted by the tokens before a validation window, and that window with a hole: (name, text)s."""
    idx, before, *_ = windows[len(windows) // 2]
    T = min(cfg.block_size, 64)
    hole = torch.arange(T) - T // 2
    hole = (hole >= 0) & (hole < T // 8)
    write, infill = SampleConfig(guidance_scale=cfg.guidance_scale), SampleConfig(mode="infill")
    idx, nothing, prompt = idx[:T], torch.zeros_like(hole), before[-cfg.prompt_size:]
    canvases = (write, (idx, nothing, before[:0])), (write, (idx, nothing, prompt)), (infill, (idx, ~hole, before[:0]))
    free, prompted, filled = (sample(model, settings, canvas, [i])[0].cpu() for i, (settings, canvas) in enumerate(canvases))
    show = partial(decode, encoding)
    return [("sample", show(free)), ("prompt", f"{show(prompt)} >>> {show(prompted)}"),
            ("infill", f"{show(idx[:T // 2])} [{show(filled[hole])}] {show(idx[T // 2 + T // 8:T])} (truth: [{show(idx[hole])}])")]


def evaluate(model, cfg, windows, encoding):
    """Print bound, cross-entropy by noise and text; return the numbers as a row for the log."""
    device, examples = model.table.device, windows.what == "examples"
    idx, rest = eval_examples(windows, cfg.eval_sequences) if examples else (eval_windows(windows, cfg.eval_sequences), {})
    row = measure(model, idx.to(device), cfg.batch_size, **{name: x.to(device) for name, x in rest.items()})
    print("  bound {bound:.3f} +- {bound_error:.3f} nats a token (reconstruction {reconstruction:.3f}, diffusion "
          "{diffusion:.3f}, prior {prior:.3f})".format(**row))
    print("  t: network / context-free, nats: " + "  ".join(f"{t}: {a:.2f}/{b:.2f}" for t, a, b in row["ce_by_noise"]))
    row["text"] = (show_answers if examples else show_text)(model, cfg, encoding, windows)
    for name, text in row["text"]:
        print(f"  {name}: {text}")
    return row


# ---- checkpoints ----

def gather_state(model, ema, optimizer):
    """Weights, averages and moments as plain tensors on the CPU of the first process, and nothing on the others. With adapters
    only theirs."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {name: dcp.get_model_state_dict(net, options=options) for name, net in (("model", model), ("ema", ema))}
    state = {name: {key: x for key, x in weights.items() if ".lora_" in key} or weights for name, weights in state.items()}
    return dict(state, optimizer=dcp.get_optimizer_state_dict(model, optimizer, options=options))


def restore_state(state, model, ema, optimizer=None):
    """The inverse of gather_state: the first process has the state, the others nothing. Without an optimizer: of weights."""
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    for net, name in ((model, "model"), (ema, "ema")):
        dcp.set_model_state_dict(net, dict(state.get(name, {})), options=options)      # a copy: it is changed
    if optimizer:                                       # its tensors, kept as they come, must not stay mapped from a file
        moments = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state.get("optimizer", {}))
        dcp.set_optimizer_state_dict(model, optimizer, moments, options=options)


def save_checkpoint(cfg, **content):
    """Write out_dir/ckpt_STEP.pt and drop all but the newest."""
    path = Path(cfg.out_dir) / f"ckpt_{content['step']:08d}.pt"
    try:
        write_checkpoint(path, dict(config=dataclasses.asdict(cfg), world_size=world_size(), **content))
    except OSError as error:
        fail(f"{error}; free some space and resume", code=1)
    for old in sorted(path.parent.glob("ckpt_*.pt"))[:-cfg.keep_last]:
        if not cfg.keep_interval or int(old.stem[5:]) % cfg.keep_interval:
            old.unlink()


def begin_with(cfg):
    """cfg with the network of init_from, if there is one, and on the first process that checkpoint's content, elsewhere None."""
    if not cfg.init_from:
        return cfg, None
    found = None
    if rank() == 0:
        try:
            found = find_checkpoint(cfg.init_from)
        except ValueError as error:
            fail(f"init_from: {error}")
        path, found = found or fail(f"no checkpoint at init_from={cfg.init_from}; name the file, or the folder of a run")
        if "base" in found:
            fail(f"init_from={path} is an adapter; name the network that it was trained on")
    theirs = share(found and dataclasses.asdict(model_config(found)))
    mine = {name: getattr(cfg, name) for name in theirs if name in cfg.given}
    wrong = [f"{name}={mine[name]} is {theirs[name]}" for name in mine if name not in RESIZED and mine[name] != theirs[name]]
    if wrong:
        fail(f"{', '.join(wrong)} in init_from={cfg.init_from}; leave it out")
    cfg = dataclasses.replace(cfg, **theirs | mine)
    try:
        cfg.check()
        cfg.check_sizes()
    except ValueError as error:
        fail(error)
    return cfg, found


def check_tokenizer(cfg, data, base):
    """Refuse data with another tokenizer than that of the network that is to be trained on."""
    if base and data["tokenizer"] != base["data"]["tokenizer"]:
        theirs = base["data"]["tokenizer"]["name"]
        fail(f"dataset={cfg.dataset} has the tokenizer {data['tokenizer']['name']} of {data['vocab_size']:,} ids, and init_from={cfg.init_from} "
             f"{theirs} of {base['data']['vocab_size']:,}; prepare the text with "
             + ("--tokenizer=gpt2" if theirs == "gpt2" else "--tokenizer=FOLDER, a folder with shards or an export of that network"))


def check_resumable(cfg, data, checkpoint):
    """Refuse another network or other data than the checkpoint's; print what else differs."""
    before = checkpoint["config"]
    fixed = {f.name for f in dataclasses.fields(ModelConfig)} | {"seed", "batch_tokens", "lora_rank", "lora_alpha"}     # and data order
    before = {f.name: before.get(f.name, f.default) for f in dataclasses.fields(cfg)}       # a setting that it did not know yet
    changed = [name for name in before if name != "resume" and before[name] != getattr(cfg, name)]
    wrong = [f"{name}={getattr(cfg, name)} is {before[name]}" for name in changed if name in fixed]
    if wrong:
        fail(f"{', '.join(wrong)} in the checkpoint of {cfg.out_dir}; resume with that, or choose another --out_dir")
    for name in changed:
        print(f"resuming with {name}={getattr(cfg, name)}, was {before[name]}")
    if checkpoint["world_size"] != world_size():
        print(f"resuming on {world_size()} processes, was {checkpoint['world_size']}: the same batches and noise")
    if data["fingerprint"] != checkpoint["data"]["fingerprint"]:
        fail(f"the data is {data['label']} ({data['fingerprint']}), but the checkpoint in {cfg.out_dir} was trained on "
             f"{checkpoint['data']['label']} ({checkpoint['data']['fingerprint']}); resume with that --dataset")


# ---- machine ----

def choose_machine(cfg):
    """device, autocast dtype and whether to compile, each with the reason in the line that is printed."""
    if "RANK" in os.environ and "LOCAL_RANK" not in os.environ:
        fail("RANK is set, but LOCAL_RANK is not; start with torchrun, which sets both, or unset RANK")
    if world_size() > 1 and cfg.device not in ("auto", "cpu", "cuda"):
        fail(f"device={cfg.device}, but {world_size()} processes need one each; use --device=cuda, and CUDA_VISIBLE_DEVICES to choose")
    shared = "RANK" in os.environ and cfg.device != "cpu" and torch.cuda.is_available()
    try:
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}" if shared else cfg.device)
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


def dry_run(cfg):
    """Print what a run would be and need, with GPT-2's vocabulary if its data is not prepared yet."""
    choose_machine(cfg)
    cfg, base = begin_with(cfg)
    folders = (Path(root, name) for name in cfg.dataset.split(",") for root in ("data", ""))
    vocab_size, label = (base["data"]["vocab_size"], "of init_from") if base else (50_257, "GPT-2's")
    if any(any(folder.glob("*train*.bin")) for folder in folders):
        data, _, _ = open_data(cfg)
        check_tokenizer(cfg, data, base)
        vocab_size, label = data["vocab_size"], f"of {data['label']}"
    with torch.device("meta"):
        net = new_network(cfg, vocab_size)
    n, table, head = sum(p.numel() for p in net.parameters()), net.table.numel(), sum(p.numel() for p in net.head.parameters())
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    kept = trained if cfg.lora_rank else n
    print(f"model: {cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}, token vectors {cfg.token_dim}, vocabulary "
          f"{vocab_size:,} ({label}), table {net.table.size(0):,} rows")
    print(f"parameters: {n:,} ({n / 1e6:.1f}M), {n - table - head:,} without table and head")
    print(f"step: {describe_batch(cfg)}; {cfg.max_steps:,} steps, {cfg.max_steps * cfg.batch_tokens / 1e6:,.0f}M tokens")
    print(f"memory: weights, average and optimizer {(4 * n + 12 * trained) / 1e9:.2f} GB; the peak of a step is in the first row of the log")
    print(f"checkpoint: {kept * 16 / 1e9:.2f} GB, about {kept * 16 / DISK:.1f} s on a disk that writes {DISK / 1e9:.0f} GB a second")


def describe_batch(cfg):
    processes = f"{world_size()} processes x " if world_size() > 1 else ""
    return (f"{cfg.batch_tokens:,} tokens = {cfg.sequences} sequences x {cfg.block_size} tokens x {processes}"
            f"{cfg.samples // cfg.sequences // world_size()} accumulated")


# ---- processes ----

def join_processes(device):
    """Meet the other processes that torchrun started, if it started this one."""
    if device.index is not None:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))        # the first one evaluates and saves alone


def wait():
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def share(value):
    """The first process's value, in all."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def reduce(numbers, device, op):
    """The sum or maximum of each number over all processes, as a list of floats."""
    numbers = torch.as_tensor(numbers, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(numbers, op)
    return numbers.tolist()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_network(net, cfg, vocab_size, device):
    """The network itself, or, where it is sharded, a copy of it on the first process."""
    if not any(isinstance(p, DTensor) for p in net.parameters()):
        return net
    state = dcp.get_model_state_dict(net, options=dcp.StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank():
        return None
    copied = new_network(cfg, vocab_size)
    copied.load_state_dict(state)
    return copied.to(device)


def share_frozen(ema, net):
    """Let the average have the network's own tensors where these are not trained."""
    for mine, theirs in zip(ema.modules(), net.modules(), strict=True):
        for name, p in theirs.named_parameters(recurse=False):
            if not p.requires_grad:
                mine.register_parameter(name, p)
        for name, x in theirs.named_buffers(recurse=False):
            mine.register_buffer(name, x)


def distribute(cfg, net, ema, device, dtype, compiled):
    """The loss of a network as one module to call, compiled and, under torchrun, replicated or sharded; both networks come
    on the meta device and get memory, but no values yet. Sharding is FSDP2 by block, with the parameters in `dtype` and
    gradients summed in float32."""
    size = sum(p.numel() for p in net.parameters()) * 20        # weights, gradients, two moments, average
    small = device.type == "cpu" or size < torch.cuda.get_device_properties(device).total_memory / 2
    kind = "none" if not dist.is_initialized() else cfg.parallel if cfg.parallel != "auto" else "ddp" if small else "fsdp"
    why = "not under torchrun" if kind == "none" else "asked for" if kind == cfg.parallel else f"{size / 1e9:.1f} GB of state"
    print(f"processes {world_size()}, parallel {kind} ({why})")
    loss_fn = DenoisingLoss(recompute_blocks(net, cfg), cfg, lockstep=kind == "fsdp")
    if compiled:
        compile_parts(loss_fn)
    if kind == "fsdp":
        shard = partial(fully_shard, mesh=init_device_mesh(device.type, (world_size(),)))
        policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        for block in (*net.blocks, *ema.blocks):
            shard(block, mp_policy=policy)
        shard(ema)
        shard(loss_fn)
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")     # which nothing changes in place
    net.to_empty(device=device)
    ema.to_empty(device=device)
    if kind != "fsdp":
        share_frozen(ema, net)
    if kind == "ddp":           # buffers never change; torch 2.13 calls it so, earlier ones otherwise
        sync = inspect.signature(DistributedDataParallel.__init__).parameters.keys() & {"forward_sync_buffers"} or {"broadcast_buffers"}
        return DistributedDataParallel(loss_fn, gradient_as_bucket_view=True, **dict.fromkeys(sync, False))
    return loss_fn


# ---- the loop ----

def open_out_dir(cfg, data):
    """The locked log and the checkpoint to resume, or None; a folder that holds a run is never overwritten unasked."""
    folder = Path(cfg.out_dir)
    if any(folder.glob("ckpt_*.pt")) and not cfg.resume:
        fail(f"{folder} already holds a run; continue it with --resume=True, or choose another --out_dir")
    try:
        log = lock(folder / "log.jsonl")
        for stump in folder.glob("ckpt_*.tmp"):
            stump.unlink()
        found = find_checkpoint(folder) if any(folder.glob("ckpt_*.pt")) else None
    except BlockingIOError:
        fail(f"another train.py is at work in {folder}; wait for it, or choose another --out_dir")
    except OSError as error:
        fail(f"cannot write to out_dir={folder} ({error.strerror}); choose another --out_dir")
    except ValueError as error:
        fail(f"{error}; start again in another --out_dir", code=1)
    if found:
        check_resumable(cfg, data, found[1])
        for path in folder.glob("ckpt_*.pt"):
            if path > found[0]:                         # damaged; it must not count as one of the last that are kept
                path.rename(path.with_suffix(".damaged"))
    elif cfg.resume:
        print(f"nothing to resume in {folder}: starting at step 0")
    return log, found[1] if found else None


class Log:
    """Rows to out_dir/log.jsonl, less those after step `start`, and, if asked, to Weights & Biases."""

    def __init__(self, cfg, file, start, wandb_id):
        file.seek(0)
        end = 0
        with contextlib.suppress(ValueError):           # a row that was cut short ends what is kept
            while (row := file.readline()).endswith("\n") and json.loads(row)["step"] <= start:
                end = file.tell()
        file.truncate(end)                              # at once: rows before it cannot be lost
        self.file, self.run, self.wandb_id = file, None, wandb_id
        if cfg.wandb_log:
            import wandb
            self.run = wandb.init(project=cfg.wandb_project, name=Path(cfg.out_dir).name, id=wandb_id,
                                  config=dataclasses.asdict(cfg), resume="allow")
            self.wandb_id = self.run.id

    def write(self, **row):
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            fail(f"cannot write {self.file.name} ({error.strerror}); free some space and resume", code=1)
        try:
            if self.run:
                import wandb
                numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
                text = {"text": wandb.Table(["kind", "text"], row["text"])} if "text" in row else {}
                self.run.log({**numbers, **text}, step=row["step"])
        except Exception as error:                      # whatever it raises, the training is worth more than its picture
            print(f"warning: Weights & Biases is given up ({type(error).__name__}: {error})", file=sys.stderr)
            self.run = None


def log_in(cfg):
    """Ask Weights & Biases for an account before anything is made, if it is wanted."""
    if cfg.wandb_log:
        import wandb
        try:
            wandb.login()
        except wandb.errors.Error as error:
            fail(f"wandb_log=True, but {error}; run `wandb login` or set WANDB_MODE=offline")


def micro_batches(cfg, i, n):
    """The samples (indices within the step) of each batch that process i of n accumulates."""
    B = min(cfg.batch_size, cfg.samples // n)
    return [range(first, first + B) for first in range(i * B, cfg.samples, n * B)]


def batches_ahead(cfg, windows, start, device):
    """The batches of this process for the steps from `start` on, each made by a thread while the one before is at work."""
    thread, ahead = ThreadPoolExecutor(1), deque()
    wanted = ((step, samples) for step in range(start, cfg.max_steps) for samples in micro_batches(cfg, rank(), world_size()))
    try:
        for step, samples in wanted:
            ahead.append(thread.submit(make_batch, cfg, windows, step, samples, device))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        yield ahead.popleft().result()
    except ValueError as error:                         # of a damaged window, said when its turn has come
        fail(error)
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def train_step(model, cfg, batches, device, autocast):
    """Gradients of one optimizer step over all processes, from the next of `batches`; returns the mean loss of a token that counts
    and the seconds that this process waited for data."""
    total, waited, n = torch.zeros(2, dtype=torch.float64, device=device), 0.0, len(micro_batches(cfg, rank(), world_size()))
    for i in range(n):
        clock = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - clock
        unsynced = getattr(model, "no_sync", contextlib.nullcontext) if i < n - 1 else contextlib.nullcontext
        with unsynced():
            with autocast():
                loss, fit = model(batch)
            mean = (loss + fit) / cfg.batch_tokens
            (mean * world_size()).backward()                        # gradients are averaged over the processes
        total += torch.stack((loss.detach(), batch.counts.sum()))
    loss, tokens = reduce(total, device, dist.ReduceOp.SUM)
    if tokens != cfg.batch_tokens:                                      # known only now; divided by all tokens so far
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], cfg.batch_tokens / tokens)
    return loss / tokens, waited


def print_row(cfg, row, mfu):
    """The line of the log; a step much longer than its part that waits for data is the machine's, else the loader's."""
    mfu = f" mfu {mfu:.1%}" if mfu else ""
    left = format_time((cfg.max_steps - row["step"]) * row["step_ms"] / 1000)
    print("step {step}/{max_steps} loss {loss:.3f} lr {lr:.2e} grad {grad_norm:.2f} {tokens_per_second:,.0f} tokens/s{mfu} "
          "step {step_ms:.0f} ms data {data_ms:.0f} ms peak {peak_gb:.2f} GB left {left}".format(
              max_steps=cfg.max_steps, mfu=mfu, left=left, **row), flush=True)


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


def new_network(cfg, vocab_size, log_unigram=None):
    net = SunFish(cfg, vocab_size, log_unigram)
    if cfg.lora_rank:
        add_lora(net, cfg.lora_rank, cfg.lora_alpha)
    return net


def given_weights(cfg, base, vocab_size):
    """What a new network begins with, on the first process: all of `base`, GPT-2's vectors, or nothing."""
    resumes = cfg.resume and any(Path(cfg.out_dir).glob("ckpt_*.pt"))
    if base or rank() or resumes or cfg.prompt_table == "learned":
        return base["ema"] if base else {}
    try:
        return {"prompt_table": gpt2_vectors(cfg.prompt_file, vocab_size)}
    except ValueError as error:
        fail(error)


def first_weights(cfg, windows, given):
    """The state of a new network, with weights that are given."""
    torch.manual_seed(mix(cfg.seed, "weights"))         # hashed, or noise drawn with a plain seed would repeat them
    weights = new_network(cfg, windows.vocab_size, None if "table" in given else windows.unigram()).state_dict()
    return {**weights, **given}


def build(cfg, windows, checkpoint, given, device, dtype, compiled):
    """raw_model, ema, model and optimizer: from the checkpoint of the first process, or made by it with the weights that are given."""
    with torch.device("meta"):
        raw_model, ema = (new_network(cfg, windows.vocab_size) for _ in range(2))
    ema.requires_grad_(False)
    model = distribute(cfg, raw_model, ema, device, dtype, compiled)
    optimizer, resumed, state = make_optimizer(raw_model, cfg), share(bool(checkpoint)), dict(checkpoint or {})
    if rank() == 0 and (cfg.lora_rank or not checkpoint):
        weights = first_weights(cfg, windows, given)
        state.update({name: {**weights, **state.get(name, {})} for name in ("model", "ema")})
    restore_state(state, raw_model, ema, optimizer if resumed else None)
    return raw_model, ema, model, optimizer


def main(cfg):
    if rank():
        sys.stdout = open(os.devnull, "w")              # one voice; faults still go to stderr
    if cfg.dry_run:
        return dry_run(cfg) if rank() == 0 else None
    keep_memory()
    device, dtype, compiled = choose_machine(cfg)
    join_processes(device)
    cfg, base = begin_with(cfg)
    turn = 0 if rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for now in range(3):            # the first process, the first of each machine, the rest: there may be data to prepare
        if now == turn:
            data, train_windows, val_windows = open_data(cfg)
        wait()
    if share(data["fingerprint"]) != data["fingerprint"]:
        fail(f"the data of process {rank()}, {data['label']}, is not that of process 0; prepare the same on every machine")
    check_tokenizer(cfg, data, base)
    encoding, vocab_size = get_tokenizer(data["tokenizer"]), data["vocab_size"]
    given = given_weights(cfg, base, vocab_size)
    if base:
        data["base"] = {"label": base["data"]["label"], "licence": base["data"].get("licence", "unknown"), "steps": base["step"]}
    if data["kind"] == "instructions" and not cfg.init_from and rank() == 0:
        print("warning: without --init_from a new network learns from these examples alone", file=sys.stderr)

    log = checkpoint = None
    if rank() == 0:
        log_in(cfg)
        file, checkpoint = open_out_dir(cfg, data)
        named = {"base": fingerprint(given)} if cfg.lora_rank else {}
        if checkpoint and checkpoint.get("base") != named.get("base"):
            fail(f"the adapter in {cfg.out_dir} was trained on the network {checkpoint['base']}, and init_from={cfg.init_from} is {named['base']}")
        log = Log(cfg, file, checkpoint["step"] if checkpoint else 0, checkpoint and checkpoint["wandb_id"])
    start = share(checkpoint["step"] if checkpoint else 0)

    raw_model, ema, model, optimizer = build(cfg, train_windows, checkpoint, given, device, dtype, compiled)
    del checkpoint, base, given
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    print(f"settings: {describe(cfg)}")
    print(f"data: {data['label']}: {len(train_windows):,} {train_windows.what} of {cfg.block_size} tokens, "
          f"tokenizer {data['tokenizer']['name']}, {vocab_size:,} ids")
    trained = sum(p.numel() for p in raw_model.parameters() if p.requires_grad)
    print(f"model: {sum(p.numel() for p in raw_model.parameters()) / 1e6:.2f}M parameters, {trained / 1e6:.2f}M of them trained; a step is "
          f"{describe_batch(cfg)}; {'resuming at' if start else 'from'} step {start:,} of {cfg.max_steps:,}")
    clipped = [p for p in raw_model.parameters() if p.requires_grad and p is not raw_model.schedule]
    peak, flops = None if cfg.lora_rank else peak_flops(device), flops_per_token(raw_model, cfg.in_turns)
    stopped, leaving, saved, span = catch_signals(), 0, start, np.zeros(3)     # of the log: steps, seconds, waiting for data
    batches = batches_ahead(cfg, train_windows, start, device)
    for step in range(start, cfg.max_steps):
        clock = time.perf_counter()
        lr = set_learning_rate(optimizer, cfg, step)
        try:
            loss, waited = train_step(model, cfg, batches, device, autocast)
            grad_norm = whole(nn.utils.clip_grad_norm_(clipped, cfg.grad_clip or math.inf)).item()
            if not math.isfinite(loss + grad_norm):
                fail(f"step {step + 1}: loss {loss}, gradient norm {grad_norm} at lr {lr:.2e}; nothing was updated; resume "
                     f"from step {saved:,} with a lower learning_rate or grad_clip", code=1)
            optimizer.step()
        except torch.OutOfMemoryError:
            fail(f"out of memory with {cfg.sequences} sequences of {cfg.block_size} tokens, peak {peak_gb(device):.1f} "
                 "GB; halve batch_size, accumulation keeps the step the same", code=1)
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, raw_model, cfg.ema_decay, step)
        leaving, waited = reduce((max(stopped, default=0), waited), device, dist.ReduceOp.MAX)    # all leave, or none
        span += 1, time.perf_counter() - clock, waited
        done = step + 1
        last = leaving or done == cfg.max_steps
        if done % cfg.log_interval == 0 or last or done == start + 1:
            steps, seconds, waited = span
            span[:] = 0
            rate = steps * cfg.batch_tokens / seconds
            row = dict(step=done, loss=loss, lr=lr, grad_norm=grad_norm, tokens=done * cfg.batch_tokens, tokens_per_second=rate,
                       step_ms=1000 * seconds / steps, data_ms=1000 * waited / steps, peak_gb=peak_gb(device),
                       schedule=whole(raw_model.schedule).tolist())
            print_row(cfg, row, peak and rate * flops / peak / world_size())
            if log:
                log.write(**row)
        if done % cfg.save_interval == 0 or last:
            state = gather_state(raw_model, ema, optimizer)
            if log:
                save_checkpoint(cfg, step=done, data=data, wandb_id=log.wandb_id, **named, **state)
            saved = done
        if cfg.eval_interval and done % cfg.eval_interval == 0 or last and not leaving:
            network = whole_network(ema, cfg, vocab_size, device)
            if log:
                log.write(step=done, tokens=done * cfg.batch_tokens, **evaluate(network, cfg, val_windows, encoding))
        if leaving:
            break
    if saved < cfg.max_steps:
        print(f"saved step {saved:,} in {cfg.out_dir}; the same command with --resume=True goes on")
    else:
        print(f"done: step {cfg.max_steps:,}; python sample.py --checkpoint={cfg.out_dir}")
    code = 128 + int(leaving) if saved < cfg.max_steps else 0
    if dist.is_initialized():
        leave(log, code)
    if code:
        raise SystemExit(code)


def leave(log, code):
    """End one of several processes at once: gloo was seen to hang once, under load, while it was taken down in order."""
    if log and log.run:
        log.run.finish()
    with contextlib.suppress(RuntimeError):             # the other has left already, all is saved
        wait()                                          # torchrun ends all as soon as one leaves
    sys.stdout.flush()
    os._exit(code)


def format_time(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)         # a log file or pipe gets each line at once
    try:
        main(CFG)
    except BrokenPipeError:                             # a reader such as head has seen enough
        os._exit(141)
    except RuntimeError as error:
        if world_size() == 1 or not re.search("[Cc]onnection (closed|reset)|NCCL", str(error)):
            raise
        fail(f"process {rank()}: another process has ended, so this one cannot go on", code=1)
