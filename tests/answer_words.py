"""The answer words of every built-in task and their labels, copied by hand from the prompts and the data sets."""

from extensions.tasks import TASKS, Task

COLA, STSB = TASKS["cola"], TASKS["stsb"]

# Copied by hand from the prompts and the data sets: the label of each answer word.
YES_NO, TRUE_FALSE = {"yes": "1", "no": "0"}, {"yes": "true", "no": "false"}
ACCEPTABLE = {"acceptable": "1", "not acceptable": "0", "unacceptable": "0"}
SENTIMENT = {"positive": "1", "negative": "0"}
ENTAILED = {"yes": "entailment", "entailment": "entailment"}
NOT_ENTAILED = dict.fromkeys(["no", "not entailment", "not_entailment"], "not_entailment")
THREE_WAYS = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}
KEYWORDS = {
    **dict.fromkeys(["acceptability", "cola"], YES_NO | ACCEPTABLE),
    **dict.fromkeys(["reviews", "sst2"], SENTIMENT),
    **dict.fromkeys(["qqp", "mrpc", "wnli"], YES_NO),
    **dict.fromkeys(["rte", "superglue_rte", "axb", "axg"], ENTAILED | NOT_ENTAILED),
    **dict.fromkeys(["mnli", "mnli_mm", "ax", "cb"], THREE_WAYS),
    **dict.fromkeys(["boolq", "record", "wic", "wsc"], TRUE_FALSE),
    "qnli": {"yes": "entailment", "no": "not_entailment"},
    "copa": {"first": "0", "second": "1"},
    "multirc": {"true": "1", "false": "0"},
    "stsb": {},
}
# The words that the prompts ask for; tasks of one group are parsed alike.
GROUPS = {
    "acceptability": (["Yes", "No"], ["acceptability", "cola"]),
    "sentiment": (["Positive", "Negative"], ["reviews", "sst2"]),
    "yes or no": (["Yes", "No"], ["qqp", "mrpc", "wnli", "qnli", "boolq", "record", "wic", "wsc"]),
    "entailment": (["Yes", "No"], ["rte", "superglue_rte", "axb", "axg"]),
    "three ways": (["entailment", "neutral", "contradiction"], ["mnli", "mnli_mm", "ax", "cb"]),
    "choice": (["First", "Second"], ["copa"]),
    "truth": (["True", "False"], ["multirc"]),
}


def own_task(**keys):
    """A task by the keyword rule, with labels of its own."""
    entry = {"name": "own", "description": "Judge the text.", "question": 'Judge "{text}".', "labels": ["good", "bad"]}
    return Task.model_validate(entry | ({} if "score_range" in keys else {"answer_match": "keyword"}) | keys)


def wide(word):
    return "".join(chr(ord(letter) + 0xFEE0) for letter in word)
