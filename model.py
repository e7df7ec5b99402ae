"""
The network of SunFish: a bidirectional pre-norm transformer over token vectors, some clean and some noisy.

A text is written in blocks of tokens. A noisy token sees the noisy tokens of its own block and the clean ones of all
earlier blocks (block diffusion, Arriola et al. 2025), so both stand in one sequence: in training T clean tokens, then T
noisy ones; in generation the clean tokens decided last, then those that are being denoised, after a KV cache.

- The network reads of a noisy token the posterior mean E[x_0 | x_t], the best guess from this token's noise alone: a
  token drowned in noise looks blank instead of loud.
- Its logits are the head's output plus the log unigram plus, exactly, log p(x_t | token) (the output prior of Plaid,
  Gulrajani & Hashimoto 2023). At initialisation the head is zero.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import diffusion
from configurator import UserError, in_range, one_of
from diffusion import CLEAN, LATER, NOISY

GAIN = 4                      # scale of the head's input, acts as its learning rate; 1 was 0.15 nats worse
GPT2_DIM = 768                # width of GPT-2's token vectors
KERNEL = 7                    # tokens that the convolution mixes, three on either side
HALF = KERNEL // 2
FLEX = 128                    # queries and keys that flex_attention takes at a time
NEG = -1e9                    # score of a masked token or a padding id; finite, so that guidance cannot make it nan


@dataclass(frozen=True)
class ModelConfig:
    n_layer: int = 8                 # transformer layers
    n_head: int = 8                  # attention heads
    n_embd: int = 512                # width of the transformer
    token_dim: int = 136             # width C of a token vector, the space that is diffused
    block_size: int = 512            # tokens in a window
    prompt_size: int = 64            # most tokens of prompt that cross-attention sees
    cross_every: int = 1             # cross-attention to the prompt in every n-th layer
    objective: str = "ce"            # ce: cross-entropy of the token; eps: squared error of the noise
    prompt_table: str = "learned"    # the prompt's vectors: learned, those that are diffused; gpt2: GPT-2's own, frozen
    schedule: str = "gumbel"         # noise schedule: gumbel (fitted while training), linear, cosine
    timesteps: int = 1000            # noise levels in the schedule
    beta_start: float = 1e-4         # first beta of schedule=linear at 1000 timesteps
    beta_end: float = 0.02           # last beta of schedule=linear at 1000 timesteps

    def check(self):
        """Raise UserError for a network that cannot be built."""
        in_range(self, 1, 1000, "n_layer", "n_head", "cross_every")
        in_range(self, 1, 2**16, "n_embd", "token_dim", "prompt_size")
        in_range(self, 1, 1e6, "block_size")
        in_range(self, 2, 1e6, "timesteps")
        in_range(self, 1e-9, 0.999, "beta_start", "beta_end")
        one_of(self, "objective", "ce", "eps")
        one_of(self, "prompt_table", "learned", "gpt2")
        one_of(self, "schedule", "gumbel", "linear", "cosine")
        if self.n_embd % (2 * self.n_head):
            near = max(1, round(self.n_embd / (2 * self.n_head))) * 2 * self.n_head
            raise UserError(f"n_embd={self.n_embd} is not a multiple of 2 * n_head={2 * self.n_head}; try {near}")
        if self.cross_every > self.n_layer:
            raise UserError(f"cross_every={self.cross_every} is more than n_layer={self.n_layer}, so no layer would "
                            f"see the prompt; try {self.n_layer}")
        if self.beta_start > self.beta_end:
            raise UserError(f"beta_start={self.beta_start} is more than beta_end={self.beta_end}; try 1e-4 and 0.02")


# ---- who sees whom ----

class Layout(NamedTuple):
    """Where the N tokens of a sequence stand in the text, and whom they see. A mask is (B, 1, tokens, keys), True where
    attention sees a key, or a BlockMask; None is all."""
    num_clean: int                 # the first of the N tokens are clean, the others noisy
    pos: torch.Tensor              # (N,) int64 positions
    mask: object                   # of all queries; in training of the T noisy ones, over T clean, then T noisy keys
    clean_mask: object             # in training: of the T clean queries, over the clean keys
    near: torch.Tensor | None      # (B, n, KERNEL) True where the convolution sees a neighbour; None: all
    own: torch.Tensor | None       # (B, T, KERNEL), in training: True where a noisy token's neighbour is the noisy copy


class Prompt(NamedTuple):
    """What cross-attention sees: a null token, then the prompt's tokens."""
    context: torch.Tensor          # (B, 1 + P, n_embd)
    rope: tuple                    # `rotary` of positions 0, then -P .. -1
    mask: torch.Tensor             # (B, 1, 1, 1 + P) True where visible


