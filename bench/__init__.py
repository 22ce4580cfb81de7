"""Benchmarks: ``python -m bench COMMAND``, one module a command.

A command races *providers* (:mod:`bench.providers`: the reference, its rivals, this project) over *cases*
(:mod:`bench.cases`: a network, a batch, a dtype, a device). :mod:`bench.race` runs it: every provider in a
process of its own (:mod:`bench.worker`), checked against float64 before it is timed, in short bursts taken in
turn. :mod:`bench.results` turns the outcome into rows, :mod:`bench.table` prints them and :mod:`bench.plot`
draws them.
"""
