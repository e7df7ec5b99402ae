"""What leaves a run: exports that come back the same, pages that a browser can go through, curves."""
import json
import os
import re
import resource
import shlex
import shutil
import zipfile
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT, SIZE, call, run

import checkpoint as ckpt
import prepare_fineweb
import sample as script
from configurator import Fault, UserError
from data import read_meta

INFILL = ["--mode=infill", "--prompt=", "--seq_len=0"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("share") / "one-export"
    sample(base, f"--export={folder}", "--seq_len=0")
    return folder


def sample(place, *args, code=0):
    return call(["sample.py", f"--checkpoint={place}", "--device=cpu", "--dtype=float32", "--prompt=the dog",
                 "--steps=4", "--seq_len=8", "--seed=1", *args], code)


# ---- exports ----

def test_an_export_writes_what_its_run_writes_and_names_what_it_is(exported, base):
    (_, found), (path, read) = ckpt.find(base), ckpt.find(exported)
    assert path == exported and read["data"] == found["data"] and found["ema"].keys() == read["ema"].keys()
    assert all(torch.equal(found["ema"][name], read["ema"][name]) for name in found["ema"])
    assert read["block_length"] == found["block_length"] == 8
    assert sample(exported).stdout == sample(base).stdout != sample(base, "--seed=2").stdout
    card, row = (exported / "README.md").read_text(), json.loads(open(base / "log.jsonl").readlines()[-1])
    assert card.startswith("---\nlicense: ") and "training text: text.jsonl" in card
    assert f"{row['bound']:.3f} +- {row['bound_error']:.3f} nats" in card and "tokens seen: 2,560\n" in card
    assert " ".join(sample(base, "--seq_len=0").stdout[len("the dog"):].split()) in card
    files = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(file.name for file in exported.iterdir()) == files


def test_an_export_of_an_export_is_the_same(exported, tmp_path):
    sample(exported, f"--export={tmp_path / 'again'}", "--seq_len=0")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    card = (exported / "README.md").read_text()
    assert (tmp_path / "again" / "README.md").read_text() == card.replace("one-export", "again")


@pytest.mark.slow
def test_the_hub_is_asked_once_and_its_cache_serves_offline(exported, tmp_path):
    """The library's own cache, as a download leaves it, and no network."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    home = tmp_path / "hub" / "models--me--small"
    shutil.copytree(exported, home / "snapshots" / "0123456789012345678901234567890123456789")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123456789012345678901234567890123456789")
    offline = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    args = ["--device=cpu", "--dtype=float32", "--prompt=the dog", "--steps=4", "--seq_len=8", "--seed=1"]
    assert run(["sample.py", "--checkpoint=hf:me/small", *args], env=offline).stdout == sample(exported).stdout
    err = run(["sample.py", "--checkpoint=hf:me/other", "--prompt=the dog"], 1, env=offline).stderr
    assert "cannot fetch me/other" in err and err.count("\n") == 1


def test_training_goes_on_from_an_export_with_its_tokenizer(exported, shards, tmp_path):
    args = [*SIZE, f"--dataset={shards}", f"--init_from={exported}", f"--out_dir={tmp_path / 'run'}", "--max_steps=1"]
    assert "from step 0 of 1" in call(["train.py", *args, "--learning_rate=1e-12"]).stdout
    before, after = ckpt.find(exported)[1]["ema"], ckpt.find(tmp_path / "run")[1]["ema"]
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before if name != "schedule")
    (tmp_path / "t.txt").write_text("the old dog went home. " * 200)
    settings = dict(source=str(tmp_path / "t.txt"), tokenizer=str(exported), out=str(tmp_path / "text"))
    folder = prepare_fineweb.prepare(prepare_fineweb.Config(**settings))
    assert read_meta(folder)["tokenizer"] == read_meta(shards)["tokenizer"]


def test_adapters_are_exported_merged(exported, pairs, tmp_path):
    lora, merged = tmp_path / "lora", tmp_path / "merged"
    call(["train.py", *SIZE, f"--dataset={pairs}", f"--init_from={exported}", f"--out_dir={lora}", "--max_steps=2",
          "--lora_rank=2", "--block_size=32", "--prompt_size=16", "--learning_rate=1e-2", "--warmup_steps=0"])
    sample(lora, f"--export={merged}")
    assert sample(lora).stdout == sample(merged).stdout != sample(exported).stdout
    card, read = (merged / "README.md").read_text(), ckpt.find(merged)[1]
    assert "begun with: text.jsonl" in card and "20 steps" in card and "tokens seen: 256\n" in card
    assert read["data"]["kind"] == "instructions" and "base" not in read
    assert ckpt.find(lora)[1]["base"] == json.loads((exported / "config.json").read_text())["fingerprint"]


@pytest.mark.parametrize("name, damage, words", [
    ("model.safetensors", lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "its weights are not those"),
    ("model.safetensors", lambda data: data[:-9], "not a sound export"),
    ("config.json", lambda data: data[:50], "not a sound export"),
    ("config.json", lambda data: b"{}", "not a sound export"),
    ("config.json", lambda data: data.replace(b'"format": ', b'"format": 9'), "not a sound export of format"),
    ("tokenizer.json", lambda data: b"", "not a sound export")])
def test_damaged_exports_are_refused(exported, tmp_path, name, damage, words):
    folder = shutil.copytree(exported, tmp_path / "bad")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    out = sample(folder, code=1)
    assert words in out.stderr and out.stderr.count("\n") == 1 and out.stdout == ""


@pytest.mark.parametrize("change, words", [
    (dict(config=dict(n_layer=10**6)), "n_layer=1000000 is out of range"), (dict(config=dict(n_embd=-4)), "n_embd=-4"),
    (dict(config=dict(n_layer="2")), "n_layer is '2', and should be int"), (dict(step="x"), "step is 'x'"),
    (dict(data=dict(vocab_size=2 * 10**9)), "65536"), (dict(data=dict(label=None)), "label is None"),
    (dict(config=None), "config is None"),
    (dict(config=dict(n_layer=3)), "layers.2."), (dict(config=dict(n_embd=64, n_head=2)), "and should be (")])
def test_an_export_of_odd_settings_is_refused_before_anything_is_built(exported, tmp_path, change, words):
    folder = shutil.copytree(exported, tmp_path / "bad")
    content = json.loads((folder / "config.json").read_text())
    for name, value in change.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(content))
    out = sample(folder, code=1)
    assert words in out.stderr and out.stderr.count("\n") == 1 and out.stdout == ""


def test_weights_that_are_no_numbers_are_refused_even_with_their_own_fingerprint(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "bad")
    weights = {name: read() for name, read in ckpt.read_tensors(folder / "model.safetensors").items()}
    content = json.loads((folder / "config.json").read_text())
    weights["head.weight"][3, 3] = float("nan")
    ckpt.write_tensors(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps({**content, "fingerprint": ckpt.fingerprint(weights)}))
    assert "head.weight is not finite" in sample(folder, code=1).stderr


def test_tensors_are_written_and_read_as_by_the_safetensors_package(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    torch.manual_seed(1)
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 1, 3).half(),
               "d": torch.tensor(2.5), "e": torch.zeros(0, 4), "f": torch.randn(4, 6).T}
    ckpt.write_tensors(tmp_path / "ours", tensors)
    package.save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "theirs", {"made": "by them"})
    for found in (package.load_file(tmp_path / "ours"),
                  {name: read() for name, read in ckpt.read_tensors(tmp_path / "theirs").items()}):
        assert found.keys() == tensors.keys()
        assert all(x.dtype == found[name].dtype and torch.equal(x, found[name]) for name, x in tensors.items())


@pytest.mark.parametrize("header", [
    b"", b"5", b"[]", b'{"a": 5}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}', b"{" * 9000,
    b'{"a": {"dtype": "F32", "shape": [-1, 2], "data_offsets": [-8, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [1], '
    b'"data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "I8", "shape": [8], "data_offsets": [0, 8]}}', b'{"a": {"dtype": "F32", "shape": [2]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "__class__": 5}}'])
def test_odd_headers_of_tensors_are_refused(exported, tmp_path, header):
    folder = shutil.copytree(exported, tmp_path / "bad")
    for size in (len(header), 2**63, 0):
        (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + bytes(8))
        assert "is not a sound export" in sample(folder, code=1).stderr


def test_an_export_in_bfloat16_has_half_of_the_bytes_and_writes_as_well(exported, base, tmp_path):
    sample(base, f"--export={tmp_path / 'half'}", "--dtype=bfloat16")
    sizes = [(place / "model.safetensors").stat().st_size for place in (exported, tmp_path / "half")]
    assert 0.5 < sizes[1] / sizes[0] < 0.6
    one, half = (ckpt.find_network(place)[1]["ema"] for place in (base, tmp_path / "half"))
    assert all(torch.allclose(x, half[name].float(), rtol=0.01, atol=1e-6) for name, x in one.items())
    assert torch.equal(one["schedule"], half["schedule"]) and sample(tmp_path / "half").stdout.startswith("the dog")


def test_pipes_and_bombs_in_the_place_of_networks_are_refused(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "bad")
    for name in ckpt.EXPORT:
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert "not a sound export" in sample(folder, code=1).stderr
        shutil.copy(exported / name, tmp_path / "sound")
        (tmp_path / "sound").replace(folder / name)
    os.mkfifo(tmp_path / "ckpt_00000001.pt")
    assert "no regular file" in sample(tmp_path, code=1).stderr
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    assert "(compressed)" in sample(tmp_path / "bomb.pt", code=1).stderr


def test_what_a_network_says_of_itself_gives_the_terminal_and_the_card_no_orders(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "odd")
    content = json.loads((folder / "config.json").read_text())
    content["data"]["label"] = "\x1b[2Jowned\n<script>alert(1)</script>"
    (folder / "config.json").write_text(json.dumps(content))
    out = sample(folder, f"--export={tmp_path / 'again'}", "--prompt=```\n<b>the dog")
    assert "\x1b" not in out.stderr
    card = (tmp_path / "again" / "README.md").read_text()
    assert "<script>" not in card and "\x1b" not in card and "\n    ``` <b>the dog\n" in card


def test_an_adapter_of_a_stranger_does_not_ask_the_hub(exported, pairs, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    call(["train.py", *SIZE, f"--dataset={pairs}", f"--init_from={exported}", f"--out_dir={tmp_path / 'lora'}",
          "--max_steps=1", "--lora_rank=2", "--block_size=32", "--prompt_size=16"])
    path, content = ckpt.find(tmp_path / "lora")
    content["config"]["init_from"] = "hf:stranger/x"
    torch.save(content, tmp_path / "ckpt_00000001.pt")
    err = sample(tmp_path / "ckpt_00000001.pt", code=1).stderr
    assert "fetch it with --checkpoint=hf:stranger/x, if you trust it" in err


def test_exports_that_cannot_be_are_refused(exported, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder, arg, code, words in ((tmp_path / "full", "--seed=1", 2, "is there already"),
                                     (exported, "--seed=1", 2, "is there already"),
                                     (tmp_path / "new", "--steps=1001", 2, "more than the 1000 noise levels"),
                                     (tmp_path / "new", "--quantize=int8", 2, "leave out --quantize"),
                                     (tmp_path / "file" / "new", "--seed=1", 1, "cannot write export=")):
        assert words in sample(exported, f"--export={folder}", arg, code=code).stderr
    assert not (tmp_path / "new").exists() and (tmp_path / "full" / "thesis.txt").read_text() == "mine"


# ---- pages ----

@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSER:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])


@pytest.fixture
def page(browser):
    """A tab of a real browser, which may load no other file than the page and complain about nothing."""
    tab = browser.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    yield tab
    assert said == [] and len(asked) == 1 and asked[0].startswith("file://")
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("args, n", [
    (["--block_length=0", "--steps=24"], 24), (["--block_length=4", "--strided", "--steps=12"], 24),
    ([*INFILL, "--text=the red [MASK:2] went [MASK:1] home <b>&", "--block_length=1", "--steps=8"], 24),
    ([*INFILL, "--text=the red [MASK] dog", "--num_samples=2", "--json", "--block_length=0", "--steps=20"], 20)])
def test_a_reader_goes_through_the_steps_with_keys_slider_and_button(base, page, tmp_path, args, n):
    file = tmp_path / "a b.html"
    out = sample(base, f"--html={file}", *args).stdout[:-1]
    out = json.loads(out.splitlines()[0])["text"] if "--json" in args else out
    page.goto(file.as_uri())
    def where(): return int(re.match(r"step (\d+) of (\d+), noise [\d.]+$", page.text_content("#where"))[1])
    assert where() == 0 and page.get_attribute("#at", "max") == str(n) and page.locator(".blank").count() >= 1
    given = page.locator(".given").all_text_contents()
    assert "".join(given).startswith("the") and page.locator(".now").count() == 0
    page.keyboard.press("ArrowRight")
    assert where() == 1 and page.locator(".now").count() >= 1 and "noise 1.00" in page.text_content("#where")
    assert re.fullmatch(r"\d+ % sure", page.locator(".now").first.get_attribute("title"))
    page.keyboard.press("End")
    assert where() == n and page.locator(".blank").count() == 0
    def letters(text): return "".join(text.replace("\ufffd", "").split())      # spaces are mended in the text alone
    assert letters(page.text_content("#text")) == letters(out)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert where() == n - 1
    page.keyboard.press("Home")
    assert where() == 0 and page.locator(".given").all_text_contents() == given
    page.evaluate("at.value = 2; at.dispatchEvent(new Event('input'))")
    assert where() == 2
    page.evaluate(f"go({n} - 2)")
    page.click("#play")
    page.wait_for_function(f"where.textContent.startsWith('step {n} of')", timeout=15_000)
    assert page.text_content("#play") == "play"


def test_no_token_of_a_text_ends_the_script_of_its_page(browser, tmp_path):
    words = ["</script>", None], ["<!--<script>", 0.25], [" \u2028'\"", -1]
    steps = [[1.0, words, [1]], [0.25, words, [1]]]
    (tmp_path / "a.html").write_bytes(script.page([dict(title="one", about="</script>", steps=steps)]))
    page = (tmp_path / "a.html").read_text()
    assert page.count("</script>") == 1 and "http" not in page
    tab = browser.new_page()
    tab.goto((tmp_path / "a.html").as_uri())
    tab.evaluate("go(2)")
    assert tab.text_content("#text") == "</script><!--<script> \u00b7\u00b7\u00b7"
    assert tab.text_content("#about") == "</script>"
    tab.close()


def test_the_box_does_not_jump_and_a_phone_shows_it_whole(base, browser, tmp_path):
    sample(base, f"--html={tmp_path / 'a.html'}", "--block_length=8", "--steps=4", "--seed=3")
    for width, scheme in ((1200, "light"), (360, "dark")):
        tab = browser.new_page(viewport=dict(width=width, height=700), color_scheme=scheme)
        tab.goto((tmp_path / "a.html").as_uri())
        heights = set()
        for k in range(int(tab.get_attribute("#at", "max")) + 1):
            tab.evaluate(f"go({k})")
            heights.add(round(tab.locator("#ghost").bounding_box()["height"]))
        assert len(heights) == 1 and tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.close()


@pytest.mark.slow
def test_several_ways_of_writing_are_watched_on_one_page(base, browser, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    out = call(["page.py", f"--checkpoint={base}", "--prompt=the dog", "--text=the red [MASK] went", "--seq_len=8",
                "--seed=3", f"--out={tmp_path / 'all.html'}"]).stdout
    tab, said = browser.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.goto((tmp_path / "all.html").as_uri())
    titles = tab.locator("#which option").all_text_contents()
    calls = [int(re.search(r": (\d+) network calls$", title)[1]) for title in titles]
    assert len(titles) == 7 and calls[0] == 32 and calls[5] == 8 and "7 texts to watch" in out
    for i in range(len(titles)):
        tab.select_option("#which", str(i))
        tab.evaluate("stop(); go(n)")
        about, text = tab.text_content("#about"), tab.text_content("#text")
        assert f"; {calls[i]} network calls" in about and "--seed=3" in about and text.startswith("the")
        assert ("nats a token behind it: 1: " in about) == (i == 6)
        asked = about.split("; ")[0].replace("python ", "", 1)
        made = call([*shlex.split(asked), "--device=cpu", "--dtype=float32"]).stdout         # that command writes it
        assert "".join(made.split()) == "".join(text.replace("\ufffd", "").split())
    assert not said
    tab.close()


@pytest.mark.slow
def test_a_moving_picture_shows_one_step_after_the_other(base, browser, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    file = tmp_path / "a.svg"
    call(["animate.py", f"--checkpoint={base}", "--prompt=the dog <&>", "--seq_len=8", "--steps=4", f"--out={file}"])
    assert file.stat().st_size < 200_000
    tab, seen = browser.new_page(), set()
    tab.goto(file.as_uri())
    frames = len(ElementTree.parse(file).findall("{*}g"))
    shown = "[...document.querySelectorAll('.f')].filter(f => getComputedStyle(f).opacity === '1').map(f => f.id)"
    for _ in range(200):
        now = tab.evaluate(shown)
        assert len(now) <= 1                                # one at a time
        seen.update(now)
        tab.wait_for_timeout(20 if len(seen) < frames else 0)
    assert seen == {f"f{i}" for i in range(frames)} and frames >= 5
    assert tab.text_content("#f0").startswith("step   0 of") and "the dog <&>" in tab.text_content(f"#f{frames - 1}")
    tab.close()


def test_a_page_that_cannot_be_written_is_said(base, tmp_path):
    assert "is no regular file" in sample(base, f"--html={tmp_path}", code=2).stderr
    assert "there is no folder nowhere" in sample(base, "--html=nowhere/no.html", code=2).stderr
    (tmp_path / "thesis.html").write_text("mine")
    assert "and no page of ours" in sample(base, f"--html={tmp_path / 'thesis.html'}", code=2).stderr
    assert (tmp_path / "thesis.html").read_text() == "mine"
    before = script.PAGE.read_bytes()
    assert "and no page of ours" in sample(base, f"--html={script.PAGE}", code=2).stderr
    assert script.PAGE.read_bytes() == before
    for _ in range(2):                                  # one of ours may be replaced
        assert "steps to look at" in sample(base, f"--html={tmp_path / 'page.html'}").stderr


def test_a_disk_that_fills_up_during_the_page_or_the_export_leaves_nothing_and_one_line(base, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for option in (f"--html={tmp_path / 'page.html'}", f"--export={tmp_path / 'export'}"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            err = sample(base, option, code=1).stderr
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [line[:19] for line in err.splitlines()].count("error: cannot write") == 1
    assert not list(tmp_path.iterdir())


# ---- curves ----

def test_curves_of_runs_come_from_their_logs(base, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import plot
    log = plot.read_log(base / "log.jsonl")
    rows = [json.loads(line) for line in open(base / "log.jsonl")]
    assert list(log["loss"][1]) == [row["loss"] for row in rows if "loss" in row] and log["loss"][0][-1] == 20 * 128
    assert [list(x) for x in log["bound"]] == [[20 * 128], [rows[-1]["bound"]], [rows[-1]["bound_error"]]]
    assert plot.running_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5] and plot.running_mean([5, 7], 1) == [5, 7]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    shutil.copytree(base, tmp_path / "other")
    with open(tmp_path / "other" / "log.jsonl", "a") as file:
        file.write('{"step": 2')
    plot.main(plot.Config(runs=f"{base},{tmp_path / 'other'}", out=str(tmp_path / "curves.png")))
    said = capsys.readouterr()
    assert said.out.count("2,560 tokens, bound") == 2 and "cut short" in said.err
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no log.jsonl"):
        plot.main(plot.Config(runs=str(tmp_path)))
    with pytest.raises((UserError, Fault), match="choose a file"):
        plot.main(plot.Config(runs=str(base), out=str(tmp_path / "a.xyz")))


def test_the_progress_of_a_run_is_measured_once_a_checkpoint(base, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.syspath_prepend(ROOT / "bench")
    (tmp_path / "held.txt").write_text("the red dog went home, and the sea was old. " * 40)
    command = ["progress.py", f"--run={base}", f"--text={tmp_path / 'held.txt'}", "--block_length=1,4,0",
               "--sequences=8", "--seq_len=8", f"--out={tmp_path / 'a.png'}"]
    said = [call(command).stdout for _ in range(2)]
    lines = [line for line in said[0].splitlines() if "nats a token: " in line]
    names = [re.match(r"step 20, (.*): \d", line)[1] for line in lines]
    assert names == ["token by token", "blocks of 4", "the whole window"]
    assert "nats" not in said[1] and said[1].endswith("a.png: 1 checkpoints\n")
    row, = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["step"] == 20 and all(0 < found < 20 and error > 0 for found, error, _ in row["lengths"].values())
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "is no file" in call([*command, "--text=nowhere"], code=2).stderr
    assert "other settings" in call([*command, "--block_length=4"], code=2).stderr
    assert "not a list" in call([*command, "--block_length=a"], code=2).stderr
    (tmp_path / "none").mkdir()
    empty = [*command, f"--run={tmp_path / 'none'}", f"--out={tmp_path / 'b.png'}"]
    assert "has no checkpoints" in call(empty, 2).stderr
