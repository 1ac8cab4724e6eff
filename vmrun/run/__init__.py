"""Commands in throw-away machines: `vmrun run` and the Python `Sandbox`. Owner's process.

A sandbox is a machine that is made of a template in a fraction of a second, runs what it is told through the
agent in its guest, and is gone without a trace. What runs in it is not trusted.
"""
