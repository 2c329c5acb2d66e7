"""Chat templates of known models, shortened by hand: system role, thinking blocks, options."""

import pytest
from transformers import AutoTokenizer

from extensions.common.errors import UserError
from extensions.prompts import CLOSE, OPEN, PromptEncoder, render
from extensions.prompts.chat_template import ChatTemplate, closing
from extensions.tasks import TASKS

COLA = TASKS["cola"]
FIELDS = {"sentence": "Mary slept."}
SYSTEM = render(COLA, FIELDS)[0].removeprefix("System_prompt:").strip()
QUESTION = 'Now judge if the sentence "Mary slept." is linguistically acceptable.'
OTHER = 'Now judge if the sentence "She slept." is linguistically acceptable.'

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nTAIL{% endif %}"
)
TURNS = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
RAISES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
DROPS = TURNS.replace("in messages %}", "in messages if m.role != 'system' %}")
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
INSIDE = (  # Llama 2: the system text is put into the first turn by the template itself
    "{% set system = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}"
    "[INST] {% if loop.first %}<<SYS>>{{ system }}<</SYS>>{% endif %}{{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model("llama"))


def text_of(tokenizer, template, shots=0, **options):
    tokenizer.chat_template = template
    encoder = PromptEncoder(tokenizer, 10**6, True, shots, {"cola": [({"sentence": "She slept."}, "Yes")]}, options)
    ids, text = encoder.encode(COLA, FIELDS)
    assert tokenizer.decode(ids) == text
    return text


# ------------------------------------------------------------------------------------------------------- system role


@pytest.mark.parametrize(
    ("template", "start", "middle", "end"),
    [
        (RAISES, "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
        (DROPS, "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
        (ALTERNATES, "[INST] ", " [/INST]", "</s>"),
    ],
    ids=["raises", "drops", "alternates"],
)
def test_without_a_system_role_the_first_turn_begins_with_the_system_text(tokenizer, template, start, middle, end):
    assert text_of(tokenizer, template) == f"{start}{SYSTEM}\n\n{QUESTION}{middle}{OPEN}"
    assert text_of(tokenizer, template, shots=1) == (
        f"{start}{SYSTEM}\n\n{OTHER}{middle}{OPEN} Yes {CLOSE}{end}{start}{QUESTION}{middle}{OPEN}"
    )


def test_a_template_with_a_system_role_keeps_it(tokenizer):
    assert text_of(tokenizer, CHATML.replace("TAIL", "")) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{OPEN}"
    )
    assert text_of(tokenizer, INSIDE) == f"[INST] <<SYS>>{SYSTEM}<</SYS>>{QUESTION} [/INST]{OPEN}"


def test_the_system_role_is_probed_once(tokenizer, monkeypatch):
    tokenizer.chat_template = RAISES
    calls = []
    plain = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(1) or plain(*a, **k))
    encoder = PromptEncoder(tokenizer, 10**6, True)
    before = len(calls)
    for k in range(1, 5):
        encoder.encode(COLA, FIELDS)
        assert len(calls) == before + k


def test_a_template_that_refuses_any_prompt_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('tools are needed') }}"
    with pytest.raises(UserError, match=r"prompt\.chat_template: true.*tools are needed.*prompt\.template_options"):
        PromptEncoder(tokenizer, 10**6, True).encode(COLA, FIELDS)


def test_a_template_that_omits_the_text_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"prompt\.chat_template: true.*omits the text"):
        PromptEncoder(tokenizer, 10**6, True)


# --------------------------------------------------------------------------------------------------- thinking blocks


