"""The time from process start to the first 200 on /health: this server and a bare FastAPI app, in turn."""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

BACKEND = Path(__file__).resolve().parents[1] / "backend"
ROUNDS = 7
BARE = (
    "import uvicorn\nfrom fastapi import FastAPI\napp = FastAPI()\n"
    "@app.get('/health')\ndef health() -> dict[str, str]:\n    return {{'status': 'ok'}}\n"
    "uvicorn.run(app, host='127.0.0.1', port={port}, log_level='warning')\n"
)


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ready_s(command: list[str], port: int, environment: dict[str, str]) -> float:
    """Return seconds from the process's start to its first answer."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=BACKEND, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with httpx.Client() as http:
            while True:
                try:
                    if http.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        return time.perf_counter() - started
                except httpx.TransportError:
                    time.sleep(0.005)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Print both minima and the median ratio. The first start, which makes the database, is not counted."""
    with tempfile.TemporaryDirectory() as home:
        pairs = []
        for round_ in range(ROUNDS + 1):
            port = free_port()
            bare = ready_s([sys.executable, "-c", BARE.format(port=port)], port, dict(os.environ))
            port = free_port()
            environment = os.environ | {"PEFT_STUDIO_HOME": home, "PEFT_STUDIO_PORT": str(port)}
            ours = ready_s([sys.executable, "main.py"], port, environment)
            if round_:
                pairs.append((bare, ours))
    ratio = statistics.median(ours / bare for bare, ours in pairs)
    print(f"bare FastAPI {min(p[0] for p in pairs):.2f} s, server {min(p[1] for p in pairs):.2f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
