"""
The network of SunFish: noisy token vectors in, scores over the vocabulary out.

A pre-norm transformer with full attention. Four things set it apart from a language model's usual trunk:
- the input at each position is the *context-free posterior mean* of the noisy vector, the best guess of the token from
  its own noise alone, so that a position drowned in noise looks blank instead of loud;
- a text is written in turns, in any order: the noisy tokens of a turn see each other, and what the same trunk has read of the
  clean tokens of earlier turns (the text twice, as in block diffusion, Arriola et al. 2025);
- each position carries its own noise level;
- the output adds the exact Gaussian log-likelihood of the noisy vector under every token (the output prior of Plaid,
  Gulrajani & Hashimoto 2023), so at initialisation the model already is that context-free posterior.
"""
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from configurator import ModelConfig

CLEAN, NOISY = -4.2, 6.0      # norm-free noise levels -log_snr - 2 log R beyond which nothing changes: readable, blind
LATER = 2 ** 31               # the turn of what is never read
ALL = slice(None)             # places: every one of a text
GAIN = 4                      # of what the head reads, for which Adam's steps of one size would else be small (bench/LOG.md)
GPT2_DIM = 768                # width of GPT-2's token vectors
KERNEL = 7                    # positions that the convolution before each attention mixes, three on either side
NEVER = -1e9                  # score of a padding id; finite, so that guidance cannot turn it into nan
FORMAT = 4                    # of a checkpoint file
EXPORT = ("model.safetensors", "config.json", "tokenizer.json")         # the files of a network that is shared
SCORES = 2 ** 25              # most scores over the vocabulary that stand in memory at once: 134 MB in float32


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, positions):
    """Rotary positions (Su et al. 2021): x (B, H, T, D) turned by its positions (T,)."""
    half = x.size(-1) // 2
    freq = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = positions[:, None] * freq                                     # (T, D / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def chunks(width, *inputs):
    """Inputs (M, ...) of a function of each position that needs `width` scores for it, cut into 1, 2, 4 ... equal parts, so many
    that the scores of one are no more than SCORES at once."""
    parts = 1 << (max(1, math.ceil(len(inputs[0]) * width / SCORES)) - 1).bit_length()
    size = math.ceil(len(inputs[0]) / parts) or 1
    return zip(*(x.split(size) for x in inputs), strict=True)


@torch.no_grad()
def in_chunks(f, width, *inputs):
    """f(*inputs), for inputs (B, T, ...), in chunks."""
    return torch.cat([f(*chunk) for chunk in chunks(width, *(x.flatten(0, 1) for x in inputs))]).unflatten(0, inputs[0].shape[:2])


class LossInChunks(torch.autograd.Function):
    """loss_in_chunks, as a node of the graph."""

    @staticmethod
    def forward(ctx, f, width, count, *inputs):
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[3:]) if need]
        shared, done = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs[:count])], []
        grads = {i: None if i < count else [] for i in wanted}
        for chunk in chunks(width, *inputs[count:]):
            leaves = [*shared, *(x.detach().requires_grad_(i in wanted) for i, x in enumerate(chunk, count))]
            with torch.enable_grad():
                losses = f(*leaves)
                found = torch.autograd.grad(losses.sum(), [leaves[i] for i in wanted], allow_unused=True) if wanted else ()
            done.append(losses.detach())
            for i, grad in zip(wanted, found, strict=True):
                if i >= count:
                    grads[i].append(grad)
                elif grad is not None:
                    grads[i] = grad.float() if grads[i] is None else grads[i].add_(grad)
        grads = {i: torch.cat(grad) if i >= count else grad.to(inputs[i].dtype) for i, grad in grads.items() if grad is not None}
        ctx.save_for_backward(*(grads.get(i) for i in range(len(inputs))))
        done = torch.cat(done)
        ctx.mark_non_differentiable(done)
        return done.sum(), done

    @staticmethod
    def backward(ctx, grad, _):
        return None, None, None, *(None if x is None else grad * x for x in ctx.saved_tensors)


