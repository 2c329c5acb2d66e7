"""Inputs, weights and predictions of an encoder."""

import math

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT
from transformers import (
    BertForPreTraining,
    BertTokenizer,
)

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.encoder.model import SegmentCollator, load_collator, load_encoder, predictions_of, segments
from extensions.recipe import Model
from extensions.tasks import TASKS


def example(task, label=None, **fields):
    return Example(TASKS[task] if isinstance(task, str) else task, 0, fields, label)


@pytest.mark.parametrize(
    "row, expected",
    [
        (example("sst2", sentence="a"), ("a", None)),
        (example("rte", sentence1="a", sentence2="b"), ("a", "b")),
        (example("boolq", passage="a", question="b"), ("a", "b")),
        (example("copa", question="cause", premise="a", choice1="b", choice2="c"), ("a", "cause [SEP] b [SEP] c")),
        (example("wic", word="w", sentence1="a", sentence2="b"), ("a", "w [SEP] b")),
        (example("multirc", passage="p", question="q", answer="a"), ("p", "a [SEP] q")),
    ],
    ids=lambda value: value.task.name if isinstance(value, Example) else "",
)
def test_the_long_text_is_the_first_segment(row, expected):
    assert segments(row, "[SEP]") == expected


def test_only_the_long_text_is_truncated(loaded):
    rows = [example("copa", question="cause", premise="the book " * 30, choice1="anna", choice2="the city")]
    (ids,) = SegmentCollator(loaded.tokenizer, 24)(rows)["input_ids"].tolist()
    text = loaded.tokenizer.decode(ids)
    assert len(ids) == 24 and text.endswith("[SEP] cause [SEP] anna [SEP] the city [SEP]")
    assert text.startswith("[CLS] the book the book") and text.count("[SEP]") == 4
    warnings = []
    SegmentCollator(loaded.tokenizer, 24).check_lengths(rows, "training rows", warnings.append)
    (line,) = warnings
    assert "1 training rows are cut to 24 tokens" in line and f"of row {rows[0].index} (" in line


def test_a_batch_is_padded_to_its_longest_row_and_labelled(loaded):
    rows = [example("mnli", "neutral", sentence1="the book", sentence2="anna")]
    rows += [example("mnli", "entailment", sentence1="the book was read by anna", sentence2="anna")]
    batch = loaded(rows)
    assert batch["labels"].tolist() == [list(TASKS["mnli"].labels).index(row.label) for row in rows]
    lengths = [len(loaded.tokenizer(*segments(row, "[SEP]"))["input_ids"]) for row in rows]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths and batch["input_ids"].shape[1] == max(lengths)
    scores = loaded([example("stsb", "3.8", sentence1="a", sentence2="b")])["labels"]
    assert scores.dtype == torch.float32 and scores.tolist() == pytest.approx([3.8])
    assert "labels" not in loaded([example("stsb", sentence1="a", sentence2="b")])


def test_a_question_that_leaves_no_room_is_an_error(loaded):
    row = example("boolq", passage="the book", question="the city " * 8)
    needed = len(loaded.tokenizer("", row.fields["question"])["input_ids"]) + 1
    SegmentCollator(loaded.tokenizer, needed).check([row])
    SegmentCollator(loaded.tokenizer, needed)([row])
    with pytest.raises(
        UserError, match=rf"max_tokens: {needed - 1} .*boolq: only passage .*question .* {needed} tokens"
    ):
        SegmentCollator(loaded.tokenizer, needed - 1).check([row])


def test_class_order_follows_the_trained_task():
    row = example("ax", "neutral", sentence1="a", sentence2="b")
    labels = ["contradiction", "entailment", "neutral"]  # not the task's own order
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0], [0.0, 0.0, 0.5]])
    found = predictions_of(labels, [row] * 3, logits)
    assert [p.answer for p in found] == ["entailment", "contradiction", "neutral"] == [p.likelihood for p in found]
    assert [p.response for p in found] == [TASKS["ax"].answer(str(p.answer)) for p in found]
    assert {(p.task, p.gold, p.positive_probability) for p in found} == {("ax", "neutral", None)}
    first = found[0].probabilities
    assert first == pytest.approx(dict(zip(labels, [0.0420, 0.8438, 0.1142], strict=True)), abs=1e-4)  # softmax 0 3 1


