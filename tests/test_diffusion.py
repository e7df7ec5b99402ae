"""The mathematics against known answers: Gaussian data, whose exact denoiser is one line, and independent tokens."""
import math

import pytest
import torch

import diffusion as d
from model import ModelConfig, SunFish

SCHEDULES = {"linear": d.linear_schedule, "cosine": d.cosine_schedule,
             "gumbel": lambda timesteps: d.gumbel_schedule(timesteps, -1.9, 0.85, 16)}
MEAN, STD = 1.5, 0.6


def gaussian_denoise(alpha_bar, mean=MEAN, std=STD):
    """E[x_0 | x_t] for x_0 ~ N(mean, std^2)."""
    def denoise(x_t, t):
        a = d.per_token(alpha_bar[t], x_t)
        gain = a.sqrt() * std ** 2 / (a * std ** 2 + 1 - a)
        return mean + gain * (x_t - a.sqrt() * mean)
    return denoise


def moments_after(alpha_bar, steps, eta):
    """Mean and standard deviation of what the sampler returns from x_T ~ N(0, 1), by hand: every step is linear."""
    mean, var = 0.0, 1.0
    indices = d.step_indices(len(alpha_bar) - 1, steps)
    for t, s in zip(indices[:-1], indices[1:], strict=True):
        a_t, a_s = alpha_bar[t].item(), alpha_bar[s].item()
        gain = math.sqrt(a_t) * STD ** 2 / (a_t * STD ** 2 + 1 - a_t)
        sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        keep = math.sqrt(1 - a_s - sigma ** 2) / math.sqrt(1 - a_t)      # weight of x_t - sqrt(a_t) x_0_hat
        x_0_weight = math.sqrt(a_s) - keep * math.sqrt(a_t)
        slope = keep + x_0_weight * gain
        mean = slope * mean + x_0_weight * (MEAN - gain * math.sqrt(a_t) * MEAN)
        var = slope ** 2 * var + sigma ** 2
    return mean, math.sqrt(var)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [10, 50, 1000])
def test_schedules_are_tables_from_one_down(name, timesteps):
    alpha_bar = SCHEDULES[name](timesteps)
    assert alpha_bar.shape == (timesteps + 1,) and alpha_bar.dtype == torch.float64
    assert alpha_bar[0] == 1 and (alpha_bar.diff() < 0).all() and alpha_bar[-1] > 0


