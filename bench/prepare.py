"""
What prepare_fineweb.py costs beside tiktoken alone: tokens/s per core of both on the same text, and peak memory.

    python bench/prepare.py --source=texts/ --repeats=40

tiktoken alone has the text in memory, encodes it in as many threads and drops the tokens. prepare reads the same text
from a parquet file and writes its shards. "The rest" is prepare with a tokenizer that takes no time: most of that holds
Python's global lock, so that one process keeps about as many cores busy as it fits into tiktoken's time. The three take
turns on some documents, then on the next, for a machine is seldom equally fast for long: look at the medians.
"""
import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare_fineweb as pf
from configurator import in_range, run
from data import get_tokenizer, read_meta

# peak memory is read from inside: what a parent is told of its child's includes the parent's own
CHILD = """import configurator, prepare_fineweb as pf
pf.prepare(configurator.load(pf.Config))
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])"""


@dataclass(frozen=True)
class Config:
    source: str = "fables"           # as for prepare_fineweb.py: file, folder or glob
    documents: int = 4000            # at a time
    workers: int = 0                 # threads that tokenize, for both; 0: one a core
    repeats: int = 10                # with other documents each time, as far as they last
    out: str = ""                    # also write the numbers here, as JSON

    def check(self):
        in_range(self, 1, 1e9, "documents", "repeats")
        in_range(self, 0, 1000, "workers")


class Free:
    """A tokenizer that takes no time; its zeros are about as many as GPT-2's tokens."""
    eot_token, n_vocab = 0, 50257

    def encode_to_numpy(self, text, disallowed_special):
        return np.zeros(len(text) // 4, np.uint32)


def encode_alone(tokenizer, texts, workers):
    """tiktoken's faster way, the one that makes no Python list; returns the number of tokens."""
    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(lambda text: len(tokenizer.encode_to_numpy(text, disallowed_special=())), texts))


def prepare(tokenizer, path, workers):
    """The script in this process, with `tokenizer` as GPT-2's; returns the number of tokens."""
    pf.get_tokenizer = lambda spec: tokenizer
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        meta = read_meta(pf.prepare(pf.Config(str(path), "gpt2", max_tokens="0", out=out, workers=workers)))
    return meta["train_tokens"] + meta["val_tokens"]


def timed(call, *args):
    """(tokens, nanoseconds a token, of processor time)"""
    start, processor = time.perf_counter(), time.process_time()
    n = call(*args)
    return n, (time.perf_counter() - start) / n * 1e9, (time.process_time() - processor) / n * 1e9


def measure(tokenizer, path, texts, workers):
    """One row of figures: times in nanoseconds a token."""
    n, alone, alone_cpu = timed(encode_alone, tokenizer, texts, workers)
    tokens, whole, whole_cpu = timed(prepare, tokenizer, path, workers)
    _, rest, _ = timed(prepare, Free(), path, 1)
    assert tokens == n + len(texts), f"{tokens:,} tokens in the shards, {n:,} + {len(texts):,} expected"
    return {"tokens": tokens, "tiktoken": 1e9 / alone / workers, "prepare": 1e9 / whole / workers,
            "ratio": alone / whole, "ratio_cpu": alone_cpu / whole_cpu, "busy": alone_cpu / alone,
            "busy_prepare": whole_cpu / whole, "tiktoken_ns": alone_cpu, "rest_ns": rest}


def run_alone(path, out, workers):
    """(seconds, GB) that the script takes for a file, as a process with its start-up."""
    start = time.perf_counter()
    args = [f"--source={path}", f"--out={out}", "--tokenizer=gpt2", "--max_tokens=0", f"--workers={workers}"]
    done = subprocess.run([sys.executable, "-c", CHILD, *args], cwd=ROOT, check=True, text=True, capture_output=True)
    return time.perf_counter() - start, int(done.stdout.split()[-1]) * 1024 / 1e9


def main(cfg):
    import pyarrow
    import pyarrow.parquet
    workers, tokenizer = cfg.workers or os.cpu_count(), get_tokenizer({"name": "gpt2"})
    texts = (document[0] for document in pf.open_source(cfg.source)[1])
    batches = iter(lambda: list(itertools.islice(texts, cfg.documents)), [])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.parquet")
        for batch in itertools.islice(batches, cfg.repeats):
            pyarrow.parquet.write_table(pyarrow.table({"text": batch}), path, 1000)
            rows.append(measure(tokenizer, path, batch, workers))
        took, peak_gb = run_alone(path, Path(folder, "out"), workers)
    row = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    row |= {"workers": workers, "seconds": took, "peak_gb": peak_gb}
    print("median of {} by {tokens:,.0f} tokens, {workers} workers: tiktoken alone {tiktoken:,.0f} tokens/s a core "
          "({busy:.2f} cores busy), prepare {prepare:,.0f} ({busy_prepare:.2f}), {ratio:.0%}, by processor time "
          "{ratio_cpu:.0%}; a token takes tiktoken {tiktoken_ns:.0f} ns, the rest {rest_ns:.0f}; as a process with "
          "start-up the last took {seconds:.2f} s, peak memory {peak_gb:.2f} GB".format(len(rows), **row))
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(row | {"rows": rows}) + "\n")


if __name__ == "__main__":
    run(main, Config)
