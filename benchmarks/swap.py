"""How long it takes to put another adapter into a model: `load_dcft_weights` on the real MiniLM.

python benchmarks/swap.py
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import keras
import keras_hub
import measuring
import numpy as np
from support.methods import default_preset

from keras_dcft import enable_dcft, load_dcft_weights, save_dcft_weights

RESULTS = measuring.RESULTS / "swap.jsonl"
SWAPS, TEXTS = (2, 1) if measuring.QUICK else (40, 8)


def main():
    task = keras_hub.models.BertTextClassifier.from_preset(str(default_preset()), num_classes=2)
    enable_dcft(task)
    texts = ["a film"] * TEXTS
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{n}.dcft.safetensors" for n in range(2)]
        for number, file in enumerate(files):
            for variable in task.trainable_variables:
                variable.assign(np.random.default_rng(number).normal(size=variable.shape))
            save_dcft_weights(task, file)
        task.predict(texts, verbose=0)
        function = task.predict_function
        seconds = []
        for number in range(SWAPS):
            start = time.perf_counter()
            load_dcft_weights(task, files[number % 2])
            seconds.append(time.perf_counter() - start)
            task.predict(texts, verbose=0)
        assert task.predict_function is function
        result = {
            "backend": keras.backend.backend(),
            "file_bytes": files[0].stat().st_size,
            "swaps": SWAPS,
            "median_milliseconds": round(1000 * statistics.median(seconds), 2),
            "quartiles_milliseconds": [
                round(1000 * q, 2) for q in statistics.quantiles(seconds, n=4)[::2]
            ],
        }
    print(json.dumps(result))
    measuring.add_line(result, RESULTS)


if __name__ == "__main__":
    main()
