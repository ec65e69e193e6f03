"""Continued pretraining of a clinical encoder with MLM and the dense objective on adjacent notes.

    accelerate launch recipes/pretrain.py                                   # the bundled cohort and small encoder
    accelerate launch recipes/pretrain.py --config my.yaml --learning_rate 1e-4
    accelerate launch recipes/pretrain.py --notes notes.parquet --model_name_or_path answerdotai/ModernBERT-base \
        --probe died:binary --output_dir outputs/mine

Every key of the YAML file is an option of the command line, and the command line wins. It prints what was read, the
progress, and the geometry and linear probes before and after, and writes to `output_dir`: the encoder, as a folder that
`AutoModel` and `SentenceTransformer` open, its model card, `report.json`, `report.md` and `spectrum.png`.
"""

import difflib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import disable_progress_bars
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_densefeat import (
    AutoDenseModel,
    DenseTrainer,
    DenseTrainingArguments,
    ProbeEvaluator,
    ProbeTask,
    adjacent_pairs,
    geometry_report,
    load_notes,
    split_by_patient,
)
from hf_densefeat.data.notes import describe_notes
from hf_densefeat.data.splits import split_record
from hf_densefeat.evaluation.geometry import spectrum
from hf_densefeat.reporting.comparison import plain_numbers
from hf_densefeat.reporting.formats import markdown
from hf_densefeat.reporting.tables import before_after_table, terminal

HERE = Path(__file__).resolve().parent
COHORT = HERE / "configs" / "cohort.yaml"


