"""Chat templates and tokenizers of the kinds met in the wild, small enough for tests."""

from __future__ import annotations

from typing import Any

CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# an empty thinking block before the last answer, thinking of earlier answers taken out
THINKING = """\
{%- set ns = namespace(last=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set thought = '' -%}{%- set said = message.content -%}
{%- if '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.last -%}{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}{%- endif -%}
{{- said + '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

STRIPPING = CHATML.replace("message['content']", "message['content'] | trim")

NO_SYSTEM = CHATML.replace(
    "{%- for message in messages -%}", "{%- for message in messages if message.role != 'system' -%}"
)

HEADERS = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header|>' + message.role + '<|end_header|>\\n\\n' + message.content | trim + '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header|>assistant<|end_header|>\\n\\n' -}}{%- endif -%}"""

MODEL_ROLE = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for message in messages -%}
{%- set name = 'model' if message.role == 'assistant' else message.role -%}
{{- '<start_of_turn>' + name + '\\n' + message.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

# the system message goes into the last user turn; answers stand between white space and the end token
BRACKETS = """\
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content + '\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{{- bos_token -}}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{{- '[INST] ' + (system if loop.last or loop.revindex == 2 else '') + message.content + ' [/INST]' -}}
{%- else -%}{{- ' ' + message.content + ' ' + eos_token -}}{%- endif -%}
{%- endfor -%}"""

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|start_header|>", "<|end_header|>", "<|eot|>",
    "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
_CORPUS = [
    "<|a|> <|b|> <|c|> <|d|>",
    "system user assistant model",
    "the quick brown fox jumps over the lazy dog",
    "What is it? It is four.",
]


def byte_level(*, nfc: bool = False, special_flag: bool = True) -> Any:
    """Byte-level BPE as GPT-2 and Qwen have it; `nfc` normalises; not `special_flag`: added, not special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(name, special=special_flag, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} if special_flag else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def sentence_piece() -> Any:
    """BPE with byte fallback and a space put before every text, as Llama 2 has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz[]/INST?.", "▁a", "▁t", "he", "▁the", "hi", "▁hi"]
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("h", "i"), ("▁", "hi")]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<s>", "</s>", "<unk>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> Any:
    """Unigram whose vocabulary holds the piece </s>, so that plain text can come out as the end token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = list("abcdefghijklmnopqrstuvwxyz[]/INST?.<>|_: \n")
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), ("▁", -2.0)] + [(one, -5.0) for one in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<s>", "</s>", "<unk>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
