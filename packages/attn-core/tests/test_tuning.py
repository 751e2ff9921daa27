"""Tile tables: which row wins, when tuning happens, and the cache on disk."""

import json
import subprocess
import sys
import time
import timeit

import pytest
import torch

from attn_core import environment, tuning
from attn_core.device import DeviceInfo
from attn_core.tuning import Table, TileConfig, pick, tune

CPU = torch.device("cpu")
EXACT, FAMILY, ANY, DEFAULT, MEASURED = (TileConfig(16 * i, 32) for i in range(1, 6))
HOPPER = DeviceInfo("cuda", "NVIDIA H200", "sm_90")
ROWS = {("sm_90", 64, True): EXACT, ("sm", 64, True): FAMILY, ("*", 64, True): ANY}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache directory and nothing picked yet."""
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ATTN_TUNE", raising=False)
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


@pytest.fixture
def on(monkeypatch):
    """Let every torch.device be the given one."""
    return lambda info: monkeypatch.setattr(tuning, "device_info", lambda device: info)


def measure(*fastest):
    """A measurement in which these configs win, in this order, and others do not run."""

    def milliseconds(config):
        if config not in fastest:
            raise RuntimeError("out of shared memory")
        measured.append(config)
        return float(fastest.index(config))

    measured = milliseconds.measured = []
    return milliseconds


def table(rows=ROWS, candidates=(EXACT, MEASURED), name="tests.table", sources=()):
    return Table(name, rows, DEFAULT, candidates, sources)


@pytest.mark.parametrize(
    "info, expected",
    [
        (HOPPER, EXACT),
        (DeviceInfo("cuda", "NVIDIA A100", "sm_80"), FAMILY),
        (DeviceInfo("hip", "AMD Instinct MI300X", "gfx942"), ANY),
        (DeviceInfo("cpu", "cpu"), ANY),
    ],
    ids=["architecture", "family", "other family", "no architecture"],
)
def test_nearest_shipped_row_wins(on, info, expected):
    on(info)
    assert pick(table(), CPU, (64, True)) == expected
    assert pick(table(), CPU, (64, False)) == DEFAULT


def test_gfx_is_a_family(on):
    on(DeviceInfo("hip", "AMD Instinct MI300X", "gfx942"))
    assert pick(table({("gfx", 64): FAMILY, ("*", 64): ANY}), CPU, (64,)) == FAMILY


def test_measured_row_wins_over_every_shipped_one(on):
    on(HOPPER)
    shipped = table()
    assert tune(shipped, CPU, (64, True), measure(MEASURED, EXACT)) == MEASURED
    assert pick(shipped, CPU, (64, True)) == MEASURED
    tuning.forget()
    assert pick(shipped, CPU, (64, True)) == MEASURED, "from disk"
    assert pick(shipped, CPU, (64, False)) == DEFAULT, "of this problem alone"


def test_tune_takes_given_candidates_and_passes_over_failures():
    def milliseconds(config):
        if config == EXACT:
            raise RuntimeError("out of shared memory")
        return {FAMILY: float("nan"), ANY: 2.0, MEASURED: 1.0}[config]

    candidates = (EXACT, FAMILY, ANY, MEASURED)
    assert tune(table(), CPU, (1,), milliseconds, candidates) == MEASURED


def test_tune_errors(cache):
    with pytest.raises(ValueError, match="candidates must not be empty: table 'tests.table'"):
        tune(table(candidates=()), CPU, (64,), measure())
    with pytest.raises(RuntimeError, match=r"none of 2 candidates of 'tests.table' runs \(64,\)"):
        tune(table(), CPU, (64,), measure())
    assert not cache.exists()


@pytest.mark.parametrize(
    "mode, key, expected",
    [
        (None, (64, True), ANY),
        ("off", (64, False), DEFAULT),
        ("on", (64, True), ANY),
        ("on", (64, False), MEASURED),
        ("force", (64, True), MEASURED),
    ],
    ids=["unset", "off", "on-with-row", "on-without-row", "force"],
)
def test_mode_decides_what_is_tuned_in_a_call(monkeypatch, mode, key, expected):
    if mode:
        monkeypatch.setenv("ATTN_TUNE", mode)
    milliseconds, tuned = measure(MEASURED, EXACT), table()
    for _ in range(2):
        assert pick(tuned, CPU, key, milliseconds) == expected
    assert len(milliseconds.measured) == (2 if expected == MEASURED else 0), "once a process"


def test_row_on_disk_is_enough_unless_forced(monkeypatch):
    tuned, milliseconds = table(), measure(EXACT)
    tune(tuned, CPU, (64, False), measure(MEASURED))
    for mode, expected in (("on", MEASURED), ("force", EXACT)):
        monkeypatch.setenv("ATTN_TUNE", mode)
        tuning.forget()
        assert pick(tuned, CPU, (64, False), milliseconds) == expected


def test_call_that_cannot_measure_leaves_it_to_a_later_one(monkeypatch):
    monkeypatch.setenv("ATTN_TUNE", "on")
    tuned = table()
    assert pick(tuned, CPU, (64, False)) == DEFAULT
    assert pick(tuned, CPU, (64, False), measure(MEASURED)) == MEASURED


def test_table_without_candidates_is_never_tuned(monkeypatch):
    monkeypatch.setenv("ATTN_TUNE", "force")
    assert pick(table(candidates=()), CPU, (64, False), measure(MEASURED)) == DEFAULT


def test_unknown_mode(monkeypatch):
    monkeypatch.setenv("ATTN_TUNE", "yes")
    with pytest.raises(ValueError, match="ATTN_TUNE must be one of off, on, force, got 'yes'"):
        pick(table(), CPU, (64, True))


def test_pick_writes_nothing(cache):
    pick(table(), CPU, (64, True))
    assert not cache.exists()


def test_second_pick_is_one_lookup(monkeypatch):
    chosen = table()
    pick(chosen, CPU, (64, True))
    monkeypatch.setattr(tuning, "_choose", None)
    best = min(timeit.repeat(lambda: pick(chosen, CPU, (64, True)), number=1000, repeat=20))
    assert best / 1000 < 2e-6, "seconds a call; 0.1 microseconds on an idle machine"


def test_file_depends_on_all_that_may_change_the_winner(on, tmp_path, monkeypatch):
    source = tmp_path / "tuned_kernel.py"
    source.write_text("BLOCK = 1")
    monkeypatch.syspath_prepend(tmp_path)

    def file(name="tests.table", version=(3, 6), device="NVIDIA H200"):
        monkeypatch.setattr(tuning, "triton_version", lambda: version)
        on(DeviceInfo("cuda", device, "sm_90"))
        return tuning.cache_file(table(name=name, sources=("tuned_kernel",)), CPU)

    first = file()
    assert first.name.startswith("tests.table-NVIDIA-H200-triton-3.6-")
    assert file() == first
    others = [file(name="tests/table"), file(version=None), file(device="NVIDIA-H200")]
    source.write_text("BLOCK = 2")
    assert len({first, *others, file()}) == 5


def test_sources_must_have_files():
    with pytest.raises(ValueError, match="sources must name modules that have a file, got 'no_"):
        pick(table(sources=("no_such_module",)), CPU, (64, True))


def test_file_is_readable_json():
    tuned = table()
    tune(tuned, CPU, (64, True, "bias"), measure(MEASURED))
    rows = json.loads(tuning.cache_file(tuned, CPU).read_text())
    expected = {"block_m": 80, "block_n": 32, "num_warps": 4, "num_stages": 2}
    assert rows == {'[64, true, "bias"]': expected}


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"[64, true]": {"block_m": 16',
        "[]",
        '{"[64, true]": {"block_m": 16}}',
        '{"[64, true]": {"block_m": 16, "block_n": 0}}',
        '{"[64, true]": {"block_m": "16", "block_n": 16}}',
        '{"64, true": {"block_m": 16, "block_n": 16}}',
        b"\xff\xfe",
    ],
    ids=["empty", "torn", "list", "missing", "zero", "text", "key", "binary"],
)
def test_corrupt_file_is_ignored_with_a_warning_and_replaced(cache, text):
    tuned = table()
    path = tuning.cache_file(tuned, CPU)
    cache.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match=r"the tile cache .*\.json is ignored: "):
        assert pick(tuned, CPU, (64, True)) == ANY
    with pytest.warns(UserWarning, match="is ignored"):
        tune(tuned, CPU, (64, True), measure(MEASURED))
    tuning.forget()
    assert pick(tuned, CPU, (64, True)) == MEASURED


def test_unwritable_cache_is_a_warning(cache):
    cache.write_text("a file, not a directory")
    tuned = table()
    with pytest.warns(UserWarning, match="the tiles measured for tests.table are not kept: "):
        assert tune(tuned, CPU, (64, True), measure(MEASURED)) == MEASURED
    assert pick(tuned, CPU, (64, True)) == MEASURED, "kept in this process"


def test_failed_write_leaves_the_old_file(cache, monkeypatch):
    tuned = table()
    tune(tuned, CPU, (64, True), measure(MEASURED))
    before = tuning.cache_file(tuned, CPU).read_text()

    def fail(self, target):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(tuning.Path, "replace", fail)
        with pytest.warns(UserWarning, match="are not kept: disk full"):
            tune(tuned, CPU, (32, True), measure(MEASURED))
    assert tuning.cache_file(tuned, CPU).read_text() == before
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock"]


WRITERS, ROWS_EACH = 3, 20
WRITER = f"""
import sys, time, torch
from pathlib import Path
from attn_core.tuning import Table, TileConfig, tune
writer, start = int(sys.argv[1]), Path(sys.argv[2])
table = Table("tests.table", {{}}, TileConfig(1, 1))
print("ready", flush=True)
while not start.exists():
    time.sleep(0.001)
