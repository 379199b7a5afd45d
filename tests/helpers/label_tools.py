"""What tests of the backends for label tools share."""

import contextlib
import json
import threading
import urllib.error
import urllib.request

import numpy as np


@contextlib.contextmanager
def serving(server):
    """The address of a server while it serves."""
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def call(url, body=None):
    """Status, answer, and the reason of the status."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response), response.reason
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.reason


def corners(mask):
    """The box around a mask: x and y of its first pixel, and of the one behind its last."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [*map(int, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))]


def iou(a, b):
    return (a & b).sum() / (a | b).sum()
