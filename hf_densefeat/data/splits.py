"""Who is trained on and who is held out: no patient is in two parts, and a model's record says in which he was.

`hold_out` decides for every command and `parts_of_patients` for every table of ids; both ask the `SplitRecord`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from safetensors.numpy import load_file, save_file

from hf_densefeat.data.columns import column, dense_codes
from hf_densefeat.data.identity import ID_RULE, id_keys

logger = logging.getLogger(__name__)

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "tuning"),
    "test": ("test", "testing", "held_out"),
}
SHARES = (0.7, 0.15, 0.15)
LISTED = "_trained_patients.safetensors"  # Trainer.push_to_hub leaves out names that begin with an underscore


class UnknownTrainingPatients(ValueError):
    """A record that cannot say who was trained on."""


@dataclass(frozen=True)
class HashRule:
    """A split by a hash of (seed, patient id): it says of any patient, of any table, where he was, and names none.

    Attributes:
        seed: of the hash, whose place in its range is in [0, 1).
        shares: of patients for train, validation and, if three are given, test.
        cuts: the places at which validation ends, test (if any) ends, and train begins.
    """

    seed: int
    shares: tuple[float, ...]
    cuts: tuple[float, ...]

    def parts_of(self, ids: Sequence[Hashable]) -> np.ndarray:
        """0 (train), 1 (validation) or 2 (test) of each patient id, (n,)."""
        order = (*range(1, len(self.shares)), 0)
        return np.array(order)[np.searchsorted(self.cuts, _places(ids, self.seed), side="right")]


@dataclass(frozen=True)
class SplitRecord:
    """Who a model was trained on, as its folder says it: the config holds the rules, and a file beside it the rest.

    A patient was trained on if any rule says so or he is listed. Lists are needed where a table brought its own splits.
    They hold a keyed hash of each training patient's id, with a random key: whoever has an id can ask for it. So they
    are patient data, and stand in a file for the user alone, which no push takes along.

    Attributes:
        rules: splits by hash.
        lists: (key, sorted hashes) of the training patients of tables with splits of their own; None if the file that
            should have them is not there.
        ids: how ids are brought to one form before they are hashed.
    """

    rules: tuple[HashRule, ...] = ()
    lists: tuple[tuple[bytes, np.ndarray], ...] | None = field(default=(), repr=False, compare=False)
    ids: str = ID_RULE

    def to_dict(self) -> dict[str, Any]:
        """What the config keeps under `densefeat["split"]`; JSON, and no patient."""
        rules = [
            {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(one).items()} for one in self.rules
        ]
        return {"rules": rules, "listed": self.lists != (), "ids": self.ids}

    @classmethod
    def from_dict(cls, block: dict[str, Any], folder: str | os.PathLike[str] | None = None) -> SplitRecord:
        """From what `to_dict` gave, with the lists that `save` wrote to the folder or to the one that it is in."""
        if "rules" not in block:
            return cls((), None, "an older one")
        rules = [HashRule(int(one["seed"]), tuple(one["shares"]), tuple(one["cuts"])) for one in block["rules"]]
        lists: tuple[tuple[bytes, np.ndarray], ...] | None = ()
        if block["listed"]:
            places = [] if not folder else [Path(folder) / LISTED, Path(folder).absolute().parent / LISTED]
            found = next((load_file(place) for place in places if place.exists()), None)
            lists = (
                None
                if found is None
                else tuple((found[f"{i}.key"].tobytes(), found[f"{i}.hashes"]) for i in range(len(found) // 2))
            )
        return cls(tuple(rules), lists, str(block["ids"]))

    @classmethod
    def of(cls, model: Any) -> SplitRecord | None:
        """The record of a model, also inside what wraps it (DDP, PEFT, SentenceTransformer); None if it has none."""
        for one in model.modules() if hasattr(model, "modules") else [model]:
            block = getattr(getattr(one, "config", None), "densefeat", None)
            if block:
                known = getattr(one, "split_record", None)
                return known or (
                    cls.from_dict(block["split"], getattr(one, "name_or_path", "")) if block.get("split") else None
                )
        return None

    def write_to(self, model: Any) -> None:
        """Make this the record of a dense model; `save` writes what its config must not hold."""
        model.config.densefeat["split"] = self.to_dict()
        model.split_record = self

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the lists, if there are any, beside the model, readable by the user alone."""
        path = Path(folder) / LISTED
        path.unlink(missing_ok=True)
        if self.lists:
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays: dict[str, np.ndarray] = {}
            for i, (key, hashes) in enumerate(self.lists):
                arrays |= {f"{i}.key": np.frombuffer(key, np.uint8), f"{i}.hashes": hashes}
            path.touch(mode=0o600)
            save_file(arrays, path)
            path.chmod(0o600)

    def __or__(self, other: SplitRecord | None) -> SplitRecord:
        """Trained on by either."""
        if other is None or other is self:
            return self
        lists = None if self.lists is None or other.lists is None else self.lists + other.lists
        rules = tuple(dict.fromkeys((*self.rules, *other.rules)))
        return SplitRecord(rules, lists, self.ids if self.ids == other.ids else "several")

    def trained_on(self, ids: Sequence[Hashable]) -> np.ndarray:
        """Whether each patient was trained on, (n,).

        Raises:
            UnknownTrainingPatients: if the list is not there, or ids were hashed in another form.
        """
        if self.lists is None or self.ids != ID_RULE:
            why = f"its ids are in another form ({self.ids})" if self.ids != ID_RULE else f"its folder lacks {LISTED}"
            raise UnknownTrainingPatients(
                f"Who the model was trained on cannot be told from its record: {why}. Copy that file from the folder that "
                "training wrote; or, if these are other patients or you want it so, allow it (allow_trained=True)."
            )
        found = np.zeros(len(ids), dtype=bool)
        for rule in self.rules:
            found |= rule.parts_of(ids) == 0
        for key, hashes in self.lists:
            found |= np.isin(_digests(id_keys(ids), key), hashes)
        return found


