"""Who is trained on and who is held out: no patient is in two parts, and a model's record says in which each was.

`hold_out` decides for every command and `parts_of_patients` for every table of ids; both ask the `SplitRecord`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from safetensors.numpy import load_file, save_file

from hf_densefeat.data.columns import column, dense_codes
from hf_densefeat.data.identity import ID_RULE, id_hashes, id_places

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
    """A split by a hash of (seed, patient id): it gives the part of any patient of any table, and names none.

    Of the hash's range validation ends at the first of `cuts`, test at the second if there are three `shares`; train has
    the rest.
    """

    seed: int
    shares: tuple[float, ...]
    cuts: tuple[float, ...]

    def parts_of(self, ids: Sequence[Hashable]) -> np.ndarray:
        """0 (train), 1 (validation) or 2 (test) of each patient id, (n,)."""
        order = (*range(1, len(self.shares)), 0)
        return np.array(order)[np.searchsorted(self.cuts, id_places(ids, self.seed), side="right")]


@dataclass(frozen=True)
class SplitRecord:
    """Who a model was trained on, as its folder says it: the config holds the rules, and a file beside it the rest.

    A patient was trained on if any rule says so or he is listed. Lists are needed where a table brought its own splits.
    They are pairs of a random key and the hashes of the training patients' ids with it: whoever has an id can ask for it.
    So they are patient data, and stand in a file for the user alone, which no push takes along. `lists` is None if that file
    is lost. `ids` says how ids were brought to one form before they were hashed.
    """

    rules: tuple[HashRule, ...] = ()
    lists: tuple[tuple[bytes, np.ndarray], ...] | None = field(default=(), repr=False, compare=False)
    ids: str = ID_RULE

    def to_dict(self) -> dict[str, Any]:
        """What the config keeps under `densefeat["split"]`; JSON, and no patient."""
        rules = [{"seed": one.seed, "shares": list(one.shares), "cuts": list(one.cuts)} for one in self.rules]
        return {"rules": rules, "listed": self.lists != (), "ids": self.ids}

    @classmethod
    def from_dict(cls, block: dict[str, Any], folder: str | os.PathLike[str] | None = None) -> SplitRecord:
        """From what `to_dict` gave, with the lists that `save` wrote to the folder or to the one that it is in."""
        rules = [HashRule(int(one["seed"]), tuple(one["shares"]), tuple(one["cuts"])) for one in block["rules"]]
        lists: tuple[tuple[bytes, np.ndarray], ...] | None = ()
        if block["listed"]:
            places = [Path(folder) / LISTED, Path(folder).absolute().parent / LISTED] if folder else []
            file = next((place for place in places if place.exists()), None)
            found = load_file(file) if file else {}
            pairs = [(found[f"{i}.key"].tobytes(), found[f"{i}.hashes"]) for i in range(len(found) // 2)]
            lists = tuple(pairs) if file else None
        return cls(tuple(rules), lists, str(block["ids"]))

    @classmethod
    def of(cls, model: Any) -> SplitRecord | None:
        """The record of a model, also inside what wraps it (DDP, PEFT, SentenceTransformer); None if it has none."""
        for one in model.modules() if hasattr(model, "modules") else [model]:
            if block := getattr(getattr(one, "config", None), "densefeat", None):
                known: SplitRecord | None = getattr(one, "split_record", None)
                if known is None and block.get("split"):
                    known = cls.from_dict(block["split"], getattr(one, "name_or_path", ""))
                return known
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
            path.touch(mode=0o600)
            keys = {f"{i}.key": np.frombuffer(key, np.uint8) for i, (key, _) in enumerate(self.lists)}
            save_file(keys | {f"{i}.hashes": hashes for i, (_, hashes) in enumerate(self.lists)}, path)
            path.chmod(0o600)

    def __or__(self, other: SplitRecord | None) -> SplitRecord:
        """Trained on by either."""
        if other is None or other is self:
            return self
        lists = None if self.lists is None or other.lists is None else self.lists + other.lists
        rules = tuple(dict.fromkeys((*self.rules, *other.rules)))
        return SplitRecord(rules, lists, self.ids if self.ids == other.ids else "several")

    def trained_on(self, ids: Sequence[Hashable]) -> np.ndarray:
        """Whether each patient was trained on, (n,); an error without the list, or where ids were in another form."""
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
            found |= np.isin(id_hashes(ids, key=key), hashes)
        return found


def refuse_trained(ids: Sequence[Hashable], model: Any, what: str) -> None:
    """ValueError, with their number, for test patients that the model was trained on, and where its record cannot say."""
    record = SplitRecord.of(model)
    trained = 0 if record is None else int(record.trained_on(ids).sum())
    if trained:
        raise ValueError(
            f"{what}: {trained:,} of {len(ids):,} test patients were trained on, by the record of the model. Split as it "
            "does (record=SplitRecord.of(model)); or, if these are other patients with the same ids or you want it so, "
            "allow it (allow_trained=True)."
        )


def split_patients(ids: Sequence[Hashable], shares: Sequence[float] = SHARES, seed: int = 0) -> HashRule:
    """The rule that splits these different patients in the given shares; `rule.parts_of(ids)` are their parts.

    Patients are ranked by their place, a hash of (seed, id): neither their order nor the number of their notes matters.
    ValueError if there are fewer patients than parts, or the shares are not positive or do not add up to 1.
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
    ranked, ends = np.sort(id_places(ids, seed)), np.cumsum(sizes)
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

    The table's own parts (`given`) stand if they hold out nobody who was trained on. Without such, the record's rule splits
    any table, but whom another of its rules or lists trained on trains. Without a rule the shares are drawn from the other
    patients, of each `stratum` by itself, so that a rare outcome reaches every part. With `allow_trained` who was trained on
    may be held out. ValueError for parts that contradict the record, and for a record that cannot say who was trained on.
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
    rule = record.rules[0] if record and record.rules else None
    if stratum is None and (rule or not trained.any()):
        parts = (rule or split_patients(ids, shares, seed)).parts_of(ids)
    else:
        parts = np.zeros(len(ids), dtype=np.int64)
        free = np.flatnonzero(~trained)
        # as many are held out as of all patients would be, as far as there are so many
        held = np.array(shares[1:]) * len(ids)
        held *= min(1, len(free) / held.sum()) / max(1, len(free))
        strata = np.zeros(len(free)) if stratum is None else np.asarray(stratum)[free]
        parts[free] = _stratified(id_places([ids[i] for i in free.tolist()], seed), (1 - held.sum(), *held), strata)
    if moved := int((trained & (parts > 0)).sum()):
        logger.warning("%s: %s patients were trained on by another model, and are not held out.", table, f"{moved:,}")
        parts = np.where(trained, 0, parts)
    missing = [name for code, name in enumerate(SPLITS) if 0 < code < len(shares) and not (parts == code).any()]
    if missing and trained.any():
        raise ValueError(
            f"{int(trained.sum()):,} of the {len(ids):,} patients of {table} were trained on, by the record of the model: "
            f"nobody is left for {' and '.join(missing)}. Bring other patients, or allow it (allow_trained=True)."
        )
    return parts


