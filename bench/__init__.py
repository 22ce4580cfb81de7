"""Benchmarks: ``python -m bench COMMAND``; :mod:`bench.__main__` lists the commands and their modules.

A command compares *providers* (:mod:`bench.providers`: the reference, other baselines and this project) on
*cases* (:mod:`bench.cases`: a network, a batch size, a dtype and a device; :mod:`bench.training`: training
steps). :mod:`bench.race` runs every provider in a separate process (:mod:`bench.worker`), checks it against
float64 and then times all providers in short interleaved bursts (:mod:`bench.timing`). :mod:`bench.output`
turns the outcomes into JSON rows and prints them as tables, and :mod:`bench.plot` draws them.
"""
