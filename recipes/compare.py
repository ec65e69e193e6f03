"""The paper's study: its baselines, the peers and the dense objective on one domain, Tables 1 to 4 beside the paper's.

    python recipes/compare.py                                                # text, the bundled cohort
    python recipes/compare.py --domain text --data FOLDER --seeds 3 --budget 40
    python recipes/compare.py --domain text --data FOLDER --sweep
    python recipes/compare.py --domain documents --data FOLDER --model_name_or_path ENCODER       # or mtsamples, findings
    python recipes/compare.py --domain documents --data FOLDER --model_name_or_path ENCODER --sweep --methods "share 0.5"
    python recipes/compare.py --notes FILE_OR_FOLDER --model_name_or_path ENCODER [--task label:kind ...]

Every method starts from the same weights, sees the same batches for the same number of steps, and is frozen before it is
measured: on patients it has not seen, with linear probes. The number of steps follows from --budget, minutes for all
methods of the study and --seeds together, by timing steps of MLM + dense; 60 % of the budget is for training, the rest
for encoding and probes. --steps says it instead. With --warm_up N the common start is N steps of MLM, made once a seed.
Each run, (method, seed), is kept in --work: what is there is not trained again. With --encoders the trained encoders
are kept too, in folders METHOD-SEED, and a folder there that no method of ours made is measured if --methods names it.

--notes takes notes of your own, such as MIMIC-IV-Note's: patient, time and text are found by their columns' names, a column
`split` is kept, else patients are split. A --task is a column of the table with its kind: binary, multiclass, regression or
clustering. Without one, labels come from the order and the types of the notes: see domains/notes.py.

Written to --output, each name beginning with the domain: the report (.md), all numbers (.json) and the plots. They hold
numbers and names, no text. Intervals are 95 %, of redrawn patients and seeds; differences are on the same redraws.
"""

import argparse
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from huggingface_hub.constants import HF_HOME
from study.methods import CANDIDATES, METHODS, Method, sweep_methods
from study.report import report, report_sweep
from study.results import Results
from study.runs import Study
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent
# Each domain, and what --data has to hold for it; the columns are in results/study.md and in the module of the domain.
DOMAINS = {
    "text": "clinosim_longitudinal",
    "tabular": "physionet2012",
    "multimodal": "clinosim_longitudinal",
    "documents": "medquad",
    "sections": "medquad",
    "mtsamples": "mtsamples",
    "findings": "care_findings",
}
REAL_TEXT = ("documents", "sections", "mtsamples", "findings")  # without probes, and without an encoder of their own


def run(arguments: argparse.Namespace) -> dict:
    """Train what is missing, measure, print and write; returns what the JSON holds."""
    own = {"notes": arguments.notes, "tasks": arguments.task, "max_length": arguments.max_length}
    options = {name: value for name, value in own.items() if value}
    load = importlib.import_module(f"domains.{arguments.domain}").load
    domain = load(arguments.data, arguments.model_name_or_path, **options)
    if arguments.learning_rate:
        domain.training |= {"learning_rate": arguments.learning_rate}
    if arguments.bf16:
        domain.training |= {"bf16": True, "use_cpu": not torch.cuda.is_available()}
    encoders = Path(arguments.encoders) if arguments.encoders else None
    study = Study(domain, Path(arguments.work), arguments.warm_up, encoders)
    study.plan(arguments.budget, arguments.seeds, arguments.steps)
    every = METHODS | CANDIDATES | sweep_methods()
    seeds = range(arguments.seeds)
    methods = {name: every.get(name) or given(study, name, seeds) for name in arguments.methods}
    left, needed = study.untrained(methods, seeds)
    print(f"{domain.facts}\n{left} runs of {study.steps} steps to train, of {needed}.", flush=True)
    runs: dict[str, list[dict]] = {name: [] for name in methods}
    with tqdm(total=left * study.steps, unit="step", disable=None if left else True) as bar:
        for seed in seeds:
            for name, method in methods.items():
                bar.set_postfix_str(f"{name}, seed {seed}")
                runs[name].append(study.measured(name, method, seed, bar))
    results = Results(runs, domain, methods)
    if arguments.sweep:
        return report_sweep(study, results, arguments)
    return report(study, results, methods, arguments)


