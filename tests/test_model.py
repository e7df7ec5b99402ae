"""The network: its size, its state at initialisation, given tokens, and padding that is never sampled."""
import math
import os

import pytest
import torch

import configurator
import diffusion
from model import ALL, CLEAN, FORMAT, NOISY, Int8, SunFish, attention, find_checkpoint, load_model, quantize, read_checkpoint, score_mask


def meta_size(name):
    import train
    cfg = configurator.load(train.Config, [f"config/{name}.py"])
    with torch.device("meta"):
        model = SunFish(cfg, 50_257)
    return [sum(p.numel() for p in part.parameters()) for part in (model, model.head)] + [model.table.numel()]


def test_parameter_counts(monkeypatch):
    monkeypatch.chdir(configurator.Path(configurator.__file__).parent)
    total, head, _ = meta_size("micro")
    assert abs((total - head) / 41.6e6 - 1) < 0.02 and head == 50_304 * (512 + 1)
    total, head, _ = meta_size("full")
    assert abs((total - head) / 1.4e9 - 1) < 0.03
    total, head, table = meta_size("tiny")
    assert abs((total - head - table) / 0.5e6 - 1) < 0.15


def test_logits_at_initialisation_are_the_context_free_posterior():
    """log unigram + log N(x_t; a E, s^2 I) up to a constant for each position, whatever the neighbours."""
    cfg = configurator.ModelConfig(n_layer=2, n_head=2, n_embd=32, token_dim=16, block_size=8, prompt_size=4)
    torch.manual_seed(1)
    log_p = torch.randn(50).log_softmax(0)
    model = SunFish(cfg, 50, log_p)
    table = model.embedding()
    alpha_bar = diffusion.gumbel_schedule(1000, -1.9, 0.85, 4.0)
    t = torch.randint(1, 1001, (4, 8))
    x_t = diffusion.add_noise(table[torch.randint(50, (4, 8))], t, alpha_bar, torch.randn(4, 8, 16))
    a = alpha_bar[t].float()[..., None]
    square = (x_t[:, :, None] - a[..., None].sqrt() * table[:50]).square().sum(-1)
    want = (log_p - square / (2 * (1 - a))).log_softmax(-1)
    got = model(x_t, diffusion.log_snr(t, alpha_bar), torch.zeros_like(x_t))[..., :50].log_softmax(-1)
    assert torch.allclose(got, want, atol=2e-3), (got - want).abs().max()


def test_noise_levels_beyond_what_matters_are_clipped(small):
    levels = small.level(torch.tensor([math.inf, -math.inf, -math.log(16.0)]))
    assert levels.tolist() == pytest.approx([CLEAN, NOISY, 0.0], abs=1e-6)
    assert small.precision(torch.tensor([math.inf])).isfinite().all()


def test_rows_have_one_length_and_padding_is_never_sampled(small):
    table = small.embedding()
    assert table.shape == (64, 16) and torch.allclose(table.norm(dim=-1), torch.tensor(4.0))
    x = torch.randn(2, 12, 16) * 4
    logits = small(x, torch.full((2, 12), 8.0), x)
    guided = diffusion.guide(logits, logits.flip(0), 7.0)
    assert logits.shape == (2, 12, 64)
    for scores in (logits, guided):
        assert (scores / 0.1).softmax(-1)[..., 50:].max() == 0 and (scores.argmax(-1) < 50).all()


def read_in_turns(small, idx, noisy, group, places=ALL):
    """Logits of the noisy tokens at these places in the turns group, beside the clean tokens idx."""
    group = group.expand(len(idx), -1)
    past = small.look_back(small.remember(idx, group), group, places)
    part = noisy[:, places]
    return small(part, torch.zeros(part.shape[:2]), torch.zeros_like(part), past=past)


