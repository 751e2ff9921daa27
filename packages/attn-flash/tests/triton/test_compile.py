"""The Triton kernels compiled ahead of time, with the tiles each architecture is shipped with."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from attn_core import tuning
from attn_core.testing.compilation import TARGETS, record_launches

pytest.importorskip("triton")

from attn_flash._triton import (
    backward,
    backward_bias,
    backward_dk_dv,
    backward_dq,
    configs,
    forward,
    ragged,
)
from attn_flash.options import Options

pytestmark = pytest.mark.compile

OPEN = (-1, -1)
CAUSAL = (-1, 0)
LAUNCHERS = {
    "forward": forward._launch,
    "dq": backward_dq._launch,
    "dk_dv": backward_dk_dv._launch,
    "bias": backward_bias._launch,
    "rest": ragged._launch,
}
CAPPED = {
    "forward": forward._launch_capped,
    "dq": backward_dq._launch_capped,
    "dk_dv": backward_dk_dv._launch_capped,
}
PLAIN = ("forward", "dq", "dk_dv")
TABLES = {
    "forward": configs.FORWARD,
    "forward_terms": configs.FORWARD_TERMS,
    "dq": configs.BACKWARD_DQ,
    "dq_window": configs.BACKWARD_DQ_WINDOW,
    "dk_dv": configs.BACKWARD_DK_DV,
    "dk_dv_terms": configs.BACKWARD_DK_DV_TERMS,
    "dk_dv_bias": configs.BACKWARD_DK_DV_BIAS,
    "bias": configs.BACKWARD_BIAS,
}
# Bytes that 16-bit kernels of sm_90 may spill, by BLOCK_D: mostly dk_dv, and padded heads.
MAX_SPILLS = {64: 64, 128: 256, 256: 1024}
MAX_CAPPED_SPILLS = 96  # of kernels with capped registers, before and after their loops


class Case(NamedTuple):
    dtype: torch.dtype
    D: int
    window: tuple[int, int] = CAUSAL
    S: int = 2048
    group: int = 1
    tf32: bool = False
    dlse: bool = False
    term: str = ""

    @property
    def features(self):
        """Options that ask for `term`."""
        if self.term in ("varlen", "pages"):
            starts = torch.empty(3, dtype=torch.int32, device="meta")
            ragged = {
                "cu_seqlens_q": starts, "cu_seqlens_k": starts,
                "max_seqlen_q": self.S, "max_seqlen_k": self.S,
            }  # fmt: skip
            table = torch.empty(2, self.S, dtype=torch.int32, device="meta")
            return ragged if self.term == "varlen" else {**ragged, "block_table": table}
        return {
            "": {},
            "softcap": {"softcap": 30.0},
            "alibi": {"alibi_slopes": torch.empty(4, device="meta")},
            "key_mask": {"key_mask": torch.empty(2, self.S, dtype=torch.bool, device="meta")},
            "bias": {"attn_bias": torch.empty(1, 4, self.S, self.S, device="meta").to(self.dtype)},
            "float64-bias": {
                "attn_bias": torch.empty(1, 4, self.S, self.S, device="meta").double()
            },
            "bool-bias": {"attn_bias": torch.empty(1, 1, self.S, self.S, device="meta").bool()},
            "bias-of-queries": {
                "attn_bias": torch.empty(1, 4, self.S, 1, device="meta").to(self.dtype)
            },
            "dropout": {
                "dropout_p": 0.1,
                "rng_state": torch.empty(2, dtype=torch.int64, device="meta"),
            },
        }[self.term]

    def __str__(self):
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        window = {OPEN: "full", CAUSAL: "causal"}.get(self.window, "window")
        words = [f"kv{4 // self.group}-s{self.S}-d{self.D}", dtype, window]
        return "-".join([*words, *["dlse"] * self.dlse, *filter(None, [self.term])])


PORTABLE = [
    Case(torch.bfloat16, 64),
    Case(torch.bfloat16, 128),
    Case(torch.bfloat16, 256),
    Case(torch.float32, 64, OPEN),
    Case(torch.float32, 128, OPEN),
    # With ieee products these take a minute; their tiles and their memory are the same.
    Case(torch.float32, 256, OPEN, tf32=True),
]
HOPPER = [
    Case(torch.bfloat16, 16),
    Case(torch.bfloat16, 32),
    Case(torch.bfloat16, 64, OPEN, S=197),
    Case(torch.bfloat16, 64, OPEN),
    Case(torch.bfloat16, 128, OPEN, S=197),
    Case(torch.bfloat16, 128, OPEN),
    Case(torch.float16, 64, (128, 64), group=4, dlse=True),
    Case(torch.float16, 111),
    Case(torch.bfloat16, 128, (256, 0)),
]
# The kernel for the gradient of a bias, with the tiles of every head dimension.
BIAS = [
    *(Case(torch.bfloat16, D, S=1024, term="bias-of-queries") for D in (16, 32, 64, 128, 256)),
    *(Case(torch.float32, D, OPEN, term="bias-of-queries", tf32=True) for D in (64, 128, 256)),
]
VARLEN = Case(torch.bfloat16, 128, term="varlen")
TERMS = [
    VARLEN,
    *(Case(torch.bfloat16, 128, term=term) for term in ("softcap", "alibi", "key_mask", "dropout")),
    *(
        Case(torch.bfloat16, D, OPEN, term=term)
        for D in (64, 128)
        for term in ("bias", "bool-bias")
    ),
    *(
        Case(torch.bfloat16, 64, OPEN, term=term)
        for term in ("softcap", "alibi", "key_mask", "dropout")
    ),
    Case(torch.bfloat16, 64, OPEN, S=1024, term="bias"),
    Case(torch.bfloat16, 128, OPEN, term="float64-bias"),
]
CASES = {target: [*PORTABLE, *(HOPPER if target == "sm_90" else ())] for target in TARGETS}


def launches(case, monkeypatch, needs_dbias=True, takes_ptx=True):
    """What each launcher would start for a case."""
    monkeypatch.setattr(
        forward.problem, "_softcap_mode", lambda q, options: 2 * (options.softcap > 0)
    )
    monkeypatch.setattr(forward.problem, "_takes_ptx", lambda q: takes_ptx)
    if case.tf32:
        monkeypatch.setattr(forward.tiling, "dot_precision", lambda tensor: "tf32")
    recorders = {name: record_launches(LAUNCHERS[name], monkeypatch) for name in LAUNCHERS}
    for name, launchers in CAPPED.items():
        for launcher in launchers.values():
            monkeypatch.setattr(launcher, "_kernel", recorders[name])
    batch = () if case.term in ("varlen", "pages") else (2,)
    pages = (case.S // 16, 16) if case.term == "pages" else (*batch, case.S)
    q = torch.empty(*batch, case.S, 4, case.D, dtype=case.dtype, device="meta")
    k = torch.empty(*pages, 4 // case.group, case.D, dtype=case.dtype, device="meta")
    options = Options(
        scale=0.1, window_left=case.window[0], window_right=case.window[1], **case.features
    )
    out, lse = forward.attention(q, k, k, options)
    if case.term == "pages":  # their backward pass gathers the keys first
        return recorders
    dlse = lse if case.dlse else None
    needs_dbias &= options.attn_bias is not None
    backward.attention_backward(out, dlse, q, k, k, out, lse, needs_dbias, options)
    return recorders


RUNS = [
    pytest.param(target, case, name, id=f"{target}-{case}-{name}")
    for target in TARGETS
    for case in CASES[target]
    for name in PLAIN
]
RUNS += [
    pytest.param("sm_90", case, name, id=f"sm_90-{case}-{name}") for case in TERMS for name in PLAIN
]
RUNS += [
    pytest.param(target, case, "bias", id=f"{target}-{case}-bias")
    for target in TARGETS
    for case in (BIAS if target in ("sm_90", "gfx942") else BIAS[2:4])
]
RUNS += [
    pytest.param("sm_90", case, "forward", id=f"sm_90-{case}-forward")
    for case in (Case(torch.bfloat16, 64, window, term="pages") for window in (OPEN, (128, 64)))
]
RUNS += [pytest.param(target, VARLEN, "rest", id=f"{target}-{VARLEN}-rest") for target in TARGETS]


@pytest.mark.parametrize("target, case, name", RUNS)
def test_shipped_tiles_compile_and_fit(target, case, name, use_target, monkeypatch):
    use_target(target, modules=(configs,))
    launch = launches(case, monkeypatch)[name]
    compiled = launch.compile(target)
    assert compiled.fits, f"{compiled.shared} bytes of shared memory"
    if target == "sm_90" and case.dtype != torch.float32:
        most = MAX_SPILLS.get(launch.constexprs.get("BLOCK_D"), 0)
        assert compiled.spills <= (MAX_CAPPED_SPILLS if "maxnreg" in launch.options else most)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_warp_waits_for_another_to_hand_it_a_bias(head_dim, use_target, monkeypatch):
    use_target("sm_90", modules=(configs,))
    barriers = {}
    for term in ("", "bias"):
        with monkeypatch.context() as patched:
            launch = launches(Case(torch.bfloat16, head_dim, OPEN, term=term), patched)["dk_dv"]
            barriers[term] = launch.compile("sm_90").asm["ptx"].count("bar.sync")
    assert barriers["bias"] == barriers[""]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("target", TARGETS)
def test_no_shipped_row_is_left_out(target, name, use_target):
    use_target(target, modules=(configs,))
    table = TABLES[name]

    def tiles(block_d, size, shape):
        return block_d, size, tuning.pick(table, torch.device("cpu"), (block_d, size, shape))

    scopes = (target, target.rstrip("0123456789_"), "*")
    shipped = {tiles(*key) for scope, *key in table.rows if scope in scopes}
    assert shipped <= {tiles(*key_of(case)) for case in CASES[target]}


def key_of(case):
    """How the tables spell a case."""
    shape = "full" if case.window == OPEN else "causal"
    size = torch.finfo(case.dtype).bits // 8
    return configs.padded_head_dim(case.D), size, "short" if case.S <= configs.SHORT else shape


@pytest.mark.parametrize("window", [OPEN, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize(
    "term, name, cap",
    [
        ("bias", "forward", 128),
        ("dropout", "forward", 128),
        ("alibi", "forward", 128),
        ("key_mask", "forward", 168),
        ("alibi", "dq", 168),
        ("key_mask", "dq", 168),
        ("softcap", "dq", 168),
        ("dropout", "dq", 168),
        ("bias", "dk_dv", 168),
        ("bias", "dq", 255),  # it writes the gradient of the bias
    ],
)
def test_registers_are_capped_where_that_pays(term, name, cap, window, use_target, monkeypatch):
    use_target("sm_90", modules=(configs,))
    launch = launches(Case(torch.bfloat16, 64, window, term=term), monkeypatch)[name]
    assert launch.options.get("maxnreg", 255) == cap
    compiled = launch.compile("sm_90")
    assert compiled.registers <= cap
    assert compiled.spills <= MAX_CAPPED_SPILLS


def test_registers_are_capped_on_hopper_alone(use_target, monkeypatch):
    use_target("sm_100", modules=(configs,))
    recorders = launches(Case(torch.bfloat16, 64, OPEN, term="alibi"), monkeypatch)
    assert "maxnreg" not in recorders["forward"].options
    assert "maxnreg" not in recorders["dq"].options


def test_registers_are_capped_where_a_bias_gets_no_gradient(use_target, monkeypatch):
    use_target("sm_90", modules=(configs,))
    dq = launches(Case(torch.bfloat16, 64, OPEN, term="bias"), monkeypatch, needs_dbias=False)["dq"]
    assert dq.options["maxnreg"] == 168
    compiled = dq.compile("sm_90")
    assert compiled.registers <= 168
    assert compiled.spills <= MAX_SPILLS[64]
