"""Answers to instructions and adapters: what counts, what is seen, what changes, what is kept, and what is refused."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import PAIRS, SIZE, call, losses, wake

import checkpoint as ckpt
import configurator
import data
import generate
import sample
import train
from machine import Machine
from model import LoRA, SunFish, add_lora, merge_lora

MIXTURE = ["--p_window=0", "--p_strided=0", "--p_given=0"]           # as in config/finetune_instruct.py
WIDER = ["--block_size=32", "--prompt_size=16", "--batch_tokens=512", *MIXTURE]


def config(*args):
    return configurator.load(train.Config, [*SIZE, *WIDER, *args])


@pytest.fixture(scope="module")
def examples(pairs):
    return data.Dataset(pairs, "train", config(), 300)


@pytest.fixture
def command(base, pairs):
    return ["train.py", *SIZE, *WIDER, f"--dataset={pairs}", f"--init_from={base}"]


@pytest.fixture(scope="module")
def answering(base, pairs, tmp_path_factory):
    """A network trained on the three instructions until it knows their responses."""
    folder = tmp_path_factory.mktemp("answering")
    call(["train.py", *SIZE, *WIDER, f"--dataset={pairs}", f"--init_from={base}", f"--out_dir={folder}",
          "--max_steps=150", "--batch_size=16", "--learning_rate=1e-2", "--warmup_steps=10", "--log_interval=50"])
    return folder


def ask(place, question, *args, code=0):
    args = [f"--checkpoint={place}", "--device=cpu", "--dtype=float32", "--prompt", question, *args]
    return call(["sample.py", "--seed=1", *args], code)


# ---- instructions ----

def test_an_instruction_is_trained_on_as_a_prompt_is_written_after(examples, pairs):
    tokenizer = data.get_tokenizer(data.read_meta(pairs)["tokenizer"])
    texts, given = examples.read(np.arange(9))
    for idx, prompt, seen, counts, n in zip(*texts, given, strict=True):
        question = tokenizer.decode([*prompt[seen].tolist(), *idx[:n].tolist()][1:]).removesuffix("\n\nAnswer:")
        response = idx[counts].tolist()
        assert tokenizer.decode(response[:-1]) == " " + PAIRS[question] and response[-1] == tokenizer.eot_token
        canvas = generate.prompt_canvas(sample.encode_prompt(question, tokenizer, True, False), 0, config())
        assert torch.equal(canvas.idx[canvas.known], idx[:n]) and torch.equal(canvas.prompt, prompt[seen])


@torch.no_grad()
@pytest.mark.parametrize("withheld", [False, True])
def test_only_the_response_counts_and_padding_is_never_read(examples, withheld):
    """Other padding changes nothing; another instruction changes the loss, unless it is withheld."""
    cfg = config("--self_conditioning=0", f"--conditioning_dropout={int(withheld)}")
    torch.manual_seed(0)
    loss_of = train.DiffusionLoss(wake(SunFish(cfg, 300)))
    batch, pos = data.make_batch(cfg, examples, 0, range(8), "cpu"), torch.arange(32)
    begins, back = (mask.int().argmax(1, keepdim=True) for mask in (batch.loss_mask, batch.loss_mask.flip(1)))
    ends = 32 - back
    assert torch.equal(batch.loss_mask, (pos >= begins) & (pos < ends)) and (begins > 0).all() and (ends < 32).all()

    def loss(where, prompt=batch.prompt):
        return loss_of(batch._replace(idx=torch.where(where, 77, batch.idx), prompt=prompt))[0].item()
    want = loss(pos < 0)
    assert loss(pos >= ends) == pytest.approx(want, rel=1e-6) != pytest.approx(loss(batch.loss_mask), rel=1e-3)
    assert (loss(pos < begins, (batch.prompt + 1) % 300) == pytest.approx(want, rel=1e-6)) == withheld


def test_the_gradient_is_of_the_mean_over_the_tokens_that_count(examples):
    """However the step is cut, although its parts have unequal numbers of them."""
    found, unigram = [], examples.log_unigram()
    for size in (16, 4):
        cfg = config(f"--batch_size={size}", "--p_single=1", "--self_conditioning=0", "--grad_clip=0")
        torch.manual_seed(0)
        net = SunFish(cfg, 300, unigram)
        descent, machine = torch.optim.SGD(net.parameters(), lr=1.0), Machine(torch.device("cpu"), torch.float32, False)
        batches = data.step_batches(cfg, examples, 0, cfg.micro_batches(), "cpu")
        loss, _ = train.train_step(train.DiffusionLoss(net), descent, batches, cfg, 0, machine)
        found.append((loss, -net.head.bias.detach()))                           # which was zero
    (loss, grad), (other_loss, other_grad) = found
    assert loss == pytest.approx(other_loss, rel=1e-6) and torch.allclose(grad, other_grad, atol=1e-6)
    batch = data.make_batch(cfg, examples, 0, range(16), "cpu")
    counted = batch.idx[batch.loss_mask]
    assert loss == pytest.approx(-unigram[counted].mean().item(), rel=0.01)     # the noise hides all but a trace
    want = unigram.exp() - torch.bincount(counted, minlength=300) / len(counted)
    assert (grad[:300] - want).abs().max() < 0.01 < want.abs().max()            # that of a unigram model


@pytest.mark.slow
def test_the_bound_of_a_response_knows_its_instruction(answering, examples):
    """An untrained network has the unigram cross-entropy; a trained one is lost with another instruction."""
    texts, unigram = examples.spread(400), examples.log_unigram()
    row = generate.bound(SunFish(config(), 300, unigram), texts, 70, 1)
    assert row["bound"] == pytest.approx(-unigram[texts.idx[texts.loss_mask]].mean().item(), rel=0.01)
    model = ckpt.load_model(ckpt.find(answering)[1])
    texts, given = examples.read(np.arange(24))
    rows = [torch.cat((texts.idx[i - 1][:given[i - 1]], texts.idx[i][texts.loss_mask[i]])) for i in range(24)]
    begins, ends = given.roll(1)[:, None], torch.tensor([[len(row)] for row in rows])
    idx = torch.stack([torch.nn.functional.pad(row, (0, 32 - len(row))) for row in rows])
    counts = (torch.arange(32) >= begins) & (torch.arange(32) < ends)
    swapped = data.Texts(idx, texts.prompt.roll(1, 0), texts.prompt_mask.roll(1, 0), counts)
    for length in (1, 8):
        right, wrong = (generate.bound(model, some, 5, length)["bound"] for some in (texts, swapped))
        assert right < 0.1 < 1 < wrong, (length, right, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("length", [8, 4, 1])
def test_the_answer_is_the_response_and_ends_where_it_ends(answering, length):
    for question, response in PAIRS.items():
        args = ["--temperature=0.1", "--revisions=0", "--json", f"--block_length={length}"]
        out = ask(answering, question, *args)
        assert json.loads(out.stdout)["text"] == response
        written, calls = (int(re.search(rf"(\d+) {what}", out.stderr)[1]) for what in ("tokens? w", "network c"))
        blocks = calls if length == 1 else calls / generate.BLOCK_STEPS
        assert 0 <= blocks * length - (written + 1) < 2 * length, (written, calls)      # one token more is for the end
    assert ask(answering, "", "--mode=infill", "--text=the [MASK:1]").stdout.startswith("the")


def test_what_was_trained_on_another_way_is_refused(command, shards, tmp_path):
    other = shutil.copytree(shards, tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps({**meta, "tokenizer": {"name": "gpt2"}}))
    for args, words in (([f"--dataset={other}"], "was prepared with another tokenizer"),
                        (["--n_embd=64"], "n_embd=64 is 32 in init_from"),
                        ([f"--init_from={tmp_path}"], "no checkpoint at init_from"),
                        (["--init_from=", "--lora_rank=2"], "name it with --init_from"),
                        (["--lora_rank=200"], "lora_rank=200 is more than n_embd=32"),
                        (["--block_size=12"], "batch_tokens")):
        err = call([*command, f"--out_dir={tmp_path / 'run'}", *args], code=2).stderr
        assert words in err and err.count("error:") == 1 and not (tmp_path / "run").exists(), err


@pytest.mark.parametrize("args, want", [([], (16, 8)), (["--block_size=32", "--prompt_size=64"], (32, 64))])
def test_what_is_set_wins_over_the_network_although_it_is_the_default(base, args, want):
    """64 is the default of prompt_size; and a batch that would not fit the default of block_size fits the network's."""
    args = ["--batch_tokens=96", f"--init_from={base}", "--batch_size=1", *args]
    cfg, found = train.load_base(configurator.load(train.Config, args))
    assert (cfg.block_size, cfg.prompt_size) == want and cfg.n_layer == 2 and found["step"] == 20


