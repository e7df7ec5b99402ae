"""One thread, for speed and bitwise equality; the repository's root on the path; data made on the spot."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"         # the subprocesses too

import contextlib   # noqa: E402
import importlib    # noqa: E402
import io           # noqa: E402
import json         # noqa: E402
import shutil       # noqa: E402
import signal       # noqa: E402
from types import SimpleNamespace       # noqa: E402

import pytest       # noqa: E402
import torch        # noqa: E402

import configurator     # noqa: E402
from model import ModelConfig, SunFish      # noqa: E402

torch.set_num_threads(1)

SIZE = ["--n_layer=2", "--cross_every=2", "--n_head=2", "--n_embd=32", "--token_dim=16", "--block_size=16",
        "--prompt_size=8", "--max_block_length=8", "--batch_size=4", "--batch_tokens=128", "--eval_sequences=8",
        "--eval_interval=0", "--device=cpu", "--dtype=float32", "--log_interval=1", "--warmup_steps=2"]


@pytest.fixture
def small():
    """A network of two layers over 50 ids, with an output that is not zero, and its settings."""
    cfg = ModelConfig(n_layer=2, n_head=2, n_embd=32, token_dim=16, block_size=12, prompt_size=6)
    torch.manual_seed(0)
    return wake(SunFish(cfg, 50, torch.randn(50).log_softmax(0)))


@torch.no_grad()
def wake(model):
    """The network itself, what starts at zero made random."""
    for name, p in model.named_parameters():
        if not p.any() or name == "in_proj.weight":     # half of which starts at zero
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder of shards of made-up sentences, 300 ids, ready for train.py."""
    folder = tmp_path_factory.mktemp("text")
    words = "the a small old red boat dog sea wind went saw liked under over near and then home".split()
    choose = torch.Generator().manual_seed(0)
    lines = [" ".join(words[i] for i in torch.randint(len(words), (30,), generator=choose)) + "." for _ in range(400)]
    (folder / "text.jsonl").write_text("\n".join('{"text": "%s"}' % line for line in lines))
    run(["prepare_fineweb.py", f"--source={folder / 'text.jsonl'}", "--tokenizer=corpus", "--vocab_size=300",
         f"--out={folder / 'shards'}"])
    return folder / "shards"


@pytest.fixture(scope="session")
def base(shards, tmp_path_factory):
    """A run of twenty steps on these sentences, to be trained on."""
    folder = tmp_path_factory.mktemp("base") / "run"
    call(["train.py", *SIZE, f"--dataset={shards}", "--max_steps=20", f"--out_dir={folder}"])
    return folder


PAIRS = {"the dog": "went home", "the boat": "saw wind and sea", "a red sea": "old"}


@pytest.fixture(scope="session")
def pairs(shards, tmp_path_factory):
    """A folder of instructions, each many times with its response, in the tokens of those sentences; the same ones
    for validation, for three are too few to hold one out."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [json.dumps(dict(instruction=q, input="", output=a)) for _ in range(40) for q, a in PAIRS.items()]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    run(["prepare_fineweb.py", f"--source={folder / 'pairs.jsonl'}", f"--tokenizer={shards}", "--val_fraction=0",
         f"--out={folder / 'shards'}"])
    shutil.copy(folder / "shards" / "train_000000.bin", folder / "shards" / "val_000000.bin")
    return folder / "shards"


def run(args, code=0, **options):
    """Run one of the scripts; its exit code must be `code` and no traceback may show."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, text=True, capture_output=True, timeout=200,
                          **options)
    assert done.returncode == code and "Traceback" not in done.stderr, (done.returncode, done.stdout, done.stderr)
    return done


def call(args, code=0, stdin=""):
    """As `run`, but inside this process, which saves the seconds of importing torch."""
    script, out, err = importlib.import_module(args[0].removesuffix(".py")), io.StringIO(), io.StringIO()
    handlers, before = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)], sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            returned = finish(script, [str(arg) for arg in args[1:]])
    finally:
        sys.stdin = before
        for number, handler in handlers:
            signal.signal(number, handler)
    assert returned == code, (returned, out.getvalue(), err.getvalue())
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def finish(script, argv):
    """The exit code of a script's main, as configurator.run gives it."""
    try:
        return script.main(configurator.load(script.Config, argv)) or 0
    except configurator.UserError as error:
        return configurator.say_error(error, 2)
    except (configurator.Fault, OSError) as error:
        return configurator.say_error(error, 1)
    except SystemExit as stop:
        return stop.code or 0


def losses(folder):
    rows = [json.loads(line) for line in open(folder / "log.jsonl")]
    found = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [step for step, _ in found] == list(range(1, len(found) + 1)), "each step is logged once"
    return dict(found)


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked fuzz unless it is asked for: it takes minutes and is another each time."""
    if "fuzz" not in (config.option.markexpr or ""):
        fuzz = [item for item in items if item.get_closest_marker("fuzz")]
        config.hook.pytest_deselected(items=fuzz)
        items[:] = [item for item in items if item not in fuzz]
