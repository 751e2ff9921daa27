from __future__ import annotations

import dataclasses

import torch

from benchmarks import problems, warm
from benchmarks.providers import subject
from benchmarks.providers.base import Provider

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_what_cases_share_is_compiled_once():
    measured = subject("attn-triangle")
    cases = problems.load("attn-triangle", "gpu")
    names = [name for name in warm.tasks(measured, cases, CUDA, ()) if name[0] == "hopper"]
    kinds = {(case["D"], bool(case["masked"])) for case in cases}
    assert len(names) == 3 * len(kinds) < len(cases) * 3


def test_workers_share_out_the_tasks(tmp_path):
    measured = subject("attn-triangle")
    case = problems.load("attn-triangle", "cpu")[0]
    cases = [dataclasses.replace(case, id=str(number)) for number in range(4)]
    done = []

    def prepare(case, inputs):
        done.append(case.id)
        if case.id == "0":
            warm.work(str(tmp_path), measured, cases, CPU, ())  # another worker, meanwhile
        raise ZeroDivisionError

    measured = dataclasses.replace(measured, providers=(Provider("p", prepare, devices=("cpu",)),))
    warm.work(str(tmp_path), measured, cases, CPU, ())
    assert done == ["0", "1", "2", "3"]
