"""
The twins: an autoregressive and a masked diffusion model from SunFish's own blocks, for the same text at the same budget.

    python bench/twins.py config/stories.py --kind=autoregressive --out_dir=out/causal
    python bench/twins.py config/stories.py --kind=masked --out_dir=out/masked

The same shards, windows in the same order, table, trunk, width and optimizer as train.py; no noise, no prompt, no
self-conditioning. The autoregressive twin sees only the past, and its loss is exact. The masked one (MDLM, Sahoo et al.
2024) guesses hidden tokens from the others, and its loss, weighted by one over the share that is hidden, is a bound. Of the
settings those of data, network and step count; a twin has one process, no averaging, and is saved at its end.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train                                    # noqa: E402
from configurator import fail, load             # noqa: E402

KINDS = ("autoregressive", "masked")


@dataclass(frozen=True)
class Config(train.Config):
    kind: str = "autoregressive"         # autoregressive, masked
    out_dir: str = "out/twin"            # the checkpoint and log.jsonl go here

    def check(self):
        super().check()
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind} is unknown; use {' or '.join(KINDS)}")


import dataclasses                              # noqa: E402
import json
import math
import time
from functools import partial

import torch
import torch.nn as nn

from diffusion import ce_loss, generator, streams
from model import ALL, SunFish, keep_memory, model_config, norm, read_checkpoint, visible, write_checkpoint


class Twin(nn.Module):
    """Token ids -> scores, through the trunk of a SunFish at its clean end. kind is one of KINDS. The scores of a batch stand in
    memory as a whole: fine for small vocabularies."""

    def __init__(self, cfg, vocab_size, log_unigram=None, kind="autoregressive"):
        super().__init__()
        self.net, self.kind = SunFish(cfg, vocab_size, log_unigram), kind
        self.blank = nn.Parameter(torch.randn(cfg.token_dim))       # read before the first token, or for a hidden one

    def hidden(self, idx, blank, table):
        """What the scores of idx (B, T) are read from: (B, T, n_embd). Tokens where blank (B, T) are hidden from the masked
        twin; the autoregressive one sees those before each."""
        net, sight, x = self.net, (None, None), torch.where(blank[..., None], self.blank, table[idx])
        if self.kind == "autoregressive":
            x = torch.cat((self.blank.expand(len(idx), 1, -1), x[:, :-1]), 1)
            sight = visible(torch.arange(idx.size(1), device=idx.device).expand(idx.shape), ALL, torch.le)
        level = torch.full((1, 1), math.inf, device=idx.device)
        return norm(net.trunk(x, level, torch.zeros_like(x), None, None, table, sight=sight)[0])

    def scores(self, hidden, table):
        """hidden (..., n_embd) -> (..., V)."""
        return self.net.answer(self.net.features(hidden), *self.net.readout(table))

    def hide(self, shape, rng=None):
        """Which of idx (B, T) to hide, and the weight of each token in the bound: two of (B, T). The masked twin hides k of T
        tokens, equally often 1 to T, at weight T / k: MDLM's integral over the masking rate, done exactly."""
        B, T = shape
        if self.kind == "autoregressive":
            return torch.zeros(B, T, dtype=torch.bool), torch.ones(B, T)
        k = 1 + ((torch.randperm(B, generator=rng) + torch.rand(B, generator=rng)) / B * T).long().clamp(max=T - 1)     # stratified
        blank = torch.rand(B, T, generator=rng).argsort(1).argsort(1) < k[:, None]
        return blank, blank * (T / k)[:, None]

    def forward(self, idx, blank, weight):
        """Weighted cross-entropy of each token in nats (B, T), whose mean is the likelihood, or a draw of the masked twin's bound."""
        table = self.net.embedding()
        return weight * ce_loss(self.scores(self.hidden(idx, blank, table), table), idx)

    # ---- what bench/quality.py asks for ----

    @torch.no_grad()
    def nll(self, idx):
        """Nats of each token given those before it, of the autoregressive twin: idx (B, T) -> (B, T)."""
        return self(idx, *(part.to(idx.device) for part in self.hide(idx.shape)))

    @torch.no_grad()
    def features(self, idx):
        """The trunk's last output, which has seen all but the last token of idx (B, T): (B, n_embd)."""
        return self.hidden(idx, torch.zeros_like(idx, dtype=torch.bool), self.net.embedding())[:, -1]

    @torch.no_grad()
    def predict(self, idx, blank):
        """Scores (B, T, V) of the tokens idx (B, T), those where blank (B, T) unknown to the masked twin."""
        table = self.net.embedding()
        return self.scores(self.hidden(idx, blank, table), table)

    @torch.no_grad()
    def nll_in_streams(self, idx, n):
        """Nats of each token given those of earlier turns, of the masked twin: idx (B, T) in n streams -> (B, T)."""
        group, nll = streams(torch.ones_like(idx[0], dtype=torch.bool), n), torch.zeros(idx.shape, device=idx.device)
        table = self.net.embedding()
        for turn in group.unique():
            now = group == turn
            hidden = self.hidden(idx, (group >= turn).expand(idx.shape), table)
            nll[:, now] = ce_loss(self.scores(hidden[:, now], table), idx[:, now])
        return nll

    def sample(self, n, length, steps, temperature=1.0, rng=None, in_streams=0):
        """Texts (n, length), drawn on the CPU generator rng: token by token; in so many streams; or by unmasking in `steps` equal
        parts of time (ancestral sampling, Sahoo et al. 2024), where each hidden token is written with probability 1 / (steps left)."""
        idx, blank = torch.zeros(n, length, dtype=torch.int64), torch.ones(n, length, dtype=torch.bool)
        device = self.blank.device
        in_streams = 1 if self.kind == "autoregressive" else in_streams
        group = streams(blank[0], in_streams) if in_streams else None
        for i in range(int(group.max()) + 1 if in_streams else steps):
            if in_streams:
                now = (group == i).expand(n, -1)
            else:
                now = blank & (torch.rand(n, length, generator=rng) < 1 / (steps - i))
            rows = now.any(1)                   # the others' calls, which change nothing, are saved
            if rows.any():
                p = (self.predict(idx[rows].to(device), blank[rows].to(device)) / temperature).softmax(-1).cpu()
                idx[now] = torch.multinomial(p[now[rows]], 1, generator=rng).flatten()
                blank = blank & ~now
        return idx


