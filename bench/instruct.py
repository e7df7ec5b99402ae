"""
Whether a network heeds an instruction: its bound on held-out responses, given theirs and another one.

    python bench/instruct.py --networks=out/stories,out/instruct,out/lora --dataset=instruct --out=out/answers.json

Networks are runs, exports or adapters, whose base is where it was; all see the same windows and noise. What training
took, its memory and its checkpoint, is read from each run's folder.
"""
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint as ckpt
import quality
from configurator import UserError, in_range, run
from data import Texts, cut_at_eot, get_tokenizer
from generate import Canvas, Sampling, bound, generate, generators
from machine import keep_memory


@dataclass(frozen=True)
class Config:
    networks: str = ""               # comma list of files or folders; before and after
    dataset: str = "instruct"        # folder of shards of examples, or name under data/
    block_length: int = Sampling.block_length    # tokens of a response that are denoised together; 1 one by one
    block_size: int = 0              # tokens in a window; 0: as the last network was trained
    examples: int = 256              # held-out examples, as many as there are at most
    answers: int = 8                 # of them that the last network answers, in full
    temperature: float = 0.5         # of the answers
    guidance_scale: float = 1.0      # of the answers
    batch_size: int = 32             # examples at a time
    out: str = ""                    # file for all that was measured, as JSON

    def check(self):
        if not self.networks:
            raise UserError("there is nothing to measure; name --networks=out/base,out/tuned")
        in_range(self, 2, 1e9, "examples")
        in_range(self, 1, 1e9, "batch_size")
        in_range(self, 0, 1e9, "answers", "block_length", "block_size")


def read_example(data, i):
    """The token ids of the instruction and of the response of example i, two lists."""
    shard, start, window, given, end = (int(part[0]) for part in data.locate(torch.tensor([i]).numpy()))
    ids = data.shards[shard][start:window + end].tolist()
    return ids[:window + given - start], ids[window + given - start:]


def place(data, instruction, response):
    """A row of Texts: the end of an instruction, and a response that fits behind it, in a window; the rest of the
    instruction before it."""
    given = min(len(instruction), data.T // 2)
    start = len(instruction) - given
    before, here = instruction[:start][-data.P:], instruction[start:] + response
    idx = torch.tensor(here + [0] * (data.T - len(here)))
    prompt = torch.tensor([0] * (data.P - len(before)) + before, dtype=torch.int64)
    pos = torch.arange(data.T)
    return Texts(idx, prompt, torch.arange(data.P) >= data.P - len(before), (pos >= given) & (pos < len(here)))


def pair_up(data, n):
    """n responses, cut where needed, as Texts with their own instruction, and with the next one that differs."""
    examples = [read_example(data, i * len(data) // n) for i in range(n)]
    right, shuffled = [], []
    for i, (mine, response) in enumerate(examples):
        others = [other for other, _ in examples[i + 1:] + examples[:i] if other != mine]
        theirs = others[0] if others else mine
        room = data.T - min(data.T // 2, max(len(mine), len(theirs)))
        right.append(place(data, mine, response[:room]))
        shuffled.append(place(data, theirs, response[:room]))
    return [Texts(*map(torch.stack, zip(*rows, strict=True))) for rows in (right, shuffled)]


def training(path):
    """What the run of a checkpoint file took: milliseconds a step, GB, MB of the file; {} of what is not a run."""
    log = path.parent / "log.jsonl"
    if not path.is_file() or not log.is_file():
        return {}
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if "step_ms" in row]
    middle = sorted(row["step_ms"] for row in rows)[len(rows) // 2]
    return dict(step_ms=middle, peak_gb=max(row["peak_gb"] for row in rows), checkpoint_mb=path.stat().st_size / 1e6)


def answer(cfg, model, tokenizer, data, i):
    """(instruction, what the network answers, the true response) of held-out example i, as text."""
    texts, given = data.read([i])
    canvas = Canvas(texts.idx[0], torch.arange(data.T) < given[0], texts.prompt[0][texts.prompt_mask[0]])
    settings = Sampling(block_length=cfg.block_length, temperature=cfg.temperature, guidance_scale=cfg.guidance_scale)
    made = generate(model, canvas, settings, generators("cpu", 1, [0]), eot=tokenizer.eot_token)[0, given[0]:].tolist()
    instruction, response = read_example(data, i)
    parts = instruction[1:], cut_at_eot(made, tokenizer.eot_token), cut_at_eot(response, tokenizer.eot_token)
    return [tokenizer.decode(part).strip() for part in parts]


def measure(cfg, place, path, content, pairs):
    """The row of a network: its bounds, and what its training took."""
    model, row = ckpt.load_model(content), dict(network=place)
    for name, texts in zip(("right", "shuffled"), pairs, strict=True):
        found = bound(model, texts, cfg.batch_size, cfg.block_length)
        row[name] = (found["bound"], found["bound_error"])
    row |= training(path)
    line = "{network:24} right {right[0]:.3f} +- {right[1]:.3f}  shuffled {shuffled[0]:.3f} +- {shuffled[1]:.3f}"
    if "step_ms" in row:
        line += "{step_ms:8.0f} ms a step {peak_gb:6.2f} GB {checkpoint_mb:8.1f} MB"
    print(line.format(**row))
    return row


def main(cfg):
    keep_memory()
    torch.set_num_threads(1)
    places = cfg.networks.split(",")
    networks = [ckpt.find_network(place) for place in places]
    _, last = networks[-1]
    if any(content["data"]["tokenizer"] != last["data"]["tokenizer"] for _, content in networks):
        raise UserError(f"networks={cfg.networks} have unequal tokenizers; their bounds cannot be compared")
    model_cfg = ckpt.model_config(last)
    sizes = dataclasses.replace(model_cfg, block_size=cfg.block_size or model_cfg.block_size)
    data = quality.open_data(cfg.dataset, last, sizes)
    if not data.is_examples:
        raise UserError(f"dataset={cfg.dataset} is text, without instructions; name one of examples")
    n = min(cfg.examples, len(data))
    print(f"{n:,} held-out responses, windows of {data.T} tokens, in blocks of {cfg.block_length} (0: the window); "
          "nats a token, given the right instruction and another one")
    pairs = pair_up(data, n)
    table = [measure(cfg, place, *network, pairs) for place, network in zip(places, networks, strict=True)]
    tokenizer, model = get_tokenizer(last["data"]["tokenizer"]), ckpt.load_model(last)
    answers = [answer(cfg, model, tokenizer, data, i * len(data) // cfg.answers) for i in range(cfg.answers)]
    for instruction, made, truth in answers:
        print(f"--- {instruction}\n{made}\n(truth: {truth})")
    if cfg.out:
        result = dict(settings=dataclasses.asdict(cfg), rows=table, answers=answers)
        Path(cfg.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main, Config)
