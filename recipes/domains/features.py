"""Embeddings without an encoder: what scikit-learn makes of words and values. The rows that tell what an encoder adds."""

import json
from collections.abc import Callable

import numpy as np
import pandas as pd
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import QuantileTransformer
from sklearn.random_projection import GaussianRandomProjection

DIMENSIONS = 128


def of_words(train: list[str], texts: list[str], cut: Callable[[list[str]], list[str]]) -> np.ndarray:
    """Latent semantic analysis: TF-IDF of words and of pairs of words, and its leading directions, at most 128.

    Of the texts as `cut` leaves them: an encoder has a limit on tokens, too.
    """
    train, texts = cut(train), cut(texts)
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=3, max_features=20_000)
    counted = words.fit_transform(train)
    directions = TruncatedSVD(min(DIMENSIONS, counted.shape[1]), random_state=0).fit(counted)
    return directions.transform(words.transform(texts))


def of_all_words(train: list[str], texts: list[str], cut: Callable[[list[str]], list[str]]) -> np.ndarray:
    """TF-IDF of words, as search engines have it, in 512 random directions, which keep its cosines within about 0.04."""
    train, texts = cut(train), cut(texts)
    words = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit(train)
    directions = GaussianRandomProjection(512, random_state=0)
    return directions.fit_transform(words.transform(texts))


def of_events(train: list[str], episodes: list[str]) -> np.ndarray:
    """Of every code: how often, and the values' mean, least, largest and last, as normal scores of training quantiles.

    What is missing is the training median.
    """
    table = aggregated(episodes)
    known = aggregated(train).reindex(columns=table.columns)
    scores = QuantileTransformer(n_quantiles=min(100, len(train)), output_distribution="normal")
    numbers = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), scores)
    return numbers.fit(known.to_numpy()).transform(table.to_numpy())


def of_both(train: list[str], episodes: list[str], cut: Callable[[list[str]], list[str]]) -> np.ndarray:
    """Words and values side by side, each of total variance 1."""
    notes = [[json.loads(episode).get("text", "") for episode in part] for part in (train, episodes)]
    return np.hstack([z / np.sqrt(z.var(0).sum()) for z in (of_words(*notes, cut), of_events(train, episodes))])


def aggregated(episodes: list[str]) -> pd.DataFrame:
    """One row an episode, one column a code and aggregate; not a number where nothing was measured."""
    events = [(i, *event) for i, episode in enumerate(episodes) for event in json.loads(episode)["events"]]
    table = pd.DataFrame(events, columns=["episode", "code", "value", "hours"]).sort_values("hours", kind="stable")
    found = table.groupby(["episode", "code"])["value"].agg(["count", "mean", "min", "max", "last"]).unstack("code")
    found = found.reindex(range(len(episodes)))
    found["count"] = found["count"].fillna(0)
    return found
