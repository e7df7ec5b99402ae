"""
The twins: autoregressive and masked diffusion models from SunFish's own layers, for the same text and budget.

    python bench/twins.py config/stories.py --kind=autoregressive --out_dir=out/causal
    python bench/twins.py config/stories.py --kind=masked --out_dir=out/masked
    python bench/twins.py config/stories.py --kind=blocks --out_dir=out/blocks

The same shards, windows in the same order, token vectors, layers, width, optimizer and average as train.py; no noise,
no prompt, no self-conditioning. The autoregressive twin sees only the past, and its loss is exact. The masked one
(MDLM, Sahoo et al. 2024) guesses hidden tokens from the others, in any order, and its loss, weighted by one over the
share that is hidden, is a bound. The one of blocks (BD3-LM, Arriola et al. 2025) has SunFish's two streams, orders and
mixture of block lengths: hidden tokens of a block beside the clean ones of earlier blocks, so that each row of
block_length has its pair. Of the settings those of data, network and step count; a twin has one process, and is saved
at its end.
"""
import copy
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint as ckpt
import train
from configurator import Fault, UserError, one_of, run
from diffusion import LATER, block_order, generator, golden_offset, hash64
from generate import plausible
from machine import choose_machine, keep_memory
from model import GAIN, Layout, SunFish, neighbours, training_layout

KINDS = ("autoregressive", "masked", "blocks")


@dataclass(frozen=True)
class Config(train.Config):
    kind: str = "autoregressive"         # autoregressive, masked, blocks
    out_dir: str = "out/twin"            # the checkpoint and log.jsonl go here

    def check(self):
        super().check()
        one_of(self, "kind", *KINDS)