def loss_in_chunks(f, width, shared, *inputs):
    """(sum, all) of the losses f(*shared, *inputs) (M,) of inputs (M, ...), in chunks: the sum has gradients, and all have none.

    The gradients are made with the losses, chunk by chunk, so that scores are made once and never kept (as in Liger Kernel,
    Hsu et al. 2024)."""
    return LossInChunks.apply(f, width, len(shared), *shared, *inputs)


def visible(group, places, relation):
    """Where relation(turn of another token, own turn) holds for the n tokens at these places of group (B, T): for attention
    (B, 1, n, T), and for the neighbours in the convolution (B, n, KERNEL)."""
    own = group[:, places, None]
    around = F.pad(group, (KERNEL // 2, KERNEL // 2), value=LATER).unfold(1, KERNEL, 1)[:, places]
    return relation(group[:, None], own)[:, None], relation(around, own)


def score_mask(mask, dtype):
    """What is added to the scores of an attention that sees where the mask is True; None, for all, stays None."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, NEVER)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D) + mask) v of (B, H, T, D). torch has kernels for it, of which the one for bfloat16 on a CPU takes
    two to four times as long as plain products (bench/LOG.md)."""
    if v.device.type != "cpu" or v.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ v


class Past(NamedTuple):
    """Clean tokens as each block has read them, for n tokens that are written after them."""
    blocks: list                   # of each: what its convolution reads (B, T, n_embd), keys and values (B, H, T, D), the prompt's
    attend: torch.Tensor           # (B, 1, n, T + n) of n noisy tokens: which clean ones, then which noisy ones they see
    near: tuple                    # the same for the convolution: two of (B, n, KERNEL)
    places: Any                    # where the noisy tokens stand: ALL, or (n,)
    taps: tuple = (None, None)     # if they are not ALL: which clean ones and which of the n the convolution reads, two of (n, KERNEL)
    fresh: int = 0                 # the first so many of the n are clean, new ones, which the next pass will put into blocks

    def read(self):
        """The Past after that pass."""
        m = self.fresh
        if not m:
            return self
        clean, noisy = self.taps
        return Past(self.blocks, self.attend[:, :, m:], tuple(near[:, m:] for near in self.near), self.places[m:],
                    (clean[m:], (noisy[m:] - m).clamp(min=0)))


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys, from x to itself or to a context."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.q = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.kv = nn.Linear(cfg.n_embd, 2 * cfg.n_embd, bias=False)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def heads(self, x):
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)                        # (B, H, T, D)

    def keys(self, context, pos):
        k, v = map(self.heads, self.kv(context).chunk(2, -1))
        return rotate(norm(k), pos).to(v.dtype), v

    def forward(self, x, pos, k, v, mask=None):
        q = rotate(norm(self.heads(self.q(x))), pos).to(v.dtype)
        return self.out(attention(q, k, v, mask).transpose(1, 2).flatten(2))             # (B, T, n_embd)


class Block(nn.Module):
    """x (B, n, n_embd) -> x, and what a later turn reads of it: an element of Past.blocks. The prompt's keys and values are
    those of `past`, if there is one; the first `fresh` of x are put into it, in place. With only_left, as for the last block of
    clean tokens, whose x nobody reads, None for x."""

    def __init__(self, cfg, cross):
        super().__init__()
        d = cfg.n_embd
        self.attn = Attention(cfg)
        self.cross = Attention(cfg) if cross else None
        self.cross_gate = nn.Parameter(torch.zeros(d)) if cross else None
        self.local = nn.Parameter(torch.randn(KERNEL, d) * KERNEL ** -0.5)
        self.up = nn.Linear(d, 4 * d, bias=False)
        self.down = nn.Linear(4 * d, d, bias=False)
        self.offset = nn.Parameter(torch.zeros(6 * d))                    # this layer's own part of the modulation

    def mix(self, x, near=None, taps=None):
        """A depthwise convolution of x (B, T, n_embd), of those neighbours that are `near` (B, T, KERNEL); or at n places, whose
        neighbours in x are the taps (n, KERNEL)."""
        padded, T = F.pad(x, (0, 0, KERNEL // 2, KERNEL // 2)) if taps is None else None, x.size(1)
        shifted = ((padded[:, i:i + T] if taps is None else x[:, taps[:, i]]) * self.local[i] for i in range(KERNEL))
        return sum(shifted if near is None else (x * near[..., i:i + 1] for i, x in enumerate(shifted)))

    def forward(self, x, noise, pos, context, context_pos, mask, attend=None, near=(None,), past=None, places=ALL, taps=(None, None),
                fresh=0, only_left=False):
        scale1, shift1, gate1, scale2, shift2, gate2 = (noise + self.offset).chunk(6, -1)
        local = norm(x)
        if fresh:
            past[0].index_copy_(1, places[:fresh], local[:, :fresh])
        x = x + self.mix(local, near[-1], taps[-1])
        if past is not None:
            x = x + self.mix(past[0], near[0], taps[0])
        y = norm(x) * (1 + scale1) + shift1
        k, v = own = self.attn.keys(y, pos)
        crossed = () if self.cross is None else self.cross.keys(context, context_pos) if past is None else past[3:]
        if only_left:
            return None, (local, *own, *crossed)
        for old, new in zip(past[1:3], own, strict=True) if fresh else ():
            old.index_copy_(2, places[:fresh], new[:, :, :fresh])
        if past is not None:
            k, v = (torch.cat((old, new[:, :, fresh:]), 2) for old, new in zip(past[1:3], own, strict=True))
        x = x + gate1 * self.attn(y, pos, k, v, attend)
        if self.cross is not None:
            x = x + self.cross_gate * self.cross(norm(x), pos, *crossed, mask)
        y = norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(y))), (local, *own, *crossed)


class SunFish(nn.Module):
    """x_t (B, n, C), log_snr (B, n), x_prev (B, n, C) and a prompt (B, P) of token ids, visible where prompt_mask (B, P),
    -> logits (B, n, V) in float32, or eps_hat (B, n, C) for objective eps. V is vocab_size padded to a multiple of 64.

    Tokens may be written in turns: each then reads the noisy tokens of its own turn, and the clean ones of earlier turns in
    `past`, which `remember` makes. Without it all are written together, in full attention.

    log_unigram (vocab_size,) holds the log frequencies of the training text; the default is uniform.
    """

    def __init__(self, cfg, vocab_size, log_unigram=None):
        super().__init__()
        self.cfg, self.vocab_size, self.dtype = cfg, vocab_size, torch.float32       # of the products, without autocast
        self.apart = False              # whether scores are two products, of the head and of the table, and not one of both
        C, d, V = cfg.token_dim, cfg.n_embd, -(-vocab_size // 64) * 64
        self.table = nn.Parameter(torch.randn(V, C))
        self.register_buffer("log_unigram", torch.full((V,), NEVER))
        self.log_unigram[:vocab_size] = -math.log(vocab_size) if log_unigram is None else log_unigram
        self.read = nn.Linear(2 * C, d, bias=False)
        self.register_buffer("prompt_table", torch.zeros(vocab_size, GPT2_DIM, dtype=torch.float16) if cfg.prompt_table == "gpt2" else None)
        self.prompt_in = nn.Linear(C if self.prompt_table is None else GPT2_DIM, d, bias=False)
        self.null = nn.Parameter(torch.randn(1, 1, d))
        self.time_in = nn.Linear(64, d // 2)
        self.time_out = nn.Linear(d // 2, 6 * d)
        self.blocks = nn.ModuleList(Block(cfg, (i + 1) % cfg.cross_every == 0) for i in range(cfg.n_layer))
        self.head = nn.Linear(d, C if cfg.objective == "eps" else V)
        self.schedule = nn.Parameter(self.first_schedule())
        self.init_weights()

    def first_schedule(self):
        """mu, log beta and log height of the fitted schedule at the start; the height is the unigram entropy in nats."""
        p = self.log_unigram.double().exp()
        entropy = -(p * self.log_unigram).sum()
        return torch.stack((torch.tensor(-1.9).to(entropy), entropy.new_tensor(0.85).log(), entropy.log())).float()

    @torch.no_grad()
    def init_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features ** -0.5)
        for b in self.blocks:
            for m in (b.attn.out, b.down):
                m.weight.mul_((2 * len(self.blocks)) ** -0.5)
        for zero in (*self.head.parameters(), *self.time_out.parameters()):
            nn.init.zeros_(zero)
        d = self.cfg.n_embd
        self.time_out.bias[2 * d:3 * d] = 1.0
        self.time_out.bias[5 * d:] = 1.0
        self.read.weight[:, self.cfg.token_dim:].zero_()
        self.table.requires_grad_(self.cfg.objective != "eps")
        self.schedule.requires_grad_(self.cfg.objective != "eps" and self.cfg.schedule == "gumbel")

    def embedding(self):
        return F.normalize(self.table.float(), dim=-1) * math.sqrt(self.cfg.token_dim)

    def precision(self, log_snr):
        """a / s^2 of a noise level, its signal-to-noise ratio clipped to what matters."""
        g = self.level(log_snr)
        log_snr = -g - math.log(self.cfg.token_dim)
        return (0.5 * log_snr).exp() * (1 + log_snr.exp()).sqrt()        # a/s^2 = sqrt(snr) / s, 1/s^2 = 1 + snr

    def level(self, log_snr):
        return (-log_snr - math.log(self.cfg.token_dim)).clamp(CLEAN, NOISY)

    def signal(self, x_t, log_snr):
        """What x_t (B, T, C) says of its token: log p(x_t | token) up to a constant is its product with the token's vector."""
        return self.precision(log_snr)[..., None] * x_t.detach()

    def likelihood(self, x_t, log_snr, E):
        """log unigram + log p(x_t | token) up to a constant: (B, T, V)."""
        return F.linear(self.signal(x_t, log_snr), E, self.log_unigram)

    @torch.no_grad()
    def posterior_mean(self, x_t, log_snr, E):
        """E[x_0 | x_t] of each token by itself, which the network reads: (B, T, C). For objective eps x_t itself."""
        if self.cfg.objective == "eps":
            return x_t
        return in_chunks(lambda *x: self.likelihood(*x, E).softmax(-1) @ E, len(E), x_t, log_snr)

    def forward(self, x_t, log_snr, x_prev, prompt=None, prompt_mask=None, past=None, E=None):
        E = self.embedding() if E is None else E
        mean = self.posterior_mean(x_t, log_snr, E)
        hidden = self.hidden(mean, log_snr, x_prev, prompt, prompt_mask, past, E)
        return self.answer(self.features(hidden, x_t, log_snr), *self.readout(E))

    def hidden(self, mean, log_snr, x_prev, prompt, prompt_mask, past, E, fresh=None):
        """What the answer is read from, given the posterior mean: (B, n, n_embd). Where the prompt and the past have several rows
        for each of the mean's, there are so many: (branches * B, n, n_embd). The ids fresh (B, past.fresh) are read on the way."""
        branches, m = 1 if prompt is None else len(prompt) // len(mean), past.fresh if past else 0
        if m:
            mean, log_snr = torch.cat((E[fresh], mean), 1), F.pad(log_snr, (m, 0), value=math.inf)
            x_prev = F.pad(x_prev, (0, 0, m, 0))
        if branches > 1:
            mean, log_snr, x_prev = (torch.cat([x] * branches) for x in (mean, log_snr, x_prev))
        return norm(self.trunk(mean, log_snr, x_prev, prompt, prompt_mask, E, past)[0][:, m:])

    def remember(self, idx, group, prompt=None, prompt_mask=None, E=None):
        """Tokens idx (B, T), written in the turns group (B, T), as each block has read them: Past.blocks."""
        E = self.embedding() if E is None else E
        level, x_0, sight = torch.full((1, 1), math.inf, device=idx.device), E[idx], visible(group, ALL, torch.le)
        return self.trunk(x_0, level, torch.zeros_like(x_0), prompt, prompt_mask, E, sight=sight, clean=True)[1]

    def look_back(self, blocks, group, places=ALL, fresh=None):
        """The Past of the tokens at these places, at a point where all of smaller turns in group (B, T) are in `blocks`, or are
        those at the places `fresh`, which the next pass reads as well."""
        (attend, near), (attend_own, near_own) = (visible(group, places, relation) for relation in (torch.lt, torch.eq))
        attend, near = torch.cat((attend, attend_own[..., places]), -1), (near, near_own)
        if isinstance(places, slice):
            return Past(blocks, attend, near, places)
        m = 0 if fresh is None else len(fresh)
        if m:
            clean, around = visible(group, fresh, torch.le)
            attend = torch.cat((F.pad(clean, (0, len(places))), attend), 2)
            near = torch.cat((around, near[0]), 1), F.pad(near_own, (0, 0, m, 0))
            places = torch.cat((fresh, places))
        around = (places[:, None] + torch.arange(-(KERNEL // 2), KERNEL // 2 + 1, device=places.device)).clamp(0, group.size(1) - 1)
        number = torch.full_like(group[0], -1).index_copy(0, places, torch.arange(len(places), device=places.device))[around]
        return Past(blocks, attend, (near[0], near[1] & (number >= 0)), places, (around, number.clamp(min=0)), m)

    def features(self, hidden, x_t=None, log_snr=None):
        """What `answer` multiplies with the readout, of hidden (..., n_embd): (..., K). For tokens that is what the head reads and,
        if there is an x_t (..., C), what this says of its token."""
        own = GAIN * hidden
        return own if x_t is None or self.cfg.objective == "eps" else torch.cat((own, self.signal(x_t, log_snr)), -1)

    def readout(self, E):
        """Weight (V, K) and bias (V,) of the last product, to be made once for all calls; under autocast in its dtype."""
        if self.cfg.objective == "eps":
            return self.head.weight, self.head.bias
        kind = E.device.type
        weight = E if self.apart else torch.cat((self.head.weight, E), 1)
        weight = weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight
        return weight, self.log_unigram if self.apart else self.head.bias + self.log_unigram

    def answer(self, features, weight, bias):
        """What forward returns, of features (..., K): for tokens the likelihood of x_t, if there is one, plus what the head says."""
        if self.apart:
            own, signal = features[..., :self.cfg.n_embd], features[..., self.cfg.n_embd:]
            return self.head(own).float() + F.linear(signal, weight[:, :signal.size(-1)], bias).float()
        return F.linear(features, weight[:, :features.size(-1)], bias).float()

    def trunk(self, mean, log_snr, x_prev, prompt, prompt_mask, E, past=None, sight=(None, None), clean=False):
        """The last block's output (B, n, n_embd), but of `clean` tokens None, and what each block leaves to a Past. One noise
        level for all may be (1, 1)."""
        B, n, _ = mean.shape
        x = self.read(torch.cat((mean, x_prev), -1))                     # (B, n, n_embd)
        dtype, x = x.dtype, x.float()
        freq = torch.exp(torch.linspace(0, math.log(100.0), 32, device=x.device))
        angle = self.level(log_snr)[..., None] / 10 * freq
        noise = self.time_out(F.silu(self.time_in(torch.cat((angle.sin(), angle.cos()), -1)))).to(x.dtype)
        T, places, taps, fresh = (past.blocks[0][0].size(1), past.places, past.taps, past.fresh) if past else (n, ALL, (None, None), 0)
        pos = torch.arange(T, device=x.device)[places]
        context, context_pos = self.null.expand(B, 1, -1), torch.zeros_like(pos[:1])
        if prompt is not None and not past:
            vectors = E[prompt] if self.prompt_table is None else self.prompt_table[prompt].to(E.dtype)
            context = torch.cat((context, self.prompt_in(vectors)), 1)
            context_pos = torch.cat((context_pos, torch.arange(-prompt.size(1), 0, device=x.device)))
        mask = None if prompt is None else F.pad(prompt_mask, (1, 0), value=True)[:, None, None]
        attend, *near = (past.attend, *past.near) if past else sight
        mask, attend = score_mask(mask, dtype), score_mask(attend, dtype)
        left = []
        for i, block in enumerate(self.blocks):
            before, only_left = past.blocks[i] if past else None, clean and i == len(self.blocks) - 1
            x, own = block(x, noise, pos, context, context_pos, mask, attend, near, before, places, taps, fresh, only_left)
            left.append(own)
        return x, left


class LoRA(nn.Linear):
    """A linear layer whose weight (out, in) stays as it is, plus scale * B A of a low rank (Hu et al. 2021)."""

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(model, rank, alpha):
    """Freeze a network and give each linear layer of its blocks an adapter that begins at zero: alpha / rank * B A."""
    model.requires_grad_(False)
    for layer in [m for m in model.blocks.modules() if type(m) is nn.Linear]:
        layer.__class__, layer.scale = LoRA, alpha / rank
        layer.lora_A = nn.Parameter(torch.randn(rank, layer.in_features) * layer.in_features ** -0.5)
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))


@torch.no_grad()
def merge_lora(model):
    """Add each adapter to its weight, and leave plain linear layers."""
    for layer in [m for m in model.blocks.modules() if type(m) is LoRA]:
        layer.weight += layer.scale * layer.lora_B @ layer.lora_A
        del layer.lora_A, layer.lora_B, layer.scale
        layer.__class__ = nn.Linear


class Int8(nn.Module):
    """A linear layer with its weight (out, in) as int8, and a scale for each row: the largest magnitude is 127 of it."""

    def __init__(self, layer, dtype):
        super().__init__()
        self.dtype = dtype                                                      # of what it multiplies with
        rows = [self.round(weight.float()) for weight in layer.weight.split(1024)]      # few at a time, to save memory
        weight, scale = map(torch.cat, zip(*rows, strict=True))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(dtype))

    @staticmethod
    def round(weight):
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        return (weight / scale[:, None]).round().to(torch.int8), scale

    def forward(self, x):
        x = F.linear(x, self.weight.to(self.dtype)) * self.scale
        return x if self.bias is None else x + self.bias


def quantize(model, dtype):
    """Make the weights of a network's linear layers int8, in place. Table, norms and the products themselves stay as they are."""
    model.apart = model.cfg.objective != "eps"
    for name, layer in [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and (model.apart or m is not model.head)]:
        model.set_submodule(name, Int8(layer, dtype))


def choose_device(name):
    """The torch.device of "auto", "cpu", "cuda" or "cuda:1"; ValueError if it is not there."""
    cuda = torch.cuda.is_available()
    name = ("cuda" if cuda else "cpu") if name == "auto" else name
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device={name} is unknown; use auto, cpu or cuda")
    if name.startswith("cuda") and not cuda:
        raise ValueError(f"device={name}, but torch {torch.__version__} sees no CUDA device; use --device=cpu")
    device = torch.device(name)
    if cuda and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}, but there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def has_bf16(device):
    """Whether the device multiplies bfloat16 in hardware; a CPU that emulates it is slower than with float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def peak_flops(device):
    """Published dense bf16 FLOP/s of the CUDA device, or None."""
    known = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for key, flops in known.items() if key in name), None)


def peak_gb(device):
    """The most memory so far in GB: of tensors on a CUDA device, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():                 # and not getrusage, which counts what the parent of a new process held
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024 / 1e9
    import resource                                          # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 976562.5)


def trunk_products(cfg, T):
    """Multiply-adds of the trunk's matrix products for one of T tokens that all see each other, keys of the prompt aside."""
    d, crossed = cfg.n_embd, cfg.n_layer // cfg.cross_every
    return (cfg.n_layer * (12 * d * d + 2 * T * d) + crossed * (2 * d * d + 2 * (1 + cfg.prompt_size) * d)     # attention and MLP
            + 2 * cfg.token_dim * d + 32 * d + 3 * d * d)                                              # read; noise level


def flops_per_token(model, in_turns):
    """FLOPs of a training step per token: two for each multiply-add of its matrix products, forward, and twice that backward.

    That is the noisy pass and its scores; if in_turns, the clean pass, of whose last block only keys and values are made; and
    the two products of the posterior mean, forward only. First guesses, which few sequences get, are not counted.
    """
    cfg, head = model.cfg, model.head.weight.numel()
    table = 0 if cfg.objective == "eps" else model.table.numel()
    d, T, P = cfg.n_embd, cfg.block_size, cfg.prompt_size
    trunk, past = trunk_products(cfg, T), 2 * T * d * cfg.n_layer * in_turns
    prompt, read = cfg.n_layer // cfg.cross_every * 2 * d * d * (1 + P) / T, model.prompt_in.weight.numel() * P / T
    last = 10 * d * d + 2 * T * d + (2 * d * d + 2 * (1 + P) * d) * (cfg.n_layer % cfg.cross_every == 0)
    level = 32 * d + 3 * d * d                                                  # one for all in the clean pass
    return (6 * (prompt + (trunk - last - level) * in_turns + trunk + past + head) + (6 if model.prompt_table is None else 4) * read + 8 * table)


def keep_memory():
    """Let glibc reuse the memory of large tensors, in huge pages: returning it to the kernel and faulting it in again took
    half of a training step on a CPU (bench/LOG.md). To be called before the first tensor; elsewhere it does nothing."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")       # torch then aligns tensors from 2 MB on to pages of that size
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                  # M_MMAP_MAX: no allocation through mmap
        libc.mallopt(-1, 2 ** 31 - 1)        # M_TRIM_THRESHOLD: do not shrink the heap


def write_checkpoint(path, content):
    """Write a dict of plain types and tensors, complete or not at all; OSError names the file and the bytes needed."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(format=FORMAT, **content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:        # a full disk is a RuntimeError of torch.save
        temporary.unlink(missing_ok=True)
        needed = sum(x.nbytes for x in tree_leaves(content) if isinstance(x, torch.Tensor))
        raise OSError(f"could not write {path} ({error}); it needs {needed:,} bytes") from None


def read_checkpoint(path):
    """The content of a checkpoint file, its tensors mapped from the disk. Only plain types are unpickled, and every byte
    is checked first.

    Raises ValueError if the file is not a sound checkpoint: torch.load alone does not notice a flipped bit.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{path} is damaged at {damaged}")
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:              # zipfile, zlib and the unpickler raise a dozen kinds
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a sound checkpoint ({why})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a SunFish checkpoint of format {FORMAT}")
    return content


def write_export(folder, content, **more):
    """Write the averaged network of a checkpoint's content to a folder, to be shared: model.safetensors, config.json with `more`
    plain values, tokenizer.json. Raises ImportError without the safetensors package, and OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = {key: value for key, value in content["data"].items() if key != "tokenizer"}
    config = dict(model_type="sunfish", format=FORMAT, step=content["step"], fingerprint=fingerprint(content["ema"]),
                  config=dataclasses.asdict(model_config(content)), data=data, **more)
    try:
        save_file({name: x.contiguous() for name, x in content["ema"].items()}, folder / "model.safetensors")
    except SafetensorError as error:                    # a full disk
        raise OSError(error) from None
    (folder / "model.safetensors").chmod(0o644)                         # it would be for its owner only
    for name, values in (("tokenizer", content["data"]["tokenizer"]), ("config", config)):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_export(folder):
    """What `write_export` wrote, as the content of a checkpoint; ValueError if it is not sound."""
    try:
        from safetensors.torch import load_file
        config, tokenizer = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "tokenizer"))
        content = {**config, "data": {**config["data"], "tokenizer": tokenizer}, "ema": load_file(folder / "model.safetensors")}
    except ImportError:
        raise ValueError(f"{folder} is read with safetensors; pip install safetensors") from None
    except Exception as error:              # of json, of files, of safetensors
        raise ValueError(f"{folder} is not a sound export ({(str(error) or type(error).__name__).splitlines()[0]})") from None
    if content.get("format") != FORMAT or content.get("fingerprint") != fingerprint(content["ema"]):
        raise ValueError(f"{folder} is not a sound export of format {FORMAT}: its weights are not those that config.json names")
    return content


