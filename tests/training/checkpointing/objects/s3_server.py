"""A real S3 server on loopback, with a proxy in front of it that fails in the ways that networks and servers do.

    python s3_server.py

It writes one line of JSON with its address when it is ready and ends when its standard input does. The server is
moto's, in memory. `PUT /_rules` gives the proxy a list of rules and starts its counts anew, `GET /_seen` lists the
requests since then. A rule is an object:

    match   a regular expression that "METHOD path?query" has to match (search); absent: every request
    at      the number of the request, from 1, among those that match; absent: every one of them
    do      "status:503"     answer this, do not forward; "status:404:NoSuchUpload" gives the code of the protocol too
            "hang"           forward nothing and answer nothing, for `seconds`
            "cut"            close the connection before anything is forwarded
            "lose"           forward, and close the connection without the answer
            "halve"          forward, and close the connection in the middle of the answer
            "die"            refuse everything from now on for `seconds`
            "kill"           forward nothing and send SIGKILL to `pid`
            "kill-after"     forward, then send SIGKILL to `pid`
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

os.environ["S3_UPLOAD_PART_MIN_SIZE"] = "256"
from moto.server import ThreadedMotoServer

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


class State:
    """What the proxy has been told, and what it has seen."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset([])
        self.dead_until = 0.0

    def reset(self, rules: list[dict[str, Any]]) -> None:
        self.rules = rules
        self.counts = [0] * len(rules)
        self.seen: list[str] = []
        self.dead_until = 0.0

    def action(self, request: str) -> dict[str, Any] | None:
        """Count a request, and say what is to be done with it."""
        with self.lock:
            self.seen.append(request)
            found = None
            for index, rule in enumerate(self.rules):
                if "match" in rule and not re.search(rule["match"], request):
                    continue
                self.counts[index] += 1
                if found is None and rule.get("at", self.counts[index]) == self.counts[index]:
                    found = rule
            return found


def handler(state: State, port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def log_message(self, *arguments: Any) -> None:
            pass

        def handle_expect_100(self) -> bool:
            # A client waits for a second, and sends the body all the same: what is written here is buffered.
            answer = super().handle_expect_100()
            self.wfile.flush()
            return answer

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _answer(self, status: int, body: bytes, headers: list[tuple[str, str]] | None = None) -> None:
            self.send_response(status)
            for name, value in headers or []:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            self.wfile.flush()

        def _close(self) -> None:
            self.close_connection = True
            self.connection.close()

        def _forward(self, body: bytes) -> tuple[int, bytes, list[tuple[str, str]]]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                response = connection.getresponse()
                headers = [(k, v) for k, v in response.getheaders() if k.lower() not in _HOP]
                if self.command == "HEAD":
                    headers.append(("X-Length", response.getheader("Content-Length") or "0"))
                return response.status, response.read(), headers
            finally:
                connection.close()

        def _any(self) -> None:
            body = self._body()
            if self.path == "/_rules":
                state.reset(json.loads(body))
                return self._answer(200, b"{}")
            if self.path == "/_seen":
                return self._answer(200, json.dumps(state.seen).encode())
            rule = state.action(f"{self.command} {self.path}") or {}
            action, seconds = rule.get("do", ""), rule.get("seconds", 3600)
            if action == "die":
                state.dead_until = time.monotonic() + seconds
            if time.monotonic() < state.dead_until or action == "cut":
                return self._close()
            if action == "hang":
                time.sleep(seconds)
                return self._close()
            if action.startswith("status:"):
                code, _, named = action.removeprefix("status:").partition(":")
                name = named or {"503": "SlowDown", "403": "AccessDenied", "404": "NoSuchBucket"}.get(
                    code, "InternalError"
                )
                return self._answer(int(code), f"<Error><Code>{name}</Code></Error>".encode())
            if action == "kill":
                os.kill(rule["pid"], signal.SIGKILL)
                return self._close()
            status, answer, headers = self._forward(body)
            if action == "kill-after":
                os.kill(rule["pid"], signal.SIGKILL)
                return self._close()
            if action == "lose":
                return self._close()
            if action == "halve":
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer[: len(answer) // 2])
                self.wfile.flush()
                return self._close()
            return self._answer(status, answer, headers)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    return Handler


def main() -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler(State(), port))
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    print(json.dumps({"url": f"http://127.0.0.1:{proxy.server_address[1]}"}), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