class Twin(nn.Module):
    """Token ids -> scores, by a SunFish that takes all its tokens for clean but hidden ones. kind is one of KINDS. The
    scores of a batch stand in memory as a whole: fine for small vocabularies."""

    def __init__(self, cfg, vocab_size, log_unigram=None, kind="autoregressive"):
        super().__init__()
        self.net, self.kind = SunFish(cfg, vocab_size, log_unigram), kind
        self.net.schedule.requires_grad_(False)
        self.blank = nn.Parameter(torch.randn(cfg.token_dim))       # stands before the first token, or for a hidden one

    def layout(self, T, order):
        """Whom T tokens see: those before, and themselves, or all, or what the order (B, T) of blocks says."""
        pos = torch.arange(T, device=self.blank.device)
        if self.kind != "autoregressive":
            return training_layout(order, T, pos.device)
        past, near = pos <= pos[:, None], neighbours(pos[None]) <= pos[None, :, None]
        return Layout(0, pos, past[None, None], None, near, None)

    def hidden(self, idx, blank, order=None):
        """Hidden states (B, T, n_embd) of the tokens idx (B, T). Those where blank (B, T) are hidden from the masked
        twins; that of blocks sees beside them the clean ones of earlier blocks, by their order (B, T). Each token of
        the autoregressive one stands one place later, so that its scores are of the next."""
        net = self.net
        E = net.embedding()
        x = torch.where(blank[..., None], self.blank, E[idx])                                      # (B, T, C)
        if self.kind == "autoregressive":
            x = torch.cat((self.blank.expand(len(idx), 1, -1), x[:, :-1]), 1)
        if self.kind == "blocks":
            x, order = torch.cat((E[idx], x), 1), torch.zeros_like(idx) if order is None else order
        no_prompt = net.encode_prompt(idx[:, :0], blank[:, :0], E)
        clean = torch.full(idx.shape, math.inf, device=idx.device)                                 # log_snr
        layout = self.layout(idx.size(1), order if self.kind == "blocks" else None)
        return net(F.pad(x, (0, net.cfg.token_dim)), clean, layout, no_prompt)

    def scores(self, h):
        """Scores (..., V) in float32 of hidden states (..., n_embd)."""
        return (self.net.head(GAIN * h) + self.net.log_unigram).float()

    def hide(self, order, rng=None):
        """Which tokens to hide, and the weight of each in the bound: two of (B, T). A masked twin hides k of the n
        tokens of each block of an order (B, T), equally often 1 to n, at weight n / k: MDLM's integral over the masking
        rate, done exactly. The shares of a sequence's blocks, and of the sequences, are evenly spread."""
        if self.kind == "autoregressive":
            return torch.zeros_like(order, dtype=torch.bool), torch.ones(order.shape)
        B, same = len(order), order[:, :, None] == order[:, None]
        u = (torch.randperm(B, generator=rng) + torch.rand(B, generator=rng)) / B
        n, noise = same.sum(-1), torch.rand(order.shape, generator=rng)
        k = 1 + (golden_offset(u[:, None], order) * n).long().clamp(max=n - 1)
        blank = (same & (noise[:, None] < noise[..., None])).sum(-1) < k         # the k of the least noise
        return blank, blank * (n / k)

    def forward(self, idx, blank, weight, order=None):
        """Weighted cross-entropy of each token in nats (B, T), whose mean is the likelihood, or a draw of the
        masked twins' bound."""
        return weight * cross_entropy(self.scores(self.hidden(idx, blank, order)), idx)

    # ---- what bench/quality.py asks for ----

    @torch.no_grad()
    def nll(self, idx):
        """Nats of each token of idx (B, T) given those before it, by the autoregressive twin: (B, T)."""
        blank, weight = self.hide(torch.zeros_like(idx, device="cpu"))
        return self(idx, blank.to(idx.device), weight.to(idx.device))

    @torch.no_grad()
    def features(self, idx):
        """The last hidden state (B, n_embd), which has seen all but the last token of idx (B, T)."""
        return self.hidden(idx, torch.zeros_like(idx, dtype=torch.bool))[:, -1]

    @torch.no_grad()
    def predict(self, idx, blank, order=None):
        """Scores (B, T, V) of the tokens idx (B, T), those where blank (B, T) unknown to the masked twins."""
        return self.scores(self.hidden(idx, blank, order))

    @torch.no_grad()
    def nll_in_blocks(self, idx, block_length, strided=False, rng=None):
        """One draw of a masked twin's bound for each token of idx (B, T) given those of earlier blocks, in nats: (B,
        T). From the one of any order later blocks are hidden as a whole, k tokens of its own beside them; blocks of 1
        are exact."""
        order = block_order(torch.ones_like(idx[0], dtype=torch.bool), block_length, strided)
        if self.kind == "blocks":
            order = order.expand(idx.shape)
            hidden = (x.to(idx.device) for x in self.hide(order.cpu(), rng))
            return self(idx, *hidden, order)
        nll = torch.zeros(idx.shape, device=idx.device)
        for block in order.unique():
            now = order == block
            blank = (order > block).expand(idx.shape).clone()
            some, weight = self.hide(torch.zeros(len(idx), int(now.sum()), dtype=torch.int64), rng)
            blank[:, now] = some.to(idx.device)
            scores = self.scores(self.hidden(idx, blank)[:, now])
            nll[:, now] = weight.to(idx.device) * cross_entropy(scores, idx[:, now])
        return nll

    def sample(self, n, length, steps, temperature=1.0, rng=None, block_length=0, revisions=0):
        """Texts (n, length), drawn on the CPU generator rng: token by token, or block by block, each unmasked in
        `steps` equal parts of time. The twin of blocks reads and rewrites a block as SunFish does, so many times."""
        block_length = 1 if self.kind == "autoregressive" else block_length
        order = length * block_order(torch.ones(length, dtype=torch.bool), block_length)
        idx = torch.zeros(n, length, dtype=torch.int64)
        for block in order.unique():
            here, unwritten = (x.expand(n, -1) for x in (order == block, order >= block))
            left, turns = (steps, 1 + revisions) if here[0].sum() > 1 else (1, 1)
            held = torch.zeros_like(here)
            for turn in range(turns):
                held = here & self.read(idx, order, block, temperature, rng) if turn else held
                self.unmask(idx, here & ~held, unwritten & ~held, order - held.long(), (left, temperature), rng)
        return idx

    def unmask(self, idx, free, blank, order, how, rng):
        """Write the tokens idx (n, T) in place where free, those in blank unknown (n, T), in an order (n, T). `how` is
        (steps, temperature): ancestral sampling, each token with probability 1 / (steps left) (Sahoo et al. 2024)."""
        steps, temperature = how
        for i in range(steps):
            now = free & blank & (torch.rand(idx.shape, generator=rng) < 1 / (steps - i))
            rows = now.any(1)                   # the others' calls, which change nothing, are saved
            if rows.any():
                inputs = (x.to(self.blank.device) for x in (idx[rows], blank[rows], order[rows]))
                p = (self.predict(*inputs) / temperature).softmax(-1).cpu()
                idx[now] = torch.multinomial(p[now[rows]], 1, generator=rng).flatten()
                blank = blank & ~now

    def read(self, idx, order, block, temperature, rng):
        """Where a block of idx (n, T) holds, read token by token, and what does not drawn anew, as by
        `generate.Decoder.revise`: (n, T)."""
        place = torch.where(order == block, order + torch.arange(len(order)), order).masked_fill(order > block, LATER)
        hidden = torch.ones_like(idx, dtype=torch.bool)
        inputs = (x.to(self.blank.device) for x in (idx, hidden, place.expand(len(idx), -1)))
        log_p = self.predict(*inputs).log_softmax(-1).cpu()
        held = (plausible(log_p, idx) | (order != block)).cummin(1).values
        first = torch.arange(len(order)) == held.sum(1, keepdim=True)
        drawn = torch.multinomial((log_p / temperature).softmax(-1).flatten(0, 1), 1, generator=rng).view_as(idx)
        idx[first] = drawn[first]
        return held | first