def gpt2_vectors(path, vocab_size):
    """GPT-2's token vectors (vocab_size, GPT2_DIM), to unit variance: of a safetensors file with wte.weight, or, for no path, of the
    public checkpoint, fetched once. ValueError if they cannot be had or are for another vocabulary."""
    try:
        from safetensors import safe_open
        path = path or Path(download("openai-community/gpt2", "model.safetensors"), "model.safetensors")
        with safe_open(path, "pt") as file:
            table = file.get_tensor(next(name for name in file.keys() if name.endswith("wte.weight"))).float()
    except ImportError:
        raise ValueError("prompt_table=gpt2 is read with safetensors; pip install safetensors") from None
    except Exception as error:              # of the hub, of files, of safetensors; StopIteration if no such tensor is there
        why = (str(error) or "no tensor wte.weight").splitlines()[0]
        raise ValueError(f"GPT-2's vectors: {why}{f' ({path})' if path else ''}; name a copy of openai-community/gpt2's model.safetensors "
                         "with --prompt_file") from None
    if table.shape != (vocab_size, GPT2_DIM):
        raise ValueError(f"GPT-2's vectors are {tuple(table.shape)}, and this text needs {(vocab_size, GPT2_DIM)}: they are for GPT-2's "
                         "tokenizer; prepare the text with --tokenizer=gpt2, or use --prompt_table=learned")
    return (table / table.std()).half()


