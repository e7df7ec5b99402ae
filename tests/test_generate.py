"""Writing and likelihood against known answers: exact posteriors write the chain they come from, the KV cache changes
nothing, and the bound is the one that is worked out by hand."""
import math

import pytest
import torch
import torch.nn.functional as F

import diffusion
import generate as g
from configurator import UserError
from data import Texts
from diffusion import LATER
from generate import DOUBT, Canvas, Decoder, Sampling, bound, generate, generators, plan, prompt_canvas
from model import ModelConfig, SunFish

NOTHING = torch.zeros(0, dtype=torch.int64)


@pytest.fixture
def one_generator(monkeypatch):
    """All rows draw from one Generator: thousands of them would take long."""
    rng = diffusion.generator("cpu", "test")

    def randn(x, _, draw=torch.randn):
        return draw(x.shape, generator=rng, dtype=x.dtype)
    monkeypatch.setattr(diffusion, "randn", randn)


# ---- plans and canvases ----

@pytest.mark.parametrize("settings, objective, num_blocks, steps", [
    ({}, "ce", 4, 4), (dict(block_length=0), "ce", 1, 32), (dict(block_length=1), "ce", 64, 1),
    (dict(block_length=1), "eps", 64, 4), (dict(strided=True), "ce", 4, 4), (dict(sampler="ddpm"), "ce", 4, 100),
    (dict(sampler="ddpm", block_length=1), "ce", 64, 100), (dict(steps=3, block_length=1), "ce", 64, 3),
    (dict(steps=7, block_length=0, sampler="ddpm"), "ce", 1, 7)])
def test_the_default_steps_of_a_block(settings, objective, num_blocks, steps):
    cfg, nothing = ModelConfig(timesteps=100, objective=objective), torch.zeros(64, dtype=torch.bool)
    assert plan(Sampling(**settings), cfg, nothing)[1:3] == (num_blocks, steps)
    assert plan(Sampling(), ModelConfig(timesteps=3), nothing).steps == 3           # no more than there are levels


def test_known_tokens_are_earlier_than_all_blocks():
    known = torch.tensor([True, True, False, False, True, False])
    assert plan(Sampling(block_length=2), ModelConfig(), known).order.tolist() == [-1, -1, 1, 1, -1, 2]
    assert plan(Sampling(block_length=2, strided=True), ModelConfig(), known).order.tolist() == [-1, -1, 0, 1, -1, 0]
    assert plan(Sampling(), ModelConfig(), known | True).num_blocks == 0


def test_the_end_of_a_prompt_stands_in_the_window_and_the_rest_before_it():
    cfg, ids = ModelConfig(block_size=8, prompt_size=4), list(range(1, 8))
    for seq_len, before, length in ((0, 3, 8), (3, 3, 7), (5, 4, 8)):
        idx, known, prompt = prompt_canvas(ids, seq_len, cfg)
        given = len(ids) - before
        assert prompt.tolist() == ids[:before] and idx[:given].tolist() == ids[before:]
        assert known.tolist() == [True] * given + [False] * (length - given)
    for asked, seq_len, words in ((ids, 6, "the prompt has 7 tokens"), ([], 9, "seq_len=9 ")):
        with pytest.raises(UserError, match=words):
            prompt_canvas(asked, seq_len, cfg)


# ---- exact answers ----

VECTORS = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(3)), dim=-1) * 8 ** 0.5


