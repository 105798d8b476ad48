"""S^-1 of the equation: which directions of the keys an update should not change.

Every preconditioner is stored as T with S^-1 = T^T T: `whiten(K)` = T K maps keys to coordinates where S is the
identity, and `unwhiten(H)` = T^T H maps a solution back.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from kedit_fast.errors import InvalidArgumentError, NullSpaceError, SolveError, StatisticsError
from kedit_fast.support.dtypes import dtype_name
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
NullSpaceRule = Literal["absolute", "relative", "energy"]
"""What the threshold of a null space is compared with; see `NullSpace.from_covariance`."""
RULES: tuple[NullSpaceRule, ...] = get_args(NullSpaceRule)
NEGATIVE = -1e-6  # share of the largest eigenvalue; a lower eigenvalue is not rounding: the matrix is no second moment
RANK_DEFICIENT = 2.0**-48  # share of the largest pivot that rounding leaves of a zero pivot
USELESS_BOUND = 0.1  # error bound above which an fp32 factor is refused
POWER_STEPS = 30
QUARTER = 0.25
"""Share of the dimensions that the threshold in a refusal leaves as null space."""
SPECTRUM_QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
"""The eigenvalues that messages show, by their place in the spectrum."""
PROJECTION = 1e-3  # tolerance of the eigenvalues of a float32 projection, which are 0 or 1


class Preconditioner(ABC):
    """S^-1 = T^T T, all [d, d]."""

    size: int
    """d."""
    device: torch.device
    """Where T is."""

    @abstractmethod
    def whiten(self, keys: torch.Tensor) -> torch.Tensor:
        """T K [d, u] of keys [d, u], fp64."""

    @abstractmethod
    def unwhiten(self, coordinates: torch.Tensor) -> torch.Tensor:
        """T^T H [d, u] of coordinates [d, u] in the span of whitened keys, fp64."""

    def apply(self, keys: torch.Tensor) -> torch.Tensor:
        """S^-1 K [d, u], fp64."""
        return self.unwhiten(self.whiten(keys))

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Its kind and parameters; a saved state records them, to be compared when it is loaded."""

    @property
    def nbytes(self) -> int:
        """Bytes of T."""
        return 0

    @plain_torch()
    def probe(self) -> torch.Tensor:
        """x^T S^-1 y of four fixed vectors, [16]: preconditioners with different content have different probes.

        In every kind here T is a function of S^-1. So where two have the same probe, keys whitened by one are right for
        the other.
        """
        place = torch.arange(1, self.size + 1, dtype=torch.float64, device=self.device)
        vectors = torch.stack([torch.sin(place * (0.7 + i)) for i in range(4)], 1)
        return (vectors.T @ self.apply(vectors)).flatten().cpu()


@dataclass(frozen=True)
class Identity(Preconditioner):
    """S = weight I: every direction of the keys costs the same (UltraEdit; `mom2_adjustment: false`).

    Example:
        >>> Identity(3, weight=4.0).apply(torch.ones(3, 1)).T
        tensor([[0.2500, 0.2500, 0.2500]], dtype=torch.float64)
    """

    size: int
    """d."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where keys are whitened."""
    weight: float = 1.0
    """Cost of a change, the same in every direction."""

    @plain_torch()
    def whiten(self, keys: torch.Tensor) -> torch.Tensor:
        """K / sqrt(weight)."""
        return keys.to(self.device, torch.float64) * self.weight**-0.5

    @plain_torch()
    def unwhiten(self, coordinates: torch.Tensor) -> torch.Tensor:
        """H / sqrt(weight)."""
        return coordinates * self.weight**-0.5

    def describe(self) -> dict[str, Any]:
        """Its kind and parameters."""
        return {"kind": "identity", "size": self.size, "weight": self.weight}


@dataclass(frozen=True)
class Scaled(Preconditioner):
    """S = weight S_0, over the preconditioner of S_0: one factorization serves any weight.

    Example:
        >>> Scaled(Identity(3), 4.0).apply(torch.ones(3, 1)).T
        tensor([[0.2500, 0.2500, 0.2500]], dtype=torch.float64)
    """

    base: Preconditioner
    """S_0^-1."""
    weight: float
    """What multiplies S_0; positive."""

    @property
    def size(self) -> int:
        """d."""
        return self.base.size

    @property
    def device(self) -> torch.device:
        """Of the base."""
        return self.base.device

    @plain_torch()
    def whiten(self, keys: torch.Tensor) -> torch.Tensor:
        """T_0 K / sqrt(weight)."""
        return self.base.whiten(keys) * self.weight**-0.5

    @plain_torch()
    def unwhiten(self, coordinates: torch.Tensor) -> torch.Tensor:
        """T_0^T H / sqrt(weight)."""
        return self.base.unwhiten(coordinates) * self.weight**-0.5

    def describe(self) -> dict[str, Any]:
        """Its kind and parameters."""
        return {**self.base.describe(), "scale": self.weight}

    @property
    def nbytes(self) -> int:
        """Of the base."""
        return self.base.nbytes