def refuse_trained(ids: Sequence[Hashable], model: Any, what: str) -> None:
    """Refuse to test a model on patients that it was trained on, as far as its record says.

    Raises:
        UnknownTrainingPatients: if the record cannot say.
        ValueError: with their number.
    """
    record = SplitRecord.of(model)
    trained = 0 if record is None else int(record.trained_on(ids).sum())
    if trained:
        raise ValueError(
            f"{what}: {trained:,} of {len(ids):,} test patients were trained on, by the record of the model. Split as it "
            "does (record=SplitRecord.of(model)); or, if these are other patients with the same ids or you want it so, "
            "allow it (allow_trained=True)."
        )


def _digests(texts: Sequence[str], key: bytes = b"") -> np.ndarray:
    """A 64-bit hash of each text, (n,) uint64."""
    found = [hashlib.blake2b(text.encode(), digest_size=8, key=key).digest() for text in texts]
    return np.array(found, dtype="S8").view(">u8").astype(np.uint64)


def _places(ids: Sequence[Hashable], seed: int) -> np.ndarray:
    """Where each patient stands, in [0, 1)."""
    return _digests([f"{seed}:{one}" for one in id_keys(ids)]).astype(np.float64) / 2.0**64


def split_patients(ids: Sequence[Hashable], shares: Sequence[float] = SHARES, seed: int = 0) -> HashRule:
    """The rule that splits these different patients in the given shares; `rule.parts_of(ids)` are their parts.

    Patients are ranked by their place, a hash of (seed, id): neither their order nor the number of their notes matters.

    Raises:
        ValueError: If there are fewer patients than parts, or the shares are not positive and add up to 1.
    """
    if len(shares) not in (2, 3) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"Expected two or three positive `fractions` that add up to 1, got {tuple(shares)}.")
    if len(ids) < len(shares):
        raise ValueError(
            f"Expected at least {len(shares)} patients, one for each of {list(SPLITS)[: len(shares)]}, got {len(ids)}. "
            "A split is by patient: bring more patients, or pass fewer `fractions`."
        )
    # every part gets a patient; what the rounding takes is taken from the largest
    sizes = [max(1, round(len(ids) * share)) for share in shares[1:]]
    while sum(sizes) >= len(ids):
        sizes[int(np.argmax(sizes))] -= 1
    ranked, ends = np.sort(_places(ids, seed)), np.cumsum(sizes)
    # Between two patients, so that a record names the place of neither.
    cuts = (ranked[ends - 1] + ranked[ends]) / 2
    return HashRule(seed, tuple(float(share) for share in shares), tuple(float(cut) for cut in cuts))


