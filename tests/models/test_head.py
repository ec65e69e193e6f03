"""The dense head: closed form, edges, and the same embeddings in sentence-transformers, which never heard of this package."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import WORDS, make_model, make_tokenizer, run_without_densefeat
from transformers import AutoModel

from hf_densefeat import AutoDenseModel, DenseHead, Moments
from hf_densefeat.events import EventConfig, EventModelForMaskedValues
from hf_densefeat.models.head import PairCovariances, content_head, form_head

TEXTS = [" ".join(WORDS[i : i + n]) for i, n in ((0, 4), (4, 2), (6, 5), (3, 3), (9, 2))]


def correlated(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 5 * rng.normal(size=d))


@pytest.mark.parametrize("epsilon", [10.0, 1.0, 0.03, 0.0])
def test_finite_epsilon_equals_the_definition(epsilon):
    """Against NumPy's eigh: the Gram matrix of the result, which does not depend on the signs of eigenvectors."""
    z = correlated(300, 12)
    head = DenseHead.fit(z, epsilon=epsilon)
    values, vectors = np.linalg.eigh(np.cov(z.numpy().T, ddof=0))
    expected = (z.numpy() - z.numpy().mean(0)) @ vectors / np.sqrt(values + epsilon * values.mean())
    np.testing.assert_allclose(head(z) @ head(z).T, expected @ expected.T, rtol=1e-8, atol=1e-8)
    # the largest axis comes first, axes are uncorrelated
    covariance = np.cov(head(z).numpy().T, ddof=0)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-9)
    assert (np.diff(np.diag(covariance)) <= 1e-9).all()


def test_centring_alone_keeps_distances_and_ends_the_mean_cosine():
    """Infinite epsilon subtracts the mean; finite epsilon goes there up to a rotation and a scale."""
    z = correlated(400, 8)
    head = DenseHead.fit(z)
    torch.testing.assert_close(head(z), z - z.mean(0))
    torch.testing.assert_close(torch.cdist(head(z), head(z)), torch.cdist(z, z), rtol=1e-6, atol=1e-5)
    far = DenseHead.fit(z, epsilon=1e9)(z)
    torch.testing.assert_close(
        far @ far.T * 1e9 * z.var(0, correction=0).mean(), head(z) @ head(z).T, rtol=1e-4, atol=1e-3
    )
    unit = torch.nn.functional.normalize(head(z), dim=1)
    assert abs(float((unit @ unit.T).fill_diagonal_(0).sum()) / (400 * 399)) < 0.01


def test_moments_give_the_same_head():
    """Mean and covariance of the objective's moments are enough."""
    z = correlated(100, 6)
    m = Moments.of(z)
    other = DenseHead.of_covariance(m.mean, m.covariance(True), epsilon=1.0)
    torch.testing.assert_close(other(z), DenseHead.fit(z, epsilon=1.0)(z))


@pytest.mark.parametrize(
    "z", [correlated(3, 10), torch.ones(5, 4), torch.zeros(4, 4), torch.randn(1, 4), correlated(20, 4).half()]
)
@pytest.mark.parametrize("epsilon", [math.inf, 10.0, 1.0, 0.03, 0.0])
def test_edges_are_finite(z, epsilon):
    """Fewer rows than dimensions, equal rows, zeros, one row, half precision."""
    out = DenseHead.fit(z, epsilon=epsilon)(z)
    assert out.dtype == z.dtype
    assert out.shape == z.shape
    assert torch.isfinite(out).all()
    assert out.double().mean(0).abs().max() < (1e-2 if z.dtype == torch.half else 1e-6) * (1 + z.double().abs().max())