@dataclass(frozen=True)
class Covariance(Preconditioner):
    """S = weight C + lambda_n I with C = E[k k^T], stored as a Cholesky factor: one factorization serves every batch.

    MEMIT, PMET and EMMET have weight = `mom2_update_weight`; ENCORE adds lambda_n = `update_norm_lambda`.

    Example:
        >>> inputs = torch.randn(200, 8, dtype=torch.float64)
        >>> moment = inputs.T @ inputs / len(inputs)  # [d, d]
        >>> space, keys = Covariance.from_moment(moment, weight=15.0), torch.randn(8, 2)
        >>> torch.allclose(15.0 * moment @ space.apply(keys), keys.double())
        True
    """

    factor: torch.Tensor
    """[d, d] L of S = L L^T, lower triangle, fp64 or fp32."""
    weight: float = 1.0
    """lambda, `mom2_update_weight`."""
    norm_lambda: float = 0.0
    """lambda_n, `update_norm_lambda`."""
    ridge: float = 0.0
    """What was added to the diagonal of C, as a share of its mean."""
    error_bound: float = 0.0
    """Of an fp32 factor: condition(S) 2^-24, to first order the relative error of S^-1 K."""

    @classmethod
    @plain_torch()
    def from_moment(
        cls,
        moment: torch.Tensor,
        ridge: float = 0.0,
        *,
        weight: float = 1.0,
        norm_lambda: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> Covariance:
        """Factor weight (C + ridge mean(diag C) I) + norm_lambda I.

        Args:
            moment: C [d, d] symmetric; only its lower triangle is read.
            ridge: relative to the mean diagonal; 0 leaves C as it is.
            weight: lambda, `mom2_update_weight`.
            norm_lambda: ENCORE's lambda_n, `update_norm_lambda`; absolute.
            dtype: of the stored factor and of the triangular solves. float32 halves its bytes and its time; the
                factorization itself, and all that follows the two triangular solves, is in float64. `error_bound`
                bounds the error.

        Raises:
            StatisticsError: C is not finite or not positive definite, or too badly conditioned for an fp32 factor.

        Cost: d^3 / 3 flops in fp64; for float32 also 120 d^2 for the condition number.
        """
        if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
            raise InvalidArgumentError(f"moment must be [d, d]; got {list(moment.shape)}")
        if not weight > 0 or norm_lambda < 0 or ridge < 0:
            raise InvalidArgumentError(
                f"weight must be positive, norm_lambda and ridge not negative; got {weight}, {norm_lambda}, {ridge}"
            )
        if dtype not in (torch.float32, torch.float64):
            raise InvalidArgumentError(f"a factor is float64 or float32; got {dtype}")
        require_finite_moment(moment)
        system = moment.double() * weight
        add = norm_lambda + ridge * float(system.diagonal().mean())
        if add:
            system.diagonal().add_(add)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info):
            raise StatisticsError(
                f"the second moment is not positive definite (leading minor {int(info)} of {moment.shape[0]}): "
                "collect it over more tokens, or set mom2_ridge (for example 1e-6)"
            )
        pivots = factor.diagonal().square()
        if float(pivots.min()) < RANK_DEFICIENT * float(pivots.max()):
            raise StatisticsError(
                f"the second moment is rank deficient (pivots from {float(pivots.min()):.1e} to "
                f"{float(pivots.max()):.1e}): collect it over more tokens than its {moment.shape[0]} dimensions, or "
                "set mom2_ridge (for example 1e-6)"
            )
        if dtype == torch.float64:
            return cls(factor, weight, norm_lambda, ridge)
        bound = _condition(factor) * 2.0**-24
        if bound > USELESS_BOUND:
            raise StatisticsError(
                f"the condition number of the second moment, {bound * 2**24:.1e}, leaves a float32 factor no correct "
                "digit: keep it in float64, or set mom2_ridge"
            )
        _log.info("float32 factor: relative error of S^-1 K at most about %.1e", bound)
        return cls(factor.float(), weight, norm_lambda, ridge, bound)

    @property
    def geometric_mean(self) -> float:
        """The geometric mean of the eigenvalues of S."""
        return float(self.factor.diagonal().double().log().mean().mul(2).exp())

    @property
    def size(self) -> int:
        """d."""
        return self.factor.shape[0]

    @property
    def device(self) -> torch.device:
        """Of the factor."""
        return self.factor.device

    @plain_torch()
    def whiten(self, keys: torch.Tensor) -> torch.Tensor:
        """L^-1 K, a triangular solve: d^2 u flops."""
        return torch.linalg.solve_triangular(self.factor, keys.to(self.factor), upper=False).double()

    @plain_torch()
    def unwhiten(self, coordinates: torch.Tensor) -> torch.Tensor:
        """L^-T H, a triangular solve: d^2 u flops."""
        return torch.linalg.solve_triangular(self.factor.mT, coordinates.to(self.factor), upper=True).double()

    def describe(self) -> dict[str, Any]:
        """Its kind and parameters."""
        return {
            "kind": "covariance",
            "size": self.size,
            "weight": self.weight,
            "norm_lambda": self.norm_lambda,
            "ridge": self.ridge,
            "dtype": dtype_name(self.factor.dtype),
        }

    @property
    def nbytes(self) -> int:
        """Of the factor."""
        return self.factor.nbytes


