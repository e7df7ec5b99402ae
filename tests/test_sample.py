"""Sampling as a user sees it: what is given comes back, the same seed gives the same text, and mistakes are named."""
import contextlib
import io
import json
from dataclasses import replace

import pytest
import torch
from conftest import call, run

import sample as script
from configurator import ModelConfig
from model import find_checkpoint, load_model


@pytest.fixture(scope="module")
def checkpoint(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    call(["train.py", "--n_layer=1", "--n_head=2", "--n_embd=32", "--token_dim=16", "--block_size=24", "--prompt_size=8",
         "--batch_size=8", "--batch_tokens=192", "--eval_interval=0", "--eval_sequences=8", "--device=cpu",
         "--dtype=float32", "--max_steps=30", f"--dataset={shards}", f"--out_dir={folder}"])
    return folder


def write(checkpoint, *args, code=0, run=call, **options):
    return run(["sample.py", f"--checkpoint={checkpoint}", "--steps=6", "--span_size=8", *args], code, **options)


def texts(checkpoint, *args):
    return [json.loads(line)["text"] for line in write(checkpoint, "--json=True", *args).stdout.splitlines()]


def test_same_seed_same_text_whatever_the_batch(checkpoint):
    together = texts(checkpoint, "--num_samples=3", "--prompt", "a small dog", "--dtype=float32")
    apart = texts(checkpoint, "--num_samples=3", "--prompt", "a small dog", "--dtype=float32", "--batch_size=1")
    other = texts(checkpoint, "--num_samples=3", "--prompt", "a small dog", "--seed=2")
    assert together == apart and len(set(together)) == 3 and together != other


def test_bfloat16_changes_the_scores_little_and_the_command_takes_it(checkpoint):
    scores, x = [], torch.randn(1, 24, 16)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(find_checkpoint(checkpoint)[1], dtype=dtype)
        reader = script.Reader(model, model.embedding().to(dtype), torch.tensor([[5, 6, 7]]), torch.zeros(24, dtype=torch.bool), 2.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            scores.append(reader.network(x, torch.zeros(1, 24), torch.zeros_like(x)).softmax(-1))
    assert (scores[0] - scores[1]).abs().max() < 0.02 and 0 < (scores[0] - scores[1]).abs().max()
    assert ", bfloat16" in write(checkpoint, "--dtype=bfloat16").stderr and "float32" in write(checkpoint, "--dtype=float32").stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_weights_answer_nearly_the_same_in_turns_and_with_guidance(checkpoint, dtype):
    found, scores = find_checkpoint(checkpoint)[1], []
    prompt, x = torch.tensor([[5, 6, 7]]), torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0))
    for int8 in (False, True):
        model = load_model(found, dtype=getattr(torch, dtype), int8=int8)
        reader = script.Reader(model, model.embedding().to(model.dtype), prompt, torch.zeros(24, dtype=torch.bool), 2.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
            scores.append(reader.network(x, torch.zeros(1, 24), torch.zeros_like(x)).softmax(-1))
    assert 0 < (scores[0] - scores[1]).abs().max() < 0.03
    assert script.sample(model, script.Config(), (torch.zeros(24, dtype=torch.int64), torch.arange(24) < 3, prompt[0]), [0]).shape == (1, 24)
    assert len(texts(checkpoint, "--quantize=int8", f"--dtype={dtype}", "--num_samples=2")) == 2


def test_an_open_blank_of_a_network_that_guesses_noise(small):
    small.cfg, small.head = replace(small.cfg, objective="eps", schedule="linear"), torch.nn.Linear(32, 16)
    text, = script.infill(small, script.Config(mode="infill", text="x", steps=12), [[1, 2, 3], 0, [4, 5]], [0])
    assert text[:3] == [1, 2, 3] and text[-2:] == [4, 5] and 6 <= len(text) <= 11


def test_guidance_at_one_and_eta_zero(checkpoint):
    """The two branches of guidance are one call, and DDPM is DDIM at eta 1."""
    assert "6 network calls" in write(checkpoint, "--prompt=the sea", "--guidance_scale=1").stderr
    assert "6 network calls" in write(checkpoint, "--prompt=the sea", "--guidance_scale=1.5").stderr
    assert texts(checkpoint, "--sampler=ddpm") == texts(checkpoint, "--eta=1")
    assert texts(checkpoint, "--eta=0") == texts(checkpoint, "--eta=0") != texts(checkpoint, "--eta=1")


@pytest.mark.parametrize("place", ["in the window", "before it"])
def test_without_guidance_the_prompt_is_not_seen_at_all(small, place):
    """At scale 0 only the branch that is blind to the prompt counts: any prompt of as many tokens gives the same text."""
    known, made = torch.arange(12) < (4 if place == "in the window" else 0), {}
    for scale in (0, 3):
        for token in (3, 30):
            idx, prompt = torch.full((12,), token), torch.full((0 if known.any() else 4,), token)
            cfg = script.Config(guidance_scale=scale, steps=12, span_size=4)
            made[scale, token] = script.sample(small, cfg, (idx, known, prompt), range(4))
    assert torch.equal(made[0, 3][:, ~known], made[0, 30][:, ~known])
    assert not torch.equal(made[3, 3][:, ~known], made[3, 30][:, ~known])
    assert (made[3, 30][:, known] == 30).all()


@pytest.mark.parametrize("begun, order", [(0, torch.arange(12) // 4), (4, torch.arange(12) // 4), (0, torch.arange(12) % 3)])
@torch.no_grad()
def test_guided_turns_are_two_fresh_readings_weighed_by_hand(small, begun, order):
    """What the reader keeps from turn to turn answers as a network that reads all anew, with and without the prompt."""
    torch.manual_seed(1)
    known, prompt, table = torch.arange(12) < begun, torch.randint(50, (2, 3)), small.embedding()
    group, text = torch.where(known, -1, order), torch.randint(50, (2, 12))
    reader, tokens = script.Reader(small, table, prompt, known, 3.0), torch.where(known, text, 0)
    for turn in group[~known].unique().tolist():
        places, (x, guess), level = (group == turn).nonzero().flatten(), torch.randn(2, 2, 4, 16), torch.randn(2, 4)
        got = reader.network_for(tokens, group, places)(x, level, guess)
        answers = []
        for seen, turns in ((True, group), (False, group.masked_fill(known, script.LATER))):
            seen, turns = torch.full((2, 3), seen), turns.expand(2, -1)
            past = small.look_back(small.remember(tokens, turns, prompt, seen), turns, places)
            answers.append(small(x, level, guess, prompt, seen, past))
        want = script.diffusion.guide(*answers, 3.0)
        assert torch.allclose(got[..., :50], want[..., :50], atol=1e-3) and (answers[0] - answers[1]).abs().max() > 0.1
        tokens[:, places] = text[:, places]


def test_text_is_written_in_turns_or_at_once(checkpoint):
    def header(*args): return call(["sample.py", f"--checkpoint={checkpoint}", *args]).stderr
    assert "24 steps, 1 token at a time" in header() and "64 steps, all tokens at once" in header("--span_size=0")
    assert "6 steps, 12 tokens at a time" in header("--span_size=12", "--steps=6")
    assert "6 steps, 4 streams side by side" in header("--streams=4") and " 4 network calls" in header("--streams=24")
    assert "a larger --span_size" in write(checkpoint, "--span_size=2", code=2).stderr
    assert "more --streams" in write(checkpoint, "--span_size=1", code=2).stderr


def test_every_span_gets_steps_enough():
    """One for each single token; or 64, 8 for each of 8 spans, and more for a longer text; in a turn no more than the timesteps."""
    nothing, cfg = torch.zeros(64, dtype=torch.bool), ModelConfig(block_size=64, timesteps=100, span_size=8)

    def steps(known=nothing, cfg=cfg, **settings):
        return script.plan(script.Config(**settings), cfg, known)[2:]
    assert steps() == (64, 64) and steps(span_size=0) == steps(cfg=replace(cfg, span_size=0)) == (1, 64)
    assert steps(span_size=8) == (8, 64) and steps(torch.zeros(512, dtype=torch.bool), span_size=8) == (64, 512)
    assert steps(torch.arange(64) != 9) == (1, 1) and steps(torch.arange(64) != 9, span_size=4) == (1, 64)
    assert steps(cfg=replace(cfg, objective="eps")) == (64, 512)
    assert steps(streams=8) == (8, 8) and steps(torch.arange(64) < 9, streams=2) == (28, 28)
    assert steps(sampler="ddpm") == (64, 100) and steps(cfg=replace(cfg, timesteps=4), span_size=8) == (8, 32)
    assert steps(steps=800, span_size=8) == (8, 800)
    for wrong, words in ((7, "less than one for each of 8 turns"), (801, "more than the 100 timesteps")):
        with pytest.raises(ValueError, match=words):
            steps(steps=wrong, span_size=8)


def test_infill_returns_the_given_text_and_fills_the_rest(checkpoint):
    out = write(checkpoint, "--mode=infill", "--text", "the red[MASK:2] went [MASK] home<|endoftext|>")
    text = out.stdout.rstrip("\n")
    assert text.startswith("the red") and text.endswith(" home<|endoftext|>") and " went" in text
    n = int(out.stderr.split(" tokens written")[0].split()[-1])
    assert 3 <= n <= 14 and f"{6 * 13} network calls" in out.stderr            # twelve lengths are tried, then the other blank is filled
    out = write(checkpoint, "--mode=infill", "--num_samples=3", "--text", "the red[MASK:2] went [MASK:4] home")
    assert "18 tokens written" in out.stderr and "6 network calls" in out.stderr


def test_prompts_from_a_file_and_from_stdin(checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("the dog\n\nthe sea\n")
    out = write(checkpoint, "--json=True", f"--prompt=@{tmp_path / 'prompts.txt'}")
    rows = [json.loads(line) for line in out.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["the dog", "the sea"]
    out = write(checkpoint, "--prompt", "-", stdin="the wind\n")
    assert out.stdout.startswith("the wind") and "6 network calls" in out.stderr


def test_a_text_with_blanks_from_a_file_and_what_is_not_written_yet_is_dots(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("the dog [MASK:2] home\n")
    assert write(checkpoint, "--mode=infill", f"--text=@{tmp_path / 'text.txt'}").stdout.startswith("the dog")
    encoding = script.get_tokenizer(find_checkpoint(checkpoint)[1]["data"]["tokenizer"])
    watch, ids = script.Watch(script.Config(show=True), encoding, 1), encoding.encode_ordinary("the dog")
    watch.written = torch.arange(len(ids)) < 1
    tokens, err = torch.tensor([ids]), io.StringIO()
    with contextlib.redirect_stderr(err):
        watch(1000, tokens, torch.tensor([1]), None)
    rest = "\u00b7" * (len(ids) - 2)
    assert err.getvalue() == f"step 1/1, noise index 1000\n{encoding.decode(ids[:2])}{rest}\n"


def test_header_names_the_text_it_was_trained_on(checkpoint):
    out = write(checkpoint, "--prompt", "", "--seq_len=5", "--show=True", run=run)
    assert "text.jsonl" in out.stderr and "unconditional" in out.stderr and "step 6/6" in out.stderr


def test_blanks_are_cut_out_before_encoding():
    parts = script.read_blanks("ab [MASK] c[MASK:2][MASK:1]", lambda text: list(text.encode()))
    assert parts == [[97, 98], 0, [32, 99], 2, [], 1, []]
    idx, known = script.lay_out(parts)
    assert bytes(idx[known].tolist()) == b"ab c" and known.tolist() == [True] * 2 + [False] * 6 + [True] * 2 + [False] * 3
    assert torch.equal(script.lay_out(script.read_blanks("[MASK:3]", lambda text: []))[1], torch.zeros(3, dtype=torch.bool))


def test_windows_stand_around_a_blank_and_cut_no_other():
    for seed in range(300):
        rng = torch.Generator().manual_seed(seed)
        known = torch.rand(60, generator=rng) < 0.9
        known[torch.randint(60, (2,), generator=rng)] = False
        for at in (known.int().diff() == -1).nonzero().flatten() + 1:
            start, stop = script.window_around(known, int(at), 24)
            end = int(at) + int((known[at:].cumsum(0) == 0).sum())
            assert start <= at and stop - start <= 24 and (stop >= end or end - at > 12)
            assert start in (0, at) or known[start] or known[start - 1]
            assert stop == 60 or known[stop] or known[stop - 1] or end - at > 12
            roomy = known[:at].all() and known[end:].all() and 24 < at and end < 36
            assert not roomy or abs((at - start) - (stop - end)) <= 1
    assert script.window_around(torch.arange(20) < 3, 3, 24) == (0, 20)


def test_long_documents_come_back_with_their_blanks_filled(checkpoint):
    text = " the old dog went home and then saw a boat near the sea." * 5
    out = write(checkpoint, "--mode=infill", "--text", text + " [MASK:3]" + text + " [MASK:2] under[MASK]" + text).stdout[:-1]
    assert out.startswith(text) and out.endswith(text) and out.count(text) == 3 and " under" in out
    assert "100 tokens written" in write(checkpoint, "--mode=infill", "--text=the[MASK:100]").stderr


def test_the_prompt_of_a_window_is_known_text(small):
    """What stands before a window, up to the last blank that is still open."""
    idx, known = torch.arange(40)[None], torch.arange(40) < 99
    known[[10, 30]] = False
    start, stop, (text, seen, prompt) = script.canvas_of(idx, known, 30, small.cfg)
    assert stop - start == 12 and prompt[0].tolist() == list(range(start - 6, start)) and text[0].tolist() == list(range(start, stop))
    known[start - 2] = False
    assert script.canvas_of(idx, known, 30, small.cfg)[2][2].tolist() == [[start - 1]]


def test_the_nats_of_a_text_are_its_bound_token_by_token(small):
    import train
    torch.manual_seed(0)
    idx = torch.randint(50, (300, 12))
    small.cfg = replace(small.cfg, schedule="cosine")               # whose last level says nothing
    got, row = script.nats(small, idx, idx[:, :0]), train.measure(small, idx, 64, 1, bands=0)
    assert got.shape == (300, 12) and got.mean().item() == pytest.approx(row["reconstruction"], abs=3 * row["bound_error"])
    changed = script.nats(small, torch.where(torch.arange(12) == 7, (idx + 1) % 50, idx), idx[:, :0])
    assert torch.allclose(got[:, :7], changed[:, :7], atol=1e-4) and ((got - changed)[:, 8:].abs() > 1e-4).any(1).float().mean() > 0.9


@pytest.mark.parametrize("behind", [True, False])
def test_an_open_blank_takes_the_length_that_makes_what_stands_behind_it_likely(small, monkeypatch, behind):
    """Or, with nothing behind it, the one whose own tokens are likely; a second blank ends what counts."""
    seen = []

    def nats(model, tokens, prompt):
        n = tokens.size(1) - (6 if behind else 3)
        costs = torch.full(tokens.shape, 9.0)
        costs[:, 3 + n if behind else 3:][:, :2 if behind else n] = abs(n - 5)
        seen.append(n)
        return costs
    monkeypatch.setattr(script, "nats", nats)
    parts = [[1, 2, 3], 0, *([[4, 5], 1] if behind else [])]
    text, = script.infill(small, script.Config(mode="infill", text="x"), parts, [0])
    assert seen == [1, 2, 3, 4, 5, 6] and len(text) == 3 + 5 + (3 if behind else 0) and text[:3] == [1, 2, 3]
    assert not behind or text[8:10] == [4, 5]


@pytest.mark.parametrize("args, words", [
    (["--checkpoint=nowhere"], "train one with"),
    (["--mode=infill", "--text=no blank"], "no [MASK]"),
    (["--mode=infill", "--text=a [mask] [MASK]"], "[mask] is no blank"), (["--mode=infill", "--text=a [MASK: 3]"], "[MASK: 3] is no blank"),
    (["--mode=infill", "--text=@nowhere.txt"], "cannot read nowhere.txt"),
    (["--mode=infill", "--text=a [MASK:0]"], "a blank of 0 tokens"),
    (["--mode=infill", "--text=a [MASK:99999]"], "a blank of 99999 tokens"), (["--mode=infill", "--text=[MASK]", "--seq_len=3"], "has no meaning"),
    (["--mode=infill"], "no [MASK]"), (["--mode=infill", "--text=a [MASK]", "--span_size=1"], "steps=6 is less than one for each of 7 turns"),
    (["--mode=infill", "--text=a [MASK:9999999999]"], "write [MASK:1]"),
    (["--sampler=ddpm", "--eta=0.5"], "ddpm is eta=1"),
    (["--mode=write"], "use generate or infill"),
    (["--prompt", "dog " * 50], "more than the 20"),
    (["--seq_len=25"], "25 tokens are more than the 24"),
    (["--num_samples=0"], "num_samples=0 must be positive"),
    (["--steps=3001"], "more than the 1000"),
    (["--steps=-1"], "must not be negative"),
    (["--eta=2"], "between 0"),
    (["--streams=2"], "streams=2 are of single tokens"),
    (["--temprature=1"], "temperature"),
    (["--prompt=@nowhere.txt"], "nowhere.txt")])
def test_mistakes_get_one_line(args, words, checkpoint):
    out = write(checkpoint, *args, code=2)
    assert words in out.stderr and out.stdout == ""
    assert len([line for line in out.stderr.splitlines() if line.startswith("error: ")]) == 1
