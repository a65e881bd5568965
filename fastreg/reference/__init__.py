"""The maths of every kernel in plain PyTorch: the specification, the oracle of the tests and the CPU path.

Each module has the name of the kernel file it specifies.  Functions work on flat tensors in compute
precision; numbers are 0-d tensors of that precision, so that eager, compiled and kernel round alike.
"""