@dataclass
class RecipeArguments:
    """What is read, from where, and what is measured."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or folder of the encoder."})
    config_name: str | None = field(default=None, metadata={"help": "Start from random weights with this config."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: beside the model or config."})
    notes: str | None = field(default=None, metadata={"help": "File, folder or Hub name of the notes."})
    patient_column: str | None = field(default=None, metadata={"help": "Default: found by its name."})
    time_column: str | None = field(default=None, metadata={"help": "Default: found by its name."})
    text_column: str | None = field(default=None, metadata={"help": "Default: found by its name."})
    probe: list[str] = field(default_factory=list, metadata={"help": "Linear probes, label_column:kind each."})
    max_measured_notes: int = field(default=4000, metadata={"help": "Notes, of whole patients, to measure on."})
    head_warmup_steps: int = field(
        default=100,
        metadata={"help": "If the language-modelling head is new, train it alone for so many updates first."},
    )
    head_warmup_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of that warm-up."})


def main():
    """Read, measure, train, save, measure."""
    recipe, args = parse(sys.argv[1:])
    set_seed(args.seed)
    if not args.should_save:
        disable_progress_bars()
    try:
        trainer, measure, head_is_new = prepare(recipe, args)
    except (ValueError, OSError) as error:  # what is wrong with notes, model, options or Hub, before hours of training
        sys.exit(f"pretrain.py: error: {error}")

    model, tokenizer = trainer.model, trainer.processing_class
    before = measure("before", model, tokenizer) if args.should_save else None
    if head_is_new and args.mlm_weight and recipe.head_warmup_steps and not args.resume_from_checkpoint:
        say(args, f"head       new: it is trained alone first, for {recipe.head_warmup_steps} updates")
        warm_up_head(model, recipe, args, trainer.train_dataset, tokenizer)
    result = trainer.train(resume_from_checkpoint=last_checkpoint(args))
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_model(_internal_call=True)  # without a push: that is done once, at the end, with what is measured
    if args.should_save:
        after = measure("after", AutoDenseModel.from_pretrained(args.output_dir), tokenizer)
        report(before, after, trainer, args)
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


def prepare(recipe: RecipeArguments, args: DenseTrainingArguments):
    """Notes split by patient, model, trainer and measurement, each checked; what was read is printed."""
    columns = {"patient_id": recipe.patient_column, "time": recipe.time_column, "text": recipe.text_column}
    columns = {role: name for role, name in columns.items() if name} or "auto"
    with args.main_process_first(desc="reading notes"):
        notes = load_notes(recipe.notes, columns=columns)
    say(args, f"notes      {notes.info.description}\n           {describe_notes(notes)}")
    adjacent_pairs(notes, max_gap=args.max_gap)  # refuses notes without any, before a split of them is blamed
    parts = split_by_patient(notes, seed=args.seed)

    source = recipe.model_name_or_path or recipe.config_name
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer_name or source)
    model, head_is_new = load_model(recipe, args)
    model.config.densefeat["split"] = split_record(notes, seed=args.seed).to_dict()
    say(args, f"model      {type(model).__name__}, {model.num_parameters():,} parameters, {model.pooling} pooling")

    measure = Measurement(recipe, parts, args)
    validation = parts["validation"] if args.eval_strategy != "no" else None
    trainer = DenseTrainer(
        model, args, train_dataset=parts["train"], eval_dataset=validation, processing_class=tokenizer
    )
    say(args, f"pairs      {trainer.train_dataset.pairs}\ntokens     {trainer.token_stats['train']}")
    return trainer, measure, head_is_new


def parse(argv: list[str]) -> tuple[RecipeArguments, DenseTrainingArguments]:
    """Options of a YAML file, then those of the command line, through one parser that types both."""
    parser = HfArgumentParser(
        [RecipeArguments, DenseTrainingArguments],
        usage="pretrain.py [--config FILE.yaml] [--option value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of options; default: the bundled cohort, if --notes is not given.")
    given = parser.parse_known_args(argv)[0]
    config = given.config or (None if given.notes else COHORT)
    recipe, args, _, unknown = parser.parse_args_into_dataclasses(
        options_of(config, parser) + argv, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}. --help lists the options.")
    if not recipe.notes:
        parser.error("no notes: pass --notes, a file, folder or Hub name, or name them in the config.")
    if not (recipe.model_name_or_path or recipe.config_name):
        parser.error("no model: pass --model_name_or_path, a Hub name or folder (or --config_name for a new one).")
    for task in recipe.probe:
        if task.count(":") != 1:
            parser.error(f"expected --probe label_column:kind but got {task!r}, as in --probe died:binary.")
    return recipe, args


def options_of(config: Path | str | None, parser: HfArgumentParser) -> list[str]:
    """A YAML file as words of the command line; paths in it that start with ./ or ../ are relative to the file."""
    if config is None:
        return []
    if not Path(config).is_file():
        parser.error(f"--config: there is no file {config}.")
    # as strings: the parser knows the types, YAML would read `no` as False and 1e-5 as text
    values = yaml.load(Path(config).read_text(), Loader=yaml.BaseLoader) or {}
    known = {action.dest for action in parser._actions}
    words = []
    for key, value in values.items():
        if key not in known:
            near = " or ".join(difflib.get_close_matches(key, known, 3)) or "see --help"
            parser.error(f"{config}: unknown key {key!r}. Did you mean {near}?")
        items = value if isinstance(value, list) else [value]
        items = [str(Path(config).parent / item) if item.startswith(("./", "../")) else item for item in items]
        if items not in ([""], ["null"]):
            words += [f"--{key}", *items]
    return words


def load_model(recipe: RecipeArguments, args: DenseTrainingArguments):
    """The model, and whether its language-modelling head has just been made."""
    if not recipe.model_name_or_path:
        return AutoDenseModel.from_config(AutoConfig.from_pretrained(recipe.config_name), args.pooling), False
    model, loading = AutoDenseModel.from_pretrained(
        recipe.model_name_or_path, pooling=args.pooling, output_loading_info=True
    )
    body = model.base_model_prefix + "."
    return model, any(not name.startswith(body) for name in loading["missing_keys"])


def warm_up_head(model, recipe, args, train_dataset, tokenizer) -> None:
    """Train the new head alone by MLM: the encoder must not be pulled about by a random head."""
    trained = {id(parameter) for parameter in model.base_model.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in trained)
    changed = {
        "dense_weight": 0.0,
        "mlm_weight": 1.0,
        "max_steps": recipe.head_warmup_steps,
        "learning_rate": recipe.head_warmup_learning_rate,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "report_to": "none",
    }
    values = {name: value for name, value in args.to_dict().items() if name in args.__dataclass_fields__} | changed
    values = {name: value for name, value in values.items() if args.__dataclass_fields__[name].init}
    DenseTrainer(
        model, DenseTrainingArguments(**values), train_dataset=train_dataset, processing_class=tokenizer
    ).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def last_checkpoint(args: DenseTrainingArguments) -> str | None:
    """What `--resume_from_checkpoint` names: a folder, or `last` for the newest in output_dir."""
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    found = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if found is None:
        raise SystemExit(f"--resume_from_checkpoint last: no checkpoint in {args.output_dir}.")
    return found


class Measurement:
    """Geometry of held-out patients' pairs, and linear probes over all patients' notes, of a frozen encoder."""

    def __init__(self, recipe: RecipeArguments, parts, args: DenseTrainingArguments):
        held_out = sample(parts["test"], recipe.max_measured_notes // 2, args.seed)
        self.pairs = adjacent_pairs(held_out)
        self.texts, self.k = list(held_out["text"]), args.subspace_dim
        probed = {name: sample(part, recipe.max_measured_notes // 3, args.seed) for name, part in parts.items()}
        tasks = [task.split(":") for task in recipe.probe]
        tasks = [ProbeTask(label, probed, label, kind=kind) for label, kind in tasks]
        self.evaluator = ProbeEvaluator(tasks, seed=args.seed, cache=False) if tasks else None
        self.device = args.device

    def __call__(self, name: str, model, tokenizer) -> dict:
        """Numbers by name, and the spectrum."""
        model.to(self.device)
        z = model.encode(self.texts, tokenizer, show_progress=True)
        z_a, z_b = z[self.pairs.earlier], z[self.pairs.later]
        probes = self.evaluator.evaluate(model, tokenizer) if self.evaluator else {}
        return {
            "name": name,
            "geometry": geometry_report(z_a, z_b, k=self.k, groups=torch.from_numpy(self.pairs.patient)),
            "spectrum": spectrum(z, center=True).tolist(),
            "probes": {
                f"{task} {metric}": [estimate.value, estimate.low, estimate.high]
                for task, result in probes.items()
                for metric, estimate in result.metrics.items()
            },
        }


def sample(notes, most: int, seed: int):
    """Notes of whole patients, drawn at random, until there are `most`."""
    patients, codes = np.unique(np.asarray(notes["patient_id"]), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(patients))
    kept = order[np.cumsum(np.bincount(codes)[order]) <= most]
    return notes.select(np.flatnonzero(np.isin(codes, kept if len(kept) else order[:1])))


def report(before: dict, after: dict, trainer: DenseTrainer, args: DenseTrainingArguments) -> None:
    """Print the table, and write it, the numbers, the spectra and the model card beside the model."""
    table, folder = before_after_table([before, after]), Path(args.output_dir)
    (folder / "report.md").write_text(markdown(table) + "\n")
    numbers = {"before": before, "after": after, "updates": trainer.state.global_step}
    (folder / "report.json").write_text(json.dumps(plain_numbers(numbers), indent=1) + "\n")
    trainer.measured = [before, after]
    trainer.create_model_card()
    say(args, f"\n{terminal(table)}\n\nSaved to {args.output_dir}: AutoModel and SentenceTransformer open it.")


def say(args: DenseTrainingArguments, text: str) -> None:
    """Print once, not once a process."""
    if args.should_save:
        print(text, flush=True)


if __name__ == "__main__":
    main()