def training_masks(order):
    """Given the order (B, T) of blocks, whom T clean tokens see of the clean ones (B, 1, T, T), and T noisy tokens of
    clean and then noisy ones (B, 1, T, 2T)."""
    own, other = order[:, None, :, None], order[:, None, None]
    return other <= own, torch.cat((other < own, other == own), -1)


def flex_masks(order):
    """`training_masks` for flex_attention, which skips tiles of FLEX x FLEX where nothing is seen: the lowest and the
    highest order of a tile's queries and keys tell."""
    def clean(b, h, q, k):
        return order[b, k] <= order[b, q]

    def noisy(b, h, q, k):
        own, other = order[b, q], order[b, k % order.size(1)]
        return torch.where(k < order.size(1), other < own, other == own)
    tiles = order.unflatten(1, (-1, FLEX))
    q_low, q_high = tiles.amin(-1)[:, None, :, None], tiles.amax(-1)[:, None, :, None]
    k_low, k_high = q_low.mT, q_high.mT
    some = torch.cat((k_low < q_high, (k_low <= q_high) & (k_high >= q_low)), -1)      # (B, 1, T / FLEX, 2 T / FLEX)
    every = torch.cat((k_high < q_low, (k_low >= q_high) & (k_high <= q_low)), -1)
    return tiled(clean, k_low <= q_high, k_high <= q_low), tiled(noisy, some, every)


def tiled(mask_mod, some, every):
    """The BlockMask of a mask_mod, in whose tiles of queries x keys (B, 1, n, m) some or every pair is seen; `some` may
    be true of too many."""
    def listed(tiles):                                                     # how many, and their numbers before the rest
        return tiles.sum(-1, dtype=torch.int32), tiles.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(*listed(some & ~every), *listed(every), BLOCK_SIZE=FLEX, mask_mod=mask_mod)


def neighbours(order):
    """The order of the KERNEL tokens around each token of order (B, T): (B, T, KERNEL)."""
    return F.pad(order, (HALF, HALF), value=2 * LATER).unfold(1, KERNEL, 1)


def training_layout(order, T, device, flex=False):
    """The Layout of T clean and T noisy tokens, or, with order None, of one block of T noisy ones."""
    pos = torch.arange(T, device=device)
    if order is None:
        return Layout(0, pos, None, None, None, None)
    around, own = neighbours(order), order[..., None]
    clean_mask, mask = (flex_masks if flex else training_masks)(order)
    return Layout(T, pos.repeat(2), mask, clean_mask, around <= own, around == own)


class LayerCache:
    """What a layer keeps of a text of `size` tokens, by position: keys and values, and the convolution's input; and
    keys and values of the prompt. A call overwrites its positions: noisy tokens at every step of a block, clean ones in
    the first call of the next."""

    def __init__(self, size):
        self.size = size
        self.k = self.v = self.local = self.prompt = None

    def write(self, k, v, pos):
        """All keys and values (B, H, size, D), with those of N tokens (B, H, N, D) put in."""
        if self.k is None:
            B, H, _, D = k.shape
            self.k, self.v = (x.new_zeros(B, H, self.size, D) for x in (k, v))
        return self.k.index_copy_(2, pos, k), self.v.index_copy_(2, pos, v)

    def write_local(self, local, pos):
        """The convolution's input by position (B, HALF + size + HALF, n_embd), with N tokens (B, N, n_embd) put in."""
        if self.local is None:
            self.local = local.new_zeros(len(local), self.size + 2 * HALF, local.size(-1))
        return self.local.index_copy_(1, pos + HALF, local)


# ---- the network ----

