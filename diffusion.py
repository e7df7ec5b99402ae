"""
The mathematics of SunFish: schedules, noise, the reverse step, three samplers, the order of writing and the likelihood
bound.

Plain functions over tensors that know nothing of the network. Clean vectors x_0 are noised to x_t = sqrt(alpha_bar_t)
x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4), and a network guesses x_0 from x_t. A schedule is a float64
table alpha_bar (timesteps + 1,), 1 at index 0 and strictly decreasing. An index t has the shape (B,) or, with a noise
level for each token, (B, T); index 0 is a token without noise.

A `denoise` is any callable (x_t (B, T, C), t (B,)) -> x_0_hat (B, T, C); the samplers ask for nothing else.
"""
import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

CLEAN, NOISY = -4.2, 6.0        # ends of the fitted schedule in g = -log_snr - log C: every token can be read, none can
LATER = 2 ** 31                 # the order of tokens that nobody sees: padding, a prompt that is withheld
GOLDEN = 0.6180339887498949     # multiples of it, modulo 1, spread evenly


# ---- schedules ----

def linear_schedule(timesteps, beta_start=1e-4, beta_end=0.02):
    """alpha_bar of betas in a straight line (Ho et al. 2020), scaled by 1000 / timesteps to end equally noisy."""
    betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64) * 1000 / timesteps
    return from_betas(betas)


def cosine_schedule(timesteps):
    """alpha_bar = cos^2 with an offset of 0.008 (Nichol & Dhariwal 2021, eq. 17)."""
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return from_betas(1 - f[1:] / f[:-1])


def gumbel_schedule(timesteps, mu, beta, dim):
    """Equal quantiles of a Gumbel distribution of g = -log_snr - log(dim), cut to [CLEAN, NOISY].

    `dim` is the width C of the clean vectors, whose length is sqrt(C). With mu and beta fitted by `schedule_loss`, the
    cross-entropy is linear in t: every step of a sampler removes equal information (Dieleman et al. 2022, sec. 4).
    """
    mu, beta = (torch.as_tensor(value, dtype=torch.float64) for value in (mu, beta))
    low, high = (gumbel_cdf(g, mu, beta) for g in (CLEAN, NOISY))
    u = low + (high - low) * (torch.arange(timesteps, dtype=torch.float64, device=mu.device) + 0.5) / timesteps
    g = mu - beta * torch.log(-torch.log(u))
    return torch.cat((torch.ones_like(g[:1]), torch.sigmoid(-g - math.log(dim))))


def gumbel_cdf(g, mu, beta):
    return torch.exp(-torch.exp(-(g - mu) / beta))


def schedule_loss(nll, log_snr, schedule, dim):
    """Squared distance of nll (...), in nats a token, from height * Gumbel CDF of its noise level (...).

    `schedule` (3,) holds mu, log beta and log height, which this loss fits.
    """
    mu, log_beta, log_height = schedule
    g = -log_snr - math.log(dim)
    return (log_height.exp() * gumbel_cdf(g, mu, log_beta.exp()) - nll).square()


def from_betas(betas):
    alpha_bar = torch.cumprod(1 - betas.clamp(max=0.999), 0)
    return torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar))


# ---- noise ----

def per_token(values, x):
    """values (), (B,) or (B, T), shaped to multiply x (B, T, C), in its dtype and on its device. A single value
    stays as it is."""
    if values.ndim == 0:
        return values
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim)).to(x.dtype).to(x.device)


def add_noise(x_0, t, alpha_bar, eps):
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4); t is (B,) or (B, T)."""
    a = alpha_bar[t.to(alpha_bar.device)]
    return per_token(a.sqrt(), x_0) * x_0 + per_token((1 - a).sqrt(), x_0) * eps


def log_snr(t, alpha_bar):
    """log(alpha_bar_t / (1 - alpha_bar_t)) in float32, of the shape of t; infinite at t = 0."""
    a = alpha_bar[t.to(alpha_bar.device)]
    return (torch.log(a) - torch.log1p(-a)).float().to(t.device)


def hash64(*keys):
    """A 64-bit hash of integers and strings."""
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "little")


def generator(device, *keys):
    """A Generator seeded by a hash of the keys: a plain seed would make noise of the numbers that made the weights."""
    return torch.Generator(device).manual_seed(hash64(*keys))


def randn(x, rng, draw=torch.randn):
    """Noise like x (B, ...), normal or of another `draw`; rng is None, a Generator, or a list of B Generators, with
    which a row's noise does not depend on its batch."""
    if isinstance(rng, (list, tuple)):
        return torch.stack([draw(x.shape[1:], generator=row, dtype=x.dtype, device=x.device) for row in rng])
    return draw(x.shape, generator=rng, dtype=x.dtype, device=x.device)


