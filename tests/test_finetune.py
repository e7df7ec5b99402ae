"""Answers to instructions and adapters: what counts, what is seen, what changes, what is kept, and what is refused."""
import contextlib
import dataclasses
import json
import re
import shutil

import pytest
import torch
from conftest import PAIRS, SIZE, call, losses

import configurator
import prepare_fineweb
import train
from model import LoRA, SunFish, add_lora, find_checkpoint, fingerprint, load_model, merge_lora, merged

WIDER = ["--block_size=32", "--prompt_size=16", "--batch_tokens=512", "--p_given=0", "--p_whole=0", "--p_spans=0", "--streams=1"]


def config(*args):
    return configurator.load(train.Config, [*SIZE, *WIDER, *args])


@pytest.fixture(scope="module")
def examples(pairs):
    return train.Examples(pairs, "train", config(), 300)


@pytest.fixture
def command(base, pairs):
    return ["train.py", *SIZE, *WIDER, f"--dataset={pairs}", f"--init_from={base}"]


@pytest.fixture(scope="module")
def answering(base, pairs, tmp_path_factory):
    """A network trained on the three instructions until it knows their responses."""
    folder = tmp_path_factory.mktemp("answering")
    call(["train.py", *SIZE, *WIDER, f"--dataset={pairs}", f"--init_from={base}", f"--out_dir={folder}", "--max_steps=150", "--batch_size=16",
          "--learning_rate=1e-2", "--warmup_steps=10"])
    return folder


def test_examples_begin_with_their_instruction_as_a_prompt_does_and_end_with_end_of_text(examples, pairs):
    encoding = prepare_fineweb.get_tokenizer(prepare_fineweb.read_meta(pairs)["tokenizer"])
    from sample import Config, make_canvas
    for i in range(9):
        (instruction, response), item = examples.texts(i), examples[i]
        question = encoding.decode(instruction[1:].tolist()).removesuffix("\n\nAnswer:")
        assert encoding.decode(response[:-1].tolist()) == " " + PAIRS[question] and response[-1] == encoding.eot_token
        idx, known, prompt = make_canvas(Config(), examples.cfg, question, encoding, answers=True)
        assert idx[known].tolist() == item.idx[:item.begun].tolist() and prompt.tolist() == item.before.tolist()
        assert item.idx[item.begun:item.end].tolist() == response.tolist() and not item.idx[item.end:].any()


def test_long_instructions_stand_before_the_window_and_long_responses_are_cut():
    cfg = config()
    for n, m in ((10, 5), (16, 16), (16, 40), (20, 5), (32, 40)):
        instruction, response = torch.arange(n), 100 + torch.arange(m)
        item = train.place_example(cfg, instruction, response)
        text = torch.cat((item.before, item.idx[:item.end]))
        assert item.begun == min(n, 16) and len(item.idx) == 32 and item.end == min(32, item.begun + m)
        assert text.tolist() == torch.cat((instruction, response[:item.end - item.begun])).tolist()


@torch.no_grad()
@pytest.mark.parametrize("args, withheld", [([], False), (["--conditioning_dropout=1"], True)])
def test_only_the_response_counts_and_padding_is_never_read(examples, small, args, withheld):
    """Other padding changes nothing; another instruction changes the loss, unless it is withheld."""
    cfg = config("--conditioning_dropout=0", "--self_conditioning=0", *args)
    small.cfg = dataclasses.replace(small.cfg, block_size=32, prompt_size=16)
    table = torch.nn.Embedding(320, 16).weight
    small.table, small.vocab_size, small.log_unigram = torch.nn.Parameter(table), 300, torch.zeros(320)
    small.head = torch.nn.Linear(32, 320)
    batch, places = train.make_batch(cfg, examples, 0, range(4), "cpu"), torch.arange(32)
    items = [examples.read(train.permute(i, len(examples), train.mix(cfg.seed, 0))) for i in range(4)]
    assert batch.counts.tolist() == [((places >= item.begun) & (places < item.end)).tolist() for item in items]
    ends = torch.tensor([item.end for item in items])[:, None]

    def loss(idx):
        return train.DenoisingLoss(small, cfg)(batch._replace(idx=idx))[0].item()
    want, padding, before = loss(batch.idx), places >= ends, (places < ends) & ~batch.counts
    assert loss(torch.where(padding, 77, batch.idx)) == pytest.approx(want, rel=1e-6)
    assert (loss(torch.where(before, 77, batch.idx)) == pytest.approx(want, rel=1e-6)) == withheld
    assert loss(torch.where(batch.counts, 77, batch.idx)) != pytest.approx(want, rel=1e-3)