def test_linear_schedule_ends_equally_noisy_at_any_length():
    """The origin's table kept its betas: alpha_bar[-1] was 0.364 at 100 timesteps."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert torch.allclose(d.linear_schedule(1000)[1:], torch.cumprod(1 - betas, 0))
    assert d.linear_schedule(100)[-1] < 1e-4


def test_gumbel_schedule_makes_its_own_cdf_linear_in_t():
    mu, beta, dim = -1.0, 0.7, 16
    alpha_bar = d.gumbel_schedule(100, mu, beta, dim)
    g = -(torch.log(alpha_bar[1:]) - torch.log1p(-alpha_bar[1:])) - math.log(dim)
    assert d.CLEAN < g.min() and g.max() < d.NOISY
    steps = d.gumbel_cdf(g, mu, beta).diff()
    assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=1e-6)


def test_the_fit_finds_the_curve_that_made_the_data():
    log_snr = torch.linspace(-8, 3, 400)
    nll = 6.5 * d.gumbel_cdf(-log_snr - math.log(16), -1.2, 0.6)
    scalars = torch.tensor([-1.9, math.log(0.85), math.log(5.0)], requires_grad=True)
    optimizer = torch.optim.Adam([scalars], lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        d.schedule_loss(nll, log_snr, scalars, 16).mean().backward()
        optimizer.step()
    assert torch.allclose(scalars.detach(), torch.tensor([-1.2, math.log(0.6), math.log(6.5)]), atol=0.02)


def test_add_noise_has_the_marginal_it_claims_and_leaves_index_zero_alone():
    alpha_bar = d.linear_schedule(1000)
    x_0 = torch.full((2, 50_000, 1), 2.0)
    x_t = d.add_noise(x_0, torch.tensor([0, 400]), alpha_bar, torch.randn(x_0.shape))
    assert torch.equal(x_t[0], x_0[0])
    assert abs(x_t[1].mean() - 2 * alpha_bar[400].sqrt()) < 0.02
    assert abs(x_t[1].std() - (1 - alpha_bar[400]).sqrt()) < 0.02
    each = d.add_noise(x_0[:, :3], torch.tensor([[0, 5, 9], [1, 0, 3]]), alpha_bar, torch.ones(2, 3, 1))
    assert each[0, 0] == 2 and each[1, 1] == 2 and (each != 2).sum() == 4


@pytest.mark.parametrize("name", ["linear", "gumbel"])
@pytest.mark.parametrize("steps", [1000, 50, 10])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "constrained"])
def test_samplers_on_gaussian_data(sampler, steps, name):
    """20,000 samples follow the linear recursion worked out by hand; at 1000 steps that is the data itself."""
    alpha_bar, rng = SCHEDULES[name](1000), torch.Generator().manual_seed(3)
    x_T = torch.randn(4, 20_000, 1, generator=rng)
    eta = {"ddpm": 1.0, "ddim": 0.0, "constrained": 0.5}[sampler]
    known = torch.zeros(4, 20_000, dtype=torch.bool)
    known[:, ::2] = sampler == "constrained"
    denoise = gaussian_denoise(alpha_bar)
    if sampler == "ddpm":
        x_0 = d.sample_ddpm(denoise, x_T, alpha_bar, steps, rng)
    elif sampler == "ddim":
        x_0 = d.sample_ddim(denoise, x_T, alpha_bar, steps, eta, rng)
    else:
        x_0 = d.sample_constrained_ddim(denoise, x_T, alpha_bar, torch.full_like(x_T, 7.0), known, steps, eta, rng)
    assert (x_0[known] == 7.0).all()
    mean, std = moments_after(alpha_bar, steps, eta)
    free = x_0[~known]
    assert abs(free.mean() - mean) < 0.01 and abs(free.std() - std) < 0.01
    if steps == 1000 and name == "linear":        # gumbel stops where tokens are readable, short of a continuum
        assert abs(mean - MEAN) < 0.02 and abs(std - STD) < 0.02


def test_eta_one_is_the_ddpm_posterior():
    """q(x_s | x_t, x_0) in the form of Ho et al. 2020, eq. 7, for neighbours and across a stride."""
    alpha_bar = d.linear_schedule(1000)
    x_t, x_0, noise = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    for t, s in ((500, 499), (900, 300), (1, 0)):
        a_t, a_s = alpha_bar[t], alpha_bar[s]
        beta = 1 - a_t / a_s
        mean = a_s.sqrt() * beta / (1 - a_t) * x_0 + (1 - beta).sqrt() * (1 - a_s) / (1 - a_t) * x_t
        var = (1 - a_s) / (1 - a_t) * beta
        x_s = d.reverse_step(x_t, x_0, t, s, alpha_bar, 1.0, noise)
        assert torch.allclose(x_s, mean + var.sqrt() * noise, atol=1e-10)


def test_reverse_steps_keep_the_marginal_for_every_eta():
    """If x_t was noised from x_0 and the guess is right, x_s is distributed as add_noise would make it."""
    alpha_bar, x_0 = d.cosine_schedule(1000), torch.full((1, 200_000, 1), 0.8, dtype=torch.float64)
    for eta in (0.0, 0.3, 1.0):
        x_t = d.add_noise(x_0, torch.tensor([700]), alpha_bar, torch.randn_like(x_0))
        x_s = d.reverse_step(x_t, x_0, 700, 350, alpha_bar, eta, torch.randn_like(x_0))
        assert abs(x_s.mean() - alpha_bar[350].sqrt() * 0.8) < 0.01
        assert abs(x_s.std() - (1 - alpha_bar[350]).sqrt()) < 0.01


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_agrees_with_diffusers_step_by_step(eta):
    schedulers = pytest.importorskip("diffusers", reason="diffusers is an optional dependency of the tests")
    theirs = schedulers.DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True,
                                      prediction_type="sample")
    theirs.set_timesteps(50)
    alpha_bar = d.linear_schedule(1000)
    x, x_0_hat, noise = torch.randn(3, 2, 6, 4, dtype=torch.float64)
    for t in theirs.timesteps.tolist():
        want = theirs.step(x_0_hat, t, x, eta=eta, variance_noise=noise).prev_sample
        s = max(t + 1 - 20, 0)                                  # their index 0 is our 1
        got = d.reverse_step(x, x_0_hat, t + 1, s, alpha_bar, eta, noise)
        assert torch.allclose(got, want, atol=1e-5), t
        x = want


def test_agrees_with_the_ddpm_scheduler_of_diffusers():
    schedulers = pytest.importorskip("diffusers", reason="diffusers is an optional dependency of the tests")
    theirs = schedulers.DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, prediction_type="sample")
    alpha_bar = d.linear_schedule(1000)
    x, x_0_hat = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    for t in (999, 500, 10, 1):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        want = theirs.step(x_0_hat, t, x, generator=torch.Generator().manual_seed(t)).prev_sample
        got = d.reverse_step(x, x_0_hat, t + 1, t, alpha_bar, 1.0, noise)
        assert torch.allclose(got, want, atol=1e-3), t           # theirs are float32 tables


def test_steps_outside_the_schedule_are_refused():
    assert d.step_indices(1000, 10) == list(range(1000, -1, -100))
    for steps in (0, 11):
        with pytest.raises(ValueError, match=f"steps={steps} is not between 1 and timesteps=10"):
            d.sample_ddim(lambda x, t: x, torch.zeros(1, 2, 3), d.linear_schedule(10), steps=steps)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    alpha_bar = d.linear_schedule(20)

    def run(rows):
        rng = [d.generator("cpu", "test", i) for i in rows]
        x_T = d.randn(torch.zeros(len(rows), 5, 2), rng)
        return d.sample_ddpm(gaussian_denoise(alpha_bar), x_T, alpha_bar, rng=rng)
    assert torch.equal(run([0, 1, 2])[1], run([1])[0])


def test_guidance_at_one_is_the_network_and_extrapolates_beyond():
    prompted, null = torch.tensor([3.0]), torch.tensor([1.0])
    assert [d.guide(prompted, null, scale).item() for scale in (0, 1, 2.5)] == [1.0, 3.0, 6.0]


@pytest.mark.parametrize("name", ["gumbel", "linear"])
def test_bound_of_the_exact_denoiser_is_the_entropy(name):
    """For independent tokens the best denoiser is the context-free posterior, the bound tight but for finite steps."""
    torch.manual_seed(0)
    V, C = 30, 16
    table = torch.nn.functional.normalize(torch.randn(V, C), dim=-1) * math.sqrt(C)
    log_p = (1.5 * torch.randn(V)).log_softmax(0)
    alpha_bar = d.gumbel_schedule(1000, -1.9, 0.85, C) if name == "gumbel" else d.linear_schedule(1000)

    def exact(x_t, log_snr):
        a = torch.sigmoid(log_snr.double())
        logits = ((a.sqrt() / (1 - a))[..., None] * x_t).float() @ table.T + log_p
        return logits.softmax(-1) @ table, logits
    n = 40_000 if name == "linear" else 10_000
    idx = torch.multinomial(log_p.exp(), n * 8, replacement=True).view(n, 8)
    t = d.stratified(n, 1000, torch.tensor([0, 0, 0, 1, 1, 2, 3, 4]))
    bound = d.likelihood_bound(exact, table, idx, alpha_bar, t)
    entropy, seen = -(log_p.exp() * log_p).sum(), -log_p[idx].mean()
    error = bound.total().mean(1).std() / n ** 0.5
    assert abs(seen - entropy) < 0.02
    assert abs(bound.total().mean() - seen) < 4 * error and error < 0.05, (bound.total().mean(), seen, error)
    assert (bound.reconstruction.mean() < 0.05) and 0 < bound.prior.mean() < 0.05
    if name == "gumbel":                                # from pure noise in one step: tokens know nothing of each other
        once = d.likelihood_bound(exact, table, idx, d.subsample(alpha_bar, 1), None)
        error = once.total().mean(1).std() / n ** 0.5
        assert not once.diffusion.any() and abs(once.total().mean() - seen) < 4 * error + once.prior.mean()


def test_stratified_covers_the_range_once_for_every_block():
    t = d.stratified(999, 1000, torch.tensor([0, 3, 3, 8]))
    assert (t.sort(0).values - torch.arange(2, 1001)[:, None]).abs().max() <= 1
    assert torch.equal(t[:, 1], t[:, 2]) and (t[:, 0] != t[:, 1]).float().mean() > 0.99


def test_blocks_of_a_sequence_get_levels_spread_evenly():
    """13 golden sections of the circle leave no gap of two thirteenths; a block's tokens share one."""
    u = d.golden_offset(torch.tensor([[0.3], [0.7]]), torch.arange(13))
    gaps = torch.cat((u, u + 1), -1).sort(-1).values.diff()
    assert (0 <= u).all() and (u < 1).all() and gaps.max() < 2 / 13
    assert torch.allclose(d.golden_offset(torch.tensor([0.3]), torch.tensor([2, 0, 2])), u[0, [2, 0, 2]])


