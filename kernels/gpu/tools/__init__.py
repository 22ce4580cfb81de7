"""A kernel developer's tools; the engine itself never imports them.

:mod:`.layers` builds the launches of every layer of a network, given as shapes. :mod:`.inspect` prints their
machine code's properties, :mod:`.predict` their predicted times, both without a GPU; :mod:`.tune` times their
tiles on one. :mod:`.compilers` compiles launches in parallel, :mod:`.simulated_gpu` stands in for a GPU.
"""