def test_the_gradient_is_of_the_mean_over_the_tokens_that_count(examples):
    """However the step is cut, although its parts have unequal numbers of them."""
    found = []
    for size in (16, 4):
        cfg = config(f"--batch_size={size}", "--conditioning_dropout=0")
        torch.manual_seed(0)
        net = SunFish(cfg, 300, examples.unigram())
        batches = train.batches_ahead(cfg, examples, 0, "cpu")
        loss, _ = train.train_step(train.DenoisingLoss(net, cfg), cfg, batches, "cpu", contextlib.nullcontext)
        found.append((loss, net.head.bias.grad))
    batch = train.make_batch(cfg, examples, 0, range(16), "cpu")
    p, counted = examples.unigram().exp(), batch.idx[batch.counts]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6) and torch.allclose(found[0][1], found[1][1], atol=1e-6)
    assert found[0][0] == pytest.approx(-p.log()[counted].mean().item(), rel=0.01)          # the noise hides all but a trace
    want = p - torch.bincount(counted, minlength=300) / len(counted)                        # of a unigram model
    assert (found[0][1][:300] - want).abs().max() < 0.01 < want.abs().max()


def test_the_bound_of_a_response_knows_its_instruction(answering, examples, pairs):
    """Of an untrained network it is the unigram cross-entropy of the responses; of a trained one it is lost with another instruction."""
    val = train.Examples(pairs, "val", examples.cfg, 300)
    idx, rest = train.eval_examples(val, 400)
    torch.manual_seed(0)
    untrained = SunFish(val.cfg, 300, examples.unigram())
    row = train.measure(untrained, idx, 70, 1, bands=0, **rest)
    assert row["reconstruction"] == pytest.approx(-examples.unigram()[idx[rest["counts"]]].mean().item(), rel=0.01)
    model = load_model(find_checkpoint(answering)[1])
    texts = [val.texts(i % len(val)) for i in range(24)]
    wrong = [(texts[i - 1][0], response) for i, (_, response) in enumerate(texts)]
    rows = []
    for some in (texts, wrong):
        idx, rest = train.stack_examples(val.cfg, [train.place_example(val.cfg, *pair) for pair in some])
        rows.append(train.measure(model, idx, 5, **rest))
    assert rows[0]["reconstruction"] < 0.1 < 1 < rows[1]["reconstruction"]


def test_the_answer_is_the_response_and_ends_where_it_ends(answering):
    for question, response in PAIRS.items():
        out = call(["sample.py", f"--checkpoint={answering}", "--prompt", question, "--temperature=0.1", "--guidance_scale=1", "--json=True"])
        assert json.loads(out.stdout)["text"] == response
        written = int(out.stderr.split(" tokens written")[0].split()[-1])
        assert written == int(out.stderr.split(" network calls")[0].split()[-1]) - 1 < 20       # one call is for the end
    assert "1 token at a time" in out.stderr
    for wrong in ("--streams=2", "--span_size=8"):
        assert "token by token, until the answer ends" in call(["sample.py", f"--checkpoint={answering}", "--prompt=the dog", wrong], 2).stderr
    assert call(["sample.py", f"--checkpoint={answering}", "--mode=infill", "--text=the [MASK:1]"]).stdout.startswith("the")


