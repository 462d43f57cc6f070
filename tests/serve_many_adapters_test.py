"""The server of many adapters: answers, adapters that come and go, errors as JSON."""

import concurrent.futures
import subprocess
import sys

import numpy as np
import pytest
import serve_many_adapters as example
from conftest import ROOT
from fastapi.testclient import TestClient
from one_backend import only_on
from support.text_data import TextData
from tools import bert_classifier

from keras_dcft import AdapterBank
from keras_dcft.files import SUFFIX

TEXTS = ["a good film", "a bad film", "very good", "very very bad films"]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A client, the folder of two adapters that were trained, and what each says of the texts."""
    monkeypatch.setattr(example, "CLASSES", 2)
    model = bert_classifier()
    texts, labels = TEXTS * 8, [1, 0, 1, 0] * 8
    for name, of_name in {"mood": labels, "length": [0, 0, 0, 1] * 8}.items():
        data = TextData(texts, of_name, TEXTS, of_name[:4], classes=["no", "yes"])
        accuracy = example.train(model, data, 6, tmp_path / f"{name}{SUFFIX}")
        assert 0 <= accuracy <= 1
    names = ("mood", "length")
    bank = AdapterBank(model, {name: tmp_path / f"{name}{SUFFIX}" for name in names})
    logits = {name: bank.predict(TEXTS, [name] * len(TEXTS)) for name in names}
    app = example.make_app(bank, {name: ["no", "yes"] for name in bank})
    with TestClient(app) as client:
        yield client, tmp_path, logits
    bank.close()


def ask(client, text, adapter):
    return client.post("/predict", json={"text": text, "adapter": adapter})


@only_on("torch")
def test_a_mixed_stream_is_answered_and_adapters_come_and_go(served):
    client, folder, logits = served
    asked = [(name, number) for name in logits for number in range(len(TEXTS))] * 6
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda a: ask(client, TEXTS[a[1]], a[0]), asked))
    for (name, number), answer in zip(asked, answers):
        row = np.exp(logits[name][number] - logits[name][number].max())
        shares = list(answer.json()["shares"].values())
        np.testing.assert_allclose(shares, row / row.sum(), atol=2e-4)
        assert answer.json()["label"] == ["no", "yes"][int(row.argmax())]

    path = {"path": str(folder / f"mood{SUFFIX}")}
    assert client.get("/adapters").json() == {"mood": ["no", "yes"], "length": ["no", "yes"]}
    assert client.put("/adapters/copy", json=path).json() == {"adapters": 3}
    assert ask(client, "good", "copy").json() == ask(client, "good", "mood").json()
    assert client.put("/adapters/copy", json=path).status_code == 409
    assert client.delete("/adapters/copy").json() == {"adapters": 2}
    for answer in (client.delete("/adapters/copy"), ask(client, "good", "copy")):
        assert answer.status_code == 404
        assert "copy" in answer.json()["detail"]
    missing = client.put("/adapters/x", json={"path": f"none{SUFFIX}"})
    assert missing.status_code == 400
    assert "No such file" in missing.json()["detail"]
    assert client.post("/predict", json={"txt": "good"}).status_code == 422


@only_on("torch")
def test_a_wrong_folder_is_one_line(tmp_path):
    (tmp_path / f"a{SUFFIX}").write_bytes(b"nothing")
    program = ROOT / "examples" / "serve_many_adapters.py"
    result = subprocess.run(
        [sys.executable, program, "--adapters", tmp_path, "--preset", tmp_path / "none"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
