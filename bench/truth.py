"""
How near a network is to the truth, on the one language whose truth is known: the fables.

    python train.py config/tiny.py
    python bench/truth.py --checkpoint=out/tiny --dataset=fables

1. The bound of each block length beside what the same texts really cost under the grammar. No bound may lie below it.
2. Samples from nothing but noise, judged by the grammar: sentences and whole stories that are right, next to how many
   of them are the training text's own.
3. Prompts and blanks: how often the network's completion of a held-out story is a story again, against chance.
"""
import json
import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fables
import quality
from configurator import Fault, UserError, run
from generate import Canvas, bound
from machine import keep_memory


@dataclass(frozen=True)
class Config(quality.Config):
    checkpoint: str = "out/tiny"     # file, or folder of a run: its newest
    dataset: str = "fables"          # folder of shards of fables
    sequences: int = 1042            # windows for a bound: of 96 tokens, 100,000
    samples: int = 128               # stories in a row of the other tables
    temperatures: str = "0.7,1"      # of what the context says, a row each
    steps: str = "16,64"             # denoising steps of a block, a row each; a single token has one
    guidance: str = "1,2"            # weights of the prompt, a row each
    pairs: int = 0                   # prompts and blanks of quality.py: none
    blank: int = 8                   # tokens blanked in the middle of a story


def fresh_windows(n, T, tokenizer):
    """n windows (n, T) of stories that nobody has seen, each from the beginning of one."""
    rng, rows = random.Random("held out"), []
    for _ in range(n):
        row = []
        while len(row) < T:
            row += [tokenizer.eot_token, *tokenizer.encode_ordinary(fables.draw(rng)[0])]
        rows.append(row[:T])
    return torch.tensor(rows)


def truth(idx, tokenizer):
    """What windows (N, T) that begin with end-of-text cost under the grammar, in nats: (N,)."""
    end = tokenizer.decode([tokenizer.eot_token])
    texts = [tokenizer.decode(row).split(end)[1:] for row in idx.tolist()]
    costs = [[fables.log_prob(text, i < len(row) - 1) for i, text in enumerate(row)] for row in texts]
    return -torch.tensor([sum(row) for row in costs], dtype=torch.float64)


# ---- the tables ----

def likelihood(cfg, bench):
    """Bounds, and what the same windows cost under the grammar."""
    idx = bench.windows[:cfg.sequences]
    exact = truth(idx, bench.tokenizer) / idx.size(1)
    rows = [{"text_written": "by the grammar", "nats": exact.mean().item(), "nats_error": 0.0, "above": 0.0}]

    def row(name, nats, error):
        rows.append({"text_written": name, "nats": nats, "nats_error": error, "above": nats - exact.mean().item()})
    for length in quality.numbers(cfg.block_length, int):
        name = {0: "as a whole window", 1: "token by token"}.get(length, f"in blocks of {length}")
        found = quality.timed({"bound": name}, partial(bound, bench.model, quality.plain(idx), cfg.batch_size, length))
        row(name, found["bound"], found["bound_error"])
        for steps in quality.numbers(cfg.steps, int) if length != 1 else ():
            nats = quality.mean("nats", quality.as_run(bench.model, idx, cfg.batch_size, length, False, steps))
            row(f"{name}, the sampler's {steps} steps", *nats.values())
    for name, twin in bench.twins.items():
        for length in quality.numbers(cfg.block_length, int) if twin.kind == "blocks" else [0]:
            where = f", block_length {length}" if twin.kind == "blocks" else ""
            row(f"by the {name} twin{where}", *quality.evaluate(twin, idx, cfg.batch_size, length))
    print(f"1. LIKELIHOOD of {len(idx):,} windows of {idx.size(1)} tokens, in nats a token. above: more than the "
          "truth, which is the grammar's own.")
    quality.show(rows, "text_written: nats:.4f nats_error:.4f above:.4f")
    low = [row["text_written"] for row in rows if row["above"] < -3 * row["nats_error"]]
    if low:
        raise Fault(f"the bound of {', '.join(low)} lies below the truth by more than three errors; it is no bound")
    return rows


