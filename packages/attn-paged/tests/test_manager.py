"""BlockManager: what it hands out, shares, refuses and notices."""

from __future__ import annotations

import contextlib
import copy
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from attn_paged import BlockManager, OutOfBlocksError


def written(manager, tokens):
    """A sequence all of whose tokens are written."""
    sequence = manager.allocate(tokens)
    manager.commit(sequence, manager.length(sequence))
    return sequence


def test_blocks_follow_from_the_number_of_tokens():
    manager = BlockManager(8, 4)
    for count, blocks in ((0, 0), (1, 1), (4, 1), (5, 2)):
        sequence = manager.allocate(count)
        assert len(manager.block_table(sequence)) == blocks
        assert manager.slots(sequence, 0, count)[:1] == [
            4 * block for block in manager.block_table(sequence)[:1]
        ]
    assert manager.num_free_blocks == 4


def test_append_fills_the_last_block_first():
    manager = BlockManager(4, 4)
    sequence = manager.allocate(3)
    assert manager.append(sequence, 1) == []
    assert manager.block_table(sequence) == (0,)
    assert manager.append(sequence, 5) == []
    assert manager.block_table(sequence) == (0, 1, 2)
    assert manager.slots(sequence, 2, 6) == [2, 3, 4, 5]


def test_names_are_never_used_again():
    manager = BlockManager(4, 4)
    first = manager.allocate(1)
    manager.free(first)
    assert manager.allocate(1) != first
    with pytest.raises(ValueError, match=f"sequence must be one that is allocated, got {first}"):
        manager.free(first)


def test_fork_copies_a_partial_block_on_the_first_append():
    manager = BlockManager(8, 4)
    parent = written(manager, [1, 2, 3, 4, 5])
    child = manager.fork(parent)
    assert manager.block_table(child) == manager.block_table(parent) == (0, 1)
    assert manager.append(child, [6]) == [(1, 2)]
    assert manager.append(parent, [7]) == []
    assert (manager.block_table(parent), manager.block_table(child)) == ((0, 1), (0, 2))
    manager.check_invariants()


def test_fork_at_the_end_of_a_block_copies_nothing():
    manager = BlockManager(8, 4)
    parent = written(manager, 8)
    child = manager.fork(parent)
    assert manager.append(child, 1) == []
    assert manager.block_table(child) == (0, 1, 2)


def test_fork_waits_until_the_parent_is_written():
    manager = BlockManager(8, 4)
    parent = manager.allocate(5)
    with pytest.raises(ValueError, match="must be written before it is forked, 5 of its tokens"):
        manager.fork(parent)


def test_only_written_blocks_are_reused():
    manager = BlockManager(8, 2)
    first = manager.allocate([1, 2, 3, 4, 5])
    assert manager.written(manager.allocate([1, 2, 3, 4, 5])) == 0
    manager.commit(first, 3)
    second = manager.allocate([1, 2, 3, 4, 5])
    assert manager.written(second) == 2
    assert manager.block_table(second)[0] == manager.block_table(first)[0]


def test_the_last_token_is_left_to_compute():
    manager = BlockManager(8, 2)
    written(manager, [1, 2, 3, 4])
    assert manager.written(manager.allocate([1, 2, 3, 4])) == 2
    assert manager.written(manager.allocate([1, 2, 3, 4, 5])) == 4


def test_a_block_is_reused_only_after_the_same_prefix():
    manager = BlockManager(8, 2)
    written(manager, [1, 2, 3, 4])
    assert manager.written(manager.allocate([9, 9, 3, 4, 5])) == 0


def test_a_freed_prefix_is_found_until_it_is_overwritten():
    manager = BlockManager(3, 2)
    manager.free(written(manager, [1, 2, 3, 4]))
    again = manager.allocate([1, 2, 3, 4, 5])
    assert (manager.written(again), manager.block_table(again)) == (4, (0, 1, 2))
    manager.free(again)
    manager.free(manager.allocate(6))
    assert manager.written(manager.allocate([1, 2, 3, 4, 5])) == 0


