"""A server with the engine's command line and API: it counts up from a prompt's last token, and dies at 13 and 14.

Of a model with another head it returns, for a text or each token, the first token, half of the last, and NaN if the
engine would apply its activation.
"""

import argparse
import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

STOP = 9
DEADLY = 13
NO_MESSAGE = 14
_LOG_AT_DEATH = {
    DEADLY: ["AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm'"],
    NO_MESSAGE: ['  File "linear.py", line 718, in __init__', "    assert all(size % ranks == 0)", "AssertionError"],
}


class Completions(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send({})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/pooling":
            self._pool(**request)
            return
        last = request["prompt"][-1]
        if last in _LOG_AT_DEATH:
            print(
                *(f"(Worker pid=1) ERROR 11-28 [x.py:1] {line}" for line in _LOG_AT_DEATH[last]), sep="\n", flush=True
            )
            os._exit(1)
        tokens = list(range(last + 1, last + 1 + request["max_tokens"]))
        tokens = tokens[: tokens.index(STOP) + 1] if STOP in tokens else tokens
        top = [{f"token_id:{token}": -0.1, f"token_id:{token + 100}": -0.4} for token in tokens]
        choice = {
            "token_ids": tokens,
            "finish_reason": "stop" if tokens[-1] == STOP else "length",
            "logprobs": {"top_logprobs": top},
        }
        self._send({"choices": [choice]})

    def _pool(self, *, input: list[int], task: str, use_activation: bool, **_: Any) -> None:  # noqa: A002
        if json.loads(known.pooler_config) != {"task": task} or known.runner != "pooling":
            self.send_error(400)
            return
        rows = [[token, input[-1] / 2, None if use_activation else 1.0] for token in input]
        self._send({"data": [{"index": 0, "data": rows if task == "token_classify" else rows[0]}]})

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write no log."""

    def _send(self, value: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--runner")
    parser.add_argument("--pooler-config")
    known, _ = parser.parse_known_args()
    HTTPServer((known.host, known.port), Completions).serve_forever()
