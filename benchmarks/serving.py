"""A load test of `examples/serve_many_adapters.py`: clients all the while, adapters come and go.

    python benchmarks/serving.py --adapters DIR --seconds 60 --clients 200

The server runs in a process of its own. Every answer is compared with what the adapter alone gives;
an answer for an adapter that is not there is right if it was being added or removed meanwhile.
The result is a line in `benchmarks/results/serving.jsonl`.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import httpx
import keras
import numpy as np
from measuring import RESULTS as FOLDER
from measuring import add_line, device, versions
from serve_many_adapters import SUFFIX, make_base

from keras_dcft import load_dcft_weights, read_dcft_notes

RESULTS = FOLDER / "serving.jsonl"
TEXTS = (
    "a gripping, beautiful film",
    "dull",
    "Returns the sum of the arguments.",
    "it rains / wet",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapter files")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args()
    expected = answers_alone(options.adapters)
    program = ROOT / "examples" / "serve_many_adapters.py"
    arguments = ["--adapters", str(options.adapters), "--port", str(options.port)]
    server = subprocess.Popen([sys.executable, str(program), *arguments])
    try:
        result = asyncio.run(load(options, expected))
    finally:
        server.terminate()
        server.wait()
    result = {
        "backend": keras.backend.backend(),
        "device": device(),
        "clients": options.clients,
        "versions": versions(),
        **result,
    }
    print(json.dumps(result))
    add_line(result, RESULTS)


def answers_alone(folder) -> dict:
    """By adapter and text the shares of the classes, from the adapted model itself."""
    classifier, expected = make_base(), {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        load_dcft_weights(classifier, path)
        count = len(read_dcft_notes(path)["notes"]["classes"])
        logits = classifier.predict(list(TEXTS), verbose=0)[:, :count]
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        for text, row in zip(TEXTS, shares):
            expected[path.name.removesuffix(SUFFIX), text] = row
    return expected


async def load(options, expected) -> dict:
    names = sorted({name for name, _ in expected})
    seen = {"right": 0, "not there": 0, "wrong": 0, "errors": 0}
    milliseconds, changes = [], 0
    limits = httpx.Limits(max_connections=options.clients + 10)
    url = f"http://127.0.0.1:{options.port}"
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        await wait_for(client)
        end = time.monotonic() + options.seconds

        async def ask(number):
            while time.monotonic() < end:
                name, text = names[number % len(names)], TEXTS[number % len(TEXTS)]
                is_passing = number % 5 == 0
                asked = f"passing {number % 3}" if is_passing else name
                begin = time.perf_counter()
                answer = await client.post("/predict", json={"text": text, "adapter": asked})
                milliseconds.append(1000 * (time.perf_counter() - begin))
                if answer.status_code == 404 and is_passing:
                    seen["not there"] += 1
                elif answer.status_code != 200:
                    seen["errors"] += 1
                    print(answer.status_code, answer.text, flush=True)
                else:
                    shares = list(answer.json()["shares"].values())
                    # What passes is a copy of the first adapter.
                    right = expected[names[0] if is_passing else name, text]
                    is_right = np.allclose(shares, right, atol=2e-4)
                    seen["right" if is_right else "wrong"] += 1
                number += 7

        async def change():
            nonlocal changes
            path = str(options.adapters / f"{names[0]}{SUFFIX}")
            while time.monotonic() < end:
                name = f"passing {changes % 3}"
                added = await client.put(f"/adapters/{name}", json={"path": path})
                await asyncio.sleep(0.1)
                removed = await client.delete(f"/adapters/{name}")
                seen["errors"] += (added.status_code, removed.status_code) != (201, 200)
                changes += 1

        await asyncio.gather(change(), *(ask(number) for number in range(options.clients)))
    return {
        **seen,
        "adapters added and removed": changes,
        "requests per second": round(len(milliseconds) / options.seconds, 1),
        "milliseconds": [round(float(np.percentile(milliseconds, q))) for q in (50, 95)],
    }


async def wait_for(client):
    for _ in range(240):
        try:
            await client.get("/adapters")
            return
        except httpx.ConnectError:
            await asyncio.sleep(0.5)
    raise TimeoutError("The server did not begin to answer.")


if __name__ == "__main__":
    main()