def test_a_coarser_schedule_is_what_a_sampler_of_few_steps_sees():
    alpha_bar, seen = d.cosine_schedule(1000), []
    d.sample_ddim(lambda x, t: seen.append(int(t[0])) or x, torch.zeros(1, 1, 1), alpha_bar, steps=7)
    assert torch.equal(d.subsample(alpha_bar, 7), torch.cat((alpha_bar[:1], alpha_bar[seen[::-1]])))


FREE = torch.tensor([False, True, True, True, False, True, True])


@pytest.mark.parametrize("block_length, strided, order", [
    (0, False, [-1, 0, 0, 0, -1, 0, 0]), (0, True, [-1, 0, 0, 0, -1, 0, 0]), (1, False, [-1, 1, 2, 3, -1, 5, 6]),
    (3, False, [-1, 0, 0, 1, -1, 1, 2]), (100, False, [-1, 0, 0, 0, -1, 0, 0]), (1, True, [-1, 0, 1, 2, -1, 3, 4]),
    (2, True, [-1, 0, 1, 2, -1, 0, 1]), (3, True, [-1, 0, 1, 0, -1, 1, 0]), (5, True, [-1, 0, 0, 0, -1, 0, 0])])
def test_block_order(block_length, strided, order):
    assert d.block_order(FREE, block_length, strided).tolist() == order
    lengths, spread = torch.tensor([[block_length], [2]]), torch.tensor([[strided], [False]])
    many = d.block_order(torch.stack((FREE, ~FREE)), lengths, spread)
    assert many.tolist() == [order, [0, -1, -1, -1, 2, -1, -1]]


