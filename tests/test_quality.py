"""The measures of quality have known answers, and a whole run with a made-up judge prints and writes every table."""
import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SIZE, call

from data import get_tokenizer, read_meta
from diffusion import generator
from generate import Sampling

sys.path.insert(0, str(ROOT / "bench"))

import quality          # noqa: E402


class Judge:
    """A judge with known answers: each token has its unigram nats, but `cheap` if it is the window's first again."""

    def __init__(self, log_p, cheap=None):
        self.log_p, self.cheap, self.blank = log_p, cheap, torch.zeros(1)

    def nll(self, idx):
        nats = -self.log_p[idx]
        return nats if self.cheap is None else torch.where(idx == idx[:, :1], self.cheap, nats)

    def features(self, idx):
        return torch.nn.functional.one_hot(idx, len(self.log_p)).float().mean(1)

    def nll_in_blocks(self, idx, block_length, strided, rng):
        return self.nll(idx) + block_length + 0.5 * strided

    def sample(self, n, length, steps, temperature, rng, block_length, revisions):
        return torch.multinomial(self.log_p.exp(), n * length, replacement=True, generator=rng).view(n, length)

    def predict(self, idx, hidden):
        """Knows the answer in every other window."""
        right = torch.nn.functional.one_hot(idx, len(self.log_p)).float()
        right[::2] *= -1
        return right


def uniform(n):
    return torch.full((n,), -math.log(n))


def test_entropy_is_of_one_text_and_not_of_all():
    texts = torch.stack((torch.full((8,), 3), torch.arange(8), torch.tensor([1, 2] * 4)))
    assert torch.allclose(quality.entropy(texts), torch.tensor([0.0, math.log(8), math.log(2)], dtype=torch.float64))


def test_distinct_counts_over_all_texts_and_repetition_within_each():
    texts = torch.tensor([[1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6]])
    assert quality.distinct(texts, 1) == 6 / 12
    assert quality.distinct(texts, 2) == 6 / 10                 # 12 21 | 23 34 45 56; 12 is in both
    assert quality.distinct(texts, 4) == 5 / 6                  # 1212 2121 | 1234 2345 3456
    assert quality.repetition(texts) == pytest.approx(1 / 6)    # the second 1212
    assert quality.repetition(texts[1:].expand(5, -1)) == 0     # the same text five times repeats nothing within itself
    assert quality.distinct(texts[1:].expand(5, -1), 4) == 3 / 15


def test_the_unigram_floor_costs_its_entropy_under_the_unigram_judge():
    tokens = torch.randint(20, (5000,), generator=generator("cpu", "text")) ** 2 // 20
    p = torch.bincount(tokens, minlength=20) / len(tokens)
    row = quality.score(quality.draw_unigram(tokens, 400, 50, seed=1), Judge(p.log().clamp(min=-99)))
    assert abs(row["nats"] + (p * p.clamp(min=1e-9).log()).sum()) < 4 * row["nats_error"] < 0.1
    assert row["perplexity"] == pytest.approx(math.exp(row["nats"]))


def test_the_bigram_floor_has_the_pairs_of_its_text_in_proportion():
    """After 0 comes 1, after this 2 or, half as often, 3, and after these 0."""
    texts = quality.draw_bigram(torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 3] * 5), 300, 40, seed=1)
    pairs = texts.unfold(1, 2, 1).reshape(-1, 2)
    after = pairs[pairs[:, 0] == 1, 1]
    assert set(map(tuple, pairs.tolist())) == {(0, 1), (1, 2), (1, 3), (2, 0), (3, 0)}
    assert abs((after == 3).double().mean() - 1 / 3) < 4 * (2 / 9 / len(after)) ** 0.5


def test_floors_are_of_the_training_text_or_else_of_the_held_out_one(small):
    real = torch.full((3, 12), 5)
    for training, token in ((torch.full((4,), 7), 7), (real[0, :0], 5)):
        bench = quality.Bench(small, Sampling(), None, real, training, None, {})
        _, unigram, bigram = (make() for labels, make in list(quality.systems(quality.Config(), bench, real))[:3])
        assert (unigram == token).all() and (bigram == token).all() and unigram.shape == bigram.shape == (3, 12)


def test_words_are_looked_up_in_lower_case_and_an_end_of_text_is_none(shards):
    tokenizer = get_tokenizer(read_meta(shards)["tokenizer"])
    texts = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary("The dog")]])
    assert quality.words(texts[0], tokenizer) == ["the", "dog"]
    assert quality.share_of_words(texts, tokenizer, {"the", "cat"}) == 0.5
    assert quality.share_of_words(texts, tokenizer, set()) is None