for row in range({ROWS_EACH}):
    config = TileConfig(writer + 1, row + 1)
    tune(table, torch.device("cpu"), (writer, row), lambda config: 1.0, [config])
"""


def test_concurrent_processes_lose_no_row_and_see_no_torn_file(cache, tmp_path):
    start = tmp_path / "start"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(writer), str(start)], stdout=subprocess.PIPE
        )
        for writer in range(WRITERS)
    ]
    for writer in writers:
        assert writer.stdout.readline().strip() == b"ready"
    start.touch()
    path, sizes = tuning.cache_file(table(), CPU), set()
    while any(writer.poll() is None for writer in writers):
        sizes.add(len(tuning._read(path)))  # a torn file would warn, and warnings are errors
        time.sleep(0.001)
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    expected = {
        (writer, row): TileConfig(writer + 1, row + 1)
        for writer in range(WRITERS)
        for row in range(ROWS_EACH)
    }
    assert tuning._read(path) == expected
    assert len(sizes) > 2, "read while they were writing"
    assert sorted(file.suffix for file in cache.iterdir()) == [".json", ".lock"]


def test_default_directory_is_the_user_cache(monkeypatch):
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.delenv("ATTN_CACHE_DIR")
    assert str(environment.cache_dir()) == platformdirs.user_cache_dir("attn")


def test_a_mode_of_the_caller_takes_the_place_of_the_environment(monkeypatch):
    monkeypatch.setenv("ATTN_TUNE", "off")
    milliseconds = measure(MEASURED, EXACT)
    assert pick(table(), CPU, (64, True), milliseconds, "force") == MEASURED
    assert pick(table(), CPU, (32, True), milliseconds, "off") == DEFAULT
