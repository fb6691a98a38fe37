r"""Curvature kernels for Laplace posteriors, exact or Kronecker-factored: tensors in, tensors out.

This file is the reference of the ops. What holds for all of them:

- Inputs are bf16, fp16, fp32 or fp64, dense, with any strides. Results and accumulators are fp32, fp64 for fp64
  inputs; products accumulate in that precision. fp64 never mixes with the others.
- fp32 inputs are multiplied in fp32: the caller's autocast and `torch.set_float32_matmul_precision` do not reach an
  op.
- What is changed in place shares memory with no other argument.
- `mask` is a bool tensor, True where a row counts. A masked row is selected away, not multiplied by zero: NaN
  or infinity in it is harmless.
- Nothing is differentiable: the ops run without autograd, on inputs that may require a gradient.
- Nothing waits for the device: no value is read back, no row is gathered.
- Wrong arguments raise at the call, on the first argument that does not fit: `TypeError` for a type or a dtype,
  `ValueError` for a shape, a device, strides or shared memory. The message names the argument.
- Each op is also registered as `torch.ops.laplace_kernels.<op>` with a fake kernel, so that
  `torch.compile(fullgraph=True)` sees through a call. The registered op checks shared memory alone: call the
  function.

`use_backend` and the environment variable LAPLACE_KERNELS_BACKEND choose an implementation; `explain` says
which one serves and why. By default that is `reference`, plain PyTorch, on every device: the `triton` kernels
have not yet run on hardware.

An op from elsewhere has all of this too: `register_op(Op(...))`, then `call(op, ...)`; and a backend may get a
kernel for it, `register_kernel(backend, op, kernel)`. `laplace_kernels/ops/gram.py` is one to go by.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_kernels import cuda, ops, triton
from laplace_kernels.dispatch import (
    OPS,
    Backend,
    Choice,
    backends,
    call,
    explain,
    register_backend,
    register_kernel,
    register_op,
    unchecked,
    use_backend,
)
from laplace_kernels.halves import halves
from laplace_kernels.op import Op
from laplace_kernels.ops.checks import accumulation_dtype, members
from laplace_kernels.precision import FULL_PRECISION

__all__ = [
    "FULL_PRECISION",
    "OPS",
    "Backend",
    "Choice",
    "Op",
    "accumulation_dtype",
    "backends",
    "call",
    "explain",
    "gram_",
    "gram_group_",
    "gram_sketch_",
    "halves",
    "jacobian",
    "jacobian_stats",
    "kron_apply",
    "mirror_",
    "project_",
    "register_backend",
    "register_kernel",
    "register_op",
    "sums_in_fp32",
    "unchecked",
    "use_backend",
]

register_backend(cuda.BACKEND)
register_backend(triton.BACKEND)


def gram_(C: Tensor, X: Tensor, mask: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    r"""Add the Gram matrix of the rows of X to the lower triangle of C (a SYRK update).

    $C_{ij} \mathrel{+}= \alpha \sum_{t:\,mask_t} X_{ti} X_{tj}$ for $i \ge j$. This is the running Kronecker
    factor of KFAC (Martens and Grosse 2015, arXiv:1503.05671) for activations or output gradients X.

    The strictly upper triangle of C is unspecified afterwards; `mirror_` fills it once the accumulation is
    over.

    Args:
        C: [d, d], fp32 (fp64 if X is fp64), contiguous rows. Changed in place.
        X: [T, d], bf16, fp16, fp32 or fp64. T may be 0.
        mask: [T] bool, True where a row counts. None keeps all.
        alpha: Weight of this update.

    Returns:
        C.

    Raises:
        TypeError: A dtype is wrong, or alpha is no number.
        ValueError: A shape, device or stride does not fit, or C shares memory with an input.
    """
    call(ops.gram.OP, C, X, mask, alpha)
    return C


def gram_sketch_(
    Y: Tensor, X: Tensor, Omega: Tensor, mask: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    r"""Add the sketched Gram matrix $X^T X \Omega$ to Y, without the Gram matrix.

    $Y \mathrel{+}= \alpha \sum_{t:\,mask_t} X_t^T (X_t \Omega)$. Linear in the data: sketches of batches and
    ranks add up. A PSD approximation of rank k is recovered from Y and Omega by the Nystrom method (Tropp,
    Yurtsever, Udell and Cevher 2017, arXiv:1706.05736).

    Args:
        Y: [d, m], fp32 (fp64 if X is fp64), contiguous rows. Changed in place.
        X: [T, d], bf16, fp16, fp32 or fp64. T may be 0.
        Omega: [d, m] test matrix, any of these dtypes (fp64 if X is); used at its own precision, to which a GPU
            backend may round X Omega: pass fp32 for a sketch to fp32 accuracy.
        mask: [T] bool, True where a row counts. None keeps all.
        alpha: Weight of this update.

    Returns:
        Y.

    Raises:
        TypeError: A dtype is wrong, or alpha is no number.
        ValueError: A shape, device or stride does not fit, or Y shares memory with an input.
    """
    call(ops.gram_sketch.OP, Y, X, Omega, mask, alpha)
    return Y


def gram_group_(
    Cs: Sequence[Tensor],
    Xs: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None = None,
    alphas: Sequence[float] | None = None,
) -> None:
    """`gram_` for many matrices at once: a whole model's flush, or many small ones.

    Not for capture in a CUDA graph: the Triton backend reads addresses from host memory at each call.

    Args:
        Cs: The accumulators, each as in `gram_`. No two may share memory. Changed in place.
        Xs: The rows, each as in `gram_`, of any shapes, all of one dtype and on one device.
        masks: A mask or None for each. None keeps all rows of all.
        alphas: The weight of each update. None is 1 for all.

    Raises:
        TypeError: A dtype is wrong, or a member of alphas is no number.
        ValueError: The sequences differ in length, a shape, device or stride does not fit, or a member of Cs shares
            memory with another one or with an input.
    """
    Cs, Xs = members("Cs", Cs), members("Xs", Xs)
    masks = [None] * len(Cs) if masks is None else members("masks", masks)
    alphas = [1.0] * len(Cs) if alphas is None else members("alphas", alphas)
    if Cs or Xs or masks or alphas:
        call(ops.gram_group.OP, Cs, Xs, masks, alphas)


def project_(Z: Tensor, X: Tensor, W: Tensor) -> Tensor:
    r"""Write X W to Z: a stream of rows times a thin matrix, with fp32 sums and no fp32 copy of the stream.

    Args:
        Z: [T, n], fp32 (fp64 if X is fp64), contiguous rows. Overwritten.
        X: [T, d], bf16, fp16, fp32 or fp64. T may be 0.
        W: [d, n], any of these dtypes (fp64 if X is). Used at its own precision: beside a 16-bit X a fp32 W is
            multiplied as two halves (see `halves`); columns given as halves in the dtype of X save making them.

    Returns:
        Z.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape, device or stride does not fit, or Z shares memory with an input.
    """
    call(ops.project.OP, Z, X, W)
    return Z


def jacobian(small: Tensor, large: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Jacobians of a LoRA weight: $J_n = \sum_{t:\,mask_{nt}} small_{nt} \otimes large_{nt}$.

    Args:
        small: [N, T, r]: output gradients of lora_A, or inputs of lora_B. Used at its own precision.
        large: [N, T, d]: inputs of lora_A, or output gradients of lora_B; of 16 bits it is not copied to fp32 where the
            library sums its products in fp32.
        mask: [N, T] bool, True where a token counts. None keeps all.

    Returns:
        [N, r, d], fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape or device does not fit.
    """
    out: Tensor = call(ops.jacobian.OP, small, large, mask)
    return out


