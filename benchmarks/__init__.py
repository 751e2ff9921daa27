"""Benchmarks: every package against its peers, each checked against float64 before it is timed."""

from benchmarks import checkout

checkout.use()