@pytest.mark.parametrize(
    ("tail", "closed"),
    [
        ("<think>\n", "\n</think>\n\n"),  # DeepSeek-R1, Qwen3-Thinking
        ("<think>\n\n", "\n</think>\n\n"),
        ("<think>", "</think>"),  # DeepSeek-V3.1
        ("<thinking>\n", "\n</thinking>\n\n"),
        ("<thought>", "</thought>"),
        ("<reasoning>\n", "\n</reasoning>\n\n"),
        ("[THINK]", "[/THINK]"),  # Magistral
        ("<seed:think>", "</seed:think>"),  # Seed-OSS
        ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi
        ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
        ("<|begin_of_thought|>\n", "\n<|end_of_thought|>\n\n"),
        ("<think_start>", "<think_end>"),
        ("<|channel>thought\n", "<channel|>"),  # Gemma 4
        # closed, or no thinking block
        ("", ""),
        ("<think>\n\n</think>\n\n", ""),
        ("[THINK][/THINK]", ""),
        ("<|START_THINKING|><|END_THINKING|>", ""),
        ("<|channel>thought\n<channel|>", ""),
        ("<no_think>", ""),
        ("<think>\nDone.\n</think>\n", ""),
        ("<answer>\n", ""),
        ("[/INST]", ""),
        ("think>", ""),
    ],
)
def test_a_prompt_never_ends_in_an_open_thinking_block(tokenizer, tail, closed):
    assert closing(f"<|im_start|>assistant\n{tail}") == closed
    assert closing(f"{tail}{closed}") == ""
    assert text_of(tokenizer, CHATML.replace("TAIL", tail)).endswith(
        f"<|im_end|>\n<|im_start|>assistant\n{tail}{closed}{OPEN}"
    )


QWEN3 = CHATML.replace(
    "TAIL", "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
DEEPSEEK_31 = CHATML.replace("TAIL", "{% if thinking %}<think>{% else %}</think>{% endif %}")


def test_thinking_is_off_unless_the_recipe_says_otherwise(tokenizer):
    assert text_of(tokenizer, QWEN3).endswith(f"assistant\n<think>\n\n</think>\n\n{OPEN}")
    assert text_of(tokenizer, QWEN3, enable_thinking=True).endswith(f"<|im_start|>assistant\n{OPEN}")
    assert text_of(tokenizer, DEEPSEEK_31).endswith(f"assistant\n</think>{OPEN}")
    assert text_of(tokenizer, DEEPSEEK_31, thinking=True).endswith(f"assistant\n<think></think>{OPEN}")


HARMONY = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}<|end|>"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>"
    "{% else %}<|start|>{{ 'developer' if m.role == 'system' else m.role }}<|message|>{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def test_harmony_gets_its_final_channel(tokenizer):
    answered = f"<|start|>assistant<|channel|>final<|message|>{OPEN}"
    question = f"<|start|>user<|message|>{QUESTION}<|end|>{answered}"
    developer = f"<|start|>developer<|message|>{SYSTEM}<|end|>"
    assert text_of(tokenizer, HARMONY) == f"<|start|>system<|message|>Reasoning: medium<|end|>{developer}{question}"
    assert text_of(tokenizer, HARMONY, shots=1, reasoning_effort="low") == (
        f"<|start|>system<|message|>Reasoning: low<|end|>{developer}"
        f"<|start|>user<|message|>{OTHER}<|end|>{answered} Yes {CLOSE}<|end|>{question}"
    )
    other = HARMONY.replace("<|channel|>final", "")
    assert text_of(tokenizer, other).endswith(f"<|start|>assistant{OPEN}"), "this template has no channels"


def test_the_tag_that_closes_a_thinking_block_is_a_control_token(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML.replace("TAIL", "<think>")
    encoder = PromptEncoder(tokenizer, 10**6, True)
    begun = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    last = tokenizer(OPEN)["input_ids"]
    for sentence in ("Mary slept.", "Mary <|im_end|> slept.", "<think></think>"):
        ids, _ = encoder.encode(COLA, {"sentence": sentence})
        assert ids[-2 - len(last) :] == [*begun, *last]
        assert [ids.count(token) for token in begun] == [1, 1]


def test_a_template_that_changes_its_messages_is_rendered_as_it_is(tokenizer):
    """If the data hold control tokens, the text is composed of pieces of the template: the same text."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    for template in (CHATML.replace("TAIL", ""), RAISES, DROPS, ALTERNATES, INSIDE, HARMONY):
        tokenizer.chat_template = template
        one = ChatTemplate(tokenizer, {})
        turns = ("a <|im_end|> b", "c", "d")
        ids, text = one.encode("system", turns, OPEN)
        assert text == f"{one.render('system', turns)}{OPEN}"
        assert tokenizer.decode(ids) == text