def jacobian_stats(
    small: Tensor, large: Tensor, basis: Tensor, mask: Tensor | None = None, row_grams: bool = True
) -> tuple[Tensor, Tensor | None]:
    r"""Statistics of per-example Jacobians of a LoRA weight that give the linearised predictive covariance.

    The Jacobian of output c of example n with respect to a weight, in a rotated row basis, is

    $Jt_{nc} = \sum_{t:\,mask_{nt}} small_{nct} \otimes large_{nct}$, an [r, d] matrix that is not kept.
    Computed from it are

    $P_{nc} = Jt_{nc}\, basis$ and $D_{njcc'} = \langle Jt_{nc,j}, Jt_{nc',j} \rangle$ for each row j.

    With basis = U of a factor U S U^T + tau (I - U U^T) these are all that the covariance of the logits
    needs. It is the low-rank covariance of Laplace-LoRA (Yang, Robeyns, Wang and Aitchison 2024,
    arXiv:2308.13111) with a tail.

    Args:
        small: [N, Cs, T, r]: output gradients of lora_A, or inputs of lora_B, rotated.
        large: [N, Cl, T, d]: inputs of lora_A, or output gradients of lora_B. Cs and Cl are C or 1; a class
            axis of 1 is shared by all classes.
        basis: [d, k].
        mask: [N, T] bool, True where a token counts, for `small` and `large` alike. None keeps all.
        row_grams: Whether to compute D. An orthogonal basis (k = d) does not need it: D is then P P^T row by
            row.

    Returns:
        P [N, C, r, k], and D [N, r, C, C] or None; fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape or device does not fit.
    """
    P, D = call(ops.jacobian_stats.OP, small, large, basis, mask, row_grams)
    return P, D if row_grams else None


def kron_apply(W: Tensor, U: Tensor, V: Tensor, core: Tensor, tail: Tensor) -> Tensor:
    r"""Apply a function of a low-rank-plus-tail Kronecker operator to a batch of matrices.

    $f(H) W = V\,[\,core \odot (V^T W U)\,]\,U^T + V\,\mathrm{diag}(tail)\,V^T W (I - U U^T)$

    for $H W = V \mathrm{diag}(t) V^T\, W\, (U \mathrm{diag}(s) U^T + \tau (I - U U^T)) + \lambda W$: core [j,
    i] is f at $s_i t_j + \lambda$ and tail [j] is f at $\tau t_j + \lambda$. With $f = x^{-1/2}$ white noise
    becomes posterior samples (Ritter, Botev and Barber 2018, "A scalable Laplace approximation for neural
    networks"); with $f = x^{-1}$ it solves.

    Args:
        W: [B, r, d].
        U: [d, k], orthonormal columns, k at most d.
        V: [r, r], orthogonal.
        core: [r, k].
        tail: [r]. Without effect when k = d.

    Returns:
        [B, r, d], fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape or device does not fit.
    """
    out: Tensor = call(ops.kron_apply.OP, W, U, V, core, tail)
    return out


def sums_in_fp32(X: Tensor) -> bool:
    """Whether the library multiplies X, of 16 bits, with 16-bit matrices and sums in fp32, without a fp32 copy of X.

    So cuBLAS does. What is to be multiplied with such an X at a higher precision had better be given as `halves`.
    """
    return ops.blocks.sums_in_fp32(X)


def mirror_(C: Tensor) -> Tensor:
    """Copy the lower triangle of C [d, d] to the upper one in place, after the last `gram_`.

    Args:
        C: [d, d], any float dtype and strides. What its strictly upper triangle holds is not read.

    Returns:
        C.

    Raises:
        TypeError: C is not a float tensor.
        ValueError: C is not square.
    """
    ops.mirror.check(C)
    with torch.no_grad():
        ops.mirror.reference(C)
    return C
