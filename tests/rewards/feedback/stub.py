"""An endpoint of chat completions on this machine, which answers as a test tells it to."""

import contextlib
import http.server
import json
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What the server sends back."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    wait: threading.Event | None = None
    """Set by the test when the server may answer."""


class Seen(NamedTuple):
    """A request."""

    path: str
    body: Any
    key: str | None


class Stub:
    """The server's address, and what it was asked."""

    def __init__(self, url: str):
        self.url, self.seen = url, list[Seen]()

    def settings(self, **more: Any) -> dict[str, Any]:
        """Those of an endpoint that asks again at once."""
        return {"url": self.url, "model": "stub", "backoff": 0.001, **more}


@contextlib.contextmanager
def serving(answer: Callable[[int, Any], Reply]) -> Iterator[Stub]:
    """``answer(number of the request, from 0, its body)``."""
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(stub.seen)
                stub.seen.append(Seen(self.path, body, self.headers.get("Authorization")))
            reply = answer(number, body)
            if reply.wait is not None:
                reply.wait.wait(10)
            with contextlib.suppress(OSError):
                self.send_response(reply.status)
                for name, value in reply.headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub = Stub(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def said(text: str, tops: dict[str, float] | None = None, finish: str = "stop") -> Reply:
    """A chat completion; ``tops``: the probabilities of tokens in place of the text, which is one of them."""
    message: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if tops is not None:
        listed = [{"token": token, "logprob": math.log(share)} for token, share in tops.items()]
        first = next(top for top in listed if top["token"] == text)
        message["logprobs"] = {"content": [{**first, "top_logprobs": listed}]}
    return Reply(body=json.dumps({"choices": [message]}).encode())
