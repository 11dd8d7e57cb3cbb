"""The shape verdict: whatever is missing, left over or misshapen is named, in every architecture transformers knows, with
no model code run, no hub asked, bounded in time and memory, and kept by the hash of the config."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.both_verdicts import ask_here, contents, judged
from tests.damage import UP, change_json, change_tensors, codes, pop, set_config
from tests.test_families import FUSED, ONE_ROW
from tests.test_good_layouts import of_config
from tests.tiny import tiny_adapter_dir, tiny_model_dir
from trainer.models import full_report as full_report_module
from trainer.models.blueprint import Unbuildable, build, difference, layout_of
from trainer.models.full_report import full_report
from trainer.models.headers import TensorInfo
from trainer.models.inspect import inspect_model
from trainer.models.layout import KEPT, Layout, keep_layout, layout_key, read_layout
from trainer.models.load import load_model
from trainer.worker import Worker, WorkerDied

pytest_plugins = ("tests.model_fixtures",)
ROOT = Path(__file__).resolve().parent.parent
FAMILIES = FUSED | ONE_ROW


def as_headers(layout: Layout) -> dict[str, TensorInfo]:
    """What headers of weights in this layout say."""
    return {name: TensorInfo("F32", shape, 0, 0) for name, shape in layout.tensors.items() if name not in layout.tied}


def plain(config: Any) -> dict[str, Any]:
    """A config as its config.json has it."""
    return json.loads(json.dumps(config.to_diff_dict(), default=str)) | {"model_type": config.model_type}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_tensor_lost_misshapen_or_added_is_named_in_each_family(name: str) -> None:
    config = plain(FAMILIES[name])
    layout = layout_of(build(config))
    good = as_headers(layout)
    assert not difference(build(config), layout, good)
    matrices = [tensor for tensor, info in good.items() if len(info.shape) > 1]
    for victim in random.Random(0).sample(matrices, 3):
        assert difference(build(config), layout, {k: v for k, v in good.items() if k != victim}).missing == [victim]
        shape = good[victim].shape
        other = good | {victim: TensorInfo("F32", (shape[0] + 1, *shape[1:]), 0, 0)}
        assert difference(build(config), layout, other).misshapen == [(victim, other[victim].shape, shape)]
    added = difference(build(config), layout, good | {"model.layers.0.novelty.weight": TensorInfo("F32", (3, 3), 0, 0)})
    assert len(added.extra) == 1 and added.extra[0].endswith("layers.0.novelty.weight") and not added.missing


@pytest.mark.slow
def test_every_architecture_that_transformers_knows_agrees_with_its_own_layout() -> None:
    """Each with the sizes of its first release; what transformers itself cannot build is no disagreement."""
    built, unbuilt, wrong = 0, [], []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = plain(CONFIG_MAPPING[kind]())
            model = build(config)
        except (Unbuildable, StrictDataclassError, ValueError, TypeError) as error:
            unbuilt.append(f"{kind}: {error}")
            with torch.device("meta"), pytest.raises(Exception):  # noqa: B017 - each fails in its own way
                AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
            continue
        layout = layout_of(model)
        found = difference(model, layout, as_headers(layout))
        built += 1
        if found:
            wrong.append((kind, found))
    print(f"{built} architectures, {len(wrong)} disagreements; not built by transformers: {len(unbuilt)}")
    assert wrong == [] and built > 150, unbuilt


def test_a_lost_expert_is_named_although_experts_are_fused(tmp_path: Path) -> None:
    path = of_config(FAMILIES["mixtral"])(tmp_path)
    tensors = load_file(path / "model.safetensors")
    lost = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    assert lost in tensors
    del tensors[lost]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    report = judged(path)
    assert codes(report) == ["missing_tensor"] and lost in report["problems"][0]["message"]
    assert report["problems"][0]["message"].startswith("a tensor is missing")


def test_the_shard_with_the_misshapen_tensor_is_named(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("sharded")
    shard = next(file for file in sorted(path.glob("*.safetensors")) if UP in load_file(file))
    tensors = load_file(shard)
    tensors[UP] = tensors[UP][:-1].clone()
    save_file(tensors, shard, {"format": "pt"})
    report = judged(path)
    assert codes(report) == ["shape_mismatch"] and report["problems"][0]["file"] == shard.name
    assert report["problems"][0]["message"] == f"{UP} has the shape [127, 64] instead of [128, 64]"


def test_all_differing_tensors_are_counted_and_the_first_are_named(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    names = [f"model.layers.{n}.self_attn.{letter}_proj.weight" for n in range(2) for letter in "qk"]
    change_tensors(pop(*names))(path)
    message = judged(path)["problems"][0]["message"]
    assert message.startswith("4 tensors are missing (") and "and 1 more" in message


def test_quantised_weights_are_not_judged_by_what_quantisation_replaced(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    stem = "model.layers.0.mlp.up_proj"

    def pack(tensors: dict[str, Any]) -> None:
        import numpy as np

        tensors.pop(f"{stem}.weight")
        tensors[f"{stem}.weight"] = np.zeros((4096, 1), np.uint8)
        tensors[f"{stem}.weight.absmax"] = np.ones(64, np.float32)
        tensors[f"{stem}.weight.quant_state.bitsandbytes__nf4"] = np.zeros(90, np.uint8)

    change_tensors(pack)(path)
    assert "shape_mismatch" in codes(judged(path)), "without the method it is damage"
    set_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(path)
    report = judged(path)
    assert codes(report) == [] and [item["code"] for item in report["warnings"]] == ["quantised"]
    change_tensors(pop("model.layers.2.self_attn.q_proj.weight"))(path)
    assert codes(judged(path)) == ["missing_tensor"], "what was not replaced is still judged"


def test_neither_code_nor_kernel_nor_hub_is_followed(
    copy_of_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_of_model("single")
    code = f"open({str(tmp_path / 'canary')!r}, 'w').write('ran')\nclass Model: pass\nclass Config: pass\n"
    (path / "modeling_own.py").write_text(code)
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address) or 1 / 0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for repository in ("", "someone/else--"):
        maps = {
            "AutoConfig": f"{repository}modeling_own.Config",
            "AutoModelForCausalLM": f"{repository}modeling_own.Model",
        }
        change_json(
            path / "config.json", auto_map=maps, attn_implementation="kernels-community/flash-attn3",
            _attn_implementation_internal="kernels-community/flash-attn3", experts_implementation="someone/kernel",
        )  # fmt: skip
        report = judged(path)
        assert codes(report) == [] and report["facts"]["shapes"] == "as expected"
        assert {"auto_map", "attn_implementation"} <= {item["code"] for item in report["warnings"]}
        assert asked == [] and not (tmp_path / "canary").exists()


def test_other_weight_files_than_were_checked_are_not_loaded(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    tensors = load_file(path / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path / "other.safetensors")
    set_config(transformers_weights="other.safetensors")(path)
    assert codes(judged(path)) == ["other_weights"]
    loaded = load_model(path, dtype=torch.float32, device="cpu").model
    assert torch.equal(loaded.state_dict()[UP], tensors[UP]) and tensors[UP].any()


def test_a_config_that_transformers_cannot_build_is_said_in_its_words(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    change_json(path / "config.json", hidden_act="no_such_function")
    report = judged(path)
    assert codes(report) == ["cannot_build"] and report["problems"][0]["file"] == "config.json"
    assert "no_such_function" in report["problems"][0]["message"]


def test_an_unknown_architecture_is_unknown_and_nothing_else(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    change_json(path / "config.json", model_type="blorp")
    report = judged(path)
    assert codes(report) == ["unknown_model_type"] and report["facts"]["shapes"] == "unknown"


def test_the_layout_is_kept_by_the_hash_of_the_config(copy_of_model: Callable[[str], Path], tmp_path: Path) -> None:
    path, kept = copy_of_model("single"), tmp_path / "layouts"
    asked: list[str] = []

    def ask(op: str, **args: Any) -> dict[str, Any]:
        asked.append(op)
        return ask_here(op, **args)

    before = contents(path)
    first = full_report(ask, path, layouts=kept)
    assert asked == ["check_model", "try_tokenizer", "check_shapes"] and len(list(kept.iterdir())) == 1
    asked.clear()
    again = full_report(ask, path, layouts=kept)
    assert asked == ["check_model", "try_tokenizer"] and again["facts"]["shapes"] == "as expected"
    assert {**first["facts"], "shapes_why": ""} == {**again["facts"], "shapes_why": ""} and contents(path) == before
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"_attn_implementation": "eager", "torch_dtype": "bfloat16"}))
    asked.clear()
    assert full_report(ask, path, layouts=kept)["valid"] and "check_shapes" not in asked, "the same architecture"
    change_tensors(lambda tensors: tensors.update({UP: tensors[UP][:-1].copy()}))(path)
    assert codes(full_report(ask, path, layouts=kept)) == ["shape_mismatch"], "other shapes are looked at anew"
    change_tensors(pop(UP))(path)
    assert codes(full_report(ask, path, layouts=kept)) == ["missing_tensor"], "and so are other names"
    change_json(path / "config.json", intermediate_size=256)
    assert "shape_mismatch" in codes(full_report(ask, path, layouts=kept)) and len(list(kept.iterdir())) == 2


def test_a_damaged_cache_is_none_and_old_layouts_go(tmp_path: Path) -> None:
    layout = Layout({"a": (2, 3)}, frozenset({"a"}))
    for number in range(KEPT + 5):
        keep_layout(tmp_path, f"key{number}", layout)
    assert len(list(tmp_path.iterdir())) == KEPT and read_layout(tmp_path, f"key{KEPT + 4}") == layout
    for text in ("", "[]", '{"tensors": {"a": 3}, "tied": []}', '{"tensors": {"a": ["x"]}, "tied": []}'):
        (tmp_path / "key68.json").write_text(text)
        assert read_layout(tmp_path, "key68") is None
    assert layout_key({"a": 1}) != layout_key({"a": 2})


def test_an_adapter_is_held_against_its_base(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path / "base", "llama", layers=3)
    path = tiny_adapter_dir(tmp_path / "lora", base)
    assert judged(path)["facts"]["shapes"] == "as expected"
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
    report = judged(path)
    assert codes(report) == ["missing_tensor"] and lost in report["problems"][0]["message"]
    assert report["problems"][0]["file"] == "adapter_model.safetensors"
    save_file(tensors | {lost.replace("layers.0", "layers.7"): tensors[lost].clone()}, file)
    report = judged(path)
    assert codes(report) == ["adapter_does_not_fit"] and "layers.7" in report["problems"][0]["message"]
    save_file({name: tensor[:1].clone() if name == lost else tensor for name, tensor in tensors.items()}, file)
    assert set(codes(judged(path))) == {"adapter_does_not_fit"}
    save_file(tensors, file)
    shutil.rmtree(base)
    tiny_model_dir(base, "gpt2")
    report = judged(path)
    assert "adapter_does_not_fit" in codes(report) and "q_proj" in json.dumps(report["problems"])


def test_a_damaged_base_is_said_of_the_base(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path / "base", "llama", layers=3)
    path = tiny_adapter_dir(tmp_path / "lora", base)
    change_tensors(pop(UP))(base)
    report = judged(path)
    assert codes(report) == ["missing_tensor"] and report["problems"][0]["message"].startswith(
        "in the base model: a tensor"
    )


def test_the_worker_gives_the_same_verdict(copy_of_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = copy_of_model("single")
    worker = Worker()
    first: list[dict[str, Any]] = []
    try:
        change_tensors(pop(UP))(path)
        report = full_report(worker.call, path, on_headers=first.append, layouts=tmp_path / "layouts")
    finally:
        worker.close()
    assert report == judged(path)
    assert codes(report) == ["missing_tensor"]
    assert [item["valid"] for item in first] == [True], "the headers alone do not show it, and come first"


def test_check_model_says_it_on_the_command_line(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    change_tensors(pop(UP))(path)
    before = contents(path)
    command = [sys.executable, "-m", "trainer", "check-model", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 1 and done.stderr == ""
    problem, shapes, last = done.stdout.splitlines()
    assert problem.startswith("model.safetensors: a tensor is missing") and UP in problem
    assert (shapes, last) == ("Names and shapes of the tensors: differ", f"Not valid: full, {path}")
    assert contents(path) == before


def test_a_verdict_that_takes_too_long_is_unknown_with_a_warning(
    copy_of_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_report_module, "SHAPES_S", 0.2)
    worker = Worker()
    try:
        report = full_report(worker.call, copy_of_model("single"))
    finally:
        worker.close()
    assert report["valid"] and [item["code"] for item in report["warnings"]] == ["shapes_unknown"]
    assert report["facts"]["shapes"] == "unknown" and "0.2 s" in report["facts"]["shapes_why"]


def test_a_worker_that_runs_out_of_memory_is_unknown_too(copy_of_model: Callable[[str], Path]) -> None:
    def ask(op: str, **args: Any) -> dict[str, Any]:
        if op == "check_shapes":
            raise WorkerDied("It needed more memory than it may have. Nothing was changed.")
        return ask_here(op, **args)

    report = full_report(ask, copy_of_model("single"))
    assert report["valid"] and [item["code"] for item in report["warnings"]] == ["shapes_unknown"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not hold a process to it")
def test_what_a_config_may_take_is_bounded() -> None:
    code = (
        "from trainer.models.shapes import limit_memory; limit_memory()\n"
        "bytearray(1024**3)\n"
        "try: held = bytearray(4 * 1024**3)\n"
        "except MemoryError: print('bounded')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "bounded", done.stderr[-500:]


def test_the_header_verdict_and_what_asks_for_both_import_no_torch(
    good_models: dict[str, Path], tmp_path: Path
) -> None:
    code = (
        "import sys, ui.models_api, trainer.models.full_report\n"
        "from pathlib import Path\n"
        "from trainer.models.inspect import inspect_model\n"
        "report = inspect_model(Path(sys.argv[1]), layouts=Path(sys.argv[2]))\n"
        "print(report['facts']['shapes'], [m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    judged(good_models["sharded"], layouts=tmp_path)
    command = [sys.executable, "-c", code, str(good_models["sharded"]), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "as expected []"
    assert inspect_model(good_models["sharded"])["facts"]["shapes"] == "due"
