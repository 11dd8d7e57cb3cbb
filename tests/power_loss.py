"""What a disk may hold after the power went: the recorded file calls replayed on a model that promises only what was fsynced.

A file's bytes are safe when that file was fsynced, its name when its folder was, and nothing else: what was not fsynced may be
there, gone, zeros in a file that already has its size, cut in the middle, or there without what came before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.file_faults import Op

Data = Literal["dropped", "zeroed", "truncated", "kept"]


@dataclass(eq=False)
class Node:
    """A file or folder: as programs see it now, and as the disk is sure to have it. `waiting` are changes of a folder."""

    folder: bool
    data: bytes = b""
    synced_data: bytes = b""
    entries: dict[str, Node] = field(default_factory=dict)
    synced_entries: dict[str, Node] = field(default_factory=dict)
    waiting: list[Change] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Change:
    """A change of a folder's names that no fsync has made safe: `name` appears as `node`, or goes (`node` None), or moves."""

    name: str
    node: Node | None = None
    gone: str | None = None


class Disk:
    """The folder `root` as it was, all of it safe, and then op after op."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self.top = _read(root)

    def apply(self, op: Op) -> None:
        """One recorded call."""
        folder, name = self._find(op.path)
        if op.kind in ("create", "mkdir"):
            self._change(folder, Change(name, Node(op.kind == "mkdir")))
        elif op.kind == "truncate":
            folder.entries[name].data = b""
        elif op.kind == "resize":
            node = folder.entries[name]
            node.data = node.data[: op.offset].ljust(op.offset, b"\0")
        elif op.kind == "write":
            node = folder.entries[name]
            node.data = node.data[: op.offset].ljust(op.offset, b"\0") + op.data + node.data[op.offset + len(op.data) :]
        elif op.kind == "fsync":
            node = folder.entries[name] if name else folder
            node.synced_data, node.synced_entries, node.waiting = node.data, dict(node.entries), []
        elif op.kind == "rename":
            target, new = self._find(op.target)
            assert target is folder, "the model knows renames inside one folder"
            self._change(folder, Change(new, folder.entries[name], gone=name))
        else:
            assert op.kind in ("unlink", "rmdir"), op.kind
            self._change(folder, Change(name))

    def _change(self, folder: Node, change: Change) -> None:
        _make(change, folder.entries)
        folder.waiting.append(change)

    def _find(self, path: str) -> tuple[Node, str]:
        """(folder, name in it) of a path; (top, "") for the root itself."""
        relative = path.removeprefix(self._root).strip("/")
        if not relative:
            return self.top, ""
        *folders, name = relative.split("/")
        node = self.top
        for each in folders:
            node = node.entries[each]
        return node, name

    def _waiting(self) -> list[Change]:
        """All changes of names that are not safe, of folders that can be reached."""
        found, todo, seen = [], [self.top], set()
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            found += node.waiting
            todo += [*node.entries.values(), *node.synced_entries.values()]
        return found

    def crashes(self) -> Iterator[tuple[str, Callable[[Path], None]]]:
        """(what survived, a function that writes it to a folder) for each way the power may go now."""
        changes = self._waiting()
        everything = frozenset(map(id, changes))

        def crash(made: frozenset[int], data: Data) -> Callable[[Path], None]:
            return lambda target: _write(self.top, target, made, data)

        yield "only what was fsynced", crash(frozenset(), "dropped")
        for data in ("dropped", "zeroed", "truncated", "kept"):
            yield f"all names, unsynced data {data}", crash(everything, data)
        if len(changes) > 1:
            for change in changes:
                yield f"of the names only '{change.name}'", crash(frozenset({id(change)}), "zeroed")
                yield f"all names but '{change.name}'", crash(everything - {id(change)}, "zeroed")


def _make(change: Change, entries: dict[str, Node]) -> None:
    if change.gone is not None:
        entries.pop(change.gone, None)
    if change.node is not None:
        entries[change.name] = change.node
    else:
        entries.pop(change.name, None)


def _read(path: Path) -> Node:
    """A node of what is there, all of it safe."""
    if path.is_file():
        content = path.read_bytes()
        return Node(False, content, content)
    entries = {child.name: _read(child) for child in path.iterdir()}
    return Node(True, entries=entries, synced_entries=dict(entries))


def _write(node: Node, target: Path, made: frozenset[int], data: Data) -> None:
    """Write what survived of `node`: the synced names and those changes whose ids are in `made`, in their order."""
    if not node.folder:
        target.write_bytes(_survived(node, data))
        return
    target.mkdir(exist_ok=True)
    entries = dict(node.synced_entries)
    for change in node.waiting:
        if id(change) in made:
            _make(change, entries)
    for name, child in entries.items():
        _write(child, target / name, made, data)


def _survived(node: Node, data: Data) -> bytes:
    now, safe = node.data, node.synced_data
    if data == "kept" or now == safe:
        return now
    if data == "dropped":
        return safe
    common = next((i for i, (a, b) in enumerate(zip(now, safe, strict=False)) if a != b), min(len(now), len(safe)))
    if data == "zeroed":
        return now[:common] + bytes(len(now) - common)
    return now[: common + (len(now) - common) // 2]