def parts_of_patients(
    ids: Sequence[Hashable],
    given: np.ndarray | None = None,
    *,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    record: SplitRecord | None = None,
    allow_trained: bool = False,
    stratum: Sequence[Hashable] | np.ndarray | None = None,
    table: str = "the table",
) -> np.ndarray:
    """The part of each patient, 0 (train), 1 (validation) or 2 (test), (n,): nobody whom the record names is held out.

    The table's own parts stand if they hold out nobody who was trained on. Without such, the record's rule decides in any
    table; where it is none, or has trained patients in its held-out parts, these train, and others are held out.

    Args:
        ids: different patients.
        given: the parts that the table brings, (n,).
        shares: of patients for train, validation and, if three are given, test; without a rule of the record.
        seed: of the split; without a rule of the record.
        record: of the model, or of several (`a | b`): who was trained on by any of them.
        allow_trained: keep parts that hold out patients who were trained on.
        stratum: a label for each patient: each stratum is split by itself, so that a rare outcome reaches every part.
        table: the name in errors.

    Raises:
        UnknownTrainingPatients: if the record cannot say.
        ValueError: if the table's parts hold out patients who were trained on, or too few patients were not.
    """
    trained = np.zeros(len(ids), dtype=bool)
    if record is not None and not allow_trained:
        trained = record.trained_on(ids)
    if given is not None:
        if wrong := int((trained & (given > 0)).sum()):
            raise ValueError(
                f"{wrong:,} of {int((given > 0).sum()):,} validation and test patients of {table} were trained on, by the "
                "record of the model: its own splits contradict the record. Remove or rename the column of splits, and "
                "the record splits the table; or, if these are other patients with the same ids or you want it so, allow "
                "it (allow_trained=True)."
            )
        return given
    if stratum is None and record is not None and record.rules:
        parts = record.rules[0].parts_of(ids)
    elif stratum is None and not trained.any():
        return split_patients(ids, shares, seed).parts_of(ids)
    else:
        free = np.flatnonzero(~trained)
        wanted = np.array(shares[1:]) * len(ids)
        held = np.minimum(1, len(free) / wanted.sum()) * wanted / max(1, len(free))
        place = _places([ids[int(i)] for i in free], seed)
        parts = np.zeros(len(ids), dtype=np.int64)
        parts[free] = _stratified(
            place,
            (max(0.0, 1 - held.sum()), *held),
            np.zeros(len(free)) if stratum is None else np.asarray(stratum)[free],
        )
    if moved := int((trained & (parts > 0)).sum()):
        logger.warning("%s: %s patients were trained on by another model, and are not held out.", table, f"{moved:,}")
        parts = np.where(trained, 0, parts)
    missing = [name for code, name in enumerate(SPLITS) if 0 < code < len(shares) and not (parts == code).any()]
    if missing and trained.any():
        raise ValueError(
            f"{int(trained.sum()):,} of the {len(ids):,} patients of {table} were trained on, by the record of the model: "
            f"nobody is left for {' and '.join(missing)}. Bring other patients, or allow it "
            "(allow_trained=True)."
        )
    return parts


def _stratified(place: np.ndarray, shares: Sequence[float], stratum: np.ndarray) -> np.ndarray:
    """Along places sorted within strata, each run of 20 patients is cut in the given shares."""
    label = np.unique(stratum, return_inverse=True)[1]
    order = np.lexsort((place, label))
    block = np.searchsorted(np.cumsum(shares)[:-1], (np.arange(20) + 0.5) / 20)
    # Spread over the block, so that a stratum smaller than a block reaches every part.
    block = block[np.argsort((np.arange(20) * 0.6180339887) % 1, kind="stable")]
    parts = np.empty(len(place), dtype=np.int64)
    parts[order] = np.resize(block, len(place))
    return parts


def split_codes(names: Sequence[Any], what: str) -> np.ndarray:
    """0 (train), 1 (validation), 2 (test) of the names that a table gives its parts, (n,).

    Raises:
        ValueError: for other names and for none, by their number: a column called split may hold anything.
    """
    known = {alias: code for code, aliases in enumerate(SPLITS.values()) for alias in aliases}
    codes = np.array([known.get(str(name).strip().lower(), -1) for name in names], dtype=np.int64)
    if (codes < 0).any():
        aliases = "; ".join(f"{name}: {', '.join(others)}" for name, others in SPLITS.items())
        raise ValueError(
            f"{what}: {int((codes < 0).sum()):,} of {len(codes):,} rows have no split or one of another name, first row "
            f"{int(codes.argmin()) + 1:,}. Expected {aliases}. Mend the column, or remove or rename it, and patients are "
            "split anew."
        )
    return codes


