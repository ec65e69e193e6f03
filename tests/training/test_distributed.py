"""One promise, with real processes: the same global batch gives the same gradient however it is cut."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import make_notes
from distributed_worker import FSDP2, LR, MUTATIONS, Ranks, rotary_in, train, varied_model
from peft import LoraConfig
from safetensors.torch import load_file

from hf_densefeat import AutoDenseModel, DenseObjective, DensePairCollator, adjacent_pairs
from hf_densefeat.data.sampling import PairBatchSampler
from hf_densefeat.data.tokens import TextProcessor
from hf_densefeat.objective.expander import Expander

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

BATCH = 24  # pairs of an update
OBJECTIVE = {"mlm_weight": 3.0, "dense_weight": 1.0, "lambda_sub": 0.5, "lambda_orth": 0.005, "subspace_dim": 4}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
FLOOR = {torch.float32: 0.05, torch.float64: 1e-3}


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks(3)
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def data(tokenizer):
    """55 pairs: two updates of 24, and a last one of 7."""
    notes = make_notes(15).select(range(70))
    data, _ = TextProcessor(tokenizer).pairs(notes, adjacent_pairs(notes), max_length=64)
    assert len(data) == 55
    return data


@pytest.fixture
def run(ranks, tokenizer, data, tmp_path):
    """Train in so many processes."""

    def run(world, **kwargs):
        return ranks.run(train, world, folder=str(tmp_path), tokenizer=tokenizer, data=data, **OBJECTIVE | kwargs)

    return run


@pytest.fixture(scope="module")
def expected(tokenizer, data):
    """Float64 gradients of every update by autograd through the whole batch in one process, without the Trainer."""
    known = {}

    def gradients(family, drop_last=False, window="none", lambda_anchor=0.0, expander=0, **options):
        key = (family, window, lambda_anchor, expander, *sorted(options.items()))
        if key not in known:
            model = varied_model(family, tokenizer, torch.float64).train()
            start = copy.deepcopy(model)
            names, parameters = zip(*model.named_parameters(), strict=True)
            width = model.config.hidden_size
            above = Expander(width, expander * width, seed=42).double() if expander else torch.nn.Identity()
            window = None if window == "none" else window
            objective = DenseObjective(
                lambda_sub=0.5,
                lambda_orth=0.005,
                subspace_dim=4,
                window=window,
                center=options.get("center", True),
                unbiased=options.get("unbiased", False),
                power_iterations=options.get("power_iterations") or None,
                terms={"anchor": lambda_anchor} if lambda_anchor else {},
            )
            collate, known[key] = DensePairCollator(tokenizer), []
            for items in PairBatchSampler(
                data.pairs, data.lengths, BATCH, seed=42, spread_patients=options.get("unbiased", False)
            ):
                batch = collate(data.__getitems__(items))
                tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
                with rotary_in(torch.float64):
                    hidden, logits = model.base_model(**tokens).last_hidden_state, model(**tokens).logits
                    frozen = start.base_model(**tokens).last_hidden_state.detach()
                mask = tokens["attention_mask"].unsqueeze(-1)
                z_a, z_b = ((hidden * mask).sum(1) / mask.sum(1)).chunk(2)
                rows = ((frozen * mask).sum(1) / mask.sum(1)).chunk(2) if lambda_anchor else None
                mlm = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
                loss = 3 * mlm + objective(above(z_a), above(z_b), start=rows)["loss"]
                trained = [*parameters, *above.parameters()]
                gradient = torch.autograd.grad(loss, trained)
                known[key].append(dict(zip(names, gradient[: len(names)], strict=True)))
                with torch.no_grad():
                    for p, g in zip(trained, gradient, strict=True):
                        p -= LR * g
        return known[key][:2] if drop_last else known[key]

    return gradients


def error(found, expected):
    """Largest relative error of a parameter's gradient, over parameters and updates.

    Relative to its own norm or, where that is larger, to a share of the whole gradient's norm: some gradients are zero
    but for rounding (of the biases of the keys), or a small rest of large terms that cancel.
    """
    assert len(found) == len(expected)
    worst = 0.0
    for f, e in zip(found, expected, strict=True):
        assert f.keys() == e.keys()
        floor = FLOOR[next(iter(f.values())).dtype] * torch.stack([g.norm() for g in e.values()]).norm()
        worst = max(worst, *(((f[n].double() - e[n]).norm() / e[n].norm().clamp(min=floor)).item() for n in e))
    return worst


AUTO = {"window": "auto", "power_iterations": 2}
EXACT = {"window": "none", "power_iterations": 0}
CUTS = [
    # family, dtype, ranks, accumulation, what differs from OBJECTIVE and the defaults
    ("bert", torch.float64, 1, 1, {}),
    ("bert", torch.float64, 1, 4, {}),
    ("bert", torch.float64, 2, 1, {"unbiased": True, "center": False}),
    ("bert", torch.float64, 2, 4, AUTO | {"dataloader_drop_last": True}),
    ("bert", torch.float64, 3, 2, AUTO | {"unbiased": True}),
    ("bert", torch.float64, 3, 8, {}),  # one pair a micro-batch: the last window ends in a micro-batch of 1, 0 and 0
    ("modernbert", torch.float64, 1, 8, AUTO),
    ("modernbert", torch.float64, 2, 2, AUTO),
    ("modernbert", torch.float64, 3, 4, {}),
    ("bert", torch.float32, 1, 2, AUTO),
    ("bert", torch.float32, 2, 1, AUTO),
    ("bert", torch.float32, 3, 4, AUTO),
    ("modernbert", torch.float32, 1, 4, {}),
    ("modernbert", torch.float32, 2, 4, {}),
    ("modernbert", torch.float32, 3, 1, AUTO),
    ("bert", torch.float64, 1, 4, AUTO | {"keep_graphs": True}),
    ("bert", torch.float64, 2, 4, {"keep_graphs": True}),
    ("modernbert", torch.float64, 3, 2, AUTO | {"keep_graphs": True}),
    ("bert", torch.float64, 3, 2, AUTO | {"lambda_anchor": 100.0}),  # from the second update on: the start moves away
    ("bert", torch.float64, 1, 4, {"expander": 2}),
    ("bert", torch.float64, 3, 2, AUTO | {"expander": 2}),
]
UNEVEN = [
    ("bert", torch.float64, [[1, 23]], {}),
    ("bert", torch.float64, [[9, 0, 3], [0, 0, 12]], AUTO),
    ("modernbert", torch.float64, [[5, 1], [0, 9], [7, 2]], AUTO),
    ("modernbert", torch.float32, [[1, 1, 22]], AUTO),
]


def cut(world, accumulation):
    """Arguments that cut an update's pairs evenly."""
    return {
        "per_device_train_batch_size": BATCH // (world * accumulation),
        "gradient_accumulation_steps": accumulation,
    }


