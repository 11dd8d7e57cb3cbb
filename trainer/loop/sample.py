"""What the model answers now: greedy, with the profile's processors, limited in tokens and seconds, the raw text."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList


class _Limit(StoppingCriteria):
    """Ends generation at a time or when asked to; checked after each token."""

    def __init__(self, seconds: float, interrupt: Callable[[], bool]) -> None:
        self._deadline = time.monotonic() + seconds
        self._interrupt = interrupt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        over = time.monotonic() > self._deadline or self._interrupt()
        return torch.full((input_ids.shape[0],), over, dtype=torch.bool, device=input_ids.device)


def ends(trained: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end an answer: the tokenizer's and the model's own (Gemma ends a turn with another than its eos)."""
    named = getattr(trained, "generation_config", None)
    own = named.eos_token_id if named is not None else None
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(found) or None


def answer(
    trained: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    processors: list[Any],
    *,
    device: str,
    max_tokens: int,
    max_s: float,
    autocast: torch.dtype | None = None,
    base: bool = False,
    interrupt: Callable[[], bool] = lambda: False,
) -> str:
    """Text that follows the token ids `prompt`, special tokens shown; `base` answers with the adapter switched off."""
    was_training = trained.training
    trained.eval()
    off: AbstractContextManager = nullcontext()
    if base and isinstance(trained, PeftModel):
        off = trained.disable_adapter()
    precision = torch.autocast(device.split(":")[0], autocast) if autocast is not None else nullcontext()
    ids = torch.tensor([prompt], device=device)
    try:
        with torch.no_grad(), off, precision:
            out = trained.generate(  # type: ignore[operator]  # nn.Module's hint knows no generate
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                use_cache=True,
                logits_processor=LogitsProcessorList(processors),
                pad_token_id=tokenizer.pad_token_id or 0,
                eos_token_id=ends(trained, tokenizer),
                stopping_criteria=StoppingCriteriaList([_Limit(max_s, interrupt)]),
                temperature=None,
                top_p=None,
                top_k=None,
            )
    finally:
        trained.train(was_training)
    return str(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=False, clean_up_tokenization_spaces=False))