def draw_tokens(logits, eta=0.0, rng=None):
    """Tokens (B, T) under logits (B, T, V): the best ones with eta = 0, drawn from their softmax with eta = 1
    (Gumbel-max)."""
    if not eta:
        return logits.argmax(-1)
    return (logits - eta * torch.log(-torch.log(randn(logits, rng, torch.rand)))).argmax(-1)


# ---- samplers ----

def reverse_step(x_t, x_0_hat, t, s, alpha_bar, eta, noise):
    """x_s from x_t and the guess of x_0, for s < t (Song et al. 2020, eq. 12 and 16).

    eta = 0 is deterministic; eta = 1 draws from the DDPM posterior q(x_s | x_t, x_0_hat), whatever the stride t - s.
    """
    a_t, a_s = alpha_bar[t], alpha_bar[s]
    sigma = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)).sqrt()
    eps_hat = (x_t - per_token(a_t.sqrt(), x_t) * x_0_hat) / per_token((1 - a_t).sqrt(), x_t)
    direction = (1 - a_s - sigma ** 2).clamp(min=0).sqrt()
    return per_token(a_s.sqrt(), x_t) * x_0_hat + per_token(direction, x_t) * eps_hat + per_token(sigma, x_t) * noise


def step_indices(timesteps, steps):
    """steps + 1 indices evenly spaced from timesteps to 0; ValueError unless 1 <= steps <= timesteps."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps={steps} is not between 1 and timesteps={timesteps}")
    return torch.linspace(timesteps, 0, steps + 1, dtype=torch.float64).round().long().tolist()


def sample_ddpm(denoise, x_T, alpha_bar, steps=None, rng=None):
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over all indices or a subset: x_T (B, T, C) -> x_0 (B, T, C)."""
    return sample_ddim(denoise, x_T, alpha_bar, len(alpha_bar) - 1 if steps is None else steps, eta=1.0, rng=rng)


def sample_ddim(denoise, x_T, alpha_bar, steps=50, eta=0.0, rng=None):
    """DDIM (Song et al. 2020): x_T (B, T, C) -> x_0 (B, T, C); ValueError if steps is not in 1 .. timesteps."""
    nothing = torch.zeros(x_T.shape[:2], dtype=torch.bool, device=x_T.device)
    return sample_constrained_ddim(denoise, x_T, alpha_bar, x_T, nothing, steps, eta, rng)


def sample_constrained_ddim(denoise, x_T, alpha_bar, x_known, known, steps=50, eta=0.0, rng=None):
    """DDIM that holds the positions in known (B, T) at x_known (B, T, C), clean at every step, and denoises the
    rest."""
    indices = step_indices(len(alpha_bar) - 1, steps)
    x = torch.where(known[..., None], x_known, x_T)
    for t, s in zip(indices[:-1], indices[1:], strict=True):
        x_0_hat = denoise(x, torch.full((len(x),), t, device=x.device))
        noise = randn(x, rng) if eta else 0
        x_s = reverse_step(x, x_0_hat, t, s, alpha_bar, eta, noise)
        x = torch.where(known[..., None], x_known, x_s)
    return x


def guide(prompted, null, scale):
    """Classifier-free guidance, null + scale * (prompted - null) (Ho & Salimans 2022); scale 1 is none."""
    return null + scale * (prompted - null)


# ---- the order of writing ----

