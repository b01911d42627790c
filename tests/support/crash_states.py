"""Enumerate every state that a power loss may leave of a directory in which something was being
written (after ALICE, OSDI 2014).

A `Recorder` records what a writer does below a root: entries created, replaced and removed in
directories, bytes written, fsyncs. `states` cuts that list after each operation and asks what a
POSIX file system may have kept:

- of a file's contents, those at its last fsync, and all, half or nothing of what came later, or
  zeros in its place;
- of a directory's entries, those at its last fsync, and any choice of later changes. A rename
  within a directory is atomic. An fsync of a file says nothing about its name.

Each state can be written to a new directory, in which the code under test then runs.
"""

from __future__ import annotations

import builtins
import io
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Union

# relative path -> a file's bytes, a link, None for a directory
Tree = dict[str, Union[bytes, "Link", None]]
EVERY_CHOICE = 8  # up to this many pending changes of entries, every choice of them is tried
CHOICES = 48  # beyond that, this many are drawn


class Link(NamedTuple):
    target: str


class Node:
    """A file, a link or a directory, independent of its current name."""

    def __init__(self, content: bytes | Link | None):
        self.content = content  # None: a directory
        self.entries: dict[str, Node] = {}


class Entries(NamedTuple):
    """Names of a directory that change together; None: the name is removed."""

    directory: Node
    changes: dict[str, Node | None]


class Data(NamedTuple):
    file: Node
    content: bytes


class Sync(NamedTuple):
    node: Node
    label: str


class Promise(NamedTuple):
    """A point from which the disk must have it: a writer has returned."""

    what: int


Operation = Entries | Data | Sync | Promise


