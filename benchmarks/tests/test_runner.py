from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, problems, report, results, timing
from benchmarks.__main__ import main
from benchmarks.providers import flash
from benchmarks.providers.base import PASSES, Provider, Subject
from benchmarks.runner import OUT_OF_TIME, Runner

CPU = torch.device("cpu")
EFFORT = timing.Effort(rounds=2, milliseconds=1.0, repeats=2)
CASE = next(case for case in problems.load("attn-flash", "cpu") if case.id == "cpu-vit-b16-s197")
CASE = dataclasses.replace(CASE, sizes={**CASE.sizes, "B": 1, "H": 2, "H_KV": 2}, series="vit")


def right(case, inputs):
    return flash._sdpa("", case, inputs)


def wrong(case, inputs):
    call = right(case, inputs)
    attend = call.forward
    call.forward = lambda: attend() * 1.01
    return call


def wrong_gradient(case, inputs):
    call = right(case, inputs)
    attend = call.forward

    def forward():
        out = attend()
        out.register_hook(lambda grad: 2 * grad)
        return out

    call.forward = forward
    return call


def unwritten(case, inputs):
    call = right(case, inputs)
    attend = call.forward
    call.forward = lambda: attend().index_fill(2, torch.tensor([3]), torch.nan)
    return call


def broken(case, inputs):
    raise ZeroDivisionError("no\nway")


def measure(*providers, cases=(CASE,), passes=PASSES, deadline=float("inf")):
    measured = dataclasses.replace(flash.SUBJECT, providers=providers)
    result = results.new_result(measured, CPU, {})
    done = []
    runner = Runner(measured, CPU, EFFORT, passes, deadline=deadline)
    runner.run(cases, result, lambda case: done.append(case.id))
    return result, {(row.provider, row.pass_): row for row in result.rows}, done


def provider(name, prepare=right, **options):
    return Provider(name, prepare, devices=("cpu",), **options)


def test_some_providers_are_not_for_every_case():
    providers = (
        Provider("always", right, devices=("cpu",)),
        Provider("headline", right, devices=("cpu",), headline_only=True),
        Provider("never", right, devices=("cpu",), optional=True),
    )
    measured = dataclasses.replace(flash.SUBJECT, providers=providers)

    def names(*asked, **options):
        case = dataclasses.replace(CASE, **options)
        return [provider.name for provider in measured.chosen(case, CPU, asked)]

    assert names(headline=True) == ["always", "headline"]
    assert names(headline=False) == ["always"]
    assert names("headline", "never", headline=False) == ["headline", "never"]


def test_right_providers_are_timed_and_ranked():
    _, rows, done = measure(provider("a"), provider("b", kind="ours"))
    assert done == [CASE.id]
    for row in rows.values():
        assert row.status == results.OK
        assert row.error < 1e-5
        assert row.tflop_s == pytest.approx(flash.flops(CASE, row.pass_) / row.ms * 1e-9)
        assert row.ratio_to_best_peer == pytest.approx(rows["a", row.pass_].ms / row.ms)


@pytest.mark.parametrize("prepare", [wrong, unwritten], ids=["inexact", "unwritten"])
def test_a_wrong_provider_is_reported_and_not_timed(prepare):
    _, rows, _ = measure(provider("bad", prepare), provider("good"))
    for pass_ in ("forward", "backward"):
        assert rows["bad", pass_].status == results.WRONG
        assert rows["bad", pass_].ms is None
        assert rows["good", pass_].status == results.OK


def test_a_wrong_gradient_spoils_the_backward_row_alone():
    _, rows, _ = measure(provider("bad", wrong_gradient))
    assert rows["bad", "forward"].status == results.OK
    assert rows["bad", "backward"].status == results.WRONG
    assert "dq errs by" in rows["bad", "backward"].reason


def test_missing_and_failing_peers_are_rows():
    absent = provider("absent", module="no_such_peer.kernels")
    _, rows, _ = measure(absent, provider("broken", broken), provider("good"))
    assert rows["absent", "forward"].status == results.MISSING
    assert rows["absent", "forward"].reason == "no_such_peer.kernels is not installed"
    assert rows["broken", "backward"].status == results.FAILED
    assert rows["broken", "backward"].reason == "ZeroDivisionError: no way"
    assert rows["good", "backward"].status == results.OK


