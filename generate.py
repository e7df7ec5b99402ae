"""
Tokens in, tokens out: a text is written block by block, each denoised beside the clean text that is there already.

`generate` fills a Canvas: token ids, which of them are known, and the prompt before them. A continuation knows its
beginning, a text with blanks all but those; known tokens are simply earlier than all blocks. `bound` measures the
likelihood of a text that is written in such blocks.
"""
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import diffusion
from configurator import UserError, in_range, one_of
from data import Texts
from diffusion import LATER, sample_constrained_ddim, sample_ddim, sample_ddpm
from machine import Replay, all_reduce, rank, world_size
from model import Layout, LayerCache, max_scores, neighbours

BLOCK_STEPS, WINDOW_STEPS = 4, 32       # denoising steps of a block, and of a whole window
DOUBT = 0.1                             # a token less likely than DOUBT * exp(-entropy) is implausible
LONGEST = 12                            # tokens that a blank of open length is tried with, from 1 on
BEHIND = 24                             # known tokens behind such a blank, at most, that decide which length is best


@dataclass(frozen=True)
class Sampling:
    block_length: int = 16           # tokens denoised together; 0 the whole window, 1 the autoregressive limit
    strided: bool = False            # spread the tokens of a block evenly over the text, instead of taking neighbours
    steps: int = 0                   # denoising steps of a block; 0: 4, window 32, single token 1, ddpm all
    sampler: str = "ddim"            # ddim, ddpm (all levels, eta=1), constrained_ddim (what is known is held)
    revisions: int = 8               # times, at most, that a block is read, and rewritten behind what is implausible
    eta: float = 1.0                 # fresh noise at each step of ddim: 0 deterministic to 1 ancestral, as ddpm
    temperature: float = 1.0         # of what the context says; below 1 is safer and duller
    guidance_scale: float = 1.0      # weight of the prompt; 1 is the network's own, above 1 heeds it more, 0 ignores it

    def check(self):
        one_of(self, "sampler", "ddim", "ddpm", "constrained_ddim")
        in_range(self, 0, 1e6, "block_length", "steps", "revisions")
        in_range(self, 0, 1, "eta")
        in_range(self, 1e-3, 1e3, "temperature")
        in_range(self, 0, 1e3, "guidance_scale")
        if self.sampler == "ddpm" and self.eta != 1:
            raise UserError(f"eta={self.eta}, but sampler=ddpm is eta=1; use --sampler=ddim")


class Canvas(NamedTuple):
    """A text to be completed."""
    idx: torch.Tensor                # (T,) or (B, T) int64 token ids; -1 where none is to stand
    known: torch.Tensor              # (T,) or (B, T) True where they are given
    prompt: torch.Tensor             # (P,) or (B, P) token ids before the text, which cross-attention sees


class Plan(NamedTuple):
    order: torch.Tensor              # (..., T) number of the block in which each token is written; -1 given
    num_blocks: int
    steps: int                       # of each block
    revisions: int                   # of each block, at most

    @property
    def most_steps(self):
        return self.num_blocks * self.steps * (1 + self.revisions)


def plan(cfg, model_cfg, known):
    """The Plan of texts given where known (..., T); UserError for more steps than the network has noise levels."""
    order, steps = diffusion.block_order(~known, cfg.block_length, cfg.strided), cfg.steps
    if steps > model_cfg.timesteps:
        raise UserError(f"steps={steps} is more than the {model_cfg.timesteps} noise levels of this network; use fewer")
    if steps == 0 and cfg.sampler == "ddpm":
        steps = model_cfg.timesteps
    elif steps == 0 and cfg.block_length == 1 and model_cfg.objective == "ce":
        steps = 1                    # a single token is trained at pure noise
    elif steps == 0:
        steps = min(WINDOW_STEPS if cfg.block_length == 0 else BLOCK_STEPS, model_cfg.timesteps)
    revisions = cfg.revisions if cfg.block_length != 1 and model_cfg.objective == "ce" else 0
    return Plan(order, len(order[~known].unique()), steps, revisions)