def _options(options):
    objective = {name: value for name, value in options.items() if name not in ("dataloader_drop_last", "keep_graphs")}
    return objective | {"drop_last": options.get("dataloader_drop_last", False)}


@pytest.mark.parametrize(("family", "dtype", "world", "accumulation", "options"), CUTS)
def test_the_gradient_of_every_parameter_is_that_of_the_whole_batch(
    run, expected, family, dtype, world, accumulation, options
):
    options = EXACT | options
    answers = run(
        world,
        family=family,
        dtype=dtype,
        num_train_epochs=1,
        **cut(world, accumulation),
        **options,
    )
    for answer in answers:
        assert error(answer["gradients"], expected(family, **_options(options))) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("family", "dtype", "rows", "options"), UNEVEN)
def test_uneven_cuts_and_ranks_without_rows_are_exact(run, expected, family, dtype, rows, options):
    options = EXACT | options
    answers = run(
        len(rows[0]),
        family=family,
        dtype=dtype,
        num_train_epochs=1,
        cut=rows,
        gradient_accumulation_steps=len(rows),
        **options,
    )
    for answer in answers:
        assert error(answer["gradients"], expected(family, **_options(options))) <= TOLERANCE[dtype]


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_the_comparison_sees_the_common_mistakes(run, expected, mistake):
    answers = run(2, change=mistake, dtype=torch.float64, max_steps=1, per_device_train_batch_size=12, **EXACT)
    assert error(answers[0]["gradients"], expected("bert", **EXACT)[:1]) > 0.1


