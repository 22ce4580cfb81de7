"""The kernels, imported as ``dcgan.kernels``.

:mod:`.ops` defines the two fused convolutions and dispatches each call to an engine, which gets it as a
:class:`.call.Call`. :mod:`.reference` defines the ops' semantics in plain aten, :mod:`.chain` runs several
layers as one operator, and :mod:`.weight_cache` caches prepacked weights. :mod:`.gpu` is the Triton engine,
:mod:`.cpu` the native one. Nothing here imports a model.
"""