def block_order(free, block_length, strided=False):
    """The number of the block in which each token is written where free (..., T) is True, and -1 elsewhere: (..., T)
    int64.

    Block k is the free tokens at positions k block_length to (k + 1) block_length - 1, so the first may be short; if
    strided, as many free tokens spread evenly over the text. A block_length of 0 is one block of all. block_length and
    strided may be tensors (..., 1).
    """
    length = torch.as_tensor(block_length, device=free.device)
    length = torch.where(length > 0, length, free.size(-1))
    neighbours = torch.arange(free.size(-1), device=free.device) // length
    blocks = (free.sum(-1, keepdim=True) + length - 1) // length
    spread = (free.cumsum(-1) - 1) % blocks.clamp(min=1)
    return torch.where(free, torch.where(torch.as_tensor(strided, device=free.device), spread, neighbours), -1)


def golden_offset(u, order):
    """A number in 0 .. 1 for each block in order (..., T): u (..., 1) for block 0, a golden section further for each
    next one. Uniform u makes each of them uniform, and those of a sequence evenly spread."""
    return (u + GOLDEN * order) % 1


# ---- likelihood ----

class Bound(NamedTuple):
    """An upper bound on -log p of a block in nats, as the terms of its tokens (B, T), in the three parts of Ho et al.
    2020, eq. 5."""
    reconstruction: torch.Tensor       # -log p(tokens | x_1)
    diffusion: torch.Tensor            # the sum over t = 2 .. timesteps, estimated from one t
    prior: torch.Tensor                # KL of q(x_timesteps | x_0) from the normal distribution

    def total(self):
        return self.reconstruction + self.diffusion + self.prior


def subsample(alpha_bar, steps):
    """The schedule that a sampler of so many steps goes through: (steps + 1,)."""
    return alpha_bar[step_indices(len(alpha_bar) - 1, steps)[::-1]]


def stratified(n, timesteps, order, rng=None):
    """Indices (n, T) in 2 .. timesteps, one for each block in order (T,) or (n, T): those of a block come from the n
    equal parts of the range, one each, in random order."""
    u = (torch.randperm(n, generator=rng) + torch.rand(n, generator=rng, dtype=torch.float64)) / n
    return 2 + (golden_offset(u[:, None], order) * (timesteps - 1)).long().clamp(max=timesteps - 2)


def likelihood_bound(predict, E, idx, alpha_bar, t, rng=None):
    """One draw of the bound for each token of idx (B, T) at indices t (B, T) in 2 .. timesteps: a Bound of (B, T), on
    the CPU. With a single timestep there is no diffusion part, and t is not read.

    `predict` is a callable (x_t, log_snr (B, T)) -> (x_0_hat (B, T, C), logits (B, T, V)), which may show each token
    those of earlier blocks (the chain rule). Unbiased for uniform t that is equal within a block. The diffusion part is
    1/2 (snr_{t-1} - snr_t) |x_0 - x_0_hat|^2, timesteps - 1 times (Kingma et al. 2021, eq. 14), in float64.
    """
    x_0 = E[idx]

    def noised(t):
        x_t = add_noise(x_0, t, alpha_bar, randn(x_0, rng))
        return predict(x_t, log_snr(t, alpha_bar))

    _, logits = noised(torch.ones_like(idx))
    reconstruction = F.cross_entropy(logits.flatten(0, 1), idx.flatten(), reduction="none").view_as(idx)
    reconstruction = reconstruction.cpu().double()
    diffusion = torch.zeros_like(reconstruction)
    table = alpha_bar.cpu()
    if len(table) > 2:
        x_0_hat, _ = noised(t.to(idx.device))
        snr, t = table / (1 - table), t.cpu()
        error = (x_0 - x_0_hat).cpu().double().square().sum(-1)                        # (B, T)
        diffusion = (len(table) - 2) / 2 * (snr[t - 1] - snr[t]) * error
    return Bound(reconstruction, diffusion, prior_kl(x_0.cpu(), table[-1]))


def prior_kl(x_0, a):
    """KL of q(x_t | x_0) from the normal distribution in nats, for x_0 (B, T, C) at alpha_bar a: (B, T)."""
    return 0.5 * (a * x_0.double().square().sum(-1) - x_0.size(-1) * (a + torch.log1p(-a)))    # s^2 - 1 = -a
