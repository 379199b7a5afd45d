"""The kernel for experts, as Triton's interpreter runs it on a CPU, against PyTorch; on a GPU, as it is compiled."""

import importlib.util
import logging
import sys
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from samoe_hf.analysis.routing import route_all_to
from samoe_hf.model import expert_kernel, expert_layer
from samoe_hf.model.domain_experts import DomainLinear, use_domain
from samoe_hf.model.expert_layer import ExpertLinear
from samoe_hf.model.expert_sleep import ASLEEP, FrozenRows
from samoe_hf.model.joint_linear import run_jointly
from samoe_hf.model.kept import keep_between

triton = pytest.importorskip("triton", reason="Triton is for Linux")
backends, compiler = (importlib.import_module(f"triton.{name}") for name in ("backends.compiler", "compiler"))
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HALF = (torch.bfloat16, torch.float16)


def embedded(x: torch.Tensor) -> torch.Tensor:
    """The same numbers between others: what is read beside them is NaN, and what is written beside them is seen."""
    around = torch.full((x.numel() + 2000,), torch.nan, dtype=x.dtype, device=x.device)
    around[1000:-1000] = x.flatten()
    return around[1000:-1000].view(x.shape)


def assert_equals_pytorch(
    module: ModuleType, dtype, layers, tokens, inputs, outputs, experts, per_token, rank, device="cpu"
):
    """The kernel beside PyTorch in float32, of the same numbers."""
    torch.manual_seed(0)
    rows = layers * experts
    shapes = [(tokens, layers, outputs), (tokens, inputs), (rows * (1 + rank), inputs), (rows, 1)]
    before, *parts = (torch.randn(shape).to(device, dtype) for shape in [*shapes, (layers, experts * rank, outputs)])
    parts[1] *= inputs**-0.5
    with torch.inference_mode():
        exact, x, *weights = (x.float().clone() for x in (before.transpose(0, 1), *parts))
        expected = module.by_pytorch(exact, x, module.JoinedExperts(*weights, per_token, 0.3))
        found, (x, *weights) = embedded(before), map(embedded, parts)
        assert module.add_by_kernel(found.transpose(0, 1), x, module.JoinedExperts(*weights, per_token, 0.3))
    torch.testing.assert_close(found.transpose(0, 1), expected.to(dtype), **tolerance(dtype))
    around = torch.as_strided(found, (found.numel() + 2000,), (1,), 0)
    assert int(around.isnan().sum()) == 2000


def tolerance(dtype):
    return {"rtol": 1e-2, "atol": 1e-2} if dtype in HALF else {"rtol": 1e-4, "atol": 1e-4}


SIZES = [(3, 70, 33, 50, 10, 2, 4), (1, 32, 32, 32, 16, 4, 16), (2, 1, 7, 3, 2, 1, 1), (1, 33, 100, 1, 3, 3, 5)]


# As it is compiled. Once it is interpreted, Triton's modules are others.