class Chain:
    """Stands in for a network: the exact posterior of a Markov chain of six tokens. Of earlier blocks it knows what
    generate shows it: the clean tokens decided last."""
    cfg, dtype, wte, layers = ModelConfig(token_dim=8), torch.float32, VECTORS, []

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        self.log_first = torch.randn(6, generator=rng).log_softmax(-1)
        self.log_next = torch.randn(6, 6, generator=rng).mul(1.5).log_softmax(-1)
        self.shown, self.prior = [], self.log_first

    def embedding(self):
        return VECTORS

    def alpha_bar(self):
        return diffusion.gumbel_schedule(1000, -1.9, 0.85, 8)

    def encode_prompt(self, *inputs):
        return None

    def join(self, x_0, x_t, *inputs):
        if x_0.size(1):
            self.shown.append(x_0.size(1))
            self.prior = self.log_next[(x_0[:, -1] @ VECTORS.T).argmax(-1)]
        return x_t

    def __call__(self, x_t, *inputs):
        return self.prior.expand(len(x_t), 6)

    def predict(self, prior, x_t, log_snr, E, temperature):
        """Scores of a block's tokens given all their noise: the forward-backward algorithm."""
        snr = log_snr.exp()[..., None]
        evidence = (snr * (1 + snr)).sqrt() * x_t @ E.T                                 # (B, n, 6)
        ahead, behind = [prior], [torch.zeros_like(prior)]
        for i in range(x_t.size(1) - 1):
            ahead.append(((ahead[-1] + evidence[:, i])[..., None] + self.log_next).logsumexp(1))
        for i in range(x_t.size(1) - 1, 0, -1):
            behind.insert(0, (self.log_next + (evidence[:, i] + behind[0])[:, None]).logsumexp(-1))
        logits = evidence + torch.stack(ahead, 1) + torch.stack(behind, 1)
        return logits.softmax(-1) @ E, logits


@pytest.mark.parametrize("block_length, steps", [(1, 1), (1, 30), (2, 40), (0, 40)])
def test_blocks_with_exact_posteriors_write_the_chain_they_come_from(one_generator, block_length, steps):
    """Pairs of neighbours, of one block and of two, come out as often as they should: at one step a token, where the
    softmax alone decides, and at many, where the noise has decided before."""
    chain, n, T = Chain(), 10_000, 4
    canvas = Canvas(torch.zeros(T, dtype=torch.int64), torch.zeros(T, dtype=torch.bool), NOTHING)
    cfg = Sampling(block_length=block_length, steps=steps, revisions=0, temperature=1.0)
    tokens = generate(chain, canvas, cfg, [None] * n)
    want = chain.log_first.exp()
    for i in range(T - 1):
        pairs = torch.zeros(6, 6).index_put_((tokens[:, i], tokens[:, i + 1]), torch.ones(n), accumulate=True) / n
        assert (pairs - want[:, None] * chain.log_next.exp()).abs().max() < 0.015, i
        want = want @ chain.log_next.exp()
    assert chain.shown == [block_length] * (T // block_length - 1 if block_length else 0)


LOG_P = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]).log()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("block_length, steps, eta", [(1, 0, 1.0), (4, 50, 1.0), (1, 1, 0.5)])
def test_an_untrained_network_writes_unigrams_at_the_temperature(one_generator, block_length, steps, eta, temperature):
    """Its context always says the unigram, so tokens are independent draws from softmax(log p / temperature). In one
    step eta is a temperature as well, of the draw."""
    torch.manual_seed(0)
    net = SunFish(ModelConfig(n_layer=1, n_head=1, n_embd=8, token_dim=16, block_size=4), 6, LOG_P)
    cfg = Sampling(revisions=0, block_length=block_length, steps=steps, eta=eta, temperature=temperature)
    canvas = Canvas(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool), NOTHING)
    share = torch.bincount(generate(net, canvas, cfg, [None] * 2500).flatten(), minlength=6) / 10_000
    want = (LOG_P / temperature / eta).softmax(0)
    assert (share - want).abs().max() < 0.015, (share, want)


# ---- the KV cache, and when it ends ----

ANY = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0, 1]) > 0
GIVEN = {"none": ANY & False, "prefix": torch.arange(12) < 5, "blanks": ANY, "both": ANY | (torch.arange(12) < 2)}


