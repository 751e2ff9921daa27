"""PagedKVCache: the tokens of each sequence stay where its table says, whatever happens."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from attn_paged import OutOfBlocksError, PagedKVCache, paged_attention
from attn_paged.reference import dense_attention


def make_cache(**options):
    return PagedKVCache(
        **{"num_blocks": 12, "block_size": 4, "heads_kv": 2, "head_dim": 8, **options}
    )


def fill(cache, sequences, limit=None):
    """Write random keys and values of every layer for the tokens that wait; return them."""
    batch = cache.batch(sequences, limit)
    tokens = len(batch.slot_mapping)
    k, v = torch.randn(2, tokens, 2, 8).unbind(0)
    for layer in range(cache.num_layers):
        cache.write(layer, k + layer, v - layer, batch)
    return k, v


def read(cache, sequence, layer=0):
    """Keys and values of a sequence, as its table says."""
    blocks = torch.tensor(cache.block_table(sequence), dtype=torch.int64)
    length = cache.length(sequence)
    return [part[blocks].flatten(0, 1)[:length] for part in cache.layer(layer)]


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_decoding_token_by_token_is_full_attention(block_size):
    lens = (9, 17, 4)
    cache = PagedKVCache(30, block_size, 2, 8, 6, num_layers=2, reuse_prefixes=False)
    q = [torch.randn(2, n, 4, 8) for n in lens]
    k, v = [[torch.randn(2, n, 2, d) for n in lens] for d in (8, 6)]
    sequences = [cache.allocate() for _ in lens]
    outs = [[[] for _ in lens] for _ in range(2)]
    for step in range(max(lens)):
        rows = [i for i, n in enumerate(lens) if step < n]
        for i in rows:
            cache.append(sequences[i], 1)
        batch = cache.batch([sequences[i] for i in rows])
        for layer in range(2):
            new = [torch.stack([x[i][layer, step] for i in rows]) for x in (q, k, v)]
            cache.write(layer, *new[1:], batch)
            for i, out in zip(rows, cache.attend(layer, new[0], batch), strict=True):
                outs[layer][i].append(out)
    for layer in range(2):
        for i in range(len(lens)):
            expected, _ = dense_attention(
                q[i][layer], k[i][layer], v[i][layer], None, None, 8**-0.5, (-1, 0), 0.0
            )
            torch.testing.assert_close(torch.stack(outs[layer][i]), expected)


def test_prefill_in_chunks_and_decode_in_one_batch():
    cache = make_cache()
    long, short = cache.allocate(13), cache.allocate(3)
    q = torch.randn(18, 4, 8)
    fill(cache, [short])
    cache.append(short, 2)
    first = cache.batch([long, short], limit=6)
    assert first.context_lens.tolist() == [6, 5]
    assert first.cu_seqlens_q.tolist() == [0, 6, 8]
    assert first.positions.tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    fill(cache, [long, short], limit=6)
    assert (cache.written(long), cache.written(short)) == (6, 5)
    fill(cache, [long])
    k, v = read(cache, long)
    expected, _ = dense_attention(q[:6], k[:6], v[:6], None, None, 8**-0.5, (-1, 0), 0.0)
    torch.testing.assert_close(cache.attend(0, q[:8], first)[:6], expected)


def test_attend_passes_options_on():
    cache = make_cache()
    sequence = cache.allocate(5)
    batch = cache.batch([sequence])
    fill(cache, [sequence])
    q = torch.randn(5, 4, 8)
    out, lse = cache.attend(0, q, batch, window_size=(1, 0), return_lse=True)
    k, v = read(cache, sequence)
    expected = dense_attention(q, k, v, None, None, 8**-0.5, (1, 0), 0.0)
    torch.testing.assert_close((out, lse), expected)


def test_tokens_count_as_written_after_the_last_layer():
    cache = make_cache(num_layers=2)
    sequence = cache.allocate([1, 2, 3, 4, 5])
    batch = cache.batch([sequence])
    k = torch.randn(5, 2, 8)
    cache.write(1, k, k, batch)
    assert cache.written(sequence) == 0
    cache.write(0, k, k, batch)
    assert cache.written(sequence) == 5
    assert cache.written(cache.allocate([1, 2, 3, 4, 5])) == 4


def test_a_reused_prefix_is_not_computed_again():
    cache = make_cache()
    first = cache.allocate([1, 2, 3, 4, 5, 6])
    fill(cache, [first])
    second = cache.allocate([1, 2, 3, 4, 7])
    batch = cache.batch([second])
    assert batch.positions.tolist() == [4]
    torch.testing.assert_close(read(cache, second)[0][:4], read(cache, first)[0][:4])


def test_forks_do_not_disturb_each_other():
    cache = make_cache(num_layers=2)
    parent = cache.allocate(6)
    k, _ = fill(cache, [parent])
    child = cache.fork(parent)
    cache.append(child, 1)
    cache.append(parent, 1)
    new, _ = fill(cache, [child, parent])
    for layer in range(2):
        torch.testing.assert_close(read(cache, child, layer)[0], torch.cat([k, new[:1]]) + layer)
        torch.testing.assert_close(read(cache, parent, layer)[0], torch.cat([k, new[1:]]) + layer)


def test_swap_brings_everything_back():
    cache = make_cache(num_host_blocks=4, num_layers=2)
    sequence, other = cache.allocate(7), cache.allocate(4)
    k, v = fill(cache, [sequence])
    cache.swap_out(sequence)
    assert cache.is_swapped(sequence)
    fill(cache, [other, cache.allocate(40)])
    with pytest.raises(OutOfBlocksError, match="2 cache blocks are needed and 1 are free"):
        cache.swap_in(sequence)
    cache.free(max(cache.sequences))
    cache.swap_in(sequence)
    for layer in range(2):
        torch.testing.assert_close(read(cache, sequence, layer), [k + layer, v - layer])


def test_defragment_keeps_what_tables_point_at():
    cache = make_cache(reuse_prefixes=False)
    sequences = [cache.allocate(6) for _ in range(4)]
    k, _ = fill(cache, sequences)
    for sequence in sequences[:2]:
        cache.free(sequence)
    assert cache.defragment() == 4
    assert set(cache.block_table(sequences[2]) + cache.block_table(sequences[3])) == set(range(4))
    torch.testing.assert_close(read(cache, sequences[2])[0], k[12:18])
    torch.testing.assert_close(read(cache, sequences[3])[0], k[18:])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantised_blocks_take_their_scales_along(dtype):
    cache = make_cache(dtype=dtype, num_layers=2, num_host_blocks=4)
    first, sequence = cache.allocate(4), cache.allocate(7)
    fill(cache, [first])
    batch, q = cache.batch([sequence]), torch.randn(7, 4, 8)
    k, v = fill(cache, [sequence])
    expected = [cache.attend(layer, q, batch) for layer in range(2)]
    for layer, out in enumerate(expected):
        exact, _ = dense_attention(q, k + layer, v - layer, None, None, 8**-0.5, (-1, 0), 0.0)
        torch.testing.assert_close(out, exact, atol=0.2, rtol=0.1)
    cache.swap_out(sequence)
    fill(cache, [cache.allocate(8)])
    cache.swap_in(sequence)
    cache.free(first)
    cache.defragment()
    child = cache.fork(sequence)
    cache.append(sequence, 1)
    fill(cache, [sequence])
    moved = cache.block_table(child)
    for layer, out in enumerate(expected):
        k_scale, v_scale = cache.scales(layer)
        again = paged_attention(
            q,
            *cache.layer(layer),
            torch.tensor([moved], dtype=torch.int32),
            torch.tensor([7], dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, 7], dtype=torch.int32),
            k_scale=k_scale,
            v_scale=v_scale,
        )
        assert torch.equal(again, out)
        k_cache, _ = cache.layer(layer)
        own, shared = cache.block_table(sequence)[-1], moved[-1]
        assert own != shared
        assert torch.equal(k_cache[own, :3].float(), k_cache[shared, :3].float())
        assert torch.equal(k_scale[own, :3], k_scale[shared, :3])


def test_a_cache_that_is_not_quantised_has_no_scales():
    assert make_cache().scales(0) == (None, None)


@pytest.mark.parametrize("change", ["swap", "defragment", "copy"])
def test_a_batch_of_replaced_blocks_is_refused(change):
    cache = make_cache(num_host_blocks=4)
    first, sequence = cache.allocate(4), cache.allocate(3)
    fill(cache, [first, sequence])
    batch = cache.batch([sequence])
    if change == "swap":
        cache.swap_out(sequence)
        cache.swap_in(sequence)
    elif change == "defragment":
        cache.free(first)
        cache.defragment()
    else:
        cache.fork(sequence)
        cache.append(sequence, 1)
    with pytest.raises(ValueError, match=f"blocks of its sequence {sequence} have been"):
        cache.attend(0, torch.randn(0, 4, 8), batch)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["copy", "pickle"],
)
def test_a_copy_goes_its_own_way(duplicate):
    cache = make_cache(num_layers=2)
    sequence = cache.allocate([1, 2, 3, 4, 5])
    k, _ = fill(cache, [sequence])
    other = duplicate(cache)
    other.append(sequence, [6])
    new_k, _ = fill(other, [sequence])
    assert torch.equal(read(other, sequence)[0], torch.cat((k, new_k)))
    other.free(other.allocate([1, 2, 3, 4, 9]))
    assert (cache.length(sequence), other.length(sequence)) == (5, 6)
    assert torch.equal(read(cache, sequence)[0], k)
    for each in (cache, other):
        each.check_invariants()


def test_a_batch_of_a_freed_sequence_is_refused():
    cache = make_cache()
    sequence = cache.allocate(3)
    batch = cache.batch([sequence])
    cache.free(sequence)
    k = torch.randn(3, 2, 8)
    with pytest.raises(ValueError, match="sequence must be one that is allocated"):
        cache.write(0, k, k, batch)


def test_an_empty_batch_does_nothing():
    cache = make_cache()
    batch = cache.batch([])
    cache.write(0, torch.randn(0, 2, 8), torch.randn(0, 2, 8), batch)
    assert cache.attend(0, torch.randn(0, 4, 8), batch).shape == (0, 4, 8)


def test_torchs_default_device_changes_nothing():
    with torch.device("meta"):
        cache = make_cache(num_host_blocks=4)
        first = cache.allocate(7)
        batch = cache.batch([first])
    k = torch.randn(7, 2, 8)
    with torch.device("meta"):
        cache.write(0, k, k, batch)
        cache.swap_out(first)
        cache.swap_in(first)
    torch.testing.assert_close(read(cache, first)[0], k)


def test_bad_numbers_are_named():
    cache = make_cache()
    with pytest.raises(ValueError, match="layer must be between 0 and 0, got 1"):
        cache.layer(1)
    with pytest.raises(ValueError, match="layer must be between 0 and 0, got 'first'"):
        cache.scales("first")
    with pytest.raises(ValueError, match="limit must be a positive integer, got 0"):
        cache.batch([], limit=0)
    with pytest.raises(ValueError, match="sequences must be a list of names, got 1"):
        cache.batch(1)
    with pytest.raises(ValueError, match="batch must be a PagedBatch, got list"):
        cache.attend(0, torch.randn(0, 4, 8), [1])


@pytest.mark.parametrize("name", ["heads_kv", "head_dim", "head_dim_v", "num_layers"])
@pytest.mark.parametrize("size", [0, -1, 1.5, "8", True])
def test_a_size_is_a_positive_integer(name, size):
    sizes = {"num_blocks": 8, "block_size": 4, "heads_kv": 2, "head_dim": 16}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {size!r}"):
        PagedKVCache(**sizes | {name: size})


@pytest.mark.parametrize("dtype", ["float16", torch.int32, torch.complex64])
def test_a_dtype_that_no_cache_has_is_named(dtype):
    with pytest.raises(ValueError, match=f"dtype must be one of .* or None, got {dtype!r}"):
        PagedKVCache(8, 4, 2, 16, dtype=dtype)


@pytest.mark.gpu
def test_host_memory_of_a_gpu_cache_is_page_locked(device):
    cache = make_cache(num_host_blocks=4, device=device)
    assert all(part.is_pinned() for part in cache._host_storage)
    sequence = cache.allocate(7)
    batch = cache.batch([sequence])
    k = torch.randn(7, 2, 8, device=device)
    cache.write(0, k, k, batch)
    cache.swap_out(sequence)
    fill_other = cache.batch([cache.allocate(48)])
    cache.write(0, *torch.zeros(2, 48, 2, 8, device=device), fill_other)
    cache.free(max(cache.sequences))
    cache.swap_in(sequence)
    torch.testing.assert_close(read(cache, sequence)[0], k)


def content(tokens):
    """A number that stands for a token and all before it, as its key does in a model."""
    values, value = [], 1
    for token in tokens:
        value = (31 * value + token + 1) % 65521
        values.append(float(value))
    return values


def require_justified(error):
    assert error.needed > error.free


class CacheMachine(RuleBasedStateMachine):
    """A tiny cache beside a list of tokens for each sequence.

    A token's key follows from all tokens up to it, so a block shared, copied, moved or reused by
    mistake shows as a wrong number.
    """

    sequences = Bundle("sequences")
    tokens = st.lists(st.integers(0, 1), max_size=7)

    def __init__(self):
        super().__init__()
        self.cache = PagedKVCache(9, 2, 1, 1, num_host_blocks=5, num_layers=2)
        self.model = {}

    @rule(target=sequences, tokens=tokens, is_written=st.booleans())
    def allocate(self, tokens, is_written):
        try:
            sequence = self.cache.allocate(tokens)
        except OutOfBlocksError as error:
            require_justified(error)
            return multiple()
        self.model[sequence] = list(tokens)
        if is_written:
            self.write(sequence, None)
        return sequence

    @rule(sequence=sequences, tokens=tokens, is_written=st.booleans())
    def append(self, sequence, tokens, is_written):
        if self.cache.is_swapped(sequence):
            return
        try:
            self.cache.append(sequence, tokens)
        except OutOfBlocksError as error:
            require_justified(error)
            return
        self.model[sequence] += tokens
        if is_written:
            self.write(sequence, None)

    @rule(sequence=sequences, limit=st.sampled_from([1, 3]))
    def write_some(self, sequence, limit):
        if not self.cache.is_swapped(sequence):
            self.write(sequence, limit)

    def write(self, sequence, limit):
        batch = self.cache.batch([sequence], limit)
        start, stop = self.cache.written(sequence), int(batch.context_lens)
        keys = torch.tensor(content(self.model[sequence])[start:stop]).view(-1, 1, 1)
        for layer in range(2):
            self.cache.write(layer, keys + layer, -keys, batch)
        assert self.cache.written(sequence) == stop

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        is_open = self.cache.written(sequence) < self.cache.length(sequence)
        if is_open or self.cache.is_swapped(sequence):
            with pytest.raises(ValueError, match=r"must be written|swapped out"):
                self.cache.fork(sequence)
            return multiple()
        child = self.cache.fork(sequence)
        self.model[child] = list(self.model[sequence])
        return child

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.cache.free(sequence)
        del self.model[sequence]
        with pytest.raises(ValueError, match="must be one that is allocated"):
            self.cache.free(sequence)

    @rule(sequence=sequences)
    def swap(self, sequence):
        move = self.cache.swap_in if self.cache.is_swapped(sequence) else self.cache.swap_out
        try:
            move(sequence)
        except OutOfBlocksError as error:
            require_justified(error)

    @rule()
    def defragment(self):
        self.cache.defragment()
        used = {
            block
            for name in self.model
            if not self.cache.is_swapped(name)
            for block in self.cache.block_table(name)
        }
        assert used == set(range(len(used)))

    @invariant()
    def nothing_is_lost(self):
        self.cache.check_invariants()
        assert set(self.cache.sequences) == set(self.model)

    @invariant()
    def written_tokens_are_where_the_tables_say(self):
        for sequence, tokens in self.model.items():
            assert self.cache.length(sequence) == len(tokens)
            if self.cache.is_swapped(sequence):
                continue
            written = self.cache.written(sequence)
            expected = torch.tensor(content(tokens)[:written])
            for layer in range(2):
                k, v = read(self.cache, sequence, layer)
                assert torch.equal(k.flatten()[:written], expected + layer)
                assert torch.equal(v.flatten()[:written], -expected)


def test_more_than_a_thousand_steps_lose_nothing():
    num_steps = 0

    class CountingMachine(CacheMachine):
        @invariant()
        def count(self):
            nonlocal num_steps
            num_steps += 1

    options = settings(max_examples=60, stateful_step_count=50, deadline=None)
    run_state_machine_as_test(CountingMachine, settings=options)
    assert num_steps > 1000
