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

    def names(*some):
        return [name for name in warm.tasks(measured, some, CUDA, ()) if name[0] == "hopper"]

    alone = [name for case in cases for name in names(case)]
    assert sorted(names(*cases)) == sorted(set(alone))
    assert len(set(alone)) < len(alone)


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
