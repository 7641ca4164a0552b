"""A sample HTTP target: takes every batch, and says on standard output how many records it had. Port 8080."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

PORT = 8080


class Target(BaseHTTPRequestHandler):
    """Answers POST with an empty batch response: all records are done. GET / is for the health check."""

    protocol_version = "HTTP/1.1"  # connections are kept
    timeout: ClassVar[float] = 60.0

    def do_POST(self) -> None:
        """One batch. To get a record again, name it: {"batchItemFailures": [{"itemIdentifier": ID}]}."""
        event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        records = event["Records"]
        source, attempt = records[0]["eventSourceARN"], self.headers["X-Poller-Attempt"]
        print(f"{len(records)} records of {source}, attempt {attempt}", flush=True)
        self._answer({"batchItemFailures": []})

    def do_GET(self) -> None:
        """Alive."""
        self._answer({})

    def _answer(self, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Requests are not logged; do_POST says what there is to say."""


if __name__ == "__main__":
    with ThreadingHTTPServer(("", PORT), Target) as server:  # every address of its own container
        server.serve_forever()