@dataclass(frozen=True)
class NullSpace(Preconditioner):
    """S^-1 = P / L2 with P the projection on the null space of C: directions that the corpus hardly uses (AlphaEdit).

    Stored as the thinner of two orthonormal bases: N of the null space, P = N N^T, or V of its complement,
    P = I - V V^T. Keys are whitened as P k / sqrt(L2), in the layer's own coordinates: a null space has many bases, and
    a saved state must not depend on which one was computed.

    Example:
        >>> scales = torch.tensor([1.0] * 5 + [1e-3] * 3)
        >>> inputs = torch.randn(200, 8) * scales
        >>> space = NullSpace.from_covariance(inputs.T @ inputs / len(inputs), threshold=1e-2)
        >>> space.dimension
        3
        >>> float(space.project(inputs.T).abs().max()) < 0.1  # the inputs hardly reach into it
        True
    """

    basis: torch.Tensor
    """[d, r] fp64, r <= d / 2."""
    complement: bool
    """Whether `basis` spans the complement of the null space, not the null space."""
    l2: float
    """Ridge of the solve, the published `L2`."""
    threshold: float
    """Of the eigenvalues, by `rule`; 0 for a projection that was read."""
    rule: str
    """A NullSpaceRule, or "projection" for a projection that was read."""

    @classmethod
    @plain_torch()
    def from_covariance(
        cls, moment: torch.Tensor, threshold: float = 2e-2, rule: NullSpaceRule = "absolute", l2: float = 10.0
    ) -> NullSpace:
        """The null space of C [d, d].

        Args:
            moment: C symmetric; it may be rank deficient.
            threshold: what an eigenvalue of the null space must be below; its meaning depends on `rule`.
            rule: "absolute" compares the eigenvalue itself (as published, with 2e-2); "relative" its ratio to the
                largest eigenvalue; "energy" the share of the trace held by it and all smaller eigenvalues.
            l2: ridge of the solve, the published `L2`.

        Raises:
            NullSpaceError: the null space is empty or everything.
            StatisticsError: C is zero, not finite or not positive semi-definite.

        Cost: a symmetric eigendecomposition, about 9 d^3 flops in fp64.
        Source: AlphaEdit (arXiv 2410.02355), its released `get_project`.
        """
        if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
            raise InvalidArgumentError(f"moment must be [d, d]; got {list(moment.shape)}")
        if rule not in RULES:
            raise InvalidArgumentError(f"rule must be {', '.join(RULES)}; got {rule!r}")
        if not threshold > 0 or not l2 > 0:
            raise InvalidArgumentError(f"threshold and l2 must be positive; got {threshold} and {l2}")
        require_finite_moment(moment)
        values, vectors = eigenvectors(moment)
        d = len(values)
        m = null_dimension(values, threshold, rule)
        spectrum = _spectrum_text(values)
        if m in (0, d):
            advice = f"{'Raise' if m == 0 else 'Lower'} nullspace_threshold"
            if rule == "absolute":
                advice += ", or set nullspace_rule to relative or energy"
            quarter = threshold_leaving(values, rule, QUARTER)
            if quarter is not None:
                dimensions = null_dimension(values, float(quarter), rule)
                advice += f"; nullspace_threshold={quarter} would leave {dimensions} of {d} as null space"
            bound = f"{threshold:g} ({rule}; {spectrum})"
            if m == 0:
                raise NullSpaceError(f"no null space: none of {d} dimensions is below {bound}. {advice}")
            raise NullSpaceError(
                f"everything is null space: all {d} dimensions are below {bound}, so nothing would be protected. "
                f"{advice}"
            )
        _log.info("null space of %d of %d dimensions (%s threshold %g; %s)", m, d, rule, threshold, spectrum)
        return cls.of_vectors(vectors, m, l2, threshold, rule)

    @classmethod
    def of_vectors(
        cls, vectors: torch.Tensor, dimension: int, l2: float, threshold: float, rule: NullSpaceRule
    ) -> NullSpace:
        """The null space of the first `dimension` of the eigenvectors [d, d], by ascending eigenvalues, of C."""
        complement = dimension > len(vectors) / 2
        basis = vectors[:, dimension:] if complement else vectors[:, :dimension]
        return cls(basis.contiguous(), complement, float(l2), float(threshold), rule)

    @classmethod
    @plain_torch()
    def from_projection(cls, projection: torch.Tensor, l2: float = 10.0) -> NullSpace:
        """The null space that P [d, d], as stored in AlphaEdit's files, projects on.

        Raises:
            StatisticsError: P is not finite, not symmetric, not a projection, or projects on nothing or everything.

        Cost: a symmetric eigendecomposition, about 9 d^3 flops in fp64.
        """
        if projection.ndim != 2 or projection.shape[0] != projection.shape[1] or not len(projection):
            raise InvalidArgumentError(f"a projection must be [d, d]; got {list(projection.shape)}")
        matrix = projection.double()
        if not bool(torch.isfinite(matrix.sum())) or float((matrix - matrix.T).abs().max()) > PROJECTION:
            raise StatisticsError("the projection is not finite or not symmetric")
        values, vectors = torch.linalg.eigh(matrix)
        if float(torch.minimum(values.abs(), (values - 1).abs()).max()) > PROJECTION:
            raise StatisticsError("the matrix is no projection: it has eigenvalues that are neither 0 nor 1")
        d, m = len(values), int((values > 0.5).sum())  # eigenvalues ascend: the null space is at the end
        if m in (0, d):
            raise StatisticsError(f"the projection is on {'nothing' if m == 0 else f'all {d} dimensions'}")
        complement = m > d / 2
        basis = vectors[:, : d - m] if complement else vectors[:, d - m :]
        return cls(basis.contiguous(), complement, float(l2), 0.0, "projection")

    @property
    def size(self) -> int:
        """d."""
        return self.basis.shape[0]

    @property
    def dimension(self) -> int:
        """Dimension of the null space."""
        return self.size - self.basis.shape[1] if self.complement else self.basis.shape[1]

    @property
    def device(self) -> torch.device:
        """Of the basis."""
        return self.basis.device

    @plain_torch()
    def project(self, matrix: torch.Tensor) -> torch.Tensor:
        """P X [d, u] of X [d, u], fp64."""
        rows = matrix.to(self.basis).T.contiguous()  # products of rows are the faster ones
        along = (rows @ self.basis) @ self.basis.T
        return (rows - along if self.complement else along).T

    @plain_torch()
    def whiten(self, keys: torch.Tensor) -> torch.Tensor:
        """P K / sqrt(L2): 4 d r u flops for a basis of r vectors."""
        return self.project(keys).mul_(self.l2**-0.5)

    @plain_torch()
    def unwhiten(self, coordinates: torch.Tensor) -> torch.Tensor:
        """H / sqrt(L2): solutions for whitened keys already lie in the null space, P H = H."""
        return coordinates * self.l2**-0.5

    def describe(self) -> dict[str, Any]:
        """Its kind and parameters."""
        return {
            "kind": "null space",
            "size": self.size,
            "dimension": self.dimension,
            "L2": self.l2,
            "threshold": self.threshold,
            "rule": self.rule,
        }

    @property
    def nbytes(self) -> int:
        """Of the basis."""
        return self.basis.nbytes