def test_what_cannot_be_fitted_is_refused():
    """In sentences that say what came."""
    with pytest.raises(ValueError, match=r"shape \(n, d\), n >= 1, but got \(0, 3\)"):
        DenseHead.fit(torch.empty(0, 3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        DenseHead.fit(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match="epsilon >= 0"):
        DenseHead.fit(torch.ones(2, 2), epsilon=-1)
    with pytest.raises(ValueError, match="width 2 but got 3"):
        DenseHead.fit(torch.ones(2, 2))(torch.ones(1, 3))


def fitted(model, tokenizer, input_layer):
    """Both views of random pairs."""
    z = model.encode(TEXTS, tokenizer, view=None, input_layer=input_layer)
    pairs = PairCovariances.of(z[:-1], z[1:])
    return {"content": content_head(pairs, epsilon=0.3), "form": form_head(pairs, epsilon=1.0, center=False)}


OPEN_EVERY_FOLDER = f"""
import json
from pathlib import Path
from sentence_transformers import SentenceTransformer

found = {{}}
for folder in sorted(Path(".").iterdir()):
    encoder = SentenceTransformer(str(folder), device="cpu")
    rows = [encoder.encode({TEXTS!r}, truncate_dim=4), encoder.encode({TEXTS!r})]
    if "views" in folder.name:
        rows.append(encoder.encode({TEXTS!r}, task="form"))
        assert (encoder.encode_query({TEXTS!r}) == rows[1]).all()
    found[folder.name] = [z.tolist() for z in rows]
print(json.dumps(found))
"""
FOLDERS = [f"{name} {views}" for name in ("bert", "modernbert") for views in ("head", "views", "views of two layers")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The models by folder, the folders, saved, loaded and saved again, and what one other process makes of all of them."""
    root, tokenizer, models = tmp_path_factory.mktemp("views"), make_tokenizer(), {}
    for folder in FOLDERS:
        model = models[folder] = make_model(folder.split()[0], tokenizer)
        plain = model.encode(TEXTS, tokenizer)
        if folder.endswith("head"):
            model.views = {"content": DenseHead.fit(plain)}
        else:
            model.views = fitted(model, tokenizer, input_layer="two" in folder)
        torch.testing.assert_close(model.encode(TEXTS, tokenizer, head=False), plain)
        torch.testing.assert_close(model.encode(TEXTS, tokenizer, view=None), plain)
        model.save_pretrained(root / folder)
        tokenizer.save_pretrained(root / folder)
        AutoDenseModel.from_pretrained(str(root / folder)).save_pretrained(root / folder)
    return models, root, json.loads(run_without_densefeat(OPEN_EVERY_FOLDER, root))


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_with_views_opens_everywhere(opened, folder):
    """`encode`, a second load and sentence-transformers in another process apply them; AutoModel's states stay."""
    (models, root, found), tokenizer = opened, make_tokenizer()
    model, path = models[folder], str(root / folder)
    expected = [model.encode(TEXTS, tokenizer, view=view) for view in model.views]
    again = AutoDenseModel.from_pretrained(path)
    assert [head.epsilon for head in again.views.values()] == [head.epsilon for head in model.views.values()]
    first, *whole = map(np.array, found[folder])
    np.testing.assert_allclose(first, expected[0][:, :4], rtol=1e-5, atol=1e-5 * float(expected[0].abs().max()))
    for z, native, view in zip(expected, whole, model.views, strict=True):
        np.testing.assert_allclose(native, z, rtol=1e-5, atol=1e-5 * float(z.abs().max()))
        torch.testing.assert_close(again.encode(TEXTS, view=view), z, rtol=1e-5, atol=1e-5 * float(z.abs().max()))
    states = [AutoModel.from_pretrained(path)(**tokenizer(TEXTS[:1], return_tensors="pt"))[0]]
    states.append(model.base_model.eval()(**tokenizer(TEXTS[:1], return_tensors="pt"))[0])
    torch.testing.assert_close(*states)


def test_a_head_can_be_dropped_and_must_fit():
    """None drops it; one of another width is refused."""
    model = make_model("bert", make_tokenizer())
    model.views = {"content": DenseHead.fit(torch.randn(10, model.config.hidden_size))}
    model.views = {}
    assert model.dense_head is None
    with pytest.raises(ValueError, match="view to be one of content or None"):
        model.encode(TEXTS, view="form")
    with pytest.raises(ValueError, match="width 3, but"):
        model.views = {"content": DenseHead.fit(torch.randn(10, 3))}


def test_event_encoders_have_a_head_too(tmp_path):
    """Saved and loaded with the encoder, though sentence-transformers does not read events."""
    config = EventConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = AutoDenseModel.from_config(config)
    assert isinstance(model, EventModelForMaskedValues)
    model.views = {"content": DenseHead.fit(correlated(30, 16), epsilon=1.0)}
    model.save_pretrained(tmp_path)
    again = AutoDenseModel.from_pretrained(str(tmp_path))
    z = torch.randn(4, 16)
    torch.testing.assert_close(again.dense_head(z), model.dense_head(z), rtol=1e-4, atol=1e-4)
