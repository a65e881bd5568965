"""Models inside wrappers of other libraries are accepted like plain ones."""

import pytest
import torch
from torch import nn
from torch.distributed import fsdp

import fastreg
from fastreg.losses.r_drop import shifts

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # of PEFT
]


@pytest.fixture(scope="module", autouse=True)
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager"
    )
    return transformers.GPT2LMHeadModel(config)


def with_adapters(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True))


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "compiled DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
    "FSDP": lambda model: fsdp.FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu")
    ),
    "PEFT": with_adapters,
    "DDP of PEFT": lambda model: nn.parallel.DistributedDataParallel(with_adapters(model)),
}


@pytest.fixture(params=WRAPPERS)
def wrapped(request, gpt2):
    return WRAPPERS[request.param](gpt2)


def test_fgm_moves_the_embeddings(wrapped, gpt2):
    embeddings = gpt2.get_input_embeddings()
    assert fastreg.FGM(wrapped).parameters == list(embeddings.parameters())
    assert fastreg.FGM(wrapped, modules=r"wte\.weight$").parameters == list(embeddings.parameters())


def test_dropout_is_set_and_removed(wrapped, gpt2):
    table = fastreg.layerwise.set_dropout(wrapped, 0.3)
    assert {row.rate for row in table} == {0.3}
    assert gpt2.transformer.h[0].mlp.dropout.p == 0.3
    fastreg.layerwise.remove(wrapped)
    assert gpt2.transformer.h[0].mlp.dropout.p == 0.1


def test_r_drop_knows_language_models(wrapped):
    assert shifts(wrapped)


@pytest.mark.parametrize("name", ["compiled", "DataParallel", "DDP", "compiled DDP"])
def test_attacks(name):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.rand(4, 3, 4), torch.tensor([0, 1, 2, 0])
    wrapped = WRAPPERS[name](model)
    for attack in (fastreg.fgsm, fastreg.pgd):
        torch.manual_seed(0)
        expected = attack(model, x, y, 0.1)
        torch.manual_seed(0)
        torch.testing.assert_close(attack(wrapped, x, y, 0.1), expected)
