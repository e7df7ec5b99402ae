"""
How to know the length of a blank: every rule that chooses among fills of 1 to 12 tokens, on held-out text whose length is known.

    python bench/infill.py --checkpoint=out/stories --dataset=stories --judge=out/causal

Each window loses 1 to 12 tokens in its middle. All lengths are filled once, as sample.py does, and each rule then picks one. The judge,
an autoregressive twin (bench/twins.py), says what the text from the blank on costs, beside the truth's; "behind" is what stands behind.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import load        # noqa: E402


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""             # run or export
    dataset: str = "stories"         # shards whose validation windows are used
    judge: str = ""                  # autoregressive twin
    windows: int = 256               # windows, each with one blank
    temperature: float = 0.9         # of the fills
    eta: float = 1.0                 # of the fills; 0 takes the likeliest tokens
    batch_size: int = 64             # windows at a time
    out: str = ""                    # file for the table, as JSON

    def check(self):
        if not (self.checkpoint and self.judge):
            raise ValueError("name a network with --checkpoint and a twin that judges with --judge")
        if min(self.windows - 1, self.batch_size) < 1:
            raise ValueError(f"windows={self.windows} must be 2 at least and batch_size={self.batch_size} 1")


if __name__ == "__main__":
    CFG = load(Config)

import torch                               # noqa: E402

import diffusion
import quality
import sample
import train
from model import keep_memory, load_model


def cut(windows, longest, seed=1):
    """(true lengths (N,), left (N, L), right (N, L)) of windows (N, T) with a blank of 1 to `longest` tokens after the first L."""
    L = (windows.size(1) - longest) // 2
    true = torch.randint(1, longest + 1, (len(windows),), generator=torch.Generator().manual_seed(seed))
    return true, windows[:, :L], torch.stack([row[L + n:2 * L + n] for row, n in zip(windows, true.tolist(), strict=True)])


@torch.no_grad()
def fill_costs(model, tokens, known):
    """-log p of the tokens (B, T) that are not known (T,), each given all that is and those before it: (B, n)."""
    E, group = model.embedding(), torch.where(known, -1, torch.arange(len(known))).expand_as(tokens)
    x_T = diffusion.randn(E[tokens], diffusion.generator("cpu", "nats"))
    level = diffusion.log_snr(torch.full_like(tokens, model.cfg.timesteps), diffusion.make_schedule(model.cfg, model.schedule))
    past = model.look_back(model.remember(tokens, group, E=E), group)
    return diffusion.ce_loss(model(x_T, level, torch.zeros_like(x_T), past=past, E=E), tokens)[:, ~known]


def try_all(cfg, model, judge, left, right):
    """For each length: what the fills cost by the rules {rule: (N,)}, and the judge: nats of each token from the blank on (N, n + L)."""
    found, L = [], left.size(1)
    for n in range(1, sample.LONGEST + 1):
        idx = torch.cat((left, left.new_zeros(len(left), n), right), 1)
        known = (torch.arange(idx.size(1)) < L) | (torch.arange(idx.size(1)) >= L + n)
        texts = quality.write(model, idx, known, idx[:, :0], 0, 1, cfg.batch_size, mode="infill", text="x", temperature=cfg.temperature, eta=cfg.eta)
        fill, text = (quality.in_batches(f, cfg.batch_size, "cpu", texts) for f in (
            lambda part, known=known: fill_costs(model, part, known), lambda part: sample.nats(model, part, part[:, :0])[:, L:]))
        rules = {"fill, sum": fill.sum(1), "fill, mean": fill.mean(1), "fill and behind, sum": text.sum(1), "fill and behind, mean": text.mean(1),
                 "fill and behind, less 2 nats a token of the fill": text.sum(1) - 2 * n, "behind (sample.py)": text[:, n:n + sample.BEHIND].mean(1)}
        found.append((rules, quality.in_batches(judge.nll, cfg.batch_size, "cpu", texts)[:, L:]))
        sample.say(f"length {n}")
    return found


def rate(true, picked, judged, truth):
    """A row of the table, of picked lengths (N,)."""
    off = (picked - true).abs().float()
    costs = [judged[n - 1][i] for i, n in enumerate(picked.tolist())]
    behind = torch.stack([cost[n:].mean() for cost, n in zip(costs, picked.tolist(), strict=True)])
    row = dict(exact=(off == 0).float().mean().item(), within_1=(off <= 1).float().mean().item(), off=off.mean().item(),
               length=picked.float().mean().item())
    return row | quality.mean("worse", torch.stack([cost.mean() for cost in costs]) - truth[0]) | quality.mean("worse_behind", behind - truth[1])


def main(cfg):
    keep_memory()
    torch.set_num_threads(1)
    content = quality.open_network(cfg.checkpoint)
    model, judge = load_model(content), quality.open_twin("judge", cfg.judge, content, "cpu")
    windows = train.eval_windows(quality.open_val(cfg.dataset, content, model.cfg), cfg.windows)
    true, left, right = cut(windows, sample.LONGEST)
    L, texts = left.size(1), [row[:2 * left.size(1) + n] for row, n in zip(windows, true.tolist(), strict=True)]
    with torch.no_grad():
        real = [judge.nll(text[None])[0, L:] for text in texts]
    truth = torch.stack([cost.mean() for cost in real]), torch.stack([cost[n:].mean() for cost, n in zip(real, true.tolist(), strict=True)])
    costs, judged = zip(*try_all(cfg, model, judge, left, right), strict=True)
    picks = {rule: torch.stack([cost[rule] for cost in costs], 1).argmin(1) + 1 for rule in costs[0]}
    picks |= {"always 4": torch.full_like(true, 4), "at random": true[torch.randperm(len(true), generator=torch.Generator().manual_seed(2))], "the true length": true}
    table = [dict(rule=rule, **rate(true, picked, judged, truth)) for rule, picked in picks.items()]
    print(f"{len(windows):,} blanks of 1 to {sample.LONGEST} tokens, {L} tokens on either side; how often the length is right, and what the judge loses to "
          "the truth, nats a token")
    quality.show(table, "rule:s exact:.3f within_1:.3f off:.2f length:.2f worse:.3f worse_error:.3f worse_behind:.3f worse_behind_error:.3f")
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(CFG)
