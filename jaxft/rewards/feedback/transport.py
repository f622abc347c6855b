"""Requests to an endpoint: JSON there and back, with limits, timeouts, and pauses before asking again."""

import contextlib
import email.utils
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from jaxft.rewards.feedback.asking import Failure

T = TypeVar("T")
PASSING = (408, 409, 425, 429)
ONE = (400, 413, 422)
LONGEST = 32 * 2**20
"""Bytes of a body."""
TOLD = 300
"""Characters of an endpoint's own message."""


class Gone(Failure):
    """A question that got no answer however often it was asked."""


class Refused(RuntimeError):
    """The endpoint refuses every question: the key, the model's name or the address is wrong."""


class Limits(Protocol):
    """What a sender must keep to; see `endpoint.Endpoint`."""

    @property
    def url(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def key_env(self) -> str | None: ...
    @property
    def timeout(self) -> float: ...
    @property
    def retries(self) -> int: ...
    @property
    def backoff(self) -> float: ...
    @property
    def longest_pause(self) -> float: ...
    @property
    def per_minute(self) -> float | None: ...


class Sender:
    """Sends from any thread."""

    def __init__(self, limits: Limits, key: str | None):
        self.limits, self._key = limits, key
        self._opener = urllib.request.build_opener(_Stay)
        self._lock, self._next = threading.Lock(), 0.0
        self._random = random.Random()

    def send(self, body: Any, read: Callable[[Any], T], stop: threading.Event) -> T:
        """What ``read`` makes of the answer; its ValueError says that it is none, and it is asked again.

        Raises Gone, Failure and Refused. ``stop`` ends pauses."""
        problem, pause = "", None
        for tried in range(self.limits.retries + 1):
            self._wait_turn(stop)
            if stop.is_set():
                raise Gone("not asked")
            try:
                return read(self._once(body))
            except _Passing as passing:
                problem, pause = str(passing), passing.pause
            except ValueError as error:
                problem, pause = str(error), None
            if pause is not None and pause > self.limits.longest_pause:
                raise Gone(f"{self.limits.url}: {problem}; it asks for a pause of {pause:.0f} s (longest_pause)")
            if tried < self.limits.retries:
                self._pause(tried, pause, stop)
        raise Gone(f"{self.limits.url}: {problem} (asked {self.limits.retries + 1} times)")

    def _wait_turn(self, stop: threading.Event) -> None:
        """Until the limits allow one more request."""
        between = 0.0 if self.limits.per_minute is None else 60.0 / self.limits.per_minute
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + between
        if turn > now:
            stop.wait(turn - now)

    def _pause(self, tried: int, asked: float | None, stop: threading.Event) -> None:
        """Between two tries: a random time, so that not all threads come back at once, within bounds that double; what
        the endpoint asks for holds all threads."""
        longest = min(self.limits.longest_pause, self.limits.backoff * 2**tried)
        if asked is not None:
            with self._lock:
                self._next = max(self._next, time.monotonic() + asked)
        stop.wait(self._random.uniform(0.0, longest) * (1.0 if asked is None else 0.1) + (asked or 0.0))

    def _once(self, body: Any) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "jaxft"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        url = self.limits.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        begun = time.monotonic()
        try:
            with self._opener.open(request, timeout=self.limits.timeout) as response:
                text = self._hidden(self._body(response, begun))
        except urllib.error.HTTPError as error:
            with contextlib.closing(error):
                raise self._refusal(error, begun) from None
        except TimeoutError:
            raise _Passing(f"no answer within {self.limits.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            said = f"no answer within {self.limits.timeout:g} s" if late else f"no connection ({reason!r})"
            raise _Passing(said) from None
        try:
            return json.loads(text)
        except ValueError:
            raise ValueError(f"the answer is no JSON: {text[:TOLD]!r}") from None

    def _body(self, response: Any, begun: float) -> bytes:
        """All of a body, within the timeout as a whole: a server that drips is no better than a silent one."""
        parts, size = [], 0
        while part := response.read1(2**16):
            parts.append(part)
            size += len(part)
            if size > LONGEST:
                raise ValueError(f"the answer is longer than {LONGEST:,} bytes")
            if time.monotonic() - begun > self.limits.timeout:
                raise TimeoutError
        return b"".join(parts)

    def _refusal(self, error: urllib.error.HTTPError, begun: float) -> Exception:
        """What a status other than 200 means."""
        try:
            said = self._hidden(self._body(error, begun))
        except (OSError, ValueError, http.client.HTTPException):
            said = ""
        told = _message(said)
        what = f"HTTP {error.code}" + (f": {told}" if told else "")
        if error.code in PASSING or error.code >= 500:
            return _Passing(what, _retry_after(error.headers.get("Retry-After")))
        if error.code in ONE:
            return Failure(f"{self.limits.url}: {what}")
        if error.code in (401, 403):
            key = f"the key in ${self.limits.key_env}" if self.limits.key_env else "a request without a key (key_env)"
            return Refused(f"{self.limits.url}: it refuses {key}: {what}")
        if error.code == 404:
            return Refused(f"{self.limits.url}: no model {self.limits.model!r} there, or no such address: {what}")
        if 300 <= error.code < 400:
            return Refused(f"{self.limits.url}: it points elsewhere ({what}); give the address that it points to")
        return Refused(f"{self.limits.url}: {what}")

    def _hidden(self, body: bytes) -> str:
        """A body as text, without the key, which a server may repeat."""
        text = body.decode("utf-8", "replace")
        return text if self._key is None else text.replace(self._key, "(key)")


class _Passing(Exception):
    """A failure that may pass, and for how long to wait if that was said."""

    def __init__(self, problem: str, pause: float | None = None):
        super().__init__(problem)
        self.pause = pause


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key would go along."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _message(body: str) -> str:
    """What an endpoint says is wrong."""
    try:
        said = json.loads(body)
        found = said.get("error", said) if isinstance(said, dict) else said
        found = found.get("message", found) if isinstance(found, dict) else found
    except ValueError:
        found = body
    return " ".join(str(found).split())[:TOLD]


def _retry_after(said: str | None) -> float | None:
    """Seconds of a Retry-After, which may be a date; None where there is none that can be read."""
    if said is None:
        return None
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return None