class Recorder:
    """Record what is done below `root` while `recording()`. Writes that bypass it (another process,
    a library in C) are an error.
    """

    def __init__(self, root: Path):
        self.path = os.path.realpath(root)
        self.operations: list[Operation] = []
        self.root = as_node(read_tree(root))
        # assumed to be on the disk
        self.start = {node: (node.content, dict(node.entries)) for node in walk(self.root)}

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        replaced: list[tuple[Any, str, Any]] = []
        for module, name, new in (
            (builtins, "open", self.open),
            (io, "open", self.open),
            (os, "fsync", self.fsync),
            (os, "fdatasync", self.fsync),
            (os, "rename", self.rename),
            (os, "replace", self.rename),
            (os, "symlink", self.symlink),
            (os, "unlink", self.remove),
            (os, "remove", self.remove),
            (os, "rmdir", self.rmdir),
            (os, "mkdir", self.mkdir),
        ):
            replaced.append((module, name, getattr(module, name)))
            setattr(module, name, _with_real(new, getattr(module, name)))
        try:
            yield self
        finally:
            for module, name, old in reversed(replaced):
                setattr(module, name, old)
        assert as_tree(self.root) == read_tree(Path(self.path)), (
            "something was written that the recorder missed"
        )

    def promise(self, what: int) -> None:
        self.operations.append(Promise(what))

    # ---- the system calls ----

    def find(self, path: Any, dir_fd: int | None = None) -> tuple[Node, str] | None:
        """Return the directory and the name in it, if that is below the root."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        start = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
        parent, name = os.path.split(os.path.join(start, os.fspath(path)))
        parent = os.path.realpath(parent)
        if parent != self.path and not parent.startswith(self.path + os.sep):
            return None
        node = self.root
        for part in Path(parent).relative_to(self.path).parts:
            node = node.entries[part]
        return node, name

    def change(self, directory: Node, changes: dict[str, Node | None]) -> None:
        for name, node in changes.items():
            if node is None:
                del directory.entries[name]
            else:
                directory.entries[name] = node
        self.operations.append(Entries(directory, changes))

    def wrote(self, file: Node, content: bytes) -> None:
        file.content = content
        self.operations.append(Data(file, content))

    def open(
        self,
        real: Callable,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        where = None if isinstance(file, int) or not set(mode) & set("wxa+") else self.find(file)
        if where is None:
            return real(file, mode, buffering, *arguments, **options)
        raw = RecordedFile(file, mode.replace("b", "").replace("t", ""))
        raw.recorder, directory, name = self, *where
        if name not in directory.entries:
            self.change(directory, {name: Node(b"")})
        raw.node = directory.entries[name]
        if "w" in mode and raw.node.content:
            self.wrote(raw.node, b"")
        if buffering == 0:
            return raw
        return (
            io.BufferedWriter(raw)
            if "b" in mode
            else io.TextIOWrapper(io.BufferedWriter(raw), "utf-8")
        )

    def fsync(self, real: Callable, fd: Any) -> None:
        real(fd)
        fd = fd if isinstance(fd, int) else fd.fileno()
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path == self.path:
            self.operations.append(Sync(self.root, "."))
        elif where := self.find(path):
            self.operations.append(
                Sync(where[0].entries[where[1]], os.path.relpath(path, self.path))
            )

    def rename(self, real: Callable, old: Any, new: Any, **options: Any) -> None:
        where = self.find(old, options.get("src_dir_fd"))
        to = self.find(new, options.get("dst_dir_fd"))
        real(old, new, **options)
        if where or to:
            assert where and to and where[0] is to[0], (
                "a rename from one directory to another is not modelled"
            )
            self.change(where[0], {to[1]: where[0].entries[where[1]], where[1]: None})

    def symlink(
        self, real: Callable, target: Any, link: Any, *arguments: Any, **options: Any
    ) -> None:
        where = self.find(link, options.get("dir_fd"))
        real(target, link, *arguments, **options)
        if where:
            self.change(where[0], {where[1]: Node(Link(os.fspath(target)))})

    def remove(self, real: Callable, path: Any, **options: Any) -> None:
        where = self.find(path, options.get("dir_fd"))
        real(path, **options)
        if where:
            self.change(where[0], {where[1]: None})

    rmdir = remove

    def mkdir(self, real: Callable, path: Any, *arguments: Any, **options: Any) -> None:
        where = self.find(path, options.get("dir_fd"))
        real(path, *arguments, **options)
        if where:
            self.change(where[0], {where[1]: Node(None)})


def _with_real(new: Callable, real: Callable) -> Callable:
    return lambda *arguments, **options: new(real, *arguments, **options)


class RecordedFile(io.FileIO):
    """An unbuffered file that records what is written to it, from its start or its end onwards."""

    recorder: Recorder
    node: Node

    def write(self, data: Any) -> int:
        n = super().write(data)
        self.recorder.wrote(
            self.node, (self.node.content or b"") + bytes(memoryview(data).cast("B")[:n])
        )
        return n


# ---- the states ----


class State(NamedTuple):
    """What a power loss left, and the last promise before it."""

    tree: Tree
    promised: int


def states(
    recorder: Recorder, seed: int = 0, without: int | None = None, after: int = 0
) -> Iterator[State]:
    """Yield each state after each promise once. `without`: as if the operation with that index were
    missing. `after`: only from that promise on.
    """
    rng, seen = random.Random(seed), set()
    operations = [o for i, o in enumerate(recorder.operations) if i != without]
    entries: dict[Node, dict[str, Node]] = {}  # of each directory, those on the disk
    synced: dict[Node, Any] = {}  # of each file, the contents on the disk
    for node in nodes(recorder):
        content, there = recorder.start.get(
            node, (b"" if isinstance(node.content, bytes) else node.content, {})
        )
        entries[node], synced[node] = dict(there), content
    current = dict(synced)
    pending: list[Entries] = []
    promised = 0
    for cut in range(len(operations) + 1):
        within = {Data} == {
            type(o) for o in operations[cut - 1 : cut + 1]
        } and cut % 4  # a file is written in many pieces
        for choice in choices(len(pending), rng) if promised >= after and not within else ():
            for contents in torn(synced, current):
                tree = assemble(recorder.root, entries, [pending[i] for i in choice], contents)
                key = (promised, tuple(tree.items()))
                if key not in seen:
                    seen.add(key)
                    yield State(tree, promised)
        if cut < len(operations):
            match operations[cut]:
                case Entries() as change:
                    pending.append(change)
                case Data(file, content):
                    current[file] = content
                case Sync(node, _):
                    if node.content is not None:
                        synced[node] = current[node]
                    for change in pending:
                        if change.directory is node:
                            apply(entries[node], change)
                    pending = [change for change in pending if change.directory is not node]
                case Promise(what):
                    promised = what


def choices(n: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Yield which of n pending changes the disk has: every choice if they are few, otherwise none,
    all, one, all but one, and some at random.
    """
    if n <= EVERY_CHOICE:
        for size in range(n + 1):
            yield from itertools.combinations(range(n), size)
        return
    yield ()
    for i in range(n):
        yield (i,)
        yield tuple(range(i + 1))  # as an ordered journal would have it
        yield tuple(j for j in range(n) if j != i)
    for _ in range(CHOICES):
        yield tuple(i for i in range(n) if rng.random() < 0.5)


