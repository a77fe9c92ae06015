"""Who may import whom: the layers of tiermem, and what a module's source imports against them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path

import tiermem

PACKAGE = Path(tiermem.__file__).parent

# Layer -> its modules and packages. A module belongs to the layer with the longest name that it starts with.
LAYERS = {
    "native": ["tiermem._core"],
    "errors": ["tiermem.errors"],
    "layout": ["tiermem.layout"],
    "trace": ["tiermem.trace"],
    "private": ["tiermem.private_files"],
    "ram_split": ["tiermem.ram_split"],
    "config": [
        "tiermem.config",
        "tiermem.configfile",
        "tiermem.data",
        "tiermem.fields",
        "tiermem.legacy",
        "tiermem.model_shape",
        "tiermem.profiles",
        "tiermem.rates",
        "tiermem.units",
        "tiermem.version",
    ],
    "device": ["tiermem.device"],
    "attention": ["tiermem.attention"],
    "kernels": [
        "tiermem.attention.kernels.checksum",
        "tiermem.attention.kernels.compiled",
        "tiermem.attention.kernels.driver",
    ],
    "measure": ["tiermem.measure", "tiermem.calibration", "tiermem.machine"],
    "forecast": ["tiermem.forecast"],
    "pools": ["tiermem.pools"],
    "store": [
        "tiermem.backoff",
        "tiermem.breaker",
        "tiermem.cipher",
        "tiermem.cipher_key",
        "tiermem.disk_budget",
        "tiermem.disk_rates",
        "tiermem.guarded_io",
        "tiermem.patience",
        "tiermem.index_image",
        "tiermem.slot_file",
        "tiermem.slot_scan",
        "tiermem.slot_trailers",
        "tiermem.store",
        "tiermem.store_chains",
        "tiermem.store_check",
        "tiermem.store_collect",
        "tiermem.store_commits",
        "tiermem.store_content",
        "tiermem.store_files",
        "tiermem.store_format",
        "tiermem.store_index",
        "tiermem.store_keeper",
        "tiermem.store_match",
        "tiermem.store_names",
        "tiermem.store_payload",
        "tiermem.store_reader",
        "tiermem.store_rebuild",
        "tiermem.store_records",
        "tiermem.store_transfer",
        "tiermem.store_usage",
        "tiermem.unsynced",
        "tiermem.vault",
    ],
    "prefix": ["tiermem.prefix"],
    "transfer": [
        "tiermem.inflight",
        "tiermem.lanes",
        "tiermem.meter",
        "tiermem.mover",
        "tiermem.page_sums",
        "tiermem.poison",
        "tiermem.probe",
        "tiermem.quarantine",
        "tiermem.routes",
        "tiermem.transfer",
    ],
    "step": [
        "tiermem.chunks",
        "tiermem.core",
        "tiermem.device_work",
        "tiermem.hand_over",
        "tiermem.lease",
        "tiermem.lookahead",
        "tiermem.lower_pages",
        "tiermem.packed",
        "tiermem.resident",
        "tiermem.plan",
        "tiermem.planner",
        "tiermem.ram_attention",
        "tiermem.ram_balance",
        "tiermem.room",
        "tiermem.sequence",
        "tiermem.step",
        "tiermem.step_record",
        "tiermem.streaming",
        "tiermem.upload",
        "tiermem.write_through",
    ],
    "manager": [
        "tiermem.build",
        "tiermem.closing",
        "tiermem.graphs",
        "tiermem.pieces",
        "tiermem.limits",
        "tiermem.manager",
        "tiermem.pressure",
        "tiermem.publication",
        "tiermem.snapshots",
        "tiermem.stats",
        "tiermem.tally",
    ],
    "service": ["tiermem.service"],
    "integrations": ["tiermem.integrations"],
    "package": ["tiermem"],
    "bench": ["tiermem.bench"],
    "cli": ["tiermem.cli", "tiermem.__main__"],
}

_STEP = {
    "native",
    "private",
    "ram_split",
    "trace",
    "errors",
    "layout",
    "device",
    "attention",
    "pools",
    "store",
    "prefix",
    "transfer",
}
_MANAGER = _STEP | {"step", "config", "measure"}

# Layer -> the other layers that it may import.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "layout": set(),
    "trace": set(),
    "private": {"errors"},
    "ram_split": set(),
    "config": {"errors", "layout", "ram_split"},
    "kernels": {"native"},
    "device": {"errors", "native", "kernels"},
    "attention": {"native", "layout", "kernels"},
    "pools": {"native", "errors", "layout", "device"},
    "store": {"native", "errors", "layout", "private"},
    "prefix": {"native", "errors", "layout", "pools", "store"},
    "transfer": {"native", "trace", "errors", "layout", "device", "pools", "store", "prefix"},
    "step": _STEP,
    "manager": _MANAGER,
    "service": _MANAGER | {"manager", "package"},
    "integrations": _MANAGER | {"manager", "package"},
    "package": _MANAGER | {"manager"},
    "forecast": {"errors", "layout", "ram_split", "config"},
    "measure": {
        "native",
        "private",
        "errors",
        "layout",
        "config",
        "device",
        "attention",
        "pools",
        "store",
    },
    "bench": _MANAGER | {"manager", "measure", "forecast", "package", "integrations"},
    "cli": _MANAGER
    | {"manager", "measure", "forecast", "bench", "package", "service", "integrations"},
}

# What comes from outside -> the modules or packages that alone may import it.
RESERVED = {
    "cuda": ["tiermem.device.cuda"],
    "cupy": [],
    "lmdb": [
        "tiermem.store",
        "tiermem.store_files",
        "tiermem.store_index",
        "tiermem.index_image",
        "tiermem.store_keeper",
        "tiermem.store_rebuild",
        "tiermem.cli",
    ],
    "triton": ["tiermem.attention.kernels"],
    "transformers": ["tiermem.integrations", "tiermem.cli"],
    "threading": ["tiermem.service", "tiermem.patience"],
    "_thread": ["tiermem.service"],
    "concurrent": ["tiermem.service", "tiermem.cipher"],
    "cryptography": ["tiermem.cipher"],
    "multiprocessing": [],
    "asyncio": ["tiermem.service"],
    "pickle": [],
}


@dataclass(frozen=True, slots=True)
class Import:
    """One module that a source names. `at_run_time` is false under `if TYPE_CHECKING`."""

    line: int
    name: str
    at_run_time: bool


def module_names() -> dict[str, Path]:
    """Dotted name -> file of every Python module of the package."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