def test_a_peer_that_does_not_import_has_failed(tmp_path, monkeypatch):
    (tmp_path / "stale_peer.py").write_text("import no_such_dependency\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    _, rows, _ = measure(provider("stale", module="stale_peer"))
    assert rows["stale", "forward"].status == results.FAILED
    assert "no_such_dependency" in rows["stale", "forward"].reason


def test_reasons_name_no_folders():
    def lost(case, inputs):
        raise ImportError("no 'f' in 'peer' (/home/me/site-packages/peer/__init__.py), nor in a/b")

    _, rows, _ = measure(provider("lost", lost))
    expected = "ImportError: no 'f' in 'peer' (__init__.py), nor in a/b"
    assert rows["lost", "forward"].reason == expected


def test_an_unknown_backend_of_ours_is_missing():
    prepare = next(p.prepare for p in flash.SUBJECT.providers if p.name == "hopper")
    _, rows, _ = measure(provider("hopper", lambda *_: prepare(*_).forward()))
    assert rows["hopper", "forward"].status in (results.MISSING, results.UNSUPPORTED)


def test_rows_beyond_the_budget_say_so():
    _, rows, done = measure(provider("a"), deadline=time.monotonic() - 1)
    assert done == []
    assert {row.status for row in rows.values()} == {results.NOT_REACHED}
    assert {row.reason for row in rows.values()} == {OUT_OF_TIME}


def test_the_budget_ends_a_run_between_cases():
    def slow(case, inputs):
        time.sleep(0.3)
        return right(case, inputs)

    second = dataclasses.replace(CASE, id="second")
    start = time.monotonic()
    result, _, done = measure(
        provider("a", slow), cases=(CASE, second), deadline=start + 0.2, passes=("forward",)
    )
    assert done == [CASE.id]
    assert [row.status for row in result.rows] == [results.NOT_REACHED] * 2


def test_host_time_is_that_of_a_call():
    tiny = next(case for case in problems.load("attn-flash", "cpu") if case.id == "cpu-tiny")
    _, rows, _ = measure(provider("a"), cases=(tiny,))
    assert {pass_ for _, pass_ in rows} == {"host", "host_grad"}
    for row in rows.values():
        assert row.status == results.OK
        assert 1e-4 < row.ms < 1000  # on a busy machine
        assert row.tflop_s is None


def test_a_job_that_raises_leaves_the_others_alone():
    jobs = {name: timing.Job(lambda: None) for name in ("a", "b")}
    jobs["bad"] = timing.Job(lambda: 1 / 0)
    measured = timing.interleave(timing.CpuClock(), jobs, EFFORT)
    assert len(measured["a"].samples) == len(measured["b"].samples) == 4
    assert isinstance(measured["bad"].error, ZeroDivisionError)


def test_files_survive_a_round_trip(tmp_path):
    result, _, _ = measure(provider("a"), provider("b", broken))
    path = results.path_for(result, tmp_path)
    results.write(result, path)
    assert results.read(path) == result
    assert path.parent.name == "cpu"
    assert results.path_for(result, tmp_path).stem == f"{path.stem}-2"
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert set(data) == {field.name for field in dataclasses.fields(results.Result)}
    assert {row["status"] for row in data["rows"]} <= set(results.STATUSES)
    path.write_text(json.dumps(data | {"schema": 0}))
    with pytest.raises(ValueError, match="must have schema 1, got 0"):
        results.read(path)


def test_the_command_writes_a_result_and_the_report_reads_it(tmp_path, capsys):
    arguments = ["attn-flash", "--device", "cpu", "--quick", "--filter", "vit|tiny"]
    assert main([*arguments, "--out", str(tmp_path), "--pass", "forward,host"]) == 0
    (path,) = tmp_path.glob("cpu/*.json")
    result = results.read(path)
    assert {row.pass_ for row in result.rows} == {"forward", "host"}
    assert all(row.status == results.OK for row in result.rows)
    assert result.versions["torch"] == torch.__version__
    readme = tmp_path / "README.md"
    readme.write_text(
        "a\n<!-- benchmarks:attn-flash -->\nold\n<!-- /benchmarks:attn-flash -->\nb\n"
    )
    assert report.main([str(path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("a\n<!--")
    assert text.endswith("-->\nb\n")
    assert "old" not in text
    assert "| cpu-vit-b16-s197 |" in text
    assert path.with_suffix(".md").exists()
    capsys.readouterr()
    assert compare.main([str(path), str(path)]) == 0
    assert "torch: geometric mean 1.000 of 2 rows" in capsys.readouterr().out


def test_a_filter_without_cases_says_so(capsys):
    assert main(["attn-flash", "--device", "cpu", "--filter", "nothing-like-it"]) == 1
    assert "matches 'nothing-like-it'" in capsys.readouterr().out


@pytest.mark.parametrize("spread", [0.2, 0.3])
def test_a_median_of_repeats_that_differ_is_marked(spread):
    _, rows, _ = measure(provider("a"))
    row = rows["a", "forward"]
    row.spread = spread
    assert ("| ~" in report.table([row])) == (spread > 0.25)


def test_a_case_in_which_the_host_counts_is_marked_among_others():
    _, rows, _ = measure(provider("a"), passes=("forward",))
    eager = rows["a", "forward"]
    queued = dataclasses.replace(eager, case="large", timing="queued")
    assert f"| {CASE.id} |" in report.table([eager])
    table = report.table([eager, queued])
    assert f"| {CASE.id} (eager) |" in table
    assert "| large |" in table


def test_clocks_of_a_gpu(monkeypatch):
    monkeypatch.setattr(timing, "_READ_BYTES", 4)
    monkeypatch.setattr(timing, "clock_for", timing.CudaClock)
    runner = Runner(flash.SUBJECT, CPU, EFFORT, PASSES)
    eager = dataclasses.replace(CASE, eager=True)
    for case, pass_, expected in (
        (CASE, "forward", timing.CudaClock),
        (eager, "forward", timing.EagerClock),
        (eager, "graph", timing.CudaClock),
        (eager, "host", timing.HostClock),
    ):
        assert type(runner._clock_of(case, pass_)) is expected


def test_plots_are_made_of_series(tmp_path):
    pytest.importorskip("matplotlib")
    result, _, _ = measure(provider("a"), provider("b", kind="ours"))
    pictures = report.plot(result, tmp_path / "result.json")
    assert [picture.name for picture in pictures] == ["result-rates.png", "result-ratios.png"]
    assert all(picture.stat().st_size > 1000 for picture in pictures)


def test_without_a_peer_there_are_no_ratios_to_plot(tmp_path):
    pytest.importorskip("matplotlib")
    result, _, _ = measure(provider("b", kind="ours"))
    pictures = report.plot(result, tmp_path / "result.json")
    assert [picture.name for picture in pictures] == ["result-rates.png"]


def test_a_pass_without_a_peer_has_no_panel_of_ratios(tmp_path):
    pytest.importorskip("matplotlib")
    result, _, _ = measure(provider("a"), provider("b", kind="ours"))
    for row in result.rows:
        if row.pass_ == "backward":
            row.ratio_to_best_peer = None
    figure = report._draw_ratios(result, [row for row in result.rows if row.series])
    assert len(figure.axes) == 1


def test_single_cases_are_drawn_as_bars(tmp_path):
    pytest.importorskip("matplotlib")
    result, _, _ = measure(provider("a"), provider("b", kind="ours"))
    for row in result.rows:
        row.series = ""
    pictures = report.plot(result, tmp_path / "result.json")
    assert [picture.name for picture in pictures] == ["result-cases.png"]
    forward, backward = report._draw_cases(result.rows).axes
    assert [panel.get_title() for panel in (forward, backward)] == ["forward", "backward"]
    assert [bar.get_width() > 0 for bar in forward.patches] == [True, True]
    assert [label.get_text() for label in forward.get_yticklabels()] == [CASE.id]


def test_the_legend_of_bars_shows_a_provider_of_a_later_pass_in_its_colour():
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_hex

    result, _, _ = measure(provider("a"), provider("b", passes=("backward",)))
    figure = report._draw_cases(result.rows)
    bars = [to_hex(bar.get_facecolor()) for bar in figure.axes[1].patches]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert [to_hex(mark.get_facecolor()) for mark in legend.legend_handles] == bars


def test_a_page_says_what_a_second_run_measured():
    result, _, _ = measure(provider("a"))
    assert "second run" not in report.markdown(result, result.rows, [], Path())
    result.settings["continued"] = {"cases": [CASE.id], "providers": ["a", "b"]}
    page = report.markdown(result, result.rows, [], Path())
    assert f"Measured in a second run right after the first, of a, b alone: {CASE.id}." in page


def test_a_readme_without_a_section_is_refused():
    with pytest.raises(ValueError, match="must have a section <!-- benchmarks:attn-flash -->"):
        report.fill("text", "benchmarks:attn-flash", "body")


def test_subjects_have_distinct_providers_on_each_device():
    from benchmarks.providers import PACKAGES, subject

    for package in PACKAGES:
        measured: Subject = subject(package)
        for kind in ("cpu", "cuda"):
            for passes in (("forward",), ("host",)):
                case = dataclasses.replace(CASE, passes=passes)
                names = [p.name for p in measured.chosen(case, torch.device(kind))]
                assert len(names) == len(set(names))


def test_the_clock_of_the_host_makes_as_many_calls_as_asked():
    calls = []
    clock = timing.HostClock(timing.CpuClock())
    assert len(clock.samples(lambda: calls.append(0), 40)) == len(calls) // timing._HOST_CALLS == 2
    assert len(clock.samples(lambda: None, 1)) == 1


def test_graphs_are_replayed_where_kernels_are_timed_and_not_the_host(monkeypatch):
    monkeypatch.setattr(timing, "captured", lambda call: "replay")
    provider = Provider("sdpa", right)
    call = right(CASE, flash.make_inputs(CASE, CPU))
    runner = SimpleNamespace(
        _subject=dataclasses.replace(flash.SUBJECT, graph=True), _device=torch.device("cuda")
    )

    def timed(pass_):
        row = results.Row.of(CASE, pass_, provider)
        return Runner._forward(runner, CASE, provider, call, row).call, row.timing

    assert timed("forward") == ("replay", "graph")
    assert timed("host") == (call.forward, "eager")
