"""From the encoder that people have: a contrastive start adapted to a domain's notes, beside its peers, share by share.

    python recipes/starts.py --domain mtsamples --data DATA --start FOLDER --work FOLDER --seeds 0,1,2 --bf16
    python recipes/starts.py --domain mtsamples --data DATA --start FOLDER --work FOLDER --methods infonce,mlm --bf16
    python recipes/starts.py --domain mtsamples --data DATA --start FOLDER --work FOLDER --report

Every method trains from the same start on the same training notes for the updates of `CONTRASTIVE`: `adapted` on the
domain's own pairs (`PAIRS`), `adjacent`, `halves` and `both` on these, of which `both` is what `densefeat pretrain` does by
itself; `joint` is `adapted` beside masked-language modelling. The peers are InfoNCE, unsupervised SimCSE, TSDAE
(sentence-transformers'), masked-language modelling, whose new head is first trained alone, and MOSAIC, masked-language
modelling and InfoNCE at once.

The weights are then turned back to each share of the way and measured: similarity on test and validation notes (the tasks
of `compare.py`, as the embeddings are), and without labels the ranks at which validation notes find their pairs. Kept in
--work: `METHOD-SEED`, a sentence-transformers folder, and `METHOD-SEED-SHARE.npz`; what is there is not made again.
"""

import argparse
import importlib
import json
import re
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from baselines.losses import info_nce
from domains import Domain, findings, mtsamples
from domains.documents import LENGTH, open_encoder, read_parts
from domains.rows import rows_with
from safetensors.torch import save_file
from scipy.sparse import csr_matrix, hstack
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import DenoisingAutoEncoderLoss
from study.runs import save
from study.similarity import BOOTSTRAPS, SHOWN
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from hf_densefeat import BatchLoss, DenseTrainer, DenseTrainingArguments, interpolate_weights
from hf_densefeat.commands.pretrain import Settings
from hf_densefeat.commands.pretraining import warm_up_head
from hf_densefeat.evaluation.metrics import Estimate
from hf_densefeat.evaluation.similarity import similarity_of, similarity_rows
from hf_densefeat.evaluation.words import Words
from hf_densefeat.models.choosing import reciprocal_ranks
from hf_densefeat.reporting.formats import interval, markdown, number
from hf_densefeat.training.arguments import CONTRASTIVE

PAIRS = {"mtsamples": "adjacent", "findings": "halves", "documents": "adjacent"}
SHARES = (0.25, 0.5, 0.75, 1.0)
PEER = {"lambda_anchor": 0.0}
METHODS = {
    "adapted": {},
    "adjacent": {"pairs": ["adjacent"]},
    "halves": {"pairs": ["halves"]},
    "both": {"pairs": ["adjacent", "halves"]},
    "joint": {"mlm_weight": 1.0},
    "infonce": PEER,
    "simcse": PEER,
    "tsdae": PEER,
    "mlm": PEER | {"mlm_weight": 1.0, "dense_weight": 0.0},
    "mosaic": PEER | {"mlm_weight": 1.0, "dense_weight": 1.0},
}


