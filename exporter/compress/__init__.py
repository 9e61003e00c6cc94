"""Makes a model smaller before it is quantised: prune a teacher to a shape, then distil the teacher into it.

``pipeline`` is the way through; needs torch and transformers. Does not know how the result is exported or run.
"""
