// One source for several instruction sets, and loops over a row that compilers vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// Inlined into functions with a target attribute, where they are compiled for that target.
#define PMC_ALWAYS_INLINE __attribute__((always_inline))
#define PMC_INLINE static inline PMC_ALWAYS_INLINE

#if defined(__x86_64__) && defined(__GNUC__)
#define PMC_X86 1
#define PMC_AVX512_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#ifdef __clang__  // has no such option in attributes, and would drop the whole target
#define PMC_AVX512 __attribute__((target(PMC_AVX512_TARGET), min_vector_width(512)))
#else  // 512-bit vectors are asked for by name: the default tuning stops at 256
#define PMC_AVX512 __attribute__((target(PMC_AVX512_TARGET ",prefer-vector-width=512")))
#endif
#define PMC_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace pmc {

enum class Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set of this processor.
Isa best_isa();

template <Isa kIsa>
using IsaTag = std::integral_constant<Isa, kIsa>;

#ifdef PMC_X86
template <typename F>
PMC_AVX2 auto compiled_for_avx2(const F& f) {
  return f(IsaTag<Isa::kAvx2>());
}
template <typename F>
PMC_AVX512 auto compiled_for_avx512(const F& f) {
  return f(IsaTag<Isa::kAvx512>());
}
#endif

// Calls f(IsaTag) as compiled for an instruction set. f is a lambda marked PMC_ALWAYS_INLINE, and what it
// calls is PMC_INLINE: the rest is compiled for any processor.
template <typename F>
auto dispatch([[maybe_unused]] Isa isa, const F& f) {
#ifdef PMC_X86
  if (isa == Isa::kAvx512) return compiled_for_avx512(f);
  if (isa == Isa::kAvx2) return compiled_for_avx2(f);
#endif
  return f(IsaTag<Isa::kGeneric>());
}

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
  const uint32_t bits = (static_cast<uint32_t>(static_cast<int32_t>(n)) + 127u) << 23;
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

// Sum of exp((z - max) * factor); if `store` is not null the terms are written there (it may be z).
template <typename T>
PMC_INLINE double row_sum_exp(const T* z, int64_t size, T max, T factor, T* store = nullptr) {
  T lanes[kLanes] = {};
  int64_t v = 0;
  for (; v + kLanes <= size; v += kLanes) {
    T terms[kLanes];
    for (int k = 0; k < kLanes; ++k) {
      terms[k] = exp_of((z[v + k] - max) * factor);
      lanes[k] += terms[k];
    }
    if (store) std::memcpy(store + v, terms, sizeof terms);
  }
  double sum = 0;
  for (; v < size; ++v) {
    const T term = exp_of((z[v] - max) * factor);
    if (store) store[v] = term;
    sum += term;
  }
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

}  // namespace pmc
