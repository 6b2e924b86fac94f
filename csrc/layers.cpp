#include "layers.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace pmc {
namespace {

constexpr int64_t kSerial = 1 << 16;  // up to so many numbers one thread is faster than two

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
    if (a.rstd) a.rstd[r] = scale;
  }
}

// A thread's rows. Sums of dweight move from float32 to float64 every kRecent rows.
struct NormRows {
  RmsNormBackward a;
  float* recent;  // [size], 0
  double* total;  // [size], 0
};
constexpr int64_t kRecent = 32;

PMC_INLINE void some(const NormRows& n, int64_t begin, int64_t end) {
  const RmsNormBackward& a = n.a;
  float* recent = n.recent;
  for (int64_t r = begin; r < end; ++r) {
    const float *dy = a.dy + r * a.size, *x = a.x + r * a.size;
    const float rstd = a.rstd[r];
    if (a.dx) {
      float lanes[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= a.size; i += kLanes) {
        for (int k = 0; k < kLanes; ++k) {
          lanes[k] += dy[i + k] * (a.weight[i + k] + a.offset) * x[i + k];
        }
      }
      double sum = 0;
      for (; i < a.size; ++i) sum += dy[i] * (a.weight[i] + a.offset) * x[i];
      for (int k = 0; k < kLanes; ++k) sum += lanes[k];
      const float along = static_cast<float>(sum / a.size) * rstd * rstd;  // the norm does not change along x
      float* dx = a.dx + r * a.size;
      for (i = 0; i < a.size; ++i) dx[i] = rstd * (dy[i] * (a.weight[i] + a.offset) - x[i] * along);
    }
    if (!a.dweight) continue;
    for (int64_t i = 0; i < a.size; ++i) recent[i] += dy[i] * (x[i] * rstd);
    if ((r - begin) % kRecent != kRecent - 1 && r != end - 1) continue;
    for (int64_t i = 0; i < a.size; ++i) n.total[i] += recent[i], recent[i] = 0;
  }
}

PMC_INLINE void some(const SiluMul& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float x = a.gate[i], size = x < 0 ? -x : x;
    const float e = exp_of(-size);  // sigmoid(x) is 1 / (1 + e) or e / (1 + e): nothing overflows
    a.y[i] = x * ((x < 0 ? e : 1.0f) / (1.0f + e)) * a.up[i];
  }
}

template <bool kGate, bool kUp>
PMC_INLINE void silu_back(const SiluMulBackward& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float x = a.gate[i], size = x < 0 ? -x : x;
    const float e = exp_of(-size);
    const float sigmoid = (x < 0 ? e : 1.0f) / (1.0f + e);
    if (kGate) {
      const float rest = (x < 0 ? 1.0f : e) / (1.0f + e);  // 1 - sigmoid, but exact where that is small
      a.dgate[i] = a.dy[i] * a.up[i] * (sigmoid * (1.0f + x * rest));
    }
    if (kUp) a.dup[i] = a.dy[i] * (x * sigmoid);
  }
}

PMC_INLINE void some(const SiluMulBackward& a, int64_t begin, int64_t end) {
  if (a.dgate && a.dup) {
    silu_back<true, true>(a, begin, end);
  } else if (a.dgate) {
    silu_back<true, false>(a, begin, end);
  } else if (a.dup) {
    silu_back<false, true>(a, begin, end);
  }
}

PMC_INLINE void some(const Rotary& a, int64_t begin, int64_t end) {
  const int64_t half = a.dim / 2;
  for (int64_t r = begin; r < end; ++r) {
    const float *cos = a.cos + r * a.dim, *sin = a.sin + r * a.dim;
    for (int64_t h = 0; h < a.heads; ++h) {
      const float* x = a.x + r * a.row_stride + h * a.head_stride;
      float* y = a.y + (r * a.heads + h) * a.dim;
      if (a.back) {
        for (int64_t i = 0; i < half; ++i) {
          y[i] = x[i] * cos[i] + x[half + i] * sin[half + i];
          y[half + i] = x[half + i] * cos[half + i] - x[i] * sin[i];
        }
        continue;
      }
      for (int64_t i = 0; i < half; ++i) {
        y[i] = x[i] * cos[i] - x[half + i] * sin[i];
        y[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
      }
    }
  }
}

template <typename A>
void compiled(const A& a, int64_t begin, int64_t end, Isa isa) {
  dispatch(isa, [&](auto) PMC_ALWAYS_INLINE { some(a, begin, end); });
}

// `count` parts of `each` numbers
template <typename A>
void run(const A& a, int64_t count, int64_t each, Isa isa, int threads) {
  parallel_for(count, count * each < kSerial ? 1 : threads,
               [&](int64_t begin, int64_t end) { compiled(a, begin, end, isa); });
}

// `size` numbers: parts begin at whole vectors, so that those behind the last one are the same for any parts
template <typename A>
void run_blocks(const A& a, Isa isa, int threads) {
  constexpr int64_t kBlock = 64;
  parallel_for(
      (a.size + kBlock - 1) / kBlock, a.size < kSerial ? 1 : threads,
      [&](int64_t begin, int64_t end) { compiled(a, begin * kBlock, std::min(end * kBlock, a.size), isa); });
}

}  // namespace

void rms_norm(const RmsNorm& a, Isa isa, int threads) { run(a, a.rows, a.size, isa, threads); }
void rms_norm_backward(const RmsNormBackward& a, Isa isa, int threads) {
  const int64_t parts = a.rows * a.size < kSerial ? 1 : threads;
  const int64_t sums = a.dweight ? a.size : 0;
  std::vector<float> recent(static_cast<size_t>(parts * sums));
  std::vector<double> total(static_cast<size_t>(parts * sums));
  parallel_for(parts, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      compiled(NormRows{a, recent.data() + p * sums, total.data() + p * sums}, a.rows * p / parts,
               a.rows * (p + 1) / parts, isa);
    }
  });
  for (int64_t i = 0; i < sums; ++i) {  // in the order of parts: deterministic
    double sum = 0;
    for (int64_t p = 0; p < parts; ++p) sum += total[static_cast<size_t>(p * sums + i)];
    a.dweight[i] = static_cast<float>(sum);
  }
}
void silu_mul(const SiluMul& a, Isa isa, int threads) { run_blocks(a, isa, threads); }
void silu_mul_backward(const SiluMulBackward& a, Isa isa, int threads) { run_blocks(a, isa, threads); }
void rotary(const Rotary& a, Isa isa, int threads) { run(a, a.rows, a.heads * a.dim, isa, threads); }

}  // namespace pmc
