"""
A page to play with, at 127.0.0.1 alone: a prompt or a text with blanks in, its denoising out, step by step.

    python sample.py --serve

Two addresses: / is viewer.html, and /write takes one JSON object, {"text": ..., and settings}, and answers with a line
of JSON for each step, as viewer.html describes them. One text is written at a time.
"""
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from configurator import Fault, UserError, check_fields, parse_json

MOST = 16_384                            # bytes of a request
ASKED = {"text": str, "block_length": (int, 0, 64), "temperature": (float, 0.1, 2), "seed": (int, 0, 10**6)}


class Handler(BaseHTTPRequestHandler):
    """A request of the page: GET / or POST /write. `server.write(asked, keep)` writes."""
    timeout = 30                         # seconds that a browser may take to send one

    def do_GET(self):
        if self.is_ours() and self.path == "/":
            self.answer(200, "text/html; charset=utf-8", self.server.page)
        else:
            self.answer(404, "text/plain", b"there is nothing to read here but /")

    def do_POST(self):
        size = self.headers.get("Content-Length", "")
        if not self.is_ours() or self.path != "/write":
            return self.answer(404, "text/plain", b"there is nothing here but /write")
        if not size.isdecimal() or int(size) > MOST:
            return self.answer(413, "text/plain", f"write 1 to {MOST:,} bytes, and say how many".encode())
        try:
            asked = parse_json(self.rfile.read(int(size)))
            check_fields("the request", asked, **ASKED)
        except ValueError:
            return self.answer(400, "text/plain", b"the request is no JSON")
        except UserError as error:
            return self.answer(400, "text/plain", str(error).encode())
        asked = {name: asked[name] for name in ASKED}
        if not self.server.free.acquire(blocking=False):
            return self.answer(503, "text/plain", b"another text is being written; wait for it")
        self.server.writing = threading.current_thread()
        try:
            self.answer(200, "application/x-ndjson")
            self.stream(asked)
        finally:
            self.server.free.release()

    def stream(self, asked):
        """Answer with the steps in which a text is written, or the mistake in what was asked."""
        def keep(row):                   # OSError if the page or the server was closed, which ends the writing
            if self.server.is_closed:
                raise ConnectionAbortedError
            self.wfile.write(json.dumps(row).encode() + b"\n")
        try:
            keep({"about": self.server.write(asked, keep)})
        except (UserError, Fault) as error:
            keep({"error": str(error)})
        except OSError:
            raise
        except Exception:
            keep({"error": "this text met a fault of the program; the terminal shows which"})
            raise

    def is_ours(self):
        """Whether the page itself asks: another site may neither send to this machine nor take its name."""
        names = {f"{host}:{self.server.server_port}" for host in ("127.0.0.1", "localhost")}
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in names and origin in (None, *(f"http://{name}" for name in names))

    def answer(self, code, kind, body=None):
        """Send a whole answer, or the head of one that ends with the connection."""
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("X-Content-Type-Options", "nosniff")
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body is not None:
            self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """The page (bytes) at http://127.0.0.1:port, and `write(asked, keep)`, which hands each step to keep and returns
    what there is to say of the text. UserError if the port is taken."""
    daemon_threads = True

    def __init__(self, port, page, write):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"port={port} cannot be used ({error.strerror}); try --port={port % 60_000 + 1}") from None
        self.page, self.write = page, write
        self.free, self.is_closed = threading.Lock(), False
        self.writing = None                             # the thread of the last text

    def handle_error(self, request, client_address):
        """Pass over a page that was closed while it was answered."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def run(self):
        """Answer until Ctrl-C."""
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            self.is_closed = True
            self.server_close()
            if self.writing:
                self.writing.join(60)                   # its text ends with the step
