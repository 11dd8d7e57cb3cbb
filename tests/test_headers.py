"""The header judge against the safetensors library itself: same verdict on thousands of damaged files."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trainer.models.headers import DTYPE_BITS, BadHeader, judge, read_header

TENSOR = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
ODD = [
    None, True, -1, -0.0, 0, 1, 2.0, 1e3, 2**63, 2**64 - 1, 2**64, 10**30, 10**400, "", "F32", "4", [], [1], [0, 4],
    [0, 4, 4], [[0], 4], {}, {"F32": None}, {"F32": {}}, {"F32": None, "I8": None}, ["F32", [1], [0, 4]], "\ud800",
    "🤔", "a\x00b",
]  # fmt: skip
RAW_ODD = [
    "-0",
    "1e999",
    "-1e999",
    "0e999",
    "NaN",
    "Infinity",
    "01",
    "1.",
    ".5",
    "+1",
    "0x1",
    "tru",
    "'a'",
    '"\\x"',
]


def frame(header: str | bytes, data: bytes = b"\0" * 4) -> bytes:
    """A safetensors file of a given header text."""
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def library_accepts(path: Path) -> bool:
    """The verdict of the safetensors library: does the file open?"""
    try:
        with safe_open(path, "np") as file:
            file.keys()
    except (SafetensorError, OSError):
        return False
    return True


def verdict(path: Path) -> str:
    """Our verdict: "good" or the code of the fault."""
    try:
        read_header(path)
    except BadHeader as error:
        assert error.text and error.code
        return error.code
    return "good"


def base_files() -> list[bytes]:
    """Good files of several shapes, dtypes and sizes, as the library writes them."""
    rng = np.random.default_rng(0)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(4)]
    return [
        save({}),
        save({"a": np.zeros((), np.float32)}),
        save({"a": np.zeros((0, 3), np.float16), "b": np.arange(5, dtype=np.int64), "c": np.ones(3, np.uint8)}),
        save({name: rng.normal(size=(3, 2)).astype(np.float32) for name in names}, {"format": "pt", "ä": "🤔"}),
        frame('{"x":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'),
    ]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One random damage or odd rewriting of a file."""
    stop = 8 + int.from_bytes(content[:8], "little")
    header, data = content[8:stop], content[stop:]
    length = len(header)
    kind = rng.randrange(7)
    if kind == 0:  # a byte of the header becomes another one
        place = rng.randrange(length)
        byte = bytes([rng.choice([rng.randrange(256), rng.choice(b'{}[]",:0123456789eE-+.\\u nutf')])])
        return frame(header[:place] + byte + header[place + 1 :], data)
    if kind == 1:  # the file is cut or grows
        cut = rng.randrange(len(content) + 1)
        return rng.choice([content[:cut], content + rng.randbytes(rng.randrange(1, 9)), content[:-1]])
    if kind == 2:  # the length field lies
        lie = rng.choice([0, length - 1, length + 1, 100_000_000, 100_000_001, 2**63, 2**64 - 1, rng.randrange(2**16)])
        return max(lie, 0).to_bytes(8, "little") + content[8:]
    if kind == 3:  # a piece of the header is doubled, dropped or padded
        start = rng.randrange(length)
        stop = min(length, start + rng.randrange(1, 30))
        piece = header[start:stop]
        new = rng.choice([header[:stop] + piece + header[stop:], header[:start] + header[stop:], header + b"  \n"])
        return frame(new, data)
    if kind == 4:  # raw JSON that other parsers take
        spot = rng.choice([b"[", b":", b","])
        places = [i for i in range(length) if header[i : i + 1] == spot]
        at = rng.choice(places) + 1 if places else length
        return frame(header[:at] + rng.choice(RAW_ODD).encode() + header[at:], data)
    return frame(json.dumps(rewrite(json.loads(header), rng), ensure_ascii=rng.random() < 0.5), data)


