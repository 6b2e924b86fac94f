#include "nll_rows.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "parallel.h"

#define PMC_INLINE static inline __attribute__((always_inline))

namespace pmc {
namespace {

constexpr int kLanes = 64;  // independent sums: hides latency, and bounds the rounding of long ones

// exp for x <= 0, about 1 ulp, in operations that compilers vectorise. NaN stays NaN; below -87 the
// result is the smallest normal number instead of a subnormal or 0.
PMC_INLINE float exp_of(float x) {
  x = -87.0f > x ? -87.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float n = (x * 1.44269504088896341f + shift) - shift;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}
PMC_INLINE double exp_of(double x) { return std::exp(x); }

PMC_INLINE float tanh_of(float x) {
  const float size = x < 0 ? -x : x;
  const float e = exp_of(-2.0f * size);
  const float far = (1.0f - e) / (1.0f + e);
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = p * s * x + x;
  return size < 0.625f ? near : (x < 0 ? -far : far);
}
PMC_INLINE double tanh_of(double x) { return std::tanh(x); }

template <typename T>
PMC_INLINE T row_max(const T* z, int64_t size) {
  T lanes[kLanes];
  for (int k = 0; k < kLanes; ++k) lanes[k] = -std::numeric_limits<T>::infinity();
  int64_t v = 0;
  for (; v + kLanes <= size; v += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] = z[v + k] > lanes[k] ? z[v + k] : lanes[k];
  }
  for (; v < size; ++v) lanes[0] = z[v] > lanes[0] ? z[v] : lanes[0];
  T max = lanes[0];
  for (int k = 1; k < kLanes; ++k) max = lanes[k] > max ? lanes[k] : max;
  return max;
}

// Sum of exp(z - max); with Store the terms replace z.
template <bool Store, typename T>
PMC_INLINE double row_sum_exp(T* z, int64_t size, T max) {
  T lanes[kLanes] = {};
  int64_t v = 0;
  for (; v + kLanes <= size; v += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const T e = exp_of(z[v + k] - max);
      if (Store) z[v + k] = e;
      lanes[k] += e;
    }
  }
  double sum = 0;
  for (; v < size; ++v) {
    const T e = exp_of(z[v] - max);
    if (Store) z[v] = e;
    sum += e;
  }
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

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
  for (int64_t m = begin; m < end; ++m) {
    a.logps[m] = z[a.targets[m]] - max;
    scale_sum += a.row_scale[m];
  }
  // d(z) = scale_sum * softmax(z) - sum of row_scale at the targets; d(logits) = d(z) * slope
  const T slope = a.logit_scale * inverse;
  double sum;
  if (!a.grad) {
    sum = row_sum_exp<false>(z, a.vocab, max);
  } else if (a.softcap == 0) {
    sum = row_sum_exp<true>(z, a.vocab, max);
    const T factor = static_cast<T>(scale_sum * slope / sum);
    for (int64_t v = 0; v < a.vocab; ++v) z[v] *= factor;
    for (int64_t m = begin; m < end; ++m) z[a.targets[m]] -= a.row_scale[m] * slope;
  } else {
    sum = row_sum_exp<false>(z, a.vocab, max);
    const T factor = static_cast<T>(scale_sum / sum);
    const T to_tanh = a.temperature / a.softcap;
    for (int64_t v = 0; v < a.vocab; ++v) {
      const T t = z[v] * to_tanh;
      z[v] = factor * exp_of(z[v] - max) * (slope * (1 - t * t));
    }
    for (int64_t m = begin; m < end; ++m) {
      const T t = (a.logps[m] + max) * to_tanh;  // z[target], which the pass above overwrote
      z[a.targets[m]] -= a.row_scale[m] * (slope * (1 - t * t));
    }
  }
  const T log_sum = static_cast<T>(std::log(sum));
  for (int64_t m = begin; m < end; ++m) a.logps[m] -= log_sum;
}

template <typename T>
PMC_INLINE void some_rows(const NllRows<T>& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) one_row(a, r);
}

// One copy of the loops for each instruction set. 512-bit vectors are asked for by name: the default
// tuning stops at 256.
#if defined(__x86_64__) && defined(__GNUC__)
#define PMC_X86 1
template <typename T>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"))) void
rows_avx512(const NllRows<T>& a, int64_t begin, int64_t end) {
  some_rows(a, begin, end);
}
template <typename T>
__attribute__((target("avx2,fma"))) void rows_avx2(const NllRows<T>& a, int64_t begin, int64_t end) {
  some_rows(a, begin, end);
}
#endif
template <typename T>
void rows_generic(const NllRows<T>& a, int64_t begin, int64_t end) {
  some_rows(a, begin, end);
}

template <typename T>
void dispatch(const NllRows<T>& a, Isa isa, int threads) {
  auto* rows = &rows_generic<T>;
#ifdef PMC_X86
  if (isa == Isa::kAvx2) rows = &rows_avx2<T>;
  if (isa == Isa::kAvx512) rows = &rows_avx512<T>;
#endif
  parallel_for(a.rows, threads, [&](int64_t begin, int64_t end) { rows(a, begin, end); });
}

}  // namespace

Isa best_isa() {
#ifdef PMC_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

void nll_rows(const NllRows<float>& args, Isa isa, int threads) { dispatch(args, isa, threads); }
void nll_rows(const NllRows<double>& args, Isa isa, int threads) { dispatch(args, isa, threads); }

}  // namespace pmc
