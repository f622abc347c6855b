"""A judge that follows a rule: an endpoint of chat completions on this machine, to try AI feedback without an AI.

It answers the questions that jaxft asks (`rewards/feedback/questions.py`), whatever their principle: the nearer a reply
is to eight words, the better. It criticises other lengths and cuts longer replies. Like a model it is not certain: the
log-probabilities of its labels follow the difference.

Usage: python scripts/rule_judge.py [port]        then: judge.endpoint.url=http://127.0.0.1:8377/v1
"""

import http.server
import json
import math
import re
import sys

WORDS = 8
"""Of the best reply."""


def quoted(text: str, name: str) -> str | None:
    """What a question quotes under a name."""
    found = re.search(rf"\[{name} (\w+)\]\n(.*?)\n?\[End of {name} \1\]", text, re.DOTALL)
    return None if found is None else found[2]


def off(reply: str) -> int:
    """By how many words a reply is too short or too long."""
    return abs(len(reply.split()) - WORDS)


def answer(question: str) -> tuple[str, dict[str, float] | None]:
    """The text of an answer, and the probabilities of its labels if it is one."""
    first, second = quoted(question, "Reply A"), quoted(question, "Reply B")
    if first is not None and second is not None:
        share = 1 / (1 + math.exp((off(first) - off(second)) / 2))
        return "A" if share >= 0.5 else "B", {"A": share, "B": 1 - share}
    reply = quoted(question, "Reply") or ""
    if "number alone" in question:
        rating = str(max(1, 10 - off(reply)))
        return rating, {rating: 1.0}
    if quoted(question, "Critique of the reply") is None:
        return f"It has {len(reply.split())} words, and {WORDS} are best.", None
    return " ".join(reply.split()[:WORDS]), None


class Handler(http.server.BaseHTTPRequestHandler):
    """`POST /v1/chat/completions`."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, shares = answer(body["messages"][-1]["content"])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if shares and body.get("logprobs"):
            tops = [{"token": label, "logprob": math.log(max(p, 1e-30))} for label, p in shares.items()]
            own = next(top for top in tops if top["token"] == text)
            choice["logprobs"] = {"content": [{**own, "top_logprobs": tops}]}
        said = json.dumps({"model": body["model"], "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *args: object) -> None:
        """Says nothing of each request."""


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8377
    print(f"http://127.0.0.1:{port}/v1", flush=True)
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