def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotary(pos, dim):
    """Cosines and sines (N, dim / 2) of rotary positions pos (N,) (Su et al. 2021)."""
    half = dim // 2
    angle = pos[:, None] * 10000.0 ** (-torch.arange(half, device=pos.device) / half)
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """x (B, H, N, D) turned by its positions."""
    cos, sin = (part.to(x.dtype) for part in rope)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def additive(mask, dtype):
    """A mask as what is added to the scores: 0 where True, NEG where False; None and a BlockMask stay."""
    if not torch.is_tensor(mask):
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, NEG)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D) + mask) v of (B, H, N, D). On a CPU torch's kernel for bfloat16 takes two to four times
    as long as plain products (bench/LOG.md)."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    if v.device.type != "cpu" or v.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys (QK-norm), from x to a context."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.q = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.kv = nn.Linear(cfg.n_embd, 2 * cfg.n_embd, bias=False)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def heads(self, x):
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)          # (B, H, N, D)

    def keys_values(self, context, rope):
        k, v = map(self.heads, self.kv(context).chunk(2, -1))
        return rotate(norm(k), rope).to(v.dtype), v

    def forward(self, x, rope, k, v, mask, clean_mask=None):
        """(B, N, n_embd). With a clean_mask (B, 1, T, T) the first T queries see the first T keys, and the mask is of
        the other queries."""
        q = rotate(norm(self.heads(self.q(x))), rope).to(v.dtype)
        if clean_mask is None:
            y = attention(q, k, v, mask)
        else:
            T = clean_mask.shape[-1]
            clean = attention(q[:, :, :T], k[:, :, :T], v[:, :, :T], clean_mask)
            y = torch.cat((clean, attention(q[:, :, T:], k, v, mask)), 2)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Convolution, self-attention, cross-attention to the prompt, MLP; the noise level enters by adaLN (Peebles & Xie
    2023)."""

    def __init__(self, cfg, cross):
        super().__init__()
        d = cfg.n_embd
        self.attn = Attention(cfg)
        self.cross = Attention(cfg) if cross else None
        self.cross_gate = nn.Parameter(torch.zeros(d)) if cross else None
        self.local = nn.Parameter(torch.randn(KERNEL, d) * KERNEL ** -0.5)
        self.up = nn.Linear(d, 4 * d, bias=False)
        self.down = nn.Linear(4 * d, d, bias=False)
        self.offset = nn.Parameter(torch.zeros(6 * d))                     # this layer's own part of the modulation

    def conv(self, x, layout, cache):
        """A depthwise convolution of each token's neighbours in the text that it may see: (B, N, n_embd)."""
        whole = layout.num_clean == 0 and (cache is None or x.size(1) == cache.size)       # in order
        if cache is not None and not whole:
            by_position = cache.write_local(x, layout.pos)
            return self.weigh([by_position[:, layout.pos + i] for i in range(KERNEL)], layout.near)
        T = len(x[0]) - layout.num_clean
        padded = F.pad(x[:, layout.num_clean:], (0, 0, HALF, HALF))
        noisy = [padded[:, i:i + T] for i in range(KERNEL)]
        if whole:
            return self.weigh(noisy, layout.near)
        padded = F.pad(x[:, :T], (0, 0, HALF, HALF))
        clean = [padded[:, i:i + T] for i in range(KERNEL)]
        seen = [torch.where(layout.own[..., i:i + 1], noisy[i], clean[i]) for i in range(KERNEL)]
        return torch.cat((self.weigh(clean, layout.near), self.weigh(seen, layout.near)), 1)

    def weigh(self, parts, near):
        """The sum of KERNEL neighbours (B, n, n_embd), each times its weight, where near (B, n, KERNEL) is True."""
        total = torch.zeros_like(parts[0])
        for i, (part, weight) in enumerate(zip(parts, self.local, strict=True)):
            part = part if near is None else part * near[..., i:i + 1]
            total = torch.addcmul(total, part, weight)
        return total

    def forward(self, x, modulation, layout, rope, prompt, cache, is_last):
        """x (B, N, n_embd) -> (B, N, n_embd); of the last layer (B, n, n_embd), its noisy tokens only."""
        scale1, shift1, gate1, scale2, shift2, gate2 = (modulation + self.offset).chunk(6, -1)
        m, mask = layout.num_clean, layout.mask
        clean_mask = layout.clean_mask
        x = x + self.conv(norm(x), layout, cache)
        y = torch.addcmul(shift1, norm(x), 1 + scale1)
        k, v = self.attn.keys_values(y, rope)
        if cache is not None:
            k, v = cache.write(k, v, layout.pos)
        if is_last and m:                                                  # nobody reads its clean tokens
            x, y, gate1, scale2, shift2, gate2 = (part[:, m:] for part in (x, y, gate1, scale2, shift2, gate2))
            rope, clean_mask = tuple(part[m:] for part in rope), None
            mask = mask if cache is None else mask[:, :, m:]
        x = torch.addcmul(x, gate1, self.attn(y, rope, k, v, mask, clean_mask))
        if self.cross is not None:
            k, v = self.prompt_keys(prompt, cache)
            x = torch.addcmul(x, self.cross_gate, self.cross(norm(x), rope, k, v, prompt.mask))
        y = torch.addcmul(shift2, norm(x), 1 + scale2)
        return torch.addcmul(x, gate2, self.down(F.gelu(self.up(y))))

    def prompt_keys(self, prompt, cache):
        """Keys and values of the prompt, computed once for a text."""
        if cache is None:
            return self.cross.keys_values(prompt.context, prompt.rope)
        if cache.prompt is None:
            cache.prompt = self.cross.keys_values(prompt.context, prompt.rope)
        return cache.prompt


