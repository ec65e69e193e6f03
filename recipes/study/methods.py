"""What is compared: the baselines, the peers, the dense objective with each term removed, and the sweep around the default."""

from collections.abc import Callable
from dataclasses import dataclass, field

from baselines import affine
from baselines import losses as b
from torch import Tensor


@dataclass(frozen=True)
class Method:
    """How one encoder is trained, or made from another's embeddings.

    Attributes:
        title: name in tables.
        arguments: options of `DenseTrainingArguments` that differ from its defaults.
        pair_loss: width → loss that takes the place of the dense terms.
        supervised: cross-entropy on the domain's labels.
        self_pairs: each note with itself instead of the next.
        spec_weight: of L_spec, 1 but for the ablation.
        most_rank: L_spec is without effect where the participation ratio, 1 / ||Sigma / tr Sigma||^2, is above this.
        broadening: of the projectors' gradient.
        clean: the dense terms see the unmasked input, in a second forward.
        share: of the way from the start to the trained weights (`interpolate_weights`).
        after: (name of a method, function of (z of its training notes, z) → z): nothing is trained.
        trained: False for the common start itself, and for what has no encoder.
        encoder: False for the domain's features of words and values.
    """

    title: str
    arguments: dict = field(default_factory=dict)
    pair_loss: Callable[[int], Callable] | None = None
    supervised: bool = False
    self_pairs: bool = False
    spec_weight: float = 1.0
    most_rank: float | None = None
    broadening: float = 1.0
    clean: bool = False
    share: float = 1.0
    after: tuple[str, Callable] | None = None
    trained: bool = True
    encoder: bool = True

    @property
    def free(self) -> bool:
        """Whether it takes no step of training beyond those of another."""
        return bool(self.after) or not self.trained


def whitened(train: Tensor, z: Tensor) -> Tensor:
    """Whitening fitted on the training inputs."""
    return affine.apply_affine(z, *affine.fit_whitening(train))


def top_removed(train: Tensor, z: Tensor) -> Tensor:
    """All-but-the-top fitted on the training inputs."""
    return affine.apply_affine(z, *affine.fit_all_but_the_top(train))


