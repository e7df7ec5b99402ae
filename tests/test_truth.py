"""Networks of fables: their windows and texts begin with a story, and bench/truth.py holds them against the grammar."""
import json
import random
import sys

import fables
import pytest
import torch
from conftest import ROOT, SIZE, call

import prepare_fineweb as pf
from data import Dataset, get_tokenizer, read_meta

sys.path.insert(0, str(ROOT / "bench"))

import quality          # noqa: E402
import truth            # noqa: E402

TALE = "Mia was a shy owl who lived near the lake. Snow lay on the fields."


@pytest.fixture(scope="module")
def tales(tmp_path_factory):
    """A folder of shards of fables, and a run of three steps on them."""
    folder, number = tmp_path_factory.mktemp("tales"), pf.FABLES
    pf.FABLES = 2000
    pf.prepare(pf.Config("fables", out=str(folder / "shards")))
    pf.FABLES = number
    call(["train.py", *SIZE, "--block_size=96", "--batch_tokens=384", "--align=0.8", "--max_steps=3",
          f"--dataset={folder / 'shards'}", f"--out_dir={folder / 'run'}"])
    return folder


def tokenizer_of(tales):
    return get_tokenizer(read_meta(tales / "shards")["tokenizer"])


def test_samples_are_texts_without_their_marks(tales):
    for more in ([], [f"--prompt={TALE}"], ["--block_length=0", "--steps=4"], ["--seq_len=20"],
                 ["--mode=infill", "--text=Mia was a shy [MASK:2] who lived near the lake."],
                 ["--mode=infill", "--text=[MASK:3] was a shy owl who lived near [MASK:2]"]):
        out = call(["sample.py", f"--checkpoint={tales / 'run'}", "--num_samples=4", "--steps=2", "--seed=1", *more])
        assert out.stdout.count("---") == 8 and "<|endoftext|>" not in out.stdout, more
    assert out.stdout.count(" was a shy owl who lived near") == 4


def test_a_prompt_is_the_beginning_of_a_document(tales):
    page = tales / "page.html"
    call(["sample.py", f"--checkpoint={tales / 'run'}", f"--prompt={TALE}", "--steps=2", "--seed=1", f"--html={page}"])
    recording, = json.JSONDecoder().raw_decode(page.read_text().split("const recordings = ")[1])[0]
    assert recording["steps"][0][1][:4] == [["", None], ["Mia", None], [" was", None], [" a", None]]


def test_what_windows_cost_is_what_their_stories_were_drawn_with(tales):
    tokenizer, rng, rows, exact = tokenizer_of(tales), random.Random(3), [], []
    for _ in range(8):
        (first, log_p), (second, _) = fables.draw(rng), fables.draw(rng)
        row = [tokenizer.eot_token, *tokenizer.encode_ordinary(first), tokenizer.eot_token,
               *tokenizer.encode_ordinary(second)][:96]
        begun = tokenizer.decode(row).split("<|endoftext|>")[2]
        exact.append(-log_p - fables.log_prob(begun, whole=False))
        rows.append(row)
    assert truth.truth(torch.tensor(rows), tokenizer).tolist() == pytest.approx(exact, rel=1e-12)
    fresh = truth.fresh_windows(50, 96, tokenizer)
    assert fresh.shape == (50, 96) and (fresh[:, 0] == tokenizer.eot_token).all()
    assert truth.truth(fresh, tokenizer).isfinite().all()


def test_the_judge_of_windows_knows_the_grammar_the_training_text_and_nonsense(tales):
    bench, _, content = quality.open_bench(quality.Config(str(tales / "run"), dataset=str(tales / "shards"), samples=2,
                                                          pairs=2))
    idx = Dataset(tales / "shards", "train", bench.model.cfg, content["data"]["vocab_size"], 1.0).spread(40).idx
    row = quality.judge_stories(idx, bench)
    assert (row["sentences"], row["stories"], row["learnt"], row["different"]) == (1, 1, 1, 1)
    row = quality.judge_stories(truth.fresh_windows(40, 96, bench.tokenizer), bench)
    assert (row["sentences"], row["stories"], row["learnt"]) == (1, 1, 0) and row["broken_first"] == ""
    assert 7 < row["plots"] <= 10
    swapped = torch.where(torch.arange(96) < 30, idx, idx.roll(1, 0))
    row = quality.judge_stories(swapped, bench)
    assert 0.3 < row["sentences"] < 1 and row["stories"] < 0.2 and row["learnt"] < 0.2 and row["broken_first"]
    assert "" not in bench.stories and 1800 < len(bench.stories) <= 2000
    cut = idx.clone()
    cut[:, 40:] = cut[:, 39:40]                             # no story ends
    assert quality.judge_stories(cut, bench)["stories"] == 0


def test_the_tables_are_printed_and_a_bound_below_the_truth_is_a_fault(tales, monkeypatch):
    args = ["truth.py", f"--checkpoint={tales / 'run'}", f"--dataset={tales / 'shards'}", "--device=cpu",
            "--sequences=8", "--samples=4", "--block_length=1,16,0", "--steps=2"]
    out = call([*args, f"--out={tales / 'tables'}"]).stdout
    found = json.loads((tales / "tables" / "truth.json").read_text())
    assert [row["text_written"] for row in found["likelihood"]] == [
        "by the grammar", "token by token", "in blocks of 16", "in blocks of 16, the sampler's 2 steps",
        "as a whole window", "as a whole window, the sampler's 2 steps"]
    assert 0.3 < found["likelihood"][0]["nats"] < 0.6 and all(row["above"] > 1 for row in found["likelihood"][1:])
    assert [row["stories"] for row in found["samples"]] == [1, *[0] * 10]
    assert found["samples"][3]["written_from_noise"] == "blocks of 16, 2 steps, 8 revisions"
    assert len(found["completions"]) == 5 and "another's rest" in out and "above" in out
    monkeypatch.setattr(truth, "bound", lambda *_: dict(bound=0.2, bound_error=0.01))
    assert "below the truth" in call(args, code=1).stderr


def test_only_fables_have_a_truth(base, shards):
    out = call(["truth.py", f"--checkpoint={base}", f"--dataset={shards}", "--device=cpu"], code=2)
    assert "only of fables" in out.stderr