def test_what_was_trained_on_another_way_is_refused(command, shards, base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    meta = json.loads((other / "meta.json").read_text())
    meta["tokenizer"] = {"name": "gpt2"}
    (other / "meta.json").write_text(json.dumps(meta))
    for args, words in (([f"--dataset={other}"], "has the tokenizer gpt2"), (["--n_embd=64"], "n_embd=64 is 32 in init_from"),
                        ([f"--init_from={tmp_path}"], "no checkpoint at init_from"), (["--init_from=", "--lora_rank=2"], "name it with --init_from"),
                        (["--lora_rank=200"], "lora_rank=200 is more than n_embd=32"), (["--block_size=12"], "batch_tokens"),
                        (["--span_size=0"], "reads nothing that is given")):
        err = call([*command, f"--out_dir={tmp_path / 'run'}", *args], code=2).stderr
        assert words in err and err.count("error:") == 1 and not (tmp_path / "run").exists(), err


@pytest.mark.parametrize("args, want", [([], (32, 16, 8)), (["--block_size=64", "--prompt_size=64", "--span_size=4", "--batch_tokens=192"], (64, 64, 4))])
def test_what_is_set_wins_over_the_network_although_it_is_the_default(answering, pairs, args, want):
    """64 is the default of prompt_size; and a batch that would not fit the default of block_size fits what comes from the network."""
    cfg = configurator.load(train.Config, ["--batch_tokens=96", f"--init_from={answering}", "--batch_size=1", *args])
    cfg, found = train.begin_with(cfg)
    assert (cfg.block_size, cfg.prompt_size, cfg.span_size) == want and cfg.n_layer == 2 and found["data"]["kind"] == "instructions"


def test_no_first_guess_is_made_for_an_instruction_or_padding(examples):
    cfg = config("--self_conditioning=1")
    batch = train.make_batch(cfg, examples, 0, range(8), "cpu")
    assert batch.guesses == 0 and (batch.t[batch.counts] == 1000).all() and (batch.t[~batch.counts] < 1000).any()


def test_an_instruction_is_clean_whatever_else_is_given(examples):
    cfg = config("--p_given=1", "--conditioning_dropout=0")
    for i in range(16):
        _, group, *_, counts = train.make_sample(cfg, examples, 0, i, "cpu")
        begun = int((counts.cumsum(0) == 0).sum())
        assert (group[:begun] == -1).all() and group[begun:].min() >= 0


def test_a_network_goes_on_with_the_weights_it_is_given(command, base, tmp_path):
    call([*command, f"--out_dir={tmp_path / 'run'}", "--max_steps=1", "--learning_rate=1e-12"])
    before, after = find_checkpoint(base)[1]["ema"], find_checkpoint(tmp_path / "run")[1]
    assert all(torch.allclose(after["ema"][name], before[name], atol=1e-6) for name in before)
    assert after["config"]["block_size"] == 32 and after["data"]["kind"] == "instructions"


# ---- adapters ----

def woken(model, rank=4, alpha=8.0):
    add_lora(model, rank, alpha)
    for layer in model.modules():
        if isinstance(layer, LoRA):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


@torch.no_grad()
def test_merged_equals_unmerged(small):
    inputs = torch.randn(2, 12, 16), torch.zeros(2, 12), torch.zeros(2, 12, 16)
    plain, names = small(*inputs), list(small.state_dict())
    adapted = woken(small)(*inputs)
    merge_lora(small)
    assert (plain - adapted)[..., :50].abs().max() > 0.1 and torch.allclose(small(*inputs), adapted, atol=1e-4)
    assert list(small.state_dict()) == names and not any(isinstance(m, LoRA) for m in small.modules())


def test_a_layer_equals_that_of_peft(small):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    woken(small)
    mine = small.blocks[0].up
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 128, bias=False)), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(mine.weight)
        layer.lora_A["default"].weight.copy_(mine.lora_A)
        layer.lora_B["default"].weight.copy_(mine.lora_B)
    x = torch.randn(5, 32)
    assert torch.allclose(mine(x), layer(x), atol=1e-5)
    for net in (mine, layer):
        net(x).square().sum().backward()
    assert torch.allclose(mine.lora_A.grad, layer.lora_A["default"].weight.grad, atol=1e-3, rtol=1e-4)
    assert mine.weight.grad is None