def _condition(factor: torch.Tensor) -> float:
    """The condition number of L L^T, slightly underestimated."""
    largest, smallest = extreme_eigenvalues(factor)
    return largest / smallest


def extreme_eigenvalues(factor: torch.Tensor) -> tuple[float, float]:
    """The largest and the smallest eigenvalue of L L^T by power iteration from both ends, each a little inside.

    Args:
        factor: L [d, d], lower triangle.

    Cost: 120 d^2 flops.
    """
    place = torch.arange(1, factor.shape[0] + 1, dtype=factor.dtype, device=factor.device)
    ends = []
    for inverse in (False, True):
        vector = torch.sin(place)[:, None]
        size = 1.0
        for _ in range(POWER_STEPS):
            if inverse:
                vector = torch.cholesky_solve(vector, factor)
            else:
                vector = factor @ (factor.T @ vector)
            size = float(vector.norm())
            vector = vector / size
        ends.append(size)
    return ends[0], 1 / ends[1]


def eigenvectors(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending eigenvalues [d] and eigenvectors [d, d] of a second moment, fp64; about 9 d^3 flops.

    Raises:
        StatisticsError: it is zero or not positive semi-definite.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    largest = float(values[-1])
    if largest <= 0:
        raise StatisticsError("the second moment is zero: the layer's inputs were, or no text was counted")
    if float(values[0]) < NEGATIVE * largest:
        raise StatisticsError(
            f"the second moment has a negative eigenvalue, {float(values[0]):.2e}: it is no second moment"
        )
    return values, vectors


def null_dimension(values: torch.Tensor, threshold: float, rule: NullSpaceRule) -> int:
    """How many of the ascending eigenvalues [d] belong to the null space; see `NullSpace.from_covariance`."""
    if rule == "absolute":
        return int((values < threshold).sum())
    if rule == "relative":
        return int((values < threshold * values[-1]).sum())
    positive = values.cpu().clamp(min=0)  # torch's cumulative sums on a GPU have no fixed order
    return int((positive.cumsum(0) <= threshold * positive.sum()).sum())


def threshold_leaving(values: torch.Tensor, rule: NullSpaceRule, share: float) -> str | None:
    """The shortest decimal that, as a threshold, leaves a share of the dimensions as null space.

    Where equal eigenvalues stand at that place, the threshold is the one of the nearest other dimension.

    Args:
        values: [d] ascending eigenvalues of C.
        rule: what the threshold is compared with; see `NullSpace.from_covariance`.
        share: between 0 and 1, of the d dimensions; at least one.

    Returns:
        None where no threshold leaves a part of the dimensions: there is one alone, or all are equal.

    Example:
        >>> threshold_leaving(torch.tensor([0.111, 0.222, 3.0, 40.0]), "absolute", 0.5)
        '1'
    """
    wide = values.double().cpu()
    if rule == "relative":
        wide = wide / wide[-1]
    elif rule == "energy":
        positive = wide.clamp(min=0)
        wide = positive.cumsum(0) / positive.sum()
    d = len(wide)
    wanted = max(1, int(d * share))
    for m in sorted(range(1, d), key=lambda m: abs(m - wanted)):
        low, high = max(float(wide[m - 1]), 0.0), float(wide[m])
        if not low < high:
            continue
        middle = (low * high) ** 0.5 if low else high / 2
        for digits in range(1, 8):
            text = f"{middle:.{digits}g}"
            if float(text) > 0 and null_dimension(values, float(text), rule) == m:
                return text
    return None


def _spectrum_text(values: torch.Tensor) -> str:
    """The ascending eigenvalues [d] by their quantiles."""
    last = len(values) - 1
    parts = [f"{share:.0%} {float(values[round(share * last)]):.1e}" for share in SPECTRUM_QUANTILES]
    return f"eigenvalues, by quantile: {', '.join(parts)}"


def condition_number(values: torch.Tensor) -> float | None:
    """Largest over smallest of the ascending eigenvalues [d] of a moment; None where the smallest is rounding."""
    smallest, largest = float(values[0]), float(values[-1])
    return None if smallest <= len(values) * 2.0**-52 * largest else largest / smallest


def require_finite_moment(moment: torch.Tensor) -> None:
    """Raise StatisticsError when a second moment holds NaN or infinity."""
    if not bool(torch.isfinite(moment.sum())) and not bool(torch.isfinite(moment).all()):
        raise StatisticsError("the second moment has values that are not finite")


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise SolveError when a tensor holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise SolveError(f"{name} has values that are not finite")
