"""
The mathematics of SunFish: schedules, noise, the reverse step, three samplers, two objectives and the likelihood bound.

Plain functions over tensors that know nothing of the network. Clean vectors x_0 are noised to
x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4); a network guesses x_0 from x_t.
Schedules are float64 tables of alpha_bar with shape (timesteps + 1,), 1 at index 0 and strictly decreasing. An index t is
a tensor (B,) with one level for each sequence, or (B, T) with one for each token, the same for tokens of one turn: a text may
be written in turns, each of which reads the clean tokens of all earlier ones. Index 0 is a token without noise.

A `network` is any callable (x_t (B, T, C), log_snr (B, T), x_prev (B, T, C)) -> output, where x_prev is its previous
guess of x_0 or zeros (self-conditioning, Chen et al. 2022). A `read` turns its output into (x_0_hat, logits). A `denoise`
is any callable (x_t, t) -> x_0_hat; the samplers ask for nothing else.
"""
import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

FAR = 4                         # distance of tokens that may be decided in one step without knowing of each other
CLEAN, NOISY = -4.2, 6.0        # ends of the fitted schedule in g = -log_snr - 2 log R: every token readable, none


# ---- schedules ----

def linear_schedule(timesteps, beta_start=1e-4, beta_end=0.02):
    """alpha_bar of betas in a straight line (Ho et al. 2020), scaled by 1000 / timesteps to end equally noisy."""
    betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64) * 1000 / timesteps
    return from_betas(betas)


def cosine_schedule(timesteps):
    """alpha_bar = cos^2 with an offset of 0.008 (Nichol & Dhariwal 2021, eq. 17)."""
    return from_function(lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, timesteps)


def gumbel_schedule(timesteps, mu, beta, norm):
    """Equal quantiles of a Gumbel distribution in g = -log_snr - 2 log(norm), cut to [CLEAN, NOISY].

    `norm` is the length R of the clean vectors. With mu and beta fitted by `schedule_loss`, the cross-entropy is linear
    in t, so that every step of a sampler removes equal information (Dieleman et al. 2022, sec. 4; LangFlow).
    """
    mu, beta = (torch.as_tensor(v, dtype=torch.float64) for v in (mu, beta))
    low, high = (gumbel_cdf(g, mu, beta) for g in (CLEAN, NOISY))
    u = low + (high - low) * (torch.arange(timesteps, dtype=torch.float64, device=mu.device) + 0.5) / timesteps
    g = mu - beta * torch.log(-torch.log(u))
    return torch.cat((torch.ones_like(g[:1]), torch.sigmoid(-g - 2 * math.log(norm))))


def gumbel_cdf(g, mu, beta):
    return torch.exp(-torch.exp(-(g - mu) / beta))


def schedule_loss(nll, log_snr, mu, beta, height, norm):
    """Squared distance of nll (...), in nats a token, from height * Gumbel CDF of its noise (...), for the three scalars."""
    g = -log_snr - 2 * math.log(norm)
    return (height * gumbel_cdf(g, mu, beta) - nll).square()


def make_schedule(cfg, fitted):
    """The table that a ModelConfig names; fitted (3,) holds the network's mu, log beta and log height for gumbel."""
    if cfg.schedule == "gumbel":
        mu, log_beta, _ = fitted.detach().double()
        return gumbel_schedule(cfg.timesteps, mu, log_beta.exp(), math.sqrt(cfg.token_dim))
    make = {"linear": lambda n: linear_schedule(n, cfg.beta_start, cfg.beta_end), "cosine": cosine_schedule}[cfg.schedule]
    return make(cfg.timesteps).to(fitted.device)


def from_betas(betas):
    alpha_bar = torch.cumprod(1 - betas.clamp(max=0.999), 0)
    return torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar))


def from_function(f, timesteps):
    f = f(torch.linspace(0, 1, timesteps + 1, dtype=torch.float64))
    return from_betas(1 - f[1:] / f[:-1])


