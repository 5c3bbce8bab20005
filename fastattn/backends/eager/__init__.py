"""The definition: every op in plain torch, for any device and dtype, differentiable any number of times.

Each file reads like its formula. The other backends are tested against these functions in float64.
"""