def layer_of(module: str) -> str:
    """The layer of `module`. KeyError: it has none, and must be given one in LAYERS."""
    matches = [
        (len(prefix), layer)
        for layer, prefixes in LAYERS.items()
        for prefix in prefixes
        if _within(module, prefix) and (prefix != "tiermem" or module == "tiermem")
    ]
    if not matches:
        raise KeyError(f"{module}: in no layer; name it in tests/layers.py where it belongs")
    return max(matches)[1]


def imports_of(module: str, source: str, is_package: bool = False) -> list[Import]:
    """Everything that `source` imports, wherever it stands, under full names.

    `from a import b` is a.b, which is a module or something in the module a. `__import__("a.b")` and
    `importlib.import_module("a.b")` count too.
    """
    package = module if is_package else module.rpartition(".")[0]
    return list(_walk(ast.parse(source), package, at_run_time=True))


def violations(module: str, source: str, known: set[str], is_package: bool = False) -> list[str]:
    """What `source`, as the module `module`, imports against the layers; `known` are the package's modules."""
    layer = layer_of(module)
    allowed = MAY_IMPORT[layer] | {layer}
    found = []
    for item in imports_of(module, source, is_package):
        where = f"{module}:{item.line}: {layer} imports {item.name}"
        top = item.name.partition(".")[0]
        if not _may_use(module, top):
            found.append(f"{where}, reserved for {RESERVED[top]}")
        if top == "tiermem" and layer_of(_module_in(item.name, known)) not in allowed:
            found.append(f"{where}; may import {', '.join(sorted(allowed))}")
    return found


def run_time_imports(module: str, path: Path, known: set[str]) -> set[str]:
    """The package's modules that loading `module` loads first, apart from packages it lies in."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    # Imports within functions do not run when the module is loaded.
    tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    items = [item for item in _walk(tree, package, at_run_time=True) if item.at_run_time]
    names = {_module_in(item.name, known) for item in items if _within(item.name, "tiermem")}
    return {name for name in names if not _within(module, name)}


def _may_use(module: str, top: str) -> bool:
    return top not in RESERVED or any(_within(module, prefix) for prefix in RESERVED[top])


def _module_in(name: str, known: set[str]) -> str:
    """The longest part of `name` that is a module."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def _within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def _walk(node: ast.AST, package: str, at_run_time: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for statement in child.body:
                yield from _walk(ast.Module([statement], []), package, at_run_time=False)
            for statement in child.orelse:
                yield from _walk(ast.Module([statement], []), package, at_run_time)
            continue
        for name in _named(child, package):
            yield Import(getattr(child, "lineno", 0), name, at_run_time)
        yield from _walk(child, package, at_run_time)


def _named(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = resolve_name("." * node.level + (node.module or ""), package)
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func).rpartition(".")[2]
        name = node.args[0].value
        if called in ("__import__", "import_module") and isinstance(name, str):
            return [name]
    return []
