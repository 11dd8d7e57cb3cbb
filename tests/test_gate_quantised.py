"""The gate holds weights that are quantised already against the method that is chosen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.damage import set_config
from tests.test_train_routes import chosen, settled, write
from ui.gate import blocking
from ui.site import Site


@pytest.mark.parametrize(
    ("quantised", "method", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "full", "cannot be trained in full"),
        ({"quant_method": "gptq", "bits": 4}, "full", "cannot be trained in full"),
        ({"quant_method": "gptq", "bits": 4}, "qlora", "quantised already (gptq)"),
        ({"quant_method": "gptq", "bits": 4}, "lora", ""),
    ],
)
def test_quantised_weights_are_held_against_the_method(
    quantised: dict[str, object],
    method: str,
    words: str,
    site: Site,
    tiny_model: Path,
    tiny_dataset: Path,
    tmp_path: Path,
) -> None:
    path = Path(shutil.copytree(tiny_model, tmp_path / "quantised"))
    set_config(quantization_config=quantised)(path)
    chosen(site, path, tiny_dataset)
    write(site, **{"hyperparams.method": method})
    facts, lines = settled(site)
    assert facts.model is not None and facts.model.valid is not bool(words)
    said = [line.text for line in blocking(lines)]
    assert any(words in text for text in said) if words else not any("quantised" in text for text in said)
