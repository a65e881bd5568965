"""Cases that two processes work through: DTensors, FSDP2, DDP and their checkpoints.

Run as a program, this file is one of the two processes: it saves the result of every case.
"""

import datetime
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastreg

from .processes import WORLD

STEPS = 4
ROWS = {
    "even": (6, 4),
    "uneven, the second shard starts at element 9": (5, 3),
    "the second shard is empty": (1, 7),
    "vector": (13,),
    "more than a block, the second shard starts at element 2489": (37, 131),
    "no elements": (0, 3),
}


# What is trained, on one process or on two.


def adamw(parameters: Any, max_norm: float = 0.5, seed: int = 7) -> fastreg.AdamW:
    regularizers = [fastreg.ClipNorm(max_norm), fastreg.GradientNoise(0.1), fastreg.EMA(0.9)]
    return fastreg.AdamW(parameters, lr=0.1, weight_decay=0.1, regularizers=regularizers, seed=seed)


def unclipped(parameters: Any) -> fastreg.AdamW:
    return adamw(parameters, max_norm=float("inf"))


def quiet(parameters: Any) -> fastreg.AdamW:
    """Random numbers take Inductor long to compile; `tests/common/test_random.py` has them for shards."""
    return fastreg.AdamW(parameters, lr=0.1, regularizers=[fastreg.ClipNorm(0.5), fastreg.EMA(0.9)])


def noise(parameters: Any) -> fastreg.SGD:
    return fastreg.SGD(parameters, lr=1.0, regularizers=[fastreg.GradientNoise(1.0)], seed=7)


def by_units(parameters: Any) -> fastreg.SGD:
    """Rows lie in one shard each, vectors in all."""
    regularizers = [fastreg.ClipNorm(0.5, float("inf")), fastreg.AdaptiveClip(0.05)]
    return fastreg.SGD(parameters, lr=0.1, momentum=0.9, regularizers=regularizers)


def sam(parameters: Any, base: Any = fastreg.AdamW, **options: Any) -> fastreg.SAM:
    return fastreg.SAM(parameters, base, rho=0.5, lr=0.1, **options)