@pytest.mark.parametrize("block_length", [1, 3, 4, 8])
def test_strided_blocks_are_spread_over_the_whole_text(block_length):
    order = d.block_order(torch.ones(50, dtype=torch.bool), block_length, True)
    assert order.bincount().max() <= block_length and order.max() + 1 == -(-50 // block_length)
    assert all((order == k).nonzero().diff(dim=0).unique().numel() <= 1 for k in order)


def test_nothing_free_is_no_block():
    assert (d.block_order(torch.zeros(3, dtype=torch.bool), 2, True) == -1).all()


def test_tokens_are_drawn_from_the_softmax_or_the_best_ones_taken():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(1, 50_000, 3)
    for eta in (0.5, 1.0):
        share = torch.bincount(d.draw_tokens(logits, eta, d.generator("cpu", 1))[0], minlength=3) / 50_000
        assert (share - (torch.tensor([0.0, 1.0, 2.0]) / eta).softmax(0)).abs().max() < 0.01
    assert (d.draw_tokens(logits) == 2).all()


LOG_PRIOR = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]).log()


@pytest.fixture(scope="module")
def context_free():
    """The network for one token of six, of vectors at nearly right angles: its context always says log prior."""
    torch.manual_seed(0)
    cfg = ModelConfig(n_layer=1, n_head=1, n_embd=4, token_dim=16, block_size=1)
    model = SunFish(cfg, 6, torch.randn(6).log_softmax(0))
    with torch.no_grad():
        model.wte[:6] = torch.eye(16)[:6] + 0.1 * torch.randn(6, 16)
        model.head.bias[:6] = LOG_PRIOR - model.log_unigram[:6]         # the other weights of the head are zero
    return model.requires_grad_(False)


def frequencies(model, predict, n=15_000):
    """How often each token comes out of 200 steps of DDIM at eta=1 and a draw at the last one."""
    rng, E, alpha_bar, seen = d.generator("cpu", "temperature"), model.embedding(), model.alpha_bar(), []

    def denoise(x_t, t):
        x_0_hat, logits = predict(torch.zeros(n, 1, 4), x_t, d.log_snr(t, alpha_bar)[:, None], E)
        seen[:] = [logits]
        return x_0_hat
    d.sample_ddim(denoise, torch.randn(n, 1, 16, generator=rng), alpha_bar, 200, 1.0, rng)
    return torch.bincount(d.draw_tokens(seen[0], 1.0, rng)[:, 0], minlength=6) / n


@pytest.mark.parametrize("temperature", [0.5, 0.8])
def test_temperature_sharpens_the_prior_and_nothing_else(context_free, temperature):
    """Samples follow softmax(log prior / temperature) exactly: what the noisy vector says is not tempered. Dividing all
    scores by the temperature, the usual rule, gives another distribution."""
    def all_divided(*inputs):
        logits = context_free.logits(*inputs) / temperature
        return logits.softmax(-1) @ inputs[-1], logits
    want = (LOG_PRIOR / temperature).softmax(0)
    right = frequencies(context_free, lambda *inputs: context_free.predict(*inputs, temperature))
    wrong = frequencies(context_free, all_divided)
    assert (right - want).abs().max() < 0.012, (right, want)
    assert (wrong - want).abs().max() > 0.02, (wrong, want)