def test_blocks_without_a_prefix_are_taken_first():
    manager = BlockManager(4, 2)
    manager.free(written(manager, [1, 2, 3, 4]))
    for _ in range(2):
        manager.free(manager.allocate(4))
    assert manager.written(manager.allocate([1, 2, 3, 4, 5])) == 4


def test_the_end_of_a_freed_prefix_is_overwritten_before_its_start():
    manager = BlockManager(3, 2)
    manager.free(written(manager, [1, 2, 3, 4]))
    manager.free(manager.allocate(4))
    assert manager.written(manager.allocate([1, 2, 3, 4, 5])) == 2


@pytest.mark.parametrize("tokens", [3, [1, 2, 3]], ids=["unknown", "off"])
def test_nothing_is_reused_where_tokens_are_unknown_or_reuse_is_off(tokens):
    manager = BlockManager(8, 2, reuse_prefixes=tokens == 3)
    written(manager, tokens)
    assert manager.written(manager.allocate([1, 2, 3])) == 0


def test_tokens_after_unknown_ones_are_not_reused():
    manager = BlockManager(8, 2)
    sequence = written(manager, [1, 2])
    manager.append(sequence, 1)
    manager.append(sequence, [4, 5, 6])
    manager.commit(sequence, 6)
    assert manager.written(manager.allocate([1, 2, 3, 4, 5, 6, 7])) == 2


def cannot_allocate(manager, sequence):
    return lambda: manager.allocate(5)


def cannot_append(manager, sequence):
    return lambda: manager.append(sequence, 6)


def cannot_copy(manager, sequence):
    manager.fork(sequence)
    manager.allocate(4)
    return lambda: manager.append(sequence, 1)


def cannot_swap_out(manager, sequence):
    manager.append(sequence, 2)
    return lambda: manager.swap_out(sequence)


def cannot_swap_in(manager, sequence):
    manager.swap_out(sequence)
    manager.allocate(6)
    return lambda: manager.swap_in(sequence)


def cannot_reuse(manager, sequence):
    manager.free(sequence)
    manager.allocate(5)
    return lambda: manager.allocate([1, 2, 3])


@pytest.mark.parametrize(
    "prepare",
    [
        cannot_allocate,
        cannot_append,
        cannot_copy,
        cannot_swap_out,
        cannot_swap_in,
        cannot_reuse,
    ],
)
def test_out_of_blocks_changes_nothing(prepare):
    manager = BlockManager(4, 2, num_host_blocks=2)
    call = prepare(manager, written(manager, [1, 2, 3]))

    def snapshot():
        parts = (manager._pool, manager._host, manager._prefixes, *manager._sequences.values())
        return copy.deepcopy([vars(part) for part in parts])

    before = snapshot()
    with pytest.raises(OutOfBlocksError, match=r"\d (cache|host) blocks are needed and \d are"):
        call()
    assert snapshot() == before
    manager.check_invariants()


def test_out_of_blocks_tells_how_many():
    with pytest.raises(OutOfBlocksError, match="3 cache blocks are needed and 2 are free") as info:
        BlockManager(2, 4).allocate(9)
    assert (info.value.needed, info.value.free) == (3, 2)


def test_swap_gives_blocks_back_and_takes_new_ones():
    manager = BlockManager(4, 2, num_host_blocks=3)
    sequence = manager.allocate(3)
    assert manager.swap_out(sequence) == [(0, 0), (1, 1)]
    assert (manager.num_free_blocks, manager.num_free_host_blocks) == (4, 1)
    manager.allocate(1)
    assert [host for host, _ in manager.swap_in(sequence)] == [0, 1]
    assert (manager.num_free_blocks, manager.num_free_host_blocks) == (1, 3)


def test_a_swapped_sequence_can_only_come_back_or_go():
    manager = BlockManager(4, 2, num_host_blocks=3)
    sequence = written(manager, 3)
    manager.swap_out(sequence)
    for call in (
        lambda: manager.append(sequence, 1),
        lambda: manager.fork(sequence),
        lambda: manager.block_table(sequence),
        lambda: manager.swap_out(sequence),
    ):
        with pytest.raises(ValueError, match="must be in the cache, it is swapped out"):
            call()
    manager.free(sequence)
    assert manager.num_free_host_blocks == 3