FLAT: dict[str, Callable[[Any], Any]] = {
    "sam": sam,
    "asam": lambda parameters: sam(parameters, adaptive=True, eta=0.01, interval=2),
    "sam around torch": lambda parameters: sam(parameters, torch.optim.SGD, momentum=0.9),
    "lookahead": lambda parameters: fastreg.Lookahead(fastreg.AdamW(parameters, lr=0.1), 2, 0.5, "pullback"),
    "lookahead around torch": lambda parameters: fastreg.Lookahead(
        torch.optim.AdamW(parameters, lr=0.1), 2, 0.5, "pullback"
    ),
    "averages": lambda parameters: fastreg.SGD(
        parameters, lr=0.1, regularizers=[fastreg.EMA(0.9, every=2), fastreg.SWA(2)]
    ),
    "msam": lambda parameters: fastreg.AdamW(
        parameters, lr=0.1, regularizers=[fastreg.ClipNorm(0.5), fastreg.MSAM(0.5), fastreg.EMA(0.9)]
    ),
}
"""What looks for flat minima, or averages."""


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def outcome(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """Weights and state, shards put together."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    out = {"weights": list(map(whole, parameters))}
    for name in optimizer.state[parameters[0]]:
        out[name] = [whole(optimizer.state[p][name]) for p in parameters]
    return out


def identity(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor


def train_tensors(
    make: Callable[[Any], Any], name: str,
    distribute: Callable[..., Tensor] = identity, distribute_gradient: Callable[..., Tensor] = identity,
) -> dict[str, Any]:  # fmt: skip
    """Trains tensors of all the shapes on random gradients, both distributed by a function."""
    generator = torch.Generator().manual_seed(0)
    shapes = [*ROWS.values(), (3, 5), ()]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    with fastreg.use_backend(name):
        parameters = [nn.Parameter(distribute(w, w.shape)) for w in weights]
        optimizer = make(parameters)
        norms = []
        for _ in range(STEPS):
            for parameter in parameters:
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = distribute_gradient(gradient, gradient.shape)
            optimizer.step()
            norms.append(optimizer.grad_norm)
    return {**outcome(optimizer), "norms": [None if norm is None else norm.item() for norm in norms]}


class Net(nn.Module):
    """Five features, three outputs; sizes that do not divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


def batch(step: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
    return x[part], y[part]


def train_net(net: nn.Module, optimizer: Any, steps: range, part: slice = slice(None)) -> list[float]:
    norms = []
    for step in steps:
        dtype = next(net.parameters()).dtype
        x, y = (t.to(dtype) for t in batch(step, part))
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        if isinstance(optimizer, fastreg.SAM) and optimizer.due:
            optimizer.first_step(zero_grad=True)
            nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        norm = getattr(optimizer, "grad_norm", None)
        norms.append(None if norm is None else norm.item())
    return norms


def train_flat(net: nn.Module, name: str, part: slice = slice(None)) -> dict[str, Any]:
    """Weights and state after some steps, and what is evaluated then."""
    optimizer = FLAT[name](net.parameters())
    train_net(net, optimizer, range(5), part)
    result, outputs = outcome(optimizer), []
    inputs = batch(0)[0].double()
    # FSDP2 keeps what it has gathered for a forward pass without gradients: it must not outlive a swap.
    for mode in ("train", "eval", "train"):
        getattr(optimizer, mode, lambda: None)()
        with torch.no_grad():
            outputs.append(net(inputs))
    getattr(optimizer, "eval", lambda: None)()
    return {**result, "outputs": outputs, "evaluated": list(map(whole, net.parameters()))}


# What one of two processes does.


def half(rank: int) -> slice:
    return slice(4 * rank, 4 * rank + 4)


def tensors_case(
    make: Callable[[Any], Any], name: str, dims: tuple[int, ...] = (WORLD,)
) -> Callable[[int], dict[str, Any]]:
    """Tensors with rows are sharded over the mesh dimension that has two processes, others are not."""

    def case(rank: int) -> dict[str, Any]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = init_device_mesh("cpu", dims)

        def distribute(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
            if shape == (3, 5):
                return tensor
            wanted = Shard(0) if shape in ROWS.values() else Replicate()
            placements = [wanted if size == WORLD else Replicate() for size in dims]
            return distribute_tensor(tensor, mesh, placements)

        return train_tensors(make, name, distribute, distribute)

    return case


def partial_gradients(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))

    def distribute(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)]) if shape in ROWS.values() else tensor

    def part(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        return DTensor.from_local(tensor / WORLD, mesh, [Partial()]) if shape in ROWS.values() else tensor

    return train_tensors(adamw, "reference", distribute, part)


def columns(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
    weight.grad = distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)])
    try:
        adamw([weight]).step()
    except ValueError as error:
        return {"message": str(error), "weight": whole(weight)}
    return {"message": "", "weight": whole(weight)}


def sharded(net: Any, *layers: str) -> Any:
    """The layers by themselves, what is left with the net."""
    from torch.distributed.fsdp import fully_shard

    for layer in (*map(net.get_submodule, layers), net):
        fully_shard(layer)
    return net


def sharded_net(seed: int = 7) -> tuple[nn.Module, fastreg.AdamW]:
    net = sharded(Net(), "first", "norm", "last")
    return net, adamw(net.parameters(), seed=seed)


def perturbed_net(net: nn.Module) -> dict[str, Any]:
    """Weights with noise, what the net makes of them, and the weights that came back."""
    weight_noise, x = fastreg.WeightNoise(net.parameters(), 0.1, seed=7), batch(0)[0]
    with torch.no_grad():
        net(x)  # what FSDP2 has gathered for this must not be used again
    with weight_noise.perturbed():
        noisy = [whole(p) for p in net.parameters()]
        output = net(x)
        output.sum().backward()
    return {"noisy": noisy, "output": [output.detach()], "back": [whole(p) for p in net.parameters()]}


def flat_case(name: str) -> Callable[[int], dict[str, Any]]:
    return lambda rank: train_flat(sharded(Net().double(), "first"), name, half(rank))


