"""Thousands of damaged, odd and hostile inputs to the scripts, in one process. Whatever comes in, a script succeeds, or
says in one line what is wrong and ends with 1 or 2, within 20 seconds and 2 GB, and leaves no half-written file.

`python -m pytest -m fuzz` runs five times as many, from a seed that it prints; FUZZ_SEED=n repeats them.
"""
import contextlib
import copy
import gzip
import importlib
import io
import json
import lzma
import math
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import SIZE, call, finish

import checkpoint

SEED = int(os.environ.get("FUZZ_SEED", time.time()))
ODD = [None, True, False, -1, 0, 1, 3, 2**16, 10**9, 2**63, 10**30, -0.5, 1e-45, 1e308, math.nan, math.inf, "", "x",
       "0", "../../../etc/passwd", "hf:stranger/x", "\x1b[2J\x1b]0;owned\a", "<script>", "\0", "\ud800", "a\nb",
       99_999 * "a", "\U0001f4a5\u202e", [], {}, [1], [[]], {"name": "x"}, {"": None}]
WORDS = ["[MASK]", "[MASK:3]", "[MASK:0]", "[MASK:999999]", "[mask]", "[MASK:", "<|endoftext|>", "the dog", " ", "\n",
         "\t", "\0", "\ud800", "\U0001f4a5", "\u202e", "\x1b[2J", "@", "-", "--", "=", "'", '"', "{}", "%s", "\\",
         "a" * 300]


# ---- changes ----

def places(tree, path=()):
    """The path of every value in nested dicts and lists, of a long list of the first few only."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:4]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def change_tree(tree, rng):
    """A copy of nested dicts and lists, shared below what is changed: one value is another, is gone or is there
    twice."""
    path = rng.choice(list(places(tree)))
    if not path:
        return rng.choice(ODD)
    new = node = copy.copy(tree)
    for key in path[:-1]:
        node[key] = copy.copy(node[key])
        node = node[key]
    how = rng.random()
    if how < 0.2:
        del node[path[-1]]
    elif how < 0.3 and isinstance(node, list):
        node.append(node[path[-1]])
    elif how < 0.5 and type(node[path[-1]]) in (int, float):
        node[path[-1]] = rng.choice((-1, 2, 0.5, 1000)) * node[path[-1]] + rng.choice((0, 1))
    else:
        node[path[-1]] = rng.choice(ODD)
    return new


def change_bytes(content, rng):
    """Bytes with some bits turned, cut short, with a hole, doubled, or with something else in the middle."""
    data, how = bytearray(content), rng.random()
    at = rng.randrange(len(data) + 1)
    if how < 0.4:
        for _ in range(rng.choice((1, 1, 8, 100))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how < 0.6:
        del data[at:]
    elif how < 0.7:
        data[at:at + 64] = bytes(64)
    elif how < 0.8:
        data += data[at:]
    else:
        data[at:at] = rng.choice((b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"{", b'"', b"\n\n", b"[" * 5000, b"9" * 5000,
                                  b"-" * 3000))
    return bytes(data)


def change_kind(path, rng):
    """Another kind of thing in the place of a file."""
    path.unlink()
    how = rng.randrange(6)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to(path.name)
    elif how == 3:
        path.symlink_to("/dev/zero")
    elif how == 4:
        with open(path, "wb") as file:
            file.truncate(3 * 2**30)
    else:
        path.touch()


def change_file(path, rng):
    """A file of JSON, or any, is damaged in place, as a tree, as bytes, or by another kind of thing."""
    how = rng.random()
    if how < 0.07:
        change_kind(path, rng)
    elif how < 0.75 and path.suffix == ".json":
        path.write_text(json.dumps(change_tree(json.loads(path.read_text()), rng)))
    else:
        path.write_bytes(change_bytes(path.read_bytes(), rng))


# ---- an attack ----

def too_slow(number, frame):
    raise TimeoutError("more than 20 s")


def attack(args, stdin=""):
    """Run a script with arguments inside this process; AssertionError unless it ends as promised. Returns the code."""
    script, out, err = importlib.import_module(args[0]), io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(20)
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr("sys.stdin", io.StringIO(stdin))
            code = finish(script, [str(arg) for arg in args[1:]])
    except BaseException as error:
        raise AssertionError(f"{args}: {type(error).__name__}") from error
    finally:
        signal.alarm(0)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    assert code in (0, 1, 2) and len(lines) == (code != 0), (args, code, err.getvalue())
    assert all(len(line) < 1500 and line.isprintable() for line in lines), (args, lines)
    out.getvalue().encode(errors="strict" if code else "replace")
    return code


def kilobytes(what):
    return int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def rounds(name, n):
    """So many random generators, each for an attack that is told by its number."""
    for i in range(n):
        yield random.Random(f"{name} {i}")


@pytest.fixture(params=[pytest.param(1, id="seed 1"),
                        pytest.param(SEED, id=f"FUZZ_SEED={SEED}", marks=pytest.mark.fuzz)])
def fuzz(request, tmp_path):
    """fuzz(name, n, prepare): attacks, of which each begins with `prepare(rng, folder)`, the arguments; at the end
    memory and the count of what came out are looked at."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)

    def run(name, n, prepare):
        codes = {0: 0, 1: 0, 2: 0}
        Path("/proc/self/clear_refs").write_text("5")                       # the peak counts from here
        before = kilobytes("VmHWM")
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, limits[1]))
        for i, rng in enumerate(rounds(f"{request.param} {name}", n if request.param == 1 else 5 * n)):
            folder = tmp_path / str(i)
            folder.mkdir()
            try:
                codes[attack(*prepare(rng, folder))] += 1
            except AssertionError as error:
                raise AssertionError(f"attack {i} of {name}, seed {request.param}: {error}") from error.__cause__
            assert not list(folder.rglob("*.tmp")), f"attack {i} of {name}, seed {request.param}: half-written"
            shutil.rmtree(folder)
        assert kilobytes("VmHWM") - before < 2 * 2**20, "2 GB"
        print(f"{name}: {codes}")
        return codes
    yield run
    resource.setrlimit(resource.RLIMIT_AS, limits)