def test_a_network_goes_on_with_the_weights_it_is_given(command, base, tmp_path):
    call([*command, f"--out_dir={tmp_path / 'run'}", "--max_steps=1", "--learning_rate=1e-12"])
    before, after = ckpt.find(base)[1]["ema"], ckpt.find(tmp_path / "run")[1]
    moved = {name for name, x in before.items() if not torch.allclose(after["ema"][name], x, atol=1e-6)}
    assert moved <= {"schedule"}                                            # whose learning rate is its own
    assert after["config"]["block_size"] == 32 and after["data"]["kind"] == "instructions"


def test_examples_without_a_network_to_begin_with_are_warned_about(command, tmp_path):
    err = call([*command, "--init_from=", f"--out_dir={tmp_path / 'run'}", "--max_steps=1"]).stderr
    assert "a new network learns from these examples alone" in err


# ---- adapters ----

def adapted(model, rank=4, alpha=8.0):
    """The network itself with adapters that change something."""
    add_lora(model, rank, alpha)
    return wake(model)


@torch.no_grad()
def test_merged_equals_unmerged(small):
    def hidden():
        torch.manual_seed(0)
        idx, E, order = torch.randint(50, (2, 12)), small.embedding(), (torch.arange(12) // 4).expand(2, -1)
        prompt = small.encode_prompt(idx[:, :4], idx[:, :4] >= 0, E)
        return small.denoise(E[idx], torch.randn(2, 12, 16), torch.randn(2, 12), order, prompt, E)
    plain, names = hidden(), list(small.state_dict())
    adapted(small)
    changed = hidden()
    merge_lora(small)
    assert (plain - changed).abs().max() > 0.1 and torch.allclose(hidden(), changed, atol=1e-4)
    assert list(small.state_dict()) == names and not any(isinstance(layer, LoRA) for layer in small.modules())


@pytest.mark.slow
def test_a_layer_equals_that_of_peft(small):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    mine = adapted(small).layers[0].up
    plain = torch.nn.Sequential(torch.nn.Linear(32, 128, bias=False))
    layer = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])).base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(mine.weight)
        layer.lora_A["default"].weight.copy_(mine.lora_A)
        layer.lora_B["default"].weight.copy_(mine.lora_B)
    x = torch.randn(5, 32)
    assert torch.allclose(mine(x), layer(x), atol=1e-5) and not torch.allclose(mine(x), x @ mine.weight.T, atol=1e-2)
    for net in (mine, layer):
        net(x).square().sum().backward()
    assert torch.allclose(mine.lora_A.grad, layer.lora_A["default"].weight.grad, atol=1e-3, rtol=1e-4)
    assert mine.weight.grad is None


