from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foam_hf.tensors.rounding import philox_4x32, random_bits, stochastic_round_

CPU = torch.device("cpu")


def bits(rows: range, n: int, **overrides) -> torch.Tensor:
    return random_bits(rows, n, **{"seed": 11, "step": 3, "stream": 8, "device": CPU, **overrides})


def philox_by_hand(counter: list[int], seed: int, rounds: int) -> list[int]:
    word = 0xFFFFFFFF
    c, k = list(counter), [seed & word, seed >> 32 & word]
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & word, (a >> 32) ^ c[3] ^ k[1], a & word]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    return c


def test_philox_matches_the_published_answers_and_unbounded_integers(monkeypatch):
    monkeypatch.setattr("foam_hf.tensors.rounding.PHILOX_ROUNDS", 10)
    # Known answers of Random123 (kat_vectors, philox4x32 10).
    for counter, seed, answer in (
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ):
        words = philox_4x32(tuple(torch.tensor([c]) for c in counter), seed)
        assert [int(w) & 0xFFFFFFFF for w in words] == answer == philox_by_hand(counter, seed, 10)


def test_each_column_gets_its_own_half_word():
    found = bits(range(5, 6), 16)[0].tolist()
    expected = []
    for draw in range(2):
        for word in philox_by_hand([5 * 2 + draw, 0, 3, 8], 11, 7):
            expected += [word & 0xFFFF, word >> 16]
    assert found == expected


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 50), count=st.integers(1, 9), n=st.integers(1, 40))
def test_bits_depend_on_place_alone_not_on_the_chunk(start, count, n):
    assert torch.equal(bits(range(start, start + count), n), bits(range(64), n)[start : start + count])


def test_draws_beyond_32_bits_do_not_repeat():
    rows = range(2**33, 2**33 + 1)  # of 8 columns: draw number 2**33
    word = philox_by_hand([0, 2, 3, 8], 11, 7)[0]
    assert bits(rows, 8)[0, :2].tolist() == [word & 0xFFFF, word >> 16]
    assert not torch.equal(bits(rows, 8), bits(range(1), 8))


@pytest.mark.parametrize("change", [{"seed": 12}, {"seed": 11 + 2**40}, {"step": 4}, {"stream": 9}])
def test_another_seed_step_or_stream_gives_unrelated_bits(change):
    equal = (bits(range(64), 64) == bits(range(64), 64, **change)).float().mean().item()
    assert equal < 0.01  # by chance 2**-16


def test_bits_are_uniform_and_uncorrelated_between_neighbours():
    x = bits(range(512), 512).double() / 65536
    assert abs(x.mean().item() - 0.5) < 5 * (1 / 12) ** 0.5 / x.numel() ** 0.5 + 2**-17
    for shifted in (x[:, 1:] * x[:, :-1], x[1:] * x[:-1]):
        assert abs(shifted.mean().item() - 0.25) < 3e-3
    counts = torch.histc(x, bins=256, min=0, max=1)
    chi_squared = ((counts - x.numel() / 256) ** 2 / (x.numel() / 256)).sum().item()
    assert 160 < chi_squared < 370  # 255 degrees of freedom, five standard deviations


def test_mean_of_many_roundings_is_the_value_and_never_leaves_its_neighbours():
    x = torch.randn(256) * torch.logspace(-30, 30, 256)
    down = x.view(torch.int32).bitwise_and(-0x10000).view(torch.float32)
    up = (down.view(torch.int32) + 0x10000).view(torch.float32)
    trials = 4096
    total = torch.zeros(256, dtype=torch.float64)
    for step in range(trials):
        rounded = stochastic_round_(x.clone()[None], bits(range(1), 256, step=step))[0]
        assert bool(((rounded == down) | (rounded == up)).all())
        total += rounded.double()
    spacing = (up.double() - down.double()).abs()
    # A Bernoulli mean of 4096 trials stays within 5 * 0.5 / 64 spacings.
    assert bool(((total / trials - x.double()).abs() <= 0.04 * spacing).all())


def test_exact_values_infinities_and_nan_stay():
    payload = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf")]), payload])[None]
    for value in (0, 1, 0xFFFF):
        rounded = stochastic_round_(x.clone(), torch.full(x.shape, value, dtype=torch.int32))
        assert torch.equal(rounded[:, :6], x[:, :6])
        assert bool(rounded[:, 6:].isnan().all())
