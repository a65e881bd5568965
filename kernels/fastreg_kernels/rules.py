"""Update rules: `u` is the gradient on entry and the step to subtract on return.

A stage is element-wise maths on blocks in compute precision.  Its arguments are the weight, the running
update, the position of the block, then its buffers, units, device scalars, random keys and step scalars, in
that order; it returns the weight, the update and the new state.  The host computes complements and products
of step scalars in double: a stage never combines two of them.
"""

import triton
import triton.language as tl


@triton.jit
def sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def adam(p, u, at, exp_avg, exp_avg_sq, one_minus_beta1, beta2, one_minus_beta2, step_size, scale, eps):
    exp_avg += one_minus_beta1 * (u - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (u * u)
    return p, step_size * (exp_avg / (scale * tl.sqrt(exp_avg_sq) + eps)), (exp_avg, exp_avg_sq)


@triton.jit
def adam_amsgrad(
    p, u, at, exp_avg, exp_avg_sq, max_exp_avg_sq,
    one_minus_beta1, beta2, one_minus_beta2, step_size, scale, eps,
):  # fmt: skip
    exp_avg += one_minus_beta1 * (u - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (u * u)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    u = step_size * (exp_avg / (scale * tl.sqrt(max_exp_avg_sq) + eps))
    return p, u, (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def sgd(p, u, at, lr):
    return p, lr * u, ()


@triton.jit
def sgd_momentum(p, u, at, momentum_buffer, momentum, one_minus_beta, lr):
    momentum_buffer = momentum * momentum_buffer + one_minus_beta * u
    return p, lr * momentum_buffer, (momentum_buffer,)


@triton.jit
def sgd_nesterov(p, u, at, momentum_buffer, momentum, one_minus_beta, lr, lr_momentum):
    momentum_buffer = momentum * momentum_buffer + one_minus_beta * u
    return p, lr * u + lr_momentum * momentum_buffer, (momentum_buffer,)


@triton.jit
def lion(p, u, at, exp_avg, beta1, one_minus_beta1, beta2, one_minus_beta2, lr):
    return p, lr * sign(beta1 * exp_avg + one_minus_beta1 * u), (beta2 * exp_avg + one_minus_beta2 * u,)


@triton.jit
def descend(p, u, at):
    return p - u, u, ()


@triton.jit
def descend_with_momentum(p, u, at):
    return p - u[0], u[1], ()
