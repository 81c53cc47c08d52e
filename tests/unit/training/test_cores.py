"""How lanes are spread over cores."""

import gc
import weakref
from contextlib import suppress

import pytest
import torch

from worker.training import cores
from worker.training.cores import (
    EPOCHS_TRIED,
    Chunk,
    Cores,
    Spread,
    chunk_for,
    chunk_sizes,
    trials_computed,
)


def chosen(spread: Spread, chunks: int, most: int, seconds: dict[int, float]) -> list[int]:
    """The choices of some epochs, each of which takes so long by its threads."""
    choices = []
    for _ in range(2 * EPOCHS_TRIED + 3):
        choices.append(spread.choose(chunks, most))
        spread.note(seconds[choices[-1]])
    return choices


@pytest.mark.parametrize(("seconds", "faster"), [({1: 1.0, 4: 2.0}, 1), ({1: 2.0, 4: 1.0}, 4)])
def test_one_thread_and_all_are_tried_and_then_the_faster_is_taken(seconds, faster):
    choices = chosen(Spread(), 1, 4, seconds)
    assert sorted(choices[: 2 * EPOCHS_TRIED]) == [1] * EPOCHS_TRIED + [4] * EPOCHS_TRIED
    assert set(choices[2 * EPOCHS_TRIED :]) == {faster}


def test_where_every_core_has_a_chunk_there_is_nothing_to_try():
    assert set(chosen(Spread(), 4, 1, {1: 1.0})) == {1}
    assert set(chosen(Spread(), 8, 0, {1: 1.0})) == {1}


def test_other_numbers_of_chunks_are_tried_for_themselves():
    spread = Spread()
    chosen(spread, 1, 4, {1: 1.0, 4: 2.0})
    assert 2 in chosen(spread, 2, 2, {1: 1.0, 2: 2.0})


def test_when_forgotten_all_are_tried_again():
    spread = Spread()
    assert chosen(spread, 1, 4, {1: 1.0, 4: 2.0})[-1] == 1
    spread.forget()
    assert chosen(spread, 1, 4, {1: 2.0, 4: 1.0})[-1] == 4


def test_when_it_is_too_late_to_try_it_is_one_thread_until_more_were_faster():
    seconds = {1: 2.0, 4: 1.0}
    late, known = Spread(), Spread()
    assert {late.choose(1, 4, trying=False) for _ in range(5)} == {1}
    chosen(known, 1, 4, seconds)
    assert known.choose(1, 4, trying=False) == 4


@pytest.mark.parametrize(("lanes", "rarer"), [(8, {1, 2, 3}), (4, {1}), (2, set()), (1, set())])
def test_the_sizes_that_come_up_when_lanes_get_fewer(lanes, rarer):
    assert Cores(2, torch.device("cpu"), 4).rarer_sizes(lanes) == rarer
    assert Cores(2, torch.device("cuda"), 4).rarer_sizes(lanes) == set()


def test_where_each_number_of_lanes_is_a_program_few_numbers_are_computed():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    sizes = [trials_computed(left, cuda) for left in range(65)]
    assert sorted({*sizes}) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(left <= size < max(2, 1.5 * left) for left, size in enumerate(sizes) if left)
    assert [trials_computed(left, cpu) for left in range(65)] == [*range(65)]


@pytest.mark.parametrize(
    ("lanes", "threads", "sizes"),
    [
        (1, 2, [1]),
        (2, 2, [1, 1]),
        (3, 2, [2, 1]),
        (4, 2, [2, 2]),
        (5, 2, [3, 2]),
        (6, 2, [3, 3]),
        (7, 2, [4, 3]),
        (8, 2, [4, 4]),
        (18, 2, [4, 4, 4, 4, 2]),
        (3, 1, [3]),
        (16, 16, [1] * 16),
    ],
)
def test_lanes_are_cut_into_chunks_of_few_sizes(lanes, threads, sizes):
    assert chunk_sizes(lanes, threads, 4) == sizes


class Large:
    """Stands for the tensors that were in use when memory ran out."""


def test_what_has_raised_keeps_nothing_of_what_it_held():
    """Not even until somebody collects garbage: the memory is wanted for fewer lanes."""
    cores = Cores(2, torch.device("cpu"), 4)
    held: list[weakref.ref[Large]] = []

    def work(chunk: Chunk) -> torch.Tensor:
        large = Large()
        held.append(weakref.ref(large))
        raise MemoryError(large)

    gc.disable()
    try:
        for _ in range(3):
            with suppress(MemoryError):
                cores.run(work, 8)
        assert [large() for large in held] == [None] * 6
    finally:
        gc.enable()
        cores.close()


@pytest.mark.parametrize(
    ("size", "weights", "chunk"),
    [
        ("1024K", 100_000, 4),  # ten would fit, but more than four are not faster
        ("1024K", 407_080, 2),
        ("2048K", 407_080, 4),
        ("1024K", 330_000, 3),
        ("1024K", 600_000, 4),  # where not even two fit, fewer gain nothing
        ("1024K", 0, 4),
        ("", 100_000, 4),  # a system that does not say
        (None, 100_000, 4),
    ],
)
def test_a_chunk_is_as_many_lanes_as_keep_their_weights_in_a_cores_cache(
    monkeypatch, tmp_path, size, weights, chunk
):
    monkeypatch.setattr(cores, "_CACHE", tmp_path / "size")
    if size is not None:
        (tmp_path / "size").write_text(f"{size}\n")
    assert chunk_for(weights) == chunk
