"""A prebuilt causal-conv1d is loaded at the locked revision, from the local cache alone, or the reason is given."""

import json
import socket
import sys

import pytest

from ssmttm.model import kernels
from ssmttm.model.prebuilt import REPOSITORY, at_import, load_prebuilt

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODULES = {
    "__init__.py": "from .cpp_functions import causal_conv1d_fwd_function as causal_conv1d_fn",
    "cpp_functions.py": (
        "def causal_conv1d_fwd_function(x): return x\n"
        "causal_conv1d_bwd_function = causal_conv1d_update_function = causal_conv1d_fwd_function"
    ),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the package `kernels` that holds a build for any torch, on a machine without network."""
    resolver = pytest.importorskip("kernels.resolver")
    monkeypatch.setattr(resolver, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    for backend in ("cpu", "cuda"):
        build = (
            tmp_path / f"kernels--{REPOSITORY.replace('/', '--')}/snapshots/{COMMIT}/build/torch-{backend}"
        )
        build.mkdir(parents=True)
        facts = {
            "id": f"_conv_{tmp_path.name}",
            "name": "causal-conv1d",
            "version": 1,
            "license": "BSD-3-Clause",
        }
        metadata = json.dumps({**facts, "backend": {"type": backend}, "python-depends": []})
        for name, text in {**MODULES, "metadata.json": metadata}.items():
            (build / name).write_text(text, encoding="utf-8")
    return tmp_path


def lock(cache, commit=COMMIT, repository=REPOSITORY):
    """Write a lock file as `kernels lock` does; returns its path."""
    path = cache / "kernels.lock"
    entry = {"dependency": {"repo-id": repository, "version": 1}, "lock": {"commit": commit}}
    path.write_text(json.dumps([entry]), encoding="utf-8")
    return path


def test_the_locked_revision_is_loaded_without_network_and_named(cache):
    module, name = load_prebuilt(lock(cache))
    assert module.causal_conv1d_fn(3) == 3
    assert name == "kernels-community/causal-conv1d at 0123456789ab"


def test_mamba_ssm_imports_the_prebuilt_one_and_later_imports_do_not(cache):
    module, _ = load_prebuilt(lock(cache))
    before = sys.modules.get("causal_conv1d")
    with at_import(module):
        from causal_conv1d import causal_conv1d_fn
        from causal_conv1d.cpp_functions import causal_conv1d_bwd_function

        assert causal_conv1d_fn(3) == causal_conv1d_bwd_function(3) == 3
    assert sys.modules.get("causal_conv1d") is before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"commit": "f" * 40},
            "FileNotFoundError: Cannot find a local snapshot for kernels-community/causal-conv1d",
        ),
        ({"commit": "main"}, "ValueError: Cannot parse KernelLocks: Invalid git object id"),
        (
            {"repository": "kernels-community/other"},
            "ValueError: Kernel `kernels-community/causal-conv1d` is not lock",
        ),
    ],
)
def test_what_the_cache_or_the_lock_lacks_is_said_in_one_line(cache, changes, said):
    if kernels._convolution(None)[0] is not None:
        pytest.skip("causal-conv1d is installed")
    module, _, reason = kernels._convolution(lock(cache, **changes))
    assert module is None
    assert reason.startswith(
        f"causal-conv1d is not installed; SSMSCALE_KERNELS: {cache}/kernels.lock: {said}"
    )
    assert "\n" not in reason
