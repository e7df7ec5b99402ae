"""
What each choice is worth: short runs that differ from the default in one setting, and the bound of each.

    python bench/ablate.py --dataset=stories512 --out=out/ablate
    python bench/ablate.py --dataset=stories512 --out=out/ablate --only=seed,objective

Every run has the same text, order, steps and size (settings below), unless the row says otherwise. All are measured on the
same windows with the same noise, at the noise levels that the default run fitted, so that differences are surer than
the errors say. Runs that are there already are not made again.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import fail, load        # noqa: E402

SIZE = dict(n_layer=2, n_head=2, n_embd=128, token_dim=64, block_size=64, prompt_size=32, cross_every=2, batch_size=32,
            batch_tokens=2048, max_steps=600, warmup_steps=50, learning_rate=3e-3, ema_decay=0.99, eval_interval=0,
            save_interval=10**6, eval_sequences=2)
VARIANTS = {
    "default": {}, "seed=2": dict(seed=2), "seed=3": dict(seed=3),
    "objective=eps": dict(objective="eps"),
    "schedule=linear": dict(schedule="linear"), "schedule=cosine": dict(schedule="cosine"),
    "streams=1": dict(streams=1), "streams=1 seed=2": dict(streams=1, seed=2), "streams=16": dict(streams=16),
    "spans=0": dict(p_spans=0.0, p_whole=0.0), "spans=0.5": dict(p_spans=0.5), "warmup=0": dict(span_warmup=0.0),
    "given=0": dict(p_given=0.0), "given=0.5": dict(p_given=0.5), "whole=0.3": dict(p_whole=0.3),
    "one clock": dict(span_size=0, p_given=0.0),
    "self_conditioning=0": dict(self_conditioning=0.0), "self_conditioning=0 seed=2": dict(self_conditioning=0.0, seed=2),
    "self_conditioning=1": dict(self_conditioning=1.0),
    "width=32": dict(token_dim=32), "width=128": dict(token_dim=128), "width=256": dict(token_dim=256),
    "prompt_table=gpt2": dict(prompt_table="gpt2"), "prompt_table=gpt2 seed=2": dict(prompt_table="gpt2", seed=2),
    "ema=0": dict(ema_decay=0.0), "lr=1.5e-3": dict(learning_rate=1.5e-3), "lr=6e-3": dict(learning_rate=6e-3),
}


@dataclass(frozen=True)
class Config:
    dataset: str = "stories512"      # folder of shards, or name under data/
    out: str = "out/ablate"          # a folder for each run, and table.json
    only: str = ""                   # comma list: variants whose names begin so; "": all. The default is always there
    spans: str = "1,2,8,0"           # the bound of writing so many tokens together; 0 is all at once
    streams: str = "2,8"             # the bound of single tokens in so many streams
    prompt_file: str = ""            # for prompt_table=gpt2, as in train.py
    sequences: int = 1024            # windows for each bound
    steps: int = 600                 # optimizer steps of each run

    def check(self):
        for name in ("spans", "streams"):
            if not all(size.isdigit() for size in getattr(self, name).split(",")):
                raise ValueError(f"{name}={getattr(self, name)} is not a list of whole numbers; write for example 1,8")
        if "0" in self.streams.split(","):
            raise ValueError(f"streams={self.streams}: there is one at least")
        if self.sequences < 2 or self.steps < 1:
            raise ValueError(f"sequences={self.sequences} and steps={self.steps} must be at least 2 and 1")
        known = [name for name in VARIANTS if name.startswith(tuple(self.only.split(",")))]
        if not known:
            raise ValueError(f"only={self.only} names no variant; there are {', '.join(VARIANTS)}")


if __name__ == "__main__":
    CFG = load(Config)

import dataclasses                         # noqa: E402
import json
import subprocess
import time

import torch

import train
from model import find_checkpoint, keep_memory, load_model

ROOT = Path(__file__).resolve().parent.parent


def run(cfg, name, settings):
    """Train a variant, unless it is there, and return its averaged network and the milliseconds of a step."""
    folder = Path(cfg.out) / f"{name} {cfg.steps}".replace(" ", "_")
    found = find_checkpoint(folder) if folder.exists() else None
    if not found:
        arguments = {**SIZE, "device": "cpu", "max_steps": cfg.steps, **settings, "dataset": cfg.dataset, "out_dir": folder,
                     "prompt_file": cfg.prompt_file}
        command = [sys.executable, ROOT / "train.py", *(f"--{key}={value}" for key, value in arguments.items())]
        done = subprocess.run(command, text=True, capture_output=True)
        if done.returncode:
            fail(f"{name}: {done.stderr.strip()}", code=1)
        found = find_checkpoint(folder)
    rows = [json.loads(line) for line in open(folder / "log.jsonl")]
    return load_model(found[1]), sum(row["step_ms"] for row in rows if "step_ms" in row) / sum("step_ms" in row for row in rows)


@torch.no_grad()
def bounds(model, schedule, idx, before, ways):
    """Bound and its error for each way, a span size and a number of streams, at the noise levels of a fitted schedule (3,); last,
    token by token after the tokens before each window."""
    model.cfg, model.schedule.data = dataclasses.replace(model.cfg, schedule="gumbel"), schedule
    return [*(train.measure(model, idx, 128, size, streams=n, bands=0) for size, n in ways), train.measure(model, idx, 128, 1, bands=0, **before)]


def main(cfg):
    keep_memory()
    torch.set_num_threads(1)
    begun, table, schedule = time.perf_counter(), [], None
    ways = [(int(size), 1) for size in cfg.spans.split(",")] + [(1, int(n)) for n in cfg.streams.split(",")]
    titles = [f"{n} streams" if n > 1 else str(size) for size, n in ways] + ["1, prompted"]
    wanted = [name for name in VARIANTS if name == "default" or name.startswith(tuple(cfg.only.split(",")))]
    _, _, windows = train.open_data(train.Config(**{**SIZE, "dataset": cfg.dataset}))
    idx, before = train.eval_examples(windows, cfg.sequences)
    print(f"{cfg.steps} steps of {SIZE['batch_tokens']:,} tokens, {len(idx):,} windows, {cfg.dataset}; bound in nats a token of writing "
          f"so many tokens at a time (0: all)\n{'':28}" + "".join(f"{title:>16}" for title in titles) + "   ms a step")
    for name in wanted:
        model, step_ms = run(cfg, name, VARIANTS[name])
        schedule = model.schedule.data.clone() if schedule is None else schedule
        found = bounds(model, schedule, idx, before, ways)
        print(f"{name:28}" + "".join(f"{row['bound']:9.3f} +-{row['bound_error']:5.3f}" for row in found) + f"{step_ms:12.0f}", flush=True)
        table.append({"name": name, "settings": VARIANTS[name], "step_ms": step_ms,
                      "bounds": {size: [row["bound"], row["bound_error"]] for size, row in zip(titles, found, strict=True)}})
        (Path(cfg.out) / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main(CFG)