class Decoder:
    """Texts (B, T) that are written block by block by a network with a KV cache of their clean tokens, and guidance.

    With guidance each text is in the batch twice: once with the prompt and the given beginning of the text, once with
    both hidden. The hidden states are combined before the head, which is linear (Ho & Salimans 2022, eq. 6).
    """

    def __init__(self, model, canvas, cfg, order, rng, watch):
        self.model, self.cfg = model, cfg
        self.rng, self.watch = rng, watch
        device = model.wte.device
        self.alpha_bar, self.vectors = model.alpha_bar().cpu(), model.embedding()
        self.log_snr = diffusion.log_snr(torch.arange(len(self.alpha_bar)), self.alpha_bar).to(device)
        self.E = self.vectors.to(model.dtype)                              # of the products
        self.tokens = canvas.idx.to(device).clamp(min=0).expand(len(rng), -1).clone()
        self.blocks = torch.atleast_2d(order)                              # (1 or B, T) on the CPU
        to_write = (self.blocks >= 0) & (self.blocks < LATER)
        self.new = (~to_write.any(0)).nonzero().flatten().to(device)       # clean tokens that are not in the cache yet
        self.cache = [LayerCache(self.blocks.size(1)) for _ in model.layers]
        self.predict = Replay(self.predict_once, device)
        start = (self.blocks < 0).cummin(1).values & to_write.any(1, keepdim=True)     # given, nothing written before
        prompt = canvas.prompt.to(device).expand(len(rng), -1)
        self.rows = 2 if cfg.guidance_scale != 1 and (prompt.numel() or start.any()) else 1
        visible = torch.ones_like(prompt, dtype=torch.bool)
        visible = torch.cat((visible, ~visible)[:self.rows])
        self.prompt = model.encode_prompt(prompt.repeat(self.rows, 1), visible, self.E)
        orders = self.blocks, torch.where(start, LATER, self.blocks)
        self.planned = torch.cat([x.expand_as(self.tokens) for x in orders[:self.rows]]).to(device)    # (rows * B, T)
        self.order, self.near = self.planned.clone(), neighbours(self.planned) <= self.planned[..., None]

    def hidden(self, clean, here, x_t, log_snr, guess):
        """Hidden states (B, n, n_embd) of noisy tokens x_t (B, n, C) at the last n of the positions here (m + n,); the
        first m are of clean tokens (B, m), which go into the cache."""
        mask = self.order[:, None, None] <= self.order[:, None, here, None]    # so clean tokens see no noisy one
        layout = Layout(clean.size(1), here, mask, None, self.near[:, here], None)
        x = self.model.join(self.E[clean], x_t, log_snr, self.E, guess).repeat(self.rows, 1, 1)
        h = self.model(x, log_snr.repeat(self.rows, 1), layout, self.prompt, self.cache)
        return h if self.rows == 1 else diffusion.guide(*h.chunk(2), self.cfg.guidance_scale)

    def predict_once(self, clean, here, x_t, log_snr, guess):
        """(x_0_hat, logits) of these tokens."""
        h = self.hidden(clean, here, x_t, log_snr, guess)
        return self.model.predict(h, x_t, log_snr, self.E, self.cfg.temperature)

    def write_block(self, block, steps, revisions=0):
        """Denoise the tokens of a block in so many steps; then read them, at most `revisions` times, and denoise again
        what follows the first implausible one. Returns where they stand, pos (n,), some of which may be given."""
        is_now, device = self.blocks == block, self.tokens.device
        pos = is_now.any(0).nonzero().flatten()
        fixed, pos = ~is_now[:, pos], pos.to(device)
        is_mixed, fixed = bool(fixed.any()), fixed.expand(len(self.rng), -1).to(device)
        rng = self.rng
        self.denoise_block(block, pos, steps, rng, fixed if is_mixed else None)
        for _ in range(revisions):
            held = self.revise(pos, block, rng) | fixed
            done = held.all(1).tolist()                     # whose noise then would depend on the others of the batch
            if all(done):
                break
            spare = torch.Generator(held.device)
            rng = [spare if is_done else own for is_done, own in zip(done, rng, strict=True)]
            self.denoise_block(block, pos, steps, rng, held)
        self.new = pos
        return pos

    def denoise_block(self, block, pos, steps, rng, held=None):
        """Denoise the tokens at pos (n,), but for those in held (B, n), which, if of this block, the others see as
        clean. Tokens come from the logits: drawn in the last step, before it the best ones, to be shown."""
        guess, calls = None, 0
        is_free = held is None
        held = torch.zeros_like(self.tokens[:, pos], dtype=torch.bool) if is_free else held
        self.order.copy_(self.planned)                      # in place: a CUDA graph reads it there
        is_clean = held.repeat(self.rows, 1) & (self.planned[:, pos] == block)     # of later ones nothing is there
        self.order[:, pos] -= is_clean.long()
        self.near.copy_(neighbours(self.order) <= self.order[..., None])

        def denoise_step(x_t, t):
            nonlocal guess, calls
            level, here = torch.where(held, math.inf, self.log_snr[t][:, None]), torch.cat((self.new, pos))
            x_0_hat, logits = self.predict(self.tokens[:, self.new], here, x_t, level, guess)
            guess = x_0_hat.masked_fill(held[..., None], 0)
            self.new = self.new[:0]
            calls += 1
            drawn = diffusion.draw_tokens(logits, self.cfg.eta if calls == steps else 0, rng)
            self.tokens[:, pos] = torch.where(held, self.tokens[:, pos], drawn)
            if self.watch:
                self.watch(int(t[0]), self.tokens, pos, logits)
            return guess

        x_0, eta = self.vectors[self.tokens[:, pos]], self.cfg.eta
        x_T = diffusion.randn(x_0, rng)
        if not is_free or self.cfg.sampler == "constrained_ddim":
            sample_constrained_ddim(denoise_step, x_T, self.alpha_bar, x_0, held, steps, eta, rng)
        elif self.cfg.sampler == "ddpm":
            sample_ddpm(denoise_step, x_T, self.alpha_bar, steps, rng)
        else:
            sample_ddim(denoise_step, x_T, self.alpha_bar, steps, eta, rng)

    def revise(self, pos, block, rng):
        """Read a block, at pos (n,), token by token: each given those before it, in one call without the cache. The
        first token that is not `plausible` is drawn anew. Returns where the text now holds (B, n): up to that token."""
        model, is_now = self.model, self.planned == block
        each = torch.arange(self.planned.size(1), device=pos.device)
        order = torch.where(self.planned < block, self.planned, torch.where(is_now, block + each, LATER))
        T = 1 + int((order < LATER).any(0).nonzero()[-1])
        x_0, level = self.E[self.tokens[:, :T]].repeat(self.rows, 1, 1), self.log_snr[-1:].expand(len(order), T)
        nothing = torch.zeros_like(x_0)                     # for noise of the highest level, which says none
        h = model.denoise(x_0, nothing, level, order[:, :T], self.prompt, self.E)[:, pos]
        h = h if self.rows == 1 else diffusion.guide(*h.chunk(2), self.cfg.guidance_scale)
        log_p = model.logits(h, nothing[:len(h), pos], level[:len(h), pos], self.E).log_softmax(-1)
        held = (plausible(log_p, self.tokens[:, pos]) | ~is_now[:len(h), pos]).cummin(1).values
        first = torch.arange(len(pos), device=pos.device) == held.sum(1, keepdim=True)     # that does not hold
        drawn = diffusion.draw_tokens(log_p / self.cfg.temperature, self.cfg.eta, rng)
        self.tokens[:, pos] = torch.where(first, drawn, self.tokens[:, pos])
        return held | first