def test_swap_in_needs_a_swapped_sequence():
    manager = BlockManager(4, 2)
    with pytest.raises(ValueError, match="sequence 1 must be swapped out, it is in the cache"):
        manager.swap_in(manager.allocate(1))


def test_defragment_moves_used_blocks_to_the_front():
    manager = BlockManager(6, 2)
    first, second = manager.allocate(4), written(manager, [1, 2, 3, 4])
    manager.free(first)
    assert manager.defragment() == [(2, 0), (3, 1)]
    assert manager.block_table(second) == (0, 1)
    shared = manager.allocate([1, 2, 3, 4, 5])
    assert manager.block_table(shared)[:2] == (0, 1)
    assert manager.defragment() == []
    manager.check_invariants()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 4), "num_blocks must be an integer of at least 1, got 0"),
        ((4.0, 4), "num_blocks must be an integer of at least 1, got 4.0"),
        ((4, 0), "block_size must be an integer of at least 1, got 0"),
        ((4, True), "block_size must be an integer of at least 1, got True"),
    ],
    ids=["num_blocks", "fraction", "block_size", "bool"],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockManager(*arguments)


def test_bad_numbers_are_named():
    manager = BlockManager(4, 2, num_host_blocks=0)
    sequence = manager.allocate(3)
    with pytest.raises(
        ValueError, match="tokens must be integer ids or a number of at least 0, got -1"
    ):
        manager.append(sequence, -1)
    with pytest.raises(ValueError, match=r"length must be at most the 3 tokens .*, got 4"):
        manager.commit(sequence, 4)
    with pytest.raises(ValueError, match=r"between 0 and the length 3 .* got 2 and 4"):
        manager.slots(sequence, 2, 4)
    with pytest.raises(ValueError, match=r"sequence must be one that is allocated, got \[1\]"):
        manager.free([sequence])
    with pytest.raises(ValueError, match="reuse_prefixes must be True or False, got 'no'"):
        BlockManager(4, 2, reuse_prefixes="no")


def corrupt_reference(manager, sequence):
    manager._pool.references[0] += 1


def corrupt_double_free(manager, sequence):
    manager._pool.free[0] = None


def corrupt_lost_block(manager, sequence):
    del manager._pool.free[5]


def corrupt_table(manager, sequence):
    manager._sequences[sequence].blocks.pop()


def corrupt_index(manager, sequence):
    manager._prefixes.keys.clear()


def corrupt_content(manager, sequence):
    manager._prefixes.add(0, (7, 7), manager.block_table(sequence)[1])


@pytest.mark.parametrize(
    "corrupt, message",
    [
        (corrupt_reference, "block 0 is used by 1 sequences and counts 2"),
        (corrupt_double_free, "block 0 counts 1 uses and is free"),
        (corrupt_lost_block, "block 5 counts 0 uses and is not free"),
        (corrupt_table, "is used by 0 sequences and counts 1"),
        (corrupt_index, "has two contents"),
        (corrupt_content, "is reused and not yet full"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_checker_notices(corrupt, message):
    manager = BlockManager(6, 2)
    sequence = written(manager, [1, 2, 3])
    manager.check_invariants()
    corrupt(manager, sequence)
    with pytest.raises(RuntimeError, match=message):
        manager.check_invariants()


def test_threads_lose_no_block():
    manager = BlockManager(24, 2, num_host_blocks=12)

    def step(choose, own):
        own.append(written(manager, choose.choices((1, 2), k=choose.randrange(9))))
        own.append(manager.fork(own[0]))
        manager.append(own[1], choose.randrange(3))
        manager.swap_out(own[0])
        manager.defragment()
        manager.swap_in(own[0])

    def work(seed):
        choose = random.Random(seed)
        for _ in range(60):
            own = []
            with contextlib.suppress(OutOfBlocksError):
                step(choose, own)
            for name in own:
                manager.free(name)
            manager.check_invariants()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert manager.sequences == ()
    assert (manager.num_free_blocks, manager.num_free_host_blocks) == (24, 12)