# ---- noise ----

def like(values, x):
    """values (), (B,) or (B, T), shaped to multiply x (B, T, C) and in its dtype and on its device."""
    values = torch.as_tensor(values)
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim)).to(x.device, x.dtype)


def add_noise(x_0, t, alpha_bar, eps):
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4); t is (B,) or (B, T)."""
    alpha_bar = alpha_bar.to(t.device)[t]
    return like(alpha_bar.sqrt(), x_0) * x_0 + like((1 - alpha_bar).sqrt(), x_0) * eps


def log_snr(t, alpha_bar):
    """log(alpha_bar_t / (1 - alpha_bar_t)) in float32, of the shape of t; infinite at t = 0."""
    alpha_bar = alpha_bar.to(t.device)[t]
    return (torch.log(alpha_bar) - torch.log1p(-alpha_bar)).float()


def mix(*keys):
    """A 64-bit hash of integers and strings."""
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "little")


def generator(device, *keys):
    """A Generator seeded by a hash of the keys: plain seeds would repeat, in the noise, the weights drawn with them."""
    return torch.Generator(device).manual_seed(mix(*keys))


def randn(x, rng, draw=torch.randn):
    """Noise like x (B, ...), normal or of another `draw`; rng is None, a Generator, or a list of B, which frees the noise from the batch size."""
    if isinstance(rng, (list, tuple)):
        return torch.stack([draw(x.shape[1:], generator=r, dtype=x.dtype, device=x.device) for r in rng])
    return draw(x.shape, generator=rng, dtype=x.dtype, device=x.device)


def choose(logits, eta=0.0, rng=None):
    """Tokens (B, T) under logits (B, T, V): the best ones with eta = 0, drawn from their softmax with eta = 1."""
    return (logits - eta * torch.log(-torch.log(randn(logits, rng, torch.rand)))).argmax(-1) if eta else logits.argmax(-1)


# ---- samplers ----

def reverse_step(x_t, x_0_hat, t, s, alpha_bar, eta, noise):
    """x_s from x_t and the guess of x_0, for s < t (Song et al. 2020, eq. 12 and 16).

    eta = 0 is deterministic; eta = 1 draws from the DDPM posterior q(x_s | x_t, x_0_hat), whatever the stride t - s.
    """
    a_t, a_s = alpha_bar[t], alpha_bar[s]
    sigma = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)).sqrt()
    eps_hat = (x_t - like(a_t.sqrt(), x_t) * x_0_hat) / like((1 - a_t).sqrt(), x_t)
    direction = (1 - a_s - sigma ** 2).clamp(min=0).sqrt()
    return like(a_s.sqrt(), x_t) * x_0_hat + like(direction, x_t) * eps_hat + like(sigma, x_t) * noise


def step_indices(timesteps, steps):
    """steps + 1 indices evenly spaced from timesteps to 0."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps={steps} is not between 1 and timesteps={timesteps}")
    return torch.linspace(timesteps, 0, steps + 1, dtype=torch.float64).round().long().tolist()


def sample_ddpm(denoise, x_T, alpha_bar, steps=None, rng=None):
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over all indices or a subset: x_T (B, T, C) -> x_0 (B, T, C)."""
    return sample_ddim(denoise, x_T, alpha_bar, len(alpha_bar) - 1 if steps is None else steps, eta=1.0, rng=rng)


def sample_ddim(denoise, x_T, alpha_bar, steps=50, eta=0.0, rng=None):
    """DDIM (Song et al. 2020): x_T (B, T, C) -> x_0 (B, T, C); raises ValueError if steps is not in 1..timesteps."""
    nothing = torch.zeros(x_T.shape[:2], dtype=torch.bool, device=x_T.device)
    return sample_constrained_ddim(denoise, x_T, alpha_bar, x_T, nothing, steps, eta, rng)


def sample_constrained_ddim(denoise, x_T, alpha_bar, x_known, known, steps=50, eta=0.0, rng=None):
    """DDIM that holds the positions in known (B, T) at x_known (B, T, C), clean at every step, and fills in the rest."""
    given = known[..., None]
    indices = step_indices(len(alpha_bar) - 1, steps)
    x = torch.where(given, x_known, x_T)
    for t, s in zip(indices[:-1], indices[1:], strict=True):
        x_0_hat = denoise(x, torch.full((len(x),), t, device=x.device))
        noise = randn(x, rng) if eta else 0
        x = torch.where(given, x_known, reverse_step(x, x_0_hat, t, s, alpha_bar, eta, noise))
    return x


# ---- from a network to a denoise ----

def guide(prompted, null, scale):
    """Classifier-free guidance on the network's output, null + scale * (prompted - null) (Ho & Salimans 2022); 1 is none."""
    return null + scale * (prompted - null)


