"""The page at 127.0.0.1: what it writes, what it refuses, and how it is used in a real browser."""
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, call
from test_share import browser                  # noqa: F401

import sample
import serve

ASKED = {"text": "the red [MASK:2] went", "block_length": 16, "temperature": 1.0, "seed": 3}


@pytest.fixture
def server():
    """A server whose texts are what was asked for, in two steps; `busy` holds it back."""
    def write(asked, keep):
        keep([1.0, [["the", None], [" sea", -1]], [1]])
        assert server.busy.wait(10)
        if asked["text"] == "bug":
            raise ZeroDivisionError
        keep([0.5, [["the", None], [" sea", 0.5]], [1]])
        return json.dumps(asked)
    server = serve.Server(0, b"the page", write)
    server.busy = threading.Event()
    server.busy.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, method="POST", path="/write", body=None, **headers):
    """(status, body) of a request."""
    body = json.dumps(ASKED) if body is None else body
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body if method == "POST" else None, headers)
    reply = connection.getresponse()
    found = reply.status, reply.read().decode()
    connection.close()
    return found


def test_the_page_and_the_steps_of_a_text_are_answered(server):
    assert ask(server, "GET", "/") == (200, "the page")
    odd = json.dumps({**ASKED, "checkpoint": "hf:stranger/x", "export": "/tmp"})           # fields of no use
    status, body = ask(server, body=odd, Origin=f"http://127.0.0.1:{server.server_port}")
    *steps, last = map(json.loads, body.splitlines())
    assert status == 200 and [noise for noise, _, _ in steps] == [1.0, 0.5] and json.loads(last["about"]) == ASKED


@pytest.mark.parametrize("path", ["/etc/passwd", "/../sample.py", "/?", "/page.html", "/write"])
def test_no_other_file_is_served(server, path):
    assert ask(server, "GET", path)[0] == 404
    assert path == "/write" or ask(server, "POST", path)[0] == 404


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "127.0.0.1"}, {"Origin": "http://evil.example"},
                                     {"Origin": "null"}])
def test_another_site_gets_nothing(server, headers):
    assert ask(server, **headers)[0] == 404 and ask(server, "GET", "/", **headers)[0] == 404


@pytest.mark.parametrize("body, status", [
    ("", 400), ("5", 400), ("[]", 400), ("[" * 9000, 400), ("{}", 400), ("\x00", 400), ("x" * 16_385, 413),
    (json.dumps({**ASKED, "text": 5}), 400), (json.dumps({**ASKED, "block_length": 65}), 400),
    (json.dumps({**ASKED, "block_length": True}), 400), (json.dumps({**ASKED, "temperature": 0}), 400),
    (json.dumps({**ASKED, "seed": 1e9}), 400), (json.dumps({**ASKED, "temperature": float("nan")}), 400)])
def test_odd_requests_are_refused(server, body, status):
    assert ask(server, body=body)[0] == status and ask(server)[0] == 200


def test_requests_of_no_length_and_of_nothing_leave_the_server_alive(server):
    for sent in (b"POST /write HTTP/1.0\r\n\r\n", b"\xff\xfe\r\n\r\n", b"GET / HTTP/1.0\r\nContent-Length: -1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
            connection.sendall(sent)
            assert b"the page" not in connection.recv(1000)
    assert ask(server)[0] == 200


def test_one_text_is_written_at_a_time_and_a_page_that_is_closed_ends_it(server, capfd):
    server.busy.clear()
    first = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    first.request("POST", "/write", json.dumps(ASKED))
    reply = first.getresponse()
    assert reply.readline()                                                 # it has begun
    assert ask(server) == (503, "another text is being written; wait for it")
    reply.close()
    server.busy.set()
    deadline = time.monotonic() + 10
    while ask(server)[0] == 503:
        assert time.monotonic() < deadline
    assert "Traceback" not in capfd.readouterr().err


def test_a_fault_of_the_program_reaches_the_page_and_the_terminal(server, capfd):
    status, body = ask(server, body=json.dumps({**ASKED, "text": "bug"}))
    assert status == 200 and "the terminal shows which" in json.loads(body.splitlines()[-1])["error"]
    assert ask(server)[0] == 200 and "ZeroDivisionError" in capfd.readouterr().err


def test_a_port_that_is_taken_is_said(server, base):
    err = call(["sample.py", f"--checkpoint={base}", "--serve", f"--port={server.server_port}"], code=2).stderr
    assert f"port={server.server_port} cannot be used (" in err
    assert "leave out --prompt" in call(["sample.py", "--serve", "--prompt=x"], code=2).stderr


@pytest.fixture
def program(base):
    """sample.py --serve on a free port: (process, address)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["sample.py", f"--checkpoint={base}", "--device=cpu", "--dtype=float32", "--serve", f"--port={port}",
               "--steps=4"]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert f"open http://127.0.0.1:{port} in a browser" in process.stderr.readline()
    yield process, f"http://127.0.0.1:{port}/"
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_stranger_writes_and_fills_in_a_blank_in_a_browser(program, browser, base):      # noqa: F811
    process, address = program
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    assert page.locator("#which").is_hidden() and page.locator("#form").is_visible()
    for text, block, seed in (("the red dog", "4", 7), ("the red [MASK:2] went", "16", 8)):
        page.fill("#prompt", text)
        page.select_option("#block", block)
        page.fill("#seed", str(seed))
        page.click("#write")
        page.wait_for_function("document.getElementById('about').textContent.includes('seed %d')" % seed,
                               timeout=60_000)
        assert page.text_content("#text").startswith("the red") and page.text_content("#error") == ""
        assert int(page.get_attribute("#at", "max")) >= 4 and page.locator(".given").first.text_content() == "th"
        writer = sample.load(base, "cpu", "float32")
        if "MASK" in text:
            want = writer.infill(text, block_length=16, temperature=0.8, seed=8, steps=4)
            assert "".join(page.text_content("#text").split()) == "".join(want.split())
    page.fill("#prompt", "x [MASK:0]")
    page.click("#write")
    page.wait_for_function("document.getElementById('error').textContent.includes('a blank of 0 tokens')")
    page.fill("#prompt", "the sea " * 499)
    page.click("#write")
    page.wait_for_function("document.getElementById('error').textContent.includes('shorten it')")
    assert not said
    page.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0 and "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_ctrl_c_while_a_text_is_written_is_a_quiet_end(program):
    process, address = program
    asked = {**ASKED, "text": "the dog [MASK:2000] went", "block_length": 1}                # for half a minute
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=20)
    connection.request("POST", "/write", json.dumps(asked))
    reply = connection.getresponse()
    assert reply.readline()                                                                 # it has begun
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0 and process.stderr.read() == ""
    connection.close()
