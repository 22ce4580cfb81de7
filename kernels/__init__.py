"""The kernels, imported as ``dcgan.kernels``.

:mod:`.ops` defines the two fused convolutions and says which engine runs a call; :mod:`.call` is what it
hands to the engine, :mod:`.reference` what the ops mean, in plain aten; :mod:`.chain` is several of them as
one; :mod:`.weights` caches what engines make of weights; :mod:`.gpu` is the Triton engine, :mod:`.cpu` the
native one. Nothing here imports a model.
"""