def _stratified(place: np.ndarray, shares: Sequence[float], stratum: np.ndarray) -> np.ndarray:
    """Along places sorted within strata, each run of 20 patients is cut in the given shares."""
    label = np.unique(stratum, return_inverse=True)[1]
    block = np.searchsorted(np.cumsum(shares)[:-1], (np.arange(20) + 0.5) / 20)
    # Spread over the block, so that a stratum smaller than a block reaches every part.
    block = block[np.argsort((np.arange(20) * 0.6180339887) % 1, kind="stable")]
    parts = np.empty(len(place), dtype=np.int64)
    parts[np.lexsort((place, label))] = np.resize(block, len(place))
    return parts


def parts_in_table(names: Sequence[Any], rows: np.ndarray, patient: np.ndarray, what: str) -> np.ndarray:
    """0 (train), 1 (validation) or 2 (test) of each patient, by the names that a table gives the parts of all its rows.

    `patient` are dense codes of the patients of some `rows`, (n,). ValueError for a patient with rows in two parts, and for
    other names and none, which are counted and not quoted.
    """
    known = {alias: code for code, aliases in enumerate(SPLITS.values()) for alias in aliases}
    codes = np.array([known.get(str(name).strip().lower(), -1) for name in names], dtype=np.int64)
    anew = "Mend the column, or remove or rename it, and patients are split anew."
    if (codes < 0).any():
        aliases = "; ".join(f"{name}: {', '.join(others)}" for name, others in SPLITS.items())
        raise ValueError(
            f"{what}: {int((codes < 0).sum()):,} of {len(codes):,} rows have no split or one of another name, first row "
            f"{int(codes.argmin()) + 1:,}. Expected {aliases}. {anew}"
        )
    seen = np.zeros((int(patient.max()) + 1, len(SPLITS)), dtype=bool)
    seen[patient, codes[rows]] = True
    shared = seen.sum(1) > 1
    if shared.any():
        raise ValueError(
            f"{what}: {int(shared.sum()):,} patients have rows in more than one split, first row "
            f"{int(rows[shared[patient].argmax()]) + 1:,}: what is learnt there would leak. {anew}"
        )
    found: np.ndarray = seen.argmax(1)
    return found


