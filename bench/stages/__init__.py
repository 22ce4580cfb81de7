"""What ``make gpu`` does: the stages of :mod:`bench.gpu`, each in a time that is set.

A stage is a list of steps (:mod:`.plan`), what matters most first. A step is a process of its own
(:mod:`.jobs`) or the GPU tests in several (:mod:`.suite`); it begins no new work once its time is up, and is
killed if it outlives that. What it has found lies in files by then, from which its summary is made
(:mod:`.summary`); everything goes into one archive (:mod:`.archive`).

``python -m bench.stages PIECE`` is a piece of work by itself: :mod:`.smoke`, :mod:`.races`,
:mod:`.sanitize`, or the tuning of :mod:`bench.gpu`.
"""
