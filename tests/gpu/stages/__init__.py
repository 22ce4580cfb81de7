"""The stages of ``python -m tests.gpu``, each with a fixed time limit.

A stage is a list of steps, the most important first (:mod:`.plan`). A step runs in a separate process
(:mod:`.jobs`), or is the GPU tests in several processes (:mod:`.suite`). It begins no new work when its time
is up, and is killed if it runs on. Its results are written to files as they become available; its summary is
made from these, and everything is packed into one archive (:mod:`.summary`).
"""
