"""Rows and models of the benchmark: a token cache as the product writes it, and a model folder from save_pretrained.

`python -m benchmarks.training.data REQUEST.json` makes both in a process of its own, so that the driver needs no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training.suites import SHAPES, Case
from trainer.data.packing import Plan, make_plan
from trainer.data.tokens import TokenCache

SEED = 7
MEDIAN_SHARE = 0.15  # of max_length: 307 of 2,048 tokens
SPREAD = 0.73  # of the logarithm: lengths with mean 1.3 times the median, as in real chat data
LABEL_SHARE = 0.4
TURN_TOKENS = 400


def plan_for(case: Case, cache: TokenCache, form: str) -> Plan:
    """The product's plan of the whole run: the same for every arm of this form."""
    rows = len(cache.lengths)
    packed = form == "packed" and not case.full_rows  # packs of one row each would only come in another order
    return make_plan(
        np.asarray(cache.lengths),
        np.arange(rows),
        np.empty(0, np.int64),
        np.ones(rows),
        seed=SEED,
        epochs=1,
        max_steps=None,
        packs_per_step=case.packs if packed else case.rows_per_step,
        capacity=case.max_length if packed else None,
    )


def lengths_for(case: Case) -> np.ndarray:
    """Tokens of each row, such that rows and packs give the same number of steps: (steps x rows a step,)."""
    rows = case.steps * case.rows_per_step
    if case.full_rows:
        return np.full(rows, case.max_length, np.int64)
    drawn = np.random.default_rng(SEED).lognormal(np.log(case.max_length * MEDIAN_SHARE), SPREAD, rows)
    wanted = case.steps * case.packs
    for factor in np.arange(0.7, 1.4, 0.005)[::-1]:  # the longest rows that still fit into so many packs
        lengths = np.clip(np.round(drawn * factor), 8, case.max_length).astype(np.int64)
        plan = make_plan(
            lengths, np.arange(rows), np.empty(0, np.int64), np.ones(rows), seed=SEED, epochs=1, max_steps=None,
            packs_per_step=case.packs, capacity=case.max_length,
        )  # fmt: skip
        if len(plan.pack_starts) - 1 == wanted:
            return lengths
    raise ValueError(f"no row lengths give {wanted} packs for {case.name}")


def label_marks(length: int, draw: np.random.Generator) -> np.ndarray:
    """1 where a token is an answer's: turns of a question and then an answer, about 40 % answers in all."""
    marks = np.zeros(length, np.uint8)
    turns = 1 + length // TURN_TOKENS
    borders = np.linspace(0, length, turns + 1).astype(int)
    for start, end in zip(borders, borders[1:], strict=False):
        answer = max(1, round((end - start) * draw.uniform(LABEL_SHARE - 0.2, LABEL_SHARE + 0.2)))
        marks[max(start + 1, end - answer) : end] = 1
    return marks


def write_rows(case: Case, path: Path) -> Path:
    """Write the token cache of `case` as the product's tokeniser leaves it; returns its folder."""
    if (path / "cache.json").exists():
        return path
    path.mkdir(parents=True)
    draw = np.random.default_rng(SEED + 1)
    lengths = lengths_for(case)
    marks = [label_marks(int(length), draw) for length in lengths]
    tokens = int(lengths.sum())
    vocabulary = SHAPES[case.model].vocabulary
    # common tokens are common, as in text: a uniform draw would leave nothing to learn
    ids = (4 + (vocabulary - 4) * draw.random(tokens) ** 3).astype(np.int32)
    source = np.stack([np.zeros(len(lengths)), np.arange(1, len(lengths) + 1), np.arange(len(lengths))], 1)
    np.save(path / "ids.npy", ids)
    np.save(path / "labels.npy", np.concatenate(marks))
    np.save(path / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(path / "pieces.npy", np.full(len(lengths), -1, np.int64))
    np.save(path / "cut.npy", np.zeros(len(lengths), np.int64))
    np.save(path / "source.npy", source.astype(np.int64))
    labels = sum(int(mark.sum()) for mark in marks)
    meta = {
        "rows": len(lengths),
        "tokens": tokens,
        "labels": labels,
        "largest_id": int(ids.max()),
        "key": case.data,
        "chat_template": "",
        "files": [{"path": "rows.jsonl"}],
    }
    (path / "cache.json").write_text(json.dumps(meta))
    return path


def write_model(name: str, precision: str, path: Path) -> Path:
    """Write a model folder of the shape `name` with seeded random weights; bf16 halves the file, as real ones do."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from trainer.models.starter import build_tokenizer

    if (path / "config.json").exists():
        return path
    shape = SHAPES[name]
    build_tokenizer(["The trainers get token ids; this tokenizer only names padding and end."]).save_pretrained(path)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(path)
    return path


def row_facts(case: Case, cache: TokenCache) -> dict[str, Any]:
    """What the rows of a case are: counts, lengths, the share of padding and of unused room in packs."""
    lengths = np.asarray(cache.lengths)
    rows, packs = plan_for(case, cache, "rows"), plan_for(case, cache, "packed")
    if rows.total_steps != case.steps or packs.total_steps != case.steps:
        raise ValueError(f"{case.name}: {rows.total_steps} steps of rows, {packs.total_steps} of packs")
    padded = 0
    for step in range(1, case.steps + 1):
        for micro in rows.micro_batches(step, case.micro_rows):
            padded += len(micro) * int(lengths[micro].max())
    room = (len(packs.pack_starts) - 1) * case.max_length
    return {
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "labels": int(cache.meta["labels"]),
        "median_tokens": float(np.median(lengths)),
        "mean_tokens": float(lengths.mean()),
        "longest_tokens": int(lengths.max()),
        "real_of_padded": float(lengths.sum() / padded),
        "packs_full": float(lengths.sum() / room),
    }


def main() -> None:
    """Make what the request names: {"cases": [...], "folder": ...}; prints the facts of the rows as JSON."""
    request = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(request["folder"])
    facts = {}
    for case in (Case(**each) for each in request["cases"]):
        if case.data not in facts:
            facts[case.data] = row_facts(case, TokenCache.open(write_rows(case, folder / "rows" / case.data)))
        write_model(case.model, case.precision, folder / "models" / case.model)
    Path(request["out"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
