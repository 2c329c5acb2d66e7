"""Fixtures that several test files share."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from support import BAD, GOOD, THINGS
from tokenizers import BertWordPieceTokenizer, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForPreTraining,
    BertTokenizer,
    LlamaConfig,
    MptConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from extensions.prompts import CLOSE, prompt_text
from extensions.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
# The first words of the reason of every test that is skipped for lack of them -> what to do about it.
NO_DATA, NO_BROWSER = "no benchmark files", "no Chromium"
REMEDIES = {
    NO_DATA: "for lack of the benchmark files; set NLU_TEST_DATA to their folder",
    NO_BROWSER: "for lack of Chromium; install it, or run `playwright install chromium`",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# The tests' folders in memory, if it has room: to make and delete their thousands of small files takes a disk a minute.
MEMORY, ROOM = Path("/dev/shm"), 8 << 30
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# No deadline, which would fail tests on a busy machine; fixed examples, so that results are reproducible.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with `glue/` and `superglue/` in the official layout; tests that need it are skipped without it."""
    folder = Path(os.environ.get("NLU_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "glue").is_dir():
        pytest.skip(f"{NO_DATA}: {folder} holds no folder glue; set NLU_TEST_DATA to a folder that does")
    return folder


@pytest.fixture(scope="module")  # not longer: while it is open, asyncio.run fails in this process
def browser() -> Iterator[Any]:
    """Headless Chromium, of the machine or of playwright; tests that need it are skipped without one."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ModuleNotFoundError:
        pytest.skip(f"{NO_BROWSER}: playwright is not installed")
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, BROWSERS)), None)
        try:
            opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"{NO_BROWSER}: {path or 'none on PATH'} does not start ({error.message.splitlines()[0]})")
        yield opened
        opened.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason, remedy in REMEDIES.items():
        skipped = [r for r in terminalreporter.stats.get("skipped", []) if reason in str(r.longrepr)]
        if skipped:
            terminalreporter.write_line(f"{len(skipped)} tests skipped {remedy}", yellow=True)


def tiny_config(architecture: str, vocabulary: int) -> PretrainedConfig:
    """Two layers, hidden size 32, four heads."""
    shared = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    if architecture == "mpt":
        return MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=512, expansion_ratio=2, **shared)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[architecture](**sizes, **shared)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 400 tokens, trained on the prompts; `<eos>` is token 0, and there is no pad token."""
    corpus = [prompt_text(task, dict.fromkeys(task.fields, "The book was read by Anna.")) for task in TASKS.values()]
    corpus += [f"{word}{CLOSE}" for word in ("Yes", "No", "Positive", "Negative", "3.5", "0.0", "5.0")]
    corpus += ["Mary wrote a letter to the teacher last week.", "The children were happy, and nobody slept."]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def save_tiny_model(folder: Path, config: Callable[[int], PretrainedConfig]) -> None:
    """A random causal LM in float32 and its tokenizer, seeded.

    Args:
        config: makes the model's from the size of the vocabulary.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    # transformers 5.15 loads the tokenizers of some families by their own class, which would add tokens here.
    settings_file = folder / "tokenizer_config.json"
    saved = json.loads(settings_file.read_text(encoding="utf-8")) | {"pad_token": None, "unk_token": None}
    settings_file.write_text(json.dumps(saved, indent=2), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(len(tokenizer)), dtype=torch.float32)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model("llama" | "qwen2" | "mpt")`: folder of a random causal LM in float32 and its tokenizer, seeded."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            save_tiny_model(folder, lambda vocabulary: tiny_config(architecture, vocabulary))
            made[architecture] = folder
        return made[architecture]

    return make


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`family(model_type)`: a new folder with a tiny model of that architecture, of all that transformers has."""
    from architectures import quiet, save  # imports this module

    def make(model_type: str) -> Path:
        path = tmp_path_factory.mktemp(model_type)
        with quiet():
            save(model_type, path)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random BERT without dropout and its WordPiece tokenizer, seeded."""
    folder = tmp_path_factory.mktemp("bert")
    corpus = [prompt_text(task, dict.fromkeys(task.fields, "The book was read by Anna.")) for task in TASKS.values()]
    trainer = BertWordPieceTokenizer()
    trainer.train_from_iterator(
        [*corpus, *(" ".join(words) for words in (GOOD, BAD, THINGS))],
        vocab_size=400,
        min_frequency=1,
        show_progress=False,
    )
    tokenizer = BertTokenizer(vocab=trainer.get_vocab(), model_max_length=128)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForPreTraining(config).save_pretrained(folder)
    return folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as in a terminal: background jobs of a shell inherit it as ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
