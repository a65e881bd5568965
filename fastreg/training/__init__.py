"""The training loop behind `fastreg.loops`."""