def main(argv: list[str] | None = None) -> None:
    """Read the command line; train and measure, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", required=True, choices=PAIRS)
    parser.add_argument("--data", required=True, type=Path, help="folder of data sets")
    parser.add_argument("--start", required=True, help="a sentence-transformers folder")
    parser.add_argument("--work", required=True, type=Path, help="folder of what is trained and measured")
    parser.add_argument("--methods", default="adapted", help=f"comma-separated, of: {', '.join(METHODS)}")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the way; 0 is always measured")
    parser.add_argument(
        "--part", default="all", choices=("all", "validation"), help="validation spares the test notes"
    )
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--report", action="store_true", help="train nothing: words beside, the table, starts.json")
    parser.add_argument("--reference", default="start", help="what the report's differences are to")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    measured = Measured(arguments)
    if arguments.report:
        print(report(arguments, measured))
    else:
        run(arguments, measured)


def run(arguments: argparse.Namespace, measured: "Measured") -> None:
    """Train and measure what is missing."""
    folder = arguments.work / arguments.domain
    folder.mkdir(parents=True, exist_ok=True)
    ending = ".npz" if arguments.part == "all" else ".validation.npz"
    if not (folder / "start.npz").exists():
        measured(folder / f"start{ending}", open_encoder(arguments.start))
    for seed in map(int, arguments.seeds.split(",")):
        for method in arguments.methods.split(","):
            kept = folder / f"{method}-{seed}"
            if not kept.exists():
                begun = time.perf_counter()
                train(arguments, measured.domain, method, seed, kept)
                print(f"{kept.name}: trained in {time.perf_counter() - begun:.0f} s", flush=True)
            for share in map(float, arguments.shares.split(",")):
                path = folder / f"{kept.name}-{share:g}{ending}"
                if not path.exists():
                    model = open_encoder(kept)
                    interpolate_weights(model, open_encoder(arguments.start), share)
                    measured(path, model)


def train(arguments: argparse.Namespace, domain: Domain, method: str, seed: int, folder: Path) -> None:
    """One run, into a sentence-transformers folder."""
    options = CONTRASTIVE | {"pairs": [PAIRS[arguments.domain]]} | METHODS[method]
    args = DenseTrainingArguments(
        **options,
        output_dir=str(folder.with_name("trainer")),
        seed=seed,
        data_seed=seed,
        max_length=LENGTH,
        bf16=arguments.bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=True,
        report_to="none",
        save_strategy="no",
        logging_steps=20,
        disable_tqdm=True,
    )
    trained = denoised(arguments, args) if method == "tsdae" else paired(arguments, args, domain, method)
    plain = AutoModel.from_pretrained(arguments.start)
    plain.load_state_dict(trained, strict=False)  # a pooler of no use stays
    partial = folder.with_suffix(".tmp")
    shutil.copytree(arguments.start, partial, dirs_exist_ok=True)
    weights = {name: value.contiguous() for name, value in plain.state_dict().items()}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    partial.rename(folder)


def paired(arguments: argparse.Namespace, args: DenseTrainingArguments, domain: Domain, method: str) -> dict:
    """Weights of the encoder after training on pairs."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.start)
    options = {"train_dataset": domain.self_pairs if method == "simcse" else train_notes(arguments)}
    if method in ("infonce", "simcse", "mosaic"):
        options["objective"] = BatchLoss(info_nce, name="pair_loss")
    trainer = DenseTrainer(arguments.start, args, processing_class=tokenizer, **options)
    if args.mlm_weight:
        warm_up_head(trainer.dense_model, Settings(), args, trainer.train_dataset, tokenizer)
    trainer.train()
    return trainer.dense_model.base_model.state_dict()


def denoised(arguments: argparse.Namespace, args: DenseTrainingArguments) -> dict:
    """Weights of the encoder after TSDAE (Wang et al., 2021): a decoder writes a note from the embedding of 40 % of its words.

    The decoder shares the encoder's weights, its cross-attention is new. As many notes an update as the others have.
    """
    model = SentenceTransformer(arguments.start, device="cuda" if torch.cuda.is_available() else "cpu")
    model.max_seq_length = args.max_length
    drawn = np.random.default_rng(args.seed)

    def with_words_left_out(text: str) -> str:
        words = text.split()
        return " ".join(word for word in words if drawn.random() < 0.4) or words[0]

    whole = [text for text in train_notes(arguments)["text"] if text.split()]
    pairs = datasets.Dataset.from_dict({"damaged": [with_words_left_out(text) for text in whole], "whole": whole})
    same = (
        "output_dir",
        "max_steps",
        "learning_rate",
        "warmup_steps",
        "lr_scheduler_type",
        "weight_decay",
        "seed",
        "bf16",
    )
    same += ("use_cpu", "dataloader_drop_last", "save_strategy", "report_to", "disable_tqdm")
    options = {name: getattr(args, name) for name in same}
    options["per_device_train_batch_size"] = 2 * args.per_device_train_batch_size
    SentenceTransformerTrainer(
        model, SentenceTransformerTrainingArguments(**options), pairs, loss=DenoisingAutoEncoderLoss(model)
    ).train()
    return model[0].auto_model.state_dict()


def train_notes(arguments: argparse.Namespace) -> datasets.Dataset:
    """The domain's training notes."""
    if arguments.domain == "documents":
        return read_parts(arguments.data)[0]["train"]
    read = {"mtsamples": lambda: mtsamples.read(arguments.data)[1], "findings": lambda: findings.read(arguments.data)}
    return rows_with(read[arguments.domain](), "split", "train")


