"""The Jacobian regulariser: contraction of any vector field along given states, without ever forming a Jacobian.

``J`` is the Jacobian of one sample's vector field. All that is used of ``J + J'`` are its products with vectors, one
forward-mode (``J v``) and one reverse-mode (``J' v``) product each, fed to Lanczos' iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robust_node_fast import _checks

__all__ = ["jacobian_penalty", "symmetric_jacobian_eigenvalue"]

VectorField = Callable[[Tensor], Tensor]


def symmetric_jacobian_eigenvalue(
    vector_field: VectorField, z: Tensor, *, n_iter: int = 24, generator: torch.Generator | None = None
) -> Tensor:
    """``lambda_max(J + J')`` of ``vector_field`` at every state of a batch, by Lanczos' iteration.

    The value is the Rayleigh quotient ``2 <v, J v>`` of the best vector ``v`` found: exact once ``n_iter`` reaches the
    number of distinct eigenvalues, and never above the true eigenvalue before. It is therefore a training signal and
    not a certificate. The gradient is the first-order formula ``v' (dJ + dJ') v`` with ``v`` held fixed, which is
    exact for the exact ``v`` of a simple eigenvalue; for a multiple eigenvalue it is one of the sub-gradients.

    Args:
        vector_field: maps ``(B, ...)`` to ``(B, ...)`` sample by sample: output ``i`` depends on state ``i`` alone (no
            batch norm in training mode), and two calls give the same result (no dropout). Made of operations that have
            forward-mode derivatives; ``functools.partial(flow.vector_field, t)`` of an ``EulerConvFlow`` is one.
        z: states ``(B, ...)``, float32 or float64.
        n_iter: Krylov dimension, one product with ``J + J'`` each; capped at the dimension of a state. Memory is
            ``n_iter`` times that of ``z``.
        generator: of the random start vectors; the default generator of the device when left out.

    Returns:
        ``(B,)``, differentiable in ``z`` and in what ``vector_field`` closes over. NaN for a sample whose Jacobian is
        not finite. Runs in the precision of ``z``, also under autocast.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: arXiv 2508.11432, Eq. (5); Lanczos with full reorthogonalisation as in Golub and Van Loan, section 10.3.
    """
    _check_callable("vector_field", vector_field)
    _check_states("z", z, 2, "(B, ...)")
    _checks.count("n_iter", n_iter)
    with torch.autocast(z.device.type, enabled=False):
        v = _leading_vector(vector_field, z.detach(), n_iter, generator)
        return 2.0 * _dot(v, torch.func.jvp(vector_field, (z,), (v,))[1])


def jacobian_penalty(
    vector_field: VectorField | Sequence[VectorField],
    states: Tensor,
    *,
    rate: float,
    n_iter: int = 24,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean over samples and trajectory points of ``relu(rate + lambda_max(J + J'))``.

    That is ``relu(-lambda_min(Gamma))`` with ``Gamma = -rate I - J - J'``; where it is zero the differential equation
    contracts in the 2-norm at ``rate / 2`` near that state (up to Lanczos' error, see
    ``symmetric_jacobian_eigenvalue``).

    Args:
        vector_field: one for all points, called with all ``T * B`` states at once; or a sequence of ``T``, one per
            point, for a field that changes in time. Each as in ``symmetric_jacobian_eigenvalue``.
        states: trajectory ``(T, B, ...)``, as the flows return it; ``z.unsqueeze(0)`` for a single batch of states.
        rate: wanted contraction rate ``rho``.
        n_iter, generator: as in ``symmetric_jacobian_eigenvalue``.

    Returns:
        A scalar, differentiable in ``states`` and in what ``vector_field`` closes over; 0 for no states at all.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Source: arXiv 2508.11432, Eq. (5).
    """
    _check_states("states", states, 3, "(T, B, ...)")
    _checks.number("rate", rate)
    if isinstance(vector_field, Sequence):
        if len(vector_field) != states.shape[0]:
            raise ValueError(
                f"vector_field has length {len(vector_field)}, expected {states.shape[0]}: one per point of "
                f"states {tuple(states.shape)}"
            )
        pairs = list(zip(vector_field, states, strict=True))
    else:
        pairs = [(vector_field, states.flatten(0, 1))]
    excess = [
        (rate + symmetric_jacobian_eigenvalue(field, z, n_iter=n_iter, generator=generator)).relu()
        for field, z in pairs
    ]
    return torch.cat([*excess, states.new_zeros(0)]).sum() / max(1, states.shape[0] * states.shape[1])


