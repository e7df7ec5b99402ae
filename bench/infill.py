"""
How to know the length of a blank: every rule that chooses among fills of 1 to 12 tokens, on text whose length is known.

    python bench/infill.py --checkpoint=out/stories --dataset=stories --judge=out/causal

Each held-out window loses 1 to 12 tokens in its middle. All lengths are filled once, as sample.py does, and each rule
then picks one. The judge, an autoregressive twin (bench/twins.py), says what the text from the blank on costs, beside
the truth's; "behind" is what stands behind.
"""
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint as ckpt
import diffusion
import quality
from configurator import UserError, in_range, run
from generate import BEHIND, LONGEST, Sampling
from machine import keep_memory
from twins import cross_entropy


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
            raise UserError("name a network with --checkpoint and a twin that judges with --judge")
        in_range(self, 2, 1e9, "windows")
        in_range(self, 1, 1e9, "batch_size")


def cut(windows, seed=1):
    """(true lengths (N,), left (N, L), right (N, L)) of windows (N, T) with a blank of 1 to LONGEST tokens after the
    first L."""
    L = (windows.size(1) - LONGEST) // 2
    true = torch.randint(1, LONGEST + 1, (len(windows),), generator=torch.Generator().manual_seed(seed))
    right = [row[L + n:2 * L + n] for row, n in zip(windows, true.tolist(), strict=True)]
    return true, windows[:, :L], torch.stack(right)


@torch.no_grad()
def nll_in_order(model, tokens, order):
    """-log p of tokens (B, T) in nats, each given those of earlier blocks in order (T,) and none of its own: (B, T)."""
    E, everything = model.embedding(), torch.ones_like(tokens, dtype=torch.bool)
    top = torch.full_like(tokens, model.cfg.timesteps)
    x_T = diffusion.randn(E[tokens], diffusion.generator("cpu", "nats"))
    level = diffusion.log_snr(top, model.alpha_bar())
    prompt = model.encode_prompt(tokens[:, :0], everything[:, :0], E)
    h = model.denoise(E[tokens], x_T, level, order.expand_as(tokens), prompt, E)
    return cross_entropy(model.predict(h, x_T, level, E)[1], tokens)


def score_length(cfg, model, settings, left, right, n):
    """Fills of n tokens between left and right (N, L): what each costs by the rules {rule: (N,)}, and the texts."""
    L, idx = left.size(1), torch.cat((left, left.new_zeros(len(left), n), right), 1)
    place = torch.arange(idx.size(1))
    known = (place < L) | (place >= L + n)
    texts = quality.fill(model, settings, idx, known, 1, cfg.batch_size)

    def costs(order):
        return quality.in_batches(partial(nll_in_order, model, order=order), cfg.batch_size, texts)
    fill, text = costs(torch.where(known, -1, place))[:, ~known], costs(place)[:, L:]
    rules = {"fill, sum": fill.sum(1), "fill, mean": fill.mean(1), "fill and behind, sum": text.sum(1),
             "fill and behind, mean": text.mean(1), "fill and behind, less 2 nats a token": text.sum(1) - 2 * n,
             "behind (sample.py)": text[:, n:n + BEHIND].mean(1)}
    return rules, texts


def rate(true, picked, judged, truth):
    """A row of the table, of picked lengths (N,); judged has the judge's nats (N, n + L) for each length n."""
    off = (picked - true).abs().float()
    costs = [judged[n - 1][i] for i, n in enumerate(picked.tolist())]
    behind = torch.stack([cost[n:].mean() for cost, n in zip(costs, picked.tolist(), strict=True)])
    row = dict(exact=(off == 0).float().mean().item(), within_1=(off <= 1).float().mean().item(),
               off=off.mean().item(), length=picked.float().mean().item())
    worse = torch.stack([cost.mean() for cost in costs]) - truth[0]
    return row | quality.mean("worse", worse) | quality.mean("worse_behind", behind - truth[1])


def judge_truth(judge, windows, true, L):
    """The judge's mean nats of the true text from the blank on, and behind it: two of (N,)."""
    rows = [judge.nll(row[None, :2 * L + n])[0, L:] for row, n in zip(windows, true.tolist(), strict=True)]
    behind = [row[n:].mean() for row, n in zip(rows, true.tolist(), strict=True)]
    return torch.stack([row.mean() for row in rows]), torch.stack(behind)


def main(cfg):
    keep_memory()
    torch.set_num_threads(1)
    _, content = ckpt.find_network(cfg.checkpoint)
    model, judge = ckpt.load_model(content), quality.open_twin("judge", cfg.judge, content)
    settings = replace(Sampling(**ckpt.usual(content)), temperature=cfg.temperature, eta=cfg.eta)
    windows = quality.open_data(cfg.dataset, content, model.cfg).spread(cfg.windows).idx
    true, left, right = cut(windows)
    L = left.size(1)
    costs, judged = [], []
    for n in range(1, LONGEST + 1):
        rules, texts = quality.timed({"length": n}, partial(score_length, cfg, model, settings, left, right, n))
        costs.append(rules)
        judged.append(quality.ask(judge, "nll", cfg.batch_size, texts)[:, L:])
    picks = {rule: torch.stack([cost[rule] for cost in costs], 1).argmin(1) + 1 for rule in costs[0]}
    shuffled = true[torch.randperm(len(true), generator=torch.Generator().manual_seed(2))]
    picks |= {"always 4": torch.full_like(true, 4), "at random": shuffled, "the true length": true}
    truth = judge_truth(judge, windows, true, L)
    table = [dict(rule=rule, **rate(true, picked, judged, truth)) for rule, picked in picks.items()]
    print(f"{len(windows):,} blanks of 1 to {LONGEST} tokens, {L} tokens on either side: how often the length is "
          "right, and what the judge loses to the truth, nats a token")
    quality.show(table, "rule: exact:.3f within_1:.3f off:.2f length:.2f worse:.3f worse_error:.3f worse_behind:.3f "
                        "worse_behind_error:.3f")
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    run(main, Config)
