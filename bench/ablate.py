"""
What each choice is worth: short runs that differ from the default in one setting, and the bound of each.

    python bench/ablate.py --dataset=stories512 --out=out/ablate
    python bench/ablate.py --dataset=stories512 --out=out/ablate --only=seed,objective

Every run has the same text, order, steps and size (SIZE below), unless the row says otherwise. All are measured on the
same windows with the same noise, at the noise levels that the default run fitted, so that differences are surer than
the errors say. Runs that are there already are not made again.
"""
import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint as ckpt
import train
from configurator import Fault, UserError, in_range, run
from generate import bound
from machine import keep_memory

SIZE = dict(n_layer=2, n_head=2, n_embd=128, token_dim=64, block_size=64, prompt_size=32, cross_every=2, batch_size=32,
            batch_tokens=2048, max_steps=600, warmup_steps=50, learning_rate=3e-3, ema_decay=0.99, eval_interval=0,
            save_interval=10**6, eval_sequences=2)
VARIANTS = {
    "default": {}, "seed=2": dict(seed=2), "seed=3": dict(seed=3),
    "objective=eps": dict(objective="eps"),
    "schedule=linear": dict(schedule="linear"), "schedule=cosine": dict(schedule="cosine"),
    "p_single=0": dict(p_single=0.0), "p_single=0.6": dict(p_single=0.6),
    "p_single=1": dict(p_single=1.0, p_window=0.0),
    "p_window=0": dict(p_window=0.0), "p_window=0.5": dict(p_window=0.5),
    "p_window=1": dict(p_single=0.0, p_window=1.0, p_given=0.0),
    "max_block_length=4": dict(max_block_length=4), "max_block_length=64": dict(max_block_length=64),
    "p_strided=0": dict(p_strided=0.0), "p_strided=0.5": dict(p_strided=0.5),
    "p_given=0": dict(p_given=0.0), "p_given=0.5": dict(p_given=0.5),
    "self_conditioning=0": dict(self_conditioning=0.0), "self_conditioning=1": dict(self_conditioning=1.0),
    "token_dim=32": dict(token_dim=32), "token_dim=128": dict(token_dim=128), "token_dim=256": dict(token_dim=256),
    "prompt_table=gpt2": dict(prompt_table="gpt2"),
    "learning_rate=1.5e-3": dict(learning_rate=1.5e-3), "learning_rate=6e-3": dict(learning_rate=6e-3),
    "ema_decay=0": dict(ema_decay=0.0), "ema_decay=0.999": dict(ema_decay=0.999)}


@dataclass(frozen=True)
class Config:
    dataset: str = "stories512"      # folder of shards, or name under data/
    out: str = "out/ablate"          # a folder for each run, and table.json
    only: str = ""                   # comma list: variants whose names begin so; "": all. The default is always there
    block_length: str = "1,2,4,8,16,0"   # comma list: tokens denoised together, a bound for each; 0 is the window
    strided: str = "8"               # the same, for blocks that are spread over the text; "": none
    prompt_file: str = ""            # for prompt_table=gpt2, as in train.py
    sequences: int = 1024            # windows for each bound
    steps: int = 600                 # optimizer steps of each run

    def check(self):
        for name in ("block_length", "strided"):
            text = getattr(self, name)
            if not all(size.isdigit() for size in text.split(",") if text):
                raise UserError(f"{name}={text} is not a list of whole numbers; write for example 1,8")
        in_range(self, 2, 1e9, "sequences")
        in_range(self, 1, 1e9, "steps")
        if not self.variants():
            raise UserError(f"only={self.only} names no variant; there are {', '.join(VARIANTS)}")

    def variants(self):
        """The names of the variants that are asked for, beside the default."""
        return [name for name in VARIANTS if name.startswith(tuple(self.only.split(",")))]

    def dial(self):
        """(title, block_length, strided) of each bound."""
        rows = [(size, int(size), False) for size in self.block_length.split(",") if size]
        return rows + [(f"{size} strided", int(size), True) for size in self.strided.split(",") if size]


def train_variant(cfg, name):
    """Train a variant, unless it is there: its averaged network and the milliseconds of a step. Fault if it fails."""
    folder = Path(cfg.out) / f"{name} {cfg.steps}".replace(" ", "_")
    found = ckpt.find(folder) if folder.exists() else None
    if not found:
        arguments = {**SIZE, "device": "cpu", "max_steps": cfg.steps, **VARIANTS[name], "dataset": cfg.dataset,
                     "out_dir": folder, "prompt_file": cfg.prompt_file}
        command = [sys.executable, ROOT / "train.py", *(f"--{key}={value}" for key, value in arguments.items())]
        done = subprocess.run(command, text=True, capture_output=True)
        if done.returncode:
            raise Fault(f"{name}: {done.stderr.strip()}")
        found = ckpt.find(folder)
    rows = [json.loads(line) for line in open(folder / "log.jsonl")]
    times = [row["step_ms"] for row in rows if "step_ms" in row]
    return ckpt.load_model(found[1]), sum(times) / len(times)


def bounds(cfg, model, schedule, texts):
    """{title: (bound, error)} of a network at the noise levels of a fitted schedule (3,): for each block length, of the
    windows by themselves; last, one token at a time after the tokens before each window."""
    model.cfg, model.schedule.data = dataclasses.replace(model.cfg, schedule="gumbel"), schedule
    alone = texts._replace(prompt_mask=torch.zeros_like(texts.prompt_mask))
    found = {title: bound(model, alone, 128, length, strided) for title, length, strided in cfg.dial()}
    found["1, prompted"] = bound(model, texts, 128, 1)
    return {title: (row["bound"], row["bound_error"]) for title, row in found.items()}


def main(cfg):
    keep_memory()
    torch.set_num_threads(1)
    begun, schedule = time.perf_counter(), None
    table = []
    _, _, data = train.open_data(train.Config(**{**SIZE, "dataset": cfg.dataset}))
    texts = data.spread(cfg.sequences)
    titles = [*(title for title, _, _ in cfg.dial()), "1, prompted"]
    print(f"{cfg.steps} steps of {SIZE['batch_tokens']:,} tokens, {cfg.sequences:,} windows, {cfg.dataset}; bound in "
          "nats a token by block length (0: the window)")
    print(f"{'':24}" + "".join(f"{title:>16}" for title in titles) + "   ms a step")
    for name in dict.fromkeys(["default", *cfg.variants()]):
        model, step_ms = train_variant(cfg, name)
        schedule = model.schedule.data.clone() if schedule is None else schedule
        found = bounds(cfg, model, schedule, texts)
        columns = "".join(f"{value:9.3f} +-{error:5.3f}" for value, error in found.values())
        print(f"{name:24}{columns}{step_ms:12.0f}")
        table.append({"name": name, "settings": VARIANTS[name], "step_ms": step_ms, "bounds": found})
        (Path(cfg.out) / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    run(main, Config)