def read_anew(net, decoder, canvas, order, visible, clean, here, x_t, log_snr, guess):
    """Hidden states of the noisy tokens here, behind the clean ones, by `denoise`, the training forward, beside the
    text as it is now."""
    pos = here[clean.size(1):]

    def put(x, width):
        return None if x is None else torch.full((2, 12, *width), 7.0).index_copy(1, pos, x)
    E, visible = net.embedding(), torch.full(canvas.prompt.shape, visible)
    prompt, order = net.encode_prompt(canvas.prompt, visible, E), order.expand(2, -1)
    h = net.denoise(E[decoder.tokens], put(x_t, (16,)), put(log_snr, ()), order, prompt, E, put(guess, (16,)))
    return h[:, pos]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("block_length, strided", [(0, False), (1, False), (4, False), (5, True)])
@pytest.mark.parametrize("given", GIVEN)
def test_the_cache_says_what_a_fresh_reading_says(small, monkeypatch, given, block_length, strided, guidance):
    """At every step of writing. Guidance weighs two readings: with the prompt, and without it and the given start."""
    torch.manual_seed(1)
    known, calls, hidden = GIVEN[given], [], Decoder.hidden
    canvas = Canvas(torch.randint(50, (2, 12)), known, torch.randint(50, (2, 3)))
    order = diffusion.block_order(~known, block_length, strided)
    without_start = order.masked_fill(known.cummin(0).values, LATER)

    def compared(decoder, *inputs):
        calls.append(hidden(decoder, *inputs))
        want = read_anew(small, decoder, canvas, order, True, *inputs)
        if guidance != 1:
            null = read_anew(small, decoder, canvas, without_start, False, *inputs)
            assert (null - want).abs().max() > 1e-3
            want = null + guidance * (want - null)
        assert torch.allclose(calls[-1], want, atol=1e-4), (calls[-1] - want).abs().max()
        return calls[-1]
    monkeypatch.setattr(Decoder, "hidden", compared)
    cfg = Sampling(revisions=0, block_length=block_length, strided=strided, steps=3, guidance_scale=guidance)
    tokens = generate(small, canvas, cfg, generators("cpu", 1, [0, 1]))
    assert torch.equal(tokens[:, known], canvas.idx[:, known])
    assert len(calls) == 3 * plan(cfg, small.cfg, known).num_blocks


# ---- revisions ----

def surprises(net, canvas, tokens, order, guidance):
    """How much less likely each token (B, T) is than one of its entropy usually is, in nats, written in an order."""
    E, h = net.embedding(), []
    x_0, level = E[tokens], diffusion.log_snr(torch.tensor(1000), net.alpha_bar()).expand(tokens.shape)
    without_start = order.masked_fill(canvas.known.cummin(0).values, LATER)
    for visible, seen in ((True, order), (False, without_start)):
        prompt = net.encode_prompt(canvas.prompt, torch.full(canvas.prompt.shape, visible), E)
        h.append(net.denoise(x_0, 0 * x_0, level, seen.expand(tokens.shape), prompt, E))
    log_p = (net.head(4 * (h[1] + guidance * (h[0] - h[1]))) + net.log_unigram)[..., :50].log_softmax(-1)
    return -log_p.gather(-1, tokens[..., None])[..., 0] + (log_p.exp() * log_p).sum(-1)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("block_length, strided", [(0, False), (4, False), (5, True)])