@pytest.mark.parametrize("weights", [{"mlm_weight": 3.0, "dense_weight": 0.0}, {"mlm_weight": 0.0}])
def test_either_loss_alone_is_exact(run, weights):
    cuts = [(1, 1), (2, 4), (3, 2)]
    whole, *others = (
        run(world, dtype=torch.float64, num_train_epochs=1, **cut(world, accumulation), **EXACT | weights)[-1][
            "gradients"
        ]
        for world, accumulation in cuts
    )
    for found in others:
        assert error(found, whole) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_update_costs_one_all_reduce_of_the_moments(run, accumulation):
    d = 24
    for answer in run(2, num_train_epochs=2, logging_steps=1000, **cut(2, accumulation), **AUTO):
        first, *others = answer["collectives"][:6]
        moments = ("all_reduce", 4 * (d**2 + 5 * d + 5 + 2))  # predicted tokens, ranks that were told to stop
        assert others == [[moments]] * 5
        assert first[-2:] == [("all_reduce", 4 * (d + 1)), moments]  # the first shift is the mean of the first rows


def test_all_ranks_hold_the_same_state_and_weights(run):
    first, *others = run(3, num_train_epochs=2, **cut(3, 2), **AUTO)
    assert {"shift", "a.basis", "b.basis", "a.covariance", "b.covariance"} <= first["state"].keys()
    for other in others:
        assert first["state"].keys() == other["state"].keys()
        for kind in ("state", "weights"):
            for name, value in first[kind].items():
                assert torch.equal(value, other[kind][name])


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(run, tmp_path, worlds):
    before, after = worlds
    common = AUTO | {"dtype": torch.float64, "optim": "adamw_torch", "adam_epsilon": 1e-4, "num_train_epochs": 2}
    whole = run(1, **common, **cut(1, 1))[0]
    run(before, **common, **cut(before, 2), save_strategy="steps", save_steps=4)
    checkpoint = tmp_path / "checkpoint-4"
    assert len(list(checkpoint.glob("densefeat_state*"))) == 1
    for answer in run(after, **common, **cut(after, 4), resume=str(checkpoint)):
        assert error(answer["gradients"], whole["gradients"][4:]) <= TOLERANCE[torch.float64]
        assert error([answer["weights"]], [whole["weights"]]) <= TOLERANCE[torch.float64]
        for name, value in whole["state"].items():
            found = answer["state"][name]
            if "basis" in name:  # the sign of a basis vector is that of a rounding error
                found, value = found.abs(), value.abs()
            torch.testing.assert_close(found, value)


def test_a_stream_and_its_resume_with_another_number_of_processes(ranks, tokenizer, tmp_path):
    stream = make_notes(15).to_iterable_dataset(num_shards=2)
    common = OBJECTIVE | AUTO | {"dtype": torch.float64, "max_length": 64, "max_steps": 6, "data": stream}

    def run(world, accumulation, **kwargs):
        kwargs |= common | cut(world, accumulation)
        return ranks.run(train, world, folder=str(tmp_path), tokenizer=tokenizer, **kwargs)

    whole = run(1, 1)[0]
    run(2, 2, save_strategy="steps", save_steps=4)
    for answer in run(3, 4, resume=str(tmp_path / "checkpoint-4")):
        assert answer["steps"] == 6
        assert error(answer["gradients"], whole["gradients"][4:]) <= TOLERANCE[torch.float64]
        assert error([answer["weights"]], [whole["weights"]]) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_nan_on_one_rank_skips_the_update_on_all(run, accumulation):
    common = AUTO | {"dtype": torch.float64, "num_train_epochs": 1}
    whole = run(1, poison=(0, 2), **common, **cut(1, 1))[0]
    for answer in run(2, poison=(1, 2), **common, **cut(2, accumulation)):
        assert answer["skipped"] == whole["skipped"] == 1
        assert answer["gradients"][1] == {}
        assert answer["steps"] == 3
        assert [entry["skipped_updates"] for entry in answer["logs"]] == [0, 1, 1]
        assert error([answer["weights"]], [whole["weights"]]) <= TOLERANCE[torch.float64]
        assert all(value.isfinite().all() for value in answer["state"].values())


def test_the_log_tells_the_terms_of_the_whole_batch(run):
    whole, *others = (
        run(world, num_train_epochs=1, **cut(world, accumulation), **AUTO)[0]["logs"]
        for world, accumulation in [(1, 1), (2, 4), (3, 1)]
    )
    terms = {"mlm_loss": 3.0, "spectral_spreading": 1.0, "subspace_consistency": 0.5, "orthogonality": 0.005}
    for entry in whole:
        assert entry["loss"] == pytest.approx(sum(weight * entry[name] for name, weight in terms.items()), rel=1e-5)
    for logs in others:
        for entry, expected in zip(logs, whole, strict=True):
            for name in ("loss", "effective_rank", "trace", "gap", *terms):
                assert entry[name] == pytest.approx(expected[name], rel=1e-4), name


