"""
Whether a network heeds an instruction: its bound on held-out responses, given theirs and another one.

    python bench/instruct.py --networks=out/stories,out/instruct,out/lora --dataset=instruct --out=out/answers.json

Networks are runs, exports or adapters, whose base is where it was; all see the same windows and noise. A response is measured in the
way sample.py writes it, token by token. What training took, its memory and its checkpoint, is read from each run's folder.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import fail, load        # noqa: E402


@dataclass(frozen=True)
class Config:
    networks: str = ""               # comma list of files or folders; before and after
    dataset: str = "instruct"        # folder of shards of examples, or name under data/
    block_size: int = 0              # tokens in a window; 0: as the last network was trained
    examples: int = 256              # held-out examples, as many as there are at most
    answers: int = 8                 # of them that the last network answers, in full
    temperature: float = 0.5         # of the answers
    guidance_scale: float = 1.0      # of the answers
    batch_size: int = 32             # examples at a time
    out: str = ""                    # file for all that was measured, as JSON

    def check(self):
        if not self.networks:
            raise ValueError("there is nothing to measure; name --networks=out/base,out/tuned")
        if min(self.examples - 1, self.batch_size) < 1 or self.answers < 0:
            raise ValueError(f"examples={self.examples} must be 2 at least, batch_size={self.batch_size} 1 and answers={self.answers} 0")


if __name__ == "__main__":
    CFG = load(Config)

import dataclasses                         # noqa: E402

import torch

import quality
import sample
import train
from model import keep_memory, load_model, model_config
from prepare_fineweb import get_tokenizer


def open_network(place):
    """(content, path) of a checkpoint, or of adapters, merged into their base; ends the program if there is none."""
    path, content = sample.open_checkpoint(sample.Config(checkpoint=place))
    return content, path


def pair_up(val, n, other=0):
    """n examples as Items: each response with its own instruction, or with that of the `other`-th next that is not the same."""
    texts, items = [val.texts(i * len(val) // n) for i in range(n)], []
    for i, (mine, response) in enumerate(texts):
        theirs = [text for text, _ in texts[i + 1:] + texts[:i] if text.tolist() != mine.tolist()]
        items.append(train.place_example(val.cfg, theirs[other - 1] if other and theirs else mine, response))
    return items


def bounds(cfg, model, val):
    """{"right": (nats a token, error), "shuffled": ...} of the held-out responses."""
    found = {}
    for name, other in (("right", 0), ("shuffled", 1)):
        idx, rest = train.stack_examples(val.cfg, pair_up(val, min(cfg.examples, len(val)), other))
        row = train.measure(model, idx, cfg.batch_size, bands=0, **rest)
        found[name] = (row["bound"], row["bound_error"])
    return found


def training(path):
    """What the run of a checkpoint file took: milliseconds a step, GB, MB of the file; {} of what is not a run."""
    log = path.parent / "log.jsonl"
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if "step_ms" in row] if path.is_file() and log.is_file() else []
    middle = sorted(row["step_ms"] for row in rows)[len(rows) // 2:][:1]
    return dict(step_ms=middle[0], peak_gb=max(row["peak_gb"] for row in rows), checkpoint_mb=path.stat().st_size / 1e6) if rows else {}


def answer(cfg, model, encoding, val, k):
    """(instruction, what the network answers, the true response) of held-out example k, as text."""
    (instruction, response), item = val.texts(k), val[k]
    canvas = item.idx, torch.arange(len(item.idx)) < item.begun, item.before
    settings = sample.Config(temperature=cfg.temperature, guidance_scale=cfg.guidance_scale)
    made = sample.sample(model, settings, canvas, [0], end=encoding.eot_token)[0, item.begun:].tolist()
    parts = instruction[1:].tolist(), sample.until(made, encoding.eot_token), response[:-1].tolist()
    return [encoding.decode(part).strip() for part in parts]


def main(cfg):
    keep_memory()
    torch.set_num_threads(1)
    networks = [open_network(place) for place in cfg.networks.split(",")]
    last = model_config(networks[-1][0])
    sizes = dict(block_size=cfg.block_size or last.block_size, prompt_size=last.prompt_size)
    if any(content["data"]["tokenizer"] != networks[-1][0]["data"]["tokenizer"] for content, _ in networks):
        fail(f"networks={cfg.networks} have unequal tokenizers; their bounds cannot be compared")
    val = quality.open_val(cfg.dataset, networks[-1][0], dataclasses.replace(last, **sizes), train.Examples)
    table = []
    print(f"{min(cfg.examples, len(val)):,} held-out responses, windows of {val.cfg.block_size} tokens; nats a token, given the right instruction "
          "and another one")
    for place, (content, path) in zip(cfg.networks.split(","), networks, strict=True):
        model = load_model(content)
        row = dict(network=place, **bounds(cfg, model, val), **training(path))
        table.append(row)
        took = f"{row['step_ms']:8.0f} ms a step {row['peak_gb']:6.2f} GB {row['checkpoint_mb']:8.1f} MB" if "step_ms" in row else ""
        print("{network:24} right {right[0]:.3f} +- {right[1]:.3f}  shuffled {shuffled[0]:.3f} +- {shuffled[1]:.3f}".format(**row), took, flush=True)
    encoding = get_tokenizer(networks[-1][0]["data"]["tokenizer"])
    answers = [answer(cfg, model, encoding, val, i * len(val) // cfg.answers) for i in range(cfg.answers)]
    for instruction, made, truth in answers:
        print(f"--- {instruction}\n{made}\n(truth: {truth})")
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(dict(settings=dataclasses.asdict(cfg), rows=table, answers=answers), indent=1) + "\n")


if __name__ == "__main__":
    main(CFG)