def test_adapters_are_all_that_is_trained_and_kept(command, base, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    args = [*command, "--lora_rank=2", "--learning_rate=1e-2", "--save_interval=4", "--p_single=1", "--max_steps=8"]
    call([*args, f"--out_dir={whole}"])
    shutil.copytree(whole, parts)
    (parts / "ckpt_00000008.pt").unlink()
    call([*args, f"--out_dir={parts}", "--resume"])
    assert losses(whole) == losses(parts) and losses(parts)[8] < losses(parts)[1]
    found, kept = ckpt.find(base)[1], ckpt.find(parts)[1]
    assert all(".lora_" in name for name in (*kept["ema"], *kept["model"])) and len(kept["ema"]) == 2 * 13
    assert kept["base"] == ckpt.fingerprint(found["ema"]) and kept["optimizer"]["state"]
    weights = ckpt.find_network(parts)[1]["ema"]
    changed = [name for name, x in weights.items() if not torch.equal(x, found["ema"][name])]
    assert len(changed) == 13 and all(name.startswith("layers.") for name in changed)
    assert "ckpt_00000008.pt: step 8, trained on pairs" in ask(parts, "the dog").stderr


@pytest.mark.slow
def test_adapters_that_are_the_newest_run_write_on_their_base(command, tmp_path, monkeypatch):
    call([*command, "--lora_rank=2", "--max_steps=1", f"--out_dir={tmp_path / 'out' / 'lora'}"])
    monkeypatch.chdir(tmp_path)
    assert "ckpt_00000001.pt: step 1, trained on pairs" in ask("out", "the dog").stderr


@pytest.mark.slow
def test_adapters_of_another_network_are_refused(command, base, tmp_path):
    place, other, adapter = shutil.copytree(base, tmp_path / "base"), tmp_path / "other", tmp_path / "run"
    call([*command, f"--out_dir={other}", "--max_steps=1"])                 # another network of the same shape
    args = [*command, "--lora_rank=2", "--save_interval=1", f"--out_dir={adapter}"]
    call([*args, f"--init_from={place}", "--max_steps=1"])
    trained_on = ckpt.find(adapter)[1]["base"]
    assert "is an adapter" in call([*command, f"--init_from={adapter}", f"--out_dir={tmp_path / 'new'}"], 2).stderr
    err = call([*args, "--resume", "--max_steps=2", f"--init_from={other}"], 2).stderr
    assert f"was trained on the network {trained_on}" in err and err.count("\n") == 1
    place.rename(tmp_path / "moved")
    err = ask(adapter, "the dog", code=2).stderr
    assert f"holds adapters for init_from={place}, where there is no" in err and err.count("\n") == 1
    shutil.copytree(other, place)                                           # another network in the place of the base
    err = ask(adapter, "the dog", code=2).stderr
    assert f"the adapter was trained on the network {trained_on}, and init_from={place}" in err and err.count("\n") == 1


def test_a_dry_run_says_how_small_a_checkpoint_of_adapters_is(command, base, tmp_path):
    content = ckpt.find(base)[1]
    content["config"]["n_embd"] = 512
    content |= {"ema": SunFish(ckpt.model_config(content), 300).state_dict()}
    del content["format"], content["model"], content["optimizer"]
    ckpt.write(tmp_path / "wide.pt", content)

    def said(*args):
        args = [*command, f"--init_from={tmp_path / 'wide.pt'}", "--n_embd=512", f"--out_dir={tmp_path / 'run'}", *args]
        out = call([*args, "--dry_run"]).stdout
        trained = re.search(r"([\d,]+) trained", out)[1].replace(",", "")
        return int(trained), float(re.search(r"checkpoint: (.+) GB", out)[1])
    whole, adapters = said(), said("--lora_rank=2")
    n = sum(x.numel() for name, x in content["ema"].items() if name != "log_unigram")
    assert whole == (n, round(n * 16e-9, 2)) and adapters[0] < 0.02 * n and adapters[1] == 0
    assert not (tmp_path / "run").exists()


def test_adapters_of_micro_are_small():
    """All that a checkpoint keeps of them, weights, average and two moments, beside that of the whole network."""
    cfg = configurator.load(train.Config, ["config/micro.py"])
    with torch.device("meta"):
        net = SunFish(cfg, 50257)
        whole = sum(p.numel() for p in net.parameters())
        add_lora(net, 8, 16.0)
    adapters = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert adapters == 8 * 8 * (2 * (1024 + 1536 + 1024) + 2 * 2560)
    assert adapters / whole < 0.02 and adapters / 41.6e6 < 0.02