class Measured:
    """The domain's tasks, read once, and what they find with an encoder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        domain = importlib.import_module(f"domains.{arguments.domain}").load(arguments.data, arguments.start)
        self.domain, self.bf16, self.judged = domain, arguments.bf16, domain.judged
        tasks = [task for task in domain.similarity if arguments.part == "all" or task.name.startswith("validation ")]
        self.rows = {task.name: similarity_rows(task) for task in tasks}
        texts = {text for rows in self.rows.values() for text in (*rows.texts, *rows.queries)}
        texts |= {text for sides in self.judged.values() for side in sides for text in side}
        self.texts = sorted(texts, key=lambda text: (len(text), text))
        self.place = {text: i for i, text in enumerate(self.texts)}

    def __call__(self, path: Path, model) -> None:
        """Write metrics with their replicates, ranks of pairs, and the embeddings."""
        if path.exists():
            return
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            z = model.encode(self.texts, view=None, batch_size=64).float().cpu()
        seconds = time.perf_counter() - begun
        found = similarity(self.rows, lambda texts: z[[self.place[text] for text in texts]])
        for kind, sides in self.judged.items():
            found[f"ranks {kind}"] = reciprocal_ranks(
                *(z[[self.place[text] for text in side]] for side in sides)
            ).numpy()
        save(path, z=z.half().numpy(), **found)
        print(f"{path.name}: {seconds:.0f} s to encode, {time.perf_counter() - begun:.0f} in all", flush=True)


def similarity(tasks: dict, encode) -> dict[str, np.ndarray]:
    """`task: metric` to the value and its replicates."""
    found = {}
    for name, rows in tasks.items():
        queries = encode(rows.queries) if rows.queries else None
        result = similarity_of(
            encode(rows.texts), rows, queries=queries, codes=("float",), divisors=(1,), bootstraps=BOOTSTRAPS
        )
        for metric in [one for one in result.metrics if one.startswith(SHOWN[rows.kind])]:
            values = np.append(result.metrics[metric].value, result.replicates[metric])
            found[f"{name}: {metric}"] = values.astype(np.float32)
    return found


def beside_words(arguments: argparse.Namespace, measured: Measured, names: list[str]) -> None:
    """Words alone, and encoders and words side by side (rows of length 1 each: the cosine is the mean of both)."""
    folder = arguments.work / arguments.domain
    train, tokenizer = train_notes(arguments)["text"][:], AutoTokenizer.from_pretrained(arguments.start)
    words = Words.fit(train, tokenizer, LENGTH).encode(measured.texts)
    for name in names:
        path = folder / f"{name}.npz"
        if path.exists():
            continue
        rows = words
        if name != "words":
            z = torch.from_numpy(np.load(folder / f"{name.removesuffix('+words')}.npz")["z"]).float()
            rows = hstack([csr_matrix(normalize(z).numpy()), words], format="csr")
        save(
            path, **similarity(measured.rows, lambda texts, rows=rows: rows[[measured.place[text] for text in texts]])
        )


def report(arguments: argparse.Namespace, measured: Measured) -> str:
    """Content and form of all that was measured, less the reference on the same redraws; written as JSON too."""
    folder, reference = arguments.work / arguments.domain, arguments.reference
    kept = [path.stem for path in folder.glob("*.npz") if not path.name.endswith((".validation.npz", "words.npz"))]
    beside_words(arguments, measured, ["words", *(f"{name}+words" for name in kept)])
    runs: dict[str, list] = {}
    for path in sorted(folder.glob("*.npz")):
        if not path.name.endswith(".validation.npz"):
            name = re.sub(r"^([a-z]+)-\d+-([\d.]+)", r"\1, \2", path.stem)
            runs.setdefault(name, []).append({key: value for key, value in np.load(path).items() if ":" in key})
    parts: dict[str, list[str]] = {}
    for key in runs["start"][0]:
        task = key.split(":")[0]
        what = "form" if task.removeprefix("validation ") in measured.domain.form else "content"
        parts.setdefault(what + (", validation" if task.startswith("validation ") else ""), []).append(key)
    rows, numbers = [["", "seeds", *parts, *(f"{part} − {reference}" for part in parts)]], {}
    for name, several in runs.items():
        values, differences = {}, {}
        for part, keys in parts.items():
            (value, drawn), (other, others) = array(several, keys), array(runs[reference], keys)
            values[part], differences[part] = value, Estimate.of(value - other, drawn - others)
        shown = [interval(one, digits=3, signed=True) for one in differences.values()]
        rows.append([name, str(len(several)), *(number(value, digits=3) for value in values.values()), *shown])
        tasks = {key: [round(float(run[key][0]), 4) for run in several] for keys in parts.values() for key in keys}
        less = {part: [round(x, 4) for x in (one.value, one.low, one.high)] for part, one in differences.items()}
        numbers[name] = {
            "mean": {part: round(x, 4) for part, x in values.items()},
            f"minus {reference}": less,
            "tasks": tasks,
        }
    (folder / "starts.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return markdown(rows)


def array(runs: list[dict], keys: list[str]) -> tuple[float, np.ndarray]:
    """Mean over metrics, then over seeds: the value, and replicates that redraw seeds too."""
    table = np.mean([[run[key] for run in runs] for key in keys], axis=0)
    seeds, count = len(table), table.shape[1] - 1
    drawn = np.random.default_rng(0).integers(seeds, size=(count, seeds))
    return float(table[:, 0].mean()), table[:, 1:][drawn, np.arange(count)[:, None]].mean(1)


if __name__ == "__main__":
    main()
