"""How large what an adapter is written as is, the table of docs/transformers.md.

    python benchmarks/file_sizes.py      # a minute; measures and fills the page

The real MiniLM BERT with a classifier's head, kernel sizes 2, 8 and 16.
"""

import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import keras_hub
from measuring import DOCS, QUICK, fill
from support.methods import default_preset

from keras_dcft import enable_dcft, export_to_peft, merge_dcft, save_dcft_weights

PAGE = DOCS / "transformers.md"
KERNEL_SIZES = (8,) if QUICK else (2, 8, 16)


def main():
    lines = [
        "| kernel size | trainable numbers | adapter file | LoRA folder | merged `.keras` file |",
        "|---:|---:|---:|---:|---:|",
    ]
    for kernel_size in KERNEL_SIZES:
        numbers = map("{:,}".format, sizes(kernel_size))
        lines.append(f"| {kernel_size} | {' | '.join(numbers)} |")
    fill(PAGE, "file_sizes.py", "\n".join(lines))
    print("\n".join(lines))


def sizes(kernel_size):
    task = keras_hub.models.BertTextClassifier.from_preset(str(default_preset()), num_classes=2)
    enable_dcft(task, kernel_size=kernel_size)
    trainable = sum(math.prod(variable.shape) for variable in task.trainable_variables)
    with tempfile.TemporaryDirectory() as folder:
        adapter, lora, model = (Path(folder, n) for n in ("a.dcft.safetensors", "lora", "a.keras"))
        save_dcft_weights(task, adapter)
        export_to_peft(task, lora)
        merge_dcft(task).save(model)
        in_lora = sum(path.stat().st_size for path in lora.iterdir())
        return trainable, adapter.stat().st_size, in_lora, model.stat().st_size


if __name__ == "__main__":
    main()