def plausible(log_p, ids):
    """Whether tokens ids (B, n) are at least DOUBT * exp(-entropy) likely under log_p (B, n, V): the typical acceptance
    of Medusa (Cai et al. 2024)."""
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, ids[..., None])[..., 0] >= math.log(DOUBT) - entropy


@torch.no_grad()
def generate(model, canvas, cfg, rng, watch=None, eot=None):
    """Token ids (B, T): those of the canvas where known, the others written block by block as cfg, a Sampling, says.

    rng is a list of a Generator for each of B rows, so that a text does not depend on its batch. watch(t, tokens, pos,
    logits) sees the text after each step. With `eot`, writing ends once each text has got this token.
    """
    device = model.wte.device
    order, _, *how = plan(cfg, model.cfg, canvas.known)
    order = torch.where(canvas.idx < 0, LATER, order)
    ended = torch.zeros(len(rng), dtype=torch.bool, device=device)
    with torch.autocast(device.type, model.dtype, enabled=model.dtype != torch.float32):
        decoder = Decoder(model, canvas, cfg, order, rng, watch)
        for block in order[(order >= 0) & (order < LATER)].unique():
            pos = decoder.write_block(block, *how)
            if eot is not None and not cfg.strided:                     # whose blocks leave gaps before the end
                ended |= ((decoder.tokens[:, pos] == eot) & (pos > 0)).any(1)   # the first token may open the text
                if ended.all():
                    break
    decoder.predict = None                                  # which holds the decoder, and recorded steps much memory
    return decoder.tokens


