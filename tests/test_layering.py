"""The rooms depend on each other one way, and every one of them can be imported."""

import ast
import functools
import importlib
import inspect
from pathlib import Path

import pytest

import hf_densefeat

PACKAGE = Path(hf_densefeat.__file__).parent
MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))
# The floors, and what each may import of ours: floors, or rooms of them (design, section 2).
FLOORS = {
    "objective": set(),
    "data": set(),
    "models": set(),
    "events": {"data", "models"},
    "evaluation": {"models", "data.splits", "data.identity", "data.columns", "objective.moments"},
    "reporting": {"evaluation", "models.pooling"},
    "training": {"data", "models", "events", "objective", "evaluation", "reporting"},
    "commands": {"data", "models", "events", "objective", "evaluation", "reporting", "training"},
}
MATHEMATICS = [
    *sorted(name for name in MODULES if name.startswith("objective.")),
    "models.pooling",
    "evaluation.geometry",
    "evaluation.ranking",
]


@functools.cache
def imports(module, *, deferred=True):
    """Full dotted names of all that a module imports, anywhere in it, or without what functions import when they run."""
    names, tree = set(), ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())
    functions = [] if deferred else [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    left_out = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def ours(module, *, deferred=True):
    """Rooms of the package, as floor.room, that a module imports."""
    found = imports(module, deferred=deferred)
    names = {name.removeprefix("hf_densefeat.") for name in found if name.startswith("hf_densefeat.")}
    rooms = {".".join(name.split(".")[:2]) for name in names}
    return {room if room in MODULES else room.split(".")[0] + ".__init__" for room in rooms}


def outside(module):
    """Top-level packages that a module imports."""
    return {name.split(".")[0] for name in imports(module)} - {"hf_densefeat"}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_can_be_imported(module):
    """Importing each room alone works."""
    importlib.import_module(f"hf_densefeat.{module}".removesuffix(".__init__"))


def test_every_room_is_on_a_floor():
    """The folders are the floors of the table, and no room stands beside them."""
    assert {module.split(".")[0] for module in MODULES if module != "__init__"} == set(FLOORS)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_dependencies_point_one_way(module):
    """A room imports from its own floor and from those that the table lets it."""
    floor = module.split(".")[0]
    for room in ours(module):
        assert room.split(".")[0] in FLOORS[floor] | {floor} or room in FLOORS[floor], f"{module} imports {room}"


@pytest.mark.parametrize("module", MATHEMATICS)
def test_mathematics_knows_torch_alone(module):
    """The objective, pooling and geometry import neither transformers nor datasets nor the data rooms."""
    assert not outside(module) & {"transformers", "datasets", "accelerate", "peft", "sklearn", "pyarrow", "evaluate"}


def test_no_circle():
    """No room imports itself through others; a command imports its work, which knows its settings, when it runs."""
    graph = {module: ours(module, deferred=False) & set(MODULES) for module in MODULES if module != "__init__"}
    done = set()
    while len(done) < len(graph):
        ready = {module for module, needs in graph.items() if module not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_only_one_room_communicates():
    """No other room imports torch.distributed or names it."""
    for module in MODULES:
        uses = any(name.startswith("torch.distributed") for name in imports(module))
        text = (PACKAGE / (module.replace(".", "/") + ".py")).read_text()
        assert (uses or "torch.distributed" in text or "dist.all_reduce" in text) == (
            module == "objective.distributed"
        ), module


def test_only_the_trainer_knows_the_trainer():
    """transformers' Trainer is imported on the training floor alone; ours by the package and the commands."""
    for module in MODULES:
        names = imports(module)
        assert ("transformers.Trainer" in names) == (module == "training.resumable"), module
        assert ("transformers.TrainingArguments" in names) == (module == "training.arguments"), module
        if module.split(".")[0] not in ("__init__", "training", "commands"):
            assert "training.trainer" not in ours(module), module


def test_no_pandas_no_utils_no_leftovers():
    """No room imports pandas, none is called utils, and nothing is left to do in the text of any."""
    assert not [module for module in MODULES if "util" in module or "helper" in module]
    for module in MODULES:
        text = (PACKAGE / (module.replace(".", "/") + ".py")).read_text()
        assert "pandas" not in outside(module), module
        for word in ("TO" + "DO", "FIX" + "ME", "XXX", "/work/", "/tmp/"):
            assert word not in text, (module, word)


def test_public_names_are_there():
    """Everything in `__all__` exists, is sorted and documented, and so is every public method of ours in it."""
    assert sorted(hf_densefeat.__all__) == hf_densefeat.__all__
    typed = {name.rpartition(".")[2] for name in imports("__init__") if name.startswith("hf_densefeat.")}
    assert typed == set(hf_densefeat.__all__)
    for name in hf_densefeat.__all__:
        found = getattr(hf_densefeat, name)
        assert found.__doc__, name
        if inspect.isclass(found):
            methods = inspect.getmembers(found, lambda one: inspect.isroutine(one) or isinstance(one, property))
            for method, one in methods:
                ours = str(getattr(one, "__module__", "")).startswith("hf_densefeat")
                assert one.__doc__ or method.startswith("_") or not ours, (name, method)


# Methods with an underscore that a class of ours overrides though they are another package's, or another floor's.
OVERRIDDEN = {
    "training.resumable.ResumableTrainer": {
        "_get_output_dir",
        "_init_training_state",
        "_issue_warnings_after_load",
        "_load_best_model",
        "_load_from_checkpoint",
        "_push_from_checkpoint",
        "_save",
        "_save_checkpoint",
    },
    "training.update.UpdateTrainer": {"_clip_grad_norm", "_get_grad_norm"},
    "training.trainer.DenseTrainer": {"_load_optimizer_and_scheduler", "_save_optimizer_and_scheduler"},
    "data.collator._Masking": {"_calc_word_ids_and_prob_mask", "_whole_word_mask"},
    # what a module of `evaluate` is made of
    "evaluation.geometry_metrics.GeometryMetrics": {"_compute", "_info"},
    # how a model of another input kind reads: the mixin's own contract for its subclasses
    "events.modeling_event.EpisodeModel": {"_default_tokenizer", "_padded", "_rows"},
    "events.modeling_event.EventPreTrainedModel": {"_init_weights"},
}


def overridden(cls):
    """Names with one underscore that a class defines and a base outside its floor has too."""
    floor = cls.__module__.split(".")[1]
    found = set()
    for name in vars(cls):
        bases = [base for base in cls.__mro__[1:] if name in vars(base)]
        private = name.startswith("_") and not name.startswith("__")
        if private and inspect.isroutine(inspect.getattr_static(cls, name)):
            found |= {name for base in bases if base.__module__.split(".")[:2] != ["hf_densefeat", floor]}
    return found


def test_private_methods_of_others_are_overridden_by_name():
    """The table names every one, nobody else overrides any, and those of the Trainer say what they mend."""
    found = {}
    for module in MODULES:
        imported = importlib.import_module(f"hf_densefeat.{module}".removesuffix(".__init__"))
        for name, cls in inspect.getmembers(imported, inspect.isclass):
            if cls.__module__ == imported.__name__ and overridden(cls):
                found[f"{module}.{name}"] = overridden(cls)
                for method in overridden(cls) if module.startswith("training") else ():
                    assert vars(cls)[method].__doc__, (name, method)
    assert found == OVERRIDDEN