def load_twin(place, device="cpu"):
    """The twin of a file, or of the newest in a folder, and the file's content; ValueError if there is none."""
    paths = [Path(place)] if Path(place).is_file() else sorted(Path(place).glob("twin_*.pt"))
    content = read_checkpoint(paths[-1]) if paths else {}
    if "kind" not in content:
        raise ValueError(f"{place} holds no twin; train one with bench/twins.py")
    twin = Twin(model_config(content), content["data"]["vocab_size"], kind=content["kind"])
    twin.load_state_dict(content["model"])
    return twin.to(device).eval().requires_grad_(False), content


@torch.no_grad()
def evaluate(twin, val, cfg):
    """Nats a token of the windows val (N, T), and the standard error; of the masked twin from fixed draws."""
    parts = ((part, twin.hide(part.shape, generator("cpu", "bound", i))) for i, part in enumerate(val.split(cfg.batch_size)))
    nll = torch.cat([twin(part, *(x.to(val.device) for x in hidden)).double().mean(1) for part, hidden in parts])
    return nll.mean().item(), (nll.std() / len(nll) ** 0.5).item()


def main(cfg):
    keep_memory()
    if any(Path(cfg.out_dir).glob("twin_*.pt")):
        fail(f"{cfg.out_dir} already holds a twin; choose another --out_dir")
    device, dtype, compiled = train.choose_machine(cfg)
    data, windows, val_windows = train.open_data(cfg)
    torch.manual_seed(train.mix(cfg.seed, "weights"))
    twin = Twin(cfg, data["vocab_size"], windows.unigram(), cfg.kind).to(device)
    twin.net.schedule.requires_grad_(False)
    optimizer = train.make_optimizer(twin, cfg)
    model = torch.compile(twin) if compiled else twin
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    val = train.eval_windows(val_windows, max(2, cfg.eval_sequences)).to(device)
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    log, clock = open(Path(cfg.out_dir) / "log.jsonl", "w", buffering=1), time.perf_counter()
    batches = train.batches_ahead(cfg, windows, 0, device)
    for step in range(cfg.max_steps):
        train.set_learning_rate(optimizer, cfg, step)
        total = 0.0
        for samples in train.micro_batches(cfg, 0, 1):
            idx = next(batches).idx
            hidden = twin.hide(idx.shape, generator("cpu", cfg.seed, step, samples[0]))
            with autocast():
                loss = model(idx, *(x.to(device) for x in hidden)).sum() / cfg.batch_tokens
            loss.backward()
            total += loss.item()
        grad_norm = nn.utils.clip_grad_norm_(twin.parameters(), cfg.grad_clip or math.inf).item()
        if not math.isfinite(total + grad_norm):
            fail(f"step {step + 1}: loss {total}, gradient norm {grad_norm}", code=1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done == cfg.max_steps or cfg.eval_interval and done % cfg.eval_interval == 0:
            bound, error = evaluate(twin, val, cfg)
            row = dict(step=done, tokens=done * cfg.batch_tokens, loss=total, bound=bound, bound_error=error,
                       seconds=time.perf_counter() - clock)
            print("step {step} {tokens:,} tokens: loss {loss:.3f}, validation {bound:.3f} +- {bound_error:.3f} nats a token, "
                  "{seconds:.0f} s".format(**row), flush=True)
            log.write(json.dumps(row) + "\n")
    write_checkpoint(Path(cfg.out_dir) / f"twin_{cfg.max_steps:08d}.pt", dict(
        step=cfg.max_steps, kind=cfg.kind, config=dataclasses.asdict(cfg), data=data, model=twin.state_dict()))


if __name__ == "__main__":
    main(load(Config))