def read_logits(table, temperature=1.0):
    """The `read` of objective ce: logits (B, T, V) -> x_0_hat, the mean of the table's rows (V, C) under softmax."""
    return lambda logits, x_t, log_snr: ((logits / temperature).softmax(-1) @ table, logits / temperature)


def read_eps(table):
    """The `read` of objective eps: eps_hat (B, T, C) -> x_0_hat (Ho et al. 2020, eq. 15), with logits by distance."""
    def read(eps_hat, x_t, log_snr):
        log_snr = log_snr.clamp(max=20)[..., None]      # a given token, at infinity, is its own x_t
        x_0_hat = (x_t - torch.sigmoid(-log_snr).sqrt() * eps_hat) / torch.sigmoid(log_snr).sqrt()
        return x_0_hat, log_snr.exp() * (x_0_hat @ table.T)
    return read


def make_read(cfg, table, vocab_size, temperature=1.0):
    """The `read` of the objective that a ModelConfig names; rows of the table from vocab_size on are padding."""
    return read_eps(table[:vocab_size]) if cfg.objective == "eps" else read_logits(table, temperature)


def denoiser(network, read, alpha_bar, known=None, watch=None):
    """A `denoise` that feeds the network its last guess and tells it that the positions in known (B, T) are clean.

    watch(t, x_0_hat, logits), if given, sees every call: it counts them, draws them, and keeps the last.
    """
    x_prev = None

    def denoise(x_t, t):
        nonlocal x_prev
        t = t[:, None].expand(x_t.shape[:2])
        level = log_snr(t if known is None else torch.where(known, 0, t), alpha_bar)
        output = network(x_t, level, torch.zeros_like(x_t) if x_prev is None else x_prev)
        x_prev, logits = read(output, x_t, level)
        if watch:
            watch(int(t[0, 0]), x_prev, logits)
        return x_prev
    return denoise


def two_pass(network, read):
    """predict(x_t, log_snr) -> (x_0_hat, logits): one pass without and one with self-conditioning, at the same x_t."""
    def predict(x_t, log_snr):
        x_0_hat, _ = read(network(x_t, log_snr, torch.zeros_like(x_t)), x_t, log_snr)
        return read(network(x_t, log_snr, x_0_hat), x_t, log_snr)
    return predict


def spans(T, size):
    """The turn in which each of T tokens is written, `size` at a time from left to right, or all at once if 0: (T,)."""
    return torch.arange(T) // (size or T)


