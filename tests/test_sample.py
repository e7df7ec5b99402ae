"""Sampling as a user sees it: what is given comes back, the same seed gives the same text, and mistakes are named."""
import contextlib
import io
import json
import re
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT, call, run

import checkpoint as ckpt
import diffusion
import generate as writing
from configurator import UserError
import sample as script
from data import Texts, cut_at_eot
from generate import Canvas, Decoder, Sampling, bound, generate, generators, plan


def write(base, *args, code=0, run=call, **options):
    args = [f"--checkpoint={base}", "--device=cpu", "--dtype=float32", "--steps=3", "--revisions=0", "--seed=1",
            *args]
    return run(["sample.py", *args], code, **options)


def texts(base, *args):
    return [json.loads(line)["text"] for line in write(base, "--json", *args).stdout.splitlines()]


def makers(*numbers):
    """For each sample a function that returns its noise, as `infill` asks for it."""
    return [partial(diffusion.generator, "cpu", 1, number) for number in numbers]


# ---- the same text ----

def test_same_seed_same_text_whatever_the_batch(base):
    together = texts(base, "--num_samples=3", "--prompt", "a small dog")
    apart = texts(base, "--num_samples=3", "--prompt", "a small dog", "--batch_size=1")
    other = texts(base, "--num_samples=3", "--prompt", "a small dog", "--seed=2")
    assert together == apart and len(set(together)) == 3 and together != other


@torch.no_grad()
def probabilities(model):
    """What a network says of a guided block beside tokens that are given."""
    canvas = Canvas(torch.arange(16), torch.arange(16) < 4, torch.tensor([5, 6, 7]))
    order, level = plan(Sampling(), model.cfg, canvas.known).order, torch.zeros(2, 4)
    x_t = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", model.dtype, enabled=model.dtype != torch.float32):
        decoder = Decoder(model, canvas, Sampling(), order, generators("cpu", 1, [0, 1]), None)
        h = decoder.hidden(canvas.idx[:4].repeat(2, 1), torch.arange(8), x_t, level, None)
        return model.predict(h, x_t, level, decoder.E)[1].softmax(-1)


@pytest.mark.parametrize("dtype, int8", [("bfloat16", False), ("float32", True), ("bfloat16", True)])
def test_fewer_bits_change_the_scores_little_and_the_command_takes_them(base, dtype, int8):
    content = ckpt.find(base)[1]
    exact, rough = (probabilities(ckpt.load_model(content, "cpu", *how))
                    for how in ((torch.float32, False), (getattr(torch, dtype), int8)))
    assert 0 < (exact - rough).abs().max() < 0.03
    out = write(base, f"--dtype={dtype}", f"--quantize={'int8' if int8 else 'none'}", "--num_samples=2")
    assert f", cpu, {dtype}, seed 1\n" in out.stderr and "--- 2 ---" in out.stdout


def test_samplers_agree_where_they_are_the_same(base):
    """DDPM is DDIM at eta 1, and the constrained sampler is DDIM where nothing is held."""
    assert texts(base, "--sampler=ddpm") == texts(base, "--eta=1") != texts(base, "--eta=0")
    at_once = texts(base, "--block_length=0", "--eta=0.5")
    assert at_once == texts(base, "--block_length=0", "--eta=0.5", "--sampler=constrained_ddim")


def test_guidance_is_one_call_of_a_batch_twice_as_large(base):
    for scale in ("1", "1.5"):
        assert " 6 network calls" in write(base, "--prompt=the sea", f"--guidance_scale={scale}").stderr


# ---- who sees what ----

@pytest.mark.parametrize("place", ["in the window", "before it"])
def test_at_scale_0_the_prompt_is_not_seen_and_at_scale_1_nothing_but_it(small, place):
    """At scale 0 any prompt of as many tokens gives the same text; at scale 1 the null branch is left out."""
    known, made = torch.arange(12) < (4 if place == "in the window" else 0), {}
    for scale in (0, 1, 1 + 1e-7, 3):
        for token in (3, 30):
            canvas = Canvas(torch.full((12,), token), known, torch.full((0 if known.any() else 4,), token))
            cfg = Sampling(guidance_scale=scale, steps=4, block_length=4)
            made[scale, token] = generate(small, canvas, cfg, generators("cpu", 1, range(4)))
    assert torch.equal(made[0, 3][:, ~known], made[0, 30][:, ~known])
    assert torch.equal(made[1, 3], made[1 + 1e-7, 3])
    assert not torch.equal(made[3, 3][:, ~known], made[3, 30][:, ~known])
    assert (made[3, 30][:, known] == 30).all()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "constrained_ddim"])