def test_an_adapter_trains_the_same_in_two_processes_resumes_in_one_and_is_saved_merged(run, notes, tmp_path):
    adapter = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["cls"], init_lora_weights=False)
    common = AUTO | {"dtype": torch.float64, "optim": "adamw_torch", "adam_epsilon": 1e-4, "num_train_epochs": 2}
    common |= {"peft_config": adapter, "encode": notes[:5]["text"]}
    whole = run(1, **common, **cut(1, 1))[0]
    assert {name.split(".")[-3] for name in whole["gradients"][0] if ".cls." not in name} == {"lora_A", "lora_B"}
    saving = {"save_strategy": "steps", "save_steps": 4, "save": str(tmp_path / "saved")}
    for answer in run(2, **common, **cut(2, 2), **saving):
        assert answer["wrapper"] == "DistributedDataParallel"
        assert error(answer["gradients"], whole["gradients"]) <= TOLERANCE[torch.float64]
        assert error([answer["weights"]], [whole["weights"]]) <= TOLERANCE[torch.float64]
    z = AutoDenseModel.from_pretrained(str(tmp_path / "saved")).encode(notes[:5]["text"])
    torch.testing.assert_close(z, whole["encoded"], rtol=1e-5, atol=1e-5)
    for answer in run(1, **common, **cut(1, 4), resume=str(tmp_path / "checkpoint-4")):
        assert error(answer["gradients"], whole["gradients"][4:]) <= TOLERANCE[torch.float64]


def test_fsdp2_trains_evaluates_encodes_and_saves(run, expected, notes, tmp_path):
    texts = notes[:5]["text"]
    common = {
        "family": "modernbert",
        "dtype": torch.float64,
        "optim": "adamw_torch",
        "adam_epsilon": 1e-4,
        "num_train_epochs": 2,
        "evaluation": notes,
        "encode": texts,
        **AUTO,
    }
    whole = run(1, **common, **cut(1, 1), evaluator=Width())[0]
    fsdp = common | {"environment": FSDP2, "evaluator": Width()}
    answers = run(2, **fsdp, **cut(2, 2), save_strategy="steps", save_steps=4, save=str(tmp_path / "saved"))
    for answer in answers:
        assert answer["wrapper"] == "FSDPModernBertForMaskedLM"
        assert error(answer["gradients"], whole["gradients"]) <= TOLERANCE[torch.float64]
        assert answer["metrics"]["eval_width"] == 24
        for name in ("eval_loss", "eval_mlm_loss", "eval_spectral_spreading", "eval_effective_rank"):
            assert answer["metrics"][name] == pytest.approx(whole["metrics"][name])
        torch.testing.assert_close(answer["encoded"], whole["encoded"])
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["ModernBertForMaskedLM"]
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    saved = {name: weights[name] for name in whole["weights"]}  # FSDP2 also writes the tied decoder
    assert error([saved], [whole["weights"]]) <= TOLERANCE[torch.float64]
    for answer in run(2, **fsdp, **cut(2, 4), resume=str(tmp_path / "checkpoint-4")):
        assert error(answer["gradients"], whole["gradients"][4:]) <= TOLERANCE[torch.float64]


def test_fsdp2_refuses_a_bias_with_two_names(run):
    with pytest.raises(RuntimeError, match=r"cls.predictions.bias and cls.predictions.decoder.bias are one parameter"):
        run(2, environment=FSDP2, max_steps=1, **cut(2, 1))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_compiled_model_is_one_graph_without_the_objective(run, accumulation):
    """Two graphs a pass, of fixed and of any length, whatever the updates; the pass without gradient has its own."""
    common = {"num_train_epochs": 2, **cut(1, accumulation), **AUTO}
    eager = run(1, **common)[0]
    compiled = run(1, torch_compile=True, torch_compile_backend="aot_eager", **common)[0]
    assert compiled["wrapper"] == "OptimizedModule"
    assert compiled["graph_breaks"] == {}
    assert compiled["graphs"][-1] == compiled["graphs"][2] <= 2 * min(accumulation, 2) + 1
    assert [entry["loss"] for entry in compiled["logs"]] == pytest.approx([entry["loss"] for entry in eager["logs"]])


class Width:
    """An evaluator."""

    def __call__(self, model, tokenizer):
        return {"width": model.encode(["stable", "chest pain"], tokenizer).shape[1]}
