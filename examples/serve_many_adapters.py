"""One BERT in memory, an adapter for each task, and a server that answers a mixed stream.

    python examples/serve_many_adapters.py --data-dir DIR    # trains adapters first, some minutes
    python examples/serve_many_adapters.py --adapters DIR    # takes those that are in a folder

    curl localhost:8000/adapters
    curl -X POST localhost:8000/predict -H 'Content-Type: application/json' \\
         -d '{"text": "a gripping, beautiful film", "adapter": "sst2"}'
    curl -X PUT localhost:8000/adapters/copy -H 'Content-Type: application/json' \\
         -d '{"path": "adapters/sst2.dcft.safetensors"}'
    curl -X DELETE localhost:8000/adapters/copy

Trained are SST-2 and RTE of GLUE, where `--data-dir` has them, and docstrings of libraries here.
Requests that wait while a batch is computed are the next batch, each row with its own adapter.
"""

import asyncio
import contextlib
import warnings
from pathlib import Path

from support.command_line import (
    LEARNING_RATES,
    OneLineParser,
    import_quietly,
    positive_int,
    progress_verbosity,
    run_or_exit,
)


def parse_options(arguments=None):
    parser = OneLineParser(__doc__)
    add = parser.add_argument
    add("--preset", help="of a BERT classifier; without it the real MiniLM BERT")
    add("--data-dir", help="folder of tensorflow_datasets that has GLUE")
    add(
        "--adapters",
        type=Path,
        default=Path("adapters"),
        help="folder of adapter files; where it has none, they are trained",
    )
    add(
        "--train-size", type=positive_int, default=4000, help="the most training examples of a task"
    )
    add("--epochs", type=positive_int, default=2, help="how often to go through a task's data")
    add("--host", default="127.0.0.1", help="where to listen")
    add("--port", type=positive_int, default=8000, help="where to listen")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse_options()  # so that --help and mistakes need not wait for the imports

import_quietly("keras_hub")

import fastapi
import keras
import numpy as np
import pydantic
import uvicorn
from support.methods import default_preset, linear_decay
from support.text_classifier import batches, make_classifier
from support.text_data import TextData, load_text_data

from keras_dcft import AdapterBank, enable_dcft, read_dcft_notes, remove_dcft, save_dcft_weights
from keras_dcft.files import SUFFIX
from keras_dcft.settings import counted

SEQUENCE_LENGTH = 64
# All adapters of a bank have a head of one size: that of the task with most classes.
CLASSES = 8
BATCH = 32


def main():
    run_or_exit(serve, parse_options())


def serve(options):
    classifier = make_base(options.preset)
    if not list(options.adapters.glob(f"*{SUFFIX}")):
        train_all(classifier, options)
    bank, classes = AdapterBank(classifier), {}
    for path in sorted(options.adapters.glob(f"*{SUFFIX}")):
        name = path.name.removesuffix(SUFFIX)
        bank.add(name, path)
        classes[name] = read_dcft_notes(path)["notes"]["classes"]
    print(f"On one base: {', '.join(bank)}", flush=True)
    uvicorn.run(make_app(bank, classes), host=options.host, port=options.port, log_level="warning")


def make_base(preset=None):
    """A classifier with the head that all adapters have, and texts of one length."""
    data = TextData([], [], [], [], classes=[str(number) for number in range(CLASSES)])
    # Heads are trained from the same numbers, whenever and wherever an adapter is made.
    keras.utils.set_random_seed(0)
    return make_classifier(preset or default_preset(), data, SEQUENCE_LENGTH)


def train_all(classifier, options):
    """Trains an adapter for each task that there is data for; leaves the classifier as it was."""
    options.adapters.mkdir(parents=True, exist_ok=True)
    tasks = ["glue/sst2", "glue/rte"] if options.data_dir else []
    for task in [*tasks, "docstrings"]:
        data = load_text_data(task, options.data_dir, options.train_size)
        name = task.removeprefix("glue/")
        path = options.adapters / f"{name}{SUFFIX}"
        texts = counted(len(data.train_labels), "text")
        print(f"{name}: {texts}, {len(data.classes)} classes", flush=True)
        accuracy = train(classifier, data, options.epochs, path)
        print(f"{name}: held-out accuracy {accuracy:.3f}, wrote {path}", flush=True)


