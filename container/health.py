"""Asks the server of this container for its health: exit status 0 if it answers, else 1 with the reason."""

import http.client
import os
import sys

_TIMEOUT_S = 8.0  # less than HEALTHCHECK's in the Dockerfile, so that the reason is seen
_EVERY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def main() -> int:
    """Ask; return the exit status. `/health` wants no key, and no proxy is asked for this machine."""
    host = os.environ.get("PEFT_STUDIO_HOST", "")
    host = _EVERY_ADDRESS.get(host, host)
    port = int(os.environ.get("PEFT_STUDIO_PORT") or 8000)
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        body = answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        print(f"{host}:{port}: {error or type(error).__name__}")
        return 1
    finally:
        connection.close()
    print(body)
    return int(answer.status != 200)


if __name__ == "__main__":
    sys.exit(main())
