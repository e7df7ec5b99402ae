"""
The twins: an autoregressive and a masked diffusion model from SunFish's own layers, for the same text and
budget.

    python bench/twins.py config/stories.py --kind=autoregressive --out_dir=out/causal
    python bench/twins.py config/stories.py --kind=masked --out_dir=out/masked

The same shards, windows in the same order, token vectors, layers, width and optimizer as train.py; no noise, no
prompt, no self-conditioning. The autoregressive twin sees only the past, and its loss is exact. The masked one
(MDLM, Sahoo et al. 2024) guesses hidden tokens from the others, in any order, and its loss, weighted by one over
the share that is hidden, is a bound. Of the settings those of data, network and step count; a twin has one process,
no averaging, and is saved at its end.
"""
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
from diffusion import block_order, generator, hash64
from machine import choose_machine, keep_memory
from model import GAIN, Layout, SunFish, neighbours

KINDS = ("autoregressive", "masked")


@dataclass(frozen=True)
class Config(train.Config):
    kind: str = "autoregressive"         # autoregressive, masked
    out_dir: str = "out/twin"            # the checkpoint and log.jsonl go here

    def check(self):
        super().check()
        one_of(self, "kind", *KINDS)


class Twin(nn.Module):
    """Token ids -> scores, by a SunFish that takes all its tokens for clean. kind is one of KINDS. The scores of a
    batch stand in memory as a whole: fine for small vocabularies."""

    def __init__(self, cfg, vocab_size, log_unigram=None, kind="autoregressive"):
        super().__init__()
        self.net, self.kind = SunFish(cfg, vocab_size, log_unigram), kind
        self.net.schedule.requires_grad_(False)
        self.blank = nn.Parameter(torch.randn(cfg.token_dim))       # stands before the first token, or for a hidden one

    def layout(self, T):
        """Whom T tokens see: those before, and themselves, or all."""
        pos = torch.arange(T, device=self.blank.device)
        if self.kind == "masked":
            return Layout(0, pos, None, None, None, None)
        past, near = pos <= pos[:, None], neighbours(pos[None]) <= pos[None, :, None]
        return Layout(0, pos, past[None, None], None, near, None)

    def hidden(self, idx, blank):
        """Hidden states (B, T, n_embd) of the tokens idx (B, T). Those where blank (B, T) are hidden from the
        masked twin; each token of the autoregressive one stands one place later, so that its scores are of the
        next."""
        net = self.net
        E = net.embedding()
        x = torch.where(blank[..., None], self.blank, E[idx])                                      # (B, T, C)
        if self.kind == "autoregressive":
            x = torch.cat((self.blank.expand(len(idx), 1, -1), x[:, :-1]), 1)
        no_prompt = net.encode_prompt(idx[:, :0], blank[:, :0], E)
        clean = torch.full(idx.shape, math.inf, device=idx.device)                                 # log_snr
        return net(F.pad(x, (0, net.cfg.token_dim)), clean, self.layout(idx.size(1)), no_prompt)

    def scores(self, h):
        """Scores (..., V) in float32 of hidden states (..., n_embd)."""
        return (self.net.head(GAIN * h) + self.net.log_unigram).float()

    def hide(self, B, n, rng=None):
        """Which of n tokens to hide, and the weight of each in the bound: two of (B, n). The masked twin hides k of
        them, equally often 1 to n, at weight n / k: MDLM's integral over the masking rate, done exactly."""
        if self.kind == "autoregressive":
            return torch.zeros(B, n, dtype=torch.bool), torch.ones(B, n)
        u = (torch.randperm(B, generator=rng) + torch.rand(B, generator=rng)) / B                  # stratified
        k = 1 + (u * n).long().clamp(max=n - 1)
        blank = torch.rand(B, n, generator=rng).argsort(1).argsort(1) < k[:, None]
        return blank, blank * (n / k)[:, None]

    def forward(self, idx, blank, weight):
        """Weighted cross-entropy of each token in nats (B, T), whose mean is the likelihood, or a draw of the
        masked twin's bound."""
        return weight * cross_entropy(self.scores(self.hidden(idx, blank)), idx)

    # ---- what bench/quality.py asks for ----

    @torch.no_grad()
    def nll(self, idx):
        """Nats of each token of idx (B, T) given those before it, by the autoregressive twin: (B, T)."""
        blank, weight = self.hide(*idx.shape)
        return self(idx, blank.to(idx.device), weight.to(idx.device))

    @torch.no_grad()
    def features(self, idx):
        """The last hidden state (B, n_embd), which has seen all but the last token of idx (B, T)."""
        return self.hidden(idx, torch.zeros_like(idx, dtype=torch.bool))[:, -1]

    @torch.no_grad()
    def predict(self, idx, blank):
        """Scores (B, T, V) of the tokens idx (B, T), those where blank (B, T) unknown to the masked twin."""
        return self.scores(self.hidden(idx, blank))

    @torch.no_grad()
    def nll_in_blocks(self, idx, block_length, strided=False, rng=None):
        """One draw of the masked twin's bound for each token of idx (B, T) given those of earlier blocks, in nats:
        (B, T). Later blocks are hidden as a whole, k tokens of its own beside them; blocks of 1 are exact."""
        order = block_order(torch.ones_like(idx[0], dtype=torch.bool), block_length, strided)
        nll = torch.zeros(idx.shape, device=idx.device)
        for block in order.unique():
            now = order == block
            blank = (order > block).expand(idx.shape).clone()
            some, weight = self.hide(len(idx), int(now.sum()), rng)
            blank[:, now] = some.to(idx.device)
            scores = self.scores(self.hidden(idx, blank)[:, now])
            nll[:, now] = weight.to(idx.device) * cross_entropy(scores, idx[:, now])
        return nll

    def sample(self, n, length, steps, temperature=1.0, rng=None):
        """Texts (n, length), drawn on the CPU generator rng: token by token, or by unmasking in `steps` equal parts
        of time (ancestral sampling, Sahoo et al. 2024), where each hidden token is written with probability 1 /
        (steps left)."""
        one_by_one, place = self.kind == "autoregressive", torch.arange(length)
        idx, blank = torch.zeros(n, length, dtype=torch.int64), torch.ones(n, length, dtype=torch.bool)
        for i in range(length if one_by_one else steps):
            drawn = (place == i).expand(n, -1) if one_by_one else torch.rand(n, length, generator=rng) < 1 / (steps - i)
            now = blank & drawn
            rows = now.any(1)                   # the others' calls, which change nothing, are saved
            if rows.any():
                scores = self.predict(idx[rows].to(self.blank.device), blank[rows].to(self.blank.device))
                p = (scores / temperature).softmax(-1).cpu()
                idx[now] = torch.multinomial(p[now[rows]], 1, generator=rng).flatten()
                blank &= ~now
        return idx


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
def evaluate(twin, idx, batch_size):
    """Nats a token of the windows idx (N, T), and the standard error; of the masked twin from fixed draws."""
    parts = []
    for i, part in enumerate(idx.split(batch_size)):
        hidden = twin.hide(*part.shape, generator("cpu", "bound", i))
        parts.append(twin(part, *(x.to(idx.device) for x in hidden)).double().mean(1))
    nll = torch.cat(parts)
    return nll.mean().item(), (nll.std() / len(nll) ** 0.5).item()