@pytest.mark.parametrize("block_length, strided", [(0, False), (1, False), (3, False), (3, True)])
def test_given_tokens_come_back_and_only_blanks_are_written(small, sampler, block_length, strided):
    known, seen, idx = torch.rand(12, generator=torch.Generator().manual_seed(2)) < 0.5, [], torch.arange(12)
    cfg = Sampling(revisions=0, block_length=block_length, strided=strided, steps=2, sampler=sampler)
    made = generate(small, Canvas(idx, known, idx[:3]), cfg, generators("cpu", 1, range(3)),
                    lambda t, tokens, pos, logits: seen.append((t, *pos.tolist())))
    assert (made[:, known] == idx[known]).all() and made.max() < 50 and len(made[:, ~known].unique()) > 3
    last = [place for t, *pos in seen if t < 1000 for place in pos]
    assert sorted(last) == (~known).nonzero().flatten().tolist()
    assert len(seen) == 2 * plan(cfg, small.cfg, known).num_blocks


@pytest.mark.parametrize("strided", [False, True])
def test_a_text_that_ends_early_is_the_text_up_to_its_end(small, strided):
    """Nothing before the end may be left unwritten, in whatever order the blocks stand."""
    canvas = Canvas(torch.zeros(12, dtype=torch.int64), torch.zeros(12, dtype=torch.bool), torch.zeros(0).long())
    cfg, rng = Sampling(block_length=3, steps=2, strided=strided), [1, 2, 3, 4]
    full = generate(small, canvas, cfg, generators("cpu", 1, rng)).tolist()
    for eot in set(full[0]):
        made = generate(small, canvas, cfg, generators("cpu", 1, rng[:1]), None, eot).tolist()
        assert cut_at_eot(made[0], eot) == cut_at_eot(full[0], eot)


def test_the_header_says_how_a_text_is_written(base, tmp_path):
    def header(*args, base=base): return call(["sample.py", f"--checkpoint={base}", "--device=cpu", *args]).stderr
    assert "; blocks of 8 tokens, ddim, 2 x 4 steps, 8 revisions at most, cpu" in header()
    assert "; the whole window at once, ddim, 1 x 32 steps, 8 revisions at most" in header("--block_length=0")
    assert "; one token at a time, ddim, 16 x 1 step, cpu" in header("--block_length=1")
    assert "; blocks of 4 tokens, spread over the text, constrained_ddim, 4 x 2 steps" in header(
        "--block_length=4", "--strided", "--steps=2", "--sampler=constrained_ddim")
    content = {**ckpt.find(base)[1], "block_length": 1}
    del content["format"]
    ckpt.write(tmp_path / "ckpt_00000020.pt", content)                      # of a network trained token by token
    assert "one token at a time" in header(base=tmp_path)
    assert "blocks of 8 tokens" in header("--block_length=8", base=tmp_path)


def test_a_network_that_guesses_noise_fills_an_open_blank(small):
    small.cfg, small.head = replace(small.cfg, objective="eps", schedule="linear"), torch.nn.Linear(32, 16)
    text, = writing.infill(small, [[1, 2, 3], 0, [4, 5]], Sampling(steps=3), makers(0))
    assert text[0] == [1, 2, 3] and text[2] == [4, 5] and 1 <= len(text[1]) <= 6


# ---- the command ----

def test_infill_returns_the_given_text_and_fills_the_rest(base):
    out = write(base, "--mode=infill", "--text", "the red[MASK:2] went [MASK] home<|endoftext|>")
    assert out.stdout.startswith("the red") and out.stdout.endswith(" home<|endoftext|>\n") and " went" in out.stdout
    assert 3 <= int(out.stderr.split(" tokens written")[0].split()[-1]) <= 10 and "is tried with 1 to" in out.stderr
    out = write(base, "--mode=infill", "--num_samples=3", "--text", "the red[MASK:2] went[MASK:4] home")
    assert "18 tokens written" in out.stderr


