"""pack_2d against quadratic first-fit-decreasing: time at 50,000 rows, bins on mixtures, one million rows."""

from collections.abc import Callable

import numpy as np

from benchmarks.common import Result, best_seconds
from mmray.packing.pack import lower_bound, pack_2d

TOKEN_CAPACITY, VISUAL_CAPACITY = 16384, 8192

Sizes = tuple[np.ndarray, np.ndarray]
"""Tokens and visual tokens of each row."""


def ocr_tiles(rng: np.random.Generator, n: int) -> Sizes:
    """Pages in 1 to 9 tiles of 256 visual tokens, with their text."""
    visual = rng.choice([1, 2, 4, 6, 7, 9], n) * 256
    return visual + np.minimum(rng.lognormal(6, 0.9, n).astype(int) + 20, 6000), visual


def ocr_any_size(rng: np.random.Generator, n: int) -> Sizes:
    """Pages of any resolution: 50 to 8,000 visual tokens."""
    visual = rng.integers(50, 8000, n)
    return visual + np.minimum(rng.lognormal(6, 1, n).astype(int), 7000), visual


def few_sizes(rng: np.random.Generator, n: int) -> Sizes:
    sizes = np.array([[5462, 2731], [4097, 2049], [8200, 100], [300, 4000], [3300, 1700], [2800, 1400]])
    tokens, visual = sizes[rng.integers(0, len(sizes), n)].T
    return tokens, visual


def text_only(rng: np.random.Generator, n: int) -> Sizes:
    return np.minimum(rng.lognormal(6.5, 1.2, n).astype(int) + 1, TOKEN_CAPACITY), np.zeros(n, dtype=int)


def text_beside_images(rng: np.random.Generator, n: int) -> Sizes:
    """Half the rows are long texts, half are image-heavy with little text."""
    is_text = rng.random(n) < 0.5
    tokens = np.where(is_text, rng.integers(500, 9000, n), rng.integers(50, 600, n))
    return tokens, np.where(is_text, 0, rng.integers(1000, 5000, n))


Mixture = Callable[[np.random.Generator, int], Sizes]
MIXTURES: list[Mixture] = [
    ocr_tiles,
    ocr_any_size,
    few_sizes,
    text_only,
    text_beside_images,
]


def packed(tokens: list[int] | np.ndarray, visual_tokens: list[int] | np.ndarray) -> list[list[int]]:
    return pack_2d(tokens, visual_tokens, token_capacity=TOKEN_CAPACITY, visual_capacity=VISUAL_CAPACITY)


def quadratic_ffd(tokens: list[int], visual_tokens: list[int]) -> list[list[int]]:
    """First-fit-decreasing by max(tokens / capacity, visual / capacity), one bin after the other."""
    fractions = [max(t / TOKEN_CAPACITY, v / VISUAL_CAPACITY) for t, v in zip(tokens, visual_tokens)]
    bins: list[list[int]] = []
    token_rooms: list[int] = []
    visual_rooms: list[int] = []
    for item in sorted(range(len(tokens)), key=fractions.__getitem__, reverse=True):
        num_tokens, num_visual = tokens[item], visual_tokens[item]
        rooms = enumerate(zip(token_rooms, visual_rooms))
        place = next((i for i, room in rooms if room[0] >= num_tokens and room[1] >= num_visual), len(bins))
        if place == len(bins):
            bins.append([])
            token_rooms.append(TOKEN_CAPACITY)
            visual_rooms.append(VISUAL_CAPACITY)
        bins[place].append(item)
        token_rooms[place] -= num_tokens
        visual_rooms[place] -= num_visual
    return bins


def run() -> list[Result]:
    packed([1], [1])
    results = [time_against_ffd(), time_of_a_million()]
    for mixture in MIXTURES:
        results += bins_of(mixture)
    return results


def time_against_ffd(num_rows: int = 50_000) -> Result:
    tokens, visual = (sizes.tolist() for sizes in ocr_tiles(np.random.default_rng(0), num_rows))
    own = best_seconds(lambda: packed(tokens, visual))
    ffd = best_seconds(lambda: quadratic_ffd(tokens, visual), repeats=1)
    return Result(
        name=f"pack_2d against quadratic first-fit-decreasing, {num_rows:,} rows of ocr_tiles",
        ratio=ffd / own,
        explanation=f"{own:.3f} s against {ffd:.1f} s, both in one thread",
        goal=100,
    )


def time_of_a_million() -> Result:
    rng = np.random.default_rng(0)
    few, many = (ocr_any_size(rng, num_rows) for num_rows in (50_000, 1_000_000))
    seconds_few = best_seconds(lambda: packed(*few))
    seconds_many = best_seconds(lambda: packed(*many), repeats=1)
    return Result(
        name="1,000,000 rows of ocr_any_size against 50,000, time a row",
        ratio=(seconds_many / 1_000_000) / (seconds_few / 50_000),
        explanation=f"{seconds_many:.1f} s in all; {seconds_few:.2f} s for 50,000",
        lower_is_better=True,
    )


def bins_of(mixture: Mixture, num_rows: int = 5000) -> list[Result]:
    tokens, visual = mixture(np.random.default_rng(1), num_rows)
    bound = lower_bound(tokens, visual, token_capacity=TOKEN_CAPACITY, visual_capacity=VISUAL_CAPACITY)
    own = len(packed(tokens, visual))
    ffd = len(quadratic_ffd(tokens.tolist(), visual.tolist()))
    data = f"{num_rows:,} rows of {mixture.__name__}"
    return [
        Result(
            name=f"bins of first-fit-decreasing against pack_2d, {data}",
            ratio=ffd / own,
            explanation=f"{ffd:,} bins against {own:,}",
            goal=1,
        ),
        Result(
            name=f"lower bound against bins of pack_2d, {data}",
            ratio=bound / own,
            explanation=f"{bound:,} by the sums of sizes; 1 is the best there can be",
        ),
    ]
