"""Tells all that a GPU can tell about this library, in one command of 450 seconds: `python -m benchmarks.gpu`.

__main__      the command; `prepare`: kernels compiled beforehand, on a machine without a GPU
supervisor    starts workers, gives them units, outlives them, writes a line a unit; summary: the table at the end
worker        runs units, one after the other, in a process that may hang or break
units         the list of units, the most valuable first; they are made by checks, speed, host, launches, networks
              and rest
machine       the GPU; or, for a rehearsal, the CPU with Triton's interpreter at tiny sizes
paths         explicit plans of each kernel path, and calls that follow them
definition    the operator in float64, in slices
"""