def cross_entropy(scores, idx):
    """-log p of tokens idx (B, T) under scores (B, T, V), in nats: (B, T)."""
    return F.cross_entropy(scores.transpose(1, 2), idx, reduction="none")


def load_twin(place, device="cpu"):
    """The twin of a file, or of the newest in a folder, and the file's content; UserError if there is none."""
    paths = [Path(place)] if Path(place).is_file() else sorted(Path(place).glob("twin_*.pt"))
    content = ckpt.read(paths[-1]) if paths else {}
    if "kind" not in content:
        raise UserError(f"{place} holds no twin; train one with bench/twins.py")
    twin = Twin(ckpt.model_config(content), content["data"]["vocab_size"], kind=content["kind"])
    twin.load_state_dict(content["model"])
    return twin.to(device).eval().requires_grad_(False), content


@torch.no_grad()
def evaluate(twin, idx, batch_size, block_length=0):
    """Nats a token of the windows idx (N, T), and the standard error; of a masked twin from fixed draws, written in
    blocks of that length if it is the one of blocks."""
    parts = []
    for i, part in enumerate(idx.split(batch_size)):
        rng = generator("cpu", "bound", i)
        if twin.kind == "blocks":
            nll = twin.nll_in_blocks(part, block_length, rng=rng)
        else:
            hidden = twin.hide(torch.zeros_like(part, device="cpu"), rng)
            nll = twin(part, *(x.to(idx.device) for x in hidden))
        parts.append(nll.double().mean(1))
    nll = torch.cat(parts)
    return nll.mean().item(), (nll.std() / len(nll) ** 0.5).item()


# ---- training ----

def train_step(twin, optimizer, batches, cfg, step, machine):
    """One optimizer step: the mean loss of a token in nats. Fault if it or the gradient is not finite."""
    total = 0.0
    for rows in cfg.micro_batches():
        batch, rng = next(batches), generator("cpu", cfg.seed, step, rows[0])
        idx, one_block = batch.idx, twin.kind != "blocks" or batch.order is None
        order = torch.zeros_like(idx) if one_block else batch.order
        hidden = twin.hide(order.cpu(), rng)
        with machine.autocast():
            loss = twin(idx, *(x.to(machine.device) for x in hidden), order).sum() / cfg.batch_tokens
        loss.backward()
        total += loss.item()
    grad_norm = nn.utils.clip_grad_norm_(twin.parameters(), cfg.grad_clip or math.inf).item()
    if not math.isfinite(total + grad_norm):
        raise Fault(f"step {step + 1}: loss {total}, gradient norm {grad_norm}; train again with a lower learning_rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def main(cfg):
    keep_memory()
    folder = Path(cfg.out_dir)
    if any(folder.glob("twin_*.pt")):
        raise UserError(f"{folder} already holds a twin; choose another --out_dir")
    machine = choose_machine(cfg)
    data, train_data, val_data = train.open_data(cfg)
    torch.manual_seed(hash64(cfg.seed, "weights"))
    twin = Twin(cfg, data["vocab_size"], train_data.log_unigram(), cfg.kind).to(machine.device)
    average = copy.deepcopy(twin).requires_grad_(False)
    if machine.compiled:
        train.compile_parts(twin.net)
    optimizer = train.make_optimizer(twin, cfg)
    val = val_data.spread(cfg.eval_sequences).idx.to(machine.device)
    folder.mkdir(parents=True, exist_ok=True)
    batches, clock = train.Prefetch(train.all_batches(cfg, train_data, 0, machine.device)), time.perf_counter()
    with open(folder / "log.jsonl", "w", buffering=1) as log:
        for step in range(cfg.max_steps):
            train.set_learning_rate(optimizer, cfg, step)
            loss, done = train_step(twin, optimizer, batches, cfg, step, machine), step + 1
            train.update_ema(average, twin, cfg.ema_decay, step)
            if done == cfg.max_steps or cfg.eval_interval and done % cfg.eval_interval == 0:
                bound, error = evaluate(average, val, cfg.micro_batch, cfg.block_length)
                row = dict(step=done, tokens=done * cfg.batch_tokens, loss=loss, bound=bound, bound_error=error,
                           seconds=time.perf_counter() - clock)
                print("step {step} {tokens:,} tokens: loss {loss:.3f}, validation {bound:.3f} +- {bound_error:.3f} "
                      "nats a token, {seconds:.0f} s".format(**row))
                log.write(json.dumps(row) + "\n")
    content = dict(step=cfg.max_steps, kind=cfg.kind, config=dataclasses.asdict(cfg), data=data)
    ckpt.write(folder / f"twin_{cfg.max_steps:08d}.pt", dict(content, model=average.state_dict()))


if __name__ == "__main__":
    run(main, Config)