def generators(device, seed, numbers):
    """The noise of samples with these numbers, a Generator each."""
    return [diffusion.generator(device, seed, number) for number in numbers]


def prompt_canvas(ids, seq_len, model_cfg):
    """The Canvas of a text of seq_len tokens (0: all that the window leaves) after the prompt `ids`: its last tokens
    stand in the window, up to half of it, and cross-attention reads those before. UserError if there is no room."""
    T = model_cfg.block_size
    n = min(len(ids), T // 2, max(0, T - seq_len))
    before, given = ids[:len(ids) - n], ids[len(ids) - n:]
    idx = torch.tensor(given + [0] * (seq_len or T - n), dtype=torch.int64)
    if len(idx) > T:
        raise UserError(f"seq_len={seq_len} is more than the {T} tokens of this network's window; write fewer")
    if len(before) > model_cfg.prompt_size:
        raise UserError(f"the prompt has {len(ids)} tokens, more than the {model_cfg.prompt_size + n} that this "
                        "network reads beside what it is to write; shorten it")
    return Canvas(idx, torch.arange(len(idx)) < n, torch.tensor(before, dtype=torch.int64))


# ---- blanks: a text in pieces, which are lists of known ids and lengths of blanks, 0 for an open one ----

def to_canvas(pieces):
    """Token ids (T,) and where they are known (T,); blanks hold id 0, open ones half of what they may hold."""
    ids, known = [], []
    for piece in pieces:
        is_text = isinstance(piece, list)
        part = piece if is_text else [0] * (piece or LONGEST // 2)
        ids += part
        known += [is_text] * len(part)
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(known, dtype=torch.bool)


def window_around(known, at, size):
    """(start, stop) of the at most `size` tokens in whose middle the blank that begins at `at` stands, in a text given
    where known (T,); of a blank too long for that the first half of `size`. No other blank is cut."""
    if len(known) <= size:
        return 0, len(known)
    end = min(at + int((known[at:].cumsum(0) == 0).sum()), at + size // 2)
    start = max(0, min(at - (size - end + at) // 2, len(known) - size))
    stop = start + size
    while 0 < start < at and not (known[start] or known[start - 1]):
        start += 1
    while end < stop < len(known) and not (known[stop] or known[stop - 1]):
        stop -= 1
    return start, stop


def infill_canvas(idx, known, at, model_cfg):
    """(start, Canvas) of the window around the blank at `at` in texts idx (B, T); before it stand known tokens only."""
    start, stop = window_around(known, at, model_cfg.block_size)
    blanks = (~known[:start]).nonzero().flatten().tolist()
    first = max(0, start - model_cfg.prompt_size, blanks[-1] + 1 if blanks else 0)
    return start, Canvas(idx[:, start:stop], known[start:stop], idx[:, first:start])


def fill(model, pieces, cfg, rng, watch=None):
    """Texts (lists of token ids) whose blanks, of given lengths, are filled, window by window; rng has for each text a
    function that makes its Generator."""
    idx, known = to_canvas(pieces)
    texts = idx.repeat(len(rng), 1)
    while not known.all():
        start, canvas = infill_canvas(texts, known, int((~known).nonzero()[0]), model.cfg)
        stop = start + len(canvas.known)
        if watch:
            watch.begin(canvas.known, plan(cfg, model.cfg, canvas.known).most_steps)
        texts[:, start:stop] = generate(model, canvas, cfg, [make() for make in rng], watch).cpu()
        known[start:stop] = True
    return texts.tolist()


def trial_canvas(pieces, i, lengths, model_cfg):
    """(at, Canvas) of a text with its blank i of each of these lengths, the longest last, a row each, in its window.
    The blank begins at `at`; other blanks are not to be written, nor what shorter texts lack at their end."""
    rows = [to_canvas([*pieces[:i], n, *pieces[i + 1:]]) for n in lengths]
    at, longest = len(to_canvas(pieces[:i])[0]), rows[-1]
    start, canvas = infill_canvas(longest[0][None], longest[1], at, model_cfg)
    T = len(canvas.known)
    idx, known = torch.full((len(rows), T), -1), torch.zeros(len(rows), T, dtype=torch.bool)
    for row, (n, (ids, is_known)) in enumerate(zip(lengths, rows, strict=True)):
        ids, is_known = ids[start:start + T], is_known[start:start + T]
        known[row, :len(ids)] = is_known
        idx[row, :len(ids)] = torch.where(is_known, ids, -1)
        idx[row, at - start:at - start + n] = 0
    return at - start, Canvas(idx, known, canvas.prompt)


def length_costs(model, pieces, i, lengths, cfg, make):
    """Nats a token of the text *behind* piece i, an open blank, once it is filled with so many tokens: the same text
    for every length, so no normalisation (bench/LOG.md). With nothing behind it, of the fill itself. make() is the
    Generator of each."""
    at, canvas = trial_canvas(pieces, i, lengths, model.cfg)
    once = replace(cfg, revisions=0)                    # which tells the length as well (bench/LOG.md)
    made = generate(model, canvas, once, [make() for _ in lengths])
    nll, costs = nll_left_to_right(model, made, canvas.prompt.to(made.device)).cpu(), []
    most = min(BEHIND, max(1, (model.cfg.block_size - LONGEST) // 2))
    for n, row, known in zip(lengths, nll, canvas.known, strict=True):
        behind = row[at + n:][known[at + n:].cumprod(0) > 0][:most]
        costs.append((behind if len(behind) else row[at:at + n]).mean().item())
    return costs


def lengths_tried(model_cfg):
    """The numbers of tokens that an open blank is tried with."""
    return range(1, min(LONGEST, model_cfg.block_size // 2) + 1)


def infill(model, pieces, cfg, rng, watch=None):
    """Texts, each in pieces of token ids, of a text that may have open blanks: from left to right each takes the length
    that costs least. rng has for each text a function that makes its Generator. There is no guidance."""
    cfg, texts = replace(cfg, guidance_scale=1.0), []
    lengths = lengths_tried(model.cfg)
    open_ones = [i for i, piece in enumerate(pieces) if piece == 0]
    for group in [[make] for make in rng] if open_ones else [rng]:
        chosen = list(pieces)
        for i in open_ones:
            costs = length_costs(model, chosen, i, lengths, cfg, group[0])
            chosen[i] = lengths[costs.index(min(costs))]
        sizes = [len(piece) if isinstance(piece, list) else piece for piece in chosen]
        made = fill(model, chosen, cfg, group, None if texts else watch)
        texts += [[part.tolist() for part in torch.tensor(ids).split(sizes)] for ids in made]
    return texts


# ---- likelihood ----

class Scorer:
    """The network on Texts whose tokens that count are written in blocks of so many tokens."""

    def __init__(self, model, texts, block_length, strided=False):
        self.model, self.texts = model, texts
        self.E = model.embedding()
        order, before = diffusion.block_order(texts.loss_mask, block_length, strided), texts.loss_mask.cumsum(1) == 0
        self.order = torch.where(texts.loss_mask, order, torch.where(before, -1, LATER))
        self.one_block = bool((self.order == self.order[0, 0]).all())

    def predict(self, rows, two_passes, x_t, log_snr):
        """(x_0_hat, logits) of the texts in rows, of a second pass if there are two (self-conditioning)."""
        texts, E = self.texts, self.E
        guess = None
        x_0, order = E[texts.idx[rows]], None if self.one_block else self.order[rows]
        prompt = self.model.encode_prompt(texts.prompt[rows], texts.prompt_mask[rows], E)
        for _ in range(1 + two_passes):
            h = self.model.denoise(x_0, x_t, log_snr, order, prompt, E, guess)
            guess, logits = self.model.predict(h, x_t, log_snr, E)
        return guess, logits


@torch.no_grad()
def nll_left_to_right(model, tokens, prompt):
    """-log p of tokens (B, T) in nats, each given those before it and a prompt (B, P), from noise that says nothing."""
    scorer = Scorer(model, Texts(tokens, prompt, torch.ones_like(prompt) > 0, torch.ones_like(tokens) > 0), 1)
    x_T = diffusion.randn(scorer.E[tokens], diffusion.generator(tokens.device, "nats"))
    level = diffusion.log_snr(torch.full_like(tokens, model.cfg.timesteps), model.alpha_bar())
    with torch.autocast(tokens.device.type, model.dtype, enabled=model.dtype != torch.float32):
        _, logits = scorer.predict(slice(None), False, x_T, level)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


@torch.no_grad()
def bound(model, texts, batch_size, block_length, strided=False, steps=0):
    """An upper bound on -log p of the tokens of Texts that count, in nats a token, written in such blocks in so many
    steps each (0: all noise levels; a single token in one): its parts, `bound` and `bound_error`, the standard error.

    The noise is fixed, a block of a text stands at one level, and the size of a batch changes nothing. Each process
    takes its share of the texts, and all must call.
    """
    if steps == 0:
        steps = 1 if block_length == 1 and model.cfg.objective == "ce" else model.cfg.timesteps
    scorer = Scorer(model, texts, block_length, strided)
    idx, mask = texts.idx, texts.loss_mask
    alpha_bar = diffusion.subsample(model.alpha_bar(), steps)
    t = diffusion.stratified(len(idx), steps, scorer.order.cpu(), diffusion.generator("cpu", "bound"))
    most = max(1, max_scores(idx.device) // (idx.size(1) * len(model.wte)))
    parts = torch.zeros(3, *idx.shape, dtype=torch.float64)
    for rows in torch.arange(len(idx))[rank()::world_size()].split(min(batch_size, most)):
        rng = [diffusion.generator(idx.device, "bound", i) for i in rows.tolist()]
        predict = partial(scorer.predict, rows, steps > 1)
        with torch.autocast(idx.device.type, model.dtype, enabled=model.dtype != torch.float32):
            found = diffusion.likelihood_bound(predict, scorer.E, idx[rows], alpha_bar, t[rows], rng)
        parts[:, rows] = torch.stack(found)
    mask = mask.cpu()
    parts = torch.where(mask, all_reduce(parts), 0).sum(2)                                      # (3, B)
    total, tokens = parts.sum(0), mask.sum(1)                                                   # of each text
    mean = total.sum() / tokens.sum()
    spread = (total - mean * tokens).std(correction=1) if len(total) > 1 else torch.tensor(torch.nan)
    error = spread * len(total) ** 0.5 / tokens.sum()                                           # of a ratio of sums
    row = {name: (part.sum() / tokens.sum()).item() for name, part in zip(diffusion.Bound._fields, parts, strict=True)}
    return {**row, "bound": mean.item(), "bound_error": error.item()}