def test_adherence_is_what_the_judge_gains_from_the_right_prompt():
    """Continuations that repeat their prompt cost 1 nat after it and log 50 after another; constant ones the same."""
    judge, prompts = Judge(uniform(50), cheap=1.0), torch.arange(6)[:, None].expand(6, 3)
    row = quality.adherence(judge, prompts, torch.arange(6)[:, None].expand(6, 9))
    assert row["own"] == pytest.approx(1) and row["other"] == pytest.approx(math.log(50), rel=1e-6)
    assert row["adherence"] == pytest.approx(math.log(50) - 1, rel=1e-6) and row["adherence_error"] < 1e-6
    assert quality.adherence(judge, prompts, torch.full((6, 9), 40))["adherence"] == 0


def test_conditioning_on_windows_of_one_token_each(small, capsys):
    """Window i is twelve times token i and the judge pays for nothing else: what it makes of the truth is known."""
    windows, judge = torch.arange(10)[:, None].expand(10, 12), Judge(uniform(50), cheap=1.0)
    settings = Sampling(block_length=4, steps=4)
    bench = quality.Bench(small, settings, None, windows, windows[:0, 0], judge, {"causal": judge})
    cfg = quality.Config(pairs=10, guidance="2", blank=3)
    true, model, other = quality.blanks(cfg, bench)
    assert true["nats"] == pytest.approx(1) and true["worse"] == 0
    assert other["worse"] == pytest.approx((math.log(50) - 1) * 3 / 12, rel=1e-5) and other["worse_error"] < 1e-6
    assert 0 < model["worse"] <= other["worse"] + 1e-6
    row, *made = quality.prompting(cfg, bench)
    assert row["adherence"] == pytest.approx(math.log(50) - 1, rel=1e-5) and row["entropy"] == 0
    assert len(made) == 4 and made[0]["entropy"] > math.log(3)      # of nine tokens, as long as the true continuation
    commonest, likeliest, drawn, twin = quality.single_tokens(cfg, bench)
    assert max(likeliest["recovered"], drawn["recovered"]) < 1      # they do not see the answer
    assert twin["recovered"] == 0.5 and twin["recovered_error"] == pytest.approx((0.25 / 9) ** 0.5)
    assert commonest["recovered"] == (0.1 if small.log_unigram.argmax() < 10 else 0)
    assert "PROMPTS: 10 held-out prompts of 3 tokens, continued by 9" in capsys.readouterr().out


@pytest.mark.parametrize("text, word", [
    ('He said to the little dog, "I really do not, I don\'t."', " don't"),
    ("one two three of " * 3 + "Ada's!\n", " Ada's"),
    ("one two three of " * 3 + "3.50", " 3.50"), ("one two three of " * 3 + "(the end).", " end"),
    ("one two\u2028three of " * 3 + "home...", " home")])
def test_the_last_word_is_a_whole_word_without_what_is_behind_it(trained, shards, tmp_path, text, word):
    tokenizer = get_tokenizer(read_meta(shards)["tokenizer"])
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n\n")
    (idx, n), = quality.read_last_words(str(tmp_path / "text.jsonl"), tokenizer, 999)
    assert tokenizer.decode(idx[0, -n:].tolist()) == word and idx[0, 0] == tokenizer.eot_token
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "too short to say."}))
    with pytest.raises(quality.UserError, match="more than ten words"):
        quality.read_last_words(str(tmp_path / "text.jsonl"), tokenizer, 999)


def test_last_words_are_those_that_the_tokens_end_with_and_a_trained_network_guesses_them(tmp_path):
    import random

    import checkpoint as ckpt
    import fables
    path, content = ckpt.find_network(str(ROOT / "pretrained/fables"))
    tokenizer, model = get_tokenizer(content["data"]["tokenizer"]), ckpt.load_model(content)
    told = [fables.draw(random.Random(seed))[0] for seed in range(12)]
    file = tmp_path / "told.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in [*told, "too short to say."]))
    passages = quality.read_last_words(str(file), tokenizer, 96)
    assert len(passages) == 12
    for (idx, n), text in zip(passages, told, strict=True):
        assert tokenizer.decode(idx[0, -n:].tolist()).strip() == text.rstrip('".!?').split()[-1].strip('"')
        assert text.startswith(tokenizer.decode(idx[0].tolist()).removeprefix("<|endoftext|>")) and idx.size(1) <= 96
    cfg = quality.Config(text=str(file), pairs=12)
    bench = quality.Bench(model, Sampling(**ckpt.usual(content)), tokenizer, torch.zeros(1, 96), None, None,
                          {"causal": Judge(uniform(model.wte.shape[0]))})
    commonest, single, at_once, twin = (row["right"] for row in quality.last_words(cfg, bench))
    assert min(single, at_once) > 0.4 > commonest
    assert twin == 0                                            # the row that this judge gets wrong


