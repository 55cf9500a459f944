"""Kernels and PyTorch compute the same model, gradients and all, from the same parameters."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ssmttm.errors import InputError
from ssmttm.model import kernels
from ssmttm.model.architecture import ARCHITECTURES
from ssmttm.model.conv import causal_conv_silu
from ssmttm.model.kernels import TORCH, Kernels
from ssmttm.model.layers.mamba2 import Mamba2Mixer
from ssmttm.model.layers.sub_layer import Context
from ssmttm.model.loss import codebook_cross_entropy
from ssmttm.model.ssd import ssd_scan
from tests.gpu.kernels import compared
from tests.gpu.sizes import FULL
from tests.ssmttm.kernel_devices import FOLDER, compiled_convolution, kernels_on, using
from tests.ssmttm.model.test_ssd import inputs
from tests.ssmttm.small import logits_by_steps, small_config, small_model, text_for, tokens_for

DEVICES = [pytest.param("cpu", marks=pytest.mark.verify), pytest.param("cuda", marks=pytest.mark.gpu)]
# A GPU multiplies float32 as TF32.
FLOAT32 = {"cpu": 2e-5, "cuda": 1e-2}
HALF = {"cpu": torch.float16, "cuda": torch.bfloat16}
"""The interpreter multiplies the bits of bfloat16 as if they were integers."""
HALF_TOLERANCE = 3e-2
PARTS = {"fused": {}, "apart": {"mixer": None}, "scan alone": {"mixer": None, "convolution": None}}


@pytest.fixture(scope="module", params=DEVICES)
def all_kernels(request):
    with kernels_on(request.param) as found:
        yield found


def assert_near(ours, theirs, within):
    """Compare tensors by name."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        found, expected = tensor.detach().float(), theirs[name].detach().float()
        assert found.shape == expected.shape
        worst = float((found - expected).norm()) / max(float(expected.norm()), 1e-12)
        assert worst < within, f"{name}: {worst:.1e}"


@pytest.mark.parametrize("shape", [(2, 40, 4, 16, 2, 16, 16), (1, 13, 2, 8, 1, 5, None)])
def test_the_scan_agrees_in_outputs_states_and_gradients(all_kernels, shape):
    device, within = all_kernels.device, FLOAT32[all_kernels.device]
    *sizes, chunk = shape
    arguments = [tensor.detach().to(device).requires_grad_() for tensor in inputs(*sizes)]

    def run(which):
        with using(which):
            got = ssd_scan(*arguments[:-1], chunk_size=chunk, initial_state=arguments[-1])
            torch.manual_seed(1)
            upstream = [torch.randn(tensor.shape).to(device) for tensor in got]
            return dict(enumerate([*got, *torch.autograd.grad(got, arguments, upstream)]))

    assert_near(run(all_kernels), run(TORCH), within)


@pytest.mark.parametrize(
    ("parts", "changes", "half"),
    [
        ("fused", {}, False),
        ("fused", {"n_groups": 2, "d_conv": 3, "d_state": 8}, False),
        ("apart", {}, False),
        ("apart", {"d_conv": 5}, False),  # more taps than causal-conv1d supports
        ("apart", {"d_model": 36, "ssm_head_dim": 12}, False),  # rows whose width is no multiple of 8
        ("scan alone", {"n_groups": 2}, False),
        ("fused", {}, True),
        ("scan alone", {}, True),
    ],
)
def test_a_mixer_agrees_under_masks(all_kernels, parts, changes, half):
    config = small_config("prefix_mamba", **changes)
    device = all_kernels.device
    torch.manual_seed(0)
    mixer = Mamba2Mixer(config).to(device)
    x = torch.randn(2, 37, config.d_model, device=device, requires_grad=True)
    mask = torch.ones(2, 37, dtype=torch.bool, device=device)
    mask[0, :5] = mask[1, 7] = False

    def run(which):
        with using(which), torch.autocast(device, HALF[device], enabled=half):
            y = mixer(x, Context(mask=mask))
        y = y * mask[..., None]  # outputs at masked positions are undefined
        torch.manual_seed(1)
        upstream = torch.randn(y.shape).to(y)
        gradients = torch.autograd.grad(y, (x, *mixer.parameters()), upstream)
        return y, dict(zip(["x", *(name for name, _ in mixer.named_parameters())], gradients, strict=True))

    (got, gradients), (expected, expected_gradients) = run(replace(all_kernels, **PARTS[parts])), run(TORCH)
    within = HALF_TOLERANCE if half else FLOAT32[device]
    assert got.dtype == expected.dtype
    assert_near({"y": got, **gradients}, {"y": expected, **expected_gradients}, within)