def test_the_lengths_that_are_tried_are_counted(base):
    def calls(n):
        out = write(base, "--mode=infill", "--text=the [MASK] red", "--block_length=0", f"--num_samples={n}")
        return int(out.stderr.split(" network calls")[0].split()[-1])
    assert calls(1) == 3 + 1 + 3 and calls(2) == 2 * calls(1)       # all lengths at once, their costs, the text


@pytest.mark.parametrize("text", ["the red [MASK] sea", " the old dog went home" * 9 + "[MASK:2] sea"])
def test_steps_are_shown_of_open_blanks_and_of_windows_inside_a_document(base, text):
    err = write(base, "--mode=infill", "--text", text, "--show").stderr
    assert "step 3 of at most 3, noise #######............. 0.33\n" in err and " sea\n" in err and "\u00b7" not in err


def test_prompts_from_a_file_and_from_stdin(base, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffthe dog\n\nthe sea\n")
    out = write(base, "--json", f"--prompt=@{tmp_path / 'prompts.txt'}")
    assert [json.loads(line)["prompt"] for line in out.stdout.splitlines()] == ["the dog", "the sea"]
    assert write(base, "--prompt", "-", stdin="the wind\n").stdout.startswith("the wind")
    out = write(base, "--seq_len=5")
    assert "no prompt: the samples are unconditional" in out.stderr and "\n5 tokens written" in out.stderr
    assert "has nothing to guide" in write(base, "--guidance_scale=2").stderr


def test_prompts_in_letters_of_another_language_and_blocks_longer_than_the_window_are_remarked_on(base):
    assert "letter by letter" in write(base, "--prompt", "\u0416\u0438\u043b\u0430").stderr
    assert "window has 16 tokens" in write(base, "--block_length=17").stderr
    assert "warning" not in write(base, "--prompt", "the old dog went home").stderr


def test_a_terminal_that_knows_no_such_letters_gets_a_question_mark(base):
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert write(base, "--prompt", "the d\u00f6g", run=run, env=ascii_only).stdout.startswith("the d?g")


def test_a_text_with_blanks_from_a_file_and_what_is_not_written_yet_is_dots(base, tmp_path):
    (tmp_path / "text.txt").write_text("the dog [MASK:2] home\n")
    assert write(base, "--mode=infill", f"--text=@{tmp_path / 'text.txt'}").stdout.startswith("the dog")
    writer = script.load(base, "cpu", "float32")
    ids, err, kept = writer.tokenizer.encode_ordinary("the dog sea"), io.StringIO(), []
    watch = script.Watch(script.Config(show=True, mode="infill"), writer, writer.task(script.Config()), kept.append)
    watch.begin(torch.arange(len(ids)) < 1, 1)
    with contextlib.redirect_stderr(err):
        watch(250, torch.tensor([ids]), torch.tensor([1]), torch.zeros(1, 1, 300))
    dots = "\u00b7" * (len(ids) - 2)
    assert dots and err.getvalue() == (f"step 1 of at most 1, noise {'#' * 5}{'.' * 15} 0.25\n"
                                       f"{writer.tokenizer.decode(ids[:2])}{dots}\n")
    (noise, words, pos), = kept
    assert noise == 0.25 and pos == [1] and "".join(word for word, _ in words) == "the dog sea"
    assert [sure for _, sure in words] == [None, round(1 / 300, 3)] + [-1] * (len(ids) - 2)


@pytest.mark.slow
def test_the_program_shows_the_steps_and_names_the_text_it_was_trained_on(base):
    out = write(base, "--prompt", "", "--seq_len=5", "--show", run=run)
    assert "trained on text.jsonl" in out.stderr and "step 3 of at most 3, noise" in out.stderr


@pytest.mark.parametrize("args, words", [
    (["--checkpoint=nowhere"], "no checkpoint at nowhere; train one with"),
    (["--mode=infill", "--text=no blank"], "no [MASK]"),
    (["--mode=infill"], "no [MASK]"),
    (["--mode=infill", "--text=a [mask] [MASK]"], "[mask] is no blank"),
    (["--mode=infill", "--text=a [MASK: 3]"], "[MASK: 3] is no blank"),
    (["--mode=infill", "--text=@nowhere.txt"], "cannot read nowhere.txt"),
    (["--mode=infill", "--text=a [MASK:0]"], "a blank of 0 tokens"),
    (["--mode=infill", "--text=a [MASK:999999999]"], "a blank of 999999999 tokens"),
    (["--mode=infill", "--text=a [MASK:9999999999]"], "is no blank"),
    (["--mode=infill", "--text=[MASK]", "--seq_len=3"], "takes --text and no --"),
    (["--text=a [MASK]"], "--text is for --mode=infill"),
    (["--mode=write"], "mode=write is unknown; use one of generate, infill"),
    (["--serve", "--seq_len=8"], "leave out --seq_len"),
    (["--sampler=euler"], "use one of ddim, ddpm, constrained_ddim"),
    (["--sampler=ddpm", "--eta=0.5"], "ddpm is eta=1"),
    (["--prompt", "dog " * 50], "more than the 16"),
    (["--prompt=@nowhere.txt"], "cannot read nowhere.txt"),
    (["--seq_len=17"], "seq_len=17 is more than the 16"),
    (["--num_samples=0"], "num_samples=0 is out of range"),
    (["--block_length=-1"], "block_length=-1 is out of range"),
    (["--steps=1001"], "more than the 1000 noise levels"),
    (["--steps=-1"], "steps=-1 is out of range"),
    (["--eta=2"], "eta=2.0 is out of range; choose 0 to 1"),
    (["--temperature=0"], "temperature=0.0 is out of range"),
    (["--lora=out/lora"], "--lora=out/lora is not a setting"),
    (["--temprature=1"], "did you mean temperature")])
def test_mistakes_get_one_line(args, words, base):
    out = write(base, *args, code=2)
    assert words in out.stderr and out.stdout == ""
    assert len([line for line in out.stderr.splitlines() if line.startswith("error: ")]) == 1


# ---- blanks ----

def test_blanks_are_cut_out_before_encoding():
    pieces, spaced = script.read_blanks("ab [MASK] c[MASK:2][MASK:1]", lambda text: list(text.encode()))
    assert pieces == [[97, 98], 0, [32, 99], 2, [], 1, []] and spaced == [True, False, False]
    idx, known = writing.to_canvas(pieces)
    assert bytes(idx[known].tolist()) == b"ab c"
    assert known.tolist() == [True] * 2 + [False] * 6 + [True] * 2 + [False] * 3
    assert writing.to_canvas(script.read_blanks("[MASK:3]", lambda text: [])[0])[1].tolist() == [False] * 3


def test_windows_stand_around_a_blank_and_cut_no_other():
    for seed in range(100):
        rng = torch.Generator().manual_seed(seed)
        known = torch.rand(60, generator=rng) < 0.9
        known[torch.randint(60, (2,), generator=rng)] = False
        for at in (known.int().diff() == -1).nonzero().flatten().tolist():
            at += 1
            start, stop = writing.window_around(known, at, 24)
            end = at + int((known[at:].cumsum(0) == 0).sum())
            assert start <= at and stop - start <= 24 and (stop >= end or end - at > 12)
            assert start in (0, at) or known[start] or known[start - 1]
            assert stop == 60 or known[stop] or known[stop - 1] or end - at > 12
            roomy = known[:at].all() and known[end:].all() and 24 < at and end < 36
            assert not roomy or abs((at - start) - (stop - end)) <= 1
    assert writing.window_around(torch.arange(20) < 3, 3, 24) == (0, 20)


def test_long_documents_come_back_with_their_blanks_filled(base):
    text = " the old dog went home and then saw a boat near the sea." * 3
    out = write(base, "--mode=infill", "--text", text + " [MASK:3]" + text + " [MASK:2] under[MASK]" + text).stdout[:-1]
    assert out.startswith(text) and out.endswith(text) and out.count(text) == 3 and " under" in out
    assert "100 tokens written" in write(base, "--mode=infill", "--text=the[MASK:100]").stderr


def test_the_prompt_of_a_window_is_known_text(small):
    """What stands before a window, up to the last blank that is still open."""
    idx, known = torch.arange(40)[None], torch.arange(40) < 99
    known[[10, 30]] = False
    start, canvas = writing.infill_canvas(idx, known, 30, small.cfg)
    assert canvas.idx[0].tolist() == list(range(start, start + 12))
    assert canvas.prompt[0].tolist() == list(range(start - 6, start))
    known[start - 2] = False
    assert writing.infill_canvas(idx, known, 30, small.cfg)[1].prompt.tolist() == [[start - 1]]


def test_nll_left_to_right_is_the_bound_one_by_one(small):
    torch.manual_seed(0)
    idx = torch.randint(50, (300, 12))
    small.cfg = replace(small.cfg, schedule="cosine")               # whose last level says nothing
    got = writing.nll_left_to_right(small, idx, idx[:, :0])
    row = bound(small, Texts(idx, idx[:, :0], idx[:, :0] > 0, idx >= 0), 100, 1)
    assert got.mean().item() == pytest.approx(row["reconstruction"], abs=3 * row["bound_error"])
    changed = writing.nll_left_to_right(small, torch.where(torch.arange(12) == 7, (idx + 1) % 50, idx), idx[:, :0])
    assert torch.allclose(got[:, :7], changed[:, :7], atol=1e-4)
    assert ((got - changed)[:, 8:].abs() > 1e-4).any(1).float().mean() > 0.9


@pytest.mark.parametrize("behind", [True, False])
def test_an_open_blank_takes_the_length_that_makes_the_text_behind_it_likely(small, monkeypatch, behind):
    """Or, with nothing behind it, the one whose own tokens are likely; a second blank ends what counts."""
    seen = []

    def nll(model, tokens, prompt):
        costs = torch.full(tokens.shape, 9.0)
        for n, row in enumerate(costs, 1):
            row[3 + n if behind else 3:][:2 if behind else n] = abs(n - 5)
            if behind:
                row[3 + n + 2:] = -9 * n
        seen.append(len(tokens))
        return costs
    monkeypatch.setattr(writing, "nll_left_to_right", nll)
    monkeypatch.setattr(writing, "LONGEST", 6)                      # which leaves three tokens to count behind it
    pieces = [[1, 2, 3], 0, *([[4, 5], 1] if behind else [])]
    text, = writing.infill(small, pieces, Sampling(steps=2), makers(0))
    assert seen == [6] and text[0] == [1, 2, 3] and len(text[1]) == 5
    assert not behind or text[2] == [4, 5] and len(text[3]) == 1


@pytest.mark.parametrize("block_length, revisions", [(0, 2), (16, 2), (3, 0), (2, 2), (1, 0)])
@pytest.mark.parametrize("pieces", [[[1, 2, 3], 0, [4, 5]], [[1], 0, [2, 3, 4], 2, [5]], [[], 0, [6, 7, 8, 9]],
                                    [[1, 2], 0, []], [[*range(1, 30)], 0, [3, 4], 0, [*range(5, 25)]]])
def test_the_lengths_of_a_blank_are_tried_in_one_batch_as_each_alone(small, pieces, block_length, revisions):
    """Which other lengths stand in the batch changes nothing, and what is known stays."""
    settings, lengths = Sampling(block_length=block_length, steps=3, revisions=revisions), range(1, 7)
    at, canvas = writing.trial_canvas(pieces, 1, lengths, small.cfg)
    together = writing.generate(small, canvas, settings, [make() for make in makers(*lengths)])
    for row, n in enumerate(lengths):
        pair = canvas._replace(idx=canvas.idx[[row, -1]], known=canvas.known[[row, -1]])    # the longest has the noise
        alone = writing.generate(small, pair, settings, [make() for make in makers(n, 6)])[0]
        assert torch.equal(together[row][canvas.known[row]], canvas.idx[row][canvas.known[row]])
        assert torch.equal(together[row][at:at + n], alone[at:at + n])
    costs = writing.length_costs(small, pieces, 1, lengths, settings, makers(0)[0])
    assert len(costs) == 6 and all(map(math.isfinite, costs))


def test_what_is_absent_from_a_text_is_seen_by_no_one(small):
    idx = torch.tensor([1, 2, 0, 0, 3, 4, 5, -1, -1])
    known = idx > 0
    canvas, settings = writing.Canvas(idx, known, idx[:0]), Sampling(steps=3, revisions=2)
    short = writing.Canvas(idx[:7], known[:7], idx[:0])
    for number in range(5):
        one, other = (writing.generate(small, x, settings, [makers(number)[0]()])[0, :7] for x in (canvas, short))
        assert torch.equal(one, other)


def test_without_a_seed_each_text_is_another_and_its_seed_is_said(base):
    def made(*args):
        out = call(["sample.py", f"--checkpoint={base}", "--device=cpu", "--dtype=float32", "--revisions=0", *args])
        return out.stdout, out.stderr.split(", seed ")[1].split("\n")[0]
    (one, seed), (other, _) = made(), made()
    assert one != other and made(f"--seed={seed}") == (one, seed)


def test_the_noise_depends_on_the_prompt_too(base):
    """With the same noise, these texts of a network that hardly knows its prompt would be nearly the same."""
    one, other = (texts(base, f"--prompt={prompt}", "--seq_len=12")[0] for prompt in ("the dog", "the sea"))
    assert sum(a == b for a, b in zip(one.split(), other.split(), strict=False)) <= 3


class Words:
    """A tokenizer of a few tokens."""
    eot_token, words = 5, [b"aim", b"or", b" b", b" c", b".", b"<|endoftext|>"]

    def decode_bytes(self, ids):
        return b"".join(self.words[i] for i in ids)


@pytest.mark.parametrize("pieces, spaced, text", [
    ([[0], [1], [2]], [True], "aim or b"), ([[0], [1], [2]], [False], "aimor b"), ([[0], [4], [2]], [True], "aim. b"),
    ([[0], [3], [2]], [True], "aim c b"),
    ([[], [1, 5], [0]], [False], "or\n\naim"), ([[], [0, 5, 5, 1]], [False], "aim\n\nor")])
def test_seams_have_their_spaces_and_documents_a_blank_line_between(pieces, spaced, text):
    assert script.spell(Words(), pieces, spaced) == text
    assert script.join("The list is", "olved") == "The list is olved" and script.join("Well", ", no") == "Well, no"
    assert script.join("\u4f60\u597d", "\u4e16") == "\u4f60\u597d\u4e16" and script.join("in 19", "84") == "in 1984"
    assert script.join("Das ist", "\u00fcber") == "Das ist \u00fcber"


def test_a_blank_in_a_prompt_is_explained(base, tmp_path):
    err = write(base, "--prompt=The sky is [MASK] today", code=2).stderr
    assert "--mode=infill --text=" in err
    assert "not UTF-8" in write(base, "--prompt=caf\udce9", code=2).stderr
    (tmp_path / "prompts.txt").write_text("the dog\nthe [MASK] sea\n")
    assert "--mode=infill --text=" in write(base, f"--prompt=@{tmp_path / 'prompts.txt'}", code=2).stderr


def test_guidance_of_an_infill_is_warned_about(base):
    args = ["--mode=infill", "--text=the [MASK:2] dog", "--guidance_scale=5"]
    assert "guidance_scale=5.0 is not used with --mode=infill" in write(base, *args).stderr


def test_bytes_on_stdin_that_are_no_text_are_refused(base):
    command = [sys.executable, "sample.py", f"--checkpoint={base}"]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*command, "--prompt=-"], cwd=ROOT, capture_output=True, input=b"abc \xff", env=env)
    assert done.returncode == 2 and b"is not UTF-8" in done.stderr and b"Traceback" not in done.stderr


def test_mistakes_in_python_are_those_of_the_command_line(base):
    writer = script.load(base, "cpu", "float32")
    for settings, words in ((dict(temprature=1.0), "did you mean temperature?"), (dict(seed="x"), "seed is 'x'"),
                            (dict(show=1), "show is 1"), (dict(num_samples=2), "this writes one text"),
                            (dict(steps=2000), "noise levels"), (dict(quantize="int8"), "quantize is not a setting"),
                            (dict(temperature=0), "out of range")):
        with pytest.raises(UserError, match=re.escape(words)):
            writer.generate("the dog", **settings)
    for text in ("no blank", "a [mask]", "a [MASK:0]"):
        with pytest.raises(UserError, match="MASK"):
            writer.infill(text)
    one, same, other = (writer.generate("the dog", seed=seed, steps=2) for seed in (3, 3, 4))
    assert one == same != other and isinstance(one, str)
