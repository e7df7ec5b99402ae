"""No token's loss depends on clean tokens of its own block or of a later one, on padding, or on what is withheld: exact
Jacobians in float64 of the loss module over real batches of every kind."""
import numpy as np
import pytest
import torch
from conftest import wake

import configurator
import data
import diffusion
import model
import train
from diffusion import LATER
from model import SunFish

T, P, V, B = 12, 6, 64, 16
SIZE = [f"--block_size={T}", f"--prompt_size={P}", f"--batch_size={B}", f"--batch_tokens={B * T}", "--n_layer=3",
        "--n_head=2", "--n_embd=16", "--token_dim=8"]
BLOCKS = ["--p_single=0", "--p_window=0", "--p_given=0", "--max_block_length=4"]
KINDS = {"default": [], "single": ["--p_single=1", "--p_window=0"], "blocks": [*BLOCKS, "--p_strided=0"],
         "strided": [*BLOCKS, "--p_strided=1"], "windows": ["--p_single=0", "--p_window=1"], "given": ["--p_given=1"],
         "windows alone": ["--p_single=0", "--p_window=1", "--p_given=0"], "cross_every": ["--cross_every=2"],
         "examples": ["--conditioning_dropout=0.3"], "examples in blocks": [*BLOCKS, "--conditioning_dropout=0.3"],
         "eps": ["--objective=eps", "--schedule=linear"]}


@pytest.fixture
def double(monkeypatch):
    """All in float64; the first guess, which training makes without gradients, with them."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    for owner in (train.DiffusionLoss, SunFish):
        monkeypatch.setattr(owner, "first_guess", owner.first_guess.__wrapped__)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(kind, folder, step=0):
    """A network and a batch, of texts in which no id comes twice."""
    lengths = [(3, 5), (9, 6), (2, 12), (5, 2)] if "examples" in kind else []
    n = sum(map(sum, lengths)) or 60
    data.write_shard(folder / "train_000000.bin", np.random.default_rng(0).permutation(V)[:n], lengths)
    cfg = configurator.load(train.Config, SIZE + KINDS[kind])
    torch.manual_seed(0)
    net = wake(SunFish(cfg, V)).double().requires_grad_(False)
    return net, data.make_batch(cfg, data.Dataset(folder, "train", cfg, V), step, range(B), "cpu")


def jacobian(net, batch, is_guessed, monkeypatch):
    """Length of the derivative of each token's loss (row) with respect to each clean vector (column): (B, T, T). The
    noisy vectors, which know the clean ones, and the scores' own E count as constants."""
    batch, rows, seen = batch._replace(guess=is_guessed), [], []
    add_noise, E = diffusion.add_noise, net.embedding().requires_grad_()

    def note(x_0, *inputs):
        seen.append(x_0)
        return add_noise(x_0.detach(), *inputs)
    monkeypatch.setattr(diffusion, "add_noise", note)
    net.embedding = lambda: E
    for k in range(T):
        loss, _ = train.DiffusionLoss(net)(batch._replace(loss_mask=batch.loss_mask & (torch.arange(T) == k)))
        grad, = torch.autograd.grad(loss, seen[-1], allow_unused=True, materialize_grads=True)
        rows.append(grad.norm(dim=-1))
    monkeypatch.setattr(diffusion, "add_noise", add_noise)
    return torch.stack(rows, 1)


def may_see(batch):
    """Whether a token's loss (row) may depend on a clean token (column): of an earlier block. (B, T, T)"""
    order = torch.zeros_like(batch.idx) if batch.order is None else batch.order
    return (order[:, None] < order[:, :, None]) & batch.loss_mask[..., None]


@pytest.mark.parametrize("is_guessed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_depends_on_clean_tokens_of_earlier_blocks_only(double, monkeypatch, tmp_path, kind, is_guessed):
    net, batch = make(kind, tmp_path)
    found, allowed = jacobian(net, batch, is_guessed, monkeypatch), may_see(batch)
    assert found[~allowed].eq(0).all(), f"a leak: {found[~allowed].max()}"
    assert found[allowed].gt(1e-12).all(), f"not seen: {found[allowed].min()}"
    assert allowed.any() == (kind != "windows alone")
    assert kind != "given" or (batch.order == -1).any()
    assert "examples" not in kind or (batch.order == LATER).any() and (batch.order == -1).any()


@pytest.mark.parametrize("kind", ["default", "examples"])
def test_prompts_hold_nothing_of_the_text(double, tmp_path, kind):
    for step in range(5):
        _, batch = make(kind, tmp_path, step)
        for idx, prompt, visible in zip(batch.idx, batch.prompt, batch.prompt_mask, strict=True):
            assert not set(prompt[visible].tolist()) & set(idx.tolist())


def leaky_masks(order):
    own, other = order[:, None, :, None], order[:, None, None]
    return other <= own, torch.cat((other <= own, other == own), -1)        # in training_masks other < own


def leaky_layout(*order, layout=model.training_layout):
    made = layout(*order)
    return made._replace(near=torch.ones_like(made.near))                   # in training_layout around <= own


def leaky_guess(self, x_0, *inputs):
    return x_0


@pytest.mark.parametrize("owner, name, leaky", [
    (model, "training_masks", leaky_masks), (model, "training_layout", leaky_layout),
    (train.DiffusionLoss, "first_guess", leaky_guess)])
@pytest.mark.parametrize("kind", ["single", "blocks", "strided", "given", "examples"])
def test_a_leak_would_be_noticed(double, tmp_path, monkeypatch, owner, name, leaky, kind):
    monkeypatch.setattr(owner, name, leaky)
    net, batch = make(kind, tmp_path)
    assert jacobian(net, batch, name == "first_guess", monkeypatch)[~may_see(batch)].max() > 1e-6


def test_a_leak_of_the_first_pass_alone_would_be_noticed(double, tmp_path, monkeypatch):
    """Its mask alone is the leaky one: what it sees reaches the loss through the guess."""
    net, batch = make("blocks", tmp_path)

    def denoise(x_0, x_t, log_snr, order, prompt, E, guess=None):
        order = torch.arange(T).expand(B, -1) if guess is None else order
        return SunFish.denoise(net, x_0, x_t, log_snr, order, prompt, E, guess)
    net.denoise = denoise
    assert jacobian(net, batch, True, monkeypatch)[~may_see(batch)].max() > 1e-6
