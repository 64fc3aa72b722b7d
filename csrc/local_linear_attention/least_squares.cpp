#include "local_linear_attention/least_squares.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_inv_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <limits>

#include "transforms.h"

namespace mixhead::local_linear {
namespace {

double epsilon(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                        : std::numeric_limits<float>::epsilon();
}

/// Eigenvalues of the correlation up to this part of the largest are rounding, and counted as 0:
/// those of points that span fewer directions come out as several epsilon, on either side of 0.
double cutoff(const Tensor& square) {
  return 32.0 * epsilon(square) * static_cast<double>(square.size(-1));
}

Tensor identity_like(const Tensor& square) { return at::eye(square.size(-1), square.options()); }

/// NaN gives NaN, not an error.
Tensor inverted(const Tensor& square) { return std::get<0>(at::linalg_inv_ex(square)); }

/// Spreads that are rounding: of the mean's distance from the query; of points beside the query,
/// which lose no more than the rounding of a rounding; of numbers whose inverses squared overflow.
Tensor rounding_of(const Moments& moments) {
  const double each = epsilon(moments.mean), all = 32.0 * each;
  const double least = moments.mean.scalar_type() == at::kDouble
                           ? std::numeric_limits<double>::min()
                           : std::numeric_limits<float>::min();
  return moments.mean.abs() * all + moments.query.abs() * (all * std::sqrt(each)) +
         1e7 * std::sqrt(least);
}

/// What is decided about a symmetric positive semidefinite matrix outside the graph.
struct Spectrum {
  Tensor null;       // the projector on its null space
  Tensor pseudo;     // its pseudo-inverse
  Tensor whitening;  // W with W' (C + null) W = 1 but for rounding
};

/// By eigenvectors.
Spectrum eigenvectors_of(const Tensor& correlation) {
  const auto finite = correlation.isfinite().all(-1, true).all(-2, true);
  const auto [values, vectors] =
      at::linalg_eigh(at::where(finite, correlation, identity_like(correlation)));
  const auto largest = values.narrow(-1, values.size(-1) - 1, 1);
  const auto null = values <= largest * cutoff(correlation);
  const auto basis = vectors.masked_fill(null.logical_not().unsqueeze(-2), 0.0);
  const auto whitening = vectors * values.masked_fill(null, 1.0).rsqrt().unsqueeze(-2);
  const auto range = whitening.masked_fill(null.unsqueeze(-2), 0.0);
  return {
      at::matmul(basis, basis.transpose(-2, -1)), at::matmul(range, range.transpose(-2, -1)),
      whitening};
}

/// Of matrices (n, D, D) whose diagonal is 1 or 0. Most are well conditioned and have a Cholesky
/// factor L, with W = L'^-1, for a tenth of the time; tr C^-1, the sum of the squares in W, is at
/// least 1 over the least eigenvalue. The others have their eigenvectors found. Where N = 0 nothing
/// is asked of C^+.
Spectrum spectrum(const Tensor& correlation) {
  if (transforms::values_unknown()) return eigenvectors_of(correlation);  // no sizes by the data
  const auto factor = std::get<0>(at::linalg_cholesky_ex(correlation));
  const auto identity = identity_like(correlation);
  const auto whitening =
      at::linalg_solve_triangular(factor, identity, /*upper=*/false).transpose(-2, -1).contiguous();
  const auto squares = (whitening * whitening).flatten(-2).sum(-1);
  const auto rest = (squares <= std::sqrt(1.0 / epsilon(squares))).logical_not().nonzero();
  const auto null = at::zeros_like(correlation), pseudo = at::zeros_like(correlation);
  if (rest.size(0) == 0) return {null, pseudo, whitening};
  const auto rows = rest.squeeze(-1);
  const auto found = eigenvectors_of(correlation.index_select(0, rows));
  return {
      null.index_copy_(0, rows, found.null), pseudo.index_copy_(0, rows, found.pseudo),
      whitening.index_copy_(0, rows, found.whitening)};
}

/// The null projector as a function of the matrix: N(C + dC) = N - N dC C^+ - C^+ dC N + O(dC^2)
/// where the rank stays the same. Its value is N alone: the rounding of N C would be as large as
/// the least eigenvalues, by which C^+ divides.
Tensor moving(const Spectrum& at, const Tensor& correlation) {
  const auto change = correlation - correlation.detach();
  const auto turned = at::matmul(at::matmul(at.null, change), at.pseudo);
  return at.null - turned - turned.transpose(-2, -1);
}

/// The pseudo-inverse of the covariance = scale correlation scale', as a chain of products that is
/// applied to vectors: in windows that a few points dominate its entries are large and cancel.
class PseudoInverse {
 public:
  /// scale (..., D, 1); `null` is the null projector of the correlation as a function of it.
  PseudoInverse(
      const Tensor& correlation, const Tensor& scale, const Tensor& whitening, const Tensor& null,
      bool singular)
      : scale_(scale), whitening_(whitening), null_(null), singular_(singular) {
    const auto shifted = singular ? correlation + null : correlation;
    whitened_ = inverted(at::matmul(at::matmul(whitening.transpose(-2, -1), shifted), whitening));
    if (!singular) return;
    // The covariance's null space is spanned by the columns of null / scale, which are not
    // orthonormal. In the unit of the widest channel they are at least as long as those of null, so
    // that what is inverted has no eigenvalue below 1, however narrow the window is; in double, as
    // the largest is the square of the ratio of spreads.
    const auto wide = null.to(at::kDouble);
    const auto ratio = scale.amax(-2, /*keepdim=*/true).to(at::kDouble) / scale.to(at::kDouble);
    const auto basis = wide * ratio.clamp_max(1e7);
    const auto gram = at::matmul(basis.transpose(-2, -1), basis);
    const auto inverse = inverted(gram + identity_like(wide) - wide);
    beside_ =
        at::matmul(at::matmul(basis, inverse), basis.transpose(-2, -1)).to(null.scalar_type());
  }