class SunFish(nn.Module):
    """Vectors of m clean and then n noisy tokens in; hidden states (B, n, n_embd) of the noisy ones out.

    V is vocab_size padded to a multiple of 64. log_unigram (vocab_size,) holds the log frequencies of the training
    text, uniform by default.
    """

    def __init__(self, cfg, vocab_size, log_unigram=None):
        super().__init__()
        C, d = cfg.token_dim, cfg.n_embd
        V = -(-vocab_size // 64) * 64
        self.cfg, self.vocab_size = cfg, vocab_size
        self.head_dim = d // cfg.n_head
        self.dtype = torch.float32                                         # of the products, in generation
        self.cross_entropy, self.mean_vector = cross_entropy, mean_vector  # may be compiled
        self.flex = False                                                  # attention by compiled flex_attention
        self.wte = nn.Parameter(torch.randn(V, C))
        self.register_buffer("log_unigram", torch.full((V,), NEG))
        self.log_unigram[:vocab_size] = -math.log(vocab_size) if log_unigram is None else log_unigram
        frozen = torch.zeros(vocab_size, GPT2_DIM, dtype=torch.float16) if cfg.prompt_table == "gpt2" else None
        self.register_buffer("prompt_table", frozen)
        self.in_proj = nn.Linear(2 * C, d, bias=False)
        self.prompt_proj = nn.Linear(C if frozen is None else GPT2_DIM, d, bias=False)
        self.null_token = nn.Parameter(torch.randn(1, 1, d))               # what cross-attention sees without a prompt
        self.time_in = nn.Linear(64, d // 2)
        self.time_out = nn.Linear(d // 2, 6 * d)
        self.layers = nn.ModuleList(Layer(cfg, (i + 1) % cfg.cross_every == 0) for i in range(cfg.n_layer))
        self.head = nn.Linear(d, C if cfg.objective == "eps" else V)
        self.schedule = nn.Parameter(self.initial_schedule())
        self.init_weights()

    def initial_schedule(self):
        """mu, log beta and log height of the fitted schedule; the height is the unigram entropy in nats."""
        entropy = -(self.log_unigram.double().exp() * self.log_unigram).sum()
        return torch.stack((entropy.new_tensor(-1.9), entropy.new_tensor(0.85).log(), entropy.log())).float()

    @torch.no_grad()
    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
        for layer in self.layers:
            for out in (layer.attn.out, layer.down):
                out.weight.mul_((2 * len(self.layers)) ** -0.5)
        for zero in (*self.head.parameters(), *self.time_out.parameters()):
            nn.init.zeros_(zero)
        d = self.cfg.n_embd
        self.time_out.bias[2 * d:3 * d] = 1.0                              # the gates are open
        self.time_out.bias[5 * d:] = 1.0
        self.in_proj.weight[:, self.cfg.token_dim:].zero_()                # the last guess says nothing yet
        self.wte.requires_grad_(self.cfg.objective != "eps")
        self.schedule.requires_grad_(self.cfg.objective != "eps" and self.cfg.schedule == "gumbel")

    # ---- vectors and noise ----

    def embedding(self):
        """The token vectors that are diffused, each of length sqrt(C): (V, C)."""
        return F.normalize(self.wte.float(), dim=-1) * math.sqrt(self.cfg.token_dim)

    def alpha_bar(self):
        """The noise schedule: (timesteps + 1,) float64."""
        cfg, schedule = self.cfg, self.schedule.detach()
        schedule = schedule.cpu() if schedule.device.type == "mps" else schedule       # which has no float64
        if cfg.schedule == "gumbel":
            mu, log_beta, _ = schedule.double()
            return diffusion.gumbel_schedule(cfg.timesteps, mu, log_beta.exp(), cfg.token_dim)
        if cfg.schedule == "cosine":
            return diffusion.cosine_schedule(cfg.timesteps).to(schedule.device)
        return diffusion.linear_schedule(cfg.timesteps, cfg.beta_start, cfg.beta_end).to(schedule.device)

    def noise_level(self, log_snr):
        """g = -log_snr - log C, clipped: below CLEAN every token can be read off x_t, above NOISY x_t says nothing."""
        return (-log_snr - math.log(self.cfg.token_dim)).clamp(CLEAN, NOISY)

    def evidence(self, x_t, log_snr):
        """(a / s^2) x_t, whose product with a token's vector is log p(x_t | token) up to a constant: (..., C)."""
        snr = (-self.noise_level(log_snr) - math.log(self.cfg.token_dim)).exp()
        return (snr * (1 + snr)).sqrt()[..., None] * x_t.detach()          # a / s^2 = sqrt(snr) / s; 1 / s^2 = 1 + snr

    @torch.no_grad()
    def posterior_mean(self, x_t, log_snr, E):
        """E[x_0 | x_t] of each token by itself (B, n, C), which the network reads; for objective eps x_t itself."""
        if self.cfg.objective == "eps":
            return x_t
        z = self.evidence(x_t, log_snr)
        return in_chunks(lambda rows: self.mean_vector(rows, E, self.log_unigram, E), len(E), z)

    def modulation(self, log_snr):
        """Scales, shifts and gates of the layers (B, n, 6 n_embd) at noise levels log_snr (B, n)."""
        freq = torch.exp(torch.linspace(0, math.log(100.0), 32, device=log_snr.device))
        angle = self.noise_level(log_snr)[..., None] / 10 * freq
        return self.time_out(F.silu(self.time_in(torch.cat((angle.sin(), angle.cos()), -1))))

    # ---- hidden states ----

    def encode_prompt(self, prompt, visible, E):
        """The Prompt of token ids (B, P), seen where visible (B, P)."""
        vectors = E[prompt] if self.prompt_table is None else self.prompt_table[prompt].to(E.dtype)
        context = torch.cat((self.null_token.expand(len(prompt), -1, -1), self.prompt_proj(vectors)), 1)
        pos = torch.arange(-prompt.size(1), 1, device=prompt.device).roll(1)
        return Prompt(context, rotary(pos, self.head_dim), F.pad(visible, (1, 0), value=True)[:, None, None])

    def forward(self, x, log_snr, layout, prompt, cache=None):
        """x (B, m + n, 2C) as `join` makes it, at noise levels log_snr (B, n), -> hidden states (B, n, n_embd). The
        clean tokens are added to the cache, a list of LayerCaches, if there is one."""
        x = self.in_proj(x)
        near = None if layout.near is None else layout.near.float()
        layout = layout._replace(near=near, mask=additive(layout.mask, x.dtype),
                                 clean_mask=additive(layout.clean_mask, x.dtype))
        rope = rotary(layout.pos, self.head_dim)
        prompt, x = prompt._replace(mask=additive(prompt.mask, x.dtype)), x.float()
        modulation = self.modulation(log_snr)                                          # (B, n, 6 n_embd)
        if layout.num_clean:
            clean = self.modulation(torch.full_like(log_snr[:1, :1], math.inf))
            modulation = torch.cat((clean.expand(len(x), layout.num_clean, -1), modulation), 1)
        for i, layer in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            x = layer(x, modulation, layout, rope, prompt, cache and cache[i], is_last)
        return norm(x)

    def join(self, x_0, x_t, log_snr, E, guess=None):
        """Clean vectors x_0 (B, m, C) and noisy ones x_t (B, n, C) as one sequence (B, m + n, 2C): of the noisy ones
        the posterior mean and the last guess of x_0 (B, n, C), if any (self-conditioning, Chen et al. 2022)."""
        mean, C = self.posterior_mean(x_t, log_snr, E), self.cfg.token_dim
        noisy = F.pad(mean, (0, C)) if guess is None else torch.cat((mean, guess), -1)
        return torch.cat((F.pad(x_0, (0, C)), noisy), 1)

    def denoise(self, x_0, x_t, log_snr, order, prompt, E, guess=None):
        """Hidden states (B, T, n_embd) of noisy tokens x_t (B, T, C) beside the clean ones x_0 (B, T, C), written in
        the order (B, T), or all at once with order None."""
        x_0 = x_0[:, :0] if order is None else x_0
        x = self.join(x_0, x_t, log_snr, E, guess)
        return self(x, log_snr, training_layout(order, x_t.size(1), x.device, self.flex), prompt)

    # ---- what follows from a hidden state ----

    def logits(self, h, x_t, log_snr, E, temperature=1.0):
        """Scores (..., V) in float32: what the context says, tempered, plus, exactly, what the noisy vector says."""
        scores = F.linear(self.evidence(x_t, log_snr), E, self.log_unigram / temperature)
        scores += self.head(GAIN * h) / temperature
        return scores.float()

    def predict_noise(self, h):
        """eps_hat (..., C) in float32, for objective eps."""
        return self.head(GAIN * h).float()

    def predict(self, h, x_t, log_snr, E, temperature=1.0):
        """(x_0_hat (..., C), logits (..., V)): the mean of the token vectors under softmax(logits); for objective eps
        x_0 from the predicted noise (Ho et al. 2020, eq. 15), with logits by distance."""
        if self.cfg.objective != "eps":
            logits = self.logits(h, x_t, log_snr, E, temperature)
            return logits.softmax(-1) @ E, logits
        log_snr = log_snr[..., None]
        noise = torch.sigmoid(-log_snr).sqrt() * self.predict_noise(h)
        x_0_hat = (x_t - noise) / torch.sigmoid(log_snr).sqrt()
        return x_0_hat, log_snr.exp() * (x_0_hat @ E[:self.vocab_size].T)

    @torch.no_grad()
    def first_guess(self, h, x_t, log_snr, E):
        """x_0_hat (B, T, C) of a first pass, for self-conditioning in training."""
        features, weight, bias = self.output(h, x_t, log_snr, E)
        return in_chunks(lambda rows: self.mean_vector(rows, weight, bias, E), len(E), features)

    def output(self, h, x_t, log_snr, E):
        """The logits as one linear layer of features: (features (B, T, n_embd + C), its weight, its bias)."""
        features = torch.cat((GAIN * h, self.evidence(x_t, log_snr)), -1)
        weight = torch.cat((self.head.weight, E), 1)
        if torch.is_autocast_enabled(E.device.type):
            weight = weight.to(torch.get_autocast_dtype(E.device.type))
        return features, weight, self.head.bias + self.log_unigram

    def nll(self, h, x_t, log_snr, idx, loss_mask, E):
        """-log p of tokens idx (B, T) in nats: the sum over loss_mask (B, T), and all (B, T) without gradients."""
        features, weight, bias = self.output(h, x_t, log_snr, E)
        rows = features, idx, loss_mask
        total, nll = LinearCrossEntropy.apply(self.cross_entropy, weight, bias, *(x.flatten(0, 1) for x in rows))
        return total, nll.view_as(idx)


# ---- scores over the vocabulary, never all in memory ----

def max_scores(device):
    """Scores over the vocabulary that stand in memory at once: 134 MB in float32 on a CPU, 1 GB elsewhere."""
    return 2 ** 25 if device.type == "cpu" else 2 ** 28


def chunks(width, *inputs):
    """Inputs (M, ...) in 1, 2, 4 ... equal parts, such that `width` scores a row are at most max_scores a part."""
    most = max_scores(inputs[0].device)
    parts = 1 << (max(1, math.ceil(len(inputs[0]) * width / most)) - 1).bit_length()
    size = math.ceil(len(inputs[0]) / parts) or 1
    return zip(*(x.split(size) for x in inputs), strict=True)


def in_chunks(f, width, *inputs):
    """f(*inputs), for inputs (B, T, ...), computed in chunks of rows: (B, T, ...)."""
    parts = [f(*rows) for rows in chunks(width, *(x.flatten(0, 1) for x in inputs))]
    return torch.cat(parts).unflatten(0, inputs[0].shape[:2])


def mean_vector(features, weight, bias, E):
    """The mean of the vectors E (V, C) under the softmax of F.linear(features, weight, bias): (M, C)."""
    return F.linear(features, weight, bias).softmax(-1) @ E


def cross_entropy(weight, bias, features, idx):
    """-log p (M,) of tokens idx (M,) under F.linear(features, weight, bias), and its gradient for the scores (M, V)."""
    scores, idx = F.linear(features, weight, bias).float(), idx[:, None]
    p = scores.softmax(-1)
    log_sum = scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()       # of exp(scores)
    nll = log_sum - scores.gather(-1, idx)
    return nll[:, 0], p.scatter_add_(-1, idx, -torch.ones_like(nll)).to(weight.dtype)


def fused_cross_entropy(weight, bias, features, idx):
    """`cross_entropy` for torch.compile, which makes two passes over the scores of it; slower without."""
    scores, idx = F.linear(features, weight, bias).float(), idx[:, None]
    log_sum = scores.logsumexp(-1, keepdim=True)
    hit = torch.arange(len(weight), device=idx.device) == idx
    return (log_sum - scores.gather(-1, idx))[:, 0], ((scores - log_sum).exp() - hit.float()).to(weight.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """(sum over loss_mask, all) of the cross-entropies of a linear layer, chunk by chunk. Gradients are computed with
    the scores, which are then dropped (as in Liger Kernel, Hsu et al. 2024). torch's linear_cross_entropy (2.13)
    computes the scores twice where each token's loss is wanted."""

    @staticmethod
    def forward(ctx, cross_entropy, weight, bias, features, idx, loss_mask):
        needs_weight, needs_features = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        nll, grad_features = [], []
        grad_weight = grad_bias = 0.0
        for rows, some, mask in chunks(len(weight), features, idx, loss_mask):
            part, grad = cross_entropy(weight, bias, rows, some)
            nll.append(part)
            if needs_features:
                grad_features.append((grad @ weight).to(rows.dtype) * mask[:, None])
            if needs_weight:
                grad_weight = grad_weight + (grad.T @ (rows * mask[:, None]).to(grad.dtype)).float()
                grad_bias = grad_bias + (mask.to(grad.dtype) @ grad).float()
        ctx.save_for_backward(grad_weight if needs_weight else None, grad_bias if needs_weight else None,
                              torch.cat(grad_features) if needs_features else None)
        ctx.dtype, nll = weight.dtype, torch.cat(nll)
        ctx.mark_non_differentiable(nll)
        return (nll * loss_mask).sum(), nll

    @staticmethod
    def backward(ctx, grad, _):
        weight, bias, features = (None if x is None else grad * x for x in ctx.saved_tensors)
        return None, None if weight is None else weight.to(ctx.dtype), bias, features, None, None


# ---- adapters and int8 ----

class LoRA(nn.Linear):
    """A linear layer whose weight (out, in) stays as it is, plus scale * B A of a low rank (Hu et al. 2021)."""

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(model, rank, alpha):
    """Freeze a network and give the linear layers of its transformer adapters that begin at zero."""
    model.requires_grad_(False)
    for layer in [module for module in model.layers.modules() if type(module) is nn.Linear]:
        layer.__class__, layer.scale = LoRA, alpha / rank
        layer.lora_A = nn.Parameter(torch.randn(rank, layer.in_features) * layer.in_features ** -0.5)
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))


@torch.no_grad()
def merge_lora(model):
    """Add each adapter to its weight, and leave plain linear layers."""
    for layer in [module for module in model.layers.modules() if type(module) is LoRA]:
        layer.weight += layer.scale * layer.lora_B @ layer.lora_A
        del layer.lora_A, layer.lora_B, layer.scale
        layer.__class__ = nn.Linear


class Int8(nn.Module):
    """A linear layer with its weight (out, in) in int8, and a scale for each row: its largest magnitude is 127."""

    def __init__(self, layer, dtype):
        super().__init__()
        self.dtype = dtype                                                     # of what it multiplies with
        weights, scales = [], []
        for rows in layer.weight.split(1024):                                  # few at a time, to save memory
            scale = rows.float().abs().amax(1).clamp(min=1e-12) / 127
            weights.append((rows.float() / scale[:, None]).round().to(torch.int8))
            scales.append(scale.to(dtype))
        self.register_buffer("weight", torch.cat(weights))
        self.register_buffer("scale", torch.cat(scales))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(dtype))

    def forward(self, x):
        x = F.linear(x, self.weight.to(self.dtype)) * self.scale
        return x if self.bias is None else x + self.bias


def quantize(model, dtype):
    """Make the weights of a network's linear layers int8, in place; token vectors and norms stay as they are."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, Int8(layer, dtype))
