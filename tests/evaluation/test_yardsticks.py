"""Yardsticks against plain scikit-learn pipelines, and the rows that they are trained on."""

import json

import numpy as np
import pytest
import torch
from official import write_benchmarks
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score, log_loss
from sklearn.multiclass import OneVsRestClassifier

from extensions.data import Example, load_examples
from extensions.distributed import signals
from extensions.evaluation import yardsticks
from extensions.evaluation.yardsticks import compute_yardsticks
from extensions.model import sentence_encoder
from extensions.model.packages import SENTENCE_ENCODER, install_command
from extensions.tasks import TASKS, Task


class OneRank:
    """Stands in for a strategy of one rank; stops after some pieces of work."""

    device = torch.device("cpu")

    def __init__(self, pieces=None):
        self.left = pieces

    def is_rank_0(self):
        return True

    def gather(self, item):
        return [item]

    def stopping(self):
        self.left = None if self.left is None else self.left - 1
        return self.left == 0


def task(**keys):
    base = {"name": "mine", "description": "-", "question": "{title} {body}"}
    return Task.model_validate(base | keys)


KINDS = {
    "classification": task(labels=["a", "b", "c"]),
    "multi-label": task(labels=["a", "b", "c"], multi_label=True),
    "regression": task(score_range=[0, 5]),
}
WORDS = {"a": ("apple", "pear", "plum"), "b": ("car", "bus", "tram"), "c": ("red", "green", "blue!")}


