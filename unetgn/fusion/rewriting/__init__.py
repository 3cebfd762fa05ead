"""Rewrites a class's own forward so that a norm and the SiLU after it are one call.

Each rewriting keeps the meaning whatever the names stand for. `norm_silu(norm, act, x, …)` is defined as
`act(norm(x + pre_bias, …) * (1 + scale) + shift)`, its arguments are evaluated before it normalizes, and SiLU works on
each element by itself. A forward that does anything else between norm and activation is left as it is.

`forward.py` takes a forward through all rewritings; `expressions.py`, `steps.py`, `branches.py`, `apart.py` and
`additions.py` have them, each shown before and after in its docstring; `above.py` follows `super().forward`. They
recognize by `names.py` and `patterns.py`, and build by `calls.py`. Names that a rewriting adds begin with `unetgn_`, so
that they meet no name of the forward; the examples leave that away.
"""
