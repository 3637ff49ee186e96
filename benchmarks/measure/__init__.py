"""How measurements are taken and written down.

device        the GPU through CuPy: events, waiting, graphs, memory
timing        calls that take turns, and ratios of times
memory        the most memory that a call takes
host          how long the host takes for a call
cublas        the product that X is measured by
kernel_times  which kernels a call runs
record        surroundings of a measurement, and JSON
"""
