"""`python -m keras_dcft FILE ...`: what is in adapter files, for people."""

import argparse
import json
import sys
from collections import Counter

from rich.console import Console
from rich.table import Table

from keras_dcft.files import read_dcft_notes
from keras_dcft.settings import AdapterSettings, counted


def main(arguments=None) -> int:
    """Prints what is in each file; returns 1 if one could not be read, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_dcft",
        description="Checks adapter files and prints what is in them: settings, base, notes, "
        "counts and tensors. Needs no model. Exits with 1 if a file is damaged or missing.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a *.dcft.safetensors file")
    status = 0
    # Names stay as they are: rich would take `[a]` in one for a style, `:car:` for an emoji.
    width = None if sys.stdout.isatty() else 120
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    for path in parser.parse_args(arguments).files:
        try:
            found = read_dcft_notes(path)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            status = 1
        else:
            console.print(path, _overview(found), "", _tensors(found["tensors"]), "", sep="\n")
    return status


def _overview(found) -> Table:
    settings, base, counts = found["settings"], found["base"], found["counts"]
    sizes = Counter(settings["layers"].values())
    trained = [name.split("/") for name in found["tensors"] if name.startswith("trained/")]
    trained = dict.fromkeys("/".join(parts[1:-1]) for parts in trained)
    numbers = counts["adapters"] + counts["trained_in_full"]
    rows = {
        "Format": f"version {found['format_version']}, the checksum fits",
        "Base": base["model_class"] + (f" at '{base['part']}'" if base["part"] else ""),
        **{name: str(settings[name]) for name in AdapterSettings().common()},
        "Kernel sizes": ", ".join(f"{d} ({counted(n, 'layer')})" for d, n in sorted(sizes.items())),
        "Trained in full": ", ".join(trained),
        "Numbers": f"{counts['adapters']:,} in adapters, {counts['trained_in_full']:,} trained in "
        f"full, {numbers:,} in all",
        **{f"Note: {name}": json.dumps(value) for name, value in found["notes"].items()},
    }
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name.capitalize() if name.islower() else name, value)
    return table


def _tensors(tensors) -> Table:
    table = Table(box=None, padding=(0, 2))
    table.add_column("Tensor", overflow="fold")
    table.add_column("Type")
    table.add_column("Shape", justify="right")
    for name, tensor in tensors.items():
        table.add_row(name, tensor["dtype"], " x ".join(map(str, tensor["shape"])) or "one number")
    return table


if __name__ == "__main__":
    sys.exit(main())
