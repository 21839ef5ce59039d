"""The local Hub by hand, with its state in memory: python -m tests.localhub --port 8765 --token hf_local"""

from __future__ import annotations

import argparse
import threading

from tests.localhub.server import LocalHub


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.localhub", description=__doc__)
    parser.add_argument("--port", type=int, default=8765, help="of the Hub (0: a free one)")
    parser.add_argument("--token", default="hf_local", help="what writing, and reading private repos, needs")
    arguments = parser.parse_args()
    with LocalHub(redirects=True, write_token=arguments.token, port=arguments.port) as hub:
        print("A Hub until Ctrl-C. In another terminal:")
        print(f"export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN={arguments.token}")
        print("export NO_PROXY=127.0.0.1,localhost HF_HOME=$(mktemp -d)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
