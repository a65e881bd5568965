"""Holds the Triton kernels of fastreg: maths in stages, memory traffic in templates.

Nothing here imports fastreg or torch.  Each module has a plain PyTorch twin of the same name in
`fastreg.reference`, which is its specification.
"""
