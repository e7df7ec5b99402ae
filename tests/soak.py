"""
Kill -9, again and again: training and preparing are killed at random moments, and end as if nothing had been.

    python tests/soak.py                        # 200 kills, half of each kind
    python tests/soak.py 20                     # fewer

A run saves after every second step and is evaluated after every fifth, so that most kills hit a save, an evaluation or
the reading of a checkpoint. Whenever a run or a preparation has come to its end, its files are compared byte by byte,
or tensor by tensor, with those of one that was left alone, and another begins.
"""
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch        # noqa: E402
from torch.utils._pytree import tree_leaves     # noqa: E402

import checkpoint   # noqa: E402
import fables       # noqa: E402

TRAIN = ["train.py", "--n_layer=2", "--n_head=2", "--n_embd=64", "--token_dim=32", "--cross_every=2", "--block_size=64",
         "--prompt_size=32", "--batch_tokens=512", "--max_steps=30", "--save_interval=2", "--eval_interval=5",
         "--eval_sequences=32", "--device=cpu", "--dtype=float32", "--log_interval=1"]
PREPARE = ["prepare_fineweb.py", "--tokenizer=corpus", "--shard_tokens=20000", "--workers=1"]
KEPT = ("step", "tokens", "loss", "lr", "grad_norm", "bound", "text")       # of a row of the log; times are not


def start(command):
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def finish(command):
    """Run to the end; returns the seconds it took."""
    clock, process = time.perf_counter(), start(command)
    said = process.communicate()[0]
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{said}")
    return time.perf_counter() - clock


def same_run(one, other):
    """Whether two runs logged the same steps and evaluations and left the same weights and moments."""
    rows = [[[row.get(name) for name in KEPT] for row in map(json.loads, open(folder / "log.jsonl"))]
            for folder in (one, other)]
    states = [checkpoint.find(folder)[1] for folder in (one, other)]
    leaves = [tree_leaves([state[name] for name in ("step", "model", "ema", "optimizer")]) for state in states]
    return rows[0] == rows[1] and all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                                      for a, b in zip(*leaves, strict=True))


def same_files(one, other):
    """Whether two folders hold the same files."""
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    return files[0] == files[1]


def soak(name, command, same, kills, rng, folder):
    """Kill a command so many times, comparing what it made whenever it comes to its end; returns how often that was."""
    seconds = finish([*command, folder / "alone"])
    rounds = killed = 0
    while killed < kills:
        place, clock = folder / f"round{rounds}", time.perf_counter()
        process = start([*command, place])
        try:
            process.communicate(timeout=rng.uniform(0, 1.2 * seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
            print(f"{name}: kill {killed} after {time.perf_counter() - clock:.1f} s", flush=True)
            continue
        if process.returncode or not same(folder / "alone", place):
            sys.exit(f"{name}: round {rounds} after {killed} kills is not as the one left alone; see {place}")
        stumps = [path.name for path in place.iterdir() if path.suffix in (".tmp", ".damaged", ".lock")]
        print(f"{name}: round {rounds} came to its end after {killed} kills, and is as the one left alone; "
              f"{stumps or 'nothing'} left behind", flush=True)
        shutil.rmtree(place)
        rounds += 1
    return rounds


def main(kills=200):
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        told = (fables.draw(random.Random(seed))[0] for seed in range(6000))
        (folder / "told.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in told))
        prepare = [*PREPARE, f"--source={folder / 'told.jsonl'}", "--out"]
        finish([*prepare, folder / "text"])
        for name, command, same in (("train", [*TRAIN, f"--dataset={folder / 'text'}", "--out_dir"], same_run),
                                    ("prepare", prepare, same_files)):
            (folder / name).mkdir()
            rounds = soak(name, command, same, kills // 2, rng, folder / name)
            print(f"{name}: {kills // 2} kills, {rounds} rounds compared, nothing lost")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
