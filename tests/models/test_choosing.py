"""The content view that validation notes choose: against a loop, with nothing to gain, and where the mean hides all."""

import math

import numpy as np
import pytest
import torch

from hf_densefeat.models.choosing import Choice, choose_content, choose_views, fit_content, reciprocal_ranks


def made(n, seed, noise=3.0, mean=0.0):
    """Pairs that share 8 directions, below 4 of noise."""
    rng = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 8, generator=rng)
    return tuple(torch.cat([shared, noise * torch.randn(n, 4, generator=rng)], 1) + mean for _ in range(2))


def test_reciprocal_ranks_equal_a_loop_and_share_ties():
    """Of cosines; equal rows share the middle of their places."""
    a, b = torch.randn(40, 5), torch.randn(40, 5)
    unit = [torch.nn.functional.normalize(z, dim=1).numpy() for z in (a, b)]
    ranks = [1 + (row > row[i]).sum() for i, row in enumerate(unit[0] @ unit[1].T)]
    np.testing.assert_allclose(reciprocal_ranks(a, b), 1 / np.array(ranks), rtol=1e-6)
    np.testing.assert_allclose(reciprocal_ranks(torch.ones(3, 2), torch.ones(3, 2)), 0.5)


def test_noise_is_whitened_and_the_scores_are_those_of_the_view():
    """The chosen view finds more pairs than the encoder as it is, by as much as is said."""
    train, validation = {"adjacent": made(300, 0)}, {"adjacent": made(200, 1)}
    head, order = choose_content(train, validation, width=12)
    assert order[0].epsilon < 1
    assert head.pairs == "adjacent"
    found = float(reciprocal_ranks(*map(head, validation["adjacent"])).mean())
    assert found == pytest.approx(order[0].found, abs=1e-6)
    as_it_is = float(reciprocal_ranks(*validation["adjacent"]).mean())
    assert found - as_it_is == pytest.approx(order[0].gain, abs=1e-6)


def test_without_anything_to_gain_the_encoder_stays_as_it_is():
    """Every text finds its pair already, or there are no pairs to tell by."""
    clean = [made(200, seed, noise=0.0) for seed in range(2)]
    head, order = choose_content({"halves": clean[0]}, {"halves": clean[1]}, width=12)
    assert (head, order[0].pairs, order[0].gain) == (None, "", 0)
    assert str(order[-1]) == "centring alone, last layer"
    none = (torch.empty(0, 12), torch.empty(0, 12))
    assert choose_content({"halves": none}, {"halves": none}, width=12)[0] is None


def test_an_encoder_that_was_trained_for_similarity_gets_a_mild_view_of_halves():
    """Not centred, of the last layer alone; by adjacent notes where there are no halves."""

    def sides(n, seed):  # the noise comes first
        return tuple(z.roll(4, 1) for z in made(n, seed))

    train, validation = (
        {kind: sides(n, seed) for seed, kind in enumerate(("adjacent", "halves"))} for n in (300, 200)
    )
    head, (choice, *_) = choose_content(train, validation, width=10, for_similarity=True)
    assert str(choice) == "halves, epsilon 10, last layer"
    assert (len(head.mean), float(head.mean.abs().max())) == (10, 0)
    assert (
        str(choose_content(train, validation, width=10)[1][0]) == "halves, epsilon 0.03, centred, last and input layer"
    )
    train.pop("halves")
    (choice, *_) = choose_content(train, validation, width=12, for_similarity=True, epsilon=1.0)[1]
    assert str(choice) == "adjacent, epsilon 1, last layer"


def test_a_common_mean_is_subtracted():
    """Rows that all point one way are told apart about their mean."""
    head, order = choose_content({"halves": made(300, 0, mean=50.0)}, {"halves": made(200, 1, mean=50.0)}, width=12)
    assert order[0].center
    assert order[0].gain > 0.5
    assert float(head(made(300, 0, mean=50.0)[0]).mean()) < 1


@pytest.mark.parametrize("epsilon", [math.inf, 0.3])
def test_the_input_embeddings_count_as_much_as_the_last_layer(epsilon):
    """Whatever their scale: columns times 1,000 give the same cosines."""
    a, b = made(300, 0)
    choice = Choice("halves", True, True, epsilon)
    scaled = torch.tensor([1.0] * 6 + [1000.0] * 6)
    one, other = (fit_content((a * s, b * s), choice, width=6)(a * s) for s in (1, scaled))
    torch.testing.assert_close(reciprocal_ranks(one, other), torch.ones(300))
    unit = [torch.nn.functional.normalize(z, dim=1) for z in (one, other)]
    torch.testing.assert_close(unit[0] @ unit[0].mT, unit[1] @ unit[1].mT, rtol=1e-4, atol=1e-4)


def test_pairs_that_share_an_author_and_not_the_matter_choose_no_view():
    """What adjacent notes share is then the author: a view by them finds the author better and the other half worse."""

    def sides(n, seed):
        rng = torch.Generator().manual_seed(seed)
        author, one, other = (torch.randn(n, 8, generator=rng) for _ in range(3))
        noise = 0.7 * torch.randn(2, n, 16, generator=rng)
        whole = torch.cat([author, one], 1)
        return {"adjacent": (whole, torch.cat([author, other], 1)), "halves": (whole + noise[0], whole + noise[1])}

    head, order = choose_content({"adjacent": sides(400, 0)["adjacent"]}, sides(300, 1), width=16)
    assert head is None
    strong = next(one for one in order if one.epsilon == 0.03 and one.center)
    assert strong.ranks["adjacent"] > order[0].ranks["adjacent"]
    assert strong.gain < 0


def test_adjacent_notes_are_preferred_where_they_teach_more_than_halves():
    """They share what a patient's notes have in common, below the matter of each, which halves share too."""

    def sides(n, seed):
        rng = torch.Generator().manual_seed(seed)
        common, (one, other) = 0.5 * torch.randn(n, 2, generator=rng), torch.randn(2, n, 8, generator=rng)
        noise = 3 * torch.randn(4, n, 4, generator=rng)
        rows = [torch.cat([common, *both], 1) for both in zip((one, other, one, one), noise, strict=True)]
        return {"adjacent": (rows[0], rows[1]), "halves": (rows[2], rows[3])}

    train, validation = sides(400, 0), sides(300, 1)
    head, (choice, *_) = choose_content(train, validation, width=14)
    assert choice.pairs == head.pairs == "adjacent"
    train["adjacent"] = train["halves"]  # then they teach the same
    assert choose_content(train, validation, width=14)[1][0].pairs == "halves"


def test_content_as_it_is_beside_a_form_view_of_both_layers():
    """Where no content view serves, the first view is the encoder as it is, of the columns that the form view reads."""
    generator = torch.Generator().manual_seed(0)
    train, validation = ({"adjacent": tuple(torch.randn(2, n, 20, generator=generator))} for n in (200, 100))
    views, (choice, *_) = choose_views(train, validation, width=10)
    z = validation["adjacent"][0]
    assert str(choice) == "the encoder as it is"
    torch.testing.assert_close(views["content"](z), z[:, :10])
    assert views["form"](z).shape == z.shape
    assert choose_views(train, validation, width=10, for_similarity=True)[0]["form"](z[:, :10]).shape == (100, 10)