def rows(of, count, seed):
    """Rows whose words depend on their labels, with some noise."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        several = of.multi_label and rng.random() < 0.5
        labels = rng.choice(["a", "b", "c"], 2 if several else 1, replace=False)
        words = [str(rng.choice(WORDS[label])) for label in (rng.choice(["a", "b", "c"]), *labels)]
        words += [words[0]] * int(rng.integers(2))
        gold = of.join_labels(labels) if of.multi_label else str(labels[0])
        if of.is_regression:
            gold = str(float("abc".index(labels[0])) + rng.integers(2))
        made.append(Example(of, i, {"title": words[0], "body": f"the {' '.join(words[1:])} was it"}, gold))
    return made


def features(train, table):
    """TF-IDF of each field, side by side."""
    blocks = []
    for field in ("title", "body"):
        vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]")
        blocks.append([vectorizer.fit_transform([r.fields[field] for r in train])])
        blocks[-1].append(vectorizer.transform([r.fields[field] for r in table]))
    return [sparse.hstack(part) for part in zip(*blocks, strict=True)]


def test_a_classification_equals_a_plain_pipeline():
    own = KINDS["classification"]
    train, table = rows(own, 60, 1), rows(own, 40, 2)
    found = compute_yardsticks([own], train, table, 0, OneRank())
    known, new = features(train, table)
    model = LogisticRegression(C=10, max_iter=1000).fit(known, [r.label for r in train])
    golds, answers = [r.label for r in table], model.predict(new)
    result = found["tfidf"]["mine"]
    assert result["score"] == accuracy_score(golds, answers) < 1
    assert result["metrics"]["f1_macro"] == pytest.approx(f1_score(golds, answers, average="macro"))
    assert result["calibration"]["log_loss"] == pytest.approx(log_loss(golds, model.predict_proba(new)), rel=1e-6)
    assert result["train_rows"] == 60 and result["seconds"] > 0
    counts = {label: sum(r.label == label for r in train) for label in "abc"}
    frequent = max(counts, key=counts.get)
    assert found["majority"]["mine"]["score"] == sum(r.label == frequent for r in table) / 40
    shares = [[counts[label] / 60 for label in "abc"]] * 40
    assert found["majority"]["mine"]["calibration"]["log_loss"] == pytest.approx(log_loss(golds, shares))
    json.dumps(found, allow_nan=False)


def test_a_multi_label_task_has_one_classifier_per_label():
    own = KINDS["multi-label"]
    train, table = rows(own, 60, 1), rows(own, 40, 2)
    found = compute_yardsticks([own], train, table, 0, OneRank())

    def indicators(part):
        return np.array([[label in own.split_labels(r.label) for label in own.labels] for r in part], dtype=int)

    known, new = features(train, table)
    model = OneVsRestClassifier(LogisticRegression(C=10, max_iter=1000)).fit(known, indicators(train))
    micro = f1_score(indicators(table), model.predict(new), average="micro")
    assert micro < 1 and found["tfidf"]["mine"]["metrics"]["f1_micro"] == pytest.approx(micro)


def test_a_regression_is_by_ridge_within_the_range():
    own = KINDS["regression"]
    train, table = rows(own, 60, 1), rows(own, 40, 2)
    found = compute_yardsticks([own], train, table, 0, OneRank())
    known, new = features(train, table)
    golds = np.array([float(r.label) for r in table])
    given = np.array([float(r.label) for r in train])
    answers = Ridge().fit(known, given).predict(new).clip(0, 5)
    assert found["tfidf"]["mine"]["metrics"]["pearson"] == pytest.approx(np.corrcoef(golds, answers)[0, 1])
    assert found["majority"]["mine"]["metrics"]["mae"] == pytest.approx(np.abs(golds - given.mean()).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_training_rows_of_a_single_label(kind):
    own = KINDS[kind]
    train = [r for r in rows(own, 60, 1) if r.label == rows(own, 60, 1)[0].label]
    found = compute_yardsticks([own], train, rows(own, 20, 2), 0, OneRank())
    assert found["tfidf"]["mine"]["score"] == found["majority"]["mine"]["score"]


def test_blank_fields_are_left_out():
    own = KINDS["classification"]
    train, table = rows(own, 60, 1), rows(own, 20, 2)
    for row in train:
        row.fields["title"] = ""
    assert compute_yardsticks([own], train, table, 0, OneRank())["tfidf"]["mine"]["score"] > 0.4
    for row in train:
        row.fields["body"] = " "
    assert "tfidf" not in compute_yardsticks([own], train, table, 0, OneRank())


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.mark.parametrize("suite, names", [("glue", ["mnli", "mnli_mm", "stsb"]), ("superglue", ["multirc", "record"])])
def test_benchmark_tasks(benchmarks, suite, names):
    """An evaluation-only task has the training rows of its `train_task`."""
    tasks, root = [TASKS[name] for name in names], str(benchmarks / suite)
    train = [e for one in tasks if one.name != "mnli_mm" for e in load_examples(one, "train", root)]
    table = [e for one in tasks for e in load_examples(one, "validation", root)]
    found = compute_yardsticks(tasks, train, table, 0, OneRank())
    for results in found.values():
        assert list(results) == names
        for one in tasks:
            result = results[one.name]
            assert result["samples"] == sum(e.task.name == one.name for e in table)
            assert set(one.metrics) <= result["metrics"].keys()
            assert result["format_error_rate"] == (None if one.is_ranked else 0)
            assert result["train_rows"] == sum(e.task.name in (one.name, one.train_task) for e in train)


def test_no_training_rows_no_yardstick():
    own = KINDS["classification"]
    assert compute_yardsticks([own], [], rows(own, 20, 2), 0, OneRank()) == {}


def test_many_rows_are_sampled(monkeypatch):
    monkeypatch.setattr(yardsticks, "MAX_TRAIN_ROWS", 30)
    own = KINDS["classification"]
    found = compute_yardsticks([own], rows(own, 60, 1), rows(own, 20, 2), 0, OneRank())
    assert [found[kind]["mine"]["train_rows"] for kind in ("majority", "tfidf")] == [60, 30]
    assert found["tfidf"]["mine"]["run_rows"] == 60


def test_a_stop_request_ends_the_work():
    own = KINDS["classification"]
    with pytest.raises(signals.Stopped):
        compute_yardsticks([own], rows(own, 60, 1), rows(own, 20, 2), 0, OneRank(pieces=1))


def test_sentence_embeddings_are_masked_means(tiny_bert, monkeypatch):
    """A batch of texts of unequal length equals each text alone; the features of two fields hold both."""
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setattr(yardsticks, "encoder_folder", lambda: tiny_bert)
    monkeypatch.setattr(sentence_encoder, "BATCH_TOKENS", 40)  # several batches
    own = KINDS["classification"]
    train, table = rows(own, 30, 1), rows(own, 10, 2)
    work = yardsticks._embeddings(train, table, OneRank.device)
    with pytest.raises(StopIteration) as end:
        while True:
            next(work)
    known, new = end.value.value
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()

    def vector(text):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return (states.mean(0) / states.mean(0).norm()).numpy()

    for row, got in zip([*train, *table], [*known, *new], strict=True):
        u, v = vector(row.fields["title"]), vector(row.fields["body"])
        assert got == pytest.approx(np.concatenate([u, v, abs(u - v), u * v]), abs=1e-5)
    assert "embeddings" in compute_yardsticks([own], train, table, 0, OneRank())


def test_without_the_package_there_are_no_embeddings(monkeypatch):
    monkeypatch.setattr(sentence_encoder, "SENTENCE_ENCODER", "no-such-package")
    assert sentence_encoder.encoder_folder() is None


def test_the_packaged_encoder_embeds_by_meaning():
    """The cosine similarities of the example in the quickstart of sentence-transformers' documentation (sbert.net)."""
    if (folder := sentence_encoder.encoder_folder()) is None:
        pytest.skip(f"needs the sentence encoder: {install_command(SENTENCE_ENCODER)}")
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    work = sentence_encoder.embed(texts, folder, OneRank.device)
    with pytest.raises(StopIteration) as end:
        while True:
            next(work)
    found = end.value.value @ end.value.value.T
    assert found[0].tolist() == pytest.approx([1.0000, 0.6660, 0.1046], abs=1e-4)
