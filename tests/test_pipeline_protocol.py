"""Nobody in the Hopper attention kernel waits for ever: its rings, turns and look-ahead, walked without a GPU.

The scheduler, the producer and the consumers of cuda_src/attention/fwd_sm90.cuh are generators that yield what they
wait for; whoever can go on is chosen at random. A walk that gets stuck is a hang of the kernel.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

Agent = Iterator[Callable[[], bool]]


class Part(NamedTuple):
    """What a consumer does with a tile: steps begin <= n < end, and those it lets pass."""

    begin: int
    end: int
    before: int
    after: int


class Tile(NamedTuple):
    n_begin: int
    n_end: int
    parts: list[Part]


class Ring:
    """Fillings so far, and how many of them each reader has given back."""

    def __init__(self, stages: int, readers: int) -> None:
        self.stages, self.filled, self.released = stages, 0, [0] * readers

    def free(self) -> bool:
        return self.filled - min(self.released) < self.stages

    def full_for(self, reader: int) -> Callable[[], bool]:
        return lambda: self.filled > self.released[reader]


class Block:
    """One block of the kernel. early: the producer asks for the next tile's record before this tile's other keys."""

    def __init__(self, tiles: list[Tile], consumers: int, stages: int, q_stages: int, works: int, early: bool) -> None:
        self.tiles, self.consumers, self.stages, self.q_stages, self.early = tiles, consumers, stages, q_stages, early
        self.k, self.v, self.work = (Ring(n, consumers) for n in (stages, stages, works))
        self.q = [Ring(q_stages, 1) for _ in range(consumers)]
        self.in_turn = consumers < 4
        self.turns = [int(i == 0) for i in range(consumers)]

    def scheduler(self) -> Agent:
        for _ in range(len(self.tiles) + 1):
            yield self.work.free
            self.work.filled += 1

    def load_q(self) -> Agent:
        for ring in self.q:
            yield ring.free
            ring.filled += 1

    def producer(self) -> Agent:
        behind = False
        yield lambda: self.work.filled > 0
        if self.q_stages == 2 and self.tiles:
            yield from self.load_q()
        for t, tile in enumerate(self.tiles):
            look_ahead = tile.n_end - 1 if self.early else max(tile.n_end - self.stages, tile.n_begin)
            for n in range(tile.n_end - 1, tile.n_begin - 1, -1):
                yield self.k.free
                self.k.filled += 1
                if behind:
                    yield self.v.free
                    self.v.filled += 1
                behind = True
                if self.q_stages == 1 and n == tile.n_end - 1:
                    yield from self.load_q()
                if n == look_ahead:
                    yield lambda t=t: self.work.filled > t + 1  # type: ignore[misc]
                    if self.q_stages == 2 and t + 1 < len(self.tiles):
                        yield from self.load_q()
        if behind:
            yield self.v.free
            self.v.filled += 1

    def take_turn(self, c: int) -> Agent:
        if self.in_turn:
            yield lambda: self.turns[c] > 0
            self.turns[c] -= 1

    def pass_turn(self, c: int) -> None:
        if self.in_turn:
            to = (c + 1) % self.consumers
            self.turns[to] += 1
            assert self.turns[to] == 1, "a barrier that is arrived at twice is undefined"

    def consumer(self, c: int) -> Agent:
        k_here, v_here = self.k.full_for(c), self.v.full_for(c)

        def skip_k(count: int) -> Agent:
            for _ in range(count):
                yield k_here
                self.k.released[c] += 1
                yield from self.take_turn(c)
                self.pass_turn(c)

        def skip_v(count: int) -> Agent:
            for _ in range(count):
                yield v_here
                self.v.released[c] += 1

        yield lambda: self.work.filled > 0
        if not self.tiles:
            return
        t, part = 0, self.tiles[0].parts[c]
        n = part.end - 1
        yield lambda: self.q[c].filled > 0
        yield from skip_k(part.before)
        yield k_here
        yield from skip_v(part.before)
        self.k.released[c] += 1
        self.q[c].released[0] = int(n == part.begin)
        pending = False
        while True:
            last, skip = n == part.begin, 0
            if last:
                yield from skip_k(part.after)
                yield lambda t=t: self.work.filled > t + 1  # type: ignore[misc]
                if t + 1 == len(self.tiles):
                    return
                skip, t = part.after, t + 1
                part = self.tiles[t].parts[c]
                n = part.end
                yield from skip_k(part.before)
                skip += part.before
                yield lambda t=t: self.q[c].filled > t  # type: ignore[misc]
            n -= 1
            yield k_here
            yield from self.take_turn(c)
            if pending:  # the tile before is written
                self.pass_turn(c)
                self.work.released[c] += 1
            yield v_here
            if not pending:
                self.pass_turn(c)
            self.k.released[c] += 1
            self.v.released[c] += 1
            if n == part.begin:
                self.q[c].released[0] = t + 1
            yield from skip_v(skip)
            pending = last

    def finishes(self, draw: random.Random) -> bool:
        agents = [self.scheduler(), self.producer(), *(self.consumer(c) for c in range(self.consumers))]
        waiting: dict[Agent, Callable[[], bool]] = {}
        moved = agents
        while True:
            waiting |= {agent: wait for agent in moved if (wait := next(agent, None)) is not None}
            ready = [agent for agent, wait in waiting.items() if wait()]
            if not ready:
                return not waiting
            moved = [draw.choice(ready)]
            del waiting[moved[0]]


def div_up(a: int, b: int) -> int:
    return -(-a // b)


class Band(NamedTuple):
    rows: int
    cols: int
    left: int
    right: int

    def first(self, row: int) -> int:
        return 0 if self.left < 0 else max(0, row + self.cols - self.rows - self.left)

    def last(self, row: int) -> int:
        return self.cols - 1 if self.right < 0 else min(self.cols - 1, row + self.cols - self.rows + self.right)


def random_tiles(draw: random.Random, consumers: int, block_n: int, stages: int) -> list[Tile]:
    """Tiles of random problems with causal masks and windows; the arithmetic of schedule_sm90.cuh."""
    skipped, tiles = [0] * consumers, []
    for _ in range(draw.randint(1, 8)):
        band = Band(
            draw.randint(1, 400), draw.randint(1, 500),
            draw.choice((-1, -1, 0, 5, 70, 200)), draw.choice((0, 0, -1, 3, 90)),
        )  # fmt: skip
        m0 = 64 * consumers * draw.randrange(div_up(band.rows, 64 * consumers))
        n_end = max(1, div_up(band.last(min(m0 + 64 * consumers, band.rows) - 1) + 1, block_n))
        n_begin = min(band.first(m0) // block_n, n_end - 1)
        parts = []
        for i in range(consumers):
            row = m0 + i * 64
            seen = div_up(max(band.last(row + 63) + 1, 0), block_n)
            before = max(0, min(n_end - seen, n_end - 1 - n_begin, stages - 1 - skipped[i]))
            after = min(max(0, min(n_end - before - 1, band.first(row) // block_n) - n_begin), stages - 1)
            parts.append(Part(n_begin + after, n_end - before, before, after))
            skipped[i] = after
        tiles.append(Tile(n_begin, n_end, parts))
    return tiles


SHAPES = ((2, 64, 2, 1), (2, 64, 2, 2), (2, 128, 2, 2), (2, 160, 2, 1), (2, 128, 3, 2), (3, 128, 3, 2), (4, 64, 4, 2))


def walks(shape: tuple[int, int, int, int], works: int, early: bool = False) -> list[bool]:
    consumers, block_n, stages, q_stages = shape
    draw = random.Random(1)
    problems = [random_tiles(draw, consumers, block_n, stages) for _ in range(300)]
    return [Block(tiles, consumers, stages, q_stages, works, early).finishes(draw) for tiles in [[], *problems]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("works", [3, 4])
def test_nobody_waits_for_ever(shape: tuple[int, int, int, int], works: int) -> None:
    assert all(walks(shape, works))


def test_the_walk_finds_a_hang() -> None:
    """Three records, and the next one asked for after a tile's first keys: that did hang on a GPU."""
    assert not all(walks((2, 64, 2, 1), 3, early=True))
