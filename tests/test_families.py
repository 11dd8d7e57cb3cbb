"""Two dozen more families: loss and whole gradient equal transformers' own, whatever way the one-row check chose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf

from tests.exact import SIZES, VOCABULARY, build, reference, relative_difference
from tests.memory_rows import random_rows
from tests.tiny import tiny_tokenizer
from trainer.data.loader import assemble
from trainer.loop.forward import choose_path, losses
from trainer.models import attention
from trainer.models.load import load_model
from trainer.refusal import Refusal

HEAD = dict(head_dim=8)
EQUAL_HEADS = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
SMALL_EXPERTS = dict(**EXPERTS, moe_intermediate_size=32)
OLD = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2)
OLD |= dict(resid_pdrop=0, attn_pdrop=0, embd_pdrop=0)
WINDOWED = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])

# the way each must take: "one row at a time" is right for what carries one row into the next, and slow for anything else
FUSED = {
    "cohere2": hf.Cohere2Config(**SIZES, logit_scale=0.0625, **WINDOWED),
    "deepseek v3": hf.DeepseekV3Config(
        **(SIZES | {"num_key_value_heads": 4}),
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_shared_experts=1,
    ),
    "exaone4": hf.Exaone4Config(**SIZES, **WINDOWED),
    "gemma": hf.GemmaConfig(**SIZES, **HEAD),
    "gemma3": hf.Gemma3TextConfig(**SIZES, **HEAD, **WINDOWED),
    "glm": hf.GlmConfig(**SIZES, **HEAD),
    "glm4": hf.Glm4Config(**SIZES, **HEAD),
    "gpt-bigcode": hf.GPTBigCodeConfig(**OLD),
    "gpt-j": hf.GPTJConfig(**OLD, rotary_dim=8),
    "gpt-neo": hf.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=256,
        resid_dropout=0,
        embed_dropout=0,
        attention_dropout=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt-neox": hf.GPTNeoXConfig(**EQUAL_HEADS),
    "gpt-oss with sinks": hf.GptOssConfig(
        **SIZES,
        **HEAD,
        **WINDOWED,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default"},
    ),
    "granite-moe": hf.GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, logits_scaling=4.0),
    "mixtral": hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "olmo": hf.OlmoConfig(**SIZES),
    "olmo2": hf.Olmo2Config(**SIZES),
    "olmoe": hf.OlmoeConfig(**SIZES, **EXPERTS),
    "opt": hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
        dropout=0,
    ),
    "phi": hf.PhiConfig(**SIZES, resid_pdrop=0),
    "phi3": hf.Phi3Config(**SIZES),
    "qwen2": hf.Qwen2Config(**SIZES),
    "qwen2-moe": hf.Qwen2MoeConfig(**SIZES, **SMALL_EXPERTS, shared_expert_intermediate_size=32),
    "qwen3-moe": hf.Qwen3MoeConfig(**SIZES, **HEAD, **SMALL_EXPERTS),
    "smollm3": hf.SmolLM3Config(**SIZES),
    "starcoder2": hf.Starcoder2Config(**SIZES, embedding_dropout=0, residual_dropout=0, sliding_window=16),
}
ONE_ROW = {
    "bloom": hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0),
    "falcon": hf.FalconConfig(**EQUAL_HEADS, multi_query=True),
    "falcon with alibi": hf.FalconConfig(**EQUAL_HEADS, alibi=True),
    "mamba": hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0),
    "mpt": hf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=VOCABULARY, max_seq_len=128),
    "nemotron": hf.NemotronConfig(**SIZES),
    "qwen3-next": hf.Qwen3NextConfig(
        **SIZES,
        **HEAD,
        **SMALL_EXPERTS,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "stablelm": hf.StableLmConfig(**SIZES),
}


@pytest.mark.parametrize("family", [*FUSED, *ONE_ROW])
def test_loss_and_gradient_are_those_of_transformers_one_row_at_a_time(family: str) -> None:
    loaded = build({**FUSED, **ONE_ROW}[family])
    cache = random_rows(7, VOCABULARY, seed=3)
    rows = np.arange(7)
    wanted, gradients = reference(loaded.model, cache, rows)
    choice = choose_path(loaded.model, assemble(cache, rows[:2], "cpu"), compute=torch.float32, autocast=None)
    assert choice.path.way == ("fused" if family in FUSED else "one row at a time"), choice.passed_over
    loaded.model.train()
    count = sum(int(cache.labels(row)[1:].sum()) for row in rows)
    total = 0.0
    for group in (rows[:4], rows[4:6], rows[6:]):
        loss = losses(loaded.model, assemble(cache, group, "cpu"), choice.path).sum() / count
        loss.backward()
        total += float(loss.detach())
    mine = {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}
    assert abs(total - wanted) <= 1e-6 * abs(wanted)
    assert relative_difference(mine, gradients) <= 1e-6


@pytest.mark.parametrize("family", ["bloom", "falcon", "gpt-j", "gpt-oss with sinks", "mpt"])
def test_a_family_with_attentions_of_its_own_is_loaded_and_answers_as_transformers_does(family, tmp_path) -> None:
    """Such folders were refused with the bare name of our attention; Bloom was trained without a causal mask."""
    config = {**FUSED, **ONE_ROW}[family]
    tiny_tokenizer(tmp_path)
    torch.manual_seed(0)
    plain = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plain.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32, device="cpu").model.eval()
    ids = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(1))
    arguments = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(ids, **arguments), plain.generate(ids, **arguments))
    row = random_rows(1, VOCABULARY, seed=3)
    wanted = reference(plain, row, [0])[0]
    batch = assemble(row, np.arange(1), "cpu")
    path = choose_path(loaded, batch, compute=torch.float32, autocast=None).path
    assert float(losses(loaded, batch, path).mean()) == pytest.approx(wanted, rel=1e-6)


def test_a_model_that_sees_ahead_is_refused_although_transformers_loss_agrees() -> None:
    """Bloom with a mask that is missing: its own `.loss` is wrong in the same way, so equality proves nothing."""
    attention.register("sdpa")
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(ONE_ROW["bloom"], attn_implementation=attention.NAME)
    batch = assemble(random_rows(2, VOCABULARY, seed=3), np.arange(2), "cpu")
    with pytest.raises(Refusal, match="sees tokens that come after it"):
        choose_path(model, batch, compute=torch.float32, autocast=None)
