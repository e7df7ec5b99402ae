"""What leaves a run: exports that come back the same, pages that a browser can go through, curves."""
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SIZE, call, run

import prepare_fineweb
from model import find_checkpoint

sys.path.insert(0, str(ROOT / "bench"))
import plot             # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    folder = tmp_path_factory.mktemp("share") / "small"
    call(["sample.py", f"--checkpoint={base}", f"--export={folder}", "--prompt=the dog"])
    return folder


def writes(place, *args, **options):
    return call(["sample.py", f"--checkpoint={place}", "--prompt=the dog", "--seq_len=8", *args], **options).stdout


def test_an_export_writes_what_its_run_writes_and_names_what_it_is(exported, base):
    (_, found), (path, read) = find_checkpoint(base), find_checkpoint(exported)
    assert path == exported and read["data"] == found["data"] and found["ema"].keys() == read["ema"].keys()
    assert all(torch.equal(found["ema"][name], read["ema"][name]) for name in found["ema"])
    assert writes(exported) == writes(base) != writes(base, "--seed=2")
    card, bound = (exported / "README.md").read_text(), json.loads(open(base / "log.jsonl").readlines()[-1])["bound"]
    assert card.startswith("---\nlicense: ") and f"{bound:.3f} +- " in card and "| tokens seen | 2,560 |" in card and "text.jsonl" in card
    assert writes(base, "--seq_len=0")[len("the dog"):].strip("\n") in card and "Limits" in card
    assert sorted(file.name for file in exported.iterdir()) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def test_an_export_of_an_export_is_the_same(exported, tmp_path):
    call(["sample.py", f"--checkpoint={exported}", f"--export={tmp_path / 'again'}", "--prompt=the dog"])
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    assert (tmp_path / "again" / "README.md").read_text() == (exported / "README.md").read_text().replace("small", "again")


def test_the_hub_is_asked_once_and_its_cache_serves_offline(exported, tmp_path):
    """The library's own cache, as a download leaves it, and no network."""
    home = tmp_path / "hub" / "models--me--small"
    shutil.copytree(exported, home / "snapshots" / "0123456789012345678901234567890123456789")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123456789012345678901234567890123456789")
    offline = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    out = run(["sample.py", "--checkpoint=hf:me/small", "--prompt=the dog", "--seq_len=8"], env=offline)
    assert out.stdout == writes(exported)
    err = run(["sample.py", "--checkpoint=hf:me/other", "--prompt=the dog"], 1, env=offline).stderr
    assert "cannot fetch me/other" in err and err.count("\n") == 1


def test_training_goes_on_from_an_export_with_its_tokenizer(exported, shards, tmp_path):
    out = call(["train.py", *SIZE, f"--dataset={shards}", f"--init_from={exported}", f"--out_dir={tmp_path / 'run'}", "--max_steps=1"]).stdout
    assert "from step 0 of 1" in out
    text = tmp_path / "t.txt"
    text.write_text("the old dog went home. " * 200)
    folder = prepare_fineweb.prepare(prepare_fineweb.Config(source=str(text), tokenizer=str(exported), out=str(tmp_path / "text")))
    assert prepare_fineweb.read_meta(folder)["tokenizer"] == prepare_fineweb.read_meta(shards)["tokenizer"]


def test_adapters_are_exported_merged(exported, pairs, tmp_path):
    call(["train.py", *SIZE, f"--dataset={pairs}", f"--init_from={exported}", f"--out_dir={tmp_path / 'lora'}", "--max_steps=2", "--lora_rank=2",
          "--block_size=32", "--prompt_size=16", "--learning_rate=1e-2", "--warmup_steps=0"])
    call(["sample.py", f"--checkpoint={tmp_path / 'lora'}", f"--export={tmp_path / 'merged'}"])
    a, b = (call(["sample.py", f"--checkpoint={tmp_path / name}", "--prompt=the dog"]).stdout for name in ("lora", "merged"))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| begun with | text.jsonl" in card and "20 steps" in card and "--mode=infill" not in card
    assert a == b and find_checkpoint(tmp_path / "merged")[1]["data"]["kind"] == "instructions"
    found = find_checkpoint(tmp_path / "lora")[1]
    assert found["base"] == json.loads((exported / "config.json").read_text())["fingerprint"]


def test_damaged_exports_are_refused(exported, tmp_path):
    for name, damage, words in (("model.safetensors", lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "its weights are not those"),
                                ("model.safetensors", lambda data: data[:-9], "not a sound export"),
                                ("config.json", lambda data: data[:50], "not a sound export"), ("config.json", lambda data: b"{}", "not a sound export"),
                                ("config.json", lambda data: data.replace(b'"format": ', b'"format": 9'), "of format")):
        folder = tmp_path / "bad"
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
        assert words in call(["sample.py", f"--checkpoint={folder}"], 1).stderr, name
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "is there already" in call(["sample.py", f"--checkpoint={exported}", f"--export={tmp_path / 'full'}"], 2).stderr
    assert "is there already" in call(["sample.py", f"--checkpoint={exported}", f"--export={exported}"], 2).stderr
    assert "less than one for each" in call(["sample.py", f"--checkpoint={exported}", f"--export={tmp_path / 'new'}", "--steps=2"], 2).stderr
    assert "leave them out" in call(["sample.py", f"--checkpoint={exported}", f"--export={tmp_path / 'new'}", "--quantize=int8"], 2).stderr
    assert "cannot write" in call(["sample.py", f"--checkpoint={exported}", "--export=/proc/new"], 1).stderr