@torch.no_grad()
def _leading_vector(field: VectorField, z: Tensor, n_iter: int, generator: torch.Generator | None) -> Tensor:
    """Unit Ritz vectors, shaped like ``z``, of the largest eigenvalue of ``J + J'``: one Krylov space a sample."""
    product = _symmetric_product(field, z)
    batch, dimension = z.shape[0], z.shape[1:].numel()
    steps = min(n_iter, dimension)
    tolerance = 10.0 * dimension**0.5 * torch.finfo(z.dtype).eps
    start = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator).flatten(1)
    basis = z.new_zeros(batch, steps, dimension)
    alpha, beta = z.new_zeros(batch, steps), z.new_zeros(batch, steps)
    scale = z.new_zeros(batch)
    alive = torch.ones(batch, dtype=torch.bool, device=z.device)
    q = start / start.norm(dim=1, keepdim=True)
    for k in range(steps):
        basis[:, k] = q
        w = product(q.view(z.shape)).flatten(1)
        along = (q * w).sum(1)
        # Once the Krylov space is exhausted q is zero. Its row of the tridiagonal matrix must not win: it gets a value
        # strictly below alpha[0], which is itself at most the largest eigenvalue.
        alpha[:, k] = along if k == 0 else torch.where(alive, along, alpha[:, 0] - alpha[:, 0].abs() - 1.0)
        for _ in range(2):  # Gram-Schmidt twice keeps the basis orthogonal to rounding
            w = w - torch.einsum("bkn,bk->bn", basis[:, : k + 1], torch.einsum("bkn,bn->bk", basis[:, : k + 1], w))
        length = w.norm(dim=1)
        scale = torch.maximum(scale, along.abs() + length)
        alive = alive & ~(length <= tolerance * scale)  # a NaN stays alive, to be seen below
        beta[:, k] = torch.where(alive, length, 0.0)
        q = torch.where(alive[:, None], w / torch.where(alive, length, 1.0)[:, None], 0.0)
    off = beta[:, :-1]
    tridiagonal = torch.diag_embed(alpha) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    finite = tridiagonal.isfinite().all(-1).all(-1)
    _, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], tridiagonal, 0.0))
    ritz = torch.einsum("bkn,bk->bn", basis, vectors[:, :, -1])
    ritz = torch.where(finite[:, None], ritz / ritz.norm(dim=1, keepdim=True), torch.nan)
    return ritz.view(z.shape)


def _symmetric_product(field: VectorField, z: Tensor) -> VectorField:
    """``v -> J v + J' v`` at ``z``; checks what the field returns."""
    output, pull_back = torch.func.vjp(field, z)[:2]
    if not isinstance(output, Tensor):
        raise TypeError(f"vector_field returned a {type(output).__name__}, expected a torch.Tensor")
    if output.shape != z.shape or output.dtype != z.dtype:
        raise ValueError(
            f"vector_field returned shape {tuple(output.shape)} and {output.dtype} for states of shape "
            f"{tuple(z.shape)} and {z.dtype}, expected the same"
        )

    def product(v: Tensor) -> Tensor:
        return torch.func.jvp(field, (z,), (v,))[1] + pull_back(v)[0]

    return product


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flatten(1).sum(1)


def _check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a callable that maps (B, ...) to (B, ...)")


def _check_states(name: str, value: object, rank: int, expected: str) -> None:
    _checks.tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} has dtype {value.dtype}, expected float32 or float64")
    if value.dim() < rank:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected}")
    if 0 in value.shape[rank - 1 :]:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected} with at least one component")