def test_what_is_known_stays_and_each_row_follows_its_own_prompt(small):
    idx, settings = torch.randint(50, (5, 12), generator=generator("cpu", "idx")), Sampling(block_length=4, steps=3)
    known = torch.arange(12) % 3 > 0
    filled = quality.fill(small, settings, idx, known, seed=1, batch_size=2)
    assert torch.equal(filled[:, known], idx[:, known]) and (filled != idx).any()
    prompts = idx[:, :4]
    for inside in (0, 1, 4):
        def follow(prompts, scale, batch_size, inside=inside):
            guided = Sampling(block_length=4, steps=3, guidance_scale=scale)
            return quality.continue_prompts(small, guided, prompts, inside, seed=1, batch_size=batch_size)
        made, swapped = follow(prompts, 3.0, 2), follow(torch.cat((prompts[:4], (prompts[4:] + 1) % 50)), 3.0, 5)
        assert made.shape == (5, 8) and torch.equal(made[:4], swapped[:4]) and not torch.equal(made[4], swapped[4])
        assert torch.equal(follow(prompts, 0.0, 5), follow(prompts.flip(0), 0.0, 5))
    drawn = quality.draw(small, settings, 5, seed=1, batch_size=2)
    assert torch.equal(drawn, quality.draw(small, settings, 5, seed=1)) and drawn.shape == (5, 12)
    assert not torch.equal(drawn, quality.draw(small, settings, 5, seed=2))


def test_without_context_the_network_explains_by_noise_what_the_best_guess_does(small):
    """The scores of a network whose head is zero are the context-free posterior."""
    idx = torch.randint(50, (20, 12), generator=generator("cpu", "idx"))
    awake = quality.ce_by_noise(small, idx, 4, batch_size=8, levels=3)
    torch.nn.init.zeros_(small.head.weight)
    torch.nn.init.zeros_(small.head.bias)
    rows = quality.ce_by_noise(small, idx, 4, batch_size=8, levels=3)
    assert [row["t"] for row in rows] == [1, 500, 1000]
    assert all(row["network"] == pytest.approx(row["without_context"], rel=1e-5) for row in rows)
    assert rows[0]["network"] < 0.1 and rows[2]["network"] > 2 and awake[2]["network"] != rows[2]["network"]
    assert [row["without_context"] for row in rows] == [row["without_context"] for row in awake]


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    call(["train.py", *SIZE, "--max_steps=1", f"--dataset={shards}", f"--out_dir={folder}"])
    return folder


def compare_means(p_features, q_features, num_buckets, verbose):
    assert p_features.shape == q_features.shape == (6, p_features.shape[1]) and num_buckets == 2 and not verbose
    return SimpleNamespace(mauve=1 - abs(p_features.mean(0) - q_features.mean(0)).sum() / 2)


@pytest.fixture
def twin(shards, monkeypatch, tmp_path):
    """The place of a twin, its checkpoint as load_twin would return it, and a package mauve that compares means."""
    spec = read_meta(shards)
    content = {"kind": "autoregressive", "data": {"tokenizer": spec["tokenizer"]}, "config": {"block_size": 16}}

    def load_twin(place, device):
        judge = Judge(uniform(spec["vocab_size"]))
        judge.kind = "masked" if "masked" in str(place) else content["kind"]
        return judge, {**content, "kind": judge.kind}
    monkeypatch.setattr(quality, "load_twin", load_twin)
    monkeypatch.setattr(quality, "evaluate", lambda *_: (1.25, 0.5))
    monkeypatch.setitem(sys.modules, "mauve", SimpleNamespace(compute_mauve=compare_means))
    return tmp_path / "judge", content


SMALL = ["--sequences=64", "--samples=6", "--steps=2,4", "--temperatures=0.8,1", "--pairs=8", "--guidance=1,3",
         "--block_length=1,8,0", "--strided=4", "--batch_size=4", "--device=cpu"]


