"""Chat templates in the manner of well-known model families, written for these tests, and what they do to a conversation.

Each marks what transformers calls the assistant's part with `{% generation %}`; `plain` takes the marks out again, as
model folders have them. So transformers' own marking is the reference for our labels.
"""

from __future__ import annotations

import re
from typing import Any

# ids of these are control tokens in the tokenizer of `real_tokenizer`
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<bos>", "<eos>",
    "<start_of_turn>", "<end_of_turn>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
    "<｜User｜>", "<｜Assistant｜>",
)  # fmt: skip

_ANSWER = "{%- generation -%}{{- ANSWER -}}{%- endgeneration -%}"
_PROMPT = "{%- if add_generation_prompt -%}{{- 'START' -}}{%- endif -%}"


def _answer(expression: str) -> str:
    return _ANSWER.replace("ANSWER", expression)


def _prompt(start: str) -> str:
    return _PROMPT.replace("START", start)


CHATML = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}"
    "{%- if m.role == 'assistant' -%}" + _answer("m.content + '<|im_end|>'") + "{{- '\\n' -}}"
    "{%- else -%}{{- m.content + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}" + _prompt("<|im_start|>assistant\\n")
)

# puts a system message of its own where a row has none
QWEN2_5 = (
    "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nYou answer what you are asked.<|im_end|>\\n' -}}"
    "{%- endif -%}" + CHATML
)

# an empty thinking block before the last answer; the thinking of earlier answers is taken out
QWEN3 = (
    "{%- set ns = namespace(asked=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{%- set thought = '' -%}{%- set said = m.content -%}"
    "{%- if '</think>' in said -%}"
    "{%- set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if loop.index0 > ns.asked and (loop.last or thought) -%}"
    "{%- if thought -%}"
    + _answer("'<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') + '<|im_end|>'")
    + "{%- else -%}{{- '<think>\\n\\n</think>\\n\\n' -}}" + _answer("said.lstrip('\\n') + '<|im_end|>'") + "{%- endif -%}"
    "{%- else -%}" + _answer("said + '<|im_end|>'") + "{%- endif -%}{{- '\\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
    + _prompt("<|im_start|>assistant\\n")
)  # fmt: skip

LLAMA3 = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}"
    "{%- if m.role == 'assistant' -%}" + _answer("m.content | trim + '<|eot_id|>'") + "{%- else -%}"
    "{{- m.content | trim + '<|eot_id|>' -}}{%- endif -%}{%- endfor -%}"
    + _prompt("<|start_header_id|>assistant<|end_header_id|>\\n\\n")
)  # fmt: skip

# the system message is folded into the first user turn; spaces around the brackets
MISTRAL = (
    "{%- set system = '' -%}{%- set turns = messages -%}"
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content + '\\n\\n' -%}"
    "{%- set turns = messages[1:] -%}{%- endif -%}"
    "{{- bos_token -}}{%- for m in turns -%}"
    "{%- if m.role == 'user' -%}{{- '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' -}}" + _answer("m.content + eos_token") + "{%- endif -%}{%- endfor -%}"
)

# the assistant is called model; no system message
GEMMA = (
    "{{- bos_token -}}{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}"
    "{%- endif -%}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}{{- '<start_of_turn>model\\n' -}}"
    + _answer("m.content | trim + '<end_of_turn>'") + "{{- '\\n' -}}"
    "{%- else -%}{{- '<start_of_turn>user\\n' + m.content | trim + '<end_of_turn>\\n' -}}{%- endif -%}{%- endfor -%}"
    + _prompt("<start_of_turn>model\\n")
)  # fmt: skip

# an end token of the whole conversation behind the last turn's end
PHI3 = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>\\n' -}}"
    "{%- if m.role == 'assistant' -%}" + _answer("m.content + '<|end|>'") + "{{- '\\n' -}}"
    "{%- else -%}{{- m.content + '<|end|>\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- '<|endoftext|>' -}}{%- endif -%}"
)

# names of turns that are single tokens of unusual letters, no line breaks, thinking taken out of every answer
DEEPSEEK = (
    "{{- '<｜begin▁of▁sentence｜>' -}}{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- m.content -}}"
    "{%- elif m.role == 'user' -%}{{- '<｜User｜>' + m.content -}}"
    "{%- else -%}{%- set said = m.content -%}"
    "{%- if '</think>' in said -%}{%- set said = said.split('</think>')[-1] -%}{%- endif -%}"
    "{{- '<｜Assistant｜>' -}}" + _answer("said + '<｜end▁of▁sentence｜>'") + "{%- endif -%}{%- endfor -%}"
    + _prompt("<｜Assistant｜>")
)  # fmt: skip

FAMILIES = {
    "ChatML": CHATML,
    "Qwen2.5": QWEN2_5,
    "Qwen3": QWEN3,
    "Llama 3": LLAMA3,
    "Mistral": MISTRAL,
    "Gemma": GEMMA,
    "Phi-3": PHI3,
    "DeepSeek": DEEPSEEK,
}
_ENDS = {"Llama 3": ("<|begin_of_text|>", "<|eot_id|>"), "Mistral": ("<s>", "</s>"), "Gemma": ("<bos>", "<eos>")}


def plain(template: str) -> str:
    """The template as a model folder has it, without the marks around answers."""
    return re.sub(r"\{%- (end)?generation -%\}", "", template)


def real_tokenizer(family: str) -> Any:
    """Byte-level BPE with the control tokens of all families and the plain template of `family`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["system user assistant model", "<|im_ end|> <|eot_ id|>", "the the fox"], trainer)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    bos, eos = _ENDS.get(family, ("<s>", "<|im_end|>"))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    made.chat_template = plain(FAMILIES[family])
    return made


def marked_text(tokenizer: Any, template: str, messages: list[dict[str, str]]) -> tuple[str, str]:
    """(whole text, the assistants' parts joined) as transformers renders and marks them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (whole,), (spans,) = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
    )
    return whole, "".join(whole[start:stop] for start, stop in spans)
