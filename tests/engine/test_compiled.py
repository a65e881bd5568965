"""The compiled reference: compiled once per chain, right for every length, number and integer."""

import pytest
import torch
from torch import Tensor

import fastreg
from fastreg import EMA, ClipNorm
from fastreg.engine.batch import Batch
from fastreg.engine.launch import run
from fastreg.engine.launch.compiled import compiled_step
from fastreg.engine.stage import Buffer, Chain, Stage
from fastreg.reference.step import CHUNK

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_program_for_every_length(dtype, Race, close):
    """Against the reference; sizes around those of vectors, threads and chunks."""
    sizes = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 1000, 4095, 4097, 70001)
    race = Race([(size,) for size in sizes], dtype)
    regularizers = [ClipNorm(3.0), EMA(0.9)]
    ours, theirs = (
        fastreg.AdamW(parameters, lr=0.1, regularizers=regularizers)
        for parameters in (race.ours, race.theirs)
    )
    before = compiled_step.cache_info().misses
    for _ in range(2):
        race.gradients()
        with fastreg.use_backend("compiled"):
            ours.step()
        with fastreg.use_backend("reference"):
            theirs.step()
    assert compiled_step.cache_info().misses <= before + 1
    for p, q in zip(race.ours, race.theirs, strict=True):
        for a, b in ((p, q), *((ours.state[p][name], b) for name, b in theirs.state[q].items())):
            if a.dtype == torch.bfloat16:  # one unit in the last place
                torch.testing.assert_close(a, b, rtol=2**-7, atol=0)
            else:
                close(a, b)


def identify(p: Tensor, u: Tensor, at, seen: Tensor, scalar, word, one, two) -> tuple:
    """A toy that tells everything a stage is given apart; exact in float64."""
    index = (at.first + torch.arange(u.numel() + at.skip, device=u.device))[at.skip :]
    integers = index + 10**8 * at.stream + 10**9 * at.step + 10**10 * word
    return p + u, u, (seen + integers + 1e11 * one + 1e12 * two + 1e13 * scalar,)


TOY = Chain(
    (
        Stage(None, identify, (Buffer("first"),), device_scalars=("s",), rng_keys=("w",), step_scalars=2),
        Stage(None, identify, (Buffer("second"),), device_scalars=("s",), rng_keys=("w",), step_scalars=2),
    )
)


def toy_batch(lengths, firsts) -> Batch:
    count = len(lengths)
    ones = [torch.ones(length, dtype=torch.float64) for length in lengths]
    return Batch(
        chain=TOY,
        parameters=[one.clone() for one in ones],
        gradients=[one * 3 for one in ones],
        buffers=[[one * 0 for one in ones] for _ in range(2)],
        device_scalars=[torch.tensor(2.0, dtype=torch.float64), torch.arange(count, dtype=torch.float64) % 7],
        rng_keys=[4, 5],
        firsts=list(firsts),
        streams=[i % 9 for i in range(count)],
        rows=[i % 2 for i in range(count)],
        steps=[3, 8],
        step_scalars=[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]],
    )


@pytest.mark.parametrize("backend", ("reference", "compiled"))
def test_everything_arrives_where_it_belongs(backend):
    """Also for shards that start inside a group of 8, and for tensors of several chunks."""
    lengths, firsts = (5, 1, 40, 41, 0, 3, CHUNK + 13), (0, 7, 0, 3, 5, 6, 2)
    batch = toy_batch(lengths, firsts)
    with fastreg.use_backend(backend):
        run(batch)
    for i, (length, first) in enumerate(zip(lengths, firsts, strict=True)):
        row = i % 2
        index = torch.arange(first, first + length, dtype=torch.float64) + 1e8 * (i % 9) + 1e9 * (3, 8)[row]
        for stage, scalar in enumerate((2, i % 7)):
            one, two = batch.step_scalars[row][2 * stage : 2 * stage + 2]
            expected = index + 1e10 * (4 + stage) + 1e11 * one + 1e12 * two + 1e13 * scalar
            assert torch.equal(batch.buffers[stage][i], expected)
        assert (batch.parameters[i] == 7).all() and (batch.gradients[i] == 3).all()


def test_skip_flag():
    for flag, expected in ((1.0, 1.0), (0.0, 7.0)):
        batch = toy_batch((40,), (0,))
        batch.skip = torch.tensor([flag])
        with fastreg.use_backend("compiled"):
            run(batch)
        assert (batch.parameters[0] == expected).all()


def test_compiled_once_per_chain_dtypes_and_threads(Race):
    def misses() -> int:
        race.gradients()
        optimizer.step()
        return compiled_step.cache_info().misses

    compiled_step.cache_clear()
    threads = torch.get_num_threads()
    with fastreg.use_backend("compiled"):
        try:
            for dtype, count in ((torch.float32, 1), (torch.float64, 2)):
                race = Race([(20,), (30, 2)], dtype)
                optimizer = fastreg.SGD(race.ours, lr=0.1)
                assert misses() == count
                optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(9, dtype=dtype))})
                optimizer.param_groups[1]["params"][0].grad = torch.ones(9, dtype=dtype)
                assert misses() == count
            other = fastreg.SGD(race.ours, lr=0.2, weight_decay=0.5)
            other.step()
            assert misses() == 2  # an equal chain
            torch.set_num_threads(threads + 1)
            assert misses() == 3
        finally:
            torch.set_num_threads(threads)
        assert misses() == 3


def test_inside_a_compiled_training_step(rule, Race):
    """`torch.compile` of the user's own step leaves ours out of its graph."""
    race = Race([(16,)])
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)

    @torch.compile(backend="eager")
    def train():
        ours.zero_grad()
        (race.ours[0] ** 2).sum().backward()
        ours.step()

    for _ in range(2):
        train()
        theirs.zero_grad()
        (race.theirs[0] ** 2).sum().backward()
        theirs.step()
    race.check()