@pytest.mark.parametrize("given", GIVEN)
def test_a_block_holds_up_to_the_first_token_that_is_rarer_than_usual(small, monkeypatch, given, block_length, strided,
                                                                      guidance):
    """A token is read given those before it and the blocks before its own, and no later block is seen. The first that
    does not hold is drawn anew, from what was read, and holds."""
    torch.manual_seed(2)
    known, revise, held = GIVEN[given], Decoder.revise, []
    draws, draw = [], diffusion.draw_tokens

    def drawing(logits, *rest):
        draws.append((logits, draw(logits, *rest)))
        return draws[-1][1]
    monkeypatch.setattr(diffusion, "draw_tokens", drawing)
    canvas = Canvas(torch.randint(50, (9, 12)), known, torch.randint(50, (9, 3)))
    blocks = diffusion.block_order(~known, block_length, strided)

    def compared(decoder, pos, block, rng):
        order = blocks.masked_fill(blocks > blocks[pos[0]], LATER)
        order[pos] += torch.arange(len(pos))
        cost = surprises(small, canvas, decoder.tokens, order, guidance)[:, pos]
        before = decoder.tokens[:, pos].clone()
        held.append(revise(decoder, pos, block, rng))
        log_p, drawn = 3.0 * draws[-1][0], draws[-1][1]     # the temperature
        drawn_from = -log_p.gather(-1, before[..., None])[..., 0] + (log_p.exp() * log_p).sum(-1)
        assert torch.allclose(cost, drawn_from, atol=1e-4)
        rare = (cost > -math.log(DOUBT)).tolist()
        for i, row in enumerate(rare):
            first = row.index(True) if any(row) else len(pos)
            assert held[-1][i].tolist() == [place <= first for place in range(len(pos))]
            want = [drawn[i, place] if place == first else before[i, place] for place in range(len(pos))]
            assert decoder.tokens[i, pos].tolist() == want
        return torch.ones_like(held[-1])
    monkeypatch.setattr(Decoder, "revise", compared)
    cfg = Sampling(block_length=block_length, strided=strided, steps=2, guidance_scale=guidance, temperature=3.0)
    generate(small, canvas, cfg, generators("cpu", 1, range(9)))
    held = torch.cat([row.flatten() for row in held])
    assert not held.all()


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("block_length, strided", [(0, False), (4, False), (5, True)])
@pytest.mark.parametrize("given", GIVEN)
def test_what_holds_is_seen_as_given_and_stays_while_the_rest_is_rewritten(small, monkeypatch, given, block_length,
                                                                           strided, guidance):
    torch.manual_seed(1)
    known, hidden, calls = GIVEN[given], Decoder.hidden, []
    canvas = Canvas(torch.randint(50, (2, 12)), known, torch.randint(50, (2, 3)))
    blocks, start = diffusion.block_order(~known, block_length, strided), known.cummin(0).values

    def read(decoder, pos, block, rng):
        decoder.before = decoder.tokens.clone()
        decoder.held = torch.arange(len(pos)) < torch.tensor([[1], [len(pos)]])         # all of the second text
        return decoder.held

    def compared(decoder, clean, here, x_t, log_snr, guess):
        h, pos = hidden(decoder, clean, here, x_t, log_snr, guess), here[clean.size(1):]
        free = log_snr < math.inf
        if not free.all():
            assert torch.equal(~free, decoder.held) and (guess is None or not guess[~free].any())
            order = 2 * blocks.repeat(2, 1)                 # earlier blocks do not see what holds, and it sees them
            order[:, pos] -= decoder.held.long()
            inputs = clean, here, x_t, log_snr, guess
            want = read_anew(small, decoder, canvas, order, True, *inputs)
            null = read_anew(small, decoder, canvas, order.masked_fill(start, LATER), False, *inputs)
            assert torch.allclose(h[free], (null + guidance * (want - null))[free], atol=1e-4)
            now = torch.zeros(2, 12, dtype=torch.bool).index_fill(1, pos, True).index_copy(1, pos, free)
            assert torch.equal(decoder.tokens[~now], decoder.before[~now])
            calls.append(now.sum())
        return h
    monkeypatch.setattr(Decoder, "hidden", compared)
    monkeypatch.setattr(Decoder, "revise", read)
    cfg = Sampling(block_length=block_length, strided=strided, steps=3, revisions=1, guidance_scale=guidance)
    generate(small, canvas, cfg, generators("cpu", 1, [0, 1]))
    assert sum(calls) == 3 * ((~known).sum() - len(blocks[~known].unique()))


