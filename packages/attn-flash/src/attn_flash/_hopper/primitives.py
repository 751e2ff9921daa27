"""What the kernels need of Hopper and Gluon does not name: rows of tiles, bulk reductions."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin

from attn_core.tiles.gluon_names import reinterpret, tma_load, tma_store

RAGGED_END = gl.constexpr(1 << 30)  # the row, to a ragged descriptor, at which any sequence ends


@gluon.jit
def keep_branch():
    """Stop the compiler from turning the branch around this into selects on both sides."""
    gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_rows(desc, b, h, row, barrier, tile):
    """Start to copy rows of (B, H, S, D) to a tile; rows past the end arrive as zeros."""
    tma_load(
        desc, [b, h, row, 0], barrier, reinterpret(tile, desc.dtype, desc.block_shape, desc.layout)
    )


@gluon.jit
def store_rows(desc, b, h, row, tile):
    """Start to copy a tile to rows of (B, H, S, D); rows past the end are dropped."""
    tma_store(desc, [b, h, row, 0], reinterpret(tile, desc.dtype, desc.block_shape, desc.layout))


@gluon.jit
def _ragged(start, length, h, row):
    """Where `row` of the sequence of tokens [start, start + length) is to a ragged descriptor."""
    return [RAGGED_END, start + length, h, RAGGED_END - length + row, 0]


@gluon.jit
def load_ragged_rows(desc, start, length, h, row, barrier, tile):
    """Start to copy rows of a sequence of (T, H, D); rows past its end arrive as zeros."""
    tma_load(
        desc, _ragged(start, length, h, row), barrier,
        reinterpret(tile, desc.dtype, desc.block_shape, desc.layout),
    )  # fmt: skip


@gluon.jit
def store_ragged_rows(desc, start, length, h, row, tile):
    """Start to copy a tile to rows of a sequence of (T, H, D); rows past its end are dropped."""
    tma_store(
        desc, _ragged(start, length, h, row),
        reinterpret(tile, desc.dtype, desc.block_shape, desc.layout),
    )  # fmt: skip


@gluon.jit
def load_row(tile, LENGTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Read a tile [1, LENGTH] of float32 as a vector."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return reinterpret(tile, gl.float32, [LENGTH], FLAT).load(LAYOUT)


@gluon.jit
def columns(tile, i, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Columns [64 i, 64 i + 64) of a tile of 16-bit numbers.

    Its 128-byte swizzle stores them one after another.
    """
    if COLUMNS == 64:
        return tile
    else:  # noqa: RET505 - decided while compiling
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        return reinterpret(tile, tile.dtype, [COLUMNS // 64, ROWS, 64], LAYOUT).index(i)


@builtin
def reduce_add(desc, coord, tile, _semantic=None):
    """Start to add a tile of float32 to global memory, as a bulk copy does a store."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, tile.handle
    )


PUBLISHED = gl.constexpr(2)  # what `publish` leaves


@gluon.jit
def claim(ptr):
    """Ask, as one warp, to be the first to write what `ptr` stands for: the first one gets 0.

    The others wait until it has called `publish`, and get PUBLISHED.
    """
    # gl.atomic_cas hands its result on through shared memory, which takes registers from others.
    return gl.inline_asm_elementwise(
        """{
        .reg .pred is_asking, is_waiting;
        .reg .b32 lane;
        mov.u32 lane, %laneid;
        setp.eq.u32 is_asking, lane, 0;
        mov.b32 $0, 0;
        @is_asking atom.relaxed.gpu.global.cas.b32 $0, [$1], 0, 1;
        shfl.sync.idx.b32 $0, $0, 0, 31, -1;
    LOOK:
        setp.eq.u32 is_waiting, $0, 1;
        @is_waiting ld.volatile.global.b32 $0, [$1];
        @is_waiting bra LOOK;
        bar.warp.sync -1;
        }""",
        "=&r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def publish(ptr):
    """Let those who wait in `claim` go on: this warp's bulk writes are visible."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred is_telling;
        .reg .b32 lane;
        cp.async.bulk.wait_group 0;
        bar.warp.sync -1;
        mov.u32 lane, %laneid;
        setp.eq.u32 is_telling, lane, 0;
        @is_telling st.release.gpu.global.b32 [$1], 2;
        mov.b32 $0, 0;
        }""",
        "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_until_set(ptr):
    """Wait until the number at `ptr` is not 0."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred is_waiting;
    LOOK:
        ld.acquire.gpu.global.b32 $0, [$1];
        setp.eq.u32 is_waiting, $0, 0;
        @is_waiting bra LOOK;
        }""",
        "=&r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_for_bulk_writes():
    """Wait until this thread's bulk stores and reductions are visible, not only read."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.u32 $0, 0;",
        "=r", [], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