def rewrite(entries: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The header's JSON with one value changed: an offset, a size, a dtype, a name or an odd value
    somewhere."""
    names = [name for name in entries if name != "__metadata__"]
    if not names or rng.random() < 0.1:
        entries[rng.choice(["__metadata__", "new", ""])] = rng.choice(ODD)
        return entries
    name = rng.choice(names)
    tensor = entries[name]
    field = rng.choice(["dtype", "shape", "data_offsets"])
    choice = rng.randrange(7)
    if choice == 0:
        tensor[field] = rng.choice(ODD)
    elif choice == 1 and tensor["shape"]:
        tensor["shape"][rng.randrange(len(tensor["shape"]))] = rng.choice([0, 1, 2, 3, 2**40, 2**63, *ODD])
    elif choice == 2:
        tensor["data_offsets"][rng.randrange(2)] += rng.choice([-4, -1, 1, 4, 8, 2**64])
    elif choice == 3:
        tensor["dtype"] = rng.choice([*DTYPE_BITS, "f32", "F128"])
    elif choice == 4:
        del tensor[field]
    elif choice == 5:
        tensor["extra"] = rng.choice(ODD)
        if rng.random() < 0.3:
            tensor["extra"] = json.loads("[" * (depth := rng.randrange(118, 132)) + "]" * depth)
    else:
        entries[name] = rng.choice([[tensor["dtype"], tensor["shape"], tensor["data_offsets"]], *ODD])
    return dict(sorted(entries.items(), key=lambda _: rng.random()))


def compare(count: int, seed: int, path: Path) -> tuple[int, int]:
    """Judge `count` mutants twice; returns how many were good and how many held a duplicate key."""
    rng = random.Random(seed)
    bases = base_files()
    good = doubled = 0
    for number in range(count):
        content = rng.choice(bases)
        for _ in range(rng.choice([1, 1, 1, 2])):
            try:
                content = mutate(content, rng)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                break  # the second damage needs a header that still reads; the first one alone is judged
        path.write_bytes(content)
        ours, library = verdict(path), library_accepts(path)
        doubled += ours == "duplicate_key"
        good += ours == "good"
        if ours != "duplicate_key":
            assert (ours == "good") == library, f"mutant {number} of seed {seed}: {ours}, {content[:600]!r}"
    return good, doubled


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A file in memory where there is such a place, so that thousands of small writes are quick."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        return tmp_path / "mutant.safetensors"
    return memory / f"signalbox-{os.getpid()}.safetensors"


def test_twenty_thousand_mutants_get_the_verdict_of_the_library(scratch: Path) -> None:
    try:
        good, doubled = compare(20_000, 1, scratch)
    finally:
        scratch.unlink(missing_ok=True)
    assert good > 1_500 and doubled > 20 and 20_000 - good > 10_000, (good, doubled)


@pytest.mark.slow
def test_a_million_mutants_get_the_verdict_of_the_library(scratch: Path) -> None:
    try:
        good, doubled = compare(1_000_000, 2, scratch)
    finally:
        scratch.unlink(missing_ok=True)
    print(f"1,000,000 mutants: {good:,} good, {doubled:,} with a name twice, no other disagreement")
    assert good > 75_000 and doubled > 1_000, (good, doubled)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"\0" * 7, "too_short"),
        ((2**63).to_bytes(8, "little") + b"{}", "header_too_large"),
        ((50).to_bytes(8, "little") + b"{}", "truncated"),
        (frame("{"), "bad_json"),
        (frame("[]", b""), "bad_json"),
        (frame("[" * 200_000), "bad_json"),
        (frame(b'{"\xff":' + TENSOR.encode() + b"}"), "bad_utf8"),
        (frame('{"a":' + TENSOR + ',"a":' + TENSOR + "}"), "duplicate_key"),
        (frame('{"a":' + TENSOR.replace("F32", "F33") + "}"), "unknown_dtype"),
        (frame('{"a":' + TENSOR.replace("[1]", "[2]") + "}"), "shape_bytes"),
        (frame('{"a":' + TENSOR.replace("[1]", "[-1]") + "}"), "bad_tensor"),
        (frame('{"a":' + TENSOR.replace("[1]", f"[{2**62}]") + "}"), "overflow"),
        (frame('{"a":' + TENSOR.replace("[0,4]", "[4,8]") + "}", b"\0" * 8), "hole"),
        (frame('{"a":' + TENSOR + ',"b":' + TENSOR + "}"), "overlap"),
        (frame('{"a":' + TENSOR.replace("[0,4]", "[0,0]").replace("[0,0]", "[4,0]") + "}"), "hole"),
        (frame('{"a":' + TENSOR + ',"b":' + TENSOR.replace("[0,4]", "[4,2]") + "}"), "bad_offsets"),
        (frame('{"__metadata__":{"a":1},"b":' + TENSOR + "}"), "bad_metadata"),
        (frame('{"a":' + TENSOR + "}", b"123"), "truncated"),
        (frame('{"a":' + TENSOR + "}", b"12345"), "trailing_bytes"),
        (frame('{"a":' + TENSOR + "}"), "good"),
        (frame("{}", b""), "good"),
    ],
)
def test_each_fault_is_named(content: bytes, code: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert verdict(path) == code
    if code != "duplicate_key":
        assert library_accepts(path) == (code == "good")


def test_a_good_header_is_read_out(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"a": np.zeros((3, 2), np.float16), "b": np.ones(1, np.int64)}, {"format": "pt"}))
    header = read_header(path)
    assert header.metadata == {"format": "pt"} and header.file_bytes == path.stat().st_size
    assert {name: (info.dtype, info.shape, info.elements) for name, info in header.tensors.items()} == {
        "a": ("F16", (3, 2), 6),
        "b": ("I64", (1,), 1),
    }
    info = header.tensors["b"]
    raw = path.read_bytes()[header.data_start + info.begin : header.data_start + info.end]
    assert np.frombuffer(raw, np.int64) == [1]


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    start_s = time.monotonic()
    assert verdict(path) == "not_a_file"
    assert time.monotonic() - start_s < 1


def test_a_header_of_many_tensors_is_judged_quickly() -> None:
    entries = {
        f"model.layers.{i}.mlp.experts.{j}.weight": {
            "dtype": "BF16",
            "shape": [64, 64],
            "data_offsets": [8192 * (i * 128 + j), 8192 * (i * 128 + j + 1)],
        }
        for i in range(60)
        for j in range(128)
    }
    raw = json.dumps(entries).encode()
    start_s = time.monotonic()
    header = judge(raw, 8 + len(raw) + 8192 * len(entries))
    assert len(header.tensors) == 7680
    assert time.monotonic() - start_s < 1
