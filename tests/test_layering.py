"""The rooms depend on each other one way, and every one of them can be imported."""

import ast
import importlib
from pathlib import Path

import pytest

import hf_densefeat

PACKAGE = Path(hf_densefeat.__file__).parent
MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))
CORE = {"moments", "subspace", "objective", "pooling", "geometry"}
# What each room may import of ours; rooms that are not named here may import anything but the trainer's users.
ALLOWED = {
    "moments": CORE,
    "subspace": CORE,
    "objective": CORE,
    "pooling": CORE,
    "geometry": CORE,
    "tables": set(),
    "notes": {"tables"},
    "splits": {"notes"},
    "sections": {"notes"},
    "pairs": {"notes"},
    "collator": {"notes", "pairs"},
    "streaming": {"pairs"},
    "modeling": {"pooling"},
    "arguments": {"objective"},
    "linear": set(),
    "scores": set(),
    "tasks": {"splits"},
    "probes": {"linear", "scores", "tasks"},
    "plots": {"scores"},
    "report": {"probes", "scores"},
    "export": set(),
    "adapters": set(),
    "encoders.windows": {"notes"},
    "encoders.processor": {"encoders", "notes", "pairs"},
    "encoders.tabular": {"encoders", "modeling"},
    "encoders.multimodal": {"collator", "encoders", "notes", "pairs"},
    "baselines": {"trainer"},
    "saving": {"adapters", "export", "modeling", "pairs"},
    "loading": {"collator", "pairs", "streaming"},
    "trainer": CORE | {"adapters", "arguments", "collator", "loading", "modeling", "pairs", "saving", "streaming"},
}


def imports(module):
    """Full dotted names of all that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(module):
    """Rooms of the package that a module imports."""
    return {name.split(".")[1] for name in imports(module) if name.split(".")[0] == "hf_densefeat" and "." in name}


def outside(module):
    """Top-level packages that a module imports."""
    return {name.split(".")[0] for name in imports(module)} - {"hf_densefeat"}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_can_be_imported(module):
    """Importing each room alone works."""
    importlib.import_module(f"hf_densefeat.{module}".removesuffix(".__init__"))


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_dependencies_point_one_way(module):
    """A room imports those rooms alone that the design's table lets it."""
    assert module in MODULES
    assert ours(module) <= ALLOWED[module]


@pytest.mark.parametrize("module", sorted(CORE))
def test_mathematics_knows_torch_alone(module):
    """Moments, subspaces, objective, pooling and geometry import neither transformers nor datasets nor the data rooms."""
    assert not outside(module) & {"transformers", "datasets", "accelerate", "peft", "sklearn", "pyarrow", "evaluate"}


def test_no_circle():
    """No room imports itself through others."""
    graph = {module: ours(module) & set(MODULES) for module in MODULES if module != "__init__"}
    done = set()
    while len(done) < len(graph):
        ready = {module for module, needs in graph.items() if module not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_only_moments_communicates():
    """No other room imports torch.distributed or names it."""
    for module in MODULES:
        uses = any(name.startswith("torch.distributed") for name in imports(module))
        text = (PACKAGE / (module.replace(".", "/") + ".py")).read_text()
        assert (uses or "torch.distributed" in text or "dist.all_reduce" in text) == (module == "moments"), module


def test_only_the_trainer_knows_the_trainer():
    """transformers' Trainer is imported by `trainer` alone, TrainingArguments by `arguments` alone, ours by the package."""
    for module in MODULES:
        names = imports(module)
        assert ("transformers.Trainer" in names) == (module == "trainer"), module
        assert ("transformers.TrainingArguments" in names) == (module == "arguments"), module
        if module not in ("__init__", "baselines"):
            assert "trainer" not in ours(module), module


def test_no_pandas_no_utils_no_leftovers():
    """No room imports pandas, none is called utils, and nothing is left to do in the text of any."""
    assert not [module for module in MODULES if "util" in module or "helper" in module]
    for module in MODULES:
        text = (PACKAGE / (module.replace(".", "/") + ".py")).read_text()
        assert "pandas" not in outside(module), module
        for word in ("TO" + "DO", "FIX" + "ME", "XXX", "/work/", "/tmp/"):
            assert word not in text, (module, word)


def test_public_names_are_there():
    """Everything in `__all__` exists, is sorted and documented."""
    assert sorted(hf_densefeat.__all__) == hf_densefeat.__all__
    for name in hf_densefeat.__all__:
        assert getattr(hf_densefeat, name).__doc__, name