# ---- networks ----

@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "export"
    call(["sample.py", f"--checkpoint={base}", "--device=cpu", "--dtype=float32", "--steps=1", f"--export={folder}"])
    return folder


def write_with(place):
    return ["sample", f"--checkpoint={place}", "--device=cpu", "--dtype=float32", "--prompt=the dog", "--steps=1",
            "--seed=1", "--seq_len=4", "--revisions=0"]


def test_exports(exported, fuzz):
    def prepare(rng, folder):
        place = shutil.copytree(exported, folder / "export")
        change_file(place / rng.choice(checkpoint.EXPORT), rng)
        return write_with(place),
    codes = fuzz("exports", 400, prepare)
    assert codes[1] > 200


def test_checkpoints(base, shards, fuzz):
    path = sorted(base.glob("ckpt*"))[-1]
    content = torch.load(path, weights_only=True)
    resume = ["train", *SIZE, f"--dataset={shards}", "--max_steps=20", "--resume"]

    def prepare(rng, folder):
        place = folder / path.name
        if rng.random() < 0.3:
            shutil.copy(path, place)
            change_file(place, rng)
        else:
            torch.save(change_tree(content, rng), place)
        shutil.copy(base / "log.jsonl", folder)
        return write_with(place) if rng.random() < 0.7 else [*resume, f"--out_dir={folder}"],
    codes = fuzz("checkpoints", 400, prepare)
    assert codes[1] > 100


# ---- text and logs ----

def test_shards_and_their_meta(shards, fuzz):
    def prepare(rng, folder):
        place = shutil.copytree(shards, folder / "shards")
        change_file(rng.choice(sorted(place.glob("*.bin")) + 3 * [place / "meta.json"]), rng)
        return ["train", *SIZE, "--n_layer=2", f"--dataset={place}", f"--out_dir={folder / 'run'}", "--max_steps=1",
                "--batch_tokens=32", "--batch_size=2", "--eval_sequences=2"],
    codes = fuzz("shards", 200, prepare)
    assert codes[2] > 80


def test_logs(base, shards, fuzz):
    resume = ["train", *SIZE, f"--dataset={shards}", "--max_steps=20", "--resume"]

    def prepare(rng, folder):
        for path in base.iterdir():
            os.link(path, folder / path.name)
        rows = [json.loads(line) for line in (base / "log.jsonl").read_text().splitlines()]
        log = folder / "log.jsonl"
        log.unlink()
        log.write_text("".join(json.dumps(row) + "\n" for row in change_list(rows, rng)))
        change_file(log, rng) if rng.random() < 0.5 else None
        return [*resume, f"--out_dir={folder}"] if rng.random() < 0.5 else write_with(folder),
    codes = fuzz("logs", 150, prepare)
    assert codes[0] > 100


def change_list(rows, rng):
    changed = change_tree(rows, rng)
    return changed if isinstance(changed, list) else [changed]