# ---- pages ----

@pytest.fixture
def page(tmp_path):
    """Opens a page in a real browser, which may load no other file, and keeps what it complains about."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSER:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.said, tab.asked = [], []
        tab.on("console", lambda message: tab.said.append(message.text))
        tab.on("pageerror", lambda error: tab.said.append(str(error)))
        tab.on("request", lambda request: tab.asked.append(request.url))
        yield tab
        assert tab.said == [] and len(tab.asked) == 1 and tab.asked[0].startswith("file://")
        browser.close()


@pytest.mark.parametrize("args, n", [(["--prompt=the dog", "--seq_len=8", "--span_size=0", "--steps=6"], 6), (["--prompt=the dog", "--seq_len=8"], 8),
                                     (["--mode=infill", "--text=the red [MASK:2] went [MASK:1] home <b>&"], 3),
                                     (["--mode=infill", "--text=the red [MASK] dog", "--num_samples=3", "--json=True"], None)])
def test_a_reader_goes_through_the_steps_with_keys_slider_and_button(base, page, tmp_path, args, n):
    out = call(["sample.py", f"--checkpoint={base}", f"--html={tmp_path / 'a b.html'}", *args]).stdout[:-1]
    out = json.loads(out.splitlines()[0])["text"] if "--json=True" in args else out
    page.goto((tmp_path / "a b.html").as_uri())
    n = n or int(page.get_attribute("#at", "max"))

    def where(): return int(re.match(r"step (\d+) of (\d+), noise [\d.]+", page.text_content("#where"))[1])
    assert where() == 0 and page.get_attribute("#at", "max") == str(n) and page.locator(".blank").count() >= 1
    given = page.locator(".given").all_text_contents()
    assert "".join(given).startswith("the") and page.locator(".now").count() == 0
    page.keyboard.press("ArrowRight")
    assert where() == 1 and page.locator(".now").count() >= 1 and "noise 1.00 (t = 1000)" in page.text_content("#where")
    assert re.fullmatch(r"\d+ % sure", page.locator(".now").first.get_attribute("title"))
    page.keyboard.press("End")
    assert where() == n and page.text_content("#text").replace("\ufffd", "") in (out, out.replace("\ufffd", "")) and page.locator(".blank").count() == 0
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert where() == n - 1
    page.keyboard.press("Home")
    assert where() == 0 and page.locator(".given").all_text_contents() == given
    page.evaluate("at.value = 2; at.dispatchEvent(new Event('input'))")
    assert where() == min(2, n)
    page.click("#play")
    page.wait_for_function(f"where.textContent.startsWith('step {n} of')", timeout=15_000)
    assert page.text_content("#play") == "play"


def test_a_page_that_cannot_be_written_is_said(base):
    assert "cannot write html=/proc/no.html" in call(["sample.py", f"--checkpoint={base}", "--html=/proc/no.html", "--seq_len=4"], 1).stderr
    assert "there is no folder nowhere" in call(["sample.py", f"--checkpoint={base}", "--html=nowhere/no.html", "--seq_len=4"], 2).stderr


# ---- curves ----

def test_curves_of_runs_come_from_their_logs(base, tmp_path, capsys):
    log = plot.read_log(base / "log.jsonl")
    rows = [json.loads(line) for line in open(base / "log.jsonl")]
    assert list(log["loss"][1]) == [row["loss"] for row in rows if "loss" in row] and log["loss"][0][-1] == 20 * 128
    assert [list(column) for column in log["bound"]] == [[20 * 128], [rows[-1]["bound"]], [rows[-1]["bound_error"]]]
    assert plot.running_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5] and plot.running_mean([5, 7], 1) == [5, 7]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    shutil.copytree(base, tmp_path / "other")
    with open(tmp_path / "other" / "log.jsonl", "a") as file:
        file.write('{"step": 2')
    plot.main(plot.Config(runs=f"{base},{tmp_path / 'other'}", out=str(tmp_path / "curves.png")))
    said = capsys.readouterr()
    assert said.out.count("2,560 tokens, bound") == 2 and "cut short" in said.err
    assert Path(tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for wrong, words in ((dict(runs=str(tmp_path)), "no log.jsonl"), (dict(runs=str(base), out=str(tmp_path / "a.xyz")), "choose a file")):
        with pytest.raises(SystemExit):
            plot.main(plot.Config(**wrong))
        assert words in capsys.readouterr().err