def test_adapters_are_all_that_is_trained_and_kept(command, base, tmp_path):
    args = [*command, "--lora_rank=2", "--learning_rate=1e-2", "--save_interval=4"]
    call([*args, f"--out_dir={tmp_path / 'whole'}", "--max_steps=8"])
    call([*args, f"--out_dir={tmp_path / 'parts'}", "--max_steps=8"])
    (tmp_path / "parts" / "ckpt_00000008.pt").unlink()
    call([*args, f"--out_dir={tmp_path / 'parts'}", "--max_steps=8", "--resume=True"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    found, kept = find_checkpoint(base)[1], find_checkpoint(tmp_path / "parts")[1]
    assert all(".lora_" in name for name in (*kept["ema"], *kept["model"])) and len(kept["ema"]) == 2 * 13
    assert kept["base"] == fingerprint(found["ema"]) and kept["optimizer"]["state"]
    network = merged(found, kept)
    changed = [name for name, x in network["ema"].items() if not torch.equal(x, found["ema"][name])]
    assert len(changed) == 13 and all(name.startswith("blocks.") for name in changed)
    row = [json.loads(line) for line in open(tmp_path / "whole" / "log.jsonl")]
    assert row[0]["loss"] > row[-2]["loss"]
    out = call(["sample.py", f"--checkpoint={tmp_path / 'parts'}", "--prompt=the dog", "--seq_len=4"])         # the base is where it was
    assert "ckpt_00000008.pt: step 8" in out.stderr


def test_adapters_that_are_the_newest_run_write_on_their_base(command, tmp_path, monkeypatch):
    call([*command, "--lora_rank=2", "--max_steps=1", f"--out_dir={tmp_path / 'out' / 'lora'}"])
    monkeypatch.chdir(tmp_path)
    assert "ckpt_00000001.pt: step 1, trained on pairs" in call(["sample.py", "--prompt=the dog"]).stderr


def test_adapters_of_another_network_are_refused(command, base, answering, tmp_path):
    place = shutil.copytree(base, tmp_path / "base")
    args = [*command, "--lora_rank=2", "--max_steps=2", "--save_interval=1", f"--out_dir={tmp_path / 'run'}", f"--init_from={place}"]
    call(args)
    sampling, trained_on = ["sample.py", f"--checkpoint={tmp_path / 'run'}", "--prompt=the dog"], find_checkpoint(tmp_path / "run")[1]["base"]
    place.rename(tmp_path / "moved")
    err = call(sampling, 2).stderr
    assert f"no checkpoint at init_from={place}" in err and trained_on in err and err.count("\n") == 1
    shutil.copytree(answering, place)                   # another network in the place of the base
    err = call(sampling, 2).stderr
    assert f"the adapter was trained on the network {trained_on} (init_from={place})" in err and err.count("\n") == 1
    assert "is an adapter" in call([*command, f"--init_from={tmp_path / 'run'}", f"--out_dir={tmp_path / 'new'}"], 2).stderr
    assert "was trained on the network" in call([*args, "--resume=True", "--max_steps=3", f"--init_from={answering}"], 2).stderr


def test_a_dry_run_says_how_small_a_checkpoint_of_adapters_is(command, tmp_path):
    def said(*args):
        out = call([*command, "--dry_run=True", f"--out_dir={tmp_path / 'run'}", *args]).stdout
        return [float(re.search(pattern, out)[1]) for pattern in (r"average and optimizer ([\d.]+) GB", r"checkpoint: ([\d.]+) GB")]
    wide = tmp_path / "wide"
    call([*command, f"--out_dir={wide}", "--init_from=", "--n_embd=512", "--max_steps=1", "--batch_tokens=32"])
    whole, adapters = (said(f"--init_from={wide}", "--n_embd=512", *args) for args in ((), ("--lora_rank=2",)))
    assert adapters[1] < 0.02 * whole[1] and 0.15 < adapters[0] / whole[0] < 0.35 and not (tmp_path / "run").exists()


def test_examples_without_a_network_to_begin_with_are_warned_about(command, tmp_path):
    err = call([*command, "--init_from=", f"--out_dir={tmp_path / 'run'}", "--max_steps=1"]).stderr
    assert "a new network learns from these examples alone" in err


def test_adapters_of_micro_are_small():
    """All that a checkpoint keeps of them, weights, average and two moments, beside that of the whole network."""
    cfg = configurator.load(train.Config, ["config/micro.py"])
    with torch.device("meta"):
        net = SunFish(cfg, 50257)
        whole = sum(p.numel() for p in net.parameters())
        add_lora(net, 8, 16.0)
    adapters = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert adapters == 8 * 8 * (2 * (1024 + 1536 + 1024) + 2 * 2560) and adapters / whole < 0.02 and adapters / 41.6e6 < 0.02