class Quadratic(nn.Module):
    """The loss of one of two workers, curved in a direction of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, curvature: Tensor) -> Tensor:
        return 0.5 * (curvature * self.weight.square()).sum()


def m_sharpness(sync_perturbation: bool) -> Callable[[int], dict[str, Any]]:
    def case(rank: int) -> dict[str, Any]:
        net = nn.parallel.DistributedDataParallel(Quadratic())
        curvature = torch.tensor([(4.0, 0.0), (0.0, 2.0)][rank], dtype=torch.float64)
        optimizer = fastreg.SAM(
            net.parameters(), fastreg.SGD, rho=0.1, lr=1.0, sync_perturbation=sync_perturbation
        )
        with optimizer.maybe_no_sync(net):
            net(curvature).backward()
        optimizer.first_step(zero_grad=True)
        perturbed = net.module.weight.detach().clone()
        with optimizer.maybe_no_sync(net):
            net(curvature).backward()
        gradient = net.module.weight.grad.clone()
        optimizer.second_step()
        return {"gradient": gradient, "perturbed": perturbed, "weight": net.module.weight.detach()}

    return case


def fsdp(rank: int) -> dict[str, Any]:
    from torch.distributed.tensor import DTensor

    net, optimizer = sharded_net()
    places = [p.data_ptr() for p in map(_local, net.parameters())]
    norms = train_net(net, optimizer, range(3), half(rank))
    states = optimizer.state_dict()["state"].values()
    with optimizer.averaged():
        averaged = list(map(whole, net.parameters()))
    return {
        **outcome(optimizer),
        "norms": norms,
        "averaged": averaged,
        "all sharded": all(isinstance(s[name], DTensor) for s in states for name in s if name != "step"),
        "all in place": places == [p.data_ptr() for p in map(_local, net.parameters())],
    }


def _local(parameter: Any) -> Tensor:
    return parameter.to_local()


def checkpoint(full: bool) -> Callable[[int], dict[str, Any]]:
    def case(rank: int) -> dict[str, Any]:
        from torch.distributed.checkpoint import state_dict as checkpoints

        options = checkpoints.StateDictOptions(full_state_dict=full)
        net, optimizer = sharded_net()
        train_net(net, optimizer, range(2), half(rank))
        weights, state = checkpoints.get_state_dict(net, optimizer, options=options)
        resumed, loaded = sharded_net(seed=1)
        checkpoints.set_state_dict(
            resumed, loaded, model_state_dict=weights, optim_state_dict=state, options=options
        )
        train_net(net, optimizer, range(2, 4), half(rank))
        train_net(resumed, loaded, range(2, 4), half(rank))
        return {"straight": outcome(optimizer), "resumed": outcome(loaded), "seed": loaded.seed}

    return case


def ddp(rank: int) -> dict[str, Any]:
    net = nn.parallel.DistributedDataParallel(Net())
    torch.manual_seed(rank)  # as the data loading of each process might want it
    optimizer = adamw(net.parameters())
    return {"norms": train_net(net, optimizer, range(3), half(rank)), **outcome(optimizer)}


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "adamw reference": tensors_case(adamw, "reference"),
    "quiet compiled": tensors_case(quiet, "compiled"),
    "adamw triton": tensors_case(adamw, "triton"),
    "adamw outer dimension": tensors_case(adamw, "reference", (WORLD, 1)),
    "adamw inner dimension": tensors_case(adamw, "reference", (1, WORLD)),
    "unclipped reference": tensors_case(unclipped, "reference"),
    "units reference": tensors_case(by_units, "reference"),
    "units triton": tensors_case(by_units, "triton"),
    "noise reference": tensors_case(noise, "reference"),
    "noise triton": tensors_case(noise, "triton"),
    "adamw partial gradients": partial_gradients,
    "columns": columns,
    "weight noise": lambda rank: perturbed_net(sharded(Net(), "first", "norm", "last")),
    "fsdp": fsdp,
    "checkpoint": checkpoint(full=False),
    "full checkpoint": checkpoint(full=True),
    "ddp": ddp,
    **{f"flat {name}": flat_case(name) for name in FLAT},
    "one perturbation": m_sharpness(True),
    "two perturbations": m_sharpness(False),
}


def main(rank: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(minutes=2)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timeout=patience, rank=rank, world_size=WORLD
    )
    for i, name in enumerate(names):
        try:
            result = CASES[name](rank)
        except Exception:
            result = {"error": traceback.format_exc()}
            print(f"case {name!r}", result["error"], flush=True)
        torch.save(result, folder / f"{i}.{rank}")
        torch.distributed.monitored_barrier()  # ends this process where the other is not in step
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