def test_a_text_is_read_until_it_holds_or_so_many_times(small, monkeypatch):
    """With no revision, in the autoregressive limit, and by a network that predicts noise, not at all."""
    canvas = Canvas(torch.zeros(12, dtype=torch.int64), torch.zeros(12, dtype=torch.bool), NOTHING)

    def count(answers, **settings):
        calls = []
        monkeypatch.setattr(Decoder, "revise", lambda decoder, pos, *_: torch.full((1, len(pos)), next(answers)))
        generate(small, canvas, Sampling(**{"block_length": 6, "steps": 2, **settings}), generators("cpu", 1, [0]),
                 lambda *step: calls.append(step))
        return len(calls)
    assert count(iter([False, True, True]), revisions=3) == 2 + 2 + 2
    assert count(iter([False] * 6), revisions=3) == 2 * (2 + 3 * 2)
    assert count(iter([]), revisions=0) == 4 and count(iter([]), revisions=3, block_length=1, steps=1) == 12


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "constrained_ddim"])
def test_a_text_does_not_depend_on_its_batch(small, sampler):
    canvas = Canvas(torch.arange(12), torch.arange(12) < 3, torch.arange(5))
    cfg = Sampling(block_length=3, steps=4, sampler=sampler)
    together, alone = (generate(small, canvas, cfg, generators("cpu", 1, rows)) for rows in (range(4), [2]))
    assert torch.equal(together[2], alone[0]) and not torch.equal(together[1], alone[0])


def test_writing_ends_with_the_block_in_which_the_last_text_has_ended(small):
    """Up to there the texts are those that are written without an end, and nothing is written after it."""
    canvas = Canvas(torch.full((12,), 7), torch.zeros(12, dtype=torch.bool), NOTHING)
    cfg = Sampling(block_length=2, steps=3, revisions=0, temperature=0.7)
    full = generate(small, canvas, cfg, generators("cpu", 1, range(3)))
    later = full[:, 1:]                     # one at the very beginning opens a text
    firsts = {eot: (1 + (later == eot).int().argmax(1)).tolist() for eot in range(50) if (later == eot).any(1).all()}
    eot, first = min(firsts.items(), key=lambda item: max(item[1]))
    end = max(first) // 2 * 2 + 2
    made = generate(small, canvas, cfg, generators("cpu", 1, range(3)), eot=eot)
    assert end < 12 and torch.equal(made[:, :end], full[:, :end]) and (made[:, end:] == 7).all()


# ---- the bound ----

def texts_of(idx, loss_mask=None, P=0):
    prompt = torch.randint(50, (len(idx), P))
    loss_mask = torch.ones_like(idx, dtype=torch.bool) if loss_mask is None else loss_mask
    return Texts(idx, prompt, torch.ones_like(prompt, dtype=torch.bool), loss_mask)


@pytest.mark.parametrize("block_length, strided, steps", [(1, False, 0), (4, False, 0), (4, True, 0), (0, False, 0)])
def test_the_bound_of_an_untrained_network_is_the_unigram_cross_entropy(block_length, strided, steps):
    """At initialisation the network is the context-free posterior, and nothing can be better on independent tokens."""
    torch.manual_seed(0)
    log_p = (1.5 * torch.randn(50)).log_softmax(0)
    net = SunFish(ModelConfig(n_layer=1, n_head=2, n_embd=16, token_dim=16, block_size=12), 50, log_p)
    idx = torch.multinomial(log_p.exp(), 2000 * 12, replacement=True).view(2000, 12)
    row = bound(net, texts_of(idx), 500, block_length, strided, steps)
    nll = -log_p[idx].mean().item()
    assert abs(row["bound"] - nll) < 4 * row["bound_error"] + row["prior"] < 0.25, (row, nll)
    assert row["bound"] == pytest.approx(row["reconstruction"] + row["diffusion"] + row["prior"])
    assert (row["diffusion"] == 0) == (block_length == 1) and 0 < row["prior"] < 0.02


