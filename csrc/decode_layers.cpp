#include "decode_layers.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace pmc {
namespace {

constexpr int64_t kAlone = 1 << 16;  // numbers that are not worth a second thread

PMC_INLINE void some(const RmsNorm& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* x = a.x + r * a.size;
    float* y = a.y + r * a.size;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= a.size; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) lanes[k] += x[i + k] * x[i + k];
    }
    double sum = 0;
    for (; i < a.size; ++i) sum += x[i] * x[i];
    for (int k = 0; k < kLanes; ++k) sum += lanes[k];
    const float scale = 1.0f / std::sqrt(static_cast<float>(sum / a.size) + a.eps);
    for (i = 0; i < a.size; ++i) y[i] = (x[i] * scale) * (a.weight[i] + a.offset);
  }
}

PMC_INLINE void some(const SiluMul& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float x = a.gate[i], size = x < 0 ? -x : x;
    const float e = exp_of(-size);  // sigmoid(x) is 1 / (1 + e) or e / (1 + e): nothing overflows
    a.y[i] = x * ((x < 0 ? e : 1.0f) / (1.0f + e)) * a.up[i];
  }
}

PMC_INLINE void some(const Rotary& a, int64_t begin, int64_t end) {
  const int64_t half = a.dim / 2;
  for (int64_t r = begin; r < end; ++r) {
    const float *cos = a.cos + r * a.dim, *sin = a.sin + r * a.dim;
    for (int64_t h = 0; h < a.heads; ++h) {
      const float* x = a.x + r * a.row_stride + h * a.head_stride;
      float* y = a.y + (r * a.heads + h) * a.dim;
      for (int64_t i = 0; i < half; ++i) {
        y[i] = x[i] * cos[i] - x[half + i] * sin[i];
        y[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
      }
    }
  }
}

template <typename A>
void generic(const A& a, int64_t begin, int64_t end) {
  some(a, begin, end);
}
#ifdef PMC_X86
template <typename A>
PMC_AVX2 void avx2(const A& a, int64_t begin, int64_t end) {
  some(a, begin, end);
}
template <typename A>
PMC_AVX512 void avx512(const A& a, int64_t begin, int64_t end) {
  some(a, begin, end);
}
#endif

// count parts of `each` numbers
template <typename A>
void run(const A& a, int64_t count, int64_t each, Isa isa, int threads) {
  auto* part = &generic<A>;
#ifdef PMC_X86
  if (isa == Isa::kAvx2) part = &avx2<A>;
  if (isa == Isa::kAvx512) part = &avx512<A>;
#endif
  parallel_for(count, count * each < kAlone ? 1 : threads,
               [&](int64_t begin, int64_t end) { part(a, begin, end); });
}

}  // namespace

void rms_norm(const RmsNorm& a, Isa isa, int threads) { run(a, a.rows, a.size, isa, threads); }
void silu_mul(const SiluMul& a, Isa isa, int threads) { run(a, a.size, 1, isa, threads); }
void rotary(const Rotary& a, Isa isa, int threads) { run(a, a.rows, a.heads * a.dim, isa, threads); }

}  // namespace pmc
