"""The networks of this repository: they are small, say where they come from, write, and can be taught to answer."""
import json
import re

import pytest
import torch
from conftest import ROOT, call

import checkpoint as ckpt
from data import Texts
from generate import bound
from sample import PRETRAINED, load

TALK = """A: Have you seen any good movies lately?
B: I saw the new Star Wars movie last week. It was great!
A: I liked it too. Who is your favorite character?
B: I really like Han Solo. He is funny.
"""
STORY = """Once upon a time, there was a little girl named Lily. She loved to play in the park with her friends. One
day, she saw a big dog. The dog was very sad. Lily gave him her ball, and they played until it was time to go home."""


@pytest.mark.parametrize("name", ["simple", "fables"])
def test_it_is_small_and_its_card_says_where_it_comes_from(name):
    folder = ROOT / "pretrained" / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < 15e6
    _, content = ckpt.find_network(folder)
    card = (folder / "README.md").read_text()
    assert f"{content['tokens']:,} tokens" in card and f"{content['step']:,} steps" in card
    assert "training text" in card and "bound" in card and re.search(r"(?i)licence|license", card)
    assert content["data"]["licence"] != "yours" and "of your own" not in content["data"]["label"]


@pytest.mark.parametrize("text", [TALK, STORY], ids=["talk", "story"])
def test_it_knows_english_that_it_has_not_read_from_the_same_words_in_disorder(text):
    model = load(device="cpu", dtype="float32")
    words = text.replace("\n", " \n ").split(" ")
    shuffled = " ".join(words[i] for i in torch.randperm(len(words), generator=torch.Generator().manual_seed(1)))
    sense, disorder = (cost(model, each) for each in (text, shuffled))
    assert sense < 3.6 and disorder > sense + 1.5, (sense, disorder)


def cost(model, text):
    """The bound of a text, token by token, in nats a token."""
    idx = torch.tensor([[model.eot, *model.tokenizer.encode_ordinary(text)]])
    everything = torch.ones_like(idx, dtype=torch.bool)
    return bound(model.model, Texts(idx, idx[:, :0], everything[:, :0], everything), 1, 1)["bound"]


def test_it_is_what_writes_where_nothing_is_named_and_says_so():
    out = call(["sample.py", "--prompt", "A: What is your favorite movie?", "--seq_len=40", "--seed=1", "--device=cpu"])
    assert out.stdout.startswith("A: What is your favorite movie?\nB: ")
    assert f"pretrained/simple: step {ckpt.find_network(PRETRAINED)[1]['step']:,}" in out.stderr


def test_the_records_of_questions_are_chat_and_no_question_stands_twice():
    rows = [json.loads(line)["messages"] for line in (ROOT / "pretrained" / "chat.jsonl").read_text().splitlines()]
    assert all([turn["role"] for turn in row] == ["user", "assistant"] for row in rows)
    questions = [row[0]["content"] for row in rows]
    assert len(questions) > 600 and len(set(questions)) == len(questions)


@pytest.mark.slow
def test_it_is_taught_to_answer_by_the_commands_of_the_readme(tmp_path, monkeypatch):
    """With fewer steps: an answer ends by itself, where the network before goes on to the end of its window."""
    monkeypatch.chdir(ROOT)
    call(["prepare_fineweb.py", "--source=pretrained/chat.jsonl", "--tokenizer=pretrained/simple",
          f"--out={tmp_path / 'chat'}"])
    call(["train.py", "config/chat.py", f"--dataset={tmp_path / 'chat'}", f"--out_dir={tmp_path / 'run'}",
          "--max_steps=12", "--batch_size=16", "--batch_tokens=1024", "--warmup_steps=2", "--device=cpu",
          "--dtype=float32", "--learning_rate=1e-2", "--ema_decay=0.5", "--eval_interval=0"])
    assert min(map(len, ask("pretrained/simple"))) > 150
    answers = ask(tmp_path / "run")
    assert sum(len(answer) < 80 for answer in answers) >= 3, answers


def ask(network):
    """Four answers of a network to a question."""
    out = call(["sample.py", f"--checkpoint={network}", "--prompt=What does a cow say?", "--json", "--num_samples=4",
                "--device=cpu", "--dtype=float32", "--seed=1"])
    return [json.loads(line)["text"] for line in out.stdout.splitlines()]