def streams(free, n):
    """The turn in which each token is written where free (T,), if these are cut into n parts at most, of FAR tokens at least,
    that are written side by side, a token of each in a turn; -1 elsewhere: (T,)."""
    return torch.where(free, (free.cumsum(0) - 1) % max(FAR, -(-int(free.sum()) // n)), -1)


def generate(network_for, read, table, alpha_bar, idx, known, group, steps=50, eta=0.0, rng=None, watch=None, end=None):
    """Tokens (B, T) that keep idx (B, T) where known (T,) and are elsewhere written turn by turn, as group (T,) says, each
    turn in its share of the steps.

    `network_for(tokens, group, places)` is the network of the noisy tokens at places (n,) that are written after those of
    smaller turns; known tokens have the smallest. What the last call leaves open is drawn from its softmax, or decided
    for the likeliest with eta = 0. watch(t, tokens, places, logits), if given, sees the text after every call. Nothing is written after the
    turn in which the last of the texts has got the token `end`, if there is one.
    Raises ValueError if there are fewer steps than turns.
    """
    tokens, group, ended = idx.clone(), torch.where(known, -1, group), torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    turns = group[~known].unique().tolist()
    if steps < len(turns):
        raise ValueError(f"steps={steps} is less than one for each of {len(turns)} turns")
    for i, turn in enumerate(turns):
        places = (group == turn).nonzero().flatten()
        share = steps * (i + 1) // len(turns) - steps * i // len(turns)
        write_turn(network_for(tokens, group, places), read, table, alpha_bar, tokens, places, share, eta, rng, watch)
        ended |= (tokens[:, places] == end).any(1) if end is not None else False
        if ended.all():
            break
    return tokens


def write_turn(network, read, table, alpha_bar, tokens, places, steps, eta=0.0, rng=None, watch=None):
    """Write, in place, those of the tokens (B, T) that stand at places (n,)."""
    calls = []

    def keep(t, x_0_hat, logits):
        calls.append(t)
        tokens[:, places] = choose(logits, eta * (len(calls) == steps), rng)
        if watch:
            watch(t, tokens, places, logits)
    x_T = randn(table[tokens[:, places]], rng)
    sample_ddim(denoiser(network, read, alpha_bar, watch=keep), x_T, alpha_bar, steps, eta, rng)


# ---- objectives ----

def ce_loss(logits, idx):
    """Cross-entropy in nats of the tokens idx (...) under logits (..., V): (...)."""
    return F.cross_entropy(logits.flatten(0, -2), idx.flatten(), reduction="none").view_as(idx)


def eps_loss(eps_hat, eps):
    """Mean squared error of the noise (Ho et al. 2020, eq. 14), the mean over C: (B, T)."""
    return (eps_hat - eps).square().mean(-1)


# ---- likelihood ----

class Bound(NamedTuple):
    """An upper bound on -log p(token) in nats, of each token (B, T), in the three parts of Ho et al. 2020, eq. 5."""
    reconstruction: torch.Tensor       # -log p(tokens | x_1)
    diffusion: torch.Tensor            # the sum over t = 2 .. timesteps, from one drawn t
    prior: torch.Tensor                # KL of q(x_timesteps | x_0) from the normal distribution

    def total(self):
        return self.reconstruction + self.diffusion + self.prior


def coarser(alpha_bar, steps):
    """The schedule that a sampler of so many steps goes through: (steps + 1,)."""
    return alpha_bar[step_indices(len(alpha_bar) - 1, steps)[::-1]]


def by_turn(u, group):
    """A place in 0 .. 1 for each turn in group (..., T): u (..., 1) for turn 0, a golden section further for each next one.
    Uniform u makes all of them uniform, and spread evenly within a sequence."""
    return (u + 0.6180339887498949 * group) % 1


def stratified(n, timesteps, group, rng=None):
    """Indices (n, T) in 2 .. timesteps, one for each turn in group (T,) or (n, T); those of a turn one from each n-th part of
    the range, in random order."""
    u = (torch.randperm(n, generator=rng) + torch.rand(n, generator=rng, dtype=torch.float64)) / n
    return 2 + (by_turn(u[:, None], group) * (timesteps - 1)).long().clamp(max=timesteps - 2)


def likelihood_bound(predict, table, idx, alpha_bar, t, rng=None):
    """One draw of the bound for each token of idx (B, T) at indices t (B, T) in 2 .. timesteps: parts of shape (B, T). With
    a single timestep there is no diffusion part, and t is not read.

    Unbiased for uniform t, equal in tokens that are written together; `predict` may show each token those of earlier
    turns (the chain rule). The diffusion part is 1/2 (snr_{t-1} - snr_t) |x_0 - x_0_hat|^2, timesteps - 1 times
    (Kingma et al. 2021, eq. 14), in float64; `predict` is two_pass of the averaged weights at temperature 1.
    """
    x_0 = table[idx]
    snr = alpha_bar / (1 - alpha_bar)

    def noised(t):
        t = t.to(idx.device)
        x_t = add_noise(x_0, t, alpha_bar, randn(x_0, rng))
        return predict(x_t, log_snr(t, alpha_bar))

    _, logits = noised(torch.ones_like(idx))
    reconstruction = ce_loss(logits, idx).double()
    diffusion = torch.zeros_like(reconstruction)
    if len(alpha_bar) > 2:
        x_0_hat, _ = noised(t)
        error = (x_0 - x_0_hat).double().square().sum(-1)                              # (B, T)
        t = t.to(alpha_bar.device)
        diffusion = (len(alpha_bar) - 2) / 2 * (snr[t - 1] - snr[t]).to(error.device) * error
    a = alpha_bar[-1]
    squared_norm = x_0.double().square().sum(-1)
    prior = 0.5 * (a * squared_norm - x_0.size(-1) * (a + torch.log1p(-a)))            # s^2 - 1 = -a
    return Bound(reconstruction, diffusion, prior)


def estimate_bound(predict_for, table, idx, counts, group, alpha_bar, batch_size):
    """The bound on those tokens of idx (N, T) that counts (N, T), written in the turns group (N, T), from fixed noise, each turn
    of a sequence at one index: parts, their sum and its standard error. `predict_for(rows)` is the `predict` of some
    sequences. The size of a batch changes nothing."""
    t = stratified(len(idx), len(alpha_bar) - 1, group.cpu(), generator("cpu", "bound"))
    draws = []
    for rows in torch.arange(len(idx)).split(batch_size):
        rng = [generator(idx.device, "bound", i) for i in rows.tolist()]
        draws.append(likelihood_bound(predict_for(rows), table, idx[rows], alpha_bar, t[rows], rng))
    bound = Bound(*(torch.where(counts, torch.cat(part), 0).sum(1) for part in zip(*draws, strict=True)))        # of each (N,)
    tokens, total = counts.sum(1), bound.total()
    mean = total.sum() / tokens.sum()
    error = (total - mean * tokens).std(correction=1) * len(total) ** 0.5 / tokens.sum()        # of a ratio of two sums
    return {**{name: (part.sum() / tokens.sum()).item() for name, part in bound._asdict().items()},
            "bound": mean.item(), "bound_error": error.item()}


def ce_by_noise(predict_for, free, table, idx, counts, alpha_bar, batch_size, rows, bands=8):
    """Cross-entropy of the tokens that counts (N, T) in some rows of idx (N, T), at fixed noise: (t, of the network, of the
    context-free posterior) in nats.

    `free(x_t, log_snr)` gives the logits of the latter. The gap is what the network has learnt about context; the training
    loss hides it, because a fitted schedule keeps the mean at half of what pure noise costs.
    """
    table_of = []
    for k in range(bands):
        index, losses = round((k + 0.5) / bands * (len(alpha_bar) - 1)), []
        for numbers, some in zip(torch.arange(len(rows)).split(batch_size), rows.split(batch_size), strict=True):
            part = idx[some]
            rng = [generator(idx.device, "band", k, i) for i in numbers.tolist()]
            t, x_0 = torch.full_like(part, index), table[part]
            x_t, level = add_noise(x_0, t, alpha_bar, randn(x_0, rng)), log_snr(t, alpha_bar)
            both = predict_for(some)(x_t, level)[1], free(x_t, level)
            losses.append([ce_loss(logits, part)[counts[some]].sum().item() for logits in both])
        table_of.append((index, *(sum(loss) / counts[rows].sum().item() for loss in zip(*losses, strict=True))))
    return table_of
