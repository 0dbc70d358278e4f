"""Triton kernels of a program's own, as torch's tests have them: past any dispatcher, launches read and write what is pending."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kitsune
from tests.chaos.counting import Counts

N, BLOCK = 96, 32
Launched = Callable[[Any, Tensor, Tensor, Tensor], Any]


def of_two(kernel: Any, x: Tensor, y: Tensor, out: Tensor) -> None:
    kernel[(N // BLOCK,)](x, y, out, N, BLOCK_SIZE=BLOCK)


def tuned(kernel: Any, x: Tensor, y: Tensor, out: Tensor) -> None:
    # What a tuned kernel is tried with it writes each time.
    kernel[lambda meta: (-(-N // meta["BLOCK_SIZE"]),)](x, y, out, N)


def of_one(kernel: Any, x: Tensor, y: Tensor, out: Tensor) -> None:
    kernel[(N // BLOCK,)](x, out, N, BLOCK_SIZE=BLOCK)


def of_none(kernel: Any, x: Tensor, y: Tensor, out: Tensor) -> None:
    kernel[(N // BLOCK,)](out, N, BLOCK_SIZE=BLOCK)


def of_numbers(kernel: Any, x: Tensor, y: Tensor, out: Tensor) -> None:
    x, y = x.to(torch.int32), y.to(torch.int32)
    found = torch.zeros_like(x)
    kernel[(1,)](x[:BLOCK], y[:BLOCK], found[:BLOCK], 16, BLOCK=BLOCK)
    out.copy_(found)


def strided(kernel: Any, x: Tensor, y: Tensor, out: Tensor) -> None:
    rows, found = x.view(8, 12)[:, :8], out.view(8, 12)[:, :8]
    kernel[(1, 2)](rows, found, rows.stride(0), found.stride(0), X_BLOCK_SIZE=8, Y_BLOCK_SIZE=4)


def tuned_in_two_dimensions(kernel: Any, x: Tensor, y: Tensor, out: Tensor) -> None:
    square, found = x[:81].view(9, 9), out[:81].view(9, 9)
    grid = lambda meta: (-(-9 // meta["BLOCK_SIZE_X"]), -(-9 // meta["BLOCK_SIZE_Y"]))  # noqa: E731
    kernel[grid](square, square, found, 9, 9)


def described(kernel: Any, x: Tensor, y: Tensor, out: Tensor) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    kernel[(N // BLOCK,)](*(TensorDescriptor.from_tensor(t, [BLOCK]) for t in (x, y, out)), BLOCK_SIZE=BLOCK)


LAUNCHES: dict[str, Launched] = {
    "add_kernel": of_two,
    "sub_kernel": of_two,
    "add_kernel_with_optional_param": lambda k, x, y, out: k[(3,)](x, None, out, N, ARGS_PASSED="one", BLOCK_SIZE=BLOCK),
    "add_kernel_with_none_param_and_equal_to_1_arg": lambda k, x, y, out: k[(3,)](
        x, y, out, N, 1, ARGS_PASSED="two", BLOCK_SIZE=BLOCK
    ),
    "add_kernel_autotuned": tuned,
    "sub_kernel_autotuned": tuned,
    "add_kernel_autotuned_weird_param_order": lambda k, x, y, out: k[lambda meta: (6,)](x, y, N, out_ptr=out),
    "add_kernel_2d_autotuned": tuned_in_two_dimensions,
    "add_kernel_autotuned_with_unsupported_args": tuned,
    "add_kernel_with_scaling": lambda k, x, y, out: k[(3,)](x, y, out, N, 2.5, BLOCK_SIZE=BLOCK),
    "add_kernel_with_tma_1d_new_api": described,
    "mul2_kernel": of_one,
    "mul2_inplace_kernel": lambda k, x, y, out: k[(3,)](x, N, BLOCK_SIZE=BLOCK),
    "indirection_kernel": lambda k, x, y, out: k[(3,)](x, out, N, BLOCK_SIZE=BLOCK, ACTIVATION="mul2_inplace_kernel"),
    "double_strided_kernel": strided,
    "inline_asm_kernel_is_pure_true": of_numbers,
    "inline_asm_kernel_is_pure_false": of_numbers,
    "add_kernel_with_block_ptr": of_two,
    "kernel_with_block_ptr_2d": of_one,
    "add_kernel_with_import": of_two,
    "cond_op_kernel": of_two,
    "atomic_add_kernel": of_two,
    "add_4_times_kernel": of_two,
    "add_kernel_out_of_order_fn2": lambda k, x, y, out: k[(3,)](x, y, N, out, BLOCK_SIZE=BLOCK),
    "kernel_with_docstring_double_quotes": of_none,
    "kernel_with_docstring_single_quotes": of_none,
    "kernel_with_backslash_in_docstring": of_none,
    "kernel_inline_asm_double_quotes": of_one,
    "kernel_inline_asm_single_quotes": of_one,
    "add_kernel_with_boolean_param": lambda k, x, y, out: k[(3,)](x, y, out, N, True, BLOCK_SIZE=BLOCK),
    "masked_add_kernel_with_bool_tensor": lambda k, x, y, out: k[(3,)](x, y, x > y, out, N, BLOCK_SIZE=BLOCK),
}
# Called by another one, for another device, or with several results for one address.
OTHERS = {"zero_negs", "kernel_inline_asm_rocm_double_quotes", "kernel_inline_asm_rocm_single_quotes"}
OTHERS |= {"strange_config_matmul_kernel"}


def kernels() -> dict[str, Any]:
    """Those of torch, by their names; later versions have more of them."""
    pytest.importorskip("triton")
    with warnings.catch_warnings():
        # What it imports is deprecated from Python 3.12 on.
        warnings.simplefilter("ignore")
        from torch.testing._internal import triton_utils

    return {
        name: kernel for name, kernel in vars(triton_utils).items() if hasattr(kernel, "warmup") or hasattr(kernel, "configs")
    }


def program_of(name: str, kernel: Any, device: str) -> Callable[[Callable[[], Any]], list[Tensor]]:
    def program(context: Callable[[], Any]) -> list[Tensor]:
        a, b = torch.linspace(-2, 2, N, device=device), torch.linspace(1, 5, N, device=device)
        written, seen = torch.zeros(N, device=device), []
        with context():
            for i in range(5):
                x, y, out = a * (i + 1), b + i, torch.zeros_like(a) + 0.5
                # A result, and a tensor that the program has from before and that has a pending write.
                LAUNCHES[name](kernel, x, y, out)
                written.add_(out)
                LAUNCHES[name](kernel, written, x, out)
                a.add_(0.25)
                seen += [out * 2, x + 1, y.clone(), written.clone()]
        return [*seen, a, b, written]

    return program


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_sees_what_is_pending(name: str, counts: Counts) -> None:
    kernel = kernels().get(name)
    if kernel is None:
        pytest.skip("this version of torch has no such kernel")
    for warmup in (0, 1):
        program = program_of(name, kernel, "cuda")
        counts.check(f"{name}, warmup {warmup}", program, lambda warmup=warmup: kitsune.accelerate(warmup=warmup, device="cuda"))
    assert kitsune.counters()["flushed"]["DOOR"] > 0


@pytest.mark.gpu
def test_every_kernel_of_torchs_is_launched() -> None:
    assert {name for name in kernels() if "_tma_" not in name} <= LAUNCHES.keys() | OTHERS