@pytest.mark.parametrize(
    ("architecture", "dtype", "rank"), [pytest.param(80, "fp32", 4, marks=pytest.mark.slow), (90, "bf16", 16)]
)
def test_the_kernel_compiles_for_gpus_and_fits_them(architecture, dtype, rank, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = [parameter.name for parameter in expert_kernel.kernel.params]
    sizes = dict(zip(names[7:], (3, 256, 256, 10, rank, 2, 16, rank, expert_kernel.BLOCK, "ieee", False), strict=True))
    kinds = dict.fromkeys(names, f"*{dtype}") | {"num_tokens": "i32", "scaling": "fp32"}
    source = compiler.ASTSource(expert_kernel.kernel, kinds | dict.fromkeys(sizes, "constexpr"), sizes)
    compiled = triton.compile(source, target=backends.GPUTarget("cuda", architecture, 32), options={"num_stages": 2})
    assert compiled.asm["cubin"] and compiled.metadata.shared <= 2**16
    assert ("mma" in compiled.asm["ptx"]) == (dtype == "bf16")


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_compiled_kernel_equals_pytorch(dtype, sizes):
    assert_equals_pytorch(expert_kernel, dtype, *sizes, device="cuda")


# Interpreted


@pytest.fixture(scope="module")
def interpreted():
    """The module of the kernel as it is where `TRITON_INTERPRET=1` was set before Triton was imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in of_triton():
            patch.delitem(sys.modules, name)
        name = expert_kernel.__name__ + "_interpreted"
        spec = importlib.util.spec_from_file_location(name, expert_kernel.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.IS_INTERPRETED
        patch.setattr(expert_layer, "add_mixtures", module.add_mixtures)
        yield module
        for name in of_triton():
            del sys.modules[name]


def of_triton() -> list[str]:
    """Modules of Triton that are loaded. Its library in C++ cannot be loaded twice."""
    return [name for name in sys.modules if f"{name}.".startswith("triton.") and "._C" not in name]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_kernel_equals_pytorch(interpreted, dtype, sizes):
    assert_equals_pytorch(interpreted, dtype, *sizes)


FEW = ((1, 1), (2, 2), (5, 2), (5, 4), (10, 3), (16, 2), (16, 4))
MANY = [(n, k) for n in range(1, 17) for k in range(1, min(n, 4) + 1) if (n, k) not in FEW]


@pytest.mark.parametrize("experts, per_token", [*FEW, *(pytest.param(*x, marks=pytest.mark.slow) for x in MANY)])
def test_any_number_of_experts_and_any_k(interpreted, experts, per_token):
    assert_equals_pytorch(interpreted, torch.float32, 2, 33, 5, 6, experts, per_token, 3)


def layer(dtype=torch.float32, **changes) -> ExpertLinear:
    torch.manual_seed(0)
    settings = {"num_experts": 5, "num_experts_per_tok": 2, "lora_rank": 3, "lora_alpha": 6.0, **changes}
    made = ExpertLinear(9, 6, dtype=dtype, **settings).eval()
    nn.init.normal_(made.lora_B)
    return made


@pytest.fixture
def launches(interpreted, monkeypatch):
    """One entry for each time that the kernel is run."""
    calls, launch = [], interpreted.launch
    monkeypatch.setattr(interpreted, "launch", lambda *args: (calls.append(args), launch(*args)))
    monkeypatch.setattr(interpreted, "_agrees", {})
    return calls


def without_kernel(run):
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(expert_layer, "add_mixtures", expert_kernel.add_mixtures)
        return run()


def with_sleeper():
    made = layer()
    made.router.weight.data[3], made.router.bias.data[3] = 0, ASLEEP
    return made


def with_frozen_rows():
    made = layer()
    parametrize.register_parametrization(made, "lora_A", FrozenRows([1], made.lora_A))
    made.parametrizations.lora_A.original.data[1] = 7
    return made


def of_a_domain():
    made = DomainLinear.from_linear(nn.Linear(9, 6)).eval()
    made.add_domain("a", num_experts=5, num_experts_per_tok=2, lora_rank=3, lora_alpha=6.0)
    nn.init.normal_(made.domain_a.lora_B)
    return made


@pytest.mark.parametrize("make", [layer, with_sleeper, with_frozen_rows, of_a_domain])
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_put_out_the_same_with_the_kernel(launches, make, autocast):
    made, x = make(), torch.randn(2, 7, 9)

    def run():
        with use_domain("a"), torch.autocast("cpu", enabled=autocast):
            return made(x)

    with torch.inference_mode():
        found = run()
    assert len(launches) == 2  # the first is the comparison
    torch.testing.assert_close(found, without_kernel(run), **({"rtol": 0, "atol": 0.1} if autocast else {}))


def test_layers_of_one_input_take_one_launch(launches):
    layers, x = [layer(), layer()], torch.randn(2, 7, 9)
    nn.init.normal_(layers[1].lora_A)

    def run():
        return next(keep_between(run_jointly(layers, x) for _ in range(1)))

    with torch.inference_mode():
        found = run()
    assert len(launches) == 2 and launches[1][0].shape == (2, 14, 6)
    torch.testing.assert_close(found, without_kernel(run))


def test_of_equal_logits_the_first_are_taken(launches):
    made, x = layer(), torch.randn(4, 9)
    made.router.weight.data.zero_(), made.router.bias.data.zero_()
    with torch.inference_mode():
        found = made(x)
        both = sum(x @ made.lora_A[e].T @ made.lora_B[e].T for e in range(2))
    torch.testing.assert_close(found, nn.functional.linear(x, made.weight, made.bias) + made.scaling / 2 * both)


@pytest.mark.parametrize("kind", ["gradients", "watched", "float64", "wide", "no tokens"])
def test_where_the_kernel_is_not_for(launches, kind):
    made, x = layer(torch.float64 if kind == "float64" else torch.float32), torch.randn(4, 9)
    if kind == "wide":
        made = layer(lora_rank=17)
    x = x[:0] if kind == "no tokens" else x.to(made.weight.dtype)
    run = lambda: made(x)  # noqa: E731
    if kind == "gradients":
        found = run()
        assert found.requires_grad
    else:
        with torch.inference_mode(), route_all_to(made, 1) if kind == "watched" else nullcontext():
            found = run()
            expected = without_kernel(run)
        torch.testing.assert_close(found, expected)
    assert len(launches) == (2 if kind == "no tokens" else 0)


@pytest.mark.parametrize("fault", ["it differs", "RuntimeError: no compiler"])
def test_a_kernel_that_fails_is_not_used_and_a_warning_says_so(interpreted, monkeypatch, caplog, fault):
    def broken(outputs, *_):
        if fault.startswith("Runtime"):
            raise RuntimeError("no compiler")
        outputs += 1

    monkeypatch.setattr(interpreted, "launch", broken)
    monkeypatch.setattr(interpreted, "_agrees", {})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    made, x = layer(), torch.randn(4, 9)
    with torch.inference_mode():
        found = made(x), made(x)
    torch.testing.assert_close(found[1], without_kernel(lambda: made(x)))
    torch.testing.assert_close(found[0], found[1])
    assert [fault in record.message for record in caplog.records] == [True]