@pytest.mark.slow
def test_a_run_prints_and_writes_every_table(trained, shards, twin, tmp_path):
    place, _ = twin
    out = call(["quality.py", f"--checkpoint={trained}", f"--dataset={shards}", f"--judge={place}", "--eta=0,1", *SMALL,
                "--revisions=0", f"--masked={place.with_name('masked')}", f"--causal={place.with_name('causal')}",
                f"--out={tmp_path / 'made'}"])
    result = json.loads((tmp_path / "made/quality.json").read_text())
    bound, rows = result["likelihood"], result["samples"]
    assert bound["bound"] == pytest.approx(bound["reconstruction"] + bound["diffusion"] + bound["prior"])
    assert bound["bits_per_byte"] == pytest.approx(bound["bound"] / math.log(2) / bound["bytes_per_token"])
    assert bound["masked_twin"] == [1.25, 0.5] and "causal twin 1.250 +- 0.500 nats a token, exact" in out.stdout
    assert bound["sequences"] == 64 and len(bound["ce_by_noise"]) == 16 and "unigram" in out.stdout
    table = bound["by_block_length"]
    assert [(row["block_length"], row["blocks"]) for row in table] == [
        (1, "neighbours"), (8, "neighbours"), (0, "neighbours"), (4, "strided")]
    assert bound["block_length"] == 8 and bound["bound"] == table[1]["bound"] != table[1]["independent"]
    vocabulary = math.log(read_meta(shards)["vocab_size"])
    assert [row["masked_twin"] for row in table] == pytest.approx([vocabulary + n for n in (1, 8, 0, 4.5)])
    assert "independent" not in table[0] and table[0]["diffusion"] == 0

    assert all(math.log(row["perplexity"]) == pytest.approx(vocabulary, rel=1e-4) for row in rows)   # a uniform judge
    assert [row["text"] for row in rows] == ["held-out text", "unigram floor", "bigram floor", *["SunFish"] * 28,
                                             *["masked twin"] * 6, *["causal twin"] * 2]
    assert [(row["block_length"], row["blocks"], row["steps"], row["calls"]) for row in rows[3:31:4]] == [
        (1, "neighbours", 1, 16), (8, "neighbours", 2, 4), (8, "neighbours", 4, 8), (0, "neighbours", 2, 2),
        (0, "neighbours", 4, 4), (4, "strided", 2, 8), (4, "strided", 4, 16)]
    of_twins = [row["MAUVE"] for row in rows if "twin" in row["text"]]
    assert rows[0]["words"] > 0.8 and 0.99 > rows[0]["MAUVE"] > max(of_twins)
    assert [row["continuation"] for row in result["prompting"]] == ["held-out text", "SunFish, no prompt", *(
        f"{place}, guidance {scale}" for place in ("in the window", "half before it", "before it") for scale in (1, 3))]
    assert len(result["blanks"]) == 3 and result["settings"]["steps"] == "2,4"
    assert [row["recovered"] for row in result["single_tokens"] if "twin" in row["guessed_by"]] == [0.5, 0.5]
    assert all(f"{title} " in out.stdout for title in ("perplexity", "adherence", "worse", "recovered", "own"))
    assert out.stderr.count(" s\n") == len(rows) + 15
    assert "SunFish, block_length 8, neighbours, steps 2, revisions 0, eta 1, calls 4, temperature 0.8: " in out.stderr
    found = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "made/frontier.png").exists() == found and ("no picture" in out.stderr) != found


def test_bits_a_byte_count_the_bytes_of_the_text_without_its_end_mark(trained, shards, tmp_path):
    tokenizer = get_tokenizer(read_meta(shards)["tokenizer"])
    text = "the small dog went h\u00f6me and then. " * 20
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text}))
    call(["quality.py", f"--checkpoint={trained}", f"--text={tmp_path / 'text.jsonl'}", f"--out={tmp_path}",
          "--samples=0", "--pairs=0", "--sequences=4"])
    row = json.loads((tmp_path / "quality.json").read_text())["likelihood"]
    ids = ([tokenizer.eot_token, *tokenizer.encode_ordinary(text)] * 2)[:row["windows"] * 16]
    assert ids.count(tokenizer.eot_token) == 2
    size = sum(len(tokenizer.decode_bytes([i])) for i in ids if i != tokenizer.eot_token)
    assert row["bytes_per_token"] == size / len(ids)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table_and_no_judge_gives_less(trained, tmp_path):
    (tmp_path / "text.txt").write_text("the small dog went home and then the boat went home. " * 40)
    args = ["quality.py", f"--checkpoint={trained}", f"--text={tmp_path / 'text.txt'}", *SMALL, "--block_length=8",
            "--strided=", "--steps=2", "--sequences=16"]
    first, other = call(args).stdout, call([*args, "--seed=2"]).stdout
    assert first == call(args).stdout != other
    assert "no --judge" in first and "adherence" not in first and "SINGLE TOKENS" in first
    row = next(line for line in first.splitlines() if line.startswith("held-out text")).split()
    assert row[2:10] == ["-"] * 8 and row[-2:] == ["-"] * 2 and float(row[10]) > 1
    assert first.count("SunFish  ") == 4                    # with and without revisions, at two temperatures