def samples(cfg, bench):
    rows, rest = [], (cfg.seed, cfg.batch_size)

    def row(name, make, temperature=1.0):
        made = quality.timed({"samples": name, "temperature": temperature}, make)
        rows.append({"written_from_noise": name, "temperature": temperature, "repeated": quality.repetition(made),
                     **quality.judge_stories(made, bench)})
    row("the grammar itself", lambda: bench.windows[-cfg.samples:])
    def title(name, length, steps, revisions):
        name += {0: "window", 1: "single tokens"}.get(length, f"blocks of {length}")
        return f"{name}, {steps} step{'s' * (steps > 1)}" + f", {revisions} revisions" * (revisions > 0)
    for temperature in quality.numbers(cfg.temperatures, float):
        for length, steps, revisions in quality.ways(cfg, quality.numbers(cfg.block_length, int)):
            settings = replace(bench.settings, block_length=length, steps=steps, revisions=revisions,
                               temperature=temperature)
            draw = partial(quality.draw, bench.model, settings, cfg.samples, *rest)
            row(title("", length, steps, revisions), draw, temperature)
        for name, twin in bench.twins.items():
            shape = cfg.samples, bench.windows.size(1)
            for how in quality.twin_ways(twin, cfg, shape[1]):
                make = partial(quality.draw_twin, twin, how, shape, temperature, *rest)
                row(title(f"{name} twin, ", *how), make, temperature)
    print(f"\n2. SAMPLES: {cfg.samples} stories each.\n{quality.ABOUT_STORIES} repeated: share of 4-grams that are "
          "repeats in their window.")
    quality.show(rows, f"written_from_noise: temperature:g repeated:.3f {quality.STORY_COLUMNS}")
    return rows


def complete(model, settings, idx, known, seed, batch_size):
    """Windows idx (N, T) with what is not known (N, T) written anew, those given in the same places in one batch."""
    made = idx.clone()
    patterns, group = known.unique(dim=0, return_inverse=True)
    for i, pattern in enumerate(patterns):
        rows = group == i
        made[rows] = quality.write(model, settings, Canvas(idx[rows], pattern, idx[rows, :0]), seed, batch_size)
    return made


def with_rest_of_another(idx, prompt, eot):
    """Windows idx (N, T), cut after so many tokens, prompt (N, 1), each continued as the next one goes on: (N, T)."""
    T, cut = idx.size(1), prompt[:, 0].tolist()
    rows = idx.tolist()
    made = [row[:n] + other[m:] + [eot] * T for row, n, other, m in
            zip(rows, cut, rows[1:] + rows[:1], cut[1:] + cut[:1], strict=True)]
    return torch.tensor([row[:T] for row in made])


def completions(cfg, bench):
    """Two sentences continued, and a blank filled, in held-out stories."""
    eot, idx = bench.tokenizer.eot_token, bench.windows[-cfg.samples:]
    place = torch.arange(idx.size(1))
    begun = [" ".join(fables.END.split(text)[:2]) for text, _ in quality.stories(idx, bench.tokenizer)]
    prompt = torch.tensor([1 + len(bench.tokenizer.encode_ordinary(text)) for text in begun])[:, None]
    middle = (idx[:, 1:] == eot).int().argmax(1)[:, None] // 2
    outside = (place < middle - cfg.blank // 2) | (place >= middle + cfg.blank - cfg.blank // 2)
    makers = {"two sentences, another's rest": partial(with_rest_of_another, idx, prompt, eot),
              "a blank, another's tokens": partial(torch.where, outside, idx, idx.roll(1, 0))}
    asked = [(place < prompt, "two sentences", scale) for scale in quality.numbers(cfg.guidance, float)]
    for known, name, scale in (*asked, (outside, "a blank", 1)):
        settings = replace(bench.settings, guidance_scale=scale)
        makers[f"{name}, guidance {scale:g}"] = partial(complete, bench.model, settings, idx, known, cfg.seed,
                                                        cfg.batch_size)
    rows = [{"completed": name, **quality.judge_stories(quality.timed({"completion": name}, make), bench)}
            for name, make in makers.items()]
    print(f"\n3. COMPLETIONS of {len(idx)} held-out stories: after their first two sentences, or {cfg.blank} tokens in "
          "their middle.\nThe first two rows are chance: what stands there in another story.")
    quality.show(rows, f"completed: {quality.STORY_COLUMNS}")
    return rows


def main(cfg):
    keep_memory()
    bench, path, content = quality.open_bench(replace(cfg, samples=2))
    if not bench.stories:
        raise UserError(f"{path} was trained on {content['data']['label']}; only of fables is the truth known")
    windows = fresh_windows(max(cfg.sequences, cfg.samples), bench.model.cfg.block_size, bench.tokenizer)
    bench = bench._replace(windows=windows)
    print(f"{path}, step {content['step']:,}, against the grammar of fables.txt, on stories that were drawn for this\n")
    result = {section.__name__: section(cfg, bench) for section in (likelihood, samples, completions)}
    if cfg.out:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        (Path(cfg.out) / "truth.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main, Config)