def one_part_each(parts: np.ndarray, patient: np.ndarray, what: str) -> np.ndarray:
    """The part of each patient code, from the parts of rows (n,) and their patient codes (n,); all three dense.

    Raises:
        ValueError: if a patient has rows in two parts.
    """
    seen = np.zeros((int(patient.max()) + 1, len(SPLITS)), dtype=bool)
    seen[patient, parts] = True
    shared = seen.sum(1) > 1
    if shared.any():
        row = int(np.flatnonzero(shared[patient])[0])
        raise ValueError(
            f"{what}: {int(shared.sum()):,} patients have rows in more than one split, first row {row + 1:,}: what is "
            "learnt there would leak. Mend the column, or remove or rename it, and patients are split anew."
        )
    found: np.ndarray = seen.argmax(1)
    return found


def hold_out(
    notes: datasets.Dataset,
    fractions: Sequence[float] = SHARES,
    seed: int = 0,
    split_column: str | None = "split",
    *,
    record: SplitRecord | None = None,
    allow_trained: bool = False,
    need: Collection[str] = (),
) -> tuple[datasets.DatasetDict, SplitRecord]:
    """Notes by part, and the record of a model that is then trained on `train`, beside what it was trained on before.

    `parts_of_patients` decides, with the arguments of `split_by_patient`; `need` names parts without which the caller
    cannot go on.

    Raises:
        ValueError: as `split_by_patient`, and if a part that is needed is empty.
    """
    ids = sorted(column(notes, "patient_id").unique().to_pylist())
    patient = dense_codes(notes, "patient_id")
    own = split_column is not None and split_column in notes.column_names
    what = f"column `{split_column}`"
    given = None
    if own:
        given = one_part_each(split_codes(column(notes, str(split_column)).to_pylist(), what), patient, what)
    options: dict[str, Any] = {"record": record, "allow_trained": allow_trained}
    codes = parts_of_patients(ids, given, shares=fractions, seed=seed, table="the table of notes", **options)
    names = [name for code, name in enumerate(SPLITS) if (codes == code).any()]
    if missing := [name for name in need if name not in names]:
        where = f"{what} names patients for {' and '.join(names)} alone" if own else f"{len(ids):,} patients give none"
        raise ValueError(
            f"Nobody is in {' and '.join(missing)}, which this command needs: {where}. "
            + (
                "Name patients for it there, or remove or rename the column, and patients are split by 70, 15 and 15 %."
                if own
                else "Bring more patients, or a column `split` of your own."
            )
        )
    parts = {name: notes.select(np.flatnonzero(codes[patient] == list(SPLITS).index(name))) for name in names}
    trained = [ids[i] for i in np.flatnonzero(codes == 0)]
    if record is None and not own:
        return datasets.DatasetDict(parts), SplitRecord((split_patients(ids, fractions, seed),))
    record = record or SplitRecord()
    try:
        listed = [one for one, known in zip(trained, record.trained_on(trained), strict=True) if not known]
    except UnknownTrainingPatients:  # and allowed: the list stays lost
        listed = []
    if listed:
        key = os.urandom(16)
        record = record | SplitRecord((), ((key, np.sort(_digests(id_keys(listed), key))),))
    return datasets.DatasetDict(parts), record


def split_by_patient(
    notes: datasets.Dataset,
    fractions: Sequence[float] = SHARES,
    seed: int = 0,
    split_column: str | None = "split",
    *,
    record: SplitRecord | None = None,
    allow_trained: bool = False,
) -> datasets.DatasetDict:
    """Split notes so that no patient is in two splits, and nobody whom `record` names is held out.

    Args:
        notes: What `load_notes` returns.
        fractions: Shares of *patients* for train, validation and, if three are given, test; they add up to 1.
        seed: Another seed, another split.
        split_column: Column with the table's own splits (train, validation or tuning, test or held_out), used if it
            exists; None to split anew.
        record: Of a trained model, `SplitRecord.of(model)`: its patients train, and its rule splits any table.
        allow_trained: Hold out patients who were trained on, where the table's own splits do.

    Returns:
        `train`, `validation` and `test`, those that have a patient, each in the order of `notes`.

    Raises:
        ValueError: If the table's own splits share a patient, have a name we do not know, or hold out somebody whom the
            record names, or if nobody is left to be held out.
    """
    return hold_out(notes, fractions, seed, split_column, record=record, allow_trained=allow_trained)[0]
