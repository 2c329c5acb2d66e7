"""The code of the model card runs without this project."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest
from predict_cli import LABELS
from support import environment, run_command

from extensions.prompts import CLOSE

FORMS = [f" {{}} {CLOSE}", f" {{}}{CLOSE}", f"{{}} {CLOSE}", f"{{}}{CLOSE}"]


def card_blocks(adapter, language):
    text = (adapter / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)


def card_code(adapter):
    prompt, transformers_code, client = (code for _, code in card_blocks(adapter, "python"))
    return prompt, transformers_code, client


@pytest.mark.slow
def test_transformers_code(workspace, predictor, tmp_path):
    """The code runs unchanged in the adapter's folder, without this project."""
    folder = workspace / "run-sft" / "adapter"
    prompt, code, _ = card_code(folder)
    command = [sys.executable, "-P", "-c", f"{prompt}\n{code}\nimport sys\nassert 'extensions' not in sys.modules"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder)
    assert done.returncode == 0, done.stderr
    answer, confidence = done.stdout.split()
    (one,) = predictor.predict([{"subject": "your subject", "ticket body": "your ticket body"}])
    assert answer == one.answer and float(confidence) == pytest.approx(one.confidence, rel=1e-3)


def test_prompt_equals_that_of_the_training(workspace, predictor):
    prompt, _, _ = card_code(workspace / "run-sft" / "adapter")
    names = {}
    exec(prompt, names)
    row = {"subject": ' {body} \\ "', "ticket body": "a\nb {0} é"}
    task = predictor.manifest.task(None)
    fields = {"subject": row["subject"].strip(), "body": row["ticket body"]}
    assert names["prompt"](row) == predictor.encoder.encode(task, fields)[1]
    assert names["ANSWERS"] == LABELS
    assert names["FORMS"] == FORMS


class Stub(BaseHTTPRequestHandler):
    """Stands in for a vLLM server: answers with a form of the second word, without the stop string."""

    requests: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, self.headers["Content-Type"], body))
        text = body["structured_outputs"]["choice"][5].removesuffix(body["stop"][0])
        content = json.dumps({"choices": [{"text": text}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_client_code(workspace, predictor):
    folder = workspace / "run-sft" / "adapter"
    prompt, _, client = card_code(folder)
    server = HTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert "http://localhost:8000/v1/completions" in client
        code = f"{prompt}\n{client}".replace("localhost:8000", f"127.0.0.1:{server.server_port}")
        done = run_command([sys.executable, "-c", code])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Abuse/Spam\n"
    ((path, kind, body),) = Stub.requests
    assert path == "/v1/completions" and kind == "application/json"
    fields = {"subject": "your subject", "body": "your ticket body"}
    words = ("three", "abuse", "billing", "payment")
    longest = max(
        6, *(len(predictor.sampler.tokenizer(form.format(word))["input_ids"]) for word in words for form in FORMS)
    )
    assert body == {
        "model": "tiny",
        "prompt": predictor.encoder.encode(predictor.manifest.task(None), fields)[1],
        "temperature": 0,
        "max_tokens": longest,
        "structured_outputs": {"choice": [form.format(word) for word in words for form in FORMS]},
        "stop": [CLOSE],
    }


def test_commands(workspace, tiny_model):
    commands = [code for _, code in card_blocks(workspace / "run-sft" / "adapter", "bash")]
    assert commands == [
        "nlu predict . new.csv --out answers.csv --probabilities",
        f"vllm serve {tiny_model('llama')} --enable-lora --max-lora-rank 8 --lora-modules tiny=.",
        "nlu merge recipe.yaml merged model.adapter=adapter\nhf upload YOUR_NAME/tiny adapter --private",
    ]