# ---- training ----

def train_step(twin, optimizer, batches, cfg, step, machine):
    """One optimizer step: the mean loss of a token in nats. Fault if it or the gradient is not finite."""
    total = 0.0
    for rows in cfg.micro_batches():
        idx = next(batches).idx
        hidden = twin.hide(*idx.shape, generator("cpu", cfg.seed, step, rows[0]))
        with machine.autocast():
            loss = twin(idx, *(x.to(machine.device) for x in hidden)).sum() / cfg.batch_tokens
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
            if done == cfg.max_steps or cfg.eval_interval and done % cfg.eval_interval == 0:
                bound, error = evaluate(twin, val, cfg.micro_batch)
                row = dict(step=done, tokens=done * cfg.batch_tokens, loss=loss, bound=bound, bound_error=error,
                           seconds=time.perf_counter() - clock)
                print("step {step} {tokens:,} tokens: loss {loss:.3f}, validation {bound:.3f} +- {bound_error:.3f} "
                      "nats a token, {seconds:.0f} s".format(**row))
                log.write(json.dumps(row) + "\n")
    content = dict(step=cfg.max_steps, kind=cfg.kind, config=dataclasses.asdict(cfg), data=data)
    ckpt.write(folder / f"twin_{cfg.max_steps:08d}.pt", dict(content, model=twin.state_dict()))


if __name__ == "__main__":
    run(main, Config)