def torn(synced: Mapping[Node, Any], current: Mapping[Node, Any]) -> Iterator[dict[Node, Any]]:
    """Yield contents of all files: at the last fsync, the current ones, and what may lie between,
    for all files together and for one at a time.
    """
    loose = [node for node in current if current[node] != synced[node]]
    ways: list[Callable[[Node], bytes]] = [
        lambda node: current[node],
        lambda node: synced[node],
        lambda node: current[node][: len(current[node]) // 2],
        lambda node: bytes(len(current[node])),
    ]
    yield dict(current)
    for forward_path in ways[1:] if loose else []:
        yield dict(current) | {node: forward_path(node) for node in loose}
        if len(loose) > 1:
            for node in loose:
                yield dict(current) | {node: forward_path(node)}


def apply(entries: dict[str, Node], change: Entries) -> None:
    for name, node in change.changes.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def assemble(
    root: Node,
    durable: Mapping[Node, dict[str, Node]],
    changes: list[Entries],
    contents: Mapping[Node, Any],
) -> Tree:
    late: dict[Node, dict[str, Node]] = {}
    for change in changes:
        apply(late.setdefault(change.directory, dict(durable[change.directory])), change)

    def below(directory: Node, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, node in sorted(late.get(directory, durable[directory]).items()):
            yield prefix + name, contents[node]
            yield from below(node, f"{prefix}{name}/")

    return dict(below(root, ""))


# ---- trees ----


def read_tree(folder: Path) -> Tree:
    """Return the contents of a directory; it must have files, links and directories only."""
    tree: Tree = {}

    def below(directory: str, prefix: str) -> None:
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            name = prefix + entry.name
            if entry.is_symlink():
                tree[name] = Link(os.readlink(entry.path))
            elif entry.is_dir():
                tree[name] = None
                below(entry.path, name + "/")
            else:
                tree[name] = Path(entry.path).read_bytes()

    below(str(folder), "")
    return tree


def write_tree(tree: Tree, folder: Path) -> None:
    folder.mkdir()
    for name, content in tree.items():  # parents come first
        if content is None:
            (folder / name).mkdir()
        elif isinstance(content, Link):
            (folder / name).symlink_to(content.target)
        else:
            (folder / name).write_bytes(content)


def as_node(tree: Tree) -> Node:
    root = Node(None)
    for name, content in tree.items():
        *parents, last = name.split("/")
        node = root
        for part in parents:
            node = node.entries[part]
        node.entries[last] = Node(content)
    return root


def as_tree(root: Node, prefix: str = "") -> Tree:
    tree: Tree = {}
    for name, node in root.entries.items():
        tree[prefix + name] = node.content
        tree |= as_tree(node, f"{prefix}{name}/")
    return dict(sorted(tree.items()))


def walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.entries.values():
        yield from walk(child)


def nodes(recorder: Recorder) -> list[Node]:
    """Return all nodes that ever existed."""
    unique = dict.fromkeys(recorder.start)
    for operation in recorder.operations:
        if isinstance(operation, Entries):
            unique |= dict.fromkeys(node for node in operation.changes.values() if node is not None)
    return list(unique)
