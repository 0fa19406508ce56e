"""The compiled kernels; see ``_jit.py`` for how they are compiled, ``tiles.py`` for how they see arrays."""