@pytest.mark.gpu
def test_a_mixer_agrees_at_the_shape_of_the_study():
    with kernels_on("cuda") as found:
        for agrees, text in compared(FULL, found):
            assert agrees, text


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.is_recurrent])
def test_a_model_agrees_in_its_loss_and_gradients(all_kernels, architecture, half):
    device = all_kernels.device
    if half and HALF[device] == torch.float16:
        pytest.skip("gradients of a loss need the range of bfloat16, which the interpreter does not multiply")
    within = HALF_TOLERANCE if half else FLOAT32[device]
    config = small_config(architecture, n_codebooks=2)
    model = small_model(config).to(device)
    text = text_for(config, ["calm piano", "a long caption of strings"], [True, False]).to(device)
    tokens = tokens_for(config, 2, 21).to(device)

    def run(which):
        with using(which):
            with torch.autocast(device, HALF[device], enabled=half):
                logits = model(tokens, text)
            losses, _ = codebook_cross_entropy(logits, tokens)
        model.zero_grad()
        losses.sum().backward()
        return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (got, gradients), (expected, expected_gradients) = run(all_kernels), run(TORCH)
    assert_near({"losses": got}, {"losses": expected}, within)
    assert_near(gradients, expected_gradients, 10 * within)


@pytest.mark.parametrize("changes", [{}, {"n_groups": 2, "d_state": 8, "ssm_head_dim": 8}])
def test_steps_agree_with_the_parallel_pass(all_kernels, changes):
    device = all_kernels.device
    config = small_config("prefix_simba", **changes)
    model, tokens = small_model(config).to(device), tokens_for(config, 2, 9).to(device)
    text = text_for(config, ["calm piano", "x"]).to(device)
    with using(TORCH), torch.inference_mode():
        expected = model(tokens, text)
    with using(all_kernels):
        assert_near({"logits": logits_by_steps(model, tokens, text)}, {"logits": expected}, FLOAT32[device])


@pytest.fixture
def unchosen():
    """Forget the choice of the process before and after the test."""
    kernels.chosen.cache_clear()
    yield
    kernels.chosen.cache_clear()


def test_without_a_gpu_pytorch_computes_mixers_with_a_reason(monkeypatch, unchosen):
    monkeypatch.delenv("SSMSCALE_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.chosen() == Kernels(name="torch", reason="no CUDA device")


def test_the_choice_can_be_kept_to_pytorch(monkeypatch, unchosen):
    monkeypatch.setenv("SSMSCALE_KERNELS", "torch")
    assert kernels.chosen() == Kernels(reason="SSMSCALE_KERNELS is torch")
    kernels.chosen.cache_clear()
    monkeypatch.setenv("SSMSCALE_KERNELS", "fast")
    with pytest.raises(
        InputError, match=r"SSMSCALE_KERNELS: 'fast': must be torch, the path of a kernels\.lock"
    ):
        kernels.chosen()


def test_a_missing_package_is_named():
    if kernels.load("cuda").scan is not None:
        pytest.skip("mamba-ssm is installed")
    assert kernels.load("cuda") == Kernels(reason="mamba-ssm is not installed", misses_package=True)
    assert "mamba_ssm" not in sys.modules


@pytest.mark.verify
def test_without_any_compiled_part_the_scan_is_found_and_the_convolution_missed():
    if not FOLDER.is_dir():
        pytest.skip(f"no mamba-ssm in {FOLDER}: make verify installs it")
    program = (
        f"import sys; sys.path.append({str(FOLDER)!r}); from ssmttm.model.kernels import load; found = load('cuda')\n"
        "print(found.name.split()[0], found.scan is not None, found.mixer, found.reason, sep='|')\n"
        "import mamba_ssm"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("mamba-ssm|True|None|causal-conv1d ")
    assert "No module named 'causal_conv1d_cuda'" in done.stdout
    assert "No module named 'selective_scan_cuda'" in done.stderr  # the package raises its own error


def test_tensors_of_another_device_are_left_to_pytorch():
    with using(Kernels(name="other", device="cuda", scan=lambda *_, **__: pytest.fail("called"))):
        y, _ = ssd_scan(*inputs(1, 5, 2, 4, 1, 3)[:-1])
    assert y.shape == (1, 5, 2, 4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1)])
def test_a_slice_of_any_length_reaches_the_convolution_with_valid_strides(shape):
    projected, weight, bias = torch.randn(*shape, 20), torch.randn(8, 1, 4), torch.randn(8)

    def kernel(x, weight, bias, *, activation):
        out = torch.empty_like(x)
        compiled_convolution().causal_conv1d_fwd(x, weight, bias, None, None, out, None, activation == "silu")
        return out

    with using(Kernels(device="cpu", convolution=kernel)):
        found = causal_conv_silu(projected[..., 4:12], weight, bias)
    torch.testing.assert_close(found, causal_conv_silu(projected[..., 4:12], weight, bias))