  /// The part of `x` (..., D, n) in the null space; of a singular covariance.
  Tensor beside(const Tensor& x) const { return at::matmul(beside_, x); }

  Tensor operator()(const Tensor& x) const {
    const auto scaled = (singular_ ? x - beside(x) : x) / scale_;
    auto solved = at::matmul(
        whitening_, at::matmul(whitened_, at::matmul(whitening_.transpose(-2, -1), scaled)));
    if (singular_) solved = solved - at::matmul(null_, scaled);
    solved = solved / scale_;
    return singular_ ? solved - beside(solved) : solved;
  }

 private:
  Tensor scale_, whitening_, null_, whitened_, beside_;
  bool singular_;
};

}  // namespace

Tensor with_ridge(const Tensor& covariance, const Tensor& penalty) {
  return covariance + identity_like(covariance) * penalty;
}

// Channels are brought to spread 1, so that what counts as singular does not depend on their units;
// one that varies by no more than the rounding of its mean is constant. Which space is null is
// decided outside the graph: eigenvectors have no derivative where eigenvalues are equal. Then
//
//   C^+ = (C + N)^-1 - N = W (W' (C + N) W)^-1 W' - N,  N the projector on the null space of C,
//
// is differentiable, and its derivative right wherever the rank stays the same (Golub & Pereyra
// 1973); W, a constant, makes what is inverted well conditioned.
Fit least_squares(const Moments& moments) {
  const auto &mean = moments.mean, &covariance = moments.covariance, &value = moments.value,
             &cross = moments.cross;
  Tensor scale, constant;
  {
    c10::AutoGradMode no_grad(false);
    const auto spread = covariance.detach().diagonal(0, -2, -1).unsqueeze(-1).clamp_min(0.0).sqrt();
    const auto flat = spread <= rounding_of(moments);
    // A constant channel in the unit of the others, lest their null spaces mix.
    const auto widest = spread.masked_fill(flat, 0.0).amax(-2, /*keepdim=*/true);
    scale = at::where(flat, widest.masked_fill(widest == 0.0, 1.0), spread);
    constant = flat.logical_or(flat.transpose(-2, -1));
  }
  const auto correlation =
      (covariance / scale / scale.transpose(-2, -1)).masked_fill(constant, 0.0);
  Spectrum decided;
  {
    c10::AutoGradMode no_grad(false);
    decided = spectrum(correlation.detach().flatten(0, -3));
    for (auto* each : {&decided.null, &decided.pseudo, &decided.whitening}) {
      *each = each->view(correlation.sizes());
    }
  }
  // Which rows are singular cannot be read inside of vmap; the general form is right for all.
  const bool singular = transforms::values_unknown() || decided.null.any().item<bool>();
  const auto null = singular ? moving(decided, correlation) : decided.null;
  const PseudoInverse inverse(correlation, scale, decided.whitening, null, singular);

  const auto slope = inverse(cross);
  const auto row = mean.transpose(-2, -1);
  const auto intercept = value - at::matmul(row, slope);
  const auto corner = at::matmul(row, inverse(mean)) + 1.0;
  if (!singular) return {intercept, slope, corner};
  // How far the query stands from the affine hull of its data: along there (intercept, slope) may
  // be moved with no change at the data.
  const auto beside = inverse.beside(mean);
  const auto shrink = (at::matmul(beside.transpose(-2, -1), beside) + 1.0).reciprocal();
  const auto shrunk = intercept * shrink;
  return {shrunk, slope + at::matmul(beside, shrunk), corner * shrink * shrink};
}

}  // namespace mixhead::local_linear
