#include "nll_rows.h"

#include <cmath>
#include <limits>

#include "parallel.h"
#include "simd.h"

namespace pmc {
namespace {

template <typename T>
PMC_INLINE void one_row(const NllRows<T>& a, int64_t r) {
  T* z = a.logits + r * a.stride;
  const int64_t begin = a.cu_targets[r], end = a.cu_targets[r + 1];
  const T inverse = 1 / a.temperature;
  if (a.softcap != 0) {
    const T inner = a.logit_scale / a.softcap, outer = a.softcap * inverse;
    for (int64_t v = 0; v < a.vocab; ++v) z[v] = outer * tanh_of((z[v] + (a.bias ? a.bias[v] : 0)) * inner);
  } else if (a.bias) {
    for (int64_t v = 0; v < a.vocab; ++v) z[v] = (z[v] + a.bias[v]) * (a.logit_scale * inverse);
  } else if (a.logit_scale * inverse != 1) {
    for (int64_t v = 0; v < a.vocab; ++v) z[v] *= a.logit_scale * inverse;
  }

  const T max = row_max(z, a.vocab);
  T scale_sum = 0;
  int64_t peak = -1;  // the target that holds the maximum, if one does
  for (int64_t m = begin; m < end; ++m) {
    a.logps[m] = z[a.targets[m]] - max;
    scale_sum += a.row_scale[m];
    if (z[a.targets[m]] == max) peak = a.targets[m];
  }
  // A target with nearly all mass has log-prob -log1p(rest) and 1 - p = rest / sum, rest being the others'
  // sum: in a sum with its own 1 theirs would be rounded away.
  if (peak >= 0) z[peak] = -std::numeric_limits<T>::infinity();
  // d(z) = scale_sum * softmax(z) - sum of row_scale at the targets; d(logits) = d(z) * slope
  const T slope = a.logit_scale * inverse, to_tanh = a.softcap == 0 ? 0 : a.temperature / a.softcap;
  const bool in_place = a.grad && a.softcap == 0;
  const double rest = row_sum_exp(z, a.vocab, max, T{1}, in_place ? z : nullptr);
  const double sum = peak < 0 ? rest : rest + 1 + (max - max);  // NaN where the maximum is infinite
  if (in_place) {
    const T factor = static_cast<T>(scale_sum * slope / sum);
    for (int64_t v = 0; v < a.vocab; ++v) z[v] *= factor;
  } else if (a.grad) {
    const T factor = static_cast<T>(scale_sum / sum);
    for (int64_t v = 0; v < a.vocab; ++v) {
      const T t = z[v] * to_tanh;
      z[v] = factor * exp_of(z[v] - max) * (slope * (1 - t * t));
    }
  }
  for (int64_t m = begin; a.grad && m < end; ++m) {
    const int64_t target = a.targets[m];
    double own = 0, others = 0;  // scales of this token and of the row's other targets, which are few
    for (int64_t n = begin; n < end; ++n) (a.targets[n] == target ? own : others) += a.row_scale[n];
    const double e = exp_of(a.logps[m]);
    const T t = (a.logps[m] + max) * to_tanh;  // z[target], which the pass above overwrote
    z[target] =
        static_cast<T>((others * e - own * (target == peak ? rest : sum - e)) / sum * (slope * (1 - t * t)));
  }
  const T log_sum = static_cast<T>(peak < 0 ? std::log(sum) : std::log1p(rest) + (max - max));
  for (int64_t m = begin; m < end; ++m) a.logps[m] -= log_sum;
}

template <typename T>
void run(const NllRows<T>& a, Isa isa, int threads) {
  parallel_for(a.rows, threads, [&](int64_t begin, int64_t end) {
    dispatch(isa, [&](auto) PMC_ALWAYS_INLINE {
      for (int64_t r = begin; r < end; ++r) one_row(a, r);
    });
  });
}

}  // namespace

void nll_rows(const NllRows<float>& args, Isa isa, int threads) { run(args, isa, threads); }
void nll_rows(const NllRows<double>& args, Isa isa, int threads) { run(args, isa, threads); }

}  // namespace pmc