@pytest.mark.slow
def test_without_the_package_there_is_no_mauve(trained, shards, twin, monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    out = call(["quality.py", f"--checkpoint={trained}", f"--dataset={shards}", f"--judge={twin[0]}", *SMALL,
                "--block_length=8", "--strided=", "--pairs=0"])
    assert "pip install mauve-text" in out.stdout and "SINGLE TOKENS" not in out.stdout


@pytest.mark.parametrize("args, words", [
    (["--checkpoint=nowhere"], "no checkpoint at nowhere"),
    (["--judge=nowhere"], "nowhere holds no twin"),
    (["--text=nowhere.txt"], "cannot read text=nowhere.txt"),
    (["--dataset="], "--text=FILE"),
    (["--steps=8,x"], "steps=8,x is not a list of whole numbers"),
    (["--steps=8.5"], "steps=8.5 is not a list of whole numbers"),
    (["--strided=1"], "strided=1 is not a list of whole numbers from 2"),
    (["--temperatures=0"], "temperatures=0 is not a list of numbers"),
    (["--eta=nan"], "eta=nan is not a list of numbers from 0 to 1"),
    (["--guidance="], "guidance= is not a list"),
    (["--steps=1001"], "more than the 1000 noise levels"),
    ([f"--out={__file__}"], "cannot be a folder"),
    (["--samples=1"], "samples=1 is out of range"),
    (["--samples=9999999"], "held-out windows"),
    (["--blank=15"], "blank=15")])
def test_mistakes_get_one_line(args, words, trained, shards):
    out = call(["quality.py", f"--checkpoint={trained}", f"--dataset={shards}", *SMALL, *args], code=2)
    assert words in out.stderr and out.stdout == "" and out.stderr.startswith("error: ") and out.stderr.count("\n") == 1


@pytest.mark.parametrize("change, words", [({"data": {"tokenizer": {"name": "gpt2"}}}, "another tokenizer"),
                                           ({"config": {"block_size": 8}}, "windows of 8 tokens"),
                                           ({"kind": "masked"}, "kind=masked; name the autoregressive one")])
def test_a_twin_of_other_tokens_or_shorter_windows_is_refused(change, words, trained, shards, twin):
    twin[1].update(change)
    out = call(["quality.py", f"--checkpoint={trained}", f"--dataset={shards}", f"--judge={twin[0]}", *SMALL], code=2)
    assert words in out.stderr and out.stderr.count("\n") == 1


@torch.no_grad()
@pytest.mark.parametrize("length, strided", [(0, False), (4, False), (4, True)])
def test_the_bound_of_the_sampler_as_it_runs_is_the_bound_of_so_many_steps(small, length, strided):
    """Untrained, the network says of each token exactly what its noise says, and reads no guess: then carrying it
    changes nothing, and the bound is the entropy of independent tokens as the steps become many."""
    torch.nn.init.zeros_(small.head.weight)
    torch.nn.init.zeros_(small.head.bias)
    small.in_proj.weight[:, 16:].zero_()
    log_p = small.log_unigram[:50]
    idx = torch.multinomial(log_p.exp(), 200 * 12, replacement=True, generator=torch.Generator().manual_seed(3))
    idx, found = idx.view(200, 12), {}
    for steps in (1, 4, 16, 100):
        found[steps] = quality.mean("nats", quality.as_run(small, idx, 50, length, strided, steps))
        want = quality.bound(small, quality.plain(idx), 50, length, strided, steps)
        assert abs(found[steps]["nats"] - want["bound"]) < 4 * (found[steps]["nats_error"] + want["bound_error"])
    entropy = -log_p[idx].mean()
    assert found[4]["nats"] > found[16]["nats"] > entropy - 0.05 and abs(found[100]["nats"] - entropy) < 0.1


@torch.no_grad()
def test_the_guess_that_the_bound_carries_is_the_last_steps(small, monkeypatch):
    """As the sampler hands it on: none in the first step, then what was said last."""
    given, said, denoise, predict = [], [], small.denoise, small.predict
    monkeypatch.setattr(small, "denoise", lambda *inputs: given.append(inputs[6]) or denoise(*inputs))

    def heard(*inputs):
        said.append(predict(*inputs))
        return said[-1]
    monkeypatch.setattr(small, "predict", heard)
    quality.as_run(small, torch.randint(50, (2, 12)), 2, 4, False, 3)
    assert given[0] is None and [x is y for x, (y, _) in zip(given[1:], said, strict=False)] == [True, True]