def train(classifier, data, epochs, path) -> float:
    """Trains one adapter into a file; returns its accuracy on the held-out texts."""
    if len(data.classes) > CLASSES:
        raise ValueError(f"A task may have {CLASSES} classes. Received: {len(data.classes)}")
    enable_dcft(classifier, kernel_size=8)
    steps = epochs * -(-len(data.train_labels) // BATCH)
    classifier.compile(
        optimizer=keras.optimizers.Adam(linear_decay(LEARNING_RATES["dcft"], steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    texts = batches(joined(data.train_texts), data.train_labels, BATCH, shuffle_seed=0)
    classifier.fit(texts, epochs=epochs, verbose=progress_verbosity())
    held_out = batches(joined(data.held_out_texts), data.held_out_labels, BATCH)
    accuracy = classifier.evaluate(held_out, verbose=0, return_dict=True)["accuracy"]
    save_dcft_weights(classifier, path, notes={"classes": data.classes, "accuracy": accuracy})
    remove_dcft(classifier)
    return accuracy


def joined(texts) -> list:
    """Pairs as one text, as a request has it."""
    return [text if isinstance(text, str) else " / ".join(text) for text in texts]


class Request(pydantic.BaseModel):
    """A text, and the adapter to read it with."""

    text: str
    adapter: str


class File(pydantic.BaseModel):
    """Where an adapter file is, on the server."""

    path: str


def make_app(bank, classes: dict) -> fastapi.FastAPI:
    """The server.

    Args:
        bank: `AdapterBank` of a classifier.
        classes: dict of adapters' names to the names of their classes.
    """
    waiting, adding = asyncio.Queue(), asyncio.Lock()

    @contextlib.asynccontextmanager
    async def lifespan(app):
        task = asyncio.create_task(answer_all(bank, waiting))
        yield
        task.cancel()

    app = fastapi.FastAPI(title="One base, many adapters", lifespan=lifespan)

    @app.get("/adapters")
    async def list_adapters():
        return {name: classes[name] for name in bank}

    @app.put("/adapters/{name}", status_code=201)
    async def add_adapter(name: str, file: File):
        async with adding:
            if name in bank:
                raise fastapi.HTTPException(409, f"There is an adapter '{name}' already.")
            try:
                notes = (await asyncio.to_thread(read_dcft_notes, file.path))["notes"]
                if "classes" not in notes:
                    raise ValueError("The notes in the file must have the names of its classes.")
                classes[name] = notes["classes"]
                await asyncio.to_thread(bank.add, name, file.path)
            except (ValueError, OSError) as error:
                classes.pop(name, None)
                raise fastapi.HTTPException(400, str(error)) from error
        return {"adapters": len(bank)}

    @app.delete("/adapters/{name}")
    async def remove_adapter(name: str):
        try:
            bank.remove(name)
        except ValueError as error:
            raise fastapi.HTTPException(404, str(error)) from error
        return {"adapters": len(bank)}

    @app.post("/predict")
    async def predict(request: Request):
        names = classes.get(request.adapter)
        answer = asyncio.get_running_loop().create_future()
        await waiting.put((request, answer))
        logits = await answer
        if names is None or logits is None:
            raise fastapi.HTTPException(404, f"There is no adapter '{request.adapter}'.")
        shares = np.exp(logits[: len(names)] - logits[: len(names)].max())
        shares = [round(float(share), 4) for share in shares / shares.sum()]
        return {"label": names[int(np.argmax(shares))], "shares": dict(zip(names, shares))}

    return app


async def answer_all(bank, waiting):
    """Answers what waits, as many requests at a time as there are, up to a batch."""
    while True:
        batch = [await waiting.get()]
        while len(batch) < BATCH and not waiting.empty():
            batch.append(waiting.get_nowait())
        try:
            rows = await asyncio.to_thread(predict_rows, bank, [request for request, _ in batch])
            answers = [(answer.set_result, row) for (_, answer), row in zip(batch, rows)]
        except Exception as error:  # is the answer to this batch, and the server goes on
            answers = [(answer.set_exception, error) for _, answer in batch]
        for (_, answer), (tell, what) in zip(batch, answers):
            if not answer.done():  # whoever asked may have left
                tell(what)


def predict_rows(bank, requests) -> list:
    """The logits of each request; None where its adapter is not there, or no longer."""
    while True:
        known = [request for request in requests if request.adapter in bank]
        if not known:
            return [None] * len(requests)
        try:
            # Few sizes, each of which is compiled once.
            more = (1 << (len(known) - 1).bit_length()) - len(known)
            texts = [request.text for request in known] + [""] * more
            logits = bank.predict(texts, [request.adapter for request in known] + [None] * more)
        except ValueError:
            if all(request.adapter in bank for request in known):
                raise
            continue  # one was removed a moment ago
        rows = {id(request): row for request, row in zip(known, logits)}
        return [rows.get(id(request)) for request in requests]


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "`shuffle=True` was passed")
    main()
