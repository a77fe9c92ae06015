"""The layers hold: nothing imports what lies above it, and the check notices when something does."""

from __future__ import annotations

import pytest
from layers import (
    LAYERS,
    MAY_IMPORT,
    imports_of,
    layer_of,
    module_names,
    run_time_imports,
    violations,
)

MODULES = module_names()
KNOWN = set(MODULES) | {"tiermem._core"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_layer_may(module: str) -> None:
    path = MODULES[module]
    source = path.read_text(encoding="utf-8")
    assert violations(module, source, KNOWN, path.name == "__init__.py") == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    waiting = {module: run_time_imports(module, path, KNOWN) for module, path in MODULES.items()}
    waiting["tiermem._core"] = set()
    while ready := {module for module, needs in waiting.items() if not needs}:
        waiting = {module: needs - ready for module, needs in waiting.items() if needs}
    assert waiting == {}, "each of these waits for another of these"


def test_every_layer_has_its_rule_and_the_rules_have_no_circle() -> None:
    assert set(MAY_IMPORT) | {"native"} == set(LAYERS)
    below = {layer: set(allowed) for layer, allowed in MAY_IMPORT.items()} | {"native": set()}
    while ready := {layer for layer, allowed in below.items() if not allowed}:
        below = {layer: allowed - ready for layer, allowed in below.items() if allowed}
    assert below == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tiermem.errors", "from tiermem.layout import PageLayout"),
        ("tiermem.layout", "from tiermem.errors import ConfigError"),
        ("tiermem.layout", "import tiermem.config"),
        ("tiermem.config", "from tiermem.device import protocol"),
        ("tiermem.config", "from tiermem import _core"),
        ("tiermem.device.host", "from tiermem.layout import PageLayout"),
        ("tiermem.device.host", "from cuda.bindings import runtime"),
        ("tiermem.device.cuda_device", "import cuda.bindings.driver as driver"),
        ("tiermem.attention.kernels.attend", "from tiermem.pools import SlotPool"),
        ("tiermem.attention.host", "import triton"),
        ("tiermem.pools", "from tiermem.mover import Mover"),
        ("tiermem.store", "from tiermem.pools import Tier"),
        ("tiermem.store", "from tiermem.config import TierConfig"),
        ("tiermem.transfer", "from tiermem.sequence import Sequence"),
        ("tiermem.sequence", "from tiermem.manager import TierManager"),
        ("tiermem.manager", "from tiermem.cli import main"),
        ("tiermem.manager", "from tiermem import cli"),
        ("tiermem.manager", "import tiermem.integrations.transformers"),
        ("tiermem.manager", "from tiermem.service import Service"),
        ("tiermem.manager", "import threading"),
        ("tiermem.manager", "from concurrent.futures import ThreadPoolExecutor"),
        ("tiermem.manager", "import transformers"),
        ("tiermem.integrations.transformers", "from tiermem.cli import main"),
        # However it is written.
        ("tiermem.pools", "def late():\n    from tiermem.manager import TierManager"),
        ("tiermem.pools", "try:\n    import tiermem.manager\nexcept ImportError:\n    pass"),
        ("tiermem.pools", "from .manager import TierManager"),
        ("tiermem.pools", "from . import manager"),
        ("tiermem.device.host", "from ..manager import TierManager"),
        ("tiermem.device", "from ..manager import TierManager"),
        ("tiermem.pools", "if TYPE_CHECKING:\n    from tiermem.manager import TierManager"),
        ("tiermem.pools", "import importlib\nimportlib.import_module('tiermem.manager')"),
        ("tiermem.pools", "__import__('threading')"),
    ],
)
def test_a_forbidden_import_is_noticed(module: str, source: str) -> None:
    known = KNOWN | {
        "tiermem.cli",
        "tiermem.integrations",
        "tiermem.integrations.transformers",
        "tiermem.manager",
        "tiermem.service",
    }
    source = "from __future__ import annotations\n" + source
    assert violations(module, source, known, is_package=module == "tiermem.device") != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tiermem.config", "from tiermem.errors import ConfigError\nimport tomllib"),
        ("tiermem.device.cuda", "from cuda.bindings import runtime"),
        ("tiermem.store", "import lmdb\nfrom tiermem import _core"),
        ("tiermem.attention.kernels.attend", "import triton.language as tl"),
        ("tiermem.sequence", "from tiermem.mover import Mover"),
        ("tiermem.service", "import threading\nfrom tiermem.manager import TierManager"),
        ("tiermem.cli", "from tiermem import TierManager, integrations"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(module, source, KNOWN) == []


def test_a_new_module_must_be_given_a_layer() -> None:
    with pytest.raises(KeyError, match="in no layer"):
        layer_of("tiermem.misc")
    assert layer_of("tiermem") == "package"
    assert layer_of("tiermem.device.cuda") == "device"


def test_imports_are_found_under_their_full_names() -> None:
    source = "import a.b as c\nif x:\n    from .d import e, f\nif TYPE_CHECKING:\n    import g\n"
    found = [(item.line, item.name, item.at_run_time) for item in imports_of("p.q.r", source)]
    assert found == [
        (1, "a.b", True),
        (3, "p.q.d.e", True),
        (3, "p.q.d.f", True),
        (5, "g", False),
    ]