ALONE = {"mlm_weight": 0.0, "dense_weight": 1.0}
ORTH = {"lambda_orth": 1e-4}
PAPER = {"lambda_pair": 0.0}  # the paper's three terms alone
METHODS = {
    "features": Method("Words and values, no encoder", trained=False, encoder=False),
    "start": Method("The start, not trained on", trained=False),
    "supervised": Method("Supervised CE", ALONE, supervised=True),
    "mlm": Method("Masked reconstruction (MLM)", {"dense_weight": 0.0}),
    "infonce": Method("InfoNCE, adjacent", ALONE, lambda width: b.info_nce),
    "simcse": Method("SimCSE", ALONE, lambda width: b.info_nce, self_pairs=True),
    "vicreg": Method("VICReg", ALONE, lambda width: b.Expanded(b.vicreg, width)),
    "barlow": Method("Barlow Twins", ALONE, lambda width: b.Expanded(b.barlow_twins, width)),
    "vne": Method("I-VNE+", ALONE, lambda width: b.Expanded(b.i_vne, width)),
    "sigreg": Method("LeJEPA (SIGReg)", ALONE, lambda width: b.Expanded(b.lejepa, width)),
    "mlm+vicreg": Method("MLM + VICReg", {"dense_weight": 1 / 25}, lambda width: b.vicreg),
    "mlm+whitening": Method("MLM, then whitened", after=("mlm", whitened)),
    "mlm+top-removed": Method("MLM, top directions removed", after=("mlm", top_removed)),
    "dense": Method("Dense alone (the paper's form)", ALONE | ORTH | PAPER | {"center": False}),
    "mlm+dense": Method("MLM + dense (default)"),
    "mlm+dense-pair": Method("MLM + dense, the paper's terms alone", PAPER),
    "mlm+dense-spec": Method("MLM + dense, without L_spec", spec_weight=0.0),
    "mlm+dense-sub": Method("MLM + dense, without L_sub", {"lambda_sub": 0.0}),
    "full": Method("The paper's terms, with L_orth", ORTH | PAPER),
    "full-spec": Method("with L_orth, without L_spec", ORTH | PAPER, spec_weight=0.0),
    "full-sub": Method("with L_orth, without L_sub", ORTH | PAPER | {"lambda_sub": 0.0}),
}
DEFICIT = {"terms": {"rank_deficit": 1.0}}  # in the place of L_spec
# What the documents' study chooses the defaults from, on validation documents.
CANDIDATES = {
    "expander 4": Method("MLM + dense, expander", {"expander": 4}),
    "expander 4 weight 10": Method("weight 10, expander", {"expander": 4, "dense_weight": 10.0}),
    "expander deficit": Method(
        "rank deficit, weight 1, lambda_pair 6, expander",
        DEFICIT | {"dense_weight": 1.0, "lambda_pair": 6.0, "expander": 4},
        spec_weight=0.0,
    ),
    "expander deficit 3": Method(
        "rank deficit, weight 3, lambda_pair 6, expander",
        DEFICIT | {"dense_weight": 3.0, "lambda_pair": 6.0, "expander": 4},
        spec_weight=0.0,
    ),
    "expander deficit alone": Method(
        "rank deficit, lambda_pair 6, expander, without MLM",
        ALONE | DEFICIT | {"lambda_pair": 6.0, "expander": 4},
        spec_weight=0.0,
    ),
    "mlm+infonce": Method("MLM + InfoNCE", {"dense_weight": 0.3}, lambda width: b.info_nce),
    "paper 10": Method("the paper's terms, weight 10", PAPER | {"dense_weight": 10.0}),
    "pair 0.1 weight 10": Method("weight 10, lambda_pair 0.1", {"dense_weight": 10.0, "lambda_pair": 0.1}),
    "pair 0.3 weight 10": Method("weight 10, lambda_pair 0.3", {"dense_weight": 10.0}),
    "pair 0.1 weight 10 unmasked": Method(
        "weight 10, lambda_pair 0.1, unmasked input", {"dense_weight": 10.0, "lambda_pair": 0.1}, clean=True
    ),
    "information": Method(
        "weight 3, mutual information 1 in place of pairing", PAPER | {"terms": {"mutual_information": 1.0}}
    ),
    "pair 0.3 alone": Method("lambda_pair 0.3, without MLM", ALONE),
    "deficit 0.3": Method(
        "rank deficit, weight 0.3, lambda_pair 3.5",
        DEFICIT | {"dense_weight": 0.3, "lambda_pair": 3.5},
        spec_weight=0.0,
    ),
    "deficit 1": Method(
        "rank deficit, weight 1, lambda_pair 3.5", DEFICIT | {"dense_weight": 1.0, "lambda_pair": 3.5}, spec_weight=0.0
    ),
    "deficit 1 pair 6": Method(
        "rank deficit, weight 1, lambda_pair 6", DEFICIT | {"dense_weight": 1.0, "lambda_pair": 6.0}, spec_weight=0.0
    ),
    **{
        f"share {share}": Method(f"MLM + dense (default), {share} of the way from the start", share=share)
        for share in (0.25, 0.5, 0.75, 1.25)
    },
    "vne bare": Method("I-VNE+ without its expander", ALONE, lambda width: b.i_vne),
    "pair 1 weight 10": Method("weight 10, lambda_pair 1", {"dense_weight": 10.0, "lambda_pair": 1.0}),
    "pair 1 alone": Method("lambda_pair 1, without MLM", ALONE | {"lambda_pair": 1.0}),
    "pair 1": Method("weight 3, lambda_pair 1", {"lambda_pair": 1.0}),
    "pair 0.03": Method("weight 3, lambda_pair 0.03", {"lambda_pair": 0.03}),
}
OURS = ("dense", "mlm+dense", "mlm+dense-pair", "mlm+dense-spec", "mlm+dense-sub", "full")
ABLATION = {
    "full": "Full objective",
    "full-spec": "w/o Spectral Spreading",
    "full-sub": "w/o Subspace Consistency",
    "mlm+dense-pair": "w/o Orthogonality",
}
# What ours has to beat: trained without labels, or made from such at no cost.
BASELINES = tuple(name for name in METHODS if name not in ("features", "supervised", *OURS, *ABLATION))
SWEEP = {
    "lambda_sub": [{"lambda_sub": value} for value in (0.0, 0.001, 0.01, 0.03)],
    "lambda_orth": [{"lambda_orth": value} for value in (1e-5, 1e-4, 3e-4, 1e-3)],
    "both": [{"lambda_orth": 3e-4, "lambda_sub": value} for value in (0.01, 0.03)],
    "dense_weight": [{"dense_weight": value} for value in (0.1, 0.3, 1.0, 10.0)],
    "window": [{"window": value} for value in ("none", "512")],
    "centring": [{"center": False}],
    "estimator": [{"unbiased": True}],
    "rows": [{"per_device_train_batch_size": value} for value in (8, 64)],
    "pairs_per_patient": [{"pairs_per_patient": value} for value in (4, 8)],
    "pooling": [{"pooling": value} for value in ("cls", "max")],
}
SWEEP_METHODS = {
    "broadening 0.1": {"broadening": 0.1},
    "broadening 10": {"broadening": 10.0},
    "clean input": {"clean": True},
    "rank at most 16": {"most_rank": 16.0},
    "rank at most 32": {"most_rank": 32.0},
    "rank at most 64": {"most_rank": 64.0},
    "pairing-aware without L_sub": {"arguments": {"lambda_pair": 0.1, "lambda_sub": 0.0}},
    "pairing-aware and L_sub": {"arguments": {"lambda_pair": 0.1}},
    "pairing-aware at 0.5": {"arguments": {"lambda_pair": 0.5}},
    "pairing-aware at 2": {"arguments": {"lambda_pair": 2.0}},
}


def sweep_methods() -> dict[str, Method]:
    """One factor at a time around the default, and the two weights together."""
    found = {}
    for values in SWEEP.values():
        for change in values:
            name = " and ".join(f"{key} {value}" for key, value in change.items())
            found[name] = Method(name, change)
    return found | {name: Method(name, **change) for name, change in SWEEP_METHODS.items()}