@torch.no_grad()
def bound_by_hand(net, texts, order, steps, passes):
    """The bound in nats a token by likelihood_bound, with a network that reads its guess so often."""
    E, alpha_bar, B = net.embedding(), diffusion.subsample(net.alpha_bar(), steps), len(texts.idx)
    prompt = net.encode_prompt(texts.prompt, texts.prompt_mask, E)

    def predict(x_t, log_snr):
        guess = None
        for _ in range(passes):
            h = net.denoise(E[texts.idx], x_t, log_snr, order.expand(B, -1), prompt, E, guess)
            guess, logits = net.predict(h, x_t, log_snr, E)
        return guess, logits
    t = diffusion.stratified(B, steps, order, diffusion.generator("cpu", "bound"))
    rng = [diffusion.generator("cpu", "bound", i) for i in range(B)]
    draw = diffusion.likelihood_bound(predict, E, texts.idx, alpha_bar, t, rng)
    return (draw.total() * texts.loss_mask).sum().item() / texts.loss_mask.sum().item()


MIDDLE = (torch.arange(12) >= 2) & (torch.arange(12) < 9)
CASES = {"one by one": (1, False, False, torch.arange(12)), "blocks": (4, False, False, torch.arange(12) // 4),
         "strided": (4, True, False, torch.arange(12) % 3), "window": (0, False, False, 0 * torch.arange(12)),
         "example": (3, False, True, torch.tensor([-1, -1, 0, 1, 1, 1, 2, 2, 2, LATER, LATER, LATER]))}


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_that_of_its_blocks_and_reads_a_guess_if_there_are_steps_to_make_one(small, case, steps):
    block_length, strided, is_example, order = CASES[case]
    torch.manual_seed(1)
    mask = MIDDLE.expand(40, -1) if is_example else None
    texts = texts_of(torch.randint(50, (40, 12)), mask, P=4)
    found = bound(small, texts, 40, block_length, strided, steps)["bound"]
    one, two = (bound_by_hand(small, texts, order, steps, passes) for passes in (1, 2))
    assert abs(one - two) > 0.01 and found == pytest.approx(two if steps > 1 else one, abs=1e-4)
    if case != "window":                                                # and other blocks would not do
        other = (order * 5 + 3) % 11
        assert abs(bound_by_hand(small, texts, other, steps, 1 + (steps > 1)) - found) > 0.01


def test_the_size_of_a_batch_changes_nothing_about_the_bound(small, monkeypatch):
    torch.manual_seed(1)
    texts = texts_of(torch.randint(50, (20, 12)), torch.arange(12) < torch.randint(3, 13, (20, 1)), P=4)
    want = bound(small, texts, 20, 4, steps=5)
    assert bound(small, texts, 3, 4, steps=5) == pytest.approx(want, abs=1e-5)
    monkeypatch.setattr(g, "max_scores", lambda device: 2 * 12 * 64)
    assert bound(small, texts, 20, 4, steps=5) == pytest.approx(want, abs=1e-5)


def test_the_bound_of_one_step_for_a_token_is_the_default_of_the_limit_and_all_levels_of_the_rest(small):
    texts = texts_of(torch.randint(50, (8, 12)))
    assert bound(small, texts, 8, 1) == bound(small, texts, 8, 1, steps=1)
    assert bound(small, texts, 8, 4) == bound(small, texts, 8, 4, steps=1000)


@torch.no_grad()
@pytest.mark.parametrize("block_length, strided", [(16, False), (2, False), (2, True), (3, True), (4, True)])
def test_what_is_not_written_yet_is_not_seen_whatever_stands_in_its_place(small, block_length, strided):
    """Texts whose blanks differ in length, in one batch: a position is of other blocks in one row than in another."""
    pieces = [list(range(8)), 0, list(range(20, 28))]
    at, canvas = g.trial_canvas(pieces, 1, range(1, 7), small.cfg)
    to_write = ~canvas.known & (canvas.idx == 0)
    assert to_write.sum(1).tolist() == [1, 2, 3, 4, 5, 6] and at == 3
    cfg = Sampling(block_length=block_length, strided=strided, steps=2, revisions=0)
    made = [generate(small, canvas._replace(idx=torch.where(to_write, there, canvas.idx)), cfg,
                     generators("cpu", 1, range(6))) for there in (0, 33)]
    assert torch.equal(made[0][to_write], made[1][to_write]) and len(made[0][to_write].unique()) > 5
