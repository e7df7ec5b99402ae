"""The network: its size, its state at initialisation, who sees whom, its scores and losses, and its checkpoints."""
import copy
import dataclasses
import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import checkpoint as ckpt
import configurator
import diffusion
import model as m
import train
from configurator import Fault, UserError
from diffusion import CLEAN, LATER, NOISY
from model import GAIN, Int8, LinearCrossEntropy, ModelConfig, SunFish, attention, quantize

ORDERS = {"one by one": range(12), "blocks": [i // 4 for i in range(12)], "strided": [i % 3 for i in range(12)],
          "any": [0, 1, 1, 0, 0, 2, 2, 1, 0, 0, 3, 0], "given": [-1, 0, 0, -1, -1, 1, -1, 1, 2, 2, -1, 2],
          "padded": [-1, -1, 0, 0, 1, 1, 2, 2, LATER, LATER, LATER, LATER]}


def denoise(net, x_t, order=None, idx=None, prompt=None, visible=None, level=0.0, guess=None):
    """Hidden states of noisy tokens beside the clean tokens idx; no prompt if it is not given."""
    E, B = net.embedding(), len(x_t)
    idx = torch.zeros(x_t.shape[:2], dtype=torch.int64) if idx is None else idx
    prompt = torch.zeros(B, 0, dtype=torch.int64) if prompt is None else prompt
    visible = torch.ones_like(prompt, dtype=torch.bool) if visible is None else visible
    log_snr = torch.full(x_t.shape[:2], level)
    return net.denoise(E[idx], x_t, log_snr, order, net.encode_prompt(prompt, visible, E), E, guess)


# ---- its size and its beginning ----

def meta_size(name):
    """Parameters of all, of the head and of the token vectors of a config file, with GPT-2's vocabulary."""
    cfg = configurator.load(train.Config, [str(ROOT / "config" / f"{name}.py")])
    with torch.device("meta"):
        net = SunFish(cfg, 50_257)
    return sum(p.numel() for p in net.parameters()), sum(p.numel() for p in net.head.parameters()), net.wte.numel()


def test_parameter_counts():
    total, head, _ = meta_size("micro")
    assert abs((total - head) / 41.6e6 - 1) < 0.02 and head == 50_304 * (512 + 1)
    total, head, _ = meta_size("full")
    assert abs((total - head) / 1.4e9 - 1) < 0.03
    total, head, table = meta_size("tiny")
    assert abs((total - head - table) / 0.5e6 - 1) < 0.15


def test_logits_at_initialisation_are_the_context_free_posterior():
    """log unigram + log N(x_t; a E, s^2 I) up to a constant for each position, whatever the neighbours."""
    cfg = ModelConfig(n_layer=2, n_head=2, n_embd=32, token_dim=16, block_size=8, prompt_size=4)
    torch.manual_seed(1)
    log_p = torch.randn(50).log_softmax(0)
    net = SunFish(cfg, 50, log_p)
    E, alpha_bar = net.embedding(), net.alpha_bar()
    t = torch.randint(1, 1001, (4, 8))
    x_t = diffusion.add_noise(E[torch.randint(50, (4, 8))], t, alpha_bar, torch.randn(4, 8, 16))
    a = alpha_bar[t].float()[..., None]
    square = (x_t[:, :, None] - a[..., None].sqrt() * E[:50]).square().sum(-1)
    want = (log_p - square / (2 * (1 - a))).log_softmax(-1)
    got = net.logits(denoise(net, x_t), x_t, diffusion.log_snr(t, alpha_bar), E)[..., :50].log_softmax(-1)
    assert torch.allclose(got, want, atol=2e-3), (got - want).abs().max()


def test_noise_levels_beyond_what_matters_are_clipped(small):
    levels = small.noise_level(torch.tensor([math.inf, -math.inf, -math.log(16.0)]))
    assert levels.tolist() == pytest.approx([CLEAN, NOISY, 0.0], abs=1e-6)
    assert small.evidence(torch.ones(1, 16), torch.tensor([math.inf])).isfinite().all()


@torch.no_grad()
def test_rows_have_one_length_and_padding_is_never_sampled(small):
    E, level = small.embedding(), torch.full((2, 12), 8.0)
    x_t = torch.randn(2, 12, 16) * 4
    assert E.shape == (64, 16) and torch.allclose(E.norm(dim=-1), torch.tensor(4.0))
    h = denoise(small, x_t)
    for hidden in (h, diffusion.guide(h, h.flip(0), 7.0)):
        for temperature in (0.1, 1.0):
            logits = small.logits(hidden, x_t, level, E, temperature)
            assert logits.shape == (2, 12, 64)
            assert logits.softmax(-1)[..., 50:].max() == 0 and (logits.argmax(-1) < 50).all()
            assert (diffusion.draw_tokens(logits, 1.0) < 50).all()


# ---- who sees whom ----

@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_a_token_sees_earlier_blocks_clean_and_its_own_noisy_and_nothing_else(small, order):
    """Change one token, clean or noisy: exactly those outputs change that may know it, in each row by its own order."""
    torch.manual_seed(1)
    orders = torch.tensor([list(ORDERS[order]), list(ORDERS["blocks"])])
    idx, x_t = torch.randint(50, (2, 12)), torch.randn(2, 12, 16)
    before = denoise(small, x_t, orders, idx)
    for i in range(12):
        other, louder = idx.clone(), x_t.clone()
        other[:, i] = (idx[:, i] + 7) % 50
        louder[:, i] += 1
        by_clean = (denoise(small, x_t, orders, other) - before).abs().amax(2) > 1e-6
        by_noisy = (denoise(small, louder, orders, idx) - before).abs().amax(2) > 1e-6
        assert torch.equal(by_clean, orders > orders[:, i:i + 1]), i
        assert torch.equal(by_noisy, orders == orders[:, i:i + 1]), i


@torch.no_grad()
def test_no_order_is_one_block_and_clean_tokens_do_not_matter_there(small):
    torch.manual_seed(1)
    x_t, visible = torch.randn(2, 12, 16), torch.arange(6) >= torch.tensor([[2], [5]])
    idx, prompt = (torch.randint(50, (2, n)) for n in (12, 6))
    inputs = dict(idx=idx, prompt=prompt, visible=visible, guess=torch.randn(2, 12, 16))
    window = denoise(small, x_t, **inputs)
    assert torch.allclose(denoise(small, x_t, torch.zeros(2, 12, dtype=torch.int64), **inputs), window, atol=1e-5)
    assert (denoise(small, x_t, torch.arange(12).expand(2, -1) // 4, **inputs) - window).abs().max() > 1e-2


@torch.no_grad()
def test_a_hidden_prompt_is_no_prompt_and_a_visible_one_matters(small):
    torch.manual_seed(1)
    x_t, prompt = torch.randn(2, 12, 16), torch.randint(50, (2, 6))
    none = denoise(small, x_t)
    hidden = denoise(small, x_t, prompt=prompt, visible=torch.zeros(2, 6, dtype=torch.bool))
    seen = denoise(small, x_t, prompt=prompt)
    assert torch.allclose(none, hidden, atol=1e-5) and (none - seen).abs().max() > 1e-3
    masked = denoise(small, x_t, prompt=prompt, visible=torch.arange(6).expand(2, 6) >= 2)
    assert torch.allclose(denoise(small, x_t, prompt=prompt[:, 2:]), masked, atol=1e-5)


@torch.no_grad()
def test_positions_matter_even_where_all_is_noise(small):
    h = denoise(small, torch.zeros(1, 12, 16), level=-8.0)
    assert (h[0, 0] - h[0, 6]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_attention_is_that_of_torch_in_double_precision(dtype, tolerance):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16).to(dtype) for n in (5, 9, 9))
    sight = torch.rand(2, 1, 5, 9) < 0.5
    sight[..., 2] = True
    for mask in (None, sight):
        want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
        assert torch.allclose(attention(q, k, v, m.additive(mask, dtype)).double(), want, atol=tolerance)


# ---- scores and losses ----

def test_the_context_is_tempered_and_the_noisy_vector_is_not(small):
    E, level = small.embedding(), torch.full((2, 3), -2.0)
    h, x_t = torch.randn(2, 3, 32), torch.randn(2, 3, 16)
    noisy = small.evidence(x_t, level) @ E.T
    context = small.logits(h, x_t, level, E) - noisy
    tempered = small.logits(h, x_t, level, E, 0.5) - noisy
    assert torch.allclose(tempered[..., :50], 2 * context[..., :50], atol=1e-3)
    x_0_hat, logits = small.predict(h, x_t, level, E, 0.5)
    assert torch.allclose(logits, tempered + noisy, atol=1e-3)
    assert torch.allclose(x_0_hat, logits.softmax(-1) @ E, atol=1e-5)


def test_vectors_over_the_vocabulary_are_the_same_in_chunks(small, monkeypatch):
    E, level = small.embedding(), torch.full((2, 12), -2.0)
    h, x_t = torch.randn(2, 12, 32), torch.randn(2, 12, 16)
    mean, guess = small.posterior_mean(x_t, level, E), small.first_guess(h, x_t, level, E)
    monkeypatch.setattr(m, "max_scores", lambda device: 3 * 64)
    assert torch.allclose(small.posterior_mean(x_t, level, E), mean, atol=1e-5)
    assert torch.allclose(small.first_guess(h, x_t, level, E), guess, atol=1e-5)
    assert torch.allclose(guess, small.predict(h, x_t, level, E)[0], atol=1e-5) and not guess.requires_grad


def plain_loss(net, h, x_t, log_snr, idx, loss_mask):
    """(sum, of each token) -log p, by the equations, in float64: log unigram + GAIN W h + b + a / s^2 x_t E^T."""
    E, snr = F.normalize(net.wte, dim=-1) * net.cfg.token_dim ** 0.5, log_snr.exp()[..., None]
    context = GAIN * h @ net.head.weight.T + net.head.bias + net.log_unigram
    nll = -(context + (snr * (1 + snr)).sqrt() * x_t @ E.T).log_softmax(-1).gather(-1, idx[..., None])[..., 0]
    return (nll * loss_mask).sum(), nll


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("most", [2 ** 25, 5 * 64])
@pytest.mark.parametrize("entropy", [m.cross_entropy, m.fused_cross_entropy])
def test_loss_and_gradients_are_those_of_autograd_in_double_precision(small, monkeypatch, entropy, most, dtype,
                                                                      tolerance):
    monkeypatch.setattr(m, "max_scores", lambda device: most)
    torch.manual_seed(1)
    h, x_t = torch.randn(3, 12, 32, requires_grad=True), torch.randn(3, 12, 16)
    log_snr, idx = torch.linspace(-8, 1, 36).view(3, 12), torch.randint(50, (3, 12))
    loss_mask, calls = torch.rand(3, 12) < 0.7, []
    small.cross_entropy = lambda *rows: calls.append(len(rows[2])) or entropy(*rows)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total, nll = small.nll(h, x_t, log_snr, idx, loss_mask, small.embedding())
    (0.3 * total).backward()
    exact, h64 = copy.deepcopy(small).double(), h.detach().double().requires_grad_()
    exact.zero_grad()
    want, each = plain_loss(exact, h64, x_t.double(), log_snr.double(), idx, loss_mask)
    (0.3 * want).backward()
    assert len(calls) == (1 if most > 5 * 64 else 8) and sum(calls) == 36 and not nll.requires_grad
    pairs = {"total": (total, want), "each": (nll, each), "h": (h.grad, h64.grad)}
    for name in ("head.weight", "head.bias", "wte"):
        pairs[name] = small.get_parameter(name).grad, exact.get_parameter(name).grad
    for name, (found, right) in pairs.items():
        assert (found - right).norm() < tolerance * right.norm(), (name, (found - right).norm() / right.norm())


def test_gradients_that_nobody_needs_are_not_made(small):
    h, idx = torch.randn(1, 4, 32), torch.randint(50, (1, 4))
    inputs = (torch.randn(1, 4, 16), torch.zeros(1, 4), idx, torch.ones_like(idx, dtype=torch.bool))
    total, _ = small.requires_grad_(False).nll(h.requires_grad_(), *inputs, small.embedding())
    assert [x is None for x in total.grad_fn.saved_tensors] == [True, True, False]         # weight, bias, features
    total.backward()
    assert h.grad.any() and small.head.weight.grad is None
    assert not small.nll(h.detach(), *inputs, small.embedding())[0].requires_grad
    rows = torch.randn(4, 48), *(x[0] for x in inputs[2:])
    total, _ = LinearCrossEntropy.apply(m.cross_entropy, torch.randn(64, 48).requires_grad_(), torch.zeros(64), *rows)
    assert [x is None for x in total.grad_fn.saved_tensors] == [False, False, True]


def test_eps_objective_predicts_noise_and_leaves_the_token_vectors_alone():
    net = SunFish(ModelConfig(n_layer=1, n_head=2, n_embd=32, token_dim=16, block_size=8, objective="eps"), 50)
    noise = net.predict_noise(denoise(net, torch.randn(2, 8, 16), prompt=torch.zeros(2, 3, dtype=torch.int64)))
    noise.square().sum().backward()
    assert noise.shape == (2, 8, 16) and net.wte.grad is None


def test_x_0_from_the_right_noise_is_the_right_x_0():
    net = SunFish(ModelConfig(n_layer=1, n_head=2, n_embd=16, token_dim=16, objective="eps", schedule="linear"), 50)
    net.predict_noise = lambda h: h
    E, alpha_bar = net.embedding(), net.alpha_bar()
    idx, t = torch.tensor([[1, 8, 3], [400, 5, 900]])[:, None]
    eps = torch.randn(1, 3, 16)
    x_t = diffusion.add_noise(E[idx], t, alpha_bar, eps)
    x_0_hat, logits = net.predict(eps, x_t, diffusion.log_snr(t, alpha_bar), E)
    assert torch.allclose(x_0_hat, E[idx], atol=1e-2) and torch.equal(logits.argmax(-1), idx)


# ---- int8 ----

@torch.no_grad()
@pytest.mark.parametrize("kind", ["normal", "zero", "of many sizes"])
def test_int8_is_off_by_half_a_step_of_its_row_at_most(kind):
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 64)
    rows = torch.randn(64, 32) * {"normal": 1, "zero": 0, "of many sizes": torch.logspace(-6, 3, 64)[:, None]}[kind]
    layer.weight.copy_(rows)
    made = Int8(layer, torch.float32)
    step = rows.abs().amax(1, keepdim=True) / 127
    assert made.weight.dtype == torch.int8
    assert (made.weight * made.scale[:, None] - rows).abs().le(0.501 * step).all()
    x = torch.randn(5, 32)
    want = x @ (made.weight * made.scale[:, None]).T + layer.bias
    assert torch.allclose(made(x), want, atol=1e-4, rtol=1e-4)


def num_bytes(net):
    return sum(x.nbytes for x in (*net.parameters(), *net.buffers()))


@torch.no_grad()
@pytest.mark.parametrize("objective", ["ce", "eps"])
def test_an_int8_network_answers_nearly_the_same_from_a_third_of_the_bytes(objective):
    torch.manual_seed(0)
    size = dict(n_layer=2, n_head=2, n_embd=64, token_dim=16, block_size=12, prompt_size=6)
    net = SunFish(ModelConfig(**size, objective=objective), 500)
    for layer in (net.head, net.time_out):
        torch.nn.init.normal_(layer.weight, std=0.1)
    x_t, vectors = torch.randn(2, 12, 16), net.wte.clone()

    def answer():
        h = denoise(net, x_t, level=-9.0)
        return net.head(GAIN * h)[..., :500]
    want, before = answer(), num_bytes(net)
    quantize(net, torch.float32)
    error = (answer() - want).pow(2).mean().sqrt() / want.std()
    table = net.wte.nbytes
    assert 0 < error < 0.03 and num_bytes(net) - table < 0.32 * (before - table) and torch.equal(net.wte, vectors)


# ---- on disk ----

@torch.no_grad()
def test_a_checkpoint_gives_back_the_averaged_network(small, tmp_path):
    content = dict(config=dataclasses.asdict(small.cfg), data=dict(vocab_size=50), ema=small.state_dict())
    ckpt.write(tmp_path / "a.pt", content)
    again, x_t = ckpt.load_model(ckpt.read(tmp_path / "a.pt")), torch.randn(1, 12, 16)
    assert torch.equal(denoise(again, x_t), denoise(small, x_t)) and again.cfg == small.cfg
    assert not any(p.requires_grad for p in again.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_damaged_and_foreign_files_are_refused(tmp_path, small):
    """Cut anywhere it is refused; with one bit flipped it is refused, or the bit did not matter."""
    path = tmp_path / "a.pt"
    ckpt.write(path, dict(ema=small.state_dict()))
    data, refused = path.read_bytes(), 0
    for size in (0, 1000, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(Fault, match="a.pt is not a sound checkpoint"):
            ckpt.read(path)
    for bit in range(5, 8 * len(data), 8 * len(data) // 150):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            state = ckpt.read(path)["ema"]
            assert all(torch.equal(state[name], value) for name, value in small.state_dict().items())
        except Fault as error:
            refused += "a.pt" in str(error)
    assert refused > 100
    torch.save(dict(format=ckpt.FORMAT - 1), path)
    with pytest.raises(UserError, match=f"format {ckpt.FORMAT - 1}, and this code reads format {ckpt.FORMAT}"):
        ckpt.read(path)


def test_the_last_sound_checkpoint_is_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ckpt, "read_network", ckpt.read)                # these hold no network
    assert ckpt.find(tmp_path) is None
    for run, steps in (("old", (7,)), ("new", (2, 10))):
        (tmp_path / run).mkdir()
        for step in steps:
            ckpt.write(tmp_path / run / f"ckpt_{step:08d}.pt", dict(step=step))
    old, new = tmp_path / "old" / "ckpt_00000007.pt", tmp_path / "new"
    os.utime(old, (1, 1))
    assert ckpt.find(tmp_path)[1]["step"] == ckpt.find(new)[1]["step"] == 10
    assert ckpt.find(old)[0] == old and ckpt.find(old)[1]["step"] == 7
    (new / "ckpt_00000010.pt").write_bytes(b"no")
    assert ckpt.find(new)[1]["step"] == 2 and "ckpt_00000010" in capsys.readouterr().err
    (new / "ckpt_00000002.pt").write_bytes(b"no")
    with pytest.raises(Fault, match="no sound checkpoint"):
        ckpt.find(new)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    sentinel = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(sentinel), "w"))
    torch.save(dict(format=ckpt.FORMAT, ema=Bomb()), tmp_path / "bomb.pt")
    with pytest.raises(Fault, match="bomb.pt"):
        ckpt.read(tmp_path / "bomb.pt")
    assert not sentinel.exists()