@pytest.mark.parametrize("group", [torch.arange(12), torch.arange(12) // 4, torch.arange(12) % 3, torch.tensor([0, 1, 1, 0, 0, 2, 2, 1, 0, 0, 3, 0])])
def test_a_token_reads_earlier_turns_clean_and_its_own_noisy_and_nothing_else(small, group):
    """Change one token, clean or noisy: exactly those outputs change that may know it, through attention and convolution."""
    torch.manual_seed(1)
    idx, noisy = torch.randint(50, (1, 12)), torch.randn(1, 12, 16)
    before = read_in_turns(small, idx, noisy, group)
    for i in range(12):
        other, louder = idx.clone(), noisy.clone()
        other[0, i] = (idx[0, i] + 7) % 50
        louder[0, i] += 1
        by_clean, by_noisy = ((read_in_turns(small, *new, group) - before).abs().amax((0, 2)) > 1e-6 for new in
                              ((other, noisy), (idx, louder)))
        assert torch.equal(by_clean, group > group[i]), i
        assert torch.equal(by_noisy, group == group[i]), i


def test_one_turn_is_full_attention_and_a_part_alone_says_what_it_says_in_the_whole(small):
    torch.manual_seed(1)
    idx, noisy, prompt = torch.randint(50, (2, 12)), torch.randn(2, 12, 16), torch.randint(50, (2, 6))
    prompted, one = (prompt, torch.arange(6) >= torch.tensor([[2], [5]])), torch.zeros(2, 12, dtype=torch.int64)
    whole = small(noisy, torch.zeros(2, 12), torch.zeros_like(noisy))
    assert torch.allclose(read_in_turns(small, idx, noisy, one[0]), whole, atol=1e-4)
    heeding = small(noisy, torch.zeros(2, 12), torch.zeros_like(noisy), *prompted)
    past = small.look_back(small.remember(idx, one, *prompted), one)            # with the keys of the prompt in it
    assert torch.allclose(small(noisy, torch.zeros(2, 12), torch.zeros_like(noisy), *prompted, past), heeding, atol=1e-4)
    for group in (torch.arange(12) // 4, torch.arange(12) % 4, torch.tensor([0, 1, 1, 0, 0, 2, 2, 1, 0, 0, 3, 0])):
        together = read_in_turns(small, idx, noisy, group)
        for turn in group.unique():
            places = (group == turn).nonzero().flatten()
            assert torch.allclose(read_in_turns(small, idx, noisy, group, places), together[:, places], atol=1e-4)
        assert (together - whole).abs().max() > 1e-2


@pytest.mark.parametrize("group", [torch.arange(12) // 4, torch.arange(12) % 3, torch.tensor([-1, 0, 0, -1, -1, 1, -1, 1, 2, 2, -1, 2])])
def test_text_read_as_it_is_written_is_text_read_as_a_whole(small, group):
    """Turn by turn, with later tokens still unknown, the blocks come to hold what one reading of all gives."""
    torch.manual_seed(1)
    idx, junk, prompt = (torch.randint(50, (2, n)) for n in (12, 12, 3))
    prompted, group = dict(prompt=prompt, prompt_mask=torch.ones(2, 3, dtype=torch.bool)), group.expand(2, -1)
    blocks = small.remember(torch.where(group < 0, idx, junk), group, **prompted)
    E, last = small.embedding(), None
    for turn in range(4):                                               # the last one writes nothing, but reads the third
        places = (group[0] == turn).nonzero().flatten() if turn < 3 else torch.tensor([0])
        past = small.look_back(blocks, group, places, last)
        x, level = torch.randn(2, len(places), 16), torch.zeros(2, len(places))
        fresh = None if last is None else idx[:, last]
        with torch.no_grad():
            got = small.hidden(x, level, x, *prompted.values(), past, E, fresh)
            want = small.hidden(x, level, x, *prompted.values(), past.read(), E)
        assert torch.allclose(got, want, atol=1e-4) and got.shape == (2, len(places), 32)
        last = places
    for made, whole in zip(blocks, small.remember(idx, group, **prompted), strict=True):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(made, whole, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_attention_is_that_of_torch_in_double_precision(dtype, tolerance):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16).to(dtype) for n in (5, 9, 9))
    sight = torch.rand(2, 1, 5, 9) < 0.5
    sight[..., 2] = True
    for mask in (None, sight):
        want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
        assert torch.allclose(attention(q, k, v, score_mask(mask, dtype)).double(), want, atol=tolerance)


def test_several_branches_in_one_call_are_several_calls(small):
    """Rows of the prompt and the past that share their noise: the same answers as one after the other."""
    torch.manual_seed(1)
    idx, noisy, prompt, group = torch.randint(50, (2, 12)), torch.randn(2, 4, 16), torch.randint(50, (2, 3)), torch.arange(12) // 4
    level, guess, E, answers, rows = torch.zeros(2, 4), torch.randn(2, 4, 16), small.embedding(), [], []
    for seen, turns in ((True, group), (False, torch.where(group == 0, 9, group))):
        rows.append((idx, turns.expand(2, -1), prompt, torch.full((2, 3), seen)))
    for idx, turns, prompt, seen in (*rows, map(torch.cat, zip(*rows, strict=True))):
        past = small.look_back(small.remember(idx, turns, prompt, seen), turns, torch.arange(8, 12))
        answers.append(small.hidden(small.posterior_mean(noisy, level, E), level, guess, prompt, seen, past, E))
    assert torch.allclose(torch.cat(answers[:2]), answers[2], atol=1e-5) and (answers[0] - answers[1]).abs().max() > 1e-3
    scored = [small.answer(small.features(h, noisy, level), *small.readout(E)) for h in (*answers[:2], diffusion.guide(*answers[:2], 3.0))]
    guided = scored.pop()
    assert torch.allclose(guided[..., :50], diffusion.guide(*scored, 3.0)[..., :50], atol=1e-3)


def test_a_hidden_prompt_is_no_prompt_and_a_visible_one_matters(small):
    x, level = torch.randn(2, 12, 16), torch.zeros(2, 12)
    prompt = torch.randint(50, (2, 6))
    none = small(x, level, x)
    hidden = small(x, level, x, prompt, torch.zeros(2, 6, dtype=torch.bool))
    seen = small(x, level, x, prompt, torch.ones(2, 6, dtype=torch.bool))
    assert torch.allclose(none, hidden, atol=1e-5) and (none - seen).abs().max() > 1e-3
    short = small(x, level, x, prompt[:, 2:], torch.ones(2, 4, dtype=torch.bool))
    masked = small(x, level, x, prompt, torch.arange(6).expand(2, 6) >= 2)
    assert torch.allclose(short, masked, atol=1e-5)


def test_positions_matter_even_where_all_is_noise(small):
    """The origin design had positions only inside x_0, so its denoiser could not tell them apart at high noise."""
    x = torch.zeros(1, 12, 16)
    logits = small(x, torch.full((1, 12), -8.0), x)
    assert (logits[0, 0] - logits[0, 6]).abs().max() > 1e-3


def test_eps_objective_returns_noise_and_leaves_the_table_alone():
    cfg = configurator.ModelConfig(n_layer=1, n_head=2, n_embd=32, token_dim=16, block_size=8, objective="eps")
    model = SunFish(cfg, 50)
    out = model(torch.randn(2, 8, 16), torch.zeros(2, 8), torch.zeros(2, 8, 16), torch.zeros(2, 3, dtype=torch.int64),
                torch.ones(2, 3, dtype=torch.bool))
    out.square().sum().backward()
    assert out.shape == (2, 8, 16) and model.table.grad is None


def test_a_checkpoint_gives_back_the_averaged_network(small, tmp_path):
    import dataclasses
    content = dict(format=FORMAT, config=dataclasses.asdict(small.cfg), data=dict(vocab_size=50), ema=small.state_dict())
    torch.save(content, tmp_path / "a.pt")
    again = load_model(read_checkpoint(tmp_path / "a.pt"))
    x = torch.randn(1, 12, 16)
    assert torch.equal(again(x, torch.zeros(1, 12), x), small(x, torch.zeros(1, 12), x))


def test_damaged_and_foreign_files_are_refused(tmp_path, small):
    """Cut anywhere it is refused; with one bit flipped it is refused, or the bit did not matter."""
    path = tmp_path / "a.pt"
    torch.save(dict(format=FORMAT, ema=small.state_dict()), path)
    data, refused = path.read_bytes(), 0
    for size in (0, 1000, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="a.pt"):
            read_checkpoint(path)
    for bit in range(5, 8 * len(data), 8 * len(data) // 150):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            state = read_checkpoint(path)["ema"]
            assert all(torch.equal(state[name], value) for name, value in small.state_dict().items())
        except ValueError as error:
            refused += "a.pt" in str(error)
    assert refused > 100


def test_the_last_sound_checkpoint_is_found(tmp_path, capsys):
    assert find_checkpoint(tmp_path) is None
    for run, steps in (("old", (7,)), ("new", (2, 10))):
        (tmp_path / run).mkdir()
        for step in steps:
            torch.save(dict(format=FORMAT, step=step), tmp_path / run / f"ckpt_{step:08d}.pt")
    os.utime(tmp_path / "old" / "ckpt_00000007.pt", (1, 1))
    assert find_checkpoint(tmp_path)[1]["step"] == find_checkpoint(tmp_path / "new")[1]["step"] == 10
    assert find_checkpoint(tmp_path / "old" / "ckpt_00000007.pt")[1]["step"] == 7
    (tmp_path / "new" / "ckpt_00000010.pt").write_bytes(b"no")
    assert find_checkpoint(tmp_path / "new")[1]["step"] == 2 and "ckpt_00000010" in capsys.readouterr().err
    (tmp_path / "new" / "ckpt_00000002.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="no sound checkpoint"):
        find_checkpoint(tmp_path / "new")


def test_both_leaves_agree_on_what_is_clean():
    assert (CLEAN, NOISY) == (diffusion.CLEAN, diffusion.NOISY)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    sentinel = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(sentinel), "w"))
    torch.save(dict(format=FORMAT, ema=Bomb()), tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="bomb.pt"):
        read_checkpoint(tmp_path / "bomb.pt")
    assert not sentinel.exists()


@torch.no_grad()
@pytest.mark.parametrize("rows", [torch.randn(64, 32), torch.zeros(64, 32), torch.randn(64, 32) * torch.logspace(-6, 3, 64)[:, None]])
def test_int8_is_off_by_half_a_step_of_its_row_at_most(rows):
    layer = torch.nn.Linear(32, 64)
    layer.weight.copy_(rows)
    made = Int8(layer, torch.float32)
    step = rows.abs().amax(1, keepdim=True) / 127
    assert made.weight.dtype == torch.int8 and (made.weight * made.scale[:, None] - rows).abs().le(0.501 * step).all()
    x = torch.randn(5, 32)
    assert torch.allclose(made(x), x @ (made.weight * made.scale[:, None]).T + layer.bias, atol=1e-4, rtol=1e-4)


def held(net):
    """Bytes of a network's tensors."""
    return sum(x.nbytes for x in (*net.parameters(), *net.buffers()))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, dict(objective="eps")])
def test_an_int8_network_answers_nearly_the_same_from_a_third_of_the_bytes(settings):
    torch.manual_seed(0)
    net = SunFish(configurator.ModelConfig(n_layer=2, n_head=2, n_embd=64, token_dim=16, block_size=12, prompt_size=6, **settings), 500)
    for layer in (net.head, net.time_out):
        torch.nn.init.normal_(layer.weight, std=0.1)
    inputs, table = (torch.randn(2, 12, 16), torch.full((2, 12), -9.0), torch.zeros(2, 12, 16)), net.table.nbytes
    want, before, products = net(*inputs), held(net), net.table.clone()
    quantize(net, torch.float32)
    got = net(*inputs)
    keep = slice(0, 500 if settings.get("objective") != "eps" else 16)
    error = (got - want)[..., keep].pow(2).mean().sqrt() / want[..., keep].std()
    assert 0 < error < 0.03 and held(net) - table < 0.32 * (before - table) and torch.equal(net.table, products)
