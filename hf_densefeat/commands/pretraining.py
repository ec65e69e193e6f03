"""A run of `densefeat pretrain`: read, measure, train, fit the views, save, measure."""

import copy
import json
import os
import shlex
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
from datasets import disable_progress_bars
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, set_seed
from transformers.utils import logging as transformers_logging

from hf_densefeat.commands.fitting import (
    below,
    described,
    fit_views,
    go_share,
    how_to_use,
    measured_views,
    trained_for_similarity,
)
from hf_densefeat.commands.measuring import Measurement, check_probes, loading, parse_tasks, sample, words_of
from hf_densefeat.commands.pretrain import Settings, written_options
from hf_densefeat.commands.progress import line, show
from hf_densefeat.commands.settings import error_line, writable
from hf_densefeat.data.notes import describe_notes
from hf_densefeat.data.pairs import pair_notes
from hf_densefeat.data.splits import SplitRecord, hold_out
from hf_densefeat.data.tokens import TokenPairs
from hf_densefeat.evaluation.similarity import similarity_tasks
from hf_densefeat.evaluation.words import NAME as WORDS
from hf_densefeat.models.dense import AutoDenseModel
from hf_densefeat.models.tokenizers import load_tokenizer
from hf_densefeat.objective.distributed import end_processes
from hf_densefeat.reporting.comparison import Measured, judged, plain_numbers, verdict
from hf_densefeat.reporting.formats import markdown
from hf_densefeat.reporting.tables import before_after_table, terminal
from hf_densefeat.training.arguments import CONTRASTIVE, DenseTrainingArguments
from hf_densefeat.training.checkpoints import CheckpointError, newest_whole
from hf_densefeat.training.trainer import DenseTrainer


def run(settings: Settings, args: DenseTrainingArguments) -> None:
    """Read, measure, train, fit the views, save, measure."""
    set_seed(args.seed)
    use_every_core(args)
    transformers_logging.disable_progress_bar()  # of files read and written, which are there at once
    if not args.should_save or not sys.stderr.isatty():  # no frames of a bar in a log file
        disable_progress_bars()
        args.disable_tqdm = True
    try:
        beside = kept_measurements(settings, args)
        trainer, measure, parts, start, new = prepare(settings, args)
    # what is wrong with notes, model, options, Hub or disk, before hours of training
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"pretrain: error: {error_line(error, written_options())}")

    model: Any = trainer.model
    tokenizer = trainer.processing_class
    before = measure("start", model.to(args.device), tokenizer) if args.should_save else None
    train(trainer, settings, head_is_new=bool(new))
    try:
        trainer.save_model(_internal_call=True)  # first: whatever fails from here on, the encoder is there
        if settings.share is not None:
            said = "all of the way: sharded weights are not interpolated here, see densefeat interpolate"
            if args.should_save and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
                going: dict[str, Any] = {
                    "share": settings.share,
                    "tokenizer": tokenizer,
                    "seed": args.seed,
                    "new": new,
                }
                said = go_share(trainer.dense_model, start, parts.get("validation"), **going)
            say(args, line("share", said))
        if settings.views != "none":
            dense = trainer.dense_model
            how: dict[str, Any] = {"epsilon": settings.views, "seed": args.seed}
            how["for_similarity"] = dense.config.densefeat["contrastive"]
            dense.views, tried = fit_views(below(dense, tokenizer), parts, **how)
            say(args, described(dense.views, tried))
        trainer.save_model(_internal_call=True)  # without a push: that is done once, at the end, with what is measured
        if before is not None:
            # the folder as a user opens it: a forward of the wrapped model on one rank alone would wait for the others
            trained = AutoDenseModel.from_pretrained(str(args.output_dir)).to(args.device)
            name = ("MLM + dense" if args.mlm_weight else "dense") if args.dense_weight else "MLM alone"
            encoder = below(trained, tokenizer)
            after = measured_views(measure, encoder, trained.views) or [measure(name, encoder)]
            report([before, *measure.beside(), *beside, *after], trainer, args)
    except SafetensorError as error:
        sys.exit(f"pretrain: error: {args.output_dir} could not be written: {error}")
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub()
    end_processes()


def train(trainer: DenseTrainer, settings: Settings, *, head_is_new: bool) -> None:
    """A new head alone first, then all; where it is stopped, say how to go on."""
    args: Any = trainer.args
    resumed = args.resume_from_checkpoint
    if head_is_new and args.mlm_weight and settings.head_warmup_steps and not resumed:
        say(args, line("lm head", f"new: it is trained alone first, for {settings.head_warmup_steps} updates"))
        try:
            warm_up_head(trainer.model, settings, args, trainer.train_dataset, trainer.processing_class)
        except SystemExit:
            say(args, "Stopped by SIGTERM while the new head was trained alone: start anew.")
            raise
    try:
        result = trainer.train(resume_from_checkpoint=True if resumed == "last" else resumed)
    except KeyboardInterrupt:
        sys.exit(f"\nStopped at update {trainer.state.global_step}. {how_to_resume(trainer)}")
    except SystemExit:
        say(args, f"Stopped by SIGTERM at update {trainer.state.global_step}. {how_to_resume(trainer)}")
        raise
    except (OSError, CheckpointError) as error:  # anything else is a fault of ours, with its traceback
        sys.exit(f"pretrain: error: {error}")
    seconds = result.metrics.get("train_runtime", 0.0)
    say(args, line("trained", f"{trainer.state.global_step:,} updates in {seconds:,.0f} s"))
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