def documents(rng):
    """A file's bytes and suffix: text or records, sound or odd."""
    record = {"text": "the dog went home. " * 9} if rng.random() < 0.5 else {"instruction": "say", "output": "home"}
    rows = [record] * 5 + [change_tree(record, rng)] * (rng.random() < 0.7)
    text = "\n".join(json.dumps(row) for row in rows).encode()
    suffix = rng.choice((".jsonl", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".txt", ".md", ".parquet"))
    if suffix in (".txt", ".md"):
        text = "".join(rng.choice(WORDS) for _ in range(200)).encode(errors="surrogatepass")
    text = change_bytes(text, rng) if rng.random() < 0.5 else text
    text = {".jsonl.gz": gzip.compress, ".jsonl.xz": lzma.compress}.get(suffix, bytes)(text)
    return (change_bytes(text, rng) if rng.random() < 0.3 else text), suffix


def test_sources(fuzz):
    def prepare(rng, folder):
        content, suffix = documents(rng)
        path = folder / f"text{suffix}"
        path.write_bytes(content)
        change_kind(path, rng) if rng.random() < 0.05 else None
        return ["prepare_fineweb", f"--source={path}", "--tokenizer=corpus", "--vocab_size=300",
                f"--out={folder / 'out'}"],
    codes = fuzz("sources", 250, prepare)
    assert codes[0] > 40 and codes[2] > 40


# ---- what a user types ----

def test_config_files(shards, fuzz):
    sound = "\n".join(arg.removeprefix("--") for arg in SIZE if arg[2:].split("=")[1].isdigit())

    def prepare(rng, folder):
        path = folder / "config.py"
        path.write_text(sound)
        if rng.random() < 0.5:
            line = f"\n{rng.choice(('n_layer', 'learning_rate', 'out_dir', 'resume', 'zzz'))} = {rng.choice(ODD)!r}"
            path.write_text(sound + line, errors="backslashreplace")
        else:
            change_file(path, rng)
        return ["train", path, f"--dataset={shards}", "--device=cpu", "--dry_run"],
    codes = fuzz("configs", 300, prepare)
    assert codes[0] > 20 and codes[2] > 150


def test_settings_on_the_command_line(base, shards, fuzz):
    kinds = {"train": ["train", *SIZE, f"--dataset={shards}", "--dry_run"], "sample": write_with(base),
             "prepare_fineweb": ["prepare_fineweb", f"--source={shards.parent / 'text.jsonl'}", "--tokenizer=corpus",
                                 "--vocab_size=300", "--max_tokens=1k", "--workers=1"]}
    left_out = {"num_samples", "wandb_log", "device", "compile", "dry_run", "workers"}      # long, or of elsewhere

    def prepare(rng, folder):
        name, args = rng.choice(list(kinds.items()))
        names = [field for field in importlib.import_module(name).Config.__dataclass_fields__ if field not in left_out]
        args = [*args, f"--out={folder / 'out'}"] if name == "prepare_fineweb" else args
        values = [str(value) for value in ODD if not isinstance(value, str) or "/" not in value and "hf:" not in value]
        odd = [f"--{rng.choice(names)}={rng.choice(values)}" for _ in range(rng.choice((1, 1, 2)))]
        odd = [arg for arg in odd if not arg.startswith(("--out", "--export=", "--html=", "--source="))]
        return [*args, *odd, *([rng.choice(WORDS)] if rng.random() < 0.1 else [])],
    codes = fuzz("settings", 300, prepare)
    assert codes[2] > 150


def test_prompts_and_texts(base, fuzz):
    def prepare(rng, folder):
        text = "".join(rng.choice(WORDS) for _ in range(rng.choice((1, 3, 9))))
        args = [arg for arg in write_with(base) if not arg.startswith(("--prompt", "--seq_len"))]
        args += [rng.choice(("--json=true", "--json=false")), rng.choice(("--show=true", "--show=false"))]
        kind = rng.randrange(4)
        if kind == 3:
            return [*args, "--prompt=-"], text
        if kind == 2:
            path = Path(folder, "prompts.txt")
            path.write_bytes(change_bytes(text.encode(errors="surrogatepass"), rng))
            change_kind(path, rng) if rng.random() < 0.1 else None
            return [*args, f"--prompt=@{path}"],
        return [*args, f"--prompt={text}"] if kind else [*args, "--mode=infill", f"--text={text}"],
    codes = fuzz("prompts", 200, prepare)
    assert codes[0] > 50
