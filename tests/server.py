"""A server of NDIF's kind, small: runs what a client sends on a model that it has, and sends back.

It speaks the protocol of nnsight's own client: a websocket for the status and the result, and a
request over HTTP. As on a real server, the client's packages are not there: nothing but what
nnsight itself needs can be imported. It is started as a process of its own:

    python tests/server.py FOLDER [FOLDER ...]

prints its port, and serves the checkpoints in the folders until it is stopped.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
import sys
import threading
import time
import traceback
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HIDDEN = ("twotower", "xarray", "zarr", "pandas", "cyclopts", "matplotlib", "tiny", "datasets")
"""What is installed here and not on a server."""


sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]

import nnsight  # noqa: E402
import torch  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.schema.response import ResponseModel, Status  # noqa: E402
from nnsight.tracing.tracer import dec, inc  # noqa: E402

MODELS: dict[str, Any] = {}
SOCKETS: dict[str, Any] = {}
JOBS: list[dict[str, Any]] = []


def load(folder: str) -> Any:
    """A checkpoint, evaluated on the processor."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return nnsight.TransformersModel(module, task="text-generation", tokenizer=tokenizer)


def run(model: Any, blob: bytes, compress: bool) -> bytes:
    """What a request's block saved, as the client reads it."""
    tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress)
    frame = tracer.info.frame
    before = dict(frame.f_locals)
    inc()
    try:
        tracer.execute(tracer.info.code)
    finally:
        dec()
    saved = {k: v for k, v in frame.f_locals.items() if k not in before or v is not before[k]}
    buffer = io.BytesIO()
    torch.save(saved, buffer, pickle_protocol=4)
    if not compress:
        return buffer.getvalue()
    import zstandard

    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def frame_of(data: bytes) -> bytes:
    """A websocket frame that holds bytes."""
    return struct.pack("!BBQ", 0x82, 127, len(data)) + data


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/jobs":
            return self.answer(json.dumps(JOBS).encode())
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade")):
            self.send_header(name, value)
        self.send_header("Sec-WebSocket-Accept", accept)
        self.end_headers()
        session = f"session {len(SOCKETS)}"
        message = json.dumps({"session_id": session}).encode()
        self.wfile.write(struct.pack("!BB", 0x81, len(message)) + message)
        SOCKETS[session] = self.wfile
        self.rfile.read(1)  # until the client closes
        self.close_connection = True
        return None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in message_from_bytes(head + body).get_payload()
        }
        request = RequestModel.model_validate_json(parts["data"])
        received = ResponseModel(id="1", status=Status.RECEIVED)
        self.answer(received.model_dump_json().encode())
        threading.Thread(target=work, args=(request, parts["blob"])).start()

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def work(request: RequestModel, blob: bytes) -> None:
    """Run a request, and send the result or what went wrong."""
    folder = json.loads(request.model_key.partition(":")[2])["repo_id"]
    started = time.perf_counter()
    try:
        result = run(MODELS[folder], blob, request.compress)
        response = ResponseModel(id="1", status=Status.COMPLETED, data=result)
    except BaseException:
        result = b""
        response = ResponseModel(id="1", status=Status.ERROR, description=traceback.format_exc())
    seconds = time.perf_counter() - started
    JOBS.append({"sent": len(blob), "returned": len(result), "seconds": seconds})
    SOCKETS[request.session_id].write(frame_of(response.pickle()))


def main() -> None:
    torch.set_num_threads(1)
    MODELS.update({folder: load(folder) for folder in sys.argv[1:]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