def use_every_core(args: DenseTrainingArguments) -> None:
    """Undo the OMP_NUM_THREADS=1 that accelerate sets where one process has a CPU for itself; another number stays.

    Threads that wait for each other spin: beside another program on two cores a run took 334 processor seconds, and 115
    alone. The number is not lowered by itself: fewer threads add in another order, and a resumed run would round otherwise.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if args.device.type == "cpu" and args.world_size == 1 and torch.get_num_threads() < cores and launched:
        torch.set_num_threads(cores)
        say(args, line("threads", f"{cores}, all cores: accelerate launch leaves one"))
    busy = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    if args.device.type == "cpu" and busy and busy + torch.get_num_threads() > cores and torch.get_num_threads() > 1:
        say(args, line("threads", f"other programs use {busy} of {cores} cores: OMP_NUM_THREADS=1 may be faster"))


def prepare(settings: Settings, args: DenseTrainingArguments) -> tuple[DenseTrainer, Measurement, dict, Any, set[str]]:
    """Notes split by patient, model, trainer and measurement, each checked; what was read is printed.

    The fourth is a copy of the start, where a share of the way from it is asked for, else None; the last as of `load_model`.
    """
    folder = writable(str(args.output_dir), "output_dir")
    full = any(folder.iterdir()) and not args.resume_from_checkpoint
    similarity_tasks(settings.similarity, None)  # words alone
    check_probes(settings.probe, "probe")
    if args.push_to_hub:
        validate_repo_id(Path(str(args.output_dir)).name if args.hub_model_id is None else args.hub_model_id)
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise ValueError("--push_to_hub needs the Hub, but offline mode is enabled: unset HF_HUB_OFFLINE.")
    source = str(settings.model or settings.config_name)
    with loading(settings.tokenizer_name or source):  # first: a name that is wrong is said before the notes are read
        tokenizer = load_tokenizer(settings.tokenizer_name or source)
    with loading(source):
        contrastive = bool(settings.model) and trained_for_similarity(source)
    if contrastive:
        say(args, line("start", take_defaults(settings, args)))
    with args.main_process_first(desc="reading notes"):
        notes = settings.read()
    read = str(notes.info.description).split("; ")[0]  # the rest has just been said in warnings
    say(args, line("notes", read), line("", describe_notes(notes)))
    pair_notes(notes, args.pairs, max_gap=args.max_gap)  # refuses notes without any, before a split of them is blamed
    with loading(source):
        model, new = load_model(settings, args)
    validated = args.eval_strategy != "no" or settings.share == "auto" or settings.probe
    need = ("train", "validation", "test") if validated else ("train", "test")
    allow = settings.allow_trained
    parts, record = hold_out(notes, seed=args.seed, record=SplitRecord.of(model), allow_trained=allow, need=need)
    record.write_to(model)
    if args.should_save:
        record.save(str(args.output_dir))
    model.config.densefeat["contrastive"] = contrastive
    model.config.densefeat.pop("share", None)  # of another run
    model.views = {}  # that of another run: it is fitted anew
    words = f"{type(model).__name__}, {model.num_parameters():,} parameters, {model.pooling} pooling"
    say(args, line("model", words))

    seed, most = args.seed, settings.max_measured_notes
    probed = {name: sample(part, most // 3, seed) for name, part in parts.items()}
    held_out = sample(parts["test"], most // 2, seed)
    how: dict[str, Any] = {"kinds": args.pairs[:1], "k": args.subspace_dim, "seed": seed}
    how |= {"record": record, "allow_trained": allow, "words": partial(words_of, parts["train"], model, tokenizer)}
    measure = Measurement(held_out, similarity=settings.similarity, tasks=parse_tasks(settings.probe, probed), **how)
    validation = parts["validation"] if args.eval_strategy != "no" else None
    trainer = DenseTrainer(
        model, args, train_dataset=parts["train"], eval_dataset=validation, processing_class=tokenizer
    )
    weighted = " + ".join(f"{weight:g} {name}" for name, (weight, _) in trainer.objective.terms.items() if weight)
    say(
        args,
        line("pairs", str(cast(TokenPairs, trainer.train_dataset).pairs)),
        line("tokens", str(trainer.reading_stats["train"])),
        line("objective", f"{args.mlm_weight:g} mlm_loss + {args.dense_weight:g} ({weighted})"),
        line("output", f"{folder}{', which is not empty: files of the same names are written over' if full else ''}"),
    )
    show(trainer)
    start = trainer.start or copy.deepcopy(model) if settings.share is not None else None
    return trainer, measure, parts, start, new


def take_defaults(settings: Settings, args: DenseTrainingArguments) -> str:
    """Set the options that were not given to what a contrastive start needs; return these in words."""
    chosen = {name: value for name, value in CONTRASTIVE.items() if name not in settings.given}
    if "num_train_epochs" in settings.given:
        chosen.pop("max_steps", None)
    for name, value in chosen.items():
        setattr(args, name, value)
    settings.share = settings.share or "auto"
    words = ", ".join(f"{name} {' '.join(v) if isinstance(v, list) else f'{v:g}'}" for name, v in chosen.items())
    return f"trained for similarity, so by default {words}, share {settings.share}"


def load_model(settings: Settings, args: DenseTrainingArguments) -> tuple[Any, set[str]]:
    """The model, and names of the weights of its language-modelling head that its checkpoint does not have."""
    if not settings.model:
        config = AutoConfig.from_pretrained(str(settings.config_name))
        return AutoDenseModel.from_config(config, pooling=args.pooling), set()
    said = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it calls a checkpoint without a head corrupted; `train` says it is new
    model, loading = AutoDenseModel.from_pretrained(settings.model, pooling=args.pooling, output_loading_info=True)
    transformers_logging.set_verbosity(said)
    return model, {name for name in loading["missing_keys"] if not name.startswith(f"{model.base_model_prefix}.")}


def warm_up_head(model: Any, settings: Settings, args: DenseTrainingArguments, train_dataset, tokenizer) -> None:
    """Train the new head alone by MLM: the encoder must not be pulled about by a random head."""
    trained = {id(parameter) for parameter in model.base_model.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in trained)
    changed: dict[str, Any] = {
        "dense_weight": 0.0,
        "mlm_weight": 1.0,
        "max_steps": settings.head_warmup_steps,
        "learning_rate": settings.head_warmup_learning_rate,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "report_to": "none",
    }
    own = replace(args, **changed)
    trainer = DenseTrainer(model, own, train_dataset=train_dataset, processing_class=tokenizer)
    show(trainer)
    trainer.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def how_to_resume(trainer: DenseTrainer) -> str:
    """What to do after Ctrl-C or SIGTERM."""
    found = newest_whole(Path(str(trainer.args.output_dir)), trainer.fingerprint())
    if found is None:
        return "There is no checkpoint to resume from: --save_steps says how often one is written."
    return f"The same command with --resume_from_checkpoint last goes on from {found.name}."


def kept_measurements(settings: Settings, args: DenseTrainingArguments) -> list[Measured]:
    """What was measured once of another training, such as MLM alone; nothing where that was of other options.

    The file of `beside` says by `of` which options it is of, such as model, seed and max_steps.
    """
    if not settings.beside:
        return []
    kept = json.loads(Path(settings.beside).read_text())
    here = {name: value for source in (args, settings) for name, value in vars(source).items()}
    same = {name: here[name] == value or str(here[name]).endswith(f"/{value}") for name, value in kept["of"].items()}
    other = [f"{name} {kept['of'][name]}" for name, equal in same.items() if not equal]
    if not other:
        return kept["measured"]
    say(args, line("beside", f"{Path(settings.beside).name} is left out: it was measured with {', '.join(other)}"))
    return []


def report(measured: list[Measured], trainer: DenseTrainer, args: DenseTrainingArguments) -> None:
    """Print the table, and write it, the numbers, the pictures and the model card beside the model."""
    table, folder = before_after_table(measured), Path(str(args.output_dir))
    (folder / "report.md").write_text(markdown(before_after_table(measured, wide=True)) + "\n")
    views = {one["view"]: one for one in measured if "view" in one}
    words = {one["name"]: one for one in measured if one["name"] == WORDS}
    after = {"after": views.get("content", measured[-1]), "form": views.get("form")}
    numbers = {"before": measured[0], **words, **after, "updates": trainer.state.global_step}
    (folder / "report.json").write_text(json.dumps(plain_numbers(numbers), indent=1) + "\n")
    trainer.measured = measured
    trainer.create_model_card()
    advice = textwrap.fill(verdict(judged(measured), measured[0]).sentence, 80)
    say(args, f"\n{terminal(table)}\n\n{advice}\n\n{next_steps(args, trainer.dense_model.views)}")


def next_steps(args: DenseTrainingArguments, views: dict) -> str:
    """Where things are and what to do with them, a line each."""
    folder, word = args.output_dir, shlex.quote(str(args.output_dir))
    return (
        f"Saved to {folder}: AutoModel and SentenceTransformer open it; report.md has this table.\n"
        f"{how_to_use(folder, views)}\n"
        f"Measure:  densefeat probe --model {word} --notes YOUR_NOTES --similarity same_patient\n"
        f"Share:    hf upload YOUR_NAME/MODEL {word} --private --exclude '_*'"
    )


def say(args: DenseTrainingArguments, *lines: str) -> None:
    """Print once, not once a process."""
    if args.should_save:
        print(*lines, sep="\n", flush=True)
