"""Files are written whole or not at all, whatever happens in between."""

import contextlib
import os
import tempfile
from pathlib import Path

from keras_dcft import keras_internals


def write_atomically(path: Path, content: bytes):
    """Writes a file beside its place and renames it; the first of several processes does it."""
    write_together({path: content})


def write_together(contents: dict):
    """Writes files beside their places, all of them, and renames them one by one.

    The last one is what makes the others readable: what stands in its place goes first, so that
    who is stopped between two of them leaves no mixture of old and new that could be read.

    Args:
        contents: dict of paths to bytes.
    """
    if not keras_internals.is_first_process():
        return
    staged = {}
    try:
        for path, content in contents.items():
            if path.is_dir():
                raise IsADirectoryError(f"{path}: move this folder, a file is to stand there.")
            handle, staged[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(staged[path], 0o666 & ~_umask())
        *others, last = contents
        if others:
            last.unlink(missing_ok=True)
        for path in contents:
            os.replace(staged[path], path)
            del staged[path]
    finally:
        for beside in staged.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