def test_scores_are_clipped_to_their_range():
    found = predictions_of([], [example("stsb")] * 3, torch.tensor([[-0.7], [2.25], [9.0]]))
    assert [(p.answer, p.response) for p in found] == [(0.0, "0.000"), (2.25, "2.250"), (5.0, "5.000")]


def test_candidates_have_the_probability_of_the_positive_label():
    labels = list(TASKS["record"].labels)
    logits = [0.0, 0.0]
    logits[labels.index("true")] = 1.5
    (found,) = predictions_of(labels, [example("record", "true")], torch.tensor([logits]))
    assert found.answer == "true" and found.positive_probability == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert found.positive_log_odds == pytest.approx(1.5)
    assert found.probabilities["false"] == pytest.approx(1 / (1 + math.exp(1.5)))


def test_non_finite_outputs_stop_the_run():
    with pytest.raises(UserError, match=r"stsb .*lower encoder\.lr"):
        predictions_of([], [example("stsb")], torch.tensor([[math.nan]]))


def test_a_decoder_is_refused(tiny_model):
    with pytest.raises(UserError, match=r"model\.path: .*is a llama model and no encoder.*launch/ppo\.sh"):
        load_collator(Model(path=str(tiny_model("llama"))), None)


def test_a_tokenizer_without_separator_is_refused(tiny_bert, tmp_path):
    BertForPreTraining.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    tokenizer = BertTokenizer.from_pretrained(tiny_bert)
    tokenizer.sep_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.path: the tokenizer of .* has no sep_token"):
        load_collator(Model(path=str(tmp_path)), None)


@pytest.mark.parametrize(
    "keys, max_tokens, part",
    [
        ({"path": "extensions"}, None, r"model\.path: cannot load 'extensions'"),
        ({}, 129, r"encoder\.max_tokens: 129 is more than the 128"),
        ({"adapter": "runs/x/adapter"}, None, r"model\.adapter: runs/x/adapter does not go with encoders"),
    ],
    ids=["no model", "too long", "adapter"],
)
def test_unsuitable_models(tiny_bert, keys, max_tokens, part, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=part):
        load_collator(Model(**{"path": str(tiny_bert)} | keys), max_tokens)


def test_a_folder_without_weights_is_refused(tiny_bert, tmp_path):
    (tmp_path / "config.json").write_text((tiny_bert / "config.json").read_text())
    with pytest.raises(UserError, match=r"model\.path: cannot load .*safetensors"):
        load_encoder(Model(path=str(tmp_path)), TASKS["cb"], 0)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_encoder_comes_from_the_file_and_the_head_is_fresh(tiny_bert, tmp_path):
    first = load_encoder(Model(path=str(tiny_bert)), TASKS["mnli"], seed=1)
    pretrained = load_file(tiny_bert / "model.safetensors")
    body = {name: tensor for name, tensor in state(first).items() if name.startswith("bert.")}
    assert len(body) > 30 and all(torch.equal(tensor, pretrained[name]) for name, tensor in body.items())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.5)  # simulates training
    first.save_pretrained(tmp_path)

    second = state(load_encoder(Model(path=str(tiny_bert)), TASKS["cb"], 1, tmp_path))
    assert all(torch.equal(second[name], tensor) for name, tensor in state(first).items() if name in body)
    assert second["classifier.weight"].shape == first.classifier.weight.shape  # CB has as many labels as MNLI
    unstarted = state(load_encoder(Model(path=str(tiny_bert)), TASKS["cb"], 1))
    assert torch.equal(second["classifier.weight"], unstarted["classifier.weight"])
    assert not torch.equal(second["classifier.weight"], first.classifier.weight)
    other_seed = state(load_encoder(Model(path=str(tiny_bert)), TASKS["cb"], 2))
    assert not torch.equal(second["classifier.weight"], other_seed["classifier.weight"])


def test_the_head_fits_the_task(tiny_bert):
    model = load_encoder(Model(path=str(tiny_bert)), TASKS["cb"], 0)
    assert model.config.id2label == dict(enumerate(TASKS["cb"].labels)) and model.num_labels == 3
    assert model.config.problem_type == "single_label_classification" and model.dtype == torch.float32
    score = load_encoder(Model(path=str(tiny_bert)), TASKS["stsb"], 0)
    assert score.num_labels == 1 and score.config.problem_type == "regression"