def download(name, *files):
    """A folder with these files of user/name on the Hugging Face hub, fetched once; without the hub what was fetched before.
    ValueError if they cannot be had."""
    from huggingface_hub import HfApi, snapshot_download
    why = None
    try:
        HfApi().model_info(name, timeout=5)             # the download itself would try for half a minute
    except Exception as error:              # whatever the hub and the libraries below it raise
        why = (str(error) or type(error).__name__).splitlines()[0]
    try:
        return snapshot_download(name, allow_patterns=list(files), local_files_only=bool(why))
    except Exception as error:
        why = why or (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot fetch {name} ({why}); check the name, the network and HF_TOKEN") from None


def find_checkpoint(place):
    """(path, content) of the file `place`, of an export in a folder or, as hf:user/name, on the Hugging Face hub, or of the last
    sound checkpoint in the folder, or else in the folder below it that was written last; None if there is none. A damaged
    file is passed over with a warning; ValueError if all are.
    """
    place = Path(download(place[3:], *EXPORT) if str(place).startswith("hf:") else place)
    if (place / "model.safetensors").exists():
        return place, read_export(place)
    below = [] if place.is_file() else sorted(place.rglob("ckpt_*.pt"), key=os.path.getmtime)
    here = place if place in {path.parent for path in below} or not below else below[-1].parent
    paths = [place] if place.is_file() else sorted(here.glob("ckpt_*.pt"), reverse=True)
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            print(f"warning: {error}", file=sys.stderr)
    if paths:
        raise ValueError(f"no sound checkpoint in {place}")
    return None


def model_config(checkpoint):
    """The settings of the network in a checkpoint's content."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    return ModelConfig(**{k: v for k, v in checkpoint["config"].items() if k in names})


def fingerprint(state):
    """A hash of the weights of a network, which an adapter for it carries."""
    digest = hashlib.blake2b(digest_size=16)
    for name, x in sorted(state.items()):
        digest.update(name.encode())
        digest.update(x.contiguous().numpy())
    return digest.hexdigest()


def merged(base, adapter):
    """The content of a checkpoint whose network is that of `base` with an adapter's change; ValueError if that is of another."""
    if adapter["base"] != fingerprint(base["ema"]):
        raise ValueError(f"the adapter was trained on the network {adapter['base']} (init_from={adapter['config']['init_from']}), "
                         f"and this is {fingerprint(base['ema'])}")
    model = SunFish(model_config(adapter), adapter["data"]["vocab_size"])
    model.load_state_dict(base["ema"])
    add_lora(model, adapter["config"]["lora_rank"], adapter["config"]["lora_alpha"])
    model.load_state_dict(adapter["ema"], strict=False)
    merge_lora(model)
    return {**adapter, "ema": model.state_dict()}


def to_read(model, device, dtype, int8=False):
    """The network, ready to use, the weights of its products in dtype, or in int8."""
    model.requires_grad_(False)
    if int8:
        quantize(model, dtype)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.to(dtype)
    model.dtype = dtype
    return model.to(device).eval()


def load_model(checkpoint, device="cpu", dtype=torch.float32, int8=False):
    """The averaged network of a checkpoint's content, ready to use."""
    model = SunFish(model_config(checkpoint), checkpoint["data"]["vocab_size"])
    model.load_state_dict(checkpoint["ema"])
    return to_read(model, device, dtype, int8)