def hold_out(
    notes: datasets.Dataset,
    *,
    fractions: Sequence[float] = SHARES,
    seed: int = 0,
    split_column: str | None = "split",
    record: SplitRecord | None = None,
    allow_trained: bool = False,
    need: Collection[str] = (),
) -> tuple[datasets.DatasetDict, SplitRecord]:
    """Notes by part, and the record of a model that is then trained on `train`, beside what it was trained on before.

    As `split_by_patient`, and ValueError if a part that the caller needs is empty.
    """
    ids = sorted(column(notes, "patient_id").unique().to_pylist())
    patient = dense_codes(notes, "patient_id")
    given, what = None, f"column `{split_column}`"
    if split_column in notes.column_names:
        own = column(notes, str(split_column)).to_pylist()
        given = parts_in_table(own, np.arange(len(notes)), patient, what)
    how: dict[str, Any] = {"record": record, "allow_trained": allow_trained, "table": "the table of notes"}
    codes = parts_of_patients(ids, given, shares=fractions, seed=seed, **how)
    names = [name for code, name in enumerate(SPLITS) if (codes == code).any()]
    if missing := [name for name in need if name not in names]:
        why = f"{len(ids):,} patients give none. Bring more patients, or a column `split` of your own."
        if given is not None:
            why = (
                f"{what} names patients for {' and '.join(names)} alone. Name patients for it there, or remove or rename the "
                "column, and patients are split by 70, 15 and 15 %."
            )
        raise ValueError(f"Nobody is in {' and '.join(missing)}, which this command needs: {why}")
    parts = {name: notes.select(np.flatnonzero(codes[patient] == list(SPLITS).index(name))) for name in names}
    if record is None and given is None:
        return datasets.DatasetDict(parts), SplitRecord((split_patients(ids, fractions, seed),))
    record, trained = record or SplitRecord(), [ids[i] for i in np.flatnonzero(codes == 0)]
    try:
        listed = [one for one, known in zip(trained, record.trained_on(trained), strict=True) if not known]
    except UnknownTrainingPatients:  # and allowed: the list stays lost
        listed = []
    if listed:
        key = os.urandom(16)
        record = record | SplitRecord((), ((key, np.sort(id_hashes(listed, key=key))),))
    return datasets.DatasetDict(parts), record


def split_by_patient(
    notes: datasets.Dataset,
    *,
    fractions: Sequence[float] = SHARES,
    seed: int = 0,
    split_column: str | None = "split",
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
    options: dict[str, Any] = {"fractions": fractions, "seed": seed, "split_column": split_column}
    return hold_out(notes, **options, record=record, allow_trained=allow_trained)[0]