def given(study: Study, name: str, seeds: Sequence[int]) -> Method:
    """A method that we know by its encoders alone."""
    folders = [study.encoder_of(name, seed) for seed in seeds]
    missing = [folder.name for folder in folders if not folder.exists()]
    if missing:
        raise SystemExit(
            f"--encoders: expected folders of {name!r} for {len(seeds)} seeds, found none by the names {missing}."
        )
    return Method(name, trained=len(set(folders)) > 1 or len(seeds) == 1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="text", choices=DOMAINS)
    parser.add_argument("--table", default="all", choices=("1", "2", "3", "4", "5", "maps", "all"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budget", type=float, default=10.0, help="minutes for the whole study of the domain")
    parser.add_argument("--steps", type=int, help="steps of every run, instead of --budget")
    parser.add_argument("--learning_rate", type=float, help="of every run, instead of the domain's")
    parser.add_argument("--warm_up", type=int, default=0, help="steps of MLM that make the common start, once a seed")
    parser.add_argument(
        "--bf16", action="store_true", help="mixed precision, on processors and GPUs that are fast at it"
    )
    parser.add_argument(
        "--methods", help=f"comma-separated, of: {', '.join(METHODS)}; or of what --sweep and the candidates are named"
    )
    parser.add_argument(
        "--reference", default="mlm+dense", help="the method that the others' similarity is compared with"
    )
    parser.add_argument("--sweep", action="store_true", help="one factor at a time around the default, no tables")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", help="folder of data sets; default: the bundled cohort")
    source.add_argument("--notes", help="text: notes of your own, see load_notes: a table or a folder of tables")
    parser.add_argument(
        "--task", action="append", help="label:kind of a column of --notes; may be given several times"
    )
    parser.add_argument("--model_name_or_path", help="start from this encoder instead of random weights")
    parser.add_argument("--max_length", type=int, help="text: tokens of a note; default 64, of an encoder up to 128")
    parser.add_argument(
        "--encoders", help="documents and the like: folder of trained encoders METHOD-SEED; others are kept there"
    )
    parser.add_argument("--output", default=str(HERE / "results"), help="folder to write")
    parser.add_argument("--work", default=str(Path(HF_HOME) / "hf_densefeat" / "compare"), help="folder of the runs")
    arguments = parser.parse_args(argv)
    unlabelled = [name for name, method in METHODS.items() if not (method.supervised or method.after)]
    methods = list(METHODS) if arguments.domain not in REAL_TEXT else [*unlabelled, *CANDIDATES]
    sweep = sweep_methods()
    methods = ["mlm", "mlm+dense", *sweep] if arguments.sweep else methods
    arguments.methods = arguments.methods.split(",") if arguments.methods else methods
    if arguments.sweep and "mlm+dense" not in arguments.methods:  # what the others are compared with
        arguments.methods = ["mlm+dense", *arguments.methods]
    kept = {path.name.rsplit("-", 1)[0].replace("_", " ") for path in Path(arguments.encoders or "-").glob("*/")}
    unknown = [name for name in arguments.methods if name not in METHODS | CANDIDATES | sweep | dict.fromkeys(kept)]
    if unknown:
        parser.error(
            f"--methods: no method {', '.join(unknown)}. There are {', '.join(METHODS | CANDIDATES | sweep)}."
        )
    if arguments.data and not (Path(arguments.data) / DOMAINS[arguments.domain]).is_dir():
        parser.error(
            f"--data: expected a folder with {DOMAINS[arguments.domain]} in it for --domain {arguments.domain}, got "
            f"{arguments.data}. Without --data the bundled cohort is taken; --notes is for notes of your own."
        )
    if arguments.encoders and arguments.domain not in REAL_TEXT:
        parser.error(f"--encoders is for --domain {', '.join(REAL_TEXT)}, not {arguments.domain}.")
    if arguments.domain != "text" and (arguments.notes or arguments.max_length):
        parser.error(f"--notes and --max_length are for --domain text, not {arguments.domain}.")
    if arguments.domain in REAL_TEXT and not (arguments.data and arguments.model_name_or_path):
        parser.error(
            f"--domain {arguments.domain} needs --data FOLDER with {DOMAINS[arguments.domain]} in it, and "
            "--model_name_or_path ENCODER."
        )
    if arguments.task and not arguments.notes:
        parser.error("--task names a column of --notes: expected --notes FILE_OR_FOLDER too.")
    return arguments


def main(argv: Sequence[str] | None = None) -> dict:
    """Read the command line and run."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    return run(parse(argv))


if __name__ == "__main__":
    main()
